//! Running workloads: a kernel is checked by a reference, timed, and what came of it is a trace.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::argument::{Argument, Destination};
use super::constraint::Verdict;
use super::definition::Definition;
use super::error::unfit;
use super::inputs::{Input, InputOptions};
use super::json::shortened;
use super::judge::{BenchmarkConfig, Judgement, Timing, Tolerance, check_solution};
use super::kernel::BoundKernel;
use super::named::Named;
use super::place::{Place, stopped};
use super::tensor::HostTensor;
use super::trace::{Environment, Evaluation, Performance, Status, Trace, Workload, timestamp};
use crate::error::Result;
use crate::object::{HostAllocator, Tensor};
use crate::runtime::FlashInferRuntime;
use crate::tensor::Device;

/// What outputs are filled with before a call: no number in any floating-point type, so that what a kernel forgets is seen.
const UNWRITTEN: u8 = 0xFF;

/// What is written before each call that is timed on a GPU, so that no cache holds an input: more than any has.
#[cfg(feature = "cudarc")]
const FLUSH_BYTES: usize = 256 << 20;

/// What outputs are compared with.
pub enum Reference<'r> {
    /// A function on host tensors: given the inputs in the definition's order, it answers the outputs. Its time is that of the
    /// calls that the outputs are compared with, by the clock.
    Closure(&'r mut dyn FnMut(&Named<Input>) -> Result<Vec<HostTensor>>),
    /// Another kernel of the definition, run in the same place and timed in the same way.
    Kernel(&'r BoundKernel<'r>),
}

impl fmt::Debug for Reference<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closure(_) => f.write_str("Reference::Closure"),
            Self::Kernel(kernel) => write!(f, "Reference::Kernel({kernel:?})"),
        }
    }
}

/// Runs kernels with workloads, on the host or on a GPU's stream.
pub struct Runner {
    place: Place,
    config: BenchmarkConfig,
    tolerance: Option<Tolerance>,
    options: InputOptions,
    root: PathBuf,
}

impl fmt::Debug for Runner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let device = self.place.device();
        f.debug_struct("Runner").field("device", &device).field("config", &self.config).finish_non_exhaustive()
    }
}

/// What a kernel is called with, where it runs.
struct Prepared {
    inputs: Vec<Held>,
    /// The places of outputs, of a kernel that is given them.
    outputs: Vec<Tensor>,
}

enum Held {
    Tensor(Tensor),
    Plain(Argument<'static>),
}

impl Prepared {
    fn inputs(&self) -> Vec<Argument<'_>> {
        fn argument(held: &Held) -> Argument<'_> {
            match held {
                Held::Tensor(tensor) => tensor.into(),
                Held::Plain(argument) => *argument,
            }
        }
        self.inputs.iter().map(argument).collect()
    }

    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let inputs = self.inputs.iter().filter_map(|held| match held {
            Held::Tensor(tensor) => Some(tensor),
            Held::Plain(_) => None,
        });
        inputs.chain(&self.outputs)
    }
}

impl Runner {
    fn new(place: Place) -> Self {
        let (config, options) = (BenchmarkConfig::default(), InputOptions::default());
        Self { place, config, tolerance: None, options, root: PathBuf::from(".") }
    }

    /// A runner on the host, whose times are the clock's.
    pub fn on_host() -> Self {
        Self::new(Place::Host(HostAllocator))
    }

    /// A runner on a GPU's stream, whose times are those between CUDA's events.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for a stream that captures, or of a context that is not its
    /// device's primary one.
    #[cfg(feature = "cudarc")]
    pub fn on_stream(stream: &std::sync::Arc<cudarc::driver::CudaStream>) -> Result<Self> {
        Ok(Self::new(Place::Gpu(super::place::gpu::Gpu::new(stream)?)))
    }

    /// With this configuration instead of upstream's default.
    #[must_use]
    pub fn config(self, config: BenchmarkConfig) -> Self {
        Self { config, ..self }
    }

    /// With this tolerance instead of [upstream's](Tolerance::of).
    #[must_use]
    pub fn tolerance(self, tolerance: Tolerance) -> Self {
        Self { tolerance: Some(tolerance), ..self }
    }

    /// With inputs that are made so.
    #[must_use]
    pub fn inputs(self, options: InputOptions) -> Self {
        Self { options, ..self }
    }

    /// With the folder of the dataset, which the paths of stored inputs are relative to.
    #[must_use]
    pub fn root(self, root: impl AsRef<Path>) -> Self {
        Self { root: root.as_ref().to_path_buf(), ..self }
    }

