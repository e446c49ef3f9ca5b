//! Opening any module: what a file says of itself is looked at before it is loaded, and what is wrong is said in words.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs::File;
use std::path::{Path, PathBuf};

use object::ReadCache;

#[cfg(feature = "bench")]
use crate::digest::hash_reader;
use crate::elf::{self, Elf, Target};
use crate::error::{FlashInferError, Result};
use crate::loader::{self, Library};
use crate::module::{Module, PREFIX};
use crate::object::Func;
use crate::runtime::FlashInferRuntime;

/// What a shared object says of itself, read without loading it: [`Module::preflight`].
#[derive(Debug, Clone)]
pub struct Preflight {
    path: PathBuf,
    elf: Elf,
}

/// The C functions that came after 0.1.3, the release that is vendored, and the release that they came with.
const SINCE: [(&str, [u32; 3]); 8] = [
    ("TVMFFIHandleInitOnce", [0, 1, 5]),
    ("TVMFFIHandleDeinitOnce", [0, 1, 5]),
    ("TVMFFITensorCreateUnsafeView", [0, 1, 6]),
    ("TVMFFIErrorCreateWithCauseAndExtraContext", [0, 1, 8]),
    ("TVMFFIGetCustomAllocator", [0, 1, 13]),
    ("TVMFFISetCustomAllocator", [0, 1, 13]),
    ("TVMFFIBigIntFromByteArray", [0, 1, 14]),
    ("TVMFFIBigIntGetContentByteArray", [0, 1, 14]),
];

/// The release that has all of these functions; `None` where one of them is not known here.
fn release_with(missing: &[&str]) -> Option<String> {
    let since = |name: &&str| SINCE.iter().find(|(known, _)| known == name).map(|(_, since)| since);
    let newest = missing.iter().map(since).collect::<Option<Vec<_>>>()?.into_iter().max()?;
    Some(newest.map(|number| number.to_string()).join("."))
}

/// CUDA's libraries: what their sonames begin with, and which release is in the number behind it.
const CUDA: [&str; 9] = [
    "libcudart.so.",
    "libcublas.so.",
    "libcublasLt.so.",
    "libnvrtc.so.",
    "libcufft.so.",
    "libcusolver.so.",
    "libcusparse.so.",
    "libnvJitLink.so.",
    "libnvToolsExt.so.",
];

impl Preflight {
    pub(crate) fn read(path: &Path, file: &File) -> Result<Self> {
        let parts = ReadCache::new(file);
        match Elf::read(&parts) {
            Ok(elf) => Ok(Self { path: path.to_owned(), elf }),
            Err(elf::Unfit { problem, remedy }) => {
                Err(FlashInferError::Unloadable { path: path.to_owned(), problem, remedy })
            }
        }
    }

    /// The libraries that it needs, by soname, in order.
    pub fn needed(&self) -> &[String] {
        &self.elf.needed
    }

    /// The release of CUDA that the needed libraries imply, if any does: 12 for `libcudart.so.12`.
    pub fn cuda_major(&self) -> Option<u32> {
        self.elf.cuda_major()
    }

    /// The functions that it exports, in alphabetical order.
    pub fn functions(&self) -> Vec<String> {
        crate::module::exported(self.elf.tvm_ffi_exports())
    }

    /// The symbols of TVM-FFI that it needs.
    pub fn tvm_ffi_symbols(&self) -> Vec<&str> {
        self.elf.tvm_ffi_symbols().collect()
    }

    /// Whether it has the tables that tell what it needs and exports.
    pub(crate) fn is_complete(&self) -> bool {
        self.elf.is_complete
    }

    /// A function that it needs and that registers something with TVM-FFI, perhaps while it is loaded.
    pub(crate) fn registering_symbol(&self) -> Option<&str> {
        self.elf.registering_symbol()
    }

