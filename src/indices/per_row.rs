//! Numbers of rows: what sampling takes for each row of a batch, which a kernel does not check and must be able to trust.

use std::fmt::{Debug, Display};
use std::marker::PhantomData;

use super::{Placed, Steering, Words, refuse, sealed};
use crate::error::Result;
use crate::tensor::TensorRef;

/// What a number of a row means, which decides what it may be. Implemented by this crate's types alone.
pub trait Parameter: sealed::Sealed + Clone + Copy + Debug + 'static {
    /// `i32` or `f32`, as kernels take it.
    type Value: Copy + Debug + Display + PartialEq;

    #[doc(hidden)]
    const NAME: &'static str;
    #[doc(hidden)]
    const EXPECTED: &'static str;
    /// What changes nothing, or the least: for rows that are there to fill up a batch.
    #[doc(hidden)]
    const NEUTRAL: Self::Value;

    #[doc(hidden)]
    fn allows(value: Self::Value) -> bool;

    #[doc(hidden)]
    fn words(values: &[Self::Value]) -> Words<'_>;
}

/// The smallest `top_p`: a kernel flushes what is subnormal to 0, and then never finds a token.
pub(crate) const LEAST_TOP_P: f64 = 1e-30;
/// The smallest temperature and the largest one: kernels multiply by its inverse, which is to be a number too.
pub(crate) const TEMPERATURES: (f64, f64) = (1e-30, 1e30);

macro_rules! parameters {
    ($($(#[$doc:meta])* $name:ident($word:ident, $value:ty) = $label:literal, $expected:literal, $neutral:expr, $allows:expr;)+) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name {}

        impl sealed::Sealed for $name {}

        impl Parameter for $name {
            type Value = $value;

            const NAME: &'static str = $label;
            const EXPECTED: &'static str = $expected;
            const NEUTRAL: $value = $neutral;

            fn allows(value: $value) -> bool {
                const ALLOWS: fn($value) -> bool = $allows;
                ALLOWS(value)
            }

            fn words(values: &[$value]) -> Words<'_> {
                Words::$word(values)
            }
        }
    )+};
}

parameters! {
    /// How many of the likeliest tokens a token is drawn from: 1 or more; as many as there are, or more, is all of them.
    TopK(I32, i32) = "top_k", "1 or more; as many as the vocabulary has, or more, is no limit", 1, |k| k >= 1;
    /// The sum of the likeliest tokens' probabilities that a token is drawn from: above 0 and up to 1, which is all of them.
    TopP(F32, f32) = "top_p", "a number from 1e-30 to 1.0; 1.0 is no limit", 1.0, |p| (LEAST_TOP_P as f32..=1.0).contains(&p);
    /// The part of the likeliest token's probability that a token must have: 0 to 1.
    MinP(F32, f32) = "min_p", "a number from 0.0, which is no limit, to 1.0", 0.0, |p| (0.0..=1.0).contains(&p);
    /// What logits are divided by before they become probabilities.
    Temperature(F32, f32) = "temperature",
        "a number from 1e-30 to 1e30; the likeliest token alone, which 0 often stands for, is what a top_k of 1 draws",
        1.0,
        |t| (TEMPERATURES.0 as f32..=TEMPERATURES.1 as f32).contains(&t);
}

/// A number for each row of a batch: `PerRow<TopP>`, for example. Checked on the host and owned together with its copy on a GPU
/// ([`OnDevice`](crate::OnDevice)), since a kernel that is given a `top_k` of 0 or a `top_p` of 0 never ends.
///
/// ```
/// use flashinfer_rs::{PerRow, TopP};
///
/// let top_p = PerRow::<TopP>::new(&[0.9, 1.0, 0.5])?;
/// assert_eq!(top_p.values(), [0.9, 1.0, 0.5]);
/// assert!(PerRow::<TopP>::new(&[0.9, 0.0]).is_err());
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct PerRow<P: Parameter> {
    values: Vec<P::Value>,
    meaning: PhantomData<P>,
}

/// What calls need to know of a [`PerRow`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PerRowFacts {
    /// How many rows there are.
    pub rows: i64,
}

impl<P: Parameter> PerRow<P> {
    /// From one number for each row.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for a number that is not what its type allows.
    pub fn new(values: &[P::Value]) -> Result<Self> {
        if let Some(row) = values.iter().position(|&value| !P::allows(value)) {
            return refuse("PerRow", P::NAME, format!("{} for row {row}", values[row]), P::EXPECTED);
        }
        Ok(Self { values: values.to_vec(), meaning: PhantomData })
    }

    /// The numbers.
    pub fn values(&self) -> &[P::Value] {
        &self.values
    }
}

impl<P: Parameter> sealed::Sealed for PerRow<P> {}

impl<P: Parameter> Steering for PerRow<P> {
    type Facts = PerRowFacts;

    fn facts(&self) -> PerRowFacts {
        PerRowFacts { rows: self.values.len() as i64 }
    }

    fn arrays(&self) -> Vec<Words<'_>> {
        vec![P::words(&self.values)]
    }

    fn in_place_of(&self, captured: &Self) -> Result<Self> {
        let (rows, had) = (self.values.len(), captured.values.len());
        if rows > had {
            return refuse(
                "PerRow",
                P::NAME,
                format!("for {rows} rows"),
                format!("at most {had} of them, as captured"),
            );
        }
        let mut filled = self.clone();
        filled.values.resize(had, P::NEUTRAL);
        Ok(filled)
    }
}

