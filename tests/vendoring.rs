//! The vendoring ladder as a specification: what the lock may say, where a wheel comes from, what is refused and what
//! is left behind. No GPU and no network beyond loopback; every test has its own folders, environment and server.

#[path = "../src/attention/uri.rs"]
#[allow(dead_code, reason = "the library reads names")]
mod uri;
#[path = "../build/mod.rs"]
mod vendoring;

mod support {
    pub mod http;
    pub mod machine;
    pub mod wheels;
}

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use support::http::{Refusing, Reply, Server};
use support::machine::{Machine, assert_says, bytes_of, files_under, pages};
use support::wheels::{self, Pin, TARGET, Wheel, sha256};
use uri::{Backend, Element, Shape, Types, Uri};
use vendoring::env;
use vendoring::error::Error;
use vendoring::lock;
use vendoring::source::Source;
use vendoring::vendor::Missing;

/// Where the release host of these tests keeps the file.
fn release(wheel: &Wheel) -> String {
    format!("/release/{}", wheel.file())
}

/// A server that releases the wheel, and the lock's entry that names it.
fn released(wheel: &Wheel) -> (Server, Pin) {
    let server = Server::start();
    server.on(&release(wheel), [Reply::ok(wheel.bytes())]);
    let pin = wheel.pin().url(server.url(&release(wheel)));
    (server, pin)
}

/// A server that gives this answer in the wheel's place, and the lock's entry that names it.
fn answering(reply: Reply) -> (Server, lock::Wheel) {
    let (server, pin) = released(&Wheel::jit_cache());
    server.on(&release(&Wheel::jit_cache()), [reply]);
    (server, pin.parsed())
}

/// An entry whose wheel nobody has: the server knows no such file.
fn nowhere() -> (Server, Pin) {
    let server = Server::start();
    let pin = Wheel::jit_cache().pin().url(server.url("/nowhere"));
    (server, pin)
}

mod a_digest {
    use super::*;
    use std::io::Read;
    use vendoring::digest::{Digest, hash, hash_reader};

    /// Gives a byte more at each reading, and breaks off before each.
    struct Halting<'a> {
        rest: &'a [u8],
        given: usize,
        breaks: Option<io::ErrorKind>,
    }

    impl Read for Halting<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            if let Some(kind) = self.breaks.take() {
                return Err(kind.into());
            }
            self.given += 1;
            self.breaks = Some(io::ErrorKind::Interrupted);
            let n = self.given.min(self.rest.len()).min(buffer.len());
            buffer[..n].copy_from_slice(&self.rest[..n]);
            self.rest = &self.rest[n..];
            Ok(n)
        }
    }

    #[test]
    fn is_shown_as_the_digits_that_it_is_read_from_to_people_and_in_debugging() {
        let text = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let digest: Digest = text.parse().expect("a digest");
        assert_eq!((format!("{digest}"), format!("{digest:?}")), (text.to_owned(), text.to_owned()));
        assert_eq!(hash(b"abc"), digest);
    }

    #[test]
    fn of_a_reader_is_that_of_its_bytes_in_whatever_pieces_they_come() {
        let bytes: Vec<u8> = (0..1000u32).map(|i| (i * 7) as u8).collect();
        let reader = Halting { rest: &bytes, given: 0, breaks: None };
        assert_eq!(hash_reader(reader).expect("its bytes"), (hash(&bytes), 1000));
    }

    #[test]
    fn of_a_reader_that_fails_is_its_error() {
        let reader = Halting { rest: b"abc", given: 0, breaks: Some(io::ErrorKind::ConnectionReset) };
        assert_eq!(hash_reader(reader).expect_err("no bytes").kind(), io::ErrorKind::ConnectionReset);
    }
}

mod the_lock {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use uri::Xqa;
    use vendoring::lock::Lock;

    #[track_caller]
    fn refused(text: &str, fault: &str) {
        let message = Lock::parse(text, "artifacts.lock").expect_err("a bad lock").to_string();
        assert_says(message, &["artifacts.lock", fault]);
    }

    /// That an otherwise good lock is refused once its entry was changed so.
    #[track_caller]
    fn refused_with(change: impl FnOnce(&mut Pin), fault: &str) {
        let mut pin = Wheel::jit_cache().pin().url("https://example.invalid/a.whl");
        wheels::lock([&pin]);
        change(&mut pin);
        refused(&wheels::lock_text([&pin]), fault);
    }

    #[test]
    fn that_is_shipped_pins_four_wheels_for_each_supported_target() {
        let lock = Lock::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("artifacts.lock")).expect("a good lock");
        for target in ["x86_64-linux", "aarch64-linux"] {
            let mut pinned: Vec<&str> = lock.for_target(target).map(|wheel| wheel.distribution.as_str()).collect();
            pinned.sort_unstable();
            assert_eq!(
                pinned,
                ["apache_tvm_ffi", "flashinfer_jit_cache", "nvidia_cublas", "nvidia_cuda_runtime"],
                "{target}"
            );
        }
        assert_eq!(lock.wheels.len(), 8);
    }

    #[test]
    fn that_is_shipped_can_be_overridden_wheel_by_wheel() {
        let lock = Lock::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("artifacts.lock")).expect("a good lock");
        for wheel in &lock.wheels {
            assert!(env::wheel_override(&wheel.distribution).is_some(), "{}", wheel.distribution);
        }
    }

    /// What each feature of attention vendors, and why no more: docs/hermetic.md.
    fn attention() -> Vec<(&'static str, Uri)> {
        let mut all = Vec::new();
        for element in [Element::BF16, Element::F16] {
            let types = Types::all(element);
            let shape =
                |types, head_dim_qk, head_dim_vo| Shape { types, head_dim_qk, head_dim_vo, window: false, cap: false };
            for head_dim in [64, 128, 256] {
                let (plain, fp8) = (shape(types, head_dim, head_dim), Types { kv: Element::E4M3, ..types });
                all.extend(Backend::ALL.map(|backend| ("attention", Uri::BatchPrefill(plain, backend))));
                all.push(("attention", Uri::BatchDecode(plain)));
                let fp8 = shape(fp8, head_dim, head_dim);
                all.push(("attention-fp8-kv", Uri::BatchPrefill(fp8, Backend::Fa2)));
                all.push(("attention-fp8-kv", Uri::BatchDecode(fp8)));
            }
            all.extend(Backend::ALL.map(|backend| ("attention-mla", Uri::Mla { types, backend })));
            all.push(("attention-mla", Uri::BatchPrefill(shape(types, 192, 128), Backend::Fa3)));
            for backend in Backend::ALL {
                all.extend([false, true].map(|window| ("attention-sinks", Uri::Sinks { types, window, backend })));
            }
            for page_size in [16, 64] {
                let xqa = |group| Uri::Xqa(Xqa { types, page_size, head_dim: 128, group, window: false });
                all.extend([1, 2, 4, 8].map(|group| ("attention-xqa", xqa(group))));
            }
        }
        all.sort_unstable();
        all
    }

    #[test]
    fn that_is_shipped_has_the_attention_modules_of_usual_models() {
        let lock = Lock::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("artifacts.lock")).expect("a good lock");
        let expected = attention();
        assert!(expected.iter().all(|(_, uri)| uri.is_released()));
        for target in ["x86_64-linux", "aarch64-linux"] {
            let members = lock.for_target(target).flat_map(|wheel| &wheel.members);
            let modules = members.filter_map(|member| {
                let uri: Uri = vendoring::modules::name(&member.path)?.parse().ok()?;
                assert_eq!(member.soname, uri.soname());
                Some((member.feature.as_deref()?, uri))
            });
            let mut modules: Vec<_> = modules.collect();
            modules.sort_unstable();
            assert_eq!(modules, expected, "{target}");
        }
    }

    #[test]
    fn that_is_shipped_lets_no_feature_fetch_hundreds_of_megabytes_by_ranges() {
        let lock = Lock::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("artifacts.lock")).expect("a good lock");
        for wheel in &lock.wheels {
            let wanted = wheel.wanted(&|_| true);
            let large = |member: &&&lock::Member| member.place().is_some_and(|place| place.length > 16 << 20);
            assert!(!wanted.iter().any(|member| large(&member)), "{}", wheel.file);
            assert_eq!(wanted.is_empty(), wheel.distribution == "nvidia_cublas", "{}", wheel.file);
        }
    }

    #[test]
    fn with_a_member_of_a_feature_and_a_name_is_refused() {
        let pin = Wheel::jit_cache().pin().url("https://example.invalid/a.whl");
        let text = wheels::lock_text([&pin]).replace("feature = \"norm\"", "feature = \"norm\"\nname = \"norm\"");
        refused(&text, "a name and a feature");
    }

    #[derive(serde::Deserialize)]
    struct Manifest {
        features: BTreeMap<String, Vec<String>>,
    }

    #[test]
    fn that_is_shipped_has_members_for_features_that_there_are_and_are_documented() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let read = |path: &str| fs::read_to_string(root.join(path)).expect(path);
        let lock = Lock::parse(&read("artifacts.lock"), "artifacts.lock").expect("a good lock");
        let manifest: Manifest = toml::from_str(&read("Cargo.toml")).expect("a manifest");
        let members = lock.wheels.iter().flat_map(|wheel| &wheel.members);
        let features: BTreeSet<&String> = members.filter_map(|member| member.feature.as_ref()).collect();
        for feature in features {
            assert!(manifest.features.contains_key(feature), "Cargo.toml has no feature {feature}");
            let row = format!("//! | `{feature}` |");
            assert!(read("src/lib.rs").contains(&row), "the crate's documentation has no row of the feature {feature}");
        }
    }

    #[test]
    fn that_is_not_there_is_refused_with_its_path() {
        let path = Machine::new().path("artifacts.lock");
        let fault = Lock::read(&path).expect_err("no such file").to_string();
        assert_says(fault, &[&path.display().to_string(), "check the path"]);
    }

    #[test]
    fn that_is_no_toml_is_refused() {
        refused("version = ", "malformed");
    }

    #[test]
    fn with_an_unknown_key_is_refused() {
        refused("version = 1\nwheel = []\ncolour = \"red\"", "unknown field `colour`");
    }

    #[test]
    fn with_an_unknown_key_of_a_wheel_is_refused() {
        let pin = Wheel::jit_cache().pin().url("https://example.invalid/a.whl");
        let text = wheels::lock_text([&pin]).replace("optional =", "optionnal =");
        refused(&text, "unknown field `optionnal`");
    }

    #[test]
    fn with_an_unknown_kind_of_source_is_refused() {
        let pin = Wheel::jit_cache().pin().url("https://example.invalid/a.whl");
        refused(&wheels::lock_text([&pin]).replace("{ url =", "{ gopher ="), "unknown variant `gopher`");
    }

    #[test]
    fn with_a_value_of_another_kind_is_refused_at_its_line() {
        let pin = Wheel::jit_cache().pin().url("https://example.invalid/a.whl");
        let good = wheels::lock_text([&pin]);
        for (from, to, fault) in [
            ("file = \"", "file = 1 # \"", "`file`: a whole number, expected a text"),
            ("optional = ", "optional = 1 # ", "`optional`: a whole number, expected true or false"),
            ("sources = ", "sources = 1.5 # ", "`sources`: a number, expected an array of tables"),
            ("sources = ", "sources = [1] # ", "a whole number, expected a table"),
            ("\nsize = ", "\nsize = \"1\" # ", "`size`: a text, expected a whole number"),
            ("\nsize = ", "\nsize = -1 # ", "`size`: -1 is out of range, expected 0 to 18446744073709551615"),
            ("version = 1", "version = 4294967297", "expected 0 to 4294967295"),
        ] {
            assert!(good.contains(from), "{good}");
            refused(&good.replacen(from, to, 1), fault);
        }
        let line = good.lines().position(|line| line.starts_with("optional")).expect("the key") + 1;
        refused(&good.replace("optional = ", "optional = 1 # "), &format!("line {line}, column 12: `optional`"));
    }

    #[test]
    fn with_a_source_that_is_none_or_two_is_refused() {
        let pin = Wheel::jit_cache().pin().url("https://example.invalid/a.whl");
        let good = wheels::lock_text([&pin]);
        refused(
            &good.replace("{ url =", "{ index = \"https://b.invalid/\", url ="),
            "2 entries, expected one of `url`",
        );
        refused(&good.replace("{ url = \"https://example.invalid/a.whl\" }", "{}"), "0 entries, expected one of `url`");
        refused(&good.replace("{ url =", "{ gopher = 1, url ="), "unknown variant `gopher`");
    }

    /// There may be a password in it.
    #[test]
    fn that_is_no_toml_is_refused_without_showing_the_line() {
        let text = "version = 1\nurl = https://user:secret@example.invalid/";
        let fault = Lock::parse(text, "artifacts.lock").expect_err("no TOML").to_string();
        assert_says(&fault, &["artifacts.lock is malformed", "line 2"]);
        assert!(!fault.contains("secret"), "{fault}");
    }

    #[test]
    fn of_an_unknown_version_is_refused() {
        refused("version = 2\nwheel = []", "version 2");
    }

    /// What a later version adds is not the fault that counts.
    #[test]
    fn of_a_later_version_with_new_keys_is_refused_for_its_version() {
        refused("version = 2\nwheel = []\nnew = 1", "version 2");
    }

    #[test]
    fn with_a_short_digest_is_refused() {
        refused_with(|pin| pin.sha256.truncate(63), "64 lower-case hexadecimal digits");
    }

    #[test]
    fn with_an_upper_case_digest_is_refused() {
        refused_with(|pin| pin.sha256 = "AB".repeat(32), "64 lower-case hexadecimal digits");
    }

    #[test]
    fn with_a_bad_digest_of_a_member_is_refused() {
        refused_with(|pin| pin.members[0].sha256 = Some("0123".to_owned()), "64 lower-case hexadecimal digits");
    }

    #[test]
    fn with_a_slash_in_a_file_name_is_refused() {
        refused_with(|pin| pin.file = format!("../{}", pin.file), "not a plain file name");
    }

    #[test]
    fn with_dots_for_a_file_name_is_refused() {
        refused_with(|pin| pin.file = "..".to_owned(), "`..` is not a plain file name");
    }

    #[test]
    fn whose_file_name_is_of_another_version_is_refused() {
        refused_with(|pin| pin.version = "0.6.4+cu130".to_owned(), "`flashinfer_jit_cache-0.6.4+cu130-`");
    }

    #[test]
    fn with_a_slash_in_a_soname_is_refused() {
        refused_with(|pin| pin.members[0].soname = "../norm.so".to_owned(), "`../norm.so` is not a plain file name");
    }

    #[test]
    fn with_one_soname_for_two_members_is_refused() {
        refused_with(|pin| pin.members[0].soname = pin.members[1].soname.clone(), "two members with the soname");
    }

    #[test]
    fn that_pins_a_wheel_twice_is_refused() {
        let pin = Wheel::jit_cache().pin().url("https://example.invalid/a.whl");
        refused(&wheels::lock_text([&pin, &pin]), "pins flashinfer_jit_cache twice for x86_64-linux");
        // Of several wheels for one target, as for GPUs of several kinds, one is built with, since their libraries' names are the same.
        let both = wheels::lock_text([&pin, &pin]);
        let (first, second) = both.split_at(both.rfind("[[wheel]]").expect("a wheel"));
        let both = format!("{first}{}", second.replacen("file =", "variant = \"sm80\"\nfile =", 1));
        refused(&both, "both have norm.so for x86_64-linux");
        let renamed = both.replacen("soname = \"norm.so\"", "soname = \"other.so\"", 1);
        let renamed = renamed.replacen("soname = \"gdn_prefill_sm90.so\"", "soname = \"another.so\"", 1);
        let lock = Lock::parse(&renamed, "test.lock").expect("libraries of different names");
        let variables: Vec<_> = lock.wheels.iter().map(|wheel| wheel.variable()).collect();
        assert_eq!(variables, ["FLASHINFER_RS_JIT_CACHE_WHEEL", "FLASHINFER_RS_JIT_CACHE_SM80_WHEEL"]);
        let mut foreign = lock.wheels[0].clone();
        foreign.distribution = "some_kernels".to_owned();
        assert_eq!(foreign.variable(), "FLASHINFER_RS_SOME_KERNELS_WHEEL");
    }

    #[test]
    fn with_a_wheel_without_sources_is_refused() {
        refused(&wheels::lock_text([&Wheel::jit_cache().pin()]), "no source");
    }

    #[test]
    fn with_a_wheel_without_members_is_refused() {
        refused_with(|pin| pin.members.clear(), "no member");
    }
}

