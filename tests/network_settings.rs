//! What a machine says of its network, as a specification: proxies and who is asked without one, certificates, user and
//! password, pip's and uv's settings. No network beyond loopback; every test has its own machine and servers.

#[path = "../build/mod.rs"]
mod vendoring;

mod support {
    pub mod http;
    pub mod machine;
    pub mod proxy;
    pub mod tls;
    pub mod wheels;
}

use support::http::{Refusing, Reply, Server};
use support::machine::{Machine, assert_says, bytes_of, pages};
use support::proxy::Proxy;
use support::tls::{self, Encrypted};
use support::wheels::{Pin, Wheel};
use vendoring::env::Env;
use vendoring::error::Result;
use vendoring::url::Url;

const RELEASE: &str = "/release.whl";
const PURL: &str = "pkg:pypi/nvidia-cuda-runtime@13.0.96";
const PAGE: &str = "/simple/nvidia-cuda-runtime/";

/// A server that has the wheel, and the lock's entry that names it.
fn released() -> (Server, Pin) {
    let server = Server::start();
    server.on(RELEASE, [Reply::ok(Wheel::cudart().bytes())]);
    let pin = Wheel::cudart().pin().url(server.url(RELEASE));
    (server, pin)
}

/// Where an index of these tests has the file.
fn file() -> String {
    format!("/files/{}", Wheel::cudart().file())
}

/// A page whose link to the wheel begins so.
fn page(link: &str) -> Reply {
    let name = Wheel::cudart().file();
    Reply::ok(format!("<a href=\"{link}/{name}\">{name}</a>"))
}

/// An index with the wheel.
fn index() -> Server {
    let server = Server::start();
    server.on(PAGE, [page("/files")]);
    server.on(&file(), [Reply::ok(Wheel::cudart().bytes())]);
    server
}

fn by_index() -> Pin {
    Wheel::cudart().pin().purl(PURL)
}

/// That the machine gets the wheel.
#[track_caller]
fn gets(machine: &Machine, pin: &Pin) {
    let found = machine.find(&pin.parsed()).expect("the wheel");
    assert_eq!(bytes_of(&found), Wheel::cudart().bytes());
}

/// The addresses of an environment's pages.
fn named(machine: &Machine) -> Vec<String> {
    pages(PURL, &machine.env()).expect("the pages").into_iter().map(|(url, _)| url).collect()
}

mod proxies {
    use super::*;
    use vendoring::proxy::Proxies;

    /// What stands in the messages of the proxy for an address.
    fn chosen(variables: &[(&str, &str)], url: &str) -> Result<Option<String>> {
        let url = Url::parse(url).expect("an address");
        let proxies = Proxies::of(&Env::fixed(variables.iter().copied()));
        Ok(proxies.choose(&url)?.map(|chosen| chosen.shown))
    }

    #[track_caller]
    fn names(variables: &[(&str, &str)], url: &str, expected: &str) {
        assert_eq!(chosen(variables, url).expect("a proxy").as_deref(), Some(expected), "{variables:?}");
    }

    #[test]
    fn of_a_scheme_come_before_the_one_for_all() {
        let all = [("https_proxy", "http://a:1"), ("http_proxy", "http://b:2"), ("all_proxy", "socks5://c:3")];
        names(&all, "https://x.example/", "http://a:1 that https_proxy names");
        names(&all, "http://x.example/", "http://b:2 that http_proxy names");
        names(&all[2..], "https://x.example/", "socks5://c:3 that all_proxy names");
    }

    #[test]
    fn in_lower_case_come_before_those_in_upper_case() {
        for (lower, upper, url) in [
            ("https_proxy", "HTTPS_PROXY", "https://x.example/"),
            ("http_proxy", "HTTP_PROXY", "http://x.example/"),
            ("all_proxy", "ALL_PROXY", "http://x.example/"),
        ] {
            names(&[(lower, "http://a:1"), (upper, "http://b:2")], url, &format!("http://a:1 that {lower} names"));
            names(&[(lower, ""), (upper, "http://b:2")], url, &format!("http://b:2 that {upper} names"));
        }
    }

    #[test]
    fn may_be_a_host_and_a_port_alone() {
        names(
            &[("HTTPS_PROXY", "proxy.example:3128")],
            "https://x.example/",
            "http://proxy.example:3128 that HTTPS_PROXY names",
        );
    }

