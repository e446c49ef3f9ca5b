//! Prints what a support request needs, and fails if a kernel computes wrong here, or none can run. `cargo run --example doctor`

use std::process::ExitCode;

use flashinfer_rs::{FlashInferRuntime, RuntimeConfig};

fn main() -> ExitCode {
    let runtime = match FlashInferRuntime::initialize(RuntimeConfig::default()) {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    };
    let report = runtime.report();
    print!("{report}");
    if report.passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
