//! `topk.so`: the largest elements of rows, and what sparse attention makes of their indices.
//!
//! What holds for all of them:
//! - Tensors are contiguous. On a GPU a call is asynchronous on `stream` and never synchronizes; tensors on the host are computed
//!   by the [reference](crate::reference), at once. Without rows a call is a no-op.
//! - The results of a row come in any order, another one each time. Which of equal elements are among them is not said either. A
//!   NaN counts as more than +∞; where one with the sign of a negative number comes is not specified.
//! - Upstream makes the tensors' GPU the thread's current one and leaves it so; here the thread gets its own back.
//! - GPUs: those that the wheel was compiled for, from compute capability 7.5 on.
//!
//! # How long a row may be
//! Release 0.6.3 has three kernels, and chooses by the type, the row's length, `top_k`, the number of rows and the environment
//! variable `FLASHINFER_TOPK_ALGO`, which it reads at every call. Here too it is read, so that only calls are made that end well:
//!
//! | upstream's kernel | where | here |
//! |---|---|---|
//! | filtered | `top_k` ≤ 2,048 and below the row's length, on GPUs whose blocks have 128 KiB of shared memory; rows of up to 16,384 elements of 16 bits, or of up to 32,768 of F32 and longer ones where there are more than a 16,384th of their length; with `filtered` in the variable any length | up to 16,384 elements: of longer rows it drops candidates without a word, where more than 16,384 elements have the same leading bits |
//! | radix, one block for each row | else, as long as a row fits a block's shared memory: 57,592 elements of F32 or 115,184 of 16 bits where that is 227 KiB, as on Hopper | all |
//! | radix, several blocks for each row | longer rows | refused: blocks that wait for each other may do so forever. `TopKState` (feature `cudarc`) is the `unsafe` way |
//!
//! So rows of up to 16,384 elements can always be had, those of 16-bit types up to what fits a block; and with
//! `FLASHINFER_TOPK_ALGO=multi_cta` in the process's environment, in spite of the name, those of F32 too. Where upstream's radix
//! kernel would give a block a second row, which it loads while other threads may still look for the first one's last elements,
//! the rows are divided into several launches here.
//!
//! # Errors
//! Every function answers [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for what breaks its contract,
//! before anything is launched; [`DeviceOutOfRange`](crate::FlashInferError::DeviceOutOfRange); what loading `topk.so`
//! answers; [`TvmFfiCall`](crate::FlashInferError::TvmFfiCall) with what the kernel raised; and
//! [`Cuda`](crate::FlashInferError::Cuda) or [`ContextLost`](crate::FlashInferError::ContextLost) where it was not launched.

use crate::contract::{
    Alignment, Argument, Attributes, Contents, Convention, Dimension, Dimensions, Dtype, Extent, From, Kind, Limit,
    Operand, Pdl, Relation, Reports, Role, Row, RunsOn, Size, Strides, Tensor, check,
};
use crate::engine::{Entry, Kernel, call, kernels, refused};
use crate::error::Result;
use crate::indices::{Placed, Steering, Words, refuse, sealed};
use crate::stream::Stream;
use crate::tensor::{DType, Device, TensorMut, TensorRef};

const MOST: i64 = i32::MAX as i64;

/// The environment variable that upstream reads.
const VARIABLE: &str = "FLASHINFER_TOPK_ALGO";

/// The candidates that the filtered kernel keeps, and so the most elements of which it forgets none.
const CANDIDATES: i64 = 16 << 10;
/// The most that the filtered kernel finds.
const FILTERED_K: i64 = 2048;
/// The shared memory that it needs.
const FILTERED_MEMORY: i64 = 128 << 10;
/// What the radix kernel has of its own in a block's shared memory.
const OWN_MEMORY: i64 = 2080;
/// Threads of its blocks.
const THREADS: i64 = 1024;

// The dimensions that all have.
const ROWS: usize = 0;
const D: usize = 1;
const K: usize = 2;
const ELEMENT: usize = 3;
const SHARED: usize = 4;
const MULTIPROCESSORS: usize = 5;
/// Of the form with states alone, and of the one with requests alone.
const OTHER: usize = 6;

const fn dimension(name: &'static str, from: From, least: i64, examples: &'static [i64]) -> Dimension {
    Dimension { name, from, least, most: MOST, examples }
}

/// `[rows, columns]`, and the largest of them, whose number the argument `top_k` is.
const fn dimensions(columns: &'static str, top_k: usize) -> [Dimension; 6] {
    const fn of_gpu(name: &'static str, from: From) -> Dimension {
        Dimension { name, from, least: 0, most: i64::MAX, examples: &[] }
    }
    [
        dimension("rows", From::Shape(0, 0), 0, &[5, 1, 7]),
        // The first one is short enough that bf16 tells its whole numbers from each other.
        dimension(columns, From::Shape(0, 1), 1, &[200, 1, 1000, 4097]),
        dimension("top_k", From::Number(top_k), 1, &[10, 1, 64]),
        of_gpu("element_size", From::ElementSize(0)),
        of_gpu("shared_memory", From::Gpu(Limit::SharedMemory)),
        of_gpu("multiprocessors", From::Gpu(Limit::Multiprocessors)),
    ]
}

