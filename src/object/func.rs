//! Functions as values: found by name, made of Rust closures.

use std::ffi::{c_int, c_void};
use std::fmt;
use std::slice;
use std::sync::MutexGuard;

use super::any::kind_name;
use super::contain::{contained, dropped};
use super::{Any, Arg, Callee, FromAny, IntoAny, Object, Params, Typed, Value, object_type};
use crate::error::{FlashInferError, Result};
use crate::ffi::abi;
use crate::ffi::api::{self, Api};

object_type! {
    /// A function that is an object: it can be passed to others, kept by them, and released anywhere.
    ///
    /// [`Function`](crate::Function) is one with a name, as a module exports it; [`Function::to_func`](crate::Function::to_func)
    /// makes an object of it.
    Func, FUNCTION, "Function"
}

// SAFETY: references are counted atomically, and TVM-FFI's functions may be released by any thread. Calling one is unsafe: the
// caller vouches for the thread too.
unsafe impl Send for Func {}
// SAFETY: as above.
unsafe impl Sync for Func {}

impl fmt::Debug for Func {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Func({:p})", self.0.handle())
    }
}

/// What an object without a name is called in errors.
const UNNAMED: &str = "a function object";

impl Func {
    /// A function of a Rust closure. An error that it answers is raised in its caller, and so is a panic, as an
    /// `InternalError`.
    ///
    /// An [`Error`](super::Error) keeps its kind; of this crate's errors a wrong type becomes a `TypeError`, a wrong
    /// argument a `ValueError`, anything else a `RuntimeError`.
    ///
    /// # Errors
    /// [`NotInitialized`](FlashInferError::NotInitialized), or what TVM-FFI raises.
    pub fn new<F>(closure: F) -> Result<Self>
    where
        F: for<'a> Fn(&[Arg<'a>]) -> Result<Any> + Send + Sync + 'static,
    {
        let api = Api::loaded()?;
        let this = Box::into_raw(Box::new(closure)).cast();
        // SAFETY: `serve` and `release` are those for this type of closure, which may be used and dropped on any thread.
        match unsafe { api.function(this, serve::<F>, Some(release::<F>)) } {
            // SAFETY: what was made has one reference, which is ours.
            Ok(handle) => Ok(Self(unsafe { Object::from_raw(handle.cast()) })),
            Err(error) => {
                // SAFETY: TVM-FFI did not take it, so it is still this side's.
                drop(unsafe { Box::from_raw(this.cast::<F>()) });
                Err(error)
            }
        }
    }

    /// A function of a Rust closure with parameters of Rust types: a call with another number of arguments, or another type,
    /// is a `TypeError`, in the words of TVM-FFI's own. `name` is for these.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn from_fn<P>(name: &str, closure: impl Closure<P>) -> Result<Self> {
        let name = name.to_owned();
        Self::new(move |args| closure.call(&name, args))
    }

    /// The global function of that name; `None` where there is none.
    ///
    /// TVM-FFI has no lock on its table: see [`register_global`](Self::register_global).
    ///
    /// # Errors
    /// [`NotInitialized`](FlashInferError::NotInitialized), or what TVM-FFI raises.
    pub fn global(name: &str) -> Result<Option<Self>> {
        Self::found(name, &Api::tables())
    }

    /// As [`global`](Self::global), in a turn with TVM-FFI's tables.
    fn found(name: &str, tables: &MutexGuard<'_, ()>) -> Result<Option<Self>> {
        // SAFETY: what is answered is null or a function object, with a reference that is ours.
        Ok(unsafe { Object::owned(Api::loaded()?.global(name, tables)?) }.map(Self))
    }

    /// The names of all global functions.
    ///
    /// # Errors
    /// As for [`global`](Self::global).
    pub fn global_names() -> Result<Vec<String>> {
        let names = own_function("ffi.FunctionListGlobalNamesFunctor")?;
        let _tables = Api::tables();
        // SAFETY: TVM-FFI's own functions, called as it does.
        unsafe {
            let at: Self = names.typed::<(), Self>().call_unseen(())?;
            let at = at.typed::<(i64,), Any>();
            let count: i64 = at.call_unseen((-1,))?.to()?;
            (0..count).map(|i| at.call_unseen((i,))?.to()).collect()
        }
    }

    /// Gives this function a global name, under which any library of this process finds it, for good or until
    /// [`remove_global`](Self::remove_global). Names of one's own begin with the crate's name and a dot.
    ///
    /// # Errors
    /// [`TvmFfiCall`](FlashInferError::TvmFfiCall) where the name is taken and `replace` is false.
    ///
    /// # Safety
    /// TVM-FFI has no lock on its table: no other thread may look up, register or remove a function meanwhile other than
    /// through this crate, and none may load a library that does so. Right after
    /// [`initialize`](crate::FlashInferRuntime::initialize) is a good time. And the function must be sound for whoever
    /// finds it by that name.
    pub unsafe fn register_global(&self, name: &str, replace: bool) -> Result<()> {
        // What is replaced is dropped behind the turn, once the table is free again: a closure's drop may look something up.
        let (_replaced, set) = {
            let tables = Api::tables();
            let replaced = Self::found(name, &tables)?;
            // SAFETY: this keeps the function; the rest is the caller's promise.
            (replaced, unsafe { Api::loaded()?.set_global(name, self.0.handle(), replace) })
        };
        set
    }

    /// Takes a global name away; whether there was one.
    ///
    /// # Errors
    /// What TVM-FFI raises.
    ///
    /// # Safety
    /// As for [`register_global`](Self::register_global); and nobody may need the function by that name any more.
    pub unsafe fn remove_global(name: &str) -> Result<bool> {
        let remove = own_function("ffi.FunctionRemoveGlobal")?;
        // As above.
        let (_removed, was_there) = {
            let tables = Api::tables();
            let removed = Self::found(name, &tables)?;
            // SAFETY: TVM-FFI's own function, called as it does; the rest is the caller's promise.
            (removed, unsafe { remove.typed::<(&str,), bool>().call_unseen((name,)) })
        };
        was_there
    }

    #[inline]
    pub(crate) fn callee<'f>(&'f self, name: &'f str) -> Callee<'f> {
        // SAFETY: this keeps the function object.
        let call = unsafe { Api::call_of(self.0.handle()) };
        // Objects exist only once the library is loaded, and one without an entry answers that it raised nothing.
        let (call, handle) = (call.unwrap_or(no_entry), self.0.handle().cast());
        match Api::loaded() {
            Ok(api) => Callee { call, handle, name, api },
            Err(_) => unreachable!("there is a function object, so there is a library"),
        }
    }

    /// Calls the function.
    ///
    /// # Errors
    /// [`TvmFfiCall`](FlashInferError::TvmFfiCall) with what the function raised.
    ///
    /// # Safety
    /// As for [`Function::call`](crate::Function::call).
    pub unsafe fn call(&self, args: &[Arg<'_>]) -> Result<Value> {
        // SAFETY: the caller's promise.
        Ok(unsafe { self.callee(UNNAMED).call_seen(args) }?.into_value())
    }

    /// The function with the types of its parameters and its result: `add.typed::<(i64, i64), i64>()`.
    pub fn typed<P: Params, R: FromAny>(&self) -> Typed<'_, P, R> {
        Typed::new(self.callee(UNNAMED))
    }
}

