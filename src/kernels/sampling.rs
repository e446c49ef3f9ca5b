//! `sampling.so`: probabilities out of logits, and tokens out of probabilities.
//!
//! FlashInfer's kernels take every row for a distribution. Of a row of NaN or of zeros they read memory that is not theirs or
//! answer what is no token, and of one with an infinity some never end; nothing on the way looks. So there are two ways to call
//! them:
//! - [`SamplingContext`], which is safe for any contents: a small kernel of this crate's own looks at the rows first, makes those
//!   that are no distribution such that have the first token alone, and says in a [`RowStatus`] for each row what was wrong,
//!   which can be read later, without a wait.
//! - the `unsafe` functions here, for engines that know their rows. They check all that can be seen without reading device
//!   memory, as every function of this crate does.
//!
//! [`softmax`], [`top_k_renorm_probs`] and [`top_k_mask_logits`] end and stay within their memory whatever they are given, so they
//! are safe as they are. NaN in logits comes out of softmax as NaN, which the call that draws finds; the other two take it for the
//! largest number and leave it out, so that nobody finds it behind them.
//!
//! On a GPU a call is asynchronous on its stream and never synchronizes; tensors on the host are computed by the
//! [reference](crate::reference), at once. Without rows a call is a no-op. Rows are of up to 2²⁴ tokens, and all rows of a call
//! together of up to 2³² numbers, which is how far the kernels count.
//!
//! # Randomness
//! A call takes its numbers from a [`Philox`], which it moves on past them. Output `i` draws from the sequence `i` of the seed, so
//! a batch that is cut in two draws other tokens. In a graph the source is one of its buffers, so that each launch draws anew.
//!
//! # Where this differs from FlashInfer's Python
//! Tokens are I32. There is a token for each row: `indices`, by which Python draws several from one row, is left out, since
//! release 0.6.3 reads `top_k` and `min_p` by the place in the output and `top_p` by the row, past the end of one of them where
//! the numbers differ; calling again draws again. [`sampling_from_logits`] of a context goes through [`softmax`], since
//! the kernel of that name lacks a barrier.
//!
//! # Errors
//! Every function answers [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for what breaks its contract,
//! before anything is launched; [`FrozenRandomness`](crate::FlashInferError::FrozenRandomness) for a draw in a capture from a
//! source that is neither a buffer of the graph nor frozen; [`DeviceOutOfRange`](crate::FlashInferError::DeviceOutOfRange); what
//! loading `sampling.so` answers; [`TvmFfiCall`](crate::FlashInferError::TvmFfiCall) with what the kernel raised; and
//! [`Cuda`](crate::FlashInferError::Cuda) or [`ContextLost`](crate::FlashInferError::ContextLost) where it was not launched.

use crate::contract::{
    Alignment, Argument, Attributes, Contents, Convention, Dimension, Dimensions, Dtype, Extent, From, Kind, Limit,
    Operand, Pdl, Relation, Reports, Role, Row, RunsOn, Size, Strides, Tensor,
};
use crate::engine::{Entry, Kernel, call, kernels};
use crate::error::Result;
use crate::indices::{LEAST_TOP_P, MinP, Setting, TEMPERATURES, Temperature, TopK, TopP};
use crate::philox::Philox;
use crate::stream::Stream;
use crate::tensor::{DType, Device, TensorMut, TensorRef};

#[path = "sampling/context.rs"]
mod context;
#[cfg(feature = "cudarc")]
#[path = "sampling/gpu.rs"]
mod gpu;
#[path = "sampling/guard.rs"]
mod guard;

pub use context::{Sampler, SamplingContext};
#[cfg(feature = "cudarc")]
pub use gpu::{CapturedSampling, SamplingViews};
pub use guard::RowStatus;

const MOST: i64 = i32::MAX as i64;

/// The longest vocabulary. From here on a slice of a softmax may be empty, whose partial result nobody writes.
const LONGEST: i64 = 1 << 24;

// The dimensions; of softmax, whose scratch memory is the third; and of the kernels that have rows in shared memory.
const ROWS: usize = 0;
const VOCAB: usize = 1;
const BYTES: usize = 2;
const ELEMENT: usize = 2;
const SHARED: usize = 3;
const MULTIPROCESSORS: usize = 4;
const STATES: usize = 5;

const fn tensor(
    name: &'static str,
    role: Role,
    (dtype, alignment): (Dtype, Alignment),
    shape: &'static [Size],
    contents: Contents,
) -> Argument {
    let strides = Strides::Contiguous;
    Argument { name, kind: Kind::Tensor(Tensor { role, optional: false, dtype, shape, strides, alignment, contents }) }
}

const fn optional(argument: Argument) -> Argument {
    match argument.kind {
        Kind::Tensor(tensor) => {
            Argument { name: argument.name, kind: Kind::Tensor(Tensor { optional: true, ..tensor }) }
        }
        kind => Argument { name: argument.name, kind },
    }
}

const fn number(name: &'static str, kind: Kind) -> Argument {
    Argument { name, kind }
}

const F32: Dtype = Dtype::Only(DType::F32);
const I32: Dtype = Dtype::Only(DType::I32);
const OF_ROWS: &[Size] = &[Size::Of(ROWS), Size::Of(VOCAB)];
/// Rows are moved 16 bytes at a time, as far as their length allows.
const VECTORS: Alignment = Alignment::Vector { dimension: VOCAB, most: 4 };

/// In steps, so that tests draw the same token in whichever order sums are made.
const fn probs(name: &'static str, role: Role) -> Argument {
    tensor(name, role, (F32, VECTORS), OF_ROWS, Contents::Steps(1, 64, 1.0 / 64.0))
}

const fn logits(name: &'static str, role: Role) -> Argument {
    tensor(name, role, (F32, VECTORS), OF_ROWS, Contents::Uniform(4.0))
}

/// A number for each row.
const fn per_row(name: &'static str, role: Role, dtype: Dtype, contents: Contents) -> Argument {
    tensor(name, role, (dtype, Alignment::Bytes(4)), &[Size::Of(ROWS)], contents)
}

const OUTPUT: Argument = per_row("output", Role::Out, I32, Contents::Zeros);
const INDICES: Argument = number("indices", Kind::Nothing);
const TOP_K_ARR: Argument = optional(per_row("top_k_arr", Role::In, I32, Contents::Between(1.0, 40.0)));
const TOP_P_ARR: Argument = optional(per_row("top_p_arr", Role::In, F32, Contents::Between(0.1, 1.0)));
const MIN_P_ARR: Argument = optional(per_row("min_p_arr", Role::In, F32, Contents::Between(0.0, 0.9)));
const TOP_K: Argument = number("top_k", Kind::Whole(1, MOST));
const TOP_P: Argument = number("top_p", Kind::Between(LEAST_TOP_P, 1.0));
const MIN_P: Argument = number("min_p", Kind::Between(0.0, 1.0));
const TEMPERATURE: Argument = number("temperature", Kind::Between(TEMPERATURES.0, TEMPERATURES.1));
const DETERMINISTIC: Argument = number("deterministic", Kind::Switch);
const SEED: Argument = number("philox_seed", Kind::Whole(i64::MIN, i64::MAX));
const OFFSET: Argument = number("philox_offset", Kind::Whole(i64::MIN, i64::MAX));
const ENABLE_PDL: Argument = number("enable_pdl", Kind::EnablePdl);

const fn dimension(name: &'static str, from: From, (least, most): (i64, i64), examples: &'static [i64]) -> Dimension {
    Dimension { name, from, least, most, examples }
}

