//! The layout of an archive: one member after the other from the first byte on, then the central directory, then its
//! end, and not a byte besides. What departs from that means different things to different programs, and no tool that
//! makes wheels writes it. Here every byte is accounted for before any member is read.

use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;

/// The largest wheels known have some thousand members, and a central directory of some hundred kB.
const MEMBERS_LIMIT: u64 = 100_000;
const DIRECTORY_LIMIT: u64 = 16 << 20;

/// The fixed parts of the records.
const LOCAL: usize = 30;
const CENTRAL: usize = 46;
const END: usize = 22;
const END64: usize = 56;
const LOCATOR: usize = 20;

/// Flags: encrypted, in one of three ways.
pub const ENCRYPTED: u16 = 1 | 1 << 6 | 1 << 13;
/// How hard deflate tried; CRC and sizes follow the data; the name is UTF-8.
const EFFORT: u16 = 1 << 1 | 1 << 2;
const DESCRIPTOR: u16 = 1 << 3;
const UTF8: u16 = 1 << 11;

/// Extra fields: sizes and offsets of 64 bits; a name beside the name.
const ZIP64: u16 = 1;
const UNICODE_PATH: u16 = 0x7075;

type Checked<T> = Result<T, String>;

/// An archive's members, in the order in which they lie in it.
pub struct Directory {
    start: u64,
    pub entries: Vec<Entry>,
}

impl Directory {
    /// Where the directory starts.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Each member's name, and from where to where it goes with all that belongs to it, in their order in the file. Where the
    /// directory says that they overlap, a member ends where it starts.
    pub fn spans(&self) -> impl Iterator<Item = (&[u8], Range<u64>)> {
        self.entries.iter().map(|entry| (entry.name.as_slice(), entry.offset..entry.next.max(entry.offset)))
    }
}

/// What a member's entry in the directory says.
pub struct Entry {
    pub name: Vec<u8>,
    pub facts: Facts,
    /// Where its local header starts.
    pub offset: u64,
    /// Where the next member starts, or the directory.
    pub next: u64,
    /// A Unix file mode, whichever system the archive says that it was made on: 0 where it has none.
    pub mode: u32,
}

/// What an entry and a local header both say.
#[derive(PartialEq, Eq)]
pub struct Facts {
    flags: u16,
    pub method: u16,
    time: u32,
    pub crc32: u32,
    pub compressed: u64,
    pub size: u64,
}

impl Facts {
    /// Whether the name says of itself that it is UTF-8. Without, programs take anything but ASCII for what they like.
    pub fn is_utf8(&self) -> bool {
        self.flags & UTF8 != 0
    }
}

/// Reads the end of an archive and its central directory.
pub fn directory(reader: &mut (impl Read + Seek)) -> Checked<Directory> {
    let length = reader.seek(SeekFrom::End(0)).map_err(|e| e.to_string())?;
    let (count, start, end) = end(reader, length)?;
    if count > MEMBERS_LIMIT || end - start > DIRECTORY_LIMIT {
        return Err(format!("it claims {count} members in a directory of {} bytes", end - start));
    }
    let bytes = read(reader, start, (end - start) as usize)?;
    let (mut rest, mut entries) = (&bytes[..], Vec::new());
    while !rest.is_empty() {
        let (entry, behind) = entry(rest).ok_or("its central directory is cut off")??;
        entries.push(entry);
        rest = behind;
    }
    if entries.len() as u64 != count {
        return Err(format!("its central directory has {} entries, and says {count}", entries.len()));
    }
    entries.sort_by_key(|entry: &Entry| entry.offset);
    let mut next = start;
    for entry in entries.iter_mut().rev() {
        (entry.next, next) = (next, entry.offset);
    }
    if next != 0 {
        return Err("something lies before its first member".to_owned());
    }
    Ok(Directory { start, entries })
}

/// Reads every local header, and checks that it says what the directory says and that the members leave no gap.
pub fn check_members(reader: &mut (impl Read + Seek), directory: &Directory) -> Checked<()> {
    directory.entries.iter().try_for_each(|entry| data(reader, entry).map(drop))
}

/// Where a member's data starts, by a local header that says what the directory says.
pub fn data(reader: &mut (impl Read + Seek), entry: &Entry) -> Checked<u64> {
    check_member(reader, entry).map_err(|fault| format!("the member `{}` {fault}", shown(&entry.name)))
}

