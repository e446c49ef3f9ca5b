//! Workloads that are run on the host: what each kind of kernel comes to, with Rust closures in the kernels' place.

use std::cell::Cell;

use flashinfer_rs::bench::{
    ApplyConfig, Axes, Axis, BenchmarkConfig, DataType, Dataset, Definition, Dispatcher, HostTensor, Input,
    InputOptions, InputSpec, Kernel, Named, Reference, Runner, Safetensors, Scalar, Solution, Status, TensorSpec,
    Timing, Trace, TraceLayout, Workload, write_safetensors,
};
use flashinfer_rs::object::{Any, Array, Error, Func, HostAllocator, IntoAny, Tensor};
use flashinfer_rs::{Arg, DType, FlashInferError, FlashInferRuntime, Result, RuntimeConfig, Stream};

/// y = scale x, of a vector.
fn definition() -> Definition {
    let mut definition = Definition::new("scale", "elementwise");
    definition.axes = Named::from([("n", Axis::variable())]);
    let x = TensorSpec::tensor(&["n"], DataType::Float32);
    definition.inputs = Named::from([("x", x.clone()), ("scale", TensorSpec::scalar(DataType::Float32))]);
    definition.outputs = Named::from([("y", x)]);
    definition.constraints = vec!["n <= 1000".to_owned()];
    definition.reference = Some("def run(x, scale):\n    return scale * x".to_owned());
    definition
}

fn workload(n: u64) -> Workload {
    let scale = InputSpec::Scalar { value: Scalar::Float(3.0) };
    let (axes, inputs) = (Axes::from([("n".to_owned(), n)]), Named::from([("x", InputSpec::Random), ("scale", scale)]));
    Workload { axes, inputs, uuid: format!("n{n}") }
}

fn reference(inputs: &Named<Input>) -> Result<Vec<HostTensor>> {
    let (Some(Input::Tensor(x)), Some(Input::Float(scale))) = (inputs.get("x"), inputs.get("scale")) else {
        panic!("{inputs:?}")
    };
    let values: Vec<f64> = (0..x.slots()).map(|i| scale * f64::from(x.float(i))).collect();
    Ok(vec![HostTensor::from_f64(DataType::Float32, x.shape(), &values)?])
}

fn kernel(
    destination_passing: bool,
    closure: impl for<'a> Fn(&[Arg<'a>]) -> Result<Any> + Send + Sync + 'static,
) -> Kernel {
    FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
    Kernel::new(Func::new(closure).unwrap().named("closure"), destination_passing)
}

