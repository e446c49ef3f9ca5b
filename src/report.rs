//! What a support request needs: the libraries, the driver, the GPUs, and whether each kernel computes right here.

use std::ffi::c_void;
use std::fmt;

use half::{bf16, f16};

use crate::artifact::{self, Artifact};
use crate::cuda::{self, Cudart};
use crate::error::Result;
use crate::kernels::gdn::{GdnPrefill, HEAD_SIZE, gdn_prefill};
use crate::kernels::norm::{NormOptions, gemma_rmsnorm};
use crate::kernels::{self};
use crate::runtime::FlashInferRuntime;
use crate::stream::Stream;
use crate::tensor::{DType, Device, Element, TensorMut, TensorRef};

/// What [`FlashInferRuntime::report`] found. Its Display form is for people.
#[derive(Debug)]
#[non_exhaustive]
pub struct Report {
    /// This crate's version.
    pub version: &'static str,
    /// The libraries.
    pub artifacts: Vec<Artifact>,
    /// Why something was not vendored.
    pub missing: Vec<&'static str>,
    /// The CUDA release that the driver supports, or why there is none.
    pub driver: Result<String>,
    /// The GPUs that this process sees.
    pub devices: Vec<DeviceReport>,
    /// Each kernel against the reference, on the host and on every GPU that it supports.
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

/// One kernel's result beside the reference's.
#[derive(Debug)]
#[non_exhaustive]
pub struct SelfTest {
    /// The kernel.
    pub kernel: &'static str,
    /// Where it ran.
    pub device: Device,
    /// The element type.
    pub dtype: DType,
    /// The relative error (L2) of the worst of its results, or why there is none.
    pub error: Result<f64>,
    /// What the error may be.
    pub tolerance: f64,
}

impl SelfTest {
    /// Whether the kernel ran and its error is within the tolerance.
    pub fn passed(&self) -> bool {
        self.error.as_ref().is_ok_and(|error| *error <= self.tolerance)
    }
}

impl Report {
    /// Whether every self-test passed.
    pub fn passed(&self) -> bool {
        self.self_tests.iter().all(SelfTest::passed)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "flashinfer-rs {}", self.version)?;
        writeln!(f, "\nlibraries")?;
        self.artifacts.iter().try_for_each(|artifact| writeln!(f, "  {artifact}"))?;
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

pub(crate) fn make(runtime: &'static FlashInferRuntime) -> Report {
    let count = runtime.device_count();
    let devices: Vec<_> = (0..*count.as_ref().unwrap_or(&0)).filter_map(|id| device(runtime, id).ok()).collect();
    let mut self_tests = Vec::new();
    for place in std::iter::once(None).chain(devices.iter().map(Some)) {
        for kernel in kernels::all() {
            let supported = place.is_none_or(|device| kernel.supports(device.compute_capability));
            if supported && (place.is_none() || artifact::vendored(kernel.library()).is_some()) {
                let device = place.map_or(Device::Cpu, |device| Device::Cuda(device.id as u32));
                self_tests.extend(self_test::<bf16>(runtime, kernel.name(), device));
                self_tests.extend(self_test::<f16>(runtime, kernel.name(), device));
            }
        }
    }
    Report {
        version: env!("CARGO_PKG_VERSION"),
        artifacts: runtime.artifacts(),
        missing: artifact::MISSING.to_vec(),
        driver: count.and_then(|_| runtime.cudart()?.driver_release()),
        devices,
        self_tests,
    }
}

fn device(runtime: &FlashInferRuntime, id: i32) -> Result<DeviceReport> {
    let compute_capability = runtime.compute_capability(id)?;
    let kernels = kernels::all().map(|kernel| (kernel.name(), kernel.supports(compute_capability))).collect();
    Ok(DeviceReport { id, name: cuda::device_name(id), compute_capability, kernels })
}

/// Runs a kernel by name: one of each library, which shows that the library works here. The tolerances are a small multiple of the rounding of the element type.
fn self_test<T: Number>(runtime: &'static FlashInferRuntime, kernel: &'static str, device: Device) -> Option<SelfTest> {
    let (run, tolerances): (fn(&Place) -> Result<f64>, _) = match kernel {
        "gdn_prefill" => (gdn::<T>, [6e-3, 8e-4]),
        "gemma_rmsnorm" => (norm::<T>, [3e-3, 5e-4]),
        _ => return None,
    };
    let tolerance = tolerances[usize::from(T::DTYPE == DType::F16)];
    let error = Place::new(runtime, device).and_then(|place| run(&place));
    Some(SelfTest { kernel, device, dtype: T::DTYPE, error, tolerance })
}

trait Number: Element + Default + Into<f64> {
    fn from_f64(value: f64) -> Self;
}

impl Number for f16 {
    fn from_f64(value: f64) -> Self {
        Self::from_f64(value)
    }
}

impl Number for bf16 {
    fn from_f64(value: f64) -> Self {
        Self::from_f64(value)
    }
}

/// Where a self-test's tensors are.
struct Place {
    device: Device,
    cudart: Option<&'static Cudart>,
    _current: Option<cuda::CurrentDevice>,
}

impl Place {
    fn new(runtime: &'static FlashInferRuntime, device: Device) -> Result<Self> {
        let Device::Cuda(_) = device else { return Ok(Self { device, cudart: None, _current: None }) };
        let cudart = runtime.cudart()?;
        let current = cudart.set_current(runtime.checked_device(device)?)?;
        Ok(Self { device, cudart: Some(cudart), _current: Some(current) })
    }

