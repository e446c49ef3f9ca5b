//! `cargo xtask wheel`: a jit-cache wheel from FlashInfer's source package.
//!
//! The flags of all modules are those of FlashInfer's own `flashinfer/jit/{core,cpp_ext}.py` of release 0.6.3; what is
//! each module's own is in `recipes.toml`.

use std::fmt;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use crate::compile::{self, key};
use crate::compiler::{self, Toolchain};
use crate::provision;
use crate::recipes::{Library, Module, Recipes};
use crate::shell::{self, say};
use crate::vendoring::digest::{Digest, hash, hash_reader};
use crate::vendoring::env::Env;
use crate::vendoring::error::{Error, Result, refuse};
use crate::vendoring::local::Record;
use crate::vendoring::lock::Lock;
use crate::vendoring::releases::DISTRIBUTION;
use crate::vendoring::store::{publish, publish_bytes};

/// What is built for where nothing is asked for.
const HOPPER: &str = "9.0a";

/// FlashInfer's own variables.
const ARCH_LIST: &str = "FLASHINFER_CUDA_ARCH_LIST";
const NVCC_THREADS: &str = "FLASHINFER_NVCC_THREADS";
const EXTRA_CUDAFLAGS: &str = "FLASHINFER_EXTRA_CUDAFLAGS";
const EXTRA_CFLAGS: &str = "FLASHINFER_EXTRA_CFLAGS";
const LINEINFO: &str = "FLASHINFER_JIT_LINEINFO";

/// What every source of every module is compiled with.
fn language_flags(toolchain: &Toolchain) -> Vec<String> {
    let mut flags = vec!["-D_GLIBCXX_USE_CXX11_ABI=1".to_owned()];
    let cccl = format!("{}/cccl", toolchain.cuda_include);
    let includes = [
        toolchain.cuda_include.as_str(),
        &cccl,
        "tvm_ffi/include",
        "tvm_ffi/3rdparty/dlpack/include",
        "flashinfer/include",
        "flashinfer/csrc",
        "flashinfer/cutlass/include",
        "flashinfer/cutlass/tools/util/include",
        "flashinfer/spdlog/include",
        compiler::STUBS,
    ];
    flags.extend(includes.iter().flat_map(|folder| ["-isystem".to_owned(), (*folder).to_owned()]));
    flags
}

/// What a variable of flags adds.
fn extra_flags(env: &Env, name: &str) -> Result<Vec<String>> {
    let Some(extra) = env.text(name) else { return Ok(Vec::new()) };
    match shlex::split(&extra) {
        Some(words) => Ok(words),
        None => refuse!("{name}={extra} has an open quotation mark; close it"),
    }
}

/// The flags that every source for the C++ compiler is compiled with.
fn cpp_flags(env: &Env, toolchain: &Toolchain) -> Result<Vec<String>> {
    let mut flags = language_flags(toolchain);
    flags.extend(["-fPIC", "-std=c++17", "-Wno-switch-bool", "-O3"].map(str::to_owned));
    flags.extend(extra_flags(env, EXTRA_CFLAGS)?);
    Ok(flags)
}

/// The flags that every source for nvcc is compiled with.
fn cuda_flags(env: &Env, toolchain: &Toolchain) -> Result<Vec<String>> {
    let mut flags = language_flags(toolchain);
    let threads = env.text(NVCC_THREADS).unwrap_or_else(|| "1".to_owned());
    flags.push(format!("--threads={threads}"));
    let fixed = [
        "--compiler-options=-fPIC",
        "--expt-relaxed-constexpr",
        "-static-global-template-stub=false",
        "-use_fast_math",
        "-DFLASHINFER_ENABLE_F16",
        "-DFLASHINFER_ENABLE_BF16",
        "-DFLASHINFER_ENABLE_FP8_E4M3",
        "-DFLASHINFER_ENABLE_FP8_E5M2",
        "-DFLASHINFER_ENABLE_FP8_E8M0",
        "-DFLASHINFER_ENABLE_FP4_E2M1",
        "-DNDEBUG",
        "-O3",
    ];
    flags.extend(fixed.map(str::to_owned));
    if env.text(LINEINFO).as_deref() == Some("1") {
        flags.push("-lineinfo".to_owned());
    }
    flags.extend(extra_flags(env, EXTRA_CUDAFLAGS)?);
    Ok(flags)
}

fn architectures(given: &[String], env: &Env) -> Result<Vec<String>> {
    let from_env = || {
        env.text(ARCH_LIST)
            .map(|list| list.split([' ', ',', ';']).filter(|s| !s.is_empty()).map(str::to_owned).collect())
    };
    let here = || provision::compute_capability().map(|capability| vec![of_gpu(&capability)]);
    let usual = || from_env().or_else(here).unwrap_or_else(|| vec![HOPPER.to_owned()]);
    let list: Vec<String> = if given.is_empty() { usual() } else { given.to_vec() };
    check_architectures(&list)?;
    Ok(list)
}

