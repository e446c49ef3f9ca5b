//! Hostile files of a dataset: each is refused with its place, and none is believed.

use std::fs;
use std::path::Path;

use flashinfer_rs::FlashInferError;
use flashinfer_rs::bench::{
    DataError, Dataset, Definition, DistributedKernel, InputOptions, InputSpec, Json, Named, Safetensors, Solution,
    Trace, Workload,
};
use proptest::prelude::*;

const POINTER: &str = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n";

fn data<T: std::fmt::Debug>(result: Result<T, FlashInferError>) -> DataError {
    match result {
        Err(FlashInferError::Data(error)) => *error,
        other => panic!("{other:?}"),
    }
}

const DEFINITION: &str = r#"{"name":"n","op_type":"o","axes":{"a":{"type":"const","value":1}},"inputs":{"x":{"shape":["a"],"dtype":"int8"}},"outputs":{}}"#;
const SOLUTION: &str = r#"{"name":"s","definition":"d","author":"a","spec":{"language":"cpp","target_hardware":["cpu"],"entry_point":"m.cpp::run"},"sources":[{"path":"m.cpp","content":"x"}]}"#;
const TRACE: &str = r#"{"definition":"d","workload":{"axes":{"a":1},"inputs":{"x":{"type":"safetensors","path":"p","tensor_key":"k"}},"uuid":"u"}}"#;

#[test]
fn what_is_not_json_is_refused_at_its_line_and_column() {
    for (text, place) in [
        ("", "line 1 column 1"),
        ("{", "line 1 column 2"),
        ("{\"a\": 1,}", "line 1 column 9"),
        ("{\n  \"a\": 1\n  \"b\": 2\n}", "line 3 column 3"),
        ("[1, 2", "line 1 column 6"),
        ("[01]", "line 1 column 3"),
        ("[1.]", "line 1 column 4"),
        ("[-]", "line 1 column 3"),
        ("[1e]", "line 1 column 4"),
        ("nul", "line 1 column 1"),
        ("[Nan]", "line 1 column 2"),
        ("\"a\nb\"", "line 1 column 3"),
        ("\"\\x\"", "line 1 column 3"),
        ("\"\\ud800\"", "line 1 column 3"),
        ("\"\\ud800\\u0041\"", "line 1 column 8"),
        ("\"\\udc00\"", "line 1 column 3"),
        ("\"\\u12\"", "line 1 column 3"),
        ("{'a': 1}", "line 1 column 2"),
        ("1 2", "line 1 column 3"),
        ("\u{feff}{}", "line 1 column 1"),
        ("\"abc", "line 1 column 5"),
    ] {
        assert_eq!(data(Json::parse(text)).place, place, "{text:?}");
    }
    let number = "9".repeat(50);
    assert!(data(Json::parse(&number)).expected.contains("2^127"));
}

#[test]
fn depth_count_and_size_are_bounded() {
    let deep = |levels: usize| "[".repeat(levels) + &"]".repeat(levels);
    assert!(Json::parse(&deep(64)).is_ok());
    for levels in [66, 1_000_000] {
        assert!(data(Json::parse(&deep(levels))).expected.contains("64 levels"));
    }
    let objects = "{\"a\":".repeat(100_000);
    assert!(data(Json::parse(&objects)).expected.contains("64 levels"));
    let many = format!("[{}0]", "0,".repeat(1 << 20));
    assert!(data(Json::parse(&many)).expected.contains("1048576"));
    let large = format!("\"{}\"", "a".repeat(64 << 20));
    assert!(data(Json::parse(&large)).expected.contains("64 MiB"));
}

#[test]
fn names_that_occur_twice_are_refused_wherever_they_are() {
    for text in [
        DEFINITION.replace("\"op_type\"", "\"name\""),
        DEFINITION.replace("\"a\":{\"type\"", "\"a\":{},\"a\":{\"type\""),
        DEFINITION.replace("\"dtype\":\"int8\"", "\"dtype\":\"int8\",\"dtype\":\"int8\""),
        // Escapes do not hide a name.
        DEFINITION.replace("\"op_type\"", "\"n\\u0061me\""),
    ] {
        let error = data(Definition::from_json(&text));
        assert!(error.found.contains("a second time"), "{error}");
    }
}

