//! One HTTP request, until there is an answer: which proxy, certificates and credentials it goes with, where it is
//! redirected to, when it is tried again, and how long anybody is waited for.

use std::collections::{HashMap, HashSet};
use std::io::{self, Read};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ureq::tls::{PemItem, RootCerts, TlsConfig};

use super::credentials::{Login, Netrc, without};
use super::env::{Env, Named};
use super::error::{Error, Result, refuse};
use super::proxy::{Chosen, Proxies};
use super::report::say;
use super::url::Url;

/// To find a host's address.
const RESOLVE: Duration = Duration::from_secs(10);
/// To connect, by how many hosts were waited for in vain before: behind a firewall that drops everything the next is as
/// silent as the last.
const CONNECT: [Duration; 3] = [Duration::from_secs(15), Duration::from_secs(10), Duration::from_secs(5)];
/// For the first byte of an answer. Who is silent is asked twice.
const ANSWER: Duration = Duration::from_secs(15);
/// Without a byte for so long, a transfer has stalled.
const STALL: Duration = Duration::from_secs(20);
/// One request may take so long in all: 2 GB at 300 kB/s.
const TOTAL: Duration = Duration::from_secs(2 * 3600);
/// The pauses before the second and the third try; also how often a transfer may break off without any progress.
pub(super) const BACK_OFF: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(2)];
/// A failure that took longer than this is not worth another try at a host that never answered.
const AT_ONCE: Duration = Duration::from_secs(1);
/// The longest pause that a server may ask for.
const PATIENCE: Duration = Duration::from_secs(60);
const REDIRECTS: usize = 8;
/// The platform's variable for the file with the certificates to trust.
const FILE: &str = "SSL_CERT_FILE";

/// What a build asks with. Its clones for other settings share what is known of hosts.
pub struct Client {
    proxies: Proxies,
    certificates: Certificates,
    netrc: Arc<Result<Netrc>>,
    shared: Arc<Mutex<Shared>>,
    agents: Mutex<HashMap<Settings, ureq::Agent>>,
}

/// In what one agent differs from another.
#[derive(PartialEq, Eq, Hash)]
struct Settings {
    proxy: Option<String>,
    connect: Duration,
    /// Whether it knows whom to trust.
    encrypted: bool,
}

/// What is learnt while a build asks.
#[derive(Default)]
struct Shared {
    /// Configured addresses that have user and password.
    known: Vec<Url>,
    /// Hosts that answered.
    answered: HashSet<String>,
    /// Hosts that cannot be had, and why: nobody asks them again.
    lost: HashMap<String, String>,
    /// How many of those were waited for.
    waited: usize,
}

/// Whom to trust.
#[derive(Debug, Clone)]
enum Certificates {
    /// The platform, which reads what these variables name itself; that it is there is checked here.
    Platform(Vec<Named>),
    /// What this file holds.
    File(Named),
}

/// An answer whose status was fine (2xx).
pub(super) struct Answer {
    pub status: u16,
    /// Where it came from in the end, without credentials.
    pub url: Url,
    pub length: Option<u64>,
    pub content_type: String,
    pub content_range: Option<String>,
    pub etag: Option<String>,
    pub body: ureq::BodyReader<'static>,
}

