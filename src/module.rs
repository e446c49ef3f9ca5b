//! Modules and functions: calling anything that speaks TVM-FFI.

use std::ffi::{CStr, CString, c_int, c_void};
use std::fmt;
use std::marker::PhantomData;
use std::ptr;

use crate::error::{FlashInferError, Result};
use crate::ffi::abi::{self, Any, ByteArray, Payload, SafeCall, type_index};
use crate::ffi::api::{self, Api};
use crate::ffi::dlpack::DLTensor;
use crate::loader::Library;
use crate::tensor::{DType, Device, PackedTensor};

/// What TVM-FFI puts before an exported function's name.
const PREFIX: &str = "__tvm_ffi_";

/// A set of functions: a loaded library, or functions of this process.
#[derive(Debug)]
pub struct Module {
    name: String,
    functions: Functions,
    api: &'static Api,
}

#[derive(Debug)]
enum Functions {
    Loaded(Library),
    Here(Vec<(&'static str, SafeCall)>),
}

impl fmt::Debug for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Api")
    }
}

impl Module {
    pub(crate) fn loaded(name: &str, library: Library, api: &'static Api) -> Self {
        Self { name: name.to_owned(), functions: Functions::Loaded(library), api }
    }

    pub(crate) fn here(name: &str, functions: Vec<(&'static str, SafeCall)>, api: &'static Api) -> Self {
        Self { name: name.to_owned(), functions: Functions::Here(functions), api }
    }

    /// The module's name: a library's soname.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that was loaded; `None` for functions of this process.
    pub fn path(&self) -> Option<&std::path::Path> {
        match &self.functions {
            Functions::Loaded(library) => Some(library.path()),
            Functions::Here(_) => None,
        }
    }

    /// The addresses of exported data whose names end with `suffix`.
    pub(crate) fn data_symbols(&self, suffix: &str) -> Vec<*mut u8> {
        match &self.functions {
            Functions::Loaded(library) => library.data_symbols(suffix),
            Functions::Here(_) => Vec::new(),
        }
    }

    /// A function by the name it was exported under, `gemma_rmsnorm` for example.
    ///
    /// # Errors
    /// [`SymbolMissing`](FlashInferError::SymbolMissing).
    pub fn function(&self, name: &str) -> Result<Function> {
        let missing = |reason: &str| FlashInferError::SymbolMissing {
            library: self.name.clone(),
            symbol: format!("{PREFIX}{name}"),
            reason: reason.to_owned(),
        };
        let call = match &self.functions {
            Functions::Loaded(library) => {
                let symbol =
                    CString::new(format!("{PREFIX}{name}")).map_err(|_| missing("a name cannot hold a zero byte"))?;
                // SAFETY: TVM-FFI gives every function that it exports under this prefix this one type.
                unsafe { library.symbol::<SafeCall>(&symbol) }?
            }
            Functions::Here(functions) => match functions.iter().find(|(known, _)| *known == name) {
                Some((_, call)) => *call,
                None => return Err(missing("no function of that name")),
            },
        };
        Ok(Function { call, name: name.into(), api: self.api })
    }
}

/// A function with TVM-FFI's calling convention.
#[derive(Clone)]
pub struct Function {
    call: SafeCall,
    name: Box<str>,
    api: &'static Api,
}

impl fmt::Debug for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Function").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Function {
    /// The name it was looked up by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Calls the function on this thread's stream.
    ///
    /// # Errors
    /// [`TvmFfiCall`](FlashInferError::TvmFfiCall) with what the function raised.
    ///
    /// # Safety
    /// The function must be sound to call with these arguments: tensors of the shapes, types and devices that it
    /// expects, whose memory stays valid until what it queued has run, and that it may write where it writes.
    #[inline]
    pub unsafe fn call(&self, args: &[Arg<'_>]) -> Result<Value> {
        let mut result = Any::NONE;
        // SAFETY: the caller's promise.
        let code = unsafe { self.invoke(args, &mut result) };
        if code != 0 {
            return Err(self.api.take_error(&self.name, code));
        }
        // SAFETY: a function that answers 0 left a valid result, whose object, if it is one, is now ours.
        Ok(unsafe { Value::from_owned(result, self.api) })
    }

    /// [`call`](Self::call), for a function that returns nothing, as kernels do. What it returns all the same is dropped.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Safety
    /// As there.
    #[inline]
    pub unsafe fn launch(&self, args: &[Arg<'_>]) -> Result<()> {
        let mut result = Any::NONE;
        // SAFETY: the caller's promise.
        let code = unsafe { self.invoke(args, &mut result) };
        if code == 0 && result.is_none() {
            return Ok(());
        }
        // SAFETY: both come from the call.
        unsafe { self.outcome(code, result) }
    }

    /// What a call came to that did not just return nothing.
    ///
    /// # Safety
    /// `code` and `result` must be those of a call of this function, just now.
    #[cold]
    pub(crate) unsafe fn outcome(&self, code: c_int, result: Any) -> Result<()> {
        if code != 0 {
            return Err(self.api.take_error(&self.name, code));
        }
        // SAFETY: a function that answers 0 left a valid result, whose object, if it is one, is now ours.
        drop(unsafe { Value::from_owned(result, self.api) });
        Ok(())
    }

    /// # Safety
    /// As for [`call`](Self::call).
    #[inline(always)]
    pub(crate) unsafe fn invoke(&self, args: &[Arg<'_>], result: &mut Any) -> c_int {
        // SAFETY: `Arg` is `Any` with a lifetime, which keeps what the arguments point to alive during the call. That
        // the function is sound with them is the caller's promise. The handle of an exported function is null.
        unsafe { (self.call)(ptr::null_mut(), args.as_ptr().cast::<Any>(), args.len() as i32, result) }
    }
}

/// One argument, borrowing what it points to.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Arg<'a>(Any, PhantomData<&'a ()>);

impl fmt::Debug for Arg<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arg").field("type_index", &self.0.type_index).finish_non_exhaustive()
    }
}

impl<'a> Arg<'a> {
    const fn new(index: i32, payload: Payload) -> Self {
        Self(Any::new(index, payload), PhantomData)
    }

