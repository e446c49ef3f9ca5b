//! `cargo xtask bench`: what calls cost, from Rust, C and Python, on a GPU: launches of one kernel in every way there is, one call of
//! each family beside its peers, or attention beside its peers.
//!
//! One process per arm, all alive at once and on one core, where one at a time works. In each block every arm is asked each
//! of its cases, in turn, so that a machine whose speed drifts drifts for all, and what is compared is compared within a
//! block. From time to time processes are started anew.

mod attention;
mod check;
mod decoder;
mod families;
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
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use fastrand::Rng;
use indicatif::ProgressBar;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use self::plan::{Blocks, Comparison, GENERATIONS, Program, Question, Verdict};
use self::process::{Arm, PATIENCE};
use self::record::{Earlier, Failure, Machine, Missing, Sample, Samples, Writer};
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
    #[arg(long, conflicts_with_all = ["blocks", "out", "bundle", "strict", "families", "attention", "decoder", "no_python", "seconds", "without", "only", "resume"])]
    check: bool,
    /// One call of each family beside its peers, in place of launches of one kernel in every way there is
    #[arg(long)]
    families: bool,
    /// Attention's plans and runs beside their peers, likewise
    #[arg(long, conflicts_with = "families")]
    attention: bool,
    /// A decoder's step beside transformers, likewise
    #[arg(long, conflicts_with_all = ["families", "attention"])]
    decoder: bool,
    /// Leave the arms of Python out
    #[arg(long)]
    no_python: bool,
    /// Leave these arms out; a name that ends in * stands for all that begin so
    #[arg(long, value_delimiter = ',')]
    without: Vec<String>,
    /// Leave all others out, likewise; ratios need the arms of both sides
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Go on behind what is in the folder: its values stay, and this run's blocks have the numbers that follow. For arms that take
    /// turns on a machine that is lent for minutes
    #[arg(long)]
    resume: bool,
    /// How often each arm is asked each of its cases; default: 60, with --families 5, with --attention 3, with --decoder 6
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1000))]
    blocks: Option<u16>,
    /// Ask nothing more after so many seconds, and write up what was answered by then
    #[arg(long)]
    seconds: Option<u64>,
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
    /// Write the reports and the figures again, from the values in this folder
    Render { folder: PathBuf },
}

/// What is measured in one run.
pub struct Suite {
    /// Of its files.
    name: &'static str,
    /// What asks for it, on the command line.
    option: &'static str,
    arms: &'static [plan::Arm],
    /// Its Rust program.
    pub rust: &'static bundle::Program,
    /// Its C program: a source in benches/c.
    pub c: &'static str,
    /// Its Python program: a file in benches/python.
    python: &'static str,
    /// How many blocks there are, if nothing else is said, and at least.
    blocks: (u16, u16),
    questions: fn() -> Vec<Question>,
    /// Which of an arm's processes a block asks, of so many blocks.
    generation: fn(Program, usize, usize) -> usize,
    /// Whether a case that an arm fails is noted, and not the end of the run.
    tolerant: bool,
    /// How long an arm may take to become ready, and to answer.
    patience: Duration,
    comparisons: fn() -> &'static [Comparison],
    report: fn(&Machine, &Samples) -> String,
    figures: fn(&Samples) -> Result<figures::Files>,
}

/// All of them.
pub const SUITES: [&Suite; 4] = [&LAUNCHES, &families::SUITE, &attention::SUITE, &decoder::SUITE];

static LAUNCHES: Suite = Suite {
    name: "launches",
    option: "",
    arms: &plan::ARMS,
    rust: &bundle::LAUNCH,
    c: "caller",
    python: "arms.py",
    blocks: (60, 30),
    questions: plan::questions,
    generation: |_, block, blocks| block * GENERATIONS / blocks,
    tolerant: false,
    patience: PATIENCE,
    comparisons: || &plan::COMPARISONS,
    report: report::markdown,
    figures: figures::all,
};

impl Suite {
    fn values(&self, folder: &Path) -> PathBuf {
        folder.join(self.name).with_extension("csv")
    }

    fn machine(&self, folder: &Path) -> PathBuf {
        folder.join(self.name).with_extension("json")
    }

    /// Where its C program is in a bundle.
    pub fn packed_c(&self, bundle: &Path) -> PathBuf {
        bundle.join("bin").join(format!("{}-c", self.c))
    }
}

