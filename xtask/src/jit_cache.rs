//! `cargo xtask wheel`: a jit-cache wheel from FlashInfer's source package.
//!
//! Sources and flags are those of FlashInfer's own recipes, `flashinfer/jit/{norm,gdn,core,cpp_ext}.py` of release 0.6.3.

use std::fmt;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use clap::ValueEnum;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use crate::compile::{self, Object};
use crate::compiler::{self, Toolchain};
use crate::shell::{self, say};
use crate::vendoring::digest::{Hasher, hash, hash_reader};
use crate::vendoring::env::Env;
use crate::vendoring::error::{Error, Result, refuse};
use crate::vendoring::local::Record;
use crate::vendoring::store::{publish, publish_bytes};

const DISTRIBUTION: &str = "flashinfer_jit_cache";
const VERSION: &str = "0.6.3+cu130";
/// What gdn_prefill_sm90 is for, whatever else is asked for.
const HOPPER: &str = "9.0a";

/// FlashInfer's own variables.
const ARCH_LIST: &str = "FLASHINFER_CUDA_ARCH_LIST";
const NVCC_THREADS: &str = "FLASHINFER_NVCC_THREADS";
const EXTRA_CUDAFLAGS: &str = "FLASHINFER_EXTRA_CUDAFLAGS";
const LINEINFO: &str = "FLASHINFER_JIT_LINEINFO";

/// A kernel family, one shared object.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Family {
    Norm,
    GdnPrefill,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Norm => "norm",
            Self::GdnPrefill => "gdn-prefill",
        })
    }
}

impl Family {
    fn module(self) -> &'static str {
        match self {
            Self::Norm => "norm",
            Self::GdnPrefill => "gdn_prefill_sm90",
        }
    }

    /// Memory that compiling one of its files takes at the peak.
    fn memory(self) -> u64 {
        match self {
            Self::Norm => 2 << 30,
            Self::GdnPrefill => 13 << 29,
        }
    }

    /// Its sources, relative to the tree. Generated ones are written.
    fn sources(self, tree: &Path) -> Result<Vec<String>> {
        match self {
            Self::Norm => {
                Ok(["norm", "flashinfer_norm_binding"].map(|name| format!("flashinfer/csrc/{name}.cu")).to_vec())
            }
            Self::GdnPrefill => gdn_sources(tree),
        }
    }

    /// The recipe's flags, after those of every module.
    fn flags(self, arch: &[String]) -> Vec<String> {
        match self {
            Self::Norm => {
                let gencode = arch.iter().map(|arch| gencode(arch));
                gencode.chain(["-std=c++17", "-DENABLE_BF16", "-DENABLE_FP8"].map(str::to_owned)).collect()
            }
            Self::GdnPrefill => {
                let rest = ["-DCUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED", "-DFLAT_SM90A_ENABLED", "-std=c++20"];
                std::iter::once(gencode(HOPPER)).chain(rest.map(str::to_owned)).collect()
            }
        }
    }
}

fn gencode(arch: &str) -> String {
    let arch = arch.replace('.', "");
    format!("-gencode=arch=compute_{arch},code=sm_{arch}")
}

