//! Tensors over cudarc's buffers, for its streams.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut};

use crate::error::{FlashInferError, Result};
use crate::owner::{CurrentContext, Owner, no_error_is_kept, refuse_capture};
use crate::stream::{DeviceStream, Stream};
use crate::tensor::{DType, Device, Element, Layout, TensorMut, TensorRef, impossible, numel, reach};

mod sealed {
    pub trait Buffer {}
    pub trait Element {}
}

/// cudarc's buffers that can be read: slices and views. Sealed, since cudarc's own `DevicePtr` is safe to implement and
/// so promises nothing.
pub trait DeviceBuffer<T>: sealed::Buffer + DevicePtr<T> {}

/// cudarc's buffers that can be written.
pub trait DeviceBufferMut<T>: sealed::Buffer + DevicePtrMut<T> {}

impl<T> sealed::Buffer for CudaSlice<T> {}
impl<T> sealed::Buffer for CudaView<'_, T> {}
impl<T> sealed::Buffer for CudaViewMut<'_, T> {}
impl<T> DeviceBuffer<T> for CudaSlice<T> {}
impl<T> DeviceBuffer<T> for CudaView<'_, T> {}
impl<T> DeviceBuffer<T> for CudaViewMut<'_, T> {}
impl<T> DeviceBufferMut<T> for CudaSlice<T> {}
impl<T> DeviceBufferMut<T> for CudaViewMut<'_, T> {}

/// Rust types for 16-bit floating-point elements: `half`'s, or their bits.
pub trait Half16: sealed::Element {
    /// Whether elements of this Rust type can be of that type.
    fn holds(dtype: DType) -> bool;
}

macro_rules! half16 {
    ($($rust:ty: $($dtype:ident)|+),*) => {$(
        impl sealed::Element for $rust {}
        impl Half16 for $rust {
            fn holds(dtype: DType) -> bool {
                matches!(dtype, $(DType::$dtype)|+)
            }
        }
    )*};
}

half16! { half::f16: F16, half::bf16: BF16, u16: F16 | BF16 }

impl<'a> Stream<'a> {
    /// A stream of cudarc's.
    #[inline]
    pub fn cudarc(stream: &'a CudaStream) -> Self {
        // SAFETY: cudarc keeps the stream alive for as long as it is borrowed.
        unsafe { Self::from_raw(stream.cu_stream().cast()) }
    }
}

impl<'a> From<&'a CudaStream> for DeviceStream<'a> {
    fn from(stream: &'a CudaStream) -> Self {
        Self { device: device(stream.context()), stream: Stream::cudarc(stream) }
    }
}

impl<'a> From<&'a Arc<CudaStream>> for DeviceStream<'a> {
    fn from(stream: &'a Arc<CudaStream>) -> Self {
        Self::from(stream.as_ref())
    }
}

impl<'a> TensorRef<'a> {
    /// A contiguous, row-major tensor in a buffer of cudarc's, for kernels on `stream`. The buffer may be longer.
    ///
    /// Where cudarc tracks events, `stream` waits, when the tensor is made, for what used the buffer elsewhere; each call then
    /// waits for the buffer's event and records it again behind its kernel, so that later uses elsewhere wait for it.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) for a buffer that is too short, of another context than the
    /// stream's, or of a context that is not its device's primary one.
    #[inline(always)]
    pub fn from_cudarc<T: Element>(
        stream: &'a CudaStream,
        buffer: &'a impl DeviceBuffer<T>,
        shape: &[i64],
    ) -> Result<Self> {
        read("tensor", "buffer", stream, buffer, T::DTYPE, shape, None)
    }

    /// As [`from_cudarc`](Self::from_cudarc), with strides of its own, in elements.
    ///
    /// # Errors
    /// As there, and where an element would lie outside of the buffer.
    #[inline(always)]
    pub fn from_cudarc_strided<T: Element>(
        stream: &'a CudaStream,
        buffer: &'a impl DeviceBuffer<T>,
        shape: &[i64],
        strides: &[i64],
    ) -> Result<Self> {
        read("tensor", "buffer", stream, buffer, T::DTYPE, shape, Some(strides))
    }

    /// A contiguous, row-major tensor of 8-bit floating-point numbers in a buffer of bytes.
    ///
    /// # Errors
    /// As for [`from_cudarc`](Self::from_cudarc), and for a `dtype` that is not of one byte.
    #[inline(always)]
    pub fn from_cudarc_bytes(
        stream: &'a CudaStream,
        buffer: &'a impl DeviceBuffer<u8>,
        dtype: DType,
        shape: &[i64],
    ) -> Result<Self> {
        check_byte(dtype)?;
        read("tensor", "buffer", stream, buffer, dtype, shape, None)
    }
}

