//! What a call costs on the host: of a gemma_rmsnorm that does nothing, so that what remains is this crate's own work and,
//! where a stream is set, TVM-FFI's. `cargo bench --bench host`; needs a C compiler and no GPU.
//!
//! What the log's hook costs where nothing is asked for: built with `FLASHINFER_RS_MEASURE_WITHOUT_LOG=1` the hook is not there.
//! Copy one program aside, build the other, and run the two in turns.

use std::error::Error;
use std::path::Path;
use std::process::{Command, ExitCode};

use divan::{Bencher, Divan, black_box};
use flashinfer_rs::kernels::norm::{GemmaRmsnorm, NormOptions, gemma_rmsnorm};
use flashinfer_rs::{Arg, FlashInferRuntime, Prepared, Stream};

#[path = "support/calls.rs"]
mod calls;

/// Why no case handles errors: `start` made a call, and found all that may be missing.
const TRIED: &str = "as when it was tried at the start";

fn main() -> ExitCode {
    // Not as many calls as divan finds by timing the first one, which is the slowest by far.
    let divan = Divan::default().sample_size(1000).config_with_args();
    match start() {
        Ok(_libraries) => {
            divan.main();
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("host: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Makes the libraries, which stay as long as the folder, and makes a call.
fn start() -> Result<tempfile::TempDir, Box<dyn Error>> {
    let libraries = tempfile::tempdir()?;
    compile("benches/c/noop.c", "norm.so", libraries.path())?;
    compile("tests/fixtures/cudart.c", "libcudart.so.13", libraries.path())?;
    calls::initialize(libraries.path())?;
    let (mut out, input, weight) = calls::tensors()?;
    gemma_rmsnorm(&mut out, &input, &weight, &NormOptions::default(), calls::stream())?;
    Ok(libraries)
}

fn compile(source: &str, soname: &str, folder: &Path) -> Result<(), Box<dyn Error>> {
    let compiler = std::env::var("CC").ok().filter(|cc| !cc.trim().is_empty()).unwrap_or_else(|| "cc".to_owned());
    let mut words = compiler.split_whitespace();
    let mut cc = Command::new(words.next().unwrap_or_default());
    cc.args(words).args(["-std=gnu11", "-O2", "-shared", "-fPIC", &format!("-Wl,-soname,{soname}"), "-o"]);
    cc.arg(folder.join(soname)).arg(Path::new(env!("CARGO_MANIFEST_DIR")).join(source));
    let output = cc.output().map_err(|error| {
        format!("`{compiler}` cannot be started ({error}); install a C compiler, or name one in CC")
    })?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("`{compiler}` does not compile {source} ({}): {}", output.status, said.trim_end()).into());
    }
    Ok(())
}

fn runtime() -> &'static FlashInferRuntime {
    FlashInferRuntime::global().expect(TRIED)
}

/// The least that a call can be: the stream is not set, and nothing is checked.
#[divan::bench]
fn pack_and_call(bencher: Bencher) {
    let function = calls::function(runtime()).expect(TRIED);
    let (mut out, input, weight) = calls::tensors().expect(TRIED);
    let options = NormOptions::default();
    bencher.bench_local(|| {
        let (out, input, weight) = (black_box(&mut out).pack(), input.pack(), weight.pack());
        let (out, input, weight) = (Arg::tensor(&out), Arg::tensor(&input), Arg::tensor(&weight));
        // SAFETY: the function takes these arguments, and touches no memory.
        unsafe { function.launch(&[out, input, weight, Arg::float(options.eps), Arg::bool(options.pdl)]) }.is_ok()
    });
}

#[divan::bench]
fn raw(bencher: Bencher) {
    let params = calls::params(NormOptions::default().eps);
    bencher.bench_local(|| {
        // SAFETY: the function touches no memory.
        unsafe { flashinfer_rs::gemma_rmsnorm(black_box(&params)) }.is_ok()
    });
}

#[divan::bench]
fn tensors(bencher: Bencher) {
    on(bencher, calls::stream());
}

#[divan::bench]
fn tensors_in_scope(bencher: Bencher) {
    runtime().on((calls::DEVICE, calls::stream()), |stream| on(bencher, stream)).expect(TRIED);
}

fn on(bencher: Bencher, stream: Stream<'_>) {
    let (mut out, input, weight) = calls::tensors().expect(TRIED);
    let options = NormOptions::default();
    bencher.bench_local(|| gemma_rmsnorm(black_box(&mut out), &input, &weight, &options, stream).is_ok());
}

#[divan::bench]
fn prepared(bencher: Bencher) {
    prepared_on(bencher, calls::stream());
}

#[divan::bench]
fn prepared_in_scope(bencher: Bencher) {
    runtime().on((calls::DEVICE, calls::stream()), |stream| prepared_on(bencher, stream)).expect(TRIED);
}

fn prepared_on(bencher: Bencher, stream: Stream<'_>) {
    let (mut out, input, weight) = calls::tensors().expect(TRIED);
    let prepared = Prepared::<GemmaRmsnorm>::new(&out, &input, &weight, &NormOptions::default()).expect(TRIED);
    bencher.bench_local(|| black_box(&prepared).launch(black_box(&mut out), &input, &weight, stream).is_ok());
}

/// A call that the contract forbids: the weight is as long as two rows.
#[divan::bench]
fn refuse_an_argument(bencher: Bencher) {
    let (mut out, input, _) = calls::tensors().expect(TRIED);
    let weight = calls::read(calls::INPUT, &[2 * calls::SHAPE[1]]).expect(TRIED);
    let (options, stream) = (NormOptions::default(), calls::stream());
    bencher.bench_local(|| gemma_rmsnorm(black_box(&mut out), &input, &weight, &options, stream).is_err());
}

#[divan::bench]
fn make_a_tensor(bencher: Bencher) {
    bencher.bench_local(|| black_box(&calls::read(black_box(calls::INPUT), black_box(&calls::SHAPE))).is_ok());
}
