//! Everything a contributor runs: `cargo xtask --help`.

#[cfg(feature = "bench")]
mod bench;
#[cfg(feature = "bench")]
mod bundle;
mod cache;
mod compile;
mod compiler;
#[path = "../../src/elf.rs"]
#[allow(dead_code, reason = "the library uses the other part")]
mod elf;
mod features;
mod glue;
#[cfg(test)]
#[path = "../../tests/support/http.rs"]
mod http;
mod install;
mod interop;
mod jit_cache;
mod kernel;
mod lock;
mod messages;
#[path = "../../src/bench/metadata.rs"]
mod metadata;
mod mutants;
mod pin;
mod provision;
mod recipes;
mod release;
mod shell;
mod stress;
#[path = "../../src/attention/uri.rs"]
#[allow(dead_code, reason = "the library makes names, xtask only reads them")]
mod uri;
#[path = "../../build/mod.rs"]
mod vendoring;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use vendoring::error::Result;

#[derive(Parser)]
#[command(about = "What contributors to flashinfer-rs run", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Find or build the wheels, then build and run examples/quickstart.rs and a tiny decoder of examples/decoder
    Demo,
    /// Find or build the wheels, then run every test with all features, and with the default ones those that it matters
    /// to; with arguments, the first alone
    Test {
        /// Passed on to the tests, after `--`
        #[arg(last = true)]
        args: Vec<String>,
    },
    /// Build a jit-cache wheel from FlashInfer's source package
    Wheel {
        /// What to build: Cargo features, families or modules, as xtask/recipes.toml names them; default: the features whose
        /// kernels this crate calls, but attention's, which take hours
        #[arg(long, value_delimiter = ',')]
        kernels: Vec<String>,
        /// GPU architectures, `9.0a` for example; default: FLASHINFER_CUDA_ARCH_LIST, else that of the first GPU
        /// here, else 9.0a. Modules whose recipe
        /// names architectures are always for those
        #[arg(long, num_args = 1..)]
        arch: Vec<String>,
        /// Take the modules among them that lie in this folder, as NAME.so or NAME/NAME.so, in place of building them: built
        /// on another machine by FlashInfer's Python package, say, in the folder cached_ops of its cache
        #[arg(long)]
        with: Option<PathBuf>,
        /// Copy the wheel into this folder
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// Copy the vendored libraries into a folder, for a distribution package or FLASHINFER_RS_LIB_DIR
    InstallLibs {
        /// The folder
        #[arg(long)]
        to: PathBuf,
    },
    /// Test every Cargo feature alone, and compile them beside cudarc's own
    Features,
    /// Look at the cache of wheels
    #[command(subcommand)]
    Cache(cache::CacheCommand),
    /// The long forms of the cache's tests: many builds at once, many kills
    Stress,
    /// Change build/ in small ways, one at a time, and name the changes that no test notices
    Mutants(mutants::Options),
    /// Measure what a launch costs, from Rust, C and Python, on a GPU
    #[cfg(feature = "bench")]
    Bench(bench::Options),
    /// Measure what a launch costs, from Rust, C and Python, on a GPU
    #[cfg(not(feature = "bench"))]
    #[command(disable_help_flag = true)]
    Bench {
        /// For `cargo xtask bench --help`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<std::ffi::OsString>,
    },
    /// Fill in artifacts.lock from verified copies of the wheels: each member's place, sizes, method, CRC and digest
    Lock {
        /// Fail where the file would change, and write nothing
        #[arg(long)]
        check: bool,
        /// Fetch megabytes instead of gigabytes: trust TLS and the wheel's own RECORD instead of the locked digest of the
        /// whole wheel. Weaker: whoever controls the server controls the digests that are written
        #[arg(long)]
        from_record: bool,
        /// Another lock file
        #[arg(long)]
        file: Option<PathBuf>,
        /// Propose a lock for another release of FlashInfer, from the index pages that the lock names: what it says of wheels
        /// is theirs, what it says of members is left out, for `cargo xtask lock --file` to fill in
        #[arg(long, conflicts_with_all = ["check", "from_record"])]
        release: Option<String>,
        /// Which one of a release's wheels for one target, by what its file's name has besides
        #[arg(long, requires = "release")]
        variant: Option<String>,
        /// Where to write the proposal; default: standard output
        #[arg(long, requires = "release")]
        out: Option<PathBuf>,
    },
    /// Compile this crate's own CUDA kernels, src/glue/*.cu, to the PTX that is checked in beside them
    Glue {
        /// Fail where a file would change, and write nothing
        #[arg(long)]
        check: bool,
    },
    /// Build kernels that FlashInfer-Bench's solutions are the source of, and pin kernels that were built
    #[command(subcommand)]
    Kernel(kernel::KernelCommand),
    /// Install Python's packages of TVM-FFI and what else the tests beside Python take into a folder, by python3 and pip, and
    /// run these tests
    Interop {
        /// The folder; default: target/interop
        #[arg(long)]
        to: Option<PathBuf>,
    },
    /// Pack the GPU tests, the quick start, the benchmarks and the libraries into a folder for a GPU machine without Rust
    GpuBundle {
        /// The folder; `run` in it starts the tests, `bench` the benchmarks
        #[arg(long)]
        out: PathBuf,
    },
}

/// The feature of this package that a command needs whose dependencies nobody else should wait for.
const BENCH_FEATURE: &str = "bench";

/// This command once more, by an xtask with the feature.
#[cfg(not(feature = "bench"))]
fn with_bench() -> Result<()> {
    let mut cargo = shell::cargo();
    cargo.args(["run", "--quiet", "--features", BENCH_FEATURE, "--manifest-path"]);
    cargo.arg(shell::root().join("xtask/Cargo.toml")).arg("--").args(std::env::args_os().skip(1));
    // Where the user is: paths may be relative.
    if let Ok(here) = std::env::current_dir() {
        cargo.current_dir(here);
    }
    shell::run(&mut cargo)
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            eprintln!("\nxtask: {fault}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Demo => provision::demo(),
        Command::Test { args } => provision::test(&args),
        Command::Wheel { kernels, arch, with, out } => {
            let kernels = if kernels.is_empty() { recipes::usual()? } else { kernels };
            jit_cache::command(&kernels, &arch, with.as_deref(), out.as_deref())
        }
        Command::InstallLibs { to } => install::command(&to),
        Command::Cache(command) => cache::command(command),
        Command::Features => features::command(),
        Command::Stress => stress::command(),
        Command::Mutants(options) => mutants::command(&options),
        #[cfg(feature = "bench")]
        Command::Bench(options) => bench::command(options),
        #[cfg(not(feature = "bench"))]
        Command::Bench { .. } | Command::GpuBundle { .. } => with_bench(),
        Command::Lock { file, release: Some(release), variant, out, .. } => {
            let wanted = release::Wanted { release: &release, variant: variant.as_deref() };
            release::command(&wanted, file.as_deref(), out.as_deref())
        }
        Command::Lock { check, from_record, file, .. } => lock::command(&lock::Options { check, from_record, file }),
        Command::Glue { check } => glue::command(check),
        Command::Kernel(command) => kernel::command(&command),
        Command::Interop { to } => interop::command(to.as_deref()),
        #[cfg(feature = "bench")]
        Command::GpuBundle { out } => bundle::command(&out),
    }
}
