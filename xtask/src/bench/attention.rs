//! `cargo xtask bench --attention`: attention planned and run, from Rust beside C, FlashInfer's Python and torch.

use std::borrow::Cow;
use std::fmt::Write;
use std::sync::LazyLock;

use super::Suite;
use super::families::{COPY_BYTES, cell, copy_case, copy_rate, failures};
use super::figures::{self, BOUND, C, PYTHON, RUST, Row, Rows};
use super::plan::{self, Arm, Blocks, Comparison, Formula, Limit, Program, Question, arm};
use super::process::PATIENCE;
use super::record::{Machine, Samples};
use super::report;
use crate::bundle;
use crate::vendoring::error::Result;

pub static SUITE: Suite = Suite {
    name: "attention",
    option: " --attention",
    arms: &ARMS,
    rust: &bundle::ATTENTION,
    c: "attention",
    python: "attention.py",
    blocks: (3, 1),
    questions,
    // They keep a good deal of memory, and take long to start.
    generation: |_, _, _| 0,
    tolerant: true,
    patience: PATIENCE,
    comparisons: || &COMPARISONS,
    report: markdown,
    figures: |samples| {
        Ok(vec![("attention-decode.svg", decode(samples)?), ("attention-prefill.svg", prefill(samples)?)])
    },
};

/// In the order of every table.
static ARMS: [Arm; 6] = [
    arm("limits", Program::C, "copies on the device"),
    arm("c", Program::C, "the modules' own functions, arguments packed once, stream set and restored for each call"),
    arm(
        "ours",
        Program::Rust,
        "`Workspace::plan`, `Plan::run`, and in graphs `GraphPlan`; of tensors that are made once",
    ),
    arm("flashinfer", Program::Python, "FlashInfer's wrappers, over the same modules"),
    arm("torch", Program::Python, "torch's `scaled_dot_product_attention`, over keys without pages"),
    arm("torch-flex", Program::Python, "torch's `flex_attention` under torch.compile, likewise"),
];

const CLOSE: &[&str] = &["ours", "c"];
const PAGED: &[&str] = &["ours", "c", "flashinfer"];
const ALL: &[&str] = &["ours", "c", "flashinfer", "torch"];

const Q_HEADS: u64 = 32;
const KV_HEADS: u64 = 8;
const HEAD: u64 = 128;
const PAGE_SIZE: u64 = 16;

/// Caches of layers that take turns are larger together than any GPU's L2 cache, so that keys come from memory.
const TOGETHER: u64 = 200_000_000;
const MOST_LAYERS: u64 = 16;
/// Runs that are queued at once, at most: as long as a copy ahead of them lasts.
const MOST_QUEUED: u64 = 32;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Decode,
    Paged,
    Ragged,
}

/// A batch, and how it is computed. Cases of each WHAT of benches/c/attention.c.
struct Case {
    kind: Kind,
    /// `cores`, `fa2` or `fa3`.
    backend: &'static str,
    requests: u64,
    length: u64,
    plan: String,
    tables: String,
    run: String,
    gpu: String,
    /// Keys that lie one after the other have none.
    graph: Option<String>,
    /// Runs that are timed at once on the host.
    batch: u64,
}

impl Case {
    fn new(kind: Kind, backend: &'static str, requests: u64, length: u64) -> Self {
        let name = match kind {
            Kind::Decode => "decode",
            Kind::Paged => "paged",
            Kind::Ragged => "ragged",
        };
        let cache = 4 * requests * length * KV_HEADS * HEAD;
        let (layers, seconds) = match kind {
            Kind::Decode => (TOGETHER.div_ceil(cache).clamp(1, MOST_LAYERS), 1e-5 + cache as f64 / 2.5e12),
            _ => (1, 1e-5 + flop(requests, length) / 4e14),
        };
        let batch = (2e-3 / seconds).clamp(1.0, 20.0) as u64;
        let queued = layers.max((6e-3 / seconds).clamp(2.0, MOST_QUEUED as f64) as u64);
        let of = |what: &str, count: u64| format!("{what} {name} {backend} {requests} {length} {layers} {count}");
        Self {
            kind,
            backend,
            requests,
            length,
            // As many as a workspace takes without a wait.
            plan: of("plan", 4),
            tables: of("tables", 4),
            run: of("run", batch),
            gpu: of("gpu", queued),
            graph: (kind != Kind::Ragged).then(|| of("graph", queued)),
            batch,
        }
    }

