//! The requests of a step: how many queries each has, and where its keys are.

use crate::error::Result;
use crate::indices::{PageTable, Tokens, refuse};

/// The name that errors of a batch carry.
const BATCH: &str = "Batch";

/// The most that numbers of queries, of keys and of pages' tokens are together: what kernels count in 32 bits.
const MOST: i64 = i32::MAX as i64;

/// The requests of a step: how many queries each has, and where its keys are. Checked as it is made, and the one source of all
/// arrays that kernels find their way by, on the host and on the GPU.
///
/// Queries of all requests lie one after the other, in the requests' order. With a causal mask the last query of a request
/// stands at its last key.
///
/// ```
/// use flashinfer_rs::attention::Batch;
///
/// // Pages of 16 tokens, 100 of them.
/// let mut batch = Batch::paged(16, 100)?;
/// // A prefill of 20 tokens, and a query over 33 keys.
/// batch.push(20, &[7, 3], 20)?;
/// batch.push(1, &[9, 4, 12], 33)?;
/// assert_eq!((batch.requests(), batch.rows()), (2, 21));
/// // A page that the cache has not is refused, and a length that the pages do not fit.
/// assert!(batch.push(1, &[100], 3).is_err());
/// assert!(batch.push(1, &[1, 2], 16).is_err());
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Tokens of a page, and pages of the cache; none for keys that lie one after the other.
    pages: Option<(i64, i64)>,
    /// Where each request's queries start, and where the last one's end.
    pub(super) qo_indptr: Vec<i32>,
    /// Where each request's pages start, or without pages its keys.
    pub(super) kv_indptr: Vec<i32>,
    pub(super) kv_indices: Vec<i32>,
    pub(super) last_page_len: Vec<i32>,
    pub(super) kv_len: Vec<i32>,
    /// The first request with fewer keys than queries.
    short_of_keys: Option<usize>,
    /// The first request with other than one query.
    not_one_query: Option<usize>,
}

impl Batch {
    fn new(pages: Option<(i64, i64)>) -> Self {
        Self {
            pages,
            qo_indptr: vec![0],
            kv_indptr: vec![0],
            kv_indices: Vec::new(),
            last_page_len: Vec::new(),
            kv_len: Vec::new(),
            short_of_keys: None,
            not_one_query: None,
        }
    }

    /// Of no request yet, over a cache of `pages` pages of `page_size` tokens.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for a number that is not within 1 and 2³¹ − 1.
    pub fn paged(page_size: i64, pages: i64) -> Result<Self> {
        for (name, number) in [("page_size", page_size), ("pages", pages)] {
            if !(1..=MOST).contains(&number) {
                return refuse(BATCH, name, number.to_string(), format!("1 to {MOST}"));
            }
        }
        Ok(Self::new(Some((page_size, pages))))
    }

    /// Of no request yet, whose keys and values lie one after the other.
    pub fn ragged() -> Self {
        Self::new(None)
    }

    /// The tokens of a step as queries: each request's new tokens, over all keys that it has with them. Requests without new tokens
    /// have no queries and are left out.
    ///
    /// ```
    /// use flashinfer_rs::PageTable;
    /// use flashinfer_rs::attention::Batch;
    ///
    /// let mut table = PageTable::new(16, 100, 512)?;
    /// table.push(&[7, 3], 20)?;
    /// table.push(&[9], 0)?;
    /// let batch = Batch::of_tokens(&table.append(&[1, 5])?)?;
    /// assert_eq!((batch.requests(), batch.rows(), batch.keys()), (2, 6, 26));
    /// # Ok::<(), flashinfer_rs::FlashInferError>(())
    /// ```
    ///
    /// # Errors
    /// None that the tokens' own checks leave.
    pub fn of_tokens(tokens: &Tokens) -> Result<Self> {
        let (page_size, pages) = tokens.cache();
        let mut batch = Self::paged(page_size, pages)?;
        let mut queries = vec![0i64; tokens.requests().len()];
        tokens.batch_indices().iter().for_each(|request| queries[*request as usize] += 1);
        for ((pages, keys), queries) in tokens.requests().zip(queries).filter(|(_, queries)| *queries > 0) {
            batch.push(queries, pages, keys)?;
        }
        Ok(batch)
    }

