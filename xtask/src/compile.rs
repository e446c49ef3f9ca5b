//! Objects, found again by all that they depend on and checked before they are used: a killed run finds what it had made,
//! and nothing stale or damaged is ever linked.
//!
//! A record, named by the key of what was asked for, names the object by its digest, and the files outside the tree that
//! the compiler read, with theirs. The tree's own files are in the key.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;

use indicatif::{MultiProgress, ProgressBar};
use serde::{Deserialize, Serialize};

use crate::compiler::Toolchain;
use crate::shell::{self, say};
use crate::vendoring::digest::{Digest, Hasher, hash_reader};
use crate::vendoring::env::Env;
use crate::vendoring::error::{Error, Result, refuse};
use crate::vendoring::store::{TEMPORARY, publish_bytes};

/// FlashInfer's variable for the number of compilers at once.
const MAX_JOBS: &str = "MAX_JOBS";
/// Raised when the same key would stand for another object.
const FORMAT: &str = "object 2";

/// One object to be made, or made before.
pub struct Object {
    key: Digest,
    source: String,
    flags: Vec<String>,
    memory: u64,
}

/// What is known of an object that was made.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Made {
    pub sha256: String,
    /// Files outside the tree.
    read: BTreeMap<PathBuf, String>,
}

/// What names a result: every part with its length, so that none can pass for another.
pub fn key<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Digest {
    let mut hasher = Hasher::new();
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.finish()
}

/// Whether a source is the C++ compiler's alone; all others are nvcc's.
pub fn is_cpp(source: &str) -> bool {
    source.ends_with(".cpp")
}

/// Describes an object. Its key covers the tree, the compilers, their environment, the flags and the source.
pub fn object(toolchain: &Toolchain, source: &str, flags: &[String], memory: u64) -> Result<Object> {
    let path = toolchain.tree.join(source);
    let text = fs::read(&path).map_err(|e| Error::io("reading", &path, &e))?;
    let first = if is_cpp(source) { toolchain.host.clone() } else { toolchain.host_flags() };
    let flags: Vec<String> = first.into_iter().chain(flags.iter().cloned()).collect();
    let (words, environment) = (flags.join("\n"), toolchain.environment_text());
    let parts = [FORMAT, &toolchain.identity, &environment, &words, source].map(str::as_bytes);
    let key = key(parts.into_iter().chain([text.as_slice()]));
    Ok(Object { key, source: source.to_owned(), flags, memory })
}

/// Where an object with this content is kept.
pub fn path(store: &Path, sha256: &Digest) -> PathBuf {
    store.join(format!("{sha256}.o"))
}

fn record(store: &Path, key: &Digest) -> PathBuf {
    store.join(format!("{key}.json"))
}

/// Makes what is not there yet, as many at once as cores and memory allow; answers the objects' digests, in order.
pub fn all(toolchain: &Toolchain, store: &Path, objects: &[Object], env: &Env) -> Result<Vec<Digest>> {
    fs::create_dir_all(store).map_err(|e| Error::io("creating the folder", store, &e))?;
    let mut seen = Seen::default();
    let mut made: Vec<Option<Digest>> = objects.iter().map(|object| find(store, object, &mut seen)).collect();
    let missing: Vec<usize> = (0..objects.len()).filter(|&i| made[i].is_none()).collect();
    let Some(largest) = missing.iter().map(|&i| objects[i].memory).max() else {
        return Ok(made.into_iter().flatten().collect());
    };
    let total = missing.len();
    let jobs = jobs(largest, env)?.min(total);
    say(format!("compiling {total} files, {jobs} at once; {} were made before", objects.len() - total));
    let bars = MultiProgress::new();
    let queue = Mutex::new(missing.into_iter());
    let fault = Mutex::new(None);
    let finished = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let failed = lock(&fault).is_some();
                    let Some(i) = lock(&queue).next().filter(|_| !failed) else { break };
                    let object = &objects[i];
                    let bar = bars.add(shell::step_bar());
                    bar.set_message(object.source.clone());
                    let result = compile(toolchain, store, object);
                    let mut finished = lock(&finished);
                    report(&bar, object, result.is_ok(), finished.len() + 1, total);
                    match result {
                        Ok(sha256) => finished.push((i, sha256)),
                        Err(error) => drop(lock(&fault).get_or_insert(error)),
                    }
                }
            });
        }
    });
    if let Some(error) = fault.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    for (i, sha256) in finished.into_inner().unwrap_or_else(PoisonError::into_inner) {
        made[i] = Some(sha256);
    }
    Ok(made.into_iter().flatten().collect())
}

