//! Nothing else gets in: decoys, swaps, strangers, forks. Each test runs in a process of its own.
#![cfg_attr(
    not(all(feature = "norm", feature = "cudart", feature = "embed")),
    allow(dead_code, unused_imports, reason = "what the tests of absent features use")
)]

#[path = "support/native.rs"]
mod native;

use std::collections::HashSet;
use std::fs;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use flashinfer_rs::kernels::norm::{NormOptions, gemma_rmsnorm};
use flashinfer_rs::{FlashInferError, FlashInferRuntime, RuntimeConfig, Stream, TensorMut, TensorRef};

/// What the crate loads.
const LIBRARIES: [&str; 4] = ["libcudart.so.13", "libtvm_ffi.so", "norm.so", "gdn_prefill_sm90.so"];

/// A folder of libraries that leave a mark when they are loaded.
fn decoys() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for soname in LIBRARIES {
        native::compile("decoy.c", soname, &[], folder.path());
    }
    folder
}

/// The libraries that are mapped, by path.
fn mapped() -> HashSet<String> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter_map(|line| line.splitn(6, ' ').nth(5)).map(|path| path.trim_start().to_owned()).collect()
}

fn initialize() -> &'static FlashInferRuntime {
    FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap()
}

/// A computation that needs libtvm_ffi.so.
fn compute() -> Vec<f32> {
    let (input, weight) = ([1f32, -1., 2., -2.], [0f32; 4]);
    let mut out = [0f32; 4];
    gemma_rmsnorm(
        &mut TensorMut::from_slice(&mut out, &[1, 4]).unwrap(),
        &TensorRef::from_slice(&input, &[1, 4]).unwrap(),
        &TensorRef::from_slice(&weight, &[4]).unwrap(),
        &NormOptions::default(),
        Stream::NULL,
    )
    .unwrap();
    out.to_vec()
}

#[cfg(all(feature = "norm", feature = "cudart"))]
#[test]
fn decoys_in_the_library_path_and_the_working_directory_are_not_loaded() {
    let decoys = decoys();
    let variables = [("LD_LIBRARY_PATH", decoys.path())];
    native::isolated_with("decoys_in_the_library_path_and_the_working_directory_are_not_loaded", &variables, || {
        let folder = PathBuf::from(std::env::var_os("LD_LIBRARY_PATH").unwrap());
        std::env::set_current_dir(&folder).unwrap();
        native::stand_in_for_the_driver();
        let runtime = initialize();
        runtime.module("norm.so").unwrap().function("gemma_rmsnorm").unwrap();
        compute();
        let strangers: Vec<_> = mapped().into_iter().filter(|path| Path::new(path).starts_with(&folder)).collect();
        assert!(strangers.is_empty(), "{strangers:?}");
        assert!(!folder.join("loaded").exists());
    });
}

#[test]
fn a_preloaded_tvm_ffi_is_refused_by_its_path() {
    let folder = tempfile::tempdir().unwrap();
    native::compile("tvm_ffi.c", "libtvm_ffi.so", &["-DWHOLE"], folder.path());
    // By its name and a folder, since the variable's names end at blanks, which temporary folders may have.
    let variables = [("LD_PRELOAD", Path::new("libtvm_ffi.so")), ("LD_LIBRARY_PATH", folder.path())];
    native::isolated_with("a_preloaded_tvm_ffi_is_refused_by_its_path", &variables, || {
        let error = FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap_err();
        let FlashInferError::ForeignTvmFfi { other } = &error else { panic!("{error}") };
        let folder = PathBuf::from(std::env::var_os("LD_LIBRARY_PATH").unwrap());
        assert_eq!(Path::new(other), folder.join("libtvm_ffi.so"));
    });
}

