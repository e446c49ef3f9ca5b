//! Package indexes: which ones this machine is configured for, and from a page to a file's address.

use std::path::{Path, PathBuf};

use html5gum::{Token, Tokenizer};
use percent_encoding::percent_decode_str;
use serde_json::Value;

use super::digest::Digest;
use super::env::{Env, Named};
use super::error::{Error, Result, refuse};
use super::fetch::{Client, redacted};
use super::pip::Pip;
use super::url::Url;
use super::uv;

const ACCEPT: &str = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1";
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

/// Where this machine is configured to get a package's files: extra links, then the indexes.
pub fn places(package: &str, env: &Env, pip: &Pip<'_>) -> Result<Vec<Place>> {
    let purl = Purl::parse(package)?;
    let mut places = Vec::new();
    let links = pip.get("find-links");
    for Named { value, from } in links.iter().chain(&env.named("UV_FIND_LINKS")).chain(&pip.uv.links) {
        // pip separates them by blanks; a folder whose name has some is meant where it is there.
        let whole = Path::new(value).exists().then_some(value.as_str());
        let split = || value.split(|c: char| c.is_whitespace() || c == ',' && from.starts_with("UV_"));
        for link in whole.into_iter().chain(split().filter(|link| whole.is_none() && !link.is_empty())) {
            places.push(match address(link, from)? {
                url if url.scheme() == "file" => match url.to_file_path() {
                    // A page of links, or what has the files in it.
                    Ok(path) if path.is_file() => Place::Page { url: url.into(), from: from.clone() },
                    Ok(path) => Place::Folder(path),
                    Err(()) => refuse!("{from}: {link} is not a path of this machine; correct it"),
                },
                url => Place::Page { url: url.into(), from: from.clone() },
            });
        }
    }
    let no_index = pip.no_index();
    if no_index.is_none() {
        for Named { value, from } in indexes(env, pip, &purl) {
            let mut url = address(&value, &from)?;
            let project = normalized(purl.name).replace('_', "-");
            // With a slash behind: a page for the project, and what it links to lies below.
            for segment in [&project, ""] {
                url.push(segment)
                    .map_err(|()| Error::Refused(format!("{from} holds no address of a folder; correct it")))?;
            }
            places.push(Place::Page { url: url.into(), from });
        }
    }
    if let (true, Some(from)) = (places.is_empty(), no_index) {
        return Err(Error::Unavailable(format!(
            "{package} can be had from nowhere: {from} says that no index is to be asked, and neither PIP_FIND_LINKS nor \
             pip's find-links names another place; unset the one or set the other"
        )));
    }
    // The same index is often named twice.
    let mut seen = Vec::new();
    places.retain(|place: &Place| {
        let what = match place {
            Place::Page { url, .. } => url.clone(),
            Place::Folder(folder) => folder.display().to_string(),
        };
        let is_new = !seen.contains(&what);
        seen.push(what);
        is_new
    });
    Ok(places)
}

/// The indexes, the more specific first: those that are told to uv beside its default, by variables before files, the default,
/// and those beside it that are told to pip.
fn indexes(env: &Env, pip: &Pip<'_>, purl: &Purl<'_>) -> Vec<Named> {
    let list = |named: Option<Named>| -> Vec<Named> {
        let Some(Named { value, from }) = named else { return Vec::new() };
        value.split_whitespace().map(|url| labelled(env, Named { value: url.to_owned(), from: from.clone() })).collect()
    };
    let single = ["UV_DEFAULT_INDEX", "UV_INDEX_URL"].into_iter().find_map(|name| env.named(name));
    let default = || Named { value: purl.default_index(), from: "the default index".to_owned() };
    let of_uv = |index: &uv::Index| match &index.label {
        Some(label) => with_login(env, label, index.address.clone()),
        None => index.address.clone(),
    };
    let main = single.or_else(|| pip.get("index-url")).or_else(|| pip.uv.default.as_ref().map(of_uv));
    let mut all: Vec<Named> = ["UV_INDEX", "UV_EXTRA_INDEX_URL"].map(|name| list(env.named(name))).concat();
    all.extend(pip.uv.further.iter().map(of_uv));
    all.push(labelled(env, main.unwrap_or_else(default)));
    all.extend(list(pip.get("extra-index-url")));
    all
}

