//! Starting: the runtime, and the kernels where they are wanted at once.

use crate::error::Result;
use crate::kernels;
use crate::runtime::{FlashInferRuntime, RuntimeConfig};

impl FlashInferRuntime {
    /// Loads libcudart.so.13 where there is one, then libtvm_ffi.so, and checks both. Kernel modules are loaded on
    /// first use or by [`warm_up`](Self::warm_up).
    ///
    /// A second call with the same configuration answers the same runtime. It may differ in
    /// [`warm_up`](RuntimeConfig::warm_up): a call that asks for it warms up, and answers what went wrong there.
    ///
    /// # Errors
    /// [`ArtifactMissing`](crate::FlashInferError::ArtifactMissing), [`DigestMismatch`](crate::FlashInferError::DigestMismatch),
    /// [`LoadFailed`](crate::FlashInferError::LoadFailed), [`VersionMismatch`](crate::FlashInferError::VersionMismatch),
    /// [`ForeignTvmFfi`](crate::FlashInferError::ForeignTvmFfi), [`SymbolMissing`](crate::FlashInferError::SymbolMissing),
    /// [`EmbeddingRefused`](crate::FlashInferError::EmbeddingRefused),
    /// [`Setting`](crate::FlashInferError::Setting) for a variable of [`log`](crate::log) that has a value which means nothing,
    /// [`Io`](crate::FlashInferError::Io), or
    /// [`AlreadyInitialized`](crate::FlashInferError::AlreadyInitialized) with another configuration. That there is no GPU is
    /// no error here.
    pub fn initialize(config: RuntimeConfig) -> Result<&'static Self> {
        let warm_up = config.warm_up;
        let runtime = Self::make(config)?;
        if warm_up {
            runtime.warm_up()?;
        }
        Ok(runtime)
    }

    /// Loads the module of every kernel of this crate and resolves every function this crate knows in it, so that no later
    /// call does. Modules that were not vendored are left out, and so are those that `FLASHINFER_RS_MODULES` added and those
    /// of attention: there are dozens, and a model needs a few.
    ///
    /// # Errors
    /// As for a kernel's first call.
    pub fn warm_up(&'static self) -> Result<()> {
        for kernel in kernels::all() {
            if kernel.is_there() {
                kernel.function()?;
            }
        }
        Ok(())
    }
}
