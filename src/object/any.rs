//! One value of any kind, owned; and what it is, taken apart.

use std::borrow::Cow;
use std::ffi::c_void;
use std::fmt;
use std::mem::ManuallyDrop;

use super::handle::is_object;
use super::{Arg, Array, Dict, Error, FromAny, Func, List, Map, Object, Shape, Tensor};
use crate::error::{FlashInferError, Result};
use crate::ffi::abi::{self, ByteArray, Payload, type_index};
use crate::ffi::api::{self, Api};
use crate::module::Module;
use crate::tensor::{DType, Device};

/// One value of any kind, 16 bytes as TVM-FFI has it. What it holds is released when it is dropped, once; a clone holds a
/// reference of its own.
#[repr(transparent)]
pub struct Any(abi::Any);

impl Any {
    /// Nothing.
    pub const NONE: Self = Self(abi::Any::NONE);

    /// # Safety
    /// Objects in it must be the caller's, who gives them up; other pointers must be only numbers.
    #[inline(always)]
    pub(crate) const unsafe fn from_parts(index: i32, payload: Payload) -> Self {
        Self(abi::Any::new(index, payload))
    }

    /// A result of TVM-FFI's.
    ///
    /// # Safety
    /// It must be a valid result that the caller owns and gives up. What it points to and does not own must be valid now.
    #[inline(always)]
    pub(crate) unsafe fn owned(any: abi::Any) -> Self {
        if any.type_index >= type_index::DL_TENSOR_PTR && any.type_index <= type_index::RVALUE_REF {
            // SAFETY: the caller's promise.
            return unsafe { Self::borrowing(any) };
        }
        if is_object(any.type_index)
            && let Ok(api) = Api::loaded()
        {
            // SAFETY: the caller's promise: the reference is this side's.
            unsafe { api.counted(any.payload.object) };
        }
        Self(any)
    }

    /// Of a result that owns nothing of what it points to, which careless functions answer: what can be copied is.
    #[cold]
    unsafe fn borrowing(any: abi::Any) -> Self {
        let copied = match any.type_index {
            type_index::RAW_STR | type_index::BYTE_ARRAY_PTR => {
                // SAFETY: the caller of `owned` said that what it points to is valid, unless it is null.
                let null = unsafe { any.payload.pointer }.is_null();
                // SAFETY: as above.
                Api::loaded().ok().filter(|_| !null).and_then(|api| unsafe { api.own(&any) }.ok())
            }
            _ => None,
        };
        // A tensor's description that nobody keeps alive is only an address.
        Self(copied.unwrap_or(abi::Any { type_index: type_index::OPAQUE_PTR, extra: 0, payload: any.payload }))
    }

    /// A text. Up to seven bytes lie in the value itself.
    ///
    /// # Errors
    /// [`NotInitialized`](FlashInferError::NotInitialized), or what TVM-FFI raises.
    pub fn str(text: &str) -> Result<Self> {
        Api::loaded()?.string(text.as_bytes()).map(Self)
    }

    /// Bytes. Up to seven lie in the value itself.
    ///
    /// # Errors
    /// As for [`str`](Self::str).
    pub fn bytes(bytes: &[u8]) -> Result<Self> {
        Api::loaded()?.bytes(bytes).map(Self)
    }

    /// A pointer that TVM-FFI passes through and never follows.
    pub const fn opaque(pointer: *mut c_void) -> Self {
        Self(abi::Any::new(type_index::OPAQUE_PTR, Payload { pointer }))
    }

    /// TVM-FFI's type index.
    #[inline(always)]
    pub fn type_index(&self) -> i32 {
        self.0.type_index
    }

    /// Whether this is nothing.
    #[inline(always)]
    pub fn is_none(&self) -> bool {
        self.0.is_none()
    }

