//! Real builds of a crate that depends on this one, in a network namespace without interfaces: `cargo build` finds the
//! wheels wherever a user may have put them, and says where it looked when they are nowhere. Where there are no such
//! namespaces these tests are ignored, with the reason.
//!
//! The builds take turns in one target folder, which stays, so that what they depend on is compiled once. The wheels
//! are the two small ones; they are found as any build finds them, and downloaded the first time.
#![cfg(target_os = "linux")]

#[path = "../build/mod.rs"]
mod vendoring;

#[path = "support/native.rs"]
mod native;
#[macro_use]
#[path = "support/needs.rs"]
mod needs;

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};
use std::sync::LazyLock;

use needs::Need;
use serde::Deserialize;
use tempfile::TempDir;

use vendoring::digest::hash_reader;
use vendoring::env::{self, Env};
use vendoring::lock::{Lock, Wheel};
use vendoring::source::Ladder;
use vendoring::store::Store;
use vendoring::wheel::Wheel as Archive;

const CHECKOUT: &str = env!("CARGO_MANIFEST_DIR");
const SMALL: [&str; 2] = ["apache_tvm_ffi", "nvidia_cuda_runtime"];

fn main() -> ExitCode {
    let tests = needing![Need::NoNetwork;
        builds_from_overrides,
        builds_from_a_folder_of_wheels,
        builds_from_wheels_beside_the_manifest,
        builds_from_the_cache_that_an_earlier_build_filled,
        builds_from_a_cache_of_whole_wheels,
        fails_with_nothing_and_names_every_place_and_the_remedy,
        builds_with_nothing_where_no_artifacts_are_wanted,
        builds_nothing_twice,
        a_build_without_cudas_runtime_looks_again_once_it_is_there_and_its_program_says_why_it_is_not,
        a_program_calls_the_kernels_that_its_project_pins,
        a_program_carries_its_kernels_in_itself_where_that_is_wanted,
        a_project_names_its_lock_in_cargos_configuration,
        a_kernel_that_registers_something_while_it_is_loaded_is_not_loaded,
        a_project_that_is_moved_runs_without_a_build_or_says_how_to_get_one,
        fails_with_a_changed_byte_where_strict_is_set,
        builds_from_a_package_that_cannot_be_written,
    ];
    needs::main(include_str!("hermetic.rs"), &tests)
}

/// The two small wheels of this machine's kind, pinned, and where they are.
static WHEELS: LazyLock<Vec<(Wheel, PathBuf)>> = LazyLock::new(|| {
    let target = format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS);
    let lock = Lock::read(&Path::new(CHECKOUT).join("artifacts.lock")).expect("the lock");
    let env = Env::process();
    let mut silent = |_, _| {};
    let mut ladder = Ladder::new(&env, &mut silent);
    let small = lock.for_target(&target).filter(|wheel| SMALL.contains(&wheel.distribution.as_str()));
    let find = |wheel: &Wheel| {
        (wheel.clone(), ladder.find_pinned(wheel, &std::env::temp_dir()).expect("the pinned wheel").path)
    };
    small.map(find).collect()
});

/// A crate that depends on this one; who holds it builds.
struct Dependent {
    folder: PathBuf,
    temp: TempDir,
    _turn: File,
}

/// The part of cargo's messages that is of use here.
#[derive(Deserialize)]
struct Message {
    package_id: Option<String>,
    out_dir: Option<PathBuf>,
}

impl Dependent {
    /// On the checkout.
    fn new() -> Self {
        Self::on(Path::new(CHECKOUT))
    }

