//! An HTTP/1.1 server on loopback whose every answer is scripted, and which remembers what it was asked.
//!
//! The client under test honours the proxies of the process's environment, so these tests want none to be set, or
//! 127.0.0.1 in NO_PROXY.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// What the server was asked.
#[derive(Debug, Clone)]
pub struct Request {
    pub path: String,
    headers: Vec<(String, String)>,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }
}

/// What it says about the length of a body.
#[derive(Debug, Clone, Copy)]
enum Length {
    True,
    Said(usize),
    /// Nothing: the body ends where the connection does.
    Silent,
}

/// One scripted answer.
#[derive(Debug, Clone)]
pub struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    length: Length,
    ranges: bool,
}

impl Reply {
    pub fn ok(body: impl Into<Vec<u8>>) -> Self {
        Self { status: 200, headers: Vec::new(), body: body.into(), length: Length::True, ranges: false }
    }

    pub fn status(status: u16) -> Self {
        Self { status, ..Self::ok("scripted") }
    }

    pub fn redirect(to: &str) -> Self {
        Self::status(302).header("Location", to)
    }

    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Announces a length that need not be the body's.
    pub fn announce(self, length: usize) -> Self {
        Self { length: Length::Said(length), ..self }
    }

    /// Announces the whole body and breaks off after `n` bytes of it.
    pub fn break_off_after(mut self, n: usize) -> Self {
        let whole = self.body.len();
        self.body.truncate(n);
        self.announce(whole)
    }

    pub fn without_length(self) -> Self {
        Self { length: Length::Silent, ..self }
    }

    /// Answers byte ranges, as release hosts do.
    pub fn with_ranges(self) -> Self {
        Self { ranges: true, ..self }
    }
}

#[derive(Default)]
struct State {
    /// Answers still to be given, per path; the last one stays.
    script: HashMap<String, Vec<Reply>>,
    requests: Vec<Request>,
}

pub struct Server {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
    stop: Arc<AtomicBool>,
    accepting: Option<JoinHandle<()>>,
}

impl Server {
    pub fn start() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a loopback port");
        let address = listener.local_addr().expect("its address");
        let (state, stop) = (Arc::new(Mutex::new(State::default())), Arc::new(AtomicBool::new(false)));
        let (shared, stopped) = (Arc::clone(&state), Arc::clone(&stop));
        let accepting = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                let state = Arc::clone(&shared);
                // A client that hangs up early is one of the behaviours under test, not a fault of the server.
                std::thread::spawn(move || drop(answer(stream, &state)));
            }
        });
        Self { address, state, stop, accepting: Some(accepting) }
    }

    /// Answers `path` with these replies in turn, and with the last of them from then on. Other paths are 404.
    pub fn on(&self, path: &str, replies: impl IntoIterator<Item = Reply>) {
        let mut replies: Vec<Reply> = replies.into_iter().collect();
        replies.reverse();
        self.state.lock().expect("the script").script.insert(path.to_owned(), replies);
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// As [`Server::url`], with credentials.
    pub fn url_as(&self, user: &str, password: &str, path: &str) -> String {
        format!("http://{user}:{password}@{}{path}", self.address)
    }

    pub fn requests(&self) -> Vec<Request> {
        self.state.lock().expect("the requests").requests.clone()
    }

    pub fn paths(&self) -> Vec<String> {
        self.requests().into_iter().map(|request| request.path).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the accepting thread, which then sees the flag.
        if TcpStream::connect(self.address).is_ok()
            && let Some(accepting) = self.accepting.take()
        {
            let _ = accepting.join();
        }
    }
}

/// An address that refuses connections for as long as this lives: the near end of a connection, so that nobody else is
/// given its port and nobody listens there.
pub struct Refusing {
    near: TcpStream,
    _listener: TcpListener,
}

impl Refusing {
    pub fn start() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a loopback port");
        let near = TcpStream::connect(listener.local_addr().expect("its address")).expect("a connection");
        Self { near, _listener: listener }
    }

    /// `127.0.0.1:PORT`
    pub fn authority(&self) -> String {
        self.near.local_addr().expect("its address").to_string()
    }
}

fn answer(stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut reader = BufReader::new(&stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut headers = Vec::new();
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        let Some((key, value)) = line.trim_end().split_once(':') else { break };
        headers.push((key.to_owned(), value.trim().to_owned()));
    }
    let request = Request { path, headers };
    let reply = {
        let mut state = state.lock().expect("the script");
        state.requests.push(request.clone());
        match state.script.get_mut(&request.path) {
            Some(replies) if replies.len() > 1 => replies.pop().expect("more than one"),
            Some(replies) if replies.len() == 1 => replies[0].clone(),
            _ => Reply::status(404),
        }
    };
    send(&stream, &request, reply)
}

fn send(mut stream: &TcpStream, request: &Request, mut reply: Reply) -> std::io::Result<()> {
    if let Some((first, last)) = request.header("Range").filter(|_| reply.ranges).and_then(range) {
        let whole = reply.body.len();
        reply.body = reply.body[first..=last.min(whole - 1)].to_vec();
        reply.status = 206;
        reply = reply.header("Content-Range", &format!("bytes {first}-{}/{whole}", last.min(whole - 1)));
    }
    let mut head = format!("HTTP/1.1 {} Scripted\r\nConnection: close\r\n", reply.status);
    match reply.length {
        Length::True => head += &format!("Content-Length: {}\r\n", reply.body.len()),
        Length::Said(length) => head += &format!("Content-Length: {length}\r\n"),
        Length::Silent => {}
    }
    for (name, value) in &reply.headers {
        head += &format!("{name}: {value}\r\n");
    }
    stream.write_all(format!("{head}\r\n").as_bytes())?;
    stream.write_all(&reply.body)
}

/// `bytes=FIRST-LAST`
fn range(text: &str) -> Option<(usize, usize)> {
    let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
    Some((first.parse().ok()?, last.parse().ok()?))
}
