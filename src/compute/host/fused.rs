//! What this crate's own kernels compute in one, on the host in f64.

use super::{HostCall, entries, put_tokens, store};
use crate::data::tensor::numbers;
use crate::error::Result;
use crate::tensor::DType;

/// A number as an element of a type holds it.
fn rounded(value: f64, dtype: DType) -> f64 {
    let mut element = [0; 8];
    let element = &mut element[..dtype.size()];
    store(element, dtype, value);
    numbers(element, dtype).next().unwrap_or(f64::NAN)
}

/// RMSNorm of rows as long as its weight.
fn norm(rows: &mut [f64], weight: &[f64], eps: f64) {
    for row in rows.chunks_exact_mut(weight.len()) {
        let squares = row.iter().map(|x| x * x).sum::<f64>() / weight.len() as f64;
        let factor = 1.0 / (squares + eps).sqrt();
        row.iter_mut().zip(weight).for_each(|(x, w)| *x *= factor * w);
    }
}

/// A product, of normed rows or gated or both.
pub(in super::super) fn around(call: &mut HostCall<'_>, normed: bool, gated: bool) -> Result<()> {
    let (mut x, inner) = (call.numbers(0), call.size(0, 1));
    if normed {
        norm(&mut x, &call.numbers(1), call.parameter("eps"));
    }
    let (weight, out) = if normed { (2, 3) } else { (1, 2) };
    let weight = call.numbers(weight);
    let dot = |x: &[f64], w: &[f64]| x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>();
    let mut result: Vec<f64> =
        x.chunks_exact(inner).flat_map(|x| weight.chunks_exact(inner).map(move |w| dot(x, w))).collect();
    if gated {
        let columns = weight.len() / inner;
        let gate = |row: &[f64]| -> Vec<f64> {
            let (gate, up) = row.split_at(columns / 2);
            gate.iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect()
        };
        result = result.chunks_exact(columns).flat_map(gate).collect();
    }
    call.put(out, &result);
    Ok(())
}

/// Turns heads by the angles of their rows' positions.
fn turn(heads: &mut [f64], size: usize, angles: &[f64], interleave: bool) {
    let half = angles.len() / 2;
    for head in heads.chunks_exact_mut(size) {
        for i in 0..half {
            let (a, b) = if interleave { (2 * i, 2 * i + 1) } else { (i, i + half) };
            let (x, y, cos, sin) = (head[a], head[b], angles[i], angles[half + i]);
            (head[a], head[b]) = (x * cos - y * sin, y * cos + x * sin);
        }
    }
}

/// Turned queries and keys, with their norms or without, the append, and attention. Turned ones are rounded, as they are where they are
/// stored.
pub(in super::super) fn turned_attention(call: &mut HostCall<'_>, normed: bool) -> Result<()> {
    let (heads, size, kv_heads) = (call.size(0, 1), call.size(0, 2), call.size(1, 1));
    let [mut q, mut k, v] = [0, 1, 2].map(|operand| call.numbers(operand));
    let first = if normed { 5 } else { 3 };
    if normed {
        let eps = call.parameter("eps");
        norm(&mut q, &call.numbers(3), eps);
        norm(&mut k, &call.numbers(4), eps);
    }
    let (angles, rotary) = (call.numbers(first), call.size(first, 1));
    let (table, cache) = (first + 3, first + 4);
    let (pages, page_size, width) = (call.size(cache, 0), call.size(cache, 1), call.size(table, 1));
    let (positions, places) = entries(call, first + 1, table, call.size(first, 0))?;
    let lengths = call.indices(first + 2, width * page_size + 1)?;
    let pages_of = call.indices(table, pages)?;
    let interleave = call.parameter("interleave") != 0.0;
    let dtype = call.graph.tensors[call.node.accesses[cache].tensor].spec.dtype;
    for (row, position) in positions.iter().enumerate() {
        let angles = &angles[position * rotary..][..rotary];
        turn(&mut q[row * heads * size..][..heads * size], size, angles, interleave);
        turn(&mut k[row * kv_heads * size..][..kv_heads * size], size, angles, interleave);
    }
    q.iter_mut().chain(&mut k).for_each(|x| *x = rounded(*x, dtype));
    put_tokens(call, &places, cache, [&k, &v]);
    let [keys, values] = [cache, cache + 1].map(|operand| call.numbers(operand));
    let (scale, mut out) = (call.parameter("scale"), Vec::with_capacity(q.len()));
    for (i, query) in q.chunks_exact(size).enumerate() {
        let (row, kv_head) = (i / heads, i % heads / (heads / kv_heads));
        let tokens: Vec<usize> = (0..lengths[row])
            .map(|token| {
                let entry = pages_of[row * width + token / page_size] * page_size + token % page_size;
                (entry * kv_heads + kv_head) * size
            })
            .collect();
        let dot = |at: &usize| query.iter().zip(&keys[*at..]).map(|(q, k)| q * k).sum::<f64>() * scale;
        let scores: Vec<f64> = tokens.iter().map(dot).collect();
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let powers: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
        let all: f64 = powers.iter().sum();
        let of = |j: usize| tokens.iter().zip(&powers).map(|(at, power)| power / all * values[at + j]).sum::<f64>();
        out.extend((0..size).map(of));
    }
    call.put(cache + 2, &out);
    Ok(())
}
