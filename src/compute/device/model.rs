//! A graph's plans at their addresses on a GPU, and the launches of their nodes.

use std::collections::HashMap;
use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::super::builder::operands;
use super::super::error::GraphError;
use super::super::graph::{Access, Graph, Node, Origin};
use super::super::operation::{Given, OpKind, Operation, PdlAfter, PdlBefore, RowArgument, RowCall};
use super::super::plan::{Plan, Span, aligned};
use super::super::shape::{Columns, Dim, Spec};
use super::super::step::Buckets;
use super::inputs::Inputs;
use super::own::{Multiply, around, is_own_attention, weight_of};
use super::replan::{Attention, AttentionKernels, is_attention};
use crate::attention::{AttentionOptions, DecodeFacts, XqaKernel};
use crate::contract::Operand;
use crate::engine::Entry;
use crate::error::{FlashInferError, Result};
use crate::glue::attend::Attend;
use crate::glue::gemv::Around;
use crate::matmul::{MatMul, MatMulSpec, Selections};
use crate::owner::Owner;
use crate::stream::Stream;
use crate::tensor::{DType, Device, Layout};

/// The blocks of memory that a run has.
pub(super) const WEIGHTS: usize = 0;
pub(super) const STATES: usize = 1;
pub(super) const ARENA: usize = 2;
pub(super) const INPUTS: usize = 3;
/// What the run itself needs: numbers that never change, XQA's counters, queries that lie in a row, and attention's plans.
pub(super) const OWN: usize = 4;
pub(super) const BLOCKS: usize = 5;

/// What lies behind each block, so that a kernel which reads a few bytes past its tensor's end, as rope's with a table does, reads
/// memory of the run.
pub(super) const BEHIND: u64 = 256;

/// How a node is launched.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// By its kernel's row.
    Row,
    /// By attention's kernel for the bucket.
    Attention(usize),
    /// By a product for each plan.
    Product,
    /// By this crate's own kernel that appends and attends.
    Own,
}

/// Numbers that never change: 0, then each larger by a step.
#[derive(Debug, Clone, Copy)]
struct Steady {
    dtype: DType,
    count: u64,
    step: u64,
    offset: u64,
}

/// A graph, its plans, and where all that they use lies.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) graph: Graph,
    pub(super) buckets: Buckets,
    pub(super) plans: Vec<Plan>,
    /// For each plan, whether a node may start before the one ahead of it has ended, with programmatic dependent launch.
    early: Vec<Vec<bool>>,
    /// Where a weight, a state or an input begins in its block.
    places: Vec<u64>,
    ways: Vec<Way>,
    pub(super) kernels: AttentionKernels,
    pub(super) attention: Vec<Attention>,
    /// Products of each size, and for each plan which one a node's is.
    products: Vec<Multiply>,
    chosen: Vec<Vec<usize>>,
    /// For each plan, the kernels of this crate's own that append and attend, and whether what they read is written by none ahead.
    own: Vec<Vec<Option<Attend>>>,
    pub(super) reads_early: Vec<Vec<bool>>,
    steady: Vec<Steady>,
    /// XQA's counters, and queries that lie one after the other, in the run's own block.
    counters: Span,
    queries: Span,
    /// Scratch memory of products, of which one runs at a time.
    workspace: Span,
    /// Partial results of attention that is planned.
    pub(super) partial: Span,
    pub(super) bytes: [u64; BLOCKS],
    pub(super) device: Device,
    /// Where the blocks begin, once they are there.
    pub(super) blocks: [u64; BLOCKS],
}

/// An operation that no kernel on a GPU serves.
pub(super) fn unserved(graph: &Graph, node: usize, reason: String, remedy: &'static str) -> FlashInferError {
    GraphError::UnsupportedKernel { op: graph.node_name(node), reason, remedy }.into()
}

fn is_product(operation: &Operation) -> bool {
    matches!(operation.kind, OpKind::MatMul | OpKind::MatMulBias | OpKind::MatMulAdd) || around(operation).is_some()
}

