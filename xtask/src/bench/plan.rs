//! What is measured of launches: the arms, which arm is asked what, and the bounds.

use std::borrow::Cow;

use super::record::Samples;
use super::stats::{self, Estimate};

/// What the program behind an arm is written in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Program {
    Rust,
    C,
    Python,
}

pub struct Arm {
    pub name: &'static str,
    pub program: Program,
    /// For the reader of the report.
    pub what: &'static str,
}

pub const fn arm(name: &'static str, program: Program, what: &'static str) -> Arm {
    Arm { name, program, what }
}

/// In the order of every table.
pub const ARMS: [Arm; 20] = [
    arm("limits", Program::C, "an empty kernel through the driver API; copies on the device"),
    arm("c-packed", Program::C, "arguments packed once, stream set once"),
    arm("c", Program::C, "arguments packed, stream set and restored for each call"),
    arm("c-pdl", Program::C, "as `c`, with programmatic dependent launch (PDL)"),
    arm("c-graph", Program::C, "as `c`, captured into a graph and replayed"),
    arm("prepared-scope", Program::Rust, "checked once, stream set once"),
    arm("prepared", Program::Rust, "checked once"),
    arm("scope", Program::Rust, "safe, stream set once"),
    arm("raw", Program::Rust, "the flat function on raw pointers"),
    arm("safe", Program::Rust, "the safe function on cudarc's buffers, event tracking off"),
    arm("flat-cudarc", Program::Rust, "the flat function on cudarc's buffers"),
    arm("tracked", Program::Rust, "as `safe`, with cudarc's event tracking"),
    arm("tracking", Program::Rust, "the waits and records of event tracking, alone"),
    arm("eager-pdl", Program::Rust, "as `safe`, with PDL"),
    arm("graph", Program::Rust, "captured into a graph and replayed"),
    arm("graph-pdl", Program::Rust, "as `graph`, with PDL"),
    arm("flashinfer-out", Program::Python, "flashinfer with `out=`"),
    arm("flashinfer", Program::Python, "flashinfer, which allocates the result"),
    arm("tvm-ffi", Program::Python, "the kernel's function through the tvm_ffi package"),
    arm("torch", Program::Python, "torch's own `rms_norm`"),
];

/// Eager calls of one kernel, from the least work to the most.
const EAGER: &[&str] = &[
    "c-packed",
    "c",
    "c-pdl",
    "prepared-scope",
    "prepared",
    "scope",
    "raw",
    "safe",
    "flat-cudarc",
    "tracked",
    "eager-pdl",
    "flashinfer-out",
    "flashinfer",
    "tvm-ffi",
    "torch",
];
/// GDN prefill has no PDL, and torch no such function.
const GDN: &[&str] = &[
    "c-packed",
    "c",
    "prepared-scope",
    "prepared",
    "scope",
    "raw",
    "safe",
    "flat-cudarc",
    "tracked",
    "flashinfer-out",
    "flashinfer",
    "tvm-ffi",
];
const SERIES: &[&str] = &[
    "c-packed",
    "c",
    "c-pdl",
    "c-graph",
    "prepared-scope",
    "prepared",
    "scope",
    "raw",
    "safe",
    "tracked",
    "eager-pdl",
    "graph",
    "graph-pdl",
    "flashinfer-out",
    "flashinfer",
    "tvm-ffi",
    "torch",
];

pub const HOST_GEMMA: &str = "host gemma 1 4096";
pub const HOST_GDN: &str = "host gdn 64";
pub const HOST_EMPTY: &str = "host empty";
pub const HOST_TRACKING: &str = "host tracking";
pub const GEMMA_SERIES: &str = "series 430 1 4096";
const GPU_GEMMA: &str = "gpu gemma 1 4096";
const GPU_GEMMA_LARGE: &str = "gpu gemma 4096 4096";