    /// On a package in this folder. Whatever an earlier build made of it is gone.
    fn on(package: &Path) -> Self {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("hermetic");
        // A file, since the folder also belongs to other runs of these tests.
        let turn = File::create(folder.with_extension("lock")).expect("the lock file");
        turn.lock().expect("the lock");
        let dependent = Self { folder, temp: tempfile::tempdir().expect("a temporary folder"), _turn: turn };
        let manifest = format!(
            "[package]\nname = \"dependent\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\n[workspace]\n\n\
             [dependencies]\nflashinfer-rs = {{ path = {package:?}, default-features = false, features = [\"cudart\"] }}\n"
        );
        dependent.write("Cargo.toml", manifest);
        dependent.write("src/lib.rs", "//! Depends.\npub use flashinfer_rs as _;\n");
        // The versions that this checkout was built with: they are on this machine.
        fs::copy(Path::new(CHECKOUT).join("Cargo.lock"), dependent.folder.join("Cargo.lock")).expect("the lock file");
        for (wheel, _) in WHEELS.iter() {
            let _ = fs::remove_file(dependent.folder.join(&wheel.file));
        }
        for own in ["kernels.lock", "kernels", ".cargo"].map(|name| dependent.folder.join(name)) {
            let _ = fs::remove_file(&own).or_else(|_| fs::remove_dir_all(&own));
        }
        dependent.clean();
        dependent
    }

    fn write(&self, path: &str, text: impl AsRef<[u8]>) {
        let path = self.folder.join(path);
        fs::create_dir_all(path.parent().expect("a folder")).expect("the folder");
        fs::write(path, text).expect("the file");
    }

    /// A folder of its own for this test.
    fn path(&self, name: &str) -> PathBuf {
        self.temp.path().join(name)
    }

    /// A folder with both wheels.
    fn wheels(&self) -> PathBuf {
        let folder = self.path("wheels");
        fs::create_dir_all(&folder).expect("the folder");
        for (wheel, path) in WHEELS.iter() {
            fs::copy(path, folder.join(&wheel.file)).expect("the wheel");
        }
        folder
    }

    fn clean(&self) {
        let output = self.cargo(&["clean", "--offline", "--package", "flashinfer-rs"], &[], "");
        assert!(output.status.success(), "{}", text(&output));
    }

    /// Runs cargo in a network namespace without interfaces, with an empty cache unless the variables name one, after a
    /// script.
    fn cargo(&self, arguments: &[&str], variables: &[(&str, OsString)], script: &str) -> Output {
        self.cargo_in(&self.folder, arguments, variables, script)
    }

    /// As [`cargo`](Self::cargo), in this folder.
    fn cargo_in(&self, folder: &Path, arguments: &[&str], variables: &[(&str, OsString)], script: &str) -> Output {
        let script = format!("set -e; {script}\nexec \"$@\"");
        let cargo = std::env::var_os("CARGO").unwrap_or("cargo".into());
        let (program, flags) = Need::NoNetwork.starter().split_first().expect("a program");
        let mut command = Command::new(program);
        command.args(flags).args(["sh", "-c", &script, "sh"]).arg(cargo).args(arguments);
        // Nothing of what this machine has configured, but for what cargo and compilers need.
        let needed = ["PATH", "HOME", "TMPDIR", "CARGO_HOME", "RUSTUP_HOME", "RUSTUP_TOOLCHAIN", "CC", "AR"];
        command.env_clear().envs(needed.iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
        command.env(env::CACHE_DIR, self.path("cache")).env("PIP_CONFIG_FILE", "/dev/null").env("UV_NO_CONFIG", "1");
        // Whatever cargo's configuration says.
        command.env("CARGO_TARGET_DIR", folder.join("target")).env("CARGO_BUILD_BUILD_DIR", folder.join("target"));
        command.envs(variables.iter().map(|(name, value)| (name, value)));
        command.current_dir(folder).output().expect("cargo, in a namespace of its own")
    }

    fn build(&self, variables: &[(&str, OsString)]) -> Output {
        self.build_after("", variables)
    }

    fn build_after(&self, script: &str, variables: &[(&str, OsString)]) -> Output {
        let arguments = ["build", "--offline", "--verbose", "--message-format=json-render-diagnostics"];
        self.cargo(&arguments, variables, script)
    }

    /// As [`build`](Self::build), in the way that a build without a network should be: cargo told so.
    fn offline(&self, variables: &[(&str, OsString)]) -> Output {
        let mut variables = variables.to_vec();
        variables.push((env::CARGO_OFFLINE, "true".into()));
        self.build(&variables)
    }
}

/// All that a program wrote.
fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// The folder of this crate's build script, in a build that succeeded.
#[track_caller]
fn out_dir(output: &Output) -> PathBuf {
    assert!(output.status.success(), "{}", text(output));
    let messages = String::from_utf8_lossy(&output.stdout);
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Message>(line).ok());
    let ours =
        |message: Message| message.package_id.is_some_and(|id| id.contains("flashinfer-rs")).then_some(message.out_dir);
    messages.filter_map(ours).flatten().next().expect("the build script's folder")
}

