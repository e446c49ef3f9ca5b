//! `cargo xtask install-libs`: the vendored libraries as files, for distributions that keep them apart from programs.

use std::fs;
use std::path::Path;

use crate::features;
use crate::messages;
use crate::provision;
use crate::recipes;
use crate::shell::{self, say};
use crate::vendoring::error::{Error, Result, refuse};
use crate::vendoring::lock::Lock;

/// Builds the crate with its default features and copies what it vendored into `to`: all that these features want, or
/// nothing.
pub fn command(to: &Path) -> Result<()> {
    let features = features::default_ones()?;
    let families: Vec<String> = recipes::usual()?.into_iter().filter(|family| features.contains(family)).collect();
    provision::kernels(&families)?;
    let mut cargo = shell::cargo();
    cargo.args(["build", "--locked", "--message-format=json-render-diagnostics"]);
    let (_, libraries) = messages::collect(&shell::output(&mut cargo)?);
    let Some(libraries) = libraries else { refuse!("cargo did not say where the build script put the libraries") };
    let lock = Lock::read(&shell::root().join("artifacts.lock"))?;
    let lacking = lacking(&lock, &shell::target(), &features, &libraries);
    if !lacking.is_empty() {
        refuse!(
            "nothing was copied: the build vendored no {}, which the default features want; see its warnings, or give the \
             wheels by the variables of docs/hermetic.md",
            lacking.join(" and no ")
        );
    }
    for entry in fs::read_dir(&libraries).map_err(|e| Error::io("reading", &libraries, &e))?.flatten() {
        let path = to.join(entry.file_name());
        shell::copy(&entry.path(), &path)?;
        say(path.display());
    }
    Ok(())
}

/// The libraries that these features want, by the lock, and that are not in the folder.
fn lacking(lock: &Lock, target: &str, features: &[String], folder: &Path) -> Vec<String> {
    let has = |name: &str| features.iter().any(|feature| feature == name);
    let wanted = lock.for_target(target).flat_map(|wheel| wheel.wanted(&has));
    wanted.map(|member| member.soname.clone()).filter(|soname| !folder.join(soname).is_file()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_library_that_a_default_feature_wants_must_be_there() {
        let lock = Lock::read(&shell::root().join("artifacts.lock")).expect("the lock");
        let features = features::default_ones().expect("features");
        let folder = tempfile::tempdir().expect("a folder");
        let lacking = || lacking(&lock, "x86_64-linux", &features, folder.path());
        let mut all = lacking();
        all.sort();
        assert_eq!(all, ["gdn_prefill_sm90.so", "libcudart.so.13", "libtvm_ffi.so", "norm.so"]);
        for soname in all.iter().filter(|soname| *soname != "gdn_prefill_sm90.so") {
            fs::write(folder.path().join(soname), "library").expect("a library");
        }
        assert_eq!(lacking(), ["gdn_prefill_sm90.so"]);
    }
}
