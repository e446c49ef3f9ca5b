//! `cargo xtask lock --release`: a lock for another release of FlashInfer, as far as its index page tells.

use std::fs;
use std::path::Path;

use toml_edit::{Array, DocumentMut, InlineTable, Table, Value, value};

use crate::shell::{self, say};
use crate::vendoring::env::Env;
use crate::vendoring::error::{Error, Result, refuse};
use crate::vendoring::fetch::{Client, redacted};
use crate::vendoring::index::{self, Link};
use crate::vendoring::lock::{Lock, Source, Wheel};
use crate::vendoring::releases::{self, DISTRIBUTION, Difference};
use crate::vendoring::store::publish_bytes;

/// What of a member is true of one wheel alone.
const OF_ONE_WHEEL: [&str; 7] = ["size", "sha256", "offset", "length", "compressed", "method", "crc32"];

/// Which wheels.
pub struct Wanted<'a> {
    pub release: &'a str,
    pub variant: Option<&'a str>,
}

pub fn command(wanted: &Wanted<'_>, file: Option<&Path>, out: Option<&Path>) -> Result<()> {
    let path = file.map_or_else(|| shell::root().join("artifacts.lock"), Path::to_owned);
    let text = fs::read_to_string(&path).map_err(|e| Error::io("reading", &path, &e))?;
    let (proposal, notes) = propose(&text, &path.display().to_string(), wanted, &Env::process())?;
    notes.iter().for_each(say);
    match out {
        Some(out) => {
            publish_bytes(out, proposal.as_bytes())?;
            say(format!("{} written; `cargo xtask lock --file` fills in its members", out.display()));
        }
        None => print!("{proposal}"),
    }
    Ok(())
}

/// The lock with that release's wheels in the place of the pinned ones, and what is to be known of them.
fn propose(text: &str, name: &str, wanted: &Wanted<'_>, env: &Env) -> Result<(String, Vec<String>)> {
    let (lock, client) = (Lock::parse(text, name)?, Client::new(env));
    let mut document: DocumentMut = text.parse().map_err(|e| Error::Refused(format!("{name}: {e}")))?;
    let Some(tables) = document["wheel"].as_array_of_tables_mut() else { refuse!("{name} has no [[wheel]]") };
    let mut notes = Vec::new();
    for (wheel, table) in
        lock.wheels.iter().zip(tables.iter_mut()).filter(|(wheel, _)| wheel.distribution == DISTRIBUTION)
    {
        if let Some(name) = env.offline() {
            refuse!("a release is looked up on its index page, and {name} is set; unset it");
        }
        let chosen = choose(&client, wheel, wanted)?;
        let sonames = wheel.members.iter().map(|member| member.soname.as_str());
        let note = match releases::difference(&wheel.version, &chosen.version, sonames) {
            Difference::Changed(changes) => format!("not as in {}: {}", wheel.version, changes.join("; ")),
            Difference::Unknown(what) => what,
            Difference::None => format!("nothing that this crate calls is known to differ from {}", wheel.version),
        };
        notes.push(format!("{}: {note}", chosen.file));
        notes.extend(chosen.link.yanked.as_ref().map(|reason| format!("{} was withdrawn: {reason}", chosen.file)));
        write(table, &chosen)?;
    }
    let proposal = document.to_string();
    // What was written must be what this crate reads.
    Lock::parse(&proposal, name)?;
    Ok((proposal, notes))
}

/// A wheel that a page lists, by what its file's name says.
struct Candidate {
    distribution: String,
    version: String,
    /// What it has in its name besides the pinned wheel's kind of version.
    variant: Option<String>,
    file: String,
    link: Link,
    /// The page that lists it.
    page: String,
}

impl Candidate {
    /// Of this wheel's distribution, CUDA and target.
    fn of(wheel: &Wheel, file: String, link: Link) -> Option<Self> {
        let mut parts: Vec<&str> = file.strip_suffix(".whl")?.split('-').collect();
        let (platforms, _abi, _python) = (parts.pop()?, parts.pop()?, parts.pop()?);
        let arch = wheel.target.split('-').next().unwrap_or_default();
        let fits = |platform: &str| platform.contains("linux") && platform.ends_with(arch);
        let [distribution, version, build @ ..] = parts.as_slice() else { return None };
        let after = distribution.strip_prefix(DISTRIBUTION)?;
        let local = version.split_once('+').map_or("", |(_, local)| local);
        let pinned = wheel.version.split_once('+').map_or("", |(_, local)| local);
        let more = local.strip_prefix(pinned)?;
        if !platforms.split('.').any(fits) || !(after.is_empty() || after.starts_with('_')) {
            return None;
        }
        let variant = [after.trim_start_matches('_'), more.trim_start_matches(['.', '_'])].into_iter();
        let variant: Vec<&str> = variant.chain(build.iter().copied()).filter(|part| !part.is_empty()).collect();
        let variant = Some(variant.join("-")).filter(|variant| !variant.is_empty());
        let (distribution, version) = ((*distribution).to_owned(), (*version).to_owned());
        Some(Self { distribution, version, variant, file, link, page: String::new() })
    }

