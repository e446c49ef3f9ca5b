//! Host data by which kernels find their way in device memory: checked where it is made, and copied to the GPU as a whole.
//!
//! A kernel that is given a wrong index reads or writes somewhere else, and nothing on the way looks at indices that are on
//! the GPU. So they are made here, of host data that was checked, and the copy on the GPU is owned together with it: neither
//! can be changed without the other. [`PageTable`] says which pages of a cache the requests of a batch have, [`Tokens`] where
//! the tokens of a step go, [`Positions`] which places in their sequences tokens have.
//!
//! What is on the GPU already, computed there, enters by an `unsafe` constructor, whose promise is what is checked otherwise.

use std::fmt;

use crate::error::{FlashInferError, Result};
use crate::tensor::{DType, Device, TensorRef};

#[cfg(feature = "cudarc")]
mod gpu;
mod pages;

#[cfg(feature = "cudarc")]
pub use gpu::{CapturedOnDevice, OnDevice, OnDeviceMut};
pub use pages::{PageTable, TokenTensors, Tokens, TokensFacts};

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
    pub(crate) fn array(&self, i: usize) -> TensorRef<'_> {
        match &self.arrays {
            Arrays::Apart(arrays) => arrays[i].reborrow(),
            Arrays::Together(memory, places) => {
                let (start, len, dtype) = places[i];
                memory.words(start, len, dtype)
            }
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
    /// Positions that are on a device already.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) unless the tensor is one of I32, of one dimension, contiguous.
    ///
    /// # Safety
    /// Whenever a kernel that was given this runs, each of the numbers must be at least 0 and below `below`.
    pub unsafe fn from_tensor(positions: TensorRef<'a>, below: i64) -> Result<Self> {
        vector("Positions", "positions", &positions)?;
        let facts = PositionsFacts { tokens: positions.shape()[0], below };
        Ok(Self::promised(facts, vec![positions]))
    }

    pub(crate) fn positions(&self) -> TensorRef<'_> {
        self.array(0)
    }
}

/// That a tensor is a contiguous vector of I32.
pub(crate) fn vector(function: &'static str, argument: &'static str, tensor: &TensorRef<'_>) -> Result<()> {
    if tensor.dtype() == DType::I32 && tensor.shape().len() == 1 && tensor.layout().is_contiguous() {
        return Ok(());
    }
    let (dtype, shape, strides) = (tensor.dtype(), tensor.shape(), tensor.strides());
    refuse(function, argument, format!("{dtype}{shape:?} strided {strides:?}"), "I32 of one dimension, contiguous")
}
