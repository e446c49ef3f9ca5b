//! Making a dumped call again.

use std::ffi::c_void;
use std::fmt;
use std::path::Path;

use super::dump::{CALL, INPUTS, OUTPUTS, is_input, is_output};
use super::elements::each_block;
use crate::contract::{Kind, Operand, Role};
use crate::cuda::Buffer;
use crate::data::dtype::DataType;
use crate::data::error::{Finding, refused};
use crate::data::json::{Cursor, Document, Json, shortened};
use crate::data::safetensors::Safetensors;
use crate::data::tensor::{HostTensor, numbers};
use crate::engine::Entry;
use crate::error::Result;
use crate::kernels;
use crate::owner::Owner;
use crate::runtime::FlashInferRuntime;
use crate::stream::Stream;
use crate::tensor::{DType, Device, Layout, MAX_NDIM, numel, reach};

const REMEDY: &str = "take a dump that this release of the crate wrote";

/// A call of a kernel that was dumped: `FLASHINFER_RS_DUMP_DIR` asks for dumps, and `cargo run --example replay DUMP` makes one
/// again.
pub struct Dump {
    entry: Entry,
    arguments: Vec<Argument>,
    inputs: Safetensors,
    /// None of a call that did not come back.
    outputs: Option<Safetensors>,
    device: String,
}

impl fmt::Debug for Dump {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dump").field("kernel", &self.kernel()).field("device", &self.device).finish_non_exhaustive()
    }
}

/// An argument as it was dumped.
enum Argument {
    Tensor { dtype: DType, shape: Vec<i64>, strides: Vec<i64>, reach: usize },
    Other(Operand<'static, 'static>),
}

/// What a replay came to.
#[derive(Debug)]
#[non_exhaustive]
pub struct Replay {
    /// The kernel.
    pub kernel: &'static str,
    /// Where it ran this time.
    pub device: Device,
    /// Each output beside the dumped one, in the kernel's order; `None` where the dump has no outputs, since the call did not
    /// come back.
    pub outputs: Option<Vec<Comparison>>,
}

/// An output beside the dumped one.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Comparison {
    /// The argument's name.
    pub name: &'static str,
    /// How many elements it has.
    pub elements: usize,
    /// How many of them are other bits.
    pub changed: usize,
    /// How many of them differ by more than rounding may.
    pub different: usize,
    /// The element that differs most, as its place in row-major order, what it was and what it is.
    pub worst: Option<(usize, f64, f64)>,
}

impl Replay {
    /// Whether there is something to compare with, and no element differs by more than rounding may: 1/1000 of F32 and F64, 1/100
    /// of F16 and BF16, 1/8 of F8E4M3 and 1/4 of F8E5M2, of the element's own size and of the output's together; nothing of
    /// whole numbers.
    pub fn matches(&self) -> bool {
        self.outputs.as_ref().is_some_and(|outputs| outputs.iter().all(|output| output.different == 0))
    }
}

impl fmt::Display for Replay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on {}", self.kernel, self.device)?;
        let Some(outputs) = &self.outputs else {
            return write!(f, "\n  it ran; the dump has no outputs to compare with, since that call did not come back");
        };
        for Comparison { name, elements, changed, different, worst } in outputs {
            write!(f, "\n  {name}: ")?;
            match (worst, changed) {
                (_, 0) => write!(f, "all {elements} elements are the same")?,
                (None, _) => write!(f, "{changed} of {elements} elements have other bits, of the same value")?,
                (Some((at, was, is)), _) => write!(
                    f,
                    "{changed} of {elements} elements changed, {different} by more than rounding; the most element {at}, from \
                     {was} to {is}"
                )?,
            }
        }
        Ok(())
    }
}

