//! Kernels that are pinned like wheels: what their lock may say, where their files come from, what is refused, and what is
//! left behind. No GPU and no network beyond loopback. That programs find and call them is in `hermetic.rs`.

#[path = "../build/mod.rs"]
mod vendoring;

mod support {
    pub mod http;
    pub mod machine;
    pub mod wheels;
}

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use support::http::{Reply, Server};
use support::machine::{Machine, assert_says, files_under};
use support::wheels::{TARGET, Wheel, lock_text, sha256};
use vendoring::env::{self, Env};
use vendoring::error::Result;
use vendoring::kernels::{self, Outcome, Part, Pinned};
use vendoring::lock::Lock;
use vendoring::source::{Ladder, Source};
use vendoring::store::Store;

/// A kernel's files, as they are handed out.
#[derive(Clone)]
struct Kernel {
    name: &'static str,
    files: Vec<(&'static str, Vec<u8>)>,
}

const METADATA: &str = "Entry Symbol: run\nDefinition: gemm_n16\nSolution: by_hand\n";

impl Kernel {
    fn new(name: &'static str) -> Self {
        let files = vec![
            ("kernel.so", format!("\x7fELF of {name}").into_bytes().repeat(30)),
            ("kernel_metadata.txt", METADATA.into()),
            ("definition.json", "{\"name\": \"gemm_n16\"}".into()),
        ];
        Self { name, files }
    }

    fn file(&self, name: &str) -> &[u8] {
        &self.files.iter().find(|(file, _)| *file == name).expect("a file of the kernel").1
    }

    /// Its entry in a lock, with these sources.
    fn entry(&self, sources: &str) -> String {
        let mut text = format!(
            "[[kernel]]\nname = {:?}\ntarget = {TARGET:?}\ndefinition = \"gemm_n16\"\nsolution = \"by_hand\"\nauthor = \"me\"\n\
             entry = \"run\"\ndestination_passing_style = true\narch = [\"sm_90a\", \"compute_100\"]\ncuda = 13\n\
             needed = [\"libtvm_ffi.so\", \"libcudart.so.13\"]\nsources = [{sources}]\n",
            self.name
        );
        for (name, bytes) in &self.files {
            let (size, sha256) = (bytes.len(), sha256(bytes));
            let _ = write!(text, "[[kernel.file]]\nname = {name:?}\nsize = {size}\nsha256 = \"{sha256}\"\n");
        }
        text
    }

    /// Puts its files into a folder.
    fn place(&self, machine: &Machine, folder: &str) {
        for (name, bytes) in &self.files {
            machine.place(Path::new(folder).join(name), bytes);
        }
    }

    /// A server that has its files.
    fn served(&self) -> Server {
        let server = Server::start();
        for (name, bytes) in &self.files {
            server.on(&format!("/kernels/{}/{name}", self.name), [Reply::ok(bytes.clone())]);
        }
        server
    }

    fn url(&self, server: &Server) -> String {
        format!("{{ url = {:?} }}", server.url(&format!("/kernels/{}", self.name)))
    }
}

fn lock(entries: &[String]) -> String {
    format!("version = 1\n\n{}", entries.join("\n"))
}

/// Reads a lock of the user's that lies in the machine's folder `project`.
fn pinned(machine: &Machine, text: &str) -> Vec<Pinned> {
    let path = machine.place("project/kernels.lock", text);
    read(&path).expect("a good lock")
}

fn read(path: &Path) -> Result<Vec<Pinned>> {
    let own = Lock::parse("version = 1\nwheel = []", "artifacts.lock").expect("an empty lock");
    kernels::pinned(&own, Path::new("artifacts.lock"), Some(path))
}

fn vendor<'a>(machine: &Machine, pinned: &'a [Pinned]) -> Result<Outcome<'a>> {
    let env = machine.env();
    let mut silent = |_, _| {};
    let mut ladder = Ladder::new(&env, &mut silent);
    kernels::vendor(pinned, TARGET, &mut ladder, &machine.lib_dir(), &["libcudart.so.13"])
}