/// The dimensions of `[rows, vocab]`, whose sizes the argument with this place has.
const fn rows_and_vocab(argument: usize) -> [Dimension; 2] {
    [
        dimension("rows", From::Shape(argument, 0), (0, MOST), &[5, 1, 33]),
        dimension("vocab", From::Shape(argument, 1), (1, LONGEST), &[1000, 8, 4096, 12, 7]),
    ]
}

/// With what the kernels that have rows in shared memory are launched by.
const fn rows_in_blocks() -> [Dimension; 5] {
    let [rows, vocab] = rows_and_vocab(0);
    [
        rows,
        vocab,
        dimension("element_size", From::ElementSize(0), (0, i64::MAX), &[]),
        dimension("shared_memory", From::Gpu(Limit::SharedMemory), (0, i64::MAX), &[]),
        dimension("multiprocessors", From::Gpu(Limit::Multiprocessors), (0, i64::MAX), &[]),
    ]
}

/// Rows of up to this many are divided into slices where they are long, which need scratch memory.
const FEW_ROWS: i64 = 128;
const LONG_ROW: i64 = 24_576;
const SLICE: i64 = 8192;

/// How many bytes of scratch memory [`softmax`] needs for rows of that many tokens.
pub const fn softmax_workspace_size(rows: i64, vocab: i64) -> i64 {
    if rows > FEW_ROWS || vocab < LONG_ROW || rows < 0 { 0 } else { rows * ((vocab - 1) / SLICE + 1) * 8 }
}

const ENOUGH_WORKSPACE: Relation = Relation {
    name: "workspace",
    only_on_gpu: true,
    holds: |sizes| sizes[BYTES] >= softmax_workspace_size(sizes[ROWS], sizes[VOCAB]),
    found: |sizes| {
        let needed = softmax_workspace_size(sizes[ROWS], sizes[VOCAB]);
        format!("{} bytes long, of the {needed} that these rows need", sizes[BYTES])
    },
    expected: "as long as softmax_workspace_size says",
};

/// What a block has beside a row: two histograms and some numbers.
const BESIDE_A_ROW: i64 = 2080;
/// What the renormalizing kernel has besides, 336 bytes in the release that was looked at, and some to spare.
const OF_RENORM: i64 = 512;

/// How many bytes of shared memory a block takes that has a row, and something of its own.
const fn block_bytes(sizes: &Dimensions, own: i64) -> i64 {
    BESIDE_A_ROW + own + sizes[ELEMENT] * sizes[VOCAB]
}

/// That a row fits one block. What is of a type that there is no kernel for is said of the type.
const fn is_in_one_block(sizes: &Dimensions, own: i64) -> bool {
    block_bytes(sizes, own) <= sizes[SHARED] || !matches!(sizes[ELEMENT], 2 | 4)
}

fn what_a_block_takes(sizes: &Dimensions, own: i64) -> String {
    let (vocab, bytes, shared) = (sizes[VOCAB], block_bytes(sizes, own), sizes[SHARED]);
    format!("{vocab}, which take {bytes} bytes of shared memory, of {shared} that a block has on this GPU")
}

const MASKED_IN_ONE_BLOCK: Relation = Relation {
    name: "vocab",
    only_on_gpu: true,
    holds: |sizes| is_in_one_block(sizes, 0),
    found: |sizes| what_a_block_takes(sizes, 0),
    expected: "few enough for the shared memory of one block, 57,592 in F32 and 115,184 in 16 bits on GPUs of compute capability \
               9.0: longer rows take several blocks, which can hang in this release. Draw with FilterOrder::Joint, or call the \
               unsafe form for long rows",
};

const RENORMALIZED_IN_ONE_BLOCK: Relation = Relation {
    holds: |sizes| is_in_one_block(sizes, OF_RENORM),
    found: |sizes| what_a_block_takes(sizes, OF_RENORM),
    expected: "few enough for the shared memory of one block, 57,464 in F32 and 114,928 in 16 bits on GPUs of compute capability \
               9.0: longer rows take several blocks, which can hang in this release. Draw with FilterOrder::Joint, or call the \
               unsafe form for long rows",
    ..MASKED_IN_ONE_BLOCK
};

/// What the blocks of a long row agree by, in bytes.
const STATE: i64 = 3092;

/// How many bytes of states a call may use on a GPU of so many multiprocessors, each of which has a block: of rows that two blocks
/// share.
const fn states(multiprocessors: i64) -> i64 {
    STATE * if multiprocessors > 3 { multiprocessors / 2 } else { 1 }
}

/// More than the states of any GPU take: the memory that [`top_k_renorm_probs_of_long_rows`] needs, in bytes.
pub const ROW_STATES_SIZE: i64 = 1 << 20;

const ENOUGH_STATES: Relation = Relation {
    name: "row_states",
    only_on_gpu: true,
    holds: |sizes| sizes[STATES] >= states(sizes[MULTIPROCESSORS]),
    found: |sizes| format!("{} bytes long", sizes[STATES]),
    expected: "3,092 bytes for every two multiprocessors",
};

/// The longest row that blocks share, one on each multiprocessor.
const fn longest_row(sizes: &Dimensions) -> i64 {
    let element = if sizes[ELEMENT] > 0 { sizes[ELEMENT] } else { 1 };
    // A block has whole vectors of 16 bytes; rows of whose length less is a factor have shorter ones.
    let in_block = (sizes[SHARED] - BESIDE_A_ROW - OF_RENORM) / 16 * 16 / element;
    in_block * sizes[MULTIPROCESSORS]
}

const ALL_BLOCKS_AT_ONCE: Relation = Relation {
    name: "vocab",
    only_on_gpu: true,
    holds: |sizes| sizes[VOCAB] <= longest_row(sizes) || !matches!(sizes[ELEMENT], 2 | 4),
    found: |sizes| format!("{}, of {} that all blocks have room for at once", sizes[VOCAB], longest_row(sizes)),
    expected: "few enough for a block on each multiprocessor: blocks that wait for one that has no place wait forever",
};

/// What a caller of the kernels themselves must know of rows.
const DISTRIBUTIONS: &str = "Each row must have no NaN, no infinity, no number above 1e28 and no negative one, and a probability \
                             above 0 that is not subnormal: without one the kernel reads memory that is not its own, or answers \
                             what is no token.";
const ENDS: &str = "Of a `top_k` below 1 or a `top_p` that is not above 0 the kernel never ends.";
const UNFILTERED: &str =
    "Rows should sum to 1. Where a probability is above 1 the token may be one that `top_k` and `top_p` exclude.";
/// What the samplers have in common.
const SAMPLER: Row = Row {
    kernel: "",
    function: "",
    library: "sampling.so",
    feature: "sampling",
    summary: "",
    source: "`csrc/sampling.cu`, `include/flashinfer/sampling.cuh`",
    runs_on: RunsOn::AtLeast(7, 5),
    arguments: &[],
    lead: 0,
    dimensions: &rows_and_vocab(0),
    relations: &[],
    // Elements are counted in 32 bits. Not divided: an output's random numbers are its place's.
    extent: Extent { most: 1 << 32, split: false, stride: i64::MAX },
    pdl: Pdl::None,
    // What is set is the same for every call of a kernel.
    attributes: Attributes::None,
    reports: Reports::Status,
    uses_current_device: false,
    convention: Convention::Views,
    hazards: &[DISTRIBUTIONS],
    tolerance: [1e-6, 1e-6],
    tests: "`tests/sampling_gpu.rs`, `tests/sampling.rs`, `tests/properties_gpu.rs`",
};

