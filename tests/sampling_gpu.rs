//! Sampling on a GPU: against the reference, how often tokens are drawn, rows that are no distribution, graphs and streams.
//! `FLASHINFER_RS_RUN_GPU_TESTS=1 cargo test --features cudarc,sampling --test sampling_gpu` runs them, within 60 seconds.
//!
//! What kernels do not end with is given to guarded calls alone, and only once the guard was seen to work: of rows that are no
//! distribution the plain sampler answers what is no token at the worst.

#[path = "support/data.rs"]
mod data;
#[path = "support/gpu.rs"]
mod gpu;

use std::process::ExitCode;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream};
use data::{Random, assert_close};
use flashinfer_rs::kernels::sampling::{
    ChainTensors, FilterOrder, ROW_STATES_SIZE, RowStatus, SamplingContext, SamplingOptions, is_supported,
    sampling_from_logits, softmax, softmax_workspace_size, top_k_mask_logits, top_k_mask_logits_of_long_rows,
    top_k_renorm_probs, top_k_renorm_probs_in_place, top_k_renorm_probs_of_long_rows,
};
use flashinfer_rs::{
    Device, FlashInferError, LaunchGraph, MinP, OnDevice, PerRow, Philox, Placed, Result, Stream, Temperature,
    TensorMut, TensorRef, TopK, TopP,
};
use gpu::Gpu;
use half::{bf16, f16};

fn main() -> ExitCode {
    gpu::main(&[
        ("the_guard_finds_what_is_wrong_wherever_it_is_and_mends_it", guard),
        ("the_guard_leaves_what_is_right", guard_keeps),
        ("rows_that_are_no_distribution_end_and_are_told_of_by_every_sampler", hazards),
        ("tokens_are_those_of_the_reference", tokens),
        ("long_rows_give_tokens_that_their_filter_keeps", long_rows),
        ("half_a_million_draws_are_distributed_as_they_should_be", distribution),
        ("the_same_source_draws_the_same_tokens_and_then_others", repeatable),
        ("rows_have_their_own_numbers_and_may_be_given_others", per_row),
        ("logits_become_probabilities_whatever_way_the_kernel_goes", probabilities),
        ("renormalized_and_masked_rows_are_those_of_the_reference", renormalized),
        ("rows_fit_one_block_up_to_what_is_said", one_block),
        ("the_form_for_long_rows_does_the_same_with_short_ones", long_form),
        ("speculative_sampling_emits_what_the_target_would", chains),
        ("a_draft_without_a_rest_is_followed_by_the_targets_likeliest_token", without_rest),
        ("hostile_drafts_are_told_of", hostile_chains),
        ("draws_in_a_graph_are_refused_or_frozen", graphs),
        ("a_graph_that_owns_its_source_draws_anew_in_every_launch", fresh_draws),
        ("two_contexts_on_two_streams_do_not_disturb_each_other", streams),
        ("calls_do_not_wait", asynchronous),
        ("what_does_not_fit_the_context_is_refused", refused),
        ("every_gpu_of_the_machine_draws_the_same", every_gpu),
        ("the_gpu_is_said_to_be_supported", supported),
    ])
}

fn options() -> SamplingOptions {
    SamplingOptions::default()
}

fn joint() -> SamplingOptions {
    options().with_filter_order(FilterOrder::Joint)
}

/// Rows of probabilities whose logarithms are spread by `scale`.
fn probs(seed: u64, rows: usize, vocab: usize, scale: f64) -> Vec<f32> {
    let mut random = Random(seed);
    let mut all = Vec::with_capacity(rows * vocab);
    for _ in 0..rows {
        let weights: Vec<f64> = (0..vocab).map(|_| (scale * random.gauss()).exp()).collect();
        let sum: f64 = weights.iter().sum();
        all.extend(weights.iter().map(|weight| (weight / sum) as f32));
    }
    all
}

/// A way to draw: the same call on a GPU and on the host.
type Draw =
    fn(&mut SamplingContext, &mut TensorMut<'_>, &mut TensorMut<'_>, &mut Philox, &SamplingOptions) -> Result<()>;

const FROM_PROBS: Draw = |c, output, probs, philox, o| c.sampler()?.sampling_from_probs(output, probs, philox, o);
const FROM_LOGITS: Draw = |c, output, logits, philox, o| c.sampler()?.sampling_from_logits(output, logits, philox, o);
const K: i32 = 20;
const TOP_K: Draw = |c, output, probs, philox, o| c.sampler()?.top_k_sampling_from_probs(output, probs, K, philox, o);
const P: f64 = 0.8;
const TOP_P: Draw = |c, output, probs, philox, o| c.sampler()?.top_p_sampling_from_probs(output, probs, P, philox, o);
const MIN: f64 = 0.1;
const MIN_P: Draw = |c, output, probs, philox, o| c.sampler()?.min_p_sampling_from_probs(output, probs, MIN, philox, o);
const JOINT: Draw = |c, output, probs, philox, o| {
    let options = o.with_filter_order(FilterOrder::Joint);
    c.sampler()?.top_k_top_p_sampling_from_probs(output, probs, K, P, philox, &options)
};
const TOP_K_FIRST: Draw =
    |c, output, probs, philox, o| c.sampler()?.top_k_top_p_sampling_from_probs(output, probs, K, P, philox, o);
const OF_PROBS: [(&str, Draw); 6] = [
    ("from probs", FROM_PROBS),
    ("top-k", TOP_K),
    ("top-p", TOP_P),
    ("min-p", MIN_P),
    ("joint", JOINT),
    ("top-k first", TOP_K_FIRST),
];

/// What a draw leaves: the tokens, the rows, and what was wrong with them.
type Drawn = (Vec<i32>, Vec<f32>, Vec<RowStatus>);

fn on_gpu(
    stream: &Arc<CudaStream>,
    draw: Draw,
    rows: &[f32],
    vocab: usize,
    philox: &mut Philox,
    options: &SamplingOptions,
) -> Drawn {
    let count = rows.len() / vocab;
    let mut context = SamplingContext::new(stream, count).unwrap();
    let mut memory = stream.clone_htod(rows).unwrap();
    let mut tokens = stream.clone_htod(&vec![-7i32; count]).unwrap();
    draw(
        &mut context,
        &mut TensorMut::from_cudarc(stream, &mut tokens, &[count as i64]).unwrap(),
        &mut TensorMut::from_cudarc(stream, &mut memory, &[count as i64, vocab as i64]).unwrap(),
        philox,
        options,
    )
    .unwrap();
    let statuses = context.statuses(count).unwrap();
    (stream.clone_dtoh(&tokens).unwrap(), stream.clone_dtoh(&memory).unwrap(), statuses)
}

fn on_host(draw: Draw, rows: &[f32], vocab: usize, philox: &mut Philox, options: &SamplingOptions) -> Drawn {
    let (mut rows, count) = (rows.to_vec(), rows.len() / vocab);
    let (mut context, mut tokens) = (SamplingContext::on_host(), vec![-7; count]);
    draw(
        &mut context,
        &mut TensorMut::from_slice(&mut tokens, &[count as i64]).unwrap(),
        &mut TensorMut::from_slice(&mut rows, &[count as i64, vocab as i64]).unwrap(),
        philox,
        options,
    )
    .unwrap();
    (tokens, rows, context.statuses(count).unwrap())
}

/// What is wrong, and the status for it where the rest of the row is right.
const WRONG: [(f32, i32); 6] =
    [(f32::NAN, 1), (-f32::NAN, 1), (f32::INFINITY, 2), (1.1e28, 2), (f32::NEG_INFINITY, 4), (-1e-40, 4)];

