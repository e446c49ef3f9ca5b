//! Runs plans on a GPU: node by node, or captured into CUDA graphs, one for each bucket over the same memory.

use std::cell::RefCell;
use std::fmt;
use std::sync::Arc;

use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaEvent, CudaSlice, CudaStream, CudaView, result as cuda};

use super::backend::Backend;
use super::error::GraphError;
use super::graph::{Graph, Origin, Target};
use super::host::part;
use super::plan::{Plan, Sizes};
use super::step::Buckets;
use crate::attention::buffer_address;
use crate::buffers::device;
use crate::data::tensor::numbers;
use crate::error::{FlashInferError, Result, driver, driver_in};
use crate::graph::{Chained, GraphSet, captured_so_far};
use crate::matmul::Selections;
use crate::owner::{CurrentContext, record, refuse_capture};
use crate::runtime::FlashInferRuntime;
use crate::stream::Stream;
use crate::tensor::{DType, Element};

mod inputs;
mod model;
mod own;
mod pages;
mod replan;
mod ring;

use inputs::Inputs;
use model::{ARENA, BEHIND, BLOCKS, INPUTS, Model, OWN, STATES, WEIGHTS};
use pages::Pages;
pub use replan::{AttentionKernel, AttentionKernels};
use ring::{Ring, Staging};

/// A part of a weight's memory that is given under a name of its own.
#[derive(Debug)]
struct Part {
    name: String,
    tensor: usize,
    first: u64,
    bytes: u64,
    given: bool,
}

/// What comes back from each step.
#[derive(Debug)]
struct Followed {
    tensor: usize,
    ring: Ring,
}

/// A graph with memory on a GPU: a plan for each bucket over one arena, one set of weights and states, and one block of a step's
/// inputs.
///
/// A step runs node by node ([`step`](Self::step)), or as one launch of what was [captured](Self::capture), any number of them in a
/// row without waiting ([`run`](Self::run)). Both run the same kernels with the same arguments.
///
/// ```no_run
/// # use flashinfer_rs::compute::{Buckets, DeviceRun, Graph};
/// # use half::bf16;
/// # fn decode(graph: &Graph, weights: &[(String, Vec<bf16>)], table: &[i32]) -> Result<(), Box<dyn std::error::Error>> {
/// # use flashinfer_rs::cudarc::driver::CudaContext;
/// let stream = CudaContext::new(0)?.new_stream()?;
/// let mut run = DeviceRun::new(graph, &Buckets::new(&[1, 2, 4])?, &stream)?;
/// for (name, values) in weights {
///     run.weight(name, values)?;
/// }
/// run.set_rows(3)?;
/// run.input("ids", &[11, 12, 13])?;
/// run.input("positions", &[0, 0, 0])?;
/// run.input("lengths", &[1, 1, 1])?;
/// run.input("page_table", table)?;
/// run.capture()?;
/// run.run(16)?;
/// while let Some(step) = run.next_result::<i32>()? {
///     println!("step {}: {:?}", step.step, step.values);
/// }
/// # Ok(())
/// # }
/// ```
///
/// # Indices
/// Ids, positions, lengths and pages are checked when they are given, by what the graph's kernels read with them, and what
/// [`advance`](super::GraphBuilder::advance) makes of them on the device is counted: a step whose position is past a row's pages is
/// refused before it is queued. So an operation that is steered by anything but a step input is refused when the run is made.
///
/// # Attention
/// XQA computes it unless [other kernels](AttentionKernels) are asked for. Those are planned ahead of each step, by the run itself: the
/// same steps do, and [`run`](Self::run) then plans between the steps that it queues. Of a graph that
/// [`AppendAttention`](super::Rule::AppendAttention) was applied to it is this crate's own in every bucket, and steps are refused in which a
/// row would append to a page that stands at another place of the page table too.
///
/// # Padding
/// A batch runs at the smallest bucket that holds it. What stands in the rows behind it is declared with each input.
pub struct DeviceRun {
    model: Model,
    set: GraphSet<[CudaSlice<u8>; BLOCKS]>,
    inputs: Inputs,
    pages: Pages,
    staging: Staging,
    followed: Option<Followed>,
    parts: Vec<Part>,
    rows: u64,
    /// The bucket's place among the plans.
    at: usize,
    pdl: bool,
    checks: bool,
    /// Whether the caller plans attention.
    by_hand: bool,
    captured: Vec<Option<CapturedStep>>,
    steps: u64,
}

impl fmt::Debug for DeviceRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { model, rows, captured, steps, .. } = self;
        let (graph, device) = (model.graph.name(), model.device);
        f.debug_struct("DeviceRun")
            .field("graph", &graph)
            .field("device", &device)
            .field("rows", rows)
            .field("captured", captured)
            .field("steps", steps)
            .finish_non_exhaustive()
    }
}

/// What CUDA tells of a captured step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct CapturedStep {
    /// The nodes of the CUDA graph.
    pub nodes: usize,
    /// Those that are kernels.
    pub kernels: usize,
    /// Those that may start before the one ahead of them has ended.
    pub programmatic: usize,
}

/// How long a node took.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct NodeTime {
    /// The node.
    pub node: usize,
    /// The time between the end of what was ahead of it and its own end on the GPU, in microseconds. It includes what the host
    /// took to launch it, where the GPU waited for that.
    pub microseconds: f32,
}