const SOFTMAX: Row = Row {
    kernel: "softmax",
    function: "softmax",
    summary: "`output[i] = exp(logits[i] / temperature) / Σ exp(logits / temperature)`, row by row.",
    arguments: &[
        tensor(
            "workspace",
            Role::Workspace,
            (Dtype::Only(DType::U8), Alignment::Bytes(16)),
            &[Size::Of(BYTES)],
            Contents::Zeros,
        ),
        logits("logits", Role::In),
        logits("output", Role::Out),
        number("temperature_arr", Kind::Nothing),
        TEMPERATURE,
        ENABLE_PDL,
    ],
    lead: 1,
    dimensions: &{
        let [rows, vocab] = rows_and_vocab(1);
        [rows, vocab, dimension("bytes", From::Shape(0, 0), (0, MOST), &[64, 8, 1024])]
    },
    relations: &[ENOUGH_WORKSPACE],
    pdl: Pdl::Waits,
    attributes: Attributes::PerCall,
    hazards: &[
        "A row with NaN, with +∞, or of −∞ alone comes out with NaN or ∞ in it.",
        "The workspace must not be in use on another stream: the results would be wrong.",
    ],
    tolerance: [1e-5, 1e-5],
    ..SAMPLER
};

const TOP_K_RENORM: Row = Row {
    kernel: "top_k_renorm_probs",
    function: "top_k_renorm_probs",
    summary: "Keeps each row's `top_k` largest probabilities, with those that equal the least of them, and divides them by their sum.",
    source: "`csrc/renorm.cu`, `include/flashinfer/topk.cuh`",
    arguments: &[
        of_any("probs", Role::In, ANY, Contents::Between(0.01, 1.0)),
        of_any("renorm_probs", Role::Out, Dtype::As(0), Contents::Zeros),
        TOP_K_ARR,
        TOP_K,
        number("row_states", Kind::Missing(1)),
    ],
    dimensions: &rows_in_blocks(),
    relations: &[RENORMALIZED_IN_ONE_BLOCK],
    attributes: Attributes::PerCall,
    hazards: &["Sums below 1e-8 count as 1e-8.", "NaN counts as the largest number and becomes 0."],
    // Rounded once in 16 bits.
    tolerance: [4e-3, 6e-4],
    ..SAMPLER
};

const ANY: Dtype = Dtype::OneOf(&[DType::F32, DType::BF16, DType::F16]);

/// Moved 16 bytes at a time whatever the type is.
const fn of_any(name: &'static str, role: Role, dtype: Dtype, contents: Contents) -> Argument {
    tensor(name, role, (dtype, Alignment::Access { dimension: VOCAB, bytes: 16 }), OF_ROWS, contents)
}

const LONG_ROWS: &[&str] = &[
    "`row_states` must be zeros before its first use, and in use by no other stream.",
    "All blocks of a row must be on the GPU at once, which nothing sees to: beside other kernels they may wait for ever.",
    "Upstream reports that blocks may still wait for a state that another has cleared (mended in 0.6.14), which hangs.",
    "Of several rows a group of blocks may take the next one's sum where `top_k` is the whole vocabulary.",
];
const ROW_STATES: Argument = tensor(
    "row_states",
    Role::Workspace,
    (Dtype::Only(DType::U8), Alignment::Bytes(16)),
    &[Size::Of(STATES)],
    Contents::Zeros,
);

const fn long_rows_in_blocks() -> [Dimension; 6] {
    let [rows, vocab, element, shared, multiprocessors] = rows_in_blocks();
    let states = dimension("bytes", From::Shape(4, 0), (0, MOST), &[ROW_STATES_SIZE]);
    [rows, vocab, element, shared, multiprocessors, states]
}

const MASK: Row = Row {
    kernel: "top_k_mask_logits",
    function: "top_k_mask_logits",
    summary: "Keeps each row's `top_k` largest logits, with those that equal the least of them; all others become −∞.",
    arguments: &[
        of_any("logits", Role::In, ANY, Contents::Uniform(4.0)),
        of_any("mask_logits", Role::Out, Dtype::As(0), Contents::Zeros),
        TOP_K_ARR,
        TOP_K,
        number("row_states", Kind::Missing(1)),
    ],
    relations: &[MASKED_IN_ONE_BLOCK],
    hazards: &["NaN counts as the largest number and becomes −∞."],
    tolerance: [0.0, 0.0],
    ..TOP_K_RENORM
};

// The dimensions of speculative sampling.
const BATCH: usize = 0;
const COUNT: usize = 2;

const fn of_drafts(name: &'static str, role: Role, shape: &'static [Size], contents: Contents) -> Argument {
    tensor(name, role, (F32, VECTORS), shape, contents)
}