fn guard(gpu: &Gpu) {
    let stream = &gpu.stream;
    // Every place of rows that start at every address modulo 16; then places in rows of many blocks.
    for vocab in [1003usize, 1000, 5, 40_001, 128_256] {
        let count = if vocab < 2000 { vocab } else { 60 };
        let good = probs(1, 1, vocab, 1.0);
        for (wrong, expected) in WRONG {
            let mut rows = good.repeat(count);
            let place = |row: usize| if vocab < 2000 { row } else { (row * 6_700_417) % vocab };
            (0..count).for_each(|row| rows[row * vocab + place(row)] = wrong);
            let (tokens, after, statuses) = on_gpu(stream, FROM_PROBS, &rows, vocab, &mut Philox::new(1), &options());
            for row in 0..count {
                let what = format!("{wrong} at {} of {vocab}", place(row));
                assert_eq!((statuses[row].bits(), tokens[row]), (expected, 0), "{what}");
                let mended = &after[row * vocab..][..vocab];
                assert!(mended[0] == 1.0 && mended[1..].iter().all(|x| *x == 0.0), "{what}");
            }
        }
        // Nothing above 0, in all ways.
        for nothing in [0.0, -0.0, 1e-39] {
            let (tokens, after, statuses) =
                on_gpu(stream, FROM_PROBS, &vec![nothing; 3 * vocab], vocab, &mut Philox::new(1), &options());
            assert!(statuses.iter().all(|status| status.is_nothing() && !status.has_nan()), "{statuses:?}");
            assert_eq!((tokens, after[0], after[vocab]), (vec![0; 3], 1.0, 1.0));
        }
    }
}

fn guard_keeps(gpu: &Gpu) {
    let stream = &gpu.stream;
    // One token alone, at every place: what is seen of a row is seen wherever it is.
    for vocab in [1003usize, 1000, 1, 2, 3, 40_001, 128_256] {
        let count = if vocab < 2000 { vocab } else { 60 };
        let place = |row: usize| if vocab < 2000 { row } else { (row * 6_700_417) % vocab };
        for value in [1.0, f32::MIN_POSITIVE, 1e28] {
            let mut rows = vec![0f32; count * vocab];
            (0..count).for_each(|row| rows[row * vocab + place(row)] = value);
            let (tokens, after, statuses) = on_gpu(stream, FROM_PROBS, &rows, vocab, &mut Philox::new(1), &options());
            assert!(statuses.iter().all(|status| status.is_valid()), "{statuses:?}");
            assert!((0..count).all(|row| tokens[row] == place(row) as i32), "{value} of {vocab}: {tokens:?}");
            assert!(after == rows, "{value} of {vocab}");
        }
    }
    // More rows than are all there at once.
    let (rows, vocab) = (probs(2, 3000, 257, 2.0), 257);
    let (tokens, after, statuses) = on_gpu(stream, FROM_PROBS, &rows, vocab, &mut Philox::new(1), &options());
    assert!(after == rows && statuses.iter().all(|status| status.is_valid()));
    assert!(tokens.iter().all(|token| (0..257).contains(token)));
}

/// Panics unless the guard works, where a kernel that is given what it does not end with would hang.
fn the_guard_works(stream: &Arc<CudaStream>) {
    let rows = [[f32::NAN; 8], [0.0; 8], [f32::INFINITY; 8], [-1.0; 8]].concat();
    let (tokens, after, statuses) = on_gpu(stream, FROM_PROBS, &rows, 8, &mut Philox::new(1), &options());
    assert!(statuses.iter().all(|status| !status.is_valid()) && tokens == [0; 4], "{statuses:?}, {tokens:?}");
    assert!(after.chunks(8).all(|row| row == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]));
}

fn hazards(gpu: &Gpu) {
    let stream = &gpu.stream;
    the_guard_works(stream);
    for vocab in [5usize, 1001, 32_000] {
        let good = probs(3, 4, vocab, 1.0);
        let row = |fill: &dyn Fn(usize) -> f32| (0..vocab).map(fill).collect::<Vec<_>>();
        let first = good[0];
        let hazards = [
            ("NaN", row(&|_| f32::NAN)),
            ("a NaN at the end", row(&|i| if i + 1 == vocab { f32::NAN } else { first })),
            ("zeros", row(&|_| 0.0)),
            ("infinities", row(&|_| f32::INFINITY)),
            ("an infinity", row(&|i| if i == vocab / 2 { f32::INFINITY } else { first })),
            ("negative infinities", row(&|_| f32::NEG_INFINITY)),
            ("a negative number", row(&|i| if i == 1 { -0.5 } else { first })),
            ("subnormal numbers", row(&|_| 1e-40)),
        ];
        for (name, hazard) in hazards {
            let bad = [&good[..2 * vocab], &hazard, &good[2 * vocab..]].concat();
            let other = [&good[..2 * vocab], &good[..vocab], &good[2 * vocab..]].concat();
            let what = |call: &str| format!("{call}, {name} of {vocab}");
            for (call, draw) in OF_PROBS {
                let (tokens, after, statuses) = on_gpu(stream, draw, &bad, vocab, &mut Philox::new(5), &options());
                let (expected, kept, _) = on_gpu(stream, draw, &other, vocab, &mut Philox::new(5), &options());
                assert!(!statuses[2].is_valid() && tokens[2] == 0, "{}: {statuses:?} {tokens:?}", what(call));
                for i in [0, 1, 3, 4] {
                    assert!(statuses[i].is_valid() && tokens[i] == expected[i], "{}: row {i}", what(call));
                    assert!(after[i * vocab..][..vocab] == kept[i * vocab..][..vocab], "{}: row {i}", what(call));
                }
            }
            // Renormalizing too, which with an infinity would not end.
            let mut context = SamplingContext::new(stream, 5).unwrap();
            let (mut rows, mut out) = (stream.clone_htod(&bad).unwrap(), stream.clone_htod(&bad).unwrap());
            let shape = [5, vocab as i64];
            let mut renorm = TensorMut::from_cudarc(stream, &mut out, &shape).unwrap();
            let mut tensor = TensorMut::from_cudarc(stream, &mut rows, &shape).unwrap();
            context.sampler().unwrap().top_p_renorm_probs(&mut renorm, &mut tensor, 0.9).unwrap();
            let statuses = context.statuses(5).unwrap();
            assert!(!statuses[2].is_valid() && statuses[0].is_valid() && statuses[4].is_valid(), "{}", what("renorm"));
            let found = stream.clone_dtoh(&out).unwrap();
            assert!(found[2 * vocab] == 1.0 && found[2 * vocab + 1..3 * vocab].iter().all(|x| *x == 0.0));
        }
    }
    // Logits: NaN, infinities of both signs; and −∞ beside others, which is no hazard.
    let (nan, inf, none) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
    for vocab in [6usize, 40_000] {
        let fill = |edge: f32, rest: f32| [&[edge][..], &vec![rest; vocab - 1]].concat();
        let logits = [fill(nan, 0.0), fill(inf, 0.0), fill(none, none), fill(none, 0.0), fill(0.0, none)].concat();
        let draws: [Draw; 3] = [
            FROM_LOGITS,
            |c, output, logits, philox, _| {
                c.sampler()?.top_k_top_p_sampling_from_logits(output, logits, 5, 0.9, philox, &joint())
            },
            |c, output, logits, philox, o| {
                c.sampler()?.top_k_top_p_sampling_from_logits(output, logits, 5, 0.9, philox, o)
            },
        ];
        for draw in draws {
            let (tokens, _, statuses) = on_gpu(stream, draw, &logits, vocab, &mut Philox::new(5), &options());
            let valid: Vec<_> = statuses.iter().map(|status| status.is_valid()).collect();
            assert_eq!(valid, [false, false, false, true, true], "{statuses:?}");
            assert!(tokens[..3] == [0; 3] && (1..vocab as i32).contains(&tokens[3]) && tokens[4] == 0, "{tokens:?}");
        }
    }
}

