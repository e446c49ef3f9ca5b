//! Scratch memory for sampling on a GPU, and the kernels of this crate's own that stand around FlashInfer's.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, CudaView};

use super::context::{Place, Sampler, SamplingContext, checked_chain, statuses_on_host};
use super::{ChainSpeculativeSampling, ChainTensors, Draw, FEW_ROWS, LONGEST, RowStatus, softmax_workspace_size};
use crate::buffers::{device, refuse_per_thread};
use crate::contract::{Operand, stream_fits};
use crate::engine::{Entry, Kernel};
use crate::error::{FlashInferError, Result, driver};
use crate::glue::{self, Chain, Glue};
use crate::graph::{GraphMut, Launched, Leaf, Site};
use crate::owner::{Owner, ordered, refuse_capture};
use crate::runtime::FlashInferRuntime;
use crate::stream::Stream;
use crate::tensor::{DType, Device, Layout, TensorMut};

#[derive(Debug)]
pub(super) struct OnStream {
    stream: Arc<CudaStream>,
    rows: i64,
    status: CudaSlice<i32>,
    scratch: CudaSlice<u8>,
}

/// Where the parts of the scratch memory start, and where they end, of a context for so many rows.
#[derive(Debug, Clone, Copy)]
struct Parts {
    /// A word for each row, 0 between calls.
    seen: usize,
    /// A status for each row of speculative sampling.
    row_status: usize,
    /// Drafts that are tokens.
    drafts: usize,
    /// Counters of speculative sampling.
    accepted: usize,
    emitted: usize,
    end: usize,
}

impl Parts {
    /// Behind the workspace of a softmax, with which it starts.
    fn of(rows: i64) -> Self {
        let each = |start: usize, size: usize| (start + rows as usize * size).next_multiple_of(256);
        let seen = (workspace_size(rows) as usize).next_multiple_of(256);
        let row_status = each(seen, 8);
        let drafts = each(row_status, 4);
        let accepted = each(drafts, 4);
        let emitted = each(accepted, 4);
        Self { seen, row_status, drafts, accepted, emitted, end: each(emitted, 4) }
    }
}

/// For the longest rows there may be.
fn workspace_size(rows: i64) -> i64 {
    softmax_workspace_size(rows.min(FEW_ROWS), LONGEST)
}

impl SamplingContext {
    /// A context for a stream, with scratch memory of its own for calls of up to so many rows: 28 bytes for each, and 16 KiB for
    /// each of the first 128.
    ///
    /// # Errors
    /// [`DeviceOutOfRange`](FlashInferError::DeviceOutOfRange); [`Cuda`](FlashInferError::Cuda) where there is no memory, or
    /// the driver cannot translate this crate's kernels; [`InvalidArgument`](FlashInferError::InvalidArgument) for no
    /// rows or more than 2³¹ − 1, for the per-thread stream, which is another in each thread, and for a stream that
    /// captures; or why there is no GPU.
    pub fn new(stream: &Arc<CudaStream>, rows: usize) -> Result<Self> {
        refuse_per_thread("SamplingContext", stream)?;
        refuse_capture("SamplingContext", stream)?;
        let count = i64::try_from(rows).ok().filter(|rows| (1..=i64::from(i32::MAX)).contains(rows));
        let Some(count) = count else {
            let (found, expected) = (rows.to_string(), format!("1 to {}", i32::MAX));
            return Err(FlashInferError::InvalidArgument {
                function: "SamplingContext",
                argument: "rows",
                found,
                expected,
            });
        };
        let id = FlashInferRuntime::global()?.checked_device(device(stream.context()))?;
        Glue::get()?.prepare(id)?;
        let status = stream.alloc_zeros(rows).map_err(driver("allocating the statuses"))?;
        let scratch = stream.alloc_zeros(Parts::of(count).end).map_err(driver("allocating the scratch memory"))?;
        let gpu = OnStream { stream: Arc::clone(stream), rows: count, status, scratch };
        Ok(Self { host: Vec::new(), gpu: Some(gpu) })
    }

