//! Plans that a graph is captured with, and that are made anew between its launches.
//!
//! A graph keeps addresses and the sizes of launches; the lists and tables that kernels find their way by are read at each launch. So
//! a plan for a graph has its tables at fixed places, with room for the largest batch; requests that are missing are filled up; and
//! what upstream's planner answers for a new batch is compared with what was captured. The planner's copy is never captured.

use std::sync::Arc;

use cudarc::driver::sys::CUresult;
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError};

use crate::error::{Result, driver, driver_in};
use crate::graph::{Launched, Leaf, Site};
use crate::indices::refuse;
use crate::kernels::page::{PagedKvCache, PagedMlaCache};
use crate::object::{Array, Object};
use crate::owner::{CurrentContext, record, wait};
use crate::stream::Stream;
use crate::tensor::{TensorMut, TensorRef};

use super::batch::Batch;
use super::gpu::{Buffers, OnStream};
use super::rows::RUN;
use super::run::{AttentionOptions, LatentQueries, Place, Planned};
use super::sizes::{Largest, check_batch};
use super::spec::{AttentionSpec, Backend, Kind};

/// The name that errors carry.
const GRAPH_PLAN: &str = "GraphPlan";

/// What a graph's plan has room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GraphRoom {
    /// The requests that it is captured with. Others that are missing in a batch are filled up.
    pub requests: i64,
    /// The rows of the captured tensors. For [`Kind::Decode`] as many as requests; for [`Kind::Mla`] a multiple of them, since each
    /// request has as many queries as every other.
    pub rows: i64,
    /// The most pages of all requests together; for [`Kind::Ragged`] the most keys, which is how many the captured keys and values
    /// have.
    pub pages: usize,
    /// A page of the cache that no request has: what a request that is filled up reads, and answers nothing of. Without pages it
    /// means nothing.
    pub reserved_page: i32,
}

impl GraphRoom {
    /// For [`Kind::Ragged`]: so many requests, of so many queries together and so many keys.
    pub const fn ragged(requests: i64, rows: i64, keys: usize) -> Self {
        Self { requests, rows, pages: keys, reserved_page: 0 }
    }
}

impl GraphRoom {
    /// That a graph for such batches can have so much room.
    pub(super) fn check(&self, spec: &AttentionSpec, batch: &Batch) -> Result<()> {
        let GraphRoom { requests, rows, pages, reserved_page } = *self;
        let cache = batch.cache();
        match (spec.kind(), cache) {
            (Kind::Ragged, None) => {}
            (Kind::Paged | Kind::Decode | Kind::Mla, Some((_, pages))) => {
                if !(0..pages).contains(&i64::from(reserved_page)) {
                    let expected = format!("0 to {}, as the cache has {pages} pages", pages - 1);
                    return refuse(GRAPH_PLAN, "reserved_page", reserved_page.to_string(), expected);
                }
            }
            (kind, cache) => {
                let found = if cache.is_some() { "one of pages" } else { "one without pages" };
                let expected =
                    format!("one as a specification of {kind:?} has it: ragged without pages, all others with them");
                return refuse(GRAPH_PLAN, "batch", found.to_owned(), expected);
            }
        }
        if spec.kind() == Kind::Mla && requests > 0 && rows % requests != 0 {
            let expected = format!("a multiple of the {requests} requests, which have as many queries each");
            return refuse(GRAPH_PLAN, "rows", rows.to_string(), expected);
        }
        let page_size = cache.map_or(1, |(page_size, _)| page_size);
        let most = i64::from(i32::MAX) / page_size;
        if !(1..=most).contains(&(pages as i64)) {
            return refuse(
                GRAPH_PLAN,
                "pages",
                pages.to_string(),
                format!("1 to {most}, whose tokens kernels can count"),
            );
        }
        Ok(())
    }
}

