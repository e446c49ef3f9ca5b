//! Hostile wheels: archives that lead elsewhere, contradict themselves or mean two things, and what the build makes of
//! each. A table's row is a name, the one change to an otherwise good wheel, and a word of the refusal. What is refused
//! leaves no file behind; what is accepted gives the very bytes of the member.

#[path = "../build/mod.rs"]
mod vendoring;

mod support {
    pub mod http;
    pub mod machine;
    pub mod wheels;
    pub mod zipbytes;
}

use std::fs;
use std::io::{Cursor, Write};

use flate2::{Compress, Compression, FlushCompress};
use support::http::{Reply, Request, Server};
use support::machine::{Machine, files_under};
use support::wheels::{self, NORM, Wheel, sha256};
use support::zipbytes::*;
use vendoring::env;
use vendoring::lock::{self, Lock, Method};
use vendoring::wheel::Wheel as Archive;

/// Other bytes than any member's.
const JUNK: &[u8] = b"neither a header nor data";

/// The change that makes a wheel hostile.
type Change = fn(&mut Zip);

/// Both ways to a whole wheel.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// Named by the user: any bytes, whose RECORD must fit.
    Override,
    /// Pinned by the digest of these very bytes. That none of its members is pinned is the hardest case.
    Pinned,
}
use Way::{Override, Pinned};

const BOTH: &[Way] = &[Override, Pinned];

fn norm() -> Vec<u8> {
    Wheel::jit_cache().member(NORM).to_vec()
}

fn good(method: u16) -> Zip {
    Zip::of(&Wheel::jit_cache(), method)
}

/// The bytes of norm.so, or why there are none, in which case there must be no other file either.
fn vendored(way: Way, archive: &[u8], change: impl FnOnce(&mut lock::Wheel)) -> Result<Vec<u8>, String> {
    let wheel = Wheel::jit_cache();
    let mut pinned = wheel.pin().url("https://example.invalid/a.whl").parsed();
    let machine = match way {
        Override => {
            let machine = Machine::new();
            let path = machine.place("given.whl", archive);
            machine.with(env::JIT_CACHE_WHEEL, path)
        }
        Pinned => {
            let machine = Machine::new();
            machine.place(format!("wheels/{}", wheel.file()), archive);
            let folder = machine.path("wheels");
            (pinned.sha256, pinned.size) = (sha256(archive), Some(archive.len() as u64));
            machine.with(env::WHEEL_DIR, folder)
        }
    };
    change(&mut pinned);
    verdict(&machine, pinned)
}

fn verdict(machine: &Machine, pinned: lock::Wheel) -> Result<Vec<u8>, String> {
    let lock = Lock { wheels: vec![pinned], kernels: Vec::new() };
    match machine.vendor(&lock, &["norm"]) {
        Ok(_) => Ok(fs::read(machine.lib_dir().join("norm.so")).expect("what was vendored")),
        Err(fault) => {
            let left = [files_under(&machine.lib_dir()), files_under(&machine.cache().join("members"))].concat();
            assert!(left.is_empty(), "refused ({fault}), and yet there is {left:?}");
            Err(fault.to_string())
        }
    }
}

/// Whether a verdict is the expected one: a word of the refusal, or none for the member's bytes.
fn departs(found: &Result<Vec<u8>, String>, word: Option<&str>) -> Option<String> {
    match (found, word) {
        (Ok(bytes), None) if *bytes == norm() => None,
        (Ok(_), None) => Some("other bytes than the member's".to_owned()),
        (Ok(_), Some(_)) => Some("accepted".to_owned()),
        (Err(message), Some(word)) if message.contains(word) => None,
        (Err(message), _) => Some(format!("refused: {message}")),
    }
}

