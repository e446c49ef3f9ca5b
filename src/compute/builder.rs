//! Builds graphs: typed, and checked operation by operation.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use super::error::GraphError;
use super::graph::{Access, Graph, Node, Origin, Target, Tensor};
use super::operation::{COPIES, Check, Given, OpKind, Operation, Role, RowArgument};
use super::shape::{Columns, Dim, Spec};
use super::step::Pad;
use crate::contract::{Operand, check, explain};
use crate::error::Result;
use crate::owner::Owner;
use crate::stream::Stream;
use crate::tensor::{DType, Device, Layout};

/// What an operation computed. It can be read any number of times by `&`, and overwritten once, which takes it: there is no
/// `Clone`. To keep what would be overwritten, [`copy`](GraphBuilder::copy) it first.
#[derive(Debug)]
#[must_use = "a value that nothing reads and that is no output is computed for nothing"]
pub struct Value {
    graph: u64,
    tensor: usize,
}

/// A weight: memory that is read alone.
#[derive(Debug)]
pub struct Weight {
    graph: u64,
    tensor: usize,
}

/// What outlives a step: a cache, or a recurrent state.
#[derive(Debug)]
pub struct State {
    graph: u64,
    tensor: usize,
}

/// What a step is given: ids, positions, lengths, a page table.
#[derive(Debug)]
pub struct StepInput {
    graph: u64,
    tensor: usize,
}

/// Columns of a value, to be read.
#[derive(Debug, Clone, Copy)]
pub struct Part<'v> {
    value: &'v Value,
    columns: Columns,
}

impl Value {
    /// Some of its columns, which may be seen as [`heads`](Columns::heads).
    pub fn columns(&self, columns: Columns) -> Part<'_> {
        Part { value: self, columns }
    }
}

mod sealed {
    pub trait Sealed {}
}

/// What can be read where numbers are: a value, columns of one, or a step input.
pub trait Readable: sealed::Sealed {
    #[doc(hidden)]
    fn of(&self) -> (u64, usize, Option<Columns>);
}

macro_rules! readable {
    ($($type:ty: |$this:ident| $of:expr;)+) => {$(
        impl sealed::Sealed for $type {}
        impl Readable for $type {
            fn of(&self) -> (u64, usize, Option<Columns>) {
                let $this = self;
                $of
            }
        }
    )+};
}

readable! {
    &Value: |this| (this.graph, this.tensor, None);
    Part<'_>: |this| (this.value.graph, this.value.tensor, Some(this.columns));
    &StepInput: |this| (this.graph, this.tensor, None);
}

/// Builds a graph.
#[derive(Debug)]
pub struct GraphBuilder {
    id: u64,
    graph: Graph,
    names: HashMap<String, usize>,
    layer: Option<u32>,
}

/// One operand: its graph, its tensor, its columns.
type Used = (u64, usize, Option<Columns>);

impl GraphBuilder {
    /// A graph of this name, to run on a GPU with batches of at most so many rows.
    pub fn new(name: &str, largest_batch: u64) -> Self {
        Self::for_target(name, largest_batch, Target::Gpu)
    }

    /// A graph that is checked against what this target takes.
    pub fn for_target(name: &str, largest_batch: u64, target: Target) -> Self {
        static IDS: AtomicU64 = AtomicU64::new(1);
        let (tensors, nodes, outputs) = (Vec::new(), Vec::new(), Vec::new());
        let graph = Graph { name: name.to_owned(), target, largest: largest_batch.max(1), tensors, nodes, outputs };
        Self { id: IDS.fetch_add(1, Ordering::Relaxed), graph, names: HashMap::new(), layer: None }
    }

    /// Operations that follow belong to this layer of the model, which exports show and fold.
    pub fn layer(&mut self, layer: Option<u32>) {
        self.layer = layer;
    }

