//! What this crate needs of CUDA's runtime: devices, the last error, whether a stream captures, updates of graphs, the memory
//! of self-tests and states, and what logs read of tensors.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;

use crate::error::{FlashInferError, Result, is_sticky};
use crate::loader::Library;

/// The CUDA release that the pinned kernels were built for; drivers are compatible backwards.
const NEEDED_DRIVER: c_int = 13000;

/// `cudaDevAttrComputeCapabilityMajor` and `…Minor`.
const CAPABILITY: [c_int; 2] = [75, 76];
/// `cudaDevAttrMaxSharedMemoryPerBlockOptin`.
const SHARED_MEMORY: c_int = 97;
/// `cudaDevAttrMultiProcessorCount`.
const MULTIPROCESSORS: c_int = 16;
/// `cudaMemcpyDefault`: by the pointers.
const COPY: c_int = 4;
/// `cudaErrorNoDevice`.
const NO_DEVICE: c_int = 100;
/// `cudaErrorGraphExecUpdateFailure`.
#[cfg(feature = "cudarc")]
const GRAPH_EXEC_UPDATE_FAILURE: c_int = 910;

pub(crate) struct Cudart {
    driver_get_version: unsafe extern "C" fn(*mut c_int) -> c_int,
    get_device_count: unsafe extern "C" fn(*mut c_int) -> c_int,
    get_device: unsafe extern "C" fn(*mut c_int) -> c_int,
    set_device: unsafe extern "C" fn(c_int) -> c_int,
    device_get_attribute: unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int,
    get_error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    /// Only graphs need it.
    #[cfg_attr(not(feature = "cudarc"), allow(dead_code, reason = "graphs come with cudarc"))]
    graph_exec_update: Option<GraphExecUpdate>,
    /// What calls that go well do not need; a stand-in for CUDA's runtime may lack them.
    memory: Option<Memory>,
    last_error: Option<LastError>,
    capture_state: Option<CaptureState>,
    /// Only what reads tensors for logs and dumps needs it.
    stream_synchronize: Option<unsafe extern "C" fn(*mut c_void) -> c_int>,
    /// Only this crate's own kernels need it.
    #[cfg(any(feature = "cudarc", feature = "compute"))]
    kernels: Option<Kernels>,
    /// Only what compares captured graphs with what was planned needs it.
    #[cfg(feature = "cudarc")]
    graphs: Option<Graphs>,
}

/// The last argument is a `cudaGraphExecUpdateResultInfo`.
type GraphExecUpdate = unsafe extern "C" fn(*mut c_void, *mut c_void, *mut [usize; 3]) -> c_int;

#[derive(Clone, Copy)]
struct Memory {
    malloc: unsafe extern "C" fn(*mut *mut c_void, usize) -> c_int,
    free: unsafe extern "C" fn(*mut c_void) -> c_int,
    memcpy: unsafe extern "C" fn(*mut c_void, *const c_void, usize, c_int) -> c_int,
    memcpy_async: unsafe extern "C" fn(*mut c_void, *const c_void, usize, c_int, *mut c_void) -> c_int,
    memset_async: unsafe extern "C" fn(*mut c_void, c_int, usize, *mut c_void) -> c_int,
}

/// The last error of the thread's own calls.
#[derive(Clone, Copy)]
struct LastError {
    peek_at_last_error: unsafe extern "C" fn() -> c_int,
    get_last_error: unsafe extern "C" fn() -> c_int,
}

/// What a probe of the context needs so that it breaks no capture.
#[derive(Clone, Copy)]
struct CaptureState {
    stream_is_capturing: unsafe extern "C" fn(*mut c_void, *mut c_int) -> c_int,
    thread_exchange_stream_capture_mode: unsafe extern "C" fn(*mut c_int) -> c_int,
}

/// What loads kernels from memory and launches them.
#[cfg(any(feature = "cudarc", feature = "compute"))]
#[derive(Clone, Copy)]
struct Kernels {
    /// Library, code, options of the translation with their values and number, those of the library likewise.
    load: unsafe extern "C" fn(
        *mut *mut c_void,
        *const c_char,
        *const c_int,
        *mut *mut c_void,
        u32,
        *const c_int,
        *mut *mut c_void,
        u32,
    ) -> c_int,
    get: unsafe extern "C" fn(*mut Kernel, *mut c_void, *const c_char) -> c_int,
    attributes: unsafe extern "C" fn(*mut [u64; ATTRIBUTES], Kernel) -> c_int,
    /// Only kernels with much shared memory need it.
    #[cfg(all(feature = "cudarc", feature = "compute"))]
    set_attribute: Option<unsafe extern "C" fn(Kernel, c_int, c_int) -> c_int>,
    launch: unsafe extern "C" fn(Kernel, Dim3, Dim3, *mut *mut c_void, usize, *mut c_void) -> c_int,
    /// Only programmatic dependent launch and clusters need it.
    launch_with: Option<unsafe extern "C" fn(*const LaunchConfig, Kernel, *mut *mut c_void) -> c_int>,
}

