//! The ladder: where a wheel may come from. First hit wins; each rung is one function that says why it outranks the
//! next.

use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::digest::{Digest, hash_reader};
use super::env::{self, Env};
use super::error::{Error, Result, refuse};
use super::fetch::{Client, Expected, Progress, redacted, summary};
use super::index;
use super::local::{self, Record};
use super::lock::{self, Member, Wheel};
use super::ranges;
use super::store::{Store, publish};
use super::wheel::{Extracted, Identity, Wheel as Archive, copy_from_place};

/// Where a wheel came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    Override,
    Directory,
    Cache,
    Local,
    Network,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Override => "override",
            Self::Directory => "directory",
            Self::Cache => "cache",
            Self::Local => "local build",
            Self::Network => "network",
        })
    }
}

/// A wheel that passed its checks, open.
#[derive(Debug)]
pub struct Found {
    pub file: File,
    pub path: PathBuf,
    pub source: Source,
    pub sha256: Digest,
    /// What a user should be told.
    pub notes: Vec<String>,
}

impl Found {
    /// Whether these are the pinned bytes; an override or a local build need not be.
    pub fn is_pinned(&self, wheel: &Wheel) -> bool {
        self.sha256 == wheel.sha256
    }
}

/// What the ladder found.
pub enum Supply {
    Wheel(Found),
    /// The members alone, in the order in which they were asked for, each checked against its locked digest.
    Members {
        files: Vec<(PathBuf, File)>,
        source: Source,
        notes: Vec<String>,
    },
}

/// All that the ladder looks at.
pub struct Ladder<'a> {
    pub env: &'a Env,
    /// The folder that holds the target directory, if known.
    pub workspace: Option<PathBuf>,
    /// The checkout of this repository, if this is one.
    pub checkout: Option<PathBuf>,
    pub progress: Progress<'a>,
}