/// What a build says that cannot have the kernels, and that it leaves nothing of them.
#[track_caller]
fn refused(machine: &Machine, text: &str, parts: &[&str]) {
    let pinned = pinned(machine, text);
    let fault = vendor(machine, &pinned).err().expect("no kernel").to_string();
    assert_says(fault, parts);
    assert!(files_under(&machine.lib_dir()).is_empty());
}

mod a_lock {
    use super::*;

    const SOURCES: &str = "{ path = \"gemm\" }";

    fn good() -> String {
        lock(&[Kernel::new("gemm").entry(SOURCES)])
    }

    /// That a lock is refused, by its name and for this reason.
    #[track_caller]
    fn is_refused(text: &str, parts: &[&str]) {
        let fault = kernels::parse(text, "kernels.lock").expect_err("a bad lock").to_string();
        assert_says(&fault, &["kernels.lock"]);
        assert_says(&fault, parts);
    }

    /// That a good lock is refused after this change, at a line of it.
    #[track_caller]
    fn is_refused_with(from: &str, to: &str, fault: &str) {
        let (good, changed) = (good(), good().replacen(from, to, 1));
        assert_ne!(good, changed);
        let line = good.lines().zip(changed.lines()).position(|(a, b)| a != b).expect("another line") + 1;
        is_refused(&changed, &[&format!("line {line}"), fault, "cargo xtask kernel add"]);
    }

    #[test]
    fn says_all_of_a_kernel() {
        let kernels = kernels::parse(&good(), "kernels.lock").expect("a good lock");
        let [kernel] = kernels.as_slice() else { panic!("one kernel") };
        assert_eq!((kernel.name.as_str(), kernel.soname()), ("gemm", "gemm.kernel.so".to_owned()));
        assert_eq!((kernel.definition.as_str(), kernel.entry.as_str()), ("gemm_n16", "run"));
        assert_eq!((kernel.solution.as_deref(), kernel.author.as_deref()), (Some("by_hand"), Some("me")));
        assert_eq!((kernel.destination_passing_style, kernel.cuda), (Some(true), Some(13)));
        assert_eq!((kernel.arch.len(), kernel.needed.len(), kernel.files.len()), (2, 2, 3));
    }

    #[test]
    fn needs_to_say_no_more_than_what_is_called_and_where_it_lies() {
        let optional = ["solution", "author", "destination_passing_style", "arch", "cuda", "needed"];
        let is_optional = |line: &&str| !optional.iter().any(|key| line.starts_with(&format!("{key} = ")));
        let short: String = good().lines().filter(is_optional).map(|line| format!("{line}\n")).collect();
        assert_eq!(kernels::parse(&short, "kernels.lock").expect("a good lock").len(), 1);
        for key in ["name", "target", "definition", "entry", "sources"] {
            let without: String = short
                .lines()
                .filter(|line| {
                    !line.starts_with(&format!("{key} = ")) || line.ends_with(".so\"") || line.ends_with(".txt\"")
                })
                .map(|line| format!("{line}\n"))
                .collect();
            is_refused(&without, &["missing field", key]);
        }
    }

    #[test]
    fn may_be_this_crates_own_with_wheels_and_kernels() {
        let pin = Wheel::jit_cache().pin().url("https://example.invalid/a.whl");
        let text = format!("{}\n{}", lock_text([&pin]), Kernel::new("gemm").entry(SOURCES));
        let own = Lock::parse(&text, "artifacts.lock").expect("a good lock");
        assert_eq!((own.wheels.len(), own.kernels.len()), (1, 1));
        let fault = Lock::parse(&text.replacen("name = \"gemm\"", "name = \"../gemm\"", 1), "artifacts.lock");
        assert_says(fault.expect_err("a bad lock").to_string(), &["artifacts.lock", "line", "`../gemm`"]);
    }

    #[test]
    fn of_the_user_has_no_wheels() {
        is_refused("version = 1\nwheel = []", &["unknown field `wheel`"]);
    }

