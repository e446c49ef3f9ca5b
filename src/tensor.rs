//! Tensors: typed memory with a shape, on the host or on a GPU.

use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;

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

    #[inline]
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
    #[inline]
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
    /// As it crosses the boundary, so that packing is a copy.
    head: Head,
    /// The one stream that may use it now, where its owner said so.
    stream: Option<*mut c_void>,
    device: Device,
    dtype: DType,
    /// Whether the elements lie one after the other in row-major order.
    dense: bool,
    shape: [i64; MAX_NDIM],
    strides: [i64; MAX_NDIM],
}

impl fmt::Debug for Raw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (shape, strides, device, data) = (self.shape(), self.strides(), self.device, self.data());
        write!(f, "{}{shape:?} strides {strides:?} on {device} at {data:p}", self.dtype)
    }
}

impl Raw {
    #[inline]
    fn new(data: *mut c_void, device: Device, dtype: DType, shape: &[i64], strides: Option<&[i64]>) -> Result<Self> {
        match Self::is_sound(data, shape, strides) {
            true => Ok(Self::build(data, device, dtype, shape, strides, None)),
            false => Err(fault(shape, strides)),
        }
    }

    /// Whether a tensor can be made of these.
    #[inline]
    pub(crate) fn is_sound(data: *mut c_void, shape: &[i64], strides: Option<&[i64]>) -> bool {
        let fits = shape.len() <= MAX_NDIM && strides.is_none_or(|strides| strides.len() == shape.len());
        fits && numel(shape).is_some_and(|numel| numel == 0 || !data.is_null())
    }

    /// A tensor of what [`is_sound`](Self::is_sound); of anything else, some tensor.
    #[inline(always)]
    pub(crate) fn build(
        data: *mut c_void,
        device: Device,
        dtype: DType,
        shape: &[i64],
        strides: Option<&[i64]>,
        stream: Option<*mut c_void>,
    ) -> Self {
        let ndim = shape.len().min(MAX_NDIM);
        let head = Head { data, device: device.to_dl(), ndim: ndim as i32, dtype: dtype.to_dl() };
        let mut raw = Self { head, stream, device, dtype, dense: true, shape: [1; MAX_NDIM], strides: [1; MAX_NDIM] };
        raw.shape[..ndim].copy_from_slice(&shape[..ndim]);
        let mut expected = 1i64;
        for i in (0..ndim).rev() {
            let stride = strides.and_then(|strides| strides.get(i).copied()).unwrap_or(expected);
            raw.dense &= (stride == expected) | (shape[i] == 1);
            raw.strides[i] = stride;
            // Overflow only beside an empty dimension, where strides mean nothing.
            expected = expected.wrapping_mul(shape[i].max(1));
        }
        raw
    }

    #[inline]
    pub(crate) fn data(&self) -> *mut c_void {
        self.head.data
    }

    #[inline]
    pub(crate) fn stream(&self) -> Option<*mut c_void> {
        self.stream
    }

    #[inline]
    pub(crate) fn device(&self) -> Device {
        self.device
    }

