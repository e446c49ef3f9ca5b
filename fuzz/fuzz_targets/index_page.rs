//! Any text as a package index's page, JSON or HTML: no link, or one over http or https.
#![no_main]

#[path = "../../build/mod.rs"]
mod vendoring;

use libfuzzer_sys::fuzz_target;
use vendoring::index;

const PAGE: &str = "https://index.invalid/simple/some-kernels/";
const FILE: &str = "some_kernels-1.0-py3-none-any.whl";

fuzz_target!(|text: &str| {
    let page = vendoring::url::Url::parse(PAGE).expect("an address");
    for content_type in ["application/vnd.pypi.simple.v1+json", "text/html"] {
        if let Ok(Some(link)) = index::parse(&page, content_type, text, FILE) {
            assert!(link.url.starts_with("http://") || link.url.starts_with("https://"), "{}", link.url);
            assert!(!link.url.contains('#'), "{}", link.url);
        }
    }
});
