//! Tensors: typed memory with a shape, on the host or on a GPU.

use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;
use std::ptr;

use crate::error::{FlashInferError, Result};
use crate::ffi::dlpack::{self, DLDataType, DLDevice, DLTensor};
use crate::module::PackedTensor;

/// The most dimensions a tensor of this crate may have; kernels use up to four.
pub const MAX_NDIM: usize = 6;

/// An element type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
    /// IEEE single precision.
    F32,
    /// IEEE double precision.
    F64,
    /// Unsigned bytes.
    U8,
    /// 32-bit integers.
    I32,
    /// 64-bit integers.
    I64,
    /// 8-bit floating point, 4 exponent and 3 mantissa bits, no infinities.
    F8E4M3,
    /// 8-bit floating point, 5 exponent and 2 mantissa bits.
    F8E5M2,
}

/// Each element type with DLPack's code for it and its bits.
const DTYPES: [(DType, u8, u8); 9] = [
    (DType::F16, 2, 16),
    (DType::BF16, 4, 16),
    (DType::F32, 2, 32),
    (DType::F64, 2, 64),
    (DType::U8, 1, 8),
    (DType::I32, 0, 32),
    (DType::I64, 0, 64),
    (DType::F8E4M3, 10, 8),
    (DType::F8E5M2, 12, 8),
];

impl DType {
    /// An element's size in bytes.
    pub const fn size(self) -> usize {
        DTYPES[self as usize].2 as usize / 8
    }

    pub(crate) const fn to_dl(self) -> DLDataType {
        let (_, code, bits) = DTYPES[self as usize];
        DLDataType { code, bits, lanes: 1 }
    }

    pub(crate) fn from_dl(found: DLDataType) -> Option<Self> {
        DTYPES.iter().map(|row| row.0).find(|dtype| dtype.to_dl() == found)
    }
}

const _: () = {
    let mut i = 0;
    while i < DTYPES.len() {
        assert!(DTYPES[i].0 as usize == i, "the table is in the order of the variants");
        i += 1;
    }
};

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Where a tensor's memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Device {
    /// The host.
    Cpu,
    /// A GPU, by CUDA's number for it in this process.
    Cuda(u32),
}

impl Device {
    pub(crate) fn to_dl(self) -> DLDevice {
        match self {
            Self::Cpu => DLDevice { device_type: dlpack::CPU, device_id: 0 },
            // Never negative: TVM-FFI writes past its table for a negative number.
            Self::Cuda(id) => DLDevice { device_type: dlpack::CUDA, device_id: i32::try_from(id).unwrap_or(i32::MAX) },
        }
    }

    pub(crate) fn from_dl(found: DLDevice) -> Option<Self> {
        match (found.device_type, u32::try_from(found.device_id)) {
            (dlpack::CPU, _) => Some(Self::Cpu),
            (dlpack::CUDA, Ok(id)) => Some(Self::Cuda(id)),
            _ => None,
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(id) => write!(f, "cuda:{id}"),
        }
    }
}

/// Rust types that are elements of tensors.
pub trait Element: sealed::Sealed + Copy + 'static {
    /// The element type.
    const DTYPE: DType;
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! element {
    ($($rust:ty => $dtype:ident),* $(,)?) => {$(
        impl sealed::Sealed for $rust {}
        impl Element for $rust {
            const DTYPE: DType = DType::$dtype;
        }
        const _: () = assert!(size_of::<$rust>() == DType::$dtype.size());
    )*};
}

element! { half::f16 => F16, half::bf16 => BF16, f32 => F32, f64 => F64, u8 => U8, i32 => I32, i64 => I64 }

/// What is known of a tensor, wherever it is.
#[derive(Clone, Copy)]
pub(crate) struct Raw {
    /// In the form that crosses the boundary, so that packing is a copy. Its shape and strides are set then: they point
    /// into the tensor that is packed, which may move until it is.
    packed: DLTensor,
    /// The one stream that may use it now, where its owner said so.
    stream: Option<*mut c_void>,
    device: Device,
    dtype: DType,
    shape: [i64; MAX_NDIM],
    strides: [i64; MAX_NDIM],
}

