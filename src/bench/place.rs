//! Where kernels are run: the host, or a GPU's stream. Tensors are put there, filled, copied and brought back.

#[cfg(feature = "cudarc")]
use super::dtype::DataType;
use super::error::unfit;
use super::named::Named;
use super::tensor::HostTensor;
use super::trace::Environment;
use crate::error::{FlashInferError, Result};
use crate::ffi::dlpack::DLDataType;
use crate::object::{HostAllocator, Tensor, TensorAllocator};
use crate::runtime::FlashInferRuntime;
use crate::stream::Stream;
use crate::tensor::Device;
#[cfg(feature = "cudarc")]
use crate::tensor::is_row_major;

pub(super) enum Place {
    Host(HostAllocator),
    #[cfg(feature = "cudarc")]
    Gpu(gpu::Gpu),
}

/// How many bytes a tensor's elements take.
fn len(tensor: &Tensor) -> usize {
    let (_, bits, lanes) = tensor.dlpack_dtype();
    // The elements are in memory, so their number fits.
    let elements = tensor.shape().iter().product::<i64>() as usize;
    (elements * usize::from(bits) * usize::from(lanes)).div_ceil(8)
}

/// A new tensor, whose memory is there in the order of the stream: an allocator may serve its own stream alone.
pub(super) fn allocated(
    allocator: &dyn TensorAllocator,
    device: Device,
    stream: Stream<'_>,
    dtype: DLDataType,
    shape: &[i64],
) -> Result<Tensor> {
    FlashInferRuntime::global()?.on((device, stream), |_| Tensor::allocated(allocator, device, dtype, shape))?
}

impl Place {
    pub(super) fn allocator(&self) -> &dyn TensorAllocator {
        match self {
            Self::Host(allocator) => allocator,
            #[cfg(feature = "cudarc")]
            Self::Gpu(gpu) => &gpu.allocator,
        }
    }

    pub(super) fn device(&self) -> Device {
        match self {
            Self::Host(_) => Device::Cpu,
            #[cfg(feature = "cudarc")]
            Self::Gpu(gpu) => crate::buffers::device(gpu.stream.context()),
        }
    }

