//! One step of a decoder for a paged batch: a layer's everything but matrix products and attention, and from logits to tokens.
//! On a GPU, or without one on the host reference, with the same calls. `cargo run --example 05_decode_step --features
//! cudarc,decoder`

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DeviceRepr};
use flashinfer_rs::kernels::activation::{ActivationOptions, silu_and_mul};
use flashinfer_rs::kernels::norm::{NormOptions, fused_add_rmsnorm, rmsnorm_in_place};
use flashinfer_rs::kernels::page::{KvLayout, PagedKvCache, append_paged_kv_cache};
use flashinfer_rs::kernels::rope::apply_rope_with_cos_sin_cache_inplace;
use flashinfer_rs::kernels::sampling::{FilterOrder, SamplingContext, SamplingOptions};
use flashinfer_rs::{
    CosSinCache, Element, FlashInferRuntime, OnDevice, PageTable, Philox, Placed, Result, RopeScaling, RuntimeConfig,
    Steering, Stream, TensorMut, TensorRef,
};
use half::bf16;

// Small, so that the host is done soon.
const HIDDEN: i64 = 512;
const INTERMEDIATE: i64 = 1024;
const Q_HEADS: i64 = 8;
const KV_HEADS: i64 = 2;
const HEAD_DIM: i64 = 64;
const VOCAB: i64 = 4000;
const PAGE_SIZE: i64 = 16;
const PAGES: i64 = 32;
const LONGEST: i64 = 512;

/// Where everything is: on a GPU's stream, or on the host.
struct Place {
    stream: Option<Arc<CudaStream>>,
}

enum Memory<T> {
    Host(Vec<T>),
    Gpu(CudaSlice<T>),
}

/// Data that steers kernels, with its copy on the GPU where there is one.
enum Steers<D> {
    Host(D),
    Gpu(OnDevice<D>),
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

    fn steers<D: Steering>(&self, data: D) -> Result<Steers<D>> {
        match &self.stream {
            Some(stream) => Ok(Steers::Gpu(OnDevice::new(data, stream)?)),
            None => Ok(Steers::Host(data)),
        }
    }

    fn placed<'a, D: Steering>(&'a self, data: &'a Steers<D>) -> Result<Placed<'a, D>> {
        match (data, &self.stream) {
            (Steers::Gpu(data), Some(stream)) => data.placed(stream),
            (Steers::Host(data), _) => Placed::on_host(data),
            (Steers::Gpu(_), None) => unreachable!("there is a stream where there is a GPU"),
        }
    }

    fn stream(&self) -> Stream<'_> {
        self.stream.as_deref().map_or(Stream::NULL, Stream::cudarc)
    }

    fn values<T: Element + DeviceRepr + Default>(&self, memory: &Memory<T>) -> Vec<T> {
        match (memory, &self.stream) {
            (Memory::Gpu(buffer), Some(stream)) => stream.clone_dtoh(buffer).expect("a copy from the GPU"),
            (Memory::Host(values), _) => values.clone(),
            (Memory::Gpu(_), None) => unreachable!("there is a stream where there is a GPU"),
        }
    }
}