    #[test]
    fn with_an_unknown_key_is_refused_at_its_line() {
        is_refused_with("cuda = 13", "cudda = 13", "unknown field `cudda`");
        is_refused_with("{ path =", "{ gopher =", "unknown variant `gopher`");
        is_refused_with("[[kernel.file]]\nname", "[[kernel.file]]\ncolour = 1\nname", "unknown field `colour`");
    }

    #[test]
    fn of_another_version_is_refused_for_that() {
        is_refused("version = 2\nnew = 1", &["version 2"]);
    }

    #[test]
    fn with_a_name_that_is_no_file_name_is_refused_at_its_line() {
        for name in
            ["..", ".", "", ".hidden", "-rf", "a/b", "../../x", "a\\\\b", "a b", "a\\nb", "a\\u0000", "ä", "C:x"]
        {
            is_refused_with("name = \"gemm\"", &format!("name = \"{name}\""), "is not a kernel's name");
        }
        let long = "x".repeat(129);
        is_refused_with("name = \"gemm\"", &format!("name = {long:?}"), "at most 128");
    }

    #[test]
    fn with_a_source_outside_of_its_folder_is_refused_at_its_line() {
        for path in ["..", "../gemm", "a/../../b", "/etc", ""] {
            is_refused_with("path = \"gemm\"", &format!("path = {path:?}"), "leads out of the lock's folder");
        }
    }

    #[test]
    fn with_an_address_that_is_not_http_is_refused_without_showing_it() {
        for url in ["ftp://user:secret@example.invalid/k", "file:///k", "secret", "https://example.invalid/k#secret"] {
            let text = good().replace("path = \"gemm\"", &format!("url = {url:?}"));
            let fault = kernels::parse(&text, "kernels.lock").expect_err("a bad lock").to_string();
            assert_says(&fault, &["kernels.lock", "not an http or https address"]);
            assert!(!fault.contains("secret"), "{fault}");
        }
    }

    #[test]
    fn with_what_is_no_function_architecture_or_library_is_refused_at_its_line() {
        is_refused_with("entry = \"run\"", "entry = \"run; x\"", "not a function's name");
        is_refused_with("\"sm_90a\"", "\"9.0a\"", "not an architecture");
        is_refused_with("\"libtvm_ffi.so\"", "\"../libtvm_ffi.so\"", "not a plain file name");
        is_refused_with("definition = \"gemm_n16\"", "definition = \"a\\nb\"", "one line of text");
    }

    #[test]
    fn with_another_file_than_a_kernels_is_refused_at_its_line() {
        is_refused_with("name = \"definition.json\"", "name = \"../../.bashrc\"", "unknown variant `../../.bashrc`");
    }

    #[test]
    fn with_a_digest_that_is_none_is_refused_at_its_line() {
        is_refused_with("sha256 = \"", "sha256 = \"F", "64 lower-case hexadecimal digits");
    }

    #[test]
    fn without_a_file_that_every_kernel_has_is_refused() {
        for (from, fault) in
            [("kernel.so", "no file kernel.so"), ("kernel_metadata.txt", "no file kernel_metadata.txt")]
        {
            is_refused(&good().replace(from, "solution.json"), &[fault, "gemm"]);
        }
    }

    #[test]
    fn with_a_file_twice_is_refused() {
        is_refused(&good().replace("definition.json", "kernel.so"), &["2 files kernel.so"]);
    }

    #[test]
    fn without_a_source_is_refused() {
        is_refused(&lock(&[Kernel::new("gemm").entry("")]), &["no source"]);
    }

    #[test]
    fn with_a_text_too_long_to_be_one_is_refused() {
        let size = Kernel::new("gemm").file("definition.json").len();
        is_refused(
            &good().replace(&format!("size = {size}\n"), "size = 999999999\n"),
            &["definition.json has 999999999 bytes"],
        );
    }

