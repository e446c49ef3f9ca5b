//! The same functions on host tensors, in f64: what runs where there is no GPU, and what GPU results are compared with.
//!
//! They are TVM-FFI functions like a kernel library's, called through the same [`Function`] and raising the same kinds
//! of errors. Tensors on the host reach them through the ordinary wrappers, [`gemma_rmsnorm`](crate::kernels::norm::gemma_rmsnorm)
//! and [`gdn_prefill`](crate::kernels::gdn::gdn_prefill). Beside F16 and BF16 they take F32, which a result can be compared with
//! before it was rounded.
//!
//! A family is one file of this folder, which the build finds; its file lists its functions.
//!
//! [`Function`]: crate::Function

use std::ffi::{CStr, CString, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::slice;
use std::sync::OnceLock;

use crate::error::Result;
use crate::ffi::abi::{Any, SafeCall, type_index};
use crate::ffi::dlpack::{self, DLTensor};
use crate::module::Module;
use crate::narrow;
use crate::runtime::FlashInferRuntime;
use crate::tensor::DType;

include!(concat!(env!("OUT_DIR"), "/references.rs"));

/// The reference functions as a module, by the names of the kernels that they are for.
///
/// # Errors
/// [`NotInitialized`](crate::FlashInferError::NotInitialized): errors are raised through libtvm_ffi.so.
pub fn module() -> Result<&'static Module> {
    static MODULE: OnceLock<Module> = OnceLock::new();
    let runtime = FlashInferRuntime::global()?;
    Ok(MODULE.get_or_init(|| Module::here("reference", FAMILIES.concat(), runtime.api())))
}

