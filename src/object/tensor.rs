//! Tensors as objects, which own their memory: over host memory, cudarc's buffers, and DLPack.

use std::ffi::c_void;
use std::fmt;
use std::mem::ManuallyDrop;
use std::ptr::{self, NonNull};

use super::allocator::HostMemory;
use super::arg::on_host;
use super::contain::dropped;
use super::{Object, object_type};
use crate::error::{FlashInferError, Result};
use crate::ffi::api::Api;
use crate::ffi::dlpack::{self, DLDataType, DLManagedTensor, DLManagedTensorVersioned, DLTensor};
use crate::tensor::{DType, Device, Element, Layout, MAX_NDIM, TensorMut, TensorRef, borrowed, borrowed_mut};

object_type! {
    /// A tensor that owns its memory, counted like any object: what functions take whose parameter is `ffi::Tensor`, and what
    /// they return.
    ///
    /// A clone is the same tensor, not a copy. Reading one is safe, since only [calls](crate::Function::call), which are
    /// unsafe, write to it: whoever makes one sees to it that nothing reads a tensor that it writes.
    Tensor, TENSOR, "Tensor"
}

// SAFETY: its description never changes, its memory may be read from anywhere, references are counted atomically, and what
// owns the memory is `Send` where it is this crate's. Whoever makes another one lets it be released on any thread, as DLPack
// has it.
unsafe impl Send for Tensor {}
// SAFETY: as above.
unsafe impl Sync for Tensor {}

/// A managed tensor with its shape, its strides and what owns its memory, in one place.
#[repr(C)]
struct Owning<B> {
    managed: DLManagedTensorVersioned,
    shape: [i64; MAX_NDIM],
    strides: [i64; MAX_NDIM],
    owner: B,
}

/// # Safety
/// `managed` must be the start of an [`Owning<B>`] that nobody uses any more.
unsafe extern "C" fn release<B>(managed: *mut DLManagedTensorVersioned) {
    // SAFETY: whoever has it calls this once, with the pointer that was leaked for it.
    dropped(unsafe { Box::from_raw(managed.cast::<Owning<B>>()) });
}

/// A managed tensor that owns `owner`, and gives it up on whichever thread releases it.
///
/// # Safety
/// The layout's memory must be valid for as long as `owner` is there.
pub(super) unsafe fn manage<B: Send + 'static>(owner: B, tensor: DLTensor) -> DlpackTensor {
    let (mut shape, mut strides) = ([1; MAX_NDIM], [1; MAX_NDIM]);
    let ndim = usize::try_from(tensor.ndim).unwrap_or(0).min(MAX_NDIM);
    // SAFETY: the caller's tensor has that many sizes and strides.
    unsafe {
        ptr::copy_nonoverlapping(tensor.shape, shape.as_mut_ptr(), ndim);
        ptr::copy_nonoverlapping(tensor.strides, strides.as_mut_ptr(), ndim);
    }
    let managed = DLManagedTensorVersioned {
        version: dlpack::VERSION,
        manager_ctx: ptr::null_mut(),
        deleter: Some(release::<B>),
        flags: 0,
        dl_tensor: tensor,
    };
    let owning = Box::into_raw(Box::new(Owning { managed, shape, strides, owner }));
    // SAFETY: just made, and used by nobody else. The arrays stay where they are until it is released.
    unsafe {
        (*owning).managed.dl_tensor.shape = (&raw const (*owning).shape).cast();
        (*owning).managed.dl_tensor.strides = (&raw const (*owning).strides).cast();
        DlpackTensor(NonNull::new_unchecked(owning.cast()))
    }
}