/// The input, scaled.
fn scaled(args: &[Arg<'_>]) -> Result<Vec<f32>> {
    let (x, scale): (Tensor, f32) = (args[0].to()?, args[1].to::<f64>()? as f32);
    Ok(x.as_slice::<f32>()?.iter().map(|x| scale * x).collect())
}

fn write(args: &[Arg<'_>], values: &[f32]) -> Result<Any> {
    // SAFETY: the runner lends outputs that nothing else uses, of float32 and as long as the input.
    let mut y = unsafe { args[2].as_tensor_mut() }?;
    // SAFETY: as above; they are contiguous.
    let out = unsafe { std::slice::from_raw_parts_mut(y.as_mut_ptr().cast::<f32>(), y.shape()[0] as usize) };
    out[..values.len()].copy_from_slice(values);
    Ok(Any::NONE)
}

fn good() -> Kernel {
    kernel(true, |args| write(args, &scaled(args)?))
}

fn runner() -> Runner {
    let mut config = BenchmarkConfig::default();
    (config.warmup_runs, config.iterations) = (2, 5);
    Runner::on_host().config(config)
}

fn run(kernel: &Kernel) -> Trace {
    // SAFETY: the test's own kernels are sound with what fits the definition.
    let trace =
        unsafe { runner().run(&kernel.bind(&definition()).unwrap(), &workload(7), Reference::Closure(&mut reference)) };
    let trace = trace.unwrap();
    // Whatever comes of it can be written, and is read as itself.
    assert_eq!(Trace::from_json(&trace.to_json()).unwrap().to_json(), trace.to_json());
    trace
}

#[test]
fn a_good_kernel_passes_with_figures() {
    let returning = kernel(false, |args| {
        let values = scaled(args)?;
        let len = values.len() as i64;
        Tensor::from_vec(values, &[len])?.into_any()
    });
    for kernel in [good(), returning] {
        let trace = run(&kernel);
        assert_eq!((trace.definition.as_str(), trace.solution.as_deref()), ("scale", Some("closure")));
        let evaluation = trace.evaluation.unwrap();
        assert_eq!((evaluation.status, evaluation.log.as_str()), (Status::Passed, ""));
        let correctness = evaluation.correctness.unwrap();
        assert!(correctness.max_absolute_error < 1e-5 && correctness.max_relative_error < 1e-5, "{correctness:?}");
        let performance = evaluation.performance.unwrap();
        assert!(performance.latency_ms > 0.0 && performance.reference_latency_ms > 0.0, "{performance:?}");
        let speedup = performance.reference_latency_ms / performance.latency_ms;
        assert!((performance.speedup_factor / speedup - 1.0).abs() < 1e-9, "{performance:?}");
        assert!(!evaluation.environment.hardware.is_empty());
        let libs = evaluation.environment.libs;
        assert_eq!(libs.get("flashinfer-rs").map(String::as_str), Some(env!("CARGO_PKG_VERSION")));
        assert!(libs.get("tvm-ffi").unwrap().starts_with("0.1."), "{libs:?}");
        assert!(libs.get("cuda").is_none());
    }
}

#[test]
fn each_fault_of_a_kernel_has_its_status() {
    type Fault = fn(&[Arg<'_>]) -> Result<Any>;
    let returned: [(Fault, Status, &str); 7] = [
        (|_| Err(Error::new("ValueError", "not today")?.into()), Status::RuntimeError, "ValueError: not today"),
        (|_| panic!("out of order"), Status::RuntimeError, "out of order"),
        (|_| Ok(5i64.into()), Status::RuntimeError, "of type int, expected a tensor"),
        (|_| Array::from_items([1, 2])?.into_any(), Status::RuntimeError, "2 values"),
        (|_| Tensor::zeros(DType::F32, &[8])?.into_any(), Status::IncorrectShape, "shape [8], expected [7]"),
        (|_| Tensor::zeros(DType::F64, &[7])?.into_any(), Status::IncorrectDtype, "float64, expected float32"),
        (|_| Tensor::zeros(DType::F32, &[7])?.into_any(), Status::IncorrectNumerical, "7 of 7 elements are wrong"),
    ];
    let given: [(Fault, Status, &str); 4] = [
        (|_| Ok(Any::NONE), Status::IncorrectNumerical, "element 0 is NaN"),
        // One element is forgotten.
        (|args| write(args, &scaled(args)?[..6]), Status::IncorrectNumerical, "element 6 is NaN"),
        (|args| write(args, &[f32::INFINITY; 7]), Status::IncorrectNumerical, "element 0 is inf"),
        (|args| write(args, &[1e9; 7]), Status::IncorrectNumerical, "7 of 7 elements are wrong"),
    ];
    let cases = returned.map(|case| (false, case)).into_iter().chain(given.map(|case| (true, case)));
    for (destination_passing, (fault, status, says)) in cases {
        let trace = run(&kernel(destination_passing, fault));
        let evaluation = trace.evaluation.unwrap();
        assert_eq!(evaluation.status, status, "{}", evaluation.log);
        assert!(evaluation.log.contains(says) && evaluation.log.contains("trial 1"), "{}", evaluation.log);
        assert_eq!(evaluation.correctness.is_some(), status == Status::IncorrectNumerical);
        assert!(evaluation.performance.is_none());
    }
}

#[test]
fn a_kernel_that_fails_only_while_it_is_timed_is_a_runtime_error() {
    let calls = std::sync::atomic::AtomicUsize::new(0);
    let tired = kernel(true, move |args| match calls.fetch_add(1, std::sync::atomic::Ordering::Relaxed) {
        0..6 => write(args, &scaled(args)?),
        _ => Err(Error::new("RuntimeError", "tired")?.into()),
    });
    let evaluation = run(&tired).evaluation.unwrap();
    assert_eq!((evaluation.status, evaluation.performance), (Status::RuntimeError, None));
    assert!(evaluation.log.contains("timing") && evaluation.log.contains("tired"), "{}", evaluation.log);
}

/// Writes over its input, which only the copy of a timed call shows.
#[test]
fn each_timed_call_has_inputs_of_its_own() {
    let spoiling = kernel(true, |args| {
        let values = scaled(args)?;
        // SAFETY: as for outputs; the runner's copy is nobody else's.
        let mut x = unsafe { args[0].as_tensor_mut() }?;
        // SAFETY: as above, of seven elements.
        let elements = unsafe { std::slice::from_raw_parts_mut(x.as_mut_ptr().cast::<f32>(), 7) };
        if elements.iter().any(|element| element.is_nan()) {
            return Err(Error::new("ValueError", "what another call left")?.into());
        }
        let outcome = write(args, &values);
        elements.fill(f32::NAN);
        outcome
    });
    let mut config = BenchmarkConfig::default();
    (config.warmup_runs, config.iterations) = (0, 5);
    let definition = definition();
    let bound = spoiling.bind(&definition).unwrap();
    for (timing, status) in [(Timing::Each, Status::Passed), (Timing::Span, Status::RuntimeError)] {
        config.timing = timing;
        let runner = Runner::on_host().config(config.clone());
        // SAFETY: as for `run`.
        let trace = unsafe { runner.run(&bound, &workload(7), Reference::Closure(&mut reference)) }.unwrap();
        let evaluation = trace.evaluation.unwrap();
        assert_eq!(evaluation.status, status, "{}", evaluation.log);
    }
}

#[test]
fn another_kernel_may_be_the_reference() {
    let (definition, reference, good) = (definition(), good(), good());
    let (bound, reference) = (good.bind(&definition).unwrap(), reference.bind(&definition).unwrap());
    // SAFETY: as for `run`.
    let trace = unsafe { runner().run(&bound, &workload(7), Reference::Kernel(&reference)) }.unwrap();
    let evaluation = trace.evaluation.unwrap();
    let correctness = evaluation.correctness.unwrap();
    assert_eq!((correctness.max_absolute_error, correctness.max_relative_error), (0.0, 0.0));
    assert!(evaluation.performance.unwrap().reference_latency_ms > 0.0);
}

#[test]
fn trials_have_other_inputs_and_runs_are_as_many_as_were_asked_for() {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    let kernel = kernel(true, move |args| {
        counted.fetch_add(1, Ordering::Relaxed);
        write(args, &scaled(args)?)
    });
    let definition = definition();
    let bound = kernel.bind(&definition).unwrap();
    for timing in [Timing::Each, Timing::Span] {
        let (seen, mut config) = (Cell::new(Vec::new()), BenchmarkConfig::default());
        (config.warmup_runs, config.iterations, config.num_trials, config.timing) = (3, 11, 2, timing);
        let mut remember = |inputs: &Named<Input>| {
            let mut all = seen.take();
            all.push(inputs.clone());
            seen.set(all);
            reference(inputs)
        };
        let runner = Runner::on_host().config(config);
        // SAFETY: as for `run`.
        let trace = unsafe { runner.run(&bound, &workload(7), Reference::Closure(&mut remember)) }.unwrap();
        assert!(trace.passed());
        let seen = seen.take();
        assert!(seen.len() == 2 && seen[0] != seen[1]);
        assert_eq!(calls.swap(0, Ordering::Relaxed), 2 * (1 + 3 + 11));
    }
}

#[test]
fn what_is_wrong_with_a_workload_is_an_error_and_no_trace() {
    let (definition, good) = (definition(), good());
    let bound = good.bind(&definition).unwrap();
    let run = |workload: &Workload, reference: &mut dyn FnMut(&Named<Input>) -> Result<Vec<HostTensor>>| {
        // SAFETY: as for `run`.
        unsafe { runner().run(&bound, workload, Reference::Closure(reference)) }.unwrap_err().to_string()
    };
    let error = run(&workload(1001), &mut |_| panic!("not called"));
    assert!(error.contains("\"n <= 1000\"") && error.contains("1001"), "{error}");
    let axes = Axes::new();
    let error = run(&Workload { axes, ..workload(7) }, &mut reference);
    assert!(error.contains("no size for the axis \"n\""), "{error}");
    let error = run(&workload(7), &mut |_| Err(FlashInferError::NotInitialized));
    assert!(error.contains("not initialized"), "{error}");
    let error = run(&workload(7), &mut |_| Ok(Vec::new()));
    assert!(error.contains("reference") && error.contains("0 tensors"), "{error}");
}

#[test]
fn stored_inputs_are_read_from_the_dataset() {
    let folder = tempfile::tempdir().unwrap();
    let x = HostTensor::from_f64(DataType::Float32, &[7], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]).unwrap();
    write_safetensors(folder.path().join("blob/x.safetensors"), &[("x", &x)]).unwrap();
    assert_eq!(Safetensors::open(folder.path().join("blob/x.safetensors")).unwrap().read("x").unwrap(), x);
    let mut stored = workload(7);
    let (path, tensor_key) = ("blob/x.safetensors".to_owned(), "x".to_owned());
    stored.inputs.insert("x", InputSpec::Safetensors { path, tensor_key });
    let (definition, good) = (definition(), good());
    let bound = good.bind(&definition).unwrap();
    let mut seen = None;
    let mut look = |inputs: &Named<Input>| {
        seen = inputs.get("x").cloned();
        reference(inputs)
    };
    // SAFETY: as for `run`.
    let trace = unsafe { runner().root(folder.path()).run(&bound, &stored, Reference::Closure(&mut look)) }.unwrap();
    assert!(trace.passed() && seen == Some(Input::Tensor(x)));
}

#[test]
fn a_kernel_is_called_and_timed_apart_from_any_workload() {
    let (definition, good) = (definition(), good());
    let bound = good.bind(&definition).unwrap();
    let inputs = workload(7).make_inputs(&definition, ".", &InputOptions::default()).unwrap();
    // SAFETY: as for `run`.
    let (outputs, each, span) = unsafe {
        let time = |timing| runner().time(&bound, &inputs, timing).unwrap();
        (runner().call(&bound, &inputs).unwrap(), time(Timing::Each), time(Timing::Span))
    };
    assert_eq!(outputs, reference(&inputs).unwrap());
    assert!(each > 0.0 && span > 0.0 && each < 1e3 && span < 1e3, "{each} {span}");
}

#[test]
fn a_solution_that_was_not_built_has_a_trace_too() {
    let trace = runner().failed(&definition(), &workload(7), "mine", (Status::CompileError, "no such header")).unwrap();
    let evaluation = trace.evaluation.as_ref().unwrap();
    assert_eq!((evaluation.status, evaluation.log.as_str()), (Status::CompileError, "no such header"));
    assert!(runner().failed(&definition(), &workload(7), "mine", (Status::Passed, "")).is_err());
}

/// A sampling kernel that always draws the likeliest token, and one that draws another.
#[test]
fn a_sampling_kernel_is_judged_by_its_draws() {
    let mut definition = Definition::new("top_k_sampling", "sampling");
    definition.axes = Named::from([("rows", Axis::variable()), ("vocabulary", Axis::constant(4))]);
    definition.inputs = Named::from([
        ("probs", TensorSpec::tensor(&["rows", "vocabulary"], DataType::Float32)),
        ("top_k", TensorSpec::tensor(&["rows"], DataType::Int32)),
    ]);
    definition.outputs = Named::from([("samples", TensorSpec::tensor(&["rows"], DataType::Int32))]);
    let folder = tempfile::tempdir().unwrap();
    let probs = HostTensor::from_f64(DataType::Float32, &[1, 4], &[0.1, 0.6, 0.2, 0.1]).unwrap();
    let top_k = HostTensor::from_f64(DataType::Int32, &[1], &[1.0]).unwrap();
    write_safetensors(folder.path().join("s.safetensors"), &[("probs", &probs), ("top_k", &top_k)]).unwrap();
    let stored = |key: &str| InputSpec::Safetensors { path: "s.safetensors".to_owned(), tensor_key: key.to_owned() };
    let inputs = Named::from([("probs", stored("probs")), ("top_k", stored("top_k"))]);
    let workload = Workload { axes: Axes::from([("rows".to_owned(), 1)]), inputs, uuid: "s".to_owned() };
    for (drawn, status) in [(1, Status::Passed), (2, Status::IncorrectNumerical)] {
        let kernel = kernel(false, move |args| {
            let rows = args[0].as_tensor()?.shape()[0];
            Tensor::from_vec(vec![drawn; rows as usize], &[rows])?.into_any()
        });
        let bound = kernel.bind(&definition).unwrap();
        let mut reference = |_: &Named<Input>| Ok(vec![HostTensor::zeros(DataType::Int32, &[1])?]);
        let runner = runner().root(folder.path());
        // SAFETY: as for `run`.
        let trace = unsafe { runner.run(&bound, &workload, Reference::Closure(&mut reference)) }.unwrap();
        let evaluation = trace.evaluation.unwrap();
        assert_eq!(evaluation.status, status, "{}", evaluation.log);
        let timed = evaluation.performance.is_none_or(|figures| figures.reference_latency_ms > 0.0);
        assert!(timed && evaluation.performance.is_some() == (status == Status::Passed));
    }
}

/// A dataset of the definition, with solutions of these names and traces of them: sizes and speedups.
fn dataset(folder: &std::path::Path, traces: &[(&str, u64, f64)]) -> Dataset {
    let mut dataset = Dataset::open(folder).unwrap();
    dataset.add_definition(definition()).unwrap();
    for (name, n, speedup) in traces {
        if dataset.solution(name).is_none() {
            let json = format!(
                r#"{{"name": "{name}", "definition": "scale", "author": "me", "sources": [{{"path": "a.cpp", "content": "x"}}],
                "spec": {{"language": "cpp", "target_hardware": ["cpu"], "entry_point": "a.cpp::scale"}}}}"#
            );
            dataset.add_solution(Solution::from_json(&json).unwrap()).unwrap();
        }
        let mut trace = run(&good());
        trace.solution = Some((*name).to_owned());
        trace.workload = workload(*n);
        trace.evaluation.as_mut().unwrap().performance.as_mut().unwrap().speedup_factor = *speedup;
        dataset.add_traces(&[trace], TraceLayout::ByDefinition).unwrap();
    }
    dataset
}

#[test]
fn each_call_takes_the_kernel_that_was_the_best_for_its_sizes() {
    let folder = tempfile::tempdir().unwrap();
    let traces = [("fast", 4, 9.0), ("slow", 4, 2.0), ("slow", 5, 3.0), ("never", 5, 1.0), ("fast", 6, 2.0)];
    let dataset = dataset(folder.path(), &traces);
    // Each writes a number of its own.
    let load = |solution: &Solution| {
        let number = if solution.name == "fast" { 1.0 } else { 2.0 };
        assert_ne!(solution.name, "never", "what is the best for no sizes is not loaded");
        Ok(kernel(true, move |args| write(args, &vec![number; args[0].as_tensor()?.shape()[0] as usize])))
    };
    let mut config = ApplyConfig::new(1e-2, 1e-2);
    let dispatcher = Dispatcher::new(&dataset, "scale", &config, load).unwrap();
    let call = |dispatcher: &Dispatcher<'_>, n: i64| {
        let (x, y) = (Tensor::zeros(DType::F32, &[n]).unwrap(), Tensor::zeros(DType::F32, &[n]).unwrap());
        let inputs = [(&x).into(), 1.0.into()];
        // SAFETY: as for `run`.
        unsafe { dispatcher.call(&inputs, &[(&y).into()], Stream::NULL) }?;
        // SAFETY: as for `run`.
        let returned = unsafe { dispatcher.call_returning(&inputs, &HostAllocator, Stream::NULL) }?;
        assert_eq!(returned[0].as_slice::<f32>()?, y.as_slice::<f32>()?);
        Ok::<f32, FlashInferError>(y.as_slice::<f32>()?[0])
    };
    assert_eq!([4, 5, 6].map(|n| call(&dispatcher, n).unwrap()), [1.0, 2.0, 1.0]);
    let axes = |n: u64| Axes::from([("n".to_owned(), n)]);
    assert!(dispatcher.kernel(&axes(5)).is_some() && dispatcher.kernel(&axes(7)).is_none());
    let error = call(&dispatcher, 7).unwrap_err().to_string();
    assert!(error.contains("none for [n = 7]") && error.contains("3 sizes"), "{error}");
    let other = kernel(true, |args| write(args, &[3.0]));
    assert_eq!(call(&dispatcher.otherwise(other).unwrap(), 7).unwrap(), 3.0);
    config.use_best_on_miss = true;
    assert_eq!(call(&Dispatcher::new(&dataset, "scale", &config, load).unwrap(), 7).unwrap(), 1.0);
    // Where no trace is accurate enough there is nothing to call.
    let none = Dispatcher::new(&dataset, "scale", &ApplyConfig::new(-1.0, -1.0), load).unwrap();
    assert!(call(&none, 4).unwrap_err().to_string().contains("one of 0 sizes"));
    let error = Dispatcher::new(&dataset, "scael", &config, load).unwrap_err().to_string();
    assert!(error.contains("\"scael\""), "{error}");
}
