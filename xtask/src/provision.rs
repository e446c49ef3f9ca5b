//! README's two commands: wheels first, by whatever way works here, then cargo.

use std::io::BufReader;
use std::path::Path;
use std::process::Command;
#[cfg(feature = "bench")]
use std::sync::OnceLock;

use crate::features;
use crate::jit_cache;
use crate::recipes::{self, Recipes};
use crate::shell::{self, say};
use crate::vendoring::env::Env;
use crate::vendoring::error::Result;
use crate::vendoring::lock::{Lock, Wheel};
use crate::vendoring::modules;
use crate::vendoring::source::{Found, Ladder, Source};
use crate::vendoring::wheel::Wheel as Archive;

pub use crate::vendoring::releases::DISTRIBUTION as JIT_CACHE;

/// `cargo xtask demo`
pub fn demo() -> Result<()> {
    // The decoder's feature for both, so that the crate is compiled once.
    let mut features = "cudarc,compute";
    let mut without = &[][..];
    if let Some(capability) = compute_capability() {
        // What the quick start calls, as far as the GPU can run it: the rest takes half an hour to build.
        let wanted = features::default_ones()?.into_iter();
        let wanted = wanted.filter(|feature| feature == "norm" || feature == recipes::SLOW && is_hopper(&capability));
        say("there is a GPU: finding its kernels, or building them from source");
        kernels(&wanted.collect::<Vec<_>>())?;
    } else if !has_kernels(&Env::process())? {
        say("no kernels at hand and no GPU to run them: building without, the host reference needs libtvm_ffi.so only");
        (features, without) = ("cudart,cudarc,compute", &["--no-default-features"]);
    }
    // The decoder on the host: what it would take on a GPU is not all built here.
    for (example, arguments) in [("quickstart", &[][..]), ("decoder", &["--", "--on", "host"])] {
        let mut command = shell::cargo();
        command.args(["run", "--locked", "--example", example]).args(without);
        shell::run(command.args(["--features", features]).args(arguments))?;
    }
    Ok(())
}

/// `cargo xtask test`
pub fn test(args: &[String]) -> Result<()> {
    kernels(&recipes::quick()?)?;
    let mut command = shell::cargo();
    command.args(["test", "--locked", "--workspace", "--all-features"]);
    if !args.is_empty() {
        command.arg("--").args(args);
        return shell::run(&mut command);
    }
    shell::run(&mut command)?;
    // With all features the libraries are in the program. Most users have the default ones, and files.
    features::test(None)
}

/// Makes sure that a build finds kernels: those that are at hand, else these families and modules from source. A local build
/// that lacks some of them is built anew, of all that it has and of these.
pub fn kernels(names: &[String]) -> Result<()> {
    let env = Env::process();
    let mut wanted = names.to_vec();
    if let Some((_, found)) = at_hand(&env)? {
        if found.source != Source::Local {
            return Ok(());
        }
        let there = modules_of(found)?;
        let missing = Recipes::read()?.names(names)?.into_iter().filter(|name| !there.contains(name));
        let missing: Vec<_> = missing.collect();
        if missing.is_empty() {
            return Ok(());
        }
        say(format!("the local build has no {}", missing.join(" and no ")));
        wanted.extend(there);
        wanted.sort();
        wanted.dedup();
    }
    say(format!("building {} from source", wanted.join(" and ")));
    jit_cache::build(&wanted, &[], None, &env)?;
    Ok(())
}

/// The modules in a wheel.
fn modules_of(found: Found) -> Result<Vec<String>> {
    let archive = Archive::open(BufReader::new(found.file), found.path.display().to_string())?;
    Ok(archive.paths().filter_map(|path| modules::name(path).map(str::to_owned)).collect())
}

/// The families of attention that a build can have of the wheel at hand: all of whose modules are in it, or, of a local build,
/// which need not be complete, any. Looked at once.
#[cfg(feature = "bench")]
pub fn attention() -> Result<&'static [String]> {
    static FAMILIES: OnceLock<Vec<String>> = OnceLock::new();
    match FAMILIES.get() {
        Some(families) => Ok(families),
        None => {
            let families = attention_at_hand()?;
            Ok(FAMILIES.get_or_init(|| families))
        }
    }
}

#[cfg(feature = "bench")]
fn attention_at_hand() -> Result<Vec<String>> {
    let Some((_, found)) = at_hand(&Env::process())? else { return Ok(Vec::new()) };
    let is_local = found.source == Source::Local;
    let (there, recipes, mut families) = (modules_of(found)?, Recipes::read()?, Vec::new());
    for family in recipes::attention()? {
        let names = recipes.names(std::slice::from_ref(&family))?;
        let mut in_it = names.iter().map(|name| there.contains(name));
        if if is_local { in_it.any(|there| there) } else { in_it.all(|there| there) } {
            families.push(family);
        }
    }
    Ok(families)
}

/// Whether the jit-cache wheel can be had, from this machine or from its release host.
fn has_kernels(env: &Env) -> Result<bool> {
    Ok(at_hand(env)?.is_some())
}

/// The jit-cache wheel as a build would find it, if it would.
fn at_hand(env: &Env) -> Result<Option<(Wheel, Found)>> {
    let root = shell::root();
    let lock = Lock::read(&root.join("artifacts.lock"))?;
    let target = shell::target();
    let Some(wheel) = lock.for_target(&target).find(|wheel| wheel.distribution == JIT_CACHE) else { return Ok(None) };
    match find(wheel, env, &root) {
        Ok(found) => {
            say(format!("{} found ({})", wheel.distribution, found.source));
            Ok(Some((wheel.clone(), found)))
        }
        Err(fault) if fault.is_unavailable() => {
            say(fault);
            Ok(None)
        }
        Err(fault) => Err(fault),
    }
}

fn find(wheel: &Wheel, env: &Env, root: &Path) -> Result<Found> {
    let bar = shell::transfer_bar(&wheel.file);
    let mut progress = shell::progress(&bar);
    let checkout = Some(root.to_owned());
    let found = Ladder { workspace: checkout.clone(), checkout, ..Ladder::new(env, &mut progress) }.find(wheel);
    bar.finish_and_clear();
    found
}

/// The compute capability of the first GPU that the NVIDIA driver lists, as FlashInfer writes architectures: `9.0`.
pub fn compute_capability() -> Option<String> {
    let query = ["--query-gpu=compute_cap", "--format=csv,noheader"];
    let output = Command::new("nvidia-smi").args(query).output().ok().filter(|output| output.status.success())?;
    first_capability(&String::from_utf8_lossy(&output.stdout))
}

/// The first line that is a compute capability; drivers write other things about GPUs that they do not know.
fn first_capability(listed: &str) -> Option<String> {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let line = listed.lines().map(str::trim);
    line.filter(|line| line.split_once('.').is_some_and(|(major, minor)| is_number(major) && is_number(minor)))
        .map(str::to_owned)
        .next()
}

/// Whether the prefill of the gated delta rule runs there.
fn is_hopper(capability: &str) -> bool {
    capability == "9.0"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_gpu_says_what_is_built() {
        assert_eq!(first_capability("8.9\n9.0\n").as_deref(), Some("8.9"));
        assert_eq!(first_capability("[N/A]\n 10.0 \n").as_deref(), Some("10.0"));
        for nothing in ["", "No devices were found\n", "[Not Supported]\n", "9\n"] {
            assert_eq!(first_capability(nothing), None, "{nothing}");
        }
        assert!(is_hopper("9.0") && !is_hopper("8.9") && !is_hopper("10.0"));
    }
}
