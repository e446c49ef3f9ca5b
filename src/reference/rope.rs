//! Rotary position embeddings.

use std::f64::consts::PI;

use super::page::Table;
use super::{Args, HostTensor, Raised, SafeCall, function};

pub(super) const FUNCTIONS: &[(&str, SafeCall)] = &[
    ("apply_rope", apply_rope),
    ("apply_llama31_rope", apply_llama31_rope),
    ("apply_rope_pos_ids", apply_rope_pos_ids),
    ("apply_llama31_rope_pos_ids", apply_llama31_rope_pos_ids),
    ("apply_rope_pos_ids_cos_sin_cache", apply_rope_pos_ids_cos_sin_cache),
    ("rope_quantize", rope_quantize),
    ("rope_quantize_append_paged_kv_cache", rope_quantize_append_paged_kv_cache),
];

function!(apply_rope_pos_ids, |args| {
    let [q, k, q_rope, k_rope, pos_ids, rotary_dim, interleave, scale, theta] = args.exactly()?;
    let angles = Angles::new(args, [rotary_dim, interleave, scale, theta], None)?;
    let positions = positions(&args.tensor(pos_ids)?)?;
    angles.turn_each(args, [(q, q_rope), (k, k_rope)], &positions)
});

function!(apply_llama31_rope_pos_ids, |args| {
    let [q, k, q_rope, k_rope, pos_ids, rotary_dim, interleave, scale, theta, low, high, old] = args.exactly()?;
    let angles = Angles::new(args, [rotary_dim, interleave, scale, theta], Some([low, high, old]))?;
    let positions = positions(&args.tensor(pos_ids)?)?;
    angles.turn_each(args, [(q, q_rope), (k, k_rope)], &positions)
});

function!(apply_rope, |args| {
    let [q, k, q_rope, k_rope, indptr, offsets, rotary_dim, interleave, scale, theta] = args.exactly()?;
    let angles = Angles::new(args, [rotary_dim, interleave, scale, theta], None)?;
    let positions = ragged(args, indptr, offsets, q)?;
    angles.turn_each(args, [(q, q_rope), (k, k_rope)], &positions)
});

function!(apply_llama31_rope, |args| {
    let [q, k, q_rope, k_rope, indptr, offsets, rotary_dim, interleave, scale, theta, low, high, old] =
        args.exactly()?;
    let angles = Angles::new(args, [rotary_dim, interleave, scale, theta], Some([low, high, old]))?;
    let positions = ragged(args, indptr, offsets, q)?;
    angles.turn_each(args, [(q, q_rope), (k, k_rope)], &positions)
});

function!(apply_rope_pos_ids_cos_sin_cache, |args| {
    let [q, k, q_rope, k_rope, table, pos_ids, interleave] = args.exactly()?;
    let interleave = args.bool(interleave)?;
    let turns = Turns::new(&args.tensor(table)?, &args.tensor(pos_ids)?)?;
    for (from, to) in [(q, q_rope), (k, k_rope)] {
        let (from, to) = (args.tensor(from)?, args.tensor(to)?);
        for at in heads(&from)? {
            let mut head = row(&from, &at)?;
            turn(&mut head, &turns.0[at[0]], interleave)?;
            to.write(&at, &head)?;
        }
    }
    Ok(())
});

function!(rope_quantize, |args| {
    let [
        q_rope_in,
        k_rope_in,
        q_nope_in,
        k_nope_in,
        q_rope_out,
        k_rope_out,
        q_nope_out,
        k_nope_out,
        table,
        pos_ids,
        scale_q,
        scale_kv,
        interleave,
        _pdl,
    ] = args.exactly()?;
    let (scale_q, scale_kv) = (args.float(scale_q)?, args.float(scale_kv)?);
    let interleave = args.bool(interleave)?;
    let turns = Turns::new(&args.tensor(table)?, &args.tensor(pos_ids)?)?;
    for (from, to, scale) in [(q_rope_in, q_rope_out, scale_q), (k_rope_in, k_rope_out, scale_kv)] {
        let (from, to) = (args.tensor(from)?, args.tensor(to)?);
        for at in heads(&from)? {
            to.write(&at, &turns.scaled(&from, &at, Some(interleave), scale)?)?;
        }
    }
    for (from, to, scale) in [(q_nope_in, q_nope_out, scale_q), (k_nope_in, k_nope_out, scale_kv)] {
        let (from, to) = (args.tensor(from)?, args.tensor(to)?);
        for at in heads(&from)? {
            to.write(&at, &turns.scaled(&from, &at, None, scale)?)?;
        }
    }
    Ok(())
});

