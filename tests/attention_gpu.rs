//! Attention on a GPU, against the reference in f64. `FLASHINFER_RS_RUN_GPU_TESTS=1 cargo test --release --features
//! cudarc,attention,attention-mla,attention-sinks,attention-fp8-kv,bench --test attention_gpu` runs it, within 60 seconds. A test is for
//! one module, whose name is part of its own; where that was not vendored, it is reported as ignored. So is the one beside torch where
//! `python3` has no torch.

#[path = "support/data.rs"]
mod data;
#[path = "support/gpu.rs"]
mod gpu;
#[cfg(feature = "bench")]
#[path = "support/torch.rs"]
mod torch;

use std::process::ExitCode;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, CudaViewMut};
use data::{Number, Random, assert_close, widened};
use flashinfer_rs::attention::{
    AttentionBuilder, AttentionOptions, AttentionSpec, Backend, Batch, GraphPlan, GraphPlanMut, GraphRoom, Kind,
    Largest, LatentQueries, Workspace,
};
use flashinfer_rs::kernels::cascade::merge_state;
use flashinfer_rs::kernels::page::{KvLayout, PagedKvCache, PagedMlaCache};
use flashinfer_rs::{
    DType, Device, FlashInferError, FlashInferRuntime, GraphBuffers, LaunchGraph, RuntimeConfig, Stream, TensorMut,
    TensorRef,
};
use gpu::Gpu;
use half::{bf16, f16};
use libtest_mimic::{Arguments, Trial};

