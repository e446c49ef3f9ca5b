//! What kernels are compiled with: one folder of sources, headers and tools, from `compiler.lock`.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{BufReader, Read, Seek};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;
use zip::ZipArchive;

use crate::compile::key;
use crate::recipes::GENERATED;
use crate::shell::{self, say};
use crate::vendoring::digest::{Digest, hash_reader};
use crate::vendoring::env::Env;
use crate::vendoring::error::{Error, Result, refuse};
use crate::vendoring::fetch::{Client, RemoteFile};
use crate::vendoring::index;
use crate::vendoring::lock::{self, Member};
use crate::vendoring::pip::Pip;
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
    /// The machine that it runs on; none for what is the same on all.
    target: Option<String>,
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
/// norm.cu's reduceKernelUtils.cuh names curand_kernel.h and uses none of it; a CUDA folder may be without cuRAND.
const STUB_FILES: [(&str, &str); 1] = [("curand_kernel.h", "// Whoever uses cuRAND needs the real one.\n")];
/// TVM-FFI's headers in the tree.
const HEADERS: &str = "tvm_ffi";
/// Raised when the same wheels would be unpacked into another tree.
const TREE_FORMAT: &str = "tree 2";
/// The digest of what was unpacked, in the tree.
const CONTENTS: &str = ".contents";

/// What compilers and linkers are told by the environment, and may change what they make.
const TOLD: [&str; 9] = [
    "NVCC_PREPEND_FLAGS",
    "NVCC_APPEND_FLAGS",
    "CPATH",
    "C_INCLUDE_PATH",
    "CPLUS_INCLUDE_PATH",
    "LIBRARY_PATH",
    "COMPILER_PATH",
    "GCC_EXEC_PREFIX",
    "SOURCE_DATE_EPOCH",
];
/// What says where programs and their libraries are found. What these programs are is part of the identity.
const FOUND: [&str; 4] = ["PATH", "LD_LIBRARY_PATH", "HOME", "TMPDIR"];
/// Programs that start the compiler named after them. nvcc must be given the compiler itself, and its objects are kept
/// here.
const LAUNCHERS: [&str; 3] = ["ccache", "sccache", "distcc"];
/// What makes up a CUDA toolkit's compiler.
const PROGRAMS: [&str; 9] = [
    "bin/nvcc",
    "bin/nvcc.profile",
    "bin/cudafe++",
    "bin/ptxas",
    "bin/fatbinary",
    "bin/nvlink",
    "nvvm/bin/cicc",
    "nvvm/libdevice/libdevice.10.bc",
    "bin/crt/link.stub",
];

/// A folder to compile in.
pub struct Toolchain {
    /// Where commands run: include paths are relative to it, so that objects do not depend on where it is.
    pub tree: PathBuf,
    pub nvcc: PathBuf,
    /// CUDA's headers, relative to the tree or absolute.
    pub cuda_include: String,
    /// Folders with libcudart to link against.
    pub library_dirs: Vec<PathBuf>,
    /// The C++ compiler and its first arguments.
    pub host: Vec<String>,
    /// The environment of compilers and linkers, which is all that they get; with whether a variable may change what they
    /// make.
    pub environment: Vec<(String, OsString, bool)>,
    /// What an object depends on beside its command, its environment and its source.
    pub identity: String,
}

impl Toolchain {
    /// A command with the toolchain's environment, and nothing else of this process's.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        let environment = self.environment.iter().map(|(name, value, _)| (name, value));
        command.env_clear().envs(environment);
        command
    }

    /// The C++ compiler.
    pub fn host_command(&self) -> Command {
        let mut command = self.command(&self.host[0]);
        command.args(&self.host[1..]);
        command
    }

    /// How nvcc is told of the C++ compiler. Without, it would look for one by itself.
    pub fn host_flags(&self) -> Vec<String> {
        let arguments = self.host[1..].iter().map(|argument| format!("--compiler-options={argument}"));
        ["-ccbin".to_owned(), self.host[0].clone()].into_iter().chain(arguments).collect()
    }

    /// The variables that may change what is made, as part of a key.
    pub fn environment_text(&self) -> String {
        let told = self.environment.iter().filter(|(_, _, told)| *told);
        told.map(|(name, value, _)| format!("{name}={value:?}\n")).collect()
    }
}

