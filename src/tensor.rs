//! Tensors: typed memory with a shape, on the host or on a GPU.

use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;

use crate::error::{FlashInferError, Result};
use crate::ffi::dlpack::{self, DLDataType, DLDevice, DLTensor};
use crate::owner::Owner;

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

    /// This type as a list of one.
    pub(crate) fn alone(self) -> &'static [Self] {
        const EACH: [DType; DTYPES.len()] = {
            let mut each = [DType::F16; DTYPES.len()];
            let mut i = 0;
            while i < each.len() {
                each[i] = DTYPES[i].0;
                i += 1;
            }
            each
        };
        &EACH[self as usize..=self as usize]
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

/// Rust types that are elements of tensors: numbers of Rust's own, and with the feature `half` those of the crate `half`.
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

element! { f32 => F32, f64 => F64, u8 => U8, i32 => I32, i64 => I64 }
#[cfg(feature = "half")]
element! { half::f16 => F16, half::bf16 => BF16 }

/// Everything about a tensor but where its memory is: what two calls must have in common for one check to serve both. It begins
/// with the fields of [`DLTensor`] behind the data pointer, in its order, so that packing is a copy.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Form {
    device: DLDevice,
    ndim: i32,
    dtype: DLDataType,
    /// Behind the last dimension 1.
    shape: [i64; MAX_NDIM],
    strides: [i64; MAX_NDIM],
}

impl Form {
    /// Whether two are the same, of which at least one has `rank` dimensions. Without a branch: after a launch nothing of
    /// this is predicted.
    #[inline(always)]
    pub(crate) fn is(&self, other: &Self, rank: usize) -> bool {
        let mut differs = self.device.bits() ^ other.device.bits();
        differs |= u64::from(self.dtype.bits() ^ other.dtype.bits());
        differs |= u64::from((self.ndim ^ other.ndim) as u32);
        for i in 0..rank {
            differs |= (self.shape[i] ^ other.shape[i]) as u64 | (self.strides[i] ^ other.strides[i]) as u64;
        }
        differs == 0
    }
}

/// A tensor's description.
#[derive(Clone, Copy)]
pub(crate) struct Layout {
    data: *mut c_void,
    /// The one stream that may use it, where its owner said so.
    stream: Option<*mut c_void>,
    /// Whether the elements lie one after the other in row-major order.
    dense: bool,
    form: Form,
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let layout = Layout { data: std::ptr::null_mut(), stream: None, dense: false, form: *self };
        let (shape, strides) = (layout.shape(), layout.strides());
        write!(f, "{}{shape:?} strided {strides:?} on {}", layout.dtype(), layout.device())
    }
}

impl fmt::Debug for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (shape, strides, device, data) = (self.shape(), self.strides(), self.device(), self.data);
        write!(f, "{}{shape:?} strides {strides:?} on {device} at {data:p}", self.dtype())
    }
}

impl Layout {
    #[inline]
    fn new(data: *mut c_void, device: Device, dtype: DType, shape: &[i64], strides: Option<&[i64]>) -> Result<Self> {
        match Self::is_possible(data, shape, strides) {
            true => Ok(Self::build(data, device, dtype, shape, strides, None)),
            false => Err(impossible(shape, strides)),
        }
    }

    /// Whether there can be a tensor of this shape and these strides at this address.
    #[inline]
    pub(crate) fn is_possible(data: *mut c_void, shape: &[i64], strides: Option<&[i64]>) -> bool {
        let fits = shape.len() <= MAX_NDIM && strides.is_none_or(|strides| strides.len() == shape.len());
        fits && numel(shape).is_some_and(|numel| numel == 0 || !data.is_null())
    }

