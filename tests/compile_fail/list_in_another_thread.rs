//! A list may change under whoever reads it, so that it stays in its thread.
use flashinfer_rs::object::List;

fn sent<T: Send>() {}

fn main() {
    sent::<List>();
}
