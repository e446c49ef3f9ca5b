//! Finding, checking and loading libraries. A process has one runtime, so each test runs in one of its own.
#![cfg_attr(
    not(all(feature = "norm", feature = "cudart")),
    allow(dead_code, unused_imports, reason = "what the tests of absent features use")
)]

#[path = "support/native.rs"]
mod native;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use flashinfer_rs::{Device, FlashInferError, FlashInferRuntime, RuntimeConfig, Stream};

const TVM_FFI: &str = "libtvm_ffi.so";

/// A folder with copies of the vendored libraries.
fn copies() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(native::vendored_libraries()).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    folder
}

fn initialize(folder: &Path) -> flashinfer_rs::Result<&'static FlashInferRuntime> {
    FlashInferRuntime::initialize(RuntimeConfig::default().lib_dir(folder))
}

/// Changes the last byte of a file.
fn tamper(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn nothing_works_before_initialize() {
    native::isolated("nothing_works_before_initialize", || {
        let error = FlashInferRuntime::global().unwrap_err();
        assert!(matches!(error, FlashInferError::NotInitialized), "{error}");
        assert!(error.to_string().contains("initialize"));
        assert!(flashinfer_rs::reference::module().is_err());
    });
}

#[test]
fn a_second_initialize_gives_the_same_runtime_or_says_why_not() {
    native::isolated("a_second_initialize_gives_the_same_runtime_or_says_why_not", || {
        let first = FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
        let second = FlashInferRuntime::initialize(RuntimeConfig::new()).unwrap();
        assert!(std::ptr::eq(first, second) && std::ptr::eq(first, FlashInferRuntime::global().unwrap()));
        let error = initialize(Path::new("/somewhere/else")).unwrap_err();
        assert!(matches!(error, FlashInferError::AlreadyInitialized { .. }), "{error}");
        assert!(error.to_string().contains("/somewhere/else"), "{error}");
    });
}

#[test]
fn many_threads_initialize_one_runtime() {
    native::isolated("many_threads_initialize_one_runtime", || {
        let address = || std::ptr::from_ref(FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap()) as usize;
        let threads: Vec<_> = (0..16).map(|_| std::thread::spawn(address)).collect();
        let addresses: Vec<usize> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        assert!(addresses.iter().all(|found| *found == addresses[0]));
    });
}

#[test]
fn a_swapped_library_is_refused_by_its_digest() {
    native::isolated("a_swapped_library_is_refused_by_its_digest", || {
        let folder = copies();
        let library = folder.path().join(TVM_FFI);
        tamper(&library);
        let error = initialize(folder.path()).unwrap_err();
        let FlashInferError::DigestMismatch { path, found, expected, .. } = &error else { panic!("{error}") };
        assert_eq!(*path, library);
        assert!(found.len() == 64 && expected.len() == 64 && found != expected);
        let text = error.to_string();
        assert!([found.as_str(), expected, "restore it"].iter().all(|part| text.contains(part)), "{text}");
        // What was refused left nothing behind that a right configuration would trip over.
        FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
    });
}

#[cfg(feature = "norm")]
#[test]
fn a_swapped_kernel_library_is_refused_when_it_is_first_used() {
    native::isolated("a_swapped_kernel_library_is_refused_when_it_is_first_used", || {
        let folder = copies();
        // All of them, since any may be the first that warming up loads.
        let libraries: BTreeSet<_> = flashinfer_rs::kernels::rows().iter().map(|row| row.library).collect();
        let paths = libraries.iter().map(|library| folder.path().join(library));
        paths.filter(|path| path.is_file()).for_each(|path| tamper(&path));
        let runtime = initialize(folder.path()).unwrap();
        let error = runtime.module("norm.so").unwrap_err();
        assert!(matches!(error, FlashInferError::DigestMismatch { .. }), "{error}");
        assert!(matches!(runtime.warm_up().unwrap_err(), FlashInferError::DigestMismatch { .. }));
    });
}

#[test]
fn the_folder_of_the_variable_is_searched_too() {
    let folder = copies();
    tamper(&folder.path().join(TVM_FFI));
    native::isolated_with(
        "the_folder_of_the_variable_is_searched_too",
        &[("FLASHINFER_RS_LIB_DIR", folder.path())],
        || {
            let folder = PathBuf::from(std::env::var_os("FLASHINFER_RS_LIB_DIR").unwrap());
            let error = FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap_err();
            let FlashInferError::DigestMismatch { path, .. } = &error else { panic!("{error}") };
            assert_eq!(*path, folder.join(TVM_FFI));
        },
    );
}

#[test]
fn the_configured_folder_comes_before_the_variables() {
    let folder = copies();
    tamper(&folder.path().join(TVM_FFI));
    let variables = [("FLASHINFER_RS_LIB_DIR", folder.path())];
    native::isolated_with("the_configured_folder_comes_before_the_variables", &variables, || {
        let whole = copies();
        initialize(whole.path()).unwrap();
    });
}

#[cfg(not(feature = "embed"))]
#[test]
fn libraries_are_found_where_the_build_put_them() {
    native::isolated("libraries_are_found_where_the_build_put_them", || {
        assert_eq!(loaded_tvm_ffi(), native::vendored_libraries().join(TVM_FFI));
    });
}

#[cfg(not(feature = "embed"))]
#[test]
fn libraries_beside_the_executable_come_before_where_the_build_put_them() {
    const NAME: &str = "libraries_beside_the_executable_come_before_where_the_build_put_them";
    // On the executable's own file system, so that it can have a second name: a copy could not be started while another
    // thread's child still holds it open for writing.
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (program, beside) = (folder.path().join("program"), folder.path().join("lib/flashinfer-rs"));
    fs::hard_link(std::env::current_exe().unwrap(), &program).unwrap();
    fs::create_dir_all(&beside).unwrap();
    fs::copy(native::vendored_libraries().join(TVM_FFI), beside.join(TVM_FFI)).unwrap();
    native::isolated_in(&program, NAME, &[], || {
        let executable = std::env::current_exe().unwrap();
        assert_eq!(loaded_tvm_ffi(), executable.with_file_name("lib/flashinfer-rs").join(TVM_FFI));
    });
}

/// Where libtvm_ffi.so was found.
#[cfg(not(feature = "embed"))]
fn loaded_tvm_ffi() -> PathBuf {
    let artifacts = FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap().artifacts();
    artifacts.into_iter().find(|artifact| artifact.name == TVM_FFI).and_then(|artifact| artifact.loaded_from).unwrap()
}

#[test]
fn a_library_that_is_in_no_folder_names_all_of_them() {
    native::isolated("a_library_that_is_in_no_folder_names_all_of_them", || {
        let folder = copies();
        let runtime = initialize(folder.path()).unwrap();
        let error = runtime.module("nothing.so").unwrap_err();
        let FlashInferError::ArtifactMissing { searched, .. } = &error else { panic!("{error}") };
        assert!(searched.contains(&folder.path().join("nothing.so").display().to_string()), "{searched:?}");
        assert!(searched.iter().any(|place| place.ends_with("lib/flashinfer-rs/nothing.so")), "{searched:?}");
        assert!(error.to_string().contains("was not vendored"), "{error}");
    });
}

#[test]
fn a_file_that_was_not_vendored_is_not_loaded_unchecked() {
    native::isolated("a_file_that_was_not_vendored_is_not_loaded_unchecked", || {
        let folder = copies();
        fs::copy(folder.path().join(TVM_FFI), folder.path().join("other.so")).unwrap();
        let error = initialize(folder.path()).unwrap().module("other.so").unwrap_err();
        assert!(matches!(error, FlashInferError::ArtifactMissing { .. }), "{error}");
        assert!(error.to_string().contains("without_verification"), "{error}");
    });
}

const XQA: &str = "xqa_input_bf16_kv_cache_bf16_output_bf16_page_size_64_head_dim_128_head_group_ratio_4_\
                   use_sliding_window_False_use_spec_dec_False_spec_q_seq_len_1.so";

#[test]
fn a_module_that_is_set_up_for_the_current_gpu_has_a_copy_for_each() {
    native::isolated("a_module_that_is_set_up_for_the_current_gpu_has_a_copy_for_each", || {
        let (folder, elsewhere) = (copies(), tempfile::tempdir().unwrap());
        let cudart = native::compile("cudart.c", "libcudart.so.13", &[], elsewhere.path());
        native::load(&cudart, false);
        let library = native::compile("loadable.c", XQA, &["-DSET_UP", cudart.to_str().unwrap()], folder.path());
        let runtime = FlashInferRuntime::initialize(unverified(folder.path())).unwrap();

        let modules = [1, 0, 1].map(|id| runtime.module_on(XQA, Device::Cuda(id)).unwrap());
        let set_up_for = modules.map(|module| {
            // SAFETY: the fixture's functions take anything.
            unsafe { module.function("device").unwrap().typed::<(), i64>().call(()) }.unwrap()
        });
        assert_eq!(set_up_for, [1, 0, 1]);
        assert!(std::ptr::eq(modules[0], modules[2]) && modules[0].name() == XQA);
        let loaded = runtime.artifacts().into_iter().filter(|artifact| artifact.name == XQA);
        let loaded: Vec<_> = loaded.map(|artifact| artifact.loaded_from).collect();
        assert_eq!(loaded, [Some(library)]);

        let error = runtime.module(XQA).unwrap_err();
        assert!(error.to_string().contains("FlashInferRuntime::module_on"), "{error}");
        let error = runtime.module_on(XQA, Device::Cpu).unwrap_err();
        assert!(error.to_string().contains("the host"), "{error}");
        let error = runtime.module_on(XQA, Device::Cuda(2)).unwrap_err();
        assert!(matches!(error, FlashInferError::DeviceOutOfRange { device: 2, count: 2 }), "{error}");
        let error = runtime.module_on(TVM_FFI, Device::Cuda(0)).unwrap_err();
        assert!(error.to_string().contains("a kernel module"), "{error}");
    });
}

/// What a runtime says that looks for modules in an empty folder, where it has no such library.
#[track_caller]
fn remedy(runtime: &'static FlashInferRuntime, soname: &str) -> String {
    let FlashInferError::ArtifactMissing { library, remedy, .. } = runtime.module(soname).unwrap_err() else {
        panic!("{soname} is there")
    };
    assert_eq!(library, soname);
    assert!(remedy.starts_with(&format!("{soname} was not vendored: ")), "{remedy}");
    remedy
}

#[test]
fn what_vendors_a_module_that_is_not_there_is_named() {
    native::isolated("what_vendors_a_module_that_is_not_there_is_named", || {
        let runtime = FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
        let prefill = |head_dim, end| {
            format!(
                "batch_prefill_with_kv_cache_dtype_q_f16_dtype_kv_f16_dtype_o_f16_dtype_idx_i32_head_dim_qk_{head_dim}_\
                 head_dim_vo_{head_dim}_posenc_0_use_swa_True_use_logits_cap_False_f16qk_False{end}"
            )
        };
        // In the wheel, and no feature's.
        let module = prefill(256, "_sm90");
        let variable = format!("build with FLASHINFER_RS_MODULES={module}, if");
        assert!(remedy(runtime, &format!("{module}.so")).contains(&variable));
        assert!(remedy(runtime, "single_thing.so").contains("build with FLASHINFER_RS_MODULES=single_thing, if"));
        // In no wheel.
        let module = prefill(96, "");
        let text = remedy(runtime, &format!("{module}.so"));
        for part in ["no such module", &format!("cargo xtask wheel --kernels {module}`")] {
            assert!(text.contains(part), "{text}");
        }
        #[cfg(not(feature = "attention-mla"))]
        {
            let mla = "batch_mla_attention_dtype_q_bf16_dtype_kv_bf16_dtype_o_bf16_dtype_idx_i32_head_dim_ckv_512_\
                       head_dim_kpe_64_profiler_False_sm90.so";
            assert!(remedy(runtime, mla).contains("Cargo feature `attention-mla`"));
        }
        #[cfg(not(feature = "page"))]
        assert!(remedy(runtime, "page.so").contains("Cargo feature `page`"));
    });
}

/// A configuration that loads whatever lies in the folder.
fn unverified(folder: &Path) -> RuntimeConfig {
    // SAFETY: the test's own libraries, whose initializers do nothing.
    unsafe { RuntimeConfig::default().lib_dir(folder).without_verification() }
}

#[test]
fn a_module_is_asked_for_by_its_name_and_not_by_a_path() {
    native::isolated("a_module_is_asked_for_by_its_name_and_not_by_a_path", || {
        let (folder, elsewhere) = (copies(), tempfile::tempdir().unwrap());
        let stranger = native::compile("module.c", "stranger.so", &[], elsewhere.path());
        let path = stranger.to_str().unwrap();
        // Even this runtime, which takes whatever lies in its folder, takes nothing from other folders.
        let runtime = FlashInferRuntime::initialize(unverified(folder.path())).unwrap();
        let below = format!("../{}", path.trim_start_matches('/'));
        let names = ["", ".", "..", "/", path, &below, "./norm.so", "norm.so/", "a/../norm.so", "norm.so\0", "\0"];
        for name in names {
            let error = runtime.module(name).unwrap_err();
            let FlashInferError::InvalidArgument { found, .. } = &error else { panic!("{name:?}: {error}") };
            assert_eq!(*found, format!("{name:?}"));
            let text = error.to_string();
            assert!(["without a folder", "load_module"].iter().all(|part| text.contains(part)), "{text}");
        }
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        assert!(!maps.contains("stranger.so"), "{maps}");
        // SAFETY: the test's own library, whose initializers do nothing.
        unsafe { runtime.load_module(stranger.as_path()) }.unwrap();
    });
}

/// In a runtime that verifies, and in one that does not.
fn refuses_what_modules_need(runtime: &'static FlashInferRuntime) {
    for name in [TVM_FFI, "libcudart.so.13"] {
        let error = runtime.module(name).unwrap_err();
        assert!(matches!(error, FlashInferError::InvalidArgument { .. }), "{error}");
        let text = error.to_string();
        assert!([name, "a kernel module", "initialize loads it"].iter().all(|part| text.contains(part)), "{text}");
    }
}

#[test]
fn what_modules_need_is_no_module() {
    native::isolated("what_modules_need_is_no_module", || {
        refuses_what_modules_need(FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap());
    });
}

#[test]
fn what_modules_need_is_no_module_where_nothing_is_verified_either() {
    native::isolated("what_modules_need_is_no_module_where_nothing_is_verified_either", || {
        let folder = copies();
        refuses_what_modules_need(FlashInferRuntime::initialize(unverified(folder.path())).unwrap());
    });
}

#[cfg(all(feature = "norm", feature = "cudart"))]
#[test]
fn a_warm_up_that_fails_fails_again_and_the_runtime_is_there() {
    native::isolated("a_warm_up_that_fails_fails_again_and_the_runtime_is_there", || {
        let folder = copies();
        let (norm, good) = (folder.path().join("norm.so"), folder.path().join("good"));
        fs::copy(&norm, &good).unwrap();
        tamper(&norm);
        native::stand_in_for_the_driver();
        let warm = || FlashInferRuntime::initialize(RuntimeConfig::default().lib_dir(folder.path()).warm_up());
        for _ in 0..2 {
            let error = warm().unwrap_err();
            assert!(matches!(error, FlashInferError::DigestMismatch { .. }), "{error}");
        }
        let cold = initialize(folder.path()).unwrap();
        assert!(std::ptr::eq(cold, FlashInferRuntime::global().unwrap()));
        // What was in the way is gone.
        fs::rename(&good, &norm).unwrap();
        assert!(std::ptr::eq(cold, warm().unwrap()));
        assert!(cold.artifacts().iter().any(|artifact| artifact.name == "norm.so" && artifact.loaded_from.is_some()));
    });
}

#[cfg(all(feature = "norm", feature = "cudart"))]
#[test]
fn a_runtime_that_is_there_is_warmed_up_by_a_call_that_asks_for_it() {
    native::isolated("a_runtime_that_is_there_is_warmed_up_by_a_call_that_asks_for_it", || {
        native::stand_in_for_the_driver();
        let cold = FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
        // Whichever the wheel had of those that are warmed up.
        let rows = flashinfer_rs::kernels::rows();
        let is_module = |name: &str| rows.iter().any(|row| row.library == name);
        let modules = cold.artifacts().iter().filter(|row| is_module(&row.name)).count();
        assert!(modules > 0);
        let modules_loaded =
            || cold.artifacts().iter().filter(|row| is_module(&row.name) && row.loaded_from.is_some()).count();
        assert_eq!(modules_loaded(), 0);
        let warm = FlashInferRuntime::initialize(RuntimeConfig::default().warm_up()).unwrap();
        assert!(std::ptr::eq(cold, warm));
        assert_eq!(modules_loaded(), modules);
    });
}

/// Where this program runs as if it had been built elsewhere: that folder.
#[cfg(all(feature = "norm", not(feature = "embed")))]
const MOVED: &str = "FLASHINFER_RS_MOVED_TEST";

#[cfg(all(feature = "norm", not(feature = "embed")))]
#[test]
fn a_program_that_was_moved_with_its_target_folder_finds_its_libraries_there() {
    let name = "a_program_that_was_moved_with_its_target_folder_finds_its_libraries_there";
    if native::in_its_process(name) {
        let target = PathBuf::from(std::env::var_os(MOVED).unwrap());
        let runtime = FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
        let artifacts = runtime.artifacts();
        let tvm_ffi = artifacts.iter().find(|artifact| artifact.name == TVM_FFI).unwrap();
        let path = tvm_ffi.loaded_from.as_ref().unwrap();
        assert!(path.starts_with(&target), "{path:?} is not below {target:?}");
        // They are still checked.
        tamper(&path.with_file_name("norm.so"));
        let error = runtime.module("norm.so").unwrap_err();
        assert!(matches!(error, FlashInferError::DigestMismatch { .. }), "{error}");
        return;
    }
    let program = std::env::current_exe().unwrap();
    let profile = program.parent().and_then(Path::parent).unwrap();
    let libraries = native::vendored_libraries();
    let below = libraries.strip_prefix(profile).unwrap();
    // cargo puts a program into the profile's folder, tests and examples one folder below it.
    for folder in ["", "deps", "examples"] {
        let target = tempfile::tempdir().unwrap();
        fs::create_dir_all(target.path().join(below)).unwrap();
        for entry in fs::read_dir(&libraries).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), target.path().join(below).join(entry.file_name())).unwrap();
        }
        let moved = target.path().join(folder).join("moved");
        fs::create_dir_all(moved.parent().unwrap()).unwrap();
        fs::copy(&program, &moved).unwrap();
        let output = native::again(&moved, name, &[(MOVED, target.path())]);
        let text = native::text(&output);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
    }
}

