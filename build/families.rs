//! Finds the kernel families, one file each in `src/kernels`, and their references in `src/reference`: a family is named
//! nowhere else.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use super::error::{Error, Result};
use super::store::publish_bytes;

/// Writes `kernels.rs` and `references.rs`, which the library includes. Answers the folders that were searched.
///
/// Constants alone: of code that may panic the file's path would stand in every program, and it names the build's folder.
pub fn list(manifest: &Path, out_dir: &Path) -> Result<[PathBuf; 2]> {
    let kernels = manifest.join("src").join("kernels");
    let references = manifest.join("src").join("reference");
    let entries = "/// The kernels of each family.\nconst FAMILIES: &[fn() -> Vec<Entry>] = &[{}];\n";
    write(&kernels, &out_dir.join("kernels.rs"), "pub mod", "::entries", entries)?;
    let functions = "/// The functions of each family.\nconst FAMILIES: &[&[(&str, SafeCall)]] = &[{}];\n";
    write(&references, &out_dir.join("references.rs"), "mod", "::FUNCTIONS", functions)?;
    Ok([kernels, references])
}

fn write(folder: &Path, to: &Path, module: &str, item: &str, list: &str) -> Result<()> {
    let mut text = String::from("// Written by build.rs: the families that it found.\n\n");
    let names = families(folder)?;
    for name in &names {
        let file = folder.join(format!("{name}.rs"));
        let _ = writeln!(text, "#[path = {:?}]\n{module} {name};", file.display().to_string());
    }
    let items: Vec<_> = names.iter().map(|name| format!("{name}{item}")).collect();
    text += "\n";
    text += &list.replace("{}", &items.join(", "));
    publish_bytes(to, text.as_bytes())
}

/// The files of a folder but `mod.rs`, without their ending, in order.
fn families(folder: &Path) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(folder).map_err(|e| Error::io("listing", folder, &e))?;
    let mut names = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| Error::io("listing", folder, &e))?.path();
        let name = path.file_stem().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if path.extension().is_some_and(|ending| ending == "rs") && name != "mod" {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}
