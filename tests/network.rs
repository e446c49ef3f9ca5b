//! The network as a specification: which bytes are asked for, what is made of answers that are wrong, cut short or
//! refused, and where an index is looked for. No network beyond loopback; every test has its own machine and server.

#[path = "../build/mod.rs"]
mod vendoring;

mod support {
    #[cfg(target_os = "linux")]
    pub mod dropping;
    pub mod http;
    pub mod machine;
    pub mod wheels;
}

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use support::http::{Gate, Refusing, Reply, Request, Server};
use support::machine::{Machine, assert_says, bytes_of, files_under, pages};
use support::wheels::{self, GDN, NORM, Pin, Wheel, sha256};
use vendoring::env;
use vendoring::lock::{LOCAL_HEADER, Lock};
use vendoring::source::Source;

const OTHER: &str = "other/other.so";
const FEATURES: &[&str] = &["norm", "gdn-prefill"];
const NO_FILES: [&str; 0] = [];
/// The pause between two tries.
const PAUSE: Duration = Duration::from_millis(500);
/// The pauses between three tries.
const PAUSES: Duration = Duration::from_millis(2500);

/// Bytes that do not compress.
fn noise(seed: u32, length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length + 32);
    for block in 0u32.. {
        bytes.extend_from_slice(&sha256(&[seed.to_le_bytes(), block.to_le_bytes()].concat()).0);
        if bytes.len() >= length {
            break;
        }
    }
    bytes.truncate(length);
    bytes
}

/// A wheel whose two kernels lie before and after what no feature of these tests wants.
fn apart() -> Wheel {
    let mut wheel = Wheel::jit_cache();
    wheel.members = vec![(NORM, noise(1, 40_000)), (OTHER, noise(2, 600_000)), (GDN, noise(3, 30_000))];
    wheel.stored = OTHER;
    wheel
}

/// A wheel whose two kernels lie side by side, after something else.
fn adjacent() -> Wheel {
    let mut wheel = apart();
    wheel.members.swap(0, 1);
    wheel
}

const RELEASE: &str = "/release.whl";

/// A server that gives these answers in the wheel's place, and the lock that names it.
fn serving(pin: Pin, replies: impl IntoIterator<Item = Reply>) -> (Server, Lock) {
    let server = Server::start();
    server.on(RELEASE, replies);
    let lock = wheels::lock([&pin.url(server.url(RELEASE))]);
    (server, lock)
}

fn whole(wheel: &Wheel) -> Reply {
    Reply::ok(wheel.bytes())
}

fn ranges(server: &Server) -> Vec<Option<String>> {
    server.requests().iter().map(|request| request.header("Range").map(str::to_owned)).collect()
}

/// The range that brings these members, first to last.
fn range_of(wheel: &Wheel, first: &str, last: &str) -> Option<String> {
    let (first, last) = (wheel.place(first), wheel.place(last));
    Some(format!("bytes={}-{}", first.offset, last.offset + last.length - 1))
}

/// That both kernels were vendored, and are the wheel's.
#[track_caller]
fn vendored(machine: &Machine, lock: &Lock, wheel: &Wheel, source: Source) {
    let rows = machine.vendor(lock, FEATURES).expect("the members").rows;
    assert_eq!(rows.iter().map(|row| row.source).collect::<Vec<_>>(), [source, source]);
    are_the_wheels(machine, wheel);
}

#[track_caller]
fn are_the_wheels(machine: &Machine, wheel: &Wheel) {
    assert_eq!(files_under(&machine.lib_dir()), ["gdn_prefill_sm90.so", "norm.so"]);
    for (soname, path) in [("norm.so", NORM), ("gdn_prefill_sm90.so", GDN)] {
        assert!(fs::read(machine.lib_dir().join(soname)).expect("the library") == wheel.member(path), "{soname}");
    }
}

/// Where the cache keeps a member of this wheel, below its root.
fn kept(wheel: &Wheel, path: &str) -> String {
    let soname = path.rsplit('/').next().expect("a name");
    format!("members/{}/{soname}", sha256(wheel.member(path)))
}

mod members {
    use super::*;

    fn ranged(wheel: &Wheel) -> (Server, Lock) {
        serving(wheel.pin_with_places(), [whole(wheel).with_ranges()])
    }

    /// The members' data and local headers, and no more than two hundredths on top.
    #[track_caller]
    fn assert_frugal(server: &Server, wheel: &Wheel) {
        let needed = |path: &str| wheel.place(path).compressed + LOCAL_HEADER + path.len() as u64;
        let (sent, needed) = (server.sent() as u64, needed(NORM) + needed(GDN));
        assert!(sent * 100 <= needed * 102, "{sent} bytes came for {needed}");
    }

    #[test]
    fn come_by_one_range_each_and_nothing_else_is_asked_for() {
        let wheel = apart();
        let (server, lock) = ranged(&wheel);
        vendored(&Machine::new(), &lock, &wheel, Source::Network);
        assert_eq!(ranges(&server), [range_of(&wheel, NORM, NORM), range_of(&wheel, GDN, GDN)]);
        assert_frugal(&server, &wheel);
    }

    #[test]
    fn that_are_adjacent_come_by_one_range() {
        let wheel = adjacent();
        let (server, lock) = ranged(&wheel);
        vendored(&Machine::new(), &lock, &wheel, Source::Network);
        assert_eq!(ranges(&server), [range_of(&wheel, NORM, GDN)]);
        assert_frugal(&server, &wheel);
    }

    /// A member of this many bytes of name and data lies between: its local header has 30 more.
    fn with_between(name: &'static str, length: usize) -> (Wheel, u64) {
        let mut wheel = apart();
        wheel.members[1] = (name, noise(4, length));
        let gap = wheel.place(GDN).offset - wheel.place(NORM).offset - wheel.place(NORM).length;
        (wheel, gap)
    }

    #[test]
    fn that_are_64_bytes_apart_come_by_one_range() {
        let (wheel, gap) = with_between("a", 30);
        assert_eq!(gap, 64, "the fixture");
        let (server, lock) = ranged(&wheel);
        vendored(&Machine::new(), &lock, &wheel, Source::Network);
        assert_eq!(ranges(&server), [range_of(&wheel, NORM, GDN)]);
        assert_frugal(&server, &wheel);
    }

