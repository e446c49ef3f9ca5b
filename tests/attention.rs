//! Attention on the host: what the oracle computes, what specifications, batches and calls refuse, and the modules' names.

#[cfg(feature = "bench")]
#[path = "support/torch.rs"]
#[allow(dead_code, reason = "whether torch is there is said by whoever asks for the test")]
mod torch;

use flashinfer_rs::attention::{
    AttentionBuilder, AttentionOptions, AttentionSpec, Backend, Batch, DecodeTable, Kind, LatentQueries, Workspace,
    XqaDecode,
};
use flashinfer_rs::kernels::cascade::merge_state;
use flashinfer_rs::kernels::page::{KvLayout, PagedKvCache, PagedMlaCache};
use flashinfer_rs::{
    DType, Device, FlashInferError, FlashInferRuntime, PageTable, Placed, Result, RuntimeConfig, Stream, TensorMut,
    TensorRef,
};

fn start() {
    FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
}

/// The argument that an error names, and what it says.
#[track_caller]
fn names<T: std::fmt::Debug>(result: Result<T>, argument: &str, says: &str) {
    match result.unwrap_err() {
        FlashInferError::InvalidArgument { argument: named, found, expected, .. } => {
            let text = format!("{found}; expected {expected}");
            assert_eq!(named, argument, "{text}");
            assert!(text.contains(says), "{text:?} does not say {says:?}");
        }
        other => panic!("{other}"),
    }
}

/// Numbers that look like noise, always the same.
fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// A cache on the host, and its sizes.
struct Cache {
    k: Vec<f32>,
    v: Vec<f32>,
    shape: [i64; 4],
    layout: KvLayout,
}

impl Cache {
    fn new(pages: i64, page_size: i64, heads: i64, size: i64, seed: u64) -> Self {
        let count = (pages * page_size * heads * size) as usize;
        let shape = [pages, page_size, heads, size];
        Self { k: noise(count, seed), v: noise(count, seed + 1), shape, layout: KvLayout::Nhd }
    }

    /// The same keys and values, with each head's tokens together.
    fn of_heads(&self) -> Self {
        let [pages, page_size, heads, size] = self.shape;
        let turned = |values: &[f32]| {
            let mut turned = vec![0.0; values.len()];
            for page in 0..pages {
                for token in 0..page_size {
                    for head in 0..heads {
                        let from = (((page * page_size + token) * heads + head) * size) as usize;
                        let to = (((page * heads + head) * page_size + token) * size) as usize;
                        turned[to..to + size as usize].copy_from_slice(&values[from..from + size as usize]);
                    }
                }
            }
            turned
        };
        let (k, v) = (turned(&self.k), turned(&self.v));
        Self { k, v, shape: [pages, heads, page_size, size], layout: KvLayout::Hnd }
    }

    fn tensors(&mut self) -> PagedKvCache<'_> {
        let Self { k, v, shape, layout } = self;
        PagedKvCache::new(TensorMut::from_slice(k, shape).unwrap(), TensorMut::from_slice(v, shape).unwrap(), *layout)
            .unwrap()
    }

    /// Where a token's numbers start, in NHD.
    fn at(&self, page: i32, entry: usize, head: usize) -> usize {
        let [_, page_size, heads, size] = self.shape.map(|n| n as usize);
        ((page as usize * page_size + entry) * heads + head) * size
    }
}

/// Plans and runs on the host: results and logarithms.
fn run(spec: AttentionSpec, batch: &Batch, q: &[f32], cache: &mut Cache) -> (Vec<f32>, Vec<f32>) {
    let mut workspace = Workspace::on_host(spec);
    let plan = workspace.plan(batch).unwrap();
    let (rows, heads, size) = (batch.rows(), spec.heads().0, spec.head_dims().1);
    let (mut o, mut lse) = (vec![0.0; (rows * heads * size) as usize], vec![0.0; (rows * heads) as usize]);
    plan.run(
        &mut TensorMut::from_slice(&mut o, &[rows, heads, size]).unwrap(),
        Some(&mut TensorMut::from_slice(&mut lse, &[rows, heads]).unwrap()),
        &TensorRef::from_slice(q, &[rows, heads, size]).unwrap(),
        &cache.tensors(),
        &AttentionOptions::default(),
    )
    .unwrap();
    (o, lse)
}

fn paged(heads: (i64, i64)) -> AttentionBuilder {
    AttentionSpec::paged(DType::F32, heads, 64, 4)
}

/// Which keys a query sees: with queries of zeros every key that is seen has the same weight, and with values that are each 1 in
/// a dimension of its own the result tells which.
fn seen(builder: AttentionBuilder, queries: i64, keys: i64) -> Vec<Vec<usize>> {
    let mut cache = Cache::new(16, 4, 1, 64, 3);
    let pages: Vec<i32> = (0..(keys + 3) as i32 / 4).map(|page| 15 - page).collect();
    cache.v.fill(0.0);
    for key in 0..keys as usize {
        let at = cache.at(pages[key / 4], key % 4, 0);
        cache.v[at + key] = 1.0;
    }
    let mut batch = Batch::paged(4, 16).unwrap();
    batch.push(queries, &pages, keys).unwrap();
    let (o, lse) = run(builder.build().unwrap(), &batch, &vec![0.0; queries as usize * 64], &mut cache);
    let rows = o.chunks_exact(64).zip(lse).map(|(row, lse)| {
        let seen: Vec<_> = (0..64).filter(|key| row[*key] != 0.0).collect();
        seen.iter().for_each(|key| assert!((row[*key] - 1.0 / seen.len() as f32).abs() < 1e-6));
        assert!((lse - (seen.len() as f32).log2()).abs() < 1e-5, "{lse} of {}", seen.len());
        seen
    });
    rows.collect()
}

#[test]
fn without_a_mask_every_query_sees_every_key() {
    start();
    assert_eq!(seen(paged((1, 1)), 3, 5), vec![vec![0, 1, 2, 3, 4]; 3]);
    assert_eq!(seen(paged((1, 1)), 4, 2), vec![vec![0, 1]; 4], "more queries than keys");
}

#[test]
fn a_causal_mask_is_aligned_to_the_end() {
    start();
    let causal = paged((1, 1)).causal(true);
    assert_eq!(seen(causal, 3, 5), [vec![0, 1, 2], vec![0, 1, 2, 3], vec![0, 1, 2, 3, 4]]);
    assert_eq!(seen(causal, 3, 3), [vec![0], vec![0, 1], vec![0, 1, 2]]);
    assert_eq!(seen(causal, 1, 9), [(0..9).collect::<Vec<_>>()], "a lone query sees everything");
}

#[test]
fn a_window_reaches_so_many_keys_back_and_has_the_own_one_too() {
    start();
    let window = |keys| paged((1, 1)).causal(true).window(keys);
    assert_eq!(seen(window(2), 3, 6), [vec![1, 2, 3], vec![2, 3, 4], vec![3, 4, 5]]);
    assert_eq!(seen(window(0), 2, 6), [vec![4], vec![5]]);
    assert_eq!(seen(window(100), 2, 6), [(0..5).collect::<Vec<_>>(), (0..6).collect()]);
    let decode = AttentionSpec::decode(DType::F32, (1, 1), 64, 4).window(3);
    assert_eq!(seen(decode, 1, 9), [vec![5, 6, 7, 8]], "without a causal mask, where there is one query");
}

/// A random batch over scattered pages, of which the first request's are the second's too.
fn scattered(random: &mut impl FnMut(i64) -> i64, page_size: i64, pages: i64) -> Batch {
    let mut batch = Batch::paged(page_size, pages).unwrap();
    let mut first = Vec::new();
    for request in 0..4 {
        let keys = 1 + random(5 * page_size);
        let count = (keys + page_size - 1) / page_size;
        let mut own: Vec<i32> = (0..count).map(|_| random(pages) as i32).collect();
        if request == 1 {
            let shared = first.len().min(own.len());
            own[..shared].copy_from_slice(&first[..shared]);
        }
        let queries = 1 + random(keys.min(6));
        batch.push(queries, &own, keys).unwrap();
        first = own;
    }
    batch
}

