//! `cargo xtask kernel`: builds a FlashInfer-Bench solution as upstream's builder does, into a folder as upstream hands
//! kernels out: `kernel.so`, `kernel_metadata.txt`, and beside them the solution and its definition.
//!
//! Other than upstream's, a result is found again by all that it depends on: sources, flags, architectures, headers and
//! compilers. And architectures are asked for, since upstream's guess leaves out what Hopper's and Blackwell's own
//! instructions need.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Component, Path, PathBuf};

use clap::Subcommand;
use serde::{Deserialize, Serialize};

use crate::compile::key;
use crate::compiler::{self, Toolchain};
use crate::jit_cache;
use crate::metadata::{FILE as METADATA, Metadata};
use crate::pin;
use crate::shell::{self, say};
use crate::vendoring::digest::{Digest, hash_reader};
use crate::vendoring::env::Env;
use crate::vendoring::error::{Error, Result, refuse};
use crate::vendoring::store::publish_bytes;

/// Raised when the same key would stand for another library.
const FORMAT: &str = "kernel 1";
const LIBRARY: &str = "kernel.so";
const SOLUTION: &str = "solution.json";
const DEFINITION: &str = "definition.json";
/// The digest of what was built, beside it.
const BUILT: &str = "built.json";
/// Upstream's builder compiles files of these endings, in either case as they are written here.
const CPP: [&str; 4] = ["cpp", "cc", "cxx", "c"];
const CUDA: &str = "cu";
/// What upstream's builder compiles and links with.
const CPP_FLAGS: [&str; 3] = ["-std=c++17", "-fPIC", "-O2"];
const CUDA_FLAGS: [&str; 4] = ["-Xcompiler", "-fPIC", "-std=c++17", "-O2"];
/// A linker that drops what it thinks is not needed would leave the library to find TVM-FFI by chance.
const LINK_FLAGS: [&str; 3] = ["-shared", "-Wl,--no-as-needed", "-ltvm_ffi"];
/// How a dependency names a module that the crate vendors.
const VENDORED: &str = "flashinfer-rs:";

#[derive(Subcommand)]
pub enum KernelCommand {
    /// Pin built kernels, by the digests of their files, in a lock from which builds of this crate vendor them
    Add(pin::Add),
    /// Build a solution that is written in C++ or CUDA
    Build {
        /// The solution's JSON
        solution: PathBuf,
        /// GPU architectures, `9.0a` for example; must be given for CUDA: the library has code for these alone
        #[arg(long, num_args = 1..)]
        arch: Vec<String>,
        /// Where to put the kernel; default: target/kernels and the solution's name
        #[arg(long)]
        out: Option<PathBuf>,
    },
}

/// The part of a solution that a build needs.
#[derive(Deserialize)]
struct Solution {
    name: String,
    definition: String,
    spec: Spec,
    sources: Vec<Source>,
}

#[derive(Deserialize)]
struct Spec {
    language: String,
    entry_point: String,
    #[serde(default)]
    dependencies: Vec<String>,
    binding: Option<String>,
}

#[derive(Deserialize)]
struct Source {
    path: String,
    content: String,
}

/// What is known of a library that was built.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Built {
    sha256: String,
}

