//! The ladder: where a wheel may come from. First hit wins; each rung is one function that says why it outranks the
//! next.

use std::cell::OnceCell;
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
use super::names;
use super::pip::Pip;
use super::ranges;
use super::releases::{self, Difference};
use super::report::say;
use super::snapshot;
use super::store::{Store, open_file};
use super::url::Url;
use super::uv;
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
            Self::Override => names::OVERRIDE,
            Self::Directory => "directory",
            Self::Cache => "cache",
            Self::Local => names::LOCAL,
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
    /// The wheel's own: that of the lock, but where it need not be the pinned one.
    pub version: String,
    pub notes: Notes,
}

/// What a user is told of what was found.
#[derive(Debug, Default)]
pub struct Notes {
    /// What a user should know.
    pub warnings: Vec<String>,
    /// What happened, for those who look.
    pub told: Vec<String>,
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
        notes: Notes,
    },
    /// Nothing: no place has the wheel.
    Nowhere(Nowhere),
}

/// A wheel that no place has.
pub struct Nowhere {
    /// Everywhere that was looked, and what to do.
    pub fault: Error,
    /// The same in a few words, without a place of this machine or its network: they go into the program.
    pub brief: String,
    /// The files that were looked for.
    pub files: Vec<PathBuf>,
}

/// Where was looked in vain.
#[derive(Default)]
struct Looked {
    places: Vec<String>,
    /// What of it a program may tell.
    brief: Vec<String>,
    files: Vec<PathBuf>,
}

impl Looked {
    fn add(&mut self, place: impl Into<String>) {
        self.places.push(place.into());
    }

    fn add_brief(&mut self, place: impl Into<String>, brief: impl Into<String>) {
        self.add(place);
        self.brief.push(brief.into());
        self.brief.dedup();
    }
}

/// What is wanted of a wheel.
#[derive(Clone, Copy, Default)]
struct Wanted<'a> {
    /// All of it, where there are none.
    members: &'a [&'a Member],
    /// The wheel, though no more is read of it than these members.
    as_wheel: bool,
    /// A folder of this build's own, for copies that nobody else can change and for what the cache cannot keep.
    scratch: Option<&'a Path>,
}

impl<'a> Wanted<'a> {
    /// What may come without the rest of the wheel.
    fn alone(&self) -> &'a [&'a Member] {
        if self.as_wheel { &[] } else { self.members }
    }
}

/// All that the ladder looks at.
pub struct Ladder<'a> {
    pub env: &'a Env,
    /// The folder that holds the target directory, if known.
    pub workspace: Option<PathBuf>,
    /// The checkout of this repository, if this is one.
    pub checkout: Option<PathBuf>,
    pub progress: Progress<'a>,
    /// What asks the network, once that is needed: what it learns of a host for one wheel holds for the next.
    pub client: OnceCell<Client>,
}

impl<'a> Ladder<'a> {
    /// Without a workspace and a checkout.
    pub fn new(env: &'a Env, progress: Progress<'a>) -> Self {
        Self { env, workspace: None, checkout: None, progress, client: OnceCell::new() }
    }
}

