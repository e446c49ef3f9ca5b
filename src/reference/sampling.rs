//! Probabilities out of logits, and tokens out of probabilities: FlashInfer's algorithms with the numbers that its kernels draw, so
//! that tokens are the same but where a sum that is rounded lies next to a number that was drawn.

use super::{Args, HostTensor, Raised, SafeCall, function};
use crate::philox::Philox;

pub(super) const FUNCTIONS: &[(&str, SafeCall)] = &[
    ("softmax", softmax),
    ("sampling_from_probs", sampling_from_probs),
    ("sampling_from_logits", sampling_from_logits),
    ("top_k_sampling_from_probs", top_k_sampling_from_probs),
    ("top_p_sampling_from_probs", top_p_sampling_from_probs),
    ("min_p_sampling_from_probs", min_p_sampling_from_probs),
    ("top_k_top_p_sampling_from_probs", top_k_top_p_sampling_from_probs),
    ("top_p_renorm_probs", top_p_renorm_probs),
    ("top_k_renorm_probs", top_k_renorm_probs),
    ("top_k_mask_logits", top_k_mask_logits),
    ("chain_speculative_sampling", chain_speculative_sampling),
];

/// The least that a sum counts as where a row is divided by it.
const LEAST_SUM: f64 = 1e-8;

function!(softmax, |args| {
    let [_workspace, logits, output, temperatures, temperature, _pdl] = args.exactly()?;
    let (logits, output) = (args.tensor(logits)?, args.tensor(output)?);
    let temperatures = Numbers::new(args, temperatures, args.float(temperature)?)?;
    for i in 0..logits.size(0)? {
        let (mut row, temperature) = (row_of(&logits, &[i])?, temperatures.of(i)?);
        row.iter_mut().for_each(|x| *x /= temperature);
        let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        row.iter_mut().for_each(|x| *x = (*x - most).exp());
        let sum: f64 = row.iter().sum();
        row.iter_mut().for_each(|x| *x /= sum);
        output.write(&[i], &row)?;
    }
    Ok(())
});

function!(sampling_from_probs, |args| {
    let [probs, output, _indices, deterministic, seed, offset] = args.exactly()?;
    draw_each(args, probs, output, [deterministic, seed, offset], |row, _, numbers| {
        draw(row, |p| p > 0.0, next(numbers))
    })
});

// The noise of a token is drawn by the thread that looks at it: four tokens at a time, as far as their number allows, have the
// numbers of one sequence.
function!(sampling_from_logits, |args| {
    let [logits, output, _indices, _deterministic, seed, offset] = args.exactly()?;
    let (logits, output, philox) = (args.tensor(logits)?, args.tensor(output)?, source(args, seed, offset)?);
    for i in 0..logits.size(0)? {
        let row = row_of(&logits, &[i])?;
        let vector = [4, 2, 1].into_iter().find(|vector| row.len().is_multiple_of(*vector)).unwrap_or(1);
        let mut best = (f64::NEG_INFINITY, 0);
        for (j, tokens) in row.chunks(vector).enumerate() {
            let numbers = philox.numbers((i * row.len() + j * vector) as u64);
            for (k, (logit, number)) in tokens.iter().zip(numbers).enumerate() {
                let noise = -(-(f64::from(number) * (1.0 - f64::from(f32::EPSILON))).ln()).ln();
                // Of equals the last.
                if logit + noise >= best.0 {
                    best = (logit + noise, j * vector + k);
                }
            }
        }
        output.set(&[i], best.1 as f64)?;
    }
    Ok(())
});

function!(top_k_sampling_from_probs, |args| {
    let [probs, output, _indices, top_ks, top_k, deterministic, seed, offset] = args.exactly()?;
    let top_k = Numbers::new(args, top_ks, args.int(top_k)? as f64)?;
    draw_each(args, probs, output, [deterministic, seed, offset], |row, i, numbers| {
        let k = positive("top_k", top_k.of(i)?)?;
        draw_above(row, numbers, |above| (above.count as f64) < k)
    })
});

function!(top_p_sampling_from_probs, |args| {
    let [probs, output, _indices, top_ps, top_p, deterministic, seed, offset] = args.exactly()?;
    let top_p = Numbers::new(args, top_ps, args.float(top_p)?)?;
    draw_each(args, probs, output, [deterministic, seed, offset], |row, i, numbers| {
        let p = positive("top_p", top_p.of(i)?)?;
        draw_above(row, numbers, |above| above.sum < p)
    })
});

