//! Calls that are made from the rows alone: those that keep them are done, and each condition that is broken is named.

use std::ptr;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRng, TestRunner};

use super::{Contents, Dimensions, Dtype, From, Kind, Operand, Role, Row, Strides, Tensor, check, explain};
use crate::engine::Entry;
use crate::error::{FlashInferError, Result};
use crate::kernels;
use crate::narrow;
use crate::owner::Owner;
use crate::runtime::{FlashInferRuntime, RuntimeConfig};
use crate::stream::Stream;
use crate::tensor::{DType, Device, Layout};

/// The most elements of a lead argument, so that the reference is done soon.
const MOST: i64 = 40_000;

/// What was drawn, one after the other.
struct Choices<'a>(std::iter::Cycle<std::slice::Iter<'a, u32>>);

impl Choices<'_> {
    fn below(&mut self, count: usize) -> usize {
        self.0.next().map_or(0, |&number| number as usize % count)
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }
}

/// A tensor of a call.
#[derive(Debug, Clone)]
struct Given {
    address: *mut u8,
    device: Device,
    dtype: DType,
    shape: Vec<i64>,
    strides: Vec<i64>,
    stream: Option<*mut std::ffi::c_void>,
}

/// A call of a row.
#[derive(Debug, Clone)]
struct Call {
    row: &'static Row,
    sizes: Dimensions,
    /// Of the arguments that are tensors, where they are there.
    tensors: Vec<Option<Given>>,
    /// Of those that are numbers.
    numbers: Vec<f64>,
    /// Of those that are whole numbers.
    whole: Vec<i64>,
}

/// The memory of a call's tensors: enough of it whatever their types and strides are.
type Memory = Vec<Vec<u128>>;

impl Call {
    /// One that keeps the row; none where the sizes that were drawn do not.
    fn draw(row: &'static Row, device: Device, choices: &mut Choices<'_>) -> Option<(Self, Memory)> {
        let on_host = device == Device::Cpu;
        let lead = tensor(row, row.lead);
        let dtype = choices.of(lead.dtype.allowed(on_host));
        let drawn: Vec<i64> = row
            .dimensions
            .iter()
            .map(|dimension| match dimension.from {
                // The rows that have it have the lead's.
                From::ElementSize(_) => dtype.size() as i64,
                From::Gpu(limit) => limit.of(device),
                _ if dimension.examples.is_empty() => 1,
                _ => choices.of(dimension.examples),
            })
            .collect();
        let sizes = row.dimensions_from(|i| drawn[i]);
        let holds = |relation: &super::Relation| (on_host && relation.only_on_gpu) || (relation.holds)(&sizes);
        if !row.relations.iter().all(holds) {
            return None;
        }
        if row.shape(lead, &sizes).iter().product::<i64>() > MOST {
            return None;
        }
        let mut memory = Memory::new();
        let mut tensors: Vec<Option<Given>> = Vec::new();
        for argument in row.arguments {
            tensors.push(match &argument.kind {
                Kind::Tensor(tensor) if !tensor.optional || choices.below(2) == 0 => {
                    let (given, elements) = Given::draw(row, tensor, &sizes, &tensors, dtype, device, choices);
                    memory.push(elements);
                    Some(given)
                }
                _ => None,
            });
        }
        let numbers = row.arguments.iter().map(|argument| match argument.kind {
            Kind::NotNegative => choices.of(&[0.0, 0.5, 1e-30]),
            Kind::Between(least, most) => choices.of(&[least, most, (least + most) / 2.0]),
            _ => choices.of(&[1e-6, 0.5, f64::from(f32::MIN_POSITIVE), f64::from(f32::MAX)]),
        });
        let numbers = numbers.collect();
        let whole = (0..row.arguments.len()).map(|i| row.whole(i, &sizes).unwrap_or(0)).collect();
        Some((Self { row, sizes, tensors, numbers, whole }, memory))
    }

    fn layouts(&self) -> Vec<Option<Layout>> {
        let layout = |given: &Given| {
            let Given { address, device, dtype, shape, strides, stream } = given;
            Layout::build(address.cast(), *device, *dtype, shape, Some(strides), *stream)
        };
        self.tensors.iter().map(|given| given.as_ref().map(layout)).collect()
    }

