//! A decoder of the Llama or Qwen3 family as a compute graph: built, fused, planned and proven, then run on a GPU, or without one
//! on the host.
//!
//! `cargo run --example decoder --features compute` runs a tiny model with random weights on the host. On a GPU:
//! `cargo run --release --example decoder --features compute,cudarc,… -- --config DIR --weights DIR`. `-- --help` says what
//! else there is.

mod config;
#[cfg(feature = "cudarc")]
mod device;
mod fault;
mod gate;
mod graph;
mod host;
mod kernels;
mod session;
mod weights;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use flashinfer_rs::compute::{Graph, Plan, Rule, Target, fuse};
use flashinfer_rs::{DType, FlashInferRuntime, RuntimeConfig};

use config::Config;
use fault::{Fault, fault};
use gate::{CONTROLS, Reference};
use graph::{Options, Sampling};
use host::Host;
use kernels::{Decode, Kernels, Prefill};
use session::{Engine, Launch, Session, Slip};
use weights::{Random, Source};

const HELP: &str = "\
A decoder of the Llama or Qwen3 family as a compute graph, on a GPU or on the host.

usage: decoder [OPTION VALUE]...

  --config NAME       tiny, qwen3-0.6b, llama-3.2-1b, or the path of a config.json or of its folder;
                      default: tiny on the host, qwen3-0.6b on a GPU
  --weights PATH      a safetensors file, or a folder with model.safetensors or its index; default: random ones
  --seed N            of random weights, prompts and draws; default: 1
  --on WHERE          host or gpu; default: a GPU where there is one
  --dtype TYPE        bf16, f16 or, on the host, f32; default: bf16 on a GPU, f32 on the host
  --batch N           sequences; default: 2
  --prompt IDS        token ids with commas, the same for each sequence; default: random ones for each
  --prompt-tokens N   random ids of a prompt; default: 12
  --tokens N          to decode; default: 16
  --context N         tokens that a sequence has room for; default: prompt and tokens
  --page-size N       tokens of a page; default: 16
  --rows N            tokens of a prompt at once: a power of two up to 512; default: 32 on a GPU, where more than 32 take cuBLASLt,
                      and 8 on the host
  --fuse RULES        all, none, some of pack,gated,residual,gate,norm,add,qk, or all but some: -pack,-qk; step: attention in the kernel
                      that appends too, and prompts a token at a time; default: all
  --temperature T     draws tokens in place of the likeliest; with --top-k N and --top-p P of some alone
  --attention KERNEL  on a GPU: xqa, or batch-decode, which the host plans ahead of each step; default: xqa
  --prefill KERNEL    on a GPU: fa3, fa2, rows (what decodes, each token of a prompt as a row), or auto: the first of these that is
                      there; default: auto
  --launch HOW        on a GPU: eager, graph or pdl (a graph whose kernels may start early); default: pdl
  --dot FILE, --json FILE, --markdown FILE
                      write the graph as Graphviz's language, JSON or a table; - is standard output
  --gate FILE         compare with transformers' logits, which benches/python/decoder.py wrote, and run the controls
";

/// What the command line says.
struct Arguments {
    config: Option<String>,
    weights: Option<PathBuf>,
    seed: u64,
    gpu: Option<bool>,
    dtype: Option<DType>,
    batch: usize,
    prompt: Option<Vec<i32>>,
    prompt_tokens: usize,
    tokens: usize,
    context: Option<u64>,
    page_size: u64,
    rows: Option<u64>,
    rules: Vec<Rule>,
    temperature: Option<f64>,
    top_k: u32,
    top_p: f64,
    launch: Launch,
    #[cfg_attr(not(feature = "cudarc"), allow(dead_code, reason = "there is no GPU then"))]
    kernels: Kernels,
    dot: Option<String>,
    json: Option<String>,
    markdown: Option<String>,
    gate: Option<PathBuf>,
}

