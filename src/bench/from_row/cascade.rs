//! Merging the states of attention.

use super::{AxisOf, Facts, constant, var};

const AXES: &[AxisOf] =
    &[var("tokens", "seq_len"), constant("heads", "num_heads", "h"), constant("head_dim", "head_dim", "d")];

const fn merge(kernel: &'static str, api: &'static str, reference: &'static [&'static str]) -> Facts {
    Facts { kernel, name: kernel, op_type: "cascade_merge", api, axes: AXES, constraints: &[], reference }
}

pub(super) const FACTS: &[Facts] = &[
    merge("merge_state", "flashinfer.cascade.merge_state", &[MERGE, OF_TWO]),
    merge("merge_state_in_place", "flashinfer.cascade.merge_state_in_place", &[MERGE, IN_PLACE]),
    Facts {
        axes: &[
            var("tokens", "seq_len"),
            var("states", "num_states"),
            constant("heads", "num_heads", "h"),
            constant("head_dim", "head_dim", "d"),
        ],
        ..merge("merge_states", "flashinfer.cascade.merge_states", &[MERGE, OF_MANY])
    },
];

const MERGE: &str = r#"def merge(v, s):
    # v: [tokens, states, heads, head_dim]; s: [tokens, states, heads], logarithms to the base 2.
    most = s.amax(dim=1, keepdim=True)
    weights = torch.exp2(s - most)
    total = weights.sum(dim=1)
    merged = (weights[..., None] * v.float()).sum(dim=1) / total[..., None]
    return merged.to(v.dtype), torch.log2(total) + most[:, 0]
"#;

const OF_TWO: &str = r#"def run(v_a, s_a, v_b, s_b):
    return merge(torch.stack([v_a, v_b], dim=1), torch.stack([s_a, s_b], dim=1))
"#;

const IN_PLACE: &str = r#"def run(v, s, v_other, s_other, mask=None):
    new_v, new_s = merge(torch.stack([v, v_other], dim=1), torch.stack([s, s_other], dim=1))
    if mask is not None:
        mask = mask.bool()
        new_v = torch.where(mask[:, None, None], new_v, v)
        new_s = torch.where(mask[:, None], new_s, s)
    return new_v, new_s
"#;

const OF_MANY: &str = r#"def run(v, s):
    return merge(v, s)
"#;
