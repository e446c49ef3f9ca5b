//! The flat functions on cudarc's buffers and streams.
//!
//! cudarc's guards, which order a buffer's uses on different streams, are held until the kernel is queued.

use std::ffi::c_void;

use cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceSlice, SyncOnDrop};

use crate::error::{FlashInferError, Result};
use crate::kernels::gdn::{self, GdnPrefill};
use crate::kernels::norm::{self, NormOptions};
use crate::runtime::Stream;
use crate::tensor::{DType, Device, TensorMut, TensorRef};

mod sealed {
    pub trait Sealed {}
}

/// cudarc's buffers that can be read: slices and views. Sealed, since cudarc's own `DevicePtr` is safe to implement and
/// so promises nothing.
pub trait DeviceBuffer<T>: sealed::Sealed + DevicePtr<T> {}

/// cudarc's buffers that can be written.
pub trait DeviceBufferMut<T>: sealed::Sealed + DevicePtrMut<T> {}

impl<T> sealed::Sealed for CudaSlice<T> {}
impl<T> sealed::Sealed for CudaView<'_, T> {}
impl<T> sealed::Sealed for CudaViewMut<'_, T> {}
impl<T> DeviceBuffer<T> for CudaSlice<T> {}
impl<T> DeviceBuffer<T> for CudaView<'_, T> {}
impl<T> DeviceBuffer<T> for CudaViewMut<'_, T> {}
impl<T> DeviceBufferMut<T> for CudaSlice<T> {}
impl<T> DeviceBufferMut<T> for CudaViewMut<'_, T> {}

/// Rust types for 16-bit floating-point elements: `half`'s, or their bits.
pub trait Half16: sealed::Sealed {
    /// Whether elements of this Rust type can be of that type.
    fn holds(dtype: DType) -> bool;
}

macro_rules! half16 {
    ($($rust:ty: $($dtype:ident)|+),*) => {$(
        impl sealed::Sealed for $rust {}
        impl Half16 for $rust {
            fn holds(dtype: DType) -> bool {
                matches!(dtype, $(DType::$dtype)|+)
            }
        }
    )*};
}

half16! { half::f16: F16, half::bf16: BF16, u16: F16 | BF16 }

/// Reads a buffer as a tensor; the two values live as long as each other.
macro_rules! read {
    ($function:expr, $name:literal, $buffer:expr, $stream:expr, $dtype:expr, $shape:expr => $tensor:ident, $guard:ident) => {
        check($function, $name, $buffer, $stream, $shape)?;
        let (pointer, $guard) = $buffer.device_ptr($stream);
        let pointer = pointer as *const c_void;
        // SAFETY: cudarc owns the memory, which is on its context's device and holds the elements that `check` counted,
        // each of a Rust type that fits the element type. The guard, held until the kernel is queued, orders it before
        // any later write on another stream.
        let $tensor = unsafe { TensorRef::from_raw(pointer, device($stream), $dtype, $shape, None) }?;
    };
}

/// As `read!`, for a buffer that is written.
macro_rules! write {
    ($function:expr, $name:literal, $buffer:expr, $stream:expr, $dtype:expr, $shape:expr => $tensor:ident, $guard:ident) => {
        check($function, $name, $buffer, $stream, $shape)?;
        let (pointer, $guard) = $buffer.device_ptr_mut($stream);
        let pointer = pointer as *mut c_void;
        // SAFETY: as for `read!`; the buffer is borrowed mutably, so nothing else refers to it.
        let $tensor = unsafe { TensorMut::from_raw(pointer, device($stream), $dtype, $shape, None) }?;
    };
}

fn device(stream: &CudaStream) -> Device {
    // cudarc got the number from CUDA, which counts in 32 bits.
    Device::Cuda(stream.context().ordinal() as u32)
}

/// That a buffer belongs to the stream's context and is large enough.
fn check<T>(
    function: &'static str,
    argument: &'static str,
    buffer: &impl DeviceSlice<T>,
    stream: &CudaStream,
    shape: &[i64],
) -> Result<()> {
    let invalid =
        |found: String, expected: String| Err(FlashInferError::InvalidArgument { function, argument, found, expected });
    if buffer.stream().context() != stream.context() {
        let (found, expected) = (buffer.stream().context().ordinal(), stream.context().ordinal());
        return invalid(
            format!("in a context of cuda:{found}"),
            format!("memory in the stream's context, of cuda:{expected}"),
        );
    }
    let needed = shape.iter().try_fold(1i64, |product, &n| product.checked_mul(n));
    match needed.and_then(|needed| usize::try_from(needed).ok()) {
        Some(needed) if needed <= buffer.len() => Ok(()),
        _ => invalid(format!("{} elements long", buffer.len()), format!("enough for shape {shape:?}")),
    }
}

