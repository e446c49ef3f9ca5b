//! Page tables, and appending to paged caches on the host.

use flashinfer_rs::kernels::page::{
    KvLayout, PagedKvCache, PagedMlaCache, append_paged_kv_cache, append_paged_mla_kv_cache,
};
use flashinfer_rs::{
    FlashInferError, FlashInferRuntime, PageTable, Placed, Positions, Result, RuntimeConfig, Steering, Stream,
    TensorMut, TensorRef, TokenTensors, Tokens, TokensFacts,
};
use half::bf16;

fn start() {
    FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
}

/// The argument that an error names, and what it says.
fn refused<T: std::fmt::Debug>(result: Result<T>) -> (&'static str, String) {
    match result.unwrap_err() {
        FlashInferError::InvalidArgument { argument, found, expected, .. } => {
            (argument, format!("{found}; expected {expected}"))
        }
        other => panic!("{other}"),
    }
}

fn names<T: std::fmt::Debug>(result: Result<T>, argument: &str, says: &str) {
    let (named, text) = refused(result);
    assert_eq!(named, argument, "{text}");
    assert!(text.contains(says), "{text:?} does not say {says:?}");
}

/// A table of two requests that have tokens: 20 in two pages of 16, none in one page.
fn table() -> PageTable {
    let mut table = PageTable::new(16, 10, 100).unwrap();
    table.push(&[7, 3], 20).unwrap();
    table.push(&[9], 0).unwrap();
    table
}

#[test]
fn appended_tokens_have_the_next_positions_of_their_requests() {
    let mut table = table();
    let tokens = table.append(&[2, 3]).unwrap();
    assert_eq!(tokens.batch_indices(), [0, 0, 1, 1, 1]);
    assert_eq!(tokens.positions(), [20, 21, 0, 1, 2]);
    assert_eq!((table.length(0), table.length(1), table.length(2)), (Some(22), Some(3), None));
    let facts = tokens.facts();
    assert_eq!((facts.tokens, facts.requests, facts.page_size, facts.pages, facts.below), (5, 2, 16, 10, 100));
    let next = table.append(&[0, 1]).unwrap();
    assert_eq!((next.batch_indices(), next.positions()), (&[1][..], &[3][..]));
    assert_eq!(next.to_positions().values(), [3]);
}

#[test]
fn what_cannot_be_appended_changes_nothing() {
    let mut table = table();
    names(table.append(&[13, 0]), "length", "extend it by pages first");
    names(table.append(&[0, 17]), "length", "room for");
    names(table.append(&[1]), "counts", "one for each of the 2 requests");
    names(table.append(&[1, -1]), "counts", "-1 for request 1");
    names(table.append(&[i64::MAX, 0]), "length", "at most 100");
    assert_eq!((table.length(0), table.length(1)), (Some(20), Some(0)));
    assert_eq!(table.append(&[12, 16]).unwrap().positions().len(), 28);
}

#[test]
fn a_page_that_the_cache_has_not_is_refused_by_its_number() {
    let mut table = table();
    names(table.push(&[10], 0), "pages", "10; expected 0 to 9");
    names(table.push(&[-1], 0), "pages", "-1");
    names(table.extend(0, &[0, 10]), "pages", "10");
    names(table.extend(2, &[0]), "request", "below 2");
    names(table.push(&[1], 17), "length", "its 1 pages of 16 tokens");
    names(table.push(&[1], -1), "length", "-1 tokens");
    names(table.remove(5), "request", "below 2");
    names(table.truncate(0, 21), "length", "0 to 20");
    assert_eq!(table.requests(), 2);
    for (page_size, pages, longest, name) in [(0, 1, 1, "page_size"), (1, 0, 1, "pages"), (1, 1, 0, "longest")] {
        names(PageTable::new(page_size, pages, longest), name, "1 to 2147483647");
    }
    // More tokens than 32 bits count, which is what kernels do with pages times their size.
    let mut large = PageTable::new(1 << 30, 10, 100).unwrap();
    large.push(&[0], 0).unwrap();
    names(large.push(&[1], 0), "pages", "2147483647 tokens");
}

