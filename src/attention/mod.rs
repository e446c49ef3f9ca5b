//! Attention: planned once for a batch, run for every layer.
//!
//! Upstream divides attention into two calls. `plan` looks at a batch's lengths on the host, divides the work among the GPU's
//! multiprocessors and copies lists of it to the GPU; `run` launches kernels that find their way by those lists. Nothing in it
//! connects the two: a window, a size, a buffer or a table that is another one in `run` than it was in `plan` reads and writes
//! anywhere. Here they cannot differ:
//!
//! - An [`AttentionSpec`] has the facts of a model's attention, checked together. It chooses the module and every number that the
//!   module is called with.
//! - A [`Batch`] has the requests of a step: how many queries each has, and the pages or the place of its keys. It is checked
//!   as it is made.
//! - A [`Workspace`] owns the scratch memory, for one specification, one stream and batches up to a [`Largest`] one.
//! - [`Workspace::plan`] makes a [`Plan`] of a batch, which borrows the workspace. [`Plan::run`] and its relatives are safe, and
//!   run any number of layers.
//! - With the feature `cudarc` a `GraphPlan` is captured into a [`LaunchGraph`](crate::LaunchGraph) and planned anew between
//!   launches.
//! - [`XqaDecode`] decodes without a plan: lengths and pages are in a [`DecodeTable`] in the GPU's memory.
//!
//! ```
//! use flashinfer_rs::attention::{AttentionOptions, AttentionSpec, Batch, Workspace};
//! use flashinfer_rs::kernels::page::{KvLayout, PagedKvCache};
//! use flashinfer_rs::{DType, FlashInferRuntime, RuntimeConfig, TensorMut, TensorRef};
//! use half::bf16;
//!
//! FlashInferRuntime::initialize(RuntimeConfig::default())?;
//! // 4 query heads and 2 key heads of 64 elements; 8 pages of 16 tokens. On the host; Workspace::new is for a GPU's stream.
//! let spec = AttentionSpec::paged(DType::BF16, (4, 2), 64, 16).causal(true).build()?;
//! let mut workspace = Workspace::on_host(spec);
//!
//! let mut batch = Batch::paged(16, 8)?;
//! batch.push(3, &[5], 3)?;
//! batch.push(1, &[2, 7], 20)?;
//! let plan = workspace.plan(&batch)?;
//!
//! let q = vec![bf16::ONE; 4 * 4 * 64];
//! let mut o = vec![bf16::ZERO; 4 * 4 * 64];
//! let (mut k, mut v) = (vec![bf16::ONE; 8 * 16 * 2 * 64], vec![bf16::ONE; 8 * 16 * 2 * 64]);
//! let shape = [8, 16, 2, 64];
//! let cache = PagedKvCache::new(
//!     TensorMut::from_slice(&mut k, &shape)?,
//!     TensorMut::from_slice(&mut v, &shape)?,
//!     KvLayout::Nhd,
//! )?;
//! let mut results = TensorMut::from_slice(&mut o, &[4, 4, 64])?;
//! plan.run(&mut results, None, &TensorRef::from_slice(&q, &[4, 4, 64])?, &cache, &AttentionOptions::default())?;
//! assert!(o.iter().all(|x| *x == bf16::ONE));
//! # Ok::<(), flashinfer_rs::FlashInferError>(())
//! ```
//!
//! # Logarithms
//! A call may answer `lse`, for each query and head the logarithm to the base 2 of the sum that its result was divided by. With
//! [`merge_state`](crate::kernels::cascade::merge_state) the results over two parts of a context, and their logarithms, become those
//! over the whole: that is how a prefix that many requests share is attended to once.
//!
//! # Limits
//! Products of queries and keys stay within ±50,000 before they are scaled: below that upstream takes them for masked. A cache's
//! memory is initialized, also where it has no token yet, since a key that is masked takes part with weight 0 and NaN times 0 is
//! NaN.

mod batch;
#[cfg(feature = "cudarc")]
mod gpu;
#[cfg(feature = "cudarc")]
mod graph;
#[cfg(feature = "cudarc")]
mod ring;
#[cfg_attr(not(feature = "cudarc"), allow(dead_code, reason = "GPU memory comes from cudarc"))]
mod rows;
#[cfg_attr(not(feature = "cudarc"), allow(dead_code, reason = "GPU memory comes from cudarc"))]
mod run;
#[cfg_attr(not(feature = "cudarc"), allow(dead_code, reason = "GPU memory comes from cudarc"))]
mod sizes;
#[cfg_attr(not(feature = "cudarc"), allow(dead_code, reason = "GPU memory comes from cudarc"))]
mod spec;
#[cfg(all(feature = "cudarc", feature = "compute"))]
mod step;
mod workspace;
#[cfg_attr(not(feature = "cudarc"), allow(dead_code, reason = "GPU memory comes from cudarc"))]
mod xqa;

pub use batch::Batch;
#[cfg(feature = "cudarc")]
pub use graph::{CapturedPlan, GraphPlan, GraphPlanMut, GraphRoom};
pub use run::{AttentionOptions, LatentQueries};
pub use sizes::Largest;
pub use spec::{AttentionBuilder, AttentionSpec, Backend, Kind};
pub use workspace::{Plan, Workspace};
#[cfg(feature = "cudarc")]
pub use xqa::{CapturedXqa, GraphXqa};
pub use xqa::{DecodeFacts, DecodeTable, XqaDecode};
#[cfg(all(feature = "cudarc", feature = "compute"))]
pub(crate) use {
    gpu::buffer_address,
    step::{Replanned, StepKernel, StepPlan},
    xqa::XqaKernel,
};