kernels! {
    /// [`softmax`].
    Softmax = SOFTMAX;
    /// [`softmax`] with a temperature for each row.
    SoftmaxOfTemperatures = Row {
        kernel: "softmax of temperatures",
        summary: "As softmax, with a temperature for each row.",
        arguments: &[
            tensor("workspace", Role::Workspace, (Dtype::Only(DType::U8), Alignment::Bytes(16)), &[Size::Of(BYTES)], Contents::Zeros),
            logits("logits", Role::In),
            logits("output", Role::Out),
            per_row("temperature_arr", Role::In, F32, Contents::Between(0.5, 2.0)),
            TEMPERATURE,
            ENABLE_PDL,
        ],
        pdl: Pdl::ReadsBefore("temperature_arr"),
        ..SOFTMAX
    };
    /// [`sampling_from_probs`].
    SamplingFromProbs = Row {
        kernel: "sampling_from_probs",
        function: "sampling_from_probs",
        summary: "Draws a token for each row: the first at which the sum of the probabilities is above a number between 0 and 1.",
        arguments: &[probs("probs", Role::In), OUTPUT, INDICES, DETERMINISTIC, SEED, OFFSET],
        ..SAMPLER
    };
    /// [`sampling_from_logits`].
    SamplingFromLogits = Row {
        kernel: "sampling_from_logits",
        function: "sampling_from_logits",
        summary: "Draws a token for each row: the largest of its logits, to each of which noise is added (Gumbel).",
        arguments: &[
            // So far apart that noise, whose logarithms are taken roughly, makes no other the largest.
            tensor("logits", Role::In, (F32, VECTORS), OF_ROWS, Contents::Uniform(1e9)),
            OUTPUT,
            INDICES,
            DETERMINISTIC,
            SEED,
            OFFSET,
        ],
        dimensions: &[
            dimension("rows", From::Shape(0, 0), (0, MOST), &[5, 1, 33]),
            // What a block takes at once, also one by one.
            dimension("vocab", From::Shape(0, 1), (1, LONGEST), &[256, 8, 100, 7]),
        ],
        hazards: &[
            "Release 0.6.3 lacks a barrier between the parts of a row that has more tokens than a block takes at once (4,096 at \
             the most): a token that is not the largest is possible.",
            "Of a row with NaN, or of −∞ alone, the answer may be no token.",
        ],
        ..SAMPLER
    };
    /// [`top_k_sampling_from_probs`].
    TopKSamplingFromProbs = Row {
        kernel: "top_k_sampling_from_probs",
        function: "top_k_sampling_from_probs",
        summary: "Draws a token for each row, out of its `top_k` likeliest and those that are as likely as the last of them.",
        arguments: &[probs("probs", Role::In), OUTPUT, INDICES, TOP_K_ARR, TOP_K, DETERMINISTIC, SEED, OFFSET],
        hazards: &[DISTRIBUTIONS, ENDS, UNFILTERED],
        ..SAMPLER
    };
    /// [`top_p_sampling_from_probs`].
    TopPSamplingFromProbs = Row {
        kernel: "top_p_sampling_from_probs",
        function: "top_p_sampling_from_probs",
        summary: "Draws a token for each row, out of its likeliest whose probabilities sum to `top_p`.",
        arguments: &[probs("probs", Role::In), OUTPUT, INDICES, TOP_P_ARR, TOP_P, DETERMINISTIC, SEED, OFFSET],
        hazards: &[DISTRIBUTIONS, ENDS, UNFILTERED],
        ..SAMPLER
    };
    /// [`min_p_sampling_from_probs`].
    MinPSamplingFromProbs = Row {
        kernel: "min_p_sampling_from_probs",
        function: "min_p_sampling_from_probs",
        summary: "Draws a token for each row, out of those that are at least `min_p` times as likely as its likeliest.",
        arguments: &[probs("probs", Role::In), OUTPUT, INDICES, MIN_P_ARR, MIN_P, DETERMINISTIC, SEED, OFFSET],
        hazards: &[
            DISTRIBUTIONS,
            "With a `min_p` of 0, or one whose product with the largest probability is subnormal, a token of probability 0 is \
             kept too, and by rounding may be drawn.",
        ],
        ..SAMPLER
    };
    /// [`top_k_top_p_sampling_from_probs`].
    TopKTopPSamplingFromProbs = Row {
        kernel: "top_k_top_p_sampling_from_probs",
        function: "top_k_top_p_sampling_from_probs",
        summary: "Draws a token for each row, out of those that both `top_k` and `top_p` keep.",
        arguments: &[
            probs("probs", Role::In),
            OUTPUT,
            INDICES,
            TOP_K_ARR,
            TOP_K,
            TOP_P_ARR,
            TOP_P,
            DETERMINISTIC,
            SEED,
            OFFSET,
        ],
        hazards: &[DISTRIBUTIONS, ENDS, UNFILTERED],
        ..SAMPLER
    };
    /// [`top_p_renorm_probs`].
    TopPRenormProbs = Row {
        kernel: "top_p_renorm_probs",
        function: "top_p_renorm_probs",
        summary: "Keeps each row's likeliest tokens whose probabilities sum to `top_p`, and divides them by their sum.",
        source: "`csrc/renorm.cu`, `include/flashinfer/sampling.cuh`",
        arguments: &[probs("probs", Role::In), probs("renorm_probs", Role::Out), TOP_P_ARR, TOP_P],
        hazards: &[
            "With an infinity, or a `top_p` that is not above 0, the kernel never ends; NaN and negative numbers it ignores.",
            "Rows should sum to 1: where all tokens are kept, and where the sum is below `top_p`, a row is divided by 1.",
        ],
        tolerance: [1e-5, 1e-5],
        ..SAMPLER
    };
    /// [`top_k_renorm_probs`].
    TopKRenormProbs = TOP_K_RENORM;
    /// [`top_k_renorm_probs_of_long_rows`].
    TopKRenormProbsOfLongRows = Row {
        kernel: "top_k_renorm_probs of long rows",
        summary: "As top_k_renorm_probs, of rows that several blocks share.",
        arguments: &[
            of_any("probs", Role::In, ANY, Contents::Between(0.01, 1.0)),
            of_any("renorm_probs", Role::Out, Dtype::As(0), Contents::Zeros),
            TOP_K_ARR,
            TOP_K,
            ROW_STATES,
        ],
        dimensions: &long_rows_in_blocks(),
        relations: &[ENOUGH_STATES, ALL_BLOCKS_AT_ONCE],
        hazards: LONG_ROWS,
        ..TOP_K_RENORM
    };
    /// [`top_k_mask_logits`].
    TopKMaskLogits = MASK;
    /// [`top_k_mask_logits_of_long_rows`].
    TopKMaskLogitsOfLongRows = Row {
        kernel: "top_k_mask_logits of long rows",
        summary: "As top_k_mask_logits, of rows that several blocks share.",
        arguments: &[
            of_any("logits", Role::In, ANY, Contents::Uniform(4.0)),
            of_any("mask_logits", Role::Out, Dtype::As(0), Contents::Zeros),
            TOP_K_ARR,
            TOP_K,
            ROW_STATES,
        ],
        dimensions: &long_rows_in_blocks(),
        relations: &[ENOUGH_STATES, ALL_BLOCKS_AT_ONCE],
        hazards: LONG_ROWS,
        ..MASK
    };
    /// [`chain_speculative_sampling`].
    ChainSpeculativeSampling = Row {
        kernel: "chain_speculative_sampling",
        function: "chain_speculative_sampling",
        summary: "Accepts each sequence's draft tokens as often as the target's probabilities allow, and draws the token behind them.",
        arguments: &[
            of_drafts(
                "draft_probs",
                Role::In,
                &[Size::Of(BATCH), Size::Of(COUNT), Size::Of(VOCAB)],
                Contents::Steps(1, 28, 1.0 / 64.0),
            ),
            tensor(
                "draft_token_ids",
                Role::In,
                (I32, Alignment::Bytes(4)),
                &[Size::Of(BATCH), Size::Of(COUNT)],
                Contents::Turns(VOCAB),
            ),
            // Above the draft's: what a test draws behind a draft that was rejected is there.
            of_drafts(
                "target_probs",
                Role::In,
                &[Size::Of(BATCH), Size::OneMore(COUNT), Size::Of(VOCAB)],
                Contents::Steps(32, 64, 1.0 / 64.0),
            ),
            tensor(
                "output_token_ids",
                Role::Out,
                (I32, Alignment::Bytes(4)),
                &[Size::Of(BATCH), Size::OneMore(COUNT)],
                Contents::Zeros,
            ),
            per_row("output_accepted_token_num", Role::InPlace, I32, Contents::Zeros),
            per_row("output_emitted_draft_token_num", Role::InPlace, I32, Contents::Zeros),
            DETERMINISTIC,
            SEED,
            OFFSET,
        ],
        dimensions: &[
            dimension("batch", From::Shape(0, 0), (0, MOST), &[5, 1, 9]),
            dimension("vocab", From::Shape(0, 2), (1, LONGEST), &[1000, 8, 4096, 12, 7]),
            dimension("count", From::Shape(0, 1), (1, MOST), &[3, 1, 5]),
        ],
        hazards: &[
            DISTRIBUTIONS,
            "Each draft token must be at least 0 and below `vocab`: it is where the kernel reads both rows.",
            "Where a token is rejected and the draft's row is nowhere below the target's, which is so by rounding alone, the answer \
             is no token.",
        ],
        ..SAMPLER
    };
}

/// Whether the kernels run on a device: on the host always, on a GPU by its compute capability.
///
/// # Errors
/// [`DeviceOutOfRange`](crate::FlashInferError::DeviceOutOfRange), or why there is no GPU.
pub fn is_supported(device: Device) -> Result<bool> {
    Entry::of::<SamplingFromProbs>().is_supported(device)
}

/// How a call computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct SamplingOptions {
    /// Whether sums are made in an order that gives the same bits in every run, which is somewhat slower. On by default.
    pub deterministic: bool,
    /// Programmatic dependent launch of [`softmax`], which may then start before the kernel ahead of it in the stream has ended,
    /// and waits for that one's results by itself. It is left off where rows have their own temperatures, which the kernel
    /// reads before it waits.
    pub pdl: bool,
    /// In which order a [`Sampler`] applies `top_k` and `top_p`.
    pub filter_order: FilterOrder,
}