    /// What this is, in a word, for messages: `int`, `Array`.
    pub fn kind(&self) -> Cow<'static, str> {
        kind_name(self.type_index())
    }

    /// The value as one that is lent.
    #[inline(always)]
    pub fn as_arg(&self) -> Arg<'_> {
        // SAFETY: what the value holds lives as long as it is borrowed, and what is only an address says so by its index.
        unsafe { Arg::from_raw_any(self.0) }
    }

    /// Values as what a function is called with.
    #[inline(always)]
    pub fn as_args(values: &[Self]) -> &[Arg<'_>] {
        // SAFETY: both are transparent over the same type; as for `as_arg`.
        unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), values.len()) }
    }

    /// The value as the Rust type that is asked for. Numbers are converted as TVM-FFI does: a Boolean is an integer, an
    /// integer is a floating-point number.
    ///
    /// # Errors
    /// [`WrongType`](FlashInferError::WrongType).
    pub fn to<T: FromAny>(self) -> Result<T> {
        T::from_any(self).map_err(|found| wrong_type("the value".to_owned(), &found, T::EXPECTED))
    }

    /// The value, taken apart.
    pub fn into_value(self) -> Value {
        if is_object(self.type_index()) {
            return self.into_object_value();
        }
        // SAFETY: each index says which payload is there.
        unsafe {
            match self.0.type_index {
                type_index::NONE => Value::None,
                type_index::INT => Value::Int(self.0.payload.int),
                type_index::BOOL => Value::Bool(self.0.payload.int != 0),
                type_index::FLOAT => Value::Float(self.0.payload.float),
                type_index::OPAQUE_PTR => Value::OpaquePtr(self.0.payload.pointer),
                type_index::DATA_TYPE => match DType::from_dl(self.0.payload.data_type) {
                    Some(dtype) => Value::DType(dtype),
                    None => Value::Other { type_index: self.0.type_index },
                },
                type_index::DEVICE => match Device::from_dl(self.0.payload.device) {
                    Some(device) => Value::Device(device),
                    None => Value::Other { type_index: self.0.type_index },
                },
                type_index::SMALL_STR => Value::Str(String::from_utf8_lossy(small(&self.0)).into_owned()),
                type_index::SMALL_BYTES => Value::Bytes(small(&self.0).to_vec()),
                type_index => Value::Other { type_index },
            }
        }
    }

    fn into_object_value(self) -> Value {
        fn of<T: FromAny>(any: Any, value: impl Fn(T) -> Value) -> std::result::Result<Value, Any> {
            T::from_any(any).map(value)
        }
        let decoded = match self.type_index() {
            type_index::STR => of(self, Value::Str),
            type_index::BYTES => of(self, Value::Bytes),
            type_index::ERROR => of(self, Value::Error),
            type_index::FUNCTION => of(self, Value::Func),
            type_index::SHAPE => of(self, Value::Shape),
            type_index::TENSOR => of(self, Value::Tensor),
            type_index::ARRAY => of(self, Value::Array),
            type_index::MAP => of(self, Value::Map),
            type_index::MODULE => of(self, Value::Module),
            type_index::LIST => of(self, Value::List),
            type_index::DICT => of(self, Value::Dict),
            _ => Err(self),
        };
        match decoded.or_else(|any| any.into_object().map(Value::Object)) {
            Ok(value) => value,
            Err(any) => Value::Other { type_index: any.type_index() },
        }
    }

    /// A text or bytes, whichever of the two forms they have.
    pub(crate) fn text_or_bytes(&self, small_index: i32, object_index: i32) -> Option<&[u8]> {
        match self.type_index() {
            index if index == small_index => Some(small(&self.0)),
            // SAFETY: by its index it is an object with a byte array right behind its header, which lives as long as the
            // object, which this keeps.
            index if index == object_index => unsafe {
                Some(api::bytes(&*self.0.payload.object.add(1).cast::<ByteArray>()))
            },
            _ => None,
        }
    }

    /// The text, if it is one and UTF-8.
    pub fn as_str(&self) -> Option<&str> {
        std::str::from_utf8(self.text_or_bytes(type_index::SMALL_STR, type_index::STR)?).ok()
    }

    /// The bytes, if it is bytes.
    pub fn as_bytes(&self) -> Option<&[u8]> {
        self.text_or_bytes(type_index::SMALL_BYTES, type_index::BYTES)
    }

    pub(crate) fn into_object(self) -> std::result::Result<Object, Self> {
        if !is_object(self.type_index()) {
            return Err(self);
        }
        // SAFETY: by its index the payload is an object, of which this holds a reference and gives it up.
        match unsafe { Object::owned(self.0.payload.object) } {
            Some(object) => {
                std::mem::forget(self);
                Ok(object)
            }
            None => Err(self),
        }
    }

    #[inline]
    pub(crate) fn into_object_of(self, index: i32) -> std::result::Result<Object, Self> {
        if self.type_index() == index { self.into_object() } else { Err(self) }
    }

    /// The value as TVM-FFI has it, which nobody releases any more.
    #[inline(always)]
    pub(crate) fn into_abi(self) -> abi::Any {
        ManuallyDrop::new(self).0
    }

    #[inline(always)]
    pub(crate) fn as_abi(&self) -> &abi::Any {
        &self.0
    }

    /// Gives the value away as the 16 bytes of a `TVMFFIAny`, which nobody releases any more unless they do it themselves.
    pub fn into_raw(self) -> [u64; 2] {
        let abi::Any { type_index, extra, payload } = self.into_abi();
        // SAFETY: every payload is eight bytes, all of them written.
        [u64::from(type_index as u32) | u64::from(extra) << 32, u64::from_ne_bytes(unsafe { payload.bytes })]
    }

    /// Takes over what [`into_raw`](Self::into_raw) gave away, or an owned value of the official Rust crate's that uses the
    /// same libtvm_ffi.so.
    ///
    /// # Safety
    /// It must be a valid `TVMFFIAny` that the caller owns and gives up, with objects of the libtvm_ffi.so that this crate
    /// uses.
    pub unsafe fn from_raw(raw: [u64; 2]) -> Self {
        let payload = Payload { bytes: raw[1].to_ne_bytes() };
        // SAFETY: the caller's promise.
        unsafe { Self::owned(abi::Any { type_index: raw[0] as u32 as i32, extra: (raw[0] >> 32) as u32, payload }) }
    }
}