    fn operands<'a>(&self, layouts: &'a [Option<Layout>]) -> Vec<Operand<'a, 'a>> {
        const NOBODY: &Owner<'static> = &Owner::NONE;
        let operand = |i: usize| match (&self.row.arguments[i].kind, &layouts[i]) {
            (Kind::Tensor(_), Some(layout)) => Operand::Tensor(layout, NOBODY),
            (Kind::Tensor(_), None) => Operand::Absent,
            (Kind::EnablePdl, _) => Operand::Bool(false),
            (Kind::Switch, _) => Operand::Bool(self.whole[i] != 0),
            (Kind::Positive | Kind::NotNegative | Kind::Between(..), _) => Operand::Number(self.numbers[i]),
            (Kind::Whole(..), _) => Operand::Whole(self.whole[i]),
            (Kind::Word(words), _) => Operand::Word(words[0]),
            (Kind::Missing(_) | Kind::Nothing, _) => Operand::Absent,
        };
        (0..self.row.arguments.len()).map(operand).collect()
    }

    /// Through everything, which on the host ends in the reference.
    fn made(&self, entry: Entry) -> Result<()> {
        let layouts = self.layouts();
        // SAFETY: the memory is the test's own and on the host, or the call is refused; the reference checks the offsets.
        unsafe { entry.call(&self.operands(&layouts), Stream::NULL) }
    }

    /// Its check alone, of what is said to be on a GPU.
    fn checked(&self) -> Result<()> {
        let layouts = self.layouts();
        let (operands, stream) = (self.operands(&layouts), Stream::NULL);
        check(self.row, &operands, stream).map(|_| ()).map_err(|fault| explain(self.row, &operands, stream, fault))
    }

    /// With one thing changed.
    fn but(&self, change: impl FnOnce(&mut Self)) -> Self {
        let mut other = self.clone();
        change(&mut other);
        other
    }
}

