//! Random calls of a kernel, right ones and wrong ones, made of what its row says. A family's test gives the function; sizes,
//! strides, alignments, types, optional arguments and the limits of the dimensions come from the row.

#![allow(dead_code, reason = "each test uses its own part")]

use std::ffi::{CStr, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

use cudarc::driver::{CudaSlice, DevicePtr};
use flashinfer_rs::contract::{
    Alignment, Contents, Dimensions, Dtype, From, Kind, MAX_DIMENSIONS, Role, Row, Strides, Tensor,
};
use flashinfer_rs::{DType, Device, FlashInferError, Result, Stream, TensorMut, TensorRef, kernels};
use half::{bf16, f16};

use crate::data::{Random, relative_error};
use crate::gpu::Gpu;

/// The row of a kernel by its name.
pub fn row(kernel: &str) -> &'static Row {
    kernels::rows().into_iter().find(|row| row.kernel == kernel).unwrap_or_else(|| panic!("no row of {kernel}"))
}

/// The arguments of one call, by their names.
pub struct Call<'a> {
    row: &'static Row,
    arguments: Vec<Given<'a>>,
}

enum Given<'a> {
    Tensor(TensorMut<'a>),
    Absent,
    Number(f64),
    Whole(i64),
    Word(&'static CStr),
    Bool(bool),
}

impl<'a> Call<'a> {
    fn find(&mut self, name: &str) -> &mut Given<'a> {
        let at = self.row.arguments.iter().position(|argument| argument.name == name);
        &mut self.arguments[at.unwrap_or_else(|| panic!("{} has no argument {name}", self.row.kernel))]
    }

    /// Whether the call has a tensor of this name, which was not taken.
    pub fn has(&self, name: &str) -> bool {
        let at = self.row.arguments.iter().position(|argument| argument.name == name);
        at.is_some_and(|at| matches!(self.arguments[at], Given::Tensor(_)))
    }

    /// A tensor that is written. Taken once.
    pub fn write(&mut self, name: &str) -> TensorMut<'a> {
        match std::mem::replace(self.find(name), Given::Absent) {
            Given::Tensor(tensor) => tensor,
            _ => panic!("{name} is no tensor, or was taken"),
        }
    }

    /// An optional tensor that is read. Taken once.
    pub fn optional(&mut self, name: &str) -> Option<TensorRef<'a>> {
        match std::mem::replace(self.find(name), Given::Absent) {
            // SAFETY: the same memory, which the mutable tensor, gone here, had for itself.
            Given::Tensor(tensor) => Some(unsafe {
                let (shape, strides) = (tensor.shape(), tensor.strides());
                TensorRef::from_raw(tensor.as_ptr(), tensor.device(), tensor.dtype(), shape, Some(strides)).unwrap()
            }),
            Given::Absent => None,
            _ => panic!("{name} is no tensor"),
        }
    }

    /// A tensor that is read. Taken once.
    pub fn read(&mut self, name: &str) -> TensorRef<'a> {
        self.optional(name).unwrap_or_else(|| panic!("{name} was taken"))
    }

    pub fn number(&mut self, name: &str) -> f64 {
        match self.find(name) {
            Given::Number(value) => *value,
            _ => panic!("{name} is no number"),
        }
    }

    pub fn whole(&mut self, name: &str) -> i64 {
        match self.find(name) {
            Given::Whole(value) => *value,
            _ => panic!("{name} is no whole number"),
        }
    }

    pub fn word(&mut self, name: &str) -> &'static CStr {
        match self.find(name) {
            Given::Word(word) => word,
            _ => panic!("{name} is no word"),
        }
    }

    /// Whether an argument is on.
    pub fn on(&mut self, name: &str) -> bool {
        match self.find(name) {
            Given::Bool(value) => *value,
            _ => panic!("{name} is not on or off"),
        }
    }
}

/// How a kernel is called.
pub type Function = fn(&mut Call<'_>, Stream<'_>) -> Result<()>;

/// A tensor that a call is to have.
#[derive(Debug, Clone)]
struct Plan {
    dtype: DType,
    shape: Vec<i64>,
    strides: Vec<i64>,
    /// Where it starts in its memory, in elements.
    start: i64,
    on_host: bool,
}

