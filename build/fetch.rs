//! HTTP: a whole file into a hashing writer, a small text, or single byte ranges.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use super::client::{Answer, BACK_OFF, Part};
pub use super::client::{Client, redacted};
use super::digest::{Digest, Hasher};
use super::error::{Error, Result, refuse};
use super::report::say;
use super::url::Url;

/// What a file of unknown size may have at the most: twice the largest wheel known.
const UNKNOWN_SIZE: u64 = 4 << 30;
/// The end of a file that is fetched at once: the central directory of 2,000 members fits.
const TAIL: u64 = 1 << 18;
/// What one range request fetches elsewhere; an archive is read in small pieces that lie close together.
const BLOCK: u64 = 1 << 16;

/// Where a download goes.
pub trait Sink: Write {
    /// What is there already, of an earlier download: how many bytes, and hashed. More goes after them.
    fn resume(&mut self) -> io::Result<(Hasher, u64)>;
    /// Forgets all that was written.
    fn restart(&mut self) -> io::Result<()>;
}

impl Sink for File {
    fn resume(&mut self) -> io::Result<(Hasher, u64)> {
        self.rewind()?;
        let mut hasher = Hasher::new();
        let mut buffer = vec![0; 1 << 18];
        let mut done = 0;
        loop {
            match self.read(&mut buffer) {
                Ok(0) => return Ok((hasher, done)),
                Ok(n) => {
                    hasher.update(&buffer[..n]);
                    done += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    fn restart(&mut self) -> io::Result<()> {
        self.set_len(0)?;
        self.rewind()
    }
}

/// What a download must turn out to be.
pub struct Expected {
    pub sha256: Digest,
    pub size: Option<u64>,
}

/// Told how many bytes came so far, and how many there are in all where that is known.
pub type Progress<'a> = &'a mut dyn FnMut(u64, Option<u64>);

impl Client {
    /// Downloads into `out` while hashing; what arrived is checked against `expected` before this answers Ok. What is in
    /// `out` already is continued, and so is a transfer that breaks off, where the server allows it; else all is begun
    /// again. `out_name` stands in the messages.
    pub fn download(
        &self,
        url: &str,
        expected: &Expected,
        out: &mut dyn Sink,
        out_name: &Path,
        progress: Progress<'_>,
    ) -> Result<u64> {
        let (hasher, done) = out.resume().map_err(|e| Error::io("reading", out_name, &e))?;
        let download = Download {
            client: self,
            url,
            shown: redacted(url),
            expected,
            out,
            out_name,
            hasher,
            done,
            inherited: done > 0,
            etag: None,
            total: expected.size,
            buffer: vec![0; 1 << 18],
        };
        if done > 0 {
            say(format_args!("going on after the {done} bytes that an earlier build got"));
        }
        download.finish(progress)
    }

    /// A text of at most `limit` bytes: where it came from in the end, its content type, and itself.
    pub fn text(&self, url: &str, accept: &str, limit: u64) -> Result<(Url, String, String)> {
        self.remember(url);
        let answer = self.get(url, Some(accept), Part::Whole)?;
        let (at, content_type) = (answer.url.clone(), answer.content_type.clone());
        Ok((at, content_type, String::from_utf8_lossy(&answer.all(url, limit)?).into_owned()))
    }

    /// A file of at most `limit` bytes, of which nothing else is known; `None` where the server says that there is none.
    pub fn unknown(&self, url: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        match self.try_often(url, None, Part::Whole) {
            Ok(answer) => answer.all(url, limit).map(Some),
            Err(no) if matches!(no.status, Some(404 | 410)) => Ok(None),
            Err(no) => Err(no.fault),
        }
    }

    /// The size of a file, from a range of one byte.
    pub fn size(&self, url: &str) -> Result<u64> {
        let answer = self.get(url, None, Part::Range(0, 0))?;
        let range = answer.content_range.as_deref().filter(|_| answer.status == 206);
        let size = range.and_then(|range| range.strip_prefix("bytes 0-0/")?.parse().ok());
        let fault =
            || Error::Unavailable(format!("{} does not answer ranges, so its size is not known", redacted(url)));
        size.ok_or_else(fault)
    }

    /// Bytes `first..=last` of a file of `size` bytes, to be read; what is not exactly that is no answer.
    pub fn range<'a>(&'a self, url: &str, first: u64, last: u64, size: u64) -> Result<RangeReader<'a>> {
        let body = self.part(url, first, last, size)?;
        Ok(RangeReader { client: self, url: url.to_owned(), next: first, last, size, body, pauses: BACK_OFF.iter() })
    }

    fn part(&self, url: &str, first: u64, last: u64, size: u64) -> Result<ureq::BodyReader<'static>> {
        let answer = self.get(url, None, Part::Range(first, last))?;
        let expected = format!("bytes {first}-{last}/{size}");
        let fits = answer.content_range.as_deref() == Some(expected.as_str());
        if answer.status != 206 || !fits || answer.length.is_some_and(|length| length != last - first + 1) {
            let found = answer.content_range.as_deref().unwrap_or("no Content-Range");
            let length = answer.length.map(|length| format!(" of {length} bytes")).unwrap_or_default();
            return Err(Error::Unavailable(format!(
                "{} does not answer ranges: {}{length} with {found}, expected 206 with {expected}",
                redacted(url),
                answer.status
            )));
        }
        Ok(answer.body)
    }
}

/// Reads one range. Where the transfer breaks off, what is left is asked for, at the address itself again: where that
/// redirects to may have expired. It ends at the range's end, and with an error before.
pub struct RangeReader<'a> {
    client: &'a Client,
    url: String,
    next: u64,
    last: u64,
    size: u64,
    body: ureq::BodyReader<'static>,
    pauses: std::slice::Iter<'static, Duration>,
}

