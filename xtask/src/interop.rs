//! `cargo xtask interop`: what the tests beside Python take, installed by pip into a folder, and these tests.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::provision;
use crate::recipes;
use crate::shell::{self, say};
use crate::vendoring::error::{Error, Result};
use crate::vendoring::store::publish_bytes;

/// What is installed, each into a folder of its own: releases of TVM-FFI, which are the same package, and all else. Pinned
/// with the digests of every file that an index has of them, for pip chooses by Python's release.
const SETS: [(&str, &str); 4] = [
    ("tvm-ffi-0.1.3", include_str!("../python/tvm-ffi-0.1.3.txt")),
    ("tvm-ffi-0.1.6", include_str!("../python/tvm-ffi-0.1.6.txt")),
    ("tvm-ffi-0.1.15.post2", include_str!("../python/tvm-ffi-0.1.15.post2.txt")),
    ("packages", include_str!("../python/packages.txt")),
];

/// The tests that read these variables.
const TESTS: [&str; 3] = ["interop", "newer_tvm_ffi", "bench_upstream"];
const FOLDER: &str = "FLASHINFER_RS_INTEROP";
const PACKAGES: &str = "FLASHINFER_RS_FLASHINFER_BENCH";

/// What a folder was installed from, beside it.
const MARK: &str = "installed";

/// `cargo xtask interop`
pub fn command(to: Option<&Path>) -> Result<()> {
    let folder = to.map_or_else(|| shell::root().join("target/interop"), Path::to_owned);
    fs::create_dir_all(&folder).map_err(|e| Error::io("creating the folder", &folder, &e))?;
    let folder = folder.canonicalize().map_err(|e| Error::io("opening", &folder, &e))?;
    let version = "import sys; print(sys.implementation.cache_tag, sys.platform)";
    let python = shell::output(Command::new("python3").args(["-c", version]))?;
    for (name, requirements) in SETS {
        install(&folder, name, requirements, &python)?;
    }
    provision::kernels(&recipes::quick()?)?;
    let mut cargo = shell::cargo();
    cargo.args(["test", "--all-features"]).args(TESTS.iter().flat_map(|test| ["--test", test]));
    shell::run(cargo.env(FOLDER, &folder).env(PACKAGES, folder.join("packages")))
}

/// Installs one of the sets, unless it is there already for this Python.
fn install(folder: &Path, name: &str, requirements: &str, python: &str) -> Result<()> {
    let (place, text) = (folder.join(name), format!("{python}{requirements}"));
    let mark = place.join(MARK);
    if fs::read_to_string(&mark).is_ok_and(|found| found == text) {
        return Ok(());
    }
    say(format!("installing {name}"));
    if place.exists() {
        fs::remove_dir_all(&place).map_err(|e| Error::io("removing", &place, &e))?;
    }
    let temporary = tempfile::Builder::new().prefix(".tmp-").tempdir_in(folder);
    let temporary = temporary.map_err(|e| Error::io("writing to the folder", folder, &e))?;
    let (list, packages): (PathBuf, _) = (temporary.path().join("requirements.txt"), temporary.path().join(name));
    publish_bytes(&list, requirements.as_bytes())?;
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"]);
    pip.args(["--only-binary", ":all:", "--target"]).arg(&packages).arg("--requirement").arg(&list);
    shell::quietly(&mut pip)?;
    publish_bytes(&packages.join(MARK), text.as_bytes())?;
    fs::rename(&packages, &place).map_err(|e| Error::io("naming", &place, &e))
}
