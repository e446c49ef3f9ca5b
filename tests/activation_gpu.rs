//! Gated activations on a GPU, against the reference and against what is refused. `FLASHINFER_RS_RUN_GPU_TESTS=1 cargo test
//! --features cudarc,activation --test activation_gpu` runs them, within 60 seconds.

#[path = "support/data.rs"]
mod data;
#[path = "support/gpu.rs"]
mod gpu;

use std::process::ExitCode;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream, result};
use data::{Number, Random, assert_close, widened};
use flashinfer_rs::kernels::activation::{
    ActivationOptions, GeluAndMul, GeluTanhAndMul, SiluAndMul, gelu_and_mul, gelu_tanh_and_mul, is_supported,
    silu_and_mul,
};
use flashinfer_rs::{Device, FlashInferError, LaunchGraph, Prepared, Result, Stream, TensorMut, TensorRef};
use gpu::Gpu;
use half::{bf16, f16};

fn main() -> ExitCode {
    gpu::main(&[
        ("activations_match_in_bf16", |gpu| matches::<bf16>(gpu, [3e-3; 3])),
        ("activations_match_in_f16", |gpu| matches::<f16>(gpu, [5e-4, 5e-4, 8e-4])),
        ("gelu_is_not_its_approximation", exact_gelu),
        ("infinities_and_nan_stay_in_their_places", special),
        ("prepared_calls_match", prepared),
        ("captured_calls_match_with_programmatic_edges_and_without", captured),
        ("a_call_does_not_wait", asynchronous),
        ("the_threads_context_is_what_it_was_on_every_gpu", every_gpu),
        ("what_breaks_the_contract_is_refused", refused),
        ("nothing_is_launched_for_no_tokens", nothing),
        ("the_gpu_is_said_to_be_supported", supported),
    ])
}

type Function = fn(&mut TensorMut<'_>, &TensorRef<'_>, &ActivationOptions, Stream<'_>) -> Result<()>;

const ALL: [Function; 3] = [silu_and_mul, gelu_and_mul, gelu_tanh_and_mul];

/// Of few threads and of all, with numbers left over behind the last turn of all threads, and more tokens than fit at once.
const SHAPES: [[i64; 2]; 7] = [[1, 8], [3, 24], [7, 1024], [33, 4104], [5, 8200], [2, 14336], [3000, 64]];

/// What the reference makes of it.
fn expected(function: Function, [tokens, d]: [i64; 2], input: &[f32]) -> Vec<f32> {
    let mut out = vec![f32::NAN; (tokens * d) as usize];
    function(
        &mut TensorMut::from_slice(&mut out, &[tokens, d]).unwrap(),
        &TensorRef::from_slice(input, &[tokens, 2 * d]).unwrap(),
        &ActivationOptions::default(),
        Stream::NULL,
    )
    .unwrap();
    out
}

fn found<T: Number>(
    stream: &Arc<CudaStream>,
    function: Function,
    [tokens, d]: [i64; 2],
    input: &[T],
    pdl: bool,
) -> Vec<T> {
    let input = stream.clone_htod(input).unwrap();
    let mut out = stream.clone_htod(&vec![T::POISON; (tokens * d) as usize]).unwrap();
    function(
        &mut TensorMut::from_cudarc(stream, &mut out, &[tokens, d]).unwrap(),
        &TensorRef::from_cudarc(stream, &input, &[tokens, 2 * d]).unwrap(),
        &ActivationOptions::default().with_pdl(pdl),
        Stream::cudarc(stream),
    )
    .unwrap();
    stream.clone_dtoh(&out).unwrap()
}

fn numbers<T: Number>(seed: u64, spread: f64, count: i64) -> Vec<T> {
    let mut random = Random(seed);
    (0..count).map(|_| T::from_f64(spread * random.gauss())).collect()
}

fn matches<T: Number>(gpu: &Gpu, tolerances: [f64; 3]) {
    for (seed, shape) in SHAPES.into_iter().enumerate() {
        let input = numbers::<T>(seed as u64, 2.0, 2 * shape[0] * shape[1]);
        for (function, tolerance) in ALL.into_iter().zip(tolerances) {
            let expected = expected(function, shape, &widened(&input));
            for pdl in [false, true] {
                let found = found(&gpu.stream, function, shape, &input, pdl);
                assert_close(&format!("{shape:?}"), &widened(&found), &expected, tolerance);
            }
        }
    }
}

/// Where both are small, they are some percents apart.
fn exact_gelu(gpu: &Gpu) {
    let shape = [1, 64];
    let x: Vec<_> =
        (0..128).map(|i| if i < 64 { f16::from_f64(-2.6 + 0.01 * f64::from(i)) } else { f16::ONE }).collect();
    let (gelu, tanh) = (expected(gelu_and_mul, shape, &widened(&x)), expected(gelu_tanh_and_mul, shape, &widened(&x)));
    assert!(data::relative_error(&tanh, &gelu) > 3e-3, "else this test tells nothing");
    let found = found(&gpu.stream, gelu_and_mul, shape, &x, false);
    assert_close("gelu", &widened(&found), &gelu, 1e-3);
}

fn special(gpu: &Gpu) {
    let shape = [2, 8];
    let mut input = vec![bf16::ONE; 32];
    input[1] = bf16::INFINITY;
    input[2] = bf16::NAN;
    // Of the second token's gates.
    input[24 + 5] = bf16::NEG_INFINITY;
    for function in ALL {
        let (found, expected) =
            (widened(&found(&gpu.stream, function, shape, &input, false)), expected(function, shape, &widened(&input)));
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let same = found == expected || found.is_nan() && expected.is_nan();
            assert!(same || (found - expected).abs() < 5e-3, "{found} at {i}, expected {expected}");
        }
        assert!(found[1] == f32::INFINITY && found[2].is_nan() && found[8 + 5] == f32::NEG_INFINITY, "{found:?}");
    }
}

