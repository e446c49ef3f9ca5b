//! What a step is given: where it lies, what stands in rows that nobody asked for, and which bucket a batch goes to.

use super::error::GraphError;
use super::graph::{Graph, Origin};
use super::plan::aligned;
use crate::error::Result;

/// What stands in the rows between a batch and its bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Pad {
    /// This number.
    Value(i64),
    /// What row 0 has.
    RepeatRow0,
    /// This page of the cache, which no sequence may have: what such a row writes goes there.
    Reserved(u32),
}

/// The sizes that batches are padded to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Buckets(Vec<u64>);

impl Default for Buckets {
    fn default() -> Self {
        Self(vec![1, 2, 4, 8, 16, 32])
    }
}

impl Buckets {
    /// Buckets of these sizes, in any order.
    ///
    /// # Errors
    /// [`Parameter`](GraphError::Parameter) for none, or one of 0.
    pub fn new(sizes: &[u64]) -> Result<Self> {
        let mut sizes = sizes.to_vec();
        sizes.sort_unstable();
        sizes.dedup();
        if sizes.first().is_none_or(|least| *least == 0) {
            let (op, found) = ("buckets".to_owned(), format!("{sizes:?}"));
            return Err(GraphError::Parameter { op, parameter: "sizes", found, expected: "sizes above 0" }.into());
        }
        Ok(Self(sizes))
    }

    /// The sizes, the smallest first.
    pub fn sizes(&self) -> &[u64] {
        &self.0
    }

    /// The largest size.
    pub fn largest(&self) -> u64 {
        self.0.last().copied().unwrap_or(0)
    }

    /// The smallest bucket that holds so many rows.
    ///
    /// # Errors
    /// [`BucketTooSmall`](GraphError::BucketTooSmall) where the largest does not, and for no rows.
    pub fn of(&self, rows: u64) -> Result<u64> {
        let found = self.0.iter().copied().find(|size| *size >= rows.max(1));
        found.filter(|_| rows > 0).ok_or(GraphError::BucketTooSmall { rows, largest: self.largest() }.into())
    }
}

/// Where the inputs of a step lie in one block of memory, so that one copy brings them all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepBlock {
    places: Vec<(usize, u64, u64)>,
    bytes: u64,
}

impl StepBlock {
    /// The block of a graph's inputs, for a bucket.
    pub fn new(graph: &Graph, bucket: u64) -> Self {
        let (mut places, mut bytes) = (Vec::new(), 0u64);
        for (i, tensor) in graph.tensors.iter().enumerate() {
            if matches!(tensor.origin, Origin::Input(_)) {
                let size = tensor.spec.bytes(bucket);
                places.push((i, bytes, size));
                bytes = bytes.saturating_add(aligned(size));
            }
        }
        Self { places, bytes }
    }

    /// The block's length in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The first byte of an input's and how many it has.
    ///
    /// # Errors
    /// [`UnknownName`](GraphError::UnknownName).
    pub fn place(&self, graph: &Graph, name: &str) -> Result<(u64, u64)> {
        let tensor = graph.find("step input", name)?;
        let found = self.places.iter().find(|place| place.0 == tensor);
        found.map(|&(_, first, size)| (first, size)).ok_or_else(|| {
            let kind = "step input";
            GraphError::UnknownName { kind, name: name.to_owned(), known: String::new() }.into()
        })
    }