#[test]
fn an_error_names_the_way_to_the_value() {
    for (from, to, place) in [
        ("\"value\":1", "\"value\":-1", "axes.a.value at line 1 column 63"),
        ("\"value\":1", "\"value\":1.5", "axes.a.value"),
        ("\"value\":1", "\"value\":true", "axes.a.value"),
        ("\"value\":1", "\"value\":NaN", "axes.a.value"),
        ("\"value\":1", "\"value\":9223372036854775808", "axes.a.value"),
        ("\"const\"", "\"other\"", "axes.a"),
        (",\"value\":1", "", "axes.a"),
        ("[\"a\"]", "[1]", "inputs.x.shape[0]"),
        ("[\"a\"]", "[\"\"]", "inputs.x.shape[0]"),
        ("[\"a\"]", "{}", "inputs.x.shape"),
        ("\"shape\":[\"a\"],", "", "inputs.x"),
        ("\"int8\"", "8", "inputs.x.dtype"),
        ("\"name\":\"n\"", "\"name\":\"\"", "name"),
        ("\"x\":{", "\"\":{", "inputs"),
        ("\"outputs\":{}", "\"outputs\":[]", "outputs"),
        ("\"outputs\":{}", "\"outputs\":{},\"tags\":[null]", "tags[0]"),
        ("\"outputs\":{}", "\"outputs\":{},\"reference\":7", "reference"),
    ] {
        let text = DEFINITION.replace(from, to);
        assert_ne!(text, DEFINITION);
        let error = data(Definition::from_json(&text));
        assert!(error.place.starts_with(place), "{from} → {to}: {error}");
        assert!(!error.found.is_empty() && !error.expected.is_empty() && !error.remedy.is_empty());
    }
}

#[test]
fn a_solution_keeps_to_its_folder() {
    for path in ["../m.cpp", "a/../../m.cpp", "/m.cpp", "..", ".", "", "./", "a\\u0000b"] {
        let text = SOLUTION.replace("\"path\":\"m.cpp\"", &format!("\"path\":\"{path}\""));
        let error = data(Solution::from_json(&text));
        assert!(error.place.starts_with("sources[0].path"), "{error}");
    }
    let twice = SOLUTION.replace("[{", "[{\"path\":\"./m.cpp\",\"content\":\"y\"},{");
    assert!(data(Solution::from_json(&twice)).found.contains("a second time"));
    for entry in ["m.cpp", "m.cpp::a::b", "::run", "m.cpp::", "other.cpp::run", "m.cpp::a\\u0000"] {
        let error = data(Solution::from_json(&SOLUTION.replace("m.cpp::run", entry)));
        assert!(error.place.starts_with("spec"), "{error}");
    }
    for (from, to) in [
        ("[\"cpu\"]", "[]"),
        ("\"cpp\"", "\"fortran\""),
        ("\"x\"", "\"\""),
        ("\"cpu\"]", "\"cpu\"],\"binding\":\"pybind\""),
        ("\"cpu\"]", "\"cpu\"],\"destination_passing_style\":1"),
    ] {
        data(Solution::from_json(&SOLUTION.replace(from, to)));
    }
}

