//! `cargo xtask cache`: what lies in the cache folder, whether it is what it is called, and away with it.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use clap::Subcommand;

use crate::compile;
use crate::compiler;
use crate::jit_cache;
use crate::shell::say;
use crate::vendoring::digest::{Digest, hash_reader};
use crate::vendoring::env::{self, Env};
use crate::vendoring::error::{Error, Result, refuse};
use crate::vendoring::store::{LOCK, PART, Store, TEMPORARY};

#[derive(Subcommand, Clone, Copy)]
pub enum CacheCommand {
    /// List the wheels and the members that are kept, and how much xtask keeps
    List,
    /// Hash every wheel, every member, and what xtask unpacked and built; fail if something is not what it is recorded as
    Verify,
    /// Remove all that builds and xtask keep; builds under way wait
    Clean,
}

pub fn command(command: CacheCommand) -> Result<()> {
    let Some(root) = Env::process().cache_dir()? else {
        refuse!("there is no cache folder: set HOME, or {} to a folder", env::CACHE_DIR)
    };
    match command {
        CacheCommand::List => print(&root, &survey(&root)?),
        CacheCommand::Verify => {
            say(format!("{} files are what they are called, in {}", verify(&root)?, root.display()))
        }
        CacheCommand::Clean => say(format!("{:.1} MB removed from {}", clean(&root)? as f64 / 1e6, root.display())),
    }
    Ok(())
}

/// What lies in a cache folder. Links are never followed.
#[derive(Default)]
struct Survey {
    wheels: Vec<Kept>,
    members: Vec<Kept>,
    /// xtask's trees, objects and wheels: their folders and sizes.
    parts: Vec<(PathBuf, u64)>,
    /// What no program of this repository puts there.
    foreign: Vec<PathBuf>,
}

/// A folder named by a digest.
struct Kept {
    digest: Digest,
    folder: PathBuf,
    files: Vec<KeptFile>,
    size: u64,
}

struct KeptFile {
    path: PathBuf,
    size: u64,
    modified: Option<SystemTime>,
}

fn survey(root: &Path) -> Result<Survey> {
    let mut survey = Survey::default();
    if !root.exists() {
        return Ok(survey);
    }
    for (path, is_folder) in entries(root)? {
        match name(&path).as_str() {
            "wheels" if is_folder => survey.wheels = kept(&path, &mut survey.foreign)?,
            "members" if is_folder => survey.members = kept(&path, &mut survey.foreign)?,
            "xtask" if is_folder => {
                for (path, is_folder) in entries(&path)? {
                    let name = name(&path);
                    // A killed run leaves a temporary tree.
                    let known = ["kernels", "objects", "wheels"].contains(&name.as_str())
                        || name.starts_with("tree")
                        || name.starts_with(TEMPORARY);
                    match is_folder && known {
                        true => survey.parts.push((path.clone(), size_of(&path)?)),
                        false => survey.foreign.push(path),
                    }
                }
            }
            _ => survey.foreign.push(path),
        }
    }
    Ok(survey)
}

fn kept(folder: &Path, foreign: &mut Vec<PathBuf>) -> Result<Vec<Kept>> {
    let mut all = Vec::new();
    for (folder, is_folder) in entries(folder)? {
        let Some(digest) = name(&folder).parse().ok().filter(|_| is_folder) else {
            foreign.push(folder);
            continue;
        };
        let mut kept = Kept { digest, size: size_of(&folder)?, files: Vec::new(), folder };
        for (path, is_folder) in entries(&kept.folder)? {
            if is_folder {
                foreign.push(path);
            } else if name(&path) != LOCK && !name(&path).starts_with(TEMPORARY) && !name(&path).ends_with(PART) {
                let metadata = path.symlink_metadata().map_err(|e| Error::io("reading", &path, &e))?;
                kept.files.push(KeptFile { size: metadata.len(), modified: metadata.modified().ok(), path });
            }
        }
        all.push(kept);
    }
    Ok(all)
}

/// A folder's entries, sorted, with whether each is a folder; a link to one is not.
fn entries(folder: &Path) -> Result<Vec<(PathBuf, bool)>> {
    let failed = |e: std::io::Error| Error::io("reading the folder", folder, &e);
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        all.push((entry.path(), entry.file_type().map_err(failed)?.is_dir()));
    }
    all.sort();
    Ok(all)
}

fn size_of(folder: &Path) -> Result<u64> {
    let size = |(path, is_folder): (PathBuf, bool)| match is_folder {
        true => size_of(&path),
        false => path.symlink_metadata().map(|metadata| metadata.len()).map_err(|e| Error::io("reading", &path, &e)),
    };
    entries(folder)?.into_iter().map(size).sum()
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or(OsStr::new("")).to_string_lossy().into_owned()
}