/// A GPU's architecture as FlashInfer builds for it: from Hopper on with what only that architecture has.
fn of_gpu(capability: &str) -> String {
    let major = capability.split('.').next().and_then(|major| major.parse::<u32>().ok());
    if major.is_some_and(|major| major >= 9) { format!("{capability}a") } else { capability.to_owned() }
}

/// That they are architectures as FlashInfer writes them.
pub fn check_architectures(list: &[String]) -> Result<()> {
    for arch in list {
        let fine = arch.split_once('.').is_some_and(|(major, minor)| {
            let minor = minor.strip_suffix(['a', 'f']).unwrap_or(minor);
            [major, minor].iter().all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()))
        });
        if !fine {
            refuse!("`{arch}` is not a GPU architecture; write it as 9.0a, 8.0 or 10.0a");
        }
    }
    Ok(())
}

/// `cargo xtask wheel`
pub fn command(names: &[String], arch: &[String], with: Option<&Path>, out: Option<&Path>) -> Result<()> {
    let env = Env::process();
    let wheel = build(names, arch, with, &env)?;
    if let Some(out) = out {
        let copy = out.join(wheel.file_name().unwrap_or_default());
        shell::copy(&wheel, &copy)?;
        say(format!("copied to {}", copy.display()));
    }
    Ok(())
}

/// Builds a wheel of these families or modules, or finds it built; records it as the checkout's local build. A module that lies
/// in the folder `with`, built elsewhere, is taken from there.
pub fn build(names: &[String], arch: &[String], with: Option<&Path>, env: &Env) -> Result<PathBuf> {
    let (recipes, version) = (Recipes::read()?, version()?);
    let modules = recipes.select(names)?;
    let arch = architectures(arch, env)?;
    let toolchain = compiler::prepare(env)?;
    let (cuda, cpp) = (cuda_flags(env, &toolchain)?, cpp_flags(env, &toolchain)?);
    let mut parts = Vec::new();
    let mut objects = Vec::new();
    let mut counts = Vec::new();
    for module in &modules {
        if let Some(path) = with.and_then(|folder| built_elsewhere(folder, &module.name)) {
            let (sha256, _) = digest(&path)?;
            parts.push(Part { module, made_of: MadeOf::Library(path, sha256) });
            continue;
        }
        parts.push(Part { module, made_of: MadeOf::Objects(Vec::new()) });
        let flags: Vec<String> = cuda.iter().cloned().chain(module.flags(&arch)?).collect();
        let sources = module.sources(&recipes, &toolchain.tree)?;
        counts.push(sources.len());
        for source in &sources {
            let flags = if compile::is_cpp(source) { &cpp } else { &flags };
            objects.push(compile::object(&toolchain, source, flags, module.memory())?);
        }
    }
    let cache = shell::cache(env)?;
    let store = cache.join("objects");
    let mut made = compile::all(&toolchain, &store, &objects, env)?.into_iter();
    let mut counts = counts.into_iter();
    for part in &mut parts {
        if let MadeOf::Objects(objects) = &mut part.made_of {
            objects.extend(made.by_ref().take(counts.next().unwrap_or_default()));
        }
    }
    let folder = cache.join("wheels").join(wheel_key(&toolchain, &version, &parts)?.to_string());
    let wheel = folder.join(format!("{DISTRIBUTION}-{version}-{}.whl", tag()));
    if !is_built(&wheel) {
        let mut linked = Vec::new();
        for part in &parts {
            let bytes = match &part.made_of {
                MadeOf::Objects(objects) => link(&toolchain, part.module, objects, &store)?,
                MadeOf::Library(path, sha256) => given(path, sha256)?,
            };
            linked.push((part.module.name.as_str(), bytes));
        }
        publish(&wheel, |file| write(file, &version, &linked))?;
        Built { sha256: digest(&wheel)?.0.to_string() }.write(&wheel)?;
    }
    let (sha256, size) = digest(&wheel)?;
    Record::new(DISTRIBUTION, &shell::target(), &wheel, sha256).write(&shell::root())?;
    let elsewhere = parts.iter().filter(|part| matches!(part.made_of, MadeOf::Library(..))).count();
    let elsewhere = if elsewhere > 0 { format!(", {elsewhere} of them built elsewhere") } else { String::new() };
    let names: Vec<&str> = modules.iter().map(|module| module.name.as_str()).collect();
    say(format!(
        "{} for {} ({:.1} MB{elsewhere}): {}",
        names.join(" and "),
        arch.join(", "),
        size as f64 / 1e6,
        wheel.display()
    ));
    Ok(wheel)
}

