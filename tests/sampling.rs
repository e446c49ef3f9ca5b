//! Sampling without a GPU: what is drawn on the host and how often, what is refused, rows that are no distribution, and what the
//! real launchers do over a CUDA runtime that launches nothing.

#[path = "support/failing.rs"]
mod failing;
#[path = "support/native.rs"]
mod native;

use flashinfer_rs::kernels::sampling::{
    ChainTensors, FilterOrder, RowStatus, SamplingContext, SamplingOptions, is_supported, min_p_sampling_from_probs,
    sampling_from_logits, sampling_from_probs, softmax, softmax_in_place, softmax_workspace_size, top_k_mask_logits,
    top_k_mask_logits_in_place, top_k_renorm_probs, top_k_renorm_probs_in_place, top_k_sampling_from_probs,
    top_k_top_p_sampling_from_probs, top_p_sampling_from_probs,
};
use flashinfer_rs::{
    DType, Device, FlashInferError, FlashInferRuntime, MinP, PerRow, Philox, Placed, Result, RuntimeConfig, Stream,
    Temperature, TensorMut, TensorRef, TopK, TopP,
};

fn initialize() {
    FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
}

fn options() -> SamplingOptions {
    SamplingOptions::default()
}

fn joint() -> SamplingOptions {
    options().with_filter_order(FilterOrder::Joint)
}

#[track_caller]
fn names<T: std::fmt::Debug>(result: Result<T>, argument: &str, says: &str) {
    match result.unwrap_err() {
        FlashInferError::InvalidArgument { argument: named, found, expected, .. } => {
            assert_eq!(named, argument, "{found}, expected {expected}");
            let text = format!("{found}; expected {expected}");
            assert!(text.contains(says), "{text:?} does not say {says:?}");
        }
        other => panic!("{other}"),
    }
}

/// A call of a sampler on the host.
type Draw = fn(&mut SamplingContext, &mut TensorMut<'_>, &mut TensorMut<'_>, &mut Philox) -> Result<()>;

const FROM_PROBS: Draw =
    |context, output, probs, philox| context.sampler()?.sampling_from_probs(output, probs, philox, &options());
const FROM_LOGITS: Draw =
    |context, output, logits, philox| context.sampler()?.sampling_from_logits(output, logits, philox, &options());
const TOP_K: Draw =
    |context, output, probs, philox| context.sampler()?.top_k_sampling_from_probs(output, probs, 2, philox, &options());
const TOP_P: Draw = |context, output, probs, philox| {
    context.sampler()?.top_p_sampling_from_probs(output, probs, 0.6, philox, &options())
};
const MIN_P: Draw = |context, output, probs, philox| {
    context.sampler()?.min_p_sampling_from_probs(output, probs, 0.5, philox, &options())
};
const JOINT: Draw = |context, output, probs, philox| {
    context.sampler()?.top_k_top_p_sampling_from_probs(output, probs, 3, 0.7, philox, &joint())
};
const TOP_K_FIRST: Draw = |context, output, probs, philox| {
    context.sampler()?.top_k_top_p_sampling_from_probs(output, probs, 3, 0.7, philox, &options())
};
const LOGITS_JOINT: Draw = |context, output, logits, philox| {
    context.sampler()?.top_k_top_p_sampling_from_logits(output, logits, 3, 0.7, philox, &joint())
};
const LOGITS_TOP_K_FIRST: Draw = |context, output, logits, philox| {
    context.sampler()?.top_k_top_p_sampling_from_logits(output, logits, 3, 0.7, philox, &options())
};

/// The tokens of as many draws from one row, each a row of its own, and the source behind them.
fn drawn(draw: Draw, row: &[f32], count: usize, mut philox: Philox) -> (Vec<i32>, Philox) {
    initialize();
    let mut probs = row.repeat(count);
    let mut tokens = vec![-7; count];
    draw(
        &mut SamplingContext::on_host(),
        &mut TensorMut::from_slice(&mut tokens, &[count as i64]).unwrap(),
        &mut TensorMut::from_slice(&mut probs, &[count as i64, row.len() as i64]).unwrap(),
        &mut philox,
    )
    .unwrap();
    (tokens, philox)
}

/// Pearson's statistic against the standard normal, by Wilson and Hilferty; above 3.1 one time in a thousand.
fn deviates(found: &[u64], expected: &[f64]) -> f64 {
    let total = found.iter().sum::<u64>() as f64;
    let scale = total / expected.iter().sum::<f64>();
    let (mut statistic, mut freedom) = (0.0, -1.0);
    for (&found, &expected) in found.iter().zip(expected) {
        if expected > 0.0 {
            statistic += (found as f64 - expected * scale).powi(2) / (expected * scale);
            freedom += 1.0;
        } else {
            assert_eq!(found, 0, "a token that is excluded was drawn");
        }
    }
    if freedom < 1.0 {
        return 0.0;
    }
    let spread = 2.0 / (9.0 * freedom);
    ((statistic / freedom).cbrt() - (1.0 - spread)) / spread.sqrt()
}

fn counted(tokens: &[i32], vocab: usize) -> Vec<u64> {
    let mut counts = vec![0; vocab];
    tokens.iter().for_each(|&token| counts[token as usize] += 1);
    counts
}

const ROW: [f32; 6] = [0.05, 0.4, 0.0, 0.25, 0.2, 0.1];

