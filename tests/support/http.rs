//! An HTTP/1.1 server on loopback whose every answer is scripted, and which remembers what it was asked.
#![allow(dead_code, reason = "each test uses its own part")]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;

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
    /// Breaks off after so many bytes of what it announced.
    cut: Option<usize>,
    /// So many bytes at once, as slow lines do.
    piece: Option<usize>,
    gate: Option<Gate>,
    /// Says nothing at all, for as long as the client waits.
    mute: bool,
}

/// Keeps answers back until it is opened.
#[derive(Debug, Clone, Default)]
pub struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    pub fn open(&self) {
        *self.0.0.lock().expect("the gate") = true;
        self.0.1.notify_all();
    }

    fn pass(&self) {
        let closed = self.0.0.lock().expect("the gate");
        drop(self.0.1.wait_while(closed, |open| !*open).expect("the gate"));
    }
}

impl Reply {
    pub fn ok(body: impl Into<Vec<u8>>) -> Self {
        let (headers, length) = (Vec::new(), Length::True);
        let (body, cut, piece, gate) = (body.into(), None, None, None);
        Self { status: 200, headers, body, length, ranges: false, cut, piece, gate, mute: false }
    }

    /// No answer, and the connection stays.
    pub fn silence() -> Self {
        Self { mute: true, ..Self::ok("") }
    }

    pub fn status(status: u16) -> Self {
        Self { status, ..Self::ok("scripted") }
    }

    /// What claims to be this part of a file.
    pub fn partial(content_range: &str, body: impl Into<Vec<u8>>) -> Self {
        Self::ok(body).with_status(206).header("Content-Range", content_range)
    }

    pub fn redirect(to: &str) -> Self {
        Self::ok("").with_status(302).header("Location", to)
    }

    pub fn with_status(self, status: u16) -> Self {
        Self { status, ..self }
    }

    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Announces a length that need not be the body's.
    pub fn announce(self, length: usize) -> Self {
        Self { length: Length::Said(length), ..self }
    }

    /// Announces the whole body, or the range that was asked for, and breaks off after `n` bytes of it.
    pub fn break_off_after(self, n: usize) -> Self {
        Self { cut: Some(n), ..self }
    }

    pub fn without_length(self) -> Self {
        Self { length: Length::Silent, ..self }
    }

    /// Sends the body in pieces of `n` bytes.
    pub fn in_pieces_of(self, n: usize) -> Self {
        Self { piece: Some(n), ..self }
    }

    /// Waits for the gate before the body.
    pub fn behind(self, gate: &Gate) -> Self {
        Self { gate: Some(gate.clone()), ..self }
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
    /// Bytes of bodies.
    sent: usize,
    /// The value of `Authorization` that it insists on, and the status for who has another.
    members_only: Option<(String, u16)>,
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

    /// Shows what it has to this user only, and this status to everybody else.
    pub fn admit(&self, user: &str, password: &str, otherwise: u16) {
        let wanted = format!("Basic {}", BASE64_STANDARD.encode(format!("{user}:{password}")));
        self.state.lock().expect("the state").members_only = Some((wanted, otherwise));
    }

    /// `127.0.0.1:PORT`
    pub fn authority(&self) -> String {
        self.address.to_string()
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

    /// How many bytes of bodies were sent in all.
    pub fn sent(&self) -> usize {
        self.state.lock().expect("the count").sent
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

fn answer(stream: TcpStream, shared: &Mutex<State>) -> std::io::Result<()> {
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
        let mut state = shared.lock().expect("the script");
        state.requests.push(request.clone());
        let stranger = |(wanted, _): &&(String, u16)| request.header("Authorization") != Some(wanted);
        if let Some(status) = state.members_only.as_ref().filter(stranger).map(|(_, status)| *status) {
            drop(state);
            return send(&stream, &request, Reply::status(status), shared);
        }
        match state.script.get_mut(&request.path) {
            Some(replies) if replies.len() > 1 => replies.pop().expect("more than one"),
            Some(replies) if replies.len() == 1 => replies[0].clone(),
            _ => Reply::status(404),
        }
    };
    if reply.mute {
        // Until the client hangs up.
        reader.read_to_end(&mut Vec::new())?;
        return Ok(());
    }
    send(&stream, &request, reply, shared)
}

fn send(mut stream: &TcpStream, request: &Request, mut reply: Reply, state: &Mutex<State>) -> std::io::Result<()> {
    if let Some(range) = request.header("Range").filter(|_| reply.ranges && is_the_same(request, &reply)) {
        reply = in_range(reply, range);
    }
    let announced = match reply.length {
        Length::True => Some(reply.body.len()),
        Length::Said(length) => Some(length),
        Length::Silent => None,
    };
    reply.body.truncate(reply.cut.unwrap_or(usize::MAX));
    state.lock().expect("the count").sent += reply.body.len();
    let mut head = format!("HTTP/1.1 {} Scripted\r\nConnection: close\r\n", reply.status);
    if let Some(length) = announced {
        head += &format!("Content-Length: {length}\r\n");
    }
    for (name, value) in &reply.headers {
        head += &format!("{name}: {value}\r\n");
    }
    stream.set_nodelay(true)?;
    stream.write_all(format!("{head}\r\n").as_bytes())?;
    if let Some(gate) = &reply.gate {
        gate.pass();
    }
    reply.body.chunks(reply.piece.unwrap_or(usize::MAX)).try_for_each(|piece| stream.write_all(piece))
}

/// Whether the file is the one that the client asks for the rest of.
fn is_the_same(request: &Request, reply: &Reply) -> bool {
    let tag = reply.headers.iter().find(|(name, _)| name == "ETag").map(|(_, tag)| tag.as_str());
    request.header("If-Range").is_none_or(|wanted| Some(wanted) == tag)
}

/// `bytes=FIRST-LAST` or `bytes=FIRST-` of a whole answer.
fn in_range(mut reply: Reply, range: &str) -> Reply {
    let whole = reply.body.len();
    let (first, last) = range.strip_prefix("bytes=").and_then(|range| range.split_once('-')).expect("one range");
    let first: usize = first.parse().expect("where the range starts");
    let last = last.parse().map_or(whole - 1, |last: usize| last.min(whole - 1));
    if first > last {
        return Reply::status(416);
    }
    reply.body = reply.body[first..=last].to_vec();
    reply.status = 206;
    reply.header("Content-Range", &format!("bytes {first}-{last}/{whole}"))
}