    /// The stream that calls are queued on; none on the host.
    pub fn stream(&self) -> Option<&Arc<CudaStream>> {
        self.gpu.as_ref().map(|gpu| &gpu.stream)
    }

    /// The calls, on this context's stream; of a context for the host, of tensors there.
    ///
    /// # Errors
    /// As for [`TensorMut::from_cudarc`].
    pub fn sampler(&mut self) -> Result<Sampler<'_>> {
        let Some(gpu) = &mut self.gpu else { return Ok(Sampler { place: Place::Host(&mut self.host) }) };
        let len = gpu.scratch.len() as i64;
        let status = TensorMut::from_cudarc(&gpu.stream, &mut gpu.status, &[gpu.rows])?;
        let scratch = TensorMut::from_cudarc(&gpu.stream, &mut gpu.scratch, &[len])?;
        OnGpu::sampler(status, scratch, gpu.rows, Stream::cudarc(&gpu.stream))
    }

    /// What was wrong with each row of the last call that drew or renormalized, on the GPU, when the stream has come so far: a
    /// [`RowStatus`]'s bits for each row, 0 for a valid one. To be copied without a wait, for example to pinned memory
    /// behind the tokens. None on the host.
    pub fn status(&self) -> Option<&CudaSlice<i32>> {
        self.gpu.as_ref().map(|gpu| &gpu.status)
    }

    /// What was wrong with each of the first rows of the last call that drew or renormalized. Waits for the stream.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) for more rows than the context has memory for, or than the last
    /// call had, on the host; [`Cuda`](FlashInferError::Cuda).
    pub fn statuses(&self, rows: usize) -> Result<Vec<RowStatus>> {
        let Some(gpu) = &self.gpu else { return statuses_on_host(&self.host, rows) };
        let Some(part) = gpu.status.try_slice(..rows) else {
            let (found, expected) = (rows.to_string(), format!("at most {}, as the context has", gpu.rows));
            return Err(FlashInferError::InvalidArgument {
                function: "SamplingContext",
                argument: "rows",
                found,
                expected,
            });
        };
        let bits = gpu.stream.clone_dtoh(&part).map_err(driver("copying the statuses"))?;
        Ok(bits.into_iter().map(RowStatus::from_bits).collect())
    }
}

/// A context's memory, for calls.
#[derive(Debug)]
pub(super) struct OnGpu<'a> {
    glue: &'static Glue,
    pub(super) at: glue::Place<'a>,
    /// For how many rows there is memory.
    pub(super) rows: i64,
    parts: Parts,
    status: TensorMut<'a>,
    scratch: TensorMut<'a>,
}

impl<'a> OnGpu<'a> {
    fn sampler(status: TensorMut<'a>, scratch: TensorMut<'a>, rows: i64, stream: Stream<'a>) -> Result<Sampler<'a>> {
        // Of a graph's memory nothing orders other streams with the graph's launches.
        if !stream_fits(scratch.layout(), stream) {
            return Err(FlashInferError::InvalidArgument {
                function: "SamplingContext",
                argument: "stream",
                found: format!("{:p}", stream.as_raw()),
                expected: "the stream of the capture, which its closure is given".to_owned(),
            });
        }
        let device = FlashInferRuntime::global()?.checked_device(scratch.device())?;
        let (glue, at) = (Glue::get()?, glue::Place { device, stream });
        let gpu = Self { glue, at, rows, parts: Parts::of(rows), status, scratch };
        Ok(Sampler { place: Place::Gpu(gpu) })
    }

    /// A part of the scratch memory.
    fn part(&self, start: usize) -> *mut c_void {
        self.scratch.layout().data().wrapping_byte_add(start)
    }

    fn tensor(&self, start: usize, dtype: DType, shape: &[i64]) -> Layout {
        let (device, stream) = (self.scratch.device(), self.scratch.layout().stream());
        Layout::build(self.part(start), device, dtype, shape, None, stream)
    }

    /// The scratch memory of a softmax.
    pub(super) fn workspace(&self) -> (Layout, &Owner<'a>) {
        (self.tensor(0, DType::U8, &[workspace_size(self.rows)]), self.scratch.owner())
    }

    /// Queues what uses the context's memory and these tensors, in order with their other uses.
    fn in_order<'o>(
        &self,
        function: &'static str,
        tensors: &[(&'static str, &Owner<'o>)],
        queue: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let own: [(&'static str, &Owner<'_>); 2] =
            [("context", self.status.owner()), ("context", self.scratch.owner())];
        let all = tensors.iter().copied().chain(own);
        if all.clone().any(|(_, owner)| owner.orders()) { ordered(function, all, queue) } else { queue() }
    }

