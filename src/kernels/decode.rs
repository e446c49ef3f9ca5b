//! `decode.ptx`: what a decode step needs beside FlashInfer's kernels. These are kernels of this crate's own, which it carries as
//! PTX where it is built with the feature `compute`.
//!
//! What holds for all of them:
//! - Rows lie along the last dimension, whose stride is 1; the strides before it are free, so that heads or columns of a larger
//!   tensor will do. Rows that start at multiples of 16 bytes are moved fastest.
//! - What the kernels find their way by, ids, positions and page tables, is looked at on the GPU: an index that is out of range
//!   is never followed. So the functions are safe whatever device memory holds. On the host such an index is an error.
//! - On a GPU a call is asynchronous on `stream` and never synchronizes; tensors on the host are computed by the
//!   [reference](crate::reference), at once, in F32 too. Empty tensors are a no-op.
//! - Programmatic dependent launch: each kernel waits for the one ahead of it before it touches any memory.
//! - The same numbers give the same bits, whatever else is computed beside them: no sum depends on which block comes first.
//! - GPUs: from compute capability 9.0 on. The driver translates the PTX at the first call, within a second or so.
//!
//! # Errors
//! Every function answers [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for what breaks its contract,
//! before anything is launched; [`DeviceOutOfRange`](crate::FlashInferError::DeviceOutOfRange);
//! [`ArtifactMissing`](crate::FlashInferError::ArtifactMissing) on a GPU without the feature `compute`; on the host
//! [`TvmFfiCall`](crate::FlashInferError::TvmFfiCall) for an index that is out of range; and
//! [`TvmFfiCall`](crate::FlashInferError::TvmFfiCall) or [`ContextLost`](crate::FlashInferError::ContextLost) where a kernel
//! was not launched.

use crate::contract::{
    Alignment, Argument, Attributes, Contents, Convention, Dimension, Dtype, Extent, From, Kind, OWN, Operand, Pdl,
    Relation, Reports, Role, Row, RunsOn, Size, Strides, Tensor,
};
use crate::engine::{Entry, call, kernels};
use crate::error::Result;
use crate::stream::Stream;
use crate::tensor::{DType, Device, TensorMut, TensorRef};

const MOST: i64 = i32::MAX as i64;
/// Rows that have a cluster of eight blocks each.
const MOST_ROWS: i64 = (1 << 28) - 1;

const FLOATS: &[DType] = &[DType::BF16, DType::F16, DType::F32];

/// A tensor of rows anywhere.
const fn rows(name: &'static str, role: Role, dtype: Dtype, shape: &'static [Size], contents: Contents) -> Argument {
    let alignment = Alignment::Vector { dimension: 0, most: 1 };
    let strides = Strides::Rows;
    Argument { name, kind: Kind::Tensor(Tensor { role, optional: false, dtype, shape, strides, alignment, contents }) }
}

/// A tensor without gaps.
const fn whole(name: &'static str, role: Role, dtype: Dtype, shape: &'static [Size], contents: Contents) -> Argument {
    let alignment = Alignment::Vector { dimension: 0, most: 1 };
    let strides = Strides::Contiguous;
    Argument { name, kind: Kind::Tensor(Tensor { role, optional: false, dtype, shape, strides, alignment, contents }) }
}

const fn dimension(
    name: &'static str,
    (argument, at): (usize, usize),
    (least, most): (i64, i64),
    examples: &'static [i64],
) -> Dimension {
    Dimension { name, from: From::Shape(argument, at), least, most, examples }
}

const ROWS_AND_COLUMNS: &[Size] = &[Size::Of(0), Size::Of(1)];
const ONE_EACH: &[Size] = &[Size::Of(0)];
const HEADS: &[Size] = &[Size::Of(0), Size::Of(1), Size::Of(2)];
const KV_HEADS: &[Size] = &[Size::Of(0), Size::Of(3), Size::Of(2)];
const CACHE: &[Size] = &[Size::Of(6), Size::Of(7), Size::Of(3), Size::Of(2)];

const PDL: Argument = Argument { name: "enable_pdl", kind: Kind::EnablePdl };
const I32: Dtype = Dtype::Only(DType::I32);
const NUMBERS: Contents = Contents::Uniform(1.0);

