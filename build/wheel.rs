//! Wheels: hostile zip archives until proven otherwise. What comes out was checked against the lock.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Take, Write};
use std::path::{Path, PathBuf};

use flate2::Crc;
use flate2::read::DeflateDecoder;

use super::digest::{Digest, Hasher};
use super::error::{Error, Result, refuse};
use super::index::normalized;
use super::layout::{self, Directory, Entry};
use super::lock::{LOCAL_HEADER, Member, Method, Place};
use super::store::publish;

/// A member may be this large at the most; today's are below 10 MB.
const MEMBER_LIMIT: u64 = 1 << 30;
/// METADATA and WHEEL are a few kilobytes, RECORD is about 100 bytes per member.
const TEXT_LIMIT: u64 = 16 << 20;

/// How members are compressed: no other way occurs in wheels.
const STORED: u16 = 0;
const DEFLATED: u16 = 8;

pub struct Wheel<R> {
    reader: R,
    members: BTreeMap<String, Entry>,
    name: String,
}

/// What a wheel says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Normalized: lower case, `_`.
    pub distribution: String,
    pub version: String,
    pub tags: Vec<String>,
}

/// A member on disk.
#[derive(Debug, Clone)]
pub struct Extracted {
    pub path: PathBuf,
    pub sha256: Digest,
    pub size: u64,
}

impl<R: Read + Seek> Wheel<R> {
    /// Opens an archive and looks at all of its structure; `name` stands in the messages. What programs read
    /// differently is refused: wheels are made by tools that write none of it.
    pub fn open(mut reader: R, name: impl Into<String>) -> Result<Self> {
        let name = name.into();
        let directory = layout::directory(&mut reader).map_err(|e| broken(&name, &e))?;
        layout::check_members(&mut reader, &directory).map_err(|e| broken(&name, &e))?;
        Self::with_known_layout(reader, directory, name)
    }

    /// As [`open`](Self::open), but looks at the central directory only: reading every local header would mean a
    /// request for each. A member's is looked at before it is read.
    pub fn open_remote(mut reader: R, name: impl Into<String>) -> Result<Self> {
        let name = name.into();
        let directory = layout::directory(&mut reader).map_err(|e| broken(&name, &e))?;
        Self::with_known_layout(reader, directory, name)
    }

    fn with_known_layout(reader: R, directory: Directory, name: String) -> Result<Self> {
        let members = named(directory, &name)?;
        Ok(Self { reader, members, name })
    }

    /// The distribution, version and tags that METADATA and WHEEL give.
    pub fn identity(&mut self) -> Result<Identity> {
        let metadata = self.metadata_path()?;
        let text = self.text(&metadata)?;
        let tags = self.text(&metadata.replace("/METADATA", "/WHEEL"))?;
        let field = |key: &str| headers(&text, key).next().unwrap_or_default().to_owned();
        Ok(Identity {
            distribution: normalized(&field("Name")),
            version: field("Version"),
            tags: headers(&tags, "Tag").map(str::to_owned).collect(),
        })
    }

    /// Writes a member to `folder`, under its soname, after checking it against its locked size and digest.
    pub fn extract(&mut self, member: &Member, folder: &Path) -> Result<Extracted> {
        let path = folder.join(&member.soname);
        let (sha256, size) = publish(&path, |file: &mut File| self.copy(member, file, &path))?;
        Ok(Extracted { path, sha256, size })
    }

    /// Where a member lies. Its end is where the next one starts.
    pub fn place(&self, path: &str) -> Result<Place> {
        let wheel = &self.name;
        let entry = self.entry(path)?;
        let method = match entry.facts.method {
            STORED => Method::Stored,
            DEFLATED => Method::Deflate,
            other => refuse!(
                "{wheel}: {path} is compressed by method {other}, expected deflate or none; use the pinned wheel"
            ),
        };
        let (offset, compressed) = (entry.offset, entry.facts.compressed);
        let length = entry.next.saturating_sub(offset);
        if length < LOCAL_HEADER.saturating_add(compressed) {
            refuse!("{wheel}: member {path} overlaps what follows it; get the wheel from a source you trust");
        }
        Ok(Place { offset, length, compressed, method })
    }

