//! Decode by XQA on a GPU, against the reference in f64. `FLASHINFER_RS_RUN_GPU_TESTS=1 cargo test --release --features
//! cudarc,attention-xqa --test xqa_gpu` runs it, within 60 seconds. A test is for one module, whose name is part of its own; where
//! that was not vendored, it is reported as ignored.

#[path = "support/data.rs"]
mod data;
#[path = "support/gpu.rs"]
mod gpu;

use std::process::ExitCode;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream};
use data::{Number, Random, assert_close, widened};
use flashinfer_rs::attention::{
    AttentionBuilder, AttentionOptions, AttentionSpec, Batch, DecodeTable, GraphXqa, XqaDecode,
};
use flashinfer_rs::kernels::page::{KvLayout, PagedKvCache};
use flashinfer_rs::{
    DType, Device, FlashInferError, FlashInferRuntime, LaunchGraph, OnDevice, Placed, RuntimeConfig, TensorMut,
    TensorRef,
};
use gpu::Gpu;
use half::{bf16, f16};
use libtest_mimic::{Arguments, Trial};

type Case = (&'static str, AttentionBuilder, fn(&Gpu, AttentionBuilder));

fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    for (dtype, test) in [(DType::BF16, decodes::<bf16> as fn(&Gpu, AttentionBuilder)), (DType::F16, decodes::<f16>)] {
        for (heads, size, page_size) in [
            ((2, 2), 128, 16),
            ((8, 4), 128, 16),
            ((8, 2), 128, 16),
            ((16, 2), 128, 16),
            ((8, 2), 64, 16),
            ((16, 2), 256, 16),
            ((8, 2), 128, 64),
        ] {
            let facts = AttentionSpec::decode(dtype, heads, size, page_size);
            cases.push(("random_batches_are_the_references", facts, test));
            cases.push(("windows_are_the_references", facts.window(100), test));
        }
    }
    let facts = AttentionSpec::decode(DType::BF16, (8, 2), 128, 16);
    cases.push(("layouts_answer_the_same_bits", facts, layouts));
    cases.push(("one_graph_serves_every_length", facts, one_graph));
    cases.push(("two_streams_have_scratch_memory_each", facts, two_streams));
    cases.push(("calls_do_not_wait", facts, asynchronous));
    cases.push(("what_is_not_the_tables_is_refused", facts, refused));
    cases.push(("a_second_gpu_answers_the_same_bits", facts, second_gpu));
    cases
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let asked = std::env::var_os(gpu::RUN).is_some_and(|value| value == "1");
    let trials = cases().into_iter().map(|(name, facts, test)| {
        let module = XqaDecode::module_of(&facts.build().expect("a specification")).expect("one that XQA has");
        let there = asked && is_there(&module, name);
        let body = move || {
            test(&Gpu::open(), facts);
            Ok(())
        };
        Trial::test(format!("{name}: {module}"), body).with_ignored_flag(!there)
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

/// Whether the module was vendored, and whether there are as many GPUs as the test needs.
fn is_there(module: &str, test: &str) -> bool {
    let runtime = FlashInferRuntime::initialize(RuntimeConfig::default()).expect("the runtime");
    let loaded = runtime.module_on(&format!("{module}.so"), Device::Cuda(0));
    let there = !matches!(loaded, Err(FlashInferError::ArtifactMissing { .. }));
    there && !(test.starts_with("a_second_gpu") && runtime.device_count().is_ok_and(|count| count < 2))
}

fn below(random: &mut Random, end: i64) -> i64 {
    ((random.uniform() * end as f64) as i64).min(end - 1)
}

fn tolerance(dtype: DType) -> f64 {
    if dtype == DType::BF16 { 1e-2 } else { 1.5e-3 }
}

/// Queries, and a cache on the host of which scattered pages hold the keys; pages may be in several requests.
struct Input<T> {
    batch: Batch,
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
}

const PAGES: i64 = 300;

fn batch(random: &mut Random, page_size: i64, lengths: &[i64]) -> Batch {
    let mut batch = Batch::paged(page_size, PAGES).unwrap();
    for &keys in lengths {
        let count = (keys + page_size - 1) / page_size;
        let pages: Vec<i32> = (0..count).map(|_| below(random, PAGES) as i32).collect();
        batch.push(1, &pages, keys).unwrap();
    }
    batch
}

fn input<T: Number>(seed: u64, spec: &AttentionSpec, lengths: &[i64]) -> Input<T> {
    let mut random = Random(seed);
    let batch = batch(&mut random, spec.page_size(), lengths);
    let ((q_heads, kv_heads), size) = (spec.heads(), spec.head_dims().0);
    let q = random.normal((lengths.len() as i64 * q_heads * size) as usize);
    let count = (PAGES * spec.page_size() * kv_heads * size) as usize;
    let (k, v) = (random.normal(count), random.normal(count));
    Input { batch, q, k, v }
}

fn shape(spec: &AttentionSpec) -> [i64; 4] {
    let (kv_heads, size, page_size) = (spec.heads().1, spec.head_dims().0, spec.page_size());
    match spec.layout() {
        KvLayout::Nhd => [PAGES, page_size, kv_heads, size],
        KvLayout::Hnd => [PAGES, kv_heads, page_size, size],
    }
}

fn on_host<T: Number>(spec: AttentionSpec, input: &Input<T>) -> Vec<f32> {
    let rows = [input.batch.rows(), spec.heads().0, spec.head_dims().0];
    let mut o = vec![T::default(); input.q.len()];
    let (mut k, mut v) = (input.k.clone(), input.v.clone());
    let cache = PagedKvCache::new(
        TensorMut::from_slice(&mut k, &shape(&spec)).unwrap(),
        TensorMut::from_slice(&mut v, &shape(&spec)).unwrap(),
        spec.layout(),
    )
    .unwrap();
    let table = DecodeTable::new(&input.batch, longest(&input.batch)).unwrap();
    XqaDecode::on_host(spec)
        .unwrap()
        .run(
            &mut TensorMut::from_slice(&mut o, &rows).unwrap(),
            &TensorRef::from_slice(&input.q, &rows).unwrap(),
            &cache,
            &Placed::on_host(&table).unwrap(),
            &AttentionOptions::default(),
        )
        .unwrap();
    widened(&o)
}

/// Pages that every request of a test's batches has room for.
fn longest(batch: &Batch) -> usize {
    batch.page_count().max(1)
}

/// An input on the GPU, with its table.
struct OnGpu<T> {
    q: CudaSlice<T>,
    k: CudaSlice<T>,
    v: CudaSlice<T>,
    o: CudaSlice<T>,
    table: OnDevice<DecodeTable>,
}

impl<T: Number> OnGpu<T> {
    fn new(stream: &Arc<CudaStream>, input: &Input<T>, per_request: usize) -> Self {
        let up = |values: &[T]| stream.clone_htod(values).unwrap();
        let table = DecodeTable::new(&input.batch, per_request).unwrap();
        Self {
            q: up(&input.q),
            k: up(&input.k),
            v: up(&input.v),
            o: up(&vec![T::POISON; input.q.len()]),
            table: OnDevice::new(table, stream).unwrap(),
        }
    }

    fn run(&mut self, stream: &Arc<CudaStream>, decode: &XqaDecode) {
        let spec = *decode.spec();
        let rows = [self.table.host().requests() as i64, spec.heads().0, spec.head_dims().0];
        let cache = PagedKvCache::new(
            TensorMut::from_cudarc(stream, &mut self.k, &shape(&spec)).unwrap(),
            TensorMut::from_cudarc(stream, &mut self.v, &shape(&spec)).unwrap(),
            spec.layout(),
        )
        .unwrap();
        decode
            .run(
                &mut TensorMut::from_cudarc(stream, &mut self.o, &rows).unwrap(),
                &TensorRef::from_cudarc(stream, &self.q, &rows).unwrap(),
                &cache,
                &self.table.placed(stream).unwrap(),
                &AttentionOptions::default(),
            )
            .unwrap();
    }
}

fn on_gpu<T: Number>(stream: &Arc<CudaStream>, decode: &XqaDecode, input: &Input<T>, per_request: usize) -> Vec<f32> {
    let mut on = OnGpu::new(stream, input, per_request);
    on.run(stream, decode);
    widened(&stream.clone_dtoh(&on.o).unwrap())
}

/// One key, pages that are full and one more or less, tiles of 256 keys likewise, and one long context among short ones.
const LENGTHS: [&[i64]; 5] =
    [&[1], &[1, 15, 16, 17, 31, 32, 33], &[255, 256, 257, 63, 64, 65, 127, 128, 129], &[3000, 1, 40], &[4000]];

fn decodes<T: Number>(gpu: &Gpu, facts: AttentionBuilder) {
    let (spec, stream) = (facts.build().unwrap(), &gpu.stream);
    // One for all of them: counters that a launch left other than zero would show in the next.
    let decode = XqaDecode::new(spec, stream).unwrap();
    let mut random = Random(77);
    let drawn: Vec<Vec<i64>> = (0..6)
        .map(|_| {
            let longest = [20, 600, 2000][below(&mut random, 3) as usize];
            (0..1 + below(&mut random, 16)).map(|_| 1 + below(&mut random, longest)).collect()
        })
        .collect();
    let all = LENGTHS.iter().map(|lengths| lengths.to_vec()).chain(drawn);
    for (seed, lengths) in all.enumerate() {
        let input = input::<T>(seed as u64, &spec, &lengths);
        let expected = on_host(spec, &input);
        // Rows that just hold the longest request, and far longer ones, which divide contexts among more parts than have keys.
        let just = lengths.iter().map(|keys| (*keys as usize).div_ceil(spec.page_size() as usize)).max().unwrap();
        for per_request in [just, just + 500] {
            let found = on_gpu(stream, &decode, &input, per_request);
            let what = format!("{spec:?} of {lengths:?} in rows of {per_request}");
            assert_close(&what, &found, &expected, tolerance(T::DTYPE));
            // However the launch ends, it answers the same bits again.
            assert!(on_gpu(stream, &decode, &input, per_request) == found, "{what}, a second time");
        }
    }
}

fn layouts(gpu: &Gpu, facts: AttentionBuilder) {
    let stream = &gpu.stream;
    let spec = facts.build().unwrap();
    let nhd = input::<bf16>(4, &spec, &[700, 3, 64]);
    let [_, tokens, heads, size] = shape(&spec).map(|count| count as usize);
    let turned = |values: &[bf16]| {
        let mut turned = vec![bf16::ZERO; values.len()];
        for (row, numbers) in values.chunks_exact(size).enumerate() {
            let (page, token, head) = (row / (tokens * heads), row / heads % tokens, row % heads);
            let to = ((page * heads + head) * tokens + token) * size;
            turned[to..to + size].copy_from_slice(numbers);
        }
        turned
    };
    let hnd = Input { batch: nhd.batch.clone(), q: nhd.q.clone(), k: turned(&nhd.k), v: turned(&nhd.v) };
    let of_heads = facts.layout(KvLayout::Hnd).build().unwrap();
    let found = on_gpu(stream, &XqaDecode::new(spec, stream).unwrap(), &nhd, 64);
    assert!(on_gpu(stream, &XqaDecode::new(of_heads, stream).unwrap(), &hnd, 64) == found);
}

/// A graph that was captured once, for four requests, answers the bits of plain calls with the same table while the contexts
/// grow, requests come and go, and pages change; twice in each launch, as two layers would.
fn one_graph(gpu: &Gpu, facts: AttentionBuilder) {
    const ROOM: usize = 4;
    const PER_REQUEST: usize = 128;
    let (spec, stream) = (facts.build().unwrap(), &gpu.stream);
    let mut random = Random(31);
    let first = input::<bf16>(8, &spec, &[1; ROOM]);
    let up = |values: &[bf16]| stream.clone_htod(values).unwrap();
    let table = |batch: &Batch| DecodeTable::new(batch, PER_REQUEST).unwrap();
    let out = || up(&vec![bf16::POISON; first.q.len()]);
    let buffers = (
        GraphXqa::new(spec, stream).unwrap(),
        OnDevice::new(table(&first.batch), stream).unwrap(),
        (up(&first.q), out(), out()),
        (up(&first.k), up(&first.v)),
    );
    let mut graph = LaunchGraph::new(stream, buffers).unwrap();
    graph
        .capture(|s, (xqa, table, (q, mut o, mut again), (mut k, mut v))| {
            let cache = PagedKvCache::new(k.write(&shape(&spec))?, v.write(&shape(&spec))?, spec.layout())?;
            let rows = [ROOM as i64, 8, 128];
            let (q, table, options) = (q.read(&rows)?, table.placed()?, AttentionOptions::default());
            xqa.run(&mut o.write(&rows)?, &q, &cache, &table, &options, s)?;
            xqa.run(&mut again.write(&rows)?, &q, &cache, &table, &options, s)
        })
        .unwrap();
    let decode = XqaDecode::new(spec, stream).unwrap();
    let lengths = [&[1, 1, 1, 1][..], &[15, 16, 17, 1], &[300, 2], &[2048, 1, 5, 700], &[255, 256, 257], &[1], &[2047]];
    for (step, lengths) in lengths.into_iter().enumerate() {
        for more in 0..3 {
            let lengths: Vec<i64> = lengths.iter().map(|keys| (keys + more).min(2048)).collect();
            let batch = batch(&mut random, 16, &lengths);
            // Without a wait between the launch before and the copy.
            graph.buffers().unwrap().1.replace(&table(&batch), stream).unwrap();
            graph.launch().unwrap();
            graph.launch().unwrap();
            let used = lengths.len() * 8 * 128;
            let (o, again) = {
                let views = graph.buffers().unwrap();
                let (_, o, again) = &views.2;
                (stream.clone_dtoh(&o.slice(..used)).unwrap(), stream.clone_dtoh(&again.slice(..used)).unwrap())
            };
            assert!(o == again, "step {step}, {lengths:?}: the two calls of one launch");
            // The same number of requests, since contexts are divided by it.
            let mut plain = OnGpu::new(stream, &first, PER_REQUEST);
            plain.table = OnDevice::new(table(&batch).with_room_for(ROOM).unwrap(), stream).unwrap();
            plain.run(stream, &decode);
            let eager = stream.clone_dtoh(&plain.o.slice(..used)).unwrap();
            assert!(o == eager, "step {step}, {lengths:?}");
            let input = Input { batch, q: first.q[..used].to_vec(), k: first.k.clone(), v: first.v.clone() };
            assert_close(&format!("step {step}"), &widened(&o), &on_host(spec, &input), tolerance(DType::BF16));
        }
    }
}

fn two_streams(gpu: &Gpu, facts: AttentionBuilder) {
    let spec = facts.build().unwrap();
    let inputs = [input::<bf16>(1, &spec, &[2500, 7]), input::<bf16>(2, &spec, &[1900, 33])];
    let streams = [gpu.context.new_stream().unwrap(), gpu.context.new_stream().unwrap()];
    let decodes = streams.each_ref().map(|stream| XqaDecode::new(spec, stream).unwrap());
    let expected = [0, 1].map(|i| on_gpu(&streams[i], &decodes[i], &inputs[i], 200));
    let mut on = [0, 1].map(|i| OnGpu::new(&streams[i], &inputs[i], 200));
    for _ in 0..300 {
        for i in 0..2 {
            on[i].run(&streams[i], &decodes[i]);
        }
    }
    for i in 0..2 {
        assert!(widened(&streams[i].clone_dtoh(&on[i].o).unwrap()) == expected[i], "stream {i}");
        assert_close("two streams", &expected[i], &on_host(spec, &inputs[i]), tolerance(DType::BF16));
    }
}

fn asynchronous(gpu: &Gpu, facts: AttentionBuilder) {
    let (spec, stream) = (facts.build().unwrap(), &gpu.stream);
    let input = input::<bf16>(1, &spec, &[500, 7]);
    let decode = XqaDecode::new(spec, stream).unwrap();
    let mut on = OnGpu::new(stream, &input, 200);
    on.run(stream, &decode);
    gpu.assert_asynchronous(stream, || (0..3).for_each(|_| on.run(stream, &decode)));
}

fn refused(gpu: &Gpu, facts: AttentionBuilder) {
    let (spec, stream) = (facts.build().unwrap(), &gpu.stream);
    let other = gpu.context.new_stream().unwrap();
    let input = input::<bf16>(1, &spec, &[500, 7]);
    let decode = XqaDecode::new(spec, stream).unwrap();
    let OnGpu { q, mut k, mut v, mut o, table } = OnGpu::new(stream, &input, 40);
    let there = OnDevice::new(table.host().clone(), &other).unwrap();
    let mut named = |q: &TensorRef<'_>, table: &Placed<'_, DecodeTable>, shape: [i64; 4]| {
        let cache = PagedKvCache::new(
            TensorMut::from_cudarc(stream, &mut k, &shape).unwrap(),
            TensorMut::from_cudarc(stream, &mut v, &shape).unwrap(),
            spec.layout(),
        )
        .unwrap();
        let mut o = TensorMut::from_cudarc(stream, &mut o, &[2, 8, 128]).unwrap();
        match decode.run(&mut o, q, &cache, table, &AttentionOptions::default()) {
            Err(FlashInferError::InvalidArgument { argument, .. }) => argument,
            other => panic!("{other:?}"),
        }
    };
    let good = TensorRef::from_cudarc(stream, &q, &[2, 8, 128]).unwrap();
    let placed = table.placed(stream).unwrap();
    assert_eq!(named(&good, &placed, [PAGES - 1, 16, 2, 128]), "pages");
    assert_eq!(named(&good, &placed, [PAGES, 8, 2, 128]), "page_size");
    assert_eq!(named(&good, &placed, [PAGES, 16, 1, 128]), "kv_heads");
    let elsewhere = other.alloc_zeros::<bf16>(2 * 8 * 128).unwrap();
    assert_eq!(named(&TensorRef::from_cudarc(&other, &elsewhere, &[2, 8, 128]).unwrap(), &placed, shape(&spec)), "q");
    // A table for calls on another stream, and one on the host.
    assert_eq!(named(&good, &there.placed(&other).unwrap(), shape(&spec)), "page_table");
    assert_eq!(named(&good, &Placed::on_host(table.host()).unwrap(), shape(&spec)), "page_table");
}

fn second_gpu(gpu: &Gpu, facts: AttentionBuilder) {
    let spec = facts.build().unwrap();
    let other = CudaContext::new(1).unwrap().new_stream().unwrap();
    let input = input::<bf16>(3, &spec, &[2500, 7, 64]);
    let first = on_gpu(&gpu.stream, &XqaDecode::new(spec, &gpu.stream).unwrap(), &input, 200);
    let decode = XqaDecode::new(spec, &other).unwrap();
    for _ in 0..2 {
        assert!(on_gpu(&other, &decode, &input, 200) == first);
    }
    // What is the one GPU's is none for the other.
    let mut here = OnGpu::new(&gpu.stream, &input, 200);
    let mut o = TensorMut::from_cudarc(&gpu.stream, &mut here.o, &[3, 8, 128]).unwrap();
    let cache = PagedKvCache::new(
        TensorMut::from_cudarc(&gpu.stream, &mut here.k, &shape(&spec)).unwrap(),
        TensorMut::from_cudarc(&gpu.stream, &mut here.v, &shape(&spec)).unwrap(),
        spec.layout(),
    )
    .unwrap();
    let q = TensorRef::from_cudarc(&gpu.stream, &here.q, &[3, 8, 128]).unwrap();
    let placed = here.table.placed(&gpu.stream).unwrap();
    decode.run(&mut o, &q, &cache, &placed, &AttentionOptions::default()).unwrap_err();
}
