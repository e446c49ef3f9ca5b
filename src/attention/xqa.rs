//! Decode by upstream's XQA kernels, which nothing is planned for: they read the lengths and a dense table of pages themselves.
//!
//! Contract: `csrc/flashinfer_xqa_binding.cu`, `csrc/xqa/xqa_wrapper.cu`, `csrc/xqa/mha.cu` and `flashinfer/xqa.py` of release
//! 0.6.3.

use crate::contract::Operand;
use crate::error::Result;
use crate::indices::{Placed, Steering, Words, refuse, sealed};
use crate::kernels::page::PagedKvCache;
use crate::stream::Stream;
use crate::tensor::{Device, TensorMut, TensorRef};
use crate::uri::{Types, Uri, Xqa};

use super::batch::Batch;
use super::rows::{self, XQA_RUN};
use super::run::{AttentionOptions, Place, Planned};
use super::spec::{AttentionSpec, Kind, element};

#[cfg(feature = "cudarc")]
mod gpu;

#[cfg(all(feature = "cudarc", feature = "compute"))]
pub(crate) use gpu::XqaKernel;
#[cfg(feature = "cudarc")]
pub use gpu::{CapturedXqa, GraphXqa};

/// The name that errors of a specification for XQA carry.
const XQA: &str = "XqaDecode";
/// The name that errors of a table carry.
const TABLE: &str = "DecodeTable";

/// The groups of query heads to a key head, and the tokens of a page, that upstream compiles XQA for.
const GROUPS: [i64; 4] = [1, 2, 4, 8];
const PAGE_SIZES: [i64; 4] = [16, 32, 64, 128];
/// The most requests: as far as a launch's grid reaches in its third dimension.
const MOST_REQUESTS: usize = 65_535;

/// The pages and the lengths of requests that decode, as XQA's kernels read them: a row of pages for each request, all rows of one
/// length, and a number of keys for each.
///
/// It is made of a [`Batch`], whose checks are the table's: every page is one of the cache, and every request has a key or more in
/// pages that are there. [`OnDevice`](crate::OnDevice) copies it to a GPU, where a graph's launches may be given another one.
///
/// ```
/// use flashinfer_rs::attention::{Batch, DecodeTable};
///
/// // Pages of 16 tokens, 100 of them.
/// let mut batch = Batch::paged(16, 100)?;
/// batch.push(1, &[7, 3], 20)?;
/// batch.push(1, &[9], 5)?;
/// // Rows of 4 pages: no request will have more than 64 keys. Room for 8 requests.
/// let table = DecodeTable::new(&batch, 4)?.with_room_for(8)?;
/// assert_eq!((table.requests(), table.longest()), (8, 64));
/// assert_eq!(table.lengths(), [20, 5, 1, 1, 1, 1, 1, 1]);
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DecodeTable {
    page_size: i64,
    pages: i64,
    per_request: usize,
    table: Vec<i32>,
    lengths: Vec<i32>,
}

/// What calls need to know of a [`DecodeTable`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeFacts {
    /// How many requests there are: one for each query.
    pub requests: i64,
    /// How many tokens a page of the cache holds.
    pub page_size: i64,
    /// How many pages the cache has.
    pub pages: i64,
    /// How many pages a row of the table has room for.
    pub pages_per_request: i64,
}

