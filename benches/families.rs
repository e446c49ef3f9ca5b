//! Every family's kernels called from Rust; benches/c/families.c is the same from C, and says what the requests are.
//! `cargo xtask bench --families` starts both, as `families [--bench] ARM`.

use std::cell::OnceCell;
use std::ffi::CString;
use std::hint::black_box;
use std::process::ExitCode;
use std::sync::Arc;

use cudarc::driver::sys::{CUfunction, CUstream};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtrMut, result};
use flashinfer_rs::kernels::activation::{ActivationOptions, silu_and_mul};
use flashinfer_rs::kernels::page::{KvLayout, PagedKvCache, append_paged_kv_cache};
use flashinfer_rs::kernels::quantization::{BitOrder, packbits};
use flashinfer_rs::kernels::rope::{
    RopeAppendTensors, RopeQuantizeOptions, apply_rope_with_cos_sin_cache_inplace, rope_quantize_append_paged_kv_cache,
};
use flashinfer_rs::kernels::sampling::{
    FilterOrder, SamplingContext, SamplingOptions, softmax, top_k_top_p_sampling_from_probs,
};
use flashinfer_rs::kernels::topk::radix_topk;
use flashinfer_rs::{
    CosSinCache, DType, FlashInferRuntime, GraphBuffers, GraphMut, LaunchGraph, OnDevice, PageTable, Philox, Positions,
    RopeScaling, RuntimeConfig, Stream, TensorMut, TensorRef, Tokens,
};
use half::bf16;

#[path = "support/arm.rs"]
mod arm;

use arm::{Result, Timing, Uniform, filled, zeros};

const Q_HEADS: i64 = 32;
const KV_HEADS: i64 = 8;
const HEAD: i64 = 128;
const POSITIONS: i64 = 8192;
const PAGE_SIZE: i64 = 16;
const REQUESTS: i64 = 32;

/// When the tensors of a call are made of cudarc's buffers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Arm {
    /// Once, before the calls.
    Tensors,
    /// Anew for each.
    Safe,
}

fn main() -> ExitCode {
    arm::serve(Bench::start, Bench::answer)
}

struct Bench {
    arm: Arm,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    /// In (-0.15, 0.15), which makes heads of 128 about unit vectors.
    heads: CudaSlice<bf16>,
    /// About normal.
    numbers: CudaSlice<f32>,
    /// Of 0 and 1.
    bits: CudaSlice<u8>,
    /// Distributions, of so many tokens each, from the first time that they are asked for.
    probs: OnceCell<(i64, CudaSlice<f32>)>,
    guard: OnceCell<CUfunction>,
}

/// What buffers are filled from: making as many random numbers on the host would take longer than measuring.
const NOISE: usize = 16 << 20;

impl Bench {
    fn start(arguments: &[String]) -> Result<Self> {
        let arm = match arguments {
            [name] if name == "tensors" => Arm::Tensors,
            [name] if name == "safe" => Arm::Safe,
            _ => return Err("expected: families ARM, which is tensors or safe".into()),
        };
        // Before cudarc, which panics without a driver.
        if FlashInferRuntime::initialize(RuntimeConfig::default())?.device_count()? == 0 {
            return Err("the driver lists no GPU".into());
        }
        let context = CudaContext::new(0)?;
        // SAFETY: here every buffer is made, used and dropped on one stream.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream()?;
        let mut random = Uniform::new();
        let heads: Vec<_> = (0..NOISE / 2).map(|_| bf16::from_f32(0.15 * (2.0 * random.next() - 1.0))).collect();
        let bits: Vec<_> = (0..NOISE).map(|_| u8::from(random.next() < 0.5)).collect();
        // The sum of twelve that are uniform has variance 1.
        let numbers: Vec<_> = (0..NOISE / 4).map(|_| (0..12).map(|_| random.next()).sum::<f32>() - 6.0).collect();
        let (heads, bits) = (stream.clone_htod(&heads)?, stream.clone_htod(&bits)?);
        let numbers = stream.clone_htod(&numbers)?;
        let (probs, guard) = (OnceCell::new(), OnceCell::new());
        Ok(Self { arm, context, stream, heads, numbers, bits, probs, guard })
    }

    /// Nothing where this arm does not have the case.
    fn answer(&self, request: &str) -> Result<Option<f64>> {
        let value = self.request(request)?;
        // Gives the memory of the buffers, which were dropped, back to the other arms.
        self.stream.synchronize()?;
        Ok(value)
    }

