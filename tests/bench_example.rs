//! The dataset of the examples: it is whole, and its solutions are the sources beside them.
//! `FLASHINFER_RS_BLESS=1 cargo test --features bench --test bench_example` puts changed sources into the solutions.

use std::fs;
use std::path::{Path, PathBuf};

use flashinfer_rs::bench::{
    Dataset, Dialect, HashRule, Input, InputOptions, InputSpec, Named, Solution, Verdict, Workload,
};

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
