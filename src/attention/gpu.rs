//! The scratch memory on a GPU, the planner's call, and the launchers' calls.
//!
//! The planner fills lists in page-locked memory and queues a copy of them to the GPU, without waiting for it: were that memory
//! written again before the copy is made, kernels would find other lists. So there are several slots of it, each with an event
//! behind its copies, which is waited for before the slot is used again.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::slice;
use std::sync::Arc;

use cudarc::driver::result as cuda;
use cudarc::driver::{CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtrMut};

use crate::buffers::{check_context, device, refuse_per_thread};
use crate::contract::{Operand, Row, RunsOn};
use crate::engine::ordered_like;
use crate::error::{FlashInferError, Result, driver, driver_in};
use crate::indices::refuse;
use crate::module::Function;
use crate::object::{Any, Arg, Array, Object};
use crate::owner::{CurrentContext, event_of, record, refuse_capture};
use crate::runtime::FlashInferRuntime;
use crate::stream::Stream;
use crate::tensor::{DType, Device, Layout};

use super::batch::Batch;
use super::rows::{self, K, Q, RESULT, V};
use super::run::Numbers;
use super::sizes::{Gpu, Largest, check_largest, sizes};
use super::spec::{AttentionSpec, Backend, Kind, MLA_DIMS};

/// The name that errors of a workspace carry.
const WORKSPACE: &str = "Workspace";

/// How many plans may be on their way to the GPU before the host waits.
const SLOTS: usize = 4;

/// Page-locked memory of the host, zeroed when it is made.
#[derive(Debug)]
struct Pinned {
    data: NonNull<u8>,
    bytes: usize,
    context: Arc<CudaContext>,
}

// SAFETY: memory of the host that this alone refers to.
unsafe impl Send for Pinned {}
// SAFETY: it is written through `&mut` alone.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// With the context current.
    fn new(context: &Arc<CudaContext>, bytes: usize) -> Result<Self> {
        let bytes = bytes.max(64);
        // SAFETY: no flags; the memory is written before anything reads it.
        let data =
            unsafe { cuda::malloc_host(bytes, 0) }.map_err(driver_in(context, "allocating page-locked memory"))?;
        let Some(data) = NonNull::new(data.cast::<u8>()) else {
            return Err(FlashInferError::Cuda { call: "cuMemHostAlloc", code: 2, message: "no memory".to_owned() });
        };
        // SAFETY: so many bytes were allocated. Zeros, since upstream may read behind what it wrote in an earlier plan.
        unsafe { data.write_bytes(0, bytes) };
        Ok(Self { data, bytes, context: Arc::clone(context) })
    }

    /// As numbers; only while no copy of them is on its way.
    fn words(&mut self) -> &mut [i32] {
        // SAFETY: so many bytes, aligned to a page, all of them written, and borrowed mutably.
        unsafe { slice::from_raw_parts_mut(self.data.as_ptr().cast(), self.bytes / 4) }
    }

    /// As a tensor of bytes.
    fn layout(&self) -> Layout {
        Layout::build(self.data.as_ptr().cast(), Device::Cpu, DType::U8, &[self.bytes as i64], None, None)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _current = CurrentContext::bind(&self.context);
        // SAFETY: allocated by `new`, and given up here, once; whoever drops it waited for its copies.
        self.context.record_err(unsafe { cuda::free_host(self.data.as_ptr().cast()) });
    }
}

/// What one plan is copied from.
#[derive(Debug)]
struct Slot {
    lists: Pinned,
    tables: Pinned,
    /// Behind the copies of both.
    copied: CudaEvent,
    on_its_way: bool,
}

impl Slot {
    /// Waits for the copies of an earlier plan.
    fn wait(&mut self) -> Result<()> {
        if self.on_its_way {
            // SAFETY: the event is live.
            let waited = unsafe { cuda::event::synchronize(self.copied.cu_event()) };
            waited.map_err(driver_in(self.lists.context.as_ref(), "waiting for an earlier plan's copy"))?;
            self.on_its_way = false;
        }
        Ok(())
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // In a context that is lost nothing is copied any more.
        self.wait().ok();
    }
}

