//! `cargo xtask install-libs`: the vendored libraries as files, for distributions that keep them apart from programs.

use std::fs;
use std::path::Path;

use crate::bundle;
use crate::provision;
use crate::shell::{self, say};
use crate::vendoring::error::{Error, Result, refuse};

/// Builds the crate and copies what it vendored into `to`.
pub fn command(to: &Path) -> Result<()> {
    provision::kernels(&["norm".to_owned()])?;
    let mut cargo = shell::cargo();
    cargo.args(["build", "--message-format=json-render-diagnostics"]);
    let (_, libraries) = bundle::collect(&shell::output(&mut cargo)?);
    let Some(libraries) = libraries else { refuse!("cargo did not say where the build script put the libraries") };
    for entry in fs::read_dir(&libraries).map_err(|e| Error::io("reading", &libraries, &e))?.flatten() {
        let path = to.join(entry.file_name());
        shell::copy(&entry.path(), &path)?;
        say(path.display());
    }
    Ok(())
}
