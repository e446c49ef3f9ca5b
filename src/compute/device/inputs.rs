//! A step's inputs: what the host gave, what it knows of what the device made of them since, and whether kernels may find
//! their way by them.
//!
//! Ids, positions, lengths and pages are what kernels read memory by, and nothing on the device looks at them. So they are
//! checked here when they are given, and what the device changes by itself is bounded: positions and lengths grow by one for each
//! [`advance`](super::super::GraphBuilder::advance), which is counted, and a token is one of the columns that it was chosen
//! from.

use super::super::error::GraphError;
use super::super::graph::{Graph, Node, Origin};
use super::super::operation::OpKind;
use super::super::step::StepBlock;
use crate::error::Result;
use crate::tensor::DType;

/// What an operand is read as an index into.
struct Index {
    operand: usize,
    /// The least and the first number that is too large.
    from: i64,
    end: i64,
}

/// Which operands of a node kernels find their way by.
fn indices(graph: &Graph, node: &Node) -> Vec<Index> {
    let specs = graph.given(node);
    let size = |operand: usize, at: usize| -> i64 {
        let dim = specs[operand].shape.get(at).and_then(|dim| dim.constant());
        dim.and_then(|size| i64::try_from(size).ok()).unwrap_or(0)
    };
    let index = |operand, end| Index { operand, from: 0, end };
    // What a row's pages hold, by the page table and the cache.
    let capacity = |table: usize, cache: usize| size(table, 1).saturating_mul(size(cache, 1));
    let appended = |positions: usize, angles: Option<usize>| {
        let (table, cache) = (positions + 1, positions + 2);
        let end = angles.map_or(i64::MAX, |angles| size(angles, 0)).min(capacity(table, cache));
        vec![index(positions, end), index(table, size(cache, 0))]
    };
    // Without a wildcard, so that whoever adds an operation says what it goes by.
    match node.operation.kind {
        OpKind::Embedding => vec![index(0, size(1, 0))],
        OpKind::Rope => vec![index(3, size(2, 0))],
        OpKind::Append => appended(2, None),
        OpKind::RopeAppend => appended(4, Some(3)),
        OpKind::QkNormRopeAppend => appended(6, Some(5)),
        OpKind::DecodeAttention => {
            let lengths = Index { operand: 4, from: 1, end: capacity(3, 1).saturating_add(1) };
            vec![index(3, size(1, 0)), lengths]
        }
        OpKind::RmsNorm
        | OpKind::FusedAddRmsNorm
        | OpKind::HeadRmsNorm
        | OpKind::MatMul
        | OpKind::MatMulBias
        | OpKind::MatMulAdd
        | OpKind::SiluAndMul
        | OpKind::GeluAndMul
        | OpKind::GeluTanhAndMul
        | OpKind::Add
        | OpKind::Mul
        | OpKind::SigmoidGate
        | OpKind::Silu
        | OpKind::Softmax
        | OpKind::Copy
        | OpKind::Argmax
        | OpKind::Sample
        | OpKind::Advance
        | OpKind::GatedDeltaRule => Vec::new(),
    }
}

/// One input.
#[derive(Debug)]
struct Input {
    tensor: usize,
    /// Its bytes in the block.
    first: usize,
    bytes: usize,
    /// The least number that it may hold, and the first that is too large, where it is an index.
    bounds: Option<(i64, i64)>,
    /// How often a step adds one to it.
    steps: i64,
    /// The largest number that was given, with its row, and how often one was added since.
    largest: (u64, i64),
    added: i64,
    /// For how many rows it was given.
    rows: u64,
    /// Whether the device has not what was given yet.
    changed: bool,
}

/// The inputs of a graph's steps.
#[derive(Debug)]
pub(super) struct Inputs {
    block: StepBlock,
    host: Vec<u8>,
    all: Vec<Input>,
    /// For each node, the inputs that it is steered by, with what has been added to each by then within its step, and those
    /// that it adds to.
    used: Vec<(Vec<(usize, i64, i64)>, Vec<usize>)>,
}

/// A refusal of a graph whose kernels would be steered by what nobody checks.
fn unsteered(graph: &Graph, node: usize, reason: String) -> crate::FlashInferError {
    let remedy = "declare what it goes by as a step input, and let `advance` alone change it";
    GraphError::UnsupportedKernel { op: graph.node_name(node), reason, remedy }.into()
}

