//! FlashInfer-Bench on a GPU: a kernel that was built elsewhere is loaded, bound, run, checked, timed and traced there.
//!
//! `FLASHINFER_RS_BENCH_KERNELS` names a folder with what was built of the example dataset, `gemm_f32_n128_k256_cuda` and
//! `rmsnorm_h512_cuda` in it, for this GPU: nothing is built here. To make it, on any machine:
//!
//! ```sh
//! for name in gemm_f32_n128_k256 rmsnorm_h512; do
//!   cargo xtask kernel build examples/dataset/solutions/flashinfer-rs/*/$name/${name}_cuda.json --arch 9.0 \
//!     --out KERNELS/${name}_cuda
//! done
//! ```
//!
//! Without the variable its tests are reported as ignored, never as passed; the others need none.

#[path = "../examples/flashinfer_bench.rs"]
#[allow(dead_code, reason = "its reference and the stored inputs are what is used here")]
mod example;
#[path = "support/gpu.rs"]
mod gpu;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use flashinfer_rs::bench::{
    ApplyConfig, Argument, Axes, Axis, BenchmarkConfig, BoundKernel, DataType, Dataset, Definition, Destination,
    Dispatcher, DistributedKernel, HostTensor, Input, InputOptions, Kernel, Named, Reference, Runner, Scalar, Status,
    TensorSpec, Timing, Trace, TraceLayout, Workload,
};
use flashinfer_rs::object::{Any, Func, StreamAllocator, Tensor};
use flashinfer_rs::{Arg, DType, Device, FlashInferError, Result, Stream, TensorMut, TensorRef};
use gpu::Gpu;

const KERNELS: &str = "FLASHINFER_RS_BENCH_KERNELS";

fn main() -> ExitCode {
    let built: [gpu::Test; 4] = [
        ("a_gemm_that_was_built_elsewhere_is_bound_and_called", gemm),
        ("workloads_are_checked_timed_and_traced", workloads),
        ("the_best_kernel_is_called_by_the_traces", dispatched),
        ("a_tensor_on_the_host_is_refused_before_anything_runs", host_tensor),
    ];
    let own: [gpu::Test; 4] = [
        ("the_vendored_prefill_is_run_as_a_solution", prefill),
        ("what_a_kernel_forgets_to_write_is_seen", forgetful),
        ("what_a_kernel_returns_is_brought_back", returned),
        ("what_a_kernel_raises_is_a_runtime_error", raised),
    ];
    let with_kernels = std::env::var_os(KERNELS).is_some_and(|folder| !folder.is_empty());
    gpu::main_where(&[(&own, true), (&built, with_kernels)])
}

/// The example's, where the test runs, else where it was compiled.
fn dataset() -> Dataset {
    let here = Path::new("examples/dataset");
    let there = Path::new(env!("CARGO_MANIFEST_DIR")).join(here);
    Dataset::open(if here.is_dir() { here } else { &there }).unwrap()
}

fn load(solution: &str) -> Kernel {
    let folder = PathBuf::from(std::env::var_os(KERNELS).unwrap()).join(solution);
    // SAFETY: built of the example dataset's sources, which have no initializers.
    unsafe { Kernel::load(&DistributedKernel::open(folder).unwrap()) }.unwrap()
}

fn options() -> InputOptions {
    InputOptions::default()
}

/// With fewer runs than upstream's default, for which a test is no place.
fn runner(gpu: &Gpu) -> Runner {
    let mut config = BenchmarkConfig::default();
    (config.warmup_runs, config.iterations) = (3, 10);
    Runner::on_stream(&gpu.stream).unwrap().config(config)
}