/// What the environment makes of upstream's choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Choice {
    Upstreams,
    Filtered,
    Radix,
}

impl Choice {
    /// As upstream reads it, at each call.
    fn read() -> Self {
        match std::env::var_os(VARIABLE) {
            Some(value) if value == "filtered" => Self::Filtered,
            Some(value) if value == "multi_cta" => Self::Radix,
            _ => Self::Upstreams,
        }
    }
}

/// Whether upstream takes the filtered kernel. A GPU whose blocks have enough shared memory has it in its multiprocessors too,
/// which is what upstream asks for; were it otherwise, the kernel would not be launched and say so.
fn is_filtered(sizes: &Dimensions) -> bool {
    let (rows, d, k) = (sizes[ROWS], sizes[D], sizes[K]);
    if sizes[SHARED] < FILTERED_MEMORY || k > FILTERED_K || d <= k {
        return false;
    }
    match Choice::read() {
        Choice::Filtered => true,
        Choice::Radix => false,
        Choice::Upstreams if sizes[ELEMENT] <= 2 => d <= 16384,
        Choice::Upstreams => d <= 32768 || rows > d / 16384,
    }
}

/// The longest row that one block of the radix kernel takes.
fn longest(sizes: &Dimensions) -> i64 {
    let (d, element) = (sizes[D], sizes[ELEMENT].max(1));
    let vector = 1 << d.trailing_zeros().min((16 / element).max(1).trailing_zeros());
    let fits = (sizes[SHARED] - OWN_MEMORY).max(0) / element / vector * vector;
    fits.max(vector * THREADS)
}

/// How many blocks the radix kernel divides a row among.
fn blocks(sizes: &Dimensions) -> i64 {
    let longest = longest(sizes);
    sizes[D] / longest + i64::from(sizes[D] % longest != 0)
}

/// Whether upstream finds the right elements with one block for each row.
fn is_found_by_one_block(sizes: &Dimensions) -> bool {
    let (d, longest) = (sizes[D], longest(sizes));
    // Whichever kernel it is; and what is of a type that there is none for is said of the type.
    if d <= CANDIDATES.min(longest) || !is_of_known_size(sizes) {
        return true;
    }
    !is_filtered(sizes) && d <= longest
}

fn is_of_known_size(sizes: &Dimensions) -> bool {
    matches!(sizes[ELEMENT], 2 | 4)
}

fn what_upstream_does(sizes: &Dimensions) -> String {
    let d = sizes[D];
    match is_filtered(sizes) {
        true => format!("{d}, for which upstream takes the kernel that keeps 16,384 candidates of a row"),
        false => format!("{d}, for which upstream divides a row among {} blocks", blocks(sizes)),
    }
}

const FOUND_BY_ONE_BLOCK: Relation = Relation {
    name: "d",
    only_on_gpu: true,
    holds: is_found_by_one_block,
    found: what_upstream_does,
    expected: "at most 16,384; of 16-bit types also as many as fit a block's shared memory (115,184 on Hopper); of F32 as many \
               (57,592) with FLASHINFER_TOPK_ALGO=multi_cta in the environment, or above 32,768 in calls of at most \
               ⌊length / 16,384⌋ rows. Others make release 0.6.3 forget candidates without a word, or make blocks wait for each \
               other, perhaps forever",
};

const NO_MORE_THAN_THERE_ARE: Relation = Relation {
    name: "top_k",
    only_on_gpu: false,
    holds: |sizes| sizes[K] <= sizes[D],
    found: |sizes| sizes[K].to_string(),
    expected: "at most d, as many as a row has",
};

/// What the blocks of a row count in, in bytes.
const STATE: i64 = 3092;

const NONE_IS_FORGOTTEN: Relation = Relation {
    name: "d",
    only_on_gpu: true,
    holds: |sizes| sizes[D] <= CANDIDATES || !is_of_known_size(sizes) || !is_filtered(sizes),
    found: what_upstream_does,
    expected: "at most 16,384 where upstream takes its filtered kernel, which forgets candidates of longer rows without a word; \
               with FLASHINFER_TOPK_ALGO=multi_cta in the environment, or F32 above 32,768 in calls of at most \
               ⌊length / 16,384⌋ rows, it takes the other",
};

const ALL_BLOCKS_AT_ONCE: Relation = Relation {
    name: "d",
    only_on_gpu: true,
    holds: |sizes| !is_of_known_size(sizes) || blocks(sizes) <= sizes[MULTIPROCESSORS].max(1),
    found: what_upstream_does,
    expected: "few enough for one block on each multiprocessor: blocks that wait for one that has no place wait forever",
};

const ENOUGH_STATES: Relation = Relation {
    name: "maybe_row_states_buffer",
    only_on_gpu: true,
    holds: |sizes| sizes[OTHER] >= states(sizes[MULTIPROCESSORS]),
    found: |sizes| format!("{} bytes long", sizes[OTHER]),
    expected: "3,092 bytes for every two multiprocessors",
};

/// The bytes of all states that a launch on so many multiprocessors may use: of rows of two blocks each.
const fn states(multiprocessors: i64) -> i64 {
    let rows = if multiprocessors > 3 { multiprocessors / 2 } else { 1 };
    rows * STATE
}

