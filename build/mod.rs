//! Vendoring: from `artifacts.lock` to verified shared objects in a folder. build.rs is its main user; xtask and the
//! tests compile the same files by `#[path]`.
#![forbid(unsafe_code)]
#![allow(dead_code, reason = "each of build.rs, xtask and the tests uses its own part")]

pub mod cargo;
pub mod client;
pub mod credentials;
pub mod digest;
pub mod emit;
pub mod env;
pub mod error;
pub mod families;
pub mod fetch;
pub mod index;
pub mod kernels;
pub mod layout;
pub mod local;
pub mod lock;
pub mod modules;
pub mod names;
pub mod pip;
pub mod proxy;
pub mod ranges;
pub mod releases;
pub mod report;
pub mod snapshot;
pub mod source;
pub mod store;
pub mod table;
pub mod url;
pub mod uv;
pub mod vendor;
pub mod wheel;
