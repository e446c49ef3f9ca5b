//! GDN prefill without `unsafe`: sequence offsets from host data, and a context that owns the workspace.
//!
//! Upstream, in release 0.6.3, hangs the GPU on a sequence without tokens, and two streams must never share a workspace.
//! Here offsets are checked where they are made, empty sequences are never launched, and a context belongs to one stream.

use super::gdn::{self, RawArgs};
use crate::error::{FlashInferError, Result};
use crate::runtime::FlashInferRuntime;
use crate::stream::Stream;
use crate::tensor::{DType, Device, Raw, TensorMut, TensorRef};

/// Where the sequences of a packed batch start: `0 = c0 ≤ c1 ≤ … ≤ cN = T`. Sequences may be empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CuSeqlens {
    offsets: Vec<i64>,
    runs: Vec<Run>,
}

/// Sequences one after the other that have tokens, or that have none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    first: usize,
    count: usize,
    empty: bool,
}

impl CuSeqlens {
    /// From `N + 1` offsets.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) unless they start with 0, do not decrease, name at least one
    /// sequence, and fit 32 bits.
    pub fn from_offsets(offsets: &[i64]) -> Result<Self> {
        let invalid = |found: String, expected: &str| {
            let (function, argument) = ("gdn_prefill", "cu_seqlens");
            Err(FlashInferError::InvalidArgument { function, argument, found, expected: expected.to_owned() })
        };
        let [first, .., last] = offsets else {
            return invalid(format!("{offsets:?}"), "offsets of at least one sequence, two numbers or more");
        };
        if *first != 0 {
            return invalid(format!("{first} at the start"), "0 there");
        }
        if let Some(i) = offsets.windows(2).position(|pair| pair[1] < pair[0]) {
            let found = format!("{} at {i} and {} after it", offsets[i], offsets[i + 1]);
            return invalid(found, "offsets that do not decrease");
        }
        if *last > i32::MAX.into() || offsets.len() > i32::MAX as usize {
            let found = format!("for {last} tokens of {} sequences", offsets.len() - 1);
            return invalid(found, "numbers that fit 32 bits");
        }
        let mut runs: Vec<Run> = Vec::new();
        for (sequence, pair) in offsets.windows(2).enumerate() {
            let empty = pair[0] == pair[1];
            match runs.last_mut().filter(|run| run.empty == empty) {
                Some(run) => run.count += 1,
                None => runs.push(Run { first: sequence, count: 1, empty }),
            }
        }
        Ok(Self { offsets: offsets.to_vec(), runs })
    }

    /// From the sequences' lengths.
    ///
    /// # Errors
    /// As for [`from_offsets`](Self::from_offsets), and for a negative length.
    pub fn from_lengths(lengths: &[i64]) -> Result<Self> {
        let mut offsets = Vec::with_capacity(lengths.len() + 1);
        offsets.push(0i64);
        let mut sum = 0i64;
        for &length in lengths {
            sum = if length < 0 { -1 } else { sum.saturating_add(length) };
            offsets.push(sum);
        }
        Self::from_offsets(&offsets)
    }

    /// The number of sequences.
    pub fn sequences(&self) -> usize {
        self.offsets.len() - 1
    }

    /// The number of tokens of all sequences.
    pub fn tokens(&self) -> i64 {
        self.offsets[self.sequences()]
    }

    /// The offsets.
    pub fn offsets(&self) -> &[i64] {
        &self.offsets
    }
}

/// What is optional.
#[derive(Debug, Default)]
pub struct GdnOptions<'a> {
    /// `[N, H, D, D]` F32: the states before the first tokens; zeros without.
    pub input_state: Option<TensorRef<'a>>,
    /// `[T, H]` F32: the decay, linear (not its logarithm); 1 without.
    pub alpha: Option<TensorRef<'a>>,
    /// `[T, H]` F32: how much of the correction is written; 1 without.
    pub beta: Option<TensorRef<'a>>,
    /// Multiplies the output; 0.0 means 1/√D.
    pub scale: f64,
}

/// The tensors of a prefill; shapes and types as in [`GdnPrefill`](gdn::GdnPrefill).
#[derive(Debug)]
pub struct GdnTensors<'a> {
    /// `[T, H, D]`, as `q`.
    pub output: TensorMut<'a>,
    /// `[N, H, D, D]` F32: the states after the last tokens. An empty sequence's is its input state, or zeros.
    pub output_state: TensorMut<'a>,
    /// `[T, query heads, D]` F16 or BF16.
    pub q: TensorRef<'a>,
    /// `[T, key heads, D]`, as `q`.
    pub k: TensorRef<'a>,
    /// `[T, value heads, D]`, as `q`.
    pub v: TensorRef<'a>,
}