#[test]
fn tokens_are_not_written_where_another_request_has_one() {
    let mut table = PageTable::new(4, 10, 100).unwrap();
    // Both share page 5, which is full for neither, and a full one.
    table.push(&[3, 5], 6).unwrap();
    table.push(&[3, 5], 5).unwrap();
    // Both at once, the one with fewer tokens over the other's, and what nobody has.
    names(table.append(&[1, 2]), "counts", "where request 1 has a token");
    names(table.append(&[0, 1]), "counts", "request 1 writing entry 1 of page 5, where request 0 has a token");
    assert!(table.append(&[1, 0]).is_ok(), "entry 2, which request 1 is not as long as");
    // A page twice in one request.
    let mut twice = PageTable::new(4, 10, 100).unwrap();
    twice.push(&[0, 0], 4).unwrap();
    names(twice.append(&[1]), "counts", "request 0 writing entry 0 of page 0, where request 0 has a token");
    // With a copy of its own it goes on, and so does the other once it is alone.
    let mut table = PageTable::new(4, 10, 100).unwrap();
    table.push(&[3, 5], 6).unwrap();
    table.push(&[3, 7], 6).unwrap();
    assert!(table.append(&[1, 1]).is_ok());
    table.push(&[3, 5], 7).unwrap();
    assert!(table.append(&[0, 0, 1]).is_ok(), "entry 3, which request 0 is not as long as");
    assert!(table.append(&[1, 0, 0]).is_err());
    table.remove(2).unwrap();
    assert!(table.append(&[1, 0]).is_ok());
}

#[test]
fn more_tokens_than_a_step_has_are_refused_before_memory_is_asked_for() {
    let mut table = PageTable::new(i64::from(i32::MAX), 1, i64::from(i32::MAX)).unwrap();
    table.push(&[0], 0).unwrap();
    names(table.append(&[i64::from(i32::MAX)]), "counts", "at most 16777216 in one step");
    let tokens = table.append(&[1]).unwrap();
    names(tokens.with_room_for(usize::MAX, 1), "room", "1 to 1 pages");
}

#[test]
fn requests_come_and_go() {
    let mut table = table();
    assert_eq!(
        (table.missing_pages(0, 12), table.missing_pages(0, 13), table.missing_pages(9, 1)),
        (Some(0), Some(1), None)
    );
    table.extend(0, &[1]).unwrap();
    assert_eq!(table.pages(0).unwrap(), [7, 3, 1]);
    table.truncate(0, 5).unwrap();
    assert_eq!(table.remove(0).unwrap(), [7, 3, 1]);
    assert_eq!((table.requests(), table.length(0)), (1, Some(0)));
}

#[test]
fn positions_that_no_table_has_are_refused() {
    names(Positions::new(&[0, 5, 4], 5), "positions", "5 at 1; expected 0 to 4");
    names(Positions::new(&[-1], 5), "positions", "-1 at 0");
    names(Positions::new(&[], 0), "below", "0");
    names(Positions::new(&[], 1 << 31), "below", "2147483648");
    assert_eq!(Positions::new(&[4, 0], 5).unwrap().values(), [4, 0]);
}

/// Keys or values that say whose they are.
fn numbered(count: usize, first: f32) -> Vec<bf16> {
    (0..count).map(|i| bf16::from_f32(first + i as f32)).collect()
}