    #[test]
    fn that_pins_a_name_twice_for_one_target_is_refused() {
        let [a, b] = [Kernel::new("gemm"), Kernel::new("GEMM")].map(|kernel| kernel.entry(SOURCES));
        is_refused(&lock(&[a.clone(), a.clone()]), &["pins the kernel gemm twice for x86_64-linux"]);
        is_refused(&lock(&[a.clone(), b]), &["twice", "case does not count"]);
        let other = a.replace(TARGET, "aarch64-linux");
        assert_eq!(kernels::parse(&lock(&[a, other]), "kernels.lock").expect("a good lock").len(), 2);
    }

    #[test]
    fn of_the_user_must_not_pin_what_this_crate_pins() {
        let machine = Machine::new();
        let own = format!("version = 1\nwheel = []\n{}", Kernel::new("gemm").entry(SOURCES));
        let own = Lock::parse(&own, "artifacts.lock").expect("a good lock");
        let users = machine.place("kernels.lock", good());
        let fault = kernels::pinned(&own, Path::new("artifacts.lock"), Some(&users)).expect_err("twice").to_string();
        assert_says(fault, &[&users.display().to_string(), "artifacts.lock", "pins the kernel gemm twice"]);
    }
}

mod the_variable {
    use super::*;

    fn named(
        machine: &Machine,
        value: impl Into<std::ffi::OsString>,
        workspace: Option<&Path>,
    ) -> Result<Option<PathBuf>> {
        let env = Env::fixed([(env::KERNELS, value.into())]);
        let found = kernels::named_lock(&env, workspace);
        assert_eq!(env.names_read(), [env::KERNELS], "cargo is to be told");
        let _ = machine;
        found
    }

    #[test]
    fn that_is_not_set_names_no_lock() {
        let env = Env::fixed::<&str, &str>([]);
        assert_eq!(kernels::named_lock(&env, None), Ok(None));
        assert_eq!(env.names_read(), [env::KERNELS], "cargo is to be told all the same");
    }

    #[test]
    fn names_a_lock_by_its_full_path_or_by_one_from_the_workspace_on() {
        let machine = Machine::new();
        let path = machine.place("workspace/sub/kernels.lock", "version = 1\n");
        assert_eq!(named(&machine, &path, None), Ok(Some(path.clone())));
        let workspace = machine.path("workspace");
        assert_eq!(named(&machine, "sub/kernels.lock", Some(&workspace)), Ok(Some(path)));
    }

    #[test]
    fn that_names_nothing_is_refused_with_where_it_led_and_what_to_write() {
        let machine = Machine::new();
        let workspace = machine.path("workspace");
        let fault = named(&machine, "kernels.lock", Some(&workspace)).expect_err("no file").to_string();
        let led = workspace.join("kernels.lock").display().to_string();
        assert_says(fault, &["FLASHINFER_RS_KERNELS=kernels.lock", &led, "relative = true"]);
        let fault = named(&machine, "kernels.lock", None).expect_err("no folder").to_string();
        assert_says(fault, &["the workspace's folder is not known", "relative = true"]);
        let folder = machine.path("");
        assert_says(named(&machine, folder, None).expect_err("a folder").to_string(), &["names no file"]);
    }
}

mod a_kernel {
    use super::*;

    /// That it was vendored, whole.
    #[track_caller]
    fn is_vendored(machine: &Machine, kernel: &Kernel, outcome: &Outcome<'_>, source: Source) {
        let [row] = outcome.rows.as_slice() else { panic!("one kernel") };
        assert_eq!(row.source, source);
        assert_eq!(row.library.path, machine.lib_dir().join(format!("{}.kernel.so", kernel.name)));
        assert_eq!(fs::read(&row.library.path).expect("the library"), kernel.file("kernel.so"));
        assert_eq!(row.library.sha256, sha256(kernel.file("kernel.so")));
        assert_eq!(row.library.size, kernel.file("kernel.so").len() as u64);
        let texts: Vec<_> = row.texts.iter().map(|(part, text)| (part.file(), text.as_bytes())).collect();
        let expected: Vec<_> = kernel.files[1..].iter().map(|(name, bytes)| (*name, bytes.as_slice())).collect();
        assert_eq!(texts, expected);
        assert_eq!(files_under(&machine.lib_dir()), [format!("{}.kernel.so", kernel.name)]);
    }