/// An index as uv may name it, `NAME=ADDRESS`.
fn labelled(env: &Env, Named { value, from }: Named) -> Named {
    match value.split_once('=') {
        Some((label, address)) if from.starts_with("UV_") && !label.contains([':', '/']) => {
            with_login(env, label, Named { value: address.to_owned(), from })
        }
        _ => Named { value, from },
    }
}

/// An index with the user and password that are in uv's variables for its name.
fn with_login(env: &Env, label: &str, Named { mut value, from }: Named) -> Named {
    let label: String =
        label.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' }).collect();
    let given = |what: &str| env.text(&format!("UV_INDEX_{label}_{what}"));
    let (user, password) = (given("USERNAME"), given("PASSWORD"));
    if let (Ok(mut url), true) = (Url::parse(&value), user.is_some() || password.is_some()) {
        // These escape what must be, and fail only for addresses that are refused anyway.
        let _ = user.map(|user| url.set_username(&user));
        let _ = password.map(|password| url.set_password(Some(&password)));
        value = url.into();
    }
    Named { value, from }
}

/// What pip takes for an index or a place of links: an address, or an absolute path of this machine.
fn address(text: &str, from: &str) -> Result<Url> {
    match Url::parse(text) {
        Ok(url) if matches!(url.scheme(), "http" | "https" | "file") => return Ok(url),
        Err(_) if Path::new(text).is_absolute() => {
            if let Ok(url) = Url::from_file_path(text) {
                return Ok(url);
            }
        }
        _ => {}
    }
    // Not shown: it may be a misspelt address with a password in it.
    refuse!(
        "{from} holds what is neither an http, https or file address nor an absolute path (a relative one would be taken \
         from wherever a build script runs); correct it there"
    )
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
    let shown = redacted(page);
    let (at, content_type, text) = fetched(client, page)?;
    let Some(link) = parse(&at, &content_type, &text, file)? else {
        return Err(Error::Unavailable(format!("{shown} lists no {file}")));
    };
    if let Some(found) = link.sha256.as_ref().filter(|found| **found != pinned.to_string()) {
        return Err(Error::Unavailable(format!("{shown} lists {file} with sha256 {found}, expected {pinned}")));
    }
    Ok(link)
}

/// Every file that a page lists, by its name.
pub fn list(client: &Client, page: &str) -> Result<Vec<(String, Link)>> {
    let (at, content_type, text) = fetched(client, page)?;
    let all = entries(&at, &content_type, &text)?;
    all.into_iter().map(|entry| Ok((entry.file.clone(), resolved(&at, entry)?))).collect()
}

/// A page: where it came from in the end, its type, its text.
fn fetched(client: &Client, page: &str) -> Result<(Url, String, String)> {
    match Url::parse(page).ok().filter(|url| url.scheme() == "file") {
        Some(url) => local_page(url),
        None => client.text(page, ACCEPT, PAGE_LIMIT),
    }
}

/// A page on this machine; of a folder its `index.html`, as pip has it.
fn local_page(url: Url) -> Result<(Url, String, String)> {
    let unavailable = |why: String| Error::Unavailable(format!("{url}: {why}; correct the address"));
    let mut path = url.to_file_path().map_err(|()| unavailable("this is not a path of this machine".to_owned()))?;
    let mut at = url.clone();
    if path.is_dir() {
        path.push("index.html");
        at = Url::from_file_path(&path).unwrap_or(at);
    }
    // Opening a pipe would wait for ever.
    if !path.is_file() {
        return Err(unavailable(format!("{} is not there, or is no file", path.display())));
    }
    let bytes = std::fs::read(&path).map_err(|e| unavailable(e.to_string()))?;
    Ok((at, String::new(), String::from_utf8_lossy(&bytes).into_owned()))
}

