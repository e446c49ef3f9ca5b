//! `gdn_prefill_sm90.so`: prefill of the gated delta rule, for Hopper GPUs. Contract: `csrc/gdn_prefill_launcher.cu` and
//! `include/flashinfer/flat/` of FlashInfer 0.6.3.

use super::Kernel;
use super::prepared::{Argument, Prepared, Slot};
use crate::error::Result;
use crate::module::{Arg, Function};
use crate::runtime::FlashInferRuntime;
use crate::stream::Stream;
use crate::tensor::{DType, Device, Raw, TensorMut, TensorRef};

const LIBRARY: &str = "gdn_prefill_sm90.so";

static GDN_PREFILL: Kernel = Kernel::new(LIBRARY, "gdn_prefill", |capability| capability == HOPPER);

/// The one compute capability that it is compiled for.
const HOPPER: (i32, i32) = (9, 0);

pub(super) static KERNELS: &[&Kernel] = &[&GDN_PREFILL];

/// The one head size that release 0.6.3 computes right: with 64 and 96 the final state is wrong, 256 is refused.
pub const HEAD_SIZE: i64 = 128;

/// A TMA descriptor for every multiprocessor, which the kernel edits on partial tiles.
const WORKSPACE_PER_MULTIPROCESSOR: i64 = 128;

/// What TMA asks of its descriptors.
const WORKSPACE_ALIGNMENT: usize = 64;

/// Whether the kernel runs on a device: on the host always, on a GPU of compute capability 9.0.
///
/// # Errors
/// [`DeviceOutOfRange`](crate::FlashInferError::DeviceOutOfRange), or why there is no GPU.
pub fn is_supported(device: Device) -> Result<bool> {
    FlashInferRuntime::global()?.supports(|capability| GDN_PREFILL.supports(capability), device)
}

/// The arguments of [`gdn_prefill`], with `T` tokens of `N` sequences one after the other, `D` = [`HEAD_SIZE`], and
/// `H = max(query heads, value heads)`.
#[derive(Debug)]
pub struct GdnPrefill<'a> {
    /// `[T, H, D]`, as `q`.
    pub output: TensorMut<'a>,
    /// `[N, H, D, D]` F32, value dimension before key dimension: the states after the last token.
    pub output_state: TensorMut<'a>,
    /// `[T, query heads, D]` F16 or BF16.
    pub q: TensorRef<'a>,
    /// `[T, key heads, D]`, as `q`.
    pub k: TensorRef<'a>,
    /// `[T, value heads, D]`, as `q`.
    pub v: TensorRef<'a>,
    /// `[N + 1]` I64: where each sequence starts, and `T`. Strictly increasing from 0.
    pub cu_seqlens: TensorRef<'a>,
    /// As `output_state`: the states before the first token; zeros without.
    pub input_state: Option<TensorRef<'a>>,
    /// `[T, H]` F32: the decay, linear (not its logarithm); 1 without.
    pub alpha: Option<TensorRef<'a>>,
    /// `[T, H]` F32: how much of the correction is written; 1 without.
    pub beta: Option<TensorRef<'a>>,
    /// Multiplies the output; 0.0 means 1/√D.
    pub scale: f64,
    /// U8, at least 128 bytes for every multiprocessor of the GPU; no other stream may use it at the same time.
    pub workspace: TensorMut<'a>,
}

/// Prefill of the gated delta rule. For every sequence and head, token by token:
/// `S ← α S`, `S ← S + β (v − S k) kᵀ`, `o = scale · S q`.
///
/// Heads: either key heads equal value heads and query heads are a multiple of them (GQA), or query heads equal key
/// heads and value heads are a multiple of them (GVA). All tensors are contiguous; `q`, `k`, `v` and `output` aligned
/// to 16 bytes, `workspace` to 64.
///
/// On a GPU the call is asynchronous on `stream` and needs compute capability 9.0; tensors on the host are computed by
/// the [reference](super::reference), at once. Every GPU of the process may be used, from any thread.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for whatever breaks the contract above and can be seen
/// without reading device memory; [`DeviceOutOfRange`](crate::FlashInferError::DeviceOutOfRange); what loading
/// `gdn_prefill_sm90.so` answers; and [`TvmFfiCall`](crate::FlashInferError::TvmFfiCall) with what the kernel raised, on
/// an unsupported GPU for example.
///
/// # Safety
/// `cu_seqlens`, if it is on a GPU, must start with 0, increase strictly, and end with `T`, when the kernel runs: its
/// contents steer the kernel's addressing, and a sequence without tokens hangs the GPU. The workspace must not be in
/// use by another stream.
// Where it is called, the tensors are not moved.
#[inline(always)]
pub unsafe fn gdn_prefill(args: GdnPrefill<'_>, stream: Stream<'_>) -> Result<()> {
    let raw = args.raw();
    // SAFETY: the caller's promise; `args` keeps the memory borrowed until the kernel is queued.
    unsafe { launch(&raw, stream) }
}