    fn what(&self) -> String {
        let length = thousands(self.length);
        let kind = match self.kind {
            Kind::Decode => return format!("decode {} × {length}, {}", self.requests, self.backend_name()),
            Kind::Paged => "pages",
            Kind::Ragged => "without pages",
        };
        format!("prefill {length}, {kind}, {}", self.backend_name())
    }

    fn backend_name(&self) -> &'static str {
        match self.backend {
            "cores" => "CUDA cores",
            "fa2" => "FA2",
            _ => "FA3",
        }
    }

    /// What a run must read and write.
    fn bytes(&self) -> u64 {
        let rows = if self.kind == Kind::Decode { self.requests } else { self.requests * self.length };
        2 * (2 * self.requests * self.length * KV_HEADS * HEAD + 2 * rows * Q_HEADS * HEAD)
    }

    fn flop(&self) -> f64 {
        flop(self.requests, self.length)
    }
}

/// Of causal attention over as many queries as keys: half of all products, twice, for queries and keys and for values.
fn flop(requests: u64, length: u64) -> f64 {
    (requests * 2 * length * length * Q_HEADS * HEAD) as f64
}

fn thousands(number: u64) -> String {
    if number < 1000 { number.to_string() } else { format!("{},{:03}", number / 1000, number % 1000) }
}

/// What is bounded, and otherwise looked at more closely: 64 × 8,192 and 1 × 8,192.
const MANY: (u64, u64) = (64, 8192);
const ONE: (u64, u64) = (1, 8192);
const PREFILLS: [u64; 4] = [512, 2048, 8192, 32_768];
const BOUNDED_PREFILL: u64 = 8192;

static CASES: LazyLock<Vec<Case>> = LazyLock::new(|| {
    let mut all = Vec::new();
    let both = |(requests, length)| ["cores", "fa2"].map(|backend| Case::new(Kind::Decode, backend, requests, length));
    // What is bounded first, for where there is little time.
    all.extend([MANY, ONE].into_iter().flat_map(both));
    all.extend(["fa3", "fa2"].map(|backend| Case::new(Kind::Ragged, backend, 1, BOUNDED_PREFILL)));
    all.extend(["fa3", "fa2"].map(|backend| Case::new(Kind::Paged, backend, 1, BOUNDED_PREFILL)));
    for requests in [1, 4, 16, 64, 256] {
        for length in [1024, 8192, 32_768] {
            match (requests, length) {
                MANY | ONE => {}
                (1 | 16, _) | (256, 1024) => all.extend(both((requests, length))),
                _ => all.push(Case::new(Kind::Decode, "cores", requests, length)),
            }
        }
    }
    for length in PREFILLS.into_iter().filter(|length| *length != BOUNDED_PREFILL) {
        all.extend(["fa3", "fa2"].map(|backend| Case::new(Kind::Ragged, backend, 1, length)));
    }
    all
});

/// A decode of one request, until the GPU is done, and the making of a batch, for a page.
const STEP: &str = "step decode cores 1 8192 6 60";
const STEP_FA2: &str = "step decode fa2 1 8192 6 60";
const PAGES: &str = "pages decode cores 64 8192 1 20";

/// How often each of the arms whose host time is bounded is asked within a block, in turn with the others.
const ROUNDS: usize = 3;