/// A step's result on the host.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Arrived<'r, T> {
    /// The step, counted from 0 for the run's first.
    pub step: u64,
    /// The rows of the batch, as [`follow`](DeviceRun::follow) chose.
    pub values: &'r [T],
}

impl DeviceRun {
    /// Plans a graph for each bucket, proves the plans, loads the kernels, and allocates all memory on the stream, which all work
    /// is queued on. States are zeros.
    ///
    /// # Errors
    /// [`ArenaTooLarge`](GraphError::ArenaTooLarge) where the GPU has not as much memory free as is planned, before anything is
    /// allocated; [`BucketTooSmall`](GraphError::BucketTooSmall) for a bucket that is larger than the graph was built for;
    /// [`UnsupportedKernel`](GraphError::UnsupportedKernel) for an operation that no kernel serves on this GPU, one that would be
    /// steered by what is no step input, and a graph that was built for the host;
    /// [`WorkspaceTooSmall`](GraphError::WorkspaceTooSmall); [`Mismatch`](GraphError::Mismatch) for an input whose padding is no
    /// index that its kernels may be given; [`ArtifactMissing`](FlashInferError::ArtifactMissing) for a kernel that was not
    /// vendored; [`CublasLtMissing`](FlashInferError::CublasLtMissing) where the graph has products; as for [`GraphSet::new`];
    /// [`Cuda`](FlashInferError::Cuda).
    pub fn new(graph: &Graph, buckets: &Buckets, stream: &Arc<CudaStream>) -> Result<Self> {
        Self::with_selections(graph, buckets, stream, &mut Selections::new())
    }

    /// As [`new`](Self::new), with the algorithms of products that were chosen before. Those that have none are measured and added,
    /// so that another run can have the same, and compute the same bits.
    ///
    /// # Errors
    /// As there, and for selections as for [`MatMul::new`](crate::matmul::MatMul::new).
    pub fn with_selections(
        graph: &Graph,
        buckets: &Buckets,
        stream: &Arc<CudaStream>,
        selections: &mut Selections,
    ) -> Result<Self> {
        Self::with_attention(graph, buckets, stream, selections, AttentionKernels::default())
    }

    /// As [`with_selections`](Self::with_selections), with other kernels for attention than XQA's.
    ///
    /// # Errors
    /// As there; [`UnsupportedKernel`](GraphError::UnsupportedKernel) for sizes that the kernel has not, and where lengths change within
    /// a step ahead of attention that is planned for them.
    pub fn with_attention(
        graph: &Graph,
        buckets: &Buckets,
        stream: &Arc<CudaStream>,
        selections: &mut Selections,
        kernels: AttentionKernels,
    ) -> Result<Self> {
        if graph.target() != Target::Gpu {
            let (op, reason) = (format!("graph {:?}", graph.name()), "it was built for the host".to_owned());
            let remedy = "build it by GraphBuilder::new, which checks what the kernels take";
            return Err(GraphError::UnsupportedKernel { op, reason, remedy }.into());
        }
        let (context, on) = (stream.context(), device(stream.context()));
        FlashInferRuntime::global()?.checked_device(on)?;
        refuse_capture("DeviceRun", stream)?;
        let _current = CurrentContext::bind(context)?;
        if buckets.largest() > graph.largest {
            let (rows, largest) = (buckets.largest(), graph.largest);
            return Err(GraphError::BucketTooSmall { rows, largest }.into());
        }
        let mut inputs = Inputs::new(graph, buckets.largest())?;
        let mut model = Model::new(graph, buckets, &inputs, on, kernels)?;
        let with_room_behind = |model: &Model| model.bytes.map(|bytes| bytes.saturating_add(BEHIND));
        let sum = |bytes: [u64; BLOCKS]| bytes.iter().fold(0, |sum: u64, bytes| sum.saturating_add(*bytes));
        // Before products are measured, which takes memory for a time, and again with what they ask for.
        enough_memory(stream, sum(with_room_behind(&model)))?;
        model.load(&inputs, stream, selections)?;
        let bytes = with_room_behind(&model);
        enough_memory(stream, sum(bytes))?;
        let allocated = driver_in(context, "allocating a compute graph's memory");
        let mut blocks = Vec::with_capacity(BLOCKS);
        for bytes in bytes {
            blocks.push(stream.alloc_zeros::<u8>(bytes as usize).map_err(&allocated)?);
        }
        for (first, values) in model.steady_bytes() {
            let mut place = blocks[OWN].slice_mut(first..first + values.len());
            stream.memcpy_htod(&values, &mut place).map_err(&allocated)?;
        }
        for (address, block) in model.blocks.iter_mut().zip(&mut blocks) {
            *address = buffer_address(block) as u64;
        }
        // SAFETY: the blocks were allocated on the stream, as large as the model asked for; the run keeps them as long as the model and,
        // by the set, until what was launched has run, and orders their uses with the stream.
        unsafe { model.place_plans(stream) }?;
        let staging = Staging::new(stream, inputs.bytes() as usize)?;
        inputs.allocate();
        let Ok(blocks) = <[CudaSlice<u8>; BLOCKS]>::try_from(blocks) else { unreachable!("as many were allocated") };
        // Each call says for itself whether it may start early.
        let set = GraphSet::new(stream, blocks)?.with_pdl(false);
        let captured = vec![None; model.plans.len()];
        let parts = parts(graph);
        let mut run = Self {
            model,
            set,
            inputs,
            pages: Pages::new(graph),
            staging,
            followed: None,
            parts,
            rows: 1,
            at: 0,
            pdl: true,
            checks: false,
            by_hand: false,
            captured,
            steps: 0,
        };
        let is_token = |tensor: &&usize| graph.tensors[**tensor].spec.dtype == DType::I32;
        if let Some(&token) = graph.outputs.iter().find(is_token) {
            run.follow_tensor(token)?;
        }
        Ok(run)
    }