impl Answer {
    /// The whole body, if it is no longer than `limit`.
    pub fn all(self, url: &str, limit: u64) -> Result<Vec<u8>> {
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

/// Why there is no answer, and the status where a server gave one.
pub(super) struct NoAnswer {
    pub fault: Error,
    pub status: Option<u16>,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Another try would end the same way.
    Lasting,
    /// Another try may help, after this pause where the server names one.
    Passing(Option<Duration>),
    /// Nobody there.
    Unreachable,
    /// The host was waited for as long as any is, to connect or for an answer.
    Silent { connected: bool },
}

impl NoAnswer {
    fn lasting(fault: String) -> Self {
        Self { fault: Error::Unavailable(fault), status: None, kind: Kind::Lasting }
    }

    /// Whether the server answered that this cannot be had, whoever asks however often.
    pub fn is_refusal(&self) -> bool {
        self.kind == Kind::Lasting && self.status.is_some_and(|status| (400..500).contains(&status))
    }

    /// Whether the same may work a little later.
    pub fn is_passing(&self) -> bool {
        matches!(self.kind, Kind::Passing(_) | Kind::Unreachable)
    }
}

/// What of a file is asked for.
#[derive(Clone, Copy)]
pub(super) enum Part<'a> {
    Whole,
    /// Both inclusive.
    Range(u64, u64),
    /// What follows, provided that the file still has this tag.
    Rest(u64, Option<&'a str>),
}

/// What a server said, whatever it was.
struct Said {
    response: ureq::http::Response<ureq::Body>,
    /// Whether it was not told who asks.
    anonymous: bool,
}

/// A failure, and the host that it is of.
type Failed = (String, NoAnswer);

/// One request of a chain of redirects.
struct Hop<'a> {
    /// The address that the chain began with.
    first: &'a Url,
    at: &'a Url,
    accept: Option<&'a str>,
    part: Part<'a>,
}

impl Client {
    /// With the proxies, the certificates and the netrc that the environment names.
    pub fn new(env: &Env) -> Self {
        let certificates = [FILE, "SSL_CERT_DIR"].into_iter().filter_map(|name| env.named(name)).collect();
        Self {
            proxies: Proxies::of(env),
            certificates: Certificates::Platform(certificates),
            netrc: Arc::new(Netrc::read(env)),
            shared: Arc::default(),
            agents: Mutex::default(),
        }
    }

    /// The same with other settings, where there are any.
    pub(super) fn with(&self, env: &Env, proxy: Option<Named>, certificates: Option<Named>) -> Self {
        Self {
            proxies: proxy.map_or_else(|| Proxies::of(env), Proxies::only),
            certificates: certificates.map_or_else(|| self.certificates.clone(), Certificates::File),
            netrc: Arc::clone(&self.netrc),
            shared: Arc::clone(&self.shared),
            agents: Mutex::default(),
        }
    }

    /// Gives the user and the password of this address, if it has any, to whatever else is asked of the same scheme, host
    /// and port.
    pub(super) fn remember(&self, url: &str) {
        if let Some(url) = Url::parse(url).ok().filter(|url| Login::of(url).is_some()) {
            self.shared().known.push(url);
        }
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        // What it holds is as good after a panic.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn get(&self, url: &str, accept: Option<&str>, part: Part<'_>) -> Result<Answer> {
        self.try_often(url, accept, part).map_err(|no| no.fault)
    }

    /// Asks until there is an answer, or no hope for one.
    pub(super) fn try_often(
        &self,
        url: &str,
        accept: Option<&str>,
        part: Part<'_>,
    ) -> std::result::Result<Answer, NoAnswer> {
        let (mut pauses, mut asked_twice) = (BACK_OFF.iter().copied(), false);
        loop {
            let started = Instant::now();
            let (host, no) = match self.try_get(url, accept, part) {
                Ok(answer) => return Ok(answer),
                Err(failed) => failed,
            };
            let known = self.shared().answered.contains(&host);
            let pause = match no.kind {
                Kind::Lasting => None,
                Kind::Passing(Some(wanted)) => pauses.next().map(|_| wanted),
                Kind::Passing(None) => pauses.next(),
                Kind::Unreachable if known => pauses.next(),
                Kind::Unreachable if asked_twice || started.elapsed() > AT_ONCE => None,
                Kind::Unreachable => pauses.next(),
                Kind::Silent { connected: true } if !asked_twice => Some(Duration::ZERO),
                Kind::Silent { .. } => None,
            };
            asked_twice = true;
            let Some(pause) = pause else {
                let silent = matches!(no.kind, Kind::Silent { .. });
                if silent || no.kind == Kind::Unreachable && !known {
                    let mut shared = self.shared();
                    shared.waited += usize::from(silent);
                    let reason = no.fault.message().split_once(": ").map_or("", |(_, reason)| reason);
                    shared.lost.insert(host, format!("{reason} (not asked again)"));
                }
                return Err(no);
            };
            let what = no.status.map_or("nothing came".to_owned(), |status| format!("the answer was {status}"));
            say(format_args!("{what}; asking again in {:.1} s", pause.as_secs_f64()));
            std::thread::sleep(pause);
        }
    }

