//! What a run leaves behind: every value, and a description of the machine. Everything that is drawn or written is a
//! function of these two files.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use serde::{Deserialize, Serialize};

use super::plan;
use crate::vendoring::digest::hash_reader;
use crate::vendoring::error::{Error, Result, refuse};

/// One answer of one arm.
#[derive(Serialize, Deserialize)]
pub struct Sample {
    block: usize,
    arm: String,
    case: String,
    value: f64,
    unit: String,
}

impl Sample {
    pub fn new(block: usize, arm: &str, case: &str, value: f64) -> Self {
        Self { block, arm: arm.to_owned(), case: case.to_owned(), value, unit: plan::unit(case).to_owned() }
    }
}

/// By arm and case, then by block.
pub struct Samples(BTreeMap<(String, String), BTreeMap<usize, f64>>);

impl FromIterator<Sample> for Samples {
    fn from_iter<T: IntoIterator<Item = Sample>>(samples: T) -> Self {
        let mut all: BTreeMap<_, BTreeMap<_, _>> = BTreeMap::new();
        for Sample { block, arm, case, value, .. } in samples {
            all.entry((arm, case)).or_default().insert(block, value);
        }
        Self(all)
    }
}

impl Samples {
    pub fn read(path: &Path) -> Result<Self> {
        let mut reader = csv::Reader::from_path(path).map_err(|e| csv_error("reading", path, &e))?;
        reader.deserialize().collect::<csv::Result<Self>>().map_err(|e| csv_error("reading", path, &e))
    }

    pub fn blocks(&self, arm: &str, case: &str) -> Option<&BTreeMap<usize, f64>> {
        self.0.get(&(arm.to_owned(), case.to_owned()))
    }

    pub fn values(&self, arm: &str, case: &str) -> Vec<f64> {
        self.blocks(arm, case).into_iter().flat_map(BTreeMap::values).copied().collect()
    }
}

/// What earlier runs left, behind which another goes on.
pub struct Earlier {
    samples: Vec<Sample>,
    pub machine: Machine,
}

impl Earlier {
    pub fn read(values: &Path, machine: &Path) -> Result<Self> {
        let mut reader = csv::Reader::from_path(values).map_err(|e| csv_error("reading", values, &e))?;
        let samples = reader.deserialize().collect::<csv::Result<_>>().map_err(|e| csv_error("reading", values, &e))?;
        Ok(Self { samples, machine: Machine::read(machine)? })
    }

    /// The number of the next block.
    pub fn blocks(&self) -> usize {
        self.samples.iter().map(|sample| sample.block + 1).max().unwrap_or(0)
    }

    /// Whether there is a value of an arm's case.
    pub fn has(&self, arm: &str, case: &str) -> bool {
        self.samples.iter().any(|sample| (sample.arm.as_str(), sample.case.as_str()) == (arm, case))
    }

    pub fn copy(&self, writer: &mut Writer) -> Result<()> {
        self.samples.iter().try_for_each(|sample| writer.add(sample))?;
        writer.flush()
    }
}

fn csv_error(doing: &str, path: &Path, error: &csv::Error) -> Error {
    match error.kind() {
        csv::ErrorKind::Io(e) => Error::io(doing, path, e),
        _ => Error::Refused(format!(
            "{doing} {} failed: {error}; expected what `cargo xtask bench` writes: block,arm,case,value,unit",
            path.display()
        )),
    }
}

/// Writes values as they come.
pub struct Writer<'a> {
    path: &'a Path,
    csv: csv::Writer<File>,
}

impl<'a> Writer<'a> {
    pub fn create(path: &'a Path) -> Result<Self> {
        let csv = csv::Writer::from_path(path).map_err(|e| csv_error("creating", path, &e))?;
        Ok(Self { path, csv })
    }

    pub fn add(&mut self, sample: &Sample) -> Result<()> {
        self.csv.serialize(sample).map_err(|e| csv_error("writing", self.path, &e))
    }

    pub fn flush(&mut self) -> Result<()> {
        self.csv.flush().map_err(|e| Error::io("writing", self.path, &e))
    }
}

#[derive(Clone, Serialize, Deserialize)]
pub struct Machine {
    /// As nvidia-smi says; none where it is not there.
    pub gpu: Option<String>,
    pub driver: Option<String>,
    pub cpu: String,
    pub cores: usize,
    pub kernel: String,
    /// Of flashinfer-rs.
    pub version: String,
    pub libraries: Vec<Library>,
    pub blocks: usize,
    /// What all of it took, with the arms' starts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<u64>,
    /// How to repeat it.
    pub command: String,
    pub missing: Vec<Missing>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failures: Vec<Failure>,
}

#[derive(Clone, Serialize, Deserialize)]
pub struct Library {
    pub file: String,
    pub sha256: String,
}

