//! FlashInfer-Bench's data: definitions, solutions, workloads and traces are read and written as upstream does, constraints are
//! evaluated, inputs made, outputs judged, and the best solution found.

use std::fs;

use flashinfer_rs::FlashInferError;
use flashinfer_rs::bench::{
    ApplyConfig, ApplyTable, Axes, Axis, BenchmarkConfig, BuildSpec, Correctness, DataType, Dataset, Definition,
    Dialect, DistributedKernel, Environment, Evaluation, HashRule, HostTensor, Input, InputOptions, InputSpec, Json,
    Language, Named, Performance, Safetensors, Scalar, Solution, SourceFile, Status, TensorSpec, Tolerance, Trace,
    TraceLayout, Trial, Verdict, Workload, apply, judge, judge_sampling, write_safetensors,
};
use proptest::prelude::*;

fn rmsnorm() -> Definition {
    let mut definition = Definition::new("rmsnorm_h8", "rmsnorm");
    definition.axes = Named::from([("batch_size", Axis::variable()), ("hidden_size", Axis::constant(8))]);
    definition.inputs = Named::from([
        ("hidden_states", TensorSpec::tensor(&["batch_size", "hidden_size"], DataType::Bfloat16)),
        ("weight", TensorSpec::tensor(&["hidden_size"], DataType::Bfloat16)),
    ]);
    definition.outputs =
        Named::from([("output", TensorSpec::tensor(&["batch_size", "hidden_size"], DataType::Bfloat16))]);
    definition.reference = Some("import torch\n\ndef run(hidden_states, weight):\n    return hidden_states".to_owned());
    definition
}

fn solution(name: &str, author: &str) -> Solution {
    Solution {
        name: name.to_owned(),
        definition: "rmsnorm_h8".to_owned(),
        author: author.to_owned(),
        spec: BuildSpec {
            language: Language::Cpp,
            target_hardware: vec!["cpu".to_owned()],
            entry_point: "main.cpp::run".to_owned(),
            dependencies: Vec::new(),
            destination_passing_style: None,
            binding: None,
        },
        sources: vec![SourceFile { path: "main.cpp".to_owned(), content: "int x;".to_owned() }],
        description: None,
    }
}

fn axes(sizes: &[(&str, u64)]) -> Axes {
    sizes.iter().map(|(name, size)| ((*name).to_owned(), *size)).collect()
}

fn workload(batch: u64) -> Workload {
    Workload { axes: axes(&[("batch_size", batch)]), inputs: Named::new(), uuid: format!("w{batch}") }
}

fn passed(solution: &str, batch: u64, speedup: f64, error: f64) -> Trace {
    Trace {
        definition: "rmsnorm_h8".to_owned(),
        workload: workload(batch),
        solution: Some(solution.to_owned()),
        evaluation: Some(Evaluation {
            status: Status::Passed,
            environment: Environment { hardware: "some GPU".to_owned(), libs: Named::new() },
            timestamp: "2026-01-01T00:00:00".to_owned(),
            log: String::new(),
            correctness: Some(Correctness { max_relative_error: error, max_absolute_error: error, extra: None }),
            performance: Some(Performance {
                latency_ms: 1.0 / speedup,
                reference_latency_ms: 1.0,
                speedup_factor: speedup,
            }),
        }),
    }
}

#[test]
fn a_definition_is_written_as_upstream_writes_it_and_read_again_as_itself() {
    let definition = rmsnorm();
    let json = definition.to_json();
    assert!(json.starts_with("{\n  \"name\": \"rmsnorm_h8\",\n  \"op_type\": \"rmsnorm\",\n  \"axes\": {\n"), "{json}");
    assert_eq!(Definition::from_json(&json).unwrap(), definition);
    assert_eq!(definition.dialect(), Dialect::FlashInferBench);
}

#[test]
fn the_order_of_inputs_and_outputs_is_that_of_the_file() {
    let json = r#"{"name":"n","op_type":"o","axes":{},"inputs":{"z":{"shape":[],"dtype":"int8"},"a":{"shape":null,
        "dtype":"float32"},"m":{"shape":[],"dtype":"bool"}},"outputs":{},"reference":"def run(z, a, m): pass"}"#;
    let definition = Definition::from_json(json).unwrap();
    assert_eq!(definition.inputs.names().collect::<Vec<_>>(), ["z", "a", "m"]);
    assert_eq!(definition.inputs.get("z").unwrap().shape, Some(vec![]));
    assert_eq!(definition.inputs.get("a").unwrap().shape, None);
}

#[test]
fn axes_without_a_type_are_told_apart_by_their_value() {
    let json = r#"{"name":"n","op_type":"o","axes":{"a":{},"b":{"value":3.0}},"inputs":{},"outputs":{}}"#;
    let definition = Definition::from_json(json).unwrap();
    assert_eq!(definition.var_axes(), ["a"]);
    assert_eq!(definition.const_axes(), axes(&[("b", 3)]));
}

