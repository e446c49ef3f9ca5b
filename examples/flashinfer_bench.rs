//! FlashInfer-Bench from end to end, over the small dataset in `examples/dataset`: each solution is built, loaded, bound to its
//! definition, run with each workload, compared with a reference, timed, and traced; then each definition is called with the
//! solution that the traces know as the best. C++ runs on the host; where there is a GPU and the feature `cudarc`, CUDA and the
//! kernel that this crate vendors run there.
//!
//! In a checkout: `cargo run --features bench --example flashinfer_bench`, or with `--features bench,cudarc`. The first run
//! builds the solutions by `cargo xtask kernel build`.
//!
//! `-- --out DATASET` names the folder that the dataset is copied to, with the traces; `target/flashinfer_bench` by default.
//! `-- --kernels FOLDER` takes kernels that were built before, a folder for each solution, and builds none.

#[path = "dataset_inputs.rs"]
#[allow(dead_code, reason = "its main is another example's")]
pub mod dataset_inputs;

use std::collections::HashMap;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use flashinfer_rs::bench::{
    ApplyConfig, BoundKernel, Dataset, Definition, Dispatcher, DistributedKernel, HostTensor, Input, InputOptions,
    Kernel, Named, Reference, Runner, Solution, Status, Timing, Trace, TraceLayout,
};
use flashinfer_rs::{FlashInferRuntime, RuntimeConfig};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