/// One file for each instance of the kernel: two element types, four switches.
fn gdn_sources(tree: &Path) -> Result<Vec<String>> {
    let template_path = tree.join("flashinfer/csrc/gdn_prefill_sm90_kernel_inst.jinja");
    let template = fs::read_to_string(&template_path).map_err(|e| Error::io("reading", &template_path, &e))?;
    let mut sources = Vec::new();
    for (name, dtype) in [("half", "half"), ("bf16", "nv_bfloat16")] {
        for bits in 0..16 {
            let on = |bit: u32| bits >> bit & 1 == 1;
            let (gva, beta, alpha, init) = (on(3), on(2), on(1), on(0));
            let digit = |flag: bool| u8::from(flag);
            let file = format!(
                "gdn_prefill_kernel_{name}_g{}b{}a{}i{}.cu",
                digit(gva),
                digit(beta),
                digit(alpha),
                digit(init)
            );
            let mut text = template.replace("{{ dtype }}", dtype);
            for (key, flag) in [("is_gva", gva), ("needs_beta", beta), ("needs_alpha", alpha), ("init_state", init)] {
                text = text.replace(&format!("{{{{ {key} }}}}"), if flag { "true" } else { "false" });
            }
            if text.contains("{{") {
                refuse!(
                    "{} has a placeholder that this recipe does not know; xtask must learn it",
                    template_path.display()
                );
            }
            let path = format!("gen/gdn_prefill_sm90/{file}");
            if fs::read_to_string(tree.join(&path)).ok().as_deref() != Some(text.as_str()) {
                publish_bytes(&tree.join(&path), text.as_bytes())?;
            }
            sources.push(path);
        }
    }
    sources.extend(
        ["gdn_prefill_launcher", "prefill_kernel_delta_rule_sm90"].map(|name| format!("flashinfer/csrc/{name}.cu")),
    );
    Ok(sources)
}

/// The flags that every module is compiled with.
fn common_flags(env: &Env, toolchain: &Toolchain) -> Result<Vec<String>> {
    let mut flags = vec!["-D_GLIBCXX_USE_CXX11_ABI=1".to_owned()];
    if toolchain.host != "c++" {
        flags.extend(["-ccbin".to_owned(), toolchain.host.clone()]);
    }
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
    if let Some(extra) = env.text(EXTRA_CUDAFLAGS) {
        match shlex::split(&extra) {
            Some(words) => flags.extend(words),
            None => refuse!("{EXTRA_CUDAFLAGS}={extra} has an open quotation mark; close it"),
        }
    }
    Ok(flags)
}

fn architectures(given: &[String], env: &Env) -> Result<Vec<String>> {
    let from_env = || {
        env.text(ARCH_LIST)
            .map(|list| list.split([' ', ',', ';']).filter(|s| !s.is_empty()).map(str::to_owned).collect())
    };
    let list: Vec<String> =
        if given.is_empty() { from_env().unwrap_or_else(|| vec![HOPPER.to_owned()]) } else { given.to_vec() };
    for arch in &list {
        let fine = arch.split_once('.').is_some_and(|(major, minor)| {
            let minor = minor.strip_suffix(['a', 'f']).unwrap_or(minor);
            [major, minor].iter().all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()))
        });
        if !fine {
            refuse!("`{arch}` is not a GPU architecture; write it as 9.0a, 8.0 or 10.0a");
        }
    }
    Ok(list)
}

/// `cargo xtask wheel`
pub fn command(families: &[Family], arch: &[String], out: Option<&Path>) -> Result<()> {
    let env = Env::process();
    let wheel = build(families, arch, &env)?;
    if let Some(out) = out {
        let copy = out.join(wheel.file_name().unwrap_or_default());
        shell::copy(&wheel, &copy)?;
        say(format!("copied to {}", copy.display()));
    }
    Ok(())
}