impl Default for SamplingOptions {
    fn default() -> Self {
        Self { deterministic: true, pdl: false, filter_order: FilterOrder::default() }
    }
}

impl SamplingOptions {
    /// With the same bits in every run, or faster.
    #[must_use]
    pub fn with_deterministic(mut self, deterministic: bool) -> Self {
        self.deterministic = deterministic;
        self
    }

    /// With programmatic dependent launch on or off.
    #[must_use]
    pub fn with_pdl(mut self, pdl: bool) -> Self {
        self.pdl = pdl;
        self
    }

    /// With another order of `top_k` and `top_p`.
    #[must_use]
    pub fn with_filter_order(mut self, filter_order: FilterOrder) -> Self {
        self.filter_order = filter_order;
        self
    }
}

/// In which order `top_k` and `top_p` are applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FilterOrder {
    /// First `top_k`, and then `top_p` of what is left, whose probabilities sum to 1 again. FlashInfer's default; for rows that one
    /// block's shared memory holds.
    #[default]
    TopKFirst,
    /// Both at once, of the probabilities as they are.
    Joint,
}

/// What a call draws with: its last three arguments.
struct Draw([Operand<'static, 'static>; 3]);

impl Draw {
    fn new(function: &'static str, philox: &mut Philox, options: &SamplingOptions, stream: Stream<'_>) -> Result<Self> {
        philox.check(function, stream)?;
        let [seed, offset] = philox.draw().map(|bits| Operand::Whole(bits.cast_signed()));
        Ok(Self([Operand::Bool(options.deterministic), seed, offset]))
    }
}

/// How many numbers of a source FlashInfer's Python counts for a call of so many outputs, each of which may try up to 32 times.
fn tries(output: &TensorMut<'_>) -> u64 {
    outputs(output).saturating_mul(32)
}

fn outputs(output: &TensorMut<'_>) -> u64 {
    output.layout().size(0).max(0).cast_unsigned()
}

fn given<'a, 'o>(tensor: &'a Option<TensorRef<'o>>) -> Operand<'a, 'o> {
    tensor.as_ref().map_or(Operand::Absent, TensorRef::operand)
}

/// Softmax: `output[i] = exp(logits[i] / temperature) / Σ exp(logits / temperature)`, row by row.
///
/// <!-- softmax -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `workspace` | `[bytes]` | U8 | scratch memory; contiguous; aligned to 16 bytes |
/// | `logits` | `[rows, vocab]` | F32 | read; contiguous; aligned to gcd(4, vocab) elements |
/// | `output` | `[rows, vocab]` | F32 | written; contiguous; aligned to gcd(4, vocab) elements |
///
/// <!-- softmax of temperatures -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `workspace` | `[bytes]` | U8 | scratch memory; contiguous; aligned to 16 bytes |
/// | `logits` | `[rows, vocab]` | F32 | read; contiguous; aligned to gcd(4, vocab) elements |
/// | `output` | `[rows, vocab]` | F32 | written; contiguous; aligned to gcd(4, vocab) elements |
/// | `temperature_arr` | `[rows]` | F32 | read; contiguous; aligned to 4 bytes |
///
/// `temperature` is one number for all rows or each row's own: see [`PerRow`](crate::PerRow). A row that holds NaN or +∞, or
/// nothing but −∞, comes out with NaN or ∞ in it; a [`Sampler`] that draws from it says so.
///
/// # Errors
/// See the [module](self). A temperature is 1e-30 to 1e30: 0 is refused, since release 0.6.3 makes NaN of it.
pub fn softmax<'a>(
    output: &mut TensorMut<'_>,
    logits: &TensorRef<'_>,
    temperature: impl Into<Setting<'a, Temperature>>,
    workspace: &mut TensorMut<'_>,
    options: &SamplingOptions,
    stream: Stream<'_>,
) -> Result<()> {
    let tensors = [workspace.operand(), logits.operand(), output.operand()];
    softmax_of(tensors, temperature.into(), options, stream)
}

/// [`softmax`] of a tensor onto itself.
///
/// # Errors
/// As there.
pub fn softmax_in_place<'a>(
    logits: &mut TensorMut<'_>,
    temperature: impl Into<Setting<'a, Temperature>>,
    workspace: &mut TensorMut<'_>,
    options: &SamplingOptions,
    stream: Stream<'_>,
) -> Result<()> {
    softmax_of([workspace.operand(), logits.operand(), logits.operand()], temperature.into(), options, stream)
}

#[inline(always)]
fn softmax_of(
    tensors: [Operand<'_, '_>; 3],
    temperature: Setting<'_, Temperature>,
    options: &SamplingOptions,
    stream: Stream<'_>,
) -> Result<()> {
    let rows = temperature.rows();
    let operands = softmax_operands(tensors, given(&rows), temperature, options)?;
    match rows {
        // SAFETY: the kernel reads nothing in device memory to find its way, and each element is read for the last time before
        // it is written, by the thread that writes it.
        None => unsafe { call::<Softmax, 6>(operands, stream) },
        // SAFETY: as above.
        Some(_) => unsafe { call::<SoftmaxOfTemperatures, 6>(operands, stream) },
    }
}

#[inline(always)]
fn softmax_operands<'a, 'o>(
    [workspace, logits, output]: [Operand<'a, 'o>; 3],
    rows: Operand<'a, 'o>,
    temperature: Setting<'_, Temperature>,
    options: &SamplingOptions,
) -> Result<[Operand<'a, 'o>; 6]> {
    let all = Operand::Number(temperature.all("softmax")?.into());
    // Temperatures of rows are read before the kernel waits.
    let pdl = options.pdl && matches!(rows, Operand::Absent);
    Ok([workspace, logits, output, rows, all, Operand::Bool(pdl)])
}

/// The kernel itself: draws a token for each row, in proportion to the row's probabilities.
///
/// <!-- sampling_from_probs -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `probs` | `[rows, vocab]` | F32 | read; contiguous; aligned to gcd(4, vocab) elements |
/// | `output` | `[rows]` | I32 | written; contiguous; aligned to 4 bytes |
///
/// # Errors
/// See the [module](self).
///
/// # Safety
/// When the kernel runs, each row must have no NaN, no infinity, no number above 1e28 and no negative one, and a probability above
/// 0 that is not subnormal. [`Sampler::sampling_from_probs`] sees to it.
pub unsafe fn sampling_from_probs(
    output: &mut TensorMut<'_>,
    probs: &TensorRef<'_>,
    philox: &mut Philox,
    options: &SamplingOptions,
    stream: Stream<'_>,
) -> Result<()> {
    let Draw([deterministic, seed, offset]) = Draw::new("sampling_from_probs", philox, options, stream)?;
    let operands = [probs.operand(), output.operand(), Operand::Absent, deterministic, seed, offset];
    // SAFETY: the caller's promise.
    unsafe { call::<SamplingFromProbs, 6>(operands, stream) }?;
    philox.used(outputs(output));
    Ok(())
}