impl Solution {
    fn parse(text: &str, file: &Path) -> Result<Self> {
        let file = file.display();
        let solution: Self =
            serde_json::from_str(text).map_err(|e| Error::Refused(format!("{file} is no solution: {e}")))?;
        let spec = &solution.spec;
        if let Some(module) = spec.dependencies.iter().find_map(|name| name.strip_prefix(VENDORED)) {
            refuse!("{file} is the kernel {module}, which the crate vendors: there is nothing to build");
        }
        if !matches!(spec.language.as_str(), "cpp" | "cuda") || spec.binding.as_deref().is_some_and(|b| b != "tvm-ffi")
        {
            let binding = spec.binding.as_deref().unwrap_or("tvm-ffi");
            refuse!(
                "{file} is written in {} for {binding}; only cpp and cuda for tvm-ffi are built here",
                spec.language
            );
        }
        let mut places = BTreeSet::new();
        for source in &solution.sources {
            let parts: Vec<Component<'_>> = Path::new(&source.path).components().collect();
            let inside = parts.iter().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
            let plain: PathBuf = parts.iter().filter(|part| **part != Component::CurDir).collect();
            if !inside || plain.as_os_str().is_empty() || source.path.contains('\0') || !places.insert(plain) {
                refuse!("{file} has the source {:?}, which is not one path of its own inside of a folder", source.path);
            }
        }
        let symbol = solution.symbol();
        let named = spec
            .entry_point
            .split_once("::")
            .is_some_and(|(path, _)| solution.sources.iter().any(|source| source.path == path));
        if !named || symbol.is_empty() || !symbol.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
            refuse!("{file} has the entry point {:?}, which is not FILE::FUNCTION of its sources", spec.entry_point);
        }
        Ok(solution)
    }

    fn symbol(&self) -> &str {
        self.spec.entry_point.split_once("::").map_or("", |(_, symbol)| symbol)
    }

    /// The sources that are compiled, relative to the folder, and whether they are CUDA's.
    fn compiled(&self) -> Vec<(&str, bool)> {
        let ending = |path: &str| Path::new(path).extension().and_then(|ending| ending.to_str()).map(str::to_owned);
        let kind = |source: &'_ Source| match ending(&source.path)?.as_str() {
            CUDA => Some(true),
            other if CPP.contains(&other) => Some(false),
            _ => None,
        };
        self.sources.iter().filter_map(|source| Some((source.path.as_str(), kind(source)?))).collect()
    }
}

/// `cargo xtask kernel`
pub fn command(command: &KernelCommand) -> Result<()> {
    let (solution, arch, out) = match command {
        KernelCommand::Add(options) => return pin::command(options),
        KernelCommand::Build { solution, arch, out } => (solution, arch, out),
    };
    let env = Env::process();
    let text = fs::read_to_string(solution).map_err(|e| Error::io("reading", solution, &e))?;
    let parsed = Solution::parse(&text, solution)?;
    let folder = match out {
        Some(out) => out.clone(),
        None => shell::root().join("target/kernels").join(file_name(&parsed.name)),
    };
    let library = build(&parsed, arch, &env)?;
    fs::create_dir_all(&folder).map_err(|e| Error::io("creating the folder", &folder, &e))?;
    shell::copy(&library, &folder.join(LIBRARY))?;
    let metadata = Metadata::text(parsed.symbol(), &parsed.definition, &parsed.name);
    publish_bytes(&folder.join(METADATA), metadata.as_bytes())?;
    publish_bytes(&folder.join(SOLUTION), text.as_bytes())?;
    if let Some(definition) = definition(solution, &parsed.definition) {
        shell::copy(&definition, &folder.join(DEFINITION))?;
    }
    say(format!("{} is in {}", parsed.name, folder.display()));
    Ok(())
}

/// A name as a folder's.
fn file_name(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() || matches!(c, '_' | '-') { c } else { '_' }).collect()
}

/// The definition's file, where the solution lies in a dataset.
fn definition(solution: &Path, name: &str) -> Option<PathBuf> {
    let solution = solution.canonicalize().ok()?;
    let root =
        solution.ancestors().find(|folder| folder.file_name().is_some_and(|name| name == "solutions"))?.parent()?;
    let mut folders = vec![root.join("definitions")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).ok()?.flatten() {
            let path = entry.path();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                folders.push(path);
            } else if path.file_name().is_some_and(|file| file.to_str() == Some(&format!("{name}.json"))) {
                return Some(path);
            }
        }
    }
    None
}

