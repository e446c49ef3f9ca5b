//! `FLASHINFER_RS_TRACE_DUMP=DIR`: the definition of every kernel that is called, a file each, as FlashInfer's own
//! `FLASHINFER_TRACE_DUMP` writes them.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::contract::{Checked, Operand, Row};
use crate::settings::TRACE_DUMP;

/// Whether nothing is written, or nothing more.
static OFF: AtomicBool = AtomicBool::new(true);
static FOLDER: OnceLock<PathBuf> = OnceLock::new();

/// Begins to write definitions into a folder.
pub(crate) fn start(folder: &Path) {
    // Wherever the program goes meanwhile.
    FOLDER.get_or_init(|| std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned()));
    OFF.store(false, Ordering::Relaxed);
}

/// Calls that are seen by the log come by here, ahead of the kernel, once it is known that they keep their row. Never fails: what
/// cannot be written is said once, and nothing more is written.
pub(crate) fn called(row: &'static Row, operands: &[Operand<'_, '_>], checked: &Checked) {
    if !OFF.load(Ordering::Relaxed)
        && let Some(folder) = FOLDER.get()
    {
        write::definition(folder, row, operands, checked);
    }
}

/// Turns this off, and says why, once.
fn give_up(why: &str) {
    if !OFF.swap(true, Ordering::Relaxed) {
        say(&format!("{why}; no more definitions are written"));
    }
}

/// Says something on stderr.
fn say(what: &str) {
    use std::io::Write;

    // Without a stderr there is nobody to be told.
    _ = writeln!(std::io::stderr(), "flashinfer-rs: {}: {what}", TRACE_DUMP.name);
}

#[cfg(not(feature = "bench"))]
mod write {
    use super::{Checked, Operand, Path, Row, give_up};

    pub(super) fn definition(_: &Path, _: &'static Row, _: &[Operand<'_, '_>], _: &Checked) {
        give_up("this program was built without the Cargo feature `bench` of flashinfer-rs, which has the definitions");
    }
}

#[cfg(feature = "bench")]
mod write {
    use std::collections::HashSet;
    use std::sync::{Mutex, PoisonError};

    use super::{Checked, Operand, Path, Row, give_up, say};
    use crate::bench::{Kept, KernelCall, Key};
    use crate::error::FlashInferError;

    /// Of calls whose definitions need not be written again.
    static SEEN: Mutex<Option<HashSet<Key>>> = Mutex::new(None);

    pub(super) fn definition(folder: &Path, row: &'static Row, operands: &[Operand<'_, '_>], checked: &Checked) {
        let call = KernelCall::of(row, operands, &checked.dimensions);
        let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
        if !seen.get_or_insert_default().insert(call.key()) {
            return;
        }
        let definition = match call.definition() {
            Ok(definition) => definition,
            Err(error) => return say(&error.to_string()),
        };
        // The lock is held, so that no two threads write one file.
        let path = folder.join(format!("{}.json", definition.name));
        match definition.keep(&path) {
            Ok(Kept::Written | Kept::Same) => {}
            Ok(Kept::Other) => say(&format!(
                "{} is there and says something else; it was left as it is. Name a folder that is empty, or move the file",
                path.display()
            )),
            Err(FlashInferError::Io { doing, path, source }) => {
                give_up(&format!("{doing} {} failed ({source}); name a folder that can be written", path.display()));
            }
            Err(error) => give_up(&error.to_string()),
        }
    }
}