fn report(bar: &ProgressBar, object: &Object, good: bool, count: usize, total: usize) {
    let elapsed = bar.elapsed().as_secs();
    bar.finish_and_clear();
    let outcome = if good { "" } else { " FAILED" };
    say(format!("[{count}/{total}] {} in {elapsed} s{outcome}", object.source));
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Digests of files that many objects depend on; none for what cannot be read.
type Seen = HashMap<PathBuf, Option<String>>;

/// The digest of the object that was made before, if it and all that the compiler read outside the tree are what they
/// were.
fn find(store: &Path, object: &Object, seen: &mut Seen) -> Option<Digest> {
    let record = record(store, &object.key);
    let made: Made = serde_json::from_slice(&fs::read(&record).ok()?).ok()?;
    let changed = made.read.iter().find(|(path, sha256)| {
        let found = seen.entry((*path).clone()).or_insert_with(|| digest_of(path).map(|found| found.to_string()));
        found.as_ref() != Some(sha256)
    });
    if let Some((path, _)) = changed {
        say(format!("{} has changed since {} was compiled; it is compiled again", path.display(), object.source));
        return None;
    }
    let sha256 = made.sha256.parse().ok()?;
    let path = path(store, &sha256);
    if digest_of(&path) != Some(sha256) {
        say(format!("{} is not the object that was compiled; it is compiled again", path.display()));
        return None;
    }
    Some(sha256)
}

/// Nothing but a file is opened: a pipe would wait for ever.
fn digest_of(path: &Path) -> Option<Digest> {
    let file = fs::File::open(path.is_file().then_some(path)?).ok()?;
    hash_reader(file).ok().map(|(sha256, _)| sha256)
}

/// Every record in a store, with what it says; none for one that says nothing.
pub fn records(store: &Path) -> Vec<(PathBuf, Option<Made>)> {
    let entries = fs::read_dir(store).into_iter().flatten().flatten().map(|entry| entry.path());
    let records = entries.filter(|path| path.extension().is_some_and(|extension| extension == "json"));
    records
        .map(|path| (path.clone(), fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok())))
        .collect()
}

fn compile(toolchain: &Toolchain, store: &Path, object: &Object) -> Result<Digest> {
    // Both as any other program would make them, within the umask: a private file would serve one user only.
    let temporary = |suffix: &str| {
        let mut builder = tempfile::Builder::new();
        builder.prefix(TEMPORARY).suffix(suffix);
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let temporary = builder.tempfile_in(store).map_err(|e| Error::io("writing to the folder", store, &e))?;
        Ok(temporary.into_temp_path())
    };
    let (temporary, dependencies) = (temporary(".o")?, temporary(".d")?);
    // nvcc finds its own parts by the path it was started with.
    let (program, flags) = match object.flags.split_first() {
        Some((program, flags)) if is_cpp(&object.source) => (program.as_ref(), flags),
        _ => (toolchain.nvcc.as_os_str(), object.flags.as_slice()),
    };
    let mut command = toolchain.command(program);
    command.current_dir(&toolchain.tree).args(flags).arg("-MD").arg("-MF").arg(&dependencies);
    shell::quietly(command.args(["-c", &object.source, "-o"]).arg(&temporary))?;
    let mut text = String::new();
    let read = fs::File::open(&dependencies).and_then(|mut file| file.read_to_string(&mut text));
    read.map_err(|e| Error::io("reading", &dependencies, &e))?;
    let read = outside(&toolchain.tree, &prerequisites(&text))?;
    let Some(sha256) = digest_of(&temporary) else { refuse!("the compiler wrote no object for {}", object.source) };
    let path = path(store, &sha256);
    temporary.persist(&path).map_err(|e| Error::io("naming", &path, &e.error))?;
    // Last: a record never names what is not there.
    let made = Made { sha256: sha256.to_string(), read };
    let text = serde_json::to_string_pretty(&made).map_err(|e| Error::Refused(e.to_string()))?;
    publish_bytes(&record(store, &object.key), text.as_bytes())?;
    Ok(sha256)
}