    fn request(&self, request: &str) -> Result<Option<f64>> {
        let (words, numbers) = arm::parse(request);
        let numbers = numbers.ok_or_else(|| format!("`{request}` has a number that is none, or not positive"))?;
        let &[how @ ("host" | "gpu"), case] = &words[..] else {
            return Err(format!("`{request}` is no request").into());
        };
        let count = if how == "host" { 1 } else { 2 };
        let (numbers, last) = numbers.split_at(numbers.len().saturating_sub(count));
        let how = match (how, last) {
            ("host", &[batch]) => How::Host { batch: batch as usize },
            ("gpu", &[sets, rounds]) => How::Gpu { sets: sets as usize, rounds: rounds as usize },
            _ => return Err(format!("`{request}` is no request: BATCH, or SETS ROUNDS, is missing").into()),
        };
        match (case, numbers) {
            ("silu_and_mul", &[rows, d]) => self.measure(&SiluAndMul { rows, d }, how),
            ("rope", &[tokens]) => self.measure(&Rope { tokens }, how),
            ("append", &[tokens]) => self.measure(&Append { tokens }, how),
            ("rope_append", &[tokens]) => self.measure(&RopeAppend { tokens }, how),
            ("packbits", &[elements]) => self.measure(&Packbits { elements }, how),
            ("softmax", &[rows, vocab]) => self.measure(&Softmax { rows, vocab }, how),
            ("sample", &[rows, vocab]) => self.measure(&Sample { rows, vocab }, how),
            ("sample_guarded", &[rows, vocab]) => self.measure(&SampleGuarded { rows, vocab }, how),
            ("guard", &[rows, vocab]) => self.measure(&Guard::new(self, rows, vocab)?, how),
            ("topk", &[rows, length, k]) => self.measure(&Topk { rows, length, k }, how),
            // The limits, and what others alone have.
            _ => Ok(None),
        }
    }

    fn measure<F: Family>(&self, family: &F, how: How) -> Result<Option<f64>> {
        let once = self.arm == Arm::Tensors;
        let mut shared = family.shared(self)?;
        match how {
            How::Host { batch } => {
                let mut set = family.set(self)?;
                let mut launches = |count| family.call(&self.stream, &mut set, &mut shared, (count, once));
                Ok(Some(arm::time(&self.stream, Timing::host(batch), &mut launches)? / batch as f64))
            }
            // How tensors are made plays no part there.
            How::Gpu { .. } if !once => Ok(None),
            How::Gpu { sets, rounds } => {
                let mut all = (0..sets).map(|_| family.set(self)).collect::<Result<Vec<_>>>()?;
                // The kernel must have been loaded before it is captured.
                family.call(&self.stream, &mut all[0], &mut shared, (1, once))?;
                self.stream.synchronize()?;
                let mut graph = LaunchGraph::new(&self.stream, (all, shared))?.with_pdl(false);
                graph.capture(|on, (mut sets, mut shared)| {
                    let count = sets.len();
                    (0..count * rounds).try_for_each(|i| family.captured(&mut sets[i % count], &mut shared, on))
                })?;
                graph.launch()?;
                self.stream.synchronize()?;
                arm::time_gpu(&self.context, &self.stream, graph, sets * rounds).map(Some)
            }
        }
    }
}

/// What is measured.
#[derive(Clone, Copy)]
enum How {
    /// Host time, of batches of so many calls.
    Host { batch: usize },
    /// GPU time, of a graph with so many sets of tensors, each of them so often.
    Gpu { sets: usize, rounds: usize },
}

/// A case of a family: its tensors, and the call of it.
trait Family {
    /// The buffers of one call.
    type Set: GraphBuffers;
    /// What all calls share.
    type Shared: GraphBuffers;

    fn set(&self, bench: &Bench) -> Result<Self::Set>;
    fn shared(&self, bench: &Bench) -> Result<Self::Shared>;

    /// So many calls, of tensors that are made once or anew for each.
    fn call(
        &self,
        stream: &CudaStream,
        set: &mut Self::Set,
        shared: &mut Self::Shared,
        count: (usize, bool),
    ) -> flashinfer_rs::Result<()>;

    /// A call in a capture.
    fn captured<'a>(
        &self,
        set: &mut <Self::Set as GraphBuffers>::Captured<'a>,
        shared: &mut <Self::Shared as GraphBuffers>::Captured<'a>,
        on: Stream<'_>,
    ) -> flashinfer_rs::Result<()>;
}

/// Calls as a user writes them; `black_box` keeps the loop around one from doing a part of it beforehand.
macro_rules! repeat {
    ($count:expr, { $($make:stmt;)+ } $call:expr) => {{
        let (count, once): (usize, bool) = $count;
        if once {
            $($make)+
            for _ in 0..count {
                $call?;
            }
        } else {
            for _ in 0..count {
                $($make)+
                $call?;
            }
        }
        Ok(())
    }};
}

// ---- activation ----

