//! What allocates the tensors that a function makes: workspaces, and what it returns.

use std::alloc;
use std::cell::Cell;
use std::ffi::{CString, c_char, c_int, c_void};
use std::fmt;
use std::ptr::NonNull;

use super::contain::contained;
use super::tensor::{DlpackTensor, contiguous};
use crate::error::{FlashInferError, Result};
use crate::ffi::api::Api;
use crate::ffi::dlpack::{Allocator, DLDataType, DLManagedTensorVersioned, DLTensor, SetError};
use crate::runtime::FlashInferRuntime;
use crate::tensor::{DType, Device, MAX_NDIM};

/// What a function asks for.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct TensorRequest<'a> {
    /// Where the memory is to be.
    pub device: Device,
    /// How many bytes the tensor takes, contiguous.
    pub bytes: usize,
    /// The element type; `None` for one that this crate has no name for.
    pub dtype: Option<DType>,
    /// The sizes.
    pub shape: &'a [i64],
}

/// Memory with what owns it, as one [request](TensorRequest) asked for it.
pub struct Memory {
    data: *mut c_void,
    device: Device,
    bytes: usize,
    owner: Box<dyn Send>,
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { data, device, bytes, .. } = self;
        write!(f, "Memory({bytes} bytes on {device} at {data:p})")
    }
}

impl Memory {
    /// Memory for what `request` asks, which `owner` owns. That is dropped by whoever gives up the last reference to the
    /// tensor, on any thread.
    ///
    /// # Safety
    /// `data` must be memory on the device and of the size that `request` names, initialized where it is on the host, aligned
    /// to 256 bytes unless the function that asks is content with less, and used by nothing else, for as long as `owner` is
    /// there. On a GPU it must be usable on the stream of the call, and dropping `owner` must be ordered behind that.
    pub unsafe fn new(request: &TensorRequest<'_>, data: *mut c_void, owner: impl Send + 'static) -> Self {
        Self { data, device: request.device, bytes: request.bytes, owner: Box::new(owner) }
    }
}

/// Allocates the tensors that functions make: see [`FlashInferRuntime::with_allocator`].
pub trait TensorAllocator {
    /// Memory for a tensor. What was made for another request serves where it is on the device and large enough.
    ///
    /// # Errors
    /// Whatever stands in the way. The function that asked raises it.
    fn allocate(&self, request: &TensorRequest<'_>) -> Result<Memory>;
}

/// Allocates on the host, zeros aligned to 256 bytes.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostAllocator;

impl TensorAllocator for HostAllocator {
    fn allocate(&self, request: &TensorRequest<'_>) -> Result<Memory> {
        if request.device != Device::Cpu {
            return Err(elsewhere(request, "the host, where HostAllocator allocates"));
        }
        let Some(memory) = HostMemory::zeroed(request.bytes) else {
            return Err(refused("bytes", request.bytes.to_string(), "as much as the host has".to_owned()));
        };
        // SAFETY: fresh memory of that size, which is freed when it is dropped.
        Ok(unsafe { Memory::new(request, memory.pointer(), memory) })
    }
}

fn elsewhere(request: &TensorRequest<'_>, expected: &str) -> FlashInferError {
    refused("device", request.device.to_string(), expected.to_owned())
}

fn refused(argument: &'static str, found: String, expected: String) -> FlashInferError {
    FlashInferError::InvalidArgument { function: "allocating a tensor", argument, found, expected }
}

/// Zeros on the host.
pub(super) struct HostMemory {
    pointer: NonNull<u8>,
    layout: alloc::Layout,
}

// SAFETY: it is memory that nothing else refers to.
unsafe impl Send for HostMemory {}

/// What kernels and libraries of tensors rely on at the most.
const ALIGNMENT: usize = 256;

impl HostMemory {
    pub(super) fn zeroed(bytes: usize) -> Option<Self> {
        let layout = alloc::Layout::from_size_align(bytes.max(1), ALIGNMENT).ok()?;
        // SAFETY: the size is not zero.
        let pointer = NonNull::new(unsafe { alloc::alloc_zeroed(layout) })?;
        Some(Self { pointer, layout })
    }

