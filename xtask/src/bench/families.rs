//! `cargo xtask bench --families`: one call of each family, from Rust beside C and what there is in Python.

use std::borrow::Cow;
use std::fmt::Write;
use std::sync::LazyLock;

use super::Suite;
use super::figures::{self, BOUND, RUST, Row, Rows};
use super::plan::{self, Arm, Blocks, Comparison, Formula, Limit, Program, Question, arm};
use super::process::PATIENCE;
use super::record::{Machine, Samples};
use super::report;
use crate::bundle;
use crate::vendoring::error::Result;

pub static SUITE: Suite = Suite {
    name: "families",
    option: " --families",
    arms: &ARMS,
    rust: &bundle::FAMILIES,
    c: "families",
    python: "families.py",
    blocks: (5, 1),
    questions,
    // Where a process's memory lies makes it some nanoseconds faster or slower for good; those of Python take long to start.
    generation: |program, block, _| if program == Program::Python { 0 } else { block },
    tolerant: true,
    patience: PATIENCE,
    comparisons: || &COMPARISONS,
    report: markdown,
    figures: |samples| Ok(vec![("families.svg", shares(samples)?)]),
};

/// In the order of every table.
static ARMS: [Arm; 7] = [
    arm("limits", Program::C, "copies on the device; a kernel that reads and does nothing else"),
    arm("c", Program::C, "arguments packed once, stream set and restored for each call"),
    arm("tensors", Program::Rust, "the safe function, of tensors that are made once"),
    arm("safe", Program::Rust, "the safe function, of tensors that are made of cudarc's buffers for each call"),
    arm("flashinfer", Program::Python, "FlashInfer's own function, into outputs that are given where it takes them"),
    arm("torch", Program::Python, "torch's own expression of the same"),
    arm("torch-compile", Program::Python, "that under torch.compile, as one graph without breaks"),
];

/// Ours first.
const CLOSE: &[&str] = &["tensors", "c"];
const EAGER: &[&str] = &["tensors", "safe", "c"];
const PEERS: &[&str] = &["flashinfer", "torch", "torch-compile"];
const ON_GPU: &[&str] = &["tensors", "c", "flashinfer", "torch", "torch-compile"];

/// A call of a family.
struct Case {
    /// For the reader of the report.
    what: &'static str,
    /// Its name and sizes, as arms are asked for it.
    request: String,
    host: String,
    gpu: String,
    /// Tensors of the call, in place counted once; and how many arguments of the kernel's they are.
    tensors: usize,
    arguments: usize,
    /// What the call must read and write, in bytes.
    bytes: u64,
}

/// Larger together than three times the L2 cache of any GPU so far, so that what is read comes from memory.
const TOGETHER: u64 = 400_000_000;
/// As far as so many sets of tensors go: those of the smallest cases stay in the cache.
const MOST_SETS: u64 = 256;
/// Calls of a graph, at least.
const LEAST_CALLS: u64 = 100;

/// Sets of tensors that take turns in a graph, and how often each is there.
fn rotation(bytes: u64) -> (u64, u64) {
    let sets = TOGETHER.div_ceil(bytes).clamp(1, MOST_SETS);
    (sets, LEAST_CALLS.div_ceil(sets))
}

fn gpu(request: &str, bytes: u64) -> String {
    let (sets, rounds) = rotation(bytes);
    format!("gpu {request} {sets} {rounds}")
}

/// `batch` calls are timed at once: fewer of those that keep a GPU busy for long.
fn case(what: &'static str, request: &str, batch: u64, (tensors, arguments): (usize, usize), bytes: u64) -> Case {
    let (host, gpu) = (format!("host {request} {batch}"), gpu(request, bytes));
    Case { what, request: request.to_owned(), host, gpu, tensors, arguments, bytes }
}

const Q_HEADS: u64 = 32;
const KV_HEADS: u64 = 8;
const HEAD: u64 = 128;
const D: u64 = 14_336;