    fn declare(&mut self, name: &str, spec: Spec, origin: Origin, packed: Vec<(String, u64)>) -> Result<usize> {
        let at = self.graph.tensors.len();
        let tensor = Tensor { name: name.to_owned(), spec, origin, packed };
        tensor.check(self.graph.largest)?;
        for (i, given) in tensor.names().enumerate() {
            if self.names.contains_key(given) || tensor.names().take(i).any(|earlier| earlier == given) {
                return Err(GraphError::DuplicateName { name: given.to_owned() }.into());
            }
        }
        self.names.extend(tensor.names().map(|given| (given.to_owned(), at)));
        self.graph.tensors.push(tensor);
        Ok(at)
    }

    /// A weight of this name, type and shape.
    ///
    /// # Errors
    /// [`DuplicateName`](GraphError::DuplicateName); [`ShapeMismatch`](GraphError::ShapeMismatch) for no sizes, more than
    /// four, a size of 0, or one that grows with the batch.
    pub fn weight(&mut self, name: &str, dtype: DType, shape: impl Into<Vec<Dim>>) -> Result<Weight> {
        let tensor = self.declare(name, Spec::new(dtype, shape), Origin::Weight, Vec::new())?;
        Ok(Weight { graph: self.id, tensor })
    }

    /// A weight that is others one after the other along their first dimension: `q`, `k` and `v` for one product. It is
    /// filled from these names, of which each has so many of the first dimension.
    ///
    /// # Errors
    /// As for [`weight`](Self::weight), and [`ShapeMismatch`](GraphError::ShapeMismatch) for parts that are not as many
    /// together. The parts' names are names of weights too.
    pub fn packed_weight(
        &mut self,
        name: &str,
        dtype: DType,
        shape: impl Into<Vec<Dim>>,
        parts: &[(&str, u64)],
    ) -> Result<Weight> {
        let spec = Spec::new(dtype, shape);
        if parts.is_empty() {
            let (op, found) = (format!("weight {name:?}"), super::shape::sizes(&spec.shape));
            let expected = "a part at least, by whose name it is given".to_owned();
            return Err(GraphError::ShapeMismatch { op, argument: "parts", found, expected }.into());
        }
        let parts = parts.iter().map(|&(part, rows)| (part.to_owned(), rows)).collect();
        let tensor = self.declare(name, spec, Origin::Weight, parts)?;
        Ok(Weight { graph: self.id, tensor })
    }

    /// A state of this name, type and shape.
    ///
    /// # Errors
    /// As for [`weight`](Self::weight), but sizes may grow with the batch.
    pub fn state(&mut self, name: &str, dtype: DType, shape: impl Into<Vec<Dim>>) -> Result<State> {
        let tensor = self.declare(name, Spec::new(dtype, shape), Origin::State, Vec::new())?;
        Ok(State { graph: self.id, tensor })
    }

    /// An input of every step, with what stands in the rows between a batch and its bucket.
    ///
    /// # Errors
    /// As for [`state`](Self::state).
    pub fn input(&mut self, name: &str, dtype: DType, shape: impl Into<Vec<Dim>>, pad: Pad) -> Result<StepInput> {
        let tensor = self.declare(name, Spec::new(dtype, shape), Origin::Input(pad), Vec::new())?;
        Ok(StepInput { graph: self.id, tensor })
    }

