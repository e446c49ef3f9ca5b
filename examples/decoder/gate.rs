//! Whether this computes what transformers does: its logits in F32 are the reference, and ours may be at most 1.25 times as far
//! from it as its own in BF16. `benches/python/decoder.py` writes both.

use std::path::Path;

use flashinfer_rs::compute::{HostTensor, Safetensors};

use crate::fault::{Fault, fault};
use crate::graph::residual;
use crate::session::{Session, Slip};
use crate::weights::Wrong;

/// How many times as far as transformers' own BF16 ours may be, over all positions.
pub const TIMES: f64 = 1.25;
/// At any one position, where errors vary.
const TIMES_AT_ONE: f64 = 2.0;

/// What transformers computed of some sequences.
pub struct Reference {
    pub name: String,
    pub sequences: usize,
    /// Tokens ahead of the positions that are compared.
    pub context: usize,
    tokens: Vec<i32>,
    logits: HostTensor,
    /// Of transformers' own BF16, a number for each sequence and position; by the arm that computed it.
    errors: Vec<(String, Vec<f64>)>,
    /// What layers leave in the residual stream, where the file has it.
    residuals: Option<Residuals>,
    pub positions: usize,
    vocab: usize,
}

/// In the order of sequences, positions, layers.
struct Residuals {
    values: HostTensor,
    layers: usize,
    hidden: usize,
    /// As for the logits.
    errors: Vec<(String, Vec<f64>)>,
}

/// How far numbers are from those of a reference, from its `first` on.
fn distance(own: &[f32], reference: &HostTensor, first: usize) -> f64 {
    let (mut off, mut norm) = (0.0, 0.0);
    for (i, own) in own.iter().enumerate() {
        let expected = f64::from(reference.float(first + i));
        off += (f64::from(*own) - expected).powi(2);
        norm += expected.powi(2);
    }
    (off / norm).sqrt()
}

fn root_mean_square(errors: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = errors.len() as f64;
    (errors.map(|error| error * error).sum::<f64>() / count).sqrt()
}

impl Reference {
    /// Every reference of a file.
    pub fn all(path: &Path) -> Result<Vec<Self>, Fault> {
        let file = Safetensors::open(path)?;
        let mut names: Vec<String> =
            file.names().filter_map(|name| name.strip_suffix(".tokens").map(str::to_owned)).collect();
        names.sort();
        let all = names.into_iter().map(|name| Self::of(&file, name)).collect::<Result<Vec<_>, _>>()?;
        if all.is_empty() {
            let path = path.display();
            return Err(fault(format!("{path} has no reference; write it by benches/python/decoder.py reference")));
        }
        Ok(all)
    }

    fn of(file: &Safetensors, name: String) -> Result<Self, Fault> {
        let tokens = file.read(&format!("{name}.tokens"))?;
        let logits = file.read(&format!("{name}.logits"))?;
        let wrong = |what: &str| fault(format!("{}: {name} has {what}; write it anew", file.path().display()));
        let (&[rows, length], &[rows_too, positions, vocab]) = (tokens.shape(), logits.shape()) else {
            return Err(wrong(
                "tokens or logits of other dimensions than [rows, tokens] and [rows, positions, vocabulary]",
            ));
        };
        if rows != rows_too || length <= positions {
            return Err(wrong("as many tokens as positions, or fewer"));
        }
        let tokens = (0..tokens.numel()).map(|i| tokens.int(i).and_then(|token| i32::try_from(token).ok()));
        let tokens = tokens.collect::<Option<Vec<_>>>().ok_or_else(|| wrong("tokens that are no whole numbers"))?;
        let errors_of = |what: &str, count: u64| {
            let prefix = format!("{name}.{what}.");
            let mut errors = Vec::new();
            for own in file.names().filter(|own| own.starts_with(&prefix)) {
                let error = file.read(own)?;
                if error.numel() as u64 != count {
                    return Err(wrong("errors of other positions than its values"));
                }
                let values: Vec<f64> = (0..error.numel()).map(|i| f64::from(error.float(i))).collect();
                errors.push((own[prefix.len()..].to_owned(), values));
            }
            if errors.is_empty() {
                return Err(wrong("no error of transformers' own BF16"));
            }
            Ok(errors)
        };
        let errors = errors_of("error", rows * positions)?;
        let place = format!("{name}.residuals");
        let residuals = match file.names().any(|known| known == place) {
            false => None,
            true => {
                let values = file.read(&place)?;
                let &[own_rows, own_positions, layers, hidden] = values.shape() else {
                    return Err(wrong("residuals of other dimensions than [rows, positions, layers, hidden]"));
                };
                if (own_rows, own_positions) != (rows, positions) || layers == 0 || hidden == 0 {
                    return Err(wrong("residuals of other rows or positions than its logits, or none"));
                }
                let errors = errors_of("residual_error", rows * positions * layers)?;
                Some(Residuals { values, layers: layers as usize, hidden: hidden as usize, errors })
            }
        };
        let (sequences, positions, vocab) = (rows as usize, positions as usize, vocab as usize);
        let context = length as usize - positions;
        Ok(Self { name, sequences, context, tokens, logits, errors, residuals, positions, vocab })
    }