/// [`gdn_prefill`](gdn::gdn_prefill) on tensors of the host, where the reference computes it.
///
/// # Errors
/// [`InvalidArgument`](FlashInferError::InvalidArgument) for what breaks the contract, a tensor on a GPU among it.
pub fn gdn_prefill_on_host(tensors: GdnTensors<'_>, cu_seqlens: &CuSeqlens, options: GdnOptions<'_>) -> Result<()> {
    if tensors.q.device() != Device::Cpu {
        return Err(FlashInferError::InvalidArgument {
            function: "gdn_prefill",
            argument: "q",
            found: format!("on {}", tensors.q.device()),
            expected: "memory of cpu; a GdnPrefillContext serves GPUs".to_owned(),
        });
    }
    let offsets = TensorRef::from_slice(&cu_seqlens.offsets, &[cu_seqlens.offsets.len() as i64])?;
    let mut nothing: [u8; 0] = [];
    let workspace = TensorMut::from_slice(&mut nothing, &[0])?;
    let args = raw(&tensors, &options, offsets.raw(), workspace.raw());
    gdn::check(&args, Stream::NULL, 0)?;
    // SAFETY: the reference checks the offsets' contents, and everything is borrowed until it answers.
    unsafe { gdn::run(&args, Stream::NULL) }
}

#[inline]
fn raw<'a>(
    tensors: &'a GdnTensors<'_>,
    options: &'a GdnOptions<'_>,
    cu_seqlens: &'a Raw,
    workspace: &'a Raw,
) -> RawArgs<'a> {
    RawArgs {
        output: tensors.output.raw(),
        output_state: tensors.output_state.raw(),
        q: tensors.q.raw(),
        k: tensors.k.raw(),
        v: tensors.v.raw(),
        cu_seqlens,
        input_state: options.input_state.as_ref().map(TensorRef::raw),
        alpha: options.alpha.as_ref().map(TensorRef::raw),
        beta: options.beta.as_ref().map(TensorRef::raw),
        scale: options.scale,
        workspace,
    }
}

/// Launches every run of sequences that have tokens, and gives the others their states.
///
/// # Safety
/// `cu_seqlens` must be device memory with the offsets of each run that has tokens, counted from that run's first token,
/// one run after the other. All memory must stay valid until the stream has come so far, and the workspace be in use by
/// no other stream.
#[cfg_attr(not(feature = "cudarc"), allow(dead_code, reason = "GPU memory comes from cudarc"))]
unsafe fn launch_runs(args: &RawArgs<'_>, cu_seqlens: &CuSeqlens, stream: Stream<'_>) -> Result<()> {
    gdn::check(args, stream, 0)?;
    let fits = args.q.shape()[0] == cu_seqlens.tokens();
    if !fits {
        return Err(FlashInferError::InvalidArgument {
            function: "gdn_prefill",
            argument: "q",
            found: format!("{} tokens long", args.q.shape()[0]),
            expected: format!("{}, the end of cu_seqlens", cu_seqlens.tokens()),
        });
    }
    if let [Run { empty: false, .. }] = cu_seqlens.runs[..] {
        // SAFETY: the offsets start with 0, increase strictly, since no sequence is empty, and end with the number of
        // tokens; the rest is the caller's promise.
        return unsafe { gdn::run(args, stream) };
    }
    let mut at = 0;
    for run in &cu_seqlens.runs {
        let (first, count) = (run.first as i64, run.count as i64);
        let (start, end) = (cu_seqlens.offsets[run.first], cu_seqlens.offsets[run.first + run.count]);
        let states = |tensor: &Raw| tensor.rows(first, count);
        let (output_state, input_state) = (states(args.output_state), args.input_state.map(states));
        if run.empty {
            // SAFETY: the caller's promise; the sizes were checked.
            unsafe { keep_states(&output_state, input_state.as_ref(), stream) }?;
            continue;
        }
        let tokens = |tensor: &Raw| tensor.rows(start, end - start);
        let (alpha, beta) = (args.alpha.map(tokens), args.beta.map(tokens));
        let part = RawArgs {
            output: &tokens(args.output),
            output_state: &output_state,
            q: &tokens(args.q),
            k: &tokens(args.k),
            v: &tokens(args.v),
            cu_seqlens: &args.cu_seqlens.part(at, count + 1),
            input_state: input_state.as_ref(),
            alpha: alpha.as_ref(),
            beta: beta.as_ref(),
            ..*args
        };
        at += count + 1;
        // SAFETY: as above, of this run's offsets.
        unsafe { gdn::run(&part, stream) }?;
    }
    Ok(())
}

