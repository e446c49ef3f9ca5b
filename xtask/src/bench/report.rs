//! launches.md: tables over the values of a run.

use std::fmt::Write;

use super::plan::{self, ARMS, Arm, COMPARISONS, Comparison, Formula, GENERATIONS, HOST_ROUNDS, Limit, Verdict};
use super::record::{Machine, Samples};
use super::stats::{self, Estimate, Summary};

pub fn markdown(machine: &Machine, samples: &Samples) -> String {
    let mut text = introduction(machine);
    let _ = write!(
        text,
        "\n## Bounds\n\n{}\nEach figure is the median over blocks of what is computed within a block, with the interval that \
         holds the true median with 95 % probability, from order statistics.\n\n![Ratios to C](ratios.svg)\n\n\
         ## Host time per call\n\nFrom the call until it returns. The GPU is idle when a batch of calls begins, and waiting \
         for it is not in the time.\n\ngemma_rmsnorm, 1 × 4096, bf16:\n\n{}\n![Host time per call](host.svg)\n\n\
         gdn_prefill, 64 tokens, 16/16/32 heads × 128, bf16:\n\n{}\nFor comparison:\n\n| | | ns | quartiles |\n\
         |---|---|---|---|\n{}\n## A series of 430 launches of gemma_rmsnorm, 1 × 4096\n\nFrom the first launch until the \
         GPU has done the last.\n\n{}\n![A series of launches](series.svg)\n{}{}",
        bounds(&COMPARISONS, samples),
        times(samples, plan::HOST_GEMMA),
        times(samples, plan::HOST_GDN),
        alone(samples),
        series(samples),
        gemma(samples),
        gdn(samples),
    );
    text
}

/// What a call costs at least, and what event tracking costs.
fn alone(samples: &Samples) -> String {
    let cases = [plan::HOST_EMPTY, plan::HOST_TRACKING];
    let rows = cases.iter().flat_map(|case| ARMS.iter().filter_map(|arm| row(samples, arm, case)));
    rows.fold(String::new(), |text, row| text + &row + "\n")
}

fn introduction(machine: &Machine) -> String {
    let text = format!(
        "# Launches\n\nOne process per arm, all alive at once and on one core, asked in turn in each of {} blocks; after each \
         {} of the run all are started anew. A block's host time is the median of {} turns. Every value is in \
         [launches.csv](launches.csv).\n\n`{}`\n\n",
        machine.blocks,
        if GENERATIONS == 3 { "third".to_owned() } else { format!("{GENERATIONS}th part") },
        HOST_ROUNDS,
        machine.command
    );
    text + &described(machine)
}

/// Tables: the machine and the libraries, and what is missing.
pub fn described(machine: &Machine) -> String {
    let mut text = "| | |\n|---|---|\n".to_owned();
    let unknown = || "unknown: nvidia-smi is not there".to_owned();
    let rows = [
        ("GPU", machine.gpu.clone().unwrap_or_else(unknown)),
        ("driver", machine.driver.clone().unwrap_or_else(unknown)),
        ("CPU", format!("{}, {} logical cores", machine.cpu, machine.cores)),
        ("kernel", machine.kernel.clone()),
        ("flashinfer-rs", machine.version.clone()),
    ];
    let took = machine.seconds.map(|seconds| ("all of it took", format!("{seconds} s")));
    for (name, value) in rows.into_iter().chain(took) {
        let _ = writeln!(text, "| {name} | {} |", cell(&value));
    }
    for library in &machine.libraries {
        let _ = writeln!(text, "| {} | `{}` |", cell(&library.file), library.sha256);
    }
    if !machine.missing.is_empty() {
        text += "\n| missing here | why |\n|---|---|\n";
        for missing in &machine.missing {
            let _ = writeln!(text, "| {} | {} |", missing.arm, cell(&missing.reason));
        }
    }
    text
}

/// Text that cannot end a table's cell.
pub fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

/// The table of bounds.
pub fn bounds(comparisons: &[Comparison], samples: &Samples) -> String {
    let mut text = String::from("| what | case | found | 95 % interval | bound | |\n|---|---|---|---|---|---|\n");
    for comparison in comparisons {
        let found = comparison.found(samples);
        let (median, interval) = found.map_or(("–".to_owned(), "–".to_owned()), |found| shown(comparison, found));
        let bound = match comparison.limit {
            Limit::AtMost(bound) => format!("≤ {bound}"),
            Limit::AtLeast(bound) => format!("≥ {bound:.2}"),
            Limit::NearOne(width) => format!("1.00 ± {width}"),
            Limit::Open => "–".to_owned(),
        };
        let verdict = verdict(comparison.verdict(found));
        let _ = writeln!(
            text,
            "| {} | {} | {median} | {interval} | {bound} | {verdict} |",
            comparison.what,
            comparison.case()
        );
    }
    text
}

fn shown(comparison: &Comparison, Estimate { median, interval }: Estimate) -> (String, String) {
    let number = |value: f64| if comparison.is_difference() { format!("{value:.1}") } else { format!("{value:.3}") };
    let unit = if comparison.is_difference() { " ns" } else { "" };
    let interval = interval.map_or("too few blocks".to_owned(), |(a, b)| format!("{} to {}", number(a), number(b)));
    (number(median) + unit, interval)
}

pub fn verdict(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Kept => "kept",
        Verdict::Missed => "**missed**",
        Verdict::NotMeasured => "not measured",
        Verdict::Open => "",
    }
}

