//! The real kernel libraries over a CUDA runtime that launches nothing: what launchers answer where a launch fails, and what
//! they would have launched.
#![allow(dead_code, reason = "each test uses its own part")]

use std::cell::RefCell;
use std::collections::HashSet;
use std::ffi::{CStr, c_char, c_void};
use std::fs;

use flashinfer_rs::contract::Reports;
use flashinfer_rs::kernels::rows;
use flashinfer_rs::{DType, Device, FlashInferError, FlashInferRuntime, Result, RuntimeConfig, TensorMut, TensorRef};
use libloading::os::unix::Library;

use crate::native;

/// CUDA's runtime, as the tests' stand-in.
pub struct Cuda {
    library: Library,
    /// The kernels whose launches failed.
    told: RefCell<HashSet<&'static str>>,
    _folder: tempfile::TempDir,
}

impl Cuda {
    /// Loads the stand-in, of which launches fail, and initializes the runtime with the real libraries over it. Once per
    /// process.
    pub fn stand_in(libraries: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        native::stand_in_for_the_driver();
        let cudart = native::compile("failing_cudart.c", "libcudart.so.13", &[], folder.path());
        native::load(&cudart, true);
        for library in ["libtvm_ffi.so"].iter().chain(libraries) {
            fs::copy(native::vendored_libraries().join(library), folder.path().join(library)).unwrap();
        }
        // SAFETY: the vendored libraries, over the test's own.
        let config = unsafe { RuntimeConfig::default().lib_dir(folder.path()).without_verification() };
        FlashInferRuntime::initialize(config).unwrap();
        // SAFETY: it is loaded already.
        let library = unsafe { Library::new(&cudart) }.unwrap();
        Self { library, told: RefCell::default(), _folder: folder }
    }

    fn variable(&self, name: &str) -> *mut i32 {
        // SAFETY: the fixture's variables are of this type.
        unsafe { *self.library.get::<*mut i32>(name.as_bytes()).unwrap() }
    }

    /// A variable of the fixture's.
    pub fn get(&self, name: &str) -> i32 {
        // SAFETY: a variable of this type that nothing else uses meanwhile.
        unsafe { *self.variable(name) }
    }

    /// A text of the fixture's.
    pub fn text(&self, name: &str) -> String {
        // SAFETY: an array of this type, which ends with a zero byte, that nothing else uses meanwhile.
        let text =
            unsafe { CStr::from_ptr((*self.library.get::<*const [c_char; 64]>(name.as_bytes()).unwrap()).cast()) };
        text.to_string_lossy().into_owned()
    }

    /// An array of the fixture's.
    pub fn words(&self, name: &str) -> [u64; 16] {
        // SAFETY: an array of this type that nothing else uses meanwhile.
        unsafe { **self.library.get::<*const [u64; 16]>(name.as_bytes()).unwrap() }
    }

    /// Gives a variable of the fixture's another value.
    pub fn set(&self, name: &str, value: i32) {
        // SAFETY: as in `get`.
        unsafe { *self.variable(name) = value };
    }

    /// Forgets the thread's last error, as another library would.
    pub fn forget_the_last_error(&self) {
        // SAFETY: the fixture's function, of this type.
        unsafe { self.library.get::<unsafe extern "C" fn() -> i32>(b"cudaGetLastError").unwrap()() };
    }

    /// Leaves an error on this thread, as another library would.
    pub fn leave_an_error(&self, code: i32) {
        // SAFETY: the fixture's function, of this type.
        unsafe { self.library.get::<unsafe extern "C" fn(i32)>(b"leave_an_error").unwrap()(code) };
    }

    /// Makes a call whose launch fails, and again one whose launch does not: that each tells, in the way its row says.
    pub fn tells(&self, name: &str, call: &mut dyn FnMut() -> Result<()>) {
        let row = rows().into_iter().find(|row| row.kernel == name).expect("a row of this name");
        let before = self.get("launches");
        self.set("launch_fails_with", 209);
        let error = call().expect_err(name);
        assert!(self.get("launches") > before, "{name} launched nothing: {error}");
        match (row.reports, &error) {
            (Reports::Nothing, FlashInferError::Cuda { code: 209, .. }) => {}
            (Reports::Status | Reports::LastError, FlashInferError::TvmFfiCall { .. }) => {}
            _ => panic!("{name}: {error}"),
        }
        // What another call left is nobody's fault here.
        self.set("launch_fails_with", 0);
        self.forget_the_last_error();
        call().unwrap_or_else(|error| panic!("{name}: {error}"));
        self.told.borrow_mut().insert(row.kernel);
    }

    /// How many kernels told.
    pub fn told(&self) -> usize {
        self.told.borrow().len()
    }

    /// That every kernel of these libraries told.
    pub fn assert_all_told(&self, libraries: &[&str]) {
        let of_these = rows().into_iter().filter(|row| libraries.contains(&row.library)).map(|row| row.kernel);
        assert_eq!(*self.told.borrow(), of_these.collect(), "every kernel of the libraries is called here");
    }
}

/// A tensor that claims to be on a GPU, to be read.
pub fn read(device: u32, address: usize, dtype: DType, shape: &[i64]) -> TensorRef<'static> {
    // SAFETY: no kernel runs, so nothing is read.
    unsafe { TensorRef::from_raw(address as *const c_void, Device::Cuda(device), dtype, shape, None) }.unwrap()
}

/// A tensor that claims to be on a GPU, to be written.
pub fn write(device: u32, address: usize, dtype: DType, shape: &[i64]) -> TensorMut<'static> {
    // SAFETY: no kernel runs, so nothing is written.
    unsafe { TensorMut::from_raw(address as *mut c_void, Device::Cuda(device), dtype, shape, None) }.unwrap()
}
