//! Kernels: functions that implement a definition, bound to it and called.

use std::fmt;

use super::argument::{Argument, Destination, Operand};
use super::definition::{Axis, Definition, TensorSpec};
use super::distributed::DistributedKernel;
use super::dtype::DataType;
use super::error::unfit;
use super::json::{Document, shortened};
use super::place::allocated;
use super::solution::Solution;
use crate::error::{FlashInferError, Result};
use crate::ffi::dlpack::{self, DLDataType, DLTensor};
use crate::module::{Function, Module};
use crate::object::{Any, Arg, Array, FromAny, List, Tensor, TensorAllocator};
use crate::owner::ordered;
use crate::pinned::PinnedKernel;
use crate::runtime::FlashInferRuntime;
use crate::stream::{SCOPE, Scope, Setting, Stream};
use crate::tensor::{Device, MAX_NDIM, is_row_major};

/// A function that implements a definition, and how it gives its outputs.
#[derive(Debug, Clone)]
pub struct Kernel {
    function: Function,
    destination_passing: bool,
    definition: Option<String>,
    solution: Option<String>,
    /// How many arguments it takes, where it says so.
    arity: Option<usize>,
}

impl Kernel {
    /// A kernel of any function: one of a module, or a Rust closure (see [`Func`](crate::object::Func)). With
    /// `destination_passing` the function takes its outputs as arguments behind the inputs; without it returns them.
    pub fn new(function: Function, destination_passing: bool) -> Self {
        Self { function, destination_passing, definition: None, solution: None, arity: None }
    }

    /// As [`new`](Self::new), with the name, the definition and the calling style of a solution that the function was built of.
    pub fn of_solution(function: Function, solution: &Solution) -> Self {
        Self {
            definition: Some(solution.definition.clone()),
            solution: Some(solution.name.clone()),
            ..Self::new(function, solution.spec.is_destination_passing(solution.dialect()))
        }
    }

    /// Loads a kernel that was built, for good, from the very file whose digest was taken when the folder was read. Where no
    /// `solution.json` lies beside it, its outputs are arguments, as FlashInfer-Bench has it where nothing is said:
    /// [`with_destination_passing`](Self::with_destination_passing) says otherwise.
    ///
    /// # Safety
    /// As for [`Module::open`](crate::Module::open).
    ///
    /// # Errors
    /// As there; [`DigestMismatch`](FlashInferError::DigestMismatch) for a file that was changed since.
    pub unsafe fn load(kernel: &DistributedKernel) -> Result<Self> {
        // SAFETY: the caller's promise.
        let module = unsafe { Module::open_expecting(&kernel.library, &kernel.sha256) }?;
        let function = module.function(&kernel.entry_symbol)?;
        let arity = module.metadata(&kernel.entry_symbol)?.as_deref().and_then(arity);
        let loaded = match &kernel.solution {
            Some(solution) => Self::of_solution(function, solution),
            None => Self::new(function, true),
        };
        let (definition, solution) = (kernel.definition_name.clone(), kernel.solution_name.clone());
        Ok(Self { definition, solution, arity, ..loaded })
    }

    /// A kernel that was [pinned](PinnedKernel) when the program was built, loaded and checked as
    /// [`FlashInferRuntime::kernel`] does.
    ///
    /// # Errors
    /// As there, and [`FunctionMissing`](FlashInferError::FunctionMissing) where its lock names an entry that it does not have.
    pub fn pinned(kernel: &PinnedKernel) -> Result<Self> {
        let module = FlashInferRuntime::global()?.kernel(kernel.name)?;
        let function = module.function(kernel.entry)?;
        let arity = module.metadata(kernel.entry)?.as_deref().and_then(arity);
        Ok(Self {
            definition: Some(kernel.definition.to_owned()),
            solution: kernel.solution.map(str::to_owned),
            arity,
            ..Self::new(function, kernel.destination_passing_style.unwrap_or(true))
        })
    }

    /// The same kernel, whose outputs are arguments or results.
    #[must_use]
    pub fn with_destination_passing(self, destination_passing: bool) -> Self {
        Self { destination_passing, ..self }
    }

