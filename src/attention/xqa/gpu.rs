//! XQA's scratch memory on a GPU, and its launcher's call.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream};

use crate::buffers::{check_context, device, refuse_per_thread};
use crate::contract::{Operand, RunsOn};
use crate::engine::ordered_like;
use crate::error::{FlashInferError, Result, driver};
use crate::graph::{Launched, Leaf, Site};
use crate::indices::{Placed, refuse};
use crate::kernels::page::{KvLayout, PagedKvCache};
use crate::module::Function;
use crate::object::Arg;
use crate::owner::{CurrentContext, refuse_capture};
use crate::runtime::FlashInferRuntime;
use crate::stream::Stream;
use crate::tensor::{DType, Device, Layout, TensorMut, TensorRef};

use super::super::gpu::buffer_address;
use super::super::rows::{self, K, Q, RESULT, V, XQA_RUN};
use super::super::run::{AttentionOptions, Numbers, Place};
use super::super::spec::AttentionSpec;
use super::{
    DecodeFacts, DecodeTable, LENGTHS, PAGES, XQA, XqaDecode, check_call, check_size, check_spec, check_tensors,
    planned,
};

/// XQA's launcher for a specification on a GPU.
#[derive(Debug)]
pub(crate) struct XqaKernel {
    spec: AttentionSpec,
    device: Device,
    multiprocessors: i64,
    run: Function,
}

/// What XQA needs of a GPU beside the tensors of a call.
#[derive(Debug)]
pub(super) struct OnStream {
    stream: Arc<CudaStream>,
    kernel: XqaKernel,
    /// A counter for each request and key head. A launch starts with zeros and leaves zeros.
    semaphores: CudaSlice<i32>,
    /// Partial results of contexts that are divided.
    scratch: CudaSlice<u8>,
    addresses: [Layout; 2],
}

// SAFETY: the layouts are addresses of the GPU's, which every thread may hand to kernels; the rest is of types that are Send.
unsafe impl Send for OnStream {}
// SAFETY: as above; nothing here is changed by a call.
unsafe impl Sync for OnStream {}

/// How many counters, and bytes of partial results, a launch uses at most. It divides contexts into so many parts that those of all
/// requests and key heads together are no more than the multiprocessors, and where that is one part it uses neither. Each part has
/// the largest logit and the sum of weights of each row, of which 32 are kept, and a result of 16 bits for each query head; upstream
/// starts the results at a multiple of a part's.
fn scratch_sizes(spec: &AttentionSpec, multiprocessors: i64) -> (usize, usize) {
    const ROWS: i64 = 2 * 32 * 4;
    let results = spec.group() * spec.head_dims().0 * 2;
    let bytes = multiprocessors * (ROWS + results) + results;
    (multiprocessors.max(1) as usize, bytes.max(16) as usize)
}

/// As [`scratch_sizes`], the bytes of a launch for so many requests.
fn scratch_bytes(spec: &AttentionSpec, multiprocessors: i64, requests: u64) -> u64 {
    let sequences = requests.saturating_mul(spec.heads().1 as u64).max(1);
    let parts = multiprocessors.max(1) as u64 / sequences;
    if parts <= 1 {
        return 0;
    }
    let result = (spec.group() * spec.head_dims().0 * 2) as u64;
    parts * sequences * (2 * 32 * 4 + result) + result
}

impl XqaKernel {
    /// Of a specification, on a GPU that is there.
    pub(crate) fn new(spec: &AttentionSpec, on: Device) -> Result<Self> {
        check_spec(spec)?;
        let runtime = FlashInferRuntime::global()?;
        let id = runtime.checked_device(on)?;
        if spec.dtype() == DType::F32 {
            let expected = "F16 or BF16 on a GPU; F32 is computed on the host alone";
            return refuse(XQA, "dtype", "F32".to_owned(), expected);
        }
        let capability = runtime.compute_capability(id)?;
        // On 12.x release 0.6.3 takes values from other pages.
        if !RunsOn::Exactly(9, 0).includes(capability) && capability.0 != 10 {
            let found = format!("a GPU of compute capability {}.{}", capability.0, capability.1);
            return refuse(XQA, "stream", found, "compute capability 9.0 or 10.x, or a Workspace");
        }
        let Device::Cuda(number) = on else { unreachable!("a stream is of a GPU") };
        let Some(limits) = runtime.limits(number) else {
            return Err(FlashInferError::DeviceOutOfRange { device: id.into(), count: runtime.device_count()? });
        };
        let module = runtime.module_on(&format!("{}.so", XqaDecode::module_of(spec)?), on)?;
        let run = module.function("xqa_wrapper")?;
        Ok(Self { spec: *spec, device: on, multiprocessors: limits.multiprocessors, run })
    }