    /// The layout of what [`is_possible`](Self::is_possible); of anything else, some layout.
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
        let (shape_of, strides_of) = ([1; MAX_NDIM], [1; MAX_NDIM]);
        let (device, dtype) = (device.to_dl(), dtype.to_dl());
        let mut form = Form { device, ndim: ndim as i32, dtype, shape: shape_of, strides: strides_of };
        let mut dense = true;
        form.shape[..ndim].copy_from_slice(&shape[..ndim]);
        let mut expected = 1i64;
        for i in (0..ndim).rev() {
            let stride = strides.and_then(|strides| strides.get(i).copied()).unwrap_or(expected);
            dense &= (stride == expected) | (shape[i] == 1);
            form.strides[i] = stride;
            // Overflows only beside an empty dimension, where strides mean nothing.
            expected = expected.wrapping_mul(shape[i].max(1));
        }
        Self { data, stream, dense, form }
    }

    #[inline]
    pub(crate) fn data(&self) -> *mut c_void {
        self.data
    }

    #[inline]
    pub(crate) fn stream(&self) -> Option<*mut c_void> {
        self.stream
    }

    #[inline]
    pub(crate) fn form(&self) -> &Form {
        &self.form
    }

    #[inline]
    pub(crate) fn device(&self) -> Device {
        match self.is_on_gpu() {
            true => Device::Cuda(self.form.device.device_id as u32),
            false => Device::Cpu,
        }
    }

    /// Whether the memory is a GPU's, and not the host's.
    #[inline(always)]
    pub(crate) fn is_on_gpu(&self) -> bool {
        self.form.device.device_type == dlpack::CUDA
    }

    #[inline(always)]
    pub(crate) fn has_device_of(&self, other: &Self) -> bool {
        self.form.device.bits() == other.form.device.bits()
    }

    pub(crate) fn dtype(&self) -> DType {
        match DType::from_dl(self.form.dtype) {
            Some(dtype) => dtype,
            None => unreachable!("layouts are built with a type of this crate's"),
        }
    }

    #[inline(always)]
    pub(crate) fn is_of(&self, dtype: DType) -> bool {
        self.form.dtype.bits() == dtype.to_dl().bits()
    }

    #[inline(always)]
    pub(crate) fn has_dtype_of(&self, other: &Self) -> bool {
        self.form.dtype.bits() == other.form.dtype.bits()
    }

    /// An element's size in bytes.
    #[inline(always)]
    pub(crate) fn element_size(&self) -> usize {
        self.form.dtype.bits as usize / 8
    }

    #[inline]
    pub(crate) fn ndim(&self) -> usize {
        self.form.ndim as usize
    }

    #[inline]
    pub(crate) fn shape(&self) -> &[i64] {
        &self.form.shape[..self.ndim()]
    }

    #[inline]
    pub(crate) fn strides(&self) -> &[i64] {
        &self.form.strides[..self.ndim()]
    }

    /// The size of a dimension; 1 behind the last.
    #[inline]
    pub(crate) fn size(&self, dimension: usize) -> i64 {
        self.form.shape[dimension]
    }

    /// The stride of a dimension, in elements; 1 behind the last.
    #[inline]
    pub(crate) fn stride(&self, dimension: usize) -> i64 {
        self.form.strides[dimension]
    }

    /// The number of elements; the constructor checked that it fits 64 bits.
    #[inline]
    pub(crate) fn numel(&self) -> i64 {
        // Behind the last dimension each is 1.
        self.form.shape.iter().fold(1, |product: i64, &size| product.wrapping_mul(size))
    }

    /// Whether the elements lie one after the other in row-major order.
    #[inline]
    pub(crate) fn is_contiguous(&self) -> bool {
        self.dense
    }

    /// How many elements lie from the first to behind the last; `None` where that does not fit 64 bits.
    #[inline]
    pub(crate) fn reach(&self) -> Option<i64> {
        reach(self.shape(), self.strides())
    }

    /// The part of a dimension from `start` on, `count` long. Both must be inside.
    pub(crate) fn narrow(&self, dimension: usize, start: i64, count: i64) -> Self {
        debug_assert!(start >= 0 && count >= 0 && start + count <= self.size(dimension));
        let mut part = *self;
        let offset = start.wrapping_mul(self.stride(dimension)).wrapping_mul(self.dtype().size() as i64);
        part.data = self.data.wrapping_byte_offset(offset as isize);
        part.form.shape[dimension] = count;
        part.find_dense();
        part
    }

    /// `count` elements of a vector from `start` on, wherever its own length ends.
    pub(crate) fn window(&self, start: i64, count: i64) -> Self {
        let mut part = *self;
        part.data = self.data.wrapping_byte_offset((start * self.dtype().size() as i64) as isize);
        part.form.shape[0] = count;
        part
    }

    fn find_dense(&mut self) {
        let mut expected = 1i64;
        self.dense = true;
        for i in (0..self.ndim()).rev() {
            self.dense &= (self.form.strides[i] == expected) | (self.form.shape[i] == 1);
            expected = expected.wrapping_mul(self.form.shape[i].max(1));
        }
    }

    fn checked_narrow(&self, dimension: usize, start: i64, count: i64) -> Result<Self> {
        let Some(&size) = self.shape().get(dimension) else {
            return Err(view("dimension", dimension.to_string(), format!("below {}, the number of them", self.ndim())));
        };
        if start < 0 || count < 0 || start.checked_add(count).is_none_or(|end| end > size) {
            let found = format!("{start} to {}", start.saturating_add(count));
            return Err(view("range", found, format!("within 0 to {size}, the size of dimension {dimension}")));
        }
        Ok(self.narrow(dimension, start, count))
    }

    /// The same elements in another shape; only of what is contiguous.
    fn reshape(&self, shape: &[i64]) -> Result<Self> {
        if shape.len() > MAX_NDIM || numel(shape) != Some(self.numel()) {
            let expected = format!("sizes, {MAX_NDIM} at the most, whose product is {}", self.numel());
            return Err(view("shape", format!("{shape:?}"), expected));
        }
        if !self.is_contiguous() {
            let found = format!("strided {:?} with shape {:?}", self.strides(), self.shape());
            return Err(view("tensor", found, "contiguous, to be given another shape".to_owned()));
        }
        Ok(Self::build(self.data, self.device(), self.dtype(), shape, None, self.stream))
    }

    /// With two dimensions in each other's place.
    fn transpose(&self, first: usize, second: usize) -> Result<Self> {
        if first.max(second) >= self.ndim() {
            let expected = format!("both below {}, the number of dimensions", self.ndim());
            return Err(view("dimensions", format!("{first} and {second}"), expected));
        }
        let mut other = *self;
        other.form.shape.swap(first, second);
        other.form.strides.swap(first, second);
        other.find_dense();
        Ok(other)
    }

    #[inline(always)]
    pub(crate) fn pack(&self) -> DLTensor {
        let Form { device, ndim, dtype, .. } = self.form;
        let (shape, strides) = (self.form.shape.as_ptr(), self.form.strides.as_ptr());
        DLTensor { data: self.data, device, ndim, dtype, shape, strides, byte_offset: 0 }
    }
}

