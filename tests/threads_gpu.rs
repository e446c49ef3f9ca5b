//! Eight threads with every norm on one GPU. `FLASHINFER_RS_RUN_GPU_TESTS=1 cargo test --release --features cudarc --test
//! threads_gpu` runs them, within 300 seconds; `FLASHINFER_RS_THREAD_CALLS` is the number of calls in each thread, 100,000
//! without.
//!
//! Upstream's launchers set the kernel's shared memory to what their own sizes need before they launch it: a call of
//! another thread with other sizes, in between, made the launch fail.

#[path = "support/data.rs"]
mod data;
#[path = "support/gpu.rs"]
mod gpu;

use std::process::ExitCode;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use cudarc::driver::{CudaSlice, CudaStream};
use data::{Number, Random, assert_close, widened};
use flashinfer_rs::kernels::norm::{
    NormOptions, fused_add_rmsnorm, fused_add_rmsnorm_quant, gemma_fused_add_rmsnorm, gemma_rmsnorm, layernorm,
    rmsnorm, rmsnorm_quant,
};
use flashinfer_rs::{DType, Device, Stream, TensorMut, TensorRef};
use gpu::Gpu;
use half::bf16;

fn main() -> ExitCode {
    gpu::main(&[
        ("eight_threads_of_every_norm_never_fail_and_are_right", |gpu| threads(gpu, false)),
        ("and_with_cudarc_s_events_too", |gpu| threads(gpu, true)),
    ])
}

const THREADS: usize = 8;
const ROWS: i64 = 4;
/// One above what a kernel may have without asking, several below.
const COLUMNS: [i64; 6] = [256, 512, 1000, 4096, 8192, 16_384];
const SCALE: f64 = 0.05;
/// Calls between two looks at the results.
const BETWEEN: usize = 10_000;

#[derive(Debug, Clone, Copy)]
enum Norm {
    Rmsnorm,
    PerHead,
    Gemma,
    Fused,
    GemmaFused,
    Quant,
    FusedQuant,
    Layernorm,
}

const NORMS: [Norm; 8] = [
    Norm::Rmsnorm,
    Norm::PerHead,
    Norm::Gemma,
    Norm::Fused,
    Norm::GemmaFused,
    Norm::Quant,
    Norm::FusedQuant,
    Norm::Layernorm,
];

/// A call's tensors; each norm uses some of them.
struct Tensors<'a> {
    out: TensorMut<'a>,
    eight: TensorMut<'a>,
    input: TensorMut<'a>,
    residual: TensorMut<'a>,
    weight: TensorRef<'a>,
    gamma: TensorRef<'a>,
    beta: TensorRef<'a>,
}

fn call(norm: Norm, on: &mut Tensors<'_>, options: &NormOptions, s: Stream<'_>) -> flashinfer_rs::Result<()> {
    let Tensors { out, eight, input, residual, weight, gamma, beta } = on;
    match norm {
        Norm::Rmsnorm => rmsnorm(out, &input.as_ref(), weight, options, s),
        Norm::PerHead => {
            let heads = [ROWS / 2, 2, out.shape()[1]];
            rmsnorm(&mut out.reshape(&heads)?, &input.as_ref().reshape(&heads)?, weight, options, s)
        }
        Norm::Gemma => gemma_rmsnorm(out, &input.as_ref(), weight, options, s),
        Norm::Fused => fused_add_rmsnorm(input, residual, weight, options, s),
        Norm::GemmaFused => gemma_fused_add_rmsnorm(input, residual, weight, options, s),
        Norm::Quant => rmsnorm_quant(eight, &input.as_ref(), weight, SCALE, options, s),
        Norm::FusedQuant => fused_add_rmsnorm_quant(eight, &input.as_ref(), residual, weight, SCALE, options, s),
        Norm::Layernorm => layernorm(out, &input.as_ref(), gamma, beta, 1e-5, s),
    }
}

/// A norm's inputs and results on the host.
struct Values {
    input: Vec<bf16>,
    residual: Vec<bf16>,
    weight: Vec<bf16>,
    gamma: Vec<f32>,
    beta: Vec<f32>,
    /// What the reference makes of them: of the output, the 8-bit output, the input and the residual.
    expected: (Vec<f32>, Vec<u8>, Vec<f32>, Vec<f32>),
}

/// One norm of one size, with buffers of its own.
struct Work {
    norm: Norm,
    columns: i64,
    options: NormOptions,
    values: Values,
    out: CudaSlice<bf16>,
    eight: CudaSlice<u8>,
    input: CudaSlice<bf16>,
    residual: CudaSlice<bf16>,
    weight: CudaSlice<bf16>,
    gamma: CudaSlice<f32>,
    beta: CudaSlice<f32>,
}