/// Queries and keys are read and written, and of each token the table's row and its position read.
fn rope_bytes(tokens: u64) -> u64 {
    tokens * (2 * 2 * (Q_HEADS + KV_HEADS) * HEAD + 4 * HEAD + 4)
}

/// Keys and values are read and written, and of each token its request and its position read.
fn append_bytes(tokens: u64) -> u64 {
    tokens * (2 * 2 * 2 * KV_HEADS * HEAD + 8)
}

/// Queries, keys and values are read, and written with half as many bytes.
fn rope_append_bytes(tokens: u64) -> u64 {
    tokens * (3 * (Q_HEADS + 2 * KV_HEADS) * HEAD + 4 * HEAD + 12)
}

const BITS: u64 = 1 << 20;
const VOCAB: u64 = 128_256;
const ROWS: u64 = 32;
/// Bytes of the probabilities that are sampled from.
const PROBS: u64 = 4 * ROWS * VOCAB;
/// The longest rows that upstream is not known to forget candidates of, with its own choice of the kernel.
const LONG: u64 = 16_384;
const K: u64 = 256;

static CASES: LazyLock<Vec<Case>> = LazyLock::new(|| {
    vec![
        case("silu_and_mul, 32 × 2·14,336", &format!("silu_and_mul 32 {D}"), 100, (2, 2), 32 * 3 * D * 2),
        case("silu_and_mul, 4,096 × 2·14,336", &format!("silu_and_mul 4096 {D}"), 20, (2, 2), 4096 * 3 * D * 2),
        case("apply_rope_with_cos_sin_cache in place, 32 tokens", "rope 32", 100, (4, 6), rope_bytes(32)),
        case("apply_rope_with_cos_sin_cache in place, 4,096 tokens", "rope 4096", 50, (4, 6), rope_bytes(4096)),
        case("append_paged_kv_cache, 32 tokens", "append 32", 100, (9, 9), append_bytes(32)),
        case("append_paged_kv_cache, 4,096 tokens", "append 4096", 50, (9, 9), append_bytes(4096)),
        case("rope_quantize_append_paged_kv_cache, 32 tokens", "rope_append 32", 100, (12, 17), rope_append_bytes(32)),
        case("packbits, 1,048,576 elements", &format!("packbits {BITS}"), 100, (2, 2), BITS + BITS / 8),
        case("softmax, 32 × 128,256, f32", &format!("softmax {ROWS} {VOCAB}"), 50, (3, 3), 2 * PROBS),
        case(
            "top_k_top_p_sampling_from_probs, 32 × 128,256, f32, k 50, p 0.9, without a guard",
            &format!("sample {ROWS} {VOCAB}"),
            20,
            (2, 2),
            PROBS + 4 * ROWS,
        ),
        case(
            "radix_topk, 32 × 16,384, k 256, f32",
            &format!("topk {ROWS} {LONG} {K}"),
            50,
            (3, 3),
            ROWS * (4 * LONG + 8 * K),
        ),
    ]
});

/// What the guard ahead of sampling is looked at with: the guard alone, a kernel that reads the same rows and does nothing else,
/// torch's sum of them, and the draw with the guard ahead of it.
struct Guard {
    alone: String,
    read: String,
    sum: String,
    /// The draw, on the GPU and on the host.
    guarded: String,
    guarded_host: String,
}

static GUARD: LazyLock<Guard> = LazyLock::new(|| Guard {
    alone: gpu(&format!("guard {ROWS} {VOCAB}"), PROBS),
    read: gpu(&format!("read {PROBS}"), PROBS),
    sum: gpu(&format!("sum {ROWS} {VOCAB}"), PROBS),
    guarded: gpu(&format!("sample_guarded {ROWS} {VOCAB}"), PROBS),
    guarded_host: format!("host sample_guarded {ROWS} {VOCAB} 20"),
});

/// The draw without a guard.
fn unguarded() -> Option<&'static Case> {
    CASES.iter().find(|case| case.request.starts_with("sample "))
}

