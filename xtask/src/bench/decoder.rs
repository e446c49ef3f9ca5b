//! `cargo xtask bench --decoder`: a decoder's step as a compute graph, in each way that it runs, beside transformers, torch and
//! FlashInfer's own functions of Python.

use std::borrow::Cow;
use std::fmt::Write;
use std::sync::LazyLock;
use std::time::Duration;

use super::Suite;
use super::families::{COPY_BYTES, cell, copy_case, copy_rate, failures};
use super::figures::{self, BOUND, PYTHON, RUST, Row, Rows};
use super::plan::{self, Arm, Blocks, Comparison, Formula, Limit, Program, Question, arm};
use super::record::{Machine, Samples};
use super::report;
use crate::bundle;
use crate::vendoring::error::Result;

pub static SUITE: Suite = Suite {
    name: "decoder",
    option: " --decoder",
    arms: &ARMS,
    rust: &bundle::DECODER,
    // Only its copies.
    c: "attention",
    python: "decoder.py",
    // As few as have intervals.
    blocks: (6, 1),
    questions,
    // They keep a model, and take long to start.
    generation: |_, _, _| 0,
    tolerant: true,
    // A model is compiled before an arm is ready.
    patience: Duration::from_secs(300),
    comparisons: || &COMPARISONS,
    report: markdown,
    figures: |samples| Ok(vec![("decoder.svg", steps(samples)?), ("decoder-roofline.svg", shares(samples)?)]),
};

const OURS: &str = "ours-pdl";

/// In the order of every table.
static ARMS: [Arm; 30] = [
    arm("limits", Program::C, "copies on the device"),
    arm(OURS, Program::Rust, "every fusion, a CUDA graph, kernels that start early where they may (PDL)"),
    arm("ours-graph", Program::Rust, "every fusion, a CUDA graph without PDL"),
    arm("ours-eager", Program::Rust, "every fusion, each kernel launched by itself"),
    arm("ours-unfused", Program::Rust, "no fusion, a CUDA graph with PDL"),
    arm("ours-no-pack", Program::Rust, "without packed products"),
    arm("ours-no-gated", Program::Rust, "without the gated activation in one kernel"),
    arm("ours-no-qk", Program::Rust, "without q/k norm, rope and append in one kernel, nor attention"),
    arm("ours-no-residual", Program::Rust, "without sums in products"),
    arm("ours-no-gate", Program::Rust, "without the gated activation in the product ahead of it"),
    arm("ours-no-norm", Program::Rust, "without norms in the products behind them"),
    arm(
        "ours-no-attention",
        Program::Rust,
        "XQA behind q/k norm, rope and append, in place of attention in one kernel with them",
    ),
    arm("hf-compile-1x1024", Program::Python, "`torch.compile(mode=\"reduce-overhead\", fullgraph=True)`, StaticCache"),
    arm("hf-compile-32x1024", Program::Python, "likewise"),
    arm("hf-compile-1x8192", Program::Python, "likewise"),
    arm("hf-compile-llama-1x1024", Program::Python, "likewise"),
    arm("hf-flex-1x1024", Program::Python, "the same with `flex_attention`"),
    arm("hf-flex-32x1024", Program::Python, "likewise"),
    arm("hf-flex-1x8192", Program::Python, "likewise"),
    arm("hf-cudagraph-1x1024", Program::Python, "transformers without a compiler, captured by `torch.cuda.CUDAGraph`"),
    arm(
        "torch-cudagraph-1x1024",
        Program::Python,
        "torch's operations by hand, weights packed, in a `torch.cuda.CUDAGraph`",
    ),
    arm("torch-cudagraph-32x1024", Program::Python, "likewise"),
    arm("torch-cudagraph-1x8192", Program::Python, "likewise"),
    arm("torch-cudagraph-llama-1x1024", Program::Python, "likewise"),
    arm(
        "fi-python-1x1024",
        Program::Python,
        "FlashInfer's functions of Python over the same libraries, products by torch, in a `torch.cuda.CUDAGraph`; attention planned \
         ahead for each number of pages",
    ),
    arm("fi-python-32x1024", Program::Python, "likewise"),
    arm("fi-python-1x8192", Program::Python, "likewise"),
    arm("fi-python-llama-1x1024", Program::Python, "likewise"),
    arm(EAGER[0], Program::Python, "transformers without a compiler: sdpa, StaticCache"),
    arm(EAGER[1], Program::Python, "the same with DynamicCache"),
];