impl Values {
    fn new(norm: Norm, columns: i64, seed: u64) -> Self {
        let (mut random, length) = (Random(seed), columns as usize);
        let count = ROWS as usize * length;
        let (input, residual) = (random.normal::<bf16>(count), random.normal::<bf16>(count));
        let weight = random.normal::<bf16>(length);
        let (gamma, beta) = (random.normal_f32(1.0, length), random.normal_f32(1.0, length));
        let (mut out, mut eight) = (vec![f32::NAN; count], vec![0u8; count]);
        let (mut on_input, mut on_residual, on_weight) = (widened(&input), widened(&residual), widened(&weight));
        let shape = [ROWS, columns];
        let mut tensors = Tensors {
            out: TensorMut::from_slice(&mut out, &shape).unwrap(),
            // SAFETY: the bytes are this function's own, and live until the call is done, which is at once on the host.
            eight: unsafe {
                TensorMut::from_raw(eight.as_mut_ptr().cast(), Device::Cpu, DType::F8E4M3, &shape, None).unwrap()
            },
            input: TensorMut::from_slice(&mut on_input, &shape).unwrap(),
            residual: TensorMut::from_slice(&mut on_residual, &shape).unwrap(),
            weight: TensorRef::from_slice(&on_weight, &[columns]).unwrap(),
            gamma: TensorRef::from_slice(&gamma, &[columns]).unwrap(),
            beta: TensorRef::from_slice(&beta, &[columns]).unwrap(),
        };
        call(norm, &mut tensors, &NormOptions::default(), Stream::NULL).unwrap();
        let expected = (out, eight, on_input, on_residual);
        Self { input, residual, weight, gamma, beta, expected }
    }
}

impl Work {
    fn new(stream: &Arc<CudaStream>, thread: usize, at: usize) -> Self {
        // Another size for each norm, and another order of sizes for each thread.
        let (norm, columns) = (NORMS[at], COLUMNS[(thread + at) % COLUMNS.len()]);
        let options = NormOptions::default().with_pdl(thread.is_multiple_of(2));
        let values = Values::new(norm, columns, (thread * NORMS.len() + at) as u64);
        let count = (ROWS * columns) as usize;
        Self {
            norm,
            columns,
            options,
            out: stream.alloc_zeros(count).unwrap(),
            eight: stream.alloc_zeros(count).unwrap(),
            input: stream.alloc_zeros(count).unwrap(),
            residual: stream.alloc_zeros(count).unwrap(),
            weight: stream.clone_htod(&values.weight).unwrap(),
            gamma: stream.clone_htod(&values.gamma).unwrap(),
            beta: stream.clone_htod(&values.beta).unwrap(),
            values,
        }
    }

    fn tensors<'a>(&'a mut self, stream: &'a CudaStream) -> Tensors<'a> {
        let (shape, length) = ([ROWS, self.columns], [self.columns]);
        Tensors {
            out: TensorMut::from_cudarc(stream, &mut self.out, &shape).unwrap(),
            eight: TensorMut::from_cudarc_bytes(stream, &mut self.eight, DType::F8E4M3, &shape).unwrap(),
            input: TensorMut::from_cudarc(stream, &mut self.input, &shape).unwrap(),
            residual: TensorMut::from_cudarc(stream, &mut self.residual, &shape).unwrap(),
            weight: TensorRef::from_cudarc(stream, &self.weight, &length).unwrap(),
            gamma: TensorRef::from_cudarc(stream, &self.gamma, &length).unwrap(),
            beta: TensorRef::from_cudarc(stream, &self.beta, &length).unwrap(),
        }
    }

    /// Calls once with fresh inputs, and compares everything that is written.
    fn check(&mut self, stream: &Arc<CudaStream>) {
        let count = self.values.input.len();
        stream.memcpy_htod(&self.values.input, &mut self.input).unwrap();
        stream.memcpy_htod(&self.values.residual, &mut self.residual).unwrap();
        stream.memcpy_htod(&vec![bf16::POISON; count], &mut self.out).unwrap();
        stream.memcpy_htod(&vec![0u8; count], &mut self.eight).unwrap();
        let (norm, options) = (self.norm, self.options);
        call(norm, &mut self.tensors(stream), &options, Stream::cudarc(stream)).unwrap();
        let what = |part: &str| format!("{norm:?} of {} columns, {part}", self.columns);
        let (out, eight, input, residual) = &self.values.expected;
        match norm {
            Norm::Rmsnorm | Norm::PerHead | Norm::Gemma | Norm::Layernorm => {
                assert_close(&what("out"), &widened(&stream.clone_dtoh(&self.out).unwrap()), out, 3e-3);
            }
            Norm::Quant | Norm::FusedQuant => {
                let found = stream.clone_dtoh(&self.eight).unwrap();
                // The kernel computes in f32: a value next to a boundary may fall to the other side, by one step.
                let off = found.iter().zip(eight).filter(|(a, b)| a != b).count();
                let far = found.iter().zip(eight).filter(|(a, b)| a.abs_diff(**b) > 1).count();
                assert!(far == 0 && off * 100 < count, "{}: {off} of {count} differ, {far} by more", what("out"));
            }
            Norm::Fused | Norm::GemmaFused => {
                assert_close(&what("input"), &widened(&stream.clone_dtoh(&self.input).unwrap()), input, 3e-3);
            }
        }
        if let Norm::Fused | Norm::GemmaFused | Norm::FusedQuant = norm {
            assert_close(&what("residual"), &widened(&stream.clone_dtoh(&self.residual).unwrap()), residual, 3e-3);
        }
    }
}

