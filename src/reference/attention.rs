//! Attention, in f64, over paged caches, over keys that lie one after the other, and over latent caches.

use super::{Args, HostTensor, Raised, SafeCall, function};

pub(super) const FUNCTIONS: &[(&str, SafeCall)] =
    &[("attention_paged", attention_paged), ("attention_ragged", attention_ragged), ("attention_mla", attention_mla)];

/// What is the same for every request and head.
struct Facts {
    causal: bool,
    /// Negative for none.
    window: i64,
    /// 0 for none.
    cap: f64,
    scale: f64,
    /// What values are multiplied by.
    v_scale: f64,
    /// The base of the logarithms that are answered.
    base: f64,
}

impl Facts {
    fn new(args: &Args<'_>, [causal, window, cap, scale, v_scale]: [usize; 5]) -> Result<Self, Raised> {
        let (causal, window, v_scale) = (args.bool(causal)?, args.int(window)?, args.float(v_scale)?);
        Ok(Self { causal, window, cap: args.float(cap)?, scale: args.float(scale)?, v_scale, base: 2.0 })
    }

    /// The keys that a query sees, where it is the `i`th of so many.
    fn visible(&self, i: usize, queries: usize, keys: usize) -> std::ops::Range<usize> {
        // Where the query stands, which is aligned to the end.
        let at = i as i64 + keys as i64 - queries as i64;
        let end = if self.causal { (at + 1).clamp(0, keys as i64) } else { keys as i64 };
        let start = if self.window < 0 { 0 } else { (at - self.window).clamp(0, end) };
        start as usize..end as usize
    }

    /// A query over the keys and values of its head: the result, and the logarithm of what it was divided by.
    fn attend(&self, query: &[f64], keys: &[f64], values: &[f64], width: usize, sink: Option<f64>) -> (Vec<f64>, f64) {
        let logits = keys.chunks_exact(query.len()).map(|key| {
            let logit = self.scale * query.iter().zip(key).map(|(q, k)| q * k).sum::<f64>();
            if self.cap > 0.0 { self.cap * (logit / self.cap).tanh() } else { logit }
        });
        let logits: Vec<f64> = logits.collect();
        let greatest = logits.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
        let mut total = sink.map_or(0.0, |sink| (sink - greatest).exp());
        let mut sum = vec![0.0; width];
        for (logit, value) in logits.iter().zip(values.chunks_exact(width)) {
            let weight = (logit - greatest).exp();
            total += weight;
            sum.iter_mut().zip(value).for_each(|(sum, v)| *sum += weight * v);
        }
        if total > 0.0 {
            sum.iter_mut().for_each(|sum| *sum = *sum / total * self.v_scale);
        }
        (sum, (greatest + total.ln()) / self.base.ln())
    }
}

/// Where each request's queries are, and its keys or its pages.
struct Requests<'a> {
    queries: HostTensor<'a>,
    starts: HostTensor<'a>,
}

impl<'a> Requests<'a> {
    fn new(args: &Args<'a>, queries: usize, starts: usize) -> Result<Self, Raised> {
        Ok(Self { queries: args.tensor(queries)?, starts: args.tensor(starts)? })
    }

    fn count(&self) -> Result<usize, Raised> {
        Ok(self.queries.size(0)?.saturating_sub(1))
    }

    fn between(offsets: &HostTensor<'_>, request: usize, most: usize) -> Result<std::ops::Range<usize>, Raised> {
        let (start, end) = (offsets.index(&[request], most + 1)?, offsets.index(&[request + 1], most + 1)?);
        if start <= end {
            return Ok(start..end);
        }
        Err(("ValueError", format!("argument #{} decreases behind {request}", offsets.position)))
    }
}

/// The pages of requests.
struct Pages<'a> {
    indices: HostTensor<'a>,
    last: HostTensor<'a>,
    pages: usize,
    page_size: usize,
}

impl Pages<'_> {
    /// The page and the entry of each of a request's keys.
    fn places(&self, requests: &Requests<'_>, request: usize) -> Result<Vec<(usize, usize)>, Raised> {
        let own = Requests::between(&requests.starts, request, self.indices.size(0)?)?;
        if own.is_empty() {
            return Ok(Vec::new());
        }
        let last = self.last.index(&[request], self.page_size + 1)?;
        let keys = (own.len() - 1) * self.page_size + last;
        let mut places = Vec::with_capacity(keys);
        for (at, index) in own.enumerate() {
            let page = self.indices.index(&[index], self.pages)?;
            let count = self.page_size.min(keys - at * self.page_size);
            places.extend((0..count).map(|entry| (page, entry)));
        }
        Ok(places)
    }
}

