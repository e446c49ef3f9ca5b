//! Owned tensors on the host, of every element type that the dataset has.

use std::fmt;

use super::dtype::DataType;
use super::error::unfit;
use crate::error::Result;
use crate::narrow;
use crate::tensor::{DType, Device, TensorMut, TensorRef};
#[cfg(feature = "bench")]
use crate::{object::Tensor, tensor::is_row_major};

/// 64 bytes, aligned as frameworks align a tensor's memory: kernels read vectors of it.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([u8; 64]);

const _: () = assert!(size_of::<Line>() == 64);

/// A contiguous, row-major tensor in host memory, aligned to 64 bytes.
#[derive(Clone)]
pub struct HostTensor {
    dtype: DataType,
    shape: Vec<u64>,
    memory: Vec<Line>,
    /// How many bytes of the memory are elements.
    len: usize,
    numel: usize,
}

impl fmt::Debug for HostTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?}", self.dtype, self.shape)
    }
}

impl PartialEq for HostTensor {
    /// Whether type, shape and bytes are alike.
    fn eq(&self, other: &Self) -> bool {
        self.dtype == other.dtype && self.shape == other.shape && self.bytes() == other.bytes()
    }
}

/// How many elements and bytes a tensor has; `None` where that does not fit memory, or the type is not known.
pub(crate) fn extent(dtype: &DataType, shape: &[u64]) -> Option<(usize, usize)> {
    let numel = shape.iter().try_fold(1u64, |product, &size| product.checked_mul(size))?;
    let numel = usize::try_from(numel).ok()?;
    let bytes = numel.checked_mul(dtype.size()?)?;
    (bytes <= isize::MAX as usize - size_of::<Line>()).then_some((numel, bytes))
}

impl HostTensor {
    /// A tensor of zeros.
    ///
    /// # Errors
    /// [`Data`](crate::FlashInferError::Data) for a type that is not known, and for more memory than there is.
    pub fn zeros(dtype: DataType, shape: &[u64]) -> Result<Self> {
        const REMEDY: &str = "use a type that is known, and sizes that fit this machine's memory";
        let refuse = || {
            let found = format!("{dtype}{shape:?}");
            unfit("a tensor", "its size", found, "one that fits memory, of a known type", REMEDY)
        };
        let (numel, len) = extent(&dtype, shape).ok_or_else(refuse)?;
        let lines = len.div_ceil(size_of::<Line>());
        let mut memory = Vec::new();
        memory.try_reserve_exact(lines).map_err(|_| refuse())?;
        memory.resize(lines, Line([0; 64]));
        Ok(Self { dtype, shape: shape.to_vec(), memory, len, numel })
    }

    /// A tensor of these bytes, as they lie in memory.
    ///
    /// # Errors
    /// As for [`zeros`](Self::zeros), and for another number of bytes than the shape has.
    pub fn from_bytes(dtype: DataType, shape: &[u64], bytes: &[u8]) -> Result<Self> {
        let mut tensor = Self::zeros(dtype, shape)?;
        if bytes.len() != tensor.len {
            let (found, expected) = (format!("{} bytes", bytes.len()), format!("{} for {tensor:?}", tensor.len));
            return Err(unfit("a tensor", "its bytes", found, expected, "give as many bytes as the shape has"));
        }
        tensor.bytes_mut().copy_from_slice(bytes);
        Ok(tensor)
    }

    /// A tensor of these numbers, each rounded to the nearest of the type: as [`set`](Self::set) does it.
    ///
    /// # Errors
    /// As for [`from_bytes`](Self::from_bytes).
    pub fn from_f64(dtype: DataType, shape: &[u64], values: &[f64]) -> Result<Self> {
        let mut tensor = Self::zeros(dtype, shape)?;
        if values.len() != tensor.slots() {
            let (found, expected) = (format!("{} numbers", values.len()), format!("{}", tensor.slots()));
            return Err(unfit("a tensor", "its elements", found, expected, "give as many as the shape has"));
        }
        values.iter().enumerate().for_each(|(i, &value)| tensor.set(i, value));
        Ok(tensor)
    }

