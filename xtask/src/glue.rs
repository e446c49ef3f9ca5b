//! `cargo xtask glue`: this crate's own small CUDA kernels, compiled to PTX that is checked in.
//!
//! The pinned compiler makes it, whatever other one is installed, so that everybody's is the same. CUDA's driver translates
//! PTX for the GPU that it finds, so none of this is needed to build the crate or to run it.

use std::fs;
use std::path::{Path, PathBuf};

use crate::compiler::{self, Toolchain};
use crate::shell::{self, say};
use crate::vendoring::env::Env;
use crate::vendoring::error::{Error, Result, refuse};
use crate::vendoring::store::publish_bytes;

/// Subnormal numbers count as 0, as in FlashInfer's kernels.
const FLAGS: [&str; 4] = ["-std=c++17", "-O3", "-ftz=true", "-ptx"];

/// The oldest GPUs that CUDA 13 and the pinned wheels know: those that came later run the same PTX.
const OLDEST: u32 = 75;
/// The first that know programmatic dependent launch and clusters.
const HOPPER: u32 = 90;

/// The compute capability, as one number, that a source's PTX asks for.
fn oldest(source: &Path) -> u32 {
    if source.file_stem().is_some_and(|name| ["attend", "decode", "gemv"].iter().any(|of_hopper| name == *of_hopper)) {
        HOPPER
    } else {
        OLDEST
    }
}

/// `cargo xtask glue`
pub fn command(check: bool) -> Result<()> {
    let toolchain = compiler::pinned(&Env::process())?;
    for source in sources()? {
        let (path, text) = (source.with_extension("ptx"), ptx(&toolchain, &source)?);
        let name = path.strip_prefix(shell::root()).unwrap_or(&path).display();
        if fs::read_to_string(&path).is_ok_and(|old| old == text) {
            say(format!("{name} is what the compiler makes"));
        } else if check {
            refuse!("{name} is not what the pinned compiler makes of its source; `cargo xtask glue` writes it anew");
        } else {
            publish_bytes(&path, text.as_bytes())?;
            say(format!("{name} written"));
        }
    }
    Ok(())
}

/// The sources, in order.
fn sources() -> Result<Vec<PathBuf>> {
    let folder = shell::root().join("src").join("glue");
    let entries = fs::read_dir(&folder).map_err(|e| Error::io("listing", &folder, &e))?;
    let mut sources = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| Error::io("listing", &folder, &e))?.path();
        if path.extension().is_some_and(|ending| ending == "cu") {
            sources.push(path);
        }
    }
    sources.sort();
    Ok(sources)
}

/// What the compiler makes of a source, without its comments, which name the compiler's build.
fn ptx(toolchain: &Toolchain, source: &Path) -> Result<String> {
    let folder = tempfile::tempdir().map_err(|e| Error::io("creating", Path::new("a temporary folder"), &e))?;
    let to = folder.path().join("out.ptx");
    // nvcc finds its own parts by the path it was started with.
    let mut command = toolchain.command(&toolchain.nvcc);
    command.current_dir(&toolchain.tree).args(toolchain.host_flags()).args(FLAGS);
    command.arg(format!("-arch=compute_{}", oldest(source)));
    command.args(["-isystem", &toolchain.cuda_include]).arg(source).arg("-o").arg(&to);
    shell::quietly(&mut command)?;
    let text = fs::read_to_string(&to).map_err(|e| Error::io("reading", &to, &e))?;
    Ok(without_comments(&text))
}

fn without_comments(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    for line in text.lines().filter(|line| !line.trim_start().starts_with("//")) {
        // At the start, and where a comment stood between them, empty lines would follow one another.
        let doubled = line.is_empty() && (kept.is_empty() || kept.ends_with("\n\n"));
        if !doubled {
            kept += line;
            kept.push('\n');
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_that_is_checked_in_is_what_the_pinned_compiler_makes_of_its_source() {
        let toolchain = compiler::pinned(&Env::process()).expect("the pinned compiler");
        let sources = sources().expect("the sources");
        assert!(!sources.is_empty());
        for source in sources {
            let (path, made) = (source.with_extension("ptx"), ptx(&toolchain, &source).expect("PTX"));
            let found = fs::read_to_string(&path).expect("the PTX that is checked in");
            assert!(found == made, "{}: `cargo xtask glue` writes it anew", path.display());
        }
    }

    #[test]
    fn what_the_crate_carries_names_no_build_and_no_path_and_is_for_every_gpu_of_the_wheels() {
        for source in sources().expect("the sources") {
            let text = fs::read_to_string(source.with_extension("ptx")).expect("the PTX that is checked in");
            assert!(!text.contains("//") && !text.contains(".file") && !text.contains(".loc"), "{}", source.display());
            let target = format!(".target sm_{}\n", oldest(&source));
            assert!(text.contains(&target) && text.is_ascii(), "{}", source.display());
            // A driver for CUDA 13.0, the oldest that is supported, knows PTX up to 9.0.
            assert!(text.starts_with(".version 9.0\n"), "{}", source.display());
        }
    }

    /// As a driver would, of the GPUs of the wheels.
    #[test]
    fn what_the_crate_carries_is_translated_for_every_gpu() {
        let toolchain = compiler::pinned(&Env::process()).expect("the pinned compiler");
        let folder = tempfile::tempdir().expect("a temporary folder");
        for source in sources().expect("the sources") {
            for gpu in [75, 80, 89, 90, 100, 120].into_iter().filter(|gpu| *gpu >= oldest(&source)) {
                let gpu = &format!("sm_{gpu}");
                let mut command = toolchain.command(toolchain.tree.join("cuda/bin/ptxas"));
                command.args(["-arch", gpu]).arg(source.with_extension("ptx")).arg("-o");
                shell::quietly(command.arg(folder.path().join("out.cubin"))).expect(gpu);
            }
        }
    }

    #[test]
    fn comments_are_left_out() {
        let text = "//\n// Compiler Build ID: CL-1\n//\n\n.version 9.0\n\n\t// .globl\tk\n\n.entry k()\n{\n\t// demoted\n\tret;\n}\n";
        assert_eq!(without_comments(text), ".version 9.0\n\n.entry k()\n{\n\tret;\n}\n");
    }
}