    fn memory<T: Element + Default>(&self, values: Vec<T>) -> Result<Memory<T>> {
        Ok(match self.cudart {
            Some(cudart) => Memory::Gpu(cudart.upload(&values)?),
            None => Memory::Host(values),
        })
    }
}

enum Memory<T> {
    Host(Vec<T>),
    Gpu(cuda::Buffer<T>),
}

impl<T: Element + Default> Memory<T> {
    fn pointer(&mut self) -> *mut c_void {
        match self {
            Self::Host(values) => values.as_mut_ptr().cast(),
            Self::Gpu(buffer) => buffer.pointer(),
        }
    }

    fn tensor(&mut self, place: &Place, shape: &[i64]) -> Result<TensorMut<'_>> {
        // SAFETY: the memory is this value's own, of as many elements as the self-tests' shapes say, and is borrowed for
        // as long as the tensor lives. It is freed only after the null stream, where the kernels run, was waited for.
        unsafe { TensorMut::from_raw(self.pointer(), place.device, T::DTYPE, shape, None) }
    }

    fn read(&mut self, place: &Place, shape: &[i64]) -> Result<TensorRef<'_>> {
        // SAFETY: as for `tensor`.
        unsafe { TensorRef::from_raw(self.pointer(), place.device, T::DTYPE, shape, None) }
    }

    fn values(&self) -> Result<Vec<T>> {
        match self {
            Self::Host(values) => Ok(values.clone()),
            Self::Gpu(buffer) => buffer.download(),
        }
    }
}

/// Numbers between −1 and 1 (splitmix64), the same everywhere.
fn numbers<T: Number>(seed: u64, count: usize) -> Vec<T> {
    let one = |i: u64| {
        let mut z = (seed << 32 | i).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        T::from_f64((z >> 11) as f64 / (1u64 << 52) as f64 - 1.0)
    };
    (0..count as u64).map(one).collect()
}

fn widened<T: Number>(values: &[T]) -> Vec<f32> {
    values.iter().map(|&value| value.into() as f32).collect()
}

fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    let pairs = found.iter().zip(expected).map(|(&a, &b)| (f64::from(a), f64::from(b)));
    let (difference, size) = pairs.fold((0.0, 0.0), |(d, s), (a, b)| (d + (a - b).powi(2), s + b * b));
    (difference / size).sqrt()
}