const TYPES: Dtype = Dtype::OneOf(&[DType::F32, DType::F16, DType::BF16]);

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

const fn words(name: &'static str, role: Role, shape: &'static [Size], contents: Contents) -> Argument {
    tensor(name, role, (Dtype::Only(DType::I32), Alignment::Bytes(4)), shape, contents)
}

const INPUT: Argument = tensor(
    "input",
    Role::In,
    (TYPES, Alignment::Access { dimension: D, bytes: 16 }),
    &[Size::Of(ROWS), Size::Of(D)],
    Contents::Distinct(D),
);
const VALUES: Argument = tensor(
    "output_values",
    Role::Unordered,
    (Dtype::As(0), Alignment::Vector { dimension: K, most: 1 }),
    FOUND,
    Contents::Zeros,
);
/// Shorter than the first example's rows.
const LENGTHS: Argument = words("lengths", Role::In, &[Size::Of(ROWS)], Contents::Between(1.0, 200.0));
const WITHOUT_STATES: Argument = Argument { name: "maybe_row_states_buffer", kind: Kind::Missing(1) };
const TOP_K: Argument = Argument { name: "top_k", kind: Kind::Whole(1, MOST) };

const FOUND: &[Size] = &[Size::Of(ROWS), Size::Of(K)];

const TOPK: Row = Row {
    kernel: "radix_topk",
    function: "radix_topk",
    library: "topk.so",
    feature: "topk",
    summary: "The `top_k` largest elements of each row, and their indices.",
    source: "`csrc/topk.cu`, `include/flashinfer/topk.cuh`",
    runs_on: RunsOn::AtLeast(7, 5),
    arguments: &[
        INPUT,
        words("output_indices", Role::Unordered, FOUND, Contents::Zeros),
        VALUES,
        WITHOUT_STATES,
        TOP_K,
    ],
    lead: 0,
    dimensions: &dimensions("d", 4),
    relations: &[NO_MORE_THAN_THERE_ARE, FOUND_BY_ONE_BLOCK],
    // Elements are counted in 32 bits.
    extent: Extent { most: 1 << 32, split: true, stride: i64::MAX },
    pdl: Pdl::None,
    attributes: Attributes::PerCall,
    reports: Reports::Status,
    uses_current_device: true,
    convention: Convention::Views,
    hazards: &[
        "Which kernel upstream takes is decided at each call, by `FLASHINFER_TOPK_ALGO` too; a graph keeps what it was captured with.",
        "More rows than there are multiprocessors are divided into several launches where the radix kernel takes them.",
    ],
    tolerance: [0.0, 0.0],
    tests: "`tests/topk.rs`, `tests/topk_gpu.rs`, `tests/properties_gpu.rs`",
};

const OF_LENGTHS: &[&str] = &[
    "A row is read as far as `lengths` says, wherever that is: `TopKRows` is what makes it be in the input.",
    "Which kernel upstream takes is decided at each call, by `FLASHINFER_TOPK_ALGO` too; a graph keeps what it was captured with.",
    "More rows than there are multiprocessors are divided into several launches where the radix kernel takes them.",
];

const FOUND_BY_ONE_BLOCK_OF_LENGTH: Relation = Relation { name: "max_len", ..FOUND_BY_ONE_BLOCK };

const PAGE_TABLE: Row = Row {
    kernel: "radix_topk_page_table_transform",
    function: "radix_topk_page_table_transform",
    summary: "Of each row the entries of its page table that its `top_k` largest scores stand for.",
    arguments: &[
        INPUT,
        words("output_page_table", Role::Unordered, FOUND, Contents::Zeros),
        words("src_page_table", Role::In, &[Size::Of(ROWS), Size::Of(D)], Contents::Between(0.0, 1000.0)),
        Argument { name: "maybe_row_to_batch", kind: Kind::Missing(1) },
        LENGTHS,
        WITHOUT_STATES,
        TOP_K,
    ],
    dimensions: &dimensions("max_len", 6),
    relations: &[FOUND_BY_ONE_BLOCK_OF_LENGTH],
    hazards: OF_LENGTHS,
    tests: "`tests/topk.rs`, `tests/topk_gpu.rs`",
    ..TOPK
};

