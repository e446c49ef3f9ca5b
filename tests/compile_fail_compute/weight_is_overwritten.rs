//! A weight is no value: no operation overwrites it.
use flashinfer_rs::DType;
use flashinfer_rs::compute::{Dim, GraphBuilder, Pad};

fn main() -> flashinfer_rs::Result<()> {
    let mut graph = GraphBuilder::new("graph", 8);
    let x = graph.input("x", DType::BF16, [Dim::BATCH, Dim::fixed(64)], Pad::Value(0))?;
    let weight = graph.weight("weight", DType::BF16, [Dim::fixed(8), Dim::fixed(64)])?;
    graph.add(weight, &x)?;
    Ok(())
}
