//! The flat functions and structs: raw device pointers in, one call, thin over `kernels`.

use std::ffi::c_void;

use crate::error::{FlashInferError, Result};
use crate::kernels::gdn::{self, GdnOptions, GdnTensors};
use crate::kernels::norm::{self, NormOptions};
use crate::owner::Owner;
use crate::runtime::FlashInferRuntime;
use crate::stream::Stream;
use crate::tensor::{DType, Device, Layout, TensorMut, TensorRef, impossible};

macro_rules! descriptor {
    ($(#[$doc:meta])* $name:ident { $($size:ident),* ; $($stride:ident),* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy)]
        #[repr(C)]
        pub struct $name {
            /// Device memory.
            pub ptr: *const c_void,
            $(
                #[doc = concat!("The size of the dimension `", stringify!($size), "`.")]
                pub $size: i64,
            )*
            $(
                #[doc = concat!("`", stringify!($stride), "`, in elements.")]
                pub $stride: i64,
            )*
            /// The element type.
            pub dtype: DType,
            /// CUDA's number for the GPU.
            pub device_id: i32,
        }

        impl $name {
            /// That a tensor can be made of it.
            #[inline]
            fn check(&self) -> Result<()> {
                check(self.device_id, self.ptr, &[$(self.$size),*], &[$(self.$stride),*])
            }

            #[inline(always)]
            fn layout(&self) -> Layout {
                let (shape, strides) = ([$(self.$size),*], [$(self.$stride),*]);
                let device = Device::Cuda(self.device_id as u32);
                Layout::build(self.ptr.cast_mut(), device, self.dtype, &shape, Some(&strides), None)
            }

            /// The tensor, once it was checked. It is made where it is used: moved, it would cost more than the call.
            ///
            /// # Safety
            /// As for [`TensorRef::from_raw`].
            #[inline(always)]
            unsafe fn read<'a>(&self) -> TensorRef<'a> {
                // SAFETY: the caller's promise.
                unsafe { TensorRef::from_layout(self.layout(), Owner::NONE) }
            }

            /// # Safety
            /// As for [`TensorMut::from_raw`].
            #[inline(always)]
            #[allow(dead_code, reason = "some shapes are only read")]
            unsafe fn write<'a>(&self) -> TensorMut<'a> {
                // SAFETY: the caller's promise.
                unsafe { TensorMut::from_layout(self.layout(), Owner::NONE) }
            }
        }
    };
}

descriptor! {
    /// A vector in device memory.
    Tensor1DDesc { len; stride }
}
descriptor! {
    /// A matrix in device memory.
    Tensor2DDesc { rows, cols; stride_row, stride_col }
}
descriptor! {
    /// A `[tokens, heads, head size]` tensor in device memory.
    Tensor3DDesc { dim0, dim1, dim2; stride0, stride1, stride2 }
}
descriptor! {
    /// A `[sequences, heads, value dimension, key dimension]` tensor in device memory.
    Tensor4DDesc { dim0, dim1, dim2, dim3; stride0, stride1, stride2, stride3 }
}

/// That a descriptor can be a tensor's.
#[inline]
fn check(device_id: i32, ptr: *const c_void, shape: &[i64], strides: &[i64]) -> Result<()> {
    if device_id >= 0 && Layout::is_possible(ptr.cast_mut(), shape, Some(strides)) {
        return Ok(());
    }
    Err(unfit(device_id, shape, strides))
}

#[cold]
fn unfit(device_id: i32, shape: &[i64], strides: &[i64]) -> FlashInferError {
    if device_id >= 0 {
        return impossible(shape, Some(strides));
    }
    // TVM-FFI 0.1.3 would write past its table of streams, and say nothing.
    match FlashInferRuntime::global().and_then(|runtime| runtime.device_count()) {
        Ok(count) => FlashInferError::DeviceOutOfRange { device: device_id.into(), count },
        Err(error) => error,
    }
}

/// The arguments of [`gemma_rmsnorm`].
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct GemmaRmsNormParams {
    /// `[rows, columns]`, F16 or BF16.
    pub input: Tensor2DDesc,
    /// `[columns]`, as the input.
    pub weight: Tensor1DDesc,
    /// As the input; may be the input.
    pub out: Tensor2DDesc,
    /// Added to the mean square; finite and positive.
    pub eps: f64,
    /// The CUDA stream (`cudaStream_t`), null for the null stream.
    pub stream: *mut c_void,
    /// Programmatic dependent launch.
    pub enable_pdl: bool,
}

impl GemmaRmsNormParams {
    /// All arguments; programmatic dependent launch is off.
    pub fn new(input: Tensor2DDesc, weight: Tensor1DDesc, out: Tensor2DDesc, eps: f64, stream: *mut c_void) -> Self {
        Self { input, weight, out, eps, stream, enable_pdl: false }
    }

    /// With programmatic dependent launch on or off.
    #[must_use]
    pub fn with_enable_pdl(mut self, enable_pdl: bool) -> Self {
        self.enable_pdl = enable_pdl;
        self
    }
}

/// [Gemma's RMSNorm](norm::gemma_rmsnorm) on raw device pointers, asynchronous on the given stream.
///
/// # Errors
/// As for [`norm::gemma_rmsnorm`].
///
/// # Safety
/// Each descriptor must describe device memory of its type that stays valid, and that nobody else writes, until the
/// kernel has run; `out` may be the input itself, and otherwise overlaps nothing. The stream must be null or a live
/// stream of the descriptors' device.
pub unsafe fn gemma_rmsnorm(params: &GemmaRmsNormParams) -> Result<()> {
    params.out.check()?;
    params.input.check()?;
    params.weight.check()?;
    let options = NormOptions::default().with_eps(params.eps).with_pdl(params.enable_pdl);
    // SAFETY: the caller's promise, for the memory and for the stream.
    unsafe {
        let (mut out, input, weight) = (params.out.write(), params.input.read(), params.weight.read());
        norm::gemma_rmsnorm(&mut out, &input, &weight, &options, Stream::from_raw(params.stream))
    }
}

/// The arguments of [`gdn_prefill_sm90`]; shapes and types as in [`GdnTensors`].
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct GdnPrefillSm90Params {
    /// `[T, H, 128]`.
    pub output: Tensor3DDesc,
    /// `[N, H, 128, 128]` F32.
    pub output_state: Tensor4DDesc,
    /// `[T, query heads, 128]`.
    pub q: Tensor3DDesc,
    /// `[T, key heads, 128]`.
    pub k: Tensor3DDesc,
    /// `[T, value heads, 128]`.
    pub v: Tensor3DDesc,
    /// `[N + 1]` I64.
    pub cu_seqlens: Tensor1DDesc,
    /// `[N, H, 128, 128]` F32.
    pub input_state: Option<Tensor4DDesc>,
    /// `[T, H]` F32, linear.
    pub alpha: Option<Tensor2DDesc>,
    /// `[T, H]` F32.
    pub beta: Option<Tensor2DDesc>,
    /// 0.0 for 1/√128.
    pub scale: f64,
    /// `[131072]` U8 or longer ([`WORKSPACE_SIZE`](gdn::WORKSPACE_SIZE)), aligned to 64 bytes.
    pub workspace: Tensor1DDesc,
    /// The CUDA stream (`cudaStream_t`), null for the null stream.
    pub stream: *mut c_void,
}

impl GdnPrefillSm90Params {
    /// What is required; no initial state, no alpha, no beta, the default scale.
    #[allow(clippy::too_many_arguments, reason = "the kernel has that many, and each is required")]
    pub fn new(
        output: Tensor3DDesc,
        output_state: Tensor4DDesc,
        q: Tensor3DDesc,
        k: Tensor3DDesc,
        v: Tensor3DDesc,
        cu_seqlens: Tensor1DDesc,
        workspace: Tensor1DDesc,
        stream: *mut c_void,
    ) -> Self {
        let (input_state, alpha, beta, scale) = (None, None, None, 0.0);
        Self { output, output_state, q, k, v, cu_seqlens, input_state, alpha, beta, scale, workspace, stream }
    }

    /// With states before the first tokens.
    #[must_use]
    pub fn with_input_state(mut self, input_state: Tensor4DDesc) -> Self {
        self.input_state = Some(input_state);
        self
    }

    /// With a decay, linear.
    #[must_use]
    pub fn with_alpha(mut self, alpha: Tensor2DDesc) -> Self {
        self.alpha = Some(alpha);
        self
    }

    /// With a writing rate.
    #[must_use]
    pub fn with_beta(mut self, beta: Tensor2DDesc) -> Self {
        self.beta = Some(beta);
        self
    }

    /// With a scale of the output.
    #[must_use]
    pub fn with_scale(mut self, scale: f64) -> Self {
        self.scale = scale;
        self
    }
}

/// [Prefill of the gated delta rule](gdn::gdn_prefill) on raw device pointers, asynchronous on the given stream.
///
/// # Errors
/// As for [`gdn::gdn_prefill`].
///
/// # Safety
/// Each descriptor must describe device memory of its type that stays valid, and that nobody else writes, until the
/// kernel has run; outputs and workspace overlap nothing. The stream must be null or a live stream of the descriptors'
/// device. And all that [`gdn::gdn_prefill`] asks of `cu_seqlens` and the workspace.
pub unsafe fn gdn_prefill_sm90(params: &GdnPrefillSm90Params) -> Result<()> {
    params.output.check()?;
    params.output_state.check()?;
    params.q.check()?;
    params.k.check()?;
    params.v.check()?;
    params.cu_seqlens.check()?;
    params.workspace.check()?;
    params.input_state.as_ref().map_or(Ok(()), Tensor4DDesc::check)?;
    params.alpha.as_ref().map_or(Ok(()), Tensor2DDesc::check)?;
    params.beta.as_ref().map_or(Ok(()), Tensor2DDesc::check)?;
    // SAFETY: the caller's promise, for the memory, for the contents of cu_seqlens and for the stream.
    unsafe {
        let mut tensors = GdnTensors {
            output: params.output.write(),
            output_state: params.output_state.write(),
            q: params.q.read(),
            k: params.k.read(),
            v: params.v.read(),
        };
        let options = GdnOptions {
            input_state: params.input_state.as_ref().map(|state| state.read()),
            alpha: params.alpha.as_ref().map(|alpha| alpha.read()),
            beta: params.beta.as_ref().map(|beta| beta.read()),
            scale: (params.scale != 0.0).then_some(params.scale),
        };
        let (cu_seqlens, mut workspace) = (params.cu_seqlens.read(), params.workspace.write());
        gdn::gdn_prefill(&mut tensors, &cu_seqlens, &mut workspace, &options, Stream::from_raw(params.stream))
    }
}