impl Read for RangeReader<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let wanted = out.len().min((self.last + 1).saturating_sub(self.next) as usize);
        if wanted == 0 {
            return Ok(0);
        }
        loop {
            let mut tries = 1;
            let fault = match self.body.read(&mut out[..wanted]) {
                Ok(0) => "the connection was closed".to_owned(),
                Ok(n) => {
                    self.next += n as u64;
                    self.pauses = BACK_OFF.iter();
                    return Ok(n);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => {
                    tries = self::tries(&e);
                    e.to_string()
                }
            };
            let Some(pause) = self.pauses.nth(tries - 1) else {
                let (shown, next) = (redacted(&self.url), self.next);
                return Err(io::Error::other(format!("{shown} broke off before byte {next}: {fault}; try again")));
            };
            std::thread::sleep(*pause);
            self.body = self.client.part(&self.url, self.next, self.last, self.size).map_err(io::Error::other)?;
        }
    }
}

/// A download under way.
struct Download<'a> {
    client: &'a Client,
    url: &'a str,
    shown: String,
    expected: &'a Expected,
    out: &'a mut dyn Sink,
    out_name: &'a Path,
    hasher: Hasher,
    done: u64,
    /// Whether some of it came with an earlier build, of whatever that asked for.
    inherited: bool,
    etag: Option<String>,
    total: Option<u64>,
    buffer: Vec<u8>,
}

/// Why more did not come, and how much patience that costs.
type Break = (String, usize);

impl Download<'_> {
    /// Asks for more as long as more comes.
    fn finish(mut self, progress: Progress<'_>) -> Result<u64> {
        let (mut pauses, mut furthest) = (BACK_OFF.iter(), self.done);
        loop {
            // An earlier build may have got all and been stopped before it could say so.
            let complete = self.inherited && self.total == Some(self.done);
            let Some((fault, tries)) = (if complete { None } else { self.more(progress)? }) else {
                let found = std::mem::replace(&mut self.hasher, Hasher::new()).finish();
                if found == self.expected.sha256 {
                    return Ok(self.done);
                }
                if !self.inherited {
                    let (shown, expected) = (&self.shown, self.expected.sha256);
                    refuse!("{shown} has sha256 {found}, expected {expected}: it is not the pinned file");
                }
                self.restart()?;
                furthest = 0;
                continue;
            };
            // Progress is what was never there before: a server that always breaks off at the same byte makes none.
            if self.done > furthest {
                furthest = self.done;
                pauses = BACK_OFF.iter();
            }
            let Some(pause) = pauses.nth(tries - 1) else {
                return Err(Error::Unavailable(fault));
            };
            say(format_args!("{} bytes are there; going on in {:.1} s", self.done, pause.as_secs_f64()));
            std::thread::sleep(*pause);
        }
    }

    /// One request, and what comes of it; `None` where that was the end.
    fn more(&mut self, progress: &mut dyn FnMut(u64, Option<u64>)) -> Result<Option<Break>> {
        // The address is asked again each time: where it redirects to may have expired.
        let part = if self.done == 0 { Part::Whole } else { Part::Rest(self.done, self.etag.as_deref()) };
        let mut answer = match self.client.try_often(self.url, None, part) {
            // The rest cannot be had; the whole may be.
            Err(no) if self.done > 0 && no.is_refusal() => self.client.get(self.url, None, Part::Whole)?,
            Err(no) if self.done > 0 && no.is_passing() => return Ok(Some((no.fault.message().to_owned(), 1))),
            Err(no) => return Err(no.fault),
            Ok(answer) => answer,
        };
        let continued = answer.status == 206 && continues(&answer, self.done, self.total, self.etag.as_deref());
        if self.done > 0 && !continued {
            self.restart()?;
            if answer.status == 206 {
                answer = self.client.get(self.url, None, Part::Whole)?;
            }
        }
        if !continued {
            self.total = whole_size(&answer, self.expected, &self.shown)?;
            self.etag = answer.etag.take();
        }
        let limit = self.total.unwrap_or(UNKNOWN_SIZE);
        let (shown, writing) = (&self.shown, |e: io::Error| Error::io("writing", self.out_name, &e));
        loop {
            let n = match answer.body.read(&mut self.buffer) {
                Ok(0) => {
                    let short = self.total.filter(|&total| self.done < total);
                    let fault = |total| (format!("{shown} ended after {} of {total} bytes; try again", self.done), 1);
                    return Ok(short.map(fault));
                }
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => {
                    return Ok(Some((
                        format!("{shown} broke off after {} bytes: {e}; try again", self.done),
                        tries(&e),
                    )));
                }
            };
            self.done += n as u64;
            if self.done > limit {
                refuse!("{shown} goes on after {limit} bytes: it is not the pinned file");
            }
            self.hasher.update(&self.buffer[..n]);
            self.out.write_all(&self.buffer[..n]).map_err(writing)?;
            progress(self.done, self.total);
        }
    }

    fn restart(&mut self) -> Result<()> {
        self.out.restart().map_err(|e| Error::io("writing", self.out_name, &e))?;
        (self.hasher, self.done, self.inherited, self.etag) = (Hasher::new(), 0, false, None);
        Ok(())
    }
}