/// A plan that a [`LaunchGraph`](crate::LaunchGraph) owns among its buffers: captured calls run it, and between launches it is
/// planned for other batches.
///
/// ```no_run
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use flashinfer_rs::attention::{AttentionOptions, AttentionSpec, Batch, GraphPlan, GraphRoom};
/// # use flashinfer_rs::cudarc::driver::CudaContext;
/// # use flashinfer_rs::kernels::page::{KvLayout, PagedKvCache};
/// # use flashinfer_rs::{DType, FlashInferRuntime, LaunchGraph, RuntimeConfig};
/// # use half::bf16;
/// # FlashInferRuntime::initialize(RuntimeConfig::default())?;
/// let stream = CudaContext::new(0)?.new_stream()?;
/// let spec = AttentionSpec::decode(DType::BF16, (8, 2), 128, 16).build()?;
/// // Up to 4 requests over 99 pages; page 99 is the reserved one.
/// let room = GraphRoom { requests: 4, rows: 4, pages: 99, reserved_page: 99 };
/// let mut batch = Batch::paged(16, 100)?;
/// batch.push(1, &[7, 3], 20)?;
/// let plan = GraphPlan::new(spec, room, &batch, &stream)?;
/// let zeros = |count| stream.alloc_zeros::<bf16>(count);
/// let buffers = (plan, zeros(4 * 8 * 128)?, zeros(4 * 8 * 128)?, zeros(100 * 16 * 256)?, zeros(100 * 16 * 256)?);
/// let mut graph = LaunchGraph::new(&stream, buffers)?;
/// graph.capture(|s, (plan, q, mut o, mut k, mut v)| {
///     let shape = [100, 16, 2, 128];
///     let cache = PagedKvCache::new(k.write(&shape)?, v.write(&shape)?, KvLayout::Nhd)?;
///     plan.run(&mut o.write(&[4, 8, 128])?, None, &q.read(&[4, 8, 128])?, &cache, &AttentionOptions::default(), s)
/// })?;
/// graph.launch()?;
/// // The next step: the request has a key more, and there is another one.
/// batch.clear();
/// batch.push(1, &[7, 3], 21)?;
/// batch.push(1, &[12], 1)?;
/// graph.buffers()?.0.replan(&batch)?;
/// graph.launch()?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct GraphPlan {
    spec: AttentionSpec,
    room: GraphRoom,
    /// The tokens of a page and the pages of the cache; nothing for keys that lie one after the other.
    cache: Option<(i64, i64)>,
    memory: OnStream,
    /// Memory for a batch that is filled up.
    filled: Batch,
    /// What the planner answered when it was made.
    integers: Vec<i64>,
    /// Where the plan was copied from that is on the GPU.
    slot: usize,
    /// Behind the last plan's copies.
    planned: CudaEvent,
    /// Behind the graph's last launch, where there was one.
    launched: CudaEvent,
    was_launched: bool,
    /// Whether the lists and tables on the GPU may be others than those of `slot`: nothing is launched before they are restored.
    spoiled: bool,
}

impl GraphPlan {
    /// For graphs with such room, planned for a first batch. Its plans are copied on `stream`; whichever stream the graph is
    /// launched on, launches and plans follow one another.
    ///
    /// # Errors
    /// As for [`Workspace::new`](super::Workspace::new) and [`Workspace::plan`](super::Workspace::plan), and for room that cannot be.
    pub fn new(spec: AttentionSpec, room: GraphRoom, batch: &Batch, stream: &Arc<CudaStream>) -> Result<Self> {
        room.check(&spec, batch)?;
        let largest = Largest::new(room.requests, room.rows);
        let memory = OnStream::new(&spec, largest, stream, Some(filled_pages(&spec, room)))?;
        Self::with(spec, room, batch, memory)
    }