/// `cargo xtask bench`
pub fn command(options: Options) -> Result<()> {
    match options.part {
        Some(Part::Vendor) => vendor::compare(),
        Some(Part::VendorArm { folder, lock }) => vendor::arm(&folder, &lock),
        Some(Part::Render { folder }) => render_all(&folder),
        None if options.check => check::command(),
        None if options.families => measure(&families::SUITE, &options),
        None if options.attention => measure(&attention::SUITE, &options),
        None if options.decoder => measure(&decoder::SUITE, &options),
        None => measure(&LAUNCHES, &options),
    }
}

/// Where the programs and the libraries are.
struct Place {
    rust: PathBuf,
    /// The C program compiled elsewhere, for where there is no C compiler.
    c: Option<PathBuf>,
    libraries: PathBuf,
    /// With the folders `c` and `python`.
    benches: PathBuf,
    /// How to repeat the run.
    command: String,
}

fn measure(suite: &'static Suite, options: &Options) -> Result<()> {
    let started = Instant::now();
    let (usual, least) = suite.blocks;
    let blocks = options.blocks.unwrap_or(usual);
    if blocks < least {
        refuse!("--blocks is {blocks}; expected {least} or more, so that what is asked in some blocks is asked in ten");
    }
    let blocks = usize::from(blocks);
    if !has_gpu() {
        refuse!(
            "calls are measured on a GPU, and there is none here: nvidia-smi lists none; run it on a machine with one \
             (`cargo xtask gpu-bundle` packs all that it needs), or count instructions with `cargo xtask bench --check`"
        );
    }
    let mut chosen = String::new();
    for (option, names) in [("--without", &options.without), ("--only", &options.only)] {
        if !names.is_empty() {
            chosen += &format!(" {option} {}", names.join(","));
        }
    }
    let command = |start: &str| format!("{start}{} --blocks {blocks}{chosen}", suite.option);
    let place = match &options.bundle {
        Some(bundle) => packed(suite, bundle, command),
        None => built(suite, command)?,
    };
    let out = options.out.clone().unwrap_or_else(|| shell::root().join("docs/performance"));
    fs::create_dir_all(&out).map_err(|e| Error::io("creating", &out, &e))?;
    let temporary = tempfile::tempdir().map_err(|e| Error::io("creating a folder in", &std::env::temp_dir(), &e))?;
    let mut c = temporary.path().join(suite.c);
    match (compile_c(suite, &place.benches, &c), &place.c) {
        (Ok(()), _) => {}
        (Err(fault), Some(packed)) => {
            say(format!("{fault}; taking the program that was packed"));
            c.clone_from(packed);
        }
        (Err(fault), None) => return Err(fault),
    }
    let (values, description) = (suite.values(&out), suite.machine(&out));
    let earlier = match options.resume {
        true if !values.exists() => refuse!("--resume: there is no {}; measure without it first", values.display()),
        true => Some(Earlier::read(&values, &description)?),
        false => None,
    };
    let missing = missing(suite, &place, options)?;
    for Missing { arm, reason } in &missing {
        say(format!("without the arm {arm}: {reason}"));
    }
    // The values of a run that is under way, or failed.
    let partial = out.join(suite.name).with_extension("partial.csv");
    let mut writer = Writer::create(&partial)?;
    let first = earlier.as_ref().map_or(0, Earlier::blocks);
    if let Some(earlier) = &earlier {
        earlier.copy(&mut writer)?;
    }
    pin()?;
    let bar = ProgressBar::new(blocks as u64);
    let until = options.seconds.map(|seconds| started + Duration::from_secs(seconds));
    let (running, failures) = (BTreeMap::new(), Vec::new());
    let mut arms = Arms { suite, place: &place, c: &c, running, missing, failures, earlier, started, until, first };
    let mut machine = Machine::look(&place.libraries, blocks, place.command.clone())?;
    // Also now: with it the values of a run that was ended from outside can be written up.
    arms.describe(&machine, &out)?;
    for block in 0..blocks {
        if arms.is_late() {
            say(format!("{block} of {blocks} blocks were asked; the time is over"));
            // What is written up says how many there are, and not how many there were to be.
            machine.blocks = block;
            break;
        }
        arms.renew(block, blocks)?;
        let begin = Instant::now();
        arms.ask(block, blocks, &mut writer)?;
        let (took, sum) = (begin.elapsed().as_secs(), started.elapsed().as_secs());
        say(format!("block {} of {blocks} took {took} s; {sum} s so far", block + 1));
        bar.inc(1);
    }
    bar.finish_and_clear();
    arms.describe(&machine, &out)?;
    // All at once, while the report is written.
    let mut running: Vec<Arm> = arms.running.into_values().map(|(_, arm)| arm).collect();
    running.iter_mut().for_each(Arm::dismiss);
    fs::rename(&partial, &values).map_err(|e| Error::io("renaming", &partial, &e))?;
    let broken = render(suite, &out)?;
    running.into_iter().for_each(Arm::finish);
    say(format!("all of it took {} s", started.elapsed().as_secs()));
    if options.strict && !broken.is_empty() {
        refuse!("bounds that were not kept: {}", broken.join("; "));
    }
    Ok(())
}

