//! The cache as a specification: shared by any number of processes, killed at any moment, in folders of every kind.
//! `FLASHINFER_RS_STRESS=1`, which `cargo xtask stress` sets, makes the long forms of the same tests.
//!
//! A test that needs another process starts itself again. What takes more than an ordinary user may do is in privileged.rs.
#![cfg(target_os = "linux")]

#[path = "../build/mod.rs"]
mod vendoring;

mod support {
    pub mod http;
    pub mod machine;
    pub mod wheels;
}

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use support::http::{Gate, Reply, Server};
use support::machine::{Machine, assert_says, bytes_of, files_under};
use support::wheels::{self, GDN, NORM, Pin, TARGET, Wheel, sha256};
use vendoring::digest::Digest;
use vendoring::emit;
use vendoring::env::{self, Env};
use vendoring::lock::Lock;
use vendoring::source::{Ladder, Source};
use vendoring::store::Store;
use vendoring::vendor::vendor;

/// For the process that a test starts: the test's name, and the folder to work in.
const TEST: &str = "FLASHINFER_RS_CACHE_TEST";
const FOLDER: &str = "FLASHINFER_RS_CACHE_TEST_FOLDER";
const STRESS: &str = "FLASHINFER_RS_STRESS";

const FEATURES: &[&str] = &["norm", "gdn-prefill"];
const NO_FILES: [&str; 0] = [];
/// Whatever takes longer hangs.
const DEADLINE: Duration = Duration::from_secs(60);
const RELEASE: &str = "/release.whl";

/// The short form of a number, or the long one.
fn scaled(short: usize, long: usize) -> usize {
    if std::env::var_os(STRESS).is_some_and(|value| value == "1") { long } else { short }
}

