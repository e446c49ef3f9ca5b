//! Nor its memory on a GPU.
use flashinfer_rs::TensorRef;
use flashinfer_rs::cudarc::driver::{CudaSlice, CudaStream};

fn dangling(stream: &CudaStream, buffer: CudaSlice<f32>) -> TensorRef<'_> {
    TensorRef::from_cudarc(stream, &buffer, &[4]).unwrap()
}

fn main() {}
