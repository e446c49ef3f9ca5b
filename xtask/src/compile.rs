//! Objects, named by all that they depend on: a killed run finds what it had made, and nothing stale is ever linked.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::thread;

use indicatif::{MultiProgress, ProgressBar};

use crate::compiler::Toolchain;
use crate::shell::{self, say};
use crate::vendoring::digest::{Digest, Hasher};
use crate::vendoring::env::Env;
use crate::vendoring::error::{Error, Result, refuse};

/// FlashInfer's variable for the number of compilers at once.
const MAX_JOBS: &str = "MAX_JOBS";

/// One object to be made, or made before.
pub struct Object {
    pub key: Digest,
    source: String,
    flags: Vec<String>,
    memory: u64,
}

impl Object {
    pub fn path(&self, store: &Path) -> PathBuf {
        store.join(format!("{}.o", self.key))
    }
}

/// Describes an object. Its key covers the sources as a whole, the compilers, the flags and the file.
pub fn object(toolchain: &Toolchain, source: &str, flags: &[String], memory: u64) -> Result<Object> {
    let path = toolchain.tree.join(source);
    let text = fs::read(&path).map_err(|e| Error::io("reading", &path, &e))?;
    let mut hasher = Hasher::new();
    for part in [toolchain.identity.as_bytes(), flags.join("\n").as_bytes(), source.as_bytes(), &text] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    Ok(Object { key: hasher.finish(), source: source.to_owned(), flags: flags.to_vec(), memory })
}

/// Makes what is not there yet, as many at once as cores and memory allow.
pub fn all<'a>(
    toolchain: &Toolchain,
    store: &Path,
    objects: impl Iterator<Item = &'a Object>,
    env: &Env,
) -> Result<()> {
    fs::create_dir_all(store).map_err(|e| Error::io("creating the folder", store, &e))?;
    let (done, missing): (Vec<_>, VecDeque<_>) = {
        let (done, missing): (Vec<&Object>, Vec<&Object>) = objects.partition(|object| object.path(store).is_file());
        (done, missing.into())
    };
    if missing.is_empty() {
        return Ok(());
    }
    let largest = missing.iter().map(|object| object.memory).max().unwrap_or(1);
    let jobs = jobs(largest, env)?.min(missing.len());
    let total = missing.len();
    say(format!("compiling {total} files, {jobs} at once; {} were made before", done.len()));
    let bars = MultiProgress::new();
    let queue = Mutex::new(missing);
    let fault = Mutex::new(None);
    let finished = Mutex::new(0);
    thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let failed = lock(&fault).is_some();
                    let Some(object) = lock(&queue).pop_front().filter(|_| !failed) else { break };
                    let bar = bars.add(shell::step_bar());
                    bar.set_message(object.source.clone());
                    let result = compile(toolchain, store, object);
                    report(&bar, object, &result, &finished, total);
                    if let Err(error) = result {
                        lock(&fault).get_or_insert(error);
                    }
                }
            });
        }
    });
    match fault.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

fn report(bar: &ProgressBar, object: &Object, result: &Result<()>, finished: &Mutex<usize>, total: usize) {
    let elapsed = bar.elapsed().as_secs();
    bar.finish_and_clear();
    let mut finished = lock(finished);
    *finished += 1;
    let outcome = if result.is_ok() { "" } else { " FAILED" };
    say(format!("[{finished}/{total}] {} in {elapsed} s{outcome}", object.source));
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn compile(toolchain: &Toolchain, store: &Path, object: &Object) -> Result<()> {
    let temporary = tempfile::Builder::new().prefix(".tmp-").suffix(".o").tempfile_in(store);
    let temporary = temporary.map_err(|e| Error::io("writing to the folder", store, &e))?.into_temp_path();
    // nvcc finds its own parts by the path it was started with.
    let mut command = Command::new(&toolchain.nvcc);
    command.current_dir(&toolchain.tree).args(&object.flags).args(["-c", &object.source, "-o"]).arg(&temporary);
    shell::quietly(&mut command)?;
    let path = object.path(store);
    temporary.persist(&path).map_err(|e| Error::io("naming", &path, &e.error))
}

fn jobs(memory: u64, env: &Env) -> Result<usize> {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let fitting = available_memory().map_or(cores, |available| (available / memory).max(1) as usize);
    let Some(limit) = env.text(MAX_JOBS) else { return Ok(cores.min(fitting)) };
    match limit.parse::<usize>() {
        Ok(limit) if limit > 0 => Ok(limit),
        _ => refuse!("{MAX_JOBS}={limit} is not a number of jobs; set it to 1 or more, or unset it"),
    }
}

/// What the kernel thinks can be taken without swapping, in bytes.
fn available_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("MemAvailable:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}
