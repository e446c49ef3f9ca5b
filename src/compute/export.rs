//! Graphs and plans as text: DOT, JSON that reads back, Markdown. Layers that repeat are told once.

use std::fmt::Write as _;

use super::error::GraphError;
use super::graph::{Access, Graph, Node, Origin, Target, Tensor};
use super::operation::{Operation, operations};
use super::plan::{Edge, Link, Plan, Schedule, Sizes, Span};
use super::shape::{Columns, Dim, Spec};
use super::step::Pad;
use crate::data::dtype::DataType;
use crate::data::json::{Cursor, Document, Json, field, text};
use crate::error::Result;
use crate::tensor::DType;

/// The version of the JSON that is written and read.
const VERSION: i128 = 1;

/// Nodes that are told once: so many from the first, as often as they repeat.
struct Fold {
    first: usize,
    length: usize,
    times: usize,
}

impl Graph {
    /// Layers that are the same but for their weights and caches, told once.
    fn folds(&self) -> Vec<Fold> {
        let mut layers: Vec<(usize, usize)> = Vec::new();
        for (i, node) in self.nodes.iter().enumerate() {
            match layers.last_mut() {
                Some((first, length)) if self.nodes[*first].layer == node.layer => *length += 1,
                _ => layers.push((i, 1)),
            }
        }
        let alike = |a: usize, b: usize| {
            let seen = |node: &Node| {
                let seen =
                    |access: &Access| (self.seen(access), access.columns, self.tensors[access.tensor].origin.name());
                node.accesses.iter().map(seen).collect::<Vec<_>>()
            };
            let (a, b) = (&self.nodes[a], &self.nodes[b]);
            a.operation == b.operation && seen(a) == seen(b)
        };
        let mut folds: Vec<Fold> = Vec::new();
        for (first, length) in layers {
            let in_layer = self.nodes[first].layer.is_some();
            match folds.last_mut() {
                Some(fold)
                    if in_layer && fold.length == length && (0..length).all(|i| alike(fold.first + i, first + i)) =>
                {
                    fold.times += 1;
                }
                _ => folds.push(Fold { first, length, times: 1 }),
            }
        }
        folds
    }

    /// The graph in Graphviz's language: operations as boxes, what they are given as ellipses, values as edges. With a
    /// plan, where each value lies.
    pub fn dot(&self, plan: Option<&Plan>) -> String {
        let mut out = String::new();
        let _ = writeln!(out, "digraph {} {{\n  rankdir=TB;\n  node [shape=box];", quoted(&self.name));
        let folds = self.folds();
        // Each node's stand-in: itself, or its like in the layer that is told.
        let mut shown = vec![0; self.nodes.len()];
        for fold in &folds {
            for i in 0..fold.length * fold.times {
                shown[fold.first + i] = fold.first + i % fold.length;
            }
        }
        let mut given = vec![false; self.tensors.len()];
        for (at, fold) in folds.iter().enumerate() {
            let inner = if fold.times > 1 {
                let title = format!("{} layers", fold.times);
                let _ = writeln!(out, "  subgraph cluster_{at} {{\n    label={};", quoted(&title));
                "    "
            } else {
                "  "
            };
            for i in fold.first..fold.first + fold.length {
                let _ = writeln!(out, "{inner}n{i} [label={}];", quoted(self.nodes[i].operation.name()));
            }
            if fold.times > 1 {
                out.push_str("  }\n");
            }
        }
        let mut last: Vec<Option<usize>> = vec![None; self.tensors.len()];
        let mut edges = Vec::new();
        for (i, node) in self.nodes.iter().enumerate() {
            let told = shown[i] == i;
            for (access, operand) in node.accesses.iter().zip(node.operation.facts().operands) {
                if !operand.role.reads() {
                    continue;
                }
                let tensor = &self.tensors[access.tensor];
                let from = match last[access.tensor] {
                    Some(from) => format!("n{}", shown[from]),
                    None if told => {
                        if !std::mem::replace(&mut given[access.tensor], true) {
                            let label = format!("{}\n{}", tensor.name, tensor.spec);
                            let _ = writeln!(out, "  t{} [shape=ellipse, label={}];", access.tensor, quoted(&label));
                        }
                        format!("t{}", access.tensor)
                    }
                    None => continue,
                };
                let place = plan.and_then(|plan| plan.span(access.tensor));
                let place = place.map_or_else(String::new, |span| format!("\n{}..{}", span.offset, span.end()));
                let label = format!("{}{}", self.seen(access), if told { place } else { String::new() });
                let edge = format!("  {from} -> n{} [label={}];", shown[i], quoted(&label));
                // Of layers that are not told what leads into the one that is.
                if told || !edges.iter().any(|known: &String| known.split(" [").next() == edge.split(" [").next()) {
                    edges.push(edge);
                }
            }
            for (access, operand) in node.accesses.iter().zip(node.operation.facts().operands) {
                if operand.role.writes() {
                    last[access.tensor] = Some(i);
                }
            }
        }
        for edge in edges {
            let _ = writeln!(out, "{edge}");
        }
        for &tensor in &self.outputs {
            let label = format!("{}\n{}", self.tensors[tensor].name, self.tensors[tensor].spec);
            let _ = writeln!(out, "  o{tensor} [shape=ellipse, style=bold, label={}];", quoted(&label));
            if let Some(from) = last[tensor] {
                let _ = writeln!(out, "  n{} -> o{tensor};", shown[from]);
            }
        }
        out.push_str("}\n");
        out
    }

