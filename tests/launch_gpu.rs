//! Scopes, prepared calls and graphs on a GPU. `FLASHINFER_RS_RUN_GPU_TESTS=1 cargo test --features cudarc --test launch_gpu`
//! runs them.
//! They are done within 240 seconds.

#[path = "support/counting.rs"]
mod counting;
#[path = "support/data.rs"]
mod data;
#[path = "support/gpu.rs"]
mod gpu;

use std::process::ExitCode;
use std::sync::Arc;

use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaSlice, CudaStream, result};
use data::{Number, Random};
use flashinfer_rs::kernels::gdn::{CapturedPrefill, GdnOptions, GdnPrefill, GdnPrefillContext, GdnTensors};
use flashinfer_rs::kernels::norm::{
    GemmaRmsnorm, NormOptions, fused_add_rmsnorm, gemma_fused_add_rmsnorm, gemma_rmsnorm, layernorm, rmsnorm,
    rmsnorm_quant,
};
use flashinfer_rs::{
    Captured, CapturedCuSeqlens, CuSeqlens, DType, DeviceCuSeqlens, FlashInferError, FlashInferRuntime, GraphMut,
    LaunchGraph, Prepared, Stream, TensorMut, TensorRef,
};
use gpu::Gpu;
use half::{bf16, f16};

fn main() -> ExitCode {
    gpu::main(&[
        // First, so that nothing is warm: a capture may be a kernel's first use.
        ("a_first_use_can_be_captured", first_use),
        ("no_launch_allocates_in_rust", allocations),
        ("a_scope_gives_the_same_bits", scope),
        ("a_prepared_call_gives_the_same_bits_on_other_memory_too", prepared),
        ("a_prepared_call_stays_on_its_tensors_stream", prepared_stream),
        ("a_graph_of_every_norm_gives_the_same_bits_after_inputs_change", every_norm),
        ("a_long_chain_with_pdl_gives_the_same_bits", |gpu| chain(gpu, true)),
        ("a_long_chain_without_pdl_gives_the_same_bits", |gpu| chain(gpu, false)),
        ("a_graph_of_prefills_gives_the_same_bits_after_inputs_change", prefills),
        ("a_graph_is_updated_in_place_where_only_numbers_change", update),
        ("a_graph_keeps_its_buffers_and_gives_them_back", buffers),
        ("a_graph_is_ordered_with_other_streams", ordered),
        ("graphs_work_on_the_null_stream_and_without_tracking", null_stream),
        ("graphs_move_between_threads", threads),
        ("what_cannot_be_captured_is_an_error_and_streams_stay_usable", uncapturable),
        ("a_graph_without_calls_is_an_error_to_launch", uncaptured),
        ("a_capture_of_cudarc_s_own_is_refused_and_stays_valid", cudarc_capture),
        ("a_struct_of_buffers_and_a_copy_of_one_s_own_in_a_graph", own_struct),
        ("a_captured_prefill_takes_other_sequences", replaced_sequences),
    ])
}

const ROWS: usize = 16;
const COLUMNS: usize = 512;
const SHAPE: [i64; 2] = [ROWS as i64, COLUMNS as i64];
const LENGTH: [i64; 1] = [COLUMNS as i64];

fn upload<T: Number>(stream: &Arc<CudaStream>, seed: u64, count: usize) -> CudaSlice<T> {
    stream.clone_htod(&Random(seed).normal::<T>(count)).unwrap()
}

fn matrix(stream: &Arc<CudaStream>, seed: u64) -> CudaSlice<bf16> {
    upload(stream, seed, ROWS * COLUMNS)
}

fn vector(stream: &Arc<CudaStream>, seed: u64) -> CudaSlice<bf16> {
    upload(stream, seed, COLUMNS)
}

fn bits(stream: &Arc<CudaStream>, buffer: &impl cudarc::driver::DevicePtr<bf16>) -> Vec<u16> {
    let values: Vec<bf16> = stream.clone_dtoh(buffer).unwrap();
    values.into_iter().map(bf16::to_bits).collect()
}

/// What a plain call gives.
fn eager(
    stream: &Arc<CudaStream>,
    input: &CudaSlice<bf16>,
    weight: &CudaSlice<bf16>,
    options: &NormOptions,
) -> Vec<u16> {
    let mut out = stream.clone_htod(&vec![bf16::POISON; ROWS * COLUMNS]).unwrap();
    gemma_rmsnorm(
        &mut TensorMut::from_cudarc(stream, &mut out, &SHAPE).unwrap(),
        &TensorRef::from_cudarc(stream, input, &SHAPE).unwrap(),
        &TensorRef::from_cudarc(stream, weight, &LENGTH).unwrap(),
        options,
        Stream::cudarc(stream),
    )
    .unwrap();
    bits(stream, &out)
}

fn first_use(gpu: &Gpu) {
    let stream = &gpu.stream;
    let weight = Arc::new(vector(stream, 2));
    let mut graph = LaunchGraph::new(stream, (matrix(stream, 1), Arc::clone(&weight), matrix(stream, 3))).unwrap();
    let captured = graph.capture(|s, (input, weight, mut out)| {
        let (input, weight) = (input.read(&SHAPE)?, weight.read(&LENGTH)?);
        gemma_rmsnorm(&mut out.write(&SHAPE)?, &input, &weight, &NormOptions::default(), s)
    });
    assert_eq!(captured.unwrap(), Captured::Instantiated);
    assert_eq!(graph.nodes(), 1);
    graph.launch().unwrap();
    let found = bits(stream, &graph.buffers().unwrap().2);
    assert_eq!(found, eager(stream, &matrix(stream, 1), &weight, &NormOptions::default()));
}

