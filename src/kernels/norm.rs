//! `norm.so`: RMSNorm and its relatives. Contract: `csrc/norm.cu` and `include/flashinfer/norm.cuh` of FlashInfer 0.6.3.
//!
//! What holds for all of them:
//! - Rows lie along the last dimension, whose stride is 1. Other strides may be larger than needed; memory and strides
//!   must be multiples of the vector, gcd(8, columns) elements.
//! - On a GPU a call is asynchronous on `stream` and never synchronizes; tensors on the host are computed by the
//!   [reference](super::reference), at once. Empty tensors are a no-op.
//! - Release 0.6.3 counts elements in 32 bits and silently writes zeros past 2³² of them; larger tensors are split here
//!   into several launches, on row boundaries.
//! - GPUs: those that the wheel was compiled for, from compute capability 7.5 on.
//!
//! # Errors
//! Every function answers [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for what breaks its contract,
//! before anything is launched; [`DeviceOutOfRange`](crate::FlashInferError::DeviceOutOfRange); what loading `norm.so`
//! answers; and [`TvmFfiCall`](crate::FlashInferError::TvmFfiCall) with what the kernel raised.

use super::Kernel;
use super::prepared::{Argument, Prepared, Slot};
use crate::error::Result;
use crate::ffi::dlpack;
use crate::module::{Arg, Function};
use crate::runtime::FlashInferRuntime;
use crate::stream::Stream;
use crate::tensor::{DType, Device, Lines, Pack, Raw, TensorMut, TensorRef};

const LIBRARY: &str = "norm.so";

/// What FlashInfer compiles for at the oldest; a wheel may have been compiled for less.
const OLDEST: (i32, i32) = (7, 5);

const fn norm(name: &'static str, heads: bool, out: Out) -> Norm {
    Norm { kernel: Kernel::new(LIBRARY, name, |capability| capability >= OLDEST), heads, out }
}

static RMSNORM: Norm = norm("rmsnorm", true, Out::Same);
static GEMMA_RMSNORM: Norm = norm("gemma_rmsnorm", false, Out::Same);
static FUSED_ADD_RMSNORM: Norm = norm("fused_add_rmsnorm", false, Out::InPlace);
static GEMMA_FUSED_ADD_RMSNORM: Norm = norm("gemma_fused_add_rmsnorm", false, Out::InPlace);
static RMSNORM_QUANT: Norm = norm("rmsnorm_quant", false, Out::Eight);
static FUSED_ADD_RMSNORM_QUANT: Norm = norm("fused_add_rmsnorm_quant", false, Out::Eight);
static LAYERNORM: Norm = norm("layernorm", false, Out::Same);

pub(super) static KERNELS: &[&Kernel] = &[
    &RMSNORM.kernel,
    &GEMMA_RMSNORM.kernel,
    &FUSED_ADD_RMSNORM.kernel,
    &GEMMA_FUSED_ADD_RMSNORM.kernel,
    &RMSNORM_QUANT.kernel,
    &FUSED_ADD_RMSNORM_QUANT.kernel,
    &LAYERNORM.kernel,
];

/// Elements that one memory access moves at the most: 16 bytes of f16 or bf16.
const VECTOR: i64 = 8;
const ALIGNMENT: usize = 16;

/// Element offsets are computed in 32 bits.
const OFFSET_LIMIT: i64 = 1 << 32;

/// Shared memory that a block can have on the largest GPUs (compute capability 9.0): the fused forms keep a row of f32.
const SHARED_MEMORY: i64 = 227 << 10;

/// So many columns fit in whatever way they are divided among warps.
const SHARED_COLUMNS: i64 = SHARED_MEMORY / 4 - 32;

/// Whether the norms run on a device: on the host always, on a GPU by its compute capability. A wheel may have been
/// compiled for fewer; then the first call raises `no kernel image`.
///
/// # Errors
/// [`DeviceOutOfRange`](crate::FlashInferError::DeviceOutOfRange), or why there is no GPU.
pub fn is_supported(device: Device) -> Result<bool> {
    FlashInferRuntime::global()?.supports(|capability| RMSNORM.kernel.supports(capability), device)
}

