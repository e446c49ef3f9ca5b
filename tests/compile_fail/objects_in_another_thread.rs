//! A list may change under whoever reads it, so that values, which may be lists, stay in their thread.
use flashinfer_rs::object::{Any, List};

fn sent<T: Send>() {}

fn main() {
    sent::<Any>();
    sent::<List>();
}
