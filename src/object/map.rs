//! Maps and dictionaries.

use std::fmt;
use std::sync::OnceLock;

use super::func::own_function;
use super::sequence::{cached, call, refuse_what_is_lent};
use super::{Any, Arg, Callee, Func, IntoAny, Object, object_type};
use crate::error::Result;

object_type! {
    /// A map from values to values of any kind, in the order in which they were put in. It doesn't change while this holds it.
    Map, MAP, "Map"
}

impl Map {
    /// A map of keys and values, one behind the other, that are lent.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for a tensor that is only lent, which the map would not
    /// keep alive; a `ValueError` or the like of TVM-FFI's for an odd number.
    pub fn new(keys_and_values: &[Arg<'_>]) -> Result<Self> {
        static MAKE: OnceLock<Func> = OnceLock::new();
        refuse_what_is_lent("Map::new", keys_and_values)?;
        // SAFETY: TVM-FFI's own function, which takes any values.
        unsafe { cached(&MAKE, "ffi.Map")?.callee("ffi.Map").call(keys_and_values)?.to() }
    }

    /// A map of Rust values. Of two keys that are the same the later one counts.
    ///
    /// # Errors
    /// What TVM-FFI raises.
    pub fn from_items<K: IntoAny, V: IntoAny>(items: impl IntoIterator<Item = (K, V)>) -> Result<Self> {
        let items = flat(items)?;
        Self::new(Any::as_args(&items))
    }

    /// How many keys there are.
    pub fn len(&self) -> usize {
        size(&self.0, "ffi.MapSize").unwrap_or(0)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The value of a key; `None` where there is no such key.
    ///
    /// # Errors
    /// What making the key takes.
    pub fn get(&self, key: impl IntoAny) -> Result<Option<Any>> {
        static COUNT: OnceLock<Func> = OnceLock::new();
        static ITEM: OnceLock<Func> = OnceLock::new();
        let key = key.into_any()?;
        let args = [Arg::object(&self.0), key.as_arg()];
        // SAFETY: TVM-FFI's own functions, which take a map and any value.
        unsafe {
            let found: i64 = cached(&COUNT, "ffi.MapCount")?.callee("ffi.MapCount").call(&args)?.to()?;
            match found {
                0 => Ok(None),
                _ => cached(&ITEM, "ffi.MapGetItem")?.callee("ffi.MapGetItem").call(&args).map(Some),
            }
        }
    }

    /// Keys and values, in the order in which the keys were put in.
    pub fn iter(&self) -> impl Iterator<Item = (Any, Any)> + use<> {
        items(&self.0, self.len(), "ffi.MapForwardIterFunctor").unwrap_or_default().into_iter()
    }
}

impl fmt::Debug for Map {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

fn flat<K: IntoAny, V: IntoAny>(items: impl IntoIterator<Item = (K, V)>) -> Result<Vec<Any>> {
    let mut flat = Vec::new();
    for (key, value) in items {
        flat.extend([key.into_any()?, value.into_any()?]);
    }
    Ok(flat)
}

fn size(map: &Object, function: &'static str) -> Result<usize> {
    // SAFETY: TVM-FFI's own function, which takes such an object.
    let size: i64 = unsafe { own_function(function)?.callee(function).call(&[Arg::object(map)]) }?.to()?;
    Ok(usize::try_from(size).unwrap_or(0))
}

/// The contents, by TVM-FFI's own iterator and not by the layout, which differs with the size. It keeps no reference to the
/// map, so that `map` must be there meanwhile; and it reads garbage in an empty one, which is never asked.
fn items(map: &Object, len: usize, functor: &'static str) -> Result<Vec<(Any, Any)>> {
    const KEY: i64 = 0;
    const VALUE: i64 = 1;
    const NEXT: i64 = 2;
    let mut items = Vec::with_capacity(len);
    if len == 0 {
        return Ok(items);
    }
    // SAFETY: TVM-FFI's own function, which takes such an object.
    let at = unsafe { own_function(functor)?.callee(functor).call(&[Arg::object(map)]) }?;
    let at: Func = at.to()?;
    let at: Callee<'_> = at.callee(functor);
    loop {
        // SAFETY: the iterator is at an item that is there, by its own answer.
        let more = unsafe {
            items.push((at.call(&[Arg::int(KEY)])?, at.call(&[Arg::int(VALUE)])?));
            at.call(&[Arg::int(NEXT)])?.to::<bool>()?
        };
        if !more || items.len() >= len {
            return Ok(items);
        }
    }
}

object_type! {
    /// A dictionary that may change, whoever holds it. From TVM-FFI 0.1.9 on; with an older one each function here answers
    /// [`VersionMismatch`](crate::FlashInferError::VersionMismatch), and a dictionary that a module with newer headers made can
    /// only be passed on.
    Dict, DICT, "Dict"
}

impl Dict {
    /// A dictionary of Rust values.
    ///
    /// # Errors
    /// [`VersionMismatch`](crate::FlashInferError::VersionMismatch), or what TVM-FFI raises.
    pub fn from_items<K: IntoAny, V: IntoAny>(items: impl IntoIterator<Item = (K, V)>) -> Result<Self> {
        let items = flat(items)?;
        call("ffi.Dict", Any::as_args(&items))?.to()
    }

    /// How many keys there are now.
    ///
    /// # Errors
    /// As for [`from_items`](Self::from_items).
    pub fn len(&self) -> Result<usize> {
        let len: i64 = call("ffi.DictSize", &[Arg::object(&self.0)])?.to()?;
        Ok(usize::try_from(len).unwrap_or(0))
    }

    /// Whether there is none now.
    ///
    /// # Errors
    /// As for [`from_items`](Self::from_items).
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// The value of a key; `None` where there is no such key.
    ///
    /// # Errors
    /// As for [`from_items`](Self::from_items).
    pub fn get(&self, key: impl IntoAny) -> Result<Option<Any>> {
        let key = key.into_any()?;
        let args = [Arg::object(&self.0), key.as_arg()];
        let found: i64 = call("ffi.DictCount", &args)?.to()?;
        if found == 0 { Ok(None) } else { call("ffi.DictGetItem", &args).map(Some) }
    }

    /// Gives a key a value.
    ///
    /// # Errors
    /// As for [`from_items`](Self::from_items).
    pub fn set(&self, key: impl IntoAny, value: impl IntoAny) -> Result<()> {
        let (key, value) = (key.into_any()?, value.into_any()?);
        // As in `remove`.
        let _before = self.get(&key)?;
        call("ffi.DictSetItem", &[Arg::object(&self.0), key.as_arg(), value.as_arg()]).map(drop)
    }

    /// Takes a key out.
    ///
    /// # Errors
    /// As for [`from_items`](Self::from_items).
    pub fn remove(&self, key: impl IntoAny) -> Result<()> {
        let key = key.into_any()?;
        // Dropped behind the call: where a closure is dropped, code of somebody else's runs, which must not find the
        // dictionary while TVM-FFI is at it.
        let _before = self.get(&key)?;
        call("ffi.DictErase", &[Arg::object(&self.0), key.as_arg()]).map(drop)
    }

    /// Keys and values as they are now.
    ///
    /// # Errors
    /// As for [`from_items`](Self::from_items).
    pub fn to_vec(&self) -> Result<Vec<(Any, Any)>> {
        items(&self.0, self.len()?, "ffi.DictForwardIterFunctor")
    }
}

impl fmt::Debug for Dict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not what is in it, which may be the dictionary itself.
        write!(f, "Dict of {}", self.len().unwrap_or(0))
    }
}