/// The types, heads' sizes and so on of a test's specification, and the test.
#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    facts: AttentionBuilder,
    backend: Backend,
    test: fn(&Gpu, AttentionBuilder),
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |name, facts, backend, test| cases.push(Case { name, facts, backend, test });
    for (dtype, of_type) in [(DType::BF16, 0), (DType::F16, 1)] {
        let by_type = |tests: [fn(&Gpu, AttentionBuilder); 2]| tests[of_type];
        for size in [64, 128, 256] {
            let paged = AttentionSpec::paged(dtype, (8, 2), size, 16).causal(true);
            let ragged = AttentionSpec::ragged(dtype, (8, 2), (size, size)).causal(true);
            let decode = AttentionSpec::decode(dtype, (8, 2), size, 16);
            for backend in [Backend::Fa2, Backend::Fa3] {
                add("prefill_over_pages", paged, backend, by_type([prefill::<bf16>, prefill::<f16>]));
                add(
                    "prefill_one_after_the_other",
                    ragged,
                    backend,
                    by_type([ragged_prefill::<bf16>, ragged_prefill::<f16>]),
                );
            }
            add("decode_by_tensor_cores", decode, Backend::Fa2, by_type([decoding::<bf16>, decoding::<f16>]));
            add("decode_by_cuda_cores", decode, Backend::CudaCores, by_type([decoding::<bf16>, decoding::<f16>]));
        }
        let deepseek = AttentionSpec::ragged(dtype, (4, 4), (192, 128)).causal(true);
        add("prefill_of_192_and_128", deepseek, Backend::Fa3, by_type([ragged_prefill::<bf16>, ragged_prefill::<f16>]));
        let paged = AttentionSpec::paged(dtype, (8, 2), 128, 16).causal(true);
        for backend in [Backend::Fa2, Backend::Fa3] {
            let windowed = paged.window(100);
            add("a_window", windowed, backend, by_type([windows::<bf16>, windows::<f16>]));
            add("a_soft_cap", paged.soft_cap(5.0), backend, by_type([prefill::<bf16>, prefill::<f16>]));
            add("a_window_and_a_soft_cap", windowed.soft_cap(5.0), backend, by_type([windows::<bf16>, windows::<f16>]));
            let mla = AttentionSpec::mla(dtype, 16, 16).sm_scale(0.07).causal(true);
            add("latent_attention", mla, backend, by_type([latent::<bf16>, latent::<f16>]));
            let sinks = AttentionSpec::paged(dtype, (8, 2), 64, 16).causal(true).sinks();
            add("sinks", sinks, backend, by_type([with_sinks::<bf16>, with_sinks::<f16>]));
            add("sinks_and_a_window", sinks.window(100), backend, by_type([with_sinks::<bf16>, with_sinks::<f16>]));
        }
        let eight = AttentionSpec::paged(dtype, (8, 2), 128, 16).causal(true).kv_dtype(DType::F8E4M3);
        add("keys_of_8_bits", eight, Backend::Fa2, by_type([eight_bits::<bf16>, eight_bits::<f16>]));
        let eight = AttentionSpec::decode(dtype, (8, 2), 128, 16).kv_dtype(DType::F8E4M3);
        add("keys_of_8_bits_decoded", eight, Backend::CudaCores, by_type([eight_bits::<bf16>, eight_bits::<f16>]));
        for backend in [Backend::Fa2, Backend::Fa3] {
            let ragged = AttentionSpec::ragged(dtype, (8, 2), (128, 128)).causal(true);
            add("one_sequence", ragged, backend, by_type([one_sequence::<bf16>, one_sequence::<f16>]));
        }
    }
    let decode = AttentionSpec::decode(DType::BF16, (8, 2), 128, 16);
    let paged = AttentionSpec::paged(DType::BF16, (8, 2), 128, 16).causal(true);
    add("ten_thousand_plans_do_not_disturb_each_other", decode, Backend::CudaCores, many_plans);
    add("ten_thousand_plans_do_not_disturb_each_other", decode, Backend::Fa2, many_plans);
    for (facts, backend) in [(decode, Backend::CudaCores), (paged, Backend::Fa2), (paged, Backend::Fa3)] {
        add("two_streams_have_a_workspace_each", facts, backend, two_streams);
        add("a_second_gpu_answers_the_same_bits", facts, backend, second_gpu);
        add("plans_and_runs_do_not_wait", facts, backend, asynchronous);
        add("what_is_not_the_plans_is_refused", facts, backend, refused);
    }
    for (facts, backend) in
        [(decode, Backend::CudaCores), (decode, Backend::Fa2), (paged, Backend::Fa2), (paged, Backend::Fa3)]
    {
        add("a_graph_planned_anew_answers_the_bits_of_plain_runs", facts, backend, replanned);
    }
    for backend in [Backend::Fa2, Backend::Fa3] {
        let ragged = AttentionSpec::ragged(DType::BF16, (8, 2), (128, 128)).causal(true);
        add("a_graph_without_pages_is_planned_anew", ragged, backend, replanned_ragged);
    }
    let mla = AttentionSpec::mla(DType::BF16, 16, 16).sm_scale(0.07).causal(true);
    for backend in [Backend::Fa2, Backend::Fa3] {
        add("a_graph_of_latent_attention_is_planned_anew", mla, backend, replanned_latent);
    }
    add("parts_of_a_context_merge_into_the_whole", paged.causal(false), Backend::Fa2, merged);
    // Behind all others: of these kernels some forms, which are refused, never end.
    for (out, tests) in [
        (DType::BF16, [eight_bit_queries::<bf16> as fn(&Gpu, _), eight_bit_queries_ragged::<bf16>]),
        (DType::F16, [eight_bit_queries::<f16>, eight_bit_queries_ragged::<f16>]),
    ] {
        let paged = AttentionSpec::paged(DType::F8E4M3, (8, 2), 128, 16).causal(true).out_dtype(out);
        let ragged = AttentionSpec::ragged(DType::F8E4M3, (8, 2), (128, 128)).causal(true).out_dtype(out);
        add("queries_of_8_bits_one_after_the_other", ragged, Backend::Fa3, tests[1]);
        add("queries_of_8_bits_over_pages", paged, Backend::Fa3, tests[0]);
    }
    cases
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let asked = std::env::var_os(gpu::RUN).is_some_and(|value| value == "1");
    let trials = cases().into_iter().map(|case| {
        let facts = case.facts.backend(case.backend);
        let module = facts.build().expect("a specification").module(case.backend);
        let there = asked && is_there(&module, case.name);
        let body = move || {
            (case.test)(&Gpu::open(), facts);
            Ok(())
        };
        Trial::test(format!("{}: {module}", case.name), body).with_ignored_flag(!there)
    });
    #[cfg_attr(not(feature = "bench"), allow(unused_mut, reason = "the crate writes files with bench alone"))]
    let mut trials: Vec<_> = trials.collect();
    #[cfg(feature = "bench")]
    {
        let body = || {
            beside_torch(&Gpu::open());
            Ok(())
        };
        // Asking Python takes seconds.
        const NAME: &str = "torch_computes_the_same";
        let wanted = asked && arguments.filter.as_ref().is_none_or(|filter| NAME.contains(filter.as_str()));
        let trial = Trial::test(NAME, body).with_ignored_flag(!wanted || !torch::is_there());
        trials.push(trial);
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// Whether the module was vendored, and whether there are as many GPUs as the test needs.
fn is_there(module: &str, test: &str) -> bool {
    let runtime = FlashInferRuntime::initialize(RuntimeConfig::default()).expect("the runtime");
    let there = !matches!(runtime.module(&format!("{module}.so")), Err(FlashInferError::ArtifactMissing { .. }));
    there && !(test.starts_with("a_second_gpu") && runtime.device_count().is_ok_and(|count| count < 2))
}

/// Requests of queries and keys.
type Requests = &'static [(i64, i64)];

/// What is to be right whatever the lengths: one key, pages that are full and one more or less, as many queries as keys and fewer,
/// and one long context among short ones, which is divided.
const LENGTHS: [Requests; 6] = [
    &[(1, 1)],
    &[(1, 16), (3, 17), (15, 15), (16, 16), (2, 31), (5, 32), (7, 33)],
    &[(1, 3000), (1, 5), (1, 40), (1, 1)],
    &[(9, 2500), (2, 2), (1, 7)],
    &[(70, 70), (40, 200)],
    &[(1, 90), (130, 130), (1, 64)],
];

fn tolerance(dtype: DType) -> f64 {
    if dtype == DType::BF16 { 1e-2 } else { 1.5e-3 }
}

/// A cache on the host, scattered pages of which hold each request's keys.
struct Input<T> {
    batch: Batch,
    pages: i64,
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
}

fn below(random: &mut Random, end: i64) -> i64 {
    ((random.uniform() * end as f64) as i64).min(end - 1)
}

/// The pages of each request, scattered. The second request shares the first one's, as far as both go.
fn scattered(random: &mut Random, spec: &AttentionSpec, requests: &[(i64, i64)]) -> Vec<Vec<i32>> {
    let counts = requests.iter().map(|(_, keys)| ((keys + spec.page_size() - 1) / spec.page_size()) as usize);
    let mut free: Vec<i32> = (0..(counts.clone().sum::<usize>() + SPARE) as i32).collect();
    for i in 0..free.len() {
        let other = i + below(random, (free.len() - i) as i64) as usize;
        free.swap(i, other);
    }
    let mut pages: Vec<Vec<i32>> = counts.map(|count| free.drain(..count).collect()).collect();
    if let [first, second, ..] = &mut pages[..] {
        let shared = first.len().min(second.len());
        second[..shared].copy_from_slice(&first[..shared]);
    }
    pages
}

/// Pages that no request has.
const SPARE: usize = 3;

/// The pages that [`input`] has for each request.
#[cfg(feature = "bench")]
fn pages_of_requests(seed: u64, spec: &AttentionSpec, requests: &[(i64, i64)]) -> Vec<Vec<i32>> {
    scattered(&mut Random(seed), spec, requests)
}

/// Queries, and a cache where pages that no request has are full of NaN.
fn input<T: Number>(seed: u64, spec: &AttentionSpec, requests: &[(i64, i64)]) -> Input<T> {
    let mut random = Random(seed);
    let page_size = spec.page_size();
    let each = scattered(&mut random, spec, requests);
    let pages = (each.iter().map(Vec::len).sum::<usize>() + SPARE) as i64;
    let mut batch = Batch::paged(page_size, pages).unwrap();
    let mut taken = vec![false; pages as usize];
    for (&(queries, keys), own) in requests.iter().zip(&each) {
        own.iter().for_each(|page| taken[*page as usize] = true);
        batch.push(queries, own, keys).unwrap();
    }
    let (q_heads, kv_heads) = spec.heads();
    let (size, per_page) = (spec.head_dims().0, (page_size * kv_heads * spec.head_dims().0) as usize);
    let mut fill = || {
        let mut values: Vec<T> = random.normal(pages as usize * per_page);
        for (page, own) in values.chunks_exact_mut(per_page).zip(&taken) {
            if !own {
                page.fill(T::POISON);
            }
        }
        values
    };
    let (k, v) = (fill(), fill());
    let q = random.normal((batch.rows() * q_heads * size) as usize);
    Input { batch, pages, q, k, v }
}

fn shape(spec: &AttentionSpec, pages: i64) -> [i64; 4] {
    let (kv_heads, size, page_size) = (spec.heads().1, spec.head_dims().0, spec.page_size());
    match spec.layout() {
        KvLayout::Nhd => [pages, page_size, kv_heads, size],
        KvLayout::Hnd => [pages, kv_heads, page_size, size],
    }
}

/// Results and logarithms of the reference.
fn on_host<T: Number>(spec: AttentionSpec, input: &Input<T>, options: &AttentionOptions<'_>) -> (Vec<f32>, Vec<f32>) {
    let (rows, heads, size) = (input.batch.rows(), spec.heads().0, spec.head_dims().0);
    let mut workspace = Workspace::on_host(spec);
    let plan = workspace.plan(&input.batch).unwrap();
    let mut o = vec![T::default(); (rows * heads * size) as usize];
    let mut lse = vec![0f32; (rows * heads) as usize];
    let (mut k, mut v) = (input.k.clone(), input.v.clone());
    let shape = shape(&spec, input.pages);
    let cache = PagedKvCache::new(
        TensorMut::from_slice(&mut k, &shape).unwrap(),
        TensorMut::from_slice(&mut v, &shape).unwrap(),
        spec.layout(),
    )
    .unwrap();
    plan.run(
        &mut TensorMut::from_slice(&mut o, &[rows, heads, size]).unwrap(),
        Some(&mut TensorMut::from_slice(&mut lse, &[rows, heads]).unwrap()),
        &TensorRef::from_slice(&input.q, &[rows, heads, size]).unwrap(),
        &cache,
        options,
    )
    .unwrap();
    (widened(&o), lse)
}

/// An input on the GPU.
struct OnGpu<T> {
    q: CudaSlice<T>,
    k: CudaSlice<T>,
    v: CudaSlice<T>,
    o: CudaSlice<T>,
    lse: CudaSlice<f32>,
}

impl<T: Number> OnGpu<T> {
    fn new(stream: &Arc<CudaStream>, spec: &AttentionSpec, input: &Input<T>) -> Self {
        let rows = input.batch.rows() as usize;
        let heads = spec.heads().0 as usize;
        let up = |values: &[T]| stream.clone_htod(values).unwrap();
        Self {
            q: up(&input.q),
            k: up(&input.k),
            v: up(&input.v),
            o: up(&vec![T::POISON; rows * heads * spec.head_dims().0 as usize]),
            lse: stream.clone_htod(&vec![f32::NAN; rows * heads]).unwrap(),
        }
    }

    fn run(
        &mut self,
        stream: &Arc<CudaStream>,
        plan: &flashinfer_rs::attention::Plan<'_>,
        spec: &AttentionSpec,
        pages: i64,
        options: &AttentionOptions<'_>,
    ) {
        let (rows, heads, size) = (plan.rows(), spec.heads().0, spec.head_dims().0);
        let shape = shape(spec, pages);
        let cache = PagedKvCache::new(
            TensorMut::from_cudarc(stream, &mut self.k, &shape).unwrap(),
            TensorMut::from_cudarc(stream, &mut self.v, &shape).unwrap(),
            spec.layout(),
        )
        .unwrap();
        plan.run(
            &mut TensorMut::from_cudarc(stream, &mut self.o, &[rows, heads, size]).unwrap(),
            Some(&mut TensorMut::from_cudarc(stream, &mut self.lse, &[rows, heads]).unwrap()),
            &TensorRef::from_cudarc(stream, &self.q, &[rows, heads, size]).unwrap(),
            &cache,
            options,
        )
        .unwrap();
    }
}

/// Plans and runs on the GPU: results and logarithms.
fn on_gpu<T: Number>(
    stream: &Arc<CudaStream>,
    spec: AttentionSpec,
    input: &Input<T>,
    options: &AttentionOptions<'_>,
) -> (Vec<f32>, Vec<f32>) {
    let largest = Largest::new(input.batch.requests() as i64, input.batch.rows());
    let mut workspace = Workspace::new(spec, largest, stream).unwrap();
    let mut gpu = OnGpu::new(stream, &spec, input);
    let plan = workspace.plan(&input.batch).unwrap();
    gpu.run(stream, &plan, &spec, input.pages, options);
    (widened(&stream.clone_dtoh(&gpu.o).unwrap()), stream.clone_dtoh(&gpu.lse).unwrap())
}

fn assert_logarithms(what: &str, found: &[f32], expected: &[f32], within: f32) {
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= within, "{what}: logarithm {i} is {a}, expected {b}");
    }
}

fn compare<T: Number>(gpu: &Gpu, spec: AttentionSpec, requests: &[(i64, i64)], seed: u64) {
    let options = AttentionOptions::default();
    let input = input::<T>(seed, &spec, requests);
    let (found, logarithms) = on_gpu(&gpu.stream, spec, &input, &options);
    let (expected, exact) = on_host(spec, &input, &options);
    let what = format!("{spec:?} of {requests:?}");
    assert_close(&what, &found, &expected, tolerance(T::DTYPE));
    // The hyperbolic tangent of the GPU is an approximate one.
    assert_logarithms(&what, &logarithms, &exact, if spec.soft_cap().is_some() { 2e-2 } else { 4e-3 });
}