/// The library, built or found again.
fn build(solution: &Solution, arch: &[String], env: &Env) -> Result<PathBuf> {
    let compiled = solution.compiled();
    let cuda = compiled.iter().any(|(_, cuda)| *cuda);
    if compiled.is_empty() {
        refuse!("{} has no source that is compiled: none ends in .{CUDA} or .{}", solution.name, CPP.join(", ."));
    }
    if cuda == arch.is_empty() {
        match cuda {
            true => refuse!("{} has CUDA: say for which GPUs, by --arch 9.0a for example", solution.name),
            false => refuse!("{} has no CUDA: leave --arch away", solution.name),
        }
    }
    jit_cache::check_architectures(arch)?;
    let toolchain = if cuda { compiler::prepare(env)? } else { compiler::prepare_host(env)? };
    let commands = Commands::new(&toolchain, arch);
    let folder = shell::cache(env)?.join("kernels").join(commands.key(solution)?.to_string());
    let (library, record) = (folder.join(LIBRARY), folder.join(BUILT));
    let built: Option<Built> = fs::read(&record).ok().and_then(|text| serde_json::from_slice(&text).ok());
    if let Some(built) = built {
        if digest(&library).is_ok_and(|found| found.to_string() == built.sha256) {
            say(format!("{} was built before", solution.name));
            return Ok(library);
        }
        say(format!("{} is not what was built; it is built again", library.display()));
    }
    let bytes = commands.run(solution, &compiled)?;
    publish_bytes(&library, &bytes)?;
    // Last: a record never names what is not there.
    let built = Built { sha256: digest(&library)?.to_string() };
    let text = serde_json::to_string_pretty(&built).map_err(|e| Error::Refused(e.to_string()))?;
    publish_bytes(&record, text.as_bytes())?;
    Ok(library)
}

fn digest(path: &Path) -> Result<Digest> {
    let file = fs::File::open(path).map_err(|e| Error::io("opening", path, &e))?;
    hash_reader(file).map(|(sha256, _)| sha256).map_err(|e| Error::io("reading", path, &e))
}

/// What is run to build, but for the sources.
struct Commands<'a> {
    toolchain: &'a Toolchain,
    includes: Vec<String>,
    cuda_flags: Vec<String>,
    cuda: bool,
}

impl<'a> Commands<'a> {
    fn new(toolchain: &'a Toolchain, arch: &[String]) -> Self {
        let tree = |path: &str| format!("-I{}", toolchain.tree.join(path).display());
        let includes = vec!["-I.".to_owned(), tree("tvm_ffi/include"), tree("tvm_ffi/3rdparty/dlpack/include")];
        let mut cuda_flags: Vec<String> = CUDA_FLAGS.iter().map(|&flag| flag.to_owned()).collect();
        // As upstream: code for these GPUs alone, and none that a driver could compile for others.
        cuda_flags.extend(arch.iter().map(|arch| {
            let number = arch.replace('.', "");
            format!("-gencode=arch=compute_{number},code=sm_{number}")
        }));
        Self { toolchain, includes, cuda_flags, cuda: !arch.is_empty() }
    }

    /// What names the result.
    fn key(&self, solution: &Solution) -> Result<Digest> {
        let toolchain = self.toolchain;
        let runtime = toolchain.library_dirs.iter().map(|folder| folder.join("libcudart.so"));
        let runtime = runtime.filter(|path| self.cuda && path.is_file()).map(|path| Ok(digest(&path)?.to_string()));
        let mut parts = vec![
            FORMAT.to_owned(),
            toolchain.identity.clone(),
            toolchain.environment_text(),
            toolchain.host.join("\n"),
            CPP_FLAGS.join("\n"),
            self.cuda_flags.join("\n"),
            LINK_FLAGS.join("\n"),
            runtime.collect::<Result<Vec<_>>>()?.join("\n"),
        ];
        parts.extend(solution.sources.iter().flat_map(|source| [source.path.clone(), source.content.clone()]));
        Ok(key(parts.iter().map(String::as_bytes)))
    }