/// Of transformers, launched operation by operation.
const EAGER: &[&str] = &["hf-eager", "hf-eager-dyn"];
/// What others have for a case, by how an arm's name begins: what bounds are of, first.
const KINDS: [(&str, &str); 5] = [
    ("hf-compile", "torch.compile"),
    ("hf-flex", "torch.compile, flex_attention"),
    ("hf-cudagraph", "transformers captured"),
    ("torch-cudagraph", "torch by hand, captured"),
    ("fi-python", "FlashInfer's Python, captured"),
];

/// What is left out of the fused graph, one rule at a time.
const ABLATIONS: &[&str] = &[
    "ours-unfused",
    "ours-no-pack",
    "ours-no-gated",
    "ours-no-qk",
    "ours-no-residual",
    "ours-no-gate",
    "ours-no-norm",
    "ours-no-attention",
];

const QWEN: &str = "qwen3-0.6b";
const LLAMA: &str = "llama-3.2-1b";
/// Of Qwen3-0.6B.
const LAYERS: usize = 28;
/// Steps that are queued between two events; a context has room for them.
const STEPS: u64 = 128;
/// Those of what takes some 50 ms each.
const FEW: u64 = 16;

/// Bytes of a model's weights that a step reads, and of keys and values of a token, in bf16.
const fn bytes_of(model: &str) -> (u64, u64) {
    // The only two, which differ in length.
    if model.len() == QWEN.len() { (1_192_099_840, 114_688) } else { (2_471_628_800, 32_768) }
}

/// A batch of a model at a context.
struct Case {
    model: &'static str,
    rows: u64,
    context: u64,
    step: String,
    few: String,
    host: String,
    kernels: String,
    /// Arms of others, each for this case alone.
    peers: &'static [&'static str],
    /// How many times as fast as what torch compiles.
    bound: Limit,
    /// The least share of the roofline.
    share: Limit,
}