/// The dimensions of `[rows, columns]`, whose sizes the argument with this place has.
const fn rows_and_columns(argument: usize, examples: &'static [i64]) -> [Dimension; 2] {
    [
        dimension("rows", (argument, 0), (0, MOST_ROWS), &[5, 1, 33]),
        dimension("columns", (argument, 1), (0, MOST), examples),
    ]
}

const ELEMENTS: &[i64] = &[1024, 8, 4096, 12, 7];
/// Vocabularies, small ones for tests.
const TOKENS: &[i64] = &[1000, 1, 32_768, 77];

/// What the kernels have in common.
const DECODE: Row = Row {
    kernel: "",
    function: "",
    library: OWN,
    feature: "compute",
    summary: "",
    source: "`src/glue/decode.cu`, this crate's own",
    runs_on: RunsOn::AtLeast(9, 0),
    arguments: &[],
    lead: 0,
    dimensions: &[],
    relations: &[],
    // Offsets have 64 bits.
    extent: Extent { most: i64::MAX, split: false, stride: i64::MAX },
    pdl: Pdl::Waits,
    attributes: Attributes::None,
    reports: Reports::Status,
    uses_current_device: true,
    convention: Convention::Views,
    hazards: &[],
    tolerance: [3e-3, 5e-4],
    tests: "`tests/decode.rs`, `tests/decode_gpu.rs`, `tests/properties_gpu.rs`",
};

/// `a` in place, with another of the same form.
const PAIR: &[Argument] = &[
    rows("a", Role::InPlace, Dtype::OneOf(FLOATS), ROWS_AND_COLUMNS, NUMBERS),
    rows("b", Role::In, Dtype::As(0), ROWS_AND_COLUMNS, NUMBERS),
    PDL,
];

/// Of `q`, `k`, `v` and `cos_sin`, `page_table`, `k_cache` at these places.
const fn of_heads([cos_sin, page_table, k_cache]: [usize; 3]) -> [Dimension; 9] {
    [
        dimension("rows", (0, 0), (0, MOST_ROWS), &[5, 1, 3]),
        dimension("q_heads", (0, 1), (1, 65_535), &[8, 1, 6]),
        dimension("head_dim", (0, 2), (2, MOST), &[128, 64, 256, 6]),
        dimension("kv_heads", (1, 1), (1, 65_535), &[2, 1, 3]),
        dimension("positions", (cos_sin, 0), (1, MOST), &[64, 33]),
        dimension("rotary_dim", (cos_sin, 1), (2, MOST), &[64, 128, 6, 2, 256]),
        dimension("pages", (k_cache, 0), (1, MOST), &[40, 17]),
        dimension("page_size", (k_cache, 1), (1, MOST), &[16, 4]),
        dimension("pages_of_a_row", (page_table, 1), (1, MOST), &[3, 2]),
    ]
}

const OF_HEADS: &[Relation] = &[
    Relation {
        name: "head_dim",
        only_on_gpu: false,
        holds: |sizes| sizes[2] % 2 == 0,
        found: |sizes| sizes[2].to_string(),
        expected: "an even number",
    },
    Relation {
        name: "head_dim",
        only_on_gpu: true,
        holds: |sizes| sizes[2] <= 256,
        found: |sizes| sizes[2].to_string(),
        expected: "at most 256, of which a warp has a head",
    },
    Relation {
        name: "rotary_dim",
        only_on_gpu: false,
        holds: |sizes| sizes[5] % 2 == 0 && sizes[5] <= sizes[2],
        found: |sizes| format!("{} of heads of {}", sizes[5], sizes[2]),
        expected: "an even number, as many as a head has at the most",
    },
    Relation {
        name: "q_heads",
        only_on_gpu: true,
        holds: |sizes| sizes[1] + 2 * sizes[3] <= 4 * 65_535,
        found: |sizes| format!("{} with {} of keys", sizes[1], sizes[3]),
        expected: "few enough for a launch: 262,140 of queries, keys and values",
    },
];