    /// A table of the nodes, with what each moves and computes, the time that moving takes at least at so many bytes a
    /// second, and where its result lies in the arena. `measured` has microseconds for nodes, where they were measured.
    pub fn markdown(&self, plan: &Plan, bandwidth: f64, measured: &[Option<f64>]) -> String {
        let mut out = String::new();
        let sizes = plan.sizes();
        let _ = writeln!(
            out,
            "{}, batch {}: {} nodes, {} kernels. Arena: {} bytes planned, {} naive, {} at least. Weights {}, states {}, \
             step inputs {} bytes.\n",
            self.name,
            plan.batch(),
            self.nodes.len(),
            plan.kernels(self),
            sizes.planned,
            sizes.naive,
            sizes.lower_bound,
            sizes.weights,
            sizes.states,
            sizes.inputs,
        );
        out.push_str(
            "| node | times | operation | kernel | result | bytes | flops | floor µs | measured µs | arena | edge |\n",
        );
        out.push_str("|---|---|---|---|---|---|---|---|---|---|---|\n");
        let mut total = 0.0;
        for fold in self.folds() {
            for i in fold.first..fold.first + fold.length {
                let (node, cost) = (&self.nodes[i], self.cost(i, plan.batch()));
                let floor = cost.bytes as f64 / bandwidth * 1e6;
                total += floor * fold.times as f64;
                let facts = node.operation.facts();
                let result = node.accesses.iter().zip(facts.operands).rev().find(|(_, operand)| operand.role.writes());
                let (shape, place) = result.map_or((String::new(), String::new()), |(access, _)| {
                    let span = plan.span(access.tensor);
                    let place = span.map_or_else(String::new, |span| format!("{}..{}", span.offset, span.end()));
                    (self.seen(access).to_string(), place)
                });
                let edge = plan.edges().iter().find(|edge| edge.to == i).map_or("", |edge| match edge.link {
                    Link::Full => "full",
                    Link::Programmatic => "programmatic",
                });
                let time = measured.get(i).copied().flatten().map_or_else(String::new, |time| format!("{time:.2}"));
                let kernel = self.kernel(i, plan.batch());
                let (name, times) = (facts.name, fold.times);
                let _ = writeln!(
                    out,
                    "| {i} | {times} | {name} | {kernel} | {shape} | {} | {} | {floor:.3} | {time} | {place} | {edge} |",
                    cost.bytes, cost.flops
                );
            }
        }
        let _ = writeln!(out, "\nFloor of all: {total:.1} µs at {:.3} TB/s.", bandwidth / 1e12);
        out
    }

