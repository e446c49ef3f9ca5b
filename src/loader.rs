//! Shared objects: opened, hashed and loaded through one descriptor, never closed.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, IntoRawFd, RawFd};
use std::path::{Path, PathBuf};

use libloading::os::unix::{Library as Handle, RTLD_GLOBAL, RTLD_LOCAL, RTLD_NOW};
use memfd::{FileSeal, MemfdOptions};

use crate::digest::{Digest, hash, hash_reader};
use crate::error::{FlashInferError, Result};

/// glibc's value; libloading does not export it.
const RTLD_NOLOAD: i32 = 4;

/// Whether later libraries may bind to a library's symbols without naming it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Scope {
    Global,
    Local,
}

impl Scope {
    fn flags(self) -> i32 {
        RTLD_NOW | if self == Self::Global { RTLD_GLOBAL } else { RTLD_LOCAL }
    }
}

/// A loaded library. Kernels leave threads' state and static initializers behind, so it is never unloaded.
#[derive(Debug)]
pub(crate) struct Library {
    name: String,
    path: PathBuf,
    handle: &'static Handle,
    /// The descriptor that it was loaded through, if it was.
    descriptor: Option<RawFd>,
}

impl Library {
    /// Loads a file. With a digest, the file is hashed through the descriptor that is then loaded, so that a swap of
    /// the name in between changes nothing.
    ///
    /// # Safety
    /// Loading runs the library's initializers: they must be sound to run here. A matching digest of a vendored library
    /// is such a promise.
    pub(crate) unsafe fn open(name: &str, path: &Path, expected: Option<&Digest>, scope: Scope) -> Result<Self> {
        let failed = |doing| move |source| FlashInferError::Io { doing, path: path.to_owned(), source };
        let file = File::open(path).map_err(failed("opening"))?;
        if let Some(expected) = expected {
            let (found, _) = hash_reader(&file).map_err(failed("reading"))?;
            if found != *expected {
                return Err(FlashInferError::DigestMismatch {
                    library: name.to_owned(),
                    path: path.to_owned(),
                    found: found.to_string(),
                    expected: expected.to_string(),
                });
            }
        }
        // SAFETY: the caller's promise.
        unsafe { Self::from_descriptor(name, path, file, scope) }
    }

    /// Loads bytes: writes them to memory that nobody can change any more, and loads that.
    ///
    /// # Safety
    /// As for [`open`](Self::open).
    pub(crate) unsafe fn embedded(name: &str, bytes: &'static [u8], expected: &Digest, scope: Scope) -> Result<Self> {
        let path = PathBuf::from(format!("{EMBEDDED}{name}"));
        let found = hash(bytes);
        if found != *expected {
            return Err(FlashInferError::DigestMismatch {
                library: name.to_owned(),
                path,
                found: found.to_string(),
                expected: expected.to_string(),
            });
        }
        let refused = |reason: String| FlashInferError::EmbeddingRefused { library: name.to_owned(), reason };
        let file = sealed(name, bytes).map_err(refused)?;
        // SAFETY: the caller's promise.
        match unsafe { Self::from_descriptor(name, &path, file, scope) } {
            // The memory itself cannot be opened or mapped; any other reason names a library that is missing or too old.
            Err(FlashInferError::LoadFailed { reason, .. }) if reason.starts_with("/proc/self/fd/") => {
                Err(refused(reason))
            }
            result => result,
        }
    }

    /// # Safety
    /// As for [`open`](Self::open).
    unsafe fn from_descriptor(name: &str, path: &Path, file: File, scope: Scope) -> Result<Self> {
        let by_descriptor = format!("/proc/self/fd/{}", file.as_raw_fd());
        // SAFETY: the caller's promise about the initializers.
        match unsafe { Handle::open(Some(&by_descriptor), scope.flags()) } {
            Ok(handle) => {
                // It stays open for good: glibc knows a library by the name it was opened with, and a closed number
                // comes back for another file.
                let (handle, descriptor) = (Box::leak(Box::new(handle)), Some(file.into_raw_fd()));
                Ok(Self { name: name.to_owned(), path: path.to_owned(), handle, descriptor })
            }
            Err(error) => Err(load_failed(name, path, reason(&error))),
        }
    }

    /// A library that the dynamic linker finds by name; with `only_loaded`, only if the process has it already.
    ///
    /// # Safety
    /// As for [`open`](Self::open), unless `only_loaded`.
    pub(crate) unsafe fn by_name(name: &str, only_loaded: bool) -> std::result::Result<Self, String> {
        let flags = Scope::Local.flags() | if only_loaded { RTLD_NOLOAD } else { 0 };
        // SAFETY: the caller's promise; nothing is initialized where the library is loaded already.
        match unsafe { Handle::open(Some(name), flags) } {
            Ok(handle) => {
                let handle = Box::leak(Box::new(handle));
                let path = PathBuf::from(loaded_path(name).unwrap_or_else(|| name.to_owned()));
                Ok(Self { name: name.to_owned(), path, handle, descriptor: None })
            }
            Err(error) => Err(reason(&error)),
        }
    }

