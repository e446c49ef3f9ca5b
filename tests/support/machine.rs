//! A machine of its own for each test: an environment, a cache and folders that nothing else shares.
#![allow(dead_code, reason = "each test uses its own part")]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::vendoring::env::{self, Env};
use crate::vendoring::error::Result;
use crate::vendoring::index::{self, Place};
use crate::vendoring::lock::{Lock, Member, Wheel};
use crate::vendoring::pip::Pip;
use crate::vendoring::source::{Found, Ladder, Supply};
use crate::vendoring::store::Store;
use crate::vendoring::vendor::{Outcome, vendor};

use super::wheels::TARGET;

pub struct Machine {
    temp: TempDir,
    variables: BTreeMap<String, OsString>,
    pub workspace: Option<PathBuf>,
    pub checkout: Option<PathBuf>,
}

impl Machine {
    /// Nothing set but the cache folder, which does not exist yet, and that pip has no configuration: there may be one in
    /// /etc.
    pub fn new() -> Self {
        let temp = tempfile::tempdir().expect("a temporary folder");
        let machine = Self { temp, variables: BTreeMap::new(), workspace: None, checkout: None };
        let cache = machine.cache();
        machine.with(env::CACHE_DIR, cache).with("PIP_CONFIG_FILE", "/dev/null").with("UV_NO_CONFIG", "1")
    }

    pub fn with(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.variables.insert(name.to_owned(), value.into());
        self
    }

    pub fn path(&self, relative: &str) -> PathBuf {
        self.temp.path().join(relative)
    }

    pub fn cache(&self) -> PathBuf {
        self.path("cache")
    }

    pub fn lib_dir(&self) -> PathBuf {
        self.path("lib")
    }

    /// Where the cache keeps this wheel.
    pub fn cached(&self, wheel: &Wheel) -> PathBuf {
        Store::new(self.cache()).path(&wheel.sha256, &wheel.file)
    }

    /// Writes a file, its folders too.
    pub fn place(&self, relative: impl AsRef<Path>, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.temp.path().join(relative);
        fs::create_dir_all(path.parent().expect("a folder")).expect("the folder");
        fs::write(&path, bytes).expect("the file");
        path
    }

    pub fn env(&self) -> Env {
        Env::fixed(self.variables.clone())
    }

    pub fn find(&self, wheel: &Wheel) -> Result<Found> {
        self.ladder(&self.env(), &mut |_, _| {}).find(wheel)
    }

    pub fn find_pinned(&self, wheel: &Wheel) -> Result<Found> {
        self.ladder(&self.env(), &mut |_, _| {}).find_pinned(wheel, &self.scratch())
    }

    /// The wheel, for these members.
    pub fn supply(&self, wheel: &Wheel, members: &[&Member]) -> Result<Supply> {
        self.ladder(&self.env(), &mut |_, _| {}).supply(wheel, members, &self.scratch())
    }

    fn scratch(&self) -> PathBuf {
        let scratch = self.path("scratch");
        fs::create_dir_all(&scratch).expect("the folder");
        scratch
    }

    /// What the build says when the wheel cannot be had.
    pub fn fault(&self, wheel: &Wheel) -> String {
        self.find(wheel).expect_err("no wheel").to_string()
    }

    /// Vendors into [`Machine::lib_dir`].
    pub fn vendor<'a>(&self, lock: &'a Lock, features: &[&str]) -> Result<Outcome<'a>> {
        self.vendor_in(&self.env(), lock, features)
    }

    pub fn vendor_in<'a>(&self, env: &Env, lock: &'a Lock, features: &[&str]) -> Result<Outcome<'a>> {
        let has_feature = |name: &str| features.contains(&name);
        vendor(lock, TARGET, &has_feature, &mut self.ladder(env, &mut |_, _| {}), &self.lib_dir())
    }

    fn ladder<'a>(&self, env: &'a Env, progress: &'a mut dyn FnMut(u64, Option<u64>)) -> Ladder<'a> {
        Ladder { workspace: self.workspace.clone(), checkout: self.checkout.clone(), ..Ladder::new(env, progress) }
    }
}

/// The wheel that was found, whole, from the open file.
pub fn bytes_of(found: &Found) -> Vec<u8> {
    let (mut file, mut bytes) = (&found.file, Vec::new());
    file.rewind().expect("the start");
    file.read_to_end(&mut bytes).expect("the bytes");
    bytes
}

/// Every file under a folder, by its path there, sorted; lock files, which stay, are left out.
pub fn files_under(folder: &Path) -> Vec<String> {
    fn walk(folder: &Path, root: &Path, files: &mut Vec<String>) {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.path().is_dir() {
                walk(&entry.path(), root, files);
            } else if entry.file_name() != ".lock" {
                files.push(entry.path().strip_prefix(root).expect("inside").display().to_string());
            }
        }
    }
    let mut files = Vec::new();
    walk(folder, folder, &mut files);
    files.sort();
    files
}

/// That a message has each of these parts.
#[track_caller]
pub fn assert_says(message: impl AsRef<str>, parts: &[&str]) {
    let message = message.as_ref();
    for part in parts {
        assert!(message.contains(part), "this message does not say `{part}`:\n{message}");
    }
}

/// The pages that a package's files are looked for at, each with what named it.
pub fn pages(purl: &str, env: &Env) -> Result<Vec<(String, String)>> {
    let places = index::places(purl, env, &Pip::read(env)?)?.into_iter();
    let page = |place| match place {
        Place::Page { url, from } => Some((url, from)),
        Place::Folder(_) => None,
    };
    Ok(places.filter_map(page).collect())
}
