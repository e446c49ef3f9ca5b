//! Sizes that are constant or grow with the batch: what a graph is checked with once, for every batch.

use std::fmt;

use crate::tensor::DType;

/// One size of a shape: a constant, or so many for each row of the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Dim {
    size: u64,
    per_row: bool,
}

impl Dim {
    /// The rows of the batch, `B`.
    pub const BATCH: Self = Self::per_row(1);

    /// A size that is the same for every batch.
    pub const fn fixed(size: u64) -> Self {
        Self { size, per_row: false }
    }

    /// A size of so many for each row of the batch.
    pub const fn per_row(size: u64) -> Self {
        Self { size, per_row: true }
    }

    /// The size, where it does not depend on the batch.
    pub const fn constant(self) -> Option<u64> {
        if self.per_row { None } else { Some(self.size) }
    }

    /// What it is multiplied by, and whether that is the batch's rows.
    pub const fn parts(self) -> (u64, bool) {
        (self.size, self.per_row)
    }

    /// The size for a batch of so many rows; the largest number where it is larger.
    pub const fn at(self, batch: u64) -> u64 {
        if self.per_row { self.size.saturating_mul(batch) } else { self.size }
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.per_row, self.size) {
            (false, size) => write!(f, "{size}"),
            (true, 1) => f.write_str("B"),
            (true, size) => write!(f, "{size}·B"),
        }
    }
}

impl From<u64> for Dim {
    fn from(size: u64) -> Self {
        Self::fixed(size)
    }
}

/// An element type and a shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    /// The element type.
    pub dtype: DType,
    /// The sizes, the slowest first.
    pub shape: Vec<Dim>,
}

impl Spec {
    /// One of this type and these sizes.
    pub fn new(dtype: DType, shape: impl Into<Vec<Dim>>) -> Self {
        Self { dtype, shape: shape.into() }
    }

    /// How many elements there are for a batch of so many rows; the largest number where there are more.
    pub fn elements(&self, batch: u64) -> u64 {
        self.shape.iter().fold(1, |product: u64, dim| product.saturating_mul(dim.at(batch)))
    }

    /// How many bytes they take.
    pub fn bytes(&self, batch: u64) -> u64 {
        self.elements(batch).saturating_mul(self.dtype.size() as u64)
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.dtype, sizes(&self.shape))
    }
}

/// A shape in brackets.
pub(super) fn sizes(shape: &[Dim]) -> String {
    let sizes: Vec<_> = shape.iter().map(Dim::to_string).collect();
    format!("[{}]", sizes.join(", "))
}

/// Columns of a tensor of rows, which may be seen as heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Columns {
    /// The first column.
    pub start: u64,
    /// How many columns there are.
    pub width: u64,
    /// As how many heads of `width / heads` elements they are seen; 0 where they are seen as they are.
    pub heads: u64,
}

impl Columns {
    /// Columns from the first up to the end, which is not among them.
    pub const fn new(columns: std::ops::Range<u64>) -> Self {
        Self { start: columns.start, width: columns.end.saturating_sub(columns.start), heads: 0 }
    }

    /// Seen as so many heads.
    #[must_use]
    pub const fn heads(self, heads: u64) -> Self {
        Self { heads, ..self }
    }

    /// The columns behind the last.
    pub const fn end(self) -> u64 {
        self.start.saturating_add(self.width)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_constant_or_linear_in_the_batch() {
        let spec = Spec::new(DType::BF16, [Dim::BATCH, Dim::per_row(3), Dim::fixed(8)]);
        assert_eq!(spec.to_string(), "BF16[B, 3·B, 8]");
        assert_eq!(spec.elements(4), 4 * 12 * 8);
        assert_eq!(spec.bytes(1), 48);
        assert_eq!(Dim::per_row(u64::MAX).at(2), u64::MAX);
    }
}