fn tokens(gpu: &Gpu) {
    // Of few tokens, so that hardly any number falls between a sum and the same sum rounded another way.
    for (i, (count, vocab)) in [(1, 1), (200, 2), (300, 7), (200, 33), (200, 100), (100, 130)].into_iter().enumerate() {
        for (name, draw) in OF_PROBS {
            for deterministic in [true, false] {
                let options = options().with_deterministic(deterministic);
                let rows = probs(10 + i as u64, count, vocab, 2.0);
                let source = Philox::new(0x1234_5678_9ABC_DEF0 + i as u64).at(400 + i as u64);
                let (mut philox, mut other) = (source.clone(), source);
                let (found, ..) = on_gpu(&gpu.stream, draw, &rows, vocab, &mut philox, &options);
                let (expected, ..) = on_host(draw, &rows, vocab, &mut other, &options);
                assert_eq!(philox, other);
                let differ = found.iter().zip(&expected).filter(|(a, b)| a != b).count();
                assert!(differ <= count / 100, "{name} of {count}×{vocab}: {differ} tokens differ");
            }
        }
    }
}

fn long_rows(gpu: &Gpu) {
    for (i, (count, vocab)) in [(32, 32_000), (8, 32_001), (16, 128_256), (4, 151_936)].into_iter().enumerate() {
        let rows = probs(20 + i as u64, count, vocab, 3.0);
        let source = Philox::new(77).at(8);
        for (name, draw) in OF_PROBS.into_iter().filter(|(name, _)| *name != "top-k first" || vocab < 57_000) {
            let (found, ..) = on_gpu(&gpu.stream, draw, &rows, vocab, &mut source.clone(), &options());
            for (row, &token) in found.iter().enumerate() {
                let of_row = &rows[row * vocab..][..vocab];
                let own = f64::from(of_row[token as usize]);
                let likelier = of_row.iter().map(|&p| f64::from(p)).filter(|&p| p > own);
                let (above, sum) = (likelier.clone().count(), likelier.sum::<f64>());
                let most = f64::from(of_row.iter().copied().fold(0.0, f32::max));
                let kept = match name {
                    "top-k" => above < K as usize,
                    "top-p" => sum < P + 1e-5,
                    "min-p" => own >= MIN * most * (1.0 - 1e-6),
                    "joint" | "top-k first" => above < K as usize && sum < P + 1e-5,
                    _ => {
                        // The very token: the sum around it encloses the number that is drawn.
                        let number = f64::from(source.numbers(row as u64).next().unwrap());
                        let before: f64 = of_row[..token as usize].iter().map(|&p| f64::from(p)).sum();
                        before - 1e-5 <= number && number <= before + own + 1e-5
                    }
                };
                assert!(kept && own > 0.0, "{name} of {vocab}: row {row} gave {token}");
            }
        }
    }
}

/// Draws from one row until there are half a million tokens, and counts them.
fn counted(gpu: &Gpu, row: &[f32], draw: &mut dyn FnMut(&mut TensorMut<'_>, &mut TensorMut<'_>)) -> Vec<u64> {
    const ROWS: usize = 50_000;
    let (stream, vocab) = (&gpu.stream, row.len());
    let fresh = stream.clone_htod(&row.repeat(ROWS)).unwrap();
    let mut rows = fresh.clone();
    let mut tokens = stream.alloc_zeros::<i32>(ROWS).unwrap();
    let mut counts = vec![0; vocab];
    for _ in 0..10 {
        stream.memcpy_dtod(&fresh, &mut rows).unwrap();
        let mut output = TensorMut::from_cudarc(stream, &mut tokens, &[ROWS as i64]).unwrap();
        let mut tensor = TensorMut::from_cudarc(stream, &mut rows, &[ROWS as i64, vocab as i64]).unwrap();
        draw(&mut output, &mut tensor);
        stream.clone_dtoh(&tokens).unwrap().into_iter().for_each(|token| counts[token as usize] += 1);
    }
    counts
}

/// That counts are as likely as they should be: by Pearson's statistic, which Wilson and Hilferty make a normal deviate, above
/// 3.1 one time in a thousand; and that their distance is what so many draws explain.
fn assert_distributed(name: &str, counts: &[u64], expected: &[f64]) {
    let (draws, sum) = (counts.iter().sum::<u64>() as f64, expected.iter().sum::<f64>());
    let (mut statistic, mut freedom, mut distance, mut explained) = (0.0, -1.0, 0.0, 0.0);
    for (&count, p) in counts.iter().zip(expected.iter().map(|p| p / sum)) {
        if p == 0.0 {
            assert_eq!(count, 0, "{name}: a token that is excluded was drawn");
            continue;
        }
        statistic += (count as f64 - p * draws).powi(2) / (p * draws);
        freedom += 1.0;
        distance += (count as f64 / draws - p).abs() / 2.0;
        explained += (2.0 * p * (1.0 - p) / (std::f64::consts::PI * draws)).sqrt() / 2.0;
    }
    let spread = 2.0 / (9.0 * freedom);
    let deviation = ((statistic / freedom).cbrt() - (1.0 - spread)) / spread.sqrt();
    println!("{name}: {deviation:.2} deviations, distance {distance:.5} of {explained:.5} that the draws explain");
    assert!(deviation < 3.1, "{name}: {deviation:.2} deviations");
    assert!(distance < 1.5 * explained, "{name}: {distance:.5} from what was expected, {explained:.5} is explained");
}

fn distribution(gpu: &Gpu) {
    let row = probs(31, 1, 100, 1.0);
    let of_row: Vec<f64> = row.iter().map(|&p| p.into()).collect();
    let mut sorted = of_row.clone();
    sorted.sort_by(|a, b| b.total_cmp(a));
    // The least that top-p keeps of a row that sums to `whole`.
    let nucleus = |whole: f64| {
        let mut sum = 0.0;
        sorted.iter().copied().find(|p| {
            sum += p;
            sum >= P * whole
        })
    };
    let least_k = sorted[K as usize - 1];
    let least_p = nucleus(1.0).unwrap();
    let of_k: f64 = sorted[..K as usize].iter().sum();
    let least_first = nucleus(of_k).unwrap().max(least_k);
    let from = |least: f64| of_row.iter().map(|&p| if p >= least { p } else { 0.0 }).collect::<Vec<_>>();
    let expected =
        [from(0.0), from(least_k), from(least_p), from(MIN * sorted[0]), from(least_k.max(least_p)), from(least_first)];
    let mut context = SamplingContext::new(&gpu.stream, 50_000).unwrap();
    for ((name, draw), expected) in OF_PROBS.into_iter().zip(&expected) {
        let mut philox = Philox::new(2024);
        let counts = counted(gpu, &row, &mut |output, rows| {
            draw(&mut context, output, rows, &mut philox, &options()).unwrap();
        });
        assert_distributed(name, &counts, expected);
    }
    let logits: Vec<f32> = row.iter().map(|p| p.ln()).collect();
    let mut philox = Philox::new(7);
    let counts = counted(gpu, &logits, &mut |output, rows| {
        FROM_LOGITS(&mut context, output, rows, &mut philox, &options()).unwrap();
    });
    assert_distributed("from logits", &counts, &of_row);
    let counts = counted(gpu, &logits, &mut |output, rows| {
        let stream = Stream::cudarc(&gpu.stream);
        // SAFETY: the logits are numbers.
        unsafe { sampling_from_logits(output, &rows.as_ref(), &mut philox, &options(), stream) }.unwrap();
    });
    assert_distributed("from logits, by noise", &counts, &of_row);
}

fn repeatable(gpu: &Gpu) {
    let (rows, vocab) = (probs(40, 200, 32_000, 2.0), 32_000);
    for (name, draw) in OF_PROBS {
        let mut philox = Philox::new(99);
        let first = on_gpu(&gpu.stream, draw, &rows, vocab, &mut philox, &options()).0;
        let again = on_gpu(&gpu.stream, draw, &rows, vocab, &mut Philox::new(99), &options()).0;
        assert_eq!(first, again, "{name}");
        assert_ne!(first, on_gpu(&gpu.stream, draw, &rows, vocab, &mut philox, &options()).0, "{name}: the next");
        assert_ne!(
            first,
            on_gpu(&gpu.stream, draw, &rows, vocab, &mut Philox::new(98), &options()).0,
            "{name}: another"
        );
    }
}

