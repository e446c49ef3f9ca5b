//! `rope.so`: rotary position embeddings, also with quantization to 8 bits and with appending to a paged cache.
//!
//! The first `rotary_dim` elements of each head are turned in pairs by an angle that grows with the token's position, the
//! others are copied. Without `interleave` (GPT-NeoX, Llama) a pair is an element of the first half with the one half of
//! `rotary_dim` behind it; with it (GPT-J) it is two elements next to each other.
//!
//! The angles come from a table, a [`CosSinCache`], which is exact and takes every scaling; or the kernel computes them, fast
//! and less exact the larger the angle. Positions are host data that was checked ([`Positions`], [`Tokens`]), since with a
//! table they are what the kernel finds its way by.
//!
//! The functions without `_inplace` write to other tensors, those with it onto their inputs. On a GPU a call is asynchronous
//! on `stream` and never synchronizes; tensors on the host are computed by the [reference](crate::reference), at once. Without
//! tokens a call is a no-op.
//!
//! # Errors
//! Every function answers [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for what breaks its contract,
//! before anything is launched; [`DeviceOutOfRange`](crate::FlashInferError::DeviceOutOfRange); what loading `rope.so`
//! answers; [`TvmFfiCall`](crate::FlashInferError::TvmFfiCall) with what the kernel raised; and
//! [`Cuda`](crate::FlashInferError::Cuda) or [`ContextLost`](crate::FlashInferError::ContextLost) where it was not launched.

use super::page::{KvLayout, PagedKvCache, PagedMlaCache, check_tokens, counted, indices};
use crate::contract::{
    Alignment, Argument, Attributes, Contents, Convention, Dimension, Dtype, Extent, From, Kind, Operand, Pdl,
    Relation, Reports, Role, Row, RunsOn, Size, Strides, Tensor,
};
use crate::engine::{Entry, Kernel, call, kernels};
use crate::error::Result;
use crate::indices::{Placed, Positions, RaggedPositions, Tokens, refuse};
use crate::owner::Owner;
use crate::rotary::CosSinCache;
use crate::stream::Stream;
use crate::tensor::{DType, Device, Layout, TensorMut, TensorRef};

const MOST: i64 = i32::MAX as i64;

/// The most rows of blocks that a grid has.
const GRID_ROWS: i64 = 65_535;

/// The threads of a block.
const THREADS: i64 = 1024;

const fn tensor(name: &'static str, role: Role, dtype: Dtype, shape: &'static [Size]) -> Argument {
    // Moved 16 bytes at a time.
    let (strides, alignment, contents) = (Strides::Rows, Alignment::Bytes(16), Contents::Uniform(1.0));
    Argument { name, kind: Kind::Tensor(Tensor { role, optional: false, dtype, shape, strides, alignment, contents }) }
}

/// A table of cosines and sines.
const fn table(shape: &'static [Size]) -> Argument {
    let (role, dtype, contents) = (Role::In, Dtype::Only(DType::F32), Contents::Uniform(1.0));
    let (strides, alignment) = (Strides::Contiguous, Alignment::Bytes(16));
    let tensor = Tensor { role, optional: false, dtype, shape, strides, alignment, contents };
    Argument { name: "cos_sin_cache", kind: Kind::Tensor(tensor) }
}

const fn number(name: &'static str, kind: Kind) -> Argument {
    Argument { name, kind }
}

const INTERLEAVE: Argument = number("interleave", Kind::Switch);
const ENABLE_PDL: Argument = number("enable_pdl", Kind::EnablePdl);
const ROTARY_DIM: Argument = number("rotary_dim", Kind::Whole(2, MOST));

const fn dimension(name: &'static str, from: From, least: i64, examples: &'static [i64]) -> Dimension {
    Dimension { name, from, least, most: MOST, examples }
}

// What every row begins with.
const TOKENS: Dimension = dimension("tokens", From::Shape(0, 0), 0, &[7, 1, 33]);
const Q_HEADS: Dimension = dimension("q_heads", From::Shape(0, 1), 1, &[8, 1, 5]);

/// `interleave`, which is this argument.
const fn switched(argument: usize) -> Dimension {
    Dimension { name: "interleave", from: From::Number(argument), least: 0, most: 1, examples: &[0, 1] }
}

const Q: &[Size] = &[Size::Of(0), Size::Of(1), Size::Of(2)];
const K: &[Size] = &[Size::Of(0), Size::Of(3), Size::Of(2)];

const Q_IN: Argument = tensor("q", Role::In, Dtype::Half, Q);
const K_IN: Argument = tensor("k", Role::In, Dtype::As(0), K);
const Q_ROPE: Argument = tensor("q_rope", Role::Out, Dtype::As(0), Q);
const K_ROPE: Argument = tensor("k_rope", Role::Out, Dtype::As(0), K);

/// The dimensions of the forms that compute their angles, whose numbers `rotary_dim` and `interleave` are these arguments.
const fn dimensions(rotary_dim: usize) -> [Dimension; 6] {
    [
        TOKENS,
        Q_HEADS,
        dimension("head_dim", From::Shape(0, 2), 1, &[128, 64, 256, 512]),
        dimension("kv_heads", From::Shape(1, 1), 1, &[2, 1]),
        dimension("rotary_dim", From::Number(rotary_dim), 2, &[64, 32, 128]),
        switched(rotary_dim + 1),
    ]
}

/// Elements that a thread moves, in the kernels for a head size.
const fn vector(head_dim: i64) -> i64 {
    if head_dim > 256 { 16 } else { 8 }
}

const fn is_compiled(head_dim: i64) -> bool {
    matches!(head_dim, 64 | 128 | 256 | 512)
}

const COMPILED: Relation = Relation {
    name: "head_dim",
    only_on_gpu: true,
    holds: |sizes| is_compiled(sizes[2]),
    found: |sizes| sizes[2].to_string(),
    expected: "64, 128, 256 or 512, for which the kernel is compiled; apply_rope_with_cos_sin_cache takes others",
};

/// Of rows whose dimensions 4 and 5 are `rotary_dim` and `interleave`.
const TURNS_PAIRS: Relation = Relation {
    name: "rotary_dim",
    only_on_gpu: false,
    holds: |sizes| sizes[4] % 2 == 0 && sizes[4] <= sizes[2],
    found: |sizes| format!("{} with head_dim {}", sizes[4], sizes[2]),
    expected: "an even number, head_dim at the most",
};

const WHOLE_VECTORS: Relation = Relation {
    name: "rotary_dim",
    only_on_gpu: true,
    // A vector must not lie in both halves.
    holds: |sizes| sizes[4] % (vector(sizes[2]) * if sizes[5] == 1 { 1 } else { 2 }) == 0,
    found: |sizes| format!("{} with head_dim {} {}", sizes[4], sizes[2], interleaved(sizes[5])),
    expected: "a multiple of 16, with head_dim 512 of 32; interleaved of 8 and of 16",
};

const fn interleaved(interleave: i64) -> &'static str {
    if interleave == 1 { "interleaved" } else { "in halves" }
}

const FITS_GRID: Relation = Relation {
    name: "q_heads",
    only_on_gpu: true,
    holds: |sizes| sizes[1] + sizes[3] <= GRID_ROWS,
    found: |sizes| format!("{} beside {} kv_heads", sizes[1], sizes[3]),
    expected: "at most 65,535 together with kv_heads",
};

const POS_IDS: Row = Row {
    kernel: "apply_rope_pos_ids",
    function: "apply_rope_pos_ids",
    library: "rope.so",
    feature: "rope",
    summary: "Turns queries and keys by angles that the kernel computes: `position · rope_theta^(−2i / rotary_dim) / rope_scale`.",
    source: "`csrc/rope.cu`, `include/flashinfer/pos_enc.cuh`",
    runs_on: RunsOn::AtLeast(7, 5),
    arguments: &[
        Q_IN,
        K_IN,
        Q_ROPE,
        K_ROPE,
        indices("pos_ids", &[Size::Of(0)], Contents::Turns(0)),
        ROTARY_DIM,
        INTERLEAVE,
        number("rope_scale", Kind::Positive),
        number("rope_theta", Kind::Positive),
    ],
    lead: 0,
    dimensions: &dimensions(5),
    relations: &[COMPILED, TURNS_PAIRS, WHOLE_VECTORS, FITS_GRID],
    extent: Extent { most: i64::MAX / 8, split: false, stride: i64::MAX },
    pdl: Pdl::None,
    attributes: Attributes::None,
    reports: Reports::Status,
    uses_current_device: false,
    convention: Convention::Views,
    hazards: &[
        "Angles are single-precision products, whose cosines and sines are approximated: at position p they are off by some \
         p · 6e-8. A table is exact.",
    ],
    tolerance: [4e-3, 1e-3],
    tests: "`tests/rope.rs`, `tests/rope_gpu.rs`",
};

