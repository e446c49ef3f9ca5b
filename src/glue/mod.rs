//! Small CUDA kernels of this crate's own: those that stand around kernels of FlashInfer's and make the contents of device memory
//! what those take for granted, and those of a decode step that FlashInfer has not.
//!
//! Their sources are the `.cu` files here. `cargo xtask glue` compiles them with the pinned compiler to the PTX beside them,
//! which the crate carries as text and CUDA's driver translates for its GPU: nobody needs a compiler to build or to run this.

#[cfg(feature = "compute")]
pub(crate) mod decode;
#[cfg(feature = "cudarc")]
pub(crate) mod gemv;
#[cfg(feature = "cudarc")]
mod rows;

#[cfg(feature = "cudarc")]
pub(crate) use rows::{Chain, Glue, Place};
