//! The largest elements of rows.

use super::{Facts, constant, var};

const TOP_K: Facts = Facts {
    kernel: "radix_topk",
    name: "top_k",
    op_type: "topk",
    api: "flashinfer.topk.top_k",
    axes: &[var("rows", "batch_size"), constant("d", "row_len", "n"), constant("top_k", "top_k", "k")],
    constraints: &["top_k <= row_len"],
    reference: &[LARGEST],
};

const TRANSFORM: Facts = Facts {
    kernel: "radix_topk_page_table_transform",
    name: "top_k_page_table_transform",
    api: "flashinfer.topk.top_k_page_table_transform",
    axes: &[var("rows", "batch_size"), constant("max_len", "max_len", "n"), constant("top_k", "top_k", "k")],
    constraints: &[],
    reference: &[FOUND, PAGE_TABLE],
    ..TOP_K
};

pub(super) const FACTS: &[Facts] = &[
    TOP_K,
    Facts { kernel: "radix_topk of several blocks", name: "top_k_of_long_rows", ..TOP_K },
    TRANSFORM,
    Facts {
        kernel: "radix_topk_page_table_transform of requests",
        name: "top_k_page_table_transform_of_requests",
        axes: &[
            var("rows", "batch_size"),
            var("batch", "num_requests"),
            constant("max_len", "max_len", "n"),
            constant("top_k", "top_k", "k"),
        ],
        reference: &[FOUND, PAGE_TABLE_OF_REQUESTS],
        ..TRANSFORM
    },
    Facts {
        kernel: "radix_topk_ragged_transform",
        name: "top_k_ragged_transform",
        api: "flashinfer.topk.top_k_ragged_transform",
        reference: &[FOUND, RAGGED],
        ..TRANSFORM
    },
];

const LARGEST: &str = r#"def run(input):
    values, indices = torch.topk(input, AXIS_top_k, dim=-1)
    return indices.to(torch.int32), values
"#;

const FOUND: &str = r#"def found(input, lengths):
    # Of each row the indices of the largest elements, or all of them where there are no more.
    for row, length in zip(input, lengths.tolist()):
        if length <= AXIS_top_k:
            yield torch.arange(length, device=input.device)
        else:
            yield torch.topk(row[:length], AXIS_top_k).indices


def filled(rows, like):
    output = torch.full((len(rows), AXIS_top_k), -1, dtype=torch.int32, device=like.device)
    for place, row in zip(output, rows):
        place[: row.shape[0]] = row
    return output
"#;

const PAGE_TABLE: &str = r#"def run(input, src_page_table, lengths):
    rows = [src_page_table[i][indices] for i, indices in enumerate(found(input, lengths))]
    return filled(rows, input)
"#;

const PAGE_TABLE_OF_REQUESTS: &str = r#"def run(input, src_page_table, maybe_row_to_batch, lengths):
    requests = maybe_row_to_batch.tolist()
    rows = [src_page_table[requests[i]][indices] for i, indices in enumerate(found(input, lengths))]
    return filled(rows, input)
"#;

const RAGGED: &str = r#"def run(input, offsets, lengths):
    rows = [indices + offsets[i] for i, indices in enumerate(found(input, lengths))]
    return filled(rows, input)
"#;