    /// So many queries for each request of a table, in its order, over the keys that it has there. Without queries a request is left
    /// out.
    ///
    /// # Errors
    /// As for [`push`](Self::push), and for another number of counts than there are requests.
    pub fn of_table(table: &PageTable, queries: &[i64]) -> Result<Self> {
        if queries.len() != table.requests() {
            let found = format!("{} counts", queries.len());
            return refuse(BATCH, "queries", found, format!("one for each of the {} requests", table.requests()));
        }
        let (page_size, pages) = table.cache();
        let mut batch = Self::paged(page_size, pages)?;
        for (request, &queries) in queries.iter().enumerate().filter(|(_, queries)| **queries != 0) {
            let (Some(pages), Some(keys)) = (table.pages(request), table.length(request)) else { break };
            let used = (keys as usize).div_ceil(page_size as usize);
            batch.push(queries, &pages[..used.min(pages.len())], keys)?;
        }
        Ok(batch)
    }

    /// Adds a request of so many queries, whose keys are in these pages, one page after the other.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for no queries or no keys, as which a request is left out; for a
    /// page that the cache has not; for more or fewer pages than the keys take; for more than 32 bits count; and for a batch without
    /// pages. Nothing is changed then.
    pub fn push(&mut self, queries: i64, pages: &[i32], keys: i64) -> Result<()> {
        let Some((page_size, count)) = self.pages else {
            return refuse(
                BATCH,
                "pages",
                "given".to_owned(),
                "none, in a batch without pages: push_ragged adds its requests",
            );
        };
        let request = self.requests();
        self.check_counts(queries, keys)?;
        let needed = (keys + page_size - 1) / page_size;
        if pages.len() as i64 != needed {
            let found = format!("{} of them for request {request}", pages.len());
            return refuse(BATCH, "pages", found, format!("{needed}, which {keys} keys take in pages of {page_size}"));
        }
        let all = self.kv_indices.len() as i64 + needed;
        if all.saturating_mul(page_size) > MOST {
            let found = format!("{all} pages of {page_size} tokens in all requests together");
            return refuse(BATCH, "pages", found, format!("room for at most {MOST} tokens, which kernels can count"));
        }
        // Without a branch for each page: a negative one is a large number too.
        let outside = pages.iter().fold(false, |outside, &page| outside | (page as u32 >= count as u32));
        if outside {
            let wrong = pages.iter().find(|page| !(0..count).contains(&i64::from(**page))).copied().unwrap_or(-1);
            let found = format!("{wrong} for request {request}");
            return refuse(BATCH, "pages", found, format!("0 to {}, as the cache has {count} pages", count - 1));
        }
        self.kv_indices.extend_from_slice(pages);
        self.last_page_len.push(((keys - 1) % page_size + 1) as i32);
        self.add(queries, keys, all);
        Ok(())
    }

    /// Adds a request of so many queries and keys, to a batch without pages.
    ///
    /// # Errors
    /// As for [`push`](Self::push).
    pub fn push_ragged(&mut self, queries: i64, keys: i64) -> Result<()> {
        if self.pages.is_some() {
            return refuse(
                BATCH,
                "pages",
                "none".to_owned(),
                "those of the request, in a batch of pages: push takes them",
            );
        }
        self.check_counts(queries, keys)?;
        let all = self.keys() + keys;
        if all > MOST {
            let found = format!("{all} of all requests together");
            return refuse(BATCH, "keys", found, format!("at most {MOST}, which kernels can count"));
        }
        self.add(queries, keys, all);
        Ok(())
    }

