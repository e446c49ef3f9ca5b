//! The definition of every kernel, as it lies in `docs/definitions`, is that of its row.
//! `FLASHINFER_RS_BLESS=1 cargo test --features bench --test definitions` writes them anew.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use flashinfer_rs::bench::{Definition, Dialect, KernelCall};
use flashinfer_rs::kernels;

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs/definitions")
}

/// Of calls of the rows' first examples.
fn definitions() -> Vec<Definition> {
    kernels::rows().into_iter().map(|row| KernelCall::example(row).definition().unwrap()).collect()
}

#[test]
fn each_kernels_definition_lies_in_docs_definitions_and_nothing_else_does() {
    let blessed = std::env::var_os("FLASHINFER_RS_BLESS").is_some();
    let mut names = BTreeSet::from(["README.md".to_owned()]);
    for definition in definitions() {
        let name = format!("{}.json", definition.name);
        let (path, expected) = (folder().join(&name), definition.to_json() + "\n");
        if blessed {
            fs::write(&path, expected).unwrap();
        } else {
            let found = fs::read_to_string(&path).unwrap_or_default();
            assert_eq!(found, expected, "{}: FLASHINFER_RS_BLESS=1 writes it anew", path.display());
        }
        assert!(names.insert(name), "two kernels have the definition {:?}", definition.name);
    }
    for entry in fs::read_dir(folder()).unwrap() {
        let path = entry.unwrap().path();
        let known = names.contains(path.file_name().unwrap().to_str().unwrap());
        match (known, blessed) {
            (true, _) => {}
            (false, true) => fs::remove_file(path).unwrap(),
            (false, false) => panic!("{} is no kernel's; FLASHINFER_RS_BLESS=1 removes it", path.display()),
        }
    }
}

#[test]
fn each_file_is_read_as_itself_and_valid_in_both_dialects() {
    for definition in definitions() {
        let path = folder().join(format!("{}.json", definition.name));
        let read = Definition::read(&path).unwrap();
        assert_eq!(read, definition);
        assert_eq!(Definition::from_json(&read.to_json()).unwrap(), read);
        read.validate(Dialect::FlashInfer).unwrap();
        read.validate(Dialect::FlashInferBench).unwrap();
        assert_eq!(read.dialect(), Dialect::FlashInferBench);
    }
}

#[test]
fn names_are_an_operation_and_its_constant_axes() {
    for definition in definitions() {
        let name = &definition.name;
        assert!(name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_'), "{name}");
        // Each size of an axis that decides something: those that follow from others are no part of the name.
        let (mut sizes, mut words) = (Vec::new(), name.split('_').rev());
        while let Some(size) =
            words.next().and_then(|word| word.trim_start_matches(|c: char| !c.is_ascii_digit()).parse().ok())
        {
            sizes.push(size);
        }
        let axes = definition.const_axes();
        let known: Vec<u64> = axes.values().copied().collect();
        assert!(sizes.iter().all(|size| known.contains(size)), "{name}: {axes:?}");
        assert_eq!(sizes.is_empty(), axes.is_empty(), "{name}: {axes:?}");
    }
}

/// FlashInfer-Bench finds the sizes of a call by its inputs' shapes.
#[test]
fn every_variable_axis_is_in_an_input_but_for_the_bytes_that_bits_are_packed_into() {
    for definition in definitions() {
        let in_input = |axis: &&str| {
            let mut shapes = definition.inputs.values().filter_map(|spec| spec.shape.as_ref());
            shapes.any(|shape| shape.iter().any(|name| name == axis))
        };
        let missing: Vec<_> = definition.var_axes().into_iter().filter(|axis| !in_input(axis)).collect();
        match definition.name.as_str() {
            "packbits_big" => assert_eq!(missing, ["num_elements_in_bytes"]),
            "segment_packbits_big" => assert_eq!(missing, ["num_bytes"]),
            name => assert!(missing.is_empty(), "{name}: {missing:?}"),
        }
    }
}
