//! Any bytes as a safetensors file: refused, or tensors that are all inside of it and can be read.
#![no_main]

use std::io::Write;

use flashinfer_rs::bench::Safetensors;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(bytes).expect("written");
    let Ok(tensors) = Safetensors::open(file.path()) else { return };
    let mut total = 0;
    for name in tensors.names() {
        let tensor = tensors.read(name).expect("a tensor of the file");
        total += tensor.bytes().len();
        (0..tensor.slots()).for_each(|i| _ = tensor.float(i));
    }
    assert!(total <= bytes.len());
});