/// A large copy on the device.
pub const COPY_BYTES: u64 = 512 << 20;

pub fn copy_case() -> String {
    format!("gpu copy {COPY_BYTES} 1 {LEAST_CALLS}")
}

/// GB/s of the copy; what is read counts, and what is written.
pub fn copy_rate(samples: &Samples) -> Option<f64> {
    Some(2.0 * COPY_BYTES as f64 / plan::median(samples, "limits", &copy_case())?)
}

/// How often each of the arms whose host time is bounded is asked within a block, in turn with the others.
const ROUNDS: usize = 3;

fn questions() -> Vec<Question> {
    let ask = |case: &str, arms, rounds| Question { case: case.to_owned(), arms, blocks: Blocks::Every, rounds };
    let mut all = vec![ask(&copy_case(), &["limits"], 1)];
    for case in CASES.iter() {
        all.push(ask(&case.host, EAGER, ROUNDS));
        all.push(ask(&case.host, PEERS, 1));
        all.push(ask(&case.gpu, ON_GPU, 1));
    }
    all.extend([
        ask(&GUARD.alone, &["tensors"], 1),
        ask(&GUARD.read, &["limits"], 1),
        ask(&GUARD.sum, &["torch"], 1),
        ask(&GUARD.guarded, &["tensors"], 1),
        ask(&GUARD.guarded_host, &["tensors", "safe"], ROUNDS),
    ]);
    all
}

/// The most tensors of a call whose host time is bounded.
const FEW: usize = 5;

static COMPARISONS: LazyLock<Vec<Comparison>> = LazyLock::new(|| {
    let ratio = |what: String, case: &'static str, limit| Comparison {
        what: Cow::Owned(what),
        formula: Formula::Ratio((CLOSE[0], case), (CLOSE[1], case)),
        limit,
    };
    let of_case = |case: &'static Case| {
        let limit = if case.tensors <= FEW { Limit::AtMost(1.06) } else { Limit::Open };
        let host = ratio(format!("host: tensors / c, {}", tensors(case)), &case.host, limit);
        [host, ratio("GPU: tensors / c".to_owned(), &case.gpu, Limit::NearOne(0.02))]
    };
    let guard = &*GUARD;
    let beside = |what, (arm, case): plan::Cell<'static>| Comparison {
        what: Cow::Borrowed(what),
        formula: Formula::Ratio(("tensors", &guard.alone), (arm, case)),
        limit: Limit::AtMost(1.3),
    };
    let guard = [
        beside("GPU: the guard / a plain read", ("limits", &guard.read)),
        beside("GPU: the guard / torch's sum", ("torch", &guard.sum)),
    ];
    CASES.iter().flat_map(of_case).chain(guard).collect()
});

fn tensors(case: &Case) -> String {
    match case.tensors == case.arguments {
        true => format!("{} tensors", case.tensors),
        false => format!("{} tensors in {} arguments", case.tensors, case.arguments),
    }
}

/// GB/s of a call, over those of a copy.
fn share(samples: &Samples, case: &Case, arm: &str) -> Option<f64> {
    Some(case.bytes as f64 / plan::median(samples, arm, &case.gpu)? / copy_rate(samples)?)
}

// ---- the report ----

fn markdown(machine: &Machine, samples: &Samples) -> String {
    let mut text = format!(
        "# Families and their peers\n\nOne process per arm, all alive at once and on one core, asked in turn in each of {} \
         blocks; those of Rust and C are started anew for each. A block's host time from Rust and C is the median of {ROUNDS} \
         turns. Every value is in [families.csv](families.csv).\n\n`{}`\n\n{}\n| arm | what |\n|---|---|\n",
        machine.blocks,
        machine.command,
        report::described(machine),
    );
    for arm in &ARMS {
        let _ = writeln!(text, "| `{}` | {} |", arm.name, arm.what);
    }
    let _ = write!(
        text,
        "\n## Bounds\n\n{}\nEach figure is the median over blocks of what is computed within a block. Host time is bounded for \
         calls of up to {FEW} tensors.\n{}{}{}{}",
        report::bounds(&COMPARISONS, samples),
        gpu_times(machine, samples),
        host_times(machine, samples),
        guard(machine, samples),
        failures(machine),
    );
    text
}