impl DecodeTable {
    /// The requests of a batch, in rows of `pages_per_request` pages each. Within a graph that is the most pages that a request
    /// may ever have. It also bounds among how many of the GPU's multiprocessors a context is divided, by 256 keys for each.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for a batch without pages, a request of other than one query, a
    /// request of more pages than a row has room for, more than 65,535 requests, and rows that 32 bits do not count.
    pub fn new(batch: &Batch, pages_per_request: usize) -> Result<Self> {
        let Some((page_size, pages)) = batch.cache() else {
            return refuse(TABLE, "batch", "one without pages".to_owned(), "one of pages: Batch::paged makes it");
        };
        if let Some(request) = batch.not_one_query() {
            let found = format!("{} of request {request}", batch.lengths(request).0);
            return refuse(TABLE, "queries", found, "1 of each request, as decode has them");
        }
        let most = i64::from(i32::MAX) / page_size;
        if pages_per_request == 0 || pages_per_request as i64 > most {
            let expected = format!("1 to {most}, whose tokens kernels can count");
            return refuse(TABLE, "pages_per_request", pages_per_request.to_string(), expected);
        }
        check_size(batch.requests(), pages_per_request)?;
        let mut table = Self {
            page_size,
            pages,
            per_request: pages_per_request,
            table: Vec::with_capacity(batch.requests() * pages_per_request),
            lengths: batch.kv_len.clone(),
        };
        for (request, ends) in batch.kv_indptr.windows(2).enumerate() {
            let own = &batch.kv_indices[ends[0] as usize..ends[1] as usize];
            if own.len() > pages_per_request {
                let found = format!("{} of request {request}", own.len());
                let expected = format!("at most {pages_per_request}, which a row of the table has room for");
                return refuse(TABLE, "pages", found, expected);
            }
            table.table.extend_from_slice(own);
            table.table.resize((request + 1) * pages_per_request, 0);
        }
        Ok(table)
    }

    /// With room for so many requests, so that a graph that is captured with it can be given that many later. Those that are
    /// missing have the first token of page 0 for their only key; what is computed for them means nothing.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for fewer requests than there are, more than 65,535, and rows that
    /// 32 bits do not count.
    pub fn with_room_for(mut self, requests: usize) -> Result<Self> {
        if requests < self.requests() {
            let expected = format!("{} or more, as the table has", self.requests());
            return refuse(TABLE, "requests", requests.to_string(), expected);
        }
        check_size(requests, self.per_request)?;
        self.fill_up(requests);
        Ok(self)
    }

    fn fill_up(&mut self, requests: usize) {
        self.table.resize(requests * self.per_request, 0);
        self.lengths.resize(requests, 1);
    }

    /// The number of requests, with those that fill it up.
    pub fn requests(&self) -> usize {
        self.lengths.len()
    }

    /// The most keys that a request can have: the tokens of the pages of a row.
    pub fn longest(&self) -> i64 {
        self.per_request as i64 * self.page_size
    }

    /// How many keys each request has.
    pub fn lengths(&self) -> &[i32] {
        &self.lengths
    }
}

fn check_size(requests: usize, per_request: usize) -> Result<()> {
    if requests > MOST_REQUESTS {
        return refuse(
            TABLE,
            "requests",
            requests.to_string(),
            format!("at most {MOST_REQUESTS}, as a launch has them"),
        );
    }
    let most = i32::MAX as usize / requests.max(1);
    if per_request > most {
        let found = format!("{per_request} for each of {requests} requests");
        let expected = format!("at most {most}, so that 32 bits count all of them");
        return refuse(TABLE, "pages_per_request", found, expected);
    }
    Ok(())
}

/// The arrays of a [`DecodeTable`], in their order.
const PAGES: usize = 0;
const LENGTHS: usize = 1;

impl sealed::Sealed for DecodeTable {}

impl Steering for DecodeTable {
    type Facts = DecodeFacts;

    fn facts(&self) -> DecodeFacts {
        DecodeFacts {
            requests: self.requests() as i64,
            page_size: self.page_size,
            pages: self.pages,
            pages_per_request: self.per_request as i64,
        }
    }

    fn arrays(&self) -> Vec<Words<'_>> {
        vec![Words::I32(&self.table), Words::I32(&self.lengths)]
    }

    fn in_place_of(&self, captured: &Self) -> Result<Self> {
        let same = |table: &Self| (table.page_size, table.pages, table.per_request);
        if same(self) != same(captured) || self.requests() > captured.requests() {
            let described = |table: &Self| {
                let Self { page_size, pages, per_request, .. } = table;
                format!(
                    "{} requests of up to {per_request} pages, of {pages} pages of {page_size} tokens",
                    table.requests()
                )
            };
            let expected = format!("{}, as captured, or fewer requests", described(captured));
            return refuse(TABLE, "table", described(self), expected);
        }
        let mut filled = self.clone();
        filled.fill_up(captured.requests());
        Ok(filled)
    }
}