    #[test]
    fn that_are_dead_are_not_bypassed_and_are_named_with_their_variable() {
        let (server, pin) = released();
        let dead = Refusing::start();
        let all = ["https_proxy", "http_proxy", "all_proxy"];
        let schemes = ["http", "http", "socks5"];
        let machine = all.iter().zip(schemes).fold(Machine::new(), |machine, (name, scheme)| {
            machine.with(name, format!("{scheme}://alice:hunter2@{}", dead.authority()))
        });
        let fault = machine.fault(&pin.parsed());
        let proxy = format!("through the proxy http://{} that http_proxy names", dead.authority());
        assert_says(&fault, &[&server.url(RELEASE), &proxy, "refused", "proxy variables"]);
        assert!(!fault.contains("hunter2") && !fault.contains("alice"), "{fault}");
        let alone = Machine::new().with("ALL_PROXY", format!("socks5://{}", dead.authority()));
        assert_says(alone.fault(&pin.parsed()), &["socks5://", "that ALL_PROXY names"]);
        assert!(server.requests().is_empty(), "asked past the proxy");
    }

    #[test]
    fn that_are_none_are_not_bypassed_and_are_named_by_their_variable() {
        let (server, pin) = released();
        for value in ["gopher://alice:hunter2@127.0.0.1:9", "http://alice:hunter2@[bad", "://hunter2"] {
            let fault = Machine::new().with("http_proxy", value).fault(&pin.parsed());
            assert_says(&fault, &["http_proxy names no proxy that can be used", "socks5h"]);
            assert!(!fault.contains("hunter2"), "{fault}");
        }
        assert!(server.requests().is_empty(), "asked past the proxy");
    }

    #[test]
    fn by_http_and_by_socks_are_gone_through() {
        for scheme in ["http", "socks5", "socks5h"] {
            let ((server, pin), proxy) = (released(), Proxy::start());
            gets(&Machine::new().with("ALL_PROXY", proxy.url(scheme)), &pin);
            assert_eq!(proxy.asked(), [server.authority()], "{scheme}");
        }
    }

    #[test]
    fn are_told_user_and_password_decoded() {
        let ((server, pin), proxy) = (released(), Proxy::start());
        let url = proxy.url("http").replace("//", "//me%40corp.com:p%2Fw@");
        gets(&Machine::new().with("http_proxy", url), &pin);
        // base64 of me@corp.com:p/w
        assert_eq!(proxy.asked(), [format!("{} Basic bWVAY29ycC5jb206cC93", server.authority())]);
    }

    #[test]
    fn of_the_process_are_nothing_to_a_build_with_an_environment_of_its_own() {
        let (_server, pin) = released();
        gets(&Machine::new(), &pin);
    }

    #[test]
    fn are_left_out_where_no_proxy_says_so_as_curl_reads_it() {
        let (https, other) = ("https://index.corp.example/", "https://example.org/");
        let (v4, v6) = ("http://127.0.0.1:8080/", "http://[::1]:8080/");
        let cases: &[(&str, &str, bool)] = &[
            ("localhost, 127.0.0.1", v4, true),
            ("localhost 127.0.0.1", v4, true),
            ("localhost,\t127.0.0.1 ,", v4, true),
            ("127.0.0.0/8", v4, true),
            ("127.0.0.2/31", v4, false),
            ("127.0.0.0/30", v4, true),
            ("126.0.0.0/7", v4, true),
            ("10.0.0.0/8", v4, false),
            ("0.0.0.0/0", v4, true),
            ("127.0.0.1/33", v4, false),
            ("127.0.0.1/x", v4, false),
            ("0.0.1", v4, false),
            ("127.0.0.1:8080", v4, true),
            ("127.0.0.1:80", v4, false),
            ("::1", v6, true),
            ("[::1]", v6, true),
            ("[::1]:8080", v6, true),
            ("::/64", v6, true),
            ("127.0.0.1", v6, false),
            ("corp.example", https, true),
            (".corp.example", https, true),
            ("*.corp.example", https, true),
            ("CORP.example.", https, true),
            ("index.corp.example", https, true),
            ("index.corp.example:443", https, true),
            ("index.corp.example:444", https, false),
            ("orp.example", https, false),
            ("corp.example", "https://notcorp.example/", false),
            ("*", https, true),
            ("*", v4, true),
            ("", https, false),
            (" , ", https, false),
            (".", https, false),
            ("corp.example", other, false),
        ];
        for (list, url, exempt) in cases {
            for name in ["no_proxy", "NO_PROXY"] {
                let found = chosen(&[("ALL_PROXY", "http://a:1"), (name, list)], url).expect("a proxy");
                assert_eq!(found.is_none(), *exempt, "{name}={list} {url}");
            }
        }
    }

