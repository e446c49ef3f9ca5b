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
use crate::error::Result;
use crate::module::Arg;
use crate::runtime::{FlashInferRuntime, Stream};
use crate::tensor::{DType, Device, Raw, TensorMut, TensorRef};

const LIBRARY: &str = "norm.so";

/// What FlashInfer compiles for at the oldest; a wheel may have been compiled for less.
const OLDEST: (i32, i32) = (7, 5);

const fn kernel(name: &'static str) -> Kernel {
    Kernel::new(LIBRARY, name, |capability| capability >= OLDEST)
}

static RMSNORM: Kernel = kernel("rmsnorm");
static GEMMA_RMSNORM: Kernel = kernel("gemma_rmsnorm");
static FUSED_ADD_RMSNORM: Kernel = kernel("fused_add_rmsnorm");
static GEMMA_FUSED_ADD_RMSNORM: Kernel = kernel("gemma_fused_add_rmsnorm");
static RMSNORM_QUANT: Kernel = kernel("rmsnorm_quant");
static FUSED_ADD_RMSNORM_QUANT: Kernel = kernel("fused_add_rmsnorm_quant");
static LAYERNORM: Kernel = kernel("layernorm");

pub(super) static KERNELS: &[&Kernel] =
    &[&RMSNORM, &GEMMA_RMSNORM, &FUSED_ADD_RMSNORM, &GEMMA_FUSED_ADD_RMSNORM, &RMSNORM_QUANT, &FUSED_ADD_RMSNORM_QUANT];

/// Elements that one memory access moves at the most: 16 bytes of f16 or bf16.
const VECTOR: i64 = 8;

/// Element offsets are computed in 32 bits.
const OFFSET_LIMIT: i64 = 1 << 32;

/// Shared memory that a block can have on the largest GPUs (compute capability 9.0): the fused forms keep a row of f32.
const SHARED_MEMORY: i64 = 227 << 10;