fn per_row(gpu: &Gpu) {
    let (stream, count, vocab) = (&gpu.stream, 64usize, 1000usize);
    let rows = probs(50, count, vocab, 1.0);
    let mut context = SamplingContext::new(stream, count).unwrap();
    let best: Vec<i32> =
        rows.chunks(vocab).map(|row| (0..vocab).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as i32).collect();
    // Every other row has the least of what is allowed, and so its likeliest token; then it is the other way round.
    let alternate = |odd: usize| move |row: usize| row % 2 == odd;
    let top_k = |odd| {
        PerRow::<TopK>::new(&(0..count).map(|row| if alternate(odd)(row) { 1 } else { i32::MAX }).collect::<Vec<_>>())
            .unwrap()
    };
    let top_p = |odd| {
        PerRow::<TopP>::new(&(0..count).map(|row| if alternate(odd)(row) { 1e-30 } else { 1.0 }).collect::<Vec<_>>())
            .unwrap()
    };
    let min_p = |odd| {
        PerRow::<MinP>::new(&(0..count).map(|row| if alternate(odd)(row) { 1.0 } else { 0.0 }).collect::<Vec<_>>())
            .unwrap()
    };
    let mut own = (
        OnDevice::new(top_k(1), stream).unwrap(),
        OnDevice::new(top_p(1), stream).unwrap(),
        OnDevice::new(min_p(1), stream).unwrap(),
    );
    for odd in [1, 0] {
        own.0.replace(top_k(odd), stream).unwrap();
        own.1.replace(top_p(odd), stream).unwrap();
        own.2.replace(min_p(odd), stream).unwrap();
        for call in 0..4 {
            let mut memory = stream.clone_htod(&rows).unwrap();
            let mut tokens = stream.clone_htod(&vec![-7i32; count]).unwrap();
            let mut output = TensorMut::from_cudarc(stream, &mut tokens, &[count as i64]).unwrap();
            let mut tensor = TensorMut::from_cudarc(stream, &mut memory, &[count as i64, vocab as i64]).unwrap();
            let (k, p) = (own.0.placed(stream).unwrap(), own.1.placed(stream).unwrap());
            let (m, philox) = (own.2.placed(stream).unwrap(), &mut Philox::new(5));
            let mut sampler = context.sampler().unwrap();
            match call {
                0 => sampler.top_k_sampling_from_probs(&mut output, &mut tensor, &k, philox, &options()),
                1 => sampler.top_p_sampling_from_probs(&mut output, &mut tensor, &p, philox, &options()),
                2 => sampler.min_p_sampling_from_probs(&mut output, &mut tensor, &m, philox, &options()),
                _ => sampler.top_k_top_p_sampling_from_probs(&mut output, &mut tensor, &k, &p, philox, &joint()),
            }
            .unwrap();
            let tokens = stream.clone_dtoh(&tokens).unwrap();
            let least = (0..count).filter(|&row| alternate(odd)(row)).filter(|&row| tokens[row] != best[row]).count();
            let others = (0..count).filter(|&row| !alternate(odd)(row)).filter(|&row| tokens[row] != best[row]).count();
            assert_eq!(least, 0, "call {call}: {tokens:?}");
            assert!(others > count / 4, "call {call}: of rows without a limit only {others} have another token");
        }
    }
}

fn probabilities(gpu: &Gpu) {
    let stream = &gpu.stream;
    // One block for a row, which it keeps or reads twice; and several for a long one.
    let shapes =
        [(1, 1), (3, 7), (4, 4096), (20, 4000), (40, 1000), (200, 30_000), (32, 128_256), (2, 24_577), (5, 40_006)];
    for (i, (count, vocab)) in shapes.into_iter().enumerate() {
        let shape = [count as i64, vocab as i64];
        let mut random = Random(60 + i as u64);
        let mut logits = random.normal_f32(4.0, count * vocab);
        logits[vocab / 2] = if vocab > 1 { f32::NEG_INFINITY } else { 0.0 };
        let temperatures: Vec<f32> = random.between(0.2, 3.0, count);
        let temperatures = PerRow::<Temperature>::new(&temperatures).unwrap();
        let on_gpu = OnDevice::new(temperatures.clone(), stream).unwrap();
        let input = stream.clone_htod(&logits).unwrap();
        let input = TensorRef::from_cudarc(stream, &input, &shape).unwrap();
        let mut context = SamplingContext::new(stream, count).unwrap();
        for own in [false, true] {
            let mut out = stream.clone_htod(&vec![f32::NAN; count * vocab]).unwrap();
            let mut output = TensorMut::from_cudarc(stream, &mut out, &shape).unwrap();
            let mut expected = vec![f32::NAN; count * vocab];
            let mut on_host = TensorMut::from_slice(&mut expected, &shape).unwrap();
            let host_input = TensorRef::from_slice(&logits, &shape).unwrap();
            let (mut sampler, mut host) = (context.sampler().unwrap(), SamplingContext::on_host());
            if own {
                let rows = on_gpu.placed(stream).unwrap();
                sampler.softmax(&mut output, &input, &rows, &options()).unwrap();
                let rows = Placed::on_host(&temperatures).unwrap();
                host.sampler().unwrap().softmax(&mut on_host, &host_input, &rows, &options()).unwrap();
            } else {
                sampler.softmax(&mut output, &input, 0.7, &options().with_pdl(true)).unwrap();
                host.sampler().unwrap().softmax(&mut on_host, &host_input, 0.7, &options()).unwrap();
            }
            let found = stream.clone_dtoh(&out).unwrap();
            assert_close(&format!("{count}×{vocab}, own {own}"), &found, &expected, 1e-5);
            // In place, and with a workspace of one's own: the same bits.
            let mut again = stream.clone_htod(&logits).unwrap();
            let mut tensor = TensorMut::from_cudarc(stream, &mut again, &shape).unwrap();
            if own {
                let rows = on_gpu.placed(stream).unwrap();
                context.sampler().unwrap().softmax_in_place(&mut tensor, &rows, &options()).unwrap();
            } else {
                let bytes = softmax_workspace_size(count as i64, vocab as i64);
                let mut workspace = stream.alloc_zeros::<u8>(bytes.max(1) as usize).unwrap();
                let mut workspace = TensorMut::from_cudarc(stream, &mut workspace, &[bytes]).unwrap();
                let s = Stream::cudarc(stream);
                softmax(&mut tensor, &input, 0.7, &mut workspace, &options(), s).unwrap();
            }
            assert!(stream.clone_dtoh(&again).unwrap() == found, "{count}×{vocab}, own {own}");
        }
    }
}