#[derive(Debug, Clone)]
enum Planned {
    Tensor(Plan),
    Absent,
    Number(f64),
    Whole(i64),
    Word(&'static CStr),
    Bool(bool),
}

#[derive(Debug, Clone)]
struct Plans {
    dimensions: Dimensions,
    arguments: Vec<Planned>,
}

/// The most elements of a tensor that is really made.
const MOST: i64 = 1 << 21;

impl Random {
    fn below(&mut self, end: i64) -> i64 {
        ((self.uniform() * end as f64) as i64).min(end - 1)
    }

    fn chance(&mut self, one_in: i64) -> bool {
        self.below(one_in) == 0
    }

    fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len() as i64) as usize]
    }
}

/// Whether there is nothing to do, or a tensor without elements.
fn is_empty(row: &Row, dimensions: &Dimensions) -> bool {
    let sizes = row.dimensions.iter().zip(dimensions);
    sizes.filter(|(dimension, _)| !matches!(dimension.from, From::Number(_))).any(|(_, size)| *size == 0)
}

fn keeps_relations(row: &Row, dimensions: &Dimensions) -> bool {
    let lead = |from: &From| matches!(from, From::Shape(argument, _) if *argument == row.lead);
    let nothing = row.dimensions.iter().zip(dimensions).any(|(d, size)| *size == 0 && lead(&d.from));
    nothing || row.relations.iter().all(|relation| (relation.holds)(dimensions))
}

/// A dimension that is not drawn as others are: of the type that the lead is to have, or of the GPU.
fn fixed(row: &Row, from: From, random: &mut Random) -> Option<i64> {
    match (from, &row.arguments[row.lead].kind) {
        (From::ElementSize(_), Kind::Tensor(lead)) => Some(random.pick(lead.dtype.allowed(false)).size() as i64),
        (From::Gpu(limit), _) => Some(limit.of(Device::Cuda(0))),
        _ => None,
    }
}

/// Dimensions within their limits, some of them the row's examples, that are kept or broken as `fit` says.
fn dimensions(row: &Row, random: &mut Random, most: i64, fit: impl Fn(&Dimensions) -> bool) -> Option<Dimensions> {
    for _ in 0..2000 {
        let mut given = [1; MAX_DIMENSIONS];
        for (i, dimension) in row.dimensions.iter().enumerate() {
            let example = dimension.examples.iter().max().copied().unwrap_or(1);
            given[i] = match random.below(3) {
                0 if !dimension.examples.is_empty() => *random.pick(dimension.examples),
                1 => 1 + random.below(most.min(2 * example)),
                // Few, so that dimensions that must divide each other often do.
                _ => 1 + random.below(most.min(4)),
            };
            given[i] = fixed(row, dimension.from, random).unwrap_or(given[i]).clamp(dimension.least, dimension.most);
        }
        let dimensions = row.dimensions_from(|i| given[i]);
        let within = row.dimensions.iter().zip(&dimensions).all(|(d, size)| (d.least..=d.most).contains(size));
        if within && fit(&dimensions) {
            return Some(dimensions);
        }
    }
    None
}

fn product(shape: &[i64]) -> i64 {
    shape.iter().product()
}

fn small(row: &Row, dimensions: &Dimensions) -> bool {
    row.tensors().all(|(_, _, tensor)| product(&row.shape(tensor, dimensions)) <= MOST)
}

fn vector(tensor: &Tensor, dimensions: &Dimensions, dtype: DType) -> i64 {
    tensor.alignment.elements(dimensions, dtype.size()).max(1)
}

