//! Addresses as this build meets them: http, https, file, and a proxy's. By the `url` crate's names and rules, as far as these
//! matter here, without its tables of Unicode, which are a third of what a build would compile: a host beyond ASCII is refused,
//! and is written as `xn--…` then. `tests/addresses.rs` holds it against that crate.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, utf8_percent_encode};

/// What does not stand for itself, by the part of an address.
const FRAGMENT: &AsciiSet = &CONTROLS.add(b' ').add(b'"').add(b'<').add(b'>').add(b'`');
const QUERY: &AsciiSet = &CONTROLS.add(b' ').add(b'"').add(b'#').add(b'<').add(b'>').add(b'\'');
const PATH: &AsciiSet =
    &CONTROLS.add(b' ').add(b'"').add(b'#').add(b'<').add(b'>').add(b'?').add(b'`').add(b'{').add(b'}');
const USER: &AsciiSet =
    &PATH.add(b'/').add(b':').add(b';').add(b'=').add(b'@').add(b'[').add(b'\\').add(b']').add(b'^').add(b'|');
const SEGMENT: &AsciiSet = &PATH.add(b'/').add(b'%').add(b'\\');

/// An address.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Url {
    scheme: String,
    user: String,
    password: Option<String>,
    host: Option<Host<String>>,
    host_text: Option<String>,
    port: Option<u16>,
    path: String,
    query: Option<String>,
    fragment: Option<String>,
    /// All of it.
    text: String,
}

/// Whom an address names.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Host<S> {
    Domain(S),
    Ipv4(Ipv4Addr),
    Ipv6(Ipv6Addr),
}

/// Scheme, host and port: what one answers for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin(String, Option<Host<String>>, Option<u16>);

/// What is no address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoAddress(&'static str);

impl fmt::Display for NoAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

type Parsed<T> = Result<T, NoAddress>;

impl Url {
    /// An address by itself.
    pub fn parse(text: &str) -> Parsed<Self> {
        let text = cleaned(text);
        let Some((scheme, rest)) = scheme_of(&text) else {
            return Err(NoAddress("it has no scheme, such as https"));
        };
        let (rest, query, fragment) = divided(rest);
        let is_file = scheme == "file";
        let rest = if is_special(&scheme) { rest.replace('\\', "/") } else { rest.to_owned() };
        let (authority, path) = match rest.strip_prefix("//") {
            Some(rest) => match rest.find('/') {
                Some(end) => (Some(rest[..end].to_owned()), rest[end..].to_owned()),
                None => (Some(rest.to_owned()), String::new()),
            },
            None if is_file => (Some(String::new()), rest),
            None if is_special(&scheme) => return Err(NoAddress("it has no host")),
            None => (None, rest),
        };
        let has_authority = authority.is_some();
        let mut url = Self {
            user: String::new(),
            password: None,
            host: None,
            host_text: None,
            port: None,
            path,
            query: None,
            fragment: None,
            text: String::new(),
            scheme,
        };
        if let Some(authority) = authority {
            url.set_authority(&authority)?;
            url.host_text = url.host.as_ref().map(Host::to_string);
        }
        url.path = match has_authority || url.path.starts_with('/') {
            true => without_dots(&encoded(&url.path, PATH), is_special(&url.scheme)),
            false => encoded(&url.path, CONTROLS),
        };
        url.set_rest(query, fragment);
        Ok(url)
    }

    /// An address by itself, or as seen from this one.
    pub fn join(&self, reference: &str) -> Parsed<Self> {
        let text = cleaned(reference);
        if let Some((scheme, rest)) = scheme_of(&text) {
            // `https:path` on a page of https is a path of that page.
            if scheme != self.scheme || !is_special(&scheme) || rest.starts_with(['/', '\\']) {
                return Self::parse(&text);
            }
            return self.relative(rest);
        }
        self.relative(&text)
    }

