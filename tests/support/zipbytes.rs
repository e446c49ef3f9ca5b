//! Zip archives put together byte by byte: every field of every record can be a lie.
#![allow(dead_code, reason = "each test uses its own part")]

use std::io::Write as _;

use flate2::write::DeflateEncoder;
use flate2::{Compression, Crc};

use super::wheels::Wheel;

pub const STORED: u16 = 0;
pub const DEFLATE: u16 = 8;
/// Flags: encrypted; the sizes follow the data; strongly encrypted; the name is UTF-8; the local header is masked.
pub const ENCRYPTED: u16 = 1;
pub const DESCRIPTOR: u16 = 1 << 3;
pub const STRONG: u16 = 1 << 6;
pub const UTF8: u16 = 1 << 11;
pub const MASKED: u16 = 1 << 13;
/// What a field holds whose value is in a ZIP64 record.
pub const ELSEWHERE: u32 = u32::MAX;

/// What a local header and an entry of the central directory both say.
#[derive(Debug, Clone)]
pub struct Header {
    pub name: Vec<u8>,
    pub flags: u16,
    pub method: u16,
    /// The date in the upper half.
    pub time: u32,
    pub crc32: u32,
    pub compressed: u32,
    pub size: u32,
    pub extra: Vec<u8>,
}

#[derive(Debug, Clone)]
pub struct Member {
    /// What lies before its local header and belongs to nothing.
    pub before: Vec<u8>,
    pub local: Header,
    /// As it lies in the archive.
    pub data: Vec<u8>,
    /// What lies behind the data: a data descriptor, if anything.
    pub after: Vec<u8>,
    /// What the central directory says: none, one or several entries.
    pub central: Vec<Central>,
}

#[derive(Debug, Clone)]
pub struct Central {
    pub header: Header,
    /// Who wrote it: 0 for DOS, 3 for Unix, 19 for macOS.
    pub system: u8,
    /// The Unix file mode; 0 where it has none.
    pub mode: u32,
    /// Where it says that the local header is, if not where it is.
    pub offset: Option<u32>,
    pub disk: u16,
}

/// The ZIP64 end record and its locator.
#[derive(Debug, Clone, Default)]
pub struct End64 {
    pub entries: Option<u64>,
    pub size: Option<u64>,
    pub offset: Option<u64>,
    /// Where the locator says that the record is.
    pub at: Option<u64>,
}

/// The end record: what is not set is true.
#[derive(Debug, Clone, Default)]
pub struct End {
    pub entries: Option<u16>,
    pub size: Option<u32>,
    pub offset: Option<u32>,
    pub comment: Vec<u8>,
    pub zip64: Option<End64>,
}

#[derive(Debug, Clone, Default)]
pub struct Zip {
    pub members: Vec<Member>,
    /// Between the last member and the central directory.
    pub gap: Vec<u8>,
    /// Between the central directory and the end records.
    pub after_directory: Vec<u8>,
    pub end: End,
    /// After the end record.
    pub trailing: Vec<u8>,
    /// Done to the bytes at last, for the fields that have no name here.
    pub finally: Option<fn(&mut [u8])>,
}

impl Member {
    pub fn new(name: impl Into<Vec<u8>>, content: &[u8], method: u16) -> Self {
        let data = if method == DEFLATE { deflated(content) } else { content.to_vec() };
        let header = Header {
            name: name.into(),
            flags: 0,
            method,
            time: 0x21 << 16,
            crc32: crc32(content),
            compressed: data.len() as u32,
            size: content.len() as u32,
            extra: Vec::new(),
        };
        let central = Central { header: header.clone(), system: 3, mode: 0o100_644, offset: None, disk: 0 };
        Self { before: Vec::new(), local: header, data, after: Vec::new(), central: vec![central] }
    }

    /// Changes what both headers say.
    pub fn both(&mut self, change: impl Fn(&mut Header)) {
        change(&mut self.local);
        self.central.iter_mut().for_each(|central| change(&mut central.header));
    }

    /// What the (first) entry of the central directory says.
    pub fn central(&mut self) -> &mut Central {
        &mut self.central[0]
    }

    /// Bytes from the start of its local header to its end.
    pub fn length(&self) -> usize {
        30 + self.local.name.len() + self.local.extra.len() + self.data.len() + self.after.len()
    }

    /// Lets sizes and CRC follow the data, as a program does that writes to a pipe.
    pub fn described(&mut self) {
        let Header { crc32, compressed, size, .. } = self.local;
        self.after = [&b"PK\x07\x08"[..], &le32(&[crc32, compressed, size])].concat();
        self.both(|header| header.flags |= DESCRIPTOR);
        (self.local.crc32, self.local.compressed, self.local.size) = (0, 0, 0);
    }

    /// As [`Member::described`], with sizes of 64 bits.
    pub fn described_widely(&mut self) {
        let sizes = le64(&[self.local.compressed.into(), self.local.size.into()]);
        self.described();
        self.after.splice(8.., sizes);
    }

    /// Moves both sizes into ZIP64 fields.
    pub fn widened(&mut self) {
        let sizes = [u64::from(self.local.size), u64::from(self.local.compressed)];
        self.both(|header| {
            header.extra = extra(1, &le64(&sizes));
            (header.size, header.compressed) = (ELSEWHERE, ELSEWHERE);
        });
    }
}

impl Zip {
    /// The members of a wheel, METADATA, WHEEL and RECORD.
    pub fn of(wheel: &Wheel, method: u16) -> Self {
        let members = wheel.files().into_iter().map(|(name, content)| Member::new(name, &content, method)).collect();
        Self { members, ..Self::default() }
    }

