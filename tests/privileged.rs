//! What takes more than an ordinary user may do: disks that are full or read-only, files of other users, an empty root.
//! Where this machine does not let these tests do so they are ignored, with the reason.
#![cfg(target_os = "linux")]
#![allow(dead_code, unused_imports, reason = "what the tests of absent features use")]

#[path = "../build/mod.rs"]
mod vendoring;

mod support {
    pub mod http;
    pub mod machine;
    pub mod native;
    #[macro_use]
    pub mod needs;
    pub mod wheels;
}

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};

use support::http::{Reply, Server};
use support::machine::{Machine, assert_says, files_under};
use support::native;
use support::needs::{self, Need};
use support::wheels::{self, NORM, Wheel, sha256};
use vendoring::env;
use vendoring::source::Source;

fn main() -> ExitCode {
    let mounts = needing![Need::Mounts;
        a_cache_that_is_full_is_named_and_left_without_half_a_file,
        a_cache_that_cannot_be_written_is_used_where_it_holds_the_wheel,
    ];
    let givings = needing![Need::Givings; a_cache_that_belongs_to_somebody_else_is_hashed_before_use];
    #[cfg(all(feature = "embed", feature = "cudart"))]
    let embedded = needing![Need::NoNetwork;
        an_embedded_program_runs_alone_in_an_empty_root,
        an_embedded_program_without_proc_says_what_it_needs,
    ];
    #[cfg(not(all(feature = "embed", feature = "cudart")))]
    let embedded = [];
    needs::main(include_str!("privileged.rs"), &[mounts.as_slice(), &givings, &embedded].concat())
}

const FEATURES: &[&str] = &["norm"];
const NO_FILES: [&str; 0] = [];
const RELEASE: &str = "/release.whl";
/// For the process that a test starts: the folder to work in.
const FOLDER: &str = "FLASHINFER_RS_PRIVILEGED_FOLDER";

/// A kernel of some size that does not compress.
fn wheel() -> Wheel {
    let noise = (0u32..3000).flat_map(|block| sha256(&block.to_le_bytes()).0).collect();
    Wheel { members: vec![(NORM, noise)], ..Wheel::jit_cache() }
}

/// A server that has the wheel, whole and by ranges, and the two pins that name it: without and with its members' places.
fn served(wheel: &Wheel) -> (Server, [wheels::Pin; 2]) {
    let server = Server::start();
    server.on(RELEASE, [Reply::ok(wheel.bytes()).with_ranges()]);
    let url = server.url(RELEASE);
    (server, [wheel.pin(), wheel.pin_with_places()].map(|pin| pin.url(&url)))
}

/// The folder that the test made, in the process that it started.
fn folder() -> PathBuf {
    PathBuf::from(std::env::var_os(FOLDER).expect("the folder of this test"))
}

/// Runs a test again after a script, which runs in its machine's folder.
#[track_caller]
fn after_mounting(test: &str, machine: &Machine, script: &str) {
    // By a variable of the script: the folder's name may have blanks and quotes in it.
    let quoted = machine.path("").display().to_string().replace('\'', r"'\''");
    needs::again(test, Need::Mounts, &format!("{FOLDER}='{quoted}'; export {FOLDER}; cd \"${FOLDER}\"; {script}"));
}

fn a_cache_that_is_full_is_named_and_left_without_half_a_file() {
    const TEST: &str = "a_cache_that_is_full_is_named_and_left_without_half_a_file";
    if !needs::inside(TEST) {
        let machine = Machine::new();
        fs::create_dir(machine.cache()).expect("the cache");
        return after_mounting(TEST, &machine, "mount -t tmpfs -o size=64k none cache");
    }
    let (_server, pins) = served(&wheel());
    for pin in pins {
        let cache = folder().join("cache");
        let machine = Machine::new().with(env::CACHE_DIR, &cache);
        let lock = wheels::lock([&pin]);
        let fault = machine.vendor(&lock, FEATURES).err().expect("a full disk");
        assert!(!fault.is_unavailable(), "another source would not help");
        assert_says(fault.to_string(), &[&cache.display().to_string(), "No space left", "free some space"]);
        assert_eq!(files_under(&cache), NO_FILES);
    }
}