/// `cudaLaunchConfig_t`.
#[cfg(any(feature = "cudarc", feature = "compute"))]
#[repr(C)]
struct LaunchConfig {
    grid: Dim3,
    block: Dim3,
    shared_memory: usize,
    stream: *mut c_void,
    attributes: *const LaunchAttribute,
    count: u32,
}

/// `cudaLaunchAttribute`.
#[cfg(any(feature = "cudarc", feature = "compute"))]
#[repr(C)]
#[derive(Clone, Copy)]
struct LaunchAttribute {
    id: c_int,
    /// To where the value starts.
    pad: c_int,
    /// The numbers of a union of 64 bytes.
    value: [c_int; 16],
}

#[cfg(any(feature = "cudarc", feature = "compute"))]
const _: () = {
    assert!(size_of::<LaunchConfig>() == 56 && size_of::<LaunchAttribute>() == 72);
    assert!(std::mem::offset_of!(LaunchConfig, stream) == 32 && std::mem::offset_of!(LaunchConfig, attributes) == 40);
    assert!(std::mem::offset_of!(LaunchAttribute, value) == 8);
};

/// How many blocks, along two dimensions, of how many threads.
#[cfg(any(feature = "cudarc", feature = "compute"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Blocks {
    pub(crate) blocks: [u32; 2],
    pub(crate) threads: u32,
    /// How many blocks that follow one another along the first dimension are a cluster.
    pub(crate) cluster: u32,
    /// Bytes of shared memory of a block, beside what the kernel declares.
    pub(crate) shared: u32,
}

#[cfg(any(feature = "cudarc", feature = "compute"))]
impl Blocks {
    /// Blocks of so many threads, each by itself.
    pub(crate) const fn new(blocks: [u32; 2], threads: u32) -> Self {
        Self { blocks, threads, cluster: 1, shared: 0 }
    }
}

/// Room for a `cudaFuncAttributes`, and for what a later release may add to it, in words.
#[cfg(any(feature = "cudarc", feature = "compute"))]
const ATTRIBUTES: usize = 128;

/// `dim3`.
#[cfg(any(feature = "cudarc", feature = "compute"))]
#[repr(C)]
#[derive(Clone, Copy)]
struct Dim3 {
    x: u32,
    y: u32,
    z: u32,
}

/// A kernel of a library that was loaded from memory: a `cudaKernel_t`, which every device of the process may run.
#[cfg(any(feature = "cudarc", feature = "compute"))]
#[repr(transparent)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kernel(*mut c_void);

// SAFETY: CUDA's handles of kernels may be used by any thread, by several at a time.
#[cfg(any(feature = "cudarc", feature = "compute"))]
unsafe impl Send for Kernel {}
// SAFETY: as above.
#[cfg(any(feature = "cudarc", feature = "compute"))]
unsafe impl Sync for Kernel {}

/// What tells of captured graphs. By the runtime, whose functions of this release tell how edges wait; cudarc has the driver's
/// only where it was built for CUDA 12.3 or newer.
#[cfg(feature = "cudarc")]
#[derive(Clone, Copy)]
struct Graphs {
    /// The graph, where its edges come from, where they go, what they are, and how many.
    edges: unsafe extern "C" fn(*mut c_void, *mut usize, *mut usize, *mut EdgeData, *mut usize) -> c_int,
    /// The stream, its status, the capture's number, the graph, the nodes that the next one waits for, the edges to them, and
    /// how many.
    capture_info: unsafe extern "C" fn(
        *mut c_void,
        *mut c_int,
        *mut u64,
        *mut *mut c_void,
        *mut *const usize,
        *mut *const EdgeData,
        *mut usize,
    ) -> c_int,
}

/// `cudaGraphEdgeData`.
#[cfg(feature = "cudarc")]
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct EdgeData {
    from_port: u8,
    to_port: u8,
    kind: u8,
    reserved: [u8; 5],
}