impl Ladder<'_> {
    /// Finds the wheel as a whole, or says everywhere it looked and what to do.
    pub fn find(&mut self, wheel: &Wheel) -> Result<Found> {
        whole(self.supply(wheel, &[])?)
    }

    /// Finds these members, in the wheel or without the rest of it, or says everywhere it looked and what to do.
    pub fn supply(&mut self, wheel: &Wheel, members: &[&Member]) -> Result<Supply> {
        let mut looked = Vec::new();
        // The user named this very file: nothing outranks that.
        if let Some(found) = self.by_override(wheel, &mut looked)? {
            return Ok(Supply::Wheel(found));
        }
        // A folder of wheels is as deliberate, but not about one wheel.
        if let Some(found) = self.in_directories(wheel, &mut looked)? {
            return Ok(Supply::Wheel(found));
        }
        // Fetched and checked before, by any project of this user.
        if let Some(supply) = self.in_cache(wheel, members, &mut looked) {
            return Ok(supply);
        }
        // What a contributor built here stands in only where the pinned wheel is not at hand.
        if let Some(found) = self.in_checkout(wheel, &mut looked)? {
            return Ok(Supply::Wheel(found));
        }
        // The only rung that costs time and needs others.
        if let Some(supply) = self.on_network(wheel, members, &mut looked)? {
            return Ok(supply);
        }
        Err(nowhere(wheel, &looked, env::wheel_override(&wheel.distribution)))
    }

    /// As [`find`](Self::find), but only the pinned bytes will do: neither an override nor a local build is looked at.
    pub fn find_pinned(&mut self, wheel: &Wheel) -> Result<Found> {
        let mut looked = Vec::new();
        if let Some(found) = self.in_directories(wheel, &mut looked)? {
            return Ok(found);
        }
        let supply = match self.in_cache(wheel, &[], &mut looked) {
            Some(supply) => Some(supply),
            None => self.on_network(wheel, &[], &mut looked)?,
        };
        supply.map_or_else(|| Err(nowhere(wheel, &looked, None)), whole)
    }

    /// Keeps a member of the pinned wheel in the cache, so that the wheel need not be read again. That it cannot be
    /// kept is no fault of this build.
    pub fn keep(&self, wheel: &Wheel, member: &Member, extracted: &Extracted) {
        if let (Some(store), Some(sha256)) = (self.store(), member.sha256) {
            let _ = store.keep_member(&wheel.sha256, &sha256, &member.soname, &extracted.path);
        }
    }

    fn by_override(&self, wheel: &Wheel, looked: &mut Vec<String>) -> Result<Option<Found>> {
        let Some(name) = env::wheel_override(&wheel.distribution) else { return Ok(None) };
        let Some(path) = self.env.path(name) else {
            looked.push(format!("{name} (not set)"));
            return Ok(None);
        };
        let (file, sha256) = open(&path, &format!("the wheel that {name} names"))?;
        let identity = Archive::open(&file, path.display().to_string())?.identity()?;
        let mut notes = self.check_identity(name, &path, &identity, wheel)?;
        if sha256 != wheel.sha256 {
            if self.env.flag(env::STRICT) {
                refuse!(
                    "{name}={} has sha256 {sha256}, expected {} ({}), and {} is set; give the pinned wheel or unset \
                     one of the two",
                    path.display(),
                    wheel.sha256,
                    wheel.file,
                    env::STRICT
                );
            }
            notes.push(format!(
                "{name}={} is not the pinned wheel {}; it is used as it is",
                path.display(),
                wheel.file
            ));
        }
        Ok(Some(Found { file, path, source: Source::Override, sha256, notes }))
    }

    fn check_identity(&self, name: &str, path: &Path, found: &Identity, wheel: &Wheel) -> Result<Vec<String>> {
        let path = path.display();
        if found.distribution != wheel.distribution {
            refuse!(
                "{name}={path} is a wheel of {}, expected {}; name the right file",
                found.distribution,
                wheel.distribution
            );
        }
        let arch = wheel.target.split('-').next().unwrap_or_default();
        let fits = |tag: &String| {
            tag.rsplit('-').next().is_some_and(|platforms| {
                platforms
                    .split('.')
                    .any(|p| p.starts_with("manylinux") && p.ends_with(arch) || p == format!("linux_{arch}"))
            })
        };
        if !found.tags.iter().any(fits) {
            refuse!(
                "{name}={path} is for {}, the target is {}; name the wheel of that platform",
                found.tags.join(", "),
                wheel.target
            );
        }
        if found.version == wheel.version {
            return Ok(Vec::new());
        }
        if !self.env.flag(env::ALLOW_VERSION) {
            refuse!(
                "{name}={path} has version {}, expected {}; name a wheel of that version, or set {}=1 to use this one",
                found.version,
                wheel.version,
                env::ALLOW_VERSION
            );
        }
        Ok(vec![format!("{name}={path} has version {}, this crate was written for {}", found.version, wheel.version)])
    }

    fn in_directories(&self, wheel: &Wheel, looked: &mut Vec<String>) -> Result<Option<Found>> {
        let given = self.env.path(env::WHEEL_DIR);
        if given.is_none() {
            looked.push(format!("{} (not set)", env::WHEEL_DIR));
        }
        for folder in [given, self.workspace.clone()].into_iter().flatten() {
            let path = folder.join(&wheel.file);
            if !path.exists() {
                looked.push(format!("the folder {}", folder.display()));
                continue;
            }
            let (file, sha256) = open(&path, "the wheel")?;
            if sha256 != wheel.sha256 {
                let remedy = match env::wheel_override(&wheel.distribution) {
                    Some(name) => format!("replace it, or name it by {name} if you mean it"),
                    None => "replace it".to_owned(),
                };
                refuse!("{} has sha256 {sha256}, expected {}; {remedy}", path.display(), wheel.sha256);
            }
            return Ok(Some(Found { file, path, source: Source::Directory, sha256, notes: Vec::new() }));
        }
        Ok(None)
    }

    fn in_cache(&self, wheel: &Wheel, members: &[&Member], looked: &mut Vec<String>) -> Option<Supply> {
        let Some(store) = self.store() else {
            looked.push(format!("the cache (no folder: neither {} nor HOME is set)", env::CACHE_DIR));
            return None;
        };
        let supply = cached(&store, wheel, members, Source::Cache, Vec::new());
        if supply.is_none() {
            let spoilt = store.path(&wheel.sha256, &wheel.file).exists();
            let how = if spoilt { " (what is there has another digest)" } else { "" };
            looked.push(format!("the cache {}{how}", store.root().display()));
        }
        supply
    }

    fn in_checkout(&self, wheel: &Wheel, looked: &mut Vec<String>) -> Result<Option<Found>> {
        let Some(checkout) = &self.checkout else { return Ok(None) };
        let record = Record::read(checkout)?;
        let Some(record) = record.filter(|r| r.distribution == wheel.distribution && r.target == wheel.target) else {
            looked.push(format!("the local build of this checkout ({}, made by `cargo xtask wheel`)", local::RECORD));
            return Ok(None);
        };
        if !record.path.exists() {
            looked.push(format!("the local build {} (gone)", record.path.display()));
            return Ok(None);
        }
        let (file, sha256) = open(&record.path, "the local build")?;
        if sha256 != record.sha256()? {
            refuse!("{} has changed since it was built; run `cargo xtask wheel` again", record.path.display());
        }
        Ok(Some(Found { file, path: record.path, source: Source::Local, sha256, notes: Vec::new() }))
    }

    fn on_network(&mut self, wheel: &Wheel, members: &[&Member], looked: &mut Vec<String>) -> Result<Option<Supply>> {
        if let Some(name) = self.env.offline() {
            looked.push(format!("not the network, since {name} is set"));
            return Ok(None);
        }
        let Some(store) = self.store() else { return Ok(None) };
        let sources = self.mirrored(&wheel.sources)?;
        let client = Client::new();
        store.locked(&wheel.sha256, || {
            // Somebody else may have fetched it while this process waited.
            if let Some(supply) = cached(&store, wheel, members, Source::Cache, Vec::new()) {
                return Ok(Some(supply));
            }
            for source in &sources {
                match self.fetch(&client, &store, source, wheel, members) {
                    Ok(notes) => return Ok(cached(&store, wheel, members, Source::Network, notes)),
                    Err(Error::Unavailable(fault)) => looked.push(fault),
                    Err(fault) => return Err(fault),
                }
            }
            Ok(None)
        })
    }

    /// Fetches into the cache, whose lock for this wheel is held, and answers what to tell the user.
    fn fetch(
        &mut self,
        client: &Client,
        store: &Store,
        source: &lock::Source,
        wheel: &Wheel,
        members: &[&Member],
    ) -> Result<Vec<String>> {
        match source {
            lock::Source::Url(url) => Ok(vec![self.fetch_url(client, store, url, wheel, members)?]),
            lock::Source::Index(page) => self.fetch_linked(client, store, page, wheel, members),
            lock::Source::Purl(purl) => {
                let mut faults = Vec::new();
                for place in index::places(purl, self.env)? {
                    let (from, result) = match place {
                        index::Place::Page { url, from } => {
                            let result = self.fetch_linked(client, store, &url, wheel, members);
                            (from, result)
                        }
                        index::Place::Folder(folder) => {
                            (folder.display().to_string(), copy_in(store, &folder.join(&wheel.file), wheel))
                        }
                    };
                    match result {
                        Err(Error::Unavailable(fault)) => faults.push(format!("{purl} at {from}: {fault}")),
                        result => return result,
                    }
                }
                Err(Error::Unavailable(faults.join("; ")))
            }
        }
    }

    fn fetch_linked(
        &mut self,
        client: &Client,
        store: &Store,
        page: &str,
        wheel: &Wheel,
        members: &[&Member],
    ) -> Result<Vec<String>> {
        let link = index::find(client, page, &wheel.file, &wheel.sha256)?;
        let mut notes = vec![self.fetch_url(client, store, &link.url, wheel, members)?];
        if let Some(reason) = link.yanked {
            let reason = if reason.is_empty() { String::new() } else { format!(": {reason}") };
            notes.push(format!(
                "{} was withdrawn from {}{reason}; it is used, since it is pinned",
                wheel.file,
                redacted(page)
            ));
        }
        Ok(notes)
    }

    fn fetch_url(
        &mut self,
        client: &Client,
        store: &Store,
        url: &str,
        wheel: &Wheel,
        members: &[&Member],
    ) -> Result<String> {
        let started = Instant::now();
        if let Some(size) = wheel.size.filter(|_| ranges::possible(members)) {
            let got = ranges::fetch(client, url, size, members, |member, place, reader| {
                let sha256 = member.sha256.unwrap_or(wheel.sha256);
                let path = store.member_path(&sha256, &member.soname);
                let mut transfer = Transfer { reader, fault: None };
                let result = store.publish_member(&wheel.sha256, &path, |file| {
                    copy_from_place(&mut transfer, place, member, &wheel.file, file, &path)
                });
                match (result, transfer.fault) {
                    (Err(_), Some(fault)) => Err(Error::Unavailable(fault)),
                    (result, _) => result.map(drop),
                }
            });
            match got {
                Ok(bytes) => {
                    let (summary, kept) = (summary(bytes, started), store.root().join("members"));
                    let names: Vec<&str> = members.iter().map(|member| member.soname.as_str()).collect();
                    return Ok(format!(
                        "{} of {} fetched ({summary}), kept in {}",
                        names.join(", "),
                        wheel.file,
                        kept.display()
                    ));
                }
                // The server does not serve ranges, or not well: the whole wheel is checked as a whole.
                Err(Error::Unavailable(_)) => {}
                Err(refused) => return Err(refused),
            }
        }
        let path = store.path(&wheel.sha256, &wheel.file);
        let expected = Expected { sha256: wheel.sha256, size: wheel.size };
        let bytes = publish(&path, |file| client.download(url, &expected, file, &path, self.progress))?;
        Ok(format!("{} fetched ({}), kept in {}", wheel.file, summary(bytes, started), path.display()))
    }

    /// A lock's sources. A mirror replaces the release host, and fails closed: that host's index is not tried either.
    pub(super) fn mirrored(&self, sources: &[lock::Source]) -> Result<Vec<lock::Source>> {
        let Some(mirror) = self.env.text(env::MIRROR) else { return Ok(sources.to_vec()) };
        if !mirror.starts_with("https://") && !mirror.starts_with("http://") {
            refuse!("{} is not an http or https address; correct or unset it", env::MIRROR);
        }
        let mirrored = |source: &lock::Source| match source {
            lock::Source::Url(url) => {
                let path = url::Url::parse(url).map(|url| url.path().to_owned()).unwrap_or_default();
                Some(lock::Source::Url(format!("{}{path}", mirror.trim_end_matches('/'))))
            }
            lock::Source::Index(_) => None,
            lock::Source::Purl(_) => Some(source.clone()),
        };
        Ok(sources.iter().filter_map(mirrored).collect())
    }

    pub(super) fn store(&self) -> Option<Store> {
        self.env.cache_dir().map(Store::new)
    }
}

