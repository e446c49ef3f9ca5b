//! `artifacts.lock`: what is pinned. Strict: an unknown key or a malformed value is an error, never ignored.

use std::path::Path;

use super::digest::Digest;
use super::env;
use super::error::{Error, Result, refuse};
use super::kernels::{self, Kernel};
use super::table::{Fault, Parsed, Table, flag, named, text, whole};

/// The only format there is so far.
const VERSION: u32 = 1;

#[derive(Debug, Clone)]
pub struct Lock {
    pub wheels: Vec<Wheel>,
    pub kernels: Vec<Kernel>,
}

/// One wheel for one target.
#[derive(Debug, Clone)]
pub struct Wheel {
    pub distribution: String,
    pub version: String,
    /// `<arch>-<os>`, as in `CARGO_CFG_TARGET_ARCH` and `CARGO_CFG_TARGET_OS`.
    pub target: String,
    /// Which one of several wheels of this distribution for this target: what GPUs it is for, where each has its own.
    pub variant: Option<String>,
    pub file: String,
    pub sha256: Digest,
    pub size: Option<u64>,
    /// Where it may be fetched from, in turn.
    pub sources: Vec<Source>,
    /// A build goes on without this wheel, with a warning, where it cannot be had.
    pub optional: bool,
    pub members: Vec<Member>,
}

/// One place a wheel may be fetched from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// The file itself.
    Url(String),
    /// An index page that links to the file.
    Index(String),
    /// A package URL: fetched from wherever this machine is configured to get packages of that type.
    Purl(String),
}

/// One shared object inside a wheel.
#[derive(Debug, Clone)]
pub struct Member {
    pub path: String,
    pub soname: String,
    /// The Cargo feature that wants it; always wanted without one and without a name.
    pub feature: Option<String>,
    /// What `FLASHINFER_RS_MODULES` calls it, which alone wants it: it is too large to come with a feature.
    pub name: Option<String>,
    pub size: Option<u64>,
    pub sha256: Option<Digest>,
    /// Where its local header starts in the wheel.
    pub offset: Option<u64>,
    /// Bytes from there to the end of its data.
    pub length: Option<u64>,
    /// Bytes of its data as they are in the wheel.
    pub compressed: Option<u64>,
    pub method: Option<Method>,
    pub crc32: Option<u32>,
    /// Asked for by name; see [`modules`](super::modules).
    pub named: bool,
}

impl Member {
    fn of(mut table: Table<'_>) -> Parsed<Self> {
        let member = Self {
            path: table.required("path", text)?,
            soname: table.required("soname", text)?,
            feature: table.optional("feature", text)?,
            name: table.optional("name", text)?,
            size: table.optional("size", whole)?,
            sha256: table.optional("sha256", |value| text(value)?.parse())?,
            offset: table.optional("offset", whole)?,
            length: table.optional("length", whole)?,
            compressed: table.optional("compressed", whole)?,
            method: table.optional("method", |value| named(value, &METHODS))?,
            crc32: table.optional("crc32", |value| crc32(&text(value)?))?,
            named: false,
        };
        table.end("field")?;
        Ok(member)
    }

    /// A member of which no more than the path is known.
    pub fn at(path: impl Into<String>) -> Self {
        let path = path.into();
        let soname = path.rsplit('/').next().unwrap_or_default().to_owned();
        let (feature, name, size, sha256, offset, length, compressed) = (None, None, None, None, None, None, None);
        let (method, crc32, named) = (None, None, false);
        Self { path, soname, feature, name, size, sha256, offset, length, compressed, method, crc32, named }
    }

    /// Where it lies, if the lock says.
    pub fn place(&self) -> Option<Place> {
        Some(Place { offset: self.offset?, length: self.length?, compressed: self.compressed?, method: self.method? })
    }

    /// The same, known by its path alone: what is locked is true of the pinned wheel only.
    pub fn unlocked(&self) -> Self {
        let Self { soname, feature, name, named, .. } = self.clone();
        Self { soname, feature, name, named, ..Self::at(self.path.clone()) }
    }