/// As the facts, with other heads and another page size.
fn with(facts: AttentionBuilder, heads: (i64, i64), page_size: i64) -> AttentionBuilder {
    let spec = facts.build().unwrap();
    let (size, dtype) = (spec.head_dims().0, spec.dtype());
    let mut other = match spec.kind() {
        Kind::Decode => AttentionSpec::decode(dtype, heads, size, page_size),
        _ => AttentionSpec::paged(dtype, heads, size, page_size).causal(spec.is_causal()),
    };
    other = other.backend(spec.backend((9, 0))).kv_dtype(spec.kv_dtype());
    other = spec.window().map_or(other, |window| other.window(window));
    other = spec.soft_cap().map_or(other, |cap| other.soft_cap(cap));
    if spec.has_sinks() { other.sinks() } else { other }
}

fn prefill<T: Number>(gpu: &Gpu, facts: AttentionBuilder) {
    let spec = facts.build().unwrap();
    for (seed, requests) in LENGTHS.into_iter().enumerate() {
        compare::<T>(gpu, spec, requests, seed as u64);
    }
    for (seed, (heads, page_size)) in
        [((1, 1), 1), ((3, 1), 5), ((7, 1), 16), ((16, 2), 16), ((16, 1), 64), ((4, 4), 128)].into_iter().enumerate()
    {
        let spec = with(facts, heads, page_size).build().unwrap();
        compare::<T>(gpu, spec, &[(6, 6), (3, 190), (1, 33)], 50 + seed as u64);
    }
    without_a_mask::<T>(gpu, facts);
    layouts_agree::<T>(gpu, facts);
    random_batches::<T>(gpu, facts, 12);
}

/// More queries than keys, as where queries attend to another sequence.
fn without_a_mask<T: Number>(gpu: &Gpu, facts: AttentionBuilder) {
    if facts.build().unwrap().window().is_none() {
        let spec = facts.causal(false).build().unwrap();
        compare::<T>(gpu, spec, &[(9, 3), (20, 300), (1, 1)], 70);
    }
}

/// The same keys with the heads of a token together and with the tokens of a head together answer the same bits.
fn layouts_agree<T: Number>(gpu: &Gpu, facts: AttentionBuilder) {
    let nhd = facts.build().unwrap();
    let hnd = facts.layout(KvLayout::Hnd).build().unwrap();
    let requests: &[(i64, i64)] = if nhd.kind() == Kind::Decode { &[(1, 70), (1, 900)] } else { &[(5, 70), (17, 900)] };
    let input = input::<T>(80, &nhd, requests);
    let options = AttentionOptions::default();
    let turned = |values: &[T]| {
        let [pages, tokens, heads, size] = shape(&nhd, input.pages).map(|n| n as usize);
        let mut turned = vec![T::default(); values.len()];
        for (at, row) in values.chunks_exact(size).enumerate() {
            let (page, token, head) = (at / (tokens * heads), at / heads % tokens, at % heads);
            let to = ((page * heads + head) * tokens + token) * size;
            turned[to..to + size].copy_from_slice(row);
        }
        assert_eq!(turned.len(), pages * tokens * heads * size);
        turned
    };
    let of_heads = Input {
        batch: input.batch.clone(),
        pages: input.pages,
        q: input.q.clone(),
        k: turned(&input.k),
        v: turned(&input.v),
    };
    let found = on_gpu(&gpu.stream, nhd, &input, &options);
    assert!(on_gpu(&gpu.stream, hnd, &of_heads, &options) == found, "HND and NHD of {nhd:?}");
}

fn random_batches<T: Number>(gpu: &Gpu, facts: AttentionBuilder, count: u64) {
    for seed in 0..count {
        let mut random = Random(1000 + seed);
        let heads = [(4, 2), (8, 1), (2, 2), (6, 2)][below(&mut random, 4) as usize];
        let page_size = [1, 7, 16, 64][below(&mut random, 4) as usize];
        let spec = with(facts, heads, page_size).build().unwrap();
        let one = spec.kind() == Kind::Decode;
        let requests: Vec<(i64, i64)> = (0..1 + below(&mut random, 6))
            .map(|_| {
                let keys = 1 + below(&mut random, [20, 150, 700][seed as usize % 3]);
                (if one { 1 } else { 1 + below(&mut random, keys.min(24)) }, keys)
            })
            .collect();
        compare::<T>(gpu, spec, &requests, seed);
    }
}

fn decoding<T: Number>(gpu: &Gpu, facts: AttentionBuilder) {
    let spec = facts.build().unwrap();
    for (seed, keys) in [&[1][..], &[15, 16, 17, 31, 32, 33], &[6000, 3, 70, 1], &[400; 40]].into_iter().enumerate() {
        let requests: Vec<(i64, i64)> = keys.iter().map(|keys| (1, *keys)).collect();
        compare::<T>(gpu, spec, &requests, seed as u64);
    }
    let tensor_cores = spec.backend((9, 0)) == Backend::Fa2;
    for group in (1..=16).filter(|group| tensor_cores || [1, 2, 3, 4, 8].contains(group)) {
        let spec = with(facts, (group, 1), 16).build().unwrap();
        compare::<T>(gpu, spec, &[(1, 300), (1, 18)], 60 + group as u64);
    }
    layouts_agree::<T>(gpu, facts);
    random_batches::<T>(gpu, facts, 12);
}

fn windows<T: Number>(gpu: &Gpu, facts: AttentionBuilder) {
    // None but the own key, within a tile, across tiles, and beyond all keys.
    for (seed, window) in [0, 5, 100, 130, 5000].into_iter().enumerate() {
        let spec = facts.window(window).build().unwrap();
        for requests in [&[(1, 1), (40, 40), (20, 700), (1, 300)][..], &[(1, 3000), (1, 5)]] {
            compare::<T>(gpu, spec, requests, seed as u64);
        }
    }
}

fn ragged_prefill<T: Number>(gpu: &Gpu, facts: AttentionBuilder) {
    let spec = facts.build().unwrap();
    let stream = &gpu.stream;
    let ((q_heads, kv_heads), (qk, vo)) = (spec.heads(), spec.head_dims());
    for (seed, requests) in LENGTHS.into_iter().enumerate() {
        let mut random = Random(seed as u64);
        let mut batch = Batch::ragged();
        requests.iter().for_each(|&(queries, keys)| batch.push_ragged(queries, keys).unwrap());
        let (rows, keys) = (batch.rows(), batch.keys());
        let q: Vec<T> = random.normal((rows * q_heads * qk) as usize);
        let (k, v): (Vec<T>, Vec<T>) =
            (random.normal((keys * kv_heads * qk) as usize), random.normal((keys * kv_heads * vo) as usize));
        let shapes = ([rows, q_heads, qk], [keys, kv_heads, qk], [keys, kv_heads, vo], [rows, q_heads, vo]);
        let options = AttentionOptions::default();
        let mut expected = vec![T::default(); (rows * q_heads * vo) as usize];
        let mut exact = vec![0f32; (rows * q_heads) as usize];
        let mut host = Workspace::on_host(spec);
        let read = |values, shape: &[i64]| TensorRef::from_slice::<T>(values, shape).unwrap();
        host.plan(&batch)
            .unwrap()
            .run_ragged(
                &mut TensorMut::from_slice(&mut expected, &shapes.3).unwrap(),
                Some(&mut TensorMut::from_slice(&mut exact, &[rows, q_heads]).unwrap()),
                &read(&q, &shapes.0),
                (&read(&k, &shapes.1), &read(&v, &shapes.2)),
                &options,
            )
            .unwrap();
        let up = |values: &[T]| stream.clone_htod(values).unwrap();
        let (q, k, v) = (up(&q), up(&k), up(&v));
        let mut o = up(&vec![T::POISON; expected.len()]);
        let mut lse = stream.clone_htod(&vec![f32::NAN; exact.len()]).unwrap();
        let mut workspace = Workspace::new(spec, Largest::new(requests.len() as i64, rows), stream).unwrap();
        let read = |buffer, shape: &[i64]| TensorRef::from_cudarc::<T>(stream, buffer, shape).unwrap();
        workspace
            .plan(&batch)
            .unwrap()
            .run_ragged(
                &mut TensorMut::from_cudarc(stream, &mut o, &shapes.3).unwrap(),
                Some(&mut TensorMut::from_cudarc(stream, &mut lse, &[rows, q_heads]).unwrap()),
                &read(&q, &shapes.0),
                (&read(&k, &shapes.1), &read(&v, &shapes.2)),
                &options,
            )
            .unwrap();
        let what = format!("{spec:?} of {requests:?}");
        let found = widened(&stream.clone_dtoh(&o).unwrap());
        assert_close(&what, &found, &widened(&expected), tolerance(T::DTYPE));
        assert_logarithms(&what, &stream.clone_dtoh(&lse).unwrap(), &exact, 4e-3);
    }
}