fn random(seed: u64) -> impl FnMut(i64) -> i64 {
    let mut state = seed | 1;
    move |below| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) as i64) % below
    }
}

#[test]
fn every_layout_and_every_place_of_the_keys_answer_the_same_bits() {
    start();
    for seed in 0..6 {
        let mut random = random(seed * 2 + 1);
        let page_size = [1, 4, 5][seed as usize % 3];
        let heads = [(4, 2), (3, 1), (2, 2)][seed as usize % 3];
        let batch = scattered(&mut random, page_size, 12);
        let mut cache = Cache::new(12, page_size, heads.1, 64, seed);
        let facts = AttentionSpec::paged(DType::F32, heads, 64, page_size).causal(true).window(7).soft_cap(3.0);
        let q = noise((batch.rows() * heads.0 * 64) as usize, 77);
        let whole = run(facts.build().unwrap(), &batch, &q, &mut cache);
        let of_heads = run(facts.layout(KvLayout::Hnd).build().unwrap(), &batch, &q, &mut cache.of_heads());
        assert_eq!(whole, of_heads, "seed {seed}");

        // The same keys one after the other.
        let mut ragged = Batch::ragged();
        let (mut k, mut v) = (Vec::new(), Vec::new());
        let per_token = (heads.1 * 64) as usize;
        let mut page = Vec::new();
        let mut rebuilt = self::random(seed * 2 + 1);
        // As the batch was made: the same numbers in the same order.
        let again = scattered(&mut rebuilt, page_size, 12);
        assert_eq!(again, batch);
        for request in requests_of(&mut self::random(seed * 2 + 1), page_size, 12) {
            page.clone_from(&request.pages);
            ragged.push_ragged(request.queries, request.keys).unwrap();
            for key in 0..request.keys as usize {
                let at = cache.at(page[key / page_size as usize], key % page_size as usize, 0);
                k.extend_from_slice(&cache.k[at..at + per_token]);
                v.extend_from_slice(&cache.v[at..at + per_token]);
            }
        }
        let spec =
            AttentionSpec::ragged(DType::F32, heads, (64, 64)).causal(true).window(7).soft_cap(3.0).build().unwrap();
        let mut workspace = Workspace::on_host(spec);
        let plan = workspace.plan(&ragged).unwrap();
        let (rows, keys) = (batch.rows(), batch.keys());
        let mut o = vec![0.0; q.len()];
        plan.run_ragged(
            &mut TensorMut::from_slice(&mut o, &[rows, heads.0, 64]).unwrap(),
            None,
            &TensorRef::from_slice(&q, &[rows, heads.0, 64]).unwrap(),
            (
                &TensorRef::from_slice(&k, &[keys, heads.1, 64]).unwrap(),
                &TensorRef::from_slice(&v, &[keys, heads.1, 64]).unwrap(),
            ),
            &AttentionOptions::default(),
        )
        .unwrap();
        assert_eq!(o, whole.0, "seed {seed}");
    }
}

struct Request {
    queries: i64,
    keys: i64,
    pages: Vec<i32>,
}

/// The requests of [`scattered`], by the same draws.
fn requests_of(random: &mut impl FnMut(i64) -> i64, page_size: i64, pages: i64) -> Vec<Request> {
    let (mut requests, mut first): (Vec<Request>, Vec<i32>) = (Vec::new(), Vec::new());
    for request in 0..4 {
        let keys = 1 + random(5 * page_size);
        let count = (keys + page_size - 1) / page_size;
        let mut own: Vec<i32> = (0..count).map(|_| random(pages) as i32).collect();
        if request == 1 {
            let shared = first.len().min(own.len());
            own[..shared].copy_from_slice(&first[..shared]);
        }
        let queries = 1 + random(keys.min(6));
        first.clone_from(&own);
        requests.push(Request { queries, keys, pages: own });
    }
    requests
}

fn close(found: &[f32], expected: &[f32], within: f32) {
    assert_eq!(found.len(), expected.len());
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= within * (1.0 + b.abs()), "{a} and {b} at {i}");
    }
}

#[test]
fn the_parts_of_a_context_merge_into_the_whole() {
    start();
    let mut cache = Cache::new(8, 4, 2, 64, 5);
    let spec = paged((4, 2)).build().unwrap();
    let q = noise(3 * 4 * 64, 9);
    let pages = [6, 1, 3, 0, 2];
    let mut parts = Vec::new();
    for (pages, keys) in [(&pages[..], 18), (&pages[..2], 8), (&pages[2..], 10)] {
        let mut batch = Batch::paged(4, 8).unwrap();
        batch.push(3, pages, keys).unwrap();
        parts.push(run(spec, &batch, &q, &mut cache));
    }
    let (mut merged, mut logarithms) = (vec![0.0; q.len()], vec![0.0; 12]);
    let state = |part: &(Vec<f32>, Vec<f32>)| {
        (TensorRef::from_slice(&part.0, &[3, 4, 64]).unwrap().shape().to_vec(), part.1.len())
    };
    assert_eq!(state(&parts[1]), (vec![3, 4, 64], 12));
    let tensor = |values| TensorRef::from_slice(values, &[3, 4, 64]).unwrap();
    let numbers = |values| TensorRef::from_slice(values, &[3, 4]).unwrap();
    merge_state(
        &mut TensorMut::from_slice(&mut merged, &[3, 4, 64]).unwrap(),
        &mut TensorMut::from_slice(&mut logarithms, &[3, 4]).unwrap(),
        (&tensor(&parts[1].0), &numbers(&parts[1].1)),
        (&tensor(&parts[2].0), &numbers(&parts[2].1)),
        Stream::NULL,
    )
    .unwrap();
    close(&merged, &parts[0].0, 1e-5);
    close(&logarithms, &parts[0].1, 1e-5);
}

#[test]
fn a_soft_cap_bounds_logits_before_the_mask() {
    start();
    let mut cache = Cache::new(1, 4, 1, 64, 5);
    // Products of 64 and of -64: the one is capped to nearly 2, the other to nearly -2.
    for key in 0..2 {
        let (k, v) = (cache.at(0, key, 0), cache.at(0, key, 0));
        cache.k[k..k + 64].fill(if key == 0 { 1.0 } else { -1.0 });
        cache.v[v..v + 64].fill(if key == 0 { 1.0 } else { 0.0 });
    }
    let mut batch = Batch::paged(4, 1).unwrap();
    batch.push(1, &[0], 2).unwrap();
    let spec = paged((1, 1)).soft_cap(2.0).sm_scale(1.0).build().unwrap();
    let (o, lse) = run(spec, &batch, &[1.0; 64], &mut cache);
    let (high, low) = (2.0 * 32f64.tanh(), 2.0 * (-32f64).tanh());
    let total = high.exp() + low.exp();
    close(&o, &vec![(high.exp() / total) as f32; 64], 1e-6);
    close(&lse, &[total.log2() as f32], 1e-6);
}

