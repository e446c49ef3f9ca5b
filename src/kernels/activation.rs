//! `silu_and_mul.so`, `gelu_and_mul.so` and `gelu_tanh_and_mul.so`: the gated activations of an MLP. A token's `2 d` numbers
//! are `d` to be activated and `d` that gate them: `out[j] = act(input[j]) · input[d + j]`.
//!
//! What holds for all of them:
//! - Both tensors are contiguous. On a GPU they are aligned to 16 bytes and `d` is a multiple of 8, since eight numbers are
//!   moved at a time: upstream checks nothing, and would read and write at addresses that the hardware faults on. More
//!   dimensions than two are to be viewed as two.
//! - Numbers are computed in single precision and rounded once.
//! - On a GPU a call is asynchronous on `stream` and never synchronizes; tensors on the host are computed by the
//!   [reference](crate::reference), at once, of any `d`. Empty tensors are a no-op.
//! - Upstream makes the tensors' GPU the thread's current one and leaves it so; here the thread gets its own back.
//! - GPUs: those that the wheel was compiled for, from compute capability 7.5 on.
//!
//! # Errors
//! Every function answers [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for what breaks its contract,
//! before anything is launched; [`DeviceOutOfRange`](crate::FlashInferError::DeviceOutOfRange); what loading the library
//! answers; [`TvmFfiCall`](crate::FlashInferError::TvmFfiCall) with what the kernel raised; and
//! [`Cuda`](crate::FlashInferError::Cuda) or [`ContextLost`](crate::FlashInferError::ContextLost) where it was not launched.

use crate::contract::{
    Alignment, Argument, Attributes, Contents, Convention, Dimension, Dtype, Extent, From, Kind, Operand, Pdl,
    Relation, Reports, Role, Row, RunsOn, Size, Strides, Tensor,
};
use crate::engine::{Entry, call, kernels};
use crate::error::Result;
use crate::prepared::Prepared;
use crate::stream::Stream;
use crate::tensor::{Device, TensorMut, TensorRef};

/// Blocks of a grid, and what the launcher counts `d` in.
const MOST: i64 = i32::MAX as i64;

const fn tensor(name: &'static str, role: Role, dtype: Dtype, shape: &'static [Size]) -> Argument {
    let (strides, alignment, contents) = (Strides::Contiguous, Alignment::Bytes(16), Contents::Uniform(3.0));
    Argument { name, kind: Kind::Tensor(Tensor { role, optional: false, dtype, shape, strides, alignment, contents }) }
}

const WHOLE_VECTORS: Relation = Relation {
    name: "d",
    only_on_gpu: true,
    holds: |sizes| sizes[1] % 8 == 0,
    found: |sizes| sizes[1].to_string(),
    expected: "a multiple of 8: with others release 0.6.3 moves eight numbers at addresses that are none of a vector's; pad \
               both halves of a token",
};

const SILU: Row = Row {
    kernel: "silu_and_mul",
    function: "silu_and_mul",
    library: "silu_and_mul.so",
    feature: "activation",
    summary: "`out[j] = silu(input[j]) · input[d + j]`, with `silu(x) = x / (1 + e^−x)`.",
    source: "`flashinfer/jit/activation.py`, `include/flashinfer/activation.cuh`",
    runs_on: RunsOn::AtLeast(7, 5),
    arguments: &[
        tensor("out", Role::Out, Dtype::Half, &[Size::Of(0), Size::Of(1)]),
        tensor("input", Role::In, Dtype::As(0), &[Size::Of(0), Size::Twice(1)]),
        Argument { name: "enable_pdl", kind: Kind::EnablePdl },
    ],
    // Its device is what the launcher selects, and whose stream it takes.
    lead: 0,
    dimensions: &[
        Dimension { name: "tokens", from: From::Shape(0, 0), least: 0, most: MOST, examples: &[5, 1, 33] },
        Dimension { name: "d", from: From::Shape(0, 1), least: 0, most: MOST, examples: &[1024, 8, 4104, 12] },
    ],
    relations: &[WHOLE_VECTORS],
    // Offsets are 64 bits wide.
    extent: Extent { most: i64::MAX / 8, split: false, stride: i64::MAX },
    pdl: Pdl::Waits,
    attributes: Attributes::None,
    reports: Reports::LastError,
    uses_current_device: true,
    convention: Convention::Views,
    hazards: &[],
    tolerance: [3e-3, 5e-4],
    tests: "`tests/activation.rs`, `tests/activation_gpu.rs`, `tests/properties_gpu.rs`",
};

kernels! {
    /// [`silu_and_mul`].
    SiluAndMul = SILU;
    /// [`gelu_and_mul`].
    GeluAndMul = Row {
        kernel: "gelu_and_mul",
        function: "gelu_and_mul",
        library: "gelu_and_mul.so",
        summary: "`out[j] = gelu(input[j]) · input[d + j]`, with `gelu(x) = x/2 · (1 + erf(x/√2))`.",
        ..SILU
    };
    /// [`gelu_tanh_and_mul`].
    GeluTanhAndMul = Row {
        kernel: "gelu_tanh_and_mul",
        function: "gelu_tanh_and_mul",
        library: "gelu_tanh_and_mul.so",
        summary: "`out[j] = gelu_tanh(input[j]) · input[d + j]`, with `gelu_tanh(x) = x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))`.",
        // The hardware's tanh is good to 11 bits.
        tolerance: [3e-3, 8e-4],
        ..SILU
    };
}