fn prepared(gpu: &Gpu) {
    let (stream, shape) = (&gpu.stream, [9, 512]);
    let options = ActivationOptions::default().with_pdl(true);
    let input = numbers::<bf16>(11, 2.0, 2 * 9 * 512);
    let input_gpu = stream.clone_htod(&input).unwrap();
    let mut outs = [(); 3].map(|()| stream.clone_htod(&vec![bf16::POISON; 9 * 512]).unwrap());
    {
        let input = TensorRef::from_cudarc(stream, &input_gpu, &[9, 1024]).unwrap();
        let [a, b, c] = &mut outs;
        let [mut a, mut b, mut c] = [a, b, c].map(|out| TensorMut::from_cudarc(stream, out, &shape).unwrap());
        let silu = Prepared::<SiluAndMul>::new(&a, &input, &options).unwrap();
        let gelu = Prepared::<GeluAndMul>::new(&a, &input, &options).unwrap();
        let tanh = Prepared::<GeluTanhAndMul>::new(&a, &input, &options).unwrap();
        for _ in 0..3 {
            silu.launch(&mut a, &input, Stream::cudarc(stream)).unwrap();
            gelu.launch(&mut b, &input, Stream::cudarc(stream)).unwrap();
            tanh.launch(&mut c, &input, Stream::cudarc(stream)).unwrap();
        }
    }
    for (function, out) in ALL.into_iter().zip(&outs) {
        assert_eq!(stream.clone_dtoh(out).unwrap(), found(stream, function, shape, &input, false));
    }
}

/// A chain, each of whose calls reads what the one before wrote: programmatic edges that did not wait would show.
fn captured(gpu: &Gpu) {
    let (stream, rows, d) = (&gpu.stream, 64, 1024);
    for pdl in [true, false] {
        let input = numbers::<bf16>(12, 2.0, rows * 4 * d);
        let buffers = (
            stream.clone_htod(&input).unwrap(),
            stream.alloc_zeros::<bf16>((rows * 2 * d) as usize).unwrap(),
            stream.alloc_zeros::<bf16>((rows * d) as usize).unwrap(),
        );
        let mut graph = LaunchGraph::new(stream, buffers).unwrap().with_pdl(pdl);
        let calls = graph.capture(|s, (input, mut middle, mut out)| {
            let options = ActivationOptions::default();
            silu_and_mul(&mut middle.write(&[rows, 2 * d])?, &input.read(&[rows, 4 * d])?, &options, s)?;
            gelu_tanh_and_mul(&mut out.write(&[rows, d])?, &middle.read(&[rows, 2 * d])?, &options, s)
        });
        calls.unwrap();
        for seed in [12, 13, 14] {
            let input = numbers::<bf16>(seed, 2.0, rows * 4 * d);
            let middle = found(stream, silu_and_mul, [rows, 2 * d], &input, false);
            let out = found(stream, gelu_tanh_and_mul, [rows, d], &middle, false);
            stream.memcpy_htod(&input, &mut graph.buffers().unwrap().0).unwrap();
            graph.launch().unwrap();
            assert_eq!(stream.clone_dtoh(&graph.buffers().unwrap().2).unwrap(), out);
        }
    }
}