// What Llama 3.1's forms have behind the arguments of the plain ones.
const LOW: Argument = number("low_freq_factor", Kind::Positive);
const HIGH: Argument = number("high_freq_factor", Kind::Between(1.0, 1e6));
const OLD_CONTEXT: Argument = number("old_context_length", Kind::Positive);

// The arguments and dimensions of the ragged forms.
const INDPTR: Argument = indices("indptr", &[Size::OneMore(6)], Contents::Offsets(6, 0));
const OFFSETS: Argument = indices("offsets", &[Size::Of(6)], Contents::Turns(6));

const fn ragged() -> [Dimension; 7] {
    let [tokens, q_heads, head_dim, kv_heads, rotary_dim, interleave] = dimensions(6);
    let sequences = dimension("sequences", From::Shape(5, 0), 1, &[3, 1]);
    [tokens, q_heads, head_dim, kv_heads, rotary_dim, interleave, sequences]
}

const FITS_BLOCKS: Relation = Relation {
    name: "sequences",
    only_on_gpu: true,
    holds: |sizes| sizes[6].saturating_mul(sizes[1] + sizes[3]) <= MOST,
    found: |sizes| format!("{} of {} heads", sizes[6], sizes[1] + sizes[3]),
    expected: "few enough for 2^31 blocks, of which each head of a sequence takes one",
};

const RAGGED: Row = Row {
    kernel: "apply_rope",
    function: "apply_rope",
    summary: "As apply_rope_pos_ids, of sequences whose tokens have positions one after the other.",
    arguments: &[
        Q_IN,
        K_IN,
        Q_ROPE,
        K_ROPE,
        INDPTR,
        OFFSETS,
        ROTARY_DIM,
        INTERLEAVE,
        number("rope_scale", Kind::Positive),
        number("rope_theta", Kind::Positive),
    ],
    dimensions: &ragged(),
    relations: &[COMPILED, TURNS_PAIRS, WHOLE_VECTORS, FITS_BLOCKS],
    hazards: &[
        "Tokens from `indptr[i]` to `indptr[i + 1]` are read and written, wherever these numbers point: `RaggedPositions` is \
         what makes them be in the tensors.",
        "Angles are as those of apply_rope_pos_ids.",
    ],
    ..POS_IDS
};

// The dimensions of the forms with a table.
const CACHED_DIMENSIONS: [Dimension; 7] = [
    TOKENS,
    Q_HEADS,
    dimension("head_dim", From::Shape(0, 2), 1, &[128, 64, 256, 512, 192]),
    dimension("kv_heads", From::Shape(1, 1), 1, &[2, 1]),
    dimension("positions", From::Shape(4, 0), 1, &[50, 64]),
    dimension("rotary_dim", From::Shape(4, 1), 2, &[64, 128, 32]),
    switched(6),
];

const TURNS_PART: Relation = Relation {
    name: "rotary_dim",
    only_on_gpu: false,
    holds: |sizes| sizes[5] % 2 == 0 && sizes[5] <= sizes[2],
    found: |sizes| format!("{} with head_dim {}", sizes[5], sizes[2]),
    expected: "an even number, head_dim at the most",
};

const WHOLE_VECTORS_OF_TABLE: Relation = Relation {
    name: "rotary_dim",
    only_on_gpu: true,
    holds: |sizes| {
        let vector = if is_compiled(sizes[2]) { vector(sizes[2]) } else { 16 };
        sizes[5] % (vector * if sizes[6] == 1 { 1 } else { 2 }) == 0 && sizes[5] <= 16 * THREADS
    },
    found: |sizes| format!("{} with head_dim {} {}", sizes[5], sizes[2], interleaved(sizes[6])),
    expected: "a multiple of 32, with head_dim 64, 128 and 256 of 16; interleaved half of that; at most 16,384",
};

const TABLE_FITS: Relation = Relation {
    name: "cos_sin_cache",
    only_on_gpu: true,
    holds: |sizes| sizes[4].saturating_mul(sizes[5]) <= MOST,
    found: |sizes| format!("{} positions of {}", sizes[4], sizes[5]),
    expected: "at most 2^31 numbers, which is how far the kernel counts",
};

/// For other head sizes than those that are compiled the grid has a row for each part of a head that is as long as the turned
/// one.
const FITS_GRID_IN_PARTS: Relation = Relation {
    name: "q_heads",
    only_on_gpu: true,
    holds: |sizes| {
        let parts = if is_compiled(sizes[2]) { 1 } else { (sizes[2] - 1) / sizes[5].max(1) + 1 };
        (sizes[1] + sizes[3]).saturating_mul(parts) <= GRID_ROWS
    },
    found: |sizes| format!("{} beside {} kv_heads", sizes[1], sizes[3]),
    expected: "few enough, together with kv_heads, for 65,535 parts as long as rotary_dim",
};

/// For other head sizes than those that are compiled a head's threads may lie in two warps, and onto its input one of them
/// would read what another has turned already.
const IN_ONE_WARP: Relation = Relation {
    name: "rotary_dim",
    only_on_gpu: true,
    holds: |sizes| is_compiled(sizes[2]) || sizes[6] == 1 || matches!(sizes[5], 32 | 64 | 128 | 256 | 512),
    found: |sizes| format!("{} with head_dim {} {}, in place", sizes[5], sizes[2], interleaved(sizes[6])),
    expected: "32, 64, 128, 256 or 512 in place; other sizes only to other tensors",
};

const CACHED: Row = Row {
    kernel: "apply_rope_pos_ids_cos_sin_cache",
    function: "apply_rope_pos_ids_cos_sin_cache",
    summary: "Turns queries and keys by angles whose cosines and sines a table has.",
    arguments: &[
        Q_IN,
        K_IN,
        Q_ROPE,
        K_ROPE,
        table(&[Size::Of(4), Size::Of(5)]),
        indices("pos_ids", &[Size::Of(0)], Contents::Turns(4)),
        INTERLEAVE,
    ],
    dimensions: &CACHED_DIMENSIONS,
    relations: &[TURNS_PART, WHOLE_VECTORS_OF_TABLE, TABLE_FITS, FITS_GRID_IN_PARTS],
    hazards: &[
        "Interleaved kernels read up to 32 bytes past a row of the table: `CosSinCache` has a row more than it says.",
        "A position that the table has not is read all the same, from other memory: `Positions` is what keeps them below.",
    ],
    tolerance: [4e-3, 6e-4],
    ..POS_IDS
};

// The dimensions of `rope_quantize`.
const ROPE: &[Size] = &[Size::Of(0), Size::Of(1), Size::Of(2)];
const NOPE: &[Size] = &[Size::Of(0), Size::Of(1), Size::Of(3)];
const K_ROPE_PART: &[Size] = &[Size::Of(0), Size::Of(6), Size::Of(2)];
const K_NOPE_PART: &[Size] = &[Size::Of(0), Size::Of(6), Size::Of(3)];
const MLA_ROPE_PART: &[Size] = &[Size::Of(0), Size::Of(2)];
const MLA_NOPE_PART: &[Size] = &[Size::Of(0), Size::Of(3)];

const SCALE_Q: Argument = number("quant_scale_q", Kind::Positive);
const SCALE_KV: Argument = number("quant_scale_kv", Kind::Positive);

const fn quantized(k_rope: &'static [Size], k_nope: &'static [Size]) -> [Argument; 14] {
    [
        tensor("q_rope_in", Role::In, Dtype::Half, ROPE),
        tensor("k_rope_in", Role::In, Dtype::As(0), k_rope),
        tensor("q_nope_in", Role::In, Dtype::As(0), NOPE),
        tensor("k_nope_in", Role::In, Dtype::As(0), k_nope),
        tensor("q_rope_out", Role::Out, Dtype::Eight, ROPE),
        tensor("k_rope_out", Role::Out, Dtype::As(4), k_rope),
        tensor("q_nope_out", Role::Out, Dtype::As(4), NOPE),
        tensor("k_nope_out", Role::Out, Dtype::As(4), k_nope),
        table(&[Size::Of(4), Size::Of(2)]),
        indices("pos_ids", &[Size::Of(0)], Contents::Turns(4)),
        SCALE_Q,
        SCALE_KV,
        INTERLEAVE,
        ENABLE_PDL,
    ]
}

const fn rope_dim() -> Dimension {
    dimension("rope_dim", From::Shape(0, 2), 1, &[64, 32, 128])
}

