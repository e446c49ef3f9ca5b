//! What pip and uv are told on this machine: their variables, then their configuration files.

use std::path::PathBuf;

use super::client::Client;
use super::env::{Env, Named, is_on};
use super::error::{Error, Result};
use super::uv::Uv;

/// The sections that count, the more specific first: wheels are downloaded here, to be installed.
const SECTIONS: [&str; 3] = ["download", "install", "global"];
/// What a client asks with that is not supported here, and what to do instead.
const REFUSED: (&str, &str) =
    ("client-cert", "this build cannot show a certificate of its own; fetch the wheel with `pip download`");
/// What has no effect here, and why that may be what is wrong where an index cannot be used.
const UNHEEDED: [(&str, &str); 2] = [
    ("trusted-host", "certificates are always checked"),
    ("keyring-provider", "no keyring is asked: give user and password in the index's address or in netrc"),
];

/// What pip is told.
pub struct Pip<'a> {
    env: &'a Env,
    /// The strongest file first.
    files: Vec<(PathBuf, Vec<Entry>)>,
    /// What uv's own files say.
    pub uv: Uv,
}

/// A line of a configuration file, with what goes on with it.
struct Entry {
    section: String,
    key: String,
    value: String,
}

impl<'a> Pip<'a> {
    pub fn read(env: &'a Env) -> Result<Self> {
        let mut files = Vec::new();
        for path in files_of(env) {
            if !path.is_file() {
                continue;
            }
            let bytes = std::fs::read(&path).map_err(|e| Error::io("reading pip's configuration,", &path, &e))?;
            files.push((path, parse(&String::from_utf8_lossy(&bytes))));
        }
        Ok(Self { env, files, uv: Uv::read(env)? })
    }

    /// What an option of pip's is set to, and by what.
    pub fn get(&self, key: &str) -> Option<Named> {
        let variable = format!("PIP_{}", key.to_ascii_uppercase().replace('-', "_"));
        self.env.named(&variable).or_else(|| {
            SECTIONS.iter().find_map(|section| {
                self.files.iter().find_map(|(path, entries)| {
                    // A key that is there twice has the value that it is given last.
                    let fits =
                        |entry: &&Entry| entry.section == *section && entry.key == key && !entry.value.is_empty();
                    let entry = entries.iter().rev().find(fits)?;
                    Some(Named { value: entry.value.clone(), from: format!("{key} in {}", path.display()) })
                })
            })
        })
    }

    /// What says that no index is to be asked.
    pub fn no_index(&self) -> Option<String> {
        let named = [self.get("no-index"), self.env.named("UV_NO_INDEX").or_else(|| self.uv.no_index())];
        named.into_iter().flatten().find(|named| is_on(&named.value)).map(|named| named.from)
    }

    /// The client as pip would have it: through its proxy, trusting whom it trusts.
    pub fn client(&self, client: &Client) -> Result<Client> {
        let (key, why) = REFUSED;
        if let Some(named) = self.get(key) {
            return Err(Error::Unavailable(format!(
                "{} is set, and {why}, and put it where this build looks first",
                named.from
            )));
        }
        let bundles = ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"].into_iter().find_map(|name| self.env.named(name));
        Ok(client.with(self.env, self.get("proxy"), self.get("cert").or(bundles)))
    }

    /// What is set and has no effect here, to be told where an index cannot be used.
    pub fn unheeded(&self) -> String {
        let set = |(key, why): (&str, &str)| {
            let named = self.get(key).filter(|named| !matches!(named.value.as_str(), "disabled" | "auto"))?;
            Some(format!(" ({} has no effect here: {why})", named.from))
        };
        UNHEEDED.into_iter().filter_map(set).collect::<String>() + &self.uv.unheeded()
    }
}

/// pip's configuration files, strongest first.
fn files_of(env: &Env) -> Vec<PathBuf> {
    // pip's way to say: no configuration file at all.
    if env.text("PIP_CONFIG_FILE").as_deref() == Some("/dev/null") {
        return Vec::new();
    }
    let home = env.path("HOME");
    let xdg = env.path("XDG_CONFIG_HOME").or_else(|| Some(home.as_ref()?.join(".config")));
    let candidates = [
        env.path("PIP_CONFIG_FILE"),
        env.path("VIRTUAL_ENV").map(|path| path.join("pip.conf")),
        xdg.map(|path| path.join("pip/pip.conf")),
        home.map(|path| path.join(".pip/pip.conf")),
        Some(PathBuf::from("/etc/xdg/pip/pip.conf")),
        Some(PathBuf::from("/etc/pip.conf")),
    ];
    candidates.into_iter().flatten().collect()
}

/// Sections, keys and values, as Python's configparser reads them: what is indented goes on with the value before, and a
/// comment has a line of its own. Keys are spelt as pip's options are.
fn parse(text: &str) -> Vec<Entry> {
    let mut entries: Vec<Entry> = Vec::new();
    let (mut section, mut indent) = (String::new(), None);
    for line in text.lines() {
        let trimmed = line.trim();
        if trimmed.is_empty() || trimmed.starts_with(['#', ';']) {
            continue;
        }
        let column = line.len() - line.trim_start().len();
        if indent.is_some_and(|indent| column > indent)
            && let Some(Entry { value, .. }) = entries.last_mut()
        {
            value.push('\n');
            value.push_str(trimmed);
        } else if let Some(name) = trimmed.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            section = name.0.trim().to_ascii_lowercase();
            indent = None;
        } else if let Some((key, value)) = trimmed.split_once(['=', ':']) {
            let key = key.trim().to_ascii_lowercase().replace('_', "-");
            let key = key.trim_start_matches('-').to_owned();
            entries.push(Entry { section: section.clone(), key, value: value.trim().to_owned() });
            indent = Some(column);
        }
    }
    entries
}
