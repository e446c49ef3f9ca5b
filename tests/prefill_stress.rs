//! The prefill in a graph under a watchdog: `DIR/stress` of the GPU bundle, or `FLASHINFER_RS_RUN_GPU_TESTS=1
//! FLASHINFER_RS_STRESS=1 cargo test --release --features cudarc --test prefill_stress`.
//!
//! Upstream reports (flashinfer#3329) that this release's kernel was seen to hang when it is replayed from a CUDA graph: 32 value
//! heads, one sequence of 512 tokens and 48 of 6, inputs and states refreshed between replays, in one of five processes. A
//! process that hangs cannot be asked, so each run is a process of its own, with a limit: `PROCESSES` of them (20), with
//! `REPLAYS` replays each (300), in `LIMIT` seconds (120).

#[path = "support/data.rs"]
mod data;
#[path = "support/gpu.rs"]
mod gpu;

use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use cudarc::driver::CudaSlice;
use data::Random;
use flashinfer_rs::kernels::gdn::{CapturedPrefill, GdnOptions, GdnPrefillContext, GdnTensors};
use flashinfer_rs::{CapturedCuSeqlens, CuSeqlens, LaunchGraph, TensorMut, TensorRef};
use gpu::Gpu;
use half::bf16;
use libtest_mimic::{Arguments, Trial};

/// Asks for this beside the GPU tests.
const STRESS: &str = "FLASHINFER_RS_STRESS";
/// Set in the processes that replay, to their number.
const NUMBER: &str = "FLASHINFER_RS_STRESS_PROCESS";
/// What such a process exits with for a wrong result.
const WRONG: u8 = 3;

const SIZE: i64 = 128;
const Q_HEADS: i64 = 16;
const V_HEADS: i64 = 32;