impl Placed<'_, DecodeTable> {
    /// The table as a batch, of arrays that are on the host.
    fn to_batch(&self) -> Result<Batch> {
        let DecodeFacts { page_size, pages, pages_per_request, .. } = self.facts();
        let (table, lengths) = (self.array(PAGES), self.array(LENGTHS));
        // SAFETY: both are a DecodeTable's own arrays, which are borrowed, of I32, and on the host, as the caller has seen.
        let words = |array: &TensorRef<'_>| unsafe {
            let layout = array.layout();
            std::slice::from_raw_parts(layout.data().cast::<i32>(), layout.numel() as usize).to_vec()
        };
        let mut batch = Batch::paged(page_size, pages)?;
        let (table, lengths) = (words(&table), words(&lengths));
        for (row, keys) in table.chunks_exact(pages_per_request as usize).zip(lengths) {
            let keys = i64::from(keys);
            batch.push(1, &row[..((keys + page_size - 1) / page_size) as usize], keys)?;
        }
        Ok(batch)
    }
}

/// Decode without a plan: one query for each request over a paged cache, by upstream's XQA kernels. They read lengths and pages from
/// a [`DecodeTable`] in the GPU's memory, so that one captured graph serves every length, and nothing is computed on the host
/// between two steps.
///
/// Its specification is one of [`AttentionSpec::decode`], of which XQA computes those with 1, 2, 4 or 8 query heads to a key head,
/// pages of 16, 32, 64 or 128 tokens, and keys of the queries' type; with a window or without; without soft cap and sinks.
/// [`GraphXqa`] is the same for a [`LaunchGraph`](crate::LaunchGraph).
///
/// ```
/// use flashinfer_rs::attention::{AttentionOptions, AttentionSpec, Batch, DecodeTable, XqaDecode};
/// use flashinfer_rs::kernels::page::{KvLayout, PagedKvCache};
/// use flashinfer_rs::{DType, FlashInferRuntime, Placed, RuntimeConfig, TensorMut, TensorRef};
/// use half::bf16;
///
/// FlashInferRuntime::initialize(RuntimeConfig::default())?;
/// let spec = AttentionSpec::decode(DType::BF16, (4, 2), 64, 16).build()?;
/// // On the host; XqaDecode::new is for a GPU's stream.
/// let decode = XqaDecode::on_host(spec)?;
/// let mut batch = Batch::paged(16, 8)?;
/// batch.push(1, &[2, 7], 20)?;
/// let table = DecodeTable::new(&batch, 4)?;
///
/// let q = vec![bf16::ONE; 4 * 64];
/// let mut o = vec![bf16::ZERO; 4 * 64];
/// let (mut k, mut v) = (vec![bf16::ONE; 8 * 16 * 2 * 64], vec![bf16::ONE; 8 * 16 * 2 * 64]);
/// let shape = [8, 16, 2, 64];
/// let (k, v) = (TensorMut::from_slice(&mut k, &shape)?, TensorMut::from_slice(&mut v, &shape)?);
/// let cache = PagedKvCache::new(k, v, KvLayout::Nhd)?;
/// let mut results = TensorMut::from_slice(&mut o, &[1, 4, 64])?;
/// let (q, table) = (TensorRef::from_slice(&q, &[1, 4, 64])?, Placed::on_host(&table)?);
/// decode.run(&mut results, &q, &cache, &table, &AttentionOptions::default())?;
/// assert!(o.iter().all(|x| *x == bf16::ONE));
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
#[derive(Debug)]
pub struct XqaDecode {
    spec: AttentionSpec,
    memory: Memory,
}

#[derive(Debug)]
enum Memory {
    Host,
    #[cfg(feature = "cudarc")]
    Gpu(Box<gpu::OnStream>),
}

impl XqaDecode {
    /// For tensors on the host, which the [reference](mod@crate::reference) computes with, in f64.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for a specification that XQA has no kernel for, with the reason.
    pub fn on_host(spec: AttentionSpec) -> Result<Self> {
        check_spec(&spec)?;
        Ok(Self { spec, memory: Memory::Host })
    }

