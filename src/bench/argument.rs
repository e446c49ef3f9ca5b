//! What a bound kernel is called with.

use std::ffi::c_void;

use super::trace::Scalar;
use crate::ffi::dlpack::DLTensor;
use crate::object::{Arg, Tensor};
use crate::owner::Owner;
use crate::tensor::{TensorMut, TensorRef};

/// An input of a call: made `from` a tensor, a number or nothing.
///
/// A [`Tensor`](crate::object::Tensor) is passed as the object that it is, which every kernel takes. A
/// [`TensorRef`] is lent for the call, which costs nothing, and which a kernel refuses whose parameter is `ffi::Tensor`.
#[derive(Clone, Copy)]
pub struct Argument<'a>(pub(super) Operand<'a>);

/// An output of a call that is given its place: made `from` a [`Tensor`](crate::object::Tensor), or from a `&mut` to a
/// [`TensorMut`].
pub struct Destination<'a>(pub(super) Operand<'a>);

/// What a call passes.
#[derive(Clone, Copy)]
pub(super) enum Operand<'a> {
    Object(&'a Tensor),
    Lent(Lent<'a>),
    Int(i64),
    Float(f64),
    Bool(bool),
    Absent,
}

/// A tensor that is lent for as long as it is borrowed.
#[derive(Clone, Copy)]
pub(super) struct Lent<'a> {
    /// Its shape and strides are the borrowed tensor's.
    tensor: DLTensor,
    pub(super) owner: Owner<'a>,
    /// The one stream that may use it, where its owner said so.
    pub(super) stream: Option<*mut c_void>,
}

impl<'a> Operand<'a> {
    /// The tensor's description, of a tensor.
    #[inline(always)]
    pub(super) fn tensor(&self) -> Option<&DLTensor> {
        match self {
            Self::Object(tensor) => Some(tensor.described()),
            Self::Lent(lent) => Some(&lent.tensor),
            _ => None,
        }
    }

    /// Who orders the tensor's uses, of one that is lent.
    pub(super) fn owner(&self) -> Option<&Owner<'a>> {
        match self {
            Self::Lent(lent) => Some(&lent.owner),
            _ => None,
        }
    }

    /// What TVM-FFI is given.
    #[inline(always)]
    pub(super) fn arg(&self) -> Arg<'_> {
        match self {
            Self::Object(tensor) => Arg::object(tensor.as_object()),
            Self::Lent(lent) => Arg::dl_tensor(&lent.tensor),
            Self::Int(number) => Arg::int(*number),
            Self::Float(number) => Arg::float(*number),
            Self::Bool(flag) => Arg::bool(*flag),
            Self::Absent => Arg::NONE,
        }
    }
}

impl Argument<'_> {
    /// An optional input that is left out.
    pub const ABSENT: Self = Self(Operand::Absent);
}

impl<'a> From<&'a Tensor> for Argument<'a> {
    #[inline]
    fn from(tensor: &'a Tensor) -> Self {
        Self(Operand::Object(tensor))
    }
}

impl<'a> From<&'a TensorRef<'_>> for Argument<'a> {
    #[inline]
    fn from(tensor: &'a TensorRef<'_>) -> Self {
        let layout = tensor.layout();
        Self(Operand::Lent(Lent { tensor: layout.pack(), owner: *tensor.owner(), stream: layout.stream() }))
    }
}

impl From<i64> for Argument<'_> {
    #[inline]
    fn from(number: i64) -> Self {
        Self(Operand::Int(number))
    }
}

impl From<f64> for Argument<'_> {
    #[inline]
    fn from(number: f64) -> Self {
        Self(Operand::Float(number))
    }
}

impl From<bool> for Argument<'_> {
    #[inline]
    fn from(flag: bool) -> Self {
        Self(Operand::Bool(flag))
    }
}

impl From<Scalar> for Argument<'_> {
    fn from(scalar: Scalar) -> Self {
        match scalar {
            Scalar::Int(number) => number.into(),
            Scalar::Float(number) => number.into(),
            Scalar::Bool(flag) => flag.into(),
        }
    }
}

impl<'a> From<&'a Tensor> for Destination<'a> {
    #[inline]
    fn from(tensor: &'a Tensor) -> Self {
        Self(Operand::Object(tensor))
    }
}

impl<'a> From<&'a mut TensorMut<'_>> for Destination<'a> {
    #[inline]
    fn from(tensor: &'a mut TensorMut<'_>) -> Self {
        // Borrowed as long as this is there, exclusively.
        let tensor: &'a TensorMut<'_> = tensor;
        let layout = tensor.layout();
        Self(Operand::Lent(Lent { tensor: layout.pack(), owner: *tensor.owner(), stream: layout.stream() }))
    }
}