    /// Asks once, and wherever that is redirected to.
    fn try_get(&self, url: &str, accept: Option<&str>, part: Part<'_>) -> std::result::Result<Answer, Failed> {
        let shown = redacted(url);
        let lasting = |why: &str| (String::new(), NoAnswer::lasting(format!("{shown}: {why}: correct the address")));
        let Ok(first) = Url::parse(url) else { return Err(lasting("this cannot be asked")) };
        let mut at = first.clone();
        for _ in 0..=REDIRECTS {
            if !matches!(at.scheme(), "http" | "https") || at.host_str().is_none_or(str::is_empty) {
                return Err(lasting("this cannot be asked"));
            }
            // A transfer that starts encrypted stays so through every redirect.
            if first.scheme() == "https" && at.scheme() == "http" {
                return Err(lasting("a redirect from https down to http"));
            }
            let said = self.ask_as_who_may(&Hop { first: &first, at: &at, accept, part }, &shown)?;
            let location = said.response.headers().get("location");
            let is_redirect = matches!(said.response.status().as_u16(), 301 | 302 | 303 | 307 | 308);
            match location.filter(|_| is_redirect).map(|to| at.join(&String::from_utf8_lossy(to.as_bytes()))) {
                Some(Ok(next)) => at = next,
                Some(Err(_)) => return Err(lasting("a redirect to what is no address")),
                None => return answer(said, &at, &shown).map_err(|no| (String::new(), no)),
            }
        }
        Err(lasting("too many redirects"))
    }

    /// Asks with what netrc has for the host, and where that does not help, without: it may be about something else there.
    fn ask_as_who_may(&self, hop: &Hop<'_>, shown: &str) -> std::result::Result<Said, Failed> {
        if let Some(login) = self.login(hop) {
            return self.ask(hop, Some(&login), shown);
        }
        let refused = |fault: &Error| (String::new(), NoAnswer::lasting(format!("{shown}: {fault}")));
        let netrc = self.netrc.as_ref().as_ref().map_err(refused)?;
        let Some(login) = netrc.login(hop.at.host_str().unwrap_or_default()) else {
            return self.ask(hop, None, shown);
        };
        let said = self.ask(hop, Some(&login), shown)?;
        match said.response.status().as_u16() {
            401 | 403 | 404 => self.ask(hop, None, shown),
            _ => Ok(said),
        }
    }

    /// User and password that were given with an address: this one, where its chain began, or a configured one of the same
    /// scheme, host and port, of which the one that has most of the path in common.
    fn login(&self, hop: &Hop<'_>) -> Option<Login> {
        let own = Login::of(hop.at);
        let chains = || Login::of(hop.first).filter(|_| hop.first.origin() == hop.at.origin());
        own.or_else(chains).or_else(|| {
            let shared = self.shared();
            let here = shared.known.iter().filter(|url| url.origin() == hop.at.origin());
            let common = |url: &&Url| url.path().bytes().zip(hop.at.path().bytes()).take_while(|(a, b)| a == b).count();
            Login::of(here.max_by_key(common)?)
        })
    }