fn plans(row: &'static Row, random: &mut Random, dimensions: Dimensions) -> Plans {
    let mut types = vec![DType::U8; row.arguments.len()];
    // Those that follow another come after all that do not.
    for (i, _, tensor) in row.tensors() {
        let size = row.dimensions.iter().zip(&dimensions).find_map(|(dimension, &size)| {
            matches!(dimension.from, From::ElementSize(of) if of == i).then_some(size as usize)
        });
        let all = tensor.dtype.allowed(false).iter().copied();
        let all: Vec<_> = all.filter(|dtype| size.is_none_or(|size| dtype.size() == size)).collect();
        if !all.is_empty() {
            types[i] = *random.pick(&all);
        }
    }
    for (i, _, tensor) in row.tensors() {
        if let Dtype::As(other) = tensor.dtype {
            types[i] = types[other];
        }
    }
    let arguments = row.arguments.iter().enumerate().map(|(i, argument)| match &argument.kind {
        Kind::Tensor(tensor) if tensor.optional && random.chance(2) => Planned::Absent,
        Kind::Tensor(tensor) => Planned::Tensor(plan(row, random, tensor, &dimensions, types[i])),
        Kind::Positive => Planned::Number(*random.pick(&[1e-6, 1e-5, 0.05, 0.5])),
        Kind::NotNegative => Planned::Number(*random.pick(&[0.0, 0.3])),
        Kind::Between(least, most) => Planned::Number(least + (most - least) * random.uniform()),
        Kind::Whole(i64::MIN, i64::MAX) => Planned::Whole(random.below(1 << 40)),
        Kind::Whole(..) => Planned::Whole(row.whole(i, &dimensions).unwrap_or(0)),
        Kind::Word(words) => Planned::Word(words[random.below(words.len() as i64) as usize]),
        Kind::Missing(_) | Kind::Nothing => Planned::Absent,
        Kind::Switch if row.dimensions.iter().any(|d| matches!(d.from, From::Number(from) if from == i)) => {
            Planned::Bool(row.whole(i, &dimensions) == Some(1))
        }
        Kind::Switch => Planned::Bool(random.chance(2)),
        Kind::EnablePdl => Planned::Bool(random.chance(2)),
    });
    Plans { arguments: arguments.collect(), dimensions }
}

fn plan(row: &Row, random: &mut Random, tensor: &Tensor, dimensions: &Dimensions, dtype: DType) -> Plan {
    let shape = row.shape(tensor, dimensions);
    let (rank, vector) = (shape.len(), vector(tensor, dimensions, dtype));
    let mut strides = vec![1; rank];
    let mut order: Vec<usize> = (0..rank).collect();
    if let Strides::Rows | Strides::As(_) = tensor.strides {
        // The dimensions before the last in any order, with whole vectors between what they step over.
        for i in 0..rank - 1 {
            order.swap(i, i + random.below((rank - 1 - i) as i64) as usize);
        }
    }
    let mut next = 1;
    for &i in order.iter().rev() {
        strides[i] = next;
        next *= shape[i].max(1);
        if let Strides::Rows | Strides::As(_) = tensor.strides {
            next = (next + vector - 1) / vector * vector + vector * random.below(3);
            if i != rank - 1 && tensor.role == Role::In && random.chance(8) {
                strides[i] = 0;
            }
        }
    }
    Plan { dtype, shape, strides, start: vector * random.below(3), on_host: false }
}

impl Plan {
    /// How many elements there must be from the start of the memory on.
    fn len(&self) -> i64 {
        let last = self.shape.iter().zip(&self.strides).map(|(size, stride)| (size - 1).max(0) * stride.max(&0));
        self.start + last.sum::<i64>() + 1
    }

    /// Where each element lies, in row-major order.
    fn places(&self) -> Vec<usize> {
        let mut places = vec![self.start];
        for (&size, &stride) in self.shape.iter().zip(&self.strides) {
            places = places.iter().flat_map(|&place| (0..size).map(move |i| place + i * stride)).collect();
        }
        places.into_iter().map(|place| place as usize).collect()
    }
}

