//! Wheels: hostile zip archives until proven otherwise. What comes out was checked against the lock.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

use flate2::read::DeflateDecoder;
use zip::read::ZipReadOptions;
use zip::{CompressionMethod, ZipArchive};

use super::digest::{Digest, Hasher};
use super::error::{Error, Result, refuse};
use super::index::normalized;
use super::layout;
use super::lock::{LOCAL_HEADER, Member, Method, Place};
use super::store::publish;

/// A member may be this large at the most; today's are below 10 MB.
const MEMBER_LIMIT: u64 = 1 << 30;
/// METADATA and WHEEL are a few kilobytes, RECORD is about 100 bytes per member.
const TEXT_LIMIT: u64 = 16 << 20;

pub struct Wheel<R> {
    archive: ZipArchive<R>,
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
        let layout = layout::directory(&mut reader);
        layout.and_then(|directory| layout::check_members(&mut reader, directory)).map_err(|e| broken(&name, &e))?;
        Self::with_known_layout(reader, name)
    }

    /// As [`open`](Self::open), but looks at the central directory only: reading every local header would mean a
    /// request for each.
    pub fn open_remote(mut reader: R, name: impl Into<String>) -> Result<Self> {
        let name = name.into();
        layout::directory(&mut reader).map_err(|e| broken(&name, &e))?;
        Self::with_known_layout(reader, name)
    }

    fn with_known_layout(reader: R, name: String) -> Result<Self> {
        let mut archive = ZipArchive::new(reader).map_err(|e| broken(&name, &e))?;
        if archive.has_duplicate_names() {
            refuse!("{name}: several members have one name, which is not so in wheels; get it from a source you trust");
        }
        check_members(&mut archive, &name)?;
        Ok(Self { archive, name })
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
        let Some(index) = self.archive.index_for_name(path) else {
            refuse!("{wheel} has no member {path}; use the pinned wheel");
        };
        let entry = self.archive.by_index_data(index).map_err(|e| Error::Refused(format!("{wheel}: {path}: {e}")))?;
        let method = match entry.compression() {
            CompressionMethod::Stored => Method::Stored,
            CompressionMethod::Deflated => Method::Deflate,
            other => {
                refuse!("{wheel}: {path} is compressed by {other}, expected deflate or none; use the pinned wheel")
            }
        };
        let offset = entry.header_start();
        let others = (0..self.archive.len()).filter_map(|i| Some(self.archive.by_index_data(i).ok()?.header_start()));
        let next = others.filter(|&start| start > offset).min().unwrap_or(self.archive.central_directory_start());
        let (length, compressed) = (next.saturating_sub(offset), entry.compressed_size());
        if length < LOCAL_HEADER.saturating_add(compressed) {
            refuse!("{wheel}: member {path} overlaps what follows it; get the wheel from a source you trust");
        }
        Ok(Place { offset, length, compressed, method })
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
        let entry = self.archive.index_for_name(path).and_then(|index| self.archive.by_index_data(index).ok());
        match entry {
            Some(entry) => Ok(entry.crc32()),
            None => refuse!("{} has no member {path}; use the pinned wheel", self.name),
        }
    }

    /// The paths of all members.
    pub fn paths(&self) -> impl Iterator<Item = Cow<'_, str>> {
        self.archive.file_names().flatten()
    }

    /// Whether the archive has a member of this path.
    pub fn has(&self, path: &str) -> bool {
        self.archive.index_for_name(path).is_some()
    }

    /// Copies a member out; the verdict counts once this answers Ok.
    pub fn copy(&mut self, member: &Member, out: &mut dyn Write, out_name: &Path) -> Result<(Digest, u64)> {
        let wheel = &self.name;
        let Some(index) = self.archive.index_for_name(&member.path) else {
            refuse!("{wheel} has no member {}; use the pinned wheel, or turn its Cargo feature off", member.path);
        };
        let broken = |e: &dyn std::fmt::Display| {
            Error::Refused(format!("{wheel}: member {} cannot be read: {e}; get the wheel again", member.path))
        };
        let options = ZipReadOptions::new().enforce_header_consistency(true);
        let mut entry = self.archive.by_index_with_options(index, options).map_err(|e| broken(&e))?;
        if !entry.is_file() {
            refuse!("{wheel}: member {} is not a regular file; get the wheel from a source you trust", member.path);
        }
        if let Some(size) = member.size.filter(|&size| size != entry.size()) {
            refuse!(
                "{wheel}: member {} has {} bytes, expected {size}; use the pinned wheel",
                member.path,
                entry.size()
            );
        }
        let size = entry.size();
        drain(&mut entry, size, member, wheel, out, out_name)
    }

    fn metadata_path(&self) -> Result<String> {
        let is_metadata = |name: &str| name.strip_suffix(".dist-info/METADATA").is_some_and(|stem| !stem.contains('/'));
        let mut found: Vec<String> = self.paths().filter(|name| is_metadata(name)).map(Cow::into_owned).collect();
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
        let entry = self.archive.by_name(path).map_err(|e| broken(&e))?;
        let mut text = Vec::new();
        entry.take(TEXT_LIMIT + 1).read_to_end(&mut text).map_err(|e| broken(&e))?;
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
        Method::Stored => 0,
        Method::Deflate => 8,
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

/// Names and kinds that no wheel has, and that mean different things to different programs.
fn check_members<R: Read + Seek>(archive: &mut ZipArchive<R>, wheel: &str) -> Result<()> {
    let mut folded = HashSet::new();
    for index in 0..archive.len() {
        let entry = match archive.by_index_data(index) {
            Ok(entry) => entry,
            Err(e) => refuse!("{wheel}: member {index} cannot be read: {e}; get it again"),
        };
        let name = match entry.name() {
            Ok(name) => name.into_owned(),
            Err(e) => refuse!("{wheel}: member {index} has an unreadable name: {e}; get it again"),
        };
        let shown = name.escape_debug();
        // A folder's own entry ends with a slash.
        let mut parts = name.strip_suffix('/').unwrap_or(&name).split('/');
        let outside = parts.any(|part| matches!(part, "" | "." | ".."));
        if outside || name.contains(['\\', ':']) || name.contains(char::is_control) {
            refuse!("{wheel}: the member `{shown}` has a path that leads elsewhere; get it from a source you trust");
        }
        // A Unix file mode, whichever system the archive says that it was made on: 0 where it has none.
        let kind = entry.external_attributes() >> 16 & 0o170_000;
        if kind == 0o040_000 && !name.ends_with('/') {
            refuse!("{wheel}: the member `{shown}` is both a file and a folder; get it from a source you trust");
        }
        if !matches!(kind, 0 | 0o100_000 | 0o040_000) {
            refuse!("{wheel}: the member `{shown}` is no file but a link or a device; get it from a source you trust");
        }
        if !folded.insert(name.to_lowercase()) {
            refuse!("{wheel}: the member `{shown}` differs from another by case only; get it from a source you trust");
        }
    }
    Ok(())
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