impl Model {
    /// Plans, proves and sizes all of it.
    pub(super) fn new(
        graph: &Graph,
        buckets: &Buckets,
        inputs: &Inputs,
        device: Device,
        kernels: AttentionKernels,
    ) -> Result<Self> {
        let (plans, arena) = Plan::for_buckets(graph, buckets)?;
        plans.iter().try_for_each(|plan| plan.verify(graph))?;
        let largest = buckets.largest();
        let (mut places, mut bytes) = (vec![0; graph.tensors.len()], [0u64; BLOCKS]);
        for (i, tensor) in graph.tensors.iter().enumerate() {
            let block = match tensor.origin {
                Origin::Weight => WEIGHTS,
                Origin::State => STATES,
                Origin::Input(_) => {
                    places[i] = inputs.place(i).unwrap_or(0);
                    continue;
                }
                Origin::Value => continue,
            };
            places[i] = bytes[block];
            bytes[block] = bytes[block].saturating_add(aligned(tensor.spec.bytes(largest)));
        }
        (bytes[ARENA], bytes[INPUTS]) = (arena, inputs.bytes());
        let nothing = Span { offset: 0, bytes: 0 };
        let model = Self {
            graph: graph.clone(),
            buckets: buckets.clone(),
            early: Vec::new(),
            plans,
            places,
            ways: Vec::new(),
            kernels,
            attention: Vec::new(),
            products: Vec::new(),
            chosen: Vec::new(),
            own: Vec::new(),
            reads_early: Vec::new(),
            steady: Vec::new(),
            counters: nothing,
            queries: nothing,
            workspace: nothing,
            partial: nothing,
            bytes,
            device,
            blocks: [0; BLOCKS],
        };
        Ok(model)
    }

    /// Loads the kernels, and chooses the products' algorithms, which is measured on the stream.
    pub(super) fn load(
        &mut self,
        inputs: &Inputs,
        stream: &Arc<CudaStream>,
        selections: &mut Selections,
    ) -> Result<()> {
        self.choose_products(stream, selections)?;
        for plan in 0..self.plans.len() {
            let is_own = |node: &Node| is_own_attention(node.operation.kind);
            let own: Vec<usize> = (0..self.graph.nodes.len()).filter(|&node| is_own(&self.graph.nodes[node])).collect();
            let (mut kernels, mut early) = (vec![None; self.graph.nodes.len()], vec![false; self.graph.nodes.len()]);
            for node in own {
                kernels[node] = Some(self.choose_attention(plan, node, stream)?);
                early[node] = self.reads_early(plan, node);
            }
            self.own.push(kernels);
            self.reads_early.push(early);
        }
        let (mut counters, mut queries) = (0u64, 0u64);
        for node in 0..self.graph.nodes.len() {
            let kind = self.graph.nodes[node].operation.kind;
            let way = if is_product(&self.graph.nodes[node].operation) {
                Way::Product
            } else if is_own_attention(kind) {
                Way::Own
            } else if is_attention(kind) {
                let attention = self.load_attention(node, inputs, stream)?;
                let xqa = self.attention[attention].xqa.as_ref();
                counters = counters.max(xqa.map_or(0, |kernel| kernel.counters() as u64 * 4));
                for plan in 0..self.plans.len() {
                    queries = queries.max(self.attention_sizes(plan, node, attention)?);
                }
                Way::Attention(attention)
            } else {
                for plan in 0..self.plans.len() {
                    self.prepare_row(plan, node)?;
                }
                Way::Row
            };
            self.ways.push(way);
        }
        let own = self.bytes[OWN];
        self.counters = Span { offset: own, bytes: aligned(counters) };
        self.queries = Span { offset: self.counters.end(), bytes: aligned(queries) };
        let workspace = self.products.iter().map(|product| product.workspace_bytes() as u64).max().unwrap_or(0);
        self.workspace = Span { offset: self.queries.end(), bytes: aligned(workspace) };
        self.bytes[OWN] = self.workspace.end();
        self.size_plans();
        self.early = (0..self.plans.len()).map(|plan| self.early_nodes(plan)).collect();
        Ok(())
    }

