//! `[[kernel]]`: FlashInfer-Bench kernels, which are folders with `kernel.so` and `kernel_metadata.txt`, pinned file by file and
//! vendored beside the wheels' libraries, by the same cache and the same rules.
//!
//! They are pinned in this crate's own lock, or in one of the user's, which [`KERNELS`](env::KERNELS) names. Nobody is looked
//! for: where no variable names a lock, none would be missed, and a build without its kernels would pass for a good one.

use std::fmt::Write;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};
use std::time::Instant;

use toml::de::DeValue;

use super::digest::{Digest, hash, hash_reader};
use super::emit;
use super::env::{self, Env};
use super::error::{Error, Result, refuse};
use super::fetch::{Client, Expected, redacted, summary};
use super::lock::{self, Lock, Member, plain_name};
use super::report::say;
use super::source::{Ladder, NO_CACHE, Source, host};
use super::store::{Store, open_file, publish_bytes, read_text};
use super::table::{Checked, Parsed, Table, flag, named, text, texts, whole};
use super::url::Url;
use super::vendor::place;
use super::wheel::Extracted;

/// What a kernel's library is called after its name, where it lies among others.
const SUFFIX: &str = ".kernel.so";
/// A text that belongs to a kernel is far smaller.
pub const TEXT_LIMIT: u64 = 16 << 20;
/// What Git leaves in the place of a file that Git LFS keeps.
pub const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";
const REMEDY: &str = "correct the entry, or let `cargo xtask kernel add`, in a checkout of flashinfer-rs, write it";

/// One kernel for one target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// What a program asks for it by.
    pub name: String,
    /// `<arch>-<os>`, as a wheel's.
    pub target: String,
    /// The name of what it computes.
    pub definition: String,
    /// The name of what it was built of.
    pub solution: Option<String>,
    pub author: Option<String>,
    /// The function to call: exported as `__tvm_ffi_` and this.
    pub entry: String,
    /// Whether it is given its outputs; unknown where nothing says.
    pub destination_passing_style: Option<bool>,
    /// What its GPU code is for: `sm_90a`, `compute_100`. Empty where it has none.
    pub arch: Vec<String>,
    /// The release of CUDA whose libraries it needs.
    pub cuda: Option<u32>,
    /// The libraries that it needs.
    pub needed: Vec<String>,
    /// Where its files may be had, in turn.
    pub sources: Vec<Place>,
    pub files: Vec<Pin>,
}

/// A folder with a kernel's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// An address, behind which the files' names are put.
    Url(String),
    /// A folder below the lock's own.
    Path(String),
}

/// A file of a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pin {
    pub name: Part,
    pub size: u64,
    pub sha256: Digest,
}

/// What a kernel's files are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Library,
    Metadata,
    Definition,
    Solution,
}

impl Part {
    pub const ALL: [Self; 4] = [Self::Library, Self::Metadata, Self::Definition, Self::Solution];

    pub fn file(self) -> &'static str {
        match self {
            Self::Library => "kernel.so",
            Self::Metadata => "kernel_metadata.txt",
            Self::Definition => "definition.json",
            Self::Solution => "solution.json",
        }
    }

    /// Whether every kernel has it.
    pub fn is_required(self) -> bool {
        matches!(self, Self::Library | Self::Metadata)
    }
}

/// A text that keeps a rule.
fn checked(value: DeValue<'_>, check: impl FnOnce(&str) -> Checked<()>) -> Checked<String> {
    let text = text(value)?;
    check(&text).map(|()| text)
}

/// What a kernel may be called: it becomes part of paths and of the program's symbols.
pub fn check_name(name: &str) -> std::result::Result<(), String> {
    const LONGEST: usize = 128;
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.');
    let starts = name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_');
    if starts && name.len() <= LONGEST && name.bytes().all(plain) {
        return Ok(());
    }
    Err(format!(
        "`{}` is not a kernel's name: expected at most {LONGEST} letters, digits, `_`, `-` and `.`, of which the last two \
         do not come first",
        name.escape_debug()
    ))
}

/// A text that stands in messages and reports.
pub fn check_line(text: &str) -> std::result::Result<(), String> {
    let fine = !text.trim().is_empty() && !text.contains(char::is_control);
    if fine { Ok(()) } else { Err(format!("`{}` is not a name: expected one line of text", text.escape_debug())) }
}

