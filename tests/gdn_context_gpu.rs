//! GDN prefill through the safe API on Hopper GPUs. `FLASHINFER_RS_RUN_GPU_TESTS=1 cargo test --features cudarc --test
//! gdn_context_gpu` runs them; under a time limit, please: this kernel hangs on what it should refuse.
//! They are done within 240 seconds.

#[path = "support/data.rs"]
mod data;
#[path = "support/gpu.rs"]
mod gpu;

use std::process::ExitCode;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream};
use data::{Number, Random, assert_close, widened};
use flashinfer_rs::kernels::gdn::{GdnOptions, GdnPrefillContext, GdnTensors, HEAD_SIZE};
use flashinfer_rs::{CuSeqlens, FlashInferError, TensorMut, TensorRef};
use gpu::Gpu;
use half::{bf16, f16};

const SIZE: usize = HEAD_SIZE as usize;

fn main() -> ExitCode {
    gpu::main(&[
        ("sequences_without_tokens_keep_their_state", |gpu| empty_sequences::<bf16>(gpu, 6e-3)),
        ("sequences_without_tokens_keep_their_state_in_f16", |gpu| empty_sequences::<f16>(gpu, 8e-4)),
        ("the_others_are_computed_as_if_those_were_not_there", as_if_not_there),
        ("no_token_at_all_is_fine", nothing_at_all),
        ("offsets_of_another_batch_are_refused", other_offsets),
        ("a_tensor_of_another_stream_is_refused", other_stream),
        ("states_that_are_not_aligned_to_16_bytes_are_refused_before_anything_is_launched", misaligned_states),
        ("decays_of_0_and_next_to_it_are_what_the_kernel_makes_of_them", small_decays),
        ("threads_with_contexts_of_their_own_get_what_one_gets", threads),
        ("every_gpu_of_the_machine_gives_the_same_bits_in_any_order", every_gpu),
        ("every_gpu_at_once_from_a_thread_each_gives_the_same_bits", every_gpu_at_once),
    ])
}

struct Case<T> {
    lengths: Vec<i64>,
    heads: [usize; 3],
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    alpha: Vec<f32>,
    beta: Vec<f32>,
    input_state: Option<Vec<f32>>,
}

/// Of `q`, `k`, `v`, the output and the states.
type Shapes = ([i64; 3], [i64; 3], [i64; 3], [i64; 3], [i64; 4]);
type Output<T> = (Vec<T>, Vec<f32>);

impl<T: Number> Case<T> {
    fn new(seed: u64, lengths: &[i64], heads: [usize; 3], with_state: bool) -> Self {
        let mut random = Random(seed);
        let tokens = lengths.iter().sum::<i64>() as usize;
        let [q_heads, k_heads, v_heads] = heads;
        let out_heads = q_heads.max(v_heads);
        Self {
            q: random.unit(tokens * q_heads, SIZE),
            k: random.unit(tokens * k_heads, SIZE),
            v: random.normal(tokens * v_heads * SIZE),
            alpha: random.between(0.8, 1.0, tokens * out_heads),
            beta: random.between(0.0, 1.0, tokens * out_heads),
            input_state: with_state.then(|| random.normal_f32(0.3, lengths.len() * out_heads * SIZE * SIZE)),
            lengths: lengths.to_vec(),
            heads,
        }
    }

    fn shapes(&self) -> Shapes {
        let tokens = self.lengths.iter().sum();
        let [q, k, v] = self.heads.map(|heads| heads as i64);
        let out = q.max(v);
        let per = |heads| [tokens, heads, HEAD_SIZE];
        (per(q), per(k), per(v), per(out), [self.lengths.len() as i64, out, HEAD_SIZE, HEAD_SIZE])
    }