impl GdnPrefill<'_> {
    #[inline]
    fn raw(&self) -> RawArgs<'_> {
        RawArgs {
            output: self.output.raw(),
            output_state: self.output_state.raw(),
            q: self.q.raw(),
            k: self.k.raw(),
            v: self.v.raw(),
            cu_seqlens: self.cu_seqlens.raw(),
            input_state: self.input_state.as_ref().map(TensorRef::raw),
            alpha: self.alpha.as_ref().map(TensorRef::raw),
            beta: self.beta.as_ref().map(TensorRef::raw),
            scale: self.scale,
            workspace: self.workspace.raw(),
        }
    }
}

/// [`GdnPrefill`] without the borrows, to be cut into parts.
#[derive(Clone, Copy)]
pub(super) struct RawArgs<'a> {
    pub(super) output: &'a Raw,
    pub(super) output_state: &'a Raw,
    pub(super) q: &'a Raw,
    pub(super) k: &'a Raw,
    pub(super) v: &'a Raw,
    pub(super) cu_seqlens: &'a Raw,
    pub(super) input_state: Option<&'a Raw>,
    pub(super) alpha: Option<&'a Raw>,
    pub(super) beta: Option<&'a Raw>,
    pub(super) scale: f64,
    pub(super) workspace: &'a Raw,
}

/// # Safety
/// As for [`gdn_prefill`], and the tensors' memory must stay valid until the kernel has run.
unsafe fn launch(args: &RawArgs<'_>, stream: Stream<'_>) -> Result<()> {
    check(args, stream, 1)?;
    // SAFETY: the caller's promise.
    unsafe { run(args, stream) }
}

/// What was checked before, now called.
///
/// # Safety
/// As for [`launch`]; [`check`] must have found nothing, here or in a whole that these arguments are a part of.
pub(super) unsafe fn run(args: &RawArgs<'_>, stream: Stream<'_>) -> Result<()> {
    let device = args.q.device();
    let _stream = FlashInferRuntime::global()?.queue(device, stream)?;
    args.check_workspace()?;
    let function = GDN_PREFILL.on(device)?;
    let (output, output_state, workspace) = (args.output.pack(), args.output_state.pack(), args.workspace.pack());
    let (q, k, v, cu_seqlens) = (args.q.pack(), args.k.pack(), args.v.pack(), args.cu_seqlens.pack());
    let input_state = args.input_state.map(Raw::pack);
    let alpha = args.alpha.map(Raw::pack);
    let beta = args.beta.map(Raw::pack);
    let optional = |tensor| Option::map_or(tensor, Arg::NONE, Arg::tensor);
    let packed = [
        Arg::tensor(&output),
        Arg::tensor(&output_state),
        Arg::tensor(&q),
        Arg::tensor(&k),
        Arg::tensor(&v),
        Arg::tensor(&cu_seqlens),
        optional(input_state.as_ref()),
        optional(alpha.as_ref()),
        optional(beta.as_ref()),
        Arg::float(args.scale),
        Arg::tensor(&workspace),
    ];
    // SAFETY: shapes, types, devices and sizes keep the kernel's contract, checked above; the contents of cu_seqlens
    // are the caller's promise, the tensors' memory and the stream were vouched for by whoever made them.
    unsafe { call(function, device, args.variant(), &packed) }
}