kernels! {
    /// [`radix_topk`].
    RadixTopk = TOPK;
    /// `TopKState::radix_topk`.
    RadixTopkOfBlocks = Row {
        kernel: "radix_topk of several blocks",
        summary: "As radix_topk, where a long row is divided among several blocks.",
        arguments: &[
            INPUT,
            words("output_indices", Role::Unordered, FOUND, Contents::Zeros),
            VALUES,
            tensor(
                "maybe_row_states_buffer",
                Role::Workspace,
                (Dtype::Only(DType::U8), Alignment::Bytes(16)),
                &[Size::Of(OTHER)],
                Contents::Zeros,
            ),
            TOP_K,
        ],
        dimensions: &{
            let [rows, d, top_k, element, shared, multiprocessors] = dimensions("d", 4);
            let bytes = dimension("bytes", From::Shape(3, 0), 0, &[STATE * 128]);
            [rows, d, top_k, element, shared, multiprocessors, bytes]
        },
        relations: &[NO_MORE_THAN_THERE_ARE, NONE_IS_FORGOTTEN, ALL_BLOCKS_AT_ONCE, ENOUGH_STATES],
        hazards: &[
            "The blocks of a row wait for each other: where one of them gets no place on the GPU, for other kernels that run, the \
             GPU hangs.",
            "The first block of a row counts anew for the next launch while others may still wait for the old count: then they hang \
             too. Seen on compute capability 12.0 and 12.1, fixed in 0.6.14.",
            "A block says that it has counted when its first threads have: what the others counted may come too late, and the row's \
             results are wrong then, or more than `top_k` and written past the outputs. Mended later (flashinfer#5251).",
            "The states must be zeros before the first launch, and be in use on no other stream.",
            "Which kernel upstream takes is decided at each call, by `FLASHINFER_TOPK_ALGO` too; a graph keeps what it was captured \
             with.",
        ],
        tests: "`tests/topk.rs`, `tests/topk_gpu.rs`",
        ..TOPK
    };
    /// [`radix_topk_page_table_transform`], with a page table for each row.
    RadixTopkPageTableTransform = PAGE_TABLE;
    /// [`radix_topk_page_table_transform`], with a page table for each request, which several rows may have.
    RadixTopkPageTableTransformOfRequests = Row {
        kernel: "radix_topk_page_table_transform of requests",
        summary: "As radix_topk_page_table_transform, where several rows may have one page table.",
        arguments: &[
            INPUT,
            words("output_page_table", Role::Unordered, FOUND, Contents::Zeros),
            words("src_page_table", Role::In, &[Size::Of(OTHER), Size::Of(D)], Contents::Between(0.0, 1000.0)),
            words("maybe_row_to_batch", Role::In, &[Size::Of(ROWS)], Contents::Turns(OTHER)),
            LENGTHS,
            WITHOUT_STATES,
            TOP_K,
        ],
        dimensions: &{
            let [rows, max_len, top_k, element, shared, multiprocessors] = dimensions("max_len", 6);
            let batch = dimension("batch", From::Shape(2, 0), 1, &[3, 1]);
            [rows, max_len, top_k, element, shared, multiprocessors, batch]
        },
        hazards: &[
            "A row is read as far as `lengths` says, and the page table that `row_to_batch` says, wherever that is: `TopKRows` is \
             what makes both be there.",
            OF_LENGTHS[1],
            OF_LENGTHS[2],
        ],
        ..PAGE_TABLE
    };
    /// [`radix_topk_ragged_transform`].
    RadixTopkRaggedTransform = Row {
        kernel: "radix_topk_ragged_transform",
        function: "radix_topk_ragged_transform",
        summary: "Of each row the indices of its `top_k` largest scores, and its offset added to them.",
        arguments: &[
            INPUT,
            words("output_indices", Role::Unordered, FOUND, Contents::Zeros),
            words("offsets", Role::In, &[Size::Of(ROWS)], Contents::Between(0.0, 1000.0)),
            LENGTHS,
            WITHOUT_STATES,
            TOP_K,
        ],
        dimensions: &dimensions("max_len", 5),
        ..PAGE_TABLE
    };
}

/// Whether the kernels run on a device: on the host always, on a GPU by its compute capability.
///
/// # Errors
/// [`DeviceOutOfRange`](crate::FlashInferError::DeviceOutOfRange), or why there is no GPU.
pub fn is_supported(device: Device) -> Result<bool> {
    Entry::of::<RadixTopk>().is_supported(device)
}

/// Launches a call, or several where one would have blocks take a second row.
///
/// # Safety
/// As for [`call`].
#[inline(always)]
unsafe fn launch<K: Kernel, const N: usize>(operands: [Operand<'_, '_>; N], stream: Stream<'_>) -> Result<()> {
    let input = operands[0].layout();
    if input.is_some_and(|input| input.is_on_gpu() && input.size(0) > Limit::Multiprocessors.of(input.device())) {
        // SAFETY: the caller's promise.
        return unsafe { launch_many::<K>(&operands, stream) };
    }
    // SAFETY: the caller's promise.
    unsafe { call::<K, N>(operands, stream) }
}

/// # Safety
/// As for [`call`].
#[cold]
unsafe fn launch_many<K: Kernel>(operands: &[Operand<'_, '_>], stream: Stream<'_>) -> Result<()> {
    let checked = check(K::ROW, operands, stream).map_err(|fault| refused(K::ROW, operands, stream, fault))?;
    let sizes = &checked.dimensions;
    let most = if is_filtered(sizes) { i64::MAX } else { sizes[MULTIPROCESSORS].max(1) };
    // SAFETY: the caller's promise; the call keeps the row.
    unsafe { Entry::of::<K>().call_checked(operands, &checked.at_once(most), stream) }
}