    pub(super) fn pointer(&self) -> *mut c_void {
        self.pointer.as_ptr().cast()
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and given up here, once.
        unsafe { alloc::dealloc(self.pointer.as_ptr(), self.layout) };
    }
}

thread_local! {
    /// What this thread's innermost scope allocates with.
    static CURRENT: Cell<Option<NonNull<dyn TensorAllocator>>> = const { Cell::new(None) };
}

impl FlashInferRuntime {
    /// Runs `f` with an allocator for the tensors that functions make on this thread meanwhile, in C++ by
    /// `Tensor::FromEnvAlloc`: workspaces and results. Without one such functions raise an error. What was set before comes
    /// back after it, also when `f` panics; tensors that were made may outlive it.
    ///
    /// On a GPU, run it within [`on`](Self::on) of the stream that the allocator allocates on, since functions use the
    /// memory on this thread's stream.
    ///
    /// # Errors
    /// What TVM-FFI raises.
    pub fn with_allocator<T>(&'static self, allocator: &dyn TensorAllocator, f: impl FnOnce() -> T) -> Result<T> {
        let api = self.api();
        // SAFETY: only the lifetime is taken off. The guard puts the one before back, before the reference ends.
        let current = unsafe {
            std::mem::transmute::<NonNull<dyn TensorAllocator + '_>, NonNull<dyn TensorAllocator>>(NonNull::from(
                allocator,
            ))
        };
        let before = api.allocator();
        api.set_allocator(Some(allocate))?;
        let _restore = Restore { api, before, current: CURRENT.replace(Some(current)) };
        Ok(f())
    }
}

/// Does something with the allocator of this thread's innermost scope.
#[cfg(feature = "bench")]
pub(crate) fn with_current<T>(f: impl FnOnce(&dyn TensorAllocator) -> Result<T>) -> Result<T> {
    match CURRENT.get() {
        // SAFETY: the scope that set it is still there, since it puts the one before back when it ends.
        Some(allocator) => f(unsafe { allocator.as_ref() }),
        None => Err(no_allocator()),
    }
}

fn no_allocator() -> FlashInferError {
    refused("allocator", "none".to_owned(), "a call within with_allocator".to_owned())
}

/// Gives a thread its allocator back.
struct Restore {
    api: &'static Api,
    before: Option<Allocator>,
    current: Option<NonNull<dyn TensorAllocator>>,
}

impl Drop for Restore {
    fn drop(&mut self) {
        CURRENT.set(self.current);
        // Setting one never fails; where it did, the one that stays answers an error once it finds none of this crate's.
        let _ = self.api.set_allocator(self.before);
    }
}

/// What TVM-FFI asks for a tensor.
///
/// # Safety
/// DLPack's convention: a prototype with device, type and shape, a place for what is made, and how to report an error.
unsafe extern "C" fn allocate(
    prototype: *mut DLTensor,
    out: *mut *mut DLManagedTensorVersioned,
    context: *mut c_void,
    set_error: SetError,
) -> c_int {
    // An error is the allocator's own as well, which may panic where it is written or dropped.
    let made = contained(|| {
        // SAFETY: the caller's promise.
        unsafe { make(&*prototype) }.map_err(|error| match error {
            FlashInferError::InvalidArgument { .. } => (c"ValueError", error.to_string()),
            _ => (c"RuntimeError", error.to_string()),
        })
    });
    let (kind, message) = match made {
        Ok(Ok(managed)) => {
            // SAFETY: the caller's promise.
            unsafe { out.write(managed) };
            return 0;
        }
        Ok(Err(raised)) => raised,
        Err(text) => {
            let text = text.as_deref().unwrap_or("without a message");
            (c"InternalError", format!("the allocator panicked: {text}"))
        }
    };
    let message = CString::new(message.replace('\0', " ")).unwrap_or_default();
    let report: unsafe extern "C" fn(*mut c_void, *const c_char, *const c_char) = set_error;
    // SAFETY: the caller's promise; both are C strings, which are copied.
    unsafe { report(context, kind.as_ptr(), message.as_ptr()) };
    -1
}