    /// Where it runs.
    pub fn device(&self) -> Device {
        self.place.device()
    }

    /// The hardware's name, and the versions of this crate, of TVM-FFI, and on a GPU of the CUDA that the driver supports.
    pub fn environment(&self) -> Environment {
        self.place.environment()
    }

    /// Calls a kernel once with inputs of the definition's order, and answers its outputs.
    ///
    /// # Errors
    /// As for [`BoundKernel::call`], and what it takes to bring tensors there and back.
    ///
    /// # Safety
    /// As for [`BoundKernel::call`].
    pub unsafe fn call(&self, kernel: &BoundKernel<'_>, inputs: &Named<Input>) -> Result<Vec<HostTensor>> {
        let prepared = self.prepare(kernel, inputs)?;
        // SAFETY: the caller's promise.
        let outputs = unsafe { self.call_prepared(kernel, &prepared) }?;
        self.take(&outputs)
    }

    /// Times a kernel with inputs of the definition's order, in milliseconds for a call.
    ///
    /// # Errors
    /// As for [`call`](Self::call).
    ///
    /// # Safety
    /// As for [`BoundKernel::call`], also for a series of calls with the same inputs.
    pub unsafe fn time(&self, kernel: &BoundKernel<'_>, inputs: &Named<Input>, timing: Timing) -> Result<f64> {
        let prepared = self.prepare(kernel, inputs)?;
        // SAFETY: the caller's promise.
        unsafe { self.time_prepared(kernel, &prepared, timing) }
    }

    /// Runs a workload as upstream's benchmark does: makes its inputs, once for each trial; calls the reference and the kernel;
    /// compares; and times the kernel where it passed.
    ///
    /// Whatever the kernel does wrong is the trace's status, with the reason in its log. Outputs are filled with what is no
    /// number before a call, where upstream leaves them as they come.
    ///
    /// A kernel that never ends is not stopped. One that breaks the GPU's context ends what this process can do there: its
    /// trace says so, and the next run is an error.
    ///
    /// # Errors
    /// What is wrong with the workload or its files, or breaks a constraint of the definition; what the reference answers; and
    /// what it takes to bring the inputs where they are used.
    ///
    /// # Safety
    /// As for [`BoundKernel::call`], also for the reference, with what the workload has.
    pub unsafe fn run(
        &self,
        kernel: &BoundKernel<'_>,
        workload: &Workload,
        mut reference: Reference<'_>,
    ) -> Result<Trace> {
        let definition = kernel.definition();
        let tolerance = self.tolerance.unwrap_or_else(|| Tolerance::of(definition));
        let other = match &reference {
            Reference::Closure(_) => None,
            Reference::Kernel(other) => Some(*other),
        };
        // What is nobody's fault but the workload's or the machine's.
        let mut broken = None;
        let call = |inputs: &Named<Input>| {
            let ready = fit(definition, workload, inputs).and_then(|()| self.prepare(kernel, inputs));
            let ready = ready.map_err(|error| {
                broken = Some(error);
                stopped()
            })?;
            // SAFETY: the caller's promise.
            let outputs = unsafe { self.call_prepared(kernel, &ready) }?;
            self.take(&outputs)
        };
        let mut clock = Vec::new();
        let mut answer = |inputs: &Named<Input>| {
            fit(definition, workload, inputs)?;
            match &mut reference {
                Reference::Closure(closure) => {
                    let start = Instant::now();
                    let outputs = closure(inputs);
                    clock.push(start.elapsed().as_secs_f64() * 1e3);
                    outputs
                }
                // SAFETY: the caller's promise.
                Reference::Kernel(other) => unsafe { self.call(other, inputs) },
            }
        };
        let with = (&self.config, &tolerance);
        let judged = check_solution(definition, workload, &self.root, with, &self.options, call, &mut answer);
        if let Some(error) = broken {
            return Err(error);
        }
        let mut judgement = judged?;
        let mut performance = None;
        if judgement.status == Status::Passed {
            // Draws were compared with probabilities, so that the reference was not called yet.
            let draws = definition.op_type == "sampling";
            let trials = if draws { 1 } else { self.config.num_trials };
            let (mut own, mut others) = (Vec::new(), Vec::new());
            for trial in 0..trials {
                let inputs = workload.make_inputs(definition, &self.root, &self.options.of_trial(trial))?;
                if draws {
                    answer(&inputs)?;
                }
                let ready = self.prepare(kernel, &inputs)?;
                // SAFETY: the caller's promise.
                match unsafe { self.time_prepared(kernel, &ready, self.config.timing) } {
                    Ok(time) => own.push(time),
                    Err(error) => {
                        judgement = failed(judgement, format!("timing, trial {}: {error}", trial + 1));
                        break;
                    }
                }
                if let Some(other) = other {
                    // SAFETY: the caller's promise.
                    others.push(unsafe { self.time(other, &inputs, self.config.timing) }?);
                }
            }
            let (latency_ms, reference_latency_ms) = (mean(&own), mean(if other.is_some() { &others } else { &clock }));
            let speedup_factor = if latency_ms > 0.0 { reference_latency_ms / latency_ms } else { 0.0 };
            performance = Some(Performance { latency_ms, reference_latency_ms, speedup_factor });
        }
        let evaluation = judgement.into_evaluation(self.environment(), performance)?;
        Ok(trace(definition, workload, kernel.kernel().name(), evaluation))
    }