mod the_environment {
    use super::*;
    use vendoring::env::Env;

    #[test]
    fn has_switches_that_nothing_zero_false_no_and_off_leave_off() {
        for value in ["", "0", "false", "No", "OFF"] {
            assert!(!Env::fixed([(env::STRICT, value)]).flag(env::STRICT), "`{value}`");
        }
        for value in ["1", "true", "yes"] {
            assert!(Env::fixed([(env::STRICT, value)]).flag(env::STRICT), "`{value}`");
        }
    }

    #[test]
    fn puts_the_cache_into_the_xdg_folder_or_else_into_home() {
        let cache = |pairs: &[(&str, &str)]| Env::fixed(pairs.iter().copied()).cache_dir().expect("full paths");
        assert_eq!(cache(&[("XDG_CACHE_HOME", "/x"), ("HOME", "/h")]), Some("/x/flashinfer-rs".into()));
        assert_eq!(cache(&[("HOME", "/h")]), Some("/h/.cache/flashinfer-rs".into()));
        assert_eq!(cache(&[(env::CACHE_DIR, "/c"), ("HOME", "/h")]), Some("/c".into()));
        assert_eq!(cache(&[]), None);
    }

    #[test]
    fn ignores_a_relative_xdg_folder_as_xdg_demands() {
        let env = Env::fixed([("XDG_CACHE_HOME", "x"), ("HOME", "/h")]);
        assert_eq!(env.cache_dir(), Ok(Some("/h/.cache/flashinfer-rs".into())));
    }

    #[test]
    fn remembers_each_variable_that_was_read_once_for_cargo() {
        let env = Env::fixed([(env::STRICT, "1")]);
        env.flag(env::STRICT);
        env.flag(env::STRICT);
        env.path(env::WHEEL_DIR);
        assert_eq!(env.names_read(), [env::STRICT, env::WHEEL_DIR]);
    }
}

mod the_ladder {
    use super::*;
    use vendoring::local::Record;

    /// Makes a folder a checkout with a recorded local build.
    fn record_local_build(machine: &mut Machine, wheel: &Wheel) -> PathBuf {
        let path = machine.place(Path::new("checkout/dist").join(wheel.file()), wheel.bytes());
        let checkout = machine.path("checkout");
        let record = Record::new(wheel.distribution, TARGET, &path, sha256(&wheel.bytes()));
        record.write(&checkout).expect("the record");
        machine.checkout = Some(checkout);
        path
    }

    #[derive(Clone, Copy, PartialEq, PartialOrd)]
    enum Rung {
        Override,
        Directory,
        Workspace,
        Cache,
        Local,
        Network,
    }

    /// A machine whose every rung from this one down has the wheel.
    fn from_rung(first: Rung) -> (Machine, Server, lock::Wheel) {
        let wheel = Wheel::jit_cache();
        let (server, pin) = released(&wheel);
        let pinned = pin.parsed();
        let mut machine = Machine::new();
        if first <= Rung::Override {
            let path = machine.place("override/any-name.whl", wheel.bytes());
            machine = machine.with(env::JIT_CACHE_WHEEL, path);
        }
        if first <= Rung::Directory {
            machine.place(Path::new("directory").join(wheel.file()), wheel.bytes());
            let folder = machine.path("directory");
            machine = machine.with(env::WHEEL_DIR, folder);
        }
        if first <= Rung::Workspace {
            machine.place(Path::new("workspace").join(wheel.file()), wheel.bytes());
            machine.workspace = Some(machine.path("workspace"));
        }
        if first <= Rung::Cache {
            machine.place(machine.cached(&pinned), wheel.bytes());
        }
        if first <= Rung::Local {
            record_local_build(&mut machine, &wheel.rebuilt());
        }
        (machine, server, pinned)
    }

    #[track_caller]
    fn wins(first: Rung, source: Source, folder: &str) {
        let (machine, server, pinned) = from_rung(first);
        let found = machine.find(&pinned).expect("the wheel");
        assert_eq!(found.source, source);
        assert!(found.path.starts_with(machine.path(folder)), "{}", found.path.display());
        assert_eq!(sha256(&bytes_of(&found)), found.sha256);
        let downloads = usize::from(first == Rung::Network);
        assert_eq!(server.requests().len(), downloads, "requests");
    }

    #[test]
    fn takes_an_override_before_all_else() {
        wins(Rung::Override, Source::Override, "override");
    }

    #[test]
    fn takes_the_wheel_directory_before_the_workspace() {
        wins(Rung::Directory, Source::Directory, "directory");
    }

    #[test]
    fn takes_the_workspace_before_the_cache() {
        wins(Rung::Workspace, Source::Directory, "workspace");
    }

    #[test]
    fn takes_the_cache_before_a_local_build() {
        wins(Rung::Cache, Source::Cache, "cache");
    }

    #[test]
    fn takes_a_local_build_before_the_network() {
        wins(Rung::Local, Source::Local, "checkout");
    }

    #[test]
    fn takes_the_network_last() {
        wins(Rung::Network, Source::Network, "cache");
    }

    #[test]
    fn finds_in_the_cache_what_was_fetched_before() {
        let (machine, server, pinned) = from_rung(Rung::Network);
        machine.find(&pinned).expect("the wheel");
        assert_eq!(machine.find(&pinned).expect("the wheel").source, Source::Cache);
        assert_eq!(server.requests().len(), 1);
    }

    #[test]
    fn goes_on_to_the_workspace_where_the_directory_lacks_the_file() {
        let (machine, _server, pinned) = from_rung(Rung::Workspace);
        let empty = machine.path("empty");
        let machine = machine.with(env::WHEEL_DIR, empty);
        let found = machine.find(&pinned).expect("the wheel");
        assert!(found.path.starts_with(machine.path("workspace")));
    }

    #[test]
    fn tells_the_pinned_bytes_from_a_local_build() {
        let (machine, _server, pinned) = from_rung(Rung::Local);
        let found = machine.find(&pinned).expect("the local build");
        assert!(!found.is_pinned(&pinned));
        assert_eq!(found.sha256, sha256(&Wheel::jit_cache().rebuilt().bytes()));
        let (machine, _server, pinned) = from_rung(Rung::Cache);
        assert!(machine.find(&pinned).expect("the wheel").is_pinned(&pinned));
    }

    #[test]
    fn looks_past_an_override_where_only_the_pinned_bytes_will_do() {
        let (machine, _server, pinned) = from_rung(Rung::Directory);
        let path = machine.place("override.whl", Wheel::jit_cache().rebuilt().bytes());
        let machine = machine.with(env::JIT_CACHE_WHEEL, path);
        let found = machine.find_pinned(&pinned).expect("the pinned wheel");
        assert_eq!((found.source, found.sha256), (Source::Directory, pinned.sha256));
    }

    #[test]
    fn looks_past_a_local_build_where_only_the_pinned_bytes_will_do() {
        let (machine, _server, pinned) = from_rung(Rung::Local);
        let found = machine.find_pinned(&pinned).expect("the pinned wheel");
        assert_eq!((found.source, found.sha256), (Source::Network, pinned.sha256));
    }

    #[test]
    fn refuses_a_local_build_that_changed_since_it_was_recorded() {
        let (_server, pin) = nowhere();
        let mut machine = Machine::new();
        let path = record_local_build(&mut machine, &Wheel::jit_cache());
        fs::write(&path, Wheel::jit_cache().rebuilt().bytes()).expect("other bytes");
        assert_says(machine.fault(&pin.parsed()), &[&path.display().to_string(), "changed", "cargo xtask wheel"]);
    }

    #[test]
    fn passes_over_a_local_build_that_is_gone() {
        let (_server, pin) = nowhere();
        let mut machine = Machine::new();
        let path = record_local_build(&mut machine, &Wheel::jit_cache());
        fs::remove_file(&path).expect("gone");
        assert_says(machine.fault(&pin.parsed()), &[&format!("{} (gone)", path.display()), "/nowhere"]);
    }

    #[test]
    fn passes_over_a_local_build_of_another_wheel() {
        let (_server, pin) = nowhere();
        let mut machine = Machine::new();
        record_local_build(&mut machine, &Wheel::cudart());
        assert_says(machine.fault(&pin.parsed()), &["local build of this checkout", "/nowhere"]);
    }

    #[test]
    fn refuses_a_malformed_record_of_a_local_build() {
        let (_server, pin) = nowhere();
        let mut machine = Machine::new();
        let record = machine.place("checkout/.local/wheel.json", "{}");
        machine.checkout = Some(machine.path("checkout"));
        assert_says(machine.fault(&pin.parsed()), &[&record.display().to_string(), "malformed", "delete it"]);
    }

    #[test]
    fn names_every_place_and_the_remedy_where_the_wheel_is_nowhere() {
        let server = Server::start();
        let pin = Wheel::jit_cache().pin().url(server.url("/gone.whl")).index(server.url("/index/"));
        let pinned = pin.parsed();
        let mut machine = Machine::new();
        let folder = machine.path("directory");
        machine = machine.with(env::WHEEL_DIR, folder.clone());
        machine.workspace = Some(machine.path("workspace"));
        machine.checkout = Some(machine.path("checkout"));
        let fault = machine.find(&pinned).expect_err("nowhere");
        assert!(fault.is_unavailable());
        let text = fault.to_string();
        let at = |what: &str| text.find(what).expect(what);
        assert!(at("Remedy") < at("Looked at"), "what to do comes before where it was looked:\n{text}");
        for place in ["/gone.whl", "/index/", "JIT_CACHE_WHEEL (not set)", "the cache", ".local/wheel.json"] {
            assert_eq!(text.matches(place).count(), 1, "{place} in:\n{text}");
            assert!(
                text.lines().any(|line| line.starts_with("  ") && line.contains(place)),
                "a line of its own:\n{text}"
            );
        }
        assert_says(
            fault.to_string(),
            &[
                &pinned.file,
                &pinned.sha256.to_string(),
                &format!("{} bytes", pin.size.expect("a size")),
                "FLASHINFER_RS_JIT_CACHE_WHEEL (not set)",
                &folder.display().to_string(),
                &machine.path("workspace").display().to_string(),
                &machine.cache().display().to_string(),
                ".local/wheel.json",
                &format!("{} answered 404", server.url("/gone.whl")),
                &format!("{} answered 404", server.url("/index/")),
                "Remedy",
                "set FLASHINFER_RS_JIT_CACHE_WHEEL",
                "FLASHINFER_RS_WHEEL_DIR",
                "FLASHINFER_RS_SKIP_VENDOR",
            ],
        );
    }

