//! The build script itself, started as cargo starts it, in projects of every shape: what it finds, what it tells cargo, what it
//! writes and what it does not. Its package is one of these tests' own, with small wheels. No network beyond loopback.
#![cfg(target_os = "linux")]

#[path = "../build/mod.rs"]
mod vendoring;

mod support {
    pub mod http;
    pub mod machine;
    pub mod wheels;
}

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use support::http::{Reply, Server};
use support::machine::{assert_says, files_under};
use support::wheels::{self, CUDART, GDN, NORM, Pin, Wheel};
use tempfile::TempDir;
use vendoring::env;

/// Whatever takes longer waits for somebody.
const DEADLINE: Duration = Duration::from_secs(60);
/// Where cargo has a build script's output, below the target folder.
const OUT: &str = "debug/build/flashinfer-rs-0123456789abcdef/out";

/// The build script that cargo compiled for these tests, which is the newest.
fn build_script() -> PathBuf {
    let folders = Path::new(env!("OUT_DIR")).ancestors().nth(2).expect("the folder of build scripts");
    let entries = fs::read_dir(folders).expect("the folders").flatten().map(|entry| entry.path());
    let scripts =
        entries.filter(|folder| folder.file_name().is_some_and(|name| name.as_bytes().starts_with(b"flashinfer-rs-")));
    let scripts = scripts.map(|folder| folder.join("build-script-build")).filter(|script| script.is_file());
    scripts
        .max_by_key(|script| fs::metadata(script).and_then(|it| it.modified()).expect("a time"))
        .expect("a build script")
}

/// A user's project that depends on the package.
struct Project {
    temp: TempDir,
    out_dir: PathBuf,
    variables: Vec<(OsString, OsString)>,
}

/// What a build script left.
struct Built {
    succeeded: bool,
    /// To cargo.
    instructions: String,
    /// To people.
    said: String,
}

impl Built {
    #[track_caller]
    fn good(self) -> Self {
        assert!(self.succeeded, "{}", self.said);
        self
    }

    /// What it says of why it failed.
    #[track_caller]
    fn fault(self) -> String {
        assert!(!self.succeeded, "{}\n{}", self.instructions, self.said);
        self.said
    }

    fn warnings(&self) -> String {
        let warnings = self.instructions.lines().filter_map(|line| line.strip_prefix("cargo::warning="));
        warnings.collect::<Vec<_>>().join("\n")
    }

    fn watched(&self) -> Vec<&str> {
        self.instructions.lines().filter_map(|line| line.strip_prefix("cargo::rerun-if-changed=")).collect()
    }
}

impl Project {
    /// Beside its manifest lies the target folder.
    fn new<'a>(pins: impl IntoIterator<Item = &'a Pin>) -> Self {
        Self::building_in(&format!("project/target/{OUT}"), pins)
    }

    /// With OUT_DIR there.
    fn building_in<'a>(out_dir: &str, pins: impl IntoIterator<Item = &'a Pin>) -> Self {
        let temp = tempfile::tempdir().expect("a temporary folder");
        let project = Self { out_dir: temp.path().join(out_dir), temp, variables: Vec::new() };
        fs::create_dir_all(&project.out_dir).expect("the folder");
        project.place("project/Cargo.toml", "[package]\nname = \"app\"\n");
        project.place("project/Cargo.lock", "version = 4\n");
        project.place("package/artifacts.lock", wheels::lock_text(pins));
        project.place("package/build.rs", "");
        for folder in ["build", "src/kernels", "src/reference"] {
            fs::create_dir_all(project.path("package").join(folder)).expect("the folder");
        }
        let cache = project.path("cache");
        project.with(env::CACHE_DIR, cache)
    }

    fn path(&self, relative: &str) -> PathBuf {
        self.temp.path().join(relative)
    }

    fn place(&self, relative: impl AsRef<Path>, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.temp.path().join(relative);
        fs::create_dir_all(path.parent().expect("a folder")).expect("the folder");
        fs::write(&path, bytes).expect("the file");
        path
    }

    fn with(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.variables.push((name.into(), value.into()));
        self
    }

    /// Runs the build script as cargo does, in the package's folder, with these features.
    #[track_caller]
    fn build(&self, features: &[&str]) -> Built {
        let mut command = Command::new(build_script());
        command.env_clear().current_dir(self.path("package")).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.env("CARGO_MANIFEST_DIR", self.path("package")).env("OUT_DIR", &self.out_dir);
        let (arch, os) = wheels::TARGET.split_once('-').expect("a target");
        command.env("CARGO_CFG_TARGET_ARCH", arch).env("CARGO_CFG_TARGET_OS", os).env("CARGO_CFG_TARGET_ENV", "gnu");
        command.envs(features.iter().map(|name| (format!("CARGO_FEATURE_{name}"), "1")));
        // Whoever runs these tests was in another folder than the project's user.
        command
            .env("PWD", self.path("project"))
            .env("HOME", self.path("home"))
            .env("PIP_CONFIG_FILE", "/dev/null")
            .env("UV_NO_CONFIG", "1");
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        let mut child = command.spawn().expect("the build script");
        let reader = |mut pipe: Box<dyn Read + Send>| {
            std::thread::spawn(move || {
                let mut text = Vec::new();
                pipe.read_to_end(&mut text).expect("what it writes");
                String::from_utf8(text).expect("UTF-8")
            })
        };
        let instructions = reader(Box::new(child.stdout.take().expect("a pipe")));
        let said = reader(Box::new(child.stderr.take().expect("a pipe")));
        let started = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().expect("its state") {
                break status;
            }
            if started.elapsed() > DEADLINE {
                child.kill().expect("its end");
                panic!("the build script waits: {}", said.join().expect("what it said"));
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let text = |reader: std::thread::JoinHandle<String>| reader.join().expect("what it wrote");
        Built { succeeded: status.success(), instructions: text(instructions), said: text(said) }
    }

    fn table(&self) -> String {
        fs::read_to_string(self.out_dir.join("vendored.rs")).expect("the table")
    }

    fn library(&self, soname: &str) -> Vec<u8> {
        fs::read(self.out_dir.join("lib").join(soname)).expect("the library")
    }
}

