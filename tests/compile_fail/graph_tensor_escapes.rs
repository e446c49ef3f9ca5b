//! A captured tensor is of no use, and may not be there, after the capture.
use flashinfer_rs::cudarc::driver::CudaSlice;
use flashinfer_rs::{LaunchGraph, TensorRef};

fn escape(graph: &mut LaunchGraph<CudaSlice<f32>>) {
    let mut kept: Option<TensorRef<'_>> = None;
    graph
        .capture(|_, buffer| {
            kept = Some(buffer.read(&[4])?);
            Ok(())
        })
        .unwrap();
    drop(kept);
}

fn main() {}