impl fmt::Debug for Raw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}{:?} strides {:?} on {} at {:p}",
            self.dtype,
            self.shape(),
            self.strides(),
            self.device,
            self.data()
        )
    }
}

impl Raw {
    fn new(data: *mut c_void, device: Device, dtype: DType, shape: &[i64], strides: Option<&[i64]>) -> Result<Self> {
        let invalid = |argument, found, expected: &str| {
            Err(FlashInferError::InvalidArgument { function: "tensor", argument, found, expected: expected.to_owned() })
        };
        let ndim = shape.len();
        if ndim > MAX_NDIM {
            return invalid("shape", format!("{shape:?}"), &format!("at most {MAX_NDIM} dimensions"));
        }
        if strides.is_some_and(|strides| strides.len() != ndim) {
            return invalid("strides", format!("{strides:?}"), &format!("one for each of the {ndim} dimensions"));
        }
        let (shape_of_ones, strides_of_ones) = ([1; MAX_NDIM], [1; MAX_NDIM]);
        let packed = DLTensor {
            data,
            device: device.to_dl(),
            ndim: ndim as i32,
            dtype: dtype.to_dl(),
            shape: ptr::null(),
            strides: ptr::null(),
            byte_offset: 0,
        };
        let mut raw = Self { packed, stream: None, device, dtype, shape: shape_of_ones, strides: strides_of_ones };
        raw.shape[..ndim].copy_from_slice(shape);
        let numel = shape.iter().try_fold(1i64, |product, &n| if n < 0 { None } else { product.checked_mul(n) });
        let Some(numel) = numel else {
            return invalid(
                "shape",
                format!("{shape:?}"),
                "sizes that are not negative and whose product fits 64 bits",
            );
        };
        match strides {
            Some(strides) => raw.strides[..ndim].copy_from_slice(strides),
            None => {
                let mut stride = 1;
                for i in (0..ndim).rev() {
                    raw.strides[i] = stride;
                    // Overflow only beside an empty dimension, where strides mean nothing.
                    stride = stride.saturating_mul(shape[i].max(1));
                }
            }
        }
        if numel > 0 && data.is_null() {
            return invalid("data", "a null pointer".to_owned(), "memory, for a tensor that is not empty");
        }
        Ok(raw)
    }

    pub(crate) fn data(&self) -> *mut c_void {
        self.packed.data
    }

    pub(crate) fn stream(&self) -> Option<*mut c_void> {
        self.stream
    }

    pub(crate) fn device(&self) -> Device {
        self.device
    }

    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }

    pub(crate) fn shape(&self) -> &[i64] {
        &self.shape[..self.packed.ndim as usize]
    }

    pub(crate) fn strides(&self) -> &[i64] {
        &self.strides[..self.packed.ndim as usize]
    }

    /// The number of elements; the constructor checked that it fits.
    pub(crate) fn numel(&self) -> i64 {
        self.shape().iter().product()
    }

    /// How many elements lie from the first to behind the last; `None` where that does not fit 64 bits.
    pub(crate) fn reach(&self) -> Option<i64> {
        if self.numel() == 0 {
            return Some(0);
        }
        let last = |(&size, &stride): (&i64, &i64)| (size - 1).checked_mul(stride);
        self.shape().iter().zip(self.strides()).try_fold(1i64, |reach, pair| reach.checked_add(last(pair)?))
    }

    /// The part of the first dimension from `start` on, `count` long. Both must be inside.
    pub(crate) fn rows(&self, start: i64, count: i64) -> Self {
        debug_assert!(start >= 0 && count >= 0 && start + count <= self.shape[0]);
        let mut part = *self;
        let offset = start * self.strides[0] * self.dtype.size() as i64;
        part.packed.data = self.data().wrapping_byte_offset(offset as isize);
        part.shape[0] = count;
        part
    }

    /// `count` elements of a vector from `start` on, wherever its own length ends.
    pub(crate) fn part(&self, start: i64, count: i64) -> Self {
        let mut part = *self;
        part.packed.data = self.data().wrapping_byte_offset((start * self.dtype.size() as i64) as isize);
        part.shape[0] = count;
        part
    }

    /// This part of a tensor in the memory of another of the same layout, so many bytes further on.
    pub(crate) fn moved(&self, bytes: isize, whole: &Self) -> Self {
        let mut part = *self;
        // From the other's own pointer, which alone may reach its memory.
        let offset = self.data().addr().wrapping_add_signed(bytes).wrapping_sub(whole.data().addr());
        part.packed.data = whole.data().wrapping_byte_add(offset);
        part
    }

    /// Whether the elements lie one after the other in row-major order.
    pub(crate) fn is_contiguous(&self) -> bool {
        let mut expected = 1i64;
        for (&size, &stride) in self.shape().iter().zip(self.strides()).rev() {
            if size != 1 && stride != expected {
                return false;
            }
            expected = expected.saturating_mul(size);
        }
        true
    }

    pub(crate) fn pack(&self) -> PackedTensor<'_> {
        let tensor = DLTensor { shape: self.shape.as_ptr(), strides: self.strides.as_ptr(), ..self.packed };
        PackedTensor(tensor, PhantomData)
    }
}