#[cfg(feature = "cudarc")]
impl Graphs {
    /// # Safety
    /// `library` must be libcudart.so.13.
    unsafe fn resolve(library: &Library) -> Result<Self> {
        // SAFETY: the caller's promise; the types are those of cuda_runtime_api.h.
        unsafe {
            Ok(Self {
                edges: library.symbol(c"cudaGraphGetEdges")?,
                capture_info: library.symbol(c"cudaStreamGetCaptureInfo")?,
            })
        }
    }
}

/// That one node of a graph waits for another, by CUDA's handles.
#[cfg(feature = "cudarc")]
#[derive(Debug, Clone, Copy)]
pub(crate) struct GraphEdge {
    pub(crate) from: usize,
    pub(crate) to: usize,
    /// Whether it may start before the other has ended.
    pub(crate) programmatic: bool,
}

#[cfg(any(feature = "cudarc", feature = "compute"))]
impl Kernels {
    /// # Safety
    /// `library` must be libcudart.so.13.
    unsafe fn resolve(library: &Library) -> Result<Self> {
        // SAFETY: the caller's promise; the types are those of cuda_runtime_api.h.
        unsafe {
            Ok(Self {
                load: library.symbol(c"cudaLibraryLoadData")?,
                get: library.symbol(c"cudaLibraryGetKernel")?,
                attributes: library.symbol(c"cudaFuncGetAttributes")?,
                #[cfg(all(feature = "cudarc", feature = "compute"))]
                set_attribute: library.symbol(c"cudaFuncSetAttribute").ok(),
                launch: library.symbol(c"cudaLaunchKernel")?,
                launch_with: library.symbol(c"cudaLaunchKernelExC").ok(),
            })
        }
    }
}

impl Memory {
    /// # Safety
    /// `library` must be libcudart.so.13.
    unsafe fn resolve(library: &Library) -> Result<Self> {
        // SAFETY: the caller's promise; the types are those of cuda_runtime_api.h.
        unsafe {
            Ok(Self {
                malloc: library.symbol(c"cudaMalloc")?,
                free: library.symbol(c"cudaFree")?,
                memcpy: library.symbol(c"cudaMemcpy")?,
                memcpy_async: library.symbol(c"cudaMemcpyAsync")?,
                memset_async: library.symbol(c"cudaMemsetAsync")?,
            })
        }
    }
}

impl LastError {
    /// # Safety
    /// `library` must be libcudart.so.13.
    unsafe fn resolve(library: &Library) -> Result<Self> {
        // SAFETY: the caller's promise; the types are those of cuda_runtime_api.h.
        unsafe {
            Ok(Self {
                peek_at_last_error: library.symbol(c"cudaPeekAtLastError")?,
                get_last_error: library.symbol(c"cudaGetLastError")?,
            })
        }
    }
}

impl CaptureState {
    /// # Safety
    /// `library` must be libcudart.so.13.
    unsafe fn resolve(library: &Library) -> Result<Self> {
        // SAFETY: the caller's promise; the types are those of cuda_runtime_api.h.
        unsafe {
            Ok(Self {
                stream_is_capturing: library.symbol(c"cudaStreamIsCapturing")?,
                thread_exchange_stream_capture_mode: library.symbol(c"cudaThreadExchangeStreamCaptureMode")?,
            })
        }
    }
}

impl Cudart {
    /// # Safety
    /// `library` must be libcudart.so.13.
    pub(crate) unsafe fn resolve(library: &Library) -> Result<Self> {
        // SAFETY: the caller says that the library is CUDA's runtime; the types are those of cuda_runtime_api.h.
        unsafe {
            Ok(Self {
                driver_get_version: library.symbol(c"cudaDriverGetVersion")?,
                get_device_count: library.symbol(c"cudaGetDeviceCount")?,
                get_device: library.symbol(c"cudaGetDevice")?,
                set_device: library.symbol(c"cudaSetDevice")?,
                device_get_attribute: library.symbol(c"cudaDeviceGetAttribute")?,
                get_error_string: library.symbol(c"cudaGetErrorString")?,
                graph_exec_update: library.symbol(c"cudaGraphExecUpdate").ok(),
                memory: Memory::resolve(library).ok(),
                last_error: LastError::resolve(library).ok(),
                capture_state: CaptureState::resolve(library).ok(),
                stream_synchronize: library.symbol(c"cudaStreamSynchronize").ok(),
                #[cfg(any(feature = "cudarc", feature = "compute"))]
                kernels: Kernels::resolve(library).ok(),
                #[cfg(feature = "cudarc")]
                graphs: Graphs::resolve(library).ok(),
            })
        }
    }