    /// The kernel that serves a node, by its row's name; the operation's own where there is none.
    fn kernel(&self, node: usize, batch: u64) -> &'static str {
        let node = &self.nodes[node];
        let specs = self.given(node);
        let given = super::operation::Given { operation: &node.operation, specs: &specs, batch };
        given.call().map_or("own", |call| call.entry.row.kernel)
    }

    /// The graph as JSON, which [`from_json`](Self::from_json) reads back.
    pub fn json(&self) -> String {
        let tensors = self.tensors.iter().map(|tensor| {
            let mut fields = vec![
                field("name", text(&tensor.name)),
                field("origin", text(tensor.origin.name())),
                field("dtype", text(name_of(tensor.spec.dtype))),
                field("shape", Json::List(tensor.spec.shape.iter().map(|dim| text(&dim.to_string())).collect())),
            ];
            if let Origin::Input(pad) = tensor.origin {
                fields.push(field(
                    "pad",
                    match pad {
                        Pad::RepeatRow0 => text("row 0"),
                        Pad::Value(value) => Json::Object(vec![field("value", Json::Int(value.into()))]),
                        Pad::Reserved(page) => Json::Object(vec![field("page", Json::Int(page.into()))]),
                    },
                ));
            }
            if !tensor.packed.is_empty() {
                let part = |(name, rows): &(String, u64)| {
                    Json::Object(vec![field("name", text(name)), field("rows", Json::Int((*rows).into()))])
                };
                fields.push(field("packed", Json::List(tensor.packed.iter().map(part).collect())));
            }
            Json::Object(fields)
        });
        let nodes = self.nodes.iter().map(|node| {
            let facts = node.operation.facts();
            let parameters = facts.parameters.iter().zip(&node.operation.parameters);
            let operands = facts.operands.iter().zip(&node.accesses).map(|(operand, access)| {
                let tensor = Json::Int(access.tensor as i128);
                let place = access.columns.map_or(tensor.clone(), |columns| {
                    let numbers = [columns.start, columns.width, columns.heads];
                    let numbers = numbers.into_iter().map(|number| Json::Int(number.into())).collect();
                    Json::Object(vec![field("tensor", tensor), field("columns", Json::List(numbers))])
                });
                field(operand.name, place)
            });
            let mut fields = vec![field("operation", text(facts.name))];
            fields.extend(node.layer.map(|layer| field("layer", Json::Int(layer.into()))));
            fields.push(field(
                "parameters",
                Json::Object(parameters.map(|(name, value)| field(name, Json::Float(*value))).collect()),
            ));
            fields.push(field("operands", Json::Object(operands.collect())));
            Json::Object(fields)
        });
        Json::Object(vec![
            field("version", Json::Int(VERSION)),
            field("name", text(&self.name)),
            field("target", text(if self.target == Target::Gpu { "gpu" } else { "host" })),
            field("largest_batch", Json::Int(self.largest.into())),
            field("tensors", Json::List(tensors.collect())),
            field("nodes", Json::List(nodes.collect())),
            field("outputs", Json::List(self.outputs.iter().map(|&tensor| Json::Int(tensor as i128)).collect())),
        ])
        .pretty()
    }

    /// Reads a graph that [`json`](Self::json) wrote, and checks all of it as the builder does.
    ///
    /// # Errors
    /// [`Data`](crate::FlashInferError::Data) with the place for what is not JSON, or not this;
    /// [`Json`](GraphError::Json) for another version and for nodes that do not fit their tensors; and what the builder
    /// answers.
    pub fn from_json(json: &str) -> Result<Self> {
        let document = Document::parse("a compute graph", json.as_bytes(), 1)?;
        let root = document.root();
        version(&root)?;
        let target = match root.need("target")?.text()?.as_str() {
            "gpu" => Target::Gpu,
            "host" => Target::Host,
            other => return Err(root.need("target")?.refuse(format!("{other:?}"), "gpu or host", "export it anew")),
        };
        let largest = root.need("largest_batch")?.size()?.max(1);
        let mut names = std::collections::HashSet::new();
        let mut tensors = Vec::new();
        for cursor in root.need("tensors")?.items()? {
            let tensor = read_tensor(&cursor)?;
            tensor.check(largest)?;
            if let Some(name) = tensor.names().find(|name| !names.insert((*name).to_owned())) {
                return Err(GraphError::DuplicateName { name: name.to_owned() }.into());
            }
            tensors.push(tensor);
        }
        let nodes = root.need("nodes")?.items()?.iter().map(read_node).collect::<Result<_>>()?;
        let mut outputs = Vec::new();
        for cursor in root.need("outputs")?.items()? {
            let tensor = cursor.size()? as usize;
            if tensors.get(tensor).is_none_or(|tensor: &Tensor| tensor.origin != Origin::Value) {
                return Err(cursor.refuse(tensor.to_string(), "a value of the graph", "export it anew"));
            }
            outputs.push(tensor);
        }
        let name = root.need("name")?.text()?;
        let graph = Self { name, target, largest, tensors, nodes, outputs };
        graph.check()?;
        Ok(graph)
    }
}