/// Rows and columns.
pub const GEMMA_SHAPES: [(u64, u64); 9] = [
    (1, 4096),
    (16, 4096),
    (128, 4096),
    (1024, 4096),
    (4096, 4096),
    (32768, 8192),
    (65536, 4096),
    (131_072, 2048),
    (1_048_576, 256),
];
pub const GDN_TOKENS: [u64; 6] = [64, 256, 1024, 4096, 16384, 32768];
pub const GDN_SEQUENCES: [u64; 3] = [1, 4, 16];
pub const COPY_BYTES: [u64; 3] = [64 << 20, 256 << 20, 512 << 20];

/// In how many blocks something is asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Blocks {
    Every,
    /// Ten, spread over the run: GPU time varies little.
    Ten,
    /// The first alone: what no block changes, and takes long.
    First,
}

impl Blocks {
    pub fn includes(self, block: usize, of: usize) -> bool {
        match self {
            Self::Every => true,
            Self::Ten => block * 10 / of != (block + 1) * 10 / of,
            Self::First => block == 0,
        }
    }
}

/// One case, and who is asked it.
pub struct Question {
    pub case: String,
    pub arms: &'static [&'static str],
    pub blocks: Blocks,
    /// How often each arm is asked within a block, in turn with the others; its value there is the median. Host times
    /// are short and drift from one millisecond to the next.
    pub rounds: usize,
}

pub fn gemma_case((rows, cols): (u64, u64)) -> String {
    format!("gpu gemma {rows} {cols}")
}

pub fn gdn_case(tokens: u64, sequences: u64) -> String {
    format!("gpu gdn {tokens} {sequences}")
}

pub fn copy_case(bytes: u64) -> String {
    format!("gpu copy {bytes}")
}

pub const HOST_ROUNDS: usize = 3;

/// How many processes an arm has in a run, one after the other, for an equal part of the blocks each: where a process's
/// memory lies makes it some nanoseconds faster or slower for good.
pub const GENERATIONS: usize = 3;

/// Which arm is asked which case.
pub fn questions() -> Vec<Question> {
    let ask = |case: &str, arms, blocks| {
        let rounds = if case.starts_with("host ") { HOST_ROUNDS } else { 1 };
        Question { case: case.to_owned(), arms, blocks, rounds }
    };
    let mut all = vec![
        ask(HOST_GEMMA, EAGER, Blocks::Every),
        ask(HOST_GDN, GDN, Blocks::Every),
        ask(HOST_EMPTY, &["limits"], Blocks::Every),
        ask(HOST_TRACKING, &["tracking"], Blocks::Every),
        ask(GEMMA_SERIES, SERIES, Blocks::Every),
    ];
    for shape in GEMMA_SHAPES {
        let case = gemma_case(shape);
        // The bounds look at two shapes.
        let blocks = if [GPU_GEMMA, GPU_GEMMA_LARGE].contains(&case.as_str()) { Blocks::Every } else { Blocks::Ten };
        all.push(ask(&case, &["graph", "c-graph"], blocks));
        all.push(ask(&case, &["graph-pdl"], Blocks::Ten));
    }
    for (tokens, sequences) in GDN_TOKENS.into_iter().flat_map(|t| GDN_SEQUENCES.map(|n| (t, n))) {
        all.push(ask(&gdn_case(tokens, sequences), &["graph", "c-graph"], Blocks::Ten));
    }
    all.extend(COPY_BYTES.map(|bytes| ask(&copy_case(bytes), &["limits"], Blocks::Ten)));
    all
}

/// What a case's answers are in.
pub fn unit(case: &str) -> &'static str {
    match case.split(' ').next() {
        Some("series") => "µs",
        Some("kernels") => "kernels",
        Some("arena" | "error" | "residual") => "times",
        _ => "ns",
    }
}

/// One arm's values of one case.
pub type Cell<'a> = (&'a str, &'a str);

