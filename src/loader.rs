//! Shared objects: opened, hashed and loaded through one descriptor, never unloaded. This is Linux' part; elsewhere
//! `loader_elsewhere.rs` takes its place, with the same functions.

use std::ffi::{CStr, CString, c_int};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, IntoRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use libloading::os::unix::{Library as Handle, RTLD_GLOBAL, RTLD_LOCAL, RTLD_NOW};
use memfd::{FileSeal, MemfdOptions};

use crate::artifact::{CUDART, how_to_vendor};
use crate::digest::{Digest, hash, hash_reader};
use crate::error::{FlashInferError, Result};
use crate::module::PREFIX;

/// glibc's value; libloading does not export it.
const RTLD_NOLOAD: i32 = 4;

/// A missing symbol is an error when a library is loaded, not in the middle of a call; and only the library that asks for
/// another binds to its symbols.
const FLAGS: i32 = RTLD_NOW | RTLD_LOCAL;

/// A loaded library. Kernels leave threads' state and static initializers behind, so it is never unloaded.
#[derive(Debug, Clone)]
pub(crate) struct Library {
    name: String,
    path: PathBuf,
    handle: &'static Handle,
    /// The path that the dynamic linker knows it by, if it was loaded from a file or from memory.
    loaded_by: Option<String>,
    /// The names of what it exports, read when it was loaded: the program may have closed the descriptor since.
    exports: Arc<Exports>,
}

impl Library {
    /// Loads a file. With a digest, the file is hashed through the descriptor that is then loaded, so that a swap of
    /// the name in between changes nothing.
    ///
    /// # Safety
    /// Loading runs the library's initializers: they must be sound to run here. A matching digest of a vendored library
    /// is such a promise.
    pub(crate) unsafe fn open(name: &str, path: &Path, expected: Option<&Digest>) -> Result<Self> {
        let file = Self::checked(name, path, expected)?;
        // SAFETY: the caller's promise.
        unsafe { Self::from_descriptor(name, path, file) }
    }

    /// A file, open, and compared with its digest where there is one.
    pub(crate) fn checked(name: &str, path: &Path, expected: Option<&Digest>) -> Result<File> {
        let failed = |doing| move |source| FlashInferError::Io { doing, path: path.to_owned(), source };
        let file = File::open(path).map_err(failed("opening"))?;
        if let Some(expected) = expected {
            let (found, _) = hash_reader(&file).map_err(failed("reading"))?;
            check(name, path, found, expected)?;
        }
        Ok(file)
    }

    /// Loads bytes: writes them to memory that nobody can change any more, and loads that.
    ///
    /// # Safety
    /// As for [`open`](Self::open).
    pub(crate) unsafe fn embedded(name: &str, bytes: &'static [u8], expected: &Digest) -> Result<Self> {
        let (path, file) = Self::embedded_file(name, bytes, expected)?;
        // SAFETY: the caller's promise.
        unsafe { Self::from_sealed(name, &path, file) }
    }

    /// Bytes of this program, compared with their digest, in memory that nobody can change any more.
    pub(crate) fn embedded_file(name: &str, bytes: &[u8], expected: &Digest) -> Result<(PathBuf, File)> {
        let path = PathBuf::from(format!("{EMBEDDED}{name}"));
        let file = Self::in_memory(name, &path, bytes, Some(expected))?;
        Ok((path, file))
    }

    /// Loads a copy of a file, beside the one that [`open`](Self::open) loads: the dynamic linker takes files that are the same
    /// for one library.
    ///
    /// # Safety
    /// As for [`open`](Self::open).
    pub(crate) unsafe fn copy(name: &str, path: &Path, expected: Option<&Digest>) -> Result<Self> {
        let failed = |source| FlashInferError::Io { doing: "reading", path: path.to_owned(), source };
        let bytes = std::fs::read(path).map_err(failed)?;
        let file = Self::in_memory(name, path, &bytes, expected)?;
        // SAFETY: the caller's promise.
        unsafe { Self::from_sealed(name, path, file) }
    }

    /// Bytes in memory that nobody can change any more, once they are what is expected.
    fn in_memory(name: &str, path: &Path, bytes: &[u8], expected: Option<&Digest>) -> Result<File> {
        if let Some(expected) = expected {
            check(name, path, hash(bytes), expected)?;
        }
        sealed(name, bytes).map_err(|reason| embedding_refused(name, reason))
    }