impl Case {
    fn new(model: &'static str, (rows, context): (u64, u64), peers: &'static [&'static str]) -> Self {
        let of = |what: &str, steps: u64| format!("{what} {model} {rows} {context} {steps}");
        let (bound, share) = match (model, rows, context) {
            (QWEN, 1, 1024) => (Limit::AtLeast(3.0), Limit::AtLeast(0.40)),
            (QWEN, 32, 1024) => (Limit::AtLeast(4.0), Limit::Open),
            (QWEN, 1, 8192) => (Limit::AtLeast(3.0), Limit::Open),
            (LLAMA, 1, 1024) => (Limit::Open, Limit::AtLeast(0.60)),
            _ => (Limit::Open, Limit::Open),
        };
        let (step, few) = (of("step", STEPS), of("step", FEW));
        Self { model, rows, context, step, few, host: of("host", 64), kernels: of("kernels", 1), peers, bound, share }
    }

    /// How many times as fast as an arm of others ours must be.
    fn bound(&self, peer: &str) -> Limit {
        if peer.starts_with(KINDS[0].0) { self.bound } else { Limit::Open }
    }

    fn what(&self) -> String {
        let context = if self.context < 1000 { self.context.to_string() } else { thousands(self.context) };
        let model = if self.model == QWEN { "Qwen3-0.6B" } else { "Llama-3.2-1B" };
        format!("{model}, {} × {context}", self.rows)
    }

    /// What a step must read: the weights once, and keys and values of every token.
    fn bytes(&self) -> u64 {
        let (weights, token) = bytes_of(self.model);
        weights + self.rows * self.context * token
    }
}

fn thousands(number: u64) -> String {
    format!("{},{:03}", number / 1000, number % 1000)
}

/// What is bounded, in the order in which it is asked.
static CASES: LazyLock<Vec<Case>> = LazyLock::new(|| {
    vec![
        Case::new(
            QWEN,
            (1, 1024),
            &[
                "hf-compile-1x1024",
                "hf-flex-1x1024",
                "hf-cudagraph-1x1024",
                "torch-cudagraph-1x1024",
                "fi-python-1x1024",
            ],
        ),
        Case::new(
            QWEN,
            (32, 1024),
            &["hf-compile-32x1024", "hf-flex-32x1024", "torch-cudagraph-32x1024", "fi-python-32x1024"],
        ),
        Case::new(
            QWEN,
            (1, 8192),
            &["hf-compile-1x8192", "hf-flex-1x8192", "torch-cudagraph-1x8192", "fi-python-1x8192"],
        ),
        Case::new(
            LLAMA,
            (1, 1024),
            &["hf-compile-llama-1x1024", "torch-cudagraph-llama-1x1024", "fi-python-llama-1x1024"],
        ),
    ]
});

static BUILD: LazyLock<String> = LazyLock::new(|| format!("build {QWEN} 32"));
static ARENA: LazyLock<String> = LazyLock::new(|| format!("arena {QWEN} 32"));
static ERROR: LazyLock<String> = LazyLock::new(|| format!("error {QWEN}"));
/// By layer, counted from 1.
static RESIDUALS: LazyLock<Vec<String>> =
    LazyLock::new(|| (1..=LAYERS).map(|layer| format!("residual {QWEN} {layer}")).collect());
static COPY: LazyLock<String> = LazyLock::new(copy_case);

fn questions() -> Vec<Question> {
    let ask = |case: &str, arms| Question { case: case.to_owned(), arms, blocks: Blocks::Every, rounds: 1 };
    // Torch's profiler and the logits take seconds, and answer the same each time.
    let once = |case: &str, arms| Question { blocks: Blocks::First, ..ask(case, arms) };
    let first = &CASES[0];
    // The logits first: they have the GPU's memory nearly for themselves.
    let mut all = vec![ask(&COPY, &["limits"]), once(&ERROR, &[OURS])];
    all.extend(RESIDUALS.iter().map(|case| once(case, &[OURS])));
    for case in CASES.iter() {
        all.push(ask(&case.step, &[OURS]));
        all.push(ask(&case.step, case.peers));
        all.push(ask(&case.host, &[OURS]));
        all.push(ask(&case.kernels, &[OURS]));
        all.push(once(&case.kernels, case.peers));
    }
    all.extend([ask(&BUILD, &[OURS]), ask(&ARENA, &[OURS])]);
    all.push(ask(&first.step, &["ours-graph", "ours-eager"]));
    all.push(ask(&first.host, &["ours-graph", "ours-eager"]));
    all.push(ask(&first.step, ABLATIONS));
    all.push(once(&first.kernels, ABLATIONS));
    all.push(ask(&first.few, EAGER));
    all.push(once(&first.kernels, EAGER));
    all
}

static COMPARISONS: LazyLock<Vec<Comparison>> = LazyLock::new(|| {
    let row = |what: String, formula, limit| Comparison { what: Cow::Owned(what), formula, limit };
    let first = &CASES[0];
    let ours = (OURS, first.step.as_str());
    let mut all = Vec::new();
    for case in CASES.iter() {
        let (what, step) = (case.what(), (OURS, case.step.as_str()));
        for arm in case.peers {
            all.push(row(format!("{arm} / ours, {what}"), Formula::Ratio((arm, &case.step), step), case.bound(arm)));
        }
        let formula = Formula::TimesRatio(case.bytes() as f64 / (2 * COPY_BYTES) as f64, ("limits", &COPY), step);
        all.push(row(format!("share of the roofline, {what}"), formula, case.share));
    }
    all.push(row(format!("µs of a step, {}", first.what()), Formula::Times(1e-3, ours), Limit::AtMost(1000.0)));
    let kernels = Formula::Times(1.0, (OURS, &first.kernels));
    all.push(row(format!("kernels of a step, {}", first.what()), kernels, Limit::AtMost(260.0)));
    let host = Formula::Times(1e-3, (OURS, &first.host));
    all.push(row("host: µs of a step while another is queued".to_owned(), host, Limit::AtMost(15.0)));
    let arena = Formula::Times(1.0, (OURS, &ARENA));
    all.push(row("arena of 32 rows by its lower bound".to_owned(), arena, Limit::AtMost(1.1)));
    let build = Formula::Times(1e-6, (OURS, &BUILD));
    all.push(row("ms to build, fuse, plan and prove 28 layers".to_owned(), build, Limit::AtMost(20.0)));
    let error = Formula::Times(1.0, (OURS, &ERROR));
    all.push(row("error against F32 by transformers' own in bf16".to_owned(), error, Limit::AtMost(1.25)));
    for layer in [1, LAYERS / 2, LAYERS] {
        let formula = Formula::Times(1.0, (OURS, RESIDUALS[layer - 1].as_str()));
        all.push(row(format!("the same of the residual stream behind layer {layer}"), formula, Limit::AtMost(1.25)));
    }
    for arm in EAGER {
        all.push(row(format!("{arm} / ours, {}", first.what()), Formula::Ratio((arm, &first.few), ours), Limit::Open));
    }
    for arm in ["ours-graph", "ours-eager"].iter().chain(ABLATIONS) {
        let formula = Formula::Ratio((arm, &first.step), ours);
        all.push(row(format!("{arm} / ours, {}", first.what()), formula, Limit::Open));
    }
    all
});

// ---- the report ----

fn markdown(machine: &Machine, samples: &Samples) -> String {
    let copy = copy_rate(samples).map_or("not measured".to_owned(), |rate| format!("{rate:.0} GB/s"));
    let mut text = format!(
        "# A decoder's step\n\nbf16, random weights of the models' shapes, greedy, caches full of random keys and values, ours in pages of \
         16 tokens in any order. One process per arm, all alive at once and on one core, asked in turn in each of {} blocks. Every value \
         is in [decoder.csv](decoder.csv).\n\n`{}`\n\n{}\n| arm | what |\n|---|---|\n",
        machine.blocks,
        machine.command,
        report::described(machine),
    );
    for arm in &ARMS {
        let _ = writeln!(text, "| `{}` | {} |", arm.name, arm.what);
    }
    let _ = write!(
        text,
        "\n## Bounds\n\n{}\nEach figure is the median over blocks of what is computed within a block, with the interval that holds the \
         true median with 95 % probability, from order statistics. What takes long and is the same in every block, torch's kernels and \
         the error, is asked in the first alone.\n\n\
         ## Steps\n\nµs of a step, between events around {STEPS} that were queued ({FEW} of transformers without a compiler or a graph). \
         The roofline is the bytes of the weights and of all keys and values at the bandwidth of a copy of {} MiB on the device, {copy}, \
         counting what is read and what is written.\n\n\
         | case | µs | 95 % interval | kernels | tokens/s | GB | roofline µs | share | host µs |\n|---|---|---|---|---|---|---|---|---|\n",
        report::bounds(&COMPARISONS, samples),
        COPY_BYTES >> 20,
    );
    let whole = |arm, case: &str| cell(machine, samples, arm, case, |count| format!("{count:.0}"));
    let micro = |arm, case: &str| cell(machine, samples, arm, case, |ns| format!("{:.1}", ns / 1e3));
    let interval = |formula: Formula<'_>, digits: usize| {
        let found = plan::estimate(formula, samples).and_then(|found| found.interval);
        found.map_or(String::new(), |(low, high)| format!("{low:.digits$} to {high:.digits$}"))
    };
    for case in CASES.iter() {
        let ours = plan::median(samples, OURS, &case.step);
        let floor = copy_rate(samples).map(|rate| case.bytes() as f64 / rate);
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {:.2} | {} | {} | {} |",
            case.what(),
            micro(OURS, &case.step),
            interval(Formula::Times(1e-3, (OURS, &case.step)), 1),
            whole(OURS, &case.kernels),
            ours.map_or(String::new(), |ns| format!("{:.0}", case.rows as f64 * 1e9 / ns)),
            case.bytes() as f64 / 1e9,
            floor.map_or(String::new(), |ns| format!("{:.1}", ns / 1e3)),
            floor.zip(ours).map_or(String::new(), |(floor, ours)| format!("{:.2}", floor / ours)),
            micro(OURS, &case.host),
        );
    }
    text += "\n![A decoder's step](decoder.svg)\n\n![Share of the roofline](decoder-roofline.svg)\n\n## Beside others\n\nThe ratio is \
             how many times as long as ours a step takes.\n\n| case | | µs | 95 % interval | kernels | ratio | 95 % interval |\n\
             |---|---|---|---|---|---|---|\n";
    let mut beside = |case: &Case, arm: &'static str, what: &str, step: &str| {
        let ratio = Formula::Ratio((arm, step), (OURS, &case.step));
        let found = plan::estimate(ratio, samples).map_or(String::new(), |found| format!("{:.2}", found.median));
        let _ = writeln!(
            text,
            "| {} | {what} | {} | {} | {} | {found} | {} |",
            case.what(),
            micro(arm, step),
            interval(Formula::Times(1e-3, (arm, step)), 1),
            whole(arm, &case.kernels),
            interval(ratio, 2),
        );
    };
    let first = &CASES[0];
    for case in CASES.iter() {
        for (kind, what) in KINDS {
            let arm = case.peers.iter().find(|arm| arm.starts_with(kind));
            arm.into_iter().for_each(|arm| beside(case, arm, what, &case.step));
        }
    }
    beside(first, EAGER[0], "transformers, StaticCache", &first.few);
    beside(first, EAGER[1], "transformers, DynamicCache", &first.few);
    let _ = write!(
        text,
        "\n## What each part brings\n\n{}.\n\n| arm | µs | 95 % interval | kernels | host µs |\n|---|---|---|---|---|\n",
        first.what()
    );
    for arm in ARMS.iter().filter(|arm| arm.program == Program::Rust) {
        let (us, kernels, host) =
            (micro(arm.name, &first.step), whole(arm.name, &first.kernels), micro(arm.name, &first.host));
        let between = interval(Formula::Times(1e-3, (arm.name, &first.step)), 1);
        let _ = writeln!(text, "| `{}` | {us} | {between} | {kernels} | {host} |", arm.name);
    }
    let by_layer: Vec<_> = RESIDUALS.iter().filter_map(|case| plan::median(samples, OURS, case)).collect();
    if !by_layer.is_empty() {
        text += "\n## Error by layer\n\nHow far what a layer of Qwen3-0.6B leaves in the residual stream is from F32's, by how far \
                 transformers' own in bf16 is: the largest of the references' ratios.\n\n| layer | times |\n|---|---|\n";
        for (layer, ratio) in by_layer.iter().enumerate() {
            let _ = writeln!(text, "| {} | {ratio:.2} |", layer + 1);
        }
    }
    text + &failures(machine)
}