#[test]
fn what_the_dynamic_linker_says_is_in_the_error() {
    native::isolated("what_the_dynamic_linker_says_is_in_the_error", || {
        let folder = copies();
        fs::write(folder.path().join(TVM_FFI), b"this is no library").unwrap();
        let error = FlashInferRuntime::initialize(unverified(folder.path())).unwrap_err();
        let FlashInferError::LoadFailed { reason, .. } = &error else { panic!("{error}") };
        assert!(reason.contains("too short") || reason.contains("ELF"), "{reason}");
        assert!(error.to_string().contains(reason.as_str()));
    });
}

#[test]
fn another_release_of_tvm_ffi_is_refused() {
    native::isolated("another_release_of_tvm_ffi_is_refused", || {
        let folder = tempfile::tempdir().unwrap();
        native::compile("tvm_ffi.c", TVM_FFI, &["-DWHOLE"], folder.path());
        // The second answer is the first one: the library that was refused is not taken for somebody else's.
        for _ in 0..2 {
            let error = FlashInferRuntime::initialize(unverified(folder.path())).unwrap_err();
            let FlashInferError::VersionMismatch { found, expected, .. } = &error else { panic!("{error}") };
            assert_eq!((found.as_str(), expected.as_str()), ("0.9.7", "0.1.x"));
        }
        // Nor is it in the way of the right one.
        FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
    });
}