    #[test]
    fn is_taken_from_a_folder_beside_the_lock() {
        let (machine, kernel) = (Machine::new(), Kernel::new("gemm"));
        kernel.place(&machine, "project/kernels/gemm");
        let pinned = pinned(&machine, &lock(&[kernel.entry("{ path = \"kernels/gemm\" }")]));
        let outcome = vendor(&machine, &pinned).expect("the kernel");
        is_vendored(&machine, &kernel, &outcome, Source::Directory);
        // Whatever of it changes, the build is to run again.
        let folder = machine.path("project/kernels/gemm");
        assert_eq!(
            outcome.watch,
            ["kernel.so", "kernel_metadata.txt", "definition.json"].map(|name| folder.join(name))
        );
        assert!(files_under(&machine.cache()).is_empty(), "what lies in a folder of the user's is not copied");
    }

    #[test]
    fn is_taken_from_below_the_folder_of_wheels_before_all_else() {
        let (machine, kernel) = (Machine::new(), Kernel::new("gemm"));
        kernel.place(&machine, "wheels/gemm");
        machine.place("project/gemm/kernel.so", "another");
        let folder = machine.path("wheels");
        let machine = machine.with(env::WHEEL_DIR, folder);
        let pinned = pinned(&machine, &lock(&[kernel.entry("{ path = \"gemm\" }")]));
        is_vendored(&machine, &kernel, &vendor(&machine, &pinned).expect("the kernel"), Source::Directory);
    }

    #[test]
    fn is_fetched_by_its_address_once_and_kept() {
        let (machine, kernel) = (Machine::new(), Kernel::new("gemm"));
        let server = kernel.served();
        let pinned = pinned(&machine, &lock(&[kernel.entry(&kernel.url(&server))]));
        let outcome = vendor(&machine, &pinned).expect("the kernel");
        is_vendored(&machine, &kernel, &outcome, Source::Network);
        assert_says(&outcome.told[0], &["the kernel gemm fetched"]);
        assert!(outcome.warnings.is_empty());
        assert!(outcome.watch.is_empty());
        let asked = ["kernel.so", "kernel_metadata.txt", "definition.json"].map(|name| format!("/kernels/gemm/{name}"));
        assert_eq!(server.paths(), asked);
        let outcome = vendor(&machine, &pinned).expect("the kernel");
        is_vendored(&machine, &kernel, &outcome, Source::Cache);
        assert_eq!(server.requests().len(), 3);
        let kept = Store::new(machine.cache()).member_path(&sha256(kernel.file("kernel.so")), "gemm.kernel.so");
        assert_eq!(fs::read(kept).expect("the kept library"), kernel.file("kernel.so"));
    }