    fn entry(&self, path: &str) -> Result<&Entry> {
        match self.members.get(path) {
            Some(entry) => Ok(entry),
            None => refuse!("{} has no member {path}; use the pinned wheel", self.name),
        }
    }

    /// The member as the wheel's own RECORD knows it.
    pub fn recorded(&mut self, member: &Member) -> Result<Member> {
        let metadata = self.metadata_path()?;
        let record = self.text(&metadata.replace("/METADATA", "/RECORD"))?;
        let name = &self.name;
        let rows = record.lines().filter_map(|line| line.rsplitn(3, ',').collect::<Vec<_>>().try_into().ok());
        let mut rows = rows.filter(|[_, _, path]: &[&str; 3]| path.trim_matches('"') == member.path);
        let row = rows.next();
        if rows.next().is_some() {
            refuse!("{name}: RECORD has several rows for {}; get the wheel from a source you trust", member.path);
        }
        let sha256 = row.and_then(|[_, digest, _]| digest_of_record(digest.strip_prefix("sha256=")?));
        match (sha256, row.and_then(|[size, ..]| size.parse().ok())) {
            (Some(sha256), Some(size)) => Ok(Member { size: Some(size), sha256: Some(sha256), ..member.unlocked() }),
            // Left for `copy` to say.
            _ if !self.has(&member.path) => Ok(member.unlocked()),
            _ => refuse!(
                "{name}: RECORD has no sha256 and size of {}; build the wheel with a tool that writes them",
                member.path
            ),
        }
    }

    /// The CRC-32 that the central directory gives for a member.
    pub fn crc32(&self, path: &str) -> Result<u32> {
        Ok(self.entry(path)?.facts.crc32)
    }

    /// The paths of all members, in alphabetical order.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        self.members.keys().map(String::as_str)
    }

    /// Whether the archive has a member of this path.
    pub fn has(&self, path: &str) -> bool {
        self.members.contains_key(path)
    }

    /// Copies a member out; the verdict counts once this answers Ok.
    pub fn copy(&mut self, member: &Member, out: &mut dyn Write, out_name: &Path) -> Result<(Digest, u64)> {
        let (wheel, path) = (&self.name, &member.path);
        let Some(entry) = self.members.get(path) else {
            refuse!("{wheel} has no member {path}; use the pinned wheel, or turn its Cargo feature off");
        };
        if path.ends_with('/') {
            refuse!("{wheel}: member {path} is not a regular file; get the wheel from a source you trust");
        }
        let size = entry.facts.size;
        if let Some(expected) = member.size.filter(|&expected| expected != size) {
            refuse!("{wheel}: member {path} has {size} bytes, expected {expected}; use the pinned wheel");
        }
        let broken = |e| Error::Refused(format!("{wheel}: member {path} cannot be read: {e}; get the wheel again"));
        let mut data = data(&mut self.reader, entry).map_err(broken)?;
        drain(&mut data, size, member, wheel, out, out_name)
    }

    fn metadata_path(&self) -> Result<String> {
        let is_metadata = |name: &str| name.strip_suffix(".dist-info/METADATA").is_some_and(|stem| !stem.contains('/'));
        let mut found: Vec<String> = self.paths().filter(|name| is_metadata(name)).map(str::to_owned).collect();
        match (found.pop(), found.len()) {
            (Some(path), 0) => Ok(path),
            (found, more) => {
                let count = more + usize::from(found.is_some());
                refuse!("{} holds {count} dist-info/METADATA members, a wheel has one; get it again", self.name)
            }
        }
    }

    fn text(&mut self, path: &str) -> Result<String> {
        let name = &self.name;
        let broken = |e: &dyn std::fmt::Display| {
            Error::Refused(format!("{name}: {path} cannot be read: {e}; get the wheel again"))
        };
        let Some(entry) = self.members.get(path) else { return Err(broken(&"it is not there")) };
        let data = data(&mut self.reader, entry).map_err(|e| broken(&e))?;
        let mut text = Vec::new();
        data.take(TEXT_LIMIT + 1).read_to_end(&mut text).map_err(|e| broken(&e))?;
        if text.len() as u64 > TEXT_LIMIT {
            refuse!("{name}: {path} is longer than {TEXT_LIMIT} bytes; get the wheel from a source you trust");
        }
        String::from_utf8(text).map_err(|e| broken(&e))
    }
}