    /// How many GPUs this process sees; an error where there is no driver, or one too old.
    pub(crate) fn device_count(&self) -> Result<c_int> {
        // SAFETY: both functions write one int through a pointer that is valid for the call.
        let driver = self.out("cudaDriverGetVersion", |out| unsafe { (self.driver_get_version)(out) })?;
        if driver == 0 {
            return Err(FlashInferError::DriverMissing { reason: "CUDA's runtime finds none".to_owned() });
        }
        if driver < NEEDED_DRIVER {
            return Err(FlashInferError::DriverTooOld { found: release(driver), needed: release(NEEDED_DRIVER) });
        }
        // SAFETY: as above.
        match self.out("cudaGetDeviceCount", |out| unsafe { (self.get_device_count)(out) }) {
            Err(FlashInferError::Cuda { code: NO_DEVICE, .. }) => Ok(0),
            other => other,
        }
    }

    /// A GPU's compute capability, major and minor.
    pub(crate) fn compute_capability(&self, device: c_int) -> Result<(c_int, c_int)> {
        Ok((self.attribute(CAPABILITY[0], device)?, self.attribute(CAPABILITY[1], device)?))
    }

    /// What a GPU has that some kernels are launched by.
    pub(crate) fn limits(&self, device: c_int) -> Result<Limits> {
        Ok(Limits {
            shared_memory: self.attribute(SHARED_MEMORY, device)?.into(),
            multiprocessors: self.attribute(MULTIPROCESSORS, device)?.into(),
        })
    }

    fn attribute(&self, attribute: c_int, device: c_int) -> Result<c_int> {
        // SAFETY: one int is written through a pointer that is valid for the call.
        self.out("cudaDeviceGetAttribute", |out| unsafe { (self.device_get_attribute)(out, attribute, device) })
    }

    /// The CUDA release that the driver supports.
    pub(crate) fn driver_release(&self) -> Result<String> {
        // SAFETY: one int is written through a pointer that is valid for the call.
        self.out("cudaDriverGetVersion", |out| unsafe { (self.driver_get_version)(out) }).map(release)
    }

    /// Queues a copy of `bytes` between places on the current device; without a source it writes zeros.
    ///
    /// # Safety
    /// Both must be device memory of that size that stays valid until the stream has come so far, and `stream` a live
    /// stream of that device.
    pub(crate) unsafe fn fill(
        &self,
        to: *mut c_void,
        from: Option<*const c_void>,
        bytes: usize,
        stream: *mut c_void,
    ) -> Result<()> {
        let memory = self.memory()?;
        if let Some(from) = from {
            // SAFETY: the caller's promise.
            let code = unsafe { (memory.memcpy_async)(to, from, bytes, COPY, stream) };
            return self.check("cudaMemcpyAsync", code);
        }
        // SAFETY: the caller's promise.
        let code = unsafe { (memory.memset_async)(to, 0, bytes, stream) };
        self.check("cudaMemsetAsync", code)
    }

    /// Forgets an error that some other call left on this thread, so that it is not taken for a kernel's: a kernel's wrapper
    /// may ask for the last error after its launch, whoever made it.
    #[inline]
    pub(crate) fn forget_stale_error(&self) {
        let Some(last) = self.last_error else { return };
        // SAFETY: both functions take nothing and answer a number.
        unsafe {
            if (last.peek_at_last_error)() != 0 {
                (last.get_last_error)();
            }
        }
    }

    /// The last error of this thread, which it keeps; 0 for none.
    #[inline]
    pub(crate) fn last_error(&self) -> c_int {
        // SAFETY: the function takes nothing and answers a number.
        self.last_error.map_or(0, |last| unsafe { (last.peek_at_last_error)() })
    }

    /// An error by its number.
    #[cold]
    pub(crate) fn error(&self, call: &'static str, code: c_int) -> FlashInferError {
        FlashInferError::Cuda { call, code, message: self.describe(code) }
    }

    /// An error after which nothing runs on the device, with CUDA's words for it.
    pub(crate) fn as_sticky(&self, code: c_int) -> Option<(c_int, String)> {
        is_sticky(code).then(|| (code, self.describe(code)))
    }