function!(top_k_top_p_sampling_from_probs, |args| {
    let [probs, output, _indices, top_ks, top_k, top_ps, top_p, deterministic, seed, offset] = args.exactly()?;
    let top_k = Numbers::new(args, top_ks, args.int(top_k)? as f64)?;
    let top_p = Numbers::new(args, top_ps, args.float(top_p)?)?;
    draw_each(args, probs, output, [deterministic, seed, offset], |row, i, numbers| {
        let (k, p) = (positive("top_k", top_k.of(i)?)?, positive("top_p", top_p.of(i)?)?);
        draw_above(row, numbers, |above| (above.count as f64) < k && above.sum < p)
    })
});

function!(min_p_sampling_from_probs, |args| {
    let [probs, output, _indices, min_ps, min_p, deterministic, seed, offset] = args.exactly()?;
    let min_p = Numbers::new(args, min_ps, args.float(min_p)?)?;
    draw_each(args, probs, output, [deterministic, seed, offset], |row, i, numbers| {
        let most = row.iter().copied().fold(0.0, f64::max);
        // Rounded as the kernel rounds it: the likeliest token's own probability is not below it.
        let least = flushed(f64::from(most as f32 * min_p.of(i)? as f32));
        let kept: f64 = row.iter().filter(|p| **p >= least).sum();
        draw(row, |p| p >= least, part(numbers, kept))
    })
});

function!(top_p_renorm_probs, |args| {
    let [probs, renorm_probs, top_ps, top_p] = args.exactly()?;
    let (probs, renorm_probs) = (args.tensor(probs)?, args.tensor(renorm_probs)?);
    let top_p = Numbers::new(args, top_ps, args.float(top_p)?)?;
    for i in 0..probs.size(0)? {
        let (mut row, p) = (probabilities(&probs, &[i])?, positive("top_p", top_p.of(i)?)?);
        let (above, sum) = nucleus(&row, p)?;
        row.iter_mut().for_each(|x| *x = if *x > above { *x / sum } else { 0.0 });
        renorm_probs.write(&[i], &row)?;
    }
    Ok(())
});

function!(top_k_renorm_probs, |args| {
    let [probs, renorm_probs, top_ks, top_k, _row_states] = args.exactly()?;
    let (probs, renorm_probs) = (args.tensor(probs)?, args.tensor(renorm_probs)?);
    let top_k = Numbers::new(args, top_ks, args.int(top_k)? as f64)?;
    for i in 0..probs.size(0)? {
        let mut row = row_of(&probs, &[i])?;
        let least = largest(&row, top_k.of(i)?)?;
        let keeps = |x: f64| least.is_none_or(|least| x >= least);
        let kept: f64 = row.iter().copied().filter(|x| keeps(*x)).sum();
        row.iter_mut().for_each(|x| *x = if keeps(*x) { *x / kept.max(LEAST_SUM) } else { 0.0 });
        renorm_probs.write(&[i], &row)?;
    }
    Ok(())
});

function!(top_k_mask_logits, |args| {
    let [logits, mask_logits, top_ks, top_k, _row_states] = args.exactly()?;
    let (logits, mask_logits) = (args.tensor(logits)?, args.tensor(mask_logits)?);
    let top_k = Numbers::new(args, top_ks, args.int(top_k)? as f64)?;
    for i in 0..logits.size(0)? {
        let mut row = row_of(&logits, &[i])?;
        if let Some(least) = largest(&row, top_k.of(i)?)? {
            row.iter_mut().for_each(|x| *x = if *x >= least { *x } else { f64::NEG_INFINITY });
        }
        mask_logits.write(&[i], &row)?;
    }
    Ok(())
});