    #[test]
    fn are_asked_for_what_a_redirect_leads_to_by_its_own_name() {
        let ((server, _), proxy, other) = (released(), Proxy::start(), Server::start());
        other.on("/moved", [Reply::redirect(&server.url(RELEASE))]);
        let machine = Machine::new().with("http_proxy", proxy.url("http")).with("NO_PROXY", other.authority());
        gets(&machine, &Wheel::cudart().pin().url(other.url("/moved")));
        assert_eq!(proxy.asked(), [server.authority()]);
    }
}

mod certificates {
    use super::*;

    /// An address that would be asked by TLS, where nobody speaks it.
    fn encrypted() -> (Server, Pin) {
        let server = Server::start();
        let pin = Wheel::cudart().pin().url(server.url(RELEASE).replace("http:", "https:"));
        (server, pin)
    }

    #[test]
    fn that_are_not_where_the_variable_says_are_named_by_it() {
        let (server, pin) = encrypted();
        for name in ["SSL_CERT_FILE", "SSL_CERT_DIR"] {
            let machine = Machine::new().with(name, "/not/there.pem");
            assert_says(
                machine.fault(&pin.parsed()),
                &[name, "/not/there.pem", "nothing is there", "correct or unset"],
            );
        }
        assert!(server.requests().is_empty());
    }

    #[test]
    fn of_pip_are_trusted_and_no_others() {
        let server = index();
        server.admit("alice", "hunter2", 404);
        let face = Encrypted::face_of(&server);
        let address = face.url("/simple").replace("//", "//alice:hunter2@");
        let machine = || Machine::new().with("PIP_INDEX_URL", &address);
        let fault = machine().with("PIP_TRUSTED_HOST", "127.0.0.1").fault(&by_index().parsed());
        assert_says(&fault, &["certificate", "SSL_CERT_FILE", "PIP_TRUSTED_HOST has no effect here"]);
        assert!(server.requests().is_empty(), "a password for who knows whom");
        gets(&machine().with("PIP_CERT", tls::authority()), &by_index());
        let proxy = Proxy::start();
        gets(&machine().with("PIP_CERT", tls::authority()).with("https_proxy", proxy.url("http")), &by_index());
        assert_eq!(proxy.asked(), [face.authority(), face.authority()]);
    }

    #[test]
    fn are_not_done_without_after_a_redirect() {
        let (server, plain) = (Server::start(), index());
        server.on(PAGE, [Reply::redirect(&plain.url(PAGE))]);
        let machine = Machine::new().with("PIP_INDEX_URL", Encrypted::face_of(&server).url("/simple"));
        let fault = machine.with("PIP_CERT", tls::authority()).fault(&by_index().parsed());
        assert_says(fault, &["from https down to http", "correct the address"]);
        assert!(plain.requests().is_empty());
    }

    #[test]
    fn do_not_matter_to_what_is_not_encrypted() {
        let (_server, pin) = released();
        gets(&Machine::new().with("SSL_CERT_FILE", "/not/there.pem"), &pin);
    }

    #[test]
    fn of_pip_are_taken_for_its_index_from_its_variable_its_file_and_what_it_heeds() {
        let server = index();
        let address = server.url("/simple").replace("http:", "https:");
        for (name, value) in [("PIP_CERT", ""), ("REQUESTS_CA_BUNDLE", ""), ("CURL_CA_BUNDLE", ""), ("conf", "")] {
            let machine = Machine::new().with("PIP_INDEX_URL", &address);
            let empty = machine.place("empty.pem", value);
            let path = empty.display().to_string();
            let conf = machine.place("pip.conf", format!("[global]\ncert = {path}\n"));
            let (machine, shown) = match name {
                "conf" => (machine.with("PIP_CONFIG_FILE", &conf), format!("cert in {}", conf.display())),
                name => (machine.with(name, empty), name.to_owned()),
            };
            assert_says(machine.fault(&by_index().parsed()), &[&shown, &path, "no certificate in it"]);
        }
        assert!(server.requests().is_empty());
    }
}

mod credentials {
    use super::*;

    /// An index that shows what it has to alice alone, with this page.
    pub fn private(page: Reply, otherwise: u16) -> Server {
        let server = index();
        server.on(PAGE, [page]);
        server.admit("alice", "hunter2", otherwise);
        server
    }

    fn as_alice(server: &Server) -> Machine {
        Machine::new().with("PIP_INDEX_URL", server.url_as("alice", "hunter2", "/simple"))
    }