/// What must live until the kernel is queued: cudarc's guard, which orders uses of a buffer on different streams.
#[cfg(feature = "cudarc")]
pub(crate) type Guard<'a> = Option<cudarc::driver::SyncOnDrop<'a>>;
#[cfg(not(feature = "cudarc"))]
pub(crate) type Guard<'a> = Option<std::convert::Infallible>;

/// A tensor that is read.
pub struct TensorRef<'a> {
    raw: Raw,
    _guard: Guard<'a>,
    borrow: PhantomData<&'a [u8]>,
}

/// A tensor that is written; nothing else refers to its memory.
pub struct TensorMut<'a> {
    raw: Raw,
    _guard: Guard<'a>,
    borrow: PhantomData<&'a mut [u8]>,
}

impl fmt::Debug for TensorRef<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.raw.fmt(f)
    }
}

impl fmt::Debug for TensorMut<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.raw.fmt(f)
    }
}

/// That a strided tensor stays inside a slice of `len` elements.
fn checked_reach(len: usize, raw: &Raw) -> Result<()> {
    let inside = raw.strides().iter().all(|&stride| stride >= 0);
    let reach = raw.reach().and_then(|reach| usize::try_from(reach).ok());
    if inside && reach.is_some_and(|reach| reach <= len) {
        return Ok(());
    }
    Err(FlashInferError::InvalidArgument {
        function: "tensor",
        argument: "strides",
        found: format!("{:?} with shape {:?}", raw.strides(), raw.shape()),
        expected: format!("no negative stride and no element past the slice's {len}"),
    })
}

fn checked_len(len: usize, shape: &[i64]) -> Result<()> {
    let numel = shape.iter().try_fold(1i64, |product, &n| product.checked_mul(n));
    if numel.and_then(|numel| usize::try_from(numel).ok()) == Some(len) {
        return Ok(());
    }
    Err(FlashInferError::InvalidArgument {
        function: "tensor",
        argument: "shape",
        found: format!("{shape:?}"),
        expected: format!("sizes whose product is the slice's length, {len}"),
    })
}

macro_rules! accessors {
    () => {
        /// The sizes.
        pub fn shape(&self) -> &[i64] {
            self.raw.shape()
        }

        /// The strides, in elements.
        pub fn strides(&self) -> &[i64] {
            self.raw.strides()
        }

        /// The element type.
        pub fn dtype(&self) -> DType {
            self.raw.dtype()
        }

        /// Where the memory is.
        pub fn device(&self) -> Device {
            self.raw.device()
        }

        pub(crate) fn raw(&self) -> &Raw {
            &self.raw
        }
    };
}

impl<'a> TensorRef<'a> {
    /// A contiguous, row-major tensor on the host.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) where the shape does not fit the slice.
    pub fn from_slice<T: Element>(data: &'a [T], shape: &[i64]) -> Result<Self> {
        checked_len(data.len(), shape)?;
        let raw = Raw::new(data.as_ptr().cast_mut().cast(), Device::Cpu, T::DTYPE, shape, None)?;
        Ok(Self { raw, _guard: None, borrow: PhantomData })
    }

    /// A tensor on the host with strides of its own, in elements.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) where an element would lie outside of the slice.
    pub fn from_slice_strided<T: Element>(data: &'a [T], shape: &[i64], strides: &[i64]) -> Result<Self> {
        let raw = Raw::new(data.as_ptr().cast_mut().cast(), Device::Cpu, T::DTYPE, shape, Some(strides))?;
        checked_reach(data.len(), &raw)?;
        Ok(Self { raw, _guard: None, borrow: PhantomData })
    }