/// Host time of every arm that has the case, and how much longer it takes than the arm `c`.
fn times(samples: &Samples, case: &str) -> String {
    let mut text = String::from("| arm | | ns | quartiles | less `c` |\n|---|---|---|---|---|\n");
    for arm in &ARMS {
        let Some(row) = row(samples, arm, case) else { continue };
        let difference = plan::estimate(Formula::Difference((arm.name, case), &[("c", case)]), samples);
        let difference = match difference.filter(|_| arm.name != "c") {
            Some(Estimate { median, interval: Some((low, high)) }) => format!("{median:+.0} ({low:+.0} to {high:+.0})"),
            Some(Estimate { median, interval: None }) => format!("{median:+.0}"),
            None => String::new(),
        };
        let _ = writeln!(text, "{row} {difference} |");
    }
    text
}

/// Time until the end of the series, and how often it would fit into that of the arm `c`.
fn series(samples: &Samples) -> String {
    let case = plan::GEMMA_SERIES;
    let mut text = String::from("| arm | | µs | quartiles | `c` / this |\n|---|---|---|---|---|\n");
    for arm in &ARMS {
        let Some(row) = row(samples, arm, case) else { continue };
        let ratio = plan::estimate(Formula::Ratio(("c", case), (arm.name, case)), samples);
        let _ = writeln!(text, "{row} {} |", ratio.map_or(String::new(), |ratio| format!("{:.2}", ratio.median)));
    }
    text
}

/// The begin of a row: name, meaning, median, quartiles.
fn row(samples: &Samples, arm: &Arm, case: &str) -> Option<String> {
    let Summary { median, lower_quartile, upper_quartile } = stats::summary(&samples.values(arm.name, case))?;
    Some(format!("| `{}` | {} | {median:.0} | {lower_quartile:.0} to {upper_quartile:.0} |", arm.name, arm.what))
}

fn gemma(samples: &Samples) -> String {
    let mut text = String::from(
        "\n## GPU time of gemma_rmsnorm, bf16\n\nA graph of launches over buffers that take turns, together larger than \
         three times the L2 cache (up to 256 sets of them, so that the smallest shapes stay in it). Bytes: input, output \
         and weight, once.\n\n",
    );
    if let Some(rate) = plan::copy_rate(samples) {
        let _ = writeln!(text, "A copy on the device: {rate:.0} GB/s, counting what is read and what is written.\n");
    }
    text += "| shape | µs (`graph`) | GB/s | share of a copy | µs (`c-graph`) | ratio | 95 % interval | µs (`graph-pdl`) \
             |\n|---|---|---|---|---|---|---|---|\n";
    for shape @ (rows, cols) in plan::GEMMA_SHAPES {
        let case = plan::gemma_case(shape);
        let rate = plan::gemma_rate(samples, "graph", shape);
        let (ratio, interval) = ratio_to_c(samples, &case);
        let _ = writeln!(
            text,
            "| {rows} × {cols} | {} | {} | {} | {} | {ratio} | {interval} | {} |",
            scaled(samples, "graph", &case, 1e3),
            rate.map_or(String::new(), |rate| format!("{rate:.0}")),
            rate.zip(plan::copy_rate(samples)).map_or(String::new(), |(rate, copy)| format!("{:.2}", rate / copy)),
            scaled(samples, "c-graph", &case, 1e3),
            scaled(samples, "graph-pdl", &case, 1e3),
        );
    }
    text + "\n![Share of a copy's bandwidth](gemma.svg)\n"
}

fn gdn(samples: &Samples) -> String {
    let mut text = String::from(
        "\n## GPU time of gdn_prefill, 16/16/32 heads × 128, bf16\n\nSequences of equal length, no input state.\n\n\
         | tokens | sequences | ms (`graph`) | tokens/s | ms (`c-graph`) | ratio | 95 % interval |\n\
         |---|---|---|---|---|---|---|\n",
    );
    for (tokens, sequences) in plan::GDN_TOKENS.into_iter().flat_map(|t| plan::GDN_SEQUENCES.map(|n| (t, n))) {
        let case = plan::gdn_case(tokens, sequences);
        let rate = plan::median(samples, "graph", &case).map(|ns| tokens as f64 / ns * 1e9);
        let (ratio, interval) = ratio_to_c(samples, &case);
        let _ = writeln!(
            text,
            "| {tokens} | {sequences} | {} | {} | {} | {ratio} | {interval} |",
            scaled(samples, "graph", &case, 1e6),
            rate.map_or(String::new(), |rate| format!("{:.2} million", rate / 1e6)),
            scaled(samples, "c-graph", &case, 1e6),
        );
    }
    text + "\n![GPU time of gdn_prefill](gdn.svg)\n"
}

/// A median in another unit, empty where there is none.
fn scaled(samples: &Samples, arm: &str, case: &str, by: f64) -> String {
    plan::median(samples, arm, case).map_or(String::new(), |ns| format!("{:.3}", ns / by))
}

/// Our graph's GPU time over C's, and the interval.
fn ratio_to_c(samples: &Samples, case: &str) -> (String, String) {
    let Some(found) = plan::estimate(Formula::Ratio(("graph", case), ("c-graph", case)), samples) else {
        return (String::new(), String::new());
    };
    let interval = found.interval.map_or(String::new(), |(low, high)| format!("{low:.3} to {high:.3}"));
    (format!("{:.3}", found.median), interval)
}