/// The files of a rule for make, whose backslashes escape spaces and line ends.
fn prerequisites(rule: &str) -> Vec<String> {
    let text = rule.replace("\\\n", " ");
    let Some((_, files)) = text.split_once(": ").or_else(|| text.split_once(":\n")) else { return Vec::new() };
    let mut all = vec![String::new()];
    let mut characters = files.chars();
    while let Some(c) = characters.next() {
        let last = all.len() - 1;
        match c {
            '\\' => all[last].extend(characters.next()),
            '$' => all[last].extend(characters.next()),
            c if c.is_whitespace() => all.push(String::new()),
            c => all[last].push(c),
        }
    }
    all.retain(|file| !file.is_empty());
    all
}

/// Those that are not the tree's, with their digests.
fn outside(tree: &Path, files: &[String]) -> Result<BTreeMap<PathBuf, String>> {
    let real = |path: &Path| path.canonicalize().map_err(|e| Error::io("reading", path, &e));
    let real_tree = real(tree)?;
    let mut all = BTreeMap::new();
    for file in files {
        let path = real(&tree.join(file))?;
        if path.starts_with(&real_tree) {
            continue;
        }
        let Some(sha256) = digest_of(&path) else { refuse!("{} was compiled in and cannot be read", path.display()) };
        all.insert(path, sha256.to_string());
    }
    Ok(all)
}

fn jobs(memory: u64, env: &Env) -> Result<usize> {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let fitting = available_memory().map_or(cores, |available| (available / memory).max(1) as usize);
    let Some(limit) = env.text(MAX_JOBS) else { return Ok(cores.min(fitting)) };
    match limit.parse::<usize>() {
        Ok(limit) if limit > 0 => Ok(limit),
        _ => refuse!("{MAX_JOBS}={limit} is not a number of jobs; set it to 1 or more, or unset it"),
    }
}

/// What can be taken without swapping, in bytes: of the machine, and of what a container is limited to.
fn available_memory() -> Option<u64> {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("MemAvailable:"))?;
        Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
    });
    machine.into_iter().chain(left_in(Path::new("/sys/fs/cgroup"))).min()
}

/// What a control group's limit leaves, in bytes; none where there is no limit.
fn left_in(group: &Path) -> Option<u64> {
    let text = |name: &str| fs::read_to_string(group.join(name)).ok();
    let number = |name: &str| text(name)?.trim().parse::<u64>().ok();
    // Of the file cache the group can do without what it did not use lately.
    let unused = text("memory.stat").and_then(|text| {
        text.lines().find_map(|line| line.strip_prefix("inactive_file ")).and_then(|bytes| bytes.parse::<u64>().ok())
    });
    let used = number("memory.current")?.saturating_sub(unused.unwrap_or(0));
    Some(number("memory.max")?.saturating_sub(used))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use tempfile::TempDir;

    use super::*;

    /// Compiles by copying, says what it read, and counts.
    const NVCC: &str = "#!/bin/sh
while [ $# -gt 0 ]; do
    case $1 in
        -c) source=$2; shift ;;
        -o) object=$2; shift ;;
        -MF) rule=$2; shift ;;
    esac
    shift
