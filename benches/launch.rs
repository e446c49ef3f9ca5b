//! The kernels called from Rust, in one way per process; benches/c/caller.c is the same from C, and measures as is done
//! here. `cargo xtask bench` starts both, as `launch [--bench] ARM`.

use std::ffi::c_void;
use std::hint::black_box;
use std::process::ExitCode;
use std::sync::Arc;

use cudarc::driver::sys::CUdevice_attribute;
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DriverError};
use flashinfer_rs::kernels::gdn::{self, GdnOptions, GdnPrefill, GdnPrefillContext, GdnTensors};
use flashinfer_rs::kernels::norm::{GemmaRmsnorm, NormOptions, gemma_rmsnorm};
use flashinfer_rs::{
    CuSeqlens, DType, Device, DeviceCuSeqlens, FlashInferRuntime, GdnPrefillSm90Params, GemmaRmsNormParams,
    LaunchGraph, Prepared, RuntimeConfig, Stream, Tensor1DDesc, Tensor2DDesc, Tensor3DDesc, Tensor4DDesc, TensorMut,
    TensorRef, gdn_prefill_sm90, gdn_prefill_sm90_cudarc_with_options, gemma_rmsnorm_cudarc,
};
use half::bf16;

#[path = "support/arm.rs"]
mod arm;

use arm::{Launches, Result, Timing, Uniform, filled, zeros};

const GEMMA_BATCH: usize = 200;
const GDN_BATCH: usize = 50;
const Q_HEADS: i64 = 16;
const K_HEADS: i64 = 16;
const V_HEADS: i64 = 32;
const HEAD: i64 = 128;
const WORKSPACE: usize = 128 << 10;
const EPS: f64 = 1e-6;
/// Bounds on the launches of a captured graph.
const MOST_SETS: usize = 256;
const LEAST_NODES: usize = 16;

/// Every case once and small, so that kernels are loaded before anything is measured, or captured.
const WARM_UP: [&str; 6] =
    ["host gemma 1 4096", "host tracking", "series 10 1 4096", "gpu gemma 1 4096", "host gdn 64", "gpu gdn 64 1"];

/// A way to call the kernels; xtask/src/bench/plan.rs says what each is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Arm {
    Raw,
    Safe,
    FlatCudarc,
    Tracked,
    Tracking,
    Scope,
    Prepared,
    PreparedScope,
    EagerPdl,
    Graph,
    GraphPdl,
}

const ARMS: [(&str, Arm); 11] = [
    ("raw", Arm::Raw),
    ("safe", Arm::Safe),
    ("flat-cudarc", Arm::FlatCudarc),
    ("tracked", Arm::Tracked),
    ("tracking", Arm::Tracking),
    ("scope", Arm::Scope),
    ("prepared", Arm::Prepared),
    ("prepared-scope", Arm::PreparedScope),
    ("eager-pdl", Arm::EagerPdl),
    ("graph", Arm::Graph),
    ("graph-pdl", Arm::GraphPdl),
];

impl Arm {
    fn named(name: &str) -> Result<Self> {
        let known = ARMS.iter().find(|(known, _)| *known == name);
        known.map(|(_, arm)| *arm).ok_or_else(|| {
            let names: Vec<_> = ARMS.iter().map(|(name, _)| *name).collect();
            format!("`{name}` is no arm: expected one of {}", names.join(", ")).into()
        })
    }

    /// Whether cudarc orders the uses of buffers by events.
    fn tracks(self) -> bool {
        matches!(self, Self::Tracked | Self::Tracking)
    }

    /// Whether its graph has programmatic dependent launch; of an arm that captures one.
    fn graph(self) -> Option<bool> {
        match self {
            Self::Graph => Some(false),
            Self::GraphPdl => Some(true),
            _ => None,
        }
    }
}

fn main() -> ExitCode {
    arm::serve(Bench::start, Bench::answer)
}

// ---- memory ----

/// `out`, `input`, `weight`. A tuple, so that a graph can own it.
type Gemma = (CudaSlice<bf16>, CudaSlice<bf16>, CudaSlice<bf16>);