/// The environment that compilers and linkers get.
fn environment(env: &Env) -> Vec<(String, OsString, bool)> {
    let one = |told: bool| move |name: &&str| Some(((*name).to_owned(), env.os(name)?, told));
    FOUND.iter().filter_map(one(false)).chain(TOLD.iter().filter_map(one(true))).collect()
}

/// Finds or fetches everything.
pub fn prepare(env: &Env) -> Result<Toolchain> {
    prepare_with(env, given_nvcc)
}

/// As [`prepare`], with the compiler that is pinned and told nothing by the environment, whatever stands there: for what must
/// come out the same everywhere.
pub fn pinned(env: &Env) -> Result<Toolchain> {
    let mut toolchain = prepare_with(env, |_| Ok(None))?;
    toolchain.environment.retain(|(_, _, told)| !told);
    Ok(toolchain)
}

fn prepare_with(env: &Env, given: impl FnOnce(&Env) -> Result<Option<(PathBuf, PathBuf)>>) -> Result<Toolchain> {
    // Named before anything is downloaded: nvcc is of no use without it.
    let (host, version) = host_compiler(env)?;
    let given = given(env)?;
    let lock: CompilerLock = toml::from_str(LOCK).map_err(|e| Error::Refused(format!("xtask/compiler.lock: {e}")))?;
    let role = |wheel: &&Pinned| given.is_none() || wheel.role == Role::Sources;
    let wheels: Vec<&Pinned> = lock.wheels.iter().filter(role).collect();
    let here = shell::target();
    if let Some(other) = wheels.iter().find(|wheel| wheel.target.as_ref().is_some_and(|target| *target != here)) {
        refuse!(
            "xtask/compiler.lock pins {} for {} only, and this machine is {here}; install CUDA {NVCC_MAJOR} and set \
             {CUDA_HOME} to it",
            other.distribution,
            other.target.as_deref().unwrap_or_default()
        );
    }
    let tree = shell::cache(env)?.join(tree_name(LOCK, given.is_some()));
    let contents = unpacked(&tree, || unpack_all(&wheels, env, &tree))?;
    let (nvcc, cuda_include, library_dirs, compiler) = match given {
        Some((nvcc, home)) => {
            let compiler = format!("{}{}", version_of(&nvcc)?, programs(&nvcc, &home)?);
            (nvcc, home.join("include").display().to_string(), vec![home.join("lib64"), home.join("lib")], compiler)
        }
        None => (tree.join("cuda/bin/nvcc"), "cuda/include".to_owned(), vec![tree.join("cuda/lib")], String::new()),
    };
    let identity = format!("{contents}\n{compiler}\n{version}");
    Ok(Toolchain { tree, nvcc, cuda_include, library_dirs, host, environment: environment(env), identity })
}

/// As [`prepare`], for what has no CUDA: the sources and headers alone, and the C++ compiler. There is no nvcc in it.
pub fn prepare_host(env: &Env) -> Result<Toolchain> {
    let (host, version) = host_compiler(env)?;
    let lock: CompilerLock = toml::from_str(LOCK).map_err(|e| Error::Refused(format!("xtask/compiler.lock: {e}")))?;
    // The tree with a compiler has the same headers, and is not fetched twice.
    let whole = shell::cache(env)?.join(tree_name(LOCK, false));
    let has_whole = recorded(&whole).is_some();
    let tree = if has_whole { whole } else { shell::cache(env)?.join(tree_name(LOCK, true)) };
    let wheels: Vec<&Pinned> = lock.wheels.iter().filter(|wheel| has_whole || wheel.role == Role::Sources).collect();
    unpacked(&tree, || unpack_all(&wheels, env, &tree))?;
    // By what is read of it, so that both trees give the same.
    let identity = format!("{}\n{version}", contents(&tree.join(HEADERS))?);
    Ok(Toolchain {
        tree,
        nvcc: PathBuf::new(),
        cuda_include: String::new(),
        library_dirs: Vec::new(),
        host,
        environment: environment(env),
        identity,
    })
}