#[test]
fn keys_and_values_land_in_their_entries_and_nowhere_else() {
    start();
    let mut table = PageTable::new(4, 5, 100).unwrap();
    table.push(&[3, 1], 3).unwrap();
    table.push(&[0], 1).unwrap();
    let tokens = table.append(&[2, 1]).unwrap();
    let (heads, size) = (2usize, 8usize);
    let (key, value) = (numbered(3 * heads * size, 1.0), numbered(3 * heads * size, 101.0));
    for layout in [KvLayout::Nhd, KvLayout::Hnd] {
        let shape = if layout == KvLayout::Nhd { [5, 4, 2, 8] } else { [5, 2, 4, 8] };
        let (mut k, mut v) = (vec![bf16::ZERO; 5 * 4 * 16], vec![bf16::ZERO; 5 * 4 * 16]);
        let k_tensor = TensorMut::from_slice(&mut k, &shape).unwrap();
        let mut cache = PagedKvCache::new(k_tensor, TensorMut::from_slice(&mut v, &shape).unwrap(), layout).unwrap();
        append_paged_kv_cache(
            &mut cache,
            &TensorRef::from_slice(&key, &[3, 2, 8]).unwrap(),
            &TensorRef::from_slice(&value, &[3, 2, 8]).unwrap(),
            &Placed::on_host(&tokens).unwrap(),
            Stream::NULL,
        )
        .unwrap();
        let mut expected = vec![bf16::ZERO; k.len()];
        // The last entry of page 3, the first of page 1, and the second of page 0.
        for (token, (page, entry)) in [(3, 3), (1, 0), (0, 1)].into_iter().enumerate() {
            for head in 0..heads {
                for i in 0..size {
                    let at = match layout {
                        KvLayout::Nhd => ((page * 4 + entry) * heads + head) * size + i,
                        KvLayout::Hnd => ((page * heads + head) * 4 + entry) * size + i,
                    };
                    expected[at] = key[(token * heads + head) * size + i];
                }
            }
        }
        assert_eq!(k, expected, "{layout:?}");
        let of_value = |key: &bf16| if *key == bf16::ZERO { *key } else { bf16::from_f32(key.to_f32() + 100.0) };
        assert_eq!(v, expected.iter().map(of_value).collect::<Vec<_>>(), "{layout:?}");
    }
}

#[test]
fn the_parts_of_latent_attention_land_in_their_entries() {
    start();
    let mut table = PageTable::new(2, 3, 100).unwrap();
    table.push(&[2], 1).unwrap();
    let tokens = table.append(&[1]).unwrap();
    let (ckv, kpe) = (numbered(512, 1.0), numbered(64, 1.0));
    let (mut ckv_cache, mut kpe_cache) = (vec![bf16::ZERO; 6 * 512], vec![bf16::ZERO; 6 * 64]);
    let mut cache = PagedMlaCache::new(
        TensorMut::from_slice(&mut ckv_cache, &[3, 2, 512]).unwrap(),
        TensorMut::from_slice(&mut kpe_cache, &[3, 2, 64]).unwrap(),
    )
    .unwrap();
    let (ckv_tensor, kpe_tensor) =
        (TensorRef::from_slice(&ckv, &[1, 512]).unwrap(), TensorRef::from_slice(&kpe, &[1, 64]).unwrap());
    let placed = Placed::on_host(&tokens).unwrap();
    append_paged_mla_kv_cache(&mut cache, &ckv_tensor, &kpe_tensor, &placed, Stream::NULL).unwrap();
    assert_eq!((&ckv_cache[5 * 512..], &kpe_cache[5 * 64..]), (&ckv[..], &kpe[..]));
    assert!(ckv_cache[..5 * 512].iter().chain(&kpe_cache[..5 * 64]).all(|x| *x == bf16::ZERO));
}

#[test]
fn tokens_of_a_table_for_another_cache_are_refused() {
    start();
    let key = numbered(3 * 6, 0.0);
    let key = TensorRef::from_slice(&key, &[3, 2, 3]).unwrap();
    for (page_size, pages) in [(4, 6), (5, 5), (2, 10)] {
        let mut table = PageTable::new(page_size, pages, 100).unwrap();
        table.push(&[0, 1], 0).unwrap();
        let tokens = table.append(&[3]).unwrap();
        let (mut k, mut v) = (vec![bf16::ZERO; 120], vec![bf16::ZERO; 120]);
        let mut cache = PagedKvCache::new(
            TensorMut::from_slice(&mut k, &[5, 4, 2, 3]).unwrap(),
            TensorMut::from_slice(&mut v, &[5, 4, 2, 3]).unwrap(),
            KvLayout::Nhd,
        )
        .unwrap();
        let placed = Placed::on_host(&tokens).unwrap();
        let result = append_paged_kv_cache(&mut cache, &key, &key, &placed, Stream::NULL);
        names(result, "tokens", "5 pages of 4 tokens, as the cache has");
    }
}

