//! `page.so`: appending keys and values to a paged cache.
//!
//! A paged cache is two buffers, of keys and of values, each divided into pages of a fixed number of tokens
//! ([`PagedKvCache`]). Which pages a request has, and where a step's tokens go, says a [`PageTable`](crate::PageTable), whose
//! [`append`](crate::PageTable::append) answers [`Tokens`]: indices that were checked on the host and are owned
//! together with their copy on the GPU. Upstream looks at no index: a wrong one writes anywhere. Indices that were computed on
//! the GPU come in by [`Placed::from_tensors`], which is `unsafe`.
//!
//! On a GPU a call is asynchronous on `stream` and never synchronizes; tensors on the host are computed by the
//! [reference](crate::reference), at once. Without tokens a call is a no-op. The kernels copy: numbers keep their bits.
//!
//! # Errors
//! Every function answers [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for what breaks its contract,
//! before anything is launched; [`DeviceOutOfRange`](crate::FlashInferError::DeviceOutOfRange); what loading `page.so`
//! answers; [`TvmFfiCall`](crate::FlashInferError::TvmFfiCall) with what the kernel raised; and
//! [`Cuda`](crate::FlashInferError::Cuda) or [`ContextLost`](crate::FlashInferError::ContextLost) where it was not launched.

use crate::contract::{
    Alignment, Argument, Attributes, Contents, Convention, Dimension, Dimensions, Dtype, Extent, From, Kind, Operand,
    Pdl, Relation, Reports, Role, Row, RunsOn, Size, Strides, Tensor,
};
use crate::engine::{Entry, call, kernels};
use crate::error::Result;
use crate::indices::{Placed, Tokens, refuse};
use crate::stream::Stream;
use crate::tensor::{DType, Device, TensorMut, TensorRef};

const MOST: i64 = i32::MAX as i64;

/// The types of a cache. Upstream takes bytes for pairs of 4-bit numbers and moves half of them, so U8 is none.
const TYPES: &[DType] = &[DType::BF16, DType::F16, DType::F8E4M3, DType::F8E5M2];

/// How the tokens and the heads of a page lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvLayout {
    /// `[pages, page_size, heads, head_dim]`: the heads of a token lie together.
    Nhd,
    /// `[pages, heads, page_size, head_dim]`: the tokens of a head lie together.
    Hnd,
}

/// A paged cache of keys and values: both buffers, their layout, and how they are divided into pages.
///
/// It borrows its memory as tensors do, so it is made for each call, or each series of calls.
///
/// ```
/// use flashinfer_rs::kernels::page::{KvLayout, PagedKvCache};
/// use flashinfer_rs::TensorMut;
///
/// // 8 pages of 16 tokens, 2 heads of 64 elements.
/// let shape = [8, 16, 2, 64];
/// let (mut k, mut v) = (vec![half::bf16::ZERO; 16384], vec![half::bf16::ZERO; 16384]);
/// let cache = PagedKvCache::new(
///     TensorMut::from_slice(&mut k, &shape)?,
///     TensorMut::from_slice(&mut v, &shape)?,
///     KvLayout::Nhd,
/// )?;
/// assert_eq!((cache.pages(), cache.page_size(), cache.heads(), cache.head_dim()), (8, 16, 2, 64));
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
#[derive(Debug)]
pub struct PagedKvCache<'a> {
    k: TensorMut<'a>,
    v: TensorMut<'a>,
    layout: KvLayout,
}

impl<'a> PagedKvCache<'a> {
    /// Of two tensors of the same shape, type, strides and device, laid out as `layout` says. They need not be contiguous:
    /// keys and values may be the halves of one buffer's pages.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) unless both have four dimensions, and agree.
    pub fn new(k: TensorMut<'a>, v: TensorMut<'a>, layout: KvLayout) -> Result<Self> {
        if k.shape().len() != 4 || k.shape().contains(&0) {
            let expected = match layout {
                KvLayout::Nhd => "[pages, page_size, heads, head_dim], none of them 0",
                KvLayout::Hnd => "[pages, heads, page_size, head_dim], none of them 0",
            };
            return refuse("PagedKvCache", "paged_k_cache", format!("of shape {:?}", k.shape()), expected);
        }
        let same = (k.shape(), k.strides(), k.dtype(), k.device()) == (v.shape(), v.strides(), v.dtype(), v.device());
        match same {
            true => Ok(Self { k, v, layout }),
            false => refuse("PagedKvCache", "paged_v_cache", format!("{v:?}"), format!("as paged_k_cache, {k:?}")),
        }
    }

