//! The norm family on a GPU through the safe API, against the reference. `FLASHINFER_RS_RUN_GPU_TESTS=1 cargo test
//! --features cudarc --test norm_gpu` runs them.
//! They are done within 240 seconds.

#[path = "support/data.rs"]
mod data;
#[path = "support/gpu.rs"]
mod gpu;

use std::process::ExitCode;
use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};
use data::{Number, Random, assert_close, widened};
use flashinfer_rs::kernels::norm::{
    NormOptions, fused_add_rmsnorm, fused_add_rmsnorm_quant, gemma_fused_add_rmsnorm, gemma_rmsnorm,
    gemma_rmsnorm_in_place, is_supported, layernorm, rmsnorm, rmsnorm_in_place, rmsnorm_quant,
};
use flashinfer_rs::{DType, Device, FlashInferError, Stream, TensorMut, TensorRef};
use gpu::Gpu;
use half::{bf16, f16};

fn main() -> ExitCode {
    gpu::main(&[
        ("rmsnorm_of_rows_and_of_heads_matches_in_bf16", |gpu| over_shapes::<bf16>(gpu, 3e-3)),
        ("rmsnorm_of_rows_and_of_heads_matches_in_f16", |gpu| over_shapes::<f16>(gpu, 5e-4)),
        ("fused_forms_match_in_bf16", |gpu| fused::<bf16>(gpu, 3e-3)),
        ("fused_forms_match_in_f16", |gpu| fused::<f16>(gpu, 5e-4)),
        ("eight_bit_outputs_match_bit_by_bit_nearly_everywhere", quantized),
        ("strided_rows_and_heads_match", strided),
        ("options_do_what_they_say", options),
        ("a_tensor_of_another_stream_is_refused", other_stream),
        ("rows_too_long_for_shared_memory_are_refused_before_the_launch", too_long),
        ("rows_past_two_to_the_32_elements_are_right", past_32_bits),
        ("threads_with_streams_of_their_own_get_what_one_gets", threads),
        ("empty_tensors_launch_nothing", empty),
        ("layernorm_matches", layer),
        ("layernorm_is_right_or_refused_around_48_kib_of_shared_memory", layer_limits),
        ("a_tensor_is_normed_onto_itself", in_place),
        ("heads_before_tokens_are_read_and_written", heads_major),
        ("queries_and_keys_of_a_fused_tensor_are_normed_in_place_and_nothing_else", fused_qkv),
        ("a_row_is_read_again_and_again_with_a_stride_of_0", broadcast),
        ("parts_of_rows_and_columns_are_normed_and_nothing_else", parts),
        ("every_gpu_here_is_said_to_be_supported", supported),
    ])
}

type Norm =
    fn(&mut TensorMut<'_>, &TensorRef<'_>, &TensorRef<'_>, &NormOptions, Stream<'_>) -> flashinfer_rs::Result<()>;
type Fused =
    fn(&mut TensorMut<'_>, &mut TensorMut<'_>, &TensorRef<'_>, &NormOptions, Stream<'_>) -> flashinfer_rs::Result<()>;

fn upload<T: Number>(stream: &Arc<CudaStream>, values: &[T]) -> CudaSlice<T> {
    stream.clone_htod(values).unwrap()
}

/// A function's result on the GPU, in memory that held NaN, and the reference's in f32.
fn both<T: Number>(gpu: &Gpu, norm: Norm, shape: &[i64], seed: u64, options: &NormOptions) -> (Vec<f32>, Vec<f32>) {
    let mut random = Random(seed);
    let count = shape.iter().product::<i64>() as usize;
    let columns = &shape[shape.len() - 1..];
    let (input, weight) = (random.normal::<T>(count), random.normal::<T>(columns[0] as usize));
    let stream = &gpu.stream;
    let (input_gpu, weight_gpu) = (upload(stream, &input), upload(stream, &weight));
    let mut out_gpu = upload(stream, &vec![T::POISON; count]);
    norm(
        &mut TensorMut::from_cudarc(stream, &mut out_gpu, shape).unwrap(),
        &TensorRef::from_cudarc(stream, &input_gpu, shape).unwrap(),
        &TensorRef::from_cudarc(stream, &weight_gpu, columns).unwrap(),
        options,
        Stream::cudarc(stream),
    )
    .unwrap();
    let (input, weight, mut out) = (widened(&input), widened(&weight), vec![0f32; count]);
    norm(
        &mut TensorMut::from_slice(&mut out, shape).unwrap(),
        &TensorRef::from_slice(&input, shape).unwrap(),
        &TensorRef::from_slice(&weight, columns).unwrap(),
        options,
        Stream::NULL,
    )
    .unwrap();
    (widened(&stream.clone_dtoh(&out_gpu).unwrap()), out)
}