const Q: Argument = rows("q", Role::InPlace, Dtype::Half, HEADS, NUMBERS);
const K: Argument = rows("k", Role::In, Dtype::As(0), KV_HEADS, NUMBERS);
const V: Argument = rows("v", Role::In, Dtype::As(0), KV_HEADS, NUMBERS);
const COS_SIN: Argument = rows("cos_sin", Role::In, Dtype::Only(DType::F32), &[Size::Of(4), Size::Of(5)], NUMBERS);
const POSITIONS: Argument = whole("positions", Role::In, I32, ONE_EACH, Contents::Turns(0));
const PAGE_TABLE: Argument = rows("page_table", Role::In, I32, &[Size::Of(0), Size::Of(8)], Contents::Turns(6));
const K_CACHE: Argument = whole("k_cache", Role::InPlace, Dtype::As(0), CACHE, NUMBERS);
const V_CACHE: Argument = whole("v_cache", Role::InPlace, Dtype::As(0), CACHE, NUMBERS);
const INTERLEAVE: Argument = Argument { name: "interleave", kind: Kind::Switch };

kernels! {
    /// [`embedding`].
    Embedding = Row {
        kernel: "embedding",
        function: "embedding",
        summary: "`out[b] = scale · table[ids[b]]`; NaN for an id that is no row of the table.",
        arguments: &[
            rows("out", Role::Out, Dtype::Half, ROWS_AND_COLUMNS, NUMBERS),
            whole("ids", Role::In, I32, ONE_EACH, Contents::Turns(2)),
            rows("table", Role::In, Dtype::As(0), &[Size::Of(2), Size::Of(1)], NUMBERS),
            Argument { name: "scale", kind: Kind::Positive },
            PDL,
        ],
        dimensions: &[
            dimension("rows", (0, 0), (0, MOST_ROWS), &[5, 1, 33]),
            dimension("columns", (0, 1), (0, MOST), ELEMENTS),
            dimension("tokens", (2, 0), (1, MOST), &[100, 1, 17]),
        ],
        ..DECODE
    };
    /// [`rope_append`].
    RopeAppend = Row {
        kernel: "rope_append",
        function: "rope_append",
        summary: "`q` is turned by the angles of its positions; `k_cache`, `v_cache` ← `k` turned, `v`.",
        arguments: &[Q, K, V, COS_SIN, POSITIONS, PAGE_TABLE, K_CACHE, V_CACHE, INTERLEAVE, PDL],
        dimensions: &of_heads([3, 5, 6]),
        relations: OF_HEADS,
        ..DECODE
    };
    /// [`qk_norm_rope_append`].
    QkNormRopeAppend = Row {
        kernel: "qk_norm_rope_append",
        function: "qk_norm_rope_append",
        summary: "As rope_append, of queries and keys that are normed first, head by head, by RMSNorm.",
        arguments: &[
            Q,
            K,
            V,
            whole("q_weight", Role::In, Dtype::As(0), &[Size::Of(2)], NUMBERS),
            whole("k_weight", Role::In, Dtype::As(0), &[Size::Of(2)], NUMBERS),
            COS_SIN,
            POSITIONS,
            PAGE_TABLE,
            K_CACHE,
            V_CACHE,
            Argument { name: "eps", kind: Kind::Positive },
            INTERLEAVE,
            PDL,
        ],
        dimensions: &of_heads([5, 7, 8]),
        relations: OF_HEADS,
        ..DECODE
    };
    /// [`add`].
    Add = Row { kernel: "add", function: "add", summary: "`a ← a + b`.", arguments: PAIR,
        dimensions: &rows_and_columns(0, ELEMENTS), ..DECODE };
    /// [`mul`].
    Mul = Row { kernel: "mul", function: "mul", summary: "`a ← a · b`, element by element.", arguments: PAIR,
        dimensions: &rows_and_columns(0, ELEMENTS), ..DECODE };
    /// [`sigmoid_gate`].
    SigmoidGate = Row { kernel: "sigmoid_gate", function: "sigmoid_gate",
        summary: "`a ← a · σ(b)`, with `σ(x) = 1 / (1 + e^−x)`.", arguments: PAIR,
        dimensions: &rows_and_columns(0, ELEMENTS), ..DECODE };
    /// [`silu`].
    Silu = Row {
        kernel: "silu",
        function: "silu",
        summary: "`a ← a · σ(a)`.",
        arguments: &[rows("a", Role::InPlace, Dtype::OneOf(FLOATS), ROWS_AND_COLUMNS, NUMBERS), PDL],
        dimensions: &rows_and_columns(0, ELEMENTS),
        ..DECODE
    };
    /// [`copy`].
    CopyRows = Row {
        kernel: "copy",
        function: "copy",
        summary: "`out ← input`, rounded to the type of `out`.",
        arguments: &[
            rows("out", Role::Out, Dtype::OneOf(FLOATS), ROWS_AND_COLUMNS, NUMBERS),
            rows("input", Role::In, Dtype::OneOf(FLOATS), ROWS_AND_COLUMNS, NUMBERS),
            PDL,
        ],
        dimensions: &rows_and_columns(0, ELEMENTS),
        ..DECODE
    };
    /// [`softmax_rows`].
    SoftmaxRows = Row {
        kernel: "softmax_rows",
        function: "softmax_rows",
        summary: "`a ← softmax(a / temperature)`, row by row.",
        arguments: &[
            rows("a", Role::InPlace, Dtype::OneOf(FLOATS), ROWS_AND_COLUMNS, Contents::Uniform(8.0)),
            Argument { name: "temperature", kind: Kind::Positive },
            PDL,
        ],
        dimensions: &rows_and_columns(0, TOKENS),
        ..DECODE
    };
    /// [`argmax`].
    Argmax = Row {
        kernel: "argmax",
        function: "argmax",
        summary: "`token[b]` is the first place of the largest of `logits[b]`.",
        arguments: &[
            whole("token", Role::Out, I32, ONE_EACH, Contents::Zeros),
            rows("logits", Role::In, Dtype::OneOf(FLOATS), ROWS_AND_COLUMNS, NUMBERS),
            PDL,
        ],
        lead: 1,
        dimensions: &[
            dimension("rows", (1, 0), (0, MOST_ROWS), &[5, 1, 33]),
            dimension("tokens", (1, 1), (1, MOST), TOKENS),
        ],
        ..DECODE
    };
    /// [`advance`].
    Advance = Row {
        kernel: "advance",
        function: "advance",
        summary: "`ids ← token`; `positions` and `lengths` grow by 1, up to what the capacity allows.",
        arguments: &[
            whole("token", Role::In, I32, ONE_EACH, Contents::Turns(0)),
            whole("ids", Role::Out, I32, ONE_EACH, Contents::Zeros),
            whole("positions", Role::InPlace, I32, ONE_EACH, Contents::Turns(0)),
            whole("lengths", Role::InPlace, I32, ONE_EACH, Contents::Turns(0)),
            Argument { name: "capacity", kind: Kind::Whole(1, MOST) },
            PDL,
        ],
        lead: 1,
        dimensions: &[dimension("rows", (1, 0), (0, MOST), &[5, 1, 300])],
        ..DECODE
    };
    /// [`sample`].
    Sample = Row {
        kernel: "sample",
        function: "sample",
        summary: "`token[b]` is drawn by `number[b]` out of `probs[b]`.",
        arguments: &[
            whole("token", Role::Out, I32, ONE_EACH, Contents::Zeros),
            rows("probs", Role::In, Dtype::Only(DType::F32), ROWS_AND_COLUMNS, Contents::Between(0.0, 1.0)),
            whole("number", Role::In, Dtype::Only(DType::F32), ONE_EACH, Contents::Between(0.0, 1.0)),
            Argument { name: "top_k", kind: Kind::Whole(0, MOST) },
            Argument { name: "top_p", kind: Kind::Between(0.0, 1.0) },
            PDL,
        ],
        lead: 1,
        dimensions: &[
            dimension("rows", (1, 0), (0, MOST_ROWS), &[5, 1, 33]),
            // The sum of all is counted in 64 bits.
            dimension("tokens", (1, 1), (1, 1 << 19), TOKENS),
        ],
        hazards: &["of equal tokens at the end of those that are kept, the earlier ones are"],
        ..DECODE
    };
}