/// A workspace's part on a GPU.
#[derive(Debug)]
pub(super) struct OnStream {
    stream: Arc<CudaStream>,
    device: Device,
    backend: Backend,
    gpu: Gpu,
    pdl: Option<bool>,
    plan: Function,
    /// For kinds with pages, and for keys that lie one after the other.
    run: Function,
    kind: Kind,
    /// Partial results, and the planner's lists.
    float: CudaSlice<u8>,
    int: CudaSlice<u8>,
    /// The batch's tables.
    tables: CudaSlice<i32>,
    slots: Vec<Slot>,
    next: usize,
    /// Where those are.
    tables_at: u64,
    /// What kernels are given of it.
    addresses: Addresses,
    graph: bool,
}

/// Where the parts of a workspace and the tables of a batch are on the GPU.
#[derive(Debug, Clone, Copy)]
pub(super) struct Addresses {
    float: Layout,
    int: Layout,
    qo_indptr: Layout,
    kv_indptr: Layout,
    last_page_len: Layout,
    kv_indices: Layout,
}

// SAFETY: they are addresses of the GPU's, which every thread may hand to kernels.
unsafe impl Send for Addresses {}
// SAFETY: as above.
unsafe impl Sync for Addresses {}

/// What a plan came to: what upstream answered, and where the tables are.
#[derive(Debug)]
pub(super) struct Lists {
    info: Object,
    addresses: Addresses,
}

impl Lists {
    pub(super) fn integers(&self) -> Vec<i64> {
        let array = Any::from(self.info.clone()).to::<Array>();
        array.map(|array| integers(&array)).unwrap_or_default()
    }
}

pub(super) fn integers(array: &Array) -> Vec<i64> {
    array.iter().map(|any| any.to::<i64>().unwrap_or(i64::MIN)).collect()
}

/// How long the tables of a batch are, in numbers: each starts at a multiple of four, so that kernels may read several at once.
fn tables_len(requests: usize, indices: usize) -> usize {
    2 * (requests + 1).next_multiple_of(4) + requests.next_multiple_of(4) + indices.max(1).next_multiple_of(4)
}

pub(super) fn buffer_address<T>(buffer: &mut CudaSlice<T>) -> *mut c_void {
    let stream = Arc::clone(buffer.stream());
    let (address, guard) = buffer.device_ptr_mut(&stream);
    // Every use of it is on its own stream.
    event_of(guard);
    address as *mut c_void
}

impl Addresses {
    fn new(on: Device, float: &mut CudaSlice<u8>, int: &mut CudaSlice<u8>) -> Self {
        let bytes = |buffer: &mut CudaSlice<u8>| {
            let len = buffer.len() as i64;
            Layout::build(buffer_address(buffer), on, DType::U8, &[len], None, None)
        };
        let nothing = Layout::build(std::ptr::null_mut(), on, DType::I32, &[0], None, None);
        Self {
            float: bytes(float),
            int: bytes(int),
            qo_indptr: nothing,
            kv_indptr: nothing,
            last_page_len: nothing,
            kv_indices: nothing,
        }
    }

    /// With the tables of so many requests and pages, in a buffer that holds them.
    fn with_tables(mut self, tables: *mut c_void, requests: usize, indices: usize) -> Self {
        let device = self.float.device();
        let mut at = 0usize;
        let mut next = |len: usize| {
            let layout = Layout::build(tables.wrapping_byte_add(4 * at), device, DType::I32, &[len as i64], None, None);
            at += len.next_multiple_of(4);
            layout
        };
        self.qo_indptr = next(requests + 1);
        self.kv_indptr = next(requests + 1);
        self.last_page_len = next(requests);
        self.kv_indices = next(indices);
        self
    }
}

/// Writes the tables of a batch as [`Addresses::with_tables`] finds them.
fn write_tables(batch: &Batch, to: &mut [i32]) {
    let mut at = 0;
    for array in [&batch.qo_indptr, &batch.kv_indptr, &batch.last_page_len, &batch.kv_indices] {
        to[at..at + array.len()].copy_from_slice(array);
        at += array.len().next_multiple_of(4);
        // Without pages there are none in their last ones.
        if array.is_empty() && std::ptr::eq(array, &batch.last_page_len) {
            at += batch.requests().next_multiple_of(4);
        }
    }
}

