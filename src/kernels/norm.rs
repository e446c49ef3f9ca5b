//! `norm.so`: RMSNorm and its relatives.
//!
//! What holds for all of them:
//! - Rows lie along the last dimension, whose stride is 1. But for [`layernorm`], whose tensors are contiguous, other strides
//!   are free multiples of the vector, gcd(8, columns) elements, and so is the address: heads may come before tokens, and an
//!   input may repeat a row with a stride of 0.
//! - On a GPU a call is asynchronous on `stream` and never synchronizes; tensors on the host are computed by the
//!   [reference](crate::reference), at once. Empty tensors are a no-op.
//! - Release 0.6.3 counts elements in 32 bits, [`layernorm`] in 31, and is silently wrong past that; larger tensors are split
//!   here into several launches, on row boundaries.
//! - GPUs: those that the wheel was compiled for, from compute capability 7.5 on.
//!
//! # Errors
//! Every function answers [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for what breaks its contract,
//! before anything is launched; [`DeviceOutOfRange`](crate::FlashInferError::DeviceOutOfRange); what loading `norm.so`
//! answers; [`TvmFfiCall`](crate::FlashInferError::TvmFfiCall) with what the kernel raised; and
//! [`Cuda`](crate::FlashInferError::Cuda) or [`ContextLost`](crate::FlashInferError::ContextLost) where it was not launched.

use crate::contract::{
    Alignment, Argument, Attributes, Contents, Convention, Dimension, Dimensions, Dtype, Extent, From, Kind, Operand,
    Pdl, Relation, Reports, Role, Row, RunsOn, Size, Strides, Tensor,
};
use crate::engine::{Entry, call, kernels};
use crate::error::Result;
use crate::prepared::Prepared;
use crate::stream::Stream;
use crate::tensor::{DType, Device, TensorMut, TensorRef};

/// Shared memory that a block can have on the largest GPUs (compute capability 9.0).
const SHARED_MEMORY: i64 = 227 << 10;

const MOST: i64 = i32::MAX as i64;

/// The dimensions of `[rows, columns]`, whose sizes the argument with this place has.
const fn rows_and_columns(argument: usize) -> [Dimension; 2] {
    [dimension("rows", argument, 0, &[5, 1, 33]), dimension("columns", argument, 1, &[1024, 8, 4096, 12, 7])]
}

const fn dimension(name: &'static str, argument: usize, at: usize, examples: &'static [i64]) -> Dimension {
    Dimension { name, from: From::Shape(argument, at), least: 0, most: MOST, examples }
}

const ROWS_AND_COLUMNS: &[Size] = &[Size::Of(0), Size::Of(1)];
const PER_HEAD: &[Size] = &[Size::Of(0), Size::Of(1), Size::Of(2)];

/// A tensor of rows, whose last dimension is the shape's last.
const fn rows(name: &'static str, role: Role, dtype: Dtype, shape: &'static [Size]) -> Argument {
    let alignment = Alignment::Vector { dimension: shape.len() - 1, most: 8 };
    let (strides, contents) = (Strides::Rows, Contents::Uniform(1.0));
    Argument { name, kind: Kind::Tensor(Tensor { role, optional: false, dtype, shape, strides, alignment, contents }) }
}

/// The weight, as long as a row: as long as dimension `columns`.
const fn weight(shape: &'static [Size], columns: usize, input: usize) -> Argument {
    let (role, dtype, contents) = (Role::In, Dtype::As(input), Contents::Uniform(1.0));
    let (strides, alignment) = (Strides::Rows, Alignment::Vector { dimension: columns, most: 8 });
    let tensor = Tensor { role, optional: false, dtype, shape, strides, alignment, contents };
    Argument { name: "weight", kind: Kind::Tensor(tensor) }
}

const EPS: Argument = Argument { name: "eps", kind: Kind::Positive };
const SCALE: Argument = Argument { name: "scale", kind: Kind::Positive };
const ENABLE_PDL: Argument = Argument { name: "enable_pdl", kind: Kind::EnablePdl };

/// The fused forms keep a row in shared memory as f32, and the sums of the warps, of which there are whole quads.
const FITS_SHARED_MEMORY: Relation = Relation {
    name: "columns",
    only_on_gpu: true,
    holds: |sizes| row_bytes(sizes) <= SHARED_MEMORY,
    found: |sizes| format!("{}, which take {} bytes of shared memory", sizes[1], row_bytes(sizes)),
    expected: "few enough for the 232448 bytes of shared memory that a block has, about 58,000",
};

