//! Attention's plans for compute graphs: over memory that the graph's run has, planned before each step.
//!
//! A step that is captured has a [`GraphPlan`], whose launches stay the same; one that runs node by node has a plan of its own for
//! each batch, as a [`Workspace`](super::Workspace) makes it.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::error::Result;
use crate::indices::refuse;
use crate::kernels::page::{KvLayout, PagedKvCache};
use crate::object::{Array, Object};
use crate::owner::Owner;
use crate::stream::Stream;
use crate::tensor::{Layout, TensorMut, TensorRef};

use super::batch::Batch;
use super::gpu::{Loaded, OnStream, integers, tables_len};
use super::graph::{GraphPlan, GraphRoom, filled_pages};
use super::run::{AttentionOptions, Place, Planned};
use super::sizes::{Largest, Sizes, check_batch};
use super::spec::{AttentionSpec, Backend};

/// What computes a step's attention, and the memory that its plans need.
#[derive(Debug)]
pub(crate) struct StepKernel {
    spec: AttentionSpec,
    room: GraphRoom,
    captured: bool,
    loaded: Loaded,
    sizes: Sizes,
    tables: usize,
}

impl StepKernel {
    /// For batches of up to so many requests, rows and pages, on a stream's GPU; `captured` is whether all of its plans are to be
    /// launched alike.
    pub(crate) fn new(
        spec: AttentionSpec,
        room: GraphRoom,
        cache: &Batch,
        captured: bool,
        stream: &Arc<CudaStream>,
    ) -> Result<Self> {
        room.check(&spec, cache)?;
        let largest = Largest::new(room.requests, room.rows);
        let loaded = Loaded::new(&spec, largest, stream)?;
        let sizes = loaded.sizes(&spec, largest, captured);
        let tables = tables_len(room.requests as usize, filled_pages(&spec, room));
        Ok(Self { spec, room, captured, loaded, sizes, tables })
    }

    /// The bytes of partial results, which plans may share that do not run at a time, of a plan's lists, and of its tables.
    pub(crate) fn bytes(&self) -> [u64; 3] {
        [self.sizes.float as u64, self.sizes.int as u64, 4 * self.tables as u64]
    }

    /// The plans, in memory of these sizes, the first of them for a batch.
    ///
    /// # Safety
    /// The three addresses must be of so many [bytes](Self::bytes) on the stream's GPU, zeros, aligned to 16 bytes and valid as long
    /// as the plans and what runs them; nothing but the plans and their runs may use them, but for runs of other plans, behind this
    /// one's on the stream, the partial results.
    pub(crate) unsafe fn placed(self, places: [u64; 3], batch: &Batch, stream: &Arc<CudaStream>) -> Result<StepPlan> {
        let Self { spec, room, captured, loaded, sizes, tables } = self;
        // SAFETY: the caller's promise.
        let memory = unsafe { OnStream::over(loaded, &spec, sizes, (places, tables), stream, captured) }?;
        Ok(StepPlan(if captured {
            How::Captured(Box::new(GraphPlan::with(spec, room, batch, memory)?))
        } else {
            How::Eager { spec, room, memory: Box::new(memory), integers: Vec::new(), rows: 0, pages: 0 }
        }))
    }
}

/// A step's attention, planned for one batch after the other.
#[derive(Debug)]
pub(crate) struct StepPlan(How);

#[derive(Debug)]
enum How {
    Captured(Box<GraphPlan>),
    Eager {
        spec: AttentionSpec,
        room: GraphRoom,
        memory: Box<OnStream>,
        /// What the planner answered, and the rows of the batch and the pages of its cache; nothing where it failed.
        integers: Vec<i64>,
        rows: i64,
        pages: i64,
    },
}

/// What a batch's plan came to.
#[derive(Debug)]
pub(crate) enum Replanned {
    Done,
    /// It would be launched in another way than what is captured; the plan is the one before.
    Otherwise {
        captured: Vec<i64>,
        wanted: Vec<i64>,
    },
}

impl StepPlan {
    /// Plans a batch, asynchronously on the stream, for the runs behind it. After an error a captured one's plan is the one before.
    pub(crate) fn plan(&mut self, batch: &Batch) -> Result<Replanned> {
        match &mut self.0 {
            How::Captured(plan) => Ok(match plan.replan(batch)? {
                None => Replanned::Done,
                Some(wanted) => Replanned::Otherwise { captured: plan.integers().to_vec(), wanted },
            }),
            How::Eager { spec, room, memory, integers: known, rows, pages } => {
                let largest = Largest::new(room.requests, room.rows);
                check_batch(spec, largest, batch, memory.multiprocessors())?;
                let most = filled_pages(spec, *room);
                if batch.page_count() > most {
                    let found = format!("{} of all requests together", batch.page_count());
                    return refuse("DeviceRun", "pages", found, format!("at most {most}, for which there is room"));
                }
                known.clear();
                *known = integers(&memory.planned(spec, batch, batch.rows())?);
                (*rows, *pages) = (batch.rows(), batch.cache().map_or(0, |(_, pages)| pages));
                Ok(Replanned::Done)
            }
        }
    }

    /// How many kernels a run launches: where contexts are divided, one that merges the parts too.
    pub(crate) fn kernels(&self) -> u32 {
        let (backend, integers) = match &self.0 {
            How::Captured(plan) => (plan.backend(), plan.integers()),
            How::Eager { memory, integers, .. } => (memory.backend(), &integers[..]),
        };
        // The last number of both planners that divide contexts says whether they did.
        let divided = backend != Backend::Fa3 && integers.last().is_some_and(|divided| *divided != 0);
        1 + u32::from(divided)
    }

    /// Queues attention by the last plan over queries, keys, values and results of these layouts; `pdl` is whether it may start
    /// before the kernel ahead of it has ended.
    ///
    /// # Safety
    /// The layouts must be of memory that is valid until the kernels have run, whose uses are ordered with the stream.
    pub(crate) unsafe fn run(&self, [q, k, v, o]: [Layout; 4], stream: Stream<'_>, pdl: bool) -> Result<()> {
        // SAFETY: the caller's promise.
        let (q, k, v, mut o) = unsafe {
            (
                TensorRef::from_layout(q, Owner::NONE),
                TensorMut::from_layout(k, Owner::NONE),
                TensorMut::from_layout(v, Owner::NONE),
                TensorMut::from_layout(o, Owner::NONE),
            )
        };
        let cache = PagedKvCache::new(k, v, KvLayout::Nhd)?;
        let mut run = |planned: &Planned<'_>| planned.paged(&mut o, None, &q, &cache, &AttentionOptions::default());
        match &self.0 {
            How::Captured(plan) => plan.launched(stream, Some(pdl), run),
            How::Eager { integers, .. } if integers.is_empty() => {
                let expected = "a batch that was planned without an error".to_owned();
                refuse("DeviceRun", "plan", "none".to_owned(), expected)
            }
            How::Eager { spec, memory, integers, rows, pages, .. } => {
                let info: Object = Array::from_items(integers.iter().copied())?.into();
                let place = Place::Gpu(memory.launch(&info).with_pdl(pdl));
                let planned = Planned { spec, rows: *rows, pages: *pages, stream, place, known: None };
                run(&planned)
            }
        }
    }

    /// Copies the plan to the GPU again, where lists of another may be there since something failed.
    pub(crate) fn restore(&mut self) -> Result<()> {
        match &mut self.0 {
            How::Captured(plan) => plan.restore(),
            How::Eager { .. } => Ok(()),
        }
    }
}
