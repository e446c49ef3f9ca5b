//! What is wrong with a row, and the look at rows on the host. `src/glue/rows.cu` has the one on a GPU, which does the same.

use std::fmt;

use crate::tensor::Layout;

/// What was wrong with a row of a call of a [`Sampler`](super::Sampler). Such a row was replaced by one that has the first token
/// alone, so the answer is token 0 there, and means nothing.
///
/// ```
/// use flashinfer_rs::kernels::sampling::RowStatus;
///
/// let status = RowStatus::from_bits(1 | 4);
/// assert!(!status.is_valid() && status.has_nan() && status.has_negative());
/// assert_eq!(status.to_string(), "NaN, a negative number");
/// assert!(RowStatus::from_bits(0).is_valid());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct RowStatus(i32);

const NOT_A_NUMBER: i32 = 1;
const TOO_LARGE: i32 = 2;
const NEGATIVE: i32 = 4;
const NOTHING: i32 = 8;
const NO_TOKEN: i32 = 16;

impl RowStatus {
    /// By what stands in a context's memory, which a program may copy by itself.
    pub const fn from_bits(bits: i32) -> Self {
        Self(bits)
    }

    /// As it stands in a context's memory: 0 for a valid row.
    pub const fn bits(self) -> i32 {
        self.0
    }

    /// Whether the row was a distribution, as far as the kernels need one: that it sums to 1 is not looked at.
    pub const fn is_valid(self) -> bool {
        self.0 == 0
    }

    /// Whether NaN was in the row. Logits with NaN or nothing but −∞ become such a row; with +∞ such a row, or one with an infinity.
    pub const fn has_nan(self) -> bool {
        self.0 & NOT_A_NUMBER != 0
    }

    /// Whether a number above 1e28 was in the row, ∞ among these.
    pub const fn has_infinite(self) -> bool {
        self.0 & TOO_LARGE != 0
    }

    /// Whether a negative number was in the row.
    pub const fn has_negative(self) -> bool {
        self.0 & NEGATIVE != 0
    }

    /// Whether no probability of the row was above 0, or only such that are subnormal, which kernels take for 0.
    pub const fn is_nothing(self) -> bool {
        self.0 & NOTHING != 0
    }

    /// Whether a draft of speculative sampling was no token: below 0, or past the vocabulary. It was taken for token 0.
    pub const fn has_no_token(self) -> bool {
        self.0 & NO_TOKEN != 0
    }
}

impl fmt::Display for RowStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = [
            (self.has_nan(), "NaN"),
            (self.has_infinite(), "an infinity, or a number above 1e28"),
            (self.has_negative(), "a negative number"),
            (self.is_nothing(), "no probability above 0"),
            (self.has_no_token(), "a draft that is no token"),
        ];
        let words: Vec<_> = words.into_iter().filter_map(|(is, word)| is.then_some(word)).collect();
        f.write_str(if words.is_empty() { "valid" } else { "" })?;
        f.write_str(&words.join(", "))
    }
}

impl std::ops::BitOr for RowStatus {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl RowStatus {
    /// That a draft is no token.
    pub(super) const NO_TOKEN: Self = Self(NO_TOKEN);

