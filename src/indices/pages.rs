//! Which pages of a cache requests have, and where their tokens go.

use std::collections::HashMap;

use super::{Placed, Positions, PositionsFacts, Steering, Words, refuse, sealed};
use crate::error::Result;
use crate::tensor::TensorRef;

/// Which pages of a paged cache each request of a batch has, and how many tokens it has in them.
///
/// A request's tokens lie in its pages one after the other: token `i` in the entry `i % page_size` of its page number
/// `i / page_size`. A page may be in several requests, as those are that share a prefix. A token is only appended where no other
/// request that shares the page has one: a request that goes on within a shared page needs a copy of it first.
///
/// ```
/// use flashinfer_rs::PageTable;
///
/// // Pages of 16 tokens, 100 of them, for sequences of up to 512 tokens.
/// let mut table = PageTable::new(16, 100, 512)?;
/// let first = table.push(&[7, 3], 20)?;
/// let second = table.push(&[9], 0)?;
/// // A token for the first request and five for the second.
/// let tokens = table.append(&[1, 5])?;
/// assert_eq!(tokens.positions(), [20, 0, 1, 2, 3, 4]);
/// assert_eq!((table.length(first), table.length(second)), (Some(21), Some(5)));
/// // Its pages have room for 11 more; what is missing is said before anything is changed.
/// assert_eq!(table.missing_pages(first, 12), Some(1));
/// assert!(table.append(&[12, 0]).is_err());
/// table.extend(first, &[42])?;
/// assert!(table.append(&[12, 0]).is_ok());
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageTable {
    page_size: i64,
    pages: i64,
    longest: i64,
    requests: Vec<Request>,
    /// How often each page is held, of those that are.
    holders: HashMap<i32, usize>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Request {
    pages: Vec<i32>,
    length: i64,
}

/// The most that numbers of tokens, of pages and of their products are: what kernels count in 32 bits.
const MOST: i64 = i32::MAX as i64;

/// The most tokens that are appended at once, and the most requests and pages that room is made for.
const MOST_IN_A_STEP: i64 = 1 << 24;

impl PageTable {
    /// Of no request yet, for a cache of `pages` pages of `page_size` tokens each, and sequences of at most `longest` tokens.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for a number that is not within 1 and 2³¹ − 1.
    pub fn new(page_size: i64, pages: i64, longest: i64) -> Result<Self> {
        for (name, number) in [("page_size", page_size), ("pages", pages), ("longest", longest)] {
            if !(1..=MOST).contains(&number) {
                return refuse("PageTable", name, number.to_string(), format!("1 to {MOST}"));
            }
        }
        Ok(Self { page_size, pages, longest, requests: Vec::new(), holders: HashMap::new() })
    }

    /// Adds a request that has these pages and so many tokens in them already. Answers its number, which is that of the
    /// requests before it.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for a page that the cache has not, for tokens that the pages have
    /// no room for, for a sequence that is too long, and for more pages of all requests than 32 bits can count tokens in.
    pub fn push(&mut self, pages: &[i32], length: i64) -> Result<usize> {
        self.check_pages(pages)?;
        self.check_length(self.requests.len(), pages.len(), length)?;
        self.hold(pages);
        self.requests.push(Request { pages: pages.to_vec(), length });
        Ok(self.requests.len() - 1)
    }

    /// Adds pages behind those of a request.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for a request that there is not, and as for [`push`](Self::push).
    pub fn extend(&mut self, request: usize, pages: &[i32]) -> Result<()> {
        self.check_pages(pages)?;
        let count = self.requests.len();
        match self.requests.get_mut(request) {
            Some(request) => request.pages.extend_from_slice(pages),
            None => return no_request(request, count),
        }
        self.hold(pages);
        Ok(())
    }

    fn hold(&mut self, pages: &[i32]) {
        pages.iter().for_each(|page| *self.holders.entry(*page).or_default() += 1);
    }

    /// Takes a request out; those behind it move up by one. Answers its pages.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for a request that there is not.
    pub fn remove(&mut self, request: usize) -> Result<Vec<i32>> {
        if request >= self.requests.len() {
            return no_request(request, self.requests.len());
        }
        let pages = self.requests.remove(request).pages;
        for page in &pages {
            if let Some(held) = self.holders.get_mut(page) {
                *held -= 1;
                if *held == 0 {
                    self.holders.remove(page);
                }
            }
        }
        Ok(pages)
    }

    /// Makes a request shorter: of its tokens the first `length` stay, as after a speculation of which the rest was refused.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for a request that there is not, or one that is shorter already.
    pub fn truncate(&mut self, request: usize, length: i64) -> Result<()> {
        let count = self.requests.len();
        match self.requests.get_mut(request) {
            Some(request) if (0..=request.length).contains(&length) => request.length = length,
            Some(request) => {
                let expected = format!("0 to {}, the request's tokens", request.length);
                return refuse("PageTable", "length", length.to_string(), expected);
            }
            None => return no_request(request, count),
        }
        Ok(())
    }

    /// Adds so many tokens to each request, in its order, and answers where they go. After an error nothing is changed.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for another number of counts than there are requests, a negative
    /// one, more than 2²⁴ tokens, a sequence that becomes too long, pages that are [missing](Self::missing_pages), and for a token
    /// that would be written to an entry where another request that shares the page has one, or its own request a second time.
    pub fn append(&mut self, counts: &[i64]) -> Result<Tokens> {
        if counts.len() != self.requests.len() {
            let found = format!("{} counts", counts.len());
            return refuse(
                "PageTable",
                "counts",
                found,
                format!("one for each of the {} requests", self.requests.len()),
            );
        }
        let mut total = 0i64;
        for (i, (request, &count)) in self.requests.iter().zip(counts).enumerate() {
            if count < 0 {
                return refuse("PageTable", "counts", format!("{count} for request {i}"), "0 or more");
            }
            self.check_length(i, request.pages.len(), request.length.saturating_add(count))?;
            total = total.saturating_add(count);
        }
        if total > MOST_IN_A_STEP {
            let found = format!("{total} tokens");
            return refuse("PageTable", "counts", found, format!("at most {MOST_IN_A_STEP} in one step"));
        }
        self.check_sharing(counts)?;
        let mut tokens = Tokens {
            page_size: self.page_size,
            pages: self.pages,
            longest: self.longest,
            indices: Vec::new(),
            indptr: vec![0],
            last_page_len: Vec::with_capacity(self.requests.len()),
            batch_indices: Vec::with_capacity(total as usize),
            positions: Vec::with_capacity(total as usize),
        };
        for (i, (request, &count)) in self.requests.iter().zip(counts).enumerate() {
            let length = request.length + count;
            // The pages that have tokens by then, and no more: attention takes all but the last of them as full.
            let used = (length + self.page_size - 1) / self.page_size;
            tokens.indices.extend_from_slice(&request.pages[..used as usize]);
            tokens.indptr.push(tokens.indices.len() as i32);
            tokens.last_page_len.push(if length == 0 { 0 } else { ((length - 1) % self.page_size + 1) as i32 });
            for position in request.length..length {
                tokens.batch_indices.push(i as i32);
                tokens.positions.push(position as i32);
            }
        }
        for (request, &count) in self.requests.iter_mut().zip(counts) {
            request.length += count;
        }
        Ok(tokens)
    }

    /// The number of requests.
    pub fn requests(&self) -> usize {
        self.requests.len()
    }

    /// How many tokens a page of the cache holds, and how many pages it has.
    pub(crate) fn cache(&self) -> (i64, i64) {
        (self.page_size, self.pages)
    }

    /// How many tokens a request has; `None` for a request that there is not.
    pub fn length(&self, request: usize) -> Option<i64> {
        Some(self.requests.get(request)?.length)
    }

    /// A request's pages; `None` for a request that there is not.
    pub fn pages(&self, request: usize) -> Option<&[i32]> {
        Some(&self.requests.get(request)?.pages)
    }

    /// How many pages must be [added](Self::extend) to a request before it can have `count` more tokens; `None` for a request
    /// that there is not.
    pub fn missing_pages(&self, request: usize, count: i64) -> Option<usize> {
        let request = self.requests.get(request)?;
        let needed = request.length.saturating_add(count.max(0)).saturating_add(self.page_size - 1) / self.page_size;
        Some(usize::try_from(needed).unwrap_or(usize::MAX).saturating_sub(request.pages.len()))
    }

    /// That tokens are appended where nobody else has any. Only of pages that are held more than once somebody else is looked for.
    fn check_sharing(&self, counts: &[i64]) -> Result<()> {
        // How many of a page's entries a request with so many tokens has, where it is the page with this place.
        let entries = |length: i64, place: usize| (length - place as i64 * self.page_size).clamp(0, self.page_size);
        for (i, (request, &count)) in self.requests.iter().zip(counts).enumerate().filter(|(_, (_, count))| **count > 0)
        {
            let first = (request.length / self.page_size) as usize;
            let last = ((request.length + count - 1) / self.page_size) as usize;
            for (place, page) in request.pages.iter().enumerate().take(last + 1).skip(first) {
                if self.holders.get(page).is_none_or(|&held| held < 2) {
                    continue;
                }
                let entry = entries(request.length, place);
                for (j, (other, &more)) in self.requests.iter().zip(counts).enumerate() {
                    let held =
                        other.pages.iter().enumerate().filter(|(at, held)| *held == page && (j, *at) != (i, place));
                    // What it has by then starts with the page's first entry.
                    if held.map(|(at, _)| entries(other.length + more, at)).any(|others| others > entry) {
                        let found =
                            format!("request {i} writing entry {entry} of page {page}, where request {j} has a token");
                        let expected =
                            "a page of its own for what a request appends: copy the page that it shares first";
                        return refuse("PageTable", "counts", found, expected);
                    }
                }
            }
        }
        Ok(())
    }

    fn check_pages(&self, added: &[i32]) -> Result<()> {
        if let Some(page) = added.iter().find(|page| !(0..self.pages).contains(&i64::from(**page))) {
            let expected = format!("0 to {}, as the cache has {} pages", self.pages - 1, self.pages);
            return refuse("PageTable", "pages", page.to_string(), expected);
        }
        let had: usize = self.requests.iter().map(|request| request.pages.len()).sum();
        let room = (had + added.len()) as i64;
        if room.saturating_mul(self.page_size) > MOST {
            let found = format!("{room} pages of {} tokens in all requests together", self.page_size);
            return refuse(
                "PageTable",
                "pages",
                found,
                format!("room for at most {MOST} tokens, which kernels can count"),
            );
        }
        Ok(())
    }

    fn check_length(&self, request: usize, pages: usize, length: i64) -> Result<()> {
        let room = (pages as i64).saturating_mul(self.page_size);
        let most = room.min(self.longest);
        if (0..=most).contains(&length) {
            return Ok(());
        }
        let (found, size) = (format!("{length} tokens of request {request}"), self.page_size);
        let expected = match length > self.longest {
            true => format!("at most {}, the longest sequence of this table", self.longest),
            false => {
                format!("0 to {room}, which its {pages} pages of {size} tokens have room for; extend it by pages first")
            }
        };
        refuse("PageTable", "length", found, expected)
    }
}

fn no_request<T>(request: usize, count: usize) -> Result<T> {
    refuse("PageTable", "request", request.to_string(), format!("a number below {count}, the number of requests"))
}

/// Where the tokens of a step go: the request and the position of each, with the page table that they were made by.
///
/// Made by [`PageTable::append`]. Everything that a kernel finds its way by is in here, so that no call can be given tokens
/// of one table and the pages of another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokens {
    page_size: i64,
    pages: i64,
    longest: i64,
    indices: Vec<i32>,
    indptr: Vec<i32>,
    last_page_len: Vec<i32>,
    batch_indices: Vec<i32>,
    positions: Vec<i32>,
}

