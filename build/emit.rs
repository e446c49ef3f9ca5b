//! What a build leaves behind: `vendored.rs`, a table that the library compiles in, and cargo's instructions.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use super::cargo::nameable;
use super::digest::Digest;
use super::error::{Error, Result};
use super::lock::{Lock, Wheel};
use super::source::Source;
use super::store::publish_bytes;
use super::vendor::Missing;
use super::wheel::Extracted;

/// One row of the table.
pub struct Row<'a> {
    pub wheel: &'a Wheel,
    /// The version that the wheel gives itself.
    pub version: String,
    pub wheel_sha256: Digest,
    pub source: Source,
    pub soname: &'a str,
    pub extracted: Extracted,
}

/// Writes the table. `missing` says why nothing, or not everything, was vendored, and the lock which feature vendors what.
/// With `embed` the libraries themselves go into it, and the paths that they have on this machine do not.
pub fn table(out_dir: &Path, rows: &[Row<'_>], missing: &[Missing], lock: &Lock, embed: bool) -> Result<()> {
    let mut text = String::from("// Written by build.rs: what was vendored.\n\n");
    let _ = writeln!(text, "pub(crate) static LIBRARIES: &[Vendored] = &[");
    for row in rows {
        // Not where the pinned bytes came from: that would make two programs of one.
        let source = match row.source {
            _ if row.wheel_sha256 == row.wheel.sha256 => "Pinned",
            Source::Local => "Local",
            _ => "Override",
        };
        let symbol = embed.then(|| symbol(row.soname));
        let _ = writeln!(
            text,
            "    Vendored {{ distribution: {:?}, version: {:?}, wheel_sha256: Digest({:?}), source: Source::{source}, stored: {} }},",
            row.wheel.distribution,
            row.version,
            row.wheel_sha256.0,
            stored(row.soname, &row.extracted, symbol.as_deref()),
        );
    }
    let _ = writeln!(
        text,
        "];\n\n/// Libraries that were wanted and not vendored, all of them where none is named, and why.\n\
         pub(crate) static MISSING: &[(&[&str], &str)] = &["
    );
    for Missing { sonames, reason } in missing {
        let _ = writeln!(text, "    (&{sonames:?}, {reason:?}),");
    }
    let _ = writeln!(
        text,
        "];\n\n/// Libraries, and the features that vendor them.\npub(crate) static FEATURES: &[(&str, &str)] = &["
    );
    let members = lock.wheels.iter().flat_map(|wheel| &wheel.members);
    let features: BTreeSet<_> = members.filter_map(|member| Some((&member.soname, member.feature.as_ref()?))).collect();
    for (soname, feature) in features {
        let _ = writeln!(text, "    ({soname:?}, {feature:?}),");
    }
    text += "];\n";
    if embed {
        rows.iter().for_each(|row| text += &embedding(&symbol(row.soname), &row.extracted, out_dir));
    }
    publish_bytes(&out_dir.join("vendored.rs"), text.as_bytes())
}

/// Where a library is, as the tables have it: in the program under a symbol, or at a path of this machine.
pub(super) fn stored(soname: &str, extracted: &Extracted, symbol: Option<&str>) -> String {
    let path = extracted.path.display().to_string();
    let (built_at, built_below, embedded) = match symbol {
        Some(symbol) => (String::new(), String::new(), format!("Some(|| (&raw const {symbol}).cast())")),
        None => (path, below_programs(&extracted.path), "None".to_owned()),
    };
    format!(
        "Stored {{ name: {soname:?}, sha256: Digest({:?}), size: {}, built_at: {built_at:?}, built_below: {built_below:?}, \
         embedded: {embedded} }}",
        extracted.sha256.0, extracted.size
    )
}

/// A path from cargo's folder `build` on, which lies beside the programs that cargo builds; empty where no folder has that
/// name.
fn below_programs(path: &Path) -> String {
    let build = path.ancestors().find(|folder| folder.file_name().is_some_and(|name| name == "build"));
    let relative = build.and_then(Path::parent).and_then(|programs| path.strip_prefix(programs).ok());
    relative.map(|path| path.display().to_string()).unwrap_or_default()
}

/// A library's bytes as a symbol. The assembler reads the file: `include_bytes!` of 150 MB costs the compiler seconds.
///
/// The file is named from OUT_DIR on, as the compiler has it: where build scripts and compilers run in sandboxes of their own,
/// that is another folder than it was here.
pub(super) fn embedding(symbol: &str, extracted: &Extracted, out_dir: &Path) -> String {
    let size = extracted.size;
    // What the assembler would read otherwise than it is written.
    let is_plain = |path: &Path| nameable(path).is_some_and(|text| !text.contains(['"', '\\']));
    let inside = extracted.path.strip_prefix(out_dir).ok().and_then(nameable).filter(|_| is_plain(&extracted.path));
    let incbin = match inside {
        Some(inside) => format!(r#"concat!(".incbin \"", env!("OUT_DIR"), "/{inside}\"")"#),
        // Quoted for the assembler, and then for Rust.
        None => format!("{:?}", format!(".incbin {:?}", extracted.path.display().to_string())),
    };
    format!(
        "\ncore::arch::global_asm!(\".pushsection .rodata.flashinfer_rs,\\\"a\\\",%progbits\", \".balign 64\", \
         \".globl {symbol}\", \".hidden {symbol}\", \"{symbol}:\", {incbin}, \".popsection\", options(raw));\n\
         unsafe extern \"C\" {{\n    // The assembler put that many bytes there, above.\n    safe static {symbol}: [u8; {size}];\n}}\n"
    )
}

/// A library's name as the linker knows its bytes.
pub(super) fn symbol(soname: &str) -> String {
    let name: String = soname.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    format!("flashinfer_rs_embedded_{name}")
}

/// Rerun lines: what this build depended on, and nothing else. A path that no line can have is not watched: under another name
/// cargo would miss it, and run the build each time.
pub fn rerun(files: &[&Path], variables: &[String]) {
    for file in files.iter().copied().filter_map(nameable) {
        println!("cargo::rerun-if-changed={file}");
    }
    for name in variables {
        println!("cargo::rerun-if-env-changed={name}");
    }
}

/// Links to files that were looked for in vain, in a folder that cargo is to watch; the folder, if there are any.
///
/// Cargo takes a file that is not there for one that has changed, and would run the build each time. Of a folder it looks at all
/// that lies in it, and passes over a link that leads nowhere. One that leads to something is newer than the build, which made
/// it: so the build runs again once one of the files appears.
///
/// None either where links cannot be made: then nothing is watched.
#[cfg(unix)]
pub fn watch_absent(out_dir: &Path, absent: &[PathBuf]) -> Option<PathBuf> {
    let folder = out_dir.join("absent");
    let _ = std::fs::remove_dir_all(&folder);
    if absent.is_empty() {
        return None;
    }
    std::fs::create_dir(&folder).ok()?;
    for (i, path) in absent.iter().enumerate() {
        std::os::unix::fs::symlink(path, folder.join(i.to_string())).ok()?;
    }
    // The folder itself is no news.
    let past = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1);
    std::fs::File::open(&folder).and_then(|opened| opened.set_modified(past)).ok()?;
    Some(folder)
}

/// Elsewhere links are not for everybody.
#[cfg(not(unix))]
pub fn watch_absent(_: &Path, _: &[PathBuf]) -> Option<PathBuf> {
    None
}

/// A warning is one line to cargo, which shows those of path dependencies alone.
pub fn warn(text: &str) {
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    println!("cargo::warning={}", lines.join(" "));
}

/// For dependents' build scripts: `DEP_FLASHINFER_RS_LIB_DIR`.
pub fn metadata(lib_dir: &Path) {
    println!("cargo::metadata=lib_dir={}", lib_dir.display());
}

/// Removes libraries of an earlier build that this one did not vendor.
pub fn prune(lib_dir: &Path, sonames: &[&str]) -> Result<()> {
    let Ok(entries) = std::fs::read_dir(lib_dir) else { return Ok(()) };
    for entry in entries.flatten() {
        if !sonames.iter().any(|soname| entry.file_name() == *soname) {
            std::fs::remove_file(entry.path()).map_err(|e| Error::io("removing", &entry.path(), &e))?;
        }
    }
    Ok(())
}