/// Both kernels, and CUDA's runtime.
const KERNELS: &[&str] = &["NORM", "GDN_PREFILL"];
const RUNTIME: &[&str] = &["CUDART"];

fn kernels() -> (Wheel, Pin) {
    let wheel = Wheel::jit_cache();
    let pin = wheel.pin().url("http://127.0.0.1:1/kernels.whl");
    (wheel, pin)
}

/// CUDA's runtime, which a build can do without, from this address, whose members can be fetched alone.
fn runtime(url: String) -> (Wheel, Pin) {
    let wheel = Wheel::cudart();
    let mut pin = wheel.pin_with_places().url(url);
    pin.optional = true;
    (wheel, pin)
}

/// A server that has CUDA's runtime.
fn serving_the_runtime() -> (Server, Wheel, Pin) {
    let server = Server::start();
    let (wheel, pin) = runtime(server.url("/runtime.whl"));
    server.on("/runtime.whl", [Reply::ok(wheel.bytes()).with_ranges()]);
    (server, wheel, pin)
}

fn mkfifo(path: &Path) {
    fs::create_dir_all(path.parent().expect("a folder")).expect("the folder");
    assert!(Command::new("mkfifo").arg(path).status().expect("mkfifo").success());
}

mod the_workspace {
    use super::*;

    /// By where its target folder lies in it.
    #[test]
    fn is_found_whatever_lies_between_it_and_the_output() {
        for (target, marked) in [
            ("target", None),
            ("target", Some("target")),
            ("target/x86_64-unknown-linux-gnu", Some("target")),
            // rust-analyzer's own, which cargo marks.
            ("target/rust-analyzer", Some("target/rust-analyzer")),
            ("build/elsewhere/deep/target", None),
        ] {
            let (wheel, pin) = kernels();
            let project = Project::building_in(&format!("project/{target}/{OUT}"), [&pin]);
            if let Some(marked) = marked {
                project.place(format!("project/{marked}/CACHEDIR.TAG"), "Signature: 8a477f597d28d172789f06886806bc55");
            }
            project.place(Path::new("project").join(wheel.file()), wheel.bytes());
            let built = project.with(env::OFFLINE, "1");
            assert_says(built.build(KERNELS).good().said, &["norm.so of flashinfer_jit_cache 0.6.3+cu130 (directory)"]);
            assert_eq!(built.library("norm.so"), wheel.member(NORM), "{target}");
        }
    }