/// Whether the kernels run on a device: on the host always, on a GPU by its compute capability.
///
/// # Errors
/// [`DeviceOutOfRange`](crate::FlashInferError::DeviceOutOfRange), or why there is no GPU.
pub fn is_supported(device: Device) -> Result<bool> {
    Entry::of::<Embedding>().is_supported(device)
}

/// How a kernel is launched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct DecodeOptions {
    /// Programmatic dependent launch: the kernel may start before the one ahead of it in the stream has ended. It waits
    /// for that one's results by itself.
    pub pdl: bool,
}

impl DecodeOptions {
    /// With programmatic dependent launch on or off.
    #[must_use]
    pub fn with_pdl(mut self, pdl: bool) -> Self {
        self.pdl = pdl;
        self
    }

    #[inline(always)]
    fn operand<'a>(&self) -> Operand<'a, 'a> {
        Operand::Bool(self.pdl)
    }
}

/// Rows of a table by their ids, times a number: `out[b] = scale · table[ids[b]]`. On a GPU an id that is no row of the table
/// gives a row of NaN.
///
/// <!-- embedding -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `out` | `[rows, columns]` | F16 or BF16 | written; rows anywhere; aligned to an element |
/// | `ids` | `[rows]` | I32 | read; contiguous; aligned to an element |
/// | `table` | `[tokens, columns]` | as `out` | read; rows anywhere, also repeated; aligned to an element |
///
/// ```
/// # use flashinfer_rs::kernels::decode::{DecodeOptions, embedding};
/// # use flashinfer_rs::{FlashInferRuntime, RuntimeConfig, Stream, TensorMut, TensorRef};
/// # FlashInferRuntime::initialize(RuntimeConfig::default())?;
/// let (table, ids, mut out) = ([1f32, 2.0, 3.0, 4.0], [1i32], [0f32; 2]);
/// let (table, ids) = (TensorRef::from_slice(&table, &[2, 2])?, TensorRef::from_slice(&ids, &[1])?);
/// let mut row = TensorMut::from_slice(&mut out, &[1, 2])?;
/// embedding(&mut row, &ids, &table, 2.0, &DecodeOptions::default(), Stream::NULL)?;
/// assert_eq!(out, [6.0, 8.0]);
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
///
/// # Errors
/// See the [module](self).
pub fn embedding(
    out: &mut TensorMut<'_>,
    ids: &TensorRef<'_>,
    table: &TensorRef<'_>,
    scale: f64,
    options: &DecodeOptions,
    stream: Stream<'_>,
) -> Result<()> {
    let operands = [out.operand(), ids.operand(), table.operand(), Operand::Number(scale), options.operand()];
    // SAFETY: the kernel looks at the ids itself.
    unsafe { call::<Embedding, 5>(operands, stream) }
}

