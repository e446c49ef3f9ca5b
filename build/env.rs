//! Every environment variable that a build looks at, by name, in one place. Reading one tells cargo to run the build
//! script again when it changes.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Component, PathBuf};

use super::error::{Result, refuse};
use super::names::JIT_CACHE;
pub use super::names::{KERNELS, MODULES};

pub const JIT_CACHE_WHEEL: &str = "FLASHINFER_RS_JIT_CACHE_WHEEL";
pub const TVMFFI_WHEEL: &str = "FLASHINFER_RS_TVMFFI_WHEEL";
pub const CUDART_WHEEL: &str = "FLASHINFER_RS_CUDART_WHEEL";
pub const CUBLAS_WHEEL: &str = "FLASHINFER_RS_CUBLAS_WHEEL";
pub const WHEEL_DIR: &str = "FLASHINFER_RS_WHEEL_DIR";
pub const CACHE_DIR: &str = "FLASHINFER_RS_CACHE_DIR";
pub const OFFLINE: &str = "FLASHINFER_RS_OFFLINE";
pub const CARGO_OFFLINE: &str = "CARGO_NET_OFFLINE";
pub const STRICT: &str = "FLASHINFER_RS_STRICT";
pub const ALLOW_VERSION: &str = "FLASHINFER_RS_ALLOW_VERSION";
pub const MIRROR: &str = "FLASHINFER_RS_MIRROR";
pub const SKIP_VENDOR: &str = "FLASHINFER_RS_SKIP_VENDOR";

/// The distribution of TVM-FFI itself.
pub const TVM_FFI: &str = "apache_tvm_ffi";

/// The variable that names a wheel of this distribution directly.
pub fn wheel_override(distribution: &str) -> Option<&'static str> {
    match distribution {
        JIT_CACHE => Some(JIT_CACHE_WHEEL),
        TVM_FFI => Some(TVMFFI_WHEEL),
        "nvidia_cuda_runtime" => Some(CUDART_WHEEL),
        "nvidia_cublas" => Some(CUBLAS_WHEEL),
        _ => None,
    }
}

/// A value, and what gave it: a variable's name or a file's path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    pub value: String,
    pub from: String,
}

/// The environment of a build: the process's own, or a test's.
pub struct Env {
    fixed: Option<BTreeMap<String, OsString>>,
    read: RefCell<Vec<String>>,
}

impl Env {
    /// The process's environment.
    pub fn process() -> Self {
        Self { fixed: None, read: RefCell::default() }
    }

    /// Just these variables.
    pub fn fixed<K: Into<String>, V: Into<OsString>>(pairs: impl IntoIterator<Item = (K, V)>) -> Self {
        let fixed = pairs.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
        Self { fixed: Some(fixed), read: RefCell::default() }
    }

    /// A variable's value; one that is set to nothing counts as not set.
    pub fn os(&self, name: &str) -> Option<OsString> {
        let mut read = self.read.borrow_mut();
        if !read.iter().any(|seen| seen == name) {
            read.push(name.to_owned());
        }
        let value = match &self.fixed {
            Some(fixed) => fixed.get(name).cloned(),
            None => std::env::var_os(name),
        };
        value.filter(|value| !value.is_empty())
    }

    pub fn path(&self, name: &str) -> Option<PathBuf> {
        self.os(name).map(PathBuf::from)
    }

    /// The file or folder that one of this crate's variables names. A relative one is refused: cargo runs build scripts in the
    /// package's folder, which is no place of the user's to look into, and none to write to.
    pub fn own_path(&self, name: &str) -> Result<Option<PathBuf>> {
        let Some(path) = self.path(name).filter(|path| !path.is_absolute()) else { return Ok(self.path(name)) };
        let (start, rest) = match path.strip_prefix("~") {
            Ok(rest) => ("HOME", rest),
            // The folder that the user's shell was in: cargo changes it for no other program.
            Err(_) => ("PWD", path.as_path()),
        };
        let rest: PathBuf = rest.components().filter(|part| *part != Component::CurDir).collect();
        let meant = self.path(start).filter(|start| start.is_absolute()).map(|start| start.join(&rest));
        let meant = meant.map_or(".".to_owned(), |meant| format!("; did you mean {}?", meant.display()));
        refuse!(
            "{name}={} is not an absolute path, and would be taken from the package's own folder, where cargo runs build \
             scripts{meant} Give an absolute path, or one from your project on by `[env]` in its .cargo/config.toml: {name} = {{ \
             value = \"{}\", relative = true }}",
            path.display(),
            rest.display()
        );
    }

    pub fn text(&self, name: &str) -> Option<String> {
        self.os(name).map(|value| value.to_string_lossy().into_owned())
    }

    /// A variable's value with its name.
    pub fn named(&self, name: &str) -> Option<Named> {
        Some(Named { value: self.text(name)?, from: name.to_owned() })
    }

    /// Whether a switch is on: set, and neither `0`, `false`, `no` nor `off`.
    pub fn flag(&self, name: &str) -> bool {
        self.text(name).is_some_and(|value| is_on(&value))
    }

    /// The variables that were read so far.
    pub fn names_read(&self) -> Vec<String> {
        self.read.borrow().clone()
    }

    /// `FLASHINFER_RS_OFFLINE` or `CARGO_NET_OFFLINE`: the name of the one that forbids the network.
    pub fn offline(&self) -> Option<&'static str> {
        [OFFLINE, CARGO_OFFLINE].into_iter().find(|name| self.flag(name))
    }

    /// Where verified wheels are kept: `FLASHINFER_RS_CACHE_DIR`, else `flashinfer-rs` in the XDG cache folder.
    pub fn cache_dir(&self) -> Result<Option<PathBuf>> {
        let own = self.own_path(CACHE_DIR)?;
        let absolute = |name: &str| self.path(name).filter(|path| path.is_absolute());
        Ok(own.or_else(|| {
            let xdg = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
            Some(xdg?.join("flashinfer-rs"))
        }))
    }
}

/// Whether a switch that is set to this is on.
pub fn is_on(value: &str) -> bool {
    !matches!(value.trim().to_ascii_lowercase().as_str(), "0" | "false" | "no" | "off")
}
