//! Any bytes as a module that is looked at before it is loaded: what they say of themselves, or why they are none.
#![no_main]
#![allow(dead_code)]

#[path = "../../src/elf.rs"]
mod elf;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    match elf::Elf::read(bytes) {
        Ok(elf) => {
            assert_eq!(elf.machine, elf::HOST);
            for target in &elf.targets {
                assert!(!target.to_string().is_empty() && !target.runs_on(0, 0));
            }
        }
        Err(unfit) => assert!(!unfit.problem.is_empty() && !unfit.remedy.is_empty()),
    }
});