fn version(root: &Cursor<'_>) -> Result<()> {
    match root.need("version")?.json() {
        Json::Int(VERSION) => Ok(()),
        other => {
            let (at, found) = ("version".to_owned(), other.compact());
            Err(GraphError::Json { at, found, expected: VERSION.to_string() }.into())
        }
    }
}

fn name_of(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
        DType::F32 => "float32",
        DType::F64 => "float64",
        DType::U8 => "uint8",
        DType::I32 => "int32",
        DType::I64 => "int64",
        DType::F8E4M3 => "float8_e4m3fn",
        DType::F8E5M2 => "float8_e5m2",
    }
}

fn read_dim(cursor: &Cursor<'_>) -> Result<Dim> {
    let written = cursor.text()?;
    let dim = match written.strip_suffix('B') {
        Some("") => Some(Dim::BATCH),
        Some(size) => size.strip_suffix('·').and_then(|size| size.parse().ok()).map(Dim::per_row),
        None => written.parse().ok().map(Dim::fixed),
    };
    dim.ok_or_else(|| cursor.refuse(format!("{written:?}"), "a size: 8, B or 8·B", "export it anew"))
}

fn read_tensor(cursor: &Cursor<'_>) -> Result<Tensor> {
    let written = cursor.need("dtype")?;
    let dtype = DataType::from_name(&written.text()?).to_dtype();
    let dtype = dtype.ok_or_else(|| written.refuse("an unknown type", "an element type", "export it anew"))?;
    let shape = cursor.need("shape")?.items()?.iter().map(read_dim).collect::<Result<Vec<_>>>()?;
    let origin = cursor.need("origin")?;
    let origin = match origin.text()?.as_str() {
        "weight" => Origin::Weight,
        "state" => Origin::State,
        "value" => Origin::Value,
        "step input" => {
            let pad = cursor.need("pad")?;
            Origin::Input(match (pad.get("value"), pad.get("page")) {
                (Some(value), _) => match value.json() {
                    Json::Int(number) if i64::try_from(number).is_ok() => Pad::Value(number as i64),
                    _ => return Err(value.refuse("something else", "a whole number", "export it anew")),
                },
                (None, Some(page)) => match u32::try_from(page.size()?) {
                    Ok(number) => Pad::Reserved(number),
                    Err(_) => return Err(page.refuse("a larger number", "a page below 2^32", "export it anew")),
                },
                (None, None) => Pad::RepeatRow0,
            })
        }
        other => {
            return Err(origin.refuse(format!("{other:?}"), "weight, state, step input or value", "export it anew"));
        }
    };
    let mut packed = Vec::new();
    if let Some(parts) = cursor.given("packed") {
        for part in parts.items()? {
            packed.push((part.need("name")?.word()?, part.need("rows")?.size()?));
        }
    }
    Ok(Tensor { name: cursor.need("name")?.word()?, spec: Spec::new(dtype, shape), origin, packed })
}

fn read_node(cursor: &Cursor<'_>) -> Result<Node> {
    let written = cursor.need("operation")?;
    let name = written.text()?;
    let Some(facts) = operations().iter().find(|facts| facts.name == name) else {
        return Err(written.refuse(format!("{name:?}"), "an operation of this release", "export it anew"));
    };
    let given = cursor.need("parameters")?;
    let parameters = facts.parameters.iter().map(|name| given.need(name)?.figure()).collect::<Result<Vec<_>>>()?;
    let operands = cursor.need("operands")?;
    let mut accesses = Vec::new();
    for operand in facts.operands {
        let place = operands.need(operand.name)?;
        let Some(columns) = place.get("columns") else {
            accesses.push(Access { tensor: place.size()? as usize, columns: None });
            continue;
        };
        let numbers = columns.items()?.iter().map(Cursor::size).collect::<Result<Vec<_>>>()?;
        let [start, width, heads] = numbers[..] else {
            return Err(columns.refuse(format!("{} numbers", numbers.len()), "three", "export it anew"));
        };
        let tensor = place.need("tensor")?.size()? as usize;
        accesses.push(Access { tensor, columns: Some(Columns { start, width, heads }) });
    }
    let layer = match cursor.given("layer") {
        Some(layer) => Some(u32::try_from(layer.size()?).unwrap_or(u32::MAX)),
        None => None,
    };
    Ok(Node { operation: Operation::new(facts.kind, &parameters), accesses, layer })
}