    /// The function.
    pub fn function(&self) -> &Function {
        &self.function
    }

    /// Whether its outputs are arguments, behind the inputs.
    pub fn is_destination_passing(&self) -> bool {
        self.destination_passing
    }

    /// The name of the definition that it says it implements, where it says so.
    pub fn definition_name(&self) -> Option<&str> {
        self.definition.as_deref()
    }

    /// The solution's name, where there is one; else the function's.
    pub fn name(&self) -> &str {
        self.solution.as_deref().unwrap_or(self.function.name())
    }

    /// Binds the kernel to a definition: from then on calls are compared with it. It takes some hundred nanoseconds and
    /// copies nothing, so it may be done for each call.
    ///
    /// # Errors
    /// [`Data`](FlashInferError::Data) for another definition than the kernel was made for, another number of arguments than
    /// the kernel says that it takes, an element type that is not known, an axis that is not there, and more than
    /// [`MAX_NDIM`] dimensions.
    pub fn bind<'a>(&'a self, definition: &'a Definition) -> Result<BoundKernel<'a>> {
        BoundKernel::new(self, definition)
    }
}

/// The number of arguments in a function's description: `{"type_schema": "…"}`, whose text lists the result and then the
/// parameters, under one name up to 0.1.6 and under two later.
fn arity(metadata: &str) -> Option<usize> {
    let outer = Document::parse("the metadata", metadata.as_bytes(), 1).ok()?;
    let schema = outer.root().get("type_schema")?.text().ok()?;
    let schema = Document::parse("the type schema", schema.as_bytes(), 1).ok()?;
    let root = schema.root();
    if let Some(named) = root.given("named_args") {
        return Some(named.get("params")?.items().ok()?.len());
    }
    root.given("args")?.items().ok()?.len().checked_sub(1)
}

/// What an argument must be, in numbers that are compared with a call's.
enum Expected {
    Tensor { dtype: DLDataType, rank: usize, axes: [u16; MAX_NDIM], optional: bool },
    Scalar { kind: Number, optional: bool },
}

/// What a scalar may be.
#[derive(Clone, Copy)]
enum Number {
    /// TVM-FFI makes a floating-point number of any.
    Float,
    /// Within these: a callee would cut off what does not fit its type.
    Int(i64, i64),
    Bool,
}

impl Number {
    fn of(dtype: &DataType) -> Option<Self> {
        match dtype {
            DataType::Bool => Some(Self::Bool),
            dtype if dtype.is_float() => Some(Self::Float),
            dtype => {
                let (code, bits, _) = dtype.dlpack()?;
                let shift = 64 - u32::from(bits);
                const UNSIGNED: u8 = 1;
                // A value has 64 bits with a sign, whatever the type.
                Some(match code {
                    UNSIGNED => Self::Int(0, (u64::MAX >> shift.max(1)) as i64),
                    _ => Self::Int(i64::MIN >> shift, i64::MAX >> shift),
                })
            }
        }
    }
}

/// A kernel with the definition that its calls are compared with.
pub struct BoundKernel<'a> {
    kernel: &'a Kernel,
    definition: &'a Definition,
    /// The inputs', and behind them the outputs'.
    expected: Vec<Expected>,
    /// Each axis's size, or [`OPEN`].
    sizes: Vec<i64>,
}

impl fmt::Debug for BoundKernel<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BoundKernel({} of {})", self.kernel.name(), self.definition.name)
    }
}

/// An axis whose size a call says.
const OPEN: i64 = -1;

/// As many arguments and axes have room on the stack.
const ON_STACK: usize = 24;

/// What is wrong with an argument, by its position among the inputs and outputs.
struct Misfit {
    position: usize,
    fault: Fault,
}

enum Fault {
    Kind,
    Dtype,
    Rank,
    Size(usize),
    Device,
    Layout,
    Number,
    Stream,
}