    /// What its GPU code was compiled for: `sm_90`, `sm_90a`, `compute_90` for PTX. Empty where there is none, or where it lies
    /// in a form that is not understood here.
    pub fn architectures(&self) -> Vec<String> {
        self.elf.targets.iter().map(Target::to_string).collect()
    }

    /// Whether its GPU code runs on a GPU of this compute capability; also where there is none that is understood here.
    pub fn runs_on(&self, major: u32, minor: u32) -> bool {
        self.elf.targets.is_empty() || self.elf.targets.iter().any(|target| target.runs_on(major, minor))
    }

    /// Whether it has modules embedded (Python's `export_library` does so), or wants a context, so that its functions work
    /// only where TVM-FFI itself loads it: [`Module::open`] then does that.
    pub fn has_embedded(&self) -> bool {
        self.elf.has_embedded()
    }

    /// The kinds of the modules that are embedded in it, beside the library itself.
    pub fn embedded_kinds(&self) -> Vec<&str> {
        const ITSELF: &str = "_lib";
        self.elf.embedded.iter().flatten().map(String::as_str).filter(|kind| *kind != ITSELF).collect()
    }

    pub(crate) fn unloadable(&self, problem: String, remedy: impl Into<String>) -> FlashInferError {
        FlashInferError::Unloadable { path: self.path.clone(), problem, remedy: remedy.into() }
    }

    /// That it can be loaded into this process, as far as it tells without running.
    pub(crate) fn check(&self, runtime: &'static FlashInferRuntime) -> Result<()> {
        if !self.elf.is_complete {
            // Its tables were stripped; the dynamic linker, which does without, has the word.
            return Ok(());
        }
        let is_missing = |symbol: &&str| {
            let name = CString::new(*symbol).unwrap_or_default();
            loader::global_address(&name).is_none()
        };
        let missing: Vec<_> = self.tvm_ffi_symbols().into_iter().filter(is_missing).collect();
        if !missing.is_empty() {
            let version = runtime.api().version();
            let newer = release_with(&missing).map_or_else(
                || "a newer library".to_owned(),
                |release| format!("a library of release {release} or newer"),
            );
            return Err(self.unloadable(
                format!(
                    "it needs {} of TVM-FFI, which the libtvm_ffi.so in use, {}.{}.{}, does not have",
                    missing.join(", "),
                    version.major,
                    version.minor,
                    version.patch
                ),
                format!("build it with the headers of that release, or use {newer} (RuntimeConfig::adopt_tvm_ffi)"),
            ));
        }
        if self.functions().is_empty() && !self.has_embedded() {
            let others = self.elf.defined.len();
            return Err(self.unloadable(
                format!("it exports no function of TVM-FFI's ({PREFIX}NAME) among its {others} symbols"),
                "export one by TVM_FFI_DLL_EXPORT_TYPED_FUNC(name, function)",
            ));
        }
        for kind in self.embedded_kinds() {
            let loader = format!("ffi.Module.load_from_bytes.{kind}");
            if Func::global(&loader)?.is_none() {
                return Err(self.unloadable(
                    format!("a module of kind {kind} is embedded in it, and nothing in this process loads those"),
                    format!("load the library that registers the global function {loader} before, or register it"),
                ));
            }
        }
        self.check_gpus(runtime)
    }

    /// That one of the GPUs that are there runs its code, where any is there.
    fn check_gpus(&self, runtime: &'static FlashInferRuntime) -> Result<()> {
        if self.elf.targets.is_empty() {
            return Ok(());
        }
        let Ok(count) = runtime.device_count() else { return Ok(()) };
        let capability = |device| {
            let (major, minor) = runtime.compute_capability(device).ok()?;
            Some((u32::try_from(major).ok()?, u32::try_from(minor).ok()?))
        };
        let there: BTreeSet<_> = (0..count).filter_map(capability).collect();
        if there.is_empty() || there.iter().any(|&(major, minor)| self.runs_on(major, minor)) {
            return Ok(());
        }
        let there: Vec<_> = there.iter().map(|(major, minor)| format!("sm_{major}{minor}")).collect();
        let there = there.join(", ");
        Err(self.unloadable(
            format!("its GPU code is for {}, and this process sees {there}", self.architectures().join(", ")),
            format!("build it for {there} (nvcc -gencode), with PTX for GPUs to come"),
        ))
    }