const LEGEND: &[(&str, plotters::style::RGBColor)] = &[("Rust, this crate", RUST), ("Python", PYTHON)];

/// The arms of a case, and which of the case's requests each answers with its step's time.
fn timed(case: &'static Case) -> impl Iterator<Item = (&'static str, &'static str)> {
    let first = std::ptr::eq(case, &raw const CASES[0]);
    let all = std::iter::once(OURS).chain(case.peers.iter().copied());
    let more: &[&str] = if first { &["ours-graph", "ours-eager", "ours-unfused"] } else { &[] };
    let steps = all.chain(more.iter().copied()).map(|arm| (arm, case.step.as_str()));
    steps.chain(first.then(|| EAGER.iter().map(|arm| (*arm, case.few.as_str()))).into_iter().flatten())
}

fn rows(samples: &Samples, value: impl Fn(&Case, f64) -> Option<(f64, String)>) -> Vec<Row> {
    let mut rows = Vec::new();
    for case in CASES.iter() {
        for (arm, request) in timed(case) {
            let found = plan::median(samples, arm, request).and_then(|ns| value(case, ns));
            let Some((value, label)) = found else { continue };
            let color = if arm.starts_with("ours") { RUST } else { PYTHON };
            let kind = KINDS.iter().map(|(kind, _)| *kind).find(|kind| arm.starts_with(kind)).unwrap_or(arm);
            rows.push(Row { name: format!("{}: {kind}", case.what()), color, value, range: None, bound: None, label });
        }
    }
    rows
}