fn allocations(gpu: &Gpu) {
    let stream = &gpu.stream;
    let (input, weight, mut out) = (matrix(stream, 1), vector(stream, 2), matrix(stream, 3));
    let options = NormOptions::default();
    let count = |f: &mut dyn FnMut()| {
        let found = counting::allocations(50, f);
        stream.synchronize().unwrap();
        found
    };
    let mut plain = || {
        gemma_rmsnorm(
            &mut TensorMut::from_cudarc(stream, &mut out, &SHAPE).unwrap(),
            &TensorRef::from_cudarc(stream, &input, &SHAPE).unwrap(),
            &TensorRef::from_cudarc(stream, &weight, &LENGTH).unwrap(),
            &options,
            Stream::cudarc(stream),
        )
        .unwrap();
    };
    assert_eq!(count(&mut plain), 0, "cudarc's buffers, with event tracking");
    let runtime = FlashInferRuntime::global().unwrap();
    assert_eq!(count(&mut || runtime.on(stream, |_| plain()).unwrap()), 0, "in a scope");
    let (mut prefill, offsets) = Prefill::new(stream, &[40, 24], 5);
    let mut context = GdnPrefillContext::new(stream).unwrap();
    assert_eq!(count(&mut || prefill.eager(&mut context, &offsets, stream)), 0, "prefill");
    let mut graph = LaunchGraph::new(stream, (input, weight, out)).unwrap();
    let capture = graph.capture(|s, (input, weight, mut out)| {
        gemma_rmsnorm(&mut out.write(&SHAPE)?, &input.read(&SHAPE)?, &weight.read(&LENGTH)?, &options, s)
    });
    capture.unwrap();
    assert_eq!(count(&mut || graph.launch().unwrap()), 0, "a graph");
}

fn scope(gpu: &Gpu) {
    let (stream, other) = (&gpu.stream, gpu.context.new_stream().unwrap());
    let (input, weight) = (matrix(stream, 1), vector(stream, 2));
    let options = NormOptions::default();
    let expected = eager(stream, &input, &weight, &options);
    let runtime = FlashInferRuntime::global().unwrap();
    let mut outs = [matrix(stream, 3), matrix(stream, 4), matrix(stream, 5)];
    let [first, second, third] = &mut outs;
    let call = |out: &mut CudaSlice<bf16>, on: &Arc<CudaStream>, s: Stream<'_>| {
        gemma_rmsnorm(
            &mut TensorMut::from_cudarc(on, out, &SHAPE)?,
            &TensorRef::from_cudarc(on, &input, &SHAPE)?,
            &TensorRef::from_cudarc(on, &weight, &LENGTH)?,
            &options,
            s,
        )
    };
    let result = runtime.on(stream, |s| {
        call(first, stream, s)?;
        runtime.on(&other, |inner| {
            call(second, &other, inner)?;
            // The outer stream's, though the inner one is set now: it waits for nothing of `other`.
            call(third, stream, s)
        })?
    });
    result.unwrap().unwrap();
    for out in &outs {
        assert_eq!(bits(stream, out), expected);
    }
    // Calls of a scope do wait behind what is on its stream, and are asynchronous.
    let [first, ..] = &mut outs;
    gpu.assert_asynchronous(stream, || runtime.on(stream, |s| call(first, stream, s)).unwrap().unwrap());
}

fn prepared(gpu: &Gpu) {
    let stream = &gpu.stream;
    let options = NormOptions::default().with_eps(1e-3);
    let (first, second, weight) = (matrix(stream, 1), matrix(stream, 2), vector(stream, 3));
    let (mut out, mut other) = (matrix(stream, 4), matrix(stream, 5));
    let read = |buffer| TensorRef::from_cudarc(stream, buffer, &SHAPE).unwrap();
    let weight_gpu = TensorRef::from_cudarc(stream, &weight, &LENGTH).unwrap();
    let write = TensorMut::from_cudarc(stream, &mut out, &SHAPE).unwrap();
    let prepared = Prepared::<GemmaRmsnorm>::new(&write, &read(&first), &weight_gpu, &options).unwrap();
    let s = Stream::cudarc(stream);
    let mut write = write;
    prepared.launch(&mut write, &read(&first), &weight_gpu, s).unwrap();
    let mut write = TensorMut::from_cudarc(stream, &mut other, &SHAPE).unwrap();
    let mut launch = |s: Stream<'_>| prepared.launch(&mut write, &read(&second), &weight_gpu, s);
    FlashInferRuntime::global().unwrap().on(stream, |s| (0..3).try_for_each(|_| launch(s))).unwrap().unwrap();
    gpu.assert_asynchronous(stream, || launch(s).unwrap());
    assert_eq!(bits(stream, &out), eager(stream, &first, &weight, &options));
    assert_eq!(bits(stream, &other), eager(stream, &second, &weight, &options));

    // Prefill, on raw pointers, whose memory stays with its owner.
    let (mut prefill, offsets) = Prefill::new(stream, &[40, 24], 7);
    let mut context = GdnPrefillContext::new(stream).unwrap();
    prefill.eager(&mut context, &offsets, stream);
    let expected = prefill.results(stream);
    prefill.poison(stream);
    let offsets = stream.clone_htod(&[0i64, 40, 64]).unwrap();
    let mut workspace = stream.alloc_zeros::<u8>(128 * 1024).unwrap();
    {
        let (mut tensors, options) = prefill.tensors(stream);
        let offsets = TensorRef::from_cudarc(stream, &offsets, &[3]).unwrap();
        let mut workspace = TensorMut::from_cudarc(stream, &mut workspace, &[128 * 1024]).unwrap();
        let prepared = Prepared::<GdnPrefill>::new(&tensors, &offsets, &workspace, &options).unwrap();
        for _ in 0..3 {
            // SAFETY: the offsets start with 0, increase, and end with the number of tokens; the workspace is this call's.
            unsafe { prepared.launch(&mut tensors, &offsets, &mut workspace, &options, s) }.unwrap();
        }
    }
    assert!(prefill.results(stream) == expected, "prepared prefill");
}

fn prepared_stream(gpu: &Gpu) {
    let (stream, other) = (&gpu.stream, gpu.context.new_stream().unwrap());
    let (input, weight, mut out) = (matrix(stream, 1), vector(stream, 2), matrix(stream, 3));
    let mut out = TensorMut::from_cudarc(stream, &mut out, &SHAPE).unwrap();
    let own = TensorRef::from_cudarc(stream, &input, &SHAPE).unwrap();
    let weight = TensorRef::from_cudarc(stream, &weight, &LENGTH).unwrap();
    let prepared = Prepared::<GemmaRmsnorm>::new(&out, &own, &weight, &NormOptions::default()).unwrap();
    let error = prepared.launch(&mut out, &own, &weight, Stream::cudarc(&other)).unwrap_err();
    assert!(matches!(error, FlashInferError::InvalidArgument { argument: "out", .. }), "{error}");
    let foreign = TensorRef::from_cudarc(&other, &input, &SHAPE).unwrap();
    let error = prepared.launch(&mut out, &foreign, &weight, Stream::cudarc(stream)).unwrap_err();
    assert!(matches!(error, FlashInferError::InvalidArgument { argument: "input", .. }), "{error}");
    assert!(error.to_string().contains("for stream"), "{error}");
    // Of another form is not what was prepared, though a call of its own would do.
    let wider = TensorRef::from_cudarc_strided(stream, &input, &[1, LENGTH[0]], &[2 * LENGTH[0], 1]).unwrap();
    let error = prepared.launch(&mut out, &wider, &weight, Stream::cudarc(stream)).unwrap_err();
    assert!(matches!(error, FlashInferError::InvalidArgument { .. }), "{error}");
    prepared.launch(&mut out, &own, &weight, Stream::cudarc(stream)).unwrap();
}

