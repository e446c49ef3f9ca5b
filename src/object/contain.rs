//! Code of somebody else's in functions that C calls, where nothing may unwind.

use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs what may panic. Of a panic the message is answered, where it has one; its payload is dropped here, and where that
/// panics in turn, what comes of it is leaked: unwinding into C would end the process.
pub(super) fn contained<T>(body: impl FnOnce() -> T) -> Result<T, Option<String>> {
    let payload = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(value) => return Ok(value),
        Err(payload) => payload,
    };
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
    if let Err(again) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
        mem::forget(again);
    }
    Err(text)
}

/// Drops what may panic where it is dropped.
pub(super) fn dropped<T>(value: T) {
    // There is nobody to be told.
    let _ = contained(|| drop(value));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Panics wherever it is dropped, with another of its kind as the payload.
    struct Bomb(u32);

    impl Drop for Bomb {
        fn drop(&mut self) {
            if self.0 > 0 {
                std::panic::panic_any(Bomb(self.0 - 1));
            }
        }
    }

    #[test]
    fn nothing_unwinds_whatever_a_panic_carries() {
        assert_eq!(contained(|| 7), Ok(7));
        assert_eq!(contained(|| -> () { panic!("on purpose") }), Err(Some("on purpose".to_owned())));
        assert_eq!(contained(|| -> () { panic!("number {}", 7) }), Err(Some("number 7".to_owned())));
        for bombs in 0..5 {
            assert_eq!(contained(|| -> () { std::panic::panic_any(Bomb(bombs)) }), Err(None));
            dropped(Bomb(bombs));
        }
    }
}
