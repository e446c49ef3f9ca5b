//! A driver without a GPU that knows which accesses of memory nothing orders (`fixtures/ordering`), for tests that run in a
//! process of their own.
#![allow(dead_code, reason = "each test uses its own part")]

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ffi::{CStr, c_char, c_int, c_uint};
use std::fs;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys::CUcontext;
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DeviceRepr, ValidAsZeroBits};
use flashinfer_rs::attention::{AttentionSpec, Backend, XqaDecode};
use flashinfer_rs::{DType, FlashInferError, FlashInferRuntime, RuntimeConfig};
use libloading::os::unix::Library;

use crate::native;

/// Streams, events, buffers, graphs and executables that are there.
pub type Live = [c_int; 5];

/// The stand-in, and what went wrong so far.
pub struct Driver {
    driver: Library,
    norm: Library,
    failures: RefCell<Vec<String>>,
}

/// Runs a test's body over the stand-ins, which the dynamic linker finds first: a machine with a GPU has others. Everything
/// that the body finds is told at its end, so that one failure hides no other.
pub fn with_driver(name: &str, body: impl FnOnce(&Driver)) {
    const FOLDER: &str = "LD_LIBRARY_PATH";
    let folder = tempfile::tempdir().unwrap();
    // The process that is started finds what this one compiled.
    if std::env::var_os(native::MARK).is_none() {
        compile(folder.path());
    }
    native::isolated_with(name, &[(FOLDER, folder.path())], || {
        let driver = Driver::load(&PathBuf::from(std::env::var_os(FOLDER).unwrap()));
        body(&driver);
        let failures = driver.failures.borrow();
        assert!(failures.is_empty(), "{} found:\n{}", failures.len(), failures.join("\n"));
    });
}

fn compile(folder: &Path) {
    let here = format!("-L{}", folder.display());
    let over_the_driver = [&*here, "-l:libcuda.so.1"];
    native::compile("ordering/driver.c", "libcuda.so.1", &["-pthread"], folder);
    native::compile("ordering/runtime.c", "libcudart.so.13", &over_the_driver, folder);
    native::compile("ordering/cublaslt.c", "libcublasLt.so.13", &over_the_driver, folder);
    let kernels = native::compile("ordering/kernels.c", "norm.so", &over_the_driver, folder);
    for library in ["gdn_prefill_sm90", "sampling", "rope", "page", "silu_and_mul", &xqa()] {
        fs::copy(&kernels, folder.join(format!("{library}.so"))).unwrap();
    }
    for backend in [Backend::CudaCores, Backend::Fa2, Backend::Fa3] {
        fs::copy(&kernels, folder.join(planned(backend))).unwrap();
    }
    std::os::unix::fs::symlink("libcuda.so.1", folder.join("libcuda.so")).unwrap();
    let tvm_ffi = "libtvm_ffi.so";
    fs::copy(native::vendored_libraries().join(tvm_ffi), folder.join(tvm_ffi)).unwrap();
}

/// Decoding with two heads of queries to one of keys, over pages of 16 tokens.
pub fn decode_spec() -> AttentionSpec {
    AttentionSpec::decode(DType::BF16, (2, 1), 128, 16).build().unwrap()
}

/// The name of XQA's module for that.
fn xqa() -> String {
    XqaDecode::module_of(&decode_spec()).unwrap()
}

/// The library of attention that is planned, for two heads of queries to one of keys.
pub fn planned(backend: Backend) -> String {
    let spec = match backend {
        Backend::CudaCores => decode_spec(),
        _ => AttentionSpec::paged(DType::BF16, (2, 1), 128, 16).build().unwrap(),
    };
    format!("{}.so", spec.module(backend))
}

/// One of the libraries, whose variables a test sets: each has its own.
pub struct Module(Library);

