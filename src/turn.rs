//! Turns of threads at something that takes some microseconds.

use std::hint;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

/// One thread's turn at a time. Cheaper than a mutex where nobody else is at it, which is nearly always, and with nothing to
/// poison: who waits spins for about as long as some launches take, since putting a thread to sleep and waking it takes
/// longer than a launch; and then sleeps between looks, for the rare turn in which a library is loaded.
#[derive(Default)]
pub(crate) struct Turns {
    taken: AtomicBool,
}

/// A turn, until it is dropped, also by a panic.
pub(crate) struct Turn<'a>(&'a Turns);

impl Turns {
    #[inline(always)]
    pub(crate) fn take(&self) -> Turn<'_> {
        if self.taken.swap(true, Ordering::Acquire) {
            self.wait();
        }
        Turn(self)
    }

    #[cold]
    fn wait(&self) {
        const SPINS: u32 = 4_000;
        const YIELDS: u32 = SPINS + 1_000;
        let mut looks = 0u32;
        loop {
            // Looked at before it is taken, so that those who wait do not take the memory from the one who works.
            if !self.taken.load(Ordering::Relaxed) && !self.taken.swap(true, Ordering::Acquire) {
                return;
            }
            looks = looks.saturating_add(1);
            match looks {
                0..SPINS => hint::spin_loop(),
                SPINS..YIELDS => thread::yield_now(),
                _ => thread::sleep(Duration::from_micros(50)),
            }
        }
    }
}

impl Drop for Turn<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        self.0.taken.store(false, Ordering::Release);
    }
}
