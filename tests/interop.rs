//! This crate and Python in one process: Python's package `tvm_ffi` over the same libtvm_ffi.so, tensors through DLPack, and
//! what upstream's Python builder builds.
//!
//! `cargo xtask interop` installs what it takes into a folder and runs these tests with `FLASHINFER_RS_INTEROP`, which names it.
//! Without that they are reported as ignored, never as passed; so is the one with PyTorch where `python3`, or the folder's
//! `torch`, has no PyTorch.

#[path = "support/interop.rs"]
mod interop;
#[path = "support/native.rs"]
mod native;

use std::ffi::OsString;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};
use std::sync::OnceLock;

use flashinfer_rs::object::Tensor;
use flashinfer_rs::{DType, FlashInferRuntime, Module, RuntimeConfig};
use libtest_mimic::{Arguments, Trial};

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Python processes: each waits for two compilers' worth of imports.
    arguments.test_threads = arguments.test_threads.or(Some(2));
    let installed = interop::folder().is_some();
    let has_torch = installed && has_torch();
    let mut trials = Vec::new();
    let mut trial = |name: &str, release: &'static str, there: bool, test: fn(&str)| {
        let body = move || {
            test(release);
            Ok(())
        };
        trials.push(Trial::test(format!("{name}_{release}"), body).with_ignored_flag(!there));
    };
    for release in interop::RELEASES {
        trial("python_s_library_is_adopted", release, installed, |r| passes("adopted", r, &[]));
        trial("python_s_library_is_refused_unless_asked_for", release, installed, |r| passes("refused", r, &[]));
        trial("another_library_of_python_s_second_ends_the_process", release, installed, another_file_second);
        trial("numpy_s_tensors_go_both_ways", release, installed, |r| passes("numpy", r, &[]));
        trial("pytorch_s_tensors_go_both_ways", release, has_torch, |r| passes("torch", r, &[]));
        trial("what_upstream_s_builder_builds_runs", release, installed, builder);
    }
    trial("values_of_the_official_crate_cross_over", interop::RELEASES[2], installed, official_crate);
    trial("the_same_file_is_one_library_whoever_comes_first", VENDORED, installed, ours_first);
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// The release that this crate vendors.
const VENDORED: &str = "0.1.3";

/// What is there beside TVM-FFI; and PyTorch, which TVM-FFI imports wherever it finds it.
const PACKAGES: &[&str] = &["packages"];
const PACKAGES_AND_TORCH: &[&str] = &["packages", "torch"];

/// Python with these of the folders that were installed, a release of TVM-FFI first.
fn python(tvm_ffi: &Path, packages: &[&str]) -> Command {
    let folder = interop::installed();
    let mut path = OsString::from(tvm_ffi.parent().expect("the folder of a package"));
    for part in packages {
        path.push(":");
        path.push(folder.join(part));
    }
    let mut python = Command::new("python3");
    python.env("PYTHONPATH", path).env("PYTHONNOUSERSITE", "1").env("PYTHONDONTWRITEBYTECODE", "1");
    // Python's package would compile something of its own for PyTorch.
    python.env("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1").env_remove("FLASHINFER_RS_LIB_DIR");
    python
}

fn has_torch() -> bool {
    let finds = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)";
    let status = python(&interop::tvm_ffi(VENDORED), PACKAGES_AND_TORCH).args(["-c", finds]).status();
    status.is_ok_and(|status| status.success())
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support").join(name)
}

/// The library with this crate that Python loads, built once. The test's own program cannot be loaded into another.
fn host() -> &'static Path {
    static HOST: OnceLock<PathBuf> = OnceLock::new();
    HOST.get_or_init(|| {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
        cargo.args(["build", "--quiet", "--example", "python_host", "--all-features", "--message-format", "json"]);
        cargo.arg("--target-dir").arg(Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("the target folder"));
        let output = cargo.output().expect("cargo");
        assert!(output.status.success(), "{}", native::text(&output));
        let messages = String::from_utf8(output.stdout).expect("JSON");
        let messages = messages.lines().map(|line| serde_json::from_str(line).expect("JSON"));
        let library = messages.rev().find(|message: &serde_json::Value| message["target"]["name"] == "python_host");
        let file = library.expect("the library's message")["filenames"][0].as_str().expect("its file").to_owned();
        PathBuf::from(file)
    })
}

