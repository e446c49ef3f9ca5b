//! `cargo xtask bench vendor`: how long vendoring takes, and what it asks of the network, on a synthetic wheel of 2 GB.
//!
//! Each arm runs in a process of its own, compiled as build scripts are, without optimization; the server runs here.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use crate::shell::{self, say};
use crate::vendoring::digest::{Digest, hash_reader};
use crate::vendoring::env::{self, Env};
use crate::vendoring::error::{Error, Result, refuse};
use crate::vendoring::lock::Lock;
use crate::vendoring::source::Ladder;
use crate::vendoring::vendor::vendor;
use crate::vendoring::wheel::Wheel as Archive;

/// Members that nobody wants, and the size of each.
const OTHERS: usize = 948;
const OTHER: usize = 2_200_000;
/// The two that are wanted, as large as today's.
const WANTED: [(&str, usize); 2] = [("norm", 1_400_000), ("gdn_prefill_sm90", 4_200_000)];
/// 100 Mbit/s
const RATE: u64 = 12_500_000;

/// What an arm measured of itself.
#[derive(Serialize, Deserialize)]
struct Measured {
    seconds: f64,
    peak_mb: f64,
}

pub fn compare() -> Result<()> {
    let temporary = tempfile::tempdir().map_err(|e| Error::io("creating a folder in", &std::env::temp_dir(), &e))?;
    let wheel = temporary.path().join("flashinfer_jit_cache-0.6.3+cu130-cp39-abi3-manylinux_2_28_x86_64.whl");
    say("writing a wheel of 2 GB");
    write_wheel(&wheel)?;
    let mut file = File::open(&wheel).map_err(|e| Error::io("opening", &wheel, &e))?;
    let started = Instant::now();
    let (sha256, size) = hash_reader(&file).map_err(|e| Error::io("reading", &wheel, &e))?;
    let hashing = started.elapsed().as_secs_f64();
    file.seek(SeekFrom::Start(0)).map_err(|e| Error::io("reading", &wheel, &e))?;
    let server = Server::start(wheel.clone())?;
    let facts = facts(file, &wheel)?;
    let lock = |name: &str, members: &dyn Fn(&Fact) -> String| -> Result<PathBuf> {
        let path = temporary.path().join(name);
        let text = lock_text(&server, &wheel, sha256, size, &facts, members);
        fs::write(&path, text).map_err(|e| Error::io("writing", &path, &e))?;
        Ok(path)
    };
    let placed = lock("placed.lock", &|fact| fact.digest.clone() + &fact.place)?;
    let unplaced = lock("unplaced.lock", &|fact| fact.digest.clone())?;
    let unknown = lock("unknown.lock", &|_| String::new())?;

    let mut rows = Vec::new();
    let mut run = |name: &str, folder: &str, lock: &Path, limited: bool| -> Result<Measured> {
        server.reset(limited);
        let measured = child(&temporary.path().join(folder), lock)?;
        let (requests, bytes) = server.counts();
        rows.push(format!("| {name} | {:.2} | {requests} | {bytes} | {:.0} |", measured.seconds, measured.peak_mb));
        Ok(measured)
    };
    let ranges = run("ranges, places in the lock, 100 Mbit/s", "a", &placed, true)?;
    let directory = run("ranges, digests only in the lock, 100 Mbit/s", "b", &unplaced, true)?;
    let whole = run("whole wheel, 100 Mbit/s", "c", &unknown, true)?;
    let fast = run("whole wheel, unlimited", "d", &unknown, false)?;
    let warm = run("warm cache, fresh target folder", "a", &placed, true)?;
    let wanted: u64 = facts.iter().map(|fact| fact.length).sum();

    println!("| arm | seconds | requests | bytes on the wire | peak memory, MB |\n|---|---|---|---|---|");
    rows.iter().for_each(|row| println!("{row}"));
    println!();
    println!("wheel: {size} bytes, {} members; wanted with their headers: {wanted} bytes", OTHERS + WANTED.len() + 3);
    println!(
        "whole / ranges: {:.0}; whole / ranges with the directory: {:.0}",
        whole.seconds / ranges.seconds,
        whole.seconds / directory.seconds
    );
    println!(
        "hashing the wheel alone: {hashing:.2} s, {:.1} % of the limited download and {:.0} % of the unlimited one, without it",
        100.0 * hashing / (whole.seconds - hashing),
        100.0 * hashing / (fast.seconds - hashing)
    );
    println!("warm cache: {:.2} s", warm.seconds);
    Ok(())
}

