//! The scratch memory on a GPU, the planner's call, and the launchers' calls.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::result as cuda;
use cudarc::driver::{CudaSlice, CudaStream, DevicePtrMut};

use crate::buffers::{check_context, device, refuse_per_thread};
use crate::contract::{Operand, Row, RunsOn};
use crate::engine::ordered_like;
use crate::error::{FlashInferError, Result, driver, driver_in};
use crate::ffi::dlpack::DLTensor;
use crate::indices::refuse;
use crate::module::Function;
use crate::object::{Any, Arg, Array, Object};
use crate::owner::{CurrentContext, event_of, refuse_capture};
use crate::runtime::FlashInferRuntime;
use crate::stream::Stream;
use crate::tensor::{DType, Device, Layout};

use super::batch::Batch;
use super::ring::Ring;
use super::rows::{self, K, Q, RESULT, V};
use super::run::Numbers;
use super::sizes::{Gpu, Largest, Sizes, check_largest, sizes};
use super::spec::{AttentionSpec, Backend, Kind, MLA_DIMS};

/// The name that errors of a workspace carry.
const WORKSPACE: &str = "Workspace";

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
    eight_bits: bool,
    /// Nothing where the memory is somebody else's, who orders its uses and keeps it as long as they last.
    buffers: Option<Buffers>,
    /// How many bytes partial results and the planner's lists have, and how many numbers the tables.
    float_bytes: usize,
    int_bytes: usize,
    tables_len: usize,
    ring: Ring,
    /// Where the tables are.
    tables_at: u64,
    prepared: Box<Prepared>,
    graph: bool,
}

/// A workspace's own memory on a GPU.
#[derive(Debug)]
pub(super) struct Buffers {
    /// Partial results, and the planner's lists.
    pub(super) float: CudaSlice<u8>,
    pub(super) int: CudaSlice<u8>,
    /// The batch's tables.
    pub(super) tables: CudaSlice<i32>,
}

/// What computes a specification on a stream's GPU, found and loaded, and what its planner goes by there.
#[derive(Debug)]
pub(super) struct Loaded {
    device: Device,
    backend: Backend,
    gpu: Gpu,
    plan: Function,
    run: Function,
}

/// What kernels are given of a workspace and of the tables of its batch: the layouts, and those as they cross the boundary, which point
/// into the former. So it stays where it is, in its box.
#[derive(Debug)]
struct Prepared {
    layouts: [Layout; 6],
    tensors: [DLTensor; 6],
}

const FLOAT: usize = 0;
const INT: usize = 1;
const QO_INDPTR: usize = 2;
const KV_INDPTR: usize = 3;
const KV_INDICES: usize = 4;
const LAST_PAGE_LEN: usize = 5;

// SAFETY: they are addresses of the GPU's, which every thread may hand to kernels, and pointers into itself.
unsafe impl Send for Prepared {}
// SAFETY: as above.
unsafe impl Sync for Prepared {}

pub(super) fn integers(array: &Array) -> Vec<i64> {
    array.iter().map(|any| any.to::<i64>().unwrap_or(i64::MIN)).collect()
}

/// Those of a plan's answer.
pub(super) fn integers_of(info: &Object) -> Vec<i64> {
    let array = Any::from(info.clone()).to::<Array>();
    array.map(|array| integers(&array)).unwrap_or_default()
}

/// How long the tables of a batch are, in numbers: each starts at a multiple of four, so that kernels may read several at once.
pub(super) fn tables_len(requests: usize, indices: usize) -> usize {
    2 * (requests + 1).next_multiple_of(4) + requests.next_multiple_of(4) + indices.max(1).next_multiple_of(4)
}

pub(crate) fn buffer_address<T>(buffer: &mut CudaSlice<T>) -> *mut c_void {
    let stream = Arc::clone(buffer.stream());
    let (address, guard) = buffer.device_ptr_mut(&stream);
    // Every use of it is on its own stream.
    event_of(guard);
    address as *mut c_void
}

