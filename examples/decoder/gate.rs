//! Whether this computes what transformers does: its logits in F32 are the reference, and ours may be at most 1.25 times as far
//! from it as its own in BF16. `benches/python/decoder.py` writes both.

use std::path::Path;

use flashinfer_rs::compute::{HostTensor, Safetensors};

use crate::fault::{Fault, fault};
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
    pub positions: usize,
    vocab: usize,
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
        let prefix = format!("{name}.error.");
        let mut errors = Vec::new();
        for own in file.names().filter(|own| own.starts_with(&prefix)) {
            let error = file.read(own)?;
            if error.numel() as u64 != rows * positions {
                return Err(wrong("errors of other positions than its logits"));
            }
            errors.push((
                own[prefix.len()..].to_owned(),
                (0..error.numel()).map(|i| f64::from(error.float(i))).collect(),
            ));
        }
        if errors.is_empty() {
            return Err(wrong("no error of transformers' own BF16"));
        }
        let (sequences, positions, vocab) = (rows as usize, positions as usize, vocab as usize);
        let context = length as usize - positions;
        Ok(Self { name, sequences, context, tokens, logits, errors, positions, vocab })
    }

    fn sequence(&self, sequence: usize) -> &[i32] {
        let length = self.context + self.positions;
        &self.tokens[sequence * length..(sequence + 1) * length]
    }

    /// How far ours is from the reference, for each sequence and position: a prefill of the context through the cache, then a
    /// step for each token that follows.
    pub fn errors(&self, session: &mut Session<'_>, slip: Slip) -> Result<Vec<f64>, Fault> {
        for sequence in 0..self.sequences {
            session.prefill(sequence, &self.sequence(sequence)[..self.context])?;
        }
        session.slip = slip;
        let mut errors = vec![0.0; self.sequences * self.positions];
        for at in 0..self.positions {
            let tokens: Vec<i32> = (0..self.sequences).map(|row| self.sequence(row)[self.context + at]).collect();
            session.forced(&tokens, 1)?;
            let logits = session.logits()?;
            if logits.len() != self.sequences * self.vocab {
                return Err(fault(format!(
                    "the model has {} logits of each row, and the reference {}; take the config.json that it was written with",
                    logits.len() / self.sequences,
                    self.vocab
                )));
            }
            for (row, own) in logits.chunks_exact(self.vocab).enumerate() {
                let place = row * self.positions + at;
                let (mut off, mut norm) = (0.0, 0.0);
                for (i, own) in own.iter().enumerate() {
                    let expected = f64::from(self.logits.float(place * self.vocab + i));
                    off += (f64::from(*own) - expected).powi(2);
                    norm += expected.powi(2);
                }
                errors[place] = (off / norm).sqrt();
            }
        }
        Ok(errors)
    }

    /// The most sequences that some references have at once, and the most tokens.
    pub fn room(all: &[Self]) -> (usize, u64) {
        let most = |of: fn(&Self) -> usize| all.iter().map(of).max().unwrap_or(0);
        (most(|one| one.sequences), most(|one| one.context + one.positions + 1) as u64)
    }

    /// Over all positions: how far ours is, and transformers' own.
    pub fn together(&self, errors: &[f64]) -> (f64, f64) {
        let mean =
            |errors: &[f64]| (errors.iter().map(|error| error * error).sum::<f64>() / errors.len() as f64).sqrt();
        (mean(errors), self.errors.iter().map(|(_, theirs)| mean(theirs)).fold(0.0, f64::max))
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