/// How many entries the directory has, and from where to where it goes.
fn end(reader: &mut (impl Read + Seek), length: u64) -> Checked<(u64, u64, u64)> {
    let tail = length.min((END64 + LOCATOR + END) as u64);
    if tail < END as u64 {
        return Err("it is too short".to_owned());
    }
    let tail = read(reader, length - tail, tail as usize)?;
    let (before, end) = tail.split_at(tail.len() - END);
    // The end record is the file's end: nothing follows it, no comment and no second end record in a comment.
    if !end.starts_with(b"PK\x05\x06") || two(end, 20) != 0 {
        return Err("it does not end with an end of central directory record without comment".to_owned());
    }
    if end[4..8] != [0; 4] || end[8..10] != end[10..12] {
        return Err("it is one of several disks".to_owned());
    }
    let narrow = [u64::from(two(end, 10)), four(end, 12).into(), four(end, 16).into()];
    let elsewhere = [u64::from(u16::MAX), u32::MAX.into(), u32::MAX.into()];
    let locator = before.len().checked_sub(LOCATOR).map(|at| &before[at..]);
    let (wide, records) = match locator.filter(|locator| locator.starts_with(b"PK\x06\x07")) {
        None => (narrow, END),
        Some(locator) => {
            let records = END64 + LOCATOR + END;
            let (record, at) = (before, length.wrapping_sub(records as u64));
            let known = record.len() == END64 + LOCATOR
                && record.starts_with(b"PK\x06\x06")
                && eight(record, 4) == END64 as u64 - 12
                && record[16..24] == [0; 8]
                && record[24..32] == record[32..40]
                && four(locator, 4) == 0
                && eight(locator, 8) == at
                && four(locator, 16) == 1;
            if !known {
                return Err("its ZIP64 end records make no sense".to_owned());
            }
            ([eight(record, 32), eight(record, 40), eight(record, 48)], records)
        }
    };
    let repeats = |i: usize| narrow[i] == elsewhere[i] || narrow[i] == wide[i];
    if !(0..3).all(repeats) {
        return Err("its ZIP64 end record contradicts its end record".to_owned());
    }
    let ([count, size, start], end) = (wide, length - records as u64);
    if start.checked_add(size) != Some(end) {
        return Err(format!("its central directory is not where it should be, {size} bytes from byte {start} on"));
    }
    Ok((count, start, end))
}

/// The directory's first entry, and what follows it; none where it is cut off.
fn entry(bytes: &[u8]) -> Option<Checked<(Entry, &[u8])>> {
    let (fixed, rest) = bytes.split_at_checked(CENTRAL)?;
    let (name, rest) = rest.split_at_checked(two(fixed, 28).into())?;
    let (extra, rest) = rest.split_at_checked(two(fixed, 30).into())?;
    let (_comment, rest) = rest.split_at_checked(two(fixed, 32).into())?;
    let entry = || {
        if !fixed.starts_with(b"PK\x01\x02") || two(fixed, 34) != 0 {
            return Err("its central directory is damaged".to_owned());
        }
        let mut offset = four(fixed, 42).into();
        let facts = Facts::new(&fixed[8..28], extra, Some(&mut offset));
        let facts = facts.and_then(Facts::usual).map_err(|fault| format!("the member `{}` {fault}", shown(name)))?;
        Ok(Entry { name: name.to_owned(), facts, offset, next: 0, mode: four(fixed, 38) >> 16 })
    };
    Some(entry().map(|entry| (entry, rest)))
}

impl Facts {
    /// From the fields that both kinds of header have, in one order, and the extra fields behind the name.
    fn new(fields: &[u8], extra: &[u8], offset: Option<&mut u64>) -> Checked<Self> {
        let mut facts = Self {
            flags: two(fields, 0),
            method: two(fields, 2),
            time: four(fields, 4),
            crc32: four(fields, 8),
            compressed: four(fields, 12).into(),
            size: four(fields, 16).into(),
        };
        widen([Some(&mut facts.size), Some(&mut facts.compressed), offset].into_iter().flatten(), extra)?;
        Ok(facts)
    }

    fn usual(self) -> Checked<Self> {
        if self.flags & ENCRYPTED != 0 {
            return Err("is encrypted, which no wheel is".to_owned());
        }
        if self.flags & !(EFFORT | DESCRIPTOR | UTF8) != 0 {
            return Err(format!("has the flags {:#x}, which mean nothing in wheels", self.flags));
        }
        Ok(self)
    }
}