fn every_norm(gpu: &Gpu) {
    let stream = &gpu.stream;
    let options = NormOptions::default();
    let heads = [ROWS as i64, 4, COLUMNS as i64 / 4];
    let per_head = [COLUMNS as i64 / 4];
    let make = |seed| {
        let f32s = |seed| stream.clone_htod(&Random(seed).normal_f32(1.0, COLUMNS)).unwrap();
        let eight = stream.alloc_zeros::<u8>(ROWS * COLUMNS).unwrap();
        let matrices = [0u64, 1, 2, 3, 4].map(|i| matrix(stream, seed + i));
        (matrices, Arc::new(vector(stream, 90)), f32s(91), f32s(92), eight)
    };
    type Buffers = ([CudaSlice<bf16>; 5], Arc<CudaSlice<bf16>>, CudaSlice<f32>, CudaSlice<f32>, CudaSlice<u8>);
    let eager = |buffers: &mut Buffers| {
        let s = Stream::cudarc(stream);
        let ([a, b, c, d, e], w, gamma, beta, eight) = buffers;
        let weight = TensorRef::from_cudarc(stream, w.as_ref(), &LENGTH).unwrap();
        let short = TensorRef::from_cudarc(stream, w.as_ref(), &per_head).unwrap();
        {
            let mut b = TensorMut::from_cudarc(stream, b, &SHAPE).unwrap();
            gemma_rmsnorm(&mut b, &TensorRef::from_cudarc(stream, a, &SHAPE).unwrap(), &weight, &options, s).unwrap();
        }
        {
            let mut c = TensorMut::from_cudarc(stream, c, &heads).unwrap();
            rmsnorm(&mut c, &TensorRef::from_cudarc(stream, b, &heads).unwrap(), &short, &options, s).unwrap();
        }
        {
            let mut c = TensorMut::from_cudarc(stream, c, &SHAPE).unwrap();
            let mut d = TensorMut::from_cudarc(stream, d, &SHAPE).unwrap();
            fused_add_rmsnorm(&mut c, &mut d, &weight, &options, s).unwrap();
            gemma_fused_add_rmsnorm(&mut c, &mut d, &weight, &options, s).unwrap();
        }
        let c = TensorRef::from_cudarc(stream, c, &SHAPE).unwrap();
        {
            let mut eight = TensorMut::from_cudarc_bytes(stream, eight, DType::F8E4M3, &SHAPE).unwrap();
            rmsnorm_quant(&mut eight, &c, &weight, 0.1, &options, s).unwrap();
        }
        let mut e = TensorMut::from_cudarc(stream, e, &SHAPE).unwrap();
        let gamma = TensorRef::from_cudarc(stream, gamma, &LENGTH).unwrap();
        let beta = TensorRef::from_cudarc(stream, beta, &LENGTH).unwrap();
        layernorm(&mut e, &c, &gamma, &beta, 1e-5, s).unwrap();
    };
    for pdl in [true, false] {
        let mut graph = LaunchGraph::new(stream, make(1)).unwrap().with_pdl(pdl);
        let capture = graph.capture(|s, ([a, mut b, mut c, mut d, mut e], w, gamma, beta, mut eight)| {
            let (weight, short) = (w.read(&LENGTH)?, w.read(&per_head)?);
            gemma_rmsnorm(&mut b.write(&SHAPE)?, &a.read(&SHAPE)?, &weight, &options, s)?;
            rmsnorm(&mut c.write(&heads)?, &b.read(&heads)?, &short, &options, s)?;
            {
                let (mut c, mut d) = (c.write(&SHAPE)?, d.write(&SHAPE)?);
                fused_add_rmsnorm(&mut c, &mut d, &weight, &options, s)?;
                gemma_fused_add_rmsnorm(&mut c, &mut d, &weight, &options, s)?;
            }
            let c = c.read(&SHAPE)?;
            rmsnorm_quant(&mut eight.write_bytes(DType::F8E4M3, &SHAPE)?, &c, &weight, 0.1, &options, s)?;
            layernorm(&mut e.write(&SHAPE)?, &c, &gamma.read(&LENGTH)?, &beta.read(&LENGTH)?, 1e-5, s)
        });
        capture.unwrap();
        assert_eq!(graph.nodes(), 6);
        for seed in [100, 200, 300] {
            let mut expected = make(seed);
            {
                let ([a, _, _, d, _], ..) = graph.buffers().unwrap();
                let (mut a, mut d) = (a, d);
                stream.memcpy_dtod(&expected.0[0], &mut a).unwrap();
                stream.memcpy_dtod(&expected.0[3], &mut d).unwrap();
            }
            graph.launch().unwrap();
            eager(&mut expected);
            let (found, _, _, _, eight) = graph.buffers().unwrap();
            for (i, (found, expected)) in found.iter().zip(&expected.0).enumerate() {
                assert_eq!(bits(stream, found), bits(stream, expected), "pdl {pdl}, seed {seed}, matrix {i}");
            }
            assert_eq!(stream.clone_dtoh(&eight).unwrap(), stream.clone_dtoh(&expected.4).unwrap());
        }
    }
}

