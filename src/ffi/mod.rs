//! TVM-FFI's C ABI, as `libtvm_ffi.so` 0.1.3 has it: layouts, DLPack, and the library's symbols. Everything `extern "C"`
//! of this crate stands below here.

pub(crate) mod abi;
pub(crate) mod api;
pub(crate) mod dlpack;
mod objects;