fn scenario(name: &str, tvm_ffi: &Path, rest: &[&Path]) -> Output {
    let mut python = python(tvm_ffi, if name == "torch" { PACKAGES_AND_TORCH } else { PACKAGES });
    python.arg(script("interop.py")).arg(name).arg(host()).args(rest).output().expect("python3 starts")
}

fn passes(name: &str, release: &str, rest: &[&Path]) {
    succeeds(&scenario(name, &interop::tvm_ffi(release), rest));
}

fn succeeds(output: &Output) {
    let passed = String::from_utf8_lossy(&output.stdout).trim_end().ends_with("passed");
    assert!(output.status.success() && passed, "{}: {}", output.status, native::text(output));
}

/// Ours is there, and Python loads another one, globally: its initializers find what ours registered, and end the process.
/// This crate has no part in that. Where a later release of it makes this test fail, the documentation can say that both
/// orders work.
fn another_file_second(release: &str) {
    let output = scenario("another_file_second", &interop::tvm_ffi(release), &[]);
    let text = native::text(&output);
    assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{text}");
    assert!(text.contains("and now Python's") && text.contains("is already registered"), "{text}");
}

/// A copy of Python's package whose libtvm_ffi.so is this crate's.
fn ours_first(release: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    let (from, package) = (interop::tvm_ffi(release), folder.path().join("tvm_ffi"));
    let copied = Command::new("cp").arg("-r").arg(&from).arg(&package).status().expect("cp");
    assert!(copied.success());
    let (library, vendored) = (package.join("lib/libtvm_ffi.so"), native::vendored_libraries());
    std::fs::remove_file(&library).expect("the package's library");
    symlink(vendored.join("libtvm_ffi.so"), &library).expect("a link");
    succeeds(&scenario("ours_first", &package, &[&vendored]));
}

/// A program that depends on this crate and on the official one, which Python's package is needed to build, so that it is no
/// dependency of this crate's tests.
fn official_crate(release: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let manifest = format!(
        "[package]\nname = \"official-crate\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\n[[bin]]\nname = \"official-crate\"\n\
         path = {:?}\n\n[dependencies]\nflashinfer-rs = {{ path = {root:?}, default-features = false }}\n\
         tvm-ffi = \"=0.1.15\"\n\n[workspace]\n",
        root.join("tests/fixtures/official_crate.rs")
    );
    std::fs::write(folder.path().join("Cargo.toml"), manifest).expect("a manifest");
    // So that what both depend on is of the releases that were tested here.
    std::fs::copy(root.join("Cargo.lock"), folder.path().join("Cargo.lock")).expect("a lock file");
    // What the official crate's build asks where the library is: all that it takes of Python's package.
    let libraries = interop::tvm_ffi(release).join("lib");
    let config = folder.path().join("tvm-ffi-config");
    std::fs::write(&config, format!("#!/bin/sh\necho '{}'\n", libraries.display())).expect("a script");
    std::fs::set_permissions(&config, std::fs::Permissions::from_mode(0o755)).expect("a mode");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let paths = std::iter::once(folder.path().to_owned()).chain(std::env::split_paths(&path));
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["run", "--quiet", "--target-dir"]).arg(Path::new(env!("CARGO_TARGET_TMPDIR")).join("official-crate"));
    cargo.current_dir(folder.path()).env("PATH", std::env::join_paths(paths).expect("a path"));
    cargo.env("LD_LIBRARY_PATH", &libraries).env_remove("FLASHINFER_RS_LIB_DIR");
    succeeds(&cargo.output().expect("cargo"));
}