impl OnStream {
    /// `room` is how many pages the tables of a graph have, which then stay where they are.
    pub(super) fn new(
        spec: &AttentionSpec,
        largest: Largest,
        stream: &Arc<CudaStream>,
        room: Option<usize>,
    ) -> Result<Self> {
        refuse_per_thread(WORKSPACE, stream)?;
        check_context(WORKSPACE, "stream", stream.context(), stream.context())?;
        refuse_capture(WORKSPACE, stream)?;
        check_largest(spec, largest)?;
        let runtime = FlashInferRuntime::global()?;
        let on = device(stream.context());
        let id = runtime.checked_device(on)?;
        if spec.dtype() == DType::F32 {
            return refuse(
                WORKSPACE,
                "dtype",
                "F32".to_owned(),
                "F16 or BF16 on a GPU; F32 is computed on the host alone",
            );
        }
        let capability = runtime.compute_capability(id)?;
        let Device::Cuda(number) = on else { unreachable!("a stream is of a GPU") };
        let Some(limits) = runtime.limits(number) else {
            return Err(FlashInferError::DeviceOutOfRange { device: id.into(), count: runtime.device_count()? });
        };
        let gpu = Gpu { capability, multiprocessors: limits.multiprocessors };
        let backend = spec.backend(capability);
        check_backend(spec, backend, capability)?;
        let module = runtime.module(&format!("{}.so", spec.module(backend)))?;
        let plan = module.function("plan")?;
        let run = module.function(match (spec.kind(), backend) {
            (Kind::Mla, _) | (_, Backend::CudaCores) => "run",
            (Kind::Ragged, _) => "ragged_run",
            _ => "paged_run",
        })?;
        let graph = room.is_some();
        let needed = sizes(spec, backend, largest, gpu, graph);
        let _current = CurrentContext::bind(stream.context())?;
        let allocated = driver("allocating the workspace");
        let mut float = stream.alloc_zeros(needed.float as usize).map_err(&allocated)?;
        let mut int = stream.alloc_zeros(needed.int as usize).map_err(&allocated)?;
        let len = match room {
            Some(pages) => tables_len(largest.requests as usize, pages),
            // What does not fit is made room for when there is a batch.
            None => tables_len(largest.requests.min(1 << 12) as usize, 1 << 10),
        };
        let mut tables = stream.alloc_zeros(len).map_err(&allocated)?;
        let tables_at = buffer_address(&mut tables) as u64;
        let context = stream.context();
        let slot = |_| -> Result<Slot> {
            Ok(Slot {
                lists: Pinned::new(context, needed.int as usize)?,
                tables: Pinned::new(context, 4 * tables.len())?,
                copied: context.new_event(None).map_err(driver("cuEventCreate"))?,
                on_its_way: false,
            })
        };
        let slots = (0..SLOTS).map(slot).collect::<Result<Vec<_>>>()?;
        let addresses = Addresses::new(on, &mut float, &mut int);
        let stream = Arc::clone(stream);
        let (pdl, kind, next) = (spec.pdl(), spec.kind(), 0);
        Ok(Self {
            stream,
            device: on,
            backend,
            gpu,
            pdl,
            plan,
            run,
            kind,
            float,
            int,
            tables,
            slots,
            next,
            tables_at,
            addresses,
            graph,
        })
    }

    pub(super) fn backend(&self) -> Backend {
        self.backend
    }

    pub(super) fn multiprocessors(&self) -> i64 {
        self.gpu.multiprocessors
    }

    pub(super) fn bytes(&self) -> (usize, usize) {
        (self.float.len(), self.int.len())
    }