fn with_sinks<T: Number>(gpu: &Gpu, facts: AttentionBuilder) {
    let spec = facts.build().unwrap();
    let sinks: Vec<f32> = (0..8).map(|head| head as f32 * 0.5 - 2.0).collect();
    let on_device = gpu.stream.clone_htod(&sinks).unwrap();
    for (seed, requests) in LENGTHS.into_iter().enumerate() {
        let input = input::<T>(seed as u64, &spec, requests);
        let host = AttentionOptions::default().with_sink(TensorRef::from_slice(&sinks, &[8]).unwrap());
        let (expected, _) = on_host(spec, &input, &host);
        let device =
            AttentionOptions::default().with_sink(TensorRef::from_cudarc(&gpu.stream, &on_device, &[8]).unwrap());
        let (found, _) = on_gpu(&gpu.stream, spec, &input, &device);
        assert_close(&format!("{spec:?} of {requests:?}"), &found, &expected, tolerance(T::DTYPE));
    }
}

/// A byte of F8E4M3 that is a number.
fn eight_bit(random: &mut Random) -> u8 {
    // Exponents around 1, so that sums stay small.
    let (sign, exponent, mantissa) = (below(random, 2), 4 + below(random, 4), below(random, 8));
    (sign << 7 | exponent << 3 | mantissa) as u8
}

fn eight_bits<T: Number>(gpu: &Gpu, facts: AttentionBuilder) {
    let (spec, stream) = (facts.build().unwrap(), &gpu.stream);
    let ((q_heads, _), size) = (spec.heads(), spec.head_dims().0);
    let lengths: &[&[(i64, i64)]] = match spec.kind() {
        Kind::Decode => &[&[(1, 1), (1, 33)], &[(1, 3000), (1, 5)]],
        _ => &[&[(1, 1), (3, 17), (40, 200)], &[(5, 2500), (1, 5)]],
    };
    for (seed, requests) in lengths.iter().enumerate() {
        let input = input::<T>(seed as u64, &spec, requests);
        let mut random = Random(seed as u64 + 5);
        let mut bytes = || -> Vec<u8> { (0..input.k.len()).map(|_| eight_bit(&mut random)).collect() };
        let (mut k, mut v) = (bytes(), bytes());
        let rows = input.batch.rows();
        let (o_shape, cache_shape) = ([rows, q_heads, size], shape(&spec, input.pages));
        let options = AttentionOptions::default().with_k_scale(0.75);
        let mut expected = vec![T::default(); (rows * q_heads * size) as usize];
        {
            // SAFETY: as many bytes as the shape says.
            let [k, v] = [&mut k, &mut v].map(|bytes| unsafe {
                TensorMut::from_raw(bytes.as_mut_ptr().cast(), Device::Cpu, DType::F8E4M3, &cache_shape, None).unwrap()
            });
            let cache = PagedKvCache::new(k, v, spec.layout()).unwrap();
            let mut results = TensorMut::from_slice(&mut expected, &o_shape).unwrap();
            let q = TensorRef::from_slice(&input.q, &o_shape).unwrap();
            let mut host = Workspace::on_host(spec);
            host.plan(&input.batch).unwrap().run(&mut results, None, &q, &cache, &options).unwrap();
        }
        let (mut k, mut v) = (stream.clone_htod(&k).unwrap(), stream.clone_htod(&v).unwrap());
        let q = stream.clone_htod(&input.q).unwrap();
        let mut o = stream.clone_htod(&vec![T::POISON; expected.len()]).unwrap();
        {
            let [k, v] = [&mut k, &mut v]
                .map(|bytes| TensorMut::from_cudarc_bytes(stream, bytes, DType::F8E4M3, &cache_shape).unwrap());
            let cache = PagedKvCache::new(k, v, spec.layout()).unwrap();
            let mut results = TensorMut::from_cudarc(stream, &mut o, &o_shape).unwrap();
            let q = TensorRef::from_cudarc(stream, &q, &o_shape).unwrap();
            let largest = Largest::new(requests.len() as i64, rows);
            let mut workspace = Workspace::new(spec, largest, stream).unwrap();
            workspace.plan(&input.batch).unwrap().run(&mut results, None, &q, &cache, &options).unwrap();
        }
        let found = widened(&stream.clone_dtoh(&o).unwrap());
        assert_close(&format!("{spec:?} of {requests:?}"), &found, &widened(&expected), tolerance(T::DTYPE));
    }
}

/// What 8 bits cost: weights are rounded to 8 bits too.
const OF_8_BITS: f64 = 6e-2;

/// Results and logarithms beside the reference's, of 8-bit queries, keys and values.
fn assert_8_bits<T: Number>(
    gpu: &Gpu,
    what: &str,
    o: &CudaSlice<T>,
    lse: &CudaSlice<f32>,
    expected: &[T],
    exact: &[f32],
) {
    assert_close(what, &widened(&gpu.stream.clone_dtoh(o).unwrap()), &widened(expected), OF_8_BITS);
    assert_logarithms(what, &gpu.stream.clone_dtoh(lse).unwrap(), exact, 5e-2);
}

fn eight_bit_options() -> AttentionOptions<'static> {
    AttentionOptions::default().with_q_scale(0.5).with_k_scale(0.75).with_v_scale(2.0)
}

/// 8-bit queries over pages; in those that no request has every number is NaN. `T` is the results' type.
fn eight_bit_queries<T: Number>(gpu: &Gpu, facts: AttentionBuilder) {
    let stream = &gpu.stream;
    let lengths: [Requests; 4] =
        [&[(1, 1), (3, 17), (16, 16)], &[(40, 200), (1, 5)], &[(5, 2500), (130, 130)], &[(150, 400), (1, 129)]];
    for (seed, requests) in lengths.into_iter().enumerate() {
        for causal in [true, false] {
            let spec = facts.causal(causal).build().unwrap();
            let ((q_heads, _), size) = (spec.heads(), spec.head_dims().0);
            let input = input::<T>(seed as u64, &spec, requests);
            let mut random = Random(seed as u64 + 5);
            let mut bytes = |of: &[T]| -> Vec<u8> {
                // The NaN of 8 bits where the generator has its own.
                of.iter().map(|x| if Into::<f64>::into(*x).is_nan() { 0x7F } else { eight_bit(&mut random) }).collect()
            };
            let (mut q, mut k, mut v) = (bytes(&input.q), bytes(&input.k), bytes(&input.v));
            let rows = input.batch.rows();
            let (o_shape, cache_shape) = ([rows, q_heads, size], shape(&spec, input.pages));
            let options = eight_bit_options();
            let mut expected = vec![T::default(); (rows * q_heads * size) as usize];
            let mut exact = vec![0f32; (rows * q_heads) as usize];
            {
                let raw = |bytes: &mut Vec<u8>, shape: &[i64]| {
                    // SAFETY: as many bytes as the shape says, which outlive the tensor.
                    unsafe { TensorMut::from_raw(bytes.as_mut_ptr().cast(), Device::Cpu, DType::F8E4M3, shape, None) }
                        .unwrap()
                };
                let (q, k, v) = (raw(&mut q, &o_shape), raw(&mut k, &cache_shape), raw(&mut v, &cache_shape));
                let cache = PagedKvCache::new(k, v, spec.layout()).unwrap();
                let mut results = TensorMut::from_slice(&mut expected, &o_shape).unwrap();
                let mut logarithms = TensorMut::from_slice(&mut exact, &[rows, q_heads]).unwrap();
                let mut host = Workspace::on_host(spec);
                let plan = host.plan(&input.batch).unwrap();
                plan.run(&mut results, Some(&mut logarithms), &q.as_ref(), &cache, &options).unwrap();
            }
            let up = |bytes: &[u8]| stream.clone_htod(bytes).unwrap();
            let (q, mut k, mut v) = (up(&q), up(&k), up(&v));
            let mut o = stream.clone_htod(&vec![T::POISON; expected.len()]).unwrap();
            let mut lse = stream.clone_htod(&vec![f32::NAN; exact.len()]).unwrap();
            {
                let [k, v] = [&mut k, &mut v]
                    .map(|bytes| TensorMut::from_cudarc_bytes(stream, bytes, DType::F8E4M3, &cache_shape).unwrap());
                let q = TensorRef::from_cudarc_bytes(stream, &q, DType::F8E4M3, &o_shape).unwrap();
                let cache = PagedKvCache::new(k, v, spec.layout()).unwrap();
                let mut results = TensorMut::from_cudarc(stream, &mut o, &o_shape).unwrap();
                let mut logarithms = TensorMut::from_cudarc(stream, &mut lse, &[rows, q_heads]).unwrap();
                let mut workspace = Workspace::new(spec, Largest::new(requests.len() as i64, rows), stream).unwrap();
                let plan = workspace.plan(&input.batch).unwrap();
                plan.run(&mut results, Some(&mut logarithms), &q, &cache, &options).unwrap();
            }
            assert_8_bits(gpu, &format!("{spec:?} of {requests:?}"), &o, &lse, &expected, &exact);
        }
    }
}