fn tensor(row: &'static Row, i: usize) -> &'static Tensor {
    match &row.arguments[i].kind {
        Kind::Tensor(tensor) => tensor,
        _ => unreachable!("a lead argument is a tensor"),
    }
}

impl Given {
    fn draw(
        row: &'static Row,
        tensor: &'static Tensor,
        sizes: &Dimensions,
        drawn: &[Option<Self>],
        lead: DType,
        device: Device,
        choices: &mut Choices<'_>,
    ) -> (Self, Vec<u128>) {
        let dtype = match tensor.dtype {
            Dtype::Half | Dtype::Bf16 => lead,
            Dtype::As(other) => drawn.get(other).and_then(Option::as_ref).map_or(lead, |other| other.dtype),
            other => choices.of(other.allowed(device == Device::Cpu)),
        };
        let dtype = if ptr::eq(tensor, self::tensor(row, row.lead)) { lead } else { dtype };
        let shape = row.shape(tensor, sizes);
        let mut strides = vec![1i64; shape.len()];
        // Row-major, in another order of the leading dimensions, with gaps, or with what is read repeated.
        let free = matches!(tensor.strides, Strides::Rows | Strides::As(_));
        let vector = tensor.alignment.elements(sizes, dtype.size());
        let mut order: Vec<usize> = (0..shape.len().saturating_sub(1)).rev().collect();
        if free && choices.below(2) == 0 {
            order.reverse();
        }
        let mut next = shape.last().copied().unwrap_or(1);
        for dimension in order {
            let gap = if free && choices.below(2) == 0 { vector * choices.below(4) as i64 } else { 0 };
            let repeated = free && !tensor.role.writes() && choices.below(6) == 0;
            strides[dimension] = if repeated { 0 } else { next + gap };
            next = (next + gap) * shape[dimension];
        }
        if let Strides::As(other) = tensor.strides
            && let Some(Some(other)) = drawn.get(other)
        {
            strides.clone_from(&other.strides);
            next = other.shape.iter().zip(&strides).map(|(size, stride)| (size - 1) * stride).sum::<i64>() + 1;
        }
        // 16 bytes for each element, whatever its type is made to be.
        let mut memory = vec![0u128; next.max(1) as usize + 64];
        // Memory of u128 is aligned to 16 bytes; what a row asks beyond that is found in the room behind.
        let address = memory.as_mut_ptr().cast::<u8>();
        let address = address.wrapping_add(address.addr().wrapping_neg() % 64);
        let least = match tensor.contents {
            Contents::Between(low, _) => Some(low),
            Contents::Steps(low, _, step) => Some(low as f64 * step),
            _ => None,
        };
        if let Some(least) = least {
            fill(address, next.max(1) as usize, dtype, least);
        }
        // Zeros, which the memory is of otherwise, are numbers and indices too.
        for i in 0..shape.first().copied().unwrap_or(0) {
            let number = match tensor.contents {
                Contents::Offsets(parts, whole) => sizes[whole] * i / sizes[parts].max(1),
                Contents::Turns(among) => i % sizes[among].max(1),
                Contents::Rounds(among) => i / sizes[among].max(1),
                _ => break,
            };
            let place = address.wrapping_add(i as usize * dtype.size());
            // SAFETY: there is room for 16 bytes for each element and 64 more.
            unsafe {
                match dtype {
                    DType::I64 => place.cast::<i64>().write(number),
                    _ => place.cast::<i32>().write(number as i32),
                }
            }
        }
        (Self { address, device, dtype, shape, strides, stream: None }, memory)
    }
}

/// Writes a number in so many places, for which there must be room.
fn fill(address: *mut u8, count: usize, dtype: DType, number: f64) {
    for i in 0..count {
        let place = address.wrapping_add(i * dtype.size());
        // SAFETY: there is room, which the caller sees to.
        unsafe {
            match dtype {
                DType::F32 => place.cast::<f32>().write(number as f32),
                DType::F16 => place.cast::<u16>().write(narrow::to_f16(number)),
                DType::BF16 => place.cast::<u16>().write(narrow::to_bf16(number)),
                DType::I32 => place.cast::<i32>().write(number as i32),
                DType::I64 => place.cast::<i64>().write(number as i64),
                DType::U8 => place.write(number as u8),
                other => unreachable!("no row has numbers between two in {other}"),
            }
        }
    }
}

/// That a call was refused for one of these.
fn refused(result: Result<()>, by: &[&str], what: &str, call: &Call) -> std::result::Result<(), TestCaseError> {
    match result {
        Err(FlashInferError::InvalidArgument { function, argument, .. }) => {
            prop_assert_eq!(function, call.row.function);
            prop_assert!(
                by.contains(&argument),
                "{}: {} blames {}, not one of {:?}",
                what,
                call.row.kernel,
                argument,
                by
            );
        }
        other => prop_assert!(false, "{what} of {}: {other:?}; {call:?}", call.row.kernel),
    }
    Ok(())
}

/// Breaks each condition of a call, one at a time; `run` makes the call.
fn break_each(call: &Call, run: &dyn Fn(&Call) -> Result<()>, on_gpu: bool) -> std::result::Result<(), TestCaseError> {
    let row = call.row;
    let every: Vec<&str> = row
        .arguments
        .iter()
        .map(|argument| argument.name)
        .chain(row.dimensions.iter().map(|dimension| dimension.name))
        .chain(row.relations.iter().map(|relation| relation.name))
        .collect();
    for (i, name, spec) in row.tensors() {
        let Some(given) = &call.tensors[i] else { continue };
        let with = |change: &dyn Fn(&mut Given)| {
            run(&call.but(|call| {
                if let Some(given) = &mut call.tensors[i] {
                    change(given);
                }
            }))
        };
        let rank = given.shape.len();
        // Where there are none, it does not matter where they are.
        let elements = given.shape.iter().all(|&size| size > 0);
        refused(
            with(&|given| {
                given.shape.push(1);
                given.strides.push(1)
            }),
            &[name],
            "a dimension more",
            call,
        )?;
        refused(
            with(&|given| {
                given.shape.pop();
                given.strides.pop();
            }),
            &[name],
            "a dimension less",
            call,
        )?;
        for at in 0..rank {
            let decided = row.dimensions.iter().position(|dimension| match dimension.from {
                From::Shape(argument, size) | From::OneLess(argument, size) => (argument, size) == (i, at),
                From::Larger(..) | From::Sum(..) | From::Number(_) | From::ElementSize(_) | From::Gpu(_) => false,
            });
            let decides = decided.is_some();
            // One may be larger that makes no other tensor larger: of pages that are listed, for example, or of bits that fill up
            // a byte.
            let moved = row.dimensions_from(|i| call.sizes[i] + i64::from(Some(i) == decided));
            let shared = row
                .tensors()
                .any(|(j, _, other)| j != i && other.shape.iter().any(|size| size.of(&moved) != size.of(&call.sizes)));
            let larger = with(&|given| given.shape[at] += 1);
            match (decides, spec.role) {
                // Of a workspace there may be more.
                (true, Role::Workspace) => prop_assert!(larger.is_ok(), "{:?}", larger),
                (true, _) if !shared => {}
                // Then it is the others that do not fit.
                (true, _) => refused(larger, &every, "a larger dimension", call)?,
                (false, _) => refused(larger, &[name], "a larger dimension", call)?,
            }
            if given.shape[at] > 1 && !decides {
                refused(with(&|given| given.shape[at] -= 1), &[name], "a smaller dimension", call)?;
            }
            if given.shape[at] > 1 && elements {
                refused(
                    with(&|given| given.strides[at] = -given.strides[at].max(1)),
                    &[name],
                    "a stride below 0",
                    call,
                )?;
                if spec.role.writes() {
                    refused(with(&|given| given.strides[at] = 0), &[name], "an output on itself", call)?;
                }
                if matches!(spec.strides, Strides::Contiguous) {
                    refused(with(&|given| given.strides[at] += 1), &[name], "a gap", call)?;
                }
            }
        }
        if elements && matches!(spec.strides, Strides::Rows | Strides::As(_)) {
            let followers = row.tensors().filter(|(_, _, other)| matches!(other.strides, Strides::As(of) if of == i));
            let likewise: Vec<_> = followers.map(|(_, name, _)| name).chain([name]).collect();
            refused(with(&|given| given.strides[rank - 1] = 2), &likewise, "columns apart", call)?;
            let vector = spec.alignment.elements(&call.sizes, given.dtype.size());
            for at in (0..rank - 1).filter(|&at| vector > 1 && given.shape[at] > 1 && given.strides[at] > 0) {
                refused(with(&|given| given.strides[at] += 1), &[name], "rows between vectors", call)?;
            }
        }
        let likewise: Vec<&str> = row
            .tensors()
            .filter(|(j, _, other)| *j == i || matches!(other.dtype, Dtype::As(lead) if lead == i))
            .map(|(_, name, _)| name)
            .collect();
        refused(with(&|given| given.dtype = DType::F64), &likewise, "another type", call)?;
        let elsewhere = if on_gpu { [Device::Cpu, Device::Cuda(1)] } else { [Device::Cuda(0), Device::Cuda(1)] };
        // A tensor that is alone may be anywhere.
        for device in elsewhere.into_iter().filter(|_| row.tensors().count() > 1) {
            let by = if i == row.lead { &every[..] } else { &[name] };
            refused(with(&|given| given.device = device), by, "another device", call)?;
        }
        let stream = ptr::without_provenance_mut(0x10);
        refused(with(&|given| given.stream = Some(stream)), &[name], "another stream", call)?;
        if on_gpu && elements && spec.alignment.elements(&call.sizes, 1) * given.dtype.size() as i64 > 1 {
            refused(with(&|given| given.address = given.address.wrapping_add(1)), &[name], "an odd address", call)?;
        }
    }
    for (i, argument) in row.arguments.iter().enumerate() {
        let gives = |dimension: &super::Dimension| matches!(dimension.from, From::Number(from) if from == i);
        if let Kind::Whole(least, most) = argument.kind {
            for number in [least.checked_sub(1), most.checked_add(1)].into_iter().flatten() {
                // Where the number is a dimension, that is what is looked at first.
                let by = if row.dimensions.iter().any(gives) { &every[..] } else { &[argument.name] };
                refused(run(&call.but(|call| call.whole[i] = number)), by, &number.to_string(), call)?;
            }
        }
        if let Kind::Between(least, most) = argument.kind {
            for number in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, least - 1.0, most * 2.0 + 1.0] {
                let result = run(&call.but(|call| call.numbers[i] = number));
                refused(result, &[argument.name], &number.to_string(), call)?;
            }
        }
        let none: &[f64] = match argument.kind {
            Kind::Positive => &[0.0, -0.0],
            Kind::NotNegative => &[],
            _ => continue,
        };
        for &number in [f64::NAN, f64::INFINITY, -0.5, 1e-40, 1e-300, 1e39].iter().chain(none) {
            let result = run(&call.but(|call| call.numbers[i] = number));
            refused(result, &[argument.name], &number.to_string(), call)?;
        }
    }
    Ok(())
}