    /// How many counters a launch uses at most.
    #[cfg_attr(not(feature = "compute"), allow(dead_code, reason = "compute graphs have their own memory for it"))]
    pub(crate) fn counters(&self) -> usize {
        scratch_sizes(&self.spec, self.multiprocessors).0
    }

    /// The bytes of scratch memory that a launch for so many requests uses at most.
    #[cfg_attr(not(feature = "compute"), allow(dead_code, reason = "compute graphs plan their own scratch memory"))]
    pub(crate) fn scratch_bytes(&self, requests: u64) -> u64 {
        scratch_bytes(&self.spec, self.multiprocessors, requests)
    }

    /// That a launch can have so many requests with so many pages each.
    #[cfg_attr(not(feature = "compute"), allow(dead_code, reason = "a table has checked its own"))]
    pub(crate) fn check_size(&self, requests: u64, pages_per_request: u64) -> Result<()> {
        let size = |size: u64| usize::try_from(size).unwrap_or(usize::MAX);
        check_size(size(requests), size(pages_per_request))
    }

    /// Checks a call's tensors, in the order of the row: queries, keys, values, the result, pages and lengths; whether there is
    /// anything to compute.
    pub(crate) fn check(
        &self,
        operands: &[Operand<'_, '_>; 6],
        facts: DecodeFacts,
        stream: Stream<'_>,
    ) -> Result<bool> {
        check_tensors(&planned(&self.spec, facts, stream, Place::Xqa(self.device)), operands)
    }

    /// Queues a call whose tensors were checked, with these scales.
    ///
    /// # Safety
    /// The tensors must be valid until the kernel has run; the table's pages must be of the cache, and each length 1 or more and
    /// within its row's pages, when it runs. The counters and the scratch memory must be as many as [`counters`](Self::counters)
    /// and [`scratch_bytes`](Self::scratch_bytes) say, the counters zeros but for what launches left in them, and nothing else may
    /// use either meanwhile.
    pub(crate) unsafe fn call(
        &self,
        operands: &[Operand<'_, '_>; 6],
        facts: DecodeFacts,
        options: &AttentionOptions<'_>,
        [semaphores, scratch]: &[Layout; 2],
        stream: Stream<'_>,
    ) -> Result<()> {
        let spec = &self.spec;
        let planned = planned(spec, facts, stream, Place::Xqa(self.device));
        let Numbers { sm_scale, .. } = planned.numbers(options)?;
        let runtime = FlashInferRuntime::global()?;
        if runtime.usable(self.device).is_none() {
            runtime.checked_device(self.device)?;
        }
        let tensor = |at: usize| match operands[at].layout() {
            Some(layout) => *layout,
            None => unreachable!("the row has it"),
        };
        // What is packed points to the layout's sizes, which stay until the call was made.
        let whole = [rows::XQA_PAGES, rows::XQA_LENGTHS, Q, RESULT].map(tensor);
        let [pages, lengths, q, o] = whole.each_ref().map(Layout::pack);
        let caches = [K, V].map(|at| by_tokens(&tensor(at), spec.layout()));
        let [k, v] = caches.each_ref().map(Layout::pack);
        let [semaphores, scratch] = [semaphores.pack(), scratch.pack()];
        let size = spec.head_dims().0;
        let args = [
            // Not Hopper's kernel for keys of 8 bits.
            Arg::bool(false),
            Arg::int(self.multiprocessors),
            Arg::int(spec.heads().1),
            // Upstream counts the query's own key.
            Arg::int(spec.window().map_or(0, |window| window + 1)),
            // Upstream divides by the root of the head's size.
            Arg::float(sm_scale * (size as f64).sqrt()),
            Arg::NONE,
            Arg::dl_tensor(&o),
            Arg::float(1.0),
            Arg::dl_tensor(&q),
            Arg::NONE,
            Arg::dl_tensor(&k),
            Arg::dl_tensor(&v),
            Arg::dl_tensor(&pages),
            Arg::int(facts.pages_per_request * facts.page_size),
            Arg::dl_tensor(&lengths),
            Arg::int(facts.requests),
            Arg::float(1.0),
            Arg::NONE,
            Arg::int(1),
            Arg::NONE,
            Arg::dl_tensor(&semaphores),
            Arg::dl_tensor(&scratch),
            // Never: it lets what is behind it start before what is ahead of it has ended, and the attribute is a static
            // variable of the library, which two threads would write different values to.
            Arg::bool(false),
        ];
        let row = rows::xqa(spec.layout());
        // SAFETY: the tensors were checked against the row and the specification, which names the module; the rest is the
        // caller's promise.
        ordered_like(row, operands, || unsafe {
            rows::xqa_entry().call_function(&self.run, &args, self.device, stream)
        })
    }
}

