//! A tensor stays in its thread: streams and current devices belong to threads.
use flashinfer_rs::TensorRef;

fn main() {
    let values = [1f32; 4];
    let tensor = TensorRef::from_slice(&values, &[4]).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || drop(tensor));
    });
}