/// Draws calls of every row until there were so many that keep it.
fn every_row(device: Device, cases: u32, test: &dyn Fn(Entry, &Call) -> std::result::Result<(), TestCaseError>) {
    for entry in kernels::all() {
        let config = Config { cases, failure_persistence: None, max_global_rejects: 1 << 16, ..Config::default() };
        let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(Default::default()));
        let choices = proptest::collection::vec(any::<u32>(), 64);
        let outcome =
            runner.run(&choices, |numbers| match Call::draw(entry.row, device, &mut Choices(numbers.iter().cycle())) {
                Some((call, _memory)) => test(entry, &call),
                None => Err(TestCaseError::reject("sizes that do not fit each other")),
            });
        outcome.unwrap_or_else(|error| panic!("{}: {error}", entry.row.kernel));
    }
}

#[test]
fn calls_on_the_host_that_keep_their_row_are_done_and_others_are_named() {
    FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
    every_row(Device::Cpu, 24, &|entry, call| {
        let result = call.made(entry);
        prop_assert!(result.is_ok(), "{:?}; {:?}", result, call);
        break_each(call, &|call| call.made(entry), false)
    });
}

#[test]
fn calls_on_a_gpu_that_keep_their_row_pass_its_check_and_others_are_named() {
    every_row(Device::Cuda(0), 200, &|_, call| {
        let result = call.checked();
        prop_assert!(result.is_ok(), "{:?}; {:?}", result, call);
        break_each(call, &Call::checked, true)
    });
}