fn print(root: &Path, survey: &Survey) {
    println!("{}", root.display());
    for (kind, all) in [("wheel", &survey.wheels), ("member", &survey.members)] {
        for (kept, file) in all.iter().flat_map(|kept| kept.files.iter().map(move |file| (kept, file))) {
            let (size, age) = (megabytes(file.size), age(file.modified));
            println!("{kind:6} {} {size} {age:>8}  {}", kept.digest, name(&file.path));
        }
    }
    for (path, size) in &survey.parts {
        println!("xtask  {:64} {}", name(path), megabytes(*size));
    }
    for path in &survey.foreign {
        println!("not of this program: {}", path.display());
    }
}

fn megabytes(size: u64) -> String {
    format!("{:8.1} MB", size as f64 / 1e6)
}

fn age(modified: Option<SystemTime>) -> String {
    let Some(age) = modified.and_then(|modified| modified.elapsed().ok()) else { return "?".to_owned() };
    match age.as_secs() / 60 {
        minutes @ ..120 => format!("{minutes} min"),
        minutes @ ..2880 => format!("{} h", minutes / 60),
        minutes => format!("{} days", minutes / 1440),
    }
}

/// Answers how many files there are, all of them what they are called. Removes nothing.
fn verify(root: &Path) -> Result<usize> {
    let survey = survey(root)?;
    let (mut good, mut wrong) = (0, Vec::new());
    for kept in survey.wheels.iter().chain(&survey.members) {
        for file in &kept.files {
            let path = file.path.display();
            // Nothing but a file is opened: a pipe would wait for ever.
            let file = File::open(&file.path).ok().filter(|_| file.path.is_file());
            match file.map(hash_reader) {
                Some(Ok((found, _))) if found == kept.digest => good += 1,
                Some(Ok((found, _))) => wrong.push(format!("{path} has sha256 {found}")),
                Some(Err(e)) => wrong.push(format!("{path} cannot be read: {e}")),
                None => wrong.push(format!("{path} cannot be opened")),
            }
        }
    }
    for (part, _) in &survey.parts {
        for (path, good_one) in made_here(part)? {
            match good_one {
                true => good += 1,
                false => wrong.push(format!("{} is not what was made", path.display())),
            }
        }
    }
    if !wrong.is_empty() {
        refuse!(
            "{} of {} files are not what they are called: {}; no build uses them, and the next one that needs them \
             replaces them",
            wrong.len(),
            good + wrong.len(),
            wrong.join("; ")
        );
    }
    Ok(good)
}

/// What of a part of xtask's is on record, and whether it is as it was made. What is not on record is never used.
fn made_here(part: &Path) -> Result<Vec<(PathBuf, bool)>> {
    let has = |path: &Path, sha256: Option<Digest>| {
        let file = File::open(path).ok().filter(|_| path.is_file());
        sha256.is_some() && file.and_then(|file| hash_reader(file).ok()).map(|(found, _)| found) == sha256
    };
    let mut all = Vec::new();
    match name(part).as_str() {
        "objects" => {
            for (record, made) in compile::records(part) {
                let sha256 = made.and_then(|made| made.sha256.parse().ok());
                let object = sha256.map_or(record, |sha256| compile::path(part, &sha256));
                let good = has(&object, sha256);
                all.push((object, good));
            }
        }
        "wheels" => {
            for (folder, _) in entries(part)?.into_iter().filter(|(folder, _)| folder.join(jit_cache::BUILT).is_file())
            {
                let sha256 = jit_cache::built_digest(&folder);
                for (wheel, _) in entries(&folder)?.into_iter().filter(|(path, _)| name(path).ends_with(".whl")) {
                    let good = has(&wheel, sha256);
                    all.push((wheel, good));
                }
            }
        }
        tree => {
            // A temporary one belongs to a run under way, or to one that was killed.
            let recorded = compiler::recorded(part).filter(|_| tree.starts_with("tree"));
            if let Some(recorded) = recorded {
                all.push((part.to_owned(), compiler::contents(part)?.to_string() == recorded));
            }
        }
    }
    Ok(all)
}

/// Removes all that was made here, and nothing else; answers how many bytes that were.
fn clean(root: &Path) -> Result<u64> {
    let survey = survey(root)?;
    if let Some(first) = survey.foreign.first() {
        refuse!(
            "{} holds {} things that this program did not make, {} for one: it does not look like this cache, or not \
             only; move them away, or remove what you mean by hand",
            root.display(),
            survey.foreign.len(),
            first.display()
        );
    }
    let digests: Vec<Digest> = survey.wheels.iter().map(|kept| kept.digest).collect();
    // All at once, since a member is written under the lock of its wheel, and does not say which that is.
    locked(&Store::new(root.to_owned()), &digests, &mut || {
        let folders = survey.members.iter().chain(&survey.wheels).map(|kept| &kept.folder);
        for folder in folders.chain(survey.parts.iter().map(|(folder, _)| folder)) {
            fs::remove_dir_all(folder).map_err(|e| Error::io("removing", folder, &e))?;
        }
        Ok(())
    })?;
    for part in ["wheels", "members", "xtask"] {
        // Not empty where a build has begun meanwhile.
        let _ = fs::remove_dir(root.join(part));
    }
    let kept: u64 = survey.wheels.iter().chain(&survey.members).map(|kept| kept.size).sum();
    Ok(kept + survey.parts.iter().map(|(_, size)| size).sum::<u64>())
}