/// That the build vendored both libraries, with their locked digests, from this source.
#[track_caller]
fn vendored(output: &Output, source: &str) {
    let out_dir = out_dir(output);
    // What cargo keeps of what the build script says.
    let said = fs::read_to_string(out_dir.with_file_name("stderr")).expect("what the build script says");
    let table = fs::read_to_string(out_dir.join("vendored.rs")).expect("the table");
    for (wheel, _) in WHEELS.iter() {
        let member = &wheel.members[0];
        let line = format!("{} of {} {} ({source})", member.soname, wheel.distribution, wheel.version);
        assert!(said.contains(&line), "this does not say `{line}`:\n{said}");
        assert!(table.contains(&format!("name: {:?}", member.soname)), "{table}");
        let library = File::open(out_dir.join("lib").join(&member.soname)).expect("the library");
        assert_eq!(Some(hash_reader(library).expect("its bytes").0), member.sha256, "{}", member.soname);
    }
}

/// That the build failed, and what it said.
#[track_caller]
fn failed(output: &Output, parts: &[&str]) {
    let text = text(output);
    assert!(!output.status.success(), "{text}");
    for part in parts {
        assert!(text.contains(part), "this does not say `{part}`:\n{text}");
    }
}

/// The overrides' variables, with a wheel of this folder each.
fn overrides(folder: &Path) -> Vec<(&'static str, OsString)> {
    let variable = |wheel: &Wheel| env::wheel_override(&wheel.distribution).expect("a variable");
    WHEELS.iter().map(|(wheel, _)| (variable(wheel), folder.join(&wheel.file).into())).collect()
}

fn builds_from_overrides() {
    let dependent = Dependent::new();
    vendored(&dependent.offline(&overrides(&dependent.wheels())), "override");
}

fn builds_from_a_folder_of_wheels() {
    let dependent = Dependent::new();
    vendored(&dependent.offline(&[(env::WHEEL_DIR, dependent.wheels().into())]), "directory");
}

fn builds_from_wheels_beside_the_manifest() {
    let dependent = Dependent::new();
    for (wheel, path) in WHEELS.iter() {
        fs::copy(path, dependent.folder.join(&wheel.file)).expect("the wheel");
    }
    vendored(&dependent.offline(&[]), "directory");
}

fn builds_from_the_cache_that_an_earlier_build_filled() {
    let dependent = Dependent::new();
    // pip's folder of wheels stands in for the network.
    let links = [("PIP_FIND_LINKS", dependent.wheels().into()), ("PIP_NO_INDEX", "1".into())];
    vendored(&dependent.build(&links), "network");
    dependent.clean();
    vendored(&dependent.offline(&[]), "cache");
}

/// As container images do: wheels put where the cache has them.
fn builds_from_a_cache_of_whole_wheels() {
    let dependent = Dependent::new();
    let store = Store::new(dependent.path("cache"));
    for (wheel, path) in WHEELS.iter() {
        let cached = store.path(&wheel.sha256, &wheel.file);
        fs::create_dir_all(cached.parent().expect("a folder")).expect("the folder");
        fs::copy(path, cached).expect("the wheel");
    }
    vendored(&dependent.offline(&[]), "cache");
}

