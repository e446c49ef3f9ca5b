//! What cargo says of a build, as JSON.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;

/// The part of cargo's messages that is of use here.
#[derive(Deserialize)]
struct Message {
    target: Option<Target>,
    executable: Option<PathBuf>,
    out_dir: Option<PathBuf>,
    package_id: Option<String>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

/// The programs that were built, by their names, and the folder that the build script put the libraries into.
pub fn collect(messages: &str) -> (BTreeMap<String, PathBuf>, Option<PathBuf>) {
    let (mut executables, mut libraries) = (BTreeMap::new(), None);
    for message in messages.lines().filter_map(|line| serde_json::from_str::<Message>(line).ok()) {
        if let (Some(target), Some(executable)) = (message.target, message.executable) {
            executables.insert(target.name, executable);
        }
        if let (Some(out_dir), Some(package)) = (message.out_dir, message.package_id)
            && package.contains("flashinfer-rs")
        {
            libraries = Some(out_dir.join("lib"));
        }
    }
    (executables, libraries)
}