#[cold]
fn view(argument: &'static str, found: String, expected: String) -> FlashInferError {
    FlashInferError::InvalidArgument { function: "tensor", argument, found, expected }
}

/// The number of elements; `None` for a negative size, or where it does not fit 64 bits.
#[inline]
pub(crate) fn numel(shape: &[i64]) -> Option<i64> {
    shape.iter().try_fold(1i64, |product, &n| if n < 0 { None } else { product.checked_mul(n) })
}

/// Whether elements lie one after the other in row-major order, where sizes and strides are as many. An empty tensor's do.
#[cfg(feature = "bench")]
#[inline(always)]
pub(crate) fn is_row_major(shape: &[i64], strides: &[i64]) -> bool {
    let (mut next, mut contiguous, mut empty) = (1i64, true, false);
    for (&size, &stride) in shape.iter().zip(strides).rev() {
        contiguous &= (stride == next) | (size == 1);
        empty |= size == 0;
        next = next.wrapping_mul(size);
    }
    contiguous | empty
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

/// Whether no two elements lie in the same place: every stride goes past all that the smaller ones reach.
fn is_injective(shape: &[i64], strides: &[i64]) -> bool {
    let mut apart = true;
    for (i, (&size, &stride)) in shape.iter().zip(strides).enumerate() {
        let mut inner = 1i64;
        for (j, (&other_size, &other)) in shape.iter().zip(strides).enumerate() {
            let within = (j != i) & (other_size > 1) & (other <= stride);
            let span = (other_size - 1).saturating_mul(other);
            inner = inner.saturating_add(if within { span } else { 0 });
        }
        apart &= (size <= 1) | (stride >= inner);
    }
    apart
}

/// Why no tensor can be made of these.
#[cold]
pub(crate) fn impossible(shape: &[i64], strides: Option<&[i64]>) -> FlashInferError {
    let ndim = shape.len();
    if ndim > MAX_NDIM {
        view("shape", format!("{shape:?}"), format!("at most {MAX_NDIM} dimensions"))
    } else if let Some(strides) = strides.filter(|strides| strides.len() != ndim) {
        view("strides", format!("{strides:?}"), format!("one for each of the {ndim} dimensions"))
    } else if numel(shape).is_none() {
        view("shape", format!("{shape:?}"), "sizes that are not negative and whose product fits 64 bits".to_owned())
    } else {
        view("data", "a null pointer".to_owned(), "memory, for a tensor that is not empty".to_owned())
    }
}

/// A tensor in the form that crosses the boundary, borrowing the tensor's shape and strides.
#[repr(transparent)]
#[derive(Debug)]
pub struct PackedTensor<'a>(pub(crate) DLTensor, PhantomData<&'a ()>);