struct SiluAndMul {
    rows: i64,
    d: i64,
}

impl Family for SiluAndMul {
    /// `out`, `input`
    type Set = (CudaSlice<bf16>, CudaSlice<bf16>);
    type Shared = ();

    fn set(&self, bench: &Bench) -> Result<Self::Set> {
        let (out, input) = ([self.rows, self.d], [self.rows, 2 * self.d]);
        Ok((zeros(&bench.stream, &out)?, filled(&bench.stream, &bench.heads, &input)?))
    }

    fn shared(&self, _bench: &Bench) -> Result<()> {
        Ok(())
    }

    fn call(
        &self,
        stream: &CudaStream,
        (out, input): &mut Self::Set,
        _shared: &mut (),
        count: (usize, bool),
    ) -> flashinfer_rs::Result<()> {
        let (options, on) = (ActivationOptions::default(), Stream::cudarc(stream));
        repeat!(count, {
            let mut out = TensorMut::from_cudarc(stream, black_box(&mut *out), &[self.rows, self.d])?;
            let input = TensorRef::from_cudarc(stream, black_box(&*input), &[self.rows, 2 * self.d])?;
        } silu_and_mul(black_box(&mut out), black_box(&input), &options, on))
    }

    fn captured<'a>(
        &self,
        (out, input): &mut (GraphMut<'a, bf16>, GraphMut<'a, bf16>),
        _shared: &mut (),
        on: Stream<'_>,
    ) -> flashinfer_rs::Result<()> {
        let mut out = out.write(&[self.rows, self.d])?;
        silu_and_mul(&mut out, &input.read(&[self.rows, 2 * self.d])?, &ActivationOptions::default(), on)
    }
}

// ---- rope ----

/// The table of cosines and sines of Llama 3, and where tokens are that lie all over it.
fn table_and_positions(bench: &Bench, tokens: i64) -> Result<(OnDevice<CosSinCache>, OnDevice<Positions>)> {
    let table = CosSinCache::new(HEAD, POSITIONS, 5e5, RopeScaling::None)?;
    let positions: Vec<_> = (0..tokens).map(|i| i * 257 % POSITIONS).collect();
    let positions = Positions::new(&positions, POSITIONS)?;
    Ok((OnDevice::new(table, &bench.stream)?, OnDevice::new(positions, &bench.stream)?))
}

fn q_shape(tokens: i64) -> [i64; 3] {
    [tokens, Q_HEADS, HEAD]
}

fn k_shape(tokens: i64) -> [i64; 3] {
    [tokens, KV_HEADS, HEAD]
}

/// In place.
struct Rope {
    tokens: i64,
}

impl Family for Rope {
    /// `q`, `k`
    type Set = (CudaSlice<bf16>, CudaSlice<bf16>);
    type Shared = (OnDevice<CosSinCache>, OnDevice<Positions>);

    fn set(&self, bench: &Bench) -> Result<Self::Set> {
        let heads = |shape: [i64; 3]| filled(&bench.stream, &bench.heads, &shape);
        Ok((heads(q_shape(self.tokens))?, heads(k_shape(self.tokens))?))
    }

    fn shared(&self, bench: &Bench) -> Result<Self::Shared> {
        table_and_positions(bench, self.tokens)
    }

    fn call(
        &self,
        stream: &CudaStream,
        (q, k): &mut Self::Set,
        (table, positions): &mut Self::Shared,
        count: (usize, bool),
    ) -> flashinfer_rs::Result<()> {
        let on = Stream::cudarc(stream);
        repeat!(count, {
            let mut q = TensorMut::from_cudarc(stream, black_box(&mut *q), &q_shape(self.tokens))?;
            let mut k = TensorMut::from_cudarc(stream, black_box(&mut *k), &k_shape(self.tokens))?;
            let (table, positions) = (table.placed(stream)?, positions.placed(stream)?);
        } apply_rope_with_cos_sin_cache_inplace(black_box(&mut q), black_box(&mut k), &table, &positions, false, on))
    }

    fn captured<'a>(
        &self,
        (q, k): &mut <Self::Set as GraphBuffers>::Captured<'a>,
        (table, positions): &mut <Self::Shared as GraphBuffers>::Captured<'a>,
        on: Stream<'_>,
    ) -> flashinfer_rs::Result<()> {
        let (mut q, mut k) = (q.write(&q_shape(self.tokens))?, k.write(&k_shape(self.tokens))?);
        apply_rope_with_cos_sin_cache_inplace(&mut q, &mut k, &table.placed()?, &positions.placed()?, false, on)
    }
}

// ---- page ----

