//! `libtvm_ffi.so`'s symbols, and the few things done with them directly: releasing objects, reading errors, setting a
//! thread's stream.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use super::abi::{Any, ByteArray, ErrorCell, Object, SafeCall, Version};
use super::dlpack::{self, Allocator, DLManagedTensor, DLManagedTensorVersioned, DLTensor};
use crate::error::{FlashInferError, Result};
use crate::loader::Library;

/// `TVMFFIErrorCreateWithCauseAndExtraContext`: kind, message, backtrace, cause, context, what is made.
pub(super) type CreateWithCause = unsafe extern "C" fn(
    *const ByteArray,
    *const ByteArray,
    *const ByteArray,
    *mut Object,
    *mut Object,
    *mut *mut Object,
) -> c_int;

/// TVM-FFI's functions, resolved once.
#[derive(Clone, Copy)]
pub(crate) struct Api {
    get_version: unsafe extern "C" fn(*mut Version),
    object_inc_ref: unsafe extern "C" fn(*mut Object) -> c_int,
    object_dec_ref: unsafe extern "C" fn(*mut Object) -> c_int,
    error_move_from_raised: unsafe extern "C" fn(*mut *mut Object),
    error_set_raised_from_c_str: unsafe extern "C" fn(*const c_char, *const c_char),
    env_set_stream: unsafe extern "C" fn(i32, i32, *mut c_void, *mut *mut c_void) -> c_int,
    #[cfg(any(feature = "cudarc", feature = "compute"))]
    env_get_stream: unsafe extern "C" fn(i32, i32) -> *mut c_void,
    pub(super) tensor_from_dlpack:
        unsafe extern "C" fn(*mut DLManagedTensorVersioned, i32, i32, *mut *mut Object) -> c_int,
    pub(super) tensor_from_dlpack_unversioned:
        unsafe extern "C" fn(*mut DLManagedTensor, i32, i32, *mut *mut Object) -> c_int,
    pub(super) tensor_to_dlpack: unsafe extern "C" fn(*mut Object, *mut *mut DLManagedTensorVersioned) -> c_int,
    pub(super) tensor_to_dlpack_unversioned: unsafe extern "C" fn(*mut Object, *mut *mut DLManagedTensor) -> c_int,
    pub(super) any_view_to_owned_any: unsafe extern "C" fn(*const Any, *mut Any) -> c_int,
    pub(super) string_from_byte_array: unsafe extern "C" fn(*const ByteArray, *mut Any) -> c_int,
    pub(super) bytes_from_byte_array: unsafe extern "C" fn(*const ByteArray, *mut Any) -> c_int,
    pub(super) error_create:
        unsafe extern "C" fn(*const ByteArray, *const ByteArray, *const ByteArray, *mut *mut Object) -> c_int,
    /// From 0.1.8 on.
    pub(super) error_create_with_cause: Option<CreateWithCause>,
    pub(super) error_set_raised: unsafe extern "C" fn(*mut Object),
    pub(super) function_create: unsafe extern "C" fn(
        *mut c_void,
        SafeCall,
        Option<unsafe extern "C" fn(*mut c_void)>,
        *mut *mut Object,
    ) -> c_int,
    pub(super) function_get_global: unsafe extern "C" fn(*const ByteArray, *mut *mut Object) -> c_int,
    pub(super) function_set_global: unsafe extern "C" fn(*const ByteArray, *mut Object, c_int) -> c_int,
    pub(super) type_key_to_index: unsafe extern "C" fn(*const ByteArray, *mut i32) -> c_int,
    pub(super) get_allocator: unsafe extern "C" fn() -> Option<Allocator>,
    pub(super) set_allocator: unsafe extern "C" fn(Option<Allocator>, c_int, *mut Option<Allocator>) -> c_int,
}

/// The functions of the libtvm_ffi.so in use, for objects, which have no room for a pointer to them.
static LOADED: OnceLock<Api> = OnceLock::new();

/// Held while TVM-FFI's tables of functions and types are read or written, for which it has no lock.
static TABLES: Mutex<()> = Mutex::new(());

/// From this release on an error has a cause, behind what errors had before.
const CAUSES_SINCE: (u32, u32, u32) = (0, 1, 8);
const CAUSE_OFFSET: usize = 80;

/// An object with more references is given no further one: the count has 32 bits.
const MOST_REFERENCES: u32 = 1 << 31;

#[cold]
fn too_many_references() -> ! {
    panic!(
        "an object has more references than the 2147483648 that can be counted safely: something makes and forgets them"
    )
}

/// A chain of causes that goes on is cut off here.
pub(crate) const LONGEST_CHAIN: usize = 32;