fn over_shapes<T: Number>(gpu: &Gpu, tolerance: f64) {
    let shapes: [&[i64]; 10] = [
        &[1, 8],
        &[1, 4096],
        &[3, 33],
        &[7, 1002],
        &[64, 3072],
        &[2, 16384],
        &[1, 1, 64],
        &[5, 32, 128],
        &[17, 3, 100],
        &[300, 8, 256],
    ];
    for (i, shape) in shapes.into_iter().enumerate() {
        let (found, expected) = both::<T>(gpu, rmsnorm, shape, i as u64, &NormOptions::default());
        assert_close(&format!("rmsnorm {shape:?}"), &found, &expected, tolerance);
        if shape.len() == 2 {
            let (found, expected) = both::<T>(gpu, gemma_rmsnorm, shape, i as u64, &NormOptions::default());
            assert_close(&format!("gemma_rmsnorm {shape:?}"), &found, &expected, tolerance);
        }
    }
}

fn fused<T: Number>(gpu: &Gpu, tolerance: f64) {
    let functions: [(&str, Fused); 2] = [("fused", fused_add_rmsnorm), ("gemma fused", gemma_fused_add_rmsnorm)];
    for (name, function) in functions {
        for (rows, columns) in [(1, 8), (5, 100), (33, 4096), (128, 5376), (2, 16384), (3, 32768), (9, 33), (64, 1024)]
        {
            let (shape, count) = ([rows, columns], (rows * columns) as usize);
            let mut random = Random(columns as u64);
            let (input, residual) = (random.normal::<T>(count), random.normal::<T>(count));
            let weight = random.normal::<T>(columns as usize);
            let stream = &gpu.stream;
            let (mut a, mut b, w) = (upload(stream, &input), upload(stream, &residual), upload(stream, &weight));
            function(
                &mut TensorMut::from_cudarc(stream, &mut a, &shape).unwrap(),
                &mut TensorMut::from_cudarc(stream, &mut b, &shape).unwrap(),
                &TensorRef::from_cudarc(stream, &w, &shape[1..]).unwrap(),
                &NormOptions::default(),
                Stream::cudarc(stream),
            )
            .unwrap();
            let (mut input, mut residual, weight) = (widened(&input), widened(&residual), widened(&weight));
            function(
                &mut TensorMut::from_slice(&mut input, &shape).unwrap(),
                &mut TensorMut::from_slice(&mut residual, &shape).unwrap(),
                &TensorRef::from_slice(&weight, &shape[1..]).unwrap(),
                &NormOptions::default(),
                Stream::NULL,
            )
            .unwrap();
            let what = format!("{name} {rows}x{columns}");
            assert_close(&what, &widened(&stream.clone_dtoh(&a).unwrap()), &input, tolerance);
            assert_close(&what, &widened(&stream.clone_dtoh(&b).unwrap()), &residual, tolerance);
        }
    }
}