    /// Whoever's file that is: another project's, or one in a folder for temporary files that everybody may write.
    #[test]
    fn is_no_folder_that_merely_holds_the_target_folder() {
        let (wheel, pin) = kernels();
        let project = Project::building_in(&format!("tmp/target/{OUT}"), [&pin]).with(env::OFFLINE, "1");
        project.place("tmp/target/CACHEDIR.TAG", "Signature: 8a477f597d28d172789f06886806bc55");
        let planted = project.place(Path::new("tmp").join(wheel.file()), wheel.clone().rebuilt().bytes());
        let fault = project.build(KERNELS).fault();
        assert!(!fault.contains(&planted.display().to_string()), "{fault}");
        assert_says(
            fault,
            &[
                "your workspace's folder (not known",
                "FLASHINFER_RS_WHEEL_DIR = { value = \"wheels\", relative = true }",
                ".cargo/config.toml",
            ],
        );
    }
}

mod a_relative_path {
    use super::*;

    const VARIABLES: [&str; 5] =
        [env::JIT_CACHE_WHEEL, env::TVMFFI_WHEEL, env::CUDART_WHEEL, env::WHEEL_DIR, env::CACHE_DIR];

    #[test]
    fn of_any_variable_is_refused_with_the_full_one_that_was_meant() {
        let tvm_ffi = Wheel { distribution: "apache_tvm_ffi", version: "0.1.3", ..Wheel::cudart() };
        for name in VARIABLES {
            let pins = [Wheel::jit_cache(), tvm_ffi.clone(), Wheel::cudart()]
                .map(|wheel| wheel.pin().url("http://127.0.0.1:1/"));
            let concerned = match name {
                env::TVMFFI_WHEEL => 1,
                env::CUDART_WHEEL => 2,
                _ => 0,
            };
            let project = Project::new([&pins[concerned]]).with(env::OFFLINE, "1").with(name, "./wheels/a.whl");
            // What lies there in the package's own folder is not what the user meant.
            project.place("package/wheels/a.whl", "");
            let before = files_under(&project.path("package"));
            let fault = project.build(&["NORM", "CUDART"]).fault();
            let meant = format!("did you mean {}?", project.path("project/wheels/a.whl").display());
            let setting = format!("{name} = {{ value = \"wheels/a.whl\", relative = true }}");
            assert_says(fault, &[&format!("{name}=./wheels/a.whl is not an absolute path"), &meant, &setting]);
            assert_eq!(files_under(&project.path("package")), before, "{name}");
        }
    }

    #[test]
    fn of_the_cache_makes_no_folder_in_the_package() {
        let (_server, _, pin) = serving_the_runtime();
        let project = Project::new([&pin]).with(env::CACHE_DIR, ".cache");
        let before: Vec<_> = fs::read_dir(project.path("package")).expect("it").flatten().map(|e| e.path()).collect();
        assert_says(project.build(RUNTIME).fault(), &["FLASHINFER_RS_CACHE_DIR=.cache is not an absolute path"]);
        let after: Vec<_> = fs::read_dir(project.path("package")).expect("it").flatten().map(|e| e.path()).collect();
        assert_eq!(after, before);
        // Nor does one of the system's, which is no fault of this crate's user.
        let project =
            Project::new([&pin]).with(env::CACHE_DIR, "").with("HOME", "home").with("XDG_CACHE_HOME", "cache");
        project.build(RUNTIME).good();
        let after = fs::read_dir(project.path("package")).expect("it").flatten().map(|e| e.file_name());
        assert_eq!(after.collect::<Vec<_>>().len(), before.len());
    }

    /// A shell expands it, and a setting in quotes does not.
    #[test]
    fn from_home_on_is_refused_with_the_full_one() {
        let (_, pin) = kernels();
        let project = Project::new([&pin]).with(env::WHEEL_DIR, "~/wheels");
        let meant = format!("did you mean {}?", project.path("home/wheels").display());
        assert_says(project.build(KERNELS).fault(), &["FLASHINFER_RS_WHEEL_DIR=~/wheels", &meant]);
    }
}

mod a_folder_of_cargos {
    use super::*;

    #[test]
    fn that_is_not_utf_8_is_refused_and_nothing_is_written_elsewhere() {
        let (_, pin) = kernels();
        for name in [&b"out-\xff"[..], b"out-\n"] {
            let mut project = Project::new([&pin]).with(env::SKIP_VENDOR, "1");
            project.out_dir = project.path("").join(OsStr::from_bytes(name));
            fs::create_dir(&project.out_dir).expect("the folder");
            let before = files_under(&project.path("package"));
            assert_says(project.build(KERNELS).fault(), &["OUT_DIR=", "is not an absolute path of UTF-8"]);
            assert_eq!(files_under(&project.path("package")), before);
        }
    }