fn eight_bit_queries_ragged<T: Number>(gpu: &Gpu, facts: AttentionBuilder) {
    let stream = &gpu.stream;
    for (seed, requests) in LENGTHS.into_iter().enumerate() {
        for causal in [true, false] {
            let spec = facts.causal(causal).build().unwrap();
            let ((q_heads, kv_heads), size) = (spec.heads(), spec.head_dims().0);
            let mut batch = Batch::ragged();
            requests.iter().for_each(|&(queries, keys)| batch.push_ragged(queries, keys).unwrap());
            let (rows, keys) = (batch.rows(), batch.keys());
            let mut random = Random(seed as u64 + 5);
            let mut bytes = |count: i64| -> Vec<u8> { (0..count).map(|_| eight_bit(&mut random)).collect() };
            let (q_shape, kv_shape) = ([rows, q_heads, size], [keys, kv_heads, size]);
            let product = |shape: &[i64; 3]| shape.iter().product::<i64>();
            let (q, k, v) = (bytes(product(&q_shape)), bytes(product(&kv_shape)), bytes(product(&kv_shape)));
            let options = eight_bit_options();
            let mut expected = vec![T::default(); q.len()];
            let mut exact = vec![0f32; (rows * q_heads) as usize];
            // SAFETY: as many bytes as the shape says, which outlive the tensor.
            let raw = |bytes: &[u8], shape: &[i64]| unsafe {
                TensorRef::from_raw(bytes.as_ptr().cast(), Device::Cpu, DType::F8E4M3, shape, None).unwrap()
            };
            let mut host = Workspace::on_host(spec);
            host.plan(&batch)
                .unwrap()
                .run_ragged(
                    &mut TensorMut::from_slice(&mut expected, &q_shape).unwrap(),
                    Some(&mut TensorMut::from_slice(&mut exact, &[rows, q_heads]).unwrap()),
                    &raw(&q, &q_shape),
                    (&raw(&k, &kv_shape), &raw(&v, &kv_shape)),
                    &options,
                )
                .unwrap();
            let up = |bytes: &[u8]| stream.clone_htod(bytes).unwrap();
            let (q, k, v) = (up(&q), up(&k), up(&v));
            let mut o = stream.clone_htod(&vec![T::POISON; expected.len()]).unwrap();
            let mut lse = stream.clone_htod(&vec![f32::NAN; exact.len()]).unwrap();
            {
                let on_gpu =
                    |bytes, shape: &[i64]| TensorRef::from_cudarc_bytes(stream, bytes, DType::F8E4M3, shape).unwrap();
                let (q, k, v) = (on_gpu(&q, &q_shape), on_gpu(&k, &kv_shape), on_gpu(&v, &kv_shape));
                let mut workspace = Workspace::new(spec, Largest::new(requests.len() as i64, rows), stream).unwrap();
                workspace
                    .plan(&batch)
                    .unwrap()
                    .run_ragged(
                        &mut TensorMut::from_cudarc(stream, &mut o, &q_shape).unwrap(),
                        Some(&mut TensorMut::from_cudarc(stream, &mut lse, &[rows, q_heads]).unwrap()),
                        &q,
                        (&k, &v),
                        &options,
                    )
                    .unwrap();
            }
            assert_8_bits(gpu, &format!("{spec:?} of {requests:?}"), &o, &lse, &expected, &exact);
        }
    }
}

/// One sequence at once, beside the reference.
fn one_sequence<T: Number>(gpu: &Gpu, facts: AttentionBuilder) {
    let (spec, stream) = (facts.build().unwrap(), &gpu.stream);
    let mut workspace = Workspace::new(spec, Largest::new(1, 300), stream).unwrap();
    let mut host = Workspace::on_host(spec);
    for (seed, (queries, keys)) in [(1, 1), (1, 3000), (70, 70), (300, 900)].into_iter().enumerate() {
        let mut random = Random(seed as u64);
        let (q_shape, kv_shape) = ([queries, 8, 128], [keys, 2, 128]);
        let (q, k, v): (Vec<T>, Vec<T>, Vec<T>) = (
            random.normal(queries as usize * 1024),
            random.normal(keys as usize * 256),
            random.normal(keys as usize * 256),
        );
        let options = AttentionOptions::default();
        let mut expected = vec![T::default(); q.len()];
        let read = |values, shape: &[i64]| TensorRef::from_slice::<T>(values, shape).unwrap();
        let mut results = TensorMut::from_slice(&mut expected, &q_shape).unwrap();
        let (kv, one) = ((read(&k, &kv_shape), read(&v, &kv_shape)), read(&q, &q_shape));
        host.run_single(&mut results, None, &one, (&kv.0, &kv.1), &options).unwrap();
        let up = |values: &[T]| stream.clone_htod(values).unwrap();
        let (q, k, v) = (up(&q), up(&k), up(&v));
        let mut o = up(&vec![T::POISON; expected.len()]);
        let read = |buffer, shape: &[i64]| TensorRef::from_cudarc::<T>(stream, buffer, shape).unwrap();
        let mut results = TensorMut::from_cudarc(stream, &mut o, &q_shape).unwrap();
        let (kv, one) = ((read(&k, &kv_shape), read(&v, &kv_shape)), read(&q, &q_shape));
        workspace.run_single(&mut results, None, &one, (&kv.0, &kv.1), &options).unwrap();
        let found = widened(&stream.clone_dtoh(&o).unwrap());
        assert_close(&format!("{queries} over {keys}"), &found, &widened(&expected), tolerance(T::DTYPE));
    }
}

fn latent<T: Number>(gpu: &Gpu, facts: AttentionBuilder) {
    let stream = &gpu.stream;
    let first = facts.build().unwrap();
    let lengths: [Requests; 4] =
        [&[(1, 1)], &[(1, 17), (1, 1500), (1, 32)], &[(3, 3), (2, 70), (5, 33)], &[(12, 400), (1, 5)]];
    for (seed, (heads, page_size)) in [(16, 16), (128, 64), (8, 1)].into_iter().enumerate() {
        let spec = AttentionSpec::mla(first.dtype(), heads, page_size)
            .sm_scale(0.07)
            .causal(true)
            .backend(first.backend((9, 0)))
            .build()
            .unwrap();
        for requests in lengths {
            let mut random = Random(seed as u64);
            let paged = AttentionSpec::paged(first.dtype(), (1, 1), 64, page_size).build().unwrap();
            let Input { batch, pages, k: kpe, .. } = input::<T>(seed as u64, &paged, requests);
            // Where the pages are unused, the compressed part is NaN as the rotary one is.
            let tokens = (pages * page_size) as usize;
            let mut ckv: Vec<T> = random.normal(tokens * 512);
            for (token, rotary) in ckv.chunks_exact_mut(512).zip(kpe.chunks_exact(64)) {
                if rotary[0].into().is_nan() {
                    token.fill(T::POISON);
                }
            }
            let rows = batch.rows();
            let count = (rows * heads) as usize;
            let (q_nope, q_pe): (Vec<T>, Vec<T>) = (random.normal(count * 512), random.normal(count * 64));
            let shapes = ([rows, heads, 512], [rows, heads, 64], [pages, page_size, 512], [pages, page_size, 64]);
            let (mut expected, mut exact) = (vec![T::default(); count * 512], vec![0f32; count]);
            {
                let (mut ckv, mut kpe) = (ckv.clone(), kpe.clone());
                let cache = PagedMlaCache::new(
                    TensorMut::from_slice(&mut ckv, &shapes.2).unwrap(),
                    TensorMut::from_slice(&mut kpe, &shapes.3).unwrap(),
                )
                .unwrap();
                let (q_nope, q_pe) = (
                    TensorRef::from_slice(&q_nope, &shapes.0).unwrap(),
                    TensorRef::from_slice(&q_pe, &shapes.1).unwrap(),
                );
                let mut host = Workspace::on_host(spec);
                host.plan(&batch)
                    .unwrap()
                    .run_mla(
                        &mut TensorMut::from_slice(&mut expected, &shapes.0).unwrap(),
                        Some(&mut TensorMut::from_slice(&mut exact, &[rows, heads]).unwrap()),
                        &LatentQueries { q_nope: &q_nope, q_pe: &q_pe },
                        &cache,
                    )
                    .unwrap();
            }
            let up = |values: &[T]| stream.clone_htod(values).unwrap();
            let (q_nope, q_pe, mut ckv, mut kpe) = (up(&q_nope), up(&q_pe), up(&ckv), up(&kpe));
            let mut o = up(&vec![T::POISON; expected.len()]);
            let mut lse = stream.clone_htod(&vec![f32::NAN; count]).unwrap();
            {
                let cache = PagedMlaCache::new(
                    TensorMut::from_cudarc(stream, &mut ckv, &shapes.2).unwrap(),
                    TensorMut::from_cudarc(stream, &mut kpe, &shapes.3).unwrap(),
                )
                .unwrap();
                let (q_nope, q_pe) = (
                    TensorRef::from_cudarc(stream, &q_nope, &shapes.0).unwrap(),
                    TensorRef::from_cudarc(stream, &q_pe, &shapes.1).unwrap(),
                );
                let mut workspace = Workspace::new(spec, Largest::new(requests.len() as i64, rows), stream).unwrap();
                workspace
                    .plan(&batch)
                    .unwrap()
                    .run_mla(
                        &mut TensorMut::from_cudarc(stream, &mut o, &shapes.0).unwrap(),
                        Some(&mut TensorMut::from_cudarc(stream, &mut lse, &[rows, heads]).unwrap()),
                        &LatentQueries { q_nope: &q_nope, q_pe: &q_pe },
                        &cache,
                    )
                    .unwrap();
            }
            let what = format!("{spec:?} of {requests:?}");
            let found = widened(&stream.clone_dtoh(&o).unwrap());
            assert_close(&what, &found, &widened(&expected), tolerance(T::DTYPE));
            assert_logarithms(&what, &stream.clone_dtoh(&lse).unwrap(), &exact, 4e-3);
        }
    }
}