const fn row_bytes(sizes: &Dimensions) -> i64 {
    let columns = sizes[1];
    let shift = if columns.trailing_zeros() < 3 { columns.trailing_zeros() } else { 3 };
    let threads = if columns >> shift < 1024 { columns >> shift } else { 1024 };
    (4 * ((threads + 127) / 128) + columns).saturating_mul(4)
}

/// Release 0.6.3 raises a kernel's limit of shared memory where a row takes 48 KiB or more, but forgets 400 bytes of its own: a
/// row that is just below is never launched. A row that does not fit at all leaves an error behind.
const FITS_LAYERNORM: Relation = Relation {
    name: "columns",
    only_on_gpu: true,
    holds: |sizes| {
        let bytes = 2 * sizes[1];
        (bytes + 400 <= 48 << 10) | (bytes >= 48 << 10) & (bytes + 400 <= SHARED_MEMORY)
    },
    found: |sizes| sizes[1].to_string(),
    expected: "at most 24,376, or 24,576 to 116,024: with the others release 0.6.3 does not launch the kernel",
};

const COUNTED_ROWS: Relation = Relation {
    name: "heads",
    only_on_gpu: false,
    holds: |sizes| sizes[0] * sizes[1] <= MOST,
    found: |sizes| format!("{}, and so {} rows", sizes[1], sizes[0] * sizes[1]),
    expected: "few enough for 2^31 - 1 rows of all tokens",
};

/// What the norms have in common.
const NORM: Row = Row {
    kernel: "",
    function: "",
    library: "norm.so",
    feature: "norm",
    summary: "",
    source: "`csrc/norm.cu`, `include/flashinfer/norm.cuh`",
    runs_on: RunsOn::AtLeast(7, 5),
    arguments: &[],
    lead: 1,
    dimensions: &rows_and_columns(1),
    relations: &[],
    // Elements are counted in 32 bits.
    extent: Extent { most: 1 << 32, split: true, stride: i64::MAX },
    pdl: Pdl::Waits,
    attributes: Attributes::PerCall,
    reports: Reports::Status,
    uses_current_device: false,
    convention: Convention::Views,
    hazards: &[],
    tolerance: [3e-3, 5e-4],
    tests: "`tests/norm_gpu.rs`, `tests/gemma_rmsnorm_gpu.rs`, `tests/properties_gpu.rs`, `tests/reference.rs`",
};

/// `out`, `input`, `weight`, `eps`, `enable_pdl`.
const OF_ROWS: &[Argument] = &[
    rows("out", Role::Out, Dtype::As(1), ROWS_AND_COLUMNS),
    rows("input", Role::In, Dtype::Half, ROWS_AND_COLUMNS),
    weight(&[Size::Of(1)], 1, 1),
    EPS,
    ENABLE_PDL,
];

/// `input`, `residual`, `weight`, `eps`, `enable_pdl`.
const FUSED: &[Argument] = &[
    rows("input", Role::InPlace, Dtype::Half, ROWS_AND_COLUMNS),
    rows("residual", Role::InPlace, Dtype::As(0), ROWS_AND_COLUMNS),
    weight(&[Size::Of(1)], 1, 0),
    EPS,
    ENABLE_PDL,
];

/// Rounded to 3 or 2 bits of mantissa, where a last bit of the sum may tip a number to its neighbour.
const EIGHT_BIT_TOLERANCE: [f64; 2] = [2e-2, 2e-2];