    /// Loads what is in memory.
    ///
    /// # Safety
    /// As for [`open`](Self::open).
    pub(crate) unsafe fn from_sealed(name: &str, path: &Path, file: File) -> Result<Self> {
        // SAFETY: the caller's promise.
        match unsafe { Self::from_descriptor(name, path, file) } {
            // The memory itself; any other reason names a library that is missing, or what is wrong with what was loaded.
            Err(FlashInferError::LoadFailed { reason, .. }) if is_of_memory(&reason) => {
                Err(embedding_refused(name, reason))
            }
            result => result,
        }
    }

    /// # Safety
    /// As for [`open`](Self::open).
    pub(crate) unsafe fn from_descriptor(name: &str, path: &Path, file: File) -> Result<Self> {
        let exports = Arc::new(Exports::of(&file));
        let by = unique_path(file.as_raw_fd());
        let loaded = {
            let _actions = SavedActions::new();
            // SAFETY: the caller's promise about the initializers.
            unsafe { Handle::open(Some(&by), FLAGS) }
        };
        match loaded {
            Ok(handle) => {
                // Debuggers, profilers and backtraces read the library's symbols by the path it was loaded from, so the
                // descriptor stays open. Nothing in this crate depends on that: a program may close it.
                let _open_for_good = file.into_raw_fd();
                let (name, path, handle) = (name.to_owned(), path.to_owned(), Box::leak(Box::new(handle)));
                Ok(Self { name, path, handle, loaded_by: Some(by), exports })
            }
            Err(error) => Err(load_failed(name, path, reason(&error))),
        }
    }

    /// Lets every library that is loaded from now on bind to this one's symbols. It cannot be taken back, so it comes after
    /// whatever may refuse the library.
    pub(crate) fn make_global(&self) -> Result<()> {
        let Some(by) = &self.loaded_by else { return Ok(()) };
        // SAFETY: the library is loaded already, so no initializers run.
        match unsafe { Handle::open(Some(by), RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD) } {
            Ok(handle) => {
                // Closing it would only lower the linker's count of users, which must never reach zero.
                std::mem::forget(handle);
                Ok(())
            }
            Err(error) => Err(load_failed(&self.name, &self.path, reason(&error))),
        }
    }

    /// A library that the dynamic linker finds by name; with `only_loaded`, only if the process has it already.
    ///
    /// # Safety
    /// As for [`open`](Self::open), unless `only_loaded`.
    pub(crate) unsafe fn by_name(name: &str, only_loaded: bool) -> std::result::Result<Self, String> {
        let flags = FLAGS | if only_loaded { RTLD_NOLOAD } else { 0 };
        // SAFETY: the caller's promise; nothing is initialized where the library is loaded already.
        match unsafe { Handle::open(Some(name), flags) } {
            Ok(handle) => {
                let handle = Box::leak(Box::new(handle));
                let path = PathBuf::from(loaded_path(name).unwrap_or_else(|| name.to_owned()));
                Ok(Self { name: name.to_owned(), path, handle, loaded_by: None, exports: Arc::default() })
            }
            Err(error) => Err(reason(&error)),
        }
    }

