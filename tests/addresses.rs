//! The build's own addresses against the `url` crate's.

#[path = "../build/url.rs"]
#[allow(dead_code, reason = "the build uses the other part")]
mod own;

use own::{Host, Url};
use proptest::prelude::*;

/// The parts of one that the build looks at; none for what is no address.
type Parts = Option<(String, String, String, Option<String>, Option<String>, Option<u16>, String, String)>;

fn ours(url: Result<Url, own::NoAddress>) -> Parts {
    let url = url.ok()?;
    let rest = format!("{:?} {:?}", url.query(), url.fragment());
    let host = url.host_str().map(str::to_owned);
    Some((
        url.to_string(),
        url.scheme().to_owned(),
        url.username().to_owned(),
        url.password().map(str::to_owned),
        host,
        url.port_or_known_default(),
        url.path().to_owned(),
        rest,
    ))
}

fn theirs(url: Result<url::Url, url::ParseError>) -> Parts {
    let url = url.ok()?;
    let rest = format!("{:?} {:?}", url.query(), url.fragment());
    Some((
        url.to_string(),
        url.scheme().to_owned(),
        url.username().to_owned(),
        url.password().map(str::to_owned),
        url.host_str().map(str::to_owned),
        url.port_or_known_default(),
        url.path().to_owned(),
        rest,
    ))
}

const ADDRESSES: &[&str] = &[
    "http://127.0.0.1:8080/simple/",
    "https://example.org",
    "HTTPS://Example.ORG:443/A/b/../c/./d/?q=1#sha256=ab",
    "http://example.org:80",
    "http://example.org:81/",
    "https://user:pass@example.org/simple/x",
    "https://me%40corp.com:p%40ss%2Fw@example.org/",
    "https://user@example.org/",
    "https://:pass@example.org/",
    "https://a@b@example.org/",
    "http://[::1]:9/x",
    "http://[::1]",
    "http://[bad/",
    "http://",
    "http:///path",
    "ftp://alice:hunter2@127.0.0.1/",
    "alice:hunter2@127.0.0.1/links",
    "file:///tmp/a%20folder/links",
    "file:///tmp/a folder/links",
    "file://localhost/tmp",
    "file://server/share",
    "file:/tmp/x",
    "socks5://127.0.0.1:9",
    "socks5h://proxy.example:1080",
    "  https://example.org/ spaced \n",
    "https://example.org/a\tb",
    "https://example.org\\a\\b",
    "https://example.org/%7euser/ü?ü#ü",
    "https://example.org/a|b^c{d}e`f",
    "https://example.org/'\"<>",
    "https://example.org/?'\"<>",
    "https://exa mple.org/",
    "https://example.org:port/",
    "https://example.org:99999/",
    "https://1.2.3.4.5/",
    "https://1.2.3/",
    "https://example.org/..",
    "https://example.org/a/%2e%2E/b",
    "https://example.org/a//b/",
    "https://example.org?x",
    "https://example.org#x",
    "no address",
    "",
    "/simple",
    "mailto:somebody",
];

/// What this build refuses on purpose, though that crate knows what is meant.
fn is_refused_on_purpose(text: &str) -> bool {
    let host = url::Url::parse(text).ok().and_then(|url| url.host_str().map(str::to_owned));
    // Numbers that are an address only to some programs, a host beyond ASCII, and what a file's address says besides a path.
    text == "https://1.2.3/" || text == "http:///path" || host.is_some_and(|host| host.starts_with("xn--"))
}

#[test]
fn addresses_are_what_the_url_crate_makes_of_them() {
    for text in ADDRESSES.iter().filter(|text| !is_refused_on_purpose(text)) {
        assert_eq!(ours(Url::parse(text)), theirs(url::Url::parse(text)), "{text:?}");
    }
    for text in ["https://1.2.3/", "http:///path", "https://bücher.example/"] {
        assert!(Url::parse(text).is_err(), "{text}");
    }
    assert_eq!(Url::parse("http://10.0.0.1/").expect("an address").host(), Some(Host::Ipv4([10, 0, 0, 1].into())));
}

