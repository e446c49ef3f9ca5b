//! Small CUDA kernels of this crate's own: those that stand around kernels of FlashInfer's and make the contents of device memory
//! what those take for granted, and those of a decode step that FlashInfer has not.
//!
//! Their sources are the `.cu` files here. `cargo xtask glue` compiles them with the pinned compiler to the PTX beside them,
//! which the crate carries as text and CUDA's driver translates for its GPU: nobody needs a compiler to build or to run this.

#[cfg(feature = "cudarc")]
use std::ffi::CStr;
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::error::Result;

#[cfg(all(feature = "cudarc", feature = "compute"))]
pub(crate) mod attend;
#[cfg(feature = "compute")]
pub(crate) mod decode;
#[cfg(feature = "cudarc")]
pub(crate) mod gemv;
#[cfg(feature = "cudarc")]
mod rows;

#[cfg(feature = "cudarc")]
pub(crate) use rows::{Chain, Glue, Place};

/// PTX as the driver takes it, of a text that ends with a zero byte.
#[cfg(feature = "cudarc")]
fn ptx(text: &'static str) -> &'static CStr {
    // Not a constant, since looking for a zero byte in so long a text takes the compiler long.
    CStr::from_bytes_with_nul(text.as_bytes()).unwrap_or(c"")
}

/// A source's kernels, loaded by whoever needs them first while all others wait. Where that fails the next one tries again.
struct Loading<T> {
    loaded: OnceLock<T>,
    one_at_a_time: Mutex<()>,
}

impl<T> Loading<T> {
    const fn new() -> Self {
        Self { loaded: OnceLock::new(), one_at_a_time: Mutex::new(()) }
    }

    fn get(&self, load: impl FnOnce() -> Result<T>) -> Result<&T> {
        if let Some(loaded) = self.loaded.get() {
            return Ok(loaded);
        }
        let _one_at_a_time = self.one_at_a_time.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(loaded) = self.loaded.get() {
            return Ok(loaded);
        }
        let loaded = load()?;
        Ok(self.loaded.get_or_init(|| loaded))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::error::FlashInferError;

    #[test]
    fn kernels_are_loaded_once_by_any_number_of_threads_and_again_only_after_an_error() {
        static LOADING: Loading<u32> = Loading::new();
        static LOADS: AtomicU32 = AtomicU32::new(0);
        let fails = || Err(FlashInferError::CudartMissing { searched: Vec::new() });
        assert!(LOADING.get(fails).is_err());
        let load = || Ok(LOADS.fetch_add(1, Ordering::Relaxed));
        std::thread::scope(|threads| {
            let all: Vec<_> = (0..8).map(|_| threads.spawn(move || *LOADING.get(load).unwrap())).collect();
            assert!(all.into_iter().all(|thread| thread.join().unwrap() == 0));
        });
        assert_eq!(LOADS.load(Ordering::Relaxed), 1);
        assert_eq!(*LOADING.get(fails).unwrap(), 0, "what is loaded stays");
    }
}