pub fn check_symbol(name: &str) -> std::result::Result<(), String> {
    let fine = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    let wrong = || format!("`{}` is not a function's name: expected letters, digits and `_`", name.escape_debug());
    if fine { Ok(()) } else { Err(wrong()) }
}

fn check_architecture(name: &str) -> std::result::Result<(), String> {
    let number = name.strip_prefix("sm_").or_else(|| name.strip_prefix("compute_")).unwrap_or_default();
    let number = number.strip_suffix(['a', 'f']).unwrap_or(number);
    if matches!(number.len(), 2 | 3) && number.bytes().all(|b| b.is_ascii_digit()) {
        return Ok(());
    }
    Err(format!("`{}` is not an architecture: expected sm_90, sm_90a or compute_90, for example", name.escape_debug()))
}

/// Texts that keep a rule, or none.
fn all_checked(value: DeValue<'_>, check: impl Fn(&str) -> Checked<()>) -> Checked<Vec<String>> {
    let all = texts(value)?;
    all.iter().try_for_each(|text| check(text))?;
    Ok(all)
}

/// Whether files can be had from there by their names.
pub fn is_address(text: &str) -> bool {
    Url::parse(text).is_ok_and(|url| matches!(url.scheme(), "http" | "https") && url.fragment().is_none())
}

fn check_inside(text: &str) -> std::result::Result<(), String> {
    let mut parts = Path::new(text).components();
    let fine = !text.is_empty()
        && !text.contains(char::is_control)
        && parts.all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    if fine {
        return Ok(());
    }
    Err(format!("`{}` leads out of the lock's folder: expected a relative path without `..`", text.escape_debug()))
}

/// The address of a file below that of its folder.
pub fn file_address(folder: &str, part: Part) -> Result<String> {
    let wrong = || Error::Refused(format!("{} is not the address of a folder; correct it", redacted(folder)));
    let mut url = Url::parse(folder).map_err(|_| wrong())?;
    url.push(part.file()).map_err(|()| wrong())?;
    Ok(url.into())
}

impl Place {
    fn of(table: Table<'_>) -> Parsed<Self> {
        table.one_of(&["url", "path"], |key, text| match key {
            "url" => Ok(Self::Url(text)),
            _ => check_inside(&text).map(|()| Self::Path(text)),
        })
    }
}

impl Pin {
    fn of(mut table: Table<'_>) -> Parsed<Self> {
        let pin = Self {
            name: table.required("name", |value| named(value, &Part::ALL.map(|part| (part.file(), part))))?,
            size: table.required("size", whole)?,
            sha256: table.required("sha256", |value| text(value)?.parse())?,
        };
        table.end("field")?;
        Ok(pin)
    }
}

impl Kernel {
    pub(super) fn of(mut table: Table<'_>) -> Parsed<Self> {
        let line = |value: DeValue<'_>| checked(value, check_line);
        let kernel = Self {
            name: table.required("name", |value| checked(value, check_name))?,
            target: table.required("target", line)?,
            definition: table.required("definition", line)?,
            solution: table.optional("solution", line)?,
            author: table.optional("author", line)?,
            entry: table.required("entry", |value| checked(value, check_symbol))?,
            destination_passing_style: table.optional("destination_passing_style", flag)?,
            arch: table.optional("arch", |value| all_checked(value, check_architecture))?.unwrap_or_default(),
            cuda: table.optional("cuda", whole)?,
            needed: table.optional("needed", |value| all_checked(value, plain_name))?.unwrap_or_default(),
            sources: table.tables("sources", Place::of)?,
            files: table.tables("file", Pin::of)?,
        };
        table.end("field")?;
        Ok(kernel)
    }

    /// The name that its library has beside those of the wheels.
    pub fn soname(&self) -> String {
        format!("{}{SUFFIX}", self.name)
    }

    /// The library's entry; [`check`](Self::check) sees that there is one.
    fn library(&self) -> Result<&Pin> {
        let library = self.files.iter().find(|file| file.name == Part::Library);
        library.ok_or_else(|| Error::Refused(format!("the kernel {} has no file {}", self.name, Part::Library.file())))
    }

    /// A file as the cache knows it.
    fn member(&self, pin: &Pin) -> Member {
        let soname = if pin.name == Part::Library { self.soname() } else { pin.name.file().to_owned() };
        Member { size: Some(pin.size), sha256: Some(pin.sha256), ..Member::at(soname) }
    }

