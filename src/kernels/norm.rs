//! `norm.so`: RMSNorm and its relatives. Contract: `csrc/norm.cu` and `include/flashinfer/norm.cuh` of FlashInfer 0.6.3.

use super::Kernel;
use crate::error::Result;
use crate::module::Arg;
use crate::runtime::{FlashInferRuntime, Stream};
use crate::tensor::{Raw, TensorMut, TensorRef};

const LIBRARY: &str = "norm.so";

static GEMMA_RMSNORM: Kernel = Kernel::new(LIBRARY, "gemma_rmsnorm", |capability| capability >= OLDEST);

/// What FlashInfer compiles for at the oldest; a wheel may have been compiled for less.
const OLDEST: (i32, i32) = (7, 5);

pub(super) static KERNELS: &[&Kernel] = &[&GEMMA_RMSNORM];

/// Elements that one memory access moves at the most: 16 bytes of f16 or bf16.
const VECTOR: i64 = 8;

/// Element offsets are computed in 32 bits.
const OFFSET_LIMIT: i64 = 1 << 32;

/// How a norm is computed.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct NormOptions {
    /// Added to the mean square before the root is taken; positive and finite.
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

/// Gemma's RMSNorm: `out[i] = input[i] / √(mean(input[i]²) + eps) · (1 + weight)`, row by row.
///
/// | tensor | shape | dtype | strides |
/// |---|---|---|---|
/// | `out`, `input` | `[rows, columns]` | F16 or BF16, the same | columns contiguous, rows any multiple of the vector |
/// | `weight` | `[columns]` | the same | contiguous |
///
/// The vector is gcd(8, columns) elements: memory and row strides must be aligned to it. On a GPU the call is
/// asynchronous on `stream`; tensors on the host are computed by the [reference](super::reference), at once. Without
/// rows there is nothing to do and nothing is launched.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for whatever breaks the table above, for an `eps` that
/// is not finite and positive, and for tensors that reach past 2³² elements, where the kernel of release 0.6.3 writes
/// zeros; [`DeviceOutOfRange`](crate::FlashInferError::DeviceOutOfRange); what loading `norm.so` answers; and
/// [`TvmFfiCall`](crate::FlashInferError::TvmFfiCall) with what the kernel raised.
pub fn gemma_rmsnorm(
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    weight: &TensorRef<'_>,
    options: &NormOptions,
    stream: Stream,
) -> Result<()> {
    let kernel = &GEMMA_RMSNORM;
    check_rows(kernel, out.raw(), input.raw(), weight.raw(), options)?;
    if input.raw().numel() == 0 {
        return Ok(());
    }
    let runtime = FlashInferRuntime::global()?;
    runtime.checked_device(input.device())?;
    let function = kernel.on(input.device())?;
    let _stream = runtime.set_stream(input.device(), stream)?;
    let (out, input, weight) = (out.pack(), input.pack(), weight.pack());
    let args =
        [Arg::tensor(&out), Arg::tensor(&input), Arg::tensor(&weight), Arg::float(options.eps), Arg::bool(options.pdl)];
    // SAFETY: the arguments keep the kernel's contract, checked above; whoever made the tensors vouched for their
    // memory, and whoever made the stream for the stream.
    unsafe { function.call(&args) }?;
    Ok(())
}

/// The contract of a norm over rows. Upstream looks at the input's dtype and at some sizes only: an f32 output beside a
/// bf16 input, for one, is silently written as bf16.
fn check_rows(kernel: &Kernel, out: &Raw, input: &Raw, weight: &Raw, options: &NormOptions) -> Result<()> {
    // As the f32 that the kernel makes of it.
    let eps = options.eps as f32;
    if !(eps.is_finite() && eps > 0.0) {
        return Err(kernel.invalid("eps", options.eps, "a finite positive number"));
    }
    kernel.rank("input", input, 2)?;
    kernel.rank("weight", weight, 1)?;
    let dtype = kernel.half("input", input)?;
    kernel.dtype("weight", weight, dtype)?;
    kernel.dtype("out", out, dtype)?;
    kernel.device("weight", weight, input.device())?;
    kernel.device("out", out, input.device())?;
    let (rows, columns) = (input.shape()[0], input.shape()[1]);
    kernel.shape("out", out, input.shape())?;
    kernel.shape("weight", weight, &[columns])?;
    kernel.in_bounds("the number of rows", rows, 0, i32::MAX.into())?;
    kernel.in_bounds("the number of columns", columns, if rows > 0 { 1 } else { 0 }, i32::MAX.into())?;
    if rows == 0 {
        return Ok(());
    }
    let vector = gcd(VECTOR, columns);
    for (argument, tensor) in [("input", input), ("out", out)] {
        let (row, column) = (tensor.strides()[0], tensor.strides()[1]);
        // Where there is one row only, its stride moves nothing.
        let fits = column == 1 && (rows == 1 || row >= columns && row % vector == 0);
        if !fits {
            let expected = format!("[{columns} or more, in steps of {vector}, 1]");
            return Err(kernel.invalid(argument, format_args!("strided {:?}", tensor.strides()), expected));
        }
        let reach = (rows - 1).checked_mul(row).and_then(|last| last.checked_add(columns));
        if rows > 1 && reach.is_none_or(|reach| reach > OFFSET_LIMIT) {
            let found = format_args!("of {rows} rows {row} elements apart");
            let expected = "at most 2^32 elements from first to last, since the kernel of release 0.6.3 counts in 32 bits; \
                            call it on parts of the rows";
            return Err(kernel.invalid(argument, found, expected));
        }
    }
    if weight.strides()[0] != 1 {
        return Err(kernel.invalid("weight", format_args!("strided {:?}", weight.strides()), "[1]"));
    }
    let bytes = vector as usize * dtype.size();
    kernel.aligned("input", input, bytes)?;
    kernel.aligned("weight", weight, bytes)?;
    kernel.aligned("out", out, bytes)
}

fn gcd(a: i64, b: i64) -> i64 {
    if b == 0 { a } else { gcd(b, a % b) }
}