    #[test]
    fn looks_nowhere_else_for_a_wheel_of_its_own_distribution() {
        let (_server, pin) = nowhere();
        let machine = Machine::new().with(env::CUDART_WHEEL, "/not/there.whl");
        assert_says(machine.fault(&pin.parsed()), &["FLASHINFER_RS_JIT_CACHE_WHEEL (not set)"]);
    }

    #[test]
    fn says_so_where_there_is_no_folder_for_a_cache() {
        let (server, pin) = nowhere();
        let machine = Machine::new().with(env::CACHE_DIR, "");
        assert_says(machine.fault(&pin.parsed()), &["neither FLASHINFER_RS_CACHE_DIR nor HOME is set"]);
        assert!(server.requests().is_empty());
    }
}

/// A wheel that somebody else may write, between the moment when its digest is known and the one when it is read.
mod a_wheel_that_changes_after_it_was_hashed {
    use super::*;
    use std::io::{BufReader, Write};
    use std::os::unix::fs::MetadataExt;

    use support::wheels::{GDN, NORM};
    use vendoring::local::Record;
    use vendoring::source::Supply;
    use vendoring::wheel::Wheel as Archive;

    /// That what is extracted is what was hashed, though the file that was found is another wheel by then.
    #[track_caller]
    fn makes_no_difference(machine: &Machine, source: Source) {
        let (wheel, pin) = (Wheel::jit_cache(), Wheel::jit_cache().pin().url("https://example.invalid/a.whl"));
        let pinned = pin.parsed();
        let members: Vec<_> = pinned.members.iter().collect();
        let Supply::Wheel(found) = machine.supply(&pinned, &members).expect("the wheel") else { panic!("a wheel") };
        assert_eq!(found.source, source);
        // In place, as whoever holds it open does it; well-formed, as whoever attacks makes it.
        let mut file = fs::File::options().write(true).truncate(true).open(&found.path).expect("the file");
        file.write_all(&wheel.clone().rebuilt().bytes()).expect("another wheel");
        let mut archive = Archive::open(BufReader::new(found.file), "the wheel").expect("the wheel");
        for (member, path) in members.into_iter().zip([NORM, GDN]) {
            let extracted = archive.extract(member, &machine.lib_dir()).expect("the member");
            assert_eq!(fs::read(extracted.path).expect("the library"), wheel.member(path));
        }
    }

    #[test]
    fn in_the_cache_makes_no_difference() {
        let (machine, pin) = (Machine::new(), Wheel::jit_cache().pin().url("https://example.invalid/a.whl"));
        machine.place(machine.cached(&pin.parsed()), Wheel::jit_cache().bytes());
        makes_no_difference(&machine, Source::Cache);
    }

    #[test]
    fn in_a_folder_makes_no_difference() {
        let machine = Machine::new();
        let path = machine.place(Path::new("wheels").join(Wheel::jit_cache().file()), Wheel::jit_cache().bytes());
        makes_no_difference(&machine.with(env::WHEEL_DIR, path.parent().expect("a folder")), Source::Directory);
    }

    #[test]
    fn that_a_variable_names_makes_no_difference() {
        let machine = Machine::new();
        let path = machine.place("given.whl", Wheel::jit_cache().bytes());
        makes_no_difference(&machine.with(env::JIT_CACHE_WHEEL, path), Source::Override);
    }

    #[test]
    fn that_was_built_here_makes_no_difference() {
        let mut machine = Machine::new();
        let wheel = Wheel::jit_cache();
        let path = machine.place("checkout/dist/built.whl", wheel.bytes());
        let record = Record::new(wheel.distribution, TARGET, &path, sha256(&wheel.bytes()));
        record.write(&machine.path("checkout")).expect("the record");
        machine.checkout = Some(machine.path("checkout"));
        makes_no_difference(&machine, Source::Local);
    }

    /// As `cargo xtask` takes what it compiles with, and the lock's digests.
    #[test]
    fn and_must_be_the_pinned_one_makes_no_difference() {
        for listed in [true, false] {
            let (machine, wheel) = (Machine::new(), Wheel::jit_cache());
            let mut pinned = wheel.pin_with_places().url("https://example.invalid/a.whl").parsed();
            let members = pinned.members.clone();
            machine.place(machine.cached(&pinned), wheel.bytes());
            if !listed {
                pinned.members.clear();
            }
            let found = machine.find_pinned(&pinned).expect("the wheel");
            fs::write(&found.path, wheel.clone().rebuilt().bytes()).expect("another wheel");
            let mut archive = Archive::open(BufReader::new(found.file), "the wheel").expect("the wheel");
            for member in &members {
                let extracted = archive.extract(member, &machine.lib_dir()).expect("the member");
                assert_eq!(fs::read(extracted.path).expect("the library"), wheel.member(&member.path));
            }
        }
    }

    /// Of a wheel of gigabytes, which is copied as far as it is wanted.
    #[test]
    fn is_copied_no_further_than_it_is_wanted() {
        let mut wheel = Wheel::jit_cache();
        let noise = (0u32..40_000).flat_map(|block| sha256(&block.to_le_bytes()).0).collect();
        wheel.members.insert(1, ("flashinfer_jit_cache/jit_cache/other/other.so", noise));
        let (machine, pin) = (Machine::new(), wheel.pin().url("https://example.invalid/a.whl"));
        let pinned = pin.parsed();
        machine.place(machine.cached(&pinned), wheel.bytes());
        for (path, most) in [(NORM, 200_000), ("flashinfer_jit_cache/jit_cache/other/other.so", 2_000_000)] {
            let wanted: Vec<_> = pinned.members.iter().filter(|member| member.path == path).collect();
            let Supply::Wheel(found) = machine.supply(&pinned, &wanted).expect("the wheel") else { panic!("a wheel") };
            let (length, blocks) = found.file.metadata().map(|copy| (copy.len(), copy.blocks())).expect("the copy");
            assert_eq!(length, wheel.bytes().len() as u64);
            assert!(blocks * 512 < most, "{path}: {blocks} blocks");
            let mut archive = Archive::open(BufReader::new(found.file), "the wheel").expect("its layout");
            archive.extract(wanted[0], &machine.lib_dir()).expect("the member");
            assert_eq!(fs::read(machine.lib_dir().join(&wanted[0].soname)).expect("it"), wheel.member(path));
        }
    }
}

mod a_local_build {
    use super::*;
    use vendoring::local::{self, RECORD, Record};

    /// A machine whose checkout has this wheel for its local build, which is all that it has.
    fn machine_with(wheel: &Wheel) -> (Machine, lock::Wheel) {
        let mut machine = Machine::new();
        let path = machine.place("checkout/dist/built.whl", wheel.bytes());
        let record = Record::new("flashinfer_jit_cache", TARGET, &path, sha256(&wheel.bytes()));
        record.write(&machine.path("checkout")).expect("the record");
        machine.checkout = Some(machine.path("checkout"));
        (machine.with(env::OFFLINE, "1"), Wheel::jit_cache().pin().url("https://example.invalid/a.whl").parsed())
    }

    /// Left over from before the lock had another release.
    #[test]
    fn of_another_version_is_refused() {
        let (machine, pinned) = machine_with(&Wheel { version: "0.6.2+cu130", ..Wheel::jit_cache() });
        let fault = machine.fault(&pinned);
        assert_says(fault, &["built.whl has version 0.6.2+cu130, expected 0.6.3+cu130", "cargo xtask wheel", RECORD]);
        let found = machine.with(env::ALLOW_VERSION, "1").find(&pinned).expect("the local build");
        assert_eq!((found.source, found.version.as_str()), (Source::Local, "0.6.2+cu130"));
        assert_says(found.notes.warnings.join("\n"), &["has version 0.6.2+cu130"]);
    }

    #[test]
    fn of_another_platform_or_distribution_is_refused() {
        let (machine, pinned) = machine_with(&Wheel { tag: "cp39-abi3-linux_aarch64", ..Wheel::jit_cache() });
        assert_says(machine.fault(&pinned), &["linux_aarch64", "the target is x86_64-linux"]);
        let (machine, pinned) = machine_with(&Wheel::cudart());
        assert_says(machine.fault(&pinned), &["a wheel of nvidia_cuda_runtime"]);
    }

    #[test]
    fn is_not_used_where_strict_is_set() {
        let (machine, pinned) = machine_with(&Wheel::jit_cache().rebuilt());
        assert_eq!(machine.find(&pinned).expect("the local build").source, Source::Local);
        assert_says(
            machine.with(env::STRICT, "1").fault(&pinned),
            &["not the local build", "FLASHINFER_RS_STRICT is set"],
        );
    }

    /// Cargo's checkouts of git dependencies have xtask too, and nobody who depends on them runs it.
    #[test]
    fn is_spoken_of_to_those_alone_who_work_in_a_checkout() {
        let machine = Machine::new();
        machine.place("checkout/xtask/Cargo.toml", "");
        let (checkout, elsewhere) = (machine.path("checkout"), machine.path("project"));
        assert!(local::is_checkout(&checkout, Some(&checkout)));
        assert!(!local::is_checkout(&checkout, Some(&elsewhere)) && !local::is_checkout(&checkout, None));
        machine.place(checkout.join(RECORD), "{}");
        assert!(local::is_checkout(&checkout, Some(&elsewhere)), "who has built one there uses it from elsewhere too");
        assert!(!local::is_checkout(&elsewhere, Some(&elsewhere)), "a package without xtask");
    }

    #[test]
    fn that_is_a_pipe_is_refused_at_once() {
        let (machine, pinned) = machine_with(&Wheel::jit_cache());
        let mkfifo =
            |path: &Path| assert!(std::process::Command::new("mkfifo").arg(path).status().expect("it").success());
        let path = machine.path("checkout/dist/built.whl");
        fs::remove_file(&path).expect("gone");
        mkfifo(&path);
        assert_says(machine.fault(&pinned), &["built.whl", "a pipe"]);
        let record = machine.path("checkout").join(RECORD);
        fs::remove_file(&record).expect("gone");
        mkfifo(&record);
        assert_says(machine.fault(&pinned), &[RECORD, "a pipe"]);
    }
}

mod an_override {
    use super::*;

    fn machine_with(bytes: &[u8]) -> Machine {
        let machine = Machine::new();
        let path = machine.place("given.whl", bytes);
        machine.with(env::JIT_CACHE_WHEEL, path)
    }

    fn pinned() -> lock::Wheel {
        Wheel::jit_cache().pin().url("https://example.invalid/a.whl").parsed()
    }

    #[track_caller]
    fn refused(machine: &Machine, parts: &[&str]) {
        let fault = machine.find(&pinned()).expect_err("refused");
        assert!(!fault.is_unavailable(), "an override that does not fit must not be passed over: {fault}");
        assert_says(fault.to_string(), &["FLASHINFER_RS_JIT_CACHE_WHEEL"]);
        assert_says(fault.to_string(), parts);
    }

    #[test]
    fn with_the_pinned_bytes_is_taken_without_a_word() {
        let found = machine_with(&Wheel::jit_cache().bytes()).find(&pinned()).expect("the wheel");
        assert!(found.is_pinned(&pinned()));
        assert!(found.notes.warnings.is_empty() && found.notes.told.is_empty(), "{:?}", found.notes);
    }

    #[test]
    fn of_another_distribution_is_refused() {
        let machine = machine_with(&Wheel { distribution: "some_other", ..Wheel::jit_cache() }.bytes());
        refused(&machine, &["a wheel of some_other", "expected flashinfer_jit_cache"]);
    }

    #[test]
    fn may_spell_its_distribution_another_way() {
        let machine = machine_with(&Wheel { distribution: "FlashInfer.jit-cache", ..Wheel::jit_cache() }.bytes());
        assert_eq!(machine.find(&pinned()).expect("the wheel").source, Source::Override);
    }

    #[test]
    fn of_another_version_is_refused() {
        let machine = machine_with(&Wheel { version: "0.6.4", ..Wheel::jit_cache() }.bytes());
        refused(&machine, &["version 0.6.4", "expected 0.6.3+cu130", "FLASHINFER_RS_ALLOW_VERSION=1"]);
    }

    #[test]
    fn of_another_version_is_taken_with_a_note_where_that_is_allowed() {
        let machine = machine_with(&Wheel { version: "0.6.4", ..Wheel::jit_cache() }.bytes());
        let found = machine.with(env::ALLOW_VERSION, "1").find(&pinned()).expect("the wheel");
        assert_says(found.notes.warnings.join("\n"), &["version 0.6.4", "0.6.3+cu130"]);
    }