/// A function of TVM-FFI's own, which every release from 0.1.3 on has.
pub(crate) fn own_function(name: &'static str) -> Result<Func> {
    Func::global(name)?.ok_or_else(|| FlashInferError::SymbolMissing {
        library: "libtvm_ffi.so".to_owned(),
        symbol: name.to_owned(),
        reason: "it is registered under no global name, since the library is older or another one".to_owned(),
    })
}

/// What stands for the entry of a function object that has none.
unsafe extern "C" fn no_entry(_: *mut c_void, _: *const abi::Any, _: i32, _: *mut abi::Any) -> c_int {
    -1
}

/// Calls a closure under TVM-FFI's convention.
///
/// # Safety
/// `this` must be the closure, `args` point to `count` arguments that are valid during the call, and `result` to a result.
unsafe extern "C" fn serve<F>(this: *mut c_void, args: *const abi::Any, count: i32, result: *mut abi::Any) -> c_int
where
    F: for<'a> Fn(&[Arg<'a>]) -> Result<Any>,
{
    let outcome = contained(|| {
        let args: &[Arg<'_>] = match usize::try_from(count) {
            // SAFETY: the caller's promise; an argument is a value with a lifetime, here that of the call.
            Ok(count) if count > 0 && !args.is_null() => unsafe { slice::from_raw_parts(args.cast(), count) },
            _ => &[],
        };
        // SAFETY: the caller's promise: the function object owns the closure, and is there while it is called.
        let closure = unsafe { &*this.cast_const().cast::<F>() };
        closure(args)
    });
    let error = match outcome {
        Ok(Ok(value)) => {
            // SAFETY: the caller's promise. What was there before is no object, by TVM-FFI's convention.
            unsafe { result.write(value.into_abi()) };
            return 0;
        }
        Ok(Err(error)) => error,
        Err(text) => panicked(text),
    };
    // Neither forming, raising nor dropping it may unwind into the caller. Where it is not raised, the caller finds that out.
    let _ = contained(|| raise(&error));
    dropped(error);
    -1
}