    #[test]
    fn of_an_index_are_sent_to_what_it_links_to_by_an_absolute_address_of_its_own() {
        let server = private(page("/files"), 401);
        server.on(PAGE, [page(&server.url("/files"))]);
        gets(&as_alice(&server), &by_index());
    }

    #[test]
    fn of_an_index_are_sent_to_what_it_redirects_to_on_itself() {
        let server = private(Reply::redirect("/elsewhere/"), 404);
        server.on("/elsewhere/", [page("/moved")]);
        server.on(&format!("/moved/{}", Wheel::cudart().file()), [Reply::redirect(&file())]);
        gets(&as_alice(&server), &by_index());
    }

    #[test]
    fn of_an_index_are_sent_to_nobody_else() {
        let (server, other, third) = (private(page("/files"), 401), index(), index());
        server.on(PAGE, [page(&other.url("/files"))]);
        other.on(&file(), [Reply::redirect(&third.url(&file()))]);
        gets(&as_alice(&server), &by_index());
        let to = |server: &Server| server.requests()[0].header("Authorization").map(str::to_owned);
        assert_eq!((to(&other), to(&third)), (None, None));
        assert!(to(&server).is_some());
    }

    /// Another port is another host.
    #[test]
    fn of_an_address_are_not_sent_to_where_that_redirects_elsewhere() {
        let (server, other) = (Server::start(), index());
        server.on(PAGE, [Reply::redirect(&other.url(PAGE))]);
        server.on(RELEASE, [Reply::redirect(&other.url(&file()))]);
        gets(&as_alice(&server), &by_index());
        gets(&Machine::new(), &Wheel::cudart().pin().url(server.url_as("alice", "hunter2", RELEASE)));
        let sent = |server: &Server| server.requests().iter().filter(|r| r.header("Authorization").is_some()).count();
        assert_eq!((sent(&server), server.requests().len()), (2, 2));
        assert_eq!((sent(&other), other.requests().len()), (0, 3));
    }

    #[test]
    fn of_two_indexes_on_one_host_are_those_of_the_nearer_one() {
        let server = Server::start();
        for (name, user) in [("one", "anna"), ("two", "berta")] {
            let place = format!("/{name}/simple/nvidia-cuda-runtime/");
            server.on(&place, [page(&server.url(&format!("/{name}/files")))]);
            let url = server.url_as(user, "x", &format!("/{name}/simple"));
            let machine = Machine::new().with("PIP_INDEX_URL", server.url_as("anna", "x", "/one/simple"));
            let machine = machine.with("PIP_EXTRA_INDEX_URL", url);
            machine.fault(&by_index().parsed());
        }
        let sent = server.requests();
        let last = sent.iter().rev().find(|request| request.path.starts_with("/two/files")).expect("the file");
        // base64 of berta:x
        assert_eq!(last.header("Authorization"), Some("Basic YmVydGE6eA=="));
    }

    #[test]
    fn are_decoded_once_from_the_address() {
        let server = index();
        server.admit("me@corp.com", "p@ss/w+%", 401);
        let url = server.url_as("me%40corp.com", "p%40ss%2Fw+%25", "/simple");
        gets(&Machine::new().with("PIP_INDEX_URL", url), &by_index());
    }

    #[test]
    fn that_are_wanting_are_said_to_be_wanting_whatever_the_server_answers() {
        for status in [401, 403, 404] {
            let server = private(page("/files"), status);
            let fault = Machine::new().with("PIP_INDEX_URL", server.url("/simple")).fault(&by_index().parsed());
            assert_says(&fault, &[&format!("answered {status}"), "credentials", "netrc"]);
            let wrong = Machine::new().with("PIP_INDEX_URL", server.url_as("alice", "wrong", "/simple"));
            let fault = wrong.fault(&by_index().parsed());
            assert!(!fault.contains("netrc"), "they were sent: {fault}");
        }
    }

    #[test]
    fn of_netrc_are_sent_to_the_host_it_names() {
        let server = private(page("/files"), 401);
        let netrc = "machine example.org login bob password x\n# alice's\nmachine 127.0.0.1\n  login alice\n  password hunter2\n";
        for (place, variable) in [("home/.netrc", "HOME"), ("home/_netrc", "HOME"), ("some/netrc", "NETRC")] {
            let machine = Machine::new().with("PIP_INDEX_URL", server.url("/simple"));
            let path = machine.place(place, netrc);
            let value = if variable == "HOME" { machine.path("home") } else { path };
            gets(&machine.with(variable, value), &by_index());
        }
    }

    #[test]
    fn of_netrc_give_way_to_those_of_the_address() {
        let server = private(page("/files"), 401);
        let machine = as_alice(&server);
        let path = machine.place("netrc", "machine 127.0.0.1 login bob password x");
        gets(&machine.with("NETRC", path), &by_index());
    }