/// As FlashInfer writes one: an output that is an input too, types that FlashInfer-Bench does not have, and more keys.
const OWN_DIALECT: &str = r#"{
  "name": "fused_h8", "definition": "fused", "op_type": "rmsnorm",
  "axes": {"b": {"type": "var"}, "h": {"type": "const", "value": 8}},
  "inputs": {
    "residual": {"shape": ["b", "h"], "dtype": "bfloat16", "init": "normal"},
    "state": {"shape": ["b"], "dtype": "unknown", "optional": true},
    "eps": {"shape": null, "dtype": "float32", "optional": true}
  },
  "outputs": {"residual": {"shape": ["b", "h"], "dtype": "bfloat16", "param": "residual"}},
  "reference": "def _reference(residual):\n    return residual"
}"#;

#[test]
fn flashinfers_own_dialect_is_read_and_nothing_of_it_is_lost() {
    let definition = Definition::from_json(OWN_DIALECT).unwrap();
    assert_eq!(definition.dialect(), Dialect::FlashInfer);
    assert!(definition.inputs.get("state").unwrap().optional);
    assert_eq!(definition.inputs.get("state").unwrap().dtype, DataType::Other("unknown".to_owned()));
    assert_eq!(definition.extra.get("definition"), Some(&Json::Text("fused".to_owned())));
    assert_eq!(definition.outputs.get("residual").unwrap().extra.names().collect::<Vec<_>>(), ["param"]);
    assert_eq!(Definition::from_json(&definition.to_json()).unwrap(), definition);
    definition.validate(Dialect::FlashInfer).unwrap();
    let error = definition.validate(Dialect::FlashInferBench).unwrap_err().to_string();
    assert!(error.contains("inputs.state") && error.contains("unknown"), "{error}");
}

#[test]
fn a_dialects_rules_are_checked_one_by_one() {
    type Change = fn(&mut Definition);
    let cases: [(Change, &str); 6] = [
        (|d| d.reference = None, "reference"),
        (|d| d.reference = Some("  def run(x): pass".to_owned()), "reference"),
        (|d| d.constraints.push("batch_size ==".to_owned()), "constraint"),
        (|d| _ = d.outputs.insert("weight", TensorSpec::scalar(DataType::Float32)), "outputs.weight"),
        (|d| _ = d.inputs.insert("x", TensorSpec::tensor(&["nowhere"], DataType::Float32)), "inputs.x"),
        (|d| _ = d.inputs.insert("x", TensorSpec::scalar(DataType::Uint8)), "inputs.x"),
    ];
    for (change, place) in cases {
        let mut definition = rmsnorm();
        change(&mut definition);
        let error = definition.validate(Dialect::FlashInferBench).unwrap_err().to_string();
        assert!(error.contains(place), "{error}");
    }
}

#[test]
fn sizes_of_axes_follow_from_the_inputs_and_constant_ones_are_compared() {
    let definition = rmsnorm();
    assert_eq!(definition.axes_of(&[Some(&[3, 8]), Some(&[8])]).unwrap(), axes(&[("batch_size", 3)]));
    let shapes = definition.output_shapes(&axes(&[("batch_size", 3)])).unwrap();
    assert_eq!(shapes, [Some(vec![3, 8])]);
    for (shapes, what) in [
        (&[Some(&[3u64, 9][..]), Some(&[8])][..], "found 9"),
        (&[Some(&[3, 8]), Some(&[7])], "found 7"),
        (&[Some(&[3, 8, 1]), Some(&[8])], "3, 8, 1"),
        (&[Some(&[3, 8])], "1 inputs"),
        (&[None, Some(&[8])], "no tensor"),
    ] {
        let error = definition.axes_of(shapes).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    }
    let error = definition.output_shapes(&Axes::new()).unwrap_err().to_string();
    assert!(error.contains("batch_size"), "{error}");
}

