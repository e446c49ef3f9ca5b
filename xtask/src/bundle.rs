//! `cargo xtask gpu-bundle`: what a GPU machine without Rust needs to run the GPU tests, the quick start and the
//! benchmarks.

use std::borrow::Cow;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::BENCH_FEATURE;
use crate::bench;
use crate::messages::collect;
use crate::provision;
use crate::recipes;
use crate::shell::{self, say};
use crate::stress;
use crate::vendoring::error::{Error, Result, refuse};
use crate::vendoring::store::publish_bytes;

/// What is built, with which features, under which name it goes in, and how many seconds it may take: kernels can hang a
/// GPU.
pub struct Program {
    kind: &'static str,
    name: Cow<'static, str>,
    features: &'static str,
    file: Cow<'static, str>,
    seconds: u32,
}

pub const fn program(
    kind: &'static str,
    name: &'static str,
    features: &'static str,
    file: &'static str,
    seconds: u32,
) -> Program {
    Program { kind, name: Cow::Borrowed(name), features, file: Cow::Borrowed(file), seconds }
}

impl Program {
    pub fn name(&self) -> &str {
        &self.name
    }
}

const EXAMPLES: [Program; 9] = [
    program("example", "quickstart", "cudarc", "quickstart", 60),
    program("example", "quickstart", "cudarc,embed", EMBEDDED, 60),
    program("example", "doctor", "cudarc", "doctor", 60),
    program("example", "01_norm", "cudarc", "01_norm", 60),
    program("example", "02_gdn", "cudarc", "02_gdn", 60),
    program("example", "03_two_gpus", "cudarc", "03_two_gpus", 60),
    program("example", "04_graph", "cudarc", "04_graph", 60),
    program("example", "05_decode_step", "cudarc", "05_decode_step", 60),
    program("example", "decoder", "compute,cudarc", "decoder", 60),
];

const STARTUP: Program = program("bench", "startup", "embed", "startup", 120);

/// How long a GPU test may take that says nothing about it.
const SECONDS: u32 = 300;

/// What `cargo xtask bench` measures; `run` leaves it out.
pub static LAUNCH: Program = program("bench", "launch", "cudarc", "launch", 0);
/// What it measures with `--families`.
pub static FAMILIES: Program = program("bench", "families", "cudarc", "families", 0);
/// What it measures with `--attention`.
pub static ATTENTION: Program = program("bench", "attention_arm", "cudarc", "attention_arm", 0);
/// What it measures with `--decoder`.
pub static DECODER: Program = program("bench", "decoder_arm", "compute,cudarc", "decoder_arm", 0);
/// What `cargo xtask bench --check` counts; it stays here.
pub const INSTRUCTIONS: Program = program("bench", "instructions", "cudarc", "instructions", 0);

/// The one that must run without the folder of libraries.
const EMBEDDED: &str = "quickstart_embedded";

/// What `run` runs: the examples, every `tests/*_gpu.rs` that asks for a GPU, and the start-up benchmark.
fn programs(root: &Path) -> Result<Vec<Program>> {
    let folder = root.join("tests");
    let mut tests = Vec::new();
    for entry in fs::read_dir(&folder).map_err(|e| Error::io("reading", &folder, &e))?.flatten() {
        let path = entry.path();
        let name = path.file_stem().and_then(|stem| stem.to_str()).filter(|stem| stem.ends_with("_gpu"));
        let Some(name) = name.filter(|_| path.extension().is_some_and(|extension| extension == "rs")) else { continue };
        let text = fs::read_to_string(&path).map_err(|e| Error::io("reading", &path, &e))?;
        // What runs without a GPU may be named after that.
        if !text.contains("gpu::main(") && !text.contains("gpu::RUN") {
            continue;
        }
        let name = Cow::<str>::Owned(name.to_owned());
        let seconds = seconds(&text).unwrap_or(SECONDS);
        tests.push(Program { kind: "test", file: name.clone(), name, features: "cudarc", seconds });
    }
    tests.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(EXAMPLES.into_iter().chain(tests).chain([STARTUP]).collect())
}

/// What a test's first comment says of its time: `within 240 seconds`.
fn seconds(text: &str) -> Option<u32> {
    let comment = text.lines().map_while(|line| line.strip_prefix("//!")).collect::<String>();
    let words: Vec<_> = comment.split_whitespace().collect();
    words.windows(3).find_map(|words| match words {
        ["within", seconds, unit] if unit.starts_with("seconds") => seconds.parse().ok(),
        _ => None,
    })
}