    /// They may be about something else on that host.
    #[test]
    fn of_netrc_that_do_not_help_are_left_out() {
        let (server, pin) = released();
        server.on(RELEASE, [Reply::status(401), Reply::ok(Wheel::cudart().bytes())]);
        let machine = Machine::new();
        let path = machine.place("netrc", "default login bob password x");
        gets(&machine.with("NETRC", path), &pin);
        let sent: Vec<bool> = server.requests().iter().map(|r| r.header("Authorization").is_some()).collect();
        assert_eq!(sent, [true, false]);
    }

    #[test]
    fn of_netrc_are_read_as_python_reads_them() {
        use vendoring::credentials::{Login, Netrc};
        let text = "macdef init\nmachine bad login bad\n\nmachine a login \"an na\" password \"x\\\"y\"\n\
                    machine B.example account z login b password #c\ndefault login d password e";
        let netrc = Netrc::parse(text);
        let of = |host: &str| netrc.login(host).expect("a login").header().to_owned();
        let login = |user: &str, password: &str| {
            let mut url = Url::parse("http://h/").expect("an address");
            url.set_username(user).and_then(|()| url.set_password(Some(password))).expect("a login");
            Login::of(&url).expect("a login").header().to_owned()
        };
        assert_eq!(of("a"), login("an na", "x\"y"));
        assert_eq!(of("b.example"), login("b", "#c"));
        assert_eq!(of("bad"), login("d", "e"));
        assert!(Netrc::parse("machine a login b").login("c").is_none());
    }

    #[test]
    fn of_uvs_named_index_are_those_of_its_variables() {
        let server = private(page("/files"), 401);
        let machine = Machine::new()
            .with("PIP_NO_INDEX", "0")
            .with("UV_DEFAULT_INDEX", server.url("/empty"))
            .with("UV_INDEX", format!("my-corp={}", server.url("/simple")))
            .with("UV_INDEX_MY_CORP_USERNAME", "alice")
            .with("UV_INDEX_MY_CORP_PASSWORD", "hunter2");
        gets(&machine, &by_index());
    }
}

mod pips_settings {
    use super::*;

    /// A machine with this configuration file and nothing else.
    fn configured(text: &str) -> Machine {
        let machine = Machine::new();
        let conf = machine.place("pip.conf", text);
        machine.with("PIP_CONFIG_FILE", conf)
    }

    fn places(base: &str, names: &[&str]) -> Vec<String> {
        names.iter().map(|name| format!("{base}/{name}/nvidia-cuda-runtime/")).collect()
    }

    #[test]
    fn name_further_indexes_beside_the_first() {
        let base = "https://i.example";
        let all = |names: [&str; 2]| names.map(|name| format!("{base}/{name}")).join(" ");
        let machine = Machine::new().with("PIP_INDEX_URL", format!("{base}/main"));
        let machine = machine.with("PIP_EXTRA_INDEX_URL", all(["a", "b/"])).with("UV_INDEX", all(["c", "d"]));
        assert_eq!(named(&machine), places(base, &["c", "d", "main", "a", "b"]));
        let conf = "[global]\nindex-url = https://i.example/main\nextra-index-url =\n    https://i.example/a\n\
                    # not this\n    https://i.example/b\n[list]\nextra-index-url = https://i.example/no\n";
        assert_eq!(named(&configured(conf)), places(base, &["main", "a", "b"]));
        let twice = configured(conf).with("UV_EXTRA_INDEX_URL", "https://i.example/a/");
        assert_eq!(named(&twice), places(base, &["a", "main", "b"]));
    }

    #[test]
    fn of_a_variable_outrank_those_of_a_file() {
        let machine = configured("[global]\nextra-index-url = https://i.example/file\nno-index = true\n");
        let machine = machine.with("PIP_EXTRA_INDEX_URL", "https://i.example/variable").with("PIP_NO_INDEX", "0");
        assert_eq!(named(&machine)[1..], places("https://i.example", &["variable"]));
    }

    #[test]
    fn lead_to_a_wheel_that_the_first_index_does_not_have() {
        let (first, second) = (Server::start(), index());
        let conf =
            format!("[install]\nindex-url: {}\nextra_index_url={}\n", first.url("/simple"), second.url("/simple/"));
        gets(&configured(&conf), &by_index());
        assert_eq!(first.paths(), [PAGE]);
    }