/// The results of a call.
struct Results<'a> {
    o: HostTensor<'a>,
    lse: Option<HostTensor<'a>>,
}

impl Results<'_> {
    fn write(&self, row: usize, head: usize, (values, logarithm): &(Vec<f64>, f64)) -> Result<(), Raised> {
        self.o.write(&[row, head], values)?;
        self.lse.as_ref().map_or(Ok(()), |lse| lse.set(&[row, head], *logarithm))
    }
}

function!(attention_paged, |args| {
    let [q, k, v, o, lse, sink, qo_indptr, kv_indptr, indices, last, of_heads, causal, window, cap, scale, v_scale] =
        args.exactly()?;
    let (q, k, v) = (args.tensor(q)?, args.tensor(k)?, args.tensor(v)?);
    let results = Results { o: args.tensor(o)?, lse: args.optional(lse)? };
    let sink = args.optional(sink)?;
    let requests = Requests::new(args, qo_indptr, kv_indptr)?;
    let of_heads = args.int(of_heads)? == 1;
    let (tokens_at, heads_at) = if of_heads { (2, 1) } else { (1, 2) };
    let (indices, last) = (args.tensor(indices)?, args.tensor(last)?);
    let pages = Pages { indices, last, pages: k.size(0)?, page_size: k.size(tokens_at)? };
    let facts = Facts::new(args, [causal, window, cap, scale, v_scale])?;
    let kv_heads = k.size(heads_at)?;
    for request in 0..requests.count()? {
        let places = pages.places(&requests, request)?;
        let rows = Requests::between(&requests.queries, request, q.size(0)?)?;
        let gather = |cache: &HostTensor<'_>, head: usize, values: &mut Vec<f64>| -> Result<(), Raised> {
            let size = cache.size(3)?;
            values.resize(places.len() * size, 0.0);
            for ((page, entry), row) in places.iter().zip(values.chunks_exact_mut(size.max(1))) {
                let at = if of_heads { [*page, head, *entry] } else { [*page, *entry, head] };
                read(cache, &at, row)?;
            }
            Ok(())
        };
        heads(
            &facts,
            &q,
            rows,
            (kv_heads, places.len()),
            (k.size(3)?, v.size(3)?),
            sink.as_ref(),
            &results,
            |head, keys, values| {
                gather(&k, head, keys)?;
                gather(&v, head, values)
            },
        )?;
    }
    Ok(())
});

function!(attention_ragged, |args| {
    let [q, k, v, o, lse, sink, qo_indptr, kv_indptr, causal, window, cap, scale, v_scale] = args.exactly()?;
    let (q, k, v) = (args.tensor(q)?, args.tensor(k)?, args.tensor(v)?);
    let results = Results { o: args.tensor(o)?, lse: args.optional(lse)? };
    let sink = args.optional(sink)?;
    let requests = Requests::new(args, qo_indptr, kv_indptr)?;
    let facts = Facts::new(args, [causal, window, cap, scale, v_scale])?;
    for request in 0..requests.count()? {
        let own = Requests::between(&requests.starts, request, k.size(0)?)?;
        let rows = Requests::between(&requests.queries, request, q.size(0)?)?;
        let gather = |tensor: &HostTensor<'_>, head: usize, values: &mut Vec<f64>| -> Result<(), Raised> {
            let size = tensor.size(2)?;
            values.resize(own.len() * size, 0.0);
            for (token, row) in own.clone().zip(values.chunks_exact_mut(size.max(1))) {
                read(tensor, &[token, head], row)?;
            }
            Ok(())
        };
        let sizes = (k.size(2)?, v.size(2)?);
        heads(&facts, &q, rows, (k.size(1)?, own.len()), sizes, sink.as_ref(), &results, |head, keys, values| {
            gather(&k, head, keys)?;
            gather(&v, head, values)
        })?;
    }
    Ok(())
});