    /// The graph.
    pub fn graph(&self) -> &Graph {
        &self.model.graph
    }

    /// The buckets.
    pub fn buckets(&self) -> &Buckets {
        &self.model.buckets
    }

    /// The kernels that compute attention.
    pub fn attention(&self) -> AttentionKernels {
        self.model.kernels
    }

    /// The plan of a bucket.
    ///
    /// # Errors
    /// [`BucketTooSmall`](GraphError::BucketTooSmall) for one that there is not.
    pub fn plan(&self, bucket: u64) -> Result<&Plan> {
        let largest = self.model.buckets.largest();
        let found = self.model.plans.iter().find(|plan| plan.batch == bucket);
        found.ok_or(GraphError::BucketTooSmall { rows: bucket, largest }.into())
    }

    /// The memory that the plan of the largest bucket takes, whose arena all buckets share.
    pub fn sizes(&self) -> Sizes {
        self.model.plans.last().map(Plan::sizes).unwrap_or_default()
    }

    /// The stream that all work is queued on.
    pub fn stream(&self) -> &Arc<CudaStream> {
        self.set.stream()
    }

    /// How many kernels a step of a bucket launches here; of the prefill kernels, which each batch is planned for, as many as for the
    /// last one.
    ///
    /// # Errors
    /// As for [`plan`](Self::plan).
    pub fn kernels(&self, bucket: u64) -> Result<u32> {
        self.plan(bucket)?;
        let at = self.model.plans.iter().position(|plan| plan.batch == bucket).unwrap_or(0);
        Ok((0..self.model.graph.nodes.len()).map(|node| self.model.kernels(at, node)).sum())
    }

    /// Gives a weight. One that others are packed into is filled part by part, by their names, or as a whole by its own. It waits
    /// until the values were copied, behind the steps that were queued.
    ///
    /// # Errors
    /// [`UnknownName`](GraphError::UnknownName); [`Mismatch`](GraphError::Mismatch) for another element type than the weight's,
    /// and another number of elements; [`InvalidArgument`](FlashInferError::InvalidArgument) while the run's stream captures;
    /// [`Cuda`](FlashInferError::Cuda).
    pub fn weight<T: Element>(&mut self, name: &str, values: &[T]) -> Result<()> {
        self.weight_bytes(name, T::DTYPE, as_bytes(values))
    }

    /// As [`weight`](Self::weight), of bytes that hold elements of this type, as files have them.
    ///
    /// # Errors
    /// As there.
    pub fn weight_bytes(&mut self, name: &str, dtype: DType, bytes: &[u8]) -> Result<()> {
        let Some(at) = self.parts.iter().position(|part| part.name == name) else {
            // One that others are packed into, by its own name: all of them at once.
            let tensor = self.model.graph.find("weight", name)?;
            self.fill(tensor, name, (0, self.model.graph.tensors[tensor].spec.bytes(1)), dtype, bytes)?;
            self.parts.iter_mut().filter(|part| part.tensor == tensor).for_each(|part| part.given = true);
            return Ok(());
        };
        let Part { tensor, first, bytes: expected, .. } = self.parts[at];
        self.fill(tensor, name, (first, expected), dtype, bytes)?;
        self.parts[at].given = true;
        Ok(())
    }

    /// Gives a state what it begins with, for the rows of the largest bucket where it grows with the batch.
    ///
    /// # Errors
    /// As for [`weight`](Self::weight).
    pub fn state<T: Element>(&mut self, name: &str, values: &[T]) -> Result<()> {
        self.state_bytes(name, T::DTYPE, as_bytes(values))
    }

    /// As [`state`](Self::state), of bytes that hold elements of this type.
    ///
    /// # Errors
    /// As there.
    pub fn state_bytes(&mut self, name: &str, dtype: DType, bytes: &[u8]) -> Result<()> {
        let tensor = self.model.graph.find("state", name)?;
        let expected = self.model.graph.tensors[tensor].spec.bytes(self.model.buckets.largest());
        self.fill(tensor, name, (0, expected), dtype, bytes)
    }

