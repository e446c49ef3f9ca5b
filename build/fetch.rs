//! HTTP: a whole file into a hashing writer, a small text, or single byte ranges.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use ureq::tls::{RootCerts, TlsConfig};
use url::Url;

use super::digest::{Digest, Hasher};
use super::error::{Error, Result, refuse};

/// To connect, and for the first byte of an answer.
const CONNECT: Duration = Duration::from_secs(30);
/// Without a byte for so long, a transfer has stalled.
const STALL: Duration = Duration::from_secs(60);
/// One request may take so long in all: 2 GB at 300 kB/s.
const TOTAL: Duration = Duration::from_secs(2 * 3600);
/// The pauses before the second and the third try; also how often a transfer may break off without any progress.
const BACK_OFF: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(2)];
/// What a file of unknown size may have at the most: twice the largest wheel known.
const UNKNOWN_SIZE: u64 = 4 << 30;
/// The end of a file that is fetched at once: the central directory of 2,000 members fits.
const TAIL: u64 = 1 << 18;
/// What one range request fetches elsewhere; an archive is read in small pieces that lie close together.
const BLOCK: u64 = 1 << 16;

pub struct Client {
    agent: ureq::Agent,
}

/// An answer whose status was fine (2xx).
struct Answer {
    status: u16,
    length: Option<u64>,
    content_type: String,
    content_range: Option<String>,
    etag: Option<String>,
    body: ureq::BodyReader<'static>,
}

impl Answer {
    /// The whole body, if it is no longer than `limit`.
    fn all(self, url: &str, limit: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let read = self.body.take(limit.saturating_add(1)).read_to_end(&mut bytes);
        read.map_err(|e| Error::Unavailable(format!("{} broke off: {e}", redacted(url))))?;
        if bytes.len() as u64 > limit {
            refuse!("{} is longer than {limit} bytes, too long for what it should be", redacted(url));
        }
        if let Some(length) = self.length.filter(|&length| length != bytes.len() as u64) {
            let fault = format!("{} ended after {} of {length} bytes; try again", redacted(url), bytes.len());
            return Err(Error::Unavailable(fault));
        }
        Ok(bytes)
    }
}

/// Why there is no answer, whether another try may help, and the status where a server gave one.
struct NoAnswer {
    fault: Error,
    passing: bool,
    status: Option<u16>,
}

/// What of a file is asked for.
#[derive(Clone, Copy)]
enum Part<'a> {
    Whole,
    /// Both inclusive.
    Range(u64, u64),
    /// What follows, provided that the file still has this tag.
    Rest(u64, Option<&'a str>),
}

/// Where a download goes.
pub trait Sink: Write {
    /// Forgets all that was written.
    fn restart(&mut self) -> io::Result<()>;
}

