//! `FLASHINFER_RS_TRACE_DUMP=DIR`: the definition of every kernel that is called, a file each, as FlashInfer's own
//! `FLASHINFER_TRACE_DUMP` writes them.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::contract::{Checked, Operand, Row};

/// Names the folder.
const VARIABLE: &str = "FLASHINFER_RS_TRACE_DUMP";

/// Whether it is known that nothing is written. The variable is read at the first call.
static OFF: AtomicBool = AtomicBool::new(false);

/// Every call comes by here, once it is known that it keeps its row, ahead of the kernel. Where nothing is written that is one
/// load and one branch.
#[inline(always)]
pub(crate) fn called(row: &'static Row, operands: &[Operand<'_, '_>], checked: &Checked) {
    if !OFF.load(Ordering::Relaxed) {
        dump(row, operands, checked);
    }
}

/// Never fails: what cannot be written is said once, and nothing more is written.
#[cold]
#[inline(never)]
fn dump(row: &'static Row, operands: &[Operand<'_, '_>], checked: &Checked) {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let folder = std::env::var_os(VARIABLE).filter(|folder| !folder.is_empty())?;
        // Wherever the program goes meanwhile.
        Some(std::path::absolute(&folder).unwrap_or_else(|_| PathBuf::from(folder)))
    });
    match folder {
        Some(folder) => write::definition(folder, row, operands, checked),
        None => OFF.store(true, Ordering::Relaxed),
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
    _ = writeln!(std::io::stderr(), "flashinfer-rs: {VARIABLE}: {what}");
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
