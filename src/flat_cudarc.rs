//! The flat functions on cudarc's buffers and streams.

use cudarc::driver::{CudaSlice, CudaStream};

use crate::buffers::{DeviceBuffer, DeviceBufferMut, Half16, read, write};
use crate::error::{FlashInferError, Result};
use crate::kernels::gdn::{self, GdnOptions, GdnTensors};
use crate::kernels::norm::{self, NormOptions};
use crate::stream::Stream;
use crate::tensor::{DType, TensorRef};

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
    let input = read(NAME, "input", stream, input, dtype, &[rows, cols], None)?;
    let weight = read(NAME, "weight", stream, weight, dtype, &[cols], None)?;
    let mut out = write(NAME, "out", stream, out, dtype, &[rows, cols], None)?;
    let options = NormOptions::default().with_eps(eps);
    norm::gemma_rmsnorm(&mut out, &input, &weight, &options, Stream::cudarc(stream))
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

/// [Prefill of the gated delta rule](gdn::gdn_prefill) on cudarc's buffers; shapes as in [`GdnTensors`], with
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
    let per_token = [tokens, heads];
    let mut tensors = GdnTensors {
        output: write(NAME, "output", stream, output, dtype, &[tokens, heads, head_size], None)?,
        output_state: write(NAME, "output_state", stream, output_state, DType::F32, &states, None)?,
        q: read(NAME, "q", stream, q, dtype, &[tokens, q_heads, head_size], None)?,
        k: read(NAME, "k", stream, k, dtype, &[tokens, k_heads, head_size], None)?,
        v: read(NAME, "v", stream, v, dtype, &[tokens, v_heads, head_size], None)?,
    };
    let cu_seqlens = read(NAME, "cu_seqlens", stream, cu_seqlens, DType::I64, &[offsets], None)?;
    let mut workspace = write(NAME, "workspace", stream, workspace, DType::U8, &[bytes], None)?;
    let options = GdnOptions {
        input_state: optional("input_state", stream, input_state, &states)?,
        alpha: optional("alpha", stream, alpha, &per_token)?,
        beta: optional("beta", stream, beta, &per_token)?,
        scale: (scale != 0.0).then_some(scale),
    };
    // SAFETY: the contents of cu_seqlens and the workspace's other uses are the caller's promise.
    unsafe { gdn::gdn_prefill(&mut tensors, &cu_seqlens, &mut workspace, &options, Stream::cudarc(stream)) }
}

fn optional<'a>(
    argument: &'static str,
    stream: &'a CudaStream,
    buffer: Option<&'a CudaSlice<f32>>,
    shape: &[i64],
) -> Result<Option<TensorRef<'a>>> {
    buffer.map(|buffer| read("gdn_prefill", argument, stream, buffer, DType::F32, shape, None)).transpose()
}
