//! The dataset of the examples: it is whole, and its solutions are the sources beside them.
//! `FLASHINFER_RS_BLESS=1 cargo test --features bench --test bench_example` puts changed sources into the solutions.

#[path = "../examples/flashinfer_bench.rs"]
#[allow(dead_code, reason = "its reference is what is used here")]
mod example;
#[path = "support/example.rs"]
mod run_example;

use std::fs;
use std::path::{Path, PathBuf};

use flashinfer_rs::bench::{
    ApplyConfig, Axes, BenchmarkConfig, DataType, Dataset, Definition, Dialect, Environment, HashRule, HostTensor,
    Input, InputOptions, InputSpec, Kernel, Named, Performance, Reference, Runner, Solution, Status, Tolerance, Trace,
    TraceLayout, Verdict, Workload, apply, check_solution,
};
use flashinfer_rs::kernels::norm::{NormOptions, rmsnorm};
use flashinfer_rs::{FlashInferError, FlashInferRuntime, Result, RuntimeConfig, Stream};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/dataset")
}

#[test]
fn definitions_obey_flashinfer_benchs_rules() {
    let dataset = Dataset::open(root()).unwrap();
    assert_eq!(dataset.definitions().count(), 3);
    for definition in dataset.definitions() {
        definition.validate(Dialect::FlashInferBench).unwrap();
        assert!(dataset.solutions(&definition.name).count() > 0, "{}", definition.name);
        assert!(!dataset.workloads(&definition.name).is_empty(), "{}", definition.name);
    }
}

#[test]
fn solutions_hold_the_sources_that_lie_beside_them() {
    let dataset = Dataset::open(root()).unwrap();
    let mut seen = 0;
    for definition in dataset.definitions() {
        for solution in dataset.solutions(&definition.name) {
            let mut expected = solution.clone();
            for source in &mut expected.sources {
                source.content =
                    fs::read_to_string(root().join("sources").join(&solution.name).join(&source.path)).unwrap();
            }
            let folder = format!("solutions/{}/{}/{}", solution.author, definition.op_type, definition.name);
            let path = root().join(folder).join(format!("{}.json", solution.name));
            if std::env::var_os("FLASHINFER_RS_BLESS").is_some() {
                expected.write(&path).unwrap();
            }
            assert_eq!(Solution::read(&path).unwrap(), expected, "{}", solution.name);
            seen += 1;
        }
    }
    assert_eq!(seen, fs::read_dir(root().join("sources")).unwrap().count());
}

#[test]
fn solutions_are_what_this_crate_runs() {
    let dataset = Dataset::open(root()).unwrap();
    let all = dataset.definitions().flat_map(|definition| dataset.solutions(&definition.name));
    for solution in all {
        assert!(solution.is_native(), "{}", solution.name);
        assert!(solution.spec.destination_passing_style.is_some(), "{}: both dialects agree", solution.name);
        assert!(solution.package_name(HashRule::Named).starts_with(&format!("tvm_ffi_{}_", solution.name)));
        let vendored = solution.definition.starts_with("gdn");
        assert_eq!(solution.vendored_module(), vendored.then_some("gdn_prefill_sm90"), "{}", solution.name);
    }
}

#[test]
fn workloads_have_inputs_that_the_definition_takes() {
    let dataset = Dataset::open(root()).unwrap();
    for definition in dataset.definitions() {
        for trace in dataset.workloads(&definition.name) {
            let workload = &trace.workload;
            let shapes = definition.input_shapes(&workload.axes).unwrap();
            assert_eq!(shapes.len(), definition.inputs.len());
            // Stored inputs are not in the repository: random ones stand for them.
            let inputs = workload.inputs.iter().filter(|(_, input)| !matches!(input, InputSpec::Safetensors { .. }));
            let inputs: Named<_> = inputs.map(|(name, input)| (name, input.clone())).collect();
            let workload = Workload { inputs, ..workload.clone() };
            let inputs = workload.make_inputs(definition, root(), &InputOptions::default()).unwrap();
            assert_eq!(definition.axes_of_inputs(&inputs).unwrap(), workload.axes);
            for (text, verdict) in definition.check_constraints(&workload.axes, &Named::<Input>::new()).unwrap() {
                assert!(!matches!(verdict, Verdict::Broken(_)), "{text}: {verdict:?}");
            }
        }
    }
}