/// Where a step's tokens go: requests that have none yet, whose pages lie one after the other.
fn tokens(bench: &Bench, tokens: i64) -> Result<OnDevice<Tokens>> {
    let each = tokens / REQUESTS;
    if each * REQUESTS != tokens {
        return Err(format!("{tokens} tokens are not some for each of {REQUESTS} requests").into());
    }
    let pages = pages(tokens) / REQUESTS;
    let mut table = PageTable::new(PAGE_SIZE, REQUESTS * pages, POSITIONS)?;
    for request in 0..REQUESTS {
        let pages: Vec<_> = (request * pages..(request + 1) * pages).map(|page| page as i32).collect();
        table.push(&pages, 0)?;
    }
    Ok(OnDevice::new(table.append(&[each; REQUESTS as usize])?, &bench.stream)?)
}

/// Those of all requests.
fn pages(tokens: i64) -> i64 {
    REQUESTS * ((tokens / REQUESTS + PAGE_SIZE - 1) / PAGE_SIZE)
}

fn cache_shape(tokens: i64) -> [i64; 4] {
    [pages(tokens), PAGE_SIZE, KV_HEADS, HEAD]
}

struct Append {
    tokens: i64,
}

impl Family for Append {
    /// `append_key`, `append_value`, and both caches
    type Set = (CudaSlice<bf16>, CudaSlice<bf16>, CudaSlice<bf16>, CudaSlice<bf16>);
    type Shared = OnDevice<Tokens>;

    fn set(&self, bench: &Bench) -> Result<Self::Set> {
        let heads = || filled(&bench.stream, &bench.heads, &k_shape(self.tokens));
        let cache = || zeros(&bench.stream, &cache_shape(self.tokens));
        Ok((heads()?, heads()?, cache()?, cache()?))
    }

    fn shared(&self, bench: &Bench) -> Result<Self::Shared> {
        tokens(bench, self.tokens)
    }

    fn call(
        &self,
        stream: &CudaStream,
        (key, value, k_cache, v_cache): &mut Self::Set,
        tokens: &mut Self::Shared,
        count: (usize, bool),
    ) -> flashinfer_rs::Result<()> {
        let (shape, on) = (cache_shape(self.tokens), Stream::cudarc(stream));
        repeat!(count, {
            let k_cache = TensorMut::from_cudarc(stream, black_box(&mut *k_cache), &shape)?;
            let v_cache = TensorMut::from_cudarc(stream, black_box(&mut *v_cache), &shape)?;
            let mut cache = PagedKvCache::new(k_cache, v_cache, KvLayout::Nhd)?;
            let key = TensorRef::from_cudarc(stream, black_box(&*key), &k_shape(self.tokens))?;
            let value = TensorRef::from_cudarc(stream, black_box(&*value), &k_shape(self.tokens))?;
            let tokens = tokens.placed(stream)?;
        } append_paged_kv_cache(black_box(&mut cache), black_box(&key), black_box(&value), &tokens, on))
    }

    fn captured<'a>(
        &self,
        (key, value, k_cache, v_cache): &mut <Self::Set as GraphBuffers>::Captured<'a>,
        tokens: &mut <Self::Shared as GraphBuffers>::Captured<'a>,
        on: Stream<'_>,
    ) -> flashinfer_rs::Result<()> {
        let (heads, shape) = (k_shape(self.tokens), cache_shape(self.tokens));
        let mut cache = PagedKvCache::new(k_cache.write(&shape)?, v_cache.write(&shape)?, KvLayout::Nhd)?;
        append_paged_kv_cache(&mut cache, &key.read(&heads)?, &value.read(&heads)?, &tokens.placed()?, on)
    }
}

/// Rope, quantization and appending in one; heads are turned whole.
struct RopeAppend {
    tokens: i64,
}

impl Family for RopeAppend {
    /// `q_rope_in`, `k_rope_in`, `v_in`, `q_rope_out`, and both caches
    type Set = (CudaSlice<bf16>, CudaSlice<bf16>, CudaSlice<bf16>, CudaSlice<u8>, CudaSlice<u8>, CudaSlice<u8>);
    type Shared = (OnDevice<CosSinCache>, OnDevice<Positions>, OnDevice<Tokens>);

    fn set(&self, bench: &Bench) -> Result<Self::Set> {
        let heads = |shape: [i64; 3]| filled(&bench.stream, &bench.heads, &shape);
        let cache = || zeros(&bench.stream, &cache_shape(self.tokens));
        let (q, k) = (q_shape(self.tokens), k_shape(self.tokens));
        Ok((heads(q)?, heads(k)?, heads(k)?, zeros(&bench.stream, &q)?, cache()?, cache()?))
    }

    fn shared(&self, bench: &Bench) -> Result<Self::Shared> {
        let (table, positions) = table_and_positions(bench, self.tokens)?;
        Ok((table, positions, tokens(bench, self.tokens)?))
    }

