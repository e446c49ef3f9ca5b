//! How long it takes until every kernel can be called, from files and from this program, beside bare `dlopen` of the same
//! files. `cargo bench --bench startup --features embed`; with `--profile dev` as an unoptimized program has it.
//!
//! Every start is a process of its own. Without a driver, an empty libcuda.so.1 stands in for it, so that the kernel
//! modules load; it is loaded before the clock starts.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use flashinfer_rs::{FlashInferRuntime, RuntimeConfig};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LOCAL, RTLD_NOW};

/// In loading order; only libtvm_ffi.so is global.
const LIBRARIES: [&str; 4] = ["libcudart.so.13", "libtvm_ffi.so", "norm.so", "gdn_prefill_sm90.so"];
const STARTS: usize = 31;
/// A way to load everything, given the folder with the libraries.
type Arm = (&'static str, fn(&Path));

const ARMS: [Arm; 6] = [
    ("bare dlopen", |folder| bare(folder, false, false)),
    ("bare dlopen, hashed", |folder| bare(folder, true, false)),
    ("bare dlopen, hashed and copied into fresh pages", |folder| bare(folder, true, true)),
    ("this crate, from files", |folder| ours(RuntimeConfig::default().lib_dir(folder))),
    ("this crate, embedded", |_| ours(RuntimeConfig::default())),
    ("nothing", |_| {}),
];

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, arm, folder] = arguments.as_slice()
        && let Ok(arm) = arm.parse::<usize>()
    {
        return start(ARMS[arm].1, Path::new(folder));
    }
    let temporary = tempfile::tempdir().expect("a temporary folder");
    let folder = libraries(temporary.path());
    let program = std::env::current_exe().expect("this program's path");
    let mut times = vec![Vec::new(); ARMS.len()];
    // In turn, so that a machine whose speed drifts drifts for all.
    for _ in 0..STARTS {
        for (arm, times) in times.iter_mut().enumerate() {
            let mut child = Command::new(&program);
            child.arg(arm.to_string()).arg(&folder).env_remove("FLASHINFER_RS_LIB_DIR");
            let output = child.output().expect("a start");
            assert!(output.status.success(), "{}: {}", ARMS[arm].0, String::from_utf8_lossy(&output.stderr));
            let nanoseconds = String::from_utf8_lossy(&output.stdout).trim().parse().expect("a time");
            times.push(Duration::from_nanos(nanoseconds));
        }
    }
    println!(
        "| until every kernel can be called, {STARTS} starts each | median, ms | least | most |\n|---|---|---|---|"
    );
    let mut medians = Vec::new();
    for ((name, _), times) in ARMS.iter().zip(&mut times) {
        times.sort_unstable();
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let median = ms(times[STARTS / 2]);
        println!("| {name} | {median:.2} | {:.2} | {:.2} |", ms(times[0]), ms(times[STARTS - 1]));
        medians.push(median);
    }
    println!("\nfrom files / (bare dlopen, hashed): {:.2}", medians[3] / medians[1]);
    println!("embedded / (bare dlopen, hashed and copied): {:.2}", medians[4] / medians[2]);
}

/// Runs one arm and prints its nanoseconds.
fn start(arm: fn(&Path), folder: &Path) {
    let stub = folder.join("libcuda.so.1");
    if stub.exists() {
        open(&stub, RTLD_LOCAL);
    }
    let started = Instant::now();
    arm(folder);
    println!("{}", started.elapsed().as_nanos());
}

fn open(path: &Path, scope: i32) {
    // SAFETY: the libraries that the crate vendored, and an empty one.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | scope) };
    std::mem::forget(library.expect("a library that loads"));
}

fn bare(folder: &Path, hashed: bool, copied: bool) {
    for soname in LIBRARIES {
        let path = folder.join(soname);
        if copied {
            // Into fresh pages, as a program's own copy must go.
            let bytes = fs::read(&path).expect("the file");
            std::hint::black_box(ring::digest::digest(&ring::digest::SHA256, &bytes));
        } else if hashed {
            hash(&path);
        }
        open(&path, if soname == "libtvm_ffi.so" { RTLD_GLOBAL } else { RTLD_LOCAL });
    }
}

/// Through one buffer, which is the fastest way to hash a file.
fn hash(path: &Path) {
    let mut file = fs::File::open(path).expect("the file");
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
    let mut buffer = vec![0; 1 << 18];
    loop {
        match file.read(&mut buffer).expect("the file's bytes") {
            0 => break,
            n => context.update(&buffer[..n]),
        }
    }
    std::hint::black_box(context.finish());
}

fn ours(config: RuntimeConfig) {
    FlashInferRuntime::initialize(config.warm_up()).expect("every library");
}

/// The vendored libraries as files: those that FLASHINFER_RS_LIB_DIR names, else where the build put them. With an empty
/// libcuda.so.1 beside them where there is no driver.
fn libraries(temporary: &Path) -> PathBuf {
    let from = std::env::var_os("FLASHINFER_RS_LIB_DIR").map(PathBuf::from);
    let from = from.unwrap_or_else(|| Path::new(env!("OUT_DIR")).join("lib"));
    for soname in LIBRARIES {
        fs::copy(from.join(soname), temporary.join(soname))
            .expect("a vendored library; both kernel families are needed");
    }
    // SAFETY: only asked whether it is there.
    if unsafe { Library::new("libcuda.so.1") }.is_err() {
        let source = temporary.join("empty.c");
        fs::write(&source, "").expect("a file");
        let mut cc = Command::new("cc");
        cc.args(["-shared", "-fPIC", "-nostdlib", "-Wl,-soname,libcuda.so.1", "-o"]);
        let status = cc.arg(temporary.join("libcuda.so.1")).arg(source).status().expect("a C compiler");
        assert!(status.success());
    }
    temporary.to_owned()
}