    fn sequence(&self, sequence: usize) -> &[i32] {
        let length = self.context + self.positions;
        &self.tokens[sequence * length..(sequence + 1) * length]
    }

    /// A prefill of the context through the cache, then a step for each token that follows, behind each of which something looks.
    fn walk(
        &self,
        session: &mut Session<'_>,
        slip: Slip,
        look: &mut dyn FnMut(&mut Session<'_>, usize) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        for sequence in 0..self.sequences {
            session.prefill(sequence, &self.sequence(sequence)[..self.context])?;
        }
        session.slip = slip;
        for at in 0..self.positions {
            let tokens: Vec<i32> = (0..self.sequences).map(|row| self.sequence(row)[self.context + at]).collect();
            session.forced(&tokens, 1)?;
            look(session, at)?;
        }
        Ok(())
    }

    /// An output of as many numbers a row as the reference has.
    fn output(&self, session: &mut Session<'_>, name: &str, width: usize) -> Result<Vec<f32>, Fault> {
        let values = session.output(name)?;
        if values.len() != self.sequences * width {
            return Err(fault(format!(
                "the model's {name} is {} numbers of each row, and the reference has {width}; take the config.json that it was \
                 written with",
                values.len() / self.sequences
            )));
        }
        Ok(values)
    }

    /// How far our logits are from the reference, for each sequence and position.
    pub fn errors(&self, session: &mut Session<'_>, slip: Slip) -> Result<Vec<f64>, Fault> {
        let mut errors = vec![0.0; self.sequences * self.positions];
        self.walk(session, slip, &mut |session, at| {
            let logits = self.output(session, "logits", self.vocab)?;
            for (row, own) in logits.chunks_exact(self.vocab).enumerate() {
                let place = row * self.positions + at;
                errors[place] = distance(own, &self.logits, place * self.vocab);
            }
            Ok(())
        })?;
        Ok(errors)
    }

    /// Layers of which the residual stream can be compared: none, where the file has it not.
    pub fn layers(&self) -> usize {
        self.residuals.as_ref().map_or(0, |residuals| residuals.layers)
    }

    /// How far what each layer leaves in the residual stream is from the reference: ours, and transformers' own, over all
    /// sequences and positions. The graph must have the stream as outputs.
    pub fn residuals(&self, session: &mut Session<'_>) -> Result<Vec<(f64, f64)>, Fault> {
        let Some(Residuals { values, layers, hidden, errors }) = &self.residuals else { return Ok(Vec::new()) };
        let mut own = vec![vec![0.0; self.sequences * self.positions]; *layers];
        self.walk(session, Slip::None, &mut |session, at| {
            for (layer, own) in own.iter_mut().enumerate() {
                let stream = self.output(session, &residual(layer as u32), *hidden)?;
                for (row, stream) in stream.chunks_exact(*hidden).enumerate() {
                    let place = row * self.positions + at;
                    own[place] = distance(stream, values, (place * layers + layer) * hidden);
                }
            }
            Ok(())
        })?;
        let theirs = |layer: usize| {
            let of_arm = |(_, theirs): &(String, Vec<f64>)| {
                root_mean_square((0..self.sequences * self.positions).map(|place| theirs[place * layers + layer]))
            };
            errors.iter().map(of_arm).fold(0.0, f64::max)
        };
        Ok(own.into_iter().enumerate().map(|(layer, own)| (root_mean_square(own.into_iter()), theirs(layer))).collect())
    }

