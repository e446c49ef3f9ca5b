//! Compute graphs: the steps of a model as data, checked when they are built, planned and proven before a GPU is touched.
//!
//! A [`GraphBuilder`] is given the model: weights, states, what a step is given, and operations on them. Each operation
//! checks its operands when it is added, by its shape rule and by the contract of the kernel that will serve it. What
//! an operation overwrites it takes by value, so that reading it afterwards does not compile:
//!
//! ```
//! use flashinfer_rs::DType;
//! use flashinfer_rs::compute::{Dim, GraphBuilder, Pad, Plan};
//!
//! let mut graph = GraphBuilder::new("two norms", 8);
//! let table = graph.weight("embedding", DType::BF16, [Dim::fixed(100), Dim::fixed(64)])?;
//! let norm = graph.weight("norm", DType::BF16, [Dim::fixed(64)])?;
//! let ids = graph.input("ids", DType::I32, [Dim::BATCH], Pad::Value(0))?;
//! let hidden = graph.embedding(&ids, &table, 1.0)?;
//! let normed = graph.rmsnorm(&hidden, &norm, 1e-6)?;
//! let sum = graph.add(normed, &hidden)?; // `normed` is gone: it was overwritten.
//! graph.output("sum", sum)?;
//! let graph = graph.finish()?;
//!
//! let plan = Plan::new(&graph, 4)?;
//! plan.verify(&graph)?;
//! assert!(plan.sizes().planned <= plan.sizes().naive);
//! # Ok::<(), flashinfer_rs::FlashInferError>(())
//! ```
//!
//! # The way of a model
//! - [`GraphBuilder`] gives [`Value`], [`Weight`], [`State`] and [`StepInput`], four types that cannot stand in for
//!   each other. Sizes are constant or so many for each row of the batch ([`Dim`]), so that one check serves every batch.
//! - [`fuse()`] rewrites the graph by named [rules](Rule), each with its precondition and with what it does to the numbers.
//! - [`Plan`] orders the nodes and gives each value its place in one arena, whose exact size is known before anything is
//!   allocated. [`Plan::verify`] proves the plan by an algorithm of its own.
//! - A [`Backend`] runs it. [`HostRun`] does so on the host, inside the planned arena, with memory that is free
//!   filled with NaN. With the feature `cudarc` `DeviceRun` does so on a GPU: node by node, or as one launch of what was
//!   captured for each bucket.
//! - [`Graph::dot`], [`Graph::json`] and [`Graph::markdown`] export it.
//! - [`StepBlock`] and [`Buckets`] say where a step's inputs lie, and what stands in rows that nobody asked for.
//!
//! # Errors
//! [`ComputeGraph`](crate::FlashInferError::ComputeGraph) with a [`GraphError`], from every function.

mod backend;
mod builder;
#[cfg(feature = "cudarc")]
mod device;
mod error;
mod export;
mod fuse;
mod graph;
mod host;
mod operation;
mod plan;
mod shape;
mod step;
mod verify;

#[cfg(test)]
mod tests;

pub use backend::Backend;
pub use builder::{GraphBuilder, Part, Readable, State, StepInput, Value, Weight};
#[cfg(feature = "cudarc")]
pub use device::{Arrived, AttentionKernel, AttentionKernels, CapturedStep, DeviceRun, EagerRun, NodeTime};
pub use error::{GraphError, GraphWarning};
pub use fuse::{Applied, Numerics, Rule, fuse};
pub use graph::{Access, Cost, Graph, Node, Origin, Target, Tensor};
pub use host::HostRun;
pub use operation::{Facts, OpKind, OperandFacts, Operation, PdlAfter, PdlBefore, Role, operations};
pub use plan::{Edge, Link, Plan, Schedule, Sizes, Span};
pub use shape::{Columns, Dim, Spec};
pub use step::{Buckets, Pad, PageAllocator, StepBlock};

/// Tensors on the host and in files, which weights are read from.
pub use crate::data::{
    dtype::DataType,
    safetensors::{Safetensors, write_safetensors},
    tensor::HostTensor,
};