fn check_dtype<T: Half16>(function: &'static str, dtype: DType) -> Result<()> {
    if T::holds(dtype) {
        return Ok(());
    }
    Err(FlashInferError::InvalidArgument {
        function,
        argument: "dtype",
        found: dtype.to_string(),
        expected: format!("the 16-bit type that the buffers hold, {}", std::any::type_name::<T>()),
    })
}

fn size(function: &'static str, argument: &'static str, value: usize) -> Result<i64> {
    i64::try_from(value).map_err(|_| FlashInferError::InvalidArgument {
        function,
        argument,
        found: value.to_string(),
        expected: format!("at most {}", i64::MAX),
    })
}

/// [Gemma's RMSNorm](norm::gemma_rmsnorm) on cudarc's buffers: `input` and `out` hold at least `rows · cols` elements,
/// row-major, `weight` at least `cols`. Asynchronous on `stream`.
///
/// # Errors
/// As for [`norm::gemma_rmsnorm`], and [`InvalidArgument`](FlashInferError::InvalidArgument) for a buffer that is too
/// short or of another context than the stream's, or a `dtype` that the buffers do not hold.
#[allow(clippy::too_many_arguments, reason = "the flat form spells every size out")]
pub fn gemma_rmsnorm_cudarc<T: Half16>(
    stream: &CudaStream,
    input: &impl DeviceBuffer<T>,
    weight: &impl DeviceBuffer<T>,
    out: &mut impl DeviceBufferMut<T>,
    rows: usize,
    cols: usize,
    dtype: DType,
    eps: f64,
) -> Result<()> {
    const NAME: &str = "gemma_rmsnorm";
    check_dtype::<T>(NAME, dtype)?;
    let (rows, cols) = (size(NAME, "rows", rows)?, size(NAME, "cols", cols)?);
    read!(NAME, "input", input, stream, dtype, &[rows, cols] => input, _input_guard);
    read!(NAME, "weight", weight, stream, dtype, &[cols] => weight, _weight_guard);
    write!(NAME, "out", out, stream, dtype, &[rows, cols] => out, _out_guard);
    let (mut out, options) = (out, NormOptions::default().with_eps(eps));
    // SAFETY: a live stream of its context, by cudarc; the context is the buffers' too.
    let stream = unsafe { Stream::from_raw(stream.cu_stream().cast()) };
    norm::gemma_rmsnorm(&mut out, &input, &weight, &options, stream)
}

/// [`gdn_prefill_sm90_cudarc_with_options`] without initial state, alpha and beta, and with the default scale.
///
/// # Errors
/// As there.
///
/// # Safety
/// As there.
#[allow(clippy::too_many_arguments, reason = "the flat form spells every size out")]
pub unsafe fn gdn_prefill_sm90_cudarc<T: Half16>(
    stream: &CudaStream,
    output: &mut impl DeviceBufferMut<T>,
    output_state: &mut impl DeviceBufferMut<f32>,
    q: &impl DeviceBuffer<T>,
    k: &impl DeviceBuffer<T>,
    v: &impl DeviceBuffer<T>,
    cu_seqlens: &impl DeviceBuffer<i64>,
    workspace: &mut impl DeviceBufferMut<u8>,
    packed_seq: usize,
    num_q_heads: usize,
    num_k_heads: usize,
    num_v_heads: usize,
    head_size: usize,
    dtype: DType,
) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe {
        gdn_prefill_sm90_cudarc_with_options(
            stream,
            output,
            output_state,
            q,
            k,
            v,
            cu_seqlens,
            workspace,
            packed_seq,
            num_q_heads,
            num_k_heads,
            num_v_heads,
            head_size,
            dtype,
            None,
            None,
            None,
            0.0,
        )
    }
}