    /// Adds a node: checks it, makes its results, and answers their places.
    fn add_node(&mut self, kind: OpKind, parameters: &[f64], used: &[Used]) -> Result<Vec<usize>> {
        let operation = Operation::new(kind, parameters);
        let facts = operation.facts();
        let at = self.graph.nodes.len();
        let op = match self.layer {
            Some(layer) => format!("node {at}, layer {layer}, {}", facts.name),
            None => format!("node {at}, {}", facts.name),
        };
        for ((graph, ..), operand) in used.iter().zip(facts.operands) {
            if *graph != self.id {
                return Err(GraphError::ForeignValue { op, argument: operand.name }.into());
            }
        }
        let accesses = used.iter().map(|&(_, tensor, columns)| Access { tensor, columns }).collect();
        let mut node = Node { operation, accesses, layer: self.layer };
        let made = checked(&self.graph, &node, &op)?;
        let first = self.graph.tensors.len();
        let mut results = Vec::new();
        for (i, spec) in made.into_iter().enumerate() {
            let name = if i == 0 { format!("v{at}") } else { format!("v{at}.{i}") };
            let tensor = self.declare(&name, spec, Origin::Value, Vec::new())?;
            node.accesses.push(Access { tensor, columns: None });
            results.push(tensor);
        }
        for batch in sampled(&self.graph) {
            if let Err(error) = keeps_row(&self.graph, &node, &op, batch) {
                for tensor in self.graph.tensors.drain(first..) {
                    self.names.remove(&tensor.name);
                }
                return Err(error);
            }
        }
        self.graph.nodes.push(node);
        Ok(results)
    }

    fn made(&mut self, kind: OpKind, parameters: &[f64], used: &[Used]) -> Result<Value> {
        let results = self.add_node(kind, parameters, used)?;
        Ok(Value { graph: self.id, tensor: results[0] })
    }

    /// Declares the result to be an output of this name, which stays until the end of the step.
    ///
    /// # Errors
    /// [`ForeignValue`](GraphError::ForeignValue), [`DuplicateName`](GraphError::DuplicateName).
    pub fn output(&mut self, name: &str, value: Value) -> Result<()> {
        let op = format!("output {name:?}");
        if value.graph != self.id {
            return Err(GraphError::ForeignValue { op, argument: "value" }.into());
        }
        if self.names.contains_key(name) {
            return Err(GraphError::DuplicateName { name: name.to_owned() }.into());
        }
        let tensor = &mut self.graph.tensors[value.tensor];
        self.names.remove(&tensor.name);
        tensor.name = name.to_owned();
        self.names.insert(name.to_owned(), value.tensor);
        self.graph.outputs.push(value.tensor);
        Ok(())
    }

    /// The graph. What is odd about it is told by [`Graph::warnings`].
    ///
    /// # Errors
    /// None today: each operation was checked when it was added.
    pub fn finish(self) -> Result<Graph> {
        Ok(self.graph)
    }
}

/// Checks a node's operands, and answers what it makes.
pub(super) fn checked(graph: &Graph, node: &Node, op: &str) -> Result<Vec<Spec>> {
    let facts = node.operation.facts();
    let given = facts.operands.iter().filter(|operand| operand.role != Role::Write).count();
    for (access, operand) in node.accesses.iter().zip(facts.operands) {
        let Some(columns) = access.columns else { continue };
        let spec = &graph.tensors[access.tensor].spec;
        let wrong = |expected: String| GraphError::ShapeMismatch {
            op: op.to_owned(),
            argument: operand.name,
            found: format!("columns {} to {} of {spec}, as {} heads", columns.start, columns.end(), columns.heads),
            expected,
        };
        let width = match spec.shape[..] {
            [_, width] => width.constant().unwrap_or(0),
            _ => return Err(wrong("columns of a tensor of two dimensions".to_owned()).into()),
        };
        let outside = columns.width == 0 || columns.end() > width;
        if outside || columns.heads > 0 && !columns.width.is_multiple_of(columns.heads) {
            return Err(wrong(format!("columns within {width}, a multiple of the heads")).into());
        }
        if !operand.strided && (columns.start, columns.width) != (0, width) {
            return Err(wrong("all columns: this operand lies in a row".to_owned()).into());
        }
    }
    let specs: Vec<Spec> = node.accesses[..given].iter().map(|access| graph.seen(access)).collect();
    let operation = &node.operation;
    if operation.parameters.len() != facts.parameters.len() {
        return Err(GraphError::Parameter {
            op: op.to_owned(),
            parameter: "parameters",
            found: operation.parameters.len().to_string(),
            expected: "as many as the operation has",
        }
        .into());
    }
    overlapping(graph, node, op)?;
    let made = (facts.rule)(&Check { op, operation, specs: &specs, target: graph.target })?;
    Ok(made)
}