    /// How the tokens and the heads of a page lie.
    pub fn layout(&self) -> KvLayout {
        self.layout
    }

    /// How many pages there are.
    pub fn pages(&self) -> i64 {
        self.k.shape()[0]
    }

    /// How many tokens a page holds.
    pub fn page_size(&self) -> i64 {
        self.k.shape()[if self.layout == KvLayout::Nhd { 1 } else { 2 }]
    }

    /// How many heads a token has.
    pub fn heads(&self) -> i64 {
        self.k.shape()[if self.layout == KvLayout::Nhd { 2 } else { 1 }]
    }

    /// How many elements a head has.
    pub fn head_dim(&self) -> i64 {
        self.k.shape()[3]
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.k.dtype()
    }

    /// Where the memory is.
    pub fn device(&self) -> Device {
        self.k.device()
    }

    /// The keys, to be read.
    pub fn k(&self) -> TensorRef<'_> {
        self.k.as_ref()
    }

    /// The values, to be read.
    pub fn v(&self) -> TensorRef<'_> {
        self.v.as_ref()
    }

    /// Keys and values, for calls that write both.
    pub(crate) fn operands(&self) -> (Operand<'_, 'a>, Operand<'_, 'a>) {
        (self.k.operand(), self.v.operand())
    }
}

/// A paged cache of multi-head latent attention: the compressed keys and values that all heads share, and the part of the
/// keys that carries the position.
#[derive(Debug)]
pub struct PagedMlaCache<'a> {
    ckv: TensorMut<'a>,
    kpe: TensorMut<'a>,
}

impl<'a> PagedMlaCache<'a> {
    /// Of `ckv_cache`, `[pages, page_size, 512]`, and `kpe_cache`, `[pages, page_size, 64]`, of one type and device.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) unless both have three dimensions, of which the first two are the
    /// same and none is 0, and agree in type and device.
    pub fn new(ckv_cache: TensorMut<'a>, kpe_cache: TensorMut<'a>) -> Result<Self> {
        let (ckv, kpe) = (&ckv_cache, &kpe_cache);
        if ckv.shape().len() != 3 || ckv.shape().contains(&0) {
            let expected = "[pages, page_size, 512], none of them 0".to_owned();
            return refuse("PagedMlaCache", "ckv_cache", format!("of shape {:?}", ckv.shape()), expected);
        }
        let same = kpe.shape().len() == 3 && kpe.shape()[..2] == ckv.shape()[..2] && kpe.shape()[2] > 0;
        if !same || (ckv.dtype(), ckv.device()) != (kpe.dtype(), kpe.device()) {
            return refuse(
                "PagedMlaCache",
                "kpe_cache",
                format!("{kpe:?}"),
                format!("the pages, type and device of ckv_cache, {ckv:?}"),
            );
        }
        Ok(Self { ckv: ckv_cache, kpe: kpe_cache })
    }

    /// How many pages there are.
    pub fn pages(&self) -> i64 {
        self.ckv.shape()[0]
    }

    /// How many tokens a page holds.
    pub fn page_size(&self) -> i64 {
        self.ckv.shape()[1]
    }

    /// The compressed keys and values, to be read.
    pub fn ckv(&self) -> TensorRef<'_> {
        self.ckv.as_ref()
    }

    /// The part of the keys that carries the position, to be read.
    pub fn kpe(&self) -> TensorRef<'_> {
        self.kpe.as_ref()
    }

    /// Both parts, for calls that write them.
    pub(crate) fn operands(&self) -> (Operand<'_, 'a>, Operand<'_, 'a>) {
        (self.ckv.operand(), self.kpe.operand())
    }
}

/// That indices were made for a cache of these pages: what makes it sound to write where they say.
pub(crate) fn check_tokens(
    function: &'static str,
    tokens: &Placed<'_, Tokens>,
    (pages, page_size): (i64, i64),
) -> Result<()> {
    let facts = tokens.facts();
    if (facts.pages, facts.page_size) == (pages, page_size) {
        return Ok(());
    }
    let found = format!("of a table for {} pages of {} tokens", facts.pages, facts.page_size);
    let expected = format!("{pages} pages of {page_size} tokens, as the cache has");
    refuse(function, "tokens", found, expected)
}