/// `output`, `output_state`, `q`, `k`, `v`, `alpha`, `beta`.
type Gdn = (
    CudaSlice<bf16>,
    CudaSlice<f32>,
    CudaSlice<bf16>,
    CudaSlice<bf16>,
    CudaSlice<bf16>,
    CudaSlice<f32>,
    CudaSlice<f32>,
);

/// Sequences of equal length.
#[derive(Clone, Copy)]
struct Batch {
    tokens: i64,
    sequences: i64,
}

impl Batch {
    fn cu_seqlens(self) -> Result<CuSeqlens> {
        let Self { tokens, sequences } = self;
        if tokens % sequences != 0 {
            return Err(format!("{tokens} tokens do not make {sequences} sequences of equal length").into());
        }
        Ok(CuSeqlens::from_lengths(&vec![tokens / sequences; sequences as usize])?)
    }

    fn heads(self, heads: i64) -> [i64; 3] {
        [self.tokens, heads, HEAD]
    }

    fn gates(self) -> [i64; 2] {
        [self.tokens, V_HEADS]
    }

    fn states(self) -> [i64; 4] {
        [self.sequences, V_HEADS, HEAD, HEAD]
    }
}

/// Random numbers on the GPU that buffers are filled from: making as many on the host would take longer than measuring.
struct Noise {
    /// In (-0.15, 0.15), which makes heads of 128 about unit vectors.
    heads: CudaSlice<bf16>,
    alpha: CudaSlice<f32>,
    beta: CudaSlice<f32>,
}

impl Noise {
    const BYTES: usize = 16 << 20;

    fn new(stream: &Arc<CudaStream>) -> Result<Self, DriverError> {
        let mut random = Uniform::new();
        let mut uniform = || random.next();
        let heads: Vec<_> = (0..Self::BYTES / 2).map(|_| bf16::from_f32(0.15 * (2.0 * uniform() - 1.0))).collect();
        let alpha: Vec<_> = (0..Self::BYTES / 4).map(|_| 0.9 + 0.1 * uniform()).collect();
        let beta: Vec<_> = (0..Self::BYTES / 4).map(|_| uniform()).collect();
        Ok(Self {
            heads: stream.clone_htod(&heads)?,
            alpha: stream.clone_htod(&alpha)?,
            beta: stream.clone_htod(&beta)?,
        })
    }
}

/// For descriptors. The guard is of no use: nothing is tracked where these are used.
fn address<T>(stream: &CudaStream, buffer: &impl DevicePtr<T>) -> *const c_void {
    let (address, _guard) = buffer.device_ptr(stream);
    address as *const c_void
}

// ---- measuring ----

struct Bench {
    arm: Arm,
    runtime: &'static FlashInferRuntime,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    noise: Noise,
}

impl Bench {
    fn start(arguments: &[String]) -> Result<Self> {
        let [name] = arguments else { return Err("expected: launch ARM".into()) };
        let arm = Arm::named(name)?;
        let runtime = FlashInferRuntime::initialize(RuntimeConfig::default())?;
        // Before cudarc, which panics without a driver.
        if runtime.device_count()? == 0 {
            return Err("the driver lists no GPU".into());
        }
        let context = CudaContext::new(0)?;
        if !arm.tracks() {
            // SAFETY: here every buffer is made, used and dropped on one stream.
            unsafe { context.disable_event_tracking() };
        }
        let stream = context.new_stream()?;
        let noise = Noise::new(&stream)?;
        let bench = Self { arm, runtime, context, stream, noise };
        let hopper = gdn::is_supported(Device::Cuda(0))?;
        for request in WARM_UP.iter().filter(|request| hopper || !request.contains("gdn")) {
            bench.answer(request)?;
        }
        Ok(bench)
    }

    /// Nothing where this arm does not have the case.
    fn answer(&self, request: &str) -> Result<Option<f64>> {
        let value = self.case(request)?;
        // Gives the memory of the buffers, which were dropped, back to the other arms.
        self.stream.synchronize()?;
        Ok(value)
    }