    #[test]
    fn that_are_65_bytes_apart_come_by_two() {
        let (wheel, gap) = with_between("a", 31);
        assert_eq!(gap, 65, "the fixture");
        let (server, lock) = ranged(&wheel);
        vendored(&Machine::new(), &lock, &wheel, Source::Network);
        assert_eq!(ranges(&server).len(), 2);
    }

    #[test]
    fn that_no_feature_wants_are_not_asked_for() {
        let wheel = apart();
        let (server, lock) = ranged(&wheel);
        assert_eq!(Machine::new().vendor(&lock, &["gdn-prefill"]).expect("the member").rows.len(), 1);
        assert_eq!(ranges(&server), [range_of(&wheel, GDN, GDN)]);
    }

    #[test]
    fn whose_places_are_not_locked_cost_one_range_more_for_the_directory() {
        let wheel = apart();
        let (server, lock) = serving(wheel.pin_with_digests(), [whole(&wheel).with_ranges()]);
        vendored(&Machine::new(), &lock, &wheel, Source::Network);
        let ranges = ranges(&server);
        assert_eq!(ranges[1..], [range_of(&wheel, NORM, NORM), range_of(&wheel, GDN, GDN)]);
        assert!(server.sent() < wheel.bytes().len() * 2 / 3, "{} bytes came", server.sent());
    }

    #[test]
    fn whose_places_are_not_locked_cost_two_ranges_more_for_a_large_directory() {
        let mut wheel = apart();
        let names = (0..3000).map(|i| &*format!("flashinfer_jit_cache/jit_cache/other/{i:016}.so").leak());
        wheel.members.extend(names.map(|name| (name, Vec::new())));
        let mut pin = wheel.pin_with_digests();
        pin.members.retain(|member| ["norm.so", "gdn_prefill_sm90.so"].contains(&member.soname.as_str()));
        let (server, lock) = serving(pin, [whole(&wheel).with_ranges()]);
        vendored(&Machine::new(), &lock, &wheel, Source::Network);
        let ranges = ranges(&server);
        assert_eq!(ranges.len(), 4, "{ranges:?}");
        assert_eq!(ranges[2..], [range_of(&wheel, NORM, NORM), range_of(&wheel, GDN, GDN)]);
    }

    #[test]
    fn of_another_digest_are_refused_and_leave_nothing() {
        let wheel = apart();
        let mut pin = wheel.pin_with_places();
        let (found, locked) = (sha256(wheel.member(NORM)).to_string(), "ab".repeat(32));
        pin.members[0].sha256 = Some(locked.clone());
        let (server, lock) = serving(pin, [whole(&wheel).with_ranges()]);
        let machine = Machine::new();
        let fault = machine.vendor(&lock, FEATURES).err().expect("another digest");
        assert!(!fault.is_unavailable(), "other bytes are no reason to look elsewhere");
        assert_says(fault.to_string(), &[NORM, &found, &locked]);
        assert_eq!(files_under(&machine.cache()), NO_FILES);
        assert_eq!(files_under(&machine.lib_dir()), NO_FILES);
        assert_eq!(server.requests().len(), 1);
    }

    #[test]
    fn that_were_changed_on_the_server_are_refused_and_leave_nothing() {
        let wheel = apart();
        let place = wheel.place(NORM);
        let mut bytes = wheel.bytes();
        bytes[(place.offset + place.length - 1000) as usize] ^= 1;
        let (_server, lock) = serving(wheel.pin_with_places(), [Reply::ok(bytes).with_ranges()]);
        let machine = Machine::new();
        let fault = machine.vendor(&lock, FEATURES).err().expect("other bytes");
        assert!(!fault.is_unavailable(), "{fault}");
        assert_says(fault.to_string(), &[NORM, &wheel.file()]);
        assert_eq!(files_under(&machine.cache()), NO_FILES);
    }

    /// Answers to a range request that are none, and how many requests are made before the wheel as a whole is asked
    /// for.
    fn no_answers_to_a_range(wheel: &Wheel) -> Vec<(&'static str, Reply, usize)> {
        let (bytes, place) = (wheel.bytes(), wheel.place(NORM));
        let (first, end, size) = (place.offset as usize, (place.offset + place.length) as usize, bytes.len());
        let (last, part) = (end - 1, &bytes[first..end]);
        let good = format!("bytes {first}-{last}/{size}");
        vec![
            ("the whole file", Reply::ok(bytes.clone()), 1),
            ("no Content-Range", Reply::ok(part).with_status(206), 1),
            ("the status of a whole file", Reply::ok(part).header("Content-Range", &good), 1),
            ("a malformed one", Reply::partial("bytes of it", part), 1),
            ("another start", Reply::partial(&format!("bytes {}-{last}/{size}", first + 1), part), 1),
            ("another end", Reply::partial(&format!("bytes {first}-{end}/{size}"), part), 1),
            ("another length of the file", Reply::partial(&format!("bytes {first}-{last}/{}", size + 1), part), 1),
            ("no length of the file", Reply::partial(&format!("bytes {first}-{last}/*"), part), 1),
            ("another length of the part", Reply::partial(&good, &part[..part.len() - 1]), 1),
            ("compressed", Reply::partial(&good, part).header("Content-Encoding", "gzip"), 1),
            ("416", Reply::status(416), 1),
            ("404", Reply::status(404), 1),
            // What is missing is asked for once more, and this is no answer to that.
            ("a part cut short", Reply::partial(&good, &part[..1000]).without_length(), 2),
        ]
    }

    #[test]
    fn of_a_server_that_does_not_serve_ranges_come_with_the_whole_wheel() {
        let wheel = apart();
        for (name, reply, tries) in no_answers_to_a_range(&wheel) {
            let mut replies = vec![reply; tries];
            replies.push(whole(&wheel));
            let (server, lock) = serving(wheel.pin_with_places(), replies);
            vendored(&Machine::new(), &lock, &wheel, Source::Network);
            let ranges = ranges(&server);
            assert_eq!(ranges.len(), tries + 1, "{name}: {ranges:?}");
            assert_eq!(ranges[0], range_of(&wheel, NORM, NORM), "{name}");
            assert_eq!(ranges[tries], None, "{name}");
        }
    }

    #[test]
    fn of_a_server_that_serves_neither_ranges_nor_the_pinned_wheel_are_refused() {
        let wheel = apart();
        for (name, reply, tries) in no_answers_to_a_range(&wheel) {
            let mut replies = vec![reply; tries];
            replies.push(whole(&wheel.clone().rebuilt()).without_length());
            let (_server, lock) = serving(wheel.pin_with_places(), replies);
            let machine = Machine::new();
            let fault = machine.vendor(&lock, FEATURES).err().expect(name);
            assert!(!fault.is_unavailable(), "{name}: {fault}");
            assert_eq!(files_under(&machine.cache()), NO_FILES, "{name}");
            assert_eq!(files_under(&machine.lib_dir()), NO_FILES, "{name}");
        }
    }

