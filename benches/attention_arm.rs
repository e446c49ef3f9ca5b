//! Attention planned and run from Rust; benches/c/attention.c is the same from C, and says what the requests are. `cargo xtask bench
//! --attention` starts both, as `attention_arm [--bench] ours`.
//!
//! Beside those of C there is `pages KIND BACKEND REQUESTS LENGTH LAYERS COUNT`: ns for a page of making a batch.

use std::cell::RefCell;
use std::hint::black_box;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaContext, CudaSlice, CudaStream};
use flashinfer_rs::attention::{
    AttentionOptions, AttentionSpec, Backend, Batch, GraphPlan, GraphRoom, Largest, Workspace,
};
use flashinfer_rs::kernels::page::{KvLayout, PagedKvCache};
use flashinfer_rs::{DType, FlashInferRuntime, LaunchGraph, RuntimeConfig, TensorMut, TensorRef};
use half::bf16;

#[path = "support/arm.rs"]
mod arm;

use arm::{Result, Timing, Uniform, filled, zeros};

const Q_HEADS: i64 = 32;
const KV_HEADS: i64 = 8;
const HEAD: i64 = 128;
const PAGE_SIZE: i64 = 16;

/// What is copied ahead of runs, so that all of them are queued before the first starts, in bytes.
const AHEAD: usize = 512 << 20;
/// Caches from here on are given back after each request, since every arm has its own; in elements.
const LARGE: usize = 9 << 29;
const TIMINGS: usize = 5;

fn main() -> ExitCode {
    arm::serve(Bench::start, Bench::answer)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Decode,
    Paged,
    Ragged,
}

/// A case.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Case {
    kind: Kind,
    backend: Backend,
    requests: i64,
    length: i64,
    layers: usize,
}

impl Case {
    fn spec(&self) -> flashinfer_rs::Result<AttentionSpec> {
        let heads = (Q_HEADS, KV_HEADS);
        let builder = match self.kind {
            Kind::Decode => AttentionSpec::decode(DType::BF16, heads, HEAD, PAGE_SIZE),
            Kind::Paged => AttentionSpec::paged(DType::BF16, heads, HEAD, PAGE_SIZE).causal(true),
            Kind::Ragged => AttentionSpec::ragged(DType::BF16, heads, (HEAD, HEAD)).causal(true),
        };
        builder.backend(self.backend).build()
    }

    /// Of each request.
    fn queries(&self) -> i64 {
        if self.kind == Kind::Decode { 1 } else { self.length }
    }

    fn rows(&self) -> i64 {
        self.requests * self.queries()
    }

    /// Of each request.
    fn pages(&self) -> i64 {
        (self.length + PAGE_SIZE - 1) / PAGE_SIZE
    }

    /// With the page that a graph keeps for requests that are missing.
    fn all_pages(&self) -> i64 {
        self.requests * self.pages() + 1
    }

    fn q_shape(&self) -> [i64; 3] {
        [self.rows(), Q_HEADS, HEAD]
    }

    fn cache_shape(&self) -> [i64; 4] {
        [self.all_pages(), PAGE_SIZE, KV_HEADS, HEAD]
    }

    fn ragged_shape(&self) -> [i64; 3] {
        [self.rows(), KV_HEADS, HEAD]
    }

    fn kv_elements(&self) -> i64 {
        match self.kind {
            Kind::Ragged => self.ragged_shape().iter().product(),
            _ => self.cache_shape().iter().product(),
        }
    }

    /// Pages lie one after the other.
    fn batch(&self, indices: &[i32]) -> flashinfer_rs::Result<Batch> {
        if self.kind == Kind::Ragged {
            let mut batch = Batch::ragged();
            (0..self.requests).try_for_each(|_| batch.push_ragged(self.queries(), self.length))?;
            return Ok(batch);
        }
        let mut batch = Batch::paged(PAGE_SIZE, self.all_pages())?;
        self.fill(&mut batch, indices)?;
        Ok(batch)
    }

    fn fill(&self, batch: &mut Batch, indices: &[i32]) -> flashinfer_rs::Result<()> {
        let mut each = indices.chunks(self.pages() as usize);
        each.try_for_each(|pages| batch.push(self.queries(), pages, self.length))
    }

    fn indices(&self) -> Vec<i32> {
        (0..(self.requests * self.pages()) as i32).collect()
    }
}

struct Bench {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    /// Of variance 1.
    noise: CudaSlice<bf16>,
    ahead: RefCell<(CudaSlice<u8>, CudaSlice<u8>)>,
    /// What the last request was of.
    kept: RefCell<Option<Setup>>,
}

