//! Reading what tensors hold: for statistics and for dumps.

use std::io;

use crate::data::tensor::numbers;
use crate::error::Result;
use crate::runtime::FlashInferRuntime;
use crate::stream::Stream;
use crate::tensor::{DType, Device, Layout};

/// How much is read at once.
const BLOCK: usize = 16 << 20;

/// How many pieces of memory that do not lie one behind the other are read at once.
const PIECES: usize = 1 << 16;

/// Visits a tensor's elements in row-major order, in blocks of whole elements; on a GPU once the stream has come so far, which
/// is waited for.
///
/// # Safety
/// The tensor's memory must be valid, and hold elements; the stream must be a live one of its device, on which nothing is
/// captured.
pub(super) unsafe fn each_block(
    layout: &Layout,
    stream: Stream<'_>,
    visit: &mut dyn FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut buffer = Vec::new();
    let mut read = |pieces: &[(*const u8, usize)]| -> io::Result<()> {
        buffer.resize(pieces.iter().map(|(_, bytes)| bytes).sum(), 0);
        // SAFETY: the caller's promise; the pieces are parts of the tensor.
        unsafe { fetch(layout.device(), stream, pieces, &mut buffer) }.map_err(io::Error::other)?;
        visit(&buffer)
    };
    let size = layout.element_size();
    let (shape, strides) = (layout.shape(), layout.strides());
    if shape.contains(&0) {
        return Ok(());
    }
    // What lies one behind the other in memory too.
    let (mut outer, mut run) = (shape.len(), 1i64);
    while outer > 0 && (shape[outer - 1] == 1 || strides[outer - 1] == run) {
        outer -= 1;
        run *= shape[outer];
    }
    let run = run as usize * size;
    let (mut pieces, mut gathered) = (Vec::new(), 0);
    let mut index = vec![0i64; outer];
    loop {
        let offset: i64 = index.iter().zip(strides).map(|(at, stride)| at * stride).sum();
        let start = layout.data().cast_const().cast::<u8>().wrapping_offset(offset as isize * size as isize);
        let mut at = 0;
        while at < run {
            let bytes = (run - at).min(BLOCK - gathered);
            pieces.push((start.wrapping_add(at), bytes));
            (at, gathered) = (at + bytes, gathered + bytes);
            if gathered == BLOCK || pieces.len() == PIECES {
                read(&pieces)?;
                pieces.clear();
                gathered = 0;
            }
        }
        // The next index of the outer dimensions, as an odometer counts.
        let Some(dimension) = (0..outer).rev().find(|&dimension| index[dimension] + 1 < shape[dimension]) else {
            break;
        };
        index[dimension] += 1;
        index[dimension + 1..].fill(0);
    }
    if pieces.is_empty() { Ok(()) } else { read(&pieces) }
}

/// Copies pieces of a device's memory, one behind the other.
///
/// # Safety
/// As for [`each_block`].
unsafe fn fetch(device: Device, stream: Stream<'_>, pieces: &[(*const u8, usize)], to: &mut [u8]) -> Result<()> {
    let Device::Cuda(_) = device else {
        let mut rest = to;
        for &(from, bytes) in pieces {
            let (place, behind) = rest.split_at_mut(bytes);
            // SAFETY: the caller's promise; the place is memory of this side's own.
            unsafe { from.copy_to_nonoverlapping(place.as_mut_ptr(), bytes) };
            rest = behind;
        }
        return Ok(());
    };
    let runtime = FlashInferRuntime::global()?;
    let cudart = runtime.cudart()?;
    let _current = cudart.set_current(runtime.checked_device(device)?)?;
    // SAFETY: the caller's promise.
    unsafe { cudart.download(to, pieces, stream.as_raw()) }
}

/// Whether a graph is captured, so that nothing may be waited for; `None` where that cannot be known.
pub(super) fn is_captured(device: Device, stream: Stream<'_>) -> Option<bool> {
    if stream.capture().is_some() || device == Device::Cpu {
        return Some(stream.capture().is_some());
    }
    let runtime = FlashInferRuntime::global().ok()?;
    let cudart = runtime.cudart().ok()?;
    let _current = cudart.set_current(runtime.checked_device(device).ok()?).ok()?;
    cudart.is_capturing(stream.as_raw())
}

/// What a tensor holds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Statistics {
    /// Of what is a number; NaN where nothing is.
    pub(super) least: f64,
    pub(super) most: f64,
    sum: f64,
    numbers: u64,
    pub(super) nan: u64,
    pub(super) infinite: u64,
}

impl Statistics {
    const NONE: Self = Self { least: f64::NAN, most: f64::NAN, sum: 0.0, numbers: 0, nan: 0, infinite: 0 };

    /// # Safety
    /// As for [`each_block`].
    pub(super) unsafe fn of(layout: &Layout, stream: Stream<'_>) -> io::Result<Self> {
        let (mut statistics, dtype) = (Self::NONE, layout.dtype());
        // SAFETY: the caller's promise.
        unsafe {
            each_block(layout, stream, &mut |bytes| {
                statistics.add(bytes, dtype);
                Ok(())
            })
        }?;
        Ok(statistics)
    }