    #[test]
    fn of_a_wheel_of_another_length_are_refused() {
        let wheel = apart();
        let mut longer = wheel.bytes();
        longer.push(0);
        let parts = [format!("{} bytes long", longer.len()), format!("expected {}", longer.len() - 1)];
        let (server, lock) = serving(wheel.pin_with_places(), [Reply::ok(longer).with_ranges()]);
        let machine = Machine::new();
        let fault = machine.vendor(&lock, FEATURES).err().expect("another length").to_string();
        assert_says(fault, &[&server.url(RELEASE), &parts[0], &parts[1]]);
        assert_eq!(files_under(&machine.cache()), NO_FILES);
    }

    /// A server whose every redirect leads to a signed address that serves one request.
    fn signing(wheel: &Wheel, answers: impl IntoIterator<Item = Reply>) -> (Server, Lock) {
        let (server, lock) = serving(wheel.pin_with_places(), []);
        let mut redirects = Vec::new();
        for (i, answer) in answers.into_iter().enumerate() {
            let path = format!("/signed/{i}");
            server.on(&path, [answer, Reply::status(403)]);
            redirects.push(Reply::redirect(&path));
        }
        server.on(RELEASE, redirects);
        (server, lock)
    }

    #[test]
    fn behind_a_redirect_that_expires_are_asked_for_at_the_address_itself() {
        let wheel = apart();
        let (server, lock) = signing(&wheel, vec![whole(&wheel).with_ranges(); 2]);
        vendored(&Machine::new(), &lock, &wheel, Source::Network);
        assert_eq!(server.paths(), [RELEASE, "/signed/0", RELEASE, "/signed/1"]);
    }

    #[test]
    fn whose_transfer_breaks_off_are_continued_at_the_address_itself() {
        let wheel = adjacent();
        let reply = || whole(&wheel).with_ranges();
        let (server, lock) = signing(&wheel, [reply().break_off_after(50_000), reply()]);
        vendored(&Machine::new(), &lock, &wheel, Source::Network);
        assert_eq!(server.paths(), [RELEASE, "/signed/0", RELEASE, "/signed/1"]);
        let rest = format!("bytes={}-", wheel.place(NORM).offset + 50_000);
        assert!(ranges(&server)[3].as_ref().is_some_and(|range| range.starts_with(&rest)), "{:?}", ranges(&server));
        assert_frugal(&server, &wheel);
    }

    #[test]
    fn whose_transfer_breaks_off_time_and_again_are_continued_as_long_as_more_comes() {
        let wheel = adjacent();
        let whole = whole(&wheel).with_ranges();
        let cut = whole.clone().break_off_after(16_000);
        let (server, lock) = serving(wheel.pin_with_places(), [cut.clone(), cut.clone(), cut.clone(), cut, whole]);
        vendored(&Machine::new(), &lock, &wheel, Source::Network);
        assert_eq!(server.requests().len(), 5);
        assert_frugal(&server, &wheel);
    }

    /// That a transfer failed is no proof of bad bytes.
    #[test]
    fn whose_transfer_always_breaks_off_come_with_the_whole_wheel() {
        let wheel = adjacent();
        let cut = |n| whole(&wheel).with_ranges().break_off_after(n);
        let (server, lock) = serving(wheel.pin_with_places(), [cut(9000), cut(0), cut(0), whole(&wheel)]);
        vendored(&Machine::new(), &lock, &wheel, Source::Network);
        assert_eq!(ranges(&server)[3], None);
    }

    #[test]
    fn are_kept_and_need_no_request_the_next_time() {
        let wheel = apart();
        let (server, lock) = ranged(&wheel);
        let machine = Machine::new();
        vendored(&machine, &lock, &wheel, Source::Network);
        let mut both = [kept(&wheel, NORM), kept(&wheel, GDN)];
        both.sort();
        assert_eq!(files_under(&machine.cache()), both);
        let requests = server.requests().len();
        vendored(&machine, &lock, &wheel, Source::Cache);
        assert_eq!(server.requests().len(), requests);
    }

    #[test]
    fn that_were_kept_and_tampered_with_are_fetched_again() {
        let wheel = apart();
        let (server, lock) = ranged(&wheel);
        let machine = Machine::new();
        vendored(&machine, &lock, &wheel, Source::Network);
        let tampered = machine.place(machine.cache().join(kept(&wheel, NORM)), "other bytes");
        let requests = server.requests().len();
        vendored(&machine, &lock, &wheel, Source::Network);
        assert!(server.requests().len() > requests);
        assert_eq!(sha256(&fs::read(tampered).expect("the member")), sha256(wheel.member(NORM)));
    }

    #[test]
    fn of_a_whole_wheel_that_was_fetched_are_kept_too() {
        let wheel = apart();
        let (server, lock) = serving(wheel.pin_with_places(), [whole(&wheel)]);
        let machine = Machine::new();
        vendored(&machine, &lock, &wheel, Source::Network);
        fs::remove_file(machine.cached(&lock.wheels[0])).expect("the wheel, in the cache");
        let requests = server.requests().len();
        vendored(&machine, &lock, &wheel, Source::Cache);
        assert_eq!(server.requests().len(), requests);
    }

    #[test]
    fn of_a_wheel_of_unknown_size_come_with_the_whole_wheel() {
        let wheel = apart();
        let mut pin = wheel.pin_with_places();
        pin.size = None;
        let (server, lock) = serving(pin, [whole(&wheel).with_ranges()]);
        vendored(&Machine::new(), &lock, &wheel, Source::Network);
        assert_eq!(ranges(&server), [None]);
    }
}

mod a_whole_wheel {
    use super::*;

    const TAG: &str = "\"one\"";

    fn tagged(wheel: &Wheel, tag: &str) -> Reply {
        whole(wheel).with_ranges().header("ETag", tag)
    }

    /// What is served, and what comes of it.
    #[track_caller]
    fn fetched(replies: impl IntoIterator<Item = Reply>) -> Server {
        let (wheel, machine) = (apart(), Machine::new());
        let (server, lock) = serving(wheel.pin(), replies);
        let found = machine.find(&lock.wheels[0]).expect("the wheel");
        assert_eq!(found.source, Source::Network);
        assert!(bytes_of(&found) == wheel.bytes());
        assert_eq!(files_under(&machine.cache()).len(), 1);
        server
    }

