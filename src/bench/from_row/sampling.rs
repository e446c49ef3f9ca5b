//! Probabilities out of logits, and tokens out of probabilities. The references draw by PyTorch's random numbers: the same
//! distribution, other tokens.

use super::{AxisOf, Facts, constant, var};

const AXES: &[AxisOf] = &[var("rows", "batch_size"), constant("vocab", "vocab_size", "v")];

const fn of_rows(
    kernel: &'static str,
    name: &'static str,
    api: &'static str,
    reference: &'static [&'static str],
) -> Facts {
    Facts { kernel, name, op_type: "sampling", api, axes: AXES, constraints: &[], reference }
}

const SAMPLE_K: &str = "flashinfer.sampling.top_k_sampling_from_probs";
const RENORM_K: &str = "flashinfer.sampling.top_k_renorm_probs";
const MASK_K: &str = "flashinfer.sampling.top_k_mask_logits";

pub(super) const FACTS: &[Facts] = &[
    of_rows("softmax", "softmax", "flashinfer.sampling.softmax", &[SOFTMAX]),
    of_rows("softmax of temperatures", "softmax_per_row", "flashinfer.sampling.softmax", &[SOFTMAX_OF_TEMPERATURES]),
    of_rows(
        "sampling_from_probs",
        "sampling_from_probs",
        "flashinfer.sampling.sampling_from_probs",
        &[DRAW, FROM_PROBS],
    ),
    of_rows(
        "sampling_from_logits",
        "sampling_from_logits",
        "flashinfer.sampling.sampling_from_logits",
        &[DRAW, FROM_LOGITS],
    ),
    of_rows("top_k_sampling_from_probs", "top_k_sampling", SAMPLE_K, &[EACH, TOP_K, DRAW, TOP_K_SAMPLING]),
    of_rows(
        "top_p_sampling_from_probs",
        "top_p_sampling",
        "flashinfer.sampling.top_p_sampling_from_probs",
        &[EACH, TOP_P, DRAW, TOP_P_SAMPLING],
    ),
    of_rows(
        "min_p_sampling_from_probs",
        "min_p_sampling",
        "flashinfer.sampling.min_p_sampling_from_probs",
        &[EACH, DRAW, MIN_P_SAMPLING],
    ),
    of_rows(
        "top_k_top_p_sampling_from_probs",
        "top_k_top_p_sampling",
        "flashinfer.sampling.top_k_top_p_sampling_from_probs",
        &[EACH, TOP_K, TOP_P, DRAW, TOP_K_TOP_P_SAMPLING],
    ),
    of_rows(
        "top_p_renorm_probs",
        "top_p_renorm_probs",
        "flashinfer.sampling.top_p_renorm_probs",
        &[EACH, TOP_P, TOP_P_RENORM],
    ),
    of_rows("top_k_renorm_probs", "top_k_renorm_probs", RENORM_K, &[EACH, TOP_K, TOP_K_RENORM]),
    of_rows(
        "top_k_renorm_probs of long rows",
        "top_k_renorm_probs_of_long_rows",
        RENORM_K,
        &[EACH, TOP_K, TOP_K_RENORM],
    ),
    of_rows("top_k_mask_logits", "top_k_mask_logits", MASK_K, &[EACH, TOP_K, TOP_K_MASK]),
    of_rows("top_k_mask_logits of long rows", "top_k_mask_logits_of_long_rows", MASK_K, &[EACH, TOP_K, TOP_K_MASK]),
    Facts {
        axes: &[var("batch", "batch_size"), var("count", "num_speculative"), constant("vocab", "vocab_size", "v")],
        ..of_rows(
            "chain_speculative_sampling",
            "chain_speculative_sampling",
            "flashinfer.sampling.chain_speculative_sampling",
            &[CHAIN],
        )
    },
];

const SOFTMAX: &str = r#"def run(logits, temperature):
    return torch.softmax(logits / temperature, dim=-1)
"#;

const SOFTMAX_OF_TEMPERATURES: &str = r#"def run(logits, temperature_arr, temperature):
    return torch.softmax(logits / temperature_arr[:, None], dim=-1)
"#;

const EACH: &str = r#"def each(of_rows, of_all, rows):
    # One number for each row, or one for all.
    if of_rows is None:
        of_rows = torch.full((rows.shape[0],), of_all, device=rows.device)
    return of_rows[:, None]
"#;

