//! Tensors in files and on the host: the safetensors format with the JSON in it, for FlashInfer-Bench's data and for dumps of
//! calls.

pub(crate) mod dtype;
pub(crate) mod error;
pub(crate) mod json;
pub(crate) mod named;
pub(crate) mod safetensors;
pub(crate) mod tensor;
pub(crate) mod time;

pub use error::DataError;