impl Inputs {
    /// Of a graph, for batches of up to so many rows.
    pub(super) fn new(graph: &Graph, largest: u64) -> Result<Self> {
        let block = StepBlock::new(graph, largest);
        let mut all: Vec<Input> = Vec::new();
        for (i, tensor) in graph.tensors.iter().enumerate() {
            if matches!(tensor.origin, Origin::Input(_)) {
                let (first, bytes) = block.place(graph, &tensor.name)?;
                all.push(Input {
                    tensor: i,
                    first: first as usize,
                    bytes: bytes as usize,
                    bounds: None,
                    steps: 0,
                    largest: (0, 0),
                    added: 0,
                    rows: 0,
                    changed: false,
                });
            }
        }
        // Tokens: whole numbers that were computed, of which each is below the columns that it was chosen from.
        let mut below: Vec<Option<i64>> = vec![None; graph.tensors.len()];
        let (mut used, mut tokens) = (Vec::new(), Vec::new());
        for (i, node) in graph.nodes.iter().enumerate() {
            let input = |operand: usize| all.iter().position(|input| input.tensor == node.accesses[operand].tensor);
            let kind = node.operation.kind;
            let (mut steered, mut added) = (Vec::new(), Vec::new());
            for Index { operand, from, end } in indices(graph, node) {
                let argument = node.operation.facts().operands[operand].name;
                match (input(operand), below[node.accesses[operand].tensor]) {
                    (Some(at), _) => steered.push((at, from, end)),
                    // An id that was computed in this step.
                    (None, Some(columns)) if kind == OpKind::Embedding && columns <= end => {}
                    (None, found) => {
                        let found = found.map_or_else(String::new, |columns| format!(" of up to {columns}, of {end}"));
                        return Err(unsteered(graph, i, format!("{argument} is no step input{found}")));
                    }
                }
            }
            if kind == OpKind::Advance {
                let [Some(ids), Some(positions), Some(lengths)] = [1, 2, 3].map(input) else {
                    return Err(unsteered(graph, i, "it would change what is no step input".to_owned()));
                };
                let Some(columns) = below[node.accesses[0].tensor] else {
                    return Err(unsteered(graph, i, "its token is none that `argmax` or `sample` chose".to_owned()));
                };
                tokens.push((i, ids, columns));
                added.extend([positions, lengths]);
            }
            if matches!(kind, OpKind::Argmax | OpKind::Sample) {
                let specs = graph.given(node);
                let columns = specs[0].shape.get(1).and_then(|dim| dim.constant()).unwrap_or(u64::MAX);
                if let Some(token) = node.accesses.last() {
                    below[token.tensor] = Some(i64::try_from(columns).unwrap_or(i64::MAX));
                }
            }
            used.push((steered, added));
        }
        let mut inputs = Self { block, host: Vec::new(), all, used };
        inputs.bound(graph, &tokens)?;
        inputs.host = vec![0; inputs.block.bytes() as usize];
        Ok(inputs)
    }

    /// What each input may hold when a step begins, by all of its uses.
    fn bound(&mut self, graph: &Graph, tokens: &[(usize, usize, i64)]) -> Result<()> {
        let mut added = vec![0i64; self.all.len()];
        for (steered, adds) in &mut self.used {
            for (at, from, end) in steered {
                // From here on, what it may hold when the step begins.
                *end = end.saturating_sub(added[*at]);
                let (least, most) = self.all[*at].bounds.unwrap_or((i64::from(i32::MIN), i64::from(i32::MAX)));
                self.all[*at].bounds = Some((least.max(*from), most.min(*end)));
            }
            adds.iter().for_each(|at| added[*at] += 1);
        }
        for (input, steps) in self.all.iter_mut().zip(added) {
            input.steps = steps;
        }
        for &(node, ids, columns) in tokens {
            let input = &self.all[ids];
            let Some((from, end)) = input.bounds else { continue };
            if from > 0 || columns > end || input.steps > 0 {
                let name = &graph.tensors[input.tensor].name;
                return Err(unsteered(
                    graph,
                    node,
                    format!("it writes tokens of up to {columns} to {name}, by which kernels find {end} places"),
                ));
            }
        }
        for input in &self.all {
            let tensor = &graph.tensors[input.tensor];
            let Some((from, end)) = input.bounds else { continue };
            if tensor.spec.dtype != DType::I32 {
                let found = tensor.spec.to_string();
                return Err(mismatch(&tensor.name, found, "I32, since kernels find their way by it".to_owned()));
            }
            let pad = match tensor.origin {
                Origin::Input(super::super::step::Pad::Value(value)) => value,
                Origin::Input(super::super::step::Pad::Reserved(page)) => page.into(),
                _ => continue,
            };
            if pad < from || pad >= end {
                let found = format!("rows that nobody asked for padded with {pad}");
                return Err(mismatch(&tensor.name, found, format!("{from} to {}", end - 1)));
            }
        }
        Ok(())
    }

    /// The bytes of the block.
    pub(super) fn bytes(&self) -> u64 {
        self.block.bytes()
    }

    /// Where an input lies in the block.
    pub(super) fn place(&self, tensor: usize) -> Option<u64> {
        self.all.iter().find(|input| input.tensor == tensor).map(|input| input.first as u64)
    }