kernels! {
    /// [`rmsnorm`] of two dimensions.
    Rmsnorm = Row {
        kernel: "rmsnorm",
        function: "rmsnorm",
        summary: "`out[i] = input[i] / √(mean(input[i]²) + eps) · weight`, row by row.",
        arguments: OF_ROWS,
        ..NORM
    };
    /// [`rmsnorm`] of three dimensions: of every head.
    RmsnormPerHead = Row {
        kernel: "rmsnorm of heads",
        function: "rmsnorm",
        summary: "As rmsnorm, for every head of every token: the norm of queries and keys.",
        arguments: &[
            rows("out", Role::Out, Dtype::As(1), PER_HEAD),
            rows("input", Role::In, Dtype::Half, PER_HEAD),
            weight(&[Size::Of(2)], 2, 1),
            EPS,
            ENABLE_PDL,
        ],
        dimensions: &[
            dimension("tokens", 1, 0, &[5, 1, 17]),
            dimension("heads", 1, 1, &[4, 1, 3]),
            dimension("columns", 1, 2, &[128, 8, 64, 12, 7]),
        ],
        relations: &[COUNTED_ROWS],
        attributes: Attributes::None,
        ..NORM
    };
    /// [`gemma_rmsnorm`].
    GemmaRmsnorm = Row {
        kernel: "gemma_rmsnorm",
        function: "gemma_rmsnorm",
        summary: "`out[i] = input[i] / √(mean(input[i]²) + eps) · (1 + weight)`, row by row.",
        arguments: OF_ROWS,
        ..NORM
    };
    /// [`fused_add_rmsnorm`].
    FusedAddRmsnorm = Row {
        kernel: "fused_add_rmsnorm",
        function: "fused_add_rmsnorm",
        summary: "`residual ← input + residual`, then `input ← rmsnorm(residual)`, of the sum before it is rounded.",
        arguments: FUSED,
        lead: 0,
        dimensions: &rows_and_columns(0),
        relations: &[FITS_SHARED_MEMORY],
        ..NORM
    };
    /// [`gemma_fused_add_rmsnorm`].
    GemmaFusedAddRmsnorm = Row {
        kernel: "gemma_fused_add_rmsnorm",
        function: "gemma_fused_add_rmsnorm",
        summary: "As fused_add_rmsnorm, with `1 + weight` in the weight's place.",
        arguments: FUSED,
        lead: 0,
        dimensions: &rows_and_columns(0),
        relations: &[FITS_SHARED_MEMORY],
        ..NORM
    };
    /// [`rmsnorm_quant`].
    RmsnormQuant = Row {
        kernel: "rmsnorm_quant",
        function: "rmsnorm_quant",
        summary: "`out = clamp(rmsnorm(input) / scale, −448, 448)`.",
        arguments: &[
            rows("out", Role::Out, Dtype::Eight, ROWS_AND_COLUMNS),
            rows("input", Role::In, Dtype::Half, ROWS_AND_COLUMNS),
            weight(&[Size::Of(1)], 1, 1),
            SCALE,
            EPS,
            ENABLE_PDL,
        ],
        tolerance: EIGHT_BIT_TOLERANCE,
        ..NORM
    };
    /// [`fused_add_rmsnorm_quant`].
    FusedAddRmsnormQuant = Row {
        kernel: "fused_add_rmsnorm_quant",
        function: "fused_add_rmsnorm_quant",
        summary: "`residual ← input + residual`, then `out = clamp(rmsnorm(residual) / scale, −448, 448)`.",
        arguments: &[
            rows("out", Role::Out, Dtype::Eight, ROWS_AND_COLUMNS),
            rows("input", Role::In, Dtype::Half, ROWS_AND_COLUMNS),
            rows("residual", Role::InPlace, Dtype::As(1), ROWS_AND_COLUMNS),
            weight(&[Size::Of(1)], 1, 1),
            SCALE,
            EPS,
            ENABLE_PDL,
        ],
        relations: &[FITS_SHARED_MEMORY],
        tolerance: EIGHT_BIT_TOLERANCE,
        ..NORM
    };
    /// [`layernorm`].
    Layernorm = Row {
        kernel: "layernorm",
        function: "layernorm",
        summary: "`out[i] = (input[i] − mean) / √(variance + eps) · gamma + beta`, row by row.",
        arguments: &[
            pairs("out", Role::Out, Dtype::As(1), ROWS_AND_COLUMNS),
            pairs("input", Role::In, Dtype::Bf16, ROWS_AND_COLUMNS),
            pairs("gamma", Role::In, Dtype::Only(DType::F32), &[Size::Of(1)]),
            pairs("beta", Role::In, Dtype::Only(DType::F32), &[Size::Of(1)]),
            EPS,
        ],
        relations: &[FITS_LAYERNORM],
        // Offsets are signed here.
        extent: Extent { most: MOST, split: true, stride: i64::MAX },
        pdl: Pdl::None,
        reports: Reports::Nothing,
        convention: Convention::Objects,
        ..NORM
    };
}

/// A contiguous tensor that is moved two elements at a time, where their number is even.
const fn pairs(name: &'static str, role: Role, dtype: Dtype, shape: &'static [Size]) -> Argument {
    let alignment = Alignment::Vector { dimension: 1, most: 2 };
    let (strides, contents) = (Strides::Contiguous, Contents::Uniform(1.0));
    Argument { name, kind: Kind::Tensor(Tensor { role, optional: false, dtype, shape, strides, alignment, contents }) }
}

