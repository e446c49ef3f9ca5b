//! `cargo xtask bench`: what a launch costs, from Rust, C and Python, on a GPU.
//!
//! One process per arm, all alive at once and on one core, where one at a time works. In each block every arm is asked each
//! of its cases, in turn, so that a machine whose speed drifts drifts for all, and what is compared is compared within a
//! block. Between parts of the run all processes are started anew.

mod check;
mod figures;
mod plan;
mod process;
mod record;
mod report;
mod stats;
mod vendor;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use clap::{Args, Subcommand};
use fastrand::Rng;
use indicatif::ProgressBar;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use self::plan::{ARMS, GENERATIONS, Program, Verdict};
use self::process::{Arm, PATIENCE};
use self::record::{Machine, Missing, Sample, Samples, Writer};
use crate::bundle;
use crate::provision;
use crate::shell::{self, say};
use crate::vendoring::error::{Error, Result, refuse};
use crate::vendoring::store::publish_bytes;

/// Set for every arm, to the folder with the libraries.
const LIB_DIR: &str = "FLASHINFER_RS_LIB_DIR";

#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Options {
    #[command(subcommand)]
    part: Option<Part>,
    /// Count instructions per call instead, without a GPU; needs valgrind and a C compiler
    #[arg(long, conflicts_with_all = ["blocks", "out", "bundle", "strict"])]
    check: bool,
    /// How often each arm is asked each of its cases
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u16).range(30..=1000))]
    blocks: u16,
    /// Where the report, the figures and every single value go; default: docs/performance of the checkout
    #[arg(long)]
    out: Option<PathBuf>,
    /// Take programs and libraries from this folder, which `cargo xtask gpu-bundle` filled; needs neither Rust nor a
    /// checkout
    #[arg(long, requires = "out")]
    bundle: Option<PathBuf>,
    /// Fail where a bound is missed or could not be measured
    #[arg(long)]
    strict: bool,
}

#[derive(Subcommand)]
enum Part {
    /// Vendoring from a synthetic 2 GB wheel on a loopback server limited to 100 Mbit/s
    Vendor,
    /// One arm of `vendor`, in a process of its own
    #[command(hide = true)]
    VendorArm { folder: PathBuf, lock: PathBuf },
    /// Write the report and the figures again, from the values in this folder
    Render { folder: PathBuf },
}

/// `cargo xtask bench`
pub fn command(options: Options) -> Result<()> {
    match options.part {
        Some(Part::Vendor) => vendor::compare(),
        Some(Part::VendorArm { folder, lock }) => vendor::arm(&folder, &lock),
        Some(Part::Render { folder }) => render(&folder).map(drop),
        None if options.check => check::command(),
        None => measure(&options),
    }
}

/// Where the programs and the libraries are.
struct Place {
    launch: PathBuf,
    /// benches/c/caller.c compiled elsewhere, for where there is no C compiler.
    caller: Option<PathBuf>,
    libraries: PathBuf,
    /// With the folders `c` and `python`.
    benches: PathBuf,
    /// How to repeat the run.
    command: String,
}

