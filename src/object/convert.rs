//! Rust types as values, both ways.

use std::ffi::c_void;

use super::Object;
use super::any::{Any, Value};
use crate::error::Result;
use crate::ffi::abi::{Payload, type_index};
use crate::module::Module;
use crate::tensor::{DType, Device};

/// Rust types that a value can be made of.
pub trait IntoAny {
    /// The value.
    ///
    /// # Errors
    /// Where an object must be made: [`NotInitialized`](crate::FlashInferError::NotInitialized), or what TVM-FFI raises.
    fn into_any(self) -> Result<Any>;
}

/// Rust types that values can be taken as.
pub trait FromAny: Sized {
    /// What is expected, for messages.
    const EXPECTED: &'static str;

    /// The value, or what was given where it is of another type.
    ///
    /// # Errors
    /// The value, as it was.
    fn from_any(any: Any) -> std::result::Result<Self, Any>;
}

macro_rules! plain {
    ($($(#[$cfg:meta])* $rust:ty: $index:ident, $value:ident => $payload:expr;)*) => {$(
        $(#[$cfg])*
        impl From<$rust> for Any {
            #[inline(always)]
            fn from($value: $rust) -> Self {
                // SAFETY: nothing of it is an object.
                unsafe { Self::from_parts(type_index::$index, $payload) }
            }
        }

        $(#[$cfg])*
        impl IntoAny for $rust {
            #[inline(always)]
            fn into_any(self) -> Result<Any> {
                Ok(self.into())
            }
        }
    )*};
}

plain! {
    (): NONE, _nothing => Payload { int: 0 };
    i64: INT, value => Payload { int: value };
    i32: INT, value => Payload { int: value.into() };
    u32: INT, value => Payload { int: value.into() };
    bool: BOOL, value => Payload { int: value.into() };
    f64: FLOAT, value => Payload { float: value };
    f32: FLOAT, value => Payload { float: value.into() };
    Device: DEVICE, device => Payload { device: device.to_dl() };
    DType: DATA_TYPE, dtype => {
        // All eight bytes are written: whoever compares values compares them all.
        let mut payload = Payload { int: 0 };
        payload.data_type = dtype.to_dl();
        payload
    };
}

impl IntoAny for Any {
    fn into_any(self) -> Result<Any> {
        Ok(self)
    }
}

impl IntoAny for &Any {
    fn into_any(self) -> Result<Any> {
        Ok(self.clone())
    }
}

impl IntoAny for Object {
    fn into_any(self) -> Result<Any> {
        Ok(self.into())
    }
}

impl IntoAny for &str {
    fn into_any(self) -> Result<Any> {
        Any::str(self)
    }
}

impl IntoAny for String {
    fn into_any(self) -> Result<Any> {
        Any::str(&self)
    }
}

impl IntoAny for &String {
    fn into_any(self) -> Result<Any> {
        Any::str(self)
    }
}

impl IntoAny for &[u8] {
    fn into_any(self) -> Result<Any> {
        Any::bytes(self)
    }
}

impl IntoAny for Vec<u8> {
    fn into_any(self) -> Result<Any> {
        Any::bytes(&self)
    }
}

impl<T: IntoAny> IntoAny for Option<T> {
    fn into_any(self) -> Result<Any> {
        self.map_or(Ok(Any::NONE), T::into_any)
    }
}

impl FromAny for Any {
    const EXPECTED: &'static str = "any value";

    #[inline(always)]
    fn from_any(any: Any) -> std::result::Result<Self, Any> {
        Ok(any)
    }
}

impl FromAny for Value {
    const EXPECTED: &'static str = "any value";

    fn from_any(any: Any) -> std::result::Result<Self, Any> {
        Ok(any.into_value())
    }
}

/// What is returned is dropped, whatever it is.
impl FromAny for () {
    const EXPECTED: &'static str = "any value, which is dropped";

    #[inline(always)]
    fn from_any(any: Any) -> std::result::Result<Self, Any> {
        drop(any);
        Ok(())
    }
}

impl FromAny for i64 {
    const EXPECTED: &'static str = "int";

    #[inline]
    fn from_any(any: Any) -> std::result::Result<Self, Any> {
        match any.type_index() {
            // SAFETY: the index says which payload is there.
            type_index::INT | type_index::BOOL => Ok(unsafe { any.as_abi().payload.int }),
            _ => Err(any),
        }
    }
}

impl FromAny for i32 {
    const EXPECTED: &'static str = "an int of 32 bits";

    fn from_any(any: Any) -> std::result::Result<Self, Any> {
        let value = i64::from_any(any)?;
        Self::try_from(value).map_err(|_| value.into())
    }
}

impl FromAny for bool {
    const EXPECTED: &'static str = "bool";

    fn from_any(any: Any) -> std::result::Result<Self, Any> {
        i64::from_any(any).map(|value| value != 0)
    }
}

impl FromAny for f64 {
    const EXPECTED: &'static str = "float";

    #[inline]
    fn from_any(any: Any) -> std::result::Result<Self, Any> {
        match any.type_index() {
            // SAFETY: the index says which payload is there.
            type_index::FLOAT => Ok(unsafe { any.as_abi().payload.float }),
            _ => i64::from_any(any).map(|value| value as f64),
        }
    }
}

/// A string that is not UTF-8 gets replacement characters where it is not.
impl FromAny for String {
    const EXPECTED: &'static str = "str";

    fn from_any(any: Any) -> std::result::Result<Self, Any> {
        match any.text_or_bytes(type_index::SMALL_STR, type_index::STR) {
            Some(text) => Ok(Self::from_utf8_lossy(text).into_owned()),
            None => Err(any),
        }
    }
}

impl FromAny for Vec<u8> {
    const EXPECTED: &'static str = "bytes";

    fn from_any(any: Any) -> std::result::Result<Self, Any> {
        match any.as_bytes() {
            Some(bytes) => Ok(bytes.to_vec()),
            None => Err(any),
        }
    }
}

impl FromAny for DType {
    const EXPECTED: &'static str = "an element type of this crate's";

    fn from_any(any: Any) -> std::result::Result<Self, Any> {
        // SAFETY: the index says which payload is there.
        let found = (any.type_index() == type_index::DATA_TYPE).then(|| unsafe { any.as_abi().payload.data_type });
        found.and_then(Self::from_dl).ok_or(any)
    }
}

impl FromAny for Device {
    const EXPECTED: &'static str = "a device of this crate's";

    fn from_any(any: Any) -> std::result::Result<Self, Any> {
        // SAFETY: the index says which payload is there.
        let found = (any.type_index() == type_index::DEVICE).then(|| unsafe { any.as_abi().payload.device });
        found.and_then(Self::from_dl).ok_or(any)
    }
}

impl FromAny for *mut c_void {
    const EXPECTED: &'static str = "a pointer";

    fn from_any(any: Any) -> std::result::Result<Self, Any> {
        match any.type_index() {
            // SAFETY: the index says which payload is there.
            type_index::OPAQUE_PTR => Ok(unsafe { any.as_abi().payload.pointer }),
            _ => Err(any),
        }
    }
}

impl FromAny for Object {
    const EXPECTED: &'static str = "an object";

    fn from_any(any: Any) -> std::result::Result<Self, Any> {
        any.into_object()
    }
}

/// A module object. Its functions are those that TVM-FFI finds in it.
impl FromAny for Module {
    const EXPECTED: &'static str = "Module";

    fn from_any(any: Any) -> std::result::Result<Self, Any> {
        let object = any.into_object_of(type_index::MODULE)?;
        Self::of_object(object).map_err(Any::from)
    }
}

impl<T: FromAny> FromAny for Option<T> {
    const EXPECTED: &'static str = T::EXPECTED;

    fn from_any(any: Any) -> std::result::Result<Self, Any> {
        if any.is_none() { Ok(None) } else { T::from_any(any).map(Some) }
    }
}
