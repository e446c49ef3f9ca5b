//! What a decode step needs beside FlashInfer's kernels.

use super::{Args, HostTensor, Raised, SafeCall, function};

pub(super) const FUNCTIONS: &[(&str, SafeCall)] = &[
    ("embedding", embedding),
    ("rope_append", rope_append),
    ("qk_norm_rope_append", qk_norm_rope_append),
    ("add", add),
    ("mul", mul),
    ("sigmoid_gate", sigmoid_gate),
    ("silu", silu),
    ("copy", copy),
    ("softmax_rows", softmax_rows),
    ("argmax", argmax),
    ("advance", advance),
    ("sample", sample),
];

function!(embedding, |args| {
    let [out, ids, table, scale, pdl] = args.exactly()?;
    let (out, ids, table) = (args.tensor(out)?, args.tensor(ids)?, args.tensor(table)?);
    let (scale, _) = (args.float(scale)?, args.bool(pdl)?);
    let tokens: Result<Vec<_>, _> = (0..out.size(0)?).map(|row| ids.index(&[row], table.size(0)?)).collect();
    let mut numbers = vec![0.0; out.size(1)?];
    for (row, token) in tokens?.into_iter().enumerate() {
        table.read(&[token], &mut numbers)?;
        numbers.iter_mut().for_each(|x| *x *= scale);
        out.write(&[row], &numbers)?;
    }
    Ok(())
});

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

function!(add, |args| with(args, |a, b| a + b));
function!(mul, |args| with(args, |a, b| a * b));
function!(sigmoid_gate, |args| with(args, |a, gate| a * sigmoid(gate)));

/// a ← f(a, b).
fn with(args: &Args<'_>, f: impl Fn(f64, f64) -> f64) -> Result<(), Raised> {
    let [a, b, pdl] = args.exactly()?;
    let (a, b, _) = (args.tensor(a)?, args.tensor(b)?, args.bool(pdl)?);
    b.expect_shape(&[a.size(0)?, a.size(1)?])?;
    let mut other = vec![0.0; a.size(1)?];
    each_row(&a, |row, numbers| {
        b.read(&[row], &mut other)?;
        numbers.iter_mut().zip(&other).for_each(|(a, b)| *a = f(*a, *b));
        Ok(())
    })
}

/// Changes each row in place.
fn each_row(a: &HostTensor<'_>, mut change: impl FnMut(usize, &mut [f64]) -> Result<(), Raised>) -> Result<(), Raised> {
    let mut numbers = vec![0.0; a.size(1)?];
    for row in 0..a.size(0)? {
        a.read(&[row], &mut numbers)?;
        change(row, &mut numbers)?;
        a.write(&[row], &numbers)?;
    }
    Ok(())
}

function!(silu, |args| {
    let [a, pdl] = args.exactly()?;
    let (a, _) = (args.tensor(a)?, args.bool(pdl)?);
    each_row(&a, |_, numbers| {
        numbers.iter_mut().for_each(|x| *x *= sigmoid(*x));
        Ok(())
    })
});

function!(copy, |args| {
    let [out, input, pdl] = args.exactly()?;
    let (out, input, _) = (args.tensor(out)?, args.tensor(input)?, args.bool(pdl)?);
    let (rows, columns) = (out.size(0)?, out.size(1)?);
    input.expect_shape(&[rows, columns])?;
    for at in (0..rows).flat_map(|row| (0..columns).map(move |column| [row, column])) {
        if out.dtype == input.dtype {
            out.copy(&at, &input, &at)?;
        } else {
            out.set(&at, input.at(&at)?)?;
        }
    }
    Ok(())
});

function!(softmax_rows, |args| {
    let [a, temperature, pdl] = args.exactly()?;
    let (a, temperature, _) = (args.tensor(a)?, args.float(temperature)?, args.bool(pdl)?);
    each_row(&a, |_, numbers| {
        let most = numbers.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        numbers.iter_mut().for_each(|x| *x = ((*x - most) / temperature).exp());
        let sum: f64 = numbers.iter().sum();
        numbers.iter_mut().for_each(|x| *x /= sum);
        Ok(())
    })
});

function!(argmax, |args| {
    let [token, logits, pdl] = args.exactly()?;
    let (token, logits, _) = (args.tensor(token)?, args.tensor(logits)?, args.bool(pdl)?);
    let mut numbers = vec![0.0; logits.size(1)?];
    for row in 0..logits.size(0)? {
        logits.read(&[row], &mut numbers)?;
        // A comparison with what is no number is false.
        let of = |best: (usize, f64), (i, x): (usize, &f64)| if *x > best.1 { (i, *x) } else { best };
        let (largest, _) = numbers.iter().enumerate().fold((0, f64::NEG_INFINITY), of);
        token.set(&[row], largest as f64)?;
    }
    Ok(())
});

function!(advance, |args| {
    let [token, ids, positions, lengths, capacity, pdl] = args.exactly()?;
    let (token, ids) = (args.tensor(token)?, args.tensor(ids)?);
    let (positions, lengths) = (args.tensor(positions)?, args.tensor(lengths)?);
    let (capacity, _) = (args.int(capacity)? as f64, args.bool(pdl)?);
    for row in 0..ids.size(0)? {
        ids.set(&[row], token.number(&[row])?)?;
        positions.set(&[row], positions.number(&[row])?.clamp(-1.0, capacity - 2.0) + 1.0)?;
        lengths.set(&[row], lengths.number(&[row])?.clamp(0.0, capacity - 1.0) + 1.0)?;
    }
    Ok(())
});