/// The command of the README: builds the C++ solutions, runs them, and writes traces by which they are chosen.
#[test]
fn the_example_builds_runs_checks_and_traces_the_solutions() {
    let folder = tempfile::tempdir().unwrap();
    let printed = run_example::run(folder.path());
    assert_eq!(printed.lines().last(), Some("PASSED"), "{printed}");
    let written = Dataset::open(folder.path()).unwrap();
    for (definition, solution) in
        [("gemm_f32_n128_k256", "gemm_f32_n128_k256_host"), ("rmsnorm_h512", "rmsnorm_h512_host")]
    {
        let (traces, workloads) = (written.traces(definition), written.workloads(definition));
        assert_eq!((traces.len(), workloads.len()), (3, 3), "{printed}");
        for (trace, workload) in traces.iter().zip(workloads) {
            assert_eq!((trace.solution.as_deref(), &trace.workload), (Some(solution), &workload.workload));
            let evaluation = trace.evaluation.as_ref().unwrap();
            let figures = evaluation.performance.unwrap();
            assert_eq!(evaluation.status, Status::Passed);
            assert!(figures.latency_ms > 0.0 && figures.reference_latency_ms > 0.0, "{figures:?}");
            let errors = evaluation.correctness.as_ref().unwrap();
            // Compared with f64: two sums in single precision differ, and so do roundings to bfloat16.
            assert!(errors.max_absolute_error < 0.1, "{errors:?}");
            let config = ApplyConfig::new(0.1, f64::MAX);
            let chosen = apply(&written, definition, &trace.workload.axes, &config);
            assert_eq!(chosen.map(|chosen| chosen.name.as_str()), Some(solution));
        }
        assert!(printed.contains(&format!("{definition} of {}: {solution} gives", workloads[0].workload.uuid)));
    }
    assert!(written.traces("gdn_prefill_qk2_v4_d128").is_empty());
}

/// On the host, where the kernel's contract holds as well and the reference computes.
#[test]
fn the_vendored_kernel_is_called_as_a_solution() {
    FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let whole = Dataset::open(root()).unwrap();
    let (definition, solution) = (
        whole.definition("gdn_prefill_qk2_v4_d128").unwrap(),
        whole.solution("gdn_prefill_qk2_v4_d128_vendored").unwrap(),
    );
    let mut copy = Dataset::open(folder.path()).unwrap();
    copy.add_definition(definition.clone()).unwrap();
    copy.add_traces(&whole.workloads(&definition.name)[..1], TraceLayout::ByDefinition).unwrap();
    example::dataset_inputs::write(&copy).unwrap();
    let kernel = Kernel::vendored(solution).unwrap();
    assert_eq!((kernel.name(), kernel.is_destination_passing()), (solution.name.as_str(), true));
    let bound = kernel.bind(definition).unwrap();
    let mut config = BenchmarkConfig::default();
    (config.num_trials, config.warmup_runs, config.iterations) = (1, 0, 1);
    let runner = Runner::on_host().config(config).root(folder.path());
    let mut reference = |inputs: &Named<Input>| example::reference(definition, inputs);
    let workload = &copy.workloads(&definition.name)[0].workload;
    // SAFETY: the stored offsets are those of sequences that have tokens; on the host they are looked at, too.
    let trace = unsafe { runner.run(&bound, workload, Reference::Closure(&mut reference)) }.unwrap();
    assert!(trace.passed(), "{trace:?}");
    let named = |dependency: &str| {
        let mut other = solution.clone();
        other.spec.dependencies = vec![dependency.to_owned()];
        Kernel::vendored(&other).unwrap_err().to_string()
    };
    let error = named("flashinfer-rs:norm");
    assert!(
        error.contains("\"gdn_prefill\" of \"norm\"") && error.contains("gdn_prefill of gdn_prefill_sm90"),
        "{error}"
    );
    assert!(named("cublas").contains("no dependency"));
}