/// Drops a closure.
///
/// # Safety
/// `this` must be the closure, which nobody uses any more.
unsafe extern "C" fn release<F>(this: *mut c_void) {
    // SAFETY: TVM-FFI calls this once, with the pointer that was leaked for it.
    dropped(unsafe { Box::from_raw(this.cast::<F>()) });
}

fn panicked(text: Option<String>) -> FlashInferError {
    let message = format!("a Rust closure panicked: {}", text.as_deref().unwrap_or("without a message"));
    let (kind, function, backtrace) = ("InternalError".to_owned(), String::new(), String::new());
    FlashInferError::TvmFfiCall { function, kind, message, backtrace, cause: None }
}

/// Raises an error on this thread, with the kind that fits it, and its causes where the library's errors have them.
fn raise(error: &FlashInferError) {
    let Ok(api) = Api::loaded() else { return };
    let mut chain = vec![error];
    while let Some(FlashInferError::TvmFfiCall { cause: Some(cause), .. }) = chain.last()
        && chain.len() < api::LONGEST_CHAIN
    {
        chain.push(cause);
    }
    let mut made: Option<Object> = None;
    for error in chain.into_iter().rev() {
        let Ok(object) = error_object(api, error, made.take()) else { return };
        made = object;
    }
    if let Some(error) = made {
        // SAFETY: the object is live; raising takes a reference of its own.
        unsafe { api.raise_object(error.handle()) };
    }
}

/// An error as an object, raised from `cause` where the library's errors have causes.
fn error_object(api: &Api, error: &FlashInferError, cause: Option<Object>) -> Result<Option<Object>> {
    let text = error.to_string();
    let (kind, message, backtrace) = match error {
        FlashInferError::TvmFfiCall { kind, message, backtrace, .. } => {
            (kind.as_str(), message.as_str(), backtrace.as_str())
        }
        FlashInferError::WrongType { .. } => ("TypeError", text.as_str(), ""),
        FlashInferError::InvalidArgument { .. } => ("ValueError", text.as_str(), ""),
        _ => ("RuntimeError", text.as_str(), ""),
    };
    // SAFETY: the cause is an error object, which is held meanwhile.
    let caused = cause.as_ref().and_then(|cause| unsafe { api.error_from(kind, message, backtrace, cause.handle()) });
    let handle = caused.unwrap_or_else(|| api.error(kind, message, backtrace))?;
    // SAFETY: what was made has one reference, which is ours.
    Ok(unsafe { Object::owned(handle) })
}

/// Closures whose parameters are [`FromAny`] and whose result is [`IntoAny`].
pub trait Closure<P>: Send + Sync + 'static {
    /// Calls it with these arguments.
    ///
    /// # Errors
    /// A `TypeError` where their number or a type is another one, and what the closure answers.
    fn call(&self, name: &str, args: &[Arg<'_>]) -> Result<Any>;
}

macro_rules! closures {
    ($($name:ident)*) => {
        impl<Function, Answer, $($name),*> Closure<fn($($name),*) -> Answer> for Function
        where
            Function: Fn($($name),*) -> Result<Answer> + Send + Sync + 'static,
            Answer: IntoAny,
            $($name: FromAny,)*
        {
            #[allow(non_snake_case, unused_variables, unused_mut, reason = "also of none")]
            fn call(&self, name: &str, args: &[Arg<'_>]) -> Result<Any> {
                const COUNT: usize = 0 $(+ { let _ = stringify!($name); 1 })*;
                if args.len() != COUNT {
                    let found = args.len();
                    let message = format!(
                        "Mismatched number of arguments when calling: `{name}`. Expected {COUNT} but got {found} arguments"
                    );
                    return Err(type_error(message));
                }
                let mut position = 0..;
                $(let $name = argument::<$name>(name, args, position.next().unwrap_or_default())?;)*
                self($($name),*)?.into_any()
            }
        }
    };
}

macro_rules! each_prefix {
    () => { closures!(); };
    ($first:ident $($rest:ident)*) => { closures!($first $($rest)*); each_prefix!($($rest)*); };
}

each_prefix!(A B C D E F G H);

fn argument<T: FromAny>(name: &str, args: &[Arg<'_>], position: usize) -> Result<T> {
    let arg = args[position];
    let taken = arg.to_any().ok().and_then(|any| T::from_any(any).ok());
    taken.ok_or_else(|| {
        let (expected, found) = (T::EXPECTED, kind_name(arg.type_index()));
        type_error(format!(
            "Mismatched type on argument #{position} when calling: `{name}`. Expected `{expected}` but got `{found}`"
        ))
    })
}

fn type_error(message: String) -> FlashInferError {
    let (function, backtrace) = (String::new(), String::new());
    FlashInferError::TvmFfiCall { function, kind: "TypeError".to_owned(), message, backtrace, cause: None }
}