    #[test]
    fn of_a_release_whose_kernels_take_other_arguments_is_refused_with_what_differs() {
        let bytes = Wheel { version: "0.6.8+cu130", ..Wheel::jit_cache() }.bytes();
        let fault = machine_with(&bytes).with(env::ALLOW_VERSION, "1").fault(&pinned());
        assert_says(
            &fault,
            &[
                "version 0.6.8+cu130",
                "not as in 0.6.3+cu130",
                "norm.so since 0.6.7: rmsnorm_quant",
                "gdn_prefill_sm90.so since 0.6.8",
                "turn off the Cargo features",
            ],
        );
        // What the build does not want is no reason.
        let machine = machine_with(&Wheel { version: "0.6.7+cu130", ..Wheel::jit_cache() }.bytes());
        let (machine, lock) = (
            machine.with(env::ALLOW_VERSION, "1"),
            wheels::lock([&Wheel::jit_cache().pin().url("https://example.invalid/a.whl")]),
        );
        machine.vendor(&lock, &["gdn-prefill"]).expect("what did not change");
        let fault = machine.vendor(&lock, &["norm"]).err().expect("what did").to_string();
        assert_says(fault, &["norm.so since 0.6.7"]);
    }

    #[test]
    fn of_a_release_that_nobody_compared_is_taken_and_that_is_said() {
        let machine = machine_with(&Wheel { version: "0.6.2+cu130", ..Wheel::jit_cache() }.bytes());
        let found = machine.with(env::ALLOW_VERSION, "1").find(&pinned()).expect("the wheel");
        assert_says(found.notes.warnings.join("\n"), &["only the releases from 0.6.3 to 0.6.16 were compared"]);
    }

    #[test]
    fn of_another_platform_is_refused() {
        let machine = machine_with(&Wheel { tag: "cp39-abi3-win_amd64", ..Wheel::jit_cache() }.bytes());
        refused(&machine, &["cp39-abi3-win_amd64", "the target is x86_64-linux"]);
    }

    #[test]
    fn of_another_architecture_is_refused() {
        let machine = machine_with(&Wheel { tag: "cp39-abi3-manylinux_2_28_aarch64", ..Wheel::jit_cache() }.bytes());
        refused(&machine, &["manylinux_2_28_aarch64", "the target is x86_64-linux"]);
    }

    #[test]
    fn built_for_plain_linux_is_taken() {
        let machine = machine_with(&Wheel { tag: "cp39-abi3-linux_x86_64", ..Wheel::jit_cache() }.bytes());
        assert_eq!(machine.find(&pinned()).expect("the wheel").source, Source::Override);
    }

    #[test]
    fn with_another_digest_is_taken_with_a_note_and_its_own_digest() {
        let bytes = Wheel::jit_cache().rebuilt().bytes();
        let found = machine_with(&bytes).find(&pinned()).expect("the wheel");
        assert_eq!(found.sha256, sha256(&bytes));
        assert_says(found.notes.warnings.join("\n"), &["not the pinned wheel", "given.whl"]);
    }

    #[test]
    fn with_another_digest_is_refused_where_strict_is_set() {
        let bytes = Wheel::jit_cache().rebuilt().bytes();
        let machine = machine_with(&bytes).with(env::STRICT, "1");
        let (found, expected) = (sha256(&bytes).to_string(), pinned().sha256.to_string());
        refused(&machine, &[&found, &expected, "FLASHINFER_RS_STRICT"]);
    }

    #[test]
    fn with_the_pinned_bytes_is_taken_where_strict_is_set() {
        let machine = machine_with(&Wheel::jit_cache().bytes()).with(env::STRICT, "1");
        assert_eq!(machine.find(&pinned()).expect("the wheel").source, Source::Override);
    }

    #[test]
    fn that_is_no_zip_is_refused() {
        let machine = machine_with(b"<html>Not found</html>");
        let fault = machine.find(&pinned()).expect_err("refused").to_string();
        assert_says(fault, &["given.whl", "not a wheel"]);
    }

    #[test]
    fn that_is_truncated_is_refused() {
        let bytes = Wheel::jit_cache().bytes();
        let machine = machine_with(&bytes[..bytes.len() - 30]);
        let fault = machine.find(&pinned()).expect_err("refused").to_string();
        assert_says(fault, &["given.whl", "truncated", "get it again"]);
    }

    #[test]
    fn that_is_a_folder_is_refused() {
        let machine = Machine::new();
        machine.place("folder/some.whl", "");
        let folder = machine.path("folder");
        refused(&machine.with(env::JIT_CACHE_WHEEL, folder.clone()), &[&folder.display().to_string(), "not a file"]);
    }

    #[test]
    fn that_is_not_there_is_refused() {
        let machine = Machine::new();
        let path = machine.path("not-there.whl");
        refused(&machine.with(env::JIT_CACHE_WHEEL, path.clone()), &[&path.display().to_string(), "check the path"]);
    }

    #[test]
    fn without_a_word_on_what_it_is_is_refused() {
        let mut zip = zip::ZipWriter::new(io::Cursor::new(Vec::new()));
        zip.start_file("readme", zip::write::SimpleFileOptions::default()).expect("a member");
        let machine = machine_with(&zip.finish().expect("an archive").into_inner());
        let fault = machine.find(&pinned()).expect_err("refused").to_string();
        assert_says(fault, &["given.whl", "0 dist-info/METADATA"]);
    }
}

mod the_folders {
    use super::*;

    #[test]
    fn must_not_hold_other_bytes_under_the_pinned_name() {
        let wheel = Wheel::jit_cache();
        let (server, pin) = released(&wheel);
        let other = wheel.clone().rebuilt().bytes();
        let machine = Machine::new();
        let path = machine.place(format!("directory/{}", wheel.file()), &other);
        let folder = machine.path("directory");
        let fault = machine.with(env::WHEEL_DIR, folder).fault(&pin.parsed());
        let (found, expected) = (sha256(&other).to_string(), sha256(&wheel.bytes()).to_string());
        assert_says(fault, &[&path.display().to_string(), &found, &expected, "FLASHINFER_RS_JIT_CACHE_WHEEL"]);
        assert!(server.requests().is_empty(), "the user's file was passed over");
    }

    #[test]
    fn that_cannot_hold_the_cache_are_named_with_the_variable_that_names_another() {
        let (_server, pin) = released(&Wheel::jit_cache());
        let machine = Machine::new();
        // A file in its place stops root too, which permissions would not.
        machine.place("cache", "a file");
        let cache = machine.cache().display().to_string();
        assert_says(machine.fault(&pin.parsed()), &["cache folder", &cache, "FLASHINFER_RS_CACHE_DIR"]);
    }
}

mod the_network {
    use super::*;
    use std::sync::Barrier;

    #[track_caller]
    fn fetched(machine: &Machine, pinned: &lock::Wheel) {
        let found = machine.find(pinned).expect("the wheel");
        assert_eq!(found.source, Source::Network);
        assert_eq!(sha256(&bytes_of(&found)), pinned.sha256);
    }

    #[test]
    fn is_asked_source_by_source() {
        let wheel = Wheel::jit_cache();
        let (server, _) = released(&wheel);
        let pin = wheel.pin().url(server.url("/gone.whl")).url(server.url(&release(&wheel)));
        fetched(&Machine::new(), &pin.parsed());
        assert_eq!(server.paths(), ["/gone.whl", &release(&wheel)]);
    }

    #[test]
    fn is_asked_for_the_bytes_as_they_are() {
        let (server, pin) = released(&Wheel::jit_cache());
        fetched(&Machine::new(), &pin.parsed());
        assert_eq!(server.requests()[0].header("Accept-Encoding"), Some("identity"));
    }

    #[test]
    fn may_redirect() {
        let wheel = Wheel::jit_cache();
        let (server, _) = released(&wheel);
        server.on("/moved.whl", [Reply::redirect(&release(&wheel))]);
        fetched(&Machine::new(), &wheel.pin().url(server.url("/moved.whl")).parsed());
        assert_eq!(server.paths(), ["/moved.whl", &release(&wheel)]);
    }

    #[test]
    fn that_redirects_for_ever_is_given_up() {
        let (server, pinned) = answering(Reply::redirect(&release(&Wheel::jit_cache())));
        assert_says(Machine::new().fault(&pinned), &[&server.url(&release(&Wheel::jit_cache())), "redirect"]);
    }

    #[test]
    fn need_not_say_how_long_the_file_is() {
        let (_server, pinned) = answering(Reply::ok(Wheel::jit_cache().bytes()).without_length());
        fetched(&Machine::new(), &pinned);
    }

    #[test]
    fn is_asked_once_by_four_builds_that_start_together() {
        let (server, pin) = released(&Wheel::jit_cache());
        let (pinned, machine, start) = (pin.parsed(), Machine::new(), Barrier::new(4));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    start.wait();
                    let found = machine.find(&pinned).expect("the wheel");
                    assert_eq!(sha256(&bytes_of(&found)), pinned.sha256);
                });
            }
        });
        assert_eq!(server.requests().len(), 1);
    }

    #[test]
    fn replaces_a_cached_file_that_was_tampered_with() {
        let (server, pin) = released(&Wheel::jit_cache());
        let (pinned, machine) = (pin.parsed(), Machine::new());
        let cached = machine.place(machine.cached(&pinned), Wheel::jit_cache().rebuilt().bytes());
        fetched(&machine, &pinned);
        assert_eq!(sha256(&fs::read(cached).expect("the cached file")), pinned.sha256);
        assert_eq!(server.requests().len(), 1);
    }

    #[test]
    fn fills_a_cache_that_a_killed_build_left_half_a_file_in() {
        let (_server, pin) = released(&Wheel::jit_cache());
        let (pinned, machine) = (pin.parsed(), Machine::new());
        machine.place(machine.cached(&pinned).with_file_name(".tmp-killed"), "half");
        fetched(&machine, &pinned);
        let kept = format!("wheels/{}/{}", pinned.sha256, pinned.file);
        assert_eq!(files_under(&machine.cache()), [kept]);
    }

    #[test]
    fn is_not_used_with_flashinfer_rs_offline() {
        let (server, pin) = released(&Wheel::jit_cache());
        let fault = Machine::new().with(env::OFFLINE, "1").fault(&pin.parsed());
        assert_says(fault, &["FLASHINFER_RS_OFFLINE is set"]);
        assert!(server.requests().is_empty());
    }

    #[test]
    fn is_not_used_with_cargo_net_offline() {
        let (server, pin) = released(&Wheel::jit_cache());
        let fault = Machine::new().with(env::CARGO_OFFLINE, "true").fault(&pin.parsed());
        assert_says(fault, &["CARGO_NET_OFFLINE is set"]);
        assert!(server.requests().is_empty());
    }

    #[test]
    fn is_used_where_offline_is_set_to_false() {
        let (_server, pin) = released(&Wheel::jit_cache());
        fetched(&Machine::new().with(env::CARGO_OFFLINE, "false"), &pin.parsed());
    }

    #[test]
    fn is_the_mirror_where_one_is_set() {
        let wheel = Wheel::jit_cache();
        let (host, pin) = released(&wheel);
        let mirror = Server::start();
        mirror.on(&format!("/cache{}", release(&wheel)), [Reply::ok(wheel.bytes())]);
        fetched(&Machine::new().with(env::MIRROR, mirror.url("/cache/")), &pin.parsed());
        assert_eq!(mirror.paths(), [format!("/cache{}", release(&wheel))]);
        assert!(host.requests().is_empty());
    }

    #[test]
    fn is_nothing_but_the_mirror_where_the_mirror_fails() {
        let (host, pin) = released(&Wheel::jit_cache());
        let pin = pin.index(host.url("/index/"));
        let mirror = Server::start();
        let fault = Machine::new().with(env::MIRROR, mirror.url("")).fault(&pin.parsed());
        assert_says(fault, &[&mirror.url(&release(&Wheel::jit_cache())), "answered 404"]);
        assert!(host.requests().is_empty());
    }

    /// A mirror of the release host has no index; a package URL goes to the index this machine is configured for.
    #[test]
    fn is_the_configured_index_for_a_package_url_though_a_mirror_is_set() {
        let (wheel, index, mirror) = (Wheel::cudart(), Server::start(), Server::start());
        let link = format!("<a href=\"/files/{0}\">{0}</a>", wheel.file());
        index.on("/simple/nvidia-cuda-runtime/", [Reply::ok(link)]);
        index.on(&format!("/files/{}", wheel.file()), [Reply::ok(wheel.bytes())]);
        let machine = Machine::new().with(env::MIRROR, mirror.url("")).with("PIP_INDEX_URL", index.url("/simple"));
        fetched(&machine, &wheel.pin().purl("pkg:pypi/nvidia-cuda-runtime@13.0.96").parsed());
        assert!(mirror.requests().is_empty());
    }
}

mod an_index {
    use super::*;
    use vendoring::env::Env;

    const PURL: &str = "pkg:pypi/flashinfer-jit-cache@0.6.3";
    const PAGE: &str = "/simple/flashinfer-jit-cache/";

    /// An index that serves this page, and the wheel beside it.
    fn index(page: Reply) -> (Server, lock::Wheel) {
        let wheel = Wheel::jit_cache();
        let (server, _) = released(&wheel);
        server.on(PAGE, [page]);
        let pinned = wheel.pin().index(server.url(PAGE)).parsed();
        (server, pinned)
    }

