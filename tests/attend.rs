//! The kernels of attention that appends (`src/glue/attend.cu`) without a GPU: compiled for the host, where a thread is a thread and
//! what tensor cores do is done by their tables. Memory ends where what it holds does, so that nothing else is read or written.

use std::fs;
use std::path::Path;
use std::process::Command;

#[test]
fn every_kernel_attends_to_what_there_is_and_follows_nothing_that_is_out_of_range() {
    let read = |path: &str| fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).expect(path);
    let source = read("src/glue/attend.cu");
    // What a GPU alone can do, in whose place the fixture has the same by other means; of what the kernels' sources have in common,
    // the types are left.
    let common = read("src/glue/hopper.cuh");
    let (types, _) =
        common.split_once("__device__ __forceinline__ f32 to_f32(").expect("types ahead of what takes them");
    let (before, rest) = source.split_once("// Two numbers, rounded, the first in the lower half.").expect("pairs");
    let (_, after) = rest.split_once("// Two to the power of a difference").expect("what any machine can do");
    let (declared, pool) = ("extern __shared__ uint4 pool[];", "uint4* const pool = pool_of_block;");
    assert_eq!(after.matches(declared).count(), 1);
    let of_the_host = |line: &&str| !line.starts_with("#include") && !line.starts_with("#pragma");
    let lines = |text: &str| text.lines().filter(of_the_host).collect::<Vec<_>>().join("\n");
    let kernels = format!("{}\n{}\n//{}", lines(types), lines(before), lines(after).replace(declared, pool));
    let fixture = read("tests/fixtures/attend.cc");
    assert_eq!(fixture.matches("    KERNEL(").count(), source.matches("\nATTEND(").count(), "each kernel is run");
    let (before, after) = fixture.split_once("@HELPERS@").expect("a place for the types");
    // Types first, which the helpers take.
    let (types, rest) = kernels.split_once("// What is no place of a cache.").expect("constants");
    let text = format!("{before}{types}{}", after.replace("@KERNELS@", &format!("//{rest}")));

    let folder = tempfile::tempdir().unwrap();
    let (file, program) = (folder.path().join("attend.cc"), folder.path().join("attend"));
    fs::write(&file, text).unwrap();
    let mut compiler = Command::new(std::env::var_os("CXX").unwrap_or("c++".into()));
    let output = compiler.args(["-std=c++20", "-O1", "-pthread"]).arg(&file).arg("-o").arg(&program).output();
    let output = output.expect("this test needs a C++ compiler");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let output = Command::new(&program).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", output.status);
}