/// The keys and values of a step and where they go: a paged cache, of which each row of the batch has the pages that its row of
/// the page table names.
#[derive(Debug)]
pub struct Appended<'o> {
    /// `[rows, kv_heads, head_dim]`: read, not overwritten.
    pub k: TensorRef<'o>,
    /// As `k`.
    pub v: TensorRef<'o>,
    /// F32 `[positions, rotary_dim]`: for each position the cosines of its angles, then their sines.
    pub cos_sin: TensorRef<'o>,
    /// I32 `[rows]`: where in its sequence each row's token is.
    pub positions: TensorRef<'o>,
    /// I32 `[rows, pages_of_a_row]`.
    pub page_table: TensorRef<'o>,
    /// `[pages, page_size, kv_heads, head_dim]`: written at the rows' places.
    pub k_cache: TensorMut<'o>,
    /// As `k_cache`.
    pub v_cache: TensorMut<'o>,
    /// Whether the pairs that are turned are neighbours, as GPT-J has it, and not half a head apart.
    pub interleave: bool,
}

/// Rotary embeddings and the append of a decode step in one: `q` is turned in place, `k` is turned on its way into the cache, and
/// `v` is copied there. Each row has one token.
///
/// The first `rotary_dim` elements of a head are turned, the others are not. On a GPU a row whose position has no angles or lies
/// behind its last page, or whose page is none of the cache, is left out: its queries stay as they are, and nothing is written.
/// Two rows must not have the same place in the cache: what is there then may be of either.
///
/// <!-- rope_append -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `q` | `[rows, q_heads, head_dim]` | F16 or BF16 | read and written; rows anywhere; aligned to an element |
/// | `k` | `[rows, kv_heads, head_dim]` | as `q` | read; rows anywhere, also repeated; aligned to an element |
/// | `v` | `[rows, kv_heads, head_dim]` | as `q` | read; rows anywhere, also repeated; aligned to an element |
/// | `cos_sin` | `[positions, rotary_dim]` | F32 | read; rows anywhere, also repeated; aligned to an element |
/// | `positions` | `[rows]` | I32 | read; contiguous; aligned to an element |
/// | `page_table` | `[rows, pages_of_a_row]` | I32 | read; rows anywhere, also repeated; aligned to an element |
/// | `k_cache` | `[pages, page_size, kv_heads, head_dim]` | as `q` | read and written; contiguous; aligned to an element |
/// | `v_cache` | `[pages, page_size, kv_heads, head_dim]` | as `q` | read and written; contiguous; aligned to an element |
///
/// # Errors
/// See the [module](self).
pub fn rope_append(
    q: &mut TensorMut<'_>,
    appended: &mut Appended<'_>,
    options: &DecodeOptions,
    stream: Stream<'_>,
) -> Result<()> {
    let Appended { k, v, cos_sin, positions, page_table, k_cache, v_cache, interleave } = appended;
    let operands = [
        q.operand(),
        k.operand(),
        v.operand(),
        cos_sin.operand(),
        positions.operand(),
        page_table.operand(),
        k_cache.operand(),
        v_cache.operand(),
        Operand::Bool(*interleave),
        options.operand(),
    ];
    // SAFETY: the kernel looks at positions and pages itself.
    unsafe { call::<RopeAppend, 10>(operands, stream) }
}

