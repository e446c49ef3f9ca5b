//! Numbers of 16 bits: widened exactly, and rounded to from 64 bits, to the nearest one, and to the even one where two are as
//! near.
//!
//! Here and not by the crate `half`, whose types are for users who have them: it rounds to 32 bits first, or looks at the upper
//! half of a number alone, and of two numbers that are as near as that it takes the even one, also where the rest says which is
//! nearer.

/// A number of 64 bits has so many bits behind its first.
const FRACTION: u32 = f64::MANTISSA_DIGITS - 1;

/// How a number of 16 bits is made up.
struct Format {
    /// The bits behind its first.
    fraction: u32,
    /// What is added to an exponent where it is stored.
    bias: i64,
    /// The exponent, as it is stored, of what is no finite number.
    top: i64,
}

const F16: Format = Format { fraction: 10, bias: 15, top: 31 };
const BF16: Format = Format { fraction: 7, bias: 127, top: 255 };

impl Format {
    fn nearest(&self, value: f64) -> u16 {
        let bits = value.to_bits();
        let sign = (bits >> 48) as u16 & 1 << 15;
        let infinity = (self.top as u16) << self.fraction;
        if value.is_nan() {
            // With what its first bits say, and quiet.
            let payload = (bits & ((1 << FRACTION) - 1)) >> (FRACTION - self.fraction);
            return sign | infinity | 1 << (self.fraction - 1) | payload as u16;
        }
        // Both formats' smallest numbers are far above those that have no first bit of their own.
        let exponent = (bits >> FRACTION & 0x7ff) as i64 - 1023 + self.bias;
        if exponent >= self.top {
            return sign | infinity;
        }
        // The smaller a number is than the smallest that has a first bit of its own, the fewer bits are left of it.
        let dropped = i64::from(FRACTION - self.fraction) + (1 - exponent).max(0);
        if dropped > i64::from(f64::MANTISSA_DIGITS) {
            return sign;
        }
        let all = bits & ((1 << FRACTION) - 1) | 1 << FRACTION;
        let (kept, rest, middle) = (all >> dropped, all & ((1 << dropped) - 1), 1 << (dropped - 1));
        let up = rest > middle || rest == middle && kept & 1 == 1;
        // The first bit adds one to the exponent, and so does what is carried: the next number may be infinity.
        let stored = (exponent - 1).max(0) as u16;
        sign | ((stored << self.fraction) + (kept + u64::from(up)) as u16)
    }
}

/// The bits of the nearest number of this type.
pub(crate) fn to_f16(value: f64) -> u16 {
    F16.nearest(value)
}

/// The bits of the nearest number of this type.
pub(crate) fn to_bf16(value: f64) -> u16 {
    BF16.nearest(value)
}

/// The number that has these bits.
pub(crate) fn from_f16(bits: u16) -> f64 {
    let fraction = f64::from(bits & 0x3ff);
    let power = |exponent: u16| f64::from_bits(u64::from(exponent + 1023 - 25) << FRACTION);
    let size = match bits >> 10 & 31 {
        0 => fraction * power(1),
        31 if fraction == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        exponent => (fraction + 1024.0) * power(exponent),
    };
    if bits >> 15 == 0 { size } else { -size }
}

/// The number that has these bits.
pub(crate) fn from_bf16(bits: u16) -> f64 {
    f64::from(f32::from_bits(u32::from(bits) << 16))
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

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
        rounds(|bits| f16::from_bits(bits).to_f64(), to_f16, f16::MAX.to_bits());
        rounds(|bits| bf16::from_bits(bits).to_f64(), to_bf16, bf16::MAX.to_bits());
    }

    #[test]
    fn every_number_is_widened_as_half_does_it_and_comes_back() {
        for bits in 0..=u16::MAX {
            let (a, b) = (from_f16(bits), from_bf16(bits));
            let (f, g) = (f16::from_bits(bits), bf16::from_bits(bits));
            assert_eq!([a.is_nan(), b.is_nan()], [f.is_nan(), g.is_nan()], "{bits:#06x}");
            if !f.is_nan() {
                assert_eq!((a.to_bits(), to_f16(a)), (f.to_f64().to_bits(), bits), "{bits:#06x}");
            }
            if !g.is_nan() {
                assert_eq!((b.to_bits(), to_bf16(b)), (g.to_f64().to_bits(), bits), "{bits:#06x}");
            }
        }
    }

    #[test]
    fn what_is_no_number_stays_so() {
        // One whose bits are far behind, which must not be cut off to infinity.
        for nan in [f64::NAN, -f64::NAN, f64::from_bits(f64::INFINITY.to_bits() | 1)] {
            let (a, b) = (f16::from_bits(to_f16(nan)), bf16::from_bits(to_bf16(nan)));
            assert!(a.is_nan() && b.is_nan());
            assert_eq!([a.is_sign_negative(), b.is_sign_negative()], [nan.is_sign_negative(); 2]);
        }
        assert_eq!((to_f16(f64::INFINITY), to_bf16(f64::NEG_INFINITY)), (0x7c00, 0xff80));
        assert_eq!((to_f16(65520.0), to_f16(65519.99)), (0x7c00, 0x7bff));
    }

    #[test]
    fn what_is_too_small_becomes_nothing_with_its_sign() {
        for tiny in [f64::from_bits(1), f64::MIN_POSITIVE, 1e-60] {
            assert_eq!([to_f16(tiny), to_bf16(tiny), to_f16(-tiny), to_bf16(-tiny)], [0, 0, 1 << 15, 1 << 15]);
        }
    }
}