/// The members if they are all there, else the wheel.
fn cached(store: &Store, wheel: &Wheel, members: &[&Member], source: Source, notes: Vec<String>) -> Option<Supply> {
    if !members.is_empty()
        && let Some(files) = store.members(members)
    {
        return Some(Supply::Members { files, source, notes });
    }
    let (path, file) = store.lookup(&wheel.sha256, &wheel.file)?;
    Some(Supply::Wheel(Found { file, path, source, sha256: wheel.sha256, notes }))
}

/// Copies a wheel from a folder of pip's into the cache, if it is the pinned one.
fn copy_in(store: &Store, from: &Path, wheel: &Wheel) -> Result<Vec<String>> {
    if !from.exists() {
        return Err(Error::Unavailable("not there".to_owned()));
    }
    store.keep_wheel(&wheel.sha256, &wheel.file, from)?;
    Ok(Vec::new())
}

/// A transfer under way, and how it failed: what decompresses cannot tell that from bad bytes, which no other source
/// and no second try would mend.
struct Transfer<'a> {
    reader: &'a mut dyn Read,
    fault: Option<String>,
}

impl Read for Transfer<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        self.reader.read(out).inspect_err(|e| self.fault = Some(e.to_string()))
    }
}

fn whole(supply: Supply) -> Result<Found> {
    match supply {
        Supply::Wheel(found) => Ok(found),
        Supply::Members { .. } => refuse!("members were found where a whole wheel was asked for"),
    }
}

