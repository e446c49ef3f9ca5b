//! Calls both kernels, each on the GPU if there is one that can run it and on the host if not, and compares them with the
//! reference.
//!
//! `cargo run --example quickstart --features cudarc`, or `cargo xtask demo`, which finds the kernels first.

use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::driver::{CudaContext, CudaStream, DeviceRepr};
use flashinfer_rs::kernels::gdn::{GdnOptions, GdnPrefillContext, GdnTensors, HEAD_SIZE};
use flashinfer_rs::kernels::norm::{NormOptions, gemma_rmsnorm};
use flashinfer_rs::{
    CuSeqlens, Element, FlashInferRuntime, Half16, RuntimeConfig, Stream, TensorMut, TensorRef,
    gdn_prefill_sm90_cudarc_with_options, gemma_rmsnorm_cudarc,
};
use half::{bf16, f16};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("a result is further from the reference than it may be");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<bool> {
    let runtime = FlashInferRuntime::initialize(RuntimeConfig::default())?;
    let gpu = match runtime.device_count() {
        Ok(0) => Err("the driver lists no GPU".to_owned()),
        Ok(_) => Ok(CudaContext::new(0)?),
        Err(error) => Err(error.to_string()),
    };
    let (place, capability) = match gpu {
        Ok(context) => {
            let place = Place::Gpu(context.new_stream()?, format!("cuda:0 {}", context.name()?));
            (place, Some(context.compute_capability()?))
        }
        Err(why) => {
            println!("Running on the host reference: {why}.");
            (Place::Host, None)
        }
    };
    let gdn_place = match capability {
        Some(capability) if capability != HOPPER => {
            let (major, minor) = capability;
            println!(
                "gdn_prefill runs on the host reference: its kernel is for compute capability 9.0, and this GPU has {major}.{minor}."
            );
            &Place::Host
        }
        _ => &place,
    };
    println!(
        "{:<14} {:<24} {:<34} {:<5} {:>12} {:>11}  ok",
        "kernel", "ran on", "shape", "dtype", "time", "rel. error"
    );
    let rows = [
        norm::<bf16>(&place, 3e-3)?,
        norm::<f16>(&place, 5e-4)?,
        gdn::<bf16>(gdn_place, 6e-3)?,
        gdn::<f16>(gdn_place, 8e-4)?,
    ];
    Ok(rows.iter().all(|ok| *ok))
}

/// The GPUs that `gdn_prefill_sm90.so` is for.
const HOPPER: (i32, i32) = (9, 0);

/// Where kernels run.
enum Place {
    Gpu(Arc<CudaStream>, String),
    Host,
}

impl Place {
    /// Prints a row and answers whether the error is within its tolerance.
    fn report<T: Number>(&self, kernel: &str, shape: &str, time: Duration, error: f64, tolerance: f64) -> bool {
        let name = match self {
            Self::Gpu(_, name) => name,
            Self::Host => "host reference",
        };
        let ok = error <= tolerance;
        let verdict = if ok { "yes" } else { "NO" };
        println!(
            "{kernel:<14} {name:<24} {shape:<34} {:<5} {time:>12.1?} {error:>11.2e}  {verdict}",
            T::DTYPE.to_string()
        );
        ok
    }
}

/// The two element types that the kernels compute with.
trait Number: Element + Half16 + DeviceRepr + Default + Into<f64> {
    fn from_f64(value: f64) -> Self;
}

impl Number for f16 {
    fn from_f64(value: f64) -> Self {
        Self::from_f64(value)
    }
}

impl Number for bf16 {
    fn from_f64(value: f64) -> Self {
        Self::from_f64(value)
    }
}

