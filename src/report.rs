//! What a support request needs: the libraries, the driver, the GPUs, and whether each kernel computes right here.

use std::fmt;

use crate::artifact::{self, Artifact};
use crate::cuda;
use crate::error::Result;
use crate::kernels;
use crate::pinned::{self, PinnedKernel};
use crate::runtime::FlashInferRuntime;
use crate::self_test::{SelfTest, self_test};

/// What [`FlashInferRuntime::report`] found. Its Display form is for people.
#[derive(Debug)]
#[non_exhaustive]
pub struct Report {
    /// This crate's version.
    pub version: &'static str,
    /// The libraries.
    pub artifacts: Vec<Artifact>,
    /// The FlashInfer-Bench kernels that were pinned. They are no part of the self-tests: what they compute is not known here.
    pub kernels: &'static [PinnedKernel],
    /// Why something was not vendored.
    pub missing: Vec<&'static str>,
    /// The CUDA release that the driver supports, or why there is none.
    pub driver: Result<String>,
    /// The GPUs that this process sees.
    pub devices: Vec<DeviceReport>,
    /// Each kernel against the reference, on every GPU that it supports.
    pub self_tests: Vec<SelfTest>,
}

/// One GPU.
#[derive(Debug)]
#[non_exhaustive]
pub struct DeviceReport {
    /// CUDA's number for it in this process.
    pub id: i32,
    /// Its name, if the driver says.
    pub name: Option<String>,
    /// Its compute capability, major and minor.
    pub compute_capability: (i32, i32),
    /// Each kernel of this crate, and whether it runs on this compute capability.
    pub kernels: Vec<(&'static str, bool)>,
}

impl Report {
    /// Whether a kernel ran on a GPU here, and every one that ran was right.
    pub fn passed(&self) -> bool {
        !self.self_tests.is_empty() && self.self_tests.iter().all(SelfTest::passed)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "flashinfer-rs {}", self.version)?;
        writeln!(f, "\nlibraries")?;
        self.artifacts.iter().try_for_each(|artifact| writeln!(f, "  {artifact}"))?;
        self.kernels.iter().try_for_each(|kernel| writeln!(f, "  pinned kernel {kernel}"))?;
        self.missing.iter().try_for_each(|fault| writeln!(f, "  missing: {fault}"))?;
        match &self.driver {
            Ok(release) => writeln!(f, "\ndriver\n  supports CUDA {release}")?,
            Err(error) => writeln!(f, "\ndriver\n  {error}")?,
        }
        writeln!(f, "\nGPUs")?;
        if self.devices.is_empty() {
            writeln!(f, "  none")?;
        }
        for device in &self.devices {
            let name = device.name.as_deref().unwrap_or("(name unknown)");
            let (major, minor) = device.compute_capability;
            let kernels = device.kernels.iter().map(|(name, supported)| {
                let verdict = if *supported { "yes" } else { "no" };
                format!("{name}: {verdict}")
            });
            let kernels = kernels.collect::<Vec<_>>().join(", ");
            writeln!(f, "  cuda:{} {name}, compute capability {major}.{minor} ({kernels})", device.id)?;
        }
        writeln!(f, "\nself-test against the reference")?;
        if self.self_tests.is_empty() {
            writeln!(f, "  no kernel can run here: there is no GPU that one supports, or none was vendored")?;
        }
        for test in &self.self_tests {
            let SelfTest { kernel, device, dtype, error, tolerance } = test;
            let verdict = if test.passed() { "ok" } else { "FAILED" };
            match error {
                Ok(error) => {
                    writeln!(f, "  {kernel} {dtype} on {device}: {error:.2e}, at most {tolerance:.0e}: {verdict}")?
                }
                Err(error) => writeln!(f, "  {kernel} {dtype} on {device}: {error}: {verdict}")?,
            }
        }
        Ok(())
    }
}

impl FlashInferRuntime {
    /// Looks at everything that a kernel call depends on, and runs each kernel once on each GPU that it supports, against the
    /// reference. It allocates, synchronizes and may take some seconds: for support requests, not for serving.
    pub fn report(&'static self) -> Report {
        let count = self.device_count();
        let devices: Vec<_> = (0..*count.as_ref().unwrap_or(&0)).filter_map(|id| device(self, id).ok()).collect();
        let mut self_tests = Vec::new();
        for device in &devices {
            for kernel in kernels::all() {
                if kernel.is_there() && kernel.row.runs_on.includes(device.compute_capability) {
                    self_tests.extend(self_test(self, kernel, device.id as u32));
                }
            }
        }
        // Where nothing was vendored, for one reason.
        let mut missing: Vec<_> = artifact::MISSING.iter().map(|(_, reason)| *reason).collect();
        missing.extend(pinned::ELSEWHERE);
        missing.dedup();
        Report {
            version: env!("CARGO_PKG_VERSION"),
            artifacts: self.artifacts(),
            kernels: PinnedKernel::all(),
            missing,
            driver: count.and_then(|_| self.cudart()?.driver_release()),
            devices,
            self_tests,
        }
    }
}

fn device(runtime: &FlashInferRuntime, id: i32) -> Result<DeviceReport> {
    let compute_capability = runtime.compute_capability(id)?;
    let supported = |kernel: crate::engine::Entry| (kernel.row.kernel, kernel.row.runs_on.includes(compute_capability));
    let kernels = kernels::all().into_iter().map(supported).collect();
    Ok(DeviceReport { id, name: cuda::device_name(id), compute_capability, kernels })
}