    /// Looks at the rows of a `[rows, vocab]`, which there is memory for.
    pub(super) fn guard(&self, function: &'static str, rows: &TensorMut<'_>) -> Result<()> {
        let (layout, status) = (rows.layout(), self.status.layout().data());
        let shape = (layout.data(), layout.size(0) as u32, layout.size(1) as u32);
        self.in_order(function, &[("probs", rows.owner())], || {
            // SAFETY: the rows were checked to be contiguous F32 of this device, which the caller lent mutably; the context's
            // memory is this stream's alone, of as many rows as were checked; its words are 0 between calls.
            unsafe { self.glue.guard_rows(self.at, shape, self.part(self.parts.seen), status) }
        })
    }

    /// Speculative sampling, of drafts that are tokens and rows that are distributions by what is queued ahead.
    pub(super) fn chain(&self, tensors: &mut ChainTensors<'_>, draw: Draw) -> Result<()> {
        let row = ChainSpeculativeSampling::ROW;
        let entry = Entry::of::<ChainSpeculativeSampling>();
        let mut operands = tensors.operands(draw);
        let device = Device::Cuda(self.at.device as u32);
        let Some([batch, count, vocab]) = checked_chain(&operands, self.at.stream, device)? else { return Ok(()) };
        let needed = count.saturating_mul(2).saturating_add(1).saturating_mul(batch);
        if needed > self.rows {
            return Err(FlashInferError::InvalidArgument {
                function: row.function,
                argument: "rows",
                found: format!("{needed} of {batch} sequences with {count} drafts each"),
                expected: format!("at most {}, for which SamplingContext::new was asked for memory", self.rows),
            });
        }
        // Found and loaded first: nothing is queued for a kernel that is not there.
        entry.function()?;
        let chain = Chain { batch: batch as u32, count: count as u32, vocab: vocab as u32 };
        let parts = &self.parts;
        let (draft_rows, target_rows) = (chain.batch * chain.count, chain.batch * (chain.count + 1));
        let draft_status = self.part(parts.row_status);
        let target_status = draft_status.wrapping_byte_add(draft_rows as usize * 4);
        let [drafts, accepted, emitted] = [parts.drafts, parts.accepted, parts.emitted].map(|start| self.part(start));
        let status = self.status.layout().data();
        let address = |operand: &Operand<'_, '_>| operand.layout().map_or(std::ptr::null_mut(), Layout::data);
        let [draft_probs, draft_token_ids, target_probs, tokens, all_accepted, all_emitted, ..] =
            operands.each_ref().map(address);

        let owners = [
            (row.arguments[0].name, tensors.draft_probs.owner()),
            (row.arguments[1].name, tensors.draft_token_ids.owner()),
            (row.arguments[2].name, tensors.target_probs.owner()),
        ];
        self.in_order(row.function, &owners, || {
            let seen = self.part(parts.seen);
            let ids = [drafts, accepted, emitted, status];
            // SAFETY: as in `guard`, of the rows of both; there is memory for the statuses and the drafts of all.
            unsafe {
                self.glue.guard_rows(self.at, (draft_probs, draft_rows, chain.vocab), seen, draft_status)?;
                self.glue.guard_rows(self.at, (target_probs, target_rows, chain.vocab), seen, target_status)?;
                self.glue.chain_begin(self.at, draft_token_ids, ids, chain)
            }
        })?;
        let own = [
            self.tensor(parts.drafts, DType::I32, &[batch, count]),
            self.tensor(parts.accepted, DType::I32, &[batch]),
            self.tensor(parts.emitted, DType::I32, &[batch]),
        ];
        for (argument, tensor) in [1, 4, 5].into_iter().zip(&own) {
            operands[argument] = Operand::Tensor(tensor, self.scratch.owner());
        }
        // SAFETY: by what is queued ahead the rows are distributions and the drafts tokens, on the same stream; what is no
        // token behind it is replaced below.
        unsafe { entry.call(&operands, self.at.stream) }?;
        let owners = [
            (row.arguments[0].name, tensors.draft_probs.owner()),
            (row.arguments[2].name, tensors.target_probs.owner()),
            (row.arguments[3].name, tensors.output_token_ids.owner()),
            (row.arguments[4].name, tensors.output_accepted_token_num.owner()),
            (row.arguments[5].name, tensors.output_emitted_draft_token_num.owner()),
        ];
        self.in_order(row.function, &owners, || {
            let pointers = [
                draft_probs,
                target_probs,
                tokens,
                accepted,
                emitted,
                all_accepted,
                all_emitted,
                draft_status,
                target_status,
                status,
            ];
            // SAFETY: the tensors were checked, and the context has memory for all rows.
            unsafe { self.glue.chain_end(self.at, pointers, chain) }
        })
    }
}