    #[inline]
    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }

    #[inline]
    pub(crate) fn shape(&self) -> &[i64] {
        &self.shape[..self.head.ndim as usize]
    }

    #[inline]
    pub(crate) fn strides(&self) -> &[i64] {
        &self.strides[..self.head.ndim as usize]
    }

    /// The rows of two dimensions; of any other number of them, less than none.
    #[inline(always)]
    pub(crate) fn rows_of_two(&self) -> Lines {
        let ([rows, columns, ..], [apart, within, ..]) = (self.shape, self.strides);
        let rows = if self.head.ndim == 2 { rows } else { -1 };
        let Self { head: Head { data, device, .. }, dtype, stream, .. } = *self;
        Lines { data, dtype, device, stream, rows, columns, apart, within }
    }

    /// The row that a vector is; of anything else, one of less than no columns.
    #[inline(always)]
    pub(crate) fn vector(&self) -> Lines {
        let ([columns, ..], [within, ..]) = (self.shape, self.strides);
        let columns = if self.head.ndim == 1 { columns } else { -1 };
        let Self { head: Head { data, device, .. }, dtype, stream, .. } = *self;
        Lines { data, dtype, device, stream, rows: 1, columns, apart: columns, within }
    }

    /// The number of elements; the constructor checked that it fits.
    #[inline]
    pub(crate) fn numel(&self) -> i64 {
        self.shape().iter().product()
    }

    /// How many elements lie from the first to behind the last; `None` where that does not fit 64 bits.
    #[inline]
    pub(crate) fn reach(&self) -> Option<i64> {
        reach(self.shape(), self.strides())
    }

    /// The part of the first dimension from `start` on, `count` long. Both must be inside.
    pub(crate) fn rows(&self, start: i64, count: i64) -> Self {
        debug_assert!(start >= 0 && count >= 0 && start + count <= self.shape[0]);
        let mut part = *self;
        let offset = start * self.strides[0] * self.dtype.size() as i64;
        part.head.data = self.data().wrapping_byte_offset(offset as isize);
        part.shape[0] = count;
        part
    }

    /// `count` elements of a vector from `start` on, wherever its own length ends.
    pub(crate) fn part(&self, start: i64, count: i64) -> Self {
        let mut part = *self;
        part.head.data = self.data().wrapping_byte_offset((start * self.dtype.size() as i64) as isize);
        part.shape[0] = count;
        part
    }

    /// This part of a tensor in the memory of another of the same layout, so many bytes further on.
    pub(crate) fn moved(&self, bytes: isize, whole: &Self) -> Self {
        let mut part = *self;
        // From the other's own pointer, which alone may reach its memory.
        let offset = self.data().addr().wrapping_add_signed(bytes).wrapping_sub(whole.data().addr());
        part.head.data = whole.data().wrapping_byte_add(offset);
        part
    }

    /// Whether the elements lie one after the other in row-major order.
    #[inline]
    pub(crate) fn is_contiguous(&self) -> bool {
        self.dense
    }

    /// Whether this is row-major, of that type, device and shape, with at most so many elements, and its memory aligned to so
    /// many bytes, a power of two. Without a branch: after a launch nothing of this is predicted.
    #[inline(always)]
    pub(crate) fn is_dense<const N: usize>(
        &self,
        dtype: DType,
        device: Device,
        shape: [i64; N],
        most: i64,
        alignment: usize,
    ) -> bool {
        let mut fits = self.dense & (self.head.ndim == N as i32) & (self.dtype == dtype);
        fits &= self.head.device == device.to_dl();
        let mut numel = 1i64;
        for (&found, &size) in self.shape.iter().zip(&shape) {
            fits &= found == size;
            // Does not wrap where they are the same: this one's number of elements fits.
            numel = numel.wrapping_mul(size);
        }
        fits & (numel <= most) & (self.data().addr() & (alignment - 1) == 0)
    }

    #[inline]
    pub(crate) fn pack(&self) -> PackedTensor<'_> {
        let Head { data, device, ndim, dtype } = self.head;
        let (shape, strides) = (self.shape.as_ptr(), self.strides.as_ptr());
        let tensor = DLTensor { data, device, ndim, dtype, shape, strides, byte_offset: 0 };
        PackedTensor(tensor, PhantomData)
    }
}

/// The first fields of [`DLTensor`], in its order.
#[repr(C)]
#[derive(Clone, Copy)]
struct Head {
    data: *mut c_void,
    device: DLDevice,
    ndim: i32,
    dtype: DLDataType,
}

/// The number of elements; `None` for a negative size, or where it does not fit 64 bits.
#[inline]
pub(crate) fn numel(shape: &[i64]) -> Option<i64> {
    shape.iter().try_fold(1i64, |product, &n| if n < 0 { None } else { product.checked_mul(n) })
}