impl Module {
    /// Of this file name, which the runtime has loaded.
    pub fn open(name: &str) -> Self {
        let folder = PathBuf::from(std::env::var_os("LD_LIBRARY_PATH").unwrap());
        // SAFETY: the test's own library, which has no initializer.
        Self(unsafe { Library::new(folder.join(name)) }.unwrap())
    }

    pub fn get(&self, variable: &str) -> c_int {
        // SAFETY: the fixture's variables are of this type.
        unsafe { **self.0.get::<*const c_int>(variable.as_bytes()).unwrap() }
    }

    pub fn set(&self, variable: &str, value: c_int) {
        Driver::set(&self.0, variable, value);
    }
}

impl Driver {
    fn load(folder: &Path) -> Self {
        // SAFETY: the test's own libraries, which have no initializers; the first is also what cudarc will open.
        let open = |name| unsafe { Library::new(folder.join(name)) }.unwrap();
        let driver = open("libcuda.so.1");
        // SAFETY: the test's own libraries, and the vendored one.
        let config = unsafe { RuntimeConfig::default().lib_dir(folder).without_verification() };
        FlashInferRuntime::initialize(config).unwrap().module("norm.so").unwrap();
        Self { driver, norm: open("norm.so"), failures: RefCell::default() }
    }

    fn function<T: Copy>(&self, symbol: &str) -> T {
        // SAFETY: the fixture's functions, of these types.
        unsafe { *self.driver.get::<T>(symbol.as_bytes()).unwrap() }
    }

    fn variable<T: Copy>(&self, symbol: &str) -> T {
        // SAFETY: the fixture's variables, of these types, that nothing writes meanwhile.
        unsafe { **self.driver.get::<*const T>(symbol.as_bytes()).unwrap() }
    }

    fn set(library: &Library, symbol: &str, value: c_int) {
        // SAFETY: as for `variable`.
        unsafe { **library.get::<*mut c_int>(symbol.as_bytes()).unwrap() = value };
    }

    /// What nothing orders, so far; then it is forgotten.
    pub fn violations(&self) -> Vec<String> {
        let count: extern "C" fn() -> c_int = self.function("ordering_violations");
        let text: extern "C" fn(c_int) -> *const c_char = self.function("ordering_violation");
        let forget: extern "C" fn() = self.function("ordering_forget");
        // SAFETY: a C string that stays where it is until others are written, behind `forget`.
        let text = |i| unsafe { CStr::from_ptr(text(i)) }.to_str().unwrap().to_owned();
        let all = (0..count()).map(text).collect();
        forget();
        all
    }

    pub fn violations_of(&self, body: impl FnOnce()) -> Vec<String> {
        self.violations();
        body();
        self.violations()
    }

    /// Remembers what went wrong, for the end of the test.
    pub fn fail(&self, case: &str, what: impl std::fmt::Display) {
        self.failures.borrow_mut().push(format!("{case}: {what}"));
    }

    /// That everything in a case is ordered.
    pub fn ordered(&self, case: &str, body: impl FnOnce()) {
        self.violations_of(body).iter().for_each(|violation| self.fail(case, violation));
    }

    /// That a case has no violation of a kind that the same done with cudarc alone has not. There must be some: where
    /// cudarc has none any more, the case is to be `ordered`.
    pub fn no_worse_than_cudarc(&self, case: &str, ours: impl FnOnce(), cudarc: impl FnOnce()) {
        let kinds = |violations: Vec<String>| -> BTreeSet<String> {
            violations.iter().map(|violation| violation.replace(|c: char| c.is_ascii_digit(), "#")).collect()
        };
        let (ours, cudarc) = (kinds(self.violations_of(ours)), kinds(self.violations_of(cudarc)));
        if cudarc.is_empty() {
            self.fail(case, "cudarc orders this now");
        }
        ours.difference(&cudarc).for_each(|violation| self.fail(case, violation));
    }

