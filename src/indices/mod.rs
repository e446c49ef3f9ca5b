//! Host data by which kernels find their way in device memory: checked where it is made, and copied to the GPU as a whole.
//!
//! A kernel that is given a wrong index reads or writes somewhere else, and nothing on the way looks at indices that are on
//! the GPU. So they are made here, of host data that was checked, and the copy on the GPU is owned together with it: neither
//! can be changed without the other. [`PageTable`] says which pages of a cache the requests of a batch have, [`Tokens`] where
//! the tokens of a step go, [`Positions`] which places in their sequences tokens have, [`PerRow`] what sampling goes by in each
//! row.
//!
//! What is on the GPU already, computed there, enters by an `unsafe` constructor, whose promise is what is checked otherwise.

use std::fmt;

use crate::error::{FlashInferError, Result};
use crate::sequences::CuSeqlens;
use crate::tensor::{DType, Device, TensorRef};

#[cfg(feature = "cudarc")]
mod gpu;
mod pages;
mod per_row;

#[cfg(feature = "cudarc")]
pub use gpu::{CapturedOnDevice, OnDevice, OnDeviceMut};
pub use pages::{PageTable, TokenTensors, Tokens, TokensFacts};
pub(crate) use per_row::{LEAST_TOP_P, TEMPERATURES};
pub use per_row::{MinP, Parameter, PerRow, PerRowFacts, Setting, Temperature, TopK, TopP};

/// The most arrays that such data has.
const MAX_ARRAYS: usize = 6;

/// One array of such data.
#[derive(Debug, Clone, Copy)]
pub enum Words<'a> {
    /// 32-bit integers.
    I32(&'a [i32]),
    /// Single-precision numbers.
    F32(&'a [f32]),
}

impl<'a> Words<'a> {
    #[cfg_attr(not(feature = "cudarc"), allow(dead_code, reason = "GPU memory comes from cudarc"))]
    fn len(self) -> usize {
        match self {
            Self::I32(words) => words.len(),
            Self::F32(words) => words.len(),
        }
    }

    #[cfg_attr(not(feature = "cudarc"), allow(dead_code, reason = "GPU memory comes from cudarc"))]
    fn dtype(self) -> DType {
        match self {
            Self::I32(_) => DType::I32,
            Self::F32(_) => DType::F32,
        }
    }

    fn tensor(self) -> Result<TensorRef<'a>> {
        match self {
            Self::I32(words) => TensorRef::from_slice(words, &[words.len() as i64]),
            Self::F32(words) => TensorRef::from_slice(words, &[words.len() as i64]),
        }
    }
}

/// Host data that steers kernels. Implemented by this crate's types alone: what they were checked for is what kernels rely on.
pub trait Steering: sealed::Sealed + Clone + fmt::Debug + 'static {
    /// What calls need to know of it, wherever its arrays are.
    type Facts: Copy + fmt::Debug;

    /// What calls need to know of it.
    fn facts(&self) -> Self::Facts;

    #[doc(hidden)]
    fn arrays(&self) -> Vec<Words<'_>>;

    /// This data in the place of other data that a graph was captured with: of the same sizes, filled up where it is smaller,
    /// and within the bounds that were checked then.
    #[doc(hidden)]
    fn in_place_of(&self, captured: &Self) -> Result<Self>;
}

pub(crate) mod sealed {
    pub trait Sealed {}
}

/// [`Steering`] data where a call is to read it: on the host, or on a GPU.
pub struct Placed<'a, D: Steering> {
    facts: D::Facts,
    arrays: Arrays<'a>,
}

#[allow(clippy::large_enum_variant, reason = "the large one is that of every call on a GPU, which must not allocate")]
enum Arrays<'a> {
    /// Each a tensor of its own.
    Apart(Vec<TensorRef<'a>>),
    /// All in one buffer: where each starts in it, how long it is and of which type.
    #[cfg_attr(not(feature = "cudarc"), allow(dead_code, reason = "GPU memory comes from cudarc"))]
    Together(TensorRef<'a>, [(i64, i64, DType); MAX_ARRAYS]),
}

impl<D: Steering> fmt::Debug for Placed<'_, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Placed").field("facts", &self.facts).field("device", &self.device()).finish()
    }
}

impl<'a, D: Steering> Placed<'a, D> {
    /// On the host, for tensors there.
    ///
    /// # Errors
    /// None that the data's own checks leave.
    pub fn on_host(data: &'a D) -> Result<Self> {
        let arrays = data.arrays().into_iter().map(Words::tensor).collect::<Result<_>>()?;
        Ok(Self { facts: data.facts(), arrays: Arrays::Apart(arrays) })
    }