/// The `top_k` largest elements of each row of `input`, and their indices in it, in any order.
///
/// <!-- radix_topk -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `input` | `[rows, d]` | F32 or F16 or BF16 | read; contiguous; aligned to gcd(16 bytes' elements, d) elements |
/// | `output_indices` | `[rows, top_k]` | I32 | written, each row in any order; contiguous; aligned to 4 bytes |
/// | `output_values` | `[rows, top_k]` | as `input` | written, each row in any order; contiguous; aligned to an element |
///
/// ```
/// # use flashinfer_rs::kernels::topk::radix_topk;
/// # use flashinfer_rs::{FlashInferRuntime, RuntimeConfig, Stream, TensorMut, TensorRef};
/// # FlashInferRuntime::initialize(RuntimeConfig::default())?;
/// let input = [0.5f32, 3.0, -1.0, 2.0];
/// let (mut indices, mut values) = ([0i32; 2], [0f32; 2]);
/// radix_topk(
///     &mut TensorMut::from_slice(&mut indices, &[1, 2])?,
///     &mut TensorMut::from_slice(&mut values, &[1, 2])?,
///     &TensorRef::from_slice(&input, &[1, 4])?,
///     2,
///     Stream::NULL,
/// )?;
/// indices.sort();
/// assert_eq!(indices, [1, 3]);
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
///
/// # Errors
/// See the [module](self), and how long a row may be there. `top_k` is 1 to `d`.
pub fn radix_topk(
    output_indices: &mut TensorMut<'_>,
    output_values: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    top_k: i64,
    stream: Stream<'_>,
) -> Result<()> {
    let (indices, values) = (output_indices.operand(), output_values.operand());
    let operands = [input.operand(), indices, values, Operand::Absent, Operand::Whole(top_k)];
    // SAFETY: the kernel reads nothing in device memory to find its way, and a row has one block, which waits for none.
    unsafe { launch::<RadixTopk, 5>(operands, stream) }
}

/// The entries of each row's page table that the row's `top_k` largest scores stand for, in any order: what sparse attention
/// attends to next. Score `input[r, i]` stands for `src_page_table[r, i]`, or, where several rows share a request's table, for
/// `src_page_table[row_to_batch[r], i]`; `rows` says which, and how many scores each row has. A row with `top_k` scores or fewer
/// has all of them listed, as they lie, and −1 in the places that are left. Entries are copied, whatever they are.
///
/// <!-- radix_topk_page_table_transform -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `input` | `[rows, max_len]` | F32 or F16 or BF16 | read; contiguous; aligned to gcd(16 bytes' elements, max_len) elements |
/// | `output_page_table` | `[rows, top_k]` | I32 | written, each row in any order; contiguous; aligned to 4 bytes |
/// | `src_page_table` | `[rows, max_len]` | I32 | read; contiguous; aligned to 4 bytes |
/// | `lengths` | `[rows]` | I32 | read; contiguous; aligned to 4 bytes |
///
/// With [`TopKRows::with_row_to_batch`]:
///
/// <!-- radix_topk_page_table_transform of requests -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `input` | `[rows, max_len]` | F32 or F16 or BF16 | read; contiguous; aligned to gcd(16 bytes' elements, max_len) elements |
/// | `output_page_table` | `[rows, top_k]` | I32 | written, each row in any order; contiguous; aligned to 4 bytes |
/// | `src_page_table` | `[batch, max_len]` | I32 | read; contiguous; aligned to 4 bytes |
/// | `maybe_row_to_batch` | `[rows]` | I32 | read; contiguous; aligned to 4 bytes |
/// | `lengths` | `[rows]` | I32 | read; contiguous; aligned to 4 bytes |
///
/// # Errors
/// See the [module](self), and how long a row may be there: that is the `max_len` of the tensors, whatever `rows` says.
/// `InvalidArgument` also for `rows` that may be longer than the input, or of more requests than the table has. `top_k` is 1 or
/// more, and may be more than `max_len`.
pub fn radix_topk_page_table_transform(
    output_page_table: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    src_page_table: &TensorRef<'_>,
    rows: &Placed<'_, TopKRows>,
    top_k: i64,
    stream: Stream<'_>,
) -> Result<()> {
    const FUNCTION: &str = "radix_topk_page_table_transform";
    check_lengths(FUNCTION, rows, input)?;
    let (lengths, output) = (rows.array(LENGTHS_OF), output_page_table.operand());
    let (input, source, top_k) = (input.operand(), src_page_table.operand(), Operand::Whole(top_k));
    let Some(batch) = rows.facts().batch else {
        let operands = [input, output, source, Operand::Absent, lengths.operand(), Operand::Absent, top_k];
        // SAFETY: whoever made the rows sees to it that none is longer than the input's, which was compared above: the type by
        // its checks, or the caller of its unsafe constructor. A row has one block, which waits for none.
        return unsafe { launch::<RadixTopkPageTableTransform, 7>(operands, stream) };
    };
    let there = src_page_table.shape().first().copied().unwrap_or(0);
    if batch > there {
        let expected = format!("at most {there}, which src_page_table has tables of");
        return refuse(FUNCTION, "row_to_batch", format!("of {batch} requests"), expected);
    }
    let row_to_batch = rows.array(ROW_TO_BATCH);
    let operands = [input, output, source, row_to_batch.operand(), lengths.operand(), Operand::Absent, top_k];
    // SAFETY: as above; no row is of a request that the table has not, likewise.
    unsafe { launch::<RadixTopkPageTableTransformOfRequests, 7>(operands, stream) }
}