    /// For kernels on `stream`, and batches of any size. Its scratch memory, which kernels of two streams must not share, depends on
    /// the GPU and the sizes of heads alone. The module is loaded for the stream's GPU and no other: another GPU has its own.
    ///
    /// # Errors
    /// As for [`on_host`](Self::on_host); [`ArtifactMissing`](crate::FlashInferError::ArtifactMissing) with the name of the module,
    /// where it was not vendored; [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for F32, for a GPU whose compute
    /// capability is not 9.0 or 10.x, for the per-thread stream, and for a stream that captures;
    /// [`Cuda`](crate::FlashInferError::Cuda) where there is no memory; or why there is no GPU.
    #[cfg(feature = "cudarc")]
    pub fn new(spec: AttentionSpec, stream: &std::sync::Arc<cudarc::driver::CudaStream>) -> Result<Self> {
        check_spec(&spec)?;
        let memory = gpu::OnStream::new(&spec, stream)?;
        Ok(Self { spec, memory: Memory::Gpu(Box::new(memory)) })
    }

    /// The name of XQA's module for a specification: the name of its library without the ending `.so`. Of a specification for the
    /// host alone (F32) it is BF16's.
    ///
    /// # Errors
    /// As for [`on_host`](Self::on_host).
    pub fn module_of(spec: &AttentionSpec) -> Result<String> {
        check_spec(spec)?;
        let (page_size, head_dim) = (spec.page_size() as u32, spec.head_dims().0 as u32);
        let (group, window) = (spec.group() as u32, spec.window().is_some());
        let types = Types::all(element(spec.dtype()));
        Ok(Uri::Xqa(Xqa { types, page_size, head_dim, group, window }).to_string())
    }

    /// The specification that it is for.
    pub fn spec(&self) -> &AttentionSpec {
        &self.spec
    }

    /// Attention of one query for each request of the table. Asynchronous on the stream that this was made for.
    ///
    /// | tensor | shape | dtype | |
    /// |---|---|---|---|
    /// | `o` | `[requests, q_heads, head_dim]` | the specification's | written; contiguous |
    /// | `q` | `[requests, q_heads, head_dim]` | the specification's | read; contiguous |
    /// | `cache` | the table's number of pages or more | the specification's | read |
    ///
    /// All are aligned to 16 bytes. A cache that is not contiguous has strides that are multiples of the head's size, and reaches at
    /// most 2³² heads. Of the options XQA has the scale of the keys.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for tensors and tables that are not of the specification: of
    /// another shape, type, layout, device or stream; [`TvmFfiCall`](crate::FlashInferError::TvmFfiCall) with what the launcher raised;
    /// [`ContextLost`](crate::FlashInferError::ContextLost).
    pub fn run(
        &self,
        o: &mut TensorMut<'_>,
        q: &TensorRef<'_>,
        cache: &PagedKvCache<'_>,
        table: &Placed<'_, DecodeTable>,
        options: &AttentionOptions<'_>,
    ) -> Result<()> {
        match &self.memory {
            Memory::Host => on_host(&self.spec, o, q, cache, table, options),
            #[cfg(feature = "cudarc")]
            Memory::Gpu(memory) => memory.run(&self.spec, o, q, cache, table, options, memory.stream()),
        }
    }
}

/// That XQA computes what is specified.
fn check_spec(spec: &AttentionSpec) -> Result<()> {
    let wrong = |argument, found: String, expected: &str| refuse(XQA, argument, found, expected);
    let (group, page_size) = (spec.group(), spec.page_size());
    match spec {
        _ if spec.kind() != Kind::Decode => wrong(
            "spec",
            format!("{:?}", spec.kind()),
            "AttentionSpec::decode: XQA computes one query for each request, over pages",
        ),
        _ if spec.asked_backend().is_some() => wrong(
            "backend",
            format!("{:?}", spec.asked_backend()),
            "none asked for: XQA is one of its own, and a Workspace has the others",
        ),
        _ if spec.kv_dtype() != spec.dtype() => wrong(
            "kv_dtype",
            format!("{} under {}", spec.kv_dtype(), spec.dtype()),
            "the queries' type: for 8 bits XQA has another kernel, which is not offered; a Workspace has it",
        ),
        _ if !GROUPS.contains(&group) => wrong(
            "q_heads",
            format!("{group} to a key head"),
            "1, 2, 4 or 8 to a key head, for which XQA is compiled; a Workspace takes any",
        ),
        _ if !PAGE_SIZES.contains(&page_size) => wrong(
            "page_size",
            page_size.to_string(),
            "16, 32, 64 or 128 tokens, for which XQA is compiled; a Workspace takes any",
        ),
        _ if spec.soft_cap().is_some() => {
            wrong("soft_cap", format!("{:?}", spec.soft_cap()), "none: XQA has no soft cap")
        }
        _ if spec.has_sinks() => wrong("sinks", "asked for".to_owned(), "none: a Workspace has them"),
        _ if spec.pdl() == Some(true) => wrong(
            "pdl",
            "on".to_owned(),
            "off: launched so, XQA lets the kernel behind it start before the one ahead has ended, which only kernels stand that \
             touch nothing before they wait",
        ),
        _ => Ok(()),
    }
}

