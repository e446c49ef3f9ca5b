//! So does one on a GPU.
use flashinfer_rs::cudarc::driver::{CudaSlice, CudaStream};
use flashinfer_rs::{TensorMut, TensorRef};

fn both(stream: &CudaStream, buffer: &mut CudaSlice<f32>) {
    let out = TensorMut::from_cudarc(stream, buffer, &[4]).unwrap();
    let input = TensorRef::from_cudarc(stream, buffer, &[4]).unwrap();
    drop((out, input));
}

fn main() {}
