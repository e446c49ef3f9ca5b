//! Package indexes: which one this machine is configured for, and from its page to a file's address.

use std::path::PathBuf;

use html5gum::{Token, Tokenizer};
use serde::Deserialize;
use url::Url;

use super::digest::Digest;
use super::env::Env;
use super::error::{Error, Result, refuse};
use super::fetch::{Client, redacted};

const ACCEPT: &str = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1";
/// pip's variables.
const NO_INDEX: &str = "PIP_NO_INDEX";
const FIND_LINKS: &str = "PIP_FIND_LINKS";
/// A page lists a project's every file; the largest known are a few MB.
const PAGE_LIMIT: u64 = 64 << 20;

/// A package URL's parts, as far as wheels need them.
struct Purl<'a> {
    kind: &'a str,
    name: &'a str,
}

impl<'a> Purl<'a> {
    fn parse(purl: &'a str) -> Result<Self> {
        let parts = purl.strip_prefix("pkg:").and_then(|rest| rest.split_once('/'));
        match parts.map(|(kind, rest)| (kind, rest.split(['@', '?', '#']).next().unwrap_or_default())) {
            Some((kind @ "pypi", name)) if !name.is_empty() => Ok(Self { kind, name }),
            _ => Err(Error::Refused(format!(
                "`{purl}` is not a package URL this crate knows: expected pkg:pypi/NAME@VERSION"
            ))),
        }
    }

    /// The purl type's default repository, used where nothing is configured: its simple index.
    fn default_index(&self) -> String {
        format!("https://{}.org/simple/", self.kind)
    }
}

/// Where a file of a package may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A page that may link to it, and what named that page.
    Page { url: String, from: String },
    /// A folder that may hold it.
    Folder(PathBuf),
}

/// Where this machine is configured to get a package's files: pip's extra links, then its index.
pub fn places(purl: &str, env: &Env) -> Result<Vec<Place>> {
    let mut places = Vec::new();
    for link in env.text(FIND_LINKS).iter().flat_map(|links| links.split_whitespace()) {
        places.push(match Url::parse(link) {
            Ok(url) if matches!(url.scheme(), "http" | "https") => {
                Place::Page { url: url.into(), from: FIND_LINKS.to_owned() }
            }
            Ok(url) if url.scheme() == "file" => match url.to_file_path() {
                Ok(path) => Place::Folder(path),
                Err(()) => refuse!("{FIND_LINKS}: {link} is not a path of this machine; correct it"),
            },
            Err(_) if !link.contains("://") => Place::Folder(PathBuf::from(link)),
            // Not shown: it may be a misspelt address with a password in it.
            _ => refuse!("{FIND_LINKS} holds what is no folder and no http, https or file address; correct it"),
        });
    }
    if !env.flag(NO_INDEX) {
        let (url, from) = project_page(purl, env)?;
        places.push(Place::Page { url, from });
    }
    if places.is_empty() {
        return Err(Error::Unavailable(format!(
            "{purl} can be had from nowhere: {NO_INDEX} is set and {FIND_LINKS} is not; unset the one or set the other"
        )));
    }
    Ok(places)
}

/// The address of the project page of a package URL, with where that came from.
pub fn project_page(purl: &str, env: &Env) -> Result<(String, String)> {
    let purl = Purl::parse(purl)?;
    let (index, from) = match configured_index(env) {
        Some(found) => found,
        None => (purl.default_index(), "the default index".to_owned()),
    };
    match Url::parse(&format!("{}/{}/", index.trim_end_matches('/'), normalized(purl.name).replace('_', "-"))) {
        Ok(page) if matches!(page.scheme(), "http" | "https") => Ok((page.into(), from)),
        _ => refuse!("the package index given by {from} is not an http or https address; correct it there"),
    }
}

fn configured_index(env: &Env) -> Option<(String, String)> {
    for name in ["UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL"] {
        if let Some(value) = env.text(name) {
            // uv allows NAME=URL.
            let url = match value.split_once('=') {
                Some((label, url)) if name == "UV_DEFAULT_INDEX" && !label.contains([':', '/']) => url.to_owned(),
                _ => value,
            };
            return Some((url, name.to_owned()));
        }
    }
    pip_configuration_files(env).into_iter().find_map(|path| {
        let text = std::fs::read_to_string(&path).ok()?;
        Some((index_url_of_pip_configuration(&text)?, path.display().to_string()))
    })
}

/// pip's configuration files, strongest first.
fn pip_configuration_files(env: &Env) -> Vec<PathBuf> {
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

/// `index-url` of the sections that `pip download` would read, the more specific first.
fn index_url_of_pip_configuration(text: &str) -> Option<String> {
    let (mut section, mut global, mut download) = (String::new(), None, None);
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            section = name.trim().to_ascii_lowercase();
        } else if let Some((key, value)) = line.split_once(['=', ':'])
            && key.trim().replace('_', "-") == "index-url"
        {
            match section.as_str() {
                "global" => global = Some(value.trim().to_owned()),
                "download" => download = Some(value.trim().to_owned()),
                _ => {}
            }
        }
    }
    download.or(global)
}