    fn case(&self, request: &str) -> Result<Option<f64>> {
        let (words, numbers) = arm::parse(request);
        match (&words[..], numbers.as_deref()) {
            (["host", "gemma"], Some(&[rows, cols])) => self.host_gemma([rows, cols]),
            (["host", "gdn"], Some(&[tokens])) => self.host_gdn(Batch { tokens, sequences: 1 }),
            (["host", "tracking"], Some([])) => self.host_tracking(),
            (["series"], Some(&[count, rows, cols])) => self.series(count as usize, [rows, cols]),
            (["gpu", "gemma"], Some(&[rows, cols])) => self.gpu_gemma([rows, cols]),
            (["gpu", "gdn"], Some(&[tokens, sequences])) => self.gpu_gdn(Batch { tokens, sequences }),
            // The limits, which C measures.
            (["host", "empty"], Some([])) | (["gpu", "copy"], Some([_])) => Ok(None),
            _ => Err(format!("`{request}` is no request").into()),
        }
    }

    fn time(&self, timing: Timing, launches: &mut Launches<'_>) -> Result<f64> {
        arm::time(&self.stream, timing, launches)
    }

    /// How many sets of buffers of these sizes are larger than three times the L2 cache together, as far as
    /// [`MOST_SETS`] go.
    fn rotation(&self, bytes: &[usize]) -> Result<usize> {
        let l2 = self.context.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?;
        let set: usize = bytes.iter().map(|bytes| bytes.next_multiple_of(256)).sum();
        Ok((3 * l2 as usize / set + 1).min(MOST_SETS))
    }

    // ---- the cases ----

    fn host_gemma(&self, shape: [i64; 2]) -> Result<Option<f64>> {
        let ns = self.eager_gemma(shape, Timing::host(GEMMA_BATCH))?;
        Ok(ns.map(|ns| ns / GEMMA_BATCH as f64))
    }

    /// Microseconds from the first launch to the end of the last.
    fn series(&self, count: usize, shape: [i64; 2]) -> Result<Option<f64>> {
        let timing = Timing { launches: count, until_done: true };
        let ns = match self.arm.graph() {
            Some(pdl) => {
                let mut graph = self.gemma_graph(vec![self.gemma(shape)?], shape, count, pdl)?;
                Some(self.time(timing, &mut |_| graph.launch())?)
            }
            None => self.eager_gemma(shape, timing)?,
        };
        Ok(ns.map(|ns| ns / 1e3))
    }

    fn gpu_gemma(&self, shape: [i64; 2]) -> Result<Option<f64>> {
        let Some(pdl) = self.arm.graph() else { return Ok(None) };
        let mut sets = vec![self.gemma(shape)?];
        let (out, input, weight) = &sets[0];
        for _ in 1..self.rotation(&[out.num_bytes(), input.num_bytes(), weight.num_bytes()])? {
            sets.push(self.gemma(shape)?);
        }
        let nodes = nodes(sets.len());
        let graph = self.gemma_graph(sets, shape, nodes, pdl)?;
        arm::time_gpu(&self.context, &self.stream, graph, nodes).map(Some)
    }

    fn gpu_gdn(&self, batch: Batch) -> Result<Option<f64>> {
        // This kernel has no PDL.
        let Some(false) = self.arm.graph() else { return Ok(None) };
        let mut sets = vec![self.gdn(batch)?];
        let (output, state, q, k, v, alpha, beta) = &sets[0];
        let bytes = [output.num_bytes(), q.num_bytes(), k.num_bytes(), v.num_bytes()];
        let gates = [state.num_bytes(), alpha.num_bytes(), beta.num_bytes()];
        for _ in 1..self.rotation(&[&bytes[..], &gates].concat())? {
            sets.push(self.gdn(batch)?);
        }
        let nodes = nodes(sets.len());
        arm::time_gpu(&self.context, &self.stream, self.gdn_graph(sets, batch, nodes)?, nodes).map(Some)
    }

