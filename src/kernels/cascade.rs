//! `cascade.so`: merging the states of attention over parts of a sequence, each an output `v` with the logarithm `s`, to the
//! base 2, of the sum that it was divided by.
//!
//! On a GPU a call is asynchronous on `stream` and never synchronizes; tensors on the host are computed by the
//! [reference](crate::reference), at once. Without tokens a call is a no-op.
//!
//! # Errors
//! Every function answers [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for what breaks its contract,
//! before anything is launched; [`DeviceOutOfRange`](crate::FlashInferError::DeviceOutOfRange); what loading `cascade.so`
//! answers; [`TvmFfiCall`](crate::FlashInferError::TvmFfiCall) with what the kernel raised; and
//! [`Cuda`](crate::FlashInferError::Cuda) or [`ContextLost`](crate::FlashInferError::ContextLost) where it was not launched.

use crate::contract::{
    Alignment, Argument, Attributes, Contents, Convention, Dimension, Dimensions, Dtype, Extent, From, Kind, Operand,
    Pdl, Relation, Reports, Role, Row, RunsOn, Size, Strides, Tensor,
};
use crate::engine::{Entry, call, kernels};
use crate::error::Result;
use crate::stream::Stream;
use crate::tensor::{DType, Device, TensorMut, TensorRef};

const MOST: i64 = i32::MAX as i64;

/// Threads of a block, which has all heads of a token.
const THREADS: i64 = 1024;

const fn tensor(
    name: &'static str,
    role: Role,
    (dtype, alignment): (Dtype, usize),
    shape: &'static [Size],
    contents: Contents,
) -> Argument {
    let (strides, alignment) = (Strides::Contiguous, Alignment::Bytes(alignment));
    Argument { name, kind: Kind::Tensor(Tensor { role, optional: false, dtype, shape, strides, alignment, contents }) }
}

/// Outputs are moved 16 bytes at a time, logarithms one by one.
const fn v(name: &'static str, role: Role, dtype: Dtype, shape: &'static [Size]) -> Argument {
    tensor(name, role, (dtype, 16), shape, Contents::Uniform(1.0))
}

const fn s(name: &'static str, role: Role, shape: &'static [Size]) -> Argument {
    tensor(name, role, (Dtype::Only(DType::F32), 4), shape, Contents::Uniform(3.0))
}

const fn dimension(name: &'static str, from: From, least: i64, examples: &'static [i64]) -> Dimension {
    Dimension { name, from, least, most: MOST, examples }
}

const V: &[Size] = &[Size::Of(0), Size::Of(1), Size::Of(2)];
const S: &[Size] = &[Size::Of(0), Size::Of(1)];

/// The dimensions of `[tokens, heads, head_dim]`, whose sizes the argument with this place has.
const fn dimensions(argument: usize) -> [Dimension; 3] {
    [
        dimension("tokens", From::Shape(argument, 0), 0, &[7, 1, 64]),
        dimension("heads", From::Shape(argument, 1), 1, &[8, 1, 32]),
        dimension("head_dim", From::Shape(argument, 2), 1, &[128, 64, 256, 512]),
    ]
}

const COMPILED: Relation = Relation {
    name: "head_dim",
    only_on_gpu: true,
    holds: |sizes| matches!(sizes[2], 64 | 128 | 256 | 512),
    found: |sizes| sizes[2].to_string(),
    expected: "64, 128, 256 or 512, for which the kernel is compiled",
};

const FITS_BLOCK: Relation = Relation {
    name: "heads",
    only_on_gpu: true,
    holds: |sizes| threads(sizes) <= THREADS,
    found: |sizes| format!("{}, which take {} threads", sizes[1], threads(sizes)),
    expected: "few enough for a block's 1,024 threads: 128 of 64 elements, 64 of 128, 32 of 256 or 512",
};

const fn threads(sizes: &Dimensions) -> i64 {
    let vector = if sizes[2] / 32 > 8 { sizes[2] / 32 } else { 8 };
    sizes[1].saturating_mul(sizes[2] / vector)
}