    /// The most sequences that some references have at once, and the most tokens.
    pub fn room(all: &[Self]) -> (usize, u64) {
        let most = |of: fn(&Self) -> usize| all.iter().map(of).max().unwrap_or(0);
        (most(|one| one.sequences), most(|one| one.context + one.positions + 1) as u64)
    }

    /// Over all positions: how far ours is, and transformers' own.
    pub fn together(&self, errors: &[f64]) -> (f64, f64) {
        let mean = |errors: &[f64]| root_mean_square(errors.iter().copied());
        (mean(errors), self.errors.iter().map(|(_, theirs)| mean(theirs)).fold(0.0, f64::max))
    }

    /// Says how far the residual stream is behind each layer, and whether that is near enough behind the first, the one in the
    /// middle and the last.
    pub fn judge_residuals(&self, errors: &[(f64, f64)]) -> bool {
        println!("| layer | ours | transformers' own | times |\n|---|---|---|---|");
        for (layer, (ours, theirs)) in errors.iter().enumerate() {
            println!("| {} | {ours:.2e} | {theirs:.2e} | {:.2} |", layer + 1, ours / theirs);
        }
        let mut judged = vec![1, errors.len().div_ceil(2), errors.len()];
        judged.dedup();
        let near = |layer: &usize| errors.get(layer - 1).is_some_and(|(ours, theirs)| *ours <= TIMES * theirs);
        let all = !errors.is_empty() && judged.iter().all(near);
        println!(
            "{}: the residual behind layers {judged:?} (bound {TIMES}): {}",
            self.name,
            if all { "near" } else { "FAR" }
        );
        all
    }

    /// Says how far ours is, and whether that is near enough.
    pub fn judge(&self, errors: &[f64], every: bool) -> bool {
        let of = |place: usize| self.errors.iter().map(|(_, theirs)| theirs[place]).fold(0.0, f64::max);
        let (ours, theirs) = self.together(errors);
        if every {
            println!(
                "| position | ours | {} |",
                self.errors.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(" | ")
            );
            println!("|---|---|{}", "---|".repeat(self.errors.len()));
            for at in 0..self.positions {
                let largest = |errors: &[f64]| {
                    (0..self.sequences).map(|row| errors[row * self.positions + at]).fold(0.0, f64::max)
                };
                let theirs: Vec<_> = self.errors.iter().map(|(_, theirs)| format!("{:.2e}", largest(theirs))).collect();
                println!("| {} | {:.2e} | {} |", self.context + at, largest(errors), theirs.join(" | "));
            }
        }
        let ratios = errors.iter().enumerate().map(|(place, error)| error / of(place));
        let worst = ratios.fold(0.0, |worst: f64, ratio| if ratio <= worst { worst } else { ratio });
        // What is no number is not near.
        let near = ours <= TIMES * theirs && worst <= TIMES_AT_ONE;
        println!(
            "{}: {ours:.3e} beside {theirs:.3e} of transformers' own, {:.2} times (bound {TIMES}), {worst:.2} at the worst position \
             (bound {TIMES_AT_ONE}): {}",
            self.name,
            ours / theirs,
            if near { "near" } else { "FAR" },
        );
        near
    }
}

/// What must turn a gate red.
pub const CONTROLS: [(&str, Option<Wrong>, Slip); 5] = [
    ("the halves of the rope's table swapped", Some(Wrong::RopeHalves), Slip::None),
    ("every position of the decoded tokens one too late", None, Slip::Position),
    ("a page of another sequence", None, Slip::Page),
    ("a weight transposed", Some(Wrong::Transposed), Slip::None),
    ("the norm of another layer", Some(Wrong::AnotherLayersNorm), Slip::None),
];