fn renormalized(gpu: &Gpu) {
    let stream = &gpu.stream;
    let s = Stream::cudarc(stream);
    for (i, (count, vocab)) in
        [(1, 1), (7, 33), (3, 1000), (50, 4096), (5, 50_000), (4, 57_000)].into_iter().enumerate()
    {
        let shape = [count as i64, vocab as i64];
        let rows = probs(70 + i as u64, count, vocab, 2.0);
        let ks: Vec<i32> = (0..count as i32).map(|row| 1 + row * row % 50).collect();
        let ks = PerRow::<TopK>::new(&ks).unwrap();
        let (own, host_own) = (OnDevice::new(ks.clone(), stream).unwrap(), Placed::on_host(&ks).unwrap());
        let own = own.placed(stream).unwrap();
        let input = stream.clone_htod(&rows).unwrap();
        let input = TensorRef::from_cudarc(stream, &input, &shape).unwrap();
        let host_input = TensorRef::from_slice(&rows, &shape).unwrap();
        let mut out = stream.clone_htod(&vec![f32::NAN; count * vocab]).unwrap();
        let mut expected = vec![f32::NAN; count * vocab];
        let what = format!("{count}×{vocab}");
        top_k_renorm_probs(&mut TensorMut::from_cudarc(stream, &mut out, &shape).unwrap(), &input, &own, s).unwrap();
        let mut on_host = TensorMut::from_slice(&mut expected, &shape).unwrap();
        top_k_renorm_probs(&mut on_host, &host_input, &host_own, Stream::NULL).unwrap();
        assert_close(&what, &stream.clone_dtoh(&out).unwrap(), &expected, 1e-5);
        top_k_mask_logits(&mut TensorMut::from_cudarc(stream, &mut out, &shape).unwrap(), &input, &own, s).unwrap();
        let mut on_host = TensorMut::from_slice(&mut expected, &shape).unwrap();
        top_k_mask_logits(&mut on_host, &host_input, &host_own, Stream::NULL).unwrap();
        assert!(stream.clone_dtoh(&out).unwrap() == expected, "{what}");
        for p in [1e-30, 0.3, 0.95, 1.0] {
            let mut memory = stream.clone_htod(&rows).unwrap();
            let mut tensor = TensorMut::from_cudarc(stream, &mut memory, &shape).unwrap();
            let mut context = SamplingContext::new(stream, count).unwrap();
            context.sampler().unwrap().top_p_renorm_probs_in_place(&mut tensor, p).unwrap();
            let mut host = rows.clone();
            let mut tensor = TensorMut::from_slice(&mut host, &shape).unwrap();
            SamplingContext::on_host().sampler().unwrap().top_p_renorm_probs_in_place(&mut tensor, p).unwrap();
            // A token at the edge of the nucleus may be on either side of it.
            assert_close(&format!("{what} at {p}"), &stream.clone_dtoh(&memory).unwrap(), &host, 1e-3);
        }
    }
}

/// The longest rows that are taken are computed, in every type; on smaller GPUs they are shorter.
fn one_block(gpu: &Gpu) {
    let stream = &gpu.stream;
    let s = Stream::cudarc(stream);
    fn longest(call: &mut dyn FnMut(i64) -> Result<()>) -> i64 {
        let (mut taken, mut refused) = (1i64, 1 << 18);
        while refused - taken > 1 {
            let middle = (taken + refused) / 2;
            match call(middle) {
                Ok(()) => taken = middle,
                Err(FlashInferError::InvalidArgument { argument: "vocab", .. }) => refused = middle,
                Err(error) => panic!("{middle}: {error}"),
            }
        }
        taken
    }
    let mut memory = stream.alloc_zeros::<f32>(2 << 18).unwrap();
    let renorm = longest(&mut |vocab| {
        top_k_renorm_probs_in_place(&mut TensorMut::from_cudarc(stream, &mut memory, &[2, vocab])?, 3, s)
    });
    let mut halves = stream.alloc_zeros::<f16>(2 << 18).unwrap();
    let of_halves = longest(&mut |vocab| {
        top_k_renorm_probs_in_place(&mut TensorMut::from_cudarc(stream, &mut halves, &[2, vocab])?, 3, s)
    });
    println!("rows in one block: {renorm} in F32, {of_halves} in F16");
    assert!(renorm > 15_000 && of_halves > 30_000);
    let rows = probs(80, 2, renorm as usize, 1.0);
    let mut memory = stream.clone_htod(&rows).unwrap();
    let mut tensor = TensorMut::from_cudarc(stream, &mut memory, &[2, renorm]).unwrap();
    top_k_renorm_probs_in_place(&mut tensor, 10, s).unwrap();
    let found = stream.clone_dtoh(&memory).unwrap();
    for row in found.chunks(renorm as usize) {
        assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-5 && row.iter().filter(|p| **p > 0.0).count() >= 10);
    }
    let vocab = of_halves as usize;
    let logits: Vec<bf16> = Random(81).normal(2 * vocab);
    let input = stream.clone_htod(&logits).unwrap();
    let mut out = stream.clone_htod(&vec![bf16::NAN; 2 * vocab]).unwrap();
    let input = TensorRef::from_cudarc(stream, &input, &[2, of_halves]).unwrap();
    top_k_mask_logits(&mut TensorMut::from_cudarc(stream, &mut out, &[2, of_halves]).unwrap(), &input, 7, s).unwrap();
    for (found, row) in stream.clone_dtoh(&out).unwrap().chunks(vocab).zip(logits.chunks(vocab)) {
        let mut sorted: Vec<f32> = row.iter().map(|x| x.to_f32()).collect();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let kept = |x: bf16| if x.to_f32() >= sorted[6] { x } else { bf16::NEG_INFINITY };
        assert!(found.iter().zip(row).all(|(found, x)| *found == kept(*x)));
    }
}

/// With rows that one block takes all the same: those that several share may hang.
fn long_form(gpu: &Gpu) {
    let stream = &gpu.stream;
    let (s, shape) = (Stream::cudarc(stream), [300, 4000]);
    let rows = stream.clone_htod(&probs(82, 300, 4000, 1.0)).unwrap();
    let input = TensorRef::from_cudarc(stream, &rows, &shape).unwrap();
    let mut states = stream.alloc_zeros::<u8>(ROW_STATES_SIZE as usize).unwrap();
    let mut outputs = [(); 4].map(|()| stream.clone_htod(&vec![f32::NAN; 300 * 4000]).unwrap());
    {
        let mut states = TensorMut::from_cudarc(stream, &mut states, &[ROW_STATES_SIZE]).unwrap();
        let [mut a, mut b, mut c, mut d] =
            outputs.each_mut().map(|output| TensorMut::from_cudarc(stream, output, &shape).unwrap());
        top_k_renorm_probs(&mut a, &input, 10, s).unwrap();
        top_k_mask_logits(&mut b, &input, 10, s).unwrap();
        // SAFETY: the states are zeros, for this stream alone, and no blocks wait for others.
        unsafe {
            top_k_renorm_probs_of_long_rows(&mut c, &input, 10, &mut states, s).unwrap();
            top_k_mask_logits_of_long_rows(&mut d, &input, 10, &mut states, s).unwrap();
        }
    }
    let [a, b, c, d] = outputs.map(|output| stream.clone_dtoh(&output).unwrap());
    assert!(a == c && b == d);
    assert!(stream.clone_dtoh(&states).unwrap().iter().all(|byte| *byte == 0));
}

/// Buffers of speculative sampling.
struct Chain {
    drafts: CudaSlice<f32>,
    ids: CudaSlice<i32>,
    targets: CudaSlice<f32>,
    output: CudaSlice<i32>,
    counters: [CudaSlice<i32>; 2],
    sizes: [i64; 3],
}

impl Chain {
    fn new(
        stream: &Arc<CudaStream>,
        drafts: &[f32],
        ids: &[i32],
        targets: &[f32],
        [batch, count, vocab]: [i64; 3],
    ) -> Self {
        let counters = [5, 9].map(|start| stream.clone_htod(&vec![start; batch as usize]).unwrap());
        Self {
            drafts: stream.clone_htod(drafts).unwrap(),
            ids: stream.clone_htod(ids).unwrap(),
            targets: stream.clone_htod(targets).unwrap(),
            output: stream.clone_htod(&vec![-7; (batch * (count + 1)) as usize]).unwrap(),
            counters,
            sizes: [batch, count, vocab],
        }
    }