fn gpu_times(machine: &Machine, samples: &Samples) -> String {
    let copy = copy_rate(samples).map_or("not measured".to_owned(), |rate| format!("{rate:.0} GB/s"));
    let mut text = format!(
        "\n## GPU time\n\nOf a call in a CUDA graph, µs: replays of one that has {LEAST_CALLS} calls or more, of tensors that take \
         turns, together larger than three times the L2 cache (up to {MOST_SETS} sets of them, so that the smallest stay in it). \
         No arm has programmatic dependent launch. Types are bf16 where nothing is said.\n\n\
         Share: bytes that the call must read and write, by its GPU time, over the bandwidth of a copy of {} MiB on the device \
         (CUDA's own or a kernel's, whichever is faster), {copy}, counting what is read and what is written.\n\n\
         | case | `tensors` | `c` | ratio | `flashinfer` | `torch` | `torch-compile` | MB | share |\n\
         |---|---|---|---|---|---|---|---|---|\n",
        COPY_BYTES >> 20,
    );
    for case in CASES.iter() {
        let time = |arm| cell(machine, samples, arm, &case.gpu, |ns| format!("{:.3}", ns / 1e3));
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} | {:.2} | {} |",
            case.what,
            time("tensors"),
            time("c"),
            ratio(samples, &case.gpu),
            time("flashinfer"),
            time("torch"),
            time("torch-compile"),
            case.bytes as f64 / 1e6,
            share(samples, case, "tensors").map_or(String::new(), |share| format!("{share:.2}")),
        );
    }
    text + "\n![Shares of a copy's bandwidth](families.svg)\n"
}

fn host_times(machine: &Machine, samples: &Samples) -> String {
    let mut text = String::from(
        "\n## Host time\n\nOf a call until it returns, ns. The GPU is idle when a batch of calls begins, and waiting for it is not in \
         the time.\n\n| case | tensors | `tensors` | `c` | ratio | `safe` | `flashinfer` | `torch` | `torch-compile` |\n\
         |---|---|---|---|---|---|---|---|---|\n",
    );
    for case in CASES.iter() {
        let time = |arm| cell(machine, samples, arm, &case.host, |ns| format!("{ns:.0}"));
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            case.what,
            tensors(case).replace(" tensors", ""),
            time("tensors"),
            time("c"),
            ratio(samples, &case.host),
            time("safe"),
            time("flashinfer"),
            time("torch"),
            time("torch-compile"),
        );
    }
    text
}

/// What the guard costs.
fn guard(machine: &Machine, samples: &Samples) -> String {
    let mut text = String::from(
        "\n## The guard ahead of sampling\n\nGPU time with 32 × 128,256 f32, µs. A safe draw is the guard and the kernel behind \
         it, which finds the rows in the L2 cache then.\n\n| what | arm | µs |\n|---|---|---|\n",
    );
    let rows = [
        ("the guard", "tensors", Some(&GUARD.alone)),
        ("a kernel that reads the rows and does nothing else", "limits", Some(&GUARD.read)),
        ("a sum of each row", "torch", Some(&GUARD.sum)),
        ("a draw without the guard", "tensors", unguarded().map(|case| &case.gpu)),
        ("a draw with it", "tensors", Some(&GUARD.guarded)),
    ];
    for (what, arm, case) in rows {
        let time = case.map(|case| cell(machine, samples, arm, case, |ns| format!("{:.3}", ns / 1e3)));
        let _ = writeln!(text, "| {what} | `{arm}` | {} |", time.unwrap_or_default());
    }
    let host = |arm| cell(machine, samples, arm, &GUARD.guarded_host, |ns| format!("{ns:.0}"));
    let _ = writeln!(
        text,
        "\nHost time of a draw with the guard, ns: `tensors` {}, `safe` {}.",
        host("tensors"),
        host("safe")
    );
    text
}

