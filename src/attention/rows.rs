//! What the tensors of a call must be: rows of the contract's language, by which the one engine checks them. What the rows cannot
//! say, since it is the plan's, is compared behind them.

use crate::contract::{
    Alignment, Argument, Attributes, Checked, Contents, Convention, Dimension, Dtype, Extent, From, Kind, Operand, Pdl,
    Reports, Role, Row, RunsOn, Size, Strides, Tensor, check, explain,
};
use crate::engine::{Entry, State};
use crate::error::Result;
use crate::indices::refuse;
use crate::kernels::page::KvLayout;
use crate::stream::Stream;
use crate::tensor::DType;

/// The name that errors of a call carry.
pub(super) const RUN: &str = "Plan::run";

const MOST: i64 = i32::MAX as i64;

/// A specification says which; the row says what there is at all.
const TYPES: &[DType] = &[DType::BF16, DType::F16, DType::F32, DType::F8E4M3];

const fn tensor(name: &'static str, role: Role, dtype: Dtype, shape: &'static [Size], strides: Strides) -> Argument {
    let tensor = Tensor {
        role,
        optional: false,
        dtype,
        shape,
        strides,
        alignment: Alignment::Bytes(16),
        contents: Contents::Uniform(1.0),
    };
    Argument { name, kind: Kind::Tensor(tensor) }
}

/// An optional tensor of F32.
const fn numbers(name: &'static str, role: Role, shape: &'static [Size]) -> Argument {
    let (dtype, strides) = (Dtype::Only(DType::F32), Strides::Contiguous);
    let (alignment, contents) = (Alignment::Bytes(4), Contents::Uniform(1.0));
    Argument { name, kind: Kind::Tensor(Tensor { role, optional: true, dtype, shape, strides, alignment, contents }) }
}

const fn dimension(name: &'static str, from: From, least: i64) -> Dimension {
    Dimension { name, from, least, most: MOST, examples: &[] }
}

// The dimensions of the rows; those of a cache are what they are called there.
pub(super) const ROWS: usize = 0;
pub(super) const Q_HEADS: usize = 1;
pub(super) const Q_DIM: usize = 2;
/// Pages, or the tokens of keys that lie one after the other.
pub(super) const PAGES: usize = 3;
pub(super) const PAGE_SIZE: usize = 4;
pub(super) const KV_HEADS: usize = 5;
pub(super) const V_DIM: usize = 6;

/// The arguments of every row start with these; of latent attention the keys and values are the two parts of its cache.
pub(super) const Q: usize = 0;
pub(super) const K: usize = 1;
pub(super) const V: usize = 2;
const O: usize = 3;

const QUERIES: &[Size] = &[Size::Of(ROWS), Size::Of(Q_HEADS), Size::Of(Q_DIM)];
const RESULTS: &[Size] = &[Size::Of(ROWS), Size::Of(Q_HEADS), Size::Of(V_DIM)];
const LOGARITHMS: &[Size] = &[Size::Of(ROWS), Size::Of(Q_HEADS)];
const NHD: &[Size] = &[Size::Of(PAGES), Size::Of(PAGE_SIZE), Size::Of(KV_HEADS), Size::Of(V_DIM)];
const HND: &[Size] = &[Size::Of(PAGES), Size::Of(KV_HEADS), Size::Of(PAGE_SIZE), Size::Of(V_DIM)];

const fn paged(shape: &'static [Size]) -> [Argument; 6] {
    [
        tensor("q", Role::In, Dtype::OneOf(TYPES), QUERIES, Strides::Rows),
        tensor("paged_k_cache", Role::In, Dtype::OneOf(TYPES), shape, Strides::Rows),
        tensor("paged_v_cache", Role::In, Dtype::As(K), shape, Strides::As(K)),
        // The queries' type, or of 8-bit queries another.
        tensor("o", Role::Out, Dtype::OneOf(TYPES), RESULTS, Strides::Contiguous),
        numbers("lse", Role::Out, LOGARITHMS),
        numbers("sink", Role::In, &[Size::Of(Q_HEADS)]),
    ]
}

/// By the places of a page's tokens and heads in the cache's shape.
const fn dimensions(tokens: usize, heads: usize) -> [Dimension; 7] {
    [
        dimension("rows", From::Shape(Q, 0), 0),
        dimension("q_heads", From::Shape(Q, 1), 1),
        dimension("head_dim", From::Shape(Q, 2), 1),
        dimension("pages", From::Shape(K, 0), 1),
        dimension("page_size", From::Shape(K, tokens), 1),
        dimension("kv_heads", From::Shape(K, heads), 1),
        dimension("head_dim of the cache", From::Shape(K, 3), 1),
    ]
}