    /// Changes what can be launched into what was captured; whether CUDA could.
    ///
    /// By the runtime, since cudarc has the driver's function only where it was built for CUDA 12 or newer.
    #[cfg(feature = "cudarc")]
    pub(crate) fn update_graph(&self, executable: *mut c_void, graph: *mut c_void) -> Result<bool> {
        let Some(update) = self.graph_exec_update else { return Ok(false) };
        let mut why = [0; 3];
        // SAFETY: both handles are live, which their owners see to, and the runtime's are the driver's; the reason is
        // written through a pointer that is valid for the call, to three words: a number and two handles.
        match unsafe { update(executable, graph, &mut why) } {
            0 => Ok(true),
            GRAPH_EXEC_UPDATE_FAILURE => {
                self.forget_stale_error();
                Ok(false)
            }
            code => self.check("cudaGraphExecUpdate", code).map(|()| false),
        }
    }

    /// The edges of a graph, which must be live.
    #[cfg(feature = "cudarc")]
    pub(crate) fn graph_edges(&self, graph: *mut c_void) -> Result<Vec<GraphEdge>> {
        let graphs = self.graphs()?;
        let (none, mut count) = (ptr::null_mut(), 0);
        // SAFETY: the graph is live, which its owner sees to, and the runtime's handles are the driver's; without places for the
        // edges only their number is answered.
        let code = unsafe { (graphs.edges)(graph, none, none, ptr::null_mut(), &mut count) };
        self.check("cudaGraphGetEdges", code)?;
        let (mut from, mut to, mut data) = (vec![0; count], vec![0; count], vec![EdgeData::default(); count]);
        // SAFETY: as above, with a place for each.
        let code = unsafe { (graphs.edges)(graph, from.as_mut_ptr(), to.as_mut_ptr(), data.as_mut_ptr(), &mut count) };
        self.check("cudaGraphGetEdges", code)?;
        let edges = from.into_iter().zip(to).zip(data);
        Ok(edges.map(|((from, to), data)| GraphEdge { from, to, programmatic: data.kind != 0 }).collect())
    }

    /// The graph that a stream captures, still without an owner; nothing where it captures none.
    #[cfg(feature = "cudarc")]
    #[cfg_attr(not(feature = "compute"), allow(dead_code, reason = "compute graphs compare it with their plans"))]
    pub(crate) fn graph_that_is_captured(&self, stream: *mut c_void) -> Result<Option<*mut c_void>> {
        let graphs = self.graphs()?;
        let (mut status, mut id, mut graph, mut count) = (0, 0, ptr::null_mut(), 0);
        let (mut nodes, mut edges) = (ptr::null(), ptr::null());
        // SAFETY: the stream is live, which its owner sees to; all is written through pointers that are valid for the call.
        let code = unsafe {
            (graphs.capture_info)(stream, &mut status, &mut id, &mut graph, &mut nodes, &mut edges, &mut count)
        };
        self.check("cudaStreamGetCaptureInfo", code)?;
        Ok((status == 1 && !graph.is_null()).then_some(graph))
    }

    #[cfg(feature = "cudarc")]
    fn graphs(&self) -> Result<Graphs> {
        let searched = || vec!["the one in use has no cudaGraphGetEdges of CUDA 13".to_owned()];
        self.graphs.ok_or_else(|| FlashInferError::CudartMissing { searched: searched() })
    }

    /// Kernels by their names, out of PTX that the driver translates for each device on its first launch there. They stay for as
    /// long as the process does.
    #[cfg(any(feature = "cudarc", feature = "compute"))]
    pub(crate) fn load_kernels<const N: usize>(&self, ptx: &'static CStr, names: [&CStr; N]) -> Result<[Kernel; N]> {
        let kernels = self.kernels()?;
        let mut library = ptr::null_mut();
        let (none, nothing) = (ptr::null(), ptr::null_mut());
        self.without_breaking_captures(|| {
            // SAFETY: the code ends with a zero byte; a handle is written through a pointer that is valid for the call; there
            // are no options.
            let code = unsafe { (kernels.load)(&mut library, ptx.as_ptr(), none, nothing, 0, none, nothing, 0) };
            self.check("cudaLibraryLoadData", code)
        })?;
        let mut found = [Kernel(ptr::null_mut()); N];
        for (kernel, name) in found.iter_mut().zip(names) {
            // SAFETY: the library was loaded above and is never unloaded; a handle is written likewise.
            let code = unsafe { (kernels.get)(kernel, library, name.as_ptr()) };
            self.check("cudaLibraryGetKernel", code)?;
        }
        Ok(found)
    }