    /// Which nodes of a plan may start before the one ahead of them has ended: those whose kernel waits by itself before it touches
    /// what others write, behind one that lets them. That is what the plan's edges say, but for products and attention: which kernel
    /// they are, is known here alone. XQA is never launched so, and lets others start whatever is ahead of it.
    fn early_nodes(&self, plan: usize) -> Vec<bool> {
        let (graph, order) = (&self.graph, &self.plans[plan].order);
        let product_waits = |node: usize| self.product(plan, node).waits();
        let lets = |node: usize| match self.ways[node] {
            Way::Row => graph.nodes[node].operation.facts().after != PdlAfter::AtEnd,
            Way::Attention(_) | Way::Own => true,
            Way::Product => product_waits(node),
        };
        let waits = |node: usize| match self.ways[node] {
            Way::Row => {
                let has_option = |call: RowCall| call.arguments.contains(&RowArgument::Pdl);
                let waits = graph.nodes[node].operation.facts().before == PdlBefore::Waits;
                waits && self.row(plan, node).is_some_and(has_option)
            }
            // What it reads before that, its lists and tables, no node writes, but a copy ahead of the step.
            Way::Attention(attention) if self.is_planned(plan, attention) => true,
            // Not XQA's kernel, but the one that copies its queries.
            Way::Attention(_) => self.copies_queries(plan, node),
            // Ahead of its wait it reads what no node ahead of it writes, or nothing.
            Way::Own => true,
            // Ahead of its wait it reads what no node writes: the norm's weight and the product's.
            Way::Product => {
                let Node { operation, accesses, .. } = &graph.nodes[node];
                let read = 1..around(operation).map_or(1, weight_of) + 1;
                let steady = |access: &Access| graph.tensors[access.tensor].origin == Origin::Weight;
                product_waits(node) && accesses[read].iter().all(steady)
            }
        };
        let mut early = vec![false; graph.nodes.len()];
        order.windows(2).for_each(|pair| early[pair[1]] = lets(pair[0]) && waits(pair[1]));
        early
    }

    fn choose_products(&mut self, stream: &Arc<CudaStream>, selections: &mut Selections) -> Result<()> {
        /// A product, and what is around it: the norm's bits, the gate, and whether rows begin where one kernel can read them.
        type Key = (MatMulSpec, Option<(u32, bool, bool)>);
        let mut known: HashMap<Key, usize> = HashMap::new();
        for plan in 0..self.plans.len() {
            let mut chosen = vec![usize::MAX; self.graph.nodes.len()];
            for (node, chosen) in chosen.iter_mut().enumerate() {
                let operation = &self.graph.nodes[node].operation;
                if !is_product(operation) {
                    continue;
                }
                let refused = |error: FlashInferError| match error {
                    // What was chosen before is for another GPU or release, and no size helps.
                    FlashInferError::InvalidArgument { argument: "selections", .. } => error,
                    FlashInferError::InvalidArgument { argument, found, expected, .. } => {
                        let reason = format!("its product's {argument} is {found}, and must be {expected}");
                        unserved(&self.graph, node, reason, "choose other sizes, or copy what are columns first")
                    }
                    other => other,
                };
                let spec = self.product_spec(plan, node).map_err(refused)?;
                let around = around(operation);
                let own =
                    |around: Around| (around.eps.unwrap_or(0.0).to_bits(), around.gated, self.begins_aligned(node));
                let key = (spec, around.map(own));
                *chosen = match known.get(&key) {
                    Some(&product) => product,
                    None => {
                        let product = match around {
                            None => MatMul::new(spec, stream, selections).map(Multiply::Plain),
                            Some(around) => self.choose_fused(plan, node, (spec, around), stream, selections),
                        };
                        self.products.push(product.map_err(refused)?);
                        known.insert(key, self.products.len() - 1);
                        self.products.len() - 1
                    }
                };
            }
            self.chosen.push(chosen);
        }
        Ok(())
    }