/// Two inputs that no list of the other's does for, of the kind of the specification.
fn two_inputs(spec: &AttentionSpec) -> [Input<bf16>; 2] {
    match spec.kind() {
        Kind::Decode => [input(1, spec, &[(1, 900), (1, 3)]), input(2, spec, &[(1, 20), (1, 2000)])],
        _ => [input(1, spec, &[(9, 900), (3, 3)]), input(2, spec, &[(2, 20), (10, 2000)])],
    }
}

/// The lists of a plan that is not copied yet are not written over by the next plans.
fn many_plans(gpu: &Gpu, facts: AttentionBuilder) {
    const PLANS: usize = 10_000;
    let (spec, stream) = (facts.build().unwrap(), &gpu.stream);
    let inputs = two_inputs(&spec);
    let options = AttentionOptions::default();
    let expected = inputs.each_ref().map(|input| on_gpu(stream, spec, input, &options).0);
    let mut workspace = Workspace::new(spec, Largest::new(2, 2), stream).unwrap();
    let mut on = inputs.each_ref().map(|input| OnGpu::new(stream, &spec, input));
    let len = on[0].o.len();
    let mut all = stream.alloc_zeros::<bf16>(PLANS * len).unwrap();
    // The first plans come while the stream is busy, so that their copies wait.
    let busy = gpu.occupy(stream);
    for i in 0..PLANS {
        let input = &inputs[i % 2];
        let plan = workspace.plan(&input.batch).unwrap();
        on[i % 2].run(stream, &plan, &spec, input.pages, &options);
        stream.memcpy_dtod(&on[i % 2].o, &mut all.slice_mut(i * len..(i + 1) * len)).unwrap();
    }
    let all = stream.clone_dtoh(&all).unwrap();
    drop(busy);
    for (i, found) in all.chunks_exact(len).enumerate() {
        assert!(widened(found) == expected[i % 2], "plan {i}");
    }
}

fn two_streams(gpu: &Gpu, facts: AttentionBuilder) {
    let spec = facts.build().unwrap();
    let inputs = two_inputs(&spec);
    let options = AttentionOptions::default();
    let expected = inputs.each_ref().map(|input| on_gpu(&gpu.stream, spec, input, &options));
    let streams = [gpu.context.new_stream().unwrap(), gpu.context.new_stream().unwrap()];
    let rows = inputs[0].batch.rows().max(inputs[1].batch.rows());
    let mut workspaces = streams.each_ref().map(|stream| Workspace::new(spec, Largest::new(2, rows), stream).unwrap());
    let mut on = [0, 1].map(|i| OnGpu::new(&streams[i], &spec, &inputs[i]));
    for _ in 0..200 {
        for i in 0..2 {
            let plan = workspaces[i].plan(&inputs[i].batch).unwrap();
            on[i].run(&streams[i], &plan, &spec, inputs[i].pages, &options);
        }
    }
    for i in 0..2 {
        let found = streams[i].clone_dtoh(&on[i].o).unwrap();
        assert!(widened(&found) == expected[i].0, "stream {i}");
    }
    // A tensor of the one stream is none for the other's workspace.
    let spare = streams[1].alloc_zeros::<bf16>(inputs[0].q.len()).unwrap();
    let plan = workspaces[0].plan(&inputs[0].batch).unwrap();
    let (o_shape, cache_shape) = ([plan.rows(), 8, 128], shape(&spec, inputs[0].pages));
    let OnGpu { k, v, o, .. } = &mut on[0];
    let cache = PagedKvCache::new(
        TensorMut::from_cudarc(&streams[0], k, &cache_shape).unwrap(),
        TensorMut::from_cudarc(&streams[0], v, &cache_shape).unwrap(),
        spec.layout(),
    )
    .unwrap();
    let mut o = TensorMut::from_cudarc(&streams[0], o, &o_shape).unwrap();
    let q = TensorRef::from_cudarc(&streams[1], &spare, &o_shape).unwrap();
    match plan.run(&mut o, None, &q, &cache, &options) {
        Err(FlashInferError::InvalidArgument { argument: "q", .. }) => {}
        other => panic!("{other:?}"),
    }
}

fn second_gpu(gpu: &Gpu, facts: AttentionBuilder) {
    let spec = facts.build().unwrap();
    let other = CudaContext::new(1).unwrap().new_stream().unwrap();
    for input in two_inputs(&spec) {
        let options = AttentionOptions::default();
        let first = on_gpu(&gpu.stream, spec, &input, &options);
        assert!(on_gpu(&other, spec, &input, &options) == first);
    }
}

fn asynchronous(gpu: &Gpu, facts: AttentionBuilder) {
    let (spec, stream) = (facts.build().unwrap(), &gpu.stream);
    let [input, _] = two_inputs(&spec);
    let mut workspace = Workspace::new(spec, Largest::new(2, input.batch.rows()), stream).unwrap();
    let mut on = OnGpu::new(stream, &spec, &input);
    let mut step = || {
        let plan = workspace.plan(&input.batch).unwrap();
        for _ in 0..3 {
            on.run(stream, &plan, &spec, input.pages, &AttentionOptions::default());
        }
    };
    step();
    gpu.assert_asynchronous(stream, step);
}

fn refused(gpu: &Gpu, facts: AttentionBuilder) {
    let (spec, stream) = (facts.build().unwrap(), &gpu.stream);
    let [input, _] = two_inputs(&spec);
    let rows = input.batch.rows();
    let mut workspace = Workspace::new(spec, Largest::new(2, rows), stream).unwrap();
    let mut too_many = input.batch.clone();
    too_many.push(1, &[0], 1).unwrap();
    let error = workspace.plan(&too_many).unwrap_err().to_string();
    assert!(error.contains("for which the workspace was made"), "{error}");
    let plan = workspace.plan(&input.batch).unwrap();
    assert_eq!(plan.backend(), Some(spec.backend((9, 0))));
    let OnGpu { q, mut k, mut v, mut o, .. } = OnGpu::new(stream, &spec, &input);
    let options = AttentionOptions::default();
    let cache_shape = shape(&spec, input.pages);
    let mut named = |q: &TensorRef<'_>, cache_shape: &[i64; 4]| {
        let cache = PagedKvCache::new(
            TensorMut::from_cudarc(stream, &mut k, cache_shape).unwrap(),
            TensorMut::from_cudarc(stream, &mut v, cache_shape).unwrap(),
            spec.layout(),
        )
        .unwrap();
        let mut o = TensorMut::from_cudarc(stream, &mut o, &[rows, 8, 128]).unwrap();
        match plan.run(&mut o, None, q, &cache, &options) {
            Err(FlashInferError::InvalidArgument { argument, .. }) => argument,
            other => panic!("{other:?}"),
        }
    };
    let good = TensorRef::from_cudarc(stream, &q, &[rows, 8, 128]).unwrap();
    // A cache of fewer pages than the table was checked against, and with other pages.
    assert_eq!(named(&good, &[cache_shape[0] - 1, 16, 2, 128]), "pages");
    assert_eq!(named(&good, &[cache_shape[0], 8, 2, 128]), "page_size");
    assert_eq!(named(&good, &[cache_shape[0], 16, 1, 128]), "kv_heads");
    // Fewer queries, queries on the host, at an odd address, of another type.
    let fewer = q.slice(..((rows - 1) * 8 * 128) as usize);
    let fewer = TensorRef::from_cudarc(stream, &fewer, &[rows - 1, 8, 128]).unwrap();
    assert!(["rows", "o"].contains(&named(&fewer, &cache_shape)));
    let host = TensorRef::from_slice(&input.q, &[rows, 8, 128]).unwrap();
    assert!(["q", "paged_k_cache"].contains(&named(&host, &cache_shape)));
    let odd = stream.alloc_zeros::<bf16>(q.len() + 8).unwrap();
    let odd = odd.slice(1..);
    assert_eq!(named(&TensorRef::from_cudarc(stream, &odd, &[rows, 8, 128]).unwrap(), &cache_shape), "q");
    let other = stream.alloc_zeros::<f16>(q.len()).unwrap();
    let other = TensorRef::from_cudarc(stream, &other, &[rows, 8, 128]).unwrap();
    assert!(["q", "o"].contains(&named(&other, &cache_shape)));
}