fn measure(options: &Options) -> Result<()> {
    let blocks = usize::from(options.blocks);
    if !has_gpu() {
        refuse!(
            "launches are measured on a GPU, and there is none here: nvidia-smi lists none; run it on a machine with one \
             (`cargo xtask gpu-bundle` packs all that it needs), or count instructions with `cargo xtask bench --check`"
        );
    }
    let place = match &options.bundle {
        Some(bundle) => packed(bundle, blocks),
        None => built(blocks)?,
    };
    let out = options.out.clone().unwrap_or_else(|| shell::root().join("docs/performance"));
    fs::create_dir_all(&out).map_err(|e| Error::io("creating", &out, &e))?;
    let temporary = tempfile::tempdir().map_err(|e| Error::io("creating a folder in", &std::env::temp_dir(), &e))?;
    let mut caller = temporary.path().join("caller");
    match (compile_caller(&place.benches, &caller), &place.caller) {
        (Ok(()), _) => {}
        (Err(fault), Some(packed)) => {
            say(format!("{fault}; taking the caller that was packed"));
            caller.clone_from(packed);
        }
        (Err(fault), None) => return Err(fault),
    }
    let missing = missing(&place);
    for Missing { arm, reason } in &missing {
        say(format!("without the arm {arm}: {reason}"));
    }
    let (partial, values) = (out.join(record::PARTIAL), out.join(record::VALUES));
    let mut writer = Writer::create(&partial)?;
    pin()?;
    let bar = ProgressBar::new(blocks as u64);
    for generation in 0..GENERATIONS {
        let mut arms = start(&place, &caller, &missing)?;
        let part = generation * blocks / GENERATIONS..(generation + 1) * blocks / GENERATIONS;
        for block in part {
            ask(&mut arms, block, blocks, &mut writer)?;
            bar.inc(1);
        }
        arms.into_iter().for_each(Arm::finish);
    }
    bar.finish_and_clear();
    fs::rename(&partial, &values).map_err(|e| Error::io("renaming", &partial, &e))?;
    let machine = Machine::look(&place.libraries, blocks, place.command, missing)?;
    let mut text = serde_json::to_string_pretty(&machine).unwrap_or_default();
    text.push('\n');
    publish_bytes(&out.join(record::MACHINE), text.as_bytes())?;
    let broken = render(&out)?;
    if options.strict && !broken.is_empty() {
        refuse!("bounds that were not kept: {}", broken.join("; "));
    }
    Ok(())
}

/// nvidia-smi is not everywhere where a GPU is.
fn has_gpu() -> bool {
    provision::has_gpu() || Path::new("/dev/nvidiactl").exists() || Path::new("/dev/dxg").exists()
}

fn packed(bundle: &Path, blocks: usize) -> Place {
    Place {
        launch: bundle.join("bin/launch"),
        caller: Some(bundle.join("bin/caller")),
        libraries: std::env::var_os(LIB_DIR).map_or_else(|| bundle.join("lib"), PathBuf::from),
        benches: bundle.join("benches"),
        command: format!(
            "cargo xtask gpu-bundle --out DIR, then on the GPU machine DIR/bench DIR/performance --blocks {blocks}"
        ),
    }
}

fn built(blocks: usize) -> Result<Place> {
    provision::kernels(&crate::recipes::usual()?)?;
    say("building in release mode");
    let (executables, libraries) = bundle::collect(&bundle::build(&bundle::LAUNCH)?);
    let Some(launch) = executables.get("launch") else { refuse!("cargo built no launch") };
    let Some(libraries) = libraries else { refuse!("cargo did not say where the build script put the libraries") };
    Ok(Place {
        launch: launch.clone(),
        caller: None,
        libraries,
        benches: shell::root().join("benches"),
        command: format!("cargo xtask bench --blocks {blocks}"),
    })
}

/// benches/c/caller.c, given the folder `benches`.
pub fn compile_caller(benches: &Path, to: &Path) -> Result<()> {
    compile(&benches.join("c/caller.c"), to, &[])
}

/// `cc -O2`, or what CC names.
fn compile(source: &Path, to: &Path, more: &[&str]) -> Result<()> {
    let named = std::env::var("CC").ok().filter(|cc| !cc.trim().is_empty()).unwrap_or_else(|| "cc".to_owned());
    let mut words = shlex::split(&named).unwrap_or_default().into_iter();
    let Some(program) = words.next() else { refuse!("CC is `{named}`; expected the name of a C compiler") };
    let mut cc = Command::new(program);
    cc.args(words).args(["-std=gnu11", "-O2"]).args(more).arg("-o").args([to, source]).arg("-ldl");
    shell::quietly(&mut cc)
}

fn python(place: &Place) -> Command {
    let mut python = Command::new("python3");
    python.arg(place.benches.join("python/arms.py")).env(LIB_DIR, &place.libraries);
    python
}