    /// Translates and loads a kernel for the current device, which its first launch would do otherwise.
    #[cfg(any(feature = "cudarc", feature = "compute"))]
    pub(crate) fn prepare(&self, kernel: Kernel) -> Result<()> {
        let kernels = self.kernels()?;
        let mut attributes = [0; ATTRIBUTES];
        // SAFETY: the kernel is one of `load_kernels`; its attributes are written through a pointer that is valid for the call,
        // to more room than they take.
        let code = self.without_breaking_captures(|| unsafe { (kernels.attributes)(&mut attributes, kernel) });
        self.check("cudaFuncGetAttributes", code)
    }

    /// Lets a kernel's blocks have so many bytes of shared memory on the current device beside what it declares, since without being
    /// asked CUDA gives 48 KiB in all.
    #[cfg(all(feature = "cudarc", feature = "compute"))]
    pub(crate) fn allow_shared(&self, kernel: Kernel, bytes: u32) -> Result<()> {
        /// `cudaFuncAttributeMaxDynamicSharedMemorySize`.
        const MOST_SHARED: c_int = 8;
        let set = self.kernels()?.set_attribute.ok_or_else(|| no_symbol("cudaFuncSetAttribute"))?;
        // SAFETY: the kernel is one of `load_kernels`; a number of bytes that the device has not is an error.
        let code = self.without_breaking_captures(|| unsafe { set(kernel, MOST_SHARED, bytes as c_int) });
        self.check("cudaFuncSetAttribute", code)
    }

    /// Launches a kernel on the current device; CUDA's answer. With programmatic dependent launch it may start before the one
    /// ahead of it has ended.
    ///
    /// # Safety
    /// The kernel must be one of [`load_kernels`](Self::load_kernels), `arguments` pointers to what it takes, each of its type,
    /// which must hold for it, and `stream` a live stream of that device. A kernel that does not wait for the one ahead of it
    /// by itself must not be launched with programmatic dependent launch.
    #[cfg(any(feature = "cudarc", feature = "compute"))]
    pub(crate) unsafe fn launch(
        &self,
        kernel: Kernel,
        Blocks { blocks: [x, y], threads, cluster, shared }: Blocks,
        arguments: &mut [*mut c_void],
        stream: *mut c_void,
        pdl: bool,
    ) -> Result<c_int> {
        /// `cudaLaunchAttributeClusterDimension` and `cudaLaunchAttributeProgrammaticStreamSerialization`.
        const CLUSTER: c_int = 4;
        const MAY_START_EARLY: c_int = 6;
        let (grid, block) = (Dim3 { x, y, z: 1 }, Dim3 { x: threads, y: 1, z: 1 });
        let kernels = self.kernels()?;
        let launch_with = match kernels.launch_with {
            Some(launch_with) if pdl || cluster > 1 => launch_with,
            None if cluster > 1 => return Err(no_symbol("cudaLaunchKernelExC")),
            _ => {
                // SAFETY: the caller's promise; CUDA copies the arguments before it returns.
                let code =
                    unsafe { (kernels.launch)(kernel, grid, block, arguments.as_mut_ptr(), shared as usize, stream) };
                return Ok(code);
            }
        };
        let (mut attributes, mut count) = ([LaunchAttribute { id: 0, pad: 0, value: [0; 16] }; 2], 0);
        if cluster > 1 {
            attributes[count].id = CLUSTER;
            attributes[count].value[..3].copy_from_slice(&[cluster as c_int, 1, 1]);
            count += 1;
        }
        if pdl {
            attributes[count].id = MAY_START_EARLY;
            attributes[count].value[0] = 1;
            count += 1;
        }
        let (shared_memory, count) = (shared as usize, count as u32);
        let config = LaunchConfig { grid, block, shared_memory, stream, attributes: attributes.as_ptr(), count };
        // SAFETY: as above; so does it with the configuration.
        Ok(unsafe { launch_with(&config, kernel, arguments.as_mut_ptr()) })
    }

    #[cfg(any(feature = "cudarc", feature = "compute"))]
    fn kernels(&self) -> Result<Kernels> {
        self.kernels.ok_or_else(|| no_symbol("cudaLibraryLoadData"))
    }