#[track_caller]
fn check(rows: impl IntoIterator<Item = (String, Result<Vec<u8>, String>, Option<&'static str>)>) {
    let wrong = |(name, found, word): (String, _, Option<&str>)| {
        let expected = word.map_or("acceptance".to_owned(), |word| format!("`{word}`"));
        Some(format!("\n{name}: expected {expected}, {}", departs(&found, word)?))
    };
    let wrong: Vec<String> = rows.into_iter().filter_map(wrong).collect();
    assert!(wrong.is_empty(), "{}", wrong.concat());
}

#[track_caller]
fn check_changes(ways: &[Way], changes: impl IntoIterator<Item = (&'static str, Change, Option<&'static str>)>) {
    check(changes.into_iter().flat_map(|(name, change, word)| {
        let mut zip = good(DEFLATE);
        change(&mut zip);
        let bytes = zip.bytes();
        ways.iter().map(move |way| (format!("{name} ({way:?})"), vendored(*way, &bytes, |_| {}), word))
    }));
}

/// That each is refused for what it is, whichever way it comes.
#[track_caller]
fn refused<const N: usize>(rows: [(&'static str, Change, &'static str); N]) {
    check_changes(BOTH, rows.map(|(name, change, word)| (name, change, Some(word))));
}

/// That each is refused where only the wheel itself says what it is.
#[track_caller]
fn refused_as_override<const N: usize>(rows: [(&'static str, Change, &'static str); N]) {
    check_changes(&[Override], rows.map(|(name, change, word)| (name, change, Some(word))));
}

#[track_caller]
fn accepted<const N: usize>(rows: [(&'static str, Change); N]) {
    check_changes(BOTH, rows.map(|(name, change)| (name, change, None)));
}

/// Adds a member of this path, which RECORD does not list.
fn add(zip: &mut Zip, name: impl Into<Vec<u8>>) {
    zip.members.push(Member::new(name, JUNK, DEFLATE));
}

#[test]
fn good_wheels_are_accepted() {
    accepted([
        ("deflated members", |_| {}),
        ("stored members", |zip| *zip = good(STORED)),
        ("a folder's own entry", |zip| {
            let mut folder = Member::new("flashinfer_jit_cache/", b"", STORED);
            folder.central().mode = 0o040_755;
            zip.members.insert(0, folder);
        }),
        ("file modes of no system", |zip| {
            zip.members.iter_mut().for_each(|member| (member.central().system, member.central().mode) = (0, 0));
        }),
        ("an empty member", |zip| zip.members.insert(1, Member::new("flashinfer_jit_cache/__init__.py", b"", STORED))),
        ("names in UTF-8", |zip| {
            add(zip, "flashinfer_jit_cache/Größe.txt");
            zip.member(".txt").both(|header| header.flags |= UTF8);
        }),
        ("an extra field that says when", |zip| {
            zip.member("norm.so").both(|header| header.extra = extra(0x5455, &[0]))
        }),
        ("members in another order than the directory's entries", |zip| {
            let entries: Vec<Central> =
                zip.members.iter_mut().flat_map(|member| std::mem::take(&mut member.central)).collect();
            let starts: Vec<u32> = zip.starts();
            let placed = entries.into_iter().zip(starts).map(|(entry, start)| Central { offset: Some(start), ..entry });
            let last = zip.members.last_mut().expect("a member");
            last.central = placed.rev().collect();
        }),
    ]);
}

#[test]
fn paths_that_lead_elsewhere_are_refused() {
    refused([
        ("a path that leads up", |zip| add(zip, "../norm.so"), "leads elsewhere"),
        ("a path that leads up from within", |zip| add(zip, "a/../../norm.so"), "leads elsewhere"),
        ("a path that ends by leading up", |zip| add(zip, "a/.."), "leads elsewhere"),
        ("a path from here", |zip| add(zip, "./norm.so"), "leads elsewhere"),
        ("a path with a dot inside", |zip| add(zip, "a/./norm.so"), "leads elsewhere"),
        ("a path with nothing between slashes", |zip| add(zip, "a//norm.so"), "leads elsewhere"),
        ("an absolute path", |zip| add(zip, "/etc/norm.so"), "leads elsewhere"),
        ("a path of another system", |zip| add(zip, "a\\norm.so"), "leads elsewhere"),
        ("a path that leads up on another system", |zip| add(zip, "..\\norm.so"), "leads elsewhere"),
        ("a path on a drive", |zip| add(zip, "C:norm.so"), "leads elsewhere"),
        ("a name with NUL", |zip| add(zip, "norm.so\0.txt"), "leads elsewhere"),
        ("a name with a line break", |zip| add(zip, "norm.so\n"), "leads elsewhere"),
        ("a name with an escape sequence", |zip| add(zip, "\x1b[2Jnorm.so"), "leads elsewhere"),
        ("a name with DEL", |zip| add(zip, "norm\x7f.so"), "leads elsewhere"),
        ("an empty name", |zip| add(zip, ""), "leads elsewhere"),
    ]);
}

#[test]
fn what_is_no_file_is_refused() {
    refused([
        ("a symlink in the member's place", |zip| zip.member("norm.so").central().mode = 0o120_777, "link or a device"),
        ("a symlink elsewhere", |zip| zip.member("WHEEL").central().mode = 0o120_777, "link or a device"),
        ("a character device", |zip| zip.member("norm.so").central().mode = 0o020_666, "link or a device"),
        ("a block device", |zip| zip.member("norm.so").central().mode = 0o060_666, "link or a device"),
        ("a FIFO", |zip| zip.member("norm.so").central().mode = 0o010_666, "link or a device"),
        ("a socket", |zip| zip.member("norm.so").central().mode = 0o140_666, "link or a device"),
        (
            "a symlink written on macOS",
            |zip| (zip.member("norm.so").central().system, zip.member("norm.so").central().mode) = (19, 0o120_777),
            "link or a device",
        ),
        (
            "a symlink said to be written on DOS",
            |zip| (zip.member("norm.so").central().system, zip.member("norm.so").central().mode) = (0, 0o120_777),
            "link or a device",
        ),
        ("a folder by its mode", |zip| zip.member("norm.so").central().mode = 0o040_755, "both a file and a folder"),
        (
            "a folder by its name",
            |zip| zip.member("norm.so").both(|header| header.name.push(b'/')),
            "no member flashinfer_jit_cache/jit_cache/norm/norm.so",
        ),
        ("the member's absence", |zip| zip.remove("norm.so"), "no member flashinfer_jit_cache/jit_cache/norm/norm.so"),
    ]);
}

#[test]
fn a_folder_that_the_lock_names_is_refused() {
    let mut zip = good(STORED);
    zip.members.insert(0, Member::new("flashinfer_jit_cache/", b"", STORED));
    let found = vendored(Pinned, &zip.bytes(), |pinned| pinned.members[0].path = "flashinfer_jit_cache/".to_owned());
    check([("a folder".to_owned(), found, Some("not a regular file"))]);
}

#[test]
fn names_that_stand_for_two_members_are_refused() {
    refused([
        ("one name twice", |zip| zip.members.push(Member::new(NORM, JUNK, DEFLATE)), "one name"),
        (
            "one name twice, the good one last",
            |zip| zip.members.insert(0, Member::new(NORM, JUNK, DEFLATE)),
            "one name",
        ),
        ("names that differ by case", |zip| add(zip, NORM.to_uppercase()), "by case only"),
        (
            "names that differ by case beyond ASCII",
            |zip| {
                for name in ["ä.txt", "Ä.txt"] {
                    add(zip, name);
                    zip.member(name).both(|header| header.flags |= UTF8);
                }
            },
            "by case only",
        ),
        ("a name beyond ASCII that does not say that it is UTF-8", |zip| add(zip, "ä.txt"), "unreadable name"),
        (
            "a second name in an extra field",
            |zip| {
                let field = [&[1][..], &le32(&[crc32(b"other.so")]), NORM.as_bytes()].concat();
                add(zip, "other.so");
                zip.member("other.so").both(|header| header.extra = extra(0x7075, &field));
            },
            "a second name",
        ),
    ]);
}

#[test]
fn members_that_overlap_are_refused() {
    refused([
        (
            "two entries for one local header",
            |zip| {
                let twin = Central {
                    header: Header { name: b"twin.so".into(), ..zip.member("norm.so").local.clone() },
                    ..zip.member("norm.so").central[0].clone()
                };
                zip.member("norm.so").central.push(twin);
            },
            "overlaps",
        ),
        (
            "data that reaches into the next member",
            |zip| zip.member("norm.so").both(|header| header.compressed += 10),
            "overlaps",
        ),
        (
            "data that reaches over the next member",
            |zip| {
                let more = zip.member("prefill_sm90.so").length() as u32;
                zip.member("norm.so").both(|header| header.compressed += more);
            },
            "overlaps",
        ),
        (
            "data that reaches into the directory",
            |zip| zip.member("RECORD").both(|header| header.compressed += 10),
            "overlaps",
        ),
        (
            "data that reaches past the end of numbers",
            |zip| {
                zip.member("norm.so").widened();
                zip.member("norm.so").both(|header| header.extra = extra(1, &le64(&[10, u64::MAX])));
            },
            "overlaps",
        ),
        (
            "a member within another's data",
            |zip| {
                let mut inner = Zip::default();
                inner.members.push(Member::new("inner.so", JUNK, STORED));
                let hidden = inner.bytes();
                let mut outer = Member::new("outer.bin", &hidden, STORED);
                let start = zip.starts().last().copied().expect("a member") as usize + zip.member("RECORD").length();
                let header = inner.members[0].local.clone();
                let offset = Some((start + 30 + outer.local.name.len()) as u32);
                outer.central.push(Central { header, offset, ..outer.central[0].clone() });
                zip.members.push(outer);
            },
            "overlaps",
        ),
    ]);
}

#[test]
fn local_headers_that_contradict_the_directory_are_refused() {
    refused([
        ("another name", |zip| zip.member("norm.so").local.name[0] = b'F', "contradicts"),
        ("another method", |zip| zip.member("norm.so").local.method = STORED, "contradicts"),
        ("another time", |zip| zip.member("norm.so").local.time ^= 1, "contradicts"),
        ("another CRC", |zip| zip.member("norm.so").local.crc32 ^= 1, "contradicts"),
        ("another size", |zip| zip.member("norm.so").local.size += 1, "contradicts"),
        ("another compressed size", |zip| zip.member("norm.so").local.compressed -= 1, "contradicts"),
        (
            "sizes of nought",
            |zip| (zip.member("norm.so").local.size, zip.member("norm.so").local.compressed) = (0, 0),
            "contradicts",
        ),
        ("another flag", |zip| zip.member("norm.so").local.flags |= UTF8, "contradicts"),
        ("a data descriptor only there", |zip| zip.member("norm.so").local.flags |= DESCRIPTOR, "contradicts"),
        ("encryption only there", |zip| zip.member("norm.so").local.flags |= ENCRYPTED, "contradicts"),
        ("a member that nobody wants", |zip| zip.member("WHEEL").local.crc32 ^= 1, "contradicts"),
        ("extra fields that are cut off", |zip| zip.member("norm.so").local.extra = le16(&[7, 9]), "cut off"),
    ]);
}

#[test]
fn contents_that_differ_from_what_is_said_of_them_are_refused() {
    refused([
        ("another CRC", |zip| zip.member("norm.so").both(|header| header.crc32 ^= 1), "checksum"),
        (
            "a bit of stored data",
            |zip| {
                *zip = good(STORED);
                zip.member("norm.so").data[5] ^= 1;
            },
            "checksum",
        ),
        ("a bit of deflated data", |zip| zip.member("norm.so").data[1] ^= 4, "cannot be read"),
        ("no deflate stream", |zip| zip.member("norm.so").data.fill(0xff), "cannot be read"),
        (
            "half a deflate stream",
            |zip| {
                let member = zip.member("norm.so");
                member.data.truncate(member.data.len() / 2);
                let left = member.data.len() as u32;
                member.both(|header| header.compressed = left);
            },
            "cannot be read",
        ),
        ("a larger size", |zip| zip.member("norm.so").both(|header| header.size += 1), "norm.so"),
        ("a smaller size", |zip| zip.member("norm.so").both(|header| header.size -= 1), "norm.so"),
        (
            "a size beyond all reason",
            |zip| {
                zip.member("norm.so").widened();
                let compressed = zip.member("norm.so").data.len() as u64;
                zip.member("norm.so").both(|header| header.extra = extra(1, &le64(&[1 << 40, compressed])));
            },
            "bytes",
        ),
        (
            "a stored member of two sizes",
            |zip| {
                *zip = good(STORED);
                zip.member("norm.so").both(|header| header.size -= 1);
            },
            "norm.so",
        ),
    ]);
}

/// The digest is that of the content, wherever the stream ends.
#[test]
fn data_after_a_deflate_streams_end_are_never_looked_at() {
    accepted([("data after the stream", |zip| {
        let member = zip.member("norm.so");
        member.data.extend_from_slice(JUNK);
        let compressed = member.data.len() as u32;
        member.both(|header| header.compressed = compressed);
    })]);
}

/// A deflate stream of 1 GiB of zeros, about 1 MB long.
fn bomb() -> Vec<u8> {
    let mut compress = Compress::new(Compression::best(), false);
    let mut chunk = Vec::with_capacity(1 << 16);
    // Byte-aligned, and independent of what comes before it: so it can be repeated.
    compress.compress_vec(&vec![0; 1 << 20], &mut chunk, FlushCompress::Full).expect("memory");
    let mut stream = chunk.repeat(1 << 10);
    // The last block, empty.
    stream.extend_from_slice(&[3, 0]);
    stream
}

/// A wheel whose norm.so is a bomb that both headers and RECORD call `size` bytes.
fn bomb_of(size: usize) -> Zip {
    let mut zip = good(DEFLATE);
    let member = zip.member("norm.so");
    member.data = bomb();
    let compressed = member.data.len() as u32;
    member.both(|header| (header.compressed, header.size) = (compressed, size as u32));
    zip.replace("RECORD", format!("{NORM},sha256={},{size}\n", "A".repeat(43)).as_bytes());
    zip
}

#[test]
fn a_bomb_is_inflated_no_further_than_its_claimed_size() {
    struct Counted(u64);
    impl Write for Counted {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0 += bytes.len() as u64;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let archive = bomb_of(1000).bytes();
    check(BOTH.iter().map(|way| (format!("{way:?}"), vendored(*way, &archive, |_| {}), Some("norm.so"))));
    let (mut out, mut reader) = (Counted(0), Counting { inner: Cursor::new(&archive), read: 0 });
    let mut wheel = Archive::open(&mut reader, "a.whl").expect("the archive itself is fine");
    wheel.copy(&lock::Member::at(NORM), &mut out, "norm.so".as_ref()).expect_err("a bomb");
    assert!(out.0 <= 1000, "{} bytes were written", out.0);
    assert!(reader.read < 1 << 17, "{} of {} bytes were read", reader.read, archive.len());
}

/// Counts what is read.
struct Counting<R> {
    inner: R,
    read: usize,
}

impl<R: std::io::Read> std::io::Read for Counting<R> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(out)?;
        self.read += n;
        Ok(n)
    }
}

impl<R: std::io::Seek> std::io::Seek for Counting<R> {
    fn seek(&mut self, to: std::io::SeekFrom) -> std::io::Result<u64> {
        self.inner.seek(to)
    }
}

#[test]
fn a_bomb_beyond_its_locked_size_is_refused_before_it_is_inflated() {
    let found = vendored(Pinned, &bomb_of(1 << 30).bytes(), |pinned| pinned.members[0].size = Some(1000));
    check([("locked to 1000 bytes".to_owned(), found, Some("has 1073741824 bytes"))]);
}

#[test]
fn a_bomb_beyond_every_members_size_is_refused_before_it_is_inflated() {
    let archive = bomb_of((1 << 30) + 1).bytes();
    check(BOTH.iter().map(|way| (format!("{way:?}"), vendored(*way, &archive, |_| {}), Some("more than any member"))));
}

#[test]
fn texts_that_go_on_are_refused() {
    fn bomb_in(zip: &mut Zip, name: &str) {
        let member = zip.member(name);
        member.data = bomb();
        let compressed = member.data.len() as u32;
        member.both(|header| (header.compressed, header.size) = (compressed, 1 << 30));
    }
    refused_as_override([
        ("METADATA", |zip| bomb_in(zip, "METADATA"), "METADATA is longer"),
        ("WHEEL", |zip| bomb_in(zip, "WHEEL"), "WHEEL is longer"),
        ("RECORD", |zip| bomb_in(zip, "RECORD"), "RECORD is longer"),
    ]);
}

#[test]
fn encrypted_members_and_flags_without_meaning_are_refused() {
    refused([
        ("encrypted", |zip| zip.member("norm.so").both(|header| header.flags |= ENCRYPTED), "encrypted"),
        ("strongly encrypted", |zip| zip.member("norm.so").both(|header| header.flags |= STRONG), "encrypted"),
        ("masked", |zip| zip.member("norm.so").both(|header| header.flags |= MASKED), "encrypted"),
        ("encrypted elsewhere", |zip| zip.member("WHEEL").both(|header| header.flags |= ENCRYPTED), "encrypted"),
        ("a patch", |zip| zip.member("norm.so").both(|header| header.flags |= 1 << 5), "flags 0x20"),
        ("a reserved flag", |zip| zip.member("norm.so").both(|header| header.flags |= 1 << 15), "flags 0x8000"),
    ]);
}

#[test]
fn unknown_methods_are_refused() {
    refused([
        ("deflate64", |zip| zip.member("norm.so").both(|header| header.method = 9), "compressi"),
        ("bzip2", |zip| zip.member("norm.so").both(|header| header.method = 12), "compressi"),
        ("lzma", |zip| zip.member("norm.so").both(|header| header.method = 14), "compressi"),
        ("zstd", |zip| zip.member("norm.so").both(|header| header.method = 93), "compressi"),
        ("AES", |zip| zip.member("norm.so").both(|header| header.method = 99), "compressi"),
        ("no such method", |zip| zip.member("norm.so").both(|header| header.method = 0xffff), "compressi"),
    ]);
}

#[test]
fn true_data_descriptors_are_accepted() {
    accepted([
        ("with its signature", |zip| zip.members.iter_mut().for_each(Member::described)),
        ("without its signature", |zip| {
            zip.member("norm.so").described();
            zip.member("norm.so").after.drain(..4);
        }),
        ("with sizes of 64 bits", |zip| zip.member("norm.so").described_widely()),
        ("with sizes of 64 bits, without its signature", |zip| {
            zip.member("norm.so").described_widely();
            zip.member("norm.so").after.drain(..4);
        }),
        ("of a stored member", |zip| {
            *zip = good(STORED);
            zip.member("norm.so").described();
        }),
        ("behind a local header that knows the sizes", |zip| {
            let known = zip.member("norm.so").local.clone();
            zip.member("norm.so").described();
            zip.member("norm.so").local = Header { flags: DESCRIPTOR, ..known };
        }),
    ]);
}

#[test]
fn false_data_descriptors_are_refused() {
    fn altered(zip: &mut Zip, at: usize) {
        zip.member("norm.so").described();
        zip.member("norm.so").after[at] ^= 1;
    }
    fn altered_widely(zip: &mut Zip, at: usize) {
        zip.member("norm.so").described_widely();
        zip.member("norm.so").after[at] ^= 1;
    }
    refused([
        ("of another signature", |zip| altered(zip, 0), "not its own"),
        ("of another CRC", |zip| altered(zip, 4), "not its own"),
        ("of another compressed size", |zip| altered(zip, 8), "not its own"),
        ("of another size", |zip| altered(zip, 12), "not its own"),
        ("of another CRC and 64 bits", |zip| altered_widely(zip, 4), "not its own"),
        ("of another compressed size of 64 bits", |zip| altered_widely(zip, 8), "not its own"),
        ("of another size of 64 bits", |zip| altered_widely(zip, 23), "not its own"),
        (
            "that is not there",
            |zip| {
                zip.member("norm.so").described();
                zip.member("norm.so").after.clear();
            },
            "not its own",
        ),
        (
            "that goes on",
            |zip| {
                zip.member("norm.so").described();
                zip.member("norm.so").after.extend_from_slice(JUNK);
            },
            "not its own",
        ),
        (
            "that no flag announces",
            |zip| {
                let known = zip.member("norm.so").local.clone();
                zip.member("norm.so").described();
                zip.member("norm.so").both(|header| *header = known.clone());
            },
            "not its own",
        ),
        (
            "that the directory does not announce",
            |zip| {
                zip.member("norm.so").described();
                zip.member("norm.so").central().header.flags = 0;
            },
            "contradicts",
        ),
    ]);
}

#[test]
fn true_zip64_records_are_accepted() {
    accepted([
        ("the sizes of a member", |zip| zip.member("norm.so").widened()),
        ("the sizes of a member in the directory alone", |zip| {
            let known = zip.member("norm.so").local.clone();
            zip.member("norm.so").widened();
            zip.member("norm.so").local = known;
        }),
        ("the offset of a member", |zip| {
            let offset = zip.offset_of("prefill_sm90.so").into();
            let central = zip.member("prefill_sm90.so").central();
            (central.offset, central.header.extra) = (Some(ELSEWHERE), extra(1, &le64(&[offset])));
        }),
        ("the end record", |zip| _ = zip.widened()),
        ("an end record that nobody refers to", |zip| zip.end.zip64 = Some(End64::default())),
    ]);
}

#[test]
fn false_zip64_records_are_refused() {
    fn widened(zip: &mut Zip, change: fn(&mut Header)) {
        zip.member("norm.so").widened();
        change(&mut zip.member("norm.so").central().header);
    }
    refused([
        ("another size", |zip| widened(zip, |header| header.extra[4] ^= 1), "contradicts"),
        ("another compressed size", |zip| widened(zip, |header| header.extra[12] ^= 1), "contradicts"),
        (
            "half of the sizes",
            |zip| widened(zip, |header| header.extra = extra(1, &le64(&[1]))),
            "lacks its ZIP64 sizes",
        ),
        ("none of the sizes", |zip| widened(zip, |header| header.extra.clear()), "lacks its ZIP64 sizes"),
        ("an empty field", |zip| widened(zip, |header| header.extra = extra(1, &[])), "broken ZIP64"),
        ("a field of an odd length", |zip| widened(zip, |header| header.extra = extra(1, &[0; 17])), "broken ZIP64"),
        ("a field longer than all", |zip| widened(zip, |header| header.extra = le16(&[1, 99, 0])), "cut off"),
        (
            "sizes besides the sizes",
            |zip| zip.member("norm.so").both(|header| header.extra = extra(1, &le64(&[9, 9]))),
            "besides its sizes",
        ),
        ("two fields", |zip| widened(zip, |header| header.extra = header.extra.repeat(2)), "besides its sizes"),
        (
            "another offset",
            |zip| {
                let central = zip.member("prefill_sm90.so").central();
                (central.offset, central.header.extra) = (Some(ELSEWHERE), extra(1, &le64(&[1])));
            },
            "overlaps",
        ),
        ("an end record with more entries", |zip| zip.widened().entries = Some(6), "entries"),
        ("an end record with fewer entries", |zip| zip.widened().entries = Some(4), "entries"),
        ("an end record with entries beyond all reason", |zip| zip.widened().entries = Some(u64::MAX), "claims"),
        ("an end record with another offset", |zip| zip.widened().offset = Some(1), "not where it should be"),
        (
            "an end record with an offset past the end of numbers",
            |zip| zip.widened().offset = Some(u64::MAX),
            "not where it should be",
        ),
        ("an end record with another size", |zip| zip.widened().size = Some(1), "not where it should be"),
        ("a locator that points elsewhere", |zip| zip.widened().at = Some(1), "make no sense"),
        (
            "no end record where one is referred to",
            |zip| {
                zip.widened();
                zip.end.zip64 = None;
            },
            "not where it should be",
        ),
        (
            "two end records that disagree",
            |zip| {
                zip.widened();
                zip.end.entries = Some(4);
            },
            "contradicts its end record",
        ),
        (
            "two end records that disagree over the directory's size",
            |zip| {
                zip.widened();
                zip.end.size = Some(1);
            },
            "contradicts its end record",
        ),
        (
            "two end records that disagree over the directory's place",
            |zip| {
                zip.widened();
                zip.end.offset = Some(1);
            },
            "contradicts its end record",
        ),
    ]);
}

#[test]
fn offsets_that_are_wrong_are_refused() {
    fn moved(zip: &mut Zip, change: fn(u32) -> u32) {
        let offset = zip.offset_of("prefill_sm90.so");
        zip.member("prefill_sm90.so").central().offset = Some(change(offset));
    }
    refused([
        ("of a member, a byte early", |zip| moved(zip, |offset| offset - 1), "overlaps"),
        ("of a member, a byte late", |zip| moved(zip, |offset| offset + 1), "not its own"),
        ("of a member, in its data", |zip| moved(zip, |offset| offset + 100), "not its own"),
        (
            "of a member, in the directory",
            |zip| {
                let end = zip.starts()[4] as usize + zip.member("RECORD").length();
                zip.member("RECORD").central().offset = Some(end as u32);
            },
            "not its own",
        ),
        ("of a member, past the end", |zip| moved(zip, |_| 1 << 30), "not its own"),
        (
            "of all members, exchanged",
            |zip| {
                let starts = zip.starts();
                zip.members
                    .iter_mut()
                    .zip(starts.into_iter().rev())
                    .for_each(|(m, start)| m.central().offset = Some(start));
            },
            "contradicts",
        ),
        ("of a member, on another disk", |zip| zip.member("norm.so").central().disk = 1, "damaged"),
        ("of the directory, early", |zip| zip.end.offset = Some(zip.directory() - 1), "not where it should be"),
        ("of the directory, late", |zip| zip.end.offset = Some(zip.directory() + 1), "not where it should be"),
        ("of the directory, nought", |zip| zip.end.offset = Some(0), "not where it should be"),
        ("of the directory, past the end", |zip| zip.end.offset = Some(1 << 30), "not where it should be"),
    ]);
}

#[test]
fn directories_that_miscount_are_refused() {
    refused([
        ("an entry too many", |zip| zip.end.entries = Some(6), "has 5 entries, and says 6"),
        ("an entry too few", |zip| zip.end.entries = Some(4), "has 5 entries, and says 4"),
        ("no entry", |zip| zip.end.entries = Some(0), "has 5 entries, and says 0"),
        ("a byte too many", |zip| zip.end.size = Some(zip.directory_size() + 1), "not where it should be"),
        ("a byte too few", |zip| zip.end.size = Some(zip.directory_size() - 1), "not where it should be"),
        ("no bytes", |zip| zip.end.size = Some(0), "not where it should be"),
        (
            "one entry of several",
            |zip| {
                let last = zip.members[4].central[0].header.name.len() as u32 + 46;
                let (start, size) = (zip.directory(), zip.directory_size());
                (zip.end.entries, zip.end.offset, zip.end.size) = (Some(1), Some(start + size - last), Some(last));
            },
            "first member",
        ),
        (
            "more members than any wheel",
            |zip| {
                let entry = Central {
                    header: Header { name: b"x".into(), ..zip.members[0].local.clone() },
                    ..zip.members[0].central[0].clone()
                };
                zip.members[0].central = vec![entry; 100_001];
                zip.widened();
            },
            "claims 100005 members",
        ),
        (
            "a longer directory than any wheel",
            |zip| {
                zip.after_directory = vec![0; 17 << 20];
                zip.end.size = Some(zip.directory_size());
            },
            "claims 5 members",
        ),
    ]);
}

#[test]
fn damaged_records_are_refused() {
    refused([
        ("a local header", |zip| zip.finally = Some(|bytes| bytes[0] = b'Q'), "no local header"),
        ("an entry", |zip| zip.finally = Some(|bytes| last(bytes, b"PK\x01\x02")[3] = 3), "damaged"),
        ("an entry's name", |zip| zip.finally = Some(|bytes| last(bytes, b"PK\x01\x02")[28] += 1), "cut off"),
        ("an entry's extra fields", |zip| zip.finally = Some(|bytes| last(bytes, b"PK\x01\x02")[30] += 1), "cut off"),
        ("an entry's comment", |zip| zip.finally = Some(|bytes| last(bytes, b"PK\x01\x02")[32] += 1), "cut off"),
        ("an end record on another disk", |zip| zip.finally = Some(|bytes| last(bytes, b"PK\x05\x06")[4] = 1), "disks"),
        ("a directory on another disk", |zip| zip.finally = Some(|bytes| last(bytes, b"PK\x05\x06")[6] = 1), "disks"),
        ("entries on another disk", |zip| zip.finally = Some(|bytes| last(bytes, b"PK\x05\x06")[8] -= 1), "disks"),
    ]);
}

#[test]
fn damaged_zip64_records_are_refused() {
    fn damaged(zip: &mut Zip, change: fn(&mut [u8])) {
        zip.widened();
        zip.finally = Some(change);
    }
    refused([
        ("the signature", |zip| damaged(zip, |bytes| last(bytes, b"PK\x06\x06")[0] = 0), "make no sense"),
        ("the length", |zip| damaged(zip, |bytes| last(bytes, b"PK\x06\x06")[4] += 1), "make no sense"),
        ("the disk", |zip| damaged(zip, |bytes| last(bytes, b"PK\x06\x06")[16] = 1), "make no sense"),
        ("the directory's disk", |zip| damaged(zip, |bytes| last(bytes, b"PK\x06\x06")[20] = 1), "make no sense"),
        ("the entries on this disk", |zip| damaged(zip, |bytes| last(bytes, b"PK\x06\x06")[24] -= 1), "make no sense"),
        (
            "the locator's signature",
            |zip| damaged(zip, |bytes| last(bytes, b"PK\x06\x07")[0] = 0),
            "not where it should be",
        ),
        ("the locator's disk", |zip| damaged(zip, |bytes| last(bytes, b"PK\x06\x07")[4] = 1), "make no sense"),
        ("the number of disks", |zip| damaged(zip, |bytes| last(bytes, b"PK\x06\x07")[16] = 2), "make no sense"),
        (
            "nothing before the locator",
            |zip| {
                zip.members.clear();
                zip.widened();
                zip.trailing = Zip { end: zip.end.clone(), ..Zip::default() }.bytes()[56..].to_vec();
                zip.end = End::default();
            },
            "ZIP64",
        ),
    ]);
}

#[test]
fn bytes_that_belong_to_nothing_are_refused() {
    fn unlisted() -> Member {
        let mut member = Member::new("unlisted.so", JUNK, STORED);
        member.central.clear();
        member
    }
    refused([
        ("before the first member", |zip| zip.members[0].before = JUNK.to_vec(), "before its first member"),
        (
            "before the first member, where every offset ignores them",
            |zip| {
                let starts = zip.starts();
                zip.end.offset = Some(zip.directory());
                zip.members.iter_mut().zip(starts).for_each(|(member, start)| member.central().offset = Some(start));
                zip.members[0].before = JUNK.to_vec();
            },
            "not where it should be",
        ),
        (
            "a program before the first member",
            |zip| zip.members[0].before = b"#!/bin/sh\nexit\n".to_vec(),
            "before its first member",
        ),
        ("between members", |zip| zip.members[1].before = JUNK.to_vec(), "not its own"),
        ("between the members and the directory", |zip| zip.gap = JUNK.to_vec(), "not its own"),
        ("between the directory and the end", |zip| zip.after_directory = JUNK.to_vec(), "not where it should be"),
        ("after the end", |zip| zip.trailing = JUNK.to_vec(), "does not end with"),
        ("a byte after the end", |zip| zip.trailing = vec![0], "does not end with"),
        ("a comment", |zip| zip.end.comment = JUNK.to_vec(), "does not end with"),
        (
            "a comment that is announced and not there",
            |zip| zip.finally = Some(|bytes| last(bytes, b"PK\x05\x06")[20] = 9),
            "does not end with",
        ),
        (
            "a comment that holds a second end record",
            |zip| {
                zip.end.comment = Zip::default().bytes();
            },
            "not where it should be",
        ),
        (
            "a comment that holds a second wheel's end",
            |zip| {
                let (start, size) = (zip.directory(), zip.directory_size());
                let mut second = Zip::default();
                (second.end.entries, second.end.offset, second.end.size) = (Some(5), Some(start), Some(size));
                zip.end.comment = second.bytes();
            },
            "not where it should be",
        ),
        (
            "a second archive after the first",
            |zip| {
                let mut second = good(DEFLATE);
                second.replace("norm.so", JUNK);
                zip.trailing = second.bytes();
            },
            "not where it should be",
        ),
        ("a local header before all others", |zip| zip.members.insert(0, unlisted()), "before its first member"),
        ("a local header between members", |zip| zip.members.insert(1, unlisted()), "not its own"),
        ("a local header after all others", |zip| zip.members.push(unlisted()), "not its own"),
    ]);
}

#[test]
fn truncated_wheels_are_refused_wherever_they_end() {
    let archive = good(DEFLATE).bytes();
    let ends = (0..archive.len()).step_by(37).chain(archive.len() - 25..archive.len());
    check(ends.flat_map(|end| {
        let part = &archive[..end];
        BOTH.iter()
            .map(move |way| (format!("{end} bytes ({way:?})"), vendored(*way, part, |_| {}), Some("is not a wheel")))
    }));
}

#[test]
fn wheels_that_lack_a_piece_are_refused_wherever_it_was() {
    let archive = good(STORED).bytes();
    check((0..archive.len() - 36).step_by(37).map(|start| {
        let part = [&archive[..start], &archive[start + 37..]].concat();
        (format!("without bytes {start}-{}", start + 36), vendored(Override, &part, |_| {}), Some("given.whl"))
    }));
}

/// What is not looked at, a file's permissions for example, may change; the member may not.
#[test]
fn no_single_damaged_byte_changes_a_member() {
    let mut archive = good(STORED).bytes();
    let recorded = |archive: &[u8]| {
        let (mut wheel, mut member) = (Archive::open(Cursor::new(archive), "damaged.whl")?, Vec::new());
        let expected = wheel.recorded(&lock::Member::at(NORM))?;
        wheel.copy(&expected, &mut member, "norm.so".as_ref()).map(|_| member)
    };
    for at in 0..archive.len() {
        archive[at] ^= 0x55;
        if let Ok(bytes) = recorded(&archive) {
            assert!(bytes == norm(), "byte {at} changes the member unnoticed");
        }
        archive[at] ^= 0x55;
    }
    assert!(recorded(&archive).is_ok_and(|bytes| bytes == norm()), "undamaged");
}

#[test]
fn what_is_no_wheel_is_refused() {
    let gzip = [&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3][..], &deflated(&norm()), &le32(&[crc32(&norm()), 920])].concat();
    let elf = [b"\x7fELF\x02\x01\x01", &[0; 100][..]].concat();
    let mut widened = Zip::default();
    // A byte less, and it would start one byte before the file does.
    widened.widened().at = Some(u64::MAX);
    let mut widened = widened.bytes();
    widened.remove(55);
    let cases: [(&str, Vec<u8>, [&'static str; 2]); 10] = [
        ("an empty file", Vec::new(), ["too short"; 2]),
        ("a text", b"This file was moved. ".repeat(9), ["does not end with"; 2]),
        ("a page", b"<!DOCTYPE html><html><body>404</body></html>".to_vec(), ["does not end with"; 2]),
        ("a shared object", elf, ["does not end with"; 2]),
        ("a gzip file", gzip, ["does not end with"; 2]),
        ("nothing but an end record", Zip::default().bytes(), ["holds 0 dist-info/METADATA", "no member"]),
        ("an end record after text", [JUNK, &Zip::default().bytes()].concat(), ["not where it should be"; 2]),
        (
            "an end record that claims text",
            {
                let mut zip = Zip { gap: JUNK.to_vec(), ..Zip::default() };
                zip.end.size = Some(0);
                zip.bytes()
            },
            ["before its first member"; 2],
        ),
        ("a ZIP64 end record that lacks a byte", widened, ["make no sense"; 2]),
        ("nothing but the signature of an end record", b"PK\x05\x06".to_vec(), ["too short"; 2]),
    ];
    check(cases.iter().flat_map(|(name, bytes, words)| {
        BOTH.iter()
            .zip(words)
            .map(move |(way, word)| (format!("{name} ({way:?})"), vendored(*way, bytes, |_| {}), Some(*word)))
    }));
}

#[test]
fn records_that_disagree_with_the_member_are_refused() {
    fn record(zip: &mut Zip, change: impl FnOnce(String) -> String) {
        let record = wheels::row(NORM, &norm());
        zip.replace("RECORD", change(record).as_bytes());
    }
    refused_as_override([
        ("another content than recorded", |zip| zip.replace("norm.so", &norm().to_ascii_uppercase()), "sha256"),
        ("a longer content than recorded", |zip| zip.replace("norm.so", JUNK), "has 25 bytes"),
        ("another size than the member's", |zip| record(zip, |row| row.replace(",480", ",481")), "has 480 bytes"),
        ("no RECORD", |zip| zip.remove("RECORD"), "RECORD cannot be read"),
        ("an empty RECORD", |zip| zip.replace("RECORD", b""), "RECORD has no sha256 and size"),
        ("no row for the member", |zip| record(zip, |row| row.replace("norm.so", "other.so")), "RECORD has no sha256"),
        ("no digest", |zip| record(zip, |_| format!("{NORM},,480\n")), "RECORD has no sha256"),
        ("no size", |zip| record(zip, |row| row.replace(",480", ",")), "RECORD has no sha256"),
        ("a size that is no number", |zip| record(zip, |row| row.replace(",480", ",-1")), "RECORD has no sha256"),
        ("a weaker digest", |zip| record(zip, |row| row.replace("sha256=", "md5=")), "RECORD has no sha256"),
        ("a short digest", |zip| record(zip, |row| row.replace("sha256=", "sha256=A")), "RECORD has no sha256"),
        ("two rows that disagree", |zip| record(zip, |row| wheels::row(NORM, JUNK) + &row), "RECORD has several"),
        (
            "two rows that disagree, the good one first",
            |zip| record(zip, |row| row + &wheels::row(NORM, JUNK)),
            "RECORD has several",
        ),
        ("no text", |zip| zip.replace("RECORD", &[0xff, 0xfe]), "RECORD cannot be read"),
    ]);
    check_changes(
        &[Override],
        [
            ("a quoted path", (|zip| record(zip, |row| row.replace(NORM, &format!("\"{NORM}\"")))) as Change, None),
            ("a row in the Windows way", |zip| record(zip, |row| row.replace('\n', "\r\n")), None),
        ],
    );
}

#[test]
fn wheels_of_something_else_are_refused() {
    fn text(zip: &mut Zip, name: &str, from: &str, to: &str) {
        let (_, content) = Wheel::jit_cache().files().into_iter().find(|(path, _)| path.ends_with(name)).expect("it");
        let content = String::from_utf8(content).expect("text");
        assert!(content.contains(from));
        zip.replace(name, content.replace(from, to).as_bytes());
    }
    refused_as_override([
        ("no METADATA", |zip| zip.remove("METADATA"), "holds 0 dist-info/METADATA"),
        (
            "METADATA deeper down",
            |zip| zip.member("METADATA").both(|h| h.name.splice(..0, *b"a/").for_each(drop)),
            "holds 0 dist-info",
        ),
        ("two dist-info folders", |zip| add(zip, "other-1.0.dist-info/METADATA"), "holds 2 dist-info/METADATA"),
        ("another distribution", |zip| text(zip, "METADATA", "flashinfer_jit_cache", "other"), "is a wheel of other"),
        ("another version", |zip| text(zip, "METADATA", "0.6.3+cu130", "0.6.4+cu130"), "version 0.6.4+cu130"),
        ("no name", |zip| text(zip, "METADATA", "Name:", "Game:"), "is a wheel of"),
        ("a name in the description alone", |zip| text(zip, "METADATA", "Name:", "\nName:"), "is a wheel of"),
        ("METADATA that is no text", |zip| zip.replace("METADATA", &[0xff, 0xfe]), "METADATA cannot be read"),
        ("no WHEEL", |zip| zip.remove("WHEEL"), "WHEEL cannot be read"),
        ("another platform", |zip| text(zip, "WHEEL", "manylinux_2_28_x86_64", "win_amd64"), "is for"),
        ("another processor", |zip| text(zip, "WHEEL", "x86_64", "aarch64"), "is for"),
        ("no platform", |zip| text(zip, "WHEEL", "Tag:", "Tug:"), "is for"),
    ]);
}

mod by_ranges {
    use super::*;

    /// A server with the wheel, and the lock's entry that says where norm.so lies in it.
    fn pinned(zip: &Zip) -> (Server, lock::Wheel) {
        let (server, wheel, archive) = (Server::start(), Wheel::jit_cache(), zip.bytes());
        let mut pinned = wheel.pin().url(server.url("/a.whl")).parsed();
        (pinned.sha256, pinned.size) = (sha256(&archive), Some(archive.len() as u64));
        let member = zip.members.iter().find(|member| member.local.name == NORM.as_bytes()).expect("norm.so");
        let locked = &mut pinned.members[0];
        (locked.size, locked.sha256) = (Some(norm().len() as u64), Some(sha256(&norm())));
        (locked.offset, locked.length) = (Some(zip.offset_of("norm.so").into()), Some(member.length() as u64));
        (locked.compressed, locked.crc32) = (Some(member.data.len() as u64), Some(member.local.crc32));
        locked.method = Some(if member.local.method == STORED { Method::Stored } else { Method::Deflate });
        (server, pinned)
    }

    /// As [`pinned`], but the lock does not say where.
    fn pinned_without_place(zip: &Zip) -> (Server, lock::Wheel) {
        let (server, mut pinned) = pinned(zip);
        let locked = &mut pinned.members[0];
        (locked.offset, locked.length, locked.compressed) = (None, None, None);
        (locked.method, locked.crc32) = (None, None);
        (server, pinned)
    }

    /// norm.so not being the first, an offset of nought is wrong as well.
    fn honest(method: u16) -> Zip {
        let mut zip = good(method);
        zip.members.swap(0, 1);
        zip
    }

    /// What comes of a server that answers so, one request after the other, to who was told of the good wheel.
    /// With the last request.
    fn answered(replies: impl IntoIterator<Item = Reply>) -> (Result<Vec<u8>, String>, Request) {
        let (server, pinned) = pinned(&honest(DEFLATE));
        server.on("/a.whl", replies);
        let found = verdict(&Machine::new(), pinned);
        (found, server.requests().pop().expect("a request"))
    }

    /// The member's bytes and, as `Content-Range` has it, where they are.
    fn part() -> (Vec<u8>, String) {
        let mut zip = honest(DEFLATE);
        let (archive, start) = (zip.bytes(), zip.offset_of("norm.so") as usize);
        let end = start + zip.member("norm.so").length();
        (archive[start..end].to_vec(), format!("bytes {start}-{}/{}", end - 1, archive.len()))
    }

    fn whole() -> Reply {
        Reply::ok(honest(DEFLATE).bytes())
    }

    #[test]
    fn good_members_are_accepted() {
        check(
            [
                ("stored", honest(STORED)),
                ("deflated", honest(DEFLATE)),
                ("with a data descriptor", {
                    let mut zip = honest(DEFLATE);
                    zip.member("norm.so").described();
                    zip
                }),
                ("with sizes of 64 bits", {
                    let mut zip = honest(DEFLATE);
                    zip.member("norm.so").widened();
                    zip
                }),
            ]
            .map(|(name, zip)| {
                let (server, pinned) = pinned(&zip);
                server.on("/a.whl", [Reply::ok(zip.bytes()).with_ranges()]);
                let found = verdict(&Machine::new(), pinned);
                assert_eq!(server.requests().len(), 1, "{name}: one request, for the member alone");
                (name.to_owned(), found, None)
            }),
        );
    }

    /// The lock is of the good wheel; the server has another one, of the same length and with the same places.
    #[test]
    fn other_bytes_in_the_members_place_are_refused() {
        let rows: [(&str, u16, Change, &str); 11] = [
            ("another name", DEFLATE, |zip| zip.member("norm.so").local.name[0] = b'F', "is not the member"),
            (
                "a longer name",
                DEFLATE,
                |zip| {
                    let member = zip.member("norm.so");
                    member.local.name.push(b'x');
                    member.data.pop();
                },
                "is not the member",
            ),
            ("another method", DEFLATE, |zip| zip.member("norm.so").local.method = STORED, "is not the member"),
            ("encrypted", DEFLATE, |zip| zip.member("norm.so").local.flags |= ENCRYPTED, "is not the member"),
            ("strongly encrypted", DEFLATE, |zip| zip.member("norm.so").local.flags |= STRONG, "is not the member"),
            ("masked", DEFLATE, |zip| zip.member("norm.so").local.flags |= MASKED, "is not the member"),
            (
                "no local header",
                DEFLATE,
                |zip| {
                    let junk = vec![0; zip.member("norm.so").length()];
                    let central = std::mem::take(&mut zip.member("norm.so").central);
                    zip.remove("norm.so");
                    zip.members[1].before = junk;
                    zip.members[1].central.extend(central);
                },
                "is not the member",
            ),
            (
                "another signature",
                DEFLATE,
                |zip| {
                    zip.finally = Some(|bytes| {
                        let name = bytes.windows(NORM.len()).position(|name| name == NORM.as_bytes());
                        bytes[name.expect("norm.so") - 30] = 0;
                    });
                },
                "is not the member",
            ),
            ("another content", STORED, |zip| zip.member("norm.so").data[7] ^= 1, "sha256"),
            ("no deflate stream", DEFLATE, |zip| zip.member("norm.so").data.fill(0xff), "cannot be read"),
            (
                "a stream that ends early",
                DEFLATE,
                |zip| {
                    let member = zip.member("norm.so");
                    let short = deflated(b"norm");
                    member.data[..short.len()].copy_from_slice(&short);
                },
                "ends after 4 of 480 bytes",
            ),
        ];
        check(rows.map(|(name, method, change, word)| {
            let mut zip = honest(method);
            let (server, pinned) = pinned(&zip);
            change(&mut zip);
            server.on("/a.whl", [Reply::ok(zip.bytes()).with_ranges()]);
            (name.to_owned(), verdict(&Machine::new(), pinned), Some(word))
        }));
    }

    #[test]
    fn a_lock_that_does_not_fit_the_wheel_is_refused() {
        type Misplacement = fn(&mut lock::Member);
        let rows: [(&str, Misplacement, &str); 8] = [
            ("a byte too far", |locked| locked.offset = locked.offset.map(|at| at + 1), "is not the member"),
            ("the first member", |locked| locked.offset = Some(0), "is not the member"),
            ("past the end", |locked| locked.offset = Some(1 << 40), "ends at byte"),
            ("past the end of numbers", |locked| locked.offset = Some(u64::MAX), "ends at byte"),
            (
                "data that stop before their end",
                |locked| locked.compressed = locked.compressed.map(|n| n / 2),
                "norm.so",
            ),
            ("a smaller size", |locked| locked.size = Some(100), "goes on after 100 bytes"),
            ("a larger size", |locked| locked.size = Some(481), "ends after 480 of 481 bytes"),
            ("another digest", |locked| locked.sha256 = Some(sha256(JUNK)), "sha256"),
        ];
        check(rows.map(|(name, change, word)| {
            let zip = honest(DEFLATE);
            let (server, mut pinned) = pinned(&zip);
            server.on("/a.whl", [Reply::ok(zip.bytes()).with_ranges()]);
            change(&mut pinned.members[0]);
            (name.to_owned(), verdict(&Machine::new(), pinned), Some(word))
        }));
    }

    #[test]
    fn a_bomb_is_inflated_no_further_than_its_locked_size() {
        let mut zip = honest(DEFLATE);
        zip.member("norm.so").data = bomb();
        let (server, pinned) = pinned(&zip);
        server.on("/a.whl", [Reply::ok(zip.bytes()).with_ranges()]);
        check([("1 GiB of zeros".to_owned(), verdict(&Machine::new(), pinned), Some("goes on after 480 bytes"))]);
    }

    /// What the server answers to the range, and then to what comes next.
    #[test]
    fn answers_that_are_not_the_range_lead_to_the_whole_wheel() {
        let (bytes, true_range) = part();
        let length = bytes.len();
        let rows = [
            ("the whole file, as if no range were asked for", vec![whole(), whole()]),
            (
                "another range",
                vec![Reply::partial(&true_range.replacen("bytes ", "bytes 1", 1), bytes.clone()), whole()],
            ),
            (
                "a range of a file of another length",
                vec![Reply::partial(&format!("{true_range}0"), bytes.clone()), whole()],
            ),
            ("a range of a file of unknown length", {
                let (range, _) = true_range.split_once('/').expect("a length");
                vec![Reply::partial(&format!("{range}/*"), bytes.clone()), whole()]
            }),
            (
                "a range of something else than bytes",
                vec![Reply::partial(&true_range.replace("bytes", "rows"), bytes.clone()), whole()],
            ),
            ("a range that does not say which", vec![Reply::partial("", bytes.clone()), whole()]),
            (
                "fewer bytes than it announces",
                vec![Reply::partial(&true_range, bytes.clone()).break_off_after(length / 2), whole()],
            ),
            ("fewer bytes than asked for", vec![Reply::partial(&true_range, &bytes[..length / 2]), whole()]),
            ("half a local header", vec![Reply::partial(&true_range, &bytes[..20]), whole()]),
            ("no bytes", vec![Reply::partial(&true_range, ""), whole()]),
            ("more bytes than asked for", vec![Reply::partial(&true_range, [&bytes, JUNK].concat()), whole()]),
            ("416", vec![Reply::status(416), whole()]),
            ("404", vec![Reply::status(404), whole()]),
        ];
        check(rows.map(|(name, replies)| {
            let (found, last) = answered(replies);
            assert_eq!(last.header("Range"), None, "{name}: at last the whole wheel");
            (name.to_owned(), found, None)
        }));
    }

    #[test]
    fn a_whole_wheel_after_a_failed_range_is_checked_like_any_other() {
        let other = |change: Change| {
            let mut zip = honest(DEFLATE);
            change(&mut zip);
            Reply::ok(zip.bytes())
        };
        let altered: Change = |zip| zip.member("norm.so").data[10] ^= 1;
        let longer: Change = |zip| zip.trailing = JUNK.to_vec();
        check([
            ("a server without ranges and with another wheel".to_owned(), answered([other(altered)]).0, Some("sha256")),
            ("a server with a longer wheel".to_owned(), answered([other(longer)]).0, Some("bytes")),
            (
                "a server with ranges and a longer wheel".to_owned(),
                answered([other(longer).with_ranges()]).0,
                Some("bytes"),
            ),
        ]);
    }

    /// Members that are locked without their places: the central directory comes by ranges first.
    #[test]
    fn directories_that_lie_are_refused() {
        let rows: [(&str, Change, Option<&str>); 7] = [
            ("none", |_| {}, None),
            (
                "a member in the directory",
                |zip| zip.member("norm.so").central().offset = Some(zip.directory()),
                Some("not its own"),
            ),
            (
                "a member past the end",
                |zip| zip.member("norm.so").central().offset = Some(1 << 30),
                Some("not its own"),
            ),
            ("a member in another's place", |zip| zip.member("norm.so").central().offset = Some(0), Some("norm.so")),
            (
                "a size beyond the next member",
                |zip| zip.member("norm.so").both(|h| h.compressed += 1000),
                Some("norm.so"),
            ),
            ("an entry too few", |zip| zip.end.entries = Some(4), Some("has 5 entries, and says 4")),
            ("a comment", |zip| zip.end.comment = JUNK.to_vec(), Some("does not end with")),
        ];
        check(rows.map(|(name, change, word)| {
            let mut zip = honest(DEFLATE);
            change(&mut zip);
            let (server, pinned) = pinned_without_place(&zip);
            server.on("/a.whl", [Reply::ok(zip.bytes()).with_ranges()]);
            (name.to_owned(), verdict(&Machine::new(), pinned), word)
        }));
    }

    #[test]
    fn directories_that_cannot_be_had_lead_to_the_whole_wheel() {
        let mut other = honest(DEFLATE);
        other.end.entries = Some(4);
        let rows = [
            ("a server without ranges", whole()),
            ("a server whose ranges are of another wheel", Reply::ok(other.bytes()).with_ranges()),
            ("a server whose directory goes missing", Reply::status(404)),
        ];
        check(rows.map(|(name, reply)| {
            let (server, pinned) = pinned_without_place(&honest(DEFLATE));
            server.on("/a.whl", [reply, whole()]);
            (name.to_owned(), verdict(&Machine::new(), pinned), None)
        }));
    }

    /// Without the other members' local headers, that of the member itself is looked at all the same.
    #[test]
    fn local_headers_that_contradict_the_directory_are_refused() {
        let rows: [(&str, Change); 4] = [
            ("another name", |zip| zip.member("norm.so").local.name[0] = b'F'),
            ("another method", |zip| zip.member("norm.so").local.method = STORED),
            ("another CRC", |zip| zip.member("norm.so").local.crc32 ^= 1),
            ("another size", |zip| zip.member("norm.so").local.size += 1),
        ];
        check(rows.map(|(name, change)| {
            let (mut zip, mut out) = (good(DEFLATE), Vec::new());
            change(&mut zip);
            let mut wheel = Archive::open_remote(Cursor::new(zip.bytes()), "remote.whl").expect("a good directory");
            let copied = wheel.copy(&lock::Member::at(NORM), &mut out, "norm.so".as_ref());
            assert!(out.is_empty(), "{name}: nothing is read");
            (
                name.to_owned(),
                copied.map(|_| out).map_err(|fault| fault.to_string()),
                Some("contradicts the central directory"),
            )
        }));
    }
}