/// An arm that could not be measured here.
#[derive(Clone, Serialize, Deserialize)]
pub struct Missing {
    pub arm: String,
    pub reason: String,
}

impl Missing {
    /// Of an arm that is left out because somebody said so.
    pub fn chosen(arm: &str, option: &str) -> Self {
        Self { arm: arm.to_owned(), reason: format!("{LEFT_OUT}{option}") }
    }

    fn is_chosen(&self) -> bool {
        self.reason.starts_with(LEFT_OUT)
    }
}

const LEFT_OUT: &str = "left out by ";

/// A case that an arm failed.
#[derive(Clone, Serialize, Deserialize)]
pub struct Failure {
    pub arm: String,
    pub case: String,
    pub reason: String,
}

/// The kernel's release; what a distribution or a provider appends says nothing of speed.
fn kernel() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    release.trim().split('-').next().unwrap_or_default().to_owned()
}

impl Machine {
    /// What there is to see; what could not be measured is added by whoever knows.
    pub fn look(libraries: &Path, blocks: usize, command: String) -> Result<Self> {
        let (gpu, driver) = gpu().unzip();
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpu =
            cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map(|(_, name)| name);
        Ok(Self {
            gpu,
            driver,
            cpu: cpu.unwrap_or("unknown").trim().to_owned(),
            cores: cpuinfo.lines().filter(|line| line.starts_with("processor")).count(),
            kernel: kernel(),
            version: version()?,
            libraries: digests(libraries)?,
            blocks,
            seconds: None,
            command,
            missing: Vec::new(),
            failures: Vec::new(),
        })
    }

    /// Of this run and earlier ones together, which must have been of the same things.
    pub fn behind(self, earlier: &Self) -> Result<Self> {
        let same = |what: &str, earlier: &str, now: &str| {
            if earlier != now {
                refuse!(
                    "--resume: the earlier values are of the {what} {earlier}, and this is {now}: they cannot be compared; write to \
                     another folder, or measure all of it anew without --resume"
                );
            }
            Ok(())
        };
        let shown = |what: &Option<String>| what.clone().unwrap_or_else(|| "unknown".to_owned());
        same("GPU", &shown(&earlier.gpu), &shown(&self.gpu))?;
        same("driver", &shown(&earlier.driver), &shown(&self.driver))?;
        same("flashinfer-rs", &earlier.version, &self.version)?;
        let digests = |machine: &Self| {
            machine.libraries.iter().map(|library| format!("{} {}", library.file, library.sha256)).collect::<Vec<_>>()
        };
        same("libraries", &digests(earlier).join(", "), &digests(&self).join(", "))?;
        // An arm is there if it was there once. Why it was not is told by the run that tried.
        let both = self.missing.into_iter().filter_map(|now| {
            let before = earlier.missing.iter().find(|before| before.arm == now.arm)?;
            Some(if now.is_chosen() { before.clone() } else { now })
        });
        let missing = both.collect();
        let mut failures = earlier.failures.clone();
        for failure in self.failures {
            if !failures.iter().any(|known| (&known.arm, &known.case) == (&failure.arm, &failure.case)) {
                failures.push(failure);
            }
        }
        Ok(Self {
            blocks: earlier.blocks + self.blocks,
            seconds: earlier.seconds.zip(self.seconds).map(|(before, now)| before + now),
            command: format!("{}`, then `{}", earlier.command, self.command),
            missing,
            failures,
            ..self
        })
    }

    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read(path).map_err(|e| Error::io("reading", path, &e))?;
        serde_json::from_slice(&text).map_err(|e| {
            Error::Refused(format!("{} is not what `cargo xtask bench` writes: {e}; measure again", path.display()))
        })
    }
}

#[cfg(test)]
impl Machine {
    /// An imagined one, on which this command measured one block, without an arm and why.
    pub fn imagined(command: &str, arm: &str, reason: &str) -> Self {
        Self {
            gpu: Some("NVIDIA H100".to_owned()),
            driver: Some("580.1".to_owned()),
            cpu: "a CPU".to_owned(),
            cores: 8,
            kernel: "6.1".to_owned(),
            version: "0.1.0".to_owned(),
            libraries: vec![Library { file: "page.so".to_owned(), sha256: "abc".to_owned() }],
            blocks: 1,
            seconds: None,
            command: command.to_owned(),
            missing: vec![Missing { arm: arm.to_owned(), reason: reason.to_owned() }],
            failures: Vec::new(),
        }
    }
}

/// Name and driver of the first GPU.
fn gpu() -> Option<(String, String)> {
    let query = ["--query-gpu=name,driver_version", "--format=csv,noheader"];
    let output = Command::new("nvidia-smi").args(query).output().ok().filter(|output| output.status.success())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (name, driver) = text.lines().next()?.split_once(", ")?;
    Some((name.trim().to_owned(), driver.trim().to_owned()))
}