    pub(super) fn stream(&self) -> Stream<'_> {
        Stream::cudarc(&self.stream)
    }

    pub(super) fn owned_stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    pub(super) fn buffers(&self) -> (&CudaSlice<u8>, &CudaSlice<u8>, &CudaSlice<i32>) {
        (&self.float, &self.int, &self.tables)
    }

    pub(super) fn buffers_mut(&mut self) -> (&mut CudaSlice<u8>, &mut CudaSlice<u8>, &mut CudaSlice<i32>) {
        (&mut self.float, &mut self.int, &mut self.tables)
    }

    /// Plans a batch of one query or more.
    pub(super) fn plan(&mut self, spec: &AttentionSpec, batch: &Batch) -> Result<Lists> {
        let rows = batch.rows();
        let info = self.planned(spec, batch, rows)?;
        Ok(Lists { info: info.into(), addresses: self.addresses })
    }

    /// As [`plan`](Self::plan), of a graph's batch, which has the rows that the graph was captured with.
    pub(super) fn planned(&mut self, spec: &AttentionSpec, batch: &Batch, rows: i64) -> Result<Array> {
        refuse_capture("Workspace::plan", &self.stream)?;
        let runtime = FlashInferRuntime::global()?;
        let id = runtime.checked_device(self.device)?;
        let _current = CurrentContext::bind(self.stream.context())?;
        let len = tables_len(batch.requests(), batch.kv_indices.len());
        if len > self.tables.len() {
            if self.graph {
                unreachable!("a graph's batch is filled up to what its tables were made for");
            }
            let more = len.next_power_of_two();
            self.tables = self.stream.alloc_zeros(more).map_err(driver("allocating a batch's tables"))?;
            self.tables_at = buffer_address(&mut self.tables) as u64;
        }
        let at = self.next;
        self.next = (at + 1) % SLOTS;
        self.slots[at].wait()?;
        if self.slots[at].tables.bytes < 4 * len {
            self.slots[at].tables = Pinned::new(self.stream.context(), 4 * len.next_power_of_two())?;
        }
        write_tables(batch, self.slots[at].tables.words());
        let tables = self.tables_at as *mut c_void;
        self.addresses = self.addresses.with_tables(tables, batch.requests(), batch.kv_indices.len());
        let result = self.copy_tables(at, len).and_then(|()| {
            // SAFETY: the slot's memory is as long as the lists, and nothing copies from it.
            unsafe { self.call_planner(runtime, spec, batch, rows, at) }
        });
        // Whatever became of it, copies may be on their way.
        self.slots[at].on_its_way = true;
        let recorded = record(&self.slots[at].copied, &self.stream);
        recorded.map_err(driver_in(self.stream.context(), "recording a plan's copies"))?;
        result.map_err(|error| match error {
            error @ (FlashInferError::TvmFfiCall { .. } | FlashInferError::Cuda { .. }) => {
                runtime.diagnosed(error, id, 0, self.stream())
            }
            error => error,
        })
    }

    fn copy_tables(&mut self, at: usize, len: usize) -> Result<()> {
        let from = &self.slots[at].tables.words()[..len];
        // SAFETY: both hold so many numbers; the slot's memory is not written before the event behind the copy.
        let copied = unsafe { cuda::memcpy_htod_async(self.tables_at, from, self.stream.cu_stream()) };
        copied.map_err(driver_in(self.stream.context(), "copying a batch's tables"))
    }

    /// # Safety
    /// No copy may be on its way from the slot's lists.
    unsafe fn call_planner(
        &self,
        runtime: &'static FlashInferRuntime,
        spec: &AttentionSpec,
        batch: &Batch,
        rows: i64,
        at: usize,
    ) -> Result<Array> {
        let id = runtime.checked_device(self.device)?;
        let on_host = |array: &[i32]| {
            let data = array.as_ptr().cast_mut().cast();
            Layout::build(data, Device::Cpu, DType::I32, &[array.len() as i64], None, None)
        };
        let lists = self.slots[at].lists.layout();
        let arrays = [on_host(&batch.qo_indptr), on_host(&batch.kv_indptr), on_host(&batch.kv_len)];
        let (float, int, pinned) = (self.addresses.float.pack(), self.addresses.int.pack(), lists.pack());
        let [qo_indptr, kv_indptr, kv_len] = arrays.each_ref().map(Layout::pack);
        // Upstream looks at their types alone, and at those not always.
        let typed = |dtype| Layout::build(std::ptr::null_mut(), self.device, dtype, &[0], None, None);
        let empty = [typed(spec.dtype()), typed(spec.kv_dtype())];
        let [empty_q, empty_kv] = empty.each_ref().map(Layout::pack);
        let ((q_heads, kv_heads), (qk, vo)) = (spec.heads(), spec.head_dims());
        let requests = batch.requests() as i64;
        let mut args = vec![Arg::dl_tensor(&float), Arg::dl_tensor(&int), Arg::dl_tensor(&pinned)];
        match (self.kind, self.backend) {
            (Kind::Mla, _) => {
                args.extend([&qo_indptr, &kv_indptr, &kv_len].map(Arg::dl_tensor));
                args.extend([Arg::int(q_heads), Arg::int(MLA_DIMS.0), Arg::bool(spec.is_causal())]);
            }
            (_, Backend::CudaCores) => {
                args.push(Arg::dl_tensor(&kv_indptr));
                args.extend([requests, q_heads, kv_heads, spec.page_size()].map(Arg::int));
                args.extend([Arg::bool(self.graph), Arg::int(spec.window_left())]);
                args.extend([Arg::float(spec.soft_cap().unwrap_or(0.0)), Arg::int(qk), Arg::int(vo)]);
                args.extend([&empty_q, &empty_kv].map(Arg::dl_tensor));
            }
            (_, backend) => {
                args.extend([&qo_indptr, &kv_indptr, &kv_len].map(Arg::dl_tensor));
                args.extend([rows, requests, q_heads, kv_heads, spec.page_size()].map(Arg::int));
                args.extend([Arg::bool(self.graph), Arg::int(qk), Arg::int(vo), Arg::bool(spec.mask_mode() == 1)]);
                args.push(Arg::int(spec.window_left()));
                if backend == Backend::Fa2 {
                    // No fixed division of contexts, divided where it helps, and nothing beside it on the GPU.
                    args.extend([Arg::int(-1), Arg::bool(false), Arg::int(0)]);
                }
            }
        }
        let _stream = runtime.set_stream(id, self.stream()).map_err(|code| runtime.api().stream_error(code))?;
        // SAFETY: the arrays are on the host and as long as they say, which is what the planner reads of them; the batch was
        // checked to be one that its lists hold; the lists' memory on the host is as long as that on the GPU, where the planner
        // looks at its length; and nothing else writes it.
        unsafe { self.plan.call_any(&args) }?.to()
    }

    /// Copies the lists and tables of an earlier plan to the GPU again, whose slot was not used since.
    pub(super) fn restore(&mut self, slot: usize) -> Result<()> {
        let _current = CurrentContext::bind(self.stream.context())?;
        self.copy_tables(slot, self.tables.len())?;
        let (to, bytes) = (self.addresses.int.data() as u64, self.int.len());
        let from = self.slots[slot].lists.data.as_ptr();
        // SAFETY: both hold so many bytes; the slot's memory is not written before the event behind the copy.
        let copied =
            unsafe { cuda::memcpy_htod_async(to, slice::from_raw_parts(from, bytes), self.stream.cu_stream()) };
        copied.map_err(driver_in(self.stream.context(), "copying a plan's lists"))?;
        self.slots[slot].on_its_way = true;
        record(&self.slots[slot].copied, &self.stream)
            .map_err(driver_in(self.stream.context(), "recording a plan's copies"))
    }

    /// The slot that the last plan was copied from.
    pub(super) fn last_slot(&self) -> usize {
        (self.next + SLOTS - 1) % SLOTS
    }

    /// Keeps a slot from being the next one.
    pub(super) fn skip(&mut self, slot: usize) {
        if self.next == slot {
            self.next = (slot + 1) % SLOTS;
        }
    }

    pub(super) fn launch<'a>(&'a self, lists: &'a Lists) -> Launch<'a> {
        self.launch_of(&lists.info, &lists.addresses)
    }

    pub(super) fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    pub(super) fn launch_of<'a>(&'a self, info: &'a Object, addresses: &'a Addresses) -> Launch<'a> {
        let hopper = self.gpu.capability >= (9, 0);
        Launch { info, addresses, run: &self.run, backend: self.backend, device: self.device, pdl: self.pdl, hopper }
    }
}