/// A chain in which every kernel reads what the one before it wrote, which it may not do too early.
fn chain(gpu: &Gpu, pdl: bool) {
    const LINKS: usize = 300;
    let stream = &gpu.stream;
    for (rows, columns) in [(1usize, 4096usize), (700, 1024)] {
        let (shape, length) = ([rows as i64, columns as i64], [columns as i64]);
        let weight = Arc::new(upload::<f16>(stream, 3, columns));
        let options = NormOptions::default();
        let (a, b) = (upload::<f16>(stream, 1, rows * columns), upload::<f16>(stream, 2, rows * columns));
        let mut graph = LaunchGraph::new(stream, (a, b, Arc::clone(&weight))).unwrap().with_pdl(pdl);
        let capture = graph.capture(|s, (mut a, mut b, weight)| {
            let weight = weight.read(&length)?;
            for link in 0..LINKS {
                let (from, to): (&GraphMut<'_, f16>, &mut GraphMut<'_, f16>) =
                    if link % 2 == 0 { (&a, &mut b) } else { (&b, &mut a) };
                rmsnorm(&mut to.write(&shape)?, &from.read(&shape)?, &weight, &options, s)?;
            }
            Ok(())
        });
        capture.unwrap();
        assert_eq!(graph.nodes(), LINKS);
        for seed in 10..15 {
            let input = upload::<f16>(stream, seed, rows * columns);
            stream.memcpy_dtod(&input, &mut graph.buffers().unwrap().0).unwrap();
            graph.launch().unwrap();
            let found = stream.clone_dtoh(&graph.buffers().unwrap().0).unwrap();
            let mut buffers = [input, upload::<f16>(stream, 2, rows * columns)];
            for link in 0..LINKS {
                let [a, b] = &mut buffers;
                let (from, to) = if link % 2 == 0 { (a, b) } else { (b, a) };
                rmsnorm(
                    &mut TensorMut::from_cudarc(stream, to, &shape).unwrap(),
                    &TensorRef::from_cudarc(stream, from, &shape).unwrap(),
                    &TensorRef::from_cudarc(stream, weight.as_ref(), &length).unwrap(),
                    &options,
                    Stream::cudarc(stream),
                )
                .unwrap();
            }
            assert!(found == stream.clone_dtoh(&buffers[0]).unwrap(), "{rows}x{columns}, pdl {pdl}, seed {seed}");
        }
    }
}

/// A prefill's tensors: 2 query and key heads, 4 value heads.
struct Prefill {
    q: CudaSlice<bf16>,
    k: CudaSlice<bf16>,
    v: CudaSlice<bf16>,
    alpha: CudaSlice<f32>,
    beta: CudaSlice<f32>,
    output: CudaSlice<bf16>,
    state: CudaSlice<f32>,
    tokens: usize,
    sequences: usize,
}

impl Prefill {
    /// With the offsets of its sequences.
    fn new(stream: &Arc<CudaStream>, lengths: &[i64], seed: u64) -> (Self, DeviceCuSeqlens) {
        let mut random = Random(seed);
        let tokens = lengths.iter().sum::<i64>() as usize;
        let mut rows = |heads: usize| stream.clone_htod(&random.unit::<bf16>(tokens * heads, 128)).unwrap();
        let (q, k, v) = (rows(2), rows(2), rows(4));
        let mut between = |low| stream.clone_htod(&random.between(low, 1.0, tokens * 4)).unwrap();
        let (alpha, beta) = (between(0.9), between(0.1));
        let output = stream.alloc_zeros(tokens * 4 * 128).unwrap();
        let state = stream.alloc_zeros(lengths.len() * 4 * 128 * 128).unwrap();
        let offsets = CuSeqlens::from_lengths(lengths).unwrap().to_device(stream).unwrap();
        (Self { q, k, v, alpha, beta, output, state, tokens, sequences: lengths.len() }, offsets)
    }

    fn tensors<'a>(&'a mut self, stream: &'a CudaStream) -> (GdnTensors<'a>, GdnOptions<'a>) {
        let (t, n) = (self.tokens as i64, self.sequences as i64);
        let read = |buffer, heads| TensorRef::from_cudarc::<bf16>(stream, buffer, &[t, heads, 128]).unwrap();
        let numbers = |buffer| TensorRef::from_cudarc::<f32>(stream, buffer, &[t, 4]).unwrap();
        let options = GdnOptions::default().with_alpha(numbers(&self.alpha)).with_beta(numbers(&self.beta));
        let tensors = GdnTensors {
            output: TensorMut::from_cudarc(stream, &mut self.output, &[t, 4, 128]).unwrap(),
            output_state: TensorMut::from_cudarc(stream, &mut self.state, &[n, 4, 128, 128]).unwrap(),
            q: read(&self.q, 2),
            k: read(&self.k, 2),
            v: read(&self.v, 4),
        };
        (tensors, options)
    }

    fn eager(&mut self, context: &mut GdnPrefillContext, offsets: &DeviceCuSeqlens, stream: &Arc<CudaStream>) {
        let (mut tensors, options) = self.tensors(stream);
        context.prefill(&mut tensors, offsets, &options).unwrap();
    }

    fn poison(&mut self, stream: &Arc<CudaStream>) {
        stream.memcpy_htod(&vec![bf16::POISON; self.output.len()], &mut self.output).unwrap();
        stream.memcpy_htod(&vec![f32::NAN; self.state.len()], &mut self.state).unwrap();
    }

    fn results(&self, stream: &Arc<CudaStream>) -> (Vec<bf16>, Vec<f32>) {
        (stream.clone_dtoh(&self.output).unwrap(), stream.clone_dtoh(&self.state).unwrap())
    }
}