    fn fill(&mut self, tensor: usize, name: &str, place: (u64, u64), dtype: DType, bytes: &[u8]) -> Result<()> {
        let (first, expected) = place;
        let Graph { tensors, .. } = &self.model.graph;
        let (spec, kind) = (&tensors[tensor].spec, tensors[tensor].origin.name());
        if spec.dtype != dtype || bytes.len() as u64 != expected {
            let size = |bytes: u64, dtype: DType| format!("{} elements of {dtype}", bytes / dtype.size() as u64);
            let (found, expected) = (size(bytes.len() as u64, dtype), size(expected, spec.dtype));
            return Err(GraphError::Mismatch { kind, name: name.to_owned(), found, expected }.into());
        }
        let to = self.model.address(self.at, tensor) + first;
        let (_, stream) = self.set.launching()?;
        let _current = CurrentContext::bind(stream.context())?;
        // SAFETY: so many bytes of the run's own block from there on, whose uses are those of the set, on this stream; what is copied
        // stays until the stream was waited for below.
        let copied = unsafe { cuda::memcpy_htod_async(to, bytes, stream.cu_stream()) };
        let copied = copied.map_err(driver_in(stream.context(), "copying a weight or a state"));
        // Of page-locked memory the copy may be on its way still, and nobody tells whoever owns that.
        self.synchronize().and(copied)
    }

    /// Says how many rows the batch has from now on; answers the bucket that it runs at.
    ///
    /// # Errors
    /// [`BucketTooSmall`](GraphError::BucketTooSmall).
    pub fn set_rows(&mut self, rows: u64) -> Result<u64> {
        let bucket = self.model.buckets.of(rows)?;
        self.at = self.model.plans.iter().position(|plan| plan.batch == bucket).unwrap_or(self.at);
        self.rows = rows;
        Ok(bucket)
    }

    /// Gives an input of the steps to come: as many rows as the batch has, and all of an input that does not grow with the batch.
    /// The rows up to the bucket hold what was declared. It is copied with the next step, and stays until it is given anew or the
    /// graph changes it.
    ///
    /// # Errors
    /// [`UnknownName`](GraphError::UnknownName); [`Mismatch`](GraphError::Mismatch) for another element type or number, and for an
    /// index that kernels must not be given; [`ContextTooLong`](GraphError::ContextTooLong) for a position or a length past what a
    /// row's pages, or the table of angles, have.
    pub fn input<T: Element>(&mut self, name: &str, rows: &[T]) -> Result<()> {
        self.inputs.give(&self.model.graph, name, self.rows, T::DTYPE, as_bytes(rows))
    }

    /// Looks at whether all is there for so many steps, and no index grows too large on the way.
    fn ready(&mut self, steps: u64) -> Result<()> {
        if let Some(part) = self.parts.iter().find(|part| !part.given) {
            let tensor = &self.model.graph.tensors[part.tensor];
            let expected = match tensor.packed.is_empty() {
                true => tensor.spec.to_string(),
                false => format!("a part of {} {}", tensor.name, tensor.spec),
            };
            return Err(GraphError::Missing { kind: "weight", name: part.name.clone(), expected }.into());
        }
        self.inputs.check(&self.model.graph, self.rows, steps)?;
        self.pages.check(&self.inputs, self.rows, steps)
    }

    /// Copies what the device has not yet of the inputs.
    fn upload(&mut self) -> Result<()> {
        if !self.inputs.is_changed() {
            return Ok(());
        }
        let (_, stream) = self.set.launching()?;
        // The null stream is that of whichever context is current.
        let _current = CurrentContext::bind(stream.context())?;
        let (block, changed) = self.inputs.changed();
        // SAFETY: the block of the run's own, as large as that of the host; its uses are those of the set, on this stream.
        unsafe { self.staging.copy(block, changed, self.model.blocks[INPUTS]) }?;
        self.inputs.copied();
        Ok(())
    }

    /// Queues the copy of a step's result, and counts the step.
    fn end_step(&mut self) -> Result<()> {
        let step = self.steps;
        self.steps += 1;
        let Some(Followed { tensor, ring }) = &mut self.followed else { return Ok(()) };
        let bytes = self.model.graph.tensors[*tensor].spec.bytes(self.rows) as usize;
        let from = self.model.address(self.at, *tensor);
        let _current = CurrentContext::bind(self.set.stream().context())?;
        // SAFETY: an output's place in the arena, which has as many bytes and stays as it is until the next step; the ring is for
        // those of the largest batch, and copies on the set's stream.
        unsafe { ring.push(step, from, bytes) }
    }

    /// Runs one step, each node launched by itself, asynchronously.
    ///
    /// # Errors
    /// [`Missing`](GraphError::Missing) for a weight or an input that was not given; [`ContextTooLong`](GraphError::ContextTooLong)
    /// where an index would be past its end; [`SharedPage`](GraphError::SharedPage) where a row would append to a page that is not its own
    /// alone, in a graph that was fused for steps; [`Run`](GraphError::Run) with what a kernel's launcher raised;
    /// [`NotFinite`](GraphError::NotFinite) where that is [looked at](Self::check_finite);
    /// where attention is planned, [`PlanChanged`](GraphError::PlanChanged), and [`Stale`](GraphError::Stale) where
    /// [the caller plans](Self::replan_by_hand) and did not;
    /// [`ContextLost`](FlashInferError::ContextLost); [`Cuda`](FlashInferError::Cuda).
    pub fn step(&mut self) -> Result<()> {
        self.eager().step()
    }

