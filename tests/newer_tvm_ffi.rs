//! Releases of libtvm_ffi.so other than the one that is vendored, and modules that were built with their headers: what came
//! later works there, and where it is not there an error says which release it takes.
//!
//! `cargo xtask interop` installs the releases into a folder and runs these tests with `FLASHINFER_RS_INTEROP`, which names it;
//! without that they are reported as ignored, never as passed.

#[path = "support/interop.rs"]
mod interop;
#[path = "support/native.rs"]
mod native;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use flashinfer_rs::object::{
    Any, Array, Dict, Error, Func, HostAllocator, IntoAny, List, Map, Memory, Shape, Tensor, TensorAllocator,
    TensorRequest, Value,
};
use flashinfer_rs::{Arg, FlashInferError, FlashInferRuntime, Module, Result, RuntimeConfig};
use libtest_mimic::{Arguments, Trial};

/// A release of the library, and what it has.
#[derive(Clone, Copy, PartialEq)]
struct Release {
    wheel: &'static str,
    /// What the library says of itself: one ahead of the wheel from 0.1.13.post3 on.
    says: &'static str,
    has_views: bool,
    has_causes: bool,
    has_lists: bool,
}

const RELEASES: [Release; 3] = [
    Release { wheel: interop::RELEASES[0], says: "0.1.3", has_views: false, has_causes: false, has_lists: false },
    Release { wheel: interop::RELEASES[1], says: "0.1.6", has_views: true, has_causes: false, has_lists: false },
    Release { wheel: interop::RELEASES[2], says: "0.1.16", has_views: true, has_causes: true, has_lists: true },
];

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let installed = interop::folder().is_some();
    type Test = fn(&str, Release);
    let tests: [(&str, Test); 5] = [
        ("objects_are_built_and_read", objects),
        ("lists_and_dictionaries_are_there_or_say_which_release_they_take", lists),
        ("causes_of_errors_are_there_or_not_looked_for", causes),
        ("an_exception_that_is_no_std_exception_ends_the_process", exceptions),
        ("modules_built_with_any_headers_run_or_say_which_function_is_missing", modules),
    ];
    let each = tests.iter().flat_map(|&test| RELEASES.map(|release| (test, release)));
    let later = RELEASES.into_iter().filter(|release| release.has_lists);
    let counted = later.map(|release| (("a_million_of_what_came_later_leave_nothing_behind", counts as Test), release));
    let trials = each.chain(counted).map(|((name, test), release)| {
        let name = format!("{name}_{}", release.wheel);
        let trial = name.clone();
        let body = move || {
            test(&name, release);
            Ok(())
        };
        Trial::test(trial, body).with_ignored_flag(!installed)
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

/// With this release's library, in a process of its own.
fn with(name: &str, release: Release, variables: &[(&str, &Path)], body: impl FnOnce()) {
    native::isolated_with(name, variables, || {
        let folder = interop::tvm_ffi(release.wheel).join("lib");
        // SAFETY: the folder has TVM-FFI's library, of the release that was installed.
        let config = unsafe { RuntimeConfig::default().lib_dir(&folder).without_verification() };
        let runtime = FlashInferRuntime::initialize(config).unwrap();
        let artifacts = runtime.artifacts();
        let library = artifacts.iter().find(|artifact| artifact.name == "libtvm_ffi.so").unwrap();
        assert_eq!(library.loaded_from, Some(folder.join("libtvm_ffi.so")));
        body();
    });
}

fn raised(error: FlashInferError) -> (String, String) {
    match error {
        FlashInferError::TvmFfiCall { kind, message, .. } => (kind, message),
        other => panic!("{other}"),
    }
}

fn objects(name: &str, release: Release) {
    with(name, release, &[], || {
        for text in ["", "short", "longer than seven bytes, ☃"] {
            assert_eq!(Any::str(text).unwrap().to::<String>().unwrap(), text);
        }
        let shape = Shape::new(&[2, -3, i64::MAX]).unwrap();
        let array = Array::from_items([1.into_any().unwrap(), "two".into_any().unwrap(), (&shape).into_any().unwrap()]);
        let array = array.unwrap();
        assert_eq!(format!("{array:?}"), format!("[Int(1), Str(\"two\"), Shape(Shape[2, -3, {}])]", i64::MAX));
        assert_eq!(shape.as_object().references(), 2);
        drop(array);
        assert_eq!(shape.as_object().references(), 1);
        // Of a map both layouts.
        for len in [0, 1, 4, 5, 300] {
            let map = Map::from_items((0..len).map(|i| (format!("key {i}"), i))).unwrap();
            let read: Vec<_> = map.iter().map(|(key, value)| (key.to().unwrap(), value.to().unwrap())).collect();
            assert_eq!(read, (0..len).map(|i| (format!("key {i}"), i)).collect::<Vec<(String, i64)>>());
            assert!(map.get("no key").unwrap().is_none());
        }
        let tensor = Tensor::from_vec(vec![1f32, 2., 3., 4., 5., 6.], &[3, 2]).unwrap();
        let back = Tensor::from_dlpack(tensor.to_dlpack().unwrap()).unwrap();
        let again = Tensor::from_dlpack_unversioned(back.to_dlpack_unversioned().unwrap()).unwrap();
        assert_eq!((again.shape(), again.as_slice::<f32>().unwrap()[5]), (&[3, 2][..], 6.0));
        drop((back, again));
        assert_eq!(tensor.as_object().references(), 1);
        let divide = Func::from_fn("divide", |a: i64, b: i64| match a.checked_div(b) {
            Some(quotient) => Ok(quotient),
            None => Err(Error::new("ZeroDivisionError", "by zero")?.into()),
        })
        .unwrap();
        // SAFETY: the test's own function.
        let call = |a, b| unsafe { divide.typed::<(i64, i64), i64>().call((a, b)) };
        assert_eq!(call(7, 2).unwrap(), 3);
        assert_eq!(raised(call(7, 0).unwrap_err()), ("ZeroDivisionError".to_owned(), "by zero".to_owned()));
        assert!(Func::global_names().unwrap().iter().any(|name| name == "ffi.Array"));
        // Indices that this release has no type for, and those that it has.
        assert_eq!(tensor.as_object().type_key().as_deref(), Some("ffi.Tensor"));
    });
}

/// What something that is not there yet says.
fn wants(error: FlashInferError, release: Release) {
    let FlashInferError::VersionMismatch { found, expected, .. } = &error else { panic!("{error}") };
    assert!(found.starts_with(&format!("{}, without ffi.", release.says)), "{found}");
    assert_eq!(expected, "0.1.9 or newer");
}

fn lists(name: &str, release: Release) {
    with(name, release, &[], || {
        if !release.has_lists {
            wants(List::from_items([1i64]).unwrap_err(), release);
            return wants(Dict::from_items([(1i64, 1i64)]).unwrap_err(), release);
        }
        let ints = |values: Vec<Any>| values.into_iter().map(|value| value.to().unwrap()).collect::<Vec<i64>>();
        let list = List::from_items([1i64, 2]).unwrap();
        let seen = list.clone();
        list.push(3i64).unwrap();
        list.set(0, 10i64).unwrap();
        // It is one list, whoever holds it.
        assert_eq!((seen.len().unwrap(), ints(seen.to_vec().unwrap())), (3, vec![10, 2, 3]));
        assert_eq!(list.get(2).unwrap().to::<i64>().unwrap(), 3);
        for position in [3, usize::MAX] {
            let (kind, message) = raised(list.get(position).unwrap_err());
            assert!(kind == "IndexError" && !message.is_empty(), "{kind}: {message}");
        }
        let value = Any::from(list.clone());
        assert_eq!(value.type_index(), 75);
        assert!(matches!(value.into_value(), Value::List(same) if same.as_object().is_same(list.as_object())));
        assert!(List::from_items([0i64; 0]).unwrap().is_empty().unwrap());
        // It may be in itself, and is then never released: nothing here follows it for ever.
        list.push(&list).unwrap();
        assert_eq!(format!("{list:?}"), "List of 4");

        let dict = Dict::from_items([("a", 1i64), ("b", 2)]).unwrap();
        let seen = dict.clone();
        dict.set("c", 3i64).unwrap();
        dict.set("a", 10i64).unwrap();
        dict.remove("b").unwrap();
        let items: Vec<(String, i64)> =
            seen.to_vec().unwrap().into_iter().map(|(key, value)| (key.to().unwrap(), value.to().unwrap())).collect();
        assert_eq!((items.len(), seen.len().unwrap()), (2, 2));
        assert!(items.contains(&("a".to_owned(), 10)) && items.contains(&("c".to_owned(), 3)), "{items:?}");
        assert_eq!(dict.get("a").unwrap().map(|value| value.to::<i64>().unwrap()), Some(10));
        assert!(dict.get("b").unwrap().is_none());
        assert_eq!(format!("{dict:?}"), "Dict of 2");
        let empty = Dict::from_items([(0i64, 0i64); 0]).unwrap();
        assert!(empty.is_empty().unwrap() && empty.to_vec().unwrap().is_empty());
        for i in 0..200i64 {
            empty.set(i, i * i).unwrap();
        }
        let squares = empty.to_vec().unwrap();
        assert!(
            squares.len() == 200
                && squares.iter().all(|(k, v)| {
                    let (key, value): (i64, i64) = (k.clone().to().unwrap(), v.clone().to().unwrap());
                    value == key * key
                })
        );
    });
}

fn causes(name: &str, release: Release) {
    with(name, release, &[], || {
        let inner = Error::new("KeyError", "the first cause").unwrap();
        // What lies behind is another object's before there was room for it.
        assert!(inner.cause().is_none());
        if !release.has_causes {
            let error = Error::with_cause("ValueError", "the second", &inner).unwrap_err();
            let FlashInferError::VersionMismatch { found, expected, .. } = &error else { panic!("{error}") };
            return assert!(found.starts_with(release.says) && expected == "0.1.8 or newer", "{error}");
        }
        let between = Error::with_cause("ValueError", "in between", &inner).unwrap();
        let outer = Error::with_cause("ValueError", "the second", &between).unwrap();
        drop(between);
        assert_eq!(inner.as_object().references(), 2);
        let chain = [outer.clone(), outer.cause().unwrap(), outer.cause().unwrap().cause().unwrap()];
        assert_eq!(chain.each_ref().map(Error::message), ["the second", "in between", "the first cause"]);
        assert!(chain[2].cause().is_none() && chain[2].as_object().is_same(inner.as_object()));
        // As Rust's errors have it; and so it is raised by a closure, and goes through others.
        let raises = Func::from_fn("raises", |error: Error| -> Result<()> { Err(error.into()) }).unwrap();
        let passes = Func::from_fn("passes", |function: Func, error: Error| {
            // SAFETY: the test's own function.
            unsafe { function.typed::<(&Error,), ()>().call((&error,)) }
        })
        .unwrap();
        // SAFETY: the test's own functions.
        let passed = unsafe { passes.typed::<(&Func, &Error), ()>().call((&raises, &outer)) }.unwrap_err();
        for error in [FlashInferError::from(chain[0].clone()), passed] {
            let mut texts = Vec::new();
            let mut next: Option<&dyn std::error::Error> = Some(&error);
            while let Some(error) = next {
                texts.push(error.to_string());
                next = error.source();
            }
            assert_eq!(texts.len(), 3, "{texts:?}");
            assert!(texts[0].contains("the second") && texts[1].contains("in between"), "{texts:?}");
            assert!(texts[2].contains("KeyError") && texts[2].contains("the first cause"), "{texts:?}");
        }
        drop((chain, outer));
        assert_eq!(inner.as_object().references(), 1);
    });
}

/// Compiles tests/fixtures/solution.cc with a release's headers.
fn solution(release: Release, define: Option<&str>, folder: &Path) -> PathBuf {
    let package = interop::tvm_ffi(release.wheel);
    let library = folder.join(format!("{}{}.so", release.wheel, define.unwrap_or_default()));
    let mut compiler = Command::new(std::env::var_os("CXX").unwrap_or("c++".into()));
    compiler.args(["-std=c++17", "-fPIC", "-O1", "-shared", "-o"]).arg(&library).arg("-I").arg(package.join("include"));
    compiler.args(define.map(|define| format!("-D{define}")));
    compiler.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/solution.cc"));
    compiler.arg("-L").arg(package.join("lib")).args(["-Wl,--no-as-needed", "-ltvm_ffi"]);
    let output = compiler.output().expect("these tests need a C++ compiler");
    assert!(output.status.success(), "{}", native::text(&output));
    library
}

/// Built, read, passed through a function, cloned and dropped.
fn counts(name: &str, release: Release) {
    with(name, release, &[], || {
        let echo = Func::new(|args| args[0].to_any()).unwrap();
        let through = |any: Any| {
            // SAFETY: the test's own function.
            let back = unsafe { echo.typed::<(&Any,), Any>().call((&any,)) }.unwrap();
            drop((back.clone(), any));
            back
        };
        let inner = Error::new("KeyError", "the first cause").unwrap();
        let raises = Func::from_fn("raises", |error: Error| -> Result<()> { Err(error.into()) }).unwrap();
        let list = |i: i64| {
            let list: List = through(List::from_items([i, i]).unwrap().into()).to().unwrap();
            list.push("a text that is an object").unwrap();
            assert_eq!(list.get(0).unwrap().to::<i64>().unwrap() + list.len().unwrap() as i64, i + 3);
        };
        let dict = |i: i64| {
            let dict: Dict = through(Dict::from_items([(i, i)]).unwrap().into()).to().unwrap();
            dict.set("a text that is an object", i).unwrap();
            assert_eq!(dict.get(i).unwrap().map(|value| value.to::<i64>().unwrap()), Some(i));
            assert_eq!(dict.to_vec().unwrap().len(), 2);
        };
        let cause = |_: i64| {
            let error = Error::with_cause("ValueError", "the second", &inner).unwrap();
            assert!(error.cause().is_some());
            // SAFETY: the test's own function.
            unsafe { raises.typed::<(&Error,), ()>().call((&error,)) }.unwrap_err();
        };
        for (kind, make) in [("list", &list as &dyn Fn(i64)), ("dict", &dict), ("cause", &cause)] {
            (0..10_000).for_each(make);
            let before = native::resident();
            (0..1_000_000).for_each(make);
            let grown = native::resident() - before;
            // The least of them is 24 bytes.
            assert!(grown < 4 << 20, "a million of {kind}: memory grew by {grown} bytes");
        }
        assert_eq!(inner.as_object().references(), 1);
    });
}

/// As the documentation of `Function::call` says: upstream's wrapper of an exported function catches no others.
fn exceptions(name: &str, release: Release) {
    let said = native::dying(name, || {
        let folder = tempfile::tempdir().unwrap();
        with(name, release, &[], || {
            // SAFETY: the test's own module.
            let module = unsafe { Module::open(solution(release, None, folder.path())) }.unwrap();
            eprintln!("calls it");
            // SAFETY: it ends the process.
            let result = unsafe { module.function("throw_a_number").unwrap().call(&[]) };
            eprintln!("came back: {result:?}");
        });
    });
    assert!(said.contains("calls it") && !said.contains("came back"), "{said}");
}

/// Modules built with this release's headers, with every library.
fn modules(name: &str, headers: Release) {
    const FOLDER: &str = "FLASHINFER_RS_TEST_MODULES";
    const LIBRARY: &str = "FLASHINFER_RS_TEST_LIBRARY";
    if !native::in_its_process(name) {
        let folder = tempfile::tempdir().expect("a folder");
        solution(headers, None, folder.path());
        if headers.has_views {
            solution(headers, Some("UNSAFE_VIEW"), folder.path());
        }
        if headers.has_lists {
            solution(headers, Some("LISTS"), folder.path());
        }
        for library in RELEASES {
            with(name, library, &[(FOLDER, folder.path()), (LIBRARY, Path::new(library.wheel))], || {});
        }
        return;
    }
    let library = std::env::var(LIBRARY).expect(LIBRARY);
    let library = RELEASES.into_iter().find(|release| release.wheel == library).expect("a release");
    with(name, library, &[], || {
        let folder = PathBuf::from(std::env::var_os(FOLDER).expect(FOLDER));
        let path = |define: &str| folder.join(format!("{}{define}.so", headers.wheel));
        // SAFETY: the test's own module.
        let open = |define: &str| unsafe { Module::open(path(define)) };
        runs(&open("").unwrap());
        if headers.has_views {
            with_views(open("UNSAFE_VIEW"), &path("UNSAFE_VIEW"), library);
        }
        if headers.has_lists {
            with_lists(&open("LISTS").unwrap(), library);
        }
    });
}

fn runs(module: &Module) {
    let x = Tensor::from_vec(vec![1f32, 2., 3.], &[3]).unwrap();
    let runtime = FlashInferRuntime::global().unwrap();
    // SAFETY: here and below, the fixture checks what it takes.
    let call = |name: &str, args: &[Arg<'_>]| unsafe { module.function(name).unwrap().call_any(args) };
    let (_, message) = raised(call("twice", &[Arg::object(x.as_object())]).unwrap_err());
    assert!(message.contains("allocator"), "{message}");
    let made = runtime.with_allocator(&HostAllocator, || call("twice", &[Arg::object(x.as_object())])).unwrap();
    assert_eq!(made.unwrap().to::<Tensor>().unwrap().as_slice::<f32>().unwrap(), [2., 4., 6.]);
    /// An allocator that has nothing left.
    struct Fails;
    impl TensorAllocator for Fails {
        fn allocate(&self, request: &TensorRequest<'_>) -> Result<Memory> {
            Err(Error::new("MemoryError", &format!("no {} bytes are left", request.bytes))?.into())
        }
    }
    let made = runtime.with_allocator(&Fails, || call("twice", &[Arg::object(x.as_object())])).unwrap();
    let (_, message) = raised(made.unwrap_err());
    assert!(message.contains("no 12 bytes are left"), "{message}");
    // What the module made, whose deleters are its own.
    for n in [0, 3, 1000] {
        let map: Map = call("count", &[Arg::int(n), Arg::str(c"numbers, by name")]).unwrap().to().unwrap();
        let numbers: Array = map.get("numbers, by name").unwrap().unwrap().to().unwrap();
        drop(map);
        assert_eq!(
            (numbers.len() as i64, numbers.get(2).map(|two| two.to::<i64>().unwrap())),
            (n, (n > 2).then_some(2))
        );
    }
    let doubles = Func::from_fn("doubles", |value: i64| Ok(2 * value)).unwrap();
    assert_eq!(call("apply", &[Arg::object(doubles.as_object()), Arg::int(21)]).unwrap().to::<i64>().unwrap(), 42);
    // An error that goes through, and one that begins there; its cell may be shorter than the library's own.
    let fails = Func::new(|_| Err(Error::new("KeyError", "no such key")?.into())).unwrap();
    let error = call("apply", &[Arg::object(fails.as_object()), Arg::NONE]).unwrap_err();
    assert_eq!(raised(error), ("KeyError".to_owned(), "no such key".to_owned()));
    let error = call("fail", &[Arg::str(c"on purpose")]).unwrap_err();
    assert!(std::error::Error::source(&error).is_none(), "{error:?}");
    let (kind, message) = raised(error);
    assert_eq!((kind.as_str(), message.as_str()), ("ValueError", "on purpose"));
    let error = call("fail", &[Arg::int(1)]).unwrap_err();
    let mismatch = error.mismatch().unwrap_or_else(|| panic!("{error}"));
    assert_eq!((mismatch.argument, mismatch.found.as_str()), (Some(0), "int"));
    assert!(call("twice", &[]).unwrap_err().mismatch().is_some());
}

/// A function of the library that came with 0.1.6.
fn with_views(module: Result<Module>, path: &Path, library: Release) {
    if library.has_views {
        let module = module.unwrap();
        runs(&module);
        let x = Tensor::from_vec(vec![1f32, 2., 3., 4.], &[2, 2]).unwrap();
        let function = module.function("second_row").unwrap();
        // SAFETY: the fixture takes a tensor of two rows.
        assert_eq!(unsafe { function.typed::<(&Tensor,), f64>().call((&x,)) }.unwrap(), 3.0);
        drop(function);
        return assert_eq!(x.as_object().references(), 1);
    }
    let error = module.unwrap_err();
    let FlashInferError::Unloadable { problem, remedy, .. } = &error else { panic!("{error}") };
    let says = ["TVMFFITensorCreateUnsafeView", library.says];
    assert!(says.iter().all(|part| problem.contains(part)), "{error}");
    assert!(remedy.contains("0.1.6 or newer") && remedy.contains("adopt_tvm_ffi"), "{error}");
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    assert!(!maps.contains(path.to_str().unwrap()), "it was loaded");
}

/// A type that came with 0.1.9, which a module brings along: it needs no function that was not there before.
fn with_lists(module: &Module, library: Release) {
    runs(module);
    let function = module.function("list").unwrap();
    // SAFETY: the fixture checks what it takes.
    let list: List = unsafe { function.typed::<(i64,), List>().call((5,)) }.unwrap();
    assert_eq!(list.as_object().type_key().as_deref(), Some("ffi.List"));
    if library.has_lists {
        assert_eq!(list.len().unwrap(), 5);
        return assert_eq!(list.get(4).unwrap().to::<i64>().unwrap(), 4);
    }
    // It can be held, passed on and released; what is in it the library cannot say.
    wants(list.len().unwrap_err(), library);
    wants(list.to_vec().unwrap_err(), library);
    wants(list.push(1i64).unwrap_err(), library);
    assert_eq!(format!("{list:?}"), "List of 0");
    assert_eq!(list.clone().as_object().references(), 2);
    let error = list.into_any().unwrap().to::<Array>().unwrap_err();
    assert!(error.to_string().contains("the value is List"), "{error}");
}