    fn call(
        &self,
        stream: &CudaStream,
        (q, k, v, q_out, k_cache, v_cache): &mut Self::Set,
        (table, positions, tokens): &mut Self::Shared,
        count: (usize, bool),
    ) -> flashinfer_rs::Result<()> {
        let (shape, options, on) = (cache_shape(self.tokens), RopeQuantizeOptions::default(), Stream::cudarc(stream));
        let (q_shape, k_shape) = (q_shape(self.tokens), k_shape(self.tokens));
        repeat!(count, {
            let k_cache = TensorMut::from_cudarc_bytes(stream, black_box(&mut *k_cache), DType::F8E4M3, &shape)?;
            let v_cache = TensorMut::from_cudarc_bytes(stream, black_box(&mut *v_cache), DType::F8E4M3, &shape)?;
            let mut cache = PagedKvCache::new(k_cache, v_cache, KvLayout::Nhd)?;
            let mut tensors = RopeAppendTensors {
                q_rope_in: TensorRef::from_cudarc(stream, black_box(&*q), &q_shape)?,
                k_rope_in: TensorRef::from_cudarc(stream, black_box(&*k), &k_shape)?,
                q_nope_in: None,
                k_nope_in: None,
                q_rope_out: TensorMut::from_cudarc_bytes(stream, black_box(&mut *q_out), DType::F8E4M3, &q_shape)?,
                q_nope_out: None,
            };
            let v = TensorRef::from_cudarc(stream, black_box(&*v), &k_shape)?;
            let (table, positions) = (table.placed(stream)?, positions.placed(stream)?);
            let tokens = tokens.placed(stream)?;
        } rope_quantize_append_paged_kv_cache(
            black_box(&mut cache),
            black_box(&mut tensors),
            black_box(&v),
            &tokens,
            (&table, &positions),
            &options,
            on,
        ))
    }

    fn captured<'a>(
        &self,
        (q, k, v, q_out, k_cache, v_cache): &mut <Self::Set as GraphBuffers>::Captured<'a>,
        (table, positions, tokens): &mut <Self::Shared as GraphBuffers>::Captured<'a>,
        on: Stream<'_>,
    ) -> flashinfer_rs::Result<()> {
        let (q_shape, k_shape, shape) = (q_shape(self.tokens), k_shape(self.tokens), cache_shape(self.tokens));
        let k_cache = k_cache.write_bytes(DType::F8E4M3, &shape)?;
        let mut cache = PagedKvCache::new(k_cache, v_cache.write_bytes(DType::F8E4M3, &shape)?, KvLayout::Nhd)?;
        let mut tensors = RopeAppendTensors {
            q_rope_in: q.read(&q_shape)?,
            k_rope_in: k.read(&k_shape)?,
            q_nope_in: None,
            k_nope_in: None,
            q_rope_out: q_out.write_bytes(DType::F8E4M3, &q_shape)?,
            q_nope_out: None,
        };
        let (v, tokens) = (v.read(&k_shape)?, tokens.placed()?);
        let by = (&table.placed()?, &positions.placed()?);
        rope_quantize_append_paged_kv_cache(
            &mut cache,
            &mut tensors,
            &v,
            &tokens,
            by,
            &RopeQuantizeOptions::default(),
            on,
        )
    }
}

// ---- quantization ----

struct Packbits {
    elements: i64,
}

impl Packbits {
    fn bytes(&self) -> i64 {
        (self.elements + 7) / 8
    }
}

impl Family for Packbits {
    /// `y`, `x`
    type Set = (CudaSlice<u8>, CudaSlice<u8>);
    type Shared = ();

    fn set(&self, bench: &Bench) -> Result<Self::Set> {
        Ok((zeros(&bench.stream, &[self.bytes()])?, filled(&bench.stream, &bench.bits, &[self.elements])?))
    }

    fn shared(&self, _bench: &Bench) -> Result<()> {
        Ok(())
    }

    fn call(
        &self,
        stream: &CudaStream,
        (y, x): &mut Self::Set,
        _shared: &mut (),
        count: (usize, bool),
    ) -> flashinfer_rs::Result<()> {
        let on = Stream::cudarc(stream);
        repeat!(count, {
            let mut y = TensorMut::from_cudarc(stream, black_box(&mut *y), &[self.bytes()])?;
            let x = TensorRef::from_cudarc(stream, black_box(&*x), &[self.elements])?;
        } packbits(black_box(&mut y), black_box(&x), BitOrder::Big, on))
    }