    /// Steps node by node.
    pub fn eager(&mut self) -> EagerRun<'_> {
        EagerRun { run: self, next: None, added: Vec::new(), events: None }
    }

    /// Runs one step, each node launched by itself, and answers how long each took on the GPU. It waits.
    ///
    /// # Errors
    /// As for [`step`](Self::step).
    pub fn profile(&mut self) -> Result<Vec<NodeTime>> {
        let context = Arc::clone(self.stream().context());
        let _current = CurrentContext::bind(&context)?;
        let event = |_| context.new_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).map_err(driver("cuEventCreate"));
        let events: Vec<CudaEvent> = (0..=self.model.graph.nodes.len()).map(event).collect::<Result<_>>()?;
        let mut eager = self.eager();
        eager.events = Some(&events);
        eager.step()?;
        self.synchronize()?;
        let order = &self.model.plans[self.at].order;
        let between = |(at, &node): (usize, &usize)| {
            let milliseconds = events[at].elapsed_ms(&events[at + 1]).map_err(driver("cuEventElapsedTime"))?;
            Ok(NodeTime { node, microseconds: milliseconds * 1e3 })
        };
        order.iter().enumerate().map(between).collect()
    }

    /// Whether each node's results are looked at for what is no finite number in steps node by node, which then wait for every
    /// node. Off unless this turns it on.
    pub fn check_finite(&mut self, checks: bool) {
        self.checks = checks;
    }

    /// Whether captures to come let kernels start early where the plan allows it (programmatic dependent launch). On unless this
    /// turns it off; the results are the same.
    pub fn set_pdl(&mut self, pdl: bool) {
        self.pdl = pdl;
    }

    /// Captures a step of each bucket, the largest first, and compares each with its plan: how many kernels each node launched,
    /// that each waits for the one ahead of it, and that none starts early that must not. Buckets whose attention is not one that is
    /// [captured](AttentionKernel::is_captured) are left out: their steps run node by node.
    ///
    /// # Errors
    /// [`CaptureRefused`](GraphError::CaptureRefused) with CUDA's reason; [`CapturedDiffers`](GraphError::CapturedDiffers) with the
    /// node; [`Run`](GraphError::Run) with what a kernel's launcher raised. What was captured before stays as it was.
    pub fn capture(&mut self) -> Result<()> {
        let captured = |at: &usize| self.is_captured(*at);
        let plans: Vec<usize> = (0..self.model.plans.len()).rev().filter(captured).collect();
        plans.into_iter().try_for_each(|at| self.capture_plan(at))
    }

    /// Whether a bucket's steps can be captured.
    fn is_captured(&self, at: usize) -> bool {
        self.model.attention.is_empty() || self.model.kernels.of(self.model.plans[at].batch).is_captured()
    }

    fn capture_plan(&mut self, at: usize) -> Result<()> {
        let runtime = FlashInferRuntime::global()?;
        let (model, pdl) = (&self.model, self.pdl);
        let (graph, batch) = (model.graph.name().to_owned(), model.plans[at].batch);
        let (marks, found) = (RefCell::new(Vec::with_capacity(model.graph.nodes.len())), RefCell::new(None));
        let result = self.set.capture_looked_at(
            batch,
            |stream: Stream<'_>, _| {
                for &node in &model.plans[at].order {
                    // SAFETY: the set owns the blocks, and captures for its own launches; what nodes find their way by is checked
                    // before each of these.
                    unsafe { model.launch(at, node, stream, pdl) }.map_err(|error| model.failed(node, error))?;
                    marks.borrow_mut().push(captured_so_far(runtime, stream)?);
                }
                Ok(())
            },
            |captured| {
                let step = model.compare(at, pdl, &marks.borrow(), captured.chain(runtime)?)?;
                *found.borrow_mut() = Some(step);
                Ok(())
            },
        );
        result.map_err(|error| match error {
            FlashInferError::Graph { problem: reason, .. } => {
                GraphError::CaptureRefused { graph, batch, reason }.into()
            }
            other => other,
        })?;
        self.captured[at] = found.into_inner();
        Ok(())
    }

    /// What CUDA tells of a bucket's captured step; nothing where none was captured.
    pub fn captured(&self, bucket: u64) -> Option<CapturedStep> {
        let at = self.model.plans.iter().position(|plan| plan.batch == bucket)?;
        self.captured[at]
    }

    /// Queues so many steps of what was captured for the batch's bucket, one launch each, without waiting for any of them. Where attention
    /// is [planned](AttentionKernel::BatchDecode), the host plans it between them, and waits where the GPU is several plans behind.
    ///
    /// # Errors
    /// As for [`step`](Self::step), before anything is queued; [`Graph`](FlashInferError::Graph) where nothing was captured. Where
    /// attention is planned, [`PlanChanged`](GraphError::PlanChanged) for the first step that the captured launch does not do for:
    /// those ahead of it were queued.
    pub fn run(&mut self, steps: u64) -> Result<()> {
        if steps == 0 {
            return Ok(());
        }
        let batch = self.model.plans[self.at].batch;
        if self.captured[self.at].is_none() {
            let problem = format!("no step was captured for a batch of {batch}");
            let remedy = match self.is_captured(self.at) {
                true => "call DeviceRun::capture first",
                false => {
                    "call DeviceRun::step: the prefill kernels of this bucket are planned for each batch, and not captured"
                }
            };
            return Err(FlashInferError::Graph { problem, remedy });
        }
        self.ready(steps)?;
        self.check_by_hand(steps)?;
        self.upload()?;
        for _ in 0..steps {
            self.plan_attention(self.by_hand)?;
            self.set.launch(batch)?;
            self.inputs.stepped(batch);
            self.end_step()?;
        }
        Ok(())
    }

    /// Chooses the output that comes back from each step to come, of the rows of the batch. Unless this chooses another, it is the
    /// first output of I32, a token. Results that were not taken yet are dropped.
    ///
    /// # Errors
    /// [`UnknownName`](GraphError::UnknownName); [`Cuda`](FlashInferError::Cuda) where there is no page-locked memory.
    pub fn follow(&mut self, output: &str) -> Result<()> {
        let tensor = self.model.graph.find("output", output)?;
        self.follow_tensor(tensor)
    }

    fn follow_tensor(&mut self, tensor: usize) -> Result<()> {
        let bytes = self.model.graph.tensors[tensor].spec.bytes(self.model.buckets.largest());
        let stream = self.set.stream();
        let _current = CurrentContext::bind(stream.context())?;
        self.followed = Some(Followed { tensor, ring: Ring::new(stream, bytes as usize)? });
        Ok(())
    }

    /// The result of the oldest step that was not taken yet, once it has arrived; nothing where no step's result is left. As many
    /// results are kept as 16 MiB hold, 1,024 at the most: then the oldest is given up for the next, as the steps' numbers show.
    ///
    /// # Errors
    /// [`Mismatch`](GraphError::Mismatch) where the output is of another element type;
    /// [`ContextLost`](FlashInferError::ContextLost); [`Cuda`](FlashInferError::Cuda).
    pub fn next_result<T: Element>(&mut self) -> Result<Option<Arrived<'_, T>>> {
        let Some(Followed { tensor, ring }) = &mut self.followed else { return Ok(None) };
        let tensor = &self.model.graph.tensors[*tensor];
        typed::<T>("output", &tensor.name, tensor.spec.dtype)?;
        let taken = ring.take()?;
        Ok(taken.map(|(step, bytes)| Arrived { step, values: as_elements(bytes) }))
    }

    /// Whether the oldest result that was not taken yet has arrived, so that [`next_result`](Self::next_result) would not wait.
    ///
    /// # Errors
    /// [`ContextLost`](FlashInferError::ContextLost); [`Cuda`](FlashInferError::Cuda).
    pub fn has_result(&self) -> Result<bool> {
        self.followed.as_ref().map_or(Ok(false), |followed| followed.ring.has_arrived())
    }

    /// Waits until all that was queued has run.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) while the stream captures;
    /// [`ContextLost`](FlashInferError::ContextLost); [`Cuda`](FlashInferError::Cuda).
    pub fn synchronize(&self) -> Result<()> {
        let stream = self.set.stream();
        let _current = CurrentContext::bind(stream.context())?;
        refuse_capture("DeviceRun", stream)?;
        // SAFETY: the stream is live.
        let waited = unsafe { cuda::stream::synchronize(stream.cu_stream()) };
        waited.map_err(driver_in(stream.context(), "waiting for steps"))
    }

    /// What an output, a state or a step input holds, once all that was queued has run: of those that grow with the batch its
    /// rows.
    ///
    /// # Errors
    /// [`UnknownName`](GraphError::UnknownName); [`ContextLost`](FlashInferError::ContextLost); [`Cuda`](FlashInferError::Cuda).
    pub fn read(&mut self, name: &str) -> Result<Vec<f64>> {
        let kinds = ["output", "state", "step input"];
        let found = kinds.into_iter().find_map(|kind| self.model.graph.find(kind, name).ok());
        let tensor = found.map_or_else(|| self.model.graph.find("output", name), Ok)?;
        let spec = &self.model.graph.tensors[tensor].spec;
        let (dtype, bytes) = (spec.dtype, spec.bytes(self.rows));
        let bytes = self.download(tensor, bytes)?;
        Ok(numbers(&bytes, dtype).collect())
    }

    fn download(&mut self, tensor: usize, bytes: u64) -> Result<Vec<u8>> {
        let from = self.model.address(self.at, tensor);
        let mut values = vec![0; bytes as usize];
        let (_, stream) = self.set.launching()?;
        let _current = CurrentContext::bind(stream.context())?;
        // SAFETY: so many bytes of the run's own block from there on, whose uses are those of the set, on this stream, which is waited
        // for before the values are looked at or dropped; else they never are.
        let copied = unsafe { cuda::memcpy_dtoh_async(&mut values, from, stream.cu_stream()) };
        let copied = copied.map_err(driver_in(stream.context(), "reading a tensor"));
        if let Err(error) = self.synchronize() {
            // Nobody knows whether something is written there still.
            std::mem::forget(values);
            return Err(error);
        }
        copied.map(|()| values)
    }

    /// An output's or a state's rows on the GPU, for kernels of the caller's between steps. cudarc orders what is done through the
    /// view with the steps.
    ///
    /// # Errors
    /// [`UnknownName`](GraphError::UnknownName); [`Mismatch`](GraphError::Mismatch) for another element type; as for
    /// [`GraphSet::buffers`].
    pub fn view<T: Element>(&mut self, name: &str) -> Result<CudaView<'_, T>> {
        let found = ["output", "state"].into_iter().find_map(|kind| self.model.graph.find(kind, name).ok());
        let tensor = found.map_or_else(|| self.model.graph.find("output", name), Ok)?;
        let Graph { tensors, .. } = &self.model.graph;
        let (spec, origin) = (&tensors[tensor].spec, tensors[tensor].origin);
        let kind = if origin == Origin::State { "state" } else { "output" };
        typed::<T>(kind, name, spec.dtype)?;
        let (count, bytes) = (spec.elements(self.rows) as usize, spec.bytes(self.rows));
        let (block, first) = self.model.place(self.at, tensor);
        let views = self.set.buffers()?;
        let [weights, states, arena, inputs, own] = views;
        let view = match block {
            WEIGHTS => weights,
            STATES => states,
            ARENA => arena,
            INPUTS => inputs,
            _ => own,
        };
        let view = view.into_view().slice(first as usize..(first + bytes) as usize);
        // SAFETY: the place holds so many elements of this type, of which every pattern of bits is one, and is aligned to 256
        // bytes.
        match unsafe { view.transmute::<T>(count) } {
            Some(view) => Ok(view),
            None => unreachable!("as many bytes as the elements have"),
        }
    }
}