fn quantized(gpu: &Gpu) {
    let (rows, columns, scale) = (50i64, 1024i64, 0.02);
    let (shape, count) = ([rows, columns], (rows * columns) as usize);
    let mut random = Random(1);
    let (input, residual) = (random.normal::<bf16>(count), random.normal::<bf16>(count));
    let weight = random.normal::<bf16>(columns as usize);
    let stream = &gpu.stream;
    let (a, w) = (upload(stream, &input), upload(stream, &weight));
    let options = NormOptions::default();
    for dtype in [DType::F8E4M3, DType::F8E5M2] {
        for add in [false, true] {
            let mut b = upload(stream, &residual);
            let mut out = stream.clone_htod(&vec![0xFFu8; count]).unwrap();
            let (mut expected, mut sum) = (vec![0u8; count], residual.clone());
            {
                let mut out = TensorMut::from_cudarc_bytes(stream, &mut out, dtype, &shape).unwrap();
                let mut b = TensorMut::from_cudarc(stream, &mut b, &shape).unwrap();
                let a = TensorRef::from_cudarc(stream, &a, &shape).unwrap();
                let w = TensorRef::from_cudarc(stream, &w, &shape[1..]).unwrap();
                let on = Stream::cudarc(stream);
                match add {
                    true => fused_add_rmsnorm_quant(&mut out, &a, &mut b, &w, scale, &options, on),
                    false => rmsnorm_quant(&mut out, &a, &w, scale, &options, on),
                }
                .unwrap();
                // SAFETY: the bytes are this function's own, and live until the call is done.
                let mut out =
                    unsafe { TensorMut::from_raw(expected.as_mut_ptr().cast(), Device::Cpu, dtype, &shape, None) }
                        .unwrap();
                let a = TensorRef::from_slice(&input, &shape).unwrap();
                let mut b = TensorMut::from_slice(&mut sum, &shape).unwrap();
                let w = TensorRef::from_slice(&weight, &shape[1..]).unwrap();
                match add {
                    true => fused_add_rmsnorm_quant(&mut out, &a, &mut b, &w, scale, &options, Stream::NULL),
                    false => rmsnorm_quant(&mut out, &a, &w, scale, &options, Stream::NULL),
                }
                .unwrap();
            }
            let found = stream.clone_dtoh(&out).unwrap();
            // The kernel computes in f32: a value next to a boundary may fall to the other side, by one step.
            let off = found.iter().zip(&expected).filter(|(a, b)| a != b).count();
            let far = found.iter().zip(&expected).filter(|(a, b)| a.abs_diff(**b) > 1).count();
            assert!(
                far == 0 && off * 200 < count,
                "{dtype} add {add}: {off} of {count} differ, {far} by more than a step"
            );
            if add {
                let found = stream.clone_dtoh(&b).unwrap();
                assert_close("residual", &widened(&found), &widened(&sum), 3e-3);
            }
        }
    }
}

fn strided(gpu: &Gpu) {
    let stream = &gpu.stream;
    // Heads of one token within a wider row, as q lies within a fused qkv.
    let (tokens, heads, columns, row) = (9i64, 4i64, 64i64, 1024i64);
    let mut random = Random(2);
    let (input, weight) = (random.normal::<f16>((tokens * row) as usize), random.normal::<f16>(columns as usize));
    let mut out = upload(stream, &vec![f16::POISON; (tokens * heads * columns) as usize]);
    let (input_gpu, weight_gpu) = (upload(stream, &input), upload(stream, &weight));
    let (shape, strides) = ([tokens, heads, columns], [row, columns, 1]);
    rmsnorm(
        &mut TensorMut::from_cudarc(stream, &mut out, &shape).unwrap(),
        &TensorRef::from_cudarc_strided(stream, &input_gpu, &shape, &strides).unwrap(),
        &TensorRef::from_cudarc(stream, &weight_gpu, &[columns]).unwrap(),
        &NormOptions::default(),
        Stream::cudarc(stream),
    )
    .unwrap();
    let (input, weight) = (widened(&input), widened(&weight));
    let mut expected = vec![0f32; out.len()];
    rmsnorm(
        &mut TensorMut::from_slice(&mut expected, &shape).unwrap(),
        &TensorRef::from_slice_strided(&input, &shape, &strides).unwrap(),
        &TensorRef::from_slice(&weight, &[columns]).unwrap(),
        &NormOptions::default(),
        Stream::NULL,
    )
    .unwrap();
    assert_close("heads", &widened(&stream.clone_dtoh(&out).unwrap()), &expected, 5e-4);
    let short = TensorRef::from_cudarc_strided(stream, &input_gpu, &[tokens + 1, heads, columns], &strides);
    assert!(matches!(short.unwrap_err(), FlashInferError::InvalidArgument { .. }));
}