fn questions() -> Vec<Question> {
    let ask = |case: &str, arms, rounds| Question { case: case.to_owned(), arms, blocks: Blocks::Every, rounds };
    let mut all = vec![ask(&copy_case(), &["limits"], 1), ask(PAGES, &["ours"], 1)];
    for case in CASES.iter() {
        let size = (case.requests, case.length);
        let once = matches!((case.kind, case.backend), (Kind::Decode, "cores") | (Kind::Ragged, "fa3"));
        let with_torch = if once { ALL } else { PAGED };
        all.push(ask(&case.plan, CLOSE, ROUNDS));
        all.push(ask(&case.plan, &["flashinfer"], 1));
        all.push(ask(&case.tables, &["c"], 1));
        all.push(ask(&case.run, CLOSE, if case.batch < BOUNDED_BATCH { 1 } else { ROUNDS }));
        all.push(ask(&case.run, if once { &["flashinfer", "torch"] } else { &["flashinfer"] }, 1));
        all.push(ask(&case.gpu, with_torch, 1));
        if case.kind == Kind::Ragged && once && case.length == BOUNDED_PREFILL {
            all.push(ask(&case.gpu, &["torch-flex"], 1));
        }
        if case.kind == Kind::Decode && size == ONE {
            all.push(ask(if once { STEP } else { STEP_FA2 }, with_torch, 1));
        }
        if let Some(graph) = &case.graph {
            all.push(ask(graph, CLOSE, 1));
        }
    }
    all
}

/// Runs on the host are bounded where so many are timed at once.
const BOUNDED_BATCH: u64 = 4;

static COMPARISONS: LazyLock<Vec<Comparison>> = LazyLock::new(|| {
    let ratio = |what: String, case: &'static str, limit| Comparison {
        what: Cow::Owned(what),
        formula: Formula::Ratio((CLOSE[0], case), (CLOSE[1], case)),
        limit,
    };
    let limit = LazyLock::force(&COPY);
    let mut all = vec![Comparison {
        what: "making a batch: ns for a page".into(),
        formula: Formula::Times(1.0, ("ours", PAGES)),
        limit: Limit::AtMost(20.0),
    }];
    for case in CASES.iter() {
        let what = case.what();
        if case.kind == Kind::Decode && (case.requests, case.length) == ONE {
            all.push(Comparison {
                what: format!("host and GPU: µs of {what}").into(),
                formula: Formula::Times(1e-3, ("ours", if case.backend == "cores" { STEP } else { STEP_FA2 })),
                limit: Limit::AtMost(25.0),
            });
        }
        if case.kind == Kind::Decode && (case.requests, case.length) == MANY {
            all.push(Comparison {
                what: format!("GPU: share of a copy's bandwidth, {what}").into(),
                formula: Formula::TimesRatio(
                    case.bytes() as f64 / (2 * COPY_BYTES) as f64,
                    ("limits", limit),
                    ("ours", &case.gpu),
                ),
                limit: Limit::AtLeast(0.85),
            });
            all.push(Comparison {
                what: format!("host: ms of a plan, {what}").into(),
                formula: Formula::Times(1e-6, ("ours", &case.plan)),
                limit: Limit::AtMost(1.0),
            });
        }
        if case.kind != Kind::Decode && case.backend == "fa3" && case.length == BOUNDED_PREFILL {
            all.push(Comparison {
                what: format!("GPU: TFLOP/s, {what}").into(),
                formula: Formula::Per(case.flop() / 1e3, ("ours", &case.gpu)),
                limit: Limit::AtLeast(640.0),
            });
        }
        all.push(ratio(format!("host: plan, ours / c, {what}"), &case.plan, Limit::AtMost(1.2)));
        all.push(Comparison {
            what: format!("host: plan, ours / c with the tables, {what}").into(),
            formula: Formula::Ratio(("ours", &case.plan), ("c", &case.tables)),
            limit: Limit::AtMost(1.2),
        });
        let bounded = if case.batch < BOUNDED_BATCH { Limit::Open } else { Limit::AtMost(1.06) };
        all.push(ratio(format!("host: run, ours / c, {what}"), &case.run, bounded));
        all.push(ratio(format!("GPU: ours / c, {what}"), &case.gpu, Limit::NearOne(0.02)));
        if let Some(graph) = &case.graph {
            all.push(ratio(format!("GPU, in a graph: ours / c, {what}"), graph, Limit::NearOne(0.02)));
        }
    }
    all
});

