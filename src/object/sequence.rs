//! Arrays, shapes and lists.

use std::fmt;
use std::slice;
use std::sync::OnceLock;

use super::func::own_function;
use super::{Any, Arg, Func, IntoAny, object_type};
use crate::error::{FlashInferError, Result};
use crate::ffi::abi::{ArrayCell, ShapeCell, type_index};
use crate::ffi::api::Api;

object_type! {
    /// An array of values of any kind. It doesn't change while this holds it.
    Array, ARRAY, "Array"
}

impl Array {
    /// An array of values that are lent, of which it holds references; C strings are copied.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) for a tensor that is only lent, which the array would not keep
    /// alive: put in a [`Tensor`](super::Tensor). Else what TVM-FFI raises.
    pub fn new(items: &[Arg<'_>]) -> Result<Self> {
        static MAKE: OnceLock<Func> = OnceLock::new();
        refuse_what_is_lent("Array::new", items)?;
        // SAFETY: TVM-FFI's own function, which takes any values.
        unsafe { cached(&MAKE, "ffi.Array")?.callee("ffi.Array").call(items)?.to() }
    }

    /// An array of Rust values.
    ///
    /// # Errors
    /// What TVM-FFI raises.
    pub fn from_items<T: IntoAny>(items: impl IntoIterator<Item = T>) -> Result<Self> {
        let items: Vec<Any> = items.into_iter().map(T::into_any).collect::<Result<_>>()?;
        Self::new(Any::as_args(&items))
    }

    /// The values, for as long as the array is borrowed.
    pub fn as_args(&self) -> &[Arg<'_>] {
        // SAFETY: an array object has its cell right behind its header. While this holds a reference nobody changes it:
        // whoever does makes a copy first unless theirs is the only one. Its elements are values with the array's lifetime.
        unsafe {
            let ArrayCell { data, size } = *self.0.cell::<ArrayCell>();
            match usize::try_from(size) {
                Ok(size) if size > 0 && !data.is_null() => slice::from_raw_parts(data.cast(), size),
                _ => &[],
            }
        }
    }

    /// How many values there are.
    pub fn len(&self) -> usize {
        self.as_args().len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The value at a position; `None` behind the last.
    pub fn get(&self, position: usize) -> Option<Any> {
        self.as_args().get(position).map(kept)
    }

    /// The values, each with a reference of its own.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Any> + '_ {
        self.as_args().iter().map(kept)
    }
}

/// A value of a container, with a reference of its own. A tensor that C++ only lent to the container is just an address.
fn kept(arg: &Arg<'_>) -> Any {
    arg.own().unwrap_or_default()
}

impl fmt::Debug for Array {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// TVM-FFI's own function of that name, looked up once.
pub(super) fn cached(cell: &'static OnceLock<Func>, name: &'static str) -> Result<&'static Func> {
    if let Some(func) = cell.get() {
        return Ok(func);
    }
    let func = own_function(name)?;
    Ok(cell.get_or_init(|| func))
}

/// That containers keep what they hold: a tensor that is lent stays a pointer in them.
pub(super) fn refuse_what_is_lent(function: &'static str, items: &[Arg<'_>]) -> Result<()> {
    let lent = |item: &Arg<'_>| matches!(item.type_index(), type_index::DL_TENSOR_PTR | type_index::RVALUE_REF);
    match items.iter().position(lent) {
        None => Ok(()),
        Some(position) => Err(FlashInferError::InvalidArgument {
            function,
            argument: "items",
            found: format!("a tensor that is only lent, at position {position}"),
            expected: "values that can be kept: make it a Tensor object".to_owned(),
        }),
    }
}

object_type! {
    /// The sizes of a tensor, or any other short list of integers.
    Shape, SHAPE, "Shape"
}

// SAFETY: it is integers that nobody changes; references are counted atomically.
unsafe impl Send for Shape {}
// SAFETY: as above.
unsafe impl Sync for Shape {}

impl Shape {
    /// A shape of these sizes.
    ///
    /// # Errors
    /// What TVM-FFI raises.
    pub fn new(sizes: &[i64]) -> Result<Self> {
        static MAKE: OnceLock<Func> = OnceLock::new();
        let sizes: Vec<Arg<'_>> = sizes.iter().map(|&size| Arg::int(size)).collect();
        // SAFETY: TVM-FFI's own function, which takes integers.
        unsafe { cached(&MAKE, "ffi.Shape")?.callee("ffi.Shape").call(&sizes)?.to() }
    }