#[test]
fn a_workload_keeps_to_the_dataset() {
    for path in ["../p", "/p", "a/../../p", "a\\u0000b", "."] {
        let text = TRACE.replace("\"path\":\"p\"", &format!("\"path\":\"{path}\""));
        let error = data(Trace::from_json(&text));
        assert!(error.place.starts_with("workload.inputs.x.path"), "{error}");
    }
    for (from, to) in [
        ("\"a\":1", "\"a\":-1"),
        ("\"a\":1", "\"a\":\"1\""),
        ("\"safetensors\"", "\"pickle\""),
        ("\"type\":\"safetensors\"", "\"type\":\"scalar\",\"value\":null"),
        ("\"type\":\"safetensors\"", "\"type\":\"scalar\",\"value\":9223372036854775808"),
        ("\"type\":\"safetensors\"", "\"type\":\"scalar\",\"value\":\"one\""),
        ("\"uuid\":\"u\"", "\"uuid\":\"\""),
    ] {
        data(Trace::from_json(&TRACE.replace(from, to)));
    }
    // One that was made by a program is looked at where it is used.
    let inputs = Named::from([("x", InputSpec::Safetensors { path: "../p".to_owned(), tensor_key: "k".to_owned() })]);
    let workload = Workload { axes: [("a".to_owned(), 1)].into(), inputs, uuid: "u".to_owned() };
    let definition = Definition::from_json(DEFINITION).unwrap();
    data(workload.make_inputs(&definition, ".", &InputOptions::default()));
}

#[test]
fn sizes_that_no_machine_has_are_refused_before_memory_is_taken() {
    let text = DEFINITION.replace("{\"type\":\"const\",\"value\":1}", "{\"type\":\"var\"}");
    for (shape, size) in [("[\"a\"]", i64::MAX as u64), ("[\"a\",\"a\",\"a\"]", 1 << 40), ("[\"a\"]", 1 << 50)] {
        let definition = Definition::from_json(&text.replace("[\"a\"]", shape)).unwrap();
        let workload = Workload { axes: [("a".to_owned(), size)].into(), inputs: Named::new(), uuid: "u".to_owned() };
        let error = data(workload.make_inputs(&definition, ".", &InputOptions::default()));
        assert!(error.place.contains("\"x\""), "{error}");
    }
}

#[test]
fn a_pointer_of_git_lfs_is_told_from_the_file_that_it_stands_for() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for name in ["d.json", "t.jsonl", "x.safetensors", "kernel.so"] {
        fs::write(at(name), POINTER).unwrap();
    }
    fs::write(at("kernel_metadata.txt"), "Entry Symbol: run\n").unwrap();
    for error in [
        data(Definition::read(at("d.json"))),
        data(Solution::read(at("d.json"))),
        data(Trace::read_lines(at("t.jsonl"))),
        data(Safetensors::open(at("x.safetensors"))),
        data(DistributedKernel::open(folder.path())),
    ] {
        assert!(error.found.contains("Git LFS") && error.remedy.contains("git lfs pull"), "{error}");
    }
}

#[test]
fn an_error_in_a_dataset_names_the_file_and_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("traces/deep/t.jsonl");
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, format!("{TRACE}\n\n{}", TRACE.replace("\"u\"", "7"))).unwrap();
    let error = data(Dataset::open(folder.path()));
    assert_eq!(error.file, path.display().to_string());
    assert!(error.place.starts_with("workload.uuid at line 3 column"), "{error}");
    let error = Dataset::open(folder.path().join("nowhere")).unwrap_err();
    assert!(matches!(error, FlashInferError::Io { .. }), "{error}");
}

#[test]
fn a_dataset_does_not_follow_circles_of_folders() {
    let folder = tempfile::tempdir().unwrap();
    let definitions = folder.path().join("definitions");
    fs::create_dir_all(&definitions).unwrap();
    std::os::unix::fs::symlink(&definitions, definitions.join("circle.json")).unwrap();
    std::os::unix::fs::symlink(&definitions, definitions.join("circle")).unwrap();
    fs::write(folder.path().join("blob"), DEFINITION).unwrap();
    std::os::unix::fs::symlink("../blob", definitions.join("n.json")).unwrap();
    assert!(Dataset::open(folder.path()).unwrap().definition("n").is_some());
}

/// A safetensors file of this header, and so many bytes.
fn stored(folder: &Path, header: &str, bytes: usize) -> Result<Safetensors, FlashInferError> {
    let path = folder.join("x.safetensors");
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.resize(file.len() + bytes, 0);
    fs::write(&path, file).unwrap();
    Safetensors::open(path)
}

