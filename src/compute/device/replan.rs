//! Attention on a GPU: which kernel computes it in each bucket, and the plans of kernels that are planned, which the host makes anew
//! for each step's lengths.
//!
//! XQA reads lengths and pages from the step's inputs. The others go by lists that upstream's planner makes on the host of the
//! lengths, and by tables of the pages: both lie at fixed places of the run's own memory, and are written there ahead of a step, on
//! the same stream. So the host must know each row's length without asking the device, and does: it gave them, and counts what
//! [`advance`](super::super::GraphBuilder::advance) adds.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::super::error::GraphError;
use super::super::graph::{Graph, Origin};
use super::super::operation::OpKind;
use super::super::plan::{Span, aligned};
use super::super::shape::Dim;
use super::super::step::{Pad, PageAllocator};
use super::inputs::Inputs;
use super::model::{ARENA, Model, OWN, unserved};
use super::{CurrentContext, DeviceRun};
use crate::attention::{AttentionSpec, Backend, Batch, GraphRoom, Replanned, StepKernel, StepPlan, XqaKernel};
use crate::error::{FlashInferError, Result};
use crate::stream::Stream;
use crate::tensor::Layout;

/// Which of upstream's kernels computes a graph's attention on a GPU.
///
/// All of them compute the same of the same inputs: for each row the attention of its query to the first `lengths[b]` tokens of its
/// pages. They differ in their sums' order, and so in last bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum AttentionKernel {
    /// XQA's decode kernel, which reads lengths and pages on the GPU: nothing is planned, and any number of steps is queued at once.
    /// There are modules for pages of 16, 32, 64 and 128 tokens and for 1, 2, 4 and 8 query heads to a key head.
    #[default]
    Xqa,
    /// The decode kernel of `batch_decode`, for pages of any size and for 1, 2, 3, 4 and 8 query heads to a key head. The host plans
    /// it ahead of every step, a captured one too, so that it runs at most a few steps ahead of the GPU. How a row's sum is divided
    /// depends on the lengths of all rows of the batch, and with it the row's last bits.
    BatchDecode,
    /// The prefill kernels for every GPU (`batch_prefill`): rows that follow one another in a sequence, as a prompt's tokens do, are
    /// queries of one request, whose keys are read once for many of them. Planned for each batch, and launched node by node: its
    /// buckets are not captured.
    Fa2,
    /// The prefill kernels for GPUs of compute capability 9.0, as [`Fa2`](Self::Fa2).
    Fa3,
}

impl AttentionKernel {
    /// Whether steps with it can be captured.
    pub const fn is_captured(self) -> bool {
        matches!(self, Self::Xqa | Self::BatchDecode)
    }
}

/// The attention kernel of each bucket of a [`DeviceRun`].
///
/// ```
/// use flashinfer_rs::compute::{AttentionKernel, AttentionKernels};
///
/// // XQA decodes; prompts go as batches of 64 rows or more.
/// let kernels = AttentionKernels::new(AttentionKernel::Xqa).from_rows(64, AttentionKernel::Fa3);
/// assert_eq!(kernels.of(32), AttentionKernel::Xqa);
/// assert_eq!(kernels.of(128), AttentionKernel::Fa3);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct AttentionKernels {
    kernel: AttentionKernel,
    long: Option<(u64, AttentionKernel)>,
}

impl AttentionKernels {
    /// This one in every bucket.
    pub const fn new(kernel: AttentionKernel) -> Self {
        Self { kernel, long: None }
    }

    /// Another one in buckets of so many rows or more, as those of a prefill are.
    #[must_use]
    pub const fn from_rows(mut self, rows: u64, kernel: AttentionKernel) -> Self {
        self.long = Some((rows, kernel));
        self
    }

    /// That of a bucket.
    pub const fn of(&self, bucket: u64) -> AttentionKernel {
        match self.long {
            Some((rows, kernel)) if bucket >= rows => kernel,
            _ => self.kernel,
        }
    }
}