// Constants, of which each check is compiled into straight code.
pub(super) const PAGED: &Row = &PAGED_ROW;

const PAGED_ROW: Row = Row {
    kernel: "attention over a paged cache",
    function: RUN,
    library: "",
    feature: "attention",
    summary: "Attention over a paged cache.",
    source: "`csrc/batch_prefill.cu`, `csrc/batch_prefill_sm90.cu`, `csrc/batch_decode.cu`",
    runs_on: RunsOn::AtLeast(7, 5),
    arguments: &paged(NHD),
    lead: Q,
    dimensions: &dimensions(1, 2),
    relations: &[],
    // Offsets of pages are 64 bits wide, the strides in them 32; how far queries reach is compared behind the row.
    extent: Extent { most: i64::MAX / 8, split: false, stride: u32::MAX as i64 },
    pdl: Pdl::Waits,
    attributes: Attributes::None,
    reports: Reports::Status,
    uses_current_device: false,
    convention: Convention::Views,
    hazards: &[],
    tolerance: [0.0, 0.0],
    tests: "`tests/attention.rs`, `tests/attention_gpu.rs`",
};

pub(super) const PAGED_HND: &Row = &Row { arguments: &paged(HND), dimensions: &dimensions(2, 1), ..PAGED_ROW };

pub(super) const RAGGED: &Row = &Row {
    kernel: "attention over keys one after the other",
    summary: "Attention over keys and values that lie one after the other.",
    arguments: &[
        tensor("q", Role::In, Dtype::OneOf(TYPES), QUERIES, Strides::Rows),
        tensor(
            "k",
            Role::In,
            Dtype::OneOf(TYPES),
            &[Size::Of(PAGES), Size::Of(KV_HEADS), Size::Of(Q_DIM)],
            Strides::Rows,
        ),
        tensor("v", Role::In, Dtype::As(K), &[Size::Of(PAGES), Size::Of(KV_HEADS), Size::Of(V_DIM)], Strides::Rows),
        tensor("o", Role::Out, Dtype::OneOf(TYPES), RESULTS, Strides::Contiguous),
        numbers("lse", Role::Out, LOGARITHMS),
        numbers("sink", Role::In, &[Size::Of(Q_HEADS)]),
    ],
    dimensions: &[
        dimension("rows", From::Shape(Q, 0), 0),
        dimension("q_heads", From::Shape(Q, 1), 1),
        dimension("head_dim", From::Shape(Q, 2), 1),
        dimension("keys", From::Shape(K, 0), 0),
        dimension("one", From::Shape(K, 5), 1),
        dimension("kv_heads", From::Shape(K, 1), 1),
        dimension("head_dim of v", From::Shape(V, 2), 1),
    ],
    ..PAGED_ROW
};

pub(super) const MLA: &Row = &Row {
    kernel: "latent attention",
    summary: "Multi-head latent attention over a paged cache.",
    arguments: &[
        tensor("q_nope", Role::In, Dtype::OneOf(TYPES), QUERIES, Strides::Rows),
        tensor(
            "ckv_cache",
            Role::In,
            Dtype::As(Q),
            &[Size::Of(PAGES), Size::Of(PAGE_SIZE), Size::Of(V_DIM)],
            Strides::Rows,
        ),
        tensor(
            "kpe_cache",
            Role::In,
            Dtype::As(Q),
            &[Size::Of(PAGES), Size::Of(PAGE_SIZE), Size::Of(ROTARY)],
            Strides::Rows,
        ),
        tensor("o", Role::Out, Dtype::As(Q), RESULTS, Strides::Contiguous),
        numbers("lse", Role::Out, LOGARITHMS),
        tensor("q_pe", Role::In, Dtype::As(Q), &[Size::Of(ROWS), Size::Of(Q_HEADS), Size::Of(ROTARY)], Strides::Rows),
    ],
    dimensions: &[
        dimension("rows", From::Shape(Q, 0), 0),
        dimension("heads", From::Shape(Q, 1), 1),
        dimension("ckv_dim of q_nope", From::Shape(Q, 2), 1),
        dimension("pages", From::Shape(K, 0), 1),
        dimension("page_size", From::Shape(K, 1), 1),
        dimension("one", From::Shape(K, 5), 1),
        dimension("ckv_dim", From::Shape(K, 2), 1),
        dimension("kpe_dim", From::Shape(V, 2), 1),
    ],
    ..PAGED_ROW
};

