//! The same functions on host tensors, in f64: what runs where there is no GPU, and what GPU results are compared with.
//!
//! They are TVM-FFI functions like a kernel library's, called through the same [`Function`] and raising the same kinds
//! of errors. Tensors on the host reach them through the ordinary wrappers, [`gemma_rmsnorm`](super::norm::gemma_rmsnorm)
//! and [`gdn_prefill`](super::gdn::gdn_prefill). Beside F16 and BF16 they take F32, which a result can be compared with
//! before it was rounded.
//!
//! [`Function`]: crate::Function

use std::ffi::{CString, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::slice;
use std::sync::OnceLock;

use half::{bf16, f16};

use crate::error::Result;
use crate::ffi::abi::{Any, SafeCall, type_index};
use crate::ffi::dlpack::{self, DLTensor};
use crate::module::Module;
use crate::runtime::FlashInferRuntime;
use crate::tensor::DType;

static FUNCTIONS: &[(&str, SafeCall)] = &[
    ("rmsnorm", rmsnorm),
    ("gemma_rmsnorm", gemma_rmsnorm),
    ("fused_add_rmsnorm", fused_add_rmsnorm),
    ("gemma_fused_add_rmsnorm", gemma_fused_add_rmsnorm),
    ("rmsnorm_quant", rmsnorm_quant),
    ("fused_add_rmsnorm_quant", fused_add_rmsnorm_quant),
    ("layernorm", layernorm),
    ("gdn_prefill", gdn_prefill),
];

/// The reference functions as a module, by the names of the kernels that they are for.
///
/// # Errors
/// [`NotInitialized`](crate::FlashInferError::NotInitialized): errors are raised through libtvm_ffi.so.
pub fn module() -> Result<&'static Module> {
    static MODULE: OnceLock<Module> = OnceLock::new();
    let runtime = FlashInferRuntime::global()?;
    Ok(MODULE.get_or_init(|| Module::here("reference", FUNCTIONS, runtime.api())))
}