impl PackedTensor<'_> {
    #[inline(always)]
    pub(crate) fn new(tensor: DLTensor) -> Self {
        Self(tensor, PhantomData)
    }
}

impl<'a> From<&'a TensorRef<'_>> for PackedTensor<'a> {
    fn from(tensor: &'a TensorRef<'_>) -> Self {
        tensor.pack()
    }
}

impl<'a> From<&'a mut TensorMut<'_>> for PackedTensor<'a> {
    fn from(tensor: &'a mut TensorMut<'_>) -> Self {
        tensor.pack()
    }
}

/// A tensor that is read. It borrows its memory; it may be cloned, and cut into [views](Self::narrow).
#[derive(Clone)]
pub struct TensorRef<'a> {
    layout: Layout,
    owner: Owner<'a>,
    borrow: PhantomData<&'a [u8]>,
}

/// A tensor that is written; nothing else refers to its memory.
pub struct TensorMut<'a> {
    layout: Layout,
    owner: Owner<'a>,
    borrow: PhantomData<&'a mut [u8]>,
}

impl fmt::Debug for TensorRef<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.layout.fmt(f)
    }
}

impl fmt::Debug for TensorMut<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.layout.fmt(f)
    }
}

impl Layout {
    /// A tensor of this rank that has no memory, for functions that tell their forms by that.
    #[inline(always)]
    pub(crate) fn without_memory(device: Device, rank: usize) -> DLTensor {
        static ZEROS: [i64; MAX_NDIM] = [0; MAX_NDIM];
        static ONES: [i64; MAX_NDIM] = [1; MAX_NDIM];
        let (device, dtype) = (device.to_dl(), DType::U8.to_dl());
        let (shape, strides) = (ZEROS.as_ptr(), ONES.as_ptr());
        DLTensor { data: std::ptr::null_mut(), device, ndim: rank as i32, dtype, shape, strides, byte_offset: 0 }
    }
}

/// That a strided tensor stays inside a slice of `len` elements.
fn check_reach(len: usize, layout: &Layout) -> Result<()> {
    let inside = layout.strides().iter().all(|&stride| stride >= 0);
    let reach = layout.reach().and_then(|reach| usize::try_from(reach).ok());
    if inside && reach.is_some_and(|reach| reach <= len) {
        return Ok(());
    }
    let found = format!("{:?} with shape {:?}", layout.strides(), layout.shape());
    Err(view("strides", found, format!("no negative stride and no element past the slice's {len}")))
}

fn check_len(len: usize, shape: &[i64]) -> Result<()> {
    // Two negative sizes are found when the tensor is made.
    let numel = shape.iter().try_fold(1i64, |product, &n| product.checked_mul(n));
    if numel.and_then(|numel| usize::try_from(numel).ok()) == Some(len) {
        return Ok(());
    }
    Err(view("shape", format!("{shape:?}"), format!("sizes whose product is the slice's length, {len}")))
}

