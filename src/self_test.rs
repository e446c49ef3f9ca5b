//! Each kernel once, with what its row says, against the reference.

use std::ffi::c_void;

use crate::contract::{Contents, Dimensions, Dtype, From, Kind, Operand, Role, Row, Tensor};
use crate::cuda::Buffer;
use crate::data::tensor::numbers;
use crate::engine::Entry;
use crate::error::Result;
use crate::narrow;
use crate::owner::Owner;
use crate::reference;
use crate::runtime::FlashInferRuntime;
use crate::stream::Stream;
use crate::tensor::{DType, Device, Layout};

/// One kernel's result beside the reference's.
#[derive(Debug)]
#[non_exhaustive]
pub struct SelfTest {
    /// The kernel.
    pub kernel: &'static str,
    /// Where it ran.
    pub device: Device,
    /// The element type.
    pub dtype: DType,
    /// The relative error (L2) of the worst of its results, or why there is none.
    pub error: Result<f64>,
    /// What the error may be.
    pub tolerance: f64,
}

impl SelfTest {
    /// Whether the kernel ran and its error is within the tolerance.
    pub fn passed(&self) -> bool {
        self.error.as_ref().is_ok_and(|error| *error <= self.tolerance)
    }
}

/// A kernel's tests on a GPU: one for each element type that its row's lead argument may have.
pub(crate) fn self_test(runtime: &'static FlashInferRuntime, kernel: Entry, device: u32) -> Vec<SelfTest> {
    let lead = kernel.row.tensors().find(|(i, ..)| *i == kernel.row.lead);
    let types = lead.map_or(&[][..], |(_, _, tensor)| tensor.dtype.allowed(false));
    let test = |&dtype: &DType| SelfTest {
        kernel: kernel.row.kernel,
        device: Device::Cuda(device),
        dtype,
        error: run(runtime, kernel, device, dtype),
        tolerance: kernel.row.tolerance[usize::from(dtype == DType::F16)],
    };
    types.iter().map(test).collect()
}

/// The relative error of the worst of a kernel's results.
fn run(runtime: &'static FlashInferRuntime, kernel: Entry, device: u32, dtype: DType) -> Result<f64> {
    let row = kernel.row;
    let cudart = runtime.cudart()?;
    let _current = cudart.set_current(runtime.checked_device(Device::Cuda(device))?)?;
    let sizes = row.dimensions_from(|i| match row.dimensions[i].from {
        // The rows that have it have the lead's.
        From::ElementSize(_) => dtype.size() as i64,
        From::Gpu(limit) => limit.of(Device::Cuda(device)),
        _ => row.dimensions[i].examples.first().copied().unwrap_or(1),
    });
    let mut host: Vec<Option<Memory>> = Vec::new();
    for (i, argument) in row.arguments.iter().enumerate() {
        host.push(match &argument.kind {
            Kind::Tensor(tensor) => {
                Some(Memory::new(tensor, i, &sizes, type_of(row, tensor, dtype, DType::F32), dtype))
            }
            _ => None,
        });
    }
    let mut device_memory = Vec::new();
    for (argument, values) in row.arguments.iter().zip(&host) {
        device_memory.push(match (&argument.kind, values) {
            (Kind::Tensor(tensor), Some(memory)) => {
                let dtype = type_of(row, tensor, dtype, dtype);
                Some((dtype, cudart.upload(&encode(&memory.values, dtype))?))
            }
            _ => None,
        });
    }
    let mut on_host: Vec<_> = host
        .iter()
        .map(|memory| {
            memory.as_ref().map(|memory| (memory.dtype, encode(&memory.values, memory.dtype), memory.shape.clone()))
        })
        .collect();
    let layouts: Vec<_> = on_host
        .iter_mut()
        .map(|memory| {
            let (dtype, bytes, shape) = memory.as_mut()?;
            Some(Layout::build(bytes.as_mut_ptr().cast(), Device::Cpu, *dtype, shape, None, None))
        })
        .collect();
    // SAFETY: the memory is this function's own, of as many elements as the row's shapes say, and the offsets are in order.
    unsafe { kernel.call(&operands(kernel, &sizes, &layouts), Stream::NULL) }?;
    let layouts: Vec<_> = device_memory
        .iter()
        .zip(&host)
        .map(|(memory, values)| {
            let ((dtype, buffer), values) = (memory.as_ref()?, values.as_ref()?);
            let data: *mut c_void = buffer.pointer();
            Some(Layout::build(data, Device::Cuda(device), *dtype, &values.shape, None, None))
        })
        .collect();
    // SAFETY: as above; the memory is freed only after the null stream, where the kernel runs, was waited for.
    unsafe { kernel.call(&operands(kernel, &sizes, &layouts), Stream::NULL) }?;
    worst(kernel, &device_memory, &on_host)
}

