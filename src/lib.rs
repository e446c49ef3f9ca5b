//! FlashInfer's prebuilt GPU kernels from Rust.
#![cfg_attr(docsrs, feature(doc_cfg))]

mod artifact;
mod cuda;
#[cfg(feature = "cudarc")]
mod cudarc;
#[path = "../build/digest.rs"]
#[allow(dead_code, reason = "the build parses digests, the library only compares them")]
mod digest;
mod error;
mod ffi;
mod flat;
pub mod kernels;
mod loader;
mod module;
mod runtime;
mod tensor;

#[cfg(feature = "cudarc")]
pub use self::cudarc::{
    DeviceBuffer, DeviceBufferMut, Half16, gdn_prefill_sm90_cudarc, gdn_prefill_sm90_cudarc_with_options,
    gemma_rmsnorm_cudarc,
};
pub use error::{FlashInferError, Result};
pub use flat::{
    GdnPrefillSm90Params, GemmaRmsNormParams, Tensor1DDesc, Tensor2DDesc, Tensor3DDesc, Tensor4DDesc, gdn_prefill_sm90,
    gemma_rmsnorm,
};
pub use module::{Arg, Function, Module, Object, PackedTensor, Value};
pub use runtime::{FlashInferRuntime, RuntimeConfig, Stream};
pub use tensor::{DType, Device, Element, MAX_NDIM, TensorMut, TensorRef};