fn norm<T: Number>(place: &Place, tolerance: f64) -> Result<bool> {
    let (rows, columns) = (64, 4096);
    let shape = [rows as i64, columns as i64];
    let mut random = Random(1);
    let input: Vec<T> = random.normal(rows * columns);
    let weight: Vec<T> = random.normal(columns);
    let mut out = vec![T::default(); rows * columns];

    let time = match place {
        Place::Gpu(stream, _) => {
            let (input, weight) = (stream.clone_htod(&input)?, stream.clone_htod(&weight)?);
            let mut out_gpu = stream.clone_htod(&out)?;
            let time = timed(stream, || {
                gemma_rmsnorm_cudarc(stream, &input, &weight, &mut out_gpu, rows, columns, T::DTYPE, 1e-6)
            })?;
            stream.memcpy_dtoh(&out_gpu, &mut out)?;
            stream.synchronize()?;
            time
        }
        Place::Host => {
            let started = Instant::now();
            gemma_rmsnorm(
                &mut TensorMut::from_slice(&mut out, &shape)?,
                &TensorRef::from_slice(&input, &shape)?,
                &TensorRef::from_slice(&weight, &shape[1..])?,
                &NormOptions::default(),
                Stream::NULL,
            )?;
            started.elapsed()
        }
    };

    // The same numbers in f32, on the host.
    let mut expected = vec![0f32; rows * columns];
    gemma_rmsnorm(
        &mut TensorMut::from_slice(&mut expected, &shape)?,
        &TensorRef::from_slice(&widened(&input), &shape)?,
        &TensorRef::from_slice(&widened(&weight), &shape[1..])?,
        &NormOptions::default(),
        Stream::NULL,
    )?;
    let error = relative_error(&widened(&out), &expected);
    Ok(place.report::<T>("gemma_rmsnorm", &format!("{shape:?}"), time, error, tolerance))
}

fn gdn<T: Number>(place: &Place, tolerance: f64) -> Result<bool> {
    // Three sequences, one after the other; two query and key heads serve four value heads.
    let offsets = [0i64, 17, 81, 160];
    let (sequences, tokens) = (offsets.len() - 1, 160);
    let (q_heads, k_heads, v_heads, size) = (2, 2, 4, HEAD_SIZE as usize);
    let heads = v_heads;
    let mut random = Random(2);
    let q: Vec<T> = random.normal(tokens * q_heads * size);
    let k: Vec<T> = random.unit(tokens * k_heads, size);
    let v: Vec<T> = random.normal(tokens * v_heads * size);
    let alpha = random.between(0.9, 1.0, tokens * heads);
    let beta = random.between(0.0, 1.0, tokens * heads);
    let mut output = vec![T::default(); tokens * heads * size];
    let mut state = vec![0f32; sequences * heads * size * size];

    let time = match place {
        Place::Gpu(stream, _) => {
            let (q, k, v) = (stream.clone_htod(&q)?, stream.clone_htod(&k)?, stream.clone_htod(&v)?);
            let (alpha, beta) = (stream.clone_htod(&alpha)?, stream.clone_htod(&beta)?);
            let cu_seqlens = stream.clone_htod(&offsets)?;
            let mut output_gpu = stream.clone_htod(&output)?;
            let mut state_gpu = stream.clone_htod(&state)?;
            let mut workspace = stream.alloc_zeros::<u8>(1 << 20)?;
            let time = timed(stream, || {
                // SAFETY: the offsets start with 0, increase strictly and end with the number of tokens.
                unsafe {
                    gdn_prefill_sm90_cudarc_with_options(
                        stream,
                        &mut output_gpu,
                        &mut state_gpu,
                        &q,
                        &k,
                        &v,
                        &cu_seqlens,
                        &mut workspace,
                        tokens,
                        q_heads,
                        k_heads,
                        v_heads,
                        size,
                        T::DTYPE,
                        None,
                        Some(&alpha),
                        Some(&beta),
                        0.0,
                    )
                }
            })?;
            stream.memcpy_dtoh(&output_gpu, &mut output)?;
            stream.memcpy_dtoh(&state_gpu, &mut state)?;
            stream.synchronize()?;
            time
        }
        Place::Host => {
            let started = Instant::now();
            gdn_on_host(&mut output, &mut state, [&q, &k, &v], &offsets, &alpha, &beta, [q_heads, k_heads, v_heads])?;
            started.elapsed()
        }
    };

    let mut expected = vec![0f32; output.len()];
    let mut expected_state = vec![0f32; state.len()];
    let [q, k, v] = [q, k, v].map(|tensor| widened(&tensor));
    gdn_on_host(
        &mut expected,
        &mut expected_state,
        [&q, &k, &v],
        &offsets,
        &alpha,
        &beta,
        [q_heads, k_heads, v_heads],
    )?;
    let error = relative_error(&widened(&output), &expected).max(relative_error(&state, &expected_state));
    let shape = format!("{tokens} tokens, {q_heads}/{k_heads}/{v_heads} heads x {size}");
    Ok(place.report::<T>("gdn_prefill", &shape, time, error, tolerance))
}

