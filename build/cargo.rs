//! What only cargo knows: the folders that it names, and the workspace, which it does not name.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::error::{Result, refuse};

/// The folder that cargo names by this variable.
pub fn folder(name: &str) -> Result<PathBuf> {
    named(name, std::env::var_os(name))
}

/// A folder that a variable of cargo's has as its value. It comes to stand in Rust's sources and in instructions to cargo, which
/// are lines of UTF-8: of another one a part would be written somewhere else.
pub fn named(name: &str, value: Option<OsString>) -> Result<PathBuf> {
    let Some(path) = value.filter(|value| !value.is_empty()).map(PathBuf::from) else {
        refuse!("{name} is not set; cargo sets it, and runs this program")
    };
    if nameable(&path).is_none() || !path.is_absolute() {
        refuse!(
            "{name}={} is not an absolute path of UTF-8 without control characters, and neither Rust's sources nor cargo's \
             instructions can name another; put the project, or its target folder, into another folder",
            path.display().to_string().escape_debug()
        );
    }
    Ok(path)
}

/// A path as a line to cargo can have it, if one can.
pub fn nameable(path: &Path) -> Option<&str> {
    path.to_str().filter(|text| !text.contains(char::is_control))
}

/// The user's workspace: the nearest folder above OUT_DIR with a `Cargo.lock`, which cargo writes beside a workspace's
/// `Cargo.toml`, else the nearest with a `Cargo.toml`. None where the target folder lies elsewhere.
///
/// By neither the depth of OUT_DIR nor `CACHEDIR.TAG`: programs give target folders below the usual one, and cargo marks no
/// folder that was there before it.
pub fn workspace(out_dir: &Path) -> Option<PathBuf> {
    let with = |file: &str| out_dir.ancestors().skip(1).find(|folder| folder.join(file).is_file());
    with("Cargo.lock").or_else(|| with("Cargo.toml")).map(Path::to_owned)
}
