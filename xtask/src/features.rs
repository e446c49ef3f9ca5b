//! `cargo xtask features`: the tests pass with every Cargo feature alone, all features together compile, and so does a
//! program that chooses cudarc's own features.

use std::collections::BTreeMap;
use std::fs;

use serde::Deserialize;

use crate::provision;
use crate::recipes;
use crate::shell;
use crate::vendoring::env::SKIP_VENDOR;
use crate::vendoring::error::{Error, Result};
use crate::vendoring::store::publish_bytes;

/// What no feature makes a difference to: tests of the build script, of the wheels, of what does not compile, and of TVM-FFI's
/// objects, which take their time: a million of each.
const WHATEVER_FEATURES: [&str; 15] = [
    "addresses",
    "attend",
    "build_script",
    "cache",
    "compile_fail",
    "gemv",
    "hermetic",
    "hostile_wheels",
    "interop",
    "network",
    "network_settings",
    "newer_tvm_ffi",
    "objects",
    "privileged",
    "vendoring",
];
/// How tests are called that only a GPU can run.
const GPU: &str = "_gpu";
/// What an application may turn on beside us: cudarc's features are the union of everybody's.
const CUDARC: [&str; 3] = ["cuda-12080", "cuda-13000", "dynamic-linking"];

/// A test in Cargo.toml.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Target {
    name: String,
    #[serde(default)]
    required_features: Vec<String>,
}

/// The part of Cargo.toml that is of use here.
#[derive(Deserialize)]
struct Manifest {
    features: BTreeMap<String, Vec<String>>,
    #[serde(default)]
    test: Vec<Target>,
}

fn manifest() -> Result<Manifest> {
    let path = shell::root().join("Cargo.toml");
    let text = fs::read_to_string(&path).map_err(|e| Error::io("reading", &path, &e))?;
    toml::from_str(&text).map_err(|e| Error::Refused(format!("{}: {e}", path.display())))
}

/// Every feature that there is, but `default`.
fn features() -> Result<Vec<String>> {
    Ok(manifest()?.features.into_keys().filter(|name| name != "default").collect())
}

/// Those that are on where nobody says otherwise.
pub fn default_ones() -> Result<Vec<String>> {
    Ok(manifest()?.features.remove("default").unwrap_or_default())
}

/// Those that are tested alone. The families of attention vendor modules and do nothing else, all in one way: one of them
/// stands for the others.
fn tested(features: &[String]) -> Result<Vec<&String>> {
    let alike = recipes::attention()?;
    let first = alike.first();
    Ok(features.iter().filter(|feature| Some(*feature) == first || !alike.contains(feature)).collect())
}

/// Runs the tests that a feature can make a difference to: with the default features, or with these alone.
pub fn test(features: Option<&str>) -> Result<()> {
    let mut cargo = shell::cargo();
    cargo.args(["test", "--locked", "--quiet", "--lib"]);
    if let Some(features) = features {
        cargo.args(["--no-default-features", "--features", features]);
    }
    for name in tests(features.unwrap_or_default())? {
        cargo.args(["--test", &name]);
    }
    shell::run(&mut cargo)
}

/// The names of these tests, in order.
fn tests(features: &str) -> Result<Vec<String>> {
    let (folder, manifest) = (shell::root().join("tests"), manifest()?);
    let has = |feature: &String| features.split(',').any(|name| name == feature);
    let cannot = |name: &str| manifest.test.iter().any(|t| t.name == name && !t.required_features.iter().all(has));
    let mut names = Vec::new();
    for entry in fs::read_dir(&folder).map_err(|e| Error::io("reading the folder", &folder, &e))?.flatten() {
        let file = entry.file_name().to_string_lossy().into_owned();
        let Some(name) = file.strip_suffix(".rs") else { continue };
        if !WHATEVER_FEATURES.contains(&name) && !name.ends_with(GPU) && !cannot(name) {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// Runs and compiles them all.
pub fn command() -> Result<()> {
    provision::kernels(&recipes::quick()?)?;
    let features = features()?;
    for feature in tested(&features)? {
        test(Some(feature))?;
    }
    // Without kernels: no wheel is needed for that.
    let mut cargo = shell::cargo();
    cargo.env(SKIP_VENDOR, "1").args([
        "check",
        "--locked",
        "--quiet",
        "--no-default-features",
        "--features",
        &features.join(","),
    ]);
    shell::run(&mut cargo)?;
    let root = shell::root();
    for feature in CUDARC {
        let folder = root.join("target/features").join(feature);
        let manifest = format!(
            "[package]\nname = \"application\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\n[workspace]\n\n[dependencies]\n\
             flashinfer-rs = {{ path = {:?}, features = [\"cudarc\"] }}\n\
             cudarc = {{ version = \"0.19\", default-features = false, features = [\"{feature}\"] }}\n",
            root.display().to_string()
        );
        let main = "fn main() {\n    let _ = flashinfer_rs::cudarc::driver::CudaContext::new;\n}\n";
        publish_bytes(&folder.join("Cargo.toml"), manifest.as_bytes())?;
        publish_bytes(&folder.join("src/main.rs"), main.as_bytes())?;
        // The same versions as everywhere here.
        let lock = fs::read(root.join("Cargo.lock")).map_err(|e| Error::io("reading", &root.join("Cargo.lock"), &e))?;
        publish_bytes(&folder.join("Cargo.lock"), &lock)?;
        let mut cargo = shell::cargo();
        cargo.current_dir(&folder).env(SKIP_VENDOR, "1").args(["check", "--quiet", "--target-dir"]);
        shell::run(cargo.arg(root.join("target/features/target")))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::tests as all_tests;
    use super::*;

    #[test]
    fn tests_that_a_feature_makes_a_difference_to_are_found() {
        let default = all_tests("").expect("names");
        assert!(default.contains(&"runtime".to_owned()), "{default:?}");
        for absent in ["vendoring", "graph", "norm_gpu"] {
            assert!(!default.contains(&absent.to_owned()), "{default:?}");
        }
        assert!(all_tests("cudarc").expect("names").contains(&"graph".to_owned()));
    }

    #[test]
    fn every_feature_but_the_default_ones_and_those_alike_is_tested_alone() {
        let features = features().expect("features");
        for name in ["norm", "gdn-prefill", "cudart", "embed", "cudarc", "attention-mla"] {
            assert!(features.contains(&name.to_owned()), "{features:?}");
        }
        assert!(!features.contains(&"default".to_owned()));
        let tested = tested(&features).expect("names");
        let left_out: Vec<_> = features.iter().filter(|name| !tested.contains(name)).collect();
        assert_eq!(left_out, ["attention-fp8-kv", "attention-mla", "attention-sinks", "attention-xqa"]);
    }

    #[test]
    fn what_is_left_out_by_name_is_there() {
        let folder = shell::root().join("tests");
        assert!(WHATEVER_FEATURES.iter().all(|name| folder.join(format!("{name}.rs")).is_file()));
    }
}
