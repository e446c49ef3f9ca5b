//! Wheels: hostile zip archives until proven otherwise. What comes out was checked against the lock.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

use zip::ZipArchive;
use zip::read::ZipReadOptions;

use super::digest::{Digest, Hasher};
use super::error::{Error, Result, refuse};
use super::index::normalized;
use super::lock::Member;
use super::store::publish;

/// A member may be this large at the most; today's are below 10 MB.
const MEMBER_LIMIT: u64 = 1 << 30;
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
    /// Reads the archive's directory; `name` stands in the messages.
    pub fn open(reader: R, name: impl Into<String>) -> Result<Self> {
        let name = name.into();
        let archive = match ZipArchive::new(reader) {
            Ok(archive) => archive,
            Err(e) => refuse!("{name} is not a wheel, or is truncated: {e}; get it again"),
        };
        if archive.has_duplicate_names() {
            refuse!(
                "{name} holds several members of one name, which no wheel may; get it again from a source you trust"
            );
        }
        Ok(Self { archive, name })
    }

    /// The distribution, version and tags that METADATA and WHEEL give.
    pub fn identity(&mut self) -> Result<Identity> {
        let is_metadata = |name: &str| name.strip_suffix(".dist-info/METADATA").is_some_and(|stem| !stem.contains('/'));
        let names: Vec<String> = self.archive.file_names().flatten().map(|name| name.into_owned()).collect();
        let found: Vec<&String> = names.iter().filter(|name| is_metadata(name)).collect();
        let [metadata] = found.as_slice() else {
            refuse!("{} holds {} dist-info/METADATA members, a wheel has one; get it again", self.name, found.len());
        };
        let text = self.text(metadata)?;
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
        let limit = entry.size().min(MEMBER_LIMIT);
        let (mut hasher, mut done) = (Hasher::new(), 0);
        let mut buffer = vec![0; 1 << 18];
        loop {
            let n = match entry.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(broken(&e)),
            };
            done += n as u64;
            if done > limit {
                refuse!(
                    "{wheel}: member {} goes on after {limit} bytes; get the wheel from a source you trust",
                    member.path
                );
            }
            hasher.update(&buffer[..n]);
            out.write_all(&buffer[..n]).map_err(|e| Error::io("writing", out_name, &e))?;
        }
        if done != entry.size() {
            refuse!("{wheel}: member {} ends after {done} of {} bytes; get the wheel again", member.path, entry.size());
        }
        let found = hasher.finish();
        if let Some(sha256) = member.sha256.filter(|&sha256| sha256 != found) {
            refuse!("{wheel}: member {} has sha256 {found}, the lock says {sha256}; use the pinned wheel", member.path);
        }
        Ok((found, done))
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
