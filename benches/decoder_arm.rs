//! A decoder's steps on a GPU, in each way that this crate runs them; benches/python/decoder.py is the same model in transformers.
//! `cargo xtask bench --decoder` starts it, as `decoder_arm [--bench] ARM`.
//!
//!     step MODEL BATCH CONTEXT STEPS     ns of a step, between events around so many that were queued
//!     host MODEL BATCH CONTEXT STEPS     ns of a step, on the host alone, while others are queued
//!     kernels MODEL BATCH CONTEXT STEPS  kernels of a step
//!     build MODEL BATCH                  ns to build, fuse, plan and prove the graph
//!     arena MODEL BATCH                  the arena's size by what it cannot be smaller than
//!     error MODEL                        how far the logits are from F32's, by how far transformers' own are, where its folder has
//!                                        reference.safetensors
//!     residual MODEL LAYER               the same of what a layer leaves in the residual stream, of all references the largest
//!
//! MODEL is a folder of DECODER_MODELS, or a shape that is built in, with random weights.

use std::cell::RefCell;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use flashinfer_rs::compute::{Buckets, DataType, Graph, HostTensor, Origin, Plan, Rule, Target, fuse};
use flashinfer_rs::cudarc::driver::sys::CUevent_flags;
use flashinfer_rs::{DType, FlashInferRuntime, RuntimeConfig};

#[path = "support/arm.rs"]
#[allow(dead_code, reason = "other programs measure other things")]
mod arm;
#[path = "../examples/decoder/config.rs"]
#[allow(dead_code, reason = "the example prints more of it")]
mod config;
#[path = "../examples/decoder/device.rs"]
mod device;
#[path = "../examples/decoder/fault.rs"]
mod fault;
#[path = "../examples/decoder/gate.rs"]
#[allow(dead_code, reason = "the example judges, here it is told")]
mod gate;
#[path = "../examples/decoder/graph.rs"]
mod graph;
#[path = "../examples/decoder/session.rs"]
#[allow(dead_code, reason = "the example decodes too")]
mod session;
#[path = "../examples/decoder/weights.rs"]
#[allow(dead_code, reason = "nothing is wrong on purpose here")]
mod weights;

use arm::Result;
use config::Config;
use device::Gpu;
use gate::Reference;
use session::{Engine, Inputs, Launch, Session, Slip};
use weights::{Random, Source};

const PAGE_SIZE: u64 = 16;
/// Steps that a context has room for.
const ROOM: u64 = 128;
const TIMINGS: usize = 5;
const BUILDS: usize = 11;

fn main() -> ExitCode {
    arm::serve(Bench::start, Bench::answer)
}

/// How an arm runs a model.
struct Bench {
    launch: Launch,
    rules: Vec<Rule>,
    /// Every case that was asked for: it is asked again in each block.
    kept: RefCell<Vec<Setup>>,
    /// How many times as far as transformers' own each layer's residual stream is, of the model that was asked for.
    residuals: RefCell<Option<(String, Vec<f64>)>>,
}

struct Setup {
    model: String,
    rows: u64,
    context: u64,
    inputs: Inputs,
    gpu: Gpu,
}

impl Bench {
    fn start(arguments: &[String]) -> Result<Self> {
        let [name] = arguments else { return Err("expected: decoder_arm ARM".into()) };
        let (launch, rules) = match name.as_str() {
            "ours-eager" => (Launch::Eager, "step".to_owned()),
            "ours-graph" => (Launch::Graph, "step".to_owned()),
            "ours-pdl" => (Launch::Pdl, "step".to_owned()),
            "ours-unfused" => (Launch::Pdl, "none".to_owned()),
            other => match other.strip_prefix("ours-no") {
                Some(rule) => (Launch::Pdl, format!("step,{rule}")),
                None => return Err(format!("{other} is no arm of this program").into()),
            },
        };
        let rules = graph::rules(&rules).ok_or_else(|| format!("{name} names a rule that there is not"))?;
        // Before cudarc, which panics without a driver.
        if FlashInferRuntime::initialize(RuntimeConfig::default())?.device_count()? == 0 {
            return Err("the driver lists no GPU".into());
        }
        Ok(Self { launch, rules, kept: RefCell::default(), residuals: RefCell::default() })
    }

