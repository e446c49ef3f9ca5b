//! From the lock to verified shared objects in a folder: what build.rs does on a supported target.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::digest::hash_reader;
use super::emit::Row;
use super::env::STRICT;
use super::error::{Error, Result, refuse};
use super::lock::{Lock, Member, Wheel};
use super::modules;
use super::source::{Found, Ladder, Notes, Nowhere, Source, Supply};
use super::store::publish;
use super::wheel::{Extracted, Wheel as Archive};

/// What was vendored, and what is to be said of it.
#[derive(Default)]
pub struct Outcome<'a> {
    pub rows: Vec<Row<'a>>,
    pub warnings: Vec<String>,
    /// What happened, for those who look.
    pub told: Vec<String>,
    pub missing: Vec<Missing>,
    /// Files whose change makes this outcome stale.
    pub watch: Vec<PathBuf>,
    /// Files that were looked for in vain: each that appears makes this outcome stale.
    pub absent: Vec<PathBuf>,
}

impl Outcome<'_> {
    fn note(&mut self, notes: Notes) {
        self.warnings.extend(notes.warnings);
        self.told.extend(notes.told);
    }
}

/// A folder of this build's own, beside the libraries, for as long as it vendors.
struct Scratch(PathBuf);

impl Scratch {
    fn beside(lib_dir: &Path) -> Result<Self> {
        let folder = lib_dir.with_extension("scratch");
        // Of a build that was killed.
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).map_err(|e| Error::io("creating the folder", &folder, &e))?;
        Ok(Self(folder))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Libraries that were wanted and are not there; all of them, where none is named.
#[derive(Debug, Default)]
pub struct Missing {
    pub sonames: Vec<String>,
    pub reason: String,
}

/// How many names stand in a reason; of more, the first alone does.
const NAMED: usize = 3;

/// Vendors every member of the target's wheels that the features want into `lib_dir`.
pub fn vendor<'a>(
    lock: &'a Lock,
    target: &'a str,
    has_feature: &dyn Fn(&str) -> bool,
    ladder: &mut Ladder<'_>,
    lib_dir: &Path,
) -> Result<Outcome<'a>> {
    let (mut outcome, scratch) = (Outcome::default(), Scratch::beside(lib_dir)?);
    for wheel in lock.for_target(target) {
        let members = wheel.wanted(has_feature);
        if members.is_empty() {
            continue;
        }
        match ladder.supply(wheel, &members, &scratch.0)? {
            Supply::Nowhere(Nowhere { fault, brief, files }) => {
                if !wheel.optional {
                    return Err(fault);
                }
                let soname = &members[0].soname;
                if ladder.env.flag(STRICT) {
                    refuse!(
                        "{fault}\nOtherwise the build would go on and the system's {soname} be used, but {STRICT} is set; give the \
                         wheel, unset the variable, or turn off the Cargo feature that wants it"
                    );
                }
                outcome.warnings.push(format!("{fault}\nThe build goes on: the system's {soname} will be used"));
                let sonames = members.iter().map(|member| member.soname.clone()).collect();
                outcome.missing.push(Missing { sonames, reason: brief });
                outcome.absent.extend(files);
            }
            Supply::Members { files, source, notes } => {
                outcome.note(notes);
                for (member, (path, mut file)) in members.into_iter().zip(files) {
                    let extracted = place(member, &path, &mut file, lib_dir)?;
                    outcome.rows.push(Row {
                        wheel,
                        version: wheel.version.clone(),
                        wheel_sha256: wheel.sha256,
                        source,
                        soname: &member.soname,
                        extracted,
                    });
                }
            }
            Supply::Wheel(found) => from_wheel(&mut outcome, wheel, members, found, ladder, lib_dir)?,
        }
    }
    Ok(outcome)
}

fn from_wheel<'a>(
    outcome: &mut Outcome<'a>,
    wheel: &'a Wheel,
    members: Vec<&'a Member>,
    found: Found,
    ladder: &Ladder<'_>,
    lib_dir: &Path,
) -> Result<()> {
    let pinned = found.is_pinned(wheel);
    let Found { file, path, source, sha256, version, notes } = found;
    outcome.note(notes);
    if matches!(source, Source::Override | Source::Directory | Source::Local) {
        outcome.watch.push(path.clone());
    }
    let mut archive = Archive::open(BufReader::new(file), path.display().to_string())?;
    let mut lacking = Vec::new();
    for member in members {
        if member.named && !archive.has(&member.path) {
            let paths: Vec<String> = archive.paths().map(str::to_owned).collect();
            let from = path.display().to_string();
            let is_local = source == Source::Local;
            refuse!("{}", modules::unknown(member, &from, is_local, paths.iter().map(String::as_str)));
        }
        // A contributor may have built one kernel family only; everybody else's wheel must be complete.
        if source == Source::Local && !archive.has(&member.path) {
            lacking.push(member.soname.clone());
            continue;
        }
        // The lock's member digests are those of the pinned wheel; of another the wheel's own RECORD must do.
        let expected = if pinned { member.clone() } else { archive.recorded(member)? };
        let extracted = archive.extract(&expected, lib_dir)?;
        if pinned && matches!(source, Source::Network | Source::Cache) {
            ladder.keep(wheel, member, &extracted);
        }
        let (version, soname) = (version.clone(), member.soname.as_str());
        outcome.rows.push(Row { wheel, version, wheel_sha256: sha256, source, soname, extracted });
    }
    if !lacking.is_empty() {
        // One warning, since attention has dozens of modules.
        let names = match lacking.as_slice() {
            [first, rest @ ..] if rest.len() >= NAMED => format!("{first}, and {} more are not in it", rest.len()),
            few => few.join(", no "),
        };
        let remedy = "`cargo xtask wheel --kernels` builds what is named there";
        outcome.warnings.push(format!("the local build {} has no {names}; {remedy}", path.display()));
        // Without its path: it goes into the program.
        let reason = format!("the local build of the kernels has no {names}; {remedy}");
        outcome.missing.push(Missing { sonames: lacking, reason });
    }
    Ok(())
}

/// Copies a verified member into `lib_dir`, and checks what arrived there.
pub(super) fn place(member: &Member, from: &Path, file: &mut File, lib_dir: &Path) -> Result<Extracted> {
    let path = lib_dir.join(&member.soname);
    let (sha256, size) = publish(&path, |out| {
        let failed = |e: std::io::Error| Error::io("copying", from, &e);
        file.seek(SeekFrom::Start(0)).map_err(failed)?;
        let (sha256, size) = hash_reader(Tee { from: file, to: out }).map_err(failed)?;
        if member.sha256.is_some_and(|expected| expected != sha256) {
            refuse!("{} changed while it was copied; run the build again", from.display());
        }
        Ok((sha256, size))
    })?;
    Ok(Extracted { path, sha256, size })
}

/// Writes what is read.
struct Tee<'a> {
    from: &'a mut File,
    to: &'a mut File,
}

impl Read for Tee<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.from.read(buffer)?;
        self.to.write_all(&buffer[..n])?;
        Ok(n)
    }
}