#[test]
fn a_sink_takes_its_part_of_the_weights() {
    start();
    let mut cache = Cache::new(2, 4, 1, 64, 5);
    let mut batch = Batch::paged(4, 2).unwrap();
    batch.push(2, &[1, 0], 7).unwrap();
    let q = noise(2 * 2 * 64, 3);
    let facts = paged((2, 1)).causal(true);
    let (plain, lse) = run(facts.build().unwrap(), &batch, &q, &mut cache);
    let mut workspace = Workspace::on_host(facts.sinks().build().unwrap());
    let plan = workspace.plan(&batch).unwrap();
    let (mut o, mut with_sink) = (vec![0.0; q.len()], vec![0.0; 4]);
    let sinks = [0.5f32, -3.0];
    let options = AttentionOptions::default().with_sink(TensorRef::from_slice(&sinks, &[2]).unwrap());
    let (q, shape) = (TensorRef::from_slice(&q, &[2, 2, 64]).unwrap(), [2, 2, 64]);
    let mut results = TensorMut::from_slice(&mut o, &shape).unwrap();
    let mut logarithms = TensorMut::from_slice(&mut with_sink, &[2, 2]).unwrap();
    plan.run(&mut results, Some(&mut logarithms), &q, &cache.tensors(), &options).unwrap();
    names(plan.run(&mut results, None, &q, &cache.tensors(), &AttentionOptions::default()), "sink", "none");
    for (i, sink) in [(0, 0.5f32), (1, -3.0), (2, 0.5), (3, -3.0)] {
        let without = lse[i].exp2();
        let with = without + sink.exp();
        close(&o[i * 64..][..64], &plain[i * 64..][..64].iter().map(|x| x * without / with).collect::<Vec<_>>(), 1e-5);
        close(&with_sink[i..=i], &[with.log2()], 1e-5);
    }
}

#[test]
fn keys_in_8_bits_are_what_they_stand_for_times_their_scale() {
    start();
    // 1.5, -0.25 and 448 in F8E4M3.
    let numbers = [(0x3Cu8, 1.5f32), (0xA8, -0.25), (0x7E, 448.0), (0x00, 0.0)];
    let count = 2 * 4 * 64;
    let of = |i: usize| numbers[(i * 7 + i / 64) % 4];
    let (mut bytes_k, mut bytes_v): (Vec<u8>, Vec<u8>) =
        ((0..count).map(|i| of(i).0).collect(), (0..count).map(|i| of(i + 3).0).collect());
    let mut cache = Cache::new(2, 4, 1, 64, 5);
    cache.k = (0..count).map(|i| of(i).1).collect();
    cache.v = (0..count).map(|i| of(i + 3).1).collect();
    let mut batch = Batch::paged(4, 2).unwrap();
    batch.push(2, &[1, 0], 7).unwrap();
    let q: Vec<half::bf16> = noise(2 * 64, 3).into_iter().map(half::bf16::from_f32).collect();
    let wide: Vec<f32> = q.iter().map(|x| x.to_f32()).collect();
    let (expected, _) = run(paged((1, 1)).sm_scale(0.002 * 0.5).build().unwrap(), &batch, &wide, &mut cache);
    let spec =
        AttentionSpec::paged(DType::BF16, (1, 1), 64, 4).kv_dtype(DType::F8E4M3).sm_scale(0.002).build().unwrap();
    let mut workspace = Workspace::on_host(spec);
    let plan = workspace.plan(&batch).unwrap();
    let mut o = vec![half::bf16::ZERO; 2 * 64];
    let shape = [2, 4, 1, 64];
    // SAFETY: as many bytes as the shape says.
    let [k, v] = [&mut bytes_k, &mut bytes_v].map(|bytes| unsafe {
        TensorMut::from_raw(bytes.as_mut_ptr().cast(), Device::Cpu, DType::F8E4M3, &shape, None).unwrap()
    });
    let cache = PagedKvCache::new(k, v, KvLayout::Nhd).unwrap();
    let mut results = TensorMut::from_slice(&mut o, &[2, 1, 64]).unwrap();
    let q = TensorRef::from_slice(&q, &[2, 1, 64]).unwrap();
    plan.run(&mut results, None, &q, &cache, &AttentionOptions::default().with_k_scale(0.5)).unwrap();
    for scale in [0.0, -1.0, 1e-4, f64::NAN, f64::INFINITY] {
        let options = AttentionOptions::default().with_k_scale(scale);
        names(plan.run(&mut results, None, &q, &cache, &options), "k_scale", "0.001");
    }
    close(&o.iter().map(|x| x.to_f32()).collect::<Vec<_>>(), &expected, 4e-3);
}

#[test]
fn latent_attention_is_attention_of_both_parts_over_the_compressed_one() {
    start();
    let (pages, page_size, heads, rows) = (3i64, 4i64, 2i64, 3i64);
    let tokens = (pages * page_size) as usize;
    let (mut ckv, mut kpe) = (noise(tokens * 512, 1), noise(tokens * 64, 2));
    let (q_nope, q_pe) = (noise((rows * heads) as usize * 512, 3), noise((rows * heads) as usize * 64, 4));
    let mut batch = Batch::paged(page_size, pages).unwrap();
    batch.push(2, &[2, 0], 7).unwrap();
    batch.push(1, &[1], 4).unwrap();
    let scale = 0.07;
    let spec = AttentionSpec::mla(DType::F32, heads, page_size).causal(true).sm_scale(scale).build().unwrap();
    let mut workspace = Workspace::on_host(spec);
    let plan = workspace.plan(&batch).unwrap();
    let (mut o, mut lse) = (vec![0.0; q_nope.len()], vec![0.0; (rows * heads) as usize]);
    let cache = PagedMlaCache::new(
        TensorMut::from_slice(&mut ckv, &[pages, page_size, 512]).unwrap(),
        TensorMut::from_slice(&mut kpe, &[pages, page_size, 64]).unwrap(),
    )
    .unwrap();
    let (nope, pe) = (
        TensorRef::from_slice(&q_nope, &[rows, heads, 512]).unwrap(),
        TensorRef::from_slice(&q_pe, &[rows, heads, 64]).unwrap(),
    );
    plan.run_mla(
        &mut TensorMut::from_slice(&mut o, &[rows, heads, 512]).unwrap(),
        Some(&mut TensorMut::from_slice(&mut lse, &[rows, heads]).unwrap()),
        &LatentQueries { q_nope: &nope, q_pe: &pe },
        &cache,
    )
    .unwrap();
    // By hand: the tokens of each request, by its pages.
    let places = [vec![8, 9, 10, 11, 0, 1, 2], vec![4, 5, 6, 7]];
    for (row, (request, sees)) in [(0, 6), (0, 7), (1, 4)].into_iter().enumerate() {
        for head in 0..heads as usize {
            let at = row * heads as usize + head;
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(x * y)).sum::<f64>();
            let weights: Vec<f64> = places[request][..sees]
                .iter()
                .map(|&token: &usize| {
                    let compressed = dot(&q_nope[at * 512..][..512], &ckv[token * 512..][..512]);
                    let rotary = dot(&q_pe[at * 64..][..64], &kpe[token * 64..][..64]);
                    (scale * (compressed + rotary)).exp()
                })
                .collect();
            let total: f64 = weights.iter().sum();
            for d in [0, 17, 511] {
                let sum: f64 =
                    places[request].iter().zip(&weights).map(|(&t, w)| w * f64::from(ckv[t * 512 + d])).sum();
                close(&o[at * 512 + d..=at * 512 + d], &[(sum / total) as f32], 1e-4);
            }
            close(&lse[at..=at], &[total.log2() as f32], 1e-4);
        }
    }
}

#[test]
fn pages_that_no_request_has_may_hold_anything() {
    start();
    let mut batch = Batch::paged(4, 3).unwrap();
    batch.push(2, &[2], 3).unwrap();
    let q = noise(2 * 64, 3);
    let mut cache = Cache::new(3, 4, 1, 64, 5);
    let clean = run(paged((1, 1)).build().unwrap(), &batch, &q, &mut cache);
    cache.k[..2 * 4 * 64].fill(f32::NAN);
    cache.v[..2 * 4 * 64].fill(f32::INFINITY);
    assert_eq!(run(paged((1, 1)).build().unwrap(), &batch, &q, &mut cache), clean);
}

