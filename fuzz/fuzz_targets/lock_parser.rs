//! Any text as `artifacts.lock`: refused, or a lock that keeps what it promises.
#![no_main]

#[path = "../../build/mod.rs"]
mod vendoring;

use libfuzzer_sys::fuzz_target;
use vendoring::lock::{LOCAL_HEADER, Lock};

fuzz_target!(|text: &str| {
    let Ok(lock) = Lock::parse(text, "fuzzed.lock") else { return };
    for wheel in &lock.wheels {
        assert!(lock.for_target(&wheel.target).any(|found| found.file == wheel.file));
        assert!(is_plain(&wheel.file) && !wheel.sources.is_empty());
        assert_eq!(wheel.wanted(&|_| true).len(), wheel.members.len());
        for member in &wheel.members {
            assert!(is_plain(&member.soname));
            if let Some(place) = member.place() {
                assert!(member.size.is_some() && member.sha256.is_some() && member.crc32.is_some());
                assert!(place.offset.checked_add(place.length).is_some());
                assert!(place.length - LOCAL_HEADER >= place.compressed);
            }
        }
    }
});

/// That joining it to a folder leads to a file in that folder.
fn is_plain(name: &str) -> bool {
    let path = std::path::Path::new("folder").join(name);
    path.parent() == Some("folder".as_ref()) && path.file_name() == Some(name.as_ref())
}
