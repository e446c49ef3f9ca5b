//! Values that are lent for a call.

use std::ffi::{CStr, c_void};
use std::fmt;
use std::marker::PhantomData;

use super::any::kind_name;
use super::{Any, FromAny, Object, Value};
use crate::error::{FlashInferError, Result};
use crate::ffi::abi::{self, Payload, type_index};
use crate::ffi::api::Api;
use crate::ffi::dlpack::DLTensor;
use crate::tensor::{DType, Device, PackedTensor, TensorMut, TensorRef, borrowed, borrowed_mut};

/// One argument, borrowing what it points to.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Arg<'a>(abi::Any, PhantomData<&'a ()>);

impl fmt::Debug for Arg<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Arg({})", kind_name(self.0.type_index))
    }
}

impl<'a> Arg<'a> {
    const fn new(index: i32, payload: Payload) -> Self {
        Self(abi::Any::new(index, payload), PhantomData)
    }

    /// # Safety
    /// What it points to must be valid for `'a`.
    #[inline(always)]
    pub(super) const unsafe fn from_raw_any(any: abi::Any) -> Self {
        Self(any, PhantomData)
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

    /// An element type.
    pub fn dtype(value: DType) -> Self {
        // All eight bytes are written: whoever compares values compares them all.
        let mut payload = Payload { int: 0 };
        payload.data_type = value.to_dl();
        Self::new(type_index::DATA_TYPE, payload)
    }

    /// A device.
    pub fn device(value: Device) -> Self {
        Self::new(type_index::DEVICE, Payload { device: value.to_dl() })
    }

    /// A C string.
    pub const fn str(value: &'a CStr) -> Self {
        Self::new(type_index::RAW_STR, Payload { c_str: value.as_ptr() })
    }

    /// A pointer that TVM-FFI passes through.
    pub const fn opaque(value: *mut c_void) -> Self {
        Self::new(type_index::OPAQUE_PTR, Payload { pointer: value })
    }

    /// A tensor, as [`TensorRef::pack`](crate::TensorRef::pack) and [`TensorMut::pack`](crate::TensorMut::pack) make it. A
    /// function whose parameter is `ffi::Tensor` refuses it and takes a [`Tensor`](super::Tensor), which owns its memory.
    pub const fn tensor(value: &'a PackedTensor<'_>) -> Self {
        Self::new(type_index::DL_TENSOR_PTR, Payload { tensor: &raw const value.0 })
    }

    /// A tensor that was packed.
    #[inline(always)]
    pub(crate) const fn dl_tensor(value: &'a DLTensor) -> Self {
        Self::new(type_index::DL_TENSOR_PTR, Payload { tensor: value })
    }

    /// An object.
    #[inline(always)]
    pub fn object(value: &'a Object) -> Self {
        Self::new(value.type_index(), Payload { object: value.handle() })
    }

    /// TVM-FFI's type index.
    #[inline(always)]
    pub fn type_index(&self) -> i32 {
        self.0.type_index
    }

    /// Whether this is nothing.
    pub fn is_none(&self) -> bool {
        self.0.is_none()
    }

    /// A value of one's own: objects get another reference, C strings are copied.
    ///
    /// # Errors
    /// [`WrongType`](FlashInferError::WrongType) for a tensor that is only lent, which nobody can keep, and what TVM-FFI
    /// raises.
    pub fn to_any(&self) -> Result<Any> {
        if matches!(self.0.type_index, type_index::DL_TENSOR_PTR | type_index::RVALUE_REF) {
            return Err(FlashInferError::WrongType {
                what: "the argument".to_owned(),
                found: kind_name(self.0.type_index).into_owned(),
                expected: "a value that can be kept; a tensor is one as a Tensor object",
            });
        }
        self.own()
    }

    /// As [`to_any`](Self::to_any); of what is only lent the address.
    pub(super) fn own(&self) -> Result<Any> {
        // SAFETY: what an argument points to is valid for as long as it is there; what comes is owned by nobody else.
        unsafe { Ok(Any::owned(Api::loaded()?.own(&self.0)?)) }
    }

    /// The argument as the Rust type that is asked for.
    ///
    /// # Errors
    /// [`WrongType`](FlashInferError::WrongType).
    pub fn to<T: FromAny>(&self) -> Result<T> {
        self.to_any()?.to()
    }

    /// The argument, taken apart. A tensor that is only lent is [`Value::Other`]: see [`as_tensor`](Self::as_tensor).
    ///
    /// # Errors
    /// What TVM-FFI raises.
    pub fn value(&self) -> Result<Value> {
        match self.0.type_index {
            type_index @ (type_index::DL_TENSOR_PTR | type_index::RVALUE_REF) => Ok(Value::Other { type_index }),
            _ => Ok(self.to_any()?.into_value()),
        }
    }

    fn described_tensor(&self) -> Result<&'a DLTensor> {
        // SAFETY: each index says which payload is there: a pointer to a tensor, or an object with one right behind its
        // header. Both are valid for as long as the argument is.
        unsafe {
            match self.0.type_index {
                type_index::DL_TENSOR_PTR if !self.0.payload.tensor.is_null() => Ok(&*self.0.payload.tensor),
                type_index::TENSOR => Ok(&*self.0.payload.object.add(1).cast::<DLTensor>()),
                index => Err(FlashInferError::WrongType {
                    what: "the argument".to_owned(),
                    found: kind_name(index).into_owned(),
                    expected: "a tensor",
                }),
            }
        }
    }