    /// Arrays of which these facts are promised, not checked.
    pub(crate) fn promised(facts: D::Facts, arrays: Vec<TensorRef<'a>>) -> Self {
        Self { facts, arrays: Arrays::Apart(arrays) }
    }

    /// What is known of the data.
    pub fn facts(&self) -> D::Facts {
        self.facts
    }

    /// Where the arrays are.
    pub fn device(&self) -> Device {
        match &self.arrays {
            Arrays::Apart(arrays) => arrays.first().map_or(Device::Cpu, TensorRef::device),
            Arrays::Together(memory, _) => memory.device(),
        }
    }

    /// An array as a tensor, in the order of [`Steering::arrays`].
    #[inline]
    pub(crate) fn array(&self, i: usize) -> TensorRef<'_> {
        match &self.arrays {
            Arrays::Apart(arrays) => arrays[i].reborrow(),
            Arrays::Together(memory, places) => {
                let (start, len, dtype) = places[i];
                memory.words(start, &[len], dtype)
            }
        }
    }

    /// The first elements of an array in a shape, of which there must be so many.
    #[inline]
    pub(crate) fn array_in(&self, i: usize, shape: &[i64]) -> TensorRef<'_> {
        match &self.arrays {
            Arrays::Apart(arrays) => arrays[i].words(0, shape, arrays[i].dtype()),
            Arrays::Together(memory, places) => {
                let (start, _, dtype) = places[i];
                memory.words(start, shape, dtype)
            }
        }
    }

    /// How long an array is that is no tensor of somebody else's.
    #[inline]
    pub(crate) fn array_len(&self, i: usize) -> Option<i64> {
        match &self.arrays {
            Arrays::Apart(arrays) => match arrays[i].shape() {
                [len] => Some(*len),
                _ => None,
            },
            Arrays::Together(_, places) => Some(places[i].1),
        }
    }
}

pub(crate) fn refuse<T>(
    function: &'static str,
    argument: &'static str,
    found: String,
    expected: impl Into<String>,
) -> Result<T> {
    Err(FlashInferError::InvalidArgument { function, argument, found, expected: expected.into() })
}

/// The places of tokens in their sequences, from 0 on: what rotary embeddings turn them by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Positions {
    values: Vec<i32>,
    below: i64,
}

/// What calls need to know of [`Positions`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PositionsFacts {
    /// How many there are: one for each token.
    pub tokens: i64,
    /// What every one of them is below.
    pub below: i64,
}

impl Positions {
    /// From one position for each token, each below `below`: the longest sequence that there may be, which the rows of a
    /// table of cosines and sines must reach.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) for a position that is negative or not below `below`, and for a
    /// `below` that is not within 1 and 2³¹ − 1.
    pub fn new(values: &[i64], below: i64) -> Result<Self> {
        if !(1..=i64::from(i32::MAX)).contains(&below) {
            return refuse(
                "Positions",
                "below",
                below.to_string(),
                "1 to 2147483647, the longest sequence that there may be",
            );
        }
        if let Some(i) = values.iter().position(|position| !(0..below).contains(position)) {
            return refuse("Positions", "positions", format!("{} at {i}", values[i]), format!("0 to {}", below - 1));
        }
        Ok(Self { values: values.iter().map(|&position| position as i32).collect(), below })
    }

    /// The positions.
    pub fn values(&self) -> &[i32] {
        &self.values
    }
}

impl sealed::Sealed for Positions {}

impl Steering for Positions {
    type Facts = PositionsFacts;

    fn facts(&self) -> PositionsFacts {
        PositionsFacts { tokens: self.values.len() as i64, below: self.below }
    }

    fn arrays(&self) -> Vec<Words<'_>> {
        vec![Words::I32(&self.values)]
    }

    fn in_place_of(&self, captured: &Self) -> Result<Self> {
        let (tokens, below) = (captured.values.len(), captured.below);
        let found = format!("{} positions below {}", self.values.len(), self.below);
        match self.values.len() == tokens && self.below <= below {
            true => Ok(Self { below, ..self.clone() }),
            false => refuse("Positions", "positions", found, format!("{tokens} below {below}, as captured")),
        }
    }
}

