//! Kernels that were built already: a folder with `kernel.so` and `kernel_metadata.txt`, as FlashInfer-Bench hands them out.

use std::path::{Path, PathBuf};

use object::{Object as _, ObjectSymbol as _};

use super::definition::Definition;
use super::error::{Finding, read, refused};
use super::json::shortened;
use super::metadata::{FILE as METADATA, Metadata};
use super::solution::Solution;
use crate::error::Result;

/// What TVM-FFI puts before an exported function's name.
const PREFIX: &str = "__tvm_ffi_";
const LIBRARY: &str = "kernel.so";
/// Kernels for all architectures with debug information are far smaller than this.
const MAX_LIBRARY: usize = 4 << 30;

/// A kernel that was built, read and checked as far as that goes without loading it.
#[derive(Debug, Clone)]
pub struct DistributedKernel {
    /// The library.
    pub library: PathBuf,
    /// The library's digest, in hexadecimal: what is loaded should be compared with it.
    pub sha256: String,
    /// The function to call: exported as `__tvm_ffi_` and this.
    pub entry_symbol: String,
    /// The definition's name, where the metadata says it.
    pub definition_name: Option<String>,
    /// The solution's name, where the metadata says it.
    pub solution_name: Option<String>,
    /// What it computes, where `definition.json` lies beside it. Upstream puts none there.
    pub definition: Option<Definition>,
    /// What it was built of, where `solution.json` lies beside it. Upstream puts none there.
    pub solution: Option<Solution>,
}

impl DistributedKernel {
    /// Reads a folder: the metadata, the library, and `definition.json` and `solution.json` where they are there.
    ///
    /// # Errors
    /// [`Io`](crate::FlashInferError::Io); [`Data`](crate::FlashInferError::Data) for metadata without an `Entry Symbol:`, a
    /// library that is a pointer of Git LFS, no ELF file or without that function, whose error lists the functions that are
    /// there; and for files beside it that are of another kernel.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let (metadata, entry_symbol) = read_metadata(&folder.join(METADATA))?;
        let library = folder.join(LIBRARY);
        let bytes = read(&library, MAX_LIBRARY)?;
        exports(&library, &bytes, &entry_symbol)?;
        let digest = ring::digest::digest(&ring::digest::SHA256, &bytes);
        let sha256 = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        let beside = |name: &str| Some(folder.join(name)).filter(|path| path.exists());
        let definition = beside("definition.json").map(Definition::read).transpose()?;
        let solution = beside("solution.json").map(Solution::read).transpose()?;
        let same = |place: &str, found: Option<&str>, expected: Option<&str>| match (found, expected) {
            (Some(found), Some(expected)) if found != expected => Err(refused(
                &folder.join(METADATA).display().to_string(),
                Finding {
                    place: place.to_owned(),
                    found: format!("{:?}", shortened(found)),
                    expected: format!("{:?}, which lies beside it", shortened(expected)),
                    remedy: "keep the files of one kernel together",
                },
            )),
            _ => Ok(()),
        };
        let named = definition.as_ref().map(|definition| definition.name.as_str());
        same("Definition", metadata.definition.as_deref(), named)?;
        if let Some(solution) = &solution {
            same("Solution", metadata.solution.as_deref(), Some(&solution.name))?;
            same("Entry Symbol", Some(&entry_symbol), Some(solution.spec.entry_symbol()))?;
            same("Definition", metadata.definition.as_deref().or(named), Some(&solution.definition))?;
        }
        Ok(Self {
            library,
            sha256,
            entry_symbol,
            definition_name: metadata.definition.or(definition.as_ref().map(|definition| definition.name.clone())),
            solution_name: metadata.solution.or(solution.as_ref().map(|solution| solution.name.clone())),
            definition,
            solution,
        })
    }

    /// Writes the metadata of a kernel as upstream's readers look for it.
    ///
    /// # Errors
    /// [`Io`](crate::FlashInferError::Io).
    pub fn write_metadata(folder: impl AsRef<Path>, solution: &Solution) -> Result<()> {
        let (name, definition) = (&solution.name, &solution.definition);
        let text = Metadata::text(solution.spec.entry_symbol(), definition, name);
        super::definition::write(&folder.as_ref().join(METADATA), &text)
    }
}

/// The metadata of a file, which must say what to call.
fn read_metadata(path: &Path) -> Result<(Metadata, String)> {
    let bytes = read(path, 1 << 20)?;
    let mut metadata = Metadata::parse(&String::from_utf8_lossy(&bytes));
    let entry_symbol = metadata.entry_symbol.take().ok_or_else(|| {
        let (place, found) = ("its lines".to_owned(), "none".to_owned());
        let expected = "a line `Entry Symbol: NAME`".to_owned();
        let remedy = "add the line, with the function's name behind the entry point's `::`";
        refused(&path.display().to_string(), Finding { place, found, expected, remedy })
    })?;
    Ok((metadata, entry_symbol))
}

/// That a library exports a function.
fn exports(library: &Path, bytes: &[u8], symbol: &str) -> Result<()> {
    let refuse = |place: &str, found: String, expected: String, remedy| {
        let place = place.to_owned();
        Err(refused(&library.display().to_string(), Finding { place, found, expected, remedy }))
    };
    let file = match object::File::parse(bytes) {
        Ok(file) if file.format() == object::BinaryFormat::Elf => file,
        Ok(file) => {
            let found = format!("{:?}", file.format());
            return refuse("its format", found, "an ELF library".to_owned(), "build the kernel for Linux");
        }
        Err(error) => {
            return refuse("its format", error.to_string(), "an ELF library".to_owned(), "fetch or build it again");
        }
    };
    let functions: Vec<&str> = file
        .dynamic_symbols()
        .filter(|found| found.is_definition())
        .filter_map(|found| found.name().ok()?.strip_prefix(PREFIX))
        .collect();
    if functions.contains(&symbol) {
        return Ok(());
    }
    let shown: Vec<_> = functions.iter().take(20).map(|name| shortened(name)).collect();
    let found = if shown.is_empty() { "no function of TVM-FFI".to_owned() } else { format!("the functions {shown:?}") };
    let remedy = "export it with TVM_FFI_DLL_EXPORT_TYPED_FUNC, or correct the metadata's Entry Symbol";
    refuse("its dynamic symbols", found, format!("{PREFIX}{}", shortened(symbol)), remedy)
}