/// Attention of one or more nodes that have the same sizes and find their way by the same inputs, as those of a decoder's layers do:
/// one plan serves all of them.
#[derive(Debug)]
pub(super) struct Attention {
    /// Of decode, which all kernels' specifications follow from.
    spec: AttentionSpec,
    /// The step inputs that it goes by.
    table: usize,
    lengths: usize,
    /// How many rows they have, by those of the batch.
    rows: Dim,
    /// The pages of the cache, and of a row.
    pages: i64,
    per_row: usize,
    /// The first node.
    node: usize,
    /// Where a bucket uses it.
    pub(super) xqa: Option<XqaKernel>,
    /// For each bucket, where its kernel is planned.
    planned: Vec<Option<Planned>>,
    /// Memory for a batch.
    batch: Batch,
}

/// One bucket's plan.
#[derive(Debug)]
struct Planned {
    kernel: AttentionKernel,
    /// Until it has its memory.
    loaded: Option<StepKernel>,
    /// Lists and tables in the run's own block.
    places: [u64; 2],
    plan: Option<StepPlan>,
    /// What the plan on the GPU is for.
    given: Option<Given>,
}

/// What a plan is for: which inputs, and how often the device has added one to the lengths since they were given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Given {
    rows: u64,
    table: u64,
    lengths: u64,
    added: i64,
    /// The longest row's.
    longest: i64,
}

impl std::fmt::Display for Given {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { rows, longest, added, .. } = self;
        write!(f, "{rows} rows of up to {longest} tokens, {added} steps behind the lengths that were given")
    }
}

/// What a decode attention's kernel is chosen by.
fn decode_spec(graph: &Graph, node: usize) -> Result<AttentionSpec> {
    let specs = graph.given(&graph.nodes[node]);
    let size = |operand: usize, at: usize| {
        let dim = specs[operand].shape.get(at).and_then(|dim| dim.constant());
        dim.and_then(|size| i64::try_from(size).ok()).unwrap_or(0)
    };
    let (heads, kv_heads, head, page_size) = (size(0, 1), size(1, 2), size(0, 2), size(1, 1));
    let scale = graph.nodes[node].operation.parameter("scale");
    AttentionSpec::decode(specs[0].dtype, (heads, kv_heads), head, page_size).sm_scale(scale).build()
}

/// The specification of a kernel that is planned.
fn planned_spec(decode: &AttentionSpec, kernel: AttentionKernel) -> Result<AttentionSpec> {
    let (dtype, heads, (head, _), page_size) = (decode.dtype(), decode.heads(), decode.head_dims(), decode.page_size());
    let paged = |backend| AttentionSpec::paged(dtype, heads, head, page_size).causal(true).backend(backend);
    let facts = match kernel {
        AttentionKernel::Fa2 => paged(Backend::Fa2),
        AttentionKernel::Fa3 => paged(Backend::Fa3),
        AttentionKernel::BatchDecode | AttentionKernel::Xqa => {
            AttentionSpec::decode(dtype, heads, head, page_size).backend(Backend::CudaCores)
        }
    };
    facts.sm_scale(decode.sm_scale()).build()
}

/// A refusal of a specification, by a node that it is of.
fn refused(graph: &Graph, node: usize, kernel: AttentionKernel, error: FlashInferError) -> FlashInferError {
    let FlashInferError::InvalidArgument { argument, found, expected, .. } = error else { return error };
    let (reason, remedy) = match kernel {
        AttentionKernel::Xqa => (
            format!("XQA has {expected}, and this is {found}"),
            "choose sizes that XQA has a kernel for, or another AttentionKernel",
        ),
        other => (
            format!("{other:?} takes for {argument} {expected}, and this is {found}"),
            "choose another AttentionKernel, or other sizes",
        ),
    };
    unserved(graph, node, reason, remedy)
}

