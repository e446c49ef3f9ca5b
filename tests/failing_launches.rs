//! The real norm.so over a CUDA runtime whose launches fail: what each launcher answers is what its row says, and every call
//! is an error. A kernel whose row said too much of its launcher would answer that all is well. Other families do the same in
//! their own tests.
#![cfg(feature = "norm")]

#[path = "support/failing.rs"]
mod failing;
#[path = "support/native.rs"]
mod native;

use failing::Cuda;
use flashinfer_rs::kernels::norm::{
    NormOptions, fused_add_rmsnorm, fused_add_rmsnorm_quant, gemma_fused_add_rmsnorm, gemma_rmsnorm, layernorm,
    rmsnorm, rmsnorm_quant,
};
use flashinfer_rs::{DType, Result, Stream, TensorMut, TensorRef};

fn read(address: usize, dtype: DType, shape: &[i64]) -> TensorRef<'static> {
    failing::read(0, address, dtype, shape)
}

fn write(address: usize, dtype: DType, shape: &[i64]) -> TensorMut<'static> {
    failing::write(0, address, dtype, shape)
}

/// Every kernel of the library by its row's name.
fn every_norm(mut with: impl FnMut(&str, &mut dyn FnMut() -> Result<()>)) {
    let (options, s) = (NormOptions::default(), Stream::NULL);
    let shape = [4, 64];
    let (mut a, mut b) = (write(0x1000, DType::BF16, &shape), write(0x2000, DType::BF16, &shape));
    let (w, i) = (read(0x3000, DType::BF16, &[64]), read(0x4000, DType::BF16, &shape));
    let (gamma, beta) = (read(0x5000, DType::F32, &[64]), read(0x6000, DType::F32, &[64]));
    let mut e = write(0x7000, DType::F8E4M3, &shape);
    let (mut heads, per_head) = (write(0x8000, DType::BF16, &[4, 2, 64]), read(0x9000, DType::BF16, &[4, 2, 64]));
    with("rmsnorm", &mut || rmsnorm(&mut a, &i, &w, &options, s));
    with("rmsnorm of heads", &mut || rmsnorm(&mut heads, &per_head, &w, &options, s));
    with("gemma_rmsnorm", &mut || gemma_rmsnorm(&mut a, &i, &w, &options, s));
    with("fused_add_rmsnorm", &mut || fused_add_rmsnorm(&mut a, &mut b, &w, &options, s));
    with("gemma_fused_add_rmsnorm", &mut || gemma_fused_add_rmsnorm(&mut a, &mut b, &w, &options, s));
    with("rmsnorm_quant", &mut || rmsnorm_quant(&mut e, &i, &w, 0.5, &options, s));
    with("fused_add_rmsnorm_quant", &mut || fused_add_rmsnorm_quant(&mut e, &i, &mut b, &w, 0.5, &options, s));
    with("layernorm", &mut || layernorm(&mut a, &i, &gamma, &beta, 1e-6, s));
}

#[test]
fn every_norm_tells_of_a_launch_that_fails() {
    native::isolated("every_norm_tells_of_a_launch_that_fails", || {
        let cuda = Cuda::stand_in(&["norm.so"]);
        every_norm(|name, call| cuda.tells(name, call));
        cuda.assert_all_told(&["norm.so"]);
    });
}