    pub(super) fn check(&self) -> std::result::Result<(), String> {
        if self.sources.is_empty() {
            return Err("no source".to_owned());
        }
        // Here, and not where it is parsed, whose messages show the line: there may be a password in it.
        let wrong = |source: &Place| matches!(source, Place::Url(url) if !is_address(url));
        if let Some(i) = self.sources.iter().position(wrong) {
            return Err(format!("the url of source {} is not an http or https address", i + 1));
        }
        for part in Part::ALL {
            match self.files.iter().filter(|file| file.name == part).count() {
                0 if part.is_required() => return Err(format!("no file {}", part.file())),
                0 | 1 => {}
                count => return Err(format!("{count} files {}", part.file())),
            }
        }
        let large = self.files.iter().find(|file| file.name != Part::Library && file.size > TEXT_LIMIT);
        large.map_or(Ok(()), |file| {
            Err(format!("{} has {} bytes, and {TEXT_LIMIT} at most are read", file.name.file(), file.size))
        })
    }
}

/// Checks what a lock says of kernels; `name` is the lock's, for messages.
pub(super) fn check(kernels: &[Kernel], name: &str) -> Result<()> {
    for (i, kernel) in kernels.iter().enumerate() {
        if let Err(fault) = kernel.check() {
            refuse!("{name}: the kernel {} for {}: {fault}; {REMEDY}", kernel.name, kernel.target);
        }
        // Where only the case differs, some file systems see one file.
        let twin = |other: &&Kernel| other.name.eq_ignore_ascii_case(&kernel.name) && other.target == kernel.target;
        if let Some(other) = kernels[..i].iter().find(twin) {
            let (other, same) = (&other.name, if other.name == kernel.name { "" } else { " (case does not count)" });
            refuse!("{name} pins the kernel {other} twice for {}{same}; keep one of the two", kernel.target);
        }
    }
    Ok(())
}

/// Parses and checks a lock of the user's; `name` stands in the messages.
pub fn parse(text: &str, name: &str) -> Result<Vec<Kernel>> {
    let kernels = lock::versioned(text, name, REMEDY, |mut table| {
        let kernels = table.optional_tables("kernel", Kernel::of)?.unwrap_or_default();
        table.end("field")?;
        Ok(kernels)
    })?;
    check(&kernels, name)?;
    Ok(kernels)
}

/// A kernel, and the lock that pins it.
#[derive(Debug, Clone)]
pub struct Pinned {
    pub kernel: Kernel,
    pub lock: PathBuf,
}

/// The user's lock, if one is named. A relative path is that of a file in the workspace: cargo runs build scripts in a
/// folder that means nothing to a user.
pub fn named_lock(env: &Env, workspace: Option<&Path>) -> Result<Option<PathBuf>> {
    let Some(path) = env.path(env::KERNELS) else { return Ok(None) };
    let remedy = "give an absolute path, for example by `[env]` in .cargo/config.toml: \
                  FLASHINFER_RS_KERNELS = { value = \"kernels.lock\", relative = true }";
    let found = match workspace {
        _ if path.is_absolute() => path.clone(),
        Some(folder) => folder.join(&path),
        None => {
            let shown = path.display();
            refuse!("{}={shown} is relative, and the workspace's folder is not known here; {remedy}", env::KERNELS)
        }
    };
    if !found.is_file() {
        refuse!(
            "{}={} names no file: {} is not there; correct it, or {remedy}",
            env::KERNELS,
            path.display(),
            found.display()
        );
    }
    Ok(Some(found))
}

/// Every kernel that is pinned, in this crate's own lock, which was read already, and in the user's.
pub fn pinned(own: &Lock, own_path: &Path, users: Option<&Path>) -> Result<Vec<Pinned>> {
    let pinned = |lock: &Path, kernels: &[Kernel]| -> Vec<Pinned> {
        kernels.iter().map(|kernel| Pinned { kernel: kernel.clone(), lock: lock.to_owned() }).collect()
    };
    let mut all = pinned(own_path, &own.kernels);
    let Some(users) = users else { return Ok(all) };
    let text = read_text(users).map_err(|e| Error::io("reading", users, &e))?;
    all.extend(pinned(users, &parse(&text, &users.display().to_string())?));
    let kernels: Vec<Kernel> = all.iter().map(|pinned| pinned.kernel.clone()).collect();
    check(&kernels, &format!("{} together with {}", users.display(), own_path.display()))?;
    Ok(all)
}