    /// The sizes of a node's product.
    fn product_spec(&self, plan: usize, node: usize) -> Result<MatMulSpec> {
        let (graph, batch) = (&self.graph, self.plans[plan].batch);
        let Node { operation, accesses, .. } = &graph.nodes[node];
        let specs = graph.given(&graph.nodes[node]);
        let size = |dim: Dim| i64::try_from(dim.at(batch)).unwrap_or(i64::MAX);
        let (x, weight) = (&specs[0].shape, &specs[around(operation).map_or(1, weight_of)].shape);
        let whole = &graph.tensors[accesses[0].tensor].spec.shape;
        let stride = whole.last().copied().map_or(0, size);
        let mut spec =
            MatMulSpec::new(specs[0].dtype, size(x[0]), size(weight[0]), size(x[1]))?.with_row_stride(stride)?;
        if operation.is_on("f32_out") && specs[0].dtype != DType::F32 {
            spec = spec.with_f32_out()?;
        }
        match operation.kind {
            OpKind::MatMulBias => spec.with_bias(),
            OpKind::MatMulAdd if self.is_part(plan, &accesses[2]) => {
                let found = "columns of something larger".to_owned();
                let expected = "a value of its own, since rows of results lie one after the other".to_owned();
                Err(FlashInferError::InvalidArgument { function: "matmul_add", argument: "residual", found, expected })
            }
            OpKind::MatMulAdd => spec.with_residual(),
            _ => Ok(spec),
        }
    }

    /// Whether an operand's rows do not lie one after the other.
    fn is_part(&self, plan: usize, access: &Access) -> bool {
        let (shape, batch) = (&self.graph.tensors[access.tensor].spec.shape, self.plans[plan].batch);
        let width = shape.iter().skip(1).fold(1u64, |product, dim| product.saturating_mul(dim.at(batch)));
        // A batch may have several rows of each, or a constant number.
        let several = shape.first().is_some_and(|rows| rows.at(batch) > 1);
        several && access.columns.is_some_and(|columns| columns.width != width)
    }

    /// That a node's row has its kernel here, and what it needs of the run's own memory.
    fn prepare_row(&mut self, plan: usize, node: usize) -> Result<()> {
        let Some(call) = self.row(plan, node) else {
            let remedy = "run this graph on the host, or replace the operation by others";
            return Err(unserved(
                &self.graph,
                node,
                "this release has none for these types on a GPU".to_owned(),
                remedy,
            ));
        };
        self.ready(node, call.entry)?;
        for argument in call.arguments {
            match argument {
                RowArgument::Ramp { dtype, count, step } if self.steady(dtype, count, step).is_none() => {
                    let offset = self.bytes[OWN];
                    self.steady.push(Steady { dtype, count, step, offset });
                    self.bytes[OWN] += aligned(count * dtype.size() as u64);
                }
                RowArgument::Scratch(needed) => self.enough(plan, node, needed)?,
                _ => {}
            }
        }
        Ok(())
    }

    /// That a kernel runs on this GPU and is there.
    pub(super) fn ready(&self, node: usize, entry: Entry) -> Result<()> {
        if !entry.is_supported(self.device)? {
            let reason = format!("{} does not run on {}", entry.row.kernel, self.device);
            return Err(unserved(&self.graph, node, reason, "run it on another GPU"));
        }
        entry.prepare(self.device)
    }

    /// That a node's workspace in the arena has so many bytes.
    pub(super) fn enough(&self, plan: usize, node: usize, needed: u64) -> Result<()> {
        let planned = self.plans[plan].workspace(node).map_or(0, |span| span.bytes);
        if planned >= needed {
            return Ok(());
        }
        Err(GraphError::WorkspaceTooSmall { node: self.graph.node_name(node), planned, needed }.into())
    }

