//! Rotary position embeddings.

use super::page::{PAGES_ARE_LISTED, PLACES};
use super::{AxisOf, Facts, constant, var};

const HEADS: [AxisOf; 4] = [
    var("tokens", "nnz"),
    constant("q_heads", "num_q_heads", "h"),
    constant("kv_heads", "num_k_heads", "kv"),
    constant("head_dim", "head_dim", "d"),
];

const POS_IDS: Facts = Facts {
    kernel: "apply_rope_pos_ids",
    name: "rope_pos_ids",
    op_type: "rope",
    api: "flashinfer.rope.apply_rope_pos_ids",
    axes: &HEADS,
    constraints: &["rotary_dim % 2 == 0", "rotary_dim <= head_dim"],
    reference: &[TURN, TURN_BOTH, PLAIN, RUN_POS_IDS],
};

const RAGGED: Facts = Facts {
    kernel: "apply_rope",
    name: "rope",
    api: "flashinfer.rope.apply_rope",
    axes: &{
        let [tokens, q_heads, kv_heads, head_dim] = HEADS;
        [tokens, var("sequences", "batch_size"), q_heads, kv_heads, head_dim]
    },
    reference: &[TURN, TURN_BOTH, PLAIN, POSITIONS, RUN_RAGGED],
    ..POS_IDS
};

const CACHED: Facts = Facts {
    kernel: "apply_rope_pos_ids_cos_sin_cache",
    name: "rope_with_cos_sin_cache",
    api: "flashinfer.rope.apply_rope_with_cos_sin_cache",
    axes: &{
        let [tokens, q_heads, kv_heads, head_dim] = HEADS;
        let (positions, rotary_dim) = (var("positions", "max_seq_len"), constant("rotary_dim", "rotary_dim", "rope"));
        [tokens, positions, q_heads, kv_heads, head_dim, rotary_dim]
    },
    reference: &[TURN, RUN_CACHED],
    ..POS_IDS
};

const QUANTIZE: Facts = Facts {
    kernel: "rope_quantize",
    name: "rope_quantize_fp8",
    api: "flashinfer.rope.rope_quantize_fp8",
    axes: &[
        var("tokens", "nnz"),
        constant("q_heads", "num_q_heads", "h"),
        constant("kv_heads", "num_k_heads", "kv"),
        constant("rope_dim", "rope_dim", "rope"),
        var("no_rope_dim", "no_rope_dim"),
        var("positions", "max_seq_len"),
    ],
    constraints: &["rope_dim % 2 == 0"],
    reference: &[TURN, ROUND, RUN_QUANTIZE],
    ..POS_IDS
};

const APPEND: Facts = Facts {
    kernel: "rope_quantize_append_paged_kv_cache",
    name: "rope_quantize_fp8_append_paged_kv_cache",
    api: "flashinfer.rope.rope_quantize_fp8_append_paged_kv_cache",
    axes: &[
        var("tokens", "nnz"),
        constant("q_heads", "num_q_heads", "h"),
        constant("kv_heads", "num_k_heads", "kv"),
        constant("rope_dim", "rope_dim", "rope"),
        var("no_rope_dim", "no_rope_dim"),
        var("head_dim", "head_dim"),
        var("table_positions", "max_seq_len"),
        var("pages", "num_pages"),
        constant("page_size", "page_size", "ps"),
        var("requests", "batch_size"),
        var("indices", "num_kv_indices"),
    ],
    constraints: &["rope_dim % 2 == 0", PAGES_ARE_LISTED],
    reference: &[TURN, ROUND, PLACES, RUN_APPEND_NHD],
    ..QUANTIZE
};