#[test]
fn a_library_without_a_symbol_is_refused() {
    native::isolated("a_library_without_a_symbol_is_refused", || {
        let folder = tempfile::tempdir().unwrap();
        native::compile("tvm_ffi.c", TVM_FFI, &[], folder.path());
        for _ in 0..2 {
            let error = FlashInferRuntime::initialize(unverified(folder.path())).unwrap_err();
            let FlashInferError::SymbolMissing { library, symbol, reason } = &error else { panic!("{error}") };
            assert_eq!((library.as_str(), symbol.as_str()), (TVM_FFI, "TVMFFIObjectIncRef"));
            assert!(reason.contains("undefined symbol"), "{reason}");
        }
    });
}

#[test]
fn another_tvm_ffi_that_everybody_sees_is_refused_by_its_path() {
    native::isolated("another_tvm_ffi_that_everybody_sees_is_refused_by_its_path", || {
        let folder = copies();
        let other = folder.path().join(TVM_FFI);
        native::load(&other, true);
        let error = FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap_err();
        let FlashInferError::ForeignTvmFfi { other: found } = &error else { panic!("{error}") };
        assert_eq!(Path::new(found), other);
        // Not the other order: who loads a second one after ours ends the process.
        let text = error.to_string();
        assert!(
            text.contains("RuntimeConfig::adopt_tvm_ffi") && !text.contains("initialize this crate first"),
            "{text}"
        );
        // SAFETY: what was loaded is a copy of the vendored TVM-FFI.
        FlashInferRuntime::initialize(unsafe { RuntimeConfig::default().adopt_tvm_ffi() }).unwrap();
    });
}

