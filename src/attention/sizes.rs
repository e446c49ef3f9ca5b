//! How much scratch memory upstream's planners ask for, and what they would count wrong: from the facts of a batch alone, without a
//! GPU. Upstream's planner answers too small a buffer with an exception; lists that its own arrays do not hold it writes past
//! their ends. So both are known here before it is asked.

use super::batch::Batch;
use super::spec::{AttentionSpec, Backend, Kind, MLA_DIMS};
use crate::error::Result;
use crate::indices::refuse;

/// The most that a batch may have: what a [`Workspace`](super::Workspace)'s scratch memory is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Largest {
    /// The most requests.
    pub requests: i64,
    /// The most queries of all requests together.
    pub rows: i64,
}

impl Largest {
    /// So many requests, with so many queries together.
    pub const fn new(requests: i64, rows: i64) -> Self {
        Self { requests, rows }
    }

    /// So many requests with a query each.
    pub const fn decode(requests: i64) -> Self {
        Self { requests, rows: requests }
    }
}

/// What a planner goes by beside the batch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Gpu {
    pub(super) capability: (i32, i32),
    pub(super) multiprocessors: i64,
}

/// Bytes of scratch memory: numbers of kernels, and the planner's lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sizes {
    pub(super) float: i64,
    pub(super) int: i64,
}

/// How many pieces of work latent attention's lists hold. Upstream does not look whether there are more.
const MLA_WORKS: i64 = 16_384;
/// From so many tiles of queries on FA3's planner makes one schedule for all heads.
const ONE_SCHEDULE: i64 = 4_096;
/// How many blocks of the decode kernel a multiprocessor can hold: of 128 threads or more, of which it has at most 2,048.
const DECODE_BLOCKS: i64 = 16;
/// The most elements of queries or results, which kernels count in 32 bits.
pub(super) const MOST_ELEMENTS: i64 = i32::MAX as i64;

fn align(bytes: i64) -> i64 {
    (bytes + 15) & !15
}

/// A list of 32-bit numbers.
fn list(count: i64) -> i64 {
    align(4 * count)
}

/// The queries of FA2's tiles: the packed queries (those of all heads that share a key head) that one block takes.
pub(super) fn fa2_tile(packed: i64, head_dim: i64, gpu: Gpu) -> i64 {
    match packed {
        65.. if head_dim < 256 => 128,
        17.. => 64,
        _ if gpu.capability.0 >= 8 => 16,
        _ => 64,
    }
}

/// The queries of FA3's tiles.
fn fa3_tile(spec: &AttentionSpec) -> i64 {
    if spec.head_dims().1 == 64 { 192 } else { 128 }
}

/// What any batch up to the largest takes.
pub(super) fn sizes(spec: &AttentionSpec, backend: Backend, largest: Largest, gpu: Gpu, graph: bool) -> Sizes {
    let Largest { requests, rows } = largest;
    let (q_heads, kv_heads) = spec.heads();
    let (group, dim) = (spec.group(), spec.out_dim());
    match (spec.kind(), backend) {
        (Kind::Mla, _) => {
            let tiles = gpu.multiprocessors * 64;
            let float = align(2 * tiles * 2 * MLA_DIMS.0) + align(2 * tiles * 4) + 32;
            Sizes { float, int: 9 * list(MLA_WORKS) + 5 * list(gpu.multiprocessors) + 32 }
        }
        (_, Backend::CudaCores) => {
            let split = DECODE_BLOCKS * gpu.multiprocessors / kv_heads;
            let padded = split.max(requests);
            let float = 4 * q_heads * split * (dim + 1) + 48;
            Sizes { float, int: 2 * list(padded) + list(padded + 1) + 4 + align(padded) + 64 }
        }
        (_, Backend::Fa3) => {
            let per_head = (rows + fa3_tile(spec) - 1) / fa3_tile(spec) + requests - 1;
            let works = per_head.max(per_head.min(ONE_SCHEDULE) * q_heads);
            Sizes { float: 16, int: 7 * list(works) + list(gpu.multiprocessors + 1) + 32 }
        }
        (_, Backend::Fa2) => {
            // The longest tiles need the most memory; what the average of a batch gives is not more than what its whole gives.
            let longest = match (spec.kind(), graph) {
                (Kind::Decode, _) => group,
                (_, true) => (rows - requests + 1) * group,
                (_, false) => rows * group,
            };
            let tile = fa2_tile(longest, dim, gpu);
            let split = 2 * gpu.multiprocessors / kv_heads;
            // Where contexts are not divided, a request's last tile may be empty in part; short tiles are those of few queries.
            let tiles = (rows * group + tile - 1) / tile + requests;
            let padded = split.max(tiles).max(if graph { 0 } else { 2 * requests });
            let in_float = if graph { padded } else { split };
            let float = align(4 * q_heads * in_float * tile * dim) + 4 * q_heads * in_float * tile + 32;
            let int = 3 * list(padded) + list(requests + 1) + 4 + 32 + list(rows + 1) + align(padded) + 64;
            Sizes { float, int }
        }
    }
}