/// A median, or why there is none.
pub fn cell(machine: &Machine, samples: &Samples, arm: &str, case: &str, shown: impl Fn(f64) -> String) -> String {
    if let Some(ns) = plan::median(samples, arm, case) {
        return shown(ns);
    }
    let failed = machine.failures.iter().any(|failure| failure.arm == arm && failure.case == case);
    let missing = machine.missing.iter().any(|missing| missing.arm == arm);
    match (failed, missing) {
        (true, _) => "**failed**".to_owned(),
        (false, true) => "missing".to_owned(),
        (false, false) => String::new(),
    }
}

/// Ours over C's.
fn ratio(samples: &Samples, case: &str) -> String {
    let found = plan::estimate(Formula::Ratio((CLOSE[0], case), (CLOSE[1], case)), samples);
    found.map_or(String::new(), |found| format!("{:.3}", found.median))
}

/// Characters of it in the report.
const MOST_OF_A_REASON: usize = 400;

pub fn failures(machine: &Machine) -> String {
    if machine.failures.is_empty() {
        return String::new();
    }
    let mut text = String::from("\n## What failed\n\n| arm | case | why |\n|---|---|---|\n");
    for failure in &machine.failures {
        // An expression that does not compile may say so at length; families.json has it all.
        let reason: String = failure.reason.chars().take(MOST_OF_A_REASON).collect();
        let cut = if reason.len() < failure.reason.len() { " …" } else { "" };
        let _ = writeln!(text, "| `{}` | {} | {}{cut} |", failure.arm, failure.case, report::cell(&reason));
    }
    text
}

fn shares(samples: &Samples) -> Result<String> {
    let row = |case: &Case| {
        let value = share(samples, case, "tensors")?;
        let (name, label) = (case.request.clone(), format!("{value:.2}"));
        Some(Row { name, color: RUST, value, range: None, bound: Some(1.0), label })
    };
    figures::lines(&Rows {
        title: "GPU time of calls: share of a copy's bandwidth",
        note: "bytes that must be moved per second, over those of a copy on the device; more is better",
        axis: "share",
        rows: CASES.iter().filter_map(row).collect(),
        bars: true,
        legend: &[("call", RUST), ("a copy", BOUND)],
    })
}

#[cfg(test)]
mod tests {
    use super::super::plan::Verdict;
    use super::super::record::{Failure, Sample};
    use super::*;

    /// As a run on a machine without FlashInfer's Python leaves it, of one block.
    fn recorded() -> (Machine, Samples) {
        let mut samples = vec![Sample::new(0, "limits", &copy_case(), 2.0 * COPY_BYTES as f64 / 3000.0)];
        for case in CASES.iter() {
            for (arm, host, gpu) in [("tensors", 1050.0, 2020.0), ("safe", 1100.0, f64::NAN), ("c", 1000.0, 2000.0)] {
                samples.push(Sample::new(0, arm, &case.host, host));
                samples.extend((!gpu.is_nan()).then(|| Sample::new(0, arm, &case.gpu, gpu)));
            }
            samples.push(Sample::new(0, "torch", &case.host, 9000.0));
            samples.push(Sample::new(0, "torch", &case.gpu, 4000.0));
        }
        let failures = CASES.iter().map(|case| Failure {
            arm: "torch-compile".to_owned(),
            case: case.gpu.clone(),
            reason: "no | compiler".to_owned(),
        });
        let mut machine =
            Machine::imagined("DIR/bench DIR/performance --families --blocks 1", "flashinfer", "no module");
        machine.failures = failures.collect();
        (machine, samples.into_iter().collect())
    }