    /// Fills an input of a block: the rows that are given, and what its declaration says in the rows behind them.
    ///
    /// # Errors
    /// [`UnknownName`](GraphError::UnknownName); [`Mismatch`](GraphError::Mismatch) for bytes that are no whole rows,
    /// more rows than the bucket has, or a block of another length.
    pub fn fill(&self, graph: &Graph, name: &str, block: &mut [u8], rows: &[u8]) -> Result<()> {
        let (first, size) = self.place(graph, name)?;
        let tensor = &graph.tensors[graph.find("step input", name)?];
        let batched = tensor.spec.shape.first().is_some_and(|dim| dim.constant().is_none());
        let row = tensor.spec.bytes(1) as usize;
        let mismatch = |found: String, expected: String| {
            Err(GraphError::Mismatch { kind: "step input", name: name.to_owned(), found, expected }.into())
        };
        if block.len() as u64 != self.bytes {
            return mismatch(format!("a block of {} bytes", block.len()), format!("one of {}", self.bytes));
        }
        let fits = rows.len() as u64 <= size && !rows.is_empty() && rows.len().is_multiple_of(row);
        if !fits || (!batched && rows.len() as u64 != size) {
            return mismatch(format!("{} bytes", rows.len()), format!("rows of {row} bytes, {size} at the most"));
        }
        let place = &mut block[first as usize..(first + size) as usize];
        let (given, padded) = place.split_at_mut(rows.len());
        given.copy_from_slice(rows);
        let Origin::Input(pad) = tensor.origin else { return Ok(()) };
        match pad {
            Pad::RepeatRow0 => padded.chunks_exact_mut(row).for_each(|pad| pad.copy_from_slice(&rows[..row])),
            Pad::Value(value) => store_all(padded, tensor.spec.dtype, value as f64),
            Pad::Reserved(page) => store_all(padded, tensor.spec.dtype, f64::from(page)),
        }
        Ok(())
    }
}

fn store_all(bytes: &mut [u8], dtype: crate::tensor::DType, value: f64) {
    bytes.chunks_exact_mut(dtype.size()).for_each(|element| super::host::store(element, dtype, value));
}

/// Which pages of a cache are free, and which rows of a page table have which. Page 0 is never given to a sequence:
/// rows that nobody asked for write there.
#[derive(Debug, Clone)]
pub struct PageAllocator {
    free: Vec<u32>,
    pages: u64,
    page_size: u64,
    per_row: u64,
    rows: Vec<(Vec<u32>, u64)>,
}

impl PageAllocator {
    /// The page that rows which nobody asked for write to.
    pub const RESERVED: u32 = 0;

    /// Of a cache of so many pages of so many tokens, for so many rows with at most so many pages each.
    pub fn new(pages: u32, page_size: u64, rows: usize, per_row: u64) -> Self {
        // Taken from the end: the lowest first.
        let free = (1..pages).rev().collect();
        Self { free, pages: pages.into(), page_size: page_size.max(1), per_row, rows: vec![(Vec::new(), 0); rows] }
    }

    /// Makes room for so many more tokens of a row; the table changes only where that succeeds.
    ///
    /// # Errors
    /// [`ContextTooLong`](GraphError::ContextTooLong), [`PageTableFull`](GraphError::PageTableFull);
    /// [`BucketTooSmall`](GraphError::BucketTooSmall) for a row that there is not.
    pub fn grow(&mut self, row: usize, tokens: u64) -> Result<()> {
        let largest = self.rows.len() as u64;
        let Some((pages, length)) = self.rows.get_mut(row) else {
            return Err(GraphError::BucketTooSmall { rows: row as u64 + 1, largest }.into());
        };
        let (wanted, capacity) = (length.saturating_add(tokens), self.per_row.saturating_mul(self.page_size));
        if wanted > capacity {
            return Err(GraphError::ContextTooLong { row: row as u64, length: wanted, capacity }.into());
        }
        let needed = (wanted.div_ceil(self.page_size) as usize).saturating_sub(pages.len());
        if needed > self.free.len() {
            return Err(GraphError::PageTableFull { pages: self.pages.saturating_sub(1) }.into());
        }
        pages.extend(self.free.drain(self.free.len() - needed..).rev());
        *length = wanted;
        Ok(())
    }

    /// Gives a row's pages back.
    pub fn release(&mut self, row: usize) {
        if let Some((pages, length)) = self.rows.get_mut(row) {
            self.free.append(pages);
            *length = 0;
        }
    }

    /// How many tokens a row has room for now.
    pub fn length(&self, row: usize) -> u64 {
        self.rows.get(row).map_or(0, |row| row.1)
    }

    /// How many pages are free.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// The dense page table `[rows, pages of a row]` of the first so many rows: what a row does not have yet is the
    /// reserved page.
    pub fn table(&self, rows: usize) -> Vec<i32> {
        let width = self.per_row as usize;
        let mut table = vec![Self::RESERVED as i32; rows * width];
        for (row, (pages, _)) in table.chunks_exact_mut(width.max(1)).zip(&self.rows) {
            row.iter_mut().zip(pages).for_each(|(entry, page)| *entry = *page as i32);
        }
        table
    }
}