/// How a norm is computed.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct NormOptions {
    /// Added to the mean square before the root is taken; positive and finite, also as an f32.
    pub eps: f64,
    /// Programmatic dependent launch: the kernel may start before the one ahead of it in the stream has ended. It waits
    /// for that one's results by itself.
    pub pdl: bool,
}

impl Default for NormOptions {
    fn default() -> Self {
        Self { eps: 1e-6, pdl: false }
    }
}

impl NormOptions {
    /// With another epsilon.
    #[must_use]
    pub fn with_eps(mut self, eps: f64) -> Self {
        self.eps = eps;
        self
    }

    /// With programmatic dependent launch on or off.
    #[must_use]
    pub fn with_pdl(mut self, pdl: bool) -> Self {
        self.pdl = pdl;
        self
    }
}

/// RMSNorm: `out[i] = input[i] / √(mean(input[i]²) + eps) · weight`, row by row.
///
/// | tensor | shape | dtype |
/// |---|---|---|
/// | `out`, `input` | `[rows, columns]`, or `[tokens, heads, columns]` for a norm of every head | F16 or BF16, the same |
/// | `weight` | `[columns]` | the same |
///
/// # Errors
/// See the [module](self).
pub fn rmsnorm(
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    weight: &TensorRef<'_>,
    options: &NormOptions,
    stream: Stream<'_>,
) -> Result<()> {
    RMSNORM.call(None, options).run([("out", out.raw()), ("input", input.raw())], weight.raw(), stream)
}

/// Gemma's RMSNorm: `out[i] = input[i] / √(mean(input[i]²) + eps) · (1 + weight)`, row by row.
///
/// | tensor | shape | dtype |
/// |---|---|---|
/// | `out`, `input` | `[rows, columns]` | F16 or BF16, the same |
/// | `weight` | `[columns]` | the same |
///
/// # Errors
/// See the [module](self).
#[inline]
pub fn gemma_rmsnorm(
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    weight: &TensorRef<'_>,
    options: &NormOptions,
    stream: Stream<'_>,
) -> Result<()> {
    GEMMA_RMSNORM.call(None, options).run([("out", out.raw()), ("input", input.raw())], weight.raw(), stream)
}

/// [`gemma_rmsnorm`] of tensors that are only described; `None` where nothing was launched, since their description does not
/// show that all is well.
///
/// # Safety
/// The memory must be as described, and stay valid until the kernel has run.
#[inline(always)]
pub(crate) unsafe fn described_gemma_rmsnorm<M: Pack, V: Pack>(
    [out, input]: [(&M, Lines); 2],
    weight: (&V, Lines),
    options: &NormOptions,
    stream: Stream<'_>,
) -> Option<Result<()>> {
    let call = GEMMA_RMSNORM.call(None, options);
    let plain = call.is_plain([out.1, input.1], weight.1, stream);
    if !plain {
        return None;
    }
    // SAFETY: what is plain keeps the kernel's contract; the rest is the caller's promise.
    unsafe { call.launch_plain([out.0, input.0], weight.0, Device::Cuda(input.1.device.device_id as u32), stream) }
}

/// Adds and norms: `residual ← input + residual`, then `input ← residual / √(mean(residual²) + eps) · weight`, row by
/// row. The sum is normed before it is rounded.
///
/// | tensor | shape | dtype |
/// |---|---|---|
/// | `input`, `residual`, both written | `[rows, columns]` | F16 or BF16, the same |
/// | `weight` | `[columns]` | the same |
///
/// # Errors
/// See the [module](self). A row must fit a block's shared memory as f32: 58,000 columns or so.
pub fn fused_add_rmsnorm(
    input: &mut TensorMut<'_>,
    residual: &mut TensorMut<'_>,
    weight: &TensorRef<'_>,
    options: &NormOptions,
    stream: Stream<'_>,
) -> Result<()> {
    FUSED_ADD_RMSNORM.call(None, options).run(
        [("input", input.raw()), ("residual", residual.raw())],
        weight.raw(),
        stream,
    )
}