/// Opens and hashes; the descriptor is read again later, so what is extracted is what was hashed.
fn open(path: &Path, what: &str) -> Result<(File, Digest)> {
    let failed = |e: &std::io::Error| Error::io(&format!("reading {what},"), path, e);
    let mut file = File::open(path).map_err(|e| failed(&e))?;
    if !file.metadata().map_err(|e| failed(&e))?.is_file() {
        refuse!("{what}, {}, is not a file; name the .whl file itself", path.display());
    }
    let (sha256, _) = hash_reader(&file).map_err(|e| failed(&e))?;
    file.seek(SeekFrom::Start(0)).map_err(|e| failed(&e))?;
    Ok((file, sha256))
}

fn nowhere(wheel: &Wheel, looked: &[String], variable: Option<&str>) -> Error {
    let size = wheel.size.map(|size| format!(", {size} bytes")).unwrap_or_default();
    let places: Vec<String> = wheel
        .sources
        .iter()
        .map(|source| match source {
            lock::Source::Url(url) => redacted(url),
            lock::Source::Index(page) => redacted(page),
            lock::Source::Purl(purl) => purl.clone(),
        })
        .collect();
    let named = variable.map(|name| format!("set {name} to its path, or ")).unwrap_or_default();
    Error::Unavailable(format!(
        "the wheel {} (sha256 {}{size}) was found nowhere. Looked at: {}. Remedy: get it from {} and {named}put it into \
         the folder that {} names or beside your workspace's Cargo.toml; {}=1 builds without any kernel",
        wheel.file,
        wheel.sha256,
        looked.join("; "),
        places.join(" or "),
        env::WHEEL_DIR,
        env::SKIP_VENDOR
    ))
}