/// [`SamplingContext`] in a capture.
#[derive(Debug)]
pub struct CapturedSampling<'a>(Option<(GraphMut<'a, i32>, GraphMut<'a, u8>)>);

/// [`SamplingContext`] between a graph's launches.
#[derive(Debug)]
pub struct SamplingViews<'a>(Option<CudaView<'a, i32>>);

impl<'a> SamplingViews<'a> {
    /// As [`SamplingContext::status`], of the last launch.
    pub fn status(&self) -> Option<&CudaView<'a, i32>> {
        self.0.as_ref()
    }
}

impl Leaf for SamplingContext {
    type Captured<'a> = CapturedSampling<'a>;
    type Views<'a> = SamplingViews<'a>;

    fn check(&self, context: &Arc<CudaContext>) -> Result<()> {
        let Some(gpu) = &self.gpu else { return Ok(()) };
        gpu.status.check(context)?;
        gpu.scratch.check(context)
    }

    fn captured<'a>(&'a mut self, site: Site) -> CapturedSampling<'a> {
        CapturedSampling(self.gpu.as_mut().map(|gpu| (gpu.status.captured(site), gpu.scratch.captured(site))))
    }

    fn views(&mut self) -> SamplingViews<'_> {
        SamplingViews(self.gpu.as_ref().map(|gpu| gpu.status.as_view()))
    }

    fn take_over(&mut self, stream: &CudaStream) {
        if let Some(gpu) = &mut self.gpu {
            gpu.status.take_over(stream);
            gpu.scratch.take_over(stream);
        }
    }

    fn hand_back(&mut self, launched: &Launched<'_>) -> Result<()> {
        let Some(gpu) = &mut self.gpu else { return Ok(()) };
        gpu.status.hand_back(launched)?;
        gpu.scratch.hand_back(launched)
    }
}

crate::graph::graph_leaf!(SamplingContext);

impl CapturedSampling<'_> {
    /// The calls, captured on the stream of the capture. Draws want a source that is a
    /// buffer of the graph too, or one that is [frozen](crate::Philox::frozen).
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) of a context for the host, and for another stream than that of
    /// the capture.
    pub fn sampler<'s>(&'s mut self, stream: Stream<'s>) -> Result<Sampler<'s>> {
        let Some((status, scratch)) = &mut self.0 else {
            return Err(FlashInferError::InvalidArgument {
                function: "SamplingContext",
                argument: "context",
                found: "one for the host".to_owned(),
                expected: "one for a stream, SamplingContext::new".to_owned(),
            });
        };
        let (rows, len) = (status.len() as i64, scratch.len() as i64);
        OnGpu::sampler(status.write(&[rows])?, scratch.write(&[len])?, rows, stream)
    }
}