/// Waits until something is so, and fails where it never is.
#[track_caller]
fn wait_until(what: &str, mut so: impl FnMut() -> bool) {
    let started = Instant::now();
    while !so() {
        assert!(started.elapsed() < DEADLINE, "{what}: not within {DEADLINE:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Kernels of some size in bytes that do not compress, side by side.
fn wheel() -> Wheel {
    let noise = |seed: u32| {
        let mut bytes = Vec::new();
        (0u32..3000).for_each(|block| bytes.extend(sha256(&[seed, block].map(u32::to_le_bytes).concat()).0));
        bytes
    };
    Wheel { members: vec![(NORM, noise(1)), (GDN, noise(2))], ..Wheel::jit_cache() }
}

/// How a wheel's kernels come over the wire.
#[derive(Debug, Clone, Copy)]
enum Way {
    Whole,
    Ranges,
}

impl Way {
    fn pin(self, wheel: &Wheel) -> Pin {
        match self {
            Self::Whole => wheel.pin(),
            Self::Ranges => wheel.pin_with_places(),
        }
    }

    fn reply(self, wheel: &Wheel) -> Reply {
        match self {
            Self::Whole => Reply::ok(wheel.bytes()),
            Self::Ranges => Reply::ok(wheel.bytes()).with_ranges(),
        }
    }
}

/// A server that gives this answer in the wheel's place, and the lock that names it.
fn serving(pin: Pin, reply: Reply) -> (Server, Pin) {
    let server = Server::start();
    server.on(RELEASE, [reply]);
    let pin = pin.url(server.url(RELEASE));
    (server, pin)
}

/// This test once more, in a process of its own that works in a folder. What comes before the last arguments is how
/// to start it: nothing, or a program that starts programs.
fn again(test: &str, folder: &Path, starter: &[&str]) -> Command {
    let own = std::env::current_exe().expect("this test's path");
    let mut command = match starter {
        [] => Command::new(own),
        [program, arguments @ ..] => {
            let mut command = Command::new(program);
            command.args(arguments).arg(own);
            command
        }
    };
    command.args(["--exact", test, "--nocapture"]).env(TEST, test).env(FOLDER, folder);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// The folder to work in, if this is a process that the test started.
fn inside(test: &str) -> Option<PathBuf> {
    let running = std::env::var(TEST).is_ok_and(|running| running == test);
    running.then(|| PathBuf::from(std::env::var_os(FOLDER).expect("the folder of this test")))
}

#[track_caller]
fn succeeds(child: Child) {
    let output = child.wait_with_output().expect("its end");
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    // A name that matches no test would pass by running none.
    assert!(output.status.success() && text.contains("1 passed"), "in a process of its own:\n{text}");
}

fn sonames<'a>(rows: &'a [emit::Row<'_>]) -> Vec<&'a str> {
    rows.iter().map(|row| row.soname).collect()
}

/// What build.rs does with a lock, a cache and a library folder.
fn build(lock: &Path, cache: &Path, lib_dir: &Path) {
    let lock = Lock::read(lock).expect("the lock");
    let env = Env::fixed([(env::CACHE_DIR, cache)]);
    let mut silent = |_, _| {};
    let mut ladder = Ladder::new(&env, &mut silent);
    let has_feature = |name: &str| FEATURES.contains(&name);
    let outcome = vendor(&lock, TARGET, &has_feature, &mut ladder, lib_dir).expect("the kernels");
    emit::prune(lib_dir, &sonames(&outcome.rows)).expect("a folder of kernels");
}

/// That every file under its final name is what its folder's name says; answers how many there are.
#[track_caller]
fn verified(cache: &Path) -> usize {
    let files = files_under(cache);
    let mut finished = files.iter().filter(|file| !file.contains("/.tmp-") && !file.ends_with(".part"));
    let check = |file: &String| {
        let digest = file.split('/').nth(1).expect("a folder per digest");
        let found = sha256(&fs::read(cache.join(file)).expect("the file")).to_string();
        assert_eq!(found, digest, "{file} does not verify");
    };
    finished.by_ref().inspect(|file| check(file)).count()
}

/// That these are the kernels, and nothing else.
#[track_caller]
fn are_the_kernels(lib_dir: &Path, wheel: &Wheel) {
    assert_eq!(files_under(lib_dir), ["gdn_prefill_sm90.so", "norm.so"]);
    for (soname, path) in [("norm.so", NORM), ("gdn_prefill_sm90.so", GDN)] {
        assert!(fs::read(lib_dir.join(soname)).expect("the library") == wheel.member(path), "{soname}");
    }
}

mod processes {
    use super::*;

    /// Cold processes that start together.
    #[track_caller]
    fn make_one_download(test: &str, way: Way) {
        if let Some(folder) = inside(test) {
            let own = std::process::id();
            fs::write(folder.join(format!("started/{own}")), "").expect("the mark");
            return build(&folder.join("lock"), &folder.join("cache"), &folder.join(format!("lib/{own}")));
        }
        let (wheel, machine, gate) = (wheel(), Machine::new(), Gate::default());
        let (server, pin) = serving(way.pin(&wheel), way.reply(&wheel).behind(&gate));
        machine.place("lock", wheels::lock_text([&pin]));
        let started = machine.path("started");
        fs::create_dir(&started).expect("a folder");
        let processes = scaled(4, 16);
        let folder = machine.path("");
        let children: Vec<Child> =
            (0..processes).map(|_| again(test, &folder, &[]).spawn().expect("a process")).collect();
        wait_until("processes that started", || files_under(&started).len() == processes);
        wait_until("the first request", || !server.requests().is_empty());
        gate.open();
        children.into_iter().for_each(succeeds);
        assert_eq!(server.paths(), [RELEASE]);
        let lib_dirs: Vec<PathBuf> =
            fs::read_dir(machine.path("lib")).expect("the libraries").map(|entry| entry.expect("one").path()).collect();
        assert_eq!(lib_dirs.len(), processes);
        lib_dirs.iter().for_each(|lib_dir| are_the_kernels(lib_dir, &wheel));
        assert_eq!(verified(&machine.cache()), files_under(&machine.cache()).len(), "temporaries");
    }

    #[test]
    fn that_start_together_make_one_download_of_a_whole_wheel() {
        make_one_download("processes::that_start_together_make_one_download_of_a_whole_wheel", Way::Whole);
    }

    #[test]
    fn that_start_together_make_one_download_of_members() {
        make_one_download("processes::that_start_together_make_one_download_of_members", Way::Ranges);
    }

    /// A build that may be killed, and how long it takes when it is not.
    struct Victim {
        way: Way,
        pin: Pin,
        _server: Server,
        typical: Duration,
    }

    const KILLED: &str = "processes::that_are_killed_leave_nothing_that_does_not_verify";

    fn start(machine: &Machine, pin: &Pin) -> Child {
        machine.place("lock", wheels::lock_text([pin]));
        again(KILLED, &machine.path(""), &[]).spawn().expect("a process")
    }

    /// Small pieces make a transfer take long enough to be killed in.
    fn victim(way: Way, wheel: &Wheel) -> Victim {
        let (server, pin) = serving(way.pin(wheel), way.reply(wheel).in_pieces_of(16));
        let run = || {
            let (machine, started) = (Machine::new(), Instant::now());
            succeeds(start(&machine, &pin));
            started.elapsed()
        };
        let typical = run().min(run()).min(run());
        Victim { way, pin, _server: server, typical }
    }

    #[test]
    fn that_are_killed_leave_nothing_that_does_not_verify() {
        if let Some(folder) = inside(KILLED) {
            return build(&folder.join("lock"), &folder.join("cache"), &folder.join("lib"));
        }
        let wheel = wheel();
        let victims = [Way::Whole, Way::Ranges].map(|way| victim(way, &wheel));
        let (kills, mut running, mut temporaries) = (scaled(20, 200), 0, 0);
        for kill in 0..kills {
            let victim = &victims[kill % victims.len()];
            let moment = victim.typical.mul_f64((kill as f64 + 0.5) / kills as f64);
            let machine = Machine::new();
            let (mut child, started) = (start(&machine, &victim.pin), Instant::now());
            while started.elapsed() < moment && child.try_wait().expect("its state").is_none() {
                std::thread::sleep(Duration::from_micros(200));
            }
            running += usize::from(child.try_wait().expect("its state").is_none());
            child.kill().expect("killed");
            child.wait().expect("its end");

            let (way, lock) = (victim.way, wheels::lock([&victim.pin]));
            let found = files_under(&machine.cache()).len();
            temporaries += found - verified(&machine.cache());
            for file in files_under(&machine.lib_dir()).iter().filter(|file| !file.starts_with(".tmp-")) {
                let path = if file == "norm.so" { NORM } else { GDN };
                let bytes = fs::read(machine.lib_dir().join(file)).expect("the library");
                assert!(bytes == wheel.member(path), "{file} after kill {kill} at {moment:?} ({way:?})");
            }
            let rows = machine.vendor(&lock, FEATURES).expect("the next build").rows;
            emit::prune(&machine.lib_dir(), &sonames(&rows)).expect("pruned");
            are_the_kernels(&machine.lib_dir(), &wheel);
            let left = files_under(&machine.cache());
            assert_eq!(verified(&machine.cache()), left.len(), "after kill {kill} at {moment:?} ({way:?}): {left:?}");
        }
        assert!(running >= kills / 4, "{running} of {kills} kills met a running process");
        assert!(temporaries > 0, "no kill met a process that was writing into the cache");
    }

    /// `cargo xtask cache clean` removes lock files; two processes that lock different files of one name would both go
    /// ahead.
    #[test]
    fn that_waited_for_a_lock_file_that_was_removed_wait_for_the_new_one() {
        let (machine, digest) = (Machine::new(), sha256(b"a wheel"));
        let path = machine.place(format!("cache/wheels/{digest}/.lock"), "");
        let old = File::open(&path).expect("the lock file");
        old.lock().expect("the lock");
        let (entered, entering) = mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let work = || {
                    entered.send(()).expect("somebody who listens");
                    Ok(())
                };
                Store::new(machine.cache()).locked(&digest, work).expect("the lock");
            });
            // Until it waits. Where it does not yet, what follows holds all the same.
            std::thread::sleep(Duration::from_millis(300));
            fs::remove_file(&path).expect("removed");
            let new = File::create(&path).expect("another lock file");
            new.lock().expect("the lock");
            drop(old);
            assert!(entering.recv_timeout(Duration::from_millis(300)).is_err(), "two at once");
            drop(new);
            entering.recv_timeout(DEADLINE).expect("its turn");
        });
    }
}

mod locks {
    use super::*;

    /// A wheel's folder whose lock somebody holds for as long as the file is open.
    fn held(machine: &Machine) -> (Digest, PathBuf, File) {
        let digest = sha256(b"a wheel");
        let path = machine.place(format!("cache/wheels/{digest}/.lock"), "");
        let lock = File::open(&path).expect("the lock file");
        lock.lock().expect("the lock");
        (digest, path, lock)
    }

    const PATIENCE: Duration = Duration::from_millis(400);

    #[test]
    fn that_nobody_gives_back_are_waited_for_no_longer_than_patience_lasts() {
        let machine = Machine::new();
        let (digest, path, _lock) = held(&machine);
        let store = Store::new(machine.cache()).with_patience(PATIENCE);
        let (started, done) = (Instant::now(), std::cell::Cell::new(false));
        let work = || {
            done.set(true);
            Ok(())
        };
        let fault = store.locked(&digest, work).expect_err("held by another").to_string();
        assert!((PATIENCE..DEADLINE / 4).contains(&started.elapsed()), "{:?}", started.elapsed());
        assert!(!done.get(), "two at once");
        let holder = format!("process {} has held {}", std::process::id(), path.display());
        assert_says(fault, &[&holder, "wait for it or end it", env::CACHE_DIR]);
    }

    /// A download of 2 GB may take an hour.
    #[test]
    fn of_a_process_that_fetches_are_waited_for_as_long_as_something_comes_in() {
        let machine = Machine::new();
        let (digest, path, lock) = held(&machine);
        let store = Store::new(machine.cache()).with_patience(PATIENCE);
        let started = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                use std::io::Write;
                let coming = path.with_file_name(".tmp-coming");
                let mut file = File::create(&coming).expect("a temporary");
                while started.elapsed() < PATIENCE * 4 {
                    file.write_all(b"some of it").expect("more");
                    std::thread::sleep(PATIENCE / 8);
                }
                fs::rename(coming, path.with_file_name("a.whl")).expect("whole");
                drop(lock);
            });
            store.locked(&digest, || Ok(())).expect("its turn");
        });
        assert!(started.elapsed() >= PATIENCE * 4);
    }

    /// Runs something on a thread of its own, after what changes that thread alone.
    fn apart<T: Send>(change: impl FnOnce() + Send, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                change();
                work()
            });
            thread.join().expect("the thread's end")
        })
    }

    /// This thread is nobody to the file system, where it was root.
    fn become_nobody() {
        // SAFETY: of the process, this thread alone changes, and it ends with the test.
        unsafe { libc::syscall(libc::SYS_setfsuid, 65534) };
    }

    #[test]
    fn of_another_user_are_opened_for_reading() {
        let (machine, wheel) = (Machine::new(), wheel());
        let (_server, pin) = serving(wheel.pin(), Reply::ok(wheel.bytes()));
        let pinned = pin.parsed();
        let folder = machine.cached(&pinned).parent().expect("a folder").to_owned();
        let lock = machine.place(folder.join(".lock"), "");
        let mode =
            |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("another mode");
        // Everybody may write into the folders, and read this file.
        for path in folder.ancestors().take_while(|path| path.starts_with(machine.path(""))) {
            mode(path, 0o777);
        }
        mode(&lock, 0o444);
        apart(become_nobody, || {
            let denied = File::options().write(true).open(&lock).expect_err("the fixture: another user's");
            assert_eq!(denied.kind(), std::io::ErrorKind::PermissionDenied);
            assert!(bytes_of(&machine.find(&pinned).expect("the wheel")) == wheel.bytes());
            // It keeps others out all the same.
            let held = File::open(&lock).expect("the lock file");
            held.lock().expect("the lock");
            let store = Store::new(machine.cache()).with_patience(PATIENCE);
            store.locked(&pinned.sha256, || Ok(())).expect_err("held");
        });
        mode(&lock, 0o644);
    }

    /// Every `flock` of this thread answers that the file system has none, as Lustre's does, and NFS without a lock server.
    fn be_without_locks() {
        let statement = |code: u32, jump: u8, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: jump, k };
        let mut program = [
            // The system call's number.
            statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
            statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, libc::SYS_flock as u32),
            statement(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ERRNO | libc::ENOTSUP as u32),
            statement(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
        ];
        let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
        // SAFETY: this thread alone changes, and it ends with the test; the filter outlives the call that copies it.
        let done = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter)
        };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    }

    #[test]
    fn that_the_file_system_has_not_are_done_without() {
        let (machine, wheel) = (Machine::new(), wheel());
        let (server, pin) = serving(wheel.pin(), Reply::ok(wheel.bytes()));
        let pinned = pin.parsed();
        let folder = machine.cached(&pinned).parent().expect("a folder").to_owned();
        let place = |name: &str, days: u64| {
            let path = machine.place(folder.join(name), "half a wheel");
            let time = std::time::SystemTime::now() - Duration::from_secs(days * 24 * 3600);
            File::options().write(true).open(path).and_then(|file| file.set_modified(time)).expect("another time");
        };
        place(".tmp-lately", 0);
        place(".tmp-long-ago", 3);
        apart(be_without_locks, || {
            let tried = File::open(folder.join(".tmp-lately")).expect("a file").try_lock();
            assert!(tried.is_err(), "the fixture: no locks");
            assert!(bytes_of(&machine.find(&pinned).expect("the wheel")) == wheel.bytes());
            assert_eq!(machine.find(&pinned).expect("the wheel").source, Source::Cache);
        });
        assert_eq!(server.requests().len(), 1);
        // What another process may be writing right now stays.
        let left = files_under(&folder);
        assert_eq!(left, [".tmp-lately".to_owned(), wheel.file()]);
    }
}