    /// Checks the scratch memory that is planned for XQA, and answers the bytes of queries that must be copied first.
    fn attention_sizes(&mut self, plan: usize, node: usize, attention: usize) -> Result<u64> {
        let Some(kernel) = self.attention[attention].xqa.as_ref().filter(|_| !self.is_planned(plan, attention)) else {
            return Ok(0);
        };
        let table = self.graph.seen(&self.graph.nodes[node].accesses[3]);
        let size = |at: usize| table.shape.get(at).map_or(0, |dim| dim.at(self.plans[plan].batch));
        let requests = size(0);
        if let Err(FlashInferError::InvalidArgument { argument, found, expected, .. }) =
            kernel.check_size(requests, size(1))
        {
            let reason = format!("its {argument} are {found}, and XQA takes {expected}");
            return Err(unserved(&self.graph, node, reason, "choose fewer rows or a shorter context"));
        }
        self.enough(plan, node, kernel.scratch_bytes(requests))?;
        if !self.copies_queries(plan, node) {
            return Ok(0);
        }
        let Some(call) = self.query_copy(plan, node) else {
            let reason =
                "its queries are columns of something larger, and XQA reads them one after the other".to_owned();
            return Err(unserved(&self.graph, node, reason, "give it queries that are a value of their own"));
        };
        self.ready(node, call.entry)?;
        let queries = self.graph.seen(&self.graph.nodes[node].accesses[0]);
        Ok(queries.bytes(self.plans[plan].batch))
    }

    fn steady(&self, dtype: DType, count: u64, step: u64) -> Option<Steady> {
        self.steady.iter().copied().find(|known| (known.dtype, known.count, known.step) == (dtype, count, step))
    }

    /// The numbers that never change: where each lies in the run's own block, and its bytes.
    pub(super) fn steady_bytes(&self) -> impl Iterator<Item = (usize, Vec<u8>)> {
        self.steady.iter().map(|steady| {
            let bytes = super::super::host::ramp(steady.dtype, steady.count, steady.step);
            (steady.offset as usize, bytes)
        })
    }

    fn row(&self, plan: usize, node: usize) -> Option<RowCall> {
        let (node, batch) = (&self.graph.nodes[node], self.plans[plan].batch);
        let specs = self.graph.given(node);
        Given { operation: &node.operation, specs: &specs, batch }.call()
    }

    /// Where a tensor begins.
    pub(super) fn address(&self, plan: usize, tensor: usize) -> u64 {
        let (block, offset) = self.place(plan, tensor);
        self.blocks[block] + offset
    }

    /// The block that a tensor is in, and where in it.
    pub(super) fn place(&self, plan: usize, tensor: usize) -> (usize, u64) {
        let block = match self.graph.tensors[tensor].origin {
            Origin::Weight => WEIGHTS,
            Origin::State => STATES,
            Origin::Input(_) => INPUTS,
            // A value without a place is one that nothing uses.
            Origin::Value => return (ARENA, self.plans[plan].span(tensor).map_or(0, |span| span.offset)),
        };
        (block, self.places[tensor])
    }