/// A kernel that was vendored.
pub struct Row<'a> {
    pub kernel: &'a Kernel,
    pub source: Source,
    pub library: Extracted,
    /// Its other files, which go into the program.
    pub texts: Vec<(Part, String)>,
}

/// What was vendored, and what is to be said of it.
#[derive(Default)]
pub struct Outcome<'a> {
    pub rows: Vec<Row<'a>>,
    pub warnings: Vec<String>,
    /// What happened, for those who look.
    pub told: Vec<String>,
    /// Why a kernel is not there.
    pub missing: Vec<String>,
    /// Files whose change makes this outcome stale.
    pub watch: Vec<PathBuf>,
}

/// Vendors every kernel of the target into `lib_dir`. `others` are the names of the libraries that lie there.
pub fn vendor<'a>(
    pinned: &'a [Pinned],
    target: &str,
    ladder: &mut Ladder<'_>,
    lib_dir: &Path,
    others: &[&str],
) -> Result<Outcome<'a>> {
    let mut outcome = Outcome::default();
    for Pinned { kernel, lock } in pinned {
        if kernel.target != target {
            let there = pinned.iter().any(|other| other.kernel.name == kernel.name && other.kernel.target == target);
            if !there {
                // Without its folder: it goes into the program.
                let lock = lock.file_name().unwrap_or_default().to_string_lossy();
                let Kernel { name, target: other, .. } = kernel;
                outcome
                    .missing
                    .push(format!("{lock} pins the kernel {name} for {other}, and this program is for {target}"));
            }
            continue;
        }
        let Supply { files, source, told } = ladder.kernel(kernel, lock)?;
        outcome.told.extend(told);
        outcome.warnings.extend(strangers(kernel, others));
        let (mut library, mut texts) = (None, Vec::new());
        for (pin, (path, mut file)) in kernel.files.iter().zip(files) {
            if source == Source::Directory {
                outcome.watch.push(path.clone());
            }
            match pin.name {
                Part::Library => library = Some(place(&kernel.member(pin), &path, &mut file, lib_dir)?),
                part => texts.push((part, pinned_text(pin, &path, file)?)),
            }
        }
        let Some(library) = library else { continue };
        outcome.rows.push(Row { kernel, source, library, texts });
    }
    Ok(outcome)
}

/// What a kernel needs of CUDA that this crate does not vendor, in words.
fn strangers(kernel: &Kernel, others: &[&str]) -> Option<String> {
    let ours = |name: &str| others.contains(&name);
    let is_cudart = |name: &&String| name.starts_with("libcudart.so.") && !ours(name);
    let name = kernel.needed.iter().find(is_cudart).filter(|_| others.iter().any(|name| name.contains("cudart")))?;
    Some(format!(
        "the kernel {} needs {name}, of which the build has another release: it must be where the dynamic linker looks",
        kernel.name
    ))
}

/// A text whose bytes are the pinned ones.
fn pinned_text(pin: &Pin, path: &Path, file: File) -> Result<String> {
    let mut bytes = Vec::new();
    let read = file.take(TEXT_LIMIT + 1).read_to_end(&mut bytes);
    read.map_err(|e| Error::io("reading", path, &e))?;
    if hash(&bytes) != pin.sha256 {
        refuse!("{} changed while it was read; run the build again", path.display());
    }
    String::from_utf8(bytes).map_err(|_| Error::Refused(format!("{} is not UTF-8; write it so", path.display())))
}

/// A kernel's files, open, in the lock's order, each with its pinned digest.
pub struct Supply {
    pub files: Vec<(PathBuf, File)>,
    pub source: Source,
    pub told: Vec<String>,
}