    fn relative(&self, reference: &str) -> Parsed<Self> {
        if self.host.is_none() && self.scheme != "file" {
            return Err(NoAddress("nothing is relative to such an address"));
        }
        let (path, query, fragment) = divided(reference);
        let path = path.replace('\\', "/");
        if path.starts_with("//") {
            return Self::parse(&format!("{}:{path}{}", self.scheme, &reference[path.len()..]));
        }
        let mut url = self.clone();
        let query = if path.is_empty() { query.or(self.query.as_deref()) } else { query };
        if path.starts_with('/') {
            url.path = without_dots(&encoded(&path, PATH), true);
        } else if !path.is_empty() {
            let folder = self.path.rfind('/').map_or("/", |end| &self.path[..=end]);
            url.path = without_dots(&format!("{folder}{}", encoded(&path, PATH)), true);
        }
        url.set_rest(query.map(str::to_owned).as_deref(), fragment);
        Ok(url)
    }

    /// The address of an absolute path.
    pub fn from_file_path(path: impl AsRef<Path>) -> Result<Self, ()> {
        let path = path.as_ref();
        if !path.is_absolute() {
            return Err(());
        }
        let bytes: String = path
            .components()
            .filter_map(|part| match part {
                std::path::Component::Normal(part) => {
                    Some(format!("/{}", percent_encoding::percent_encode(part.as_encoded_bytes(), SEGMENT)))
                }
                _ => None,
            })
            .collect();
        Self::parse(&format!("file://{}", if bytes.is_empty() { "/" } else { &bytes })).map_err(|_| ())
    }

    /// The path that a file's address names on this machine.
    pub fn to_file_path(&self) -> Result<PathBuf, ()> {
        let local = match &self.host {
            None => true,
            Some(Host::Domain(name)) => name == "localhost",
            Some(_) => false,
        };
        if self.scheme != "file" || !local {
            return Err(());
        }
        path_of(percent_decode_str(&self.path).collect())
    }

    pub fn scheme(&self) -> &str {
        &self.scheme
    }

    /// Percent-encoded.
    pub fn username(&self) -> &str {
        &self.user
    }

    /// Percent-encoded.
    pub fn password(&self) -> Option<&str> {
        self.password.as_deref()
    }

    pub fn host(&self) -> Option<Host<&str>> {
        self.host.as_ref().map(|host| match host {
            Host::Domain(name) => Host::Domain(name.as_str()),
            Host::Ipv4(ip) => Host::Ipv4(*ip),
            Host::Ipv6(ip) => Host::Ipv6(*ip),
        })
    }

    pub fn host_str(&self) -> Option<&str> {
        self.host_text.as_deref()
    }

    pub fn port_or_known_default(&self) -> Option<u16> {
        self.port.or(default_port(&self.scheme))
    }

    pub fn path(&self) -> &str {
        &self.path
    }

    pub fn query(&self) -> Option<&str> {
        self.query.as_deref()
    }

    pub fn fragment(&self) -> Option<&str> {
        self.fragment.as_deref()
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }

    pub fn origin(&self) -> Origin {
        Origin(self.scheme.clone(), self.host.clone(), self.port_or_known_default())
    }

    /// Fails where there is no host that could know the user.
    pub fn set_username(&mut self, user: &str) -> Result<(), ()> {
        self.has_server()?;
        self.user = encoded(user, USER);
        self.compose();
        Ok(())
    }

    /// As [`set_username`](Self::set_username).
    pub fn set_password(&mut self, password: Option<&str>) -> Result<(), ()> {
        self.has_server()?;
        self.password = password.filter(|password| !password.is_empty()).map(|password| encoded(password, USER));
        self.compose();
        Ok(())
    }

    pub fn set_query(&mut self, query: Option<&str>) {
        self.query = query.map(|query| encoded(query, QUERY));
        self.compose();
    }

    pub fn set_fragment(&mut self, fragment: Option<&str>) {
        self.fragment = fragment.map(|fragment| encoded(fragment, FRAGMENT));
        self.compose();
    }

