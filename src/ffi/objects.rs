//! Making objects by TVM-FFI's C functions. What is answered is owned by the caller.

use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::MutexGuard;

use super::abi::{self, Any, ByteArray, Object, SafeCall};
use super::api::Api;
use super::dlpack::{Allocator, DLManagedTensor, DLManagedTensorVersioned};
use crate::error::Result;

impl Api {
    fn object(&self, function: &str, make: impl FnOnce(*mut *mut Object) -> c_int) -> Result<*mut Object> {
        let mut object = ptr::null_mut();
        match make(&mut object) {
            0 => Ok(object),
            code => Err(self.take_error(function, code)),
        }
    }

    fn any(&self, function: &str, make: impl FnOnce(*mut Any) -> c_int) -> Result<Any> {
        let mut any = Any::NONE;
        match make(&mut any) {
            0 => Ok(any),
            code => Err(self.take_error(function, code)),
        }
    }

    pub(crate) fn string(&self, text: &[u8]) -> Result<Any> {
        // SAFETY: the bytes are readable for the call, which copies them.
        self.any("TVMFFIStringFromByteArray", |out| unsafe {
            (self.string_from_byte_array)(&ByteArray::new(text), out)
        })
    }

    pub(crate) fn bytes(&self, bytes: &[u8]) -> Result<Any> {
        // SAFETY: as for `string`.
        self.any("TVMFFIBytesFromByteArray", |out| unsafe { (self.bytes_from_byte_array)(&ByteArray::new(bytes), out) })
    }

    /// A value of one's own of what is only seen: objects get another reference, C strings and byte arrays are copied.
    ///
    /// # Safety
    /// What `view` points to must be valid.
    pub(crate) unsafe fn own(&self, view: &Any) -> Result<Any> {
        // SAFETY: the caller's promise.
        self.any("TVMFFIAnyViewToOwnedAny", |out| unsafe { (self.any_view_to_owned_any)(view, out) })
    }

    pub(crate) fn error(&self, kind: &str, message: &str, backtrace: &str) -> Result<*mut Object> {
        let [kind, message, backtrace] = [kind, message, backtrace].map(|text| ByteArray::new(text.as_bytes()));
        // SAFETY: the bytes are readable for the call, which copies them.
        self.object("TVMFFIErrorCreate", |out| unsafe { (self.error_create)(&kind, &message, &backtrace, out) })
    }

    /// As [`error`](Self::error), raised from another one, to which it holds a reference of its own; `None` where the library
    /// has no errors with causes.
    ///
    /// # Safety
    /// `cause` must be a live error object.
    pub(crate) unsafe fn error_from(
        &self,
        kind: &str,
        message: &str,
        backtrace: &str,
        cause: *mut Object,
    ) -> Option<Result<*mut Object>> {
        let create = self.error_create_with_cause?;
        let [kind, message, backtrace] = [kind, message, backtrace].map(|text| ByteArray::new(text.as_bytes()));
        // SAFETY: the bytes are readable for the call, which copies them; the cause is live by the caller's promise, and
        // there may be no context.
        Some(self.object("TVMFFIErrorCreateWithCauseAndExtraContext", |out| unsafe {
            create(&kind, &message, &backtrace, cause, ptr::null_mut(), out)
        }))
    }

    /// Raises an error on this thread. It takes a reference of its own.
    ///
    /// # Safety
    /// It must be a live error object.
    pub(crate) unsafe fn raise_object(&self, error: *mut Object) {
        // SAFETY: the caller's promise.
        unsafe { (self.error_set_raised)(error) };
    }

    /// A function object, which gives `this` to `deleter` when it is released by whoever is last.
    ///
    /// # Safety
    /// `call` must be sound with `this`, and `deleter` with `this` after the last call, on any thread.
    pub(crate) unsafe fn function(
        &self,
        this: *mut c_void,
        call: SafeCall,
        deleter: Option<unsafe extern "C" fn(*mut c_void)>,
    ) -> Result<*mut Object> {
        // SAFETY: the caller's promise.
        self.object("TVMFFIFunctionCreate", |out| unsafe { (self.function_create)(this, call, deleter, out) })
    }

    /// The global function of that name; null where there is none. The caller holds the turn with [`tables`](Self::tables).
    pub(crate) fn global(&self, name: &str, _tables: &MutexGuard<'_, ()>) -> Result<*mut Object> {
        let name = ByteArray::new(name.as_bytes());
        // SAFETY: the bytes are readable for the call.
        self.object("TVMFFIFunctionGetGlobal", |out| unsafe { (self.function_get_global)(&name, out) })
    }

