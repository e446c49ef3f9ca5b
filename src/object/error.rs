//! Errors as values.

use std::fmt;

use super::{Object, object_type};
use crate::error::{FlashInferError, Result};
use crate::ffi::abi::{ByteArray, ErrorCell};
use crate::ffi::api::{self, Api};

object_type! {
    /// An error: what a function raises, or returns without raising it.
    ///
    /// A closure of [`Func::new`](super::Func::new) raises one by `?`: `Err(Error::new("ValueError", "…")?.into())`.
    Error, ERROR, "Error"
}

impl Error {
    /// An error of this kind, `ValueError` for example, which frontends turn into exceptions of their own.
    ///
    /// # Errors
    /// [`NotInitialized`](FlashInferError::NotInitialized), or what TVM-FFI raises.
    pub fn new(kind: &str, message: &str) -> Result<Self> {
        Self::with_backtrace(kind, message, "")
    }

    /// As [`new`](Self::new), with where it happened: lines as `  File "src/main.rs", line 7, in main`, the innermost first.
    ///
    /// # Errors
    /// As there.
    pub fn with_backtrace(kind: &str, message: &str, backtrace: &str) -> Result<Self> {
        let handle = Api::loaded()?.error(kind, message, backtrace)?;
        // SAFETY: what was made has one reference, which is ours.
        Ok(Self(unsafe { Object::from_raw(handle.cast()) }))
    }

    /// As [`new`](Self::new), raised from another error, which it keeps.
    ///
    /// # Errors
    /// As there; [`VersionMismatch`](FlashInferError::VersionMismatch) with a libtvm_ffi.so older than 0.1.8, whose errors
    /// have no causes.
    pub fn with_cause(kind: &str, message: &str, cause: &Self) -> Result<Self> {
        let api = Api::loaded()?;
        // SAFETY: this holds the cause.
        let made = unsafe { api.error_from(kind, message, "", cause.0.handle()) };
        let Some(made) = made else {
            let version = api.version();
            return Err(FlashInferError::VersionMismatch {
                library: "libtvm_ffi.so".to_owned(),
                found: format!("{}.{}.{}, without causes of errors", version.major, version.minor, version.patch),
                expected: "0.1.8 or newer".to_owned(),
                remedy: "adopt a newer one (RuntimeConfig::adopt_tvm_ffi), or say the cause in the message",
            });
        };
        // SAFETY: what was made has one reference, which is ours.
        Ok(Self(unsafe { Object::from_raw(made?.cast()) }))
    }

    fn cell(&self) -> &ErrorCell {
        // SAFETY: an error object has an error cell right behind its header and keeps it as long as it lives.
        unsafe { &*self.0.cell::<ErrorCell>() }
    }

    fn text(bytes: &ByteArray) -> String {
        // SAFETY: the error owns the bytes, and this borrows the error.
        unsafe { api::text(bytes) }
    }

    /// The kind, `TypeError` for example.
    pub fn kind(&self) -> String {
        Self::text(&self.cell().kind)
    }

    /// The message.
    pub fn message(&self) -> String {
        Self::text(&self.cell().message)
    }

    /// Where it was raised, the innermost call first; may be empty.
    pub fn backtrace(&self) -> String {
        Self::text(&self.cell().backtrace)
    }

    /// The error that it was raised from. Only errors that TVM-FFI 0.1.8 or newer made have one.
    pub fn cause(&self) -> Option<Self> {
        let api = Api::loaded().ok()?;
        // SAFETY: this keeps the error, and the error keeps its cause, of which a reference of its own is taken.
        unsafe {
            let cause = api.cause(self.0.handle());
            if cause.is_null() {
                return None;
            }
            api.retain(cause);
            Object::owned(cause).map(Self)
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Error({}: {})", self.kind(), self.message())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind(), self.message())
    }
}

impl From<Error> for FlashInferError {
    fn from(error: Error) -> Self {
        match Api::loaded() {
            // SAFETY: `error` keeps the object.
            Ok(api) => unsafe { api.read_error(error.0.handle(), "a function") },
            Err(not_loaded) => not_loaded,
        }
    }
}