#[test]
fn a_safetensors_file_whose_header_lies_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let good = r#"{"__metadata__":{"k":"v"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[],"data_offsets":[8,9]}}  "#;
    let file = stored(folder.path(), good, 9).unwrap();
    assert_eq!(file.read("a").unwrap().shape(), [2]);
    assert_eq!(file.read("b").unwrap().bytes(), [0]);
    for bytes in [8, 10] {
        data(stored(folder.path(), good, bytes));
    }
    for (from, to) in [
        ("[0,8]", "[0,7]"),
        ("[0,8]", "[8,0]"),
        ("[0,8]", "[1,9]"),
        ("[0,8]", "[0,8,9]"),
        ("[0,8]", "[-1,7]"),
        ("[8,9]", "[7,8]"),
        ("[8,9]", "[9,10]"),
        ("[2]", "[3]"),
        ("[2]", "[4611686018427387904,4]"),
        ("[2]", "[9223372036854775807,9223372036854775807]"),
        ("F32", "F31"),
        ("\"b\"", "\"a\""),
        ("\"v\"", "1"),
        ("\"shape\":[2],", ""),
    ] {
        let header = good.replace(from, to);
        assert_ne!(header, good);
        data(stored(folder.path(), &header, 9));
    }
    for file in [&b""[..], &[9, 0, 0, 0, 0, 0, 0, 0], &[255; 8], &[255; 100]] {
        let path = folder.path().join("y.safetensors");
        fs::write(&path, file).unwrap();
        data(Safetensors::open(path));
    }
}

#[test]
fn a_library_that_is_none_is_refused_before_it_is_loaded() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("kernel_metadata.txt"), "Entry Symbol: run\n").unwrap();
    for bytes in [&b""[..], b"\x7fELF", b"MZ", b"#!/bin/sh\n", b"\xcf\xfa\xed\xfe\x07\x00\x00\x01"] {
        fs::write(folder.path().join("kernel.so"), bytes).unwrap();
        let error = data(DistributedKernel::open(folder.path()));
        assert_eq!(error.place, "its format", "{error}");
    }
}

#[test]
fn constraints_that_do_anything_else_are_refused() {
    for text in [
        "__import__('os').system('true')",
        "a.b",
        "a.shape",
        "a.shape()",
        "a[0].tolist()",
        "lambda: 1",
        "a if b else c",
        "a = 1",
        "2 ** 100000",
        "[1, 2]",
        "a[",
        "(((",
        "",
        "a b",
        "1..2",
        "'text' == 'text'",
        "f(a)",
        "a[0:1] == 1",
        &"(".repeat(3000),
        &"-".repeat(4000),
        &"not ".repeat(1000),
        &"a".repeat(5000),
        &format!("{} == 1", "9".repeat(100)),
        &format!("{}1 > 0", "1+".repeat(2000)),
    ] {
        let mut definition = Definition::new("n", "o");
        definition.constraints = vec![text.to_owned()];
        let error = data(definition.check_constraints(&Default::default(), &Named::new()));
        assert!(!error.remedy.is_empty(), "{text}");
    }
    // Long, not deep.
    let mut definition = Definition::new("n", "o");
    definition.constraints = vec![format!("{}1 > 0", "1+".repeat(120))];
    assert!(definition.check_constraints(&Default::default(), &Named::new()).is_ok());
}

proptest! {
    #[test]
    fn a_file_with_a_changed_byte_is_refused_or_read(at in 0usize..200, byte in any::<u8>()) {
        for text in [DEFINITION, SOLUTION, TRACE] {
            let mut bytes = text.as_bytes().to_vec();
            let at = at % bytes.len();
            bytes[at] = byte;
            let Ok(text) = String::from_utf8(bytes) else { continue };
            let _ = (Definition::from_json(&text), Solution::from_json(&text), Trace::from_json(&text));
        }
    }
}
