//! What programs that measure calls of the kernels have in common: how they are asked, and how they measure. benches/c/arm.h is
//! the same for C.
//!
//! A program prints `ready`, then answers each line of standard input with one line: a number, `-` where it does not have
//! that case, or `error TEXT`.

use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DeviceRepr, DriverError, ValidAsZeroBits};
use flashinfer_rs::{GraphBuffers, LaunchGraph};

pub type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

const BATCHES: usize = 15;
/// Those before them, which warm up.
const FIRST: usize = 5;
/// How often a graph is timed, and how long a timed run of it should last.
const TIMINGS: usize = 5;
const TIMED_NS: f64 = 10e6;

// ---- being asked ----

/// Starts with the arguments of the program, says that it is ready, and answers until nobody asks any more.
pub fn serve<B>(
    start: impl FnOnce(&[String]) -> Result<B>,
    answer: impl Fn(&B, &str) -> Result<Option<f64>>,
) -> ExitCode {
    match serve_all(start, answer) {
        Ok(code) => code,
        // Nobody reads the answers any more.
        Err(_) => ExitCode::FAILURE,
    }
}

fn serve_all<B>(
    start: impl FnOnce(&[String]) -> Result<B>,
    answer: impl Fn(&B, &str) -> Result<Option<f64>>,
) -> io::Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let bench = match start(&arguments) {
        Ok(bench) => bench,
        Err(error) => {
            say(&problem(&*error))?;
            return Ok(ExitCode::FAILURE);
        }
    };
    say("ready")?;
    for request in io::stdin().lines() {
        say(&match answer(&bench, &request?) {
            Ok(Some(value)) => format!("{value:.3}"),
            Ok(None) => "-".to_owned(),
            Err(error) => problem(&*error),
        })?;
    }
    Ok(ExitCode::SUCCESS)
}

fn say(line: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}

/// On one line, however long the error is.
fn problem(error: &dyn Error) -> String {
    format!("error {}", error.to_string().split_whitespace().collect::<Vec<_>>().join(" "))
}

/// The words of a request, and its numbers, all of which are positive; no numbers where one is none.
pub fn parse(request: &str) -> (Vec<&str>, Option<Vec<i64>>) {
    let (words, numbers): (Vec<&str>, Vec<&str>) =
        request.split_whitespace().partition(|word| word.starts_with(|c: char| c.is_ascii_alphabetic()));
    // Of 31 bits, so that no product of two overflows.
    let number = |text: &&str| text.parse::<i32>().ok().filter(|number| *number > 0).map(i64::from);
    (words, numbers.iter().map(number).collect())
}

// ---- memory ----

/// Random numbers in (0, 1), by xorshift: the same in every run.
pub struct Uniform(u64);

impl Uniform {
    pub fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    pub fn next(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((self.0 >> 41) as f32 + 0.5) / (1 << 23) as f32
    }
}

/// A buffer for a tensor of this shape, full of noise.
pub fn filled<T: DeviceRepr + ValidAsZeroBits>(
    stream: &Arc<CudaStream>,
    noise: &CudaSlice<T>,
    shape: &[i64],
) -> Result<CudaSlice<T>, DriverError> {
    let mut buffer = zeros(stream, shape)?;
    let len = buffer.len();
    for start in (0..len).step_by(noise.len()) {
        let count = noise.len().min(len - start);
        stream.memcpy_dtod(&noise.slice(..count), &mut buffer.slice_mut(start..start + count))?;
    }
    Ok(buffer)
}

pub fn zeros<T: DeviceRepr + ValidAsZeroBits>(
    stream: &Arc<CudaStream>,
    shape: &[i64],
) -> Result<CudaSlice<T>, DriverError> {
    stream.alloc_zeros(shape.iter().product::<i64>() as usize)
}

// ---- measuring ----

/// What is timed: this many launches, on the host alone or until the GPU is done too.
#[derive(Clone, Copy)]
pub struct Timing {
    pub launches: usize,
    pub until_done: bool,
}

impl Timing {
    /// Short enough for the launch queue.
    pub const fn host(launches: usize) -> Self {
        Self { launches, until_done: false }
    }
}

/// Makes so many launches. Called once per timing, so that what it costs to call it does not show.
pub type Launches<'a> = dyn FnMut(usize) -> flashinfer_rs::Result<()> + 'a;

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The median time of what `timing` says, in ns. The first rounds warm up; each starts from an idle GPU.
pub fn time(stream: &CudaStream, timing: Timing, launches: &mut Launches<'_>) -> Result<f64> {
    let mut values = Vec::new();
    for round in 0..FIRST + BATCHES {
        stream.synchronize()?;
        let start = Instant::now();
        launches(timing.launches)?;
        if timing.until_done {
            stream.synchronize()?;
        }
        let ns = start.elapsed().as_nanos() as f64;
        values.extend((round >= FIRST).then_some(ns));
    }
    stream.synchronize()?;
    Ok(median(values))
}

/// GPU time per launch of a graph of so many, in ns: replays on its stream between two events.
pub fn time_gpu<B: GraphBuffers>(
    context: &Arc<CudaContext>,
    stream: &CudaStream,
    mut graph: LaunchGraph<B>,
    launches: usize,
) -> Result<f64> {
    let event = || context.new_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
    let (start, end) = (event()?, event()?);
    let mut values = Vec::new();
    let mut replays = 1;
    // The first timing says how many replays the others take.
    for timing in 0..=TIMINGS {
        start.record(stream)?;
        for _ in 0..replays {
            graph.launch()?;
        }
        end.record(stream)?;
        let ns = 1e6 * f64::from(start.elapsed_ms(&end)?);
        if timing > 0 {
            values.push(ns / (replays * launches) as f64);
        } else if ns > 0.0 {
            replays = 1 + (TIMED_NS / ns) as usize;
        }
    }
    Ok(median(values))
}