fn gemm(gpu: &Gpu) {
    let (dataset, kernel, stream) = (dataset(), load("gemm_f32_n128_k256_cuda"), &gpu.stream);
    let definition = dataset.definition("gemm_f32_n128_k256").unwrap();
    let bound = kernel.bind(definition).unwrap();
    let workload = &dataset.workloads(&definition.name)[2].workload;
    let inputs = workload.make_inputs(definition, dataset.root(), &options()).unwrap();
    let expected = example::reference(definition, &inputs).unwrap();
    let (rows, [a, b]) = (workload.axes["M"] as i64, ["A", "B"].map(|name| floats(&inputs, name)));
    let (a, b) = (stream.clone_htod(&a).unwrap(), stream.clone_htod(&b).unwrap());
    let mut c = stream.alloc_zeros::<f32>(rows as usize * 128).unwrap();
    {
        let a = TensorRef::from_cudarc(stream, &a, &[rows, 256]).unwrap();
        let b = TensorRef::from_cudarc(stream, &b, &[128, 256]).unwrap();
        let mut c = TensorMut::from_cudarc(stream, &mut c, &[rows, 128]).unwrap();
        let (inputs, outputs) = ([(&a).into(), (&b).into()], [Destination::from(&mut c)]);
        // SAFETY: the kernel checks what it is given, and computes with any numbers.
        unsafe { bound.call(&inputs, &outputs, Stream::cudarc(stream)) }.unwrap();
    }
    let close = |found: &[f32]| {
        assert_eq!(found.len(), expected[0].slots());
        for (i, found) in found.iter().enumerate() {
            assert!((found - expected[0].float(i)).abs() < 1e-3, "element {i}: {found}, {}", expected[0].float(i));
        }
    };
    close(&stream.clone_dtoh(&c).unwrap());
    // As objects, with an output that is made for it.
    let (a, b) = (Tensor::from_cudarc(a, &[rows, 256]).unwrap(), Tensor::from_cudarc(b, &[128, 256]).unwrap());
    let (inputs, allocator) = ([(&a).into(), (&b).into()], StreamAllocator::new(stream));
    // SAFETY: as above.
    let outputs = unsafe { bound.call_returning(&inputs, &allocator, Stream::cudarc(stream)) }.unwrap();
    assert_eq!((outputs[0].shape(), outputs[0].device()), (&[rows, 128][..], Some(Device::Cuda(0))));
    let found = runner(gpu);
    // SAFETY: as above.
    let again = unsafe { found.call(&bound, &workload.make_inputs(definition, ".", &options()).unwrap()) }.unwrap();
    close(&(0..again[0].slots()).map(|i| again[0].float(i)).collect::<Vec<_>>());
}

fn floats(inputs: &Named<Input>, name: &str) -> Vec<f32> {
    let Some(Input::Tensor(tensor)) = inputs.get(name) else { panic!("{name} of {inputs:?}") };
    (0..tensor.slots()).map(|i| tensor.float(i)).collect()
}

fn run(runner: &Runner, bound: &BoundKernel<'_>, workload: &Workload) -> Trace {
    let mut reference = |inputs: &Named<Input>| example::reference(bound.definition(), inputs);
    // SAFETY: the test's kernels are sound with what their workloads have.
    unsafe { runner.run(bound, workload, Reference::Closure(&mut reference)) }.unwrap()
}

/// A dataset in a folder of its own with what came of the kernels that were built.
fn traced(gpu: &Gpu, folder: &Path) -> Dataset {
    let (from, mut to) = (dataset(), Dataset::open(folder).unwrap());
    let runner = runner(gpu);
    for name in ["gemm_f32_n128_k256_cuda", "rmsnorm_h512_cuda"] {
        let (kernel, solution) = (load(name), from.solution(name).unwrap());
        let definition = from.definition(&solution.definition).unwrap();
        to.add_definition(definition.clone()).unwrap();
        to.add_solution(solution.clone()).unwrap();
        let bound = kernel.bind(definition).unwrap();
        let traces: Vec<_> =
            from.workloads(&definition.name).iter().map(|workload| run(&runner, &bound, &workload.workload)).collect();
        to.add_traces(&traces, TraceLayout::ByDefinition).unwrap();
    }
    Dataset::open(folder).unwrap()
}