impl Model {
    /// What a node's launch came to, with the node's name.
    fn failed(&self, node: usize, error: FlashInferError) -> FlashInferError {
        match error {
            error if error.is_fatal() => error,
            error => GraphError::Run { node: self.graph.node_name(node), reason: error.to_string() }.into(),
        }
    }

    /// Compares what was captured with a plan: `marks` says behind each of the plan's nodes how many CUDA had captured.
    fn compare(&self, at: usize, pdl: bool, marks: &[usize], chain: Option<Vec<Chained>>) -> Result<CapturedStep> {
        let plan = &self.plans[at];
        let differs = |node: String, planned: &dyn fmt::Display, captured: &dyn fmt::Display| -> FlashInferError {
            let (graph, batch) = (self.graph.name().to_owned(), plan.batch);
            let (planned, captured) = (planned.to_string(), captured.to_string());
            GraphError::CapturedDiffers { graph, batch, node, planned, captured }.into()
        };
        let Some(chain) = chain else {
            return Err(differs("its order".to_owned(), &"one node behind the other", &"branches"));
        };
        let mut start = 0;
        for (&node, &end) in plan.order.iter().zip(marks) {
            let name = || self.graph.node_name(node);
            let Some(own) = chain.get(start..end) else {
                return Err(differs(name(), &"a place in the order", &"none"));
            };
            start = end;
            if own.iter().any(|node| node.allocates) {
                let (graph, batch) = (self.graph.name().to_owned(), plan.batch);
                return Err(GraphError::AllocationInCapture { graph, batch, node: name() }.into());
            }
            let kernels = own.iter().filter(|node| node.kernel).count();
            let (planned, others) = (self.kernels(at, node) as usize, own.len() - kernels);
            let as_many = if self.is_free(at, node) { kernels >= planned } else { (kernels, others) == (planned, 0) };
            if !as_many {
                let captured = format!("kernels: {kernels}, copies and fills: {others}");
                return Err(differs(name(), &format!("kernels: {planned}"), &captured));
            }
            if self.is_free(at, node) {
                continue;
            }
            if own.first().is_some_and(|first| first.early) && !self.starts_early(at, node, pdl) {
                return Err(differs(name(), &"a start behind the end of the node ahead", &"one before that"));
            }
            // What a node launches behind its first kernel reads what that wrote; what merges attention's parts waits for them itself.
            let waits = self.starts_early(at, node, pdl) && self.merges_parts(at, node);
            if own.iter().skip(1).any(|behind| behind.early) && !waits {
                let planned = "kernels that each start behind the end of the one ahead";
                return Err(differs(name(), &planned, &"one that starts before that"));
            }
        }
        if start != chain.len() {
            return Err(differs("its end".to_owned(), &format!("{start} nodes"), &chain.len()));
        }
        let of = |wanted: fn(&Chained) -> bool| chain.iter().filter(|node| wanted(node)).count();
        Ok(CapturedStep { nodes: chain.len(), kernels: of(|node| node.kernel), programmatic: of(|node| node.early) })
    }
}