/// The norm of queries and of keys: a weight for each, as long as a head, and what is added to the mean square.
#[derive(Debug, Clone, Copy)]
pub struct HeadNorm<'a, 'o> {
    /// `[head_dim]`.
    pub q_weight: &'a TensorRef<'o>,
    /// `[head_dim]`.
    pub k_weight: &'a TensorRef<'o>,
    /// Positive and finite, also as an f32.
    pub eps: f64,
}

/// As [`rope_append`], of queries and keys that are normed first, each head by itself:
/// `x / √(mean(x²) + eps) · weight`. What lies between the three is not rounded.
///
/// <!-- qk_norm_rope_append -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `q` | `[rows, q_heads, head_dim]` | F16 or BF16 | read and written; rows anywhere; aligned to an element |
/// | `k` | `[rows, kv_heads, head_dim]` | as `q` | read; rows anywhere, also repeated; aligned to an element |
/// | `v` | `[rows, kv_heads, head_dim]` | as `q` | read; rows anywhere, also repeated; aligned to an element |
/// | `q_weight` | `[head_dim]` | as `q` | read; contiguous; aligned to an element |
/// | `k_weight` | `[head_dim]` | as `q` | read; contiguous; aligned to an element |
/// | `cos_sin` | `[positions, rotary_dim]` | F32 | read; rows anywhere, also repeated; aligned to an element |
/// | `positions` | `[rows]` | I32 | read; contiguous; aligned to an element |
/// | `page_table` | `[rows, pages_of_a_row]` | I32 | read; rows anywhere, also repeated; aligned to an element |
/// | `k_cache` | `[pages, page_size, kv_heads, head_dim]` | as `q` | read and written; contiguous; aligned to an element |
/// | `v_cache` | `[pages, page_size, kv_heads, head_dim]` | as `q` | read and written; contiguous; aligned to an element |
///
/// # Errors
/// See the [module](self).
pub fn qk_norm_rope_append(
    q: &mut TensorMut<'_>,
    norm: HeadNorm<'_, '_>,
    appended: &mut Appended<'_>,
    options: &DecodeOptions,
    stream: Stream<'_>,
) -> Result<()> {
    let Appended { k, v, cos_sin, positions, page_table, k_cache, v_cache, interleave } = appended;
    let operands = [
        q.operand(),
        k.operand(),
        v.operand(),
        norm.q_weight.operand(),
        norm.k_weight.operand(),
        cos_sin.operand(),
        positions.operand(),
        page_table.operand(),
        k_cache.operand(),
        v_cache.operand(),
        Operand::Number(norm.eps),
        Operand::Bool(*interleave),
        options.operand(),
    ];
    // SAFETY: the kernel looks at positions and pages itself.
    unsafe { call::<QkNormRopeAppend, 13>(operands, stream) }
}