/// What is computed within each block.
#[derive(Clone, Copy)]
pub enum Formula<'a> {
    /// The first less all of the others.
    Difference(Cell<'a>, &'a [Cell<'a>]),
    Ratio(Cell<'a>, Cell<'a>),
    /// So many times the value.
    Times(f64, Cell<'a>),
    /// So much by the value.
    Per(f64, Cell<'a>),
    /// So many times the first by the second.
    TimesRatio(f64, Cell<'a>, Cell<'a>),
}

#[cfg(test)]
impl<'a> Formula<'a> {
    /// What it is computed of.
    pub fn cells(&self) -> Vec<Cell<'a>> {
        match *self {
            Self::Difference(first, others) => std::iter::once(first).chain(others.iter().copied()).collect(),
            Self::Ratio(first, other) | Self::TimesRatio(_, first, other) => vec![first, other],
            Self::Times(_, cell) | Self::Per(_, cell) => vec![cell],
        }
    }
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Limit {
    AtMost(f64),
    AtLeast(f64),
    /// Between one less this and one more.
    NearOne(f64),
    /// Looked at, not judged.
    Open,
}

pub struct Comparison {
    pub what: Cow<'static, str>,
    pub formula: Formula<'static>,
    pub limit: Limit,
}

const fn row(what: &'static str, formula: Formula<'static>, limit: Limit) -> Comparison {
    Comparison { what: Cow::Borrowed(what), formula, limit }
}

/// The bounds, judged by the median over blocks.
pub static COMPARISONS: [Comparison; 15] = [
    row("raw / c", Formula::Ratio(("raw", HOST_GEMMA), ("c", HOST_GEMMA)), Limit::AtMost(1.05)),
    row("flat-cudarc / c", Formula::Ratio(("flat-cudarc", HOST_GEMMA), ("c", HOST_GEMMA)), Limit::AtMost(1.05)),
    row("safe / c", Formula::Ratio(("safe", HOST_GEMMA), ("c", HOST_GEMMA)), Limit::AtMost(1.05)),
    row(
        "prepared-scope / c-packed",
        Formula::Ratio(("prepared-scope", HOST_GEMMA), ("c-packed", HOST_GEMMA)),
        Limit::AtMost(1.015),
    ),
    row("safe / c", Formula::Ratio(("safe", HOST_GDN), ("c", HOST_GDN)), Limit::AtMost(1.10)),
    row(
        "tracked − c − tracking",
        Formula::Difference(("tracked", HOST_GEMMA), &[("c", HOST_GEMMA), ("tracking", HOST_TRACKING)]),
        Limit::Open,
    ),
    row(
        "flashinfer-out / safe",
        Formula::Ratio(("flashinfer-out", HOST_GEMMA), ("safe", HOST_GEMMA)),
        Limit::AtLeast(1.15),
    ),
    row(
        "graph / c-graph",
        Formula::Ratio(("graph", GPU_GEMMA_LARGE), ("c-graph", GPU_GEMMA_LARGE)),
        Limit::NearOne(0.01),
    ),
    row("graph / c-graph", Formula::Ratio(("graph", GPU_GEMMA), ("c-graph", GPU_GEMMA)), Limit::NearOne(0.01)),
    row(
        "c / graph-pdl: eager as others do it / our graph with PDL",
        Formula::Ratio(("c", GEMMA_SERIES), ("graph-pdl", GEMMA_SERIES)),
        Limit::AtLeast(2.0),
    ),
    row(
        "c-graph / graph-pdl: C's own graph / ours with PDL",
        Formula::Ratio(("c-graph", GEMMA_SERIES), ("graph-pdl", GEMMA_SERIES)),
        Limit::Open,
    ),
    row(
        "c-graph / graph: C's own graph / ours without PDL",
        Formula::Ratio(("c-graph", GEMMA_SERIES), ("graph", GEMMA_SERIES)),
        Limit::Open,
    ),
    row("c-pdl / graph-pdl", Formula::Ratio(("c-pdl", GEMMA_SERIES), ("graph-pdl", GEMMA_SERIES)), Limit::Open),
    row("scope / c", Formula::Ratio(("scope", GEMMA_SERIES), ("c", GEMMA_SERIES)), Limit::Open),
    row(
        "flashinfer-out / graph-pdl",
        Formula::Ratio(("flashinfer-out", GEMMA_SERIES), ("graph-pdl", GEMMA_SERIES)),
        Limit::Open,
    ),
];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    Kept,
    Missed,
    /// An arm of it is missing.
    NotMeasured,
    /// There is no bound.
    Open,
}

impl Comparison {
    pub fn case(&self) -> &'static str {
        match self.formula {
            Formula::Difference((_, case), _)
            | Formula::Ratio((_, case), _)
            | Formula::Times(_, (_, case))
            | Formula::Per(_, (_, case))
            | Formula::TimesRatio(_, _, (_, case)) => case,
        }
    }

    pub fn is_difference(&self) -> bool {
        matches!(self.formula, Formula::Difference(..))
    }

    pub fn found(&self, samples: &Samples) -> Option<Estimate> {
        estimate(self.formula, samples)
    }

    pub fn verdict(&self, found: Option<Estimate>) -> Verdict {
        let Some(Estimate { median, .. }) = found else {
            return if self.limit == Limit::Open { Verdict::Open } else { Verdict::NotMeasured };
        };
        let kept = match self.limit {
            Limit::AtMost(bound) => median <= bound,
            Limit::AtLeast(bound) => median >= bound,
            Limit::NearOne(width) => (median - 1.0).abs() <= width,
            Limit::Open => return Verdict::Open,
        };
        if kept { Verdict::Kept } else { Verdict::Missed }
    }
}

/// Block by block, over the blocks that have all of it.
pub fn estimate(formula: Formula<'_>, samples: &Samples) -> Option<Estimate> {
    let (first, others) = match &formula {
        Formula::Difference(first, others) => (*first, *others),
        Formula::Ratio(first, other) | Formula::TimesRatio(_, first, other) => (*first, std::slice::from_ref(other)),
        Formula::Times(_, cell) | Formula::Per(_, cell) => (*cell, &[][..]),
    };
    let mut values = Vec::new();
    'blocks: for (block, &value) in samples.blocks(first.0, first.1)? {
        let mut value = value;
        for (arm, case) in others {
            let Some(&other) = samples.blocks(arm, case)?.get(block) else { continue 'blocks };
            match formula {
                Formula::Difference(..) => value -= other,
                _ => value /= other,
            }
        }
        values.push(match formula {
            Formula::Difference(..) | Formula::Ratio(..) => value,
            Formula::Times(factor, _) | Formula::TimesRatio(factor, ..) => factor * value,
            Formula::Per(factor, _) => factor / value,
        });
    }
    stats::estimate(&values)
}

/// GB/s of the fastest copy on the device; what is read counts, and what is written.
pub fn copy_rate(samples: &Samples) -> Option<f64> {
    let rate = |bytes: u64| Some(2.0 * bytes as f64 / median(samples, "limits", &copy_case(bytes))?);
    COPY_BYTES.into_iter().filter_map(rate).max_by(f64::total_cmp)
}

/// GB/s of gemma_rmsnorm, from the bytes that it must move.
pub fn gemma_rate(samples: &Samples, arm: &str, (rows, cols): (u64, u64)) -> Option<f64> {
    let bytes = 2 * (2 * rows * cols) + 2 * cols;
    Some(bytes as f64 / median(samples, arm, &gemma_case((rows, cols)))?)
}

pub fn median(samples: &Samples, arm: &str, case: &str) -> Option<f64> {
    Some(stats::summary(&samples.values(arm, case))?.median)
}

/// Of a suite: that each arm is asked something, and that whatever is asked or compared is of an arm, and asked.
#[cfg(test)]
pub fn assert_asked(arms: &[Arm], questions: &[Question], comparisons: &[Comparison]) {
    let asked = |(arm, case): Cell<'_>| questions.iter().any(|q| q.case == case && q.arms.contains(&arm));
    for question in questions {
        assert!(question.arms.iter().all(|name| arms.iter().any(|arm| arm.name == *name)), "{}", question.case);
    }
    for comparison in comparisons {
        assert!(comparison.formula.cells().into_iter().all(asked), "{}", comparison.what);
    }
    assert!(arms.iter().all(|arm| questions.iter().any(|question| question.arms.contains(&arm.name))));
}

#[cfg(test)]
mod tests {
    use super::super::record::Sample;
    use super::*;

    fn samples(rows: &[(usize, &str, &str, f64)]) -> Samples {
        let sample = |&(block, arm, case, value): &(usize, &str, &str, f64)| Sample::new(block, arm, case, value);
        rows.iter().map(sample).collect()
    }

    #[test]
    fn every_arm_that_is_asked_or_compared_is_in_the_table_of_arms() {
        let known = |name: &str| ARMS.iter().any(|arm| arm.name == name);
        let questions = questions();
        for question in &questions {
            assert!(question.arms.iter().all(|arm| known(arm)), "{}", question.case);
        }
        let asked = |(arm, case): Cell<'_>| questions.iter().any(|q| q.case == case && q.arms.contains(&arm));
        for comparison in &COMPARISONS {
            assert!(comparison.formula.cells().into_iter().all(asked), "{}", comparison.what);
        }
        for arm in &ARMS {
            assert!(questions.iter().any(|question| question.arms.contains(&arm.name)), "{} is never asked", arm.name);
        }
    }

    #[test]
    fn ten_blocks_are_spread_over_any_number() {
        for of in 30..200 {
            assert_eq!((0..of).filter(|&block| Blocks::Ten.includes(block, of)).count(), 10, "{of}");
        }
    }

    #[test]
    fn what_is_compared_is_paired_within_blocks_and_leaves_out_what_lacks_a_part() {
        let samples = samples(&[
            (0, "raw", HOST_GEMMA, 110.0),
            (0, "c", HOST_GEMMA, 100.0),
            (1, "raw", HOST_GEMMA, 1000.0),
            (1, "c", HOST_GEMMA, 1000.0),
            (2, "raw", HOST_GEMMA, 7.0),
        ]);
        let difference = Formula::Difference(("raw", HOST_GEMMA), &[("c", HOST_GEMMA)]);
        assert_eq!(estimate(difference, &samples), Some(Estimate { median: 5.0, interval: None }));
        let found = COMPARISONS[0].found(&samples);
        assert_eq!(found, Some(Estimate { median: 1.05, interval: None }));
        assert_eq!(COMPARISONS[0].verdict(found), Verdict::Kept);
    }

    #[test]
    fn a_bound_without_its_arms_is_not_measured() {
        let comparison = COMPARISONS.iter().find(|comparison| comparison.what == "flashinfer-out / safe").unwrap();
        assert_eq!(comparison.found(&samples(&[(0, "safe", HOST_GEMMA, 3.0)])), None);
        assert_eq!(comparison.verdict(None), Verdict::NotMeasured);
    }

    #[test]
    fn rates_count_what_is_read_and_what_is_written() {
        let samples = samples(&[
            (0, "limits", &copy_case(COPY_BYTES[0]), COPY_BYTES[0] as f64),
            (0, "limits", &copy_case(COPY_BYTES[1]), COPY_BYTES[1] as f64 / 2.0),
            (0, "graph", "gpu gemma 16 4096", 1000.0),
        ]);
        assert_eq!(copy_rate(&samples), Some(4.0));
        let bytes = (16 * 4096 * 2 + 16 * 4096 * 2 + 4096 * 2) as f64;
        assert_eq!(gemma_rate(&samples, "graph", (16, 4096)), Some(bytes / 1000.0));
        assert_eq!(gemma_rate(&samples, "c-graph", (16, 4096)), None);
    }

    #[test]
    fn a_bound_is_missed_beyond_it_and_kept_at_it() {
        let verdict = |limit, median| {
            let comparison = row("", Formula::Ratio(("", ""), ("", "")), limit);
            comparison.verdict(Some(Estimate { median, interval: None }))
        };
        assert_eq!(verdict(Limit::AtMost(30.0), 30.0), Verdict::Kept);
        assert_eq!(verdict(Limit::AtMost(30.0), 30.1), Verdict::Missed);
        assert_eq!(verdict(Limit::AtLeast(2.0), 1.99), Verdict::Missed);
        assert_eq!(verdict(Limit::NearOne(0.01), 0.985), Verdict::Missed);
        assert_eq!(verdict(Limit::NearOne(0.01), 1.009), Verdict::Kept);
        assert_eq!(verdict(Limit::Open, 9.0), Verdict::Open);
    }
}