/// What XQA has not, of the options and the cache.
fn check_call(spec: &AttentionSpec, cache: &PagedKvCache<'_>, facts: DecodeFacts, sink: bool) -> Result<()> {
    if sink {
        return refuse(XQA_RUN, "sink", "a tensor".to_owned(), "none: the specification has no sinks");
    }
    if cache.layout() != spec.layout() {
        let (found, expected) = (format!("{:?}", cache.layout()), format!("{:?}", spec.layout()));
        return refuse(XQA_RUN, "layout", found, format!("{expected}, as the specification says"));
    }
    if facts.page_size != spec.page_size() {
        let expected = format!("{}, as the specification says", spec.page_size());
        return refuse(XQA_RUN, "page_size of the table", facts.page_size.to_string(), expected);
    }
    Ok(())
}

/// The tensors of a call as the rows have them, beside the table's own.
fn planned<'a>(spec: &'a AttentionSpec, facts: DecodeFacts, stream: Stream<'a>, place: Place<'a>) -> Planned<'a> {
    Planned { spec, rows: facts.requests, pages: facts.pages, stream, place, known: None }
}

fn on_host(
    spec: &AttentionSpec,
    o: &mut TensorMut<'_>,
    q: &TensorRef<'_>,
    cache: &PagedKvCache<'_>,
    table: &Placed<'_, DecodeTable>,
    options: &AttentionOptions<'_>,
) -> Result<()> {
    let facts = table.facts();
    check_call(spec, cache, facts, options.sink.is_some())?;
    if table.device() != Device::Cpu {
        let found = format!("on {}", table.device());
        return refuse(XQA_RUN, "table", found, "Placed::on_host, for tensors on the host");
    }
    let (pages, lengths) =
        (table.array_in(PAGES, &[facts.requests, facts.pages_per_request]), table.array_in(LENGTHS, &[facts.requests]));
    let (k, v) = cache.operands();
    let operands = [q.operand(), k, v, o.operand(), pages.operand(), lengths.operand()];
    let batch = table.to_batch()?;
    let planned = planned(spec, facts, Stream::NULL, Place::Host(&batch));
    check_tensors(&planned, &operands)?;
    planned.paged(o, None, q, cache, options)
}

/// Checks the tensors, where they are, and what XQA divides strides by; whether there is anything to compute.
fn check_tensors(planned: &Planned<'_>, operands: &[Operand<'_, '_>; 6]) -> Result<bool> {
    let row = rows::xqa(planned.spec.layout());
    let checked = rows::checked(row, operands, planned.stream, &planned.expected(), true)?;
    if checked.device != planned.device() {
        let expected = format!("memory of {}, which this was made for", planned.device());
        return refuse(XQA_RUN, row.arguments[rows::Q].name, format!("on {}", checked.device), expected);
    }
    let size = planned.spec.head_dims().0;
    let Some(k) = operands[rows::K].layout() else { unreachable!("the row has it") };
    let strides = k.strides().iter().zip(k.shape()).take(3);
    if let Some((stride, _)) = strides.clone().find(|(stride, count)| **count > 1 && **stride % size != 0) {
        let expected = format!("strides that are multiples of {size}, the head's size: XQA counts in heads");
        return refuse(XQA_RUN, row.arguments[rows::K].name, format!("a stride of {stride}"), expected);
    }
    // Page times stride, in heads, is 32 bits wide.
    rows::check_reach(row, operands, true, i64::from(u32::MAX) * size)?;
    Ok(!checked.empty)
}