/// A sum: `a ← a + b`.
///
/// <!-- add -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `a` | `[rows, columns]` | BF16 or F16 or F32 | read and written; rows anywhere; aligned to an element |
/// | `b` | `[rows, columns]` | as `a` | read; rows anywhere, also repeated; aligned to an element |
///
/// # Errors
/// See the [module](self).
pub fn add(a: &mut TensorMut<'_>, b: &TensorRef<'_>, options: &DecodeOptions, stream: Stream<'_>) -> Result<()> {
    // SAFETY: the kernel reads nothing in device memory to find its way.
    unsafe { call::<Add, 3>([a.operand(), b.operand(), options.operand()], stream) }
}

/// A product, element by element: `a ← a · b`.
///
/// <!-- mul -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `a` | `[rows, columns]` | BF16 or F16 or F32 | read and written; rows anywhere; aligned to an element |
/// | `b` | `[rows, columns]` | as `a` | read; rows anywhere, also repeated; aligned to an element |
///
/// # Errors
/// See the [module](self).
pub fn mul(a: &mut TensorMut<'_>, b: &TensorRef<'_>, options: &DecodeOptions, stream: Stream<'_>) -> Result<()> {
    // SAFETY: the kernel reads nothing in device memory to find its way.
    unsafe { call::<Mul, 3>([a.operand(), b.operand(), options.operand()], stream) }
}

/// A product with the sigmoid of a gate: `a ← a · σ(b)`, with `σ(x) = 1 / (1 + e^−x)`.
///
/// <!-- sigmoid_gate -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `a` | `[rows, columns]` | BF16 or F16 or F32 | read and written; rows anywhere; aligned to an element |
/// | `b` | `[rows, columns]` | as `a` | read; rows anywhere, also repeated; aligned to an element |
///
/// # Errors
/// See the [module](self).
pub fn sigmoid_gate(
    a: &mut TensorMut<'_>,
    b: &TensorRef<'_>,
    options: &DecodeOptions,
    stream: Stream<'_>,
) -> Result<()> {
    // SAFETY: the kernel reads nothing in device memory to find its way.
    unsafe { call::<SigmoidGate, 3>([a.operand(), b.operand(), options.operand()], stream) }
}

/// SiLU in place: `a ← a · σ(a)`, with `σ(x) = 1 / (1 + e^−x)`.
///
/// <!-- silu -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `a` | `[rows, columns]` | BF16 or F16 or F32 | read and written; rows anywhere; aligned to an element |
///
/// # Errors
/// See the [module](self).
pub fn silu(a: &mut TensorMut<'_>, options: &DecodeOptions, stream: Stream<'_>) -> Result<()> {
    // SAFETY: the kernel reads nothing in device memory to find its way.
    unsafe { call::<Silu, 2>([a.operand(), options.operand()], stream) }
}

/// A copy of another element type, rounded to the nearest number; of the same type, bit for bit.
///
/// <!-- copy -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `out` | `[rows, columns]` | BF16 or F16 or F32 | written; rows anywhere; aligned to an element |
/// | `input` | `[rows, columns]` | BF16 or F16 or F32 | read; rows anywhere, also repeated; aligned to an element |
///
/// # Errors
/// See the [module](self).
pub fn copy(out: &mut TensorMut<'_>, input: &TensorRef<'_>, options: &DecodeOptions, stream: Stream<'_>) -> Result<()> {
    // SAFETY: the kernel reads nothing in device memory to find its way.
    unsafe { call::<CopyRows, 3>([out.operand(), input.operand(), options.operand()], stream) }
}

/// Softmax of rows in place, of numbers that are divided by a temperature first. A row that holds no finite number, NaN or +∞
/// becomes NaN.
///
/// <!-- softmax_rows -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `a` | `[rows, columns]` | BF16 or F16 or F32 | read and written; rows anywhere; aligned to an element |
///
/// # Errors
/// See the [module](self).
pub fn softmax_rows(
    a: &mut TensorMut<'_>,
    temperature: f64,
    options: &DecodeOptions,
    stream: Stream<'_>,
) -> Result<()> {
    // SAFETY: the kernel reads nothing in device memory to find its way.
    unsafe { call::<SoftmaxRows, 3>([a.operand(), Operand::Number(temperature), options.operand()], stream) }
}