    /// In memory that was made for it.
    pub(super) fn with(spec: AttentionSpec, room: GraphRoom, batch: &Batch, memory: OnStream) -> Result<Self> {
        let stream = Arc::clone(memory.owned_stream());
        let _current = CurrentContext::bind(stream.context())?;
        let event = || stream.context().new_event(None).map_err(driver("cuEventCreate"));
        let (planned, launched) = (event()?, event()?);
        let (integers, slot, was_launched, spoiled) = (Vec::new(), 0, false, false);
        let (cache, filled) = (batch.cache(), Batch::ragged());
        let mut plan =
            Self { spec, room, cache, memory, filled, integers, slot, planned, launched, was_launched, spoiled };
        plan.integers = plan.plan(batch)?;
        (plan.slot, plan.spoiled) = (plan.memory.ring().last(), false);
        Ok(plan)
    }

    /// What computes.
    pub fn backend(&self) -> Backend {
        self.memory.backend()
    }

    /// What upstream's planner answered, which is the same for every batch that it takes.
    pub fn integers(&self) -> &[i64] {
        &self.integers
    }

    /// Copies a batch's lists and tables to the GPU; what the planner answered.
    fn plan(&mut self, batch: &Batch) -> Result<Vec<i64>> {
        self.fill(batch)?;
        let stream = Arc::clone(self.memory.owned_stream());
        let context = stream.context();
        let _current = CurrentContext::bind(context)?;
        if self.was_launched {
            wait(&stream, &self.launched).map_err(driver_in(context, "ordering a plan behind a graph's launch"))?;
        }
        // Until the plan is known to be one of the graph's, and what is launched next to come behind it.
        self.spoiled = true;
        let integers =
            self.memory.planned(&self.spec, &self.filled, self.room.rows).map(|array| super::gpu::integers(&array));
        // Also of what failed: copies may be on their way.
        record(&self.planned, &stream).map_err(driver_in(context, "recording a plan's copies"))?;
        integers
    }

    /// Keeps the batch with as many requests as the graph has, and as many pages.
    fn fill(&mut self, batch: &Batch) -> Result<()> {
        let GraphRoom { requests, rows, pages, reserved_page } = self.room;
        check_batch(&self.spec, Largest::new(requests, rows), batch, self.memory.multiprocessors())?;
        if batch.cache() != self.cache {
            let (found, expected) = (format!("{:?}", batch.cache()), format!("{:?}", self.cache));
            let expected = format!("{expected}, the tokens of a page and the pages of the cache that it was made for");
            return refuse("GraphPlan::replan", "batch", found, expected);
        }
        let (name, count) = match self.cache {
            Some(_) => ("pages", batch.page_count() as i64),
            None => ("keys", batch.keys()),
        };
        if count > pages as i64 {
            let found = format!("{count} of all requests together");
            return refuse("GraphPlan::replan", name, found, format!("at most {pages}, for which there is room"));
        }
        let each = rows / requests.max(1);
        if self.spec.kind() == Kind::Mla
            && let Some(request) = (0..batch.requests()).find(|request| batch.lengths(*request).0 != each)
        {
            let found = format!("{} of request {request}", batch.lengths(request).0);
            return refuse(
                "GraphPlan::replan",
                "queries",
                found,
                format!("{each} of each request, as there is room for"),
            );
        }
        self.filled.copy_from(batch);
        let queries = if matches!(self.spec.kind(), Kind::Paged | Kind::Ragged) { 0 } else { each };
        for _ in batch.requests()..requests as usize {
            self.filled.fill_up(queries, reserved_page);
        }
        self.filled.kv_indices.resize(filled_pages(&self.spec, self.room), reserved_page);
        // What is filled up counts too.
        check_batch(&self.spec, Largest::new(requests, rows), &self.filled, self.memory.multiprocessors())
    }