done
cp \"$source\" \"$object\"
printf '%s : %s \\\\\\n    %s\\n' \"$object\" \"$source\" HEADER >\"$rule\"
echo again >>COUNT
";

    struct Machine {
        temp: TempDir,
        toolchain: Toolchain,
    }

    fn machine() -> Machine {
        let temp = tempfile::tempdir().expect("a temporary folder");
        let (tree, nvcc) = (temp.path().join("tree"), temp.path().join("nvcc"));
        fs::create_dir(&tree).expect("the tree");
        fs::write(tree.join("a.cu"), "kernel").expect("a source");
        fs::write(temp.path().join("header.h"), "header").expect("a header");
        let header = temp.path().join("header.h").display().to_string();
        let count = temp.path().join("count").display().to_string();
        fs::write(&nvcc, NVCC.replace("HEADER", &header).replace("COUNT", &count)).expect("a compiler");
        fs::set_permissions(&nvcc, fs::Permissions::from_mode(0o755)).expect("an executable");
        let toolchain = Toolchain {
            tree,
            nvcc,
            cuda_include: "cuda/include".to_owned(),
            library_dirs: Vec::new(),
            host: vec!["c++".to_owned()],
            environment: vec![("PATH".to_owned(), std::env::var_os("PATH").unwrap_or_default(), false)],
            identity: "tree and compilers".to_owned(),
        };
        Machine { temp, toolchain }
    }

    impl Machine {
        fn store(&self) -> PathBuf {
            self.temp.path().join("objects")
        }

        fn object(&self) -> Object {
            object(&self.toolchain, "a.cu", &["-O3".to_owned()], 1).expect("an object")
        }

        /// Compiles what is not there; answers the object and how often the compiler has run so far.
        fn compiled(&self) -> (PathBuf, usize) {
            let made = all(&self.toolchain, &self.store(), &[self.object()], &Env::fixed::<&str, &str>([]));
            let path = path(&self.store(), &made.expect("compiled")[0]);
            let count = fs::read_to_string(self.temp.path().join("count")).expect("the count");
            (path, count.lines().count())
        }
    }

    #[test]
    fn an_object_that_was_made_is_not_made_again() {
        let machine = machine();
        assert_eq!(machine.compiled().1, 1);
        assert_eq!(machine.compiled().1, 1);
        assert_eq!(fs::read(machine.compiled().0).expect("the object"), b"kernel");
    }

    #[test]
    fn every_ingredient_changes_the_key() {
        let machine = machine();
        let plain = machine.object().key;
        let key = |machine: &Machine, flags: &[&str]| {
            let flags: Vec<String> = flags.iter().map(|flag| (*flag).to_owned()).collect();
            object(&machine.toolchain, "a.cu", &flags, 1).expect("an object").key
        };
        assert_eq!(key(&machine, &["-O3"]), plain);
        assert_ne!(key(&machine, &["-O2"]), plain, "flags");
        assert_ne!(key(&machine, &["-O3", ""]), plain, "how many flags");

        type Change = fn(&mut Toolchain);
        let changes: [(&str, Change); 4] = [
            ("the tree or the compilers", |toolchain| toolchain.identity.push('!')),
            ("the host compiler", |toolchain| toolchain.host = vec!["clang++".to_owned()]),
            ("its arguments", |toolchain| toolchain.host.push("-m64".to_owned())),
            ("the environment", |toolchain| {
                toolchain.environment.push(("NVCC_APPEND_FLAGS".to_owned(), "-lineinfo".into(), true));
            }),
        ];
        for (what, change) in changes {
            let mut machine = self::machine();
            change(&mut machine.toolchain);
            assert_ne!(key(&machine, &["-O3"]), plain, "{what}");
        }
        // Where programs are found is no ingredient; what they are is in the identity.
        let mut elsewhere = self::machine();
        elsewhere.toolchain.environment[0].1.push(":/opt/bin");
        assert_eq!(key(&elsewhere, &["-O3"]), plain);

        fs::write(machine.toolchain.tree.join("b.cu"), "kernel").expect("a source");
        let named = object(&machine.toolchain, "b.cu", &["-O3".to_owned()], 1).expect("an object").key;
        assert_ne!(named, plain, "the source's name");
        fs::write(machine.toolchain.tree.join("a.cu"), "other").expect("a source");
        assert_ne!(key(&machine, &["-O3"]), plain, "the source");
    }

    #[test]
    fn parts_of_a_key_cannot_pass_for_each_other() {
        let key_of = |parts: &[&str]| key(parts.iter().map(|part| part.as_bytes()));
        assert_ne!(key_of(&["ab", "c"]), key_of(&["a", "bc"]));
        assert_ne!(key_of(&["a", ""]), key_of(&["a"]));
    }

    #[test]
    fn a_damaged_object_is_made_again() {
        let machine = machine();
        let (path, _) = machine.compiled();
        fs::write(&path, b"kernek").expect("damage");
        assert_eq!(machine.compiled(), (path.clone(), 2));
        assert_eq!(fs::read(&path).expect("the object"), b"kernel");
        fs::remove_file(&path).expect("removed");
        assert_eq!(machine.compiled(), (path, 3));
    }

    #[test]
    fn a_damaged_record_is_made_again() {
        let machine = machine();
        machine.compiled();
        fs::write(record(&machine.store(), &machine.object().key), b"{").expect("damage");
        assert_eq!(machine.compiled().1, 2);
    }

    #[test]
    fn a_header_outside_the_tree_that_changed_makes_it_again() {
        let machine = machine();
        machine.compiled();
        fs::write(machine.temp.path().join("header.h"), "newer").expect("another header");
        assert_eq!(machine.compiled().1, 2);
        assert_eq!(machine.compiled().1, 2);
        fs::remove_file(machine.temp.path().join("header.h")).expect("removed");
        let fault = all(&machine.toolchain, &machine.store(), &[machine.object()], &Env::fixed::<&str, &str>([]));
        assert!(fault.expect_err("nothing to compile with").to_string().contains("header.h"));
    }

    #[test]
    fn objects_and_records_can_be_read_by_whom_the_umask_lets() {
        let machine = machine();
        let plain = machine.temp.path().join("plain");
        fs::write(&plain, "").expect("a file");
        let mode = |path: &Path| fs::metadata(path).expect("a file").permissions().mode();
        let (object, _) = machine.compiled();
        assert_eq!(mode(&object), mode(&plain));
        assert_eq!(mode(&record(&machine.store(), &machine.object().key)), mode(&plain));
    }

    #[test]
    fn a_containers_limit_counts_less_what_is_used_of_it() {
        let group = tempfile::tempdir().expect("a folder");
        let write = |name: &str, text: &str| fs::write(group.path().join(name), text).expect("a file");
        assert_eq!(left_in(group.path()), None);
        write("memory.current", "700\n");
        write("memory.max", "max\n");
        assert_eq!(left_in(group.path()), None, "no limit");
        write("memory.max", "1000\n");
        assert_eq!(left_in(group.path()), Some(300));
        write("memory.stat", "anon 300\ninactive_file 400\nactive_file 100\n");
        assert_eq!(left_in(group.path()), Some(700));
        write("memory.current", "2000\n");
        assert_eq!(left_in(group.path()), Some(0));
    }

    #[test]
    fn a_rule_for_make_is_understood() {
        let rule = "a.o : a.cu \\\n    /usr/include/x\\ y.h \\\n    b$$.h\n";
        assert_eq!(prerequisites(rule), ["a.cu", "/usr/include/x y.h", "b$.h"]);
        assert!(prerequisites("").is_empty());
    }
}
