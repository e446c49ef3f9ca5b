//! The memory that a graph was captured with stays in it.
use flashinfer_rs::LaunchGraph;
use flashinfer_rs::cudarc::driver::CudaSlice;

fn swap(graph: &mut LaunchGraph<(CudaSlice<f32>,)>, other: CudaSlice<f32>) {
    let (buffer,) = graph.buffers().unwrap();
    let _taken: CudaSlice<f32> = std::mem::replace(buffer, other);
}

fn main() {}