    fn expected(&self) -> (Vec<f32>, Vec<f32>) {
        let (q_shape, k_shape, v_shape, out_shape, state_shape) = self.shapes();
        let (q, k, v) = (widened(&self.q), widened(&self.k), widened(&self.v));
        let mut output = vec![0f32; out_shape.iter().product::<i64>() as usize];
        let mut state = vec![0f32; state_shape.iter().product::<i64>() as usize];
        let mut tensors = GdnTensors {
            output: TensorMut::from_slice(&mut output, &out_shape).unwrap(),
            output_state: TensorMut::from_slice(&mut state, &state_shape).unwrap(),
            q: TensorRef::from_slice(&q, &q_shape).unwrap(),
            k: TensorRef::from_slice(&k, &k_shape).unwrap(),
            v: TensorRef::from_slice(&v, &v_shape).unwrap(),
        };
        let mut options = GdnOptions::default()
            .with_alpha(TensorRef::from_slice(&self.alpha, &out_shape[..2]).unwrap())
            .with_beta(TensorRef::from_slice(&self.beta, &out_shape[..2]).unwrap());
        options.input_state = self.input_state.as_ref().map(|s| TensorRef::from_slice(s, &state_shape).unwrap());
        let sequences = CuSeqlens::from_lengths(&self.lengths).unwrap();
        GdnPrefillContext::on_host().prefill(&mut tensors, &sequences, &options).unwrap();
        (output, state)
    }

    fn run(&self, stream: &Arc<CudaStream>) -> Output<T> {
        self.run_with(stream, &self.lengths, stream).unwrap()
    }

    /// With offsets of these lengths, and `q` made for that stream.
    fn run_with(
        &self,
        stream: &Arc<CudaStream>,
        lengths: &[i64],
        q_stream: &Arc<CudaStream>,
    ) -> flashinfer_rs::Result<Output<T>> {
        let (q_shape, k_shape, v_shape, out_shape, state_shape) = self.shapes();
        let padded = |values: &[T]| {
            let mut values = values.to_vec();
            values.resize(values.len().max(1), T::default());
            stream.clone_htod(&values).unwrap()
        };
        let (q, k, v) = (padded(&self.q), padded(&self.k), padded(&self.v));
        let numbers = |values: &[f32]| stream.clone_htod(&[values, &[0.0]].concat()).unwrap();
        let (alpha, beta) = (numbers(&self.alpha), numbers(&self.beta));
        let input_state = self.input_state.as_ref().map(|state| stream.clone_htod(state).unwrap());
        let mut output = stream.clone_htod(&vec![T::POISON; out_shape.iter().product::<i64>() as usize + 1]).unwrap();
        let mut state = stream.clone_htod(&vec![f32::NAN; state_shape.iter().product::<i64>() as usize]).unwrap();
        let cu_seqlens = CuSeqlens::from_lengths(lengths)?.to_device(stream)?;
        let mut context = GdnPrefillContext::new(stream)?;
        let mut tensors = GdnTensors {
            output: TensorMut::from_cudarc(stream, &mut output, &out_shape)?,
            output_state: TensorMut::from_cudarc(stream, &mut state, &state_shape)?,
            q: TensorRef::from_cudarc(q_stream, &q, &q_shape)?,
            k: TensorRef::from_cudarc(stream, &k, &k_shape)?,
            v: TensorRef::from_cudarc(stream, &v, &v_shape)?,
        };
        let mut options = GdnOptions::default()
            .with_alpha(TensorRef::from_cudarc(stream, &alpha, &out_shape[..2])?)
            .with_beta(TensorRef::from_cudarc(stream, &beta, &out_shape[..2])?);
        options.input_state =
            input_state.as_ref().map(|s| TensorRef::from_cudarc(stream, s, &state_shape)).transpose()?;
        context.prefill(&mut tensors, &cu_seqlens, &options)?;
        let mut output = stream.clone_dtoh(&output).unwrap();
        output.pop();
        Ok((output, stream.clone_dtoh(&state).unwrap()))
    }
}

fn bits<T: Number>((output, state): &Output<T>) -> Vec<u32> {
    widened(output).iter().chain(state).map(|value| value.to_bits()).collect()
}

fn empty_sequences<T: Number>(gpu: &Gpu, tolerance: f64) {
    let batches: [&[i64]; 6] = [&[0, 100], &[100, 0], &[5, 0, 0, 70, 0, 3], &[0, 0, 64], &[1, 0, 1], &[64, 65]];
    for lengths in batches {
        for with_state in [false, true] {
            let case = Case::<T>::new(1, lengths, [2, 2, 4], with_state);
            let (output, state) = case.run(&gpu.stream);
            let (expected_output, expected_state) = case.expected();
            let what = format!("{lengths:?}, initial states: {with_state}");
            assert_close(&format!("{what}: output"), &widened(&output), &expected_output, tolerance);
            assert_close(&format!("{what}: state"), &state, &expected_state, tolerance);
            // An empty sequence's state is the very one it had.
            let each = state.len() / lengths.len();
            for i in (0..lengths.len()).filter(|&i| lengths[i] == 0) {
                assert_eq!(state[i * each..][..each], expected_state[i * each..][..each], "{what}: sequence {i}");
            }
        }
    }
}

