//! Which solution to run: the best that a dataset's traces know.

use std::collections::HashMap;

use super::dataset::Dataset;
use super::definition::Axes;
use super::solution::Solution;
use super::trace::Trace;

/// What a trace must be like to count.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ApplyConfig {
    /// The largest absolute error. Upstream's default is 1e-2.
    pub max_atol: f64,
    /// The largest relative error. Upstream's default, 1e-5, leaves hardly any solution in 16 bits over: near zero, an
    /// element's relative error is large.
    pub max_rtol: f64,
    /// Only traces that ran on this hardware, by the name in their environment. Upstream ranks those of all hardware together;
    /// so does `None`.
    pub hardware: Option<String>,
    /// Whether sizes that no trace has get the solution that is the best for most sizes. Upstream's default is not.
    pub use_best_on_miss: bool,
}

impl ApplyConfig {
    /// With these largest errors, on any hardware, for exactly the sizes that traces have.
    pub fn new(max_atol: f64, max_rtol: f64) -> Self {
        Self { max_atol, max_rtol, hardware: None, use_best_on_miss: false }
    }
}

/// The best solution of one definition for each sizes of axes: what upstream's `apply` looks up.
#[derive(Debug, Clone)]
pub struct ApplyTable {
    /// The solutions' names.
    by_axes: HashMap<Axes, String>,
    /// The one that is the best for most sizes.
    best: Option<String>,
    use_best_on_miss: bool,
}

impl ApplyTable {
    /// Ranks a definition's traces: of those that passed within the errors, the highest speedup for each sizes of axes; of
    /// several, the first.
    pub fn new(dataset: &Dataset, definition: &str, config: &ApplyConfig) -> Self {
        let mut winners: Vec<&Trace> = Vec::new();
        let mut places: HashMap<&Axes, usize> = HashMap::new();
        for trace in dataset.traces(definition) {
            let there = trace.evaluation.as_ref().map(|evaluation| evaluation.environment.hardware.as_str());
            let elsewhere = config.hardware.as_deref().is_some_and(|wanted| there != Some(wanted));
            if elsewhere || !is_accurate(trace, config.max_atol, config.max_rtol) {
                continue;
            }
            match places.get(&trace.workload.axes) {
                Some(&at) if speedup(trace) > speedup(winners[at]) => winners[at] = trace,
                Some(_) => {}
                None => {
                    places.insert(&trace.workload.axes, winners.len());
                    winners.push(trace);
                }
            }
        }
        let mut wins: Vec<(&str, usize)> = Vec::new();
        for solution in winners.iter().filter_map(|trace| trace.solution.as_deref()) {
            match wins.iter_mut().find(|(known, _)| *known == solution) {
                Some((_, count)) => *count += 1,
                None => wins.push((solution, 1)),
            }
        }
        // The first of those with the most, as a stable sort has it.
        let best = wins.iter().fold(None, |best: Option<&(&str, usize)>, next| match best {
            Some(best) if best.1 >= next.1 => Some(best),
            _ => Some(next),
        });
        let names = winners.iter().filter_map(|trace| Some((trace.workload.axes.clone(), trace.solution.clone()?)));
        Self {
            by_axes: names.collect(),
            best: best.map(|(name, _)| (*name).to_owned()),
            use_best_on_miss: config.use_best_on_miss,
        }
    }

    /// The name of the solution for these sizes of all variable axes.
    pub fn solution(&self, axes: &Axes) -> Option<&str> {
        let missed = if self.use_best_on_miss { self.best.as_deref() } else { None };
        self.by_axes.get(axes).map(String::as_str).or(missed)
    }

    /// Each sizes of axes with the name of the solution for them.
    pub fn iter(&self) -> impl Iterator<Item = (&Axes, &str)> {
        self.by_axes.iter().map(|(axes, name)| (axes, name.as_str()))
    }

    /// The solution that is the best for most sizes.
    pub fn best(&self) -> Option<&str> {
        self.best.as_deref()
    }

    /// How many sizes have a solution.
    pub fn len(&self) -> usize {
        self.by_axes.len()
    }

    /// Whether no sizes have one.
    pub fn is_empty(&self) -> bool {
        self.by_axes.is_empty()
    }
}

/// The best solution of a dataset for a definition with these sizes of all variable axes; `None` where no trace counts, and where
/// the dataset lacks the solution that won. For many look-ups, make an [`ApplyTable`].
pub fn apply<'a>(dataset: &'a Dataset, definition: &str, axes: &Axes, config: &ApplyConfig) -> Option<&'a Solution> {
    let table = ApplyTable::new(dataset, definition, config);
    dataset.solution(table.solution(axes)?)
}

/// Whether a trace passed with errors of at most these; one that is no number does not.
pub(super) fn is_accurate(trace: &Trace, max_atol: f64, max_rtol: f64) -> bool {
    let correctness = trace.evaluation.as_ref().and_then(|evaluation| evaluation.correctness.as_ref());
    trace.passed()
        && correctness.is_some_and(|found| found.max_absolute_error <= max_atol && found.max_relative_error <= max_rtol)
}

pub(super) fn speedup(trace: &Trace) -> f64 {
    let performance = trace.evaluation.as_ref().and_then(|evaluation| evaluation.performance);
    performance.map_or(0.0, |performance| performance.speedup_factor)
}