/// The indices of each row's `top_k` largest scores, with the row's offset added, in any order: as
/// [`radix_topk_page_table_transform`], for keys that lie one request after the other. A row with `top_k` scores or fewer has all
/// of them listed, as they lie, and −1 in the places that are left. An offset is added whatever it is, in 32 bits.
///
/// <!-- radix_topk_ragged_transform -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `input` | `[rows, max_len]` | F32 or F16 or BF16 | read; contiguous; aligned to gcd(16 bytes' elements, max_len) elements |
/// | `output_indices` | `[rows, top_k]` | I32 | written, each row in any order; contiguous; aligned to 4 bytes |
/// | `offsets` | `[rows]` | I32 | read; contiguous; aligned to 4 bytes |
/// | `lengths` | `[rows]` | I32 | read; contiguous; aligned to 4 bytes |
///
/// # Errors
/// As for [`radix_topk_page_table_transform`].
pub fn radix_topk_ragged_transform(
    output_indices: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    offsets: &TensorRef<'_>,
    rows: &Placed<'_, TopKRows>,
    top_k: i64,
    stream: Stream<'_>,
) -> Result<()> {
    check_lengths("radix_topk_ragged_transform", rows, input)?;
    let (lengths, output) = (rows.array(LENGTHS_OF), output_indices.operand());
    let (input, top_k) = (input.operand(), Operand::Whole(top_k));
    let operands = [input, output, offsets.operand(), lengths.operand(), Operand::Absent, top_k];
    // SAFETY: as in `radix_topk_page_table_transform`.
    unsafe { launch::<RadixTopkRaggedTransform, 6>(operands, stream) }
}

/// That no row that there may be is longer than the input's.
fn check_lengths(function: &'static str, rows: &Placed<'_, TopKRows>, input: &TensorRef<'_>) -> Result<()> {
    let max_len = rows.facts().max_len;
    match input.shape() {
        &[_, columns] if max_len > columns => {
            let expected = format!("at most {columns}, as the input's rows");
            refuse(function, "lengths", format!("of up to {max_len} scores"), expected)
        }
        _ => Ok(()),
    }
}

// The arrays of `TopKRows`.
const LENGTHS_OF: usize = 0;
const ROW_TO_BATCH: usize = 1;

/// How many scores each row has, and which request each is of: what steers [`radix_topk_page_table_transform`] and
/// [`radix_topk_ragged_transform`].
///
/// [`Placed::on_host`] gives it to calls on the host, `OnDevice` (feature `cudarc`) to calls on a GPU.
///
/// ```
/// use flashinfer_rs::kernels::topk::TopKRows;
///
/// // Three rows of a tensor with 1,024 columns; the first two are two tokens of one request.
/// let rows = TopKRows::new(&[700, 701, 12], 1024)?.with_row_to_batch(&[0, 0, 1], 2)?;
/// assert_eq!(rows.lengths(), [700, 701, 12]);
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopKRows {
    lengths: Vec<i32>,
    max_len: i64,
    row_to_batch: Vec<i32>,
    batch: Option<i64>,
}

/// What calls need to know of [`TopKRows`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TopKRowsFacts {
    /// How many rows there are.
    pub rows: i64,
    /// What no row is longer than.
    pub max_len: i64,
    /// How many requests the rows are of, where each has a page table; none where each row has its own.
    pub batch: Option<i64>,
}

impl TopKRows {
    /// Of so many scores each, at most `max_len`: the columns of the tensors.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for a length that is negative or above `max_len`, and for a
    /// `max_len` that is not within 0 and 2³¹ − 1.
    pub fn new(lengths: &[i64], max_len: i64) -> Result<Self> {
        if !(0..=MOST).contains(&max_len) {
            return refuse("TopKRows", "max_len", max_len.to_string(), format!("0 to {MOST}"));
        }
        let lengths = each(lengths, "lengths", max_len)?;
        Ok(Self { lengths, max_len, row_to_batch: Vec::new(), batch: None })
    }

    /// With the request that each row is of, out of `batch` of them: `src_page_table` has a row for each request then.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for another number of requests than there are rows, for one
    /// that is not within 0 and `batch` − 1, and for a `batch` that is not within 1 and 2³¹ − 1.
    pub fn with_row_to_batch(mut self, row_to_batch: &[i64], batch: i64) -> Result<Self> {
        if !(1..=MOST).contains(&batch) {
            return refuse("TopKRows", "batch", batch.to_string(), format!("1 to {MOST}"));
        }
        if row_to_batch.len() != self.lengths.len() {
            let expected = format!("{}, one for each row", self.lengths.len());
            return refuse("TopKRows", "row_to_batch", format!("of length {}", row_to_batch.len()), expected);
        }
        self.row_to_batch = each(row_to_batch, "row_to_batch", batch - 1)?;
        self.batch = Some(batch);
        Ok(self)
    }

    /// How many scores each row has.
    pub fn lengths(&self) -> &[i32] {
        &self.lengths
    }

    /// The request that each row is of; nothing where each row has a page table of its own.
    pub fn row_to_batch(&self) -> &[i32] {
        &self.row_to_batch
    }
}

/// Numbers that are all within 0 and `most`.
fn each(numbers: &[i64], name: &'static str, most: i64) -> Result<Vec<i32>> {
    match numbers.iter().position(|number| !(0..=most).contains(number)) {
        Some(i) => refuse("TopKRows", name, format!("{} at {i}", numbers[i]), format!("0 to {most}")),
        None => Ok(numbers.iter().map(|&number| number as i32).collect()),
    }
}

