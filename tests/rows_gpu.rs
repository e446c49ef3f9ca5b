//! Every kernel that has a row, by what its row says. `FLASHINFER_RS_RUN_GPU_TESTS=1 cargo test --features cudarc --test
//! rows_gpu` runs them, within 120 seconds.

#[path = "support/gpu.rs"]
mod gpu;

use std::process::ExitCode;

use flashinfer_rs::contract::Kind;
use flashinfer_rs::{Device, FlashInferRuntime, kernels};
use gpu::Gpu;

fn main() -> ExitCode {
    gpu::main(&[("every_kernel_passes_its_self_test_in_every_type_on_every_gpu", self_tests)])
}

fn self_tests(_: &Gpu) {
    let report = FlashInferRuntime::global().unwrap().report();
    println!("{report}");
    assert!(report.passed());
    // None is left out: a kernel without a self-test would not fail one.
    for device in &report.devices {
        let on = Device::Cuda(device.id as u32);
        for row in kernels::rows().into_iter().filter(|row| row.runs_on.includes(device.compute_capability)) {
            let Kind::Tensor(lead) = &row.arguments[row.lead].kind else { panic!("{}: no lead", row.kernel) };
            for &dtype in lead.dtype.allowed(false) {
                let found = report
                    .self_tests
                    .iter()
                    .filter(|test| (test.kernel, test.device, test.dtype) == (row.kernel, on, dtype) && test.passed());
                assert_eq!(found.count(), 1, "{} in {dtype} on {on}", row.kernel);
            }
        }
    }
}
