//! What goes between the host and a GPU while steps are queued: inputs there, results back, both through page-locked memory,
//! with an event behind each copy.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaEvent, CudaStream, result as cuda};

use crate::error::{Result, driver_in};
use crate::owner::{CurrentContext, record};
use crate::page_locked::Pinned;

/// How many sets of inputs may be on their way before the host waits.
const STAGED: usize = 4;
/// The most results that a ring holds, and the most bytes.
const MOST_RESULTS: usize = 1024;
const MOST_BYTES: usize = 16 << 20;

/// What is known of the copies of a piece of page-locked memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// None is on its way.
    Made,
    /// Perhaps some are, all of them ahead of the event.
    Ahead,
    /// Perhaps some are, and no event is known to be behind them.
    Unknown,
}

/// The copies of a piece of page-locked memory, and the event behind them.
#[derive(Debug)]
struct Copies {
    behind: CudaEvent,
    state: State,
}

impl Copies {
    fn new(context: &Arc<CudaContext>) -> Result<Self> {
        let behind = context.new_event(None).map_err(driver_in(context, "cuEventCreate"))?;
        Ok(Self { behind, state: State::Made })
    }

    /// From here on copies may be on their way.
    fn begin(&mut self) {
        self.state = State::Unknown;
    }

    /// Records the event behind what was queued. Where it cannot be, the copies are waited for: nobody would know when the memory
    /// may be used again. Where that fails too, it stays unknown.
    fn end(&mut self, stream: &CudaStream) -> Result<()> {
        match record(&self.behind, stream) {
            Ok(()) => self.state = State::Ahead,
            Err(error) => {
                wait_for(stream, "waiting for a step's copy")?;
                self.state = State::Made;
                return Err(driver_in(stream.context(), "recording a step's copy")(error));
            }
        }
        Ok(())
    }

    /// Waits until none is on its way any more.
    fn wait(&mut self, stream: &CudaStream, doing: &'static str) -> Result<()> {
        match self.state {
            State::Made => {}
            State::Ahead => {
                // SAFETY: the event is live.
                let waited = unsafe { cuda::event::synchronize(self.behind.cu_event()) };
                waited.map_err(driver_in(stream.context(), doing))?;
            }
            State::Unknown => wait_for(stream, doing)?,
        }
        self.state = State::Made;
        Ok(())
    }
}

/// Waits for a stream of the context that is current.
fn wait_for(stream: &CudaStream, doing: &'static str) -> Result<()> {
    // SAFETY: the stream is live.
    let waited = unsafe { cuda::stream::synchronize(stream.cu_stream()) };
    waited.map_err(driver_in(stream.context(), doing))
}

/// Waits for all copies of page-locked memory that is given up, which is leaked where nobody knows whether they were made.
fn give_up<'c>(memory: &mut Pinned, copies: impl Iterator<Item = &'c mut Copies>, stream: &CudaStream) {
    let _current = CurrentContext::bind(stream.context());
    for copies in copies {
        match copies.wait(stream, "waiting for copies of memory that is given up") {
            // In a context that is lost nothing is copied any more.
            Err(error) if !error.is_fatal() => memory.leak(),
            _ => {}
        }
    }
}

/// Places that a step's inputs are copied from, each in turn.
#[derive(Debug)]
pub(super) struct Staging {
    slots: Vec<(Pinned, Copies)>,
    next: usize,
    stream: Arc<CudaStream>,
}

impl Staging {
    /// For blocks of so many bytes, to be copied on this stream, whose context is current.
    pub(super) fn new(stream: &Arc<CudaStream>, bytes: usize) -> Result<Self> {
        let context = stream.context();
        let slot = |_| Ok((Pinned::new(context, bytes)?, Copies::new(context)?));
        Ok(Self { slots: (0..STAGED).map(slot).collect::<Result<_>>()?, next: 0, stream: Arc::clone(stream) })
    }