const TOP_K: &str = r#"def in_top_k(rows, k):
    # The k largest, and those that equal the last of them.
    ordered = rows.sort(dim=-1, descending=True).values
    return rows >= ordered.gather(1, k.long().clamp(max=rows.shape[-1]) - 1)
"#;

const TOP_P: &str = r#"def in_top_p(probs, p):
    # The largest whose sum is p, and those that equal the last of them.
    ordered = probs.sort(dim=-1, descending=True).values
    ahead = ordered.cumsum(dim=-1) - ordered
    count = (ahead < p).sum(dim=-1, keepdim=True).clamp(min=1)
    return probs >= ordered.gather(1, count - 1)
"#;

const DRAW: &str = r#"def draw(weights):
    return torch.multinomial(weights, 1)[:, 0].to(torch.int32)
"#;

const FROM_PROBS: &str = r#"def run(probs):
    return draw(probs)
"#;

const FROM_LOGITS: &str = r#"def run(logits):
    return draw(torch.softmax(logits, dim=-1))
"#;

const TOP_K_SAMPLING: &str = r#"def run(probs, top_k_arr, top_k):
    return draw(probs * in_top_k(probs, each(top_k_arr, top_k, probs)))
"#;

const TOP_P_SAMPLING: &str = r#"def run(probs, top_p_arr, top_p):
    return draw(probs * in_top_p(probs, each(top_p_arr, top_p, probs)))
"#;

const MIN_P_SAMPLING: &str = r#"def run(probs, min_p_arr, min_p):
    least = probs.amax(dim=-1, keepdim=True) * each(min_p_arr, min_p, probs)
    return draw(probs * (probs >= least))
"#;

const TOP_K_TOP_P_SAMPLING: &str = r#"def run(probs, top_k_arr, top_k, top_p_arr, top_p):
    kept = in_top_k(probs, each(top_k_arr, top_k, probs)) & in_top_p(probs, each(top_p_arr, top_p, probs))
    return draw(probs * kept)
"#;

const TOP_P_RENORM: &str = r#"def run(probs, top_p_arr, top_p):
    p = each(top_p_arr, top_p, probs)
    kept = probs * (in_top_p(probs, p) | (p >= 1))
    total = kept.sum(dim=-1, keepdim=True)
    # A row that does not sum to p is kept as it is.
    total = torch.where((p < 1) & (total < p), torch.ones_like(total), total)
    return kept / total.clamp(min=1e-8)
"#;

const TOP_K_RENORM: &str = r#"def run(probs, top_k_arr, top_k):
    kept = probs.float() * in_top_k(probs, each(top_k_arr, top_k, probs))
    return (kept / kept.sum(dim=-1, keepdim=True).clamp(min=1e-8)).to(probs.dtype)
"#;

const TOP_K_MASK: &str = r#"def run(logits, top_k_arr, top_k):
    return logits.masked_fill(~in_top_k(logits, each(top_k_arr, top_k, logits)), -math.inf)
"#;

const CHAIN: &str = r#"def run(
    draft_probs,
    draft_token_ids,
    target_probs,
    output_accepted_token_num,
    output_emitted_draft_token_num,
):
    batch, count = draft_token_ids.shape
    tokens = draft_token_ids.long()[..., None]
    p, q = draft_probs.gather(2, tokens)[..., 0], target_probs[:, :count].gather(2, tokens)[..., 0]
    accepts = torch.rand_like(p) * p < q
    # As many as are accepted one after the other.
    emitted = accepts.long().cumprod(dim=1).sum(dim=1)
    # Each token behind them by itself, with other numbers.
    place = torch.arange(count, device=p.device)
    again = (torch.rand_like(p) * p < q) & (place >= emitted[:, None])
    accepted = emitted + again.sum(dim=1)
    rows = torch.arange(batch, device=p.device)
    target = target_probs[rows, emitted]
    draft = torch.where((emitted < count)[:, None], draft_probs[rows, emitted.clamp(max=count - 1)], 0)
    rest = (target - draft).clamp(min=0)
    rest = torch.where(rest.sum(dim=1, keepdim=True) > 0, rest, target)
    last = torch.multinomial(rest, 1)[:, 0].to(torch.int32)
    output = torch.full((batch, count + 1), -1, dtype=torch.int32, device=p.device)
    output[:, :count] = torch.where(place < emitted[:, None], draft_token_ids, -1)
    output[rows, emitted] = last
    return (
        output,
        output_accepted_token_num + accepted.to(torch.int32),
        output_emitted_draft_token_num + emitted.to(torch.int32),
    )
"#;