const fn tensor(
    name: &'static str,
    (role, dtype, strides, bytes): (Role, Dtype, Strides, usize),
    shape: &'static [Size],
    contents: Contents,
) -> Argument {
    let alignment = Alignment::Bytes(bytes);
    Argument { name, kind: Kind::Tensor(Tensor { role, optional: false, dtype, shape, strides, alignment, contents }) }
}

const ANY: Contents = Contents::Uniform(1.0);

/// Keys or values to be appended: moved 16 bytes at a time.
const fn appended(name: &'static str, dtype: Dtype) -> Argument {
    tensor(name, (Role::In, dtype, Strides::Rows, 16), &[Size::Of(0), Size::Of(1), Size::Of(2)], ANY)
}

const fn cache(name: &'static str, strides: Strides, shape: &'static [Size]) -> Argument {
    tensor(name, (Role::InPlace, Dtype::As(0), strides, 16), shape, ANY)
}

pub(super) const fn indices(name: &'static str, shape: &'static [Size], contents: Contents) -> Argument {
    tensor(name, (Role::In, Dtype::Only(DType::I32), Strides::Contiguous, 4), shape, contents)
}

/// Whose request each token is, of a row whose dimension `requests` has this number.
const fn batch_indices(requests: usize) -> Argument {
    indices("batch_indices", &[Size::Of(0)], Contents::Turns(requests))
}

const fn positions(requests: usize) -> Argument {
    indices("positions", &[Size::Of(0)], Contents::Rounds(requests))
}

const fn dimension(name: &'static str, from: From, least: i64, examples: &'static [i64]) -> Dimension {
    Dimension { name, from, least, most: MOST, examples }
}

// The dimensions of `append_paged_kv_cache`.
const HEADS: usize = 1;
const HEAD_DIM: usize = 2;
const PAGES: usize = 3;
const PAGE_SIZE: usize = 4;
const REQUESTS: usize = 5;
const INDICES: usize = 6;

const NHD: &[Size] = &[Size::Of(PAGES), Size::Of(PAGE_SIZE), Size::Of(HEADS), Size::Of(HEAD_DIM)];
const HND: &[Size] = &[Size::Of(PAGES), Size::Of(HEADS), Size::Of(PAGE_SIZE), Size::Of(HEAD_DIM)];

const fn arguments(shape: &'static [Size], layout: i64) -> [Argument; 10] {
    [
        appended("append_key", Dtype::OneOf(TYPES)),
        appended("append_value", Dtype::As(0)),
        batch_indices(REQUESTS),
        positions(REQUESTS),
        cache("paged_k_cache", Strides::Rows, shape),
        cache("paged_v_cache", Strides::As(4), shape),
        indices("kv_indices", &[Size::Of(INDICES)], Contents::Turns(PAGES)),
        indices("kv_indptr", &[Size::OneMore(REQUESTS)], Contents::Offsets(REQUESTS, INDICES)),
        indices("kv_last_page_len", &[Size::Of(REQUESTS)], Contents::Zeros),
        Argument { name: "layout", kind: Kind::Whole(layout, layout) },
    ]
}

const fn dimensions(page_size: usize) -> [Dimension; 7] {
    [
        dimension("tokens", From::Shape(0, 0), 0, &[7, 1, 30]),
        dimension("heads", From::Shape(0, 1), 1, &[8, 1, 2]),
        dimension("head_dim", From::Shape(0, 2), 1, &[128, 64, 256, 512]),
        dimension("pages", From::Shape(4, 0), 1, &[12, 20]),
        dimension("page_size", From::Shape(4, page_size), 1, &[16, 5, 64]),
        dimension("requests", From::OneLess(7, 0), 0, &[3, 6]),
        dimension("indices", From::Shape(6, 0), 0, &[9, 12]),
    ]
}

const COMPILED: Relation = Relation {
    name: "head_dim",
    only_on_gpu: true,
    holds: |sizes| matches!(sizes[HEAD_DIM], 64 | 128 | 256 | 512),
    found: |sizes| sizes[HEAD_DIM].to_string(),
    expected: "64, 128, 256 or 512, for which the kernel is compiled",
};

