//! Any module: what is exported, and what is said of files that cannot be loaded before anything of them is.

#[path = "support/native.rs"]
mod native;

use std::fs;
use std::path::{Path, PathBuf};

use flashinfer_rs::object::{Any, Func};
use flashinfer_rs::{Arg, FlashInferError, FlashInferRuntime, Module, Result, RuntimeConfig, Value};

fn initialize() {
    FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
}

fn open(path: &Path) -> Result<Module> {
    initialize();
    // SAFETY: the tests' own modules, which have no initializers.
    unsafe { Module::open(path) }
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn loadable(folder: &Path, flags: &[&str]) -> PathBuf {
    native::compile("loadable.c", "loadable.so", flags, folder)
}

fn int(module: &Module, name: &str) -> i64 {
    // SAFETY: the fixtures' functions take anything.
    unsafe { module.function(name).unwrap().typed::<(), i64>().call(()) }.unwrap()
}

/// What is said of a file that cannot be loaded: as what was found, and what to do.
#[track_caller]
fn unloadable(result: Result<impl std::fmt::Debug>) -> (String, String) {
    let error = result.unwrap_err();
    let FlashInferError::Unloadable { path, problem, remedy } = &error else { panic!("{error}") };
    let text = error.to_string();
    assert!([problem, remedy].iter().all(|part| text.contains(part.as_str())), "{text}");
    assert!(text.contains(&path.display().to_string()), "{text}");
    (problem.clone(), remedy.clone())
}

// What there is.

#[test]
fn a_module_tells_what_it_exports_and_what_is_said_of_it() {
    let folder = folder();
    let module = open(&native::compile("objects.c", "objects.so", &[], folder.path())).unwrap();
    assert_eq!((module.name(), module.path()), ("objects.so", Some(folder.path().join("objects.so").as_path())));
    let functions = module.functions();
    assert!(functions.is_sorted() && functions.len() == 15, "{functions:?}");
    assert!(functions.contains(&"twice".to_owned()) && !functions.iter().any(|name| name.starts_with('_')));
    assert_eq!(module.metadata("twice").unwrap().as_deref(), Some("{\"type_schema\":\"{}\"}"));
    assert_eq!(module.doc("twice").unwrap().as_deref(), Some("y = 2 x"));
    assert_eq!((module.metadata("five").unwrap(), module.doc("five").unwrap()), (None, None));
    let error = module.metadata("twise").unwrap_err();
    assert!(error.to_string().contains("did you mean twice?"), "{error}");
}

#[test]
fn a_module_is_loaded_from_bytes() {
    initialize();
    let folder = folder();
    let bytes = fs::read(loadable(folder.path(), &[])).unwrap();
    for name in ["a module", "", "a\0b", "../../x", &"long ☃ ".repeat(100)] {
        // SAFETY: the test's own module.
        let module = unsafe { Module::from_bytes(name, &bytes) }.unwrap();
        assert_eq!((module.name(), int(&module, "answer"), module.functions()), (name, 42, vec!["answer".to_owned()]));
    }
    // SAFETY: as above.
    let (problem, _) = unloadable(unsafe { Module::from_bytes("cut off", &bytes[..40]) });
    assert!(problem.contains("damaged"), "{problem}");
}

#[test]
fn a_file_may_go_or_change_once_it_was_loaded() {
    let folder = folder();
    let path = loadable(folder.path(), &[]);
    let module = open(&path).unwrap();
    fs::remove_file(&path).unwrap();
    assert_eq!(int(&module, "answer"), 42);
    // Another file of the same name is another module.
    native::compile("module.c", "loadable.so", &[], folder.path());
    assert_eq!(int(&open(&path).unwrap(), "yes"), 1);
}

#[cfg(feature = "norm")]
#[test]
fn vendored_kernels_tell_what_they_were_built_for() {
    let preflight = Module::preflight(native::vendored_libraries().join("norm.so")).unwrap();
    assert_eq!(preflight.cuda_major(), Some(13));
    assert!(preflight.needed().iter().any(|name| name == "libcuda.so.1"));
    assert!(preflight.functions().contains(&"gemma_rmsnorm".to_owned()));
    assert!(preflight.tvm_ffi_symbols().contains(&"TVMFFIErrorSetRaised"), "{:?}", preflight.tvm_ffi_symbols());
    let architectures = preflight.architectures();
    assert!(architectures.iter().any(|name| name.starts_with("sm_9")), "{architectures:?}");
    assert!(preflight.runs_on(9, 0) && !preflight.runs_on(3, 5) && !preflight.has_embedded());
}

// What cannot be loaded.

#[test]
fn what_is_no_shared_object_is_told_apart() {
    let folder = folder();
    let file = folder.path().join("kernel.so");
    let lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:6543\nsize 94\n";
    let kinds: [(&[u8], &str, &str); 13] = [
        (b"", "empty file", "again"),
        (lfs, "Git LFS pointer", "git lfs pull"),
        (b"!<arch>\n", "archive of object files", "-shared"),
        (b"MZ\x90\0", "Windows", "build it"),
        (&[0xcf, 0xfa, 0xed, 0xfe], "macOS", "build it"),
        (b"PK\x03\x04", "zip archive", "extract"),
        (&[0x1f, 0x8b, 8], "gzip", "extract"),
        (&[0x50, 0xed, 0x55, 0xba], "fatbin", "library that launches it"),
        (b"#!/bin/sh\n", "script", "library"),
        (b"\n<!DOCTYPE html>", "HTML", "download"),
        (b"{\"a\": 1}", "JSON", "library"),
        (b"something", "736f6d657468696e", "shared object"),
        (b"\x7fELF", "ends after 4 bytes", "again"),
    ];
    for (bytes, what, how) in kinds {
        fs::write(&file, bytes).unwrap();
        for result in [open(&file).map(drop), Module::preflight(&file).map(drop)] {
            let (problem, remedy) = unloadable(result);
            assert!(problem.contains(what) && remedy.contains(how), "{problem}; {remedy}");
        }
    }
    let (problem, _) = unloadable(open(folder.path()));
    assert!(problem.contains("no file"), "{problem}");
    let pipe = folder.path().join("pipe");
    let name = std::ffi::CString::new(pipe.to_str().unwrap()).unwrap();
    // SAFETY: a path that ends with a zero byte.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    // Which would wait for somebody who writes.
    assert!(unloadable(open(&pipe)).0.contains("no file"));
    assert!(matches!(open(&folder.path().join("nothing.so")).unwrap_err(), FlashInferError::Io { .. }));
}

/// A shared object whose header is changed at one place.
fn changed(folder: &Path, at: usize, to: &[u8]) -> PathBuf {
    let path = loadable(folder, &[]);
    let mut bytes = fs::read(&path).unwrap();
    bytes[at..at + to.len()].copy_from_slice(to);
    fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn shared_objects_for_other_machines_are_told_by_their_header() {
    let folder = folder();
    let (class, order, kind, machine) = (4, 5, 16, 18);
    let other = if cfg!(target_arch = "aarch64") { (62u8, "x86_64") } else { (183, "aarch64") };
    for (at, to, what) in [
        (machine, [other.0, 0], other.1),
        (machine, [190, 0], "an NVIDIA GPU"),
        (machine, [0xfe, 0xca], "machine number 51966"),
        (kind, [1, 0], "object file"),
        (kind, [2, 0], "a program"),
        (kind, [4, 0], "type 4"),
    ] {
        let (problem, _) = unloadable(open(&changed(folder.path(), at, &to)));
        assert!(problem.contains(what), "{problem}");
    }
    let (problem, _) = unloadable(open(&changed(folder.path(), class, &[1])));
    assert!(problem.contains("32 bits"), "{problem}");
    unloadable(open(&changed(folder.path(), order, &[2])));
}

#[test]
fn a_damaged_file_is_an_error_or_what_it_says_and_never_a_panic() {
    initialize();
    let folder = folder();
    let path = loadable(folder.path(), &["-DFATBIN", "-DPTX", "-DEMBEDDED", "-DKIND=other"]);
    let whole = fs::read(&path).unwrap();
    let damaged = folder.path().join("damaged.so");
    let look = |bytes: &[u8]| {
        fs::write(&damaged, bytes).unwrap();
        if let Ok(preflight) = Module::preflight(&damaged) {
            let _ =
                (preflight.functions(), preflight.architectures(), preflight.embedded_kinds(), preflight.cuda_major());
        }
    };
    (0..whole.len()).step_by(97).for_each(|len| look(&whole[..len]));
    // A generator of its own, the same in every run.
    let mut state = 1u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    for _ in 0..2000 {
        let mut bytes = whole.clone();
        for _ in 0..=random(4) {
            // Headers more often than what they describe.
            let at = if random(2) == 0 { random(64) } else { random(bytes.len()) };
            bytes[at] = [0, 1, 0x7f, 0x80, 0xff, random(256) as u8][random(6)];
        }
        look(&bytes);
    }
}

#[test]
fn a_library_without_functions_of_tvm_ffi_says_so() {
    let folder = folder();
    let (problem, remedy) = unloadable(open(&loadable(folder.path(), &["-DNO_FUNCTION"])));
    assert!(
        problem.contains("__tvm_ffi_NAME") && remedy.contains("TVM_FFI_DLL_EXPORT_TYPED_FUNC"),
        "{problem}; {remedy}"
    );
}

#[test]
fn a_module_that_needs_a_newer_tvm_ffi_says_which_functions() {
    let folder = folder();
    let (problem, remedy) = unloadable(open(&loadable(folder.path(), &["-DNEWER"])));
    let says = ["TVMFFITensorCreateUnsafeView", "_ZN3tvm3ffi9SomethingEv", "0.1.3"];
    assert!(says.iter().all(|part| problem.contains(part)), "{problem}");
    // One of them is of no release that is known here.
    assert!(remedy.contains("use a newer library (RuntimeConfig::adopt_tvm_ffi)"), "{remedy}");
    let (problem, remedy) = unloadable(open(&loadable(folder.path(), &["-DNEWER_IN_C"])));
    assert!(problem.contains("TVMFFIBigIntFromByteArray, TVMFFITensorCreateUnsafeView"), "{problem}");
    assert!(remedy.contains("a library of release 0.1.14 or newer"), "{remedy}");
}

#[test]
fn a_library_of_cuda_that_is_not_there_is_named_with_its_release() {
    let folder = folder();
    // A release that nobody has; gone by the time it is looked for.
    let elsewhere = tempfile::tempdir().unwrap();
    let needed = native::compile("needed.c", "libcudart.so.99", &[], elsewhere.path());
    let path = loadable(folder.path(), &["-DNEEDS", needed.to_str().unwrap()]);
    let preflight = Module::preflight(&path).unwrap();
    assert_eq!((preflight.cuda_major(), preflight.needed()[0].as_str()), (Some(99), "libcudart.so.99"));
    let (problem, remedy) = unloadable(open(&path));
    assert!(problem.contains("libcudart.so.99, a library of CUDA 99"), "{problem}");
    assert!(remedy.contains("install CUDA 99's libraries"), "{remedy}");
}

#[test]
fn another_library_that_is_not_there_is_named_by_the_dynamic_linker() {
    let (folder, elsewhere) = (folder(), folder());
    let needed = native::compile("needed.c", "libother.so.1", &[], elsewhere.path());
    let error = open(&loadable(folder.path(), &["-DNEEDS", needed.to_str().unwrap()])).unwrap_err();
    assert!(
        matches!(error, FlashInferError::LoadFailed { .. }) && error.to_string().contains("libother.so.1"),
        "{error}"
    );
}

#[test]
fn gpu_code_is_told_by_what_it_was_compiled_for() {
    let folder = folder();
    let preflight = Module::preflight(loadable(folder.path(), &["-DFATBIN"])).unwrap();
    assert_eq!(preflight.architectures(), ["sm_80", "sm_90a", "sm_100f"]);
    let runs = [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3)];
    let fails = [(7, 5), (9, 1), (11, 0), (12, 0)];
    assert!(runs.iter().all(|&(major, minor)| preflight.runs_on(major, minor)));
    assert!(!fails.iter().any(|&(major, minor)| preflight.runs_on(major, minor)));
    let with_ptx = Module::preflight(loadable(folder.path(), &["-DFATBIN", "-DPTX"])).unwrap();
    assert_eq!(with_ptx.architectures(), ["sm_80", "sm_90a", "sm_100f", "compute_100"]);
    assert!(with_ptx.runs_on(12, 0) && !with_ptx.runs_on(9, 1));
    // Where there is no code, nothing speaks against a GPU.
    assert!(Module::preflight(loadable(folder.path(), &[])).unwrap().runs_on(1, 0));
}

#[test]
fn code_for_other_gpus_than_are_there_is_refused_before_it_is_loaded() {
    let name = "code_for_other_gpus_than_are_there_is_refused_before_it_is_loaded";
    let variables = [("FAKE_MAJOR", Path::new("9")), ("FAKE_MINOR", Path::new("1"))];
    native::isolated_with(name, &variables, || {
        let folder = folder();
        native::load(&native::compile("cudart.c", "libcudart.so.13", &[], folder.path()), false);
        let (problem, remedy) = unloadable(open(&loadable(folder.path(), &["-DFATBIN"])));
        assert!(problem.contains("for sm_80, sm_90a, sm_100f") && problem.contains("sees sm_91"), "{problem}");
        assert!(remedy.contains("sm_91"), "{remedy}");
        assert!(!fs::read_to_string("/proc/self/maps").unwrap().contains("loadable.so"));
        assert_eq!(int(&open(&loadable(folder.path(), &[])).unwrap(), "answer"), 42);
    });
}

#[test]
fn a_library_with_embedded_modules_is_loaded_by_tvm_ffi_itself() {
    let folder = folder();
    let path = loadable(folder.path(), &["-DEMBEDDED"]);
    let module = open(&path).unwrap();
    assert_eq!((module.name(), int(&module, "answer"), int(&module, "has_context")), ("loadable.so", 42, 1));
    let error = module.function("answr").unwrap_err();
    assert!(matches!(error, FlashInferError::FunctionMissing { .. }), "{error}");
    assert_eq!(module.metadata("answer").unwrap(), None);
    // As a value it is a module, whose functions keep it.
    let value = Any::from(module.as_object().unwrap().clone()).into_value();
    let Value::Module(again) = value else { panic!("{value:?}") };
    drop(module);
    assert_eq!(int(&again, "answer"), 42);
    let bytes = fs::read(&path).unwrap();
    // SAFETY: the test's own module.
    let (problem, remedy) = unloadable(unsafe { Module::from_bytes("embedded", &bytes) });
    assert!(problem.contains("embedded") && remedy.contains("Module::open"), "{problem}; {remedy}");
}

#[test]
fn an_embedded_module_that_nothing_loads_is_named_by_its_kind() {
    native::isolated("an_embedded_module_that_nothing_loads_is_named_by_its_kind", || {
        let folder = folder();
        let path = loadable(folder.path(), &["-DEMBEDDED", "-DKIND=python_module"]);
        assert_eq!(Module::preflight(&path).unwrap().embedded_kinds(), ["python_module"]);
        let (problem, remedy) = unloadable(open(&path));
        assert!(problem.contains("of kind python_module"), "{problem}");
        assert!(remedy.contains("ffi.Module.load_from_bytes.python_module"), "{remedy}");
        // With a loader that answers another module it is loaded.
        let other =
            open(&loadable(folder.path(), &["-DEMBEDDED"])).unwrap().as_object().unwrap().clone().into_raw() as usize;
        let loader = Func::from_fn("loader", move |bytes: Vec<u8>| {
            assert_eq!(bytes, b"xy");
            // SAFETY: a module object that lives for good, of which the answer takes a reference.
            let module = unsafe { flashinfer_rs::Object::from_raw(other as *mut std::ffi::c_void) };
            let answer = module.clone();
            let _kept = module.into_raw();
            Ok(answer)
        })
        .unwrap();
        // SAFETY: this process does nothing else meanwhile.
        unsafe { loader.register_global("ffi.Module.load_from_bytes.python_module", false) }.unwrap();
        let path = loadable(folder.path(), &["-DEMBEDDED", "-DKIND=python_module"]);
        assert_eq!(int(&open(&path).unwrap(), "has_context"), 1);
    });
}

#[test]
fn an_exception_that_is_no_std_exception_ends_the_process() {
    let name = "an_exception_that_is_no_std_exception_ends_the_process";
    let said = native::dying(name, || {
        let folder = folder();
        let module = open(&native::compile("throws.cc", "throws.so", &["-lstdc++"], folder.path())).unwrap();
        eprintln!("calls it");
        // SAFETY: it ends the process, as the documentation of `Function::call` says.
        let result = unsafe { module.function("throw").unwrap().call(&[Arg::NONE]) };
        eprintln!("came back: {result:?}");
    });
    assert!(said.contains("calls it") && !said.contains("came back"), "{said}");
}