/// Calls the kernel with arguments that were checked, on this thread's stream.
///
/// # Safety
/// As for [`Function::call`]; `variant` must be that of the arguments, and the device one that exists.
unsafe fn call(function: &Function, device: Device, variant: u32, args: &[Arg<'_>]) -> Result<()> {
    let runtime = FlashInferRuntime::global()?;
    // SAFETY: the caller's promise.
    let call = || unsafe { function.launch(args) }.map_err(|error| runtime.diagnosed(error, device));
    let Device::Cuda(id) = device else { return call() };
    let cudart = runtime.cudart()?;
    // CUTLASS asks for the last error after the launch, whoever made it.
    cudart.forget_stale_error();
    // Upstream asks the thread's current device, not the tensors'. Where there is one alone, it is that.
    let _current = if runtime.has_one_device() { None } else { Some(cudart.set_current(id as i32)?) };
    per_device::call(runtime, id as i32, variant, call)
}

/// [`gdn_prefill`], packed once.
impl<'a> Prepared<'a> {
    /// [`gdn_prefill`], to be launched many times. Replaceable: every tensor, by its name in [`GdnPrefill`].
    ///
    /// # Errors
    /// As there.
    ///
    /// # Safety
    /// As there, at every launch: also of a `cu_seqlens` or `workspace` that replaces the first.
    pub unsafe fn gdn_prefill(args: GdnPrefill<'a>) -> Result<Self> {
        let raw = args.raw();
        let (device, variant) = (raw.q.device(), raw.variant());
        let stream = raw.all().find_map(Raw::stream).map_or(Stream::NULL, Stream::compared);
        check(&raw, stream, 1)?;
        FlashInferRuntime::global()?.checked_device(device)?;
        raw.check_workspace()?;
        let (scale, workspace) = (Slot::Number(Arg::float(args.scale)), *raw.workspace);
        let required = [
            Argument::written("output", args.output),
            Argument::written("output_state", args.output_state),
            Argument::read("q", args.q),
            Argument::read("k", args.k),
            Argument::read("v", args.v),
            Argument::read("cu_seqlens", args.cu_seqlens),
        ];
        let optional = [("input_state", args.input_state), ("alpha", args.alpha), ("beta", args.beta)];
        let mut tensors = Vec::from(required);
        let mut slots: Vec<_> = tensors.iter().enumerate().map(|(i, tensor)| Slot::Tensor(i, *tensor.raw())).collect();
        for (name, tensor) in optional {
            slots.push(match &tensor {
                Some(tensor) => Slot::Tensor(tensors.len(), *tensor.raw()),
                None => Slot::Number(Arg::NONE),
            });
            tensors.extend(tensor.map(|tensor| Argument::read(name, tensor)));
        }
        slots.extend([scale, Slot::Tensor(tensors.len(), workspace)]);
        tensors.push(Argument::written("workspace", args.workspace).aligned(WORKSPACE_ALIGNMENT));
        Prepared::new(&GDN_PREFILL, device, call, variant, tensors, vec![slots])
    }
}

impl RawArgs<'_> {
    /// The workspace's size, which depends on the GPU; the device must exist.
    fn check_workspace(&self) -> Result<()> {
        let Device::Cuda(id) = self.q.device() else { return Ok(()) };
        let multiprocessors = FlashInferRuntime::global()?.multiprocessors(id as i32)?;
        let (needed, found) = (i64::from(multiprocessors) * WORKSPACE_PER_MULTIPROCESSOR, self.workspace.numel());
        if found >= needed {
            return Ok(());
        }
        let found = format_args!("{found} bytes");
        Err(GDN_PREFILL.invalid("workspace", found, format!("{needed} bytes or more")))
    }

    fn all(&self) -> impl Iterator<Item = &Raw> {
        let required = [self.output, self.output_state, self.q, self.k, self.v, self.cu_seqlens, self.workspace];
        required.into_iter().chain([self.input_state, self.alpha, self.beta].into_iter().flatten())
    }

    /// Which of upstream's 32 kernels the arguments choose.
    fn variant(&self) -> u32 {
        let switches = [
            self.q.dtype() == DType::BF16,
            self.q.shape()[1] < self.v.shape()[1],
            self.beta.is_some(),
            self.alpha.is_some(),
            self.input_state.is_some(),
        ];
        switches.iter().fold(0, |bits, on| bits << 1 | u32::from(*on))
    }
}

/// Release 0.6.3 raises a kernel's shared-memory limit once per process, behind a `static bool initialized` for each of its
/// kernels, but the limit belongs to the device: on a second GPU it fails with `run failed`. So the first call of a kernel
/// on a device is made alone, with those flags cleared; the kernel then raises the limit there too.
mod per_device {
    use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
    use std::sync::{OnceLock, PoisonError, RwLock};