/// Where the library or program that holds this address was loaded.
#[cfg(unix)]
fn image_of(address: usize) -> Option<usize> {
    // SAFETY: plain data, for which zeros are valid.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: any address may be asked for; what is written goes to valid memory of its type.
    let found = unsafe { libc::dladdr(ptr::without_provenance(address), &mut info) };
    (found != 0).then(|| info.dli_fbase.addr())
}

/// No library is ever loaded there.
#[cfg(not(unix))]
fn image_of(_: usize) -> Option<usize> {
    None
}

/// A symbol whose address shows which libtvm_ffi.so other libraries bind to.
pub(crate) const LANDMARK: &CStr = c"TVMFFIEnvSetStream";

impl Api {
    /// # Safety
    /// `library` must be TVM-FFI's.
    pub(crate) unsafe fn resolve(library: &Library) -> Result<Self> {
        // SAFETY: the caller says that the library is TVM-FFI's; the types are those of its headers.
        unsafe {
            Ok(Self {
                get_version: library.symbol(c"TVMFFIGetVersion")?,
                object_inc_ref: library.symbol(c"TVMFFIObjectIncRef")?,
                object_dec_ref: library.symbol(c"TVMFFIObjectDecRef")?,
                error_move_from_raised: library.symbol(c"TVMFFIErrorMoveFromRaised")?,
                error_set_raised_from_c_str: library.symbol(c"TVMFFIErrorSetRaisedFromCStr")?,
                env_set_stream: library.symbol(LANDMARK)?,
                #[cfg(any(feature = "cudarc", feature = "compute"))]
                env_get_stream: library.symbol(c"TVMFFIEnvGetStream")?,
                tensor_from_dlpack: library.symbol(c"TVMFFITensorFromDLPackVersioned")?,
                tensor_from_dlpack_unversioned: library.symbol(c"TVMFFITensorFromDLPack")?,
                tensor_to_dlpack: library.symbol(c"TVMFFITensorToDLPackVersioned")?,
                tensor_to_dlpack_unversioned: library.symbol(c"TVMFFITensorToDLPack")?,
                any_view_to_owned_any: library.symbol(c"TVMFFIAnyViewToOwnedAny")?,
                string_from_byte_array: library.symbol(c"TVMFFIStringFromByteArray")?,
                bytes_from_byte_array: library.symbol(c"TVMFFIBytesFromByteArray")?,
                error_create: library.symbol(c"TVMFFIErrorCreate")?,
                error_create_with_cause: library.symbol(c"TVMFFIErrorCreateWithCauseAndExtraContext").ok(),
                error_set_raised: library.symbol(c"TVMFFIErrorSetRaised")?,
                function_create: library.symbol(c"TVMFFIFunctionCreate")?,
                function_get_global: library.symbol(c"TVMFFIFunctionGetGlobal")?,
                function_set_global: library.symbol(c"TVMFFIFunctionSetGlobal")?,
                type_key_to_index: library.symbol(c"TVMFFITypeKeyToIndex")?,
                get_allocator: library.symbol(c"TVMFFIEnvGetDLPackManagedTensorAllocator")?,
                set_allocator: library.symbol(c"TVMFFIEnvSetDLPackManagedTensorAllocator")?,
            })
        }
    }