/// The final states of sequences without tokens: their initial ones.
///
/// # Safety
/// Both must be contiguous device memory of the same size, valid until the stream has come so far.
unsafe fn keep_states(to: &Raw, from: Option<&Raw>, stream: Stream<'_>) -> Result<()> {
    let runtime = FlashInferRuntime::global()?;
    let cudart = runtime.cudart()?;
    let _current = cudart.set_current(runtime.checked_device(to.device())?)?;
    let bytes = to.numel() as usize * DType::F32.size();
    let from = from.map(|from| from.data().cast_const());
    // SAFETY: the caller's promise.
    unsafe { cudart.fill(to.data(), from, bytes, stream.as_raw()) }
}

#[cfg(feature = "cudarc")]
mod on_gpu {
    use std::sync::Arc;

    use cudarc::driver::{CudaContext, CudaSlice, CudaStream};

    use super::{CuSeqlens, GdnOptions, GdnTensors, launch_runs, raw};
    use crate::cudarc_buffers::{device, driver};
    use crate::error::{FlashInferError, Result};
    use crate::graph::sealed::Sealed;
    use crate::graph::{GraphBuffers, GraphMut, GraphRef, Site};
    use crate::runtime::FlashInferRuntime;
    use crate::stream::Stream;
    use crate::tensor::{TensorMut, TensorRef};

    /// TMA descriptors of 128 bytes for as many multiprocessors as any GPU may number them: on a MIG slice the numbers go
    /// past the slice's own count.
    const WORKSPACE: usize = 128 * 1024;

    /// [`CuSeqlens`] with its copy on a GPU.
    #[derive(Debug)]
    pub struct DeviceCuSeqlens {
        host: CuSeqlens,
        buffer: CudaSlice<i64>,
    }

    impl CuSeqlens {
        /// Copies the offsets to the stream's GPU, asynchronously.
        ///
        /// # Errors
        /// [`Cuda`](FlashInferError::Cuda) where there is no memory.
        pub fn to_device(&self, stream: &Arc<CudaStream>) -> Result<DeviceCuSeqlens> {
            let mut runs = Vec::with_capacity(self.offsets.len());
            for run in self.runs.iter().filter(|run| !run.empty) {
                let offsets = &self.offsets[run.first..=run.first + run.count];
                runs.extend(offsets.iter().map(|offset| offset - offsets[0]));
            }
            // As many as there are offsets, so that the whole can be described by its length.
            runs.resize(runs.len().max(self.offsets.len()), 0);
            let buffer = stream.clone_htod(&runs).map_err(driver("copying cu_seqlens"))?;
            Ok(DeviceCuSeqlens { host: self.clone(), buffer })
        }
    }

    impl DeviceCuSeqlens {
        /// The offsets on the host.
        pub fn host(&self) -> &CuSeqlens {
            &self.host
        }

        /// Offsets that are on the GPU already, in sequences that each have a token.
        ///
        /// # Errors
        /// [`InvalidArgument`](FlashInferError::InvalidArgument) unless `offsets` are right by themselves, none of the
        /// sequences is empty, and the buffer is as long.
        ///
        /// # Safety
        /// The buffer must hold these very offsets whenever it is used.
        pub unsafe fn from_device(offsets: &[i64], buffer: CudaSlice<i64>) -> Result<Self> {
            let host = CuSeqlens::from_offsets(offsets)?;
            if host.runs.iter().any(|run| run.empty) || buffer.len() != offsets.len() {
                return Err(FlashInferError::InvalidArgument {
                    function: "gdn_prefill",
                    argument: "cu_seqlens",
                    found: format!("{} numbers on the GPU for {offsets:?}", buffer.len()),
                    expected: "as many as there are offsets, of sequences that each have a token".to_owned(),
                });
            }
            Ok(Self { host, buffer })
        }
    }

