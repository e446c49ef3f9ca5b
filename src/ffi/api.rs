//! `libtvm_ffi.so`'s symbols, and the few things done with them directly: releasing objects, reading errors, setting a
//! thread's stream.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;

use super::abi::{ErrorCell, Object, Version};
use super::dlpack::{self, DLManagedTensorVersioned, DLTensor};
use crate::error::{FlashInferError, Result};
use crate::loader::Library;

/// TVM-FFI's functions, resolved once.
#[derive(Clone, Copy)]
pub(crate) struct Api {
    get_version: unsafe extern "C" fn(*mut Version),
    object_inc_ref: unsafe extern "C" fn(*mut Object) -> c_int,
    object_dec_ref: unsafe extern "C" fn(*mut Object) -> c_int,
    error_move_from_raised: unsafe extern "C" fn(*mut *mut Object),
    error_set_raised_from_c_str: unsafe extern "C" fn(*const c_char, *const c_char),
    env_set_stream: unsafe extern "C" fn(i32, i32, *mut c_void, *mut *mut c_void) -> c_int,
    tensor_from_dlpack: unsafe extern "C" fn(*mut DLManagedTensorVersioned, i32, i32, *mut *mut Object) -> c_int,
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
                tensor_from_dlpack: library.symbol(c"TVMFFITensorFromDLPackVersioned")?,
            })
        }
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
    pub(crate) unsafe fn retain(&self, object: *mut Object) {
        // SAFETY: the caller's promise.
        unsafe { (self.object_inc_ref)(object) };
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
        let call = |kind: String, message: String, backtrace: String| FlashInferError::TvmFfiCall {
            function: function.to_owned(),
            kind,
            message,
            backtrace,
        };
        let mut raised: *mut Object = ptr::null_mut();
        if code == -1 {
            // SAFETY: the out pointer is valid for the call; what comes is null or an error object that we then own.
            unsafe { (self.error_move_from_raised)(&mut raised) };
        }
        if raised.is_null() {
            let kind = if code == -2 { "FrontendError" } else { "MissingError" };
            return call(
                kind.to_owned(),
                format!("the function answered {code} without an error object"),
                String::new(),
            );
        }
        // SAFETY: an error object has an error cell right behind its header and keeps it alive while we own it; its
        // byte arrays are copied before the object is released, once, by its owner.
        unsafe {
            let cell = &*raised.add(1).cast::<ErrorCell>();
            let error = call(text(&cell.kind), text(&cell.message), text(&cell.backtrace));
            self.release(raised);
            error
        }
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
pub(crate) unsafe fn text(bytes: &super::abi::ByteArray) -> String {
    // SAFETY: the caller's promise.
    String::from_utf8_lossy(unsafe { self::bytes(bytes) }).into_owned()
}

/// # Safety
/// The array must be readable for as long as the slice is used.
pub(crate) unsafe fn bytes<'a>(bytes: &super::abi::ByteArray) -> &'a [u8] {
    if bytes.data.is_null() {
        return &[];
    }
    // SAFETY: the caller's promise, for a pointer that is not null.
    unsafe { std::slice::from_raw_parts(bytes.data, bytes.size) }
}