/// The kernel itself: draws a token for each row, in proportion to the exponentials of the row's logits.
///
/// <!-- sampling_from_logits -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `logits` | `[rows, vocab]` | F32 | read; contiguous; aligned to gcd(4, vocab) elements |
/// | `output` | `[rows]` | I32 | written; contiguous; aligned to 4 bytes |
///
/// # Errors
/// See the [module](self).
///
/// # Safety
/// Whatever the logits are, the kernel stays within its memory. But of a row with NaN, or of −∞ alone, it may answer what is no
/// token: 2³¹ − 1 for example. Whoever looks something up by the tokens must know that no row is such. Of rows of more than
/// 4,096 tokens it may also answer a token that is not the right one. [`Sampler::sampling_from_logits`] does neither.
pub unsafe fn sampling_from_logits(
    output: &mut TensorMut<'_>,
    logits: &TensorRef<'_>,
    philox: &mut Philox,
    options: &SamplingOptions,
    stream: Stream<'_>,
) -> Result<()> {
    let Draw([deterministic, seed, offset]) = Draw::new("sampling_from_logits", philox, options, stream)?;
    let operands = [logits.operand(), output.operand(), Operand::Absent, deterministic, seed, offset];
    // SAFETY: the caller's promise.
    unsafe { call::<SamplingFromLogits, 6>(operands, stream) }?;
    philox.used(outputs(output).saturating_mul(logits.layout().size(1).cast_unsigned()));
    Ok(())
}

/// The kernel itself: draws a token for each row, out of its `top_k` likeliest and those that are as likely as the last of them.
///
/// <!-- top_k_sampling_from_probs -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `probs` | `[rows, vocab]` | F32 | read; contiguous; aligned to gcd(4, vocab) elements |
/// | `output` | `[rows]` | I32 | written; contiguous; aligned to 4 bytes |
/// | `top_k_arr` | `[rows]` | I32 | read, optional; contiguous; aligned to 4 bytes |
///
/// # Errors
/// See the [module](self).
///
/// # Safety
/// As for [`sampling_from_probs`].
pub unsafe fn top_k_sampling_from_probs<'a>(
    output: &mut TensorMut<'_>,
    probs: &TensorRef<'_>,
    top_k: impl Into<Setting<'a, TopK>>,
    philox: &mut Philox,
    options: &SamplingOptions,
    stream: Stream<'_>,
) -> Result<()> {
    let (top_k, draw) = (top_k.into(), Draw::new("top_k_sampling_from_probs", philox, options, stream)?);
    let rows = top_k.rows();
    let operands = top_k_operands([probs.operand(), output.operand(), given(&rows)], top_k, draw)?;
    // SAFETY: the caller's promise; the numbers of the rows are what their type promises.
    unsafe { call::<TopKSamplingFromProbs, 8>(operands, stream) }?;
    philox.used(tries(output));
    Ok(())
}

fn top_k_operands<'a, 'o>(
    [probs, output, rows]: [Operand<'a, 'o>; 3],
    top_k: Setting<'_, TopK>,
    Draw([deterministic, seed, offset]): Draw,
) -> Result<[Operand<'a, 'o>; 8]> {
    let all = Operand::Whole(top_k.all("top_k_sampling_from_probs")?.into());
    Ok([probs, output, Operand::Absent, rows, all, deterministic, seed, offset])
}

/// The kernel itself: draws a token for each row, out of its likeliest whose probabilities sum to `top_p`.
///
/// <!-- top_p_sampling_from_probs -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `probs` | `[rows, vocab]` | F32 | read; contiguous; aligned to gcd(4, vocab) elements |
/// | `output` | `[rows]` | I32 | written; contiguous; aligned to 4 bytes |
/// | `top_p_arr` | `[rows]` | F32 | read, optional; contiguous; aligned to 4 bytes |
///
/// # Errors
/// See the [module](self).
///
/// # Safety
/// As for [`sampling_from_probs`].
pub unsafe fn top_p_sampling_from_probs<'a>(
    output: &mut TensorMut<'_>,
    probs: &TensorRef<'_>,
    top_p: impl Into<Setting<'a, TopP>>,
    philox: &mut Philox,
    options: &SamplingOptions,
    stream: Stream<'_>,
) -> Result<()> {
    let (top_p, draw) = (top_p.into(), Draw::new("top_p_sampling_from_probs", philox, options, stream)?);
    let rows = top_p.rows();
    let operands = top_p_operands([probs.operand(), output.operand(), given(&rows)], top_p, draw)?;
    // SAFETY: as in `top_k_sampling_from_probs`.
    unsafe { call::<TopPSamplingFromProbs, 8>(operands, stream) }?;
    philox.used(tries(output));
    Ok(())
}

fn top_p_operands<'a, 'o>(
    [probs, output, rows]: [Operand<'a, 'o>; 3],
    top_p: Setting<'_, TopP>,
    Draw([deterministic, seed, offset]): Draw,
) -> Result<[Operand<'a, 'o>; 8]> {
    let all = Operand::Number(top_p.all("top_p_sampling_from_probs")?.into());
    Ok([probs, output, Operand::Absent, rows, all, deterministic, seed, offset])
}

/// The kernel itself: draws a token for each row, out of those that are at least `min_p` times as likely as its likeliest.
///
/// <!-- min_p_sampling_from_probs -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `probs` | `[rows, vocab]` | F32 | read; contiguous; aligned to gcd(4, vocab) elements |
/// | `output` | `[rows]` | I32 | written; contiguous; aligned to 4 bytes |
/// | `min_p_arr` | `[rows]` | F32 | read, optional; contiguous; aligned to 4 bytes |
///
/// # Errors
/// See the [module](self).
///
/// # Safety
/// As for [`sampling_from_probs`].
pub unsafe fn min_p_sampling_from_probs<'a>(
    output: &mut TensorMut<'_>,
    probs: &TensorRef<'_>,
    min_p: impl Into<Setting<'a, MinP>>,
    philox: &mut Philox,
    options: &SamplingOptions,
    stream: Stream<'_>,
) -> Result<()> {
    let (min_p, draw) = (min_p.into(), Draw::new("min_p_sampling_from_probs", philox, options, stream)?);
    let rows = min_p.rows();
    let operands = min_p_operands([probs.operand(), output.operand(), given(&rows)], min_p, draw)?;
    // SAFETY: as in `top_k_sampling_from_probs`.
    unsafe { call::<MinPSamplingFromProbs, 8>(operands, stream) }?;
    philox.used(outputs(output));
    Ok(())
}

fn min_p_operands<'a, 'o>(
    [probs, output, rows]: [Operand<'a, 'o>; 3],
    min_p: Setting<'_, MinP>,
    Draw([deterministic, seed, offset]): Draw,
) -> Result<[Operand<'a, 'o>; 8]> {
    let all = Operand::Number(min_p.all("min_p_sampling_from_probs")?.into());
    Ok([probs, output, Operand::Absent, rows, all, deterministic, seed, offset])
}

/// The kernel itself: draws a token for each row, out of those that both `top_k` and `top_p` keep of the row as it is:
/// [`FilterOrder::Joint`].
///
/// <!-- top_k_top_p_sampling_from_probs -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `probs` | `[rows, vocab]` | F32 | read; contiguous; aligned to gcd(4, vocab) elements |
/// | `output` | `[rows]` | I32 | written; contiguous; aligned to 4 bytes |
/// | `top_k_arr` | `[rows]` | I32 | read, optional; contiguous; aligned to 4 bytes |
/// | `top_p_arr` | `[rows]` | F32 | read, optional; contiguous; aligned to 4 bytes |
///
/// # Errors
/// See the [module](self).
///
/// # Safety
/// As for [`sampling_from_probs`].
pub unsafe fn top_k_top_p_sampling_from_probs<'a>(
    output: &mut TensorMut<'_>,
    probs: &TensorRef<'_>,
    top_k: impl Into<Setting<'a, TopK>>,
    top_p: impl Into<Setting<'a, TopP>>,
    philox: &mut Philox,
    options: &SamplingOptions,
    stream: Stream<'_>,
) -> Result<()> {
    let (top_k, top_p) = (top_k.into(), top_p.into());
    let draw = Draw::new("top_k_top_p_sampling_from_probs", philox, options, stream)?;
    let (top_k_rows, top_p_rows) = (top_k.rows(), top_p.rows());
    let tensors = [probs.operand(), output.operand(), given(&top_k_rows), given(&top_p_rows)];
    let operands = joint_operands(tensors, top_k, top_p, draw)?;
    // SAFETY: as in `top_k_sampling_from_probs`.
    unsafe { call::<TopKTopPSamplingFromProbs, 10>(operands, stream) }?;
    philox.used(tries(output));
    Ok(())
}