/// Steps of a [`DeviceRun`] node by node, as a [`Backend`] does them.
///
/// Nodes run in the plan's order alone, each once, behind [`begin`](Backend::begin): what a node finds its way by may be what one
/// ahead of it wrote.
#[derive(Debug)]
pub struct EagerRun<'r> {
    run: &'r mut DeviceRun,
    /// The place of the next node, once the step was begun.
    next: Option<usize>,
    /// What was added to each input in this step.
    added: Vec<i64>,
    /// One ahead of the first node, and one behind each.
    events: Option<&'r [CudaEvent]>,
}

impl EagerRun<'_> {
    fn record(&self, at: usize) -> Result<()> {
        let Some(events) = self.events else { return Ok(()) };
        let stream = self.run.set.stream();
        let _current = CurrentContext::bind(stream.context())?;
        record(&events[at], stream).map_err(driver_in(stream.context(), "recording a node's time"))
    }

    /// That what a node wrote is finite. Caches are not looked at as a whole.
    fn finite(&mut self, node: usize) -> Result<()> {
        let run = &mut *self.run;
        let written: Vec<_> = run.model.written(&run.model.graph.nodes[node]).collect();
        let batch = run.model.plans[run.at].batch;
        for access in written {
            let bytes = run.download(access.tensor, run.model.graph.tensors[access.tensor].spec.bytes(batch))?;
            let graph = &run.model.graph;
            let values = part(graph, &access, batch, &bytes);
            if let Some(first) = values.iter().position(|value| !value.is_finite()) {
                let (node, tensor) = (graph.node_name(node), graph.tensors[access.tensor].name.clone());
                return Err(GraphError::NotFinite { node, tensor, first: first as u64, value: values[first] }.into());
            }
        }
        Ok(())
    }
}