#[test]
fn caches_whose_halves_differ_are_refused() {
    let (mut k, mut v) = (vec![bf16::ZERO; 120], vec![bf16::ZERO; 120]);
    let mut pair = |k_shape: &[i64], v_shape: &[i64]| {
        let (k_len, v_len) = (k_shape.iter().product::<i64>() as usize, v_shape.iter().product::<i64>() as usize);
        PagedKvCache::new(
            TensorMut::from_slice(&mut k[..k_len], k_shape).unwrap(),
            TensorMut::from_slice(&mut v[..v_len], v_shape).unwrap(),
            KvLayout::Nhd,
        )
        .map(|_| ())
    };
    names(pair(&[5, 4, 6], &[5, 4, 6]), "paged_k_cache", "[pages, page_size, heads, head_dim]");
    names(pair(&[5, 0, 2, 3], &[5, 0, 2, 3]), "paged_k_cache", "none of them 0");
    names(pair(&[5, 4, 2, 3], &[5, 4, 3, 2]), "paged_v_cache", "as paged_k_cache");
    assert!(pair(&[5, 4, 2, 3], &[5, 4, 2, 3]).is_ok());
}

#[test]
fn arrays_from_elsewhere_are_checked_where_they_are_used() {
    start();
    let of = |words: &'static [i32]| TensorRef::from_slice(words, &[words.len() as i64]).unwrap();
    let facts = TokensFacts { tokens: 3, requests: 1, page_size: 4, pages: 5, below: 8 };
    let append = |indptr: &'static [i32], batch_indices: &'static [i32]| {
        let tensors = TokenTensors {
            kv_indices: of(&[0, 1]),
            kv_indptr: of(indptr),
            kv_last_page_len: of(&[1]),
            batch_indices: of(batch_indices),
            positions: of(&[0, 1, 2]),
        };
        // SAFETY: these are indices of one request with two pages of 4 tokens, or the call is refused.
        let placed = unsafe { Placed::<Tokens>::from_tensors(tensors, facts) };
        let (key, mut k, mut v) = (numbered(3 * 16, 0.0), vec![bf16::ZERO; 320], vec![bf16::ZERO; 320]);
        let mut cache = PagedKvCache::new(
            TensorMut::from_slice(&mut k, &[5, 4, 2, 8]).unwrap(),
            TensorMut::from_slice(&mut v, &[5, 4, 2, 8]).unwrap(),
            KvLayout::Nhd,
        )
        .unwrap();
        let key = TensorRef::from_slice(&key, &[3, 2, 8]).unwrap();
        append_paged_kv_cache(&mut cache, &key, &key, &placed, Stream::NULL)
    };
    assert!(append(&[0, 2], &[0, 0, 0]).is_ok());
    names(append(&[0, 2], &[0, 0]), "batch_indices", "shape [3]");
    names(append(&[0, 2, 2], &[0, 0, 0]), "kv_last_page_len", "shape [2]");
}

#[test]
fn without_tokens_nothing_is_done() {
    start();
    let mut table = table();
    let tokens = table.append(&[0, 0]).unwrap();
    let (mut k, mut v) = (vec![bf16::ONE; 10 * 16 * 4], vec![bf16::ONE; 10 * 16 * 4]);
    let nobody = PageTable::new(16, 10, 100).unwrap().append(&[]).unwrap();
    let mut cache = PagedKvCache::new(
        TensorMut::from_slice(&mut k, &[10, 16, 1, 4]).unwrap(),
        TensorMut::from_slice(&mut v, &[10, 16, 1, 4]).unwrap(),
        KvLayout::Nhd,
    )
    .unwrap();
    let empty: [bf16; 0] = [];
    let none = TensorRef::from_slice(&empty, &[0, 1, 4]).unwrap();
    append_paged_kv_cache(&mut cache, &none, &none, &Placed::on_host(&tokens).unwrap(), Stream::NULL).unwrap();
    append_paged_kv_cache(&mut cache, &none, &none, &Placed::on_host(&nobody).unwrap(), Stream::NULL).unwrap();
    assert!(k.iter().chain(&v).all(|x| *x == bf16::ONE));
}