/// Those of every form; one with heads of keys has their number behind these.
const fn quantized_dimensions() -> [Dimension; 6] {
    [
        TOKENS,
        Q_HEADS,
        rope_dim(),
        dimension("no_rope_dim", From::Shape(2, 2), 0, &[64, 0, 128, 16]),
        dimension("positions", From::Shape(8, 0), 1, &[50, 64]),
        switched(12),
    ]
}

const WHOLE_ROPE_VECTORS: Relation = Relation {
    name: "rope_dim",
    only_on_gpu: true,
    holds: |sizes| sizes[2] % (16 * if sizes[5] == 1 { 1 } else { 2 }) == 0 && sizes[2] <= 16 * THREADS,
    found: |sizes| format!("{} {}", sizes[2], interleaved(sizes[5])),
    expected: "a multiple of 32, interleaved of 16; at most 16,384",
};

const fn with_kv_heads() -> [Dimension; 7] {
    let [tokens, q_heads, rope_dim, no_rope_dim, positions, interleave] = quantized_dimensions();
    let kv_heads = dimension("kv_heads", From::Shape(1, 1), 1, &[2, 1]);
    [tokens, q_heads, rope_dim, no_rope_dim, positions, interleave, kv_heads]
}

const EVEN: Relation = Relation {
    name: "rope_dim",
    only_on_gpu: false,
    holds: |sizes| sizes[2] % 2 == 0,
    found: |sizes| sizes[2].to_string(),
    expected: "an even number",
};

const QUANTIZED_TABLE_FITS: Relation = Relation {
    name: "cos_sin_cache",
    only_on_gpu: true,
    holds: |sizes| sizes[4].saturating_mul(sizes[2]) <= MOST,
    found: |sizes| format!("{} positions of {}", sizes[4], sizes[2]),
    expected: "at most 2^31 numbers, which is how far the kernel counts",
};

const QUANTIZED_FITS_GRID: Relation = Relation {
    name: "q_heads",
    only_on_gpu: true,
    holds: |sizes| {
        // The values' row of a cache that has them is one more for each key head.
        let parts = 2 + (sizes[3] + sizes[2] - 1) / sizes[2].max(1);
        // Keys that all heads share count as one: that is what a dimension is that a row has not.
        (sizes[1] + sizes[6]).saturating_mul(parts) <= GRID_ROWS
    },
    found: |sizes| format!("{} beside {} kv_heads", sizes[1], sizes[6]),
    expected: "few enough, together with kv_heads, for 65,535 parts as long as rope_dim",
};

const QUANTIZE: Row = Row {
    kernel: "rope_quantize",
    function: "rope_quantize",
    summary: "Turns one part of queries and keys, scales both parts, and rounds them to 8 bits.",
    arguments: &quantized(K_ROPE_PART, K_NOPE_PART),
    dimensions: &with_kv_heads(),
    relations: &[EVEN, WHOLE_ROPE_VECTORS, QUANTIZED_TABLE_FITS, QUANTIZED_FITS_GRID],
    extent: Extent { most: i64::MAX / 8, split: false, stride: u32::MAX as i64 },
    pdl: Pdl::Waits,
    tolerance: [2e-2, 2e-2],
    ..CACHED
};

// The dimensions of `rope_quantize_append_paged_kv_cache`.
const PAGES: usize = 7;
const PAGE_SIZE: usize = 8;
const REQUESTS: usize = 9;
const INDICES: usize = 10;
const HEAD_DIM: usize = 11;

const NHD: &[Size] = &[Size::Of(PAGES), Size::Of(PAGE_SIZE), Size::Of(6), Size::Of(HEAD_DIM)];
const HND: &[Size] = &[Size::Of(PAGES), Size::Of(6), Size::Of(PAGE_SIZE), Size::Of(HEAD_DIM)];

const fn cache(name: &'static str, strides: Strides, shape: &'static [Size]) -> Argument {
    let (role, dtype, alignment, contents) =
        (Role::InPlace, Dtype::As(5), Alignment::Bytes(16), Contents::Uniform(1.0));
    Argument { name, kind: Kind::Tensor(Tensor { role, optional: false, dtype, shape, strides, alignment, contents }) }
}

const fn missing(name: &'static str, rank: usize) -> Argument {
    number(name, Kind::Missing(rank))
}

const fn appended(v_in: Argument, caches: [Argument; 4], layout: i64) -> [Argument; 23] {
    let [k_cache, v_cache, ckv_cache, kpe_cache] = caches;
    [
        tensor("q_rope_in", Role::In, Dtype::Half, ROPE),
        tensor("k_rope_in", Role::In, Dtype::As(0), K_ROPE_PART),
        tensor("q_nope_in", Role::In, Dtype::As(0), NOPE),
        tensor("k_nope_in", Role::In, Dtype::As(0), K_NOPE_PART),
        v_in,
        tensor("q_rope_out", Role::Out, Dtype::Eight, ROPE),
        tensor("q_nope_out", Role::Out, Dtype::As(5), NOPE),
        table(&[Size::Of(4), Size::Of(2)]),
        indices("pos_ids", &[Size::Of(0)], Contents::Turns(4)),
        k_cache,
        v_cache,
        ckv_cache,
        kpe_cache,
        indices("kv_indices", &[Size::Of(INDICES)], Contents::Turns(PAGES)),
        indices("kv_indptr", &[Size::OneMore(REQUESTS)], Contents::Offsets(REQUESTS, INDICES)),
        indices("batch_indices", &[Size::Of(0)], Contents::Turns(REQUESTS)),
        indices("positions", &[Size::Of(0)], Contents::Rounds(REQUESTS)),
        number("kv_layout", Kind::Whole(layout, layout)),
        number("page_size", Kind::Whole(1, MOST)),
        SCALE_Q,
        SCALE_KV,
        INTERLEAVE,
        ENABLE_PDL,
    ]
}

const fn of_heads(shape: &'static [Size], layout: i64) -> [Argument; 23] {
    appended(
        tensor("v_in", Role::In, Dtype::As(0), &[Size::Of(0), Size::Of(6), Size::Of(HEAD_DIM)]),
        [
            cache("k_cache", Strides::Rows, shape),
            cache("v_cache", Strides::As(9), shape),
            missing("ckv_cache", 3),
            missing("kpe_cache", 3),
        ],
        layout,
    )
}