/// What a tensor is filled with.
fn contents(tensor: &Tensor, dimensions: &Dimensions, random: &mut Random, count: usize) -> Vec<f64> {
    let spread =
        |low: f64, high: f64, random: &mut Random| (0..count).map(|_| low + (high - low) * random.uniform()).collect();
    match tensor.contents {
        Contents::Uniform(x) => spread(-x, x, random),
        Contents::Between(low, high) => spread(low, high, random),
        Contents::Steps(least, most, step) => {
            (0..count).map(|_| (least + random.below(most - least + 1)) as f64 * step).collect()
        }
        Contents::Offsets(parts, whole) => {
            let (parts, whole) = (dimensions[parts].max(1), dimensions[whole]);
            (0..count as i64).map(|i| (whole * i / parts) as f64).collect()
        }
        Contents::Turns(among) => (0..count as i64).map(|i| (i % dimensions[among].max(1)) as f64).collect(),
        Contents::Distinct(columns) => {
            let columns = dimensions[columns].max(1);
            (0..count as i64).map(|i| (i % columns * 7919 % columns) as f64).collect()
        }
        Contents::Rounds(among) => (0..count as i64).map(|i| (i / dimensions[among].max(1)) as f64).collect(),
        Contents::Zeros => vec![0.0; count],
    }
}

fn encoded(value: f64, dtype: DType) -> Vec<u8> {
    match dtype {
        DType::F16 => f16::from_f64(value).to_le_bytes().to_vec(),
        DType::BF16 => bf16::from_f64(value).to_le_bytes().to_vec(),
        DType::F32 => (value as f32).to_le_bytes().to_vec(),
        DType::F64 => value.to_le_bytes().to_vec(),
        DType::I32 => (value as i32).to_le_bytes().to_vec(),
        DType::I64 => (value as i64).to_le_bytes().to_vec(),
        _ => vec![value as u8],
    }
}

fn decoded(bytes: &[u8], dtype: DType) -> f64 {
    match dtype {
        DType::F16 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f64(),
        DType::BF16 => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f64(),
        DType::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]).into(),
        DType::U8 => bytes[0].into(),
        DType::I32 => i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]).into(),
        DType::F8E4M3 => eight_bit(bytes[0], 3, 7),
        DType::F8E5M2 => eight_bit(bytes[0], 2, 15),
        other => panic!("{other} is nothing that a kernel writes here"),
    }
}

/// An 8-bit floating-point number by its bits.
fn eight_bit(byte: u8, mantissa: u32, bias: i32) -> f64 {
    let sign = if byte & 0x80 == 0 { 1.0 } else { -1.0 };
    let exponent = i32::from(byte >> mantissa & ((1 << (7 - mantissa)) - 1));
    let fraction = f64::from(byte & ((1 << mantissa) - 1)) / f64::from(1 << mantissa);
    match exponent {
        0 => sign * fraction * 2f64.powi(1 - bias),
        _ => sign * (1.0 + fraction) * 2f64.powi(exponent - bias),
    }
}

/// What a byte is that nobody wrote: as any of the types a number that no kernel computes here.
const UNWRITTEN: u8 = 0x7F;

/// A tensor's memory on both sides.
struct Memory {
    gpu: CudaSlice<u8>,
    host: Vec<u8>,
    /// Of the same elements, in the type that the reference computes with.
    host_plan: Plan,
}

impl Memory {
    fn new(gpu: &Gpu, tensor: &Tensor, plan: &Plan, dimensions: &Dimensions, random: &mut Random) -> Self {
        // Halves are computed as f32 on the host, so that nothing is rounded there.
        let half = matches!(plan.dtype, DType::F16 | DType::BF16);
        let host_plan = Plan { dtype: if half { DType::F32 } else { plan.dtype }, on_host: true, ..plan.clone() };
        let (size, host_size) = (plan.dtype.size(), host_plan.dtype.size());
        // More than it needs, so that a wrong view that was let through reads no foreign memory.
        let len = plan.len() as usize + 64;
        let (mut bytes, mut host) = (vec![UNWRITTEN; len * size], vec![UNWRITTEN; len * host_size]);
        if !matches!(tensor.role, Role::Out | Role::Unordered) {
            let places = plan.places();
            let values = contents(tensor, dimensions, random, places.len());
            for (&place, &value) in places.iter().zip(&values) {
                bytes[place * size..][..size].copy_from_slice(&encoded(value, plan.dtype));
                let rounded = if half { decoded(&bytes[place * size..], plan.dtype) } else { value };
                host[place * host_size..][..host_size].copy_from_slice(&encoded(rounded, host_plan.dtype));
            }
        }
        Self { gpu: gpu.stream.clone_htod(&bytes).unwrap(), host, host_plan }
    }
}

