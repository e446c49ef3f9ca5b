//! HTTP: a whole file into a hashing writer, a small text, or single byte ranges as one seekable reader.

use std::collections::HashMap;
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
/// The pauses before the second and the third try.
const BACK_OFF: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(2)];
/// What a file of unknown size may have at the most: twice the largest wheel known.
const UNKNOWN_SIZE: u64 = 4 << 30;
/// What one range request fetches at the least; a central directory's entries lie close together.
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
    body: ureq::BodyReader<'static>,
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
            .max_redirects(8)
            .user_agent(concat!("flashinfer-rs/", env!("CARGO_PKG_VERSION")))
            .build();
        Self { agent: config.new_agent() }
    }

    /// Downloads into `out` while hashing; what arrives is checked against `expected` before this answers Ok.
    /// `out_name` stands in the messages.
    pub fn download(
        &self,
        url: &str,
        expected: &Expected,
        out: &mut dyn Write,
        out_name: &Path,
        progress: Progress<'_>,
    ) -> Result<u64> {
        let shown = redacted(url);
        let mut answer = self.get(url, None, None)?;
        if let (Some(want), Some(found)) = (expected.size, answer.length)
            && want != found
        {
            refuse!("{shown} is {found} bytes long, expected {want}: it is not the pinned file");
        }
        let total = expected.size.or(answer.length);
        let (mut hasher, mut done) = (Hasher::new(), 0);
        let mut buffer = vec![0; 1 << 18];
        loop {
            let n = match answer.body.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(Error::Unavailable(format!("{shown} broke off after {done} bytes: {e}"))),
            };
            done += n as u64;
            let limit = total.unwrap_or(UNKNOWN_SIZE);
            if done > limit {
                refuse!("{shown} goes on after {limit} bytes: it is not the pinned file");
            }
            hasher.update(&buffer[..n]);
            out.write_all(&buffer[..n]).map_err(|e| Error::io("writing", out_name, &e))?;
            progress(done, total);
        }
        if let Some(total) = total.filter(|&total| total != done) {
            return Err(Error::Unavailable(format!("{shown} ended after {done} of {total} bytes")));
        }
        let found = hasher.finish();
        if found != expected.sha256 {
            refuse!("{shown} has sha256 {found}, expected {}: it is not the pinned file", expected.sha256);
        }
        Ok(done)
    }

    /// A text of at most `limit` bytes: its content type, and itself.
    pub fn text(&self, url: &str, accept: &str, limit: u64) -> Result<(String, String)> {
        let answer = self.get(url, Some(accept), None)?;
        let mut text = Vec::new();
        let read = answer.body.take(limit + 1).read_to_end(&mut text);
        read.map_err(|e| Error::Unavailable(format!("{} broke off: {e}", redacted(url))))?;
        if text.len() as u64 > limit {
            refuse!("{} is longer than {limit} bytes, too long for what it should be", redacted(url));
        }
        Ok((answer.content_type, String::from_utf8_lossy(&text).into_owned()))
    }

    fn get(&self, url: &str, accept: Option<&str>, range: Option<(u64, u64)>) -> Result<Answer> {
        let mut pauses = BACK_OFF.iter();
        loop {
            let fault = match self.try_get(url, accept, range) {
                Ok(answer) => return Ok(answer),
                Err((fault, passing)) if !passing => return Err(fault),
                Err((fault, _)) => fault,
            };
            match pauses.next() {
                Some(pause) => std::thread::sleep(*pause),
                None => return Err(fault),
            }
        }
    }

    /// The error comes with whether another try may help.
    fn try_get(
        &self,
        url: &str,
        accept: Option<&str>,
        range: Option<(u64, u64)>,
    ) -> std::result::Result<Answer, (Error, bool)> {
        let shown = redacted(url);
        // A transfer that starts encrypted stays so through every redirect.
        let request = self.agent.get(url).config().https_only(url.starts_with("https:")).build();
        let mut request = request.header("Accept-Encoding", "identity");
        if let Some(accept) = accept {
            request = request.header("Accept", accept);
        }
        if let Some((first, last)) = range {
            request = request.header("Range", format!("bytes={first}-{last}"));
        }
        let response = match request.call() {
            Ok(response) => response,
            Err(e) => {
                let passing = !matches!(e, ureq::Error::BadUri(_) | ureq::Error::RequireHttpsOnly(_));
                return Err((Error::Unavailable(format!("{shown}: {}", chain(&e))), passing));
            }
        };
        let status = response.status().as_u16();
        if !(200..300).contains(&status) {
            let fault = Error::Unavailable(format!("{shown} answered {status}{}", advice(status)));
            return Err((fault, status >= 500));
        }
        let header = |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
        if let Some(encoding) = header("content-encoding").filter(|encoding| encoding != "identity") {
            let fault = format!("{shown} came with content-encoding {encoding}, which was not asked for");
            return Err((Error::Unavailable(fault), false));
        }
        Ok(Answer {
            status,
            length: header("content-length").and_then(|text| text.parse().ok()),
            content_type: header("content-type").unwrap_or_default(),
            content_range: header("content-range"),
            body: response.into_body().into_reader(),
        })
    }

    /// Bytes `first..=last` of a file of `size` bytes, exactly those.
    pub fn range(&self, url: &str, first: u64, last: u64, size: u64) -> Result<Vec<u8>> {
        let shown = redacted(url);
        let answer = self.get(url, None, Some((first, last)))?;
        let expected = format!("bytes {first}-{last}/{size}");
        if answer.status != 206 || answer.content_range.as_deref() != Some(expected.as_str()) {
            let found = answer.content_range.as_deref().unwrap_or("no Content-Range");
            let status = answer.status;
            return Err(Error::Unavailable(format!(
                "{shown} does not answer ranges: {status} with {found}, expected 206 with {expected}"
            )));
        }
        let want = last - first + 1;
        let mut bytes = Vec::with_capacity(usize::try_from(want).unwrap_or(0).min(1 << 24));
        let read = answer.body.take(want + 1).read_to_end(&mut bytes);
        read.map_err(|e| Error::Unavailable(format!("{shown} broke off within {expected}: {e}")))?;
        if bytes.len() as u64 != want {
            return Err(Error::Unavailable(format!("{shown} sent {} bytes for {expected}", bytes.len())));
        }
        Ok(bytes)
    }
}