/// Whether the norms run on a device: on the host always, on a GPU by its compute capability. A wheel may have been
/// compiled for fewer; then the first call raises `no kernel image`.
///
/// # Errors
/// [`DeviceOutOfRange`](crate::FlashInferError::DeviceOutOfRange), or why there is no GPU.
pub fn is_supported(device: Device) -> Result<bool> {
    Entry::of::<Rmsnorm>().is_supported(device)
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

    #[inline(always)]
    fn operands<'a>(&self) -> (Operand<'a, 'a>, Operand<'a, 'a>) {
        (Operand::Number(self.eps), Operand::Bool(self.pdl))
    }
}

/// RMSNorm: `out[i] = input[i] / √(mean(input[i]²) + eps) · weight`, row by row; of three dimensions, of every head.
///
/// <!-- rmsnorm -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `out` | `[rows, columns]` | as `input` | written; rows anywhere; aligned to gcd(8, columns) elements |
/// | `input` | `[rows, columns]` | F16 or BF16 | read; rows anywhere, also repeated; aligned to gcd(8, columns) elements |
/// | `weight` | `[columns]` | as `input` | read; stride 1; aligned to gcd(8, columns) elements |
///
/// <!-- rmsnorm of heads -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `out` | `[tokens, heads, columns]` | as `input` | written; rows anywhere; aligned to gcd(8, columns) elements |
/// | `input` | `[tokens, heads, columns]` | F16 or BF16 | read; rows anywhere, also repeated; aligned to gcd(8, columns) elements |
/// | `weight` | `[columns]` | as `input` | read; stride 1; aligned to gcd(8, columns) elements |
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
    rmsnorm_of(out.operand(), input.operand(), weight, options, stream)
}

/// [`rmsnorm`] of a tensor onto itself: the norm of queries and keys, for example.
///
/// # Errors
/// See the [module](self).
pub fn rmsnorm_in_place(
    tensor: &mut TensorMut<'_>,
    weight: &TensorRef<'_>,
    options: &NormOptions,
    stream: Stream<'_>,
) -> Result<()> {
    rmsnorm_of(tensor.operand(), tensor.operand(), weight, options, stream)
}

#[inline(always)]
fn rmsnorm_of(
    out: Operand<'_, '_>,
    input: Operand<'_, '_>,
    weight: &TensorRef<'_>,
    options: &NormOptions,
    stream: Stream<'_>,
) -> Result<()> {
    let (eps, pdl) = options.operands();
    let operands = [out, input, weight.operand(), eps, pdl];
    if input.layout().is_some_and(|input| input.ndim() == 3) {
        // SAFETY: no norm reads device memory to find its way; that tensors are distinct, or one in place, their borrows say.
        return unsafe { call::<RmsnormPerHead, 5>(operands, stream) };
    }
    // SAFETY: as above.
    unsafe { call::<Rmsnorm, 5>(operands, stream) }
}

/// Gemma's RMSNorm: `out[i] = input[i] / √(mean(input[i]²) + eps) · (1 + weight)`, row by row.
///
/// <!-- gemma_rmsnorm -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `out` | `[rows, columns]` | as `input` | written; rows anywhere; aligned to gcd(8, columns) elements |
/// | `input` | `[rows, columns]` | F16 or BF16 | read; rows anywhere, also repeated; aligned to gcd(8, columns) elements |
/// | `weight` | `[columns]` | as `input` | read; stride 1; aligned to gcd(8, columns) elements |
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
    let (eps, pdl) = options.operands();
    // SAFETY: no norm reads device memory to find its way.
    unsafe { call::<GemmaRmsnorm, 5>([out.operand(), input.operand(), weight.operand(), eps, pdl], stream) }
}

/// [`gemma_rmsnorm`] of a tensor onto itself.
///
/// # Errors
/// See the [module](self).
pub fn gemma_rmsnorm_in_place(
    tensor: &mut TensorMut<'_>,
    weight: &TensorRef<'_>,
    options: &NormOptions,
    stream: Stream<'_>,
) -> Result<()> {
    let (eps, pdl) = options.operands();
    let tensor = tensor.operand();
    // SAFETY: no norm reads device memory to find its way; each row is read whole before it is written.
    unsafe { call::<GemmaRmsnorm, 5>([tensor, tensor, weight.operand(), eps, pdl], stream) }
}