    /// What cudarc's tracking does for the buffers of a call, in the order of [`safe_gemma`], and nothing else.
    fn host_tracking(&self) -> Result<Option<f64>> {
        if self.arm != Arm::Tracking {
            return Ok(None);
        }
        let stream = &*self.stream;
        let (out, input, weight) = &mut self.gemma([1, 4096])?;
        let ns = self.time(Timing::host(GEMMA_BATCH), &mut |launches| {
            for _ in 0..launches {
                // Each holds its guard until the end of the turn.
                let _out = black_box(&mut *out).device_ptr_mut(stream);
                let _input = black_box(&*input).device_ptr(stream);
                let _weight = black_box(&*weight).device_ptr(stream);
            }
            Ok(())
        })?;
        Ok(Some(ns / GEMMA_BATCH as f64))
    }

    // ---- gemma_rmsnorm ----

    fn gemma(&self, [rows, cols]: [i64; 2]) -> Result<Gemma, DriverError> {
        let (stream, heads) = (&self.stream, &self.noise.heads);
        Ok((zeros(stream, &[rows, cols])?, filled(stream, heads, &[rows, cols])?, filled(stream, heads, &[cols])?))
    }

    /// Times this arm's way of calling it.
    fn eager_gemma(&self, shape: [i64; 2], timing: Timing) -> Result<Option<f64>> {
        let (runtime, stream) = (self.runtime, &*self.stream);
        let set = &mut self.gemma(shape)?;
        let options = NormOptions::default().with_eps(EPS).with_pdl(self.arm == Arm::EagerPdl);
        let time = |launches: &mut Launches<'_>| self.time(timing, launches).map(Some);
        match self.arm {
            Arm::Raw => {
                let params = gemma_params(stream, set, shape);
                let call = || {
                    // SAFETY: the descriptors are those of the set's buffers, which live until the GPU is done, and of a
                    // stream that lives.
                    unsafe { flashinfer_rs::gemma_rmsnorm(black_box(&params)) }
                };
                time(&mut |launches| (0..launches).try_for_each(|_| call()))
            }
            Arm::Safe | Arm::Tracked | Arm::EagerPdl => {
                let on = Stream::cudarc(stream);
                time(&mut |launches| (0..launches).try_for_each(|_| safe_gemma(stream, set, shape, &options, on)))
            }
            Arm::Scope => time(&mut |launches| {
                runtime.on(stream, |on| (0..launches).try_for_each(|_| safe_gemma(stream, set, shape, &options, on)))?
            }),
            Arm::FlatCudarc => {
                let [rows, cols] = shape.map(|size| size as usize);
                time(&mut |launches| {
                    (0..launches).try_for_each(|_| {
                        let (out, input, weight) = black_box(&mut *set);
                        gemma_rmsnorm_cudarc(stream, input, weight, out, rows, cols, DType::BF16, EPS)
                    })
                })
            }
            Arm::Prepared | Arm::PreparedScope => {
                let ([_, cols], (out, input, weight)) = (shape, set);
                let mut out = TensorMut::from_cudarc(stream, out, &shape)?;
                let input = TensorRef::from_cudarc(stream, input, &shape)?;
                let weight = TensorRef::from_cudarc(stream, weight, &[cols])?;
                let prepared = Prepared::<GemmaRmsnorm>::new(&out, &input, &weight, &options)?;
                let mut call = |on: Stream<'_>| {
                    black_box(&prepared).launch(black_box(&mut out), black_box(&input), black_box(&weight), on)
                };
                self.time_prepared(timing, &mut call).map(Some)
            }
            Arm::Tracking | Arm::Graph | Arm::GraphPdl => Ok(None),
        }
    }

    #[inline(always)]
    fn time_prepared(
        &self,
        timing: Timing,
        call: &mut impl FnMut(Stream<'_>) -> flashinfer_rs::Result<()>,
    ) -> Result<f64> {
        let (runtime, stream) = (self.runtime, &*self.stream);
        let mut all = |launches, on: Stream<'_>| (0..launches).try_for_each(|_| call(on));
        match self.arm {
            Arm::PreparedScope => self.time(timing, &mut |launches| runtime.on(stream, |on| all(launches, on))?),
            _ => self.time(timing, &mut |launches| all(launches, Stream::cudarc(stream))),
        }
    }

    /// A graph of so many launches, in turn on each of the sets, which was launched once.
    fn gemma_graph(
        &self,
        mut sets: Vec<Gemma>,
        [rows, cols]: [i64; 2],
        launches: usize,
        pdl: bool,
    ) -> Result<LaunchGraph<Vec<Gemma>>> {
        let options = NormOptions::default().with_eps(EPS);
        // The kernel must have been loaded before it is captured.
        safe_gemma(&self.stream, &mut sets[0], [rows, cols], &options, Stream::cudarc(&self.stream))?;
        self.stream.synchronize()?;
        let mut graph = LaunchGraph::new(&self.stream, sets)?.with_pdl(pdl);
        graph.capture(|on, mut sets| {
            let count = sets.len();
            (0..launches).try_for_each(|i| {
                let (out, input, weight) = &mut sets[i % count];
                let mut out = out.write(&[rows, cols])?;
                gemma_rmsnorm(&mut out, &input.read(&[rows, cols])?, &weight.read(&[cols])?, &options, on)
            })
        })?;
        graph.launch()?;
        self.stream.synchronize()?;
        Ok(graph)
    }

    // ---- gdn_prefill ----

    fn gdn(&self, batch: Batch) -> Result<Gdn, DriverError> {
        let (stream, Noise { heads, alpha, beta }) = (&self.stream, &self.noise);
        Ok((
            zeros(stream, &batch.heads(V_HEADS))?,
            zeros(stream, &batch.states())?,
            filled(stream, heads, &batch.heads(Q_HEADS))?,
            filled(stream, heads, &batch.heads(K_HEADS))?,
            filled(stream, heads, &batch.heads(V_HEADS))?,
            filled(stream, alpha, &batch.gates())?,
            filled(stream, beta, &batch.gates())?,
        ))
    }

    fn host_gdn(&self, batch: Batch) -> Result<Option<f64>> {
        let (runtime, stream) = (self.runtime, &*self.stream);
        let set = &mut self.gdn(batch)?;
        let cu_seqlens = batch.cu_seqlens()?;
        let offsets = &self.stream.clone_htod(cu_seqlens.offsets())?;
        let workspace = &mut self.stream.alloc_zeros::<u8>(WORKSPACE)?;
        let time = |launches: &mut Launches<'_>| self.time(Timing::host(GDN_BATCH), launches);
        let ns = match self.arm {
            Arm::Raw => {
                let params = gdn_params(stream, set, offsets, workspace, batch);
                let call = || {
                    // SAFETY: the descriptors are those of buffers that live until the GPU is done, and of a stream that
                    // lives; the offsets are those of `cu_seqlens`, whose sequences are not empty, and the workspace is
                    // used on this stream alone.
                    unsafe { gdn_prefill_sm90(black_box(&params)) }
                };
                time(&mut |launches| (0..launches).try_for_each(|_| call()))?
            }
            Arm::Safe | Arm::Tracked | Arm::Scope => {
                let mut context = GdnPrefillContext::new(&self.stream)?;
                let cu_seqlens = cu_seqlens.to_device(&self.stream)?;
                time(&mut |launches| {
                    let mut all =
                        || (0..launches).try_for_each(|_| safe_gdn(stream, &mut context, set, &cu_seqlens, batch));
                    if self.arm == Arm::Scope { runtime.on(stream, |_| all())? } else { all() }
                })?
            }
            Arm::FlatCudarc => {
                time(&mut |launches| (0..launches).try_for_each(|_| flat_gdn(stream, set, offsets, workspace, batch)))?
            }
            Arm::Prepared | Arm::PreparedScope => {
                let offsets = &TensorRef::from_cudarc(stream, offsets, &[batch.sequences + 1])?;
                let workspace = &mut TensorMut::from_cudarc(stream, workspace, &[WORKSPACE as i64])?;
                let (mut tensors, options) = gdn_tensors(stream, set, batch)?;
                let prepared = Prepared::<GdnPrefill>::new(&tensors, offsets, workspace, &options)?;
                let mut call = |on: Stream<'_>| {
                    let (prepared, tensors) = (black_box(&prepared), black_box(&mut tensors));
                    // SAFETY: as for `raw`, of the offsets and the workspace.
                    unsafe { prepared.launch(tensors, offsets, workspace, &options, on) }
                };
                self.time_prepared(Timing::host(GDN_BATCH), &mut call)?
            }
            // This kernel has no PDL.
            Arm::EagerPdl | Arm::Tracking | Arm::Graph | Arm::GraphPdl => return Ok(None),
        };
        Ok(Some(ns / GDN_BATCH as f64))
    }

    /// As [`gemma_graph`](Self::gemma_graph), with one workspace for all.
    fn gdn_graph(
        &self,
        mut sets: Vec<Gdn>,
        batch: Batch,
        launches: usize,
    ) -> Result<LaunchGraph<(Vec<Gdn>, GdnPrefillContext, DeviceCuSeqlens)>> {
        let mut context = GdnPrefillContext::new(&self.stream)?;
        let cu_seqlens = batch.cu_seqlens()?.to_device(&self.stream)?;
        safe_gdn(&self.stream, &mut context, &mut sets[0], &cu_seqlens, batch)?;
        self.stream.synchronize()?;
        let mut graph = LaunchGraph::new(&self.stream, (sets, context, cu_seqlens))?.with_pdl(false);
        graph.capture(|on, (mut sets, mut context, cu_seqlens)| {
            let count = sets.len();
            (0..launches).try_for_each(|i| {
                let (output, output_state, q, k, v, alpha, beta) = &mut sets[i % count];
                let mut tensors = GdnTensors {
                    output: output.write(&batch.heads(V_HEADS))?,
                    output_state: output_state.write(&batch.states())?,
                    q: q.read(&batch.heads(Q_HEADS))?,
                    k: k.read(&batch.heads(K_HEADS))?,
                    v: v.read(&batch.heads(V_HEADS))?,
                };
                let (alpha, beta) = (alpha.read(&batch.gates())?, beta.read(&batch.gates())?);
                let options = GdnOptions::default().with_alpha(alpha).with_beta(beta);
                context.prefill(&mut tensors, &cu_seqlens, &options, on)
            })
        })?;
        graph.launch()?;
        self.stream.synchronize()?;
        Ok(graph)
    }
}

