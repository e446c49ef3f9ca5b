//! Small C libraries for tests, and tests in a process of their own.
#![allow(dead_code, reason = "each test uses its own part")]

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread;
use std::time::Duration;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LOCAL, RTLD_NOW};

/// Compiles a fixture as a shared library of this soname, into `folder`.
pub fn compile(fixture: &str, soname: &str, flags: &[&str], folder: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(fixture);
    let library = folder.join(soname);
    let mut cc = Command::new(std::env::var_os("CC").unwrap_or("cc".into()));
    cc.args(["-shared", "-fPIC", "-O1", &format!("-Wl,-soname,{soname}"), "-o"]).arg(&library).arg(&source).args(flags);
    let output = cc.output().expect("these tests need a C compiler");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    library
}

/// Loads a library for good. With `global`, later libraries bind to its symbols.
pub fn load(path: &Path, global: bool) {
    let flags = RTLD_NOW | if global { RTLD_GLOBAL } else { RTLD_LOCAL };
    // SAFETY: the test's own library, whose initializers do nothing, or one that the crate vendored.
    let library = unsafe { Library::open(Some(path), flags) }.expect("a library that loads");
    std::mem::forget(library);
}

/// Names the test that a process was started for, in its environment.
pub const MARK: &str = "FLASHINFER_RS_ISOLATED_TEST";

/// Runs a test's body in a process of its own, since a process has one runtime. `name` is the test's.
pub fn isolated(name: &str, body: impl FnOnce()) {
    isolated_with(name, &[], body);
}

/// As [`isolated`], with environment variables.
pub fn isolated_with(name: &str, variables: &[(&str, &Path)], body: impl FnOnce()) {
    isolated_in(&std::env::current_exe().expect("this test's path"), name, variables, body);
}

/// As [`isolated_with`], by another name of the test's program.
pub fn isolated_in(program: &Path, name: &str, variables: &[(&str, &Path)], body: impl FnOnce()) {
    if in_its_process(name) {
        return body();
    }
    let output = again(program, name, variables);
    let text = text(&output);
    // A name that matches no test would pass by running none.
    assert!(output.status.success() && text.contains("1 passed"), "in a process of its own:\n{text}");
}

/// As [`isolated`], for a body that ends its process: what that process wrote.
pub fn dying(name: &str, body: impl FnOnce()) -> String {
    if in_its_process(name) {
        body();
        // A success, which is what the other process does not expect.
        std::process::exit(0);
    }
    let output = again(&std::env::current_exe().expect("this test's path"), name, &[]);
    assert!(!output.status.success(), "the process was to end in the middle:\n{}", text(&output));
    text(&output)
}

/// Whether this is the process that the test of this name started.
pub fn in_its_process(name: &str) -> bool {
    std::env::var(MARK).is_ok_and(|running| running == name)
}

/// Runs one test of a test program in a process of its own.
pub fn again(program: &Path, name: &str, variables: &[(&str, &Path)]) -> Output {
    let mut child = Command::new(program);
    child.args(["--exact", name, "--nocapture"]).env(MARK, name).env_remove("FLASHINFER_RS_LIB_DIR");
    child.envs(variables.iter().copied());
    loop {
        match child.output() {
            // A program that was copied a moment ago, while another test's child still has it open for writing.
            Err(error) if error.kind() == ErrorKind::ExecutableFileBusy => thread::sleep(Duration::from_millis(10)),
            output => break output.expect("this test, started again"),
        }
    }
}

/// All that a process wrote.
pub fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Lets kernel modules load where there is no driver.
pub fn stand_in_for_the_driver() {
    let folder = tempfile::tempdir().expect("a folder");
    load(&compile("empty.c", "libcuda.so.1", &["-nostdlib"], folder.path()), false);
}

/// Resident memory, in bytes.
pub fn resident() -> i64 {
    let text = std::fs::read_to_string("/proc/self/statm").expect("/proc");
    text.split(' ').nth(1).and_then(|pages| pages.parse::<i64>().ok()).expect("a number of pages") * 4096
}

/// The folder that the build vendored into.
pub fn vendored_libraries() -> PathBuf {
    Path::new(env!("OUT_DIR")).join("lib")
}
