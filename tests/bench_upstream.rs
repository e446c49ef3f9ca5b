//! What this crate writes, upstream's Python models read, and the other way round; both hash alike and choose alike.
//!
//! `FLASHINFER_RS_FLASHINFER_BENCH=FOLDER cargo test --features bench --test bench_upstream` runs them, where FOLDER has the
//! package `flashinfer-bench` (`pip install --no-deps --target FOLDER flashinfer-bench pydantic 'safetensors>=0.8'` and what pydantic needs).
//! `FLASHINFER_RS_FLASHINFER_BENCH_SOURCES` names the unpacked source package of it, whose dataset and example are read.
//! Without these variables they are reported as ignored, never as passed. `cargo xtask interop` installs the package and runs
//! those that want no sources.

#[path = "support/example.rs"]
mod run_example;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use flashinfer_rs::bench::{
    ApplyConfig, ApplyTable, Axes, Axis, Binding, BuildSpec, Correctness, DataType, Dataset, Definition, Dialect,
    Environment, Evaluation, HashRule, HostTensor, InputSpec, Json, Language, Named, Performance, Safetensors, Scalar,
    Solution, SourceFile, Status, TensorSpec, Trace, TraceLayout, Verdict, Workload, timestamp, write_safetensors,
};
use libtest_mimic::{Arguments, Trial};
use serde_json::{Value, json};

/// Names the folder that upstream's package was installed into.
const FOLDER: &str = "FLASHINFER_RS_FLASHINFER_BENCH";
/// Names the folder that upstream's source package was unpacked into.
const SOURCES: &str = "FLASHINFER_RS_FLASHINFER_BENCH_SOURCES";