impl Sink for File {
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
    /// The platform's certificates and `SSL_CERT_FILE`, and the proxies of the environment, are honoured.
    pub fn new() -> Self {
        let tls = TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build();
        let config = ureq::Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            .timeout_resolve(Some(CONNECT))
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(STALL))
            .timeout_per_read(Some(STALL))
            .timeout_per_call(Some(TOTAL))
            .max_redirects(8)
            .user_agent(concat!("flashinfer-rs/", env!("CARGO_PKG_VERSION")))
            .build();
        Self { agent: config.new_agent() }
    }

    /// Downloads into `out` while hashing; what arrived is checked against `expected` before this answers Ok. A
    /// transfer that breaks off is continued where the server allows it, else begun again. `out_name` stands in the
    /// messages.
    pub fn download(
        &self,
        url: &str,
        expected: &Expected,
        out: &mut dyn Sink,
        out_name: &Path,
        progress: Progress<'_>,
    ) -> Result<u64> {
        let shown = redacted(url);
        let writing = |e: io::Error| Error::io("writing", out_name, &e);
        let (mut hasher, mut done, mut etag) = (Hasher::new(), 0u64, None::<String>);
        let mut total = expected.size;
        let (mut pauses, mut furthest) = (BACK_OFF.iter(), 0);
        let mut buffer = vec![0; 1 << 18];
        loop {
            // The address is asked again: where it redirects to may have expired.
            let part = if done == 0 { Part::Whole } else { Part::Rest(done, etag.as_deref()) };
            let mut answer = match self.get(url, None, part) {
                // The rest cannot be had; the whole can.
                Err(_) if done > 0 => self.get(url, None, Part::Whole)?,
                answer => answer?,
            };
            let continued = answer.status == 206 && continues(&answer, done, total, etag.as_deref());
            if done > 0 && !continued {
                out.restart().map_err(writing)?;
                (hasher, done) = (Hasher::new(), 0);
                if answer.status == 206 {
                    answer = self.get(url, None, Part::Whole)?;
                }
            }
            if !continued {
                if let (Some(want), Some(found)) = (expected.size, answer.length)
                    && want != found
                {
                    refuse!("{shown} is {found} bytes long, expected {want}: it is not the pinned file");
                }
                total = expected.size.or(answer.length);
                if let Some(length) = total.filter(|&length| length > UNKNOWN_SIZE && expected.size.is_none()) {
                    refuse!(
                        "{shown} is {length} bytes long, no wheel is longer than {UNKNOWN_SIZE}: correct the address"
                    );
                }
                etag = answer.etag.take();
            }
            let broke_off = loop {
                let n = match answer.body.read(&mut buffer) {
                    Ok(0) => break None,
                    Ok(n) => n,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                    Err(e) => break Some(e.to_string()),
                };
                done += n as u64;
                let limit = total.unwrap_or(UNKNOWN_SIZE);
                if done > limit {
                    refuse!("{shown} goes on after {limit} bytes: it is not the pinned file");
                }
                hasher.update(&buffer[..n]);
                out.write_all(&buffer[..n]).map_err(writing)?;
                progress(done, total);
            };
            let short = total.filter(|&total| done < total).map(|total| format!("ended after {done} of {total} bytes"));
            let Some(fault) = broke_off.map(|e| format!("broke off after {done} bytes: {e}")).or(short) else { break };
            // Progress is what was never there before: a server that always breaks off at the same byte makes none.
            if done > furthest {
                furthest = done;
                pauses = BACK_OFF.iter();
            }
            match pauses.next() {
                Some(pause) => std::thread::sleep(*pause),
                None => return Err(Error::Unavailable(format!("{shown} {fault}; try again"))),
            }
        }
        let found = hasher.finish();
        if found != expected.sha256 {
            refuse!("{shown} has sha256 {found}, expected {}: it is not the pinned file", expected.sha256);
        }
        Ok(done)
    }

    /// A text of at most `limit` bytes: its content type, and itself.
    pub fn text(&self, url: &str, accept: &str, limit: u64) -> Result<(String, String)> {
        let answer = self.get(url, Some(accept), Part::Whole)?;
        let content_type = answer.content_type.clone();
        Ok((content_type, String::from_utf8_lossy(&answer.all(url, limit)?).into_owned()))
    }

    /// A file of at most `limit` bytes, of which nothing else is known; `None` where the server says that there is none.
    pub fn unknown(&self, url: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        match self.try_often(url, None, Part::Whole) {
            Ok(answer) => answer.all(url, limit).map(Some),
            Err(NoAnswer { status: Some(404 | 410), .. }) => Ok(None),
            Err(NoAnswer { fault, .. }) => Err(fault),
        }
    }

    fn get(&self, url: &str, accept: Option<&str>, part: Part<'_>) -> Result<Answer> {
        self.try_often(url, accept, part).map_err(|no| no.fault)
    }

    fn try_often(&self, url: &str, accept: Option<&str>, part: Part<'_>) -> std::result::Result<Answer, NoAnswer> {
        let mut pauses = BACK_OFF.iter();
        loop {
            let no = match self.try_get(url, accept, part) {
                Ok(answer) => return Ok(answer),
                Err(no) if !no.passing => return Err(no),
                Err(no) => no,
            };
            match pauses.next() {
                Some(pause) => std::thread::sleep(*pause),
                None => return Err(no),
            }
        }
    }

    fn try_get(&self, url: &str, accept: Option<&str>, part: Part<'_>) -> std::result::Result<Answer, NoAnswer> {
        let shown = redacted(url);
        // A transfer that starts encrypted stays so through every redirect.
        let plain = url.get(..5).is_some_and(|scheme| scheme.eq_ignore_ascii_case("http:"));
        let request = self.agent.get(url).config().https_only(!plain).build();
        let mut request = request.header("Accept-Encoding", "identity");
        if let Some(accept) = accept {
            request = request.header("Accept", accept);
        }
        match part {
            Part::Whole => {}
            Part::Range(first, last) => request = request.header("Range", format!("bytes={first}-{last}")),
            Part::Rest(first, etag) => {
                request = request.header("Range", format!("bytes={first}-"));
                // A weak tag does not promise the same bytes.
                if let Some(etag) = etag.filter(|etag| !etag.starts_with("W/")) {
                    request = request.header("If-Range", etag);
                }
            }
        }
        let response = match request.call() {
            Ok(response) => response,
            Err(e) => {
                let (fault, passing) = no_answer(&e);
                return Err(NoAnswer { fault: Error::Unavailable(format!("{shown}: {fault}")), passing, status: None });
            }
        };
        let status = response.status().as_u16();
        if !(200..300).contains(&status) {
            let fault = Error::Unavailable(format!("{shown} answered {status}{}", advice(status)));
            return Err(NoAnswer { fault, passing: status >= 500, status: Some(status) });
        }
        let header = |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
        if let Some(encoding) = header("content-encoding").filter(|encoding| encoding != "identity") {
            let fault = format!("{shown} came with content-encoding {encoding}, which was not asked for");
            return Err(NoAnswer { fault: Error::Unavailable(fault), passing: false, status: None });
        }
        Ok(Answer {
            status,
            length: header("content-length").and_then(|text| text.parse().ok()),
            content_type: header("content-type").unwrap_or_default(),
            content_range: header("content-range"),
            etag: header("etag"),
            body: response.into_body().into_reader(),
        })
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
            let fault = match self.body.read(&mut out[..wanted]) {
                Ok(0) => "the connection was closed".to_owned(),
                Ok(n) => {
                    self.next += n as u64;
                    self.pauses = BACK_OFF.iter();
                    return Ok(n);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => e.to_string(),
            };
            let Some(pause) = self.pauses.next() else {
                let (shown, next) = (redacted(&self.url), self.next);
                return Err(io::Error::other(format!("{shown} broke off before byte {next}: {fault}; try again")));
            };
            std::thread::sleep(*pause);
            self.body = self.client.part(&self.url, self.next, self.last, self.size).map_err(io::Error::other)?;
        }
    }
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