fn joint_operands<'a, 'o>(
    [probs, output, top_k_rows, top_p_rows]: [Operand<'a, 'o>; 4],
    top_k: Setting<'_, TopK>,
    top_p: Setting<'_, TopP>,
    Draw([deterministic, seed, offset]): Draw,
) -> Result<[Operand<'a, 'o>; 10]> {
    const FUNCTION: &str = "top_k_top_p_sampling_from_probs";
    let (top_k, top_p) = (Operand::Whole(top_k.all(FUNCTION)?.into()), Operand::Number(top_p.all(FUNCTION)?.into()));
    Ok([probs, output, Operand::Absent, top_k_rows, top_k, top_p_rows, top_p, deterministic, seed, offset])
}

/// The kernel itself: keeps each row's likeliest tokens whose probabilities sum to `top_p`, and divides them by their sum.
///
/// <!-- top_p_renorm_probs -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `probs` | `[rows, vocab]` | F32 | read; contiguous; aligned to gcd(4, vocab) elements |
/// | `renorm_probs` | `[rows, vocab]` | F32 | written; contiguous; aligned to gcd(4, vocab) elements |
/// | `top_p_arr` | `[rows]` | F32 | read, optional; contiguous; aligned to 4 bytes |
///
/// # Errors
/// See the [module](self).
///
/// # Safety
/// When the kernel runs, no row may have an infinity: with one it never ends. [`Sampler::top_p_renorm_probs`] sees to it.
pub unsafe fn top_p_renorm_probs<'a>(
    renorm_probs: &mut TensorMut<'_>,
    probs: &TensorRef<'_>,
    top_p: impl Into<Setting<'a, TopP>>,
    stream: Stream<'_>,
) -> Result<()> {
    let top_p = top_p.into();
    let rows = top_p.rows();
    let operands = top_p_renorm_operands([probs.operand(), renorm_probs.operand(), given(&rows)], top_p)?;
    // SAFETY: the caller's promise; the numbers of the rows are what their type promises.
    unsafe { call::<TopPRenormProbs, 4>(operands, stream) }
}

fn top_p_renorm_operands<'a, 'o>(
    [probs, renorm_probs, rows]: [Operand<'a, 'o>; 3],
    top_p: Setting<'_, TopP>,
) -> Result<[Operand<'a, 'o>; 4]> {
    Ok([probs, renorm_probs, rows, Operand::Number(top_p.all("top_p_renorm_probs")?.into())])
}

/// Keeps each row's `top_k` largest probabilities, with those that equal the least of them, and divides them by their sum.
///
/// <!-- top_k_renorm_probs -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `probs` | `[rows, vocab]` | F32 or BF16 or F16 | read; contiguous; aligned to gcd(16 bytes' elements, vocab) elements |
/// | `renorm_probs` | `[rows, vocab]` | as `probs` | written; contiguous; aligned to gcd(16 bytes' elements, vocab) elements |
/// | `top_k_arr` | `[rows]` | I32 | read, optional; contiguous; aligned to 4 bytes |
///
/// NaN counts as the largest number and becomes 0. A row is in one block's shared memory; how long it may be is the GPU's matter, about 57,000 tokens in F32 on compute
/// capability 9.0, and 115,000 in 16 bits.
///
/// # Errors
/// See the [module](self).
pub fn top_k_renorm_probs<'a>(
    renorm_probs: &mut TensorMut<'_>,
    probs: &TensorRef<'_>,
    top_k: impl Into<Setting<'a, TopK>>,
    stream: Stream<'_>,
) -> Result<()> {
    in_one_block::<TopKRenormProbs>([probs.operand(), renorm_probs.operand()], top_k.into(), stream)
}

/// [`top_k_renorm_probs`] of a tensor onto itself.
///
/// # Errors
/// As there.
pub fn top_k_renorm_probs_in_place<'a>(
    probs: &mut TensorMut<'_>,
    top_k: impl Into<Setting<'a, TopK>>,
    stream: Stream<'_>,
) -> Result<()> {
    in_one_block::<TopKRenormProbs>([probs.operand(), probs.operand()], top_k.into(), stream)
}

/// Keeps each row's `top_k` largest logits, with those that equal the least of them; all others become −∞.
///
/// <!-- top_k_mask_logits -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `logits` | `[rows, vocab]` | F32 or BF16 or F16 | read; contiguous; aligned to gcd(16 bytes' elements, vocab) elements |
/// | `mask_logits` | `[rows, vocab]` | as `logits` | written; contiguous; aligned to gcd(16 bytes' elements, vocab) elements |
/// | `top_k_arr` | `[rows]` | I32 | read, optional; contiguous; aligned to 4 bytes |
///
/// NaN counts as the largest number and becomes −∞. How long a row may be is as for [`top_k_renorm_probs`].
///
/// # Errors
/// See the [module](self).
pub fn top_k_mask_logits<'a>(
    mask_logits: &mut TensorMut<'_>,
    logits: &TensorRef<'_>,
    top_k: impl Into<Setting<'a, TopK>>,
    stream: Stream<'_>,
) -> Result<()> {
    in_one_block::<TopKMaskLogits>([logits.operand(), mask_logits.operand()], top_k.into(), stream)
}

/// [`top_k_mask_logits`] of a tensor onto itself.
///
/// # Errors
/// As there.
pub fn top_k_mask_logits_in_place<'a>(
    logits: &mut TensorMut<'_>,
    top_k: impl Into<Setting<'a, TopK>>,
    stream: Stream<'_>,
) -> Result<()> {
    in_one_block::<TopKMaskLogits>([logits.operand(), logits.operand()], top_k.into(), stream)
}

#[inline(always)]
fn in_one_block<K: Kernel>(
    [input, output]: [Operand<'_, '_>; 2],
    top_k: Setting<'_, TopK>,
    stream: Stream<'_>,
) -> Result<()> {
    let (all, rows) = (top_k.all(K::ROW.function)?, top_k.rows());
    let operands = [input, output, given(&rows), Operand::Whole(all.into()), Operand::Absent];
    // SAFETY: whatever the contents are, a kernel that has a row in one block, as this one has, ends, and finds its way by sizes
    // and by `top_k` alone, which is 1 or more.
    unsafe { call::<K, 5>(operands, stream) }
}

/// As [`top_k_renorm_probs_in_place`], with other work ahead.
fn renorm_behind(
    probs: Operand<'_, '_>,
    top_k: Setting<'_, TopK>,
    stream: Stream<'_>,
    ahead: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let entry = Entry::of::<TopKRenormProbs>();
    let (all, rows) = (top_k.all(entry.row.function)?, top_k.rows());
    let operands = [probs, probs, given(&rows), Operand::Whole(all.into()), Operand::Absent];
    // SAFETY: as in `in_one_block`.
    unsafe { entry.call_behind(&operands, stream, ahead) }
}

