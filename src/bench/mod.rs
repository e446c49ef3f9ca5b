//! FlashInfer-Bench: definitions of kernels, solutions of them, workloads and traces, without Python.
//!
//! A [`Definition`] says what is computed, a [`Solution`] how, a [`Workload`] with what, and a [`Trace`] what came of it; a
//! [`Dataset`] is a folder of all four. There are two [dialects](Dialect) of these files, FlashInfer-Bench's and FlashInfer's own,
//! and one reader for both. What upstream's Python models accept is read, and what is written they accept.
//!
//! ```
//! use flashinfer_rs::bench::{Axes, Definition, Dialect, InputOptions, Named, Trial, Workload};
//! use flashinfer_rs::bench::{HostTensor, Input, Status, Tolerance, judge};
//!
//! let definition = Definition::from_json(
//!     r#"{
//!     "name": "double_n4", "op_type": "elementwise",
//!     "axes": {"batch": {"type": "var"}, "n": {"type": "const", "value": 4}},
//!     "inputs": {"x": {"shape": ["batch", "n"], "dtype": "float32"}},
//!     "outputs": {"y": {"shape": ["batch", "n"], "dtype": "float32"}},
//!     "constraints": ["batch % 2 == 0"],
//!     "reference": "def run(x):\n    return 2 * x"
//! }"#,
//! )?;
//! definition.validate(Dialect::FlashInferBench)?;
//!
//! let workload = Workload { axes: Axes::from([("batch".to_owned(), 2)]), inputs: Named::new(), uuid: "one".to_owned() };
//! let inputs = workload.make_inputs(&definition, ".", &InputOptions::default())?;
//! let Some(Input::Tensor(x)) = inputs.get("x") else { unreachable!() };
//!
//! // What a kernel and its reference would give.
//! let doubled: Vec<f64> = (0..x.slots()).map(|i| 2.0 * f64::from(x.float(i))).collect();
//! let y = HostTensor::from_f64(x.dtype().clone(), x.shape(), &doubled)?;
//! let trial = Trial { outputs: &[y.clone()], reference: &[y] };
//! assert_eq!(judge(&definition, &[trial], &Tolerance::of(&definition))?.status, Status::Passed);
//! # Ok::<(), flashinfer_rs::FlashInferError>(())
//! ```
//!
//! # This crate's own kernels
//! A [`KernelCall`] is a call of one of them, and [makes](KernelCall::definition) its definition. With the environment variable
//! `FLASHINFER_RS_TRACE_DUMP=DIR` each kernel that a program calls leaves its definition in that folder, once for each name.
//!
//! # Calling kernels
//! A [`Kernel`] is a function that implements a definition: of a folder that somebody hands out ([`DistributedKernel`]), of a
//! module, one that this crate [vendors](Kernel::vendored), or a Rust closure. [Bound](Kernel::bind) to its definition, it is called
//! with tensors that are compared with it first. A [`Runner`] runs a workload: it makes the inputs, calls the kernel and a
//! reference, compares, times, and answers the trace. A [`Dispatcher`] calls the kernel that a dataset's traces know as the best.
//!
//! ```no_run
//! use flashinfer_rs::bench::{Axis, DataType, Definition, Kernel, Named, TensorSpec};
//! use flashinfer_rs::object::{Func, HostAllocator, IntoAny, Tensor};
//! use flashinfer_rs::{FlashInferRuntime, RuntimeConfig, Stream};
//!
//! # fn main() -> flashinfer_rs::Result<()> {
//! FlashInferRuntime::initialize(RuntimeConfig::default())?;
//! let mut definition = Definition::new("double", "elementwise");
//! definition.axes = Named::from([("n", Axis::variable())]);
//! definition.inputs = Named::from([("x", TensorSpec::tensor(&["n"], DataType::Float32))]);
//! definition.outputs = Named::from([("y", TensorSpec::tensor(&["n"], DataType::Float32))]);
//!
//! // A closure in the place of a function of a module, which returns its output.
//! let double = Func::new(|args| {
//!     let x: Tensor = args[0].to()?;
//!     let doubled: Vec<f32> = x.as_slice::<f32>()?.iter().map(|x| 2.0 * x).collect();
//!     Tensor::from_vec(doubled, x.shape())?.into_any()
//! })?;
//! let kernel = Kernel::new(double.named("double"), false);
//! let bound = kernel.bind(&definition)?;
//! let x = Tensor::from_vec(vec![1f32, 2.0, 3.0], &[3])?;
//! // SAFETY: the closure is sound with what fits the definition.
//! let outputs = unsafe { bound.call_returning(&[(&x).into()], &HostAllocator, Stream::NULL) }?;
//! assert_eq!(outputs[0].as_slice::<f32>()?, [2.0, 4.0, 6.0]);
//! # Ok(())
//! # }
//! ```
//!
//! # Hostile files
//! A dataset is other people's data. Sizes, depths and counts are bounded; a name that occurs twice in an object is refused; a
//! path cannot lead out of the dataset; a pointer of Git LFS in a file's place is told from the file. An error is a
//! [`DataError`] with the file, the place in it, what was found, what was expected, and what to do.
//!
//! # Where this is stricter than upstream
//! Upstream takes the last of two values of one name, reads `true` and numbers in quotation marks as sizes, follows absolute paths
//! and `..` to safetensors files, lets a workload give a scalar for a tensor, does not compare constant axes with inputs, and
//! evaluates no constraint.

mod apply;
mod argument;
mod constraint;
mod dataset;
mod definition;
mod dispatch;
mod distributed;
mod from_row;
mod inputs;
mod judge;
mod kernel;
mod metadata;
mod place;
mod random;
mod run;
mod solution;
mod trace;
mod vendored;

use crate::data::{dtype, error, json, named, safetensors, tensor};

pub use apply::{ApplyConfig, ApplyTable, apply};
pub use argument::{Argument, Destination};
pub use constraint::{Constraint, Verdict};
pub use dataset::{Dataset, TraceLayout};
pub(crate) use definition::Kept;
pub use definition::{Axes, Axis, Definition, TensorSpec};
pub use dispatch::Dispatcher;
pub use distributed::DistributedKernel;
pub use dtype::DataType;
pub use error::DataError;
pub use from_row::KernelCall;
pub(crate) use from_row::Key;
pub use inputs::{Input, InputOptions};
pub use json::{Json, MAX_BYTES, MAX_DEPTH, MAX_VALUES};
pub use judge::{BenchmarkConfig, Judgement, Timing, Tolerance, Trial, check_solution, judge, judge_sampling};
pub use kernel::{BoundKernel, Kernel};
pub use named::Named;
pub use run::{Reference, Runner};
pub use safetensors::{Safetensors, write_safetensors};
pub use solution::{Binding, BuildSpec, HashRule, Language, Solution, SourceFile};
pub use tensor::HostTensor;
pub use trace::{
    Correctness, Environment, Evaluation, InputSpec, Performance, Scalar, Status, Trace, Workload, timestamp,
};

/// Whose rules a file follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Dialect {
    /// FlashInfer-Bench's, of the public dataset.
    FlashInferBench,
    /// FlashInfer's own, of its `fi_trace` and `trace_apply`: more element types and languages, optional inputs, outputs that are
    /// inputs too, and solutions that return their outputs where they do not say otherwise.
    FlashInfer,
}