    /// Runs the plan, by what upstream's planner answered; `pdl` is programmatic dependent launch, where it is not the
    /// specification's.
    pub(super) fn launched(
        &self,
        stream: Stream<'_>,
        pdl: Option<bool>,
        run: impl FnOnce(&Planned<'_>) -> Result<()>,
    ) -> Result<()> {
        let info: Object = Array::from_items(self.integers.iter().copied())?.into();
        let (spec, rows) = (&self.spec, self.room.rows);
        let pages = self.cache.map_or(self.room.pages as i64, |(_, pages)| pages);
        let launch = self.memory.launch(&info);
        let launch = match pdl {
            Some(pdl) => launch.with_pdl(pdl),
            None => launch,
        };
        run(&Planned { spec, rows, pages, stream, place: Place::Gpu(launch), known: None })
    }

    /// Plans another batch for the launches to come. What the planner answered where that is not what was captured: then, as after an
    /// error, the plan is the one before.
    pub(super) fn replan(&mut self, batch: &Batch) -> Result<Option<Vec<i64>>> {
        // Its copy may be needed again.
        self.memory.ring().skip(self.slot);
        let (before, was_spoiled) = (self.memory.ring().last(), self.spoiled);
        match self.plan(batch) {
            Ok(found) if found == self.integers => {
                self.slot = self.memory.ring().last();
                self.spoiled = false;
                Ok(None)
            }
            // What fails here is tried again before a launch.
            Ok(found) => self.restore().map(|()| Some(found)),
            // Nothing was copied.
            Err(error) if self.memory.ring().last() == before => {
                self.spoiled = was_spoiled;
                Err(error)
            }
            Err(error) => self.restore().and(Err(error)),
        }
    }

    /// Copies the lists and tables of the plan to the GPU again, where others may be there.
    pub(super) fn restore(&mut self) -> Result<()> {
        if !self.spoiled {
            return Ok(());
        }
        let stream = Arc::clone(self.memory.owned_stream());
        let _current = CurrentContext::bind(stream.context())?;
        self.memory.restore(self.slot)?;
        record(&self.planned, &stream).map_err(driver_in(stream.context(), "recording a plan's copies"))?;
        self.spoiled = false;
        Ok(())
    }
}

/// How many pages the tables have, with those of requests that are filled up; none for keys that lie one after the other.
pub(super) fn filled_pages(spec: &AttentionSpec, room: GraphRoom) -> usize {
    if spec.kind() == Kind::Ragged {
        return 0;
    }
    let each = if spec.kind() == Kind::Mla { room.rows / room.requests.max(1) } else { 1 };
    let more = room.requests.max(0).saturating_mul((each + spec.page_size() - 1) / spec.page_size());
    room.pages + more.min(1 << 30) as usize
}

/// A [`GraphPlan`] in a capture.
#[derive(Debug)]
pub struct CapturedPlan<'a> {
    plan: &'a GraphPlan,
    site: Site,
}

impl CapturedPlan<'_> {
    fn captured(&self, stream: Stream<'_>, run: impl FnOnce(&Planned<'_>) -> Result<()>) -> Result<()> {
        self.site.check(RUN, stream)?;
        self.plan.launched(stream, None, run)
    }

    /// [`Plan::run`](super::Plan::run), captured on the stream of the capture. The tensors have the rows that there is room for. Rows
    /// without a query, and those of requests that are filled up, hold nothing that means anything.
    ///
    /// # Errors
    /// As there.
    pub fn run(
        &self,
        o: &mut TensorMut<'_>,
        lse: Option<&mut TensorMut<'_>>,
        q: &TensorRef<'_>,
        cache: &PagedKvCache<'_>,
        options: &AttentionOptions<'_>,
        stream: Stream<'_>,
    ) -> Result<()> {
        self.captured(stream, |planned| planned.paged(o, lse, q, cache, options))
    }

    /// [`Plan::run_ragged`](super::Plan::run_ragged), captured likewise. Keys and values have the rows that there is room for; what
    /// lies behind the keys of a batch is initialized.
    ///
    /// # Errors
    /// As there.
    pub fn run_ragged(
        &self,
        o: &mut TensorMut<'_>,
        lse: Option<&mut TensorMut<'_>>,
        q: &TensorRef<'_>,
        (k, v): (&TensorRef<'_>, &TensorRef<'_>),
        options: &AttentionOptions<'_>,
        stream: Stream<'_>,
    ) -> Result<()> {
        self.captured(stream, |planned| planned.ragged(o, lse, q, (k, v), options))
    }

    /// [`Plan::run_mla`](super::Plan::run_mla), captured likewise.
    ///
    /// # Errors
    /// As there.
    pub fn run_mla(
        &self,
        o: &mut TensorMut<'_>,
        lse: Option<&mut TensorMut<'_>>,
        queries: &LatentQueries<'_, '_>,
        cache: &PagedMlaCache<'_>,
        stream: Stream<'_>,
    ) -> Result<()> {
        self.captured(stream, |planned| planned.mla(o, lse, queries, cache))
    }
}

