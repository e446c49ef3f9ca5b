//! The cosines and sines of rotary position embeddings.

use std::f64::consts::TAU;

use crate::error::Result;
use crate::indices::{Placed, Steering, Words, refuse, sealed};
use crate::tensor::TensorRef;

/// How the angles of rotary embeddings are changed for sequences that are longer than a model was first trained with.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Positions are divided by `factor`.
    Linear {
        /// How much longer sequences may be; positive.
        factor: f64,
    },
    /// As Llama 3.1: low frequencies are divided by `factor`, high ones are not, and those between are blended.
    Llama31 {
        /// What low frequencies are divided by; 8 for Llama 3.1.
        factor: f64,
        /// Frequencies that turn less often than so within the old context are low; 1 for Llama 3.1.
        low_freq_factor: f64,
        /// Those that turn more often are high; 4 for Llama 3.1.
        high_freq_factor: f64,
        /// The old context, in tokens; 8192 for Llama 3.1.
        old_context_length: f64,
    },
    /// YaRN: as Llama 3.1's, with bounds that are found by the number of turns, and with cosines and sines that are longer.
    Yarn {
        /// How much longer sequences may be; 1 or more.
        factor: f64,
        /// The old context, in tokens.
        old_context_length: f64,
        /// Frequencies that turn more often than so within the old context are not changed; usually 32.
        beta_fast: f64,
        /// Those that turn less often are divided by `factor`; usually 1.
        beta_slow: f64,
        /// What cosines and sines are multiplied by; `None` is `0.1 ln(factor) + 1`.
        attention_factor: Option<f64>,
    },
}

/// A table of cosines and sines, one row for each position, for [`apply_rope_with_cos_sin_cache`] and the quantizing forms.
///
/// A row has `rotary_dim / 2` cosines and then as many sines. For heads of which only a part is turned (partial rotary
/// embeddings) `rotary_dim` is the size of that part.
///
/// Upstream's interleaved kernels read up to 32 bytes past a row's end, which of the last row is past the table's. So this
/// table has a row more than it says.
///
/// ```
/// use flashinfer_rs::{CosSinCache, RopeScaling};
///
/// // For Llama 3: heads of 128, which are turned whole, sequences of up to 8,192 tokens.
/// let table = CosSinCache::new(128, 8192, 500_000.0, RopeScaling::None)?;
/// assert_eq!((table.cos(0, 5), table.sin(0, 5)), (1.0, 0.0));
/// // The fastest frequency is one radian for each token.
/// assert_eq!(table.cos(3, 0), 3f64.cos() as f32);
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
///
/// [`apply_rope_with_cos_sin_cache`]: crate::kernels::rope::apply_rope_with_cos_sin_cache
#[derive(Debug, Clone, PartialEq)]
pub struct CosSinCache {
    values: Vec<f32>,
    facts: CosSinFacts,
}

/// What calls need to know of a [`CosSinCache`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CosSinFacts {
    /// How many positions it has.
    pub positions: i64,
    /// How many elements of a head are turned.
    pub rotary_dim: i64,
}

impl CosSinCache {
    /// For the first `rotary_dim` elements of a head and positions below `positions`. The frequencies are
    /// `rope_theta^(−2i / rotary_dim)` before they are scaled.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for a `rotary_dim` that is odd or 0, no positions, 2³¹ numbers
    /// in the table or more, a `rope_theta` that is not above 1, and a scaling whose numbers are not positive or contradict
    /// each other.
    pub fn new(rotary_dim: i64, positions: i64, rope_theta: f64, scaling: RopeScaling) -> Result<Self> {
        check_rotary_dim(rotary_dim)?;
        // The spare row counts too.
        let count = positions.checked_add(1).and_then(|rows| rows.checked_mul(rotary_dim));
        let Some(count) = count.filter(|&count| positions >= 1 && count <= i64::from(i32::MAX)) else {
            let expected =
                format!("1 to {}, so that 32 bits count the table's numbers", i64::from(i32::MAX) / rotary_dim - 1);
            return refuse("CosSinCache", "positions", positions.to_string(), expected);
        };
        if !(rope_theta > 1.0 && rope_theta.is_finite()) {
            return refuse("CosSinCache", "rope_theta", rope_theta.to_string(), "a number above 1; 10000.0 is usual");
        }
        let frequencies = frequencies(rotary_dim, rope_theta, scaling)?;
        let scale = attention_factor(scaling);
        let fits = |frequency: &f64| (frequency * positions as f64).is_finite();
        if !(scale as f32).is_finite() || !frequencies.iter().all(fits) {
            let expected = "numbers whose angles and cosines are finite";
            return refuse("CosSinCache", "scaling", format!("{scaling:?}"), expected);
        }
        let mut values = Vec::new();
        if values.try_reserve_exact(count as usize).is_err() {
            let expected = "a table that the host has memory for, 4 bytes for each of its numbers";
            return refuse("CosSinCache", "positions", format!("{positions}, which take {count} numbers"), expected);
        }
        for position in 0..=positions {
            let angles = frequencies.iter().map(|frequency| frequency * position as f64);
            values.extend(angles.clone().map(|angle| (angle.cos() * scale) as f32));
            values.extend(angles.map(|angle| (angle.sin() * scale) as f32));
        }
        Ok(Self { values, facts: CosSinFacts { positions, rotary_dim } })
    }