/// Fills `out`, which must be new, empty or an earlier bundle.
pub fn command(out: &Path) -> Result<()> {
    provision::kernels(&recipes::usual()?)?;
    say("building in release mode");
    let programs = programs(&shell::root())?;
    let mut libraries = None;
    for program in programs.iter().chain(bench::SUITES.map(|suite| suite.rust)).chain([&stress::PREFILL]) {
        let (executables, found) = collect(&build(program)?);
        let Some(executable) = executables.get(&*program.name) else { refuse!("cargo built no {}", program.name) };
        let copy = out.join("bin").join(&*program.file);
        shell::copy(executable, &copy)?;
        executable_mode(&copy)?;
        libraries = libraries.or(found);
    }
    let Some(libraries) = libraries else { refuse!("cargo did not say where the build script put the libraries") };
    for entry in fs::read_dir(&libraries).map_err(|e| Error::io("reading", &libraries, &e))?.flatten() {
        shell::copy(&entry.path(), &out.join("lib").join(entry.file_name()))?;
    }
    if !out.join("lib/gdn_prefill_sm90.so").is_file() {
        refuse!("the kernels at hand have no gdn_prefill_sm90.so; run `cargo xtask wheel` for both families first");
    }
    benchmarks(out)?;
    publish_bytes(&out.join("run"), script(&programs).as_bytes())?;
    executable_mode(&out.join("run"))?;
    publish_bytes(&out.join("stress"), stress::SCRIPT.as_bytes())?;
    executable_mode(&out.join("stress"))?;
    say(format!(
        "packed; on the GPU machine run {0}/run, {0}/bench to measure, {0}/stress to look for a hang",
        out.display()
    ));
    Ok(())
}

/// xtask itself, what it compiles and starts there, and a script that starts it.
fn benchmarks(out: &Path) -> Result<()> {
    let mut cargo = shell::cargo();
    cargo.args(["build", "--release", "--package", "xtask", "--features", BENCH_FEATURE]);
    cargo.arg("--message-format=json-render-diagnostics");
    let (executables, _) = collect(&shell::output(&mut cargo)?);
    let Some(executable) = executables.get("xtask") else { refuse!("cargo built no xtask") };
    let copy = out.join("bin/xtask");
    shell::copy(executable, &copy)?;
    executable_mode(&copy)?;
    for folder in ["benches/c", "benches/python"] {
        let from = shell::root().join(folder);
        for entry in fs::read_dir(&from).map_err(|e| Error::io("reading", &from, &e))?.flatten() {
            // Python leaves folders beside its sources.
            if entry.path().is_file() {
                shell::copy(&entry.path(), &out.join(folder).join(entry.file_name()))?;
            }
        }
    }
    // Compiled again on the GPU machine, where it has a C compiler.
    for suite in bench::SUITES {
        bench::compile_c(suite, &shell::root().join("benches"), &suite.packed_c(out))?;
    }
    publish_bytes(&out.join("bench"), BENCH.as_bytes())?;
    executable_mode(&out.join("bench"))
}

/// The first argument is the folder for the results; what follows goes to xtask.
const BENCH: &str = "#!/bin/sh
# Measures flashinfer-rs's launches: bench [FOLDER [OPTION...]]. Needs the NVIDIA driver, glibc and libstdc++.
here=$(cd \"$(dirname \"$0\")\" && pwd) || exit 1
out=${1:-\"$here/performance\"}
[ $# -eq 0 ] || shift
export FLASHINFER_RS_LIB_DIR=\"$here/lib\"
exec \"$here/bin/xtask\" bench --bundle \"$here\" --out \"$out\" \"$@\"
";

/// Builds without running, and answers cargo's messages.
pub fn build(program: &Program) -> Result<String> {
    let mut cargo = shell::cargo();
    let (command, no_run) = match program.kind {
        "example" => ("build", None),
        kind => (kind, Some("--no-run")),
    };
    cargo.arg(command).args(no_run).args((command != "bench").then_some("--release"));
    // Every family's kernels, whether or not they are among the default features.
    let mut features = recipes::usual()?;
    // But attention's are not put into programs: they are a hundred megabytes and more.
    if !program.features.split(',').any(|feature| feature == "embed") {
        features.extend_from_slice(provision::attention()?);
    }
    features.push(program.features.to_owned());
    let features = features.join(",");
    cargo.args([&format!("--{}", program.kind), &*program.name, "--features", &features]);
    shell::output(cargo.arg("--message-format=json-render-diagnostics"))
}

/// Runs each program under a time limit, all of them whatever happens, and fails if one did.
fn script(programs: &[Program]) -> String {
    let mut text = String::from(
        "#!/bin/sh\n# Runs the GPU tests and the examples of flashinfer-rs. Needs the NVIDIA driver, glibc and libstdc++.\n\
         here=$(cd \"$(dirname \"$0\")\" && pwd) || exit 1\nexport FLASHINFER_RS_LIB_DIR=\"$here/lib\" \
         FLASHINFER_RS_RUN_GPU_TESTS=1\nfailed=0\n",
    );
    for Program { file, seconds, .. } in programs {
        let alone = if file == EMBEDDED { "env -u FLASHINFER_RS_LIB_DIR " } else { "" };
        text += &format!(
            "{alone}timeout -k 5 {seconds} \"$here/bin/{file}\" || {{ echo \"{file}: FAILED ($?)\"; failed=1; }}\n"
        );
    }
    text + "exit $failed\n"
}

fn executable_mode(path: &Path) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).map_err(|e| Error::io("changing", path, &e))
}