/// Whether the norms run on a device: on the host always, on a GPU by its compute capability. A wheel may have been
/// compiled for fewer; then the first call raises `no kernel image`.
///
/// # Errors
/// [`DeviceOutOfRange`](crate::FlashInferError::DeviceOutOfRange), or why there is no GPU.
pub fn is_supported(device: Device) -> Result<bool> {
    FlashInferRuntime::global()?.supports(|capability| RMSNORM.supports(capability), device)
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
    let call = Call { kernel: &RMSNORM, heads: true, out: Out::Same, scale: None, options };
    call.run(&[("out", out.raw()), ("input", input.raw())], weight.raw(), stream)
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
pub fn gemma_rmsnorm(
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    weight: &TensorRef<'_>,
    options: &NormOptions,
    stream: Stream<'_>,
) -> Result<()> {
    let call = Call { kernel: &GEMMA_RMSNORM, heads: false, out: Out::Same, scale: None, options };
    call.run(&[("out", out.raw()), ("input", input.raw())], weight.raw(), stream)
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
    let call = Call { kernel: &FUSED_ADD_RMSNORM, heads: false, out: Out::InPlace, scale: None, options };
    call.run(&[("input", input.raw()), ("residual", residual.raw())], weight.raw(), stream)
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
    let call = Call { kernel: &GEMMA_FUSED_ADD_RMSNORM, heads: false, out: Out::InPlace, scale: None, options };
    call.run(&[("input", input.raw()), ("residual", residual.raw())], weight.raw(), stream)
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
    let call = Call { kernel: &RMSNORM_QUANT, heads: false, out: Out::Eight, scale: Some(scale), options };
    call.run(&[("out", out.raw()), ("input", input.raw())], weight.raw(), stream)
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
    let call = Call { kernel: &FUSED_ADD_RMSNORM_QUANT, heads: false, out: Out::Eight, scale: Some(scale), options };
    call.run(&[("out", out.raw()), ("input", input.raw()), ("residual", residual.raw())], weight.raw(), stream)
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
    let kernel = &LAYERNORM;
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
    // First, since this finds that there is no such device, before a library is loaded for it.
    let _stream = runtime.set_stream(input.device(), stream)?;
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
        unsafe { function.call(&args) }.map_err(|error| runtime.diagnosed(error, input.device()))?;
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

/// One call: what differs between the functions.
struct Call<'a> {
    kernel: &'static Kernel,
    /// Whether a third dimension is allowed.
    heads: bool,
    out: Out,
    scale: Option<f64>,
    options: &'a NormOptions,
}

impl Call<'_> {
    /// Checks and launches. `tensors` are in the kernel's order; the weight follows them.
    fn run(&self, tensors: &[(&'static str, &Raw)], weight: &Raw, stream: Stream<'_>) -> Result<()> {
        self.check(tensors, weight, stream)?;
        let first = tensors[0].1;
        if first.numel() == 0 {
            return Ok(());
        }
        let device = first.device();
        let runtime = FlashInferRuntime::global()?;
        // First, since this finds that there is no such device, before a library is loaded for it.
        let _stream = runtime.set_stream(device, stream)?;
        let function = self.kernel.on(device)?;
        let rows = first.shape()[0];
        let step = tensors.iter().map(|(_, tensor)| rows_within_limit(tensor)).min().unwrap_or(rows);
        let mut start = 0;
        while start < rows {
            let count = step.min(rows - start);
            // Nothing is cut where everything fits, which is nearly always.
            let part = |tensor: &Raw| if count == rows { *tensor } else { tensor.rows(start, count) };
            let parts = [part(first), part(tensors[1].1), part(tensors.last().unwrap_or(&tensors[0]).1)];
            let packed = [parts[0].pack(), parts[1].pack(), parts[2].pack()];
            let packed_weight = weight.pack();
            let mut args = [Arg::NONE; 7];
            let mut n = 0;
            let mut push = |arg| {
                args[n] = arg;
                n += 1;
            };
            packed[..tensors.len()].iter().for_each(|tensor| push(Arg::tensor(tensor)));
            push(Arg::tensor(&packed_weight));
            self.scale.into_iter().for_each(|scale| push(Arg::float(scale)));
            push(Arg::float(self.options.eps));
            push(Arg::bool(self.options.pdl));
            // SAFETY: the arguments keep the kernel's contract, checked above; whoever made the tensors vouched for
            // their memory, and whoever made the stream for the stream.
            unsafe { function.call(&args[..n]) }.map_err(|error| runtime.diagnosed(error, device))?;
            start += count;
        }
        Ok(())
    }

    /// The contract. Upstream looks at the input's dtype and at some sizes only: an f32 output beside a bf16 input, for
    /// one, is silently written as bf16.
    fn check(&self, tensors: &[(&'static str, &Raw)], weight: &Raw, stream: Stream<'_>) -> Result<()> {
        let kernel = self.kernel;
        self.check_numbers()?;
        // The input decides: it is the first that is not `out`.
        let (name, input) = tensors[usize::from(self.out != Out::InPlace)];
        let rank = input.shape().len();
        if rank != 3 || !self.heads {
            kernel.rank(name, input, 2)?;
        }
        kernel.rank("weight", weight, 1)?;
        let dtype = kernel.half(name, input)?;
        kernel.dtype("weight", weight, dtype)?;
        kernel.device("weight", weight, input.device())?;
        kernel.stream("weight", weight, stream)?;
        let columns = input.shape()[rank - 1];
        for &(argument, tensor) in tensors {
            match (argument, self.out) {
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
        let vector = gcd(VECTOR, columns);
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
        check_positive(self.kernel, "eps", self.options.eps)?;
        self.scale.map_or(Ok(()), |scale| check_positive(self.kernel, "scale", scale))
    }

    /// Rows apart by at least their length, in whole vectors. Where a dimension has one element, its stride moves nothing.
    fn check_strides(&self, argument: &'static str, tensor: &Raw, vector: i64) -> Result<()> {
        let (shape, strides) = (tensor.shape(), tensor.strides());
        let last = shape.len() - 1;
        let mut least = shape[last];
        let mut fits = strides[last] == 1;
        for i in (0..last).rev() {
            let stride = strides[i];
            fits &= shape[i] == 1 || stride >= least && stride % vector == 0;
            least = if shape[i] == 1 { least } else { stride.saturating_mul(shape[i]) };
        }
        if !fits {
            let columns = shape[last];
            let tokens = if last == 2 { "heads apart, " } else { "" };
            let expected = format!("[{tokens}{columns} or more, in steps of {vector}, 1]");
            return Err(self.kernel.invalid(argument, format_args!("strided {strides:?}"), expected));
        }
        if tensor.reach().is_none() || rows_within_limit(tensor) == 0 {
            let found = format_args!("strided {strides:?} with shape {shape:?}");
            return Err(self.kernel.invalid(argument, found, "rows that lie within 2^32 elements each"));
        }
        Ok(())
    }

    fn check_shared_memory(&self, input: &Raw, columns: i64, vector: i64) -> Result<()> {
        let fused = self.kernel.name().contains("fused");
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
        Err(self.kernel.invalid("the number of columns", columns, expected))
    }
}

/// How many of the first dimension one launch may cover: those whose elements lie within 2³² of each other.
fn rows_within_limit(tensor: &Raw) -> i64 {
    let rows = tensor.shape()[0];
    let one = tensor.rows(0, 1).reach().unwrap_or(i64::MAX);
    if one > OFFSET_LIMIT {
        return 0;
    }
    let stride = tensor.strides()[0];
    if rows <= 1 || stride <= 0 { rows } else { rows.min((OFFSET_LIMIT - one) / stride + 1) }
}

impl Kernel {
    fn eight_bit(&self, argument: &'static str, tensor: &Raw) -> Result<()> {
        match tensor.dtype() {
            DType::F8E4M3 | DType::F8E5M2 => Ok(()),
            other => Err(self.invalid(argument, other, "F8E4M3 or F8E5M2")),
        }
    }
}

fn gcd(a: i64, b: i64) -> i64 {
    if b == 0 { a } else { gcd(b, a % b) }
}