impl Plan {
    /// The plan as JSON, which [`from_json`](Self::from_json) reads back.
    pub fn json(&self) -> String {
        let number = |number: u64| Json::Int(number.into());
        let spans = |spans: &[Option<Span>]| {
            let span = |span: &Option<Span>| {
                span.map_or(Json::Null, |span| Json::List(vec![number(span.offset), number(span.bytes)]))
            };
            Json::List(spans.iter().map(span).collect())
        };
        let edges = self.edges.iter().map(|edge| {
            let link = if edge.link == Link::Full { "full" } else { "programmatic" };
            Json::List(vec![number(edge.from as u64), number(edge.to as u64), text(link)])
        });
        let schedule = if self.schedule == Schedule::Stream { "stream" } else { "branches" };
        let sizes = self.sizes;
        let sizes = [
            sizes.naive,
            sizes.planned,
            sizes.lower_bound,
            sizes.workspaces,
            sizes.weights,
            sizes.states,
            sizes.inputs,
        ];
        Json::Object(vec![
            field("version", Json::Int(VERSION)),
            field("graph", text(&self.graph)),
            field("batch", number(self.batch)),
            field("schedule", text(schedule)),
            field("order", Json::List(self.order.iter().map(|&node| number(node as u64)).collect())),
            field("edges", Json::List(edges.collect())),
            field("values", spans(&self.spans)),
            field("workspaces", spans(&self.workspaces)),
            field("sizes", Json::List(sizes.into_iter().map(number).collect())),
        ])
        .pretty()
    }

    /// Reads a plan for a graph, and [proves](Self::verify) it.
    ///
    /// # Errors
    /// [`Data`](crate::FlashInferError::Data) for what is not JSON or not this, [`Json`](GraphError::Json) for another
    /// version, and [`WrongPlan`](GraphError::WrongPlan).
    pub fn from_json(graph: &Graph, json: &str) -> Result<Self> {
        let document = Document::parse("a plan", json.as_bytes(), 1)?;
        let root = document.root();
        version(&root)?;
        let spans = |name: &str| -> Result<Vec<Option<Span>>> {
            let span = |cursor: &Cursor<'_>| {
                if cursor.is_null() {
                    return Ok(None);
                }
                match cursor.items()?.iter().map(Cursor::size).collect::<Result<Vec<_>>>()?[..] {
                    [offset, bytes] => Ok(Some(Span { offset, bytes })),
                    _ => Err(cursor.refuse("other numbers", "an offset and bytes", "export it anew")),
                }
            };
            root.need(name)?.items()?.iter().map(span).collect()
        };
        let schedule = match root.need("schedule")?.text()?.as_str() {
            "stream" => Schedule::Stream,
            "branches" => Schedule::Branches,
            _ => return Err(root.need("schedule")?.refuse("something else", "stream or branches", "export it anew")),
        };
        let mut edges = Vec::new();
        for cursor in root.need("edges")?.items()? {
            let parts = cursor.items()?;
            let [from, to, link] = &parts[..] else {
                return Err(cursor.refuse("something else", "two nodes and a word", "export it anew"));
            };
            let link = match link.text()?.as_str() {
                "full" => Link::Full,
                "programmatic" => Link::Programmatic,
                _ => return Err(link.refuse("something else", "full or programmatic", "export it anew")),
            };
            edges.push(Edge { from: from.size()? as usize, to: to.size()? as usize, link });
        }
        let order = root.need("order")?.items()?.iter().map(|node| Ok(node.size()? as usize)).collect::<Result<_>>()?;
        let sizes = root.need("sizes")?;
        let numbers = sizes.items()?.iter().map(Cursor::size).collect::<Result<Vec<_>>>()?;
        let [naive, planned, lower_bound, workspaces, weights, states, inputs] = numbers[..] else {
            return Err(sizes.refuse(format!("{} numbers", numbers.len()), "seven", "export it anew"));
        };
        let plan = Self {
            graph: root.need("graph")?.text()?,
            batch: root.need("batch")?.size()?,
            schedule,
            order,
            edges,
            spans: spans("values")?,
            workspaces: spans("workspaces")?,
            sizes: Sizes { naive, planned, lower_bound, workspaces, weights, states, inputs },
        };
        plan.verify(graph)?;
        Ok(plan)
    }
}

/// In quotation marks, for DOT.
fn quoted(label: &str) -> String {
    format!("\"{}\"", label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"))
}
