//! Raw device pointers are for unsafe code.
use flashinfer_rs::{GemmaRmsNormParams, gemma_rmsnorm};

fn call(params: &GemmaRmsNormParams) {
    gemma_rmsnorm(params).unwrap();
}

fn main() {}
