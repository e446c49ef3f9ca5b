//! `cargo xtask lock`: fills in what `artifacts.lock` says of each wheel's members, from the wheels themselves.

use std::fs;
use std::io::{BufReader, Read, Seek};
use std::path::PathBuf;

use toml_edit::{DocumentMut, Table, value};

use crate::shell::{self, say};
use crate::vendoring::digest::Digest;
use crate::vendoring::env::Env;
use crate::vendoring::error::{Error, Result, refuse};
use crate::vendoring::fetch::{Client, RemoteFile};
use crate::vendoring::index::{self, Place as PageOrFolder};
use crate::vendoring::lock::{self, Lock, Member, Method, Place, Wheel};
use crate::vendoring::pip::Pip;
use crate::vendoring::source::Ladder;
use crate::vendoring::store::publish_bytes;
use crate::vendoring::wheel::Wheel as Archive;

/// What is to be done.
pub struct Options {
    /// Fail where the file would change, and leave it.
    pub check: bool,
    /// Trust TLS and the wheel's own RECORD instead of the wheel's digest.
    pub from_record: bool,
    /// Another lock file.
    pub file: Option<PathBuf>,
}

/// `cargo xtask lock`
pub fn command(options: &Options) -> Result<()> {
    run(options, &Env::process())
}

fn run(options: &Options, env: &Env) -> Result<()> {
    let path = options.file.clone().unwrap_or_else(|| shell::root().join("artifacts.lock"));
    let text = fs::read_to_string(&path).map_err(|e| Error::io("reading", &path, &e))?;
    let (filled, unseen) = fill(&text, &path.display().to_string(), options.from_record, env)?;
    if filled != text && options.check {
        refuse!("{} differs from what the wheels hold; `cargo xtask lock` corrects it", path.display());
    }
    if filled != text {
        publish_bytes(&path, filled.as_bytes())?;
        say(format!("{} written", path.display()));
    }
    // Said last and as a failure: what was not looked at is not known to be right.
    if !unseen.is_empty() {
        refuse!(
            "{} could not be had, and what {} says of them was not compared with anything; run this again where they can",
            unseen.join(" and "),
            path.display()
        );
    }
    if filled == text {
        say(format!("{} is up to date", path.display()));
    }
    Ok(())
}

/// The text with every member filled in whose wheel can be had, comments and order as they are; and the wheels that cannot.
fn fill(text: &str, name: &str, from_record: bool, env: &Env) -> Result<(String, Vec<String>)> {
    let (lock, mut unseen) = (Lock::parse(text, name)?, Vec::new());
    let mut document: DocumentMut = text.parse().map_err(|e| Error::Refused(format!("{name}: {e}")))?;
    let Some(tables) = document["wheel"].as_array_of_tables_mut() else { refuse!("{name} has no [[wheel]]") };
    for (wheel, table) in lock.wheels.iter().zip(tables.iter_mut()) {
        let facts = if from_record { by_record(wheel, env) } else { by_wheel(wheel, env) };
        let (size, facts) = match facts {
            Ok(facts) => facts,
            Err(Error::Unavailable(fault)) => {
                say(format!("{} for {} stays as it is: {fault}", wheel.distribution, wheel.target));
                unseen.push(wheel.file.clone());
                continue;
            }
            Err(fault) => return Err(fault),
        };
        set(table, "size", size)?;
        let Some(members) = table["member"].as_array_of_tables_mut() else {
            refuse!("{name}: {} has no members", wheel.file)
        };
        for (facts, table) in facts.iter().zip(members.iter_mut()) {
            write(table, facts)?;
        }
        say(format!("{} for {}: {} members", wheel.distribution, wheel.target, facts.len()));
    }
    let filled = document.to_string();
    // What was written must be what this crate reads.
    Lock::parse(&filled, name)?;
    Ok((filled, unseen))
}

/// All that the lock says of a member.
struct Facts {
    place: Place,
    size: u64,
    crc32: u32,
    sha256: Digest,
}

fn write(table: &mut Table, facts: &Facts) -> Result<()> {
    set(table, "size", facts.size)?;
    table["sha256"] = value(facts.sha256.to_string());
    set(table, "offset", facts.place.offset)?;
    set(table, "length", facts.place.length)?;
    set(table, "compressed", facts.place.compressed)?;
    table["method"] = value(match facts.place.method {
        Method::Stored => "stored",
        Method::Deflate => "deflate",
    });
    table["crc32"] = value(format!("{:08x}", facts.crc32));
    Ok(())
}

