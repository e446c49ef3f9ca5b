//! Over index pages on loopback.

use super::*;

use crate::http::{Reply, Server};

const PAGE: &str = "/whl/cu130/flashinfer-jit-cache/";
const DIGEST: &str = "abababababababababababababababababababababababababababababababab";

/// This crate's own lock, whose index page is on a server that lists these files.
fn proposed(files: &[&str], wanted: &Wanted<'_>) -> Result<(String, Vec<String>)> {
    proposed_from(PAGE, files, wanted)
}

/// As [`proposed`], with these files on another page of that server.
fn proposed_from(page: &str, files: &[&str], wanted: &Wanted<'_>) -> Result<(String, Vec<String>)> {
    let server = Server::start();
    let links: String = files
        .iter()
        .map(|file| format!("<a href=\"/release/{}#sha256={DIGEST}\">{file}</a>\n", file.replace('+', "%2B")))
        .collect();
    server.on(page, [Reply::ok(format!("<!DOCTYPE html><html><body>{links}</body></html>"))]);
    let text = fs::read_to_string(shell::root().join("artifacts.lock")).expect("the lock");
    let page = Lock::parse(&text, "artifacts.lock").expect("the lock").wheels.into_iter().find_map(|wheel| {
        wheel.sources.into_iter().find_map(|source| if let Source::Index(page) = source { Some(page) } else { None })
    });
    let text = text.replace(&page.expect("an index page"), &server.url(PAGE));
    propose(&text, "artifacts.lock", wanted, &Env::fixed::<&str, &str>([]))
}

fn files(version: &str) -> [String; 2] {
    ["x86_64", "aarch64"].map(|arch| format!("flashinfer_jit_cache-{version}-cp39-abi3-manylinux_2_28_{arch}.whl"))
}

fn refs(files: &[String]) -> Vec<&str> {
    files.iter().map(String::as_str).collect()
}

#[test]
fn another_release_takes_the_pinned_ones_place_and_what_differs_is_said() {
    let all = [files("0.6.7+cu130"), files("0.6.8+cu130"), files("0.6.8+cu128")].concat();
    let (text, notes) = proposed(&refs(&all), &Wanted { release: "0.6.8", variant: None }).expect("a proposal");
    let lock = Lock::parse(&text, "proposal").expect("a lock");
    for (wheel, file) in lock.wheels.iter().filter(|wheel| wheel.distribution == DISTRIBUTION).zip(files("0.6.8+cu130"))
    {
        assert_eq!((wheel.version.as_str(), &wheel.file, wheel.size), ("0.6.8+cu130", &file, None));
        assert_eq!(wheel.sha256.to_string(), DIGEST);
        assert!(wheel.members.iter().all(|member| member.place().is_none() && member.sha256.is_none()));
        let [Source::Url(url), Source::Index(_)] = wheel.sources.as_slice() else { panic!("{:?}", wheel.sources) };
        assert!(url.ends_with(&format!("/release/{}", file.replace('+', "%2B"))), "{url}");
    }
    // What belongs to no release of FlashInfer stays.
    assert!(
        lock.wheels.iter().any(|wheel| wheel.distribution == "apache_tvm_ffi" && wheel.members[0].sha256.is_some())
    );
    for part in ["rmsnorm_quant", "gdn_prefill takes three arguments more"] {
        assert!(notes.iter().any(|note| note.contains(part)), "{notes:?}");
    }
}

/// As upstream publishes them: a page for each architecture, and on the page of old a wheel that has no library.
#[test]
fn wheels_by_architecture_need_a_variant_and_are_on_pages_of_their_own() {
    let shim = files("0.7.2+cu130");
    let fault =
        proposed(&refs(&shim), &Wanted { release: "0.7.2", variant: None }).expect_err("no libraries").to_string();
    assert!(fault.contains("0.7.2 has no wheel with all libraries") && fault.contains("--variant"), "{fault}");
    let all = [shim, files("0.7.2+cu130").map(|file| file.replace("jit_cache-", "jit_cache_sm90a-"))].concat();
    let page = "/whl/cu130/flashinfer-jit-cache-sm90a/";
    let ask = |page, variant| proposed_from(page, &refs(&all), &Wanted { release: "0.7.2", variant });
    assert!(ask(page, Some("sm100a")).is_err());
    assert!(ask(PAGE, Some("sm90a")).is_err());
    let (text, notes) = ask(page, Some("sm90a")).expect("a proposal");
    let lock = Lock::parse(&text, "proposal").expect("a lock");
    for wheel in lock.wheels.iter().filter(|wheel| wheel.distribution.starts_with(DISTRIBUTION)) {
        assert_eq!((wheel.distribution.as_str(), wheel.variant.as_deref()), ("flashinfer_jit_cache_sm90a", None));
        assert_eq!(wheel.variable(), "FLASHINFER_RS_JIT_CACHE_SM90A_WHEEL");
        assert!(matches!(&wheel.sources[1], Source::Index(at) if at.ends_with(page)), "{:?}", wheel.sources);
        let norm = wheel.members.iter().find(|member| member.soname == "norm.so").expect("the library");
        assert_eq!(norm.path, "flashinfer_jit_cache/providers/sm90a/jit_cache/norm/norm.so");
    }
    assert!(notes[0].contains("TVM-FFI 0.1.11"), "{notes:?}");
}

#[test]
fn a_release_that_is_not_there_is_answered_with_those_that_are() {
    let all = [files("0.6.7+cu130"), files("0.6.8+cu130")].concat();
    let fault = proposed(&refs(&all), &Wanted { release: "0.6.9", variant: None }).expect_err("no release").to_string();
    assert!(fault.contains("no wheel of 0.6.9") && fault.contains("0.6.7, 0.6.8"), "{fault}");
}

#[test]
fn a_file_without_a_digest_is_not_proposed() {
    let wheel = files("0.6.8+cu130");
    let text = fs::read_to_string(shell::root().join("artifacts.lock")).expect("the lock");
    let lock = Lock::parse(&text, "artifacts.lock").expect("the lock");
    let link = Link { url: "https://example.invalid/x.whl".to_owned(), sha256: None, yanked: None };
    let chosen = Candidate::of(&lock.wheels[0], wheel[0].clone(), link).expect("a wheel of this kind");
    let fault = write(&mut Table::new(), &chosen).expect_err("no digest").to_string();
    assert!(fault.contains("no SHA-256") && fault.contains(&wheel[0]), "{fault}");
}