static COPY: LazyLock<String> = LazyLock::new(copy_case);

// ---- the report ----

fn markdown(machine: &Machine, samples: &Samples) -> String {
    let copy = copy_rate(samples).map_or("not measured".to_owned(), |rate| format!("{rate:.0} GB/s"));
    let mut text = format!(
        "# Attention and its peers\n\n{Q_HEADS} query heads and {KV_HEADS} key heads of {HEAD}, bf16, pages of {PAGE_SIZE} tokens. One \
         process per arm, all alive at once and on one core, asked in turn in each of {} blocks. A block's host time from Rust and C is \
         the median of {ROUNDS} turns. Every value is in [attention.csv](attention.csv).\n\n`{}`\n\n{}\n| arm | what |\n|---|---|\n",
        machine.blocks,
        machine.command,
        report::described(machine),
    );
    for arm in &ARMS {
        let _ = writeln!(text, "| `{}` | {} |", arm.name, arm.what);
    }
    let _ = write!(
        text,
        "\n## Bounds\n\n{}\nEach figure is the median over blocks of what is computed within a block. A plan of C's is the planner's call \
         alone; ours also brings the batch's tables to the GPU, which `c with the tables` does too. A run on the host is bounded where \
         {BOUNDED_BATCH} or more are timed at once.\n\n\
         ## GPU time\n\nOf a run, µs, between two events: runs are queued behind a copy, so that the first starts when all of them are \
         queued, over caches that take turns (up to {MOST_LAYERS}, as a model's layers do). Graphs have as many runs, are planned for \
         graphs, and have no programmatic dependent launch. A copy of {} MiB on the device, CUDA's own or a kernel's, whichever is \
         faster: {copy}, counting what is read and what is written.\n\n",
        report::bounds(&COMPARISONS, samples),
        COPY_BYTES >> 20,
    );
    text += "| case | `ours` | `c` | ratio | `flashinfer` | `torch` | `torch-flex` | graph, `ours` | graph, `c` | GB/s | share of a copy | \
             TFLOP/s |\n|---|---|---|---|---|---|---|---|---|---|---|---|\n";
    for case in CASES.iter() {
        let micro = |arm, case: &str| cell(machine, samples, arm, case, |ns| format!("{:.2}", ns / 1e3));
        let graph = |arm| case.graph.as_ref().map_or(String::new(), |graph| micro(arm, graph));
        let ns = plan::median(samples, "ours", &case.gpu);
        let decode = case.kind == Kind::Decode;
        let rate = ns.filter(|_| decode).map(|ns| case.bytes() as f64 / ns);
        let share = rate.zip(copy_rate(samples)).map(|(rate, copy)| rate / copy);
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            case.what(),
            micro("ours", &case.gpu),
            micro("c", &case.gpu),
            found_ratio(samples, &case.gpu),
            micro("flashinfer", &case.gpu),
            micro("torch", &case.gpu),
            micro("torch-flex", &case.gpu),
            graph("ours"),
            graph("c"),
            rate.map_or(String::new(), |rate| format!("{rate:.0}")),
            share.map_or(String::new(), |share| format!("{share:.2}")),
            ns.filter(|_| !decode).map_or(String::new(), |ns| format!("{:.0}", case.flop() / ns / 1e3)),
        );
    }
    text += "\n![Decode: share of a copy's bandwidth](attention-decode.svg)\n\n![Prefill: TFLOP/s](attention-prefill.svg)\n\n\
             ## Host time\n\nOf a call until it returns, ns. The GPU is idle when a batch of calls begins, and waiting for it is not in \
             the time.\n\n\
             | case | plan, `ours` | `c` | ratio | `c` with the tables | `flashinfer` | run, `ours` | `c` | ratio | `flashinfer` | `torch` |\n\
             |---|---|---|---|---|---|---|---|---|---|---|\n";
    for case in CASES.iter() {
        let nano = |arm, case: &str| cell(machine, samples, arm, case, |ns| format!("{ns:.0}"));
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            case.what(),
            nano("ours", &case.plan),
            nano("c", &case.plan),
            found_ratio(samples, &case.plan),
            nano("c", &case.tables),
            nano("flashinfer", &case.plan),
            nano("ours", &case.run),
            nano("c", &case.run),
            found_ratio(samples, &case.run),
            nano("flashinfer", &case.run),
            nano("torch", &case.run),
        );
    }
    text += "\n## Host and GPU together\n\nA run of one request of 8,192 keys, planned before, until the GPU is done, µs.\n\n\
             | | `ours` | `c` | `flashinfer` | `torch` |\n|---|---|---|---|---|\n";
    for (name, case) in [("CUDA cores", STEP), ("FA2", STEP_FA2)] {
        let micro = |arm| cell(machine, samples, arm, case, |ns| format!("{:.1}", ns / 1e3));
        let _ = writeln!(
            text,
            "| {name} | {} | {} | {} | {} |",
            micro("ours"),
            micro("c"),
            micro("flashinfer"),
            micro("torch")
        );
    }
    text + &failures(machine)
}

