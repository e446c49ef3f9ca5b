//! Attention over a paged cache for three requests that share a prefix: prefill, append and decode, with the page table printed.
//! On a GPU, or without one on the host reference, with the same calls. `cargo run --example 06_paged_attention --features
//! cudarc,attention`

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DeviceRepr};
use flashinfer_rs::attention::{AttentionOptions, AttentionSpec, Batch, Largest, Plan, Workspace};
use flashinfer_rs::kernels::page::{KvLayout, PagedKvCache, append_paged_kv_cache};
use flashinfer_rs::{
    DType, Element, FlashInferRuntime, OnDevice, PageTable, Placed, Result, RuntimeConfig, Stream, TensorMut,
    TensorRef, Tokens,
};
use half::bf16;

const HEADS: (i64, i64) = (8, 2);
const HEAD_DIM: i64 = 64;
const PAGE_SIZE: i64 = 4;
const PAGES: i64 = 16;
const LONGEST: i64 = 64;

/// Where everything is: on a GPU's stream, or on the host.
struct Place {
    stream: Option<Arc<CudaStream>>,
}

enum Memory<T> {
    Host(Vec<T>),
    Gpu(CudaSlice<T>),
}

impl Place {
    fn memory<T: Element + DeviceRepr>(&self, values: Vec<T>) -> Memory<T> {
        match &self.stream {
            Some(stream) => Memory::Gpu(stream.clone_htod(&values).expect("memory on the GPU")),
            None => Memory::Host(values),
        }
    }

    fn write<'a, T: Element>(&'a self, memory: &'a mut Memory<T>, shape: &[i64]) -> Result<TensorMut<'a>> {
        match (memory, &self.stream) {
            (Memory::Gpu(buffer), Some(stream)) => TensorMut::from_cudarc(stream, buffer, shape),
            (Memory::Host(values), _) => TensorMut::from_slice(values, shape),
            (Memory::Gpu(_), None) => unreachable!("there is a stream where there is a GPU"),
        }
    }

    fn read<'a, T: Element>(&'a self, memory: &'a Memory<T>, shape: &[i64]) -> Result<TensorRef<'a>> {
        match (memory, &self.stream) {
            (Memory::Gpu(buffer), Some(stream)) => TensorRef::from_cudarc(stream, buffer, shape),
            (Memory::Host(values), _) => TensorRef::from_slice(values, shape),
            (Memory::Gpu(_), None) => unreachable!("there is a stream where there is a GPU"),
        }
    }

    fn values<T: Element + DeviceRepr + Default>(&self, memory: &Memory<T>) -> Vec<T> {
        match (memory, &self.stream) {
            (Memory::Gpu(buffer), Some(stream)) => stream.clone_dtoh(buffer).expect("a copy from the GPU"),
            (Memory::Host(values), _) => values.clone(),
            (Memory::Gpu(_), None) => unreachable!("there is a stream where there is a GPU"),
        }
    }

    fn stream(&self) -> Stream<'_> {
        self.stream.as_deref().map_or(Stream::NULL, Stream::cudarc)
    }

    fn workspace(&self, spec: AttentionSpec, largest: Largest) -> Result<Workspace> {
        match &self.stream {
            Some(stream) => Workspace::new(spec, largest, stream),
            None => Ok(Workspace::on_host(spec)),
        }
    }
}

/// The cache's memory.
struct Cache {
    k: Memory<bf16>,
    v: Memory<bf16>,
}

impl Cache {
    fn tensors<'a>(&'a mut self, place: &'a Place) -> Result<PagedKvCache<'a>> {
        let shape = [PAGES, PAGE_SIZE, HEADS.1, HEAD_DIM];
        PagedKvCache::new(place.write(&mut self.k, &shape)?, place.write(&mut self.v, &shape)?, KvLayout::Nhd)
    }
}