/// The link to `file` on a page, JSON or HTML, that came from `page`.
pub fn parse(page: &Url, content_type: &str, text: &str, file: &str) -> Result<Option<Link>> {
    let found = entries(page, content_type, text)?.into_iter().find(|entry| entry.file == file);
    found.map(|entry| resolved(page, entry)).transpose()
}

/// A link as it is written, and what it is relative to.
struct Entry {
    file: String,
    base: Url,
    link: Link,
}

fn entries(page: &Url, content_type: &str, text: &str) -> Result<Vec<Entry>> {
    let json = content_type.contains("json") || text.trim_start().starts_with('{');
    if json { in_json(page, text) } else { Ok(in_html(page, text)) }
}

fn resolved(page: &Url, Entry { file, base, link }: Entry) -> Result<Link> {
    let Link { url: href, sha256, yanked } = link;
    let mut url = match base.join(&href) {
        Ok(url) if matches!(url.scheme(), "http" | "https") => url,
        Ok(url) if url.scheme() == "file" && page.scheme() == "file" => url,
        _ => refuse!("{} links {file} to an address that is not http or https", redacted(page.as_str())),
    };
    let in_fragment = url.fragment().and_then(|f| f.strip_prefix("sha256=")).map(str::to_ascii_lowercase);
    url.set_fragment(None);
    Ok(Link { url: url.into(), sha256: sha256.or(in_fragment), yanked })
}

/// Whatever else a page says of a file, or says `null` of, is its own affair.
fn in_json(page: &Url, text: &str) -> Result<Vec<Entry>> {
    let unlike = |why: String| {
        let shown = redacted(page.as_str());
        Error::Unavailable(format!("{shown} is not a simple index page: {why}"))
    };
    let mut parsed: Value = serde_json::from_str(text).map_err(|e| unlike(e.to_string()))?;
    let Some(Value::Array(files)) = parsed.get_mut("files").map(Value::take) else {
        return Err(unlike("it has no list of files".to_owned()));
    };
    let all = files.into_iter().filter_map(|entry| {
        let text = |key: &str| entry.get(key).and_then(Value::as_str).map(str::to_owned);
        // `false`, or `true`, or the reason; nothing and no reason are `false`.
        let yanked = match entry.get("yanked") {
            Some(Value::Bool(true)) => Some(String::new()),
            Some(Value::String(reason)) if !reason.is_empty() => Some(reason.clone()),
            _ => None,
        };
        let sha256 = entry.get("hashes").and_then(|hashes| hashes.get("sha256")).and_then(Value::as_str);
        let link = Link { url: text("url")?, sha256: sha256.map(str::to_ascii_lowercase), yanked };
        Some(Entry { file: text("filename")?, base: page.clone(), link })
    });
    Ok(all.collect())
}

fn in_html(page: &Url, text: &str) -> Vec<Entry> {
    let (mut base, mut all) = (None, Vec::new());
    for Ok(token) in Tokenizer::new(text) {
        let Token::StartTag(tag) = token else { continue };
        let Some(href) = tag.attributes.get(b"href".as_slice()) else { continue };
        let href = String::from_utf8_lossy(href).trim().to_owned();
        match tag.name.as_slice() {
            // The first one counts; pages have it in their heads.
            b"base" if base.is_none() => base = page.join(&href).ok(),
            b"a" => {
                let yanked = tag.attributes.get(b"data-yanked".as_slice());
                let yanked = yanked.map(|reason| String::from_utf8_lossy(reason).into_owned());
                let base = base.clone().unwrap_or_else(|| page.clone());
                all.push(Entry { file: file_of(&href), base, link: Link { url: href, sha256: None, yanked } });
            }
            _ => {}
        }
    }
    all
}

/// The name of the file that a link leads to.
fn file_of(href: &str) -> String {
    let path = href.split(['#', '?']).next().unwrap_or_default();
    let last = path.rsplit('/').next().unwrap_or_default();
    percent_decode_str(last).decode_utf8_lossy().into_owned()
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