impl Model {
    /// Loads what a node's attention takes in each bucket; the place of what it shares with nodes like it.
    pub(super) fn load_attention(&mut self, node: usize, inputs: &Inputs, stream: &Arc<CudaStream>) -> Result<usize> {
        let kernels = self.kernels;
        let graph = &self.graph;
        let refused = |kernel, error| refused(graph, node, kernel, error);
        let first = self.plans.first().map_or(kernels.kernel, |plan| kernels.of(plan.batch));
        let spec = decode_spec(graph, node).map_err(|error| refused(first, error))?;
        let accesses = &graph.nodes[node].accesses;
        let (table, lengths) = (accesses[3].tensor, accesses[4].tensor);
        let specs = graph.given(&graph.nodes[node]);
        let size = |operand: usize, at: usize| specs[operand].shape[at].constant().unwrap_or(0);
        let (pages, per_row, rows) = (size(1, 0) as i64, size(3, 1) as usize, specs[3].shape[0]);
        let same =
            |other: &Attention| (other.spec, other.table, other.lengths, other.pages) == (spec, table, lengths, pages);
        let known = self.attention.iter().position(same);
        // Also of one that is known: nodes of one plan may not have other lengths.
        if self.plans.iter().any(|plan| kernels.of(plan.batch) != AttentionKernel::Xqa) {
            self.check_lengths(node, lengths, inputs)?;
        }
        if let Some(known) = known {
            return Ok(known);
        }
        let (mut xqa, mut planned) = (None, Vec::with_capacity(self.plans.len()));
        for plan in &self.plans {
            let kernel = kernels.of(plan.batch);
            if kernel == AttentionKernel::Xqa {
                if xqa.is_none() {
                    xqa = Some(XqaKernel::new(&spec, self.device).map_err(|error| refused(kernel, error))?);
                }
                planned.push(None);
                continue;
            }
            let requests = rows.at(plan.batch) as i64;
            let room = GraphRoom {
                requests,
                rows: requests,
                pages: per_row.saturating_mul(requests as usize),
                reserved_page: self.pad_page(table),
            };
            let cache = Batch::paged(spec.page_size(), pages).map_err(|error| refused(kernel, error))?;
            let loaded = planned_spec(&spec, kernel)
                .and_then(|spec| StepKernel::new(spec, room, &cache, kernel.is_captured(), stream))
                .map_err(|error| refused(kernel, error))?;
            planned.push(Some(Planned { kernel, loaded: Some(loaded), places: [0; 2], plan: None, given: None }));
        }
        let batch = Batch::paged(spec.page_size(), pages)?;
        self.attention.push(Attention { spec, table, lengths, rows, pages, per_row, node, xqa, planned, batch });
        Ok(self.attention.len() - 1)
    }

    /// That the host knows what lengths a planned node will find: those that the step begins with, to which one is added at most
    /// once in a step.
    fn check_lengths(&self, node: usize, lengths: usize, inputs: &Inputs) -> Result<()> {
        let mut changes = inputs.changes(lengths);
        let remedy = "let `advance` change the lengths once, behind every attention, or let XQA compute it";
        if changes.next().is_some_and(|first| first < node) {
            let reason = "a node ahead of it changes the lengths that it is planned for".to_owned();
            return Err(unserved(&self.graph, node, reason, remedy));
        }
        if changes.next().is_some() {
            let reason = "a step changes the lengths that it is planned for more than once".to_owned();
            return Err(unserved(&self.graph, node, reason, remedy));
        }
        Ok(())
    }

    /// What rows that nobody asked for may read.
    fn pad_page(&self, table: usize) -> i32 {
        let page = match self.graph.tensors[table].origin {
            Origin::Input(Pad::Reserved(page)) => page,
            Origin::Input(Pad::Value(page)) => u32::try_from(page).unwrap_or(PageAllocator::RESERVED),
            _ => PageAllocator::RESERVED,
        };
        i32::try_from(page).unwrap_or(0)
    }

    /// Finds a place in the run's own memory for the lists and the tables of each plan, and one for partial results, which is that of
    /// all: one attention runs at a time.
    pub(super) fn size_plans(&mut self) {
        let mut partial = 0;
        let mut end = self.bytes[OWN];
        for planned in self.attention.iter_mut().flat_map(|attention| &mut attention.planned).flatten() {
            let Some([float, lists, tables]) = planned.loaded.as_ref().map(StepKernel::bytes) else { continue };
            partial = float.max(partial);
            for (place, bytes) in planned.places.iter_mut().zip([lists, tables]) {
                *place = end;
                end = end.saturating_add(aligned(bytes));
            }
        }
        self.partial = Span { offset: end, bytes: aligned(partial) };
        self.bytes[OWN] = self.partial.end();
    }

