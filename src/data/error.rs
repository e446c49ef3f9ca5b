//! What is wrong with a dataset's file, and reading files at all.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::error::{FlashInferError, Result};

/// What is wrong with data that was read, or was to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DataError {
    /// The file, or what the data is called.
    pub file: String,
    /// The place in it: the way to the value, its line and column; or the part of it.
    pub place: String,
    /// What is there.
    pub found: String,
    /// What should be there.
    pub expected: String,
    /// What to do.
    pub remedy: &'static str,
}

impl fmt::Display for DataError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, place, found, expected, remedy } = self;
        write!(f, "{file}, {place}: found {found}, expected {expected}; {remedy}")
    }
}

impl std::error::Error for DataError {}

/// All of a [`DataError`] but the file.
pub(crate) struct Finding {
    pub place: String,
    pub found: String,
    pub expected: String,
    pub remedy: &'static str,
}

pub(crate) fn refused(file: &str, finding: Finding) -> FlashInferError {
    let Finding { place, found, expected, remedy } = finding;
    FlashInferError::Data(Box::new(DataError { file: file.to_owned(), place, found, expected, remedy }))
}

/// What is wrong with something that has no file: a value of this program's.
pub(crate) fn unfit(
    what: &str,
    place: impl Into<String>,
    found: impl Into<String>,
    expected: impl Into<String>,
    remedy: &'static str,
) -> FlashInferError {
    refused(what, Finding { place: place.into(), found: found.into(), expected: expected.into(), remedy })
}

pub(crate) fn io(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> FlashInferError {
    let path = path.to_path_buf();
    move |source| FlashInferError::Io { doing, path, source }
}

/// How Git LFS begins the small file that stands in a large one's place.
const LFS: &[u8] = b"version https://git-lfs.github.com/spec/v1";

/// That a file which begins like this is not a pointer of Git LFS.
pub(crate) fn not_a_pointer(path: &Path, begin: &[u8]) -> Result<()> {
    if !begin.starts_with(LFS) {
        return Ok(());
    }
    Err(refused(
        &path.display().to_string(),
        Finding {
            place: "line 1".to_owned(),
            found: "a pointer of Git LFS".to_owned(),
            expected: "the file that it points to".to_owned(),
            remedy: "run `git lfs pull` in the dataset",
        },
    ))
}

/// A whole file of at most `most` bytes.
pub(crate) fn read(path: &Path, most: usize) -> Result<Vec<u8>> {
    let mut file = File::open(path).map_err(io("opening", path))?;
    let mut bytes = Vec::new();
    (&mut file).take(most as u64 + 1).read_to_end(&mut bytes).map_err(io("reading", path))?;
    not_a_pointer(path, &bytes)?;
    if bytes.len() <= most {
        return Ok(bytes);
    }
    Err(refused(
        &path.display().to_string(),
        Finding {
            place: "its size".to_owned(),
            found: format!("more than {most} bytes"),
            expected: format!("at most {most} bytes"),
            remedy: "check that it is the file that was meant",
        },
    ))
}
