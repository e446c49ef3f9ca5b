//! What stands in for `loader.rs` where there are no wheels, which are for Linux alone: nothing can be loaded, and every
//! attempt says so. `Library` has no value there, so that whatever needs one cannot run.

use std::convert::Infallible;
use std::ffi::CStr;
use std::fs::File;
use std::path::{Path, PathBuf};

use crate::digest::Digest;
use crate::error::{FlashInferError, Result};

/// What every attempt answers.
const REASON: &str = "FlashInfer's kernels are built for Linux alone";
const REMEDY: &str = "run the program on x86_64 or aarch64 Linux with glibc";

/// A loaded library, of which there is none.
#[derive(Debug, Clone)]
pub(crate) struct Library(Infallible);

impl Library {
    /// # Safety
    /// None is needed: nothing is loaded.
    pub(crate) unsafe fn open(name: &str, path: &Path, _: Option<&Digest>) -> Result<Self> {
        Err(refused(name, path))
    }

    pub(crate) fn checked(name: &str, path: &Path, _: Option<&Digest>) -> Result<File> {
        Err(refused(name, path))
    }

    /// # Safety
    /// None is needed: nothing is loaded.
    pub(crate) unsafe fn embedded(name: &str, _: &'static [u8], _: &Digest) -> Result<Self> {
        Err(refused(name, Path::new(name)))
    }

    pub(crate) fn embedded_file(name: &str, _: &[u8], _: &Digest) -> Result<(PathBuf, File)> {
        Err(refused(name, Path::new(name)))
    }

    /// # Safety
    /// None is needed: nothing is loaded.
    pub(crate) unsafe fn copy(name: &str, path: &Path, _: Option<&Digest>) -> Result<Self> {
        Err(refused(name, path))
    }

    /// # Safety
    /// None is needed: nothing is loaded.
    pub(crate) unsafe fn from_sealed(name: &str, path: &Path, _: File) -> Result<Self> {
        Err(refused(name, path))
    }

    /// # Safety
    /// None is needed: nothing is loaded.
    pub(crate) unsafe fn from_descriptor(name: &str, path: &Path, _: File) -> Result<Self> {
        Err(refused(name, path))
    }

    /// # Safety
    /// None is needed: nothing is loaded.
    pub(crate) unsafe fn by_name(_: &str, _: bool) -> std::result::Result<Self, String> {
        Err(REASON.to_owned())
    }

    pub(crate) fn global(name: &str, path: String) -> Result<Self> {
        Err(refused(name, Path::new(&path)))
    }

    pub(crate) fn make_global(&self) -> Result<()> {
        match self.0 {}
    }

    pub(crate) fn path(&self) -> &Path {
        match self.0 {}
    }

    pub(crate) fn data_symbols(&self, _: &str) -> Vec<*mut u8> {
        match self.0 {}
    }

    pub(crate) fn functions(&self) -> impl Iterator<Item = &str> {
        // A loop over nothing, since no other value has this type.
        std::iter::from_fn(|| match self.0 {})
    }

    /// # Safety
    /// None is needed: there is no library.
    pub(crate) unsafe fn symbol<T: Copy>(&self, _: &CStr) -> Result<T> {
        match self.0 {}
    }
}

/// What loading may change and does not here.
pub(crate) struct SavedActions;

impl SavedActions {
    pub(crate) fn new() -> Self {
        Self
    }
}

pub(crate) fn sealed(_: &str, _: &[u8]) -> std::result::Result<File, String> {
    Err(REASON.to_owned())
}

pub(crate) fn embedding_refused(name: &str, reason: String) -> FlashInferError {
    FlashInferError::EmbeddingRefused { library: name.to_owned(), reason, remedy: REMEDY }
}

pub(crate) fn global_address(_: &CStr) -> Option<usize> {
    None
}

pub(crate) fn mapped_file(_: usize) -> String {
    "an unknown file".to_owned()
}

fn refused(name: &str, path: &Path) -> FlashInferError {
    let (library, path, reason) = (name.to_owned(), path.to_owned(), REASON.to_owned());
    FlashInferError::LoadFailed { library, path, reason, remedy: REMEDY.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_attempt_to_load_says_where_it_can_be_done() {
        let (path, digest) = (Path::new("lib/norm.so"), crate::digest::hash(b""));
        // SAFETY: nothing is loaded.
        let attempts = unsafe {
            [
                Library::open("norm.so", path, None).map(drop),
                Library::copy("norm.so", path, Some(&digest)).map(drop),
                Library::embedded("norm.so", b"", &digest).map(drop),
                Library::checked("norm.so", path, None).map(drop),
                Library::embedded_file("norm.so", b"", &digest).map(drop),
                Library::global("norm.so", "norm.so".to_owned()).map(drop),
            ]
        };
        for attempt in attempts {
            let fault = attempt.expect_err("nothing can be loaded");
            assert!(matches!(fault, FlashInferError::LoadFailed { .. }), "{fault:?}");
            let text = fault.to_string();
            assert!(text.contains("norm.so") && text.contains("run the program on x86_64 or aarch64 Linux"), "{text}");
        }
        let fault = embedding_refused("norm.so", sealed("norm.so", b"").expect_err("nothing can be loaded"));
        assert!(
            matches!(fault, FlashInferError::EmbeddingRefused { .. }) && fault.to_string().contains(REMEDY),
            "{fault}"
        );
        assert!(global_address(c"TVMFFIEnvSetStream").is_none());
    }
}