/// Each set equally often, and enough of them.
fn nodes(sets: usize) -> usize {
    sets * LEAST_NODES.div_ceil(sets)
}

// ---- single calls, as a user writes them; `black_box` keeps the loop around one from doing a part of it beforehand ----

#[inline]
fn safe_gemma(
    stream: &CudaStream,
    set: &mut Gemma,
    shape: [i64; 2],
    options: &NormOptions,
    on: Stream<'_>,
) -> flashinfer_rs::Result<()> {
    let ((out, input, weight), [rows, cols]) = (black_box(set), shape);
    gemma_rmsnorm(
        &mut TensorMut::from_cudarc(stream, out, &[rows, cols])?,
        &TensorRef::from_cudarc(stream, input, &[rows, cols])?,
        &TensorRef::from_cudarc(stream, weight, &[cols])?,
        options,
        on,
    )
}

fn gemma_params(stream: &CudaStream, (out, input, weight): &Gemma, [rows, cols]: [i64; 2]) -> GemmaRmsNormParams {
    let (dtype, device_id) = (DType::BF16, 0);
    let matrix = |buffer| {
        let ptr = address(stream, buffer);
        Tensor2DDesc { ptr, rows, cols, stride_row: cols, stride_col: 1, dtype, device_id }
    };
    let weight = Tensor1DDesc { ptr: address(stream, weight), len: cols, stride: 1, dtype, device_id };
    GemmaRmsNormParams::new(matrix(input), weight, matrix(out), EPS, stream.cu_stream().cast())
}