    fn captured<'a>(
        &self,
        (y, x): &mut <Self::Set as GraphBuffers>::Captured<'a>,
        _shared: &mut (),
        on: Stream<'_>,
    ) -> flashinfer_rs::Result<()> {
        packbits(&mut y.write(&[self.bytes()])?, &x.read(&[self.elements])?, BitOrder::Big, on)
    }
}

// ---- sampling ----

impl Bench {
    /// A buffer of distributions that are as steep as a language model's: some 16 tokens have three fifths of what there is. The
    /// same in every arm, bit by bit, since how often a sampling kernel looks at a row depends on it.
    fn distributions(&self, [rows, vocab]: [i64; 2]) -> Result<CudaSlice<f32>> {
        let (tokens, probs) = match self.probs.get() {
            Some(probs) => probs,
            None => {
                let mut random = Uniform::new();
                let mut all = Vec::with_capacity((rows * vocab) as usize);
                for _ in 0..rows {
                    let mut weight = || (0..13).fold(f64::from(random.next()), |weight, _| weight * weight) + 1e-9;
                    let weights: Vec<_> = (0..vocab).map(|_| weight()).collect();
                    let sum = weights.iter().fold(0.0, |sum, weight| sum + weight);
                    all.extend(weights.iter().map(|weight| (weight / sum) as f32));
                }
                let probs = self.stream.clone_htod(&all)?;
                self.probs.get_or_init(|| (vocab, probs))
            }
        };
        if *tokens != vocab || probs.len() as i64 != rows * vocab {
            return Err(
                format!("{rows} rows of {vocab} tokens: this process has {} numbers of {tokens}", probs.len()).into()
            );
        }
        Ok(filled(&self.stream, probs, &[rows, vocab])?)
    }
}

/// As FlashInfer's Python has it.
const WORKSPACE: i64 = 1 << 20;

struct Softmax {
    rows: i64,
    vocab: i64,
}

impl Family for Softmax {
    /// `output`, `logits`, `workspace`
    type Set = (CudaSlice<f32>, CudaSlice<f32>, CudaSlice<u8>);
    type Shared = ();

    fn set(&self, bench: &Bench) -> Result<Self::Set> {
        let (shape, stream) = ([self.rows, self.vocab], &bench.stream);
        Ok((zeros(stream, &shape)?, filled(stream, &bench.numbers, &shape)?, zeros(stream, &[WORKSPACE])?))
    }

    fn shared(&self, _bench: &Bench) -> Result<()> {
        Ok(())
    }

    fn call(
        &self,
        stream: &CudaStream,
        (output, logits, workspace): &mut Self::Set,
        _shared: &mut (),
        count: (usize, bool),
    ) -> flashinfer_rs::Result<()> {
        let (shape, options, on) = ([self.rows, self.vocab], SamplingOptions::default(), Stream::cudarc(stream));
        repeat!(count, {
            let mut output = TensorMut::from_cudarc(stream, black_box(&mut *output), &shape)?;
            let logits = TensorRef::from_cudarc(stream, black_box(&*logits), &shape)?;
            let mut workspace = TensorMut::from_cudarc(stream, black_box(&mut *workspace), &[WORKSPACE])?;
        } softmax(black_box(&mut output), black_box(&logits), 1.0, black_box(&mut workspace), &options, on))
    }

    fn captured<'a>(
        &self,
        (output, logits, workspace): &mut <Self::Set as GraphBuffers>::Captured<'a>,
        _shared: &mut (),
        on: Stream<'_>,
    ) -> flashinfer_rs::Result<()> {
        let (shape, options) = ([self.rows, self.vocab], SamplingOptions::default());
        let (mut output, mut workspace) = (output.write(&shape)?, workspace.write(&[WORKSPACE])?);
        softmax(&mut output, &logits.read(&shape)?, 1.0, &mut workspace, &options, on)
    }
}

const TOP_K: i32 = 50;
const TOP_P: f64 = 0.9;

/// The same random numbers in every call.
fn philox() -> Philox {
    Philox::new(42).frozen()
}

/// Without the guard.
struct Sample {
    rows: i64,
    vocab: i64,
}

impl Family for Sample {
    /// `output`, `probs`
    type Set = (CudaSlice<i32>, CudaSlice<f32>);
    type Shared = ();

    fn set(&self, bench: &Bench) -> Result<Self::Set> {
        Ok((zeros(&bench.stream, &[self.rows])?, bench.distributions([self.rows, self.vocab])?))
    }

    fn shared(&self, _bench: &Bench) -> Result<()> {
        Ok(())
    }