const FITS_BLOCK: Relation = Relation {
    name: "heads",
    only_on_gpu: true,
    // Of 16-bit elements. Of 8 bits twice as many would fit with 64, 128 and 256; no model has them.
    holds: |sizes| sizes[HEADS] <= 32.max(8192 / sizes[HEAD_DIM].max(1)),
    found: |sizes| sizes[HEADS].to_string(),
    expected: "few enough for a block's 1,024 threads: 128 of 64 elements, 64 of 128, 32 of 256 or 512",
};

/// A token's page is found by a product of these, and a division that is right below 2³¹.
pub(super) const fn counted(holds: fn(&Dimensions) -> bool, found: fn(&Dimensions) -> String) -> Relation {
    let expected = "pages that hold at most 2147483647 tokens together, which is how far the kernel counts";
    Relation { name: "kv_indices", only_on_gpu: true, holds, found, expected }
}

const COUNTED: Relation = counted(
    |sizes| sizes[INDICES].saturating_mul(sizes[PAGE_SIZE]) <= MOST,
    |sizes| format!("{} pages of {} tokens", sizes[INDICES], sizes[PAGE_SIZE]),
);

const APPEND: Row = Row {
    kernel: "append_paged_kv_cache",
    function: "append_paged_kv_cache",
    library: "page.so",
    feature: "page",
    summary: "Copies keys and values to their places in a paged cache whose pages have a token's heads together (NHD).",
    source: "`csrc/page.cu`, `include/flashinfer/page.cuh`",
    runs_on: RunsOn::AtLeast(7, 5),
    arguments: &arguments(NHD, 0),
    lead: 0,
    dimensions: &dimensions(1),
    relations: &[COMPILED, FITS_BLOCK, COUNTED],
    // Products with the number of a page are 64 bits wide, the strides in them 32.
    extent: Extent { most: i64::MAX / 8, split: false, stride: u32::MAX as i64 },
    pdl: Pdl::None,
    attributes: Attributes::None,
    reports: Reports::Status,
    uses_current_device: false,
    convention: Convention::Views,
    hazards: &[
        "A token is written to the entry `positions[i] % page_size` of page \
         `kv_indices[kv_indptr[batch_indices[i]] + positions[i] / page_size]`, wherever that is: `Tokens` is what makes it be \
         in the cache.",
        "The contents of `kv_last_page_len` are never read.",
        "Pages of 0 tokens would end the process: the launcher divides by them.",
    ],
    tolerance: [0.0, 0.0],
    tests: "`tests/page.rs`, `tests/page_gpu.rs`",
};

// The dimensions of `append_paged_mla_kv_cache`, of which the last ones are as above.

kernels! {
    /// [`append_paged_kv_cache`], to a cache in [`KvLayout::Nhd`].
    AppendPagedKvCache = APPEND;
    /// [`append_paged_kv_cache`], to a cache in [`KvLayout::Hnd`].
    AppendPagedKvCacheHnd = Row {
        kernel: "append_paged_kv_cache of heads",
        summary: "Copies keys and values to their places in a paged cache whose pages have a head's tokens together (HND).",
        arguments: &arguments(HND, 1),
        dimensions: &dimensions(2),
        ..APPEND
    };
    /// [`append_paged_mla_kv_cache`].
    AppendPagedMlaKvCache = Row {
        kernel: "append_paged_mla_kv_cache",
        function: "append_paged_mla_kv_cache",
        summary: "Copies compressed keys and values, and the keys' rotary part, to their places in a paged cache.",
        arguments: &[
            tensor("append_ckv", (Role::In, Dtype::OneOf(TYPES), Strides::Rows, 4), &[Size::Of(0), Size::Of(1)], ANY),
            tensor("append_kpe", (Role::In, Dtype::As(0), Strides::Rows, 4), &[Size::Of(0), Size::Of(2)], ANY),
            batch_indices(REQUESTS),
            positions(REQUESTS),
            tensor(
                "ckv_cache",
                (Role::InPlace, Dtype::As(0), Strides::Rows, 4),
                &[Size::Of(PAGES), Size::Of(PAGE_SIZE), Size::Of(1)],
                ANY,
            ),
            tensor(
                "kpe_cache",
                (Role::InPlace, Dtype::As(0), Strides::Rows, 4),
                &[Size::Of(PAGES), Size::Of(PAGE_SIZE), Size::Of(2)],
                ANY,
            ),
            indices("kv_indices", &[Size::Of(INDICES)], Contents::Turns(PAGES)),
            indices("kv_indptr", &[Size::OneMore(REQUESTS)], Contents::Offsets(REQUESTS, INDICES)),
            indices("kv_last_page_len", &[Size::Of(REQUESTS)], Contents::Zeros),
        ],
        dimensions: &[
            dimension("tokens", From::Shape(0, 0), 0, &[7, 1, 30]),
            Dimension { name: "ckv_dim", from: From::Shape(0, 1), least: 512, most: 512, examples: &[512] },
            Dimension { name: "kpe_dim", from: From::Shape(1, 1), least: 64, most: 64, examples: &[64] },
            dimension("pages", From::Shape(4, 0), 1, &[12, 20]),
            dimension("page_size", From::Shape(4, 1), 1, &[16, 5, 64]),
            dimension("requests", From::OneLess(7, 0), 0, &[3, 6]),
            dimension("indices", From::Shape(6, 0), 0, &[9, 12]),
        ],
        relations: &[COUNTED],
        ..APPEND
    };
}