    #[test]
    fn that_forbid_the_index_are_heeded_and_named() {
        for (text, section) in [("[global]\nno-index = yes\n", "global"), ("[install]\nno_index: 1\n", "install")] {
            let server = index();
            let machine = configured(text).with("PIP_INDEX_URL", server.url("/simple"));
            let conf = machine.path("pip.conf").display().to_string();
            assert_says(machine.fault(&by_index().parsed()), &["no-index in", &conf, "find-links"]);
            assert!(server.requests().is_empty(), "{section}");
        }
    }

    #[test]
    fn name_folders_and_pages_of_links() {
        let server = index();
        server.on("/links.html", [page("/files")]);
        for links in ["PAGE", "FOLDER", "/not/there\n  FOLDER", "/not/there PAGE"] {
            let machine = Machine::new();
            machine.place(format!("links/{}", Wheel::cudart().file()), Wheel::cudart().bytes());
            let folder = Url::from_file_path(machine.path("links")).expect("an address");
            let links = links.replace("PAGE", &server.url("/links.html")).replace("FOLDER", folder.as_str());
            let conf = machine.place("pip.conf", format!("[global]\nno-index = true\nfind-links = {links}\n"));
            gets(&machine.with("PIP_CONFIG_FILE", conf), &by_index());
        }
    }

    #[test]
    fn name_folders_whose_names_have_blanks() {
        let machine = Machine::new();
        machine.place(format!("my links/{}", Wheel::cudart().file()), Wheel::cudart().bytes());
        let folder = machine.path("my links");
        gets(&machine.with("PIP_FIND_LINKS", folder).with("PIP_NO_INDEX", "1"), &by_index());
    }

    #[test]
    fn that_name_a_relative_path_are_refused_by_their_name() {
        for (name, value) in [("PIP_FIND_LINKS", "wheels"), ("PIP_INDEX_URL", "./simple"), ("UV_INDEX", "~/simple")] {
            let fault = Machine::new().with(name, value).find(&by_index().parsed()).expect_err("refused");
            assert!(!fault.is_unavailable(), "{fault}");
            assert_says(fault.to_string(), &[name, "absolute"]);
        }
    }

    #[test]
    fn name_an_index_of_this_machines_files() {
        for relative in [false, true] {
            let machine = Machine::new();
            let name = Wheel::cudart().file();
            let wheel = machine.place(format!("mirror/files/{name}"), Wheel::cudart().bytes());
            let absolute = Url::from_file_path(wheel).expect("an address").to_string();
            let link = if relative { format!("../../files/{name}") } else { absolute };
            machine.place("mirror/simple/nvidia-cuda-runtime/index.html", format!("<a href=\"{link}\">it</a>"));
            let root = machine.path("mirror/simple");
            let address = Url::from_file_path(&root).expect("an address").to_string();
            gets(
                &machine.with("PIP_INDEX_URL", if relative { root.display().to_string() } else { address }),
                &by_index(),
            );
        }
    }

    #[test]
    fn that_name_an_index_of_files_that_is_not_there_say_so() {
        let machine = Machine::new();
        let root = Url::from_file_path(machine.path("mirror")).expect("an address");
        let fault = machine.with("PIP_INDEX_URL", root.as_str()).fault(&by_index().parsed());
        assert_says(fault, &["PIP_INDEX_URL", root.as_str(), "is not there"]);
    }

    #[test]
    fn name_a_proxy_that_outranks_the_variables_for_pips_own_places() {
        let (server, proxy, dead) = (index(), Proxy::start(), Refusing::start());
        let address = format!("http://{}", dead.authority());
        for from in ["variable", "file"] {
            let machine = configured(&format!(
                "[global]\nproxy = {}\n",
                if from == "file" { proxy.url("http") } else { address.clone() }
            ));
            let machine = machine.with("PIP_INDEX_URL", server.url("/simple")).with("http_proxy", &address);
            let machine = machine.with("NO_PROXY", "*");
            gets(&if from == "file" { machine } else { machine.with("PIP_PROXY", proxy.url("http")) }, &by_index());
        }
        assert_eq!(proxy.asked().len(), 4);
    }

    #[test]
    fn that_cannot_be_honoured_are_refused_by_their_name() {
        let server = index();
        let machine =
            configured("[global]\nclient-cert = /some/key.pem\n").with("PIP_INDEX_URL", server.url("/simple"));
        let conf = machine.path("pip.conf").display().to_string();
        assert_says(machine.fault(&by_index().parsed()), &["client-cert in", &conf, "pip download"]);
        assert!(server.requests().is_empty());
    }