impl Arguments {
    /// None where help was asked for.
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Option<Self>, Fault> {
        let mut found = Self {
            config: None,
            weights: None,
            seed: 1,
            gpu: None,
            dtype: None,
            batch: 2,
            prompt: None,
            prompt_tokens: 12,
            tokens: 16,
            context: None,
            page_size: 16,
            rows: None,
            rules: Rule::ALL.to_vec(),
            temperature: None,
            top_k: 0,
            top_p: 0.0,
            launch: Launch::Pdl,
            kernels: Kernels { decode: Decode::Xqa, prefill: Prefill::Auto },
            dot: None,
            json: None,
            markdown: None,
            gate: None,
        };
        while let Some(name) = words.next() {
            if matches!(name.as_str(), "--help" | "-h") {
                return Ok(None);
            }
            let value = words.next().ok_or_else(|| fault(format!("{name} has no value behind it; see --help")))?;
            let expected = |expected: &str| fault(format!("{name} is {value:?}, expected {expected}; see --help"));
            let number = |least: u64, most: u64| {
                let number = value.parse().ok().filter(|number| (least..=most).contains(number));
                number.ok_or_else(|| expected(&format!("a whole number from {least} to {most}")))
            };
            let fraction = |most: f64| {
                let number = value.parse().ok().filter(|number| (0.0..=most).contains(number));
                number.ok_or_else(|| expected(&format!("a number from 0 to {most}")))
            };
            match name.as_str() {
                "--config" => found.config = Some(value),
                "--weights" => found.weights = Some(value.into()),
                "--seed" => found.seed = number(0, u64::MAX)?,
                "--on" => {
                    found.gpu = Some(match value.as_str() {
                        "host" => false,
                        "gpu" => true,
                        _ => return Err(expected("host or gpu")),
                    });
                }
                "--dtype" => {
                    found.dtype = Some(match value.as_str() {
                        "bf16" => DType::BF16,
                        "f16" => DType::F16,
                        "f32" => DType::F32,
                        _ => return Err(expected("bf16, f16 or f32")),
                    });
                }
                "--batch" => found.batch = number(1, 32)? as usize,
                "--prompt" => {
                    let ids = value.split(',').map(|id| id.trim().parse().ok().filter(|id| *id >= 0));
                    found.prompt = Some(ids.collect::<Option<_>>().ok_or_else(|| expected("ids with commas: 1,2,3"))?);
                }
                "--prompt-tokens" => found.prompt_tokens = number(1, 1 << 20)? as usize,
                "--tokens" => found.tokens = number(1, 1 << 20)? as usize,
                "--context" => found.context = Some(number(1, 1 << 20)?),
                "--rows" => found.rows = Some(number(1, 512)?),
                "--page-size" => found.page_size = number(1, 1 << 10)?,
                "--fuse" => {
                    found.rules = graph::rules(&value)
                        .ok_or_else(|| expected("all, none, or some of pack,gated,add,qk,residual"))?;
                }
                "--temperature" => found.temperature = Some(fraction(100.0)?),
                "--top-k" => found.top_k = number(0, 1 << 20)? as u32,
                "--top-p" => found.top_p = fraction(1.0)?,
                "--launch" => {
                    found.launch = match value.as_str() {
                        "eager" => Launch::Eager,
                        "graph" => Launch::Graph,
                        "pdl" => Launch::Pdl,
                        _ => return Err(expected("eager, graph or pdl")),
                    };
                }
                "--attention" => {
                    found.kernels.decode = match value.as_str() {
                        "xqa" => Decode::Xqa,
                        "batch-decode" => Decode::BatchDecode,
                        _ => return Err(expected("xqa or batch-decode")),
                    };
                }
                "--prefill" => {
                    found.kernels.prefill = match value.as_str() {
                        "auto" => Prefill::Auto,
                        "rows" => Prefill::Rows,
                        "fa2" => Prefill::Fa2,
                        "fa3" => Prefill::Fa3,
                        _ => return Err(expected("auto, rows, fa2 or fa3")),
                    };
                }
                "--dot" => found.dot = Some(value),
                "--json" => found.json = Some(value),
                "--markdown" => found.markdown = Some(value),
                "--gate" => found.gate = Some(value.into()),
                _ => return Err(fault(format!("{name} is no option; see --help"))),
            }
        }
        if found.temperature.is_none() && (found.top_k > 0 || found.top_p > 0.0) {
            return Err(fault("--top-k and --top-p say what is drawn of; say --temperature too"));
        }
        Ok(Some(found))
    }
}