/// Adds and norms: `residual ← input + residual`, then `input ← residual / √(mean(residual²) + eps) · weight`, row by
/// row. The sum is normed before it is rounded.
///
/// <!-- fused_add_rmsnorm -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `input` | `[rows, columns]` | F16 or BF16 | read and written; rows anywhere; aligned to gcd(8, columns) elements |
/// | `residual` | `[rows, columns]` | as `input` | read and written; rows anywhere; aligned to gcd(8, columns) elements |
/// | `weight` | `[columns]` | as `input` | read; stride 1; aligned to gcd(8, columns) elements |
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
    let (eps, pdl) = options.operands();
    // SAFETY: no norm reads device memory to find its way.
    unsafe { call::<FusedAddRmsnorm, 5>([input.operand(), residual.operand(), weight.operand(), eps, pdl], stream) }
}

/// As [`fused_add_rmsnorm`], with `1 + weight` in the weight's place.
///
/// <!-- gemma_fused_add_rmsnorm -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `input` | `[rows, columns]` | F16 or BF16 | read and written; rows anywhere; aligned to gcd(8, columns) elements |
/// | `residual` | `[rows, columns]` | as `input` | read and written; rows anywhere; aligned to gcd(8, columns) elements |
/// | `weight` | `[columns]` | as `input` | read; stride 1; aligned to gcd(8, columns) elements |
///
/// # Errors
/// See the [module](self). A row must fit a block's shared memory as f32: 58,000 columns or so.
pub fn gemma_fused_add_rmsnorm(
    input: &mut TensorMut<'_>,
    residual: &mut TensorMut<'_>,
    weight: &TensorRef<'_>,
    options: &NormOptions,
    stream: Stream<'_>,
) -> Result<()> {
    let (eps, pdl) = options.operands();
    let operands = [input.operand(), residual.operand(), weight.operand(), eps, pdl];
    // SAFETY: no norm reads device memory to find its way.
    unsafe { call::<GemmaFusedAddRmsnorm, 5>(operands, stream) }
}

/// [`rmsnorm`] of two dimensions with an 8-bit output: `out = clamp(rmsnorm(input) / scale, −448, 448)`. `scale` is positive.
///
/// <!-- rmsnorm_quant -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `out` | `[rows, columns]` | F8E4M3 or F8E5M2 | written; rows anywhere; aligned to gcd(8, columns) elements |
/// | `input` | `[rows, columns]` | F16 or BF16 | read; rows anywhere, also repeated; aligned to gcd(8, columns) elements |
/// | `weight` | `[columns]` | as `input` | read; stride 1; aligned to gcd(8, columns) elements |
///
/// # Errors
/// See the [module](self).
pub fn rmsnorm_quant(
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    weight: &TensorRef<'_>,
    scale: f64,
    options: &NormOptions,
    stream: Stream<'_>,
) -> Result<()> {
    let (eps, pdl) = options.operands();
    let operands = [out.operand(), input.operand(), weight.operand(), Operand::Number(scale), eps, pdl];
    // SAFETY: no norm reads device memory to find its way.
    unsafe { call::<RmsnormQuant, 6>(operands, stream) }
}

/// [`fused_add_rmsnorm`] with an 8-bit output: `residual ← input + residual`, then
/// `out = clamp(rmsnorm(residual) / scale, −448, 448)`; `input` is only read. `scale` is positive.
///
/// <!-- fused_add_rmsnorm_quant -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `out` | `[rows, columns]` | F8E4M3 or F8E5M2 | written; rows anywhere; aligned to gcd(8, columns) elements |
/// | `input` | `[rows, columns]` | F16 or BF16 | read; rows anywhere, also repeated; aligned to gcd(8, columns) elements |
/// | `residual` | `[rows, columns]` | as `input` | read and written; rows anywhere; aligned to gcd(8, columns) elements |
/// | `weight` | `[columns]` | as `input` | read; stride 1; aligned to gcd(8, columns) elements |
///
/// # Errors
/// See the [module](self). A row must fit a block's shared memory as f32: 58,000 columns or so.
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
    let (eps, pdl) = options.operands();
    let (tensors, weight) = ([out.operand(), input.operand(), residual.operand()], weight.operand());
    let operands = [tensors[0], tensors[1], tensors[2], weight, Operand::Number(scale), eps, pdl];
    // SAFETY: no norm reads device memory to find its way.
    unsafe { call::<FusedAddRmsnormQuant, 7>(operands, stream) }
}