fn main() -> ExitCode {
    let with_sources: [(&str, fn()); 2] = [
        ("all_of_upstreams_own_dataset_is_read_as_upstream_reads_it", public),
        ("upstreams_example_has_the_hashes_that_are_known_of_it", vectors),
    ];
    let tests: [(&str, fn()); 11] = [
        ("upstreams_models_write_again_what_this_crate_wrote", written_again),
        ("numbers_are_written_as_upstream_writes_them", numbers),
        ("what_upstream_writes_is_read_as_itself", read),
        ("hashes_are_upstreams", hashes),
        ("a_dataset_that_was_written_here_is_upstreams_dataset", dataset),
        ("the_example_dataset_is_upstreams_dataset", example),
        ("the_definition_of_every_kernel_is_upstreams_definition", kernels),
        ("traces_of_the_example_are_upstreams_traces", traced),
        ("the_best_solution_is_upstreams_choice", best),
        ("safetensors_files_are_upstreams", tensors),
        ("whatever_is_accepted_here_upstream_accepts", accepted),
    ];
    let arguments = Arguments::from_args();
    let asked = |variable: &str| std::env::var_os(variable).is_some_and(|folder| !folder.is_empty());
    let trial = |(name, test): (&str, fn()), asked: bool| {
        let body = move || {
            test();
            Ok(())
        };
        Trial::test(name, body).with_ignored_flag(!asked)
    };
    let models = asked(FOLDER);
    let mut trials: Vec<_> = tests.into_iter().map(|test| trial(test, models)).collect();
    trials.extend(with_sources.into_iter().map(|test| trial(test, models && asked(SOURCES))));
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// Upstream's answers, in order.
fn ask(requests: &[Value]) -> Vec<Value> {
    let folder = PathBuf::from(std::env::var_os(FOLDER).expect(FOLDER));
    assert!(folder.join("flashinfer_bench").is_dir(), "{FOLDER} has no package flashinfer_bench");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/bench_models.py");
    let mut python = Command::new("python3")
        .arg(script)
        .arg(&folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3 starts");
    let request = serde_json::to_vec(requests).expect("JSON");
    python.stdin.take().expect("a pipe").write_all(&request).expect("the request");
    let output = python.wait_with_output().expect("python3 ends");
    assert!(output.status.success(), "python3 failed, see above");
    let answers: Vec<Value> = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(answers.len(), requests.len());
    answers
}

fn definition() -> Definition {
    let mut definition = Definition::new("gqa_h32_ü", "gqa_paged");
    let described = Axis::Const { value: 128, description: Some("size \"of\" a head\n".to_owned()) };
    definition.axes = Named::from([
        ("batch_size", Axis::variable()),
        ("len_indptr", Axis::Var { description: Some("batch_size + 1".to_owned()) }),
        ("heads", Axis::constant(32)),
        ("head_dim", described),
    ]);
    let mut q = TensorSpec::tensor(&["batch_size", "heads", "head_dim"], DataType::Bfloat16);
    q.description = Some("queries".to_owned());
    definition.inputs = Named::from([
        ("q", q),
        ("indptr", TensorSpec::tensor(&["len_indptr"], DataType::Int32)),
        ("sm_scale", TensorSpec::scalar(DataType::Float32)),
        ("zero_d", TensorSpec::tensor(&[], DataType::Float8E5m2)),
    ]);
    definition.outputs =
        Named::from([("output", TensorSpec::tensor(&["batch_size", "heads", "head_dim"], DataType::Bfloat16))]);
    definition.reference = Some("import torch\n\n\ndef run(q, indptr, sm_scale, zero_d):\n\treturn q".to_owned());
    definition.tags = vec!["status:verified".to_owned(), "fused".to_owned()];
    definition.description = Some("control \u{1} \u{7f} \u{2028} 𝄞 / \\".to_owned());
    definition.constraints = vec!["len_indptr == batch_size + 1".to_owned()];
    definition
}

fn solutions() -> Vec<Solution> {
    let languages =
        [Language::Python, Language::Triton, Language::Cpp, Language::Cuda, Language::TileLang].into_iter().enumerate();
    let solution = |(i, language)| Solution {
        name: format!("solution {i}"),
        definition: definition().name,
        author: if i == 0 { "baseline".to_owned() } else { "me".to_owned() },
        spec: BuildSpec {
            language,
            target_hardware: vec!["NVIDIA_H100".to_owned(), String::new()],
            entry_point: "src/main.cu::run".to_owned(),
            dependencies: ["cublas", "cutlass"][..i % 3].iter().map(|&name| name.to_owned()).collect(),
            destination_passing_style: [None, Some(true), Some(false)][i % 3],
            binding: [None, Some(Binding::TvmFfi), Some(Binding::Torch)][i % 3],
        },
        sources: vec![
            SourceFile { path: "z.h".to_owned(), content: "// ü\r\n\t\"x\"".to_owned() },
            SourceFile { path: "src/main.cu".to_owned(), content: format!("int x{i};\n") },
        ],
        description: (i % 2 == 0).then(|| "what it does".to_owned()),
    };
    languages.map(solution).collect()
}

fn evaluation(status: Status, speedup: f64) -> Evaluation {
    let compared = matches!(status, Status::Passed | Status::IncorrectNumerical);
    let extra = Named::from([
        ("matched_ratio", Json::Float(0.95)),
        ("tvds", Json::List(vec![Json::Float(f64::NAN), Json::Int(1), Json::Null, Json::Bool(false)])),
        ("deep", Json::Object(vec![("a".to_owned(), Json::Text("b".to_owned()))])),
    ]);
    let correctness = Correctness { max_relative_error: f64::INFINITY, max_absolute_error: 1e-3, extra: Some(extra) };
    let performance = Performance { latency_ms: 1e-7, reference_latency_ms: 1.0, speedup_factor: speedup };
    Evaluation {
        status,
        environment: Environment {
            hardware: "NVIDIA H200".to_owned(),
            libs: Named::from([("cuda", "13.0".to_owned()), ("flashinfer-rs", "0.1.0".to_owned())]),
        },
        timestamp: timestamp(),
        log: "line one\nline two \u{1b}[0m".to_owned(),
        correctness: compared.then_some(correctness),
        performance: (status == Status::Passed).then_some(performance),
    }
}

fn traces() -> Vec<Trace> {
    let workload = Workload {
        axes: Axes::from([("batch_size".to_owned(), 3), ("len_indptr".to_owned(), 4)]),
        inputs: Named::from([
            ("q", InputSpec::Random),
            ("indptr", InputSpec::Safetensors { path: "./blob/x.safetensors".to_owned(), tensor_key: "i".to_owned() }),
            ("sm_scale", InputSpec::Scalar { value: Scalar::Float(0.088_388_347_648_318_45) }),
            ("whole", InputSpec::Scalar { value: Scalar::Int(i64::MIN) }),
            ("flag", InputSpec::Scalar { value: Scalar::Bool(true) }),
            ("point", InputSpec::Scalar { value: Scalar::Float(-1.0) }),
        ]),
        uuid: "6f1e".to_owned(),
    };
    let statuses = [
        Status::Passed,
        Status::IncorrectShape,
        Status::IncorrectNumerical,
        Status::IncorrectDtype,
        Status::RuntimeError,
        Status::CompileError,
        Status::Timeout,
    ];
    let mut traces = vec![Trace::workload(&definition().name, workload.clone())];
    traces.extend(statuses.map(|status| Trace {
        definition: definition().name,
        workload: workload.clone(),
        solution: Some("solution 1".to_owned()),
        evaluation: Some(evaluation(status, 2.5)),
    }));
    traces
}

/// Every kind of file, as this crate writes it.
fn files() -> Vec<(&'static str, String)> {
    let mut files = vec![("definition", definition().to_json())];
    files.extend(solutions().iter().map(|solution| ("solution", solution.to_json())));
    files.extend(traces().iter().map(|trace| ("trace", trace.to_json())));
    files
}

fn written_again() {
    let files = files();
    let requests: Vec<_> = files.iter().map(|(kind, text)| json!(["again", kind, text])).collect();
    for ((kind, text), answer) in files.iter().zip(ask(&requests)) {
        assert_eq!(answer.as_str().expect("a text"), text, "{kind}");
    }
}

fn numbers() {
    let mut values = vec![0.0, -0.0, 1.0, 0.1, 123_456.75, f64::MAX, f64::MIN_POSITIVE, 5e-324, 1.0 / 3.0];
    values.extend((-30..30).flat_map(|exponent| [10f64.powi(exponent), 1.5 * 10f64.powi(exponent)]));
    let of = |value: f64| {
        let mut trace = traces().remove(0);
        trace.workload.inputs = Named::from([("x", InputSpec::Scalar { value: Scalar::Float(value) })]);
        trace
    };
    let requests: Vec<_> = values.iter().map(|&value| json!(["again", "trace", of(value).to_json()])).collect();
    for (value, answer) in values.iter().zip(ask(&requests)) {
        let text = answer.as_str().expect("a text");
        assert_eq!(text, of(*value).to_json(), "{value:?}");
        assert_eq!(Trace::from_json(text).unwrap(), of(*value));
    }
}

fn read() {
    let files = files();
    let requests: Vec<_> = files.iter().map(|(kind, text)| json!(["written", kind, text])).collect();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    for ((kind, text), answer) in files.iter().zip(ask(&requests)) {
        std::fs::write(&path, answer.as_str().expect("a text")).unwrap();
        match *kind {
            "definition" => assert_eq!(&Definition::read(&path).unwrap().to_json(), text),
            "solution" => assert_eq!(&Solution::read(&path).unwrap().to_json(), text),
            _ => {
                let lines: Vec<_> = Trace::read_lines(&path).unwrap().iter().map(Trace::to_json).collect();
                assert_eq!(lines, [text.clone(), text.clone()]);
            }
        }
    }
}

fn hashes() {
    let solutions = solutions();
    let requests: Vec<_> = solutions.iter().map(|solution| json!(["hash", solution.to_json()])).collect();
    for (solution, answer) in solutions.iter().zip(ask(&requests)) {
        // The released package's rule; a later one leaves the name out.
        let ours = [HashRule::Named, HashRule::Nameless].map(|rule| solution.hash(rule));
        assert!(ours.contains(&answer.as_str().expect("a text").to_owned()), "{answer} is none of {ours:?}");
    }
}

/// A dataset with traces of two solutions and several sizes.
fn example_of(root: &Path) -> Dataset {
    let mut dataset = Dataset::open(root).unwrap();
    dataset.add_definition(definition()).unwrap();
    for solution in solutions() {
        dataset.add_solution(solution).unwrap();
    }
    dataset.add_traces(&traces(), TraceLayout::ByDefinition).unwrap();
    let mut many = Vec::new();
    for batch in 1..6u64 {
        for (i, speedup) in [(1, 2.0), (2, 1.0 + batch as f64 / 3.0), (3, 50.0)] {
            let mut trace = traces().remove(1);
            trace.workload.axes = Axes::from([("batch_size".to_owned(), batch), ("len_indptr".to_owned(), batch + 1)]);
            trace.solution = Some(format!("solution {i}"));
            let mut evaluation = evaluation(Status::Passed, speedup);
            let error = if i == 3 { f64::NAN } else { 1e-3 };
            evaluation.correctness =
                Some(Correctness { max_relative_error: error, max_absolute_error: 1e-4, extra: None });
            trace.evaluation = Some(evaluation);
            many.push(trace);
        }
    }
    dataset.add_traces(&many, TraceLayout::ByAuthor).unwrap();
    dataset
}

fn dataset() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = example_of(folder.path());
    let answer = ask(&[json!(["dataset", folder.path()])]).remove(0);
    let name = definition().name;
    assert_eq!(answer["definitions"], json!([name]));
    assert_eq!(answer["solutions"].as_array().map(Vec::len), Some(dataset.solutions(&name).count()));
    assert_eq!(answer["workloads"], json!(dataset.workloads(&name).len()));
    assert_eq!(answer["traces"], json!(dataset.traces(&name).len()));
}

fn example() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/dataset");
    let dataset = Dataset::open(&root).unwrap();
    let answer = ask(&[json!(["dataset", root])]).remove(0);
    let names: Vec<_> = dataset.definitions().map(|definition| definition.name.as_str()).collect();
    assert_eq!(answer["definitions"], json!(names));
    let solutions: usize = names.iter().map(|name| dataset.solutions(name).count()).sum();
    assert_eq!(answer["solutions"].as_array().map(Vec::len), Some(solutions));
    let workloads: usize = names.iter().map(|name| dataset.workloads(name).len()).sum();
    assert_eq!(answer["workloads"], json!(workloads));
}