    /// Nothing, for an optional parameter.
    pub const NONE: Self = Self::new(type_index::NONE, Payload { int: 0 });

    /// An integer.
    pub const fn int(value: i64) -> Self {
        Self::new(type_index::INT, Payload { int: value })
    }

    /// A Boolean.
    pub const fn bool(value: bool) -> Self {
        Self::new(type_index::BOOL, Payload { int: value as i64 })
    }

    /// A floating-point number.
    pub const fn float(value: f64) -> Self {
        Self::new(type_index::FLOAT, Payload { float: value })
    }

    /// A C string.
    pub const fn str(value: &'a CStr) -> Self {
        Self::new(type_index::RAW_STR, Payload { c_str: value.as_ptr() })
    }

    /// A pointer that TVM-FFI passes through.
    pub const fn opaque(value: *mut c_void) -> Self {
        Self::new(type_index::OPAQUE_PTR, Payload { pointer: value })
    }

    /// A tensor, as [`TensorRef::pack`](crate::TensorRef::pack) and [`TensorMut::pack`](crate::TensorMut::pack) make it.
    pub const fn tensor(value: &'a PackedTensor<'_>) -> Self {
        Self::new(type_index::DL_TENSOR_PTR, Payload { tensor: &raw const value.0 })
    }

    /// A tensor that was packed.
    #[inline(always)]
    pub(crate) const fn dl_tensor(value: &'a DLTensor) -> Self {
        Self::new(type_index::DL_TENSOR_PTR, Payload { tensor: value })
    }

    /// An object that a function returned.
    pub fn object(value: &'a Object) -> Self {
        Self::new(value.type_index(), Payload { object: value.handle })
    }
}

/// What a function returned. Objects are released when dropped, once.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Value {
    /// Nothing.
    None,
    /// An integer.
    Int(i64),
    /// A Boolean.
    Bool(bool),
    /// A floating-point number.
    Float(f64),
    /// A string.
    Str(String),
    /// Bytes.
    Bytes(Vec<u8>),
    /// An element type this crate knows.
    DType(DType),
    /// A device this crate knows.
    Device(Device),
    /// A pointer of the function's own.
    OpaquePtr(*mut c_void),
    /// Any other object.
    Object(Object),
    /// A value of a kind this crate does not decode.
    Other {
        /// TVM-FFI's type index.
        type_index: i32,
    },
}