/// A module and what it is made of.
struct Part<'a> {
    module: &'a Module<'a>,
    made_of: MadeOf,
}

enum MadeOf {
    /// The objects that it is linked from.
    Objects(Vec<Digest>),
    /// Itself, built elsewhere.
    Library(PathBuf, Digest),
}

/// A module in a folder of modules, which may each have a folder as in wheels and in FlashInfer's own cache.
fn built_elsewhere(folder: &Path, name: &str) -> Option<PathBuf> {
    let file = format!("{name}.so");
    [folder.join(&file), folder.join(name).join(&file)].into_iter().find(|path| path.is_file())
}

/// A library that was built elsewhere.
fn given(path: &Path, expected: &Digest) -> Result<Vec<u8>> {
    let bytes = fs::read(path).map_err(|e| Error::io("reading", path, &e))?;
    if hash(&bytes) != *expected {
        refuse!("{} changed while it was read; run this again", path.display());
    }
    if !bytes.starts_with(b"\x7fELF") {
        refuse!("{} is no library; put the module there, or nothing of that name", path.display());
    }
    Ok(bytes)
}

/// What is known of a wheel that was built, beside it.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Built {
    sha256: String,
}

/// The file that says what a built wheel's digest is.
pub const BUILT: &str = "built.json";

impl Built {
    fn write(&self, wheel: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).map_err(|e| Error::Refused(e.to_string()))?;
        publish_bytes(&wheel.with_file_name(BUILT), text.as_bytes())
    }
}

/// The digest that a built wheel should have, where it is known.
pub fn built_digest(folder: &Path) -> Option<Digest> {
    let built: Built = serde_json::from_slice(&fs::read(folder.join(BUILT)).ok()?).ok()?;
    built.sha256.parse().ok()
}

/// Whether a wheel is there, as it was built.
fn is_built(wheel: &Path) -> bool {
    let Some(expected) = wheel.parent().and_then(built_digest).filter(|_| wheel.is_file()) else { return false };
    let good = digest(wheel).is_ok_and(|(found, _)| found == expected);
    if !good {
        say(format!("{} is not the wheel that was built; it is built again", wheel.display()));
    }
    good
}

fn digest(path: &Path) -> Result<(Digest, u64)> {
    let file = fs::File::open(path).map_err(|e| Error::io("opening", path, &e))?;
    hash_reader(&file).map_err(|e| Error::io("reading", path, &e))
}

/// Raised when the same key would stand for another wheel.
const FORMAT: &str = "wheel 3";

/// The version of the pinned wheel, in whose place this one is used.
fn version() -> Result<String> {
    let path = shell::root().join("artifacts.lock");
    match Lock::read(&path)?.wheels.into_iter().find(|wheel| wheel.distribution == DISTRIBUTION) {
        Some(wheel) => Ok(wheel.version),
        None => refuse!("{} pins no wheel of {DISTRIBUTION}; restore it", path.display()),
    }
}