    /// From now on objects are those of this library. The first one that is kept stays.
    pub(crate) fn keep(self) -> &'static Self {
        LOADED.get_or_init(|| self)
    }

    /// The functions of the library in use.
    ///
    /// # Errors
    /// [`NotInitialized`](FlashInferError::NotInitialized).
    #[inline]
    pub(crate) fn loaded() -> Result<&'static Self> {
        match LOADED.get() {
            Some(api) => Ok(api),
            None => Err(FlashInferError::NotInitialized),
        }
    }

    /// This thread's turn with TVM-FFI's tables of functions and types.
    pub(crate) fn tables() -> MutexGuard<'static, ()> {
        TABLES.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The address behind [`LANDMARK`].
    pub(crate) fn landmark(&self) -> usize {
        self.env_set_stream as usize
    }

    pub(crate) fn version(&self) -> Version {
        let mut version = Version::default();
        // SAFETY: the out pointer is valid for the call, which is all the function asks.
        unsafe { (self.get_version)(&mut version) };
        version
    }

    /// # Safety
    /// `object` must be a live object.
    ///
    /// # Panics
    /// As [`counted`](Self::counted).
    #[inline]
    pub(crate) unsafe fn retain(&self, object: *mut Object) {
        // SAFETY: the caller's promise.
        unsafe {
            (self.object_inc_ref)(object);
            self.counted(object);
        }
    }

    /// How many references to an object there are at this moment.
    ///
    /// # Safety
    /// `object` must be a live object.
    #[inline]
    pub(crate) unsafe fn references(object: *mut Object) -> u32 {
        // SAFETY: the caller's promise; the count is the first of its fields, aligned, and only accessed atomically.
        let count = unsafe { AtomicU64::from_ptr(&raw mut (*object).combined_ref_count) };
        // The lower half counts the strong ones.
        count.load(Ordering::Relaxed) as u32
    }

    /// That a reference that was just made is not one of more than can be counted: TVM-FFI does not look, and once the count
    /// is 0 again the object would be released while it is in use. As far from that as `Arc` keeps.
    ///
    /// # Safety
    /// The caller must own one reference to `object`, and gives it up where this panics.
    ///
    /// # Panics
    /// For more than 2³¹ references, which a program has that forgets them.
    #[inline]
    pub(crate) unsafe fn counted(&self, object: *mut Object) {
        // SAFETY: the caller's promise.
        if unsafe { Self::references(object) } > MOST_REFERENCES {
            // SAFETY: the caller's promise.
            unsafe { self.release(object) };
            too_many_references();
        }
    }

    /// # Safety
    /// The caller must own one reference to `object`, and gives it up.
    pub(crate) unsafe fn release(&self, object: *mut Object) {
        // SAFETY: the caller's promise.
        unsafe { (self.object_dec_ref)(object) };
    }

    /// Takes the error that a function which answered `code` raised on this thread.
    #[cold]
    pub(crate) fn take_error(&self, function: &str, code: c_int) -> FlashInferError {
        let mut raised: *mut Object = ptr::null_mut();
        // Whatever the code is: what stayed would be taken for the error of a later call.
        // SAFETY: the out pointer is valid for the call; what comes is null or an error object that we then own.
        unsafe { (self.error_move_from_raised)(&mut raised) };
        if raised.is_null() {
            let kind = if code == -2 { "FrontendError" } else { "MissingError" };
            return FlashInferError::TvmFfiCall {
                function: function.to_owned(),
                kind: kind.to_owned(),
                message: format!("the function answered {code} without an error object"),
                backtrace: String::new(),
                cause: None,
            };
        }
        // SAFETY: what was raised is a live error object, which is owned here and released once, after it was read.
        unsafe {
            let error = self.read_error(raised, function);
            self.release(raised);
            error
        }
    }

    /// An error object's texts, with those of its causes where it has them.
    ///
    /// # Safety
    /// It must be a live error object.
    pub(crate) unsafe fn read_error(&self, error: *mut Object, function: &str) -> FlashInferError {
        let mut causes = Vec::new();
        let mut next = error;
        while !next.is_null() && causes.len() < LONGEST_CHAIN {
            causes.push(next);
            // SAFETY: the caller's promise; a cause lives as long as the error that it belongs to.
            next = unsafe { self.cause(next) };
        }
        let mut inner = None;
        for &error in causes.iter().rev() {
            // SAFETY: an error object has an error cell right behind its header, whose byte arrays live as long as it.
            let (kind, message, backtrace) = unsafe {
                let cell = &*error.add(1).cast::<ErrorCell>();
                (text(&cell.kind), text(&cell.message), text(&cell.backtrace))
            };
            let (function, cause) = (function.to_owned(), inner.take().map(Box::new));
            inner = Some(FlashInferError::TvmFfiCall { function, kind, message, backtrace, cause });
        }
        match inner {
            Some(error) => error,
            None => unreachable!("the error itself is the first of the chain"),
        }
    }

    /// The error that an error object was raised from, which belongs to it; null where there is none, or no room for one.
    ///
    /// # Safety
    /// It must be a live error object.
    pub(crate) unsafe fn cause(&self, error: *mut Object) -> *mut Object {
        // SAFETY: the header of a live object.
        let Some(deleter) = (unsafe { (*error).deleter }) else { return ptr::null_mut() };
        let version = self.version();
        let has_room = (version.major, version.minor, version.patch) >= CAUSES_SINCE;
        // A module made with older headers makes errors that end before, whatever library it runs with. Those that the
        // library itself made have its deleter.
        if !has_room || image_of(deleter as usize) != image_of(self.landmark()) {
            return ptr::null_mut();
        }
        // SAFETY: the object is the library's own, and of a release that has a handle there.
        unsafe { error.cast::<u8>().add(CAUSE_OFFSET).cast::<*mut Object>().read() }
    }

    /// Raises an error on this thread; the caller then answers -1 to TVM-FFI.
    pub(crate) fn raise(&self, kind: &CStr, message: &CStr) {
        // SAFETY: both are C strings, which the function copies.
        unsafe { (self.error_set_raised_from_c_str)(kind.as_ptr(), message.as_ptr()) };
    }

    /// A tensor object, for the few functions that take no plain tensor. It is owned by the caller.
    ///
    /// # Safety
    /// The tensor's memory, shape and strides must outlive the object.
    pub(crate) unsafe fn tensor_object(&self, tensor: DLTensor) -> Result<*mut Object> {
        unsafe extern "C" fn delete(managed: *mut DLManagedTensorVersioned) {
            // SAFETY: TVM-FFI calls this once, with the very pointer that was leaked below.
            drop(unsafe { Box::from_raw(managed) });
        }
        let managed = DLManagedTensorVersioned {
            version: dlpack::VERSION,
            manager_ctx: ptr::null_mut(),
            deleter: Some(delete),
            flags: 0,
            dl_tensor: tensor,
        };
        let managed = Box::into_raw(Box::new(managed));
        let mut object = ptr::null_mut();
        // SAFETY: a managed tensor with a deleter of its own, and an out pointer that is valid for the call; neither
        // alignment nor contiguity is asked for.
        let code = unsafe { (self.tensor_from_dlpack)(managed, 0, 0, &mut object) };
        if code != 0 {
            // SAFETY: TVM-FFI did not take it, so it is still this side's.
            drop(unsafe { Box::from_raw(managed) });
            return Err(self.take_error("TVMFFITensorFromDLPackVersioned", code));
        }
        Ok(object)
    }

    /// Sets this thread's stream for a CUDA device until the guard is dropped; else the code for
    /// [`stream_error`](Self::stream_error), which is for the caller to look at: an error is large, and moved where it may be.
    ///
    /// # Safety
    /// `device` must be smaller than the number of CUDA devices: TVM-FFI 0.1.3 writes past its table for a negative
    /// one and answers 0.
    #[inline(always)]
    pub(crate) unsafe fn set_stream(&'static self, device: i32, stream: *mut c_void) -> Result<StreamGuard, c_int> {
        debug_assert!(device >= 0);
        let mut before: *mut c_void = ptr::null_mut();
        // SAFETY: the device is in range by the caller's promise; the stream is only recorded, never used, here.
        match unsafe { (self.env_set_stream)(dlpack::CUDA, device, stream, &mut before) } {
            0 => Ok(StreamGuard { api: self, device, restore: (before != stream).then_some(before) }),
            code => Err(code),
        }
    }

    /// This thread's stream for a CUDA device, on which functions work; the null stream where none was set.
    #[cfg(any(feature = "cudarc", feature = "compute"))]
    pub(crate) fn stream(&self, device: i32) -> *mut c_void {
        // SAFETY: any number may be asked for: what is not in the library's table has none.
        unsafe { (self.env_get_stream)(dlpack::CUDA, device) }
    }

    /// What [`set_stream`](Self::set_stream) failed with.
    pub(crate) fn stream_error(&self, code: c_int) -> FlashInferError {
        self.take_error("TVMFFIEnvSetStream", code)
    }
}