    #[test]
    fn that_is_not_named_is_refused() {
        let (_, pin) = kernels();
        let mut project = Project::new([&pin]).with(env::SKIP_VENDOR, "1");
        project.out_dir = PathBuf::new();
        let before = files_under(&project.path("package"));
        assert_says(project.build(KERNELS).fault(), &["OUT_DIR is not set"]);
        assert_eq!(files_under(&project.path("package")), before);
    }
}

mod a_pipe {
    use super::*;

    #[test]
    fn in_a_wheels_place_is_refused_at_once() {
        let (wheel, pin) = kernels();
        let file = wheel.file();
        for (variable, place) in [
            (env::JIT_CACHE_WHEEL, "given.whl".to_owned()),
            (env::WHEEL_DIR, format!("wheels/{file}")),
            ("", format!("project/{file}")),
        ] {
            let mut project = Project::new([&pin]).with(env::OFFLINE, "1");
            let path = project.path(&place);
            mkfifo(&path);
            if !variable.is_empty() {
                let named = if variable == env::WHEEL_DIR { project.path("wheels") } else { path.clone() };
                project = project.with(variable, named);
            }
            assert_says(project.build(KERNELS).fault(), &[&path.display().to_string(), "not a file", "a pipe"]);
        }
    }

    #[test]
    fn in_a_folder_of_pips_is_refused_at_once() {
        let wheel = Wheel::jit_cache();
        let pin = wheel.pin().purl("pkg:pypi/flashinfer-jit-cache@0.6.3");
        let project = Project::new([&pin]).with("PIP_NO_INDEX", "1");
        let links = project.path("links");
        mkfifo(&links.join(wheel.file()));
        let fault = project.with("PIP_FIND_LINKS", links.clone()).build(KERNELS).fault();
        assert_says(fault, &[&links.join(wheel.file()).display().to_string(), "a pipe"]);
    }

    #[test]
    fn in_a_locks_place_is_refused_at_once() {
        let wheel = Wheel::jit_cache();
        let server = Server::start();
        server.on("/kernels.whl", [Reply::ok(wheel.bytes())]);
        let pin = wheel.pin().url(server.url("/kernels.whl"));
        let project = Project::new([&pin]);
        mkfifo(&project.path("cache/wheels").join(&pin.sha256).join(".lock"));
        assert_says(project.build(KERNELS).fault(), &["cache folder", "a pipe", env::CACHE_DIR]);
    }

    #[test]
    fn in_the_cache_is_passed_over() {
        let (server, wheel, pin) = serving_the_runtime();
        let project = Project::new([&pin]);
        let member = pin.members[0].sha256.clone().expect("its digest");
        mkfifo(&project.path("cache/members").join(member).join("libcudart.so.13"));
        mkfifo(&project.path("cache/wheels").join(&pin.sha256).join(&pin.file));
        project.build(RUNTIME).good();
        assert_eq!(project.library("libcudart.so.13"), wheel.member(CUDART));
        assert!(!server.requests().is_empty());
    }
}

mod without_the_runtime_of_cuda {
    use super::*;

    /// What a build without it says to the program.
    fn missing(table: &str) -> &str {
        let (_, behind) = table.split_once("MISSING: &[(&[&str], &str)] = &[").expect("the table");
        behind.split_once("];").expect("its end").0
    }