/// A tree's folder, by all that decides what is unpacked into it: the lock as it is written, and what is added.
fn tree_name(lock: &str, nvcc_is_given: bool) -> String {
    let given = if nvcc_is_given { "sources" } else { "all" };
    let stubs = STUB_FILES.iter().flat_map(|(name, text)| [*name, *text]);
    let name = key([TREE_FORMAT, lock, given, STUBS].into_iter().chain(stubs).map(str::as_bytes));
    format!("tree-{}", &name.to_string()[..16])
}

/// The digest of a tree, which is unpacked where it is not there or no longer what was unpacked.
fn unpacked(tree: &Path, unpack: impl FnOnce() -> Result<()>) -> Result<Digest> {
    if tree.is_dir() {
        let found = contents(tree)?;
        if recorded(tree).as_ref() == Some(&found.to_string()) {
            return Ok(found);
        }
        say(format!("{} is not what was unpacked; it is unpacked again", tree.display()));
        set_aside(tree)?;
    }
    unpack()?;
    contents(tree)
}

/// What a tree held when it was unpacked.
pub fn recorded(tree: &Path) -> Option<String> {
    fs::read_to_string(tree.join(CONTENTS)).ok().map(|text| text.trim().to_owned())
}

/// By another name first: another process may compile in it, or unpack it meanwhile.
fn set_aside(tree: &Path) -> Result<()> {
    let parent = tree.parent().unwrap_or(tree);
    let aside = tempfile::Builder::new().prefix(".tmp-tree-").tempdir_in(parent);
    let aside = aside.map_err(|e| Error::io("writing to the folder", parent, &e))?;
    fs::rename(tree, aside.path().join("tree")).map_err(|e| Error::io("moving", tree, &e))
}

/// The digest of all that lies in a tree but what is generated there: names, kinds, whether they can be run, contents.
pub fn contents(tree: &Path) -> Result<Digest> {
    let mut parts: Vec<Vec<u8>> = Vec::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        let path = tree.join(&folder);
        let failed = |e: std::io::Error| Error::io("reading", &path, &e);
        let entries: std::io::Result<Vec<_>> = fs::read_dir(&path).map_err(failed)?.collect();
        let mut entries = entries.map_err(failed)?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let (name, path) = (folder.join(entry.file_name()), entry.path());
            if name == Path::new(CONTENTS) || name == Path::new(GENERATED) {
                continue;
            }
            let failed = |e: std::io::Error| Error::io("reading", &path, &e);
            let kind = entry.file_type().map_err(failed)?;
            parts.push(name.as_os_str().as_encoded_bytes().to_vec());
            parts.push(if kind.is_dir() {
                folders.push(name);
                b"folder".to_vec()
            } else if kind.is_symlink() {
                let target = fs::read_link(&path).map_err(failed)?;
                [b"link ", target.as_os_str().as_encoded_bytes()].concat()
            } else if kind.is_file() {
                let file = fs::File::open(&path).map_err(failed)?;
                let can_run = file.metadata().map_err(failed)?.permissions().mode() & 0o111 != 0;
                format!("file {can_run} {}", hash_reader(file).map_err(failed)?.0).into_bytes()
            } else {
                // A pipe is read for ever.
                b"neither".to_vec()
            });
        }
    }
    Ok(key(parts.iter().map(Vec::as_slice)))
}

/// The C++ compiler, with its first arguments, and what it says of itself.
fn host_compiler(env: &Env) -> Result<(Vec<String>, String)> {
    let named = env.text("CXX").unwrap_or_else(|| "c++".to_owned());
    let Some(host) = host_words(&named) else {
        refuse!("CXX={named} names no compiler; set it to a command as a shell would take it, or unset it")
    };
    match Command::new(&host[0]).args(&host[1..]).arg("--version").output() {
        Ok(output) if output.status.success() => Ok((host, String::from_utf8_lossy(&output.stdout).into_owned())),
        _ => refuse!(
            "there is no C++ compiler: `{} --version` does not run; install g++ (Debian: `apt-get install g++`), or set CXX",
            host.join(" ")
        ),
    }
}