pub(super) const ROTARY: usize = 7;

/// The name that errors of a call of XQA carry.
pub(super) const XQA_RUN: &str = "XqaDecode::run";

/// Behind queries, keys, values and results.
pub(super) const XQA_PAGES: usize = 4;
pub(super) const XQA_LENGTHS: usize = 5;

/// The pages of a row of XQA's table.
const PER_REQUEST: usize = 7;

const fn words(name: &'static str, shape: &'static [Size]) -> Argument {
    let (dtype, strides) = (Dtype::Only(DType::I32), Strides::Contiguous);
    let (alignment, contents) = (Alignment::Bytes(4), Contents::Uniform(1.0));
    let (role, optional) = (Role::In, false);
    Argument { name, kind: Kind::Tensor(Tensor { role, optional, dtype, shape, strides, alignment, contents }) }
}

const fn xqa_arguments(shape: &'static [Size]) -> [Argument; 6] {
    [
        tensor("q", Role::In, Dtype::OneOf(TYPES), QUERIES, Strides::Contiguous),
        tensor("paged_k_cache", Role::In, Dtype::OneOf(TYPES), shape, Strides::Rows),
        tensor("paged_v_cache", Role::In, Dtype::As(K), shape, Strides::As(K)),
        tensor("o", Role::Out, Dtype::As(Q), RESULTS, Strides::Contiguous),
        words("page_table", &[Size::Of(ROWS), Size::Of(PER_REQUEST)]),
        words("seq_lens", &[Size::Of(ROWS)]),
    ]
}

const fn xqa_dimensions(tokens: usize, heads: usize) -> [Dimension; 8] {
    let [rows, q_heads, q_dim, pages, page_size, kv_heads, v_dim] = dimensions(tokens, heads);
    let per_request = dimension("pages_per_request", From::Shape(XQA_PAGES, 1), 1);
    [rows, q_heads, q_dim, pages, page_size, kv_heads, v_dim, per_request]
}

const XQA_ROW: Row = Row {
    kernel: "attention by XQA",
    function: XQA_RUN,
    feature: "attention-xqa",
    summary: "Attention of one query for each request, by lengths and pages in the GPU's memory.",
    source: "`csrc/xqa/xqa_wrapper.cu`, `csrc/xqa/mha.cu`",
    runs_on: RunsOn::AtLeast(9, 0),
    arguments: &xqa_arguments(NHD),
    dimensions: &xqa_dimensions(1, 2),
    // It waits before it reads anything, but lets the kernel behind it start before that.
    pdl: Pdl::None,
    // What its launch answers it drops.
    reports: Reports::LastError,
    uses_current_device: true,
    tests: "`tests/attention.rs`, `tests/attention_planner.rs`, `tests/xqa_gpu.rs`",
    ..PAGED_ROW
};
static XQA: Row = XQA_ROW;
static XQA_HND: Row = Row { arguments: &xqa_arguments(HND), dimensions: &xqa_dimensions(2, 1), ..XQA_ROW };

/// What the tensors of a call of XQA must be.
pub(super) fn xqa(layout: KvLayout) -> &'static Row {
    if layout == KvLayout::Nhd { &XQA } else { &XQA_HND }
}

/// How XQA's launcher is called.
pub(super) fn xqa_entry() -> Entry {
    Entry { row: &XQA, state: &STATUS }
}

/// A launcher that raises what its launch answers.
static STATUS: State = State::new();
pub(super) static TELLS: Row = Row { arguments: &[], dimensions: &[], ..PAGED_ROW };
/// FA3's drops what its launch answers, and raises CUDA's last error.
pub(super) static ASKS: Row = ASKS_ROW;
const ASKS_ROW: Row = Row { arguments: &[], dimensions: &[], reports: Reports::LastError, pdl: Pdl::None, ..PAGED_ROW };
/// That for 8-bit queries makes the workspace's GPU the current one too, and leaves it so.
static ASKS_AND_TURNS: Row = Row { uses_current_device: true, ..ASKS_ROW };

/// How a launcher is called, by whether it is FA3's, and one for 8-bit queries.
pub(super) fn entry(fa3: bool, eight_bits: bool) -> Entry {
    let row = match (fa3, eight_bits) {
        (false, _) => &TELLS,
        (true, false) => &ASKS,
        (true, true) => &ASKS_AND_TURNS,
    };
    Entry { row, state: &STATUS }
}

