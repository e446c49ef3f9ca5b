//! The norms of 32 layers, captured once and replayed for every token. `cargo run --example 04_graph --features cudarc`

use std::sync::Arc;

use cudarc::driver::CudaContext;
use flashinfer_rs::kernels::norm::{NormOptions, fused_add_rmsnorm, rmsnorm};
use flashinfer_rs::{FlashInferRuntime, LaunchGraph, RuntimeConfig};
use half::bf16;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if !FlashInferRuntime::initialize(RuntimeConfig::default())?.gpu_available() {
        return Err("this example needs a GPU".into());
    }
    let stream = CudaContext::new(0)?.new_stream()?;
    let (layers, shape, columns, count) = (32, [4, 4096], [4096], 4 * 4096);
    let weight = |_| stream.clone_htod(&vec![bf16::ONE; 4096]).map(Arc::new);
    let weights = (0..layers).map(weight).collect::<Result<Vec<_>, _>>()?;
    let buffer = || stream.alloc_zeros::<bf16>(count);

    // The graph owns what it writes; weights, which it only reads, may be shared.
    let buffers = (buffer()?, buffer()?, buffer()?, weights.clone());
    let mut graph = LaunchGraph::new(&stream, buffers)?;
    graph.capture(|s, (mut hidden, mut residual, mut out, weights)| {
        let options = NormOptions::default();
        // Between two of these a decoder has its attention and its MLP.
        for weight in &weights {
            let (mut hidden, mut residual) = (hidden.write(&shape)?, residual.write(&shape)?);
            fused_add_rmsnorm(&mut hidden, &mut residual, &weight.read(&columns)?, &options, s)?;
        }
        rmsnorm(&mut out.write(&shape)?, &residual.read(&shape)?, &weights[0].read(&columns)?, &options, s)
    })?;
    println!("{} kernels in one launch", graph.nodes());

    for token in 1..=3 {
        let embedding: Vec<_> = (0..count).map(|i| bf16::from_f32((i as f32 / token as f32).sin())).collect();
        let (mut hidden, mut residual, ..) = graph.buffers()?;
        stream.memcpy_htod(&embedding, &mut hidden)?;
        stream.memset_zeros(&mut residual)?;
        graph.launch()?;
        println!("token {token}: {:.3?} …", &stream.clone_dtoh(&graph.buffers()?.2)?[..4]);
    }
    Ok(())
}