fn options(gpu: &Gpu) {
    for options in [NormOptions::default().with_eps(0.5), NormOptions::default().with_pdl(true)] {
        let (found, expected) = both::<bf16>(gpu, rmsnorm, &[64, 512], 3, &options);
        assert_close(&format!("{options:?}"), &found, &expected, 3e-3);
    }
}

fn other_stream(gpu: &Gpu) {
    let (stream, other) = (&gpu.stream, gpu.context.new_stream().unwrap());
    let (input, mut out) = (stream.alloc_zeros::<bf16>(64).unwrap(), stream.alloc_zeros::<bf16>(64).unwrap());
    let error = rmsnorm(
        &mut TensorMut::from_cudarc(stream, &mut out, &[1, 64]).unwrap(),
        &TensorRef::from_cudarc(&other, &input, &[1, 64]).unwrap(),
        &TensorRef::from_cudarc(stream, &input, &[64]).unwrap(),
        &NormOptions::default(),
        Stream::cudarc(stream),
    )
    .unwrap_err();
    let FlashInferError::InvalidArgument { argument, found, .. } = &error else { panic!("{error}") };
    assert_eq!((*argument, found.starts_with("for stream")), ("input", true));
}

fn too_long(gpu: &Gpu) {
    let (stream, columns) = (&gpu.stream, 1i64 << 16);
    let (mut a, mut b) = (stream.alloc_zeros::<bf16>(1 << 16).unwrap(), stream.alloc_zeros::<bf16>(1 << 16).unwrap());
    let w = stream.alloc_zeros::<bf16>(1 << 16).unwrap();
    let error = fused_add_rmsnorm(
        &mut TensorMut::from_cudarc(stream, &mut a, &[1, columns]).unwrap(),
        &mut TensorMut::from_cudarc(stream, &mut b, &[1, columns]).unwrap(),
        &TensorRef::from_cudarc(stream, &w, &[columns]).unwrap(),
        &NormOptions::default(),
        Stream::cudarc(stream),
    )
    .unwrap_err();
    assert!(matches!(error, FlashInferError::InvalidArgument { argument: "columns", .. }), "{error}");
    // And the longest that fits runs.
    let columns = 32768 + 16384;
    fused_add_rmsnorm(
        &mut TensorMut::from_cudarc(stream, &mut a, &[1, columns]).unwrap(),
        &mut TensorMut::from_cudarc(stream, &mut b, &[1, columns]).unwrap(),
        &TensorRef::from_cudarc(stream, &w, &[columns]).unwrap(),
        &NormOptions::default(),
        Stream::cudarc(stream),
    )
    .unwrap();
    stream.synchronize().unwrap();
}

fn past_32_bits(gpu: &Gpu) {
    let (rows, columns) = ((1i64 << 20) + 64, 4096i64);
    let count = (rows * columns) as usize;
    let stream = &gpu.stream;
    let mut random = Random(4);
    // The same few rows again and again, but the last ones their own.
    let (head, tail, weight) =
        (random.normal::<bf16>(4096 * 64), random.normal::<bf16>(4096 * 64), random.normal::<bf16>(4096));
    let mut input = stream.alloc_zeros::<bf16>(count).unwrap();
    let mut out = stream.alloc_zeros::<bf16>(count).unwrap();
    stream.memcpy_htod(&head, &mut input.slice_mut(0..head.len())).unwrap();
    stream.memcpy_htod(&tail, &mut input.slice_mut(count - tail.len()..count)).unwrap();
    let weight_gpu = upload(stream, &weight);
    gemma_rmsnorm(
        &mut TensorMut::from_cudarc(stream, &mut out, &[rows, columns]).unwrap(),
        &TensorRef::from_cudarc(stream, &input, &[rows, columns]).unwrap(),
        &TensorRef::from_cudarc(stream, &weight_gpu, &[columns]).unwrap(),
        &NormOptions::default(),
        Stream::cudarc(stream),
    )
    .unwrap();
    for (name, values, at) in [("first rows", &head, 0), ("last rows", &tail, count - tail.len())] {
        let found = stream.clone_dtoh(&out.slice(at..at + values.len())).unwrap();
        let (values, weight, shape) = (widened(values), widened(&weight), [64, columns]);
        let mut expected = vec![0f32; found.len()];
        gemma_rmsnorm(
            &mut TensorMut::from_slice(&mut expected, &shape).unwrap(),
            &TensorRef::from_slice(&values, &shape).unwrap(),
            &TensorRef::from_slice(&weight, &[columns]).unwrap(),
            &NormOptions::default(),
            Stream::NULL,
        )
        .unwrap();
        assert_close(name, &widened(&found), &expected, 3e-3);
    }
}