    /// By a row's numbers.
    pub(super) fn of(row: impl Iterator<Item = f32>) -> Self {
        let (mut wrong, mut something) = (0, false);
        for number in row {
            match number {
                _ if number.is_nan() => wrong |= NOT_A_NUMBER,
                _ if number < 0.0 => wrong |= NEGATIVE,
                _ if number > 1e28 => wrong |= TOO_LARGE,
                _ => something |= number >= f32::MIN_POSITIVE,
            }
        }
        Self(wrong | if something { 0 } else { NOTHING })
    }
}

/// Looks at every row of a tensor on the host, and makes those that are no distribution such that have the first token alone.
/// `rows` leading dimensions' worth of them, each as long as the last dimension.
///
/// # Safety
/// The tensor must be contiguous F32 on the host, to be written, of which nothing else is used meanwhile.
pub(super) unsafe fn guard_on_host(tensor: &Layout) -> Vec<RowStatus> {
    let length = tensor.size(tensor.ndim() - 1) as usize;
    let rows = (tensor.numel() as usize).checked_div(length).unwrap_or(0);
    let start = tensor.data().cast::<f32>();
    let guard = |row: usize| {
        let row = start.wrapping_add(row * length);
        // SAFETY: inside of the tensor; numbers may lie at any address.
        let status = RowStatus::of((0..length).map(|i| unsafe { row.wrapping_add(i).read_unaligned() }));
        if !status.is_valid() {
            for i in 0..length {
                // SAFETY: as above.
                unsafe { row.wrapping_add(i).write_unaligned(if i == 0 { 1.0 } else { 0.0 }) };
            }
        }
        status
    };
    (0..rows).map(guard).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::TensorMut;

    #[test]
    fn what_is_wrong_with_a_row_is_found() {
        let of = |row: &[f32]| RowStatus::of(row.iter().copied()).bits();
        assert_eq!(of(&[0.0, 0.25, 0.75]), 0);
        assert_eq!(of(&[-0.0, f32::MIN_POSITIVE]), 0, "minus zero is 0");
        assert_eq!(of(&[1e28, 5.0]), 0, "what does not sum to 1 is no matter here");
        assert_eq!(of(&[f32::NAN, 1.0]), NOT_A_NUMBER);
        assert_eq!(of(&[-f32::NAN]), NOT_A_NUMBER | NOTHING);
        assert_eq!(of(&[f32::INFINITY, 1.0]), TOO_LARGE);
        assert_eq!(of(&[1.000_001e28, 1.0]), TOO_LARGE);
        assert_eq!(of(&[f32::NEG_INFINITY, 1.0]), NEGATIVE);
        assert_eq!(of(&[-1e-40, 1.0]), NEGATIVE);
        assert_eq!(of(&[0.0, -0.0, f32::MIN_POSITIVE / 2.0]), NOTHING);
        assert_eq!(of(&[f32::NAN, f32::INFINITY, -1.0]), NOT_A_NUMBER | TOO_LARGE | NEGATIVE | NOTHING);
    }

    #[test]
    fn rows_that_are_no_distribution_are_replaced_and_no_others() {
        let mut rows = [0.5, 0.5, f32::NAN, 1.0, 0.0, 0.0, 2.0, 0.0];
        let tensor = TensorMut::from_slice(&mut rows, &[2, 2, 2]).unwrap();
        // SAFETY: the slice, which nothing else uses meanwhile.
        let status = unsafe { guard_on_host(tensor.layout()) };
        assert_eq!(status.iter().map(|status| status.bits()).collect::<Vec<_>>(), [0, NOT_A_NUMBER, NOTHING, 0]);
        assert_eq!(rows, [0.5, 0.5, 1.0, 0.0, 1.0, 0.0, 2.0, 0.0]);
    }

    /// The kernel's constants are these.
    #[test]
    fn bits_are_those_of_the_kernel() {
        let source = include_str!("../../glue/rows.cu");
        let bits = format!(
            "NOT_A_NUMBER = {NOT_A_NUMBER}, TOO_LARGE = {TOO_LARGE}, NEGATIVE = {NEGATIVE}, NOTHING = {NOTHING}, NO_TOKEN = \
             {NO_TOKEN}"
        );
        assert!(source.contains(&bits), "{bits}");
        for (name, number) in [("LEAST", f32::MIN_POSITIVE), ("MOST", 1e28), ("INFINITE", f32::INFINITY), ("ONE", 1.0)]
        {
            assert!(source.contains(&format!("{name} = 0x{:08x}u;", number.to_bits())), "{name}");
        }
    }
}
