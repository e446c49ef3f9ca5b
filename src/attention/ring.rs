//! Page-locked memory that plans are copied to the GPU from.
//!
//! The planner fills lists in page-locked memory and queues a copy of them to the GPU, without waiting for it: were that memory
//! written again before the copy is made, kernels would find other lists. So there are several slots of it, and events behind their
//! copies, which are waited for before a slot is used again. An event stands for the copies of several plans, since recording one
//! costs as much as a copy does.

use std::sync::Arc;

use cudarc::driver::result as cuda;
use cudarc::driver::{CudaEvent, CudaStream};

use crate::error::{Result, driver, driver_in};
use crate::owner::{CurrentContext, record};
use crate::page_locked::Pinned;
use crate::tensor::Layout;

/// How many slots there are: of lists that are short, and of others. An event is recorded once half of them are on their way.
const SLOTS: (usize, usize) = (8, 4);
const SHORT: usize = 1 << 20;

/// What one plan is copied from.
#[derive(Debug)]
struct Slot {
    lists: Pinned,
    tables: Pinned,
    copies: Copies,
}

/// What is known of a slot's copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Copies {
    Made,
    /// On their way, ahead of no event yet.
    Queued,
    /// On their way, ahead of this event.
    Ahead(usize),
}

/// The slots, which plans take in turn.
#[derive(Debug)]
pub(super) struct Ring {
    slots: Vec<Slot>,
    /// As many as there are slots, of which one that no slot is ahead of is always left.
    events: Vec<CudaEvent>,
    /// The event that was recorded last.
    newest: Option<usize>,
    next: usize,
    stream: Arc<CudaStream>,
}

impl Ring {
    /// With the context current.
    pub(super) fn new(stream: &Arc<CudaStream>, lists: usize, tables: usize) -> Result<Self> {
        let context = stream.context();
        let count = if lists <= SHORT { SLOTS.0 } else { SLOTS.1 };
        let slot = |_| -> Result<Slot> {
            let (lists, tables) = (Pinned::new(context, lists)?, Pinned::new(context, 4 * tables)?);
            Ok(Slot { lists, tables, copies: Copies::Made })
        };
        let slots = (0..count).map(slot).collect::<Result<_>>()?;
        let event = |_| context.new_event(None).map_err(driver("cuEventCreate"));
        let events = (0..count).map(event).collect::<Result<_>>()?;
        Ok(Self { slots, events, newest: None, next: 0, stream: Arc::clone(stream) })
    }

    /// The next slot, once its copies are made, with tables of so many numbers.
    pub(super) fn take(&mut self, tables: usize) -> Result<usize> {
        let at = self.next;
        if self.slots[at].copies == Copies::Queued {
            // Only where what recorded an event failed.
            self.record()?;
        }
        if let Copies::Ahead(event) = self.slots[at].copies {
            // SAFETY: the event is live.
            let waited = unsafe { cuda::event::synchronize(self.events[event].cu_event()) };
            waited.map_err(driver_in(self.stream.context(), "waiting for an earlier plan's copy"))?;
            self.slots.iter_mut().filter(|slot| slot.copies == Copies::Ahead(event)).for_each(Slot::made);
        }
        let slot = &mut self.slots[at];
        if slot.tables.len() < 4 * tables {
            slot.tables = Pinned::new(self.stream.context(), 4 * tables.next_power_of_two())?;
        }
        self.next = (at + 1) % self.slots.len();
        Ok(at)
    }

    /// That copies of a slot may be on their way from now on, and an event behind them where it is time for one.
    pub(super) fn queued(&mut self, at: usize) -> Result<()> {
        self.slots[at].copies = Copies::Queued;
        let queued = self.slots.iter().filter(|slot| slot.copies == Copies::Queued).count();
        if queued < self.slots.len() / 2 { Ok(()) } else { self.record() }
    }

    /// A slot's memory for tables, whose copies are made.
    pub(super) fn tables(&mut self, at: usize) -> &mut [i32] {
        self.slots[at].tables.words()
    }

    /// A slot's memory for lists, as a tensor of bytes.
    pub(super) fn lists(&self, at: usize) -> Layout {
        self.slots[at].lists.layout()
    }

    /// What was planned with a slot, whose copies are made or on their way.
    pub(super) fn planned(&self, at: usize, bytes: usize) -> &[u8] {
        self.slots[at].lists.part(0, bytes)
    }

    /// The slot that the last plan was copied from.
    pub(super) fn last(&self) -> usize {
        (self.next + self.slots.len() - 1) % self.slots.len()
    }

    /// Keeps a slot from being the next one.
    pub(super) fn skip(&mut self, slot: usize) {
        if self.next == slot {
            self.next = (slot + 1) % self.slots.len();
        }
    }

    /// Records an event behind all copies. Where that fails, nothing would tell when they are made, so they are waited for.
    fn record(&mut self) -> Result<()> {
        let is_free = |event: &usize| self.slots.iter().all(|slot| slot.copies != Copies::Ahead(*event));
        let Some(event) = (0..self.events.len()).find(is_free) else {
            unreachable!("each slot is ahead of one event at most, and one is ahead of none")
        };
        let (copies, result) = match record(&self.events[event], &self.stream) {
            Ok(()) => {
                self.newest = Some(event);
                (Copies::Ahead(event), Ok(()))
            }
            Err(error) => {
                let context = self.stream.context();
                // SAFETY: the stream is live. In a context that is lost nothing is copied any more.
                let waited = unsafe { cuda::stream::synchronize(self.stream.cu_stream()) };
                waited.map_err(driver_in(context, "waiting for a plan's copies"))?;
                (Copies::Made, Err(driver_in(context, "recording a plan's copies")(error)))
            }
        };
        self.slots.iter_mut().filter(|slot| slot.copies == Copies::Queued).for_each(|slot| slot.copies = copies);
        result
    }
}

impl Slot {
    fn made(&mut self) {
        self.copies = Copies::Made;
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let left = |copies: Copies| self.slots.iter().any(|slot| slot.copies == copies);
        let context = self.stream.context();
        let _current = CurrentContext::bind(context);
        let waited = match self.newest {
            // SAFETY: the stream is live.
            _ if left(Copies::Queued) => unsafe { cuda::stream::synchronize(self.stream.cu_stream()) },
            // What is ahead of an earlier event is ahead of this one too.
            // SAFETY: the event is live.
            Some(event) if left(Copies::Ahead(event)) => unsafe {
                cuda::event::synchronize(self.events[event].cu_event())
            },
            _ => Ok(()),
        };
        // In a context that is lost nothing is copied any more. Else some may be on their way for good.
        if waited.map_err(driver_in(context, "waiting for a plan's copies")).is_err_and(|error| !error.is_fatal()) {
            for slot in self.slots.iter_mut().filter(|slot| slot.copies != Copies::Made) {
                slot.lists.leak();
                slot.tables.leak();
            }
        }
    }
}