/// Tensors of rows that lie far from each other, as a library that counts in 32 bits is not given them.
#[test]
fn what_is_too_long_for_one_launch_is_divided_as_long_as_offsets_fit() {
    let of_rows = |entry: &Entry| matches!(tensor(entry.row, entry.row.lead).strides, Strides::Rows);
    for entry in kernels::all().into_iter().filter(|entry| entry.row.extent.split && of_rows(entry)) {
        let (row, most) = (entry.row, entry.row.extent.most);
        let several = |call: &Call| {
            let shape = row.shape(tensor(row, row.lead), &call.sizes);
            shape[..shape.len() - 1].iter().all(|&size| size > 2)
        };
        let drawn = (0..1 << 16).find_map(|seed: u32| {
            let numbers: Vec<u32> = (1..65).map(|i| seed.wrapping_add(i).wrapping_mul(0x9E37_79B9) >> 8).collect();
            Call::draw(row, Device::Cuda(0), &mut Choices(numbers.iter().cycle())).filter(|(call, _)| several(call))
        });
        let (call, _memory) = drawn.unwrap_or_else(|| panic!("{}: no examples of several rows", row.kernel));
        let with_stride = |at: usize, stride: i64| {
            let call = call.but(|call| {
                if let Some(given) = &mut call.tensors[row.lead] {
                    given.strides[at] = stride;
                }
            });
            let layouts = call.layouts();
            check(row, &call.operands(&layouts), Stream::NULL).map(|checked| checked.whole)
        };
        let name = row.kernel;
        assert!(!with_stride(0, most).unwrap(), "{name}: no launch reaches two of these rows");
        assert!(with_stride(0, i64::MAX / 2 - 7).is_err(), "{name}: where the last row is no number says");
        let rank = tensor(row, row.lead).shape.len();
        if rank > 2 {
            assert!(with_stride(rank - 2, most).is_err(), "{name}: no launch reaches over what cannot be divided");
        }
    }
}