/// What calls need to know of [`Tokens`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokensFacts {
    /// How many tokens there are.
    pub tokens: i64,
    /// How many requests they are of.
    pub requests: i64,
    /// How many tokens a page of the cache holds.
    pub page_size: i64,
    /// How many pages the cache has.
    pub pages: i64,
    /// What every position is below.
    pub below: i64,
}

impl Tokens {
    /// The position of each token in its request.
    pub fn positions(&self) -> &[i32] {
        &self.positions
    }

    /// The request of each token.
    pub fn batch_indices(&self) -> &[i32] {
        &self.batch_indices
    }

    /// How many tokens a page of the cache holds, and how many pages it has.
    pub(crate) fn cache(&self) -> (i64, i64) {
        (self.page_size, self.pages)
    }

    /// The pages that each request has tokens in, and how many tokens those are.
    pub(crate) fn requests(&self) -> impl ExactSizeIterator<Item = (&[i32], i64)> {
        self.indptr.windows(2).zip(&self.last_page_len).map(|(ends, &last)| {
            let pages = &self.indices[ends[0] as usize..ends[1] as usize];
            (pages, (pages.len() as i64 - 1).max(0) * self.page_size + i64::from(last))
        })
    }

    /// The positions alone, for rotary embeddings on the host.
    pub fn to_positions(&self) -> Positions {
        Positions { values: self.positions.clone(), below: self.longest }
    }

