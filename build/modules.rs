//! `FLASHINFER_RS_MODULES`: further modules of the jit-cache wheel, by name. Features name the usual ones; the wheel has
//! hundreds. And what the lock itself has a name for, such as cuBLASLt, which is too large to come with a feature.
//!
//! A module that the lock does not list has no digest there. So it is never fetched by byte ranges, nor kept by itself: it comes out of a
//! wheel that was checked as a whole. Of a wheel that is not the pinned one it is checked against that wheel's RECORD,
//! as every member is.

use super::env::{Env, MODULES};
use super::error::{Result, refuse};
use super::lock::{Lock, Member};
use super::names::JIT_CACHE;

/// How many names a refusal proposes.
const PROPOSED: usize = 3;

/// Adds the modules that the environment names to the lock's jit-cache wheels, where they are no names of the lock's own.
pub fn add(lock: &mut Lock, env: &Env) -> Result<()> {
    let Some(text) = env.text(MODULES) else { return Ok(()) };
    for name in names(&text)? {
        let members = lock.wheels.iter_mut().flat_map(|wheel| &mut wheel.members);
        let mut listed = false;
        for member in members.filter(|member| member.name.as_ref() == Some(&name)) {
            (member.named, listed) = (true, true);
        }
        if listed {
            continue;
        }
        for wheel in lock.wheels.iter_mut().filter(|wheel| wheel.distribution == JIT_CACHE) {
            let path = path(&name);
            match wheel.members.iter_mut().find(|member| member.path == path) {
                // Wanted by name, whatever the features want.
                Some(member) => (member.feature, member.named) = (None, true),
                None => wheel.members.push(Member { named: true, ..Member::at(path) }),
            }
        }
    }
    Ok(())
}

/// Where a module lies in the wheel.
pub fn path(name: &str) -> String {
    format!("{JIT_CACHE}/jit_cache/{name}/{name}.so")
}

/// The module that lies there.
pub fn name(path: &str) -> Option<&str> {
    let name = path.rsplit('/').next()?.strip_suffix(".so")?;
    (self::path(name) == path).then_some(name)
}

/// The names in a list, which commas or spaces separate.
fn names(text: &str) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for part in text.split(',') {
        if part.trim().is_empty() {
            refuse!("{MODULES}={text} has an empty name between two commas or at an end; remove the comma");
        }
        for name in part.split_whitespace() {
            // It becomes part of a path, in the wheel and on disk.
            if !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
                refuse!(
                    "{MODULES} names `{}`, which is not the name of a module: letters, digits and `_`; write `page` for \
                     page.so, say",
                    name.escape_debug()
                );
            }
            all.push(name.to_owned());
        }
    }
    Ok(all)
}

/// Why a member that was asked for by name cannot be had from a wheel that has these.
pub fn unknown<'a>(member: &Member, from: &str, is_local: bool, paths: impl Iterator<Item = &'a str>) -> String {
    let asked = name(&member.path).unwrap_or(&member.path);
    let mut known: Vec<&str> = paths.filter_map(name).collect();
    // Of long names a part is what one remembers.
    known.sort_by_cached_key(|known| (!known.contains(asked), distance(asked, known), *known));
    let count = known.len();
    known.truncate(PROPOSED);
    let nearest = match known.as_slice() {
        [] => "it has no module at all".to_owned(),
        some => format!("nearest of the {count} modules that it has are {}", some.join(", ")),
    };
    let remedy = match is_local {
        true => "build it beside the others with `cargo xtask wheel --kernels`",
        false => "use the pinned wheel",
    };
    format!(
        "{MODULES} names `{asked}`, and {from} has no member {}; {nearest}; correct the name, or {remedy}",
        member.path
    )
}

/// How many letters must be inserted, removed or replaced to make one of the other.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
