//! Members by byte ranges: a megabyte instead of the whole wheel. Every member is checked against its own locked digest,
//! so nothing of the rest needs to be seen.

use std::io::Read;

use super::error::{Error, Result, refuse};
use super::fetch::{Client, RemoteFile};
use super::lock::{Member, Place};
use super::wheel::Wheel as Archive;

/// Members this close are fetched by one request: less than what a request's own header costs.
const GAP: u64 = 64;

/// Whether members can be fetched without the rest of the wheel.
pub fn possible(members: &[&Member]) -> bool {
    !members.is_empty() && members.iter().all(|member| member.size.is_some() && member.sha256.is_some())
}

/// Fetches members out of the wheel of `size` bytes at `url`. `each` gets a member, its place and a reader of exactly the
/// bytes there, and must check what it makes of them.
pub fn fetch<'a>(
    client: &Client,
    url: &str,
    size: u64,
    members: &[&'a Member],
    mut each: impl FnMut(&'a Member, Place, &mut dyn Read) -> Result<()>,
) -> Result<u64> {
    let mut pieces = places(client, url, size, members)?;
    pieces.sort_by_key(|(_, place)| place.offset);
    let mut fetched = 0;
    while !pieces.is_empty() {
        let together = run(&pieces);
        let run: Vec<_> = pieces.drain(..together).collect();
        let (first, last) = (run[0].1.offset, end(run[run.len() - 1].1));
        if last > size {
            refuse!(
                "artifacts.lock: {} ends at byte {last} of a wheel of {size}; restore the file from the crate's release",
                run[run.len() - 1].0.path
            );
        }
        let mut body = client.range(url, first, last - 1, size)?;
        fetched += last - first;
        let mut position = first;
        for (member, place) in run {
            skip(&mut body, place.offset - position, member)?;
            let mut part = (&mut body).take(place.length);
            each(member, place, &mut part)?;
            let left = part.limit();
            position = place.offset + place.length - left;
        }
    }
    Ok(fetched)
}

/// How many of the first pieces one range covers.
fn run(pieces: &[(&Member, Place)]) -> usize {
    let apart = |pair: &[(&Member, Place)]| {
        let gap = pair[1].1.offset.checked_sub(end(pair[0].1));
        gap.is_none_or(|gap| gap > GAP)
    };
    pieces.windows(2).position(apart).map_or(pieces.len(), |i| i + 1)
}

fn end(place: Place) -> u64 {
    place.offset.saturating_add(place.length)
}

/// Where the lock says that they lie; else where the wheel's central directory says so, for one or two ranges more.
fn places<'a>(client: &Client, url: &str, size: u64, members: &[&'a Member]) -> Result<Vec<(&'a Member, Place)>> {
    let locked: Option<Vec<_>> = members.iter().map(|member| Some((*member, member.place()?))).collect();
    if let Some(locked) = locked {
        return Ok(locked);
    }
    let name = super::fetch::redacted(url);
    // Whether the server has no ranges or the directory makes no sense: the whole wheel's digest decides.
    let unknown = |fault: Error| Error::Unavailable(fault.message().to_owned());
    let archive = Archive::open_remote(RemoteFile::new(client, url.to_owned(), size), name).map_err(unknown)?;
    members.iter().map(|member| Ok((*member, archive.place(&member.path).map_err(unknown)?))).collect()
}

fn skip(body: &mut impl Read, count: u64, member: &Member) -> Result<()> {
    let skipped = std::io::copy(&mut body.take(count), &mut std::io::sink());
    match skipped {
        Ok(skipped) if skipped == count => Ok(()),
        _ => Err(Error::Unavailable(format!("the transfer broke off before {}", member.path))),
    }
}