    /// Asks one host, once.
    fn ask(&self, hop: &Hop<'_>, login: Option<&Login>, shown: &str) -> std::result::Result<Said, Failed> {
        let lasting = |fault: &dyn std::fmt::Display| (String::new(), NoAnswer::lasting(format!("{shown}: {fault}")));
        let proxy = self.proxies.choose(hop.at).map_err(|fault| lasting(&fault))?;
        let through = proxy.as_ref().map(|proxy| format!(", through the proxy {}", proxy.shown)).unwrap_or_default();
        let host = hop.at.origin().ascii_serialization() + &through;
        let waited = {
            let shared = self.shared();
            if let Some(reason) = shared.lost.get(&host) {
                return Err(lasting(reason));
            }
            shared.waited.min(CONNECT.len() - 1)
        };
        let agent = self.agent(proxy, CONNECT[waited], hop.at).map_err(|fault| lasting(&fault))?;
        let mut target = without(hop.at.clone());
        target.set_fragment(None);
        let mut request = agent.get(target.as_str()).header("Accept-Encoding", "identity");
        if let Some(login) = login {
            request = request.header("Authorization", login.header());
        }
        if let Some(accept) = hop.accept {
            request = request.header("Accept", accept);
        }
        match hop.part {
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
        match request.call() {
            Ok(response) => {
                self.shared().answered.insert(host);
                Ok(Said { response, anonymous: login.is_none() })
            }
            Err(e) => {
                let (what, kind, remedy) = self.no_answer(&e);
                let redirected = match hop.at.origin() == hop.first.origin() {
                    true => String::new(),
                    false => format!(", redirected to {}", hop.at.origin().ascii_serialization()),
                };
                let fault = Error::Unavailable(format!("{shown}: {what}{redirected}{through}: {remedy}"));
                Err((host, NoAnswer { fault, status: None, kind }))
            }
        }
    }

    /// What asks through this proxy.
    fn agent(&self, proxy: Option<Chosen>, connect: Duration, url: &Url) -> Result<ureq::Agent> {
        let mut agents = self.agents.lock().unwrap_or_else(PoisonError::into_inner);
        let encrypted = url.scheme() == "https" || proxy.as_ref().is_some_and(|chosen| chosen.is_encrypted());
        let key = Settings { proxy: proxy.as_ref().map(|chosen| chosen.shown.clone()), connect, encrypted };
        if let Some(agent) = agents.get(&key) {
            return Ok(agent.clone());
        }
        // Whoever asks for nothing secret needs no certificates.
        let roots = if encrypted { self.certificates.roots()? } else { RootCerts::PlatformVerifier };
        let config = ureq::Agent::config_builder()
            .tls_config(TlsConfig::builder().root_certs(roots).build())
            .proxy(proxy.map(|chosen| chosen.proxy))
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_resolve(Some(RESOLVE))
            .timeout_connect(Some(connect))
            .timeout_recv_response(Some(ANSWER))
            .timeout_per_read(Some(STALL))
            .timeout_per_call(Some(TOTAL))
            .user_agent(concat!("flashinfer-rs/", env!("CARGO_PKG_VERSION")))
            .build();
        Ok(agents.entry(key).or_insert(config.new_agent()).clone())
    }

    /// What is wrong where there was no answer at all, whether another try may help, and what may.
    fn no_answer(&self, error: &ureq::Error) -> (String, Kind, String) {
        use ureq::{Error as E, Timeout as T};
        let address = "correct the address, or what stands between here and there".to_owned();
        let network = "check the network and the proxy variables, or try again later".to_owned();
        match error {
            // Its own words repeat the address, with all that is secret in it.
            E::BadUri(_) => ("this cannot be asked".to_owned(), Kind::Lasting, "correct the address".to_owned()),
            // rustls speaks of bad certificates by this kind.
            E::Io(e) if e.kind() == io::ErrorKind::InvalidData => {
                let remedy = format!("correct the address, or {}", self.certificates.remedy());
                (chain(e), Kind::Lasting, remedy)
            }
            // The proxy did answer, and cannot reach the host either.
            E::ConnectProxyFailed(reason) if reason.contains("407") => {
                (chain(error), Kind::Lasting, "put the credentials that it wants into the proxy variable".to_owned())
            }
            E::Timeout(T::Resolve | T::Connect) => {
                let silent = format!("nobody answered ({})", chain(error));
                (silent, Kind::Silent { connected: false }, network)
            }
            E::Timeout(T::RecvResponse | T::PerRead) => {
                let silent = format!("connected, and nothing came for {} s", ANSWER.as_secs());
                (silent, Kind::Silent { connected: true }, network)
            }
            E::Io(e) if is_break(e) => (chain(e), Kind::Passing(None), network),
            E::Io(e) => (chain(e), Kind::Unreachable, network),
            E::HostNotFound | E::ConnectionFailed => (chain(error), Kind::Unreachable, network),
            E::Timeout(_) => (chain(error), Kind::Passing(None), network),
            _ => (chain(error), Kind::Lasting, address),
        }
    }
}

impl Certificates {
    fn roots(&self) -> Result<RootCerts> {
        let missing = |named: &Named, what: &str| {
            Error::Unavailable(format!(
                "{} names the certificates to trust, {}, and {what}: correct or unset it",
                named.from, named.value
            ))
        };
        match self {
            Self::Platform(named) => {
                for named in named {
                    // A directory may be a list of some.
                    let mut paths = named.value.split(':').map(Path::new);
                    let there = match named.from.as_str() {
                        FILE => Path::new(&named.value).is_file(),
                        _ => paths.any(Path::is_dir),
                    };
                    if !there {
                        return Err(missing(named, "nothing is there"));
                    }
                }
                Ok(RootCerts::PlatformVerifier)
            }
            Self::File(named) => {
                let pem = std::fs::read(&named.value).map_err(|e| missing(named, &e.to_string()))?;
                let certificates = ureq::tls::parse_pem(&pem).filter_map(|item| match item {
                    Ok(PemItem::Certificate(certificate)) => Some(certificate),
                    _ => None,
                });
                let certificates: Vec<_> = certificates.collect();
                if certificates.is_empty() {
                    return Err(missing(named, "there is no certificate in it"));
                }
                Ok(RootCerts::Specific(Arc::new(certificates)))
            }
        }
    }