fn main() -> Result<ExitCode> {
    let (mut out, mut kernels) = (Path::new(ROOT).join("target/flashinfer_bench"), None);
    let mut arguments = std::env::args_os().skip(1);
    while let Some(argument) = arguments.next() {
        let folder = arguments.next().map(PathBuf::from);
        match (argument.to_str(), folder) {
            (Some("--out"), Some(folder)) => out = folder,
            (Some("--kernels"), Some(folder)) => kernels = Some(folder),
            _ => return Err("usage: flashinfer_bench [--out DATASET] [--kernels FOLDER]".into()),
        }
    }
    let runtime = FlashInferRuntime::initialize(RuntimeConfig::default())?;
    let mut dataset = copy(&Dataset::open(Path::new(ROOT).join("examples/dataset"))?, &out)?;
    dataset_inputs::write(&dataset)?;

    let host = Runner::on_host().root(dataset.root());
    let gpu = gpu(runtime, &dataset)?;
    let (mut loaded, mut traces) = (HashMap::new(), Vec::new());
    for definition in dataset.definitions() {
        for solution in dataset.solutions(&definition.name) {
            let on_host = solution.spec.target_hardware.iter().any(|target| target == "cpu");
            let runner = match (on_host, &gpu) {
                (true, _) => &host,
                (false, Some((runner, _))) => runner,
                (false, None) => {
                    println!("{:32} needs a GPU and the feature `cudarc`", solution.name);
                    continue;
                }
            };
            let arch = gpu.as_ref().map(|(_, arch)| arch.as_str()).filter(|_| !on_host);
            match load(&dataset, definition, solution, kernels.as_deref(), arch) {
                Ok(kernel) => {
                    traces.extend(run(&dataset, runner, &kernel.bind(definition)?)?);
                    loaded.insert(solution.name.clone(), kernel);
                }
                Err(error) => {
                    for workload in dataset.workloads(&definition.name) {
                        let (name, log) = (&solution.name, error.to_string());
                        let failure = (Status::CompileError, log.as_str());
                        traces.push(runner.failed(definition, &workload.workload, name, failure)?);
                    }
                    println!("{:32} COMPILE_ERROR: {error}", solution.name);
                }
            }
        }
    }
    let passed = traces.iter().all(Trace::passed) && !traces.is_empty();
    dataset.add_traces(&traces, TraceLayout::ByDefinition)?;
    println!("the traces are in {}", dataset.root().join("traces").display());

    for runner in std::iter::once(&host).chain(gpu.as_ref().map(|(runner, _)| runner)) {
        apply(&dataset, runner, &loaded)?;
    }
    println!("{}", if passed { "PASSED" } else { "FAILED" });
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The same definitions, solutions and workloads in another folder.
fn copy(dataset: &Dataset, out: &Path) -> Result<Dataset> {
    std::fs::create_dir_all(out)?;
    let mut copy = Dataset::open(out)?;
    for definition in dataset.definitions() {
        if copy.definition(&definition.name).is_none() {
            copy.add_definition(definition.clone())?;
            copy.add_traces(dataset.workloads(&definition.name), TraceLayout::ByDefinition)?;
        }
        for solution in dataset.solutions(&definition.name) {
            match copy.solution(&solution.name) {
                Some(there) if there == solution => {}
                Some(_) => return Err(format!("{} has another {}; remove it", out.display(), solution.name).into()),
                None => drop(copy.add_solution(solution.clone())?),
            }
        }
    }
    Ok(copy)
}

/// A runner on the first GPU, and the architecture to build for; none without one.
#[cfg(feature = "cudarc")]
fn gpu(runtime: &FlashInferRuntime, dataset: &Dataset) -> Result<Option<(Runner, String)>> {
    use flashinfer_rs::cudarc::driver::CudaContext;

    if !runtime.gpu_available() {
        return Ok(None);
    }
    let context = CudaContext::new(0)?;
    let (major, minor) = context.compute_capability()?;
    let runner = Runner::on_stream(&context.new_stream()?)?.root(dataset.root());
    Ok(Some((runner, format!("{major}.{minor}"))))
}

#[cfg(not(feature = "cudarc"))]
fn gpu(_runtime: &FlashInferRuntime, _dataset: &Dataset) -> Result<Option<(Runner, String)>> {
    Ok(None)
}

/// The kernel of a solution, which is built where it is not at hand.
fn load(
    dataset: &Dataset,
    definition: &Definition,
    solution: &Solution,
    kernels: Option<&Path>,
    arch: Option<&str>,
) -> Result<Kernel> {
    if solution.vendored_module().is_some() {
        return Ok(Kernel::vendored(solution)?);
    }
    let folder = match kernels {
        Some(kernels) => kernels.join(&solution.name),
        None => {
            let folder = dataset.root().join("kernels").join(&solution.name);
            let place = format!("solutions/{}/{}/{}", solution.author, definition.op_type, definition.name);
            let json = dataset.root().join(place).join(format!("{}.json", solution.name));
            let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
            cargo.current_dir(ROOT).args(["xtask", "kernel", "build"]).arg(json).arg("--out").arg(&folder);
            let built = cargo.args(arch.iter().flat_map(|arch| ["--arch", arch])).output()?;
            if !built.status.success() {
                return Err(String::from_utf8_lossy(&built.stderr).into());
            }
            folder
        }
    };
    // SAFETY: built of the sources in examples/dataset, which have no initializers.
    Ok(unsafe { Kernel::load(&DistributedKernel::open(folder)?) }?)
}

/// Runs each workload of a kernel's definition.
fn run(dataset: &Dataset, runner: &Runner, kernel: &BoundKernel<'_>) -> Result<Vec<Trace>> {
    let definition = kernel.definition();
    let mut traces = Vec::new();
    for trace in dataset.workloads(&definition.name) {
        let mut reference = |inputs: &Named<Input>| reference(definition, inputs);
        // SAFETY: the dataset's solutions check what they are given, and the stored offsets of the gated delta rule are
        // those of sequences that have tokens.
        let trace = unsafe { runner.run(kernel, &trace.workload, Reference::Closure(&mut reference)) }?;
        let inputs = trace.workload.make_inputs(definition, dataset.root(), &InputOptions::default())?;
        let evaluation = trace.evaluation.as_ref().ok_or("a run has an evaluation")?;
        print!(
            "{:32} {:12} on {}: {}",
            kernel.kernel().name(),
            trace.workload.uuid,
            runner.device(),
            evaluation.status
        );
        if let (Some(figures), Some(errors)) = (evaluation.performance, &evaluation.correctness) {
            // SAFETY: as above.
            let span = unsafe { runner.time(kernel, &inputs, Timing::Span) }?;
            print!(
                ", {:.4} ms alone, {span:.4} ms in a row, {:.1} times as fast as the reference, error {:.1e}",
                figures.latency_ms, figures.speedup_factor, errors.max_absolute_error
            );
        }
        println!("{}", evaluation.log.lines().map(|line| format!("\n  {line}")).collect::<String>());
        traces.push(trace);
    }
    Ok(traces)
}

/// Calls each definition with the solution that is the best for a workload's sizes on this hardware.
fn apply(dataset: &Dataset, runner: &Runner, loaded: &HashMap<String, Kernel>) -> Result<()> {
    // Close to zero, an element's relative error says nothing.
    let mut config = ApplyConfig::new(1e-1, f64::MAX);
    config.hardware = Some(runner.environment().hardware);
    for definition in dataset.definitions() {
        let load = |solution: &Solution| match loaded.get(&solution.name) {
            Some(kernel) => Ok(kernel.clone()),
            None => Kernel::vendored(solution),
        };
        let dispatcher = Dispatcher::new(dataset, &definition.name, &config, load)?;
        for trace in dataset.workloads(&definition.name) {
            let Some(kernel) = dispatcher.kernel(&trace.workload.axes) else { continue };
            let inputs = trace.workload.make_inputs(definition, dataset.root(), &InputOptions::default())?;
            // SAFETY: as for `run`.
            let outputs = unsafe { runner.call(&kernel.bind(definition)?, &inputs) }?;
            println!("{} of {}: {} gives {outputs:?}", definition.name, trace.workload.uuid, kernel.name());
        }
    }
    Ok(())
}

/// What each definition's Python says, in f64.
pub fn reference(definition: &Definition, inputs: &Named<Input>) -> flashinfer_rs::Result<Vec<HostTensor>> {
    let tensor = |name: &str| match inputs.get(name) {
        Some(Input::Tensor(tensor)) => numbers(tensor),
        other => unreachable!("{name} of {} is {other:?}", definition.name),
    };
    let shapes = definition.output_shapes(&definition.axes_of_inputs(inputs)?)?;
    let outputs = match definition.op_type.as_str() {
        "gemm" => vec![gemm(&tensor("A"), &tensor("B"), 256)],
        "rmsnorm" => vec![rmsnorm(&tensor("hidden_states"), &tensor("weight"))],
        _ => {
            let scale = match inputs.get("scale") {
                Some(Input::Float(scale)) => *scale,
                other => unreachable!("the scale is {other:?}"),
            };
            let [output, state] = gated_delta_rule(&tensor, scale);
            vec![output, state]
        }
    };
    let specs = definition.outputs.values().zip(shapes).zip(outputs);
    specs
        .map(|((spec, shape), values)| HostTensor::from_f64(spec.dtype.clone(), &shape.unwrap_or_default(), &values))
        .collect()
}

fn numbers(tensor: &HostTensor) -> Vec<f64> {
    let whole = |i| tensor.int(i).map(|number| number as f64);
    (0..tensor.slots()).map(|i| whole(i).unwrap_or_else(|| tensor.float(i).into())).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn gemm(a: &[f64], b: &[f64], k: usize) -> Vec<f64> {
    a.chunks_exact(k).flat_map(|row| b.chunks_exact(k).map(|other| dot(row, other))).collect()
}

fn rmsnorm(states: &[f64], weight: &[f64]) -> Vec<f64> {
    let normalized = |row: &[f64]| {
        let scale = 1.0 / (dot(row, row) / row.len() as f64 + 1e-6).sqrt();
        row.iter().zip(weight).map(|(x, w)| x * scale * w).collect::<Vec<_>>()
    };
    states.chunks_exact(weight.len()).flat_map(normalized).collect()
}

/// Token by token: S = alpha S, S = S + beta (v - S k) kᵀ, o = scale S q.
fn gated_delta_rule(input: &dyn Fn(&str) -> Vec<f64>, scale: f64) -> [Vec<f64>; 2] {
    const SIZE: usize = 128;
    let [q, k, v, offsets] = ["q", "k", "v", "cu_seqlens"].map(input);
    let [mut states, alpha, beta] = ["input_state", "alpha", "beta"].map(input);
    let tokens = offsets.last().map_or(0, |last| *last as usize);
    let [q_heads, heads] = [&q, &v].map(|tensor| tensor.len() / SIZE / tokens);
    let row = |tensor: &[f64], at: usize| tensor[at * SIZE..(at + 1) * SIZE].to_vec();
    let mut output = vec![0.0; v.len()];
    for (sequence, ends) in offsets.windows(2).enumerate() {
        for head in 0..heads {
            let state = &mut states[(sequence * heads + head) * SIZE * SIZE..][..SIZE * SIZE];
            for token in ends[0] as usize..ends[1] as usize {
                let (at, shared) = (token * heads + head, token * q_heads + head * q_heads / heads);
                let (query, key, value) = (row(&q, shared), row(&k, shared), row(&v, at));
                for (i, line) in state.chunks_exact_mut(SIZE).enumerate() {
                    line.iter_mut().for_each(|s| *s *= alpha[at]);
                    let correction = beta[at] * (value[i] - dot(line, &key));
                    line.iter_mut().zip(&key).for_each(|(s, k)| *s += correction * k);
                    output[at * SIZE + i] = scale * dot(line, &query);
                }
            }
        }
    }
    [output, states]
}