/// Where a call runs.
#[derive(Clone, Copy)]
struct Ran {
    device: Option<u64>,
    /// Whether a tensor's owner wants the call to be ordered with its other uses.
    ordered: bool,
}

impl<'a> BoundKernel<'a> {
    fn new(kernel: &'a Kernel, definition: &'a Definition) -> Result<Self> {
        if let Some(own) = kernel.definition.as_deref().filter(|own| *own != definition.name) {
            return Err(unfit(
                &format!("the kernel {:?}", shortened(kernel.name())),
                "its definition",
                format!("{:?}", shortened(&definition.name)),
                format!("{:?}, which it was made for", shortened(own)),
                "bind it to its own definition, or make a Kernel of its function",
            ));
        }
        let (inputs, outputs) = (definition.inputs.len(), definition.outputs.len());
        let arguments = inputs + if kernel.destination_passing { outputs } else { 0 };
        if let Some(arity) = kernel.arity.filter(|arity| *arity != arguments) {
            return Err(unfit(
                &format!("the kernel {:?}", shortened(kernel.name())),
                "its arguments",
                format!("{arity}, by its metadata"),
                format!("{arguments}: {inputs} inputs, {outputs} outputs"),
                "check the definition, and whether outputs are arguments (destination_passing_style)",
            ));
        }
        let mut sizes = Vec::with_capacity(definition.axes.len());
        for (name, axis) in definition.axes.iter() {
            sizes.push(match axis {
                Axis::Const { value, .. } => i64::try_from(*value).map_err(|_| {
                    let (found, place) = (value.to_string(), format!("the axis {:?}", shortened(name)));
                    unfit("the definition", place, found, "a size of 63 bits", "correct the size")
                })?,
                Axis::Var { .. } => OPEN,
            });
        }
        let mut expected = Vec::with_capacity(inputs + outputs);
        for (name, spec) in definition.inputs.iter() {
            expected.push(Expected::of(definition, name, spec, false)?);
        }
        for (name, spec) in definition.outputs.iter() {
            expected.push(Expected::of(definition, name, spec, true)?);
        }
        Ok(Self { kernel, definition, expected, sizes })
    }

