//! Functions with the types of their parameters and of their result.

use std::ffi::{CStr, c_int, c_void};
use std::fmt;
use std::marker::PhantomData;

use super::any::wrong_type;
use super::{Any, Arg, FromAny, Object};
use crate::error::{FlashInferError, Result};
use crate::ffi::abi::{self, SafeCall};
use crate::ffi::api::Api;
use crate::log;
use crate::tensor::{DType, Device, PackedTensor, TensorRef};

/// What is called, with what it is called on, for as long as its owner is there.
#[derive(Clone, Copy)]
pub(crate) struct Callee<'f> {
    pub(crate) call: SafeCall,
    pub(crate) handle: *mut c_void,
    pub(crate) name: &'f str,
    pub(crate) api: &'static Api,
}

impl Callee<'_> {
    /// # Safety
    /// The function must be sound to call with these arguments.
    #[inline(always)]
    pub(crate) unsafe fn invoke(&self, args: &[Arg<'_>], result: &mut abi::Any) -> c_int {
        // SAFETY: `Arg` is `Any` with a lifetime, which keeps what the arguments point to alive during the call. That
        // the function is sound with them is the caller's promise. The handle is the one that the function was found
        // with: null for a function that a library exports, or the function object.
        unsafe { (self.call)(self.handle, args.as_ptr().cast::<abi::Any>(), args.len() as i32, result) }
    }

    /// [`call`](Self::call), which the log tells of.
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    pub(crate) unsafe fn call_seen(&self, args: &[Arg<'_>]) -> Result<Any> {
        if log::enabled() {
            // SAFETY: the caller's promise.
            return log::function(self.name, args, || unsafe { self.call(args) });
        }
        // SAFETY: as above.
        unsafe { self.call(args) }
    }

    /// # Safety
    /// As for [`invoke`](Self::invoke).
    #[inline(always)]
    pub(crate) unsafe fn call(&self, args: &[Arg<'_>]) -> Result<Any> {
        // They are counted in 32 bits.
        if args.len() > i32::MAX as usize {
            return Err(too_many(args.len()));
        }
        let mut result = abi::Any::NONE;
        // SAFETY: the caller's promise.
        match unsafe { self.invoke(args, &mut result) } {
            // SAFETY: a function that answers 0 left a valid result, whose object, if it is one, is now ours.
            0 => Ok(unsafe { Any::owned(result) }),
            code => Err(self.api.take_error(self.name, code)),
        }
    }
}

#[cold]
fn too_many(args: usize) -> FlashInferError {
    FlashInferError::InvalidArgument {
        function: "calling a function",
        argument: "args",
        found: format!("{args} of them"),
        expected: format!("at most {}", i32::MAX),
    }
}

/// A function whose parameters and result have Rust types: arguments cross the boundary without a look-up or an allocation,
/// and the result is checked.
///
/// `P` is a tuple of [`Param`]s, `R` a [`FromAny`]. References in them are only names for what is passed: each call may
/// lend for as long as it takes.
pub struct Typed<'f, P, R> {
    callee: Callee<'f>,
    signature: PhantomData<fn(P) -> R>,
}

impl<P, R> Clone for Typed<'_, P, R> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<P, R> Copy for Typed<'_, P, R> {}

impl<P: Params, R> fmt::Debug for Typed<'_, P, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Typed({} of {} arguments)", self.callee.name, P::COUNT)
    }
}

impl<'f, P: Params, R: FromAny> Typed<'f, P, R> {
    /// How many arguments it is called with.
    pub const ARITY: usize = P::COUNT;

    pub(crate) const fn new(callee: Callee<'f>) -> Self {
        Self { callee, signature: PhantomData }
    }

    /// Calls the function on this thread's stream.
    ///
    /// # Errors
    /// [`TvmFfiCall`](crate::FlashInferError::TvmFfiCall) with what the function raised,
    /// [`WrongType`](crate::FlashInferError::WrongType) for a result that is no `R`, and what it takes to make an argument.
    ///
    /// # Safety
    /// As for [`Function::call`](crate::Function::call).
    #[inline]
    pub unsafe fn call(&self, args: P::Args<'_>) -> Result<R> {
        // SAFETY: the caller's promise.
        self.returned(P::lend(args, |args| unsafe { self.callee.call_seen(args) })?)
    }

    /// [`call`](Self::call), of TVM-FFI's own functions, of which the log does not tell.
    ///
    /// # Safety
    /// As there.
    #[inline]
    pub(crate) unsafe fn call_unseen(&self, args: P::Args<'_>) -> Result<R> {
        // SAFETY: the caller's promise.
        self.returned(P::lend(args, |args| unsafe { self.callee.call(args) })?)
    }

    #[inline(always)]
    fn returned(&self, result: Any) -> Result<R> {
        let callee = &self.callee;
        R::from_any(result).map_err(|found| wrong_type(format!("what {} returned", callee.name), &found, R::EXPECTED))
    }
}

/// The types of a function's parameters: a tuple of [`Param`]s.
pub trait Params {
    /// What is passed.
    type Args<'a>;

    /// How many there are.
    const COUNT: usize;

    /// Lends the arguments to `call`.
    ///
    /// # Errors
    /// Where an argument cannot be made, and what `call` answers.
    fn lend<T>(args: Self::Args<'_>, call: impl FnOnce(&[Arg<'_>]) -> Result<T>) -> Result<T>;
}

/// The type of a parameter. References in it have any lifetime: what is passed is [`Arg`](Self::Arg), for as long as a call
/// takes.
pub trait Param {
    /// What is passed.
    type Arg<'a>;
    /// What lives during the call, for the argument to point to.
    type Held<'a>;

