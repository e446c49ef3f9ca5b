//! Small wheels, whole and well-formed, and the locks that pin them.
#![allow(dead_code, reason = "each test uses its own part")]

use std::fmt::Write as _;
use std::io::{Cursor, Write as _};

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use crate::vendoring::digest::{Digest, Hasher};
use crate::vendoring::lock::{self, Lock, Method, Place};
use crate::vendoring::wheel::Wheel as Archive;

pub const TARGET: &str = "x86_64-linux";
pub const NORM: &str = "flashinfer_jit_cache/jit_cache/norm/norm.so";
pub const GDN: &str = "flashinfer_jit_cache/jit_cache/gdn_prefill_sm90/gdn_prefill_sm90.so";
pub const CUDART: &str = "nvidia/cu13/lib/libcudart.so.13";

/// What a test wants a wheel to be.
#[derive(Debug, Clone)]
pub struct Wheel {
    pub distribution: &'static str,
    pub version: &'static str,
    pub tag: &'static str,
    pub members: Vec<(&'static str, Vec<u8>)>,
    /// A member that is not compressed.
    pub stored: &'static str,
}

impl Wheel {
    pub fn jit_cache() -> Self {
        Self {
            distribution: "flashinfer_jit_cache",
            version: "0.6.3+cu130",
            tag: "cp39-abi3-manylinux_2_28_x86_64",
            members: vec![(NORM, b"norm kernels".repeat(40)), (GDN, b"gdn prefill kernels".repeat(30))],
            stored: "",
        }
    }

    pub fn cudart() -> Self {
        Self {
            distribution: "nvidia_cuda_runtime",
            version: "13.0.96",
            tag: "py3-none-manylinux2014_x86_64",
            members: vec![(CUDART, b"cuda runtime".repeat(20))],
            stored: "",
        }
    }

    /// As this one, from other sources: the same names, other bytes.
    pub fn rebuilt(mut self) -> Self {
        self.members.iter_mut().for_each(|(_, bytes)| bytes.extend_from_slice(b", rebuilt"));
        self
    }

    pub fn file(&self) -> String {
        format!("{}-{}-{}.whl", self.distribution, self.version, self.tag)
    }

    pub fn member(&self, path: &str) -> &[u8] {
        let found = self.members.iter().find(|(name, _)| *name == path);
        &found.expect("a member of this wheel").1
    }

    /// Its members, then METADATA, WHEEL and RECORD, with their contents.
    pub fn files(&self) -> Vec<(String, Vec<u8>)> {
        let info = format!("{}-{}.dist-info", self.distribution, self.version);
        let metadata = format!("Metadata-Version: 2.1\nName: {}\nVersion: {}\n", self.distribution, self.version);
        let tags = format!("Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: false\nTag: {}\n", self.tag);
        let mut files: Vec<(String, Vec<u8>)> =
            self.members.iter().map(|(path, bytes)| ((*path).to_owned(), bytes.clone())).collect();
        files.push((format!("{info}/METADATA"), metadata.into_bytes()));
        files.push((format!("{info}/WHEEL"), tags.into_bytes()));
        let mut record: String = files.iter().map(|(path, bytes)| row(path, bytes)).collect();
        let _ = writeln!(record, "{info}/RECORD,,");
        files.push((format!("{info}/RECORD"), record.into_bytes()));
        files
    }

    /// The archive; the same bytes each time.
    pub fn bytes(&self) -> Vec<u8> {
        self.archive(self.files())
    }

    fn archive(&self, files: Vec<(String, Vec<u8>)>) -> Vec<u8> {
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        for (path, bytes) in files {
            let stored = path == self.stored;
            let method = if stored { CompressionMethod::Stored } else { CompressionMethod::Deflated };
            zip.start_file(path, SimpleFileOptions::default().compression_method(method)).expect("a member");
            zip.write_all(&bytes).expect("its bytes");
        }
        zip.finish().expect("an archive").into_inner()
    }

    /// The archive with another RECORD.
    pub fn with_record(&self, change: impl FnOnce(String) -> String) -> Vec<u8> {
        let mut files = self.files();
        let (path, record) = files.pop().expect("RECORD comes last");
        files.push((path, change(String::from_utf8(record).expect("text")).into_bytes()));
        self.archive(files)
    }

    /// Where a member lies in the archive.
    pub fn place(&self, path: &str) -> Place {
        Archive::open(Cursor::new(self.bytes()), self.file())
            .and_then(|archive| archive.place(path))
            .expect("its place")
    }

    /// As [`Wheel::pin`], with the members' sizes and digests.
    pub fn pin_with_digests(&self) -> Pin {
        let mut pin = self.pin();
        for member in &mut pin.members {
            let bytes = self.member(&member.path);
            (member.size, member.sha256) = (Some(bytes.len()), Some(sha256(bytes).to_string()));
        }
        pin
    }

    /// As [`Wheel::pin_with_digests`], with where the members lie as well.
    pub fn pin_with_places(&self) -> Pin {
        let archive = Archive::open(Cursor::new(self.bytes()), self.file()).expect("the archive");
        let mut pin = self.pin_with_digests();
        for member in &mut pin.members {
            let place = archive.place(&member.path).expect("its place");
            member.place = Some((place, archive.crc32(&member.path).expect("its checksum")));
        }
        pin
    }