/// That what a node overwrites is nothing else of its operands, but for columns beside it.
fn overlapping(graph: &Graph, node: &Node, op: &str) -> Result<()> {
    let operands = node.operation.facts().operands;
    for (i, access) in node.accesses.iter().enumerate() {
        if !operands[i].role.writes() {
            continue;
        }
        for (j, other) in node.accesses.iter().enumerate() {
            let apart = match (access.columns, other.columns) {
                (Some(a), Some(b)) => a.end() <= b.start || b.end() <= a.start,
                _ => false,
            };
            if i != j && access.tensor == other.tensor && !apart {
                return Err(GraphError::ShapeMismatch {
                    op: op.to_owned(),
                    argument: operands[i].name,
                    found: format!("{}, which is {} too", graph.tensors[access.tensor].name, operands[j].name),
                    expected: "memory that no other operand is, since it is overwritten".to_owned(),
                }
                .into());
            }
        }
    }
    Ok(())
}

/// The batches that a node is checked for when it is added: sizes are linear in it, so that what holds for both ends holds
/// between them. A plan checks its own again.
pub(super) fn sampled(graph: &Graph) -> impl Iterator<Item = u64> + use<> {
    let largest = graph.largest;
    [1, largest].into_iter().take(if largest == 1 { 1 } else { 2 })
}

/// Checks a node by its kernel's row, where there is one, for a batch.
pub(super) fn keeps_row(graph: &Graph, node: &Node, op: &str, batch: u64) -> Result<()> {
    // What every allocation and every place in an arena is a multiple of.
    const ALIGNED: usize = 256;
    if node.operation.facts().call.is_none() {
        return Ok(());
    }
    let specs = graph.given(node);
    let Some(call) = (Given { operation: &node.operation, specs: &specs, batch }).call() else { return Ok(()) };
    let device = if graph.target == Target::Gpu { Device::Cuda(0) } else { Device::Cpu };
    let data = std::ptr::without_provenance_mut::<u8>(ALIGNED);
    let vector = |dtype, count: u64| Layout::build(data.cast(), device, dtype, &[count as i64], None, None);
    let layouts: Vec<Option<Layout>> = call
        .arguments
        .iter()
        .map(|argument| match *argument {
            RowArgument::Operand(_) | RowArgument::Heads(..) => {
                let access = argument.access(&node.accesses, &specs);
                access.map(|access| graph.layout(&access, batch, data, device))
            }
            RowArgument::Flat(i) => Some(vector(specs[i].dtype, specs[i].elements(batch))),
            RowArgument::Ramp { dtype, count, .. } => Some(vector(dtype, count)),
            RowArgument::Scratch(bytes) => Some(vector(DType::U8, bytes)),
            _ => None,
        })
        .collect();
    let owner = Owner::NONE;
    let operands = operands(&call.arguments, &layouts, &owner, false);
    match check(call.entry.row, &operands, Stream::NULL) {
        Ok(_) => Ok(()),
        Err(fault) => {
            let reason = explain(call.entry.row, &operands, Stream::NULL, fault).to_string();
            Err(GraphError::Contract { op: op.to_owned(), batch, reason }.into())
        }
    }
}