const fn appended_dimensions(kv_heads: (i64, &'static [i64]), pages: usize) -> [Dimension; 12] {
    [
        TOKENS,
        Q_HEADS,
        rope_dim(),
        dimension("no_rope_dim", From::Shape(2, 2), 0, &[64, 0, 128]),
        dimension("table_positions", From::Shape(7, 0), 1, &[50, 64]),
        switched(21),
        Dimension { name: "kv_heads", from: From::Shape(1, 1), least: 1, most: kv_heads.0, examples: kv_heads.1 },
        dimension("pages", From::Shape(pages, 0), 1, &[12, 20]),
        dimension("page_size", From::Number(18), 1, &[16, 11]),
        dimension("requests", From::OneLess(14, 0), 0, &[3, 6]),
        dimension("indices", From::Shape(13, 0), 0, &[9, 12]),
        Dimension { name: "head_dim", from: From::Sum(2, 3), least: 1, most: MOST, examples: &[] },
    ]
}

const WHOLE_PARTS: Relation = Relation {
    name: "no_rope_dim",
    only_on_gpu: true,
    holds: |sizes| sizes[3] % sizes[2].max(1) == 0,
    found: |sizes| format!("{} with rope_dim {}", sizes[3], sizes[2]),
    expected: "a multiple of rope_dim, since this kernel moves whole parts of that size; rope_quantize takes others",
};

const COUNTED: Relation = counted(
    |sizes| sizes[INDICES].saturating_mul(sizes[PAGE_SIZE]) <= MOST,
    |sizes| format!("{} pages of {} tokens", sizes[INDICES], sizes[PAGE_SIZE]),
);

const QUANTIZE_APPEND: Row = Row {
    kernel: "rope_quantize_append_paged_kv_cache",
    function: "rope_quantize_append_paged_kv_cache",
    summary: "As rope_quantize, with keys and values going to a paged cache whose pages have a token's heads together (NHD).",
    arguments: &of_heads(NHD, 0),
    dimensions: &appended_dimensions((MOST, &[2, 1]), 9),
    relations: &[EVEN, WHOLE_ROPE_VECTORS, WHOLE_PARTS, QUANTIZED_TABLE_FITS, QUANTIZED_FITS_GRID, COUNTED],
    hazards: &[
        "A token is written where `kv_indices`, `kv_indptr`, `batch_indices` and `positions` say, wherever that is: `Tokens` is \
         what makes it be in the cache.",
        "Which form it is, upstream tells by which caches have memory.",
        "Pages of 0 tokens would end the process: the launcher divides by them.",
        "Interleaved kernels read up to 32 bytes past a row of the table: `CosSinCache` has a row more than it says.",
    ],
    ..QUANTIZE
};

kernels! {
    /// [`apply_rope_pos_ids`].
    ApplyRopePosIds = POS_IDS;
    /// [`apply_llama31_rope_pos_ids`].
    ApplyLlama31RopePosIds = Row {
        kernel: "apply_llama31_rope_pos_ids",
        function: "apply_llama31_rope_pos_ids",
        summary: "As apply_rope_pos_ids, with the frequencies scaled as Llama 3.1 does.",
        arguments: &[
            Q_IN,
            K_IN,
            Q_ROPE,
            K_ROPE,
            indices("pos_ids", &[Size::Of(0)], Contents::Turns(0)),
            ROTARY_DIM,
            INTERLEAVE,
            number("rope_scale", Kind::Positive),
            number("rope_theta", Kind::Positive),
            LOW,
            HIGH,
            OLD_CONTEXT,
        ],
        ..POS_IDS
    };
    /// [`apply_rope`].
    ApplyRope = RAGGED;
    /// [`apply_llama31_rope`].
    ApplyLlama31Rope = Row {
        kernel: "apply_llama31_rope",
        function: "apply_llama31_rope",
        summary: "As apply_rope, with the frequencies scaled as Llama 3.1 does.",
        arguments: &[
            Q_IN,
            K_IN,
            Q_ROPE,
            K_ROPE,
            INDPTR,
            OFFSETS,
            ROTARY_DIM,
            INTERLEAVE,
            number("rope_scale", Kind::Positive),
            number("rope_theta", Kind::Positive),
            LOW,
            HIGH,
            OLD_CONTEXT,
        ],
        ..RAGGED
    };
    /// [`apply_rope_with_cos_sin_cache`].
    ApplyRopeWithCosSinCache = CACHED;
    /// [`apply_rope_with_cos_sin_cache_inplace`].
    ApplyRopeWithCosSinCacheInPlace = Row {
        kernel: "apply_rope_pos_ids_cos_sin_cache in place",
        summary: "As apply_rope_pos_ids_cos_sin_cache, onto the inputs.",
        relations: &[TURNS_PART, WHOLE_VECTORS_OF_TABLE, TABLE_FITS, FITS_GRID_IN_PARTS, IN_ONE_WARP],
        ..CACHED
    };
    /// [`rope_quantize`], of keys with heads.
    RopeQuantize = QUANTIZE;
    /// [`rope_quantize`], of keys that all heads share.
    RopeQuantizeMla = Row {
        kernel: "rope_quantize of shared keys",
        summary: "As rope_quantize, of keys that all heads share (multi-head latent attention).",
        arguments: &quantized(MLA_ROPE_PART, MLA_NOPE_PART),
        dimensions: &quantized_dimensions(),
        ..QUANTIZE
    };
    /// [`rope_quantize_append_paged_kv_cache`], to a cache in [`KvLayout::Nhd`].
    RopeQuantizeAppendPagedKvCache = QUANTIZE_APPEND;
    /// [`rope_quantize_append_paged_kv_cache`], to a cache in [`KvLayout::Hnd`].
    RopeQuantizeAppendPagedKvCacheHnd = Row {
        kernel: "rope_quantize_append_paged_kv_cache of heads",
        summary: "As rope_quantize, with keys and values going to a paged cache whose pages have a head's tokens together (HND).",
        arguments: &of_heads(HND, 1),
        ..QUANTIZE_APPEND
    };
    /// [`rope_quantize_append_paged_mla_kv_cache`].
    RopeQuantizeAppendPagedMlaKvCache = Row {
        kernel: "rope_quantize_append_paged_kv_cache of shared keys",
        summary: "As rope_quantize, with the keys that all heads share going to a paged cache.",
        arguments: &appended(
            missing("v_in", 3),
            [
                missing("k_cache", 4),
                missing("v_cache", 4),
                cache("ckv_cache", Strides::Rows, &[Size::Of(PAGES), Size::Of(PAGE_SIZE), Size::Of(3)]),
                cache("kpe_cache", Strides::Rows, &[Size::Of(PAGES), Size::Of(PAGE_SIZE), Size::Of(2)]),
            ],
            0,
        ),
        dimensions: &appended_dimensions((1, &[1]), 11),
        ..QUANTIZE_APPEND
    };
}

/// Whether the kernels run on a device: on the host always, on a GPU by its compute capability.
///
/// # Errors
/// [`DeviceOutOfRange`](crate::FlashInferError::DeviceOutOfRange), or why there is no GPU.
pub fn is_supported(device: Device) -> Result<bool> {
    Entry::of::<ApplyRopePosIds>().is_supported(device)
}

/// How angles are computed by the kernel itself.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct RopeOptions {
    /// How many elements of each head are turned; `None` is all.
    pub rotary_dim: Option<i64>,
    /// Whether pairs are neighbours (GPT-J) and not an element of each half (GPT-NeoX, Llama).
    pub interleave: bool,
    /// What positions are divided by; positive.
    pub rope_scale: f64,
    /// The base of the frequencies; positive.
    pub rope_theta: f64,
}

impl Default for RopeOptions {
    fn default() -> Self {
        Self { rotary_dim: None, interleave: false, rope_scale: 1.0, rope_theta: 1e4 }
    }
}

/// How angles are computed by the kernel itself, with the frequencies scaled as Llama 3.1 does.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Llama31RopeOptions {
    /// What the plain form takes too; scale 8 and theta 500,000 are Llama 3.1's.
    pub rope: RopeOptions,
    /// Frequencies that turn less often than so within the old context are divided by the scale; positive.
    pub low_freq_factor: f64,
    /// Those that turn more often are not, and those between are blended; above `low_freq_factor`, from 1 to 1,000,000.
    pub high_freq_factor: f64,
    /// The old context in tokens; positive.
    pub old_context_length: f64,
}

impl Default for Llama31RopeOptions {
    fn default() -> Self {
        let rope = RopeOptions { rope_scale: 8.0, rope_theta: 5e5, ..RopeOptions::default() };
        Self { rope, low_freq_factor: 1.0, high_freq_factor: 4.0, old_context_length: 8192.0 }
    }
}

/// Queries and keys, and where their turned copies go.
type Heads<'a, 'o> = [Operand<'a, 'o>; 4];

impl RopeOptions {
    /// `rotary_dim`, `interleave`, `rope_scale` and `rope_theta`.
    #[inline(always)]
    fn operands<'a>(&self, q: Operand<'_, '_>) -> [Operand<'a, 'a>; 4] {
        let whole = || q.layout().map_or(0, |layout| layout.size(layout.ndim().saturating_sub(1)));
        [
            Operand::Whole(self.rotary_dim.unwrap_or_else(whole)),
            Operand::Bool(self.interleave),
            Operand::Number(self.rope_scale),
            Operand::Number(self.rope_theta),
        ]
    }
}

impl Llama31RopeOptions {
    /// Behind those of the plain form.
    #[inline(always)]
    fn operands<'a>(&self, function: &'static str) -> Result<[Operand<'a, 'a>; 3]> {
        // The kernel divides by their difference and by what their quotient is above 1, in single precision. What is no number
        // there is refused by the row.
        let [low, high] = [self.low_freq_factor as f32, self.high_freq_factor as f32];
        let apart = high / low > 1.0 && high - low > 0.0;
        if low.is_normal() && low > 0.0 && !apart {
            let expected = format!("more than low_freq_factor, {}", self.low_freq_factor);
            return refuse(function, "high_freq_factor", self.high_freq_factor.to_string(), expected);
        }
        let [low, high, old] = [self.low_freq_factor, self.high_freq_factor, self.old_context_length];
        Ok([Operand::Number(low), Operand::Number(high), Operand::Number(old)])
    }
}