#[test]
fn the_tokens_of_a_step_are_its_queries() {
    let mut table = PageTable::new(4, 10, 100).unwrap();
    table.push(&[7, 3], 5).unwrap();
    table.push(&[9], 2).unwrap();
    table.push(&[1, 2, 4], 8).unwrap();
    let tokens = table.append(&[2, 0, 4]).unwrap();
    let batch = Batch::of_tokens(&tokens).unwrap();
    let mut expected = Batch::paged(4, 10).unwrap();
    expected.push(2, &[7, 3], 7).unwrap();
    expected.push(4, &[1, 2, 4], 12).unwrap();
    assert_eq!(batch, expected, "a request without new tokens is left out");
    assert_eq!(Batch::of_table(&table, &[2, 0, 4]).unwrap(), expected, "and so it is here");
    names(Batch::of_table(&table, &[1]), "queries", "one for each of the 3 requests");
    names(Batch::of_table(&table, &[1, -1, 0]), "queries", "-1 of request 1");
    // With room for more, which is filled with requests without pages.
    let tokens = table.append(&[1, 2, 0]).unwrap().with_room_for(20, 8).unwrap();
    assert_eq!(Batch::of_tokens(&tokens).unwrap().requests(), 2);
    let mut cleared = batch.clone();
    cleared.clear();
    assert_eq!(cleared, Batch::paged(4, 10).unwrap());
}

#[test]
fn a_batch_refuses_what_a_kernel_would_follow() {
    let mut batch = Batch::paged(4, 10).unwrap();
    batch.push(1, &[0], 1).unwrap();
    let before = batch.clone();
    names(batch.push(0, &[0], 1), "queries", "left out");
    names(batch.push(1, &[], 0), "keys", "0 of request 1");
    names(batch.push(-1, &[0], 1), "queries", "-1");
    names(batch.push(1, &[10], 1), "pages", "10 for request 1; expected 0 to 9");
    names(batch.push(1, &[-1], 1), "pages", "-1 for request 1");
    names(batch.push(1, &[0, 1], 4), "pages", "1, which 4 keys take");
    names(batch.push(1, &[0], 5), "pages", "2, which 5 keys take");
    names(batch.push(i64::MAX, &[0], 1), "queries", "2147483647");
    names(batch.push(1, &[0], i64::MAX), "keys", "2147483647");
    names(batch.push_ragged(1, 1), "pages", "push takes them");
    assert_eq!(batch, before, "nothing was changed");
    names(Batch::ragged().push(1, &[0], 1), "pages", "push_ragged");
    let mut ragged = Batch::ragged();
    ragged.push_ragged(1, (1 << 31) - 2).unwrap();
    names(ragged.push_ragged(1, 2), "keys", "2147483648 of all requests");
    let mut large = Batch::paged(1 << 20, 10).unwrap();
    large.push(1, &[0; 2000], 2000 << 20).unwrap();
    names(large.push(1, &[0; 100], 100 << 20), "pages", "2100 pages of 1048576 tokens");
    for (page_size, pages, name) in [(0, 1, "page_size"), (1, 0, "pages"), (1, 1 << 31, "pages")] {
        names(Batch::paged(page_size, pages), name, "1 to 2147483647");
    }
}

#[test]
fn a_specification_refuses_what_no_module_computes_and_what_release_0_6_3_computes_wrong() {
    let of = |dtype| AttentionSpec::paged(dtype, (8, 2), 128, 16);
    let bf16 = of(DType::BF16);
    // What deadlocks the GPU, and what ignores the cap.
    let eight = of(DType::F8E4M3).causal(true);
    names(eight.window(8).build(), "window", "never end");
    names(eight.soft_cap(30.0).build(), "soft_cap", "ignore it");
    names(eight.kv_dtype(DType::BF16).build(), "kv_dtype", "F8E4M3 keys, as the queries");
    names(eight.backend(Backend::Fa2).build(), "backend", "FA3, which alone");
    names(eight.out_dtype(DType::F8E4M3).build(), "out_dtype", "F16 or BF16");
    names(bf16.out_dtype(DType::F16).build(), "out_dtype", "BF16, as the queries");
    names(AttentionSpec::paged(DType::F8E4M3, (8, 2), 64, 16).build(), "head_dim", "128 or 256");
    names(AttentionSpec::paged(DType::F8E4M3, (8, 2), 64, 16).sinks().build(), "sinks", "no module has both");
    names(AttentionSpec::ragged(DType::F8E4M3, (8, 8), (192, 128)).build(), "head_dim", "128 or 256");
    names(AttentionSpec::decode(DType::F8E4M3, (8, 2), 128, 16).build(), "dtype", "decode; expected 16-bit queries");
    names(AttentionSpec::mla(DType::F8E4M3, 8, 16).sm_scale(0.1).build(), "dtype", "latent attention");
    names(of(DType::F8E5M2).build(), "dtype", "nothing is compiled");
    names(of(DType::I32).build(), "dtype", "F16 or BF16");
    names(bf16.kv_dtype(DType::F16).build(), "kv_dtype", "BF16, as the queries, or F8E4M3");
    names(bf16.kv_dtype(DType::F8E5M2).build(), "kv_dtype", "F8E4M3");
    names(bf16.window(8).build(), "window", "divides a context");
    names(bf16.causal(true).window(-1).build(), "window", "0 to 1073741824");
    for cap in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        names(bf16.soft_cap(cap).build(), "soft_cap", "0.001");
    }
    for scale in [0.0, -1.0, 1e-4, f64::NAN, f64::INFINITY] {
        names(bf16.sm_scale(scale).build(), "sm_scale", "0.001");
    }
    let heads = |q, kv| AttentionSpec::paged(DType::BF16, (q, kv), 128, 16).build();
    names(heads(7, 2), "q_heads", "a multiple of the 2 key heads");
    names(heads(2, 4), "q_heads", "a multiple");
    names(heads(0, 1), "q_heads", "1 to 65535");
    names(heads(4, 0), "kv_heads", "1 to 65535");
    for size in [0, 32, 80, 96, 192, 512] {
        names(AttentionSpec::paged(DType::BF16, (8, 2), size, 16).build(), "head_dim", "64, 128 or 256");
    }
    names(AttentionSpec::ragged(DType::BF16, (8, 8), (192, 64)).build(), "head_dim", "192 for queries");
    assert!(AttentionSpec::ragged(DType::BF16, (8, 8), (192, 128)).causal(true).build().is_ok());
    names(AttentionSpec::ragged(DType::BF16, (8, 8), (192, 128)).backend(Backend::Fa2).build(), "backend", "FA3");
    names(
        AttentionSpec::ragged(DType::BF16, (8, 8), (64, 64)).layout(KvLayout::Hnd).build(),
        "layout",
        "heads for tokens",
    );
    names(AttentionSpec::mla(DType::BF16, 8, 16).layout(KvLayout::Hnd).sm_scale(0.1).build(), "layout", "NHD");
    names(AttentionSpec::mla(DType::BF16, 8, 16).build(), "sm_scale", "absorbed");
    names(AttentionSpec::mla(DType::BF16, 8, 16).sm_scale(0.1).causal(true).window(3).build(), "window", "none");
    names(AttentionSpec::mla(DType::BF16, 8, 16).sm_scale(0.1).soft_cap(3.0).build(), "soft_cap", "none");
    names(AttentionSpec::mla(DType::BF16, 8, 16).sm_scale(0.1).sinks().build(), "sinks", "none");
    names(AttentionSpec::mla(DType::BF16, 8, 16).sm_scale(0.1).kv_dtype(DType::F8E4M3).build(), "kv_dtype", "latent");
    for page_size in [0, -1, (1 << 20) + 1] {
        names(AttentionSpec::paged(DType::BF16, (8, 2), 128, page_size).build(), "page_size", "1 to 1048576");
    }
    names(bf16.sinks().build(), "head_dim", "64");
    names(AttentionSpec::paged(DType::BF16, (8, 2), 64, 16).sinks().soft_cap(3.0).build(), "soft_cap", "no module");
    names(bf16.kv_dtype(DType::F8E4M3).backend(Backend::Fa3).build(), "backend", "two types");
    names(bf16.backend(Backend::CudaCores).build(), "backend", "one query for each request");
    let decode = |heads| AttentionSpec::decode(DType::BF16, heads, 128, 16);
    names(decode((7, 1)).backend(Backend::CudaCores).build(), "backend", "1, 2, 3, 4 or 8");
    names(decode((8, 1)).backend(Backend::Fa3).build(), "backend", "divide contexts");
    assert!(decode((7, 1)).window(8).build().is_ok(), "a window without a causal mask, of one query");
}