function!(sample, |args| {
    let [token, probs, number, top_k, top_p, pdl] = args.exactly()?;
    let (token, probs, number) = (args.tensor(token)?, args.tensor(probs)?, args.tensor(number)?);
    let (top_k, top_p, _) = (args.int(top_k)? as usize, args.float(top_p)?, args.bool(pdl)?);
    let mut numbers = vec![0.0; probs.size(1)?];
    for row in 0..probs.size(0)? {
        probs.read(&[row], &mut numbers)?;
        // What is no number is none of a probability.
        numbers.iter_mut().for_each(|x| *x = if x.is_nan() { 0.0 } else { x.clamp(0.0, 1.0) });
        token.set(&[row], drawn(&numbers, number.at(&[row])?, top_k, top_p) as f64)?;
    }
    Ok(())
});

/// The token of these probabilities that a number draws.
fn drawn(probs: &[f64], number: f64, top_k: usize, top_p: f64) -> usize {
    let mut likeliest: Vec<usize> = (0..probs.len()).collect();
    // Of equals the first.
    likeliest.sort_by(|&a, &b| probs[b].total_cmp(&probs[a]));
    if top_k > 0 {
        likeliest.truncate(top_k);
    }
    if top_p > 0.0 {
        let mut ahead = 0.0;
        let kept = likeliest.iter().take_while(|&&i| {
            let is_kept = ahead < top_p;
            ahead += probs[i];
            is_kept
        });
        likeliest.truncate(kept.count());
    }
    likeliest.sort_unstable();
    let wanted = number.max(0.0) * likeliest.iter().map(|&i| probs[i]).sum::<f64>();
    let mut sum = 0.0;
    let drawn = likeliest.iter().find(|&&i| {
        sum += probs[i];
        sum > wanted
    });
    // For a number that is none from 0.0 to below 1.0 the last that can be drawn.
    let last = || likeliest.iter().rev().find(|&&i| probs[i] > 0.0);
    drawn.or_else(last).copied().unwrap_or(0)
}

function!(rope_append, |args| {
    let [q, k, v, cos_sin, positions, page_table, k_cache, v_cache, interleave, pdl] = args.exactly()?;
    let (tensors, _) = ([q, k, v, cos_sin, positions, page_table, k_cache, v_cache], args.bool(pdl)?);
    turned_append(args, tensors, None, args.bool(interleave)?)
});

function!(qk_norm_rope_append, |args| {
    let [q, k, v, q_weight, k_weight, cos_sin, positions, page_table, k_cache, v_cache, eps, interleave, pdl] =
        args.exactly()?;
    let (tensors, _) = ([q, k, v, cos_sin, positions, page_table, k_cache, v_cache], args.bool(pdl)?);
    let norm = ([args.tensor(q_weight)?, args.tensor(k_weight)?], args.float(eps)?);
    turned_append(args, tensors, Some(norm), args.bool(interleave)?)
});

fn turned_append(
    args: &Args<'_>,
    tensors: [usize; 8],
    norm: Option<([HostTensor<'_>; 2], f64)>,
    interleave: bool,
) -> Result<(), Raised> {
    let [q, k, v, cos_sin, positions, page_table, k_cache, v_cache] = tensors;
    let (q, k, v) = (args.tensor(q)?, args.tensor(k)?, args.tensor(v)?);
    let (cos_sin, positions, page_table) = (args.tensor(cos_sin)?, args.tensor(positions)?, args.tensor(page_table)?);
    let (k_cache, v_cache) = (args.tensor(k_cache)?, args.tensor(v_cache)?);
    let (pages, page_size, width) = (k_cache.size(0)?, k_cache.size(1)?, page_table.size(1)?);
    // All of them before anything is written.
    let mut places = Vec::with_capacity(q.size(0)?);
    for row in 0..q.size(0)? {
        let position = positions.index(&[row], cos_sin.size(0)?)?;
        if position / page_size >= width {
            return Err(("IndexError", format!("row {row} is at {position} and has {width} pages of {page_size}")));
        }
        let page = page_table.index(&[row, position / page_size], pages)?;
        places.push((position, page, position % page_size));
    }
    let (size, rotary) = (q.size(2)?, cos_sin.size(1)?);
    let (mut head, mut angles) = (vec![0.0; size], vec![0.0; rotary]);
    let mut weights = [vec![0.0; size], vec![0.0; size]];
    if let Some((tensors, _)) = &norm {
        tensors.iter().zip(&mut weights).try_for_each(|(tensor, weight)| tensor.read(&[], weight))?;
    }
    for (row, (position, page, entry)) in places.into_iter().enumerate() {
        cos_sin.read(&[position], &mut angles)?;
        for (from, which) in [(&q, 0), (&k, 1)] {
            for i in 0..from.size(1)? {
                from.read(&[row, i], &mut head)?;
                if let Some((_, eps)) = norm {
                    let square = head.iter().map(|x| x * x).sum::<f64>() / size as f64;
                    let factor = 1.0 / (square + eps).sqrt();
                    head.iter_mut().zip(&weights[which]).for_each(|(x, w)| *x *= factor * w);
                }
                let (cos, sin) = angles.split_at(rotary / 2);
                for (j, (cos, sin)) in cos.iter().zip(sin).enumerate() {
                    let (a, b) = if interleave { (2 * j, 2 * j + 1) } else { (j, j + rotary / 2) };
                    let (x, y) = (head[a], head[b]);
                    (head[a], head[b]) = (x * cos - y * sin, y * cos + x * sin);
                }
                match which {
                    0 => q.write(&[row, i], &head)?,
                    _ => k_cache.write(&[page, entry, i], &head)?,
                }
            }
        }
        for i in 0..v.size(1)? {
            for j in 0..size {
                v_cache.copy(&[page, entry, i, j], &v, &[row, i, j])?;
            }
        }
    }
    Ok(())
}