    /// Loads the libraries of CUDA's that it needs, so that a missing one is named with its release.
    ///
    /// # Safety
    /// As for [`Module::open`], which would load them as well.
    pub(crate) unsafe fn load_cuda(&self) -> Result<()> {
        // With places of its own it may find what is not found from here.
        let named = self.elf.needed.iter().filter(|_| self.elf.search_paths.is_empty());
        for name in named.filter(|name| CUDA.iter().any(|start| name.starts_with(start))) {
            // SAFETY: the caller's promise; what is loaded already stays as it is.
            let found = unsafe { Library::by_name(name, true).or_else(|_| Library::by_name(name, false)) };
            let Err(reason) = found else { continue };
            let release =
                elf::cuda_major(name).map(|major| format!("CUDA {major}")).unwrap_or_else(|| "CUDA".to_owned());
            return Err(self.unloadable(
                format!("it needs {name}, a library of {release}, which is not found ({reason})"),
                format!("install {release}'s libraries where the dynamic linker looks, or build it for the CUDA that is there"),
            ));
        }
        Ok(())
    }
}

impl Module {
    /// What a file says of itself, without loading it.
    ///
    /// # Errors
    /// [`Io`](FlashInferError::Io), and [`Unloadable`](FlashInferError::Unloadable) for what is no shared object for a machine
    /// like this one, a Git LFS pointer in a file's place for example.
    pub fn preflight(path: impl AsRef<Path>) -> Result<Preflight> {
        let path = path.as_ref();
        Preflight::read(path, &open(path)?)
    }

    /// Loads any TVM-FFI module from a file, for good: nothing is ever unloaded. What would go wrong is looked for
    /// before, in the very file that is then loaded.
    ///
    /// A library with modules embedded in it is loaded by TVM-FFI itself, by its path.
    ///
    /// # Safety
    /// Loading runs the file's initializers, and those of the libraries that it needs: they must be sound to run in this
    /// process. If they register functions or types with TVM-FFI, no other thread may use its tables meanwhile, which have
    /// no lock. And what it exports under TVM-FFI's names must be what these names say.
    ///
    /// # Errors
    /// [`NotInitialized`](FlashInferError::NotInitialized); [`Io`](FlashInferError::Io);
    /// [`Unloadable`](FlashInferError::Unloadable) for what is no shared object for this machine, needs a newer
    /// libtvm_ffi.so, exports no function, needs a library of a CUDA that is not there, or has GPU code for other GPUs
    /// only; [`LoadFailed`](FlashInferError::LoadFailed) for what only the dynamic linker finds.
    pub unsafe fn open(path: impl AsRef<Path>) -> Result<Self> {
        let (runtime, path) = (FlashInferRuntime::global()?, path.as_ref());
        let file = open(path)?;
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        // SAFETY: the caller's promise.
        unsafe { Self::of_file(runtime, path, name, file) }
    }

    /// As [`open`](Self::open), of a file whose SHA-256 must be this one, in hexadecimal.
    ///
    /// # Safety
    /// As there.
    #[cfg(feature = "bench")]
    pub(crate) unsafe fn open_expecting(path: &Path, sha256: &str) -> Result<Self> {
        let (runtime, file) = (FlashInferRuntime::global()?, open(path)?);
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        let failed = |source| FlashInferError::Io { doing: "reading", path: path.to_owned(), source };
        let found = hash_reader(&file).map_err(failed)?.0.to_string();
        if found != sha256 {
            let (library, path, expected) = (name, path.to_owned(), sha256.to_owned());
            return Err(FlashInferError::DigestMismatch { library, path, found, expected });
        }
        // SAFETY: the caller's promise.
        unsafe { Self::of_file(runtime, path, name, file) }
    }