    /// The last part of the path, in a folder's place where it ends with one.
    pub fn push(&mut self, segment: &str) -> Result<(), ()> {
        if self.host.is_none() && self.scheme != "file" {
            return Err(());
        }
        let slash = if self.path.ends_with('/') { "" } else { "/" };
        self.path = format!("{}{slash}{}", self.path, utf8_percent_encode(segment, SEGMENT));
        self.compose();
        Ok(())
    }

    fn has_server(&self) -> Result<(), ()> {
        if self.host.is_some() && self.scheme != "file" { Ok(()) } else { Err(()) }
    }

    fn set_authority(&mut self, authority: &str) -> Parsed<()> {
        let (login, at) = match authority.rsplit_once('@') {
            Some((login, at)) => (Some(login), at),
            None => (None, authority),
        };
        if self.scheme == "file" {
            // As on the web: this machine's own name is no name.
            self.host = Some(at).filter(|at| !at.is_empty() && *at != "localhost").map(host).transpose()?;
            return if login.is_none() { Ok(()) } else { Err(NoAddress("a file has no user")) };
        }
        if let Some(login) = login {
            let (user, password) = login.split_once(':').map_or((login, None), |(user, word)| (user, Some(word)));
            self.user = encoded(user, USER);
            self.password = password.filter(|password| !password.is_empty()).map(|password| encoded(password, USER));
        }
        let (name, port) = match at.rsplit_once(':') {
            Some((name, port)) if !port.contains(']') => (name, port),
            _ => (at, ""),
        };
        if !port.bytes().all(|digit| digit.is_ascii_digit()) {
            return Err(NoAddress("its port is no number"));
        }
        let port =
            if port.is_empty() { None } else { Some(port.parse().map_err(|_| NoAddress("there is no such port"))?) };
        self.port = port.filter(|_| port != default_port(&self.scheme));
        self.host = Some(host(name)?);
        Ok(())
    }

    fn set_rest(&mut self, query: Option<&str>, fragment: Option<&str>) {
        self.query = query.map(|query| encoded(query, QUERY));
        self.fragment = fragment.map(|fragment| encoded(fragment, FRAGMENT));
        self.compose();
    }

    fn compose(&mut self) {
        let mut text = format!("{}:", self.scheme);
        if self.host.is_some() || self.scheme == "file" {
            text += "//";
        }
        text += &self.user;
        if let Some(password) = &self.password {
            text += &format!(":{password}");
        }
        if !self.user.is_empty() || self.password.is_some() {
            text += "@";
        }
        text += self.host_str().unwrap_or_default();
        if let Some(port) = self.port {
            text += &format!(":{port}");
        }
        text += &self.path;
        for (mark, part) in [('?', &self.query), ('#', &self.fragment)] {
            if let Some(part) = part {
                text.push(mark);
                text += part;
            }
        }
        self.text = text;
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl From<Url> for String {
    fn from(url: Url) -> Self {
        url.text
    }
}

impl<S: fmt::Display> fmt::Display for Host<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Domain(name) => name.fmt(f),
            Self::Ipv4(ip) => ip.fmt(f),
            Self::Ipv6(ip) => write!(f, "[{ip}]"),
        }
    }
}

impl Origin {
    /// As headers and messages spell it.
    pub fn ascii_serialization(&self) -> String {
        let Self(scheme, host, port) = self;
        let host = host.as_ref().map(Host::to_string).unwrap_or_default();
        match port.filter(|port| Some(*port) != default_port(scheme)) {
            Some(port) => format!("{scheme}://{host}:{port}"),
            None => format!("{scheme}://{host}"),
        }
    }
}

/// Without blanks around it, and without line ends and tabs in it.
fn cleaned(text: &str) -> String {
    text.trim_matches(|c| c <= ' ').chars().filter(|c| !matches!(c, '\t' | '\n' | '\r')).collect()
}