/// What came of a thread's calls.
#[derive(Default)]
struct Outcome {
    failed: usize,
    first: Option<String>,
    /// The time of the calls and their kernels, without looking at the results.
    time: Duration,
}

/// So many calls on a stream, of each work in turn; panics for a result that is wrong between or at the end.
fn run(stream: &Arc<CudaStream>, works: &mut [Work], calls: usize) -> Outcome {
    let (mut outcome, mut done) = (Outcome::default(), 0);
    while done < calls {
        let end = calls.min(done + BETWEEN);
        let mut tensors: Vec<_> =
            works.iter_mut().map(|work| (work.norm, work.options, work.tensors(stream))).collect();
        let start = Instant::now();
        for i in done..end {
            let at = i % tensors.len();
            let (norm, options, on) = &mut tensors[at];
            if let Err(error) = call(*norm, on, options, Stream::cudarc(stream)) {
                outcome.failed += 1;
                outcome.first.get_or_insert_with(|| format!("{norm:?}: {error}"));
            }
        }
        stream.synchronize().unwrap();
        outcome.time += start.elapsed();
        drop(tensors);
        done = end;
        works.iter_mut().for_each(|work| work.check(stream));
    }
    outcome
}

fn rate(calls: usize, outcome: &Outcome) -> f64 {
    calls as f64 / outcome.time.as_secs_f64()
}

fn works(stream: &Arc<CudaStream>, thread: usize) -> Vec<Work> {
    let mut works: Vec<_> = (0..NORMS.len()).map(|at| Work::new(stream, thread, at)).collect();
    works.iter_mut().for_each(|work| work.check(stream));
    works
}

fn threads(gpu: &Gpu, tracked: bool) {
    if !tracked {
        // SAFETY: each thread has a stream and buffers of its own, which nobody else uses, and waits before it drops them.
        unsafe { gpu.context.disable_event_tracking() };
    }
    let calls = std::env::var("FLASHINFER_RS_THREAD_CALLS").map_or(100_000, |text| text.parse().unwrap());
    // One thread with the same mix, on one stream.
    let mut all: Vec<_> = (0..THREADS).flat_map(|thread| works(&gpu.stream, thread)).collect();
    let alone = run(&gpu.stream, &mut all, calls);
    assert_eq!(alone.failed, 0, "of {calls} calls of one thread: {:?}", alone.first);
    let alone = rate(calls, &alone);
    drop(all);

    // Made and checked before the threads start, so that none is waited for in vain.
    let each: Vec<_> = (0..THREADS)
        .map(|thread| {
            let stream = gpu.context.new_stream().unwrap();
            let works = works(&stream, thread);
            (stream, works)
        })
        .collect();
    let together = Barrier::new(THREADS);
    let outcomes: Vec<_> = std::thread::scope(|scope| {
        let spawn = |(stream, mut works): (Arc<CudaStream>, Vec<Work>)| {
            let together = &together;
            scope.spawn(move || {
                together.wait();
                let outcome = run(&stream, &mut works, calls);
                stream.synchronize().unwrap();
                outcome
            })
        };
        let running: Vec<_> = each.into_iter().map(spawn).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let rates = outcomes.iter().map(|outcome| rate(calls, outcome)).sum::<f64>();
    let name = if tracked { "threads, with cudarc's events" } else { "threads" };
    println!("{name}: {THREADS} threads {rates:.0} calls/s, 1 thread {alone:.0} calls/s, ratio {:.2}", rates / alone);
    let failures: Vec<_> =
        outcomes.iter().filter_map(|outcome| outcome.first.as_ref().map(|first| (outcome.failed, first))).collect();
    assert!(failures.is_empty(), "of {calls} calls of each thread, how many failed and the first error: {failures:#?}");
}