fn a_cache_that_cannot_be_written_is_used_where_it_holds_the_wheel() {
    const TEST: &str = "a_cache_that_cannot_be_written_is_used_where_it_holds_the_wheel";
    let wheel = wheel();
    if !needs::inside(TEST) {
        let machine = Machine::new();
        machine.place(machine.cached(&wheel.pin().url("http://127.0.0.1:1/").parsed()), wheel.bytes());
        return after_mounting(TEST, &machine, "mount --bind cache cache; mount -o remount,ro,bind cache");
    }
    let cache = folder().join("cache");
    let denied = fs::write(cache.join("file"), "").expect_err("the fixture: a read-only folder");
    assert_eq!(denied.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    let (server, [_, pin]) = served(&wheel);
    let machine = Machine::new().with(env::CACHE_DIR, &cache);
    let lock = wheels::lock([&pin]);
    let rows = machine.vendor(&lock, FEATURES).expect("the kernels").rows;
    assert!(rows.iter().all(|row| row.source == Source::Cache));
    assert!(fs::read(machine.lib_dir().join("norm.so")).expect("the library") == wheel.member(NORM));
    assert!(server.requests().is_empty());

    let (server, [pin, _]) = served(&wheel.rebuilt());
    assert_says(machine.fault(&pin.parsed()), &[&cache.display().to_string(), "Read-only", env::CACHE_DIR]);
    assert!(server.requests().is_empty(), "nothing is fetched that cannot be kept");
}

fn a_cache_that_belongs_to_somebody_else_is_hashed_before_use() {
    let wheel = wheel();
    let (server, pins) = served(&wheel);
    for pin in pins {
        let (machine, lock) = (Machine::new(), wheels::lock([&pin]));
        machine.vendor(&lock, FEATURES).expect("the kernels");
        let files: Vec<PathBuf> = files_under(&machine.cache()).iter().map(|file| machine.cache().join(file)).collect();
        let give = |path: &Path| chown(path, Some(12345), Some(12345)).expect("another owner");
        files.iter().for_each(|path| give(path));
        let requests = server.requests().len();
        let rows = machine.vendor(&lock, FEATURES).expect("the kernels").rows;
        assert!(rows.iter().all(|row| row.source == Source::Cache));
        assert_eq!(server.requests().len(), requests);

        for path in &files {
            fs::write(path, wheel.clone().rebuilt().bytes()).expect("planted");
            give(path);
        }
        machine.vendor(&lock, FEATURES).expect("the kernels");
        assert!(fs::read(machine.lib_dir().join("norm.so")).expect("the library") == wheel.member(NORM));
        assert!(server.requests().len() > requests);
    }
}

/// Runs a shell script without a network, with mounts of its own.
fn unshared(script: &str, arguments: &[&Path]) -> Output {
    let (program, flags) = Need::NoNetwork.starter().split_first().expect("a program");
    let mut command = Command::new(program);
    command.args(flags).args(["sh", "-ec", script, "sh"]).args(arguments);
    command.output().expect("unshare (util-linux)")
}

/// The quick start with `embed`, built once.
fn embedded_quickstart() -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("embed");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(env!("CARGO_MANIFEST_DIR")).env("CARGO_PROFILE_DEV_STRIP", "symbols");
    cargo.args(["build", "--locked", "--example", "quickstart", "--features", "embed,cudarc", "--target-dir"]);
    let output = cargo.arg(&target).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    target.join("debug/examples/quickstart")
}

fn an_embedded_program_runs_alone_in_an_empty_root() {
    let program = embedded_quickstart();
    let bytes = fs::read(&program).unwrap();
    let build_path = env!("CARGO_TARGET_TMPDIR").as_bytes();
    assert!(!bytes.windows(build_path.len()).any(|part| part == build_path), "the build's path is in the binary");

    let root = tempfile::tempdir().unwrap();
    fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::create_dir(root.path().join("proc")).unwrap();
    fs::copy(&program, root.path().join("quickstart")).unwrap();
    // The C and C++ runtime libraries, each where the dynamic linker of this system looks for it.
    let vendored = ["libcudart.so.13", "libtvm_ffi.so"].map(|soname| native::vendored_libraries().join(soname));
    let listed = Command::new("ldd").args(vendored).arg(&program).output().unwrap();
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    for path in listed.split_whitespace().filter(|word| word.starts_with("/lib") || word.starts_with("/usr/lib")) {
        let place = root.path().join(path.trim_start_matches('/'));
        fs::create_dir_all(place.parent().unwrap()).unwrap();
        fs::copy(path, place).unwrap();
    }
    let script = "mount --bind \"$1\" \"$1\"; mount --rbind /proc \"$1/proc\"; mount -o remount,ro,bind \"$1\"; cd \"$1\"; \
                  if chroot --userspec=65534:65534 . /quickstart 2>/dev/null; then exit 0; fi; chroot . /quickstart";
    let output = unshared(script, &[root.path()]);
    let text = native::text(&output);
    assert!(output.status.success(), "{text}");
    assert_eq!(text.matches("  yes\n").count(), 4, "{text}");
}

fn an_embedded_program_without_proc_says_what_it_needs() {
    let program = embedded_quickstart();
    let output = unshared("mount -t tmpfs none /proc; \"$1\"", &[&program]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success());
    assert!(text.contains("/proc") && text.contains("FLASHINFER_RS_LIB_DIR"), "{text}");
}