    /// The element type.
    pub fn dtype(&self) -> &DataType {
        &self.dtype
    }

    /// The sizes. Those of `float4_e2m1` count bytes, of two elements each.
    pub fn shape(&self) -> &[u64] {
        &self.shape
    }

    /// How many elements the shape counts.
    pub fn numel(&self) -> usize {
        self.numel
    }

    /// How many numbers there are: two in each byte of `float4_e2m1`.
    pub fn slots(&self) -> usize {
        if self.dtype == DataType::Float4E2m1 { 2 * self.numel } else { self.numel }
    }

    /// The elements as they lie in memory.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the lines are initialized bytes, one after the other, and `zeros` made at least `len` of them.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr().cast(), self.len) }
    }

    /// As [`bytes`](Self::bytes), to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `bytes`; the tensor is borrowed exclusively, and any byte is fine in a line.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_mut_ptr().cast(), self.len) }
    }

    fn element<const SIZE: usize>(&self, i: usize) -> [u8; SIZE] {
        let mut element = [0; SIZE];
        element.copy_from_slice(&self.bytes()[i * SIZE..(i + 1) * SIZE]);
        element
    }

    fn put<const SIZE: usize>(&mut self, i: usize, element: [u8; SIZE]) {
        self.bytes_mut()[i * SIZE..(i + 1) * SIZE].copy_from_slice(&element);
    }

    /// An element of a type of whole numbers, or of booleans.
    ///
    /// # Panics
    /// Where there is no element `i`.
    pub fn int(&self, i: usize) -> Option<i128> {
        Some(match self.dtype {
            DataType::Int64 => i64::from_ne_bytes(self.element(i)).into(),
            DataType::Int32 => i32::from_ne_bytes(self.element(i)).into(),
            DataType::Int16 => i16::from_ne_bytes(self.element(i)).into(),
            DataType::Int8 => i8::from_ne_bytes(self.element(i)).into(),
            DataType::Uint64 => u64::from_ne_bytes(self.element(i)).into(),
            DataType::Uint32 => u32::from_ne_bytes(self.element(i)).into(),
            DataType::Uint16 => u16::from_ne_bytes(self.element(i)).into(),
            DataType::Uint8 => self.bytes()[i].into(),
            DataType::Bool => i128::from(self.bytes()[i] != 0),
            _ => return None,
        })
    }

    /// An element in single precision, in which upstream compares.
    ///
    /// # Panics
    /// Where there is no slot `i`.
    pub fn float(&self, i: usize) -> f32 {
        match self.dtype {
            DataType::Float64 => f64::from_ne_bytes(self.element(i)) as f32,
            DataType::Float32 => f32::from_ne_bytes(self.element(i)),
            DataType::Float16 => narrow::from_f16(u16::from_ne_bytes(self.element(i))) as f32,
            DataType::Bfloat16 => narrow::from_bf16(u16::from_ne_bytes(self.element(i))) as f32,
            DataType::Float8E4m3fn => E4M3.value(self.bytes()[i]),
            DataType::Float8E5m2 => E5M2.value(self.bytes()[i]),
            DataType::Float4E2m1 => E2M1.value(self.bytes()[i / 2] >> (4 * (i % 2)) & 0xF),
            _ => self.int(i).map_or(f32::NAN, |number| number as f32),
        }
    }

    /// Sets an element to the nearest value that its type has, ties to even; what is beyond a type of whole numbers becomes
    /// its largest or smallest.
    ///
    /// # Panics
    /// Where there is no slot `i`.
    pub fn set(&mut self, i: usize, value: f64) {
        match self.dtype {
            DataType::Float64 => self.put(i, value.to_ne_bytes()),
            DataType::Float32 => self.put(i, (value as f32).to_ne_bytes()),
            DataType::Float16 => self.put(i, narrow::to_f16(value).to_ne_bytes()),
            DataType::Bfloat16 => self.put(i, narrow::to_bf16(value).to_ne_bytes()),
            DataType::Float8E4m3fn => self.put(i, [E4M3.code(value)]),
            DataType::Float8E5m2 => self.put(i, [E5M2.code(value)]),
            DataType::Float4E2m1 => {
                let (shift, byte) = (4 * (i % 2), self.bytes()[i / 2]);
                self.put(i / 2, [byte & !(0xF << shift) | E2M1.code(value) << shift]);
            }
            DataType::Int64 => self.put(i, (value as i64).to_ne_bytes()),
            DataType::Int32 => self.put(i, (value as i32).to_ne_bytes()),
            DataType::Int16 => self.put(i, (value as i16).to_ne_bytes()),
            DataType::Int8 => self.put(i, (value as i8).to_ne_bytes()),
            DataType::Uint64 => self.put(i, (value as u64).to_ne_bytes()),
            DataType::Uint32 => self.put(i, (value as u32).to_ne_bytes()),
            DataType::Uint16 => self.put(i, (value as u16).to_ne_bytes()),
            DataType::Uint8 => self.put(i, [value as u8]),
            DataType::Bool => self.put(i, [u8::from(value != 0.0)]),
            // There is no tensor of these.
            DataType::Other(_) => {}
        }
    }

    #[cfg(feature = "bench")]
    /// The tensor as an object of TVM-FFI's, which any kernel takes, over the same memory.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for more than [`MAX_NDIM`](crate::MAX_NDIM) dimensions, and
    /// what TVM-FFI raises.
    pub fn into_object(mut self) -> Result<Tensor> {
        let shape: Vec<i64> = self.shape.iter().map(|&size| i64::try_from(size).unwrap_or(i64::MAX)).collect();
        // There is no tensor of a type that is not known.
        let dtype = self.dtype.to_dl().unwrap_or(DType::U8.to_dl());
        let data = self.memory.as_mut_ptr().cast();
        // SAFETY: the memory is this tensor's, which is moved and with it nothing of the memory; it holds the elements.
        unsafe { Tensor::from_parts(self, data, Device::Cpu, dtype, &shape) }
    }

    #[cfg(feature = "bench")]
    /// A copy of a tensor object on the host, whose strides may be any.
    ///
    /// # Errors
    /// [`Data`](crate::FlashInferError::Data) for a tensor on a GPU, or of an element type that is not known.
    pub fn from_object(object: &Tensor) -> Result<Self> {
        let refuse =
            |place: &str, found: String, expected: &str, remedy| Err(unfit("a tensor", place, found, expected, remedy));
        let described = object.described();
        let Some(dtype) = DataType::from_dlpack(described.dtype) else {
            let found = format!("DLPack's {:?}", object.dlpack_dtype());
            return refuse("its element type", found, "one that FlashInfer-Bench has", "convert it");
        };
        if object.device() != Some(Device::Cpu) {
            let found = format!("DLPack's device type {}", described.device.device_type);
            return refuse("its device", found, "the host", "copy it to the host");
        }
        let shape: Vec<u64> = object.shape().iter().map(|&size| u64::try_from(size).unwrap_or(u64::MAX)).collect();
        let mut tensor = Self::zeros(dtype, &shape)?;
        if is_row_major(object.shape(), object.strides()) {
            if tensor.len > 0 {
                // SAFETY: all elements of a tensor on the host, which the object keeps, read as bytes.
                let bytes = unsafe { std::slice::from_raw_parts(object.as_ptr().cast(), tensor.len) };
                tensor.bytes_mut().copy_from_slice(bytes);
            }
            return Ok(tensor);
        }
        let size = tensor.dtype.size().unwrap_or(0);
        let mut index = vec![0u64; shape.len()];
        for at in 0..tensor.numel {
            let places = index.iter().zip(object.strides());
            let offset = places.fold(0i64, |sum, (&i, &stride)| sum.wrapping_add((i as i64).wrapping_mul(stride)));
            let from = object.as_ptr().cast::<u8>().wrapping_offset(offset as isize * size as isize);
            // SAFETY: an element of a tensor on the host, which the object keeps, and that is read as bytes.
            let element = unsafe { std::slice::from_raw_parts(from, size) };
            tensor.bytes_mut()[at * size..(at + 1) * size].copy_from_slice(element);
            for (i, &size) in index.iter_mut().zip(&shape).rev() {
                *i += 1;
                if *i < size {
                    break;
                }
                *i = 0;
            }
        }
        Ok(tensor)
    }

    fn sizes(&self) -> Result<(DType, Vec<i64>)> {
        let dtype = self.dtype.to_dtype().ok_or_else(|| {
            let found = self.dtype.to_string();
            unfit(
                "a tensor",
                "its element type",
                found,
                "one that kernels of this crate take",
                "pass its bytes instead",
            )
        })?;
        // Their product fits memory; a size beside a zero may still be larger than that.
        Ok((dtype, self.shape.iter().map(|&size| i64::try_from(size).unwrap_or(i64::MAX)).collect()))
    }

    /// The tensor as kernels of this crate take it.
    ///
    /// # Errors
    /// [`Data`](crate::FlashInferError::Data) for an element type that this crate has no name for, and
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for more than [`MAX_NDIM`](crate::MAX_NDIM) dimensions.
    pub fn as_ref(&self) -> Result<TensorRef<'_>> {
        let (dtype, shape) = self.sizes()?;
        // SAFETY: the elements are this tensor's own memory, of that type and shape, and borrowed as long as the view.
        unsafe { TensorRef::from_raw(self.memory.as_ptr().cast(), Device::Cpu, dtype, &shape, None) }
    }

    /// As [`as_ref`](Self::as_ref), to be written.
    ///
    /// # Errors
    /// As for [`as_ref`](Self::as_ref).
    pub fn as_mut(&mut self) -> Result<TensorMut<'_>> {
        let (dtype, shape) = self.sizes()?;
        // SAFETY: as for `as_ref`, and the tensor is borrowed exclusively.
        unsafe { TensorMut::from_raw(self.memory.as_mut_ptr().cast(), Device::Cpu, dtype, &shape, None) }
    }
}