    /// From a table of one's own: `positions` rows of `rotary_dim / 2` cosines and as many sines.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for sizes that [`new`](Self::new) refuses, and another number of
    /// values.
    pub fn from_values(values: &[f32], rotary_dim: i64) -> Result<Self> {
        check_rotary_dim(rotary_dim)?;
        let row = rotary_dim as usize;
        if values.is_empty() || !values.len().is_multiple_of(row) || values.len() + row > i32::MAX as usize {
            let expected =
                format!("a multiple of {row}, one row or more, of at most {} numbers", i32::MAX as usize - row);
            return refuse("CosSinCache", "values", format!("{} numbers", values.len()), expected);
        }
        let facts = CosSinFacts { positions: (values.len() / row) as i64, rotary_dim };
        let mut values = values.to_vec();
        values.resize(values.len() + row, 0.0);
        Ok(Self { values, facts })
    }

    /// The cosine of a position's angle with this number. Not a number behind the last.
    pub fn cos(&self, position: usize, i: usize) -> f32 {
        self.value(position, i, 0)
    }

    /// The sine of a position's angle with this number. Not a number behind the last.
    pub fn sin(&self, position: usize, i: usize) -> f32 {
        self.value(position, i, self.facts.rotary_dim as usize / 2)
    }

    fn value(&self, position: usize, i: usize, part: usize) -> f32 {
        let CosSinFacts { positions, rotary_dim } = self.facts;
        let inside = position < positions as usize && i < rotary_dim as usize / 2;
        if inside { self.values[position * rotary_dim as usize + part + i] } else { f32::NAN }
    }
}

fn check_rotary_dim(rotary_dim: i64) -> Result<()> {
    // A table has two rows at the least, with the spare one.
    const MOST: i64 = i32::MAX as i64 / 2;
    if (2..=MOST).contains(&rotary_dim) && rotary_dim % 2 == 0 {
        return Ok(());
    }
    refuse("CosSinCache", "rotary_dim", rotary_dim.to_string(), format!("an even number, 2 to {}", MOST - MOST % 2))
}

fn attention_factor(scaling: RopeScaling) -> f64 {
    match scaling {
        RopeScaling::Yarn { factor, attention_factor, .. } => attention_factor.unwrap_or(0.1 * factor.ln() + 1.0),
        _ => 1.0,
    }
}