macro_rules! accessors {
    () => {
        /// The sizes.
        pub fn shape(&self) -> &[i64] {
            self.layout.shape()
        }

        /// The strides, in elements.
        pub fn strides(&self) -> &[i64] {
            self.layout.strides()
        }

        /// The element type.
        pub fn dtype(&self) -> DType {
            self.layout.dtype()
        }

        /// Where the memory is.
        pub fn device(&self) -> Device {
            self.layout.device()
        }

        /// The address of the first element, on the tensor's device: for a kernel of one's own, queued on the same stream.
        /// Nothing orders what is done with it after the tensor is gone.
        pub fn as_ptr(&self) -> *const c_void {
            self.layout.data()
        }

        #[inline(always)]
        pub(crate) fn layout(&self) -> &Layout {
            &self.layout
        }

        #[inline(always)]
        pub(crate) fn owner(&self) -> &Owner<'a> {
            &self.owner
        }
    };
}

impl<'a> TensorRef<'a> {
    /// A contiguous, row-major tensor on the host.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) where the shape does not fit the slice.
    pub fn from_slice<T: Element>(data: &'a [T], shape: &[i64]) -> Result<Self> {
        check_len(data.len(), shape)?;
        let layout = Layout::new(data.as_ptr().cast_mut().cast(), Device::Cpu, T::DTYPE, shape, None)?;
        Ok(Self { layout, owner: Owner::NONE, borrow: PhantomData })
    }

    /// A tensor on the host with strides of its own, in elements.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) where an element would lie outside of the slice.
    pub fn from_slice_strided<T: Element>(data: &'a [T], shape: &[i64], strides: &[i64]) -> Result<Self> {
        let layout = Layout::new(data.as_ptr().cast_mut().cast(), Device::Cpu, T::DTYPE, shape, Some(strides))?;
        check_reach(data.len(), &layout)?;
        Ok(Self { layout, owner: Owner::NONE, borrow: PhantomData })
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
        let layout = Layout::new(data.cast_mut(), device, dtype, shape, strides)?;
        Ok(Self { layout, owner: Owner::NONE, borrow: PhantomData })
    }

    /// A tensor of what [`Layout::is_possible`]. Made where it is used: moved, it would cost more than a call.
    ///
    /// # Safety
    /// As for [`from_raw`](Self::from_raw), where `owner` does not see to it.
    #[inline(always)]
    pub(crate) unsafe fn from_layout(layout: Layout, owner: Owner<'a>) -> Self {
        Self { layout, owner, borrow: PhantomData }
    }

    accessors!();

    fn viewed(&self, layout: Layout) -> Self {
        Self { layout, owner: self.owner, borrow: PhantomData }
    }

    /// The elements from `start` on of a vector of 32-bit words, in this shape, which must be inside of it, as another type of
    /// that size.
    #[inline(always)]
    pub(crate) fn words(&self, start: i64, shape: &[i64], dtype: DType) -> Self {
        debug_assert!(dtype.size() == 4 && self.dtype().size() == 4);
        debug_assert!(start + shape.iter().product::<i64>() <= self.layout.size(0));
        let data = self.layout.data().wrapping_byte_offset(start as isize * 4);
        self.viewed(Layout::build(data, self.device(), dtype, shape, None, self.layout.stream()))
    }