impl Prepared {
    /// With partial results and lists at these addresses, of so many bytes.
    fn new(on: Device, float: (u64, usize), int: (u64, usize)) -> Box<Self> {
        let nothing = Layout::build(std::ptr::null_mut(), on, DType::I32, &[0], None, None);
        let mut layouts = [nothing; 6];
        for (at, (address, bytes)) in [(FLOAT, float), (INT, int)] {
            layouts[at] = Layout::build(address as *mut c_void, on, DType::U8, &[bytes as i64], None, None);
        }
        let tensors = layouts.each_ref().map(Layout::pack);
        let mut prepared = Box::new(Self { layouts, tensors });
        prepared.tensors = prepared.layouts.each_ref().map(Layout::pack);
        prepared
    }

    /// With the tables of so many requests and pages, in a buffer that holds them.
    fn set_tables(&mut self, tables: *mut c_void, requests: usize, indices: usize) {
        let device = self.layouts[FLOAT].device();
        let mut at = 0usize;
        // In the order of `write_tables`.
        for (which, len) in
            [(QO_INDPTR, requests + 1), (KV_INDPTR, requests + 1), (LAST_PAGE_LEN, requests), (KV_INDICES, indices)]
        {
            let data = tables.wrapping_byte_add(4 * at);
            self.layouts[which] = Layout::build(data, device, DType::I32, &[len as i64], None, None);
            self.tensors[which] = self.layouts[which].pack();
            at += len.next_multiple_of(4);
        }
    }
}

/// Writes the tables of a batch as [`Prepared::set_tables`] finds them.
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