    #[test]
    fn a_build_watches_for_it_where_it_looked() {
        let server = Server::start();
        let (wheel, pin) = runtime(server.url("/gone.whl"));
        let project = Project::new([&pin]);
        let folder = project.path("wheels");
        let project = project.with(env::WHEEL_DIR, &folder);
        let built = project.build(RUNTIME).good();
        assert_says(built.warnings(), &["libcudart.so.13", "goes on", "answered 404"]);
        // A file that is not there would make cargo run the build each time.
        assert!(built.watched().iter().all(|path| Path::new(path).exists()), "{:?}", built.watched());
        let absent = project.out_dir.join("absent");
        assert!(built.watched().contains(&absent.to_str().expect("UTF-8")), "{:?}", built.watched());
        let links: Vec<PathBuf> = fs::read_dir(&absent)
            .expect("the links")
            .map(|link| fs::read_link(link.expect("one").path()).expect("it"))
            .collect();
        let member = pin.members[0].sha256.clone().expect("its digest");
        for path in [
            folder.join(wheel.file()),
            project.path("project").join(wheel.file()),
            project.path("cache/wheels").join(&pin.sha256).join(wheel.file()),
            project.path("cache/members").join(member).join("libcudart.so.13"),
        ] {
            assert!(links.contains(&path), "{} is not among {links:?}", path.display());
        }
        // Older than any build, so that it is not what changed.
        let modified = fs::metadata(&absent).and_then(|folder| folder.modified()).expect("a time");
        assert!(modified.elapsed().expect("past") > Duration::from_secs(3600 * 24 * 365));

        project.place(folder.join(wheel.file()), wheel.bytes());
        let built = project.build(RUNTIME).good();
        assert!(!absent.exists() && !built.watched().contains(&absent.to_str().expect("UTF-8")));
        assert_eq!(project.library("libcudart.so.13"), wheel.member(CUDART));
        assert!(!project.table().contains("libcudart.so.13\"], "), "{}", project.table());
    }

    /// A program may be handed on, and what is in a path may be a token.
    #[test]
    fn a_program_is_told_why_without_a_place_of_this_machine_or_its_network() {
        let server = Server::start();
        let cases: [(&str, &[(&str, &str)]); 3] = [
            ("fetching it failed", &[]),
            ("the network was not asked, since FLASHINFER_RS_OFFLINE was set", &[(env::OFFLINE, "1")]),
            ("fetching it failed", &[(env::MIRROR, "http://127.0.0.1:1/s3cr3t")]),
        ];
        for (reason, variables) in cases {
            let (_, pin) = runtime(server.url("/s3cr3t/gone.whl"));
            let project = Project::new([&pin]);
            let project = variables.iter().fold(project, |project, (name, value)| project.with(name, *value));
            project.build(&["CUDART", "EMBED"]).good();
            let table = project.table();
            assert_says(
                missing(&table),
                &["libcudart.so.13", reason, "nvidia_cuda_runtime 13.0.96", env::CUDART_WHEEL],
            );
            for place in [project.path("").display().to_string().as_str(), "127.0.0.1", "s3cr3t", "http"] {
                assert!(!table.contains(place), "{place} goes into the program:\n{table}");
            }
        }
    }

    #[test]
    fn a_build_goes_on_where_nothing_can_be_kept_and_the_whole_wheel_would_have_to_be() {
        let server = Server::start();
        let wheel = Wheel::cudart();
        server.on("/runtime.whl", [Reply::ok(wheel.bytes())]);
        let mut pin = wheel.pin().url(server.url("/runtime.whl"));
        pin.optional = true;
        let project = Project::new([&pin]);
        project.place("cache", "a file in the cache's place, which stops root too");
        let built = project.build(RUNTIME).good();
        assert_says(built.warnings(), &["cache folder", env::CACHE_DIR, "goes on", "libcudart.so.13"]);
        assert!(server.requests().is_empty(), "nothing is fetched that cannot be kept");
    }

    #[test]
    fn a_build_goes_on_where_a_proxy_answers_in_its_place() {
        let server = Server::start();
        let (_, pin) = runtime(server.url("/runtime.whl"));
        server.on("/runtime.whl", [Reply::ok("<html>Sign in first</html>").header("Content-Type", "text/html")]);
        let built = Project::new([&pin]).build(RUNTIME).good();
        assert_says(built.warnings(), &[&server.url("/runtime.whl"), "goes on", "libcudart.so.13"]);
    }

    #[test]
    fn a_strict_build_fails() {
        let server = Server::start();
        let (_, pin) = runtime(server.url("/gone.whl"));
        let fault = Project::new([&pin]).with(env::STRICT, "1").build(RUNTIME).fault();
        assert_says(fault, &["FLASHINFER_RS_STRICT is set", "answered 404", env::CUDART_WHEEL]);
    }
}

mod what_cannot_be_kept {
    use super::*;