/// Turns queries and keys by angles that the kernel computes.
///
/// <!-- apply_rope_pos_ids -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `q` | `[tokens, q_heads, head_dim]` | F16 or BF16 | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `k` | `[tokens, kv_heads, head_dim]` | as `q` | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `q_rope` | `[tokens, q_heads, head_dim]` | as `q` | written; rows anywhere; aligned to 16 bytes |
/// | `k_rope` | `[tokens, kv_heads, head_dim]` | as `q` | written; rows anywhere; aligned to 16 bytes |
/// | `pos_ids` | `[tokens]` | I32 | read; contiguous; aligned to 4 bytes |
///
/// # Errors
/// See the [module](self). On a GPU the head size is 64, 128, 256 or 512, and `rotary_dim` a multiple of 16 (interleaved of 8;
/// with heads of 512 twice that).
pub fn apply_rope_pos_ids(
    (q_rope, k_rope): (&mut TensorMut<'_>, &mut TensorMut<'_>),
    (q, k): (&TensorRef<'_>, &TensorRef<'_>),
    pos_ids: &Placed<'_, Positions>,
    options: &RopeOptions,
    stream: Stream<'_>,
) -> Result<()> {
    let pos_ids = pos_ids.positions();
    turn([q.operand(), k.operand(), q_rope.operand(), k_rope.operand()], pos_ids.operand(), options, stream)
}

/// [`apply_rope_pos_ids`] onto its inputs.
///
/// # Errors
/// As there.
pub fn apply_rope_pos_ids_inplace(
    q: &mut TensorMut<'_>,
    k: &mut TensorMut<'_>,
    pos_ids: &Placed<'_, Positions>,
    options: &RopeOptions,
    stream: Stream<'_>,
) -> Result<()> {
    let (q, k, pos_ids) = (q.operand(), k.operand(), pos_ids.positions());
    turn([q, k, q, k], pos_ids.operand(), options, stream)
}

#[inline(always)]
fn turn(
    [q, k, q_rope, k_rope]: Heads<'_, '_>,
    at: Operand<'_, '_>,
    options: &RopeOptions,
    s: Stream<'_>,
) -> Result<()> {
    let [rotary_dim, interleave, scale, theta] = options.operands(q);
    let operands = [q, k, q_rope, k_rope, at, rotary_dim, interleave, scale, theta];
    // SAFETY: positions change angles alone. That tensors are distinct, or one in place, their borrows say; in place a head lies
    // in one warp, whose threads read before they write.
    unsafe { call::<ApplyRopePosIds, 9>(operands, s) }
}

/// [`apply_rope_pos_ids`] with the frequencies scaled as Llama 3.1 does.
///
/// <!-- apply_llama31_rope_pos_ids -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `q` | `[tokens, q_heads, head_dim]` | F16 or BF16 | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `k` | `[tokens, kv_heads, head_dim]` | as `q` | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `q_rope` | `[tokens, q_heads, head_dim]` | as `q` | written; rows anywhere; aligned to 16 bytes |
/// | `k_rope` | `[tokens, kv_heads, head_dim]` | as `q` | written; rows anywhere; aligned to 16 bytes |
/// | `pos_ids` | `[tokens]` | I32 | read; contiguous; aligned to 4 bytes |
///
/// # Errors
/// As there, and for a `high_freq_factor` that is not above `low_freq_factor`.
pub fn apply_llama31_rope_pos_ids(
    (q_rope, k_rope): (&mut TensorMut<'_>, &mut TensorMut<'_>),
    (q, k): (&TensorRef<'_>, &TensorRef<'_>),
    pos_ids: &Placed<'_, Positions>,
    options: &Llama31RopeOptions,
    stream: Stream<'_>,
) -> Result<()> {
    let pos_ids = pos_ids.positions();
    turn_llama31([q.operand(), k.operand(), q_rope.operand(), k_rope.operand()], pos_ids.operand(), options, stream)
}

/// [`apply_llama31_rope_pos_ids`] onto its inputs.
///
/// # Errors
/// As there.
pub fn apply_llama31_rope_pos_ids_inplace(
    q: &mut TensorMut<'_>,
    k: &mut TensorMut<'_>,
    pos_ids: &Placed<'_, Positions>,
    options: &Llama31RopeOptions,
    stream: Stream<'_>,
) -> Result<()> {
    let (q, k, pos_ids) = (q.operand(), k.operand(), pos_ids.positions());
    turn_llama31([q, k, q, k], pos_ids.operand(), options, stream)
}

fn turn_llama31(
    [q, k, q_rope, k_rope]: Heads<'_, '_>,
    at: Operand<'_, '_>,
    options: &Llama31RopeOptions,
    stream: Stream<'_>,
) -> Result<()> {
    let [rotary_dim, interleave, scale, theta] = options.rope.operands(q);
    let [low, high, old] = options.operands("apply_llama31_rope_pos_ids")?;
    let operands = [q, k, q_rope, k_rope, at, rotary_dim, interleave, scale, theta, low, high, old];
    // SAFETY: as for `turn`.
    unsafe { call::<ApplyLlama31RopePosIds, 12>(operands, stream) }
}

/// [`apply_rope_pos_ids`] of sequences that lie one after the other, each with positions from an offset of its own on.
///
/// <!-- apply_rope -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `q` | `[tokens, q_heads, head_dim]` | F16 or BF16 | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `k` | `[tokens, kv_heads, head_dim]` | as `q` | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `q_rope` | `[tokens, q_heads, head_dim]` | as `q` | written; rows anywhere; aligned to 16 bytes |
/// | `k_rope` | `[tokens, kv_heads, head_dim]` | as `q` | written; rows anywhere; aligned to 16 bytes |
/// | `indptr` | `[sequences + 1]` | I32 | read; contiguous; aligned to 4 bytes |
/// | `offsets` | `[sequences]` | I32 | read; contiguous; aligned to 4 bytes |
///
/// # Errors
/// As there, and for sequences of another number of tokens.
pub fn apply_rope(
    (q_rope, k_rope): (&mut TensorMut<'_>, &mut TensorMut<'_>),
    (q, k): (&TensorRef<'_>, &TensorRef<'_>),
    sequences: &Placed<'_, RaggedPositions>,
    options: &RopeOptions,
    stream: Stream<'_>,
) -> Result<()> {
    turn_ragged([q.operand(), k.operand(), q_rope.operand(), k_rope.operand()], sequences, options, stream)
}

/// [`apply_rope`] onto its inputs.
///
/// # Errors
/// As there.
pub fn apply_rope_inplace(
    q: &mut TensorMut<'_>,
    k: &mut TensorMut<'_>,
    sequences: &Placed<'_, RaggedPositions>,
    options: &RopeOptions,
    stream: Stream<'_>,
) -> Result<()> {
    let (q, k) = (q.operand(), k.operand());
    turn_ragged([q, k, q, k], sequences, options, stream)
}

/// That sequences have as many tokens as a tensor: what makes it sound to turn those that they say.
fn check_sequences(function: &'static str, sequences: &Placed<'_, RaggedPositions>, q: Operand<'_, '_>) -> Result<()> {
    let (found, tokens) = (sequences.facts().tokens, q.layout().map_or(0, |layout| layout.size(0)));
    match found == tokens {
        true => Ok(()),
        false => refuse(function, "indptr", format!("{found} tokens"), format!("{tokens}, as q has")),
    }
}

fn turn_ragged(
    [q, k, q_rope, k_rope]: Heads<'_, '_>,
    sequences: &Placed<'_, RaggedPositions>,
    options: &RopeOptions,
    stream: Stream<'_>,
) -> Result<()> {
    check_sequences("apply_rope", sequences, q)?;
    let (indptr, offsets) = (sequences.indptr(), sequences.offsets());
    let [rotary_dim, interleave, scale, theta] = options.operands(q);
    let (indptr, offsets) = (indptr.operand(), offsets.operand());
    let operands = [q, k, q_rope, k_rope, indptr, offsets, rotary_dim, interleave, scale, theta];
    // SAFETY: the sequences are within the tensors, by their own checks or their unsafe constructor's promise and by the check
    // above; for the rest as for `turn`.
    unsafe { call::<ApplyRope, 10>(operands, stream) }
}

/// [`apply_rope`] with the frequencies scaled as Llama 3.1 does.
///
/// <!-- apply_llama31_rope -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `q` | `[tokens, q_heads, head_dim]` | F16 or BF16 | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `k` | `[tokens, kv_heads, head_dim]` | as `q` | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `q_rope` | `[tokens, q_heads, head_dim]` | as `q` | written; rows anywhere; aligned to 16 bytes |
/// | `k_rope` | `[tokens, kv_heads, head_dim]` | as `q` | written; rows anywhere; aligned to 16 bytes |
/// | `indptr` | `[sequences + 1]` | I32 | read; contiguous; aligned to 4 bytes |
/// | `offsets` | `[sequences]` | I32 | read; contiguous; aligned to 4 bytes |
///
/// # Errors
/// As there, and for a `high_freq_factor` that is not above `low_freq_factor`.
pub fn apply_llama31_rope(
    (q_rope, k_rope): (&mut TensorMut<'_>, &mut TensorMut<'_>),
    (q, k): (&TensorRef<'_>, &TensorRef<'_>),
    sequences: &Placed<'_, RaggedPositions>,
    options: &Llama31RopeOptions,
    stream: Stream<'_>,
) -> Result<()> {
    turn_llama31_ragged([q.operand(), k.operand(), q_rope.operand(), k_rope.operand()], sequences, options, stream)
}