    #[test]
    fn is_fetched_once_by_four_builds_that_start_together() {
        let (machine, kernel) = (Machine::new(), Kernel::new("gemm"));
        let server = kernel.served();
        let pinned = pinned(&machine, &lock(&[kernel.entry(&kernel.url(&server))]));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| vendor(&machine, &pinned).map(drop).expect("the kernel"));
            }
        });
        assert_eq!(server.requests().len(), kernel.files.len());
        assert_eq!(files_under(&machine.lib_dir()), ["gemm.kernel.so"]);
    }

    #[test]
    fn is_fetched_from_the_next_address_where_the_first_has_it_not() {
        let (machine, kernel) = (Machine::new(), Kernel::new("gemm"));
        let (empty, server) = (Server::start(), kernel.served());
        let sources = format!("{}, {}", kernel.url(&empty), kernel.url(&server));
        let pinned = pinned(&machine, &lock(&[kernel.entry(&sources)]));
        is_vendored(&machine, &kernel, &vendor(&machine, &pinned).expect("the kernel"), Source::Network);
        assert_eq!(empty.requests().len(), 1);
    }

    #[test]
    fn keeps_what_stands_behind_the_folder_in_its_address() {
        let found = kernels::file_address("https://example.invalid/a/?token=1", Part::Library).expect("an address");
        assert_eq!(found, "https://example.invalid/a/kernel.so?token=1");
        let found = kernels::file_address("https://example.invalid/a", Part::Metadata).expect("an address");
        assert_eq!(found, "https://example.invalid/a/kernel_metadata.txt");
    }

    #[test]
    fn is_fetched_from_the_mirror_alone_where_one_is_set() {
        let (machine, kernel) = (Machine::new(), Kernel::new("gemm"));
        let (original, mirror) = (kernel.served(), Server::start());
        let machine = machine.with(env::MIRROR, mirror.url("/mirror"));
        let text = lock(&[kernel.entry(&kernel.url(&original))]);
        refused(&machine, &text, &["/mirror/kernels/gemm/kernel.so", "404"]);
        for (name, bytes) in &kernel.files {
            mirror.on(&format!("/mirror/kernels/gemm/{name}"), [Reply::ok(bytes.clone())]);
        }
        let pinned = pinned(&machine, &text);
        is_vendored(&machine, &kernel, &vendor(&machine, &pinned).expect("the kernel"), Source::Network);
        assert!(original.requests().is_empty());
    }

    #[test]
    fn is_not_fetched_where_the_network_is_forbidden() {
        let kernel = Kernel::new("gemm");
        for name in [env::OFFLINE, env::CARGO_OFFLINE] {
            let (machine, server) = (Machine::new().with(name, "true"), kernel.served());
            let text = lock(&[kernel.entry(&kernel.url(&server))]);
            let cache = machine.cache().display().to_string();
            let parts = ["was found nowhere", "not the network, since", name, &cache, env::WHEEL_DIR, "kernels.lock"];
            refused(&machine, &text, &parts);
            assert!(server.requests().is_empty());
            // What was kept serves.
            for (file, bytes) in &kernel.files {
                let soname = if *file == "kernel.so" { "gemm.kernel.so" } else { file };
                machine.place(Store::new(machine.cache()).member_path(&sha256(bytes), soname), bytes);
            }
            let pinned = pinned(&machine, &text);
            is_vendored(&machine, &kernel, &vendor(&machine, &pinned).expect("the kernel"), Source::Cache);
        }
    }

    #[test]
    fn of_another_digest_in_a_folder_is_refused_with_both_digests_and_the_remedy() {
        for file in ["kernel.so", "kernel_metadata.txt", "definition.json"] {
            let (machine, kernel) = (Machine::new(), Kernel::new("gemm"));
            kernel.place(&machine, "project/gemm");
            let path = machine.place(Path::new("project/gemm").join(file), "another");
            let text = lock(&[kernel.entry("{ path = \"gemm\" }")]);
            let (found, expected) = (sha256(b"another").to_string(), sha256(kernel.file(file)).to_string());
            let pinned = pinned(&machine, &text);
            let fault = vendor(&machine, &pinned).err().expect("no kernel").to_string();
            let remedy = "cargo xtask kernel add --replace";
            assert_says(fault, &["gemm", &path.display().to_string(), &found, &expected, "kernels.lock", remedy]);
            // A library that was good already has its name only with its digest.
            assert!(files_under(&machine.lib_dir()).is_empty());
        }
    }

    #[test]
    fn of_another_digest_at_an_address_is_refused_and_leaves_nothing() {
        let (machine, kernel) = (Machine::new(), Kernel::new("gemm"));
        let server = kernel.served();
        let other: Vec<u8> = kernel.file("kernel.so").iter().map(|byte| byte ^ 1).collect();
        server.on("/kernels/gemm/kernel.so", [Reply::ok(other)]);
        let text = lock(&[kernel.entry(&kernel.url(&server))]);
        refused(&machine, &text, &["the kernel gemm", "kernels.lock", "has sha256", "--replace"]);
        assert!(files_under(&machine.cache()).is_empty());
    }

    #[test]
    fn that_goes_on_after_its_size_is_refused() {
        let (machine, kernel) = (Machine::new(), Kernel::new("gemm"));
        let server = kernel.served();
        let long = [kernel.file("kernel.so"), b"and more"].concat();
        server.on("/kernels/gemm/kernel.so", [Reply::ok(long).without_length()]);
        refused(&machine, &lock(&[kernel.entry(&kernel.url(&server))]), &["goes on after", "not the pinned file"]);
        assert!(files_under(&machine.cache()).is_empty());
    }

    #[test]
    fn that_lies_nowhere_is_refused_with_every_place_and_the_remedy() {
        let machine = Machine::new();
        let server = Server::start();
        let kernel = Kernel::new("gemm");
        let sources = format!("{{ path = \"here\" }}, {}", kernel.url(&server));
        let text = lock(&[kernel.entry(&sources)]);
        let folder = machine.path("project/here").display().to_string();
        let digest = sha256(kernel.file("kernel.so")).to_string();
        let cache = machine.cache().display().to_string();
        let parts = [
            "the kernel gemm",
            &digest,
            "kernels.lock",
            &folder,
            &cache,
            "answered 404",
            env::WHEEL_DIR,
            "Remedy",
            "remove",
        ];
        refused(&machine, &text, &parts);
    }

    #[test]
    fn whose_folder_lacks_a_file_is_refused_by_that_file() {
        let (machine, kernel) = (Machine::new(), Kernel::new("gemm"));
        machine.place("project/gemm/kernel.so", kernel.file("kernel.so"));
        let text = lock(&[kernel.entry("{ path = \"gemm\" }")]);
        let path = machine.path("project/gemm/kernel_metadata.txt").display().to_string();
        refused(&machine, &text, &[&path, "is not there", "restore it"]);
    }

    #[test]
    fn that_git_lfs_keeps_elsewhere_is_refused_with_how_to_get_it() {
        let (machine, kernel) = (Machine::new(), Kernel::new("gemm"));
        kernel.place(&machine, "project/gemm");
        machine.place("project/gemm/kernel.so", "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n");
        refused(&machine, &lock(&[kernel.entry("{ path = \"gemm\" }")]), &["Git LFS pointer", "git lfs pull"]);
    }

    /// Opening it would wait for somebody who writes.
    #[test]
    fn whose_file_is_a_folder_or_a_pipe_is_refused() {
        let (machine, kernel) = (Machine::new(), Kernel::new("gemm"));
        let text = lock(&[kernel.entry("{ path = \"gemm\" }")]);
        fs::create_dir_all(machine.path("project/gemm/kernel.so")).expect("the folder");
        refused(&machine, &text, &["is no file"]);
        fs::remove_dir(machine.path("project/gemm/kernel.so")).expect("gone");
        let made = std::process::Command::new("mkfifo").arg(machine.path("project/gemm/kernel.so")).status();
        assert!(made.expect("mkfifo").success());
        refused(&machine, &text, &["is no file"]);
    }

    #[test]
    fn whose_kept_file_was_changed_is_fetched_again() {
        let (machine, kernel) = (Machine::new(), Kernel::new("gemm"));
        let server = kernel.served();
        let pinned = pinned(&machine, &lock(&[kernel.entry(&kernel.url(&server))]));
        vendor(&machine, &pinned).expect("the kernel");
        let kept = Store::new(machine.cache()).member_path(&sha256(kernel.file("kernel.so")), "gemm.kernel.so");
        fs::write(&kept, "planted").expect("other bytes");
        is_vendored(&machine, &kernel, &vendor(&machine, &pinned).expect("the kernel"), Source::Network);
        assert_eq!(server.requests().len(), 4, "the library alone was fetched again");
        assert_eq!(fs::read(&kept).expect("the kept library"), kernel.file("kernel.so"));
    }

    #[test]
    fn for_another_target_is_left_out_with_the_reason() {
        let (machine, kernel) = (Machine::new(), Kernel::new("gemm"));
        let text = lock(&[kernel.entry("{ path = \"gemm\" }").replace(TARGET, "aarch64-linux")]);
        let pinned = pinned(&machine, &text);
        let outcome = vendor(&machine, &pinned).expect("nothing to do");
        assert!(outcome.rows.is_empty());
        let [missing] = outcome.missing.as_slice() else { panic!("{:?}", outcome.missing) };
        assert_says(missing, &["kernels.lock pins the kernel gemm for aarch64-linux", TARGET]);
        // It goes into the program.
        assert!(!missing.contains(&machine.path("").display().to_string()), "{missing}");
    }

    #[test]
    fn of_another_release_of_cuda_is_taken_with_a_word_on_it() {
        let (machine, kernel) = (Machine::new(), Kernel::new("gemm"));
        kernel.place(&machine, "project/gemm");
        let text = lock(&[kernel.entry("{ path = \"gemm\" }").replace("libcudart.so.13", "libcudart.so.12")]);
        let pinned = pinned(&machine, &text);
        let outcome = vendor(&machine, &pinned).expect("the kernel");
        assert_says(&outcome.warnings[0], &["gemm", "libcudart.so.12", "dynamic linker"]);
    }

    #[test]
    fn whose_text_is_no_text_is_refused() {
        let (machine, mut kernel) = (Machine::new(), Kernel::new("gemm"));
        kernel.files[2].1 = vec![0xff, 0xfe];
        kernel.place(&machine, "project/gemm");
        let pinned = pinned(&machine, &lock(&[kernel.entry("{ path = \"gemm\" }")]));
        let fault = vendor(&machine, &pinned).err().expect("no kernel").to_string();
        assert_says(fault, &["definition.json", "not UTF-8"]);
    }
}