/// In radians for each token.
fn frequencies(rotary_dim: i64, theta: f64, scaling: RopeScaling) -> Result<Vec<f64>> {
    let positive = |numbers: &[(&'static str, f64)]| match numbers
        .iter()
        .find(|(_, number)| !(*number > 0.0 && number.is_finite()))
    {
        Some((name, number)) => refuse("CosSinCache", name, number.to_string(), "a positive number"),
        None => Ok(()),
    };
    let plain = (0..rotary_dim / 2).map(|i| theta.powf(-2.0 * i as f64 / rotary_dim as f64));
    match scaling {
        RopeScaling::None => Ok(plain.collect()),
        RopeScaling::Linear { factor } => {
            positive(&[("factor", factor)])?;
            Ok(plain.map(|frequency| frequency / factor).collect())
        }
        RopeScaling::Llama31 { factor, low_freq_factor, high_freq_factor, old_context_length } => {
            positive(&[
                ("factor", factor),
                ("low_freq_factor", low_freq_factor),
                ("high_freq_factor", high_freq_factor),
                ("old_context_length", old_context_length),
            ])?;
            if high_freq_factor <= low_freq_factor {
                let expected = format!("more than low_freq_factor, {low_freq_factor}");
                return refuse("CosSinCache", "high_freq_factor", high_freq_factor.to_string(), expected);
            }
            let blended = |frequency: f64| {
                let turns = frequency * old_context_length / TAU;
                let high = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                (1.0 - high) * frequency / factor + high * frequency
            };
            Ok(plain.map(blended).collect())
        }
        RopeScaling::Yarn { factor, old_context_length, beta_fast, beta_slow, attention_factor } => {
            positive(&[
                ("factor", factor),
                ("old_context_length", old_context_length),
                ("beta_fast", beta_fast),
                ("beta_slow", beta_slow),
                ("attention_factor", attention_factor.unwrap_or(1.0)),
            ])?;
            if factor < 1.0 {
                return refuse("CosSinCache", "factor", factor.to_string(), "1 or more");
            }
            if beta_fast < beta_slow {
                let expected = format!("beta_slow, {beta_slow}, or more");
                return refuse("CosSinCache", "beta_fast", beta_fast.to_string(), expected);
            }
            // The number of the frequency that turns so often within the old context.
            let number =
                |turns: f64| rotary_dim as f64 * (old_context_length / (turns * TAU)).ln() / (2.0 * theta.ln());
            let last = (rotary_dim - 1) as f64;
            let (first, end) = (number(beta_fast).floor().max(0.0), number(beta_slow).ceil().min(last));
            let span = if end == first { 0.001 } else { end - first };
            let blended = |(i, frequency): (usize, f64)| {
                let low = ((i as f64 - first) / span).clamp(0.0, 1.0);
                low * frequency / factor + (1.0 - low) * frequency
            };
            Ok(plain.enumerate().map(blended).collect())
        }
    }
}

impl sealed::Sealed for CosSinCache {}

impl Steering for CosSinCache {
    type Facts = CosSinFacts;

    fn facts(&self) -> CosSinFacts {
        self.facts
    }

    fn arrays(&self) -> Vec<Words<'_>> {
        vec![Words::F32(&self.values)]
    }

    fn in_place_of(&self, captured: &Self) -> Result<Self> {
        match self.facts == captured.facts {
            true => Ok(self.clone()),
            false => {
                let shown = |facts: CosSinFacts| format!("{} positions of {}", facts.positions, facts.rotary_dim);
                refuse(
                    "CosSinCache",
                    "cos_sin_cache",
                    shown(self.facts),
                    format!("{}, as captured", shown(captured.facts)),
                )
            }
        }
    }
}

impl<'a> Placed<'a, CosSinCache> {
    /// A table that is on a device already: F32, `[positions, rotary_dim]`. What it must be besides, calls check.
    ///
    /// # Safety
    /// Behind the table 32 bytes more must be readable, for as long as it is: upstream's interleaved kernels read them.
    pub unsafe fn from_tensor(table: TensorRef<'a>) -> Self {
        let size = |dimension: usize| table.shape().get(dimension).copied().unwrap_or(0);
        let facts = CosSinFacts { positions: size(0), rotary_dim: size(1) };
        Self::promised(facts, vec![table])
    }

    /// `[positions, rotary_dim]`, without the spare row.
    #[inline]
    pub(crate) fn table(&self) -> TensorRef<'_> {
        let CosSinFacts { positions, rotary_dim } = self.facts();
        // Of a table of this module's own the spare row is there too.
        match self.array_len(0) {
            Some(len) if rotary_dim > 0 && len / rotary_dim > positions => self.array_in(0, &[positions, rotary_dim]),
            _ => self.array(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{CosSinCache, RopeScaling};
    use crate::indices::{Steering, Words};

    #[test]
    fn sizes_of_which_there_can_be_no_table_are_refused() {
        for rotary_dim in [i64::MIN, -2, 0, 3, 1 << 30, 1 << 40, i64::MAX - 1, i64::MAX] {
            for error in [
                CosSinCache::new(rotary_dim, 5, 1e4, RopeScaling::None).unwrap_err(),
                CosSinCache::from_values(&[1.0; 4], rotary_dim).unwrap_err(),
            ] {
                let says = format!("CosSinCache: rotary_dim is {rotary_dim}, expected an even number, 2 to 1073741822");
                assert!(error.to_string().starts_with(&says), "{error}");
            }
        }
        let yarn = |beta_fast, old_context_length| RopeScaling::Yarn {
            factor: 4.0,
            old_context_length,
            beta_fast,
            beta_slow: 1.0,
            attention_factor: None,
        };
        for (scaling, argument) in [
            (RopeScaling::Linear { factor: 1e-308 }, "scaling"),
            (yarn(0.5, 4096.0), "beta_fast"),
            (RopeScaling::Linear { factor: f64::NAN }, "factor"),
        ] {
            let error = CosSinCache::new(64, 16, 1e4, scaling).unwrap_err().to_string();
            assert!(error.starts_with(&format!("CosSinCache: {argument} is")), "{error}");
        }
        let whole = CosSinCache::new(64, 16, 1e4, yarn(1.0, 1e308)).map(|table| table.cos(15, 31).is_finite());
        assert!(matches!(whole, Ok(true) | Err(_)), "numbers or none");
        for positions in [i64::MIN, 0, i64::MAX] {
            let error = CosSinCache::new(1 << 29, positions, 1e4, RopeScaling::None).unwrap_err().to_string();
            assert!(error.contains("positions") && error.contains("expected 1 to 2, so"), "{error}");
        }
    }

    /// Interleaved kernels read up to 32 bytes past a row.
    #[test]
    fn behind_the_last_row_there_is_another() {
        let own = CosSinCache::new(16, 5, 1e4, RopeScaling::None).unwrap();
        let given = CosSinCache::from_values(&[1.0; 5 * 16], 16).unwrap();
        for table in [own, given] {
            let [Words::F32(values)] = table.arrays()[..] else { panic!("one array of F32") };
            assert_eq!((table.facts().positions, values.len()), (5, 6 * 16));
        }
    }
}