/// Of a graph's buffers the plan and the results, of which a row has so many elements.
type Parts<B> = (for<'a> fn(&'a mut LaunchGraph<B>) -> (GraphPlanMut<'a>, CudaViewMut<'a, bf16>), i64);

/// A plan, queries, results, keys and values.
type Layer = (GraphPlan, CudaSlice<bf16>, CudaSlice<bf16>, CudaSlice<bf16>, CudaSlice<bf16>);

fn of_a_layer(graph: &mut LaunchGraph<Layer>) -> (GraphPlanMut<'_>, CudaViewMut<'_, bf16>) {
    let (plan, _, o, ..) = graph.buffers().unwrap();
    (plan, o)
}

/// A plan, queries in two parts, results, and a cache in two parts.
type LatentLayer = (GraphPlan, CudaSlice<bf16>, CudaSlice<bf16>, CudaSlice<bf16>, CudaSlice<bf16>, CudaSlice<bf16>);

fn of_a_latent_layer(graph: &mut LaunchGraph<LatentLayer>) -> (GraphPlanMut<'_>, CudaViewMut<'_, bf16>) {
    let (plan, _, _, o, ..) = graph.buffers().unwrap();
    (plan, o)
}

/// Plans so many batches for a graph, without a wait between a launch and the next plan. One in so many has its results compared with
/// those of a graph that was captured for it, to the bit, and looked at.
fn planned_anew<B: GraphBuffers>(
    (rounds, every): (usize, usize),
    graph: &mut LaunchGraph<B>,
    mut draw: impl FnMut() -> Batch,
    captured: impl Fn(&Batch) -> LaunchGraph<B>,
    (parts, row): Parts<B>,
    look: impl Fn(usize, Batch, &[bf16]),
) {
    let results = |graph: &mut LaunchGraph<B>, batch: &Batch| {
        let stream = Arc::clone(graph.stream());
        let (_, o) = parts(graph);
        stream.clone_dtoh(&o.slice(..(batch.rows() * row) as usize)).unwrap()
    };
    for round in 0..rounds {
        let batch = draw();
        parts(graph).0.replan(&batch).unwrap();
        graph.launch().unwrap();
        if round % every != 0 {
            continue;
        }
        let found = results(graph, &batch);
        let mut other = captured(&batch);
        other.launch().unwrap();
        assert!(found == results(&mut other, &batch), "round {round}, {batch:?}");
        look(round, batch, &found);
    }
}

/// A graph that was captured once answers for random batches what runs without one do that are planned for the same number of
/// requests and rows, to the bit: a graph divides contexts always, so it is compared with another graph of that batch alone.
fn replanned(gpu: &Gpu, facts: AttentionBuilder) {
    const PAGES: i64 = 400;
    let (spec, stream) = (facts.build().unwrap(), &gpu.stream);
    let one = spec.kind() == Kind::Decode;
    let (requests, rows) = if one { (6i64, 6i64) } else { (6, 90) };
    let room = GraphRoom { requests, rows, pages: 390, reserved_page: PAGES as i32 - 1 };
    let mut random = Random(9);
    let count = (PAGES * 16 * 2 * 128) as usize;
    let (k, v): (Vec<bf16>, Vec<bf16>) = (random.normal(count), random.normal(count));
    let q: Vec<bf16> = random.normal((rows * 8 * 128) as usize);
    let up = |values: &[bf16]| stream.clone_htod(values).unwrap();
    let mut draw = || {
        let mut batch = Batch::paged(16, PAGES).unwrap();
        let mut left = rows;
        for request in 0..1 + below(&mut random, requests) {
            let queries = if one { 1 } else { 1 + below(&mut random, (left - (requests - request)).clamp(1, 30)) };
            left -= queries;
            let longest = [10, 1000][below(&mut random, 2) as usize];
            let keys = queries + below(&mut random, longest);
            let pages: Vec<i32> = (0..(keys + 15) / 16).map(|_| below(&mut random, PAGES - 1) as i32).collect();
            if batch.page_count() + pages.len() <= 390 {
                batch.push(queries, &pages, keys).unwrap();
            }
        }
        if batch.requests() == 0 {
            batch.push(1, &[0], 1).unwrap();
        }
        batch
    };
    let captured = |batch: &Batch| {
        let plan = GraphPlan::new(spec, room, batch, stream).unwrap();
        let o = up(&vec![bf16::POISON; q.len()]);
        let mut graph = LaunchGraph::new(stream, (plan, up(&q), o, up(&k), up(&v))).unwrap();
        graph
            .capture(|s, (plan, q, mut o, mut k, mut v)| {
                let cache_shape = shape(&spec, PAGES);
                let cache = PagedKvCache::new(k.write(&cache_shape)?, v.write(&cache_shape)?, spec.layout())?;
                let (q, mut o) = (q.read(&[rows, 8, 128])?, o.write(&[rows, 8, 128])?);
                // Twice, as two layers would.
                plan.run(&mut o, None, &q, &cache, &AttentionOptions::default(), s)?;
                plan.run(&mut o, None, &q, &cache, &AttentionOptions::default(), s)
            })
            .unwrap();
        graph
    };
    let mut graph = captured(&draw());
    graph.launch().unwrap();
    planned_anew((40, 8), &mut graph, draw, captured, (of_a_layer, 8 * 128), |round, batch, found| {
        // And without a graph it is the same but for how contexts are divided.
        let input = Input { pages: PAGES, q: q[..found.len()].to_vec(), k: k.clone(), v: v.clone(), batch };
        let (plain, _) = on_gpu(stream, spec, &input, &AttentionOptions::default());
        assert_close(&format!("round {round}"), &widened(found), &plain, 1e-2);
    });
    // What there is no room for is refused, and the graph has the plan that it had.
    let bits = |found: Vec<bf16>| found.into_iter().map(bf16::to_bits).collect::<Vec<_>>();
    let before = bits(stream.clone_dtoh(&graph.buffers().unwrap().2).unwrap());
    let mut large = Batch::paged(16, PAGES).unwrap();
    large.push(1, &vec![0; 391], 391 * 16).unwrap();
    let error = graph.buffers().unwrap().0.replan(&large).unwrap_err().to_string();
    assert!(error.contains("at most 390"), "{error}");
    graph.launch().unwrap();
    assert!(bits(stream.clone_dtoh(&graph.buffers().unwrap().2).unwrap()) == before);
}

/// As [`replanned`], of keys that lie one after the other, in tensors with room for more of them.
fn replanned_ragged(gpu: &Gpu, facts: AttentionBuilder) {
    const KEYS: i64 = 4000;
    let (spec, stream, rows) = (facts.build().unwrap(), &gpu.stream, 90i64);
    let mut random = Random(9);
    let count = (KEYS * 2 * 128) as usize;
    let (k, v): (Vec<bf16>, Vec<bf16>) = (random.normal(count), random.normal(count));
    let q: Vec<bf16> = random.normal((rows * 8 * 128) as usize);
    let up = |values: &[bf16]| stream.clone_htod(values).unwrap();
    let mut draw = || {
        let mut batch = Batch::ragged();
        for _ in 0..1 + below(&mut random, 6) {
            let queries = 1 + below(&mut random, 15);
            let longest = [10, 600][below(&mut random, 2) as usize];
            batch.push_ragged(queries, queries + below(&mut random, longest)).unwrap();
        }
        batch
    };
    let captured = |batch: &Batch| {
        let plan = GraphPlan::new(spec, GraphRoom::ragged(6, rows, KEYS as usize), batch, stream).unwrap();
        let o = up(&vec![bf16::POISON; q.len()]);
        let mut graph = LaunchGraph::new(stream, (plan, up(&q), o, up(&k), up(&v))).unwrap();
        graph
            .capture(|s, (plan, q, mut o, k, v)| {
                let (q, mut o) = (q.read(&[rows, 8, 128])?, o.write(&[rows, 8, 128])?);
                let (k, v) = (k.read(&[KEYS, 2, 128])?, v.read(&[KEYS, 2, 128])?);
                plan.run_ragged(&mut o, None, &q, (&k, &v), &AttentionOptions::default(), s)
            })
            .unwrap();
        graph
    };
    let mut graph = captured(&draw());
    graph.launch().unwrap();
    planned_anew((24, 6), &mut graph, draw, captured, (of_a_layer, 8 * 128), |round, batch, found| {
        // And the reference's, but for rounding.
        let mut exact = vec![bf16::ZERO; found.len()];
        let (o_shape, kv_shape) = ([batch.rows(), 8, 128], [batch.keys(), 2, 128]);
        let keys = (batch.keys() * 256) as usize;
        let read = |values, shape: &[i64]| TensorRef::from_slice::<bf16>(values, shape).unwrap();
        let mut host = Workspace::on_host(spec);
        host.plan(&batch)
            .unwrap()
            .run_ragged(
                &mut TensorMut::from_slice(&mut exact, &o_shape).unwrap(),
                None,
                &read(&q[..found.len()], &o_shape),
                (&read(&k[..keys], &kv_shape), &read(&v[..keys], &kv_shape)),
                &AttentionOptions::default(),
            )
            .unwrap();
        assert_close(&format!("round {round}"), &widened(found), &widened(&exact), tolerance(DType::BF16));
    });
}

