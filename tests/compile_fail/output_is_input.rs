//! A tensor that is written borrows its buffer alone.
use flashinfer_rs::kernels::norm::{NormOptions, rmsnorm};
use flashinfer_rs::{Stream, TensorMut, TensorRef};

fn main() {
    let (mut values, weight) = ([1f32; 4], [1f32; 4]);
    let mut out = TensorMut::from_slice(&mut values, &[1, 4]).unwrap();
    let input = TensorRef::from_slice(&values, &[1, 4]).unwrap();
    let weight = TensorRef::from_slice(&weight, &[4]).unwrap();
    rmsnorm(&mut out, &input, &weight, &NormOptions::default(), Stream::NULL).unwrap();
}