/// nvidia-smi is not everywhere where a GPU is.
fn has_gpu() -> bool {
    provision::compute_capability().is_some() || Path::new("/dev/nvidiactl").exists() || Path::new("/dev/dxg").exists()
}

fn packed(suite: &Suite, bundle: &Path, command: impl Fn(&str) -> String) -> Place {
    Place {
        rust: bundle.join("bin").join(suite.rust.name()),
        c: Some(suite.packed_c(bundle)),
        libraries: std::env::var_os(LIB_DIR).map_or_else(|| bundle.join("lib"), PathBuf::from),
        benches: bundle.join("benches"),
        command: command("cargo xtask gpu-bundle --out DIR, then on the GPU machine DIR/bench DIR/performance"),
    }
}

fn built(suite: &Suite, command: impl Fn(&str) -> String) -> Result<Place> {
    provision::kernels(&crate::recipes::usual()?)?;
    say("building in release mode");
    let (executables, libraries) = crate::messages::collect(&bundle::build(suite.rust)?);
    let name = suite.rust.name();
    let Some(rust) = executables.get(name) else { refuse!("cargo built no {name}") };
    let Some(libraries) = libraries else { refuse!("cargo did not say where the build script put the libraries") };
    let (rust, benches) = (rust.clone(), shell::root().join("benches"));
    Ok(Place { rust, c: None, libraries, benches, command: command("cargo xtask bench") })
}

/// The suite's C program, given the folder `benches`.
pub fn compile_c(suite: &Suite, benches: &Path, to: &Path) -> Result<()> {
    compile(&benches.join("c").join(suite.c).with_extension("c"), to, &[])
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

fn python(suite: &Suite, place: &Place) -> Command {
    let mut python = Command::new("python3");
    python.arg(place.benches.join("python").join(suite.python)).env(LIB_DIR, &place.libraries);
    python
}

/// The arms that shall not run, and those of Python that cannot. Asked all at once: each imports a good deal.
fn missing(suite: &Suite, place: &Place, options: &Options) -> Result<Vec<Missing>> {
    let is_unknown = |name: &&String| !suite.arms.iter().any(|arm| names(std::slice::from_ref(*name), arm.name));
    if let Some(unknown) = options.without.iter().chain(&options.only).find(is_unknown) {
        let names: Vec<_> = suite.arms.iter().map(|arm| arm.name).collect();
        refuse!("--without or --only names {unknown}; expected arms: {}", names.join(", "));
    }
    let all = thread::scope(|scope| {
        let probes: Vec<_> = suite
            .arms
            .iter()
            .map(|arm| {
                let probe = move || match arm.program {
                    _ if names(&options.without, arm.name) => Err(Missing::chosen(arm.name, "--without")),
                    _ if !options.only.is_empty() && !names(&options.only, arm.name) => {
                        Err(Missing::chosen(arm.name, "--only"))
                    }
                    Program::Python if options.no_python => Err(Missing::chosen(arm.name, "--no-python")),
                    Program::Python => process::probe(python(suite, place).args(["--probe", arm.name]), PATIENCE)
                        .map_err(|reason| Missing { arm: arm.name.to_owned(), reason }),
                    Program::Rust | Program::C => Ok(()),
                };
                (arm.name, scope.spawn(probe))
            })
            .collect();
        let answer = |(arm, probe): (&str, thread::ScopedJoinHandle<'_, _>)| {
            let failed = || Missing { arm: arm.to_owned(), reason: "its probe failed within xtask".to_owned() };
            probe.join().unwrap_or_else(|_| Err(failed())).err()
        };
        probes.into_iter().filter_map(answer).collect()
    });
    Ok(all)
}

/// Whether a list of arms has one: by its name, or by what it begins with and a star.
fn names(list: &[String], arm: &str) -> bool {
    list.iter().any(|name| name.strip_suffix('*').map_or(name == arm, |start| arm.starts_with(start)))
}

/// The processes of a run, and what of it came to nothing.
struct Arms<'a> {
    suite: &'static Suite,
    place: &'a Place,
    c: &'a Path,
    /// By name, and which of its arm's processes each is.
    running: BTreeMap<&'static str, (usize, Arm)>,
    missing: Vec<Missing>,
    failures: Vec<Failure>,
    /// The runs that this one goes on behind.
    earlier: Option<Earlier>,
    started: Instant,
    /// Nothing is asked from then on.
    until: Option<Instant>,
    /// The number of the first block.
    first: usize,
}