/// What a function raises: TVM-FFI's kind, and the message.
type Raised = (&'static str, String);

/// Declares a function whose body gets its arguments.
macro_rules! function {
    ($name:ident, $body:expr) => {
        unsafe extern "C" fn $name(_: *mut c_void, args: *const Any, count: i32, result: *mut Any) -> c_int {
            // SAFETY: TVM-FFI's calling convention, which our caller follows.
            unsafe { serve(stringify!($name), args, count, result, $body) }
        }
    };
}

function!(rmsnorm, |args| {
    let [out, input, weight, eps, _pdl] = args.exactly()?;
    let (out, input) = (args.tensor(out)?, args.tensor(input)?);
    norm(&out, &input, &args.tensor(weight)?, 0.0, 1.0, args.float(eps)?)
});

function!(gemma_rmsnorm, |args| {
    let [out, input, weight, eps, _pdl] = args.exactly()?;
    let (out, input) = (args.tensor(out)?, args.tensor(input)?);
    if input.shape.len() != 2 {
        let fault = format!("argument #{} has shape {:?}, expected two dimensions", input.position, input.shape);
        return Err(("ValueError", fault));
    }
    norm(&out, &input, &args.tensor(weight)?, 1.0, 1.0, args.float(eps)?)
});

function!(fused_add_rmsnorm, |args| fused_in_place(args, 0.0));
function!(gemma_fused_add_rmsnorm, |args| fused_in_place(args, 1.0));

function!(rmsnorm_quant, |args| {
    let [out, input, weight, scale, eps, _pdl] = args.exactly()?;
    let (out, input, weight) = (args.tensor(out)?, args.tensor(input)?, args.tensor(weight)?);
    norm(&out, &input, &weight, 0.0, 1.0 / args.float(scale)?, args.float(eps)?)
});

function!(fused_add_rmsnorm_quant, |args| {
    let [out, input, residual, weight, scale, eps, _pdl] = args.exactly()?;
    let (input, residual) = (args.tensor(input)?, args.tensor(residual)?);
    fused(&args.tensor(out)?, &input, &residual, &args.tensor(weight)?, 0.0, 1.0 / args.float(scale)?, args.float(eps)?)
});

function!(layernorm, |args| {
    let [out, input, gamma, beta, eps] = args.exactly()?;
    let (out, input) = (args.tensor(out)?, args.tensor(input)?);
    let (gamma, beta, eps) = (args.tensor(gamma)?, args.tensor(beta)?, args.float(eps)?);
    let (rows, columns) = (input.size(0)?, input.size(1)?);
    for (tensor, shape) in
        [(&out, &[rows, columns][..]), (&input, &[rows, columns]), (&gamma, &[columns]), (&beta, &[columns])]
    {
        tensor.expect_shape(shape)?;
    }
    let (mut weights, mut shifts, mut row) = (vec![0.0; columns], vec![0.0; columns], vec![0.0; columns]);
    gamma.read(&[], &mut weights)?;
    beta.read(&[], &mut shifts)?;
    for i in 0..rows {
        input.read(&[i], &mut row)?;
        let mean = row.iter().sum::<f64>() / columns as f64;
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / columns as f64;
        let factor = 1.0 / (variance + eps).sqrt();
        for ((x, weight), shift) in row.iter_mut().zip(&weights).zip(&shifts) {
            *x = (*x - mean) * factor * weight + shift;
        }
        out.write(&[i], &row)?;
    }
    Ok(())
});

fn fused_in_place(args: &Args<'_>, bias: f64) -> std::result::Result<(), Raised> {
    let [input, residual, weight, eps, _pdl] = args.exactly()?;
    let (input, residual) = (args.tensor(input)?, args.tensor(residual)?);
    fused(&input, &input, &residual, &args.tensor(weight)?, bias, 1.0, args.float(eps)?)
}

/// `out ← scale · input / √(mean(input²) + eps) · (bias + weight)` along the last dimension of two or three.
fn norm(
    out: &HostTensor<'_>,
    input: &HostTensor<'_>,
    weight: &HostTensor<'_>,
    bias: f64,
    scale: f64,
    eps: f64,
) -> std::result::Result<(), Raised> {
    let shape = (0..input.shape.len()).map(|i| input.size(i)).collect::<std::result::Result<Vec<_>, _>>()?;
    let Some((&columns, leading)) = shape.split_last().filter(|(_, leading)| (1..=2).contains(&leading.len())) else {
        return Err((
            "ValueError",
            format!("argument #{} has shape {:?}, expected two or three dimensions", input.position, input.shape),
        ));
    };
    out.expect_shape(&shape)?;
    weight.expect_shape(&[columns])?;
    let mut weights = vec![0.0; columns];
    weight.read(&[], &mut weights)?;
    let mut row = vec![0.0; columns];
    for index in indices(leading) {
        input.read(&index, &mut row)?;
        norm_row(&mut row, &weights, bias, scale, eps);
        out.write(&index, &row)?;
    }
    Ok(())
}

/// `residual ← input + residual`, and the norm of the sum, before it is rounded, to `out`.
fn fused(
    out: &HostTensor<'_>,
    input: &HostTensor<'_>,
    residual: &HostTensor<'_>,
    weight: &HostTensor<'_>,
    bias: f64,
    scale: f64,
    eps: f64,
) -> std::result::Result<(), Raised> {
    let (rows, columns) = (input.size(0)?, input.size(1)?);
    for tensor in [out, input, residual] {
        tensor.expect_shape(&[rows, columns])?;
    }
    weight.expect_shape(&[columns])?;
    let mut weights = vec![0.0; columns];
    weight.read(&[], &mut weights)?;
    let (mut sum, mut addend) = (vec![0.0; columns], vec![0.0; columns]);
    for row in 0..rows {
        input.read(&[row], &mut sum)?;
        residual.read(&[row], &mut addend)?;
        sum.iter_mut().zip(&addend).for_each(|(sum, addend)| *sum += addend);
        residual.write(&[row], &sum)?;
        norm_row(&mut sum, &weights, bias, scale, eps);
        out.write(&[row], &sum)?;
    }
    Ok(())
}

fn norm_row(row: &mut [f64], weight: &[f64], bias: f64, scale: f64, eps: f64) {
    let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
    let factor = scale / (mean + eps).sqrt();
    row.iter_mut().zip(weight).for_each(|(x, w)| *x *= factor * (bias + w));
}

/// Every index of one or two leading dimensions.
fn indices(leading: &[usize]) -> impl Iterator<Item = Vec<usize>> + use<> {
    let (first, second) = (leading[0], leading.get(1).copied());
    (0..first).flat_map(move |i| {
        let heads = second.map_or(1, |heads| heads);
        (0..heads).map(move |j| if second.is_some() { vec![i, j] } else { vec![i] })
    })
}

unsafe extern "C" fn gdn_prefill(_: *mut c_void, args: *const Any, count: i32, result: *mut Any) -> c_int {
    // SAFETY: TVM-FFI's calling convention, which our caller follows.
    unsafe {
        serve("gdn_prefill", args, count, result, |args| {
            let [output, output_state, q, k, v, cu_seqlens, input_state, alpha, beta, scale, _workspace] =
                args.exactly()?;
            let (output, output_state) = (args.tensor(output)?, args.tensor(output_state)?);
            let (q, k, v, cu_seqlens) = (args.tensor(q)?, args.tensor(k)?, args.tensor(v)?, args.tensor(cu_seqlens)?);
            let (input_state, alpha, beta) = (args.optional(input_state)?, args.optional(alpha)?, args.optional(beta)?);
            let scale = args.float(scale)?;
            let (tokens, size) = (q.size(0)?, q.size(2)?);
            let (q_heads, k_heads, v_heads) = (q.size(1)?, k.size(1)?, v.size(1)?);
            let heads = q_heads.max(v_heads);
            let sequences = cu_seqlens.size(0)?.saturating_sub(1);
            q.expect_shape(&[tokens, q_heads, size])?;
            k.expect_shape(&[tokens, k_heads, size])?;
            v.expect_shape(&[tokens, v_heads, size])?;
            output.expect_shape(&[tokens, heads, size])?;
            output_state.expect_shape(&[sequences, heads, size, size])?;
            for (tensor, shape) in [
                (&input_state, &[sequences, heads, size, size][..]),
                (&alpha, &[tokens, heads]),
                (&beta, &[tokens, heads]),
            ] {
                tensor.as_ref().map_or(Ok(()), |tensor| tensor.expect_shape(shape))?;
            }
            let unshared = |own: usize| own == 0 || heads % own != 0;
            if [q_heads, k_heads, v_heads].into_iter().any(unshared) || q_heads % k_heads != 0 || v_heads % k_heads != 0
            {
                return Err((
                    "ValueError",
                    format!("{q_heads} query, {k_heads} key and {v_heads} value heads do not group"),
                ));
            }
            if size == 0 {
                return Err(("ValueError", "the head size is 0, expected at least 1".to_owned()));
            }
            let scale = if scale == 0.0 { 1.0 / (size as f64).sqrt() } else { scale };
            let offsets = cu_seqlens.offsets(tokens)?;
            for (sequence, span) in offsets.windows(2).enumerate() {
                for head in 0..heads {
                    let (q_head, k_head, v_head) =
                        (head * q_heads / heads, head * k_heads / heads, head * v_heads / heads);
                    let mut state = vec![0.0; size * size];
                    if let Some(input_state) = &input_state {
                        input_state.read(&[sequence, head], &mut state)?;
                    }
                    let (mut query, mut key, mut value) = (vec![0.0; size], vec![0.0; size], vec![0.0; size]);
                    for token in span[0]..span[1] {
                        q.read(&[token, q_head], &mut query)?;
                        k.read(&[token, k_head], &mut key)?;
                        v.read(&[token, v_head], &mut value)?;
                        let decay = alpha.as_ref().map_or(Ok(1.0), |alpha| alpha.at(&[token, head]))?;
                        let rate = beta.as_ref().map_or(Ok(1.0), |beta| beta.at(&[token, head]))?;
                        for (i, row) in state.chunks_exact_mut(size).enumerate() {
                            row.iter_mut().for_each(|s| *s *= decay);
                            let correction = rate * (value[i] - dot(row, &key));
                            row.iter_mut().zip(&key).for_each(|(s, k)| *s += correction * k);
                            output.set(&[token, head, i], scale * dot(row, &query))?;
                        }
                    }
                    output_state.write(&[sequence, head], &state)?;
                }
            }
            Ok(())
        })
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Runs a function's body under TVM-FFI's convention: an error is raised and answered by -1, and so is a panic.
///
/// # Safety
/// `args` must point to `count` arguments, valid during the call, and `result` to a result.
unsafe fn serve(
    name: &'static str,
    args: *const Any,
    count: i32,
    result: *mut Any,
    body: impl FnOnce(&Args<'_>) -> std::result::Result<(), Raised>,
) -> c_int {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let args = match usize::try_from(count) {
            // SAFETY: the caller's promise.
            Ok(count) if count > 0 => unsafe { slice::from_raw_parts(args, count) },
            _ => &[],
        };
        body(&Args { name, args })
    }));
    let (kind, message) = match outcome {
        Ok(Ok(())) => {
            // SAFETY: the caller's promise.
            unsafe { *result = Any::NONE };
            return 0;
        }
        Ok(Err(raised)) => raised,
        Err(_) => ("InternalError", format!("{name} panicked")),
    };
    if let Ok(runtime) = FlashInferRuntime::global() {
        // A zero byte cannot occur in these messages; without one nothing is lost here.
        runtime.raise(&CString::new(kind).unwrap_or_default(), &CString::new(message).unwrap_or_default());
    }
    -1
}

struct Args<'a> {
    name: &'static str,
    args: &'a [Any],
}