impl Clone for Any {
    #[inline]
    fn clone(&self) -> Self {
        if is_object(self.type_index())
            && let Ok(api) = Api::loaded()
        {
            // SAFETY: the object is live for as long as `self` holds its reference.
            unsafe { api.retain(self.0.payload.object) };
        }
        Self(self.0)
    }
}

impl Drop for Any {
    #[inline]
    fn drop(&mut self) {
        if is_object(self.type_index())
            && let Ok(api) = Api::loaded()
        {
            // SAFETY: this owns one reference and gives it up here, once.
            unsafe { api.release(self.0.payload.object) };
        }
    }
}

impl Default for Any {
    fn default() -> Self {
        Self::NONE
    }
}

impl From<Object> for Any {
    #[inline]
    fn from(object: Object) -> Self {
        let (type_index, object) = (object.type_index(), ManuallyDrop::new(object).handle());
        Self(abi::Any::new(type_index, Payload { object }))
    }
}

impl fmt::Debug for Any {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.clone().into_value() {
            Value::Object(object) => object.fmt(f),
            value => value.fmt(f),
        }
    }
}

/// The bytes of a small string. Its length is bounded by the payload, whatever it claims.
fn small(any: &abi::Any) -> &[u8] {
    // SAFETY: every bit pattern is eight bytes.
    let bytes = unsafe { &any.payload.bytes };
    &bytes[..(any.extra as usize).min(bytes.len())]
}

/// A value of another type than what is asked for.
#[cold]
pub(crate) fn wrong_type(what: String, found: &Any, expected: &'static str) -> FlashInferError {
    FlashInferError::WrongType { what, found: found.kind().into_owned(), expected }
}

/// What a type index stands for, for messages.
pub(crate) fn kind_name(index: i32) -> Cow<'static, str> {
    match abi::type_key(index) {
        Some(key) => Cow::Borrowed(key.strip_prefix("ffi.").unwrap_or(key)),
        None => Cow::Owned(format!("a value of type index {index}")),
    }
}

/// What a value is. Objects are released when dropped, once.
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
    /// An array.
    Array(Array),
    /// A map.
    Map(Map),
    /// The sizes of a tensor.
    Shape(Shape),
    /// A function.
    Func(Func),
    /// A tensor that owns its memory.
    Tensor(Tensor),
    /// An error that was returned and not raised.
    Error(Error),
    /// A module.
    Module(Module),
    /// A list that may change. From TVM-FFI 0.1.9 on.
    List(List),
    /// A dictionary that may change. From TVM-FFI 0.1.9 on.
    Dict(Dict),
    /// Any other object.
    Object(Object),
    /// A value of a kind this crate does not decode.
    Other {
        /// TVM-FFI's type index.
        type_index: i32,
    },
}

impl From<Any> for Value {
    fn from(any: Any) -> Self {
        any.into_value()
    }
}