/// An arm has so long to start and to answer even where the time is nearly over.
const LEAST_PATIENCE: Duration = Duration::from_secs(10);

impl Arms<'_> {
    fn is_late(&self) -> bool {
        self.until.is_some_and(|until| Instant::now() >= until)
    }

    /// Writes down the machine, and what came to nothing so far.
    fn describe(&self, machine: &Machine, out: &Path) -> Result<()> {
        let (missing, failures) = (self.missing.clone(), self.failures.clone());
        let seconds = Some(self.started.elapsed().as_secs());
        let mut machine = Machine { missing, failures, seconds, ..machine.clone() };
        if let Some(earlier) = &self.earlier {
            machine = machine.behind(&earlier.machine)?;
        }
        let mut text = serde_json::to_string_pretty(&machine).unwrap_or_default();
        text.push('\n');
        publish_bytes(&self.suite.machine(out), text.as_bytes())
    }

    /// Starts every arm that is not missing, and has no process or one that is not for this block; waits until all are ready.
    fn renew(&mut self, block: usize, blocks: usize) -> Result<()> {
        let first = self.running.is_empty();
        let mut started = Vec::new();
        for arm in self.suite.arms.iter().filter(|arm| self.missing.iter().all(|missing| missing.arm != arm.name)) {
            let generation = (self.suite.generation)(arm.program, block, blocks);
            if self.running.get(arm.name).is_none_or(|(running, _)| *running != generation) {
                started.push((arm, generation));
            }
        }
        for (arm, _) in &started {
            self.running.remove(arm.name).into_iter().for_each(|(_, earlier)| earlier.finish());
        }
        let left = self.until.map(|until| until.saturating_duration_since(Instant::now()).max(LEAST_PATIENCE));
        let patience = left.map_or(self.suite.patience, |left| left.min(self.suite.patience));
        let start = |(arm, generation): (&'static plan::Arm, usize)| {
            let mut command = match arm.program {
                Program::Rust => Command::new(&self.place.rust),
                Program::C => Command::new(self.c),
                Program::Python => python(self.suite, self.place),
            };
            command.env(LIB_DIR, &self.place.libraries);
            (arm.name, generation, Arm::start(arm.name, command, patience))
        };
        let started: Vec<_> = started.into_iter().map(start).collect();
        for (name, generation, arm) in started {
            match arm.and_then(|mut arm| arm.ready().map(|()| arm)) {
                Ok(arm) => drop(self.running.insert(name, (generation, arm))),
                Err(fault) if self.suite.tolerant => self.give_up(name, fault.to_string()),
                Err(fault) => return Err(fault),
            }
        }
        if first || !self.suite.tolerant {
            say(format!("{} arms are ready after {} s", self.running.len(), self.started.elapsed().as_secs()));
        }
        Ok(())
    }

    fn give_up(&mut self, arm: &str, reason: String) {
        say(format!("from here on without the arm {arm}: {reason}"));
        self.missing.push(Missing { arm: arm.to_owned(), reason });
    }

    /// Asks everything of a block that there is time for, and writes each answer as it comes: a run that fails leaves what it had,
    /// under another name.
    fn ask(&mut self, block: usize, blocks: usize, writer: &mut Writer) -> Result<()> {
        for question in (self.suite.questions)().iter().filter(|question| question.blocks.includes(block, blocks)) {
            if self.is_late() {
                break;
            }
            let mut answers = vec![Vec::new(); question.arms.len()];
            for round in 0..question.rounds {
                // In any order, the same in every run, so that none always follows the same one.
                let mut turns: Vec<usize> = (0..question.arms.len()).collect();
                Rng::with_seed((block * question.rounds + round) as u64).shuffle(&mut turns);
                for turn in turns {
                    if question.blocks == Blocks::First && self.is_known(question.arms[turn], &question.case) {
                        continue;
                    }
                    let answer = self.ask_one(question.arms[turn], &question.case, (block, blocks));
                    if answer.is_err() {
                        writer.flush()?;
                    }
                    answers[turn].extend(answer?);
                }
            }
            let mut shown = String::new();
            for (name, answers) in question.arms.iter().zip(&answers) {
                if let Some(summary) = stats::summary(answers) {
                    writer.add(&Sample::new(self.first + block, name, &question.case, summary.median))?;
                    shown += &format!(", {name} {:.1}", summary.median);
                }
            }
            writer.flush()?;
            if self.until.is_some() {
                say(format!("block {} of {blocks}, {}{shown}", block + 1, question.case));
            }
        }
        Ok(())
    }

    fn is_known(&self, arm: &str, case: &str) -> bool {
        self.earlier.as_ref().is_some_and(|earlier| earlier.has(arm, case))
    }

    /// Nothing where an arm is missing or has not the case, or, in a suite that goes on then, failed it.
    fn ask_one(&mut self, name: &'static str, case: &str, (block, blocks): (usize, usize)) -> Result<Option<f64>> {
        if self.failures.iter().any(|failure| failure.arm == name && failure.case == case) {
            return Ok(None);
        }
        let Some((_, arm)) = self.running.get_mut(name) else { return Ok(None) };
        let fault = match arm.ask(case) {
            Err(fault) if self.suite.tolerant => fault,
            answer => return answer,
        };
        say(&fault);
        let text = fault.to_string();
        let reason = text.strip_prefix(&format!("arm {name}, asked `{case}`: ")).unwrap_or(&text).to_owned();
        self.failures.push(Failure { arm: name.to_owned(), case: case.to_owned(), reason });
        if arm.has_ended() {
            // One that hangs would do so again.
            if arm.hangs() {
                self.give_up(name, text);
            }
            self.running.remove(name);
            self.renew(block, blocks)?;
        }
        Ok(None)
    }
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

