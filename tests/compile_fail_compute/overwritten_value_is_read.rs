//! What an operation overwrites it takes: reading it afterwards does not compile.
use flashinfer_rs::DType;
use flashinfer_rs::compute::{Dim, GraphBuilder, Pad};

fn main() -> flashinfer_rs::Result<()> {
    let mut graph = GraphBuilder::new("graph", 8);
    let x = graph.input("x", DType::BF16, [Dim::BATCH, Dim::fixed(64)], Pad::Value(0))?;
    let norm = graph.weight("norm", DType::BF16, [Dim::fixed(64)])?;
    let (hidden, residual) = (graph.copy(&x, DType::BF16)?, graph.copy(&x, DType::BF16)?);
    let (normed, residual) = graph.fused_add_rmsnorm(hidden, residual, &norm, 1e-6)?;
    graph.add(normed, &hidden)?;
    graph.output("residual", residual)
}