function!(chain_speculative_sampling, |args| {
    let [drafts, ids, targets, output, accepted, emitted, deterministic, seed, offset] = args.exactly()?;
    let (drafts, ids, targets) = (args.tensor(drafts)?, args.tensor(ids)?, args.tensor(targets)?);
    let (output, counters) = (args.tensor(output)?, [args.tensor(accepted)?, args.tensor(emitted)?]);
    args.bool(deterministic)?;
    let philox = source(args, seed, offset)?;
    let (count, vocab) = (drafts.size(1)?, drafts.size(2)?);
    for i in 0..drafts.size(0)? {
        let mut numbers = philox.numbers(i as u64).map(f64::from);
        let mut accepts =
            |j: usize, token: usize| Ok(part(&mut numbers, drafts.at(&[i, j, token])?) < targets.at(&[i, j, token])?);
        let tokens = (0..count).map(|j| ids.index(&[i, j], vocab)).collect::<Result<Vec<_>, _>>()?;
        let mut emitted = 0;
        while emitted < count && accepts(emitted, tokens[emitted])? {
            output.set(&[i, emitted], tokens[emitted] as f64)?;
            emitted += 1;
        }
        // With other numbers, and so the one that was rejected once more.
        let mut accepted = emitted;
        for (j, &token) in tokens.iter().enumerate().skip(emitted) {
            accepted += usize::from(accepts(j, token)?);
        }
        let target = probabilities(&targets, &[i, emitted])?;
        let mut rest = target.clone();
        if emitted < count {
            let draft = probabilities(&drafts, &[i, emitted])?;
            // In single precision, as the kernel has it: of two numbers that are equal there nothing is left.
            rest.iter_mut().zip(&draft).for_each(|(q, p)| *q = flushed(f64::from((*q as f32 - *p as f32).max(0.0))));
        }
        let sum: f64 = rest.iter().sum();
        let token = match draw(&rest, |p| p > 0.0, part(&mut numbers, sum))? {
            Some(token) => token,
            // By rounding alone: the target's likeliest.
            None => likeliest(&target),
        };
        output.set(&[i, emitted], token as f64)?;
        for j in emitted + 1..=count {
            output.set(&[i, j], -1.0)?;
        }
        for (counter, more) in counters.iter().zip([accepted, emitted]) {
            counter.set(&[i], counter.number(&[i])? + more as f64)?;
        }
    }
    Ok(())
});

/// One number for all rows, or each row's own.
struct Numbers<'a> {
    rows: Option<HostTensor<'a>>,
    all: f64,
}

impl<'a> Numbers<'a> {
    fn new(args: &Args<'a>, rows: usize, all: f64) -> Result<Self, Raised> {
        Ok(Self { rows: args.optional(rows)?, all })
    }

    fn of(&self, row: usize) -> Result<f64, Raised> {
        self.rows.as_ref().map_or(Ok(self.all), |rows| rows.number(&[row]))
    }
}

fn positive(name: &str, number: f64) -> Result<f64, Raised> {
    if number > 0.0 { Ok(number) } else { Err(("ValueError", format!("{name} is {number}, expected more than 0"))) }
}

fn source(args: &Args<'_>, seed: usize, offset: usize) -> Result<Philox, Raised> {
    Ok(Philox::new(args.int(seed)?.cast_unsigned()).at(args.int(offset)?.cast_unsigned()))
}

/// The row below a leading index.
fn row_of(tensor: &HostTensor<'_>, index: &[usize]) -> Result<Vec<f64>, Raised> {
    let mut row = vec![0.0; tensor.size(index.len())?];
    tensor.read(index, &mut row)?;
    Ok(row)
}

/// As [`row_of`], of probabilities, which kernels take for 0 where they are subnormal.
fn probabilities(tensor: &HostTensor<'_>, index: &[usize]) -> Result<Vec<f64>, Raised> {
    let mut row = row_of(tensor, index)?;
    row.iter_mut().for_each(|x| *x = flushed(*x));
    Ok(row)
}

/// As a kernel takes a number that is subnormal in single precision.
fn flushed(number: f64) -> f64 {
    if number.abs() < f64::from(f32::MIN_POSITIVE) { 0.0 } else { number }
}

/// The next of random numbers, which never end.
fn next(numbers: &mut dyn Iterator<Item = f64>) -> f64 {
    numbers.next().unwrap_or(1.0)
}

/// A part of a sum that is drawn. Rounded as the kernel rounds it, so that where sums are exact tokens are the same.
fn part(numbers: &mut dyn Iterator<Item = f64>, sum: f64) -> f64 {
    flushed(f64::from(next(numbers) as f32 * sum as f32))
}

