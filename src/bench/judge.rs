//! Whether outputs are right, by upstream's rules and numbers.

use std::path::Path;

use super::definition::Definition;
use super::error::unfit;
use super::inputs::{Input, InputOptions};
use super::json::Json;
use super::named::Named;
use super::tensor::HostTensor;
use super::trace::{Correctness, Environment, Evaluation, Performance, Status, Workload, timestamp};
use crate::error::Result;

/// How far off an output may be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tolerance {
    /// An element is wrong where its absolute error is beyond this,
    pub atol: f64,
    /// and its relative error beyond this.
    pub rtol: f64,
    /// The part of the elements that must not be wrong.
    pub required_matched_ratio: f64,
}

impl Tolerance {
    /// Upstream's for a definition: both 1e-2, for all elements; for mixtures of experts, up to 0.1.2 those in eight bits alone,
    /// 95 % of them.
    pub fn of(definition: &Definition) -> Self {
        let ratio = if is_low_bit(definition) { 0.95 } else { 1.0 };
        Self { atol: 1e-2, rtol: 1e-2, required_matched_ratio: ratio }
    }
}

/// Those whose matched ratio upstream notes. After 0.1.2 it is all mixtures of experts.
fn is_low_bit(definition: &Definition) -> bool {
    definition.name.contains("moe_fp8_block_scale") || definition.op_type == "moe"
}

/// What is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Timing {
    /// Each call alone, as FlashInfer-Bench 0.1.2 does: every tensor is copied anew before it, and on a GPU 256 MiB are
    /// written before that, so that the caches hold little of the inputs. The time is the mean.
    #[default]
    Each,
    /// All calls together, one queued behind the other, with the same tensors: what a call takes among others, also where it
    /// takes less than a launch does.
    Span,
}

/// How often and how upstream's default benchmark runs a solution.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct BenchmarkConfig {
    /// Calls before any is timed: 10.
    pub warmup_runs: u32,
    /// Calls that are timed: 50.
    pub iterations: u32,
    /// What is timed: [each call](Timing::Each).
    pub timing: Timing,
    /// How many inputs a solution is checked and timed with: 3.
    pub num_trials: u32,
    /// How many draws of a sampling solution are looked at one by one: 100.
    pub sampling_validation_trials: u32,
    /// How many tokens of each row are drawn for their frequencies: 500,000.
    pub sampling_draws: u64,
    /// How far a sampling solution's frequencies may be from the probabilities, as a total variation distance: 0.2.
    pub sampling_tvd_threshold: f64,
}

impl Default for BenchmarkConfig {
    fn default() -> Self {
        Self {
            warmup_runs: 10,
            iterations: 50,
            timing: Timing::Each,
            num_trials: 3,
            sampling_validation_trials: 100,
            sampling_draws: 500_000,
            sampling_tvd_threshold: 0.2,
        }
    }
}

/// The outputs of one call and those that they should be.
#[derive(Debug, Clone, Copy)]
pub struct Trial<'a> {
    /// What the solution gave, in the definition's order.
    pub outputs: &'a [HostTensor],
    /// What the reference gave.
    pub reference: &'a [HostTensor],
}

/// What a check found.
#[derive(Debug, Clone, PartialEq)]
pub struct Judgement {
    /// [`Passed`](Status::Passed), or why not.
    pub status: Status,
    /// How far off the outputs are, where numbers were compared.
    pub correctness: Option<Correctness>,
    /// What is wrong, with the output and the trial; and where upstream's rules are blind.
    pub log: Vec<String>,
}

impl Judgement {
    /// The evaluation of it, of this moment. The performance counts where the solution passed.
    ///
    /// # Errors
    /// [`Data`](crate::FlashInferError::Data) where a solution that passed has no performance.
    pub fn into_evaluation(self, environment: Environment, performance: Option<Performance>) -> Result<Evaluation> {
        let performance = performance.filter(|_| self.status == Status::Passed);
        let correctness = self.correctness;
        let (status, log) = (self.status, self.log.join("\n"));
        let evaluation = Evaluation { status, environment, timestamp: timestamp(), log, correctness, performance };
        evaluation.validate()?;
        Ok(evaluation)
    }
}

