//! Values of TVM-FFI: numbers, texts, containers, functions, tensors, errors, built and read without C++.
//!
//! [`Any`] owns one value of any kind, [`Arg`] is one that is lent for a call, and [`Value`] is one
//! taken apart. An object is counted: a clone holds one more reference, a drop gives one up, and whoever is last releases
//! it. Everything on values is safe; what runs code of somebody else's, [`Func::call`] for example, is not. A program that makes
//! references and forgets them meets a panic at 2³¹ of one object, since TVM-FFI counts them in 32 bits.
//!
//! ```no_run
//! use flashinfer_rs::object::{Any, Array, Func, IntoAny, Map};
//! use flashinfer_rs::{FlashInferRuntime, RuntimeConfig};
//!
//! # fn main() -> flashinfer_rs::Result<()> {
//! FlashInferRuntime::initialize(RuntimeConfig::default())?;
//!
//! let shapes = Array::from_items([4, 4096])?;
//! let options = Map::from_items([("eps", 1e-6.into_any()?), ("shapes", shapes.into_any()?)])?;
//! assert_eq!(options.get("eps")?.map(Any::to::<f64>).transpose()?, Some(1e-6));
//!
//! let add = Func::from_fn("add", |a: i64, b: i64| Ok(a + b))?;
//! // SAFETY: the closure is sound with any arguments.
//! let sum = unsafe { add.typed::<(i64, i64), i64>().call((1, 2)) }?;
//! assert_eq!(sum, 3);
//! # Ok(())
//! # }
//! ```

mod allocator;
mod any;
mod arg;
mod contain;
mod convert;
mod error;
mod func;
mod handle;
mod map;
mod sequence;
mod tensor;
mod typed;

#[cfg(feature = "bench")]
pub(crate) use allocator::with_current;
#[cfg(feature = "cudarc")]
pub use allocator::{ArenaAllocator, StreamAllocator};
pub use allocator::{HostAllocator, Memory, TensorAllocator, TensorRequest};
pub use any::{Any, Value};
pub use arg::Arg;
pub use convert::{FromAny, IntoAny};
pub use error::Error;
pub(crate) use func::own_function;
pub use func::{Closure, Func};
pub use handle::Object;
pub use map::{Dict, Map};
pub use sequence::{Array, List, Shape};
pub use tensor::{DlpackTensor, DlpackTensorUnversioned, Tensor};
pub(crate) use typed::Callee;
pub use typed::{Param, Params, Typed};

/// Declares an object of one type: a handle whose type index was looked at.
macro_rules! object_type {
    ($(#[$doc:meta])* $name:ident, $index:ident, $expected:literal) => {
        $(#[$doc])*
        #[derive(Clone)]
        #[repr(transparent)]
        pub struct $name($crate::object::Object);

        impl $name {
            /// The object, of whatever type.
            pub fn as_object(&self) -> &$crate::object::Object {
                &self.0
            }
        }

        impl From<$name> for $crate::object::Object {
            fn from(value: $name) -> Self {
                value.0
            }
        }

        impl From<$name> for $crate::object::Any {
            fn from(value: $name) -> Self {
                value.0.into()
            }
        }

        impl $crate::object::IntoAny for $name {
            fn into_any(self) -> $crate::error::Result<$crate::object::Any> {
                Ok(self.0.into())
            }
        }

        impl $crate::object::IntoAny for &$name {
            fn into_any(self) -> $crate::error::Result<$crate::object::Any> {
                Ok(self.0.clone().into())
            }
        }

        impl $crate::object::FromAny for $name {
            const EXPECTED: &'static str = $expected;

            fn from_any(any: $crate::object::Any) -> std::result::Result<Self, $crate::object::Any> {
                any.into_object_of($crate::ffi::abi::type_index::$index).map(Self)
            }
        }

        impl $crate::object::Param for &$name {
            type Arg<'a> = &'a $name;
            type Held<'a> = &'a $name;

            #[inline(always)]
            fn hold<'a>(arg: Self::Arg<'a>) -> $crate::error::Result<Self::Held<'a>> {
                Ok(arg)
            }

            #[inline(always)]
            fn lend<'h>(held: &'h Self::Held<'_>) -> $crate::object::Arg<'h> {
                $crate::object::Arg::object(&held.0)
            }
        }
    };
}
use object_type;