    /// The lock's entry for this wheel, without a source.
    pub fn pin(&self) -> Pin {
        let bytes = self.bytes();
        let members = self.members.iter().map(|(path, _)| PinnedMember::new(path)).collect();
        Pin {
            distribution: self.distribution.to_owned(),
            version: self.version.to_owned(),
            target: TARGET.to_owned(),
            file: self.file(),
            sha256: sha256(&bytes).to_string(),
            size: Some(bytes.len()),
            optional: false,
            sources: Vec::new(),
            members,
        }
    }
}

/// A lock's entry, every value free to be wrong.
#[derive(Debug, Clone)]
pub struct Pin {
    pub distribution: String,
    pub version: String,
    pub target: String,
    pub file: String,
    pub sha256: String,
    pub size: Option<usize>,
    pub optional: bool,
    sources: Vec<(&'static str, String)>,
    pub members: Vec<PinnedMember>,
}

#[derive(Debug, Clone)]
pub struct PinnedMember {
    path: String,
    pub soname: String,
    feature: &'static str,
    pub size: Option<usize>,
    pub sha256: Option<String>,
    /// With the CRC-32.
    pub place: Option<(Place, u32)>,
}

impl PinnedMember {
    fn new(path: &str) -> Self {
        let soname = path.rsplit('/').next().unwrap_or_default().to_owned();
        let feature = match path {
            NORM => "norm",
            GDN => "gdn-prefill",
            _ => "cudart",
        };
        Self { path: path.to_owned(), soname, feature, size: None, sha256: None, place: None }
    }
}

impl Pin {
    pub fn url(self, url: impl Into<String>) -> Self {
        self.source("url", url.into())
    }

    pub fn index(self, page: impl Into<String>) -> Self {
        self.source("index", page.into())
    }

    pub fn purl(self, purl: impl Into<String>) -> Self {
        self.source("purl", purl.into())
    }

    fn source(mut self, kind: &'static str, value: String) -> Self {
        self.sources.push((kind, value));
        self
    }

    pub fn toml(&self) -> String {
        let mut text = format!(
            "[[wheel]]\ndistribution = {:?}\nversion = {:?}\ntarget = {:?}\nfile = {:?}\nsha256 = {:?}\n",
            self.distribution, self.version, self.target, self.file, self.sha256
        );
        let _ = writeln!(text, "optional = {}", self.optional);
        if let Some(size) = self.size {
            let _ = writeln!(text, "size = {size}");
        }
        let sources: Vec<String> =
            self.sources.iter().map(|(kind, value)| format!("{{ {kind} = {value:?} }}")).collect();
        let _ = writeln!(text, "sources = [{}]", sources.join(", "));
        if self.members.is_empty() {
            text += "member = []\n";
        }
        for member in &self.members {
            let _ = write!(
                text,
                "[[wheel.member]]\npath = {:?}\nsoname = {:?}\nfeature = {:?}\n",
                member.path, member.soname, member.feature
            );
            if let Some(size) = member.size {
                let _ = writeln!(text, "size = {size}");
            }
            if let Some(sha256) = &member.sha256 {
                let _ = writeln!(text, "sha256 = {sha256:?}");
            }
            if let Some((Place { offset, length, compressed, method }, crc32)) = member.place {
                let method = match method {
                    Method::Stored => "stored",
                    Method::Deflate => "deflate",
                };
                let _ = writeln!(
                    text,
                    "offset = {offset}\nlength = {length}\ncompressed = {compressed}\nmethod = {method:?}\n\
                     crc32 = \"{crc32:08x}\""
                );
            }
        }
        text
    }

    /// The entry as the crate reads it.
    pub fn parsed(&self) -> lock::Wheel {
        lock([self]).wheels.remove(0)
    }
}

/// A lock's text.
pub fn lock_text<'a>(pins: impl IntoIterator<Item = &'a Pin>) -> String {
    pins.into_iter().fold("version = 1\n".to_owned(), |text, pin| text + "\n" + &pin.toml())
}

pub fn lock<'a>(pins: impl IntoIterator<Item = &'a Pin>) -> Lock {
    Lock::parse(&lock_text(pins), "test.lock").expect("a good lock")
}

pub fn sha256(bytes: &[u8]) -> Digest {
    let mut hasher = Hasher::new();
    hasher.update(bytes);
    hasher.finish()
}

/// A row of RECORD.
pub fn row(path: &str, content: &[u8]) -> String {
    format!("{path},sha256={},{}\n", base64_url(&sha256(content).0), content.len())
}

/// RECORD's spelling of a digest: URL-safe, without padding.
fn base64_url(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let bits = chunk.iter().fold(0u32, |bits, &byte| bits << 8 | u32::from(byte)) << (8 * (3 - chunk.len()));
        for i in 0..=chunk.len() {
            text.push(char::from(DIGITS[(bits >> (18 - 6 * i) & 63) as usize]));
        }
    }
    text
}
