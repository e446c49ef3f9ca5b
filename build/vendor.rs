//! From the lock to verified shared objects in a folder: what build.rs does on a supported target.

use std::io::BufReader;
use std::path::{Path, PathBuf};

use super::emit::Row;
use super::error::{Error, Result};
use super::lock::{Lock, Member};
use super::source::{Found, Ladder, Source};
use super::wheel::Wheel as Archive;

/// What was vendored, and what is to be said of it.
pub struct Outcome<'a> {
    pub rows: Vec<Row<'a>>,
    pub warnings: Vec<String>,
    /// Why something is not there.
    pub missing: Vec<String>,
    /// Files whose change makes this outcome stale.
    pub watch: Vec<PathBuf>,
}

/// Vendors every member of the target's wheels that the features want into `lib_dir`.
pub fn vendor<'a>(
    lock: &'a Lock,
    target: &'a str,
    has_feature: &dyn Fn(&str) -> bool,
    ladder: &mut Ladder<'_>,
    lib_dir: &Path,
) -> Result<Outcome<'a>> {
    let mut outcome = Outcome { rows: Vec::new(), warnings: Vec::new(), missing: Vec::new(), watch: Vec::new() };
    for wheel in lock.for_target(target) {
        let members = wheel.wanted(has_feature);
        if members.is_empty() {
            continue;
        }
        let found = match ladder.find(wheel) {
            Ok(found) => found,
            Err(fault @ Error::Unavailable(_)) if wheel.optional => {
                outcome
                    .warnings
                    .push(format!("{fault}. The build goes on: the system's {} will be used", members[0].soname));
                outcome.missing.push(fault.to_string());
                continue;
            }
            Err(fault) => return Err(fault),
        };
        outcome.warnings.extend(found.notes.iter().cloned());
        if matches!(found.source, Source::Override | Source::Directory | Source::Local) {
            outcome.watch.push(found.path.clone());
        }
        let pinned = found.is_pinned(wheel);
        let Found { file, path, source, sha256, .. } = found;
        let mut archive = Archive::open(BufReader::new(file), path.display().to_string())?;
        for member in members {
            // A contributor may have built one kernel family only; everybody else's wheel must be complete.
            if source == Source::Local && !archive.has(&member.path) {
                let fault = format!(
                    "the local build {} has no {}; `cargo xtask wheel --kernels norm,gdn-prefill` builds it",
                    path.display(),
                    member.soname
                );
                outcome.warnings.push(fault.clone());
                outcome.missing.push(fault);
                continue;
            }
            // The lock's member digests are those of the pinned wheel.
            let unpinned = Member { size: None, sha256: None, ..member.clone() };
            let extracted = archive.extract(if pinned { member } else { &unpinned }, lib_dir)?;
            outcome.rows.push(Row { wheel, wheel_sha256: sha256, source, soname: &member.soname, extracted });
        }
    }
    Ok(outcome)
}