    /// Gives the plans their memory, once it is there, and those that are to be captured a first batch: what the planner answers to it
    /// is what is captured.
    ///
    /// # Safety
    /// The run's own block must be there, of zeros, and valid as long as the model and what it launches; its uses must be ordered with
    /// the stream.
    pub(super) unsafe fn place_plans(&mut self, stream: &Arc<CudaStream>) -> Result<()> {
        let (own, partial) = (self.blocks[OWN], self.blocks[OWN] + self.partial.offset);
        for at in 0..self.attention.len() {
            let page = self.pad_page(self.attention[at].table);
            let Attention { batch, planned, node, .. } = &mut self.attention[at];
            for planned in planned.iter_mut().flatten() {
                let Some(loaded) = planned.loaded.take() else { continue };
                batch.clear();
                batch.push(1, &[page], 1)?;
                let places = [partial, own + planned.places[0], own + planned.places[1]];
                // SAFETY: the caller's promise; the places are as large as was asked for, by `size_plans`, each plan has its own but
                // for the partial results, and a node's runs are behind those ahead of it on the stream.
                let plan = unsafe { loaded.placed(places, batch, stream) };
                planned.plan = Some(plan.map_err(|error| refused(&self.graph, *node, planned.kernel, error))?);
            }
        }
        Ok(())
    }

    fn planned(&self, plan: usize, attention: usize) -> Option<&Planned> {
        self.attention[attention].planned[plan].as_ref()
    }

    /// Whether an attention is planned in a bucket, and not XQA's.
    pub(super) fn is_planned(&self, plan: usize, attention: usize) -> bool {
        self.planned(plan, attention).is_some()
    }

    /// How many kernels an attention that is planned launches.
    pub(super) fn planned_kernels(&self, plan: usize, attention: usize) -> Option<u32> {
        let planned = self.planned(plan, attention)?;
        Some(planned.plan.as_ref().map_or(1, StepPlan::kernels))
    }

    /// Queues an attention that is planned.
    ///
    /// # Safety
    /// As for [`launch`](Self::launch), and its plan must be for what the step is given.
    pub(super) unsafe fn attend_planned(
        &self,
        plan: usize,
        node: usize,
        attention: usize,
        stream: Stream<'_>,
        early: bool,
    ) -> Result<()> {
        let Some(step) = self.planned(plan, attention).and_then(|planned| planned.plan.as_ref()) else {
            unreachable!("plans have their memory before anything is launched")
        };
        let accesses = &self.graph.nodes[node].accesses;
        let [q, k, v] = [0, 1, 2].map(|operand| self.layout(plan, &accesses[operand]));
        let (place, offset) = self.place(plan, accesses[5].tensor);
        debug_assert_eq!(place, ARENA, "a result is a value");
        let data = std::ptr::with_exposed_provenance_mut::<u8>((self.blocks[place] + offset) as usize);
        // As heads, as the queries are.
        let o = Layout::build(data.cast(), self.device, q.dtype(), q.shape(), None, None);
        // SAFETY: the caller's promise; the plan's proof, by which the result is nothing else that is needed.
        unsafe { step.run([q, k, v, o], stream, early) }
    }
}

impl Attention {
    /// Makes the batch that a step is given: so many rows, and as many as its bucket has with those that nobody asked for.
    fn fill(&mut self, kernel: AttentionKernel, inputs: &Inputs, rows: usize, bucket: usize, pad: i32) -> Result<()> {
        let Self { spec, table, lengths, per_row, batch, .. } = self;
        let page_size = spec.page_size() as usize;
        let table = inputs.words(*table, rows * *per_row);
        let lengths: Vec<usize> =
            inputs.words(*lengths, rows).into_iter().map(|length| inputs.grown(*lengths, length) as usize).collect();
        let pages = |row: usize, length: usize| {
            let first = row * *per_row;
            &table[first..first + length.div_ceil(page_size).min(*per_row)]
        };
        batch.clear();
        if kernel == AttentionKernel::BatchDecode {
            // What is missing up to the bucket is filled up by the plan.
            return lengths
                .iter()
                .enumerate()
                .try_for_each(|(row, &length)| batch.push(1, pages(row, length), length as i64));
        }
        let mut row = 0;
        while row < rows {
            // Rows that follow one another in one sequence: each has a token more, and all have the pages of those ahead.
            let mut last = row;
            while last + 1 < rows
                && lengths[last + 1] == lengths[last] + 1
                && pages(last + 1, lengths[last]) == pages(last, lengths[last])
            {
                last += 1;
            }
            batch.push((last + 1 - row) as i64, pages(last, lengths[last]), lengths[last] as i64)?;
            row = last + 1;
        }
        if bucket > rows {
            let missing = bucket - rows;
            batch.push(missing as i64, &vec![pad; missing.div_ceil(page_size)], missing as i64)?;
        }
        Ok(())
    }
}