impl<'a, P: Parameter> Placed<'a, PerRow<P>> {
    /// Numbers that are on a device already, one for each row: I32 for `top_k`, F32 for all others. What the tensor must be
    /// besides is looked at where it is used.
    ///
    /// # Safety
    /// Whenever a kernel that was given this runs, each number must be what [`PerRow::new`] accepts: with others kernels do not
    /// end, or answer what is no token.
    pub unsafe fn from_tensor(values: TensorRef<'a>) -> Self {
        let rows = values.shape().first().copied().unwrap_or(0);
        Self::promised(PerRowFacts { rows }, vec![values])
    }
}

/// What a call is given for a [`Parameter`]: one number for all rows, or each row's own. Whatever is one turns into it: `0.9`,
/// and a reference to a `Placed<PerRow<TopP>>`.
#[derive(Debug)]
pub enum Setting<'a, P: Parameter> {
    /// The same for all rows.
    All(P::Value),
    /// A row's own.
    Rows(&'a Placed<'a, PerRow<P>>),
}

impl<P: Parameter> Clone for Setting<'_, P> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<P: Parameter> Copy for Setting<'_, P> {}

impl<'a, P: Parameter> From<&'a Placed<'a, PerRow<P>>> for Setting<'a, P> {
    fn from(rows: &'a Placed<'a, PerRow<P>>) -> Self {
        Self::Rows(rows)
    }
}

impl From<i32> for Setting<'_, TopK> {
    fn from(all: i32) -> Self {
        Self::All(all)
    }
}

impl<P: Parameter<Value = f32>> From<f64> for Setting<'_, P> {
    fn from(all: f64) -> Self {
        Self::All(all as f32)
    }
}

impl<'a, P: Parameter> Setting<'a, P> {
    /// The number for all rows, which is looked at by nobody where rows have their own.
    pub(crate) fn all(self, function: &'static str) -> Result<P::Value> {
        match self {
            Self::Rows(_) => Ok(P::NEUTRAL),
            Self::All(value) if P::allows(value) => Ok(value),
            Self::All(value) => refuse(function, P::NAME, value.to_string(), P::EXPECTED),
        }
    }

    /// The numbers of the rows, where they have their own.
    pub(crate) fn rows(self) -> Option<TensorRef<'a>> {
        match self {
            Self::Rows(rows) => Some(rows.array(0)),
            Self::All(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn refused<P: Parameter>(values: &[P::Value], row: usize) {
        let error = PerRow::<P>::new(values).unwrap_err().to_string();
        assert!(error.starts_with(&format!("PerRow: {} is", P::NAME)), "{error}");
        assert!(error.contains(&format!("for row {row}, expected")), "{error}");
    }

    #[test]
    fn numbers_that_a_kernel_does_not_end_with_are_refused_with_their_row() {
        refused::<TopK>(&[1, 0], 1);
        refused::<TopK>(&[5, 3, i32::MIN], 2);
        for wrong in [0.0, -0.0, -0.5, 1e-31, f32::MIN_POSITIVE / 2.0, 1.000_001, f32::NAN, f32::INFINITY] {
            refused::<TopP>(&[1.0, 0.5, wrong], 2);
        }
        for wrong in [-1e-9, 1.000_001, f32::NAN] {
            refused::<MinP>(&[wrong], 0);
        }
        for wrong in [0.0, -1.0, 1e-31, 1e31, f32::NAN, f32::INFINITY] {
            refused::<Temperature>(&[1.0, wrong], 1);
        }
        let error = PerRow::<Temperature>::new(&[0.0]).unwrap_err().to_string();
        assert!(error.contains("top_k of 1"), "{error}");
    }

    #[test]
    fn every_other_number_is_taken() {
        assert!(PerRow::<TopK>::new(&[1, 50, i32::MAX]).is_ok());
        assert!(PerRow::<TopP>::new(&[1e-30, 0.9, 1.0]).is_ok());
        assert!(PerRow::<MinP>::new(&[0.0, 1e-40, 0.1, 1.0]).is_ok());
        assert!(PerRow::<Temperature>::new(&[1e-30, 0.7, 1e30]).is_ok());
        assert!(PerRow::<TopP>::new(&[]).is_ok());
    }

    #[test]
    fn fewer_rows_are_filled_up_and_more_are_refused() {
        let of = |values: &[i32]| PerRow::<TopK>::new(values).unwrap();
        assert_eq!(of(&[7]).in_place_of(&of(&[9, 9, 9])).unwrap().values(), [7, 1, 1]);
        assert!(of(&[7, 7]).in_place_of(&of(&[9])).unwrap_err().to_string().contains("at most 1"));
        let half = PerRow::<TopP>::new(&[0.5]).unwrap();
        assert_eq!(half.in_place_of(&PerRow::new(&[0.1, 0.1]).unwrap()).unwrap().values(), [0.5, 1.0]);
    }

    #[test]
    fn one_number_for_all_rows_is_checked_too() {
        let all = |setting: Setting<'_, TopP>| setting.all("f");
        assert_eq!(all(0.9.into()).unwrap(), 0.9);
        assert_eq!(
            all(0.0.into()).unwrap_err().to_string(),
            "f: top_p is 0, expected a number from 1e-30 to 1.0; 1.0 is no limit"
        );
        assert!(Setting::<TopK>::from(0).all("f").is_err() && Setting::<TopK>::from(1).all("f").is_ok());
    }
}