/// As [`fused_add_rmsnorm`], with `1 + weight` in the weight's place.
///
/// # Errors
/// As there.
pub fn gemma_fused_add_rmsnorm(
    input: &mut TensorMut<'_>,
    residual: &mut TensorMut<'_>,
    weight: &TensorRef<'_>,
    options: &NormOptions,
    stream: Stream<'_>,
) -> Result<()> {
    GEMMA_FUSED_ADD_RMSNORM.call(None, options).run(
        [("input", input.raw()), ("residual", residual.raw())],
        weight.raw(),
        stream,
    )
}

/// [`rmsnorm`] of two dimensions with an 8-bit output: `out = clamp(rmsnorm(input) / scale, −448, 448)`.
///
/// | tensor | shape | dtype |
/// |---|---|---|
/// | `out` | `[rows, columns]` | F8E4M3 or F8E5M2 |
/// | `input` | `[rows, columns]` | F16 or BF16 |
/// | `weight` | `[columns]` | as `input` |
///
/// # Errors
/// See the [module](self). `scale` must be finite and positive.
pub fn rmsnorm_quant(
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    weight: &TensorRef<'_>,
    scale: f64,
    options: &NormOptions,
    stream: Stream<'_>,
) -> Result<()> {
    RMSNORM_QUANT.call(Some(scale), options).run([("out", out.raw()), ("input", input.raw())], weight.raw(), stream)
}

/// [`fused_add_rmsnorm`] with an 8-bit output: `residual ← input + residual`, then
/// `out = clamp(rmsnorm(residual) / scale, −448, 448)`; `input` is only read.
///
/// | tensor | shape | dtype |
/// |---|---|---|
/// | `out` | `[rows, columns]` | F8E4M3 or F8E5M2 |
/// | `input`, `residual` | `[rows, columns]` | F16 or BF16, the same |
/// | `weight` | `[columns]` | as `input` |
///
/// # Errors
/// See the [module](self). `scale` must be finite and positive.
#[allow(clippy::too_many_arguments, reason = "the kernel has that many, and each is required")]
pub fn fused_add_rmsnorm_quant(
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    residual: &mut TensorMut<'_>,
    weight: &TensorRef<'_>,
    scale: f64,
    options: &NormOptions,
    stream: Stream<'_>,
) -> Result<()> {
    FUSED_ADD_RMSNORM_QUANT.call(Some(scale), options).run(
        [("out", out.raw()), ("input", input.raw()), ("residual", residual.raw())],
        weight.raw(),
        stream,
    )
}

/// The norms, packed once. [`layernorm`] is not among them: upstream wants its tensors as objects.
impl<'a> Prepared<'a> {
    /// [`rmsnorm`], to be launched many times. Replaceable: `out`, `input`, `weight`.
    ///
    /// # Errors
    /// As there.
    pub fn rmsnorm(
        out: TensorMut<'a>,
        input: TensorRef<'a>,
        weight: TensorRef<'a>,
        options: &NormOptions,
    ) -> Result<Self> {
        let tensors =
            vec![Argument::written("out", out), Argument::read("input", input), Argument::read("weight", weight)];
        RMSNORM.call(None, options).prepare(tensors)
    }

    /// [`gemma_rmsnorm`], to be launched many times. Replaceable: `out`, `input`, `weight`.
    ///
    /// # Errors
    /// As there.
    pub fn gemma_rmsnorm(
        out: TensorMut<'a>,
        input: TensorRef<'a>,
        weight: TensorRef<'a>,
        options: &NormOptions,
    ) -> Result<Self> {
        let tensors =
            vec![Argument::written("out", out), Argument::read("input", input), Argument::read("weight", weight)];
        GEMMA_RMSNORM.call(None, options).prepare(tensors)
    }

    /// [`fused_add_rmsnorm`], to be launched many times. Replaceable: `input`, `residual`, `weight`.
    ///
    /// # Errors
    /// As there.
    pub fn fused_add_rmsnorm(
        input: TensorMut<'a>,
        residual: TensorMut<'a>,
        weight: TensorRef<'a>,
        options: &NormOptions,
    ) -> Result<Self> {
        let tensors = vec![
            Argument::written("input", input),
            Argument::written("residual", residual),
            Argument::read("weight", weight),
        ];
        FUSED_ADD_RMSNORM.call(None, options).prepare(tensors)
    }