fn fails_with_nothing_and_names_every_place_and_the_remedy() {
    let dependent = Dependent::new();
    let (wheel, cache) = (&WHEELS[0].0, dependent.path("cache").display().to_string());
    let folder = format!("the folder {}", dependent.folder.display());
    let everywhere = [
        wheel.file.as_str(),
        &wheel.sha256.to_string(),
        "FLASHINFER_RS_TVMFFI_WHEEL (not set)",
        "FLASHINFER_RS_WHEEL_DIR (not set)",
        &folder,
        &cache,
        " and set FLASHINFER_RS_TVMFFI_WHEEL to its path",
        "FLASHINFER_RS_SKIP_VENDOR=1",
    ];
    let output = dependent.offline(&[]);
    failed(&output, &everywhere);
    failed(
        &output,
        &["not the network, since CARGO_NET_OFFLINE is set", "Remedy: get it from pkg:pypi/apache-tvm-ffi@0.1.3 and"],
    );
    // That there is no network is seen by asking for it.
    let output = dependent.build(&[("PIP_INDEX_URL", "http://127.0.0.1:9/simple".into())]);
    failed(&output, &everywhere);
    let asked = "pkg:pypi/apache-tvm-ffi@0.1.3 at PIP_INDEX_URL: http://127.0.0.1:9/simple/apache-tvm-ffi/";
    failed(&output, &["Remedy: get it from one of the addresses below and", asked, "Network is unreachable"]);
}

fn builds_with_nothing_where_no_artifacts_are_wanted() {
    let output = Dependent::new().offline(&[(env::SKIP_VENDOR, "1".into())]);
    assert!(output.status.success(), "{}", text(&output));
}

fn builds_nothing_twice() {
    let dependent = Dependent::new();
    let variables = [(env::WHEEL_DIR, dependent.wheels().into())];
    vendored(&dependent.offline(&variables), "directory");
    let output = dependent.offline(&variables);
    assert!(output.status.success() && text(&output).contains("Fresh flashinfer-rs"), "{}", text(&output));
}

/// A program that asks for kernels by their names, and says what it gets.
const KERNEL_USER: &str = r#"use flashinfer_rs::{FlashInferRuntime, PinnedKernel, Result, RuntimeConfig};

fn call(runtime: &'static FlashInferRuntime, name: &str) -> Result<i64> {
    let function = runtime.kernel(name)?.function(PinnedKernel::named(name)?.entry)?;
    // SAFETY: the fixture's function takes nothing and returns a number.
    unsafe { function.typed::<(), i64>().call(()) }
}

fn main() -> Result<()> {
    let runtime = FlashInferRuntime::initialize(RuntimeConfig::default())?;
    for name in std::env::args().skip(1) {
        match call(runtime, &name) {
            Ok(answer) => println!("{name} answered {answer}"),
            Err(error) => println!("{name}: {error}"),
        }
    }
    print!("{}", runtime.report());
    Ok(())
}
"#;

impl Dependent {
    /// Puts the program and a kernel into the project, whose library is this fixture, and pins it under a name.
    fn with_kernel(&self, name: &str, fixture: &str) {
        self.write("examples/kernels.rs", KERNEL_USER);
        self.write(
            "kernels/answer/kernel_metadata.txt",
            "Entry Symbol: answer\nDefinition: the_answer\nSolution: by_hand\n",
        );
        native::compile(fixture, "kernel.so", &[], &self.folder.join("kernels/answer"));
        self.pin(name);
    }

    fn pin(&self, name: &str) {
        let target = format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS);
        let mut lock = format!(
            "version = 1\n\n[[kernel]]\nname = {name:?}\ntarget = {target:?}\ndefinition = \"the_answer\"\nentry = \
             \"answer\"\nsources = [{{ path = \"kernels/answer\" }}]\n"
        );
        for file in ["kernel.so", "kernel_metadata.txt"] {
            let library = File::open(self.folder.join("kernels/answer").join(file)).expect("the file");
            let (sha256, size) = hash_reader(library).expect("its bytes");
            lock += &format!("\n[[kernel.file]]\nname = {file:?}\nsize = {size}\nsha256 = \"{sha256}\"\n");
        }
        self.write("kernels.lock", lock);
    }

    /// Runs the program, which asks for these kernels.
    fn asks_for(&self, names: &[&str], variables: &[(&str, OsString)], features: &str) -> Output {
        // Copied once: a file that is newer than the last build makes another.
        let wheels = Some(self.path("wheels")).filter(|folder| folder.exists()).unwrap_or_else(|| self.wheels());
        let mut all = vec![(env::WHEEL_DIR, wheels.into()), (env::CARGO_OFFLINE, "true".into())];
        all.extend(variables.iter().cloned());
        let arguments = ["run", "--offline", "--verbose", "--features", features, "--example", "kernels", "--"];
        self.cargo(&[&arguments, names].concat(), &all, "")
    }
}