impl Dump {
    /// Opens the folder of a dump. Its tensors are read when it is replayed.
    ///
    /// # Errors
    /// [`Io`](crate::FlashInferError::Io), and [`Data`](crate::FlashInferError::Data) for files that are damaged, or that do not
    /// describe a call of a kernel of this crate.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let path = folder.join(INPUTS);
        let inputs = Safetensors::open(&path)?;
        let name = path.display().to_string();
        let Some(call) = inputs.metadata().get(CALL) else {
            let found = "no call beside the tensors".to_owned();
            let (place, expected) = ("__metadata__".to_owned(), format!("the field {CALL:?}, as JSON"));
            return Err(refused(&name, Finding { place, found, expected, remedy: REMEDY }));
        };
        let document = Document::parse(&name, call.as_bytes(), 1)?;
        let root = document.root();
        let kernel = root.need("kernel")?;
        let wanted = kernel.text()?;
        let Some(entry) = kernels::all().into_iter().find(|entry| entry.row.kernel == wanted) else {
            return Err(kernel.refuse(
                format!("{:?}", shortened(&wanted)),
                "the name of a kernel of this crate",
                REMEDY,
            ));
        };
        let arguments = root.need("arguments")?;
        let found = arguments.items()?;
        if found.len() != entry.row.arguments.len() {
            let expected = format!("{}, as many as {wanted} has", entry.row.arguments.len());
            return Err(arguments.refuse(format!("{} arguments", found.len()), expected, REMEDY));
        }
        let arguments = found.iter().zip(entry.row.arguments);
        let arguments = arguments.map(|(found, known)| argument(found, known)).collect::<Result<_>>()?;
        let outputs = folder.join(OUTPUTS);
        let outputs = outputs.exists().then(|| Safetensors::open(&outputs)).transpose()?;
        Ok(Self { entry, arguments, inputs, outputs, device: root.need("device")?.text()? })
    }

    /// The kernel that was called.
    pub fn kernel(&self) -> &'static str {
        self.entry.row.kernel
    }

    /// Where the call ran, as `cpu` or `cuda:0`.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// Makes the call again on the host, by the [reference](mod@crate::reference), and compares.
    ///
    /// # Errors
    /// As for the kernel's call; [`Data`](crate::FlashInferError::Data) for tensors that are not those of the call.
    pub fn replay(&self) -> Result<Replay> {
        // SAFETY: the reference looks at every index that it finds in a tensor.
        unsafe { self.replay_on(Device::Cpu) }
    }

    /// Makes the call again on a GPU, and compares. It waits for the GPU.
    ///
    /// # Safety
    /// What the tensors of the dump hold steers some kernels through memory: it must be what a sound call was given.
    ///
    /// # Errors
    /// As for [`replay`](Self::replay), and why there is no such GPU.
    pub unsafe fn replay_on_gpu(&self, device: u32) -> Result<Replay> {
        // SAFETY: the caller's promise.
        unsafe { self.replay_on(Device::Cuda(device)) }
    }

    /// # Safety
    /// As for [`replay_on_gpu`](Self::replay_on_gpu), on a GPU.
    unsafe fn replay_on(&self, device: Device) -> Result<Replay> {
        let row = self.entry.row;
        let runtime = FlashInferRuntime::global()?;
        let id = runtime.checked_device(device)?;
        let _current = match device {
            Device::Cpu => None,
            Device::Cuda(_) => Some(runtime.cudart()?.set_current(id)?),
        };
        let mut memory = Vec::new();
        for (given, known) in self.arguments.iter().zip(row.arguments) {
            memory.push(match (given, &known.kind) {
                (Argument::Tensor { dtype, shape, strides, reach }, Kind::Tensor(tensor)) => {
                    let mut bytes = zeros(reach * dtype.size(), known.name)?;
                    if is_input(tensor.role) {
                        let found = read(&self.inputs, known.name, *dtype, shape)?;
                        scatter(shape, strides, dtype.size(), found.bytes(), as_bytes(&mut bytes));
                    }
                    Some(match device {
                        Device::Cpu => Memory::Host(bytes),
                        Device::Cuda(_) => Memory::Gpu(runtime.cudart()?.upload(as_bytes(&mut bytes))?),
                    })
                }
                _ => None,
            });
        }
        let layouts: Vec<Option<Layout>> = self
            .arguments
            .iter()
            .zip(&mut memory)
            .map(|(given, memory)| match (given, memory) {
                (Argument::Tensor { dtype, shape, strides, .. }, Some(memory)) => {
                    Some(Layout::build(memory.data(), device, *dtype, shape, Some(strides), None))
                }
                _ => None,
            })
            .collect();
        const NOBODY: &Owner<'static> = &Owner::NONE;
        let operands: Vec<Operand<'_, '_>> = self
            .arguments
            .iter()
            .zip(&layouts)
            .map(|(given, layout)| match (given, layout) {
                (Argument::Other(operand), _) => *operand,
                (_, Some(layout)) => Operand::Tensor(layout, NOBODY),
                (_, None) => Operand::Absent,
            })
            .collect();
        // SAFETY: the memory is this function's own, as long as the shapes and strides reach, and stays until the null stream,
        // where the kernel runs, was waited for. What it holds is the caller's promise.
        unsafe { self.entry.call(&operands, Stream::NULL) }?;
        let mut comparisons = Vec::new();
        for (i, name, tensor) in row.tensors().filter(|(_, _, tensor)| is_output(tensor.role)) {
            let (Some(memory), Some(layout)) = (&memory[i], &layouts[i]) else { continue };
            let downloaded;
            let layout = match memory {
                Memory::Host(_) => *layout,
                Memory::Gpu(buffer) => {
                    downloaded = buffer.download()?;
                    let data = downloaded.as_ptr().cast_mut().cast();
                    Layout::build(data, Device::Cpu, layout.dtype(), layout.shape(), Some(layout.strides()), None)
                }
            };
            let mut found = Vec::new();
            // SAFETY: memory of the host that lives until here, as long as shape and strides reach.
            let gathered = unsafe {
                each_block(&layout, Stream::NULL, &mut |bytes| {
                    found.extend_from_slice(bytes);
                    Ok(())
                })
            };
            gathered.map_err(crate::data::error::io("reading", Path::new(name)))?;
            if let Some(outputs) = &self.outputs {
                let expected = read(outputs, name, layout.dtype(), layout.shape())?;
                let columns = layout.shape().last().map_or(1, |&columns| columns.max(1) as usize);
                let sorted = (tensor.role == Role::Unordered).then_some(columns);
                comparisons.push(compare(name, layout.dtype(), expected.bytes(), &found, sorted));
            }
        }
        let outputs = self.outputs.is_some().then_some(comparisons);
        Ok(Replay { kernel: row.kernel, device, outputs })
    }
}