/// [`apply_llama31_rope`] onto its inputs.
///
/// # Errors
/// As there.
pub fn apply_llama31_rope_inplace(
    q: &mut TensorMut<'_>,
    k: &mut TensorMut<'_>,
    sequences: &Placed<'_, RaggedPositions>,
    options: &Llama31RopeOptions,
    stream: Stream<'_>,
) -> Result<()> {
    let (q, k) = (q.operand(), k.operand());
    turn_llama31_ragged([q, k, q, k], sequences, options, stream)
}

fn turn_llama31_ragged(
    [q, k, q_rope, k_rope]: Heads<'_, '_>,
    sequences: &Placed<'_, RaggedPositions>,
    options: &Llama31RopeOptions,
    stream: Stream<'_>,
) -> Result<()> {
    check_sequences("apply_llama31_rope", sequences, q)?;
    let (indptr, offsets) = (sequences.indptr(), sequences.offsets());
    let [rotary_dim, interleave, scale, theta] = options.rope.operands(q);
    let [low, high, old] = options.operands("apply_llama31_rope")?;
    let (indptr, offsets) = (indptr.operand(), offsets.operand());
    let operands = [q, k, q_rope, k_rope, indptr, offsets, rotary_dim, interleave, scale, theta, low, high, old];
    // SAFETY: as for `turn_ragged`.
    unsafe { call::<ApplyLlama31Rope, 13>(operands, stream) }
}

/// That a table has every position: what makes it sound to look there.
fn check_positions(
    function: &'static str,
    pos_ids: &Placed<'_, Positions>,
    cos_sin_cache: &Placed<'_, CosSinCache>,
) -> Result<()> {
    let (below, positions) = (pos_ids.facts().below, cos_sin_cache.facts().positions);
    match below <= positions {
        true => Ok(()),
        false => {
            let expected = format!("positions below {positions}, which the table has; make it of {below} positions");
            refuse(function, "pos_ids", format!("positions below {below}"), expected)
        }
    }
}

/// Turns queries and keys by angles whose cosines and sines a table has. The first `rotary_dim` elements of each head are
/// turned, which is the table's row length.
///
/// <!-- apply_rope_pos_ids_cos_sin_cache -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `q` | `[tokens, q_heads, head_dim]` | F16 or BF16 | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `k` | `[tokens, kv_heads, head_dim]` | as `q` | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `q_rope` | `[tokens, q_heads, head_dim]` | as `q` | written; rows anywhere; aligned to 16 bytes |
/// | `k_rope` | `[tokens, kv_heads, head_dim]` | as `q` | written; rows anywhere; aligned to 16 bytes |
/// | `cos_sin_cache` | `[positions, rotary_dim]` | F32 | read; contiguous; aligned to 16 bytes |
/// | `pos_ids` | `[tokens]` | I32 | read; contiguous; aligned to 4 bytes |
///
/// # Errors
/// See the [module](self), and for positions that the table has not. On a GPU `rotary_dim` is a multiple of 16 with head sizes
/// 64, 128 and 256 and of 32 with others; interleaved of half that.
pub fn apply_rope_with_cos_sin_cache(
    (q_rope, k_rope): (&mut TensorMut<'_>, &mut TensorMut<'_>),
    (q, k): (&TensorRef<'_>, &TensorRef<'_>),
    cos_sin_cache: &Placed<'_, CosSinCache>,
    pos_ids: &Placed<'_, Positions>,
    interleave: bool,
    stream: Stream<'_>,
) -> Result<()> {
    let heads = [q.operand(), k.operand(), q_rope.operand(), k_rope.operand()];
    turn_by_table::<ApplyRopeWithCosSinCache>(heads, cos_sin_cache, pos_ids, interleave, stream)
}

/// [`apply_rope_with_cos_sin_cache`] onto its inputs.
///
/// <!-- apply_rope_pos_ids_cos_sin_cache in place -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `q` | `[tokens, q_heads, head_dim]` | F16 or BF16 | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `k` | `[tokens, kv_heads, head_dim]` | as `q` | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `q_rope` | `[tokens, q_heads, head_dim]` | as `q` | written; rows anywhere; aligned to 16 bytes |
/// | `k_rope` | `[tokens, kv_heads, head_dim]` | as `q` | written; rows anywhere; aligned to 16 bytes |
/// | `cos_sin_cache` | `[positions, rotary_dim]` | F32 | read; contiguous; aligned to 16 bytes |
/// | `pos_ids` | `[tokens]` | I32 | read; contiguous; aligned to 4 bytes |
///
/// # Errors
/// As there. With a head size that is none of 64, 128, 256 and 512 `rotary_dim` is 32, 64, 128, 256 or 512, unless it is
/// interleaved.
pub fn apply_rope_with_cos_sin_cache_inplace(
    q: &mut TensorMut<'_>,
    k: &mut TensorMut<'_>,
    cos_sin_cache: &Placed<'_, CosSinCache>,
    pos_ids: &Placed<'_, Positions>,
    interleave: bool,
    stream: Stream<'_>,
) -> Result<()> {
    let (q, k) = (q.operand(), k.operand());
    turn_by_table::<ApplyRopeWithCosSinCacheInPlace>([q, k, q, k], cos_sin_cache, pos_ids, interleave, stream)
}

#[inline(always)]
fn turn_by_table<T: Kernel>(
    [q, k, q_rope, k_rope]: Heads<'_, '_>,
    cos_sin_cache: &Placed<'_, CosSinCache>,
    pos_ids: &Placed<'_, Positions>,
    interleave: bool,
    stream: Stream<'_>,
) -> Result<()> {
    check_positions("apply_rope_pos_ids_cos_sin_cache", pos_ids, cos_sin_cache)?;
    let (table, pos_ids) = (cos_sin_cache.table(), pos_ids.positions());
    let operands = [q, k, q_rope, k_rope, table.operand(), pos_ids.operand(), Operand::Bool(interleave)];
    // SAFETY: the table has every position, by the check above and by whoever made the positions, and readable memory behind it,
    // by whoever made the table. That tensors are distinct, or one in place, their borrows say.
    unsafe { call::<T, 7>(operands, stream) }
}

/// How turned queries and keys are rounded to 8 bits.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct RopeQuantizeOptions {
    /// What queries are multiplied by before they are rounded; positive.
    pub quant_scale_q: f64,
    /// What keys and values are multiplied by; positive.
    pub quant_scale_kv: f64,
    /// Whether pairs are neighbours (GPT-J) and not an element of each half (GPT-NeoX, Llama).
    pub interleave: bool,
    /// Programmatic dependent launch: the kernel may start before the one ahead of it in the stream has ended. It waits
    /// for that one's results by itself.
    pub pdl: bool,
}

impl Default for RopeQuantizeOptions {
    fn default() -> Self {
        Self { quant_scale_q: 1.0, quant_scale_kv: 1.0, interleave: false, pdl: false }
    }
}

impl RopeQuantizeOptions {
    fn operands<'a>(&self) -> [Operand<'a, 'a>; 4] {
        [
            Operand::Number(self.quant_scale_q),
            Operand::Number(self.quant_scale_kv),
            Operand::Bool(self.interleave),
            Operand::Bool(self.pdl),
        ]
    }
}

/// Both parts of queries and keys, and where their rounded copies go. The parts that are not turned may be left out, all four.
#[derive(Debug)]
pub struct RopeQuantizeTensors<'a> {
    /// `[tokens, q_heads, rope_dim]`.
    pub q_rope_in: TensorRef<'a>,
    /// `[tokens, kv_heads, rope_dim]`; of keys that all heads share `[tokens, rope_dim]`.
    pub k_rope_in: TensorRef<'a>,
    /// `[tokens, q_heads, no_rope_dim]`.
    pub q_nope_in: Option<TensorRef<'a>>,
    /// `[tokens, kv_heads, no_rope_dim]`; of keys that all heads share `[tokens, no_rope_dim]`.
    pub k_nope_in: Option<TensorRef<'a>>,
    /// As `q_rope_in`, of 8 bits.
    pub q_rope_out: TensorMut<'a>,
    /// As `k_rope_in`, of 8 bits.
    pub k_rope_out: TensorMut<'a>,
    /// As `q_nope_in`, of 8 bits.
    pub q_nope_out: Option<TensorMut<'a>>,
    /// As `k_nope_in`, of 8 bits.
    pub k_nope_out: Option<TensorMut<'a>>,
}