pub(super) const FACTS: &[Facts] = &[
    POS_IDS,
    Facts {
        kernel: "apply_llama31_rope_pos_ids",
        name: "llama31_rope_pos_ids",
        api: "flashinfer.rope.apply_llama31_rope_pos_ids",
        reference: &[TURN, TURN_BOTH, LLAMA31, RUN_LLAMA31_POS_IDS],
        ..POS_IDS
    },
    RAGGED,
    Facts {
        kernel: "apply_llama31_rope",
        name: "llama31_rope",
        api: "flashinfer.rope.apply_llama31_rope",
        reference: &[TURN, TURN_BOTH, LLAMA31, POSITIONS, RUN_LLAMA31_RAGGED],
        ..RAGGED
    },
    CACHED,
    Facts {
        kernel: "apply_rope_pos_ids_cos_sin_cache in place",
        name: "rope_with_cos_sin_cache_inplace",
        api: "flashinfer.rope.apply_rope_with_cos_sin_cache_inplace",
        ..CACHED
    },
    QUANTIZE,
    Facts {
        kernel: "rope_quantize of shared keys",
        name: "mla_rope_quantize_fp8",
        api: "flashinfer.rope.mla_rope_quantize_fp8",
        ..QUANTIZE
    },
    APPEND,
    Facts {
        kernel: "rope_quantize_append_paged_kv_cache of heads",
        name: "rope_quantize_fp8_append_paged_kv_cache_hnd",
        reference: &[TURN, ROUND, PLACES, RUN_APPEND_HND],
        ..APPEND
    },
    Facts {
        kernel: "rope_quantize_append_paged_kv_cache of shared keys",
        name: "mla_rope_quantize_fp8_append_paged_kv_cache",
        reference: &[TURN, ROUND, PLACES, RUN_APPEND_MLA],
        ..APPEND
    },
];

const TURN: &str = r#"def turn(x, cos, sin, interleave):
    # x: [tokens, heads, size] or [tokens, size]; cos, sin: [tokens, half of what is turned].
    half = cos.shape[-1]
    if x.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    x = x.float()
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleave:
        a, b = turned[..., 0::2], turned[..., 1::2]
    else:
        a, b = turned[..., :half], turned[..., half:]
    a, b = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack([a, b], dim=-1).flatten(-2) if interleave else torch.cat([a, b], dim=-1)
    return torch.cat([turned, rest], dim=-1)
"#;

const TURN_BOTH: &str = r#"def turn_both(q, k, angles, interleave):
    cos, sin = angles.cos().float(), angles.sin().float()
    return turn(q, cos, sin, interleave).to(q.dtype), turn(k, cos, sin, interleave).to(k.dtype)
"#;

const PLAIN: &str = r#"def frequencies(rotary_dim, rope_scale, rope_theta, device):
    i = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device)
    return rope_theta ** (-i / rotary_dim) / rope_scale
"#;

const LLAMA31: &str = r#"def frequencies(rotary_dim, rope_scale, rope_theta, low, high, old_context_length, device):
    i = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device)
    plain = rope_theta ** (-i / rotary_dim)
    smooth = plain * old_context_length / (2 * math.pi * (high - low)) - 1 / (high / low - 1)
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * plain / rope_scale + smooth * plain
"#;

const POSITIONS: &str = r#"def positions_of(indptr, offsets):
    # Sequences one after the other, each from an offset of its own on.
    indptr = indptr.long()
    first = torch.repeat_interleave(offsets.long() - indptr[:-1], indptr[1:] - indptr[:-1])
    return torch.arange(first.shape[0], device=first.device) + first
"#;

const RUN_POS_IDS: &str = r#"def run(q, k, pos_ids, rotary_dim, interleave, rope_scale, rope_theta):
    angles = pos_ids.double()[:, None] * frequencies(rotary_dim, rope_scale, rope_theta, q.device)
    return turn_both(q, k, angles, interleave)
"#;

const RUN_LLAMA31_POS_IDS: &str = r#"def run(
    q,
    k,
    pos_ids,
    rotary_dim,
    interleave,
    rope_scale,
    rope_theta,
    low_freq_factor,
    high_freq_factor,
    old_context_length,
):
    scaling = (low_freq_factor, high_freq_factor, old_context_length)
    angles = pos_ids.double()[:, None] * frequencies(rotary_dim, rope_scale, rope_theta, *scaling, q.device)
    return turn_both(q, k, angles, interleave)
"#;

const RUN_RAGGED: &str = r#"def run(q, k, indptr, offsets, rotary_dim, interleave, rope_scale, rope_theta):
    positions = positions_of(indptr, offsets).double()
    angles = positions[:, None] * frequencies(rotary_dim, rope_scale, rope_theta, q.device)
    return turn_both(q, k, angles, interleave)
"#;

const RUN_LLAMA31_RAGGED: &str = r#"def run(
    q,
    k,
    indptr,
    offsets,
    rotary_dim,
    interleave,
    rope_scale,
    rope_theta,
    low_freq_factor,
    high_freq_factor,
    old_context_length,
):
    scaling = (low_freq_factor, high_freq_factor, old_context_length)
    positions = positions_of(indptr, offsets).double()
    angles = positions[:, None] * frequencies(rotary_dim, rope_scale, rope_theta, *scaling, q.device)
    return turn_both(q, k, angles, interleave)