fn as_if_not_there(gpu: &Gpu) {
    let with = Case::<bf16>::new(2, &[0, 40, 0, 30, 0], [4, 2, 2], false);
    let without = Case { lengths: vec![40, 30], ..Case::<bf16>::new(2, &[0, 40, 0, 30, 0], [4, 2, 2], false) };
    let ((output, state), (dense_output, dense_state)) = (with.run(&gpu.stream), without.run(&gpu.stream));
    assert!(widened(&output) == widened(&dense_output));
    let each = dense_state.len() / 2;
    assert!(state[each..2 * each] == dense_state[..each] && state[3 * each..4 * each] == dense_state[each..]);
}

fn nothing_at_all(gpu: &Gpu) {
    let case = Case::<bf16>::new(3, &[0, 0], [1, 1, 1], true);
    let (output, state) = case.run(&gpu.stream);
    assert!(output.is_empty());
    assert_eq!(Some(state), case.input_state);
}

fn other_offsets(gpu: &Gpu) {
    let case = Case::<bf16>::new(4, &[60, 4], [1, 1, 1], false);
    for lengths in [[60, 5], [60, 3]] {
        let error = case.run_with(&gpu.stream, &lengths, &gpu.stream).unwrap_err();
        assert!(matches!(error, FlashInferError::InvalidArgument { argument: "tokens", .. }), "{error}");
    }
    let error = case.run_with(&gpu.stream, &[32, 16, 16], &gpu.stream).unwrap_err();
    assert!(matches!(error, FlashInferError::InvalidArgument { argument: "output_state", .. }), "{error}");
}

fn other_stream(gpu: &Gpu) {
    let case = Case::<bf16>::new(5, &[64], [1, 1, 1], false);
    let other = gpu.context.new_stream().unwrap();
    let error = case.run_with(&gpu.stream, &[64], &other).unwrap_err();
    assert!(matches!(error, FlashInferError::InvalidArgument { argument: "q", .. }), "{error}");
}

/// The kernel stores states 8 bytes at once, upstream's source assumes 16: others lost the context.
fn misaligned_states(gpu: &Gpu) {
    let stream = &gpu.stream;
    let case = Case::<bf16>::new(9, &[64], [1, 1, 1], true);
    let (q_shape, k_shape, v_shape, out_shape, state_shape) = case.shapes();
    let upload = |values: &[bf16]| stream.clone_htod(values).unwrap();
    let (q, k, v) = (upload(&case.q), upload(&case.k), upload(&case.v));
    let (alpha, beta) = (stream.clone_htod(&case.alpha).unwrap(), stream.clone_htod(&case.beta).unwrap());
    let mut output = upload(&vec![bf16::POISON; 64 * SIZE]);
    let mut state = stream.clone_htod(&vec![f32::NAN; SIZE * SIZE + 4]).unwrap();
    let cu_seqlens = CuSeqlens::from_lengths(&[64]).unwrap().to_device(stream).unwrap();
    let mut context = GdnPrefillContext::new(stream).unwrap();
    let input_state = case.input_state.as_deref().unwrap();
    let mut prefill = |state_at: usize, input_at: usize| {
        let input = stream.clone_htod(&[&vec![0.0; input_at], input_state].concat()).unwrap();
        let (input, mut state) = (input.slice(input_at..), state.slice_mut(state_at..));
        let mut tensors = GdnTensors {
            output: TensorMut::from_cudarc(stream, &mut output, &out_shape).unwrap(),
            output_state: TensorMut::from_cudarc(stream, &mut state, &state_shape).unwrap(),
            q: TensorRef::from_cudarc(stream, &q, &q_shape).unwrap(),
            k: TensorRef::from_cudarc(stream, &k, &k_shape).unwrap(),
            v: TensorRef::from_cudarc(stream, &v, &v_shape).unwrap(),
        };
        let options = GdnOptions::default()
            .with_alpha(TensorRef::from_cudarc(stream, &alpha, &out_shape[..2]).unwrap())
            .with_beta(TensorRef::from_cudarc(stream, &beta, &out_shape[..2]).unwrap())
            .with_input_state(TensorRef::from_cudarc(stream, &input, &state_shape).unwrap());
        let result = context.prefill(&mut tensors, &cu_seqlens, &options);
        (result, widened(&stream.clone_dtoh(&output).unwrap()), stream.clone_dtoh(&state).unwrap())
    };
    for at in [1, 2, 3] {
        for (argument, state_at, input_at) in [("output_state", at, 0), ("input_state", 0, at)] {
            let (result, output, state) = prefill(state_at, input_at);
            let error = result.unwrap_err();
            let FlashInferError::InvalidArgument { argument: found, expected, .. } = &error else { panic!("{error}") };
            assert_eq!((*found, expected.as_str()), (argument, "memory aligned to 16 bytes"));
            assert!(!error.is_fatal());
            assert!(output.iter().chain(&state).all(|x| x.is_nan()), "{argument} at {at}: launched all the same");
        }
    }
    // The context is alive, and 16 bytes are enough.
    let (expected_output, expected_state) = case.expected();
    let (result, output, state) = prefill(4, 4);
    result.unwrap();
    assert_close("output", &output, &expected_output, 6e-3);
    assert_close("state", &state, &expected_state, 6e-3);
}

