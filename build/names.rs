//! What both the build and the running program call by name. The library compiles this file too.

/// Names further modules of the jit-cache wheel, which the build vendors.
pub const MODULES: &str = "FLASHINFER_RS_MODULES";
/// Names a lock file of the user's that pins kernels.
pub const KERNELS: &str = "FLASHINFER_RS_KERNELS";

/// The distribution whose libraries are kernel modules; those of the others are what modules need.
pub const JIT_CACHE: &str = "flashinfer_jit_cache";

/// Where a wheel came from that a variable of the build named.
pub const OVERRIDE: &str = "override";
/// Where a wheel came from that a contributor built in a checkout of this crate.
pub const LOCAL: &str = "local build";