/// The elements of a type, as numbers; of memory that holds them one after the other.
pub(crate) fn numbers(bytes: &[u8], dtype: DType) -> impl Iterator<Item = f64> {
    let number = move |bytes: &[u8]| match (dtype, bytes) {
        (DType::F16, &[a, b]) => narrow::from_f16(u16::from_ne_bytes([a, b])),
        (DType::BF16, &[a, b]) => narrow::from_bf16(u16::from_ne_bytes([a, b])),
        (DType::F32, &[a, b, c, d]) => f64::from(f32::from_ne_bytes([a, b, c, d])),
        (DType::F64, &[a, b, c, d, e, f, g, h]) => f64::from_ne_bytes([a, b, c, d, e, f, g, h]),
        (DType::I32, &[a, b, c, d]) => f64::from(i32::from_ne_bytes([a, b, c, d])),
        (DType::I64, &[a, b, c, d, e, f, g, h]) => i64::from_ne_bytes([a, b, c, d, e, f, g, h]) as f64,
        (DType::U8, &[byte]) => f64::from(byte),
        (DType::F8E4M3, &[byte]) => f64::from(E4M3.value(byte)),
        (DType::F8E5M2, &[byte]) => f64::from(E5M2.value(byte)),
        _ => f64::NAN,
    };
    bytes.chunks_exact(dtype.size()).map(number)
}