impl<'a> TensorMut<'a> {
    /// A contiguous, row-major tensor in a buffer of cudarc's, to be written by kernels on `stream`. The buffer may be
    /// longer. Its uses are ordered as those of [`TensorRef::from_cudarc`].
    ///
    /// # Errors
    /// As there.
    #[inline(always)]
    pub fn from_cudarc<T: Element>(
        stream: &'a CudaStream,
        buffer: &'a mut impl DeviceBufferMut<T>,
        shape: &[i64],
    ) -> Result<Self> {
        write("tensor", "buffer", stream, buffer, T::DTYPE, shape, None)
    }

    /// As [`from_cudarc`](Self::from_cudarc), with strides of its own, in elements.
    ///
    /// # Errors
    /// As there, and where an element would lie outside of the buffer.
    #[inline(always)]
    pub fn from_cudarc_strided<T: Element>(
        stream: &'a CudaStream,
        buffer: &'a mut impl DeviceBufferMut<T>,
        shape: &[i64],
        strides: &[i64],
    ) -> Result<Self> {
        write("tensor", "buffer", stream, buffer, T::DTYPE, shape, Some(strides))
    }

    /// A contiguous, row-major tensor of 8-bit floating-point numbers in a buffer of bytes.
    ///
    /// # Errors
    /// As for [`from_cudarc`](Self::from_cudarc), and for a `dtype` that is not of one byte.
    #[inline(always)]
    pub fn from_cudarc_bytes(
        stream: &'a CudaStream,
        buffer: &'a mut impl DeviceBufferMut<u8>,
        dtype: DType,
        shape: &[i64],
    ) -> Result<Self> {
        check_byte(dtype)?;
        write("tensor", "buffer", stream, buffer, dtype, shape, None)
    }
}

/// `T` must fit `dtype`.
#[inline(always)]
pub(crate) fn read<'a, T>(
    function: &'static str,
    argument: &'static str,
    stream: &'a CudaStream,
    buffer: &'a impl DeviceBuffer<T>,
    dtype: DType,
    shape: &[i64],
    strides: Option<&[i64]>,
) -> Result<TensorRef<'a>> {
    check_context(function, argument, buffer.stream().context(), stream.context())?;
    check_len(function, argument, buffer.len(), shape, strides)?;
    let context = before_address(function, stream)?;
    let (address, guard) = buffer.device_ptr(stream);
    after_address(stream, context)?;
    let owner = Owner::from_guard(guard, stream);
    let (device, own) = (device(stream.context()), Some(stream.cu_stream().cast()));
    let layout = Layout::build(address as *mut c_void, device, dtype, shape, strides, own);
    // SAFETY: cudarc owns the memory, which is on its context's device and holds the elements that were counted, each of
    // a Rust type that fits the element type. The owner orders every call with the buffer's other uses.
    Ok(unsafe { TensorRef::from_layout(layout, owner) })
}

/// As [`read`]; the buffer is borrowed mutably, so nothing else refers to it.
#[inline(always)]
pub(crate) fn write<'a, T>(
    function: &'static str,
    argument: &'static str,
    stream: &'a CudaStream,
    buffer: &'a mut impl DeviceBufferMut<T>,
    dtype: DType,
    shape: &[i64],
    strides: Option<&[i64]>,
) -> Result<TensorMut<'a>> {
    check_context(function, argument, buffer.stream().context(), stream.context())?;
    check_len(function, argument, buffer.len(), shape, strides)?;
    let context = before_address(function, stream)?;
    let (address, guard) = buffer.device_ptr_mut(stream);
    after_address(stream, context)?;
    let owner = Owner::from_guard(guard, stream);
    let (device, own) = (device(stream.context()), Some(stream.cu_stream().cast()));
    let layout = Layout::build(address as *mut c_void, device, dtype, shape, strides, own);
    // SAFETY: as for `read`; nothing else refers to the buffer.
    Ok(unsafe { TensorMut::from_layout(layout, owner) })
}