/// Compares the outputs of several calls, as upstream's default and low-bit checks do. Any output that is not finite is wrong, even
/// where the reference's is the same; and an element of the reference that is not finite lets any output through, which
/// the log notes.
///
/// # Errors
/// [`Data`](crate::FlashInferError::Data) for another number of outputs than the definition has.
pub fn judge(definition: &Definition, trials: &[Trial<'_>], tolerance: &Tolerance) -> Result<Judgement> {
    let (mut max_abs, mut max_rel, mut least_ratio) = (0.0f64, 0.0f64, 1.0f64);
    let (mut wrong, mut log) = (false, Vec::new());
    for (i, trial) in trials.iter().enumerate() {
        for (whose, tensors) in [("outputs", trial.outputs), ("reference", trial.reference)] {
            if tensors.len() != definition.outputs.len() {
                let (found, expected) = (format!("{} tensors", tensors.len()), definition.outputs.len().to_string());
                let remedy = "give one for each output of the definition";
                return Err(unfit(&format!("trial {}", i + 1), whose, found, expected, remedy));
            }
        }
        let pairs = definition.outputs.names().zip(trial.outputs.iter().zip(trial.reference));
        for (name, (output, reference)) in pairs {
            let mut fail = |status, correctness, what: String| {
                log.push(format!("trial {}, output {name:?}: {what}", i + 1));
                Ok(Judgement { status, correctness, log: std::mem::take(&mut log) })
            };
            if output.shape() != reference.shape() {
                let what = format!("shape {:?}, expected {:?}", output.shape(), reference.shape());
                return fail(Status::IncorrectShape, None, what);
            }
            if output.dtype() != reference.dtype() {
                let what = format!("element type {}, expected {}", output.dtype(), reference.dtype());
                return fail(Status::IncorrectDtype, None, what);
            }
            let numbers = |tensor: &HostTensor| (0..tensor.slots()).map(|at| tensor.float(at)).collect::<Vec<_>>();
            let (output, reference) = (numbers(output), numbers(reference));
            let infinite = output.iter().position(|number| number.is_infinite());
            if let Some(at) = infinite.or_else(|| output.iter().position(|number| number.is_nan())) {
                let error = if infinite.is_some() { f64::INFINITY } else { f64::NAN };
                let correctness = Correctness { max_relative_error: error, max_absolute_error: error, extra: None };
                let what = format!("element {at} is {}", output[at]);
                return fail(Status::IncorrectNumerical, Some(correctness), what);
            }
            let blind = reference.iter().filter(|number| !number.is_finite()).count();
            if blind > 0 {
                log.push(format!(
                    "trial {}, output {name:?}: {blind} elements of the reference are not finite; nothing is compared there",
                    i + 1
                ));
            }
            let stats = Stats::of(&output, &reference, tolerance);
            if stats.matched_ratio < tolerance.required_matched_ratio {
                wrong = true;
                log.push(format!(
                    "trial {}, output {name:?}: {} of {} elements are wrong, the first at {}",
                    i + 1,
                    stats.wrong,
                    output.len(),
                    stats.first.unwrap_or_default()
                ));
            }
            least_ratio = least_ratio.min(stats.matched_ratio);
            // As Python's `max`, which keeps the first where the other is no number.
            max_abs = if stats.max_abs > max_abs { stats.max_abs } else { max_abs };
            max_rel = if stats.max_rel > max_rel { stats.max_rel } else { max_rel };
        }
    }
    let extra = is_low_bit(definition).then(|| Named::from([("matched_ratio", Json::Float(least_ratio))]));
    let correctness = Correctness { max_relative_error: max_rel, max_absolute_error: max_abs, extra };
    let status = if wrong { Status::IncorrectNumerical } else { Status::Passed };
    Ok(Judgement { status, correctness: Some(correctness), log })
}

/// Checks a solution with a workload, as upstream does: as many [trials](BenchmarkConfig::num_trials) as the configuration says,
/// each with other random inputs, whose outputs are [judged](judge) by the reference's; [by draws](judge_sampling) where the
/// definition is of sampling. Both closures are given the inputs in the definition's order, and answer its outputs.
///
/// # Errors
/// What is wrong with the workload, or its files; what the reference answers; what [`judge`] answers. What the solution answers as an
/// error is the [`RuntimeError`](Status::RuntimeError) of a judgement.
pub fn check_solution(
    definition: &Definition,
    workload: &Workload,
    root: impl AsRef<Path>,
    (config, tolerance): (&BenchmarkConfig, &Tolerance),
    options: &InputOptions,
    mut solution: impl FnMut(&Named<Input>) -> Result<Vec<HostTensor>>,
    mut reference: impl FnMut(&Named<Input>) -> Result<Vec<HostTensor>>,
) -> Result<Judgement> {
    let root = root.as_ref();
    if definition.op_type == "sampling" {
        let inputs = workload.make_inputs(definition, root, options)?;
        return judge_sampling(definition, &inputs, config, solution);
    }
    let mut kept = Vec::new();
    for trial in 0..config.num_trials {
        let inputs = workload.make_inputs(definition, root, &options.of_trial(trial))?;
        let expected = reference(&inputs)?;
        match solution(&inputs) {
            Ok(outputs) => kept.push((outputs, expected)),
            Err(error) => {
                let log = vec![format!("trial {}: {error}", trial + 1)];
                return Ok(Judgement { status: Status::RuntimeError, correctness: None, log });
            }
        }
    }
    let trials: Vec<_> = kept.iter().map(|(outputs, reference)| Trial { outputs, reference }).collect();
    judge(definition, &trials, tolerance)
}

/// The errors of one output.
struct Stats {
    max_abs: f64,
    max_rel: f64,
    wrong: usize,
    first: Option<usize>,
    matched_ratio: f64,
}

impl Stats {
    /// In single precision, as upstream computes them.
    fn of(output: &[f32], reference: &[f32], tolerance: &Tolerance) -> Self {
        let mut stats = Self { max_abs: 0.0, max_rel: 0.0, wrong: 0, first: None, matched_ratio: 1.0 };
        for (i, (x, y)) in output.iter().zip(reference).enumerate() {
            let absolute = (x - y).abs();
            let relative = absolute / (y.abs() + 1e-8);
            // A largest that is no number stays that, as PyTorch has it.
            stats.max_abs = largest(stats.max_abs, absolute);
            stats.max_rel = largest(stats.max_rel, relative);
            if absolute > tolerance.atol as f32 && relative > tolerance.rtol as f32 {
                stats.wrong += 1;
                stats.first.get_or_insert(i);
            }
        }
        if !output.is_empty() {
            stats.matched_ratio = 1.0 - stats.wrong as f64 / output.len() as f64;
        }
        stats
    }
}

fn largest(so_far: f64, next: f32) -> f64 {
    if so_far.is_nan() || next.is_nan() { f64::NAN } else { so_far.max(next.into()) }
}

/// How a sampling definition narrows the tokens that may be drawn, by its name.
fn narrows(definition: &Definition) -> (bool, bool) {
    let name = definition.name.to_lowercase();
    (name.contains("top_k"), name.contains("top_p"))
}

/// The probabilities of a sampling definition, `[rows, vocabulary]` in single precision, and which tokens may be drawn.
struct Drawn {
    vocabulary: usize,
    allowed: Vec<bool>,
    expected: Vec<f32>,
}

/// What is beyond `top_p` by this much is still let through.
const TOP_P_SLACK: f32 = 5e-2;

impl Drawn {
    fn of(definition: &Definition, inputs: &Named<Input>) -> Result<Self> {
        let refuse = |what: &str, expected: &str| {
            let (whose, place) = (format!("the definition {:?}", definition.name), format!("the input {what:?}"));
            unfit(&whose, place, "no such", expected, "sampling is checked by the inputs `probs`, `top_k` and `top_p`")
        };
        let Some(Input::Tensor(probs)) = inputs.get("probs") else { return Err(refuse("probs", "a tensor")) };
        let (rows, vocabulary) = match *probs.shape() {
            [vocabulary] => (1, vocabulary as usize),
            [rows, vocabulary] => (rows as usize, vocabulary as usize),
            _ => return Err(refuse("probs", "one or two dimensions")),
        };
        let (top_k, top_p) = narrows(definition);
        let parameter = |name: &str, row: usize| -> Result<f64> {
            match inputs.get(name) {
                Some(Input::Tensor(tensor)) if tensor.numel() > 0 => {
                    let at = if tensor.shape().is_empty() { 0 } else { row.min(tensor.numel() - 1) };
                    Ok(tensor.int(at).map_or_else(|| tensor.float(at).into(), |number| number as f64))
                }
                Some(Input::Int(number)) => Ok(*number as f64),
                Some(Input::Float(number)) => Ok(*number),
                _ => Err(refuse(name, "a tensor or a number")),
            }
        };
        let mut drawn =
            Self { vocabulary, allowed: vec![true; rows * vocabulary], expected: vec![0.0; rows * vocabulary] };
        for row in 0..rows {
            let here = row * vocabulary..(row + 1) * vocabulary;
            let values: Vec<f32> = here.clone().map(|at| probs.float(at)).collect();
            let mut order: Vec<usize> = (0..vocabulary).collect();
            order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
            let allowed = &mut drawn.allowed[here.clone()];
            if top_k {
                let k = parameter("top_k", row)?;
                if k > 0.0 && k < vocabulary as f64 {
                    // Those that are as likely as the last of them count, too.
                    let pivot = values[order[k as usize - 1]];
                    allowed.iter_mut().zip(&values).for_each(|(allowed, &value)| *allowed &= value >= pivot);
                }
            }
            if top_p {
                let p = parameter("top_p", row)?;
                if p > 0.0 && p < 1.0 {
                    let (mut sum, mut inside) = (0.0f32, vec![false; vocabulary]);
                    for (rank, &token) in order.iter().enumerate() {
                        sum += values[token];
                        inside[token] = sum <= p as f32 + TOP_P_SLACK || rank == 0;
                    }
                    allowed.iter_mut().zip(&inside).for_each(|(allowed, &inside)| *allowed &= inside);
                }
            }
            let kept: f32 =
                values.iter().zip(allowed.iter()).map(|(value, &allowed)| if allowed { *value } else { 0.0 }).sum();
            for ((expected, value), allowed) in drawn.expected[here].iter_mut().zip(&values).zip(allowed.iter()) {
                *expected = if *allowed { value / kept } else { 0.0 };
            }
        }
        Ok(drawn)
    }

    fn rows(&self) -> usize {
        self.allowed.len().checked_div(self.vocabulary).unwrap_or(0)
    }
}

/// Checks a definition whose `op_type` is `sampling`, as upstream does: every token that is drawn is one of those that may be,
/// and over many draws each token comes as often as its probability says. `run` is called with inputs of the definition's
/// order, whose rows are repeated to about 10,000 for the second part, and answers the outputs.
///
/// # Errors
/// [`Data`](crate::FlashInferError::Data) for a definition without the inputs of sampling. What `run` answers as an error is a
/// [`RuntimeError`](Status::RuntimeError).
pub fn judge_sampling(
    definition: &Definition,
    inputs: &Named<Input>,
    config: &BenchmarkConfig,
    mut run: impl FnMut(&Named<Input>) -> Result<Vec<HostTensor>>,
) -> Result<Judgement> {
    let drawn = Drawn::of(definition, inputs)?;
    let (rows, vocabulary) = (drawn.rows(), drawn.vocabulary);
    let failed = |error: String| Judgement { status: Status::RuntimeError, correctness: None, log: vec![error] };
    let outside = |what: String| {
        let (max_relative_error, max_absolute_error) = (f64::INFINITY, f64::INFINITY);
        let correctness = Correctness { max_relative_error, max_absolute_error, extra: None };
        Judgement { status: Status::IncorrectNumerical, correctness: Some(correctness), log: vec![what] }
    };
    let mut draw = |inputs: &Named<Input>| -> std::result::Result<Vec<i128>, String> {
        let outputs = run(inputs).map_err(|error| error.to_string())?;
        // Tokens are the first output.
        let tokens = outputs.first().ok_or("there is no output")?;
        let tokens: Option<Vec<i128>> = (0..tokens.numel()).map(|at| tokens.int(at)).collect();
        tokens.ok_or_else(|| "the first output is no tensor of whole numbers".to_owned())
    };
    for _ in 0..config.sampling_validation_trials {
        let tokens = match draw(inputs) {
            Ok(tokens) => tokens,
            Err(error) => return Ok(failed(error)),
        };
        for (i, &token) in tokens.iter().enumerate() {
            let Some(at) = usize::try_from(token).ok().filter(|&at| at < vocabulary) else {
                return Ok(outside(format!("the token {token} is outside of the vocabulary of {vocabulary}")));
            };
            let row = i % rows.max(1);
            if !drawn.allowed[row * vocabulary + at] {
                return Ok(outside(format!("the token {token} must not be drawn in row {row}")));
            }
        }
    }
    if rows == 0 {
        return judge(definition, &[], &Tolerance::of(definition));
    }
    let repeats = (10_000 / rows).max(1);
    let repeated = inputs.iter().map(|(name, input)| Ok((name.to_owned(), repeat(name, input, repeats, rows)?)));
    let repeated = Named::distinct(repeated.collect::<Result<_>>()?);
    let (mut counts, mut draws) = (vec![0u64; rows * vocabulary], 0u64);
    for _ in 0..config.sampling_draws.div_ceil(repeats as u64) {
        let tokens = match draw(&repeated) {
            Ok(tokens) => tokens,
            Err(error) => return Ok(failed(error)),
        };
        for (i, &token) in tokens.iter().enumerate() {
            let Some(at) = usize::try_from(token).ok().filter(|&at| at < vocabulary) else {
                return Ok(failed(format!("the token {token} is outside of the vocabulary of {vocabulary}")));
            };
            counts[i % rows * vocabulary + at] += 1;
        }
        draws += repeats as u64;
    }
    let frequencies: Vec<f32> = counts.iter().map(|&count| count as f32 / draws as f32).collect();
    let (mut distances, mut max_abs, mut max_rel) = (Vec::new(), 0.0f64, 0.0f64);
    for row in 0..rows {
        let here = row * vocabulary..(row + 1) * vocabulary;
        let (found, expected) = (&frequencies[here.clone()], &drawn.expected[here]);
        let distance: f64 = found.iter().zip(expected).map(|(x, y)| f64::from((x - y).abs())).sum();
        distances.push(0.5 * distance);
        let stats = Stats::of(found, expected, &Tolerance::of(definition));
        max_abs = max_abs.max(stats.max_abs);
        max_rel = max_rel.max(stats.max_rel);
    }
    let worst = distances.iter().copied().fold(0.0, f64::max);
    let listed = Json::List(distances.iter().map(|&distance| Json::Float(distance)).collect());
    let extra = Some(Named::from([("tvd", Json::Float(worst)), ("tvds_per_batch", listed)]));
    let correctness = Correctness { max_relative_error: max_rel, max_absolute_error: max_abs, extra };
    let wrong = worst > config.sampling_tvd_threshold;
    let status = if wrong { Status::IncorrectNumerical } else { Status::Passed };
    let log = wrong.then(|| {
        format!("frequencies are {worst} from the probabilities, at most {} is right", config.sampling_tvd_threshold)
    });
    Ok(Judgement { status, correctness: Some(correctness), log: log.into_iter().collect() })
}

/// A tensor's rows `count` times; one number as many times as there are rows then.
fn repeat(name: &str, input: &Input, count: usize, rows: usize) -> Result<Input> {
    let Input::Tensor(tensor) = input else { return Ok(input.clone()) };
    let (shape, count) = match (tensor.shape(), name) {
        ([], _) => (vec![(count * rows) as u64], count * rows),
        ([vocabulary], "probs") => (vec![count as u64, *vocabulary], count),
        ([first, others @ ..], _) => {
            let first = first.saturating_mul(count as u64);
            (std::iter::once(first).chain(others.iter().copied()).collect(), count)
        }
    };
    let mut repeated = HostTensor::zeros(tensor.dtype().clone(), &shape)?;
    let bytes = tensor.bytes();
    if !bytes.is_empty() {
        repeated.bytes_mut().chunks_exact_mut(bytes.len()).take(count).for_each(|part| part.copy_from_slice(bytes));
    }
    Ok(Input::Tensor(repeated))
}
