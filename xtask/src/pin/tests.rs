//! Every test has its own folders and environment, and a C compiler makes the kernels.

use std::process::Command;

use tempfile::TempDir;

use super::*;

#[path = "../../../tests/support/wheels.rs"]
mod wheels;

use crate::http::{Reply, Server};

const METADATA: &str = "Entry Symbol: answer\nDefinition: gemm_n16\nSolution: by_hand\n";
const DEFINITION: &str = "{\"name\": \"gemm_n16\", \"axes\": {}}";
const SOLUTION: &str = "{\"name\": \"by_hand\", \"definition\": \"gemm_n16\", \"author\": \"me\", \"spec\": {\"language\": \"cuda\", \
                        \"entry_point\": \"main.cu::answer\", \"destination_passing_style\": true}, \"sources\": []}";

struct Project {
    temp: TempDir,
    env: Env,
}

impl Project {
    /// With a kernel in the folder `kernels/gemm`, whose library is this fixture with these flags.
    fn with(fixture: &str, flags: &[&str]) -> Self {
        let temp = tempfile::tempdir().expect("a temporary folder");
        let env =
            Env::fixed([(env::CACHE_DIR, temp.path().join("cache").into_os_string()), (env::OFFLINE, "1".into())]);
        let project = Self { temp, env };
        project.place("kernels/gemm/kernel_metadata.txt", METADATA);
        compile(fixture, flags, &project.path("kernels/gemm/kernel.so"));
        project
    }

    fn new() -> Self {
        Self::with("loadable.c", &["-DFATBIN"])
    }

    fn path(&self, path: &str) -> PathBuf {
        self.temp.path().join(path)
    }

    fn place(&self, path: &str, bytes: impl AsRef<[u8]>) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().expect("a folder")).expect("the folder");
        fs::write(path, bytes).expect("the file");
    }

    fn lock(&self) -> PathBuf {
        self.path("kernels.lock")
    }

    fn text(&self) -> String {
        fs::read_to_string(self.lock()).expect("the lock")
    }

    fn folder(&self) -> String {
        self.path("kernels/gemm").display().to_string()
    }

    fn add(&self, options: &Add) -> Result<Vec<String>> {
        add(options, &self.lock(), &self.env)
    }

    /// Adds, and answers the one kernel that is pinned then.
    fn added(&self, options: &Add) -> Kernel {
        self.add(options).expect("pinned");
        let mut kernels = kernels::parse(&self.text(), "kernels.lock").expect("a good lock");
        assert_eq!(kernels.len(), 1, "{}", self.text());
        kernels.remove(0)
    }

    /// That it is refused with this, and that the lock stays as it was.
    #[track_caller]
    fn refuses(&self, options: &Add, parts: &[&str]) {
        let before = fs::read(self.lock()).ok();
        let fault = self.add(options).expect_err("a refusal").to_string();
        for part in parts {
            assert!(fault.contains(part), "this does not say `{part}`:\n{fault}");
        }
        assert_eq!(fs::read(self.lock()).ok(), before);
    }
}