/// The kernel adds up log2(alpha + 1e-10): it computes with alpha + 1e-10, also for 0, where the reference is exact.
fn small_decays(gpu: &Gpu) {
    let some = |i: usize, ordinary: f32| match i % 7 {
        0 => 0.0,
        3 => 1e-12,
        _ => ordinary,
    };
    type Pattern = fn(usize, f32) -> f32;
    let patterns: [(&str, Pattern); 4] = [
        ("some of 0 and of 1e-12", some),
        ("only 0", |_, _| 0.0),
        ("only 1e-12", |_, _| 1e-12),
        ("one 0 in a tile", |i, ordinary| if i % 256 == 131 { 0.0 } else { ordinary }),
    ];
    for (what, pattern) in patterns {
        let make = || Case::<bf16>::new(10, &[130, 1, 64], [2, 2, 4], true);
        let alpha = make().alpha.iter().enumerate().map(|(i, &ordinary)| pattern(i, ordinary)).collect::<Vec<_>>();
        let shifted = Case { alpha: alpha.iter().map(|alpha| alpha + 1e-10).collect(), ..make() };
        let (output, state) = Case { alpha, ..make() }.run(&gpu.stream);
        let (expected_output, expected_state) = shifted.expected();
        assert_close(&format!("{what}: output"), &widened(&output), &expected_output, 6e-3);
        assert_close(&format!("{what}: state"), &state, &expected_state, 6e-3);
    }
}

fn threads(gpu: &Gpu) {
    let case = Case::<bf16>::new(6, &[100, 0, 50], [2, 2, 4], true);
    let serial = bits(&case.run(&gpu.stream));
    std::thread::scope(|scope| {
        for _ in 0..32 {
            scope.spawn(|| {
                let stream = gpu.context.new_stream().unwrap();
                for _ in 0..5 {
                    assert!(bits(&case.run(&stream)) == serial);
                }
            });
        }
    });
}

fn streams() -> Vec<Arc<CudaStream>> {
    let count = CudaContext::device_count().unwrap() as usize;
    (0..count).map(|id| CudaContext::new(id).unwrap().new_stream().unwrap()).collect()
}

fn every_gpu(_: &Gpu) {
    let streams = streams();
    println!("{} GPUs", streams.len());
    // Another kernel each time, first used on another GPU.
    for (turn, (heads, with_state)) in
        [([2, 2, 2], true), ([2, 2, 4], false), ([4, 2, 2], true)].into_iter().enumerate()
    {
        let case = Case::<f16>::new(7, &[70, 0, 30], heads, with_state);
        let order = (0..streams.len()).map(|i| &streams[(i + turn) % streams.len()]);
        let results: Vec<_> = order.clone().chain(order).map(|stream| bits(&case.run(stream))).collect();
        assert!(results.iter().all(|result| *result == results[0]));
    }
}

fn every_gpu_at_once(_: &Gpu) {
    let streams = streams();
    let case = Case::<bf16>::new(8, &[33, 128], [1, 1, 2], true);
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = streams
            .iter()
            .chain(&streams)
            .map(|stream| scope.spawn(|| (0..10).map(|_| bits(&case.run(stream))).collect::<Vec<_>>()))
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    assert!(results.iter().all(|result| *result == results[0]));
}
