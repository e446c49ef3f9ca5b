//! A server's other face, by TLS. Its certificate is that of an authority whose own key nobody kept, and its key is no secret:
//! tests/fixtures/tls.
#![allow(dead_code, reason = "each test uses its own part")]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use super::http::Server;

pub struct Encrypted(SocketAddr);

impl Encrypted {
    /// Passes requests on to this server for as long as the test's process runs.
    pub fn face_of(server: &Server) -> Self {
        let read = |name: &str| std::fs::read(fixture(name)).expect(name);
        let chain =
            CertificateDer::pem_slice_iter(&read("server.pem")).collect::<Result<_, _>>().expect("a certificate");
        let key = PrivateKeyDer::from_pem_slice(&read("server.key")).expect("a key");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let config = builder.expect("versions").with_no_client_auth().with_single_cert(chain, key);
        let config = Arc::new(config.expect("a certificate and its key"));
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a loopback port");
        let (address, behind) = (listener.local_addr().expect("its address"), server.authority());
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (config, behind) = (Arc::clone(&config), behind.clone());
                // A client that does not trust this server hangs up, which is what it should.
                std::thread::spawn(move || drop(pass(client, config, &behind)));
            }
        });
        Self(address)
    }

    pub fn url(&self, path: &str) -> String {
        format!("https://{}{path}", self.0)
    }

    /// `127.0.0.1:PORT`
    pub fn authority(&self) -> String {
        self.0.to_string()
    }
}

/// The certificate of the authority.
pub fn authority() -> PathBuf {
    fixture("ca.pem")
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tls").join(name)
}

/// One request, and its answer to the end.
fn pass(client: TcpStream, config: Arc<ServerConfig>, behind: &str) -> std::io::Result<()> {
    let connection = ServerConnection::new(config).map_err(std::io::Error::other)?;
    let mut client = StreamOwned::new(connection, client);
    let (mut request, mut byte) = (Vec::new(), [0]);
    while !request.ends_with(b"\r\n\r\n") {
        client.read_exact(&mut byte)?;
        request.push(byte[0]);
    }
    let mut server = TcpStream::connect(behind)?;
    server.write_all(&request)?;
    std::io::copy(&mut server, &mut client)?;
    client.conn.send_close_notify();
    client.flush()?;
    client.sock.shutdown(Shutdown::Write)
}