/// The buffers of a case, and its workspace.
struct Setup {
    case: Case,
    q: CudaSlice<bf16>,
    o: CudaSlice<bf16>,
    /// For each layer.
    caches: Vec<(CudaSlice<bf16>, CudaSlice<bf16>)>,
    batch: Batch,
    workspace: Workspace,
}

/// What buffers are filled from: making as many random numbers on the host would take longer than measuring.
const NOISE: usize = 8 << 20;

impl Bench {
    fn start(arguments: &[String]) -> Result<Self> {
        if !matches!(arguments, [name] if name == "ours") {
            return Err("expected: attention_arm ours".into());
        }
        // Before cudarc, which panics without a driver.
        if FlashInferRuntime::initialize(RuntimeConfig::default())?.device_count()? == 0 {
            return Err("the driver lists no GPU".into());
        }
        let context = CudaContext::new(0)?;
        // SAFETY: here every buffer is made, used and dropped on one stream.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream()?;
        let mut random = Uniform::new();
        let noise: Vec<_> = (0..NOISE).map(|_| bf16::from_f32(1.7 * (2.0 * random.next() - 1.0))).collect();
        let noise = stream.clone_htod(&noise)?;
        let ahead = RefCell::new((stream.alloc_zeros(AHEAD)?, stream.alloc_zeros(AHEAD)?));
        Ok(Self { context, stream, noise, ahead, kept: RefCell::new(None) })
    }

    fn answer(&self, request: &str) -> Result<Option<f64>> {
        let (words, numbers) = arm::parse(request);
        let numbers = numbers.ok_or_else(|| format!("`{request}` has a number that is none, or not positive"))?;
        let (&[what, kind, backend], &[requests, length, layers, count]) = (&words[..], &numbers[..]) else {
            // A copy.
            return Ok(None);
        };
        let kind = match kind {
            "decode" => Kind::Decode,
            "paged" => Kind::Paged,
            "ragged" => Kind::Ragged,
            _ => return Err(format!("`{request}`: `{kind}` is no kind: expected decode, paged or ragged").into()),
        };
        let backend = match backend {
            "cores" => Backend::CudaCores,
            "fa2" => Backend::Fa2,
            "fa3" => Backend::Fa3,
            _ => return Err(format!("`{request}`: `{backend}` is no backend: expected cores, fa2 or fa3").into()),
        };
        let case = Case { kind, backend, requests, length, layers: layers as usize };
        let count = count as usize;
        if what == "pages" {
            return pages(&case, count).map(Some);
        }
        let mut kept = self.kept.borrow_mut();
        if kept.as_ref().is_none_or(|setup| setup.case != case) {
            // First the memory of what was.
            *kept = None;
            self.stream.synchronize()?;
            *kept = Some(self.setup(case)?);
        }
        let mut setup = kept.take().ok_or("there is no case")?;
        if what == "graph" {
            return self.graph(setup, count).map(Some);
        }
        let value = self.measure(what, &mut setup, count)?;
        let elements = setup.caches.iter().map(|(k, v)| k.len() + v.len()).sum::<usize>();
        *kept = (elements <= LARGE).then_some(setup);
        // Gives the memory of what was dropped back.
        self.stream.synchronize()?;
        Ok(value)
    }

    fn setup(&self, case: Case) -> Result<Setup> {
        let (stream, noise) = (&self.stream, &self.noise);
        let spec = case.spec()?;
        let q = filled(stream, noise, &case.q_shape())?;
        let o = zeros(stream, &case.q_shape())?;
        let cache = || Ok::<_, Box<dyn std::error::Error>>(filled(stream, noise, &[case.kv_elements()])?);
        let caches = (0..case.layers).map(|_| Ok((cache()?, cache()?))).collect::<Result<Vec<_>>>()?;
        let batch = case.batch(&case.indices())?;
        let workspace = Workspace::new(spec, Largest::new(case.requests, case.rows()), stream)?;
        Ok(Setup { case, q, o, caches, batch, workspace })
    }