#[test]
fn another_tvm_ffi_is_adopted_only_where_asked_and_if_its_version_fits() {
    native::isolated("another_tvm_ffi_is_adopted_only_where_asked_and_if_its_version_fits", || {
        let library = native::vendored_libraries().join("libtvm_ffi.so");
        native::load(&library, true);
        // SAFETY: what was loaded is the vendored TVM-FFI.
        let config = unsafe { RuntimeConfig::default().adopt_tvm_ffi() };
        let runtime = FlashInferRuntime::initialize(config).unwrap();
        let artifacts = runtime.artifacts();
        let adopted = artifacts.iter().find(|artifact| artifact.name == "libtvm_ffi.so").unwrap();
        assert_eq!(adopted.loaded_from, Some(library));
        compute();
    });
}

/// Why the documentation lets a Python host import `tvm_ffi` before this crate is initialized. Where a later release of it
/// makes this test fail, the other order works too, and the documentation can say so.
#[test]
fn another_tvm_ffi_that_everybody_sees_cannot_be_loaded_after_ours() {
    let text = native::dying("another_tvm_ffi_that_everybody_sees_cannot_be_loaded_after_ours", || {
        initialize();
        let folder = tempfile::tempdir().unwrap();
        let other = folder.path().join("libtvm_ffi.so");
        fs::copy(native::vendored_libraries().join("libtvm_ffi.so"), &other).unwrap();
        native::load(&other, true);
    });
    assert!(text.contains("duplicate registration"), "{text}");
}

#[test]
fn an_adopted_tvm_ffi_of_another_version_is_refused() {
    native::isolated("an_adopted_tvm_ffi_of_another_version_is_refused", || {
        let folder = tempfile::tempdir().unwrap();
        native::load(&native::compile("tvm_ffi.c", "libtvm_ffi.so", &["-DWHOLE"], folder.path()), true);
        // SAFETY: the stand-in has the functions' types, and its version is looked at before any other is called.
        let config = unsafe { RuntimeConfig::default().adopt_tvm_ffi() };
        let error = FlashInferRuntime::initialize(config).unwrap_err();
        assert!(matches!(error, FlashInferError::VersionMismatch { .. }), "{error}");
    });
}

#[test]
fn a_library_that_is_swapped_all_the_time_is_right_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (place, decoy, good) =
        (folder.path().join("libtvm_ffi.so"), folder.path().join("decoy"), folder.path().join("good"));
    let built = native::compile("decoy.c", "libtvm_ffi.so", &[], folder.path());
    fs::rename(built, &decoy).unwrap();
    fs::copy(native::vendored_libraries().join("libtvm_ffi.so"), &good).unwrap();
    fs::copy(&good, &place).unwrap();
    let name = "a_library_that_is_swapped_all_the_time_is_right_or_refused";
    let variables = [("FLASHINFER_RS_LIB_DIR", folder.path())];
    if std::env::var_os("FLASHINFER_RS_ISOLATED_TEST").is_some() {
        return native::isolated_with(name, &variables, || {
            match FlashInferRuntime::initialize(RuntimeConfig::default()) {
                Ok(_) => drop(compute()),
                Err(error) => assert!(matches!(error, FlashInferError::DigestMismatch { .. }), "{error}"),
            }
            let folder = PathBuf::from(std::env::var_os("FLASHINFER_RS_LIB_DIR").unwrap());
            assert!(!folder.join("loaded").exists(), "the decoy was loaded");
        });
    }
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut turn = 0;
            while !stop.load(Ordering::Relaxed) {
                let next = folder.path().join("next");
                let _ = fs::hard_link(if turn % 2 == 0 { &decoy } else { &good }, &next);
                let _ = fs::rename(&next, &place);
                turn += 1;
            }
        });
        for _ in 0..30 {
            native::isolated_with(name, &variables, || {});
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[cfg(all(feature = "norm", feature = "cudart"))]
#[test]
fn descriptors_of_loaded_libraries_stay_open() {
    native::isolated("descriptors_of_loaded_libraries_stay_open", || {
        native::stand_in_for_the_driver();
        let runtime = initialize();
        // Numbers that are free now would be used again for what is loaded next.
        for _ in 0..100 {
            drop(fs::File::open("/proc/self/maps").unwrap());
        }
        runtime.module("norm.so").unwrap();
        let open: Vec<_> =
            fs::read_dir("/proc/self/fd").unwrap().filter_map(|fd| fs::read_link(fd.ok()?.path()).ok()).collect();
        for name in ["libcudart.so.13", "libtvm_ffi.so", "norm.so"] {
            assert!(open.iter().any(|path| path.to_string_lossy().contains(name)), "{name}: {open:?}");
            assert!(mapped().iter().any(|path| path.contains(name)), "{name} is not mapped");
        }
    });
}

/// Closes every descriptor but the standard ones, as a program that becomes a daemon does.
fn close_every_descriptor() {
    // SAFETY: whoever owned the descriptors, the loader of this crate above all, is what is tested; the test itself holds
    // none.
    let result = unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, 0u32) };
    assert_eq!(result, 0, "close_range: {}", std::io::Error::last_os_error());
}