fn steps(samples: &Samples) -> Result<String> {
    figures::lines(&Rows {
        title: "A decoder's step, bf16: tokens a second of one sequence",
        note: "between events around queued steps; more is better",
        axis: "tokens/s",
        rows: rows(samples, |_, ns| Some((1e9 / ns, format!("{:.0} ({:.0} µs)", 1e9 / ns, ns / 1e3)))),
        bars: true,
        legend: LEGEND,
    })
}

fn shares(samples: &Samples) -> Result<String> {
    let copy = copy_rate(samples);
    let mut rows = rows(samples, |case, ns| {
        let share = case.bytes() as f64 / ns / copy?;
        Some((share, format!("{share:.2}")))
    });
    rows.iter_mut().for_each(|row| row.bound = Some(1.0));
    figures::lines(&Rows {
        title: "A decoder's step: share of the roofline",
        note: "bytes of weights, keys and values per second, over those of a copy on the device; more is better",
        axis: "share",
        rows,
        bars: true,
        legend: &[LEGEND, &[("a copy", BOUND)]].concat(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::plan::Verdict;
    use super::super::record::Sample;
    use super::*;

    /// Ours at 800 µs, what torch compiles at 3 ms, at a copy of 3,000 GB/s; without flex.
    fn recorded() -> (Machine, Samples) {
        let mut samples = vec![
            Sample::new(0, "limits", &COPY, 2.0 * COPY_BYTES as f64 / 3000.0),
            Sample::new(0, OURS, &BUILD, 9e6),
            Sample::new(0, OURS, &ARENA, 1.05),
            Sample::new(0, OURS, &ERROR, 0.8),
            Sample::new(0, OURS, &RESIDUALS[0], 1.5),
            Sample::new(0, "hf-eager", &CASES[0].few, 46e6),
        ];
        for case in CASES.iter() {
            samples.push(Sample::new(0, OURS, &case.step, 800_000.0));
            samples.push(Sample::new(0, OURS, &case.host, 16_000.0));
            samples.push(Sample::new(0, OURS, &case.kernels, 257.0));
            samples.push(Sample::new(0, case.peers[0], &case.step, 3e6));
        }
        let machine = Machine::imagined(
            "DIR/bench DIR/performance --decoder --blocks 1",
            "hf-flex-1x1024",
            "it does not compile",
        );
        (machine, samples.into_iter().collect())
    }

    #[test]
    fn ratios_and_shares_are_computed_of_times_and_judged() {
        let (_, samples) = recorded();
        let verdict = |what: &str| {
            let comparison = COMPARISONS.iter().find(|comparison| comparison.what.starts_with(what)).unwrap();
            let found = comparison.found(&samples);
            (found.map(|found| found.median), comparison.verdict(found))
        };
        assert_eq!(verdict("hf-compile-1x1024 / ours"), (Some(3.75), Verdict::Kept));
        assert_eq!(verdict("hf-compile-32x1024 / ours"), (Some(3.75), Verdict::Missed));
        assert_eq!(verdict("hf-flex-1x1024 / ours").1, Verdict::Open);
        let (share, kept) = verdict("share of the roofline, Qwen3-0.6B, 1 × 1,024");
        let bytes = 2.0 * 596_049_920.0 + 1024.0 * 114_688.0;
        assert!((share.unwrap() - bytes / 800_000.0 / 3000.0).abs() < 1e-9 && kept == Verdict::Kept);
        assert_eq!(verdict("share of the roofline, Llama-3.2-1B").1, Verdict::Kept);
        assert_eq!(verdict("host: µs of a step"), (Some(16.0), Verdict::Missed));
        assert_eq!(verdict("kernels of a step"), (Some(257.0), Verdict::Kept));
        assert_eq!(verdict("ms to build"), (Some(9.0), Verdict::Kept));
        assert_eq!(verdict("error against F32"), (Some(0.8), Verdict::Kept));
        assert_eq!(verdict("the same of the residual stream behind layer 1"), (Some(1.5), Verdict::Missed));
        assert_eq!(verdict("the same of the residual stream behind layer 28").1, Verdict::NotMeasured);
    }

    #[test]
    fn the_report_has_each_case_and_says_what_is_missing() {
        let (machine, samples) = recorded();
        let text = markdown(&machine, &samples);
        assert!(text.contains("| hf-flex-1x1024 | it does not compile |"));
        let row = "| Qwen3-0.6B, 1 × 1,024 | 800.0 |  | 257 | 1250 | 1.31 | 436.5 | 0.55 | 16.0 |";
        assert!(text.contains(row), "{text}");
        assert!(text.contains("| Qwen3-0.6B, 1 × 1,024 | torch.compile | 3000.0 |  |  | 3.75 |  |"), "{text}");
        assert!(text.contains("| Qwen3-0.6B, 1 × 1,024 | torch.compile, flex_attention | missing |"), "{text}");
        assert!(
            text.contains("| Qwen3-0.6B, 1 × 1,024 | transformers, StaticCache | 46000.0 |  |  | 57.50 |  |"),
            "{text}"
        );
        assert!(text.contains("## Error by layer") && text.contains("\n| 1 | 1.50 |\n"), "{text}");
        for case in CASES.iter() {
            // Ours, and each of others.
            let eager = if case.model == QWEN && (case.rows, case.context) == (1, 1024) { EAGER.len() } else { 0 };
            let rows = text.matches(&format!("\n| {} |", case.what())).count();
            assert_eq!(rows, 1 + case.peers.len() + eager, "{}", case.what());
        }
        assert!(steps(&samples).unwrap().contains("Qwen3-0.6B, 32 × 1,024: hf-compile"));
        assert!(shares(&samples).unwrap().contains("Llama-3.2-1B, 1 × 1,024: ours-pdl"));
    }

    #[test]
    fn each_arm_of_others_is_of_a_kind_and_of_one_case() {
        let peers: Vec<_> = CASES.iter().flat_map(|case| case.peers.iter().copied()).collect();
        for arm in ARMS.iter().filter(|arm| arm.program == Program::Python && !EAGER.contains(&arm.name)) {
            assert_eq!(peers.iter().filter(|peer| **peer == arm.name).count(), 1, "{}", arm.name);
            assert!(KINDS.iter().any(|(kind, _)| arm.name.starts_with(kind)), "{}", arm.name);
        }
        let bounded = |peer: &&str| CASES[0].bound(peer) != Limit::Open;
        assert_eq!(CASES[0].peers.iter().filter(|peer| bounded(peer)).count(), 1);
    }

    #[test]
    fn six_blocks_have_an_interval() {
        let samples: Samples =
            (0..6).map(|block| Sample::new(block, OURS, &CASES[3].step, 1e6 + block as f64 * 1e3)).collect();
        let (machine, _) = recorded();
        let text = markdown(&machine, &samples);
        assert!(text.contains("| Llama-3.2-1B, 1 × 1,024 | 1002.5 | 1000.0 to 1005.0 |"), "{text}");
        assert_eq!(usize::from(SUITE.blocks.0), 6);
    }

    #[test]
    fn what_is_compared_and_shown_is_asked() {
        plan::assert_asked(&ARMS, &questions(), &COMPARISONS);
    }
}