mod folders {
    use super::*;

    /// A machine whose cache was filled, and the server that filled it.
    fn filled(way: Way) -> (Machine, Server, Lock, Wheel) {
        let (machine, wheel) = (Machine::new(), wheel());
        let (server, pin) = serving(way.pin(&wheel), way.reply(&wheel));
        let lock = wheels::lock([&pin]);
        machine.vendor(&lock, FEATURES).expect("the kernels");
        (machine, server, lock, wheel)
    }

    /// Everything below a folder, itself too.
    fn everything(folder: &Path) -> Vec<PathBuf> {
        let below = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
        std::iter::once(folder.to_owned()).chain(below.flat_map(|path| everything(&path))).collect()
    }

    /// That what somebody else may write is used, and what somebody else wrote there is not.
    fn are_hashed_before_use(hand_over: impl Fn(&Path)) {
        for way in [Way::Whole, Way::Ranges] {
            let (machine, server, lock, wheel) = filled(way);
            everything(&machine.cache()).iter().for_each(|path| hand_over(path));
            let requests = server.requests().len();
            let rows = machine.vendor(&lock, FEATURES).expect("the kernels").rows;
            assert!(rows.iter().all(|row| row.source == Source::Cache), "{way:?}");
            assert_eq!(server.requests().len(), requests, "{way:?}");

            let planted: Vec<PathBuf> =
                files_under(&machine.cache()).iter().map(|file| machine.cache().join(file)).collect();
            for path in &planted {
                fs::write(path, wheel.clone().rebuilt().bytes()).expect("planted");
                hand_over(path);
            }
            machine.vendor(&lock, FEATURES).expect("the kernels");
            are_the_kernels(&machine.lib_dir(), &wheel);
            assert!(server.requests().len() > requests, "{way:?}");
            assert_eq!(verified(&machine.cache()), planted.len(), "{way:?}");
        }
    }

