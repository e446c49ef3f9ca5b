//! README's two commands: wheels first, by whatever way works here, then cargo.

use std::path::Path;
use std::process::Command;

use crate::features;
use crate::jit_cache;
use crate::recipes;
use crate::shell::{self, say};
use crate::vendoring::env::Env;
use crate::vendoring::error::Result;
use crate::vendoring::lock::{Lock, Wheel};
use crate::vendoring::source::{Ladder, Source};

pub const JIT_CACHE: &str = "flashinfer_jit_cache";

/// `cargo xtask demo`
pub fn demo() -> Result<()> {
    let mut command = shell::cargo();
    command.args(["run", "--example", "quickstart"]);
    if has_kernels(&Env::process())? {
        command.args(["--features", "cudarc"]);
    } else if has_gpu() {
        say("building the kernels from source, since there is a GPU to run them");
        kernels(&recipes::usual()?)?;
        command.args(["--features", "cudarc"]);
    } else {
        say("no kernels at hand and no GPU to run them: building without, the host reference needs libtvm_ffi.so only");
        command.args(["--no-default-features", "--features", "cudart,cudarc"]);
    }
    shell::run(&mut command)
}

/// `cargo xtask test`
pub fn test(args: &[String]) -> Result<()> {
    kernels(&["norm".to_owned()])?;
    let mut command = shell::cargo();
    command.args(["test", "--workspace", "--all-features"]);
    if !args.is_empty() {
        command.arg("--").args(args);
        return shell::run(&mut command);
    }
    shell::run(&mut command)?;
    // With all features the libraries are in the program. Most users have the default ones, and files.
    features::test(None)
}

/// Makes sure that a build finds kernels: those that are at hand, else these families from source.
pub fn kernels(families: &[String]) -> Result<()> {
    let env = Env::process();
    if !has_kernels(&env)? {
        say(format!("building {} from source", families.join(" and ")));
        jit_cache::build(families, &[], &env)?;
    }
    Ok(())
}

/// Whether the jit-cache wheel can be had, from this machine or from its release host.
fn has_kernels(env: &Env) -> Result<bool> {
    let root = shell::root();
    let lock = Lock::read(&root.join("artifacts.lock"))?;
    let target = shell::target();
    let Some(wheel) = lock.for_target(&target).find(|wheel| wheel.distribution == JIT_CACHE) else { return Ok(false) };
    match find(wheel, env, &root) {
        Ok(source) => {
            say(format!("{} found ({source})", wheel.distribution));
            Ok(true)
        }
        Err(fault) if fault.is_unavailable() => {
            say(fault);
            Ok(false)
        }
        Err(fault) => Err(fault),
    }
}

fn find(wheel: &Wheel, env: &Env, root: &Path) -> Result<Source> {
    let bar = shell::transfer_bar(&wheel.file);
    let mut progress = shell::progress(&bar);
    let checkout = Some(root.to_owned());
    let found = Ladder { env, workspace: checkout.clone(), checkout, progress: &mut progress }.find(wheel);
    bar.finish_and_clear();
    found.map(|found| found.source)
}

/// Whether the NVIDIA driver is here and lists a GPU.
pub fn has_gpu() -> bool {
    let listed = Command::new("nvidia-smi").arg("--list-gpus").output();
    listed.is_ok_and(|output| output.status.success() && !output.stdout.is_empty())
}
