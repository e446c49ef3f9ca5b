//! What was vendored, and where it is now.

use std::path::{Path, PathBuf};

use crate::digest::Digest;
use crate::error::{FlashInferError, Result};

include!(concat!(env!("OUT_DIR"), "/vendored.rs"));

/// Where to look for libraries before anywhere else but the configuration.
pub(crate) const LIB_DIR: &str = "FLASHINFER_RS_LIB_DIR";

/// Below the executable's folder.
const BESIDE_EXECUTABLE: &str = "lib/flashinfer-rs";

/// A library that the build vendored.
#[derive(Debug)]
#[allow(dead_code, reason = "which fields are read depends on the features")]
pub(crate) struct Vendored {
    pub(crate) name: &'static str,
    pub(crate) distribution: &'static str,
    pub(crate) version: &'static str,
    pub(crate) wheel_sha256: Digest,
    pub(crate) sha256: Digest,
    pub(crate) size: u64,
    pub(crate) source: Source,
    /// A hint, right only on the machine that built.
    pub(crate) built_at: &'static str,
}

/// Where a build found a wheel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(dead_code, reason = "vendored.rs names those that occurred")]
pub(crate) enum Source {
    Override,
    Directory,
    Cache,
    Local,
    Network,
}

/// The row of a library, if it was vendored.
pub(crate) fn vendored(name: &str) -> Option<&'static Vendored> {
    LIBRARIES.iter().find(|row| row.name == name)
}

/// The folders to search, strongest first.
fn folders(configured: Option<&Path>) -> Vec<PathBuf> {
    let executable = std::env::current_exe().ok();
    let beside = executable.as_deref().and_then(Path::parent).map(|folder| folder.join(BESIDE_EXECUTABLE));
    let from_env = std::env::var_os(LIB_DIR).filter(|value| !value.is_empty()).map(PathBuf::from);
    [configured.map(Path::to_owned), from_env, beside].into_iter().flatten().collect()
}

/// Where a library is now.
pub(crate) fn locate(name: &str, configured: Option<&Path>) -> Result<PathBuf> {
    let folders = folders(configured);
    let candidates = folders.iter().map(|folder| folder.join(name));
    let built = vendored(name).map(|row| PathBuf::from(row.built_at));
    let mut searched = Vec::new();
    for path in candidates.chain(built) {
        if path.is_file() {
            return Ok(path);
        }
        searched.push(path.display().to_string());
    }
    let remedy = match vendored(name) {
        Some(_) => format!(
            "put the vendored libraries into the folder that {LIB_DIR} names, or into {BESIDE_EXECUTABLE} beside the executable"
        ),
        None if MISSING.is_empty() => format!("{name} was not vendored: build with the Cargo feature that wants it"),
        None => format!("{name} was not vendored: {}", MISSING.join("; ")),
    };
    Err(FlashInferError::ArtifactMissing { library: name.to_owned(), searched, remedy })
}