const MERGE: Row = Row {
    kernel: "merge_state",
    function: "merge_state",
    library: "cascade.so",
    feature: "cascade",
    summary: "Merges two states: `w = 2^s`, `v_merged = Σ w v / Σ w`, `s_merged = log2 Σ w`.",
    source: "`csrc/cascade.cu`, `include/flashinfer/attention/cascade.cuh`",
    runs_on: RunsOn::AtLeast(7, 5),
    arguments: &[
        v("v_a", Role::In, Dtype::Half, V),
        s("s_a", Role::In, S),
        v("v_b", Role::In, Dtype::As(0), V),
        s("s_b", Role::In, S),
        v("v_merged", Role::Out, Dtype::As(0), V),
        s("s_merged", Role::Out, S),
    ],
    lead: 0,
    dimensions: &dimensions(0),
    relations: &[COMPILED, FITS_BLOCK],
    // Elements are counted in 32 bits.
    extent: Extent { most: 1 << 32, split: true, stride: i64::MAX },
    pdl: Pdl::None,
    attributes: Attributes::None,
    reports: Reports::Status,
    uses_current_device: false,
    convention: Convention::Views,
    hazards: &[
        "Where both logarithms are −∞ the result is NaN. FlashInfer's own attention writes −5e4 for what it did not see.",
    ],
    tolerance: [4e-3, 6e-4],
    tests: "`tests/cascade_gpu.rs`",
};

kernels! {
    /// [`merge_state`].
    MergeState = MERGE;
    /// [`merge_state_in_place`].
    MergeStateInPlace = Row {
        kernel: "merge_state_in_place",
        function: "merge_state_in_place",
        summary: "Merges another state into one, for the tokens whose mask is not 0.",
        arguments: &[
            v("v", Role::InPlace, Dtype::Half, V),
            s("s", Role::InPlace, S),
            v("v_other", Role::In, Dtype::As(0), V),
            s("s_other", Role::In, S),
            MASK,
        ],
        ..MERGE
    };
    /// [`merge_states`].
    MergeStates = Row {
        kernel: "merge_states",
        function: "merge_states",
        summary: "Merges any number of states of each token.",
        arguments: &[
            v("v", Role::In, Dtype::Half, &[Size::Of(0), Size::Of(3), Size::Of(1), Size::Of(2)]),
            s("s", Role::In, &[Size::Of(0), Size::Of(3), Size::Of(1)]),
            v("v_merged", Role::Out, Dtype::As(0), V),
            s("s_merged", Role::Out, S),
        ],
        dimensions: &[
            dimension("tokens", From::Shape(0, 0), 0, &[7, 1, 64]),
            dimension("heads", From::Shape(0, 2), 1, &[8, 1, 32]),
            dimension("head_dim", From::Shape(0, 3), 1, &[128, 64, 256, 512]),
            dimension("states", From::Shape(0, 1), 1, &[3, 1, 90]),
        ],
        attributes: Attributes::PerCall,
        hazards: &["Logarithms below −5e4 count as −5e4, which is also what the result is where all are."],
        ..MERGE
    };
}

const MASK: Argument =
    match tensor("mask", Role::In, (Dtype::Only(DType::U8), 1), &[Size::Of(0)], Contents::Between(0.0, 2.0)) {
        Argument { name, kind: Kind::Tensor(tensor) } => {
            Argument { name, kind: Kind::Tensor(Tensor { optional: true, ..tensor }) }
        }
        other => other,
    };

/// Whether the kernels run on a device: on the host always, on a GPU by its compute capability.
///
/// # Errors
/// [`DeviceOutOfRange`](crate::FlashInferError::DeviceOutOfRange), or why there is no GPU.
pub fn is_supported(device: Device) -> Result<bool> {
    Entry::of::<MergeState>().is_supported(device)
}

