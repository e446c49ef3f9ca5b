//! A wheel that is read once. Whoever else may write it can change it between two readings: that of its digest and that of its
//! members. So what is wanted of it is copied while it is hashed, into a file that has no name.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::Path;

use super::digest::{Digest, Hasher};
use super::error::{Error, Result};
use super::layout;

/// Members of no more bytes are copied whole, wanted or not: what a wheel says of itself is among them.
const SMALL: u64 = 1 << 16;
/// Of the others, what comes before the data and after it.
const HEAD: u64 = 1 << 12;
const TAIL: u64 = 24;

/// Reads a wheel to its end and answers its digest, with a copy that has the wanted members, and all else but most of the data
/// of the others; where none is wanted by its name, all. The copy lies in `folder`, without a name. What cannot be read is unavailable; a copy that cannot be
/// written is refused.
pub fn take(mut wheel: &File, name: &Path, wanted: &[&str], folder: &Path) -> Result<(Digest, File)> {
    let reading = |e: std::io::Error| Error::Unavailable(format!("reading {} failed: {e}", name.display()));
    let writing = |e: std::io::Error| Error::io("writing to the folder", folder, &e);
    // By what the archive says before it is hashed; what it says later makes no difference to what is copied.
    let mut parts = parts(wheel, wanted).into_iter().peekable();
    let mut copy = tempfile::tempfile_in(folder).map_err(writing)?;
    wheel.seek(SeekFrom::Start(0)).map_err(reading)?;
    let (mut hasher, mut buffer, mut position) = (Hasher::new(), vec![0; 1 << 18], 0u64);
    loop {
        let n = match wheel.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(reading(e)),
        };
        hasher.update(&buffer[..n]);
        let end = position + n as u64;
        while let Some(part) = parts.peek().filter(|part| part.start < end) {
            let (from, to) = (part.start.max(position), part.end.min(end));
            if from < to {
                copy.seek(SeekFrom::Start(from)).map_err(writing)?;
                copy.write_all(&buffer[(from - position) as usize..(to - position) as usize]).map_err(writing)?;
            }
            if part.end > end {
                break;
            }
            parts.next();
        }
        position = end;
    }
    copy.set_len(position).map_err(writing)?;
    copy.seek(SeekFrom::Start(0)).map_err(writing)?;
    Ok((hasher.finish(), copy))
}

/// What is to be copied, in order. All of what is no archive, so that the reason can be found in the copy.
fn parts(mut wheel: &File, wanted: &[&str]) -> Vec<Range<u64>> {
    let (mut parts, all) = (Vec::new(), 0..u64::MAX);
    let Ok(directory) = layout::directory(&mut wheel) else { return Vec::from([all]) };
    for (name, span) in directory.spans() {
        let whole = span.end - span.start <= SMALL
            || wanted.is_empty()
            || wanted.iter().any(|wanted| wanted.as_bytes() == name);
        match whole {
            true => parts.push(span),
            false => parts.extend([span.start..span.start + HEAD, span.end - TAIL..span.end]),
        }
    }
    parts.push(directory.start()..u64::MAX);
    parts.sort_by_key(|part: &Range<u64>| part.start);
    // A damaged directory may have them overlap.
    parts.dedup_by(|next, part| {
        let overlap = next.start <= part.end;
        if overlap {
            part.end = part.end.max(next.end);
        }
        overlap
    });
    parts
}