fn prefills(gpu: &Gpu) {
    let stream = &gpu.stream;
    // Sequences without tokens between the others: fills and several launches.
    for lengths in [&[96][..], &[40, 24, 100], &[0, 40, 0, 0, 24, 0]] {
        let (tokens, sequences) = (lengths.iter().sum::<i64>(), lengths.len() as i64);
        let (first, offsets) = Prefill::new(stream, lengths, 1);
        let weight = upload::<bf16>(stream, 9, 128);
        let context = GdnPrefillContext::new(stream).unwrap();
        let normed = stream.alloc_zeros::<bf16>(tokens as usize * 4 * 128).unwrap();
        let mut graph = LaunchGraph::new(
            stream,
            (
                (first.q, first.k, first.v, first.alpha, first.beta),
                (first.output, first.state, normed),
                (weight, offsets, context),
            ),
        )
        .unwrap();
        let capture = graph.capture(|s, ((q, k, v, alpha, beta), (mut output, mut state, mut normed), rest)| {
            let (weight, offsets, mut context): (_, CapturedCuSeqlens<'_>, CapturedPrefill<'_>) = rest;
            let options =
                GdnOptions::default().with_alpha(alpha.read(&[tokens, 4])?).with_beta(beta.read(&[tokens, 4])?);
            let mut tensors = GdnTensors {
                output: output.write(&[tokens, 4, 128])?,
                output_state: state.write(&[sequences, 4, 128, 128])?,
                q: q.read(&[tokens, 2, 128])?,
                k: k.read(&[tokens, 2, 128])?,
                v: v.read(&[tokens, 4, 128])?,
            };
            context.prefill(&mut tensors, &offsets, &options, s)?;
            let shape = [tokens, 4, 128];
            let (output, weight) = (output.read(&shape)?, weight.read(&[128])?);
            // With programmatic dependent launch, behind a kernel and behind a fill.
            rmsnorm(&mut normed.write(&shape)?, &output, &weight, &NormOptions::default(), s)
        });
        capture.unwrap();
        let mut context = GdnPrefillContext::new(stream).unwrap();
        for seed in [11, 12, 13] {
            let (mut expected, offsets) = Prefill::new(stream, lengths, seed);
            {
                let ((mut q, mut k, mut v, mut alpha, mut beta), (mut output, mut state, _), _) =
                    graph.buffers().unwrap();
                stream.memcpy_dtod(&expected.q, &mut q).unwrap();
                stream.memcpy_dtod(&expected.k, &mut k).unwrap();
                stream.memcpy_dtod(&expected.v, &mut v).unwrap();
                stream.memcpy_dtod(&expected.alpha, &mut alpha).unwrap();
                stream.memcpy_dtod(&expected.beta, &mut beta).unwrap();
                expected.poison(stream);
                stream.memcpy_dtod(&expected.output, &mut output).unwrap();
                stream.memcpy_dtod(&expected.state, &mut state).unwrap();
            }
            graph.launch().unwrap();
            expected.eager(&mut context, &offsets, stream);
            let shape = [tokens, 4, 128];
            let mut normed = stream.alloc_zeros::<bf16>(expected.output.len()).unwrap();
            rmsnorm(
                &mut TensorMut::from_cudarc(stream, &mut normed, &shape).unwrap(),
                &TensorRef::from_cudarc(stream, &expected.output, &shape).unwrap(),
                &TensorRef::from_cudarc(stream, &upload::<bf16>(stream, 9, 128), &[128]).unwrap(),
                &NormOptions::default(),
                Stream::cudarc(stream),
            )
            .unwrap();
            let (_, (output, state, found), _) = graph.buffers().unwrap();
            assert!(bits(stream, &output) == bits(stream, &expected.output), "{lengths:?}, seed {seed}: output");
            assert!(
                stream.clone_dtoh(&state).unwrap() == stream.clone_dtoh(&expected.state).unwrap(),
                "{lengths:?}, seed {seed}: state"
            );
            assert!(bits(stream, &found) == bits(stream, &normed), "{lengths:?}, seed {seed}: norm");
        }
    }
}

fn update(gpu: &Gpu) {
    let stream = &gpu.stream;
    let (input, weight) = (matrix(stream, 1), vector(stream, 2));
    let expected = |eps| eager(stream, &input, &weight, &NormOptions::default().with_eps(eps));
    let buffers = (matrix(stream, 1), vector(stream, 2), matrix(stream, 3));
    let mut graph = LaunchGraph::new(stream, buffers).unwrap();
    let capture = |graph: &mut LaunchGraph<_>, eps, times| {
        graph.capture(|s, (input, weight, mut out): (GraphMut<'_, bf16>, GraphMut<'_, bf16>, GraphMut<'_, bf16>)| {
            let options = NormOptions::default().with_eps(eps);
            for _ in 0..times {
                let (input, weight) = (input.read(&SHAPE)?, weight.read(&LENGTH)?);
                gemma_rmsnorm(&mut out.write(&SHAPE)?, &input, &weight, &options, s)?;
            }
            Ok(())
        })
    };
    let check = |graph: &mut LaunchGraph<(CudaSlice<bf16>, CudaSlice<bf16>, CudaSlice<bf16>)>, eps| {
        graph.launch().unwrap();
        assert_eq!(bits(stream, &graph.buffers().unwrap().2), expected(eps), "eps {eps}");
    };
    assert_eq!(capture(&mut graph, 1e-6, 2).unwrap(), Captured::Instantiated);
    check(&mut graph, 1e-6);
    assert_eq!(capture(&mut graph, 0.5, 2).unwrap(), Captured::Updated);
    check(&mut graph, 0.5);
    // Another number of calls is another graph.
    assert_eq!(capture(&mut graph, 0.25, 3).unwrap(), Captured::Instantiated);
    assert_eq!(graph.nodes(), 3);
    check(&mut graph, 0.25);
    // What fails leaves the graph as it was.
    assert!(capture(&mut graph, -1.0, 3).is_err());
    check(&mut graph, 0.25);
}

fn buffers(gpu: &Gpu) {
    let stream = &gpu.stream;
    let weight = Arc::new(vector(stream, 2));
    let list: Vec<_> = (0..40).map(|seed| matrix(stream, seed)).collect();
    let mut graph = LaunchGraph::new(stream, (list, [matrix(stream, 50)], Arc::clone(&weight))).unwrap();
    let capture = graph.capture(|s, (list, [last], weight)| {
        let options = NormOptions::default();
        for (i, buffer) in list.into_iter().enumerate() {
            let (mut first, second) = buffer.split_at(ROWS / 2 * COLUMNS)?;
            let half = [ROWS as i64 / 2, COLUMNS as i64];
            // The second half of each comes from the first of itself; some in other strides.
            let from =
                if i % 2 == 0 { second.read(&half)? } else { last.read_strided(&half, &[2 * COLUMNS as i64, 1])? };
            gemma_rmsnorm(&mut first.write(&half)?, &from, &weight.read(&LENGTH)?, &options, s)?;
        }
        Ok(())
    });
    capture.unwrap();
    let expected = eager(stream, &matrix(stream, 8), &weight, &NormOptions::default());
    graph.launch().unwrap();
    // Memory that was only the graph's stays so while it can be launched: nothing else gets it.
    let others: Vec<_> = (0..50).map(|seed| matrix(stream, 1000 + seed)).collect();
    graph.launch().unwrap();
    for (i, other) in others.iter().enumerate() {
        assert!(bits(stream, other) == bits(stream, &matrix(stream, 1000 + i as u64)), "{i}");
    }
    let half = ROWS / 2 * COLUMNS;
    let (list, _, back) = graph.into_buffers().unwrap();
    assert_eq!(bits(stream, &list[8])[..half], expected[half..]);
    assert!(Arc::ptr_eq(&back, &weight));
}