/// # Safety
/// `data` must be the start of a plan's memory, with room for all of its elements, for as long as the tensor is.
unsafe fn tensor<'a>(data: *mut c_void, plan: &Plan) -> TensorMut<'a> {
    let device = if plan.on_host { Device::Cpu } else { Device::Cuda(0) };
    let start = data.wrapping_byte_add(plan.start as usize * plan.dtype.size());
    // SAFETY: the caller's promise.
    unsafe { TensorMut::from_raw(start, device, plan.dtype, &plan.shape, Some(&plan.strides)) }.unwrap()
}

fn call<'a>(row: &'static Row, plans: &Plans, mut given: impl FnMut(usize, &Plan) -> TensorMut<'a>) -> Call<'a> {
    let arguments = plans.arguments.iter().enumerate().map(|(i, planned)| match planned {
        Planned::Tensor(plan) => Given::Tensor(given(i, plan)),
        Planned::Absent => Given::Absent,
        Planned::Number(value) => Given::Number(*value),
        Planned::Whole(value) => Given::Whole(*value),
        Planned::Word(word) => Given::Word(word),
        Planned::Bool(value) => Given::Bool(*value),
    });
    Call { row, arguments: arguments.collect() }
}

fn memories(gpu: &Gpu, row: &'static Row, plans: &Plans, random: &mut Random) -> Vec<Option<Memory>> {
    let memory =
        |(argument, planned): (&'static flashinfer_rs::contract::Argument, &Planned)| match (&argument.kind, planned) {
            (Kind::Tensor(spec), Planned::Tensor(plan)) => {
                Some(Memory::new(gpu, spec, plan, &plans.dimensions, &mut *random))
            }
            _ => None,
        };
    row.arguments.iter().zip(&plans.arguments).map(memory).collect()
}

/// Calls on the GPU with what was planned.
fn on_gpu(
    gpu: &Gpu,
    row: &'static Row,
    plans: &Plans,
    memories: &mut [Option<Memory>],
    function: Function,
) -> Result<()> {
    let mut call = call(row, plans, |i, plan| {
        let memory = memories[i].as_mut().unwrap();
        let data = match plan.on_host {
            true => memory.host.as_mut_ptr().cast(),
            false => memory.gpu.device_ptr(&gpu.stream).0 as *mut c_void,
        };
        // SAFETY: the memory is the plan's own, and lives until the stream was waited for.
        unsafe { tensor(data, plan) }
    });
    let result = function(&mut call, Stream::cudarc(&gpu.stream));
    drop(call);
    gpu.stream.synchronize().expect("the kernel ran");
    result
}

/// So many random calls that keep the row, on the GPU and on the host.
pub fn valid(gpu: &Gpu, row: &'static Row, cases: u64, function: Function) {
    for seed in 0..cases {
        let mut random = Random(seed);
        let fit = |dimensions: &Dimensions| keeps_relations(row, dimensions) && small(row, dimensions);
        let dimensions = dimensions(row, &mut random, 6000, fit).expect("sizes that keep the row");
        let plans = plans(row, &mut random, dimensions);
        named(row, seed, "valid", &plans, || compare(gpu, row, &plans, &mut random, function));
    }
}

/// Says which call it was where `test` fails.
fn named(row: &Row, seed: u64, what: &str, plans: &Plans, test: impl FnOnce()) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(test)) {
        eprintln!("{}, seed {seed}, {what}: {plans:#?}", row.kernel);
        std::panic::resume_unwind(panic);
    }
}