/// # Safety
/// The prototype must have as many sizes as dimensions.
unsafe fn make(prototype: &DLTensor) -> Result<*mut DLManagedTensorVersioned> {
    let DLTensor { device, ndim, dtype, shape, .. } = *prototype;
    let Some(allocator) = CURRENT.get() else {
        return Err(no_allocator());
    };
    let Some(known) = Device::from_dl(device) else {
        let found = format!("DLPack device type {}, number {}", device.device_type, device.device_id);
        return Err(refused("device", found, "the host or a CUDA device".to_owned()));
    };
    let shape: &[i64] = match usize::try_from(ndim) {
        Ok(0) => &[],
        // SAFETY: the caller's promise.
        Ok(ndim) => unsafe { std::slice::from_raw_parts(shape, ndim) },
        Err(_) => return Err(too_many_dimensions(&ndim)),
    };
    // SAFETY: the scope that set it is still there, since it puts the one before back when it ends.
    let allocator = unsafe { allocator.as_ref() };
    Ok(allocated(allocator, known, dtype, shape)?.into_raw().cast())
}

fn too_many_dimensions(ndim: &dyn fmt::Display) -> FlashInferError {
    refused("shape", format!("of {ndim} dimensions"), format!("at most {MAX_NDIM} dimensions"))
}

/// A tensor in memory of an allocator's.
pub(super) fn allocated(
    allocator: &dyn TensorAllocator,
    device: Device,
    dtype: DLDataType,
    shape: &[i64],
) -> Result<DlpackTensor> {
    if shape.len() > MAX_NDIM {
        return Err(too_many_dimensions(&shape.len()));
    }
    let bits = u64::from(dtype.bits) * u64::from(dtype.lanes);
    let elements = crate::tensor::numel(shape).and_then(|count| u64::try_from(count).ok());
    let bytes = elements.and_then(|count| count.checked_mul(bits)).map(|bits| bits.div_ceil(8));
    let Some(bytes) = bytes.and_then(|bytes| usize::try_from(bytes).ok()) else {
        return Err(refused("shape", format!("{shape:?}"), "sizes that are not negative and fit memory".to_owned()));
    };
    let request = TensorRequest { device, bytes, dtype: DType::from_dl(dtype), shape };
    let memory = allocator.allocate(&request)?;
    // A request can be copied and changed, and what was made for one can be answered to another.
    if memory.device != device || memory.bytes < bytes {
        let found = format!("{memory:?}, which was made for another request");
        return Err(refused("memory", found, format!("{bytes} bytes on {device}, as the request says")));
    }
    let Memory { data, owner, .. } = memory;
    // SAFETY: the memory is valid for as long as its owner is there, by whoever made it.
    Ok(unsafe { contiguous(owner, data, device, dtype, shape) })
}

#[cfg(feature = "cudarc")]
pub use gpu::{ArenaAllocator, StreamAllocator};

#[cfg(feature = "cudarc")]
mod gpu {
    use std::cell::Cell;
    use std::sync::Arc;