/// The scheme, in lower case, and what follows its colon.
fn scheme_of(text: &str) -> Option<(String, &str)> {
    let (scheme, rest) = text.split_once(':')?;
    let fine = scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        && scheme.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'+' | b'-' | b'.'));
    fine.then(|| (scheme.to_ascii_lowercase(), rest))
}

/// Path with all before it, query, fragment.
fn divided(text: &str) -> (&str, Option<&str>, Option<&str>) {
    let (rest, fragment) = text.split_once('#').map_or((text, None), |(rest, fragment)| (rest, Some(fragment)));
    let (path, query) = rest.split_once('?').map_or((rest, None), |(path, query)| (path, Some(query)));
    (path, query, fragment)
}

/// Schemes whose addresses name a host and a path, always.
fn is_special(scheme: &str) -> bool {
    matches!(scheme, "http" | "https" | "file" | "ftp" | "ws" | "wss")
}

fn default_port(scheme: &str) -> Option<u16> {
    match scheme {
        "http" | "ws" => Some(80),
        "https" | "wss" => Some(443),
        "ftp" => Some(21),
        _ => None,
    }
}

fn encoded(text: &str, set: &'static AsciiSet) -> String {
    utf8_percent_encode(text, set).to_string()
}

fn host(text: &str) -> Parsed<Host<String>> {
    if let Some(inside) = text.strip_prefix('[') {
        let ip = inside.strip_suffix(']').and_then(|ip| ip.parse().ok());
        return ip.map(Host::Ipv6).ok_or(NoAddress("its host is no IPv6 address"));
    }
    let name = percent_decode_str(text).decode_utf8().map_err(|_| NoAddress("its host is not UTF-8"))?;
    if name.is_empty() {
        return Err(NoAddress("it has no host"));
    }
    if !name.is_ascii() {
        return Err(NoAddress("its host has letters beyond ASCII: write it as xn--…"));
    }
    let never = |c: char| c.is_ascii_control() || " #%/:<>?@[\\]^|".contains(c);
    if name.contains(never) {
        return Err(NoAddress("its host has characters that no host has"));
    }
    let name = name.to_ascii_lowercase();
    let last = name.strip_suffix('.').unwrap_or(&name).rsplit('.').next().unwrap_or_default();
    // What ends with a number is an IPv4 address, in one of the spellings that some programs take, or nothing.
    if !last.is_empty() && last.bytes().all(|c| c.is_ascii_digit()) || last.starts_with("0x") {
        return name.parse().map(Host::Ipv4).map_err(|_| NoAddress("its host is no IPv4 address of four numbers"));
    }
    Ok(Host::Domain(name))
}

/// A path, without its parts `.` and `..`.
fn without_dots(path: &str, rooted: bool) -> String {
    let path = path.strip_prefix('/').unwrap_or(path);
    if path.is_empty() {
        return if rooted { "/".to_owned() } else { String::new() };
    }
    let parts: Vec<&str> = path.split('/').collect();
    let mut kept: Vec<&str> = Vec::new();
    for (i, part) in parts.iter().enumerate() {
        let lower = part.to_ascii_lowercase().replace("%2e", ".");
        let is_last = i + 1 == parts.len();
        match lower.as_str() {
            "." | ".." => {
                if lower == ".." {
                    kept.pop();
                }
                if is_last {
                    kept.push("");
                }
            }
            _ => kept.push(part),
        }
    }
    format!("/{}", kept.join("/"))
}

#[cfg(unix)]
fn path_of(bytes: Vec<u8>) -> Result<PathBuf, ()> {
    use std::os::unix::ffi::OsStringExt;
    if bytes.contains(&0) { Err(()) } else { Ok(std::ffi::OsString::from_vec(bytes).into()) }
}

/// Behind the slash stands the drive.
#[cfg(not(unix))]
fn path_of(bytes: Vec<u8>) -> Result<PathBuf, ()> {
    let path = String::from_utf8(bytes).map_err(|_| ())?;
    Ok(path.trim_start_matches('/').replace('/', "\\").into())
}
