//! Merging the states of attention.

use super::{Args, HostTensor, Raised, SafeCall, function};

pub(super) const FUNCTIONS: &[(&str, SafeCall)] =
    &[("merge_state", merge_state), ("merge_state_in_place", merge_state_in_place), ("merge_states", merge_states)];

/// A state of one head: where its output and its logarithm are.
type State<'a, 'b> = (&'b HostTensor<'a>, &'b HostTensor<'a>, Vec<usize>);

function!(merge_state, |args| {
    let [v_a, s_a, v_b, s_b, v_merged, s_merged] = args.exactly()?;
    let ((v_a, s_a), (v_b, s_b)) = (state(args, v_a, s_a)?, state(args, v_b, s_b)?);
    let merged = state(args, v_merged, s_merged)?;
    for head in heads(&v_a)? {
        merge(&[(&v_a, &s_a, head.clone()), (&v_b, &s_b, head.clone())], &merged, &head)?;
    }
    Ok(())
});

function!(merge_state_in_place, |args| {
    let [v, s, v_other, s_other, mask] = args.exactly()?;
    let (merged, (v_other, s_other)) = (state(args, v, s)?, state(args, v_other, s_other)?);
    let mask = args.optional(mask)?;
    for head in heads(&merged.0)? {
        let leave = match &mask {
            Some(mask) => mask.number(&head[..1])? == 0.0,
            None => false,
        };
        if !leave {
            let states = [(&merged.0, &merged.1, head.clone()), (&v_other, &s_other, head.clone())];
            merge(&states, &merged, &head)?;
        }
    }
    Ok(())
});

function!(merge_states, |args| {
    let [v, s, v_merged, s_merged] = args.exactly()?;
    let ((v, s), merged) = (state(args, v, s)?, state(args, v_merged, s_merged)?);
    let count = v.size(1)?;
    for head in heads(&merged.0)? {
        let states: Vec<_> = (0..count).map(|i| (&v, &s, vec![head[0], i, head[1]])).collect();
        merge(&states, &merged, &head)?;
    }
    Ok(())
});

fn state<'a>(args: &Args<'a>, v: usize, s: usize) -> Result<(HostTensor<'a>, HostTensor<'a>), Raised> {
    Ok((args.tensor(v)?, args.tensor(s)?))
}

/// Every head of every token of a `[tokens, heads, size]`.
fn heads(v: &HostTensor<'_>) -> Result<Vec<Vec<usize>>, Raised> {
    let (tokens, heads) = (v.size(0)?, v.size(1)?);
    Ok((0..tokens).flat_map(|token| (0..heads).map(move |head| vec![token, head])).collect())
}

/// Weighs each state by 2 to its logarithm, relative to the greatest, so that nothing overflows.
fn merge(states: &[State<'_, '_>], merged: &(HostTensor<'_>, HostTensor<'_>), to: &[usize]) -> Result<(), Raised> {
    let size = merged.0.size(2)?;
    let logarithms = states.iter().map(|(_, s, at)| s.at(at)).collect::<Result<Vec<_>, _>>()?;
    let greatest = logarithms.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let (mut sum, mut total, mut row) = (vec![0.0; size], 0.0, vec![0.0; size]);
    for ((v, _, at), logarithm) in states.iter().zip(&logarithms) {
        let weight = (logarithm - greatest).exp2();
        v.read(at, &mut row)?;
        sum.iter_mut().zip(&row).for_each(|(sum, x)| *sum += weight * x);
        total += weight;
    }
    sum.iter_mut().for_each(|sum| *sum /= total);
    merged.0.write(to, &sum)?;
    merged.1.set(to, total.log2() + greatest)
}