fn kernels() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/definitions");
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files = files.filter(|path| path.extension().is_some_and(|ending| ending == "json"));
    let definitions: Vec<_> = files.map(|path| Definition::read(path).unwrap()).collect();
    assert_eq!(definitions.len(), flashinfer_rs::kernels::rows().len());
    let requests: Vec<_> = definitions.iter().map(|it| json!(["interface", it.to_json()])).collect();
    for (definition, answer) in definitions.iter().zip(ask(&requests)) {
        let name = &definition.name;
        assert_eq!(answer["inputs"], json!(definition.inputs.names().collect::<Vec<_>>()), "{name}");
        assert_eq!(answer["run"], answer["inputs"], "{name}");
        let axes: Axes = definition.var_axes().into_iter().map(|axis| (axis.to_owned(), 3)).collect();
        let mut shapes = definition.input_shapes(&axes).unwrap();
        shapes.extend(definition.output_shapes(&axes).unwrap());
        assert_eq!(answer["shapes"], json!(shapes), "{name}");
    }
    // Written again by upstream they are the same, but for what only FlashInfer's dialect has.
    let requests: Vec<_> = definitions.iter().map(|it| json!(["again", "definition", it.to_json()])).collect();
    for (definition, answer) in definitions.iter().zip(ask(&requests)) {
        assert_eq!(answer.as_str().expect("a text"), plain(definition).to_json(), "{}", definition.name);
    }
}