/// Whether the kernels run on a device: on the host always, on a GPU by its compute capability. A wheel may have been
/// compiled for fewer; then the first call raises `no kernel image`.
///
/// # Errors
/// [`DeviceOutOfRange`](crate::FlashInferError::DeviceOutOfRange), or why there is no GPU.
pub fn is_supported(device: Device) -> Result<bool> {
    Entry::of::<SiluAndMul>().is_supported(device)
}

/// How an activation is launched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ActivationOptions {
    /// Programmatic dependent launch: the kernel may start before the one ahead of it in the stream has ended. It waits
    /// for that one's results by itself. Off by default.
    pub pdl: bool,
}

impl ActivationOptions {
    /// With programmatic dependent launch on or off.
    #[must_use]
    pub fn with_pdl(mut self, pdl: bool) -> Self {
        self.pdl = pdl;
        self
    }
}

/// SiLU of the first half of each token, times the second: `out[j] = silu(input[j]) · input[d + j]`, with
/// `silu(x) = x / (1 + e^−x)`. The MLP of Llama, Qwen and DeepSeek, after its gate and up projections.
///
/// <!-- silu_and_mul -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `out` | `[tokens, d]` | F16 or BF16 | written; contiguous; aligned to 16 bytes |
/// | `input` | `[tokens, 2 d]` | as `out` | read; contiguous; aligned to 16 bytes |
///
/// ```
/// # use flashinfer_rs::kernels::activation::{ActivationOptions, silu_and_mul};
/// # use flashinfer_rs::{FlashInferRuntime, RuntimeConfig, Stream, TensorMut, TensorRef};
/// # FlashInferRuntime::initialize(RuntimeConfig::default())?;
/// // One token: two numbers, then two that gate them.
/// let (input, mut out) = ([0f32, 2.0, 5.0, 3.0], [0f32; 2]);
/// silu_and_mul(
///     &mut TensorMut::from_slice(&mut out, &[1, 2])?,
///     &TensorRef::from_slice(&input, &[1, 4])?,
///     &ActivationOptions::default(),
///     Stream::NULL,
/// )?;
/// assert_eq!(out, [0.0, 6.0 / (1.0 + (-2f32).exp())]);
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
///
/// # Errors
/// See the [module](self).
pub fn silu_and_mul(
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    options: &ActivationOptions,
    stream: Stream<'_>,
) -> Result<()> {
    // SAFETY: the kernel reads nothing in device memory to find its way.
    unsafe { call::<SiluAndMul, 3>([out.operand(), input.operand(), Operand::Bool(options.pdl)], stream) }
}

/// GELU of the first half of each token, times the second: `out[j] = gelu(input[j]) · input[d + j]`, with
/// `gelu(x) = x/2 · (1 + erf(x/√2))`.
///
/// <!-- gelu_and_mul -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `out` | `[tokens, d]` | F16 or BF16 | written; contiguous; aligned to 16 bytes |
/// | `input` | `[tokens, 2 d]` | as `out` | read; contiguous; aligned to 16 bytes |
///
/// # Errors
/// See the [module](self).
pub fn gelu_and_mul(
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    options: &ActivationOptions,
    stream: Stream<'_>,
) -> Result<()> {
    // SAFETY: the kernel reads nothing in device memory to find its way.
    unsafe { call::<GeluAndMul, 3>([out.operand(), input.operand(), Operand::Bool(options.pdl)], stream) }
}

/// As [`gelu_and_mul`], with GELU's usual approximation, as Gemma has it:
/// `gelu_tanh(x) = x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))`. On a GPU tanh is the hardware's own, good to 11 bits, also
/// where `1 + tanh` is near 0.
///
/// <!-- gelu_tanh_and_mul -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `out` | `[tokens, d]` | F16 or BF16 | written; contiguous; aligned to 16 bytes |
/// | `input` | `[tokens, 2 d]` | as `out` | read; contiguous; aligned to 16 bytes |
///
/// # Errors
/// See the [module](self).
pub fn gelu_tanh_and_mul(
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    options: &ActivationOptions,
    stream: Stream<'_>,
) -> Result<()> {
    // SAFETY: the kernel reads nothing in device memory to find its way.
    unsafe { call::<GeluTanhAndMul, 3>([out.operand(), input.operand(), Operand::Bool(options.pdl)], stream) }
}

/// The prepared forms.
macro_rules! prepared {
    ($($kernel:ident)+) => {$(
        impl Prepared<$kernel> {
            /// Checks the call once. Tensors of the same form, wherever they are, may stand in these tensors' places.
            ///
            /// # Errors
            /// As for the call itself.
            pub fn new(out: &TensorMut<'_>, input: &TensorRef<'_>, options: &ActivationOptions) -> Result<Self> {
                Self::checked(&[out.operand(), input.operand(), Operand::Bool(options.pdl)])
            }

            /// Launches the kernel on these tensors, asynchronously on `stream`; on the host it is computed at once.
            ///
            /// # Errors
            /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for a tensor that differs from the one that was
            /// prepared in more than its memory, or is for another stream; and what the launch came to.
            #[inline]
            pub fn launch(&self, out: &mut TensorMut<'_>, input: &TensorRef<'_>, stream: Stream<'_>) -> Result<()> {
                // SAFETY: the kernel reads nothing in device memory to find its way.
                unsafe { self.launch_with::<3>(&[out.operand(), input.operand()], stream) }
            }
        }
    )+};
}

prepared! { SiluAndMul GeluAndMul GeluTanhAndMul }