    /// The sizes.
    pub fn as_slice(&self) -> &[i64] {
        // SAFETY: a shape object has its cell right behind its header, whose integers live as long as the object and never
        // change.
        unsafe {
            let ShapeCell { data, size } = *self.0.cell::<ShapeCell>();
            if data.is_null() { &[] } else { slice::from_raw_parts(data, size) }
        }
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Shape{:?}", self.as_slice())
    }
}

object_type! {
    /// A list that may change, whoever holds it. From TVM-FFI 0.1.9 on; with an older one each function here answers
    /// [`VersionMismatch`](FlashInferError::VersionMismatch), and a list that a module with newer headers made can only be
    /// passed on.
    List, LIST, "List"
}

impl List {
    /// A list of Rust values.
    ///
    /// # Errors
    /// [`VersionMismatch`](FlashInferError::VersionMismatch), or what TVM-FFI raises.
    pub fn from_items<T: IntoAny>(items: impl IntoIterator<Item = T>) -> Result<Self> {
        let items: Vec<Any> = items.into_iter().map(T::into_any).collect::<Result<_>>()?;
        call("ffi.List", Any::as_args(&items))?.to()
    }

    /// How many values there are now.
    ///
    /// # Errors
    /// As for [`from_items`](Self::from_items).
    pub fn len(&self) -> Result<usize> {
        let len: i64 = call("ffi.ListSize", &[Arg::object(&self.0)])?.to()?;
        Ok(usize::try_from(len).unwrap_or(0))
    }

    /// Whether there is none now.
    ///
    /// # Errors
    /// As for [`from_items`](Self::from_items).
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// The value at a position.
    ///
    /// # Errors
    /// An `IndexError` of TVM-FFI's behind the last, and as for [`from_items`](Self::from_items).
    pub fn get(&self, position: usize) -> Result<Any> {
        call("ffi.ListGetItem", &[Arg::object(&self.0), index(position)])
    }

    /// Puts a value in another's place.
    ///
    /// # Errors
    /// As for [`get`](Self::get).
    pub fn set(&self, position: usize, value: impl IntoAny) -> Result<()> {
        let value = value.into_any()?;
        // As in `Dict::remove`.
        let _before = self.get(position)?;
        call("ffi.ListSetItem", &[Arg::object(&self.0), index(position), value.as_arg()]).map(drop)
    }

    /// Puts a value behind the last.
    ///
    /// # Errors
    /// As for [`from_items`](Self::from_items).
    pub fn push(&self, value: impl IntoAny) -> Result<()> {
        let value = value.into_any()?;
        call("ffi.ListAppend", &[Arg::object(&self.0), value.as_arg()]).map(drop)
    }

    /// The values as they are now.
    ///
    /// # Errors
    /// As for [`get`](Self::get).
    pub fn to_vec(&self) -> Result<Vec<Any>> {
        (0..self.len()?).map(|position| self.get(position)).collect()
    }
}

fn index(position: usize) -> Arg<'static> {
    Arg::int(i64::try_from(position).unwrap_or(i64::MAX))
}

impl fmt::Debug for List {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not what is in it, which may be the list itself.
        write!(f, "List of {}", self.len().unwrap_or(0))
    }
}

/// Calls a function of TVM-FFI's own that came later.
pub(super) fn call(name: &'static str, args: &[Arg<'_>]) -> Result<Any> {
    let Some(func) = Func::global(name)? else {
        let version = Api::loaded()?.version();
        return Err(FlashInferError::VersionMismatch {
            library: "libtvm_ffi.so".to_owned(),
            found: format!("{}.{}.{}, without {name}", version.major, version.minor, version.patch),
            expected: "0.1.9 or newer".to_owned(),
            remedy: "adopt a newer one (RuntimeConfig::adopt_tvm_ffi), or use Array and Map",
        });
    };
    // SAFETY: TVM-FFI's own function, which checks what it takes.
    unsafe { func.callee(name).call(args) }
}