    fn html(body: &str) -> Reply {
        Reply::ok(format!("<!DOCTYPE html><html><body>{body}</body></html>")).header("Content-Type", "text/html")
    }

    fn json(href: &str, digest: &str) -> Reply {
        let file = Wheel::jit_cache().file();
        let page = format!(
            r#"{{"meta": {{"api-version": "1.1"}}, "name": "flashinfer-jit-cache", "files": [
                {{"filename": "other.whl", "url": "/other.whl", "hashes": {{}}}},
                {{"filename": "{file}", "url": "{href}", "hashes": {{"sha256": "{digest}"}}}}]}}"#
        );
        Reply::ok(page).header("Content-Type", "application/vnd.pypi.simple.v1+json")
    }

    #[track_caller]
    fn leads_to_the_wheel(page: Reply) {
        let (server, pinned) = index(page);
        assert_eq!(Machine::new().find(&pinned).expect("the wheel").source, Source::Network);
        assert_eq!(server.paths(), [PAGE, &release(&Wheel::jit_cache())]);
    }

    #[test]
    fn in_html_leads_to_the_wheel() {
        let link = release(&Wheel::jit_cache());
        leads_to_the_wheel(html(&format!("<a href=\"/other.whl\">other</a><a href=\"{link}\">it</a>")));
    }

    #[test]
    fn in_html_may_link_relative_to_itself() {
        let link = format!("../..{}", release(&Wheel::jit_cache()));
        leads_to_the_wheel(html(&format!("<a href=\"{link}\">it</a>")));
    }

    #[test]
    fn in_html_may_give_the_pinned_digest() {
        let digest = sha256(&Wheel::jit_cache().bytes());
        let link = release(&Wheel::jit_cache());
        leads_to_the_wheel(html(&format!("<a href=\"{link}#sha256={digest}\">it</a>")));
    }

    /// Escaped as indexes do: `%2B` for the `+` of a local version. The server sees what the page said.
    #[test]
    fn in_html_may_escape_the_file_name() {
        let wheel = Wheel::jit_cache();
        let escaped = release(&wheel).replace('+', "%2B");
        let (server, pinned) = index(html(&format!("<a href=\"{escaped}\">it</a>")));
        server.on(&escaped, [Reply::ok(wheel.bytes())]);
        assert_eq!(Machine::new().find(&pinned).expect("the wheel").source, Source::Network);
        assert_eq!(server.paths(), [PAGE, &escaped]);
    }

    #[test]
    fn in_json_leads_to_the_wheel() {
        leads_to_the_wheel(json(&release(&Wheel::jit_cache()), &sha256(&Wheel::jit_cache().bytes()).to_string()));
    }

    #[test]
    fn in_json_may_link_relative_to_itself() {
        let link = format!("../..{}", release(&Wheel::jit_cache()));
        leads_to_the_wheel(json(&link, &sha256(&Wheel::jit_cache().bytes()).to_string()));
    }

    #[track_caller]
    fn is_passed_over(page: Reply, parts: &[&str]) {
        let (server, pinned) = index(page);
        let fault = Machine::new().find(&pinned).expect_err("passed over");
        assert!(fault.is_unavailable(), "the next source may have it: {fault}");
        assert_says(fault.to_string(), &[&server.url(PAGE)]);
        assert_says(fault.to_string(), parts);
        assert_eq!(server.paths(), [PAGE], "nothing is fetched from it");
    }

    #[test]
    fn in_html_with_another_digest_is_passed_over() {
        let (other, pinned) = ("ab".repeat(32), sha256(&Wheel::jit_cache().bytes()).to_string());
        let page = html(&format!("<a href=\"{}#sha256={other}\">it</a>", release(&Wheel::jit_cache())));
        is_passed_over(page, &[&other, &pinned, "expected"]);
    }

    #[test]
    fn in_json_with_another_digest_is_passed_over() {
        let (other, pinned) = ("ab".repeat(32), sha256(&Wheel::jit_cache().bytes()).to_string());
        is_passed_over(json(&release(&Wheel::jit_cache()), &other), &[&other, &pinned, "expected"]);
    }

    #[test]
    fn without_the_file_is_passed_over() {
        let page = html("<a href=\"/other.whl\">other</a>");
        is_passed_over(page, &[&format!("lists no {}", Wheel::jit_cache().file())]);
    }

    #[test]
    fn in_broken_json_is_passed_over() {
        is_passed_over(Reply::ok("{\"files\": ["), &["not a simple index page"]);
    }

    #[test]
    fn with_a_link_that_is_not_http_is_refused() {
        let (_server, pinned) = index(html(&format!("<a href=\"file:///{}\">it</a>", Wheel::jit_cache().file())));
        assert_says(Machine::new().fault(&pinned), &["not http or https"]);
    }

    #[test]
    fn is_asked_for_json_first() {
        let (server, pinned) = index(html(""));
        Machine::new().fault(&pinned);
        let requests = server.requests();
        assert!(requests[0].header("Accept").is_some_and(|accept| accept.starts_with("application/vnd.pypi.simple")));
    }

    /// A machine that several indexes are configured for at once, each with a page of its own that lists nothing.
    fn asked_of(server: &Server, machine: Machine) -> Vec<String> {
        let pinned = Wheel::jit_cache().pin().purl(PURL).parsed();
        for name in ["uv-default", "uv", "pip", "conf"] {
            server.on(&format!("/{name}/flashinfer-jit-cache/"), [html("")]);
        }
        assert_says(machine.fault(&pinned), &[PURL, "lists no"]);
        server.paths()
    }

    /// With every lesser one set as well, so that the order shows.
    fn configured(server: &Server, names: &[&str]) -> Machine {
        let machine = Machine::new();
        let conf = machine.place("pip.conf", format!("[global]\nindex-url = {}\n", server.url("/conf")));
        names.iter().fold(machine.with("PIP_CONFIG_FILE", conf), |machine, name| match *name {
            "UV_DEFAULT_INDEX" => machine.with(name, server.url("/uv-default")),
            "UV_INDEX_URL" => machine.with(name, server.url("/uv/")),
            _ => machine.with(name, server.url("/pip")),
        })
    }

    #[test]
    fn of_uv_default_index_comes_first() {
        let server = Server::start();
        let machine = configured(&server, &["UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL"]);
        assert_eq!(asked_of(&server, machine), ["/uv-default/flashinfer-jit-cache/"]);
    }

    #[test]
    fn of_uv_default_index_may_have_a_label() {
        let server = Server::start();
        let machine = Machine::new().with("UV_DEFAULT_INDEX", format!("company={}", server.url("/uv-default")));
        assert_eq!(asked_of(&server, machine), ["/uv-default/flashinfer-jit-cache/"]);
    }

    #[test]
    fn of_uv_index_url_comes_second() {
        let server = Server::start();
        let machine = configured(&server, &["UV_INDEX_URL", "PIP_INDEX_URL"]);
        assert_eq!(asked_of(&server, machine), ["/uv/flashinfer-jit-cache/"]);
    }

    #[test]
    fn of_pip_index_url_comes_third() {
        let server = Server::start();
        let machine = configured(&server, &["PIP_INDEX_URL"]);
        assert_eq!(asked_of(&server, machine), ["/pip/flashinfer-jit-cache/"]);
    }

    #[test]
    fn of_pips_configuration_file_comes_fourth() {
        let server = Server::start();
        let machine = configured(&server, &[]);
        assert_eq!(asked_of(&server, machine), ["/conf/flashinfer-jit-cache/"]);
    }

    #[test]
    fn of_pips_configuration_file_is_that_of_download_before_the_global_one() {
        let server = Server::start();
        let machine = Machine::new();
        let text = format!("[download]\nindex_url: {}\n[global]\nindex-url = {}\n", server.url("/pip"), "http://[bad");
        let conf = machine.place("pip.conf", text);
        assert_eq!(asked_of(&server, machine.with("PIP_CONFIG_FILE", conf)), ["/pip/flashinfer-jit-cache/"]);
    }

    #[test]
    fn of_pips_configuration_file_is_found_in_the_users_folders() {
        for place in [".config/pip/pip.conf", ".pip/pip.conf"] {
            let server = Server::start();
            let machine = Machine::new();
            machine.place(format!("home/{place}"), format!("[global]\nindex-url = {}\n", server.url("/conf")));
            let home = machine.path("home");
            let machine = machine.with("HOME", home).with("PIP_CONFIG_FILE", "");
            assert_eq!(asked_of(&server, machine), ["/conf/flashinfer-jit-cache/"], "{place}");
        }
    }

    #[test]
    fn names_where_it_was_configured_when_it_fails() {
        let server = Server::start();
        let machine = Machine::new().with("PIP_INDEX_URL", server.url("/not-an-index"));
        let pinned = Wheel::jit_cache().pin().purl(PURL).parsed();
        assert_says(machine.fault(&pinned), &[PURL, "PIP_INDEX_URL", "/not-an-index/", "answered 404"]);
    }

    #[test]
    fn that_is_not_http_is_refused_by_the_name_of_its_variable() {
        let env = Env::fixed([("PIP_INDEX_URL", "ftp://127.0.0.1/simple")]);
        let fault = pages(PURL, &env).expect_err("refused").to_string();
        assert_says(fault, &["PIP_INDEX_URL", "neither an http, https or file address"]);
    }

    #[test]
    fn has_a_projects_page_under_its_normalized_name() {
        let env = Env::fixed([("PIP_INDEX_URL", "https://example.invalid/simple/")]);
        let page = &pages("pkg:pypi/NVIDIA_cuda.Runtime@13.0.96", &env).expect("a page")[0].0;
        assert_eq!(page, "https://example.invalid/simple/nvidia-cuda-runtime/");
    }

    #[test]
    fn is_there_without_any_configuration() {
        let pages = pages(PURL, &Machine::new().env()).expect("a page");
        let [(page, from)] = pages.as_slice() else { panic!("{pages:?}") };
        assert!(page.starts_with("https://") && page.ends_with(PAGE), "{page}");
        assert_eq!(from, "the default index");
    }

    #[test]
    fn is_not_guessed_for_another_kind_of_package_url() {
        let fault = pages("pkg:npm/left-pad@1.0.0", &Machine::new().env()).expect_err("refused").to_string();
        assert_says(fault, &["pkg:npm/left-pad@1.0.0", "pkg:pypi/NAME@VERSION"]);
    }
}

mod bad_bytes {
    use super::*;
    use vendoring::digest::Digest;

    /// That the answer is refused in these words and leaves nothing in the cache.
    #[track_caller]
    fn leave_nothing(reply: Reply, requests: usize, parts: &[&str]) -> Error {
        let (server, pinned) = answering(reply);
        let machine = Machine::new();
        let fault = machine.find(&pinned).expect_err("bad bytes");
        assert_says(fault.to_string(), &[&server.url(&release(&Wheel::jit_cache()))]);
        assert_says(fault.to_string(), parts);
        assert_eq!(files_under(&machine.cache()), [""; 0], "left in the cache");
        assert_eq!(server.requests().len(), requests, "requests");
        fault
    }

    /// As [`leave_nothing`], but that what came is kept under another name, for the next build to go on with.
    #[track_caller]
    fn leave_a_part(reply: Reply, requests: usize, parts: &[&str]) {
        let (server, pinned) = answering(reply);
        let machine = Machine::new();
        let fault = machine.find(&pinned).expect_err("too few bytes");
        assert!(fault.is_unavailable());
        assert_says(fault.to_string(), &[&server.url(&release(&Wheel::jit_cache()))]);
        assert_says(fault.to_string(), parts);
        let part = format!("wheels/{}/{}.part", pinned.sha256, pinned.file);
        assert_eq!(files_under(&machine.cache()), [part.as_str()]);
        assert_eq!(fs::read(machine.cache().join(part)).expect("the part"), &good()[..700]);
        assert_eq!(server.requests().len(), requests, "requests");
    }

    fn good() -> Vec<u8> {
        Wheel::jit_cache().bytes()
    }

    fn digest() -> Digest {
        sha256(&good())
    }

    #[test]
    fn of_another_digest_are_refused() {
        let mut other = good();
        other[40] ^= 1;
        let (found, expected) = (sha256(&other).to_string(), digest().to_string());
        let fault = leave_nothing(Reply::ok(other), 1, &["has sha256", &found, "expected", &expected]);
        assert!(!fault.is_unavailable(), "other bytes are no reason to look elsewhere");
    }

    /// An attack on the first source must not go unseen because the second one is sound.
    #[test]
    fn are_not_made_good_by_the_next_source() {
        let wheel = Wheel::jit_cache();
        let (server, _) = released(&wheel);
        server.on("/other.whl", [Reply::ok(wheel.clone().rebuilt().bytes()).without_length()]);
        let mut pin = wheel.pin().url(server.url("/other.whl")).url(server.url(&release(&wheel)));
        pin.size = None;
        assert_says(Machine::new().fault(&pin.parsed()), &[&server.url("/other.whl"), "sha256"]);
        assert_eq!(server.paths(), ["/other.whl"]);
    }