    fn run(&mut self, stream: &Arc<CudaStream>, context: &mut SamplingContext, philox: &mut Philox) -> Result<()> {
        let [batch, count, vocab] = self.sizes;
        let [accepted, emitted] = &mut self.counters;
        let mut tensors = ChainTensors {
            draft_probs: TensorMut::from_cudarc(stream, &mut self.drafts, &[batch, count, vocab])?,
            draft_token_ids: TensorRef::from_cudarc(stream, &self.ids, &[batch, count])?,
            target_probs: TensorMut::from_cudarc(stream, &mut self.targets, &[batch, count + 1, vocab])?,
            output_token_ids: TensorMut::from_cudarc(stream, &mut self.output, &[batch, count + 1])?,
            output_accepted_token_num: TensorMut::from_cudarc(stream, accepted, &[batch])?,
            output_emitted_draft_token_num: TensorMut::from_cudarc(stream, emitted, &[batch])?,
        };
        context.sampler()?.chain_speculative_sampling(&mut tensors, philox, &options())
    }

    /// The output, and what was added to the counters.
    fn found(&self, stream: &Arc<CudaStream>) -> (Vec<i32>, Vec<i32>, Vec<i32>) {
        let [accepted, emitted] = self.counters.each_ref().map(|counter| stream.clone_dtoh(counter).unwrap());
        let less = |all: Vec<i32>, start: i32| all.into_iter().map(|count| count - start).collect::<Vec<_>>();
        (stream.clone_dtoh(&self.output).unwrap(), less(accepted, 5), less(emitted, 9))
    }
}

/// Drafts that are drawn from their own rows, as a smaller model's are.
fn drafted(stream: &Arc<CudaStream>, drafts: &[f32], vocab: usize, seed: u64) -> Vec<i32> {
    on_gpu(stream, FROM_PROBS, drafts, vocab, &mut Philox::new(seed), &options()).0
}

fn chains(gpu: &Gpu) {
    let stream = &gpu.stream;
    // Against the reference, of few tokens.
    for (batch, count, vocab) in [(200i64, 3i64, 50i64), (1, 1, 1), (40, 5, 7)] {
        let drafts = probs(90, (batch * count) as usize, vocab as usize, 1.0);
        let targets = probs(91, (batch * (count + 1)) as usize, vocab as usize, 1.0);
        let ids = drafted(stream, &drafts, vocab as usize, 1);
        let mut chain = Chain::new(stream, &drafts, &ids, &targets, [batch, count, vocab]);
        let mut context = SamplingContext::new(stream, (batch * (2 * count + 1)) as usize).unwrap();
        let mut philox = Philox::new(17);
        chain.run(stream, &mut context, &mut philox).unwrap();
        assert!(context.statuses(batch as usize).unwrap().iter().all(|status| status.is_valid()));
        let (output, accepted, emitted) = chain.found(stream);
        let (mut host_drafts, mut host_targets) = (drafts.clone(), targets.clone());
        let mut expected = vec![-7; output.len()];
        let (mut host_accepted, mut host_emitted) = (vec![0; batch as usize], vec![0; batch as usize]);
        let mut tensors = ChainTensors {
            draft_probs: TensorMut::from_slice(&mut host_drafts, &[batch, count, vocab]).unwrap(),
            draft_token_ids: TensorRef::from_slice(&ids, &[batch, count]).unwrap(),
            target_probs: TensorMut::from_slice(&mut host_targets, &[batch, count + 1, vocab]).unwrap(),
            output_token_ids: TensorMut::from_slice(&mut expected, &[batch, count + 1]).unwrap(),
            output_accepted_token_num: TensorMut::from_slice(&mut host_accepted, &[batch]).unwrap(),
            output_emitted_draft_token_num: TensorMut::from_slice(&mut host_emitted, &[batch]).unwrap(),
        };
        let mut other = Philox::new(17);
        let mut host = SamplingContext::on_host();
        host.sampler().unwrap().chain_speculative_sampling(&mut tensors, &mut other, &options()).unwrap();
        assert_eq!(philox, other);
        let width = (count + 1) as usize;
        let differ = output.chunks(width).zip(expected.chunks(width)).filter(|(a, b)| a != b).count();
        assert!(differ <= batch as usize / 100, "{differ} of {batch} sequences differ");
        let apart =
            accepted.iter().zip(&host_accepted).chain(emitted.iter().zip(&host_emitted)).filter(|(a, b)| a != b);
        assert!(apart.count() <= 2 * batch as usize / 100);
    }
    // The first token of all is distributed as the target's.
    let (draft, target) = (probs(92, 1, 64, 1.0), probs(93, 1, 64, 1.0));
    let batch = 50_000i64;
    let mut counts = vec![0; 64];
    let mut context = SamplingContext::new(stream, 3 * batch as usize).unwrap();
    let mut philox = Philox::new(4);
    for round in 0..10 {
        let drafts = draft.repeat(batch as usize);
        let ids = drafted(stream, &drafts, 64, 1000 + round);
        let targets = target.repeat(2 * batch as usize);
        let mut chain = Chain::new(stream, &drafts, &ids, &targets, [batch, 1, 64]);
        chain.run(stream, &mut context, &mut philox).unwrap();
        chain.found(stream).0.chunks(2).for_each(|pair| counts[pair[0] as usize] += 1);
    }
    assert_distributed("speculative", &counts, &target.iter().map(|&p| p.into()).collect::<Vec<_>>());
}

/// Twice the target's probabilities: half of the drafts are rejected, and nothing is left to draw behind them.
fn without_rest(gpu: &Gpu) {
    let stream = &gpu.stream;
    for vocab in [3usize, 1000, 5003] {
        let batch = 2000i64;
        let target = probs(95, 1, vocab, 1.0);
        let best = (0..vocab).max_by(|&a, &b| target[a].total_cmp(&target[b]).then(b.cmp(&a))).unwrap() as i32;
        let drafts: Vec<f32> = target.iter().map(|p| 2.0 * p).collect::<Vec<_>>().repeat(batch as usize);
        let ids: Vec<i32> = (0..batch as usize).map(|i| (i % vocab) as i32).collect();
        let targets = target.repeat(2 * batch as usize);
        let mut chain = Chain::new(stream, &drafts, &ids, &targets, [batch, 1, vocab as i64]);
        let mut context = SamplingContext::new(stream, 3 * batch as usize).unwrap();
        chain.run(stream, &mut context, &mut Philox::new(3)).unwrap();
        let (output, accepted, emitted) = chain.found(stream);
        assert!(accepted.iter().zip(&emitted).all(|(accepted, emitted)| emitted <= accepted && *accepted <= 1));
        let mut rejected = 0;
        for (i, pair) in output.chunks(2).enumerate() {
            if emitted[i] == 1 {
                assert!(pair[0] == ids[i] && (0..vocab as i32).contains(&pair[1]), "{pair:?}");
            } else {
                rejected += 1;
                assert_eq!(pair, [best, -1], "sequence {i} of {vocab}");
            }
        }
        assert!((800..1200).contains(&rejected), "{rejected}");
    }
}

fn hostile_chains(gpu: &Gpu) {
    let stream = &gpu.stream;
    the_guard_works(stream);
    let (batch, count, vocab) = (6i64, 3i64, 1001i64);
    let mut drafts = probs(96, 18, 1001, 1.0);
    let mut targets = probs(97, 24, 1001, 1.0);
    let mut ids = drafted(stream, &drafts, 1001, 1);
    for (i, id) in [(0, -1), (4, 1001), (8, i32::MAX), (9, i32::MIN)] {
        ids[i] = id;
    }
    drafts[13 * 1001 + 1000] = f32::NAN;
    targets[23 * 1001] = f32::INFINITY;
    targets[16 * 1001..17 * 1001].fill(0.0);
    let mut chain = Chain::new(stream, &drafts, &ids, &targets, [batch, count, vocab]);
    let mut context = SamplingContext::new(stream, 6 * 7).unwrap();
    for round in 0..50 {
        chain.run(stream, &mut context, &mut Philox::new(round)).unwrap();
        let (output, ..) = chain.found(stream);
        assert!(output.iter().all(|token| (-1..1001).contains(token)), "{output:?}");
        assert!(output.chunks(4).all(|tokens| tokens[0] >= 0));
        if round == 0 {
            let bits: Vec<_> = context.statuses(6).unwrap().iter().map(|status| status.bits()).collect();
            assert_eq!(bits, [16, 16, 16, 16, 1 | 8, 2]);
        }
    }
}