/// LayerNorm: `out[i] = (input[i] − mean) / √(variance + eps) · gamma + beta`, row by row. Programmatic dependent launch is
/// not for this one. On the host it also takes F16 and F32.
///
/// <!-- layernorm -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `out` | `[rows, columns]` | as `input` | written; contiguous; aligned to gcd(2, columns) elements |
/// | `input` | `[rows, columns]` | BF16 | read; contiguous; aligned to gcd(2, columns) elements |
/// | `gamma` | `[columns]` | F32 | read; contiguous; aligned to gcd(2, columns) elements |
/// | `beta` | `[columns]` | F32 | read; contiguous; aligned to gcd(2, columns) elements |
///
/// Upstream takes these tensors as reference-counted objects: a call allocates four of them.
///
/// # Errors
/// See the [module](self). On a GPU rows of 24,377 to 24,575 columns are refused, which release 0.6.3 does not compute,
/// and rows of more than 116,024.
pub fn layernorm(
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    gamma: &TensorRef<'_>,
    beta: &TensorRef<'_>,
    eps: f64,
    stream: Stream<'_>,
) -> Result<()> {
    let operands = [out.operand(), input.operand(), gamma.operand(), beta.operand(), Operand::Number(eps)];
    // SAFETY: no norm reads device memory to find its way.
    unsafe { call::<Layernorm, 5>(operands, stream) }
}

/// How a tensor is given to a call that is prepared, and to its launches.
macro_rules! given {
    (mut) => { &TensorMut<'_> };
    (ref) => { &TensorRef<'_> };
    (launch mut) => { &mut TensorMut<'_> };
    (launch ref) => { &TensorRef<'_> };
}

/// The prepared forms of the norms: each one's tensors in their order, and the number of all arguments.
macro_rules! prepared {
    ($($kernel:ident of $count:literal: $($how:tt $tensor:ident),+ $(; $scale:ident)?)+) => {$(
        impl Prepared<$kernel> {
            /// Checks the call once. Tensors of the same form, wherever they are, may stand in these tensors' places.
            ///
            /// # Errors
            /// As for the call itself.
            pub fn new($($tensor: given!($how),)+ $($scale: f64,)? options: &NormOptions) -> Result<Self> {
                let (eps, pdl) = options.operands();
                Self::checked(&[$($tensor.operand(),)+ $(Operand::Number($scale),)? eps, pdl])
            }

            /// Launches the kernel on these tensors, asynchronously on `stream`; on the host it is computed at once.
            ///
            /// # Errors
            /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for a tensor that differs from the one that was
            /// prepared in more than its memory, or is for another stream; and what the launch came to.
            #[inline]
            pub fn launch(&self, $($tensor: given!(launch $how),)+ stream: Stream<'_>) -> Result<()> {
                // SAFETY: no norm reads device memory to find its way.
                unsafe { self.launch_with::<$count>(&[$($tensor.operand()),+], stream) }
            }
        }
    )+};
}

prepared! {
    Rmsnorm of 5: mut out, ref input, ref weight
    RmsnormPerHead of 5: mut out, ref input, ref weight
    GemmaRmsnorm of 5: mut out, ref input, ref weight
    FusedAddRmsnorm of 5: mut input, mut residual, ref weight
    GemmaFusedAddRmsnorm of 5: mut input, mut residual, ref weight
    RmsnormQuant of 6: mut out, ref input, ref weight; scale
    FusedAddRmsnormQuant of 7: mut out, ref input, mut residual, ref weight; scale
}

macro_rules! prepared_in_place {
    ($($kernel:ident)+) => {$(
        impl Prepared<$kernel> {
            /// As [`launch`](Self::launch), of a tensor onto itself.
            ///
            /// # Errors
            /// As for [`launch`](Self::launch).
            #[inline]
            pub fn launch_in_place(
                &self,
                tensor: &mut TensorMut<'_>,
                weight: &TensorRef<'_>,
                stream: Stream<'_>,
            ) -> Result<()> {
                let tensor = tensor.operand();
                // SAFETY: no norm reads device memory to find its way; each row is read whole before it is written.
                unsafe { self.launch_with::<5>(&[tensor, tensor, weight.operand()], stream) }
            }
        }
    )+};
}

prepared_in_place! { Rmsnorm RmsnormPerHead GemmaRmsnorm }