/// The part of a tensor's kind that is not there: of the same shape but for the last dimension, which is 0.
fn nothing(of: &Layout) -> Layout {
    let mut shape: Vec<i64> = of.shape().to_vec();
    let Some(last) = shape.last_mut() else { return *of };
    *last = 0;
    Layout::build(of.data(), of.device(), of.dtype(), &shape, None, of.stream())
}

const NOBODY: &Owner<'static> = &Owner::NONE;

/// Turns one part of queries and keys, scales both parts, and rounds them to 8 bits.
///
/// With heads of keys:
///
/// <!-- rope_quantize -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `q_rope_in` | `[tokens, q_heads, rope_dim]` | F16 or BF16 | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `k_rope_in` | `[tokens, kv_heads, rope_dim]` | as `q_rope_in` | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `q_nope_in` | `[tokens, q_heads, no_rope_dim]` | as `q_rope_in` | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `k_nope_in` | `[tokens, kv_heads, no_rope_dim]` | as `q_rope_in` | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `q_rope_out` | `[tokens, q_heads, rope_dim]` | F8E4M3 or F8E5M2 | written; rows anywhere; aligned to 16 bytes |
/// | `k_rope_out` | `[tokens, kv_heads, rope_dim]` | as `q_rope_out` | written; rows anywhere; aligned to 16 bytes |
/// | `q_nope_out` | `[tokens, q_heads, no_rope_dim]` | as `q_rope_out` | written; rows anywhere; aligned to 16 bytes |
/// | `k_nope_out` | `[tokens, kv_heads, no_rope_dim]` | as `q_rope_out` | written; rows anywhere; aligned to 16 bytes |
/// | `cos_sin_cache` | `[positions, rope_dim]` | F32 | read; contiguous; aligned to 16 bytes |
/// | `pos_ids` | `[tokens]` | I32 | read; contiguous; aligned to 4 bytes |
///
/// With keys that all heads share (multi-head latent attention):
///
/// <!-- rope_quantize of shared keys -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `q_rope_in` | `[tokens, q_heads, rope_dim]` | F16 or BF16 | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `k_rope_in` | `[tokens, rope_dim]` | as `q_rope_in` | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `q_nope_in` | `[tokens, q_heads, no_rope_dim]` | as `q_rope_in` | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `k_nope_in` | `[tokens, no_rope_dim]` | as `q_rope_in` | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `q_rope_out` | `[tokens, q_heads, rope_dim]` | F8E4M3 or F8E5M2 | written; rows anywhere; aligned to 16 bytes |
/// | `k_rope_out` | `[tokens, rope_dim]` | as `q_rope_out` | written; rows anywhere; aligned to 16 bytes |
/// | `q_nope_out` | `[tokens, q_heads, no_rope_dim]` | as `q_rope_out` | written; rows anywhere; aligned to 16 bytes |
/// | `k_nope_out` | `[tokens, no_rope_dim]` | as `q_rope_out` | written; rows anywhere; aligned to 16 bytes |
/// | `cos_sin_cache` | `[positions, rope_dim]` | F32 | read; contiguous; aligned to 16 bytes |
/// | `pos_ids` | `[tokens]` | I32 | read; contiguous; aligned to 4 bytes |
///
/// # Errors
/// See the [module](self), and for positions that the table has not. On a GPU `rope_dim` is a multiple of 32, interleaved of
/// 16.
pub fn rope_quantize(
    tensors: &mut RopeQuantizeTensors<'_>,
    cos_sin_cache: &Placed<'_, CosSinCache>,
    pos_ids: &Placed<'_, Positions>,
    options: &RopeQuantizeOptions,
    stream: Stream<'_>,
) -> Result<()> {
    check_positions("rope_quantize", pos_ids, cos_sin_cache)?;
    let (q, k) = (tensors.q_rope_in.layout(), tensors.k_rope_in.layout());
    let (q_out, k_out) = (tensors.q_rope_out.layout(), tensors.k_rope_out.layout());
    let [no_q, no_k, no_q_out, no_k_out] = [nothing(q), nothing(k), nothing(q_out), nothing(k_out)];
    let (table, pos_ids) = (cos_sin_cache.table(), pos_ids.positions());
    let [scale_q, scale_kv, interleave, pdl] = options.operands();
    let operands = [
        tensors.q_rope_in.operand(),
        tensors.k_rope_in.operand(),
        tensors.q_nope_in.as_ref().map_or(Operand::Tensor(&no_q, NOBODY), TensorRef::operand),
        tensors.k_nope_in.as_ref().map_or(Operand::Tensor(&no_k, NOBODY), TensorRef::operand),
        tensors.q_rope_out.operand(),
        tensors.k_rope_out.operand(),
        tensors.q_nope_out.as_ref().map_or(Operand::Tensor(&no_q_out, NOBODY), TensorMut::operand),
        tensors.k_nope_out.as_ref().map_or(Operand::Tensor(&no_k_out, NOBODY), TensorMut::operand),
        table.operand(),
        pos_ids.operand(),
        scale_q,
        scale_kv,
        interleave,
        pdl,
    ];
    match k.ndim() {
        // SAFETY: as for `turn_by_table`.
        2 => unsafe { call::<RopeQuantizeMla, 14>(operands, stream) },
        // SAFETY: as above.
        _ => unsafe { call::<RopeQuantize, 14>(operands, stream) },
    }
}

/// Both parts of queries, where their rounded copies go, and both parts of keys.
#[derive(Debug)]
pub struct RopeAppendTensors<'a> {
    /// `[tokens, q_heads, rope_dim]`.
    pub q_rope_in: TensorRef<'a>,
    /// `[tokens, kv_heads, rope_dim]`; of keys that all heads share with one head.
    pub k_rope_in: TensorRef<'a>,
    /// `[tokens, q_heads, no_rope_dim]`; left out where heads are turned whole.
    pub q_nope_in: Option<TensorRef<'a>>,
    /// `[tokens, kv_heads, no_rope_dim]`.
    pub k_nope_in: Option<TensorRef<'a>>,
    /// As `q_rope_in`, of 8 bits.
    pub q_rope_out: TensorMut<'a>,
    /// As `q_nope_in`, of 8 bits.
    pub q_nope_out: Option<TensorMut<'a>>,
}

