//! The gated delta rule.

use super::{Facts, constant, var};

pub(super) const FACTS: &[Facts] = &[Facts {
    kernel: "gdn_prefill",
    name: "gdn_prefill",
    op_type: "gdn",
    api: "flashinfer.gdn_prefill.chunk_gated_delta_rule",
    axes: &[
        var("tokens", "total_seq_len"),
        var("sequences", "num_seqs"),
        constant("q_heads", "num_q_heads", "q"),
        constant("k_heads", "num_k_heads", "k"),
        constant("v_heads", "num_v_heads", "v"),
        constant("heads", "num_heads", ""),
        constant("head_size", "head_size", "d"),
    ],
    constraints: &[
        "(num_k_heads == num_v_heads and num_q_heads % num_k_heads == 0) or \
         (num_q_heads == num_k_heads and num_v_heads % num_k_heads == 0)",
        "num_seqs <= total_seq_len",
    ],
    reference: &[PREFILL],
}];

const PREFILL: &str = r#"def run(q, k, v, cu_seqlens, input_state=None, alpha=None, beta=None, scale=0.0):
    tokens, _, size = q.shape
    heads = max(q.shape[1], v.shape[1])
    q, k, v, dtype = q.float(), k.float(), v.float(), q.dtype
    q, k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (q, k, v))
    scale = scale or size**-0.5
    sequences = cu_seqlens.shape[0] - 1
    output = torch.empty_like(q)
    states = torch.zeros(sequences, heads, size, size, device=q.device)
    if input_state is not None:
        states.copy_(input_state)
    for sequence in range(sequences):
        # The value's dimension before the key's.
        state = states[sequence].clone()
        for token in range(int(cu_seqlens[sequence]), int(cu_seqlens[sequence + 1])):
            if alpha is not None:
                state = state * alpha[token, :, None, None]
            error = v[token] - torch.einsum("hvk,hk->hv", state, k[token])
            if beta is not None:
                error = error * beta[token, :, None]
            state = state + torch.einsum("hv,hk->hvk", error, k[token])
            output[token] = scale * torch.einsum("hvk,hk->hv", state, q[token])
        states[sequence] = state
    return output.to(dtype), states
"#;