/// That a program ran, and what it said.
#[track_caller]
fn said(output: &Output, parts: &[&str]) {
    let text = text(output);
    assert!(output.status.success(), "{text}");
    for part in parts {
        assert!(text.contains(part), "this does not say `{part}`:\n{text}");
    }
}

fn a_program_calls_the_kernels_that_its_project_pins() {
    let dependent = Dependent::new();
    dependent.with_kernel("answer", "loadable.c");
    // From the workspace on.
    let variables = [(env::KERNELS, "kernels.lock".into())];
    let run = |names: &[&str]| dependent.asks_for(names, &variables, "");
    let first = run(&["answer", "anser", "../answer"]);
    let file = "out/lib/answer.kernel.so";
    said(
        &first,
        &[
            "answer answered 42",
            "anser: no kernel anser was vendored; did you mean answer? these were: answer; pin it by",
            "../answer: no kernel ../answer was vendored",
            "pinned kernel answer ",
            ", computes the_answer, without GPU code, loaded from ",
            file,
        ],
    );
    said(&run(&["answer"]), &["Fresh flashinfer-rs", "answer answered 42"]);

    // Another lock is another build.
    dependent.pin("forty_two");
    said(&run(&["answer", "forty_two"]), &["Compiling flashinfer-rs", "no kernel answer was", "forty_two answered 42"]);

    // A kernel that changes is refused, by both digests; one that comes back is taken again.
    let library = dependent.folder.join("kernels/answer/kernel.so");
    let (old, changed) = (fs::read(&library).expect("the library"), b"\x7fELF of somebody else");
    fs::write(&library, changed).expect("other bytes");
    let digest = |bytes: &[u8]| hash_reader(bytes).expect("a digest").0.to_string();
    failed(&run(&["forty_two"]), &["the kernel forty_two", &digest(changed), &digest(&old), "--replace"]);
    fs::remove_file(&library).expect("gone");
    failed(&run(&["forty_two"]), &["the kernel forty_two", "was found nowhere", "FLASHINFER_RS_WHEEL_DIR"]);
    fs::write(&library, &old).expect("the old bytes");
    said(&run(&["forty_two"]), &["forty_two answered 42"]);

    // What is loaded is what was pinned, whatever became of the file since.
    for entry in fs::read_dir(dependent.folder.join("target/debug/build")).expect("the folder").flatten() {
        let vendored = entry.path().join("out/lib/forty_two.kernel.so");
        if vendored.exists() {
            fs::write(vendored, changed).expect("other bytes");
        }
    }
    let swapped = run(&["forty_two"]);
    said(
        &swapped,
        &["Fresh flashinfer-rs", &digest(changed), "is not the forty_two.kernel.so that this program was built with"],
    );
}

fn a_program_carries_its_kernels_in_itself_where_that_is_wanted() {
    let dependent = Dependent::new();
    dependent.with_kernel("answer", "loadable.c");
    // Here as FlashInfer-Bench's, to be bound to a definition.
    let asked = "runtime.kernel(name)?.function(PinnedKernel::named(name)?.entry)?";
    let pinned = "flashinfer_rs::bench::Kernel::pinned(PinnedKernel::named(name)?)?.function().clone()";
    assert!(KERNEL_USER.contains(asked));
    let program = KERNEL_USER.replace(asked, pinned).replace("runtime: &'static", "_: &'static");
    dependent.write("examples/kernels.rs", &program);
    let path = dependent.folder.join("kernels.lock");
    let features = "flashinfer-rs/embed,flashinfer-rs/bench";
    let output = dependent.asks_for(&["answer"], &[(env::KERNELS, path.into())], features);
    said(&output, &["answer answered 42", "loaded from (embedded)/answer.kernel.so"]);
    // Nothing of it is needed beside the program, whose name for the library is not a path of this machine.
    let program = fs::read(dependent.folder.join("target/debug/examples/kernels")).expect("the program");
    let vendored = b"out/lib/answer.kernel.so";
    assert!(!program.windows(vendored.len()).any(|part| part == vendored));
}