function!(rope_quantize_append_paged_kv_cache, |args| {
    let [
        q_rope_in,
        k_rope_in,
        q_nope_in,
        k_nope_in,
        v_in,
        q_rope_out,
        q_nope_out,
        table,
        pos_ids,
        k_cache,
        v_cache,
        ckv_cache,
        kpe_cache,
        kv_indices,
        kv_indptr,
        batch_indices,
        positions,
        layout,
        page_size,
        scale_q,
        scale_kv,
        interleave,
        _pdl,
    ] = args.exactly()?;
    let (scale_q, scale_kv) = (args.float(scale_q)?, args.float(scale_kv)?);
    let interleave = args.bool(interleave)?;
    let turns = Turns::new(&args.tensor(table)?, &args.tensor(pos_ids)?)?;
    for (from, to, turned) in [(q_rope_in, q_rope_out, Some(interleave)), (q_nope_in, q_nope_out, None)] {
        let (from, to) = (args.tensor(from)?, args.tensor(to)?);
        for at in heads(&from)? {
            to.write(&at, &turns.scaled(&from, &at, turned, scale_q)?)?;
        }
    }
    let (k_rope, k_nope) = (args.tensor(k_rope_in)?, args.tensor(k_nope_in)?);
    // The form is told by which caches have memory, as upstream does.
    let shared = args.tensor(k_cache)?.data.is_null();
    let first = args.tensor(if shared { ckv_cache } else { k_cache })?;
    let page_size = args.int(page_size)?.max(0) as usize;
    let table = Table::new(args, [batch_indices, positions, kv_indices, kv_indptr], first.size(0)?, page_size)?;
    for at in heads(&k_rope)? {
        let (page, entry) = table.place(at[0])?;
        let turned = turns.scaled(&k_rope, &at, Some(interleave), scale_kv)?;
        let other = turns.scaled(&k_nope, &at, None, scale_kv)?;
        if shared {
            args.tensor(kpe_cache)?.write(&[page, entry], &turned)?;
            first.write(&[page, entry], &other)?;
            continue;
        }
        let to = if args.int(layout)? == 1 { [page, at[1], entry] } else { [page, entry, at[1]] };
        first.write(&to, &[turned, other].concat())?;
        let value = turns.scaled(&args.tensor(v_in)?, &at, None, scale_kv)?;
        args.tensor(v_cache)?.write(&to, &value)?;
    }
    Ok(())
});

/// The cosine and the sine of each of a token's angles.
type Angle = (f64, f64);

/// Those of every token, from a table.
struct Turns(Vec<Vec<Angle>>);

impl Turns {
    fn new(table: &HostTensor<'_>, pos_ids: &HostTensor<'_>) -> Result<Self, Raised> {
        let (rows, half) = (table.size(0)?, table.size(1)? / 2);
        let mut turns = Vec::new();
        for token in 0..pos_ids.size(0)? {
            let position = pos_ids.index(&[token], rows)?;
            let angle = |i| Ok((table.at(&[position, i])?, table.at(&[position, half + i])?));
            turns.push((0..half).map(angle).collect::<Result<Vec<_>, Raised>>()?);
        }
        Ok(Self(turns))
    }

    /// A head's elements, turned if that is asked, times a number.
    fn scaled(
        &self,
        from: &HostTensor<'_>,
        at: &[usize],
        turned: Option<bool>,
        scale: f64,
    ) -> Result<Vec<f64>, Raised> {
        let mut head = row(from, at)?;
        if let Some(interleave) = turned {
            turn(&mut head, &self.0[at[0]], interleave)?;
        }
        head.iter_mut().for_each(|x| *x *= scale);
        Ok(head)
    }
}

