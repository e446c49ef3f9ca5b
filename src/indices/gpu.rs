//! Such data with its copy on a GPU.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, CudaViewMut, DeviceSlice};

use super::{Arrays, MAX_ARRAYS, Placed, Steering, Words};
use crate::buffers::check_context;
use crate::error::{Result, driver};
use crate::graph::{GraphRef, Launched, Leaf, Site, shared};
use crate::owner::refuse_capture;
use crate::tensor::{DType, TensorRef};

/// What each array of a buffer starts at a multiple of, in words, so that kernels may read several at once.
const STEP: usize = 4;

/// Data with its copy on a GPU: all arrays in one buffer, which one transfer fills.
#[derive(Debug)]
pub struct OnDevice<D> {
    host: D,
    /// Where each array lies in the buffer.
    places: Places,
    buffer: CudaSlice<i32>,
}

/// Where arrays lie in one buffer: where each starts, how long it is, and its type.
type Places = [(i64, i64, DType); MAX_ARRAYS];

/// All arrays one after the other, as they lie on the GPU.
fn packed<D: Steering>(data: &D) -> Vec<i32> {
    let mut words = Vec::new();
    for array in data.arrays() {
        match array {
            Words::I32(array) => words.extend_from_slice(array),
            Words::F32(array) => words.extend(array.iter().map(|number| number.to_bits().cast_signed())),
        }
        words.resize(words.len().next_multiple_of(STEP), 0);
    }
    // A buffer has an address.
    words.resize(words.len().max(STEP), 0);
    words
}

fn places<D: Steering>(data: &D) -> Places {
    let (mut places, mut start) = ([(0, 0, DType::I32); MAX_ARRAYS], 0);
    for (place, array) in places.iter_mut().zip(data.arrays()) {
        *place = (start as i64, array.len() as i64, array.dtype());
        start += array.len().next_multiple_of(STEP);
    }
    places
}

fn placed<'a, D: Steering>(host: &D, places: Places, memory: TensorRef<'a>) -> Placed<'a, D> {
    Placed { facts: host.facts(), arrays: Arrays::Together(memory, places) }
}

impl<D: Steering> OnDevice<D> {
    /// Copies the data to the stream's GPU, asynchronously.
    ///
    /// # Errors
    /// [`Cuda`](crate::FlashInferError::Cuda) where there is no memory, and
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for a stream that captures, whose graph would copy later.
    pub fn new(data: D, stream: &Arc<CudaStream>) -> Result<Self> {
        refuse_capture("indices", stream)?;
        let buffer = stream.clone_htod(&packed(&data)).map_err(driver("copying indices"))?;
        Ok(Self { places: places(&data), host: data, buffer })
    }

    /// The data on the host.
    pub fn host(&self) -> &D {
        &self.host
    }

    /// Other data in its place, copied asynchronously on `stream`: into the same memory where it has the same sizes, else
    /// into new one.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn replace(&mut self, data: D, stream: &Arc<CudaStream>) -> Result<()> {
        refuse_capture("indices", stream)?;
        let words = packed(&data);
        if words.len() == self.buffer.len() && Arc::ptr_eq(stream.context(), self.buffer.context()) {
            stream.memcpy_htod(&words, &mut self.buffer).map_err(driver("copying indices"))?;
            self.places = places(&data);
            self.host = data;
            return Ok(());
        }
        *self = Self::new(data, stream)?;
        Ok(())
    }

    /// The data for calls on `stream`.
    ///
    /// # Errors
    /// As for [`TensorRef::from_cudarc`].
    pub fn placed<'a>(&'a self, stream: &'a CudaStream) -> Result<Placed<'a, D>> {
        let memory = TensorRef::from_cudarc(stream, &self.buffer, &[self.buffer.len() as i64])?;
        Ok(placed(&self.host, self.places, memory))
    }
}

/// [`OnDevice`] in a capture.
#[derive(Debug)]
pub struct CapturedOnDevice<'a, D> {
    host: &'a D,
    places: Places,
    buffer: GraphRef<'a, i32>,
}

impl<D: Steering> CapturedOnDevice<'_, D> {
    /// The data as it is while it is captured. What it is replaced with later has the same sizes and bounds.
    pub fn host(&self) -> &D {
        self.host
    }

    /// The data for captured calls.
    ///
    /// # Errors
    /// None that the data's own checks leave.
    pub fn placed(&self) -> Result<Placed<'_, D>> {
        Ok(placed(self.host, self.places, self.buffer.read(&[self.buffer.len() as i64])?))
    }
}

/// [`OnDevice`] between a graph's launches.
#[derive(Debug)]
pub struct OnDeviceMut<'a, D> {
    host: &'a mut D,
    buffer: CudaViewMut<'a, i32>,
}

impl<D: Steering> OnDeviceMut<'_, D> {
    /// The data as it is.
    pub fn host(&self) -> &D {
        self.host
    }

    /// Other data for the launches to come, copied asynchronously on `stream`. It may be smaller where its type says so.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for data that does not fit what was captured, for a
    /// stream of another `CudaContext` than the graph's, or one that captures; [`Cuda`](crate::FlashInferError::Cuda).
    pub fn replace(&mut self, data: &D, stream: &Arc<CudaStream>) -> Result<()> {
        check_context("indices", "stream", stream.context(), self.buffer.stream().context())?;
        refuse_capture("indices", stream)?;
        let filled = data.in_place_of(self.host)?;
        stream.memcpy_htod(&packed(&filled), &mut self.buffer).map_err(driver("copying indices"))?;
        *self.host = filled;
        Ok(())
    }
}

impl<D: Steering> Leaf for OnDevice<D> {
    type Captured<'a> = CapturedOnDevice<'a, D>;
    type Views<'a> = OnDeviceMut<'a, D>;

    fn check(&self, context: &Arc<CudaContext>) -> Result<()> {
        self.buffer.check(context)
    }

    fn captured<'a>(&'a mut self, site: Site) -> CapturedOnDevice<'a, D> {
        CapturedOnDevice { host: &self.host, places: self.places, buffer: self.buffer.captured(site).into_ref() }
    }

    fn views(&mut self) -> OnDeviceMut<'_, D> {
        OnDeviceMut { host: &mut self.host, buffer: self.buffer.as_view_mut() }
    }

    fn take_over(&mut self, stream: &CudaStream) {
        self.buffer.take_over(stream);
    }

    fn hand_back(&mut self, launched: &Launched<'_>) -> Result<()> {
        self.buffer.hand_back(launched)
    }
}

crate::graph::graph_leaf!({D: Steering} OnDevice<D>);

/// Shared with others, and never replaced while a graph has its share: a table of cosines and sines, for example.
impl<D: Steering> Leaf for Arc<OnDevice<D>> {
    type Captured<'a> = CapturedOnDevice<'a, D>;
    type Views<'a> = &'a OnDevice<D>;

    fn check(&self, context: &Arc<CudaContext>) -> Result<()> {
        self.buffer.check(context)
    }

    fn captured<'a>(&'a mut self, site: Site) -> CapturedOnDevice<'a, D> {
        CapturedOnDevice { host: &self.host, places: self.places, buffer: shared::captured(&self.buffer, site) }
    }

    fn views(&mut self) -> &OnDevice<D> {
        self
    }

    fn take_over(&mut self, stream: &CudaStream) {
        shared::take_over(&self.buffer, stream);
    }

    fn hand_back(&mut self, launched: &Launched<'_>) -> Result<()> {
        shared::hand_back(&self.buffer, launched)
    }
}

crate::graph::graph_leaf!({D: Steering} Arc<OnDevice<D>>);