/// What a wheel depends on: its objects, and all that links and packs them.
fn wheel_key(toolchain: &Toolchain, version: &str, parts: &[Part<'_>]) -> Result<Digest> {
    let libraries = toolchain.library_dirs.iter().map(|folder| folder.join("libcudart.so"));
    let runtime = libraries.filter(|path| path.is_file()).map(|path| Ok(digest(&path)?.0.to_string()));
    let mut all = vec![
        FORMAT.to_owned(),
        version.to_owned(),
        tag(),
        toolchain.identity.clone(),
        toolchain.environment_text(),
        toolchain.host.join("\n"),
        LINK_FLAGS.join("\n"),
        runtime.collect::<Result<Vec<_>>>()?.join("\n"),
    ];
    for Part { module, made_of } in parts {
        all.push(module.name.clone());
        match made_of {
            MadeOf::Objects(objects) => {
                all.push(objects.iter().map(Digest::to_string).collect::<Vec<_>>().join("\n"));
                all.push(format!("{:?}", module.libraries()));
            }
            MadeOf::Library(_, sha256) => all.extend(["built elsewhere".to_owned(), sha256.to_string()]),
        }
    }
    Ok(key(all.iter().map(String::as_bytes)))
}

/// Released modules need libcuda.so.1 by name, since their toolchain does not drop it; Debian's would.
const LINK_FLAGS: [&str; 4] = ["-shared", "-Wl,--no-as-needed", "-lcudart", "-lcuda"];

fn link(toolchain: &Toolchain, module: &Module<'_>, objects: &[Digest], store: &Path) -> Result<Vec<u8>> {
    let folder = tempfile::tempdir().map_err(|e| Error::io("creating a folder in", &std::env::temp_dir(), &e))?;
    let driver = Library { name: "cuda".to_owned(), soname: "libcuda.so.1".to_owned() };
    for library in [&driver].into_iter().chain(module.libraries()) {
        let stub = folder.path().join(format!("lib{}.so", library.name));
        name_only(toolchain, &library.soname, &stub)?;
    }
    let library = folder.path().join(format!("{}.so", module.name));
    let mut command = toolchain.host_command();
    command.args(objects.iter().map(|object| compile::path(store, object))).arg("-o").arg(&library);
    command.arg(format!("-L{}", folder.path().display()));
    command.args(toolchain.library_dirs.iter().map(|folder| format!("-L{}", folder.display())));
    command.args(LINK_FLAGS).args(module.libraries().iter().map(|library| format!("-l{}", library.name)));
    shell::quietly(&mut command)?;
    fs::read(&library).map_err(|e| Error::io("reading", &library, &e))
}

/// Makes a library that has a name and nothing else: all that the linker wants to know of one.
pub fn name_only(toolchain: &Toolchain, soname: &str, stub: &Path) -> Result<()> {
    let empty = stub.with_extension("empty.cpp");
    publish_bytes(&empty, b"")?;
    let mut command = toolchain.host_command();
    command.args(["-shared", "-fPIC", "-nostdlib", &format!("-Wl,-soname,{soname}"), "-o"]);
    shell::quietly(command.args([stub, empty.as_path()]))
}

fn tag() -> String {
    format!("cp39-abi3-linux_{}", std::env::consts::ARCH)
}

/// Writes the wheel, byte for byte the same for the same modules.
fn write(file: &mut fs::File, version: &str, modules: &[(&str, Vec<u8>)]) -> Result<()> {
    let info = format!("{DISTRIBUTION}-{version}.dist-info");
    let metadata = format!(
        "Metadata-Version: 2.1\nName: flashinfer-jit-cache\nVersion: {version}\nSummary: FlashInfer kernels compiled from \
         its source package by flashinfer-rs' xtask\nLicense: Apache-2.0\n"
    );
    let wheel = format!("Wheel-Version: 1.0\nGenerator: flashinfer-rs xtask\nRoot-Is-Purelib: false\nTag: {}\n", tag());
    let mut members: Vec<(String, Vec<u8>)> = modules
        .iter()
        .map(|(module, bytes)| (format!("{DISTRIBUTION}/jit_cache/{module}/{module}.so"), bytes.clone()))
        .collect();
    members.push((format!("{info}/METADATA"), metadata.into_bytes()));
    members.push((format!("{info}/WHEEL"), wheel.into_bytes()));
    let mut record = String::new();
    for (path, bytes) in &members {
        record += &format!("{path},sha256={},{}\n", URL_SAFE_NO_PAD.encode(hash(bytes).0), bytes.len());
    }
    record += &format!("{info}/RECORD,,\n");
    members.push((format!("{info}/RECORD"), record.into_bytes()));
    let failed = |e: &dyn fmt::Display| Error::Refused(format!("writing the wheel failed: {e}"));
    let mut zip = ZipWriter::new(file);
    // zip's default time is 1980-01-01, so that the wheel depends on nothing but its contents.
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Deflated).unix_permissions(0o644);
    for (path, bytes) in &members {
        zip.start_file(path, options).map_err(|e| failed(&e))?;
        zip.write_all(bytes).map_err(|e| failed(&e))?;
    }
    zip.finish().map_err(|e| failed(&e))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_that_were_built_elsewhere_are_found_and_checked() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (flat, nested) = (folder.path().join("flat.so"), folder.path().join("nested/nested.so"));
        publish_bytes(&flat, b"\x7fELF of a module").expect("a file");
        publish_bytes(&nested, b"<html>not found</html>").expect("a file");
        fs::create_dir(folder.path().join("folder.so")).expect("a folder");
        assert_eq!(built_elsewhere(folder.path(), "flat"), Some(flat.clone()));
        assert_eq!(built_elsewhere(folder.path(), "nested"), Some(nested.clone()));
        assert_eq!(built_elsewhere(folder.path(), "folder"), None);
        assert_eq!(built_elsewhere(folder.path(), "absent"), None);

        let digest = |path: &Path| digest(path).expect("a digest").0;
        assert_eq!(given(&flat, &digest(&flat)).expect("a library"), b"\x7fELF of a module");
        let fault = given(&nested, &digest(&nested)).expect_err("no library").to_string();
        assert!(fault.contains("nested.so is no library"), "{fault}");
        let fault = given(&flat, &digest(&nested)).expect_err("another file").to_string();
        assert!(fault.contains("changed while it was read"), "{fault}");
    }
}