/// A remote file of known size, read by ranges.
pub struct RemoteFile<'a> {
    client: &'a Client,
    url: String,
    size: u64,
    position: u64,
    blocks: HashMap<u64, Vec<u8>>,
    /// Bytes that came over the wire.
    pub fetched: u64,
}

impl<'a> RemoteFile<'a> {
    pub fn new(client: &'a Client, url: String, size: u64) -> Self {
        Self { client, url, size, position: 0, blocks: HashMap::new(), fetched: 0 }
    }
}

impl Read for RemoteFile<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.position >= self.size || out.is_empty() {
            return Ok(0);
        }
        let start = self.position / BLOCK * BLOCK;
        if !self.blocks.contains_key(&start) {
            let last = (start + BLOCK).min(self.size) - 1;
            let block = self.client.range(&self.url, start, last, self.size).map_err(io::Error::other)?;
            self.fetched += block.len() as u64;
            self.blocks.insert(start, block);
        }
        let block = &self.blocks[&start];
        let rest = &block[(self.position - start) as usize..];
        let n = rest.len().min(out.len());
        out[..n].copy_from_slice(&rest[..n]);
        self.position += n as u64;
        Ok(n)
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
        401 | 403 => " (not allowed: give the credentials that this server asks for)",
        404 | 410 => " (not there)",
        407 => " (the proxy wants credentials)",
        408 | 425 | 429 => " (too many requests: try again later)",
        500.. => " (the server's fault: try again later)",
        _ => "",
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