    /// With room for so many pages of all requests together and for so many requests, so that a graph that is captured with
    /// it can be given larger tables later. What is left is filled with requests without pages.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for less than there is, or more than 32 bits count.
    pub fn with_room_for(mut self, pages: usize, requests: usize) -> Result<Self> {
        let (least, has) = (self.indices.len(), self.last_page_len.len());
        let most = MOST_IN_A_STEP.min(MOST / self.page_size).max(least as i64) as usize;
        if pages < least || requests < has || pages > most || requests > MOST_IN_A_STEP as usize {
            let found = format!("{pages} pages and {requests} requests");
            let expected = format!("{least} to {most} pages and {has} to {MOST_IN_A_STEP} requests");
            return refuse("Tokens", "room", found, expected);
        }
        self.fill_up(pages, requests);
        Ok(self)
    }

    fn fill_up(&mut self, pages: usize, requests: usize) {
        let end = self.indptr.last().copied().unwrap_or(0);
        self.indices.resize(pages, 0);
        self.indptr.resize(requests + 1, end);
        self.last_page_len.resize(requests, 0);
    }
}

/// The arrays of [`Tokens`], in their order.
const INDICES: usize = 0;
const INDPTR: usize = 1;
const LAST_PAGE_LEN: usize = 2;
const BATCH_INDICES: usize = 3;
const POSITIONS: usize = 4;