    #[test]
    fn that_everybody_may_write_are_hashed_before_use() {
        are_hashed_before_use(|path| {
            fs::set_permissions(path, fs::Permissions::from_mode(0o777)).expect("another mode");
        });
    }

    #[test]
    fn may_be_links_to_folders_elsewhere() {
        let (machine, wheel) = (Machine::new(), wheel());
        let (server, pin) = serving(wheel.pin(), Reply::ok(wheel.bytes()));
        fs::create_dir(machine.path("elsewhere")).expect("a folder");
        symlink("elsewhere", machine.cache()).expect("a link");
        assert_eq!(machine.find(&pin.parsed()).expect("the wheel").source, Source::Network);
        assert_eq!(machine.find(&pin.parsed()).expect("the wheel").source, Source::Cache);
        assert_eq!(server.requests().len(), 1);
        assert_eq!(files_under(&machine.path("elsewhere")).len(), 1);
    }

    #[test]
    fn with_a_link_to_other_bytes_are_filled_and_the_link_is_not_followed() {
        for way in [Way::Whole, Way::Ranges] {
            let (machine, server, lock, wheel) = filled(way);
            let victim = machine.place("victim", "somebody's own file");
            let files = files_under(&machine.cache());
            for file in &files {
                fs::remove_file(machine.cache().join(file)).expect("removed");
                symlink(&victim, machine.cache().join(file)).expect("a link");
            }
            let requests = server.requests().len();
            machine.vendor(&lock, FEATURES).expect("the kernels");
            are_the_kernels(&machine.lib_dir(), &wheel);
            assert!(server.requests().len() > requests, "{way:?}");
            assert_eq!(fs::read_to_string(&victim).expect("the file"), "somebody's own file");
            assert_eq!(verified(&machine.cache()), files.len());
            assert!(files.iter().all(|file| !machine.cache().join(file).is_symlink()), "{way:?}");
        }
    }