fn compare(gpu: &Gpu, row: &'static Row, plans: &Plans, random: &mut Random, function: Function) {
    let mut memories = memories(gpu, row, plans, random);
    on_gpu(gpu, row, plans, &mut memories, function).unwrap();
    let mut on_host = call(row, plans, |i, _| {
        let memory = memories[i].as_mut().unwrap();
        // SAFETY: the memory is the plan's own, and the host computes at once.
        unsafe { tensor(memory.host.as_mut_ptr().cast(), &memory.host_plan) }
    });
    function(&mut on_host, Stream::NULL).unwrap();
    drop(on_host);
    for (i, name, spec) in row.tensors() {
        let (Planned::Tensor(plan), Some(memory)) = (&plans.arguments[i], &memories[i]) else { continue };
        if spec.role == Role::Workspace {
            continue;
        }
        let bytes = gpu.stream.clone_dtoh(&memory.gpu).unwrap();
        let (size, host_size) = (plan.dtype.size(), memory.host_plan.dtype.size());
        let places = plan.places();
        let mut inside = vec![false; bytes.len() / size];
        places.iter().for_each(|&place| inside[place] = true);
        let between = bytes.chunks(size).zip(&inside).filter(|(_, inside)| !**inside);
        assert!(
            between.clone().all(|(bytes, _)| bytes.iter().all(|&b| b == UNWRITTEN)),
            "{name}: written between its rows"
        );
        if !spec.role.writes() || places.is_empty() {
            continue;
        }
        let found: Vec<_> = places.iter().map(|&at| decoded(&bytes[at * size..], plan.dtype) as f32).collect();
        let expected: Vec<_> =
            places.iter().map(|&at| decoded(&memory.host[at * host_size..], memory.host_plan.dtype) as f32).collect();
        let few = places.len() < 4096;
        if plan.dtype.size() == 1 {
            // What lies next to the middle of two numbers may fall to either side, by one step, also in many elements of a
            // tensor whose rows are short.
            let step =
                |&at: &usize| bytes[at].abs_diff(memory.host[at]) <= 1 || around_zero(bytes[at], memory.host[at]);
            assert!(places.iter().all(step), "{name}: off by more than a step");
            if few {
                continue;
            }
        }
        // In few elements no errors average out.
        let slack = if few { 2.0 } else { 1.0 };
        let tolerance = slack * row.tolerance[usize::from(lead_type(row, plans) == DType::F16)];
        let zeros = found.iter().chain(&expected).all(|x| *x == 0.0);
        let error = relative_error(&found, &expected);
        assert!(zeros || error <= tolerance, "{name}: relative error {error:.2e}, at most {tolerance:.0e}");
    }
}

/// Zeros of either sign, and what is next to them, are one step apart at the most too.
fn around_zero(a: u8, b: u8) -> bool {
    (a & 0x7F) + (b & 0x7F) <= 1
}

fn lead_type(row: &Row, plans: &Plans) -> DType {
    match &plans.arguments[row.lead] {
        Planned::Tensor(plan) => plan.dtype,
        _ => panic!("the lead is a tensor"),
    }
}

/// So many random calls that break the row in one place: each is refused by name, and nothing is launched.
pub fn invalid(gpu: &Gpu, row: &'static Row, cases: u64, function: Function) {
    let mut seen = std::collections::BTreeMap::new();
    for seed in 0..cases {
        let mut random = Random(seed);
        // Without empty dimensions, beside which strides and addresses mean nothing.
        let fit = |dimensions: &Dimensions| {
            !is_empty(row, dimensions) && keeps_relations(row, dimensions) && small(row, dimensions)
        };
        let dimensions = dimensions(row, &mut random, 600, fit).expect("sizes that keep the row");
        let mut plans = plans(row, &mut random, dimensions);
        let Some((what, name)) = broken(row, &mut random, &mut plans) else { continue };
        *seen.entry(what).or_insert(0) += 1;
        named(row, seed, what, &plans, || {
            let mut memories = memories(gpu, row, &plans, &mut random);
            let before: Vec<_> = memories
                .iter()
                .map(|memory| memory.as_ref().map(|memory| gpu.stream.clone_dtoh(&memory.gpu).unwrap()))
                .collect();
            let error = on_gpu(gpu, row, &plans, &mut memories, function).expect_err("it breaks the row");
            let FlashInferError::InvalidArgument { function, argument, .. } = &error else { panic!("{error}") };
            assert_eq!(*function, row.function);
            assert!(name.is_none_or(|name| name == *argument), "{error}, expected {name:?} to be named");
            let after = memories.iter().map(|memory| memory.as_ref().map(|m| gpu.stream.clone_dtoh(&m.gpu).unwrap()));
            assert!(after.eq(before), "refused, and launched all the same");
        });
    }
    println!("{}: refused {seen:?}", row.kernel);
    assert!(seen.len() >= 4, "{}: too few kinds of slips: {seen:?}", row.kernel);
}

