//! Writes the archives that the fuzzing of the zip reader starts from into `seeds/zip_reader`.

#[path = "../../build/mod.rs"]
mod vendoring;

#[path = "../../tests/support"]
mod support {
    pub mod wheels;
    pub mod zipbytes;
}

use std::fs;
use std::path::Path;

use support::wheels::Wheel;
use support::zipbytes::{DEFLATE, Member, STORED, Zip};

fn main() {
    let mut wheel = Wheel::cudart();
    wheel.members[0].1.truncate(24);
    let zip = |method, change: fn(&mut Zip)| {
        let mut zip = Zip::of(&wheel, method);
        change(&mut zip);
        zip.bytes()
    };
    let archives = [
        ("deflated", zip(DEFLATE, |_| {})),
        ("stored", zip(STORED, |_| {})),
        ("described", zip(DEFLATE, |zip| zip.members.iter_mut().for_each(Member::described))),
        ("widened", zip(STORED, |zip| zip.members.iter_mut().for_each(Member::widened))),
        ("widened_end", zip(DEFLATE, |zip| _ = zip.widened())),
        ("empty", Zip::default().bytes()),
    ];
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds/zip_reader");
    fs::create_dir_all(&folder).expect("the folder");
    for (name, archive) in archives {
        // What a lock would say of the first member: see the target.
        let place = [u8::from(name.starts_with("stored") || name == "widened"), 24, 0, 24, 0];
        fs::write(folder.join(name), [&place[..], &archive].concat()).expect("the seed");
    }
}