#[inline]
fn safe_gdn(
    stream: &CudaStream,
    context: &mut GdnPrefillContext,
    set: &mut Gdn,
    cu_seqlens: &DeviceCuSeqlens,
    batch: Batch,
) -> flashinfer_rs::Result<()> {
    let (mut tensors, options) = gdn_tensors(stream, set, batch)?;
    context.prefill(&mut tensors, cu_seqlens, &options)
}

#[inline(always)]
fn gdn_tensors<'a>(
    stream: &'a CudaStream,
    set: &'a mut Gdn,
    batch: Batch,
) -> flashinfer_rs::Result<(GdnTensors<'a>, GdnOptions<'a>)> {
    let (output, output_state, q, k, v, alpha, beta) = black_box(set);
    let tensors = GdnTensors {
        output: TensorMut::from_cudarc(stream, output, &batch.heads(V_HEADS))?,
        output_state: TensorMut::from_cudarc(stream, output_state, &batch.states())?,
        q: TensorRef::from_cudarc(stream, q, &batch.heads(Q_HEADS))?,
        k: TensorRef::from_cudarc(stream, k, &batch.heads(K_HEADS))?,
        v: TensorRef::from_cudarc(stream, v, &batch.heads(V_HEADS))?,
    };
    let alpha = TensorRef::from_cudarc(stream, alpha, &batch.gates())?;
    let options = GdnOptions::default().with_alpha(alpha);
    Ok((tensors, options.with_beta(TensorRef::from_cudarc(stream, beta, &batch.gates())?)))
}