/// A tensor's memory.
enum Memory {
    /// In words, which are aligned for every element.
    Host(Vec<u64>),
    Gpu(Buffer),
}

impl Memory {
    fn data(&mut self) -> *mut c_void {
        match self {
            Self::Host(words) => words.as_mut_ptr().cast(),
            Self::Gpu(buffer) => buffer.pointer(),
        }
    }
}

fn zeros(bytes: usize, name: &str) -> Result<Vec<u64>> {
    let mut words = Vec::new();
    // One at the least, so that there is an address.
    let count = bytes.div_ceil(size_of::<u64>()).max(1);
    words.try_reserve_exact(count).map_err(|_| {
        let (found, expected) = (format!("{bytes} bytes"), "as much as memory has".to_owned());
        refused("a dump", Finding { place: format!("the tensor {name}"), found, expected, remedy: REMEDY })
    })?;
    words.resize(count, 0);
    Ok(words)
}

fn as_bytes(words: &mut [u64]) -> &mut [u8] {
    // SAFETY: the memory of the words, which are borrowed as long; any byte is fine in them.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), size_of_val(words)) }
}

/// Reads an argument of a dump, by what its row says of it.
fn argument(found: &Cursor<'_>, known: &crate::contract::Argument) -> Result<Argument> {
    let name = found.need("name")?;
    if name.text()? != known.name {
        return Err(name.refuse(format!("{:?}", shortened(&name.text()?)), format!("{:?}", known.name), REMEDY));
    }
    Ok(Argument::Other(match &known.kind {
        Kind::Tensor(tensor) => match found.given("tensor") {
            Some(form) => return argument_tensor(&form),
            None if tensor.optional => Operand::Absent,
            None => return Err(found.refuse("no tensor", "the field \"tensor\"", REMEDY)),
        },
        Kind::Positive | Kind::NotNegative | Kind::Between(..) => Operand::Number(found.need("number")?.figure()?),
        Kind::Whole(..) => {
            let whole = found.need("whole")?;
            match whole.json() {
                Json::Int(number) if i64::try_from(number).is_ok() => Operand::Whole(number as i64),
                _ => return Err(whole.refuse("something else", "a whole number of 64 bits", REMEDY)),
            }
        }
        Kind::Word(words) => {
            let word = found.need("word")?;
            let text = word.text()?;
            let known = words.iter().find(|known| known.to_bytes() == text.as_bytes());
            Operand::Word(
                known.ok_or_else(|| {
                    word.refuse(format!("{:?}", shortened(&text)), format!("one of {words:?}"), REMEDY)
                })?,
            )
        }
        Kind::Switch | Kind::EnablePdl => Operand::Bool(found.need("on")?.flag()?),
        Kind::Missing(_) | Kind::Nothing => Operand::Absent,
    }))
}