fn compile(fixture: &str, flags: &[&str], library: &Path) {
    let source = shell::root().join("tests/fixtures").join(fixture);
    let mut cc = Command::new(std::env::var_os("CC").unwrap_or("cc".into()));
    cc.args(["-shared", "-fPIC", "-o"]).arg(library).arg(source).args(flags);
    let output = cc.output().expect("these tests need a C compiler");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn options(kernels: &[&str]) -> Add {
    let kernels = kernels.iter().map(|&from| from.to_owned()).collect();
    let (lock, name, definition, author, source, replace) = (None, None, None, None, Vec::new(), false);
    Add { kernels, lock, name, definition, author, source, replace }
}

#[test]
fn a_folder_is_pinned_with_all_that_its_files_say() {
    let project = Project::new();
    project.place("kernels/gemm/definition.json", DEFINITION);
    project.place("kernels/gemm/solution.json", SOLUTION);
    let kernel = project.added(&options(&[&project.folder()]));
    assert_eq!(
        (kernel.name.as_str(), kernel.definition.as_str(), kernel.entry.as_str()),
        ("by_hand", "gemm_n16", "answer")
    );
    assert_eq!((kernel.solution.as_deref(), kernel.author.as_deref()), (Some("by_hand"), Some("me")));
    assert_eq!((kernel.destination_passing_style, kernel.target), (Some(true), shell::target()));
    assert_eq!(kernel.arch, ["sm_80", "sm_90a", "sm_100f"]);
    assert_eq!(kernel.sources, [kernels::Place::Path("kernels/gemm".to_owned())]);
    for pin in &kernel.files {
        let bytes = fs::read(project.path("kernels/gemm").join(pin.name.file())).expect("the file");
        assert_eq!((pin.size, pin.sha256), (bytes.len() as u64, hash(&bytes)));
    }
    assert_eq!(kernel.files.len(), 4);
    assert!(project.text().starts_with("# FlashInfer-Bench kernels"), "{}", project.text());
}

#[test]
fn what_is_pinned_already_is_left_alone() {
    let project = Project::new();
    let options = options(&[&project.folder()]);
    project.added(&options);
    let text = project.text();
    assert!(project.add(&options).expect("nothing to do")[0].contains("already"));
    assert_eq!(project.text(), text);
}

#[test]
fn what_else_a_lock_says_stays_as_it_is() {
    let project = Project::new();
    let options = options(&[&project.folder()]);
    project.place("kernels.lock", "# mine\nversion = 1 # of the format\n");
    project.added(&options);
    assert!(project.text().starts_with("# mine\nversion = 1 # of the format\n"), "{}", project.text());
    // One more, in front of which there is a comment.
    let text = project.text().replace("[[kernel]]", "# by hand\n[[kernel]]");
    project.place("kernels.lock", &text);
    let named = Add { name: Some("another".to_owned()), ..options };
    project.add(&named).expect("pinned");
    assert!(project.text().starts_with(&text), "{}", project.text());
    assert_eq!(pinned(&project.text(), "kernels.lock").expect("a good lock").len(), 2);
}

#[test]
fn this_crates_own_lock_keeps_its_wheels() {
    let project = Project::new();
    let own = fs::read_to_string(shell::root().join("artifacts.lock")).expect("the lock");
    project.place("kernels.lock", &own);
    project.add(&options(&[&project.folder()])).expect("pinned");
    assert!(project.text().starts_with(&own));
    let lock = Lock::parse(&project.text(), "kernels.lock").expect("a good lock");
    assert_eq!((lock.kernels.len(), lock.wheels.len()), (1, Lock::parse(&own, "own").expect("a lock").wheels.len()));
}

#[test]
fn another_kernel_under_a_name_is_refused_unless_it_is_to_replace_it() {
    let project = Project::new();
    let first = options(&[&project.folder()]);
    let old = project.added(&first);
    compile("loadable.c", &[], &project.path("kernels/gemm/kernel.so"));
    let found = hash(&fs::read(project.path("kernels/gemm/kernel.so")).expect("the library")).to_string();
    let digest = library(&old).expect("a library").sha256.to_string();
    project.refuses(&first, &["by_hand", &digest, &found, "its architectures", "--replace", "--name"]);
    let text = project.text().replace("[[kernel]]", "# by hand\n[[kernel]]");
    project.place("kernels.lock", &text);
    let new = project.added(&Add { replace: true, ..options(&[&project.folder()]) });
    assert_eq!((library(&new).expect("a library").sha256.to_string(), new.arch.len()), (found, 0));
    assert!(project.text().contains("# by hand\n[[kernel]]"), "{}", project.text());
}

#[test]
fn the_same_kernel_from_another_place_is_a_source_more() {
    let project = Project::new();
    project.added(&options(&[&project.folder()]));
    let url = "https://example.invalid/gemm".to_owned();
    let kernel = project.added(&Add { source: vec![url.clone()], ..options(&[&project.folder()]) });
    assert_eq!(kernel.sources, [kernels::Place::Path("kernels/gemm".to_owned()), kernels::Place::Url(url)]);
}

#[test]
fn a_folder_elsewhere_needs_an_address_that_other_machines_reach() {
    let (project, elsewhere) = (Project::new(), Project::new());
    project.refuses(&options(&[&elsewhere.folder()]), &["does not lie below the folder", "--source URL"]);
    let url = "https://example.invalid/gemm".to_owned();
    let kernel = project.added(&Add { source: vec![url.clone()], ..options(&[&elsewhere.folder()]) });
    assert_eq!(kernel.sources, [kernels::Place::Url(url)]);
    let wrong =
        Add { source: vec!["ftp://user:secret@example.invalid/".to_owned()], ..options(&[&elsewhere.folder()]) };
    project.refuses(&wrong, &["--source", "not an http or https address"]);
    assert!(!project.add(&wrong).expect_err("a refusal").to_string().contains("secret"));
}

/// A server that has a kernel's files.
fn served(project: &Project, files: &[&str]) -> Server {
    let server = Server::start();
    for file in files {
        let bytes = fs::read(project.path("kernels/gemm").join(file)).expect("the file");
        server.on(&format!("/gemm/{file}"), [Reply::ok(bytes)]);
    }
    server
}

#[test]
fn an_address_is_pinned_and_what_it_need_not_have_may_be_missing() {
    let project = Project::new();
    let server = served(&project, &["kernel.so", "kernel_metadata.txt"]);
    let url = server.url("/gemm/");
    let kernel = project.added(&options(&[&url]));
    assert_eq!((kernel.sources, kernel.files.len()), (vec![kernels::Place::Url(url)], 2));
    assert_eq!(server.requests().len(), 4);
}

#[test]
fn an_address_that_fails_is_not_taken_for_one_that_has_less() {
    let project = Project::new();
    let server = served(&project, &["kernel.so", "kernel_metadata.txt"]);
    project.refuses(&options(&[&server.url("/nothing")]), &["/nothing has no kernel.so"]);
    server.on("/gemm/definition.json", [Reply::status(403)]);
    project.refuses(&options(&[&server.url("/gemm")]), &["definition.json answered 403"]);
    server.on("/gemm/definition.json", [Reply::ok(DEFINITION).break_off_after(5)]);
    project.refuses(&options(&[&server.url("/gemm")]), &["definition.json"]);
}

#[test]
fn what_is_no_library_is_refused_with_what_it_is() {
    let project = Project::new();
    let folder = options(&[&project.folder()]);
    let put = |bytes: &[u8]| project.place("kernels/gemm/kernel.so", bytes);
    put(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n");
    project.refuses(&folder, &["kernel.so is a Git LFS pointer", "git lfs pull"]);
    put(b"<!DOCTYPE html>");
    project.refuses(&folder, &["HTML", "download the file itself"]);
    put(b"");
    project.refuses(&folder, &["empty file"]);
    // The machine that an ELF file is for, at the place where it stands: RISC-V.
    compile("loadable.c", &[], &project.path("kernels/gemm/kernel.so"));
    let mut bytes = fs::read(project.path("kernels/gemm/kernel.so")).expect("the library");
    bytes[18..20].copy_from_slice(&243u16.to_le_bytes());
    put(&bytes);
    project.refuses(&folder, &["RISC-V", "build it for this machine"]);
    fs::remove_file(project.path("kernels/gemm/kernel.so")).expect("gone");
    project.refuses(&folder, &["has no kernel.so", "name the folder"]);
    fs::create_dir(project.path("kernels/gemm/kernel.so")).expect("a folder");
    project.refuses(&folder, &["is no file"]);
}

#[test]
fn a_library_for_the_other_machine_is_pinned_for_that() {
    let project = Project::new();
    let (number, other) =
        if elf::HOST == elf::X86_64 { (elf::AARCH64, "aarch64-linux") } else { (elf::X86_64, "x86_64-linux") };
    let mut bytes = fs::read(project.path("kernels/gemm/kernel.so")).expect("the library");
    bytes[18..20].copy_from_slice(&number.to_le_bytes());
    project.place("kernels/gemm/kernel.so", &bytes);
    assert_eq!(project.added(&options(&[&project.folder()])).target, other);
}

#[test]
fn a_library_without_the_function_is_refused_with_those_that_it_has() {
    let project = Project::new();
    project.place("kernels/gemm/kernel_metadata.txt", METADATA.replace("answer", "anser"));
    project.refuses(
        &options(&[&project.folder()]),
        &["does not export __tvm_ffi_anser", "it exports answer", "Entry Symbol"],
    );
    let project = Project::with("loadable.c", &["-DNO_FUNCTION"]);
    project.refuses(&options(&[&project.folder()]), &["it exports none", "TVM_FFI_DLL_EXPORT_TYPED_FUNC"]);
}

#[test]
fn a_library_that_does_not_tell_what_it_exports_is_refused() {
    let project = Project::new();
    let mut bytes = fs::read(project.path("kernels/gemm/kernel.so")).expect("the library");
    // Where the section headers lie, how many there are, and which one has their names.
    bytes[40..48].fill(0);
    bytes[60..64].fill(0);
    project.place("kernels/gemm/kernel.so", &bytes);
    project.refuses(&options(&[&project.folder()]), &["was stripped of the tables"]);
}

#[test]
fn a_library_that_no_safe_call_may_load_is_refused() {
    let project = Project::with("loadable.c", &["-DEMBEDDED"]);
    project.refuses(&options(&[&project.folder()]), &["modules embedded"]);
    let project = Project::with("registers.c", &[]);
    project.refuses(&options(&[&project.folder()]), &["TVMFFIFunctionSetGlobal", "Module::open"]);
}

#[test]
fn a_library_that_needs_a_newer_tvm_ffi_is_refused_where_ours_is_at_hand() {
    let project = Project::with("loadable.c", &["-DNEWER"]);
    let ours = project.path("libtvm_ffi.so");
    compile("tvm_ffi.c", &["-DWHOLE"], &ours);
    let wheel = wheels::Wheel {
        distribution: env::TVM_FFI,
        version: "0.1.3",
        tag: if elf::HOST == elf::X86_64 { "cp310-cp310-linux_x86_64" } else { "cp310-cp310-linux_aarch64" },
        members: vec![("tvm_ffi/lib/libtvm_ffi.so", fs::read(&ours).expect("the library"))],
        stored: "",
    };
    project.place("tvm_ffi.whl", wheel.bytes());
    let folder = options(&[&project.folder()]);
    let given = Env::fixed([(env::TVMFFI_WHEEL, project.path("tvm_ffi.whl"))]);
    let fault = add(&folder, &project.lock(), &given).expect_err("a refusal").to_string();
    assert!(fault.contains("TVMFFITensorCreateUnsafeView") && fault.contains("pinned libtvm_ffi.so"), "{fault}");
    assert!(!project.lock().exists());
    // Where it is not at hand, the runtime will say so.
    project.added(&folder);
}

#[test]
fn files_of_different_kernels_are_refused() {
    let project = Project::new();
    let folder = options(&[&project.folder()]);
    project.place("kernels/gemm/definition.json", DEFINITION.replace("n16", "n32"));
    project.refuses(&folder, &["gemm_n16", "gemm_n32", "definition.json", "keep the files of one kernel together"]);
    project.place("kernels/gemm/definition.json", DEFINITION);
    for (from, to) in [("by_hand", "by_foot"), ("gemm_n16", "gemm_n8"), ("::answer", "::question")] {
        project.place("kernels/gemm/solution.json", SOLUTION.replacen(from, to, 1));
        project.refuses(&folder, &["solution.json", "kernel_metadata.txt", "keep the files of one kernel together"]);
    }
    project.place("kernels/gemm/solution.json", "{\"name\": 1}");
    project.refuses(&folder, &["solution.json is malformed"]);
    project.place("kernels/gemm/solution.json", [0xff, 0xfe]);
    project.refuses(&folder, &["solution.json is not UTF-8"]);
    let author = Add { author: Some("you".to_owned()), ..options(&[&project.folder()]) };
    project.place("kernels/gemm/solution.json", SOLUTION);
    project.refuses(&author, &["\"you\" by --author", "\"me\" by solution.json"]);
}

#[test]
fn what_nothing_says_must_be_given() {
    let project = Project::new();
    let folder = || options(&[&project.folder()]);
    project.place("kernels/gemm/kernel_metadata.txt", "Definition: gemm_n16\n");
    project.refuses(&folder(), &["no line `Entry Symbol: NAME`"]);
    project.place("kernels/gemm/kernel_metadata.txt", "  Entry Symbol:  answer \n");
    project.refuses(&folder(), &["nothing says what it computes", "--definition"]);
    let definition = Add { definition: Some("gemm n16".to_owned()), ..folder() };
    project.refuses(&definition, &["`gemm n16` is not a kernel's name", "--name"]);
    let named = Add { name: Some("gemm".to_owned()), author: Some("me".to_owned()), ..definition };
    let kernel = project.added(&named);
    assert_eq!((kernel.name.as_str(), kernel.definition.as_str(), kernel.solution), ("gemm", "gemm n16", None));
    for name in ["..", "../x", "", "a/b"] {
        let hostile = Add { name: Some(name.to_owned()), definition: Some("d".to_owned()), ..folder() };
        project.refuses(&hostile, &["is not a kernel's name"]);
    }
}

#[test]
fn several_kernels_are_pinned_together_or_not_at_all() {
    let project = Project::new();
    project.place("kernels/norm/kernel_metadata.txt", METADATA.replace("by_hand", "norm"));
    project.place("kernels/norm/kernel.so", "");
    let both = options(&[&project.folder(), &project.path("kernels/norm").display().to_string()]);
    project.refuses(&both, &["empty file"]);
    assert!(!project.lock().exists());
    compile("loadable.c", &[], &project.path("kernels/norm/kernel.so"));
    assert_eq!(project.add(&both).expect("both").len(), 2);
    let named = Add { name: Some("one".to_owned()), ..both };
    project.refuses(&named, &["--name", "are of one kernel, and 2 are given"]);
}

#[test]
fn a_lock_that_is_malformed_is_refused_and_left_alone() {
    let project = Project::new();
    let folder = options(&[&project.folder()]);
    project.place("kernels.lock", "version = ");
    project.refuses(&folder, &["kernels.lock", "is no TOML"]);
    project.place("kernels.lock", "version = 1\nkernel = 3\n");
    project.refuses(&folder, &["kernels.lock", "line 2"]);
    project.place("kernels.lock", "version = 2\n");
    project.refuses(&folder, &["version 2"]);
}