    #[test]
    fn that_break_off_are_refused() {
        let whole = format!("{} bytes", good().len());
        leave_a_part(Reply::ok(good()).break_off_after(700), 3, &["after 700", &whole]);
    }

    #[test]
    fn that_end_too_soon_without_an_announced_length_are_refused() {
        let parts = ["ended after 700 of", &good().len().to_string()];
        leave_a_part(Reply::ok(&good()[..700]).without_length(), 3, &parts);
    }

    #[test]
    fn that_go_on_too_long_are_refused() {
        let mut longer = good();
        longer.extend_from_slice(b"and more");
        let size = format!("after {} bytes", good().len());
        leave_nothing(Reply::ok(longer).without_length(), 1, &["goes on", &size]);
    }

    #[test]
    fn of_another_announced_length_are_refused() {
        let size = good().len();
        let parts = [format!("{} bytes long", size + 1), format!("expected {size}")];
        leave_nothing(Reply::ok(good()).announce(size + 1), 1, &[&parts[0], &parts[1]]);
    }

    #[test]
    fn that_come_encoded_are_refused() {
        let reply = Reply::ok(good()).header("Content-Encoding", "br");
        leave_nothing(reply, 1, &["content-encoding br", "not asked for"]);
    }

    #[test]
    fn of_a_404_are_no_wheel() {
        leave_nothing(Reply::status(404), 1, &["answered 404", "not there", &digest().to_string()]);
    }

    #[test]
    fn of_a_403_are_no_wheel_and_want_credentials() {
        leave_nothing(Reply::status(403), 1, &["answered 403", "credentials", &digest().to_string()]);
    }

    #[test]
    fn of_a_500_are_asked_for_three_times() {
        leave_nothing(Reply::status(500), 3, &["answered 500", "try again later", &digest().to_string()]);
    }

    #[test]
    fn of_a_503_are_forgotten_when_the_next_try_succeeds() {
        let (server, pin) = released(&Wheel::jit_cache());
        server.on(&release(&Wheel::jit_cache()), [Reply::status(503), Reply::ok(good())]);
        assert_eq!(Machine::new().find(&pin.parsed()).expect("the wheel").source, Source::Network);
        assert_eq!(server.requests().len(), 2);
    }

    #[test]
    fn of_nobody_are_no_wheel() {
        let (refusing, machine) = (Refusing::start(), Machine::new());
        let url = format!("http://{}/a.whl", refusing.authority());
        let fault = machine.fault(&Wheel::jit_cache().pin().url(url.clone()).parsed());
        assert_says(fault, &[&url, "refused", &digest().to_string()]);
        assert_eq!(files_under(&machine.cache()), [""; 0]);
    }
}

mod byte_ranges {
    use super::*;
    use vendoring::fetch::{Client, RemoteFile};
    use vendoring::wheel::Wheel as Archive;

    /// A wheel most of which is of no interest, in bytes that do not compress.
    fn large() -> Wheel {
        let mut wheel = Wheel::jit_cache();
        let mut noise = Vec::new();
        for block in 0u32..20_000 {
            noise.extend_from_slice(&sha256(&block.to_le_bytes()).0);
        }
        wheel.members.insert(1, ("flashinfer_jit_cache/jit_cache/other/other.so", noise));
        wheel
    }

    /// Copies norm.so out of the wheel at this address.
    fn norm_so(url: String, size: usize) -> Result<Vec<u8>, Error> {
        let (client, pinned) = (
            Client::new(&Machine::new().env()),
            Wheel::jit_cache().pin().url("https://example.invalid/a.whl").parsed(),
        );
        let mut remote = RemoteFile::new(&client, url, size as u64);
        let mut member = Vec::new();
        Archive::open_remote(&mut remote, "remote")?.copy(&pinned.members[0], &mut member, "norm.so".as_ref())?;
        Ok(member)
    }

    /// The bytes of all requests, each of which must be for a range.
    fn asked_for(server: &Server) -> u64 {
        let length = |request: &support::http::Request| {
            let range = request.header("Range").and_then(|range| range.strip_prefix("bytes=")?.split_once('-'));
            let (first, last) = range.expect("a range");
            last.parse::<u64>().expect("a number") - first.parse::<u64>().expect("a number") + 1
        };
        server.requests().iter().map(length).sum()
    }

    #[test]
    fn bring_a_member_without_the_rest_of_the_wheel() {
        let wheel = large();
        let server = Server::start();
        server.on("/large.whl", [Reply::ok(wheel.bytes()).with_ranges()]);
        let member = norm_so(server.url("/large.whl"), wheel.bytes().len()).expect("the member");
        assert_eq!(member, wheel.member(wheels::NORM));
        let fetched = asked_for(&server);
        assert!(fetched < wheel.bytes().len() as u64 * 2 / 3, "{fetched} of {} bytes came", wheel.bytes().len());
    }

    #[test]
    fn are_not_taken_from_a_server_that_sends_all() {
        let wheel = Wheel::jit_cache();
        let (server, _) = released(&wheel);
        let fault = norm_so(server.url(&release(&wheel)), wheel.bytes().len()).expect_err("no ranges").to_string();
        assert_says(fault, &["does not answer ranges", "expected 206"]);
    }

    #[test]
    fn are_not_taken_from_a_file_of_another_size() {
        let wheel = Wheel::jit_cache();
        let server = Server::start();
        server.on("/a.whl", [Reply::ok(wheel.bytes()).with_ranges()]);
        let size = wheel.bytes().len();
        let client = Client::new(&Machine::new().env());
        let fault = client.range(&server.url("/a.whl"), 0, 9, size as u64 + 1).err().expect("another size");
        assert_says(fault.to_string(), &[&format!("bytes 0-9/{size}"), &format!("bytes 0-9/{}", size + 1)]);
    }
}

mod extraction {
    use super::*;
    use support::wheels::{CUDART, GDN, NORM};
    use vendoring::fetch::{Client, Expected};
    use vendoring::local::Record;
    use vendoring::wheel::Wheel as Archive;

    const ALL: &[&str] = &["norm", "gdn-prefill", "cudart"];

    /// A machine whose cache holds the wheel, and the lock's entry for it.
    fn cached(wheel: &Wheel) -> (Machine, Pin) {
        let (machine, pin) = (Machine::new(), wheel.pin().url("https://example.invalid/a.whl"));
        machine.place(machine.cached(&pin.parsed()), wheel.bytes());
        (machine, pin)
    }

    /// A machine that was given this wheel, and the lock's entry for the pinned one.
    fn given(wheel: &Wheel) -> (Machine, Pin) {
        let machine = Machine::new();
        let path = machine.place("given.whl", wheel.bytes());
        (machine.with(env::JIT_CACHE_WHEEL, path), Wheel::jit_cache().pin().url("https://example.invalid/a.whl"))
    }

    #[test]
    fn writes_each_member_under_its_soname() {
        let wheel = Wheel::jit_cache();
        let (machine, pin) = cached(&wheel);
        let lock = wheels::lock([&pin]);
        let rows = machine.vendor(&lock, ALL).expect("the members").rows;
        assert_eq!(rows.iter().map(|row| row.soname).collect::<Vec<_>>(), ["norm.so", "gdn_prefill_sm90.so"]);
        for (row, path) in rows.iter().zip([NORM, GDN]) {
            assert_eq!(row.extracted.path, machine.lib_dir().join(row.soname));
            assert_eq!(fs::read(&row.extracted.path).expect("the library"), wheel.member(path));
            assert_eq!(row.extracted.sha256, sha256(wheel.member(path)));
            assert_eq!(row.extracted.size, wheel.member(path).len() as u64);
            assert_eq!((row.source, row.wheel_sha256), (Source::Cache, lock.wheels[0].sha256));
        }
    }

    #[test]
    fn leaves_nothing_but_the_members() {
        let (machine, pin) = cached(&Wheel::jit_cache());
        machine.vendor(&wheels::lock([&pin]), ALL).expect("the members");
        assert_eq!(files_under(&machine.lib_dir()), ["gdn_prefill_sm90.so", "norm.so"]);
    }

    /// Others than who built it run the program: the umask decides, as for every other file of a build.
    #[cfg(unix)]
    #[test]
    fn gives_a_library_the_permissions_of_an_ordinary_file() {
        use std::os::unix::fs::PermissionsExt;
        let (machine, pin) = cached(&Wheel::jit_cache());
        machine.vendor(&wheels::lock([&pin]), ALL).expect("the members");
        let mode = |path: &Path| fs::metadata(path).expect("the file").permissions().mode() & 0o777;
        let ordinary = machine.place("ordinary", "");
        assert_eq!(format!("{:o}", mode(&machine.lib_dir().join("norm.so"))), format!("{:o}", mode(&ordinary)));
    }

    #[test]
    fn leaves_out_what_no_feature_wants() {
        let (machine, pin) = cached(&Wheel::jit_cache());
        let lock = wheels::lock([&pin]);
        let rows = machine.vendor(&lock, &["norm"]).expect("the member").rows;
        assert_eq!(rows.len(), 1);
        assert_eq!(files_under(&machine.lib_dir()), ["norm.so"]);
    }

    #[test]
    fn does_not_look_for_a_wheel_that_no_feature_wants() {
        let (server, pin) = released(&Wheel::cudart());
        let (machine, lock) = (Machine::new(), wheels::lock([&pin]));
        let env = machine.env();
        let outcome = machine.vendor_in(&env, &lock, &["norm", "gdn-prefill"]).expect("nothing to do");
        assert!(outcome.rows.is_empty() && outcome.missing.is_empty() && outcome.warnings.is_empty());
        assert!(env.names_read().is_empty(), "{:?}", env.names_read());
        assert!(server.requests().is_empty());
    }

    #[test]
    fn does_not_look_for_a_wheel_of_another_target() {
        let (server, mut pin) = released(&Wheel::jit_cache());
        pin.target = "aarch64-linux".to_owned();
        let lock = wheels::lock([&pin]);
        assert!(Machine::new().vendor(&lock, ALL).expect("nothing to do").rows.is_empty());
        assert!(server.requests().is_empty());
    }

    #[test]
    fn refuses_an_override_that_lacks_a_member() {
        let mut wheel = Wheel::jit_cache();
        wheel.members.remove(1);
        let (machine, pin) = given(&wheel);
        let lock = wheels::lock([&pin]);
        let fault = machine.vendor(&lock, ALL).err().expect("a member is missing").to_string();
        assert_says(fault, &["given.whl", GDN, "Cargo feature"]);
    }

    #[test]
    fn refuses_a_member_of_another_digest_than_the_lock_says() {
        let (machine, mut pin) = cached(&Wheel::jit_cache());
        let (locked, found) = ("ab".repeat(32), sha256(Wheel::jit_cache().member(NORM)).to_string());
        pin.members[0].sha256 = Some(locked.clone());
        let lock = wheels::lock([&pin]);
        let fault = machine.vendor(&lock, ALL).err().expect("another digest").to_string();
        assert_says(fault, &[NORM, &found, &locked]);
        assert_eq!(files_under(&machine.lib_dir()), [""; 0]);
    }

    #[test]
    fn refuses_a_member_of_another_size_than_the_lock_says() {
        let (machine, mut pin) = cached(&Wheel::jit_cache());
        let size = Wheel::jit_cache().member(NORM).len();
        pin.members[0].size = Some(size + 1);
        let lock = wheels::lock([&pin]);
        let fault = machine.vendor(&lock, ALL).err().expect("another size").to_string();
        assert_says(fault, &[NORM, &format!("{size} bytes"), &format!("expected {}", size + 1)]);
        assert_eq!(files_under(&machine.lib_dir()), [""; 0]);
    }

    #[test]
    fn takes_a_member_that_is_as_the_lock_says() {
        let (machine, mut pin) = cached(&Wheel::jit_cache());
        pin.members[0].size = Some(Wheel::jit_cache().member(NORM).len());
        pin.members[0].sha256 = Some(sha256(Wheel::jit_cache().member(NORM)).to_string());
        assert_eq!(machine.vendor(&wheels::lock([&pin]), ALL).expect("the members").rows.len(), 2);
    }

    #[test]
    fn does_not_hold_an_override_to_the_members_of_the_pinned_wheel() {
        let other = Wheel::jit_cache().rebuilt();
        let (machine, mut pin) = given(&other);
        pin.members[0].size = Some(1);
        pin.members[0].sha256 = Some("ab".repeat(32));
        let lock = wheels::lock([&pin]);
        let rows = machine.vendor(&lock, ALL).expect("the members").rows;
        assert_eq!(rows[0].extracted.sha256, sha256(other.member(NORM)));
        assert_eq!((rows[0].source, rows[0].wheel_sha256), (Source::Override, sha256(&other.bytes())));
    }

    #[test]
    fn passes_on_the_notes_on_an_override() {
        let (machine, pin) = given(&Wheel::jit_cache().rebuilt());
        let lock = wheels::lock([&pin]);
        assert_says(machine.vendor(&lock, ALL).expect("the members").warnings.join("\n"), &["not the pinned wheel"]);
    }

    #[test]
    fn watches_the_users_own_files_and_not_the_cache() {
        let (machine, pin) = given(&Wheel::jit_cache());
        let watched = machine.vendor(&wheels::lock([&pin]), ALL).expect("the members").watch;
        assert_eq!(watched, [machine.path("given.whl")]);
        let (machine, pin) = cached(&Wheel::jit_cache());
        assert!(machine.vendor(&wheels::lock([&pin]), ALL).expect("the members").watch.is_empty());
    }