/// Breaks one condition. Answers which, and the argument that must be named, where only one can be.
fn broken(row: &'static Row, random: &mut Random, plans: &mut Plans) -> Option<(&'static str, Option<&'static str>)> {
    let at = random.below(row.arguments.len() as i64) as usize;
    let name = row.arguments[at].name;
    let dimensions = plans.dimensions;
    match (&row.arguments[at].kind, &mut plans.arguments[at]) {
        (Kind::Positive, Planned::Number(value)) => {
            *value = *random.pick(&[0.0, -1.0, 1e-42, f64::NAN, f64::INFINITY, 1e300]);
            Some(("a number", Some(name)))
        }
        (Kind::NotNegative, Planned::Number(value)) => {
            *value = *random.pick(&[-1.0, 1e-42, f64::NAN, f64::INFINITY, 1e300]);
            Some(("a number", Some(name)))
        }
        (Kind::Between(least, most), Planned::Number(value)) => {
            *value = *random.pick(&[least - 1.0, most * 2.0 + 1.0, f64::NAN, f64::INFINITY]);
            Some(("a number", Some(name)))
        }
        (Kind::Tensor(spec), Planned::Tensor(plan)) => {
            let is_lead = at == row.lead;
            let elements = vector(spec, &dimensions, plan.dtype);
            let rank = plan.shape.len();
            let wide = (0..rank).filter(|&i| plan.shape[i] > 1).collect::<Vec<_>>();
            match random.below(7) {
                0 => {
                    plan.shape.insert(0, 1);
                    plan.strides.insert(0, 1);
                    // By a rank a function may choose another row.
                    let forms = kernels::rows().into_iter().filter(|other| other.function == row.function);
                    let alone = !is_lead && forms.count() == 1;
                    Some(("the rank", alone.then_some(name)))
                }
                1 => {
                    // A size of the tensor that decides a dimension makes another tensor wrong.
                    let i = random.below(rank as i64) as usize;
                    plan.shape[i] += 1;
                    let decides = row.dimensions.iter().any(|dimension| {
                        matches!(dimension.from, From::Shape(a, d) | From::OneLess(a, d) if (a, d) == (at, i))
                    });
                    // One that alone has a dimension, a workspace's bytes for example, may have more of it.
                    let shared = row.tensors().filter(|(_, _, other)| {
                        let has = |size: &flashinfer_rs::contract::Size| {
                            let mut moved = dimensions;
                            let of_this = |d: &Dimensions| spec.shape[i].of(d);
                            (0..MAX_DIMENSIONS).any(|j| {
                                moved[j] += 1;
                                let both =
                                    of_this(&moved) != of_this(&dimensions) && size.of(&moved) != size.of(&dimensions);
                                moved[j] -= 1;
                                both
                            })
                        };
                        other.shape.iter().any(has)
                    });
                    if decides && shared.count() < 2 {
                        return None;
                    }
                    Some(("a size", (!decides).then_some(name)))
                }
                2 => {
                    let allowed = spec.dtype.allowed(false);
                    let others = [DType::F64, DType::I32, DType::U8, DType::F32, DType::F16, DType::BF16];
                    let same = plan.dtype;
                    let other = others.into_iter().filter(|dtype| !allowed.contains(dtype) && *dtype != same);
                    let other: Vec<_> = other.collect();
                    plan.dtype = *random.pick(&other);
                    // What follows the lead is wrong too, and may come first.
                    Some(("the type", (!is_lead).then_some(name)))
                }
                3 => {
                    // A tensor that is alone may be anywhere.
                    if row.tensors().count() < 2 {
                        return None;
                    }
                    plan.on_host = true;
                    Some(("the device", (!is_lead).then_some(name)))
                }
                4 => {
                    let bytes = match spec.alignment {
                        Alignment::Bytes(bytes) => bytes,
                        Alignment::Vector { .. } | Alignment::Access { .. } => elements as usize * plan.dtype.size(),
                    };
                    if bytes <= plan.dtype.size() {
                        return None;
                    }
                    plan.start += 1 + random.below(elements - 1);
                    Some(("the address", Some(name)))
                }
                5 => {
                    let &i = wide.first()?;
                    match spec.strides {
                        // Of the first dimension with more than one index, a step that is no row-major one.
                        Strides::Contiguous => plan.strides[i] += elements,
                        Strides::Rows | Strides::As(_) if i == rank - 1 => plan.strides[i] = 2,
                        Strides::Rows | Strides::As(_) if elements > 1 => plan.strides[i] += 1,
                        Strides::Rows | Strides::As(_) => {
                            plan.strides[rank - 1] = if plan.shape[rank - 1] > 1 { 2 } else { return None }
                        }
                    }
                    Some(("a stride", Some(name)))
                }
                _ => {
                    let &i = wide.iter().find(|&&i| i != rank - 1)?;
                    if !spec.role.writes() || !matches!(spec.strides, Strides::Rows | Strides::As(_)) {
                        return None;
                    }
                    plan.strides[i] = 0;
                    Some(("a place for two elements", Some(name)))
                }
            }
        }
        _ => None,
    }
}