fn main() -> ExitCode {
    if let Ok(number) = std::env::var(NUMBER) {
        return replay(number.parse().unwrap());
    }
    let asked = [gpu::RUN, STRESS].iter().all(|name| std::env::var_os(name).is_some_and(|value| value == "1"));
    if !asked {
        let trial = Trial::test("no_process_of_replays_hangs_or_is_wrong", || Ok(())).with_ignored_flag(true);
        return libtest_mimic::run(&Arguments::from_args(), vec![trial]).exit_code();
    }
    let (processes, replays, limit) = (number("PROCESSES", 20), number("REPLAYS", 300), number("LIMIT", 120));
    let [mut hangs, mut wrong, mut failed] = [0u64; 3];
    for process in 0..processes {
        match watched(process, Duration::from_secs(limit)) {
            Some(status) if status.success() => {}
            Some(status) if status.code() == Some(WRONG.into()) => {
                wrong += 1;
                println!("stress: process {process} computed something wrong");
            }
            // That it could not run is no good news either.
            Some(status) => {
                failed += 1;
                println!("stress: process {process} ended with {status}");
            }
            None => {
                hangs += 1;
                println!("stress: process {process} was not done after {limit} seconds");
            }
        }
    }
    let others = if failed > 0 { format!(", {failed} failed otherwise") } else { String::new() };
    println!("stress: {processes} processes of {replays} replays, {hangs} hangs, {wrong} wrong{others}");
    ExitCode::from(u8::from(hangs + wrong + failed > 0))
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// How a process ended; `None` where it was ended because it took too long.
fn watched(process: u64, limit: Duration) -> Option<ExitStatus> {
    let program = std::env::current_exe().unwrap();
    let mut child = Command::new(program).env(NUMBER, process.to_string()).stdin(Stdio::null()).spawn().unwrap();
    let status = ended(&mut child, limit);
    if status.is_none() {
        child.kill().ok();
        // The driver may hold on to a process whose kernel does not end; the others are run all the same.
        ended(&mut child, Duration::from_secs(20));
    }
    status
}

fn ended(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let start = Instant::now();
    loop {
        match child.try_wait().unwrap() {
            None if start.elapsed() < limit => thread::sleep(Duration::from_millis(50)),
            status => return status,
        }
    }
}

/// What is refreshed between replays, and what comes of it.
struct Inputs {
    halves: [CudaSlice<bf16>; 3],
    floats: [CudaSlice<f32>; 3],
    expected: (Vec<bf16>, Vec<f32>),
}

struct Sizes {
    sequences: CuSeqlens,
    q: [i64; 3],
    v: [i64; 3],
    per_token: [i64; 2],
    states: [i64; 4],
}

fn count(shape: &[i64]) -> usize {
    shape.iter().product::<i64>() as usize
}

impl Sizes {
    fn new() -> Self {
        let sequences = CuSeqlens::from_lengths(&[&[512][..], &[6; 48]].concat()).unwrap();
        let tokens = sequences.tokens();
        Self {
            q: [tokens, Q_HEADS, SIZE],
            v: [tokens, V_HEADS, SIZE],
            per_token: [tokens, V_HEADS],
            states: [sequences.sequences() as i64, V_HEADS, SIZE, SIZE],
            sequences,
        }
    }

    fn inputs(&self, gpu: &Gpu, seed: u64) -> Inputs {
        let (stream, mut random) = (&gpu.stream, Random(seed));
        let rows = count(&self.q[..2]);
        let q = stream.clone_htod(&random.unit::<bf16>(rows, SIZE as usize)).unwrap();
        let k = stream.clone_htod(&random.unit::<bf16>(rows, SIZE as usize)).unwrap();
        let v = stream.clone_htod(&random.normal::<bf16>(count(&self.v))).unwrap();
        let alpha = stream.clone_htod(&random.between(0.8, 1.0, count(&self.per_token))).unwrap();
        let beta = stream.clone_htod(&random.between(0.0, 1.0, count(&self.per_token))).unwrap();
        let state = stream.clone_htod(&random.between(-0.3, 0.3, count(&self.states))).unwrap();
        let mut output = stream.alloc_zeros::<bf16>(count(&self.v)).unwrap();
        let mut output_state = stream.alloc_zeros::<f32>(count(&self.states)).unwrap();
        let mut tensors = GdnTensors {
            output: TensorMut::from_cudarc(stream, &mut output, &self.v).unwrap(),
            output_state: TensorMut::from_cudarc(stream, &mut output_state, &self.states).unwrap(),
            q: TensorRef::from_cudarc(stream, &q, &self.q).unwrap(),
            k: TensorRef::from_cudarc(stream, &k, &self.q).unwrap(),
            v: TensorRef::from_cudarc(stream, &v, &self.v).unwrap(),
        };
        let options = GdnOptions::default()
            .with_alpha(TensorRef::from_cudarc(stream, &alpha, &self.per_token).unwrap())
            .with_beta(TensorRef::from_cudarc(stream, &beta, &self.per_token).unwrap())
            .with_input_state(TensorRef::from_cudarc(stream, &state, &self.states).unwrap());
        let offsets = self.sequences.to_device(stream).unwrap();
        GdnPrefillContext::new(stream).unwrap().prefill(&mut tensors, &offsets, &options).unwrap();
        let expected = (stream.clone_dtoh(&output).unwrap(), stream.clone_dtoh(&output_state).unwrap());
        Inputs { halves: [q, k, v], floats: [alpha, beta, state], expected }
    }
}

/// One process: a graph of one prefill, replayed with other inputs each time, beside direct calls.
fn replay(process: u64) -> ExitCode {
    let (gpu, sizes) = (Gpu::open(), Sizes::new());
    let stream = &gpu.stream;
    let each = [0, 1].map(|i| sizes.inputs(&gpu, 2 * process + i));
    let empty = |shape: &[i64]| stream.alloc_zeros::<bf16>(count(shape)).unwrap();
    let zeros = |shape: &[i64]| stream.alloc_zeros::<f32>(count(shape)).unwrap();
    let halves = [empty(&sizes.q), empty(&sizes.q), empty(&sizes.v)];
    let floats = [zeros(&sizes.per_token), zeros(&sizes.per_token), zeros(&sizes.states)];
    let results = (empty(&sizes.v), zeros(&sizes.states));
    let rest = (sizes.sequences.to_device(stream).unwrap(), GdnPrefillContext::new(stream).unwrap());
    let mut graph = LaunchGraph::new(stream, (halves, floats, results, rest)).unwrap();
    let capture = graph.capture(|s, ([q, k, v], [alpha, beta, state], (mut output, mut output_state), rest)| {
        let (offsets, mut context): (CapturedCuSeqlens<'_>, CapturedPrefill<'_>) = rest;
        let mut tensors = GdnTensors {
            output: output.write(&sizes.v)?,
            output_state: output_state.write(&sizes.states)?,
            q: q.read(&sizes.q)?,
            k: k.read(&sizes.q)?,
            v: v.read(&sizes.v)?,
        };
        let options = GdnOptions::default()
            .with_alpha(alpha.read(&sizes.per_token)?)
            .with_beta(beta.read(&sizes.per_token)?)
            .with_input_state(state.read(&sizes.states)?);
        context.prefill(&mut tensors, &offsets, &options, s)
    });
    capture.unwrap();
    let replays = number("REPLAYS", 300);
    for replay in 0..replays {
        let inputs = &each[replay as usize % 2];
        {
            let (halves, floats, (mut output, mut output_state), _) = graph.buffers().unwrap();
            for (mut to, from) in halves.into_iter().zip(&inputs.halves) {
                stream.memcpy_dtod(from, &mut to).unwrap();
            }
            for (mut to, from) in floats.into_iter().zip(&inputs.floats) {
                stream.memcpy_dtod(from, &mut to).unwrap();
            }
            stream.memset_zeros(&mut output).unwrap();
            stream.memset_zeros(&mut output_state).unwrap();
        }
        graph.launch().unwrap();
        let (_, _, (output, output_state), _) = graph.buffers().unwrap();
        let mut right = stream.clone_dtoh(&output).unwrap() == inputs.expected.0;
        // 100 MB of states are not fetched each time.
        if replay % 10 == 0 || replay + 1 == replays {
            right &= stream.clone_dtoh(&output_state).unwrap() == inputs.expected.1;
        }
        if !right {
            println!("stress: process {process}, replay {replay}: not what a direct call gives");
            return ExitCode::from(WRONG);
        }
    }
    ExitCode::SUCCESS
}