    /// [`DeviceCuSeqlens`] in a capture.
    #[derive(Debug)]
    pub struct CapturedCuSeqlens<'a> {
        host: &'a CuSeqlens,
        buffer: GraphRef<'a, i64>,
    }

    impl Sealed for DeviceCuSeqlens {}
    impl GraphBuffers for DeviceCuSeqlens {
        type Captured<'a> = CapturedCuSeqlens<'a>;
        type Views<'a> = &'a CuSeqlens;

        fn check(&self, context: &Arc<CudaContext>) -> Result<()> {
            self.buffer.check(context)
        }

        fn captured<'a>(&'a mut self, stream: &CudaStream, site: Site) -> CapturedCuSeqlens<'a> {
            CapturedCuSeqlens { host: &self.host, buffer: self.buffer.captured(stream, site).into_ref() }
        }

        fn views(&mut self) -> &CuSeqlens {
            &self.host
        }

        fn ordered(&mut self, stream: &CudaStream, launch: &mut dyn FnMut()) {
            self.buffer.ordered(stream, launch);
        }
    }

    /// [`GdnPrefillContext`] in a capture.
    #[derive(Debug)]
    pub struct CapturedPrefill<'a>(GraphMut<'a, u8>);

    impl Sealed for GdnPrefillContext {}
    impl GraphBuffers for GdnPrefillContext {
        type Captured<'a> = CapturedPrefill<'a>;
        type Views<'a> = ();

        fn check(&self, context: &Arc<CudaContext>) -> Result<()> {
            self.workspace.check(context)
        }

        fn captured<'a>(&'a mut self, stream: &CudaStream, site: Site) -> CapturedPrefill<'a> {
            CapturedPrefill(self.workspace.captured(stream, site))
        }

        fn views(&mut self) {}

        fn ordered(&mut self, stream: &CudaStream, launch: &mut dyn FnMut()) {
            self.workspace.ordered(stream, launch);
        }
    }

    impl CapturedPrefill<'_> {
        /// [`GdnPrefillContext::prefill`], captured on the stream of the capture.
        ///
        /// # Errors
        /// As there.
        pub fn prefill(
            &mut self,
            tensors: GdnTensors<'_>,
            cu_seqlens: &CapturedCuSeqlens<'_>,
            options: GdnOptions<'_>,
            stream: Stream<'_>,
        ) -> Result<()> {
            let offsets = cu_seqlens.buffer.read(&[cu_seqlens.host.offsets.len() as i64])?;
            let workspace = self.0.write(&[WORKSPACE as i64])?;
            let args = raw(&tensors, &options, offsets.raw(), workspace.raw());
            // SAFETY: as for the context's own: the graph owns the offsets and the workspace, and its launches follow one
            // another.
            unsafe { launch_runs(&args, cu_seqlens.host, stream) }
        }
    }

    /// GDN prefill on one stream: owns the workspace that the kernel writes, so that no two streams ever share one.
    #[derive(Debug)]
    pub struct GdnPrefillContext {
        stream: Arc<CudaStream>,
        workspace: CudaSlice<u8>,
    }

    impl GdnPrefillContext {
        /// A context for a stream.
        ///
        /// # Errors
        /// [`DeviceOutOfRange`](FlashInferError::DeviceOutOfRange), [`Cuda`](FlashInferError::Cuda) where there is no
        /// memory, or why there is no GPU.
        pub fn new(stream: &Arc<CudaStream>) -> Result<Self> {
            FlashInferRuntime::global()?.checked_device(device(stream.context()))?;
            let workspace = stream.alloc_zeros(WORKSPACE).map_err(driver("allocating the workspace"))?;
            Ok(Self { stream: Arc::clone(stream), workspace })
        }

        /// The stream that calls are queued on.
        pub fn stream(&self) -> &Arc<CudaStream> {
            &self.stream
        }

        /// [Prefill of the gated delta rule](crate::kernels::gdn::gdn_prefill), asynchronous on this context's stream.
        ///
        /// Sequences without tokens keep their state, or get zeros; the others are computed as if those were not there,
        /// with one launch for each stretch between them.
        ///
        /// # Errors
        /// As for [`gdn_prefill`](crate::kernels::gdn::gdn_prefill), and
        /// [`InvalidArgument`](FlashInferError::InvalidArgument) for a tensor of another stream.
        // Where it is called, the tensors are not moved.
        #[inline(always)]
        pub fn prefill(
            &mut self,
            tensors: GdnTensors<'_>,
            cu_seqlens: &DeviceCuSeqlens,
            options: GdnOptions<'_>,
        ) -> Result<()> {
            self.queue(&tensors, cu_seqlens, &options)
        }

        /// [`prefill`](Self::prefill), of tensors that stay borrowed until it is queued.
        fn queue(
            &mut self,
            tensors: &GdnTensors<'_>,
            cu_seqlens: &DeviceCuSeqlens,
            options: &GdnOptions<'_>,
        ) -> Result<()> {
            let length = cu_seqlens.host.offsets.len() as i64;
            let offsets = TensorRef::from_cudarc(&self.stream, &cu_seqlens.buffer, &[length])?;
            let workspace = TensorMut::from_cudarc(&self.stream, &mut self.workspace, &[WORKSPACE as i64])?;
            let args = raw(tensors, options, offsets.raw(), workspace.raw());
            // SAFETY: the buffer was filled from the host's offsets, run by run, or vouched for as such; tensors, options,
            // offsets and workspace are borrowed, with cudarc's guards, until everything is queued; and the workspace is
            // this stream's alone.
            unsafe { launch_runs(&args, &cu_seqlens.host, Stream::cudarc(&self.stream)) }
        }
    }
}

#[cfg(feature = "cudarc")]
pub use on_gpu::{CapturedCuSeqlens, CapturedPrefill, DeviceCuSeqlens, GdnPrefillContext};
