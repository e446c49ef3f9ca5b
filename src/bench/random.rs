//! Random numbers that follow from a seed.

use super::dtype::DataType;

/// SplitMix64: small, and good enough for test data.
pub(super) struct Random {
    state: u64,
    /// Normal numbers come in pairs.
    spare: Option<f64>,
}

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self { state: seed, spare: None }
    }

    fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// From 0 to below 1.
    fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Of mean 0 and deviation 1, by Box and Muller.
    fn normal(&mut self) -> f64 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        let (sine, cosine) = (std::f64::consts::TAU * self.unit()).sin_cos();
        self.spare = Some(radius * sine);
        radius * cosine
    }

    fn whole(&mut self, low: i32, high: i32) -> f64 {
        // Half of 2^32 is no multiple of these widths' remainders: the skew is below one in a million.
        let width = (high - low) as u64;
        f64::from(low) + (((self.bits() >> 32) * width) >> 32) as f64
    }

    /// A value by upstream's distribution for a type.
    pub(super) fn value(&mut self, dtype: &DataType) -> f64 {
        match dtype {
            DataType::Float8E4m3fn | DataType::Float8E5m2 | DataType::Float4E2m1 => self.normal().clamp(-2.0, 2.0),
            DataType::Bool => self.whole(0, 2),
            DataType::Int8 => self.whole(-128, 128),
            DataType::Uint8 => self.whole(0, 256),
            DataType::Int16 | DataType::Int32 | DataType::Int64 => self.whole(-1024, 1024),
            DataType::Uint16 | DataType::Uint32 | DataType::Uint64 => self.whole(0, 2048),
            _ => self.normal(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_the_distribution_that_upstream_draws_from() {
        let mut random = Random::new(7);
        let count = 100_000;
        let normal: Vec<f64> = (0..count).map(|_| random.value(&DataType::Float32)).collect();
        let mean = normal.iter().sum::<f64>() / f64::from(count);
        let variance = normal.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / f64::from(count);
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.02, "{mean} {variance}");
        for (dtype, low, high) in
            [(DataType::Int8, -128.0, 127.0), (DataType::Int64, -1024.0, 1023.0), (DataType::Bool, 0.0, 1.0)]
        {
            let drawn: Vec<f64> = (0..count).map(|_| random.value(&dtype)).collect();
            assert_eq!(drawn.iter().copied().fold(f64::INFINITY, f64::min), low, "{dtype}");
            assert_eq!(drawn.iter().copied().fold(f64::NEG_INFINITY, f64::max), high, "{dtype}");
        }
        let clamped = (0..count).map(|_| random.value(&DataType::Float8E4m3fn)).fold(0.0, f64::max);
        assert_eq!(clamped, 2.0);
    }
}