/// Before cudarc is asked for a buffer's address: where it tracks events it makes the stream wait on that occasion, which
/// would break a capture, changes the thread's context, and is left out in silence where cudarc has kept an error.
#[inline(always)]
fn before_address(function: &'static str, stream: &CudaStream) -> Result<Option<CurrentContext>> {
    if !stream.context().is_managing_stream_synchronization() {
        return Ok(None);
    }
    let context = CurrentContext::bind(stream.context())?;
    refuse_capture(function, stream)?;
    no_error_is_kept(stream.context())?;
    Ok(Some(context))
}

/// That the stream waits indeed.
#[inline(always)]
fn after_address(stream: &CudaStream, waited: Option<CurrentContext>) -> Result<()> {
    if waited.is_some() { no_error_is_kept(stream.context()) } else { Ok(()) }
}

#[inline]
pub(crate) fn device(context: &CudaContext) -> Device {
    // cudarc got the number from CUDA, which counts in 32 bits.
    Device::Cuda(context.ordinal() as u32)
}

/// That memory is of this very context, and that it is the one that CUDA's runtime launches kernels in. Another object for
/// the same context has other events and does not know of this one's streams.
#[inline(always)]
pub(crate) fn check_context(
    function: &'static str,
    argument: &'static str,
    found: &Arc<CudaContext>,
    expected: &Arc<CudaContext>,
) -> Result<()> {
    if Arc::ptr_eq(found, expected) && found.is_primary() {
        return Ok(());
    }
    Err(other_context(function, argument, found, expected))
}

#[cold]
fn other_context(
    function: &'static str,
    argument: &'static str,
    found: &Arc<CudaContext>,
    expected: &Arc<CudaContext>,
) -> FlashInferError {
    let (found, expected) = if !expected.is_primary() {
        let found = format!("on a stream of a context that is not cuda:{}'s primary one", expected.ordinal());
        (found, "memory and a stream of one CudaContext::new, in whose context kernels are launched".to_owned())
    } else if found.ordinal() == expected.ordinal() {
        let found =
            format!("of another CudaContext for cuda:{}, which does not know of the stream's uses", found.ordinal());
        (found, "memory of the stream's own: clone the Arc instead of calling CudaContext::new again".to_owned())
    } else {
        let found = format!("of the context of cuda:{}", found.ordinal());
        (found, format!("memory in the stream's context, of cuda:{}", expected.ordinal()))
    };
    FlashInferError::InvalidArgument { function, argument, found, expected }
}

/// That a stream is the same one in every thread, for what may be sent to another.
pub(crate) fn refuse_per_thread(function: &'static str, stream: &CudaStream) -> Result<()> {
    const PER_THREAD: usize = 2;
    if stream.cu_stream().addr() != PER_THREAD {
        return Ok(());
    }
    Err(FlashInferError::InvalidArgument {
        function,
        argument: "stream",
        found: "the per-thread stream, which is another one in each thread".to_owned(),
        expected: "a stream of its own (CudaContext::new_stream), or the null stream".to_owned(),
    })
}

/// That memory of `len` elements holds every one of a tensor's, and that there can be such a tensor.
#[inline]
pub(crate) fn check_len(
    function: &'static str,
    argument: &'static str,
    len: usize,
    shape: &[i64],
    strides: Option<&[i64]>,
) -> Result<()> {
    let count = numel(shape);
    let needed = match strides {
        None => count,
        Some(strides) => count.and(reach(shape, strides)).filter(|_| strides.iter().all(|&stride| stride >= 0)),
    };
    let possible = Layout::is_possible(NonNull::dangling().as_ptr(), shape, strides);
    // Neither is negative.
    if possible && needed.is_some_and(|needed| needed as u64 <= len as u64) {
        return Ok(());
    }
    Err(too_short(function, argument, len, shape, strides))
}

#[cold]
fn too_short(
    function: &'static str,
    argument: &'static str,
    len: usize,
    shape: &[i64],
    strides: Option<&[i64]>,
) -> FlashInferError {
    if !Layout::is_possible(NonNull::dangling().as_ptr(), shape, strides) {
        return impossible(shape, strides);
    }
    let strides = strides.map(|strides| format!(" and strides {strides:?}")).unwrap_or_default();
    let (found, expected) = (format!("{len} elements long"), format!("enough for shape {shape:?}{strides}"));
    FlashInferError::InvalidArgument { function, argument, found, expected }
}

/// That elements of this type are bytes.
pub(crate) fn check_byte(dtype: DType) -> Result<()> {
    if dtype.size() == 1 {
        return Ok(());
    }
    let (found, expected) = (dtype.to_string(), "a type of one byte".to_owned());
    Err(FlashInferError::InvalidArgument { function: "tensor", argument: "dtype", found, expected })
}