/// Draws a token for each row of a tensor.
fn draw_each(
    args: &Args<'_>,
    probs: usize,
    output: usize,
    [deterministic, seed, offset]: [usize; 3],
    token: impl Fn(&[f64], usize, &mut dyn Iterator<Item = f64>) -> Result<Option<usize>, Raised>,
) -> Result<(), Raised> {
    let (probs, output) = (args.tensor(probs)?, args.tensor(output)?);
    args.bool(deterministic)?;
    let philox = source(args, seed, offset)?;
    for i in 0..probs.size(0)? {
        let row = probabilities(&probs, &[i])?;
        let mut numbers = philox.numbers(i as u64).map(f64::from);
        let Some(token) = token(&row, i, &mut numbers)? else {
            return Err(("ValueError", format!("row {i} has no probability above 0, expected a distribution")));
        };
        output.set(&[i], token as f64)?;
    }
    Ok(())
}

/// The first token that is kept at which the sum of those that are kept is above a number; the last that is kept where none is;
/// nothing where none is kept.
fn draw(row: &[f64], keeps: impl Fn(f64) -> bool, number: f64) -> Result<Option<usize>, Raised> {
    let (mut sum, mut last) = (0.0, None);
    for (i, &p) in row.iter().enumerate().filter(|(_, p)| keeps(**p)) {
        sum += p;
        last = Some(i);
        if sum > number {
            break;
        }
    }
    Ok(last)
}

/// The tokens that are likelier than another one: how many, and what they sum to.
struct Above {
    count: usize,
    sum: f64,
}

fn above(row: &[f64], pivot: f64) -> Above {
    let likelier = row.iter().filter(|p| **p > pivot);
    Above { count: likelier.clone().count(), sum: likelier.sum() }
}

/// Draws until the tokens that are likelier than the one that was drawn are so few or sum to so little that this one is kept too.
/// Each time that they do not, the next one is drawn from a part that has lost at least this one.
fn draw_above(
    row: &[f64],
    numbers: &mut dyn Iterator<Item = f64>,
    accepts: impl Fn(&Above) -> bool,
) -> Result<Option<usize>, Raised> {
    let (mut low, mut high, mut sum) = (0.0, 1.0, 1.0);
    loop {
        let number = part(numbers, sum);
        let Some(token) = draw(row, |p| p > low, number)? else { return Ok(None) };
        let pivots = [row[token], (row[token] + high) / 2.0];
        let [first, second] = pivots.map(|pivot| above(row, pivot));
        if accepts(&first) {
            return Ok(Some(token));
        }
        if accepts(&second) {
            (low, high, sum) = (pivots[0], pivots[1], first.sum);
        } else {
            (low, sum) = (pivots[1], second.sum);
        }
        // For rows with a probability above 1.
        if low >= high {
            return Ok(Some(token));
        }
    }
}

/// The part of a row that `top_p` keeps: all above a number, and what to divide it by.
fn nucleus(row: &[f64], p: f64) -> Result<(f64, f64), Raised> {
    if p >= 1.0 {
        let sum: f64 = row.iter().sum();
        return Ok((f64::NEG_INFINITY, if sum <= LEAST_SUM { 1.0 } else { sum }));
    }
    let mut high = row.iter().copied().fold(0.0, f64::max);
    if !high.is_finite() {
        return Err(("ValueError", format!("a row has {high}, expected probabilities")));
    }
    // Where nothing is left out the sum is taken for 1.
    let (mut low, mut sum) = (0.0, 1.0);
    loop {
        let pivots = [(high + 2.0 * low) / 3.0, (2.0 * high + low) / 3.0];
        let least = row.iter().copied().filter(|x| *x > low).fold(f64::from(high as f32), f64::min);
        let most = row.iter().copied().filter(|x| *x <= high).fold(f64::from(low as f32), f64::max);
        let [first, second] = pivots.map(|pivot| above(row, pivot).sum);
        if second >= p {
            (low, sum) = (pivots[1], second);
        } else if first >= p {
            (low, high, sum) = (pivots[0], pivots[1].min(most), first);
        } else {
            high = pivots[0].min(most);
        }
        if least == most {
            return Ok((low, sum.max(LEAST_SUM)));
        }
    }
}

/// The `k`-largest number of a row, NaN being the largest of all; none where all are kept.
fn largest(row: &[f64], k: f64) -> Result<Option<f64>, Raised> {
    let k = positive("top_k", k)? as usize;
    let mut sorted = row.to_vec();
    sorted.sort_unstable_by(|a, b| b.total_cmp(a));
    Ok((k < row.len()).then(|| sorted[k - 1]))
}

/// The first of a row's largest.
fn likeliest(row: &[f64]) -> usize {
    let mut best = 0;
    for (i, p) in row.iter().enumerate() {
        if *p > row[best] {
            best = i;
        }
    }
    best
}
