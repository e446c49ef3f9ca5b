//! FlashInfer-Bench kernels that the build vendored: pinned by digest, as the wheels are, and found and loaded as their
//! libraries are.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use crate::artifact::Stored;
#[allow(unused_imports, reason = "a table without a kernel has no digest")]
use crate::digest::Digest;
use crate::error::{FlashInferError, Result};
use crate::loader::Library;
use crate::module::{Module, nearest};
use crate::names;
use crate::open::Preflight;
use crate::runtime::FlashInferRuntime;

include!(concat!(env!("OUT_DIR"), "/pinned.rs"));

/// A FlashInfer-Bench kernel that was pinned by a `[[kernel]]` entry when this program was built: a library, and what its lock
/// says of it. [`FlashInferRuntime::kernel`] loads it.
#[derive(Debug)]
#[non_exhaustive]
pub struct PinnedKernel {
    /// What a program asks for it by.
    pub name: &'static str,
    /// The name of the Definition that it computes.
    pub definition: &'static str,
    /// The name of the Solution that it was built of, where that is known.
    pub solution: Option<&'static str>,
    /// The Solution's author, where that is known.
    pub author: Option<&'static str>,
    /// The function to call.
    pub entry: &'static str,
    /// Whether the function takes its outputs as its last arguments, instead of returning them; `None` where nothing says.
    pub destination_passing_style: Option<bool>,
    /// What its GPU code is for: `sm_90a`, or `compute_90` for PTX. Empty where it has none.
    pub architectures: &'static [&'static str],
    /// The release of CUDA whose libraries it needs, 13 for example; `None` where it needs none.
    pub cuda: Option<u32>,
    /// The libraries that it needs, by soname.
    pub needed: &'static [&'static str],
    /// Its `kernel_metadata.txt`.
    pub metadata: &'static str,
    /// Its `definition.json`, where one was pinned with it.
    pub definition_json: Option<&'static str>,
    /// Its `solution.json`, where one was pinned with it.
    pub solution_json: Option<&'static str>,
    stored: Stored,
}

impl PinnedKernel {
    /// Every kernel that was vendored.
    pub fn all() -> &'static [Self] {
        KERNELS
    }

    /// The kernel of this name.
    ///
    /// # Errors
    /// [`KernelMissing`](FlashInferError::KernelMissing), which lists those that were vendored.
    pub fn named(name: &str) -> Result<&'static Self> {
        KERNELS.iter().find(|kernel| kernel.name == name).ok_or_else(|| missing(name))
    }

    /// The library's SHA-256, in hexadecimal: what it is checked against when it is loaded.
    pub fn sha256(&self) -> String {
        self.stored.sha256.to_string()
    }

    /// The library's size in bytes.
    pub fn size(&self) -> u64 {
        self.stored.size
    }

    /// The file that it was loaded from; `None` if it was not loaded yet.
    pub fn loaded_from(&self) -> Option<PathBuf> {
        let loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        loaded.get(self.name)?.path().map(ToOwned::to_owned)
    }

    /// Loads it, after all that was looked at before.
    fn load(&'static self, runtime: &'static FlashInferRuntime) -> Result<Module> {
        let name = self.stored.name;
        let (path, file, in_memory) = runtime.file(&self.stored)?;
        let preflight = Preflight::read(&path, &file)?;
        let alone = "load it by Module::open, which is unsafe";
        if !preflight.is_complete() {
            let problem = "it was stripped of the tables that tell what it needs and exports".to_owned();
            return Err(preflight.unloadable(problem, "pin one that has them"));
        }
        if let Some(symbol) = preflight.registering_symbol() {
            let problem = format!("it needs {symbol}, which changes what the whole process shares and has no lock");
            return Err(preflight.unloadable(problem, format!("{alone}, while no other thread uses TVM-FFI")));
        }
        if preflight.has_embedded() {
            let problem = "modules are embedded in it, and TVM-FFI itself, which loads those, looks at no digest";
            return Err(preflight.unloadable(problem.to_owned(), alone));
        }
        preflight.check(runtime)?;
        // SAFETY: whoever pinned the kernel vouched for its code, as for that of any dependency of the program: the file has
        // the digest that was pinned, or the configuration's author vouched for the folders. It needs no function that would
        // change TVM-FFI's tables while other threads use them.
        let library = unsafe {
            preflight.load_cuda()?;
            match in_memory {
                true => Library::from_sealed(name, &path, file)?,
                false => Library::from_descriptor(name, &path, file)?,
            }
        };
        Ok(Module::loaded(name, library, runtime.api()))
    }
}