    /// That a call is refused for one of its arguments, and nothing was queued.
    pub fn refused<T>(&self, case: &str, call: impl FnOnce() -> flashinfer_rs::Result<T>) {
        let before = self.queued();
        match call() {
            Err(FlashInferError::InvalidArgument { .. }) => {}
            Err(other) => self.fail(case, format_args!("not InvalidArgument: {other}")),
            Ok(_) => self.fail(case, "was not refused"),
        }
        if self.queued() != before {
            self.fail(case, "something was queued");
        }
        self.violations().iter().for_each(|violation| self.fail(case, violation));
    }

    /// A context of device 0 beside the primary one. It is current afterwards.
    pub fn another_context(&self) -> Arc<CudaContext> {
        type Create = unsafe extern "C" fn(*mut CUcontext, c_uint, c_int) -> c_int;
        let mut made = ptr::null_mut();
        // SAFETY: one handle is written, through a pointer that is valid for the call.
        assert_eq!(unsafe { self.function::<Create>("cuCtxCreate_v2")(&mut made, 0, 0) }, 0);
        // SAFETY: made for this device, and given up to cudarc.
        unsafe { CudaContext::from_raw_context(0, 0, made) }.unwrap()
    }

    /// Kernels and launches of graphs that were queued.
    pub fn queued(&self) -> [c_int; 2] {
        [self.variable("ordering_kernels"), self.variable("ordering_graph_launches")]
    }

    pub fn live(&self) -> Live {
        self.variable("ordering_live")
    }

    /// How often a device's primary context is retained.
    pub fn retains(&self, device: c_int) -> c_int {
        self.function::<extern "C" fn(c_int) -> c_int>("ordering_retains")(device)
    }

    /// The number of this thread's current context, 0 for none.
    pub fn current(&self) -> c_int {
        self.function::<extern "C" fn() -> c_int>("ordering_current")()
    }

    /// The next norm fails before it is launched.
    pub fn fail_next(&self) {
        Self::set(&self.norm, "fail_next", 1);
    }

    /// The next norm launches so many kernels more than it should, or fewer.
    pub fn launch_more(&self, kernels: c_int) {
        Self::set(&self.norm, "more_of_next", kernels);
    }

    /// Norms start before the kernel ahead of them has ended, whether they were asked to or not.
    pub fn always_early(&self, early: bool) {
        Self::set(&self.norm, "always_early", early.into());
    }

    /// XQA starts before the kernel ahead of it has ended, which it must never.
    pub fn early_attention(&self, early: bool) {
        Self::set(&self.driver, "ordering_early_attention", early.into());
    }

    /// The next copies between the host and a GPU fail.
    pub fn fail_copies(&self, count: c_int) {
        Self::set(&self.driver, "ordering_failing_copies", count);
    }

    /// The next events are not recorded.
    pub fn fail_records(&self, count: c_int) {
        Self::set(&self.driver, "ordering_failing_records", count);
    }

    /// The next waits for streams fail.
    pub fn fail_waits(&self, count: c_int) {
        Self::set(&self.driver, "ordering_failing_waits", count);
    }

    /// GPUs have so many multiprocessors; before the runtime has asked.
    pub fn multiprocessors(&self, count: c_int) {
        Self::set(&self.driver, "ordering_multiprocessors", count);
    }

    /// Nothing of these fails any more.
    pub fn fail_nothing(&self) {
        self.fail_copies(0);
        self.fail_records(0);
        self.fail_waits(0);
    }

    /// From now on every context is lost.
    pub fn lose(&self) {
        Self::set(&self.driver, "ordering_lost", 1);
    }

    /// Memory from pools, in the order of a stream, or not; for contexts that are made from now on.
    pub fn pools(&self, on: bool) {
        Self::set(&self.driver, "ordering_pools", on.into());
    }
}

/// A buffer that was filled on its stream.
pub fn zeros<T: DeviceRepr + ValidAsZeroBits>(stream: &Arc<CudaStream>, len: usize) -> CudaSlice<T> {
    stream.alloc_zeros(len).unwrap()
}