    /// The trace of a solution that did not come as far as to be run: [`CompileError`](Status::CompileError) for example.
    ///
    /// # Errors
    /// [`Data`](crate::FlashInferError::Data) for a status that wants figures beside it.
    pub fn failed(
        &self,
        definition: &Definition,
        workload: &Workload,
        solution: &str,
        (status, log): (Status, &str),
    ) -> Result<Trace> {
        let (environment, timestamp, log) = (self.environment(), timestamp(), log.to_owned());
        let evaluation = Evaluation { status, environment, timestamp, log, correctness: None, performance: None };
        evaluation.validate()?;
        Ok(trace(definition, workload, solution, evaluation))
    }

    fn prepare(&self, kernel: &BoundKernel<'_>, inputs: &Named<Input>) -> Result<Prepared> {
        let put = |input: &Input| {
            Ok(match input {
                Input::Tensor(tensor) => Held::Tensor(self.place.put(tensor)?),
                Input::Int(number) => Held::Plain((*number).into()),
                Input::Float(number) => Held::Plain((*number).into()),
                Input::Bool(flag) => Held::Plain((*flag).into()),
                Input::Absent => Held::Plain(Argument::ABSENT),
            })
        };
        let inputs = inputs.values().map(put).collect::<Result<_>>()?;
        let mut prepared = Prepared { inputs, outputs: Vec::new() };
        if kernel.kernel().is_destination_passing() {
            let stream = self.place.stream();
            prepared.outputs = kernel.make_outputs(&prepared.inputs(), stream, self.place.allocator())?;
            prepared.outputs.iter().try_for_each(|output| self.place.fill(output, UNWRITTEN))?;
        }
        Ok(prepared)
    }

    /// The outputs of one call, once it is done.
    ///
    /// # Safety
    /// As for [`BoundKernel::call`].
    unsafe fn call_prepared(&self, kernel: &BoundKernel<'_>, prepared: &Prepared) -> Result<Vec<Tensor>> {
        // SAFETY: the caller's promise.
        let outputs = unsafe { self.queue(kernel, prepared) }?;
        self.place.wait()?;
        Ok(outputs)
    }

    /// # Safety
    /// As for [`BoundKernel::call`].
    unsafe fn queue(&self, kernel: &BoundKernel<'_>, prepared: &Prepared) -> Result<Vec<Tensor>> {
        let (inputs, stream, allocator) = (prepared.inputs(), self.place.stream(), self.place.allocator());
        if !kernel.kernel().is_destination_passing() {
            // SAFETY: the caller's promise.
            return unsafe { kernel.call_unchecked(&inputs, allocator, stream) };
        }
        let outputs: Vec<_> = prepared.outputs.iter().map(Destination::from).collect();
        let runtime = FlashInferRuntime::global()?;
        // SAFETY: the caller's promise; the outputs are the runner's own.
        runtime.with_allocator(allocator, || unsafe { kernel.call(&inputs, &outputs, stream) })??;
        Ok(prepared.outputs.clone())
    }

    fn take(&self, outputs: &[Tensor]) -> Result<Vec<HostTensor>> {
        outputs.iter().map(|output| self.place.take(output)).collect()
    }

