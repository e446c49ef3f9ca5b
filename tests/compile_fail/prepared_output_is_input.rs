//! A prepared call keeps no tensor, but each of its launches borrows them as a plain call does.
use flashinfer_rs::kernels::norm::{NormOptions, Rmsnorm};
use flashinfer_rs::{Prepared, Stream, TensorMut, TensorRef};

fn main() {
    let (mut values, weight) = ([1f32; 4], [1f32; 4]);
    let mut out = TensorMut::from_slice(&mut values, &[1, 4]).unwrap();
    let weight = TensorRef::from_slice(&weight, &[4]).unwrap();
    let prepared = Prepared::<Rmsnorm>::new(&out, &out.as_ref(), &weight, &NormOptions::default()).unwrap();
    prepared.launch(&mut out, &out.as_ref(), &weight, Stream::NULL).unwrap();
}