    /// What every library of this process sees, under the name of the one that is meant.
    pub(crate) fn global(name: &str, path: String) -> Result<Self> {
        let handle = Box::leak(Box::new(Handle::this()));
        Ok(Self { name: name.to_owned(), path: PathBuf::from(path), handle, loaded_by: None, exports: Arc::default() })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The addresses of exported data whose names end with `suffix`, by the names of the very file that was loaded.
    pub(crate) fn data_symbols(&self, suffix: &str) -> Vec<*mut u8> {
        let address = |name: &String| {
            let name = CString::new(name.as_str()).ok()?;
            // SAFETY: the address is taken and nothing is read or called through it here.
            let symbol = unsafe { self.handle.get::<*mut u8>(name.to_bytes_with_nul()) };
            symbol.ok().map(|symbol| symbol.as_raw_ptr().cast::<u8>())
        };
        self.exports.data.iter().filter(|name| name.ends_with(suffix)).filter_map(address).collect()
    }

    /// The names of TVM-FFI's functions that it exports, by the very file that was loaded.
    pub(crate) fn functions(&self) -> impl Iterator<Item = &str> {
        self.exports.functions.iter().map(String::as_str)
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

fn check(name: &str, path: &Path, found: Digest, expected: &Digest) -> Result<()> {
    if found == *expected {
        return Ok(());
    }
    Err(FlashInferError::DigestMismatch {
        library: name.to_owned(),
        path: path.to_owned(),
        found: found.to_string(),
        expected: expected.to_string(),
    })
}

/// The names of what a shared object exports; none where it is no shared object, which the dynamic linker will say better.
#[derive(Debug, Default)]
struct Exports {
    data: Vec<String>,
    /// TVM-FFI's functions, without what stands before every one's name.
    functions: Vec<String>,
}

impl Exports {
    fn of(file: &File) -> Self {
        use object::{Object, ObjectSymbol, ReadCache, SymbolKind};

        let (parts, mut exports) = (ReadCache::new(file), Self::default());
        let Ok(object) = object::File::parse(&parts) else { return exports };
        for symbol in object.dynamic_symbols().filter(|symbol| symbol.is_definition()) {
            let Ok(name) = symbol.name() else { continue };
            match (symbol.kind(), name.strip_prefix(PREFIX)) {
                (SymbolKind::Data, _) => exports.data.push(name.to_owned()),
                (SymbolKind::Text, Some(function)) => exports.functions.push(function.to_owned()),
                _ => {}
            }
        }
        exports
    }
}

/// A path to an open file that no library was loaded by before. glibc compares the path with those that it loaded
/// libraries by, and opens it only where none is the same. A descriptor's number comes back once the program closes it, as
/// daemons do, and glibc would answer the library that was loaded under that number before, whatever the file is now. So
/// each load spells its path in another way: a running number stands in it, in binary, with `/.` for one and `/` for zero.
fn unique_path(descriptor: RawFd) -> String {
    static LOADS: AtomicU64 = AtomicU64::new(1);
    let load = LOADS.fetch_add(1, Ordering::Relaxed);
    let digits: String = format!("{load:b}").chars().map(|digit| if digit == '1' { "/." } else { "/" }).collect();
    format!("{OPEN_FILES}{digits}/{descriptor}")
}

/// Where the system shows a process its open files by their descriptors.
const OPEN_FILES: &str = "/proc/self/fd";

/// What the process does on the signals by which Rust's runtime recognizes a stack overflow, restored on drop. The
/// initializers of libtvm_ffi.so set an action of their own for SIGSEGV; with it a program that overflows its stack ends
/// without Rust's report. The actions belong to the whole process: what another thread sets while a library is loaded is
/// undone too.
pub(crate) struct SavedActions([(c_int, Option<libc::sigaction>); 2]);

impl SavedActions {
    pub(crate) fn new() -> Self {
        Self([libc::SIGSEGV, libc::SIGBUS].map(|signal| {
            // SAFETY: a sigaction is plain data, for which zeros are valid.
            let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
            // SAFETY: the action in force is written to valid memory of its type, and nothing is changed.
            let read = unsafe { libc::sigaction(signal, std::ptr::null(), &mut action) };
            (signal, (read == 0).then_some(action))
        }))
    }
}

impl Drop for SavedActions {
    fn drop(&mut self) {
        for (signal, action) in &self.0 {
            if let Some(action) = action {
                // SAFETY: the action was in force for this signal when it was saved, and its handler is never unloaded by
                // this crate.
                unsafe { libc::sigaction(*signal, action, std::ptr::null_mut()) };
            }
        }
    }
}

/// What stands before the name of a library that was loaded from this program.
const EMBEDDED: &str = "(embedded)/";

/// Memory with these bytes, sealed: it cannot be written, shrunk or grown, and the seals cannot be taken off.
pub(crate) fn sealed(name: &str, bytes: &[u8]) -> std::result::Result<File, String> {
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
    maps.lines().find(holds).and_then(path_of).unwrap_or("an unknown file").to_owned()
}

/// The path in a line of /proc/self/maps, behind five fields; it may have blanks in it.
fn path_of(line: &str) -> Option<&str> {
    line.splitn(6, ' ').nth(5).map(str::trim_start).filter(|path| !path.is_empty())
}

/// The mapped file of this name, for messages and reports.
fn loaded_path(name: &str) -> Option<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    maps.lines()
        .filter_map(path_of)
        .filter(|path| Path::new(path).file_name().is_some_and(|file| file.to_string_lossy().starts_with(name)))
        .map(str::to_owned)
        .next()
}

/// libloading's message says only which call failed; the dynamic linker's own is its source.
fn reason(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// Whether the dynamic linker's words mean that memory cannot be opened or mapped as a file, whatever is in it.
fn is_of_memory(reason: &str) -> bool {
    let of_the_system = ["cannot open shared object file", "failed to map segment", "cannot change memory protections"];
    reason.starts_with(OPEN_FILES) && of_the_system.iter().any(|words| reason.contains(words))
}

/// That a library cannot be loaded out of memory, for this reason.
pub(crate) fn embedding_refused(name: &str, reason: String) -> FlashInferError {
    let remedy = if !Path::new(OPEN_FILES).exists() {
        "mount /proc: libraries are loaded through the descriptor they were checked through"
    } else if ["failed to map segment", "not permitted", "ermission denied"].iter().any(|words| reason.contains(words))
    {
        "let this program run code from memory (memfd_create), which a policy of this system forbids: SELinux, AppArmor or \
         seccomp"
    } else {
        "mend what the reason names"
    };
    FlashInferError::EmbeddingRefused { library: name.to_owned(), reason, remedy }
}

fn load_failed(name: &str, path: &Path, reason: String) -> FlashInferError {
    // Kernel modules need the driver, unless their linker dropped it.
    if reason.contains("libcuda.so.1") {
        return FlashInferError::DriverMissing { reason };
    }
    let remedy = if reason.contains("GLIBC") {
        "use a system with the C and C++ libraries that the reason asks for, or newer ones".to_owned()
    } else if reason.contains(OPEN_FILES) && !Path::new(OPEN_FILES).exists() {
        "mount /proc: libraries are loaded through the descriptor they were checked through".to_owned()
    } else if reason.contains(CUDART) {
        format!("{}; or install CUDA 13's runtime", how_to_vendor(CUDART))
    } else {
        "mend what the reason names".to_owned()
    };
    FlashInferError::LoadFailed { library: name.to_owned(), path: path.to_owned(), reason, remedy }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever the system says of memory, it says of no file in it that is damaged.
    #[test]
    fn a_damaged_library_in_memory_is_not_called_one_that_the_system_refuses() {
        for bytes in [&b"no library"[..], b"\x7fELF and nothing else", &[0x7f; 100_000]] {
            let memory = sealed("damaged.so", bytes).expect("memory");
            // SAFETY: the dynamic linker refuses it before anything in it runs.
            let error = unsafe { Library::from_sealed("damaged.so", Path::new("(memory)/damaged.so"), memory) };
            let error = error.expect_err("no library");
            assert!(matches!(error, FlashInferError::LoadFailed { .. }), "{error}");
            assert!(!error.to_string().contains("FLASHINFER_RS_LIB_DIR"), "{error}");
        }
    }

    #[test]
    fn what_the_system_refuses_is_said_with_its_reason_and_its_remedy() {
        let open = format!("{OPEN_FILES}/./5: cannot open shared object file: Too many open files");
        let map = format!("{OPEN_FILES}/./5: failed to map segment from shared object");
        let missing = "libother.so.1: cannot open shared object file: No such file or directory".to_owned();
        assert!(is_of_memory(&open) && is_of_memory(&map) && !is_of_memory(&missing));
        for (reason, remedy) in [(open, "mend what the reason names"), (map, "SELinux, AppArmor or seccomp")] {
            let text = embedding_refused("norm.so", reason.clone()).to_string();
            assert!(
                text.contains(&reason) && text.contains(remedy) && text.contains("FLASHINFER_RS_LIB_DIR"),
                "{text}"
            );
            // It makes memory that is not executable as a file, which no library needs to be.
            assert!(!text.contains("memfd_noexec"), "{text}");
        }
    }

    #[test]
    fn a_missing_runtime_of_cuda_is_said_with_why_it_was_not_vendored() {
        let reason = "libcudart.so.13: cannot open shared object file: No such file or directory".to_owned();
        let text = load_failed("norm.so", Path::new("norm.so"), reason).to_string();
        assert!(text.contains(&how_to_vendor(CUDART)), "{text}");
    }
}