    #[test]
    fn goes_on_with_a_warning_without_an_optional_wheel() {
        let (machine, jit_cache) = cached(&Wheel::jit_cache());
        let server = Server::start();
        let mut cudart = Wheel::cudart().pin().url(server.url("/gone.whl"));
        cudart.optional = true;
        let lock = wheels::lock([&cudart, &jit_cache]);
        let outcome = machine.vendor(&lock, ALL).expect("the build goes on");
        assert_eq!(outcome.rows.len(), 2);
        assert_says(outcome.warnings.join("\n"), &["answered 404", "goes on", "libcudart.so.13"]);
        assert_says(reasons(&outcome.missing), &["fetching it failed", "FLASHINFER_RS_CUDART_WHEEL"]);
    }

    #[test]
    fn does_not_go_on_without_another_wheel() {
        let (_server, pin) = nowhere();
        let lock = wheels::lock([&pin]);
        assert!(Machine::new().vendor(&lock, ALL).err().expect("no wheel").is_unavailable());
    }

    /// A proxy's error page, or what else stands in its place.
    #[test]
    fn goes_on_without_an_optional_wheel_that_is_another_one_there() {
        let wheel = Wheel::cudart();
        let mut other = wheel.bytes();
        other[40] ^= 1;
        for (reply, fault) in [
            (Reply::ok(other), "sha256"),
            (Reply::ok("<html>Sign in first</html>").header("Content-Type", "text/html"), "bytes long, expected"),
        ] {
            let (server, mut pin) = released(&wheel);
            server.on(&release(&wheel), [reply]);
            pin.optional = true;
            let (lock, machine) = (wheels::lock([&pin]), Machine::new());
            let outcome = machine.vendor(&lock, ALL).expect("the build goes on");
            assert!(outcome.rows.is_empty());
            let warning = outcome.warnings.join("\n");
            assert_says(warning, &[&server.url(&release(&wheel)), fault, "goes on", "libcudart.so.13"]);
            assert_eq!(files_under(&machine.lib_dir()), [""; 0]);

            let fault = machine.with(env::STRICT, "1").vendor(&lock, ALL).err().expect("strict").to_string();
            assert_says(fault, &["FLASHINFER_RS_STRICT is set", &server.url(&release(&wheel))]);
        }
    }

    #[test]
    fn refuses_an_override_of_an_optional_wheel_that_is_not_there() {
        let mut pin = Wheel::cudart().pin().url("https://example.invalid/a.whl");
        pin.optional = true;
        let machine = Machine::new();
        let path = machine.path("not-there.whl");
        let lock = wheels::lock([&pin]);
        let fault = machine.with(env::CUDART_WHEEL, path).vendor(&lock, ALL).err().expect("no such file").to_string();
        assert_says(fault, &["FLASHINFER_RS_CUDART_WHEEL", "check the path"]);
    }

    #[test]
    fn goes_on_with_a_warning_where_a_local_build_lacks_a_member() {
        let mut wheel = Wheel::jit_cache();
        wheel.members.remove(1);
        let mut machine = Machine::new();
        let path = machine.place("checkout/local.whl", wheel.bytes());
        machine.checkout = Some(machine.path("checkout"));
        let record = Record::new(wheel.distribution, TARGET, &path, sha256(&wheel.bytes()));
        record.write(&machine.path("checkout")).expect("the record");
        let lock = wheels::lock([&Wheel::jit_cache().pin().url("https://example.invalid/a.whl")]);
        let outcome = machine.vendor(&lock, ALL).expect("the build goes on");
        assert_eq!(files_under(&machine.lib_dir()), ["norm.so"]);
        assert_says(outcome.warnings.join("\n"), &["no gdn_prefill_sm90.so", "cargo xtask wheel"]);
        assert_says(reasons(&outcome.missing), &["no gdn_prefill_sm90.so"]);
        assert_eq!(outcome.missing[0].sonames, ["gdn_prefill_sm90.so"]);
    }

    #[test]
    fn warns_once_where_a_local_build_lacks_many_members() {
        let mut wheel = Wheel::jit_cache();
        for name in ["a", "b", "c", "d", "e"] {
            wheel.members.push((
                Box::leak(format!("flashinfer_jit_cache/jit_cache/{name}/{name}.so").into_boxed_str()),
                b"kernels".to_vec(),
            ));
        }
        let mut lock = wheels::lock([&wheel.pin().url("https://example.invalid/a.whl")]);
        lock.wheels[0].members.iter_mut().for_each(|member| member.feature = None);
        let mut machine = Machine::new();
        let path = machine.place("checkout/local.whl", Wheel::jit_cache().bytes());
        machine.checkout = Some(machine.path("checkout"));
        let record = Record::new(wheel.distribution, TARGET, &path, sha256(&Wheel::jit_cache().bytes()));
        record.write(&machine.path("checkout")).expect("the record");
        let outcome = machine.vendor(&lock, &[]).expect("the build goes on");
        assert_eq!(outcome.warnings.len(), 1);
        assert_says(&outcome.warnings[0], &["no a.so, and 4 more are not in it"]);
        assert_eq!(outcome.missing[0].sonames, ["a.so", "b.so", "c.so", "d.so", "e.so"]);
    }

    fn reasons(missing: &[Missing]) -> String {
        missing.iter().map(|missing| missing.reason.as_str()).collect::<Vec<_>>().join("\n")
    }

    /// A lock to which the environment's modules were added.
    fn naming(names: &str, pin: &Pin) -> vendoring::error::Result<lock::Lock> {
        let mut lock = wheels::lock([pin]);
        vendoring::modules::add(&mut lock, &env::Env::fixed([(env::MODULES, names)]))?;
        Ok(lock)
    }

    const PAGE: &str = "flashinfer_jit_cache/jit_cache/page/page.so";
    const ROPE: &str = "flashinfer_jit_cache/jit_cache/rope/rope.so";

    /// A wheel with more modules than the lock that pins it lists.
    fn with_more_modules() -> (Wheel, impl FnOnce(Pin) -> Pin) {
        let mut wheel = Wheel::jit_cache();
        wheel.members.push((PAGE, b"page kernels".repeat(20)));
        wheel.members.push((ROPE, b"rope kernels".repeat(20)));
        let listed = Wheel::jit_cache().pin().members.len();
        (wheel, move |mut pin: Pin| {
            pin.members.truncate(listed);
            pin
        })
    }

    #[test]
    fn takes_modules_that_are_named_beside_those_that_the_features_name() {
        for names in ["page,rope", "page rope", " page, rope ", "rope page,rope"] {
            let (wheel, unlisted) = with_more_modules();
            let (machine, pin) = cached(&wheel);
            let lock = naming(names, &unlisted(pin)).expect("good names");
            let outcome = machine.vendor(&lock, &["norm"]).expect("the members");
            assert_eq!(files_under(&machine.lib_dir()), ["norm.so", "page.so", "rope.so"], "{names}");
            let page = outcome.rows.iter().find(|row| row.soname == "page.so").expect("its row");
            assert_eq!(page.extracted.sha256, sha256(wheel.member(PAGE)));
        }
    }

    #[test]
    fn takes_a_module_that_is_named_where_its_feature_is_off() {
        let (machine, pin) = cached(&Wheel::jit_cache());
        let lock = naming("norm", &pin).expect("good names");
        machine.vendor(&lock, &[]).expect("the member");
        assert_eq!(files_under(&machine.lib_dir()), ["norm.so"]);
    }

    /// A server could give anything for a member without a digest.
    #[test]
    fn fetches_the_whole_wheel_for_a_module_that_the_lock_does_not_list() {
        let (wheel, unlisted) = with_more_modules();
        let server = Server::start();
        server.on(&release(&wheel), [Reply::ok(wheel.bytes()).with_ranges()]);
        let pin = unlisted(wheel.pin_with_places()).url(server.url(&release(&wheel)));
        let machine = Machine::new();
        machine.vendor(&naming("page", &pin).expect("good names"), &["norm"]).expect("the members");
        assert!(server.requests().iter().all(|request| request.header("Range").is_none()));
        assert_eq!(server.sent(), wheel.bytes().len());
        assert_eq!(files_under(&machine.lib_dir()), ["norm.so", "page.so"]);
    }

    #[test]
    fn takes_a_module_that_is_named_from_no_wheel_of_another_digest() {
        let (wheel, unlisted) = with_more_modules();
        let server = Server::start();
        let mut other = wheel.bytes();
        other[40] ^= 1;
        server.on(&release(&wheel), [Reply::ok(other).with_ranges()]);
        let pin = unlisted(wheel.pin_with_places()).url(server.url(&release(&wheel)));
        let machine = Machine::new();
        let lock = naming("page", &pin).expect("good names");
        let fault = machine.vendor(&lock, &["norm"]).err().expect("other bytes").to_string();
        assert_says(fault, &["sha256", &pin.sha256]);
        assert!(files_under(&machine.lib_dir()).is_empty());
    }

    #[test]
    fn checks_a_module_of_an_override_against_its_record() {
        let (wheel, unlisted) = with_more_modules();
        let pin = unlisted(Wheel::jit_cache().pin().url("https://example.invalid/a.whl"));
        let machine = Machine::new();
        let path = machine.place("given.whl", wheel.bytes());
        let machine = machine.with(env::JIT_CACHE_WHEEL, path);
        let lock = naming("page", &pin).expect("good names");
        assert_eq!(machine.vendor(&lock, &[]).expect("the member").rows.len(), 1);

        // Another RECORD, the same members.
        let forged = wheel.with_record(|record| record.replace("page.so,sha256=", "page.so,sha256=A"));
        let path = machine.place("forged.whl", forged);
        let machine = machine.with(env::JIT_CACHE_WHEEL, path);
        let fault = machine.vendor(&lock, &[]).err().expect("another digest").to_string();
        assert_says(fault, &["page.so", "RECORD"]);
    }

    #[test]
    fn refuses_a_module_that_the_wheel_does_not_have_with_the_nearest() {
        let (wheel, unlisted) = with_more_modules();
        let (machine, pin) = cached(&wheel);
        let lock = naming("pagr", &unlisted(pin)).expect("a good name");
        let fault = machine.vendor(&lock, &["norm"]).err().expect("no such module").to_string();
        assert_says(fault, &["FLASHINFER_RS_MODULES", "`pagr`", "of the 4 modules", "page, norm, rope", "correct"]);
    }

    #[test]
    fn says_how_to_build_a_module_that_a_local_build_does_not_have() {
        let mut machine = Machine::new();
        let path = machine.place("checkout/local.whl", Wheel::jit_cache().bytes());
        machine.checkout = Some(machine.path("checkout"));
        let record = Record::new("flashinfer_jit_cache", TARGET, &path, sha256(&Wheel::jit_cache().bytes()));
        record.write(&machine.path("checkout")).expect("the record");
        let pin = Wheel::jit_cache().rebuilt().pin().url("https://example.invalid/a.whl");
        let fault = machine.vendor(&naming("page", &pin).expect("a good name"), &[]).err().expect("no such module");
        assert_says(fault.to_string(), &["`page`", "cargo xtask wheel --kernels", "page"]);
    }

    #[test]
    fn proposes_modules_whose_names_have_the_word_first() {
        let (wheel, unlisted) = with_more_modules();
        let (machine, pin) = cached(&wheel);
        let lock = naming("prefill", &unlisted(pin)).expect("a good name");
        let fault = machine.vendor(&lock, &[]).err().expect("no such module").to_string();
        assert_says(fault, &["are gdn_prefill_sm90, "]);
    }

    /// A wheel with the attention modules of one shape beside the usual two.
    fn with_attention() -> (Wheel, Vec<String>) {
        let shape =
            Shape { types: Types::all(Element::BF16), head_dim_qk: 128, head_dim_vo: 128, window: true, cap: false };
        let prefill = Backend::ALL.map(|backend| Uri::BatchPrefill(shape, backend).to_string());
        let names: Vec<String> = prefill.into_iter().chain([Uri::BatchDecode(shape).to_string()]).collect();
        let mut wheel = Wheel::jit_cache();
        for name in &names {
            wheel.members.push((vendoring::modules::path(name).leak(), name.clone().into_bytes()));
        }
        (wheel, names)
    }

    #[test]
    fn takes_attention_modules_that_no_feature_vendors() {
        let (wheel, names) = with_attention();
        let (machine, mut pin) = cached(&wheel);
        pin.members.truncate(2);
        let lock = naming(&names.join(","), &pin).expect("good names");
        machine.vendor(&lock, &[]).expect("the members");
        let mut files: Vec<String> = names.iter().map(|name| format!("{name}.so")).collect();
        files.sort_unstable();
        assert_eq!(files_under(&machine.lib_dir()), files);
    }

