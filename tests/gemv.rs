//! The kernels for products of few rows (`src/glue/gemv.cu`) without a GPU: compiled for the host, where a thread is a thread and
//! what tensor cores do is done by their tables. What they would read and write, and what they compute, is all the same.

use std::fs;
use std::path::Path;
use std::process::Command;

/// The text between two lines.
fn between<'a>(text: &'a str, begin: &str, end: &str) -> (&'a str, &'a str) {
    let (before, rest) = text.split_once(begin).unwrap_or_else(|| panic!("no {begin}"));
    let (_, after) = rest.split_once(end).unwrap_or_else(|| panic!("no {end}"));
    (before, after)
}

#[test]
fn every_kernel_computes_sums_and_reads_and_writes_nothing_else() {
    let read = |path: &str| fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).expect(path);
    let source = read("src/glue/gemv.cu");
    let kernels = source.matches("\nFEW_ROWS(").count();
    // What a GPU alone can do is at the end of what the kernels' sources have in common.
    let common = read("src/glue/hopper.cuh");
    let (common, _) = between(&common, "// What a GPU alone can do", "\n");
    let (before, after) = between(&source, "// What a GPU alone can do", "// Until here.");
    let of_the_host =
        |line: &&str| !line.starts_with("#include") && !line.starts_with("#pragma") && !line.starts_with("// ");
    let kept: Vec<&str> = [common, before, after].into_iter().flat_map(str::lines).filter(of_the_host).collect();
    let fixture = read("tests/fixtures/gemv.cc");
    assert_eq!(fixture.matches("    KERNEL(").count(), kernels, "each kernel is run");

    let folder = tempfile::tempdir().unwrap();
    let (text, program) = (folder.path().join("gemv.cc"), folder.path().join("gemv"));
    fs::write(&text, fixture.replace("@KERNELS@", &kept.join("\n"))).unwrap();
    let mut compiler = Command::new(std::env::var_os("CXX").unwrap_or("c++".into()));
    let output = compiler.args(["-std=c++20", "-O1", "-pthread"]).arg(&text).arg("-o").arg(&program).output();
    let output = output.expect("this test needs a C++ compiler");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let output = Command::new(&program).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", output.status);
}