/// Without what upstream does not know, and so leaves out.
fn plain(definition: &Definition) -> Definition {
    let spec = |spec: &TensorSpec| TensorSpec { optional: false, extra: Named::new(), ..spec.clone() };
    let specs = |specs: &Named<TensorSpec>| specs.iter().map(|(name, it)| (name, spec(it))).collect();
    let (inputs, outputs) = (specs(&definition.inputs), specs(&definition.outputs));
    Definition { extra: Named::new(), inputs, outputs, ..definition.clone() }
}

fn sources() -> PathBuf {
    PathBuf::from(std::env::var_os(SOURCES).expect(SOURCES))
}

fn public() {
    let root = sources().join("flashinfer_trace");
    let dataset = Dataset::open(&root).unwrap();
    let answer = ask(&[json!(["dataset", root])]).remove(0);
    let definitions: Vec<_> = dataset.definitions().collect();
    assert!(definitions.len() > 40, "{}", definitions.len());
    let names: Vec<_> = definitions.iter().map(|definition| definition.name.as_str()).collect();
    assert_eq!(answer["definitions"], json!(names));
    let workloads: Vec<_> = names.iter().flat_map(|name| dataset.workloads(name)).collect();
    assert_eq!(answer["workloads"], json!(workloads.len()));
    for definition in &definitions {
        assert_eq!(definition.dialect(), Dialect::FlashInferBench, "{}", definition.name);
        for workload in dataset.workloads(&definition.name) {
            definition.input_shapes(&workload.workload.axes).unwrap();
            definition.output_shapes(&workload.workload.axes).unwrap();
            // What needs no input can be said.
            for (text, verdict) in definition.check_constraints(&workload.workload.axes, &Named::new()).unwrap() {
                assert!(!matches!(verdict, Verdict::Broken(_)), "{}: {text}: {verdict:?}", definition.name);
            }
        }
    }
    // Read and written by both, it is the same.
    let mut requests: Vec<_> = definitions.iter().map(|it| json!(["again", "definition", it.to_json()])).collect();
    requests.extend(workloads.iter().map(|it| json!(["again", "trace", it.to_json()])));
    let definitions = definitions.iter().map(|it| plain(it).to_json());
    let expected = definitions.chain(workloads.iter().map(|it| it.to_json()));
    for (answer, expected) in ask(&requests).iter().zip(expected) {
        assert_eq!(answer.as_str().expect("a text"), expected);
    }
}