/// Builds a wheel of these families, or finds it built; records it as the checkout's local build.
pub fn build(families: &[Family], arch: &[String], env: &Env) -> Result<PathBuf> {
    let mut families = families.to_vec();
    families.sort_unstable();
    families.dedup();
    let arch = architectures(arch, env)?;
    let toolchain = compiler::prepare(env)?;
    let common = common_flags(env, &toolchain)?;
    let mut objects = Vec::new();
    for &family in &families {
        let flags: Vec<String> = common.iter().cloned().chain(family.flags(&arch)).collect();
        for source in family.sources(&toolchain.tree)? {
            objects.push((family, compile::object(&toolchain, &source, &flags, family.memory())?));
        }
    }
    let mut key = Hasher::new();
    objects.iter().for_each(|(_, object)| key.update(object.key.to_string().as_bytes()));
    key.update(LINK_FLAGS.join(" ").as_bytes());
    let cache = shell::cache(env)?;
    let folder = cache.join("wheels").join(key.finish().to_string());
    let wheel = folder.join(format!("{DISTRIBUTION}-{VERSION}-{}.whl", tag()));
    if !wheel.is_file() {
        let store = cache.join("objects");
        compile::all(&toolchain, &store, objects.iter().map(|(_, object)| object), env)?;
        let mut modules = Vec::new();
        for &family in &families {
            let own: Vec<&Object> = objects.iter().filter(|(of, _)| *of == family).map(|(_, object)| object).collect();
            modules.push((family, link(&toolchain, family, &own, &store)?));
        }
        publish(&wheel, |file| write(file, &modules))?;
    }
    let file = fs::File::open(&wheel).map_err(|e| Error::io("opening", &wheel, &e))?;
    let (sha256, size) = hash_reader(&file).map_err(|e| Error::io("reading", &wheel, &e))?;
    Record::new(DISTRIBUTION, &shell::target(), &wheel, sha256).write(&shell::root())?;
    let names: Vec<String> = families.iter().map(Family::to_string).collect();
    say(format!("{} for {} ({:.1} MB): {}", names.join(" and "), arch.join(", "), size as f64 / 1e6, wheel.display()));
    Ok(wheel)
}

/// Released modules need libcuda.so.1 by name, since their toolchain does not drop it; Debian's would.
const LINK_FLAGS: [&str; 4] = ["-shared", "-Wl,--no-as-needed", "-lcudart", "-lcuda"];

fn link(toolchain: &Toolchain, family: Family, objects: &[&Object], store: &Path) -> Result<Vec<u8>> {
    let folder = tempfile::tempdir().map_err(|e| Error::io("creating a folder in", &std::env::temp_dir(), &e))?;
    // All that the linker wants to know of the driver is its name.
    let (empty, stub) = (folder.path().join("empty.cpp"), folder.path().join("libcuda.so"));
    publish_bytes(&empty, b"")?;
    let soname = "-Wl,-soname,libcuda.so.1";
    shell::quietly(
        Command::new(&toolchain.host).args(["-shared", "-fPIC", "-nostdlib", soname, "-o"]).args([&stub, &empty]),
    )?;
    let library = folder.path().join(format!("{}.so", family.module()));
    let mut command = Command::new(&toolchain.host);
    command.args(objects.iter().map(|object| object.path(store))).arg("-o").arg(&library);
    command.arg(format!("-L{}", folder.path().display()));
    command.args(toolchain.library_dirs.iter().map(|folder| format!("-L{}", folder.display())));
    shell::quietly(command.args(LINK_FLAGS))?;
    fs::read(&library).map_err(|e| Error::io("reading", &library, &e))
}

fn tag() -> String {
    format!("cp39-abi3-linux_{}", std::env::consts::ARCH)
}

/// Writes the wheel, byte for byte the same for the same modules.
fn write(file: &mut fs::File, modules: &[(Family, Vec<u8>)]) -> Result<()> {
    let info = format!("{DISTRIBUTION}-{VERSION}.dist-info");
    let metadata = format!(
        "Metadata-Version: 2.1\nName: flashinfer-jit-cache\nVersion: {VERSION}\nSummary: FlashInfer kernels compiled from \
         the source package 0.6.3 by flashinfer-rs' xtask\nLicense: Apache-2.0\n"
    );
    let wheel = format!("Wheel-Version: 1.0\nGenerator: flashinfer-rs xtask\nRoot-Is-Purelib: false\nTag: {}\n", tag());
    let mut members: Vec<(String, Vec<u8>)> = modules
        .iter()
        .map(|(family, bytes)| {
            let module = family.module();
            (format!("{DISTRIBUTION}/jit_cache/{module}/{module}.so"), bytes.clone())
        })
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