impl sealed::Sealed for TopKRows {}

impl Steering for TopKRows {
    type Facts = TopKRowsFacts;

    fn facts(&self) -> TopKRowsFacts {
        TopKRowsFacts { rows: self.lengths.len() as i64, max_len: self.max_len, batch: self.batch }
    }

    fn arrays(&self) -> Vec<Words<'_>> {
        vec![Words::I32(&self.lengths), Words::I32(&self.row_to_batch)]
    }

    fn in_place_of(&self, captured: &Self) -> Result<Self> {
        let (own, there) = (self.facts(), captured.facts());
        let same_kind = own.batch.is_some() == there.batch.is_some();
        if own.rows != there.rows || !same_kind || own.max_len > there.max_len || own.batch > there.batch {
            let described = |facts: TopKRowsFacts| {
                let of = facts.batch.map_or_else(String::new, |batch| format!(" of {batch} requests"));
                format!("{} rows of up to {} scores{of}", facts.rows, facts.max_len)
            };
            let expected = format!("as captured, {}, or less but for the rows", described(there));
            return refuse("TopKRows", "rows", described(own), expected);
        }
        Ok(Self { max_len: there.max_len, batch: there.batch, ..self.clone() })
    }
}

impl<'a> Placed<'a, TopKRows> {
    /// Lengths that are on a device already, I32, one for each row. What they must be besides, calls check.
    ///
    /// # Safety
    /// Whenever a kernel that was given this runs, every length must be at least 0 and at most `max_len`.
    pub unsafe fn from_lengths(lengths: TensorRef<'a>, max_len: i64) -> Self {
        let rows = lengths.shape().first().copied().unwrap_or(0);
        Self::promised(TopKRowsFacts { rows, max_len, batch: None }, vec![lengths])
    }

    /// As [`from_lengths`](Self::from_lengths), with the request that each row is of, I32, out of `batch` of them.
    ///
    /// # Safety
    /// As there, and every request must be at least 0 and below `batch`.
    pub unsafe fn from_lengths_of_requests(
        lengths: TensorRef<'a>,
        row_to_batch: TensorRef<'a>,
        (max_len, batch): (i64, i64),
    ) -> Self {
        let rows = lengths.shape().first().copied().unwrap_or(0);
        Self::promised(TopKRowsFacts { rows, max_len, batch: Some(batch) }, vec![lengths, row_to_batch])
    }
}

/// What [`radix_topk`] needs for rows that are longer than one block can take: counters that the blocks of a row share, zeroed, for
/// one stream, so that no two streams ever share them.
///
/// <!-- radix_topk of several blocks -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `input` | `[rows, d]` | F32 or F16 or BF16 | read; contiguous; aligned to gcd(16 bytes' elements, d) elements |
/// | `output_indices` | `[rows, top_k]` | I32 | written, each row in any order; contiguous; aligned to 4 bytes |
/// | `output_values` | `[rows, top_k]` | as `input` | written, each row in any order; contiguous; aligned to an element |
/// | `maybe_row_states_buffer` | `[bytes]` | U8 | scratch memory; contiguous; aligned to 16 bytes |
///
/// Most engines want another kernel for such rows: see what [`radix_topk`](Self::radix_topk) asks for.
#[cfg(feature = "cudarc")]
#[derive(Debug)]
pub struct TopKState {
    stream: std::sync::Arc<cudarc::driver::CudaStream>,
    states: cudarc::driver::CudaSlice<u8>,
}

#[cfg(feature = "cudarc")]
mod gpu {
    use std::sync::Arc;

    use cudarc::driver::{CudaContext, CudaStream};

    use super::{MULTIPROCESSORS, RadixTopkOfBlocks, TopKState, blocks, is_filtered, states};
    use crate::buffers::{device, refuse_per_thread};
    use crate::contract::{Limit, Operand, check};
    use crate::engine::{Entry, Kernel, refused};
    use crate::error::{Result, driver};
    use crate::graph::{GraphMut, Launched, Leaf, Site};
    use crate::owner::refuse_capture;
    use crate::runtime::FlashInferRuntime;
    use crate::stream::Stream;
    use crate::tensor::{TensorMut, TensorRef};

    impl TopKState {
        /// Counters for a stream's calls.
        ///
        /// # Errors
        /// [`DeviceOutOfRange`](crate::FlashInferError::DeviceOutOfRange), [`Cuda`](crate::FlashInferError::Cuda) where there is
        /// no memory, [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for the per-thread stream, which is another in
        /// each thread, and for a stream that captures, or why there is no GPU.
        pub fn new(stream: &Arc<CudaStream>) -> Result<Self> {
            refuse_per_thread("radix_topk", stream)?;
            refuse_capture("radix_topk", stream)?;
            let device = device(stream.context());
            FlashInferRuntime::global()?.checked_device(device)?;
            let bytes = states(Limit::Multiprocessors.of(device)) as usize;
            let states = stream.alloc_zeros(bytes).map_err(driver("allocating the states"))?;
            Ok(Self { stream: Arc::clone(stream), states })
        }