impl OnStream {
    /// Of a specification that was checked.
    pub(super) fn new(spec: &AttentionSpec, stream: &Arc<CudaStream>) -> Result<Self> {
        refuse_per_thread(XQA, stream)?;
        check_context(XQA, "stream", stream.context(), stream.context())?;
        refuse_capture(XQA, stream)?;
        let on = device(stream.context());
        let kernel = XqaKernel::new(spec, on)?;
        let (counters, bytes) = scratch_sizes(spec, kernel.multiprocessors);
        let _current = CurrentContext::bind(stream.context())?;
        let allocated = driver("allocating XQA's scratch memory");
        let mut semaphores = stream.alloc_zeros(counters).map_err(&allocated)?;
        let mut scratch = stream.alloc_zeros(bytes).map_err(&allocated)?;
        let addresses = [
            Layout::build(buffer_address(&mut semaphores), on, DType::I32, &[counters as i64], None, None),
            Layout::build(buffer_address(&mut scratch), on, DType::U8, &[bytes as i64], None, None),
        ];
        Ok(Self { stream: Arc::clone(stream), kernel, semaphores, scratch, addresses })
    }

    pub(super) fn stream(&self) -> Stream<'_> {
        Stream::cudarc(&self.stream)
    }

    #[allow(clippy::too_many_arguments, reason = "a call's tensors, its table and its stream")]
    pub(super) fn run(
        &self,
        spec: &AttentionSpec,
        o: &mut TensorMut<'_>,
        q: &TensorRef<'_>,
        cache: &PagedKvCache<'_>,
        table: &Placed<'_, DecodeTable>,
        options: &AttentionOptions<'_>,
        stream: Stream<'_>,
    ) -> Result<()> {
        let facts = table.facts();
        check_call(spec, cache, facts, options.sink.is_some())?;
        let pages = table.array_in(PAGES, &[facts.requests, facts.pages_per_request]);
        let lengths = table.array_in(LENGTHS, &[facts.requests]);
        let (k, v) = cache.operands();
        let operands = [q.operand(), k, v, o.operand(), pages.operand(), lengths.operand()];
        if !self.kernel.check(&operands, facts, stream)? {
            return Ok(());
        }
        // SAFETY: whoever made the tensors vouched for their memory; the table's pages are those of a cache with as many and its
        // lengths fit its rows, by DecodeTable's checks; the scratch memory is as large as the kernel says and was zeros, and
        // nothing else uses it: its launches follow one another on one stream, or in one graph.
        unsafe { self.kernel.call(&operands, facts, options, &self.addresses, stream) }
    }
}

/// A cache as XQA counts its strides: pages, tokens, heads.
fn by_tokens(cache: &Layout, layout: KvLayout) -> Layout {
    if layout == KvLayout::Nhd {
        return *cache;
    }
    let turned = |sizes: &[i64]| [sizes[0], sizes[2], sizes[1], sizes[3]];
    let (shape, strides) = (turned(cache.shape()), turned(cache.strides()));
    Layout::build(cache.data(), cache.device(), cache.dtype(), &shape, Some(&strides), None)
}

/// [`XqaDecode`] as one of a [`LaunchGraph`](crate::LaunchGraph)'s buffers: captured calls run it. Lengths and pages are replaced
/// between launches in the graph's [`OnDevice`](crate::OnDevice) of a [`DecodeTable`]; nothing is captured anew, whatever the lengths.
///
/// ```no_run
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use flashinfer_rs::attention::{AttentionOptions, AttentionSpec, Batch, DecodeTable, GraphXqa};
/// # use flashinfer_rs::cudarc::driver::CudaContext;
/// # use flashinfer_rs::kernels::page::{KvLayout, PagedKvCache};
/// # use flashinfer_rs::{DType, FlashInferRuntime, LaunchGraph, OnDevice, RuntimeConfig};
/// # use half::bf16;
/// # FlashInferRuntime::initialize(RuntimeConfig::default())?;
/// let stream = CudaContext::new(0)?.new_stream()?;
/// let spec = AttentionSpec::decode(DType::BF16, (8, 2), 128, 16).build()?;
/// // Up to 4 requests, each of up to 32 pages, which is 512 keys.
/// let mut batch = Batch::paged(16, 100)?;
/// batch.push(1, &[7, 3], 20)?;
/// let table = DecodeTable::new(&batch, 32)?.with_room_for(4)?;
/// let zeros = |count| stream.alloc_zeros::<bf16>(count);
/// let (q, o) = (zeros(4 * 8 * 128)?, zeros(4 * 8 * 128)?);
/// let (k, v) = (zeros(100 * 16 * 256)?, zeros(100 * 16 * 256)?);
/// let buffers = (GraphXqa::new(spec, &stream)?, OnDevice::new(table, &stream)?, (q, o), (k, v));
/// let mut graph = LaunchGraph::new(&stream, buffers)?;
/// graph.capture(|s, (xqa, table, (q, mut o), (mut k, mut v))| {
///     let shape = [100, 16, 2, 128];
///     let cache = PagedKvCache::new(k.write(&shape)?, v.write(&shape)?, KvLayout::Nhd)?;
///     let (q, mut o) = (q.read(&[4, 8, 128])?, o.write(&[4, 8, 128])?);
///     xqa.run(&mut o, &q, &cache, &table.placed()?, &AttentionOptions::default(), s)
/// })?;
/// graph.launch()?;
/// // The next step: the request has a key more, and there is another one.
/// batch.clear();
/// batch.push(1, &[7, 3], 21)?;
/// batch.push(1, &[12], 1)?;
/// graph.buffers()?.1.replace(&DecodeTable::new(&batch, 32)?, &stream)?;
/// graph.launch()?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct GraphXqa {
    spec: AttentionSpec,
    memory: OnStream,
}