    /// A tensor anywhere. `strides` count elements; `None` is row-major.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) for a null pointer, a negative size, or more than
    /// [`MAX_NDIM`] dimensions.
    ///
    /// # Safety
    /// Every element that shape and strides reach must be memory of `dtype` on `device`, readable for `'a` and until
    /// the kernels that were given the tensor have run, and written by nobody meanwhile.
    pub unsafe fn from_raw(
        data: *const c_void,
        device: Device,
        dtype: DType,
        shape: &[i64],
        strides: Option<&[i64]>,
    ) -> Result<Self> {
        let raw = Raw::new(data.cast_mut(), device, dtype, shape, strides)?;
        Ok(Self { raw, _guard: None, borrow: PhantomData })
    }

    accessors!();

    /// The same tensor, for as long as this one is there.
    pub fn reborrow(&self) -> TensorRef<'_> {
        TensorRef { raw: self.raw, _guard: None, borrow: PhantomData }
    }

    /// The same tensor, for one stream alone and until the guard is dropped.
    #[cfg(feature = "cudarc")]
    pub(crate) fn bound(mut self, stream: *mut c_void, guard: Guard<'a>) -> Self {
        self.raw.stream = Some(stream);
        self._guard = guard;
        self
    }

    /// The form that crosses the boundary.
    pub fn pack(&self) -> PackedTensor<'_> {
        self.raw.pack()
    }
}

impl<'a> TensorMut<'a> {
    /// A contiguous, row-major tensor on the host.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) where the shape does not fit the slice.
    pub fn from_slice<T: Element>(data: &'a mut [T], shape: &[i64]) -> Result<Self> {
        checked_len(data.len(), shape)?;
        let raw = Raw::new(data.as_mut_ptr().cast(), Device::Cpu, T::DTYPE, shape, None)?;
        Ok(Self { raw, _guard: None, borrow: PhantomData })
    }

    /// A tensor on the host with strides of its own, in elements.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) where an element would lie outside of the slice.
    pub fn from_slice_strided<T: Element>(data: &'a mut [T], shape: &[i64], strides: &[i64]) -> Result<Self> {
        let raw = Raw::new(data.as_mut_ptr().cast(), Device::Cpu, T::DTYPE, shape, Some(strides))?;
        checked_reach(data.len(), &raw)?;
        Ok(Self { raw, _guard: None, borrow: PhantomData })
    }

    /// A tensor anywhere. `strides` count elements; `None` is row-major.
    ///
    /// # Errors
    /// As for [`TensorRef::from_raw`].
    ///
    /// # Safety
    /// Every element that shape and strides reach must be memory of `dtype` on `device`, writable for `'a` and until
    /// the kernels that were given the tensor have run, and touched by nobody else meanwhile.
    pub unsafe fn from_raw(
        data: *mut c_void,
        device: Device,
        dtype: DType,
        shape: &[i64],
        strides: Option<&[i64]>,
    ) -> Result<Self> {
        let raw = Raw::new(data, device, dtype, shape, strides)?;
        Ok(Self { raw, _guard: None, borrow: PhantomData })
    }

    accessors!();

    /// The same tensor, for as long as this one is not used otherwise.
    pub fn reborrow(&mut self) -> TensorMut<'_> {
        TensorMut { raw: self.raw, _guard: None, borrow: PhantomData }
    }

    /// The same tensor, to be read, for as long as this one is not used otherwise.
    pub fn as_ref(&self) -> TensorRef<'_> {
        TensorRef { raw: self.raw, _guard: None, borrow: PhantomData }
    }

    /// The same tensor, for one stream alone and until the guard is dropped.
    #[cfg(feature = "cudarc")]
    pub(crate) fn bound(mut self, stream: *mut c_void, guard: Guard<'a>) -> Self {
        self.raw.stream = Some(stream);
        self._guard = guard;
        self
    }

    /// The form that crosses the boundary.
    pub fn pack(&mut self) -> PackedTensor<'_> {
        self.raw.pack()
    }
}