    #[test]
    fn that_have_no_effect_are_named_where_the_index_fails() {
        let server = Server::start();
        let machine = configured("[global]\ntrusted-host = 127.0.0.1\n").with("PIP_KEYRING_PROVIDER", "subprocess");
        let fault = machine.with("PIP_INDEX_URL", server.url("/simple")).fault(&by_index().parsed());
        assert_says(
            fault,
            &["trusted-host in", "certificates are always checked", "PIP_KEYRING_PROVIDER", "no keyring"],
        );
    }

    /// What a link is relative to: the page's own base, or where the page came from in the end.
    #[test]
    fn lead_to_pages_whose_links_are_relative_to_their_base() {
        let name = Wheel::cudart().file();
        for base in ["/files/", "../../files/", "ABSOLUTE"] {
            let server = index();
            let base = base.replace("ABSOLUTE", &server.url("/files/"));
            let text = format!("<html><head><base href=\"{base}\"></head><a href=\"{name}\">{name}</a>");
            server.on(PAGE, [Reply::ok(text)]);
            gets(&Machine::new().with("PIP_INDEX_URL", server.url("/simple")), &by_index());
        }
        let server = index();
        server.on(PAGE, [Reply::redirect("/a/b/c/")]);
        server.on("/a/b/c/", [Reply::ok(format!("<a href=\"../../../files/{name}\">{name}</a>"))]);
        gets(&Machine::new().with("PIP_INDEX_URL", server.url("/simple")), &by_index());
    }

