//! A tensor does not outlive its memory.
use flashinfer_rs::TensorRef;

fn dangling() -> TensorRef<'static> {
    let values = vec![1f32; 4];
    TensorRef::from_slice(&values, &[4]).unwrap()
}

fn main() {
    dangling();
}