    #[test]
    fn refuses_a_misspelled_attention_module_with_the_one_that_is_meant() {
        let (wheel, names) = with_attention();
        for (wrong, meant) in [
            (names[0].replace("swa_True", "swa_False"), &names[0]),
            (names[0].replace("True_", "true_"), &names[0]),
            (names[1].replace("_sm90", "_sm100"), &names[1]),
            (names[2].replace("bf16", "f16"), &names[2]),
        ] {
            let (machine, mut pin) = cached(&wheel);
            pin.members.truncate(2);
            let lock = naming(&wrong, &pin).expect("a good name");
            let fault = machine.vendor(&lock, &[]).err().expect("no such module").to_string();
            assert_says(fault, &[&format!("`{wrong}`"), &format!("of the 5 modules that it has are {meant}, ")]);
        }
    }

    /// As cuBLASLt, which is too large to come with a feature.
    #[test]
    fn vendors_what_the_lock_has_a_name_for_where_it_is_named_and_otherwise_not() {
        let (server, wheel) = (Server::start(), Wheel::cudart());
        server.on(&release(&wheel), [Reply::ok(wheel.bytes())]);
        let pin = wheel.pin_with_digests().url(server.url(&release(&wheel)));
        let text = wheels::lock_text([&pin]).replace("feature = \"cudart\"", "name = \"large\"");
        let lock = |names: &str| {
            let mut lock = lock::Lock::parse(&text, "test.lock").expect("a good lock");
            vendoring::modules::add(&mut lock, &env::Env::fixed([(env::MODULES, names)])).expect("names");
            lock
        };
        let machine = Machine::new();
        assert!(machine.vendor(&lock(""), ALL).expect("nothing to do").rows.is_empty());
        assert!(server.requests().is_empty());
        let lock = lock("large");
        let rows = machine.vendor(&lock, &[]).expect("the library").rows;
        assert_eq!(rows.iter().map(|row| row.soname).collect::<Vec<_>>(), ["libcudart.so.13"]);
    }

    #[test]
    fn refuses_names_that_are_no_modules() {
        let pin = Wheel::jit_cache().pin().url("https://example.invalid/a.whl");
        for (names, part) in [
            ("../norm", "`../norm`"),
            ("..", "`..`"),
            ("a/b", "`a/b`"),
            ("a\\b", "not the name of a module"),
            ("norm.so", "write `page` for page.so"),
            ("page,,rope", "empty name"),
            ("page,", "empty name"),
            (",", "empty name"),
            (" ", "empty name"),
        ] {
            let fault = naming(names, &pin).expect_err(names).to_string();
            assert_says(fault, &["FLASHINFER_RS_MODULES", part]);
        }
        assert_eq!(naming("", &pin).expect("not set").wheels[0].members.len(), 2);
    }

    /// A disk with no room.
    struct Full;

    impl io::Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl vendoring::fetch::Sink for Full {
        fn resume(&mut self) -> io::Result<(vendoring::digest::Hasher, u64)> {
            Ok((vendoring::digest::Hasher::new(), 0))
        }

        fn restart(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn onto_a_full_disk_says_where_to_free_space() {
        let (wheel, pin) = (Wheel::cudart(), Wheel::cudart().pin().url("https://example.invalid/a.whl").parsed());
        let mut archive = Archive::open(io::Cursor::new(wheel.bytes()), "a.whl").expect("a wheel");
        let fault = archive.copy(&pin.members[0], &mut Full, Path::new("/lib/libcudart.so.13"));
        let fault = fault.expect_err("a full disk").to_string();
        assert_says(fault, &["/lib/libcudart.so.13", "free some space"]);
        assert_eq!(pin.members[0].path, CUDART);
    }

    #[test]
    fn of_a_download_onto_a_full_disk_says_to_free_space() {
        let (server, pin) = released(&Wheel::jit_cache());
        let expected = Expected { sha256: pin.parsed().sha256, size: None };
        let url = server.url(&release(&Wheel::jit_cache()));
        let name = Path::new("/cache/a.whl");
        let client = Client::new(&Machine::new().env());
        let fault = client.download(&url, &expected, &mut Full, name, &mut |_, _| {}).expect_err("a full disk");
        assert!(!fault.is_unavailable(), "another source would not help");
        assert_says(fault.to_string(), &["writing /cache/a.whl", "free some space"]);
    }
}

mod what_a_build_leaves {
    use super::*;
    use vendoring::emit::{self, Row};
    use vendoring::wheel::Extracted;

    fn row(wheel: &lock::Wheel) -> Row<'_> {
        let extracted = Extracted { path: "/out/lib/norm.so".into(), sha256: sha256(b"norm"), size: 4 };
        let (version, wheel_sha256) = (wheel.version.clone(), wheel.sha256);
        Row { wheel, version, wheel_sha256, source: Source::Override, soname: "norm.so", extracted }
    }

    fn pinned() -> lock::Wheel {
        Wheel::jit_cache().pin().url("https://example.invalid/a.whl").parsed()
    }

    fn lock() -> lock::Lock {
        wheels::lock([&Wheel::jit_cache().pin().url("https://example.invalid/a.whl")])
    }

    #[test]
    fn is_a_table_of_what_was_vendored() {
        let (machine, wheel) = (Machine::new(), pinned());
        let missing = Missing { sonames: vec!["libcudart.so.13".to_owned()], reason: "no \"cudart\"".to_owned() };
        emit::table(&machine.path("out"), &[row(&wheel)], &[missing], &lock(), false).expect("the table");
        let text = fs::read_to_string(machine.path("out/vendored.rs")).expect("the table");
        assert_says(
            &text,
            &[
                "LIBRARIES: &[Vendored] = &[",
                "name: \"norm.so\"",
                "distribution: \"flashinfer_jit_cache\"",
                "version: \"0.6.3+cu130\"",
                &format!("wheel_sha256: Digest({:?})", wheel.sha256.0),
                &format!(" sha256: Digest({:?})", sha256(b"norm").0),
                "size: 4",
                "source: Source::Pinned",
                "built_at: \"/out/lib/norm.so\", built_below: \"\"",
                "MISSING: &[(&[&str], &str)] = &[",
                "(&[\"libcudart.so.13\"], \"no \\\"cudart\\\"\"),",
                "FEATURES: &[(&str, &str)] = &[",
                "(\"norm.so\", \"norm\"),",
            ],
        );
    }

    /// A project that is moved is not built again, and its programs still lie beside cargo's folder `build`.
    #[test]
    fn says_where_a_library_lies_from_the_programs_on() {
        let (machine, wheel) = (Machine::new(), pinned());
        let mut row = row(&wheel);
        row.extracted.path = "/home/build/app/target/debug/build/flashinfer-rs-0123/out/lib/norm.so".into();
        emit::table(&machine.path("out"), &[row], &[], &lock(), false).expect("the table");
        let text = fs::read_to_string(machine.path("out/vendored.rs")).expect("the table");
        assert_says(&text, &["built_below: \"build/flashinfer-rs-0123/out/lib/norm.so\""]);
    }

    #[test]
    fn has_no_path_of_this_machine_where_libraries_are_embedded() {
        let (machine, wheel) = (Machine::new(), pinned());
        emit::table(&machine.path("out"), &[row(&wheel)], &[], &lock(), true).expect("the table");
        let text = fs::read_to_string(machine.path("out/vendored.rs")).expect("the table");
        assert_says(&text, &["built_at: \"\", built_below: \"\""]);
    }

    #[test]
    fn is_without_the_libraries_of_an_earlier_build() {
        let (machine, wheel) = (Machine::new(), pinned());
        machine.place("lib/norm.so", "kept");
        machine.place("lib/gdn_prefill_sm90.so", "of an earlier build");
        emit::prune(&machine.lib_dir(), &[row(&wheel).soname]).expect("pruned");
        assert_eq!(files_under(&machine.lib_dir()), ["norm.so"]);
    }
}

mod secrets {
    use super::*;
    use vendoring::fetch::redacted;

    #[track_caller]
    fn assert_keeps(message: &str) {
        for secret in ["hunter2", "alice", "dHVubmVs", "YWxpY2U"] {
            assert!(!message.contains(secret), "this message tells `{secret}`:\n{message}");
        }
    }

    /// What a machine says whose index has credentials, of a wheel that is not to be had from there.
    fn fault_at(url: String) -> String {
        let machine = Machine::new().with("PIP_INDEX_URL", url);
        machine.fault(&Wheel::jit_cache().pin().purl("pkg:pypi/flashinfer-jit-cache@0.6.3").parsed())
    }

    #[test]
    fn in_an_address_are_not_shown() {
        let shown = redacted("https://alice:hunter2@example.invalid:8443/simple/a.whl?token=dHVubmVs");
        assert_eq!(shown, "https://example.invalid:8443/simple/a.whl");
    }

    #[test]
    fn in_what_cannot_be_parsed_are_not_shown() {
        assert_keeps(&redacted("http://alice:hunter2@[bad/"));
    }

    /// Whoever forgets `https://` in front writes an address whose scheme is the user's name.
    #[test]
    fn in_an_address_without_a_scheme_are_not_shown() {
        assert_keeps(&redacted("alice:hunter2@example.invalid/simple"));
    }

    #[test]
    fn of_an_index_reach_it() {
        let server = Server::start();
        fault_at(server.url_as("alice", "hunter2", "/simple"));
        // `alice:hunter2` as RFC 7617 writes it.
        assert_eq!(server.requests()[0].header("Authorization"), Some("Basic YWxpY2U6aHVudGVyMg=="));
    }

    #[test]
    fn of_an_index_do_not_go_along_with_a_redirect_to_another_server() {
        let (server, other) = (Server::start(), Server::start());
        server.on("/simple/flashinfer-jit-cache/", [Reply::redirect(&other.url("/elsewhere"))]);
        fault_at(server.url_as("alice", "hunter2", "/simple"));
        let requests = other.requests();
        assert_eq!(requests.len(), 1);
        assert_eq!(requests[0].header("Authorization"), None);
    }

    #[test]
    fn of_an_index_do_not_go_along_with_a_link_to_another_server() {
        let (server, other) = (Server::start(), Server::start());
        let link = format!("<a href=\"{}\">it</a>", other.url(&release(&Wheel::jit_cache())));
        server.on("/simple/flashinfer-jit-cache/", [Reply::ok(link)]);
        fault_at(server.url_as("alice", "hunter2", "/simple"));
        let requests = other.requests();
        assert_eq!(requests.len(), 1);
        assert_eq!(requests[0].header("Authorization"), None);
    }

    #[test]
    fn of_an_index_that_refuses_are_not_shown() {
        let server = Server::start();
        server.on("/simple/flashinfer-jit-cache/", [Reply::status(403)]);
        let fault = fault_at(server.url_as("alice", "hunter2", "/simple"));
        assert_says(&fault, &["answered 403", "PIP_INDEX_URL"]);
        assert_keeps(&fault);
    }

    #[test]
    fn of_an_index_that_is_down_are_not_shown() {
        let refusing = Refusing::start();
        let fault = fault_at(format!("http://alice:hunter2@{}/simple", refusing.authority()));
        assert_says(&fault, &["refused", &refusing.authority()]);
        assert_keeps(&fault);
    }

    #[test]
    fn of_an_index_that_is_misspelt_are_not_shown() {
        for url in ["http://alice:hunter2@[bad/", "alice:hunter2@example.invalid/simple", "ftp://alice:hunter2@x/"] {
            let fault = fault_at(url.to_owned());
            assert_says(&fault, &["PIP_INDEX_URL", "neither an http, https or file address"]);
            assert_keeps(&fault);
        }
    }

    #[test]
    fn of_an_index_are_not_shown_when_the_file_it_links_to_is_not_there() {
        let (server, file) = (Server::start(), Wheel::jit_cache().file());
        let link = format!("<a href=\"{file}?token=dHVubmVs\">it</a>");
        server.on("/simple/flashinfer-jit-cache/", [Reply::ok(link)]);
        let fault = fault_at(server.url_as("alice", "hunter2", "/simple"));
        assert_says(&fault, &[&server.url(&format!("/simple/flashinfer-jit-cache/{file}")), "answered 404"]);
        assert_keeps(&fault);
    }

    #[test]
    fn in_the_lock_are_not_shown() {
        let server = Server::start();
        let pin = Wheel::jit_cache().pin();
        let pin = pin.url(server.url_as("alice", "hunter2", "/a.whl?token=dHVubmVs"));
        let pin = pin.index(server.url_as("alice", "hunter2", "/index/?token=dHVubmVs"));
        let fault = Machine::new().fault(&pin.parsed());
        assert_says(&fault, &[&server.url("/a.whl"), &server.url("/index/")]);
        assert_keeps(&fault);
    }

    #[test]
    fn of_a_mirror_are_not_shown() {
        let (_host, pin) = released(&Wheel::jit_cache());
        let mirror = Server::start();
        let machine = Machine::new().with(env::MIRROR, mirror.url_as("alice", "hunter2", ""));
        let fault = machine.fault(&pin.parsed());
        assert_says(&fault, &[&mirror.url(&release(&Wheel::jit_cache())), "answered 404"]);
        assert_keeps(&fault);
    }

    #[test]
    fn of_a_misspelt_mirror_are_not_shown() {
        let (_host, pin) = released(&Wheel::jit_cache());
        for mirror in ["alice:hunter2@example.invalid", "http://alice:hunter2@[bad"] {
            assert_keeps(&Machine::new().with(env::MIRROR, mirror).fault(&pin.parsed()));
        }
    }
}