#[test]
fn the_backend_is_upstreams_choice_where_that_is_right() {
    let of = |builder: AttentionBuilder| builder.build().unwrap();
    let paged = AttentionSpec::paged(DType::BF16, (8, 2), 128, 16);
    assert_eq!(of(paged).backend((9, 0)), Backend::Fa3);
    for other in [(7, 5), (8, 0), (8, 9), (10, 0), (12, 0)] {
        assert_eq!(of(paged).backend(other), Backend::Fa2, "{other:?}");
    }
    // Upstream takes FA3 here, for which there is no module of two types.
    assert_eq!(of(paged.kv_dtype(DType::F8E4M3)).backend((9, 0)), Backend::Fa2);
    assert_eq!(of(paged.backend(Backend::Fa2)).backend((9, 0)), Backend::Fa2);
    // By the group alone: tensor cores from 4 on, and on older GPUs where CUDA cores have no kernel.
    for (group, new, old) in [
        (1, Backend::CudaCores, Backend::CudaCores),
        (2, Backend::CudaCores, Backend::CudaCores),
        (3, Backend::CudaCores, Backend::CudaCores),
        (4, Backend::Fa2, Backend::CudaCores),
        (5, Backend::Fa2, Backend::Fa2),
        (6, Backend::Fa2, Backend::Fa2),
        (7, Backend::Fa2, Backend::Fa2),
        (8, Backend::Fa2, Backend::CudaCores),
        (16, Backend::Fa2, Backend::Fa2),
    ] {
        let decode = AttentionSpec::decode(DType::F16, (2 * group, 2), 64, 16);
        assert_eq!(of(decode).backend((9, 0)), new, "groups of {group}");
        assert_eq!(of(decode).backend((8, 0)), new, "groups of {group}");
        assert_eq!(of(decode).backend((7, 5)), old, "groups of {group}");
        assert_eq!(of(decode.kv_dtype(DType::F8E4M3)).backend((9, 0)), new, "groups of {group}");
    }
    let eight = of(AttentionSpec::paged(DType::F8E4M3, (8, 2), 128, 16));
    assert_eq!(
        (eight.backend((9, 0)), eight.backend((8, 9))),
        (Backend::Fa3, Backend::Fa3),
        "which alone has 8-bit queries"
    );
    let decode = AttentionSpec::decode(DType::F16, (8, 1), 64, 16);
    assert_eq!(of(decode.backend(Backend::CudaCores)).backend((9, 0)), Backend::CudaCores, "what was asked for");
    assert_eq!(of(decode.backend(Backend::Fa2)).backend((7, 5)), Backend::Fa2, "what was asked for");
    assert_eq!(of(AttentionSpec::decode(DType::F16, (2, 1), 64, 16).sinks()).backend((7, 5)), Backend::Fa2);
    assert_eq!(of(AttentionSpec::mla(DType::BF16, 128, 64).sm_scale(0.07)).backend((9, 0)), Backend::Fa3);
}

#[test]
fn modules_have_upstreams_names() {
    let of = |builder: AttentionBuilder, backend| builder.build().unwrap().module(backend);
    let paged = AttentionSpec::paged(DType::BF16, (8, 2), 128, 16);
    let prefill = "batch_prefill_with_kv_cache_dtype_q_bf16_dtype_kv_bf16_dtype_o_bf16_dtype_idx_i32_head_dim_qk_128_head_dim_vo_128";
    let plain = "posenc_0_use_swa_False_use_logits_cap_False_f16qk_False";
    assert_eq!(of(paged, Backend::Fa2), format!("{prefill}_{plain}"));
    assert_eq!(of(paged, Backend::Fa3), format!("{prefill}_{plain}_sm90"));
    let decode = AttentionSpec::decode(DType::BF16, (8, 2), 128, 16);
    assert_eq!(of(decode, Backend::Fa2), format!("{prefill}_{plain}"), "a prefill with one query each");
    assert_eq!(
        of(decode.window(8).kv_dtype(DType::F8E4M3), Backend::CudaCores),
        "batch_decode_with_kv_cache_dtype_q_bf16_dtype_kv_e4m3_dtype_o_bf16_dtype_idx_i32_head_dim_qk_128_head_dim_vo_128_\
         posenc_0_use_swa_True_use_logits_cap_False"
    );
    assert_eq!(
        of(AttentionSpec::ragged(DType::F16, (8, 8), (192, 128)).soft_cap(30.0), Backend::Fa3),
        "batch_prefill_with_kv_cache_dtype_q_f16_dtype_kv_f16_dtype_o_f16_dtype_idx_i32_head_dim_qk_192_head_dim_vo_128_\
         posenc_0_use_swa_False_use_logits_cap_True_f16qk_False_sm90"
    );
    let eight = AttentionSpec::paged(DType::F8E4M3, (8, 2), 128, 16).causal(true);
    let name = |out| {
        format!(
            "batch_prefill_with_kv_cache_dtype_q_e4m3_dtype_kv_e4m3_dtype_o_{out}_dtype_idx_i32_head_dim_qk_128_head_dim_vo_128_\
             {plain}_sm90"
        )
    };
    assert_eq!(of(eight, Backend::Fa3), name("bf16"));
    assert_eq!(of(eight.out_dtype(DType::F16), Backend::Fa3), name("f16"));
    let sinks = AttentionSpec::paged(DType::BF16, (8, 2), 64, 16).causal(true).window(128).sinks();
    let name = "batch_prefill_with_attention_sink_kv_cache_dtype_q_bf16_dtype_kv_bf16_dtype_o_bf16_dtype_idx_i32_head_dim_qk_64_\
                head_dim_vo_64_use_swa_True_";
    assert_eq!(of(sinks, Backend::Fa2), name);
    assert_eq!(of(sinks, Backend::Fa3), format!("{name}_sm90"));
    let mla = AttentionSpec::mla(DType::BF16, 16, 64).sm_scale(0.1);
    let name = "batch_mla_attention_dtype_q_bf16_dtype_kv_bf16_dtype_o_bf16_dtype_idx_i32_head_dim_ckv_512_head_dim_kpe_64_profiler_False";
    assert_eq!((of(mla, Backend::Fa2), of(mla, Backend::Fa3)), (name.to_owned(), format!("{name}_sm90")));
}

/// Numbers that 8 bits have, in steps of 1/8, and as bytes of F8E4M3.
fn eight_bits(count: usize, seed: u64) -> (Vec<f32>, Vec<u8>) {
    let steps = noise(count, seed).into_iter().map(|x| (x * 8.0).round() / 8.0);
    let byte = |x: f32| {
        if x == 0.0 {
            return 0;
        }
        let exponent = x.abs().log2().floor();
        let mantissa = (x.abs() / exponent.exp2() - 1.0) * 8.0;
        (u8::from(x < 0.0) << 7) | ((exponent as i32 + 7) as u8) << 3 | mantissa as u8
    };
    steps.map(|x| (x, byte(x))).unzip()
}