/// As [`manage`], of a contiguous tensor of at most [`MAX_NDIM`] dimensions.
///
/// # Safety
/// The memory must be on that device and as large as the tensor, for as long as `owner` is there.
pub(super) unsafe fn contiguous<B: Send + 'static>(
    owner: B,
    data: *mut c_void,
    device: Device,
    dtype: DLDataType,
    shape: &[i64],
) -> DlpackTensor {
    let mut strides = [1i64; MAX_NDIM];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i].wrapping_mul(shape[i].max(1));
    }
    let (ndim, device) = (shape.len() as i32, device.to_dl());
    let (shape, strides) = (shape.as_ptr(), strides.as_ptr());
    let tensor = DLTensor { data, device, ndim, dtype, shape, strides, byte_offset: 0 };
    // SAFETY: the caller's promise.
    unsafe { manage(owner, tensor) }
}

impl Tensor {
    /// A tensor on the host over a vector's memory, contiguous and row-major.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) where the shape does not fit the vector, or what TVM-FFI raises.
    pub fn from_vec<T: Element + Send>(mut values: Vec<T>, shape: &[i64]) -> Result<Self> {
        let tensor = TensorMut::from_slice(&mut values, shape)?.layout().pack_owned();
        // SAFETY: the vector owns the memory, and moving it moves nothing else.
        unsafe { Self::of_layout(values, tensor) }
    }

    /// A tensor of zeros on the host, whose memory is aligned to 256 bytes.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) for a shape of which there can be no tensor, or what TVM-FFI
    /// raises.
    pub fn zeros(dtype: DType, shape: &[i64]) -> Result<Self> {
        let elements = crate::tensor::numel(shape).and_then(|count| usize::try_from(count).ok());
        let bytes = elements.and_then(|count| count.checked_mul(dtype.size()));
        let Some(memory) = bytes.and_then(HostMemory::zeroed) else {
            return Err(FlashInferError::InvalidArgument {
                function: "Tensor::zeros",
                argument: "shape",
                found: format!("{shape:?}"),
                expected: "sizes that are not negative and for which there is memory".to_owned(),
            });
        };
        let data = memory.pointer();
        // SAFETY: the memory is the tensor's own.
        unsafe { Self::from_owner(memory, data, Device::Cpu, dtype, shape, None) }
    }