fn flat_gdn(
    stream: &CudaStream,
    set: &mut Gdn,
    offsets: &CudaSlice<i64>,
    workspace: &mut CudaSlice<u8>,
    batch: Batch,
) -> flashinfer_rs::Result<()> {
    let (output, output_state, q, k, v, alpha, beta) = black_box(set);
    // SAFETY: the offsets were made of `batch`, whose sequences are not empty; the workspace is used on this stream alone.
    unsafe {
        gdn_prefill_sm90_cudarc_with_options(
            stream,
            output,
            output_state,
            q,
            k,
            v,
            offsets,
            workspace,
            batch.tokens as usize,
            Q_HEADS as usize,
            K_HEADS as usize,
            V_HEADS as usize,
            HEAD as usize,
            DType::BF16,
            None,
            Some(alpha),
            Some(beta),
            0.0,
        )
    }
}

fn gdn_params(
    stream: &CudaStream,
    (output, output_state, q, k, v, alpha, beta): &Gdn,
    offsets: &CudaSlice<i64>,
    workspace: &CudaSlice<u8>,
    batch: Batch,
) -> GdnPrefillSm90Params {
    let device_id = 0;
    let vector = |ptr, len, dtype| Tensor1DDesc { ptr, len, stride: 1, dtype, device_id };
    let gate = |buffer| {
        let (ptr, [rows, cols]) = (address(stream, buffer), batch.gates());
        Tensor2DDesc { ptr, rows, cols, stride_row: cols, stride_col: 1, dtype: DType::F32, device_id }
    };
    let heads = |buffer, heads| {
        let (ptr, [dim0, dim1, dim2]) = (address(stream, buffer), batch.heads(heads));
        let (stride0, stride1, stride2) = (dim1 * dim2, dim2, 1);
        Tensor3DDesc { ptr, dim0, dim1, dim2, stride0, stride1, stride2, dtype: DType::BF16, device_id }
    };
    let [dim0, dim1, dim2, dim3] = batch.states();
    let state = Tensor4DDesc {
        ptr: address(stream, output_state),
        dim0,
        dim1,
        dim2,
        dim3,
        stride0: dim1 * dim2 * dim3,
        stride1: dim2 * dim3,
        stride2: dim3,
        stride3: 1,
        dtype: DType::F32,
        device_id,
    };
    let offsets = vector(address(stream, offsets), batch.sequences + 1, DType::I64);
    let workspace = vector(address(stream, workspace), WORKSPACE as i64, DType::U8);
    let (q, k, v) = (heads(q, Q_HEADS), heads(k, K_HEADS), heads(v, V_HEADS));
    let stream = stream.cu_stream().cast();
    GdnPrefillSm90Params::new(heads(output, V_HEADS), state, q, k, v, offsets, workspace, stream)
        .with_alpha(gate(alpha))
        .with_beta(gate(beta))
}
