//! Only types that kernels know are elements.
use flashinfer_rs::TensorRef;

fn main() {
    let _ = TensorRef::from_slice(&["text"], &[1]);
}