impl GraphXqa {
    /// For graphs on the GPU of `stream`, which the scratch memory is zeroed on.
    ///
    /// # Errors
    /// As for [`XqaDecode::new`].
    pub fn new(spec: AttentionSpec, stream: &Arc<CudaStream>) -> Result<Self> {
        check_spec(&spec)?;
        Ok(Self { spec, memory: OnStream::new(&spec, stream)? })
    }

    /// The specification that it is for.
    pub fn spec(&self) -> &AttentionSpec {
        &self.spec
    }
}

/// A [`GraphXqa`] in a capture.
#[derive(Debug)]
pub struct CapturedXqa<'a> {
    decode: &'a GraphXqa,
    site: Site,
}

impl CapturedXqa<'_> {
    /// [`XqaDecode::run`], captured on the stream of the capture. Any number of times, as for each layer. Where a table has fewer
    /// requests than the captured one, the rows of those that are missing mean nothing.
    ///
    /// # Errors
    /// As there.
    pub fn run(
        &self,
        o: &mut TensorMut<'_>,
        q: &TensorRef<'_>,
        cache: &PagedKvCache<'_>,
        table: &Placed<'_, DecodeTable>,
        options: &AttentionOptions<'_>,
        stream: Stream<'_>,
    ) -> Result<()> {
        self.site.check(XQA_RUN, stream)?;
        let GraphXqa { spec, memory } = self.decode;
        memory.run(spec, o, q, cache, table, options, stream)
    }
}

impl Leaf for GraphXqa {
    type Captured<'a> = CapturedXqa<'a>;
    type Views<'a> = &'a GraphXqa;

    fn check(&self, context: &Arc<CudaContext>) -> Result<()> {
        self.memory.semaphores.check(context)?;
        self.memory.scratch.check(context)
    }

    fn captured<'a>(&'a mut self, site: Site) -> CapturedXqa<'a> {
        CapturedXqa { decode: self, site }
    }

    fn views(&mut self) -> &GraphXqa {
        self
    }

    fn take_over(&mut self, stream: &CudaStream) {
        self.memory.semaphores.take_over(stream);
        self.memory.scratch.take_over(stream);
    }

    fn hand_back(&mut self, launched: &Launched<'_>) -> Result<()> {
        self.memory.semaphores.hand_back(launched)?;
        self.memory.scratch.hand_back(launched)
    }
}

crate::graph::graph_leaf!(GraphXqa);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_memory_holds_what_every_grid_writes() {
        for (heads, size) in [((8, 8), 64), ((8, 4), 128), ((8, 2), 128), ((64, 8), 256)] {
            let spec = AttentionSpec::decode(DType::BF16, heads, size, 16).build().unwrap();
            for multiprocessors in [1i64, 2, 78, 114, 132, 148] {
                let (counters, bytes) = scratch_sizes(&spec, multiprocessors);
                for requests in 1..=300i64 {
                    let sequences = requests * spec.heads().1;
                    // Upstream's grid, for the longest of tables.
                    let parts = (multiprocessors / sequences).max(1);
                    if parts == 1 {
                        continue;
                    }
                    // Its segments, each at a multiple of its elements' size: logits and sums of rows rounded up to 32, and
                    // results.
                    let all = parts * sequences;
                    let result = spec.group() * size * 2;
                    let start = (2 * all * 128 + result - 1) / result * result;
                    assert!(start + all * result <= bytes as i64, "{requests} requests of {multiprocessors}");
                    let own = scratch_bytes(&spec, multiprocessors, requests as u64);
                    assert!(start + all * result <= own as i64, "{requests} requests of {multiprocessors}");
                    assert!(sequences <= counters as i64, "{requests} requests of {multiprocessors}");
                }
            }
        }
    }
}