/// [Prefill of the gated delta rule](gdn::gdn_prefill) on cudarc's buffers; shapes as in [`GdnPrefill`], with
/// `T = packed_seq`, `D = head_size` and `N = cu_seqlens.len() - 1`. Buffers may be longer than needed, `cu_seqlens`
/// apart. A `scale` of 0.0 means the kernel's default, 1/√D. Asynchronous on `stream`.
///
/// # Errors
/// As for [`gdn::gdn_prefill`], and [`InvalidArgument`](FlashInferError::InvalidArgument) for a buffer that is too short
/// or of another context than the stream's, or a `dtype` that the buffers do not hold.
///
/// # Safety
/// The contents of `cu_seqlens` must start with 0, increase strictly, and end with `packed_seq`, when the kernel runs:
/// they steer the kernel's addressing, nothing here reads them, and a sequence without tokens hangs the GPU. The
/// workspace must not be in use on another stream, unless cudarc's event tracking orders the two.
#[allow(clippy::too_many_arguments, reason = "the flat form spells every size out")]
pub unsafe fn gdn_prefill_sm90_cudarc_with_options<T: Half16>(
    stream: &CudaStream,
    output: &mut impl DeviceBufferMut<T>,
    output_state: &mut impl DeviceBufferMut<f32>,
    q: &impl DeviceBuffer<T>,
    k: &impl DeviceBuffer<T>,
    v: &impl DeviceBuffer<T>,
    cu_seqlens: &impl DeviceBuffer<i64>,
    workspace: &mut impl DeviceBufferMut<u8>,
    packed_seq: usize,
    num_q_heads: usize,
    num_k_heads: usize,
    num_v_heads: usize,
    head_size: usize,
    dtype: DType,
    input_state: Option<&CudaSlice<f32>>,
    alpha: Option<&CudaSlice<f32>>,
    beta: Option<&CudaSlice<f32>>,
    scale: f64,
) -> Result<()> {
    const NAME: &str = "gdn_prefill";
    check_dtype::<T>(NAME, dtype)?;
    let tokens = size(NAME, "packed_seq", packed_seq)?;
    let q_heads = size(NAME, "num_q_heads", num_q_heads)?;
    let k_heads = size(NAME, "num_k_heads", num_k_heads)?;
    let v_heads = size(NAME, "num_v_heads", num_v_heads)?;
    let head_size = size(NAME, "head_size", head_size)?;
    let offsets = size(NAME, "cu_seqlens", cu_seqlens.len())?;
    let bytes = size(NAME, "workspace", workspace.len())?;
    let heads = q_heads.max(v_heads);
    let states = [(offsets - 1).max(0), heads, head_size, head_size];
    write!(NAME, "output", output, stream, dtype, &[tokens, heads, head_size] => output, _output_guard);
    write!(NAME, "output_state", output_state, stream, DType::F32, &states => output_state, _output_state_guard);
    read!(NAME, "q", q, stream, dtype, &[tokens, q_heads, head_size] => q, _q_guard);
    read!(NAME, "k", k, stream, dtype, &[tokens, k_heads, head_size] => k, _k_guard);
    read!(NAME, "v", v, stream, dtype, &[tokens, v_heads, head_size] => v, _v_guard);
    read!(NAME, "cu_seqlens", cu_seqlens, stream, DType::I64, &[offsets] => cu_seqlens, _cu_seqlens_guard);
    write!(NAME, "workspace", workspace, stream, DType::U8, &[bytes] => workspace, _workspace_guard);
    let per_token = [tokens, heads];
    let (input_state, _input_state_guard) = optional(NAME, "input_state", input_state, stream, &states)?.unzip();
    let (alpha, _alpha_guard) = optional(NAME, "alpha", alpha, stream, &per_token)?.unzip();
    let (beta, _beta_guard) = optional(NAME, "beta", beta, stream, &per_token)?.unzip();
    let args = GdnPrefill { output, output_state, q, k, v, cu_seqlens, input_state, alpha, beta, scale, workspace };
    // SAFETY: a live stream of its context, by cudarc; the context is the buffers' too. The contents of cu_seqlens and
    // the workspace's other uses are the caller's promise.
    unsafe { gdn::gdn_prefill(args, Stream::from_raw(stream.cu_stream().cast())) }
}

fn optional<'a>(
    function: &'static str,
    argument: &'static str,
    buffer: Option<&'a CudaSlice<f32>>,
    stream: &'a CudaStream,
    shape: &[i64],
) -> Result<Option<(TensorRef<'a>, SyncOnDrop<'a>)>> {
    let Some(buffer) = buffer else { return Ok(None) };
    check(function, argument, buffer, stream, shape)?;
    let (pointer, guard) = buffer.device_ptr(stream);
    // SAFETY: as for `read!`.
    let tensor = unsafe { TensorRef::from_raw(pointer as *const c_void, device(stream), DType::F32, shape, None) }?;
    Ok(Some((tensor, guard)))
}