#[test]
fn tokens_are_drawn_as_often_as_their_probabilities_say() {
    let logits = ROW.map(f32::ln);
    let cases: [(&str, Draw, [f32; 6], [f64; 6]); 9] = [
        ("from probs", FROM_PROBS, ROW, ROW.map(f64::from)),
        ("from logits", FROM_LOGITS, logits, ROW.map(f64::from)),
        ("top-k", TOP_K, ROW, [0.0, 0.4, 0.0, 0.25, 0.0, 0.0]),
        ("top-p", TOP_P, ROW, [0.0, 0.4, 0.0, 0.25, 0.0, 0.0]),
        ("min-p", MIN_P, ROW, [0.0, 0.4, 0.0, 0.25, 0.2, 0.0]),
        ("joint", JOINT, ROW, [0.0, 0.4, 0.0, 0.25, 0.2, 0.0]),
        // Of 0.4, 0.25 and 0.2, which are made to sum to 1 first, the first two have more than 0.7.
        ("top-k first", TOP_K_FIRST, ROW, [0.0, 0.4, 0.0, 0.25, 0.0, 0.0]),
        ("joint, from logits", LOGITS_JOINT, logits, [0.0, 0.4, 0.0, 0.25, 0.2, 0.0]),
        ("top-k first, from logits", LOGITS_TOP_K_FIRST, logits, [0.0, 0.4, 0.0, 0.25, 0.0, 0.0]),
    ];
    for (name, draw, row, expected) in cases {
        let (tokens, _) = drawn(draw, &row, 40_000, Philox::new(11));
        let deviation = deviates(&counted(&tokens, 6), &expected);
        assert!(deviation < 3.1, "{name}: {deviation:.2} away");
    }
}

#[test]
fn every_token_that_is_as_likely_as_the_last_of_top_k_is_kept() {
    let row = [0.2f32, 0.3, 0.2, 0.1, 0.2];
    let (tokens, _) = drawn(TOP_K, &row, 20_000, Philox::new(5));
    assert!(deviates(&counted(&tokens, 5), &[0.2, 0.3, 0.2, 0.0, 0.2]) < 3.1);
}

#[test]
fn the_same_source_draws_the_same_tokens_and_is_moved_on_by_what_upstream_counts() {
    let count = 5u64;
    let cases: [(&str, Draw, u64); 7] = [
        ("from probs", FROM_PROBS, 8),
        ("from logits", FROM_LOGITS, 8),
        ("min-p", MIN_P, 8),
        ("top-k", TOP_K, 32 * count),
        ("top-p", TOP_P, 32 * count),
        ("joint", JOINT, 32 * count),
        ("top-k first", TOP_K_FIRST, 32 * count),
    ];
    for (name, draw, more) in cases {
        let source = Philox::new(9).at(12);
        let (tokens, after) = drawn(draw, &ROW, 64, source.clone());
        assert_eq!(drawn(draw, &ROW, 64, source.clone()).0, tokens, "{name}");
        assert_ne!(drawn(draw, &ROW, 64, after).0, tokens, "{name}: the next draw");
        assert_ne!(drawn(draw, &ROW, 64, Philox::new(10).at(12)).0, tokens, "{name}: another seed");
        assert_eq!(drawn(draw, &ROW, count as usize, source).1.offset(), 12 + more, "{name}");
    }
}

#[test]
fn a_token_is_the_first_at_which_the_sum_is_above_the_number_that_is_drawn() {
    let row: Vec<f32> = (1..=100).map(|i| i as f32 / 5050.0).collect();
    let philox = Philox::new(77).at(40);
    let (tokens, _) = drawn(FROM_PROBS, &row, 200, philox.clone());
    for (i, &token) in tokens.iter().enumerate() {
        let number = f64::from(philox.numbers(i as u64).next().unwrap());
        let sum = |end: usize| row[..end].iter().map(|&p| f64::from(p)).sum::<f64>();
        assert!(sum(token as usize) <= number && number < sum(token as usize + 1), "output {i}");
    }
}

#[test]
fn rows_have_their_own_numbers() {
    initialize();
    let mut tokens = [-7; 4];
    let mut draw =
        |call: &mut dyn FnMut(&mut SamplingContext, &mut TensorMut<'_>, &mut TensorMut<'_>) -> Result<()>| {
            let mut probs = ROW.repeat(4);
            let mut output = TensorMut::from_slice(&mut tokens, &[4]).unwrap();
            let mut probs = TensorMut::from_slice(&mut probs, &[4, 6]).unwrap();
            call(&mut SamplingContext::on_host(), &mut output, &mut probs).unwrap();
            tokens
        };
    // With a limit the likeliest is drawn, and without one the seeds here draw others somewhere.
    let top_k = PerRow::<TopK>::new(&[1, 6, 1, i32::MAX]).unwrap();
    let top_p = PerRow::<TopP>::new(&[0.1, 1.0, 1e-30, 1.0]).unwrap();
    let min_p = PerRow::<MinP>::new(&[1.0, 0.0, 1.0, 0.0]).unwrap();
    let (top_k, top_p) = (Placed::on_host(&top_k).unwrap(), Placed::on_host(&top_p).unwrap());
    let min_p = Placed::on_host(&min_p).unwrap();
    let mut others = [0; 4];
    for seed in 0..20 {
        let all = [
            draw(&mut |c, output, probs| {
                c.sampler()?.top_k_sampling_from_probs(output, probs, &top_k, &mut Philox::new(seed), &options())
            }),
            draw(&mut |c, output, probs| {
                c.sampler()?.top_p_sampling_from_probs(output, probs, &top_p, &mut Philox::new(seed), &options())
            }),
            draw(&mut |c, output, probs| {
                c.sampler()?.min_p_sampling_from_probs(output, probs, &min_p, &mut Philox::new(seed), &options())
            }),
            draw(&mut |c, output, probs| {
                let philox = &mut Philox::new(seed);
                c.sampler()?.top_k_top_p_sampling_from_probs(output, probs, &top_k, &top_p, philox, &joint())
            }),
        ];
        for (i, tokens) in all.into_iter().enumerate() {
            assert_eq!((tokens[0], tokens[2]), (1, 1), "call {i}");
            others[i] += usize::from(tokens[1] != 1) + usize::from(tokens[3] != 1);
        }
    }
    assert!(others.iter().all(|&others| others > 10), "{others:?}");
}

