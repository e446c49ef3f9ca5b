//! Reference-counted objects, of any type.

use std::fmt;
use std::ptr::NonNull;

use super::any::kind_name;
use super::{Array, Func};
use crate::error::Result;
use crate::ffi::abi::{self, type_index};
use crate::ffi::api::Api;
use crate::ffi::dlpack::DLTensor;

/// A reference-counted object of TVM-FFI's, of which this holds one reference.
#[repr(transparent)]
pub struct Object(NonNull<abi::Object>);

impl Object {
    /// Takes a reference over, to what a function of TVM-FFI answered.
    ///
    /// # Safety
    /// It must be null or a live object of the libtvm_ffi.so in use, one reference to which the caller owns and gives up.
    pub(crate) unsafe fn owned(handle: *mut abi::Object) -> Option<Self> {
        NonNull::new(handle).map(Self)
    }

    /// Takes a reference over: the other direction of [`into_raw`](Self::into_raw), also for an object of the official
    /// Rust crate's or of a Python package's that uses the same libtvm_ffi.so.
    ///
    /// # Safety
    /// `handle` must be a live object of the libtvm_ffi.so that this crate uses, and not null; the caller owns one
    /// reference to it and gives it up.
    pub unsafe fn from_raw(handle: *mut std::ffi::c_void) -> Self {
        debug_assert!(!handle.is_null());
        // SAFETY: the caller's promise.
        Self(unsafe { NonNull::new_unchecked(handle.cast()) })
    }

    /// Gives the reference away, as a `TVMFFIObjectHandle`, which nobody releases any more unless they do it themselves.
    pub fn into_raw(self) -> *mut std::ffi::c_void {
        let handle = self.handle().cast();
        std::mem::forget(self);
        handle
    }

    /// A tensor object over memory, shape and strides that somebody else owns, for the few functions that take no plain
    /// tensor.
    ///
    /// # Safety
    /// The object must be dropped, everywhere, before the tensor's shape, strides and memory are gone.
    pub(crate) unsafe fn tensor(tensor: DLTensor, api: &'static Api) -> Result<Self> {
        // SAFETY: the caller's promise.
        let handle = unsafe { api.tensor_object(tensor) }?;
        // SAFETY: what was made has one reference, which is ours.
        Ok(Self(unsafe { NonNull::new_unchecked(handle) }))
    }

    #[inline(always)]
    pub(crate) fn handle(&self) -> *mut abi::Object {
        self.0.as_ptr()
    }

    /// What lies right behind the object's header.
    #[inline(always)]
    pub(crate) fn cell<T>(&self) -> *const T {
        // The address of what follows is inside of the same object, for types that have a cell there.
        self.handle().wrapping_add(1).cast()
    }

    /// TVM-FFI's type index. From 128 on these are given out by each process anew, in the order in which types are met:
    /// [`type_key`](Self::type_key) is the same everywhere.
    #[inline]
    pub fn type_index(&self) -> i32 {
        // SAFETY: the object is live for as long as this holds its reference.
        unsafe { (*self.handle()).type_index }
    }

    /// The type's name, `ffi.Array` for example; `None` for an index that is registered with no name here. An index that is
    /// unknown is never given to `TVMFFIGetTypeInfo`, which would end the process.
    pub fn type_key(&self) -> Option<String> {
        let index = self.type_index();
        if let Some(name) = abi::type_key(index) {
            return Some(name.to_owned());
        }
        // Each registered key is asked for its index.
        let api = Api::loaded().ok()?;
        let keys = Func::global("ffi.GetRegisteredTypeKeys").ok()??;
        // SAFETY: TVM-FFI's own function, which takes nothing and answers an array.
        let keys = unsafe { keys.typed::<(), Array>().call_unseen(()) }.ok()?;
        let keys = keys.iter().filter_map(|key| key.to::<String>().ok());
        keys.into_iter().find(|key| api.type_index(key).is_ok_and(|found| found == index))
    }

    /// How many references there are at this moment, for tests and diagnosis.
    pub fn references(&self) -> u32 {
        // SAFETY: the object is live for as long as this holds its reference.
        unsafe { Api::references(self.handle()) }
    }

    /// Whether both are the same object.
    pub fn is_same(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Object({})", kind_name(self.type_index()))
    }
}

impl Clone for Object {
    #[inline]
    fn clone(&self) -> Self {
        if let Ok(api) = Api::loaded() {
            // SAFETY: the object is live for as long as `self` holds its reference.
            unsafe { api.retain(self.handle()) };
        }
        Self(self.0)
    }
}

impl Drop for Object {
    #[inline]
    fn drop(&mut self) {
        // Without a library there are no objects.
        if let Ok(api) = Api::loaded() {
            // SAFETY: this owns one reference and gives it up here, once.
            unsafe { api.release(self.handle()) };
        }
    }
}

/// Whether a type index is one of an object.
#[inline(always)]
pub(super) fn is_object(index: i32) -> bool {
    index >= type_index::STATIC_OBJECT_BEGIN
}
