//! RMSNorm on cudarc's buffers. `cargo run --example 01_norm --features cudarc`

use cudarc::driver::CudaContext;
use flashinfer_rs::kernels::norm::{NormOptions, rmsnorm};
use flashinfer_rs::{FlashInferRuntime, RuntimeConfig, Stream, TensorMut, TensorRef};
use half::bf16;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if !FlashInferRuntime::initialize(RuntimeConfig::default())?.gpu_available() {
        return Err("this example needs a GPU".into());
    }
    let stream = CudaContext::new(0)?.new_stream()?;
    let (rows, columns) = (4, 8);
    let input: Vec<bf16> = (0..rows * columns).map(|i| bf16::from_f32(i as f32)).collect();
    let input = stream.clone_htod(&input)?;
    let weight = stream.clone_htod(&vec![bf16::ONE; columns])?;
    let mut out = stream.alloc_zeros::<bf16>(rows * columns)?;

    let shape = [rows as i64, columns as i64];
    rmsnorm(
        &mut TensorMut::from_cudarc(&stream, &mut out, &shape)?,
        &TensorRef::from_cudarc(&stream, &input, &shape)?,
        &TensorRef::from_cudarc(&stream, &weight, &shape[1..])?,
        &NormOptions::default(),
        Stream::cudarc(&stream),
    )?;

    for row in stream.clone_dtoh(&out)?.chunks(columns) {
        println!("{row:.3?}");
    }
    Ok(())
}