/// All kinds of constraints that the public definitions have.
#[test]
fn constraints_are_evaluated_as_python_would() {
    let mut definition = Definition::new("n", "o");
    definition.axes = Named::from([("heads", Axis::constant(32)), ("kv_heads", Axis::constant(8))]);
    let indptr = HostTensor::from_f64(DataType::Int32, &[3], &[0.0, 5.0, 9.0]).unwrap();
    let table = HostTensor::from_f64(DataType::Int64, &[2, 2], &[1.0, 2.0, 3.0, -4.0]).unwrap();
    let inputs = Named::from([
        ("indptr", Input::Tensor(indptr)),
        ("table", Input::Tensor(table)),
        ("scale", Input::Float(0.5)),
        ("offset", Input::Int(-7)),
        ("causal", Input::Bool(true)),
    ]);
    let sizes = axes(&[("len_indptr", 3), ("batch", 2), ("indices", 9), ("zero", 0)]);
    for (text, holds) in [
        ("len_indptr == batch + 1", true),
        ("indices == indptr[-1].item()", true),
        ("indices == indptr[-2].item()", false),
        ("heads % kv_heads == 0", true),
        ("heads >= kv_heads and kv_heads > 0", true),
        ("2 * kv_heads == heads", false),
        ("heads == kv_heads * 4", true),
        ("indptr.shape[0] == len_indptr", true),
        ("indptr.shape[-1] <= 2", false),
        ("len(indptr) == 3", true),
        ("0 < batch < len_indptr <= 3", true),
        ("0 < batch < len_indptr < 3", false),
        ("table[1, -1] == -4 and table[0][1] == 2", true),
        ("not batch == 3 or zero", true),
        ("zero", false),
        ("zero or batch", true),
        ("-7 // 2 == -4 and -7 % 2 == 1 and 7 // -2 == -4 and 7 % -2 == -1", true),
        ("heads / 5 == 6.4", true),
        ("(heads + 1) * 2 - 1 != 65", false),
        ("scale * 4 == batch and offset == -7 and causal", true),
        ("1_000 == 1e3 and True != False", true),
    ] {
        definition.constraints = vec![text.to_owned()];
        let verdict = definition.check_constraints(&sizes, &inputs).unwrap()[0].1.clone();
        assert_eq!(verdict == Verdict::Holds, holds, "{text}: {verdict:?}");
        assert!(!matches!(verdict, Verdict::Unknown(_)), "{text}: {verdict:?}");
    }
    definition.constraints = vec!["indices == indptr[-2].item()".to_owned(), "other[0] == 1".to_owned()];
    let verdicts = definition.check_constraints(&sizes, &inputs).unwrap();
    assert_eq!(verdicts[0].1, Verdict::Broken("indices == indptr[-2].item(): 9 against 5".to_owned()));
    assert_eq!(verdicts[1].1, Verdict::Unknown("the input \"other\"".to_owned()));
    for broken in ["batch / zero == 1", "batch % zero == 1", "indptr[3] == 0", "indptr[0, 0] == 0", "scale[0] == 1"] {
        definition.constraints = vec![broken.to_owned()];
        let verdict = definition.check_constraints(&sizes, &inputs).unwrap()[0].1.clone();
        assert!(matches!(verdict, Verdict::Broken(_)), "{broken}: {verdict:?}");
    }
}

#[test]
fn a_solutions_hashes_are_upstreams() {
    // Computed with Python's hashlib by upstream's three rules.
    let mut solution = solution("some name", "me");
    solution.spec.dependencies = vec!["cublas".to_owned()];
    solution.sources.insert(0, SourceFile { path: "z.h".to_owned(), content: "// ü".to_owned() });
    assert_eq!(solution.hash(HashRule::Named), "12fbee1ed1eddd07fb12387f5edcf52e9845bc84");
    assert_eq!(solution.hash(HashRule::Nameless), "f234302bb56945c48fcbd8d47eb860a2966f6d23");
    assert_eq!(solution.hash(HashRule::FlashInfer), "8d77b664c275fdca31eb30c170390fb35188733605082ba22c5a2df93d5171b1");
    assert_eq!(solution.package_name(HashRule::Named), "tvm_ffi_some_name_12fbee");
    let unique = solution.with_unique_name();
    assert_eq!(unique.name, format!("some name_{}", &solution.hash(HashRule::Nameless)[..8]));
    assert_eq!(unique.hash(HashRule::Nameless), solution.hash(HashRule::Nameless));
    solution.name = "4bit-gemm".to_owned();
    assert!(solution.package_name(HashRule::Named).starts_with("tvm_ffi__4bit_gemm_"));
}

#[test]
fn what_a_solution_leaves_out_means_another_thing_in_each_dialect() {
    let mut solution = solution("s", "me");
    assert!(solution.spec.is_destination_passing(Dialect::FlashInferBench));
    assert!(!solution.spec.is_destination_passing(Dialect::FlashInfer));
    assert!(!solution.to_json().contains("destination_passing_style"));
    solution.spec.destination_passing_style = Some(false);
    let again = Solution::from_json(&solution.to_json()).unwrap();
    assert_eq!(again, solution);
    assert!(!again.spec.is_destination_passing(Dialect::FlashInferBench));
    assert_eq!((again.spec.entry_file(), again.spec.entry_symbol()), ("main.cpp", "run"));
}

#[test]
fn sources_are_written_into_a_folder_and_nowhere_else() {
    let folder = tempfile::tempdir().unwrap();
    let mut solution = solution("s", "me");
    solution.sources.push(SourceFile { path: "include/x.h".to_owned(), content: "// x".to_owned() });
    let paths = solution.write_sources(folder.path()).unwrap();
    assert_eq!(fs::read_to_string(&paths[1]).unwrap(), "// x");
    solution.sources.push(SourceFile { path: "../x".to_owned(), content: "x".to_owned() });
    assert!(matches!(solution.write_sources(folder.path()), Err(FlashInferError::Data(_))));
}

