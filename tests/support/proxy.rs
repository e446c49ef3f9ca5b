//! A proxy on loopback, by HTTP's CONNECT or by SOCKS 5, which remembers where it was asked to connect to.
#![allow(dead_code, reason = "each test uses its own part")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// It runs as long as the test's process does.
pub struct Proxy {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Proxy {
    pub fn start() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a loopback port");
        let address = listener.local_addr().expect("its address");
        let asked = Arc::new(Mutex::new(Vec::new()));
        let shared = Arc::clone(&asked);
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let asked = Arc::clone(&shared);
                // Who hangs up early is no fault of the proxy.
                std::thread::spawn(move || drop(serve(client, &asked)));
            }
        });
        Self { address, asked }
    }

    /// `SCHEME://127.0.0.1:PORT`
    pub fn url(&self, scheme: &str) -> String {
        format!("{scheme}://{}", self.address)
    }

    /// The hosts and ports that it was asked for, each with the `Proxy-Authorization` that came along.
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().expect("what was asked").clone()
    }
}

fn serve(client: TcpStream, asked: &Mutex<Vec<String>>) -> std::io::Result<()> {
    let mut first = [0];
    client.peek(&mut first)?;
    let server = if first == [5] { socks(&client, asked)? } else { connect(&client, asked)? };
    let (mut up, mut down) = (client.try_clone()?, server.try_clone()?);
    std::thread::spawn(move || std::io::copy(&mut up, &mut down));
    std::io::copy(&mut &server, &mut &client)?;
    client.shutdown(std::net::Shutdown::Both)
}

fn connect(client: &TcpStream, asked: &Mutex<Vec<String>>) -> std::io::Result<TcpStream> {
    let (mut reader, mut lines) = (BufReader::new(client), Vec::new());
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        if line.trim().is_empty() {
            break;
        }
        lines.push(line.trim().to_owned());
    }
    let target = lines[0].strip_prefix("CONNECT ").and_then(|rest| rest.split(' ').next()).unwrap_or_default();
    let login = lines.iter().find_map(|line| line.strip_prefix("Proxy-Authorization: ")).unwrap_or_default();
    asked.lock().expect("what was asked").push(format!("{target} {login}").trim().to_owned());
    let server = TcpStream::connect(target)?;
    let mut client = client;
    client.write_all(b"HTTP/1.1 200 Connected\r\n\r\n")?;
    Ok(server)
}

/// A connection to an IPv4 address, without a password.
fn socks(mut client: &TcpStream, asked: &Mutex<Vec<String>>) -> std::io::Result<TcpStream> {
    let mut greeting = [0; 3];
    client.read_exact(&mut greeting)?;
    client.write_all(&[5, 0])?;
    let mut request = [0; 10];
    client.read_exact(&mut request)?;
    let [5, 1, 0, 1, a, b, c, d, high, low] = request else { return Err(std::io::ErrorKind::Unsupported.into()) };
    let target = SocketAddr::from((Ipv4Addr::new(a, b, c, d), u16::from_be_bytes([high, low])));
    asked.lock().expect("what was asked").push(target.to_string());
    let server = TcpStream::connect(target)?;
    client.write_all(&[5, 0, 0, 1, 0, 0, 0, 0, 0, 0])?;
    Ok(server)
}