#[test]
fn queries_in_8_bits_and_their_scales_are_what_they_stand_for() {
    start();
    let mut batch = Batch::ragged();
    batch.push_ragged(3, 7).unwrap();
    batch.push_ragged(2, 4).unwrap();
    let ((q, q_bytes), (k, k_bytes), (v, v_bytes)) =
        (eight_bits(5 * 4 * 128, 1), eight_bits(11 * 2 * 128, 2), eight_bits(11 * 2 * 128, 3));
    let run = |spec: AttentionSpec, [q, k, v]: [&TensorRef<'_>; 3], options: &AttentionOptions<'_>| {
        let mut o = vec![0f32; 5 * 4 * 128];
        let mut workspace = Workspace::on_host(spec);
        let mut results = TensorMut::from_slice(&mut o, &[5, 4, 128])?;
        workspace.plan(&batch)?.run_ragged(&mut results, None, q, (k, v), options).map(|()| o)
    };
    // SAFETY: as many bytes as the shapes say.
    let bytes = |values: &[u8], shape: &[i64]| unsafe {
        TensorRef::from_raw(values.as_ptr().cast(), Device::Cpu, DType::F8E4M3, shape, None).unwrap()
    };
    let (q_shape, kv_shape) = ([5, 4, 128], [11, 2, 128]);
    let eight = [bytes(&q_bytes, &q_shape), bytes(&k_bytes, &kv_shape), bytes(&v_bytes, &kv_shape)];
    let spec = |dtype| AttentionSpec::ragged(dtype, (4, 2), (128, 128)).causal(true);
    let facts = spec(DType::F8E4M3).out_dtype(DType::F32);
    let options = AttentionOptions::default().with_q_scale(0.5).with_k_scale(0.75).with_v_scale(3.0);
    let found = run(facts.build().unwrap(), eight.each_ref(), &options).unwrap();
    let scaled = spec(DType::F32).sm_scale(0.375 / 128f64.sqrt()).build().unwrap();
    let wide = [(&q, &q_shape), (&k, &kv_shape), (&v, &kv_shape)];
    let wide = wide.map(|(values, shape)| TensorRef::from_slice(values, shape).unwrap());
    let expected = run(scaled, wide.each_ref(), &AttentionOptions::default()).unwrap();
    close(&found, &expected.iter().map(|x| 3.0 * x).collect::<Vec<_>>(), 1e-6);
    // Masked products are -50,000 before they are scaled, which a scale for values that fill 8 bits would not make small.
    let tiny = AttentionOptions::default().with_q_scale(5.0 / 448.0).with_k_scale(5.0 / 448.0);
    names(run(facts.build().unwrap(), eight.each_ref(), &tiny), "k_scale", "sees keys that are masked");
    names(run(facts.build().unwrap(), eight.each_ref(), &options.clone().with_v_scale(f64::NAN)), "v_scale", "NaN");
    names(run(spec(DType::F32).build().unwrap(), wide.each_ref(), &options), "v_scale", "multiplies the results");
    names(
        run(spec(DType::F8E4M3).build().unwrap(), eight.each_ref(), &options),
        "o",
        "BF16, as the specification says",
    );
}

/// The oracle beside another one.
#[cfg(feature = "bench")]
#[test]
#[ignore = "wants python3 with torch"]
fn torch_computes_what_the_reference_does() {
    start();
    let folder = tempfile::tempdir().unwrap();
    let mut files = Vec::new();
    for (name, heads, causal) in [("causal", (6, 2), true), ("whole", (4, 4), false)] {
        let requests: &[(i64, i64)] = &[(5, 5), (3, 90), (1, 1), (1, 333)];
        let spec = AttentionSpec::ragged(DType::F32, heads, (64, 64)).causal(causal).sm_scale(0.2).build().unwrap();
        let mut batch = Batch::ragged();
        requests.iter().for_each(|(queries, keys)| batch.push_ragged(*queries, *keys).unwrap());
        let (rows, keys) = (batch.rows(), batch.keys());
        let (q_shape, kv_shape) = ([rows, heads.0, 64], [keys, heads.1, 64]);
        let count = |shape: &[i64; 3]| shape.iter().product::<i64>() as usize;
        let (q, k, v) = (noise(count(&q_shape), 1), noise(count(&kv_shape), 2), noise(count(&kv_shape), 3));
        let (mut o, mut lse) = (vec![0f32; q.len()], vec![0f32; (rows * heads.0) as usize]);
        let tensor = |values, shape: &[i64]| TensorRef::from_slice::<f32>(values, shape).unwrap();
        Workspace::on_host(spec)
            .plan(&batch)
            .unwrap()
            .run_ragged(
                &mut TensorMut::from_slice(&mut o, &q_shape).unwrap(),
                Some(&mut TensorMut::from_slice(&mut lse, &[rows, heads.0]).unwrap()),
                &tensor(&q, &q_shape),
                (&tensor(&k, &kv_shape), &tensor(&v, &kv_shape)),
                &AttentionOptions::default(),
            )
            .unwrap();
        let file = folder.path().join(format!("{name}.safetensors"));
        let computed =
            torch::Computed { heads, size: 64, causal, scale: 0.2, requests, q: &q, k: &k, v: &v, o: &o, lse: &lse };
        computed.write(&file);
        files.push(file);
    }
    torch::compare(&files.iter().map(std::path::PathBuf::as_path).collect::<Vec<_>>());
}

#[test]
fn one_sequence_is_a_batch_of_one() {
    start();
    let spec = AttentionSpec::ragged(DType::F32, (4, 2), (64, 64)).causal(true).build().unwrap();
    let (q, k, v) = (noise(3 * 4 * 64, 1), noise(10 * 2 * 64, 2), noise(10 * 2 * 64, 3));
    let tensor = |values, rows, heads| TensorRef::from_slice(values, &[rows, heads, 64]).unwrap();
    let (q_all, k, v) = (tensor(&q, 3, 4), tensor(&k, 10, 2), tensor(&v, 10, 2));
    let (mut single, mut batched) = (vec![0f32; q.len()], vec![0f32; q.len()]);
    let options = AttentionOptions::default();
    let mut workspace = Workspace::on_host(spec);
    let mut results = TensorMut::from_slice(&mut single, &[3, 4, 64]).unwrap();
    workspace.run_single(&mut results, None, &q_all, (&k, &v), &options).unwrap();
    let mut batch = Batch::ragged();
    batch.push_ragged(3, 10).unwrap();
    let mut results = TensorMut::from_slice(&mut batched, &[3, 4, 64]).unwrap();
    workspace.plan(&batch).unwrap().run_ragged(&mut results, None, &q_all, (&k, &v), &options).unwrap();
    assert_eq!(single, batched);
    assert!(single.iter().any(|x| *x != 0.0));
    // Fewer keys than queries, no keys, no queries, and pages.
    let mut results = TensorMut::from_slice(&mut single, &[3, 4, 64]).unwrap();
    let few = k.narrow(0, 0, 2).unwrap();
    names(workspace.run_single(&mut results, None, &q_all, (&few, &few), &options), "keys", "2 for 3 queries");
    let none = k.narrow(0, 0, 0).unwrap();
    names(workspace.run_single(&mut results, None, &q_all, (&none, &none), &options), "keys", "0 of request 0");
    let mut nothing = TensorMut::from_slice(&mut [] as &mut [f32], &[0, 4, 64]).unwrap();
    workspace.run_single(&mut nothing, None, &q_all.narrow(0, 0, 0).unwrap(), (&k, &v), &options).unwrap();
    let mut paged = Workspace::on_host(paged((4, 2)).build().unwrap());
    names(paged.run_single(&mut results, None, &q_all, (&k, &v), &options), "batch", "Batch::paged");
}

#[test]
fn a_plan_refuses_a_batch_that_is_not_its_specifications() {
    start();
    let mut one = Batch::paged(4, 8).unwrap();
    one.push(3, &[1], 2).unwrap();
    let plan = |builder: AttentionBuilder, batch: &Batch| {
        Workspace::on_host(builder.build().unwrap()).plan(batch).map(|plan| plan.rows())
    };
    assert_eq!(plan(paged((1, 1)), &one).unwrap(), 3, "fewer keys than queries, without a causal mask");
    names(plan(paged((1, 1)).causal(true), &one), "keys", "2 for 3 queries of request 0");
    names(plan(AttentionSpec::mla(DType::F32, 1, 4).sm_scale(1.0).causal(true), &one), "keys", "see the future");
    names(plan(AttentionSpec::paged(DType::F32, (1, 1), 64, 16), &one), "page_size", "16, as the specification");
    names(plan(AttentionSpec::ragged(DType::F32, (1, 1), (64, 64)), &one), "batch", "Batch::ragged");
    names(plan(paged((1, 1)), &Batch::ragged()), "batch", "Batch::paged");
    names(plan(AttentionSpec::decode(DType::F32, (1, 1), 64, 4), &one), "queries", "3 of request 0; expected 1");
    let mut many = Batch::paged(4, 8).unwrap();
    for _ in 0..129 {
        many.push(128, &[1], 1).unwrap();
    }
    // 129 requests of 128 queries of 64 heads are more tiles than the planner's lists hold, and nothing there looks.
    names(plan(AttentionSpec::mla(DType::F32, 64, 4).sm_scale(1.0), &many), "queries", "16512 tiles of 64");
    assert_eq!(plan(paged((1, 1)), &Batch::paged(4, 8).unwrap()).unwrap(), 0, "no requests are nothing to do");
}

#[test]
fn a_call_refuses_tensors_that_are_not_its_plans() {
    start();
    let mut batch = Batch::paged(4, 8).unwrap();
    batch.push(2, &[1], 3).unwrap();
    let mut workspace = Workspace::on_host(paged((4, 2)).causal(true).build().unwrap());
    let plan = workspace.plan(&batch).unwrap();
    let (q, shape) = (vec![0f32; 4096], [2, 4, 64]);
    let call = |q_shape: [i64; 3], o_shape: [i64; 3], lse: Option<[i64; 2]>, cache_shape: [i64; 4], layout| {
        let product = |shape: &[i64]| shape.iter().product::<i64>() as usize;
        let (mut o, mut logarithms) = (vec![0f32; product(&o_shape)], vec![0f32; 64]);
        let (mut k, mut v) = (vec![0f32; product(&cache_shape)], vec![0f32; product(&cache_shape)]);
        let cache = PagedKvCache::new(
            TensorMut::from_slice(&mut k, &cache_shape)?,
            TensorMut::from_slice(&mut v, &cache_shape)?,
            layout,
        )?;
        let mut lse = lse.map(|shape| TensorMut::from_slice(&mut logarithms[..product(&shape)], &shape).unwrap());
        let q = TensorRef::from_slice(&q[..product(&q_shape)], &q_shape)?;
        let options = AttentionOptions::default();
        plan.run(&mut TensorMut::from_slice(&mut o, &o_shape)?, lse.as_mut(), &q, &cache, &options)
    };
    let (good, nhd) = ([8, 4, 2, 64], KvLayout::Nhd);
    call(shape, shape, Some([2, 4]), good, nhd).unwrap();
    call(shape, shape, None, [9, 4, 2, 64], nhd).unwrap();
    names(call([3, 4, 64], [3, 4, 64], None, good, nhd), "rows", "2, as many as the batch has queries");
    names(call([2, 8, 64], [2, 8, 64], None, good, nhd), "q_heads", "4, as the specification says");
    names(call([2, 4, 128], [2, 4, 64], None, good, nhd), "head_dim", "64, as the specification says");
    names(call(shape, [2, 4, 32], None, good, nhd), "o", "[2, 4, 64]");
    names(call(shape, [1, 4, 64], None, good, nhd), "o", "[2, 4, 64]");
    names(call(shape, shape, Some([2, 3]), good, nhd), "lse", "[2, 4]");
    names(call(shape, shape, None, [7, 4, 2, 64], nhd), "pages", "8 or more, for which the batch was made");
    names(call(shape, shape, None, [8, 8, 2, 64], nhd), "page_size", "4");
    names(call(shape, shape, None, [8, 4, 4, 64], nhd), "kv_heads", "2");
    names(call(shape, shape, None, [8, 2, 4, 64], KvLayout::Hnd), "layout", "Nhd, as the specification says");
    // Another element type, another kind of call, and sinks that nobody asked for.
    let half = vec![half::bf16::ZERO; 512];
    let mut half_o = half.clone();
    let mut cache = Cache::new(8, 4, 2, 64, 1);
    let mut o = TensorMut::from_slice(&mut half_o, &shape).unwrap();
    let half_q = TensorRef::from_slice(&half, &shape).unwrap();
    let options = AttentionOptions::default();
    names(plan.run(&mut o, None, &half_q, &cache.tensors(), &options), "q", "F32, as the specification says");
    let (mut wide_o, k) = (vec![0f32; 512], vec![0f32; 3 * 2 * 64]);
    let (mut o, q) =
        (TensorMut::from_slice(&mut wide_o, &shape).unwrap(), TensorRef::from_slice(&q[..512], &shape).unwrap());
    let k = TensorRef::from_slice(&k, &[3, 2, 64]).unwrap();
    names(plan.run_ragged(&mut o, None, &q, (&k, &k), &options), "method", "run, for keys in a paged cache");
    let sinks = [0f32; 4];
    let options = AttentionOptions::default().with_sink(TensorRef::from_slice(&sinks, &[4]).unwrap());
    names(plan.run(&mut o, None, &q, &cache.tensors(), &options), "sink", "no sinks");
    assert_eq!((plan.backend(), plan.integers()), (None, Vec::new()));
    assert_eq!(plan.rows(), 2);
    assert_eq!(workspace.spec().kind(), Kind::Paged);
}

/// Decodes by XQA's call on the host.
fn xqa(spec: AttentionSpec, table: &DecodeTable, q: &[f32], cache: &mut Cache) -> Result<Vec<f32>> {
    let (rows, heads, size) = (table.requests() as i64, spec.heads().0, spec.head_dims().0);
    let mut o = vec![0.0; (rows * heads * size) as usize];
    let shape = [rows, heads, size];
    XqaDecode::on_host(spec)?.run(
        &mut TensorMut::from_slice(&mut o, &shape)?,
        &TensorRef::from_slice(&q[..(rows * heads * size) as usize], &shape)?,
        &cache.tensors(),
        &Placed::on_host(table)?,
        &AttentionOptions::default(),
    )?;
    Ok(o)
}

#[test]
fn xqa_answers_what_a_plan_of_the_same_requests_does() {
    start();
    let mut random = random(5);
    for (heads, window) in [((2, 2), None), ((4, 2), None), ((8, 2), Some(20)), ((8, 1), None)] {
        let facts = AttentionSpec::decode(DType::F32, heads, 64, 16);
        let spec = window.map_or(facts, |keys| facts.window(keys)).build().unwrap();
        let mut cache = Cache::new(40, 16, heads.1, 64, 3);
        let mut batch = Batch::paged(16, 40).unwrap();
        for keys in [1, 15, 16, 17, 1 + random(70), 1 + random(70)] {
            let pages: Vec<i32> = (0..(keys + 15) / 16).map(|_| random(40) as i32).collect();
            batch.push(1, &pages, keys).unwrap();
        }
        let q = noise((8 * heads.0 * 64) as usize, 9);
        let planned = run(spec, &batch, &q[..(6 * heads.0 * 64) as usize], &mut cache).0;
        let table = DecodeTable::new(&batch, 5).unwrap();
        assert!(xqa(spec, &table, &q, &mut cache).unwrap() == planned);
        // Longer rows and requests that fill the table up change nothing of the others.
        let filled = DecodeTable::new(&batch, 9).unwrap().with_room_for(8).unwrap();
        let found = xqa(spec, &filled, &q, &mut cache).unwrap();
        assert!(found[..planned.len()] == planned);
        let mut of_heads = cache.of_heads();
        let turned = window.map_or(facts, |keys| facts.window(keys)).layout(KvLayout::Hnd).build().unwrap();
        assert!(xqa(turned, &table, &q, &mut of_heads).unwrap() == planned);
    }
}

#[test]
fn a_table_for_decode_refuses_what_a_kernel_would_follow() {
    let mut batch = Batch::paged(16, 8).unwrap();
    batch.push(1, &[7, 3], 20).unwrap();
    batch.push(1, &[1], 16).unwrap();
    let table = DecodeTable::new(&batch, 3).unwrap();
    assert_eq!((table.requests(), table.longest(), table.lengths()), (2, 48, &[20, 16][..]));
    // A request without keys and a page that the cache has not are refused where the batch is made.
    names(batch.clone().push(1, &[], 0), "keys", "left out");
    names(batch.clone().push(1, &[8], 1), "pages", "0 to 7");
    names(DecodeTable::new(&batch, 1), "pages", "2 of request 0");
    names(DecodeTable::new(&batch, 0), "pages_per_request", "1 to 134217727");
    names(DecodeTable::new(&batch, 134_217_728), "pages_per_request", "1 to 134217727");
    names(DecodeTable::new(&Batch::ragged(), 1), "batch", "Batch::paged");
    names(table.clone().with_room_for(1), "requests", "2 or more");
    names(table.clone().with_room_for(65_536), "requests", "65535");
    names(DecodeTable::new(&batch, 40_000).unwrap().with_room_for(60_000), "pages_per_request", "at most 35791");
    let mut two = batch.clone();
    two.push(2, &[1], 2).unwrap();
    names(DecodeTable::new(&two, 3), "queries", "2 of request 2");
}

#[test]
fn xqa_refuses_what_it_has_no_kernel_for() {
    start();
    let decode = |heads, page_size| AttentionSpec::decode(DType::BF16, heads, 128, page_size);
    let of = |builder: AttentionBuilder| XqaDecode::on_host(builder.build().unwrap()).map(|_| ());
    for group in [1, 2, 4, 8] {
        for page_size in [16, 32, 64, 128] {
            of(decode((2 * group, 2), page_size)).unwrap();
        }
    }
    for group in [3, 5, 7, 16] {
        names(of(decode((group, 1), 16)), "q_heads", "1, 2, 4 or 8");
    }
    for page_size in [1, 8, 48, 256] {
        names(of(decode((4, 1), page_size)), "page_size", "16, 32, 64 or 128");
    }
    names(of(decode((4, 1), 16).soft_cap(5.0)), "soft_cap", "no soft cap");
    names(of(decode((4, 1), 16).kv_dtype(DType::F8E4M3)), "kv_dtype", "the queries' type");
    names(of(decode((4, 1), 16).pdl(true)), "pdl", "before the one ahead has ended");
    names(of(decode((4, 1), 16).backend(Backend::CudaCores)), "backend", "none asked for");
    names(of(AttentionSpec::decode(DType::BF16, (4, 1), 64, 16).sinks()), "sinks", "a Workspace has them");
    names(of(AttentionSpec::paged(DType::BF16, (4, 1), 64, 16)), "spec", "AttentionSpec::decode");
    let name = XqaDecode::module_of(&decode((8, 2), 16).window(7).build().unwrap()).unwrap();
    assert_eq!(
        name,
        "xqa_input_bf16_kv_cache_bf16_output_bf16_page_size_16_head_dim_128_head_group_ratio_4_use_sliding_window_True_\
         use_spec_dec_False_spec_q_seq_len_1"
    );
}

#[test]
fn a_call_of_xqa_refuses_tensors_that_are_not_its_tables() {
    start();
    let spec = AttentionSpec::decode(DType::F32, (4, 2), 64, 16).build().unwrap();
    let mut batch = Batch::paged(16, 8).unwrap();
    batch.push(1, &[7, 3], 20).unwrap();
    let table = DecodeTable::new(&batch, 2).unwrap();
    let q = noise(4096, 1);
    xqa(spec, &table, &q, &mut Cache::new(9, 16, 2, 64, 1)).unwrap();
    names(xqa(spec, &table, &q, &mut Cache::new(7, 16, 2, 64, 1)), "pages", "8 or more");
    names(xqa(spec, &table, &q, &mut Cache::new(8, 32, 2, 64, 1)), "page_size", "16");
    names(xqa(spec, &table, &q, &mut Cache::new(8, 16, 1, 64, 1)), "kv_heads", "2");
    names(xqa(spec, &table, &q, &mut Cache::new(8, 16, 2, 64, 1).of_heads()), "layout", "Nhd");
    let mut other = Batch::paged(32, 8).unwrap();
    other.push(1, &[7], 20).unwrap();
    let other = DecodeTable::new(&other, 2).unwrap();
    names(xqa(spec, &other, &q, &mut Cache::new(8, 16, 2, 64, 1)), "page_size of the table", "16");
    let decode = XqaDecode::on_host(spec).unwrap();
    let mut cache = Cache::new(8, 16, 2, 64, 1);
    let mut call = |q_shape: [i64; 3], o_shape: [i64; 3], strides: Option<[i64; 3]>, options: &AttentionOptions<'_>| {
        let mut o = vec![0f32; o_shape.iter().product::<i64>() as usize];
        let q = match strides {
            Some(strides) => TensorRef::from_slice_strided(&q, &q_shape, &strides)?,
            None => TensorRef::from_slice(&q[..q_shape.iter().product::<i64>() as usize], &q_shape)?,
        };
        let mut o = TensorMut::from_slice(&mut o, &o_shape)?;
        decode.run(&mut o, &q, &cache.tensors(), &Placed::on_host(&table)?, options)
    };
    let (shape, none) = ([1, 4, 64], AttentionOptions::default());
    call(shape, shape, None, &none).unwrap();
    names(call([2, 4, 64], [2, 4, 64], None, &none), "page_table", "[2, 2]");
    names(call(shape, [2, 4, 64], None, &none), "o", "[1, 4, 64]");
    names(call([1, 8, 64], [1, 8, 64], None, &none), "q_heads", "4, as the specification says");
    names(call(shape, shape, Some([512, 128, 1]), &none), "q", "contiguous");
    let sinks = [0f32; 4];
    let options = AttentionOptions::default().with_sink(TensorRef::from_slice(&sinks, &[4]).unwrap());
    names(call(shape, shape, None, &options), "sink", "no sinks");
    names(call(shape, shape, None, &AttentionOptions::default().with_k_scale(1e-9)), "k_scale", "0.001");
    assert_eq!(decode.spec(), &spec);
    // A cache with gaps between its tokens: XQA counts strides in heads.
    let numbers = noise(8 * 16 * 192, 3);
    let (mut dense_k, mut dense_v) = (Vec::new(), Vec::new());
    for token in numbers.chunks_exact(192) {
        dense_k.extend_from_slice(&token[..128]);
        dense_v.extend(token[..128].iter().map(|number| -number));
    }
    let run_over = |k: &mut [f32], v: &mut [f32], strides: [i64; 4]| {
        let shape = [8, 16, 2, 64];
        let mut o = vec![0f32; 256];
        let cache = PagedKvCache::new(
            TensorMut::from_slice_strided(k, &shape, &strides)?,
            TensorMut::from_slice_strided(v, &shape, &strides)?,
            KvLayout::Nhd,
        )?;
        let mut results = TensorMut::from_slice(&mut o, &[1, 4, 64])?;
        let q = TensorRef::from_slice(&q[..256], &[1, 4, 64])?;
        decode.run(&mut results, &q, &cache, &Placed::on_host(&table)?, &AttentionOptions::default())?;
        Ok(o)
    };
    let (mut k, mut v) = (numbers.clone(), numbers.iter().map(|number| -number).collect::<Vec<_>>());
    let dense = run_over(&mut dense_k, &mut dense_v, [16 * 128, 128, 64, 1]).unwrap();
    assert_eq!(run_over(&mut k, &mut v, [16 * 192, 192, 64, 1]).unwrap(), dense);
    names(run_over(&mut k, &mut v, [16 * 136, 136, 64, 1]), "paged_k_cache", "multiples of 64");
}