    /// The kernel.
    pub fn kernel(&self) -> &'a Kernel {
        self.kernel
    }

    /// The definition.
    pub fn definition(&self) -> &'a Definition {
        self.definition
    }

    /// Calls a kernel whose outputs are arguments, with the definition's inputs and outputs in its order. It is queued on
    /// `stream`, which is [`Stream::NULL`] for tensors on the host.
    ///
    /// Compared with the definition are the arguments' number, what each is, element types, ranks, constant axes, and
    /// variable axes with each other; and that all tensors are contiguous and on one device. Tensors over cudarc's buffers
    /// are ordered with their other uses, as in a call of a kernel of this crate's. A kernel that asks for scratch memory
    /// wants the call to be within [`FlashInferRuntime::with_allocator`].
    ///
    /// # Errors
    /// [`Data`](FlashInferError::Data) for what does not fit, before anything runs, and for a kernel that returns its outputs;
    /// [`TvmFfiCall`](FlashInferError::TvmFfiCall) with what the kernel raised; [`Cuda`](FlashInferError::Cuda) and
    /// [`ContextLost`](FlashInferError::ContextLost) for a launch that failed.
    ///
    /// # Safety
    /// The kernel must be sound to call with arguments that fit the definition, on this thread, and with what is in these
    /// tensors where that steers what it reads and writes; it may keep none of the tensors that are lent. `stream` must be
    /// of the tensors' device, their memory must stay valid until what was queued has run, and nothing else may use the
    /// outputs meanwhile.
    #[inline]
    pub unsafe fn call(&self, inputs: &[Argument<'_>], outputs: &[Destination<'_>], stream: Stream<'_>) -> Result<()> {
        if !self.kernel.destination_passing {
            return Err(self.refused("its outputs", "places for them", "none: it returns them", RETURNS));
        }
        // SAFETY: the caller's promise.
        unsafe { self.run(inputs, outputs, stream) }.map(drop)
    }

    /// Calls a kernel and answers its outputs: those that it returns, or those that it is given, which the allocator then makes
    /// on the inputs' device, not initialized on a GPU. On a GPU the allocator must be of `stream`.
    ///
    /// # Errors
    /// As for [`call`](Self::call); what the allocator answers; and [`Data`](FlashInferError::Data) for results that are not
    /// the definition's outputs.
    ///
    /// # Safety
    /// As for [`call`](Self::call).
    pub unsafe fn call_returning(
        &self,
        inputs: &[Argument<'_>],
        allocator: &dyn TensorAllocator,
        stream: Stream<'_>,
    ) -> Result<Vec<Tensor>> {
        // SAFETY: the caller's promise.
        let outputs = unsafe { self.call_unchecked(inputs, allocator, stream) }?;
        let mut sizes = self.sizes.clone();
        let mut ran = Ran { device: None, ordered: false };
        // Which fit, since they were called with.
        let _ = self.fit(inputs.iter().map(|input| &input.0), 0, &mut sizes, &mut ran, stream);
        let operands: Vec<_> = outputs.iter().map(Operand::Object).collect();
        match self.fit(operands.iter(), self.definition.inputs.len(), &mut sizes, &mut ran, stream) {
            Ok(()) => Ok(outputs),
            Err(misfit) => {
                Err(self.explain(&misfit, &operands[misfit.position - self.definition.inputs.len()], &sizes))
            }
        }
    }

    /// As [`call_returning`](Self::call_returning), with results of any shape and element type.
    ///
    /// # Safety
    /// As there.
    pub(super) unsafe fn call_unchecked(
        &self,
        inputs: &[Argument<'_>],
        allocator: &dyn TensorAllocator,
        stream: Stream<'_>,
    ) -> Result<Vec<Tensor>> {
        let runtime = FlashInferRuntime::global()?;
        if self.kernel.destination_passing {
            let outputs = self.make_outputs(inputs, stream, allocator)?;
            let destinations: Vec<_> = outputs.iter().map(Destination::from).collect();
            // SAFETY: the caller's promise; the outputs are new.
            runtime.with_allocator(allocator, || unsafe { self.run(inputs, &destinations, stream) })??;
            return Ok(outputs);
        }
        // SAFETY: the caller's promise.
        let result = runtime.with_allocator(allocator, || unsafe { self.run(inputs, &[], stream) })??;
        self.results(result)
    }

    /// The sizes of the variable axes by a call's inputs, in the definition's order.
    pub(super) fn variable_sizes(&self, inputs: &[Argument<'_>], stream: Stream<'_>) -> Result<Vec<i64>> {
        let mut sizes = self.sizes.clone();
        let mut ran = Ran { device: None, ordered: false };
        self.check(inputs, (&[], 0), &mut sizes, &mut ran, stream)?;
        let variable = sizes.iter().zip(&self.sizes).filter(|(_, before)| **before == OPEN);
        Ok(variable.map(|(size, _)| *size).collect())
    }

    /// A tensor for each output, by the inputs' axes and on their device.
    pub(super) fn make_outputs(
        &self,
        inputs: &[Argument<'_>],
        stream: Stream<'_>,
        allocator: &dyn TensorAllocator,
    ) -> Result<Vec<Tensor>> {
        let mut sizes = self.sizes.clone();
        let mut ran = Ran { device: None, ordered: false };
        self.check(inputs, (&[], 0), &mut sizes, &mut ran, stream)?;
        let device = ran.device.map_or(Device::Cpu, device_of);
        let expected = &self.expected[self.definition.inputs.len()..];
        let made = self.definition.outputs.names().zip(expected).map(|(name, expected)| {
            let Expected::Tensor { dtype, rank, axes, .. } = expected else {
                unreachable!("an output is a tensor: see Expected::of")
            };
            let mut shape = [0; MAX_NDIM];
            for (size, &axis) in shape.iter_mut().zip(&axes[..*rank]) {
                *size = sizes[usize::from(axis)];
                if *size == OPEN {
                    let (place, found) = (format!("output {name:?}"), format!("the axis {:?}", self.axis(axis)));
                    let remedy = "add the axis to an input's shape, or give the outputs";
                    return Err(unfit(&self.what(), place, found, "axes that inputs have", remedy));
                }
            }
            allocated(allocator, device, stream, *dtype, &shape[..*rank])
        });
        made.collect()
    }

    /// The tensors that a call returned.
    fn results(&self, result: Any) -> Result<Vec<Tensor>> {
        let (expected, kind) = (self.definition.outputs.len(), result.kind().into_owned());
        let wrong = |found: String| {
            let expected = match expected {
                1 => "a tensor".to_owned(),
                count => format!("an array of {count} tensors"),
            };
            self.refused("its result", found, expected, "correct the kernel, or the definition's outputs")
        };
        let items = match Tensor::from_any(result) {
            Ok(tensor) => vec![tensor.into()],
            Err(other) if other.is_none() => Vec::new(),
            Err(other) => match Array::from_any(other) {
                Ok(array) => array.iter().collect(),
                Err(other) => List::from_any(other).map_err(|_| wrong(format!("of type {kind}")))?.to_vec()?,
            },
        };
        if items.len() != expected {
            return Err(wrong(format!("{} values", items.len())));
        }
        let tensors = items.into_iter().map(|item| {
            Tensor::from_any(item).map_err(|other| wrong(format!("a value of type {} among them", other.kind())))
        });
        tensors.collect()
    }

    /// # Safety
    /// As for [`call`](Self::call).
    #[inline]
    unsafe fn run(&self, inputs: &[Argument<'_>], outputs: &[Destination<'_>], stream: Stream<'_>) -> Result<Any> {
        let (axes, count) = (self.sizes.len(), inputs.len() + outputs.len());
        let (mut small_sizes, mut small_args) = ([0; ON_STACK], [Arg::NONE; ON_STACK]);
        let (mut large_sizes, mut large_args);
        let sizes = match axes <= ON_STACK {
            true => &mut small_sizes[..axes],
            false => {
                large_sizes = vec![0; axes];
                &mut large_sizes[..]
            }
        };
        let args = match count <= ON_STACK {
            true => &mut small_args[..count],
            false => {
                large_args = vec![Arg::NONE; count];
                &mut large_args[..]
            }
        };
        sizes.copy_from_slice(&self.sizes);
        let mut ran = Ran { device: None, ordered: false };
        let places = if self.kernel.destination_passing { self.definition.outputs.len() } else { 0 };
        self.check(inputs, (outputs, places), sizes, &mut ran, stream)?;
        let operands = inputs.iter().map(|input| &input.0).chain(outputs.iter().map(|output| &output.0));
        for (arg, operand) in args.iter_mut().zip(operands) {
            *arg = operand.arg();
        }
        match ran.device.map(device_of) {
            // SAFETY: the caller's promise.
            None | Some(Device::Cpu) => unsafe { self.kernel.function.call_any(args) },
            Some(Device::Cuda(device)) => {
                let mut answer = Any::NONE;
                let mut launch = || {
                    // SAFETY: the caller's promise.
                    answer = unsafe { self.launch(args, device, stream) }?;
                    Ok(())
                };
                if ran.ordered {
                    let inputs = inputs.iter().filter_map(|input| Some(("input", input.0.owner()?)));
                    let outputs = outputs.iter().filter_map(|output| Some(("output", output.0.owner()?)));
                    ordered("a bound kernel", inputs.chain(outputs), launch)?;
                } else {
                    launch()?;
                }
                Ok(answer)
            }
        }
    }

    /// Calls the function on its device and stream, and looks at what came of it.
    ///
    /// # Safety
    /// As for [`call`](Self::call).
    unsafe fn launch(&self, args: &[Arg<'_>], device: u32, stream: Stream<'_>) -> Result<Any> {
        let runtime = FlashInferRuntime::global()?;
        let id = runtime.checked_device(Device::Cuda(device))?;
        let cudart = runtime.cudart()?;
        let _stream = runtime.set_stream(id, stream).map_err(|code| runtime.api().stream_error(code))?;
        // For what the kernel calls of this crate's.
        let _scope = Scope { outer: SCOPE.replace(Setting { device: id, stream: stream.raw }) };
        // A kernel launches on the current device, which nobody sets for it.
        let _current = if runtime.has_one_device() { None } else { Some(cudart.set_current(id)?) };
        // What another call of this thread left is not the kernel's.
        cudart.forget_stale_error();
        // SAFETY: the caller's promise.
        let result = unsafe { self.kernel.function.call_any(args) };
        let last = cudart.last_error();
        let error = match result {
            Ok(answer) if last == 0 => return Ok(answer),
            Ok(_) => cudart.error("a kernel's launch", last),
            Err(error) => error,
        };
        cudart.forget_stale_error();
        Err(runtime.diagnosed(error, id, last, stream))
    }

    /// That a call's arguments fit, with so many outputs among them. It says the variable axes' sizes.
    #[inline(always)]
    fn check(
        &self,
        inputs: &[Argument<'_>],
        (outputs, places): (&[Destination<'_>], usize),
        sizes: &mut [i64],
        ran: &mut Ran,
        stream: Stream<'_>,
    ) -> Result<()> {
        let count = self.definition.inputs.len();
        if inputs.len() != count {
            return Err(self.another_number("inputs", inputs.len(), count));
        }
        if outputs.len() != places {
            return Err(self.another_number("outputs", outputs.len(), places));
        }
        if let Err(misfit) = self.fit(inputs.iter().map(|input| &input.0), 0, sizes, ran, stream) {
            return Err(self.explain(&misfit, &inputs[misfit.position].0, sizes));
        }
        if let Err(misfit) = self.fit(outputs.iter().map(|output| &output.0), count, sizes, ran, stream) {
            return Err(self.explain(&misfit, &outputs[misfit.position - count].0, sizes));
        }
        Ok(())
    }

    #[inline(always)]
    fn fit<'o, 'p: 'o>(
        &self,
        operands: impl Iterator<Item = &'o Operand<'p>>,
        first: usize,
        sizes: &mut [i64],
        ran: &mut Ran,
        stream: Stream<'_>,
    ) -> std::result::Result<(), Misfit> {
        for (at, (expected, operand)) in self.expected[first..].iter().zip(operands).enumerate() {
            expected.fit(operand, sizes, ran, stream).map_err(|fault| Misfit { position: first + at, fault })?;
        }
        Ok(())
    }

    fn what(&self) -> String {
        format!("the call of {:?}", shortened(self.kernel.name()))
    }

    fn axis(&self, axis: u16) -> &str {
        self.definition.axes.names().nth(axis.into()).unwrap_or_default()
    }

    #[cold]
    fn refused(
        &self,
        place: &str,
        found: impl Into<String>,
        expected: impl Into<String>,
        remedy: &'static str,
    ) -> FlashInferError {
        unfit(&self.what(), place, found, expected, remedy)
    }

    #[cold]
    fn another_number(&self, what: &str, found: usize, expected: usize) -> FlashInferError {
        let expected = format!("{expected}, those of {:?}", shortened(&self.definition.name));
        self.refused(what, found.to_string(), expected, "pass one for each, in the definition's order")
    }

    #[cold]
    fn explain(&self, misfit: &Misfit, operand: &Operand<'_>, sizes: &[i64]) -> FlashInferError {
        let (count, definition) = (self.definition.inputs.len(), self.definition);
        let (kind, at, specs) = match misfit.position.checked_sub(count) {
            Some(at) => ("output", at, &definition.outputs),
            None => ("input", misfit.position, &definition.inputs),
        };
        let Some((name, spec)) = specs.iter().nth(at) else {
            return self.another_number(kind, misfit.position, count);
        };
        let place = format!("{kind} {:?}", shortened(name));
        let found = describe(operand);
        let shape = spec.shape.iter().flatten().map(|axis| {
            let at = definition.axes.names().position(|name| name == axis);
            match at.and_then(|at| sizes.get(at)) {
                Some(&size) if size != OPEN => format!("{axis} = {size}"),
                _ => axis.clone(),
            }
        });
        let tensor = format!("{}[{}]", spec.dtype, shape.collect::<Vec<_>>().join(", "));
        let (expected, remedy) = match misfit.fault {
            Fault::Kind if spec.shape.is_some() || kind == "output" => (tensor, "pass a tensor"),
            Fault::Kind => (format!("a scalar of {}", spec.dtype), "pass a number"),
            Fault::Dtype => (tensor, "convert the tensor, or use a definition of its type"),
            Fault::Rank => (tensor, "give the tensor the shape that the definition says"),
            Fault::Size(dimension) => {
                (format!("{tensor}, which differs in dimension {dimension}"), "give the tensor the definition's shape")
            }
            Fault::Device => ("a tensor on the other tensors' device, the host or a GPU".to_owned(), "copy it there"),
            Fault::Layout => {
                ("contiguous, row-major memory, and an offset of 0".to_owned(), "copy it: kernels look at neither")
            }
            Fault::Number => (format!("a number that {} has", spec.dtype), "pass one that fits"),
            Fault::Stream => ("a tensor for the call's stream".to_owned(), "make the tensor for that stream"),
        };
        unfit(&self.what(), place, found, expected, remedy)
    }
}

const RETURNS: &str = "use call_returning, or Kernel::with_destination_passing";

fn device_of(bits: u64) -> Device {
    let device = dlpack::DLDevice { device_type: bits as u32 as i32, device_id: (bits >> 32) as u32 as i32 };
    // What is compared is one of these.
    Device::from_dl(device).unwrap_or(Device::Cpu)
}

fn describe(operand: &Operand<'_>) -> String {
    let Some(tensor) = operand.tensor() else {
        return match operand {
            Operand::Int(number) => format!("the whole number {number}"),
            Operand::Float(number) => format!("the number {number:?}"),
            Operand::Bool(flag) => flag.to_string(),
            _ => "nothing".to_owned(),
        };
    };
    let dtype = match DataType::from_dlpack(tensor.dtype) {
        Some(dtype) => dtype.to_string(),
        None => format!("{:?}", tensor.dtype),
    };
    let device = match Device::from_dl(tensor.device) {
        Some(device) => device.to_string(),
        None => format!("DLPack device type {}", tensor.device.device_type),
    };
    let strides = match dimensions(tensor.strides, tensor.ndim) {
        Some(strides) if !is_contiguous(tensor) => format!(" strided {strides:?}"),
        _ => String::new(),
    };
    let offset = if tensor.byte_offset == 0 { String::new() } else { format!(" at byte {}", tensor.byte_offset) };
    format!("{dtype}{:?}{strides}{offset} on {device}", dimensions(tensor.shape, tensor.ndim).unwrap_or_default())
}

/// A tensor's sizes or strides.
#[inline(always)]
fn dimensions<'a>(of: *const i64, ndim: i32) -> Option<&'a [i64]> {
    match usize::try_from(ndim) {
        Ok(0) => Some(&[]),
        // SAFETY: the tensor of an operand has as many of both as it has dimensions, which live as long as what is
        // borrowed; this is only called with those.
        Ok(ndim) if !of.is_null() => Some(unsafe { std::slice::from_raw_parts(of, ndim) }),
        _ => None,
    }
}

/// Whether a tensor's elements lie one after the other in row-major order.
#[inline(always)]
fn is_contiguous(tensor: &DLTensor) -> bool {
    match (dimensions(tensor.shape, tensor.ndim), dimensions(tensor.strides, tensor.ndim)) {
        (Some(shape), Some(strides)) => is_row_major(shape, strides),
        // No strides are those of row-major memory.
        _ => true,
    }
}

impl Expected {
    fn of(definition: &Definition, name: &str, spec: &TensorSpec, output: bool) -> Result<Self> {
        let refuse = |found: String, expected: &str, remedy| {
            let what = format!("the definition {:?}", shortened(&definition.name));
            Err(unfit(&what, format!("the shape of {:?}", shortened(name)), found, expected, remedy))
        };
        let optional = spec.optional;
        let Some(dtype) = spec.dtype.to_dl() else {
            let found = format!("the element type {:?}", shortened(spec.dtype.name()));
            return refuse(found, "one that DLPack has", "correct the element type");
        };
        let names = match (&spec.shape, output) {
            (Some(names), _) => names.as_slice(),
            // An output that is a scalar is given as a tensor of one element.
            (None, true) => &[],
            (None, false) => {
                let kind = Number::of(&spec.dtype).unwrap_or(Number::Float);
                return Ok(Self::Scalar { kind, optional });
            }
        };
        if names.len() > MAX_NDIM {
            return refuse(format!("{} dimensions", names.len()), "at most 6", "this crate has no tensors of more");
        }
        let mut axes = [0; MAX_NDIM];
        for (at, axis) in axes.iter_mut().zip(names) {
            let known = definition.axes.names().position(|known| known == axis);
            match known.and_then(|known| u16::try_from(known).ok()) {
                Some(known) => *at = known,
                None => {
                    let found = format!("the axis {:?}", shortened(axis));
                    return refuse(
                        found,
                        "one of the definition's first 65,536 axes",
                        "add the axis to the definition",
                    );
                }
            }
        }
        Ok(Self::Tensor { dtype, rank: names.len(), axes, optional })
    }

    #[inline(always)]
    fn fit(
        &self,
        operand: &Operand<'_>,
        sizes: &mut [i64],
        ran: &mut Ran,
        stream: Stream<'_>,
    ) -> std::result::Result<(), Fault> {
        let (dtype, rank, axes) = match self {
            Self::Tensor { optional: true, .. } | Self::Scalar { optional: true, .. }
                if matches!(operand, Operand::Absent) =>
            {
                return Ok(());
            }
            Self::Tensor { dtype, rank, axes, .. } => (*dtype, *rank, axes),
            Self::Scalar { kind, .. } => return kind.fit(operand),
        };
        let Some(tensor) = operand.tensor() else { return Err(Fault::Kind) };
        if tensor.dtype.bits() != dtype.bits() {
            return Err(Fault::Dtype);
        }
        let shape = match dimensions(tensor.shape, tensor.ndim) {
            Some(shape) if shape.len() == rank => shape,
            _ => return Err(Fault::Rank),
        };
        for (dimension, (&size, &axis)) in shape.iter().zip(axes).enumerate() {
            let known = &mut sizes[usize::from(axis)];
            if *known == OPEN {
                *known = size;
            } else if *known != size {
                return Err(Fault::Size(dimension));
            }
        }
        let device = tensor.device.bits();
        if *ran.device.get_or_insert(device) != device
            || !matches!(tensor.device.device_type, dlpack::CPU | dlpack::CUDA)
        {
            return Err(Fault::Device);
        }
        if !is_contiguous(tensor) || tensor.byte_offset != 0 {
            return Err(Fault::Layout);
        }
        if let Operand::Lent(lent) = operand {
            if lent.stream.is_some_and(|own| own != stream.raw) {
                return Err(Fault::Stream);
            }
            ran.ordered |= lent.owner.orders();
        }
        Ok(())
    }
}

impl Number {
    #[inline(always)]
    fn fit(self, operand: &Operand<'_>) -> std::result::Result<(), Fault> {
        match (self, operand) {
            (Self::Float, Operand::Float(_) | Operand::Int(_) | Operand::Bool(_)) => Ok(()),
            (Self::Int(least, most), Operand::Int(number)) if (least..=most).contains(number) => Ok(()),
            (Self::Int(..) | Self::Bool, Operand::Bool(_)) => Ok(()),
            (Self::Bool, Operand::Int(0 | 1)) => Ok(()),
            (Self::Int(..) | Self::Bool, Operand::Int(_)) => Err(Fault::Number),
            _ => Err(Fault::Kind),
        }
    }
}