type Step = (SamplingContext, CudaSlice<f32>, CudaSlice<i32>, OnDevice<PerRow<TopP>>);

fn graphs(gpu: &Gpu) {
    let (stream, count, vocab) = (&gpu.stream, 16usize, 4000usize);
    let shape = [count as i64, vocab as i64];
    let rows = probs(100, count, vocab, 1.0);
    let eager = |rows: &[f32], p: f64| {
        let draw: Draw = if p == 1.0 {
            |c, output, probs, philox, o| c.sampler()?.top_p_sampling_from_probs(output, probs, 1.0, philox, o)
        } else {
            |c, output, probs, philox, o| c.sampler()?.top_p_sampling_from_probs(output, probs, 1e-30, philox, o)
        };
        on_gpu(stream, draw, rows, vocab, &mut Philox::new(8).at(4), &options())
    };
    let every = |p: f32| PerRow::<TopP>::new(&vec![p; count]).unwrap();
    let step: Step = (
        SamplingContext::new(stream, count).unwrap(),
        stream.clone_htod(&rows).unwrap(),
        stream.alloc_zeros(count).unwrap(),
        OnDevice::new(every(1.0), stream).unwrap(),
    );
    let mut graph = LaunchGraph::new(stream, step).unwrap();
    let mut philox = Philox::new(8).at(4);
    let error = graph
        .capture(|s, (mut context, mut probs, mut tokens, top_p)| {
            let (mut output, mut rows) = (tokens.write(&[count as i64])?, probs.write(&shape)?);
            let mut sampler = context.sampler(s)?;
            sampler.top_p_sampling_from_probs(&mut output, &mut rows, &top_p.placed()?, &mut philox, &options())
        })
        .unwrap_err();
    assert!(matches!(error, FlashInferError::FrozenRandomness { function: "top_p_sampling_from_probs" }), "{error}");
    assert_eq!(philox.offset(), 4);
    let mut philox = philox.frozen();
    graph
        .capture(|s, (mut context, mut probs, mut tokens, top_p)| {
            let (mut output, mut rows) = (tokens.write(&[count as i64])?, probs.write(&shape)?);
            let mut sampler = context.sampler(s)?;
            sampler.top_p_sampling_from_probs(&mut output, &mut rows, &top_p.placed()?, &mut philox, &options())
        })
        .unwrap();
    assert_eq!((graph.nodes(), philox.offset()), (2, 4 + 32 * count as u64), "the guard and the kernel");
    let found = |graph: &mut LaunchGraph<Step>| {
        graph.launch().unwrap();
        let (context, probs, tokens, _) = graph.buffers().unwrap();
        let statuses = stream.clone_dtoh(context.status().unwrap()).unwrap();
        let statuses: Vec<_> = statuses.into_iter().map(RowStatus::from_bits).collect();
        (stream.clone_dtoh(&tokens).unwrap(), stream.clone_dtoh(&probs).unwrap(), statuses)
    };
    let expected = eager(&rows, 1.0);
    assert_eq!(found(&mut graph), expected);
    assert_eq!(found(&mut graph), expected, "frozen");
    // Other rows and other numbers of rows, whatever they hold.
    let mut hostile = rows.clone();
    hostile[5 * vocab..6 * vocab].fill(f32::NAN);
    stream.memcpy_htod(&hostile, &mut graph.buffers().unwrap().1).unwrap();
    let (tokens, after, statuses) = found(&mut graph);
    let with_hostile = eager(&hostile, 1.0);
    assert_eq!((&tokens, &statuses), (&with_hostile.0, &with_hostile.2));
    assert!(after == with_hostile.1 && statuses[5].has_nan() && tokens[5] == 0);
    stream.memcpy_htod(&rows, &mut graph.buffers().unwrap().1).unwrap();
    graph.buffers().unwrap().3.replace(&every(1e-30), stream).unwrap();
    assert_eq!(found(&mut graph).0, eager(&rows, 0.0).0, "the likeliest tokens");
    // Softmax and a draw of what comes out, with programmatic launch.
    let logits: Vec<f32> = rows.iter().map(|p| p.ln()).collect();
    let (context, mut memory, tokens, top_p) = graph.into_buffers().unwrap();
    stream.memcpy_htod(&logits, &mut memory).unwrap();
    let mut graph = LaunchGraph::new(stream, (context, memory, tokens, top_p)).unwrap();
    let mut philox = Philox::new(8).at(4).frozen();
    graph
        .capture(|s, (mut context, mut logits, mut tokens, _)| {
            let (mut output, mut rows) = (tokens.write(&[count as i64])?, logits.write(&shape)?);
            context.sampler(s)?.sampling_from_logits(&mut output, &mut rows, &mut philox, &options())
        })
        .unwrap();
    let expected = on_gpu(stream, FROM_LOGITS, &logits, vocab, &mut Philox::new(8).at(4), &options());
    assert_eq!(found(&mut graph), expected);
}

/// Three draws of two sources in a graph, whose launches are as calls without a graph.
fn fresh_draws(gpu: &Gpu) {
    let stream = &gpu.stream;
    let (vocab, count) = (4000usize, 40usize);
    let rows = probs(130, count, vocab, 1.5);
    let (shape, outputs) = ([count as i64, vocab as i64], [count as i64]);
    let none = || stream.alloc_zeros::<i32>(count).unwrap();
    let buffers = (
        SamplingContext::new(stream, count).unwrap(),
        stream.clone_htod(&rows).unwrap(),
        (none(), none(), none()),
        (Philox::new(21), Philox::new(0).at(8)),
    );
    let mut graph = LaunchGraph::new(stream, buffers).unwrap();
    graph
        .capture(|s, (mut context, mut probs, (mut first, mut second, mut third), (one, other))| {
            let (mut rows, mut sampler, o) = (probs.write(&shape)?, context.sampler(s)?, joint());
            sampler.top_p_sampling_from_probs(&mut first.write(&outputs)?, &mut rows, P, one, &o)?;
            sampler.sampling_from_probs(&mut second.write(&outputs)?, &mut rows, other, &o)?;
            sampler.top_k_top_p_sampling_from_probs(&mut third.write(&outputs)?, &mut rows, K, P, one, &o)
        })
        .unwrap();
    let (mut one, mut other) = (Philox::new(21), Philox::new(0).at(8));
    let mut before = Vec::new();
    for launch in 0..5 {
        if launch == 3 {
            // Between launches the sources are the program's.
            let (_, _, _, (first, _)) = graph.buffers().unwrap();
            *first = Philox::new(77);
            one = Philox::new(77);
        }
        graph.launch().unwrap();
        let (_, _, (first, second, third), sources) = graph.buffers().unwrap();
        let found = [&first, &second, &third].map(|tokens| stream.clone_dtoh(tokens).unwrap());
        let eager = |draw, philox: &mut Philox| on_gpu(stream, draw, &rows, vocab, philox, &joint()).0;
        let expected = [eager(TOP_P, &mut one), eager(FROM_PROBS, &mut other), eager(JOINT, &mut one)];
        assert_eq!(found, expected, "launch {launch}");
        assert_ne!(found[0], found[2], "two draws of one source");
        assert_ne!(found.to_vec(), before, "launch {launch} and the one before it");
        assert_eq!((&*sources.0, &*sources.1), (&one, &other), "launch {launch}");
        before = found.to_vec();
    }
    // Captured again it goes on where its sources stand.
    graph
        .capture(|s, (mut context, mut probs, (mut first, ..), (one, _))| {
            let (mut rows, mut sampler) = (probs.write(&shape)?, context.sampler(s)?);
            sampler.min_p_sampling_from_probs(&mut first.write(&outputs)?, &mut rows, MIN, one, &options())
        })
        .unwrap();
    graph.launch().unwrap();
    let (_, _, (first, ..), _) = graph.buffers().unwrap();
    let found = stream.clone_dtoh(&first).unwrap();
    assert_eq!(found, on_gpu(stream, MIN_P, &rows, vocab, &mut one, &options()).0);
}