    /// That it cannot be had, that nothing is left, and what is said.
    #[track_caller]
    fn refused(replies: impl IntoIterator<Item = Reply>, parts: &[&str]) -> Server {
        let machine = Machine::new();
        let (server, lock) = serving(apart().pin(), replies);
        let fault = machine.fault(&lock.wheels[0]);
        assert_says(&fault, &[&server.url(RELEASE)]);
        assert_says(&fault, parts);
        assert_eq!(files_under(&machine.cache()), NO_FILES);
        server
    }

    fn if_ranges(requests: &[Request]) -> Vec<Option<&str>> {
        requests.iter().map(|request| request.header("If-Range")).collect()
    }

    #[test]
    fn that_breaks_off_is_continued() {
        let wheel = apart();
        let server = fetched([tagged(&wheel, TAG).break_off_after(400_000), tagged(&wheel, TAG)]);
        assert_eq!(ranges(&server), [None, Some("bytes=400000-".to_owned())]);
        assert_eq!(if_ranges(&server.requests()), [None, Some(TAG)]);
        assert_eq!(server.sent(), wheel.bytes().len(), "bytes on the wire");
    }

    #[test]
    fn that_breaks_off_time_and_again_is_continued_as_long_as_more_comes() {
        let wheel = apart();
        let cut = tagged(&wheel, TAG).break_off_after(150_000);
        let server = fetched([cut.clone(), cut.clone(), cut.clone(), cut, tagged(&wheel, TAG)]);
        assert_eq!(server.requests().len(), 5);
        assert_eq!(server.sent(), wheel.bytes().len(), "bytes on the wire");
    }

    /// A weak tag does not promise the same bytes: the length and the digest must do.
    #[test]
    fn with_a_weak_tag_is_continued_without_naming_it() {
        let wheel = apart();
        let tag = "W/\"one\"";
        let server = fetched([tagged(&wheel, tag).break_off_after(400_000), tagged(&wheel, tag)]);
        assert_eq!(if_ranges(&server.requests()), [None, None]);
        assert_eq!(server.sent(), wheel.bytes().len(), "bytes on the wire");
    }

    #[test]
    fn whose_tag_changed_is_begun_again() {
        let wheel = apart();
        let server = fetched([tagged(&wheel, TAG).break_off_after(400_000), tagged(&wheel, "\"two\"")]);
        assert_eq!(server.requests().len(), 2, "the server sent the whole");
        assert_eq!(server.sent(), wheel.bytes().len() + 400_000);
    }

    #[test]
    fn whose_rest_comes_with_another_tag_is_begun_again() {
        let (wheel, other) = (apart(), apart().rebuilt().bytes());
        let size = wheel.bytes().len();
        let content_range = format!("bytes 400000-{}/{size}", size - 1);
        let rest = Reply::partial(&content_range, &other[400_000..size]).header("ETag", "\"two\"");
        let server = fetched([tagged(&wheel, TAG).break_off_after(400_000), rest, tagged(&wheel, TAG)]);
        assert_eq!(ranges(&server), [None, Some("bytes=400000-".to_owned()), None]);
    }

    #[test]
    fn whose_rest_starts_elsewhere_or_is_of_another_length_is_begun_again() {
        let wheel = apart();
        let bytes = wheel.bytes();
        let (last, size) = (bytes.len() - 1, bytes.len());
        for range in [format!("bytes 399999-{last}/{size}"), format!("bytes 400000-{last}/{}", size + 1)] {
            let rest = Reply::partial(&range, &bytes[400_000..]).header("ETag", TAG);
            let server = fetched([tagged(&wheel, TAG).break_off_after(400_000), rest, tagged(&wheel, TAG)]);
            assert_eq!(ranges(&server)[2], None, "{range}");
        }
    }

    #[test]
    fn of_a_server_without_ranges_is_begun_again() {
        let wheel = apart();
        let server = fetched([whole(&wheel).break_off_after(400_000), whole(&wheel)]);
        assert_eq!(server.requests().len(), 2);
        assert_eq!(server.sent(), wheel.bytes().len() + 400_000);
    }

    #[test]
    fn whose_rest_is_refused_is_begun_again() {
        let wheel = apart();
        for status in [404, 416] {
            let server = fetched([whole(&wheel).break_off_after(400_000), Reply::status(status), whole(&wheel)]);
            assert_eq!(ranges(&server), [None, Some("bytes=400000-".to_owned()), None], "{status}");
        }
    }

    /// Without a tag nothing but the digest tells that the file was replaced midway.
    #[test]
    fn whose_rest_is_of_another_file_is_refused() {
        let (wheel, mut other) = (apart(), apart().bytes());
        other[500_000] ^= 1;
        let replies = [whole(&wheel).with_ranges().break_off_after(400_000), Reply::ok(other).with_ranges()];
        refused(replies, &["sha256", "not the pinned file"]);
    }

    #[test]
    fn that_always_breaks_off_at_the_same_byte_is_given_up() {
        let wheel = apart();
        let cut = |n| tagged(&wheel, TAG).break_off_after(n);
        let size = wheel.bytes().len().to_string();
        let (machine, server) = broken_off([cut(400_000), cut(0)], &["after 400000", &size, "try again"]);
        assert_eq!(server.requests().len(), 3);
        assert_eq!(part_of(&machine), wheel.bytes()[..400_000]);
    }

    /// That it cannot be had now, and what is said; what came is kept.
    #[track_caller]
    fn broken_off(replies: impl IntoIterator<Item = Reply>, parts: &[&str]) -> (Machine, Server) {
        let machine = Machine::new();
        let (server, lock) = serving(apart().pin(), replies);
        let fault = machine.find(&lock.wheels[0]).expect_err("no wheel");
        assert!(fault.is_unavailable(), "another source may have it: {fault}");
        assert_says(fault.to_string(), parts);
        (machine, server)
    }

    fn part(machine: &Machine) -> PathBuf {
        let wheel = apart();
        machine.cache().join(format!("wheels/{}/{}.part", sha256(&wheel.bytes()), wheel.file()))
    }

    fn part_of(machine: &Machine) -> Vec<u8> {
        fs::read(part(machine)).expect("the part")
    }