#[test]
fn another_tvm_ffi_that_nobody_sees_does_not_matter() {
    native::isolated("another_tvm_ffi_that_nobody_sees_does_not_matter", || {
        let folder = copies();
        native::load(&folder.path().join(TVM_FFI), false);
        FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
    });
}

// norm.so needs libcudart.so.13 before it needs the driver.
#[cfg(all(feature = "norm", feature = "cudart"))]
#[test]
fn kernels_without_a_driver_say_so() {
    native::isolated("kernels_without_a_driver_say_so", || {
        // SAFETY: only asked whether it is there.
        if unsafe { libloading::os::unix::Library::new("libcuda.so.1") }.is_ok() {
            // With a driver the same call succeeds.
            FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap().module("norm.so").unwrap();
            return;
        }
        let runtime = FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
        for error in [runtime.module("norm.so").unwrap_err(), runtime.device_count().unwrap_err()] {
            assert!(matches!(error, FlashInferError::DriverMissing { .. }), "{error}");
            assert!(error.to_string().contains("libcuda.so.1"), "{error}");
        }
        let error = runtime.module("norm.so").unwrap_err();
        assert!(error.to_string().contains("cannot open shared object file"), "{error}");
    });
}

/// A process whose libcudart.so.13 is the stand-in.
fn with_fake_cudart(name: &str, variables: &[(&str, &str)], body: impl FnOnce(&'static FlashInferRuntime)) {
    let variables: Vec<(&str, &Path)> = variables.iter().map(|(name, value)| (*name, Path::new(*value))).collect();
    native::isolated_with(name, &variables, || {
        let folder = tempfile::tempdir().unwrap();
        native::load(&native::compile("cudart.c", "libcudart.so.13", &[], folder.path()), false);
        body(FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap());
    });
}

#[test]
fn a_cuda_runtime_that_is_in_the_process_is_used() {
    with_fake_cudart("a_cuda_runtime_that_is_in_the_process_is_used", &[("FAKE_GPUS", "3")], |runtime| {
        assert_eq!(runtime.device_count().unwrap(), 3);
    });
}

#[test]
fn a_driver_that_is_too_old_is_named_with_what_is_needed() {
    with_fake_cudart("a_driver_that_is_too_old_is_named_with_what_is_needed", &[("FAKE_DRIVER", "12080")], |runtime| {
        let error = runtime.device_count().unwrap_err();
        let FlashInferError::DriverTooOld { found, needed } = &error else { panic!("{error}") };
        assert_eq!((found.as_str(), needed.as_str()), ("12.8", "13.0"));
    });
}

#[test]
fn a_driver_without_a_gpu_counts_none() {
    with_fake_cudart("a_driver_without_a_gpu_counts_none", &[("FAKE_ERROR", "100")], |runtime| {
        assert_eq!(runtime.device_count().unwrap(), 0);
        let error = runtime.on((Device::Cuda(0), Stream::NULL), |_| ()).unwrap_err();
        assert!(matches!(error, FlashInferError::DeviceOutOfRange { device: 0, count: 0 }), "{error}");
    });
}

#[test]
fn what_the_cuda_runtime_says_is_in_the_error() {
    with_fake_cudart("what_the_cuda_runtime_says_is_in_the_error", &[("FAKE_ERROR", "999")], |runtime| {
        let error = runtime.device_count().unwrap_err();
        let FlashInferError::Cuda { call, code, message } = &error else { panic!("{error}") };
        assert_eq!((*call, *code, message.as_str()), ("cudaGetDeviceCount", 999, "a made-up error"));
    });
}

#[test]
fn artifacts_say_where_each_library_comes_from_and_was_loaded_from() {
    native::isolated("artifacts_say_where_each_library_comes_from_and_was_loaded_from", || {
        let folder = copies();
        let runtime = initialize(folder.path()).unwrap();
        let artifacts = runtime.artifacts();
        let tvm_ffi = artifacts.iter().find(|artifact| artifact.name == TVM_FFI).unwrap();
        assert_eq!(tvm_ffi.loaded_from, Some(folder.path().join(TVM_FFI)));
        let provenance = tvm_ffi.provenance.as_ref().unwrap();
        assert_eq!((provenance.distribution, provenance.version), ("apache_tvm_ffi", "0.1.3"));
        assert_eq!(provenance.size, fs::metadata(folder.path().join(TVM_FFI)).unwrap().len());
        assert!(provenance.sha256.len() == 64 && provenance.wheel_sha256.len() == 64);
        let others = artifacts.iter().filter(|artifact| artifact.name.ends_with(".so") && artifact.name != TVM_FFI);
        assert!(others.clone().all(|artifact| artifact.loaded_from.is_none()));
        assert_eq!(others.filter(|artifact| artifact.name == "norm.so").count(), usize::from(cfg!(feature = "norm")));
    });
}

#[test]
fn the_report_of_a_machine_without_a_gpu_does_not_pass() {
    with_fake_cudart("the_report_of_a_machine_without_a_gpu_does_not_pass", &[("FAKE_GPUS", "0")], |runtime| {
        let report = runtime.report();
        // No kernel ran, so that none was found right.
        assert!(!report.passed() && report.self_tests.is_empty(), "{report}");
        let text = report.to_string();
        let parts = ["libtvm_ffi.so", "supports CUDA 13.0", "GPUs\n  none"];
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
    });
}

#[test]
fn a_cuda_runtime_of_the_process_is_listed_with_its_file() {
    with_fake_cudart("a_cuda_runtime_of_the_process_is_listed_with_its_file", &[], |runtime| {
        let artifacts = runtime.artifacts();
        let cudart = artifacts.iter().find(|artifact| artifact.name == "libcudart.so.13").unwrap();
        let path = cudart.loaded_from.as_ref().unwrap();
        assert!(path.is_absolute() && path.ends_with("libcudart.so.13"), "{path:?}");
        assert!(!path.starts_with(native::vendored_libraries()), "{path:?}");
    });
}