impl Ladder<'_> {
    /// Finds the wheel as a whole, or says everywhere it looked and what to do.
    pub fn find(&mut self, wheel: &Wheel) -> Result<Found> {
        whole(self.look(wheel, Wanted::default())?)
    }

    /// Finds these members, in the wheel or without the rest of it, or says everywhere it looked and what to do. `scratch` is a
    /// folder of this build's own: a wheel that is found is copied into there while it is hashed, as far as these members
    /// need it, so that they are taken out of what was hashed, whoever else may write the wheel.
    pub fn supply(&mut self, wheel: &Wheel, members: &[&Member], scratch: &Path) -> Result<Supply> {
        self.look(wheel, Wanted { members, as_wheel: false, scratch: Some(scratch) })
    }

    fn look(&mut self, wheel: &Wheel, wanted: Wanted<'_>) -> Result<Supply> {
        let mut looked = Looked::default();
        // The user named this very file: nothing outranks that.
        if let Some(found) = self.by_override(wheel, wanted, &mut looked)? {
            return Ok(Supply::Wheel(found));
        }
        // A folder of wheels is as deliberate, but not about one wheel.
        if let Some(found) = self.in_directories(wheel, wanted, &mut looked)? {
            return Ok(Supply::Wheel(found));
        }
        // Fetched and checked before, by any project of this user.
        if let Some(supply) = self.in_cache(wheel, wanted, &mut looked)? {
            return Ok(supply);
        }
        // What a contributor built here stands in only where the pinned wheel is not at hand.
        if let Some(found) = self.in_checkout(wheel, wanted, &mut looked)? {
            return Ok(Supply::Wheel(found));
        }
        // The only rung that costs time and needs others.
        match self.on_network(wheel, wanted, &mut looked) {
            Ok(Some(supply)) => return Ok(supply),
            Ok(None) => {}
            // The build can go on without it, whatever a proxy or a disk made of it.
            Err(fault) if wheel.optional => looked.add_brief(fault.to_string(), FETCHING),
            Err(fault) => return Err(fault),
        }
        Ok(Supply::Nowhere(self.nowhere(wheel, looked, Some(&wheel.variable()))))
    }

    /// As [`find`](Self::find), but only the pinned bytes will do: neither an override nor a local build is looked at. What is
    /// answered is a copy in `scratch`, as [`supply`](Self::supply) makes it, for the members that the lock has of the wheel; of
    /// one without members, the whole.
    pub fn find_pinned(&mut self, wheel: &Wheel, scratch: &Path) -> Result<Found> {
        let members: Vec<&Member> = wheel.members.iter().collect();
        let wanted = Wanted { members: &members, as_wheel: true, scratch: Some(scratch) };
        let mut looked = Looked::default();
        if let Some(found) = self.in_directories(wheel, wanted, &mut looked)? {
            return Ok(found);
        }
        let supply = match self.in_cache(wheel, wanted, &mut looked)? {
            Some(supply) => Some(supply),
            None => self.on_network(wheel, wanted, &mut looked)?,
        };
        whole(supply.unwrap_or_else(|| Supply::Nowhere(self.nowhere(wheel, looked, None))))
    }

    /// Keeps a member of the pinned wheel in the cache, so that the wheel need not be read again. That it cannot be
    /// kept is no fault of this build.
    pub fn keep(&self, wheel: &Wheel, member: &Member, extracted: &Extracted) {
        if let (Ok(Some(store)), Some(sha256)) = (self.store(), member.sha256) {
            let _ = store.keep_member(&wheel.sha256, &sha256, &member.soname, &extracted.path);
        }
    }

    fn by_override(&self, wheel: &Wheel, wanted: Wanted<'_>, looked: &mut Looked) -> Result<Option<Found>> {
        let name = wheel.variable();
        let Some(path) = self.env.own_path(&name)? else {
            looked.add(format!("{name} (not set)"));
            return Ok(None);
        };
        let (file, sha256) = open(&path, &format!("the wheel that {name} names"), wanted)?;
        let identity = Archive::open(&file, path.display().to_string())?.identity()?;
        let given = format!("{name}={}", path.display());
        let mut warnings = self.check_identity(&given, &identity, wheel, wanted)?;
        if sha256 != wheel.sha256 {
            if self.env.flag(env::STRICT) {
                refuse!(
                    "{given} has sha256 {sha256}, expected {} ({}), and {} is set; give the pinned wheel or unset one of the two",
                    wheel.sha256,
                    wheel.file,
                    env::STRICT
                );
            }
            warnings.push(format!("{given} is not the pinned wheel {}; it is used as it is", wheel.file));
        }
        let notes = Notes { warnings, ..Notes::default() };
        Ok(Some(Found { file, path, source: Source::Override, sha256, version: identity.version, notes }))
    }

    /// That a wheel which need not be the pinned one is of its kind; `given` says how it was named.
    fn check_identity(&self, given: &str, found: &Identity, wheel: &Wheel, wanted: Wanted<'_>) -> Result<Vec<String>> {
        if found.distribution != wheel.distribution {
            refuse!(
                "{given} is a wheel of {}, expected {}; name the right file",
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
                "{given} is for {}, the target is {}; name the wheel of that platform",
                found.tags.join(", "),
                wheel.target
            );
        }
        if found.version == wheel.version {
            return Ok(Vec::new());
        }
        if !self.env.flag(env::ALLOW_VERSION) {
            refuse!(
                "{given} has version {}, expected {}; name a wheel of that version, or set {}=1 to use this one",
                found.version,
                wheel.version,
                env::ALLOW_VERSION
            );
        }
        let mut warning =
            format!("{given} has version {}, this crate was written for {}", found.version, wheel.version);
        let every = wheel.members.iter().filter(|_| wanted.members.is_empty());
        let libraries = wanted.members.iter().copied().chain(every).map(|member| member.soname.as_str());
        if wheel.distribution == releases::DISTRIBUTION {
            match releases::difference(&wheel.version, &found.version, libraries) {
                Difference::Changed(changes) => refuse!(
                    "{given} has version {}, and what this crate calls is not as in {}: {}; name a wheel of that version, or \
                     turn off the Cargo features that want these libraries",
                    found.version,
                    wheel.version,
                    changes.join("; ")
                ),
                Difference::Unknown(what) => {
                    warning +=
                        &format!("; {what}, and a call with other arguments than a kernel's own fails or goes wrong")
                }
                Difference::None => {}
            }
        }
        Ok(vec![warning])
    }

    fn in_directories(&self, wheel: &Wheel, wanted: Wanted<'_>, looked: &mut Looked) -> Result<Option<Found>> {
        let given = self.env.own_path(env::WHEEL_DIR)?;
        if given.is_none() {
            looked.add(format!("{} (not set)", env::WHEEL_DIR));
        }
        if self.workspace.is_none() {
            looked.add("your workspace's folder (not known: the target folder does not lie in it)");
        }
        for folder in [given, self.workspace.clone()].into_iter().flatten() {
            let path = folder.join(&wheel.file);
            if !path.exists() {
                looked.add(format!("the folder {}{}", folder.display(), relatives(&folder, wheel)));
                looked.files.push(path);
                continue;
            }
            let (file, sha256) = open(&path, "the wheel", wanted)?;
            if sha256 != wheel.sha256 {
                refuse!(
                    "{} has sha256 {sha256}, expected {}; replace it, or name it by {} if you mean it",
                    path.display(),
                    wheel.sha256,
                    wheel.variable()
                );
            }
            let (source, version, notes) = (Source::Directory, wheel.version.clone(), Notes::default());
            return Ok(Some(Found { file, path, source, sha256, version, notes }));
        }
        Ok(None)
    }

    fn in_cache(&self, wheel: &Wheel, wanted: Wanted<'_>, looked: &mut Looked) -> Result<Option<Supply>> {
        let Some(store) = self.store()? else {
            looked.add_brief(format!("the cache ({NO_CACHE})"), "there was no folder for a cache");
            return Ok(None);
        };
        let supply = cached(&store, wheel, wanted, Source::Cache)?;
        if supply.is_none() {
            let path = store.path(&wheel.sha256, &wheel.file);
            let how = if path.exists() { " (what is there has another digest)" } else { "" };
            looked.add(format!("the cache {}{how}", store.root().display()));
            let kept = |member: &&Member| Some(store.member_path(&member.sha256?, &member.soname));
            looked.files.extend(wanted.alone().iter().filter_map(kept).chain([path]));
        }
        Ok(supply)
    }

    fn in_checkout(&self, wheel: &Wheel, wanted: Wanted<'_>, looked: &mut Looked) -> Result<Option<Found>> {
        let Some(checkout) = &self.checkout else { return Ok(None) };
        let record = Record::read(checkout)?;
        let Some(record) = record.filter(|r| r.distribution == wheel.distribution && r.target == wheel.target) else {
            looked.add(format!("the local build of this checkout ({}, made by `cargo xtask wheel`)", local::RECORD));
            return Ok(None);
        };
        if self.env.flag(env::STRICT) {
            looked.add(format!("not the local build {}, since {} is set", record.path.display(), env::STRICT));
            return Ok(None);
        }
        if !record.path.exists() {
            looked.add(format!("the local build {} (gone)", record.path.display()));
            return Ok(None);
        }
        let (file, sha256) = open(&record.path, "the local build", wanted)?;
        if sha256 != record.sha256()? {
            refuse!("{} has changed since it was built; run `cargo xtask wheel` again", record.path.display());
        }
        let identity = Archive::open(&file, record.path.display().to_string())?.identity()?;
        let given = format!("the local build {}", record.path.display());
        let warnings = self.check_identity(&given, &identity, wheel, wanted).map_err(|fault| {
            Error::Refused(format!("{fault}; or run `cargo xtask wheel` again, or delete {}", local::RECORD))
        })?;
        let notes = Notes { warnings, ..Notes::default() };
        let (path, source, version) = (record.path, Source::Local, identity.version);
        Ok(Some(Found { file, path, source, sha256, version, notes }))
    }

    fn on_network(&mut self, wheel: &Wheel, wanted: Wanted<'_>, looked: &mut Looked) -> Result<Option<Supply>> {
        if let Some(name) = self.env.offline() {
            let fault = format!("not the network, since {name} is set");
            looked.add_brief(fault, format!("the network was not asked, since {name} was set"));
            return Ok(None);
        }
        let unusable = match self.store()? {
            None => None,
            Some(store) => match store.check_writable(&wheel.sha256, wanted.alone()) {
                Ok(()) => return self.fetch_into(&store, wheel, wanted, looked),
                Err(fault) => Some(fault),
            },
        };
        // Of a few members each build can fetch its own. A wheel of 2 GB that nobody keeps would be fetched again and again.
        match wanted.scratch.filter(|_| ranges::possible(wanted.alone())) {
            Some(scratch) => {
                let fault =
                    unusable.map_or_else(|| format!("there is no cache: {NO_CACHE}"), |fault| fault.to_string());
                let mut supply = self.fetch_into(&Store::new(scratch.to_owned()), wheel, wanted, looked)?;
                if let Some(Supply::Members { notes, .. } | Supply::Wheel(Found { notes, .. })) = &mut supply {
                    notes.warnings.push(format!("{} is fetched by each build that needs it: {fault}", wheel.file));
                }
                Ok(supply)
            }
            None => unusable.map_or(Ok(None), Err),
        }
    }

    fn fetch_into(
        &mut self,
        store: &Store,
        wheel: &Wheel,
        wanted: Wanted<'_>,
        looked: &mut Looked,
    ) -> Result<Option<Supply>> {
        let sources = self.mirrored(&wheel.sources)?;
        let client = self.client.take().unwrap_or_else(|| Client::new(self.env));
        let found = store.locked(&wheel.sha256, || {
            // Somebody else may have fetched it while this process waited.
            if let Some(supply) = cached(store, wheel, wanted, Source::Cache)? {
                return Ok(Some(supply));
            }
            for source in &sources {
                match self.fetch(&client, store, source, wheel, wanted.alone(), looked) {
                    Ok(Some(fetched)) => {
                        let mut supply = cached(store, wheel, wanted, Source::Network)?;
                        if let Some(Supply::Members { notes, .. } | Supply::Wheel(Found { notes, .. })) = &mut supply {
                            *notes = fetched;
                        }
                        return Ok(supply);
                    }
                    Ok(None) => {}
                    Err(Error::Unavailable(fault)) => looked.add_brief(fault, FETCHING),
                    Err(fault) => return Err(fault),
                }
            }
            Ok(None)
        });
        let _ = self.client.set(client);
        found
    }

    /// Fetches into the cache, whose lock for this wheel is held, and answers what to tell the user.
    fn fetch(
        &mut self,
        client: &Client,
        store: &Store,
        source: &lock::Source,
        wheel: &Wheel,
        members: &[&Member],
        looked: &mut Looked,
    ) -> Result<Option<Notes>> {
        let purl = match source {
            lock::Source::Url(url) => {
                return self.fetch_url(client, store, url, wheel, members).map(|note| Some(told(note)));
            }
            lock::Source::Index(page) => return self.fetch_linked(client, store, page, wheel, members).map(Some),
            lock::Source::Purl(purl) => purl,
        };
        let pip = Pip::read(self.env)?;
        let pips = pip.client(client);
        for place in index::places(purl, self.env, &pip)? {
            let (from, result) = match place {
                index::Place::Page { url, from } => {
                    let asked = pips.as_ref().map_err(Error::clone);
                    let result = asked.and_then(|client| self.fetch_linked(client, store, &url, wheel, members));
                    let heeded = |fault: Error| match fault {
                        Error::Unavailable(fault) => {
                            let project = uv::of_project(self.workspace.as_deref());
                            Error::Unavailable(fault + &pip.unheeded() + &project)
                        }
                        fault => fault,
                    };
                    (from, result.map_err(heeded))
                }
                index::Place::Folder(folder) => {
                    (folder.display().to_string(), copy_in(store, &folder.join(&wheel.file), wheel))
                }
            };
            match result {
                Err(Error::Unavailable(fault)) => looked.add_brief(format!("{purl} at {from}: {fault}"), FETCHING),
                result => return result.map(Some),
            }
        }
        Ok(None)
    }

    fn fetch_linked(
        &mut self,
        client: &Client,
        store: &Store,
        page: &str,
        wheel: &Wheel,
        members: &[&Member],
    ) -> Result<Notes> {
        let link = index::find(client, page, &wheel.file, &wheel.sha256)?;
        let mut notes = match Url::parse(&link.url).map(|url| url.to_file_path()) {
            Ok(Ok(path)) => copy_in(store, &path, wheel)?,
            _ => told(self.fetch_url(client, store, &link.url, wheel, members)?),
        };
        if let Some(reason) = link.yanked {
            let reason = if reason.is_empty() { String::new() } else { format!(": {reason}") };
            notes.warnings.push(format!(
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
        let size = wheel.size.map(|size| format!(", {:.1} MB", size as f64 / 1e6)).unwrap_or_default();
        if let Some(size) = wheel.size.filter(|_| ranges::possible(members)) {
            say(format_args!("fetching {} members of {} from {}", members.len(), wheel.file, host(url)));
            let (progress, mut done) = (&mut *self.progress, 0);
            let total = members.iter().map(|member| Some(member.place()?.length)).sum();
            let got = ranges::fetch(client, url, size, members, |member, place, reader| {
                let sha256 = member.sha256.unwrap_or(wheel.sha256);
                let path = store.member_path(&sha256, &member.soname);
                let mut told = |bytes: usize| {
                    done += bytes as u64;
                    progress(done, total);
                };
                let mut transfer = Transfer { reader, fault: None, told: &mut told };
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
        say(format_args!("fetching {}{size} from {}", wheel.file, host(url)));
        let path = store.path(&wheel.sha256, &wheel.file);
        let expected = Expected { sha256: wheel.sha256, size: wheel.size };
        let fetch = |file: &mut File| client.download(url, &expected, file, &path, self.progress);
        let bytes = store.publish_in_parts(&wheel.sha256, &wheel.file, fetch)?;
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
                let path = Url::parse(url).map(|url| url.path().to_owned()).unwrap_or_default();
                Some(lock::Source::Url(format!("{}{path}", mirror.trim_end_matches('/'))))
            }
            lock::Source::Index(_) => None,
            lock::Source::Purl(_) => Some(source.clone()),
        };
        Ok(sources.iter().filter_map(mirrored).collect())
    }

    pub(super) fn store(&self) -> Result<Option<Store>> {
        Ok(self.env.cache_dir()?.map(Store::new))
    }

    fn nowhere(&self, wheel: &Wheel, looked: Looked, variable: Option<&str>) -> Nowhere {
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
        let beside = match &self.workspace {
            Some(folder) => {
                format!("put it into {}, or into the folder that {} names", folder.display(), env::WHEEL_DIR)
            }
            None => format!(
                "name its folder by {0}, for example by `[env]` in your project's .cargo/config.toml: {0} = {{ value = \
                 \"wheels\", relative = true }}",
                env::WHEEL_DIR
            ),
        };
        // Those that were asked are among what was looked at.
        let asked = looked.places.iter().any(|place| place.contains("://"));
        let from = if asked { "one of the addresses below".to_owned() } else { places.join(" or ") };
        let fault = format!(
            "the wheel {} (sha256 {}{size}) was found nowhere.\nRemedy: get it from {} and {named}{beside}. {}=1 builds without \
             any kernel.\nLooked at:\n  {}",
            wheel.file,
            wheel.sha256,
            from,
            env::SKIP_VENDOR,
            looked.places.join("\n  ")
        );
        let why = match looked.brief.as_slice() {
            [] => String::new(),
            brief => format!(" ({})", brief.join("; ")),
        };
        let named = variable.unwrap_or(env::WHEEL_DIR);
        let brief = format!(
            "the build found no wheel of {} {}{why}; `cargo build -vv` says where it looks, and {named} names the wheel",
            wheel.distribution, wheel.version
        );
        Nowhere { fault: Error::Unavailable(fault), brief, files: looked.files }
    }
}

/// Why there is no cache.
pub(super) const NO_CACHE: &str = "no folder: neither FLASHINFER_RS_CACHE_DIR nor HOME is set";
/// What a program may tell of a fetch that failed: the reasons have places in them.
const FETCHING: &str = "fetching it failed";

fn told(text: String) -> Notes {
    Notes { told: vec![text], ..Notes::default() }
}

/// The members if they are all there, else the wheel.
fn cached(store: &Store, wheel: &Wheel, wanted: Wanted<'_>, source: Source) -> Result<Option<Supply>> {
    let notes = Notes::default();
    if !wanted.alone().is_empty()
        && let Some(files) = store.members(wanted.alone())
    {
        return Ok(Some(Supply::Members { files, source, notes }));
    }
    let path = store.path(&wheel.sha256, &wheel.file);
    let Ok(opened) = open_file(&path) else { return Ok(None) };
    match read(opened, &path, wanted) {
        Ok((file, sha256)) if sha256 == wheel.sha256 => {
            let version = wheel.version.clone();
            Ok(Some(Supply::Wheel(Found { file, path, source, sha256, version, notes })))
        }
        Ok(_) | Err(Error::Unavailable(_)) => Ok(None),
        Err(fault) => Err(fault),
    }
}

/// Wheels of the same distribution that lie in a folder under other names than the pinned one, for a message.
fn relatives(folder: &Path, wheel: &Wheel) -> String {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.retain(|name| name.starts_with(&format!("{}-", wheel.distribution)) && name.ends_with(".whl"));
    names.sort();
    let variable = wheel.variable();
    match names.first() {
        Some(name) => format!(" (has {name}, which is not the pinned one; {variable} would use it)"),
        None => String::new(),
    }
}

/// Copies a wheel from a folder of pip's into the cache, if it is the pinned one.
fn copy_in(store: &Store, from: &Path, wheel: &Wheel) -> Result<Notes> {
    if !from.exists() {
        return Err(Error::Unavailable("not there".to_owned()));
    }
    store.keep_wheel(&wheel.sha256, &wheel.file, from)?;
    Ok(Notes::default())
}

/// Whom an address is asked of; where all goes wrong, the whole of it is among what was looked at.
pub(super) fn host(url: &str) -> String {
    let url = Url::parse(url).ok();
    url.as_ref().and_then(Url::host_str).unwrap_or("nobody").to_owned()
}

/// A transfer under way, and how it failed: what decompresses cannot tell that from bad bytes, which no other source
/// and no second try would mend.
struct Transfer<'a> {
    reader: &'a mut dyn Read,
    fault: Option<String>,
    /// Told of every byte.
    told: &'a mut dyn FnMut(usize),
}

impl Read for Transfer<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let read = self.reader.read(out).inspect_err(|e| self.fault = Some(e.to_string()));
        read.inspect(|&bytes| (self.told)(bytes))
    }
}