/// Makes this the next descriptor that is opened.
fn next_descriptor_is(number: RawFd) {
    loop {
        let file = fs::File::open("/dev/null").unwrap();
        match file.as_raw_fd() {
            opened if opened < number => std::mem::forget(file),
            opened => return assert_eq!(opened, number),
        }
    }
}

/// The descriptor of a library.
fn descriptor_of(soname: &str) -> RawFd {
    let mut open = fs::read_dir("/proc/self/fd").unwrap().map(|fd| fd.unwrap().path());
    let is_it = |path: &PathBuf| fs::read_link(path).is_ok_and(|file| file.to_string_lossy().contains(soname));
    open.find(is_it).unwrap().file_name().unwrap().to_str().unwrap().parse().unwrap()
}

#[cfg(all(feature = "norm", feature = "cudart"))]
#[test]
fn a_program_that_closes_every_descriptor_still_loads_what_it_asks_for() {
    native::isolated("a_program_that_closes_every_descriptor_still_loads_what_it_asks_for", || {
        native::stand_in_for_the_driver();
        let runtime = initialize();
        let number = descriptor_of("libtvm_ffi.so");
        let vendored = |soname: &str| runtime.artifacts().iter().any(|artifact| artifact.name == soname);
        let modules = [("norm.so", "gemma_rmsnorm"), ("gdn_prefill_sm90.so", "gdn_prefill")];
        // The second only where the wheel has it.
        for (soname, function) in modules.into_iter().filter(|(soname, _)| *soname == "norm.so" || vendored(soname)) {
            // Each library is opened with the number that another one had.
            close_every_descriptor();
            next_descriptor_is(number);
            let Err(error) = runtime.module(soname).unwrap().function(function) else {
                assert_eq!(descriptor_of(soname), number);
                continue;
            };
            panic!("{error}");
        }
        compute();
    });
}

/// Overflows the stack.
#[expect(unconditional_recursion, reason = "that is what it is for")]
fn overflow(depth: u64) -> u64 {
    let kept = std::hint::black_box([depth; 64]);
    overflow(depth + 1) + kept[depth as usize % 64]
}

#[cfg(all(feature = "norm", feature = "cudart"))]
#[test]
fn a_stack_overflow_is_still_reported_by_rust() {
    let text = native::dying("a_stack_overflow_is_still_reported_by_rust", || {
        native::stand_in_for_the_driver();
        initialize().module("norm.so").unwrap();
        compute();
        overflow(0);
    });
    assert!(text.contains("has overflowed its stack"), "{text}");
}