fn ordered(gpu: &Gpu) {
    // Tracked by cudarc: a copy on another stream waits for the graph, and the next launch for the copy.
    let (stream, other) = (&gpu.stream, gpu.context.new_stream().unwrap());
    let weight = vector(stream, 2);
    let mut graph = LaunchGraph::new(stream, (matrix(stream, 1), weight, matrix(stream, 3))).unwrap();
    let capture = graph.capture(|s, (input, weight, mut out)| {
        let (input, weight) = (input.read(&SHAPE)?, weight.read(&LENGTH)?);
        gemma_rmsnorm(&mut out.write(&SHAPE)?, &input, &weight, &NormOptions::default(), s)
    });
    capture.unwrap();
    for seed in [60, 61, 62] {
        let input = matrix(&other, seed);
        let busy = gpu.occupy(&other);
        other.memcpy_dtod(&input, &mut graph.buffers().unwrap().0).unwrap();
        graph.launch().unwrap();
        let found = bits(&other, &graph.buffers().unwrap().2);
        assert_eq!(found, eager(stream, &matrix(stream, seed), &vector(stream, 2), &NormOptions::default()));
        drop(busy);
    }
    gpu.assert_asynchronous(stream, || graph.launch().unwrap());
}

fn null_stream(gpu: &Gpu) {
    let stream = gpu.context.default_stream();
    // SAFETY: until it is enabled again everything here is on one stream.
    unsafe { gpu.context.disable_event_tracking() };
    let mut graph = LaunchGraph::new(&stream, (matrix(&stream, 1), vector(&stream, 2), matrix(&stream, 3))).unwrap();
    let capture = graph.capture(|s, (input, weight, mut out)| {
        let (input, weight) = (input.read(&SHAPE)?, weight.read(&LENGTH)?);
        gemma_rmsnorm(&mut out.write(&SHAPE)?, &input, &weight, &NormOptions::default(), s)
    });
    capture.unwrap();
    graph.launch().unwrap();
    let found = bits(&stream, &graph.buffers().unwrap().2);
    assert_eq!(found, eager(&stream, &matrix(&stream, 1), &vector(&stream, 2), &NormOptions::default()));
    drop(graph);
    // SAFETY: the buffers that were made meanwhile are gone.
    unsafe { gpu.context.enable_event_tracking() };
}

fn threads(gpu: &Gpu) {
    let results: Vec<_> = std::thread::scope(|scope| {
        let spawn = |seed| {
            scope.spawn(move || {
                let stream = gpu.context.new_stream().unwrap();
                let buffers = (matrix(&stream, seed), vector(&stream, 2), matrix(&stream, 3));
                let mut graph = LaunchGraph::new(&stream, buffers).unwrap();
                // Captures of several threads at once do not see each other.
                let capture = graph.capture(|s, (input, weight, mut out)| {
                    for _ in 0..50 {
                        let (input, weight) = (input.read(&SHAPE)?, weight.read(&LENGTH)?);
                        gemma_rmsnorm(&mut out.write(&SHAPE)?, &input, &weight, &NormOptions::default(), s)?;
                    }
                    Ok(())
                });
                capture.unwrap();
                (seed, stream, graph)
            })
        };
        let running: Vec<_> = (70..78).map(spawn).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (seed, stream, mut graph) in results {
        graph.launch().unwrap();
        let expected = eager(&stream, &matrix(&stream, seed), &vector(&stream, 2), &NormOptions::default());
        assert_eq!(bits(&stream, &graph.buffers().unwrap().2), expected);
    }
}

fn uncapturable(gpu: &Gpu) {
    let stream = &gpu.stream;
    let (input, weight) = (matrix(stream, 1), vector(stream, 2));
    let options = NormOptions::default();
    let expected = eager(stream, &input, &weight, &options);
    let buffers = (matrix(stream, 1), vector(stream, 2), matrix(stream, 3));
    let mut graph = LaunchGraph::new(stream, buffers).unwrap();
    let usable = |what: &str| assert_eq!(eager(stream, &input, &weight, &options), expected, "after {what}");

    // Memory that the graph could not keep.
    let error = graph.capture(|s, (_, weight, mut out)| {
        let input = TensorRef::from_cudarc(stream, &input, &SHAPE)?;
        gemma_rmsnorm(&mut out.write(&SHAPE)?, &input, &weight.read(&LENGTH)?, &options, s)
    });
    let error = error.unwrap_err();
    assert!(matches!(error, FlashInferError::InvalidArgument { argument: "input", .. }), "{error}");
    usable("a foreign tensor");

    // The host's.
    let (zeros, mut result) = ([bf16::ZERO; COLUMNS], [bf16::ZERO; COLUMNS]);
    let error = graph.capture(|s, _| {
        let shape = [1, COLUMNS as i64];
        let (input, weight) = (TensorRef::from_slice(&zeros, &shape)?, TensorRef::from_slice(&zeros, &LENGTH)?);
        gemma_rmsnorm(&mut TensorMut::from_slice(&mut result, &shape)?, &input, &weight, &options, s)
    });
    let error = error.unwrap_err();
    assert!(error.to_string().contains("on cpu, expected memory of the GPU"), "{error}");
    usable("a tensor of the host");

    // Waiting for a device that has a capture under way.
    let error = graph.capture(|s, (input, weight, mut out)| {
        let (input, weight) = (input.read(&SHAPE)?, weight.read(&LENGTH)?);
        gemma_rmsnorm(&mut out.write(&SHAPE)?, &input, &weight, &options, s)?;
        let refused = gpu.context.synchronize();
        assert!(refused.is_err(), "CUDA refuses to wait");
        Ok(())
    });
    let error = error.unwrap_err();
    assert!(matches!(error, FlashInferError::Graph { .. }), "{error}");
    assert!(error.to_string().contains("wait, allocate, and use the null stream before or after"), "{error}");
    usable("waiting");

    // The calls' own error, and a panic.
    let error = graph.capture(|_, _| Err(FlashInferError::NotInitialized)).unwrap_err();
    assert!(matches!(error, FlashInferError::NotInitialized), "{error}");
    usable("an error");
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        graph.capture(|s, (input, weight, mut out)| {
            let (input, weight) = (input.read(&SHAPE)?, weight.read(&LENGTH)?);
            gemma_rmsnorm(&mut out.write(&SHAPE)?, &input, &weight, &options, s)?;
            panic!("on purpose");
        })
    }));
    assert!(panicked.is_err());
    usable("a panic");

    // Memory of another GPU, where there is one.
    if FlashInferRuntime::global().unwrap().device_count().unwrap() > 1 {
        let other = cudarc::driver::CudaContext::new(1).unwrap().new_stream().unwrap();
        let error = LaunchGraph::new(stream, (matrix(stream, 1), vec![matrix(&other, 1)])).unwrap_err();
        assert!(error.to_string().contains("of the context of cuda:1"), "{error}");
    }

    // A middle past the end, and a shape that does not fit.
    let error = graph.capture(|_, (input, ..)| input.split_at(ROWS * COLUMNS + 1).map(drop)).unwrap_err();
    assert!(error.to_string().contains("at most the buffer's length"), "{error}");
    let error = graph.capture(|_, (input, ..)| input.read(&[ROWS as i64 + 1, COLUMNS as i64]).map(drop)).unwrap_err();
    assert!(error.to_string().contains("enough for shape"), "{error}");

    // After all of that the same graph can be captured and launched.
    let capture = graph.capture(|s, (input, weight, mut out)| {
        let (input, weight) = (input.read(&SHAPE)?, weight.read(&LENGTH)?);
        gemma_rmsnorm(&mut out.write(&SHAPE)?, &input, &weight, &options, s)
    });
    capture.unwrap();
    graph.launch().unwrap();
    assert_eq!(bits(stream, &graph.buffers().unwrap().2), expected);
}