"#;

const RUN_CACHED: &str = r#"def run(q, k, cos_sin_cache, pos_ids, interleave):
    cos, sin = cos_sin_cache[pos_ids.long()].chunk(2, dim=-1)
    return turn(q, cos, sin, interleave).to(q.dtype), turn(k, cos, sin, interleave).to(k.dtype)
"#;

const ROUND: &str = r#"def rounded(x, scale):
    most = torch.finfo(DTYPE_q_rope_out).max
    return (x.float() * scale).clamp(-most, most).to(DTYPE_q_rope_out)
"#;

const RUN_QUANTIZE: &str = r#"def run(
    q_rope_in,
    k_rope_in,
    q_nope_in,
    k_nope_in,
    cos_sin_cache,
    pos_ids,
    quant_scale_q,
    quant_scale_kv,
    interleave,
):
    cos, sin = cos_sin_cache[pos_ids.long()].chunk(2, dim=-1)
    return (
        rounded(turn(q_rope_in, cos, sin, interleave), quant_scale_q),
        rounded(turn(k_rope_in, cos, sin, interleave), quant_scale_kv),
        rounded(q_nope_in, quant_scale_q),
        rounded(k_nope_in, quant_scale_kv),
    )
"#;

const RUN_APPEND_NHD: &str = r#"def run(
    q_rope_in,
    k_rope_in,
    q_nope_in,
    k_nope_in,
    v_in,
    cos_sin_cache,
    pos_ids,
    k_cache,
    v_cache,
    kv_indices,
    kv_indptr,
    batch_indices,
    positions,
    quant_scale_q,
    quant_scale_kv,
    interleave,
):
    cos, sin = cos_sin_cache[pos_ids.long()].chunk(2, dim=-1)
    page, entry = places(batch_indices, positions, kv_indices, kv_indptr, k_cache.shape[1])
    k, v = k_cache.clone(), v_cache.clone()
    key = torch.cat([turn(k_rope_in, cos, sin, interleave), k_nope_in.float()], dim=-1)
    k[page, entry] = rounded(key, quant_scale_kv)
    v[page, entry] = rounded(v_in, quant_scale_kv)
    q = rounded(turn(q_rope_in, cos, sin, interleave), quant_scale_q)
    return q, rounded(q_nope_in, quant_scale_q), k, v
"#;

const RUN_APPEND_HND: &str = r#"def run(
    q_rope_in,
    k_rope_in,
    q_nope_in,
    k_nope_in,
    v_in,
    cos_sin_cache,
    pos_ids,
    k_cache,
    v_cache,
    kv_indices,
    kv_indptr,
    batch_indices,
    positions,
    quant_scale_q,
    quant_scale_kv,
    interleave,
):
    cos, sin = cos_sin_cache[pos_ids.long()].chunk(2, dim=-1)
    page, entry = places(batch_indices, positions, kv_indices, kv_indptr, k_cache.shape[2])
    k, v = k_cache.clone(), v_cache.clone()
    key = torch.cat([turn(k_rope_in, cos, sin, interleave), k_nope_in.float()], dim=-1)
    k[page, :, entry] = rounded(key, quant_scale_kv)
    v[page, :, entry] = rounded(v_in, quant_scale_kv)
    q = rounded(turn(q_rope_in, cos, sin, interleave), quant_scale_q)
    return q, rounded(q_nope_in, quant_scale_q), k, v
"#;

const RUN_APPEND_MLA: &str = r#"def run(
    q_rope_in,
    k_rope_in,
    q_nope_in,
    k_nope_in,
    cos_sin_cache,
    pos_ids,
    ckv_cache,
    kpe_cache,
    kv_indices,
    kv_indptr,
    batch_indices,
    positions,
    quant_scale_q,
    quant_scale_kv,
    interleave,
):
    cos, sin = cos_sin_cache[pos_ids.long()].chunk(2, dim=-1)
    page, entry = places(batch_indices, positions, kv_indices, kv_indptr, ckv_cache.shape[1])
    ckv, kpe = ckv_cache.clone(), kpe_cache.clone()
    # All heads share one.
    kpe[page, entry] = rounded(turn(k_rope_in, cos, sin, interleave), quant_scale_kv)[:, 0]
    ckv[page, entry] = rounded(k_nope_in, quant_scale_kv)[:, 0]
    q = rounded(turn(q_rope_in, cos, sin, interleave), quant_scale_q)
    return q, rounded(q_nope_in, quant_scale_q), ckv, kpe
"#;