    /// A tensor over any memory, which `owner` owns. `strides` count elements; `None` is row-major.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) for a null pointer, a negative size, or more than
    /// [`MAX_NDIM`] dimensions; and what TVM-FFI raises.
    ///
    /// # Safety
    /// Every element that shape and strides reach must be memory of `dtype` on `device` for as long as `owner` is there,
    /// wherever that is moved, that may be read and written by whatever the tensor is given to. On a GPU, dropping `owner`
    /// must wait for what was queued, or be ordered behind it.
    pub unsafe fn from_owner<B: Send + 'static>(
        owner: B,
        data: *mut c_void,
        device: Device,
        dtype: DType,
        shape: &[i64],
        strides: Option<&[i64]>,
    ) -> Result<Self> {
        // SAFETY: the caller's promise; only the description is used.
        let tensor = unsafe { TensorMut::from_raw(data, device, dtype, shape, strides) }?.layout().pack_owned();
        // SAFETY: the caller's promise.
        unsafe { Self::of_layout(owner, tensor) }
    }

    /// # Safety
    /// As for [`from_owner`](Self::from_owner).
    unsafe fn of_layout<B: Send + 'static>(owner: B, tensor: PackedLayout) -> Result<Self> {
        // SAFETY: the caller's promise.
        Self::from_dlpack(unsafe { manage(owner, tensor.tensor()) })
    }

    /// A tensor over a buffer of cudarc's, contiguous and row-major; the buffer may be longer. An `Arc` of it can be
    /// kept, to read the buffer afterwards.
    ///
    /// The buffer's stream waits for what used it before. cudarc is not told of what functions do with the tensor: queue them
    /// on the buffer's own [stream](cudarc::driver::CudaSlice::stream), behind which it is released and behind which
    /// cudarc's own functions use it.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) for a buffer that is too short, or of a context that is not its
    /// device's primary one; and what TVM-FFI raises.
    #[cfg(feature = "cudarc")]
    pub fn from_cudarc<T: Element + Send + Sync>(
        buffer: impl Into<std::sync::Arc<cudarc::driver::CudaSlice<T>>>,
        shape: &[i64],
    ) -> Result<Self> {
        let buffer = buffer.into();
        let stream = std::sync::Arc::clone(buffer.stream());
        let tensor = TensorRef::from_cudarc(&stream, &*buffer, shape)?.layout().pack_owned();
        // SAFETY: the buffer owns the memory, which was found to hold the tensor, and is released in the order of its stream.
        unsafe { Self::of_layout(buffer, tensor) }
    }

    /// A contiguous tensor of any element type, over memory that `owner` owns.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) for more than [`MAX_NDIM`] dimensions, and what TVM-FFI raises.
    ///
    /// # Safety
    /// As for [`from_owner`](Self::from_owner).
    #[cfg(feature = "bench")]
    pub(crate) unsafe fn from_parts<B: Send + 'static>(
        owner: B,
        data: *mut c_void,
        device: Device,
        dtype: DLDataType,
        shape: &[i64],
    ) -> Result<Self> {
        if shape.len() > MAX_NDIM {
            return Err(FlashInferError::InvalidArgument {
                function: "Tensor",
                argument: "shape",
                found: format!("of {} dimensions", shape.len()),
                expected: format!("at most {MAX_NDIM} dimensions"),
            });
        }
        // SAFETY: the caller's promise.
        Self::from_dlpack(unsafe { contiguous(owner, data, device, dtype, shape) })
    }

    /// A tensor in memory of an allocator's, of any element type.
    ///
    /// # Errors
    /// What the allocator answers, and what TVM-FFI raises.
    #[cfg(feature = "bench")]
    pub(crate) fn allocated(
        allocator: &dyn super::TensorAllocator,
        device: Device,
        dtype: DLDataType,
        shape: &[i64],
    ) -> Result<Self> {
        Self::from_dlpack(super::allocator::allocated(allocator, device, dtype, shape)?)
    }

    #[inline(always)]
    pub(crate) fn described(&self) -> &DLTensor {
        // SAFETY: a tensor object has its description right behind its header, which never changes.
        unsafe { &*self.0.cell::<DLTensor>() }
    }

    fn dimensions(&self, of: *const i64) -> &[i64] {
        match usize::try_from(self.described().ndim) {
            // SAFETY: a tensor has a size and a stride for each dimension, which live as long as it.
            Ok(ndim) if ndim > 0 && !of.is_null() => unsafe { std::slice::from_raw_parts(of, ndim) },
            _ => &[],
        }
    }

    /// The sizes.
    pub fn shape(&self) -> &[i64] {
        self.dimensions(self.described().shape)
    }

    /// The strides, in elements.
    pub fn strides(&self) -> &[i64] {
        self.dimensions(self.described().strides)
    }

    /// The element type; `None` for one that this crate has no name for: see [`dlpack_dtype`](Self::dlpack_dtype).
    pub fn dtype(&self) -> Option<DType> {
        DType::from_dl(self.described().dtype)
    }

    /// DLPack's code for the element type, its bits, and its lanes.
    pub fn dlpack_dtype(&self) -> (u8, u8, u16) {
        let dtype = self.described().dtype;
        (dtype.code, dtype.bits, dtype.lanes)
    }

    /// Where the memory is; `None` for what is neither the host nor a CUDA device.
    pub fn device(&self) -> Option<Device> {
        Device::from_dl(self.described().device)
    }

    /// The address of the first element.
    pub fn as_ptr(&self) -> *const c_void {
        let tensor = self.described();
        tensor.data.wrapping_byte_add(tensor.byte_offset as usize)
    }

    /// The tensor, to be read on the host, for as long as this is there.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) for one on a GPU, which
    /// [`as_ref_unordered`](Self::as_ref_unordered) answers, and for one that [`TensorRef`] cannot describe: of another
    /// element type or device, or with too many dimensions.
    pub fn as_ref(&self) -> Result<TensorRef<'_>> {
        // SAFETY: the object keeps its memory; that nobody writes it meanwhile is the promise of whoever makes a call.
        on_host("Tensor::as_ref", unsafe { borrowed(self.described()) }?)
    }

    /// The tensor, to be read wherever it is, for as long as this is there. Nothing is told of what is queued with it.
    ///
    /// # Safety
    /// On a GPU, what reads it must be queued behind what wrote it, and ahead of what writes it next and of its release,
    /// which is what the last of its references does wherever it is dropped: of a tensor
    /// [of cudarc's](Self::from_cudarc), on the buffer's stream.
    ///
    /// # Errors
    /// As for [`as_ref`](Self::as_ref), but for a GPU's.
    pub unsafe fn as_ref_unordered(&self) -> Result<TensorRef<'_>> {
        // SAFETY: as there, and the caller's promise.
        unsafe { borrowed(self.described()) }
    }

    /// The tensor, to be written, for as long as this is there.
    ///
    /// # Errors
    /// As for [`as_ref`](Self::as_ref), but for a GPU's.
    ///
    /// # Safety
    /// Nothing else may use the memory meanwhile: no clone of this tensor, none over the same memory, and nothing that was
    /// queued. And it must be memory that may be written. On a GPU also as for
    /// [`as_ref_unordered`](Self::as_ref_unordered).
    pub unsafe fn as_mut(&self) -> Result<TensorMut<'_>> {
        // SAFETY: the object keeps its memory; the rest is the caller's promise.
        unsafe { borrowed_mut(self.described()) }
    }

    /// The elements of a contiguous tensor on the host.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) for another element type, another device, strides, or memory
    /// that is not aligned for the type.
    pub fn as_slice<T: Element>(&self) -> Result<&[T]> {
        // SAFETY: what is on a GPU is refused here.
        let tensor = unsafe { self.as_ref_unordered() }?;
        let layout = tensor.layout();
        let refused = |found: String, expected: String| {
            Err(FlashInferError::InvalidArgument { function: "Tensor::as_slice", argument: "tensor", found, expected })
        };
        if layout.is_on_gpu() || !layout.is_of(T::DTYPE) || !layout.is_contiguous() {
            return refused(format!("{tensor:?}"), format!("a contiguous one of {} on the host", T::DTYPE));
        }
        let (data, len) = (layout.data().cast::<T>(), layout.numel() as usize);
        if len == 0 {
            return Ok(&[]);
        }
        if !data.is_aligned() {
            return refused(format!("at {data:p}"), format!("aligned to {} bytes", align_of::<T>()));
        }
        // SAFETY: it is that many elements of this type, initialized as the tensor's maker vouched for, which the object
        // keeps; every bit pattern is one of them. That nobody writes meanwhile is the promise of whoever makes a call.
        Ok(unsafe { std::slice::from_raw_parts(data, len) })
    }

    /// A tensor over what DLPack handed over, which is given back when the last reference goes, on whichever thread that is.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) for another major version of DLPack than 1, and what TVM-FFI
    /// raises. `tensor` is then given back.
    pub fn from_dlpack(tensor: DlpackTensor) -> Result<Self> {
        let api = Api::loaded()?;
        let (major, minor) = tensor.version();
        if major != dlpack::VERSION.major {
            return Err(FlashInferError::InvalidArgument {
                function: "Tensor::from_dlpack",
                argument: "version",
                found: format!("DLPack {major}.{minor}"),
                expected: "DLPack 1, whose layout this crate knows".to_owned(),
            });
        }
        // SAFETY: this side owns the managed tensor; where TVM-FFI refuses it, still so.
        let handle = unsafe { api.tensor_from(tensor.0.as_ptr()) }?;
        std::mem::forget(tensor);
        // SAFETY: what was made has one reference, which is ours.
        Ok(Self(unsafe { Object::from_raw(handle.cast()) }))
    }

    /// As [`from_dlpack`](Self::from_dlpack), from before DLPack 1.0.
    ///
    /// # Errors
    /// What TVM-FFI raises. `tensor` is then given back.
    pub fn from_dlpack_unversioned(tensor: DlpackTensorUnversioned) -> Result<Self> {
        let api = Api::loaded()?;
        // SAFETY: as there.
        let handle = unsafe { api.tensor_from_unversioned(tensor.0.as_ptr()) }?;
        std::mem::forget(tensor);
        // SAFETY: as there.
        Ok(Self(unsafe { Object::from_raw(handle.cast()) }))
    }

    /// The tensor for DLPack, which holds one more reference.
    ///
    /// # Errors
    /// What TVM-FFI raises.
    pub fn to_dlpack(&self) -> Result<DlpackTensor> {
        // SAFETY: this keeps the object.
        let managed = unsafe { Api::loaded()?.tensor_to(self.0.handle()) }?;
        // SAFETY: what was made is not null, and ours.
        Ok(DlpackTensor(unsafe { NonNull::new_unchecked(managed) }))
    }

    /// As [`to_dlpack`](Self::to_dlpack), from before DLPack 1.0.
    ///
    /// # Errors
    /// What TVM-FFI raises.
    pub fn to_dlpack_unversioned(&self) -> Result<DlpackTensorUnversioned> {
        // SAFETY: this keeps the object.
        let managed = unsafe { Api::loaded()?.tensor_to_unversioned(self.0.handle()) }?;
        // SAFETY: what was made is not null, and ours.
        Ok(DlpackTensorUnversioned(unsafe { NonNull::new_unchecked(managed) }))
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // SAFETY: it is only described.
        match unsafe { self.as_ref_unordered() } {
            Ok(tensor) => write!(f, "Tensor({tensor:?})"),
            Err(_) => write!(f, "Tensor({:?}{:?})", self.dlpack_dtype(), self.shape()),
        }
    }
}