/// Ours over C's.
fn found_ratio(samples: &Samples, case: &str) -> String {
    let found = plan::estimate(Formula::Ratio((CLOSE[0], case), (CLOSE[1], case)), samples);
    found.map_or(String::new(), |found| format!("{:.3}", found.median))
}

/// A row for each arm of each case; `value` is of nanoseconds.
fn rows(
    samples: &Samples,
    of: impl Fn(&Case) -> bool,
    value: impl Fn(&Case, f64) -> Option<(f64, String)>,
) -> Vec<Row> {
    let colors = [("ours", RUST), ("c", C), ("flashinfer", PYTHON), ("torch", PYTHON), ("torch-flex", PYTHON)];
    let mut rows = Vec::new();
    for case in CASES.iter().filter(|case| of(case)) {
        for (arm, color) in colors {
            let Some(ns) = plan::median(samples, arm, &case.gpu) else { continue };
            let Some((value, label)) = value(case, ns) else { continue };
            rows.push(Row { name: format!("{}: {arm}", case.what()), color, value, range: None, bound: None, label });
        }
    }
    rows
}

const LEGEND: &[(&str, plotters::style::RGBColor)] = &[("Rust, this crate", RUST), ("C", C), ("Python", PYTHON)];

fn decode(samples: &Samples) -> Result<String> {
    let copy = copy_rate(samples);
    let mut rows = rows(
        samples,
        |case| case.kind == Kind::Decode,
        |case, ns| {
            let share = case.bytes() as f64 / ns / copy?;
            Some((share, format!("{share:.2}")))
        },
    );
    rows.iter_mut().for_each(|row| row.bound = Some(1.0));
    figures::lines(&Rows {
        title: "Decode: share of a copy's bandwidth",
        note: "bytes that must be read and written per second, over those of a copy on the device; more is better",
        axis: "share",
        rows,
        bars: true,
        legend: &[LEGEND, &[("a copy", BOUND)]].concat(),
    })
}

fn prefill(samples: &Samples) -> Result<String> {
    figures::lines(&Rows {
        title: "Causal prefill: TFLOP/s",
        note: "products of the keys that a query sees; more is better",
        axis: "TFLOP/s",
        rows: rows(
            samples,
            |case| case.kind != Kind::Decode,
            |case, ns| {
                let rate = case.flop() / ns / 1e3;
                Some((rate, format!("{rate:.0}")))
            },
        ),
        bars: true,
        legend: LEGEND,
    })
}

#[cfg(test)]
mod tests {
    use super::super::plan::Verdict;
    use super::super::record::Sample;
    use super::*;