    /// What a machine gets of a server that has the whole, and what is left in its cache.
    #[track_caller]
    fn gets(machine: &Machine) -> Server {
        let wheel = apart();
        let (server, lock) = serving(wheel.pin(), [tagged(&wheel, TAG)]);
        assert!(bytes_of(&machine.find(&lock.wheels[0]).expect("the wheel")) == wheel.bytes());
        assert_eq!(files_under(&machine.cache()).len(), 1, "{:?}", files_under(&machine.cache()));
        server
    }

    /// As a server that is started again, or out of order for some seconds.
    #[test]
    fn that_breaks_off_before_an_outage_is_continued_after_it() {
        let wheel = apart();
        let (at, outage) = (wheel.bytes().len() * 9 / 10, std::iter::repeat_n(Reply::status(503), 4));
        let first = tagged(&wheel, TAG).break_off_after(at);
        let server = fetched(std::iter::once(first).chain(outage).chain([tagged(&wheel, TAG)]));
        assert!(ranges(&server)[1..].iter().all(|range| *range == Some(format!("bytes={at}-"))));
        assert_eq!(server.sent() - 4 * "scripted".len(), wheel.bytes().len(), "bytes on the wire");
    }

    #[test]
    fn that_breaks_off_is_continued_by_the_next_build() {
        let wheel = apart();
        let at = wheel.bytes().len() * 95 / 100;
        let replies = [tagged(&wheel, TAG).break_off_after(at), Reply::status(503)];
        let (machine, _server) = broken_off(replies, &["answered 503"]);
        let server = gets(&machine);
        assert_eq!(ranges(&server), [Some(format!("bytes={at}-"))]);
        assert_eq!(if_ranges(&server.requests()), [None], "what an earlier build was told is not known");
        assert!(server.sent() * 100 <= wheel.bytes().len() * 6, "{} bytes came again", server.sent());
    }

    #[test]
    fn that_breaks_off_is_continued_by_the_next_source() {
        let wheel = apart();
        let server = Server::start();
        server.on("/one.whl", [tagged(&wheel, TAG).break_off_after(400_000), Reply::status(503)]);
        server.on("/two.whl", [tagged(&wheel, "\"two\"")]);
        let pin = wheel.pin().url(server.url("/one.whl")).url(server.url("/two.whl"));
        assert!(bytes_of(&Machine::new().find(&pin.parsed()).expect("the wheel")) == wheel.bytes());
        assert_eq!(ranges(&server).last(), Some(&Some("bytes=400000-".to_owned())));
    }

    #[test]
    fn of_which_an_earlier_build_has_all_is_not_asked_for() {
        let machine = Machine::new();
        machine.place(part(&machine), apart().bytes());
        assert!(gets(&machine).requests().is_empty());
    }

    /// The digest decides.
    #[test]
    fn of_which_an_earlier_build_has_something_else_is_begun_again() {
        let whole = apart().bytes().len();
        for length in [1000, whole - 1, whole, whole + 1000] {
            let machine = Machine::new();
            machine.place(part(&machine), noise(7, length));
            let server = gets(&machine);
            assert_eq!(ranges(&server).last(), Some(&None), "{length}");
        }
    }

    #[test]
    fn of_which_an_earlier_build_has_a_part_may_be_had_from_a_server_without_ranges() {
        let (machine, wheel) = (Machine::new(), apart());
        machine.place(part(&machine), &wheel.bytes()[..1000]);
        let (_server, lock) = serving(wheel.pin(), [whole(&wheel)]);
        assert!(bytes_of(&machine.find(&lock.wheels[0]).expect("the wheel")) == wheel.bytes());
    }

    /// Whoever may write to the cache may not write elsewhere by way of this build.
    #[cfg(unix)]
    #[test]
    fn of_which_the_part_is_somebody_elses_file_leaves_that_alone() {
        for linked in [true, false] {
            let machine = Machine::new();
            let other = machine.place("other", "theirs");
            fs::create_dir_all(part(&machine).parent().expect("a folder")).expect("the folder");
            let made = match linked {
                true => std::os::unix::fs::symlink(&other, part(&machine)),
                false => fs::hard_link(&other, part(&machine)),
            };
            made.expect("another name");
            gets(&machine);
            assert_eq!(fs::read_to_string(&other).expect("theirs"), "theirs", "a link: {linked}");
        }
    }

    #[test]
    fn of_a_server_that_wants_a_pause_is_asked_for_after_it() {
        for status in [429, 503] {
            let started = Instant::now();
            let server = fetched([Reply::status(status).header("Retry-After", "3"), whole(&apart())]);
            assert_eq!(server.requests().len(), 2);
            assert!(started.elapsed() >= Duration::from_secs(3), "{:?}", started.elapsed());
        }
    }

    #[test]
    fn of_a_server_that_wants_a_long_pause_is_not_waited_for() {
        let (started, reply) = (Instant::now(), Reply::status(429).header("Retry-After", "3600"));
        let server = refused([reply], &["answered 429", "3600 s", "try again later"]);
        assert_eq!(server.requests().len(), 1);
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    }

    #[test]
    fn that_comes_compressed_is_refused() {
        let server = refused([whole(&apart()).header("Content-Encoding", "gzip")], &["content-encoding gzip"]);
        assert_eq!(server.requests().len(), 1);
    }

    #[test]
    fn of_unknown_size_must_not_be_announced_larger_than_any_wheel() {
        let (wheel, machine) = (apart(), Machine::new());
        let mut pin = wheel.pin();
        pin.size = None;
        let (server, lock) = serving(pin, [whole(&wheel).announce(5 << 30)]);
        assert_says(machine.fault(&lock.wheels[0]), &[&server.url(RELEASE), "5368709120", "no wheel is longer"]);
        assert_eq!(server.requests().len(), 1);
        assert_eq!(files_under(&machine.cache()), NO_FILES);
    }

    #[test]
    fn of_a_server_at_fault_is_asked_for_three_times_with_pauses() {
        let started = Instant::now();
        let server = fetched([Reply::status(500), Reply::status(503), whole(&apart())]);
        assert_eq!(server.requests().len(), 3);
        assert!(started.elapsed() >= PAUSES, "{:?}", started.elapsed());
    }