fn workloads(gpu: &Gpu) {
    let folder = tempfile::tempdir().unwrap();
    let written = traced(gpu, folder.path());
    let name = gpu.context.name().unwrap();
    let traces: Vec<&Trace> = written.definitions().flat_map(|definition| written.traces(&definition.name)).collect();
    assert_eq!(traces.len(), 6);
    for trace in traces {
        let evaluation = trace.evaluation.as_ref().unwrap();
        assert_eq!(evaluation.status, Status::Passed, "{}", evaluation.log);
        assert_eq!(evaluation.environment.hardware, name);
        assert!(evaluation.environment.libs.get("cuda").is_some(), "{:?}", evaluation.environment.libs);
        let figures = evaluation.performance.unwrap();
        // A launch takes at least a microsecond, and nothing here a hundred milliseconds.
        assert!(figures.latency_ms > 1e-4 && figures.latency_ms < 100.0, "{figures:?}");
        println!("{:?} {}: {figures:?}", trace.solution, trace.workload.uuid);
    }
    let (kernel, all) = (load("gemm_f32_n128_k256_cuda"), dataset());
    let definition = all.definition("gemm_f32_n128_k256").unwrap();
    let bound = kernel.bind(definition).unwrap();
    let inputs = all.workloads(&definition.name)[1].workload.make_inputs(definition, ".", &options()).unwrap();
    // SAFETY: as for `run`.
    let [each, span] =
        [Timing::Each, Timing::Span].map(|timing| unsafe { runner(gpu).time(&bound, &inputs, timing) }.unwrap());
    println!("alone {each} ms, in a row {span} ms");
    assert!(each > 0.0 && span > 0.0 && span < 100.0, "{each} {span}");
    // Another kernel as the reference is timed in the same way, and here it is the same one.
    // SAFETY: as for `run`.
    let trace = unsafe {
        let workload = &all.workloads(&definition.name)[1].workload;
        runner(gpu).run(&bound, workload, Reference::Kernel(&bound))
    };
    let evaluation = trace.unwrap().evaluation.unwrap();
    assert_eq!(evaluation.correctness.unwrap().max_absolute_error, 0.0);
    let factor = evaluation.performance.unwrap().speedup_factor;
    assert!(factor > 0.1 && factor < 10.0, "{factor}");
}

fn dispatched(gpu: &Gpu) {
    let folder = tempfile::tempdir().unwrap();
    let written = traced(gpu, folder.path());
    let mut config = ApplyConfig::new(1e-1, f64::MAX);
    config.hardware = Some(gpu.context.name().unwrap());
    let load = |solution: &flashinfer_rs::bench::Solution| Ok(load(&solution.name));
    let dispatcher = Dispatcher::new(&written, "gemm_f32_n128_k256", &config, load).unwrap();
    let stream = &gpu.stream;
    let call = |rows: i64| {
        let ones = |len: i64| stream.clone_htod(&vec![1f32; len as usize]).unwrap();
        let a = Tensor::from_cudarc(ones(rows * 256), &[rows, 256]).unwrap();
        let b = Tensor::from_cudarc(ones(128 * 256), &[128, 256]).unwrap();
        let out = std::sync::Arc::new(stream.alloc_zeros::<f32>(rows as usize * 128).unwrap());
        let c = Tensor::from_cudarc(std::sync::Arc::clone(&out), &[rows, 128]).unwrap();
        let (inputs, outputs): ([Argument<'_>; 2], _) = ([(&a).into(), (&b).into()], [Destination::from(&c)]);
        // SAFETY: as for `run`.
        unsafe { dispatcher.call(&inputs, &outputs, Stream::cudarc(stream)) }?;
        Ok::<_, FlashInferError>(stream.clone_dtoh(&*out).unwrap())
    };
    assert!(call(16).unwrap().iter().all(|value| *value == 256.0));
    assert!(call(17).unwrap_err().to_string().contains("none for [M = 17]"));
    config.hardware = Some("another".to_owned());
    let none = Dispatcher::new(&written, "gemm_f32_n128_k256", &config, load).unwrap();
    assert!(none.kernel(&Axes::from([("M".to_owned(), 16)])).is_none());
}

fn host_tensor(gpu: &Gpu) {
    let (dataset, kernel) = (dataset(), load("gemm_f32_n128_k256_cuda"));
    let bound = kernel.bind(dataset.definition("gemm_f32_n128_k256").unwrap()).unwrap();
    let a = Tensor::from_cudarc(gpu.stream.alloc_zeros::<f32>(256).unwrap(), &[1, 256]).unwrap();
    let (b, c) = (Tensor::zeros(DType::F32, &[128, 256]).unwrap(), Tensor::zeros(DType::F32, &[1, 128]).unwrap());
    let inputs = [(&a).into(), (&b).into()];
    // SAFETY: as for `run`.
    let error = unsafe { bound.call(&inputs, &[(&c).into()], Stream::cudarc(&gpu.stream)) }.unwrap_err().to_string();
    assert!(error.contains("input \"B\"") && error.contains("the other tensors' device"), "{error}");
    gpu.stream.synchronize().unwrap();
}

fn prefill(gpu: &Gpu) {
    if gpu.context.compute_capability().unwrap() != (9, 0) {
        panic!("the prefill is for compute capability 9.0: run this on a Hopper GPU");
    }
    let folder = tempfile::tempdir().unwrap();
    let (from, mut to) = (dataset(), Dataset::open(folder.path()).unwrap());
    let definition = from.definition("gdn_prefill_qk2_v4_d128").unwrap();
    to.add_definition(definition.clone()).unwrap();
    to.add_traces(from.workloads(&definition.name), TraceLayout::ByDefinition).unwrap();
    example::dataset_inputs::write(&to).unwrap();
    let kernel = Kernel::vendored(from.solution("gdn_prefill_qk2_v4_d128_vendored").unwrap()).unwrap();
    let bound = kernel.bind(definition).unwrap();
    let mut config = BenchmarkConfig::default();
    (config.num_trials, config.warmup_runs, config.iterations) = (1, 2, 5);
    let runner = runner(gpu).config(config).root(folder.path());
    for workload in to.workloads(&definition.name) {
        let trace = run(&runner, &bound, &workload.workload);
        assert!(trace.passed(), "{trace:?}");
        println!("{}: {:?}", trace.workload.uuid, trace.evaluation.unwrap().performance);
    }
}

/// y of as many numbers as x.
fn same() -> (Definition, Workload) {
    let mut definition = Definition::new("same", "test");
    definition.axes = Named::from([("n", Axis::variable())]);
    let spec = TensorSpec::tensor(&["n"], DataType::Float32);
    definition.inputs = Named::from([("x", spec.clone()), ("scale", TensorSpec::scalar(DataType::Float32))]);
    definition.outputs = Named::from([("y", spec)]);
    let scale = flashinfer_rs::bench::InputSpec::Scalar { value: Scalar::Int(1) };
    let (axes, inputs) = (Axes::from([("n".to_owned(), 1000)]), Named::from([("scale", scale)]));
    (definition, Workload { axes, inputs, uuid: "same".to_owned() })
}

fn closure(
    destination_passing: bool,
    closure: impl for<'a> Fn(&[Arg<'a>]) -> Result<Any> + Send + Sync + 'static,
) -> Kernel {
    Kernel::new(Func::new(closure).unwrap().named("closure"), destination_passing)
}

