//! The first call of a kernel on each GPU, for a launcher that sets a kernel's shared memory once in a process.
//!
//! The setting belongs to the device, so on a second one the launch fails. Such a launcher remembers by an exported `bool`
//! for each kernel that it has set it. So the first call of a kernel on a device is made alone, with those flags cleared;
//! the launcher then sets the kernel up there too.

use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};

use crate::error::Result;
use crate::runtime::FlashInferRuntime;

/// Held shared by every call and alone by the first of each variant on each device: that one must find its flag cleared, and
/// no launcher may look at a flag while it is written here.
static GATE: RwLock<()> = RwLock::new(());

/// The flags of each library that was asked for.
static FLAGS: Mutex<Vec<(&'static str, &'static [&'static AtomicU8])>> = Mutex::new(Vec::new());

/// For every device, a bit for each variant of a kernel that ran there.
pub(crate) type Ran = [AtomicU32; 64];

pub(crate) fn guarded(
    ran: &Ran,
    (library, flag): (&'static str, &str),
    variant: u32,
    runtime: &'static FlashInferRuntime,
    device: i32,
    launch: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let bit = 1 << variant;
    let ran = ran.get(device as usize);
    if ran.is_some_and(|ran| ran.load(Ordering::Acquire) & bit != 0) {
        let _shared = GATE.read().unwrap_or_else(PoisonError::into_inner);
        return launch();
    }
    let _alone = GATE.write().unwrap_or_else(PoisonError::into_inner);
    for flag in flags(runtime, library, flag)? {
        flag.store(0, Ordering::Relaxed);
    }
    launch()?;
    if let Some(ran) = ran {
        ran.fetch_or(bit, Ordering::Release);
    }
    Ok(())
}

/// The flags. None in a release that has no such fault.
fn flags(
    runtime: &'static FlashInferRuntime,
    library: &'static str,
    ending: &str,
) -> Result<&'static [&'static AtomicU8]> {
    let mut known = FLAGS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, flags)) = known.iter().find(|(name, _)| *name == library) {
        return Ok(flags);
    }
    let addresses = runtime.module(library)?.data_symbols(ending);
    // SAFETY: each is a `bool` of a library that is never unloaded. Its launchers read and write it only within calls, all
    // of which hold the gate, so never while this side writes.
    let flags = addresses.into_iter().map(|address| unsafe { AtomicU8::from_ptr(address) }).collect::<Vec<_>>();
    let flags: &'static [_] = flags.leak();
    known.push((library, flags));
    Ok(flags)
}