    #[test]
    fn of_a_server_that_refuses_connections_is_asked_for_once_more() {
        let (refusing, started) = (Refusing::start(), Instant::now());
        let url = format!("http://{}/a.whl", refusing.authority());
        let fault = Machine::new().fault(&apart().pin().url(url.clone()).parsed());
        assert_says(fault, &[&url, "refused", "check the network"]);
        assert!((PAUSE..PAUSES).contains(&started.elapsed()), "{:?}", started.elapsed());
    }

    #[test]
    fn behind_a_redirect_that_expires_is_continued_at_the_address_itself() {
        let wheel = apart();
        let (server, lock) = serving(wheel.pin(), ["/signed/0", "/signed/1"].map(Reply::redirect));
        server.on("/signed/0", [tagged(&wheel, TAG).break_off_after(400_000), Reply::status(403)]);
        server.on("/signed/1", [tagged(&wheel, TAG), Reply::status(403)]);
        let found = Machine::new().find(&lock.wheels[0]).expect("the wheel");
        assert!(bytes_of(&found) == wheel.bytes());
        assert_eq!(server.paths(), [RELEASE, "/signed/0", RELEASE, "/signed/1"]);
        assert_eq!(server.sent(), wheel.bytes().len(), "bytes on the wire");
    }
}

mod an_answer {
    use super::*;

    #[test]
    fn that_is_no_file_is_named_by_its_address_with_a_remedy_for_each_status() {
        let cases = [
            (Reply::status(301).header("Location", RELEASE), 9, ["too many redirects", "correct the address"]),
            (Reply::status(301), 1, ["missing a location header", "correct the address"]),
            (Reply::status(401), 1, ["answered 401", "give the credentials"]),
            (Reply::status(403), 1, ["answered 403", "give the credentials"]),
            (Reply::status(404), 1, ["answered 404", "the address or the mirror is wrong"]),
            (Reply::status(407), 1, ["answered 407", "put them into the proxy variable"]),
            (Reply::status(410), 1, ["answered 410", "the address or the mirror is wrong"]),
            (Reply::status(416), 1, ["answered 416", "shorter than the pinned one"]),
            (Reply::status(418), 1, ["answered 418", "makes no sense here"]),
            (Reply::status(408), 3, ["answered 408", "try again later"]),
            (Reply::status(425), 3, ["answered 425", "try again later"]),
            (Reply::status(429), 3, ["answered 429", "try again later"]),
            (Reply::status(451), 1, ["answered 451", "use a mirror"]),
            (Reply::status(500), 3, ["answered 500", "try again later"]),
            (Reply::status(503), 3, ["answered 503", "try again later"]),
        ];
        std::thread::scope(|scope| {
            for (reply, requests, parts) in cases {
                scope.spawn(move || {
                    let (server, lock) = serving(Wheel::jit_cache().pin(), [reply]);
                    let fault = Machine::new().fault(&lock.wheels[0]);
                    assert_says(&fault, &[&server.url(RELEASE)]);
                    assert_says(&fault, &parts);
                    assert_eq!(server.requests().len(), requests, "{fault}");
                });
            }
        });
    }
}

/// Who does not answer is waited for, and then no more.
mod a_host {
    use super::*;
    #[cfg(target_os = "linux")]
    use support::dropping::Dropping;

    const WAIT: Duration = Duration::from_secs(30);

    #[test]
    fn that_refuses_connections_is_not_asked_for_the_next_file() {
        let (refusing, started) = (Refusing::start(), Instant::now());
        let url = |name: &str| format!("http://{}/{name}.whl", refusing.authority());
        let pin = apart().pin().url(url("one")).url(url("two")).url(url("three"));
        let fault = Machine::new().fault(&pin.parsed());
        for name in ["one", "two", "three"] {
            assert_eq!(fault.matches(&url(name)).count(), 1, "{fault}");
        }
        assert_eq!(fault.matches("not asked again").count(), 2, "{fault}");
        // One pause, where each file's own would make three.
        assert!(started.elapsed() < 3 * PAUSE, "{:?}", started.elapsed());
    }

    /// Side by side, since each of them takes most of a minute.
    #[test]
    fn that_does_not_answer_is_waited_for_only_so_long() {
        std::thread::scope(|scope| {
            scope.spawn(that_accepts_and_stays_silent_gives_way_to_the_next_source);
            scope.spawn(that_falls_silent_midway_gives_way_to_the_next_source_and_nothing_is_lost);
            #[cfg(target_os = "linux")]
            scope.spawn(that_drops_everything_is_waited_for_once_and_the_next_one_less);
        });
    }

    /// A wheel of this distribution, which no other wheel of these tests is, so that both fit into one lock.
    fn second() -> Wheel {
        Wheel { distribution: "apache_tvm_ffi", ..Wheel::jit_cache() }
    }

    fn that_accepts_and_stays_silent_gives_way_to_the_next_source() {
        let (silent, good, started) = (Server::start(), Server::start(), Instant::now());
        silent.on("/one.whl", [Reply::silence()]);
        silent.on("/two.whl", [Reply::silence()]);
        good.on("/one.whl", [whole(&apart()).with_ranges()]);
        good.on("/two.whl", [whole(&second())]);
        // By ranges and as a whole, one wheel and the next: nobody waits for that host a second time.
        let mut pins = [
            apart().pin_with_places().url(silent.url("/one.whl")).url(good.url("/one.whl")),
            second().pin().url(silent.url("/two.whl")).url(good.url("/two.whl")),
        ];
        // Two libraries of one name would be one file.
        pins[1].members.iter_mut().for_each(|member| member.soname.insert_str(0, "second-"));
        let lock = wheels::lock(&pins);
        let rows = Machine::new().vendor(&lock, FEATURES).expect("the members").rows;
        assert_eq!(rows.len(), 4);
        assert_eq!(silent.paths(), ["/one.whl", "/one.whl"], "once more, and no more");
        assert!(started.elapsed() <= WAIT + PAUSES, "{:?}", started.elapsed());
    }

    fn that_falls_silent_midway_gives_way_to_the_next_source_and_nothing_is_lost() {
        let (silent, good, started) = (Server::start(), Server::start(), Instant::now());
        let gate = Gate::default();
        silent.on(
            RELEASE,
            [whole(&apart()).with_ranges().break_off_after(400_000), whole(&apart()).with_ranges().behind(&gate)],
        );
        good.on(RELEASE, [whole(&apart()).with_ranges()]);
        let pin = apart().pin().url(silent.url(RELEASE)).url(good.url(RELEASE));
        assert!(bytes_of(&Machine::new().find(&pin.parsed()).expect("the wheel")) == apart().bytes());
        assert_eq!(ranges(&good), [Some("bytes=400000-".to_owned())]);
        assert!(started.elapsed() <= 2 * WAIT, "{:?}", started.elapsed());
        gate.open();
    }