    fn add(&mut self, bytes: &[u8], dtype: DType) {
        for number in numbers(bytes, dtype) {
            if number.is_nan() {
                self.nan += 1;
                continue;
            }
            self.infinite += u64::from(number.is_infinite());
            // `min` and `max` prefer a number to NaN, with which they begin.
            (self.least, self.most) = (self.least.min(number), self.most.max(number));
            self.sum += number;
            self.numbers += 1;
        }
    }

    /// Of what is a number.
    pub(super) fn mean(&self) -> f64 {
        self.sum / self.numbers as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::TensorRef;

    fn bytes_of(tensor: &TensorRef<'_>) -> Vec<u8> {
        let mut all = Vec::new();
        // SAFETY: the tensor is on the host.
        let read = unsafe {
            each_block(tensor.layout(), Stream::NULL, &mut |bytes| {
                all.extend_from_slice(bytes);
                Ok(())
            })
        };
        read.unwrap();
        all
    }

    #[test]
    fn elements_come_in_the_order_of_rows_however_they_lie() {
        let memory: Vec<u8> = (0..24).collect();
        let of =
            |shape: &[i64], strides: &[i64]| bytes_of(&TensorRef::from_slice_strided(&memory, shape, strides).unwrap());
        assert_eq!(of(&[2, 3, 4], &[12, 4, 1]), memory);
        assert_eq!(of(&[4, 2], &[1, 4]), [0, 4, 1, 5, 2, 6, 3, 7]);
        assert_eq!(of(&[2, 2, 2], &[12, 4, 1]), [0, 1, 4, 5, 12, 13, 16, 17]);
        // A row that is repeated, a dimension of one with a stride that means nothing, no dimension, no element.
        assert_eq!(of(&[3, 2], &[0, 1]), [0, 1, 0, 1, 0, 1]);
        assert_eq!(of(&[2, 1, 2], &[2, 7, 1]), [0, 1, 2, 3]);
        assert_eq!(of(&[], &[]), [0]);
        assert!(of(&[3, 0, 2], &[1, 1, 1]).is_empty());
    }

    #[test]
    fn more_than_a_block_comes_in_several_whole() {
        let memory: Vec<u32> = (0..BLOCK as u32 / 2).collect();
        let bits: Vec<f32> = memory.iter().map(|&bits| f32::from_bits(bits)).collect();
        let expected: Vec<u8> = memory.iter().flat_map(|bits| bits.to_ne_bytes()).collect();
        assert!(bytes_of(&TensorRef::from_slice(&bits, &[2, BLOCK as i64 / 4]).unwrap()) == expected);
        // And of more pieces than are read at once.
        let every_other = TensorRef::from_slice_strided(&bits, &[PIECES as i64 + 1], &[2]).unwrap();
        let expected: Vec<u8> = (0..=PIECES as u32).flat_map(|i| (2 * i).to_ne_bytes()).collect();
        assert!(bytes_of(&every_other) == expected);
    }

    #[test]
    fn statistics_tell_numbers_from_what_is_none() {
        let of = |tensor: TensorRef<'_>| {
            // SAFETY: the tensor is on the host.
            let found = unsafe { Statistics::of(tensor.layout(), Stream::NULL) }.unwrap();
            (found.least, found.most, found.mean(), found.nan, found.infinite)
        };
        let values = [1.0, f32::NAN, -3.0, 5.0];
        assert_eq!(of(TensorRef::from_slice(&values, &[4]).unwrap()), (-3.0, 5.0, 1.0, 1, 0));
        let values = [f32::INFINITY, 2.0];
        assert_eq!(of(TensorRef::from_slice(&values, &[2]).unwrap()), (2.0, f64::INFINITY, f64::INFINITY, 0, 1));
        let values = [i64::MIN, 0, 7, 1];
        assert_eq!(of(TensorRef::from_slice(&values[1..], &[3]).unwrap()), (0.0, 7.0, 8.0 / 3.0, 0, 0));
        let (least, _, mean, nan, _) = of(TensorRef::from_slice(&[f64::NAN], &[1]).unwrap());
        assert!(least.is_nan() && mean.is_nan() && nan == 1);
        // 8-bit numbers: NaN of both formats, infinity of the one that has it.
        let bytes = [0x7Fu8, 0x38, 0x7C];
        let eight = |dtype| {
            let layout = *TensorRef::from_slice(&bytes, &[3]).unwrap().layout();
            let layout = Layout::build(layout.data(), Device::Cpu, dtype, &[3], None, None);
            // SAFETY: as above.
            let found = unsafe { Statistics::of(&layout, Stream::NULL) }.unwrap();
            (found.nan, found.infinite)
        };
        assert_eq!((eight(DType::F8E4M3), eight(DType::F8E5M2)), ((1, 0), (1, 1)));
    }
}
