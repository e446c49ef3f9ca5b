//! Upstream's planners again, from their rules: what each must answer for a batch, and the lists that it copies to the GPU.
#![allow(dead_code, reason = "each test uses its own part")]

/// A batch's numbers of queries, and of keys in pages.
pub struct Lengths {
    pub queries: Vec<i64>,
    pub pages: Vec<i64>,
}

pub struct Heads {
    pub q: i64,
    pub kv: i64,
    pub size: i64,
}

fn ceil(a: i64, b: i64) -> i64 {
    (a + b - 1) / b
}

/// Lays arrays out one after the other, each at a multiple of its alignment.
pub struct Layout(i64);

impl Layout {
    pub fn new() -> Self {
        Self(0)
    }

    pub fn place(&mut self, bytes: i64, alignment: i64) -> i64 {
        let at = ceil(self.0, alignment) * alignment;
        self.0 = at + bytes;
        at
    }

    pub fn end(&self) -> i64 {
        self.0
    }
}

/// What a planner answers, and the lists with the offsets at which they lie.
pub struct Planned {
    pub integers: Vec<i64>,
    pub lists: Vec<(i64, Vec<i32>)>,
    /// Bytes of both workspaces.
    pub float: i64,
    pub int: i64,
}

/// FA2's planner, without a window.
pub fn fa2(lengths: &Lengths, heads: &Heads, page_size: i64, multiprocessors: i64, graph: Option<i64>) -> Planned {
    let group = heads.q / heads.kv;
    let requests = lengths.queries.len() as i64;
    let packed: Vec<i64> = lengths.queries.iter().map(|queries| queries * group).collect();
    let rows: i64 = lengths.queries.iter().sum();
    let captured = graph.unwrap_or(rows);
    let average = match graph {
        Some(rows) => (rows - requests + 1) * group,
        None => packed.iter().sum::<i64>() / requests,
    };
    let tile = if average > 64 && heads.size < 256 {
        128
    } else if average > 16 {
        64
    } else {
        16
    };
    let most = 2 * multiprocessors / heads.kv;
    let longest = lengths.pages.iter().copied().max().unwrap_or(0).max(1);
    // The shortest chunk with which the tiles fit the GPU.
    let fits = |chunk: i64| {
        let tiles =
            packed.iter().zip(&lengths.pages).map(|(packed, pages)| ceil(*packed, tile) * ceil((*pages).max(1), chunk));
        tiles.sum::<i64>() <= most
    };
    let least = (128 / page_size).max(1);
    let chunk = (least..longest).find(|chunk| fits(*chunk)).unwrap_or(longest.max(least));
    let split = graph.is_some() || chunk < longest;
    let (mut request, mut q_tile, mut kv_tile) = (Vec::new(), Vec::new(), Vec::new());
    let (mut merge, mut o) = (vec![0i32], vec![0i32]);
    for (i, (packed, pages)) in packed.iter().zip(&lengths.pages).enumerate() {
        let chunks = ceil((*pages).max(1), chunk);
        for tile in 0..ceil(*packed, tile) {
            for at in 0..chunks {
                request.push(i as i32);
                q_tile.push(tile as i32);
                kv_tile.push(at as i32);
            }
        }
        (0..lengths.queries[i]).for_each(|_| merge.push(merge[merge.len() - 1] + chunks as i32));
        o.push(o[o.len() - 1] + (lengths.queries[i] * chunks) as i32);
    }
    let works = request.len() as i64;
    let padded = match graph {
        Some(rows) => most.max(ceil(rows * group, tile) + requests - 1),
        None => works,
    };
    let (mut int, mut float) = (Layout::new(), Layout::new());
    let at = [(); 3].map(|()| int.place(4 * padded, 16));
    let o_at = int.place(4 * (requests + 1), 16);
    let chunk_at = int.place(4, 1);
    let rows_at = if graph.is_some() { int.place(4, 16) } else { 0 };
    let mut lists = vec![(at[0], request), (at[1], q_tile), (at[2], kv_tile), (o_at, o)];
    lists.push((chunk_at, vec![(chunk * page_size) as i32]));
    if graph.is_some() {
        lists.push((rows_at, vec![rows as i32]));
    }
    let (mut v_at, mut s_at, mut merge_at, mut valid_at) = (0, 0, 0, 0);
    if split {
        v_at = float.place(4 * heads.q * padded * tile * heads.size, 16);
        s_at = float.place(4 * heads.q * padded * tile, 16);
        merge_at = int.place(4 * (captured + 1), 16);
        valid_at = int.place(padded, 16);
        lists.push((merge_at, merge));
    }
    let integers = vec![
        padded,
        captured,
        rows_at,
        tile,
        at[0],
        at[1],
        at[2],
        merge_at,
        o_at,
        chunk_at,
        v_at,
        s_at,
        valid_at,
        i64::from(graph.is_some()),
        i64::from(split),
    ];
    Planned { integers, lists, float: float.end(), int: int.end() }
}