/// How many elements lie from the first to behind the last; `None` where that does not fit 64 bits.
#[inline]
pub(crate) fn reach(shape: &[i64], strides: &[i64]) -> Option<i64> {
    if shape.contains(&0) {
        return Some(0);
    }
    let last = |(&size, &stride): (&i64, &i64)| (size - 1).checked_mul(stride);
    shape.iter().zip(strides).try_fold(1i64, |reach, pair| reach.checked_add(last(pair)?))
}

/// Why no tensor can be made of these.
#[cold]
pub(crate) fn fault(shape: &[i64], strides: Option<&[i64]>) -> FlashInferError {
    let ndim = shape.len();
    let (argument, found, expected) = if ndim > MAX_NDIM {
        ("shape", format!("{shape:?}"), format!("at most {MAX_NDIM} dimensions"))
    } else if let Some(strides) = strides.filter(|strides| strides.len() != ndim) {
        ("strides", format!("{strides:?}"), format!("one for each of the {ndim} dimensions"))
    } else if numel(shape).is_none() {
        ("shape", format!("{shape:?}"), "sizes that are not negative and whose product fits 64 bits".to_owned())
    } else {
        ("data", "a null pointer".to_owned(), "memory, for a tensor that is not empty".to_owned())
    };
    FlashInferError::InvalidArgument { function: "tensor", argument, found, expected }
}

/// What crosses the boundary.
pub(crate) trait Pack {
    fn packed(&self) -> PackedTensor<'_>;
}

impl Pack for Raw {
    #[inline(always)]
    fn packed(&self) -> PackedTensor<'_> {
        self.pack()
    }
}

/// A tensor of one or two dimensions, seen as rows; a vector is one.
#[derive(Clone, Copy)]
pub(crate) struct Lines {
    pub(crate) data: *mut c_void,
    pub(crate) dtype: DType,
    pub(crate) device: DLDevice,
    pub(crate) stream: Option<*mut c_void>,
    pub(crate) rows: i64,
    pub(crate) columns: i64,
    /// From row to row.
    pub(crate) apart: i64,
    /// From column to column.
    pub(crate) within: i64,
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
    // Two negative sizes are found when the tensor is made.
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

        #[inline]
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
    #[inline]
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

    /// As [`from_raw`](Self::from_raw), of what [`Raw::is_sound`]; where there is a stream, for it alone and until the guard is
    /// dropped. Made where it is used: moved, it would cost more than a call.
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    pub(crate) unsafe fn from_checked(
        data: *const c_void,
        device: Device,
        dtype: DType,
        shape: &[i64],
        strides: Option<&[i64]>,
        stream: Option<*mut c_void>,
        guard: Guard<'a>,
    ) -> Self {
        let raw = Raw::build(data.cast_mut(), device, dtype, shape, strides, stream);
        Self { raw, _guard: guard, borrow: PhantomData }
    }

    accessors!();

    /// The same tensor, for as long as this one is there.
    pub fn reborrow(&self) -> TensorRef<'_> {
        TensorRef { raw: self.raw, _guard: None, borrow: PhantomData }
    }

    /// The form that crosses the boundary.
    #[inline]
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
    #[inline]
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

    /// As [`from_raw`](Self::from_raw), of what [`Raw::is_sound`]; where there is a stream, for it alone and until the guard is
    /// dropped. Made where it is used: moved, it would cost more than a call.
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    pub(crate) unsafe fn from_checked(
        data: *mut c_void,
        device: Device,
        dtype: DType,
        shape: &[i64],
        strides: Option<&[i64]>,
        stream: Option<*mut c_void>,
        guard: Guard<'a>,
    ) -> Self {
        let raw = Raw::build(data, device, dtype, shape, strides, stream);
        Self { raw, _guard: guard, borrow: PhantomData }
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

    /// The form that crosses the boundary.
    #[inline]
    pub fn pack(&mut self) -> PackedTensor<'_> {
        self.raw.pack()
    }
}
