//! The kernels. A family is one file: its contract, its checks, its calls.

pub mod gdn;
pub mod gdn_context;
pub mod norm;
mod prepared;
pub mod reference;

pub use prepared::Prepared;

use std::fmt::{Debug, Display};
use std::sync::OnceLock;

use crate::error::{FlashInferError, Result};
use crate::module::Function;
use crate::runtime::FlashInferRuntime;
use crate::stream::Stream;
use crate::tensor::{DType, Device, Raw};

/// Every kernel, for warming up.
pub(crate) fn all() -> impl Iterator<Item = &'static Kernel> {
    norm::KERNELS.iter().chain(gdn::KERNELS).copied()
}

/// A function of a vendored library, looked up once.
pub(crate) struct Kernel {
    library: &'static str,
    name: &'static str,
    /// The compute capabilities that it runs on.
    supports: fn((i32, i32)) -> bool,
    on_gpu: OnceLock<Function>,
    on_host: OnceLock<Function>,
}

impl Kernel {
    const fn new(library: &'static str, name: &'static str, supports: fn((i32, i32)) -> bool) -> Self {
        Self { library, name, supports, on_gpu: OnceLock::new(), on_host: OnceLock::new() }
    }

    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    pub(crate) fn supports(&self, capability: (i32, i32)) -> bool {
        (self.supports)(capability)
    }

    pub(crate) fn library(&self) -> &'static str {
        self.library
    }

    /// The library's function.
    #[inline]
    pub(crate) fn function(&self) -> Result<&Function> {
        once(&self.on_gpu, || FlashInferRuntime::global()?.module(self.library)?.function(self.name))
    }

    /// The function that serves tensors on `device`: the library's, or the reference on the host.
    #[inline]
    fn on(&self, device: Device) -> Result<&Function> {
        match device {
            Device::Cpu => once(&self.on_host, || reference::module()?.function(self.name)),
            Device::Cuda(_) => self.function(),
        }
    }

    /// The library's function, if it was resolved before.
    #[inline(always)]
    fn resolved(&self) -> Option<&Function> {
        self.on_gpu.get()
    }

    /// An argument that breaks the kernel's contract.
    #[cold]
    fn invalid(&self, argument: &'static str, found: impl Display, expected: impl Into<String>) -> FlashInferError {
        FlashInferError::InvalidArgument {
            function: self.name,
            argument,
            found: found.to_string(),
            expected: expected.into(),
        }
    }

    fn shape(&self, argument: &'static str, tensor: &Raw, expected: &[i64]) -> Result<()> {
        if tensor.shape() == expected {
            return Ok(());
        }
        Err(self.invalid(argument, format_args!("of shape {:?}", tensor.shape()), format!("shape {expected:?}")))
    }

    fn dtype(&self, argument: &'static str, tensor: &Raw, expected: DType) -> Result<()> {
        if tensor.dtype() == expected {
            return Ok(());
        }
        Err(self.invalid(argument, tensor.dtype(), expected.to_string()))
    }

    /// f16 and bf16 are all that these kernels compute with; the reference also does f32.
    #[inline]
    fn half(&self, argument: &'static str, tensor: &Raw) -> Result<DType> {
        match (tensor.dtype(), tensor.device()) {
            (dtype @ (DType::F16 | DType::BF16), _) | (dtype @ DType::F32, Device::Cpu) => Ok(dtype),
            (other, _) => Err(self.invalid(argument, other, "F16 or BF16 (on the host also F32)")),
        }
    }

    fn device(&self, argument: &'static str, tensor: &Raw, expected: Device) -> Result<()> {
        if tensor.device() == expected {
            return Ok(());
        }
        Err(self.invalid(argument, format_args!("on {}", tensor.device()), format!("memory of {expected}")))
    }

    /// That no tensor belongs to another stream than the one that the kernel will be queued on, nor to the host while a
    /// graph is captured, of which the host's work would be no part.
    fn stream(&self, argument: &'static str, tensor: &Raw, stream: Stream<'_>) -> Result<()> {
        match (tensor.stream(), stream.capture()) {
            (Some(own), _) if own != stream.as_raw() => {
                let (found, expected) =
                    (format_args!("for stream {own:p}"), format!("a tensor for {:p}", stream.as_raw()));
                Err(self.invalid(argument, found, expected))
            }
            (None, Some(_)) if tensor.device() == Device::Cpu => {
                Err(self.invalid(argument, "on cpu", "memory of the GPU whose graph is captured"))
            }
            _ => Ok(()),
        }
    }

    #[inline]
    fn rank(&self, argument: &'static str, tensor: &Raw, expected: usize) -> Result<()> {
        if tensor.shape().len() == expected {
            return Ok(());
        }
        Err(self.invalid(argument, format_args!("of shape {:?}", tensor.shape()), format!("{expected} dimensions")))
    }

    fn contiguous(&self, argument: &'static str, tensor: &Raw) -> Result<()> {
        if tensor.is_contiguous() {
            return Ok(());
        }
        let found = format_args!("strided {:?} with shape {:?}", tensor.strides(), tensor.shape());
        Err(self.invalid(argument, found, "contiguous row-major memory"))
    }

    /// On a GPU only: the reference reads and writes wherever elements are.
    fn aligned(&self, argument: &'static str, tensor: &Raw, bytes: usize) -> Result<()> {
        let matters = tensor.device() != Device::Cpu && tensor.numel() > 0;
        if !matters || tensor.data().addr().is_multiple_of(bytes) {
            return Ok(());
        }
        Err(self.invalid(argument, format_args!("at {:p}", tensor.data()), format!("memory aligned to {bytes} bytes")))
    }

    #[inline]
    fn in_bounds<T: PartialOrd + Debug>(&self, argument: &'static str, value: T, low: T, high: T) -> Result<()> {
        if value >= low && value <= high {
            return Ok(());
        }
        Err(self.invalid(argument, format_args!("{value:?}"), format!("{low:?} to {high:?}")))
    }
}

/// `get_or_try_init`, which the standard library has not yet.
#[inline]
fn once(cell: &OnceLock<Function>, make: impl FnOnce() -> Result<Function>) -> Result<&Function> {
    match cell.get() {
        Some(function) => Ok(function),
        None => {
            let function = make()?;
            Ok(cell.get_or_init(|| function))
        }
    }
}
