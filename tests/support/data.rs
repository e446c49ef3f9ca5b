//! Inputs, and how far a result is from what was expected.
#![allow(dead_code, reason = "each test uses its own part")]

use flashinfer_rs::{Element, Half16};
use half::{bf16, f16};

/// The element types that the kernels compute with.
pub trait Number: Element + Half16 + cudarc::driver::DeviceRepr + Default + Into<f64> + Send + Sync + 'static {
    fn from_f64(value: f64) -> Self;

    /// Bits that no kernel writes by accident: a NaN.
    const POISON: Self;
}

impl Number for f16 {
    fn from_f64(value: f64) -> Self {
        Self::from_f64(value)
    }

    const POISON: Self = Self::from_bits(0x7FFF);
}

impl Number for bf16 {
    fn from_f64(value: f64) -> Self {
        Self::from_f64(value)
    }

    const POISON: Self = Self::from_bits(0x7FFF);
}

/// splitmix64
pub struct Random(pub u64);

impl Random {
    pub fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// The sum of twelve uniform numbers has variance 1.
    pub fn gauss(&mut self) -> f64 {
        (0..12).map(|_| self.uniform()).sum::<f64>() - 6.0
    }

    pub fn normal<T: Number>(&mut self, count: usize) -> Vec<T> {
        (0..count).map(|_| T::from_f64(self.gauss())).collect()
    }

    pub fn normal_f32(&mut self, scale: f64, count: usize) -> Vec<f32> {
        (0..count).map(|_| (scale * self.gauss()) as f32).collect()
    }

    pub fn between(&mut self, low: f64, high: f64, count: usize) -> Vec<f32> {
        (0..count).map(|_| (low + (high - low) * self.uniform()) as f32).collect()
    }

    /// Rows of length 1, as the delta rule wants its keys.
    pub fn unit<T: Number>(&mut self, rows: usize, size: usize) -> Vec<T> {
        let mut values = Vec::with_capacity(rows * size);
        for _ in 0..rows {
            let row: Vec<f64> = (0..size).map(|_| self.gauss()).collect();
            let length = row.iter().map(|x| x * x).sum::<f64>().sqrt();
            values.extend(row.into_iter().map(|x| T::from_f64(x / length)));
        }
        values
    }
}

pub fn widened<T: Copy + Into<f64>>(values: &[T]) -> Vec<f32> {
    values.iter().map(|&value| value.into() as f32).collect()
}

/// ‖found − expected‖ / ‖expected‖; NaN where anything found is NaN.
pub fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let (mut difference, mut size) = (0.0, 0.0);
    // Of infinities that are the same on both sides no difference is a number.
    for (&a, &b) in found.iter().zip(expected).filter(|(a, b)| !(a == b && a.is_infinite())) {
        difference += (f64::from(a) - f64::from(b)).powi(2);
        size += f64::from(b).powi(2);
    }
    // Nothing but zeros on both sides is no error either.
    if difference == 0.0 { 0.0 } else { (difference / size).sqrt() }
}

/// Fails where the error is larger than the tolerance, or NaN.
pub fn assert_close(what: &str, found: &[f32], expected: &[f32], tolerance: f64) {
    let error = relative_error(found, expected);
    assert!(error <= tolerance, "{what}: relative error {error:.2e}, expected at most {tolerance:.0e}");
}