    fn answer(&self, request: &str) -> Result<Option<f64>> {
        // A model's name has digits and dashes.
        let words: Vec<&str> = request.split_whitespace().collect();
        let numbers = words.iter().skip(2).map(|word| word.parse().ok().filter(|number| (1..1 << 20).contains(number)));
        let numbers: Option<Vec<u64>> = numbers.collect();
        let numbers = numbers.ok_or_else(|| format!("`{request}` has a number that is none, or not positive"))?;
        match (&words[..], &numbers[..]) {
            (["build", model, _], &[rows]) => self.build(&config(model)?, rows).map(Some),
            (["arena", model, _], &[rows]) => {
                let options = self.options(rows, rows, 1024 + ROOM);
                let sizes = self.planned(&config(model)?, &options)?.1.sizes();
                Ok(Some(sizes.planned as f64 / sizes.lower_bound as f64))
            }
            (["error", model], []) => self.error(model),
            (["residual", model, _], &[layer]) => self.residual(model, layer as usize),
            ([what @ ("step" | "host" | "kernels"), model, ..], &[rows, context, steps]) if steps <= ROOM => {
                let mut kept = self.kept.borrow_mut();
                let of_case = |setup: &Setup| setup.model == *model && (setup.rows, setup.context) == (rows, context);
                let at = match kept.iter().position(of_case) {
                    Some(at) => at,
                    None => {
                        kept.push(self.setup(model, rows, context)?);
                        kept.len() - 1
                    }
                };
                let setup = &mut kept[at];
                match *what {
                    "step" => setup.queued(steps).map(Some),
                    "host" => setup.on_host(steps).map(Some),
                    _ => self.kernels(setup).map(Some),
                }
            }
            _ => Ok(None),
        }
    }

    fn options(&self, rows: u64, sequences: u64, tokens: u64) -> graph::Options {
        graph::Options {
            target: Target::Gpu,
            dtype: DType::BF16,
            rows,
            page_size: PAGE_SIZE,
            pages_per_row: tokens.div_ceil(PAGE_SIZE),
            sequences,
            rules: self.rules.clone(),
            sampling: None,
            residuals: false,
        }
    }

    fn planned(&self, config: &Config, options: &graph::Options) -> Result<(Graph, Plan)> {
        let graph = fuse(&graph::build(config, options)?, &options.rules)?.0;
        let plan = Plan::new(&graph, options.rows)?;
        plan.verify(&graph)?;
        Ok((graph, plan))
    }

    fn build(&self, config: &Config, rows: u64) -> Result<f64> {
        let options = self.options(rows, rows, 1024 + ROOM);
        let mut values = Vec::new();
        for _ in 0..BUILDS {
            let start = Instant::now();
            self.planned(config, &options)?;
            values.push(start.elapsed().as_nanos() as f64);
        }
        Ok(arm::median(values))
    }

    /// A graph with the model's weights, not captured yet.
    fn loaded(&self, model: &str, options: &graph::Options, buckets: &Buckets) -> Result<(Config, Graph, Gpu)> {
        let (config, folder) = (config(model)?, folder(model));
        let source = if folder.is_dir() { Source::open(&folder)? } else { Source::random(1) };
        let graph = self.planned(&config, options)?.0;
        let mut gpu = Gpu::new(&graph, buckets, self.launch)?;
        source.give(&graph, &config, None, &mut |name, tensor| gpu.weight(name, tensor))?;
        Ok((config, graph, gpu))
    }