/// A command's words as a shell would split them, without launchers.
fn host_words(command: &str) -> Option<Vec<String>> {
    let is_launcher = |word: &String| {
        Path::new(word).file_name().and_then(OsStr::to_str).is_some_and(|name| LAUNCHERS.contains(&name))
    };
    let words: Vec<String> = shlex::split(command)?.into_iter().skip_while(is_launcher).collect();
    (!words.is_empty()).then_some(words)
}

/// The digests of a given compiler's parts, as far as they are there.
fn programs(nvcc: &Path, home: &Path) -> Result<String> {
    let mut text = String::new();
    for path in [nvcc.to_owned()].into_iter().chain(PROGRAMS.iter().map(|program| home.join(program))) {
        if path.is_file() {
            let file = fs::File::open(&path).and_then(hash_reader);
            let (sha256, _) = file.map_err(|e| Error::io("reading", &path, &e))?;
            text += &format!("{} {sha256}\n", path.display());
        }
    }
    Ok(text)
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
    publish_bytes(&temporary.path().join(CONTENTS), format!("{}\n", contents(temporary.path())?).as_bytes())?;
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

/// What makes the compiler's wheels work as a CUDA folder, and headers that are included for nothing.
fn finish(tree: &Path) -> Result<()> {
    for (name, text) in STUB_FILES {
        publish_bytes(&tree.join(STUBS).join(name), text.as_bytes())?;
    }
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
        variant: None,
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
    let mut ladder = Ladder::new(env, &mut progress);
    // The ladder's override variables are about what is vendored, not about what it is compiled from.
    let scratch = shell::cache(env)?;
    fs::create_dir_all(&scratch).map_err(|e| Error::io("creating the folder", &scratch, &e))?;
    let found = ladder.find_pinned(&wheel, &scratch)?;
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
    let pip = Pip::read(env)?;
    let client = pip.client(&Client::new(env))?;
    let mut faults = Vec::new();
    for place in index::places(&pinned.purl, env, &pip)? {
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

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use super::*;

    fn env(pairs: &[(&str, &str)]) -> Env {
        Env::fixed(pairs.iter().copied())
    }

    fn tree() -> TempDir {
        let temp = tempfile::tempdir().expect("a temporary folder");
        write(temp.path(), "include/a.h", "a");
        write(temp.path(), "bin/nvcc", "nvcc");
        symlink("a.h", temp.path().join("include/b.h")).expect("a link");
        temp
    }

    fn write(tree: &Path, name: &str, text: &str) {
        publish_bytes(&tree.join(name), text.as_bytes()).expect("a file");
    }

    #[test]
    fn a_command_is_split_as_a_shell_would_and_launchers_are_left_out() {
        let words = |command| host_words(command).unwrap_or_default();
        assert_eq!(words("g++ -m64"), ["g++", "-m64"]);
        assert_eq!(words("ccache '/opt/my gcc/g++'"), ["/opt/my gcc/g++"]);
        assert_eq!(words("/usr/bin/ccache sccache clang++"), ["clang++"]);
        assert_eq!(host_words("'g++"), None);
        assert_eq!(host_words("ccache"), None);
        assert_eq!(host_words(" "), None);
    }

    #[test]
    fn a_compiler_with_arguments_is_one() {
        let (host, version) = host_compiler(&env(&[("CXX", "c++ -m64")])).expect("a compiler");
        assert_eq!(host, ["c++", "-m64"]);
        assert!(!version.is_empty());
        let fault = host_compiler(&env(&[("CXX", "no-such-compiler -m64")])).expect_err("none").to_string();
        assert!(fault.contains("`no-such-compiler -m64 --version`") && fault.contains("CXX"), "{fault}");
    }

    #[test]
    fn compilers_get_what_they_are_told_and_nothing_else() {
        let given =
            [("NVCC_APPEND_FLAGS", "-lineinfo"), ("PATH", "/usr/bin"), ("NVCC_CCBIN", "clang"), ("LANG", "tr_TR")];
        let mut toolchain = Toolchain {
            tree: PathBuf::new(),
            nvcc: PathBuf::new(),
            cuda_include: String::new(),
            library_dirs: Vec::new(),
            host: vec!["g++".to_owned(), "-m64".to_owned()],
            environment: environment(&env(&given)),
            identity: String::new(),
        };
        let command = toolchain.host_command();
        let mut names: Vec<_> = command.get_envs().map(|(name, _)| name.to_string_lossy().into_owned()).collect();
        names.sort();
        assert_eq!(names, ["NVCC_APPEND_FLAGS", "PATH"]);
        assert_eq!(toolchain.host_flags(), ["-ccbin", "g++", "--compiler-options=-m64"]);
        assert_eq!(toolchain.environment_text(), "NVCC_APPEND_FLAGS=\"-lineinfo\"\n");
        for name in TOLD {
            toolchain.environment = environment(&env(&[(name, "x")]));
            assert!(toolchain.environment_text().contains(name), "{name}");
        }
    }

    #[test]
    fn a_tree_is_named_by_the_whole_lock() {
        let name = tree_name(LOCK, false);
        assert_eq!(tree_name(LOCK, false), name);
        assert_ne!(tree_name(LOCK, true), name);
        assert_ne!(tree_name(&LOCK.replace("cublasLt.h", "cublasLt2.h"), false), name);
        assert_ne!(tree_name(&LOCK.replace("to = \"cuda/\"", "to = \"nvidia/\""), false), name);
    }

    #[test]
    fn whatever_changes_in_a_tree_changes_its_digest() {
        let plain = contents(tree().path()).expect("a digest");
        assert_eq!(contents(tree().path()).expect("a digest"), plain);
        type Change = fn(&Path);
        let changes: [(&str, Change); 6] = [
            ("a header", |tree| write(tree, "include/a.h", "b")),
            ("a stub", |tree| write(tree, "stubs/curand_kernel.h", "")),
            ("a name", |tree| fs::rename(tree.join("bin/nvcc"), tree.join("bin/nvc")).expect("renamed")),
            ("a link", |tree| {
                fs::remove_file(tree.join("include/b.h")).expect("removed");
                symlink("c.h", tree.join("include/b.h")).expect("a link");
            }),
            ("a mode", |tree| {
                fs::set_permissions(tree.join("bin/nvcc"), fs::Permissions::from_mode(0o755)).expect("a mode");
            }),
            ("a folder", |tree| fs::create_dir(tree.join("empty")).expect("a folder")),
        ];
        for (what, change) in changes {
            let tree = tree();
            change(tree.path());
            assert_ne!(contents(tree.path()).expect("a digest"), plain, "{what}");
        }
        let tree = tree();
        write(tree.path(), "gen/norm-1234/a.cu", "generated");
        write(tree.path(), CONTENTS, "its digest");
        assert_eq!(contents(tree.path()).expect("a digest"), plain);
    }

    #[test]
    fn a_tree_is_unpacked_once_and_again_when_it_was_changed() {
        let temp = tempfile::tempdir().expect("a temporary folder");
        let (path, count) = (temp.path().join("tree-1"), Cell::new(0));
        let unpack = || {
            count.set(count.get() + 1);
            write(&path, "include/a.h", "a");
            write(&path, CONTENTS, &contents(&path)?.to_string());
            Ok(())
        };
        let first = unpacked(&path, unpack).expect("a tree");
        assert_eq!((unpacked(&path, unpack).expect("a tree"), count.get()), (first, 1));
        write(&path, "include/a.h", "b");
        assert_eq!((unpacked(&path, unpack).expect("a tree"), count.get()), (first, 2));
        fs::remove_file(path.join(CONTENTS)).expect("removed");
        assert_eq!((unpacked(&path, unpack).expect("a tree"), count.get()), (first, 3));
        assert_eq!(fs::read_dir(temp.path()).expect("the folder").count(), 1);
    }
}