fn uncaptured(gpu: &Gpu) {
    let mut graph = LaunchGraph::new(&gpu.stream, (matrix(&gpu.stream, 1),)).unwrap();
    let error = graph.launch().unwrap_err();
    assert!(matches!(error, FlashInferError::Graph { .. }), "{error}");
    assert!(error.to_string().contains("call LaunchGraph::capture first"), "{error}");
    // A graph of nothing is one.
    graph.capture(|_, _| Ok(())).unwrap();
    assert_eq!(graph.nodes(), 0);
    graph.launch().unwrap();
    gpu.stream.synchronize().unwrap();
}

/// The graph would keep addresses, not buffers; and cudarc's waits for other streams would break the capture.
fn cudarc_capture(gpu: &Gpu) {
    let stream = &gpu.stream;
    let (input, weight, mut out) = (matrix(stream, 1), vector(stream, 2), matrix(stream, 3));
    let (options, s) = (NormOptions::default(), Stream::cudarc(stream));
    let expected = eager(stream, &input, &weight, &options);
    let before = bits(stream, &out);
    let (mut prefill, offsets) = Prefill::new(stream, &[40, 24], 5);
    let mut context = GdnPrefillContext::new(stream).unwrap();
    let mut graph = LaunchGraph::new(stream, (matrix(stream, 1), vector(stream, 2), matrix(stream, 3))).unwrap();
    {
        let mut write = TensorMut::from_cudarc(stream, &mut out, &SHAPE).unwrap();
        let read = TensorRef::from_cudarc(stream, &input, &SHAPE).unwrap();
        let short = TensorRef::from_cudarc(stream, &weight, &LENGTH).unwrap();
        let prepared = Prepared::<GemmaRmsnorm>::new(&write, &read, &short, &options).unwrap();
        let (mut tensors, gdn_options) = prefill.tensors(stream);
        stream.synchronize().unwrap();

        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
        let refused = [
            ("a call", gemma_rmsnorm(&mut write, &read, &short, &options, s)),
            ("a prepared call", prepared.launch(&mut write, &read, &short, s)),
            ("a prefill", context.prefill(&mut tensors, &offsets, &gdn_options)),
            ("a tensor", TensorRef::from_cudarc(stream, &input, &SHAPE).map(drop)),
        ];
        let captured = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("the capture is valid");
        for (what, result) in refused {
            let error = result.expect_err(what);
            assert!(matches!(error, FlashInferError::InvalidArgument { argument: "stream", .. }), "{what}: {error}");
            assert!(!error.is_fatal());
        }
        captured.launch().unwrap();
        stream.synchronize().unwrap();
    }
    assert_eq!(bits(stream, &out), before, "nothing of it was captured");
    // The stream is as before, for calls and for graphs of this crate's.
    assert_eq!(eager(stream, &input, &weight, &options), expected);
    let capture = graph.capture(|s, (input, weight, mut out)| {
        let (input, weight) = (input.read(&SHAPE)?, weight.read(&LENGTH)?);
        gemma_rmsnorm(&mut out.write(&SHAPE)?, &input, &weight, &options, s)
    });
    capture.unwrap();
    graph.launch().unwrap();
    assert_eq!(bits(stream, &graph.buffers().unwrap().2), expected);
}

flashinfer_rs::graph_buffers! {
    /// What a user's own step needs.
    struct Step / StepCaptured / StepViews {
        input: CudaSlice<bf16>,
        normed: CudaSlice<bf16>,
        copied: CudaSlice<bf16>,
        out: CudaSlice<bf16>,
        weights: Vec<Arc<CudaSlice<bf16>>>,
    }
}