#[test]
fn a_trace_is_one_line_with_everything_as_upstream_writes_it() {
    let mut trace = Trace::workload("rmsnorm_h8", workload(3));
    trace.workload.inputs = Named::from([
        ("a", InputSpec::Random),
        ("b", InputSpec::Scalar { value: Scalar::Int(1) }),
        ("c", InputSpec::Scalar { value: Scalar::Float(1.0) }),
        ("d", InputSpec::Scalar { value: Scalar::Bool(true) }),
        ("e", InputSpec::Safetensors { path: "./blob/x.safetensors".to_owned(), tensor_key: "t".to_owned() }),
    ]);
    let line = trace.to_json();
    assert_eq!(
        line,
        r#"{"definition":"rmsnorm_h8","workload":{"axes":{"batch_size":3},"inputs":{"a":{"type":"random"},"b":{"type":"scalar","value":1},"c":{"type":"scalar","value":1.0},"d":{"type":"scalar","value":true},"e":{"type":"safetensors","path":"./blob/x.safetensors","tensor_key":"t"}},"uuid":"w3"},"solution":null,"evaluation":null}"#
    );
    assert_eq!(Trace::from_json(&line).unwrap(), trace);
}

#[test]
fn an_input_without_a_type_is_what_its_fields_say() {
    let line = r#"{"definition":"d","workload":{"axes":{},"inputs":{"a":{},"b":{"value":3},"c":{"path":"p","tensor_key":"k"},
        "d":{"value":"1.5"}},"uuid":"u"}}"#;
    let inputs = Trace::from_json(line).unwrap().workload.inputs;
    assert_eq!(inputs.get("a"), Some(&InputSpec::Random));
    assert_eq!(inputs.get("b"), Some(&InputSpec::Scalar { value: Scalar::Int(3) }));
    assert!(matches!(inputs.get("c"), Some(InputSpec::Safetensors { .. })));
    assert_eq!(inputs.get("d"), Some(&InputSpec::Scalar { value: Scalar::Float(1.5) }));
}

#[test]
fn figures_that_are_not_finite_are_read_as_words_and_as_texts_and_written_as_texts() {
    let mut trace = passed("s", 1, 2.0, 0.0);
    let evaluation = trace.evaluation.as_mut().unwrap();
    (evaluation.status, evaluation.performance) = (Status::IncorrectNumerical, None);
    let extra = Some(Named::from([("ratio", Json::Float(f64::NEG_INFINITY))]));
    evaluation.correctness =
        Some(Correctness { max_relative_error: f64::NAN, max_absolute_error: f64::INFINITY, extra });
    let line = trace.to_json();
    assert!(
        line.contains(r#""max_relative_error":"NaN","max_absolute_error":"Infinity","extra":{"ratio":"-Infinity"}"#)
    );
    for line in
        [line.clone(), line.replace("\"NaN\"", "NaN").replace("\"Infinity\"", "Infinity"), line.replace("NaN", "nan")]
    {
        let read = Trace::from_json(&line).unwrap().evaluation.unwrap().correctness.unwrap();
        assert!(read.max_relative_error.is_nan() && read.max_absolute_error == f64::INFINITY, "{line}");
    }
}

#[test]
fn an_evaluation_has_what_its_status_says() {
    let trace = passed("s", 1, 2.0, 0.0);
    type Change = fn(&mut Evaluation);
    let changes: [Change; 6] = [
        |e| e.correctness = None,
        |e| e.performance = None,
        |e| e.status = Status::Timeout,
        |e| e.status = Status::IncorrectNumerical,
        |e| e.correctness.as_mut().unwrap().max_absolute_error = -1.0,
        |e| e.performance.as_mut().unwrap().latency_ms = f64::NAN,
    ];
    let folder = tempfile::tempdir().unwrap();
    for change in changes {
        let mut trace = trace.clone();
        change(trace.evaluation.as_mut().unwrap());
        assert!(matches!(Trace::from_json(&trace.to_json()), Err(FlashInferError::Data(_))), "{trace:?}");
        assert!(matches!(Trace::append(folder.path().join("t.jsonl"), &[trace]), Err(FlashInferError::Data(_))));
    }
    assert!(!folder.path().join("t.jsonl").exists());
}

#[test]
fn traces_are_put_behind_the_others_even_where_the_last_line_was_not_ended() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("deep/t.jsonl");
    Trace::append(&path, &[passed("a", 1, 2.0, 0.0)]).unwrap();
    fs::write(&path, format!("\n  \n{}", fs::read_to_string(&path).unwrap().trim_end())).unwrap();
    Trace::append(&path, &[passed("b", 1, 2.0, 0.0), passed("c", 1, 2.0, 0.0)]).unwrap();
    let names: Vec<_> = Trace::read_lines(&path).unwrap().into_iter().map(|trace| trace.solution.unwrap()).collect();
    assert_eq!(names, ["a", "b", "c"]);
}

