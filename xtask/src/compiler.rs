//! What kernels are compiled with: one folder of sources, headers and tools, from `compiler.lock`.

use std::fs;
use std::io::{BufReader, Read, Seek};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;
use zip::ZipArchive;

use crate::shell::{self, say};
use crate::vendoring::digest::{Digest, Hasher};
use crate::vendoring::env::Env;
use crate::vendoring::error::{Error, Result, refuse};
use crate::vendoring::fetch::{Client, RemoteFile};
use crate::vendoring::index;
use crate::vendoring::lock::{self, Member};
use crate::vendoring::source::Ladder;
use crate::vendoring::store::publish_bytes;
use crate::vendoring::wheel::Wheel as Archive;

const LOCK: &str = include_str!("../compiler.lock");

/// FlashInfer's variable for the compiler.
const NVCC: &str = "FLASHINFER_NVCC";
const CUDA_HOME: &str = "CUDA_HOME";
/// The compiler's release that the pinned kernels are built with.
const NVCC_MAJOR: &str = "13";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CompilerLock {
    #[allow(dead_code, reason = "there is one version so far")]
    version: u32,
    #[serde(rename = "wheel")]
    wheels: Vec<Pinned>,
}

#[derive(Deserialize, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Role {
    Sources,
    Compiler,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Pinned {
    distribution: String,
    version: String,
    role: Role,
    file: String,
    sha256: String,
    size: u64,
    purl: String,
    unpack: Vec<Unpack>,
    #[serde(default)]
    members: Vec<PinnedMember>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Unpack {
    from: String,
    to: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PinnedMember {
    path: String,
    size: u64,
    sha256: String,
}

/// Stand-in headers, relative to the tree; to be searched last, so that a real one wins.
pub const STUBS: &str = "stubs";

/// A folder to compile in.
pub struct Toolchain {
    /// Where commands run: include paths are relative to it, so that objects do not depend on where it is.
    pub tree: PathBuf,
    pub nvcc: PathBuf,
    /// CUDA's headers, relative to the tree or absolute.
    pub cuda_include: String,
    /// Folders with libcudart to link against.
    pub library_dirs: Vec<PathBuf>,
    pub host: String,
    /// What an object depends on beside its command and its source.
    pub identity: String,
}

/// Finds or fetches everything.
pub fn prepare(env: &Env) -> Result<Toolchain> {
    // Named before anything is downloaded: nvcc is of no use without it.
    let host = host_compiler(env)?;
    let given = given_nvcc(env)?;
    let lock: CompilerLock = toml::from_str(LOCK).map_err(|e| Error::Refused(format!("xtask/compiler.lock: {e}")))?;
    let role = |wheel: &&Pinned| given.is_none() || wheel.role == Role::Sources;
    let wheels: Vec<&Pinned> = lock.wheels.iter().filter(role).collect();
    let mut hasher = Hasher::new();
    wheels.iter().for_each(|wheel| hasher.update(wheel.sha256.as_bytes()));
    hasher.update(STUBS.as_bytes());
    let sources = hasher.finish().to_string();
    let tree = shell::cache(env)?.join(format!("tree-{}", &sources[..16]));
    if !tree.is_dir() {
        unpack_all(&wheels, env, &tree)?;
    }
    let (nvcc, cuda_include, library_dirs, compiler) = match given {
        Some((nvcc, home)) => {
            let version = version_of(&nvcc)?;
            (nvcc, home.join("include").display().to_string(), vec![home.join("lib64"), home.join("lib")], version)
        }
        None => (tree.join("cuda/bin/nvcc"), "cuda/include".to_owned(), vec![tree.join("cuda/lib")], String::new()),
    };
    let identity = format!("{sources}\n{compiler}\n{}", version_of(Path::new(&host))?);
    Ok(Toolchain { tree, nvcc, cuda_include, library_dirs, host, identity })
}

fn host_compiler(env: &Env) -> Result<String> {
    let name = env.text("CXX").unwrap_or_else(|| "c++".to_owned());
    match Command::new(&name).arg("--version").output() {
        Ok(output) if output.status.success() => Ok(name),
        _ => refuse!(
            "there is no C++ compiler: `{name} --version` does not run; install g++ (Debian: `apt-get install g++`), or set CXX"
        ),
    }
}

/// An nvcc that the user gave, with its CUDA folder: `FLASHINFER_NVCC`, else `CUDA_HOME` where it has nvcc 13.
fn given_nvcc(env: &Env) -> Result<Option<(PathBuf, PathBuf)>> {
    if let Some(nvcc) = env.path(NVCC) {
        let release = version_of(&nvcc)?;
        if !is_release_13(&release) {
            refuse!(
                "{NVCC}={} is not nvcc {NVCC_MAJOR}: it says `{}`; name an nvcc of CUDA {NVCC_MAJOR}, or unset it",
                nvcc.display(),
                release.lines().nth(3).unwrap_or(&release).trim()
            );
        }
        let home = env.path(CUDA_HOME).or_else(|| Some(nvcc.canonicalize().ok()?.parent()?.parent()?.to_owned()));
        return Ok(home.map(|home| (nvcc, home)));
    }
    let Some(home) = env.path(CUDA_HOME) else { return Ok(None) };
    let nvcc = home.join("bin/nvcc");
    match version_of(&nvcc) {
        Ok(release) if is_release_13(&release) => Ok(Some((nvcc, home))),
        _ => {
            say(format!("{CUDA_HOME}={} has no nvcc {NVCC_MAJOR}; the pinned compiler is used", home.display()));
            Ok(None)
        }
    }
}

fn version_of(program: &Path) -> Result<String> {
    shell::output(Command::new(program).arg("--version"))
}

fn is_release_13(text: &str) -> bool {
    text.contains(&format!("release {NVCC_MAJOR}."))
}

/// Unpacks into a temporary folder and names it when it is complete.
fn unpack_all(wheels: &[&Pinned], env: &Env, tree: &Path) -> Result<()> {
    let parent = tree.parent().unwrap_or(tree);
    fs::create_dir_all(parent).map_err(|e| Error::io("creating the folder", parent, &e))?;
    let temporary = tempfile::Builder::new().prefix(".tmp-tree-").tempdir_in(parent);
    let temporary = temporary.map_err(|e| Error::io("writing to the folder", parent, &e))?;
    let total: u64 = wheels.iter().filter(|wheel| wheel.members.is_empty()).map(|wheel| wheel.size).sum();
    say(format!("sources and compiler: {} wheels, up to {:.0} MB to fetch", wheels.len(), total as f64 / 1e6));
    for wheel in wheels {
        if wheel.members.is_empty() {
            unpack_whole(wheel, env, temporary.path())?
        } else {
            unpack_members(wheel, env, temporary.path())?
        }
    }
    finish(temporary.path())?;
    let complete = temporary.keep();
    if let Err(e) = fs::rename(&complete, tree) {
        let _ = fs::remove_dir_all(&complete);
        // Another process may have been faster; its tree has the same name, so the same content.
        if !tree.is_dir() {
            return Err(Error::io("naming", tree, &e));
        }
    }
    Ok(())
}

/// What makes the compiler's wheels work as a CUDA folder, and headers that are included for nothing: norm.cu's
/// reduceKernelUtils.cuh names curand_kernel.h, uses none of it, and NVIDIA ships it in a wheel of 60 MB.
fn finish(tree: &Path) -> Result<()> {
    publish_bytes(&tree.join(STUBS).join("curand_kernel.h"), b"// Nothing of cuRAND is used.\n")?;
    for folder in ["cuda/bin", "cuda/nvvm/bin"] {
        for entry in fs::read_dir(tree.join(folder)).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_file() {
                fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
                    .map_err(|e| Error::io("changing", &path, &e))?;
            }
        }
    }
    let library = tree.join("cuda/lib/libcudart.so");
    if tree.join("cuda/lib").is_dir() {
        std::os::unix::fs::symlink("libcudart.so.13", &library).map_err(|e| Error::io("linking", &library, &e))?;
    }
    Ok(())
}

impl Pinned {
    fn sha256(&self) -> Result<Digest> {
        self.sha256.parse().map_err(Error::Refused)
    }

    /// Where a member goes.
    fn destination(&self, member: &str, tree: &Path) -> Option<PathBuf> {
        let unpack = self.unpack.iter().find(|unpack| member.starts_with(&unpack.from))?;
        Some(tree.join(&unpack.to).join(&member[unpack.from.len()..]))
    }
}

fn unpack_whole(pinned: &Pinned, env: &Env, tree: &Path) -> Result<()> {
    let wheel = lock::Wheel {
        distribution: pinned.distribution.clone(),
        version: pinned.version.clone(),
        target: shell::target(),
        file: pinned.file.clone(),
        sha256: pinned.sha256()?,
        size: Some(pinned.size),
        sources: vec![lock::Source::Purl(pinned.purl.clone())],
        optional: false,
        members: Vec::new(),
    };
    let bar = shell::transfer_bar(&pinned.file);
    let mut progress = shell::progress(&bar);
    let mut ladder = Ladder { env, workspace: None, checkout: None, progress: &mut progress };
    // The ladder's override variables are about what is vendored, not about what it is compiled from.
    let found = ladder.find_pinned(&wheel)?;
    bar.finish_and_clear();
    let broken = |e: zip::result::ZipError| Error::Refused(format!("{}: {e}; get it again", pinned.file));
    let mut archive = ZipArchive::new(BufReader::new(found.file)).map_err(broken)?;
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index).map_err(broken)?;
        let (Some(name), true) = (entry.enclosed_name(), entry.is_file()) else { continue };
        let Some(path) = name.to_str().and_then(|name| pinned.destination(name, tree)) else { continue };
        write_member(&mut entry, &path)?;
    }
    Ok(())
}