/// A row's operands, of layouts where they are tensors.
pub(super) fn operands<'a, 'o>(
    arguments: &[RowArgument],
    layouts: &'a [Option<Layout>],
    owner: &'a Owner<'o>,
    pdl: bool,
) -> Vec<Operand<'a, 'o>> {
    let operand = |(argument, layout): (&RowArgument, &'a Option<Layout>)| match (layout, *argument) {
        (Some(layout), _) => Operand::Tensor(layout, owner),
        (None, RowArgument::Number(number)) => Operand::Number(number),
        (None, RowArgument::Whole(number)) => Operand::Whole(number),
        (None, RowArgument::Flag(flag)) => Operand::Bool(flag),
        (None, RowArgument::Pdl) => Operand::Bool(pdl),
        (None, _) => Operand::Absent,
    };
    arguments.iter().zip(layouts).map(operand).collect()
}

/// What every operation answers beside its result: [`ForeignValue`](GraphError::ForeignValue),
/// [`ShapeMismatch`](GraphError::ShapeMismatch), [`DTypeMismatch`](GraphError::DTypeMismatch),
/// [`Parameter`](GraphError::Parameter), [`Contract`](GraphError::Contract) with what the kernel's row refuses, and
/// [`UnsupportedKernel`](GraphError::UnsupportedKernel).
impl GraphBuilder {
    /// Rows of a table by their ids, times a number: `ids` I32 `[B]`, `table` `[tokens, columns]`, to `[B, columns]`.
    ///
    /// # Errors
    /// See this block.
    pub fn embedding(&mut self, ids: &StepInput, table: &Weight, scale: f64) -> Result<Value> {
        self.made(OpKind::Embedding, &[scale], &[input(ids), weight(table)])
    }

    /// RMSNorm of rows: `[B, columns]` and a weight `[columns]`.
    ///
    /// # Errors
    /// See this block.
    pub fn rmsnorm(&mut self, x: impl Readable, norm: &Weight, eps: f64) -> Result<Value> {
        self.made(OpKind::RmsNorm, &[eps, 0.0], &[x.of(), weight(norm)])
    }

    /// RMSNorm with `1 + weight`, as Gemma has it.
    ///
    /// # Errors
    /// See this block.
    pub fn gemma_rmsnorm(&mut self, x: impl Readable, norm: &Weight, eps: f64) -> Result<Value> {
        self.made(OpKind::RmsNorm, &[eps, 1.0], &[x.of(), weight(norm)])
    }

    /// Adds to a residual and norms the sum: answers the norm, in the memory of `x`, and the residual.
    ///
    /// # Errors
    /// See this block.
    pub fn fused_add_rmsnorm(&mut self, x: Value, residual: Value, norm: &Weight, eps: f64) -> Result<(Value, Value)> {
        self.add_node(OpKind::FusedAddRmsNorm, &[eps, 0.0], &[value(&x), value(&residual), weight(norm)])?;
        Ok((x, residual))
    }

    /// As [`fused_add_rmsnorm`](Self::fused_add_rmsnorm), with `1 + weight`.
    ///
    /// # Errors
    /// See this block.
    pub fn gemma_fused_add_rmsnorm(
        &mut self,
        x: Value,
        residual: Value,
        norm: &Weight,
        eps: f64,
    ) -> Result<(Value, Value)> {
        self.add_node(OpKind::FusedAddRmsNorm, &[eps, 1.0], &[value(&x), value(&residual), weight(norm)])?;
        Ok((x, residual))
    }

    /// RMSNorm of each head in these columns, in place, with a weight as long as a head.
    ///
    /// # Errors
    /// See this block.
    pub fn head_rmsnorm(&mut self, x: Value, heads: Columns, norm: &Weight, eps: f64) -> Result<Value> {
        self.add_node(OpKind::HeadRmsNorm, &[eps], &[of(&x, heads), weight(norm)])?;
        Ok(x)
    }

    /// Turns the heads of queries and of keys, columns of one value, by their positions: `cos_sin` F32
    /// `[positions, rotary size]`, `positions` I32 `[B]`.
    ///
    /// # Errors
    /// See this block.
    pub fn rope(
        &mut self,
        x: Value,
        [q, k]: [Columns; 2],
        cos_sin: &Weight,
        positions: &StepInput,
        interleave: bool,
    ) -> Result<Value> {
        let used = [of(&x, q), of(&x, k), weight(cos_sin), input(positions)];
        self.add_node(OpKind::Rope, &[f64::from(u8::from(interleave))], &used)?;
        Ok(x)
    }