/// How long a whole file is, as far as anybody knows.
fn whole_size(answer: &Answer, expected: &Expected, shown: &str) -> Result<Option<u64>> {
    if let (Some(want), Some(found)) = (expected.size, answer.length)
        && want != found
    {
        refuse!("{shown} is {found} bytes long, expected {want}: it is not the pinned file");
    }
    let total = expected.size.or(answer.length);
    if let Some(length) = total.filter(|&length| length > UNKNOWN_SIZE && expected.size.is_none()) {
        refuse!("{shown} is {length} bytes long, no wheel is longer than {UNKNOWN_SIZE}: correct the address");
    }
    Ok(total)
}

/// How much patience a break costs: who was waited for in vain is asked once more only.
fn tries(error: &io::Error) -> usize {
    let stalled = error.kind() == io::ErrorKind::TimedOut || error.to_string().contains("timeout");
    if stalled { 2 } else { 1 }
}

/// Whether an answer is the rest of the same file from `done` on.
fn continues(answer: &Answer, done: u64, total: Option<u64>, etag: Option<&str>) -> bool {
    let range = answer.content_range.as_deref().and_then(|range| range.strip_prefix("bytes "));
    let Some((span, of)) = range.and_then(|range| range.split_once('/')) else { return false };
    let starts = span.split_once('-').is_some_and(|(first, _)| first.parse() == Ok(done));
    let same_length = total.is_none_or(|total| of.parse() == Ok(total));
    // Where either side names no tag, the length must do; the digest has the last word anyway.
    let same_tag = answer.etag.as_deref().zip(etag).is_none_or(|(a, b)| a == b);
    starts && same_length && same_tag
}

/// A remote file of known size, read by ranges: its end at once, where an archive has its directory, the rest in
/// blocks.
pub struct RemoteFile<'a> {
    client: &'a Client,
    url: String,
    size: u64,
    position: u64,
    /// By where they start.
    blocks: BTreeMap<u64, Vec<u8>>,
}

impl<'a> RemoteFile<'a> {
    pub fn new(client: &'a Client, url: String, size: u64) -> Self {
        Self { client, url, size, position: 0, blocks: BTreeMap::new() }
    }

    fn fetch(&mut self) -> Result<()> {
        let tail = self.size.saturating_sub(TAIL);
        let (first, last) = if self.position >= tail {
            (tail, self.size - 1)
        } else if self.position + TAIL >= tail {
            // The directory of a large archive starts here, and is read to its end.
            (self.position, tail - 1)
        } else {
            let first = self.position / BLOCK * BLOCK;
            (first, (first + BLOCK).min(tail) - 1)
        };
        let mut block = Vec::new();
        let read = self.client.range(&self.url, first, last, self.size)?.read_to_end(&mut block);
        read.map_err(|e| Error::Unavailable(e.to_string()))?;
        self.blocks.insert(first, block);
        Ok(())
    }
}

impl Read for RemoteFile<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.position >= self.size || out.is_empty() {
            return Ok(0);
        }
        loop {
            let block = self.blocks.range(..=self.position).next_back();
            let rest = block.and_then(|(start, block)| block.get((self.position - start) as usize..));
            match rest.filter(|rest| !rest.is_empty()) {
                Some(rest) => {
                    let n = rest.len().min(out.len());
                    out[..n].copy_from_slice(&rest[..n]);
                    self.position += n as u64;
                    return Ok(n);
                }
                None => self.fetch().map_err(io::Error::other)?,
            }
        }
    }
}

impl Seek for RemoteFile<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::End(offset) => self.size.checked_add_signed(offset),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
        };
        self.position = position.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(self.position)
    }
}

/// A transfer's size and time as people read them.
pub fn summary(bytes: u64, since: Instant) -> String {
    format!("{:.1} MB in {:.1} s", bytes as f64 / 1e6, since.elapsed().as_secs_f64())
}