fn gdn_on_host<T: Element>(
    output: &mut [T],
    state: &mut [f32],
    [q, k, v]: [&[T]; 3],
    offsets: &[i64],
    alpha: &[f32],
    beta: &[f32],
    heads: [usize; 3],
) -> flashinfer_rs::Result<()> {
    let tokens = offsets[offsets.len() - 1];
    let [q_heads, k_heads, v_heads] = heads.map(|heads| heads as i64);
    let heads = q_heads.max(v_heads);
    let sequences = offsets.len() as i64 - 1;
    let mut tensors = GdnTensors {
        output: TensorMut::from_slice(output, &[tokens, heads, HEAD_SIZE])?,
        output_state: TensorMut::from_slice(state, &[sequences, heads, HEAD_SIZE, HEAD_SIZE])?,
        q: TensorRef::from_slice(q, &[tokens, q_heads, HEAD_SIZE])?,
        k: TensorRef::from_slice(k, &[tokens, k_heads, HEAD_SIZE])?,
        v: TensorRef::from_slice(v, &[tokens, v_heads, HEAD_SIZE])?,
    };
    let options = GdnOptions::default()
        .with_alpha(TensorRef::from_slice(alpha, &[tokens, heads])?)
        .with_beta(TensorRef::from_slice(beta, &[tokens, heads])?);
    GdnPrefillContext::on_host().prefill(&mut tensors, &CuSeqlens::from_offsets(offsets)?, &options)
}

/// The shortest of ten runs, each to the end of the stream's work, after one to warm up.
fn timed(stream: &CudaStream, mut launch: impl FnMut() -> flashinfer_rs::Result<()>) -> Result<Duration> {
    launch()?;
    stream.synchronize()?;
    let mut best = Duration::MAX;
    for _ in 0..10 {
        let started = Instant::now();
        launch()?;
        stream.synchronize()?;
        best = best.min(started.elapsed());
    }
    Ok(best)
}

fn widened<T: Copy + Into<f64>>(values: &[T]) -> Vec<f32> {
    values.iter().map(|&value| value.into() as f32).collect()
}

/// ‖found − expected‖ / ‖expected‖
fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let pairs = found.iter().zip(expected);
    let difference: f64 = pairs.map(|(&a, &b)| square(f64::from(a) - f64::from(b))).sum();
    let size: f64 = expected.iter().map(|&b| square(b.into())).sum();
    (difference / size).sqrt()
}

/// A small generator (splitmix64): the quick start needs the same numbers everywhere, not good ones.
struct Random(u64);

impl Random {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn gauss(&mut self) -> f64 {
        // The sum of twelve uniform numbers has variance 1.
        (0..12).map(|_| self.uniform()).sum::<f64>() - 6.0
    }

    fn normal<T: Number>(&mut self, count: usize) -> Vec<T> {
        (0..count).map(|_| T::from_f64(self.gauss())).collect()
    }

    /// Rows of length 1, as the delta rule wants its keys.
    fn unit<T: Number>(&mut self, rows: usize, size: usize) -> Vec<T> {
        let row = |_| {
            let row: Vec<f64> = (0..size).map(|_| self.gauss()).collect();
            let length = row.iter().map(|x| x * x).sum::<f64>().sqrt();
            row.into_iter().map(move |x| T::from_f64(x / length)).collect::<Vec<T>>()
        };
        (0..rows).flat_map(row).collect()
    }

    fn between(&mut self, low: f64, high: f64, count: usize) -> Vec<f32> {
        (0..count).map(|_| (low + (high - low) * self.uniform()) as f32).collect()
    }
}