    /// As a run of one block on a machine without FlashInfer's Python leaves it: ours at 1.01 times C.
    fn recorded() -> (Machine, Samples) {
        let mut samples = vec![
            Sample::new(0, "limits", &copy_case(), 2.0 * COPY_BYTES as f64 / 3000.0),
            Sample::new(0, "ours", PAGES, 12.0),
            Sample::new(0, "ours", STEP, 24_000.0),
            Sample::new(0, "ours", STEP_FA2, 26_000.0),
        ];
        for case in CASES.iter() {
            for name in [&case.plan, &case.run, &case.gpu].into_iter().chain(&case.graph) {
                samples.push(Sample::new(0, "ours", name, 1_010_000.0));
                samples.push(Sample::new(0, "c", name, 1_000_000.0));
            }
        }
        let machine = Machine::imagined("DIR/bench DIR/performance --attention --blocks 1", "flashinfer", "no module");
        (machine, samples.into_iter().collect())
    }

    fn verdict(what: &str) -> (f64, Verdict) {
        let (_, samples) = recorded();
        let comparison = COMPARISONS.iter().find(|comparison| comparison.what.starts_with(what)).unwrap();
        let found = comparison.found(&samples);
        (found.unwrap().median, comparison.verdict(found))
    }

    #[test]
    fn figures_are_computed_of_times_and_judged() {
        assert_eq!(verdict("making a batch"), (12.0, Verdict::Kept));
        assert_eq!(verdict("host and GPU: µs of decode 1 × 8,192, CUDA cores"), (24.0, Verdict::Kept));
        assert_eq!(verdict("host and GPU: µs of decode 1 × 8,192, FA2"), (26.0, Verdict::Missed));
        // 64 · 8,192 keys of 4,096 bytes, and 64 rows of queries and of results of 8,192, in 1.01 ms.
        let (share, kept) = verdict("GPU: share of a copy's bandwidth, decode 64 × 8,192, FA2");
        let bytes = 64.0 * (8192.0 * 4096.0 + 2.0 * 8192.0);
        assert!((share - bytes / 1_010_000.0 / 3000.0).abs() < 1e-9 && kept == Verdict::Missed);
        // 2 · 8,192² · 4,096 operations in 1.01 ms.
        let (rate, kept) = verdict("GPU: TFLOP/s, prefill 8,192, without pages");
        assert!((rate - 2.0 * 8192.0_f64.powi(2) * 4096.0 / 1.01e-3 / 1e12).abs() < 1e-6 && kept == Verdict::Missed);
        assert_eq!(verdict("host: run, ours / c, decode 64 × 8,192").1, Verdict::Open);
        assert_eq!(verdict("host: run, ours / c, decode 1 × 8,192").1, Verdict::Kept);
        assert_eq!(verdict("GPU: ours / c, decode 64 × 8,192").1, Verdict::Kept);
    }

    #[test]
    fn the_report_has_each_case_and_says_what_is_missing() {
        let (machine, samples) = recorded();
        let text = markdown(&machine, &samples);
        assert!(text.contains("| flashinfer | no module |"));
        let expected =
            "| prefill 8,192, without pages, FA3 | 1010.00 | 1000.00 | 1.010 | missing |  |  |  |  |  |  | 544 |";
        assert!(text.contains(expected), "{text}");
        for case in CASES.iter() {
            assert_eq!(text.matches(&format!("\n| {} |", case.what())).count(), 2, "{}", case.what());
        }
        assert!(decode(&samples).unwrap().contains("decode 256 × 32,768, CUDA cores: ours"));
        assert!(prefill(&samples).unwrap().contains("prefill 512, without pages, FA2: c"));
    }

    #[test]
    fn what_is_compared_and_shown_is_asked() {
        plan::assert_asked(&ARMS, &questions(), &COMPARISONS);
    }

    #[test]
    fn caches_are_larger_than_the_l2_cache_together_and_fit_into_memory() {
        for case in CASES.iter().filter(|case| case.kind == Kind::Decode) {
            let layers: u64 = case.gpu.split(' ').nth(5).unwrap().parse().unwrap();
            let all = layers * 4 * case.requests * case.length * KV_HEADS * HEAD;
            assert!(layers == MOST_LAYERS || all >= TOGETHER, "{}", case.gpu);
            assert!(all <= 40_000_000_000, "{}", case.gpu);
        }
    }
}
