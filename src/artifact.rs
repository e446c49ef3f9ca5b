//! What was vendored, and where it is now.

use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::digest::Digest;
use crate::error::{FlashInferError, Result};
use crate::names::{self, MODULES};
use crate::settings::LIB_DIR;
use crate::uri::Uri;

include!(concat!(env!("OUT_DIR"), "/vendored.rs"));

/// Below the executable's folder.
const BESIDE_EXECUTABLE: &str = "lib/flashinfer-rs";

/// CUDA's runtime, which kernels need.
pub(crate) const CUDART: &str = "libcudart.so.13";

/// A library that the build vendored.
#[derive(Debug)]
pub(crate) struct Vendored {
    pub(crate) distribution: &'static str,
    pub(crate) version: &'static str,
    pub(crate) wheel_sha256: Digest,
    pub(crate) source: Source,
    pub(crate) stored: Stored,
}

/// What is known of a library's file.
#[derive(Debug)]
pub(crate) struct Stored {
    pub(crate) name: &'static str,
    pub(crate) sha256: Digest,
    pub(crate) size: u64,
    /// A hint, right only on the machine that built; empty where the library is embedded.
    pub(crate) built_at: &'static str,
    /// The end of `built_at`, from the folder on that cargo puts programs into. It stays right when a project is moved, for
    /// then cargo builds nothing again. Empty where the library is embedded or cargo's folders are other ones.
    pub(crate) built_below: &'static str,
    /// With the feature `embed`: where the library's `size` bytes are in this program. Only the address is taken in the
    /// generated file: a dereference would leave that file's path in the program, for a panic's message.
    pub(crate) embedded: Option<fn() -> *const u8>,
}

impl Stored {
    /// With the feature `embed`: the library itself.
    fn embedded(&self) -> Option<&'static [u8]> {
        let address = self.embedded?();
        // SAFETY: the build let the assembler put that many bytes of the vendored file there, for good.
        Some(unsafe { std::slice::from_raw_parts(address, self.size as usize) })
    }
}

/// Which wheel a build took. Where the pinned one was found is not recorded: two builds of one wheel make one program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Source {
    /// The pinned one, by its digest.
    Pinned,
    /// Another one, which a variable of the build named.
    Override,
    /// One that a contributor built in a checkout of this crate.
    Local,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pinned => "pinned",
            Self::Override => names::OVERRIDE,
            Self::Local => names::LOCAL,
        })
    }
}

/// Where a vendored library comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Provenance {
    /// The wheel's distribution, `flashinfer_jit_cache` for example.
    pub distribution: &'static str,
    /// The version that the wheel gives itself.
    pub version: &'static str,
    /// The wheel's SHA-256, in hexadecimal. Where only members were fetched, the pinned one.
    pub wheel_sha256: String,
    /// The library's SHA-256, in hexadecimal: what it is checked against when it is loaded.
    pub sha256: String,
    /// The library's size in bytes.
    pub size: u64,
    /// Which wheel the build took.
    pub source: Source,
}

/// A library that was vendored, or that is used without having been.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Artifact {
    /// The library's soname.
    pub name: String,
    /// Where it comes from; `None` for the system's own.
    pub provenance: Option<Provenance>,
    /// The file it was loaded from; `None` if it was not loaded yet.
    pub loaded_from: Option<PathBuf>,
}

impl fmt::Display for Artifact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.name)?;
        match &self.provenance {
            Some(from) => {
                let Provenance { distribution, version, wheel_sha256, sha256, size, source } = from;
                write!(
                    f,
                    " {size} bytes, sha256 {sha256}, from {distribution} {version} ({source}, sha256 {wheel_sha256})"
                )?;
            }
            None => f.write_str(" not vendored")?,
        }
        match &self.loaded_from {
            Some(path) => write!(f, ", loaded from {}", path.display()),
            None => f.write_str(", not loaded"),
        }
    }
}

/// Every vendored library, and those among `loaded` that were not.
pub(crate) fn list(loaded: &[(String, PathBuf)]) -> Vec<Artifact> {
    let path_of = |name: &str| loaded.iter().find(|(known, _)| known == name).map(|(_, path)| path.clone());
    let rows = LIBRARIES.iter().map(|row| Artifact {
        name: row.stored.name.to_owned(),
        provenance: Some(Provenance {
            distribution: row.distribution,
            version: row.version,
            wheel_sha256: row.wheel_sha256.to_string(),
            sha256: row.stored.sha256.to_string(),
            size: row.stored.size,
            source: row.source,
        }),
        loaded_from: path_of(row.stored.name),
    });
    let others = loaded.iter().filter(|(name, _)| vendored(name).is_none());
    let others =
        others.map(|(name, path)| Artifact { name: name.clone(), provenance: None, loaded_from: Some(path.clone()) });
    rows.chain(others).collect()
}

/// The row of a library, if it was vendored.
pub(crate) fn vendored(name: &str) -> Option<&'static Vendored> {
    LIBRARIES.iter().find(|row| row.stored.name == name)
}

