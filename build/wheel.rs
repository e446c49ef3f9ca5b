//! Wheels: hostile zip archives until proven otherwise. What comes out was checked against the lock.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use flate2::read::DeflateDecoder;
use zip::read::ZipReadOptions;
use zip::{CompressionMethod, ZipArchive};

use super::digest::{Digest, Hasher};
use super::error::{Error, Result, refuse};
use super::index::normalized;
use super::lock::{LOCAL_HEADER, Member, Method, Place};
use super::store::publish;

/// A member may be this large at the most; today's are below 10 MB.
const MEMBER_LIMIT: u64 = 1 << 30;
/// The largest wheels known have some thousand members.
const MEMBERS_LIMIT: usize = 100_000;
/// An end of central directory record without comment.
const END_RECORD: u64 = 22;
/// METADATA and WHEEL are a few kilobytes.
const TEXT_LIMIT: u64 = 1 << 20;

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
    /// Opens an archive and looks at all of its structure; `name` stands in the messages. What programs read differently
    /// is refused: wheels are made by tools that write none of it.
    pub fn open(reader: R, name: impl Into<String>) -> Result<Self> {
        let mut wheel = Self::open_remote(reader, name)?;
        let Self { archive, name } = &mut wheel;
        if let Err(e) = archive.validate_header_consistency() {
            refuse!("{name} contradicts itself: {e}; get it again from a source you trust");
        }
        Ok(wheel)
    }

    /// As [`open`](Self::open), but looks at the central directory only: reading every local header would mean a request
    /// for each.
    pub fn open_remote(mut reader: R, name: impl Into<String>) -> Result<Self> {
        let name = name.into();
        let broken = |e: &dyn std::fmt::Display| {
            Error::Refused(format!("{name} is not a wheel, or is truncated: {e}; get it again"))
        };
        let size = reader.seek(SeekFrom::End(0)).map_err(|e| broken(&e))?;
        let mut last = [0; END_RECORD as usize];
        if size < END_RECORD {
            return Err(broken(&"it is too short"));
        }
        reader.seek(SeekFrom::End(-(END_RECORD as i64))).map_err(|e| broken(&e))?;
        reader.read_exact(&mut last).map_err(|e| broken(&e))?;
        // The end record is the file's end: nothing follows it, no comment and no second end record in a comment.
        if last[..4] != *b"PK\x05\x06" || last[20..] != [0, 0] {
            return Err(broken(&"it does not end with an end of central directory record without comment"));
        }
        let mut archive = ZipArchive::new(reader).map_err(|e| broken(&e))?;
        let faults = [
            (archive.offset() != 0, "something lies before its first member".to_owned()),
            (archive.has_duplicate_names(), "several members have one name".to_owned()),
            (archive.len() > MEMBERS_LIMIT, format!("it has {} members", archive.len())),
        ];
        if let Some((_, fault)) = faults.iter().find(|(found, _)| *found) {
            refuse!("{name}: {fault}, which is not so in wheels; get it again from a source you trust");
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
        Ok(Place { offset, length: next.saturating_sub(offset), compressed: entry.compressed_size(), method })
    }

    /// The member as the wheel's own RECORD knows it.
    pub fn recorded(&mut self, member: &Member) -> Result<Member> {
        let metadata = self.metadata_path()?;
        let record = self.text(&metadata.replace("/METADATA", "/RECORD"))?;
        let name = &self.name;
        let mut rows = record.lines().filter_map(|line| line.rsplitn(3, ',').collect::<Vec<_>>().try_into().ok());
        let row = rows.find(|[_, _, path]: &[&str; 3]| path.trim_matches('"') == member.path);
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
        if !entry.is_file() || entry.is_symlink() {
            refuse!("{wheel}: member {} is not a regular file; get the wheel from a source you trust", member.path);
        }
        if let Some(size) = member.size.filter(|&size| size != entry.size()) {
            refuse!(
                "{wheel}: member {} has {} bytes, the lock says {size}; use the pinned wheel",
                member.path,
                entry.size()
            );
        }
        let size = entry.size();
        drain(&mut entry, size, member, wheel, out, out_name)
    }

    fn metadata_path(&self) -> Result<String> {
        let is_metadata = |name: &str| name.strip_suffix(".dist-info/METADATA").is_some_and(|stem| !stem.contains('/'));
        let names = self.archive.file_names().flatten();
        let mut found: Vec<String> = names.filter(|name| is_metadata(name)).map(Cow::into_owned).collect();
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
        let mut text = String::new();
        entry.take(TEXT_LIMIT).read_to_string(&mut text).map_err(|e| broken(&e))?;
        Ok(text)
    }
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
    let encrypted = flags & 0x2041 != 0;
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
    let limit = size.min(MEMBER_LIMIT);
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
        if done > limit {
            refuse!("{wheel}: member {path} goes on after {limit} bytes; get the wheel from a source you trust");
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
        let outside = name.split('/').any(|part| part == ".." || part == ".") || name.starts_with('/');
        if outside || name.is_empty() || name.contains(['\\', ':']) || name.contains(char::is_control) {
            refuse!("{wheel}: the member `{shown}` has a path that leads elsewhere; get it from a source you trust");
        }
        // Of a Unix file mode, 0 is what archives without one have.
        let kind = entry.unix_mode().unwrap_or(0) & 0o170_000;
        if !matches!(kind, 0 | 0o100_000 | 0o040_000) {
            refuse!("{wheel}: the member `{shown}` is no file but a link or a device; get it from a source you trust");
        }
        if entry.encrypted() {
            refuse!("{wheel}: the member `{shown}` is encrypted, which no wheel is; get it again");
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