    /// [`gemma_fused_add_rmsnorm`], to be launched many times. Replaceable: `input`, `residual`, `weight`.
    ///
    /// # Errors
    /// As there.
    pub fn gemma_fused_add_rmsnorm(
        input: TensorMut<'a>,
        residual: TensorMut<'a>,
        weight: TensorRef<'a>,
        options: &NormOptions,
    ) -> Result<Self> {
        let tensors = vec![
            Argument::written("input", input),
            Argument::written("residual", residual),
            Argument::read("weight", weight),
        ];
        GEMMA_FUSED_ADD_RMSNORM.call(None, options).prepare(tensors)
    }

    /// [`rmsnorm_quant`], to be launched many times. Replaceable: `out`, `input`, `weight`.
    ///
    /// # Errors
    /// As there.
    pub fn rmsnorm_quant(
        out: TensorMut<'a>,
        input: TensorRef<'a>,
        weight: TensorRef<'a>,
        scale: f64,
        options: &NormOptions,
    ) -> Result<Self> {
        let tensors =
            vec![Argument::written("out", out), Argument::read("input", input), Argument::read("weight", weight)];
        RMSNORM_QUANT.call(Some(scale), options).prepare(tensors)
    }

    /// [`fused_add_rmsnorm_quant`], to be launched many times. Replaceable: `out`, `input`, `residual`, `weight`.
    ///
    /// # Errors
    /// As there.
    pub fn fused_add_rmsnorm_quant(
        out: TensorMut<'a>,
        input: TensorRef<'a>,
        residual: TensorMut<'a>,
        weight: TensorRef<'a>,
        scale: f64,
        options: &NormOptions,
    ) -> Result<Self> {
        let tensors = vec![
            Argument::written("out", out),
            Argument::read("input", input),
            Argument::written("residual", residual),
            Argument::read("weight", weight),
        ];
        FUSED_ADD_RMSNORM_QUANT.call(Some(scale), options).prepare(tensors)
    }
}

/// LayerNorm: `out[i] = (input[i] − mean) / √(variance + eps) · gamma + beta`, row by row. Programmatic dependent launch is
/// not for this one.
///
/// | tensor | shape | dtype |
/// |---|---|---|
/// | `out`, `input`, contiguous | `[rows, columns]` | BF16 (on the host also F16 and F32) |
/// | `gamma`, `beta`, contiguous | `[columns]` | F32 |
///
/// Upstream takes these tensors as reference-counted objects: a call allocates four of them.
///
/// # Errors
/// See the [module](self).
pub fn layernorm(
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    gamma: &TensorRef<'_>,
    beta: &TensorRef<'_>,
    eps: f64,
    stream: Stream<'_>,
) -> Result<()> {
    let kernel = &LAYERNORM.kernel;
    let (out, input, gamma, beta) = (out.raw(), input.raw(), gamma.raw(), beta.raw());
    check_positive(kernel, "eps", eps)?;
    kernel.rank("input", input, 2)?;
    let (rows, columns) = (input.shape()[0], input.shape()[1]);
    let dtype = kernel.half("input", input)?;
    if input.device() != Device::Cpu {
        kernel.dtype("input", input, DType::BF16)?;
    }
    let tensors = [
        ("input", input, dtype, &[rows, columns][..]),
        ("out", out, dtype, &[rows, columns]),
        ("gamma", gamma, DType::F32, &[columns]),
        ("beta", beta, DType::F32, &[columns]),
    ];
    for (name, tensor, dtype, shape) in tensors {
        kernel.dtype(name, tensor, dtype)?;
        kernel.device(name, tensor, input.device())?;
        kernel.stream(name, tensor, stream)?;
        kernel.shape(name, tensor, shape)?;
        kernel.contiguous(name, tensor)?;
        // Two elements at a time where their number is even.
        kernel.aligned(name, tensor, dtype.size() * if columns % 2 == 0 { 2 } else { 1 })?;
    }
    kernel.in_bounds("the number of rows", rows, 0, i32::MAX.into())?;
    kernel.in_bounds("the number of columns", columns, if rows > 0 { 1 } else { 0 }, i32::MAX.into())?;
    if rows == 0 {
        return Ok(());
    }
    let runtime = FlashInferRuntime::global()?;
    let _stream = runtime.queue(input.device(), stream)?;
    let function = kernel.on(input.device())?;
    // Offsets are signed here.
    let step = (i64::from(i32::MAX) / columns).max(1);
    for start in (0..rows).step_by(step as usize) {
        let count = step.min(rows - start);
        let parts = [out.rows(start, count), input.rows(start, count), *gamma, *beta];
        let packed = [parts[0].pack(), parts[1].pack(), parts[2].pack(), parts[3].pack()];
        // SAFETY: the objects are dropped at the end of this turn, before the tensors; the function keeps none.
        let objects = packed.iter().map(|tensor| unsafe { tensor.to_object(runtime.api()) });
        let objects = objects.collect::<Result<Vec<_>>>()?;
        let mut args = [const { Arg::NONE }; 5];
        args.iter_mut().zip(&objects).for_each(|(arg, object)| *arg = Arg::object(object));
        args[4] = Arg::float(eps);
        // SAFETY: the arguments keep the kernel's contract, checked above; whoever made the tensors vouched for their
        // memory, and whoever made the stream for the stream.
        unsafe { function.launch(&args) }.map_err(|error| runtime.diagnosed(error, input.device()))?;
    }
    Ok(())
}