    pub(super) fn stream(&self) -> Stream<'_> {
        match self {
            Self::Host(_) => Stream::NULL,
            #[cfg(feature = "cudarc")]
            Self::Gpu(gpu) => Stream::cudarc(&gpu.stream),
        }
    }

    /// The hardware, and the libraries that took part.
    pub(super) fn environment(&self) -> Environment {
        let mut libs = Named::from([("flashinfer-rs", env!("CARGO_PKG_VERSION").to_owned())]);
        if let Ok(runtime) = FlashInferRuntime::global() {
            let version = runtime.api().version();
            libs.insert("tvm-ffi", format!("{}.{}.{}", version.major, version.minor, version.patch));
            if self.device() != Device::Cpu
                && let Ok(release) = runtime.cudart().and_then(|cudart| cudart.driver_release())
            {
                libs.insert("cuda", release);
            }
        }
        let hardware = match self {
            Self::Host(_) => processor(),
            #[cfg(feature = "cudarc")]
            Self::Gpu(gpu) => gpu.stream.context().name().unwrap_or_else(|_| self.device().to_string()),
        };
        Environment { hardware, libs }
    }

    /// A copy of a host tensor here.
    pub(super) fn put(&self, tensor: &HostTensor) -> Result<Tensor> {
        match self {
            Self::Host(_) => tensor.clone().into_object(),
            #[cfg(feature = "cudarc")]
            Self::Gpu(gpu) => {
                let there = self.like(tensor.dtype(), tensor.shape())?;
                gpu.copy_in(&there, tensor.bytes())?;
                Ok(there)
            }
        }
    }

    /// A new tensor here.
    #[cfg(feature = "cudarc")]
    fn like(&self, dtype: &DataType, shape: &[u64]) -> Result<Tensor> {
        let shape: Vec<i64> = shape.iter().map(|&size| i64::try_from(size).unwrap_or(i64::MAX)).collect();
        match dtype.to_dl() {
            Some(dtype) => allocated(self.allocator(), self.device(), self.stream(), dtype, &shape),
            None => Err(unfit("a tensor", "its element type", dtype.name(), "one that DLPack has", "convert it")),
        }
    }

    /// Another tensor with the same elements.
    pub(super) fn copy(&self, tensor: &Tensor) -> Result<Tensor> {
        let dtype = tensor.described().dtype;
        let copy = allocated(self.allocator(), self.device(), self.stream(), dtype, tensor.shape())?;
        self.refill(&copy, tensor)?;
        Ok(copy)
    }

    /// Copies a tensor's elements into another of the same form. Both must be this place's own.
    pub(super) fn refill(&self, to: &Tensor, from: &Tensor) -> Result<()> {
        let bytes = len(to).min(len(from));
        match self {
            Self::Host(_) => {
                // SAFETY: both are contiguous memory of the host, of that many bytes, that the objects own and that was
                // allocated apart; only the runner, which is not shared between threads, knows of them.
                unsafe { std::ptr::copy(from.as_ptr().cast::<u8>(), to.as_ptr().cast::<u8>().cast_mut(), bytes) };
                Ok(())
            }
            #[cfg(feature = "cudarc")]
            Self::Gpu(gpu) => gpu.copy(to, from, bytes),
        }
    }

    /// Sets every byte of a tensor of this place's own.
    pub(super) fn fill(&self, tensor: &Tensor, byte: u8) -> Result<()> {
        match self {
            Self::Host(_) => {
                // SAFETY: as for `refill`.
                unsafe { std::ptr::write_bytes(tensor.as_ptr().cast::<u8>().cast_mut(), byte, len(tensor)) };
                Ok(())
            }
            #[cfg(feature = "cudarc")]
            Self::Gpu(gpu) => gpu.fill(tensor, byte, len(tensor)),
        }
    }

    /// A tensor's elements in host memory, wherever it is.
    pub(super) fn take(&self, tensor: &Tensor) -> Result<HostTensor> {
        match self {
            #[cfg(feature = "cudarc")]
            Self::Gpu(gpu) if tensor.device() == Some(self.device()) => {
                let described = tensor.described();
                let refuse = |place: &str, found: String, expected: &str, remedy| {
                    Err(unfit("what a kernel returned", place, found, expected, remedy))
                };
                let Some(dtype) = DataType::from_dlpack(described.dtype) else {
                    let found = format!("DLPack's {:?}", tensor.dlpack_dtype());
                    return refuse("its element type", found, "one that FlashInfer-Bench has", "convert it");
                };
                if !is_row_major(tensor.shape(), tensor.strides()) {
                    let found = format!("strides {:?} of {:?}", tensor.strides(), tensor.shape());
                    return refuse("its memory", found, "contiguous memory", "return a contiguous tensor");
                }
                let shape: Vec<u64> = tensor.shape().iter().map(|&size| u64::try_from(size).unwrap_or(0)).collect();
                let mut host = HostTensor::zeros(dtype, &shape)?;
                gpu.copy_out(host.bytes_mut(), tensor)?;
                Ok(host)
            }
            _ => HostTensor::from_object(tensor),
        }
    }

    /// Waits for all that was queued.
    pub(super) fn wait(&self) -> Result<()> {
        match self {
            Self::Host(_) => Ok(()),
            #[cfg(feature = "cudarc")]
            Self::Gpu(gpu) => gpu.wait(),
        }
    }
}

fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split_once(':'));
    model.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, model)| model.trim().to_owned())
}

#[cfg(feature = "cudarc")]
pub(super) mod gpu {
    use std::sync::Arc;

    use cudarc::driver::{CudaEvent, CudaSlice, CudaStream, DriverError, result, sys};

    use super::Tensor;
    use crate::buffers::check_context;
    use crate::error::{Result, driver_in};
    use crate::object::StreamAllocator;
    use crate::owner::{CurrentContext, refuse_capture};

    pub(in crate::bench) struct Gpu {
        pub(super) stream: Arc<CudaStream>,
        pub(super) allocator: StreamAllocator,
    }