/// What a function raises: TVM-FFI's kind, and the message.
pub(crate) type Raised = (&'static str, String);

/// Declares a function whose body gets its arguments.
macro_rules! function {
    ($name:ident, $body:expr) => {
        unsafe extern "C" fn $name(
            _: *mut std::ffi::c_void,
            args: *const $crate::ffi::abi::Any,
            count: i32,
            result: *mut $crate::ffi::abi::Any,
        ) -> std::ffi::c_int {
            let body: fn(&$crate::reference::Args<'_>) -> std::result::Result<(), $crate::reference::Raised> = $body;
            // SAFETY: TVM-FFI's calling convention, which our caller follows.
            unsafe { $crate::reference::serve(stringify!($name), args, count, result, body) }
        }
    };
}
pub(crate) use function;

/// Runs a function's body under TVM-FFI's convention: an error is raised and answered by -1, and so is a panic.
///
/// # Safety
/// `args` must point to `count` arguments, valid during the call, and `result` to a result.
pub(crate) unsafe fn serve(
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

/// What a function of this process was called with.
pub(crate) struct Args<'a> {
    name: &'static str,
    args: &'a [Any],
}

impl<'a> Args<'a> {
    /// The positions of exactly `N` arguments.
    pub(crate) fn exactly<const N: usize>(&self) -> std::result::Result<[usize; N], Raised> {
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
        let tensor = self.strided(position)?;
        if tensor.device.device_type != dlpack::CPU {
            return Err((
                "ValueError",
                format!("argument #{position} must be on the host, found device type {}", tensor.device.device_type),
            ));
        }
        let Strided { data, dtype, shape, strides, .. } = tensor;
        Ok(HostTensor { position, data, dtype, shape, strides })
    }

    /// A tensor, wherever it is.
    pub(crate) fn strided(&self, position: usize) -> std::result::Result<Strided<'a>, Raised> {
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
        Strided::new(position, tensor)
    }

    fn optional(&self, position: usize) -> std::result::Result<Option<HostTensor<'a>>, Raised> {
        if self.args[position].type_index == type_index::NONE { Ok(None) } else { self.tensor(position).map(Some) }
    }

    pub(crate) fn int(&self, position: usize) -> std::result::Result<i64, Raised> {
        let arg = &self.args[position];
        match arg.type_index {
            // SAFETY: the index says which payload is there.
            type_index::INT | type_index::BOOL => Ok(unsafe { arg.payload.int }),
            _ => Err(self.mismatch(position, "int")),
        }
    }

    pub(crate) fn bool(&self, position: usize) -> std::result::Result<bool, Raised> {
        Ok(self.int(position)? != 0)
    }

    fn word(&self, position: usize) -> std::result::Result<&'a CStr, Raised> {
        let arg = &self.args[position];
        match arg.type_index {
            // SAFETY: the index says that the payload is a C string, which is valid during the call.
            type_index::RAW_STR => Ok(unsafe { CStr::from_ptr(arg.payload.c_str) }),
            _ => Err(self.mismatch(position, "str")),
        }
    }

    pub(crate) fn float(&self, position: usize) -> std::result::Result<f64, Raised> {
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

/// An 8-bit floating-point format: mantissa bits, exponent bias, and the largest number.
#[derive(Clone, Copy)]
struct EightBit {
    mantissa: i32,
    bias: i32,
    largest: f64,
}

const E4M3: EightBit = EightBit { mantissa: 3, bias: 7, largest: 448.0 };
const E5M2: EightBit = EightBit { mantissa: 2, bias: 15, largest: 57_344.0 };

/// Rounds to the nearest number of F8E5M2 or F8E4M3, ties to even; to the largest, where that is exceeded.
pub(crate) fn eight_bit(value: f64, dtype: DType) -> u8 {
    let format = if dtype == DType::F8E5M2 { E5M2 } else { E4M3 };
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    if value.is_nan() {
        return sign | 0x7F;
    }
    let magnitude = value.abs().min(format.largest);
    // Below the smallest normal exponent the steps stay as they are there.
    let exponent = (magnitude.log2().floor() as i32).max(1 - format.bias);
    let step = f64::from(exponent - format.mantissa).exp2();
    let steps = (magnitude / step).round_ties_even() as i32;
    // `steps` has the implicit bit above the mantissa; what rounding carries over raises the exponent by itself.
    let bits = ((exponent + format.bias - 1) << format.mantissa) + steps;
    sign | bits as u8
}

/// The value of an 8-bit floating-point number. Neither a norm nor a cache writes NaN or infinity, which are not told apart.
fn of_eight_bits(bits: u8, format: EightBit) -> f64 {
    let sign = if bits & 0x80 == 0 { 1.0 } else { -1.0 };
    let exponent = i32::from(bits & 0x7F) >> format.mantissa;
    let fraction = f64::from(bits & ((1 << format.mantissa) - 1)) * f64::from(-format.mantissa).exp2();
    match exponent {
        0 => sign * fraction * f64::from(1 - format.bias).exp2(),
        _ => sign * (1.0 + fraction) * f64::from(exponent - format.bias).exp2(),
    }
}

/// Where a tensor's elements are.
#[derive(Clone, Copy)]
pub(crate) struct Strided<'a> {
    pub(crate) data: *mut c_void,
    #[cfg_attr(not(feature = "compute"), allow(dead_code, reason = "which GPU, only kernels of this crate ask"))]
    pub(crate) device: dlpack::DLDevice,
    pub(crate) dtype: DType,
    pub(crate) shape: &'a [i64],
    pub(crate) strides: &'a [i64],
}

/// A tensor whose elements can be read and written as f64.
struct HostTensor<'a> {
    position: usize,
    data: *mut c_void,
    dtype: DType,
    shape: &'a [i64],
    strides: &'a [i64],
}

impl<'a> Strided<'a> {
    fn new(position: usize, tensor: &'a DLTensor) -> std::result::Result<Self, Raised> {
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
        Ok(Self { data: tensor.data, device: tensor.device, dtype, shape, strides })
    }
}