    /// The same tensor, for as long as this one is there.
    pub fn reborrow(&self) -> TensorRef<'_> {
        self.clone()
    }

    /// The part of a dimension from `start` on, `count` long.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) for a dimension that is not there, or a part that is not inside.
    pub fn narrow(&self, dimension: usize, start: i64, count: i64) -> Result<Self> {
        Ok(self.viewed(self.layout.checked_narrow(dimension, start, count)?))
    }

    /// The parts of a dimension before `middle` and from there on.
    ///
    /// # Errors
    /// As for [`narrow`](Self::narrow).
    pub fn split_at(&self, dimension: usize, middle: i64) -> Result<(Self, Self)> {
        let (first, second) = halves(&self.layout, dimension, middle)?;
        Ok((self.viewed(first), self.viewed(second)))
    }

    /// The same elements in the same order in another shape.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) for another number of elements, or a tensor that is not
    /// contiguous.
    pub fn reshape(&self, shape: &[i64]) -> Result<Self> {
        Ok(self.viewed(self.layout.reshape(shape)?))
    }

    /// With two dimensions in each other's place: `[tokens, heads, size]` as `[heads, tokens, size]`, for example. Nothing
    /// is moved.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) for a dimension that is not there.
    pub fn transpose(&self, first: usize, second: usize) -> Result<Self> {
        Ok(self.viewed(self.layout.transpose(first, second)?))
    }

    /// The form that crosses the boundary.
    #[inline]
    pub fn pack(&self) -> PackedTensor<'_> {
        PackedTensor::new(self.layout.pack())
    }
}

fn halves(layout: &Layout, dimension: usize, middle: i64) -> Result<(Layout, Layout)> {
    let first = layout.checked_narrow(dimension, 0, middle)?;
    Ok((first, layout.narrow(dimension, middle, layout.size(dimension) - middle)))
}

impl<'a> TensorMut<'a> {
    /// A contiguous, row-major tensor on the host.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) where the shape does not fit the slice.
    pub fn from_slice<T: Element>(data: &'a mut [T], shape: &[i64]) -> Result<Self> {
        check_len(data.len(), shape)?;
        let layout = Layout::new(data.as_mut_ptr().cast(), Device::Cpu, T::DTYPE, shape, None)?;
        Ok(Self { layout, owner: Owner::NONE, borrow: PhantomData })
    }

    /// A tensor on the host with strides of its own, in elements.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) where an element would lie outside of the slice.
    pub fn from_slice_strided<T: Element>(data: &'a mut [T], shape: &[i64], strides: &[i64]) -> Result<Self> {
        let layout = Layout::new(data.as_mut_ptr().cast(), Device::Cpu, T::DTYPE, shape, Some(strides))?;
        check_reach(data.len(), &layout)?;
        Ok(Self { layout, owner: Owner::NONE, borrow: PhantomData })
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
        let layout = Layout::new(data, device, dtype, shape, strides)?;
        Ok(Self { layout, owner: Owner::NONE, borrow: PhantomData })
    }

    /// A tensor of what [`Layout::is_possible`]. Made where it is used: moved, it would cost more than a call.
    ///
    /// # Safety
    /// As for [`from_raw`](Self::from_raw), where `owner` does not see to it.
    #[inline(always)]
    pub(crate) unsafe fn from_layout(layout: Layout, owner: Owner<'a>) -> Self {
        Self { layout, owner, borrow: PhantomData }
    }

    accessors!();

    /// As [`as_ptr`](Self::as_ptr), to be written.
    pub fn as_mut_ptr(&mut self) -> *mut c_void {
        self.layout.data()
    }