impl<'a> Args<'a> {
    /// The positions of exactly `N` arguments.
    fn exactly<const N: usize>(&self) -> std::result::Result<[usize; N], Raised> {
        if self.args.len() == N {
            return Ok(std::array::from_fn(|i| i));
        }
        let found = self.args.len();
        Err((
            "TypeError",
            format!("Mismatched number of arguments when calling {}: expected {N}, found {found}", self.name),
        ))
    }

    fn mismatch(&self, position: usize, expected: &str) -> Raised {
        let found = self.args[position].type_index;
        let name = self.name;
        (
            "TypeError",
            format!(
                "Mismatched type on argument #{position} when calling {name}: expected {expected}, found type index {found}"
            ),
        )
    }

    fn tensor(&self, position: usize) -> std::result::Result<HostTensor<'a>, Raised> {
        let arg = &self.args[position];
        // SAFETY: each index says which payload is there: a pointer to a tensor, or an object with one right behind its
        // header. Both are valid during the call.
        let tensor = unsafe {
            match arg.type_index {
                type_index::DL_TENSOR_PTR => &*arg.payload.tensor,
                type_index::TENSOR => &*arg.payload.object.add(1).cast::<DLTensor>(),
                _ => return Err(self.mismatch(position, "DLTensor*")),
            }
        };
        HostTensor::new(position, tensor)
    }

    fn optional(&self, position: usize) -> std::result::Result<Option<HostTensor<'a>>, Raised> {
        if self.args[position].type_index == type_index::NONE { Ok(None) } else { self.tensor(position).map(Some) }
    }

    fn float(&self, position: usize) -> std::result::Result<f64, Raised> {
        let arg = &self.args[position];
        // SAFETY: each index says which payload is there.
        unsafe {
            match arg.type_index {
                type_index::FLOAT => Ok(arg.payload.float),
                type_index::INT | type_index::BOOL => Ok(arg.payload.int as f64),
                _ => Err(self.mismatch(position, "float")),
            }
        }
    }
}