    fn run(&self, solution: &Solution, compiled: &[(&str, bool)]) -> Result<Vec<u8>> {
        let toolchain = self.toolchain;
        let folder = tempfile::tempdir().map_err(|e| Error::io("creating a folder in", &std::env::temp_dir(), &e))?;
        let sources = folder.path().join("sources");
        for source in &solution.sources {
            publish_bytes(&sources.join(&source.path), source.content.as_bytes())?;
        }
        let mut objects = Vec::new();
        for (i, (path, cuda)) in compiled.iter().enumerate() {
            let object = folder.path().join(format!("{i}.o"));
            let mut command = if *cuda {
                let mut command = toolchain.command(&toolchain.nvcc);
                command.args(toolchain.host_flags()).args(&self.cuda_flags);
                command.arg(format!("-I{}", toolchain.tree.join(&toolchain.cuda_include).display()));
                command
            } else {
                let mut command = toolchain.host_command();
                command.args(CPP_FLAGS);
                if self.cuda {
                    command.arg(format!("-I{}", toolchain.tree.join(&toolchain.cuda_include).display()));
                }
                command
            };
            say(format!("compiling {path}"));
            // From the sources' folder, so that nothing of where it is gets into the library.
            command.current_dir(&sources).args(&self.includes).args(["-c", path, "-o"]).arg(&object);
            shell::quietly(&mut command)?;
            objects.push(object);
        }
        let stub = folder.path().join("libtvm_ffi.so");
        jit_cache::name_only(toolchain, "libtvm_ffi.so", &stub)?;
        let library = folder.path().join(LIBRARY);
        let mut command = toolchain.host_command();
        command.args(&objects).arg("-o").arg(&library).arg(format!("-L{}", folder.path().display())).args(LINK_FLAGS);
        if self.cuda {
            command.args(toolchain.library_dirs.iter().map(|folder| format!("-L{}", folder.display()))).arg("-lcudart");
        }
        shell::quietly(&mut command)?;
        fs::read(&library).map_err(|e| Error::io("reading", &library, &e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"{"name":"some kernel","definition":"d","author":"a","spec":{"language":"cpp","target_hardware":["cpu"],
        "entry_point":"a/main.cpp::run"},"sources":[{"path":"a/main.cpp","content":"x"},{"path":"b.cu","content":"y"},
        {"path":"c.h","content":"z"},{"path":"D.CPP","content":"w"}]}"#;

    fn parse(text: &str) -> Result<Solution> {
        Solution::parse(text, Path::new("solution.json"))
    }

    #[test]
    fn sources_are_compiled_by_their_endings() {
        let solution = parse(TEXT).expect("a solution");
        assert_eq!(solution.compiled(), [("a/main.cpp", false), ("b.cu", true)]);
        assert_eq!(solution.symbol(), "run");
        assert_eq!(file_name(&solution.name), "some_kernel");
    }

    #[test]
    fn what_cannot_be_built_is_refused_with_the_reason() {
        for (from, to, reason) in [
            ("\"cpp\"", "\"triton\"", "written in triton"),
            ("\"cpp\"", "\"cpp\",\"binding\":\"torch\"", "for torch"),
            ("\"cpp\"", "\"cpp\",\"dependencies\":[\"flashinfer-rs:norm\"]", "nothing to build"),
            ("\"c.h\"", "\"../c.h\"", "inside of a folder"),
            ("\"c.h\"", "\"/c.h\"", "inside of a folder"),
            ("\"c.h\"", "\"./b.cu\"", "inside of a folder"),
            ("\"c.h\"", "\".\"", "inside of a folder"),
            ("main.cpp::run", "main.cc::run", "entry point"),
            ("main.cpp::run", "main.cpp::a b", "entry point"),
            ("main.cpp::run", "main.cpp", "entry point"),
            ("\"name\"", "\"definition\":1,\"name\"", "no solution"),
        ] {
            let fault = parse(&TEXT.replace(from, to)).err().expect("a fault").to_string();
            assert!(fault.contains(reason), "{fault}");
        }
    }

    #[test]
    fn architectures_are_given_for_cuda_and_for_nothing_else() {
        let env = Env::fixed([("HOME", "/nowhere")]);
        let fault = build(&parse(TEXT).expect("a solution"), &[], &env).expect_err("none").to_string();
        assert!(fault.contains("--arch"), "{fault}");
        let host = parse(&TEXT.replace("b.cu", "b.h")).expect("a solution");
        let fault = build(&host, &["9.0a".to_owned()], &env).expect_err("some").to_string();
        assert!(fault.contains("leave --arch away"), "{fault}");
    }
}