/// Whether the kernels run on a device: on the host always, on a GPU by its compute capability.
///
/// # Errors
/// [`DeviceOutOfRange`](crate::FlashInferError::DeviceOutOfRange), or why there is no GPU.
pub fn is_supported(device: Device) -> Result<bool> {
    Entry::of::<AppendPagedKvCache>().is_supported(device)
}

/// Copies the keys and values of a step's tokens to their places in a paged cache.
///
/// Token `i` goes where `tokens` says: those are made by [`PageTable::append`](crate::PageTable::append), of a table with the
/// cache's number and size of pages, and hold both the tokens and the table as it was then.
///
/// With a cache in [`KvLayout::Nhd`]:
///
/// <!-- append_paged_kv_cache -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `append_key` | `[tokens, heads, head_dim]` | BF16 or F16 or F8E4M3 or F8E5M2 | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `append_value` | `[tokens, heads, head_dim]` | as `append_key` | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `batch_indices` | `[tokens]` | I32 | read; contiguous; aligned to 4 bytes |
/// | `positions` | `[tokens]` | I32 | read; contiguous; aligned to 4 bytes |
/// | `paged_k_cache` | `[pages, page_size, heads, head_dim]` | as `append_key` | read and written; rows anywhere; aligned to 16 bytes |
/// | `paged_v_cache` | `[pages, page_size, heads, head_dim]` | as `append_key` | read and written; strides as `paged_k_cache`; aligned to 16 bytes |
/// | `kv_indices` | `[indices]` | I32 | read; contiguous; aligned to 4 bytes |
/// | `kv_indptr` | `[requests + 1]` | I32 | read; contiguous; aligned to 4 bytes |
/// | `kv_last_page_len` | `[requests]` | I32 | read; contiguous; aligned to 4 bytes |
///
/// With a cache in [`KvLayout::Hnd`]:
///
/// <!-- append_paged_kv_cache of heads -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `append_key` | `[tokens, heads, head_dim]` | BF16 or F16 or F8E4M3 or F8E5M2 | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `append_value` | `[tokens, heads, head_dim]` | as `append_key` | read; rows anywhere, also repeated; aligned to 16 bytes |
/// | `batch_indices` | `[tokens]` | I32 | read; contiguous; aligned to 4 bytes |
/// | `positions` | `[tokens]` | I32 | read; contiguous; aligned to 4 bytes |
/// | `paged_k_cache` | `[pages, heads, page_size, head_dim]` | as `append_key` | read and written; rows anywhere; aligned to 16 bytes |
/// | `paged_v_cache` | `[pages, heads, page_size, head_dim]` | as `append_key` | read and written; strides as `paged_k_cache`; aligned to 16 bytes |
/// | `kv_indices` | `[indices]` | I32 | read; contiguous; aligned to 4 bytes |
/// | `kv_indptr` | `[requests + 1]` | I32 | read; contiguous; aligned to 4 bytes |
/// | `kv_last_page_len` | `[requests]` | I32 | read; contiguous; aligned to 4 bytes |
///
/// # Errors
/// See the [module](self), and `InvalidArgument` for tokens of a table for other pages. On a GPU the head size is 64, 128, 256
/// or 512, and a token's heads must fit a block.
pub fn append_paged_kv_cache(
    cache: &mut PagedKvCache<'_>,
    append_key: &TensorRef<'_>,
    append_value: &TensorRef<'_>,
    tokens: &Placed<'_, Tokens>,
    stream: Stream<'_>,
) -> Result<()> {
    check_tokens("append_paged_kv_cache", tokens, (cache.pages(), cache.page_size()))?;
    let (k, v) = cache.operands();
    let (batch_indices, positions) = (tokens.batch_indices(), tokens.token_positions());
    let (kv_indices, kv_indptr, last) = (tokens.kv_indices(), tokens.kv_indptr(), tokens.kv_last_page_len());
    let layout = i64::from(cache.layout == KvLayout::Hnd);
    let operands = [
        append_key.operand(),
        append_value.operand(),
        batch_indices.operand(),
        positions.operand(),
        k,
        v,
        kv_indices.operand(),
        kv_indptr.operand(),
        last.operand(),
        Operand::Whole(layout),
    ];
    match cache.layout {
        // SAFETY: whoever made the tokens sees to it that the indices are those of a cache of these pages: the page table by its
        // checks, or the caller of an unsafe constructor.
        KvLayout::Nhd => unsafe { call::<AppendPagedKvCache, 10>(operands, stream) },
        // SAFETY: as above.
        KvLayout::Hnd => unsafe { call::<AppendPagedKvCacheHnd, 10>(operands, stream) },
    }
}