/// What a plan was made for, by the dimensions' names.
pub(super) struct Expected {
    pub(super) rows: i64,
    pub(super) q_heads: i64,
    pub(super) kv_heads: i64,
    pub(super) q_dim: i64,
    pub(super) v_dim: i64,
    pub(super) page_size: i64,
    /// As many or more; of keys that lie one after the other exactly so many.
    pub(super) pages: i64,
    pub(super) q: DType,
    pub(super) kv: DType,
    pub(super) o: DType,
}

/// Checks the tensors of a call, against the row and then against the plan.
#[inline(always)]
pub(super) fn checked(
    row: &'static Row,
    operands: &[Operand<'_, '_>; 6],
    stream: Stream<'_>,
    expected: &Expected,
    more_pages: bool,
) -> Result<Checked> {
    let checked = match check(row, operands, stream) {
        Ok(checked) => checked,
        Err(fault) => return Err(explain(row, operands, stream, fault)),
    };
    let sizes = &checked.dimensions;
    let fits = sizes[ROWS] == expected.rows
        && sizes[Q_HEADS] == expected.q_heads
        && sizes[Q_DIM] == expected.q_dim
        && sizes[V_DIM] == expected.v_dim
        && sizes[PAGE_SIZE] == expected.page_size
        && sizes[KV_HEADS] == expected.kv_heads
        && (sizes[PAGES] == expected.pages || (more_pages && sizes[PAGES] > expected.pages))
        && operands[Q].layout().is_some_and(|q| q.is_of(expected.q))
        && operands[K].layout().is_some_and(|k| k.is_of(expected.kv))
        && operands[O].layout().is_some_and(|o| o.is_of(expected.o));
    if fits { Ok(checked) } else { differs(row, operands, sizes, expected, more_pages) }
}

#[cold]
fn differs(
    row: &'static Row,
    operands: &[Operand<'_, '_>; 6],
    sizes: &crate::contract::Dimensions,
    expected: &Expected,
    more_pages: bool,
) -> Result<Checked> {
    for (at, dtype) in [(Q, expected.q), (K, expected.kv), (O, expected.o)] {
        if let Some(layout) = operands[at].layout().filter(|layout| !layout.is_of(dtype)) {
            let (found, expected) = (layout.dtype().to_string(), format!("{dtype}, as the specification says"));
            return refuse(row.function, row.arguments[at].name, found, expected);
        }
    }
    let sizes_expected = [
        (ROWS, expected.rows, "as many as the batch has queries"),
        (Q_HEADS, expected.q_heads, "as the specification says"),
        (Q_DIM, expected.q_dim, "as the specification says"),
        (V_DIM, expected.v_dim, "as the specification says"),
        (PAGE_SIZE, expected.page_size, "as the specification says"),
        (KV_HEADS, expected.kv_heads, "as the specification says"),
    ];
    for (at, wanted, why) in sizes_expected {
        if sizes[at] != wanted {
            return refuse(row.function, row.dimensions[at].name, sizes[at].to_string(), format!("{wanted}, {why}"));
        }
    }
    let or_more = if more_pages { " or more" } else { "" };
    let wanted = format!("{}{or_more}, for which the batch was made", expected.pages);
    refuse(row.function, row.dimensions[PAGES].name, sizes[PAGES].to_string(), wanted)
}

/// That what kernels count in 32 bits stays within them, on a GPU: how far queries and keys reach that lie one after the other, and
/// how far a page reaches.
#[inline(always)]
pub(super) fn check_reach(row: &'static Row, operands: &[Operand<'_, '_>; 6], pages: bool, most: i64) -> Result<()> {
    // Most tensors are dense and no larger than that as a whole.
    let mut small = true;
    for at in [Q, K, V] {
        small &= operands[at].layout().is_some_and(|layout| layout.is_contiguous() & (layout.numel() <= REACH));
    }
    if small { Ok(()) } else { check_far_reach(row, operands, pages, most) }
}

/// As far as 32 bits count.
const REACH: i64 = u32::MAX as i64;