mod the_table {
    use super::*;

    /// The table of two kernels whose names are one name to a linker.
    fn table(machine: &Machine, embed: bool) -> String {
        let kernels = ["gemm-a", "gemm_a"].map(Kernel::new);
        for kernel in &kernels {
            kernel.place(machine, &format!("project/{}", kernel.name));
        }
        let entries = kernels.map(|kernel| kernel.entry(&format!("{{ path = {:?} }}", kernel.name)));
        let pinned = pinned(machine, &lock(&entries));
        let outcome = vendor(machine, &pinned).expect("the kernels");
        kernels::table(&machine.path("out"), &outcome.rows, &["elsewhere".to_owned()], embed).expect("the table");
        fs::read_to_string(machine.path("out/pinned.rs")).expect("the table")
    }

    #[test]
    fn says_all_of_a_kernel_and_where_it_is() {
        let machine = Machine::new();
        let lib = machine.lib_dir().join("gemm-a.kernel.so").display().to_string();
        let digest = format!("sha256: Digest({:?})", sha256(Kernel::new("gemm-a").file("kernel.so")).0);
        let parts = [
            "PinnedKernel { name: \"gemm-a\", definition: \"gemm_n16\", solution: Some(\"by_hand\"), author: Some(\"me\"), \
             entry: \"run\", destination_passing_style: Some(true), architectures: &[\"sm_90a\", \"compute_100\"], cuda: \
             Some(13), needed: &[\"libtvm_ffi.so\", \"libcudart.so.13\"], metadata: ",
            "metadata: \"Entry Symbol: run\\nDefinition: gemm_n16\\nSolution: by_hand\\n\"",
            "definition_json: Some(\"{\\\"name\\\": \\\"gemm_n16\\\"}\"), solution_json: None",
            &digest,
            &format!("built_at: {lib:?}"),
            "embedded: None",
            "ELSEWHERE: &[&str] = &[\"elsewhere\"];",
        ];
        assert_says(table(&machine, false), &parts);
    }

    #[test]
    fn has_the_libraries_and_no_path_of_this_machine_where_they_are_embedded() {
        let machine = Machine::new();
        let text = table(&machine, true);
        assert_says(&text, &["flashinfer_rs_embedded_kernel_0", "flashinfer_rs_embedded_kernel_1", ".incbin"]);
        assert_eq!(text.matches("built_at: \"\", built_below: \"\"").count(), 2, "{text}");
        assert_eq!(text.matches(".incbin").count(), 2, "{text}");
    }
}