/// Runs `work` with the folders of all these wheels locked. A build holds one lock at a time: nobody waits in a ring.
fn locked(store: &Store, digests: &[Digest], work: &mut dyn FnMut() -> Result<()>) -> Result<()> {
    match digests.split_first() {
        Some((first, rest)) => store.locked(first, || locked(store, rest, work)),
        None => work(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::{Duration, Instant};

    use tempfile::TempDir;

    use super::*;

    fn digest(bytes: &[u8]) -> Digest {
        hash_reader(bytes).expect("a digest").0
    }

    fn place(root: &Path, path: &str, bytes: &[u8]) -> PathBuf {
        let path = root.join(path);
        fs::create_dir_all(path.parent().expect("a folder")).expect("the folder");
        fs::write(&path, bytes).expect("the file");
        path
    }

    /// A cache with something of every kind.
    fn cache() -> TempDir {
        let temp = tempfile::tempdir().expect("a temporary folder");
        let root = temp.path();
        let (wheel, member) = (digest(b"wheel"), digest(b"member"));
        place(root, &format!("wheels/{wheel}/a-1-py3-none-any.whl"), b"wheel");
        place(root, &format!("wheels/{wheel}/{LOCK}"), b"");
        place(root, &format!("wheels/{wheel}/{TEMPORARY}killed"), b"whe");
        place(root, &format!("wheels/{wheel}/a-1-py3-none-any.whl{PART}"), b"whee");
        place(root, &format!("members/{member}/norm.so"), b"member");
        place(root, "xtask/objects/key.o", b"object");
        place(root, "xtask/tree-1234/include/header.h", b"header");
        place(root, "xtask/wheels/key/b.whl", b"built");
        temp
    }

    #[track_caller]
    fn refused(root: &Path, parts: &[&str]) {
        let fault = clean(root).expect_err("refused").to_string();
        parts.iter().for_each(|part| assert!(fault.contains(part), "{fault}"));
    }

    #[test]
    fn a_survey_finds_everything() {
        let temp = cache();
        let survey = survey(temp.path()).expect("a survey");
        let files =
            |all: &[Kept]| all.iter().flat_map(|kept| &kept.files).map(|file| name(&file.path)).collect::<Vec<_>>();
        assert_eq!(files(&survey.wheels), ["a-1-py3-none-any.whl"]);
        assert_eq!(files(&survey.members), ["norm.so"]);
        assert_eq!((survey.wheels[0].digest, survey.wheels[0].files[0].size), (digest(b"wheel"), 5));
        let parts: Vec<_> = survey.parts.iter().map(|(path, size)| (name(path), *size)).collect();
        assert_eq!(parts, [("objects".to_owned(), 6), ("tree-1234".to_owned(), 6), ("wheels".to_owned(), 5)]);
        assert!(survey.foreign.is_empty());
    }

    #[test]
    fn a_cache_that_is_not_there_is_empty() {
        let temp = tempfile::tempdir().expect("a temporary folder");
        let root = temp.path().join("none");
        assert_eq!((verify(&root).expect("nothing"), clean(&root).expect("nothing")), (0, 0));
        assert!(!root.exists());
    }

    #[test]
    fn a_sound_cache_verifies() {
        assert_eq!(verify(cache().path()).expect("a sound cache"), 2);
    }

    #[test]
    fn a_file_with_other_bytes_is_named_and_left_alone() {
        let temp = cache();
        let path = place(temp.path(), &format!("members/{}/norm.so", digest(b"member")), b"other");
        let fault = verify(temp.path()).expect_err("other bytes").to_string();
        for part in ["1 of 2", &path.display().to_string(), &digest(b"other").to_string()] {
            assert!(fault.contains(part), "{fault}");
        }
        assert!(path.is_file());
    }

    /// A cache in which xtask has made something of every kind.
    fn made() -> TempDir {
        let temp = cache();
        let (object, wheel, root) = (digest(b"object"), digest(b"built"), temp.path());
        place(root, &format!("xtask/objects/{object}.o"), b"object");
        let record = format!("{{\"sha256\": \"{object}\", \"read\": {{}}}}");
        place(root, "xtask/objects/key.json", record.as_bytes());
        place(root, "xtask/wheels/key/built.json", format!("{{\"sha256\": \"{wheel}\"}}").as_bytes());
        let contents = compiler::contents(&root.join("xtask/tree-1234")).expect("a digest").to_string();
        place(root, "xtask/tree-1234/.contents", contents.as_bytes());
        temp
    }

    #[test]
    fn what_xtask_made_verifies_too() {
        assert_eq!(verify(made().path()).expect("a sound cache"), 5);
    }

    #[test]
    fn whatever_of_it_was_changed_is_named() {
        let object = format!("xtask/objects/{}.o", digest(b"object"));
        for path in
            [object.as_str(), "xtask/objects/key.json", "xtask/wheels/key/b.whl", "xtask/tree-1234/include/header.h"]
        {
            let temp = made();
            place(temp.path(), path, b"other");
            let fault = verify(temp.path()).expect_err("other bytes").to_string();
            let named = if path.contains("tree") { "xtask/tree-1234" } else { path };
            assert!(fault.contains("1 of 5") && fault.contains(named), "{path}: {fault}");
        }
    }

    #[test]
    fn cleaning_removes_everything_and_says_how_much() {
        let temp = cache();
        assert_eq!(clean(temp.path()).expect("cleaned"), 5 + 3 + 4 + 6 + 6 + 6 + 5);
        assert_eq!(fs::read_dir(temp.path()).expect("the cache folder").count(), 0);
    }

    #[test]
    fn a_folder_with_other_things_in_it_is_not_cleaned() {
        let hex = "ab".repeat(32);
        for path in ["thesis.tex", "wheels/thesis.tex", &format!("wheels/{hex}/folder/thesis.tex"), "xtask/thesis.tex"]
        {
            let temp = cache();
            let thesis = place(temp.path(), path, b"years of work");
            refused(temp.path(), &["does not look like this cache", &temp.path().display().to_string()]);
            assert!(thesis.is_file(), "{path}");
            assert_eq!(verify(temp.path()).expect("untouched"), 2);
        }
    }

    #[test]
    fn a_link_to_a_folder_is_not_cleaned() {
        let elsewhere = tempfile::tempdir().expect("a temporary folder");
        let thesis = place(elsewhere.path(), "thesis.tex", b"years of work");
        let hex = "ab".repeat(32);
        for path in ["members", &format!("wheels/{hex}"), "xtask/tree-5678"] {
            let temp = cache();
            let _ = fs::remove_dir_all(temp.path().join(path));
            symlink(elsewhere.path(), temp.path().join(path)).expect("a link");
            refused(temp.path(), &[path]);
            assert!(thesis.is_file(), "{path}");
        }
    }

    #[test]
    fn a_link_to_a_file_is_removed_and_not_followed() {
        let (temp, elsewhere) = (cache(), tempfile::tempdir().expect("a temporary folder"));
        let thesis = place(elsewhere.path(), "thesis.tex", b"years of work");
        symlink(&thesis, temp.path().join(format!("members/{}/linked.so", digest(b"member")))).expect("a link");
        symlink(elsewhere.path(), temp.path().join("xtask/tree-1234/linked")).expect("a link");
        clean(temp.path()).expect("cleaned");
        assert!(thesis.is_file());
    }

    #[test]
    fn cleaning_waits_for_a_build_that_holds_a_lock() {
        let temp = cache();
        let finished = AtomicBool::new(false);
        let store = Store::new(temp.path().to_owned());
        std::thread::scope(|scope| {
            let cleaning = store.locked(&digest(b"wheel"), || {
                let cleaning = scope.spawn(|| {
                    clean(temp.path()).expect("cleaned");
                    assert!(finished.load(Ordering::SeqCst), "a build was still under way");
                });
                // It gets so far and no further, or the assertion above fails. Where the kernel does not tell how far,
                // this much time must do.
                let (begun, lock) = (Instant::now(), format!("wheels/{}/{LOCK}", digest(b"wheel")));
                while !is_waited_for(&temp.path().join(&lock)) && begun.elapsed() < Duration::from_secs(2) {
                    if cleaning.is_finished() {
                        break;
                    }
                    std::thread::sleep(Duration::from_millis(1));
                }
                finished.store(true, Ordering::SeqCst);
                Ok(cleaning)
            });
            cleaning.expect("the lock").join().expect("cleaned in its turn");
        });
    }

    /// Whether somebody is blocked on this file's lock.
    fn is_waited_for(path: &Path) -> bool {
        use std::os::unix::fs::MetadataExt;
        let Ok(metadata) = fs::metadata(path) else { return false };
        let inode = format!(":{} ", metadata.ino());
        fs::read_to_string("/proc/locks")
            .unwrap_or_default()
            .lines()
            .any(|line| line.contains("->") && line.contains(&inode))
    }
}