fn norm<T: Number>(place: &Place) -> Result<f64> {
    const SHAPE: [i64; 2] = [5, 1024];
    let (input, weight) = (numbers::<T>(1, 5 * 1024), numbers::<T>(2, 1024));
    let run = |out: &mut TensorMut<'_>, input: &TensorRef<'_>, weight: &TensorRef<'_>| {
        gemma_rmsnorm(out, input, weight, &NormOptions::default(), Stream::NULL)
    };
    let mut expected = vec![0f32; input.len()];
    let (wide_input, wide_weight) = (widened(&input), widened(&weight));
    run(
        &mut TensorMut::from_slice(&mut expected, &SHAPE)?,
        &TensorRef::from_slice(&wide_input, &SHAPE)?,
        &TensorRef::from_slice(&wide_weight, &SHAPE[1..])?,
    )?;
    let mut out = place.memory(vec![T::default(); input.len()])?;
    let (mut input, mut weight) = (place.memory(input)?, place.memory(weight)?);
    run(&mut out.tensor(place, &SHAPE)?, &input.read(place, &SHAPE)?, &weight.read(place, &SHAPE[1..])?)?;
    Ok(relative_error(&widened(&out.values()?), &expected))
}

fn gdn<T: Number>(place: &Place) -> Result<f64> {
    const OFFSETS: [i64; 3] = [0, 30, 100];
    const TOKENS: i64 = 100;
    let count = (TOKENS * HEAD_SIZE) as usize;
    // Keys of about length 1, as the delta rule wants them.
    let scale = (3.0 / HEAD_SIZE as f64).sqrt();
    let small = |values: Vec<T>| values.into_iter().map(|value| T::from_f64(value.into() * scale)).collect::<Vec<T>>();
    let (q, k, v) = (numbers::<T>(3, count), small(numbers::<T>(4, count)), numbers::<T>(5, count));
    let on_host = Place { device: Device::Cpu, cudart: None, _current: None };
    let wide = [&q, &k, &v].map(|values| widened(values));
    let (expected, expected_state) = prefill(&on_host, wide, OFFSETS, TOKENS)?;
    let (output, state) = prefill(place, [q, k, v], OFFSETS, TOKENS)?;
    let output: Vec<f32> = output.into_iter().map(|value| value.into() as f32).collect();
    Ok(relative_error(&output, &expected).max(relative_error(&state, &expected_state)))
}

fn prefill<T: Element + Default>(
    place: &Place,
    [q, k, v]: [Vec<T>; 3],
    offsets: [i64; 3],
    tokens: i64,
) -> Result<(Vec<T>, Vec<f32>)> {
    let shape = [tokens, 1, HEAD_SIZE];
    let states = [offsets.len() as i64 - 1, 1, HEAD_SIZE, HEAD_SIZE];
    let mut output = place.memory(vec![T::default(); q.len()])?;
    let mut state = place.memory(vec![0f32; states.iter().product::<i64>() as usize])?;
    let (mut q, mut k, mut v) = (place.memory(q)?, place.memory(k)?, place.memory(v)?);
    let mut cu_seqlens = place.memory(offsets.to_vec())?;
    let mut workspace = place.memory(vec![0u8; 1 << 16])?;
    let args = GdnPrefill {
        output: output.tensor(place, &shape)?,
        output_state: state.tensor(place, &states)?,
        q: q.read(place, &shape)?,
        k: k.read(place, &shape)?,
        v: v.read(place, &shape)?,
        cu_seqlens: cu_seqlens.read(place, &[offsets.len() as i64])?,
        input_state: None,
        alpha: None,
        beta: None,
        scale: 0.0,
        workspace: workspace.tensor(place, &[1 << 16])?,
    };
    // SAFETY: the offsets start with 0, increase strictly and end with the number of tokens; the workspace is this
    // call's own.
    unsafe { gdn_prefill(args, Stream::NULL) }?;
    Ok((output.values()?, state.values()?))
}