    #[cfg(target_os = "linux")]
    fn that_drops_everything_is_waited_for_once_and_the_next_one_less() {
        let (hosts, started) = ([Dropping::start(), Dropping::start(), Dropping::start()], Instant::now());
        let url = |i: usize, name: &str| format!("http://{}/{name}.whl", hosts[i].authority());
        let mut pin = apart().pin_with_places();
        for name in ["one", "two"] {
            for i in 0..hosts.len() {
                pin = pin.url(url(i, name));
            }
        }
        let lock = wheels::lock([&pin]);
        let fault = Machine::new().vendor(&lock, FEATURES).err().expect("nowhere").to_string();
        assert!(started.elapsed() <= Duration::from_secs(35), "{:?}", started.elapsed());
        for i in 0..hosts.len() {
            for name in ["one", "two"] {
                assert_eq!(fault.matches(&url(i, name)).count(), 1, "{fault}");
            }
        }
        assert_eq!(fault.matches("nobody answered").count(), 6, "{fault}");
    }
}

mod what_a_transfer_says {
    use super::*;
    use vendoring::report::Meter;

    /// Its lines, for what is told at these seconds.
    fn lines(told: &[(u64, u64, Option<u64>)]) -> Vec<String> {
        let (start, mut out) = (Instant::now(), Vec::new());
        let mut meter = Meter::new(&mut out);
        told.iter().for_each(|&(second, done, total)| meter.tell(start + Duration::from_secs(second), done, total));
        String::from_utf8(out).expect("text").lines().map(str::to_owned).collect()
    }

    const GB: u64 = 1_000_000_000;

    #[test]
    fn is_how_far_it_is_and_how_long_it_will_take() {
        let told = [(0, 0, Some(2 * GB)), (10, GB / 10, Some(2 * GB))];
        assert_eq!(lines(&told), ["flashinfer-rs: 100.0 of 2000.0 MB (5 %), 10.0 MB/s, 190 s to go"]);
        let told = [(0, 0, None), (10, GB / 10, None)];
        assert_eq!(lines(&told), ["flashinfer-rs: 100.0 MB, 10.0 MB/s"]);
    }

    #[test]
    fn comes_every_five_seconds_and_not_at_the_end() {
        let told: Vec<_> = (0..=60).map(|second| (second, second * 1000, Some(60_000))).collect();
        assert_eq!(lines(&told).len(), 11);
        assert_eq!(lines(&[(0, 0, Some(10)), (1, 10, Some(10))]), NO_FILES);
    }

    #[test]
    fn of_one_that_was_continued_counts_what_came_since() {
        let told = [(0, GB, Some(2 * GB)), (10, GB + GB / 10, Some(2 * GB))];
        assert_eq!(lines(&told), ["flashinfer-rs: 1100.0 of 2000.0 MB (55 %), 10.0 MB/s, 90 s to go"]);
    }

    #[test]
    fn begins_anew_with_the_next_one() {
        let told =
            [(0, 0, Some(10)), (4, 10, Some(10)), (8, 0, Some(GB)), (12, 1000, Some(GB)), (13, GB / 2, Some(GB))];
        assert_eq!(lines(&told).len(), 1);
    }
}

mod pip {
    use super::*;
    use vendoring::env::Env;

    const PURL: &str = "pkg:pypi/nvidia-cuda-runtime@13.0.96";
    const PAGE: &str = "/simple/nvidia-cuda-runtime/";
    const FILE: &str = "/files/a.whl";

    fn pin() -> Pin {
        Wheel::cudart().pin().purl(PURL)
    }

    fn page(rest_of_the_link: &str) -> Reply {
        let name = Wheel::cudart().file();
        Reply::ok(format!("<a href=\"/files/{name}\"{rest_of_the_link}>{name}</a>"))
    }

    /// An index with this page, and the wheel that it links to.
    fn index(page: Reply) -> Server {
        let server = Server::start();
        server.on(PAGE, [page]);
        server.on(&format!("/files/{}", Wheel::cudart().file()), [whole(&Wheel::cudart())]);
        server.on(FILE, [whole(&Wheel::cudart())]);
        server
    }

    fn configured(server: &Server) -> Machine {
        Machine::new().with("PIP_INDEX_URL", server.url("/simple"))
    }

    /// A machine with the wheel in a folder.
    fn with_folder() -> Machine {
        let machine = Machine::new();
        machine.place(format!("links/{}", Wheel::cudart().file()), Wheel::cudart().bytes());
        machine
    }

    #[track_caller]
    fn found(machine: &Machine) {
        let found = machine.find(&pin().parsed()).expect("the wheel");
        assert_eq!(found.source, Source::Network);
        assert_eq!(bytes_of(&found), Wheel::cudart().bytes());
        assert_eq!(found.path, machine.cached(&pin().parsed()));
    }

    #[test]
    fn no_index_without_links_leaves_nowhere_and_says_so() {
        let server = index(page(""));
        let machine = configured(&server).with("PIP_NO_INDEX", "1");
        let fault = machine.find(&pin().parsed()).expect_err("nowhere");
        assert!(fault.is_unavailable(), "an optional wheel may be missing: {fault}");
        assert_says(fault.to_string(), &[PURL, "PIP_NO_INDEX", "PIP_FIND_LINKS", "FLASHINFER_RS_CUDART_WHEEL"]);
        assert!(server.requests().is_empty());
    }

    #[test]
    fn no_index_that_is_off_leaves_the_index() {
        let server = index(page(""));
        found(&configured(&server).with("PIP_NO_INDEX", "0"));
    }

    /// A folder as pip's variable takes it, which is divided at blanks.
    fn spelt(folder: &Path) -> String {
        let path = folder.display().to_string();
        if path.contains(' ') { format!("file://{}", path.replace(' ', "%20")) } else { path }
    }

    #[test]
    fn find_links_names_a_folder() {
        let machine = with_folder();
        let links = spelt(&machine.path("links"));
        found(&machine.with("PIP_FIND_LINKS", links).with("PIP_NO_INDEX", "1"));
    }

    #[test]
    fn find_links_names_a_folder_by_a_file_address() {
        let machine = with_folder();
        let links = url::Url::from_file_path(machine.path("links")).expect("an address");
        found(&machine.with("PIP_FIND_LINKS", links.as_str()).with("PIP_NO_INDEX", "1"));
    }