    fn remedy(&self) -> String {
        match self {
            Self::File(named) => {
                format!("put this machine's certificates into {}, which {} names", named.value, named.from)
            }
            Self::Platform(named) => match named.first() {
                Some(named) => {
                    format!("put this machine's certificates into {}, which {} names", named.value, named.from)
                }
                None => format!("name this machine's certificates by {FILE}"),
            },
        }
    }
}

/// What a server said, if it is an answer.
fn answer(Said { response, anonymous }: Said, at: &Url, shown: &str) -> std::result::Result<Answer, NoAnswer> {
    let header = |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
    let status = response.status().as_u16();
    if !(200..300).contains(&status) {
        let wanted = header("retry-after").and_then(|text| text.trim().parse().ok()).map(Duration::from_secs);
        let (kind, later) = match (status, wanted) {
            (408 | 425 | 429 | 500.., Some(wanted)) if wanted > PATIENCE => {
                (Kind::Lasting, format!("; it wants to be left alone for {} s", wanted.as_secs()))
            }
            (408 | 425 | 429 | 500.., wanted) => (Kind::Passing(wanted), String::new()),
            _ => (Kind::Lasting, String::new()),
        };
        let fault = Error::Unavailable(format!("{shown} answered {status}{}{later}", advice(status, anonymous)));
        return Err(NoAnswer { fault, status: Some(status), kind });
    }
    if let Some(encoding) = header("content-encoding").filter(|encoding| encoding != "identity") {
        let fault = format!("{shown} came with content-encoding {encoding}, which was not asked for");
        return Err(NoAnswer::lasting(fault));
    }
    Ok(Answer {
        status,
        url: without(at.clone()),
        length: header("content-length").and_then(|text| text.parse().ok()),
        content_type: header("content-type").unwrap_or_default(),
        content_range: header("content-range"),
        etag: header("etag"),
        body: response.into_body().into_reader(),
    })
}

/// Whether a connection was there and broke.
fn is_break(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    matches!(
        error.kind(),
        Kind::ConnectionReset | Kind::ConnectionAborted | Kind::BrokenPipe | Kind::UnexpectedEof | Kind::Interrupted
    )
}

/// An address for messages: without user, password and query, any of which may be a secret.
pub fn redacted(url: &str) -> String {
    match Url::parse(url) {
        // Any other scheme may be a user name that lost its `https://`.
        Ok(url) if matches!(url.scheme(), "http" | "https" | "file") => {
            let mut url = without(url);
            url.set_query(None);
            url.to_string()
        }
        _ => "(an address that is not http or https)".to_owned(),
    }
}

fn advice(status: u16, anonymous: bool) -> &'static str {
    match status {
        300..=399 => " (a redirect, missing a location header: correct the address)",
        401 | 403 if anonymous => {
            " (not allowed: give the credentials that this server asks for, in the address itself or in netrc)"
        }
        401 | 403 => " (not allowed: the user and password that were sent are not enough; correct them)",
        404 if anonymous => {
            " (not there: the address or the mirror is wrong, or the file was removed; or it is not shown to everybody: no              credentials were sent, which an index's address or netrc may give)"
        }
        404 | 410 => " (not there: the address or the mirror is wrong, or the file was removed)",
        407 => " (the proxy wants credentials: put them into the proxy variable)",
        408 | 425 | 429 => " (the server asks for patience: try again later)",
        416 => " (the server's file is shorter than the pinned one)",
        451 => " (withheld for legal reasons: use a mirror)",
        500.. => " (the server's fault: try again later)",
        _ => " (an answer that makes no sense here)",
    }
}

pub(super) fn chain(error: &dyn std::error::Error) -> String {
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