impl Ladder<'_> {
    /// Finds a kernel's files, or says everywhere it looked and what to do. The rungs are a wheel's, but that nothing
    /// overrides a kernel, whose lock is the user's own, and that a checkout builds none.
    pub fn kernel(&mut self, kernel: &Kernel, lock: &Path) -> Result<Supply> {
        let mut looked = Vec::new();
        if let Some(supply) = self.in_folders(kernel, lock, &mut looked)? {
            return Ok(supply);
        }
        let members: Vec<Member> = kernel.files.iter().map(|pin| kernel.member(pin)).collect();
        let members: Vec<&Member> = members.iter().collect();
        let Some(store) = self.store()? else {
            looked.push(format!("the cache ({NO_CACHE})"));
            return Err(nowhere(kernel, lock, &looked));
        };
        let cached = |source, told| Some(Supply { files: store.members(&members)?, source, told });
        if let Some(supply) = cached(Source::Cache, Vec::new()) {
            return Ok(supply);
        }
        looked.push(format!("the cache {}", store.root().display()));
        if let Some(name) = self.env.offline() {
            looked.push(format!("not the network, since {name} is set"));
            return Err(nowhere(kernel, lock, &looked));
        }
        let urls = kernel.sources.iter().filter_map(|source| match source {
            Place::Url(url) => Some(lock::Source::Url(url.clone())),
            Place::Path(_) => None,
        });
        let sources = self.mirrored(&urls.collect::<Vec<_>>())?;
        let client = self.client.take().unwrap_or_else(|| Client::new(self.env));
        let found = store.locked(&kernel.library()?.sha256, || {
            // Somebody else may have fetched it while this process waited.
            if let Some(supply) = cached(Source::Cache, Vec::new()) {
                return Ok(Some(supply));
            }
            for source in &sources {
                let lock::Source::Url(url) = source else { continue };
                match self.fetch_kernel(&client, &store, url, kernel) {
                    Ok(note) => return Ok(cached(Source::Network, vec![note])),
                    Err(Error::Unavailable(fault)) => looked.push(fault),
                    Err(Error::Refused(fault)) => refuse!(
                        "the kernel {}, which {} pins: {fault}; if it was replaced there and you trust what it is now, pin \
                         that by `cargo xtask kernel add --replace`, in a checkout of flashinfer-rs",
                        kernel.name,
                        lock.display()
                    ),
                }
            }
            Ok(None)
        });
        let _ = self.client.set(client);
        found?.ok_or_else(|| nowhere(kernel, lock, &looked))
    }

    /// In a folder of the user's: below the one that holds wheels, which outranks all that the lock says, or where the lock
    /// says.
    fn in_folders(&self, kernel: &Kernel, lock: &Path, looked: &mut Vec<String>) -> Result<Option<Supply>> {
        let given = self.env.own_path(env::WHEEL_DIR)?.map(|folder| folder.join(&kernel.name));
        if given.is_none() {
            looked.push(format!("{} (not set)", env::WHEEL_DIR));
        }
        let beside = lock.parent().unwrap_or(Path::new("."));
        let named = kernel.sources.iter().filter_map(|source| match source {
            Place::Path(path) => Some(beside.join(path)),
            Place::Url(_) => None,
        });
        for folder in given.into_iter().chain(named) {
            if !folder.join(Part::Library.file()).exists() {
                looked.push(format!("the folder {} (no {})", folder.display(), Part::Library.file()));
                continue;
            }
            let files = kernel.files.iter().map(|pin| open(&folder, pin, kernel, lock)).collect::<Result<_>>()?;
            return Ok(Some(Supply { files, source: Source::Directory, told: Vec::new() }));
        }
        Ok(None)
    }

    /// Fetches into the cache, whose lock for this kernel is held, and answers what to tell the user.
    fn fetch_kernel(&mut self, client: &Client, store: &Store, folder: &str, kernel: &Kernel) -> Result<String> {
        let (started, library) = (Instant::now(), kernel.library()?);
        say(format_args!("fetching the kernel {} from {}", kernel.name, host(folder)));
        let mut bytes = 0;
        for pin in &kernel.files {
            let member = kernel.member(pin);
            if store.members(&[&member]).is_some() {
                continue;
            }
            let path = store.member_path(&pin.sha256, &member.soname);
            let expected = Expected { sha256: pin.sha256, size: Some(pin.size) };
            let address = file_address(folder, pin.name)?;
            let progress = &mut *self.progress;
            let fetch = |file: &mut File| client.download(&address, &expected, file, &path, progress);
            bytes += store.publish_member(&library.sha256, &path, fetch)?;
        }
        let kept = store.root().join("members");
        Ok(format!("the kernel {} fetched ({}), kept in {}", kernel.name, summary(bytes, started), kept.display()))
    }
}