fn argument_tensor(form: &Cursor<'_>) -> Result<Argument> {
    let sizes = |name: &str| -> Result<Vec<i64>> {
        let sizes = form.need(name)?.items()?;
        sizes.iter().map(|size| size.size().map(|size| i64::try_from(size).unwrap_or(i64::MAX))).collect()
    };
    let (word, shape, strides) = (form.need("dtype")?, sizes("shape")?, sizes("strides")?);
    let dtype = DataType::from_name(&word.text()?).to_dtype();
    let dtype = dtype.ok_or_else(|| word.refuse("another type", "an element type of this crate", REMEDY))?;
    let fits = shape.len() == strides.len() && shape.len() <= MAX_NDIM && numel(&shape).is_some();
    let reach = reach(&shape, &strides).filter(|_| fits).and_then(|reach| usize::try_from(reach).ok());
    let reach = reach.filter(|reach| reach.checked_mul(dtype.size()).is_some_and(|bytes| bytes < isize::MAX as usize));
    match reach {
        Some(reach) => Ok(Argument::Tensor { dtype, shape, strides, reach }),
        None => {
            let found = format!("shape {shape:?} strided {strides:?}");
            Err(form.refuse(found, format!("at most {MAX_NDIM} sizes and as many strides that fit memory"), REMEDY))
        }
    }
}

/// A tensor of a dump's file, which must be that of the call.
fn read(file: &Safetensors, name: &str, dtype: DType, shape: &[i64]) -> Result<HostTensor> {
    let found = file.read(name)?;
    let sizes = found.shape().iter().map(|&size| i64::try_from(size).unwrap_or(i64::MAX));
    if found.dtype().to_dtype() == Some(dtype) && sizes.eq(shape.iter().copied()) {
        return Ok(found);
    }
    let (found, expected) = (format!("{found:?}"), format!("{dtype}{shape:?}, as the call says"));
    Err(refused(
        &file.path().display().to_string(),
        Finding { place: format!("the tensor {name:?}"), found, expected, remedy: REMEDY },
    ))
}

/// Puts elements that lie one behind the other where shape and strides say, which `to` is long enough for.
fn scatter(shape: &[i64], strides: &[i64], size: usize, from: &[u8], to: &mut [u8]) {
    let mut index = vec![0i64; shape.len()];
    for element in from.chunks_exact(size) {
        let offset: i64 = index.iter().zip(strides).map(|(at, stride)| at * stride).sum();
        let place = offset as usize * size;
        to[place..place + size].copy_from_slice(element);
        for dimension in (0..shape.len()).rev() {
            index[dimension] += 1;
            if index[dimension] < shape[dimension] {
                break;
            }
            index[dimension] = 0;
        }
    }
}