fn replanned_latent(gpu: &Gpu, facts: AttentionBuilder) {
    const PAGES: i64 = 200;
    let (spec, stream) = (facts.build().unwrap(), &gpu.stream);
    let room = GraphRoom { requests: 5, rows: 5, pages: 190, reserved_page: 199 };
    let mut random = Random(9);
    let tokens = (PAGES * 16) as usize;
    let (ckv, kpe): (Vec<bf16>, Vec<bf16>) = (random.normal(tokens * 512), random.normal(tokens * 64));
    let (nope, pe): (Vec<bf16>, Vec<bf16>) = (random.normal(5 * 16 * 512), random.normal(5 * 16 * 64));
    let up = |values: &[bf16]| stream.clone_htod(values).unwrap();
    let mut draw = || {
        let mut batch = Batch::paged(16, PAGES).unwrap();
        for _ in 0..1 + below(&mut random, 5) {
            let keys = 1 + below(&mut random, 500);
            let pages: Vec<i32> = (0..(keys + 15) / 16).map(|_| below(&mut random, PAGES - 1) as i32).collect();
            batch.push(1, &pages, keys).unwrap();
        }
        batch
    };
    let captured = |batch: &Batch| {
        let plan = GraphPlan::new(spec, room, batch, stream).unwrap();
        let o = up(&vec![bf16::POISON; 5 * 16 * 512]);
        let buffers = (plan, up(&nope), up(&pe), o, up(&ckv), up(&kpe));
        let mut graph = LaunchGraph::new(stream, buffers).unwrap();
        graph
            .capture(|s, (plan, nope, pe, mut o, mut ckv, mut kpe)| {
                let cache = PagedMlaCache::new(ckv.write(&[PAGES, 16, 512])?, kpe.write(&[PAGES, 16, 64])?)?;
                let (nope, pe) = (nope.read(&[5, 16, 512])?, pe.read(&[5, 16, 64])?);
                let queries = LatentQueries { q_nope: &nope, q_pe: &pe };
                plan.run_mla(&mut o.write(&[5, 16, 512])?, None, &queries, &cache, s)
            })
            .unwrap();
        graph
    };
    let mut graph = captured(&draw());
    planned_anew((12, 4), &mut graph, draw, captured, (of_a_latent_layer, 16 * 512), |_, _, _| {});
}

/// Attention over two parts of a context, merged, is attention over the whole.
fn merged(gpu: &Gpu, facts: AttentionBuilder) {
    let (spec, stream) = (facts.build().unwrap(), &gpu.stream);
    if FlashInferRuntime::global().unwrap().module("cascade.so").is_err() {
        panic!("this test needs cascade.so, which the feature attention vendors too");
    }
    let whole = input::<bf16>(3, &spec, &[(20, 640)]);
    let options = AttentionOptions::default();
    let (expected, exact) = on_host(spec, &whole, &options);
    // The same pages, in two batches.
    let pages: Vec<i32> = pages_of(&whole);
    let part = |pages: &[i32], keys| {
        let mut batch = Batch::paged(16, whole.pages).unwrap();
        batch.push(20, pages, keys).unwrap();
        Input { batch, pages: whole.pages, q: whole.q.clone(), k: whole.k.clone(), v: whole.v.clone() }
    };
    let parts = [part(&pages[..10], 160), part(&pages[10..], 480)];
    let mut workspace = Workspace::new(spec, Largest::new(1, 20), stream).unwrap();
    let mut on = parts.each_ref().map(|input| OnGpu::new(stream, &spec, input));
    for (input, on) in parts.iter().zip(&mut on) {
        let plan = workspace.plan(&input.batch).unwrap();
        on.run(stream, &plan, &spec, input.pages, &options);
    }
    let mut o = stream.alloc_zeros::<bf16>(expected.len()).unwrap();
    let mut lse = stream.alloc_zeros::<f32>(exact.len()).unwrap();
    let tensor = |buffer| TensorRef::from_cudarc(stream, buffer, &[20, 8, 128]).unwrap();
    let numbers = |buffer| TensorRef::from_cudarc(stream, buffer, &[20, 8]).unwrap();
    merge_state(
        &mut TensorMut::from_cudarc(stream, &mut o, &[20, 8, 128]).unwrap(),
        &mut TensorMut::from_cudarc(stream, &mut lse, &[20, 8]).unwrap(),
        (&tensor(&on[0].o), &numbers(&on[0].lse)),
        (&tensor(&on[1].o), &numbers(&on[1].lse)),
        Stream::cudarc(stream),
    )
    .unwrap();
    assert_close("merged", &widened(&stream.clone_dtoh(&o).unwrap()), &expected, tolerance(DType::BF16));
    assert_logarithms("merged", &stream.clone_dtoh(&lse).unwrap(), &exact, 4e-3);
}

/// The pages of a batch of one request, by where its keys are not NaN: in the order that the generator drew them.
fn pages_of(input: &Input<bf16>) -> Vec<i32> {
    let mut random = Random(3);
    let mut free: Vec<i32> = (0..input.pages as i32).collect();
    for i in 0..free.len() {
        let other = i + below(&mut random, (free.len() - i) as i64) as usize;
        free.swap(i, other);
    }
    free.truncate(40);
    free
}

/// What every backend answers for batches of two types beside torch's scaled_dot_product_attention, in one process of Python's.
#[cfg(feature = "bench")]
fn beside_torch(gpu: &Gpu) {
    let folder = tempfile::tempdir().unwrap();
    let mut files = Vec::new();
    for dtype in [DType::BF16, DType::F16] {
        for (kind, backend) in [
            (Kind::Paged, Backend::Fa2),
            (Kind::Paged, Backend::Fa3),
            (Kind::Decode, Backend::Fa2),
            (Kind::Decode, Backend::CudaCores),
        ] {
            let facts = match kind {
                Kind::Decode => AttentionSpec::decode(dtype, (8, 2), 128, 16),
                _ => AttentionSpec::paged(dtype, (8, 2), 128, 16).causal(true),
            };
            let spec = facts.backend(backend).build().unwrap();
            if !is_there(&spec.module(backend), "") {
                continue;
            }
            let file = folder.path().join(format!("{dtype}-{kind:?}-{backend:?}.safetensors"));
            match dtype {
                DType::BF16 => write_for_torch::<bf16>(gpu, spec, &file),
                _ => write_for_torch::<f16>(gpu, spec, &file),
            }
            files.push(file);
        }
    }
    assert!(!files.is_empty(), "there is no module of heads of 128");
    torch::compare(&files.iter().map(std::path::PathBuf::as_path).collect::<Vec<_>>());
}

#[cfg(feature = "bench")]
fn write_for_torch<T: Number>(gpu: &Gpu, spec: AttentionSpec, file: &std::path::Path) {
    let requests: Requests = match spec.kind() {
        Kind::Decode => &[(1, 1), (1, 3000), (1, 16), (1, 333)],
        _ => &[(70, 70), (40, 200), (1, 3000), (5, 900)],
    };
    let input = input::<T>(7, &spec, requests);
    let options = AttentionOptions::default();
    let (rows, heads, size) = (input.batch.rows(), spec.heads(), spec.head_dims().0);
    let mut on = OnGpu::new(&gpu.stream, &spec, &input);
    let mut workspace = Workspace::new(spec, Largest::new(requests.len() as i64, rows), &gpu.stream).unwrap();
    let plan = workspace.plan(&input.batch).unwrap();
    on.run(&gpu.stream, &plan, &spec, input.pages, &options);
    let (o, lse) = (gpu.stream.clone_dtoh(&on.o).unwrap(), gpu.stream.clone_dtoh(&on.lse).unwrap());
    // The keys of each request one after the other, by the pages that the batch was made with.
    let per_page = (spec.page_size() * heads.1 * size) as usize;
    let ordered = |cache: &[T]| -> Vec<T> {
        let mut pages = pages_of_requests(7, &spec, requests).into_iter();
        let tokens = requests.iter().flat_map(|(_, keys)| {
            let own = pages.next().unwrap();
            let all = own.iter().flat_map(|page| &cache[*page as usize * per_page..][..per_page]);
            all.copied().take((keys * heads.1 * size) as usize).collect::<Vec<_>>()
        });
        tokens.collect()
    };
    let (k, v) = (ordered(&input.k), ordered(&input.v));
    let (causal, scale) = (spec.kind() != Kind::Decode, spec.sm_scale());
    torch::Computed { heads, size, causal, scale, requests, q: &input.q, k: &k, v: &v, o: &o, lse: &lse }.write(file);
}