impl<'a> Placed<'a, Positions> {
    /// Positions that are on a device already: I32, one for each token. What the tensor must be besides, calls check.
    ///
    /// # Safety
    /// Whenever a kernel that was given this runs, each of the numbers must be at least 0 and below `below`.
    pub unsafe fn from_tensor(positions: TensorRef<'a>, below: i64) -> Self {
        let tokens = positions.shape().first().copied().unwrap_or(0);
        Self::promised(PositionsFacts { tokens, below }, vec![positions])
    }

    pub(crate) fn positions(&self) -> TensorRef<'_> {
        self.array(0)
    }
}

/// The positions of tokens that lie one sequence after the other: each sequence's go on from an offset of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RaggedPositions {
    indptr: Vec<i32>,
    offsets: Vec<i32>,
}

/// What calls need to know of [`RaggedPositions`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RaggedFacts {
    /// How many tokens all sequences have together.
    pub tokens: i64,
    /// How many sequences there are.
    pub sequences: i64,
}

impl RaggedPositions {
    /// From where each sequence starts among the tokens and where the last one ends, `0 = i0 ≤ i1 ≤ … ≤ iN`, and from the
    /// position of each sequence's first token.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) for offsets that do not start with 0 or decrease, another number
    /// of first positions than of sequences, a negative one, and a position past 2³¹ − 1.
    pub fn new(indptr: &[i64], first_positions: &[i64]) -> Result<Self> {
        let renamed = |error| match error {
            FlashInferError::InvalidArgument { found, expected, .. } => {
                FlashInferError::InvalidArgument { function: "RaggedPositions", argument: "indptr", found, expected }
            }
            other => other,
        };
        let checked = CuSeqlens::from_offsets(indptr).map_err(renamed)?;
        if first_positions.len() != checked.sequences() {
            let found = format!("{} of them", first_positions.len());
            let expected = format!("one for each of the {} sequences", checked.sequences());
            return refuse("RaggedPositions", "first_positions", found, expected);
        }
        for (i, (&first, ends)) in first_positions.iter().zip(indptr.windows(2)).enumerate() {
            if first < 0 || first.saturating_add(ends[1] - ends[0]) > i64::from(i32::MAX) {
                let found = format!("{first} for the {} tokens of sequence {i}", ends[1] - ends[0]);
                return refuse("RaggedPositions", "first_positions", found, "positions from 0 to 2147483647");
            }
        }
        let narrow = |numbers: &[i64]| numbers.iter().map(|&number| number as i32).collect();
        Ok(Self { indptr: narrow(indptr), offsets: narrow(first_positions) })
    }
}

impl sealed::Sealed for RaggedPositions {}

impl Steering for RaggedPositions {
    type Facts = RaggedFacts;

    fn facts(&self) -> RaggedFacts {
        let tokens = self.indptr.last().copied().unwrap_or(0).into();
        RaggedFacts { tokens, sequences: self.offsets.len() as i64 }
    }

    fn arrays(&self) -> Vec<Words<'_>> {
        vec![Words::I32(&self.indptr), Words::I32(&self.offsets)]
    }

    fn in_place_of(&self, captured: &Self) -> Result<Self> {
        let (found, expected) = (self.facts(), captured.facts());
        if found.tokens != expected.tokens || found.sequences > expected.sequences {
            let shown = |facts: RaggedFacts| format!("{} tokens of {} sequences", facts.tokens, facts.sequences);
            let expected = format!("{} or fewer, as captured", shown(expected));
            return refuse("RaggedPositions", "indptr", shown(found), expected);
        }
        // Sequences without tokens behind them.
        let mut filled = self.clone();
        filled.indptr.resize(captured.indptr.len(), expected.tokens as i32);
        filled.offsets.resize(captured.offsets.len(), 0);
        Ok(filled)
    }
}

impl<'a> Placed<'a, RaggedPositions> {
    /// Arrays that are on a device already: I32, `indptr` one longer than `offsets`. What they must be besides, calls check.
    ///
    /// # Safety
    /// Whenever a kernel that was given this runs, `indptr` must start with 0, not decrease, and end with `facts.tokens`.
    pub unsafe fn from_tensors(indptr: TensorRef<'a>, offsets: TensorRef<'a>, facts: RaggedFacts) -> Self {
        Self::promised(facts, vec![indptr, offsets])
    }

    pub(crate) fn indptr(&self) -> TensorRef<'_> {
        self.array(0)
    }

    pub(crate) fn offsets(&self) -> TensorRef<'_> {
        self.array(1)
    }
}
