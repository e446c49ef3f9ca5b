//! `cargo xtask features`: every Cargo feature alone and all together compile, and so does a program that chooses cudarc's
//! own features.

use std::fs;

use crate::shell;
use crate::vendoring::env::SKIP_VENDOR;
use crate::vendoring::error::{Error, Result};
use crate::vendoring::store::publish_bytes;

const FEATURES: [&str; 6] =
    ["norm", "gdn-prefill", "cudart", "embed", "cudarc", "norm,gdn-prefill,cudart,embed,cudarc"];
/// What an application may turn on beside us: cudarc's features are the union of everybody's.
const CUDARC: [&str; 3] = ["cuda-12080", "cuda-13000", "dynamic-linking"];

/// Compiles them all, without kernels: no wheel is needed for that.
pub fn command() -> Result<()> {
    for features in FEATURES {
        let mut cargo = shell::cargo();
        cargo.env(SKIP_VENDOR, "1").args(["check", "--quiet", "--no-default-features", "--features", features]);
        shell::run(&mut cargo)?;
    }
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