#[test]
fn links_are_what_the_url_crate_makes_of_them() {
    let pages = [
        "https://u:p@example.org/simple/pkg/",
        "http://127.0.0.1:9/simple/page.html?q#f",
        "file:///tmp/links/index.html",
    ];
    let references = [
        "x.whl#sha256=ab",
        "../x.whl",
        "../../../../x",
        "/x",
        "./x",
        ".",
        "..",
        "",
        "?q=2",
        "#f",
        "//other.example/x",
        "//other.example:8/x?y#z",
        "https://other.example/x",
        "https:x",
        "a b.whl",
        "a%20b.whl",
        "a:b",
        "x?y=/../z",
        "x+cu130.whl",
        "x%2Bcu130.whl",
        "\\x",
        "javascript:x",
        "file:///etc/x",
    ];
    for page in pages {
        for reference in references {
            let found = ours(Url::parse(page).expect("a page").join(reference));
            let expected = theirs(url::Url::parse(page).expect("a page").join(reference));
            // An address of https without its slashes, on a page that is not: that crate guesses a host.
            if reference == "https:x" && !page.starts_with("https:") {
                assert!(found.is_none(), "{page}");
                continue;
            }
            assert_eq!(found, expected, "{reference:?} on {page}");
        }
    }
}

#[test]
fn what_is_set_is_escaped_as_the_url_crate_does() {
    for text in ["me@corp.com", "p@ss/w:rd", "ü%", "", "a+b c"] {
        let (mut own, mut other) =
            (Url::parse("https://example.org/x?y#z").unwrap(), url::Url::parse("https://example.org/x?y#z").unwrap());
        own.set_username(text).unwrap();
        other.set_username(text).unwrap();
        own.set_password(Some(text)).unwrap();
        other.set_password(Some(text)).unwrap();
        own.set_query(None);
        other.set_query(None);
        own.set_fragment(Some(text));
        other.set_fragment(Some(text));
        assert_eq!(own.as_str(), other.as_str(), "{text}");
        own.push(text).unwrap();
        other.path_segments_mut().unwrap().pop_if_empty().push(text);
        assert_eq!(own.as_str(), other.as_str(), "{text}");
    }
    let mut file = Url::parse("file:///tmp/x").unwrap();
    assert!(file.set_username("me").is_err() && file.set_password(Some("x")).is_err());
    let (own, other) = (Url::parse("http://a.example:80/").unwrap(), Url::parse("http://A.example/x").unwrap());
    assert_eq!(own.origin(), other.origin());
    assert_eq!(own.origin().ascii_serialization(), "http://a.example");
}

#[test]
fn paths_of_this_machine_are_there_and_back() {
    for path in ["/", "/tmp/a folder/ü", "/tmp/50%/x#y?z"] {
        let (own, other) = (Url::from_file_path(path).unwrap(), url::Url::from_file_path(path).unwrap());
        assert_eq!(own.as_str(), other.as_str());
        assert_eq!(own.to_file_path().unwrap(), std::path::Path::new(path));
    }
    assert!(Url::from_file_path("relative").is_err());
    for no_path in ["file://server/share", "http://127.0.0.1/x"] {
        assert!(Url::parse(no_path).unwrap().to_file_path().is_err(), "{no_path}");
    }
}

proptest! {
    #[test]
    fn no_link_is_taken_for_another(reference in "[a-z0-9./?#:@%\\\\ +_-]{0,24}") {
        let page = "https://example.org:8443/simple/pkg/";
        let found = ours(Url::parse(page).unwrap().join(&reference));
        let expected = theirs(url::Url::parse(page).unwrap().join(&reference));
        // Refusing what that crate takes is allowed, another address is not; and no other scheme is ever asked.
        if found.as_ref().is_some_and(|parts| ["http", "https", "file"].contains(&parts.1.as_str())) {
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn nothing_makes_it_panic(text in "\\PC{0,40}") {
        let parsed = Url::parse(&text);
        if let Ok(url) = parsed {
            let _ = (url.join(&text), url.to_file_path(), url.origin().ascii_serialization());
        }
    }
}