    /// Something of each of a model's references, by a graph of their own; nothing where the model's folder has none.
    fn beside<T>(
        &self,
        model: &str,
        residuals: bool,
        each: impl Fn(&Reference, &mut Session<'_>) -> Result<T>,
    ) -> Result<Option<Vec<T>>> {
        let path = folder(model).join("reference.safetensors");
        if !path.exists() {
            return Ok(None);
        }
        // First the memory of what was.
        self.kept.borrow_mut().clear();
        let references = Reference::all(&path)?;
        let (sequences, tokens) = Reference::room(&references);
        let (usual, sequences) = (Buckets::default(), sequences as u64);
        let options = graph::Options { residuals, ..self.options(usual.largest(), sequences, tokens) };
        let buckets = Buckets::new(&[usual.of(sequences)?, usual.largest()])?;
        let (.., mut gpu) = self.loaded(model, &options, &buckets)?;
        gpu.make_ready()?;
        let mut all = Vec::with_capacity(references.len());
        for reference in &references {
            let mut session = Session::new(&mut gpu, &options, reference.sequences, 1);
            all.push(each(reference, &mut session)?);
        }
        Ok(Some(all))
    }

    fn error(&self, model: &str) -> Result<Option<f64>> {
        let found = self.beside(model, false, |reference, session| {
            let (ours, theirs) = reference.together(&reference.errors(session, Slip::None)?);
            if !ours.is_finite() {
                return Err(format!("logits of {} that are no numbers", reference.name).into());
            }
            Ok(ours / theirs)
        })?;
        Ok(found.map(|ratios| ratios.into_iter().fold(0.0, f64::max)))
    }

    /// Of a layer, counted from 1.
    fn residual(&self, model: &str, layer: usize) -> Result<Option<f64>> {
        let mut known = self.residuals.borrow_mut();
        if known.as_ref().is_none_or(|(of, _)| of != model) {
            let found = self.beside(model, true, |reference, session| Ok(reference.residuals(session)?))?;
            let mut largest: Vec<f64> = Vec::new();
            for layers in found.unwrap_or_default() {
                largest.resize(largest.len().max(layers.len()), 0.0);
                for (largest, (ours, theirs)) in largest.iter_mut().zip(layers) {
                    let ratio = ours / theirs;
                    if !ratio.is_finite() {
                        return Err("a residual stream that is no number".into());
                    }
                    *largest = largest.max(ratio);
                }
            }
            *known = Some((model.to_owned(), largest));
        }
        Ok(known.as_ref().and_then(|(_, largest)| largest.get(layer - 1).copied()))
    }

    fn setup(&self, model: &str, rows: u64, context: u64) -> Result<Setup> {
        let options = self.options(rows, rows, context + ROOM);
        let (config, graph, mut gpu) = self.loaded(model, &options, &Buckets::new(&[rows])?)?;
        let mut noise = None;
        for state in graph.tensors().iter().filter(|tensor| tensor.origin == Origin::State) {
            let bytes = state.spec.bytes(rows) as usize;
            let values = match &mut noise {
                Some(values) => values,
                None => noise.insert(normal(bytes / 2)?),
            };
            gpu.run.state_bytes(&state.name, state.spec.dtype, &values.bytes()[..bytes])?;
        }
        gpu.make_ready()?;
        let width = options.pages_per_row;
        // Pages in any order: what a cache looks like after a while.
        let mut pages: Vec<i32> = (1..options.pages() as i32).collect();
        let mut random = Random(7);
        (1..pages.len()).rev().for_each(|i| pages.swap(i, (random.next() % (i as u64 + 1)) as usize));
        pages.truncate((rows * width) as usize);
        let count = rows as usize;
        let inputs = Inputs {
            ids: (0..count).map(|_| (random.next() % config.vocab) as i32).collect(),
            positions: vec![context as i32; count],
            lengths: vec![context as i32 + 1; count],
            page_table: pages,
            numbers: Vec::new(),
        };
        let mut setup = Setup { model: model.to_owned(), rows, context, inputs, gpu };
        // Warms up.
        setup.queued(20)?;
        Ok(setup)
    }

    /// What was captured, or of eager steps what is launched.
    fn kernels(&self, setup: &Setup) -> Result<f64> {
        Ok(match setup.gpu.run.captured(setup.rows) {
            Some(step) => step.kernels as f64,
            None => f64::from(setup.gpu.run.kernels(setup.rows)?),
        })
    }
}

impl Setup {
    /// GPU time of a step, of so many that follow each other.
    fn queued(&mut self, steps: u64) -> Result<f64> {
        let stream = self.gpu.run.stream().clone();
        let event = || stream.context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        let (start, end) = (event()?, event()?);
        let mut values = Vec::new();
        for timing in 0..=TIMINGS {
            self.gpu.give(&self.inputs)?;
            start.record(&stream)?;
            self.gpu.queue(steps)?;
            end.record(&stream)?;
            let ns = 1e6 * f64::from(start.elapsed_ms(&end)?);
            values.extend((timing > 0).then_some(ns / steps as f64));
        }
        Ok(arm::median(values))
    }

    /// The host's time of a step, while steps ahead of it run.
    fn on_host(&mut self, steps: u64) -> Result<f64> {
        let mut values = Vec::new();
        for _ in 0..TIMINGS {
            self.gpu.give(&self.inputs)?;
            self.gpu.queue(1)?;
            let start = Instant::now();
            for _ in 1..steps {
                self.gpu.queue(1)?;
            }
            values.push(start.elapsed().as_nanos() as f64 / (steps - 1).max(1) as f64);
            self.gpu.run.synchronize()?;
        }
        Ok(arm::median(values))
    }
}

fn folder(model: &str) -> std::path::PathBuf {
    let models = std::env::var_os("DECODER_MODELS").unwrap_or_default();
    Path::new(&models).join(model)
}

fn config(model: &str) -> Result<Config> {
    let folder = folder(model);
    let name = if folder.join("config.json").exists() { folder.display().to_string() } else { model.to_owned() };
    Ok(Config::of(&name)?)
}

/// So many normal numbers of variance 1.
fn normal(count: usize) -> Result<HostTensor> {
    let mut random = Random(11);
    let mut tensor = HostTensor::zeros(DataType::Bfloat16, &[count as u64])?;
    let some: Vec<[u8; 2]> = (0..1 << 16)
        .map(|_| {
            let radius = (-2.0 * random.uniform().ln()).sqrt();
            half::bf16::from_f64(radius * (std::f64::consts::TAU * random.uniform()).cos()).to_ne_bytes()
        })
        .collect();
    for place in tensor.bytes_mut().chunks_exact_mut(2) {
        place.copy_from_slice(&some[(random.next() >> 48) as usize]);
    }
    Ok(tensor)
}