    fn line<'a>(text: &'a str, start: &str) -> &'a str {
        text.lines().find(|line| line.starts_with(start)).unwrap_or_else(|| panic!("no line starts with {start}"))
    }

    #[test]
    fn the_report_names_the_machine_the_command_and_what_is_missing_or_failed() {
        let (machine, samples) = recorded();
        let text = markdown(&machine, &samples);
        for part in ["| GPU | NVIDIA H100 |", "| driver | 580.1 |", "`DIR/bench DIR/performance --families --blocks 1`"]
        {
            assert!(text.contains(part), "{part}");
        }
        assert!(text.contains("| flashinfer | no module |"));
        assert_eq!(
            line(&text, "| silu_and_mul, 32 "),
            "| silu_and_mul, 32 × 2·14,336 | 2.020 | 2.000 | 1.010 | missing | 4.000 | **failed** | 2.75 | 0.45 |"
        );
        let host = text.split("## Host time").nth(1).unwrap();
        assert_eq!(
            line(host, "| apply_rope_with_cos_sin_cache in place, 32 "),
            "| apply_rope_with_cos_sin_cache in place, 32 tokens | 4 in 6 arguments | 1050 | 1000 | 1.050 | 1100 | missing | \
             9000 |  |"
        );
        assert!(text.contains("| `torch-compile` | gpu rope 32 256 1 | no \\| compiler |"));
    }

    #[test]
    fn bounds_that_are_missed_and_kept_are_told_apart() {
        let (machine, _) = recorded();
        let case = &CASES[0];
        let sample = |arm, case: &str, value| Sample::new(0, arm, case, value);
        let samples: Samples = [
            sample("tensors", &case.host, 1061.0),
            sample("c", &case.host, 1000.0),
            sample("tensors", &case.gpu, 1019.0),
            sample("c", &case.gpu, 1000.0),
        ]
        .into_iter()
        .collect();
        let text = markdown(&machine, &samples);
        assert!(
            line(&text, "| host: tensors / c, 2 tensors |")
                .ends_with("| 1.061 | too few blocks | ≤ 1.06 | **missed** |")
        );
        assert!(line(&text, "| GPU: tensors / c |").ends_with("| 1.019 | too few blocks | 1.00 ± 0.02 | kept |"));
        let many = COMPARISONS.iter().find(|comparison| comparison.what.contains("9 tensors")).unwrap();
        assert_eq!(many.verdict(many.found(&samples)), Verdict::Open);
    }

    #[test]
    fn every_arm_that_is_asked_or_compared_is_in_the_table_of_arms() {
        plan::assert_asked(&ARMS, &questions(), &COMPARISONS);
    }

    #[test]
    fn every_case_is_one_that_the_programs_have() {
        let sources = [
            (include_str!("../../../benches/families.rs"), "(\"", "\", &["),
            (include_str!("../../../benches/c/families.c"), "{\"", "\", "),
            (include_str!("../../../benches/python/families.py"), "    \"", "\": "),
        ];
        for case in CASES.iter() {
            let name = case.request.split(' ').next().unwrap();
            for (source, before, behind) in sources {
                assert!(source.contains(&format!("{before}{name}{behind}")), "{name}: {before}");
            }
        }
    }

    #[test]
    fn sets_are_larger_than_a_cache_together_and_calls_are_enough() {
        assert_eq!(rotation(100), (256, 1));
        assert_eq!(rotation(4_000_000), (100, 1));
        assert_eq!(rotation(40_000_000), (10, 10));
        assert_eq!(rotation(90_000_000), (5, 20));
        assert_eq!(rotation(1 << 40), (1, 100));
    }

    #[test]
    fn shares_count_what_is_moved_against_a_copy() {
        let (_, samples) = recorded();
        assert_eq!(copy_rate(&samples), Some(3000.0));
        let case = &CASES[0];
        let expected = (32 * 3 * 14_336 * 2) as f64 / 2020.0 / 3000.0;
        assert!((share(&samples, case, "tensors").unwrap() - expected).abs() < 1e-12);
        assert!(shares(&samples).unwrap().contains("silu_and_mul 32 14336"));
    }
}