fn threads(gpu: &Gpu) {
    let (serial, _) = both::<bf16>(gpu, rmsnorm, &[16, 2048], 5, &NormOptions::default());
    std::thread::scope(|scope| {
        for _ in 0..32 {
            scope.spawn(|| {
                let own = Gpu { context: gpu.context.clone(), stream: gpu.context.new_stream().unwrap() };
                for _ in 0..20 {
                    let (found, _) = both::<bf16>(&own, rmsnorm, &[16, 2048], 5, &NormOptions::default());
                    assert!(found.iter().zip(&serial).all(|(a, b)| a.to_bits() == b.to_bits()));
                }
            });
        }
    });
}

fn empty(gpu: &Gpu) {
    let stream = &gpu.stream;
    let mut out = stream.alloc_zeros::<bf16>(64).unwrap();
    let weight = stream.alloc_zeros::<bf16>(64).unwrap();
    rmsnorm(
        &mut TensorMut::from_cudarc(stream, &mut out, &[0, 64]).unwrap(),
        &TensorRef::from_cudarc(stream, &weight, &[0, 64]).unwrap(),
        &TensorRef::from_cudarc(stream, &weight, &[64]).unwrap(),
        &NormOptions::default(),
        Stream::cudarc(stream),
    )
    .unwrap();
}

fn layer(gpu: &Gpu) {
    let stream = &gpu.stream;
    for (rows, columns) in [(1, 8), (3, 33), (64, 1024), (7, 5000), (500, 128), (2, 40000)] {
        let (shape, count) = ([rows, columns], (rows * columns) as usize);
        let mut random = Random(columns as u64);
        let input = random.normal::<bf16>(count);
        let (gamma, beta) = (random.normal_f32(1.0, columns as usize), random.normal_f32(1.0, columns as usize));
        let (a, g, b) = (upload(stream, &input), stream.clone_htod(&gamma).unwrap(), stream.clone_htod(&beta).unwrap());
        let mut out = upload(stream, &vec![bf16::POISON; count]);
        layernorm(
            &mut TensorMut::from_cudarc(stream, &mut out, &shape).unwrap(),
            &TensorRef::from_cudarc(stream, &a, &shape).unwrap(),
            &TensorRef::from_cudarc(stream, &g, &shape[1..]).unwrap(),
            &TensorRef::from_cudarc(stream, &b, &shape[1..]).unwrap(),
            1e-5,
            Stream::cudarc(stream),
        )
        .unwrap();
        let (input, mut expected) = (widened(&input), vec![0f32; count]);
        layernorm(
            &mut TensorMut::from_slice(&mut expected, &shape).unwrap(),
            &TensorRef::from_slice(&input, &shape).unwrap(),
            &TensorRef::from_slice(&gamma, &shape[1..]).unwrap(),
            &TensorRef::from_slice(&beta, &shape[1..]).unwrap(),
            1e-5,
            Stream::NULL,
        )
        .unwrap();
        assert_close(&format!("{rows}x{columns}"), &widened(&stream.clone_dtoh(&out).unwrap()), &expected, 3e-3);
    }
}