    fn check(&self) -> std::result::Result<(), String> {
        plain_name(&self.soname)?;
        if self.name.is_some() && self.feature.is_some() {
            return Err(format!("{}: it has a name and a feature, of which one alone can want it", self.path));
        }
        let place = [
            self.offset.is_some(),
            self.length.is_some(),
            self.compressed.is_some(),
            self.method.is_some(),
            self.crc32.is_some(),
        ];
        let known = self.size.is_some() && self.sha256.is_some();
        let whole = place.iter().all(|there| *there) && known || place.iter().all(|there| !there);
        if !whole {
            return Err(format!(
                "{}: offset, length, compressed, method, crc32, size and sha256 go together",
                self.path
            ));
        }
        let fits = self.place().is_none_or(|place| {
            let end = place.offset.checked_add(place.length);
            place.length >= LOCAL_HEADER.saturating_add(place.compressed) && end.is_some()
        });
        if fits { Ok(()) } else { Err(format!("{}: offset, length and compressed do not fit each other", self.path)) }
    }
}

/// The fixed part of a local header.
pub const LOCAL_HEADER: u64 = 30;

/// How a member is compressed: nothing else occurs in wheels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    Stored,
    Deflate,
}

/// What the lock calls them.
const METHODS: [(&str, Method); 2] = [("stored", Method::Stored), ("deflate", Method::Deflate)];

/// Where a member lies in its wheel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub offset: u64,
    pub length: u64,
    pub compressed: u64,
    pub method: Method,
}

/// A CRC-32 as it is written here.
fn crc32(text: &str) -> std::result::Result<u32, String> {
    let fine = text.len() == 8 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let value = u32::from_str_radix(text, 16).ok().filter(|_| fine);
    value.ok_or_else(|| format!("`{text}` is not a CRC-32: expected 8 lower-case hexadecimal digits"))
}

/// Reads a file of this format's version; `name` stands in the messages.
pub(super) fn versioned<T>(
    text: &str,
    name: &str,
    remedy: &str,
    read: impl FnOnce(Table<'_>) -> Parsed<T>,
) -> Result<T> {
    let malformed = |fault: Fault| Error::Refused(format!("{name} is malformed: {}; {remedy}", fault.in_text(text)));
    let mut table = Table::parse(text).map_err(malformed)?;
    // First, since a later version may have keys that would be called faults.
    let version: u32 = table.required("version", whole).map_err(malformed)?;
    if version != VERSION {
        refuse!("{name} has version {version}, this crate reads version {VERSION}; {remedy}");
    }
    read(table).map_err(malformed)
}

impl Lock {
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io("reading", path, &e))?;
        Self::parse(&text, &path.display().to_string())
    }

    fn of(mut table: Table<'_>) -> Parsed<Self> {
        let wheels = table.tables("wheel", Wheel::of)?;
        let kernels = table.optional_tables("kernel", Kernel::of)?.unwrap_or_default();
        table.end("field")?;
        Ok(Self { wheels, kernels })
    }

    /// Parses and checks; `name` stands in the messages.
    pub fn parse(text: &str, name: &str) -> Result<Self> {
        let remedy = "restore the file from the crate's release";
        let lock = versioned(text, name, remedy, Self::of)?;
        for (i, wheel) in lock.wheels.iter().enumerate() {
            if let Err(fault) = wheel.check() {
                refuse!("{name}: wheel {} for {}: {fault}; {remedy}", wheel.file, wheel.target);
            }
            let others = || lock.wheels[..i].iter().filter(|other| other.target == wheel.target);
            let is_twin = |other: &Wheel| other.distribution == wheel.distribution && other.variant == wheel.variant;
            if others().any(is_twin) {
                let variant = wheel.variant.as_ref().map(|variant| format!(", variant {variant}")).unwrap_or_default();
                refuse!("{name} pins {} twice for {}{variant}; {remedy}", wheel.distribution, wheel.target);
            }
            // One folder has all of a target's libraries, and the dynamic linker tells them apart by these names alone.
            for member in &wheel.members {
                let has = |other: &&Wheel| other.members.iter().any(|theirs| theirs.soname == member.soname);
                if let Some(other) = others().find(has) {
                    refuse!(
                        "{name}: {} and {} both have {} for {}, and a build vendors one library of a name; keep the wheel \
                         that is meant",
                        other.file,
                        wheel.file,
                        member.soname,
                        wheel.target
                    );
                }
            }
        }
        kernels::check(&lock.kernels, name)?;
        Ok(lock)
    }

    pub fn for_target<'a>(&'a self, target: &'a str) -> impl Iterator<Item = &'a Wheel> {
        self.wheels.iter().filter(move |wheel| wheel.target == target)
    }
}