fn check_positive(kernel: &Kernel, argument: &'static str, value: f64) -> Result<()> {
    // As the f32 that the kernel makes of it.
    if (value as f32).is_finite() && value as f32 > 0.0 {
        return Ok(());
    }
    Err(kernel.invalid(argument, value, "a finite positive number"))
}

/// What a norm writes its result to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Out {
    /// `out`, of the input's type.
    Same,
    /// `out`, of an 8-bit type.
    Eight,
    /// The input itself.
    InPlace,
}

/// What differs between the norms.
struct Norm {
    kernel: Kernel,
    /// Whether a third dimension is allowed.
    heads: bool,
    out: Out,
}

impl Norm {
    fn call<'a>(&'static self, scale: Option<f64>, options: &'a NormOptions) -> Call<'a> {
        Call { norm: self, scale, options }
    }
}

/// One call of a norm.
struct Call<'a> {
    norm: &'static Norm,
    /// Of those with an 8-bit output.
    scale: Option<f64>,
    options: &'a NormOptions,
}

impl Call<'_> {
    /// Checks and launches. `tensors` are in the kernel's order; the weight follows them.
    #[inline(always)]
    fn run<const N: usize>(&self, tensors: [(&'static str, &Raw); N], weight: &Raw, stream: Stream<'_>) -> Result<()> {
        if self.is_plain(tensors.map(|(_, tensor)| tensor.rows_of_two()), weight.vector(), stream) {
            debug_assert!(self.check(&tensors, weight, stream).is_ok() && tensors[0].1.numel() > 0);
            let (parts, device) = (tensors.map(|(_, tensor)| tensor), tensors[0].1.device());
            // SAFETY: the arguments keep the kernel's contract; whoever made the tensors vouched for their memory.
            if let Some(done) = unsafe { self.launch_plain(parts, weight, device, stream) } {
                return done;
            }
        }
        self.run_any(&tensors, weight, stream)
    }

    /// As [`run`](Self::run), for a call that may be anything.
    #[cold]
    fn run_any<const N: usize>(
        &self,
        tensors: &[(&'static str, &Raw); N],
        weight: &Raw,
        stream: Stream<'_>,
    ) -> Result<()> {
        self.check(tensors, weight, stream)?;
        let first = tensors[0].1;
        if first.numel() == 0 {
            return Ok(());
        }
        let device = first.device();
        let _stream = FlashInferRuntime::global()?.queue(device, stream)?;
        let function = self.norm.kernel.on(device)?;
        let step = step(tensors.iter().map(|(_, tensor)| *tensor));
        starts(first.shape()[0], step).try_for_each(|(start, count)| {
            let parts = tensors.map(|(_, tensor)| tensor.rows(start, count));
            // SAFETY: the arguments keep the kernel's contract; whoever made the tensors vouched for their memory.
            unsafe { self.launch(function, parts.each_ref(), weight, device, stream) }
        })
    }

    /// Launches what is plain, if everything is loaded and the device is known.
    ///
    /// # Safety
    /// As for [`launch`](Self::launch).
    #[inline(always)]
    unsafe fn launch_plain<const N: usize>(
        &self,
        tensors: [&impl Pack; N],
        weight: &impl Pack,
        device: Device,
        stream: Stream<'_>,
    ) -> Option<Result<()>> {
        let (runtime, function) = (FlashInferRuntime::get()?, self.norm.kernel.resolved()?);
        let _stream = runtime.set_stream(runtime.usable(device)?, stream).ok()?;
        // SAFETY: the caller's promise.
        Some(unsafe { self.launch(function, tensors, weight, device, stream) })
    }

    /// Packs and calls; this thread's stream is set.
    ///
    /// # Safety
    /// The arguments must keep the kernel's contract, and their memory stay valid until it has run.
    #[inline(always)]
    unsafe fn launch<const N: usize>(
        &self,
        function: &Function,
        tensors: [&impl Pack; N],
        weight: &impl Pack,
        device: Device,
        stream: Stream<'_>,
    ) -> Result<()> {
        // One by one and written out: arrays that are filled in a loop are moved, which costs more than all of this.
        let (first, second, last) = (tensors[0].packed(), tensors[1].packed(), tensors[N - 1].packed());
        let (first, second, last) = (Arg::tensor(&first), Arg::tensor(&second), Arg::tensor(&last));
        let weight = weight.packed();
        let (weight, eps, pdl) = (Arg::tensor(&weight), Arg::float(self.options.eps), Arg::bool(self.pdl(stream)));
        // SAFETY: the caller's promise, and for the stream that of whoever made it.
        let call = |args: &[Arg<'_>]| unsafe { launch(function, device, 0, args) };
        match self.scale.map(Arg::float) {
            None => call(&[first, second, weight, eps, pdl]),
            Some(scale) if N == 2 => call(&[first, second, weight, scale, eps, pdl]),
            Some(scale) => call(&[first, second, last, weight, scale, eps, pdl]),
        }
    }

    /// Whether a call is what nearly every one is: rows on a GPU, whole vectors long and apart, few enough for one launch.
    /// Then it keeps the whole contract; any other is looked at by [`check`](Self::check), which knows what is wrong, if
    /// anything is.
    #[inline(always)]
    fn is_plain<const N: usize>(&self, tensors: [Lines; N], weight: Lines, stream: Stream<'_>) -> bool {
        let input = tensors[usize::from(self.norm.out != Out::InPlace)];
        let Lines { dtype, device, rows, columns, .. } = input;
        let fits = |lines: &Lines| {
            let (own, address) = (lines.stream.unwrap_or(stream.as_raw()), lines.data.addr());
            let here = (lines.dtype == dtype) & (lines.device == device) & (own == stream.as_raw());
            // With as many rows as are allowed, and so far apart, this fits 64 bits.
            let reach = lines.rows.wrapping_sub(1).wrapping_mul(lines.apart).wrapping_add(lines.columns);
            let strided = (lines.within == 1) & (lines.apart >= columns) & (lines.apart <= OFFSET_LIMIT);
            let aligned = (address != 0) & address.is_multiple_of(ALIGNMENT) & (lines.apart % VECTOR == 0);
            here & (lines.columns == columns) & strided & aligned & (reach <= OFFSET_LIMIT)
        };
        let eps = self.options.eps as f32;
        (rows > 0)
            & (rows <= i32::MAX.into())
            // As many as the fused forms take.
            & (columns > 0)
            & (columns <= SHARED_COLUMNS)
            & (columns % VECTOR == 0)
            & (eps > 0.0)
            & eps.is_finite()
            // An 8-bit output is another matter.
            & self.scale.is_none()
            & matches!(dtype, DType::F16 | DType::BF16)
            & (device.device_type == dlpack::CUDA)
            & fits(&weight)
            & tensors.iter().fold(true, |all, lines| all & fits(lines) & (lines.rows == rows))
    }

    /// As [`run`](Self::run), to be launched later, any number of times.
    fn prepare<'a>(&self, tensors: Vec<Argument<'a>>) -> Result<Prepared<'a>> {
        let named: Vec<_> = tensors.iter().map(|tensor| (tensor.name, tensor.raw())).collect();
        let Some((weight, inputs)) = named.split_last() else { unreachable!("every norm has a weight") };
        let stream = named.iter().find_map(|(_, tensor)| tensor.stream()).map_or(Stream::NULL, Stream::compared);
        self.check(inputs, weight.1, stream)?;
        let first = inputs[0].1;
        let numbers = [Arg::float(self.options.eps), Arg::bool(self.pdl(stream))];
        let numbers = self.scale.map(Arg::float).into_iter().chain(numbers).map(Slot::Number);
        let rows = if first.numel() == 0 { 0 } else { first.shape()[0] };
        let step = step(inputs.iter().map(|(_, tensor)| *tensor));
        let launches = starts(rows, step).map(|(start, count)| {
            let parts = inputs.iter().enumerate().map(|(i, (_, tensor))| Slot::Tensor(i, tensor.rows(start, count)));
            parts.chain([Slot::Tensor(inputs.len(), *weight.1)]).chain(numbers.clone()).collect()
        });
        let launches = launches.collect();
        Prepared::new(&self.norm.kernel, first.device(), launch, 0, tensors, launches)
    }

    fn pdl(&self, stream: Stream<'_>) -> bool {
        self.options.pdl || stream.capture().is_some_and(|capture| capture.pdl)
    }

    /// The contract. Upstream looks at the input's dtype and at some sizes only: an f32 output beside a bf16 input, for
    /// one, is silently written as bf16.
    fn check(&self, tensors: &[(&'static str, &Raw)], weight: &Raw, stream: Stream<'_>) -> Result<()> {
        let kernel = &self.norm.kernel;
        self.check_numbers()?;
        // The input decides: it is the first that is not `out`.
        let (name, input) = tensors[usize::from(self.norm.out != Out::InPlace)];
        let rank = input.shape().len();
        if rank != 3 || !self.norm.heads {
            kernel.rank(name, input, 2)?;
        }
        kernel.rank("weight", weight, 1)?;
        let dtype = kernel.half(name, input)?;
        kernel.dtype("weight", weight, dtype)?;
        kernel.device("weight", weight, input.device())?;
        kernel.stream("weight", weight, stream)?;
        let columns = input.shape()[rank - 1];
        for &(argument, tensor) in tensors {
            match (argument, self.norm.out) {
                ("out", Out::Eight) => kernel.eight_bit(argument, tensor)?,
                _ => kernel.dtype(argument, tensor, dtype)?,
            }
            kernel.device(argument, tensor, input.device())?;
            kernel.stream(argument, tensor, stream)?;
            kernel.shape(argument, tensor, input.shape())?;
        }
        kernel.shape("weight", weight, &[columns])?;
        let rows: i64 = input.shape()[..rank - 1].iter().product();
        kernel.in_bounds("the number of rows", rows, 0, i32::MAX.into())?;
        kernel.in_bounds("the number of columns", columns, if rows > 0 { 1 } else { 0 }, i32::MAX.into())?;
        if rows == 0 {
            return Ok(());
        }
        let vector = vector(columns);
        for &(argument, tensor) in tensors {
            self.check_strides(argument, tensor, vector)?;
            kernel.aligned(argument, tensor, vector as usize * tensor.dtype().size())?;
        }
        if weight.strides()[0] != 1 {
            return Err(kernel.invalid("weight", format_args!("strided {:?}", weight.strides()), "[1]"));
        }
        kernel.aligned("weight", weight, vector as usize * dtype.size())?;
        self.check_shared_memory(input, columns, vector)
    }

    fn check_numbers(&self) -> Result<()> {
        check_positive(&self.norm.kernel, "eps", self.options.eps)?;
        self.scale.map_or(Ok(()), |scale| check_positive(&self.norm.kernel, "scale", scale))
    }

    /// Rows apart by at least their length, in whole vectors. Where a dimension has one element, its stride moves nothing.
    fn check_strides(&self, argument: &'static str, tensor: &Raw, vector: i64) -> Result<()> {
        let (shape, strides) = (tensor.shape(), tensor.strides());
        let last = shape.len() - 1;
        let mut least = shape[last];
        let mut fits = strides[last] == 1;
        for i in (0..last).rev() {
            let stride = strides[i];
            fits &= shape[i] == 1 || stride >= least && stride & (vector - 1) == 0;
            least = if shape[i] == 1 { least } else { stride.saturating_mul(shape[i]) };
        }
        if !fits {
            let columns = shape[last];
            let tokens = if last == 2 { "heads apart, " } else { "" };
            let expected = format!("[{tokens}{columns} or more, in steps of {vector}, 1]");
            return Err(self.norm.kernel.invalid(argument, format_args!("strided {strides:?}"), expected));
        }
        if !fits_in_rows(tensor) {
            let found = format_args!("strided {strides:?} with shape {shape:?}");
            return Err(self.norm.kernel.invalid(argument, found, "rows that lie within 2^32 elements each"));
        }
        Ok(())
    }

    fn check_shared_memory(&self, input: &Raw, columns: i64, vector: i64) -> Result<()> {
        let fused = self.norm.kernel.name().contains("fused");
        if !fused || input.device() == Device::Cpu {
            return Ok(());
        }
        // Four warps at a time, of 32 threads of a vector each, 1024 at the most.
        let quads = ((columns / vector).min(1024) + 127) / 128;
        let bytes = (4 * quads + columns).saturating_mul(4);
        if bytes <= SHARED_MEMORY {
            return Ok(());
        }
        let expected = format!("few enough for {SHARED_MEMORY} bytes of shared memory, where a row takes {bytes}");
        Err(self.norm.kernel.invalid("the number of columns", columns, expected))
    }
}

/// Calls the kernel with arguments that were checked.
///
/// # Safety
/// As for [`Function::call`].
unsafe fn launch(function: &Function, device: Device, _variant: u32, args: &[Arg<'_>]) -> Result<()> {
    // SAFETY: the caller's promise.
    match unsafe { function.launch(args) } {
        Ok(()) => Ok(()),
        Err(error) => Err(FlashInferRuntime::global()?.diagnosed(error, device)),
    }
}

/// gcd(8, columns) elements: what one memory access moves.
fn vector(columns: i64) -> i64 {
    1 << columns.trailing_zeros().min(VECTOR.trailing_zeros())
}

/// How many of the first dimension one launch may cover: those whose elements lie within 2³² of each other.
fn rows_within_limit(tensor: &Raw) -> i64 {
    let rows = tensor.shape()[0];
    // Without a division where everything fits, which is nearly always.
    if tensor.reach().is_some_and(|reach| reach <= OFFSET_LIMIT) {
        return rows;
    }
    let one = tensor.rows(0, 1).reach().unwrap_or(i64::MAX);
    if one > OFFSET_LIMIT {
        return 0;
    }
    let stride = tensor.strides()[0];
    if rows <= 1 || stride <= 0 { rows } else { rows.min((OFFSET_LIMIT - one) / stride + 1) }
}

/// Whether a launch for each row would do.
fn fits_in_rows(tensor: &Raw) -> bool {
    tensor.reach().is_some_and(|reach| reach <= OFFSET_LIMIT || rows_within_limit(tensor) > 0)
}

/// How many rows a launch covers.
fn step<'a>(tensors: impl Iterator<Item = &'a Raw>) -> i64 {
    tensors.map(rows_within_limit).min().unwrap_or(i64::MAX)
}

/// Where each launch starts, and how many rows it covers.
fn starts(rows: i64, step: i64) -> impl Iterator<Item = (i64, i64)> {
    (0..rows).step_by(usize::try_from(step).unwrap_or(1).max(1)).map(move |start| (start, step.min(rows - start)))
}

impl Kernel {
    fn eight_bit(&self, argument: &'static str, tensor: &Raw) -> Result<()> {
        match tensor.dtype() {
            DType::F8E4M3 | DType::F8E5M2 => Ok(()),
            other => Err(self.invalid(argument, other, "F8E4M3 or F8E5M2")),
        }
    }
}