/// One row of `columns` on the GPU, and what it should be.
fn layer_of(gpu: &Gpu, columns: i64) -> (flashinfer_rs::Result<()>, Vec<bf16>, Vec<f32>) {
    let (stream, count) = (&gpu.stream, columns as usize);
    let mut random = Random(columns as u64);
    let input = random.normal::<bf16>(count);
    let (gamma, beta) = (random.normal_f32(1.0, count), random.normal_f32(1.0, count));
    let (a, g, b) = (upload(stream, &input), stream.clone_htod(&gamma).unwrap(), stream.clone_htod(&beta).unwrap());
    let mut out = upload(stream, &vec![bf16::POISON; count]);
    let result = layernorm(
        &mut TensorMut::from_cudarc(stream, &mut out, &[1, columns]).unwrap(),
        &TensorRef::from_cudarc(stream, &a, &[1, columns]).unwrap(),
        &TensorRef::from_cudarc(stream, &g, &[columns]).unwrap(),
        &TensorRef::from_cudarc(stream, &b, &[columns]).unwrap(),
        1e-5,
        Stream::cudarc(stream),
    );
    let (input, mut expected) = (widened(&input), vec![0f32; count]);
    layernorm(
        &mut TensorMut::from_slice(&mut expected, &[1, columns]).unwrap(),
        &TensorRef::from_slice(&input, &[1, columns]).unwrap(),
        &TensorRef::from_slice(&gamma, &[columns]).unwrap(),
        &TensorRef::from_slice(&beta, &[columns]).unwrap(),
        1e-5,
        Stream::NULL,
    )
    .unwrap();
    (result, stream.clone_dtoh(&out).unwrap(), expected)
}

fn layer_limits(gpu: &Gpu) {
    // Twice, since what one call sets about the kernel may help the next: the answer is the same whatever came before.
    for _ in 0..2 {
        for columns in [24_377, 24_400, 24_575, 116_025] {
            let (result, out, _) = layer_of(gpu, columns);
            let error = result.unwrap_err();
            assert!(matches!(error, FlashInferError::InvalidArgument { argument: "columns", .. }), "{error}");
            assert!(out.iter().all(|x| x.to_bits() == bf16::POISON.to_bits()), "{columns}: written though refused");
        }
        for columns in [24_376, 24_576, 116_024] {
            let (result, out, expected) = layer_of(gpu, columns);
            result.unwrap();
            assert_close(&format!("{columns} columns"), &widened(&out), &expected, 3e-3);
        }
    }
}

/// Does the same with an output, an input and a weight on the GPU and on the host, each given as a vector, and compares all
/// of the output: what it was made with stays where nothing is to be written.
fn beside(
    gpu: &Gpu,
    what: &str,
    (out, input, weight): (&[bf16], &[bf16], &[bf16]),
    norm: impl Fn(TensorMut<'_>, TensorRef<'_>, TensorRef<'_>, Stream<'_>) -> flashinfer_rs::Result<()>,
) {
    let stream = &gpu.stream;
    let (mut found, input_gpu, weight_gpu) = (upload(stream, out), upload(stream, input), upload(stream, weight));
    let [out_len, input_len, weight_len] = [out.len(), input.len(), weight.len()].map(|len| [len as i64]);
    norm(
        TensorMut::from_cudarc(stream, &mut found, &out_len).unwrap(),
        TensorRef::from_cudarc(stream, &input_gpu, &input_len).unwrap(),
        TensorRef::from_cudarc(stream, &weight_gpu, &weight_len).unwrap(),
        Stream::cudarc(stream),
    )
    .unwrap();
    let (before, input, weight) = (widened(out), widened(input), widened(weight));
    let mut expected = before.clone();
    norm(
        TensorMut::from_slice(&mut expected, &out_len).unwrap(),
        TensorRef::from_slice(&input, &input_len).unwrap(),
        TensorRef::from_slice(&weight, &weight_len).unwrap(),
        Stream::NULL,
    )
    .unwrap();
    let found = widened(&stream.clone_dtoh(&found).unwrap());
    let (mut written, mut right) = (Vec::new(), Vec::new());
    for (i, ((found, expected), before)) in found.iter().zip(&expected).zip(&before).enumerate() {
        if expected.to_bits() == before.to_bits() {
            assert_eq!(found.to_bits(), before.to_bits(), "{what}: element {i} was written, and must not be");
        } else {
            written.push(*found);
            right.push(*expected);
        }
    }
    assert!(!written.is_empty(), "{what}: nothing was to be written");
    assert_close(what, &written, &right, 3e-3);
}