impl Loaded {
    /// For batches up to the largest, which are checked to be ones that kernels can count.
    pub(super) fn new(spec: &AttentionSpec, largest: Largest, stream: &Arc<CudaStream>) -> Result<Self> {
        refuse_per_thread(WORKSPACE, stream)?;
        check_context(WORKSPACE, "stream", stream.context(), stream.context())?;
        refuse_capture(WORKSPACE, stream)?;
        check_largest(spec, largest)?;
        let runtime = FlashInferRuntime::global()?;
        let on = device(stream.context());
        let id = runtime.checked_device(on)?;
        if spec.out_dtype() == DType::F32 {
            let name = if spec.dtype() == DType::F32 { "dtype" } else { "out_dtype" };
            return refuse(
                WORKSPACE,
                name,
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
        Ok(Self { device: on, backend, gpu, plan, run })
    }

    /// How much scratch memory batches up to the largest take, for a graph's plan or for any other.
    pub(super) fn sizes(&self, spec: &AttentionSpec, largest: Largest, graph: bool) -> Sizes {
        sizes(spec, self.backend, largest, self.gpu, graph)
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
        let loaded = Loaded::new(spec, largest, stream)?;
        let needed = loaded.sizes(spec, largest, room.is_some());
        let _current = CurrentContext::bind(stream.context())?;
        let allocated = driver("allocating the workspace");
        let float = stream.alloc_zeros(needed.float as usize).map_err(&allocated)?;
        let int = stream.alloc_zeros(needed.int as usize).map_err(&allocated)?;
        let len = match room {
            Some(pages) => tables_len(largest.requests as usize, pages),
            // What does not fit is made room for when there is a batch.
            None => tables_len(largest.requests.min(1 << 12) as usize, 1 << 10),
        };
        let tables = stream.alloc_zeros(len).map_err(&allocated)?;
        let mut buffers = Buffers { float, int, tables };
        let places =
            [buffer_address(&mut buffers.float), buffer_address(&mut buffers.int), buffer_address(&mut buffers.tables)];
        let places = places.map(|place| place as u64);
        Self::at(loaded, spec, needed, (places, len), stream, (room.is_some(), Some(buffers)))
    }

    /// Over memory of somebody else's, which is zeros: partial results and lists of the sizes that what is loaded
    /// [says](Loaded::sizes), and tables of so many numbers, none of which move.
    ///
    /// # Safety
    /// The memory must be of the stream's GPU and valid as long as the workspace and what it launched; its uses must be ordered with
    /// the stream, and nothing else may use it but other workspaces' runs behind this one's on the stream, of the partial results.
    #[cfg_attr(not(feature = "compute"), allow(dead_code, reason = "compute graphs have their own memory for it"))]
    pub(super) unsafe fn over(
        loaded: Loaded,
        spec: &AttentionSpec,
        needed: Sizes,
        tables: ([u64; 3], usize),
        stream: &Arc<CudaStream>,
        graph: bool,
    ) -> Result<Self> {
        let _current = CurrentContext::bind(stream.context())?;
        Self::at(loaded, spec, needed, tables, stream, (graph, None))
    }

    fn at(
        loaded: Loaded,
        spec: &AttentionSpec,
        needed: Sizes,
        ([float, int, tables_at], tables_len): ([u64; 3], usize),
        stream: &Arc<CudaStream>,
        (graph, buffers): (bool, Option<Buffers>),
    ) -> Result<Self> {
        let Loaded { device, backend, gpu, plan, run } = loaded;
        let (float_bytes, int_bytes) = (needed.float as usize, needed.int as usize);
        let ring = Ring::new(stream, int_bytes, tables_len)?;
        let prepared = Prepared::new(device, (float, float_bytes), (int, int_bytes));
        let stream = Arc::clone(stream);
        let (pdl, kind, eight_bits) = (spec.pdl(), spec.kind(), spec.has_8_bit_queries());
        Ok(Self {
            stream,
            device,
            backend,
            gpu,
            pdl,
            plan,
            run,
            kind,
            eight_bits,
            buffers,
            float_bytes,
            int_bytes,
            tables_len,
            ring,
            tables_at,
            prepared,
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
        (self.float_bytes, self.int_bytes)
    }

    pub(super) fn stream(&self) -> Stream<'_> {
        Stream::cudarc(&self.stream)
    }

    pub(super) fn owned_stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// The memory, where it is the workspace's own.
    pub(super) fn buffers(&self) -> Option<&Buffers> {
        self.buffers.as_ref()
    }

    pub(super) fn buffers_mut(&mut self) -> Option<&mut Buffers> {
        self.buffers.as_mut()
    }

    /// Plans a batch of one query or more; what upstream answered, which stays with the caller's thread.
    pub(super) fn plan(&mut self, spec: &AttentionSpec, batch: &Batch) -> Result<Object> {
        self.planned(spec, batch, batch.rows()).map(Object::from)
    }

    /// As [`plan`](Self::plan), of a graph's batch, which has the rows that the graph was captured with.
    pub(super) fn planned(&mut self, spec: &AttentionSpec, batch: &Batch, rows: i64) -> Result<Array> {
        refuse_capture("Workspace::plan", &self.stream)?;
        let runtime = FlashInferRuntime::global()?;
        let id = runtime.checked_device(self.device)?;
        let _current = CurrentContext::bind(self.stream.context())?;
        let len = tables_len(batch.requests(), batch.kv_indices.len());
        if len > self.tables_len {
            let Some(buffers) = self.buffers.as_mut().filter(|_| !self.graph) else {
                unreachable!("a batch whose tables stay where they are was checked to be one that they have room for");
            };
            let more = len.next_power_of_two();
            buffers.tables = self.stream.alloc_zeros(more).map_err(driver("allocating a batch's tables"))?;
            self.tables_at = buffer_address(&mut buffers.tables) as u64;
            self.tables_len = more;
        }
        let at = self.ring.take(len)?;
        write_tables(batch, self.ring.tables(at));
        self.prepared.set_tables(self.tables_at as *mut c_void, batch.requests(), batch.kv_indices.len());
        let result = self.copy_tables(at, len).and_then(|()| {
            // SAFETY: the slot's memory is as long as the lists, and nothing copies from it.
            unsafe { self.call_planner(runtime, id, spec, batch, rows, at) }
        });
        // Whatever became of it, copies may be on their way.
        self.ring.queued(at)?;
        result.map_err(|error| match error {
            error @ (FlashInferError::TvmFfiCall { .. } | FlashInferError::Cuda { .. }) => {
                runtime.diagnosed(error, id, 0, self.stream())
            }
            error => error,
        })
    }

    fn copy_tables(&mut self, at: usize, len: usize) -> Result<()> {
        let from = &self.ring.tables(at)[..len];
        // SAFETY: both hold so many numbers; the slot's memory is not written before the event behind the copy.
        let copied = unsafe { cuda::memcpy_htod_async(self.tables_at, from, self.stream.cu_stream()) };
        copied.map_err(driver_in(self.stream.context(), "copying a batch's tables"))
    }

    /// # Safety
    /// No copy may be on its way from the slot's lists.
    unsafe fn call_planner(
        &self,
        runtime: &'static FlashInferRuntime,
        id: i32,
        spec: &AttentionSpec,
        batch: &Batch,
        rows: i64,
        at: usize,
    ) -> Result<Array> {
        let on_host = |array: &[i32]| {
            let data = array.as_ptr().cast_mut().cast();
            Layout::build(data, Device::Cpu, DType::I32, &[array.len() as i64], None, None)
        };
        let lists = self.ring.lists(at);
        let arrays = [on_host(&batch.qo_indptr), on_host(&batch.kv_indptr), on_host(&batch.kv_len)];
        let pinned = lists.pack();
        let [qo_indptr, kv_indptr, kv_len] = arrays.each_ref().map(Layout::pack);
        let ((q_heads, kv_heads), (qk, vo)) = (spec.heads(), spec.head_dims());
        let requests = batch.requests() as i64;
        // Upstream looks at their types alone, and at those not always.
        let empty = [spec.dtype(), spec.kv_dtype()]
            .map(|dtype| Layout::build(std::ptr::null_mut(), self.device, dtype, &[0], None, None));
        let [empty_q, empty_kv] = empty.each_ref().map(Layout::pack);
        let mut args = Arguments::default();
        let tensors = &self.prepared.tensors;
        args.add(&[&tensors[FLOAT], &tensors[INT], &pinned].map(Arg::dl_tensor));
        let graph = Arg::bool(self.graph);
        match (self.kind, self.backend) {
            (Kind::Mla, _) => {
                args.add(&[&qo_indptr, &kv_indptr, &kv_len].map(Arg::dl_tensor));
                args.add(&[Arg::int(q_heads), Arg::int(MLA_DIMS.0), Arg::bool(spec.is_causal())]);
            }
            (_, Backend::CudaCores) => {
                args.add(&[Arg::dl_tensor(&kv_indptr)]);
                args.add(&[requests, q_heads, kv_heads, spec.page_size()].map(Arg::int));
                args.add(&[graph, Arg::int(spec.window_left()), Arg::float(spec.soft_cap().unwrap_or(0.0))]);
                args.add(&[qk, vo].map(Arg::int));
                args.add(&[&empty_q, &empty_kv].map(Arg::dl_tensor));
            }
            (_, backend) => {
                args.add(&[&qo_indptr, &kv_indptr, &kv_len].map(Arg::dl_tensor));
                args.add(&[rows, requests, q_heads, kv_heads, spec.page_size()].map(Arg::int));
                args.add(&[graph, Arg::int(qk), Arg::int(vo), Arg::bool(spec.mask_mode() == 1)]);
                args.add(&[Arg::int(spec.window_left())]);
                if backend == Backend::Fa2 {
                    // No fixed division of contexts, divided where it helps, and nothing beside it on the GPU.
                    args.add(&[Arg::int(-1), Arg::bool(false), Arg::int(0)]);
                }
            }
        }
        let _stream = runtime.set_stream(id, self.stream()).map_err(|code| runtime.api().stream_error(code))?;
        // SAFETY: the arrays are on the host and as long as they say, which is what the planner reads of them; the batch was
        // checked to be one that its lists hold; the lists' memory on the host is as long as that on the GPU, where the planner
        // looks at its length; and nothing else writes it.
        unsafe { self.plan.call_any(args.all()) }?.to()
    }

    /// Copies the lists and tables of an earlier plan to the GPU again, whose slot was not used since.
    pub(super) fn restore(&mut self, slot: usize) -> Result<()> {
        let _current = CurrentContext::bind(self.stream.context())?;
        let copied = self.copy_tables(slot, self.tables_len).and_then(|()| {
            let (to, bytes) = (self.prepared.layouts[INT].data() as u64, self.int_bytes);
            let from = self.ring.planned(slot, bytes);
            // SAFETY: both hold so many bytes; the slot's memory is not written before the event behind the copy.
            let copied = unsafe { cuda::memcpy_htod_async(to, from, self.stream.cu_stream()) };
            copied.map_err(driver_in(self.stream.context(), "copying a plan's lists"))
        });
        self.ring.queued(slot)?;
        copied
    }

    /// The slots that plans are copied from.
    pub(super) fn ring(&mut self) -> &mut Ring {
        &mut self.ring
    }

    /// What runs the last plan, by what upstream answered.
    pub(super) fn launch<'a>(&'a self, info: &'a Object) -> Launch<'a> {
        let Self { run, backend, eight_bits, device, pdl, .. } = self;
        let (tensors, hopper) = (&self.prepared.tensors, self.gpu.capability >= (9, 0));
        Launch { info, tensors, run, backend: *backend, eight_bits: *eight_bits, device: *device, pdl: *pdl, hopper }
    }
}

/// A planner's arguments, of which each kind has its own number.
struct Arguments<'a> {
    all: [Arg<'a>; 19],
    count: usize,
}

impl Default for Arguments<'_> {
    fn default() -> Self {
        Self { all: [Arg::NONE; 19], count: 0 }
    }
}

impl<'a> Arguments<'a> {
    fn add(&mut self, more: &[Arg<'a>]) {
        self.all[self.count..self.count + more.len()].copy_from_slice(more);
        self.count += more.len();
    }

    fn all(&self) -> &[Arg<'a>] {
        &self.all[..self.count]
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
        let or_else = if spec.has_8_bit_queries() { "16-bit queries" } else { "another backend" };
        return refuse(WORKSPACE, "backend", found, format!("{needed}, or {or_else}"));
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
    tensors: &'a [DLTensor; 6],
    run: &'a Function,
    backend: Backend,
    eight_bits: bool,
    device: Device,
    /// As the specification says.
    pdl: Option<bool>,
    hopper: bool,
}

/// Upstream's rotary numbers, which its modules without rotary embeddings do not read.
const ROPE: [f64; 2] = [1.0, 1e-4];

impl Launch<'_> {
    /// With programmatic dependent launch on or off, whatever the specification says.
    #[cfg_attr(not(feature = "compute"), allow(dead_code, reason = "compute graphs know what is ahead of a node"))]
    pub(super) fn with_pdl(mut self, pdl: bool) -> Self {
        self.pdl = Some(pdl);
        self
    }

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
        let table = |at: usize| Arg::dl_tensor(&self.tensors[at]);
        let packed = Packed::new(operands);
        let [q, k, v, o, lse] = packed.args();
        let (layout, window) = (Arg::int(numbers.layout), Arg::int(numbers.window_left));
        let (info, pdl) = (Arg::object(self.info), Arg::bool(self.pdl(stream)));
        if self.backend == Backend::CudaCores {
            let mut args = [Arg::NONE; 19];
            args[..14].copy_from_slice(&[
                table(FLOAT),
                table(INT),
                info,
                q,
                k,
                v,
                table(KV_INDPTR),
                table(KV_INDICES),
                table(LAST_PAGE_LEN),
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
            table(FLOAT),
            table(INT),
            info,
            q,
            k,
            v,
            table(QO_INDPTR),
            table(KV_INDPTR),
            table(KV_INDICES),
            table(LAST_PAGE_LEN),
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
        let table = |at: usize| Arg::dl_tensor(&self.tensors[at]);
        let packed = Packed::new(operands);
        let [q, k, v, o, lse] = packed.args();
        let mut args = [Arg::NONE; 25];
        args[..14].copy_from_slice(&[
            table(FLOAT),
            table(INT),
            Arg::object(self.info),
            q,
            k,
            v,
            table(QO_INDPTR),
            table(KV_INDPTR),
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
            Backend::Fa3 if self.eight_bits => {
                // Behind scales of each head, which are none; those of queries and keys are in that of the products.
                let more = [numbers.sm_scale, 1.0, 1.0, numbers.v_scale].map(Arg::float);
                args[at + 3..at + 7].copy_from_slice(&more);
                at + 7
            }
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
        let table = |at: usize| Arg::dl_tensor(&self.tensors[at]);
        let packed = Packed::new(operands);
        let [q_nope, ckv, kpe, o, lse] = packed.args();
        let (heads, page_size) = match (operands[Q].layout(), operands[K].layout()) {
            (Some(q), Some(ckv)) => (q.size(1), ckv.size(1)),
            _ => unreachable!("the call was checked"),
        };
        let args = [
            table(FLOAT),
            table(INT),
            Arg::object(self.info),
            q_nope,
            packed.arg(5),
            ckv,
            kpe,
            table(KV_INDICES),
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
        let entry = rows::entry(self.backend == Backend::Fa3, self.eight_bits);
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
    tensors: [Option<DLTensor>; 6],
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
