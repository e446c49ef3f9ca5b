//! Modules and functions: calling anything that speaks TVM-FFI.

use std::collections::BTreeSet;
use std::ffi::{CString, c_int, c_void};
use std::fmt;
use std::path::Path;
use std::ptr;
use std::sync::{Mutex, PoisonError};

use crate::error::{FlashInferError, Result};
use crate::ffi::abi::{self, SafeCall};
use crate::ffi::api::Api;
use crate::loader::Library;
use crate::log;
use crate::object::{Any, Arg, Callee, FromAny, Func, Object, Params, Typed, Value, own_function};

pub(crate) use crate::elf::PREFIX;

/// What it puts before the name of a function's description, a function as well.
const METADATA: &str = "_metadata_";
const DOC: &str = "_doc_";

/// A set of functions: a loaded library, a module object of TVM-FFI's, or functions of this process. A clone is the same.
#[derive(Debug, Clone)]
pub struct Module {
    name: String,
    functions: Functions,
    api: &'static Api,
}

#[derive(Debug, Clone)]
enum Functions {
    Loaded(Library),
    Object(ModuleObject),
    Here(Vec<(&'static str, SafeCall)>),
}

/// A module object. It is never released for the last time: that would unload a library whose code may be wanted still, to
/// release an object that it made.
#[derive(Debug, Clone)]
struct ModuleObject(Object);

// SAFETY: references are counted atomically, and TVM-FFI's own functions, which are all that is called with it, look things up
// and change nothing.
unsafe impl Send for ModuleObject {}
// SAFETY: as above.
unsafe impl Sync for ModuleObject {}

impl fmt::Debug for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Api")
    }
}

/// Keeps a module object for good, by one reference too many: however often it is met.
fn keep(object: &Object) {
    static KEPT: Mutex<BTreeSet<usize>> = Mutex::new(BTreeSet::new());
    // An address stands for the object, which is never released.
    if KEPT.lock().unwrap_or_else(PoisonError::into_inner).insert(object.handle().addr()) {
        std::mem::forget(object.clone());
    }
}

impl Module {
    pub(crate) fn loaded(name: &str, library: Library, api: &'static Api) -> Self {
        Self { name: name.to_owned(), functions: Functions::Loaded(library), api }
    }