    #[test]
    fn find_links_names_a_page() {
        let (links, index) = (index(Reply::status(404)), index(page("")));
        links.on("/links.html", [page("")]);
        found(&configured(&index).with("PIP_FIND_LINKS", links.url("/links.html")));
        assert!(index.requests().is_empty(), "links come before the index");
    }

    #[test]
    fn find_links_names_several_places_that_are_tried_in_turn() {
        let machine = with_folder();
        let server = Server::start();
        let links = format!("{} {} {}", spelt(&machine.path("empty")), server.url("/none"), "");
        let links = format!("{links} {}", spelt(&machine.path("links")));
        found(&machine.with("PIP_FIND_LINKS", links).with("PIP_NO_INDEX", "1"));
        assert_eq!(server.paths(), ["/none"]);
    }

    #[test]
    fn find_links_that_lack_the_file_leave_the_index() {
        let server = index(page(""));
        let machine = configured(&server);
        let empty = spelt(&machine.path("empty"));
        found(&machine.with("PIP_FIND_LINKS", empty));
    }

    #[test]
    fn find_links_with_other_bytes_under_the_name_are_passed_over() {
        let server = index(page(""));
        let machine = configured(&server);
        let other = Wheel::cudart().rebuilt().bytes();
        machine.place(format!("links/{}", Wheel::cudart().file()), &other);
        let links = spelt(&machine.path("links"));
        found(&machine.with("PIP_FIND_LINKS", links));
    }

    #[test]
    fn find_links_with_nothing_but_other_bytes_say_so_and_leave_nothing() {
        let machine = Machine::new();
        let other = Wheel::cudart().rebuilt().bytes();
        let path = machine.place(format!("links/{}", Wheel::cudart().file()), &other);
        let links = spelt(&machine.path("links"));
        let machine = machine.with("PIP_FIND_LINKS", links).with("PIP_NO_INDEX", "1");
        let fault = machine.fault(&pin().parsed());
        assert_says(fault, &[&path.display().to_string(), &sha256(&other).to_string(), "expected"]);
        assert_eq!(files_under(&machine.cache()), NO_FILES);
    }

    #[test]
    fn find_links_that_are_misspelt_do_not_tell_their_password() {
        for links in ["alice:hunter2@127.0.0.1/links", "http://alice:hunter2@[bad/", "ftp://alice:hunter2@127.0.0.1/"] {
            let fault = Machine::new().with("PIP_FIND_LINKS", links).fault(&pin().parsed());
            assert_says(&fault, &["PIP_FIND_LINKS", "correct it"]);
            assert!(!fault.contains("hunter2"), "{fault}");
        }
    }

    #[test]
    fn config_file_of_dev_null_means_none_at_all() {
        let machine = Machine::new();
        machine.place("home/.pip/pip.conf", "[global]\nindex-url = http://127.0.0.1:1/simple\n");
        let home = machine.path("home");
        let named = |config: &str| {
            let env = Env::fixed([("HOME", home.as_os_str()), ("PIP_CONFIG_FILE", config.as_ref())]);
            pages(PURL, &env).expect("a page").remove(0).1
        };
        assert_eq!(named("/dev/null"), "the default index");
        assert_eq!(named(""), format!("index-url in {}", home.join(".pip/pip.conf").display()));
    }

    /// What a build says of a wheel that this page links to.
    fn notes_of(page: Reply) -> String {
        let server = index(page);
        let machine = Machine::new().with("PIP_INDEX_URL", server.url_as("alice", "hunter2", "/simple"));
        let lock = wheels::lock([&pin()]);
        let outcome = machine.vendor(&lock, &["cudart"]).expect("a pinned wheel is used all the same");
        assert_eq!(outcome.rows.len(), 1);
        let notes = [outcome.warnings, outcome.told].concat().join("\n");
        assert!(!notes.contains("hunter2") && !notes.contains("alice"), "{notes}");
        notes
    }

    fn json(yanked: &str) -> Reply {
        let file = Wheel::cudart().file();
        let entry =
            format!(r#""filename": "{file}", "url": "{FILE}?token=hunter2", "hashes": {{}}, "yanked": {yanked}"#);
        let page = format!(r#"{{"files": [{{{entry}}}]}}"#);
        Reply::ok(page).header("Content-Type", "application/vnd.pypi.simple.v1+json")
    }

    /// The link of [`json`], which has a query.
    fn notes_of_json(yanked: &str) -> String {
        let server = index(json(yanked));
        server.on(&format!("{FILE}?token=hunter2"), [whole(&Wheel::cudart())]);
        let machine = configured(&server);
        let lock = wheels::lock([&pin()]);
        let outcome = machine.vendor(&lock, &["cudart"]).expect("the wheel");
        let notes = [outcome.warnings, outcome.told].concat().join("\n");
        assert!(!notes.contains("hunter2"), "{notes}");
        notes
    }

    #[test]
    fn files_that_were_withdrawn_are_used_with_a_note() {
        for (page, reason) in [(" data-yanked=\"broken build\"", ": broken build;"), (" data-yanked", "/; it is used")]
        {
            assert_says(notes_of(self::page(page)), &["was withdrawn from", reason, PAGE]);
        }
        for (yanked, reason) in [("\"broken build\"", ": broken build;"), ("true", "/; it is used")] {
            assert_says(notes_of_json(yanked), &["was withdrawn from", reason, PAGE]);
        }
    }

    #[test]
    fn files_that_were_not_withdrawn_are_used_without_one() {
        for notes in [notes_of(page("")), notes_of_json("false")] {
            assert!(!notes.contains("withdrawn"), "{notes}");
            assert_says(notes, &["fetched", "kept in", "MB in"]);
        }
    }

    #[test]
    fn index_with_a_password_does_not_tell_it_when_the_wheel_is_nowhere() {
        let server = index(Reply::status(404));
        let machine = Machine::new().with("PIP_INDEX_URL", server.url_as("alice", "hunter2", "/simple"));
        let machine = machine.with("PIP_FIND_LINKS", server.url_as("alice", "hunter2", "/links"));
        let fault = machine.fault(&pin().parsed());
        assert_says(&fault, &["PIP_INDEX_URL", "PIP_FIND_LINKS", "answered 404", env::WHEEL_DIR]);
        assert!(!fault.contains("hunter2") && !fault.contains("alice"), "{fault}");
    }
}
