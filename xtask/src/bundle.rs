//! `cargo xtask gpu-bundle`: what a GPU machine without Rust needs to run the GPU tests and the quick start.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::jit_cache::Family;
use crate::provision;
use crate::shell::{self, say};
use crate::vendoring::error::{Error, Result, refuse};
use crate::vendoring::store::publish_bytes;

const QUICKSTART: &str = "quickstart";
/// The tests that go in, and how many seconds each may take: kernels can hang a GPU.
const GPU_TESTS: [(&str, u32); 2] = [("gemma_rmsnorm_gpu", 120), ("gdn_prefill_gpu", 240)];

/// Every program that goes in.
fn programs() -> impl Iterator<Item = (&'static str, u32)> {
    std::iter::once((QUICKSTART, 60)).chain(GPU_TESTS)
}

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

/// Fills `out`, which must be new, empty or an earlier bundle.
pub fn command(out: &Path) -> Result<()> {
    provision::kernels(&[Family::Norm, Family::GdnPrefill])?;
    say("building in release mode");
    let messages =
        build("build", "--example", &[QUICKSTART])? + &build("test", "--test", &GPU_TESTS.map(|(name, _)| name))?;
    let (executables, libraries) = collect(&messages);
    let script = script();
    for (name, _) in programs() {
        let Some(executable) = executables.get(name) else { refuse!("cargo built no {name}") };
        shell::copy(executable, &out.join("bin").join(name))?;
        executable_mode(&out.join("bin").join(name))?;
    }
    let Some(libraries) = libraries else { refuse!("cargo did not say where the build script put the libraries") };
    for entry in fs::read_dir(&libraries).map_err(|e| Error::io("reading", &libraries, &e))?.flatten() {
        shell::copy(&entry.path(), &out.join("lib").join(entry.file_name()))?;
    }
    if !out.join("lib/gdn_prefill_sm90.so").is_file() {
        refuse!("the kernels at hand have no gdn_prefill_sm90.so; run `cargo xtask wheel` for both families first");
    }
    publish_bytes(&out.join("run"), script.as_bytes())?;
    executable_mode(&out.join("run"))?;
    say(format!("packed; on the GPU machine run {}/run", out.display()));
    Ok(())
}

/// Builds without running, and answers cargo's messages.
fn build(command: &str, kind: &str, names: &[&str]) -> Result<String> {
    let mut cargo = shell::cargo();
    cargo.args([command, "--release", "--features", "cudarc", "--message-format=json-render-diagnostics"]);
    cargo.args(names.iter().flat_map(|name| [kind, name]));
    if command == "test" {
        cargo.arg("--no-run");
    }
    shell::output(&mut cargo)
}

fn collect(messages: &str) -> (BTreeMap<String, PathBuf>, Option<PathBuf>) {
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

/// Runs each program under a time limit, all of them whatever happens, and fails if one did.
fn script() -> String {
    let mut text = String::from(
        "#!/bin/sh\n# Runs the GPU tests and the quick start of flashinfer-rs. Needs the NVIDIA driver, glibc and libstdc++.\n\
         here=$(cd \"$(dirname \"$0\")\" && pwd) || exit 1\nexport FLASHINFER_RS_LIB_DIR=\"$here/lib\" \
         FLASHINFER_RS_RUN_GPU_TESTS=1\nfailed=0\n",
    );
    for (name, seconds) in programs() {
        text +=
            &format!("timeout -k 5 {seconds} \"$here/bin/{name}\" || {{ echo \"{name}: FAILED ($?)\"; failed=1; }}\n");
    }
    text + "exit $failed\n"
}

fn executable_mode(path: &Path) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).map_err(|e| Error::io("changing", path, &e))
}