    pub(crate) fn here(name: &str, functions: Vec<(&'static str, SafeCall)>, api: &'static Api) -> Self {
        Self { name: name.to_owned(), functions: Functions::Here(functions), api }
    }

    /// The module of a module object, which stays for good.
    pub(crate) fn of_object(object: Object) -> std::result::Result<Self, Object> {
        let Ok(api) = Api::loaded() else { return Err(object) };
        keep(&object);
        // SAFETY: TVM-FFI's own function, which takes a module.
        let kind = own_function("ffi.ModuleGetKind")
            .and_then(|kind| unsafe { kind.typed::<(&Object,), String>().call_unseen((&object,)) })
            .unwrap_or_else(|_| "unknown".to_owned());
        Ok(Self { name: format!("a module object ({kind})"), functions: Functions::Object(ModuleObject(object)), api })
    }

    pub(crate) fn named(self, name: String) -> Self {
        Self { name, ..self }
    }

    /// The module's name: a library's soname.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that was loaded; `None` for functions of this process, and for a module object.
    pub fn path(&self) -> Option<&Path> {
        match &self.functions {
            Functions::Loaded(library) => Some(library.path()),
            Functions::Object(_) | Functions::Here(_) => None,
        }
    }

    /// The module object, of a module that is one, to be passed to functions.
    pub fn as_object(&self) -> Option<&Object> {
        match &self.functions {
            Functions::Object(module) => Some(&module.0),
            Functions::Loaded(_) | Functions::Here(_) => None,
        }
    }

    /// The addresses of exported data whose names end with `suffix`.
    pub(crate) fn data_symbols(&self, suffix: &str) -> Vec<*mut u8> {
        match &self.functions {
            Functions::Loaded(library) => library.data_symbols(suffix),
            Functions::Object(_) | Functions::Here(_) => Vec::new(),
        }
    }

    /// The names of the functions that it exports, in alphabetical order; none for a module object, which does not tell.
    pub fn functions(&self) -> Vec<String> {
        match &self.functions {
            Functions::Loaded(library) => exported(library.functions()),
            Functions::Object(_) => Vec::new(),
            Functions::Here(functions) => exported(functions.iter().map(|(name, _)| *name)),
        }
    }

    /// A function by the name it was exported under, `gemma_rmsnorm` for example.
    ///
    /// # Errors
    /// [`FunctionMissing`](FlashInferError::FunctionMissing), which says what there is.
    pub fn function(&self, name: &str) -> Result<Function> {
        let found = match &self.functions {
            Functions::Loaded(library) => {
                exported_function(library, name).map(|call| Function::exported(call, name, self.api))
            }
            Functions::Here(functions) => {
                let known = functions.iter().find(|(known, _)| *known == name);
                known.map(|(_, call)| Function::exported(*call, name, self.api))
            }
            Functions::Object(module) => {
                let get = own_function("ffi.ModuleGetFunction")?;
                // SAFETY: TVM-FFI's own function, which takes a module, a name, and whether to look into what it imports.
                let func =
                    unsafe { get.typed::<(&Object, &str, bool), Option<Func>>().call_unseen((&module.0, name, true)) }?;
                func.map(|func| func.named(name))
            }
        };
        found.ok_or_else(|| self.missing(name))
    }

    #[cold]
    fn missing(&self, name: &str) -> FlashInferError {
        let exported = self.functions();
        let nearest = nearest(name, &exported).map(str::to_owned);
        FlashInferError::FunctionMissing { module: self.name.clone(), function: name.to_owned(), nearest, exported }
    }

    /// What a function says of itself, where the module was compiled with `TVM_FFI_DLL_EXPORT_INCLUDE_METADATA` and headers
    /// from 0.1.4 on: JSON, whose `type_schema` is JSON again in a string.
    ///
    /// # Errors
    /// [`FunctionMissing`](FlashInferError::FunctionMissing), or what the description's function raises.
    pub fn metadata(&self, function: &str) -> Result<Option<String>> {
        self.description(METADATA, "ffi.ModuleGetFunctionMetadata", function)
    }

    /// A function's documentation, where it was compiled in as its [metadata](Self::metadata) was.
    ///
    /// # Errors
    /// As there.
    pub fn doc(&self, function: &str) -> Result<Option<String>> {
        self.description(DOC, "ffi.ModuleGetFunctionDoc", function)
    }

    fn description(&self, kind: &str, getter: &'static str, name: &str) -> Result<Option<String>> {
        self.function(name)?;
        match &self.functions {
            // Called by oneself: the library's own look-up came with 0.1.4.
            Functions::Loaded(library) => match exported_function(library, &format!("{kind}{name}")) {
                Some(call) => {
                    let describe = Function::exported(call, name, self.api);
                    // SAFETY: under this name TVM-FFI exports a function without parameters that returns a string; whoever
                    // opened the module vouched for that.
                    unsafe { describe.typed::<(), String>().call_unseen(()) }.map(Some)
                }
                None => Ok(None),
            },
            Functions::Object(module) => {
                // SAFETY: TVM-FFI's own function, which takes a module, a name, and whether to look into what it imports.
                unsafe {
                    own_function(getter)?
                        .typed::<(&Object, &str, bool), Option<String>>()
                        .call_unseen((&module.0, name, true))
                }
            }
            Functions::Here(_) => Ok(None),
        }
    }
}

fn exported_function(library: &Library, name: &str) -> Option<SafeCall> {
    let symbol = CString::new(format!("{PREFIX}{name}")).ok()?;
    // SAFETY: TVM-FFI gives every function that it exports under this prefix this one type.
    unsafe { library.symbol::<SafeCall>(&symbol) }.ok()
}

/// Functions' names, without what describes them or belongs to the library.
pub(crate) fn exported<'a>(names: impl Iterator<Item = &'a str>) -> Vec<String> {
    let names: Vec<&str> = names.collect();
    let describes = |name: &str| {
        let of = [METADATA, DOC].into_iter().find_map(|kind| name.strip_prefix(kind));
        name.starts_with("_library_") || of.is_some_and(|of| names.contains(&of))
    };
    let mut functions: Vec<_> = names.iter().filter(|name| !describes(name)).map(|name| (*name).to_owned()).collect();
    functions.sort_unstable();
    functions.dedup();
    functions
}

/// The name that is most like this one, if any is like it at all.
pub(crate) fn nearest<'a>(name: &str, names: &'a [String]) -> Option<&'a str> {
    // Whoever asks for a name of that length meant none of these.
    const LONGEST: usize = 256;
    let few = names.iter().filter(|other| other.len().max(name.len()) <= LONGEST);
    let closest = few.map(|other| (distance(name, other), other)).min()?;
    (closest.0 <= name.len().max(closest.1.len()) / 2).then_some(closest.1.as_str())
}