    /// Loads an open file.
    ///
    /// # Safety
    /// As for [`open`](Self::open).
    unsafe fn of_file(runtime: &'static FlashInferRuntime, path: &Path, name: String, file: File) -> Result<Self> {
        let preflight = Preflight::read(path, &file)?;
        preflight.check(runtime)?;
        // SAFETY: the caller's promise.
        unsafe {
            preflight.load_cuda()?;
            if preflight.has_embedded() {
                return by_tvm_ffi(path, name, &preflight);
            }
            Ok(Self::loaded(&name, Library::from_descriptor(&name, path, file)?, runtime.api()))
        }
    }

    /// As [`open`](Self::open), from bytes, which are written to memory that nobody can change any more and loaded from there.
    /// `name` is for errors and debuggers.
    ///
    /// # Safety
    /// As there.
    ///
    /// # Errors
    /// As there; [`EmbeddingRefused`](FlashInferError::EmbeddingRefused) where the system lets no library be loaded from
    /// memory, and [`Unloadable`](FlashInferError::Unloadable) for one with modules embedded in it, which only a file can have.
    pub unsafe fn from_bytes(name: &str, bytes: &[u8]) -> Result<Self> {
        let (runtime, path) = (FlashInferRuntime::global()?, PathBuf::from(format!("(memory)/{name}")));
        let refused = |reason| loader::embedding_refused(name, reason);
        // The system's names end at a zero byte and have no room for more than this.
        const LONGEST_NAME: usize = 200;
        let short: String = name.chars().filter(|c| *c != '\0').take(LONGEST_NAME / 4).collect();
        let file = loader::sealed(&short, bytes).map_err(refused)?;
        let preflight = Preflight::read(&path, &file)?;
        preflight.check(runtime)?;
        if preflight.has_embedded() {
            let problem =
                "modules are embedded in it, and TVM-FFI itself, which loads those, takes files only".to_owned();
            return Err(preflight.unloadable(problem, "write it to a file and use Module::open"));
        }
        // SAFETY: the caller's promise.
        unsafe {
            preflight.load_cuda()?;
            Ok(Self::loaded(name, Library::from_descriptor(name, &path, file)?, runtime.api()))
        }
    }
}

fn open(path: &Path) -> Result<File> {
    let failed = |source| FlashInferError::Io { doing: "opening", path: path.to_owned(), source };
    // Asked before it is opened: opening a pipe waits for whoever writes to it.
    match path.metadata().map_err(failed)?.is_file() {
        true => File::open(path).map_err(failed),
        false => Err(FlashInferError::Unloadable {
            path: path.to_owned(),
            problem: "it is no file".to_owned(),
            remedy: "name a shared object".to_owned(),
        }),
    }
}

/// Lets TVM-FFI itself load a library, with what is embedded in it.
///
/// # Safety
/// As for [`Module::open`].
unsafe fn by_tvm_ffi(path: &Path, name: String, preflight: &Preflight) -> Result<Module> {
    let Some(path) = path.to_str() else {
        let problem = "TVM-FFI itself must load it, and takes no path that is not UTF-8".to_owned();
        return Err(preflight.unloadable(problem, "give it another name"));
    };
    let Some(load) = Func::global("ffi.ModuleLoadFromFile")? else {
        let problem = "the libtvm_ffi.so in use has no loader for embedded modules".to_owned();
        return Err(preflight.unloadable(problem, "use a newer one (RuntimeConfig::adopt_tvm_ffi)"));
    };
    let _actions = loader::SavedActions::new();
    // SAFETY: the caller's promise.
    let module = unsafe { load.named("ffi.ModuleLoadFromFile").typed::<(&str,), Module>().call_unseen((path,)) }?;
    Ok(module.named(name))
}