/// Of a definition whose kernel this crate has, on the host: what the example does with a solution that was built.
#[test]
fn a_workload_goes_all_the_way_to_a_trace_that_chooses_the_solution() {
    FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
    let dataset = Dataset::open(root()).unwrap();
    let definition = dataset.definition("rmsnorm_h512").unwrap();
    let mut traces = Vec::new();
    let config = BenchmarkConfig::default();
    let with = (&config, &Tolerance::of(definition));
    for trace in dataset.workloads(&definition.name) {
        let check = |solution: fn(&Definition, &Named<Input>) -> Result<Vec<HostTensor>>| {
            let mut seen = Vec::new();
            let solution = |inputs: &Named<Input>| {
                seen.push(inputs.clone());
                solution(definition, inputs)
            };
            let (root, options) = (dataset.root(), InputOptions::default());
            let reference = |inputs: &Named<Input>| plain_rmsnorm(definition, inputs);
            let judgement =
                check_solution(definition, &trace.workload, root, with, &options, solution, reference).unwrap();
            (judgement, seen)
        };
        let (judgement, seen) = check(kernel);
        assert_eq!(seen.len(), 3);
        assert!(seen[0] != seen[1] && seen[1] != seen[2], "each trial has inputs of its own");
        let environment = Environment { hardware: "the host".to_owned(), libs: Named::new() };
        let performance = Performance { latency_ms: 1.0, reference_latency_ms: 2.0, speedup_factor: 2.0 };
        let evaluation = judgement.into_evaluation(environment, Some(performance)).unwrap();
        assert_eq!(evaluation.status, Status::Passed, "{evaluation:?}");
        traces.push(Trace {
            solution: Some("rmsnorm_h512_host".to_owned()),
            evaluation: Some(evaluation),
            ..trace.clone()
        });
        let wrong = |definition: &Definition, inputs: &Named<Input>| {
            let mut outputs = kernel(definition, inputs)?;
            let number = f64::from(outputs[0].float(0)) + 1.0;
            outputs[0].set(0, number);
            Ok(outputs)
        };
        assert_eq!(check(wrong).0.status, Status::IncorrectNumerical);
        let (judgement, seen) = check(|_, _| Err(FlashInferError::NotInitialized));
        assert_eq!((judgement.status, judgement.correctness, seen.len()), (Status::RuntimeError, None, 1));
        assert!(judgement.log[0].contains("not initialized"), "{:?}", judgement.log);
    }
    let folder = tempfile::tempdir().unwrap();
    let mut copy = Dataset::open(folder.path()).unwrap();
    copy.add_definition(definition.clone()).unwrap();
    copy.add_solution(dataset.solution("rmsnorm_h512_host").unwrap().clone()).unwrap();
    copy.add_traces(&traces, TraceLayout::ByAuthor).unwrap();
    let copy = Dataset::open(folder.path()).unwrap();
    let config = ApplyConfig::new(1e-2, f64::MAX);
    let chosen = |batch| {
        let axes = Axes::from([("batch_size".to_owned(), batch)]);
        apply(&copy, &definition.name, &axes, &config).map(|solution| solution.name.clone())
    };
    assert_eq!((chosen(7).as_deref(), chosen(8)), (Some("rmsnorm_h512_host"), None));
}

/// The kernel of this crate, whose host form runs without a GPU.
fn kernel(definition: &Definition, inputs: &Named<Input>) -> Result<Vec<HostTensor>> {
    let [Input::Tensor(states), Input::Tensor(weight)] = inputs.values().collect::<Vec<_>>()[..] else { panic!() };
    let shape = definition.output_shapes(&definition.axes_of_inputs(inputs)?)?.remove(0).unwrap();
    let mut output = HostTensor::zeros(DataType::Bfloat16, &shape)?;
    let options = NormOptions::default().with_eps(1e-6);
    rmsnorm(&mut output.as_mut()?, &states.as_ref()?, &weight.as_ref()?, &options, Stream::NULL)?;
    Ok(vec![output])
}

/// As the definition's reference has it.
fn plain_rmsnorm(definition: &Definition, inputs: &Named<Input>) -> Result<Vec<HostTensor>> {
    let [Input::Tensor(states), Input::Tensor(weight)] = inputs.values().collect::<Vec<_>>()[..] else { panic!() };
    let mut output = HostTensor::zeros(definition.outputs.get("output").unwrap().dtype.clone(), states.shape())?;
    for row in 0..states.shape()[0] as usize {
        let values: Vec<f64> = (0..512).map(|i| f64::from(states.float(row * 512 + i))).collect();
        let scale = 1.0 / (values.iter().map(|value| value * value).sum::<f64>() / 512.0 + 1e-6).sqrt();
        values.iter().enumerate().for_each(|(i, value)| {
            output.set(row * 512 + i, value * scale * f64::from(weight.float(i)));
        });
    }
    Ok(vec![output])
}