/// The kernel itself: [`top_k_renorm_probs`] of rows that are too long for one block, which several share.
///
/// <!-- top_k_renorm_probs of long rows -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `probs` | `[rows, vocab]` | F32 or BF16 or F16 | read; contiguous; aligned to gcd(16 bytes' elements, vocab) elements |
/// | `renorm_probs` | `[rows, vocab]` | as `probs` | written; contiguous; aligned to gcd(16 bytes' elements, vocab) elements |
/// | `top_k_arr` | `[rows]` | I32 | read, optional; contiguous; aligned to 4 bytes |
/// | `row_states` | `[bytes]` | U8 | scratch memory; contiguous; aligned to 16 bytes |
///
/// # Errors
/// See the [module](self).
///
/// # Safety
/// `row_states` ([`ROW_STATES_SIZE`]) must be zeros before its first use, which each call leaves it as, and in use by no other stream. While the kernel
/// runs, the GPU must have room for all of its blocks at once, as many as it has multiprocessors: beside other kernels the
/// blocks of a row may wait for each other for ever. In release 0.6.3 they were seen to do so on some GPUs in any case.
pub unsafe fn top_k_renorm_probs_of_long_rows<'a>(
    renorm_probs: &mut TensorMut<'_>,
    probs: &TensorRef<'_>,
    top_k: impl Into<Setting<'a, TopK>>,
    row_states: &mut TensorMut<'_>,
    stream: Stream<'_>,
) -> Result<()> {
    let tensors = [probs.operand(), renorm_probs.operand(), row_states.operand()];
    // SAFETY: the caller's promise.
    unsafe { long_rows::<TopKRenormProbsOfLongRows>(tensors, top_k.into(), stream) }
}

/// The kernel itself: [`top_k_mask_logits`] of rows that are too long for one block, which several share.
///
/// <!-- top_k_mask_logits of long rows -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `logits` | `[rows, vocab]` | F32 or BF16 or F16 | read; contiguous; aligned to gcd(16 bytes' elements, vocab) elements |
/// | `mask_logits` | `[rows, vocab]` | as `logits` | written; contiguous; aligned to gcd(16 bytes' elements, vocab) elements |
/// | `top_k_arr` | `[rows]` | I32 | read, optional; contiguous; aligned to 4 bytes |
/// | `row_states` | `[bytes]` | U8 | scratch memory; contiguous; aligned to 16 bytes |
///
/// # Errors
/// See the [module](self).
///
/// # Safety
/// As for [`top_k_renorm_probs_of_long_rows`].
pub unsafe fn top_k_mask_logits_of_long_rows<'a>(
    mask_logits: &mut TensorMut<'_>,
    logits: &TensorRef<'_>,
    top_k: impl Into<Setting<'a, TopK>>,
    row_states: &mut TensorMut<'_>,
    stream: Stream<'_>,
) -> Result<()> {
    let tensors = [logits.operand(), mask_logits.operand(), row_states.operand()];
    // SAFETY: the caller's promise.
    unsafe { long_rows::<TopKMaskLogitsOfLongRows>(tensors, top_k.into(), stream) }
}

/// # Safety
/// As for [`top_k_renorm_probs_of_long_rows`].
unsafe fn long_rows<K: Kernel>(
    [input, output, states]: [Operand<'_, '_>; 3],
    top_k: Setting<'_, TopK>,
    stream: Stream<'_>,
) -> Result<()> {
    let (all, rows) = (top_k.all(K::ROW.function)?, top_k.rows());
    // SAFETY: the caller's promise.
    unsafe { call::<K, 5>([input, output, given(&rows), Operand::Whole(all.into()), states], stream) }
}

/// The tensors of speculative sampling: for each of `batch` sequences `count` draft tokens, which a smaller model has drawn.
#[derive(Debug)]
pub struct ChainTensors<'a> {
    /// `[batch, count, vocab]` F32: the probabilities that the smaller model drew the drafts from.
    pub draft_probs: TensorMut<'a>,
    /// `[batch, count]` I32: the drafts.
    pub draft_token_ids: TensorRef<'a>,
    /// `[batch, count + 1, vocab]` F32: the probabilities of the model itself, also behind the last draft.
    pub target_probs: TensorMut<'a>,
    /// `[batch, count + 1]` I32, written: the drafts that were accepted, the token behind them, and −1 behind that.
    pub output_token_ids: TensorMut<'a>,
    /// `[batch]` I32, added to: how many drafts are in the output, and how many of the others would be accepted each by itself, for
    /// which other numbers are drawn, also for the one that was rejected.
    pub output_accepted_token_num: TensorMut<'a>,
    /// `[batch]` I32, added to: how many drafts are in the output.
    pub output_emitted_draft_token_num: TensorMut<'a>,
}

type ChainOperands<'a, 'o> = [Operand<'a, 'o>; 9];

impl<'o> ChainTensors<'o> {
    fn operands(&self, Draw([deterministic, seed, offset]): Draw) -> ChainOperands<'_, 'o> {
        [
            self.draft_probs.operand(),
            self.draft_token_ids.operand(),
            self.target_probs.operand(),
            self.output_token_ids.operand(),
            self.output_accepted_token_num.operand(),
            self.output_emitted_draft_token_num.operand(),
            deterministic,
            seed,
            offset,
        ]
    }

    /// How many numbers FlashInfer's Python counts.
    fn tries(&self) -> u64 {
        outputs(&self.output_token_ids).saturating_mul(self.output_token_ids.layout().size(1).max(0).cast_unsigned())
    }
}

/// The kernel itself: speculative sampling of a chain of drafts (Leviathan, Kalman and Matias, 2023). Accepts each draft with
/// the probability `target / draft`, up to the first that is not, and draws the token behind from what the target has more of
/// than the draft, or behind the last draft from the target.
///
/// <!-- chain_speculative_sampling -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `draft_probs` | `[batch, count, vocab]` | F32 | read; contiguous; aligned to gcd(4, vocab) elements |
/// | `draft_token_ids` | `[batch, count]` | I32 | read; contiguous; aligned to 4 bytes |
/// | `target_probs` | `[batch, count + 1, vocab]` | F32 | read; contiguous; aligned to gcd(4, vocab) elements |
/// | `output_token_ids` | `[batch, count + 1]` | I32 | written; contiguous; aligned to 4 bytes |
/// | `output_accepted_token_num` | `[batch]` | I32 | read and written; contiguous; aligned to 4 bytes |
/// | `output_emitted_draft_token_num` | `[batch]` | I32 | read and written; contiguous; aligned to 4 bytes |
///
/// Both counters are added to.
///
/// # Errors
/// See the [module](self).
///
/// # Safety
/// As for [`sampling_from_probs`], of all rows of both models; and each draft must be at least 0 and below `vocab`, since it is where
/// the kernel reads both rows. The token behind the accepted ones may be no token where the draft's row is nowhere below the
/// target's, which is so by rounding alone. [`Sampler::chain_speculative_sampling`] sees to all of it.
pub unsafe fn chain_speculative_sampling(
    tensors: &mut ChainTensors<'_>,
    philox: &mut Philox,
    options: &SamplingOptions,
    stream: Stream<'_>,
) -> Result<()> {
    let operands = tensors.operands(Draw::new("chain_speculative_sampling", philox, options, stream)?);
    // SAFETY: the caller's promise.
    unsafe { call::<ChainSpeculativeSampling, 9>(operands, stream) }?;
    philox.used(tensors.tries());
    Ok(())
}