    /// As [`rope`](Self::rope), of queries and keys that are two values.
    ///
    /// # Errors
    /// See this block.
    pub fn rope_apart(
        &mut self,
        (q, q_heads): (Value, Columns),
        (k, k_heads): (Value, Columns),
        cos_sin: &Weight,
        positions: &StepInput,
        interleave: bool,
    ) -> Result<(Value, Value)> {
        let used = [of(&q, q_heads), of(&k, k_heads), weight(cos_sin), input(positions)];
        self.add_node(OpKind::Rope, &[f64::from(u8::from(interleave))], &used)?;
        Ok((q, k))
    }

    /// Writes the keys and values of a step, heads of `[B, heads, size]`, to their places in a paged cache
    /// `[pages, page size, heads, size]`, by the positions I32 `[B]` and the page table I32 `[B, pages of a row]`.
    ///
    /// # Errors
    /// See this block.
    pub fn append(
        &mut self,
        (k, v): (Part<'_>, Part<'_>),
        positions: &StepInput,
        page_table: &StepInput,
        (k_cache, v_cache): (&mut State, &mut State),
    ) -> Result<()> {
        let used = [k.of(), v.of(), input(positions), input(page_table), state(k_cache), state(v_cache)];
        self.add_node(OpKind::Append, &[], &used).map(|_| ())
    }

    /// The three of [`head_rmsnorm`](Self::head_rmsnorm), [`rope`](Self::rope) and [`append`](Self::append) in one kernel:
    /// `q`, `k` and `v` are columns of one value, of which the queries are overwritten.
    ///
    /// # Errors
    /// See this block.
    #[expect(clippy::too_many_arguments, reason = "each is another operand of one kernel")]
    pub fn qk_norm_rope_append(
        &mut self,
        x: Value,
        [q, k, v]: [Columns; 3],
        (q_norm, k_norm, eps): (&Weight, &Weight, f64),
        cos_sin: &Weight,
        positions: &StepInput,
        page_table: &StepInput,
        (k_cache, v_cache): (&mut State, &mut State),
        interleave: bool,
    ) -> Result<Value> {
        let used = [
            of(&x, q),
            of(&x, k),
            of(&x, v),
            weight(q_norm),
            weight(k_norm),
            weight(cos_sin),
            input(positions),
            input(page_table),
            state(k_cache),
            state(v_cache),
        ];
        self.add_node(OpKind::QkNormRopeAppend, &[eps, f64::from(u8::from(interleave))], &used)?;
        Ok(x)
    }

    /// [`rope`](Self::rope) and [`append`](Self::append) in one kernel.
    ///
    /// # Errors
    /// See this block.
    pub fn rope_append(
        &mut self,
        x: Value,
        [q, k, v]: [Columns; 3],
        cos_sin: &Weight,
        (positions, page_table): (&StepInput, &StepInput),
        (k_cache, v_cache): (&mut State, &mut State),
        interleave: bool,
    ) -> Result<Value> {
        let used = [
            of(&x, q),
            of(&x, k),
            of(&x, v),
            weight(cos_sin),
            input(positions),
            input(page_table),
            state(k_cache),
            state(v_cache),
        ];
        self.add_node(OpKind::RopeAppend, &[f64::from(u8::from(interleave))], &used)?;
        Ok(x)
    }

