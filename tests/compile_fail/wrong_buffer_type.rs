//! The bytes of an 8-bit tensor are bytes.
use flashinfer_rs::cudarc::driver::{CudaSlice, CudaStream};
use flashinfer_rs::{DType, TensorMut};

fn call(stream: &CudaStream, buffer: &mut CudaSlice<f32>) {
    let _ = TensorMut::from_cudarc_bytes(stream, buffer, DType::F8E4M3, &[4]);
}

fn main() {}
