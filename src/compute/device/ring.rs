//! What goes between the host and a GPU while steps are queued: inputs there, results back, both through page-locked memory,
//! with an event behind each copy.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaEvent, CudaStream, result as cuda};

use crate::error::{Result, driver, driver_in};
use crate::owner::record;
use crate::page_locked::Pinned;

/// How many sets of inputs may be on their way before the host waits.
const STAGED: usize = 4;
/// The most results that a ring holds, and the most bytes.
const MOST_RESULTS: usize = 1024;
const MOST_BYTES: usize = 16 << 20;

fn new_event(context: &Arc<CudaContext>) -> Result<CudaEvent> {
    context.new_event(None).map_err(driver_in(context.as_ref(), "cuEventCreate"))
}

/// Records an event behind a copy of page-locked memory. Where it cannot be, the copy is waited for: nobody would know when the
/// memory may be used again.
fn record_behind(event: &CudaEvent, stream: &CudaStream) -> Result<()> {
    record(event, stream).or_else(|error| {
        let context = stream.context();
        // SAFETY: the stream is live.
        let waited = unsafe { cuda::stream::synchronize(stream.cu_stream()) };
        waited.map_err(driver_in(context, "waiting for a step's copy"))?;
        Err(driver_in(context, "recording a step's copy")(error))
    })
}

/// Places that a step's inputs are copied from, each in turn.
#[derive(Debug)]
pub(super) struct Staging {
    slots: Vec<Staged>,
    next: usize,
}

#[derive(Debug)]
struct Staged {
    memory: Pinned,
    copied: CudaEvent,
    on_its_way: bool,
}

impl Staged {
    fn wait(&mut self) -> Result<()> {
        if self.on_its_way {
            // SAFETY: the event is live.
            let waited = unsafe { cuda::event::synchronize(self.copied.cu_event()) };
            waited.map_err(driver_in(self.memory.context(), "waiting for an earlier step's inputs"))?;
            self.on_its_way = false;
        }
        Ok(())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        // In a context that is lost nothing is copied any more.
        self.wait().ok();
    }
}

impl Staging {
    /// For blocks of so many bytes, with the context current.
    pub(super) fn new(context: &Arc<CudaContext>, bytes: usize) -> Result<Self> {
        let slot =
            |_| Ok(Staged { memory: Pinned::new(context, bytes)?, copied: new_event(context)?, on_its_way: false });
        Ok(Self { slots: (0..STAGED).map(slot).collect::<Result<_>>()?, next: 0 })
    }

    /// Queues copies of parts of a block, each so many bytes from a place on, to those places behind an address.
    ///
    /// # Safety
    /// The address must be device memory of the block's size, valid until the stream has come so far, whose uses are ordered with
    /// the stream.
    pub(super) unsafe fn copy(
        &mut self,
        block: &[u8],
        parts: impl Iterator<Item = (usize, usize)>,
        to: u64,
        stream: &CudaStream,
    ) -> Result<()> {
        let slot = &mut self.slots[self.next];
        slot.wait()?;
        self.next = (self.next + 1) % STAGED;
        let mut queued = Ok(());
        for (first, count) in parts {
            let from = slot.memory.part_mut(first, count);
            from.copy_from_slice(&block[first..first + count]);
            slot.on_its_way = true;
            if queued.is_ok() {
                // SAFETY: the caller's promise; the memory is written again only once the event behind the copies was reached.
                queued = unsafe { cuda::memcpy_htod_async(to + first as u64, from, stream.cu_stream()) };
            }
        }
        record_behind(&slot.copied, stream)?;
        queued.map_err(driver("cuMemcpyHtoDAsync"))
    }
}

/// Results of steps on their way to the host: each in a place of its own, until it is taken. When all places are full, the oldest
/// result is given up for the next.
#[derive(Debug)]
pub(super) struct Ring {
    memory: Pinned,
    /// Bytes between two places.
    stride: usize,
    copied: Vec<CudaEvent>,
    /// The bytes that each place has.
    sizes: Vec<usize>,
    /// The step that the oldest result is of, and the one that the next will be of.
    first: u64,
    next: u64,
}

impl Ring {
    /// For results of so many bytes at the most, with the context current, from this step on.
    pub(super) fn new(context: &Arc<CudaContext>, bytes: usize, step: u64) -> Result<Self> {
        let stride = bytes.max(1).next_multiple_of(64);
        let places = (MOST_BYTES / stride).clamp(2, MOST_RESULTS);
        let memory = Pinned::new(context, stride * places)?;
        let copied = (0..places).map(|_| new_event(context)).collect::<Result<_>>()?;
        Ok(Self { memory, stride, copied, sizes: vec![0; places], first: step, next: step })
    }

    fn place(&self, step: u64) -> usize {
        (step % self.copied.len() as u64) as usize
    }

    /// Queues the copy of a step's result.
    ///
    /// # Safety
    /// The address must be device memory of so many bytes, as many as the ring is for at the most, valid until the stream has
    /// come so far, and the stream always the same.
    pub(super) unsafe fn push(&mut self, from: u64, bytes: usize, stream: &CudaStream) -> Result<()> {
        let place = self.place(self.next);
        let to = self.memory.part_mut(place * self.stride, bytes);
        // SAFETY: the caller's promise; the host reads a place only once the event behind its copy was reached, and a copy to
        // a place that is used again is behind the one before on the stream.
        let queued = unsafe { cuda::memcpy_dtoh_async(to, from, stream.cu_stream()) };
        queued.map_err(driver("cuMemcpyDtoHAsync"))?;
        record_behind(&self.copied[place], stream)?;
        self.sizes[place] = bytes;
        self.next += 1;
        self.first = self.first.max(self.next.saturating_sub(self.copied.len() as u64));
        Ok(())
    }

    /// Waits for the oldest result and takes it: which step it is of, and its bytes.
    pub(super) fn take(&mut self) -> Result<Option<(u64, &[u8])>> {
        if self.first == self.next {
            return Ok(None);
        }
        let (step, place) = (self.first, self.place(self.first));
        // SAFETY: the event is live.
        let waited = unsafe { cuda::event::synchronize(self.copied[place].cu_event()) };
        waited.map_err(driver_in(self.memory.context(), "waiting for a step's result"))?;
        self.first += 1;
        Ok(Some((step, self.memory.part(place * self.stride, self.sizes[place]))))
    }

    /// Whether the oldest result has arrived.
    pub(super) fn has_arrived(&self) -> Result<bool> {
        if self.first == self.next {
            return Ok(false);
        }
        let reached = self.copied[self.place(self.first)].try_is_complete();
        reached.map_err(driver_in(self.memory.context(), "asking for a step's result"))
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if self.next > 0 {
            let last = &self.copied[self.place(self.next - 1)];
            // The last copy is behind all others. In a context that is lost nothing is copied any more.
            // SAFETY: the event is live.
            unsafe { cuda::event::synchronize(last.cu_event()) }.ok();
        }
    }
}