#[cfg(all(feature = "embed", feature = "cudart"))]
#[test]
fn embedded_libraries_lie_in_memory_that_nobody_can_change() {
    native::isolated("embedded_libraries_lie_in_memory_that_nobody_can_change", || {
        initialize();
        let mut sealed = 0;
        for entry in fs::read_dir("/proc/self/fd").unwrap() {
            let path = entry.unwrap().path();
            if !fs::read_link(&path).is_ok_and(|target| target.to_string_lossy().contains("memfd:lib")) {
                continue;
            }
            let memory = fs::OpenOptions::new().write(true).open(&path).unwrap();
            let written = std::os::unix::fs::FileExt::write_at(&memory, b"x", 0);
            let (shrunk, grown) = (memory.set_len(1), memory.set_len(1 << 30));
            for result in [written.map(drop), shrunk, grown] {
                assert_eq!(result.unwrap_err().kind(), std::io::ErrorKind::PermissionDenied);
            }
            sealed += 1;
        }
        // libcudart.so.13 and libtvm_ffi.so
        assert_eq!(sealed, 2);
    });
}

#[test]
fn a_library_for_another_processor_is_refused_with_the_reason() {
    native::isolated("a_library_for_another_processor_is_refused_with_the_reason", || {
        let folder = tempfile::tempdir().unwrap();
        let mut bytes = fs::read(native::vendored_libraries().join("libtvm_ffi.so")).unwrap();
        // e_machine: neither x86-64 nor aarch64.
        bytes[18..20].copy_from_slice(&[0x15, 0]);
        fs::write(folder.path().join("libtvm_ffi.so"), bytes).unwrap();
        // SAFETY: the dynamic linker refuses it before anything in it runs.
        let config = unsafe { RuntimeConfig::default().lib_dir(folder.path()).without_verification() };
        let error = FlashInferRuntime::initialize(config).unwrap_err();
        let FlashInferError::LoadFailed { reason, .. } = &error else { panic!("{error}") };
        assert!(reason.contains("cannot open shared object file") || reason.contains("ELF"), "{reason}");
    });
}

unsafe extern "C" {
    fn fork() -> i32;
    fn waitpid(pid: i32, status: *mut i32, options: i32) -> i32;
    fn _exit(code: i32) -> !;
}

#[test]
fn a_fork_can_go_on_computing() {
    native::isolated("a_fork_can_go_on_computing", || {
        initialize();
        let expected = compute();
        // SAFETY: the child computes and leaves by _exit; no lock is held at this moment.
        let pid = unsafe { fork() };
        assert!(pid >= 0);
        if pid == 0 {
            let same = std::panic::catch_unwind(|| compute() == expected).unwrap_or(false);
            // SAFETY: ends the child without running the parent's exit handlers.
            unsafe { _exit(if same { 0 } else { 1 }) };
        }
        let mut status = -1;
        // SAFETY: waits for the child that was just made; the status is written through a valid pointer.
        assert_eq!(unsafe { waitpid(pid, &mut status, 0) }, pid);
        assert_eq!(status, 0);
    });
}

#[cfg(all(feature = "norm", feature = "cudart"))]
#[test]
fn many_threads_load_one_module() {
    native::isolated("many_threads_load_one_module", || {
        native::stand_in_for_the_driver();
        let runtime = initialize();
        let address = || std::ptr::from_ref(runtime.module("norm.so").unwrap()) as usize;
        let threads: Vec<_> = (0..16).map(|_| thread::spawn(address)).collect();
        let addresses: HashSet<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        assert_eq!(addresses.len(), 1);
    });
}

#[test]
fn without_a_gpu_everything_but_gpu_calls_works() {
    native::isolated("without_a_gpu_everything_but_gpu_calls_works", || {
        let folder = tempfile::tempdir().unwrap();
        // SAFETY: the process has one thread that reads the environment, this one.
        unsafe { std::env::set_var("FAKE_DRIVER", "0") };
        native::load(&native::compile("cudart.c", "libcudart.so.13", &[], folder.path()), false);
        let runtime = initialize();
        assert!(!runtime.gpu_available());
        let error = runtime.device_count().unwrap_err();
        assert!(matches!(error, FlashInferError::DriverMissing { .. }), "{error}");
        assert!(error.to_string().contains("libcuda.so.1"), "{error}");
        assert_eq!(compute().len(), 4);
    });
}