    /// Takes an input of a batch of so many rows, of this element type.
    pub(super) fn give(&mut self, graph: &Graph, name: &str, rows: u64, dtype: DType, bytes: &[u8]) -> Result<()> {
        let tensor = graph.find("step input", name)?;
        let Some(input) = self.all.iter_mut().find(|input| input.tensor == tensor) else {
            unreachable!("every input of the graph is one of these")
        };
        let spec = &graph.tensors[tensor].spec;
        let expected = spec.bytes(rows);
        if spec.dtype != dtype || bytes.len() as u64 != expected {
            let found = format!("{} bytes of {dtype}", bytes.len());
            return Err(mismatch(name, found, format!("{expected} of {spec} for {rows} rows")));
        }
        let row = (spec.bytes(1) as usize / dtype.size()).max(1);
        if let Some((from, end)) = input.bounds {
            let mut largest = (0, i64::MIN);
            for (i, number) in bytes.chunks_exact(4).enumerate() {
                let number = i64::from(i32::from_ne_bytes([number[0], number[1], number[2], number[3]]));
                let at = (i / row) as u64;
                if number >= end && input.steps > 0 {
                    return Err(too_long(at, number, from, end));
                }
                if number < from || number >= end {
                    let found = format!("{number} in row {at}");
                    return Err(mismatch(name, found, format!("{from} to {}", end - 1)));
                }
                if number > largest.1 {
                    largest = (at, number);
                }
            }
            let pad = match graph.tensors[tensor].origin {
                Origin::Input(super::super::step::Pad::Value(value)) => value,
                _ => i64::MIN,
            };
            input.largest = if pad > largest.1 { (rows, pad) } else { largest };
        }
        self.block.fill(graph, name, &mut self.host, bytes)?;
        (input.added, input.rows, input.changed) = (0, rows, true);
        Ok(())
    }

    /// Looks at whether all is there for so many steps of a batch, and whether no index grows too large on the way.
    pub(super) fn check(&self, graph: &Graph, rows: u64, steps: u64) -> Result<()> {
        for input in &self.all {
            let tensor = &graph.tensors[input.tensor];
            let grows = tensor.spec.shape.first().is_some_and(|dim| dim.constant().is_none());
            if input.rows == 0 || (grows && input.rows < rows) {
                let expected = format!("{} for {rows} rows", tensor.spec);
                let (kind, name) = (tensor.origin.name(), tensor.name.clone());
                return Err(GraphError::Missing { kind, name, expected }.into());
            }
            self.fits(input, input.steps.saturating_mul(i64::try_from(steps).unwrap_or(i64::MAX) - 1))?;
        }
        Ok(())
    }

    /// That an input is no larger than it may be when a step begins, after so much more was added to it.
    fn fits(&self, input: &Input, more: i64) -> Result<()> {
        let Some((from, end)) = input.bounds else { return Ok(()) };
        let (row, largest) = input.largest;
        let then = largest.saturating_add(input.added).saturating_add(more);
        if then < end { Ok(()) } else { Err(too_long(row, then, from, end)) }
    }

    /// That a node may be launched by itself: its part of what [`check`](Self::check) looks at for a whole step.
    pub(super) fn check_node(&self, node: usize, added: &[i64]) -> Result<()> {
        for &(at, from, end) in &self.used[node].0 {
            let input = &self.all[at];
            // What was added within this step was taken off the end already.
            let then = input.largest.1.saturating_add(input.added).saturating_sub(added[at]);
            if then >= end {
                return Err(too_long(input.largest.0, then, from, end));
            }
        }
        Ok(())
    }

    /// Counts what a node adds, once it was launched; and what was added within its step.
    pub(super) fn launched(&mut self, node: usize, added: &mut [i64]) {
        for &at in &self.used[node].1 {
            self.all[at].added = self.all[at].added.saturating_add(1);
            added[at] += 1;
        }
    }

    /// Counts what a whole step adds.
    pub(super) fn stepped(&mut self) {
        self.all.iter_mut().for_each(|input| input.added = input.added.saturating_add(input.steps));
    }

    pub(super) fn count(&self) -> usize {
        self.all.len()
    }

    /// The block, and the parts of it that the device has not yet: neighbours as one.
    pub(super) fn changed(&self) -> (&[u8], impl Iterator<Item = (usize, usize)>) {
        let mut at = 0;
        let next = move || {
            while self.all.get(at).is_some_and(|input| !input.changed) {
                at += 1;
            }
            let first = self.all.get(at)?.first;
            let mut end = first;
            while let Some(input) = self.all.get(at).filter(|input| input.changed) {
                end = input.first + input.bytes;
                at += 1;
            }
            Some((first, end - first))
        };
        (&self.host, std::iter::from_fn(next))
    }

    pub(super) fn is_changed(&self) -> bool {
        self.all.iter().any(|input| input.changed)
    }

    /// The device has all that was given.
    pub(super) fn copied(&mut self) {
        self.all.iter_mut().for_each(|input| input.changed = false);
    }
}

fn mismatch(name: &str, found: String, expected: String) -> crate::FlashInferError {
    GraphError::Mismatch { kind: "step input", name: name.to_owned(), found, expected }.into()
}

/// An index that grows with the sequence, at a place past the last: lengths begin at 1, positions at 0.
fn too_long(row: u64, number: i64, from: i64, end: i64) -> crate::FlashInferError {
    let tokens = |number: i64| (number + 1 - from).max(0) as u64;
    GraphError::ContextTooLong { row, length: tokens(number), capacity: tokens(end - 1) }.into()
}