/// As docs/kernel-lock.md recommends it.
fn a_project_names_its_lock_in_cargos_configuration() {
    let dependent = Dependent::new();
    dependent.with_kernel("answer", "loadable.c");
    let run = || dependent.asks_for(&["answer"], &[], "");
    said(&run(), &["no kernel answer was vendored; none was; pin it by"]);
    dependent
        .write(".cargo/config.toml", "[env]\nFLASHINFER_RS_KERNELS = { value = \"kernels.lock\", relative = true }\n");
    said(&run(), &["answer answered 42"]);
    fs::remove_file(dependent.folder.join("kernels.lock")).expect("gone");
    failed(&run(), &["FLASHINFER_RS_KERNELS=", "names no file"]);
}

fn a_kernel_that_registers_something_while_it_is_loaded_is_not_loaded() {
    let dependent = Dependent::new();
    dependent.with_kernel("answer", "registers.c");
    let output = dependent.asks_for(&["answer"], &[(env::KERNELS, "kernels.lock".into())], "");
    said(&output, &["answer: ", "cannot be loaded as a module", "TVMFFIFunctionSetGlobal", "Module::open"]);
}

/// Where cargo shows no warning, as of every dependency that is no path.
fn a_build_without_cudas_runtime_looks_again_once_it_is_there_and_its_program_says_why_it_is_not() {
    let dependent = Dependent::new();
    dependent.write("examples/kernels.rs", KERNEL_USER);
    let folder = dependent.wheels();
    let (wheel, _) = WHEELS.iter().find(|(wheel, _)| wheel.optional).expect("the wheel of CUDA's runtime");
    let (there, away) = (folder.join(&wheel.file), dependent.path(&wheel.file));
    let variables = [(env::WHEEL_DIR, folder.into()), (env::CARGO_OFFLINE, "true".into())];
    let run = || dependent.cargo(&["run", "--offline", "--verbose", "--example", "kernels"], &variables, "");
    fs::rename(&there, &away).expect("away");
    let reason = format!(
        "the build found no wheel of nvidia_cuda_runtime {} (the network was not asked, since CARGO_NET_OFFLINE was set)",
        wheel.version
    );
    let first = run();
    said(&first, &["Compiling flashinfer-rs", &format!("missing: {reason}")]);
    // Where this machine has another one, that is used.
    let driver = text(&first);
    assert!(!driver.contains("libcudart.so.13 was not found") || driver.matches(&reason).count() == 2, "{driver}");
    said(&run(), &["Fresh flashinfer-rs", &reason]);

    let vendored = format!("from nvidia_cuda_runtime {} (pinned", wheel.version);
    fs::copy(&away, &there).expect("there");
    said(&run(), &["Compiling flashinfer-rs", &vendored]);
    said(&run(), &["Fresh flashinfer-rs", &vendored]);

    fs::remove_file(&there).expect("gone");
    said(&run(), &["Compiling flashinfer-rs", &reason]);
    fs::copy(&away, dependent.folder.join(&wheel.file)).expect("beside the manifest");
    said(&run(), &["Compiling flashinfer-rs", &vendored]);
}

/// A folder under another name, until this is dropped.
struct Renamed<'a> {
    from: &'a Path,
    to: PathBuf,
}

impl<'a> Renamed<'a> {
    fn new(from: &'a Path) -> Self {
        let to = from.with_extension("moved");
        // Of an earlier run that was killed.
        let _ = fs::remove_dir_all(&to);
        fs::rename(from, &to).expect("another name");
        Self { from, to }
    }
}

impl Drop for Renamed<'_> {
    fn drop(&mut self) {
        let _ = fs::rename(&self.to, self.from);
    }
}