/// Numbers in place of what a model's weights would make.
fn numbers(count: i64, seed: usize) -> Vec<bf16> {
    (0..count as usize).map(|i| bf16::from_f32(((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.5 - 1.0)).collect()
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let runtime = FlashInferRuntime::initialize(RuntimeConfig::default())?;
    let gpu = runtime.gpu_available();
    println!("{}", if gpu { "on cuda:0" } else { "there is no GPU: on the host reference, in f64" });
    let place = Place { stream: if gpu { Some(CudaContext::new(0)?.new_stream()?) } else { None } };
    let s = place.stream();

    // Three requests: two go on, by a token each, and one begins, with four.
    let mut table = PageTable::new(PAGE_SIZE, PAGES, LONGEST)?;
    table.push(&[4, 9], 17)?;
    table.push(&[21], 5)?;
    table.push(&[2], 0)?;
    let tokens = table.append(&[1, 1, 4])?;
    let (count, last) = (tokens.positions().len() as i64, [0, 1, 5]);
    println!("positions {:?} of requests {:?}", tokens.positions(), tokens.batch_indices());
    let tokens = place.steers(tokens)?;
    let angles = place.steers(CosSinCache::new(HEAD_DIM, LONGEST, 500_000.0, RopeScaling::None)?)?;
    let (tokens, angles) = (place.placed(&tokens)?, place.placed(&angles)?);

    let (rows, eps) = ([count, HIDDEN], NormOptions::default());
    let mut hidden = place.memory(numbers(count * HIDDEN, 1));
    let mut residual = place.memory(numbers(count * HIDDEN, 2));
    let (ones, head_ones) =
        (place.memory(vec![bf16::ONE; HIDDEN as usize]), place.memory(vec![bf16::ONE; HEAD_DIM as usize]));
    fused_add_rmsnorm(
        &mut place.write(&mut hidden, &rows)?,
        &mut place.write(&mut residual, &rows)?,
        &place.read(&ones, &[HIDDEN])?,
        &eps,
        s,
    )?;

    // Here a matrix product makes queries, keys and values of `hidden`.
    let (q_shape, kv_shape) = ([count, Q_HEADS, HEAD_DIM], [count, KV_HEADS, HEAD_DIM]);
    let mut q = place.memory(numbers(count * Q_HEADS * HEAD_DIM, 3));
    let mut k = place.memory(numbers(count * KV_HEADS * HEAD_DIM, 4));
    let v = place.memory(numbers(count * KV_HEADS * HEAD_DIM, 5));
    let head_weight = place.read(&head_ones, &[HEAD_DIM])?;
    rmsnorm_in_place(&mut place.write(&mut q, &q_shape)?, &head_weight, &eps, s)?;
    rmsnorm_in_place(&mut place.write(&mut k, &kv_shape)?, &head_weight, &eps, s)?;
    let (mut q_heads, mut k_heads) = (place.write(&mut q, &q_shape)?, place.write(&mut k, &kv_shape)?);
    apply_rope_with_cos_sin_cache_inplace(&mut q_heads, &mut k_heads, &angles, &tokens.positions(), false, s)?;

    let cache_shape = [PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM];
    let zeros = || place.memory(vec![bf16::ZERO; cache_shape.iter().product::<i64>() as usize]);
    let (mut k_cache, mut v_cache) = (zeros(), zeros());
    let (k_pages, v_pages) = (place.write(&mut k_cache, &cache_shape)?, place.write(&mut v_cache, &cache_shape)?);
    let mut cache = PagedKvCache::new(k_pages, v_pages, KvLayout::Nhd)?;
    append_paged_kv_cache(&mut cache, &k_heads.as_ref(), &place.read(&v, &kv_shape)?, &tokens, s)?;

    // Here attention reads the cache, and matrix products make `gate_up` of what it answers.
    let gate_up = place.memory(numbers(count * 2 * INTERMEDIATE, 6));
    let mut activated = place.memory(vec![bf16::ZERO; (count * INTERMEDIATE) as usize]);
    silu_and_mul(
        &mut place.write(&mut activated, &[count, INTERMEDIATE])?,
        &place.read(&gate_up, &[count, 2 * INTERMEDIATE])?,
        &ActivationOptions::default(),
        s,
    )?;

    // Here matrix products make logits of each request's last token. One row is spoiled on purpose.
    let requests = last.len() as i64;
    let logits = numbers(requests * VOCAB, 7).iter().map(|x| x.to_f32() * 6.0).collect::<Vec<_>>();
    let mut logits: Memory<f32> = place.memory(logits);
    if let Memory::Host(values) = &mut logits {
        values[VOCAB as usize] = f32::NAN;
    } else if let (Memory::Gpu(buffer), Some(stream)) = (&mut logits, &place.stream) {
        stream.memcpy_htod(&[f32::NAN], &mut buffer.slice_mut(VOCAB as usize..=VOCAB as usize))?;
    }
    let mut next = place.memory(vec![0i32; last.len()]);
    let mut context = match &place.stream {
        Some(stream) => SamplingContext::new(stream, last.len())?,
        None => SamplingContext::on_host(),
    };
    let options = SamplingOptions::default().with_filter_order(FilterOrder::Joint);
    context.sampler()?.top_k_top_p_sampling_from_logits(
        &mut place.write(&mut next, &[requests])?,
        &mut place.write(&mut logits, &[requests, VOCAB])?,
        50,
        0.9,
        &mut Philox::new(42),
        &options,
    )?;
    println!("tokens {:?}", place.values(&next));
    for (request, status) in context.statuses(last.len())?.iter().enumerate() {
        println!("request {request}: {}", if status.is_valid() { "drawn" } else { "its logits were no numbers" });
    }
    println!("activated {:.3?} …", &place.values(&activated)[..4]);
    Ok(())
}
