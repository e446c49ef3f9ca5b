//! Attention's modules as libraries: each that was vendored loads, and exports what its kind has.
#![cfg(all(feature = "attention", feature = "cudart"))]

#[path = "support/native.rs"]
mod native;
#[path = "../src/attention/uri.rs"]
#[allow(dead_code, reason = "these tests read names alone")]
mod uri;

use flashinfer_rs::{Artifact, FlashInferRuntime, Module, RuntimeConfig};
use uri::Uri;

/// The attention modules that were vendored.
fn vendored(runtime: &FlashInferRuntime) -> Vec<(Artifact, Uri)> {
    let artifacts = runtime.artifacts().into_iter().filter(|artifact| artifact.provenance.is_some());
    artifacts
        .filter_map(|artifact| {
            let uri = artifact.name.strip_suffix(".so")?.parse().ok()?;
            Some((artifact, uri))
        })
        .collect()
}

/// What is called on a module, in alphabetical order.
fn functions(uri: &Uri) -> &'static [&'static str] {
    match uri {
        Uri::SingleDecode(_) | Uri::SinglePrefill(..) => &["run"],
        Uri::BatchDecode(_) | Uri::Mla { .. } | Uri::Persistent { .. } => &["plan", "run"],
        Uri::BatchPrefill(..) | Uri::Sinks { .. } => &["paged_run", "plan", "ragged_run"],
        Uri::Xqa(_) => &["xqa_wrapper"],
    }
}

#[test]
fn modules_are_loaded_when_they_are_asked_for_and_export_what_is_called() {
    native::isolated("modules_are_loaded_when_they_are_asked_for_and_export_what_is_called", || {
        native::stand_in_for_the_driver();
        let runtime = FlashInferRuntime::initialize(RuntimeConfig::default().warm_up()).unwrap();
        let modules = vendored(runtime);
        assert!(modules.iter().any(|(_, uri)| matches!(uri, Uri::BatchDecode(_))), "{modules:?}");
        let is_loaded = |name: &str| {
            let artifact = runtime.artifacts().into_iter().find(|artifact| artifact.name == name).unwrap();
            artifact.loaded_from.is_some()
        };
        for (artifact, uri) in &modules {
            assert!(!is_loaded(&artifact.name), "{uri} was loaded before it was asked for");
            // Of XQA's the initializers need a GPU.
            if !matches!(uri, Uri::Xqa(_)) {
                let module = runtime.module(&artifact.name).unwrap_or_else(|error| panic!("{uri}: {error}"));
                assert_eq!(module.functions(), functions(uri), "{uri}");
                assert!(is_loaded(&artifact.name), "{uri}");
            }
        }
    });
}

#[test]
fn the_libraries_export_what_is_called() {
    native::isolated("the_libraries_export_what_is_called", || {
        let runtime = FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
        for (artifact, uri) in vendored(runtime) {
            let file = Module::preflight(native::vendored_libraries().join(&artifact.name)).unwrap();
            assert_eq!(file.functions(), functions(&uri), "{uri}");
        }
    });
}

#[test]
fn many_threads_that_ask_for_a_module_get_one() {
    native::isolated("many_threads_that_ask_for_a_module_get_one", || {
        native::stand_in_for_the_driver();
        let runtime = FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
        let (artifact, _) = vendored(runtime).into_iter().find(|(_, uri)| matches!(uri, Uri::BatchDecode(_))).unwrap();
        let address = || std::ptr::from_ref(runtime.module(&artifact.name).unwrap()) as usize;
        let addresses: Vec<usize> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..16).map(|_| scope.spawn(address)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(addresses.iter().all(|found| *found == addresses[0]));
    });
}
