//! While the program has a view of its memory, a graph is not launched.
use flashinfer_rs::LaunchGraph;
use std::sync::Arc;

use flashinfer_rs::cudarc::driver::{CudaSlice, CudaStream};

fn launch(graph: &mut LaunchGraph<CudaSlice<f32>>, stream: &Arc<CudaStream>) {
    let mut view = graph.buffers().unwrap();
    graph.launch().unwrap();
    stream.memset_zeros(&mut view).unwrap();
}

fn main() {}