/// The arms of Python that cannot run here. Asked all at once: each imports a good deal.
fn missing(place: &Place) -> Vec<Missing> {
    thread::scope(|scope| {
        let probes: Vec<_> = ARMS
            .iter()
            .filter(|arm| arm.program == Program::Python)
            .map(|arm| {
                let probe = move || process::probe(python(place).args(["--probe", arm.name]), PATIENCE);
                (arm.name, scope.spawn(probe))
            })
            .collect();
        let answer = |(arm, probe): (&str, thread::ScopedJoinHandle<'_, _>)| {
            let answer = probe.join().unwrap_or_else(|_| Err("its probe failed within xtask".to_owned()));
            answer.err().map(|reason| Missing { arm: arm.to_owned(), reason })
        };
        probes.into_iter().filter_map(answer).collect()
    })
}

/// Starts every arm that is not missing, and waits until each is ready.
fn start(place: &Place, caller: &Path, missing: &[Missing]) -> Result<Vec<Arm>> {
    let mut arms = Vec::new();
    for arm in ARMS.iter().filter(|arm| missing.iter().all(|missing| missing.arm != arm.name)) {
        let mut command = match arm.program {
            Program::Rust => Command::new(&place.launch),
            Program::C => Command::new(caller),
            Program::Python => python(place),
        };
        command.env(LIB_DIR, &place.libraries);
        arms.push(Arm::start(arm.name, command, PATIENCE)?);
    }
    arms.iter_mut().try_for_each(Arm::ready)?;
    say(format!("{} arms are ready", arms.len()));
    Ok(arms)
}

/// Keeps this process and the arms that it starts on one core: moved from one to another, a process finds cold caches, which
/// costs more than what is compared.
fn pin() -> Result<()> {
    let fault = |error| Error::Refused(format!("this process cannot be kept on one core: {error}"));
    let allowed = sched_getaffinity(None).map_err(fault)?;
    // Neither the first nor the last, which are more often given other work.
    let cores: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|&core| allowed.is_set(core)).collect();
    let mut one = CpuSet::new();
    cores.get(cores.len() / 3).into_iter().for_each(|&core| one.set(core));
    sched_setaffinity(None, &one).map_err(fault)
}

/// Asks everything of a block, and writes each answer as it comes: a run that fails leaves what it had, under another name.
fn ask(arms: &mut [Arm], block: usize, blocks: usize, writer: &mut Writer) -> Result<()> {
    let place: BTreeMap<String, usize> = arms.iter().enumerate().map(|(i, arm)| (arm.name().to_owned(), i)).collect();
    for question in plan::questions().iter().filter(|question| question.blocks.includes(block, blocks)) {
        let mut answers = vec![Vec::new(); question.arms.len()];
        for round in 0..question.rounds {
            // In any order, the same in every run, so that none always follows the same one.
            let mut turns: Vec<usize> = (0..question.arms.len()).collect();
            Rng::with_seed((block * question.rounds + round) as u64).shuffle(&mut turns);
            for turn in turns {
                let Some(arm) = place.get(question.arms[turn]).and_then(|&i| arms.get_mut(i)) else { continue };
                let answer = arm.ask(&question.case);
                if answer.is_err() {
                    writer.flush()?;
                }
                answers[turn].extend(answer?);
            }
        }
        for (name, answers) in question.arms.iter().zip(&answers) {
            if let Some(summary) = stats::summary(answers) {
                writer.add(&Sample::new(block, name, &question.case, summary.median))?;
            }
        }
    }
    writer.flush()
}

/// Writes the report and the figures from the values; answers the bounds that were not kept.
fn render(folder: &Path) -> Result<Vec<String>> {
    let samples = Samples::read(&folder.join(record::VALUES))?;
    let machine = Machine::read(&folder.join(record::MACHINE))?;
    publish_bytes(&folder.join("launches.md"), report::markdown(&machine, &samples).as_bytes())?;
    for (name, svg) in figures::all(&samples)? {
        publish_bytes(&folder.join(name), svg.as_bytes())?;
    }
    print!("{}", report::bounds(&samples));
    say(format!("written to {}", folder.display()));
    let broken = plan::COMPARISONS.iter().filter_map(|comparison| {
        let verdict = comparison.verdict(comparison.found(&samples));
        matches!(verdict, Verdict::Missed | Verdict::NotMeasured).then(|| {
            format!("{} ({}): {}", comparison.what, comparison.case(), report::verdict(verdict).trim_matches('*'))
        })
    });
    Ok(broken.collect())
}