fn vectors() {
    let folder = sources().join("examples/ffi/Example-FlashInfer-Trace");
    let solution = Solution::read(folder.join("solutions/example_agent_solution.json")).unwrap();
    assert_eq!(solution.hash(HashRule::Named), "9c84c4ccd18e15cc3d7346cca12ec586ffb6e9ee");
    assert_eq!(solution.hash(HashRule::Nameless), "6543ed846ad398f161498b6d21b21c50288ecbc8");
    assert_eq!(solution.package_name(HashRule::Named), "tvm_ffi_example_agent_solution_9c84c4");
}

/// What the example writes, upstream's models read, and write again as it is.
fn traced() {
    let folder = tempfile::tempdir().expect("a folder");
    run_example::run(folder.path());
    let read = Dataset::open(folder.path()).expect("a dataset");
    let traces: Vec<&Trace> = read.definitions().flat_map(|definition| read.traces(&definition.name)).collect();
    let mut requests: Vec<_> = traces.iter().map(|trace| json!(["again", "trace", trace.to_json()])).collect();
    requests.push(json!(["dataset", folder.path()]));
    let mut answers = ask(&requests);
    let whole = answers.pop().expect("an answer");
    assert_eq!(whole["traces"].as_u64().map(|count| count as usize), Some(traces.len()));
    assert_eq!(whole["solutions"].as_array().map(Vec::len), Some(5));
    for (trace, answer) in traces.iter().zip(answers) {
        assert_eq!(answer.as_str().expect("a text"), trace.to_json());
        assert!(trace.passed(), "{trace:?}");
    }
}

fn best() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = example_of(folder.path());
    let name = definition().name;
    let axes = |batch: u64| Axes::from([("batch_size".to_owned(), batch), ("len_indptr".to_owned(), batch + 1)]);
    for (batch, rtol) in [(1, 1e-2), (2, 1e-2), (4, 1e-2), (5, 1e-2), (3, f64::MAX), (3, 1e-5), (9, 1e-2)] {
        let answer = ask(&[json!(["best", folder.path(), name, axes(batch), 1e-2, rtol])]).remove(0);
        let trace = dataset.best_trace(&name, &axes(batch), 1e-2, rtol);
        assert_eq!(answer["trace"], json!(trace.and_then(|trace| trace.solution.as_deref())), "{batch} {rtol}");
        let table = ApplyTable::new(&dataset, &name, &ApplyConfig::new(1e-2, rtol));
        let winners = answer["winners"].as_array().expect("a list");
        assert_eq!(winners.len(), table.len(), "{rtol}");
        for winner in winners {
            let axes: Axes = serde_json::from_value(winner[0].clone()).expect("axes");
            assert_eq!(winner[1], json!(table.solution(&axes)), "{axes:?}");
        }
        assert_eq!(answer["best"], json!(table.best()), "{rtol}");
    }
}