    /// The same tensor, for as long as this one is not used otherwise.
    pub fn reborrow(&mut self) -> TensorMut<'_> {
        self.viewed(self.layout)
    }

    /// The same tensor, to be read, for as long as this one is not used otherwise.
    pub fn as_ref(&self) -> TensorRef<'_> {
        TensorRef { layout: self.layout, owner: self.owner, borrow: PhantomData }
    }

    /// Of the same memory: the caller sees to it that this one is not used meanwhile, or that both are disjoint.
    fn viewed<'b>(&self, layout: Layout) -> TensorMut<'b>
    where
        'a: 'b,
    {
        TensorMut { layout, owner: self.owner, borrow: PhantomData }
    }

    /// The part of a dimension from `start` on, `count` long, for as long as this tensor is not used otherwise.
    ///
    /// # Errors
    /// As for [`TensorRef::narrow`].
    pub fn narrow(&mut self, dimension: usize, start: i64, count: i64) -> Result<TensorMut<'_>> {
        Ok(self.viewed(self.layout.checked_narrow(dimension, start, count)?))
    }

    /// The parts of a dimension before `middle` and from there on, both to be written.
    ///
    /// # Errors
    /// As for [`TensorRef::narrow`], and for a tensor two of whose elements lie in the same place, whose parts may meet.
    pub fn split_at(&mut self, dimension: usize, middle: i64) -> Result<(TensorMut<'_>, TensorMut<'_>)> {
        let (first, second) = halves(&self.layout, dimension, middle)?;
        if !is_injective(self.layout.shape(), self.layout.strides()) {
            let found = format!("strided {:?} with shape {:?}", self.strides(), self.shape());
            return Err(view("tensor", found, "one whose elements each have a place of their own".to_owned()));
        }
        Ok((self.viewed(first), self.viewed(second)))
    }

    /// The same elements in the same order in another shape, for as long as this tensor is not used otherwise.
    ///
    /// # Errors
    /// As for [`TensorRef::reshape`].
    pub fn reshape(&mut self, shape: &[i64]) -> Result<TensorMut<'_>> {
        Ok(self.viewed(self.layout.reshape(shape)?))
    }

    /// With two dimensions in each other's place, for as long as this tensor is not used otherwise.
    ///
    /// # Errors
    /// As for [`TensorRef::transpose`].
    pub fn transpose(&mut self, first: usize, second: usize) -> Result<TensorMut<'_>> {
        Ok(self.viewed(self.layout.transpose(first, second)?))
    }

    /// The form that crosses the boundary.
    #[inline]
    pub fn pack(&mut self) -> PackedTensor<'_> {
        PackedTensor::new(self.layout.pack())
    }
}

/// A tensor that somebody else describes, to be read.
///
/// # Safety
/// The description and the memory must be valid for `'a`, and written by nobody meanwhile.
pub(crate) unsafe fn borrowed<'a>(tensor: &DLTensor) -> Result<TensorRef<'a>> {
    // SAFETY: the caller's promise.
    let layout = unsafe { described(tensor) }?;
    Ok(TensorRef { layout, owner: Owner::NONE, borrow: PhantomData })
}

/// A tensor that somebody else describes, to be written.
///
/// # Safety
/// The description and the memory must be valid for `'a`, and nobody else may use the memory meanwhile.
pub(crate) unsafe fn borrowed_mut<'a>(tensor: &DLTensor) -> Result<TensorMut<'a>> {
    // SAFETY: the caller's promise.
    let layout = unsafe { described(tensor) }?;
    Ok(TensorMut { layout, owner: Owner::NONE, borrow: PhantomData })
}

/// The layout of a tensor that somebody else describes.
///
/// # Safety
/// Shape and strides must be null or as many as the tensor has dimensions.
unsafe fn described(tensor: &DLTensor) -> Result<Layout> {
    let DLTensor { data, device, ndim, dtype, shape, strides, byte_offset } = *tensor;
    let known = |found: String, expected: &str| view("tensor", found, expected.to_owned());
    let Some(dtype) = DType::from_dl(dtype) else {
        let found = format!("of DLPack type code {}, {} bits, {} lanes", dtype.code, dtype.bits, dtype.lanes);
        return Err(known(found, "one of this crate's element types"));
    };
    let Some(device) = Device::from_dl(device) else {
        let found = format!("on DLPack device type {}, number {}", device.device_type, device.device_id);
        return Err(known(found, "on the host or on a CUDA device"));
    };
    let Some(ndim) = usize::try_from(ndim).ok().filter(|&ndim| ndim <= MAX_NDIM) else {
        return Err(known(format!("of {ndim} dimensions"), "at most 6 dimensions"));
    };
    let dimensions = |pointer: *const i64| match pointer.is_null() {
        true => None,
        // SAFETY: the caller's promise.
        false => Some(unsafe { std::slice::from_raw_parts(pointer, ndim) }),
    };
    let shape = match (dimensions(shape), ndim) {
        (Some(shape), _) => shape,
        (None, 0) => &[],
        (None, _) => return Err(known("without a shape".to_owned(), "one with a size for each dimension")),
    };
    let data = data.wrapping_byte_add(byte_offset as usize);
    Layout::new(data, device, dtype, shape, dimensions(strides))
}