impl Backend for EagerRun<'_> {
    fn graph(&self) -> &Graph {
        &self.run.model.graph
    }

    fn plan(&self) -> &Plan {
        &self.run.model.plans[self.run.at]
    }

    fn begin(&mut self) -> Result<()> {
        self.next = None;
        self.run.ready(1)?;
        self.run.plan_attention(self.run.by_hand)?;
        self.run.upload()?;
        self.added = vec![0; self.run.inputs.count()];
        self.next = Some(0);
        self.record(0)
    }

    /// # Errors
    /// As for [`DeviceRun::step`], and [`Run`](GraphError::Run) for a node whose turn it is not.
    fn node(&mut self, at: usize) -> Result<()> {
        let order = &self.run.model.plans[self.run.at].order;
        let Some(&node) = order.get(at).filter(|_| self.next == Some(at)) else {
            let reason = match self.next {
                Some(next) if next < order.len() => format!("it is the turn of the one at place {next}"),
                _ => "the step was not begun, or has ended".to_owned(),
            };
            return Err(GraphError::Run { node: format!("place {at} of the plan"), reason }.into());
        };
        let last = at + 1 == order.len();
        // What fails ends the step.
        self.next = None;
        self.run.inputs.check_node(node, &self.added)?;
        let _current = CurrentContext::bind(self.run.set.stream().context())?;
        let (_, stream) = self.run.set.launching()?;
        let stream = Stream::cudarc(stream);
        // SAFETY: the set owns the blocks, and orders what is launched on its stream with all other uses; what the node finds its
        // way by was checked when it was given and above, and is what the nodes ahead of it made of it in this step.
        let launched = unsafe { self.run.model.launch(self.run.at, node, stream, false) };
        let bucket = self.run.model.plans[self.run.at].batch;
        self.run.inputs.launched(node, &mut self.added, bucket);
        launched.map_err(|error| self.run.model.failed(node, error))?;
        self.record(at + 1)?;
        if self.run.checks {
            self.finite(node)?;
        }
        if last {
            return self.run.end_step();
        }
        self.next = Some(at + 1);
        Ok(())
    }
}

/// The parts that a graph's weights are given by.
fn parts(graph: &Graph) -> Vec<Part> {
    let mut all = Vec::new();
    for (i, tensor) in graph.tensors.iter().enumerate().filter(|(_, tensor)| tensor.origin == Origin::Weight) {
        let bytes = tensor.spec.bytes(1);
        let rows = tensor.packed.iter().map(|part| part.1).sum::<u64>().max(1);
        let mut add = |name: &String, first, bytes| {
            all.push(Part { name: name.clone(), tensor: i, first, bytes, given: false });
        };
        if tensor.packed.is_empty() {
            add(&tensor.name, 0, bytes);
        }
        let mut first = 0;
        for (name, own) in &tensor.packed {
            add(name, first * (bytes / rows), own * (bytes / rows));
            first += own;
        }
    }
    all
}

/// That the GPU has so many bytes free, or will have when what was queued on the stream has run.
fn enough_memory(stream: &CudaStream, planned: u64) -> Result<()> {
    let failed = driver_in(stream.context(), "cuMemGetInfo");
    let free = || cuda::mem_get_info().map(|(free, _)| free as u64).map_err(&failed);
    if planned <= free()? {
        return Ok(());
    }
    // Memory whose release is queued is free behind that.
    // SAFETY: the stream is live.
    unsafe { cuda::stream::synchronize(stream.cu_stream()) }.map_err(&failed)?;
    let free = free()?;
    if planned <= free { Ok(()) } else { Err(GraphError::ArenaTooLarge { planned, free }.into()) }
}

fn typed<T: Element>(kind: &'static str, name: &str, dtype: DType) -> Result<()> {
    if T::DTYPE == dtype {
        return Ok(());
    }
    let (found, expected) = (format!("elements of {dtype}"), format!("{}, as was asked for", T::DTYPE));
    Err(GraphError::Mismatch { kind, name: name.to_owned(), found, expected }.into())
}

/// Elements as their bytes.
fn as_bytes<T: Element>(values: &[T]) -> &[u8] {
    // SAFETY: elements are numbers without padding; the bytes are as many as they take, and borrowed.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// Bytes of page-locked memory as elements, of which every pattern of bits is one.
fn as_elements<T: Element>(bytes: &[u8]) -> &[T] {
    assert!(bytes.as_ptr().addr().is_multiple_of(align_of::<T>()), "a place of a ring is aligned to 64 bytes");
    // SAFETY: aligned, as many elements as the bytes hold, and borrowed; elements are numbers without padding.
    unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len() / size_of::<T>()) }
}