/// Bytes that do not compress, different for every seed.
fn noise(seed: u64, count: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(count + 8);
    while bytes.len() < count {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(count);
    bytes
}

fn member(module: &str) -> String {
    format!("flashinfer_jit_cache/jit_cache/{module}/{module}.so")
}

fn write_wheel(path: &Path) -> Result<()> {
    let failed = |e: &dyn std::fmt::Display| Error::Refused(format!("writing {} failed: {e}", path.display()));
    let file = File::create(path).map_err(|e| failed(&e))?;
    let mut zip = ZipWriter::new(BufWriter::new(file));
    let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    let deflated = stored.compression_method(CompressionMethod::Deflated);
    let mut put = |path: &str, bytes: &[u8], options| -> Result<()> {
        zip.start_file(path, options).map_err(|e| failed(&e))?;
        zip.write_all(bytes).map_err(|e| failed(&e))
    };
    for i in 0..OTHERS {
        put(&member(&format!("other_{i:03}")), &noise(i as u64, OTHER), stored)?;
        if let Some((module, size)) = WANTED.get(i / 400).filter(|_| i % 400 == 200) {
            // Half noise, half zeros: code compresses about so.
            let mut bytes = noise(1_000_000 + i as u64, size / 2);
            bytes.resize(*size, 0);
            put(&member(module), &bytes, deflated)?;
        }
    }
    let info = "flashinfer_jit_cache-0.6.3+cu130.dist-info";
    put(
        &format!("{info}/METADATA"),
        b"Metadata-Version: 2.1\nName: flashinfer-jit-cache\nVersion: 0.6.3+cu130\n",
        deflated,
    )?;
    put(&format!("{info}/WHEEL"), b"Wheel-Version: 1.0\nTag: cp39-abi3-manylinux_2_28_x86_64\n", deflated)?;
    put(&format!("{info}/RECORD"), b"", deflated)?;
    zip.finish().map_err(|e| failed(&e))?.flush().map_err(|e| failed(&e))
}

/// What a lock can say of a member, as TOML.
struct Fact {
    module: &'static str,
    digest: String,
    place: String,
    length: u64,
}

fn facts(file: File, wheel: &Path) -> Result<Vec<Fact>> {
    let mut archive = Archive::open(BufReader::new(file), wheel.display().to_string())?;
    let one = |(module, _): &(&'static str, usize)| {
        let path = member(module);
        let unlocked = crate::vendoring::lock::Member::at(path.clone());
        let (sha256, size) = archive.copy(&unlocked, &mut std::io::sink(), wheel)?;
        let place = archive.place(&path)?;
        let crc32 = archive.crc32(&path)?;
        Ok(Fact {
            module,
            digest: format!("size = {size}\nsha256 = \"{sha256}\"\n"),
            place: format!(
                "offset = {}\nlength = {}\ncompressed = {}\nmethod = \"deflate\"\ncrc32 = \"{crc32:08x}\"\n",
                place.offset, place.length, place.compressed
            ),
            length: place.length,
        })
    };
    WANTED.iter().map(one).collect()
}

fn lock_text(
    server: &Server,
    wheel: &Path,
    sha256: Digest,
    size: u64,
    facts: &[Fact],
    known: &dyn Fn(&Fact) -> String,
) -> String {
    let file = wheel.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut text = format!(
        "version = 1\n[[wheel]]\ndistribution = \"flashinfer_jit_cache\"\nversion = \"0.6.3+cu130\"\ntarget = \"bench\"\n\
         file = \"{file}\"\nsha256 = \"{sha256}\"\nsize = {size}\nsources = [{{ url = \"{}\" }}]\n",
        server.url
    );
    for fact in facts {
        let (path, module) = (member(fact.module), fact.module);
        text += &format!("[[wheel.member]]\npath = \"{path}\"\nsoname = \"{module}.so\"\n{}", known(fact));
    }
    text
}

/// Runs an arm, and reads what it measured.
fn child(folder: &Path, lock: &Path) -> Result<Measured> {
    let program = std::env::current_exe().map_err(|e| Error::io("finding", Path::new("xtask"), &e))?;
    let text = shell::output(Command::new(program).args(["bench", "vendor-arm"]).args([folder, lock]))?;
    serde_json::from_str(text.trim()).map_err(|e| Error::Refused(format!("an arm said `{text}`: {e}")))
}

/// Vendors into a new target folder, with the cache that belongs to the arm.
pub fn arm(folder: &Path, lock: &Path) -> Result<()> {
    let started = Instant::now();
    let lock = Lock::read(lock)?;
    let environment = Env::fixed([(env::CACHE_DIR, folder.join("cache"))]);
    let mut silent = |_, _| {};
    let mut ladder = Ladder::new(&environment, &mut silent);
    let target = tempfile::tempdir_in(folder.parent().unwrap_or(folder))
        .map_err(|e| Error::io("creating a folder in", folder, &e))?;
    let outcome = vendor(&lock, "bench", &|_| true, &mut ladder, target.path())?;
    if outcome.rows.len() != WANTED.len() {
        refuse!("{} members were vendored, expected {}", outcome.rows.len(), WANTED.len());
    }
    let seconds = started.elapsed().as_secs_f64();
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak =
        status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse::<f64>().ok());
    let measured = Measured { seconds, peak_mb: peak.unwrap_or(f64::NAN) / 1000.0 };
    println!("{}", serde_json::to_string(&measured).map_err(|e| Error::Refused(e.to_string()))?);
    Ok(())
}

