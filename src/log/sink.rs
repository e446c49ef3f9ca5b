//! Where records go.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use super::settings::Destination;

/// A destination, opened with its first record.
pub(super) struct Sink {
    destination: Destination,
    file: Mutex<Option<File>>,
    complained: Once,
}

/// What is said a single time.
pub(super) struct Once(AtomicBool);

impl Once {
    pub(super) const fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    /// Says it on the standard error stream, the first time.
    pub(super) fn say(&self, what: impl FnOnce() -> String) {
        if !self.0.swap(true, Ordering::Relaxed) {
            // Where that cannot be written either, nobody is to be told.
            _ = writeln!(io::stderr(), "flashinfer-rs: {}", what());
        }
    }
}

impl Sink {
    pub(super) fn new(destination: Destination) -> Self {
        Self { destination, file: Mutex::new(None), complained: Once::new() }
    }

    /// Writes a record, in one piece, as far as the system's own buffers. What cannot be written is lost, and said once.
    pub(super) fn write(&self, record: &str) {
        let (name, result) = match &self.destination {
            Destination::Stdout => (Path::new("stdout"), write_to(&mut io::stdout().lock(), record)),
            Destination::Stderr => (Path::new("stderr"), write_to(&mut io::stderr().lock(), record)),
            Destination::File(path) => (path.as_path(), self.write_to_file(path, record)),
            #[cfg(feature = "tracing")]
            Destination::Tracing => return,
        };
        if let Err(error) = result {
            self.complained
                .say(|| format!("the log cannot be written to {}: {error}; calls go on without it", name.display()));
        }
    }

    fn write_to_file(&self, path: &Path, record: &str) -> io::Result<()> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let file = match &mut *file {
            Some(file) => file,
            none => none.insert(OpenOptions::new().append(true).create(true).open(path)?),
        };
        write_to(file, record)
    }
}

fn write_to(out: &mut dyn Write, record: &str) -> io::Result<()> {
    out.write_all(record.as_bytes())?;
    out.flush()
}