/// Copies the compressed keys and values of a step's tokens, and their keys' rotary part, to their places in a paged cache.
///
/// <!-- append_paged_mla_kv_cache -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `append_ckv` | `[tokens, ckv_dim]` | BF16 or F16 or F8E4M3 or F8E5M2 | read; rows anywhere, also repeated; aligned to 4 bytes |
/// | `append_kpe` | `[tokens, kpe_dim]` | as `append_ckv` | read; rows anywhere, also repeated; aligned to 4 bytes |
/// | `batch_indices` | `[tokens]` | I32 | read; contiguous; aligned to 4 bytes |
/// | `positions` | `[tokens]` | I32 | read; contiguous; aligned to 4 bytes |
/// | `ckv_cache` | `[pages, page_size, ckv_dim]` | as `append_ckv` | read and written; rows anywhere; aligned to 4 bytes |
/// | `kpe_cache` | `[pages, page_size, kpe_dim]` | as `append_ckv` | read and written; rows anywhere; aligned to 4 bytes |
/// | `kv_indices` | `[indices]` | I32 | read; contiguous; aligned to 4 bytes |
/// | `kv_indptr` | `[requests + 1]` | I32 | read; contiguous; aligned to 4 bytes |
/// | `kv_last_page_len` | `[requests]` | I32 | read; contiguous; aligned to 4 bytes |
///
/// # Errors
/// As for [`append_paged_kv_cache`]; the sizes are 512 and 64, as DeepSeek's models have them.
pub fn append_paged_mla_kv_cache(
    cache: &mut PagedMlaCache<'_>,
    append_ckv: &TensorRef<'_>,
    append_kpe: &TensorRef<'_>,
    tokens: &Placed<'_, Tokens>,
    stream: Stream<'_>,
) -> Result<()> {
    check_tokens("append_paged_mla_kv_cache", tokens, (cache.pages(), cache.page_size()))?;
    let (ckv, kpe) = cache.operands();
    let (batch_indices, positions) = (tokens.batch_indices(), tokens.token_positions());
    let (kv_indices, kv_indptr, last) = (tokens.kv_indices(), tokens.kv_indptr(), tokens.kv_last_page_len());
    let operands = [
        append_ckv.operand(),
        append_kpe.operand(),
        batch_indices.operand(),
        positions.operand(),
        ckv,
        kpe,
        kv_indices.operand(),
        kv_indptr.operand(),
        last.operand(),
    ];
    // SAFETY: as in `append_paged_kv_cache`.
    unsafe { call::<AppendPagedMlaKvCache, 9>(operands, stream) }
}