impl sealed::Sealed for Tokens {}

impl Steering for Tokens {
    type Facts = TokensFacts;

    fn facts(&self) -> TokensFacts {
        TokensFacts {
            tokens: self.positions.len() as i64,
            requests: self.last_page_len.len() as i64,
            page_size: self.page_size,
            pages: self.pages,
            below: self.longest,
        }
    }

    fn arrays(&self) -> Vec<Words<'_>> {
        [&self.indices, &self.indptr, &self.last_page_len, &self.batch_indices, &self.positions]
            .map(|array| Words::I32(array))
            .to_vec()
    }

    fn in_place_of(&self, captured: &Self) -> Result<Self> {
        let same = |tokens: &Self| (tokens.positions.len(), tokens.page_size, tokens.pages);
        let (pages, requests) = (captured.indices.len(), captured.last_page_len.len());
        let fits =
            self.indices.len() <= pages && self.last_page_len.len() <= requests && self.longest <= captured.longest;
        if !fits || same(self) != same(captured) {
            let described = |tokens: &Self| {
                let (count, pages) = (tokens.positions.len(), tokens.indices.len());
                let (requests, longest) = (tokens.last_page_len.len(), tokens.longest);
                format!(
                    "{count} tokens of {requests} requests of up to {longest} tokens, with {pages} of {} pages of {} tokens",
                    tokens.pages, tokens.page_size
                )
            };
            let expected = format!(
                "as captured, {}, or less but for the tokens and the cache; a request with pages of its own can take the \
                 tokens that are left",
                described(captured)
            );
            return refuse("Tokens", "tokens", described(self), expected);
        }
        let mut filled = Self { longest: captured.longest, ..self.clone() };
        filled.fill_up(pages, requests);
        Ok(filled)
    }
}

/// The arrays of [`Tokens`] that are on a device already.
#[derive(Debug, Clone)]
pub struct TokenTensors<'a> {
    /// The pages of all requests, I32.
    pub kv_indices: TensorRef<'a>,
    /// Where each request's pages start in them, I32, and where the last one's end.
    pub kv_indptr: TensorRef<'a>,
    /// How many tokens each request has in its last page, I32.
    pub kv_last_page_len: TensorRef<'a>,
    /// The request of each token, I32.
    pub batch_indices: TensorRef<'a>,
    /// The position of each token in its request, I32.
    pub positions: TensorRef<'a>,
}

impl<'a> Placed<'a, Tokens> {
    /// Arrays that are on a device already, for a cache of `facts.pages` pages of `facts.page_size` tokens. What they must be
    /// besides, calls check.
    ///
    /// # Safety
    /// Whenever a kernel that was given this runs: `kv_indptr` must start with 0, not decrease and end within `kv_indices`;
    /// every number in `kv_indices` must be at least 0 and below `facts.pages`; every batch index must be that of a request;
    /// and every position must be at least 0, below `facts.below`, and below the tokens that its request's pages hold. No two
    /// tokens may have one place.
    pub unsafe fn from_tensors(tensors: TokenTensors<'a>, facts: TokensFacts) -> Self {
        let TokenTensors { kv_indices, kv_indptr, kv_last_page_len, batch_indices, positions } = tensors;
        Self::promised(facts, vec![kv_indices, kv_indptr, kv_last_page_len, batch_indices, positions])
    }

    /// The positions alone, for rotary embeddings.
    pub fn positions(&self) -> Placed<'_, Positions> {
        let TokensFacts { tokens, below, .. } = self.facts;
        Placed::promised(PositionsFacts { tokens, below }, vec![self.array(POSITIONS)])
    }

    pub(crate) fn kv_indices(&self) -> TensorRef<'_> {
        self.array(INDICES)
    }

    pub(crate) fn kv_indptr(&self) -> TensorRef<'_> {
        self.array(INDPTR)
    }

    pub(crate) fn kv_last_page_len(&self) -> TensorRef<'_> {
        self.array(LAST_PAGE_LEN)
    }

    pub(crate) fn batch_indices(&self) -> TensorRef<'_> {
        self.array(BATCH_INDICES)
    }

    pub(crate) fn token_positions(&self) -> TensorRef<'_> {
        self.array(POSITIONS)
    }
}