        /// The stream that calls are queued on.
        pub fn stream(&self) -> &Arc<CudaStream> {
            &self.stream
        }

        /// As [`radix_topk`](super::radix_topk), of rows of any length, asynchronous on this state's stream. What is in the
        /// tensors is as described there.
        ///
        /// # Errors
        /// As there, but for long rows: those are refused only where upstream would forget candidates of theirs, or where one has
        /// more blocks than the GPU has multiprocessors.
        ///
        /// # Safety
        /// A row that is longer than one block can take (57,592 elements of F32 or 115,184 of 16 bits on Hopper) is divided among
        /// several blocks, which wait for each other by looking at a counter. Release 0.6.3 does so in a way that whoever calls
        /// this answers for:
        /// - All blocks of a launch must be running at once. There are at most as many as multiprocessors, and each takes nearly
        ///   all of one's shared memory. While it runs, no other kernel may take a multiprocessor's place for good, or wait for
        ///   this one: not on another stream, in another process, or in a branch of the same graph; and the process must have all
        ///   multiprocessors of the GPU (no MPS share, no green context). Otherwise the GPU hangs, and nothing but the end of the
        ///   process helps.
        /// - Even then release 0.6.3 can hang: a row's first block sets the counter to 0 at its end, and another one that has not
        ///   yet seen the old count waits forever. That was seen on compute capability 12.0 and 12.1 within some thousand calls,
        ///   and is mended in 0.6.14.
        /// - And it can be wrong: a block announces that it has counted when its first threads have, not all. A block that reads
        ///   too early takes another limit for the row than the others do, so that results are missing, or are more than `top_k`
        ///   and are written past the row's place in the outputs: for the last row that is past the tensors. Outputs must have
        ///   room behind them that may be overwritten.
        ///
        /// Rows that one block takes have none of these.
        pub unsafe fn radix_topk(
            &mut self,
            output_indices: &mut TensorMut<'_>,
            output_values: &mut TensorMut<'_>,
            input: &TensorRef<'_>,
            top_k: i64,
        ) -> Result<()> {
            let len = self.states.len() as i64;
            let states = TensorMut::from_cudarc(&self.stream, &mut self.states, &[len])?;
            let (indices, values) = (output_indices.operand(), output_values.operand());
            let operands = [input.operand(), indices, values, states.operand(), Operand::Whole(top_k)];
            // SAFETY: the caller's promise; the states are this stream's alone, and zeros between its kernels.
            unsafe { launch(&operands, Stream::cudarc(&self.stream)) }
        }
    }

    /// # Safety
    /// As for [`TopKState::radix_topk`], with states that are zeros when the kernel starts and that no other stream uses.
    unsafe fn launch(operands: &[Operand<'_, '_>; 5], stream: Stream<'_>) -> Result<()> {
        let row = RadixTopkOfBlocks::ROW;
        let checked = check(row, operands, stream).map_err(|fault| refused(row, operands, stream, fault))?;
        let sizes = &checked.dimensions;
        // No block gets a second row.
        let most = if is_filtered(sizes) { i64::MAX } else { (sizes[MULTIPROCESSORS] / blocks(sizes).max(1)).max(1) };
        // SAFETY: the caller's promise; the call keeps the row.
        unsafe { Entry::of::<RadixTopkOfBlocks>().call_checked(operands, &checked.at_once(most), stream) }
    }

    /// [`TopKState`] in a capture.
    #[derive(Debug)]
    pub struct CapturedTopKState<'a>(GraphMut<'a, u8>);

    impl CapturedTopKState<'_> {
        /// [`TopKState::radix_topk`], captured on the stream of the capture.
        ///
        /// # Errors
        /// As there.
        ///
        /// # Safety
        /// As there, whenever the graph runs; and nothing else in the graph may run at the same time.
        pub unsafe fn radix_topk(
            &mut self,
            output_indices: &mut TensorMut<'_>,
            output_values: &mut TensorMut<'_>,
            input: &TensorRef<'_>,
            top_k: i64,
            stream: Stream<'_>,
        ) -> Result<()> {
            let len = self.0.len() as i64;
            let states = self.0.write(&[len])?;
            let (indices, values) = (output_indices.operand(), output_values.operand());
            let operands = [input.operand(), indices, values, states.operand(), Operand::Whole(top_k)];
            // SAFETY: the caller's promise; the graph owns the states, and its launches follow one another.
            unsafe { launch(&operands, stream) }
        }
    }

    impl Leaf for TopKState {
        type Captured<'a> = CapturedTopKState<'a>;
        type Views<'a> = ();

        fn check(&self, context: &Arc<CudaContext>) -> Result<()> {
            self.states.check(context)
        }

        fn captured<'a>(&'a mut self, site: Site) -> CapturedTopKState<'a> {
            CapturedTopKState(self.states.captured(site))
        }

        fn views(&mut self) {}

        fn take_over(&mut self, stream: &CudaStream) {
            self.states.take_over(stream);
        }

        fn hand_back(&mut self, launched: &Launched<'_>) -> Result<()> {
            self.states.hand_back(launched)
        }
    }

    crate::graph::graph_leaf!(TopKState);
}

#[cfg(feature = "cudarc")]
pub use gpu::CapturedTopKState;