/// Merges two states: `w = 2^s`, `v_merged = (w_a v_a + w_b v_b) / (w_a + w_b)`, `s_merged = log2(w_a + w_b)`.
///
/// <!-- merge_state -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `v_a` | `[tokens, heads, head_dim]` | F16 or BF16 | read; contiguous; aligned to 16 bytes |
/// | `s_a` | `[tokens, heads]` | F32 | read; contiguous; aligned to 4 bytes |
/// | `v_b` | `[tokens, heads, head_dim]` | as `v_a` | read; contiguous; aligned to 16 bytes |
/// | `s_b` | `[tokens, heads]` | F32 | read; contiguous; aligned to 4 bytes |
/// | `v_merged` | `[tokens, heads, head_dim]` | as `v_a` | written; contiguous; aligned to 16 bytes |
/// | `s_merged` | `[tokens, heads]` | F32 | written; contiguous; aligned to 4 bytes |
///
/// # Errors
/// See the [module](self). On a GPU the head size is 64, 128, 256 or 512, and a token's heads must fit a block.
pub fn merge_state(
    v_merged: &mut TensorMut<'_>,
    s_merged: &mut TensorMut<'_>,
    (v_a, s_a): (&TensorRef<'_>, &TensorRef<'_>),
    (v_b, s_b): (&TensorRef<'_>, &TensorRef<'_>),
    stream: Stream<'_>,
) -> Result<()> {
    let inputs = [v_a.operand(), s_a.operand(), v_b.operand(), s_b.operand()];
    let operands = [inputs[0], inputs[1], inputs[2], inputs[3], v_merged.operand(), s_merged.operand()];
    // SAFETY: the kernel reads nothing in device memory to find its way.
    unsafe { call::<MergeState, 6>(operands, stream) }
}

/// Merges another state into one, as [`merge_state`] does; with a mask, only for the tokens whose number in it is not 0.
///
/// <!-- merge_state_in_place -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `v` | `[tokens, heads, head_dim]` | F16 or BF16 | read and written; contiguous; aligned to 16 bytes |
/// | `s` | `[tokens, heads]` | F32 | read and written; contiguous; aligned to 4 bytes |
/// | `v_other` | `[tokens, heads, head_dim]` | as `v` | read; contiguous; aligned to 16 bytes |
/// | `s_other` | `[tokens, heads]` | F32 | read; contiguous; aligned to 4 bytes |
/// | `mask` | `[tokens]` | U8 | read, optional; contiguous; at any address |
///
/// # Errors
/// As for [`merge_state`].
pub fn merge_state_in_place(
    v: &mut TensorMut<'_>,
    s: &mut TensorMut<'_>,
    (v_other, s_other): (&TensorRef<'_>, &TensorRef<'_>),
    mask: Option<&TensorRef<'_>>,
    stream: Stream<'_>,
) -> Result<()> {
    let mask = mask.map_or(Operand::Absent, TensorRef::operand);
    let operands = [v.operand(), s.operand(), v_other.operand(), s_other.operand(), mask];
    // SAFETY: the kernel reads nothing in device memory to find its way.
    unsafe { call::<MergeStateInPlace, 5>(operands, stream) }
}

/// Merges any number of states of each token: `v_merged = Σ w v / Σ w`, `s_merged = log2 Σ w` over the second dimension.
///
/// <!-- merge_states -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `v` | `[tokens, states, heads, head_dim]` | F16 or BF16 | read; contiguous; aligned to 16 bytes |
/// | `s` | `[tokens, states, heads]` | F32 | read; contiguous; aligned to 4 bytes |
/// | `v_merged` | `[tokens, heads, head_dim]` | as `v` | written; contiguous; aligned to 16 bytes |
/// | `s_merged` | `[tokens, heads]` | F32 | written; contiguous; aligned to 4 bytes |
///
/// # Errors
/// As for [`merge_state`].
pub fn merge_states(
    v_merged: &mut TensorMut<'_>,
    s_merged: &mut TensorMut<'_>,
    (v, s): (&TensorRef<'_>, &TensorRef<'_>),
    stream: Stream<'_>,
) -> Result<()> {
    let operands = [v.operand(), s.operand(), v_merged.operand(), s_merged.operand()];
    // SAFETY: the kernel reads nothing in device memory to find its way.
    unsafe { call::<MergeStates, 4>(operands, stream) }
}