/// Replaces the values for which a header has no room by those of its extra fields.
fn widen<'a>(values: impl Iterator<Item = &'a mut u64>, extra: &[u8]) -> Checked<()> {
    let mut asked = values.filter(|value| **value == u64::from(u32::MAX));
    let mut rest = extra;
    while !rest.is_empty() {
        let content = rest.get(4..).and_then(|behind| behind.split_at_checked(two(rest, 2).into()));
        let (content, behind) = content.ok_or("has extra fields that are cut off")?;
        match two(rest, 0) {
            // Each value that is asked for, in this order, and no other: of those that nobody asks for, one program
            // believes the header's and the next one these.
            ZIP64 => {
                let (values, odd) = content.as_chunks::<8>();
                if !odd.is_empty() || values.is_empty() {
                    return Err("has a broken ZIP64 field".to_owned());
                }
                for value in values {
                    *asked.next().ok_or("has ZIP64 sizes besides its sizes")? = u64::from_le_bytes(*value);
                }
            }
            UNICODE_PATH => return Err("has a second name".to_owned()),
            _ => {}
        }
        rest = behind;
    }
    asked.next().map_or(Ok(()), |_| Err("lacks its ZIP64 sizes".to_owned()))
}

fn check_member(reader: &mut (impl Read + Seek), entry: &Entry) -> Checked<u64> {
    let (facts, next) = (&entry.facts, entry.next);
    let fixed = read(reader, entry.offset, LOCAL)?;
    if !fixed.starts_with(b"PK\x03\x04") {
        return Err(format!("has no local header at byte {}", entry.offset));
    }
    let (name, extra) = (usize::from(two(&fixed, 26)), usize::from(two(&fixed, 28)));
    let names = read(reader, entry.offset + LOCAL as u64, name + extra)?;
    let (name, extra) = names.split_at(name);
    let mut local = Facts::new(&fixed[6..26], extra, None)?;
    let described = facts.flags & local.flags & DESCRIPTOR != 0;
    if described {
        // Unknown when the header was written.
        for (value, known) in [(&mut local.compressed, facts.compressed), (&mut local.size, facts.size)] {
            *value = if *value == 0 { known } else { *value };
        }
        local.crc32 = if local.crc32 == 0 { facts.crc32 } else { local.crc32 };
    }
    if name != entry.name || local != *facts {
        return Err("has a local header that contradicts the central directory".to_owned());
    }
    let data = entry.offset + (LOCAL + names.len()) as u64;
    let end = data.checked_add(facts.compressed).filter(|end| *end <= next);
    let end = end.ok_or("overlaps what follows it")?;
    let behind = next - end;
    let fits = if described {
        behind <= 24 && is_descriptor(&read(reader, end, behind as usize)?, facts)
    } else {
        behind == 0
    };
    if fits { Ok(data) } else { Err(format!("is followed by {behind} bytes that are not its own")) }
}

/// With signature or without, with sizes of 32 or of 64 bits: which one, its length says.
fn is_descriptor(bytes: &[u8], facts: &Facts) -> bool {
    let body = if bytes.len().is_multiple_of(8) { bytes.strip_prefix(b"PK\x07\x08") } else { Some(bytes) };
    let sizes = [facts.compressed, facts.size];
    body.is_some_and(|body| match body.len() {
        12 => four(body, 0) == facts.crc32 && [four(body, 4), four(body, 8)].map(u64::from) == sizes,
        20 => four(body, 0) == facts.crc32 && [eight(body, 4), eight(body, 12)] == sizes,
        _ => false,
    })
}

fn read(reader: &mut (impl Read + Seek), at: u64, length: usize) -> Checked<Vec<u8>> {
    let mut bytes = vec![0; length];
    let read = reader.seek(SeekFrom::Start(at)).and_then(|_| reader.read_exact(&mut bytes));
    read.map(|()| bytes).map_err(|e| e.to_string())
}

/// A name as a message may have it.
pub fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name).escape_debug().to_string()
}

fn two(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn four(bytes: &[u8], at: usize) -> u32 {
    u32::from(two(bytes, at)) | u32::from(two(bytes, at + 2)) << 16
}

fn eight(bytes: &[u8], at: usize) -> u64 {
    u64::from(four(bytes, at)) | u64::from(four(bytes, at + 4)) << 32
}
