//! What a build says while it goes on. cargo keeps a build script's standard error to itself, unless it fails or is
//! watched by `cargo build -vv`.

use std::fmt::Display;
use std::io::Write;
use std::time::{Duration, Instant};

/// How often a transfer says how far it is.
const EVERY: Duration = Duration::from_secs(5);

/// Says something at once.
pub fn say(text: impl Display) {
    eprintln!("flashinfer-rs: {text}");
}

/// Says now and then how far a transfer is.
pub struct Meter<W> {
    out: W,
    /// When this transfer began, and with how many bytes.
    began: Option<(Instant, u64)>,
    said: Option<Instant>,
    last: u64,
}

impl<W: Write> Meter<W> {
    pub fn new(out: W) -> Self {
        Self { out, began: None, said: None, last: 0 }
    }

    /// So many bytes are there at this moment, of so many in all where that is known.
    pub fn tell(&mut self, now: Instant, done: u64, total: Option<u64>) {
        let (started, from) = match self.began {
            Some(began) if done >= self.last => began,
            // Another transfer, or the same from the start.
            _ => {
                self.said = Some(now);
                *self.began.insert((now, done))
            }
        };
        self.last = done;
        if total == Some(done) {
            self.began = None;
            return;
        }
        if self.said.is_some_and(|said| now.duration_since(said) < EVERY) {
            return;
        }
        self.said = Some(now);
        let seconds = now.duration_since(started).as_secs_f64();
        let speed = if seconds > 0.0 { (done - from) as f64 / seconds } else { 0.0 };
        let megabytes = |bytes: u64| bytes as f64 / 1e6;
        let of = match total.filter(|&total| total > 0) {
            Some(total) => {
                let left = total.saturating_sub(done) as f64 / speed.max(1.0);
                let percent = done as f64 / total as f64 * 100.0;
                format!(" of {:.1} MB ({percent:.0} %), {:.1} MB/s, {left:.0} s to go", megabytes(total), speed / 1e6)
            }
            None => format!(" MB, {:.1} MB/s", speed / 1e6),
        };
        // Nobody is left to tell that nobody listens.
        let _ = writeln!(self.out, "flashinfer-rs: {:.1}{of}", megabytes(done));
    }
}
