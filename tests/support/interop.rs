//! What `cargo xtask interop` installed for tests beside Python.
#![allow(dead_code, reason = "each test uses its own part")]

use std::path::PathBuf;

/// Names the folder that it was installed into.
pub const FOLDER: &str = "FLASHINFER_RS_INTEROP";

/// The releases of TVM-FFI that are installed: the one that is vendored, one before lists and causes, and the newest.
pub const RELEASES: [&str; 3] = ["0.1.3", "0.1.6", "0.1.15.post2"];

/// The folder, where it is named.
pub fn folder() -> Option<PathBuf> {
    let folder = std::env::var_os(FOLDER).filter(|folder| !folder.is_empty())?;
    Some(PathBuf::from(folder).canonicalize().expect(FOLDER))
}

/// The folder, which is named, since the tests that ask for it are ignored otherwise.
pub fn installed() -> PathBuf {
    folder().expect(FOLDER)
}

/// Where a release of Python's package `tvm_ffi` lies.
pub fn tvm_ffi(release: &str) -> PathBuf {
    let package = installed().join(format!("tvm-ffi-{release}/tvm_ffi"));
    assert!(package.is_dir(), "{} is not there: `cargo xtask interop` installs it", package.display());
    package
}