fn in_place(gpu: &Gpu) {
    for (columns, heads) in [(4096, 4), (100, 3), (33, 2)] {
        let mut random = Random(columns as u64);
        let (values, weight) = (random.normal(6 * heads * columns), random.normal(columns));
        // In the input's place is what nobody reads: cudarc has no empty buffers.
        let given = (&values[..], &weight[..], &weight[..]);
        let (rows, heads, columns) = (6 * heads as i64, heads as i64, columns as i64);
        let options = NormOptions::default();
        beside(gpu, "rmsnorm_in_place", given, |mut all, _, weight, s| {
            rmsnorm_in_place(&mut all.reshape(&[rows, columns])?, &weight, &options, s)
        });
        beside(gpu, "rmsnorm_in_place of heads", given, |mut all, _, weight, s| {
            rmsnorm_in_place(&mut all.reshape(&[6, heads, columns])?, &weight, &options, s)
        });
        beside(gpu, "gemma_rmsnorm_in_place", given, |mut all, _, weight, s| {
            gemma_rmsnorm_in_place(&mut all.reshape(&[rows, columns])?, &weight, &options, s)
        });
    }
}

fn heads_major(gpu: &Gpu) {
    let (tokens, heads, size) = (9i64, 5i64, 64i64);
    let count = (tokens * heads * size) as usize;
    let mut random = Random(6);
    let (input, weight) = (random.normal::<bf16>(count), random.normal::<bf16>(size as usize));
    let poison = vec![bf16::POISON; count];
    let options = NormOptions::default();
    let (tokens_first, heads_first) = ([tokens, heads, size], [heads, tokens, size]);
    beside(gpu, "heads first in", (&poison, &input, &weight), |mut out, input, weight, s| {
        let input = input.reshape(&heads_first)?.transpose(0, 1)?;
        rmsnorm(&mut out.reshape(&tokens_first)?, &input, &weight, &options, s)
    });
    beside(gpu, "heads first out", (&poison, &input, &weight), |mut out, input, weight, s| {
        let mut out = out.reshape(&heads_first)?;
        rmsnorm(&mut out.transpose(0, 1)?, &input.reshape(&tokens_first)?, &weight, &options, s)
    });
    beside(gpu, "heads first in and out", (&poison, &input, &weight), |mut out, input, weight, s| {
        let mut out = out.reshape(&heads_first)?;
        let input = input.reshape(&heads_first)?.transpose(0, 1)?;
        rmsnorm(&mut out.transpose(0, 1)?, &input, &weight, &options, s)
    });
    beside(gpu, "heads first in place", (&input, &weight, &weight), |mut all, _, weight, s| {
        let mut all = all.reshape(&heads_first)?;
        rmsnorm_in_place(&mut all.transpose(0, 1)?, &weight, &options, s)
    });
}

fn fused_qkv(gpu: &Gpu) {
    let (tokens, q_heads, k_heads, size) = (7i64, 6i64, 2i64, 128i64);
    let all_heads = q_heads + 2 * k_heads;
    let mut random = Random(7);
    let (qkv, weight) = (random.normal::<bf16>((tokens * all_heads * size) as usize), random.normal(size as usize));
    beside(gpu, "q and k of qkv", (&qkv, &weight, &weight), |mut all, _, weight, s| {
        let mut all = all.reshape(&[tokens, all_heads, size])?;
        let (mut q, mut rest) = all.split_at(1, q_heads)?;
        let (mut k, _v) = rest.split_at(1, k_heads)?;
        rmsnorm_in_place(&mut q, &weight, &NormOptions::default(), s)?;
        rmsnorm_in_place(&mut k, &weight, &NormOptions::default(), s)
    });
}