/// A tensor on the host: its type, its bytes and its shape.
type OnHost = (DType, Vec<u8>, Vec<i64>);

/// The worst error among what the kernel writes.
fn worst(kernel: Entry, on_device: &[Option<(DType, Buffer)>], on_host: &[Option<OnHost>]) -> Result<f64> {
    let mut worst = 0f64;
    for (i, _, tensor) in kernel.row.tensors() {
        if !matches!(tensor.role, Role::Out | Role::Unordered | Role::InPlace) {
            continue;
        }
        if let (Some((dtype, buffer)), Some((expected_dtype, expected, shape))) = (&on_device[i], &on_host[i]) {
            let mut found = numbers(&buffer.download()?, *dtype).collect::<Vec<_>>();
            let mut expected = numbers(expected, *expected_dtype).collect::<Vec<_>>();
            if tensor.role == Role::Unordered {
                let columns = shape.last().map_or(1, |&columns| columns.max(1) as usize);
                let rows = found.chunks_mut(columns).chain(expected.chunks_mut(columns));
                rows.for_each(|row| row.sort_by(f64::total_cmp));
            }
            let error = relative_error(&found, &expected);
            // A NaN is no small error.
            worst = if error.is_nan() { f64::INFINITY } else { worst.max(error) };
        }
    }
    Ok(worst)
}

fn operands<'a>(kernel: Entry, sizes: &Dimensions, layouts: &'a [Option<Layout>]) -> Vec<Operand<'a, 'a>> {
    const NOBODY: &Owner<'static> = &Owner::NONE;
    let operand = |(i, layout): (usize, &'a Option<Layout>)| match (&kernel.row.arguments[i].kind, layout) {
        (Kind::Tensor(_), Some(layout)) => Operand::Tensor(layout, NOBODY),
        (Kind::Tensor(_), None) => Operand::Absent,
        (Kind::Positive, _) if kernel.row.arguments[i].name == "eps" => Operand::Number(1e-6),
        (Kind::Positive, _) => Operand::Number(0.5),
        (Kind::NotNegative, _) => Operand::Number(0.0),
        (Kind::Between(least, most), _) => Operand::Number((least + most) / 2.0),
        (Kind::Whole(..), _) => Operand::Whole(kernel.row.whole(i, sizes).unwrap_or(0)),
        (Kind::Word(words), _) => Operand::Word(words[0]),
        (Kind::Missing(_) | Kind::Nothing, _) => Operand::Absent,
        (Kind::Switch, _) => Operand::Bool(kernel.row.whole(i, sizes) == Some(1)),
        (Kind::EnablePdl, _) => Operand::Bool(false),
    };
    layouts.iter().enumerate().map(operand).collect()
}

/// The type of a tensor whose call's floating-point type is one of `half`.
pub(crate) fn type_of(row: &Row, tensor: &Tensor, lead: DType, half: DType) -> DType {
    match tensor.dtype {
        Dtype::Half | Dtype::Bf16 => half,
        Dtype::As(other) => match &row.arguments[other].kind {
            Kind::Tensor(other) => type_of(row, other, lead, half),
            _ => half,
        },
        Dtype::Eight => DType::F8E4M3,
        Dtype::Only(dtype) => dtype,
        // What the lead may be, the self-test goes through.
        Dtype::OneOf(types) => {
            if types.contains(&lead) {
                lead
            } else {
                types[0]
            }
        }
    }
}

