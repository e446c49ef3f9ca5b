//! The local build: in a checkout of this repository only, a jit-cache wheel that `cargo xtask wheel` made from source,
//! recorded with its digest in an ignored file, so that bare `cargo build`, `test`, `clippy` and `doc` find it.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::digest::Digest;
use super::error::{Error, Result, refuse};
use super::store::{publish_bytes, read_text};

/// Relative to the checkout.
pub const RECORD: &str = ".local/wheel.json";

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub distribution: String,
    pub target: String,
    pub path: PathBuf,
    sha256: String,
}

impl Record {
    pub fn new(distribution: &str, target: &str, path: &Path, sha256: Digest) -> Self {
        Self {
            distribution: distribution.to_owned(),
            target: target.to_owned(),
            path: path.to_owned(),
            sha256: sha256.to_string(),
        }
    }

    /// The record of a checkout, where there is one.
    pub fn read(checkout: &Path) -> Result<Option<Self>> {
        let path = checkout.join(RECORD);
        let text = match read_text(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io("reading", &path, &e)),
        };
        match serde_json::from_str(&text).map_err(|e| e.to_string()).and_then(Self::of) {
            Ok(record) => Ok(Some(record)),
            Err(e) => refuse!("{} is malformed: {e}; delete it, or run `cargo xtask wheel` again", path.display()),
        }
    }

    fn of(mut entries: Map<String, Value>) -> std::result::Result<Self, String> {
        let mut text = |key: &str| match entries.remove(key) {
            Some(Value::String(text)) => Ok(text),
            Some(_) => Err(format!("`{key}` is not a text")),
            None => Err(format!("missing field `{key}`")),
        };
        let [distribution, target, path, sha256] =
            [text("distribution")?, text("target")?, text("path")?, text("sha256")?];
        match entries.keys().next() {
            Some(key) => Err(format!("unknown field `{}`", key.escape_debug())),
            None => Ok(Self { distribution, target, path: path.into(), sha256 }),
        }
    }

    pub fn write(&self, checkout: &Path) -> Result<()> {
        let path = checkout.join(RECORD);
        let Self { distribution, target, path: wheel, sha256 } = self;
        let Some(wheel) = wheel.to_str() else {
            refuse!("{} is not UTF-8, which a record must be; keep the wheel elsewhere", wheel.display())
        };
        let record = json!({ "distribution": distribution, "target": target, "path": wheel, "sha256": sha256 });
        publish_bytes(&path, format!("{record:#}\n").as_bytes())
    }

    pub fn sha256(&self) -> Result<Digest> {
        self.sha256.parse().map_err(Error::Refused)
    }
}

/// Whether a manifest folder is a checkout of this repository that somebody works in: packages do not contain xtask, and the
/// checkouts that cargo makes for git dependencies are nobody's workspace.
pub fn is_checkout(manifest: &Path, workspace: Option<&Path>) -> bool {
    let worked_in = workspace == Some(manifest) || manifest.join(RECORD).is_file();
    manifest.join("xtask/Cargo.toml").is_file() && worked_in
}