/// Of flashinfer-rs, as this program was compiled beside it: a bundle has no checkout.
fn version() -> Result<String> {
    let manifest: toml::Table = include_str!("../../../Cargo.toml")
        .parse()
        .map_err(|e| Error::Refused(format!("the Cargo.toml that xtask was compiled with cannot be read: {e}")))?;
    let version = manifest.get("package").and_then(|package| package.get("version")).and_then(toml::Value::as_str);
    let Some(version) = version else { refuse!("the Cargo.toml that xtask was compiled with names no version") };
    Ok(version.to_owned())
}

fn digests(folder: &Path) -> Result<Vec<Library>> {
    let mut libraries = Vec::new();
    for entry in fs::read_dir(folder).map_err(|e| Error::io("reading", folder, &e))?.flatten() {
        let file = entry.file_name().to_string_lossy().into_owned();
        if file.contains(".so") {
            let path = entry.path();
            let reader = File::open(&path).map_err(|e| Error::io("opening", &path, &e))?;
            let (digest, _) = hash_reader(reader).map_err(|e| Error::io("reading", &path, &e))?;
            libraries.push(Library { file, sha256: digest.to_string() });
        }
    }
    libraries.sort_by(|a, b| a.file.cmp(&b.file));
    Ok(libraries)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(missing: &[(&str, &str)]) -> Machine {
        let missing =
            missing.iter().map(|(arm, reason)| Missing { arm: (*arm).to_owned(), reason: (*reason).to_owned() });
        Machine {
            gpu: Some("NVIDIA H200".to_owned()),
            driver: None,
            cpu: "a CPU".to_owned(),
            cores: 8,
            kernel: "6.1".to_owned(),
            version: "0.1.0".to_owned(),
            libraries: vec![Library { file: "norm.so".to_owned(), sha256: "00".to_owned() }],
            blocks: 3,
            seconds: Some(100),
            command: "DIR/bench DIR/performance --decoder".to_owned(),
            missing: missing.collect(),
            failures: Vec::new(),
        }
    }

    #[test]
    fn runs_of_the_same_things_are_one() {
        let earlier = machine(&[("a", "no torch"), ("b", "left out by --only"), ("c", "no torch")]);
        let now = machine(&[("a", "left out by --only"), ("b", "no flashinfer"), ("d", "left out by --only")]);
        let joined = now.behind(&earlier).unwrap();
        let missing: Vec<_> = joined.missing.iter().map(|one| (one.arm.as_str(), one.reason.as_str())).collect();
        // What either run has is there; what neither has says why it could not be had.
        assert_eq!(missing, [("a", "no torch"), ("b", "no flashinfer")]);
        assert_eq!((joined.blocks, joined.seconds), (6, Some(200)));
    }

    #[test]
    fn values_of_another_gpu_or_of_other_libraries_are_not_joined() {
        let refused = |change: fn(&mut Machine)| {
            let mut earlier = machine(&[]);
            change(&mut earlier);
            machine(&[]).behind(&earlier).err().map(|error| error.to_string()).unwrap_or_default()
        };
        assert!(refused(|earlier| earlier.gpu = Some("NVIDIA H100".to_owned())).contains("NVIDIA H100"));
        assert!(refused(|earlier| earlier.libraries[0].sha256 = "01".to_owned()).contains("norm.so 01"));
        assert_eq!(refused(|earlier| earlier.cpu = "another".to_owned()), "");
    }

    #[test]
    fn a_run_that_goes_on_numbers_its_blocks_behind_the_earlier_ones() {
        let folder = tempfile::tempdir().unwrap();
        let (values, description) = (folder.path().join("x.csv"), folder.path().join("x.json"));
        let mut writer = Writer::create(&values).unwrap();
        for block in 0..3 {
            writer.add(&Sample::new(block, "ours", "step", 1.0)).unwrap();
        }
        writer.flush().unwrap();
        fs::write(&description, serde_json::to_string(&machine(&[])).unwrap()).unwrap();
        let earlier = Earlier::read(&values, &description).unwrap();
        assert_eq!(earlier.blocks(), 3);
        assert!(earlier.has("ours", "step") && !earlier.has("ours", "host") && !earlier.has("theirs", "step"));
        let again = folder.path().join("y.csv");
        let mut writer = Writer::create(&again).unwrap();
        earlier.copy(&mut writer).unwrap();
        writer.add(&Sample::new(earlier.blocks(), "ours", "step", 2.0)).unwrap();
        writer.flush().unwrap();
        assert_eq!(Samples::read(&again).unwrap().values("ours", "step"), [1.0, 1.0, 1.0, 2.0]);
    }
}
