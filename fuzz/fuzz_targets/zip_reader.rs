//! Any bytes as a wheel: refused, or an archive that has one meaning, whichever way its members are read.
#![no_main]

#[path = "../../build/mod.rs"]
mod vendoring;

use std::io::{Cursor, sink};

use libfuzzer_sys::fuzz_target;
use vendoring::lock::{Member, Method, Place};
use vendoring::wheel::{Wheel, copy_from_place};
use zip::ZipArchive;

fuzz_target!(|data: &[u8]| {
    // The first bytes say what a lock might say of the rest.
    let Some((&[method, compressed, more, size, many], bytes)) = data.split_first_chunk() else { return };
    let method = if method & 1 == 0 { Method::Deflate } else { Method::Stored };
    let compressed = u64::from(u16::from_le_bytes([compressed, more]));
    let size = u64::from(u16::from_le_bytes([size, many]));
    at_a_place(bytes, Place { offset: 0, length: bytes.len() as u64, compressed, method }, size);
    as_a_whole(bytes);
});

fn at_a_place(mut bytes: &[u8], place: Place, size: u64) {
    let name = bytes.get(30..).and_then(|name| name.get(..bytes[26].into()));
    let path = name.and_then(|name| std::str::from_utf8(name).ok()).unwrap_or("some_kernels/norm.so");
    let member = Member { size: Some(size), ..Member::at(path) };
    let mut out = Vec::new();
    if let Ok((_, copied)) = copy_from_place(&mut bytes, place, &member, "fuzzed", &mut out, "norm.so".as_ref()) {
        assert_eq!((copied, out.len() as u64), (size, size));
    }
    assert!(out.len() as u64 <= size);
}

fn as_a_whole(bytes: &[u8]) {
    let Ok(mut wheel) = Wheel::open(Cursor::new(bytes), "fuzzed") else {
        let _ = Wheel::open_remote(Cursor::new(bytes), "fuzzed").and_then(|mut wheel| wheel.identity());
        return;
    };
    let mut other = ZipArchive::new(Cursor::new(bytes)).expect("what is accepted here is an archive");
    other.validate_header_consistency().expect("and consistent");
    let _ = wheel.identity();
    let names: Vec<String> = other.file_names().map(|name| name.expect("a name").into_owned()).collect();
    for name in names {
        let member = Member::at(name);
        let _ = wheel.recorded(&member);
        let Ok((sha256, size)) = wheel.copy(&member, &mut sink(), "member".as_ref()) else { continue };
        let place = wheel.place(&member.path).expect("the place of what can be read");
        let mut part = &bytes[place.offset as usize..(place.offset + place.length) as usize];
        let locked = Member { size: Some(size), sha256: Some(sha256), ..member };
        let copied = copy_from_place(&mut part, place, &locked, "fuzzed", &mut sink(), "member".as_ref());
        assert_eq!(copied, Ok((sha256, size)), "{}", locked.path);
    }
}