/// A small floating-point format: a sign, exponent bits with this bias, mantissa bits.
struct Mini {
    mantissa: u32,
    bias: i32,
    /// The code of the largest finite value.
    largest: u8,
    /// The sign's bit.
    sign: u8,
    /// What is behind the largest value: infinity first, or NaN alone, or nothing.
    beyond: Beyond,
}

#[derive(PartialEq)]
enum Beyond {
    Infinity,
    Nan,
    Nothing,
}

const E4M3: Mini = Mini { mantissa: 3, bias: 7, largest: 0x7E, sign: 0x80, beyond: Beyond::Nan };
const E5M2: Mini = Mini { mantissa: 2, bias: 15, largest: 0x7B, sign: 0x80, beyond: Beyond::Infinity };
const E2M1: Mini = Mini { mantissa: 1, bias: 1, largest: 0x7, sign: 0x8, beyond: Beyond::Nothing };

impl Mini {
    fn value(&self, code: u8) -> f32 {
        let magnitude = code & (self.sign - 1);
        let value = if magnitude > self.largest {
            match self.beyond {
                Beyond::Infinity if magnitude == self.largest + 1 => f32::INFINITY,
                _ => f32::NAN,
            }
        } else {
            let (exponent, fraction) = (i32::from(magnitude >> self.mantissa), magnitude & ((1 << self.mantissa) - 1));
            let fraction = f32::from(fraction) / (1u32 << self.mantissa) as f32;
            match exponent {
                0 => fraction * ((1 - self.bias) as f32).exp2(),
                _ => (1.0 + fraction) * ((exponent - self.bias) as f32).exp2(),
            }
        };
        if code & self.sign == 0 { value } else { -value }
    }