fn set(table: &mut Table, key: &str, number: u64) -> Result<()> {
    let number = i64::try_from(number).map_err(|_| Error::Refused(format!("{key} = {number} does not fit TOML")))?;
    // Assigning keeps the key's own decoration; a new key goes to the end.
    table[key] = value(number);
    Ok(())
}

/// From a copy of the wheel that has the locked digest.
fn by_wheel(wheel: &Wheel, env: &Env) -> Result<(u64, Vec<Facts>)> {
    let bar = shell::transfer_bar(&wheel.file);
    let mut progress = shell::progress(&bar);
    let mut ladder = Ladder { workspace: Some(shell::root()), ..Ladder::new(env, &mut progress) };
    let found = ladder.find_pinned(wheel, &std::env::temp_dir());
    bar.finish_and_clear();
    let found = found?;
    let size = found.file.metadata().map_err(|e| Error::io("reading", &found.path, &e))?.len();
    let mut archive = Archive::open(BufReader::new(found.file), wheel.file.clone())?;
    let facts = wheel.members.iter().map(|member| {
        let (sha256, size) = archive.copy(&member.unlocked(), &mut std::io::sink(), &found.path)?;
        Ok(Facts { place: archive.place(&member.path)?, size, crc32: archive.crc32(&member.path)?, sha256 })
    });
    Ok((size, facts.collect::<Result<_>>()?))
}

/// By ranges alone, trusting the server and the wheel's own RECORD.
fn by_record(wheel: &Wheel, env: &Env) -> Result<(u64, Vec<Facts>)> {
    if let Some(name) = env.offline() {
        return Err(Error::Unavailable(format!("{name} is set")));
    }
    let client = Client::new(env);
    let mut faults = Vec::new();
    for url in addresses(wheel, env, &client)? {
        match client.size(&url).and_then(|size| Ok((size, recorded(&client, &url, size, wheel)?))) {
            Ok(facts) => return Ok(facts),
            Err(Error::Unavailable(fault)) => faults.push(fault),
            Err(fault) => return Err(fault),
        }
    }
    Err(Error::Unavailable(faults.join("; ")))
}

fn addresses(wheel: &Wheel, env: &Env, client: &Client) -> Result<Vec<String>> {
    let mut urls = Vec::new();
    let find = |client: &Client, page: &str| index::find(client, page, &wheel.file, &wheel.sha256);
    // One on this machine is no address that ranges are asked of.
    let remote = |link: index::Link| Some(link.url).filter(|url| url.starts_with("http"));
    for source in &wheel.sources {
        match source {
            lock::Source::Url(url) => urls.push(url.clone()),
            lock::Source::Index(page) => urls.extend(find(client, page).ok().and_then(remote)),
            lock::Source::Purl(purl) => {
                let pip = Pip::read(env)?;
                let pips = pip.client(client)?;
                for place in index::places(purl, env, &pip)? {
                    let PageOrFolder::Page { url, .. } = place else { continue };
                    urls.extend(find(&pips, &url).ok().and_then(remote));
                }
            }
        }
    }
    Ok(urls)
}

fn recorded(client: &Client, url: &str, size: u64, wheel: &Wheel) -> Result<Vec<Facts>> {
    let mut archive = Archive::open_remote(RemoteFile::new(client, url.to_owned(), size), wheel.file.clone())?;
    let facts = wheel.members.iter().map(|member| fact(&mut archive, member));
    facts.collect()
}

fn fact<R: Read + Seek>(archive: &mut Archive<R>, member: &Member) -> Result<Facts> {
    let recorded = archive.recorded(member)?;
    let (Some(sha256), Some(size)) = (recorded.sha256, recorded.size) else {
        refuse!("the wheel has no member {}; correct its path", member.path);
    };
    Ok(Facts { place: archive.place(&member.path)?, size, crc32: archive.crc32(&member.path)?, sha256 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vendoring::env;

    #[test]
    fn a_check_that_saw_no_wheel_is_no_success() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("artifacts.lock");
        fs::copy(shell::root().join("artifacts.lock"), &file).expect("the lock");
        let text = fs::read_to_string(&file).expect("its text");
        let cache = folder.path().join("cache").display().to_string();
        let env = Env::fixed([(env::OFFLINE, "1"), (env::CACHE_DIR, cache.as_str()), ("HOME", cache.as_str())]);
        for check in [true, false] {
            let options = Options { check, from_record: true, file: Some(file.clone()) };
            let fault = run(&options, &env).expect_err("nothing was looked at").to_string();
            for wheel in Lock::read(&file).expect("the lock").wheels {
                assert!(fault.contains(&wheel.file), "{fault}");
            }
            assert!(fault.contains("was not compared with anything"), "{fault}");
        }
        assert_eq!(fs::read_to_string(&file).expect("its text"), text);
    }
}