    use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};

    use super::{ALIGNMENT, HostAllocator, Memory, TensorAllocator, TensorRequest, elsewhere, refused};
    use crate::buffers::{check_context, device};
    use crate::error::{Result, driver_in};
    use crate::ffi::api::Api;
    use crate::owner::{CurrentContext, no_error_is_kept, refuse_capture};
    use crate::tensor::Device;

    /// Allocates on a GPU in the order of a stream, and on the host as [`HostAllocator`]. The memory is freed on the
    /// same stream, behind what was queued there by then. So it is for functions that work on that stream, by
    /// [`FlashInferRuntime::on`](crate::FlashInferRuntime::on), and an error for others.
    #[derive(Debug, Clone)]
    pub struct StreamAllocator {
        stream: Arc<CudaStream>,
    }

    impl StreamAllocator {
        /// An allocator for what runs on this stream.
        pub fn new(stream: &Arc<CudaStream>) -> Self {
            Self { stream: Arc::clone(stream) }
        }
    }

    impl TensorAllocator for StreamAllocator {
        fn allocate(&self, request: &TensorRequest<'_>) -> Result<Memory> {
            if request.device == Device::Cpu {
                return HostAllocator.allocate(request);
            }
            let context = self.stream.context();
            if request.device != device(context) {
                return Err(elsewhere(request, &format!("{}, the stream's", device(context))));
            }
            // Memory of this stream is not there yet for another, and freed while that still uses it.
            let id = i32::try_from(context.ordinal()).unwrap_or(i32::MAX);
            let (thread, own) = (Api::loaded()?.stream(id), self.stream.cu_stream());
            if thread != own.cast() {
                let expected = format!("the allocator's, {own:p}: call within FlashInferRuntime::on of it");
                return Err(refused("stream", format!("{thread:p}, this thread's for {}", request.device), expected));
            }
            let _context = CurrentContext::bind(context)?;
            // Memory that is allocated in a capture is the graph's and is there only while it runs: an arena is for that.
            refuse_capture("allocating a tensor", &self.stream)?;
            no_error_is_kept(context)?;
            let doing = driver_in(context, "allocating a tensor");
            // SAFETY: what is there at first is nobody's secret, and whoever asked writes it.
            let mut buffer = unsafe { self.stream.alloc::<u8>(request.bytes.max(1)) }.map_err(doing)?;
            let data = {
                let (address, _guard) = buffer.device_ptr_mut(&self.stream);
                address as *mut std::ffi::c_void
            };
            // SAFETY: fresh memory of that size, which cudarc frees in the stream's order.
            Ok(unsafe { Memory::new(request, data, buffer) })
        }
    }

    /// Allocates out of one buffer on a GPU, each tensor behind the last, none of it twice: for calls that a graph captures,
    /// which must find the same memory whenever the graph runs. Keep the arena, or a tensor that was made of it, for as long
    /// as the graph, and until what uses it on another stream than the buffer's has run: there it is freed.
    #[derive(Debug)]
    pub struct ArenaAllocator {
        buffer: Arc<CudaSlice<u8>>,
        start: u64,
        used: Cell<usize>,
    }

    impl ArenaAllocator {
        /// An arena of this buffer. On its stream it is there once what was queued before has run.
        ///
        /// # Errors
        /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for a buffer of a context that is not its device's
        /// primary one, or whose stream captures already.
        pub fn new(buffer: CudaSlice<u8>) -> Result<Self> {
            let stream = Arc::clone(buffer.stream());
            check_context("ArenaAllocator::new", "buffer", stream.context(), stream.context())?;
            let _context = CurrentContext::bind(stream.context())?;
            refuse_capture("ArenaAllocator::new", &stream)?;
            let (start, guard) = buffer.device_ptr(&stream);
            drop(guard);
            Ok(Self { buffer: Arc::new(buffer), start, used: Cell::new(0) })
        }

        /// How many bytes were given out, with what lies between them.
        pub fn used(&self) -> usize {
            self.used.get()
        }
    }

    impl TensorAllocator for ArenaAllocator {
        fn allocate(&self, request: &TensorRequest<'_>) -> Result<Memory> {
            let own = device(self.buffer.stream().context());
            if request.device != own {
                return Err(elsewhere(request, &format!("{own}, the arena's")));
            }
            let place = (self.start as usize + self.used.get()).next_multiple_of(ALIGNMENT) - self.start as usize;
            let end = place.checked_add(request.bytes).filter(|&end| end <= self.buffer.len());
            let Some(end) = end else {
                let left = self.buffer.len().saturating_sub(place);
                return Err(refused("bytes", request.bytes.to_string(), format!("at most the {left} that are left")));
            };
            self.used.set(end);
            let data = (self.start as usize + place) as *mut std::ffi::c_void;
            // SAFETY: a part of the buffer that is given out once; the buffer is there for as long as anyone holds it.
            Ok(unsafe { Memory::new(request, data, Arc::clone(&self.buffer)) })
        }
    }
}