    use super::LIBRARY;
    use crate::error::Result;
    use crate::runtime::FlashInferRuntime;

    /// The end of the flags' mangled names.
    const FLAG: &str = "11initialized";

    /// For every device, a bit for each kernel that ran there.
    static READY: [AtomicU32; 64] = [const { AtomicU32::new(0) }; 64];
    /// A bit for each kernel that ran on every device, after which nobody clears its flag again.
    static EVERYWHERE: AtomicU32 = AtomicU32::new(0);
    /// Held shared by calls until their kernel ran on every device, and alone by its first call on each: that one must find
    /// its flag cleared, which any other call of the kernel would set.
    static GATE: RwLock<()> = RwLock::new(());

    pub(super) fn call(
        runtime: &'static FlashInferRuntime,
        device: i32,
        variant: u32,
        call: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let bit = 1 << variant;
        if EVERYWHERE.load(Ordering::Acquire) & bit != 0 {
            return call();
        }
        let ready = READY.get(device as usize);
        if ready.is_some_and(|ready| ready.load(Ordering::Acquire) & bit != 0) {
            let _shared = GATE.read().unwrap_or_else(PoisonError::into_inner);
            return call();
        }
        let _alone = GATE.write().unwrap_or_else(PoisonError::into_inner);
        for flag in flags()? {
            flag.store(0, Ordering::Relaxed);
        }
        call()?;
        if let Some(ready) = ready {
            ready.fetch_or(bit, Ordering::Release);
        }
        let devices = READY.get(..runtime.device_count()? as usize);
        if devices.is_some_and(|devices| devices.iter().all(|ready| ready.load(Ordering::Acquire) & bit != 0)) {
            EVERYWHERE.fetch_or(bit, Ordering::Release);
        }
        Ok(())
    }

    /// The flags. None in a release that has no such fault.
    fn flags() -> Result<&'static [&'static AtomicU8]> {
        static FLAGS: OnceLock<Vec<&'static AtomicU8>> = OnceLock::new();
        if let Some(flags) = FLAGS.get() {
            return Ok(flags);
        }
        let addresses = FlashInferRuntime::global()?.module(LIBRARY)?.data_symbols(FLAG);
        // SAFETY: each is a `bool` of a library that is never unloaded. Upstream reads and writes it only within calls,
        // all of which go through the gate, so never while this side writes.
        let flags = addresses.into_iter().map(|address| unsafe { AtomicU8::from_ptr(address) }).collect();
        Ok(FLAGS.get_or_init(|| flags))
    }
}