/// As [`rope_quantize`], with keys and values going to their places in a paged cache of 8 bits.
///
/// A key is its turned part with the other behind it, so `head_dim` is the sum of both. Values are scaled as keys are. The
/// positions that angles follow from are given apart from those in the cache, since some models turn by others:
/// [`Placed::<Tokens>::positions`](Placed) are the same.
///
/// With a cache in [`KvLayout::Nhd`]:
///
/// <!-- rope_quantize_append_paged_kv_cache -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `q_rope_in` | `[tokens, q_heads, rope_dim]` | F16 or BF16 | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `k_rope_in` | `[tokens, kv_heads, rope_dim]` | as `q_rope_in` | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `q_nope_in` | `[tokens, q_heads, no_rope_dim]` | as `q_rope_in` | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `k_nope_in` | `[tokens, kv_heads, no_rope_dim]` | as `q_rope_in` | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `v_in` | `[tokens, kv_heads, head_dim]` | as `q_rope_in` | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `q_rope_out` | `[tokens, q_heads, rope_dim]` | F8E4M3 or F8E5M2 | written; rows anywhere; aligned to 16 bytes |
/// | `q_nope_out` | `[tokens, q_heads, no_rope_dim]` | as `q_rope_out` | written; rows anywhere; aligned to 16 bytes |
/// | `cos_sin_cache` | `[table_positions, rope_dim]` | F32 | read; contiguous; aligned to 16 bytes |
/// | `pos_ids` | `[tokens]` | I32 | read; contiguous; aligned to 4 bytes |
/// | `k_cache` | `[pages, page_size, kv_heads, head_dim]` | as `q_rope_out` | read and written; rows anywhere; aligned to 16 bytes |
/// | `v_cache` | `[pages, page_size, kv_heads, head_dim]` | as `q_rope_out` | read and written; strides as `k_cache`; aligned to 16 bytes |
/// | `kv_indices` | `[indices]` | I32 | read; contiguous; aligned to 4 bytes |
/// | `kv_indptr` | `[requests + 1]` | I32 | read; contiguous; aligned to 4 bytes |
/// | `batch_indices` | `[tokens]` | I32 | read; contiguous; aligned to 4 bytes |
/// | `positions` | `[tokens]` | I32 | read; contiguous; aligned to 4 bytes |
///
/// With a cache in [`KvLayout::Hnd`]:
///
/// <!-- rope_quantize_append_paged_kv_cache of heads -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `q_rope_in` | `[tokens, q_heads, rope_dim]` | F16 or BF16 | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `k_rope_in` | `[tokens, kv_heads, rope_dim]` | as `q_rope_in` | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `q_nope_in` | `[tokens, q_heads, no_rope_dim]` | as `q_rope_in` | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `k_nope_in` | `[tokens, kv_heads, no_rope_dim]` | as `q_rope_in` | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `v_in` | `[tokens, kv_heads, head_dim]` | as `q_rope_in` | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `q_rope_out` | `[tokens, q_heads, rope_dim]` | F8E4M3 or F8E5M2 | written; rows anywhere; aligned to 16 bytes |
/// | `q_nope_out` | `[tokens, q_heads, no_rope_dim]` | as `q_rope_out` | written; rows anywhere; aligned to 16 bytes |
/// | `cos_sin_cache` | `[table_positions, rope_dim]` | F32 | read; contiguous; aligned to 16 bytes |
/// | `pos_ids` | `[tokens]` | I32 | read; contiguous; aligned to 4 bytes |
/// | `k_cache` | `[pages, kv_heads, page_size, head_dim]` | as `q_rope_out` | read and written; rows anywhere; aligned to 16 bytes |
/// | `v_cache` | `[pages, kv_heads, page_size, head_dim]` | as `q_rope_out` | read and written; strides as `k_cache`; aligned to 16 bytes |
/// | `kv_indices` | `[indices]` | I32 | read; contiguous; aligned to 4 bytes |
/// | `kv_indptr` | `[requests + 1]` | I32 | read; contiguous; aligned to 4 bytes |
/// | `batch_indices` | `[tokens]` | I32 | read; contiguous; aligned to 4 bytes |
/// | `positions` | `[tokens]` | I32 | read; contiguous; aligned to 4 bytes |
///
/// # Errors
/// As for [`rope_quantize`], and for tokens of a table for other pages. On a GPU `no_rope_dim` is a multiple of `rope_dim`.
pub fn rope_quantize_append_paged_kv_cache(
    cache: &mut PagedKvCache<'_>,
    tensors: &mut RopeAppendTensors<'_>,
    v_in: &TensorRef<'_>,
    tokens: &Placed<'_, Tokens>,
    (cos_sin_cache, pos_ids): (&Placed<'_, CosSinCache>, &Placed<'_, Positions>),
    options: &RopeQuantizeOptions,
    stream: Stream<'_>,
) -> Result<()> {
    let pages = (cache.pages(), cache.page_size());
    let of_heads = cache.layout() == KvLayout::Hnd;
    let (k, v) = cache.operands();
    let caches = [v_in.operand(), k, v, Operand::Absent, Operand::Absent];
    let steering = Steered { tokens, cos_sin_cache, pos_ids };
    match of_heads {
        false => append::<RopeQuantizeAppendPagedKvCache>(tensors, caches, pages, 0, steering, options, stream),
        true => append::<RopeQuantizeAppendPagedKvCacheHnd>(tensors, caches, pages, 1, steering, options, stream),
    }
}

/// As [`rope_quantize_append_paged_kv_cache`], with keys that all heads share (multi-head latent attention): the turned part
/// goes to `kpe_cache`, the other to `ckv_cache`.
///
/// <!-- rope_quantize_append_paged_kv_cache of shared keys -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `q_rope_in` | `[tokens, q_heads, rope_dim]` | F16 or BF16 | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `k_rope_in` | `[tokens, kv_heads, rope_dim]` | as `q_rope_in` | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `q_nope_in` | `[tokens, q_heads, no_rope_dim]` | as `q_rope_in` | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `k_nope_in` | `[tokens, kv_heads, no_rope_dim]` | as `q_rope_in` | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `q_rope_out` | `[tokens, q_heads, rope_dim]` | F8E4M3 or F8E5M2 | written; rows anywhere; aligned to 16 bytes |
/// | `q_nope_out` | `[tokens, q_heads, no_rope_dim]` | as `q_rope_out` | written; rows anywhere; aligned to 16 bytes |
/// | `cos_sin_cache` | `[table_positions, rope_dim]` | F32 | read; contiguous; aligned to 16 bytes |
/// | `pos_ids` | `[tokens]` | I32 | read; contiguous; aligned to 4 bytes |
/// | `ckv_cache` | `[pages, page_size, no_rope_dim]` | as `q_rope_out` | read and written; rows anywhere; aligned to 16 bytes |
/// | `kpe_cache` | `[pages, page_size, rope_dim]` | as `q_rope_out` | read and written; rows anywhere; aligned to 16 bytes |
/// | `kv_indices` | `[indices]` | I32 | read; contiguous; aligned to 4 bytes |
/// | `kv_indptr` | `[requests + 1]` | I32 | read; contiguous; aligned to 4 bytes |
/// | `batch_indices` | `[tokens]` | I32 | read; contiguous; aligned to 4 bytes |
/// | `positions` | `[tokens]` | I32 | read; contiguous; aligned to 4 bytes |
///
/// # Errors
/// As there.
pub fn rope_quantize_append_paged_mla_kv_cache(
    cache: &mut PagedMlaCache<'_>,
    tensors: &mut RopeAppendTensors<'_>,
    tokens: &Placed<'_, Tokens>,
    (cos_sin_cache, pos_ids): (&Placed<'_, CosSinCache>, &Placed<'_, Positions>),
    options: &RopeQuantizeOptions,
    stream: Stream<'_>,
) -> Result<()> {
    let pages = (cache.pages(), cache.page_size());
    let (ckv, kpe) = cache.operands();
    let caches = [Operand::Absent, Operand::Absent, Operand::Absent, ckv, kpe];
    let steering = Steered { tokens, cos_sin_cache, pos_ids };
    append::<RopeQuantizeAppendPagedMlaKvCache>(tensors, caches, pages, 0, steering, options, stream)
}

/// What an appending call finds its way by.
struct Steered<'a> {
    tokens: &'a Placed<'a, Tokens>,
    cos_sin_cache: &'a Placed<'a, CosSinCache>,
    pos_ids: &'a Placed<'a, Positions>,
}

fn append<T: Kernel>(
    tensors: &RopeAppendTensors<'_>,
    [v_in, k_cache, v_cache, ckv_cache, kpe_cache]: [Operand<'_, '_>; 5],
    pages: (i64, i64),
    layout: i64,
    Steered { tokens, cos_sin_cache, pos_ids }: Steered<'_>,
    options: &RopeQuantizeOptions,
    stream: Stream<'_>,
) -> Result<()> {
    let function = "rope_quantize_append_paged_kv_cache";
    check_tokens(function, tokens, pages)?;
    check_positions(function, pos_ids, cos_sin_cache)?;
    let (q, k, q_out) = (tensors.q_rope_in.layout(), tensors.k_rope_in.layout(), tensors.q_rope_out.layout());
    let [no_q, no_k, no_q_out] = [nothing(q), nothing(k), nothing(q_out)];
    let (table, pos_ids) = (cos_sin_cache.table(), pos_ids.positions());
    let (kv_indices, kv_indptr) = (tokens.kv_indices(), tokens.kv_indptr());
    let (batch_indices, positions) = (tokens.batch_indices(), tokens.token_positions());
    let [scale_q, scale_kv, interleave, pdl] = options.operands();
    let operands = [
        tensors.q_rope_in.operand(),
        tensors.k_rope_in.operand(),
        tensors.q_nope_in.as_ref().map_or(Operand::Tensor(&no_q, NOBODY), TensorRef::operand),
        tensors.k_nope_in.as_ref().map_or(Operand::Tensor(&no_k, NOBODY), TensorRef::operand),
        v_in,
        tensors.q_rope_out.operand(),
        tensors.q_nope_out.as_ref().map_or(Operand::Tensor(&no_q_out, NOBODY), TensorMut::operand),
        table.operand(),
        pos_ids.operand(),
        k_cache,
        v_cache,
        ckv_cache,
        kpe_cache,
        kv_indices.operand(),
        kv_indptr.operand(),
        batch_indices.operand(),
        positions.operand(),
        Operand::Whole(layout),
        Operand::Whole(pages.1),
        scale_q,
        scale_kv,
        interleave,
        pdl,
    ];
    // SAFETY: the tokens are those of a table for these pages, by the checks above and by whoever made them; for the rest as for
    // `turn_by_table`.
    unsafe { call::<T, 23>(operands, stream) }
}