/// The decode kernel's planner, where a multiprocessor holds so many of its blocks.
pub fn decode(pages: &[i64], heads: &Heads, page_size: i64, blocks: i64, graph: bool) -> Planned {
    let requests = pages.len() as i64;
    let longest = pages.iter().copied().max().unwrap_or(0);
    let least = (128 / page_size).max(1);
    let (split, chunk) = if requests * heads.kv >= blocks {
        (false, longest.max(1))
    } else {
        let fits = |chunk: i64| pages.iter().map(|pages| ceil(*pages, chunk)).sum::<i64>() * heads.kv <= blocks;
        let chunk = (least..longest).find(|chunk| fits(*chunk)).unwrap_or(longest.max(least));
        let divided = pages.iter().map(|pages| ceil(*pages, chunk)).sum::<i64>();
        (divided != requests || graph, chunk)
    };
    let (mut request, mut kv_tile, mut o) = (Vec::new(), Vec::new(), vec![0i32]);
    for (i, pages) in pages.iter().enumerate() {
        let chunks = ceil(*pages, chunk);
        for at in 0..chunks {
            request.push(i as i32);
            kv_tile.push(at as i32);
        }
        o.push(o[o.len() - 1] + chunks as i32);
    }
    let works = request.len() as i64;
    let padded = match (graph, split) {
        (true, true) => blocks / heads.kv,
        (true, false) => requests,
        _ => works,
    };
    let (mut int, mut float) = (Layout::new(), Layout::new());
    let (request_at, tile_at) = (int.place(4 * padded, 16), int.place(4 * padded, 16));
    let (o_at, chunk_at) = (int.place(4 * (padded + 1), 16), int.place(4, 1));
    let (mut v_at, mut s_at, mut valid_at) = (0, 0, 0);
    if split {
        v_at = float.place(4 * heads.q * padded * heads.size, 16);
        s_at = float.place(4 * heads.q * padded, 16);
        valid_at = int.place(padded, 16);
    }
    let lists =
        vec![(request_at, request), (tile_at, kv_tile), (o_at, o), (chunk_at, vec![(chunk * page_size) as i32])];
    let integers =
        vec![padded, v_at, s_at, request_at, tile_at, o_at, valid_at, chunk_at, i64::from(graph), i64::from(split)];
    Planned { integers, lists, float: float.end(), int: int.end() }
}

/// Latent attention's planner, of which only the lists' places are foreseen.
pub fn mla(queries: &[i64], heads: i64, multiprocessors: i64) -> Planned {
    let average = queries.iter().map(|queries| queries * heads).sum::<i64>() / queries.len() as i64;
    let cluster = if average > 64 { 2 } else { 1 };
    let clusters = multiprocessors / cluster;
    let (mut int, mut float) = (Layout::new(), Layout::new());
    let works = 4 * 16_384;
    let first = [(); 3].map(|()| int.place(works, 16));
    let merges = [(); 5].map(|()| int.place(4 * multiprocessors, 16));
    let rest = [(); 6].map(|()| int.place(works, 16));
    let rows = 2 * clusters * cluster * 64;
    let partial = [float.place(rows * 2 * 512, 16), float.place(rows * 4, 16)];
    let integers = [&[cluster, clusters][..], &first, &merges, &rest, &partial].concat();
    Planned { integers, lists: Vec::new(), float: float.end(), int: int.end() }
}

/// FA3's planner, of which only the lists' places are foreseen.
pub fn fa3(queries: &[i64], heads: &Heads, multiprocessors: i64, graph: Option<i64>) -> Planned {
    let tile = if heads.size == 64 { 192 } else { 128 };
    let rows = graph.unwrap_or_else(|| queries.iter().sum());
    let most = ceil(rows, tile) + queries.len() as i64 - 1;
    let one_schedule = most > 4096;
    let tiles = if graph.is_some() { most } else { queries.iter().map(|queries| ceil(*queries, tile)).sum() };
    let works = tiles * if one_schedule { 1 } else { heads.q };
    let mut int = Layout::new();
    let first = [(); 6].map(|()| int.place(4 * works, 16));
    let work_at = int.place(4 * (multiprocessors + 1), 16);
    let batch_at = int.place(4 * works, 16);
    let integers = [&first[..], &[work_at, batch_at, i64::from(one_schedule)]].concat();
    Planned { integers, lists: Vec::new(), float: 0, int: int.end() }
}