/// That the GPU has the backend.
fn check_backend(spec: &AttentionSpec, backend: Backend, capability: (i32, i32)) -> Result<()> {
    let runs_on = match backend {
        Backend::Fa3 => RunsOn::Exactly(9, 0),
        _ if spec.dtype() == DType::BF16 => RunsOn::AtLeast(8, 0),
        _ => RunsOn::AtLeast(7, 5),
    };
    let (major, minor) = capability;
    if !runs_on.includes(capability) {
        let needed = match runs_on {
            RunsOn::Exactly(major, minor) => format!("compute capability {major}.{minor}"),
            RunsOn::AtLeast(major, minor) => format!("compute capability {major}.{minor} or above"),
        };
        let found = format!("{backend:?} on a GPU of compute capability {major}.{minor}");
        return refuse(WORKSPACE, "backend", found, format!("{needed}, or another backend"));
    }
    if spec.head_dims() == (192, 128) && backend != Backend::Fa3 {
        let found = format!("192 and 128 on a GPU of compute capability {major}.{minor}");
        return refuse(WORKSPACE, "head_dim", found, "compute capability 9.0: FA3 alone is compiled for these sizes");
    }
    Ok(())
}

/// What launches a plan's kernels.
pub(super) struct Launch<'a> {
    info: &'a Object,
    addresses: &'a Addresses,
    run: &'a Function,
    backend: Backend,
    device: Device,
    /// As the specification says.
    pdl: Option<bool>,
    hopper: bool,
}

