//! Tests that need what not everybody may do. Where that is so they are ignored, with the reason, never passed; where
//! `FLASHINFER_RS_RUN_PRIVILEGED_TESTS=1` asks for them, as the gate does, they fail there.
#![allow(dead_code, reason = "each test uses its own part")]

use std::os::unix::fs::chown;
use std::process::{Command, ExitCode};
use std::sync::LazyLock;

use libtest_mimic::{Arguments, Trial};

/// Asks for these tests.
const RUN: &str = "FLASHINFER_RS_RUN_PRIVILEGED_TESTS";
/// Names the test that a process was started for by [`again`].
const INSIDE: &str = "FLASHINFER_RS_PRIVILEGED_TEST";

/// What a test needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// To mount something that nobody else sees.
    Mounts,
    /// That, and to be without any network.
    NoNetwork,
    /// To give files to other users.
    Givings,
}

impl Need {
    fn text(self) -> &'static str {
        match self {
            Self::Mounts => "needs a mount namespace: root with CAP_SYS_ADMIN, or `unshare -rm true` that works",
            Self::NoNetwork => "needs a network namespace: root with CAP_SYS_ADMIN, or `unshare -rnm true` that works",
            Self::Givings => "gives files away: root with CAP_CHOWN may",
        }
    }

    fn is_met(self) -> bool {
        match self {
            Self::Mounts => MOUNTS.is_some(),
            Self::NoNetwork => NO_NETWORK.is_some(),
            Self::Givings => *GIVINGS,
        }
    }

    /// How a program is started with what is needed: as root, else as root of a user namespace.
    pub fn starter(self) -> &'static [&'static str] {
        let starter = match self {
            Self::Mounts => *MOUNTS,
            Self::NoNetwork => *NO_NETWORK,
            Self::Givings => Some(&["env"][..]),
        };
        starter.unwrap_or_else(|| panic!("this {}", self.text()))
    }
}

type Starter = &'static [&'static str];

static MOUNTS: LazyLock<Option<Starter>> =
    LazyLock::new(|| first_that_mounts([&["unshare", "--mount"], &["unshare", "--mount", "--map-root-user"]]));
static NO_NETWORK: LazyLock<Option<Starter>> = LazyLock::new(|| {
    let as_root = &["unshare", "--net", "--mount"];
    first_that_mounts([as_root, &["unshare", "--net", "--mount", "--map-root-user"]])
});
static GIVINGS: LazyLock<bool> = LazyLock::new(|| {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    chown(file.path(), Some(12345), Some(12345)).is_ok()
});

fn first_that_mounts(starters: [Starter; 2]) -> Option<Starter> {
    let works = |starter: &Starter| {
        let tried =
            Command::new(starter[0]).args(&starter[1..]).args(["mount", "-t", "tmpfs", "none", "/mnt"]).output();
        tried.is_ok_and(|output| output.status.success())
    };
    starters.into_iter().find(works)
}

/// Whether this process was started for this test, with what it needs.
pub fn inside(test: &str) -> bool {
    std::env::var(INSIDE).is_ok_and(|running| running == test)
}

/// Runs a test once more, in a process of its own that has what is needed, after a script.
#[track_caller]
pub fn again(test: &str, need: Need, script: &str) {
    let script = format!("set -e; {script}; exec \"$0\" \"$@\"");
    let (program, arguments) = need.starter().split_first().expect("a program");
    let mut command = Command::new(program);
    command.args(arguments).args(["sh", "-c", &script]).arg(std::env::current_exe().expect("this test's path"));
    let output = command.args(["--exact", test]).env(INSIDE, test).output().expect("a process");
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    // A name that matches no test would pass by running none.
    assert!(output.status.success() && text.contains("1 passed"), "in a process of its own:\n{text}");
}

/// Runs tests of a file whose text this is, each with what it needs.
pub fn main(source: &str, tests: &[(&'static str, Need, fn())]) -> ExitCode {
    // Such a function is compiled away in a program that runs its tests itself.
    assert!(!source.contains("\n#[test]"), "a test of this file is named in its `main`, and has no #[test]");
    let asked = std::env::var_os(RUN).is_some_and(|value| value == "1") || std::env::var_os(INSIDE).is_some();
    let mut lacking = Vec::new();
    let trials = tests.iter().map(|&(name, need, test)| {
        let ignored = !asked && !need.is_met();
        if ignored && !lacking.contains(&need) {
            lacking.push(need);
        }
        let body = move || {
            test();
            Ok(())
        };
        Trial::test(name, body).with_ignored_flag(ignored)
    });
    let trials = trials.collect();
    for need in lacking {
        eprintln!("ignored is what {}; {RUN}=1 makes it fail", need.text());
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// Tests by their functions' names, with what all of them need.
#[macro_export]
macro_rules! needing {
    ($need:expr; $($(#[$attribute:meta])* $test:ident),* $(,)?) => {
        [$($(#[$attribute])* (stringify!($test), $need, $test as fn())),*]
    };
}