    fn call(
        &self,
        stream: &CudaStream,
        (output, probs): &mut Self::Set,
        _shared: &mut (),
        count: (usize, bool),
    ) -> flashinfer_rs::Result<()> {
        let (options, on) = (SamplingOptions::default(), Stream::cudarc(stream));
        repeat!(count, {
            let mut output = TensorMut::from_cudarc(stream, black_box(&mut *output), &[self.rows])?;
            let probs = TensorRef::from_cudarc(stream, black_box(&*probs), &[self.rows, self.vocab])?;
        } {
            let (output, probs) = (black_box(&mut output), black_box(&probs));
            // SAFETY: the rows are distributions, which nothing writes.
            unsafe { top_k_top_p_sampling_from_probs(output, probs, TOP_K, TOP_P, &mut philox(), &options, on) }
        })
    }

    fn captured<'a>(
        &self,
        (output, probs): &mut <Self::Set as GraphBuffers>::Captured<'a>,
        _shared: &mut (),
        on: Stream<'_>,
    ) -> flashinfer_rs::Result<()> {
        let (mut output, probs) = (output.write(&[self.rows])?, probs.read(&[self.rows, self.vocab])?);
        let options = SamplingOptions::default();
        // SAFETY: as above.
        unsafe { top_k_top_p_sampling_from_probs(&mut output, &probs, TOP_K, TOP_P, &mut philox(), &options, on) }
    }
}

/// With the guard ahead.
struct SampleGuarded {
    rows: i64,
    vocab: i64,
}

impl Family for SampleGuarded {
    /// `output`, `probs`
    type Set = (CudaSlice<i32>, CudaSlice<f32>);
    type Shared = SamplingContext;

    fn set(&self, bench: &Bench) -> Result<Self::Set> {
        Sample { rows: self.rows, vocab: self.vocab }.set(bench)
    }

    fn shared(&self, bench: &Bench) -> Result<Self::Shared> {
        Ok(SamplingContext::new(&bench.stream, self.rows as usize)?)
    }

    fn call(
        &self,
        stream: &CudaStream,
        (output, probs): &mut Self::Set,
        context: &mut SamplingContext,
        count: (usize, bool),
    ) -> flashinfer_rs::Result<()> {
        let options = SamplingOptions::default().with_filter_order(FilterOrder::Joint);
        repeat!(count, {
            let mut output = TensorMut::from_cudarc(stream, black_box(&mut *output), &[self.rows])?;
            let mut probs = TensorMut::from_cudarc(stream, black_box(&mut *probs), &[self.rows, self.vocab])?;
            let mut sampler = context.sampler()?;
        } {
            let (output, probs) = (black_box(&mut output), black_box(&mut probs));
            sampler.top_k_top_p_sampling_from_probs(output, probs, TOP_K, TOP_P, &mut philox(), &options)
        })
    }

    fn captured<'a>(
        &self,
        (output, probs): &mut <Self::Set as GraphBuffers>::Captured<'a>,
        context: &mut <SamplingContext as GraphBuffers>::Captured<'a>,
        on: Stream<'_>,
    ) -> flashinfer_rs::Result<()> {
        let (mut output, mut probs) = (output.write(&[self.rows])?, probs.write(&[self.rows, self.vocab])?);
        let options = SamplingOptions::default().with_filter_order(FilterOrder::Joint);
        let mut sampler = context.sampler(on)?;
        sampler.top_k_top_p_sampling_from_probs(&mut output, &mut probs, TOP_K, TOP_P, &mut philox(), &options)
    }
}

/// The guard by itself: the kernel that the crate carries, launched as the crate does.
struct Guard {
    rows: i64,
    vocab: i64,
    kernel: CUfunction,
}

/// The kernels of the crate's own.
const GLUE: &str = include_str!("../src/glue/rows.ptx");
/// The batch that is measured, and how the crate divides its rows: units of 16 bytes of a block, and blocks of a row. A test
/// in src/glue has these numbers too.
const GUARDED: [i64; 2] = [32, 128_256];
const CHUNK: u32 = 2048;
const CHUNKS: u32 = 16;
const THREADS: u32 = 256;

impl Guard {
    fn new(bench: &Bench, rows: i64, vocab: i64) -> Result<Self> {
        if [rows, vocab] != GUARDED {
            return Err(format!("the guard is measured with {GUARDED:?}, not with [{rows}, {vocab}]").into());
        }
        let kernel = match bench.guard.get() {
            Some(kernel) => *kernel,
            None => {
                let text = CString::new(GLUE)?;
                // SAFETY: PTX that ends with a zero byte; the module is never unloaded.
                let kernel = unsafe {
                    let module = result::module::load_data(text.as_ptr().cast())?;
                    result::module::get_function(module, c"guard_rows".to_owned())?
                };
                *bench.guard.get_or_init(|| kernel)
            }
        };
        Ok(Self { rows, vocab, kernel })
    }