    /// Attention of one query for each row over the first `lengths[b]` tokens of its pages: queries `[B, heads, size]` to
    /// `[B, heads · size]`. `lengths` I32 `[B]`, 1 or more.
    ///
    /// # Errors
    /// See this block.
    pub fn decode_attention(
        &mut self,
        q: Part<'_>,
        (k_cache, v_cache): (&State, &State),
        page_table: &StepInput,
        lengths: &StepInput,
        scale: f64,
    ) -> Result<Value> {
        let used = [q.of(), state(k_cache), state(v_cache), input(page_table), input(lengths)];
        self.made(OpKind::DecodeAttention, &[scale], &used)
    }

    /// `x · weightᵀ`: `[B, K]` and `[N, K]` to `[B, N]`.
    ///
    /// # Errors
    /// See this block.
    pub fn matmul(&mut self, x: impl Readable, w: &Weight) -> Result<Value> {
        self.made(OpKind::MatMul, &[0.0], &[x.of(), weight(w)])
    }

    /// As [`matmul`](Self::matmul), with a result in F32: logits.
    ///
    /// # Errors
    /// See this block.
    pub fn matmul_f32(&mut self, x: impl Readable, w: &Weight) -> Result<Value> {
        self.made(OpKind::MatMul, &[1.0], &[x.of(), weight(w)])
    }

    /// `x · weightᵀ + bias`, with a bias `[N]`.
    ///
    /// # Errors
    /// See this block.
    pub fn matmul_bias(&mut self, x: impl Readable, w: &Weight, bias: &Weight) -> Result<Value> {
        self.made(OpKind::MatMulBias, &[0.0], &[x.of(), weight(w), weight(bias)])
    }

    /// `residual + x · weightᵀ`, in the residual's memory.
    ///
    /// # Errors
    /// See this block.
    pub fn matmul_add(&mut self, x: impl Readable, w: &Weight, residual: Value) -> Result<Value> {
        self.add_node(OpKind::MatMulAdd, &[], &[x.of(), weight(w), value(&residual)])?;
        Ok(residual)
    }

    /// `silu(x[..d]) · x[d..]` of `[B, 2 d]`.
    ///
    /// # Errors
    /// See this block.
    pub fn silu_and_mul(&mut self, x: &Value) -> Result<Value> {
        self.made(OpKind::SiluAndMul, &[], &[value(x)])
    }

    /// `gelu(x[..d]) · x[d..]` of `[B, 2 d]`.
    ///
    /// # Errors
    /// See this block.
    pub fn gelu_and_mul(&mut self, x: &Value) -> Result<Value> {
        self.made(OpKind::GeluAndMul, &[], &[value(x)])
    }

    /// As [`gelu_and_mul`](Self::gelu_and_mul), with GELU's approximation by tanh.
    ///
    /// # Errors
    /// See this block.
    pub fn gelu_tanh_and_mul(&mut self, x: &Value) -> Result<Value> {
        self.made(OpKind::GeluTanhAndMul, &[], &[value(x)])
    }

    /// `a + b`, in the memory of `a`.
    ///
    /// # Errors
    /// See this block.
    pub fn add(&mut self, a: Value, b: impl Readable) -> Result<Value> {
        self.add_node(OpKind::Add, &[], &[value(&a), b.of()])?;
        Ok(a)
    }

    /// `a · b`, element by element, in the memory of `a`.
    ///
    /// # Errors
    /// See this block.
    pub fn mul(&mut self, a: Value, b: impl Readable) -> Result<Value> {
        self.add_node(OpKind::Mul, &[], &[value(&a), b.of()])?;
        Ok(a)
    }

    /// `a · σ(gate)`, in the memory of `a`.
    ///
    /// # Errors
    /// See this block.
    pub fn sigmoid_gate(&mut self, a: Value, gate: impl Readable) -> Result<Value> {
        self.add_node(OpKind::SigmoidGate, &[], &[value(&a), gate.of()])?;
        Ok(a)
    }

    /// SiLU in place.
    ///
    /// # Errors
    /// See this block.
    pub fn silu(&mut self, a: Value) -> Result<Value> {
        self.add_node(OpKind::Silu, &[], &[value(&a)])?;
        Ok(a)
    }