    fn release(&self) -> &str {
        self.version.split('+').next().unwrap_or_default()
    }
}

/// The one wheel of the release that stands in for this one.
fn choose(client: &Client, wheel: &Wheel, wanted: &Wanted<'_>) -> Result<Candidate> {
    let pages: Vec<&String> = wheel
        .sources
        .iter()
        .filter_map(|source| if let Source::Index(page) = source { Some(page) } else { None })
        .collect();
    let Some(page) = pages.first() else {
        refuse!(
            "{} for {} names no index page to look on; add `{{ index = \"…\" }}` to its sources",
            wheel.file,
            wheel.target
        )
    };
    let page = match wanted.variant {
        Some(variant) if releases::is_split(wanted.release) => page_of(page, variant),
        None if releases::is_split(wanted.release) => refuse!(
            "{} has no wheel with all libraries: from 0.7.0 on there is one for each GPU architecture; say which by --variant, \
             sm90a for example",
            wanted.release
        ),
        _ => (*page).clone(),
    };
    let page = &page;
    let shown = redacted(page);
    let listed = index::list(client, page)?.into_iter();
    let all: Vec<Candidate> = listed.filter_map(|(file, link)| Candidate::of(wheel, file, link)).collect();
    let mut releases: Vec<String> = all.iter().map(|candidate| candidate.release().to_owned()).collect();
    releases.dedup();
    let mut found: Vec<Candidate> = all.into_iter().filter(|candidate| candidate.release() == wanted.release).collect();
    let variants: Vec<&str> = found.iter().filter_map(|candidate| candidate.variant.as_deref()).collect();
    let (count, variants) = (found.len(), variants.join(", "));
    if let Some(variant) = wanted.variant {
        found.retain(|candidate| candidate.variant.as_deref() == Some(variant));
    }
    match (found.pop(), found.is_empty()) {
        (Some(candidate), true) => Ok(Candidate { page: page.clone(), ..candidate }),
        (None, _) if count == 0 => {
            refuse!("{shown} has no wheel of {} for {}; it has {}", wanted.release, wheel.target, releases.join(", "))
        }
        _ => refuse!(
            "{shown} has {count} wheels of {} for {}, and a lock names one: say which by --variant, one of {variants}",
            wanted.release,
            wheel.target
        ),
    }
}

/// The index page of the distribution for one architecture, beside that of the distribution that was for all.
fn page_of(page: &str, variant: &str) -> String {
    format!("{}-{variant}/", page.trim_end_matches('/'))
}

/// Puts the chosen wheel into the pinned one's place.
fn write(table: &mut Table, chosen: &Candidate) -> Result<()> {
    let Some(sha256) = &chosen.link.sha256 else {
        refuse!("the page has no SHA-256 of {}; get the wheel, and write its digest into the lock by hand", chosen.file)
    };
    table["distribution"] = value(&chosen.distribution);
    table["version"] = value(&chosen.version);
    table["file"] = value(&chosen.file);
    table["sha256"] = value(sha256);
    // A distribution of its own needs nothing else to be told from others.
    match chosen.variant.as_ref().filter(|_| chosen.distribution == DISTRIBUTION) {
        Some(variant) => table["variant"] = value(variant),
        None => drop(table.remove("variant")),
    }
    table.remove("size");
    let source = |key: &str, address: &str| {
        let mut source = InlineTable::new();
        source.insert(key, address.into());
        Value::InlineTable(source)
    };
    let sources: Array = [source("url", &chosen.link.url), source("index", &chosen.page)].into_iter().collect();
    table["sources"] = value(sources);
    let members = table["member"].as_array_of_tables_mut().into_iter().flat_map(|members| members.iter_mut());
    for member in members {
        for key in OF_ONE_WHEEL {
            member.remove(key);
        }
        let path = member.get("path").and_then(|path| path.as_str()).map(str::to_owned);
        if let (Some(path), Some(variant), true) = (path, &chosen.variant, releases::is_split(&chosen.version)) {
            member["path"] = value(releases::path_in_split(&path, variant));
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "release/tests.rs"]
mod tests;