#[test]
fn a_dataset_is_written_where_upstream_looks_and_read_from_any_depth() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let mut dataset = Dataset::open(root).unwrap();
    dataset.add_definition(rmsnorm()).unwrap();
    dataset.add_solution(solution("first", "baseline")).unwrap();
    dataset.add_traces(&[Trace::workload("rmsnorm_h8", workload(3))], TraceLayout::ByDefinition).unwrap();
    dataset.add_traces(&[passed("first", 3, 2.0, 0.0)], TraceLayout::ByDefinition).unwrap();
    dataset.add_traces(&[passed("first", 4, 2.0, 0.0)], TraceLayout::ByAuthor).unwrap();
    for file in [
        "definitions/rmsnorm/rmsnorm_h8.json",
        "solutions/baseline/rmsnorm/rmsnorm_h8/first.json",
        "workloads/rmsnorm/rmsnorm_h8.jsonl",
        "traces/rmsnorm/rmsnorm_h8.jsonl",
        "traces/baseline/rmsnorm/rmsnorm_h8.jsonl",
    ] {
        assert!(root.join(file).is_file(), "{file}");
    }
    solution("second", "me").write(root.join("solutions/second.json")).unwrap();
    let dataset = Dataset::open(root).unwrap();
    assert_eq!(dataset.definition("rmsnorm_h8"), Some(&rmsnorm()));
    assert_eq!(dataset.solutions("rmsnorm_h8").map(|s| s.name.as_str()).collect::<Vec<_>>(), ["first", "second"]);
    assert_eq!((dataset.workloads("rmsnorm_h8").len(), dataset.traces("rmsnorm_h8").len()), (1, 2));
}

#[test]
fn a_dataset_refuses_names_twice_and_traces_in_the_wrong_folder() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    rmsnorm().write(root.join("definitions/a.json")).unwrap();
    rmsnorm().write(root.join("definitions/b.json")).unwrap();
    let error = Dataset::open(root).unwrap_err().to_string();
    assert!(error.contains("b.json") && error.contains("a second time"), "{error}");
    fs::remove_file(root.join("definitions/b.json")).unwrap();
    solution("s", "a").write(root.join("solutions/a/s.json")).unwrap();
    solution("s", "b").write(root.join("solutions/b/s.json")).unwrap();
    assert!(Dataset::open(root).unwrap_err().to_string().contains("a second time"));
    fs::remove_dir_all(root.join("solutions")).unwrap();
    Trace::append(root.join("workloads/x.jsonl"), &[passed("s", 1, 1.0, 0.0)]).unwrap();
    assert!(Dataset::open(root).unwrap_err().to_string().contains("x.jsonl"));
    fs::rename(root.join("workloads"), root.join("traces")).unwrap();
    assert_eq!(Dataset::open(root).unwrap().traces("rmsnorm_h8").len(), 1);
}

#[test]
fn the_best_solution_is_the_fastest_of_those_that_are_accurate_enough() {
    let folder = tempfile::tempdir().unwrap();
    let mut dataset = Dataset::open(folder.path()).unwrap();
    dataset.add_definition(rmsnorm()).unwrap();
    for name in ["a", "b", "rough"] {
        dataset.add_solution(solution(name, "me")).unwrap();
    }
    let mut elsewhere = passed("a", 1, 100.0, 0.0);
    elsewhere.evaluation.as_mut().unwrap().environment.hardware = "another GPU".to_owned();
    let traces = [
        passed("a", 1, 2.0, 1e-3),
        passed("b", 1, 3.0, 1e-3),
        passed("rough", 1, 9.0, 0.5),
        passed("a", 2, 2.0, 0.0),
        passed("b", 2, 2.0, 0.0),
        passed("a", 3, 5.0, 0.0),
        elsewhere,
    ];
    dataset.add_traces(&traces, TraceLayout::ByDefinition).unwrap();
    let mut config = ApplyConfig::new(1e-2, 1e-2);
    config.hardware = Some("some GPU".to_owned());
    let best = |batch, config: &ApplyConfig| {
        apply(&dataset, "rmsnorm_h8", &axes(&[("batch_size", batch)]), config).map(|solution| solution.name.as_str())
    };
    assert_eq!(best(1, &config), Some("b"));
    assert_eq!(best(2, &config), Some("a"), "the first of two that are alike");
    assert_eq!(best(4, &config), None);
    config.use_best_on_miss = true;
    assert_eq!(best(4, &config), Some("a"), "two sizes against one");
    assert_eq!(best(1, &ApplyConfig::new(1.0, 1.0)), Some("a"), "all hardware together");
    assert_eq!(ApplyTable::new(&dataset, "rmsnorm_h8", &ApplyConfig::new(1e-2, 1e-5)).len(), 3);
    let best = dataset.best_trace("rmsnorm_h8", &axes(&[("batch_size", 2)]), 1e-2, 1e-2).unwrap();
    assert_eq!(best.solution.as_deref(), Some("a"));
}