    impl Gpu {
        pub(in crate::bench) fn new(stream: &Arc<CudaStream>) -> Result<Self> {
            check_context("Runner::on_stream", "stream", stream.context(), stream.context())?;
            let _context = CurrentContext::bind(stream.context())?;
            refuse_capture("Runner::on_stream", stream)?;
            Ok(Self { stream: Arc::clone(stream), allocator: StreamAllocator::new(stream) })
        }

        /// Does something with the driver, in the stream's context.
        fn with<T>(&self, doing: &'static str, call: impl FnOnce() -> Result<T, DriverError>) -> Result<T> {
            let _context = CurrentContext::bind(self.stream.context())?;
            call().map_err(driver_in(self.stream.context(), doing))
        }

        pub(super) fn copy_in(&self, to: &Tensor, bytes: &[u8]) -> Result<()> {
            if bytes.is_empty() {
                return Ok(());
            }
            let to = to.as_ptr().addr() as sys::CUdeviceptr;
            // SAFETY: the tensor was allocated for these bytes, on this stream; what is copied from pageable memory was
            // read when the call returns.
            self.with("copying to the GPU", || unsafe { result::memcpy_htod_async(to, bytes, self.stream.cu_stream()) })
        }

        pub(super) fn copy_out(&self, bytes: &mut [u8], from: &Tensor) -> Result<()> {
            if bytes.is_empty() {
                return self.wait();
            }
            let from = from.as_ptr().addr() as sys::CUdeviceptr;
            self.with("copying from the GPU", || {
                // SAFETY: the tensor is contiguous memory of this device with as many bytes, which the object keeps; the
                // call waits until it was copied.
                unsafe { result::memcpy_dtoh_async(bytes, from, self.stream.cu_stream()) }?;
                // SAFETY: the stream is live, since it is held.
                unsafe { result::stream::synchronize(self.stream.cu_stream()) }
            })
        }

        pub(super) fn copy(&self, to: &Tensor, from: &Tensor, bytes: usize) -> Result<()> {
            if bytes == 0 {
                return Ok(());
            }
            let (to, from) = (to.as_ptr().addr() as sys::CUdeviceptr, from.as_ptr().addr() as sys::CUdeviceptr);
            let stream = self.stream.cu_stream();
            // SAFETY: both are this stream's own memory of that many bytes, and are released in its order.
            self.with("copying on the GPU", || unsafe { result::memcpy_dtod_async(to, from, bytes, stream) })
        }

        pub(super) fn fill(&self, tensor: &Tensor, byte: u8, bytes: usize) -> Result<()> {
            if bytes == 0 {
                return Ok(());
            }
            let to = tensor.as_ptr().addr() as sys::CUdeviceptr;
            let stream = self.stream.cu_stream();
            // SAFETY: as for `copy`.
            self.with("filling memory", || unsafe { result::memset_d8_async(to, byte, bytes, stream) })
        }

        pub(in crate::bench) fn wait(&self) -> Result<()> {
            // SAFETY: the stream is live, since it is held.
            self.with("waiting for the stream", || unsafe { result::stream::synchronize(self.stream.cu_stream()) })
        }

        /// An event that was recorded now.
        pub(in crate::bench) fn now(&self) -> Result<CudaEvent> {
            let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
            self.with("recording an event", || self.stream.record_event(flags))
        }

        /// From one event to another, in milliseconds.
        pub(in crate::bench) fn between(&self, start: &CudaEvent, end: &CudaEvent) -> Result<f64> {
            self.with("reading events", || start.elapsed_ms(end)).map(f64::from)
        }

        /// Memory that pushes everything else out of the caches where it is written.
        pub(in crate::bench) fn flush(&self, bytes: usize) -> Result<CudaSlice<u8>> {
            self.with("allocating", || self.stream.alloc_zeros(bytes))
        }

        pub(in crate::bench) fn write(&self, flush: &mut CudaSlice<u8>) -> Result<()> {
            self.with("writing memory", || self.stream.memset_zeros(flush))
        }
    }
}

/// What a runner stops with whose error lies elsewhere.
pub(super) fn stopped() -> FlashInferError {
    unfit("the runner", "its inputs", "an error", "none", "see the error")
}
