//! Numbers of 64 bits rounded to those of 16, to the nearest one, and to the even one where two are as near.
//!
//! The functions of `half` for it look at the upper half of a number alone, or round it to 32 bits first: of two numbers that
//! are as near as that, they take the even one, also where the rest says which is nearer.

use half::{bf16, f16};

/// A number with 20 bits behind its first in place of 52, of which the last says whether there was anything behind it. It lies on
/// the same side of what is halfway between two numbers of 16 bits.
fn shortened(value: f64) -> f64 {
    const REST: u64 = u32::MAX as u64;
    let bits = value.to_bits();
    let rest = u64::from(bits & REST != 0) << 32;
    f64::from_bits(bits & !REST | rest)
}

/// The nearest number of this type.
pub(crate) fn to_f16(value: f64) -> f16 {
    f16::from_f64(shortened(value))
}

/// The nearest number of this type.
pub(crate) fn to_bf16(value: f64) -> bf16 {
    bf16::from_f64(shortened(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Halfway between each two neighbours, and a little to either side of that.
    fn rounds(next: impl Fn(u16) -> f64, round: impl Fn(f64) -> u16, largest: u16) {
        for low in 0..largest {
            let (a, b) = (next(low), next(low + 1));
            let middle = (a + b) / 2.0;
            let (below, above) = (f64::from_bits(middle.to_bits() - 1), f64::from_bits(middle.to_bits() + 1));
            assert_eq!([round(a), round(below), round(above), round(b)], [low, low, low + 1, low + 1], "{a:e} {b:e}");
            assert_eq!(round(middle), low + (low & 1), "{middle:e}");
            assert_eq!(round(-above), 1 << 15 | (low + 1), "{middle:e}");
        }
    }

    #[test]
    fn numbers_are_rounded_to_the_nearest_one() {
        rounds(|bits| f16::from_bits(bits).to_f64(), |value| to_f16(value).to_bits(), f16::MAX.to_bits());
        rounds(|bits| bf16::from_bits(bits).to_f64(), |value| to_bf16(value).to_bits(), bf16::MAX.to_bits());
    }

    #[test]
    fn what_is_no_number_stays_so() {
        let nan = f64::from_bits(f64::INFINITY.to_bits() | 1);
        assert!(to_f16(nan).is_nan() && to_bf16(nan).is_nan());
        assert_eq!((to_f16(f64::INFINITY), to_bf16(f64::NEG_INFINITY)), (f16::INFINITY, bf16::NEG_INFINITY));
        assert_eq!((to_f16(65520.0), to_f16(65519.99)), (f16::INFINITY, f16::MAX));
    }
}