impl fmt::Display for PinnedKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, definition, .. } = self;
        write!(f, "{name} {} bytes, sha256 {}, computes {definition}", self.size(), self.sha256())?;
        if let Some(solution) = self.solution {
            write!(f, " by {solution}")?;
        }
        if let Some(author) = self.author {
            write!(f, " of {author}")?;
        }
        match self.architectures {
            [] => f.write_str(", without GPU code")?,
            some => write!(f, ", for {}", some.join(", "))?,
        }
        match self.loaded_from() {
            Some(path) => write!(f, ", loaded from {}", path.display()),
            None => f.write_str(", not loaded"),
        }
    }
}

/// The kernels that were loaded, by their names. A process has one runtime.
static LOADED: Mutex<BTreeMap<&'static str, &'static Module>> = Mutex::new(BTreeMap::new());

#[cold]
fn missing(name: &str) -> FlashInferError {
    let vendored: Vec<String> = KERNELS.iter().map(|kernel| kernel.name.to_owned()).collect();
    let remedy = match ELSEWHERE {
        [] => format!(
            "pin it by a [[kernel]] entry in a lock file that {} names when the program is built (docs/kernel-lock.md), which \
             `cargo xtask kernel add`, in a checkout of flashinfer-rs, writes",
            names::KERNELS
        ),
        reasons => reasons.join("; "),
    };
    let nearest = nearest(name, &vendored).map(str::to_owned);
    FlashInferError::KernelMissing { kernel: name.to_owned(), nearest, vendored, remedy }
}

impl FlashInferRuntime {
    /// A FlashInfer-Bench kernel that was pinned when this program was built, by its name in the lock. It is looked for where
    /// this crate's other libraries are, as `NAME.kernel.so`, compared with its digest, and loaded for good.
    ///
    /// What it says of itself is looked at before: what it needs of TVM-FFI and CUDA, and which GPUs its code is for.
    /// [`PinnedKernel::entry`] is the function to call, and [`PinnedKernel::definition`] what it computes.
    ///
    /// ```no_run
    /// # fn gemm() -> flashinfer_rs::Result<()> {
    /// use flashinfer_rs::{FlashInferRuntime, PinnedKernel};
    ///
    /// let module = FlashInferRuntime::global()?.kernel("gemm_n4096_k4096")?;
    /// let gemm = module.function(PinnedKernel::named("gemm_n4096_k4096")?.entry)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// This is safe, since whoever pins a kernel vouches for its code, as for a dependency's: it runs in this process. To
    /// call its functions is not, since nothing here knows what they do.
    ///
    /// # Errors
    /// [`KernelMissing`](FlashInferError::KernelMissing), which lists those that were vendored;
    /// [`ArtifactMissing`](FlashInferError::ArtifactMissing), [`DigestMismatch`](FlashInferError::DigestMismatch),
    /// [`EmbeddingRefused`](FlashInferError::EmbeddingRefused); [`Unloadable`](FlashInferError::Unloadable) as for
    /// [`Module::open`], and for a kernel that registers something with TVM-FFI or has modules embedded in it;
    /// [`LoadFailed`](FlashInferError::LoadFailed) for what only the dynamic linker finds.
    pub fn kernel(&'static self, name: &str) -> Result<&'static Module> {
        let kernel = PinnedKernel::named(name)?;
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = loaded.get(kernel.name) {
            return Ok(module);
        }
        let module: &'static Module = Box::leak(Box::new(kernel.load(self)?));
        loaded.insert(kernel.name, module);
        Ok(module)
    }
}