impl DeviceRun {
    /// Whether attention that is planned ([`AttentionKernel::BatchDecode`] and the prefill kernels) is planned by the caller, by
    /// [`replan`](Self::replan), instead of by each step where it is due. Then a step whose lengths are not those that were planned
    /// is refused as [`Stale`](GraphError::Stale), and steps are queued one by one. Off unless this turns it on.
    pub fn replan_by_hand(&mut self, by_hand: bool) {
        self.by_hand = by_hand;
    }

    /// Plans attention for the step to come, where its kernel in the batch's bucket is planned: for the lengths and pages that were
    /// given, and what the steps that were queued add to the lengths. The lists are copied asynchronously, behind the steps that were
    /// queued and ahead of those to come; the host waits only where several earlier plans have not been copied yet. Steps do so by
    /// themselves unless [that is left to the caller](Self::replan_by_hand).
    ///
    /// # Errors
    /// As for [`step`](Self::step); [`PlanChanged`](GraphError::PlanChanged) where the plan would be launched in another way than what
    /// was captured: then the plan, and all else, is as it was.
    pub fn replan(&mut self) -> Result<()> {
        self.ready(1)?;
        self.plan_attention(false)
    }

    /// Sees that the batch's bucket has a plan for the step to come; `check` is whether only to look.
    pub(super) fn plan_attention(&mut self, check: bool) -> Result<()> {
        for at in 0..self.model.attention.len() {
            if self.model.is_planned(self.at, at) {
                self.plan_one(at, check)?;
            }
        }
        Ok(())
    }

    fn plan_one(&mut self, attention: usize, check: bool) -> Result<()> {
        let Self { model, inputs, set, at, rows, .. } = self;
        let pad = model.pad_page(model.attention[attention].table);
        let bucket = model.plans[*at].batch;
        let all = &mut model.attention[attention];
        let grown = inputs.grown_rows(all.lengths);
        if *rows > grown {
            // The device's lengths are not what the host counts, which a plan would be for.
            let (tensor, kind) = (&model.graph.tensors[all.lengths], "step input");
            let expected =
                format!("{} for {rows} rows, of which the steps since it was given had {grown}", tensor.spec);
            return Err(GraphError::Missing { kind, name: tensor.name.clone(), expected }.into());
        }
        let [rows, filled] = [*rows, bucket].map(|batch| all.rows.at(batch));
        let (table, lengths) = (inputs.version(all.table), inputs.version(all.lengths));
        let longest = inputs.words(all.lengths, rows as usize).into_iter().max().unwrap_or(0);
        let longest = inputs.grown(all.lengths, longest);
        let given = Given { rows, table: table.0, lengths: lengths.0, added: lengths.1, longest };
        let Some(planned) = all.planned[*at].as_ref() else { return Ok(()) };
        let (kernel, before) = (planned.kernel, planned.given);
        let node = model.graph.node_name(all.node);
        if before != Some(given) {
            if check {
                let planned = before.map_or_else(|| "nothing".to_owned(), |before| before.to_string());
                return Err(GraphError::Stale { node, planned, now: given.to_string() }.into());
            }
            let made = all.fill(kernel, inputs, rows as usize, filled as usize, pad);
            made.map_err(|error| refusal(&node, bucket, error))?;
        }
        let (_, stream) = set.launching()?;
        let _current = CurrentContext::bind(stream.context())?;
        let Attention { planned, batch, .. } = all;
        let Some(Planned { plan: Some(plan), given: on_gpu, .. }) = planned[*at].as_mut() else {
            unreachable!("plans have their memory before anything is launched")
        };
        // Of a plan that failed earlier.
        plan.restore()?;
        if before == Some(given) {
            return Ok(());
        }
        if !kernel.is_captured() {
            *on_gpu = None;
        }
        match plan.plan(batch).map_err(|error| refusal(&node, bucket, error))? {
            Replanned::Done => {
                *on_gpu = Some(given);
                Ok(())
            }
            Replanned::Otherwise { captured, wanted } => {
                Err(GraphError::PlanChanged { node, batch: bucket, captured, wanted }.into())
            }
        }
    }