#[test]
fn inputs_are_made_in_the_definitions_order_and_follow_from_the_seed() {
    let mut definition = rmsnorm();
    definition.inputs.insert("eps", TensorSpec::scalar(DataType::Float32));
    definition.inputs.insert("flags", TensorSpec::tensor(&["batch_size"], DataType::Bool));
    definition.inputs.insert("packed", TensorSpec::tensor(&["batch_size"], DataType::Float4E2m1));
    let mut workload = workload(5);
    workload.inputs = Named::from([("eps", InputSpec::Scalar { value: Scalar::Int(1) })]);
    let options = InputOptions::default();
    let inputs = workload.make_inputs(&definition, ".", &options).unwrap();
    assert_eq!(inputs.names().collect::<Vec<_>>(), ["hidden_states", "weight", "eps", "flags", "packed"]);
    assert_eq!(inputs.get("eps"), Some(&Input::Int(1)));
    let Some(Input::Tensor(states)) = inputs.get("hidden_states") else { panic!() };
    assert_eq!((states.dtype(), states.shape()), (&DataType::Bfloat16, &[5, 8][..]));
    let view = states.as_ref().unwrap();
    assert_eq!(view.as_ptr().addr() % 64, 0);
    assert_eq!(definition.axes_of_inputs(&inputs).unwrap(), workload.axes);
    assert_eq!(workload.make_inputs(&definition, ".", &options).unwrap(), inputs);
    let mut other = InputOptions::default();
    other.seed = 1;
    assert_ne!(workload.make_inputs(&definition, ".", &other).unwrap(), inputs);
    let Some(Input::Tensor(flags)) = inputs.get("flags") else { panic!() };
    assert!(flags.bytes().iter().all(|&flag| flag <= 1));
}

#[test]
fn optional_inputs_are_left_out_where_that_is_asked_for() {
    let mut definition = Definition::from_json(OWN_DIALECT).unwrap();
    let workload = Workload { axes: axes(&[("b", 2)]), inputs: Named::new(), uuid: "u".to_owned() };
    let mut options = InputOptions::default();
    assert!(workload.make_inputs(&definition, ".", &options).is_err(), "no tensor is of an unknown type");
    options.leave_out_optional = true;
    let inputs = workload.make_inputs(&definition, ".", &options).unwrap();
    assert_eq!(inputs.get("state"), Some(&Input::Absent));
    assert_eq!(inputs.get("eps"), Some(&Input::Absent));
    assert_eq!(definition.axes_of_inputs(&inputs).unwrap(), workload.axes);
    definition.inputs = Named::from([("eps", TensorSpec::scalar(DataType::Int32))]);
    let inputs =
        Workload { axes: Axes::new(), ..workload }.make_inputs(&definition, ".", &InputOptions::default()).unwrap();
    assert!(matches!(inputs.get("eps"), Some(Input::Int(-1024..=1023))));
}

#[test]
fn stored_inputs_come_from_safetensors_files_of_the_dataset() {
    let folder = tempfile::tempdir().unwrap();
    let definition = rmsnorm();
    let weight = HostTensor::from_f64(DataType::Bfloat16, &[8], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]).unwrap();
    let other = HostTensor::from_f64(DataType::Int64, &[2], &[-1.0, 1e15]).unwrap();
    let path = Dataset::blob_path(&definition, "some-uuid").unwrap();
    assert_eq!(path, "blob/workloads/rmsnorm/rmsnorm_h8/rmsnorm_h8_some-uuid.safetensors");
    write_safetensors(folder.path().join(&path), &[("w", &weight), ("other", &other)]).unwrap();
    let stored = |key: &str| {
        let mut workload = workload(2);
        workload.inputs =
            Named::from([("weight", InputSpec::Safetensors { path: format!("./{path}"), tensor_key: key.to_owned() })]);
        workload.make_inputs(&definition, folder.path(), &InputOptions::default())
    };
    assert_eq!(stored("w").unwrap().get("weight"), Some(&Input::Tensor(weight.clone())));
    let error = stored("other").unwrap_err().to_string();
    assert!(error.contains("int64[2]") && error.contains("bfloat16[8]"), "{error}");
    let error = stored("nothing").unwrap_err().to_string();
    assert!(error.contains("other") && error.contains("nothing"), "{error}");
    let file = Safetensors::open(folder.path().join(&path)).unwrap();
    // The larger elements stand first.
    assert_eq!(file.names().collect::<Vec<_>>(), ["other", "w"]);
    assert_eq!(file.read("other").unwrap(), other);
    assert!(matches!(write_safetensors(folder.path().join(&path), &[("w", &weight)]), Err(FlashInferError::Io { .. })));
}

fn vector(values: &[f64]) -> HostTensor {
    HostTensor::from_f64(DataType::Float32, &[values.len() as u64], values).unwrap()
}

fn compared(output: &HostTensor, reference: &HostTensor, name: &str) -> (Status, Option<Correctness>) {
    let mut definition = Definition::new(name, "o");
    definition.outputs = Named::from([("y", TensorSpec::tensor(&["n"], DataType::Float32))]);
    let (outputs, reference) = ([output.clone()], [reference.clone()]);
    let trial = Trial { outputs: &outputs, reference: &reference };
    let judgement = judge(&definition, &[trial], &Tolerance::of(&definition)).unwrap();
    (judgement.status, judgement.correctness)
}