fn broadcast(gpu: &Gpu) {
    let (stream, rows, heads, columns) = (&gpu.stream, 5i64, 3i64, 256i64);
    let mut random = Random(8);
    let (input, weight) = (random.normal::<bf16>((heads * columns) as usize), random.normal::<bf16>(columns as usize));
    let (input_gpu, weight_gpu) = (upload(stream, &input), upload(stream, &weight));
    let (input, weight) = (widened(&input), widened(&weight));
    // One row for all, and the same heads for every token.
    let forms: [(&[i64], &[i64]); 2] = [(&[rows, columns], &[0, 1]), (&[rows, heads, columns], &[0, columns, 1])];
    for (shape, strides) in forms {
        let count = shape.iter().product::<i64>() as usize;
        let (mut out, mut expected) = (upload(stream, &vec![bf16::POISON; count]), vec![0f32; count]);
        rmsnorm(
            &mut TensorMut::from_cudarc(stream, &mut out, shape).unwrap(),
            &TensorRef::from_cudarc_strided(stream, &input_gpu, shape, strides).unwrap(),
            &TensorRef::from_cudarc(stream, &weight_gpu, &[columns]).unwrap(),
            &NormOptions::default(),
            Stream::cudarc(stream),
        )
        .unwrap();
        rmsnorm(
            &mut TensorMut::from_slice(&mut expected, shape).unwrap(),
            &TensorRef::from_slice_strided(&input, shape, strides).unwrap(),
            &TensorRef::from_slice(&weight, &[columns]).unwrap(),
            &NormOptions::default(),
            Stream::NULL,
        )
        .unwrap();
        assert_close(&format!("{shape:?}"), &widened(&stream.clone_dtoh(&out).unwrap()), &expected, 3e-3);
        // What is written must have places of its own.
        let error = rmsnorm_in_place(
            &mut TensorMut::from_cudarc_strided(stream, &mut out, shape, strides).unwrap(),
            &TensorRef::from_cudarc(stream, &weight_gpu, &[columns]).unwrap(),
            &NormOptions::default(),
            Stream::cudarc(stream),
        )
        .unwrap_err();
        assert!(matches!(error, FlashInferError::InvalidArgument { argument: "out", .. }), "{error}");
    }
}

fn parts(gpu: &Gpu) {
    let (rows, columns) = (12i64, 512i64);
    let count = (rows * columns) as usize;
    let mut random = Random(9);
    let (input, weight) = (random.normal::<bf16>(count), random.normal::<bf16>(128));
    let poison = vec![bf16::POISON; count];
    let options = NormOptions::default();
    beside(gpu, "a part of a part", (&poison, &input, &weight), |mut out, input, weight, s| {
        let input = input.reshape(&[rows, columns])?.narrow(0, 2, 5)?.narrow(1, 64, 128)?;
        let mut out = out.reshape(&[rows, columns])?;
        let mut out = out.narrow(0, 6, 5)?;
        rmsnorm(&mut out.narrow(1, 256, 128)?, &input, &weight, &options, s)
    });
    beside(gpu, "halves of one tensor", (&input, &weight, &weight), |mut all, _, weight, s| {
        let mut all = all.reshape(&[rows, columns])?;
        let (mut left, mut right) = all.split_at(1, columns / 2)?;
        // From one half into the other, within the same rows.
        let right = right.narrow(1, 0, 128)?;
        gemma_rmsnorm(&mut left.narrow(1, 128, 128)?, &right.as_ref(), &weight, &options, s)
    });
    beside(gpu, "rows of two tensors added", (&input, &input, &weight), |mut all, _, weight, s| {
        let mut all = all.reshape(&[rows * 4, columns / 4])?;
        let (mut first, mut second) = all.split_at(0, rows * 2)?;
        fused_add_rmsnorm(&mut first, &mut second, &weight, &options, s)
    });
}

fn supported(_: &Gpu) {
    assert!(is_supported(Device::Cuda(0)).unwrap() && is_supported(Device::Cpu).unwrap());
    assert!(matches!(is_supported(Device::Cuda(1000)).unwrap_err(), FlashInferError::DeviceOutOfRange { .. }));
}