    /// The tensor, to be read on the host: one that is lent, or a [`Tensor`](super::Tensor) object.
    ///
    /// # Errors
    /// [`WrongType`](FlashInferError::WrongType) for anything else, and
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) for one on a GPU, which
    /// [`as_tensor_unordered`](Self::as_tensor_unordered) answers, and for one that [`TensorRef`] cannot describe: of another
    /// element type or device, or with too many dimensions.
    pub fn as_tensor(&self) -> Result<TensorRef<'a>> {
        // SAFETY: whoever lent the argument vouched for the tensor, its memory included, for as long as it is lent, and what
        // is done with memory of the host is done by then.
        on_host("Arg::as_tensor", unsafe { borrowed(self.described_tensor()?) }?)
    }

    /// The tensor, to be read wherever it is. Nothing is told of what is queued with it.
    ///
    /// # Safety
    /// On a GPU, what reads it must be queued behind what wrote it, and ahead of what writes it next and of its release:
    /// in a function that is called, on the stream of the call.
    ///
    /// # Errors
    /// As for [`as_tensor`](Self::as_tensor), but for a GPU's.
    pub unsafe fn as_tensor_unordered(&self) -> Result<TensorRef<'a>> {
        // SAFETY: as there, and the caller's promise.
        unsafe { borrowed(self.described_tensor()?) }
    }

    /// The tensor, to be written.
    ///
    /// # Safety
    /// Whoever lent the tensor must let it be written, and nothing else may use its memory meanwhile: no other argument,
    /// and no other tensor made of this one. On a GPU also as for [`as_tensor_unordered`](Self::as_tensor_unordered).
    ///
    /// # Errors
    /// As for [`as_tensor`](Self::as_tensor), but for a GPU's.
    pub unsafe fn as_tensor_mut(&self) -> Result<TensorMut<'a>> {
        // SAFETY: as there, and the caller's promise.
        unsafe { borrowed_mut(self.described_tensor()?) }
    }
}

/// A tensor whose memory is the host's. Of a GPU's, which is used after a call has returned, nobody here knows who orders that
/// with its other uses and its release.
pub(super) fn on_host<'a>(function: &'static str, tensor: TensorRef<'a>) -> Result<TensorRef<'a>> {
    match tensor.device() {
        Device::Cpu => Ok(tensor),
        Device::Cuda(_) => Err(FlashInferError::InvalidArgument {
            function,
            argument: "tensor",
            found: format!("{tensor:?}"),
            expected: "one on the host; one on a GPU is answered by the function of this name with _unordered"
                .to_owned(),
        }),
    }
}