/// A file of a folder of the user's, if it is the pinned one.
fn open(folder: &Path, pin: &Pin, kernel: &Kernel, lock: &Path) -> Result<(PathBuf, File)> {
    let path = folder.join(pin.name.file());
    let (shown, by, name) = (path.display(), lock.display(), &kernel.name);
    let failed = |e: std::io::Error| Error::io("reading", &path, &e);
    let mut file = open_file(&path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound | std::io::ErrorKind::InvalidInput => Error::Refused(format!(
            "{shown}, of the kernel {name}, which {by} pins, is not there or is no file; restore it"
        )),
        _ => failed(e),
    })?;
    let mut start = Vec::new();
    Read::by_ref(&mut file).take(LFS_POINTER.len() as u64).read_to_end(&mut start).map_err(failed)?;
    file.seek(SeekFrom::Start(0)).map_err(failed)?;
    let (sha256, size) = hash_reader(&file).map_err(failed)?;
    file.seek(SeekFrom::Start(0)).map_err(failed)?;
    if (sha256, size) == (pin.sha256, pin.size) {
        return Ok((path, file));
    }
    if start == LFS_POINTER {
        refuse!(
            "{shown}, of the kernel {name}, is a Git LFS pointer, not the file itself; fetch that by `git lfs pull`"
        );
    }
    refuse!(
        "{shown}, of the kernel {name}, has {size} bytes and sha256 {sha256}, expected {} and {}, as {by} pins it; restore \
         it, or pin what is there by `cargo xtask kernel add --replace`, in a checkout of flashinfer-rs",
        pin.size,
        pin.sha256
    )
}

fn nowhere(kernel: &Kernel, lock: &Path, looked: &[String]) -> Error {
    let sources = kernel.sources.iter().map(|source| match source {
        Place::Url(url) => redacted(url),
        Place::Path(path) => format!("the folder {path} beside that file"),
    });
    let sources: Vec<String> = sources.collect();
    let files: Vec<&str> = kernel.files.iter().map(|pin| pin.name.file()).collect();
    let sha256 = kernel.library().map(|pin| pin.sha256.to_string()).unwrap_or_default();
    Error::Unavailable(format!(
        "the kernel {name} (sha256 {sha256}), which {} pins, was found nowhere.\nRemedy: get its files ({}) from {} and put them \
         into the folder {name} below the one that {} names; or remove the entry, if the kernel is not wanted. {}=1 builds \
         without any kernel.\nLooked at:\n  {}",
        lock.display(),
        files.join(", "),
        sources.join(" or "),
        env::WHEEL_DIR,
        env::SKIP_VENDOR,
        looked.join("\n  "),
        name = kernel.name
    ))
}

/// Writes the table of kernels, `pinned.rs`, that the library compiles in; `missing` says why one that is pinned is not
/// there. With `embed` the libraries themselves go into it.
pub fn table(out_dir: &Path, rows: &[Row<'_>], missing: &[String], embed: bool) -> Result<()> {
    let mut text = String::from("// Written by build.rs: the kernels that were vendored.\n\n");
    let _ = writeln!(text, "pub(crate) static KERNELS: &[PinnedKernel] = &[");
    let mut embedded = String::new();
    for (i, row) in rows.iter().enumerate() {
        let Kernel { name, definition, solution, author, entry, destination_passing_style, arch, cuda, needed, .. } =
            row.kernel;
        // By number: two names may be one name to the linker.
        let symbol = embed.then(|| emit::symbol(&format!("kernel_{i}")));
        let part = |part| row.texts.iter().find(|(name, _)| *name == part).map(|(_, text)| text.as_str());
        let _ = writeln!(
            text,
            "    PinnedKernel {{ name: {name:?}, definition: {definition:?}, solution: {solution:?}, author: {author:?}, \
             entry: {entry:?}, destination_passing_style: {destination_passing_style:?}, architectures: &{arch:?}, cuda: \
             {cuda:?}, needed: &{needed:?}, metadata: {:?}, definition_json: {:?}, solution_json: {:?}, stored: {} }},",
            part(Part::Metadata).unwrap_or_default(),
            part(Part::Definition),
            part(Part::Solution),
            emit::stored(&row.kernel.soname(), &row.library, symbol.as_deref()),
        );
        if let Some(symbol) = symbol {
            embedded += &emit::embedding(&symbol, &row.library, out_dir);
        }
    }
    let _ = writeln!(text, "];\n\n/// Why a kernel that is pinned is not there.");
    let _ = writeln!(text, "pub(crate) static ELSEWHERE: &[&str] = &{missing:?};");
    publish_bytes(&out_dir.join("pinned.rs"), (text + &embedded).as_bytes())
}