/// The place of each row's largest element, the first of equals. NaN counts as −∞; where nothing is larger than −∞, the token
/// is 0.
///
/// <!-- argmax -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `token` | `[rows]` | I32 | written; contiguous; aligned to an element |
/// | `logits` | `[rows, tokens]` | BF16 or F16 or F32 | read; rows anywhere, also repeated; aligned to an element |
///
/// # Errors
/// See the [module](self).
pub fn argmax(
    token: &mut TensorMut<'_>,
    logits: &TensorRef<'_>,
    options: &DecodeOptions,
    stream: Stream<'_>,
) -> Result<()> {
    // SAFETY: the kernel reads nothing in device memory to find its way.
    unsafe { call::<Argmax, 3>([token.operand(), logits.operand(), options.operand()], stream) }
}

/// The inputs of the next step in the place of this one's.
#[derive(Debug)]
pub struct Step<'o> {
    /// I32 `[rows]`: becomes the token.
    pub ids: TensorMut<'o>,
    /// I32 `[rows]`: grows by 1.
    pub positions: TensorMut<'o>,
    /// I32 `[rows]`: grows by 1.
    pub lengths: TensorMut<'o>,
}

/// Makes the inputs of the next step: the token becomes the id, positions and lengths grow by 1.
///
/// `capacity` is how many tokens the pages of a row hold. Whatever they were, positions are from 0 to below it then, and lengths
/// from 1 up to it: a sequence that is full stays where it is, and writes its last place anew. So what the next step reads and
/// writes by them is within its pages.
///
/// <!-- advance -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `token` | `[rows]` | I32 | read; contiguous; aligned to an element |
/// | `ids` | `[rows]` | I32 | written; contiguous; aligned to an element |
/// | `positions` | `[rows]` | I32 | read and written; contiguous; aligned to an element |
/// | `lengths` | `[rows]` | I32 | read and written; contiguous; aligned to an element |
///
/// # Errors
/// See the [module](self).
pub fn advance(
    token: &TensorRef<'_>,
    step: &mut Step<'_>,
    capacity: i64,
    options: &DecodeOptions,
    stream: Stream<'_>,
) -> Result<()> {
    let operands = [
        token.operand(),
        step.ids.operand(),
        step.positions.operand(),
        step.lengths.operand(),
        Operand::Whole(capacity),
        options.operand(),
    ];
    // SAFETY: the kernel reads nothing in device memory to find its way.
    unsafe { call::<Advance, 6>(operands, stream) }
}

/// Which tokens may be drawn: of those of a row in the order of their probabilities, of equals the earlier ahead.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub struct Among {
    /// So many of the likeliest; 0 is all.
    pub top_k: u32,
    /// Those of which what is ahead of them sums to less than this; from 0.0 to 1.0, and 0.0 is all.
    pub top_p: f64,
}

impl Among {
    /// The `top_k` likeliest, and of these the likeliest that sum to `top_p`; 0 is all.
    pub fn new(top_k: u32, top_p: f64) -> Self {
        Self { top_k, top_p }
    }
}

/// Draws a token of each row's probabilities by a number from 0.0 to below 1.0: the first one, in the order of the tokens, up to
/// which the probabilities of those that may be drawn sum to more than the number's share of all of theirs.
///
/// The numbers are a tensor, so that a graph which is launched again draws anew; FlashInfer's samplers
/// ([`kernels::sampling`](crate::kernels::sampling)) have their random state on the host, where a graph keeps it. Probabilities
/// count between 0 and 1, in steps of 2⁻⁴⁴; what is no number counts as 0. Where all are 0 the token is 0. Rows need not sum to 1.
///
/// <!-- sample -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `token` | `[rows]` | I32 | written; contiguous; aligned to an element |
/// | `probs` | `[rows, tokens]` | F32 | read; rows anywhere, also repeated; aligned to an element |
/// | `number` | `[rows]` | F32 | read; contiguous; aligned to an element |
///
/// # Errors
/// See the [module](self).
pub fn sample(
    token: &mut TensorMut<'_>,
    probs: &TensorRef<'_>,
    number: &TensorRef<'_>,
    among: Among,
    options: &DecodeOptions,
    stream: Stream<'_>,
) -> Result<()> {
    let operands = [
        token.operand(),
        probs.operand(),
        number.operand(),
        Operand::Whole(among.top_k.into()),
        Operand::Number(among.top_p),
        options.operand(),
    ];
    // SAFETY: the kernel reads nothing in device memory to find its way.
    unsafe { call::<Sample, 6>(operands, stream) }
}