pub(crate) struct Memory {
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<i64>,
    pub(crate) values: Vec<f64>,
}

impl Memory {
    /// The values of an argument, as numbers that the call's type holds.
    pub(crate) fn new(tensor: &Tensor, seed: usize, sizes: &Dimensions, dtype: DType, rounded: DType) -> Self {
        let shape: Vec<i64> = tensor.shape.iter().map(|size| size.of(sizes)).collect();
        let count = shape.iter().product::<i64>() as usize;
        let spread = |low: f64, high: f64| {
            let round = |value: f64| {
                if dtype == DType::F32 && !matches!(tensor.dtype, Dtype::Only(_)) {
                    round_to(value, rounded)
                } else {
                    value
                }
            };
            (0..count as u64).map(|i| round(low + (high - low) * number(seed as u64, i))).collect()
        };
        let values = match tensor.contents {
            Contents::Uniform(x) => spread(-x, x),
            Contents::Between(low, high) => spread(low, high),
            Contents::Steps(least, most, step) => {
                let steps = |i| least as f64 + ((most - least + 1) as f64 * number(seed as u64, i)).floor();
                (0..count as u64).map(|i| steps(i) * step).collect()
            }
            Contents::Offsets(parts, whole) => {
                (0..count as i64).map(|i| (sizes[whole] * i / sizes[parts].max(1)) as f64).collect()
            }
            Contents::Turns(among) => (0..count as i64).map(|i| (i % sizes[among].max(1)) as f64).collect(),
            Contents::Distinct(columns) => (0..count as i64).map(|i| distinct(i, sizes[columns].max(1))).collect(),
            Contents::Rounds(among) => (0..count as i64).map(|i| (i / sizes[among].max(1)) as f64).collect(),
            Contents::Zeros => vec![0.0; count],
        };
        Self { dtype, shape, values }
    }
}

/// Of whole numbers around 0, as many as there are columns, each once in a row: in steps of a prime number, and in another order
/// in each row.
fn distinct(i: i64, columns: i64) -> f64 {
    let (row, column) = (i / columns, i % columns);
    ((column * 7919 + row * 31) % columns - columns / 2) as f64
}

/// A number between 0 and 1 (splitmix64), the same everywhere.
fn number(seed: u64, i: u64) -> f64 {
    let mut z = (seed << 32 | i).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

fn round_to(value: f64, dtype: DType) -> f64 {
    match dtype {
        DType::F16 => narrow::from_f16(narrow::to_f16(value)),
        DType::BF16 => narrow::from_bf16(narrow::to_bf16(value)),
        _ => value,
    }
}

pub(crate) fn encode(values: &[f64], dtype: DType) -> Vec<u8> {
    let bytes = |&value: &f64| -> Vec<u8> {
        match dtype {
            DType::F16 => narrow::to_f16(value).to_le_bytes().to_vec(),
            DType::BF16 => narrow::to_bf16(value).to_le_bytes().to_vec(),
            DType::F32 => (value as f32).to_le_bytes().to_vec(),
            DType::F64 => value.to_le_bytes().to_vec(),
            DType::I32 => (value as i32).to_le_bytes().to_vec(),
            DType::I64 => (value as i64).to_le_bytes().to_vec(),
            DType::U8 => vec![value as u8],
            DType::F8E4M3 | DType::F8E5M2 => vec![reference::eight_bit(value, dtype)],
        }
    };
    values.iter().flat_map(bytes).collect()
}

fn relative_error(found: &[f64], expected: &[f64]) -> f64 {
    // Of numbers of which no difference is: infinities that are the same on both sides.
    let pairs = found.iter().zip(expected).filter(|(a, b)| !(a == b && a.is_infinite()));
    let (difference, size) = pairs.fold((0.0, 0.0), |(d, s), (a, b)| (d + (a - b).powi(2), s + b * b));
    // Nothing but zeros on both sides is no error either.
    if difference == 0.0 { 0.0 } else { (difference / size).sqrt() }
}
