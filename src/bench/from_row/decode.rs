//! Kernels of a decode step, which are this crate's own.

use super::{AxisOf, Facts, constant, var};

const ROWS: &[AxisOf] = &[var("rows", "batch_size"), constant("columns", "hidden_size", "h")];
const TOKENS: &[AxisOf] = &[var("rows", "batch_size"), constant("tokens", "vocab_size", "v")];
const HEADS: &[AxisOf] = &[
    var("rows", "batch_size"),
    constant("q_heads", "num_qo_heads", "h"),
    constant("kv_heads", "num_kv_heads", "kv"),
    constant("head_dim", "head_dim", "d"),
    constant("rotary_dim", "rotary_dim", "r"),
    constant("page_size", "page_size", "ps"),
    var("positions", "max_positions"),
    var("pages", "num_pages"),
    var("pages_of_a_row", "max_pages_of_a_row"),
];
const OF_HEADS: &[&str] = &["head_dim % 2 == 0", "rotary_dim % 2 == 0", "rotary_dim <= head_dim"];

/// FlashInfer has no function of this kind.
const NONE: &str = "";

const fn of_rows(kernel: &'static str, op_type: &'static str, reference: &'static [&'static str]) -> Facts {
    Facts { kernel, name: kernel, op_type, api: NONE, axes: ROWS, constraints: &[], reference }
}

pub(super) const FACTS: &[Facts] = &[
    Facts {
        axes: &[
            var("rows", "batch_size"),
            constant("columns", "hidden_size", "h"),
            constant("tokens", "vocab_size", "v"),
        ],
        ..of_rows("embedding", "embedding", &[EMBEDDING])
    },
    Facts {
        axes: HEADS,
        constraints: OF_HEADS,
        ..of_rows("rope_append", "rope_append", &[TURNED, APPENDED, ROPE_APPEND])
    },
    Facts {
        axes: HEADS,
        constraints: OF_HEADS,
        ..of_rows("qk_norm_rope_append", "rope_append", &[TURNED, APPENDED, QK_NORM_ROPE_APPEND])
    },
    of_rows("add", "elementwise", &["def run(a, b):\n    return (a.float() + b.float()).to(a.dtype)\n"]),
    of_rows("mul", "elementwise", &["def run(a, b):\n    return (a.float() * b.float()).to(a.dtype)\n"]),
    of_rows(
        "sigmoid_gate",
        "elementwise",
        &["def run(a, b):\n    return (a.float() * torch.sigmoid(b.float())).to(a.dtype)\n"],
    ),
    of_rows("silu", "activation", &["def run(a):\n    return torch.nn.functional.silu(a.float()).to(a.dtype)\n"]),
    of_rows("copy", "elementwise", &["def run(input):\n    return input.to(DTYPE_out)\n"]),
    Facts {
        axes: &[var("rows", "batch_size"), constant("columns", "vocab_size", "v")],
        ..of_rows("softmax_rows", "softmax", &[SOFTMAX])
    },
    Facts { axes: TOKENS, ..of_rows("argmax", "sampling", &[ARGMAX]) },
    Facts { axes: &[var("rows", "batch_size")], ..of_rows("advance", "advance", &[ADVANCE]) },
    Facts { axes: TOKENS, ..of_rows("sample", "sampling", &[SAMPLE]) },
];

const EMBEDDING: &str = r#"def run(ids, table, scale):
    return (table[ids.long()].float() * scale).to(table.dtype)
"#;

const SOFTMAX: &str = r#"def run(a, temperature):
    return torch.softmax(a.float() / temperature, dim=-1).to(a.dtype)
"#;

/// The first of equals; what is no number is below all.
const ARGMAX: &str = r#"def run(logits):
    x = torch.where(torch.isnan(logits), -math.inf, logits.float())
    largest = x == x.max(dim=-1, keepdim=True).values
    return largest.int().argmax(dim=-1).to(torch.int32)
"#;

const ADVANCE: &str = r#"def run(token, positions, lengths, capacity):
    positions = positions.clamp(-1, capacity - 2) + 1
    lengths = lengths.clamp(0, capacity - 1) + 1
    return token.clone(), positions, lengths
"#;

const SAMPLE: &str = r#"def run(probs, number, top_k, top_p):
    p = torch.nan_to_num(probs.double(), nan=0.0).clamp(0, 1)
    order = torch.sort(p, dim=-1, descending=True, stable=True)
    kept = torch.ones_like(p, dtype=torch.bool)
    if top_k > 0:
        kept[:, top_k:] = False
    if top_p > 0:
        kept &= order.values.cumsum(dim=-1) - order.values < top_p
    p = torch.zeros_like(p).scatter(-1, order.indices, order.values * kept)
    upto = p.cumsum(dim=-1)
    wanted = number.double().clamp(min=0)[:, None] * upto[:, -1:]
    return (upto > wanted).int().argmax(dim=-1).to(torch.int32)
"#;

const TURNED: &str = r#"def turned(x, cos_sin, positions, interleave):
    half = cos_sin.shape[1] // 2
    angles = cos_sin[positions.long()][:, None]
    cos, sin = angles[..., :half], angles[..., half:]
    pairs, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleave:
        a, b = pairs[..., 0::2], pairs[..., 1::2]
        pairs = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = pairs[..., :half], pairs[..., half:]
        pairs = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((pairs, rest), dim=-1)
"#;

const APPENDED: &str = r#"def appended(cache, x, positions, page_table):
    positions, page_size = positions.long(), cache.shape[1]
    page = page_table.gather(1, (positions // page_size)[:, None]).squeeze(1).long()
    cache = cache.clone()
    cache[page, positions % page_size] = x.to(cache.dtype)
    return cache
"#;

const ROPE_APPEND: &str = r#"def run(q, k, v, cos_sin, positions, page_table, k_cache, v_cache, interleave):
    new_q = turned(q.float(), cos_sin, positions, interleave).to(q.dtype)
    k = turned(k.float(), cos_sin, positions, interleave)
    k_cache = appended(k_cache, k, positions, page_table)
    return new_q, k_cache, appended(v_cache, v, positions, page_table)
"#;

const QK_NORM_ROPE_APPEND: &str = r#"def normed(x, weight, eps):
    x = x.float()
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight.float()


def run(
    q,
    k,
    v,
    q_weight,
    k_weight,
    cos_sin,
    positions,
    page_table,
    k_cache,
    v_cache,
    eps,
    interleave,
):
    new_q = turned(normed(q, q_weight, eps), cos_sin, positions, interleave).to(q.dtype)
    k = turned(normed(k, k_weight, eps), cos_sin, positions, interleave)
    k_cache = appended(k_cache, k, positions, page_table)
    return new_q, k_cache, appended(v_cache, v, positions, page_table)
"#;
