//! Small things that every command uses: where things are, progress bars, running programs.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::vendoring::env::{self, Env};
use crate::vendoring::error::{Error, Result, refuse};

/// The checkout.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new(".")).to_owned()
}

/// This machine, as artifacts.lock names targets: xtask builds for where it runs.
pub fn target() -> String {
    format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS)
}

/// xtask's part of the cache folder.
pub fn cache(env: &Env) -> Result<PathBuf> {
    match env.cache_dir()? {
        Some(root) => Ok(root.join("xtask")),
        None => refuse!("there is no cache folder: set HOME, or {} to a folder that can be written", env::CACHE_DIR),
    }
}

pub fn say(text: impl std::fmt::Display) {
    eprintln!("xtask: {text}");
}

/// A bar for a transfer whose size may be known.
pub fn transfer_bar(name: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("  {msg} {bytes} of {total_bytes} at {bytes_per_sec}, {eta} left");
    let bar = ProgressBar::new(0).with_message(name.to_owned());
    style.map_or(bar.clone(), |style| bar.with_style(style))
}

/// What a download tells its bar.
pub fn progress(bar: &ProgressBar) -> impl FnMut(u64, Option<u64>) + '_ {
    |done, total| {
        bar.set_length(total.unwrap_or(0));
        bar.set_position(done);
    }
}

/// A line for one step under way, with the time it has taken.
pub fn step_bar() -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    bar.enable_steady_tick(Duration::from_millis(200));
    match ProgressStyle::with_template("  {elapsed:>4} {msg}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// Runs a program with the terminal's own input and output.
pub fn run(command: &mut Command) -> Result<()> {
    let shown = shown(command);
    say(format!("$ {shown}"));
    let status = command.status().map_err(|e| cannot_start(&shown, &e))?;
    if !status.success() {
        refuse!("`{shown}` ended with {status}");
    }
    Ok(())
}

/// Runs a program and answers what it wrote to standard output; its errors go to the terminal.
pub fn output(command: &mut Command) -> Result<String> {
    let shown = shown(command);
    let output = command.stderr(Stdio::inherit()).output().map_err(|e| cannot_start(&shown, &e))?;
    if !output.status.success() {
        refuse!("`{shown}` ended with {}", output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a program silently; on failure all that it wrote is in the error.
pub fn quietly(command: &mut Command) -> Result<()> {
    let shown = shown(command);
    let output = command.output().map_err(|e| cannot_start(&shown, &e))?;
    if !output.status.success() {
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        refuse!("`{shown}` ended with {}:\n{out}{err}", output.status);
    }
    Ok(())
}

fn cannot_start(shown: &str, error: &std::io::Error) -> Error {
    Error::Refused(format!("`{shown}` cannot be started: {error}; install the program or correct its path"))
}

fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

/// The cargo that started xtask.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    command.current_dir(root());
    command
}

/// Copies a file under a temporary name, then gives it its own.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    let mut source = std::fs::File::open(from).map_err(|e| Error::io("opening", from, &e))?;
    crate::vendoring::store::publish(to, |file| {
        std::io::copy(&mut source, file).map_err(|e| Error::io("writing", to, &e))?;
        Ok(())
    })
}
