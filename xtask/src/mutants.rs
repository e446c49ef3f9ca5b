//! `cargo xtask mutants`: which changes to the files of build/ no test would notice. cargo-mutants makes the changes, one at
//! a time, and runs the tests that compile these files; parts that were run on different days add up.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Args;
use serde::Deserialize;

use crate::shell;
use crate::vendoring::digest::Hasher;
use crate::vendoring::env::SKIP_VENDOR;
use crate::vendoring::error::{Error, Result, refuse};

/// The release of cargo-mutants whose options and results these are.
const VERSION: &str = "27.1.0";
/// The tests that compile build/ by `#[path]` and need no kernels.
const TESTS: [&str; 8] =
    ["addresses", "build_script", "cache", "hostile_wheels", "kernels", "network", "network_settings", "vendoring"];
/// How cargo-mutants comes from xtask's files to those of build/, and begins their names.
const WAY: &str = "xtask/src/../../";
/// What cargo-mutants ends with where it did its work: every change was noticed, some were not, some ran out of time.
const DONE: [i32; 3] = [0, 2, 3];

#[derive(Args)]
pub struct Options {
    /// Run one part of N only, K/N with K from 0 on: cargo-mutants' `--shard`
    #[arg(long, value_name = "K/N")]
    part: Option<Part>,
    /// Change only this file of build/, `digest.rs` for example; may be given several times
    #[arg(long)]
    file: Vec<String>,
    /// Run nothing: sum up what was run before
    #[arg(long, conflicts_with_all = ["part", "file"])]
    summary: bool,
    /// Where results are kept from run to run, those of other states of build/ apart; default: target/mutants
    #[arg(long)]
    out: Option<PathBuf>,
}

/// One part of several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    number: u32,
    of: u32,
}

impl std::str::FromStr for Part {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let part = text.split_once('/').and_then(|(k, n)| Some(Self { number: k.parse().ok()?, of: n.parse().ok()? }));
        part.filter(|part| part.number < part.of).ok_or_else(|| {
            format!("`{text}` is no part: expected K/N with K from 0 to N - 1, `0/8` for the first of eight")
        })
    }
}

/// `outcomes.json` of cargo-mutants, as far as it is of use here.
#[derive(Deserialize)]
struct Outcomes {
    outcomes: Vec<Outcome>,
}

#[derive(Deserialize)]
struct Outcome {
    scenario: Scenario,
    summary: Verdict,
}

#[derive(Deserialize)]
enum Scenario {
    /// The files as they are.
    Baseline,
    Mutant(Mutant),
}

#[derive(Deserialize)]
struct Mutant {
    /// The place, and what was changed.
    name: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
enum Verdict {
    Success,
    #[serde(rename = "CaughtMutant")]
    Caught,
    #[serde(rename = "MissedMutant")]
    Missed,
    Unviable,
    Failure,
    Timeout,
}

/// What came of each change, over all parts that were run.
#[derive(Default)]
struct Summary {
    /// How many changes there are, where cargo-mutants said so.
    all: usize,
    verdicts: BTreeMap<String, Verdict>,
}

impl Summary {
    /// Takes up a part's results. Of a change that another part had too, the later verdict counts.
    fn add(&mut self, json: &str) -> std::result::Result<(), serde_json::Error> {
        for Outcome { scenario, summary } in serde_json::from_str::<Outcomes>(json)?.outcomes {
            if let Scenario::Mutant(mutant) = scenario {
                self.verdicts.insert(mutant.name.strip_prefix(WAY).unwrap_or(&mutant.name).to_owned(), summary);
            }
        }
        Ok(())
    }