    /// # Safety
    /// As for [`time`](Self::time).
    unsafe fn time_prepared(&self, kernel: &BoundKernel<'_>, prepared: &Prepared, timing: Timing) -> Result<f64> {
        let copy = |held: &Held| match held {
            Held::Tensor(tensor) => self.place.copy(tensor).map(Held::Tensor),
            Held::Plain(argument) => Ok(Held::Plain(*argument)),
        };
        let inputs = prepared.inputs.iter().map(copy).collect::<Result<_>>()?;
        let outputs = prepared.outputs.iter().map(|output| self.place.copy(output)).collect::<Result<_>>()?;
        let fresh = Prepared { inputs, outputs };
        // As upstream, which copies every argument for each call, so that none can profit from what another left.
        let refill = || {
            let mut pairs = fresh.tensors().zip(prepared.tensors());
            pairs.try_for_each(|(to, from)| self.place.refill(to, from))
        };
        // SAFETY: the caller's promise.
        let queue = || unsafe { self.queue(kernel, &fresh) }.map(drop);
        match &self.place {
            Place::Host(_) => self.time_on_host(timing, refill, queue),
            #[cfg(feature = "cudarc")]
            Place::Gpu(gpu) => self.time_on_gpu(gpu, timing, refill, queue),
        }
    }

    fn time_on_host(
        &self,
        timing: Timing,
        refill: impl Fn() -> Result<()>,
        queue: impl Fn() -> Result<()>,
    ) -> Result<f64> {
        (0..self.config.warmup_runs).try_for_each(|_| queue())?;
        let runs = self.config.iterations.max(1);
        let mut seconds = 0.0;
        match timing {
            Timing::Each => {
                for _ in 0..runs {
                    refill()?;
                    let start = Instant::now();
                    queue()?;
                    seconds += start.elapsed().as_secs_f64();
                }
            }
            Timing::Span => {
                refill()?;
                let start = Instant::now();
                (0..runs).try_for_each(|_| queue())?;
                seconds = start.elapsed().as_secs_f64();
            }
        }
        Ok(seconds * 1e3 / f64::from(runs))
    }

    #[cfg(feature = "cudarc")]
    fn time_on_gpu(
        &self,
        gpu: &super::place::gpu::Gpu,
        timing: Timing,
        refill: impl Fn() -> Result<()>,
        queue: impl Fn() -> Result<()>,
    ) -> Result<f64> {
        let runs = self.config.iterations.max(1);
        if timing == Timing::Span {
            refill()?;
            (0..self.config.warmup_runs).try_for_each(|_| queue())?;
            gpu.wait()?;
            let start = gpu.now()?;
            (0..runs).try_for_each(|_| queue())?;
            let end = gpu.now()?;
            return Ok(gpu.between(&start, &end)? / f64::from(runs));
        }
        let mut flush = gpu.flush(FLUSH_BYTES)?;
        for _ in 0..self.config.warmup_runs {
            gpu.write(&mut flush)?;
            refill()?;
            queue()?;
        }
        gpu.wait()?;
        let mut events = Vec::new();
        for _ in 0..runs {
            gpu.write(&mut flush)?;
            refill()?;
            gpu.wait()?;
            let start = gpu.now()?;
            queue()?;
            events.push((start, gpu.now()?));
        }
        gpu.wait()?;
        let times = events.iter().map(|(start, end)| gpu.between(start, end));
        Ok(times.sum::<Result<f64>>()? / f64::from(runs))
    }
}

fn trace(definition: &Definition, workload: &Workload, solution: &str, evaluation: Evaluation) -> Trace {
    Trace {
        definition: definition.name.clone(),
        workload: workload.clone(),
        solution: Some(solution.to_owned()),
        evaluation: Some(evaluation),
    }
}

/// That inputs hold what the definition says of them.
fn fit(definition: &Definition, workload: &Workload, inputs: &Named<Input>) -> Result<()> {
    for (constraint, verdict) in definition.check_constraints(&workload.axes, inputs)? {
        if let Verdict::Broken(found) = verdict {
            let (what, place) = (format!("the workload {:?}", shortened(&workload.uuid)), "its axes and inputs");
            let remedy = "correct the workload's axes, or store inputs that obey the constraint";
            return Err(unfit(&what, place, found, format!("{constraint:?}"), remedy));
        }
    }
    Ok(())
}

/// What becomes of a judgement when the kernel fails behind it.
fn failed(judgement: Judgement, what: String) -> Judgement {
    let mut log = judgement.log;
    log.push(what);
    Judgement { status: Status::RuntimeError, correctness: None, log }
}

fn mean(times: &[f64]) -> f64 {
    if times.is_empty() { 0.0 } else { times.iter().sum::<f64>() / times.len() as f64 }
}
