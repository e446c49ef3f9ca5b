//! Which proxy an address is asked through: by curl's rules for its variables, or as pip is told.

use std::net::{IpAddr, SocketAddr};

use super::env::{Env, Named};
use super::error::{Error, Result};
use super::url::{Host, Url};

/// The proxies of this machine.
#[derive(Debug, Default)]
pub struct Proxies {
    http: Option<Named>,
    https: Option<Named>,
    all: Option<Named>,
    /// What is asked without one.
    none_for: String,
}

/// A proxy that is used.
#[derive(Debug, Clone)]
pub struct Chosen {
    pub proxy: ureq::Proxy,
    /// Itself without its credentials, and what named it.
    pub shown: String,
}

impl Chosen {
    /// Whether the proxy itself is asked by TLS.
    pub fn is_encrypted(&self) -> bool {
        self.proxy.protocol() == ureq::ProxyProtocol::Https
    }
}

impl Proxies {
    /// By the variables that curl knows, a lower-case name before the upper-case one. Unlike curl, as pip and cargo,
    /// `HTTP_PROXY` counts too.
    pub fn of(env: &Env) -> Self {
        let first = |names: [&str; 2]| names.into_iter().find_map(|name| env.named(name));
        Self {
            http: first(["http_proxy", "HTTP_PROXY"]),
            https: first(["https_proxy", "HTTPS_PROXY"]),
            all: first(["all_proxy", "ALL_PROXY"]),
            none_for: first(["no_proxy", "NO_PROXY"]).map(|named| named.value).unwrap_or_default(),
        }
    }

    /// This one for every address: pip's own setting outranks all variables, `NO_PROXY` too.
    pub fn only(proxy: Named) -> Self {
        Self { all: Some(proxy), ..Self::default() }
    }

    /// The proxy for an address. One that is set and cannot be used is a fault: nothing is asked past it.
    pub fn choose(&self, url: &Url) -> Result<Option<Chosen>> {
        let specific = if url.scheme() == "https" { &self.https } else { &self.http };
        let Some(Named { value, from }) = specific.as_ref().or(self.all.as_ref()) else { return Ok(None) };
        if is_exempt(&self.none_for, url) {
            return Ok(None);
        }
        // Not shown: there may be a password in it.
        let unusable = || {
            Error::Unavailable(format!(
                "{from} names no proxy that can be used: expected an address such as http://proxy.example:3128, or one that \
                 begins with https, socks4, socks4a, socks5 or socks5h; correct or unset it"
            ))
        };
        let proxy = ureq::Proxy::new(value.trim()).map_err(|_| unusable())?;
        let scheme = proxy.uri().scheme_str().unwrap_or("http").to_ascii_lowercase();
        let shown = format!("{scheme}://{}:{} that {from} names", proxy.host(), proxy.port());
        Ok(Some(Chosen { proxy, shown }))
    }
}

/// Whether a list, as `NO_PROXY` has it, names the host of an address. Commas or blanks separate its entries: a domain
/// stands for all below it too, with or without a dot in front; an IP address may have the length of a network's prefix;
/// a port, where there is one, must be the address's; `*` is everything.
fn is_exempt(list: &str, url: &Url) -> bool {
    let entries = list.split(|c: char| c == ',' || c.is_whitespace()).filter(|entry| !entry.is_empty());
    let port = url.port_or_known_default();
    let (ip, domain) = match url.host() {
        Some(Host::Ipv4(ip)) => (Some(IpAddr::V4(ip)), ""),
        Some(Host::Ipv6(ip)) => (Some(IpAddr::V6(ip)), ""),
        Some(Host::Domain(domain)) => (None, domain),
        None => return false,
    };
    entries.into_iter().any(|entry| {
        entry == "*"
            || match ip {
                Some(ip) => is_address(entry, ip, port),
                None => is_domain(entry, domain, port),
            }
    })
}

fn is_address(entry: &str, ip: IpAddr, port: Option<u16>) -> bool {
    if let Ok(socket) = entry.parse::<SocketAddr>() {
        return socket.ip() == ip && Some(socket.port()) == port;
    }
    let (network, bits) = match entry.split_once('/') {
        Some((network, bits)) => (network, Some(bits)),
        None => (entry, None),
    };
    let network = network.trim_start_matches('[').trim_end_matches(']');
    let (bytes, of): (Vec<u8>, Vec<u8>) = match (ip, network.parse()) {
        (IpAddr::V4(ip), Ok(IpAddr::V4(network))) => (ip.octets().into(), network.octets().into()),
        (IpAddr::V6(ip), Ok(IpAddr::V6(network))) => (ip.octets().into(), network.octets().into()),
        _ => return false,
    };
    let length = bytes.len() * 8;
    let bits = match bits.map(str::parse::<usize>) {
        None => length,
        Some(Ok(bits)) if bits <= length => bits,
        // A prefix that is none covers nothing.
        Some(_) => return false,
    };
    let whole = bits / 8;
    let mask = !(0xff_u8.checked_shr((bits % 8) as u32).unwrap_or(0));
    bytes[..whole] == of[..whole] && (bits % 8 == 0 || (bytes[whole] ^ of[whole]) & mask == 0)
}

fn is_domain(entry: &str, domain: &str, port: Option<u16>) -> bool {
    let (entry, fits) = match entry.rsplit_once(':').map(|(name, wanted)| (name, wanted.parse::<u16>())) {
        Some((name, Ok(wanted))) => (name, Some(wanted) == port),
        _ => (entry, true),
    };
    let entry = entry.trim_start_matches('*').trim_start_matches('.').trim_end_matches('.').to_ascii_lowercase();
    let domain = domain.trim_end_matches('.').to_ascii_lowercase();
    let below = domain.strip_suffix(&entry).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
    fits && !entry.is_empty() && below
}