/// Sizes that break a relation or a limit, with tensors that are only claimed to be there, since nothing may be launched.
pub fn limits(row: &'static Row, cases: u64, function: Function) {
    let mut refused = std::collections::BTreeSet::new();
    for seed in 0..cases {
        let mut random = Random(seed);
        let breaks = |dimensions: &Dimensions| !is_empty(row, dimensions) && !keeps_relations(row, dimensions);
        let Some(dimensions) = dimensions_far(row, &mut random, breaks) else { continue };
        let plans = plans(row, &mut random, dimensions);
        let expected = row.relations.iter().find(|relation| !(relation.holds)(&dimensions)).unwrap().name;
        named(row, seed, expected, &plans, || {
            let mut call = call(row, &plans, |_, plan| {
                // SAFETY: none is read or written: the call is refused.
                unsafe { tensor((1usize << 40) as *mut c_void, plan) }
            });
            let error = function(&mut call, Stream::NULL).expect_err("it breaks a relation");
            assert!(
                matches!(error, FlashInferError::InvalidArgument { argument, .. } if argument == expected),
                "{error}, expected {expected} to be named"
            );
        });
        refused.insert(expected);
    }
    let all: std::collections::BTreeSet<_> = row.relations.iter().map(|relation| relation.name).collect();
    assert_eq!(refused, all, "{}: relations that were broken", row.kernel);
}

/// As [`dimensions`], of sizes far beyond the examples too.
fn dimensions_far(row: &Row, random: &mut Random, fit: impl Fn(&Dimensions) -> bool) -> Option<Dimensions> {
    for _ in 0..500 {
        let mut given = [1; MAX_DIMENSIONS];
        for (i, dimension) in row.dimensions.iter().enumerate() {
            let far = 10f64.powf(random.uniform() * 8.0) as i64;
            given[i] = match random.below(4) {
                0 if !dimension.examples.is_empty() => *random.pick(dimension.examples),
                1 => 1 + random.below(far),
                _ => 1 + random.below(4),
            };
            given[i] = fixed(row, dimension.from, random).unwrap_or(given[i]).clamp(dimension.least, dimension.most);
        }
        let dimensions = row.dimensions_from(|i| given[i]);
        // There is no tensor of more elements than 64 bits count.
        let counts = |tensor: &Tensor| {
            let shape = row.shape(tensor, &dimensions);
            shape.iter().try_fold(64i64, |product, size| product.checked_mul(*size)).is_some()
        };
        if row.tensors().all(|(_, _, tensor)| counts(tensor)) && fit(&dimensions) {
            return Some(dimensions);
        }
    }
    None
}