    /// That so many steps may be queued at once, where the caller plans.
    pub(super) fn check_by_hand(&mut self, steps: u64) -> Result<()> {
        if !self.by_hand {
            return Ok(());
        }
        self.plan_attention(true)?;
        let grows = |at: &usize| {
            self.model.is_planned(self.at, *at) && self.inputs.steps(self.model.attention[*at].lengths) > 0
        };
        match (0..self.model.attention.len()).find(grows) {
            Some(at) if steps > 1 => {
                let node = self.model.graph.node_name(self.model.attention[at].node);
                let now = format!("{steps} steps, each of a token more");
                Err(GraphError::Stale { node, planned: "the first of them".to_owned(), now }.into())
            }
            _ => Ok(()),
        }
    }
}

/// What a batch's plan came to that was not made.
fn refusal(node: &str, batch: u64, error: FlashInferError) -> FlashInferError {
    match error {
        FlashInferError::InvalidArgument { argument, found, expected, .. } => {
            let reason = format!("{argument} is {found}, expected {expected}");
            GraphError::Contract { op: node.to_owned(), batch, reason }.into()
        }
        error if error.is_fatal() => error,
        error => GraphError::Run { node: node.to_owned(), reason: error.to_string() }.into(),
    }
}

/// Whether an operation is one that [`AttentionKernel`] is about.
pub(super) fn is_attention(kind: OpKind) -> bool {
    kind == OpKind::DecodeAttention
}

#[cfg(test)]
mod tests {
    use super::super::super::builder::GraphBuilder;
    use super::super::super::shape::Columns;
    use super::*;
    use crate::tensor::DType;

    const PAGE_SIZE: usize = 4;
    const PER_ROW: usize = 3;
    const PAGES: i64 = 40;

    /// Attention of up to 8 rows, and the next step's lengths of up to so many tokens.
    fn graph(capacity: u32) -> Graph {
        let fixed = Dim::fixed;
        let mut g = GraphBuilder::new("planned", 8);
        let [mut ids, mut positions, mut lengths] = [("ids", 0), ("positions", 0), ("lengths", 1)]
            .map(|(name, pad)| g.input(name, DType::I32, [Dim::BATCH], Pad::Value(pad)).unwrap());
        let table = g.input("page_table", DType::I32, [Dim::BATCH, fixed(PER_ROW as u64)], Pad::Reserved(39)).unwrap();
        let embedding = g.weight("embedding", DType::BF16, [fixed(128), fixed(128)]).unwrap();
        let cache = [PAGES as u64, PAGE_SIZE as u64, 1, 128].map(fixed);
        let [k, v] = ["k", "v"].map(|name| g.state(name, DType::BF16, cache).unwrap());
        let x = g.embedding(&ids, &embedding, 1.0).unwrap();
        let heads = Columns::new(0..128).heads(1);
        let attended = g.decode_attention(x.columns(heads), (&k, &v), &table, &lengths, 0.1).unwrap();
        let token = g.argmax(&attended).unwrap();
        g.advance(&token, &mut ids, &mut positions, &mut lengths, capacity).unwrap();
        g.output("token", token).unwrap();
        g.finish().unwrap()
    }

    fn words(values: &[i32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_ne_bytes()).collect()
    }

    /// The batch that these lengths and pages make, after so many steps.
    fn filled(kernel: AttentionKernel, rows: &[(i32, [i32; PER_ROW])], steps: u64, capacity: u32) -> Batch {
        let graph = graph(capacity);
        let tensor = |name| graph.find("step input", name).unwrap();
        let mut inputs = Inputs::new(&graph, 8).unwrap();
        inputs.allocate();
        let count = rows.len() as u64;
        let lengths: Vec<i32> = rows.iter().map(|row| row.0).collect();
        let table: Vec<i32> = rows.iter().flat_map(|row| row.1).collect();
        inputs.give(&graph, "lengths", count, DType::I32, &words(&lengths)).unwrap();
        inputs.give(&graph, "page_table", count, DType::I32, &words(&table)).unwrap();
        (0..steps).for_each(|_| inputs.stepped(8));
        let node = graph.nodes.iter().position(|node| is_attention(node.operation.kind)).unwrap();
        let spec = decode_spec(&graph, node).unwrap();
        let batch = Batch::paged(PAGE_SIZE as i64, PAGES).unwrap();
        let mut attention = Attention {
            spec,
            table: tensor("page_table"),
            lengths: tensor("lengths"),
            rows: Dim::BATCH,
            pages: PAGES,
            per_row: PER_ROW,
            node,
            xqa: None,
            planned: Vec::new(),
            batch,
        };
        attention.fill(kernel, &inputs, rows.len(), 8, 39).unwrap();
        attention.batch
    }

