//! `cargo xtask bench --check`: instructions per call, in Rust and in C, counted by valgrind. Needs no GPU: what is called
//! does nothing.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::compile;
use crate::bundle;
use crate::provision;
use crate::shell::{self, say};
use crate::vendoring::error::{Error, Result, refuse};

/// What benches/instructions.rs counts, and the bound on its ratio to C. The others set the stream too, or pack nothing.
const CASES: [(&str, Option<f64>); 6] = [
    ("pack-and-call", Some(1.10)),
    ("raw", None),
    ("tensors", None),
    ("scope", None),
    ("prepared", None),
    ("prepared-scope", None),
];
/// Calls; what starting costs falls out of the difference to twice as many.
const CALLS: u64 = 20_000;

pub fn command() -> Result<()> {
    if Command::new("valgrind").arg("--version").output().is_err() {
        refuse!("valgrind cannot be started, and it counts the instructions; install it");
    }
    let temporary = tempfile::tempdir().map_err(|e| Error::io("creating a folder in", &std::env::temp_dir(), &e))?;
    let folder = temporary.path();
    let sources = shell::root().join("benches/c");
    compile(&sources.join("noop.c"), &folder.join("norm.so"), &["-shared", "-fPIC", "-Wl,-soname,norm.so"])?;
    let c = folder.join("instructions-c");
    compile(&sources.join("instructions.c"), &c, &[])?;
    // The kernel's stand-in is called through the real runtime, which looks for a GPU first.
    let cudart = folder.join("libcudart.so.13");
    let soname = "-Wl,-soname,libcudart.so.13";
    compile(&shell::root().join("tests/fixtures/cudart.c"), &cudart, &["-shared", "-fPIC", soname])?;
    provision::kernels(&["norm".to_owned()])?;
    say("building in release mode");
    let (executables, libraries) = crate::messages::collect(&bundle::build(&bundle::INSTRUCTIONS)?);
    let Some(rust) = executables.get("instructions") else { refuse!("cargo built no instructions") };
    let Some(libraries) = libraries else { refuse!("cargo did not say where the build script put the libraries") };
    shell::copy(&libraries.join("libtvm_ffi.so"), &folder.join("libtvm_ffi.so"))?;

    let beside = count(&c, &[], folder)?;
    println!("| instructions per call | Rust | C | ratio | bound | |\n|---|---|---|---|---|---|");
    let mut broken = Vec::new();
    for (case, bound) in CASES {
        let found = count(rust, &[case], folder)?;
        let ratio = found / beside;
        let kept = bound.is_none_or(|bound| ratio <= bound);
        let (shown, verdict) = match bound {
            Some(bound) => (format!("≤ {bound:.2}"), if kept { "kept" } else { "**missed**" }),
            None => ("–".to_owned(), ""),
        };
        println!("| {case} | {found:.1} | {beside:.1} | {ratio:.2} | {shown} | {verdict} |");
        if !kept {
            broken.push(format!(
                "{case}: {found:.1} instructions per call, {ratio:.2} times C's {beside:.1}, expected {shown}"
            ));
        }
    }
    if !broken.is_empty() {
        refuse!("{}; see with callgrind_annotate what the call does", broken.join("; "));
    }
    Ok(())
}

/// Instructions per call of `program CASE N FOLDER`.
fn count(program: &Path, case: &[&str], folder: &Path) -> Result<f64> {
    let once = instructions(program, case, CALLS, folder)?;
    let twice = instructions(program, case, 2 * CALLS, folder)?;
    if twice < once + CALLS {
        refuse!(
            "{} {}: {once} instructions for {CALLS} calls and {twice} for twice as many; expected at least one more for \
             each call",
            program.display(),
            case.concat()
        );
    }
    Ok((twice - once) as f64 / CALLS as f64)
}

fn instructions(program: &Path, case: &[&str], calls: u64, folder: &Path) -> Result<u64> {
    let out = folder.join("callgrind.out");
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--quiet", "--tool=callgrind"]).arg(format!("--callgrind-out-file={}", out.display()));
    valgrind.arg(program).args(case).arg(calls.to_string()).arg(folder);
    shell::quietly(&mut valgrind)?;
    let text = fs::read_to_string(&out).map_err(|e| Error::io("reading", &out, &e))?;
    match total(&text) {
        Some(total) => Ok(total),
        None => refuse!("{} has no line `totals:` or `summary:` with a number; use a newer valgrind", out.display()),
    }
}

/// The instructions that callgrind counted.
fn total(text: &str) -> Option<u64> {
    let line = |prefix: &str| text.lines().rev().find_map(|line| line.strip_prefix(prefix));
    line("totals:").or_else(|| line("summary:"))?.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_total_is_read_from_either_line() {
        assert_eq!(total("events: Ir\nsummary: 12\n\nfn=(1)\n1 5\ntotals: 1700158\n"), Some(1_700_158));
        assert_eq!(total("events: Ir Dr\nsummary: 34 7\nfn=(1)\n"), Some(34));
        assert_eq!(total("events: Ir\ntotals:\n"), None);
        assert_eq!(total(""), None);
    }
}