    /// What every library of this process sees, under the name of the one that is meant.
    pub(crate) fn global(name: &str, path: String) -> Self {
        let handle = Box::leak(Box::new(Handle::this()));
        Self { name: name.to_owned(), path: PathBuf::from(path), handle, descriptor: None }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The addresses of exported data whose names end with `suffix`, read from the very file that was loaded.
    pub(crate) fn data_symbols(&self, suffix: &str) -> Vec<*mut u8> {
        use object::{Object, ObjectSymbol};

        let bytes =
            self.descriptor.and_then(|fd| std::fs::read(format!("/proc/self/fd/{fd}")).ok()).unwrap_or_default();
        let Ok(file) = object::File::parse(bytes.as_slice()) else { return Vec::new() };
        let names =
            file.dynamic_symbols().filter(|symbol| symbol.is_definition()).filter_map(|symbol| symbol.name().ok());
        let address = |name: &str| {
            let name = CString::new(name).ok()?;
            // SAFETY: the address is taken and nothing is read or called through it here.
            let symbol = unsafe { self.handle.get::<*mut u8>(name.to_bytes_with_nul()) };
            symbol.ok().map(|symbol| symbol.as_raw_ptr().cast::<u8>())
        };
        names.filter(|name| name.ends_with(suffix)).filter_map(address).collect()
    }

    /// A function of the library.
    ///
    /// # Safety
    /// `T` must be a function pointer type that fits the symbol.
    pub(crate) unsafe fn symbol<T: Copy>(&self, symbol: &CStr) -> Result<T> {
        // SAFETY: the caller's promise. The pointer may outlive the `Symbol`, since libraries are never closed.
        match unsafe { self.handle.get::<T>(symbol.to_bytes_with_nul()) } {
            Ok(found) => Ok(*found),
            Err(error) => Err(FlashInferError::SymbolMissing {
                library: self.name.clone(),
                symbol: symbol.to_string_lossy().into_owned(),
                reason: reason(&error),
            }),
        }
    }
}

/// What stands before the name of a library that was loaded from this program.
const EMBEDDED: &str = "(embedded)/";

/// Memory with these bytes, sealed: it cannot be written, shrunk or grown, and the seals cannot be taken off.
fn sealed(name: &str, bytes: &[u8]) -> std::result::Result<File, String> {
    let memory =
        MemfdOptions::default().allow_sealing(true).close_on_exec(true).create(name).map_err(|e| e.to_string())?;
    memory.as_file().write_all(bytes).map_err(|e| e.to_string())?;
    let seals = [FileSeal::SealWrite, FileSeal::SealShrink, FileSeal::SealGrow, FileSeal::SealSeal];
    memory.add_seals(&seals).map_err(|e| e.to_string())?;
    Ok(memory.into_file())
}

/// The address that a library loaded from now on would bind `symbol` to, if any library offers it globally.
pub(crate) fn global_address(symbol: &CStr) -> Option<usize> {
    // SAFETY: the symbol's address is read and never called or dereferenced.
    let found = unsafe { Handle::this().get::<*const ()>(symbol.to_bytes_with_nul()) };
    found.ok().map(|symbol| symbol.as_raw_ptr() as usize)
}

/// The file that is mapped at an address, for messages.
pub(crate) fn mapped_file(address: usize) -> String {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let holds = |line: &&str| {
        let range = line.split(' ').next().and_then(|range| range.split_once('-'));
        let bounds = range.and_then(|(low, high)| {
            Some((usize::from_str_radix(low, 16).ok()?, usize::from_str_radix(high, 16).ok()?))
        });
        bounds.is_some_and(|(low, high)| (low..high).contains(&address))
    };
    let line = maps.lines().find(holds).and_then(|line| line.split_whitespace().nth(5));
    line.unwrap_or("an unknown file").to_owned()
}

/// The mapped file of this name, for messages and reports.
fn loaded_path(name: &str) -> Option<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let paths = maps.lines().filter_map(|line| line.split_whitespace().nth(5));
    paths
        .filter(|path| Path::new(path).file_name().is_some_and(|file| file.to_string_lossy().starts_with(name)))
        .map(str::to_owned)
        .next()
}

/// libloading's message says only which call failed; the dynamic linker's own is its source.
fn reason(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

fn load_failed(name: &str, path: &Path, reason: String) -> FlashInferError {
    // Kernel modules need the driver, unless their linker dropped it.
    if reason.contains("libcuda.so.1") {
        return FlashInferError::DriverMissing { reason };
    }
    let remedy = if reason.contains("GLIBC") {
        "use a system with the C and C++ libraries that the reason asks for, or newer ones"
    } else if reason.contains("/proc/self/fd") && !Path::new("/proc/self/fd").exists() {
        "mount /proc: libraries are loaded through the descriptor they were checked through"
    } else if reason.contains("libcudart") {
        "build with the feature `cudart`, or install CUDA 13's runtime"
    } else {
        "mend what the reason names"
    };
    FlashInferError::LoadFailed { library: name.to_owned(), path: path.to_owned(), reason, remedy }
}