    fn check_counts(&self, queries: i64, keys: i64) -> Result<()> {
        let request = self.requests();
        for (name, count) in [("queries", queries), ("keys", keys)] {
            if !(1..=MOST).contains(&count) {
                let found = format!("{count} of request {request}");
                return refuse(BATCH, name, found, format!("1 to {MOST}; a request without any is left out"));
            }
        }
        let rows = self.rows() + queries;
        if rows > MOST {
            let found = format!("{rows} of all requests together");
            return refuse(BATCH, "queries", found, format!("at most {MOST}, which kernels can count"));
        }
        Ok(())
    }

    /// Adds a request that is there to fill a graph's batch up: of so many queries, over keys in one page, repeated; without pages a
    /// request of nothing.
    #[cfg(feature = "cudarc")]
    pub(super) fn fill_up(&mut self, queries: i64, page: i32) {
        let Some((page_size, _)) = self.pages else { return self.add(0, 0, self.keys()) };
        let keys = queries.max(1);
        let all = self.kv_indices.len() + ((keys + page_size - 1) / page_size) as usize;
        self.kv_indices.resize(all, page);
        self.last_page_len.push(((keys - 1) % page_size + 1) as i32);
        self.add(queries, keys, all as i64);
    }

    /// `end` is where the request's pages end, or its keys.
    fn add(&mut self, queries: i64, keys: i64, end: i64) {
        let request = self.requests();
        self.qo_indptr.push((self.rows() + queries) as i32);
        self.kv_indptr.push(end as i32);
        self.kv_len.push(keys as i32);
        if keys < queries {
            self.short_of_keys.get_or_insert(request);
        }
        if queries != 1 {
            self.not_one_query.get_or_insert(request);
        }
    }

    /// Makes this one a copy of another, in the memory that it has.
    pub(super) fn copy_from(&mut self, other: &Self) {
        (self.pages, self.short_of_keys, self.not_one_query) = (other.pages, other.short_of_keys, other.not_one_query);
        for (to, from) in [
            (&mut self.qo_indptr, &other.qo_indptr),
            (&mut self.kv_indptr, &other.kv_indptr),
            (&mut self.kv_indices, &other.kv_indices),
            (&mut self.last_page_len, &other.last_page_len),
            (&mut self.kv_len, &other.kv_len),
        ] {
            to.clear();
            to.extend_from_slice(from);
        }
    }

    /// Takes all requests out; the memory stays.
    pub fn clear(&mut self) {
        self.qo_indptr.truncate(1);
        self.kv_indptr.truncate(1);
        self.kv_indices.clear();
        self.last_page_len.clear();
        self.kv_len.clear();
        self.short_of_keys = None;
        self.not_one_query = None;
    }

    /// The number of requests.
    pub fn requests(&self) -> usize {
        self.kv_len.len()
    }

    /// The number of queries of all requests: the rows of the tensors of a call.
    pub fn rows(&self) -> i64 {
        self.qo_indptr.last().copied().unwrap_or(0).into()
    }

    /// The number of keys of all requests; a page that several share counts for each.
    pub fn keys(&self) -> i64 {
        self.kv_len.iter().map(|keys| i64::from(*keys)).sum()
    }

    /// The number of pages of all requests; one that several share counts for each.
    pub fn page_count(&self) -> usize {
        self.kv_indices.len()
    }

    /// The tokens of a page and the pages of the cache; none for keys that lie one after the other.
    pub fn cache(&self) -> Option<(i64, i64)> {
        self.pages
    }

    /// The first request that a causal mask would leave queries without a key.
    pub(super) fn short_of_keys(&self) -> Option<usize> {
        self.short_of_keys
    }

    /// The first request with other than one query.
    pub(super) fn not_one_query(&self) -> Option<usize> {
        self.not_one_query
    }

    /// The queries and the keys of a request.
    pub(super) fn lengths(&self, request: usize) -> (i64, i64) {
        let queries = self.qo_indptr[request + 1] - self.qo_indptr[request];
        (queries.into(), self.kv_len[request].into())
    }
}