/// Refuses every name but those that a kernel module can have. A path would lead out of the folders that are searched, and
/// what modules need is in the process already: a second copy of it ends the process while it is loaded.
pub(crate) fn refuse_what_is_no_module(name: &str, needed_by_modules: &[&str]) -> Result<()> {
    let refused = |expected: String| FlashInferError::InvalidArgument {
        function: "FlashInferRuntime::module",
        argument: "soname",
        found: format!("{name:?}"),
        expected,
    };
    if name.contains('\0') || Path::new(name).file_name() != Some(OsStr::new(name)) {
        return Err(refused(
            "a kernel module's name without a folder, such as \"norm.so\"; FlashInferRuntime::load_module, which is unsafe, \
             loads a module from a path"
                .to_owned(),
        ));
    }
    if needed_by_modules.contains(&name) || vendored(name).is_some_and(|row| row.distribution != names::JIT_CACHE) {
        return Err(refused(format!(
            "a kernel module, such as \"norm.so\"; {name} is a library that modules need, and \
             FlashInferRuntime::initialize loads it"
        )));
    }
    Ok(())
}

/// What vendors a library that was not, or why it was not, though a feature wants it.
pub(crate) fn how_to_vendor(name: &str) -> String {
    let concerned = |sonames: &[&str]| sonames.is_empty() || sonames.contains(&name);
    let reasons: Vec<&str> = MISSING.iter().filter(|(of, _)| concerned(of)).map(|(_, reason)| *reason).collect();
    if !reasons.is_empty() {
        return reasons.join("; ");
    }
    if vendored(name).is_some() {
        return moved();
    }
    if let Some((_, feature)) = FEATURES.iter().find(|(soname, _)| *soname == name) {
        return format!("build with the Cargo feature `{feature}`");
    }
    let module = name.strip_suffix(".so").unwrap_or(name);
    match module.parse::<Uri>() {
        Ok(uri) if !uri.is_released() => format!(
            "FlashInfer's wheel has no such module; `cargo xtask wheel --kernels {module}`, in a checkout of flashinfer-rs, \
             builds a wheel of it, where there is a recipe, and {MODULES}={module} vendors it from there"
        ),
        _ => format!("no Cargo feature vendors it; build with {MODULES}={module}, if FlashInfer's wheel has it"),
    }
}

/// What brings a vendored library back to where it is looked for.
fn moved() -> String {
    format!(
        "if the project was moved or its target folder cleaned or restored, run `cargo clean -p flashinfer-rs` and build again; \
         what `cargo install` built has lost them with the target folder that it used, so install it with the feature `embed`, \
         which puts them into the program; elsewhere put the vendored libraries into the folder that {LIB_DIR} names, or into \
         {BESIDE_EXECUTABLE} beside the executable, or build with the feature `embed`"
    )
}

/// Where a library is now.
pub(crate) enum Location {
    File(PathBuf),
    /// In this program: its bytes, and the digest that they must have.
    Embedded(&'static [u8], &'static Digest),
}

/// Finds a library: in the configured folder, in that of the variable, in this program, beside the executable, where the
/// build put it, seen from the executable and then by its full path.
pub(crate) fn locate(name: &str, stored: Option<&'static Stored>, configured: Option<&Path>) -> Result<Location> {
    let mut searched = Vec::new();
    let mut file = |path: PathBuf| {
        let found = path.is_file();
        searched.push(path.display().to_string());
        found.then_some(path)
    };
    let from_env = LIB_DIR.read().map(|given| PathBuf::from(given.value));
    for folder in [configured.map(Path::to_owned), from_env].into_iter().flatten() {
        if let Some(path) = file(folder.join(name)) {
            return Ok(Location::File(path));
        }
    }
    if let Some(row) = stored
        && let Some(bytes) = row.embedded()
    {
        return Ok(Location::Embedded(bytes, &row.sha256));
    }
    let executable = std::env::current_exe().ok();
    let mut places = Vec::new();
    if let Some(folder) = executable.as_deref().and_then(Path::parent) {
        places.push(folder.join(BESIDE_EXECUTABLE).join(name));
        if let Some(row) = stored.filter(|row| !row.built_below.is_empty()) {
            // cargo puts programs beside its folder `build`, and tests and examples one folder below that.
            places.extend(folder.ancestors().take(2).map(|folder| folder.join(row.built_below)));
        }
    }
    // Last: where a project was copied, this is the original's, which may have been built again since.
    places.extend(stored.map(|row| PathBuf::from(row.built_at)));
    if let Some(path) = places.into_iter().find_map(file) {
        return Ok(Location::File(path));
    }
    let remedy = match stored {
        Some(_) => moved(),
        None => format!("{name} was not vendored: {}", how_to_vendor(name)),
    };
    Err(FlashInferError::ArtifactMissing { library: name.to_owned(), searched, remedy })
}
