//! Appending to paged caches.

use super::{Args, HostTensor, Raised, SafeCall, function};

pub(super) const FUNCTIONS: &[(&str, SafeCall)] =
    &[("append_paged_kv_cache", append_paged_kv_cache), ("append_paged_mla_kv_cache", append_paged_mla_kv_cache)];

function!(append_paged_kv_cache, |args| {
    let [key, value, batch_indices, positions, k_cache, v_cache, kv_indices, kv_indptr, _last, layout] =
        args.exactly()?;
    let (key, value) = (args.tensor(key)?, args.tensor(value)?);
    let (k_cache, v_cache) = (args.tensor(k_cache)?, args.tensor(v_cache)?);
    let of_heads = args.int(layout)? == 1;
    let page_size = k_cache.size(if of_heads { 2 } else { 1 })?;
    let table = Table::new(args, [batch_indices, positions, kv_indices, kv_indptr], k_cache.size(0)?, page_size)?;
    for token in 0..key.size(0)? {
        let (page, entry) = table.place(token)?;
        for head in 0..key.size(1)? {
            for i in 0..key.size(2)? {
                let to = if of_heads { [page, head, entry, i] } else { [page, entry, head, i] };
                k_cache.copy(&to, &key, &[token, head, i])?;
                v_cache.copy(&to, &value, &[token, head, i])?;
            }
        }
    }
    Ok(())
});

function!(append_paged_mla_kv_cache, |args| {
    let [ckv, kpe, batch_indices, positions, ckv_cache, kpe_cache, kv_indices, kv_indptr, _last] = args.exactly()?;
    let caches = [(args.tensor(ckv)?, args.tensor(ckv_cache)?), (args.tensor(kpe)?, args.tensor(kpe_cache)?)];
    let (pages, page_size) = (caches[0].1.size(0)?, caches[0].1.size(1)?);
    let table = Table::new(args, [batch_indices, positions, kv_indices, kv_indptr], pages, page_size)?;
    for (appended, cache) in &caches {
        for token in 0..appended.size(0)? {
            let (page, entry) = table.place(token)?;
            for i in 0..appended.size(1)? {
                cache.copy(&[page, entry, i], appended, &[token, i])?;
            }
        }
    }
    Ok(())
});

/// Where tokens go.
pub(super) struct Table<'a> {
    batch_indices: HostTensor<'a>,
    positions: HostTensor<'a>,
    indices: HostTensor<'a>,
    indptr: HostTensor<'a>,
    pages: usize,
    page_size: usize,
}

impl<'a> Table<'a> {
    pub(super) fn new(
        args: &Args<'a>,
        [batch_indices, positions, indices, indptr]: [usize; 4],
        pages: usize,
        page_size: usize,
    ) -> Result<Self, Raised> {
        let (batch_indices, positions) = (args.tensor(batch_indices)?, args.tensor(positions)?);
        let (indices, indptr) = (args.tensor(indices)?, args.tensor(indptr)?);
        Ok(Self { batch_indices, positions, indices, indptr, pages, page_size })
    }

    /// The page and the entry of a token.
    pub(super) fn place(&self, token: usize) -> Result<(usize, usize), Raised> {
        let count = self.indices.size(0)?;
        let request = self.batch_indices.index(&[token], self.indptr.size(0)?.saturating_sub(1))?;
        let position = self.positions.index(&[token], count * self.page_size)?;
        let first = self.indptr.index(&[request], count + 1)?;
        let end = self.indptr.index(&[request + 1], count + 1)?;
        let at = first + position / self.page_size;
        if at >= end {
            let pages = end.saturating_sub(first);
            return Err(("IndexError", format!("token {token} is at {position} of a request with {pages} pages")));
        }
        Ok((self.indices.index(&[at], self.pages)?, position % self.page_size))
    }
}