    /// Does what a capture forbids while one of another stream or thread goes on, which relaxed calls do not break.
    pub(crate) fn without_breaking_captures<T>(&self, call: impl FnOnce() -> T) -> T {
        const RELAXED: c_int = 2;
        let mut mode = RELAXED;
        let exchange = |mode: &mut c_int| {
            // SAFETY: one number is exchanged through a pointer that is valid for the call.
            self.capture_state.map_or(0, |capture| unsafe { (capture.thread_exchange_stream_capture_mode)(mode) })
        };
        let exchanged = exchange(&mut mode) == 0;
        let result = call();
        if exchanged {
            exchange(&mut mode);
        }
        result
    }

    /// The error that makes every call on the current device fail from now on, if there is one and asking for it breaks no
    /// capture on this stream.
    pub(crate) fn sticky_error(&self, stream: *mut c_void) -> Option<(c_int, String)> {
        const NOT_CAPTURING: c_int = 0;
        let (memory, capture) = (self.memory.as_ref()?, self.capture_state);
        if let Some(capture) = capture {
            let mut status = NOT_CAPTURING;
            // SAFETY: one number is written through a pointer that is valid for the call.
            let code = unsafe { (capture.stream_is_capturing)(stream, &mut status) };
            if let Some(sticky) = self.as_sticky(code) {
                return Some(sticky);
            }
            if code != 0 || status != NOT_CAPTURING {
                self.forget_stale_error();
                return None;
            }
        }
        // SAFETY: freeing nothing does nothing, but answers what is wrong with the context.
        let code = self.without_breaking_captures(|| unsafe { (memory.free)(ptr::null_mut()) });
        let sticky = self.as_sticky(code);
        self.forget_stale_error();
        sticky
    }

    /// Whether a graph is captured on a stream of the current device; `None` where that cannot be known.
    pub(crate) fn is_capturing(&self, stream: *mut c_void) -> Option<bool> {
        let mut status = 0;
        // SAFETY: one number is written through a pointer that is valid for the call.
        match unsafe { (self.capture_state?.stream_is_capturing)(stream, &mut status) } {
            0 => Some(status != 0),
            _ => {
                self.forget_stale_error();
                None
            }
        }
    }

    /// Copies pieces of the current device's memory to the host, one behind the other, once the stream has come so far.
    ///
    /// # Safety
    /// Each must be memory of that many bytes which the host may read then, and `stream` a live stream of that device, on which
    /// nothing is captured.
    pub(crate) unsafe fn download(
        &self,
        to: &mut [u8],
        pieces: &[(*const u8, usize)],
        stream: *mut c_void,
    ) -> Result<()> {
        let memory = self.memory()?;
        let synchronize = self.stream_synchronize.ok_or_else(|| FlashInferError::CudartMissing {
            searched: vec!["the one in use has no cudaStreamSynchronize".to_owned()],
        })?;
        let result = self.without_breaking_captures(|| {
            let mut rest = &mut *to;
            for &(from, bytes) in pieces {
                let (place, behind) = rest.split_at_mut(bytes);
                rest = behind;
                // SAFETY: the place is of this many bytes, and stays until the stream was waited for; the rest is the caller's
                // promise.
                let code =
                    unsafe { (memory.memcpy_async)(place.as_mut_ptr().cast(), from.cast(), bytes, COPY, stream) };
                if code != 0 {
                    // What was queued before writes to the places still.
                    // SAFETY: the caller's promise for the stream.
                    unsafe { synchronize(stream) };
                    return self.check("cudaMemcpyAsync", code);
                }
            }
            // SAFETY: as above.
            self.check("cudaStreamSynchronize", unsafe { synchronize(stream) })
        });
        if result.is_err() {
            self.forget_stale_error();
        }
        result
    }

    fn describe(&self, code: c_int) -> String {
        // SAFETY: the function answers a static C string for every number.
        unsafe { CStr::from_ptr((self.get_error_string)(code)) }.to_string_lossy().into_owned()
    }

    fn memory(&self) -> Result<Memory> {
        let searched = || vec!["the one in use has no cudaMalloc".to_owned()];
        self.memory.ok_or_else(|| FlashInferError::CudartMissing { searched: searched() })
    }