/// An address for messages: without user, password and query, any of which may be a secret.
pub fn redacted(url: &str) -> String {
    match Url::parse(url) {
        // Any other scheme may be a user name that lost its `https://`.
        Ok(mut url) if matches!(url.scheme(), "http" | "https") => {
            let _ = url.set_username("");
            let _ = url.set_password(None);
            url.set_query(None);
            url.to_string()
        }
        _ => "(an address that is not http or https)".to_owned(),
    }
}

fn advice(status: u16) -> &'static str {
    match status {
        300..=399 => " (a redirect that leads nowhere: correct the address)",
        401 | 403 => " (not allowed: give the credentials that this server asks for)",
        404 | 410 => " (not there: the address or the mirror is wrong, or the file was removed)",
        407 => " (the proxy wants credentials: put them into the proxy variable)",
        408 | 425 | 429 => " (the server asks for patience: try again later)",
        416 => " (the server's file is shorter than the pinned one)",
        451 => " (withheld for legal reasons: use a mirror)",
        500.. => " (the server's fault: try again later)",
        _ => " (an answer that makes no sense here)",
    }
}

/// What to say where there was no answer at all, and whether another try may help.
fn no_answer(error: &ureq::Error) -> (String, bool) {
    use ureq::Error as E;
    match error {
        // Their own words repeat the address, with all that is secret in it.
        E::BadUri(_) => ("this cannot be asked: correct the address".to_owned(), false),
        E::RequireHttpsOnly(_) => ("a redirect from https down to http: correct the address".to_owned(), false),
        // rustls speaks of bad certificates by this kind.
        E::Io(e) if e.kind() == io::ErrorKind::InvalidData => (
            format!("{}: correct the address, or name this machine's certificates by SSL_CERT_FILE", chain(error)),
            false,
        ),
        E::Io(_) | E::Timeout(_) | E::HostNotFound | E::ConnectionFailed => {
            (format!("{}: check the network and the proxy variables, or try again later", chain(error)), true)
        }
        _ => (format!("{}: correct the address, or what stands between here and there", chain(error)), false),
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// A transfer's size and time as people read them.
pub fn summary(bytes: u64, since: Instant) -> String {
    format!("{:.1} MB in {:.1} s", bytes as f64 / 1e6, since.elapsed().as_secs_f64())
}