#[test]
fn outputs_are_judged_by_upstreams_rules() {
    let reference = vector(&[1.0, 100.0, 0.0, -2.0]);
    // Beyond both bounds is wrong; beyond one alone is not.
    let (status, correctness) = compared(&vector(&[1.0, 100.5, 0.009, -2.0]), &reference, "n");
    assert_eq!(status, Status::Passed);
    let correctness = correctness.unwrap();
    assert_eq!(correctness.max_absolute_error, 0.5);
    assert!((correctness.max_relative_error / 9e5 - 1.0).abs() < 1e-6, "{correctness:?}");
    assert_eq!(compared(&vector(&[1.0, 100.0, 0.011, -2.0]), &reference, "n").0, Status::IncorrectNumerical);
    assert_eq!(compared(&vector(&[1.0, 101.5, 0.0, -2.0]), &reference, "n").0, Status::IncorrectNumerical);
    assert_eq!(compared(&vector(&[1.0, 100.0, 0.0]), &reference, "n"), (Status::IncorrectShape, None));
    let ints = HostTensor::from_f64(DataType::Int32, &[4], &[1.0, 100.0, 0.0, -2.0]).unwrap();
    assert_eq!(compared(&ints, &reference, "n"), (Status::IncorrectDtype, None));
    assert_eq!(compared(&vector(&[]), &vector(&[]), "n").0, Status::Passed);
}

#[test]
fn an_output_that_is_not_finite_is_wrong_even_where_the_references_is_not_either() {
    let infinite = vector(&[f64::INFINITY, f64::NAN]);
    let (status, correctness) = compared(&infinite, &infinite, "n");
    assert_eq!(status, Status::IncorrectNumerical);
    assert_eq!(correctness.unwrap().max_absolute_error, f64::INFINITY);
    let (status, correctness) = compared(&vector(&[f64::NAN]), &vector(&[1.0]), "n");
    assert_eq!(status, Status::IncorrectNumerical);
    assert!(correctness.unwrap().max_relative_error.is_nan());
    // Upstream's blind spot, which the log notes.
    let mut definition = Definition::new("n", "o");
    definition.outputs = Named::from([("y", TensorSpec::tensor(&["n"], DataType::Float32))]);
    let trial = Trial { outputs: &[vector(&[7.0])], reference: &[vector(&[f64::NAN])] };
    let judgement = judge(&definition, &[trial], &Tolerance::of(&definition)).unwrap();
    assert_eq!(judgement.status, Status::Passed);
    assert_eq!(judgement.correctness.unwrap().max_absolute_error, 0.0);
    assert!(judgement.log[0].contains("not finite"), "{:?}", judgement.log);
}

#[test]
fn experts_in_eight_bits_may_have_a_twentieth_of_their_elements_wrong() {
    let reference = vector(&[1.0; 100]);
    let mut values = [1.0; 100];
    values[..5].fill(2.0);
    let (status, correctness) = compared(&vector(&values), &reference, "moe_fp8_block_scale_x");
    assert_eq!(status, Status::Passed);
    assert_eq!(correctness.unwrap().extra.unwrap().get("matched_ratio"), Some(&Json::Float(0.95)));
    assert_eq!(compared(&vector(&values), &reference, "n").0, Status::IncorrectNumerical);
    values[..6].fill(2.0);
    assert_eq!(compared(&vector(&values), &reference, "moe_fp8_block_scale_x").0, Status::IncorrectNumerical);
}

#[test]
fn sampling_is_judged_by_where_tokens_lie_and_by_how_often_they_come() {
    let mut definition = Definition::new("top_k_sampling_from_probs_v4", "sampling");
    definition.inputs = Named::from([
        ("probs", TensorSpec::tensor(&["b", "v"], DataType::Float32)),
        ("top_k", TensorSpec::tensor(&["b"], DataType::Int32)),
    ]);
    definition.outputs = Named::from([("samples", TensorSpec::tensor(&["b"], DataType::Int64))]);
    let probs = HostTensor::from_f64(DataType::Float32, &[2, 4], &[0.5, 0.25, 0.15, 0.1, 0.1, 0.2, 0.3, 0.4]).unwrap();
    let top_k = HostTensor::from_f64(DataType::Int32, &[2], &[2.0, 1.0]).unwrap();
    let inputs = Named::from([("probs", Input::Tensor(probs)), ("top_k", Input::Tensor(top_k))]);
    let mut config = BenchmarkConfig::default();
    config.sampling_draws = 20_000;
    // Of row 0, two thirds are token 0 and one third is token 1; of row 1, all are token 3.
    let mut calls = 0u64;
    let mut draw = |first: fn(u64) -> f64, second: f64| {
        judge_sampling(&definition, &inputs, &config, |inputs| {
            let Some(Input::Tensor(probs)) = inputs.get("probs") else { panic!() };
            let rows = probs.shape()[0];
            let tokens: Vec<f64> = (0..rows)
                .map(|row| {
                    calls += 1;
                    if row % 2 == 0 { first(calls / 2) } else { second }
                })
                .collect();
            Ok(vec![HostTensor::from_f64(DataType::Int64, &[rows], &tokens)?])
        })
        .unwrap()
    };
    let right = draw(|n| if n % 3 < 2 { 0.0 } else { 1.0 }, 3.0);
    assert_eq!(right.status, Status::Passed, "{right:?}");
    let Some(Json::Float(distance)) = right.correctness.unwrap().extra.unwrap().get("tvd").cloned() else { panic!() };
    assert!(distance < 0.01, "{distance}");
    let skewed = draw(|_| 0.0, 3.0);
    assert_eq!(skewed.status, Status::IncorrectNumerical, "{skewed:?}");
    assert!(skewed.log[0].contains("frequencies"), "{skewed:?}");
    for (first, second, what) in [((|_| 2.0) as fn(u64) -> f64, 3.0, "must not"), (|_| 0.0, 4.0, "vocabulary")] {
        let outside = draw(first, second);
        assert_eq!(outside.status, Status::IncorrectNumerical);
        assert!(outside.log[0].contains(what), "{outside:?}");
    }
    let failing = judge_sampling(&definition, &inputs, &config, |_| Ok(Vec::new())).unwrap();
    assert_eq!(failing.status, Status::RuntimeError);
}