    /// Memory on the current device with these values.
    pub(crate) fn upload(&'static self, values: &[u8]) -> Result<Buffer> {
        let memory = self.memory()?;
        let (mut pointer, bytes) = (ptr::null_mut(), values.len());
        // SAFETY: one pointer is written through a pointer that is valid for the call.
        self.check("cudaMalloc", unsafe { (memory.malloc)(&mut pointer, bytes) })?;
        let buffer = Buffer { cudart: self, memory, pointer, len: values.len() };
        // SAFETY: both are memory of this many bytes; the call returns when they were copied.
        self.check("cudaMemcpy", unsafe { (memory.memcpy)(pointer, values.as_ptr().cast(), bytes, COPY) })?;
        Ok(buffer)
    }

    /// Makes a device this thread's current one until the guard is dropped.
    pub(crate) fn set_current(&'static self, device: c_int) -> Result<CurrentDevice> {
        // SAFETY: one int is written through a pointer that is valid for the call.
        let before = self.out("cudaGetDevice", |out| unsafe { (self.get_device)(out) })?;
        if before == device {
            return Ok(CurrentDevice { cudart: self, restore: None });
        }
        // SAFETY: any number may be given; one out of range is answered by an error.
        self.check("cudaSetDevice", unsafe { (self.set_device)(device) })?;
        Ok(CurrentDevice { cudart: self, restore: Some(before) })
    }

    fn out(&self, call: &'static str, get: impl FnOnce(*mut c_int) -> c_int) -> Result<c_int> {
        let mut value = 0;
        self.check(call, get(&mut value))?;
        Ok(value)
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        Err(self.error(call, code))
    }
}

/// What a GPU has that some kernels are launched by.
pub(crate) struct Limits {
    /// The bytes of shared memory that a block can have, where its launcher asks for them.
    pub(crate) shared_memory: i64,
    /// How many multiprocessors there are.
    pub(crate) multiprocessors: i64,
}

/// Device memory of the report's own.
pub(crate) struct Buffer {
    cudart: &'static Cudart,
    memory: Memory,
    pointer: *mut c_void,
    len: usize,
}

impl Buffer {
    pub(crate) fn pointer(&self) -> *mut c_void {
        self.pointer
    }

    /// The values, once the null stream has come so far.
    pub(crate) fn download(&self) -> Result<Vec<u8>> {
        let mut values = vec![0; self.len];
        let bytes = values.len();
        // SAFETY: both are memory of this many bytes; the call returns when they were copied.
        let code = unsafe { (self.memory.memcpy)(values.as_mut_ptr().cast(), self.pointer, bytes, COPY) };
        self.cudart.check("cudaMemcpy", code)?;
        Ok(values)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated by the same library, and given up here, once; the call waits for what uses it.
        unsafe { (self.memory.free)(self.pointer) };
    }
}

/// A GPU's name, from the driver.
pub(crate) fn device_name(device: c_int) -> Option<String> {
    // SAFETY: only looked for among what is loaded: with a GPU that was counted, the driver is.
    let driver = unsafe { Library::by_name("libcuda.so.1", true) }.ok()?;
    let mut name = [0u8; 256];
    // SAFETY: the types are those of cuda.h; the driver is initialized by then, and the name ends with a zero byte.
    unsafe {
        let get: unsafe extern "C" fn(*mut c_int, c_int) -> c_int = driver.symbol(c"cuDeviceGet").ok()?;
        let get_name: unsafe extern "C" fn(*mut u8, c_int, c_int) -> c_int = driver.symbol(c"cuDeviceGetName").ok()?;
        let mut handle = 0;
        if get(&mut handle, device) != 0 || get_name(name.as_mut_ptr(), name.len() as c_int, handle) != 0 {
            return None;
        }
    }
    let name = CStr::from_bytes_until_nul(&name).ok()?.to_string_lossy().into_owned();
    (!name.is_empty()).then_some(name)
}

/// Gives a thread its current device back.
pub(crate) struct CurrentDevice {
    cudart: &'static Cudart,
    restore: Option<c_int>,
}

impl Drop for CurrentDevice {
    fn drop(&mut self) {
        if let Some(device) = self.restore {
            // SAFETY: the device was current before, so it is in range.
            unsafe { (self.cudart.set_device)(device) };
        }
    }
}

/// That CUDA's runtime is too old.
#[cfg(any(feature = "cudarc", feature = "compute"))]
fn no_symbol(symbol: &str) -> FlashInferError {
    FlashInferError::CudartMissing { searched: vec![format!("the one in use has no {symbol}")] }
}

/// CUDA writes 13.0 as 13000.
fn release(version: c_int) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}