    fn with(&self, verdict: Verdict) -> Vec<&str> {
        self.verdicts.iter().filter(|(_, found)| **found == verdict).map(|(name, _)| name.as_str()).collect()
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [caught, unviable] = [Verdict::Caught, Verdict::Unviable].map(|verdict| self.with(verdict).len());
        let named = [
            ("missed", self.with(Verdict::Missed)),
            ("out of time", self.with(Verdict::Timeout)),
            ("without a verdict", [self.with(Verdict::Failure), self.with(Verdict::Success)].concat()),
        ];
        write!(f, "{} of {} changes tried: {caught} caught, {unviable} do not compile", self.verdicts.len(), self.all)?;
        named.iter().try_for_each(|(what, names)| write!(f, ", {} {what}", names.len()))?;
        for (what, names) in named.iter().filter(|(_, names)| !names.is_empty()) {
            write!(f, "\n{what}:")?;
            names.iter().try_for_each(|name| write!(f, "\n  {name}"))?;
        }
        Ok(())
    }
}

pub fn command(options: &Options) -> Result<()> {
    installed()?;
    // build/'s own files: results for other ones say nothing of these.
    let sources = sources()?;
    if let Some(unknown) = options.file.iter().find(|name| !sources.contains_key(*name)) {
        let known: Vec<&str> = sources.keys().map(String::as_str).collect();
        refuse!("there is no build/{unknown}; expected one of {}", known.join(", "));
    }
    let mut hasher = Hasher::new();
    sources.iter().for_each(|(name, text)| hasher.update(format!("{name} {}\n{text}", text.len()).as_bytes()));
    let state = &hasher.finish().to_string()[..12];
    let folder = options.out.clone().unwrap_or_else(|| shell::root().join("target/mutants")).join(state);
    let folder = std::path::absolute(&folder).map_err(|e| Error::io("looking for", &folder, &e))?;
    if !options.summary {
        run(options, &folder)?;
    }
    let summary = summary(&folder)?;
    println!("{summary}");
    shell::say(format!("kept in {}", folder.display()));
    match summary.with(Verdict::Missed).len() {
        0 => Ok(()),
        missed => refuse!("no test notices {missed} of these changes: each wants a test, or a reason why it is none"),
    }
}

/// Whether cargo has the command, in a release that has these options.
fn installed() -> Result<()> {
    let remedy = format!("install it by `cargo install cargo-mutants --version {VERSION} --locked`");
    let output = shell::cargo().args(["mutants", "--version"]).output();
    let output = output.map_err(|e| Error::Refused(format!("cargo cannot be started: {e}")))?;
    if !output.status.success() {
        refuse!("cargo-mutants is not installed; {remedy}");
    }
    let found = String::from_utf8_lossy(&output.stdout);
    let found = found.trim();
    if !found.ends_with(VERSION) {
        shell::say(format!(
            "this is written for cargo-mutants {VERSION} and {found} is installed: if it fails, {remedy}"
        ));
    }
    Ok(())
}

/// The files of build/, by name, with what they say.
fn sources() -> Result<BTreeMap<String, String>> {
    let folder = shell::root().join("build");
    let entries = fs::read_dir(&folder).map_err(|e| Error::io("reading the folder", &folder, &e))?;
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).map_err(|e| Error::io("reading", &path, &e))?;
        Ok((path.file_name().unwrap_or_default().to_string_lossy().into_owned(), text))
    };
    let rust = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "rs");
    entries.flatten().map(|entry| entry.path()).filter(rust).map(read).collect()
}

/// cargo-mutants, for these files. It changes what libraries and programs are made of, which build/ is as a module of
/// xtask; the tests are the other package's.
fn mutants(files: &[String]) -> Command {
    let mut cargo = shell::cargo();
    cargo.args(["mutants", "--package", "xtask", "--no-default-features"]);
    match files {
        [] => _ = cargo.args(["--file", "**/build/*.rs"]),
        files => files.iter().for_each(|name| _ = cargo.args(["--file", &format!("**/build/{name}")])),
    }
    // Not by `--test-package`, which holds for the changes and not for the files as they are, that are tested first. And by
    // `--cargo-arg`, not behind `--`: else every test is compiled for every change.
    cargo.arg("--cargo-arg=--package=flashinfer-rs");
    for name in TESTS {
        cargo.arg(format!("--cargo-arg=--test={name}"));
    }
    // A change would break the build of the crate that is tested, and count as one that does not compile.
    cargo.arg("--cargo-arg=--locked").env(SKIP_VENDOR, "1");
    cargo
}

