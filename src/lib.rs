//! FlashInfer's prebuilt GPU kernels from Rust: the build vendors the pinned wheels' shared objects, checked by digest;
//! the runtime loads them and calls their functions through TVM-FFI's C ABI. No Python, no C++ shim, no CUDA toolkit.
//!
//! ```no_run
//! # #[cfg(feature = "cudarc")]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use flashinfer_rs::cudarc::driver::CudaContext;
//! use flashinfer_rs::kernels::norm::{NormOptions, rmsnorm};
//! use flashinfer_rs::{FlashInferRuntime, RuntimeConfig, Stream, TensorMut, TensorRef};
//! use half::bf16;
//!
//! // Once per process.
//! FlashInferRuntime::initialize(RuntimeConfig::default())?;
//!
//! let stream = CudaContext::new(0)?.new_stream()?;
//! let input = stream.clone_htod(&vec![bf16::ONE; 4 * 4096])?;
//! let weight = stream.clone_htod(&vec![bf16::ONE; 4096])?;
//! let mut out = stream.alloc_zeros::<bf16>(4 * 4096)?;
//! rmsnorm(
//!     &mut TensorMut::from_cudarc(&stream, &mut out, &[4, 4096])?,
//!     &TensorRef::from_cudarc(&stream, &input, &[4, 4096])?,
//!     &TensorRef::from_cudarc(&stream, &weight, &[4096])?,
//!     &NormOptions::default(),
//!     Stream::cudarc(&stream),
//! )?;
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "cudarc"))]
//! # fn main() {}
//! ```
//!
//! # What is here
//! - [`FlashInferRuntime`]: finds, checks and loads the libraries, once per process.
//! - The kernels, a module for each family, on [`TensorRef`] and [`TensorMut`], over cudarc's buffers or host slices. What a
//!   decoder needs beside its matrix products and attention: [`norm`](kernels::norm), [`activation`](kernels::activation),
//!   [`rope`](kernels::rope), [`page`](kernels::page) and [`sampling`](kernels::sampling). And
//!   [`gdn`](kernels::gdn), prefill of the gated delta rule; [`cascade`](kernels::cascade), merging the states of attention;
//!   [`topk`](kernels::topk) and [`quantization`](kernels::quantization). Where a safe function could not be sound there is an
//!   `unsafe` one that says why, and mostly a safe form beside it. Tensors on the host are computed by the
//!   [reference](mod@reference), in f64.
//! - [`attention`]: prefill, decode and latent attention over paged caches and over keys one after the other, planned once for a
//!   batch and run for every layer.
//! - Indices that steer kernels, made of host data that is checked: [`PageTable`] and its [`Tokens`], [`Positions`], and with the
//!   feature `cudarc` `OnDevice`, such data with its copy on a GPU. [`CosSinCache`]: the angles of rotary embeddings.
//! - The flat functions, [`gemma_rmsnorm`] and [`gdn_prefill_sm90`], on raw device pointers; with the feature `cudarc`
//!   `gemma_rmsnorm_cudarc` and `gdn_prefill_sm90_cudarc_with_options`.
//! - For many small launches: [`FlashInferRuntime::on`], which sets a stream once for a series of calls; [`Prepared`], a call
//!   that is checked once; and with the feature `cudarc` `LaunchGraph`, a series that is captured into a CUDA
//!   graph and replayed with one launch, and `GraphSet`, several of them over one set of buffers.
//! - [`log`]: logs of calls and dumps of what they are given, as the environment asks for them.
//! - [`Module`], [`Function`], [`Arg`] and [`Value`]: any TVM-FFI function of any module; [`object`] has its arrays, maps,
//!   tensors, functions and errors.
//!
//! Every call is checked against the kernel's contract before anything is launched, is asynchronous on the stream it is
//! given, and never synchronizes.
//!
//! # Cargo features
//! | feature | default | what it does |
//! |---|---|---|
//! | `norm` | yes | vendors `norm.so` |
//! | `gdn-prefill` | yes | vendors `gdn_prefill_sm90.so` |
//! | `activation` | no | vendors `silu_and_mul.so`, `gelu_and_mul.so` and `gelu_tanh_and_mul.so` |
//! | `rope` | no | vendors `rope.so` |
//! | `page` | no | vendors `page.so` |
//! | `sampling` | no | vendors `sampling.so` |
//! | `decoder` | no | `norm`, `activation`, `rope`, `page` and `sampling` |
//! | `cascade` | no | vendors `cascade.so` |
//! | `topk` | no | vendors `topk.so` |
//! | `quantization` | no | vendors `quantization.so` |
//! | `attention` | no | vendors 18 modules of attention: batch prefill and decode, bf16 and f16, heads of 64, 128 and 256 |
//! | `attention-mla` | no | vendors 6 modules of multi-head latent attention |
//! | `attention-sinks` | no | vendors 8 modules of attention with sinks, heads of 64 |
//! | `attention-fp8-kv` | no | vendors 12 modules of attention over a cache of 8 bits |
//! | `attention-xqa` | no | vendors 16 of XQA's modules, heads of 128 |
//! | `cudart` | yes | vendors `libcudart.so.13`, so that the NVIDIA driver is all that a machine must have |
//! | `embed` | no | puts the vendored libraries into the binary, which then needs no file beside it |
//! | `half` | no | the types of the crate `half` as elements of tensors; `cudarc` turns it on |
//! | `cudarc` | no | functions on cudarc's buffers and streams, and graphs |
//! | `compute` | no | compute graphs: a model's steps built, checked, fused and planned as data, run on the host and, with `cudarc`, on a GPU |
//! | `tracing` | no | logs as events of `tracing` too |
//! | `bench` | no | FlashInfer-Bench: definitions, solutions, workloads and traces; kernels bound, run and timed; and what `FLASHINFER_RS_TRACE_DUMP` writes |
//!
//! The features of attention turn on `cascade` and `page` too. FlashInfer's wheel has hundreds of attention modules more: those
//! with windows and soft caps, for example, are named by the build's variable `FLASHINFER_RS_MODULES`.
//!
//! The API is there with or without a kernel's feature; a kernel that was not vendored answers
//! [`ArtifactMissing`](FlashInferError::ArtifactMissing), which names the feature or the variable that vendors it.
//!
//! # Why it is built this way
//! What is loaded is what was pinned, or what a variable of the build named, whose digest is recorded: a library gets its name
//! only after it was compared with a digest, and is hashed again through the descriptor that is then loaded. What upstream does not check is checked here, because
//! its failures are silent: wrong numbers, a hanging GPU. And what cannot be checked from here, such as device memory's
//! contents, makes a function `unsafe`.