    /// A folder of ours that leads elsewhere is swept of nothing there.
    #[test]
    fn that_are_links_lose_no_file_that_is_not_ours() {
        let (machine, wheel) = (Machine::new(), wheel());
        let (_server, pin) = serving(wheel.pin(), Reply::ok(wheel.bytes()));
        let precious = machine.place("precious/.tmp-precious", "somebody's own file");
        let folder = machine.cached(&pin.parsed()).parent().expect("a folder").to_owned();
        fs::create_dir_all(folder.parent().expect("a folder")).expect("the folders");
        symlink(machine.path("precious"), &folder).expect("a link");
        machine.find(&pin.parsed()).expect("the wheel");
        assert!(precious.is_file());
    }

    /// Opening a pipe waits for somebody to write into it.
    #[test]
    fn with_a_pipe_in_the_wheels_place_do_not_stop_a_build() {
        let (machine, wheel) = (Machine::new(), wheel());
        let (_server, pin) = serving(wheel.pin(), Reply::ok(wheel.bytes()));
        let pinned = pin.parsed();
        let cached = machine.cached(&pinned);
        fs::create_dir_all(cached.parent().expect("a folder")).expect("the folder");
        assert!(Command::new("mkfifo").arg(&cached).status().expect("mkfifo").success());
        let (done, finished) = mpsc::channel();
        std::thread::spawn(move || done.send(machine.find(&pinned).map(|found| bytes_of(&found))));
        let bytes = finished.recv_timeout(DEADLINE).expect("a build that does not wait for the pipe");
        assert!(bytes.expect("the wheel") == wheel.bytes());
    }

    #[test]
    fn with_a_folder_in_the_wheels_place_are_named() {
        let (machine, wheel) = (Machine::new(), wheel());
        let (_server, pin) = serving(wheel.pin(), Reply::ok(wheel.bytes()));
        let cached = machine.cached(&pin.parsed());
        fs::create_dir_all(&cached).expect("the folder");
        assert_says(machine.fault(&pin.parsed()), &["naming", &cached.display().to_string()]);
        assert_eq!(files_under(&machine.cache()), NO_FILES);
    }

    /// What is copied into the cache is hashed there: the file it was copied from may be another one by then.
    #[test]
    fn are_given_a_member_only_if_it_has_its_digest() {
        let (machine, digest) = (Machine::new(), |bytes: &[u8]| -> Digest { sha256(bytes) });
        let from = machine.place("norm.so", "changed after it was checked");
        let store = Store::new(machine.cache());
        let (wheel, member) = (digest(b"a wheel"), digest(b"the member"));
        let fault = store.keep_member(&wheel, &member, "norm.so", &from).expect_err("other bytes").to_string();
        assert_says(fault, &[&from.display().to_string(), &member.to_string()]);
        assert_eq!(files_under(&machine.cache()), NO_FILES);
    }
}
