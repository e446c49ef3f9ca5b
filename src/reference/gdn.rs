//! The gated delta rule.

use super::{SafeCall, function};

pub(super) const FUNCTIONS: &[(&str, SafeCall)] = &[("gdn_prefill", gdn_prefill)];

function!(gdn_prefill, |args| {
    let [output, output_state, q, k, v, cu_seqlens, input_state, alpha, beta, scale, _workspace] = args.exactly()?;
    let (output, output_state) = (args.tensor(output)?, args.tensor(output_state)?);
    let (q, k, v, cu_seqlens) = (args.tensor(q)?, args.tensor(k)?, args.tensor(v)?, args.tensor(cu_seqlens)?);
    let (input_state, alpha, beta) = (args.optional(input_state)?, args.optional(alpha)?, args.optional(beta)?);
    let scale = args.float(scale)?;
    let (tokens, size) = (q.size(0)?, q.size(2)?);
    let (q_heads, k_heads, v_heads) = (q.size(1)?, k.size(1)?, v.size(1)?);
    let heads = q_heads.max(v_heads);
    let sequences = cu_seqlens.size(0)?.saturating_sub(1);
    q.expect_shape(&[tokens, q_heads, size])?;
    k.expect_shape(&[tokens, k_heads, size])?;
    v.expect_shape(&[tokens, v_heads, size])?;
    output.expect_shape(&[tokens, heads, size])?;
    output_state.expect_shape(&[sequences, heads, size, size])?;
    for (tensor, shape) in
        [(&input_state, &[sequences, heads, size, size][..]), (&alpha, &[tokens, heads]), (&beta, &[tokens, heads])]
    {
        tensor.as_ref().map_or(Ok(()), |tensor| tensor.expect_shape(shape))?;
    }
    let unshared = |own: usize| own == 0 || heads % own != 0;
    if [q_heads, k_heads, v_heads].into_iter().any(unshared) || q_heads % k_heads != 0 || v_heads % k_heads != 0 {
        return Err(("ValueError", format!("{q_heads} query, {k_heads} key and {v_heads} value heads do not group")));
    }
    if size == 0 {
        return Err(("ValueError", "the head size is 0, expected at least 1".to_owned()));
    }
    let scale = if scale == 0.0 { 1.0 / (size as f64).sqrt() } else { scale };
    let offsets = cu_seqlens.offsets(tokens)?;
    for (sequence, span) in offsets.windows(2).enumerate() {
        for head in 0..heads {
            let (q_head, k_head, v_head) = (head * q_heads / heads, head * k_heads / heads, head * v_heads / heads);
            let mut state = vec![0.0; size * size];
            if let Some(input_state) = &input_state {
                input_state.read(&[sequence, head], &mut state)?;
            }
            let (mut query, mut key, mut value) = (vec![0.0; size], vec![0.0; size], vec![0.0; size]);
            for token in span[0]..span[1] {
                q.read(&[token, q_head], &mut query)?;
                k.read(&[token, k_head], &mut key)?;
                v.read(&[token, v_head], &mut value)?;
                let decay = alpha.as_ref().map_or(Ok(1.0), |alpha| alpha.at(&[token, head]))?;
                let rate = beta.as_ref().map_or(Ok(1.0), |beta| beta.at(&[token, head]))?;
                for (i, row) in state.chunks_exact_mut(size).enumerate() {
                    row.iter_mut().for_each(|s| *s *= decay);
                    let correction = rate * (value[i] - dot(row, &key));
                    row.iter_mut().zip(&key).for_each(|(s, k)| *s += correction * k);
                    // What it was is not needed any more.
                    value[i] = scale * dot(row, &query);
                }
                output.write(&[token, head], &value)?;
            }
            output_state.write(&[sequence, head], &state)?;
        }
    }
    Ok(())
});

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