    /// Gives a function object a global name. The table takes a reference of its own.
    ///
    /// # Safety
    /// It must be a live function object, and no other thread may use TVM-FFI's table meanwhile but through this crate, of
    /// which the caller holds the turn with [`tables`](Self::tables).
    pub(crate) unsafe fn set_global(&self, name: &str, function: *mut Object, replace: bool) -> Result<()> {
        let name_bytes = ByteArray::new(name.as_bytes());
        // SAFETY: the bytes are readable for the call, which copies them; the rest is the caller's promise.
        match unsafe { (self.function_set_global)(&name_bytes, function, c_int::from(replace)) } {
            0 => Ok(()),
            code => Err(self.take_error("TVMFFIFunctionSetGlobal", code)),
        }
    }

    /// The index of a registered type.
    pub(crate) fn type_index(&self, key: &str) -> Result<i32> {
        let _tables = Self::tables();
        let (key, mut index) = (ByteArray::new(key.as_bytes()), 0);
        // SAFETY: the bytes are readable for the call, and one number is written through a pointer that is valid for it.
        match unsafe { (self.type_key_to_index)(&key, &mut index) } {
            0 => Ok(index),
            code => Err(self.take_error("TVMFFITypeKeyToIndex", code)),
        }
    }

    /// A tensor object over a managed tensor, which is taken over; on an error it still is the caller's.
    ///
    /// # Safety
    /// It must be a valid managed tensor that the caller owns.
    pub(crate) unsafe fn tensor_from(&self, managed: *mut DLManagedTensorVersioned) -> Result<*mut Object> {
        // SAFETY: the caller's promise; neither alignment nor contiguity is asked for.
        self.object("TVMFFITensorFromDLPackVersioned", |out| unsafe { (self.tensor_from_dlpack)(managed, 0, 0, out) })
    }

    /// As [`tensor_from`](Self::tensor_from), before DLPack 1.0.
    ///
    /// # Safety
    /// As there.
    pub(crate) unsafe fn tensor_from_unversioned(&self, managed: *mut DLManagedTensor) -> Result<*mut Object> {
        // SAFETY: as there.
        self.object("TVMFFITensorFromDLPack", |out| unsafe {
            (self.tensor_from_dlpack_unversioned)(managed, 0, 0, out)
        })
    }

    /// A managed tensor that holds a reference to a tensor object.
    ///
    /// # Safety
    /// It must be a live tensor object.
    pub(crate) unsafe fn tensor_to(&self, tensor: *mut Object) -> Result<*mut DLManagedTensorVersioned> {
        let mut managed = ptr::null_mut();
        // SAFETY: the caller's promise; one pointer is written through a pointer that is valid for the call.
        match unsafe { (self.tensor_to_dlpack)(tensor, &mut managed) } {
            0 => Ok(managed),
            code => Err(self.take_error("TVMFFITensorToDLPackVersioned", code)),
        }
    }

    /// As [`tensor_to`](Self::tensor_to), before DLPack 1.0.
    ///
    /// # Safety
    /// As there.
    pub(crate) unsafe fn tensor_to_unversioned(&self, tensor: *mut Object) -> Result<*mut DLManagedTensor> {
        let mut managed = ptr::null_mut();
        // SAFETY: as there.
        match unsafe { (self.tensor_to_dlpack_unversioned)(tensor, &mut managed) } {
            0 => Ok(managed),
            code => Err(self.take_error("TVMFFITensorToDLPack", code)),
        }
    }

    /// What allocates this thread's tensors: its own, or that of every thread.
    pub(crate) fn allocator(&self) -> Option<Allocator> {
        // SAFETY: the function takes nothing and answers a pointer.
        unsafe { (self.get_allocator)() }
    }

    /// Sets what allocates this thread's tensors.
    pub(crate) fn set_allocator(&self, allocator: Option<Allocator>) -> Result<()> {
        // What was set before is not asked for here: up to 0.1.7 the answer is the new one.
        // SAFETY: an allocator is a function that is there for good, by its type; there is nothing to write to.
        match unsafe { (self.set_allocator)(allocator, 0, ptr::null_mut()) } {
            0 => Ok(()),
            code => Err(self.take_error("TVMFFIEnvSetDLPackManagedTensorAllocator", code)),
        }
    }

    /// How an object of this header is called.
    ///
    /// # Safety
    /// It must be a live function object.
    pub(crate) unsafe fn call_of(function: *mut Object) -> Option<SafeCall> {
        // SAFETY: a function object has its cell right behind its header.
        unsafe { (*function.add(1).cast::<abi::FunctionCell>()).safe_call }
    }
}