/// An 8-bit floating-point format: mantissa bits, exponent bias, and the largest value that a norm writes. Upstream clamps
/// to ±448 for both formats.
#[derive(Clone, Copy)]
struct EightBit {
    mantissa: i32,
    bias: i32,
}

const E4M3: EightBit = EightBit { mantissa: 3, bias: 7 };
const E5M2: EightBit = EightBit { mantissa: 2, bias: 15 };

/// Rounds to the nearest value of the format, ties to even, after clamping to ±448.
fn eight_bit(value: f64, format: EightBit) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    if value.is_nan() {
        return sign | 0x7F;
    }
    let magnitude = value.abs().min(448.0);
    // Below the smallest normal exponent the steps stay as they are there.
    let exponent = (magnitude.log2().floor() as i32).max(1 - format.bias);
    let step = f64::from(exponent - format.mantissa).exp2();
    let steps = (magnitude / step).round_ties_even() as i32;
    // `steps` has the implicit bit above the mantissa; what rounding carries over raises the exponent by itself.
    let bits = ((exponent + format.bias - 1) << format.mantissa) + steps;
    sign | bits as u8
}

/// A tensor whose elements can be read and written as f64.
struct HostTensor<'a> {
    position: usize,
    data: *mut c_void,
    dtype: DType,
    shape: &'a [i64],
    strides: &'a [i64],
}