    #[test]
    fn goes_straight_to_the_output() {
        type Setting = Box<dyn Fn(Project) -> Project>;
        let settings: [(&str, Setting); 4] = [
            (
                "a file in its place",
                Box::new(|project| {
                    project.place("cache", "");
                    project
                }),
            ),
            (
                "a file in the place of HOME",
                Box::new(|project| {
                    project.place("home", "");
                    project.with(env::CACHE_DIR, "")
                }),
            ),
            ("a folder of the kernel's", Box::new(|project| project.with(env::CACHE_DIR, "/proc/sys/flashinfer-rs"))),
            ("no folder", Box::new(|project| project.with(env::CACHE_DIR, "").with("HOME", ""))),
        ];
        for (cache, set) in settings {
            for optional in [false, true] {
                let (server, wheel, mut pin) = serving_the_runtime();
                pin.optional = optional;
                let project = set(Project::new([&pin]));
                let built = project.build(RUNTIME).good();
                assert_eq!(project.library("libcudart.so.13"), wheel.member(CUDART), "{cache}");
                assert_says(built.warnings(), &["is fetched by each build", env::CACHE_DIR]);
                assert!(server.sent() < wheel.bytes().len(), "{cache}: the member alone is fetched");
                let mut left: Vec<_> =
                    fs::read_dir(&project.out_dir).expect("it").flatten().map(|e| e.file_name()).collect();
                left.sort();
                assert_eq!(left, ["kernels.rs", "lib", "pinned.rs", "references.rs", "vendored.rs"], "{cache}");
            }
        }
    }
}

mod what_is_left {
    use super::*;

    /// One wheel from everywhere.
    #[test]
    fn is_the_same_wherever_the_pinned_wheel_was() {
        let (server, wheel, pin) = serving_the_runtime();
        let mut project = Project::new([&pin]);
        let features = ["CUDART", "EMBED"];
        let mut tables = Vec::new();
        for source in ["network", "cache", "directory", "override"] {
            match source {
                "directory" => drop(project.place(Path::new("project").join(wheel.file()), wheel.bytes())),
                "override" => {
                    let path = project.place("given.whl", wheel.bytes());
                    project = project.with(env::CUDART_WHEEL, path);
                }
                _ => {}
            }
            assert_says(project.build(&features).good().said, &[&format!("13.0.96 ({source})")]);
            tables.push(project.table());
        }
        assert!(tables.iter().all(|table| *table == tables[0]), "{tables:#?}");
        assert_says(&tables[0], &["source: Source::Pinned"]);
        assert_eq!(server.requests().len(), 1);
    }

    #[test]
    fn has_the_version_that_a_wheel_gives_itself() {
        let (wheel, pin) = kernels();
        let project = Project::new([&pin]).with(env::ALLOW_VERSION, "1");
        let other = Wheel { version: "0.6.4", ..wheel };
        let path = project.place("given.whl", other.bytes());
        let project = project.with(env::JIT_CACHE_WHEEL, path);
        project.build(KERNELS).good();
        assert_says(project.table(), &["version: \"0.6.4\"", "source: Source::Override"]);
        assert!(!project.table().contains("0.6.3"), "{}", project.table());
    }