/// A [`GraphPlan`] between a graph's launches.
#[derive(Debug)]
pub struct GraphPlanMut<'a> {
    plan: &'a mut GraphPlan,
}

impl GraphPlanMut<'_> {
    /// Plans another batch for the launches to come: copied asynchronously, behind the launches that were made and ahead of those to
    /// come. The host waits only where copies of the third plan before it, or of earlier ones, have not been made yet. After an
    /// error the graph has the plan that it had; where that could not be copied again, nothing is launched before it is.
    ///
    /// # Errors
    /// As for [`Workspace::plan`](super::Workspace::plan); [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for a batch that
    /// there is no room for, or that upstream's planner answers otherwise than the one that was captured, so that the captured launches
    /// would not do for it.
    pub fn replan(&mut self, batch: &Batch) -> Result<()> {
        match self.plan.replan(batch)? {
            None => Ok(()),
            Some(found) => refuse(
                "GraphPlan::replan",
                "batch",
                format!("one that is planned as {found:?}"),
                format!("one that is planned as {:?}, as was captured", self.plan.integers),
            ),
        }
    }

    /// What upstream's planner answered.
    pub fn integers(&self) -> &[i64] {
        self.plan.integers()
    }
}

impl Leaf for GraphPlan {
    type Captured<'a> = CapturedPlan<'a>;
    type Views<'a> = GraphPlanMut<'a>;

    fn check(&self, context: &Arc<CudaContext>) -> Result<()> {
        let Some(Buffers { float, int, tables }) = self.memory.buffers() else { return Ok(()) };
        float.check(context)?;
        int.check(context)?;
        tables.check(context)
    }

    fn captured<'a>(&'a mut self, site: Site) -> CapturedPlan<'a> {
        CapturedPlan { plan: self, site }
    }

    fn views(&mut self) -> GraphPlanMut<'_> {
        GraphPlanMut { plan: self }
    }

    fn take_over(&mut self, stream: &CudaStream) {
        if let Some(Buffers { float, int, tables }) = self.memory.buffers_mut() {
            float.take_over(stream);
            int.take_over(stream);
            tables.take_over(stream);
        }
        // An error is kept, and found before the launch.
        if self.restore().is_err() {
            stream.context().record_err::<()>(Err(DriverError(CUresult::CUDA_ERROR_ILLEGAL_STATE)));
        }
        stream.context().record_err(wait(stream, &self.planned));
    }

    fn hand_back(&mut self, launched: &Launched<'_>) -> Result<()> {
        let stream = launched.stream();
        record(&self.launched, stream).map_err(driver_in(stream.context(), "recording a graph's launch"))?;
        self.was_launched = true;
        let Some(Buffers { float, int, tables }) = self.memory.buffers_mut() else { return Ok(()) };
        float.hand_back(launched)?;
        int.hand_back(launched)?;
        tables.hand_back(launched)
    }
}

crate::graph::graph_leaf!(GraphPlan);