/// Every head of every token of a `[tokens, heads, size]` or a `[tokens, size]`.
fn heads(tensor: &HostTensor<'_>) -> Result<Vec<Vec<usize>>, Raised> {
    if tensor.shape.len() == 2 {
        return Ok((0..tensor.size(0)?).map(|token| vec![token]).collect());
    }
    let (tokens, heads) = (tensor.size(0)?, tensor.size(1)?);
    Ok((0..tokens).flat_map(|token| (0..heads).map(move |head| vec![token, head])).collect())
}

fn row(tensor: &HostTensor<'_>, at: &[usize]) -> Result<Vec<f64>, Raised> {
    let mut row = vec![0.0; tensor.size(tensor.shape.len().saturating_sub(1))?];
    tensor.read(at, &mut row)?;
    Ok(row)
}

/// Turns the pairs at the start of a head, one for each angle.
fn turn(head: &mut [f64], angles: &[Angle], interleave: bool) -> Result<(), Raised> {
    if head.len() < 2 * angles.len() {
        return Err(("ValueError", format!("{} elements of a head of {}", 2 * angles.len(), head.len())));
    }
    for (i, (cos, sin)) in angles.iter().enumerate() {
        let (first, second) = if interleave { (2 * i, 2 * i + 1) } else { (i, i + angles.len()) };
        let (x, y) = (head[first], head[second]);
        head[first] = x * cos - y * sin;
        head[second] = y * cos + x * sin;
    }
    Ok(())
}

fn positions(pos_ids: &HostTensor<'_>) -> Result<Vec<f64>, Raised> {
    (0..pos_ids.size(0)?).map(|token| pos_ids.number(&[token])).collect()
}

/// The positions of sequences that lie one after the other.
fn ragged(args: &Args<'_>, indptr: usize, offsets: usize, q: usize) -> Result<Vec<f64>, Raised> {
    let (indptr, offsets, tokens) = (args.tensor(indptr)?, args.tensor(offsets)?, args.tensor(q)?.size(0)?);
    let mut positions = vec![0.0; tokens];
    for sequence in 0..offsets.size(0)? {
        let (start, end) = (indptr.index(&[sequence], tokens + 1)?, indptr.index(&[sequence + 1], tokens + 1)?);
        let first = offsets.number(&[sequence])?;
        for (i, position) in positions.iter_mut().take(end).skip(start).enumerate() {
            *position = first + i as f64;
        }
    }
    Ok(positions)
}

/// Angles that are computed.
struct Angles {
    interleave: bool,
    frequencies: Vec<f64>,
}

impl Angles {
    fn new(
        args: &Args<'_>,
        [rotary_dim, interleave, scale, theta]: [usize; 4],
        llama31: Option<[usize; 3]>,
    ) -> Result<Self, Raised> {
        let rotary_dim = args.int(rotary_dim)?;
        let (scale, theta) = (args.float(scale)?, args.float(theta)?);
        let blend = match llama31 {
            None => (0.0, 0.0),
            Some([low, high, old]) => {
                let (low, high, old) = (args.float(low)?, args.float(high)?, args.float(old)?);
                (old / (2.0 * PI * (high - low)), -1.0 / (high / low - 1.0))
            }
        };
        let frequency = |i: i64| {
            let plain = theta.powf(-2.0 * i as f64 / rotary_dim as f64);
            let smooth = (plain * blend.0 + blend.1).clamp(0.0, 1.0);
            (1.0 - smooth) * plain / scale + smooth * plain
        };
        Ok(Self { interleave: args.bool(interleave)?, frequencies: (0..rotary_dim / 2).map(frequency).collect() })
    }

    fn turn_each(&self, args: &Args<'_>, pairs: [(usize, usize); 2], positions: &[f64]) -> Result<(), Raised> {
        for (from, to) in pairs {
            let (from, to) = (args.tensor(from)?, args.tensor(to)?);
            for at in heads(&from)? {
                let position = positions.get(at[0]).copied().unwrap_or(0.0);
                let angle = |frequency: &f64| ((position * frequency).cos(), (position * frequency).sin());
                let angles: Vec<Angle> = self.frequencies.iter().map(angle).collect();
                let mut head = row(&from, &at)?;
                turn(&mut head, &angles, self.interleave)?;
                to.write(&at, &head)?;
            }
        }
        Ok(())
    }
}