    /// Queues copies of parts of a block, each so many bytes from a place on, to those places behind an address. The stream's context
    /// is current.
    ///
    /// # Safety
    /// The address must be device memory of the block's size, valid until the stream has come so far, whose uses are ordered with
    /// the stream.
    pub(super) unsafe fn copy(
        &mut self,
        block: &[u8],
        parts: impl Iterator<Item = (usize, usize)>,
        to: u64,
    ) -> Result<()> {
        let (stream, (memory, copies)) = (&self.stream, &mut self.slots[self.next]);
        copies.wait(stream, "waiting for an earlier step's inputs")?;
        self.next = (self.next + 1) % STAGED;
        copies.begin();
        let mut queued = Ok(());
        for (first, count) in parts {
            let from = memory.part_mut(first, count);
            from.copy_from_slice(&block[first..first + count]);
            if queued.is_ok() {
                // SAFETY: the caller's promise; the memory is written again only once the copies are known to be made.
                queued = unsafe { cuda::memcpy_htod_async(to + first as u64, from, stream.cu_stream()) };
            }
        }
        // Whatever became of them, some may be on their way.
        copies.end(stream)?;
        queued.map_err(driver_in(stream.context(), "copying a step's inputs"))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        self.slots.iter_mut().for_each(|(memory, copies)| give_up(memory, std::iter::once(copies), &self.stream));
    }
}

/// Results of steps on their way to the host: each in a place of its own, until it is taken. When all places are full, the oldest
/// result is given up for the next.
#[derive(Debug)]
pub(super) struct Ring {
    memory: Pinned,
    /// Bytes between two places.
    stride: usize,
    places: Vec<Place>,
    /// The oldest result and the one to come, counted from the ring's first.
    first: u64,
    next: u64,
    stream: Arc<CudaStream>,
}

/// Where a result is.
#[derive(Debug)]
struct Place {
    copies: Copies,
    /// The step that it is of, which says more than its place does: a step whose result could not be copied has none.
    step: u64,
    bytes: usize,
}

impl Ring {
    /// For results of so many bytes at the most, to be copied on this stream, whose context is current.
    pub(super) fn new(stream: &Arc<CudaStream>, bytes: usize) -> Result<Self> {
        let context = stream.context();
        let stride = bytes.max(1).next_multiple_of(64);
        let count = (MOST_BYTES / stride).clamp(2, MOST_RESULTS);
        let memory = Pinned::new(context, stride * count)?;
        let place = |_| Ok(Place { copies: Copies::new(context)?, step: 0, bytes: 0 });
        let places = (0..count).map(place).collect::<Result<_>>()?;
        Ok(Self { memory, stride, places, first: 0, next: 0, stream: Arc::clone(stream) })
    }

    fn at(&self, result: u64) -> usize {
        (result % self.places.len() as u64) as usize
    }

    /// Queues the copy of a step's result. After an error the step has none. The stream's context is current.
    ///
    /// # Safety
    /// The address must be device memory of so many bytes, as many as the ring is for at the most, valid until the stream has
    /// come so far.
    pub(super) unsafe fn push(&mut self, step: u64, from: u64, bytes: usize) -> Result<()> {
        let at = self.at(self.next);
        // What the place has is given up, also where nothing takes its place: it may be overwritten.
        self.first = self.first.max((self.next + 1).saturating_sub(self.places.len() as u64));
        let (place, stream) = (&mut self.places[at], &self.stream);
        place.copies.begin();
        let to = self.memory.part_mut(at * self.stride, bytes);
        // SAFETY: the caller's promise; the host reads a place only once the event behind its copy was reached, and a copy to
        // a place that is used again is behind the one before on the stream.
        let queued = unsafe { cuda::memcpy_dtoh_async(to, from, stream.cu_stream()) };
        place.copies.end(stream)?;
        queued.map_err(driver_in(stream.context(), "copying a step's result"))?;
        (place.step, place.bytes) = (step, bytes);
        self.next += 1;
        Ok(())
    }

    /// Waits for the oldest result and takes it: which step it is of, and its bytes.
    pub(super) fn take(&mut self) -> Result<Option<(u64, &[u8])>> {
        if self.first == self.next {
            return Ok(None);
        }
        let at = self.at(self.first);
        let place = &mut self.places[at];
        place.copies.wait(&self.stream, "waiting for a step's result")?;
        self.first += 1;
        Ok(Some((place.step, self.memory.part(at * self.stride, place.bytes))))
    }

    /// Whether the oldest result has arrived.
    pub(super) fn has_arrived(&self) -> Result<bool> {
        if self.first == self.next {
            return Ok(false);
        }
        let reached = self.places[self.at(self.first)].copies.behind.try_is_complete();
        reached.map_err(driver_in(self.stream.context(), "asking for a step's result"))
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let places = self.places.iter_mut().map(|place| &mut place.copies);
        give_up(&mut self.memory, places, &self.stream);
    }
}