fn streams(gpu: &Gpu) {
    let (rows, vocab, count) = (probs(110, 64, 32_000, 2.0), 32_000usize, 64usize);
    let shape = [count as i64, vocab as i64];
    let expected = |seed: u64| on_gpu(&gpu.stream, JOINT, &rows, vocab, &mut Philox::new(seed), &options()).0;
    let mut bad = rows.clone();
    bad[..vocab].fill(f32::NAN);
    let mut sides: Vec<_> = [&rows, &bad]
        .into_iter()
        .map(|rows| {
            let stream = gpu.context.new_stream().unwrap();
            let memory = stream.clone_htod(rows).unwrap();
            let tokens: Vec<_> = (0..30).map(|_| stream.alloc_zeros::<i32>(count).unwrap()).collect();
            (SamplingContext::new(&stream, count).unwrap(), stream, memory, tokens)
        })
        .collect();
    for round in 0..30 {
        for (context, stream, memory, tokens) in &mut sides {
            let mut output = TensorMut::from_cudarc(stream, &mut tokens[round], &[count as i64]).unwrap();
            let mut tensor = TensorMut::from_cudarc(stream, memory, &shape).unwrap();
            JOINT(context, &mut output, &mut tensor, &mut Philox::new(round as u64), &options()).unwrap();
        }
    }
    for (side, (context, stream, _, tokens)) in sides.iter().enumerate() {
        for (round, tokens) in tokens.iter().enumerate() {
            let (found, expected) = (stream.clone_dtoh(tokens).unwrap(), expected(round as u64));
            assert_eq!(found[1..], expected[1..], "round {round} of stream {side}");
            assert_eq!(found[0], if side == 0 { expected[0] } else { 0 });
        }
        let statuses = context.statuses(count).unwrap();
        // A row that was mended once is right from then on.
        assert!(statuses.iter().all(|status| status.is_valid()), "{statuses:?}");
    }
}

fn asynchronous(gpu: &Gpu) {
    let stream = &gpu.stream;
    let mut context = SamplingContext::new(stream, 4).unwrap();
    let mut rows = stream.clone_htod(&probs(120, 4, 1000, 1.0)).unwrap();
    let mut tokens = stream.alloc_zeros::<i32>(4).unwrap();
    // Once before, so that nothing is loaded meanwhile.
    for busy in [false, true] {
        let mut call = || {
            let mut output = TensorMut::from_cudarc(stream, &mut tokens, &[4]).unwrap();
            let mut tensor = TensorMut::from_cudarc(stream, &mut rows, &[4, 1000]).unwrap();
            TOP_K(&mut context, &mut output, &mut tensor, &mut Philox::new(1), &options()).unwrap();
        };
        if busy { gpu.assert_asynchronous(stream, call) } else { call() }
    }
}

fn refused(gpu: &Gpu) {
    let stream = &gpu.stream;
    let named = |result: Result<()>| match result {
        Err(FlashInferError::InvalidArgument { argument, expected, .. }) => (argument, expected),
        other => panic!("{other:?}"),
    };
    let mut context = SamplingContext::new(stream, 4).unwrap();
    let mut rows = stream.clone_htod(&probs(130, 5, 100, 1.0)).unwrap();
    let before = stream.clone_dtoh(&rows).unwrap();
    let mut tokens = stream.clone_htod(&[-7i32; 5]).unwrap();
    let mut output = TensorMut::from_cudarc(stream, &mut tokens, &[5]).unwrap();
    let mut tensor = TensorMut::from_cudarc(stream, &mut rows, &[5, 100]).unwrap();
    let mut philox = Philox::new(1);
    for (name, draw) in OF_PROBS {
        let (argument, expected) = named(draw(&mut context, &mut output, &mut tensor, &mut philox, &options()));
        assert!(argument == "rows" && expected.contains("at most 4"), "{name}: {argument}, {expected}");
    }
    // On the host what is on a GPU, and the other way round.
    let mut host = SamplingContext::on_host();
    let (argument, expected) = named(FROM_PROBS(&mut host, &mut output, &mut tensor, &mut philox, &options()));
    assert!(argument == "probs" && expected.contains("memory of cpu"), "{argument}, {expected}");
    let (mut host_rows, mut host_tokens) = (vec![0.25f32; 8], [0i32; 2]);
    let mut host_output = TensorMut::from_slice(&mut host_tokens, &[2]).unwrap();
    let mut host_tensor = TensorMut::from_slice(&mut host_rows, &[2, 4]).unwrap();
    let result = TOP_K(&mut context, &mut host_output, &mut host_tensor, &mut philox, &options());
    assert_eq!(named(result).0, "probs");
    // A tensor of another stream.
    let other = gpu.context.new_stream().unwrap();
    let mut elsewhere = stream.clone_htod(&probs(131, 4, 100, 1.0)).unwrap();
    let mut elsewhere = TensorMut::from_cudarc(&other, &mut elsewhere, &[4, 100]).unwrap();
    let mut four = stream.alloc_zeros::<i32>(4).unwrap();
    let mut four = TensorMut::from_cudarc(stream, &mut four, &[4]).unwrap();
    assert_eq!(named(FROM_PROBS(&mut context, &mut four, &mut elsewhere, &mut philox, &options())).0, "probs");
    // Rows that several blocks would share are refused before anything is launched.
    let mut long = stream.clone_htod(&vec![f32::NAN; 128_256]).unwrap();
    let mut one = stream.alloc_zeros::<i32>(1).unwrap();
    let mut one = TensorMut::from_cudarc(stream, &mut one, &[1]).unwrap();
    let mut tensor = TensorMut::from_cudarc(stream, &mut long, &[1, 128_256]).unwrap();
    let result = TOP_K_FIRST(&mut context, &mut one, &mut tensor, &mut philox, &options());
    assert_eq!(named(result).0, "vocab");
    assert!(stream.clone_dtoh(&long).unwrap()[0].is_nan(), "the guard was not launched");
    assert_eq!(philox.offset(), 0);
    assert!(stream.clone_dtoh(&rows).unwrap() == before);
    assert_eq!(stream.clone_dtoh(&tokens).unwrap(), [-7; 5]);
    for rows in [0, 1 << 31] {
        let error = SamplingContext::new(stream, rows).unwrap_err();
        assert!(matches!(error, FlashInferError::InvalidArgument { argument: "rows", .. }), "{error}");
    }
    let per_thread = gpu.context.per_thread_stream();
    let error = SamplingContext::new(&per_thread, 4).unwrap_err();
    assert!(matches!(error, FlashInferError::InvalidArgument { argument: "stream", .. }), "{error}");
}

fn every_gpu(gpu: &Gpu) {
    let (rows, vocab) = (probs(140, 20, 5000, 2.0), 5000);
    let mut bad = rows.clone();
    bad[..vocab].fill(0.0);
    let devices = CudaContext::device_count().unwrap() as usize;
    let expected = on_gpu(&gpu.stream, JOINT, &bad, vocab, &mut Philox::new(3), &options());
    for device in (0..devices).rev() {
        let stream = CudaContext::new(device).unwrap().new_stream().unwrap();
        // Another device is current meanwhile.
        gpu.context.bind_to_thread().unwrap();
        assert!(on_gpu(&stream, JOINT, &bad, vocab, &mut Philox::new(3), &options()) == expected, "cuda:{device}");
    }
    println!("{devices} devices");
}

fn supported(_: &Gpu) {
    assert!(is_supported(Device::Cuda(0)).unwrap());
}