impl Value {
    /// # Safety
    /// `any` must be a valid result that the caller owns.
    unsafe fn from_owned(any: Any, api: &'static Api) -> Self {
        if any.type_index >= type_index::STATIC_OBJECT_BEGIN {
            // SAFETY: from this index on the payload is an object, which the caller owns. Nobody else releases it:
            // `Object` does when it is dropped, also below once the bytes are copied.
            return unsafe { Self::from_object(Object { handle: any.payload.object, api }) };
        }
        // SAFETY: each index says which payload is there.
        unsafe {
            match any.type_index {
                type_index::NONE => Self::None,
                type_index::INT => Self::Int(any.payload.int),
                type_index::BOOL => Self::Bool(any.payload.int != 0),
                type_index::FLOAT => Self::Float(any.payload.float),
                type_index::OPAQUE_PTR => Self::OpaquePtr(any.payload.pointer),
                type_index::DATA_TYPE => match DType::from_dl(any.payload.data_type) {
                    Some(dtype) => Self::DType(dtype),
                    None => Self::Other { type_index: any.type_index },
                },
                type_index::DEVICE => match Device::from_dl(any.payload.device) {
                    Some(device) => Self::Device(device),
                    None => Self::Other { type_index: any.type_index },
                },
                type_index::RAW_STR if !any.payload.c_str.is_null() => {
                    Self::Str(CStr::from_ptr(any.payload.c_str).to_string_lossy().into_owned())
                }
                type_index::SMALL_STR => Self::Str(String::from_utf8_lossy(small(&any)).into_owned()),
                type_index::SMALL_BYTES => Self::Bytes(small(&any).to_vec()),
                type_index => Self::Other { type_index },
            }
        }
    }

    /// # Safety
    /// The object must be live.
    unsafe fn from_object(object: Object) -> Self {
        // SAFETY: strings and bytes have a byte array right behind the header, which lives as long as the object.
        unsafe {
            let array = object.handle.add(1).cast::<ByteArray>();
            match object.type_index() {
                type_index::STR => Self::Str(api::text(&*array)),
                type_index::BYTES => Self::Bytes(api::bytes(&*array).to_vec()),
                _ => Self::Object(object),
            }
        }
    }
}

/// The bytes of a small string. Its length is bounded by the payload, whatever it claims.
fn small(any: &Any) -> &[u8] {
    // SAFETY: every bit pattern is eight bytes.
    let bytes = unsafe { &any.payload.bytes };
    &bytes[..(any.extra as usize).min(bytes.len())]
}

/// A reference-counted object of TVM-FFI's, of which this holds one reference.
pub struct Object {
    handle: *mut abi::Object,
    api: &'static Api,
}

impl Object {
    /// A tensor object, for the few functions that take no plain tensor.
    ///
    /// # Safety
    /// The object must be dropped, everywhere, before the tensor's shape, strides and memory are gone.
    pub(crate) unsafe fn tensor(tensor: DLTensor, api: &'static Api) -> Result<Self> {
        // SAFETY: the caller's promise.
        let handle = unsafe { api.tensor_object(tensor) }?;
        Ok(Self { handle, api })
    }

    /// TVM-FFI's type index.
    pub fn type_index(&self) -> i32 {
        // SAFETY: the object is live for as long as this holds its reference.
        unsafe { (*self.handle).type_index }
    }
}

impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Object").field("type_index", &self.type_index()).finish_non_exhaustive()
    }
}

impl Clone for Object {
    fn clone(&self) -> Self {
        // SAFETY: the object is live for as long as `self` holds its reference.
        unsafe { self.api.retain(self.handle) };
        Self { handle: self.handle, api: self.api }
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        // SAFETY: this owns one reference and gives it up here, once.
        unsafe { self.api.release(self.handle) };
    }
}
