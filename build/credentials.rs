//! Who this build says that it is: user and password out of an address, or out of netrc.

use std::path::PathBuf;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use percent_encoding::percent_decode_str;

use super::env::Env;
use super::error::{Error, Result, refuse};
use super::url::Url;

/// A user and a password, as they go over the wire.
#[derive(Clone, PartialEq, Eq)]
pub struct Login(String);

impl Login {
    fn new(user: &[u8], password: &[u8]) -> Self {
        Self(format!("Basic {}", BASE64_STANDARD.encode([user, b":", password].concat())))
    }

    /// What stands in an address, where it is percent-encoded.
    pub fn of(url: &Url) -> Option<Self> {
        let decoded = |text: &str| percent_decode_str(text).collect::<Vec<u8>>();
        let password = url.password();
        (!url.username().is_empty() || password.is_some())
            .then(|| Self::new(&decoded(url.username()), &decoded(password.unwrap_or_default())))
    }

    /// The value of the header `Authorization`.
    pub fn header(&self) -> &str {
        &self.0
    }
}

/// An address without user and password.
pub fn without(mut url: Url) -> Url {
    // These fail for addresses that cannot have any.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url
}

/// What netrc says, host by host.
#[derive(Default)]
pub struct Netrc(Vec<Machine>);

#[derive(Default)]
struct Machine {
    /// None in the entry `default`.
    host: Option<String>,
    user: String,
    password: String,
}

impl Netrc {
    /// The file that `NETRC` names, else `.netrc` or `_netrc` in the home folder.
    pub fn read(env: &Env) -> Result<Self> {
        let home = env.path("HOME");
        let candidates: Vec<PathBuf> = match env.path("NETRC") {
            Some(path) if !path.is_absolute() => {
                refuse!("NETRC={} is not an absolute path; correct or unset it", path.display())
            }
            Some(path) => vec![path],
            None => home.iter().flat_map(|home| [".netrc", "_netrc"].map(|name| home.join(name))).collect(),
        };
        let Some(path) = candidates.into_iter().find(|path| path.is_file()) else { return Ok(Self::default()) };
        let bytes = std::fs::read(&path).map_err(|e| Error::io("reading", &path, &e))?;
        Ok(Self::parse(&String::from_utf8_lossy(&bytes)))
    }

    pub fn parse(text: &str) -> Self {
        let (mut machines, mut words) = (Vec::<Machine>::new(), Words(text));
        while let Some(word) = words.next() {
            let mut value = || words.next().unwrap_or_default();
            match word.as_str() {
                "machine" => machines.push(Machine { host: Some(value().to_ascii_lowercase()), ..Machine::default() }),
                "default" => machines.push(Machine::default()),
                "macdef" => words.skip_to("\n\n"),
                word if word.starts_with('#') => words.skip_to("\n"),
                "login" | "user" | "account" | "password" => {
                    let value = value();
                    match (word.as_str(), machines.last_mut()) {
                        ("login" | "user", Some(machine)) => machine.user = value,
                        ("password", Some(machine)) => machine.password = value,
                        _ => {}
                    }
                }
                _ => {}
            }
        }
        Self(machines)
    }

    /// What it says of a host, or else of every other.
    pub fn login(&self, host: &str) -> Option<Login> {
        let named = |machine: &&Machine| machine.host.as_deref() == Some(host);
        let machine = self.0.iter().find(named).or_else(|| self.0.iter().find(|machine| machine.host.is_none()))?;
        Some(Login::new(machine.user.as_bytes(), machine.password.as_bytes()))
    }
}

/// Words that blanks separate; one in quotes may have some, and a backslash before what would end it.
struct Words<'a>(&'a str);

impl Words<'_> {
    fn skip_to(&mut self, end: &str) {
        self.0 = self.0.split_once(end).map_or("", |(_, rest)| rest);
    }
}

impl Iterator for Words<'_> {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        let text = self.0.trim_start();
        let quoted = text.starts_with('"');
        let (mut word, mut escaped) = (String::new(), false);
        for (at, c) in text.char_indices().skip(usize::from(quoted)) {
            let ends = if quoted { c == '"' } else { c.is_whitespace() };
            if ends && !escaped {
                // A line's end is left, since comments are skipped to it.
                self.0 = &text[at + usize::from(quoted)..];
                return Some(word);
            }
            if c == '\\' && !escaped {
                escaped = true;
                continue;
            }
            escaped = false;
            word.push(c);
        }
        self.0 = "";
        (!text.is_empty()).then_some(word)
    }
}