    /// Softmax of rows in place, of numbers that are divided by a temperature first.
    ///
    /// # Errors
    /// See this block.
    pub fn softmax(&mut self, a: Value, temperature: f64) -> Result<Value> {
        self.add_node(OpKind::Softmax, &[temperature], &[value(&a)])?;
        Ok(a)
    }

    /// A copy of `[rows, columns]`, as BF16, F16 or F32.
    ///
    /// # Errors
    /// See this block.
    pub fn copy(&mut self, x: impl Readable, dtype: DType) -> Result<Value> {
        let place = COPIES.iter().position(|known| *known == dtype).map_or(-1.0, |i| i as f64);
        if place < 0.0 {
            let (op, parameter, found) = ("copy".to_owned(), "dtype", dtype.to_string());
            return Err(GraphError::Parameter { op, parameter, found, expected: "BF16, F16 or F32" }.into());
        }
        self.made(OpKind::Copy, &[place], &[x.of()])
    }

    /// The place of each row's largest element, the first of equals: `[B, tokens]` to I32 `[B]`.
    ///
    /// # Errors
    /// See this block.
    pub fn argmax(&mut self, logits: impl Readable) -> Result<Value> {
        self.made(OpKind::Argmax, &[], &[logits.of()])
    }

    /// Draws a token of each row's F32 probabilities by a number from 0.0 to below 1.0, F32 `[B]`, which the step is
    /// given: so a graph that is launched again draws anew. Of the `top_k` likeliest, and of the likeliest that sum to
    /// `top_p`; 0 is all.
    ///
    /// # Errors
    /// See this block.
    pub fn sample(&mut self, probs: impl Readable, number: &StepInput, top_k: u32, top_p: f64) -> Result<Value> {
        self.made(OpKind::Sample, &[f64::from(top_k), top_p], &[probs.of(), input(number)])
    }

    /// Makes the next step's inputs: the token becomes the id, positions and lengths grow by 1. A sequence whose length has come
    /// to the capacity stays there, at its last place, so that no kernel goes past what there is: the capacity is how many
    /// tokens a row's pages hold, and at most as many as there are positions with angles.
    ///
    /// # Errors
    /// See this block.
    pub fn advance(
        &mut self,
        token: &Value,
        ids: &mut StepInput,
        positions: &mut StepInput,
        lengths: &mut StepInput,
        capacity: u32,
    ) -> Result<()> {
        let used = [value(token), input(ids), input(positions), input(lengths)];
        self.add_node(OpKind::Advance, &[f64::from(capacity)], &used).map(|_| ())
    }

    /// One token of the gated delta rule for each row: heads of 128 that lie one after the other, each of `q`, `k` and
    /// `v` a value, `alpha` and `beta` F32 `[B, heads]`, the state F32 `[B, heads, size, size]`, value dimension before
    /// key dimension. A scale of 0.0 is `1/√size`.
    ///
    /// # Errors
    /// See this block.
    pub fn gated_delta_rule(
        &mut self,
        [q, k, v]: [Part<'_>; 3],
        (alpha, beta): (&Value, &Value),
        recurrent: &mut State,
        scale: f64,
    ) -> Result<Value> {
        let used = [q.of(), k.of(), v.of(), value(alpha), value(beta), state(recurrent)];
        self.made(OpKind::GatedDeltaRule, &[scale], &used)
    }
}

fn value(value: &Value) -> Used {
    (value.graph, value.tensor, None)
}

fn of(value: &Value, columns: Columns) -> Used {
    (value.graph, value.tensor, Some(columns))
}

fn weight(weight: &Weight) -> Used {
    (weight.graph, weight.tensor, None)
}

fn state(state: &State) -> Used {
    (state.graph, state.tensor, None)
}

fn input(input: &StepInput) -> Used {
    (input.graph, input.tensor, None)
}