fn asynchronous(gpu: &Gpu) {
    let stream = &gpu.stream;
    let input = stream.alloc_zeros::<bf16>(16).unwrap();
    let mut out = stream.alloc_zeros::<bf16>(8).unwrap();
    let mut call = || {
        silu_and_mul(
            &mut TensorMut::from_cudarc(stream, &mut out, &[1, 8]).unwrap(),
            &TensorRef::from_cudarc(stream, &input, &[1, 16]).unwrap(),
            &ActivationOptions::default(),
            Stream::cudarc(stream),
        )
        .unwrap();
    };
    // The first one loads the library.
    call();
    gpu.assert_asynchronous(stream, call);
}

/// Upstream makes the tensors' GPU the thread's own and leaves it so.
fn every_gpu(_: &Gpu) {
    let count = CudaContext::device_count().unwrap() as usize;
    println!("{count} GPUs");
    let streams: Vec<_> = (0..count).map(|id| CudaContext::new(id).unwrap().new_stream().unwrap()).collect();
    let shape = [4, 64];
    let input = numbers::<bf16>(15, 2.0, 2 * 4 * 64);
    for (id, stream) in streams.iter().enumerate() {
        let input_gpu = stream.clone_htod(&input).unwrap();
        let mut out = stream.clone_htod(&vec![bf16::POISON; 4 * 64]).unwrap();
        for function in ALL {
            for current in &streams {
                let mut out = TensorMut::from_cudarc(stream, &mut out, &shape).unwrap();
                let input = TensorRef::from_cudarc(stream, &input_gpu, &[4, 128]).unwrap();
                current.context().bind_to_thread().unwrap();
                function(&mut out, &input, &ActivationOptions::default(), Stream::cudarc(stream)).unwrap();
                let after = result::ctx::get_current().unwrap();
                assert_eq!(after, Some(current.context().cu_ctx()), "after a call on cuda:{id}");
            }
            let expected = expected(function, shape, &widened(&input));
            assert_close(&format!("cuda:{id}"), &widened(&stream.clone_dtoh(&out).unwrap()), &expected, 3e-3);
        }
    }
}

fn refused(gpu: &Gpu) {
    let stream = &gpu.stream;
    let input = stream.alloc_zeros::<bf16>(256).unwrap();
    let mut out = stream.clone_htod(&vec![bf16::POISON; 128]).unwrap();
    // A length that is no multiple of a vector, memory that is not aligned, and a token that is too short.
    for (d, columns, skip, name) in [(12, 24, 0, "d"), (8, 16, 4, "input"), (8, 17, 0, "input")] {
        let part = input.slice(skip..);
        let result = silu_and_mul(
            &mut TensorMut::from_cudarc(stream, &mut out, &[2, d]).unwrap(),
            &TensorRef::from_cudarc(stream, &part, &[2, columns]).unwrap(),
            &ActivationOptions::default(),
            Stream::cudarc(stream),
        );
        match result {
            Err(FlashInferError::InvalidArgument { argument, .. }) => assert_eq!(argument, name),
            other => panic!("{d}, {columns}: {other:?}"),
        }
    }
    let bits: Vec<_> = stream.clone_dtoh(&out).unwrap().iter().map(|number| number.to_bits()).collect();
    assert!(bits.iter().all(|bits| *bits == bf16::POISON.to_bits()), "refused, and launched all the same");
}

fn nothing(gpu: &Gpu) {
    let stream = &gpu.stream;
    let input = stream.alloc_zeros::<bf16>(16).unwrap();
    let mut out = stream.alloc_zeros::<bf16>(8).unwrap();
    for (tokens, d) in [(0, 8), (3, 0)] {
        for function in ALL {
            function(
                &mut TensorMut::from_cudarc(stream, &mut out, &[tokens, d]).unwrap(),
                &TensorRef::from_cudarc(stream, &input, &[tokens, 2 * d]).unwrap(),
                &ActivationOptions::default(),
                Stream::cudarc(stream),
            )
            .unwrap();
        }
    }
    stream.synchronize().unwrap();
}

fn supported(_: &Gpu) {
    assert!(is_supported(Device::Cuda(0)).unwrap());
}
