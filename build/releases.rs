//! FlashInfer's releases beside the pinned one: what changed in what this crate calls. Wheels of another release come in by
//! `FLASHINFER_RS_ALLOW_VERSION`, and a call with the arguments of another release is no error that anybody notices.

/// Whose wheels these are.
pub use super::names::JIT_CACHE as DISTRIBUTION;

/// A release: its three numbers.
type Release = [u32; 3];

/// A change of what a library's functions take or do.
#[derive(Debug, PartialEq, Eq)]
pub struct Change {
    since: Release,
    /// What the sonames of the libraries begin with.
    libraries: &'static [&'static str],
    what: &'static str,
}

/// Whatever is in the wheel.
const ALL: &[&str] = &[""];

/// By release. A change that this crate does not meet, in a function that it does not call, is not here.
const CHANGES: &[Change] = &[
    change([0, 6, 4], &["sampling.so"], "its functions take the random numbers' seed in other arguments"),
    change(
        [0, 6, 7],
        &["norm.so"],
        "rmsnorm_quant and fused_add_rmsnorm_quant take the scale as a tensor, not as a number",
    ),
    change([0, 6, 7], &["sampling.so"], "its functions take a tensor `valid` besides"),
    change([0, 6, 8], &["gdn_prefill_sm90.so"], "gdn_prefill takes three arguments more"),
    change([0, 6, 14], &["gdn_prefill_sm90.so"], "it is in no wheel any more"),
    change([0, 6, 14], &["batch_mla_attention"], "its `run` takes other arguments"),
    change([0, 6, 16], &["batch_prefill"], "its `plan` takes other arguments"),
    change(
        SPLIT,
        ALL,
        "they are in one wheel for each GPU architecture, such as flashinfer_jit_cache_sm90a, while flashinfer_jit_cache \
         itself has none, and need TVM-FFI 0.1.11 or newer",
    ),
];

/// Since this release each GPU architecture has a wheel of its own, of a distribution of its own: what was one wheel names them
/// as its requirements, and has no library. Names and places are those of upstream's own checks of what it publishes; the wheels
/// of no such release were at hand here.
const SPLIT: Release = [0, 7, 0];

/// Whether a release's libraries are in one wheel for each GPU architecture.
pub fn is_split(version: &str) -> bool {
    release(version).is_some_and(|release| release >= SPLIT)
}

/// Where a library lies in the wheel for one architecture, by its place in the wheel for all.
pub fn path_in_split(path: &str, variant: &str) -> String {
    path.replacen("flashinfer_jit_cache/jit_cache/", &format!("flashinfer_jit_cache/providers/{variant}/jit_cache/"), 1)
}

const fn change(since: Release, libraries: &'static [&'static str], what: &'static str) -> Change {
    Change { since, libraries, what }
}

/// Libraries that were compared, release by release, and take the same in all of them.
const SAME: &[&str] = &["page.so", "rope.so"];

/// The releases that were compared with each other, the first and the last.
const COMPARED: [Release; 2] = [[0, 6, 3], [0, 6, 16]];

/// What is known of the way from one release to another.
#[derive(Debug, PartialEq, Eq)]
pub enum Difference {
    /// These libraries are not what they were, and how.
    Changed(Vec<String>),
    /// What is not known.
    Unknown(String),
    None,
}