    #[test]
    fn lead_to_json_pages_with_null_wherever_it_does_not_matter() {
        let name = Wheel::cudart().file();
        let other = r#"{"filename": "other.whl", "url": null, "hashes": null, "yanked": null}, {"filename": null}, {}"#;
        for rest in
            [r#""hashes": null, "yanked": null"#, r#""hashes": {"sha256": null}, "yanked": 1"#, r#""yanked": """#]
        {
            let server = index();
            let text = format!(r#"{{"files": [{other}, {{"filename": "{name}", "url": "{}", {rest}}}]}}"#, file());
            server.on(PAGE, [Reply::ok(text).header("Content-Type", "application/vnd.pypi.simple.v1+json")]);
            let machine = Machine::new().with("PIP_INDEX_URL", server.url("/simple"));
            let found = machine.find(&by_index().parsed()).expect("the wheel");
            assert!(!found.notes.warnings.join("").contains("withdrawn"), "{rest}: {:?}", found.notes.warnings);
        }
    }
}

mod uvs_files {
    use super::*;

    /// A machine with this file of the user's and nothing else.
    fn configured(text: &str) -> Machine {
        let machine = Machine::new();
        machine.place("home/.config/uv/uv.toml", text);
        let home = machine.path("home");
        machine.with("HOME", home).with("UV_NO_CONFIG", "0").with("XDG_CONFIG_DIRS", "/nowhere")
    }

    fn places(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| format!("https://i.example/{name}/nvidia-cuda-runtime/")).collect()
    }

    const ALL: &str = r#"
        index-url = "https://i.example/legacy"
        extra-index-url = ["https://i.example/extra"]
        native-tls = true
        [[index]]
        name = "first"
        url = "https://i.example/first"
        publish-url = "https://i.example/publish"
        [[index]]
        url = "https://i.example/default"
        default = true
        [[index]]
        name = "torch"
        url = "https://i.example/explicit"
        explicit = true
        [pip]
        extra-index-url = ["https://i.example/pip"]
    "#;

    #[test]
    fn name_indexes_beside_the_default_one_and_in_its_place() {
        assert_eq!(named(&configured(ALL)), places(&["pip", "first", "extra", "default"]));
        let legacy = "index-url = 'https://i.example/legacy'";
        assert_eq!(named(&configured(legacy)), places(&["legacy"]));
    }

    #[test]
    fn come_after_variables_and_pips_files() {
        let machine = configured(ALL).with("UV_DEFAULT_INDEX", "https://i.example/variable");
        let machine = machine.with("UV_INDEX", "https://i.example/named");
        assert_eq!(named(&machine), places(&["named", "pip", "first", "extra", "variable"]));
        let machine = configured(ALL).with("PIP_INDEX_URL", "https://i.example/pips");
        assert_eq!(named(&machine), places(&["pip", "first", "extra", "pips"]));
    }

    #[test]
    fn of_the_user_and_of_the_system_count_together() {
        let machine = configured("no-index = false\n[[index]]\nurl = 'https://i.example/users'\ndefault = true");
        let systems = "no-index = true\nextra-index-url = ['https://i.example/systems']\n\
                       [[index]]\nurl = 'https://i.example/no'\ndefault = true";
        machine.place("xdg/uv/uv.toml", systems);
        let dirs = machine.path("xdg");
        assert_eq!(named(&machine.with("XDG_CONFIG_DIRS", dirs)), places(&["systems", "users"]));
    }

    #[test]
    fn are_one_where_a_variable_names_it_and_none_where_another_says_so() {
        let machine = configured(ALL);
        let other = machine.place("other.toml", "index-url = 'https://i.example/other'");
        assert_eq!(named(&machine.with("UV_CONFIG_FILE", other)), places(&["other"]));
        let machine = configured(ALL).with("UV_NO_CONFIG", "1").with("UV_DEFAULT_INDEX", "https://i.example/variable");
        assert_eq!(named(&machine), places(&["variable"]));
    }

    #[test]
    fn have_user_and_password_of_a_named_index_in_variables() {
        let server = credentials::private(page("/files"), 401);
        let text = format!("[[index]]\nname = 'my-corp'\nurl = '{}'\ndefault = true", server.url("/simple"));
        let machine = configured(&text).with("UV_INDEX_MY_CORP_USERNAME", "alice");
        gets(&machine.with("UV_INDEX_MY_CORP_PASSWORD", "hunter2"), &by_index());
    }

    #[test]
    fn that_forbid_the_index_are_heeded_and_named() {
        let server = index();
        let text = format!("no-index = true\nindex-url = '{}'", server.url("/simple"));
        let machine = configured(&text);
        let file = machine.path("home/.config/uv/uv.toml").display().to_string();
        assert_says(machine.fault(&by_index().parsed()), &["no-index in", &file]);
        assert!(server.requests().is_empty());
    }

    #[test]
    fn name_folders_of_links_and_flat_indexes() {
        for text in ["no-index = true\nfind-links = ['FOLDER']", "[[index]]\nformat = 'flat'\nurl = 'FOLDER'"] {
            let probe = Machine::new();
            probe.place(format!("links/{}", Wheel::cudart().file()), Wheel::cudart().bytes());
            let folder = Url::from_file_path(probe.path("links")).expect("an address");
            gets(&configured(&text.replace("FOLDER", folder.as_str())), &by_index());
        }
    }

    #[test]
    fn that_are_malformed_or_missing_are_refused_by_name_without_showing_a_line() {
        for (text, fault) in [
            ("index-url = https://user:secret@i.example/", "line 1"),
            ("index-url = 1", "`index-url`: a whole number, expected a text"),
            ("[[index]]\nname = 'secret'", "line 1, column 1: missing field `url`"),
        ] {
            let machine = configured(text);
            let said = machine.fault(&by_index().parsed()).to_string();
            assert_says(&said, &["uv.toml is malformed", fault, "UV_NO_CONFIG=1"]);
            assert!(!said.contains("secret"), "{said}");
        }
        let machine = configured("").with("UV_CONFIG_FILE", "/not/there/uv.toml");
        assert_says(machine.fault(&by_index().parsed()), &["uv's configuration", "/not/there/uv.toml"]);
        let machine = configured("").with("UV_CONFIG_FILE", "uv.toml");
        assert_says(machine.fault(&by_index().parsed()), &["UV_CONFIG_FILE=uv.toml", "absolute"]);
    }

    #[test]
    fn say_what_has_no_effect_where_an_index_cannot_be_used() {
        let text = "index-url = 'http://127.0.0.1:9/simple'\nkeyring-provider = 'subprocess'\nallow-insecure-host = []";
        let said = configured(text).fault(&by_index().parsed()).to_string();
        assert_says(&said, &["keyring-provider in", "uv.toml has no effect here"]);
        assert!(!said.contains("allow-insecure-host"), "{said}");
    }

    #[test]
    fn of_a_project_have_no_effect_which_is_said() {
        for (name, text, is_said) in [
            ("uv.toml", "index-url = 'https://i.example/'", true),
            ("pyproject.toml", "[project]\nname = 'a'\n[[tool.uv.index]]\nurl = 'https://i.example/'", true),
            ("pyproject.toml", "[project]\nname = 'a'\n[tool.ruff]\n", false),
        ] {
            let mut machine = configured("").with("PIP_INDEX_URL", "http://127.0.0.1:9/simple");
            let file = machine.place(format!("project/{name}"), text);
            machine.workspace = Some(machine.path("project"));
            let said = machine.fault(&by_index().parsed()).to_string();
            assert_eq!(said.contains(&format!("{} has no effect", file.display())), is_said, "{said}");
        }
    }
}