/// How much of a number rounding may change, on other hardware and in another order of sums.
fn rounding(dtype: DType) -> f64 {
    match dtype {
        DType::F32 | DType::F64 => 1e-3,
        DType::F16 | DType::BF16 => 1e-2,
        DType::F8E4M3 => 1.0 / 8.0,
        DType::F8E5M2 => 1.0 / 4.0,
        DType::U8 | DType::I32 | DType::I64 => 0.0,
    }
}

/// Compares two tensors of the same form; rows of so many elements in whichever order, where that is asked for.
fn compare(name: &'static str, dtype: DType, was: &[u8], is: &[u8], sorted: Option<usize>) -> Comparison {
    let decode = |bytes: &[u8]| -> Vec<f64> {
        let mut all: Vec<f64> = numbers(bytes, dtype).collect();
        if let Some(columns) = sorted {
            all.chunks_mut(columns).for_each(|row| row.sort_by(f64::total_cmp));
        }
        all
    };
    let (before, now) = (decode(was), decode(is));
    let changed = match sorted {
        None => was.chunks_exact(dtype.size()).zip(is.chunks_exact(dtype.size())).filter(|(a, b)| a != b).count(),
        Some(_) => before.iter().zip(&now).filter(|(a, b)| a.to_bits() != b.to_bits()).count(),
    };
    let finite: Vec<f64> = before.iter().copied().filter(|value| value.is_finite()).collect();
    let size = (finite.iter().map(|value| value * value).sum::<f64>() / finite.len().max(1) as f64).sqrt();
    let (mut different, mut worst, mut most) = (0, None, 0.0);
    for (i, (&a, &b)) in before.iter().zip(&now).enumerate() {
        // The same infinity, or no number on both sides, is no difference.
        if a == b || (a.is_nan() && b.is_nan()) {
            continue;
        }
        let difference = (a - b).abs();
        let difference = if difference.is_finite() { difference } else { f64::INFINITY };
        let allowed = if a.is_finite() { rounding(dtype) * (a.abs() + size) } else { 0.0 };
        different += usize::from(difference > allowed);
        if difference > most {
            (worst, most) = (Some((i, a, b)), difference);
        }
    }
    Comparison { name, elements: before.len(), changed, different, worst }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn f32s(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_ne_bytes()).collect()
    }

    fn compared(was: &[f32], is: &[f32]) -> (usize, usize, Option<usize>) {
        let found = compare("out", DType::F32, &f32s(was), &f32s(is), None);
        (found.changed, found.different, found.worst.map(|worst| worst.0))
    }

    #[test]
    fn rounding_is_no_difference_and_anything_else_is() {
        let nan = f32::NAN;
        assert_eq!(compared(&[1.0, 2.0], &[1.0, 2.0]), (0, 0, None));
        assert_eq!(compared(&[1.0, 2.0], &[1.000_1, 2.0]), (1, 0, Some(0)));
        assert_eq!(compared(&[1.0, 2.0, 1e-9], &[1.0, 2.1, 2e-9]), (2, 1, Some(1)));
        assert_eq!(compared(&[1.0, f32::INFINITY], &[nan, f32::INFINITY]), (1, 1, Some(0)));
        assert_eq!(compared(&[f32::INFINITY, nan], &[f32::NEG_INFINITY, 0.0]), (2, 2, Some(0)));
        assert_eq!(compared(&[nan], &[nan]), (0, 0, None));
        let ints = compare("out", DType::I32, &7i32.to_ne_bytes(), &8i32.to_ne_bytes(), None);
        assert_eq!((ints.different, ints.worst), (1, Some((0, 7.0, 8.0))));
    }

    #[test]
    fn rows_without_an_order_are_compared_as_what_they_hold() {
        let (was, is) = (f32s(&[1.0, 2.0, 3.0, 4.0]), f32s(&[2.0, 1.0, 3.0, 5.0]));
        let found = compare("out", DType::F32, &was, &is, Some(2));
        assert_eq!((found.changed, found.different), (1, 1));
    }
}