fn broken(name: &str, fault: &dyn std::fmt::Display) -> Error {
    Error::Refused(format!("{name} is not a wheel, or is truncated: {fault}; get it again from a source you trust"))
}

/// The values of a header in the part of an e-mail-like text before its first empty line.
fn headers<'a>(text: &'a str, key: &'a str) -> impl Iterator<Item = &'a str> {
    let lines = text.lines().take_while(|line| !line.trim().is_empty());
    lines
        .filter_map(|line| line.split_once(':'))
        .filter(move |(k, _)| k.eq_ignore_ascii_case(key))
        .map(|(_, v)| v.trim())
}

/// Copies one member out of the bytes at its place, as they come over the wire: its local header, then its data.
pub fn copy_from_place(
    reader: &mut dyn Read,
    place: Place,
    member: &Member,
    wheel: &str,
    out: &mut dyn Write,
    out_name: &Path,
) -> Result<(Digest, u64)> {
    let path = &member.path;
    let broke_off = |e: std::io::Error| Error::Unavailable(format!("{wheel}: the transfer of {path} broke off: {e}"));
    let mut header = [0; LOCAL_HEADER as usize];
    reader.read_exact(&mut header).map_err(broke_off)?;
    let two = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let (flags, method, name_length, extra_length) = (two(6), two(8), two(26), two(28));
    let known = match place.method {
        Method::Stored => STORED,
        Method::Deflate => DEFLATED,
    };
    let encrypted = flags & layout::ENCRYPTED != 0;
    if header[..4] != *b"PK\x03\x04" || method != known || encrypted || usize::from(name_length) != path.len() {
        refuse!("{wheel}: what lies at byte {} is not the member {path}; use the pinned wheel", place.offset);
    }
    let mut name = vec![0; usize::from(name_length)];
    reader.read_exact(&mut name).map_err(broke_off)?;
    if name != path.as_bytes() {
        refuse!("{wheel}: what lies at byte {} is not the member {path}; use the pinned wheel", place.offset);
    }
    let skipped = std::io::copy(&mut reader.take(extra_length.into()), &mut std::io::sink()).map_err(broke_off)?;
    if skipped != u64::from(extra_length) {
        return Err(broke_off(std::io::ErrorKind::UnexpectedEof.into()));
    }
    let data = reader.take(place.compressed);
    let Some(size) = member.size else { refuse!("artifacts.lock: {path} has no size") };
    match place.method {
        Method::Stored => drain(&mut { data }, size, member, wheel, out, out_name),
        Method::Deflate => drain(&mut DeflateDecoder::new(data), size, member, wheel, out, out_name),
    }
}

/// Reads a member of `size` bytes to its end, and no further; what comes is checked against the lock.
fn drain(
    reader: &mut dyn Read,
    size: u64,
    member: &Member,
    wheel: &str,
    out: &mut dyn Write,
    out_name: &Path,
) -> Result<(Digest, u64)> {
    let path = &member.path;
    if size > MEMBER_LIMIT {
        refuse!("{wheel}: member {path} has {size} bytes, more than any member of a wheel; use the pinned wheel");
    }
    let (mut hasher, mut done) = (Hasher::new(), 0);
    let mut buffer = vec![0; 1 << 18];
    loop {
        let n = match reader.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => refuse!("{wheel}: member {path} cannot be read: {e}; get the wheel again"),
        };
        done += n as u64;
        if done > size {
            refuse!("{wheel}: member {path} goes on after {size} bytes; get the wheel from a source you trust");
        }
        hasher.update(&buffer[..n]);
        out.write_all(&buffer[..n]).map_err(|e| Error::io("writing", out_name, &e))?;
    }
    if done != size {
        refuse!("{wheel}: member {path} ends after {done} of {size} bytes; get the wheel again");
    }
    let found = hasher.finish();
    if let Some(sha256) = member.sha256.filter(|&sha256| sha256 != found) {
        refuse!("{wheel}: member {path} has sha256 {found}, expected {sha256}; use the pinned wheel");
    }
    Ok((found, done))
}