mod artifact;
pub mod attention;
#[cfg(feature = "bench")]
pub mod bench;
#[cfg(feature = "cudarc")]
mod buffers;
#[cfg(feature = "compute")]
pub mod compute;
pub mod contract;
#[cfg(feature = "cudarc")]
mod cublaslt;
mod cuda;
#[cfg_attr(not(feature = "bench"), allow(dead_code, reason = "what the files of FlashInfer-Bench need beside dumps"))]
mod data;
#[path = "../build/digest.rs"]
#[allow(dead_code, reason = "the build parses digests, the library only compares them")]
mod digest;
#[cfg(feature = "cudarc")]
mod draws;
mod elf;
mod engine;
mod error;
mod ffi;
mod first_call;
mod flat;
#[cfg(feature = "cudarc")]
mod flat_cudarc;
#[cfg(any(feature = "cudarc", feature = "compute"))]
mod glue;
#[cfg(feature = "cudarc")]
mod graph;
mod indices;
pub mod kernels;
#[cfg_attr(not(target_os = "linux"), path = "loader_elsewhere.rs")]
mod loader;
#[cfg(all(test, target_os = "linux"))]
#[allow(dead_code, reason = "what other systems' builds use")]
mod loader_elsewhere;
pub mod log;
pub mod matmul;
mod module;
#[path = "../build/names.rs"]
mod names;
mod narrow;
pub mod object;
mod open;
mod owner;
#[cfg(feature = "cudarc")]
mod page_locked;
mod philox;
mod pinned;
mod prepared;
pub mod reference;
mod report;
mod rotary;
mod runtime;
mod self_test;
mod sequences;
mod settings;
mod start;
mod stream;
mod tensor;
mod trace_dump;
mod turn;
#[path = "attention/uri.rs"]
#[allow(dead_code, reason = "xtask and the tests use other parts of it")]
mod uri;

/// The cudarc that this crate's functions take buffers of. A new minor version of it is a new minor version of this crate.
#[cfg(feature = "cudarc")]
pub use ::cudarc;
/// The licences of what the build vendors, and what whoever passes it on must do: to be handed on with a program that was
/// built with the feature `embed`.
pub const THIRD_PARTY_NOTICES: &str = include_str!("../THIRD-PARTY.md");

pub use self::object::{Arg, Object, Value};
pub use artifact::{Artifact, Provenance, Source};
#[cfg(feature = "cudarc")]
pub use buffers::{DeviceBuffer, DeviceBufferMut, Half16};
pub use data::DataError;
pub use error::{FlashInferError, Mismatch, Result};
pub use flat::{
    GdnPrefillSm90Params, GemmaRmsNormParams, Tensor1DDesc, Tensor2DDesc, Tensor3DDesc, Tensor4DDesc, gdn_prefill_sm90,
    gemma_rmsnorm,
};
#[cfg(feature = "cudarc")]
pub use flat_cudarc::{gdn_prefill_sm90_cudarc, gdn_prefill_sm90_cudarc_with_options, gemma_rmsnorm_cudarc};
#[cfg(feature = "cudarc")]
pub use graph::{Captured, GraphBuffers, GraphMut, GraphRef, GraphSet, LaunchGraph};
#[cfg(feature = "cudarc")]
#[doc(hidden)]
pub use graph::{GraphCaptured, GraphViews};
#[cfg(feature = "cudarc")]
pub use indices::{CapturedOnDevice, OnDevice, OnDeviceMut};
pub use indices::{
    MinP, PageTable, Parameter, PerRow, PerRowFacts, Placed, Positions, PositionsFacts, RaggedFacts, RaggedPositions,
    Setting, Steering, Temperature, TokenTensors, Tokens, TokensFacts, TopK, TopP, Words,
};
pub use module::{Function, Module};
pub use open::Preflight;
pub use philox::Philox;
pub use pinned::PinnedKernel;
pub use prepared::Prepared;
pub use report::{DeviceReport, Report};
pub use rotary::{CosSinCache, CosSinFacts, RopeScaling};
pub use runtime::{FlashInferRuntime, RuntimeConfig};
pub use self_test::SelfTest;
pub use sequences::CuSeqlens;
#[cfg(feature = "cudarc")]
pub use sequences::{CapturedCuSeqlens, CuSeqlensMut, DeviceCuSeqlens, Sequences};
pub use stream::{DeviceStream, Stream};
pub use tensor::{DType, Device, Element, MAX_NDIM, PackedTensor, TensorMut, TensorRef};

/// README's code compiles.
#[cfg(all(doctest, feature = "cudarc", feature = "bench", feature = "compute"))]
#[doc = include_str!("../README.md")]
struct Readme;

/// So does that of docs/compute-graph.md.
#[cfg(all(doctest, feature = "cudarc", feature = "compute"))]
#[doc = include_str!("../docs/compute-graph.md")]
struct ComputeGraphs;