/// That a workspace for such batches can be.
pub(super) fn check_largest(spec: &AttentionSpec, largest: Largest) -> Result<()> {
    const WORKSPACE: &str = "Workspace";
    let Largest { requests, rows } = largest;
    if !(1..=1 << 24).contains(&requests) {
        return refuse(WORKSPACE, "requests", requests.to_string(), "1 to 16777216");
    }
    if rows < requests {
        let expected = format!("{requests} or more, a query for each request");
        return refuse(WORKSPACE, "rows", rows.to_string(), expected);
    }
    if spec.kind() == Kind::Decode && rows != requests {
        return refuse(WORKSPACE, "rows", rows.to_string(), format!("{requests}, a query for each request"));
    }
    let widest = spec.heads().0 * spec.head_dims().0.max(spec.out_dim());
    if rows.saturating_mul(widest) > MOST_ELEMENTS {
        let found = format!("{rows} of {widest} elements");
        return refuse(
            WORKSPACE,
            "rows",
            found,
            format!("at most {MOST_ELEMENTS} elements, which kernels count in 32 bits"),
        );
    }
    Ok(())
}

/// That upstream's planner and kernels do right by a batch.
pub(super) fn check_batch(spec: &AttentionSpec, largest: Largest, batch: &Batch, multiprocessors: i64) -> Result<()> {
    const PLAN: &str = "Workspace::plan";
    let refused = |argument, found: String, expected: String| refuse(PLAN, argument, found, expected);
    match (spec.kind(), batch.cache()) {
        (Kind::Ragged, None) => {}
        (Kind::Ragged, Some(_)) => {
            return refused(
                "batch",
                "one of pages".to_owned(),
                "one whose keys lie one after the other: Batch::ragged".to_owned(),
            );
        }
        (_, None) => return refused("batch", "one without pages".to_owned(), "one of pages: Batch::paged".to_owned()),
        (_, Some((page_size, _))) if page_size != spec.page_size() => {
            let expected = format!("{}, as the specification says", spec.page_size());
            return refused("page_size", page_size.to_string(), expected);
        }
        _ => {}
    }
    let (requests, rows) = (batch.requests() as i64, batch.rows());
    if requests > largest.requests || rows > largest.rows {
        let found = format!("of {requests} requests and {rows} queries");
        let expected = format!(
            "at most {} requests and {} queries, for which the workspace was made",
            largest.requests, largest.rows
        );
        return refused("batch", found, expected);
    }
    if let (Kind::Decode, Some(request)) = (spec.kind(), batch.not_one_query()) {
        let found = format!("{} of request {request}", batch.lengths(request).0);
        return refused("queries", found, "1 of each request; AttentionSpec::paged takes any number".to_owned());
    }
    if let (true, Some(request)) = (spec.is_causal(), batch.short_of_keys()) {
        let (queries, keys) = batch.lengths(request);
        let found = format!("{keys} for {queries} queries of request {request}");
        let expected =
            "a key for each query or more, with a causal mask: release 0.6.3 lets queries without one see the future";
        return refused("keys", found, expected.to_owned());
    }
    if spec.kind() == Kind::Mla {
        let heads = spec.heads().0;
        let tiles: i64 = (0..batch.requests()).map(|request| (batch.lengths(request).0 * heads + 63) / 64).sum();
        if tiles + multiprocessors > MLA_WORKS {
            let found = format!("{rows} of {heads} heads, {tiles} tiles of 64");
            let most = MLA_WORKS - multiprocessors;
            return refused(
                "queries",
                found,
                format!("at most {most} tiles, which the planner's lists hold: divide the batch"),
            );
        }
    }
    Ok(())
}