    pub(super) fn data(&self, plan: usize, tensor: usize) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.address(plan, tensor) as usize)
    }

    fn vector(&self, block: usize, offset: u64, dtype: DType, count: u64) -> Layout {
        let data = std::ptr::with_exposed_provenance_mut::<u8>((self.blocks[block] + offset) as usize);
        Layout::build(data.cast(), self.device, dtype, &[count as i64], None, None)
    }

    pub(super) fn layout(&self, plan: usize, access: &Access) -> Layout {
        let data = self.data(plan, access.tensor);
        self.graph.layout(access, self.plans[plan].batch, data, self.device)
    }

    /// What a row's argument is.
    fn argument(&self, plan: usize, node: usize, specs: &[Spec], argument: RowArgument) -> Option<Layout> {
        let accesses = &self.graph.nodes[node].accesses;
        match argument {
            RowArgument::Operand(_) | RowArgument::Heads(..) => {
                argument.access(accesses, specs).map(|access| self.layout(plan, &access))
            }
            RowArgument::Flat(i) => {
                let count = specs[i].elements(self.plans[plan].batch) as i64;
                let data = self.data(plan, accesses[i].tensor).cast();
                Some(Layout::build(data, self.device, specs[i].dtype, &[count], None, None))
            }
            RowArgument::Ramp { dtype, count, step } => {
                self.steady(dtype, count, step).map(|steady| self.vector(OWN, steady.offset, dtype, count))
            }
            RowArgument::Scratch(bytes) => {
                self.plans[plan].workspace(node).map(|span| self.vector(ARENA, span.offset, DType::U8, bytes))
            }
            _ => None,
        }
    }

    /// Whether a node may start early.
    pub(super) fn starts_early(&self, plan: usize, node: usize, pdl: bool) -> bool {
        pdl && self.early[plan][node]
    }

    /// A node's product.
    pub(super) fn product(&self, plan: usize, node: usize) -> &Multiply {
        &self.products[self.chosen[plan][node]]
    }

    /// An address in the arena.
    pub(super) fn scratch(&self, offset: u64) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut((self.blocks[ARENA] + offset) as usize)
    }

    /// Scratch memory of products.
    pub(super) fn product_workspace(&self) -> Layout {
        self.vector(OWN, self.workspace.offset, DType::U8, self.workspace.bytes)
    }

    /// How many kernels a node launches.
    pub(super) fn kernels(&self, plan: usize, node: usize) -> u32 {
        if let (Way::Product, Some(around)) = (self.ways[node], around(&self.graph.nodes[node].operation)) {
            return match self.product(plan, node) {
                Multiply::Several(_) => 1 + u32::from(around.eps.is_some()) + u32::from(around.gated),
                Multiply::Plain(_) | Multiply::Fused(_) => 1,
            };
        }
        let attention = match self.ways[node] {
            Way::Attention(attention) => Some(attention),
            _ => None,
        };
        if let Some(kernels) = attention.and_then(|attention| self.planned_kernels(plan, attention)) {
            return kernels;
        }
        let copies = attention.is_some() && self.copies_queries(plan, node);
        self.graph.nodes[node].operation.facts().kernels + u32::from(copies)
    }

    /// Whether a node is attention that is planned, where contexts are divided, so that a second kernel merges their parts.
    pub(super) fn merges_parts(&self, plan: usize, node: usize) -> bool {
        match self.ways[node] {
            Way::Attention(attention) => self.planned_kernels(plan, attention) == Some(2),
            _ => false,
        }
    }

    /// Whether what a node launches is for a library to choose: cuBLASLt may divide a product, and sum its parts by another
    /// kernel behind a fill, of which one may start early as it sees fit.
    pub(super) fn is_free(&self, plan: usize, node: usize) -> bool {
        matches!(self.ways[node], Way::Product) && !self.product(plan, node).waits()
    }

    /// Queues a node of a plan.
    ///
    /// # Safety
    /// The blocks must be device memory of [`bytes`](Self::bytes), valid until the stream has come so far, whose uses are ordered
    /// with the stream, of the context that is current. What nodes find their way by must be within the bounds that [`Inputs`]
    /// keeps, and the run's own block must hold [`steady_bytes`](Self::steady_bytes) and zeros behind, but for what launches left and
    /// attention's plans, which must be for what the step is given when it runs.
    pub(super) unsafe fn launch(&self, plan: usize, node: usize, stream: Stream<'_>, pdl: bool) -> Result<()> {
        let early = self.starts_early(plan, node, pdl);
        match self.ways[node] {
            Way::Row => {
                let Some(call) = self.row(plan, node) else { unreachable!("it was there when the run was made") };
                let specs = self.graph.given(&self.graph.nodes[node]);
                // SAFETY: the caller's promise. The plan was proven: values lie within the arena, and none is overwritten
                // while it is needed. Columns lie within their tensors, which the builder saw to.
                unsafe { self.call(&call, |argument| self.argument(plan, node, &specs, argument), stream, early) }
            }
            Way::Product => match around(&self.graph.nodes[node].operation) {
                // SAFETY: the caller's promise.
                None => unsafe { self.multiply(plan, node, stream, early) },
                // SAFETY: as above.
                Some(around) => unsafe { self.multiply_around(plan, node, around, stream, early) },
            },
            Way::Own => {
                let Some(attend) = self.own[plan][node] else { unreachable!("it was there when the run was made") };
                // SAFETY: as above.
                unsafe { self.append_and_attend(plan, node, attend, stream, early) }
            }
            Way::Attention(attention) => match &self.attention[attention].xqa {
                // SAFETY: the caller's promise.
                Some(kernel) if !self.is_planned(plan, attention) => unsafe {
                    self.attend(plan, node, kernel, stream, early)
                },
                // SAFETY: as above.
                _ => unsafe { self.attend_planned(plan, node, attention, stream, early) },
            },
        }
    }

    /// # Safety
    /// As for [`launch`](Self::launch).
    pub(super) unsafe fn call(
        &self,
        call: &RowCall,
        layout: impl Fn(RowArgument) -> Option<Layout>,
        stream: Stream<'_>,
        early: bool,
    ) -> Result<()> {
        let layouts: Vec<Option<Layout>> = call.arguments.iter().map(|argument| layout(*argument)).collect();
        let owner = Owner::NONE;
        let operands = operands(&call.arguments, &layouts, &owner, early);
        // SAFETY: the caller's promise; the row is checked by the call.
        unsafe { call.entry.call(&operands, stream) }
    }

    /// Whether an attention's queries do not lie one after the other.
    fn copies_queries(&self, plan: usize, node: usize) -> bool {
        self.is_part(plan, &self.graph.nodes[node].accesses[0])
    }

    /// The call that copies an attention's queries, columns of something larger, to where they lie one after the other.
    fn query_copy(&self, plan: usize, node: usize) -> Option<RowCall> {
        let queries = self.flat_queries(node);
        let spec = self.graph.seen(&queries);
        let dtype = super::super::operation::COPIES.iter().position(|known| *known == spec.dtype)?;
        let operation = Operation::new(OpKind::Copy, &[dtype as f64]);
        let specs = [spec.clone(), spec];
        Given { operation: &operation, specs: &specs, batch: self.plans[plan].batch }.call()
    }

    /// An attention's queries as rows of numbers.
    fn flat_queries(&self, node: usize) -> Access {
        let access = self.graph.nodes[node].accesses[0];
        Access { columns: access.columns.map(|columns| Columns { heads: 0, ..columns }), ..access }
    }

    /// # Safety
    /// As for [`launch`](Self::launch).
    unsafe fn attend(
        &self,
        plan: usize,
        node: usize,
        kernel: &XqaKernel,
        stream: Stream<'_>,
        early: bool,
    ) -> Result<()> {
        let accesses = &self.graph.nodes[node].accesses;
        let batch = self.plans[plan].batch;
        let specs = self.graph.given(&self.graph.nodes[node]);
        let shape = |spec: &Spec| -> Vec<i64> { spec.shape.iter().map(|dim: &Dim| dim.at(batch) as i64).collect() };
        let queries = shape(&specs[0]);
        let build =
            |data: *mut u8, dtype, shape: &[i64]| Layout::build(data.cast(), self.device, dtype, shape, None, None);
        let q = if self.copies_queries(plan, node) {
            let copied = self.vector(OWN, self.queries.offset, DType::U8, self.queries.bytes).data().cast::<u8>();
            let Some(call) = self.query_copy(plan, node) else { unreachable!("it was there when the run was made") };
            let from = self.flat_queries(node);
            let rows = [queries[0], queries[1] * queries[2]];
            let layout = |argument| match argument {
                RowArgument::Operand(0) => Some(self.layout(plan, &from)),
                RowArgument::Operand(_) => Some(build(copied, specs[0].dtype, &rows)),
                _ => None,
            };
            // SAFETY: the caller's promise; the place is as large as the queries of the largest batch, and the attention of an
            // earlier layer, which read it, is ahead on the stream.
            unsafe { self.call(&call, layout, stream, early) }?;
            build(copied, specs[0].dtype, &queries)
        } else {
            // At the first column, and one after the other: of one row, or all of a tensor's columns.
            build(self.layout(plan, &accesses[0]).data().cast(), specs[0].dtype, &queries)
        };
        let [k, v, table, lengths] = [1, 2, 3, 4].map(|operand| self.layout(plan, &accesses[operand]));
        let o = build(self.data(plan, accesses[5].tensor), specs[5].dtype, &queries);
        let owner = Owner::NONE;
        let operands = [&q, &k, &v, &o, &table, &lengths].map(|layout| Operand::Tensor(layout, &owner));
        let (cache, pages) = (shape(&specs[1]), shape(&specs[3]));
        let facts =
            DecodeFacts { requests: pages[0], page_size: cache[1], pages: cache[0], pages_per_request: pages[1] };
        if !kernel.check(&operands, facts, stream)? {
            return Ok(());
        }
        let Some(workspace) = self.plans[plan].workspace(node) else {
            return self.enough(plan, node, u64::MAX);
        };
        let scratch = [
            self.vector(OWN, self.counters.offset, DType::I32, self.counters.bytes / 4),
            self.vector(ARENA, workspace.offset, DType::U8, workspace.bytes),
        ];
        // SAFETY: the caller's promise. The workspace is as large as the kernel asks for, by `attention_sizes`, and the node's
        // own by the plan; the counters are as many as the kernels ask for, were zeros, and one stream has them.
        unsafe { kernel.call(&operands, facts, &AttentionOptions::default(), &scratch, stream) }
    }

    /// # Safety
    /// As for [`launch`](Self::launch).
    unsafe fn multiply(&self, plan: usize, node: usize, stream: Stream<'_>, early: bool) -> Result<()> {
        let Node { operation, accesses, .. } = &self.graph.nodes[node];
        let Multiply::Plain(product) = self.product(plan, node) else { unreachable!("nothing is around it") };
        let spec = product.spec();
        let (rows, columns, inner) = (spec.rows(), spec.columns(), spec.inner());
        // Of one row nothing lies apart.
        let strides = [spec.row_stride(), 1];
        let data = self.layout(plan, &accesses[0]).data();
        let x = Layout::build(data, self.device, spec.dtype(), &[rows, inner], Some(&strides), None);
        let weight = self.layout(plan, &accesses[1]);
        let bias = (operation.kind == OpKind::MatMulBias).then(|| self.layout(plan, &accesses[2]));
        let Some(out) = accesses.last() else { unreachable!("every product has operands") };
        let data = self.layout(plan, out).data();
        let out = Layout::build(data, self.device, spec.out(), &[rows, columns], None, None);
        // SAFETY: the caller's promise; the tensors are of the specification's sizes.
        unsafe { self.run_product(product, x, weight, bias, out, stream, early) }
    }

    /// The node's tensors that it wrote and that hold numbers which may be infinite.
    pub(super) fn written(&self, node: &Node) -> impl Iterator<Item = Access> {
        let roles = node.operation.facts().operands.iter();
        node.accesses.iter().zip(roles).filter_map(|(access, operand)| {
            let tensor = &self.graph.tensors[access.tensor];
            let whole = matches!(tensor.spec.dtype, DType::I32 | DType::I64 | DType::U8);
            (operand.role.writes() && !whole && tensor.origin != Origin::State).then_some(*access)
        })
    }
}
