//! The dataset of the examples: it is whole, and its solutions are the sources beside them.
//! `FLASHINFER_RS_BLESS=1 cargo test --features bench --test bench_example` puts changed sources into the solutions.

use std::fs;
use std::path::{Path, PathBuf};

use flashinfer_rs::bench::{
    ApplyConfig, Axes, BenchmarkConfig, DataType, Dataset, Definition, Dialect, Environment, HashRule, HostTensor,
    Input, InputOptions, InputSpec, Named, Performance, Solution, Status, Tolerance, Trace, TraceLayout, Verdict,
    Workload, apply, check_solution,
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