/// Numbers in place of what a model's weights would make.
fn numbers(count: i64, seed: usize) -> Vec<bf16> {
    (0..count as usize).map(|i| bf16::from_f32(((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.5 - 1.0)).collect()
}

/// Puts the keys and values of a step's tokens into the cache.
fn append(place: &Place, cache: &mut Cache, tokens: &Tokens, seed: usize) -> Result<()> {
    let shape = [tokens.positions().len() as i64, HEADS.1, HEAD_DIM];
    let count = shape.iter().product();
    let (k, v) = (place.memory(numbers(count, seed)), place.memory(numbers(count, seed + 1)));
    let (k, v) = (place.read(&k, &shape)?, place.read(&v, &shape)?);
    let mut cache = cache.tensors(place)?;
    match &place.stream {
        Some(stream) => {
            let on_gpu = OnDevice::new(tokens.clone(), stream)?;
            append_paged_kv_cache(&mut cache, &k, &v, &on_gpu.placed(stream)?, place.stream())
        }
        None => append_paged_kv_cache(&mut cache, &k, &v, &Placed::on_host(tokens)?, place.stream()),
    }
}

/// A layer's attention, by a plan: its results' first numbers, a request a line.
fn attend(place: &Place, plan: &Plan<'_>, cache: &mut Cache, batch: &Batch) -> Result<()> {
    let shape = [plan.rows(), HEADS.0, HEAD_DIM];
    let q = place.memory(numbers(shape.iter().product(), 9));
    let mut o = place.memory(vec![bf16::ZERO; shape.iter().product::<i64>() as usize]);
    plan.run(
        &mut place.write(&mut o, &shape)?,
        None,
        &place.read(&q, &shape)?,
        &cache.tensors(place)?,
        &AttentionOptions::default(),
    )?;
    let (o, row) = (place.values(&o), (HEADS.0 * HEAD_DIM) as usize);
    println!("  {} queries of {} requests over {} keys", batch.rows(), batch.requests(), batch.keys());
    println!("  the last query's first results: {:.3?}", &o[o.len() - row..][..4]);
    Ok(())
}

fn print(table: &PageTable) {
    for request in 0..table.requests() {
        let (pages, length) = (table.pages(request).unwrap_or_default(), table.length(request).unwrap_or(0));
        println!("  request {request}: {length:2} tokens in pages {pages:?}");
    }
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let runtime = FlashInferRuntime::initialize(RuntimeConfig::default())?;
    let gpu = runtime.gpu_available();
    println!("{}", if gpu { "on cuda:0" } else { "there is no GPU: on the host reference, in f64" });
    let place = Place { stream: if gpu { Some(CudaContext::new(0)?.new_stream()?) } else { None } };
    let zeros = || place.memory(vec![bf16::ZERO; (PAGES * PAGE_SIZE * HEADS.1 * HEAD_DIM) as usize]);
    let mut cache = Cache { k: zeros(), v: zeros() };

    // The prefix, 8 tokens that fill two pages, is computed once, for the first request.
    let mut table = PageTable::new(PAGE_SIZE, PAGES, LONGEST)?;
    table.push(&[3, 7], 0)?;
    append(&place, &mut cache, &table.append(&[8])?, 1)?;
    // Two more requests go on from it. Each has pages of its own behind it, since nobody writes to a page that is shared.
    table.push(&[3, 7, 11], 8)?;
    table.push(&[3, 7, 0, 5], 8)?;
    table.extend(0, &[12])?;
    println!("three requests that share their first two pages:");
    print(&table);

    println!("prefill of 2, 3 and 5 tokens behind the prefix:");
    let tokens = table.append(&[2, 3, 5])?;
    append(&place, &mut cache, &tokens, 3)?;
    let prefill = AttentionSpec::paged(DType::BF16, HEADS, HEAD_DIM, PAGE_SIZE).causal(true).build()?;
    let mut workspace = place.workspace(prefill, Largest::new(3, 16))?;
    let batch = Batch::of_tokens(&tokens)?;
    let plan = workspace.plan(&batch)?;
    // A model runs this plan for each of its layers, each with a cache of its own.
    attend(&place, &plan, &mut cache, &batch)?;
    println!("  computed by {:?}", plan.backend());

    let decode = AttentionSpec::decode(DType::BF16, HEADS, HEAD_DIM, PAGE_SIZE).build()?;
    let mut workspace = place.workspace(decode, Largest::decode(3))?;
    for step in 0..2 {
        println!("decode, step {step}:");
        for request in 0..table.requests() {
            if table.missing_pages(request, 1) == Some(1) {
                table.extend(request, &[13 + request as i32])?;
            }
        }
        let tokens = table.append(&[1, 1, 1])?;
        append(&place, &mut cache, &tokens, 5 + 2 * step)?;
        print(&table);
        let batch = Batch::of_tokens(&tokens)?;
        let plan = workspace.plan(&batch)?;
        attend(&place, &plan, &mut cache, &batch)?;
    }
    Ok(())
}