/// A name for what is wrong, the row, and the status that it has.
type Hazard = (&'static str, [f32; 6], fn(RowStatus) -> bool);

const HAZARDS: [Hazard; 6] = [
    ("NaN", [f32::NAN; 6], |s| s.has_nan() && s.is_nothing()),
    ("a NaN", [0.5, f32::NAN, 0.5, 0.0, 0.0, 0.0], |s| s.has_nan() && !s.is_nothing()),
    ("zeros", [0.0; 6], |s| s.is_nothing() && !s.has_nan()),
    ("an infinity", [0.5, f32::INFINITY, 0.5, 0.0, 0.0, 0.0], RowStatus::has_infinite),
    ("a negative infinity", [0.5, f32::NEG_INFINITY, 0.5, 0.0, 0.0, 0.0], RowStatus::has_negative),
    ("a negative number", [0.5, -0.1, 0.6, 0.0, 0.0, 0.0], RowStatus::has_negative),
];

#[test]
fn rows_that_are_no_distribution_are_told_of_and_give_token_0_and_the_others_are_as_if_alone() {
    initialize();
    for (name, hazard, is) in HAZARDS {
        for (draw, from_probs) in
            [(FROM_PROBS, true), (TOP_K, true), (TOP_P, true), (MIN_P, true), (JOINT, true), (TOP_K_FIRST, true)]
        {
            assert!(from_probs);
            let good = [ROW, ROW, ROW].concat();
            let run = |rows: &[f32]| {
                let (mut rows, mut tokens) = (rows.to_vec(), [-7; 3]);
                let mut context = SamplingContext::on_host();
                let mut output = TensorMut::from_slice(&mut tokens, &[3]).unwrap();
                let mut probs = TensorMut::from_slice(&mut rows, &[3, 6]).unwrap();
                draw(&mut context, &mut output, &mut probs, &mut Philox::new(3)).unwrap();
                (tokens, rows, context.statuses(3).unwrap())
            };
            let mut bad = good.clone();
            bad[6..12].copy_from_slice(&hazard);
            let ((tokens, rows, statuses), (alone, kept, valid)) = (run(&bad), run(&good));
            assert!(valid.iter().all(|status| status.is_valid()), "{valid:?}");
            assert_eq!((tokens[0], tokens[1], tokens[2]), (alone[0], 0, alone[2]), "{name}");
            assert!(statuses[0].is_valid() && is(statuses[1]) && statuses[2].is_valid(), "{name}: {statuses:?}");
            assert_eq!(rows[6..12], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0], "{name}");
            assert_eq!((&rows[..6], &rows[12..]), (&kept[..6], &kept[12..]), "{name}");
        }
    }
}