    fn measure(&self, what: &str, setup: &mut Setup, count: usize) -> Result<Option<f64>> {
        let stream = &self.stream;
        let Setup { case, q, o, caches, batch, workspace } = setup;
        if what == "plan" {
            let mut plans = |times| {
                for _ in 0..times {
                    black_box(workspace.plan(black_box(batch))?);
                }
                Ok(())
            };
            return Ok(Some(arm::time(stream, Timing::host(count), &mut plans)? / count as f64));
        }
        let plan = workspace.plan(batch)?;
        let q = TensorRef::from_cudarc(stream, q, &case.q_shape())?;
        let mut o = TensorMut::from_cudarc(stream, o, &case.q_shape())?;
        let options = AttentionOptions::default();
        if case.kind == Kind::Ragged {
            let shape = case.ragged_shape();
            let tensor = |buffer| TensorRef::from_cudarc(stream, buffer, &shape);
            let layers = caches.iter().map(|(k, v)| Ok((tensor(k)?, tensor(v)?))).collect::<Result<Vec<_>>>()?;
            let run = |at: usize| {
                let (k, v) = &layers[at % layers.len()];
                plan.run_ragged(black_box(&mut o), None, black_box(&q), (k, v), &options)
            };
            return self.runs(what, count, run);
        }
        let shape = case.cache_shape();
        let mut layers = Vec::new();
        for (k, v) in caches {
            let (k, v) = (TensorMut::from_cudarc(stream, k, &shape)?, TensorMut::from_cudarc(stream, v, &shape)?);
            layers.push(PagedKvCache::new(k, v, KvLayout::Nhd)?);
        }
        let run = |at: usize| {
            let cache = &layers[at % layers.len()];
            plan.run(black_box(&mut o), None, black_box(&q), black_box(cache), &options)
        };
        self.runs(what, count, run)
    }

    /// `run` is a run of a layer.
    fn runs(
        &self,
        what: &str,
        count: usize,
        mut run: impl FnMut(usize) -> flashinfer_rs::Result<()>,
    ) -> Result<Option<f64>> {
        let stream = &self.stream;
        match what {
            "run" => {
                let mut runs = |times| (0..times).try_for_each(&mut run);
                Ok(Some(arm::time(stream, Timing::host(count), &mut runs)? / count as f64))
            }
            "gpu" => self.queued(count, run).map(Some),
            "step" => {
                let mut values = Vec::new();
                for at in 0..count {
                    stream.synchronize()?;
                    let start = Instant::now();
                    run(at)?;
                    stream.synchronize()?;
                    values.push(start.elapsed().as_nanos() as f64);
                }
                Ok(Some(arm::median(values)))
            }
            // What C alone has.
            _ => Ok(None),
        }
    }

    /// GPU time of a run, of so many that were queued before the first started.
    fn queued(&self, count: usize, mut run: impl FnMut(usize) -> flashinfer_rs::Result<()>) -> Result<f64> {
        let stream = &self.stream;
        let event = || self.context.new_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        let (start, end) = (event()?, event()?);
        let mut ahead = self.ahead.borrow_mut();
        let (from, to) = &mut *ahead;
        let mut values = Vec::new();
        for timing in 0..=TIMINGS {
            stream.memcpy_dtod(from, to)?;
            start.record(stream)?;
            (0..count).try_for_each(&mut run)?;
            end.record(stream)?;
            let ns = 1e6 * f64::from(start.elapsed_ms(&end)?);
            values.extend((timing > 0).then_some(ns / count as f64));
        }
        Ok(arm::median(values))
    }

    /// GPU time of a run in a graph of so many.
    fn graph(&self, setup: Setup, count: usize) -> Result<f64> {
        let Setup { case, q, o, caches, batch, workspace } = setup;
        drop(workspace);
        let room = GraphRoom {
            requests: case.requests,
            rows: case.rows(),
            pages: batch.page_count(),
            reserved_page: (case.all_pages() - 1) as i32,
        };
        let plan = GraphPlan::new(case.spec()?, room, &batch, &self.stream)?;
        let mut graph = LaunchGraph::new(&self.stream, (plan, q, o, caches))?.with_pdl(false);
        graph.capture(|on, (plan, q, mut o, mut caches)| {
            let (q, mut o, shape) = (q.read(&case.q_shape())?, o.write(&case.q_shape())?, case.cache_shape());
            let layers = caches.len();
            for at in 0..count {
                let (k, v) = &mut caches[at % layers];
                let cache = PagedKvCache::new(k.write(&shape)?, v.write(&shape)?, KvLayout::Nhd)?;
                plan.run(&mut o, None, &q, &cache, &AttentionOptions::default(), on)?;
            }
            Ok(())
        })?;
        graph.launch()?;
        self.stream.synchronize()?;
        let found = arm::time_gpu(&self.context, &self.stream, graph, count)?;
        self.stream.synchronize()?;
        Ok(found)
    }
}

/// Nanoseconds for a page of making a batch, in memory that it has.
fn pages(case: &Case, count: usize) -> Result<f64> {
    let indices = case.indices();
    let mut batch = case.batch(&indices)?;
    let mut values = Vec::new();
    for _ in 0..20 {
        let start = Instant::now();
        for _ in 0..count {
            batch.clear();
            case.fill(black_box(&mut batch), black_box(&indices))?;
        }
        values.push(start.elapsed().as_nanos() as f64 / (count * indices.len()) as f64);
    }
    Ok(arm::median(values))
}