/// A layout that does not point into a tensor any more.
pub(super) struct PackedLayout(Layout);

impl PackedLayout {
    pub(super) fn tensor(&self) -> DLTensor {
        self.0.pack()
    }
}

impl Layout {
    fn pack_owned(&self) -> PackedLayout {
        PackedLayout(*self)
    }
}

macro_rules! managed {
    ($(#[$doc:meta])* $name:ident, $managed:ident) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $name(NonNull<$managed>);

        impl $name {
            /// Takes over what somebody handed over.
            ///
            /// # Safety
            #[doc = concat!("`managed` must be a valid `", stringify!($managed), "*` that the caller owns and gives up; it may be")]
            /// released by any thread.
            pub unsafe fn from_raw(managed: *mut c_void) -> Self {
                debug_assert!(!managed.is_null());
                // SAFETY: the caller's promise.
                Self(unsafe { NonNull::new_unchecked(managed.cast()) })
            }

            /// Hands it over: whoever gets it calls its deleter, once.
            pub fn into_raw(self) -> *mut c_void {
                ManuallyDrop::new(self).0.as_ptr().cast()
            }
        }

        impl Drop for $name {
            fn drop(&mut self) {
                let managed = self.0.as_ptr();
                // SAFETY: this owns the managed tensor and gives it back here, once.
                unsafe {
                    if let Some(deleter) = (*managed).deleter {
                        deleter(managed);
                    }
                }
            }
        }
    };
}

managed! {
    /// A tensor on its way between two libraries: DLPack's `DLManagedTensorVersioned`, which is given back when it is dropped.
    DlpackTensor, DLManagedTensorVersioned
}

managed! {
    /// As [`DlpackTensor`], from before DLPack 1.0: a `DLManagedTensor`.
    DlpackTensorUnversioned, DLManagedTensor
}

impl DlpackTensor {
    fn managed(&self) -> &DLManagedTensorVersioned {
        // SAFETY: this owns the managed tensor.
        unsafe { self.0.as_ref() }
    }

    /// The DLPack release of whoever made it, major and minor.
    pub fn version(&self) -> (u32, u32) {
        let version = self.managed().version;
        (version.major, version.minor)
    }

    /// Whether it must not be written. TVM-FFI does not keep that: a [`Tensor`] of it must not be given to what writes.
    pub fn is_read_only(&self) -> bool {
        self.managed().flags & dlpack::READ_ONLY != 0
    }
}