    /// A compiler may see the output elsewhere than the build script did.
    #[test]
    fn embeds_libraries_from_wherever_the_output_is_when_it_is_compiled() {
        let (wheel, pin) = kernels();
        // Braces and spaces mean something to others than the file system.
        let project = Project::building_in(&format!("project/a {{b}} c/{OUT}"), [&pin]);
        project.place(Path::new("project").join(wheel.file()), wheel.bytes());
        project.build(&["NORM", "GDN_PREFILL", "EMBED"]).good();
        assert!(!project.table().contains(&project.path("").display().to_string()), "{}", project.table());
        let moved = project.path("moved {it} there");
        fs::rename(&project.out_dir, &moved).expect("another sandbox");
        fs::remove_dir_all(project.path("project")).expect("the first one is gone");
        let main = project.place(
            "main.rs",
            r#"#![allow(dead_code)]
            pub struct Digest([u8; 32]);
            pub enum Source { Pinned, Override, Local }
            pub struct Stored { name: &'static str, sha256: Digest, size: u64, built_at: &'static str,
                built_below: &'static str, embedded: Option<fn() -> *const u8> }
            pub struct Vendored { distribution: &'static str, version: &'static str, wheel_sha256: Digest, source: Source,
                stored: Stored }
            include!(concat!(env!("OUT_DIR"), "/vendored.rs"));
            fn main() {
                use std::io::Write;
                for row in LIBRARIES {
                    let address = row.stored.embedded.expect("in the program")();
                    // SAFETY: that many bytes are there.
                    let bytes = unsafe { std::slice::from_raw_parts(address, row.stored.size as usize) };
                    std::io::stdout().write_all(bytes).expect("a pipe");
                }
            }"#,
        );
        let program = project.path("main");
        let mut rustc = Command::new(std::env::var_os("RUSTC").unwrap_or("rustc".into()));
        let compiled = rustc.args(["--edition", "2024", "-o"]).arg(&program).arg(main).env("OUT_DIR", &moved).output();
        let compiled = compiled.expect("a compiler");
        assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
        let written = Command::new(program).output().expect("the program").stdout;
        assert!(written == [wheel.member(NORM), wheel.member(GDN)].concat());
    }

    /// A program that quotes a path for the assembler reads it otherwise than it is written.
    #[test]
    fn embeds_libraries_out_of_folders_with_quotes_in_their_names() {
        let (wheel, pin) = kernels();
        let project = Project::building_in(&format!("project/a\"b\\c/{OUT}"), [&pin]);
        project.place(Path::new("project").join(wheel.file()), wheel.bytes());
        project.build(&["NORM", "GDN_PREFILL", "EMBED"]).good();
        let table = project.table();
        assert!(!table.contains("env!(\"OUT_DIR\")") && table.contains(r#"a\\\"b\\\\c"#), "{table}");
    }

    #[test]
    fn for_cargo_is_no_file_that_a_line_cannot_name() {
        let (wheel, pin) = kernels();
        for folder in [&b"wheels-\xff"[..], b"wheels\ncargo::rustc-env=PLANTED=1\n"] {
            let project = Project::new([&pin]);
            let folder = project.path("").join(OsStr::from_bytes(folder));
            project.place(folder.join(wheel.file()), wheel.bytes());
            let project = project.with(env::WHEEL_DIR, folder);
            let built = project.build(KERNELS).good();
            assert!(!built.instructions.contains('\u{fffd}'), "{}", built.instructions);
            let planted = built.instructions.lines().find(|line| line.starts_with("cargo::rustc-env"));
            assert_eq!(planted, None);
            assert!(built.watched().iter().all(|path| Path::new(path).exists()), "{:?}", built.watched());
        }
    }

    /// A warning is shown again by every later build.
    #[test]
    fn for_people_is_what_was_fetched_and_no_warning() {
        let (_server, _, pin) = serving_the_runtime();
        let built = Project::new([&pin]).build(RUNTIME).good();
        assert_eq!(built.warnings(), "");
        assert_says(built.said, &["libcudart.so.13 of", "fetched", "kept in"]);
    }
}

/// The thing first, then what to do, then each place once, in a line of its own.
#[test]
fn a_wheel_that_is_nowhere_is_a_remedy_and_a_list_of_places() {
    let (wheel, pin) = kernels();
    let project = Project::new([&pin]).with(env::OFFLINE, "1");
    let wheels = project.path("wheels");
    // As `cargo xtask wheel --out wheels` names it.
    project.place(Path::new("wheels").join("flashinfer_jit_cache-0.6.3+cu130-cp39-abi3-linux_x86_64.whl"), "");
    let project = project.with(env::WHEEL_DIR, &wheels);
    let fault = project.build(KERNELS).fault();
    let lines: Vec<&str> = fault.trim().lines().collect();
    assert!(lines[0].starts_with(&format!("flashinfer-rs: the wheel {} (sha256 ", wheel.file())), "{fault}");
    assert!(
        lines[1]
            .starts_with("Remedy: get it from http://127.0.0.1:1/kernels.whl and set FLASHINFER_RS_JIT_CACHE_WHEEL")
    );
    assert_says(lines[1], &[&project.path("project").display().to_string(), env::WHEEL_DIR, env::SKIP_VENDOR]);
    assert_eq!(lines[2], "Looked at:");
    let places = &lines[3..];
    assert_eq!(places[0], "  FLASHINFER_RS_JIT_CACHE_WHEEL (not set)");
    let hint = "(has flashinfer_jit_cache-0.6.3+cu130-cp39-abi3-linux_x86_64.whl, which is not the pinned one; \
                FLASHINFER_RS_JIT_CACHE_WHEEL would use it)";
    assert_eq!(places[1], format!("  the folder {} {hint}", wheels.display()));
    assert_eq!(places[2], format!("  the folder {}", project.path("project").display()));
    assert_eq!(places[3], format!("  the cache {}", project.path("cache").display()));
    assert_eq!(places[4..], ["  not the network, since FLASHINFER_RS_OFFLINE is set"]);
}