#[cold]
fn check_far_reach(row: &'static Row, operands: &[Operand<'_, '_>; 6], pages: bool, most: i64) -> Result<()> {
    for at in [Q, K, V] {
        let Some(layout) = operands[at].layout() else { continue };
        let paged = pages && at != Q;
        let part = if paged { within_a_page(layout) } else { layout.reach() };
        let (fits, whole) = (|reach: Option<i64>, most| reach.is_some_and(|reach| reach <= most), layout.reach());
        let found = || format!("strided {:?} with shape {:?}", layout.strides(), layout.shape());
        if !fits(part, REACH) {
            let what = if paged { "each page" } else { "the tensor" };
            let expected = format!("{what} to reach at most {REACH} elements, which kernels count in 32 bits");
            return refuse(row.function, row.arguments[at].name, found(), expected);
        }
        if paged && !fits(whole, most) {
            let expected = format!("the cache to reach at most {most} elements, which this kernel counts in 32 bits");
            return refuse(row.function, row.arguments[at].name, found(), expected);
        }
    }
    Ok(())
}

/// How many elements lie from a page's first to behind its last.
fn within_a_page(layout: &crate::tensor::Layout) -> Option<i64> {
    let inside = layout.shape().iter().zip(layout.strides()).skip(1);
    inside.clone().try_fold(1i64, |reach, (&size, &stride)| reach.checked_add((size - 1).checked_mul(stride)?))
}

/// The place of the results among the arguments.
pub(super) const RESULT: usize = O;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::FlashInferError;
    use crate::owner::Owner;
    use crate::tensor::Layout;

    /// A tensor that nobody reads, so that it may be of any size.
    fn layout(shape: &[i64], strides: Option<&[i64]>) -> Layout {
        let address = std::ptr::without_provenance_mut(0x1000);
        Layout::build(address, crate::tensor::Device::Cuda(0), DType::BF16, shape, strides, None)
    }

    /// What is refused of queries, keys and values of these layouts, and why.
    fn refused(row: &'static Row, [q, k, v]: [&Layout; 3], pages: bool, most: i64) -> Option<(&'static str, String)> {
        let owner = Owner::NONE;
        let [q, k, v] = [q, k, v].map(|layout| Operand::Tensor(layout, &owner));
        match check_reach(row, &[q, k, v, q, Operand::Absent, Operand::Absent], pages, most) {
            Ok(()) => None,
            Err(FlashInferError::InvalidArgument { argument, expected, .. }) => Some((argument, expected)),
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn what_32_bits_do_not_count_is_refused() {
        let (few, far) = (layout(&[4, 64, 128], None), layout(&[1 << 20, 64, 128], None));
        let keys = |tokens| layout(&[tokens, 8, 128], None);
        let names = |row, layouts, pages, most, argument, says: &str| {
            let (found, expected) = refused(row, layouts, pages, most).unwrap();
            assert!(found == argument && expected.contains(says), "{found}: {expected}");
        };
        // Of keys that lie one after the other the whole, to the last element.
        let near = keys((1 << 22) - 1);
        assert_eq!(refused(RAGGED, [&few, &near, &near], false, i64::MAX), None);
        let (long, longer) = (keys((1 << 22) + 1), keys(1 << 30));
        names(RAGGED, [&far, &near, &near], false, i64::MAX, "q", "the tensor to reach at most 4294967295");
        names(RAGGED, [&few, &long, &near], false, i64::MAX, "k", "the tensor to reach");
        names(RAGGED, [&few, &near, &longer], false, i64::MAX, "v", "the tensor to reach");
        // A few tokens far apart are far too.
        let spread = layout(&[3, 8, 128], Some(&[1 << 31, 128, 1]));
        names(RAGGED, [&few, &spread, &near], false, i64::MAX, "k", "the tensor to reach");
        // Of a paged cache each page; of a latent one the whole too, and of XQA's as many heads.
        let cache = layout(&[1 << 26, 16, 8, 128], None);
        assert_eq!(refused(PAGED, [&few, &cache, &cache], true, i64::MAX), None);
        let page = layout(&[2, 3, 8, 128], Some(&[1 << 40, 1 << 31, 128, 1]));
        names(PAGED, [&few, &page, &page], true, i64::MAX, "paged_k_cache", "each page to reach at most 4294967295");
        let latent = layout(&[(1 << 19) + 1, 16, 512], None);
        names(
            MLA,
            [&few, &latent, &latent],
            true,
            u32::MAX.into(),
            "ckv_cache",
            "the cache to reach at most 4294967295",
        );
        let fits = layout(&[1 << 18, 16, 512], None);
        assert_eq!(refused(MLA, [&few, &fits, &fits], true, u32::MAX.into()), None);
    }
}