/// How many bytes must be changed, added or taken out to make one of the other.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, left) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, right) in b.bytes().enumerate() {
            let changed = diagonal + usize::from(left != right);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// A function with TVM-FFI's calling convention, and the name that it was found by.
#[derive(Clone)]
pub struct Function {
    call: SafeCall,
    /// What it is called on: null for a function that a library exports, else the function object.
    handle: *mut c_void,
    /// The function object.
    func: Option<Func>,
    name: Box<str>,
    api: &'static Api,
}

// SAFETY: the handle is that of `func`, which is both, or null.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl fmt::Debug for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Function").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Func {
    /// The function under a name, which errors then say.
    pub fn named(self, name: &str) -> Function {
        let Callee { call, handle, api, .. } = self.callee(name);
        Function { call, handle, func: Some(self), name: name.into(), api }
    }
}

impl Function {
    fn exported(call: SafeCall, name: &str, api: &'static Api) -> Self {
        Self { call, handle: ptr::null_mut(), func: None, name: name.into(), api }
    }

    /// The name it was looked up by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The function as an object, to be passed to other functions or kept in a container.
    ///
    /// # Errors
    /// What TVM-FFI raises.
    pub fn to_func(&self) -> Result<Func> {
        if let Some(func) = &self.func {
            return Ok(func.clone());
        }
        // The entry is given the object, then, and not null. It takes neither: a library exports it with nothing to be
        // called on.
        // SAFETY: the library is never unloaded, and there is nothing to be released.
        let handle = unsafe { self.api.function(ptr::null_mut(), self.call, None) }?;
        // SAFETY: what was made has one reference, which is ours.
        Any::from(unsafe { Object::from_raw(handle.cast()) }).to()
    }

    /// Calls the function on this thread's stream.
    ///
    /// # Errors
    /// [`TvmFfiCall`](FlashInferError::TvmFfiCall) with what the function raised.
    ///
    /// # Safety
    /// The function must be sound to call with these arguments, on this thread: tensors of the shapes, types and devices that
    /// it expects, whose memory stays valid until what it queued has run, and that nothing else reads or writes meanwhile
    /// where it writes. What it returns or keeps must follow TVM-FFI's rules: objects that may be released by any thread,
    /// tensors whose memory they own. Where it [allocates](crate::FlashInferRuntime::with_allocator), the memory must be for the
    /// stream that it works on.
    #[inline]
    pub unsafe fn call(&self, args: &[Arg<'_>]) -> Result<Value> {
        // SAFETY: the caller's promise.
        unsafe { self.call_any(args) }.map(Any::into_value)
    }

    /// [`call`](Self::call), with a result that is not taken apart.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Safety
    /// As there.
    #[inline]
    pub unsafe fn call_any(&self, args: &[Arg<'_>]) -> Result<Any> {
        // SAFETY: the caller's promise.
        unsafe { self.callee().call_seen(args) }
    }

    /// The function with the types of its parameters and its result:
    /// `scale.typed::<(&PackedTensor, f64), ()>()`. The arguments' number is then fixed, and the result checked.
    #[inline]
    pub fn typed<P: Params, R: FromAny>(&self) -> Typed<'_, P, R> {
        Typed::new(self.callee())
    }

    #[inline(always)]
    fn callee(&self) -> Callee<'_> {
        Callee { call: self.call, handle: self.handle, name: &self.name, api: self.api }
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
        if log::enabled() {
            // SAFETY: the caller's promise.
            return log::function(&self.name, args, || unsafe { self.launch_unseen(args) });
        }
        // SAFETY: as above.
        unsafe { self.launch_unseen(args) }
    }

    /// [`launch`](Self::launch), of what the log has already.
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    pub(crate) unsafe fn launch_unseen(&self, args: &[Arg<'_>]) -> Result<()> {
        let mut result = abi::Any::NONE;
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
    pub(crate) unsafe fn outcome(&self, code: c_int, result: abi::Any) -> Result<()> {
        if code != 0 {
            return Err(self.api.take_error(&self.name, code));
        }
        // SAFETY: a function that answers 0 left a valid result, whose object, if it is one, is now ours.
        drop(unsafe { Any::owned(result) });
        Ok(())
    }

    /// # Safety
    /// As for [`call`](Self::call).
    #[inline(always)]
    pub(crate) unsafe fn invoke(&self, args: &[Arg<'_>], result: &mut abi::Any) -> c_int {
        // SAFETY: the caller's promise.
        unsafe { self.callee().invoke(args, result) }
    }
}