impl HostTensor<'_> {
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

    /// A floating-point number of the tensor's.
    fn at(&self, index: &[usize]) -> std::result::Result<f64, Raised> {
        match self.dtype {
            DType::F16 | DType::BF16 | DType::F32 => self.number(index),
            other => Err(self.not_a_float(other)),
        }
    }

    /// A number of the tensor's, of any type.
    fn number(&self, index: &[usize]) -> std::result::Result<f64, Raised> {
        let offset = self.offset(index)?;
        // SAFETY: the element is inside the tensor, whose memory and element type its maker vouched for; reads do not
        // rely on alignment.
        unsafe {
            match self.dtype {
                DType::F16 => Ok(narrow::from_f16(self.data.cast::<u16>().offset(offset).read_unaligned())),
                DType::BF16 => Ok(narrow::from_bf16(self.data.cast::<u16>().offset(offset).read_unaligned())),
                DType::F32 => Ok(self.data.cast::<f32>().offset(offset).read_unaligned().into()),
                DType::F64 => Ok(self.data.cast::<f64>().offset(offset).read_unaligned()),
                DType::U8 => Ok(self.data.cast::<u8>().offset(offset).read().into()),
                DType::I32 => Ok(self.data.cast::<i32>().offset(offset).read_unaligned().into()),
                DType::I64 => Ok(self.data.cast::<i64>().offset(offset).read_unaligned() as f64),
                DType::F8E4M3 => Ok(of_eight_bits(self.data.cast::<u8>().offset(offset).read(), E4M3)),
                DType::F8E5M2 => Ok(of_eight_bits(self.data.cast::<u8>().offset(offset).read(), E5M2)),
            }
        }
    }

    /// A whole number of the tensor's that is within these bounds, the upper one excluded.
    fn index(&self, index: &[usize], below: usize) -> std::result::Result<usize, Raised> {
        let number = match self.dtype {
            DType::I32 | DType::I64 => self.number(index)?,
            other => {
                return Err(("TypeError", format!("argument #{} holds {other}, expected I32 or I64", self.position)));
            }
        };
        if number >= 0.0 && number < below as f64 {
            return Ok(number as usize);
        }
        let position = self.position;
        Err(("IndexError", format!("argument #{position} has {number} at {index:?}, expected an index below {below}")))
    }

    /// The address of an element's bytes, which may be of any type.
    fn bytes(&self, index: &[usize]) -> std::result::Result<*mut u8, Raised> {
        let offset = self.offset(index)?;
        Ok(self.data.cast::<u8>().wrapping_offset(offset * self.dtype.size() as isize))
    }

    /// Copies an element of another tensor of the same type, bit for bit.
    fn copy(&self, to: &[usize], from: &HostTensor<'_>, index: &[usize]) -> std::result::Result<(), Raised> {
        if self.dtype != from.dtype {
            let (position, found, expected) = (from.position, from.dtype, self.dtype);
            return Err(("TypeError", format!("argument #{position} holds {found}, expected {expected}")));
        }
        let (to, from) = (self.bytes(to)?, from.bytes(index)?);
        // SAFETY: both are inside their tensors, whose memory and element type their makers vouched for.
        unsafe { std::ptr::copy(from, to, self.dtype.size()) };
        Ok(())
    }

    fn set(&self, index: &[usize], value: f64) -> std::result::Result<(), Raised> {
        let offset = self.offset(index)?;
        // SAFETY: as for `at`; that the tensor may be written is its maker's word too.
        unsafe {
            match self.dtype {
                DType::F16 => self.data.cast::<u16>().offset(offset).write_unaligned(narrow::to_f16(value)),
                DType::BF16 => self.data.cast::<u16>().offset(offset).write_unaligned(narrow::to_bf16(value)),
                DType::F32 => self.data.cast::<f32>().offset(offset).write_unaligned(value as f32),
                DType::U8 => self.data.cast::<u8>().offset(offset).write(value as u8),
                DType::I32 => self.data.cast::<i32>().offset(offset).write_unaligned(value as i32),
                DType::I64 => self.data.cast::<i64>().offset(offset).write_unaligned(value as i64),
                DType::F8E4M3 => self.data.cast::<u8>().offset(offset).write(eight_bit(value, self.dtype)),
                DType::F8E5M2 => self.data.cast::<u8>().offset(offset).write(eight_bit(value, self.dtype)),
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

    /// Writes floating-point numbers to all that lies below a leading index, row-major.
    fn write(&self, index: &[usize], values: &[f64]) -> std::result::Result<(), Raised> {
        if matches!(self.dtype, DType::U8 | DType::I32 | DType::I64) {
            return Err(self.not_a_float(self.dtype));
        }
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