    fn code(&self, value: f64) -> u8 {
        let sign = if value.is_sign_negative() { self.sign } else { 0 };
        let infinite = match self.beyond {
            Beyond::Infinity | Beyond::Nan => self.largest + 1,
            Beyond::Nothing => self.largest,
        };
        if value.is_nan() {
            return sign | if self.beyond == Beyond::Infinity { self.largest + 2 } else { infinite };
        }
        let magnitude = value.abs();
        // Codes are in the order of their values: the first one above.
        let (mut below, mut above) = (0u8, self.largest);
        while below < above {
            let middle = below + (above - below) / 2;
            if f64::from(self.value(middle)) < magnitude { below = middle + 1 } else { above = middle }
        }
        let top = f64::from(self.value(self.largest));
        if magnitude > top {
            // Half a step beyond is where rounding to nearest leaves the finite values.
            let half = (top - f64::from(self.value(self.largest - 1))) / 2.0;
            return sign | if magnitude >= top + half { infinite } else { self.largest };
        }
        let high = f64::from(self.value(below)) - magnitude;
        if high == 0.0 || below == 0 {
            return sign | below;
        }
        let low = magnitude - f64::from(self.value(below - 1));
        let lower = low < high || (low == high && below % 2 == 1);
        sign | if lower { below - 1 } else { below }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_small_number_is_read_and_written_as_itself() {
        for format in [E4M3, E5M2, E2M1] {
            for code in (0..=format.largest).flat_map(|code| [code, code | format.sign]) {
                assert_eq!(format.code(format.value(code).into()), code);
            }
        }
        assert_eq!((E4M3.value(0x7E), E5M2.value(0x7B), E2M1.value(7)), (448.0, 57344.0, 6.0));
        assert!(E4M3.value(0x7F).is_nan() && E5M2.value(0x7C).is_infinite() && E5M2.value(0x7D).is_nan());
    }

    #[test]
    fn rounding_is_to_nearest_and_ties_to_even() {
        // 17 and 19 lie in the middle between 16, 18 and 20.
        assert_eq!([17.0, 19.0, 17.1, 18.9].map(|value| E4M3.value(E4M3.code(value))), [16.0, 20.0, 18.0, 18.0]);
        assert_eq!([0.25, 0.75, 5.0, 100.0].map(|value| E2M1.value(E2M1.code(value))), [0.0, 1.0, 4.0, 6.0]);
        assert!(E4M3.value(E4M3.code(500.0)).is_nan() && E5M2.value(E5M2.code(1e9)).is_infinite());
        assert!(E5M2.value(E5M2.code(f64::NAN)).is_nan());
    }
}