/// FlashInfer-Bench's own builder compiles the example's solution for the host, in Python; it runs from here, and gives right
/// numbers.
fn builder(release: &str) {
    let name = format!("what_upstream_s_builder_builds_runs_{release}");
    const BUILT: &str = "FLASHINFER_RS_TEST_BUILT";
    if !native::in_its_process(&name) {
        let cache = tempfile::tempdir().expect("a folder");
        let mut python = python(&interop::tvm_ffi(release), PACKAGES);
        let packages = interop::installed().join("packages");
        let path = std::env::var_os("PATH").unwrap_or_default();
        let paths = std::iter::once(packages.join("bin")).chain(std::env::split_paths(&path));
        python.env("PATH", std::env::join_paths(paths).expect("a path")).env("FIB_CACHE_PATH", cache.path());
        python.arg(script("build_solution.py")).arg(&packages);
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/dataset");
        python.arg(root.join("definitions/gemm/gemm_f32_n128_k256.json"));
        python.arg(root.join("solutions/flashinfer-rs/gemm/gemm_f32_n128_k256/gemm_f32_n128_k256_host.json"));
        let output = python.output().expect("python3 starts");
        assert!(output.status.success(), "{}", native::text(&output));
        let built = String::from_utf8(output.stdout).expect("a path");
        let built = PathBuf::from(built.lines().last().expect("the library's path"));
        assert!(built.starts_with(cache.path()) && built.is_file(), "{}", built.display());
        return native::isolated_with(&name, &[(BUILT, &built)], || {});
    }
    native::isolated(&name, || {
        let built = PathBuf::from(std::env::var_os(BUILT).expect(BUILT));
        FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
        // SAFETY: the example's own solution, without initializers.
        let module = unsafe { Module::open(&built) }.unwrap();
        assert_eq!(module.functions(), ["gemm_f32_n128_k256"]);
        gemm(&module);
    });
}

/// C = A·Bᵀ, compared with sums in double precision.
fn gemm(module: &Module) {
    const N: usize = 128;
    const K: usize = 256;
    let function = module.function("gemm_f32_n128_k256").unwrap();
    for rows in [0, 1, 5, 64] {
        // Numbers of either sign that are no pattern in either dimension.
        let values = |count: usize, seed: u64| -> Vec<f32> {
            let mut state = seed;
            let mut next = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 40) as f32 / (1 << 23) as f32 - 1.0
            };
            (0..count).map(|_| next()).collect()
        };
        let (a, b) = (values(rows * K, 1), values(N * K, 2));
        let tensor = |values: &[f32], rows: usize| Tensor::from_vec(values.to_vec(), &[rows as i64, K as i64]).unwrap();
        let c = Tensor::zeros(DType::F32, &[rows as i64, N as i64]).unwrap();
        let gemm = function.typed::<(&Tensor, &Tensor, &Tensor), ()>();
        // SAFETY: the solution checks what it takes, and nothing else uses the tensors.
        unsafe { gemm.call((&tensor(&a, rows), &tensor(&b, N), &c)) }.unwrap();
        for (at, found) in c.as_slice::<f32>().unwrap().iter().enumerate() {
            let (row, column) = (at / N, at % N);
            let products = (0..K).map(|k| f64::from(a[row * K + k]) * f64::from(b[column * K + k]));
            let expected: f64 = products.sum();
            assert!((f64::from(*found) - expected).abs() < 1e-4, "{row}, {column}: {found}, expected {expected}");
        }
    }
    // What does not fit is an exception in the solution, and an error here.
    let wrong = Tensor::zeros(DType::F32, &[2, 3]).unwrap();
    let gemm = function.typed::<(&Tensor, &Tensor, &Tensor), ()>();
    // SAFETY: as above.
    let error = unsafe { gemm.call((&wrong, &wrong, &wrong)) }.unwrap_err();
    assert!(error.to_string().contains("ValueError") && error.to_string().contains("A must be"), "{error}");
}