fn a_project_that_is_moved_runs_without_a_build_or_says_how_to_get_one() {
    let dependent = Dependent::new();
    // An example, so that the other tests do not build it.
    let program = "use flashinfer_rs::{FlashInferRuntime, RuntimeConfig};\n\nfn main() {\n    \
                   match FlashInferRuntime::initialize(RuntimeConfig::default()) {\n        \
                   Ok(runtime) => runtime.artifacts().iter().for_each(|artifact| println!(\"{artifact}\")),\n        \
                   Err(error) => println!(\"{error}\"),\n    }\n}\n";
    dependent.write("examples/app.rs", program);
    let variables = [(env::WHEEL_DIR, dependent.wheels().into()), (env::CARGO_OFFLINE, "true".into())];
    let run = |folder: &Path| {
        let arguments = ["run", "--offline", "--verbose", "--example", "app"];
        let output = dependent.cargo_in(folder, &arguments, &variables, "");
        assert!(output.status.success(), "{}", text(&output));
        text(&output)
    };
    let loaded_from = |folder: &Path| format!("loaded from {}/target/debug/build/", folder.display());
    let first = run(&dependent.folder);
    assert!(first.contains(&loaded_from(&dependent.folder)), "{first}");

    let renamed = Renamed::new(&dependent.folder);
    let moved = run(&renamed.to);
    assert!(moved.contains("Fresh flashinfer-rs") && moved.contains(&loaded_from(&renamed.to)), "{moved}");

    // As where a target folder came back without its build scripts' output.
    let build = renamed.to.join("target/debug/build");
    for entry in fs::read_dir(&build).expect("the folder").flatten() {
        let _ = fs::remove_dir_all(entry.path().join("out/lib"));
    }
    let stripped = run(&renamed.to);
    for part in
        ["Fresh flashinfer-rs", "libtvm_ffi.so was not found", "cargo clean -p flashinfer-rs", "`cargo install`"]
    {
        assert!(stripped.contains(part), "this does not say `{part}`:\n{stripped}");
    }
}

fn fails_with_a_changed_byte_where_strict_is_set() {
    let dependent = Dependent::new();
    let folder = dependent.wheels();
    let wheel = &WHEELS[0].0;
    let path = folder.join(&wheel.file);
    let mut bytes = fs::read(&path).expect("the wheel");
    let archive = Archive::open(Cursor::new(&bytes), wheel.file.clone()).expect("the wheel");
    let place = archive.place(&wheel.members[0].path).expect("its library");
    bytes[(place.offset + place.length / 2) as usize] ^= 1;
    fs::write(&path, &bytes).expect("the changed wheel");
    let mut variables = overrides(&folder);
    variables.push((env::STRICT, "1".into()));
    let (pinned, found) = (wheel.sha256.to_string(), hash_reader(&bytes[..]).expect("its digest").0.to_string());
    let output = dependent.offline(&variables);
    failed(&output, &["FLASHINFER_RS_TVMFFI_WHEEL", "FLASHINFER_RS_STRICT is set", &pinned, &found]);
}

/// As `cargo vendor` and the package folders of distributions have it.
fn builds_from_a_package_that_cannot_be_written() {
    let temp = tempfile::tempdir().expect("a temporary folder");
    let mut package = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    package.args([
        "package",
        "--offline",
        "--no-verify",
        "--allow-dirty",
        "--package",
        "flashinfer-rs",
        "--target-dir",
    ]);
    let output = package.arg(temp.path()).current_dir(CHECKOUT).output().expect("cargo");
    assert!(output.status.success(), "{}", text(&output));
    let name = format!("flashinfer-rs-{}", env!("CARGO_PKG_VERSION"));
    let archive = temp.path().join("package").join(format!("{name}.crate"));
    let unpacked = Command::new("tar").arg("-xzf").arg(archive).arg("-C").arg(temp.path()).status();
    assert!(unpacked.expect("tar").success());

    let folder = temp.path().join(name);
    let dependent = Dependent::on(&folder);
    let read_only = format!(
        "mount --bind {0:?} {0:?}; mount -o remount,ro,bind {0:?}; if touch {0:?}/file 2> /dev/null; then exit 99; fi",
        folder.display().to_string()
    );
    let variables = [(env::WHEEL_DIR, dependent.wheels().into()), (env::CARGO_OFFLINE, "true".into())];
    vendored(&dependent.build_after(&read_only, &variables), "directory");
}