fn whole(supply: Supply) -> Result<Found> {
    match supply {
        Supply::Wheel(found) => Ok(found),
        Supply::Members { .. } => refuse!("members were found where a whole wheel was asked for"),
        Supply::Nowhere(nowhere) => Err(nowhere.fault),
    }
}

/// Opens and hashes a wheel.
fn open(path: &Path, what: &str, wanted: Wanted<'_>) -> Result<(File, Digest)> {
    let file = open_file(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::InvalidInput => {
            Error::Refused(format!("{what}, {}, is not usable: {e}; name the .whl file itself", path.display()))
        }
        _ => Error::io(&format!("reading {what},"), path, &e),
    })?;
    read(file, path, wanted).map_err(|fault| Error::Refused(fault.message().to_owned()))
}

/// Hashes a wheel that was opened. What is answered is the file itself, or a copy that nobody else can change.
fn read(mut file: File, path: &Path, wanted: Wanted<'_>) -> Result<(File, Digest)> {
    if let Some(scratch) = wanted.scratch {
        let members: Vec<&str> = wanted.members.iter().map(|member| member.path.as_str()).collect();
        let (sha256, copy) = snapshot::take(&file, path, &members, scratch)?;
        return Ok((copy, sha256));
    }
    let failed = |e: std::io::Error| Error::Unavailable(format!("reading {} failed: {e}", path.display()));
    let (sha256, _) = hash_reader(&file).map_err(failed)?;
    file.seek(SeekFrom::Start(0)).map_err(failed)?;
    Ok((file, sha256))
}
