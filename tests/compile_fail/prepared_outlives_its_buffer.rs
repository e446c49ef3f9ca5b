//! A prepared call keeps its tensors borrowed.
use flashinfer_rs::kernels::norm::NormOptions;
use flashinfer_rs::{Prepared, Stream, TensorMut, TensorRef};

fn main() {
    let (input, weight) = ([1f32; 4], [1f32; 4]);
    let mut out = [0f32; 4];
    let prepared = Prepared::rmsnorm(
        TensorMut::from_slice(&mut out, &[1, 4]).unwrap(),
        TensorRef::from_slice(&input, &[1, 4]).unwrap(),
        TensorRef::from_slice(&weight, &[4]).unwrap(),
        &NormOptions::default(),
    )
    .unwrap();
    out[0] = 1.0;
    prepared.launch(Stream::NULL).unwrap();
}