fn tensors() {
    let folder = tempfile::tempdir().unwrap();
    let types = [
        (DataType::Float64, "F64", "float64"),
        (DataType::Float32, "F32", "float32"),
        (DataType::Float16, "F16", "float16"),
        (DataType::Bfloat16, "BF16", "bfloat16"),
        (DataType::Float8E4m3fn, "F8_E4M3", "float8_e4m3fn"),
        (DataType::Float8E5m2, "F8_E5M2", "float8_e5m2"),
        (DataType::Float4E2m1, "F4", "float4_e2m1fn_x2"),
        (DataType::Int64, "I64", "int64"),
        (DataType::Int32, "I32", "int32"),
        (DataType::Int16, "I16", "int16"),
        (DataType::Int8, "I8", "int8"),
        (DataType::Uint64, "U64", "uint64"),
        (DataType::Uint32, "U32", "uint32"),
        (DataType::Uint16, "U16", "uint16"),
        (DataType::Uint8, "U8", "uint8"),
        (DataType::Bool, "BOOL", "bool"),
    ];
    let made: Vec<_> = types
        .iter()
        .map(|(dtype, name, _)| {
            let mut tensor = HostTensor::zeros(dtype.clone(), &[3, 2]).unwrap();
            tensor.bytes_mut().iter_mut().enumerate().for_each(|(i, byte)| *byte = i as u8 % 2);
            (*name, tensor)
        })
        .collect();
    let path = folder.path().join("all.safetensors");
    let tensors: Vec<_> = made.iter().map(|(name, tensor)| (*name, tensor)).collect();
    write_safetensors(&path, &tensors).unwrap();
    let answer = ask(&[json!(["tensors", path])]).remove(0);
    let answer = answer.as_array().expect("a list");
    assert_eq!(answer.len(), made.len());
    for found in answer {
        let name = found[0].as_str().expect("a name");
        let (_, tensor) = made.iter().find(|(known, _)| *known == name).expect("a tensor of ours");
        assert_eq!(found[1], json!(name));
        // Four-bit elements are counted one by one there.
        assert_eq!(found[2], if name == "F4" { json!([3, 4]) } else { json!([3, 2]) }, "{name}");
        assert_eq!(found[3], json!(tensor.bytes()), "{name}");
    }
    // And the other way round; upstream's words for types are PyTorch's.
    for ((dtype, name, word), (_, tensor)) in types.iter().zip(&made) {
        let path = folder.path().join(format!("{name}.safetensors"));
        ask(&[json!(["store", path, word, [3, 2], tensor.bytes()])]);
        let file = Safetensors::open(&path).unwrap();
        assert_eq!(file.form("t"), Some((dtype, &[3, 2][..])));
        assert_eq!(&file.read("t").unwrap(), tensor);
    }
}

/// Files with one thing changed: what this crate accepts, upstream does.
fn accepted() {
    let mut texts = Vec::new();
    for (kind, text) in files() {
        let values = ["null", "0", "-1", "1.5", "true", "\"\"", "\"x\"", "[]", "{}", "NaN", "\"NaN\"", "[\"\"]"];
        // Each field's value by each of these; and each field left out.
        let document: Value = serde_json::from_str(&text).expect("JSON");
        for path in paths(&document) {
            for value in values {
                let mut changed = document.clone();
                *changed.pointer_mut(&path).expect("the value") = json!("@@");
                texts.push((kind, changed.to_string().replace("\"@@\"", value)));
            }
            let (parent, field) = path.rsplit_once('/').expect("a path");
            let mut changed = document.clone();
            if let Some(fields) = changed.pointer_mut(parent).and_then(Value::as_object_mut) {
                fields.remove(field);
                texts.push((kind, changed.to_string()));
            }
        }
    }
    let accepted = |kind: &str, text: &str| match kind {
        "definition" => Definition::from_json(text).is_ok_and(|d| d.validate(Dialect::FlashInferBench).is_ok()),
        "solution" => Solution::from_json(text).is_ok_and(|s| s.dialect() == Dialect::FlashInferBench),
        _ => Trace::from_json(text).is_ok(),
    };
    let total = texts.len();
    let texts: Vec<_> = texts.into_iter().filter(|(kind, text)| accepted(kind, text)).collect();
    assert!(texts.len() > 100 && texts.len() < total / 2, "{} of {total}", texts.len());
    let requests: Vec<_> = texts.iter().map(|(kind, text)| json!(["accepts", kind, text])).collect();
    for ((kind, text), answer) in texts.iter().zip(ask(&requests)) {
        assert!(answer.is_null(), "{kind} {text}: {answer}");
    }
}

fn paths(value: &Value) -> Vec<String> {
    let inner: Vec<(String, &Value)> = match value {
        Value::Object(fields) => fields.iter().map(|(name, value)| (name.clone(), value)).collect(),
        Value::Array(items) => items.iter().enumerate().map(|(i, value)| (i.to_string(), value)).collect(),
        _ => Vec::new(),
    };
    let mut paths = Vec::new();
    for (step, value) in inner {
        let step = step.replace('~', "~0").replace('/', "~1");
        paths.push(format!("/{step}"));
        paths.extend(self::paths(value).into_iter().map(|rest| format!("/{step}{rest}")));
    }
    paths
}