    fn batch(requests: &[(i64, &[i32], i64)]) -> Batch {
        let mut batch = Batch::paged(PAGE_SIZE as i64, PAGES).unwrap();
        requests.iter().for_each(|&(queries, pages, keys)| batch.push(queries, pages, keys).unwrap());
        batch
    }

    #[test]
    fn a_decode_batch_has_each_rows_pages_up_to_its_length_as_it_has_grown() {
        let rows = [(1, [5, 6, 7]), (4, [8, 9, 10]), (11, [1, 2, 3])];
        let kernel = AttentionKernel::BatchDecode;
        let at = |steps, capacity| filled(kernel, &rows, steps, capacity);
        assert_eq!(at(0, 12), batch(&[(1, &[5], 1), (1, &[8], 4), (1, &[1, 2, 3], 11)]));
        assert_eq!(at(1, 12), batch(&[(1, &[5], 2), (1, &[8, 9], 5), (1, &[1, 2, 3], 12)]));
        // A length stays at the capacity, as the device's does, and one that was past it comes back to it.
        assert_eq!(at(7, 12), batch(&[(1, &[5, 6], 8), (1, &[8, 9, 10], 11), (1, &[1, 2, 3], 12)]));
        assert_eq!(at(0, 6), batch(&[(1, &[5], 1), (1, &[8], 4), (1, &[1, 2, 3], 11)]));
        assert_eq!(at(1, 6), batch(&[(1, &[5], 2), (1, &[8, 9], 5), (1, &[1, 2], 6)]));
    }

    #[test]
    fn rows_that_follow_one_another_in_a_sequence_are_queries_of_one_request() {
        let kernel = AttentionKernel::Fa2;
        // A prompt from its first token on, over the end of a page; its padding reads the reserved page.
        let prompt: Vec<_> = (1..=6).map(|length| (length, [5, 6, 7])).collect();
        assert_eq!(filled(kernel, &prompt, 0, 12), batch(&[(6, &[5, 6], 6), (2, &[39], 2)]));
        // A chunk behind what a cache holds, with pages in the table that the rows ahead do not have yet.
        let chunk = [(3, [5, 0, 0]), (4, [5, 0, 0]), (5, [5, 6, 0]), (6, [5, 6, 7])];
        assert_eq!(filled(kernel, &chunk, 0, 12), batch(&[(4, &[5, 6], 6), (4, &[39], 4)]));
        // Rows of others: the same length, one that skips a token, another page ahead, a shorter one.
        let others = [(3, [5, 6, 7]), (3, [5, 6, 7]), (5, [5, 6, 7]), (6, [8, 6, 7]), (2, [8, 6, 7]), (3, [8, 6, 7])];
        let expected =
            batch(&[(1, &[5], 3), (1, &[5], 3), (1, &[5, 6], 5), (1, &[8, 6], 6), (2, &[8], 3), (2, &[39], 2)]);
        assert_eq!(filled(kernel, &others, 0, 12), expected);
        // As long as the bucket, without padding; more padding than a page has tokens.
        let full: Vec<_> = (1..=8).map(|length| (length, [5, 6, 7])).collect();
        assert_eq!(filled(kernel, &full, 0, 12), batch(&[(8, &[5, 6], 8)]));
        assert_eq!(filled(kernel, &full[..1], 0, 12), batch(&[(1, &[5], 1), (7, &[39, 39], 7)]));
    }

    #[test]
    fn a_bucket_has_the_kernel_of_its_rows() {
        use AttentionKernel::{BatchDecode, Fa3};
        let kernels = AttentionKernels::new(BatchDecode).from_rows(8, Fa3);
        let of = [1, 7, 8, 32].map(|bucket| kernels.of(bucket));
        assert_eq!(of, [BatchDecode, BatchDecode, Fa3, Fa3]);
        assert_eq!(AttentionKernels::default().of(64), AttentionKernel::Xqa);
        assert!(BatchDecode.is_captured() && AttentionKernel::Xqa.is_captured() && !Fa3.is_captured());
    }
}
