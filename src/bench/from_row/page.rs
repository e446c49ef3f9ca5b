//! Appending to paged caches.

use super::{AxisOf, Facts, constant, var};

const AXES: &[AxisOf] = &[
    var("tokens", "nnz_kv"),
    constant("heads", "num_kv_heads", "kv"),
    constant("head_dim", "head_dim", "d"),
    var("pages", "num_pages"),
    constant("page_size", "page_size", "ps"),
    var("requests", "batch_size"),
    var("indices", "num_kv_indices"),
];

/// There may be room behind the last.
pub(super) const PAGES_ARE_LISTED: &str = "kv_indptr[-1].item() <= num_kv_indices";

const APPEND: Facts = Facts {
    kernel: "append_paged_kv_cache",
    name: "append_paged_kv_cache",
    op_type: "page_append",
    api: "flashinfer.page.append_paged_kv_cache",
    axes: AXES,
    constraints: &[PAGES_ARE_LISTED],
    reference: &[PLACES, NHD],
};

pub(super) const FACTS: &[Facts] = &[
    APPEND,
    Facts {
        kernel: "append_paged_kv_cache of heads",
        name: "append_paged_kv_cache_hnd",
        reference: &[PLACES, HND],
        ..APPEND
    },
    Facts {
        kernel: "append_paged_mla_kv_cache",
        name: "append_paged_mla_kv_cache",
        api: "flashinfer.page.append_paged_mla_kv_cache",
        axes: &[
            var("tokens", "nnz_kv"),
            constant("ckv_dim", "head_dim_ckv", "ckv"),
            constant("kpe_dim", "head_dim_kpe", "kpe"),
            var("pages", "num_pages"),
            constant("page_size", "page_size", "ps"),
            var("requests", "batch_size"),
            var("indices", "num_kv_indices"),
        ],
        reference: &[PLACES, MLA],
        ..APPEND
    },
];

/// The page and the entry of each token.
pub(super) const PLACES: &str = r#"def places(batch_indices, positions, kv_indices, kv_indptr, page_size):
    batch_indices, positions = batch_indices.long(), positions.long()
    page = kv_indices[kv_indptr[batch_indices].long() + positions // page_size].long()
    return page, positions % page_size
"#;

const NHD: &str = r#"def run(
    append_key,
    append_value,
    batch_indices,
    positions,
    paged_k_cache,
    paged_v_cache,
    kv_indices,
    kv_indptr,
    kv_last_page_len,
):
    page, entry = places(batch_indices, positions, kv_indices, kv_indptr, paged_k_cache.shape[1])
    k, v = paged_k_cache.clone(), paged_v_cache.clone()
    k[page, entry] = append_key
    v[page, entry] = append_value
    return k, v
"#;

const HND: &str = r#"def run(
    append_key,
    append_value,
    batch_indices,
    positions,
    paged_k_cache,
    paged_v_cache,
    kv_indices,
    kv_indptr,
    kv_last_page_len,
):
    page, entry = places(batch_indices, positions, kv_indices, kv_indptr, paged_k_cache.shape[2])
    k, v = paged_k_cache.clone(), paged_v_cache.clone()
    k[page, :, entry] = append_key
    v[page, :, entry] = append_value
    return k, v
"#;

const MLA: &str = r#"def run(
    append_ckv,
    append_kpe,
    batch_indices,
    positions,
    ckv_cache,
    kpe_cache,
    kv_indices,
    kv_indptr,
    kv_last_page_len,
):
    page, entry = places(batch_indices, positions, kv_indices, kv_indptr, ckv_cache.shape[1])
    ckv, kpe = ckv_cache.clone(), kpe_cache.clone()
    ckv[page, entry] = append_ckv
    kpe[page, entry] = append_kpe
    return ckv, kpe
"#;