/// The members by their names. Names and kinds that no wheel has, and that mean different things to different programs, are
/// refused.
fn named(directory: Directory, wheel: &str) -> Result<BTreeMap<String, Entry>> {
    let (mut folded, mut members) = (HashSet::new(), BTreeMap::new());
    for entry in directory.entries {
        let shown = layout::shown(&entry.name);
        let readable = entry.facts.is_utf8() || entry.name.is_ascii();
        let Some(name) = std::str::from_utf8(&entry.name).ok().filter(|_| readable).map(str::to_owned) else {
            refuse!("{wheel}: the member `{shown}` has an unreadable name: it is not UTF-8; get it again");
        };
        // A folder's own entry ends with a slash.
        let mut parts = name.strip_suffix('/').unwrap_or(&name).split('/');
        let outside = parts.any(|part| matches!(part, "" | "." | ".."));
        if outside || name.contains(['\\', ':']) || name.contains(char::is_control) {
            refuse!("{wheel}: the member `{shown}` has a path that leads elsewhere; get it from a source you trust");
        }
        let kind = entry.mode & 0o170_000;
        if kind == 0o040_000 && !name.ends_with('/') {
            refuse!("{wheel}: the member `{shown}` is both a file and a folder; get it from a source you trust");
        }
        if !matches!(kind, 0 | 0o100_000 | 0o040_000) {
            refuse!("{wheel}: the member `{shown}` is no file but a link or a device; get it from a source you trust");
        }
        if members.contains_key(&name) {
            refuse!(
                "{wheel}: several members have one name, which is not so in wheels; get it from a source you trust"
            );
        }
        if !folded.insert(name.to_lowercase()) {
            refuse!("{wheel}: the member `{shown}` differs from another by case only; get it from a source you trust");
        }
        members.insert(name, entry);
    }
    Ok(members)
}

/// A member's data, decompressed, whose end is an error where they are not what the directory says.
fn data<'a, R: Read + Seek>(reader: &'a mut R, entry: &Entry) -> std::result::Result<Data<'a, R>, String> {
    let start = layout::data(reader, entry)?;
    reader.seek(SeekFrom::Start(start)).map_err(|e| e.to_string())?;
    let packed = reader.take(entry.facts.compressed);
    let unpacked = match entry.facts.method {
        STORED => Unpacked::Stored(packed),
        DEFLATED => Unpacked::Deflated(Box::new(DeflateDecoder::new(packed))),
        other => return Err(format!("its compression is method {other}, expected deflate or none")),
    };
    Ok(Data { unpacked, found: Crc::new(), expected: entry.facts.crc32 })
}

enum Unpacked<R> {
    Stored(R),
    Deflated(Box<DeflateDecoder<R>>),
}

struct Data<'a, R> {
    unpacked: Unpacked<Take<&'a mut R>>,
    found: Crc,
    expected: u32,
}

impl<R: Read> Read for Data<'_, R> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let n = match &mut self.unpacked {
            Unpacked::Stored(reader) => reader.read(out)?,
            Unpacked::Deflated(reader) => reader.read(out)?,
        };
        self.found.update(&out[..n]);
        if n == 0 && !out.is_empty() && self.found.sum() != self.expected {
            let fault = format!("the checksum is {:08x}, expected {:08x}", self.found.sum(), self.expected);
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, fault));
        }
        Ok(n)
    }
}

/// RECORD writes digests in URL-safe base64 without padding.
fn digest_of_record(text: &str) -> Option<Digest> {
    let mut bits = 0u32;
    let mut count = 0;
    let mut bytes = Vec::with_capacity(32);
    for c in text.bytes() {
        let value = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'-' => 62,
            b'_' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    bytes.try_into().ok().map(Digest)
}