#[test]
fn logits_that_are_no_distribution_are_told_of() {
    initialize();
    let nothing = [f32::NEG_INFINITY; 6];
    let some = [1.0, f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY, 2.0, f32::NEG_INFINITY];
    let nan = [1.0, 0.0, f32::NAN, 0.0, 0.0, 0.0];
    let infinite = [0.0, 0.0, f32::INFINITY, 0.0, 0.0, 0.0];
    for draw in [FROM_LOGITS, LOGITS_JOINT, LOGITS_TOP_K_FIRST] {
        let (mut logits, mut tokens) = ([nothing, some, nan, infinite].concat(), [-7; 4]);
        let mut context = SamplingContext::on_host();
        let mut output = TensorMut::from_slice(&mut tokens, &[4]).unwrap();
        let mut tensor = TensorMut::from_slice(&mut logits, &[4, 6]).unwrap();
        draw(&mut context, &mut output, &mut tensor, &mut Philox::new(1)).unwrap();
        let statuses = context.statuses(4).unwrap();
        assert!(!statuses[0].is_valid() && statuses[1].is_valid(), "{statuses:?}");
        assert!(!statuses[2].is_valid() && !statuses[3].is_valid(), "{statuses:?}");
        assert_eq!((tokens[0], tokens[2], tokens[3]), (0, 0, 0));
        assert!([0, 2, 4].contains(&tokens[1]), "{tokens:?}");
        assert_eq!(logits[..6], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    }
}

#[test]
fn renormalizing_with_an_infinity_ends_and_tells() {
    initialize();
    let mut probs = [[0.5, f32::INFINITY, 0.5, 0.0, 0.0, 0.0], ROW].concat();
    let mut renorm = [f32::NAN; 12];
    let mut context = SamplingContext::on_host();
    let mut tensor = TensorMut::from_slice(&mut probs, &[2, 6]).unwrap();
    let mut out = TensorMut::from_slice(&mut renorm, &[2, 6]).unwrap();
    context.sampler().unwrap().top_p_renorm_probs(&mut out, &mut tensor, 0.7).unwrap();
    assert!(context.statuses(2).unwrap()[0].has_infinite() && context.statuses(2).unwrap()[1].is_valid());
    assert_eq!(renorm[..6], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    let sum = 0.4 + 0.25 + 0.2;
    for (found, expected) in renorm[6..].iter().zip([0.0, 0.4 / sum, 0.0, 0.25 / sum, 0.2 / sum, 0.0]) {
        assert!((found - expected).abs() < 1e-6, "{renorm:?}");
    }
    // In place too.
    let mut tensor = TensorMut::from_slice(&mut probs, &[2, 6]).unwrap();
    context.sampler().unwrap().top_p_renorm_probs_in_place(&mut tensor, 0.7).unwrap();
    assert_eq!(probs, renorm);
}

#[test]
fn the_largest_are_kept_with_their_equals_and_renormalized_or_all_others_masked() {
    initialize();
    let rows = [[0.1f32, 0.3, 0.2, 0.3, 0.1], [0.5, 0.125, 0.125, 0.125, 0.125]].concat();
    let input = TensorRef::from_slice(&rows, &[2, 5]).unwrap();
    let mut out = [f32::NAN; 10];
    let k = |k: i32, out: &mut [f32; 10]| {
        let mut tensor = TensorMut::from_slice(out, &[2, 5]).unwrap();
        top_k_renorm_probs(&mut tensor, &input, k, Stream::NULL).unwrap();
    };
    k(1, &mut out);
    assert_eq!(out, [0.0, 0.5, 0.0, 0.5, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
    k(2, &mut out);
    assert_eq!(out[..5], [0.0, 0.5, 0.0, 0.5, 0.0]);
    assert_eq!(out[5..], rows[5..], "of equals all");
    k(i32::MAX, &mut out);
    assert_eq!(out[5..], rows[5..], "more than there are");
    let top_k = PerRow::<TopK>::new(&[3, 1]).unwrap();
    let mut tensor = TensorMut::from_slice(&mut out, &[2, 5]).unwrap();
    top_k_mask_logits(&mut tensor, &input, &Placed::on_host(&top_k).unwrap(), Stream::NULL).unwrap();
    let none = f32::NEG_INFINITY;
    assert_eq!(out, [none, 0.3, 0.2, 0.3, none, 0.5, none, none, none, none]);
    let mut own = rows.clone();
    let mut tensor = TensorMut::from_slice(&mut own, &[2, 5]).unwrap();
    top_k_mask_logits_in_place(&mut tensor, &Placed::on_host(&top_k).unwrap(), Stream::NULL).unwrap();
    assert_eq!(own, out);
    let mut own = rows.clone();
    let mut tensor = TensorMut::from_slice(&mut own, &[2, 5]).unwrap();
    top_k_renorm_probs_in_place(&mut tensor, 1, Stream::NULL).unwrap();
    assert_eq!(own, [0.0, 0.5, 0.0, 0.5, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
}

#[test]
fn logits_become_probabilities_at_a_temperature() {
    initialize();
    let logits = [0f32, 1.0, -2.0, f32::NEG_INFINITY, 3.0, 3.0, 3.0, 3.0];
    let input = TensorRef::from_slice(&logits, &[2, 4]).unwrap();
    let temperatures = PerRow::<Temperature>::new(&[2.0, 0.5]).unwrap();
    let (mut one, mut each) = ([f32::NAN; 8], [f32::NAN; 8]);
    let mut nothing: [u8; 0] = [];
    let mut workspace = TensorMut::from_slice(&mut nothing, &[0]).unwrap();
    let mut out = TensorMut::from_slice(&mut one, &[2, 4]).unwrap();
    softmax(&mut out, &input, 2.0, &mut workspace, &options(), Stream::NULL).unwrap();
    let mut out = TensorMut::from_slice(&mut each, &[2, 4]).unwrap();
    let rows = Placed::on_host(&temperatures).unwrap();
    softmax(&mut out, &input, &rows, &mut workspace, &options(), Stream::NULL).unwrap();
    let weights = [1.0f64, 0.5f64.exp(), (-1f64).exp(), 0.0];
    let sum: f64 = weights.iter().sum();
    for (found, weight) in one.iter().zip(weights) {
        assert!((f64::from(*found) - weight / sum).abs() < 1e-7, "{one:?}");
    }
    assert_eq!((&one[..4], &one[4..]), (&each[..4], &[0.25; 4][..]));
    assert_eq!(each[4..], [0.25; 4]);
    let mut own = logits;
    let mut tensor = TensorMut::from_slice(&mut own, &[2, 4]).unwrap();
    softmax_in_place(&mut tensor, 2.0, &mut workspace, &options(), Stream::NULL).unwrap();
    assert_eq!(own, one);
    let mut own = logits;
    let mut tensor = TensorMut::from_slice(&mut own, &[2, 4]).unwrap();
    SamplingContext::on_host().sampler().unwrap().softmax_in_place(&mut tensor, &rows, &options()).unwrap();
    assert_eq!(own, each);
    let mut out = TensorMut::from_slice(&mut own, &[2, 4]).unwrap();
    SamplingContext::on_host().sampler().unwrap().softmax(&mut out, &input, 2.0, &options()).unwrap();
    assert_eq!(own, one);
}

/// splitmix64
struct Random(u64);

impl Random {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// The nucleus as it is defined, by sorting: the part of a row above what it may lose.
fn nucleus(row: &[f32], p: f32) -> Vec<f64> {
    let mut sorted: Vec<f64> = row.iter().map(|&x| x.into()).collect();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let (mut sum, mut least) = (0.0, 0.0);
    for x in sorted {
        if sum >= f64::from(p) {
            break;
        }
        sum += x;
        least = x;
    }
    let kept = |x: f64| if x >= least { x } else { 0.0 };
    let sum: f64 = row.iter().map(|&x| kept(x.into())).sum();
    row.iter().map(|&x| kept(x.into()) / sum).collect()
}

#[test]
fn renormalized_rows_are_the_nucleus() {
    initialize();
    let mut random = Random(4);
    for vocab in [1usize, 2, 7, 100, 1000] {
        for p in [1e-6f32, 0.1, 0.5, 0.9, 0.999, 1.0] {
            let mut row: Vec<f32> = (0..vocab).map(|_| random.uniform().powi(6) as f32).collect();
            let sum: f32 = row.iter().sum();
            row.iter_mut().for_each(|x| *x /= sum);
            let expected = nucleus(&row, p);
            let mut tensor = TensorMut::from_slice(&mut row, &[1, vocab as i64]).unwrap();
            SamplingContext::on_host()
                .sampler()
                .unwrap()
                .top_p_renorm_probs_in_place(&mut tensor, f64::from(p))
                .unwrap();
            for (found, expected) in row.iter().zip(&expected) {
                assert!((f64::from(*found) - expected).abs() < 2e-6, "{vocab} at {p}");
            }
        }
    }
}

/// Speculative sampling of one draft for each of many sequences, drawn from `draft`; the tokens that come first, and the counters.
fn chained(draft: &[f32], target: &[f32], sequences: usize, seed: u64) -> (Vec<i32>, [Vec<i32>; 2]) {
    initialize();
    let vocab = draft.len() as i64;
    let (mut drafts, mut targets) = (draft.repeat(sequences), [target, target].concat().repeat(sequences));
    let (ids, _) = drawn(FROM_PROBS, draft, sequences, Philox::new(seed));
    let (mut output, mut accepted, mut emitted) = (vec![-7; 2 * sequences], vec![10; sequences], vec![20; sequences]);
    let batch = sequences as i64;
    let mut tensors = ChainTensors {
        draft_probs: TensorMut::from_slice(&mut drafts, &[batch, 1, vocab]).unwrap(),
        draft_token_ids: TensorRef::from_slice(&ids, &[batch, 1]).unwrap(),
        target_probs: TensorMut::from_slice(&mut targets, &[batch, 2, vocab]).unwrap(),
        output_token_ids: TensorMut::from_slice(&mut output, &[batch, 2]).unwrap(),
        output_accepted_token_num: TensorMut::from_slice(&mut accepted, &[batch]).unwrap(),
        output_emitted_draft_token_num: TensorMut::from_slice(&mut emitted, &[batch]).unwrap(),
    };
    let mut context = SamplingContext::on_host();
    let mut philox = Philox::new(seed ^ 0xABCD);
    context.sampler().unwrap().chain_speculative_sampling(&mut tensors, &mut philox, &options()).unwrap();
    assert_eq!(philox.offset(), 2 * sequences as u64);
    assert!(context.statuses(sequences).unwrap().iter().all(|status| status.is_valid()));
    (output, [accepted, emitted])
}

#[test]
fn what_speculative_sampling_emits_is_drawn_from_the_target() {
    let (draft, target) = ([0.4f32, 0.3, 0.2, 0.1], [0.1f32, 0.4, 0.25, 0.25]);
    let count = 40_000;
    let (output, [accepted, emitted]) = chained(&draft, &target, count, 2);
    let first: Vec<_> = output.chunks(2).map(|pair| pair[0]).collect();
    assert!(deviates(&counted(&first, 4), &target.map(f64::from)) < 3.1, "the first token");
    let mut behind = Vec::new();
    for (pair, (accepted, emitted)) in output.chunks(2).zip(accepted.iter().zip(&emitted)) {
        let (accepted, emitted) = (accepted - 10, emitted - 20);
        assert!(emitted <= accepted && accepted <= 1, "{accepted} and {emitted} of one draft");
        match emitted {
            1 => behind.push(pair[1]),
            emitted => assert_eq!((emitted, pair[1]), (0, -1)),
        }
    }
    assert!(deviates(&counted(&behind, 4), &target.map(f64::from)) < 3.1, "the token behind an accepted draft");
    let share = behind.len() as f64 / count as f64;
    // 1 less half the distance between the two.
    assert!((share - 0.7).abs() < 0.01, "{share} are accepted");
}

#[test]
fn a_draft_of_the_targets_own_is_accepted_but_where_the_number_is_1() {
    let row = [0.25f32; 4];
    let (output, _) = chained(&row, &row, 1000, 6);
    assert!(output.chunks(2).all(|pair| (0..4).contains(&pair[0]) && (-1..4).contains(&pair[1])));
}

#[test]
fn drafts_that_are_no_tokens_and_rows_that_are_none_are_told_of_with_their_sequence() {
    initialize();
    let (batch, count, vocab) = (4i64, 2i64, 3i64);
    let mut drafts = vec![1.0f32 / 3.0; 24];
    let mut targets = vec![1.0f32 / 3.0; 36];
    let ids = [0, 1, -1, 2, 3, 0, 1, 1];
    drafts[3 * 6 + 3] = f32::NAN;
    targets[9] = -1.0;
    let (mut output, mut accepted, mut emitted) = ([-7; 12], [0; 4], [0; 4]);
    let mut context = SamplingContext::on_host();
    let mut tensors = ChainTensors {
        draft_probs: TensorMut::from_slice(&mut drafts, &[batch, count, vocab]).unwrap(),
        draft_token_ids: TensorRef::from_slice(&ids, &[batch, count]).unwrap(),
        target_probs: TensorMut::from_slice(&mut targets, &[batch, count + 1, vocab]).unwrap(),
        output_token_ids: TensorMut::from_slice(&mut output, &[batch, count + 1]).unwrap(),
        output_accepted_token_num: TensorMut::from_slice(&mut accepted, &[batch]).unwrap(),
        output_emitted_draft_token_num: TensorMut::from_slice(&mut emitted, &[batch]).unwrap(),
    };
    context.sampler().unwrap().chain_speculative_sampling(&mut tensors, &mut Philox::new(1), &options()).unwrap();
    let statuses = context.statuses(4).unwrap();
    let bits: Vec<_> = statuses.iter().map(|status| status.bits()).collect();
    assert_eq!(bits, [0, 16 | 4, 16, 1], "{statuses:?}");
    assert!(output.iter().all(|token| (-1..3).contains(token)), "{output:?}");
}

/// A call of each unsafe function, of rows that are right, on the host: they draw what the sampler does.
#[test]
fn the_kernels_themselves_draw_what_the_sampler_draws() {
    initialize();
    let (probs, options) = (ROW.repeat(50), options());
    let input = TensorRef::from_slice(&probs, &[50, 6]).unwrap();
    let mut tokens = [-7; 50];
    let mut draw = |call: &mut dyn FnMut(&mut TensorMut<'_>, &mut Philox) -> Result<()>| {
        let mut philox = Philox::new(3);
        call(&mut TensorMut::from_slice(&mut tokens, &[50]).unwrap(), &mut philox).unwrap();
        (tokens.to_vec(), philox)
    };
    let s = Stream::NULL;
    // SAFETY: the rows are distributions, here and below.
    let found = draw(&mut |out, philox| unsafe { sampling_from_probs(out, &input, philox, &options, s) });
    assert_eq!(found, drawn(FROM_PROBS, &ROW, 50, Philox::new(3)));
    // SAFETY: as above.
    let found = draw(&mut |out, philox| unsafe { top_k_sampling_from_probs(out, &input, 2, philox, &options, s) });
    assert_eq!(found, drawn(TOP_K, &ROW, 50, Philox::new(3)));
    // SAFETY: as above.
    let found = draw(&mut |out, philox| unsafe { top_p_sampling_from_probs(out, &input, 0.6, philox, &options, s) });
    assert_eq!(found, drawn(TOP_P, &ROW, 50, Philox::new(3)));
    // SAFETY: as above.
    let found = draw(&mut |out, philox| unsafe { min_p_sampling_from_probs(out, &input, 0.5, philox, &options, s) });
    assert_eq!(found, drawn(MIN_P, &ROW, 50, Philox::new(3)));
    let joint = draw(&mut |out, philox| {
        // SAFETY: as above.
        unsafe { top_k_top_p_sampling_from_probs(out, &input, 3, 0.7, philox, &options, s) }
    });
    assert_eq!(joint, drawn(JOINT, &ROW, 50, Philox::new(3)));
    let logits = ROW.map(f32::ln).repeat(50);
    let input = TensorRef::from_slice(&logits, &[50, 6]).unwrap();
    // SAFETY: as above.
    let (tokens, philox) = draw(&mut |out, philox| unsafe { sampling_from_logits(out, &input, philox, &options, s) });
    assert_eq!(philox.offset(), 300);
    assert!(tokens.iter().all(|token| (0..6).contains(token) && *token != 2), "{tokens:?}");
}

#[test]
fn noise_draws_tokens_as_often_as_their_probabilities_say() {
    initialize();
    for row in [&ROW[..], &ROW[..5], &[0.25, 0.5, 0.125, 0.125]] {
        let (count, vocab) = (20_000, row.len());
        let logits: Vec<f32> = row.iter().map(|p| p.ln()).collect::<Vec<_>>().repeat(count);
        let input = TensorRef::from_slice(&logits, &[count as i64, vocab as i64]).unwrap();
        let mut tokens = vec![-7; count];
        let mut output = TensorMut::from_slice(&mut tokens, &[count as i64]).unwrap();
        // SAFETY: the rows are distributions.
        unsafe { sampling_from_logits(&mut output, &input, &mut Philox::new(8), &options(), Stream::NULL) }.unwrap();
        let expected: Vec<f64> = row.iter().map(|&p| p.into()).collect();
        assert!(deviates(&counted(&tokens, vocab), &expected) < 3.1);
    }
}

#[test]
fn numbers_that_no_kernel_ends_with_are_refused_with_what_to_do() {
    initialize();
    let (mut probs, mut tokens) = (ROW, [-7]);
    let mut context = SamplingContext::on_host();
    let mut probs = TensorMut::from_slice(&mut probs, &[1, 6]).unwrap();
    let mut out = TensorMut::from_slice(&mut tokens, &[1]).unwrap();
    let (philox, options) = (&mut Philox::new(1), &options());
    let mut sampler = context.sampler().unwrap();
    for k in [0, -1, i32::MIN] {
        names(sampler.top_k_sampling_from_probs(&mut out, &mut probs, k, philox, options), "top_k", "1 or more");
        let both = sampler.top_k_top_p_sampling_from_probs(&mut out, &mut probs, k, 0.5, philox, options);
        names(both, "top_k", "1 or more");
        names(top_k_renorm_probs_in_place(&mut probs, k, Stream::NULL), "top_k", "1 or more");
        names(top_k_mask_logits_in_place(&mut probs, k, Stream::NULL), "top_k", "1 or more");
    }
    for p in [0.0, -0.1, 1e-31, 1.001, f64::NAN, f64::INFINITY] {
        names(sampler.top_p_sampling_from_probs(&mut out, &mut probs, p, philox, options), "top_p", "1e-30 to 1.0");
        names(sampler.top_p_renorm_probs_in_place(&mut probs, p), "top_p", "1e-30 to 1.0");
        let both = sampler.top_k_top_p_sampling_from_probs(&mut out, &mut probs, 5, p, philox, options);
        names(both, "top_p", "1e-30 to 1.0");
    }
    for p in [-0.1, 1.001, f64::NAN] {
        names(sampler.min_p_sampling_from_probs(&mut out, &mut probs, p, philox, options), "min_p", "to 1.0");
    }
    for t in [0.0, -1.0, 1e-31, 1e31, f64::NAN, f64::INFINITY] {
        names(sampler.softmax_in_place(&mut probs, t, options), "temperature", "top_k of 1");
    }
    assert_eq!(philox.offset(), 0, "a call that is refused moves nothing on");
    assert_eq!(tokens, [-7]);
}

#[test]
fn arrays_of_another_batch_are_refused() {
    initialize();
    let (mut probs, mut tokens) = (ROW.repeat(2), [-7; 2]);
    let mut probs = TensorMut::from_slice(&mut probs, &[2, 6]).unwrap();
    let mut out = TensorMut::from_slice(&mut tokens, &[2]).unwrap();
    let three = PerRow::<TopK>::new(&[1, 2, 3]).unwrap();
    let three = Placed::on_host(&three).unwrap();
    let mut context = SamplingContext::on_host();
    let mut sampler = context.sampler().unwrap();
    let result = sampler.top_k_sampling_from_probs(&mut out, &mut probs, &three, &mut Philox::new(1), &options());
    names(result, "top_k_arr", "[3]");
    let half = PerRow::<TopP>::new(&[0.5]).unwrap();
    let result = sampler.top_p_renorm_probs_in_place(&mut probs, &Placed::on_host(&half).unwrap());
    names(result, "top_p_arr", "[1]");
    let mut one = [-7];
    let mut out = TensorMut::from_slice(&mut one, &[1]).unwrap();
    names(sampler.sampling_from_probs(&mut out, &mut probs, &mut Philox::new(1), &options()), "output", "[1]");
}

#[test]
fn rows_that_several_blocks_would_share_are_refused_and_name_the_other_ways() {
    initialize();
    let tensor = |dtype, vocab| failing::write(0, 1 << 20, dtype, &[1, vocab]);
    let refused =
        |dtype, vocab| names(top_k_mask_logits_in_place(&mut tensor(dtype, vocab), 5, Stream::NULL), "vocab", "Joint");
    refused(DType::F32, 57_593);
    refused(DType::F32, 128_256);
    refused(DType::BF16, 115_185);
    refused(DType::F16, 151_936);
    let result = top_k_renorm_probs_in_place(&mut tensor(DType::F32, 57_593), 5, Stream::NULL);
    names(result, "vocab", "unsafe form");
    let mut long = tensor(DType::F32, (1 << 24) + 1);
    names(top_k_mask_logits_in_place(&mut long, 5, Stream::NULL), "vocab", "1 to 16777216");
}

#[test]
fn more_rows_than_kernels_count_are_refused() {
    initialize();
    let (mut out, probs) = (
        failing::write(0, 1 << 20, DType::I32, &[1 << 12]),
        failing::read(0, 1 << 30, DType::F32, &[1 << 12, (1 << 20) + 4]),
    );
    // SAFETY: nothing is launched.
    let result = unsafe { sampling_from_probs(&mut out, &probs, &mut Philox::new(1), &options(), Stream::NULL) };
    names(result, "probs", "at most 4294967296 elements");
}

#[test]
fn scratch_memory_of_a_softmax_is_as_long_as_it_must_be() {
    assert_eq!(softmax_workspace_size(128, 24_575), 0);
    assert_eq!(softmax_workspace_size(128, 24_576), 128 * 3 * 8);
    assert_eq!(softmax_workspace_size(32, 128_256), 32 * 16 * 8);
    assert_eq!(softmax_workspace_size(129, 128_256), 0);
    initialize();
    let mut logits = failing::write(0, 1 << 20, DType::F32, &[2, 32_000]);
    let mut workspace = failing::write(0, 1 << 30, DType::U8, &[2 * 4 * 8 - 1]);
    let result = softmax_in_place(&mut logits, 1.0, &mut workspace, &options(), Stream::NULL);
    names(result, "workspace", "64 that these rows need");
}

#[test]
fn without_rows_nothing_is_done() {
    let (tokens, philox) = drawn(TOP_K, &ROW, 0, Philox::new(1));
    assert_eq!((tokens.len(), philox.offset()), (0, 0));
    assert!(is_supported(Device::Cpu).unwrap());
}

#[test]
fn more_statuses_than_there_are_are_refused() {
    names(SamplingContext::on_host().statuses(1), "rows", "at most 0");
}

#[cfg(feature = "sampling")]
mod real {
    use super::*;
    use failing::{Cuda, read, write};
    use flashinfer_rs::kernels::sampling::{
        ROW_STATES_SIZE, chain_speculative_sampling, top_k_mask_logits_of_long_rows, top_k_renorm_probs_of_long_rows,
        top_p_renorm_probs,
    };

    const LIBRARY: [&str; 1] = ["sampling.so"];
    const F32: DType = DType::F32;

    #[test]
    fn every_sampling_kernel_tells_of_a_launch_that_fails() {
        native::isolated("real::every_sampling_kernel_tells_of_a_launch_that_fails", || {
            let cuda = Cuda::stand_in(&LIBRARY);
            let (s, o, philox) = (Stream::NULL, &options(), &mut Philox::new(1));
            let (rows, vocab) = (4, 64);
            let (mut a, b) = (write(0, 0x1000, F32, &[rows, vocab]), read(0, 0x4000, F32, &[rows, vocab]));
            let (mut a_half, b_half) =
                (write(0, 0x1000, DType::BF16, &[rows, vocab]), read(0, 0x4000, DType::BF16, &[rows, vocab]));
            let mut out = write(0, 0x8000, DType::I32, &[rows]);
            let mut bytes = write(0, 0x1_0000, DType::U8, &[ROW_STATES_SIZE]);
            // SAFETY: nothing is launched, here and below.
            let temperatures = unsafe { Placed::<PerRow<Temperature>>::from_tensor(read(0, 0x9000, F32, &[rows])) };
            cuda.tells("softmax", &mut || softmax(&mut a, &b, 1.0, &mut bytes, o, s));
            cuda.tells("softmax of temperatures", &mut || softmax(&mut a, &b, &temperatures, &mut bytes, o, s));
            // SAFETY: as above.
            unsafe {
                cuda.tells("sampling_from_probs", &mut || sampling_from_probs(&mut out, &b, philox, o, s));
                cuda.tells("sampling_from_logits", &mut || sampling_from_logits(&mut out, &b, philox, o, s));
                cuda.tells("top_k_sampling_from_probs", &mut || {
                    top_k_sampling_from_probs(&mut out, &b, 3, philox, o, s)
                });
                cuda.tells("top_p_sampling_from_probs", &mut || {
                    top_p_sampling_from_probs(&mut out, &b, 0.5, philox, o, s)
                });
                cuda.tells("min_p_sampling_from_probs", &mut || {
                    min_p_sampling_from_probs(&mut out, &b, 0.5, philox, o, s)
                });
                cuda.tells("top_k_top_p_sampling_from_probs", &mut || {
                    top_k_top_p_sampling_from_probs(&mut out, &b, 3, 0.5, philox, o, s)
                });
                cuda.tells("top_p_renorm_probs", &mut || top_p_renorm_probs(&mut a, &b, 0.5, s));
                cuda.tells("top_k_renorm_probs of long rows", &mut || {
                    top_k_renorm_probs_of_long_rows(&mut a, &b, 3, &mut bytes, s)
                });
                cuda.tells("top_k_mask_logits of long rows", &mut || {
                    top_k_mask_logits_of_long_rows(&mut a_half, &b_half, 3, &mut bytes, s)
                });
            }
            cuda.tells("top_k_renorm_probs", &mut || top_k_renorm_probs(&mut a, &b, 3, s));
            cuda.tells("top_k_mask_logits", &mut || top_k_mask_logits(&mut a, &b, 3, s));
            top_k_mask_logits(&mut a_half, &b_half, 3, s).unwrap();
            top_k_renorm_probs(&mut a_half, &b_half, 3, s).unwrap();
            let mut tensors = ChainTensors {
                draft_probs: write(0, 0x1000, F32, &[2, 3, vocab]),
                draft_token_ids: read(0, 0x4000, DType::I32, &[2, 3]),
                target_probs: write(0, 0x5000, F32, &[2, 4, vocab]),
                output_token_ids: write(0, 0x8000, DType::I32, &[2, 4]),
                output_accepted_token_num: write(0, 0x9000, DType::I32, &[2]),
                output_emitted_draft_token_num: write(0, 0xA000, DType::I32, &[2]),
            };
            // SAFETY: as above.
            cuda.tells("chain_speculative_sampling", &mut || unsafe {
                chain_speculative_sampling(&mut tensors, philox, o, s)
            });
            cuda.assert_all_told(&LIBRARY);
        });
    }

    /// Arrays of rows reach the real launchers in the places of their own.
    #[test]
    fn launchers_take_arrays_of_rows() {
        native::isolated("real::launchers_take_arrays_of_rows", || {
            let cuda = Cuda::stand_in(&LIBRARY);
            cuda.set("launch_fails_with", 0);
            let (s, o, philox) = (Stream::NULL, &options(), &mut Philox::new(u64::MAX).at(u64::MAX - 1000));
            let (mut a, b) = (write(0, 0x1000, F32, &[4, 64]), read(0, 0x4000, F32, &[4, 64]));
            let mut out = write(0, 0x8000, DType::I32, &[4]);
            // SAFETY: nothing is launched, here and below.
            let top_k = unsafe { Placed::<PerRow<TopK>>::from_tensor(read(0, 0x9000, DType::I32, &[4])) };
            // SAFETY: as above.
            let top_p = unsafe { Placed::<PerRow<TopP>>::from_tensor(read(0, 0x9010, F32, &[4])) };
            // SAFETY: as above.
            let min_p = unsafe { Placed::<PerRow<MinP>>::from_tensor(read(0, 0x9020, F32, &[4])) };
            // SAFETY: as above.
            unsafe {
                top_k_sampling_from_probs(&mut out, &b, &top_k, philox, o, s).unwrap();
                top_p_sampling_from_probs(&mut out, &b, &top_p, philox, o, s).unwrap();
                min_p_sampling_from_probs(&mut out, &b, &min_p, philox, o, s).unwrap();
                top_k_top_p_sampling_from_probs(&mut out, &b, &top_k, &top_p, philox, o, s).unwrap();
                top_p_renorm_probs(&mut a, &b, &top_p, s).unwrap();
            }
            top_k_renorm_probs(&mut a, &b, &top_k, s).unwrap();
            top_k_mask_logits(&mut a, &b, &top_k, s).unwrap();
            assert_eq!(cuda.get("launches"), 7);
        });
    }

    /// As many tokens as one block takes, by the GPU's own shared memory; one more is refused here, and would be divided there.
    #[test]
    fn rows_are_in_one_block_as_long_as_the_gpus_shared_memory_holds_them() {
        native::isolated("real::rows_are_in_one_block_as_long_as_the_gpus_shared_memory_holds_them", || {
            let cuda = Cuda::stand_in(&LIBRARY);
            cuda.set("launch_fails_with", 0);
            cuda.set("shared_per_block", 99 << 10);
            let tensor = |dtype, vocab| write(0, 1 << 20, dtype, &[500, vocab]);
            for (dtype, most) in [(F32, 24_824), (DType::F16, 49_648), (DType::BF16, 49_648)] {
                top_k_mask_logits_in_place(&mut tensor(dtype, most), 5, Stream::NULL).unwrap();
                assert_eq!(cuda.get("last_grid"), 132, "a block for each multiprocessor, each of whole rows");
                assert!(cuda.get("last_shared") <= 99 << 10);
                let before = cuda.get("launches");
                let result = top_k_mask_logits_in_place(&mut tensor(dtype, most + 1), 5, Stream::NULL);
                names(result, "vocab", "of 101376 that a block has");
                assert_eq!(cuda.get("launches"), before);
            }
            // Beside what a block has for itself, which is not in what the launcher asks for.
            for (dtype, most) in [(F32, 24_696), (DType::F16, 49_392)] {
                top_k_renorm_probs_in_place(&mut tensor(dtype, most), 5, Stream::NULL).unwrap();
                assert!(cuda.get("last_shared") + 336 <= 99 << 10);
                let result = top_k_renorm_probs_in_place(&mut tensor(dtype, most + 1), 5, Stream::NULL);
                names(result, "vocab", "unsafe form");
            }
            // A row of 2^7 more is what several blocks share: two groups of two blocks each for two rows.
            let mut states = write(0, 1 << 30, DType::U8, &[ROW_STATES_SIZE]);
            let mut long = write(0, 1 << 20, F32, &[2, 24_952]);
            let input = read(0, 1 << 25, F32, &[2, 24_952]);
            // SAFETY: nothing is launched.
            unsafe { top_k_mask_logits_of_long_rows(&mut long, &input, 5, &mut states, Stream::NULL) }.unwrap();
            assert_eq!(cuda.get("last_grid"), 4);
        });
    }

    #[test]
    fn programmatic_launch_is_left_off_where_rows_have_temperatures() {
        native::isolated("real::programmatic_launch_is_left_off_where_rows_have_temperatures", || {
            let cuda = Cuda::stand_in(&LIBRARY);
            cuda.set("launch_fails_with", 0);
            let (mut a, mut bytes) = (write(0, 0x1000, F32, &[4, 64]), write(0, 0x8000, DType::U8, &[0]));
            // SAFETY: nothing is launched.
            let rows = unsafe { Placed::<PerRow<Temperature>>::from_tensor(read(0, 0x9000, F32, &[4])) };
            let options = options().with_pdl(true);
            softmax_in_place(&mut a, 1.0, &mut bytes, &options, Stream::NULL).unwrap();
            assert_eq!(cuda.get("last_pdl"), 1);
            cuda.set("last_pdl", 0);
            softmax_in_place(&mut a, &rows, &mut bytes, &options, Stream::NULL).unwrap();
            assert_eq!(cuda.get("last_pdl"), 0);
        });
    }
}