fn main() -> ExitCode {
    let done = match Arguments::parse(std::env::args().skip(1)) {
        Ok(Some(arguments)) => run(&arguments),
        Ok(None) => {
            print!("{HELP}");
            Ok(true)
        }
        Err(error) => Err(error),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("decoder: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Answers whether all is well: false where a gate is red.
fn run(arguments: &Arguments) -> Result<bool, Fault> {
    let runtime = FlashInferRuntime::initialize(RuntimeConfig::default())?;
    let there = cfg!(feature = "cudarc") && runtime.gpu_available();
    let gpu = arguments.gpu.unwrap_or(there);
    if gpu && !there {
        let why =
            if cfg!(feature = "cudarc") { "there is no GPU" } else { "this was built without the feature `cudarc`" };
        return Err(fault(format!("--on gpu: {why}; say --on host")));
    }
    let config = Config::of(arguments.config.as_deref().unwrap_or(if gpu { "qwen3-0.6b" } else { "tiny" }))?;
    println!(
        "{config}; {} numbers, and {} of keys and values for each token",
        config.parameters(),
        config.kv_numbers()
    );
    let source = match &arguments.weights {
        Some(path) => Source::open(path)?,
        None => Source::random(arguments.seed),
    };
    match &arguments.gate {
        Some(path) => gate(arguments, &config, &source, gpu, path),
        None => generate(arguments, &config, &source, gpu).map(|()| true),
    }
}

impl Arguments {
    /// For so many sequences of so many tokens.
    fn options(&self, gpu: bool, sequences: usize, tokens: u64) -> Result<Options, Fault> {
        let dtype = self.dtype.unwrap_or(if gpu { DType::BF16 } else { DType::F32 });
        let target = if gpu { Target::Gpu } else { Target::Host };
        // On the host every row of a batch takes its time, and eight are enough to see a prefill in chunks.
        let rows = self.rows.unwrap_or(if gpu { 32 } else { 8 });
        let rows = rows.max(sequences as u64).next_power_of_two();
        let sampling =
            self.temperature.map(|temperature| Sampling { temperature, top_k: self.top_k, top_p: self.top_p });
        Ok(Options {
            target,
            dtype,
            rows,
            page_size: self.page_size,
            pages_per_row: tokens.div_ceil(self.page_size),
            sequences: sequences as u64,
            rules: self.rules.clone(),
            sampling,
            residuals: false,
        })
    }
}

/// The graph, fused as the options say, and what was planned for its largest batch.
fn planned(config: &Config, options: &Options) -> Result<(Graph, Plan), Fault> {
    if options.positions() > config.positions {
        return Err(fault(format!(
            "a context of {} tokens, and {} is made for {}; give fewer --tokens or a smaller --context",
            options.positions(),
            config.name,
            config.positions
        )));
    }
    let start = Instant::now();
    let graph = graph::build(config, options)?;
    let nodes = graph.nodes().len();
    let (graph, applied) = fuse(&graph, &options.rules)?;
    let plan = Plan::new(&graph, options.rows)?;
    plan.verify(&graph)?;
    let elapsed = start.elapsed();
    for warning in graph.warnings() {
        println!("warning: {warning}");
    }
    for rule in &options.rules {
        let times = applied.iter().filter(|applied| applied.rule == *rule).count();
        println!("fused {times} × {}", rule.name());
    }
    let sizes = plan.sizes();
    println!(
        "{nodes} operations became {}, {} kernels a step; built, fused, planned and proven in {:.1} ms",
        graph.nodes().len(),
        plan.kernels(&graph),
        elapsed.as_secs_f64() * 1e3
    );
    println!(
        "{} rows: an arena of {} bytes ({} if nothing shared memory, {} at least), weights {}, caches {}, inputs {}",
        plan.batch(),
        sizes.planned,
        sizes.naive,
        sizes.lower_bound,
        sizes.weights,
        sizes.states,
        sizes.inputs
    );
    Ok((graph, plan))
}

fn generate(arguments: &Arguments, config: &Config, source: &Source, gpu: bool) -> Result<(), Fault> {
    let mut random = Random(arguments.seed);
    let prompts: Vec<Vec<i32>> = match &arguments.prompt {
        Some(prompt) => vec![prompt.clone(); arguments.batch],
        None => {
            let mut one = |_| (0..arguments.prompt_tokens).map(|_| (random.next() % config.vocab) as i32).collect();
            (0..arguments.batch).map(&mut one).collect()
        }
    };
    if let Some(id) = prompts.iter().flatten().find(|id| **id as u64 >= config.vocab) {
        return Err(fault(format!("--prompt has the token {id}, and {} has {}", config.name, config.vocab)));
    }
    let needed = (prompts[0].len() + arguments.tokens) as u64;
    let room = arguments.context.unwrap_or(needed);
    if room < needed {
        return Err(fault(format!("--context is {room}, expected at least {needed}: prompt and --tokens together")));
    }
    let options = arguments.options(gpu, arguments.batch, room)?;
    let (graph, plan) = planned(config, &options)?;
    for (path, text) in [
        (&arguments.dot, &(|| graph.dot(Some(&plan))) as &dyn Fn() -> String),
        (&arguments.json, &|| graph.json()),
        (&arguments.markdown, &|| graph.markdown(&plan, BANDWIDTH, &[])),
    ] {
        let Some(path) = path else { continue };
        match path.as_str() {
            "-" => println!("{}", text()),
            path => std::fs::write(path, text()).map_err(|error| fault(format!("writing {path} failed: {error}")))?,
        }
    }
    with_engine(arguments, config, source, (&graph, &plan, &options), &mut |engine| {
        let mut session = Session::new(engine, &options, arguments.batch, arguments.seed);
        let start = Instant::now();
        let first =
            prompts.iter().enumerate().map(|(i, prompt)| session.prefill(i, prompt)).collect::<Result<Vec<_>, _>>()?;
        let prefilled = start.elapsed().as_secs_f64();
        let start = Instant::now();
        let made = session.decode(arguments.tokens - 1)?;
        let decoded = start.elapsed().as_secs_f64();
        for (i, (prompt, first)) in prompts.iter().zip(&first).enumerate() {
            let tokens: Vec<i32> = [*first].into_iter().chain(made.iter().map(|step| step[i])).collect();
            match prompt.len() {
                0..=64 => println!("sequence {i}: {prompt:?} -> {tokens:?}"),
                length => println!("sequence {i}: {length} tokens -> {tokens:?}"),
            }
        }
        let count: usize = prompts.iter().map(Vec::len).sum();
        println!("prefill: {count} tokens, {:.1} tokens a second", count as f64 / prefilled);
        if !made.is_empty() {
            let count = made.len() * prompts.len();
            println!(
                "decode: {count} tokens, {:.1} tokens a second, {:.1} µs a step",
                count as f64 / decoded,
                decoded / made.len() as f64 * 1e6
            );
        }
        Ok(())
    })
}

/// Of an H100's data sheet, in bytes a second: what floors in the table of nodes are of.
const BANDWIDTH: f64 = 3.35e12;

/// Runs something on an engine for a plan, with its weights.
fn with_engine(
    arguments: &Arguments,
    config: &Config,
    source: &Source,
    (graph, plan, options): (&Graph, &Plan, &Options),
    then: &mut dyn FnMut(&mut dyn Engine) -> Result<(), Fault>,
) -> Result<(), Fault> {
    let mut run = |engine: &mut dyn Engine| {
        source.give(graph, config, None, &mut |name, tensor| engine.weight(name, tensor))?;
        engine.make_ready()?;
        println!("on {}", engine.describe());
        then(engine)
    };
    #[cfg(feature = "cudarc")]
    if graph.target() == Target::Gpu {
        use flashinfer_rs::compute::Buckets;
        // Of a row for each sequence, and of as many as there may be for a prefill.
        let of_sequences = Buckets::default().of(options.sequences)?;
        let buckets = Buckets::new(&[of_sequences, graph.largest_batch()])?;
        return run(&mut kernels::gpu(graph, &buckets, arguments.launch, arguments.kernels)?);
    }
    let _ = (arguments, options);
    run(&mut Host::new(graph, plan)?)
}

/// Compares with every reference of a file, then sees that one of them turns red by each control.
fn gate(arguments: &Arguments, config: &Config, source: &Source, gpu: bool, path: &Path) -> Result<bool, Fault> {
    let references = Reference::all(path)?;
    let (sequences, tokens) = Reference::room(&references);
    let options = arguments.options(gpu, sequences, tokens)?;
    let (graph, plan) = planned(config, &options)?;
    // Where what one token does wrong weighs most, and there are others' pages.
    let Some(short) = references.iter().min_by_key(|reference| (reference.context, usize::MAX - reference.sequences))
    else {
        return Ok(false);
    };
    let mut passed = true;
    with_engine(arguments, config, source, (&graph, &plan, &options), &mut |engine| {
        let found = |engine: &mut dyn Engine, reference: &Reference, slip| {
            let mut session = Session::new(engine, &options, reference.sequences, arguments.seed);
            reference.errors(&mut session, slip)
        };
        for reference in &references {
            passed &= reference.judge(&found(engine, reference, Slip::None)?, true);
        }
        println!("controls, which must be far:");
        for (name, wrong, slip) in CONTROLS {
            print!("{name}: ");
            source.give(&graph, config, Some(wrong), &mut |name, tensor| engine.weight(name, tensor))?;
            match found(engine, short, slip) {
                // A run may see by itself that a row appends where it must not.
                Err(fault) if slip != Slip::None && fault.to_string().contains("appends to page") => {
                    println!("refused: {fault}")
                }
                errors => {
                    if short.judge(&errors?, false) {
                        println!("this slip was not seen");
                        passed = false;
                    }
                }
            }
        }
        // And right again.
        print!("without a slip: ");
        source.give(&graph, config, Some(None), &mut |name, tensor| engine.weight(name, tensor))?;
        passed &= short.judge(&found(engine, short, Slip::None)?, false);
        Ok(())
    })?;
    passed &= residuals(arguments, config, source, &options, &references)?;
    println!("{}", if passed { "PASS" } else { "FAIL" });
    Ok(passed)
}

/// Compares what each layer leaves in the residual stream, by a graph of its own that has it as outputs: in the one that is judged
/// above nothing holds it.
fn residuals(
    arguments: &Arguments,
    config: &Config,
    source: &Source,
    options: &Options,
    references: &[Reference],
) -> Result<bool, Fault> {
    if references.iter().all(|reference| reference.layers() == 0) {
        println!("the file has no residuals to compare with; benches/python/decoder.py reference writes them");
        return Ok(true);
    }
    println!("the residual stream, by a graph with an output behind each layer:");
    let options = Options { residuals: true, ..options.clone() };
    let (graph, plan) = planned(config, &options)?;
    let mut passed = true;
    with_engine(arguments, config, source, (&graph, &plan, &options), &mut |engine| {
        for reference in references.iter().filter(|reference| reference.layers() > 0) {
            let mut session = Session::new(engine, &options, reference.sequences, arguments.seed);
            passed &= reference.judge_residuals(&reference.residuals(&mut session)?);
        }
        Ok(())
    })?;
    Ok(passed)
}