    /// # Safety
    /// The addresses must be those of buffers as in `Set` and `Shared`, which nothing else uses on another stream.
    unsafe fn launch(&self, on: CUstream, mut probs: u64, mut seen: u64, mut status: u64) -> flashinfer_rs::Result<()> {
        let (mut length, mut chunk, mut chunks) = (self.vocab as u32, CHUNK, CHUNKS);
        let mut arguments = [
            (&raw mut probs).cast(),
            (&raw mut length).cast(),
            (&raw mut chunk).cast(),
            (&raw mut chunks).cast(),
            (&raw mut seen).cast(),
            (&raw mut status).cast(),
        ];
        let blocks = self.rows as u32 * CHUNKS;
        // SAFETY: these are the arguments of rows.cu's kernel; the chunks cover a row; the rest is the caller's promise.
        unsafe { result::launch_kernel(self.kernel, (blocks, 1, 1), (THREADS, 1, 1), 0, on, &mut arguments) }
            .unwrap_or_else(|error| panic!("launching the guard: {error}"));
        Ok(())
    }
}

impl Family for Guard {
    /// `probs`
    type Set = CudaSlice<f32>;
    /// `seen`, a word of 64 bits for each row, and `status`
    type Shared = (CudaSlice<i64>, CudaSlice<i32>);

    fn set(&self, bench: &Bench) -> Result<Self::Set> {
        bench.distributions([self.rows, self.vocab])
    }

    fn shared(&self, bench: &Bench) -> Result<Self::Shared> {
        Ok((zeros(&bench.stream, &[self.rows])?, zeros(&bench.stream, &[self.rows])?))
    }

    fn call(
        &self,
        stream: &CudaStream,
        probs: &mut CudaSlice<f32>,
        (seen, status): &mut Self::Shared,
        (count, _): (usize, bool),
    ) -> flashinfer_rs::Result<()> {
        // The guards are of no use: nothing is tracked here.
        let (probs, _probs) = probs.device_ptr_mut(stream);
        let (seen, _seen) = seen.device_ptr_mut(stream);
        let (status, _status) = status.device_ptr_mut(stream);
        // SAFETY: the buffers are these, and used on this stream.
        (0..count).try_for_each(|_| unsafe { self.launch(stream.cu_stream(), probs, seen, status) })
    }

    fn captured<'a>(
        &self,
        probs: &mut GraphMut<'a, f32>,
        (seen, status): &mut <Self::Shared as GraphBuffers>::Captured<'a>,
        on: Stream<'_>,
    ) -> flashinfer_rs::Result<()> {
        let (probs, seen, status) = (probs.as_mut_ptr() as u64, seen.as_mut_ptr() as u64, status.as_mut_ptr() as u64);
        // SAFETY: the graph owns the buffers, and its launches follow one another.
        unsafe { self.launch(on.as_raw().cast(), probs, seen, status) }
    }
}

// ---- topk ----

struct Topk {
    rows: i64,
    length: i64,
    k: i64,
}

impl Family for Topk {
    /// `output_indices`, `output_values`, `input`
    type Set = (CudaSlice<i32>, CudaSlice<f32>, CudaSlice<f32>);
    type Shared = ();

    fn set(&self, bench: &Bench) -> Result<Self::Set> {
        let (found, input) = ([self.rows, self.k], [self.rows, self.length]);
        let stream = &bench.stream;
        Ok((zeros(stream, &found)?, zeros(stream, &found)?, filled(stream, &bench.numbers, &input)?))
    }

    fn shared(&self, _bench: &Bench) -> Result<()> {
        Ok(())
    }

    fn call(
        &self,
        stream: &CudaStream,
        (indices, values, input): &mut Self::Set,
        _shared: &mut (),
        count: (usize, bool),
    ) -> flashinfer_rs::Result<()> {
        let (found, on) = ([self.rows, self.k], Stream::cudarc(stream));
        repeat!(count, {
            let mut indices = TensorMut::from_cudarc(stream, black_box(&mut *indices), &found)?;
            let mut values = TensorMut::from_cudarc(stream, black_box(&mut *values), &found)?;
            let input = TensorRef::from_cudarc(stream, black_box(&*input), &[self.rows, self.length])?;
        } radix_topk(black_box(&mut indices), black_box(&mut values), black_box(&input), self.k, on))
    }

    fn captured<'a>(
        &self,
        (indices, values, input): &mut <Self::Set as GraphBuffers>::Captured<'a>,
        _shared: &mut (),
        on: Stream<'_>,
    ) -> flashinfer_rs::Result<()> {
        let found = [self.rows, self.k];
        let (mut indices, mut values) = (indices.write(&found)?, values.write(&found)?);
        radix_topk(&mut indices, &mut values, &input.read(&[self.rows, self.length])?, self.k, on)
    }
}