impl<'a> HostTensor<'a> {
    fn new(position: usize, tensor: &'a DLTensor) -> std::result::Result<Self, Raised> {
        if tensor.device.device_type != dlpack::CPU {
            return Err((
                "ValueError",
                format!("argument #{position} must be on the host, found device type {}", tensor.device.device_type),
            ));
        }
        let Some(dtype) = DType::from_dl(tensor.dtype) else {
            return Err((
                "TypeError",
                format!("argument #{position} has an element type that is not supported: {:?}", tensor.dtype),
            ));
        };
        let dimensions = |pointer: *const i64| -> &'a [i64] {
            match usize::try_from(tensor.ndim) {
                // SAFETY: a tensor has `ndim` sizes and strides, valid as long as it is.
                Ok(ndim) if ndim > 0 && !pointer.is_null() => unsafe { slice::from_raw_parts(pointer, ndim) },
                _ => &[],
            }
        };
        let (shape, strides) = (dimensions(tensor.shape), dimensions(tensor.strides));
        if shape.len() != strides.len() {
            return Err(("ValueError", format!("argument #{position} has no strides")));
        }
        Ok(Self { position, data: tensor.data, dtype, shape, strides })
    }

    fn size(&self, dimension: usize) -> std::result::Result<usize, Raised> {
        let size = self.shape.get(dimension).and_then(|&size| usize::try_from(size).ok());
        size.ok_or_else(|| {
            ("ValueError", format!("argument #{} has shape {:?}, expected more dimensions", self.position, self.shape))
        })
    }

    fn expect_shape(&self, expected: &[usize]) -> std::result::Result<(), Raised> {
        if self.shape.iter().map(|&n| n as usize).eq(expected.iter().copied()) {
            return Ok(());
        }
        Err(("ValueError", format!("argument #{} has shape {:?}, expected {expected:?}", self.position, self.shape)))
    }

    /// The offset of an element in elements, once its index is known to be inside.
    fn offset(&self, index: &[usize]) -> std::result::Result<isize, Raised> {
        let inside = index.len() == self.shape.len() && index.iter().zip(self.shape).all(|(&i, &n)| (i as i64) < n);
        if !inside {
            return Err((
                "IndexError",
                format!("argument #{} has shape {:?}, no element {index:?}", self.position, self.shape),
            ));
        }
        Ok(index.iter().zip(self.strides).map(|(&i, &stride)| i as isize * stride as isize).sum())
    }

    fn at(&self, index: &[usize]) -> std::result::Result<f64, Raised> {
        let offset = self.offset(index)?;
        // SAFETY: the element is inside the tensor, whose memory and element type its maker vouched for; reads do not
        // rely on alignment.
        unsafe {
            match self.dtype {
                DType::F16 => Ok(self.data.cast::<f16>().offset(offset).read_unaligned().to_f64()),
                DType::BF16 => Ok(self.data.cast::<bf16>().offset(offset).read_unaligned().to_f64()),
                DType::F32 => Ok(self.data.cast::<f32>().offset(offset).read_unaligned().into()),
                other => Err(self.not_a_float(other)),
            }
        }
    }

    fn set(&self, index: &[usize], value: f64) -> std::result::Result<(), Raised> {
        let offset = self.offset(index)?;
        // SAFETY: as for `at`; that the tensor may be written is its maker's word too.
        unsafe {
            match self.dtype {
                DType::F16 => self.data.cast::<f16>().offset(offset).write_unaligned(f16::from_f64(value)),
                DType::BF16 => self.data.cast::<bf16>().offset(offset).write_unaligned(bf16::from_f64(value)),
                DType::F32 => self.data.cast::<f32>().offset(offset).write_unaligned(value as f32),
                DType::F8E4M3 => self.data.cast::<u8>().offset(offset).write(eight_bit(value, E4M3)),
                DType::F8E5M2 => self.data.cast::<u8>().offset(offset).write(eight_bit(value, E5M2)),
                other => return Err(self.not_a_float(other)),
            }
        }
        Ok(())
    }

    fn not_a_float(&self, found: DType) -> Raised {
        ("TypeError", format!("argument #{} holds {found}, expected F16, BF16 or F32", self.position))
    }

    /// Reads all that lies below a leading index, row-major.
    fn read(&self, index: &[usize], values: &mut [f64]) -> std::result::Result<(), Raised> {
        self.below(index, values.len(), |index, i| self.at(index).map(|value| values[i] = value))
    }

    fn write(&self, index: &[usize], values: &[f64]) -> std::result::Result<(), Raised> {
        self.below(index, values.len(), |index, i| self.set(index, values[i]))
    }

    fn below(
        &self,
        leading: &[usize],
        count: usize,
        mut visit: impl FnMut(&[usize], usize) -> std::result::Result<(), Raised>,
    ) -> std::result::Result<(), Raised> {
        let mut index = vec![0; self.shape.len()];
        index[..leading.len()].copy_from_slice(leading);
        for i in 0..count {
            visit(&index, i)?;
            for dimension in (leading.len()..index.len()).rev() {
                index[dimension] += 1;
                if (index[dimension] as i64) < self.shape[dimension] {
                    break;
                }
                index[dimension] = 0;
            }
        }
        Ok(())
    }

    /// The contents of `cu_seqlens`, checked.
    fn offsets(&self, tokens: usize) -> std::result::Result<Vec<usize>, Raised> {
        if self.dtype != DType::I64 {
            return Err(("TypeError", format!("argument #{} holds {}, expected I64", self.position, self.dtype)));
        }
        let mut offsets = Vec::with_capacity(self.size(0)?);
        for i in 0..self.size(0)? {
            let offset = self.offset(&[i])?;
            // SAFETY: the element is inside the tensor, whose memory and element type its maker vouched for.
            let value = unsafe { self.data.cast::<i64>().offset(offset).read_unaligned() };
            offsets.push(
                usize::try_from(value)
                    .map_err(|_| ("ValueError", format!("cu_seqlens[{i}] is {value}, expected no negative number")))?,
            );
        }
        let increasing = offsets.windows(2).all(|pair| pair[0] <= pair[1]);
        if !increasing || offsets.first() != Some(&0) || offsets.last() != Some(&tokens) {
            return Err((
                "ValueError",
                format!("cu_seqlens is {offsets:?}, expected offsets from 0 to {tokens} that do not decrease"),
            ));
        }
        Ok(offsets)
    }
}
