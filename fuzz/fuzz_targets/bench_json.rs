//! Any text as a file of FlashInfer-Bench: refused, or read, and then written and read again as itself.
#![no_main]

use flashinfer_rs::bench::{Definition, Dialect, Json, Named, Solution, Trace};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(json) = Json::parse(text) {
        let written = json.compact();
        assert_eq!(written, Json::parse(&written).expect("what was written").compact());
        assert_eq!(written, Json::parse(&json.pretty()).expect("what was written").compact());
    }
    if let Ok(definition) = Definition::from_json(text) {
        let again = Definition::from_json(&definition.to_json()).expect("what was written");
        assert_eq!(again.to_json(), definition.to_json());
        if definition.validate(Dialect::FlashInferBench).is_ok() {
            let axes = definition.var_axes().into_iter().map(|name| (name.to_owned(), 1)).collect();
            assert_eq!(definition.input_shapes(&axes).expect("shapes").len(), definition.inputs.len());
        }
        let _ = definition.check_constraints(&definition.const_axes(), &Named::new());
    }
    if let Ok(solution) = Solution::from_json(text) {
        assert_eq!(Solution::from_json(&solution.to_json()).expect("what was written"), solution);
        for source in &solution.sources {
            let path = std::path::Path::new("folder").join(&source.path);
            assert!(path.starts_with("folder") && !path.components().any(|part| part.as_os_str() == ".."));
        }
        assert!(solution.sources.iter().any(|source| source.path == solution.spec.entry_file()));
    }
    if let Ok(trace) = Trace::from_json(text) {
        let written = trace.to_json();
        assert!(!written.contains('\n'));
        assert_eq!(Trace::from_json(&written).expect("what was written").to_json(), written);
        assert!(trace.evaluation.iter().all(|evaluation| evaluation.validate().is_ok()));
    }
});