/// A server of one file that answers ranges, as fast as it is told to.
struct Server {
    url: String,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    requests: AtomicU64,
    bytes: AtomicU64,
    limited: AtomicBool,
}

impl Server {
    fn start(file: PathBuf) -> Result<Self> {
        let failed = |e: std::io::Error| Error::Refused(format!("listening on 127.0.0.1 failed: {e}"));
        let listener = TcpListener::bind("127.0.0.1:0").map_err(failed)?;
        let url = format!("http://{}/wheel", listener.local_addr().map_err(failed)?);
        let state = Arc::new(State::default());
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (file, state) = (file.clone(), Arc::clone(&shared));
                // A client that goes away is no fault of the server's.
                thread::spawn(move || serve(stream, &file, &state).unwrap_or_default());
            }
        });
        Ok(Self { url, state })
    }

    fn reset(&self, limited: bool) {
        self.state.requests.store(0, Ordering::SeqCst);
        self.state.bytes.store(0, Ordering::SeqCst);
        self.state.limited.store(limited, Ordering::SeqCst);
    }

    fn counts(&self) -> (u64, u64) {
        (self.state.requests.load(Ordering::SeqCst), self.state.bytes.load(Ordering::SeqCst))
    }
}

fn serve(stream: TcpStream, path: &Path, state: &State) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream;
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    loop {
        let mut range = None;
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        loop {
            line.clear();
            if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
                break;
            }
            if let Some(bytes) = line.to_ascii_lowercase().strip_prefix("range: bytes=") {
                range = bytes
                    .trim()
                    .split_once('-')
                    .and_then(|(a, b)| Some((a.parse().ok()?, b.parse().unwrap_or(size - 1))));
            }
        }
        let (first, last): (u64, u64) = range.unwrap_or((0, size - 1));
        let length = last - first + 1;
        match range {
            Some(_) => write!(
                writer,
                "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {first}-{last}/{size}\r\nContent-Length: {length}\r\n\r\n"
            )?,
            None => write!(writer, "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n")?,
        }
        state.requests.fetch_add(1, Ordering::SeqCst);
        file.seek(SeekFrom::Start(first))?;
        let (started, mut sent, mut buffer) = (Instant::now(), 0, vec![0; 1 << 16]);
        while sent < length {
            let n = buffer.len().min((length - sent) as usize);
            file.read_exact(&mut buffer[..n])?;
            writer.write_all(&buffer[..n])?;
            sent += n as u64;
            state.bytes.fetch_add(n as u64, Ordering::SeqCst);
            if state.limited.load(Ordering::SeqCst) {
                let due = Duration::from_secs_f64(sent as f64 / RATE as f64);
                thread::sleep(due.saturating_sub(started.elapsed()));
            }
        }
    }
}