/// What differs between two releases for these libraries.
pub fn difference<'a>(one: &str, other: &str, libraries: impl IntoIterator<Item = &'a str>) -> Difference {
    let libraries: Vec<&str> = libraries.into_iter().collect();
    let (Some(first), Some(second)) = (release(one), release(other)) else {
        return Difference::Unknown(format!("nothing is known of what changed between {one} and {other}"));
    };
    let (from, to) = (first.min(second), first.max(second));
    let concerns = |change: &&Change, library: &str| change.libraries.iter().any(|start| library.starts_with(start));
    let changes: Vec<&Change> = CHANGES.iter().filter(|change| from < change.since && change.since <= to).collect();
    let changed: Vec<String> = changes
        .iter()
        .filter_map(|change| {
            let of: Vec<&str> = libraries.iter().copied().filter(|library| concerns(change, library)).collect();
            let [major, minor, patch] = change.since;
            let of = match of.as_slice() {
                [] => return None,
                _ if change.libraries == ALL => "all libraries".to_owned(),
                [first, rest @ ..] if rest.len() > 2 => format!("{first} and {} more", rest.len()),
                few => few.join(", "),
            };
            Some(format!("{of} since {major}.{minor}.{patch}: {}", change.what))
        })
        .collect();
    if !changed.is_empty() {
        return Difference::Changed(changed);
    }
    if from < COMPARED[0] || to > COMPARED[1] {
        let [low, high] = COMPARED.map(|release| release.map(|number| number.to_string()).join("."));
        return Difference::Unknown(format!("only the releases from {low} to {high} were compared with each other"));
    }
    let is_known = |library: &&str| {
        let compared = CHANGES.iter().filter(|change| change.libraries != ALL).any(|change| concerns(&change, library));
        SAME.contains(library) || compared
    };
    let unknown: Vec<&str> = libraries.iter().copied().filter(|library| !is_known(library)).collect();
    match unknown.as_slice() {
        _ if from == to => Difference::None,
        [] => Difference::None,
        [first, rest @ ..] if rest.len() > 2 => {
            Difference::Unknown(format!("{first} and {} more were not compared between releases", rest.len()))
        }
        few => Difference::Unknown(format!("{} were not compared between releases", few.join(", "))),
    }
}

/// A version's release: `0.6.8` of `0.6.8+cu130`, `0.6.8rc1` and `0.6.8.dev20260101`.
fn release(version: &str) -> Option<Release> {
    let public = version.split('+').next().unwrap_or_default();
    let mut parts = public.splitn(4, '.').map(|part| {
        let digits = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
        part[..digits].parse::<u32>().ok()
    });
    Some([parts.next()??, parts.next()??, parts.next().flatten().unwrap_or(0)])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(one: &str, other: &str, library: &str) -> Vec<String> {
        match difference(one, other, [library]) {
            Difference::Changed(changes) => changes,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn versions_are_releases_with_things_around_them() {
        for (version, expected) in [
            ("0.6.3+cu130", Some([0, 6, 3])),
            ("0.6.8rc1", Some([0, 6, 8])),
            ("0.6.8.dev20260101+cu130", Some([0, 6, 8])),
            ("0.7", Some([0, 7, 0])),
            ("0.6.8.post1", Some([0, 6, 8])),
            ("nightly", None),
            ("", None),
        ] {
            assert_eq!(release(version), expected, "{version}");
        }
    }

    #[test]
    fn changes_count_from_their_release_on_in_both_directions() {
        assert_eq!(difference("0.6.3+cu130", "0.6.6+cu130", ["norm.so"]), Difference::None);
        for (one, other) in [("0.6.3", "0.6.7"), ("0.6.7", "0.6.3"), ("0.6.3", "0.6.16")] {
            assert!(changed(one, other, "norm.so")[0].starts_with("norm.so since 0.6.7: rmsnorm_quant"));
        }
        assert_eq!(difference("0.6.7", "0.6.16", ["norm.so"]), Difference::None);
        assert_eq!(changed("0.6.3", "0.6.14", "gdn_prefill_sm90.so").len(), 2);
        assert!(changed("0.6.3", "0.7.2", "page.so")[0].contains("0.1.11"));
    }

    #[test]
    fn what_was_not_compared_is_said() {
        for (one, other, library, what) in [
            ("0.6.3", "0.6.2", "norm.so", "0.6.3 to 0.6.16"),
            ("0.6.3", "0.6.17", "page.so", "0.6.3 to 0.6.16"),
            ("0.6.3", "0.6.4", "cascade.so", "cascade.so were not compared"),
            ("0.6.3", "nightly", "page.so", "nothing is known"),
        ] {
            let Difference::Unknown(text) = difference(one, other, [library]) else { panic!("{library}") };
            assert!(text.contains(what), "{text}");
        }
        assert_eq!(difference("0.6.3", "0.6.9", ["page.so", "rope.so"]), Difference::None);
        assert_eq!(difference("0.6.3+cu130", "0.6.3", ["cascade.so"]), Difference::None);
    }
}