#[test]
fn a_kernel_that_was_built_is_read_with_its_metadata() {
    let folder = tempfile::tempdir().unwrap();
    let metadata = folder.path().join("kernel_metadata.txt");
    fs::write(&metadata, "Something: else\nEntry Symbol:  no_such \r\nDefinition: d\n").unwrap();
    // Any library will do that is no kernel.
    fs::copy(std::env::current_exe().unwrap(), folder.path().join("kernel.so")).unwrap();
    let error = DistributedKernel::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("__tvm_ffi_no_such") && error.contains("no function of TVM-FFI"), "{error}");
    fs::write(&metadata, "Definition: d\n").unwrap();
    let error = DistributedKernel::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("Entry Symbol: NAME"), "{error}");
    DistributedKernel::write_metadata(folder.path(), &solution("s", "me")).unwrap();
    assert_eq!(fs::read_to_string(&metadata).unwrap(), "Entry Symbol: run\nDefinition: rmsnorm_h8\nSolution: s\n");
}

#[test]
fn a_kernel_that_was_built_must_export_the_function_of_the_solution_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("kernel.c");
    fs::write(&source, "int __tvm_ffi_run(void) { return 0; }\nint __tvm_ffi_other(void) { return 0; }\n").unwrap();
    let mut cc = std::process::Command::new(std::env::var_os("CC").unwrap_or("cc".into()));
    cc.args(["-shared", "-fPIC", "-o"]).arg(folder.path().join("kernel.so")).arg(&source);
    assert!(cc.status().expect("this test needs a C compiler").success());
    let solution = solution("s", "me");
    DistributedKernel::write_metadata(folder.path(), &solution).unwrap();
    solution.write(folder.path().join("solution.json")).unwrap();
    rmsnorm().write(folder.path().join("definition.json")).unwrap();
    let kernel = DistributedKernel::open(folder.path()).unwrap();
    assert_eq!((kernel.entry_symbol.as_str(), kernel.sha256.len()), ("run", 64));
    assert_eq!((kernel.definition, kernel.solution.as_ref()), (Some(rmsnorm()), Some(&solution)));
    // Files of other kernels are noticed.
    let metadata = folder.path().join("kernel_metadata.txt");
    let text = fs::read_to_string(&metadata).unwrap();
    for (from, to, place) in
        [("run", "other", "Entry Symbol"), ("rmsnorm_h8", "rmsnorm_h9", "Definition"), (": s", ": t", "Solution")]
    {
        fs::write(&metadata, text.replace(from, to)).unwrap();
        let error = DistributedKernel::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains(place) && error.contains("keep the files"), "{error}");
    }
    fs::write(&metadata, text.replace("run", "runs")).unwrap();
    let error = DistributedKernel::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("__tvm_ffi_runs") && error.contains("\"other\"") && error.contains("\"run\""), "{error}");
}

proptest! {
    #[test]
    fn any_json_is_read_as_it_was_written(json in any_json()) {
        prop_assert_eq!(&Json::parse(&json.compact()).unwrap(), &json);
        prop_assert_eq!(&Json::parse(&json.pretty()).unwrap(), &json);
    }

    #[test]
    fn constraints_of_any_text_are_refused_or_evaluated(text in "[a-c0-9 .()\\[\\]+*/%<>=!-]{0,40}") {
        let mut definition = Definition::new("n", "o");
        definition.constraints = vec![text];
        let tensor = HostTensor::from_f64(DataType::Int32, &[2], &[1.0, 2.0]).unwrap();
        let inputs = Named::from([("a", Input::Tensor(tensor)), ("b", Input::Int(3))]);
        let _ = definition.check_constraints(&axes(&[("c", 0)]), &inputs);
    }
}

fn any_json() -> impl Strategy<Value = Json> {
    let leaf = prop_oneof![
        Just(Json::Null),
        any::<bool>().prop_map(Json::Bool),
        any::<i64>().prop_map(|number| Json::Int(number.into())),
        any::<f64>().prop_filter("finite", |number| number.is_finite()).prop_map(Json::Float),
        any::<String>().prop_map(Json::Text),
    ];
    leaf.prop_recursive(4, 32, 5, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Json::List),
            prop::collection::btree_map(any::<String>(), inner, 0..5)
                .prop_map(|fields| Json::Object(fields.into_iter().collect())),
        ]
    })
}