impl Source {
    fn of(table: Table<'_>) -> Parsed<Self> {
        table.one_of(&["url", "index", "purl"], |key, text| {
            Ok(match key {
                "url" => Self::Url(text),
                "index" => Self::Index(text),
                _ => Self::Purl(text),
            })
        })
    }
}

impl Wheel {
    fn of(mut table: Table<'_>) -> Parsed<Self> {
        let wheel = Self {
            distribution: table.required("distribution", text)?,
            version: table.required("version", text)?,
            target: table.required("target", text)?,
            variant: table.optional("variant", text)?,
            file: table.required("file", text)?,
            sha256: table.required("sha256", |value| text(value)?.parse())?,
            size: table.optional("size", whole)?,
            sources: table.tables("sources", Source::of)?,
            optional: table.optional("optional", flag)?.unwrap_or_default(),
            members: table.tables("member", Member::of)?,
        };
        table.end("field")?;
        Ok(wheel)
    }

    /// The environment variable that names such a wheel directly. Of a distribution that has no name of its own there, it is
    /// the distribution's.
    pub fn variable(&self) -> String {
        let shouted = |text: &str| text.to_ascii_uppercase().replace(|c: char| !c.is_ascii_alphanumeric(), "_");
        let known = env::wheel_override(&self.distribution).map(str::to_owned);
        let short = self.distribution.strip_prefix("flashinfer_").unwrap_or(&self.distribution);
        let plain = known.unwrap_or_else(|| format!("FLASHINFER_RS_{}_WHEEL", shouted(short)));
        match &self.variant {
            Some(variant) => format!("{}_{}_WHEEL", plain.trim_end_matches("_WHEEL"), shouted(variant)),
            None => plain,
        }
    }

    /// Members that a set of features wants.
    pub fn wanted<'a>(&'a self, has_feature: &dyn Fn(&str) -> bool) -> Vec<&'a Member> {
        let wanted = |member: &&Member| match (&member.name, member.feature.as_deref()) {
            (Some(_), _) => member.named,
            (None, feature) => feature.is_none_or(has_feature),
        };
        self.members.iter().filter(wanted).collect()
    }

    fn check(&self) -> std::result::Result<(), String> {
        plain_name(&self.file)?;
        let prefix = format!("{}-{}-", self.distribution, self.version);
        if !self.file.starts_with(&prefix) || !self.file.ends_with(".whl") {
            return Err(format!("the file name does not start with `{prefix}` and end with `.whl`"));
        }
        if self.sources.is_empty() {
            return Err("no source".to_owned());
        }
        if self.members.is_empty() {
            return Err("no member".to_owned());
        }
        for (i, member) in self.members.iter().enumerate() {
            member.check()?;
            if self.members[..i].iter().any(|other| other.soname == member.soname) {
                return Err(format!("two members with the soname {}", member.soname));
            }
        }
        Ok(())
    }
}

/// A file name and nothing else: it becomes part of a path.
pub(super) fn plain_name(name: &str) -> std::result::Result<(), String> {
    let fine = !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', '\0', '\n', '\r', '"']);
    if fine { Ok(()) } else { Err(format!("`{}` is not a plain file name", name.escape_debug())) }
}