    /// What the argument will point to.
    ///
    /// # Errors
    /// Where an object must be made: [`NotInitialized`](crate::FlashInferError::NotInitialized), or what TVM-FFI raises.
    fn hold<'a>(arg: Self::Arg<'a>) -> Result<Self::Held<'a>>;

    /// The argument.
    fn lend<'h>(held: &'h Self::Held<'_>) -> Arg<'h>;
}

macro_rules! by_value {
    ($($rust:ty, $value:ident => $arg:expr;)*) => {$(
        impl Param for $rust {
            type Arg<'a> = $rust;
            type Held<'a> = $rust;

            #[inline(always)]
            fn hold<'a>(arg: Self::Arg<'a>) -> Result<Self::Held<'a>> {
                Ok(arg)
            }

            #[inline(always)]
            fn lend<'h>(held: &'h Self::Held<'_>) -> Arg<'h> {
                let $value = *held;
                $arg
            }
        }
    )*};
}

by_value! {
    i64, value => Arg::int(value);
    i32, value => Arg::int(value.into());
    u32, value => Arg::int(value.into());
    bool, value => Arg::bool(value);
    f64, value => Arg::float(value);
    f32, value => Arg::float(value.into());
    DType, value => Arg::dtype(value);
    Device, value => Arg::device(value);
    *mut c_void, value => Arg::opaque(value);
}

macro_rules! by_reference {
    ($($held:ident, $rust:ty => $arg:expr;)*) => {$(
        impl Param for &$rust {
            type Arg<'a> = &'a $rust;
            type Held<'a> = &'a $rust;

            #[inline(always)]
            fn hold<'a>(arg: Self::Arg<'a>) -> Result<Self::Held<'a>> {
                Ok(arg)
            }

            #[inline(always)]
            fn lend<'h>($held: &'h Self::Held<'_>) -> Arg<'h> {
                $arg
            }
        }
    )*};
}

by_reference! {
    held, CStr => Arg::str(held);
    held, Object => Arg::object(held);
    held, Any => held.as_arg();
}

impl Param for &PackedTensor<'_> {
    type Arg<'a> = &'a PackedTensor<'a>;
    type Held<'a> = &'a PackedTensor<'a>;

    #[inline(always)]
    fn hold<'a>(arg: Self::Arg<'a>) -> Result<Self::Held<'a>> {
        Ok(arg)
    }

    #[inline(always)]
    fn lend<'h>(held: &'h Self::Held<'_>) -> Arg<'h> {
        Arg::tensor(held)
    }
}

impl Param for &TensorRef<'_> {
    type Arg<'a> = &'a TensorRef<'a>;
    type Held<'a> = PackedTensor<'a>;

    #[inline(always)]
    fn hold<'a>(arg: Self::Arg<'a>) -> Result<Self::Held<'a>> {
        Ok(arg.pack())
    }

    #[inline(always)]
    fn lend<'h>(held: &'h Self::Held<'_>) -> Arg<'h> {
        Arg::tensor(held)
    }
}

impl Param for Arg<'_> {
    type Arg<'a> = Arg<'a>;
    type Held<'a> = Arg<'a>;

    #[inline(always)]
    fn hold<'a>(arg: Self::Arg<'a>) -> Result<Self::Held<'a>> {
        Ok(arg)
    }

    #[inline(always)]
    fn lend<'h>(held: &'h Self::Held<'_>) -> Arg<'h> {
        *held
    }
}

impl Param for &str {
    type Arg<'a> = &'a str;
    type Held<'a> = Any;

    #[inline]
    fn hold<'a>(arg: Self::Arg<'a>) -> Result<Self::Held<'a>> {
        Any::str(arg)
    }

    #[inline(always)]
    fn lend<'h>(held: &'h Self::Held<'_>) -> Arg<'h> {
        held.as_arg()
    }
}

impl Param for &[u8] {
    type Arg<'a> = &'a [u8];
    type Held<'a> = Any;

    #[inline]
    fn hold<'a>(arg: Self::Arg<'a>) -> Result<Self::Held<'a>> {
        Any::bytes(arg)
    }

    #[inline(always)]
    fn lend<'h>(held: &'h Self::Held<'_>) -> Arg<'h> {
        held.as_arg()
    }
}

impl<T: Param> Param for Option<T> {
    type Arg<'a> = Option<T::Arg<'a>>;
    type Held<'a> = Option<T::Held<'a>>;

    #[inline(always)]
    fn hold<'a>(arg: Self::Arg<'a>) -> Result<Self::Held<'a>> {
        arg.map(T::hold).transpose()
    }

    #[inline(always)]
    fn lend<'h>(held: &'h Self::Held<'_>) -> Arg<'h> {
        held.as_ref().map_or(Arg::NONE, T::lend)
    }
}

macro_rules! tuples {
    ($($name:ident)*) => {
        impl<$($name: Param),*> Params for ($($name,)*) {
            type Args<'a> = ($($name::Arg<'a>,)*);

            const COUNT: usize = 0 $(+ { let _ = PhantomData::<fn($name)>; 1 })*;

            #[inline(always)]
            #[allow(non_snake_case, unused_variables, clippy::unused_unit, reason = "also of none")]
            fn lend<T>(args: Self::Args<'_>, call: impl FnOnce(&[Arg<'_>]) -> Result<T>) -> Result<T> {
                let ($($name,)*) = args;
                $(let $name = <$name as Param>::hold($name)?;)*
                call(&[$(<$name as Param>::lend(&$name)),*])
            }
        }
    };
}

macro_rules! each_prefix {
    () => { tuples!(); };
    ($first:ident $($rest:ident)*) => { tuples!($first $($rest)*); each_prefix!($($rest)*); };
}

each_prefix!(A B C D E F G H I J K L M N O P Q R S U V W X Y);