    pub fn member(&mut self, name: &str) -> &mut Member {
        let found = self.members.iter_mut().find(|member| member.local.name.ends_with(name.as_bytes()));
        found.expect("a member of this name")
    }

    pub fn remove(&mut self, name: &str) {
        self.members.retain(|member| !member.local.name.ends_with(name.as_bytes()));
    }

    /// Puts another content into a member, and leaves RECORD as it is.
    pub fn replace(&mut self, name: &str, content: &[u8]) {
        let member = self.member(name);
        *member = Member::new(member.local.name.clone(), content, member.local.method);
    }

    /// Where each local header starts.
    pub fn starts(&self) -> Vec<u32> {
        let mut end = 0;
        let start = |member: &Member| {
            let start = end + member.before.len();
            end = start + member.length();
            start as u32
        };
        self.members.iter().map(start).collect()
    }

    /// Where the local header of a member starts.
    pub fn offset_of(&self, name: &str) -> u32 {
        let index = self.members.iter().position(|member| member.local.name.ends_with(name.as_bytes()));
        self.starts()[index.expect("a member of this name")]
    }

    /// Where the central directory starts.
    pub fn directory(&self) -> u32 {
        let members: usize = self.members.iter().map(|member| member.before.len() + member.length()).sum();
        (members + self.gap.len()) as u32
    }

    /// How long the central directory is, with what lies behind it.
    pub fn directory_size(&self) -> u32 {
        let entries = self.members.iter().flat_map(|member| &member.central);
        let entries = entries.map(|entry| 46 + entry.header.name.len() + entry.header.extra.len()).sum::<usize>();
        (entries + self.after_directory.len()) as u32
    }

    /// Gives the archive a true ZIP64 end record, which the ordinary one refers to.
    pub fn widened(&mut self) -> &mut End64 {
        (self.end.entries, self.end.size, self.end.offset) = (Some(u16::MAX), Some(ELSEWHERE), Some(ELSEWHERE));
        self.end.zip64.insert(End64::default())
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut directory = Vec::new();
        let mut entries = 0;
        for member in &self.members {
            out.extend_from_slice(&member.before);
            let offset = out.len() as u32;
            out.extend_from_slice(b"PK\x03\x04");
            out.extend(le16(&[20]));
            fields(&member.local, &mut out);
            out.extend_from_slice(&member.local.name);
            out.extend_from_slice(&member.local.extra);
            out.extend_from_slice(&member.data);
            out.extend_from_slice(&member.after);
            for central in &member.central {
                entries += 1;
                entry(central, offset, &mut directory);
            }
        }
        out.extend_from_slice(&self.gap);
        let start = out.len();
        out.extend_from_slice(&directory);
        out.extend_from_slice(&self.after_directory);
        self.finish(entries, start, directory.len(), &mut out);
        if let Some(change) = self.finally {
            change(&mut out);
        }
        out
    }

    fn finish(&self, entries: usize, start: usize, size: usize, out: &mut Vec<u8>) {
        if let Some(end) = &self.end.zip64 {
            let at = out.len() as u64;
            let entries = end.entries.unwrap_or(entries as u64);
            out.extend_from_slice(b"PK\x06\x06");
            out.extend(le64(&[44]));
            out.extend(le16(&[45, 45]));
            out.extend(le32(&[0, 0]));
            out.extend(le64(&[entries, entries, end.size.unwrap_or(size as u64), end.offset.unwrap_or(start as u64)]));
            out.extend_from_slice(b"PK\x06\x07");
            out.extend(le32(&[0]));
            out.extend(le64(&[end.at.unwrap_or(at)]));
            out.extend(le32(&[1]));
        }
        let entries = self.end.entries.unwrap_or(entries as u16);
        out.extend_from_slice(b"PK\x05\x06");
        out.extend(le16(&[0, 0, entries, entries]));
        out.extend(le32(&[self.end.size.unwrap_or(size as u32), self.end.offset.unwrap_or(start as u32)]));
        out.extend(le16(&[self.end.comment.len() as u16]));
        out.extend_from_slice(&self.end.comment);
        out.extend_from_slice(&self.trailing);
    }
}

/// An entry of the central directory.
fn entry(central: &Central, offset: u32, out: &mut Vec<u8>) {
    out.extend_from_slice(b"PK\x01\x02");
    out.extend(le16(&[u16::from(central.system) << 8 | 20, 20]));
    fields(&central.header, out);
    out.extend(le16(&[0, central.disk, 0]));
    out.extend(le32(&[central.mode << 16, central.offset.unwrap_or(offset)]));
    out.extend_from_slice(&central.header.name);
    out.extend_from_slice(&central.header.extra);
}

/// What both kinds of header have in common.
fn fields(header: &Header, out: &mut Vec<u8>) {
    out.extend(le16(&[header.flags, header.method]));
    out.extend(le32(&[header.time, header.crc32, header.compressed, header.size]));
    out.extend(le16(&[header.name.len() as u16, header.extra.len() as u16]));
}

/// One extra field.
pub fn extra(id: u16, content: &[u8]) -> Vec<u8> {
    [&le16(&[id, content.len() as u16]), content].concat()
}

pub fn deflated(content: &[u8]) -> Vec<u8> {
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(content).expect("memory");
    encoder.finish().expect("memory")
}

/// What starts with this signature, the last of its kind, up to the end.
pub fn last<'a>(archive: &'a mut [u8], signature: &[u8; 4]) -> &'a mut [u8] {
    let start = archive.windows(4).rposition(|bytes| bytes == signature);
    &mut archive[start.expect("such a record")..]
}

pub fn crc32(content: &[u8]) -> u32 {
    let mut crc = Crc::new();
    crc.update(content);
    crc.sum()
}

pub fn le16(values: &[u16]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

pub fn le32(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

pub fn le64(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