/// Into a folder that gets its final name only when it is complete: no temporary name for each file.
fn write_member(reader: &mut impl Read, path: &Path) -> Result<()> {
    let failed = |e: std::io::Error| Error::io("writing", path, &e);
    fs::create_dir_all(path.parent().unwrap_or(path)).map_err(failed)?;
    let mut file = fs::File::create(path).map_err(failed)?;
    std::io::copy(reader, &mut file).map_err(failed)?;
    Ok(())
}

/// A few members by byte ranges: their digests are pinned, so the rest of the wheel need not be seen.
fn unpack_members(pinned: &Pinned, env: &Env, tree: &Path) -> Result<()> {
    if let Some(name) = env.offline() {
        refuse!(
            "headers of {} are needed and {name} is set; unset it, or set {CUDA_HOME} to a CUDA {NVCC_MAJOR} toolkit",
            pinned.file
        );
    }
    let client = Client::new();
    let mut faults = Vec::new();
    for place in index::places(&pinned.purl, env)? {
        // A folder would hold the whole wheel, which nobody keeps for a few headers.
        let index::Place::Page { url: page, .. } = place else { continue };
        match index::find(&client, &page, &pinned.file, &pinned.sha256()?) {
            Ok(link) => return unpack_from(&client, link.url, pinned, tree),
            Err(fault) => faults.push(fault.to_string()),
        }
    }
    Err(Error::Unavailable(format!(
        "{} was found nowhere: {}; check the package index",
        pinned.file,
        faults.join("; ")
    )))
}

fn unpack_from(client: &Client, url: String, pinned: &Pinned, tree: &Path) -> Result<()> {
    let mut archive = Archive::open_remote(RemoteFile::new(client, url, pinned.size), pinned.file.clone())?;
    for member in &pinned.members {
        let Some(path) = pinned.destination(&member.path, tree) else {
            refuse!("xtask/compiler.lock: {} lies in no folder that is unpacked", member.path);
        };
        extract(&mut archive, member, &path)?;
    }
    Ok(())
}

fn extract<R: Read + Seek>(archive: &mut Archive<R>, pinned: &PinnedMember, path: &Path) -> Result<()> {
    let sha256 = pinned.sha256.parse().map_err(Error::Refused)?;
    let member = Member { size: Some(pinned.size), sha256: Some(sha256), ..Member::at(pinned.path.clone()) };
    let mut bytes = Vec::new();
    archive.copy(&member, &mut bytes, path)?;
    publish_bytes(path, &bytes)
}