/// Every query head of a request, of which as many share a key head as there are more of them. `gather` gets a key head's keys
/// and values.
#[allow(clippy::too_many_arguments, reason = "each is a fact of its own")]
fn heads(
    facts: &Facts,
    q: &HostTensor<'_>,
    rows: std::ops::Range<usize>,
    (kv_heads, count): (usize, usize),
    (key_size, value_size): (usize, usize),
    sink: Option<&HostTensor<'_>>,
    results: &Results<'_>,
    gather: impl Fn(usize, &mut Vec<f64>, &mut Vec<f64>) -> Result<(), Raised>,
) -> Result<(), Raised> {
    let q_heads = q.size(1)?;
    if kv_heads == 0 || q_heads % kv_heads != 0 || q.size(2)? != key_size {
        let found = format!("{q_heads} query and {kv_heads} key heads of {} and {key_size}", q.size(2)?);
        return Err(("ValueError", format!("{found} do not group")));
    }
    let (group, queries) = (q_heads / kv_heads, rows.len());
    let (mut keys, mut values, mut query) = (Vec::new(), Vec::new(), vec![0.0; key_size]);
    for kv_head in 0..kv_heads {
        gather(kv_head, &mut keys, &mut values)?;
        for head in kv_head * group..(kv_head + 1) * group {
            let sink = sink.map(|sink| sink.at(&[head])).transpose()?;
            for (i, row) in rows.clone().enumerate() {
                read(q, &[row, head], &mut query)?;
                let seen = facts.visible(i, queries, count);
                let own_keys = &keys[seen.start * key_size..seen.end * key_size];
                let own_values = &values[seen.start * value_size..seen.end * value_size];
                results.write(row, head, &facts.attend(&query, own_keys, own_values, value_size, sink))?;
            }
        }
    }
    Ok(())
}

function!(attention_mla, |args| {
    let [q_nope, q_pe, ckv, kpe, o, lse, qo_indptr, kv_indptr, indices, last, causal, scale, natural] =
        args.exactly()?;
    let (q_nope, q_pe) = (args.tensor(q_nope)?, args.tensor(q_pe)?);
    let (ckv, kpe) = (args.tensor(ckv)?, args.tensor(kpe)?);
    let results = Results { o: args.tensor(o)?, lse: args.optional(lse)? };
    let requests = Requests::new(args, qo_indptr, kv_indptr)?;
    let (indices, last) = (args.tensor(indices)?, args.tensor(last)?);
    let pages = Pages { indices, last, pages: ckv.size(0)?, page_size: ckv.size(1)? };
    let base = if args.bool(natural)? { std::f64::consts::E } else { 2.0 };
    let facts =
        Facts { causal: args.bool(causal)?, window: -1, cap: 0.0, scale: args.float(scale)?, v_scale: 1.0, base };
    let (compressed, rotary) = (ckv.size(2)?, kpe.size(2)?);
    let size = compressed + rotary;
    for request in 0..requests.count()? {
        let places = pages.places(&requests, request)?;
        let rows = Requests::between(&requests.queries, request, q_nope.size(0)?)?;
        // A key is what is compressed and then the rotary part; its value is the former.
        let (mut keys, mut values) = (vec![0.0; places.len() * size], vec![0.0; places.len() * compressed]);
        for ((page, entry), (key, value)) in
            places.iter().zip(keys.chunks_exact_mut(size).zip(values.chunks_exact_mut(compressed)))
        {
            read(&ckv, &[*page, *entry], &mut key[..compressed])?;
            read(&kpe, &[*page, *entry], &mut key[compressed..])?;
            value.copy_from_slice(&key[..compressed]);
        }
        let (queries, mut query) = (rows.len(), vec![0.0; size]);
        for head in 0..q_nope.size(1)? {
            for (i, row) in rows.clone().enumerate() {
                read(&q_nope, &[row, head], &mut query[..compressed])?;
                read(&q_pe, &[row, head], &mut query[compressed..])?;
                let seen = facts.visible(i, queries, places.len());
                let own_keys = &keys[seen.start * size..seen.end * size];
                let own_values = &values[seen.start * compressed..seen.end * compressed];
                results.write(row, head, &facts.attend(&query, own_keys, own_values, compressed, None))?;
            }
        }
    }
    Ok(())
});

/// Reads numbers of any type, 8-bit ones among them.
fn read(tensor: &HostTensor<'_>, leading: &[usize], values: &mut [f64]) -> Result<(), Raised> {
    let count = values.len();
    tensor.below(leading, count, |index, i| tensor.number(index).map(|value| values[i] = value))
}
