//! The real norm.so over a CUDA runtime whose launches fail: what each launcher answers is what its row says, and every call
//! is an error. A kernel whose row said too much of its launcher would answer that all is well.
#![cfg(feature = "norm")]

#[path = "support/native.rs"]
mod native;

use std::ffi::c_void;
use std::fs;

use flashinfer_rs::contract::Reports;
use flashinfer_rs::kernels::norm::{
    NormOptions, fused_add_rmsnorm, fused_add_rmsnorm_quant, gemma_fused_add_rmsnorm, gemma_rmsnorm, layernorm,
    rmsnorm, rmsnorm_quant,
};
use flashinfer_rs::kernels::rows;
use flashinfer_rs::{
    DType, Device, FlashInferError, FlashInferRuntime, Result, RuntimeConfig, Stream, TensorMut, TensorRef,
};
use libloading::os::unix::Library;

const GPU: Device = Device::Cuda(0);

fn read(address: usize, dtype: DType, shape: &[i64]) -> TensorRef<'static> {
    // SAFETY: no kernel runs, so nothing is read.
    unsafe { TensorRef::from_raw(address as *const c_void, GPU, dtype, shape, None) }.unwrap()
}

fn write(address: usize, dtype: DType, shape: &[i64]) -> TensorMut<'static> {
    // SAFETY: no kernel runs, so nothing is written.
    unsafe { TensorMut::from_raw(address as *mut c_void, GPU, dtype, shape, None) }.unwrap()
}

/// Every kernel of the library by its row's name.
fn every_norm(mut with: impl FnMut(&str, &mut dyn FnMut() -> Result<()>)) {
    let (options, s) = (NormOptions::default(), Stream::NULL);
    let shape = [4, 64];
    let (mut a, mut b) = (write(0x1000, DType::BF16, &shape), write(0x2000, DType::BF16, &shape));
    let (w, i) = (read(0x3000, DType::BF16, &[64]), read(0x4000, DType::BF16, &shape));
    let (gamma, beta) = (read(0x5000, DType::F32, &[64]), read(0x6000, DType::F32, &[64]));
    let mut e = write(0x7000, DType::F8E4M3, &shape);
    let (mut heads, per_head) = (write(0x8000, DType::BF16, &[4, 2, 64]), read(0x9000, DType::BF16, &[4, 2, 64]));
    with("rmsnorm", &mut || rmsnorm(&mut a, &i, &w, &options, s));
    with("rmsnorm of heads", &mut || rmsnorm(&mut heads, &per_head, &w, &options, s));
    with("gemma_rmsnorm", &mut || gemma_rmsnorm(&mut a, &i, &w, &options, s));
    with("fused_add_rmsnorm", &mut || fused_add_rmsnorm(&mut a, &mut b, &w, &options, s));
    with("gemma_fused_add_rmsnorm", &mut || gemma_fused_add_rmsnorm(&mut a, &mut b, &w, &options, s));
    with("rmsnorm_quant", &mut || rmsnorm_quant(&mut e, &i, &w, 0.5, &options, s));
    with("fused_add_rmsnorm_quant", &mut || fused_add_rmsnorm_quant(&mut e, &i, &mut b, &w, 0.5, &options, s));
    with("layernorm", &mut || layernorm(&mut a, &i, &gamma, &beta, 1e-6, s));
}

#[test]
fn every_norm_tells_of_a_launch_that_fails() {
    native::isolated("every_norm_tells_of_a_launch_that_fails", || {
        let folder = tempfile::tempdir().unwrap();
        native::stand_in_for_the_driver();
        let cudart = native::compile("failing_cudart.c", "libcudart.so.13", &[], folder.path());
        native::load(&cudart, true);
        for library in ["libtvm_ffi.so", "norm.so"] {
            fs::copy(native::vendored_libraries().join(library), folder.path().join(library)).unwrap();
        }
        // SAFETY: the vendored libraries, over the test's own.
        let config = unsafe { RuntimeConfig::default().lib_dir(folder.path()).without_verification() };
        FlashInferRuntime::initialize(config).unwrap();
        // SAFETY: it is loaded already.
        let cudart = unsafe { Library::new(&cudart) }.unwrap();
        // SAFETY: the fixture's variables, of this type, that nothing else uses meanwhile.
        let variable = |name: &str| unsafe { *cudart.get::<*mut i32>(name.as_bytes()).unwrap() };
        let mut called = Vec::new();
        every_norm(|name, call| {
            let row = rows().into_iter().find(|row| row.kernel == name).expect("a row of this name");
            // SAFETY: as above.
            let launches = || unsafe { *variable("launches") };
            let before = launches();
            let error = call().expect_err(name);
            assert!(launches() > before, "{name} launched nothing");
            match (row.reports, &error) {
                (Reports::Nothing, FlashInferError::Cuda { code: 209, .. }) => {}
                (Reports::Status | Reports::LastError, FlashInferError::TvmFfiCall { .. }) => {}
                _ => panic!("{name}: {error}"),
            }
            // What another call left is nobody's fault here.
            // SAFETY: as above; the fixture's function, of this type.
            unsafe {
                *variable("launch_fails_with") = 0;
                cudart.get::<unsafe extern "C" fn() -> i32>(b"cudaGetLastError").unwrap()();
            }
            call().unwrap_or_else(|error| panic!("{name}: {error}"));
            // SAFETY: as above.
            unsafe { *variable("launch_fails_with") = 209 };
            called.push(row.kernel);
        });
        let all: Vec<_> = rows().into_iter().filter(|row| row.library == "norm.so").map(|row| row.kernel).collect();
        assert_eq!(called, all, "every kernel of the library is called here");
    });
}