/// Upstream's rotary numbers, which its modules without rotary embeddings do not read.
const ROPE: [f64; 2] = [1.0, 1e-4];

impl Launch<'_> {
    pub(super) fn device(&self) -> Device {
        self.device
    }

    fn pdl(&self, stream: Stream<'_>) -> bool {
        let best = self.hopper && stream.capture().is_none_or(|capture| capture.pdl);
        self.backend != Backend::Fa3 && self.pdl.unwrap_or(best)
    }

    pub(super) fn paged(
        &self,
        row: &'static Row,
        operands: &[Operand<'_, '_>; 6],
        numbers: &Numbers,
        stream: Stream<'_>,
    ) -> Result<()> {
        let Addresses { float, int, qo_indptr, kv_indptr, last_page_len, kv_indices } = self.addresses;
        let tables = [float, int, qo_indptr, kv_indptr, kv_indices, last_page_len].map(Layout::pack);
        let table = |at: usize| Arg::dl_tensor(&tables[at]);
        let packed = Packed::new(operands);
        let [q, k, v, o, lse] = packed.args();
        let (layout, window) = (Arg::int(numbers.layout), Arg::int(numbers.window_left));
        let (info, pdl) = (Arg::object(self.info), Arg::bool(self.pdl(stream)));
        if self.backend == Backend::CudaCores {
            let mut args = [Arg::NONE; 19];
            args[..14].copy_from_slice(&[
                table(0),
                table(1),
                info,
                q,
                k,
                v,
                table(3),
                table(4),
                table(5),
                o,
                lse,
                layout,
                window,
                pdl,
            ]);
            // Behind the slopes, which are none.
            args[15..].copy_from_slice(&rope(numbers));
            return self.call(row, operands, &args, stream);
        }
        let mut args = [Arg::NONE; 27];
        args[..16].copy_from_slice(&[
            table(0),
            table(1),
            info,
            q,
            k,
            v,
            table(2),
            table(3),
            table(4),
            table(5),
            o,
            lse,
            Arg::int(numbers.mask_mode),
            layout,
            window,
            pdl,
        ]);
        self.call_prefill(row, operands, &mut args, 16, numbers, stream)
    }

    pub(super) fn ragged(
        &self,
        row: &'static Row,
        operands: &[Operand<'_, '_>; 6],
        numbers: &Numbers,
        stream: Stream<'_>,
    ) -> Result<()> {
        let Addresses { float, int, qo_indptr, kv_indptr, .. } = self.addresses;
        let tables = [float, int, qo_indptr, kv_indptr].map(Layout::pack);
        let table = |at: usize| Arg::dl_tensor(&tables[at]);
        let packed = Packed::new(operands);
        let [q, k, v, o, lse] = packed.args();
        let mut args = [Arg::NONE; 25];
        args[..14].copy_from_slice(&[
            table(0),
            table(1),
            Arg::object(self.info),
            q,
            k,
            v,
            table(2),
            table(3),
            o,
            lse,
            Arg::int(numbers.mask_mode),
            Arg::int(0),
            Arg::int(numbers.window_left),
            Arg::bool(self.pdl(stream)),
        ]);
        self.call_prefill(row, operands, &mut args, 14, numbers, stream)
    }

    /// Adds what a variant takes behind the arguments that all have, and calls.
    fn call_prefill<'p>(
        &self,
        row: &'static Row,
        operands: &[Operand<'_, '_>; 6],
        args: &mut [Arg<'p>],
        at: usize,
        numbers: &Numbers,
        stream: Stream<'_>,
    ) -> Result<()> {
        if let Some(sink) = operands[5].layout() {
            let runtime = FlashInferRuntime::global()?;
            // SAFETY: the object is dropped at the end of this function, before the layout; the launcher keeps none.
            let object = unsafe { runtime.tensor_object(sink.pack()) }?;
            let mut args = args[..at].to_vec();
            args.extend([Arg::object(&object), Arg::float(numbers.sm_scale)]);
            return self.call(row, operands, &args, stream);
        }
        let count = match self.backend {
            Backend::Fa3 => {
                // Behind prefix lengths, positions, lengths of items and the values' scales, which are none.
                let more = [Arg::float(numbers.soft_cap), Arg::float(numbers.sm_scale), Arg::float(1.0), Arg::int(0)];
                args[at + 4..at + 8].copy_from_slice(&more);
                at + 8
            }
            _ => {
                // Behind a mask of one's own, its offsets, slopes, prefix lengths, positions and lengths of items, which are none.
                args[at + 6..at + 10].copy_from_slice(&rope(numbers));
                args[at + 10] = Arg::int(0);
                at + 11
            }
        };
        self.call(row, operands, &args[..count], stream)
    }

    pub(super) fn mla(
        &self,
        row: &'static Row,
        operands: &[Operand<'_, '_>; 6],
        numbers: &Numbers,
        stream: Stream<'_>,
    ) -> Result<()> {
        let Addresses { float, int, kv_indices, .. } = self.addresses;
        let tables = [float, int, kv_indices].map(Layout::pack);
        let table = |at: usize| Arg::dl_tensor(&tables[at]);
        let packed = Packed::new(operands);
        let [q_nope, ckv, kpe, o, lse] = packed.args();
        let (heads, page_size) = match (operands[Q].layout(), operands[K].layout()) {
            (Some(q), Some(ckv)) => (q.size(1), ckv.size(1)),
            _ => unreachable!("the call was checked"),
        };
        let args = [
            table(0),
            table(1),
            Arg::object(self.info),
            q_nope,
            packed.arg(5),
            ckv,
            kpe,
            table(2),
            o,
            lse,
            Arg::int(numbers.mask_mode),
            Arg::int(heads),
            Arg::int(page_size),
            Arg::float(numbers.sm_scale),
            Arg::bool(false),
        ];
        self.call(row, operands, &args, stream)
    }

    #[inline(always)]
    fn call(
        &self,
        row: &'static Row,
        operands: &[Operand<'_, '_>; 6],
        args: &[Arg<'_>],
        stream: Stream<'_>,
    ) -> Result<()> {
        let runtime = FlashInferRuntime::global()?;
        if runtime.usable(self.device).is_none() {
            runtime.checked_device(self.device)?;
        }
        let entry = rows::entry(self.backend == Backend::Fa3);
        // SAFETY: the tensors were checked against the plan, the plan's lists and tables were made here of a batch that was
        // checked, for a cache of as many pages, and lie on this stream behind what was queued before; whoever made the tensors
        // vouched for their memory.
        ordered_like(row, operands, || unsafe { entry.call_function(self.run, args, self.device, stream) })
    }
}

fn rope(numbers: &Numbers) -> [Arg<'static>; 4] {
    [numbers.soft_cap, numbers.sm_scale, ROPE[0], ROPE[1]].map(Arg::float)
}

/// The tensors of a call as they cross the boundary.
struct Packed {
    tensors: [Option<crate::ffi::dlpack::DLTensor>; 6],
}

impl Packed {
    #[inline(always)]
    fn new(operands: &[Operand<'_, '_>; 6]) -> Self {
        Self { tensors: operands.each_ref().map(|operand| operand.layout().map(Layout::pack)) }
    }

    #[inline(always)]
    fn arg(&self, at: usize) -> Arg<'_> {
        self.tensors[at].as_ref().map_or(Arg::NONE, Arg::dl_tensor)
    }

    /// Queries, keys, values, results and logarithms.
    #[inline(always)]
    fn args(&self) -> [Arg<'_>; 5] {
        [self.arg(Q), self.arg(K), self.arg(V), self.arg(RESULT), self.arg(4)]
    }
}