/// A file that an index page lists.
#[derive(Debug, PartialEq, Eq)]
pub struct Link {
    pub url: String,
    pub sha256: Option<String>,
    /// Why it was withdrawn, if it was. A pinned file may still be used.
    pub yanked: Option<String>,
}

/// Finds `file` on the page. Its link's digest, where there is one, must be the pinned one.
pub fn find(client: &Client, page: &str, file: &str, pinned: &Digest) -> Result<Link> {
    let (content_type, text) = client.text(page, ACCEPT, PAGE_LIMIT)?;
    let shown = redacted(page);
    let Some(link) = parse(page, &content_type, &text, file)? else {
        return Err(Error::Unavailable(format!("{shown} lists no {file}")));
    };
    if let Some(found) = link.sha256.as_ref().filter(|found| **found != pinned.to_string()) {
        return Err(Error::Unavailable(format!("{shown} lists {file} with sha256 {found}, expected {pinned}")));
    }
    Ok(link)
}

/// The link to `file` on a page, JSON or HTML, that was fetched from `page`.
pub fn parse(page: &str, content_type: &str, text: &str, file: &str) -> Result<Option<Link>> {
    let json = content_type.contains("json") || text.trim_start().starts_with('{');
    let found = if json { in_json(page, text, file)? } else { in_html(text, file) };
    let Some(Link { url: href, sha256, yanked }) = found else { return Ok(None) };
    let resolved = Url::parse(page).and_then(|base| base.join(&href));
    let mut url = match resolved {
        Ok(url) if matches!(url.scheme(), "http" | "https") => url,
        _ => refuse!("{} links {file} to an address that is not http or https", redacted(page)),
    };
    let in_fragment = url.fragment().and_then(|f| f.strip_prefix("sha256=")).map(str::to_ascii_lowercase);
    url.set_fragment(None);
    Ok(Some(Link { url: url.into(), sha256: sha256.or(in_fragment), yanked }))
}

#[derive(Deserialize)]
struct Page {
    files: Vec<PageFile>,
}

#[derive(Deserialize)]
struct PageFile {
    filename: String,
    url: String,
    #[serde(default)]
    hashes: std::collections::HashMap<String, String>,
    #[serde(default)]
    yanked: Yanked,
}

/// `false`, or `true`, or the reason.
#[derive(Deserialize)]
#[serde(untagged)]
enum Yanked {
    Flag(bool),
    Reason(String),
}

impl Default for Yanked {
    fn default() -> Self {
        Self::Flag(false)
    }
}

fn in_json(page: &str, text: &str, file: &str) -> Result<Option<Link>> {
    let parsed: Page = match serde_json::from_str(text) {
        Ok(parsed) => parsed,
        Err(e) => return Err(Error::Unavailable(format!("{} is not a simple index page: {e}", redacted(page)))),
    };
    let found = parsed.files.into_iter().find(|entry| entry.filename == file);
    Ok(found.map(|mut entry| Link {
        url: entry.url,
        sha256: entry.hashes.remove("sha256"),
        yanked: match entry.yanked {
            Yanked::Flag(yanked) => yanked.then(String::new),
            Yanked::Reason(reason) => Some(reason),
        },
    }))
}

fn in_html(text: &str, file: &str) -> Option<Link> {
    for Ok(token) in Tokenizer::new(text) {
        let Token::StartTag(tag) = token else { continue };
        if tag.name.as_slice() != b"a" {
            continue;
        }
        let Some(href) = tag.attributes.get(b"href".as_slice()) else { continue };
        let href = String::from_utf8_lossy(href).into_owned();
        let path = href.split(['#', '?']).next().unwrap_or_default();
        let last = path.rsplit('/').next().unwrap_or_default();
        if percent_decoded(last) == file {
            let yanked = tag.attributes.get(b"data-yanked".as_slice());
            let yanked = yanked.map(|reason| String::from_utf8_lossy(reason).into_owned());
            return Some(Link { url: href, sha256: None, yanked });
        }
    }
    None
}

fn percent_decoded(text: &str) -> String {
    let query = text.replace('+', "%2B");
    url::form_urlencoded::parse(query.as_bytes()).next().map(|(key, _)| key.into_owned()).unwrap_or_default()
}

/// A distribution's name in the one spelling that all its spellings have in common.
pub fn normalized(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    for c in name.chars() {
        match c {
            '-' | '_' | '.' if out.ends_with('_') => {}
            '-' | '_' | '.' => out.push('_'),
            c => out.push(c.to_ascii_lowercase()),
        }
    }
    out
}
