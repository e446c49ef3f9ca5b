//! Calls of a gemma_rmsnorm that does nothing: what remains is the caller's own work.

use std::ffi::c_void;
use std::path::Path;

use flashinfer_rs::{
    DType, Device, FlashInferRuntime, Function, GemmaRmsNormParams, Result, RuntimeConfig, Stream, Tensor1DDesc,
    Tensor2DDesc, TensorMut, TensorRef,
};

pub const SHAPE: [i64; 2] = [1, 4096];
pub const DTYPE: DType = DType::BF16;
pub const DEVICE: Device = Device::Cuda(0);
const STREAM: *mut c_void = 0x10 as *mut c_void;

/// Addresses of nothing, since no memory is touched.
const OUT: *mut c_void = 0x1000 as *mut c_void;
pub const INPUT: *const c_void = 0x2000 as *const c_void;
const WEIGHT: *const c_void = 0x3000 as *const c_void;

/// The runtime with the libraries of this folder: benches/c/noop.c as `norm.so`, and a `libcudart.so.13` that counts a GPU.
pub fn initialize(folder: &Path) -> Result<&'static FlashInferRuntime> {
    // SAFETY: the folder's libraries were made for these calls.
    let config = unsafe { RuntimeConfig::default().lib_dir(folder).without_verification() };
    FlashInferRuntime::initialize(config)
}

pub fn function(runtime: &'static FlashInferRuntime) -> Result<Function> {
    runtime.module("norm.so")?.function("gemma_rmsnorm")
}

/// `out`, `input`, `weight`, of which the compiler knows nothing where they are used.
#[inline(never)]
pub fn tensors() -> Result<(TensorMut<'static>, TensorRef<'static>, TensorRef<'static>)> {
    // SAFETY: the function that is called touches no memory.
    let out = unsafe { TensorMut::from_raw(OUT, DEVICE, DTYPE, &SHAPE, None) }?;
    Ok((out, read(INPUT, &SHAPE)?, read(WEIGHT, &[SHAPE[1]])?))
}

/// A tensor that is only read.
#[inline]
pub fn read(address: *const c_void, shape: &[i64]) -> Result<TensorRef<'static>> {
    // SAFETY: as above.
    unsafe { TensorRef::from_raw(address, DEVICE, DTYPE, shape, None) }
}

pub fn stream() -> Stream<'static> {
    // SAFETY: nothing is launched on it.
    unsafe { Stream::from_raw(STREAM) }
}

pub fn params(eps: f64) -> GemmaRmsNormParams {
    let (rows, cols) = (SHAPE[0], SHAPE[1]);
    let matrix = |ptr| Tensor2DDesc { ptr, rows, cols, stride_row: cols, stride_col: 1, dtype: DTYPE, device_id: 0 };
    let weight = Tensor1DDesc { ptr: WEIGHT, len: cols, stride: 1, dtype: DTYPE, device_id: 0 };
    GemmaRmsNormParams::new(matrix(INPUT), weight, matrix(OUT), eps, STREAM)
}
