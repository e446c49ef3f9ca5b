//! Runs `examples/flashinfer_bench.rs`, as the README says it.

use std::path::Path;
use std::process::Command;

/// Runs it without a GPU, with the dataset copied to this folder, and answers what it prints.
pub fn run(out: &Path) -> String {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
    cargo.args(["run", "--features", "bench", "--example", "flashinfer_bench", "--", "--out"]).arg(out);
    // Where there is one its solutions would want nvcc.
    let output = cargo.env("CUDA_VISIBLE_DEVICES", "").output().expect("cargo starts");
    let (printed, said) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}\n{printed}");
    printed.into_owned()
}