fn render_all(folder: &Path) -> Result<()> {
    let there: Vec<_> = SUITES.into_iter().filter(|suite| suite.values(folder).exists()).collect();
    if there.is_empty() {
        let names: Vec<_> = SUITES.iter().map(|suite| format!("{}.csv", suite.name)).collect();
        refuse!("{} has no {}; measure first", folder.display(), names.join(" and no "));
    }
    there.into_iter().try_for_each(|suite| render(suite, folder).map(drop))
}

/// Writes the report and the figures from the values; answers the bounds that were not kept.
fn render(suite: &Suite, folder: &Path) -> Result<Vec<String>> {
    let samples = Samples::read(&suite.values(folder))?;
    let machine = Machine::read(&suite.machine(folder))?;
    let report = folder.join(suite.name).with_extension("md");
    publish_bytes(&report, (suite.report)(&machine, &samples).as_bytes())?;
    for (name, svg) in (suite.figures)(&samples)? {
        publish_bytes(&folder.join(name), svg.as_bytes())?;
    }
    let comparisons = (suite.comparisons)();
    print!("{}", report::bounds(comparisons, &samples));
    say(format!("written to {}", folder.display()));
    let broken = comparisons.iter().filter_map(|comparison| {
        let verdict = comparison.verdict(comparison.found(&samples));
        matches!(verdict, Verdict::Missed | Verdict::NotMeasured).then(|| {
            format!("{} ({}): {}", comparison.what, comparison.case(), report::verdict(verdict).trim_matches('*'))
        })
    });
    Ok(broken.collect())
}