/// All of the contract that can be seen without reading device memory. `least` is how many tokens a sequence has at least:
/// to the kernel one, since an empty sequence hangs the GPU.
pub(super) fn check(args: &RawArgs<'_>, stream: Stream<'_>, least: i64) -> Result<()> {
    let kernel = &GDN_PREFILL;
    let (q, k, v) = (args.q, args.k, args.v);
    let dtype = kernel.half("q", q)?;
    kernel.rank("q", q, 3)?;
    kernel.rank("k", k, 3)?;
    kernel.rank("v", v, 3)?;
    kernel.rank("cu_seqlens", args.cu_seqlens, 1)?;
    let (tokens, size) = (q.shape()[0], q.shape()[2]);
    if size != HEAD_SIZE {
        let expected = format!("{HEAD_SIZE}, the only one that release 0.6.3 computes right");
        return Err(kernel.invalid("head_size", size, expected));
    }
    let (q_heads, k_heads, v_heads) = (q.shape()[1], k.shape()[1], v.shape()[1]);
    let grouped_queries = q_heads >= v_heads && k_heads == v_heads && k_heads > 0 && q_heads % k_heads == 0;
    let grouped_values = q_heads < v_heads && q_heads == k_heads && q_heads > 0 && v_heads % q_heads == 0;
    if !(grouped_queries || grouped_values) {
        let found = format_args!("{q_heads} query, {k_heads} key and {v_heads} value");
        let expected = "key heads = value heads and query heads a multiple of them (GQA), or query heads = key heads and \
                        value heads a multiple of them (GVA)";
        return Err(kernel.invalid("the number of heads", found, expected));
    }
    let heads = q_heads.max(v_heads);
    let sequences = args.cu_seqlens.shape()[0] - 1;
    kernel.in_bounds("the number of sequences, the length of cu_seqlens less one,", sequences, 1, i32::MAX.into())?;
    kernel.in_bounds("the number of tokens", tokens, sequences * least, i32::MAX.into())?;

    let (per_token, states) = ([tokens, heads], [sequences, heads, size, size]);
    let (f32, on) = (DType::F32, On { device: q.device(), stream });
    let workspace = args.workspace;
    let plain = on.fits(q, dtype, [tokens, q_heads, size])
        & on.fits(k, dtype, [tokens, k_heads, size])
        & on.fits(v, dtype, [tokens, v_heads, size])
        & on.fits(args.output, dtype, [tokens, heads, size])
        & on.fits(args.output_state, f32, states)
        & on.fits(args.cu_seqlens, DType::I64, [sequences + 1])
        & on.fits(workspace, DType::U8, [workspace.numel()])
        & args.input_state.is_none_or(|tensor| on.fits(tensor, f32, states))
        & args.alpha.is_none_or(|tensor| on.fits(tensor, f32, per_token))
        & args.beta.is_none_or(|tensor| on.fits(tensor, f32, per_token));
    let closely = || {
        on.check("q", q, dtype, &[tokens, q_heads, size])?;
        on.check("k", k, dtype, &[tokens, k_heads, size])?;
        on.check("v", v, dtype, &[tokens, v_heads, size])?;
        on.check("output", args.output, dtype, &[tokens, heads, size])?;
        on.check("output_state", args.output_state, f32, &states)?;
        on.check("cu_seqlens", args.cu_seqlens, DType::I64, &[sequences + 1])?;
        args.alpha.map_or(Ok(()), |tensor| on.check("alpha", tensor, f32, &per_token))?;
        args.beta.map_or(Ok(()), |tensor| on.check("beta", tensor, f32, &per_token))?;
        args.input_state.map_or(Ok(()), |tensor| on.check("input_state", tensor, f32, &states))?;
        kernel.rank("workspace", workspace, 1)?;
        on.check("workspace", workspace, DType::U8, &[workspace.numel()])
    };
    debug_assert!(!plain || closely().is_ok());
    if !plain {
        closely()?;
    }
    // As the f32 that the kernel makes of it.
    let scale = args.scale as f32;
    if !(scale.is_finite() && args.scale >= 0.0) {
        return Err(kernel.invalid("scale", args.scale, "a finite number, 0.0 for 1/√(head size)"));
    }
    Ok(())
}

/// Where a call is to run.
#[derive(Clone, Copy)]
struct On<'a> {
    device: Device,
    stream: Stream<'a>,
}

/// Offsets and strides are 32-bit.
const MOST: i64 = i32::MAX as i64;

/// A failed TMA descriptor prints to stderr and goes on; f32 and offsets are read one by one.
const fn alignment(dtype: DType) -> usize {
    match dtype {
        DType::U8 => WORKSPACE_ALIGNMENT,
        DType::F16 | DType::BF16 => 16,
        other => other.size(),
    }
}

impl On<'_> {
    /// Whether a tensor is plainly what the kernel takes: dense memory of this GPU, for this stream.
    #[inline(always)]
    fn fits<const N: usize>(&self, tensor: &Raw, dtype: DType, shape: [i64; N]) -> bool {
        let own = tensor.stream().unwrap_or(self.stream.as_raw());
        tensor.is_dense(dtype, self.device, shape, MOST, alignment(dtype))
            & (own == self.stream.as_raw())
            & matches!(self.device, Device::Cuda(_))
    }

    /// As [`fits`](Self::fits), for any tensor: knows what is wrong, if anything is.
    #[cold]
    fn check(&self, name: &'static str, tensor: &Raw, dtype: DType, shape: &[i64]) -> Result<()> {
        let kernel = &GDN_PREFILL;
        kernel.dtype(name, tensor, dtype)?;
        kernel.shape(name, tensor, shape)?;
        kernel.stream(name, tensor, self.stream)?;
        kernel.device(name, tensor, self.device)?;
        kernel.contiguous(name, tensor)?;
        kernel.aligned(name, tensor, alignment(dtype))?;
        kernel.in_bounds(name, tensor.numel(), 0, MOST)
    }
}