/// Gives a thread its stream back, also on an error and while unwinding.
pub(crate) struct StreamGuard {
    api: &'static Api,
    device: i32,
    /// Nothing where the stream was the same before.
    restore: Option<*mut c_void>,
}

impl StreamGuard {
    /// Where the stream was set already.
    #[inline(always)]
    pub(crate) fn nothing(api: &'static Api, device: i32) -> Self {
        Self { api, device, restore: None }
    }
}

impl Drop for StreamGuard {
    #[inline]
    fn drop(&mut self) {
        if let Some(stream) = self.restore {
            // SAFETY: the device was in range when the guard was made, and the stream is what TVM-FFI itself gave.
            unsafe { (self.api.env_set_stream)(dlpack::CUDA, self.device, stream, ptr::null_mut()) };
        }
    }
}

/// # Safety
/// The array must be readable.
pub(crate) unsafe fn text(bytes: &ByteArray) -> String {
    // SAFETY: the caller's promise.
    String::from_utf8_lossy(unsafe { self::bytes(bytes) }).into_owned()
}

/// # Safety
/// The array must be readable for as long as the slice is used.
pub(crate) unsafe fn bytes<'a>(bytes: &ByteArray) -> &'a [u8] {
    if bytes.data.is_null() {
        return &[];
    }
    // SAFETY: the caller's promise, for a pointer that is not null.
    unsafe { std::slice::from_raw_parts(bytes.data, bytes.size) }
}