fn own_struct(gpu: &Gpu) {
    let stream = &gpu.stream;
    let options = NormOptions::default();
    let weights: Vec<_> = [2, 3].map(|seed| Arc::new(vector(stream, seed))).into();
    let step = Step {
        input: matrix(stream, 1),
        normed: matrix(stream, 10),
        copied: matrix(stream, 11),
        out: matrix(stream, 12),
        weights: weights.clone(),
    };
    let mut graph = LaunchGraph::new(stream, step).unwrap();
    let capture = graph.capture(|s, on| {
        let StepCaptured { input, mut normed, mut copied, mut out, weights } = on;
        let (first, second) = (weights[0].read(&LENGTH)?, weights[1].read(&LENGTH)?);
        gemma_rmsnorm(&mut normed.write(&SHAPE)?, &input.read(&SHAPE)?, &first, &options, s)?;
        let (from, to) = (normed.as_mut_ptr() as u64, copied.as_mut_ptr() as u64);
        // SAFETY: both are the graph's buffers, of as many bytes, which it keeps; the copy is captured between the two norms.
        unsafe { result::memcpy_dtod_async(to, from, ROWS * COLUMNS * 2, s.as_raw().cast()) }.unwrap();
        gemma_rmsnorm(&mut out.write(&SHAPE)?, &copied.read(&SHAPE)?, &second, &options, s)
    });
    assert_eq!(capture.unwrap(), Captured::Instantiated);
    assert_eq!(graph.nodes(), 3);
    for seed in [20, 21, 22] {
        let input = matrix(stream, seed);
        stream.memcpy_dtod(&input, &mut graph.buffers().unwrap().input).unwrap();
        graph.launch().unwrap();
        let once = eager(stream, &input, &weights[0], &options);
        let normed: Vec<_> = once.iter().map(|&bits| bf16::from_bits(bits)).collect();
        let twice = eager(stream, &stream.clone_htod(&normed).unwrap(), &weights[1], &options);
        let StepViews { input: kept, normed, copied, out, weights } = graph.buffers().unwrap();
        assert_eq!(bits(stream, &kept), bits(stream, &input));
        assert_eq!((bits(stream, &normed), bits(stream, &copied)), (once.clone(), once), "seed {seed}");
        assert_eq!(bits(stream, &out), twice, "seed {seed}");
        assert_eq!(weights.len(), 2);
    }
    let step = graph.into_buffers().unwrap();
    assert!(step.weights.iter().zip(&weights).all(|(a, b)| Arc::ptr_eq(a, b)));
    assert_eq!(step.out.len(), ROWS * COLUMNS);
}

fn replaced_sequences(gpu: &Gpu) {
    let (stream, other) = (&gpu.stream, gpu.context.new_stream().unwrap());
    let (tokens, sequences) = (100, 3);
    let (first, offsets) = Prefill::new(stream, &[40, 24, 36], 1);
    let context = GdnPrefillContext::new(stream).unwrap();
    let inputs = (first.q, first.k, first.v, first.alpha, first.beta);
    let buffers = (inputs, (first.output, first.state), (offsets, context));
    let mut graph = LaunchGraph::new(stream, buffers).unwrap();
    let capture = graph.capture(|s, ((q, k, v, alpha, beta), (mut output, mut state), rest)| {
        let (offsets, mut context): (CapturedCuSeqlens<'_>, CapturedPrefill<'_>) = rest;
        let options = GdnOptions::default().with_alpha(alpha.read(&[tokens, 4])?).with_beta(beta.read(&[tokens, 4])?);
        let mut tensors = GdnTensors {
            output: output.write(&[tokens, 4, 128])?,
            output_state: state.write(&[sequences, 4, 128, 128])?,
            q: q.read(&[tokens, 2, 128])?,
            k: k.read(&[tokens, 2, 128])?,
            v: v.read(&[tokens, 4, 128])?,
        };
        context.prefill(&mut tensors, &offsets, &options, s)
    });
    capture.unwrap();
    let mut context = GdnPrefillContext::new(stream).unwrap();
    // What is given, and what it is filled up to.
    let cases: [(&[i64], [i64; 3]); 6] = [
        (&[40, 24, 36], [40, 24, 36]),
        (&[10, 60, 30], [10, 60, 30]),
        (&[30, 50], [30, 50, 20]),
        (&[7], [7, 1, 92]),
        (&[1, 1, 98], [1, 1, 98]),
        (&[98, 1], [98, 1, 1]),
    ];
    for (i, (given, filled)) in cases.into_iter().enumerate() {
        // The inputs are the same whatever the sequences are.
        let (mut direct, direct_offsets) = Prefill::new(stream, &filled, 1);
        direct.poison(stream);
        {
            let (_, (mut output, mut state), (mut offsets, ())) = graph.buffers().unwrap();
            stream.memcpy_dtod(&direct.output, &mut output).unwrap();
            stream.memcpy_dtod(&direct.state, &mut state).unwrap();
            // From another stream, the launch waits for the copy.
            let on = if i % 2 == 0 { stream } else { &other };
            offsets.replace(&CuSeqlens::from_lengths(given).unwrap(), on).unwrap();
            assert_eq!(offsets.host(), &CuSeqlens::from_lengths(&filled).unwrap());
        }
        graph.launch().unwrap();
        direct.eager(&mut context, &direct_offsets, stream);
        let expected = direct.results(stream);
        let (_, (output, state), _) = graph.buffers().unwrap();
        let found = (stream.clone_dtoh(&output).unwrap(), stream.clone_dtoh(&state).unwrap());
        assert!(found == expected, "{given:?}, beside a direct call of {filled:?}");

        // And beside a call of what was given alone.
        direct.poison(stream);
        let (part, count) = (given.iter().sum::<i64>(), given.len() as i64);
        {
            let alone = CuSeqlens::from_lengths(given).unwrap().to_device(stream).unwrap();
            let (mut tensors, options) = direct.tensors(stream);
            let options = GdnOptions::default()
                .with_alpha(options.alpha.as_ref().unwrap().narrow(0, 0, part).unwrap())
                .with_beta(options.beta.as_ref().unwrap().narrow(0, 0, part).unwrap());
            let mut tensors = GdnTensors {
                output: tensors.output.narrow(0, 0, part).unwrap(),
                output_state: tensors.output_state.narrow(0, 0, count).unwrap(),
                q: tensors.q.narrow(0, 0, part).unwrap(),
                k: tensors.k.narrow(0, 0, part).unwrap(),
                v: tensors.v.narrow(0, 0, part).unwrap(),
            };
            context.prefill(&mut tensors, &alone, &options).unwrap();
        }
        let alone = direct.results(stream);
        let (outputs, states) = (part as usize * 4 * 128, count as usize * 4 * 128 * 128);
        assert!(found.0[..outputs] == alone.0[..outputs], "{given:?}: output, alone");
        assert!(found.1[..states] == alone.1[..states], "{given:?}: states, alone");
    }
    // What does not fit is refused, and the sequences stay as they were.
    let (_, _, (mut offsets, ())) = graph.buffers().unwrap();
    for lengths in [&[25; 4][..], &[50, 0, 50], &[60, 60], &[40, 24, 37], &[40, 24, 35], &[99, 1]] {
        let error = offsets.replace(&CuSeqlens::from_lengths(lengths).unwrap(), stream).unwrap_err();
        assert!(matches!(error, FlashInferError::InvalidArgument { argument: "cu_seqlens", .. }), "{error}");
        assert_eq!(offsets.host(), &CuSeqlens::from_lengths(&[98, 1, 1]).unwrap());
    }
}