fn run(options: &Options, folder: &Path) -> Result<()> {
    let Part { number, of } = options.part.unwrap_or(Part { number: 0, of: 1 });
    let name = [options.file.as_slice(), &[format!("{number}-of-{of}")]].concat().join("-");
    let folder = folder.join(name);
    fs::create_dir_all(&folder).map_err(|e| Error::io("creating the folder", &folder, &e))?;
    let mut cargo = mutants(&options.file);
    cargo.arg("--shard").arg(format!("{number}/{of}")).arg("--output").arg(&folder);
    let status = cargo.status().map_err(|e| Error::Refused(format!("cargo mutants cannot be started: {e}")))?;
    if !status.code().is_some_and(|code| DONE.contains(&code)) {
        refuse!("cargo mutants ended with {status}; its logs are in {}", folder.join("mutants.out/log").display());
    }
    Ok(())
}

/// What all parts in the folder say, the oldest first.
fn summary(folder: &Path) -> Result<Summary> {
    let list = shell::output(mutants(&[]).args(["--list", "--json"]))?;
    let all: Vec<Mutant> =
        serde_json::from_str(&list).map_err(|e| Error::Refused(format!("what cargo mutants --list says: {e}")))?;
    let mut summary = Summary { all: all.len(), ..Summary::default() };
    let parts = fs::read_dir(folder).into_iter().flatten().flatten();
    let files = parts.map(|part| part.path().join("mutants.out/outcomes.json"));
    let dated = files.filter_map(|file| Some((fs::metadata(&file).ok()?.modified().ok()?, file)));
    let mut dated: Vec<_> = dated.collect();
    dated.sort();
    for (_, file) in dated {
        let json = fs::read_to_string(&file).map_err(|e| Error::io("reading", &file, &e))?;
        summary.add(&json).map_err(|e| {
            Error::Refused(format!("{}: {e}; written by cargo-mutants {VERSION}? Else remove it", file.display()))
        })?;
    }
    Ok(summary)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As cargo-mutants writes it, for changes and what came of them.
    fn outcomes(rows: &[(&str, &str)]) -> String {
        let mut outcomes = vec![r#"{"scenario":"Baseline","summary":"Success","phase_results":[]}"#.to_owned()];
        for (name, summary) in rows {
            let mutant = format!(r#"{{"name":"{name}","package":"xtask","file":"build/x.rs","genre":"FnValue"}}"#);
            outcomes.push(format!(r#"{{"scenario":{{"Mutant":{mutant}}},"summary":"{summary}","phase_results":[]}}"#));
        }
        format!(r#"{{"outcomes":[{}],"total_mutants":{},"missed":0}}"#, outcomes.join(","), rows.len())
    }

    #[test]
    fn parts_add_up_and_the_later_verdict_counts() {
        let mut summary = Summary { all: 9, ..Summary::default() };
        for part in [
            outcomes(&[
                ("xtask/src/../../build/a.rs: 1", "CaughtMutant"),
                ("b", "MissedMutant"),
                ("xtask/src/../../build/c.rs: 2", "MissedMutant"),
            ]),
            outcomes(&[("b", "CaughtMutant"), ("d", "Unviable"), ("e", "Timeout"), ("f", "Failure")]),
        ] {
            summary.add(&part).expect("what cargo-mutants writes");
        }
        let expected = "6 of 9 changes tried: 2 caught, 1 do not compile, 1 missed, 1 out of time, 1 without a verdict\n\
                        missed:\n  build/c.rs: 2\nout of time:\n  e\nwithout a verdict:\n  f";
        assert_eq!(summary.to_string(), expected);
    }

    #[test]
    fn results_of_another_shape_are_refused() {
        assert!(Summary::default().add(r#"{"outcomes":[{"scenario":"Baseline","summary":"Fine"}]}"#).is_err());
    }

    #[test]
    fn parts_are_counted_from_nought() {
        assert_eq!("0/8".parse(), Ok(Part { number: 0, of: 8 }));
        for wrong in ["8/8", "1", "1/0", "-1/2", "a/b", "1/2/3"] {
            let fault = wrong.parse::<Part>().expect_err(wrong);
            assert!(fault.contains(&format!("`{wrong}`")), "{fault}");
        }
    }

    #[test]
    fn every_test_of_the_build_is_there_and_compiles_build() {
        for name in TESTS {
            let path = shell::root().join(format!("tests/{name}.rs"));
            let text = fs::read_to_string(&path).expect("a test");
            assert!(text.contains("#[path = \"../build/"), "{name}");
        }
    }
}