fn as_it_is(inputs: &Named<Input>) -> Result<Vec<HostTensor>> {
    match inputs.get("x") {
        Some(Input::Tensor(x)) => Ok(vec![x.clone()]),
        other => panic!("{other:?}"),
    }
}

fn forgetful(gpu: &Gpu) {
    let ((definition, workload), kernel) = (same(), closure(true, |_| Ok(Any::NONE)));
    let bound = kernel.bind(&definition).unwrap();
    // SAFETY: the closure does nothing.
    let trace = unsafe { runner(gpu).run(&bound, &workload, Reference::Closure(&mut as_it_is)) }.unwrap();
    let evaluation = trace.evaluation.unwrap();
    assert_eq!(evaluation.status, Status::IncorrectNumerical);
    assert!(evaluation.log.contains("element 0 is NaN"), "{}", evaluation.log);
}

fn returned(gpu: &Gpu) {
    let (definition, workload) = same();
    // On the GPU the input itself, and on the host zeros.
    let itself = closure(false, |args| args[0].to_any());
    let zeros = closure(false, |_| Ok(Tensor::zeros(DType::F32, &[1000])?.into()));
    for (kernel, status) in [(itself, Status::Passed), (zeros, Status::IncorrectNumerical)] {
        let bound = kernel.bind(&definition).unwrap();
        // SAFETY: the closures read nothing.
        let trace = unsafe { runner(gpu).run(&bound, &workload, Reference::Closure(&mut as_it_is)) }.unwrap();
        let evaluation = trace.evaluation.unwrap();
        assert_eq!(evaluation.status, status, "{}", evaluation.log);
    }
}

fn raised(gpu: &Gpu) {
    let (definition, workload) = same();
    let kernel = closure(true, |args| {
        let x: Tensor = args[0].to()?;
        assert_eq!((x.device(), args.len()), (Some(Device::Cuda(0)), 3));
        Err(flashinfer_rs::object::Error::new("ValueError", "as the test asked")?.into())
    });
    let bound = kernel.bind(&definition).unwrap();
    // SAFETY: the closure reads nothing.
    let trace = unsafe { runner(gpu).run(&bound, &workload, Reference::Closure(&mut as_it_is)) }.unwrap();
    let evaluation = trace.evaluation.unwrap();
    assert_eq!(evaluation.status, Status::RuntimeError);
    assert!(evaluation.log.contains("ValueError: as the test asked"), "{}", evaluation.log);
    gpu.stream.synchronize().unwrap();
}
