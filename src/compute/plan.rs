//! Plans: in which order nodes run, what each waits for, and where in one arena each value lies.

use super::builder::keeps_row;
use super::error::GraphError;
use super::graph::{Graph, Origin};
use super::operation::{Given, PdlAfter, PdlBefore};
use super::step::Buckets;
use crate::error::Result;

/// What every place in an arena is a multiple of, in bytes.
const ALIGNMENT: u64 = 256;

/// How nodes are ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Schedule {
    /// One after the other, as on one stream.
    #[default]
    Stream,
    /// Each behind what it needs alone, so that branches run beside each other. Takes more memory.
    Branches,
}

/// How one node waits for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Link {
    /// It starts when the other has ended.
    Full,
    /// It may start before that, and waits by itself (programmatic dependent launch).
    Programmatic,
}

/// That one node waits for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Edge {
    /// The node that is waited for.
    pub from: usize,
    /// The node that waits.
    pub to: usize,
    /// How.
    pub link: Link,
}

/// A range of the arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Span {
    /// The first byte.
    pub offset: u64,
    /// How many bytes there are.
    pub bytes: u64,
}

impl Span {
    /// The byte behind the last.
    pub const fn end(self) -> u64 {
        self.offset.saturating_add(self.bytes)
    }
}

/// The memory that a plan takes, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Sizes {
    /// Values and workspaces, if each had memory of its own.
    pub naive: u64,
    /// The arena.
    pub planned: u64,
    /// What no arena can be smaller than: the most that is needed at one time.
    pub lower_bound: u64,
    /// The workspaces among them, if each had memory of its own.
    pub workspaces: u64,
    /// The weights.
    pub weights: u64,
    /// The states, caches for example.
    pub states: u64,
    /// The block of a step's inputs.
    pub inputs: u64,
}

impl Sizes {
    /// All that must be allocated: the arena, weights, states and inputs.
    pub fn total(&self) -> u64 {
        [self.planned, self.weights, self.states, self.inputs].into_iter().fold(0, u64::saturating_add)
    }
}

/// A graph's order and memory for one batch.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    pub(super) graph: String,
    pub(super) batch: u64,
    pub(super) schedule: Schedule,
    pub(super) order: Vec<usize>,
    pub(super) edges: Vec<Edge>,
    pub(super) spans: Vec<Option<Span>>,
    pub(super) workspaces: Vec<Option<Span>>,
    pub(super) sizes: Sizes,
}

/// Something that needs memory for a time: a value or a workspace.
struct Item {
    bytes: u64,
    /// The nodes that use it; the first of them writes it.
    uses: Vec<usize>,
    /// Whether it is needed until the end.
    kept: bool,
}

impl Plan {
    /// Plans a graph for a batch of so many rows, on one stream.
    ///
    /// # Errors
    /// [`BucketTooSmall`](GraphError::BucketTooSmall) for a batch that is larger than the graph was built for, or 0;
    /// [`Contract`](GraphError::Contract) where a kernel does not take this batch.
    pub fn new(graph: &Graph, batch: u64) -> Result<Self> {
        Self::with_schedule(graph, batch, Schedule::Stream)
    }

    /// Plans a graph with another schedule.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn with_schedule(graph: &Graph, batch: u64, schedule: Schedule) -> Result<Self> {
        if batch == 0 || batch > graph.largest {
            return Err(GraphError::BucketTooSmall { rows: batch, largest: graph.largest }.into());
        }
        // What was checked when the graph was built needs no second look.
        if batch != 1 && batch != graph.largest {
            for (i, node) in graph.nodes.iter().enumerate() {
                if node.operation.facts().call.is_some() {
                    keeps_row(graph, node, &graph.node_name(i), batch)?;
                }
            }
        }
        let dependencies = graph.dependencies();
        let edges = edges(graph, &dependencies, schedule);
        let (items, places) = items(graph, batch);
        let conflicts = match schedule {
            Schedule::Stream => in_turn(&items),
            Schedule::Branches => by_happens_before(&items, &dependencies),
        };
        let (offsets, planned) = place(&items, &conflicts);
        let span = |i: usize| Some(Span { offset: offsets[i], bytes: items[i].bytes });
        let spans = places.values.iter().map(|place| place.and_then(span)).collect();
        let workspaces = places.workspaces.iter().map(|place| place.and_then(span)).collect();
        let of = |wanted: fn(&Origin) -> bool| {
            let bytes = graph.tensors.iter().filter(|tensor| wanted(&tensor.origin));
            bytes.map(|tensor| aligned(tensor.spec.bytes(batch))).fold(0, u64::saturating_add)
        };
        let sizes = Sizes {
            naive: items.iter().map(|item| item.bytes).fold(0, u64::saturating_add),
            planned,
            lower_bound: lower_bound(&items, graph.nodes.len()),
            workspaces: places.workspaces.iter().flatten().map(|&i| items[i].bytes).fold(0, u64::saturating_add),
            weights: of(|origin| *origin == Origin::Weight),
            states: of(|origin| *origin == Origin::State),
            inputs: of(|origin| matches!(origin, Origin::Input(_))),
        };
        let order = (0..graph.nodes.len()).collect();
        Ok(Self { graph: graph.name.clone(), batch, schedule, order, edges, spans, workspaces, sizes })
    }

    /// As [`new`](Self::new), with memory of its own for each value: what a planned run is compared with.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn naive(graph: &Graph, batch: u64) -> Result<Self> {
        let mut plan = Self::new(graph, batch)?;
        let mut next = 0;
        for span in plan.spans.iter_mut().chain(&mut plan.workspaces).flatten() {
            span.offset = next;
            next = span.end();
        }
        plan.sizes.planned = next;
        Ok(plan)
    }

    /// A plan for each bucket, the smallest first, and the bytes of one arena that serves them all, one at a time:
    /// those of the largest.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn for_buckets(graph: &Graph, buckets: &Buckets) -> Result<(Vec<Self>, u64)> {
        let plans = buckets.sizes().iter().map(|&bucket| Self::new(graph, bucket)).collect::<Result<Vec<_>>>()?;
        let arena = plans.iter().map(|plan| plan.sizes.planned).max().unwrap_or(0);
        Ok((plans, arena))
    }

    /// The rows that it is for.
    pub fn batch(&self) -> u64 {
        self.batch
    }

    /// How the nodes are ordered.
    pub fn schedule(&self) -> Schedule {
        self.schedule
    }

    /// The nodes in the order in which they are launched.
    pub fn order(&self) -> &[usize] {
        &self.order
    }

    /// What waits for what.
    pub fn edges(&self) -> &[Edge] {
        &self.edges
    }

    /// Where a tensor lies in the arena; nowhere for one that is no value.
    pub fn span(&self, tensor: usize) -> Option<Span> {
        self.spans.get(tensor).copied().flatten()
    }

    /// Where a node's workspace lies in the arena, where it has one.
    pub fn workspace(&self, node: usize) -> Option<Span> {
        self.workspaces.get(node).copied().flatten()
    }

    /// The memory that it takes.
    pub fn sizes(&self) -> Sizes {
        self.sizes
    }

    /// How many kernels a step launches.
    pub fn kernels(&self, graph: &Graph) -> u32 {
        graph.nodes.iter().map(|node| node.operation.facts().kernels).sum()
    }

    /// That all of it fits into so many bytes.
    ///
    /// # Errors
    /// [`ArenaTooLarge`](GraphError::ArenaTooLarge).
    pub fn fits(&self, free: u64) -> Result<()> {
        let planned = self.sizes.total();
        if planned <= free { Ok(()) } else { Err(GraphError::ArenaTooLarge { planned, free }.into()) }
    }
}

/// So many bytes, rounded up to where something else may begin.
pub(super) fn aligned(bytes: u64) -> u64 {
    bytes.checked_next_multiple_of(ALIGNMENT).unwrap_or(u64::MAX)
}

/// Which item each value and each node's workspace is.
struct Places {
    values: Vec<Option<usize>>,
    workspaces: Vec<Option<usize>>,
}

fn items(graph: &Graph, batch: u64) -> (Vec<Item>, Places) {
    let mut items = Vec::new();
    let mut values = vec![None; graph.tensors.len()];
    let mut workspaces = vec![None; graph.nodes.len()];
    for (i, node) in graph.nodes.iter().enumerate() {
        for access in &node.accesses {
            let tensor = &graph.tensors[access.tensor];
            if tensor.origin != Origin::Value {
                continue;
            }
            let item = *values[access.tensor].get_or_insert_with(|| {
                let kept = graph.outputs.contains(&access.tensor);
                items.push(Item { bytes: aligned(tensor.spec.bytes(batch)), uses: Vec::new(), kept });
                items.len() - 1
            });
            if items[item].uses.last() != Some(&i) {
                items[item].uses.push(i);
            }
        }
        // Most operations have none, and need not be looked at.
        let specs = graph.given(node);
        let bytes = Given { operation: &node.operation, specs: &specs, batch }.workspace();
        if bytes > 0 {
            workspaces[i] = Some(items.len());
            items.push(Item { bytes: aligned(bytes), uses: vec![i], kept: false });
        }
    }
    (items, Places { values, workspaces })
}

/// What waits for what.
fn edges(graph: &Graph, dependencies: &[Vec<usize>], schedule: Schedule) -> Vec<Edge> {
    match schedule {
        Schedule::Stream => (1..graph.nodes.len())
            .map(|to| {
                let facts = |node: usize| graph.nodes[node].operation.facts();
                let early = facts(to).before == PdlBefore::Waits && facts(to - 1).after != PdlAfter::AtEnd;
                Edge { from: to - 1, to, link: if early { Link::Programmatic } else { Link::Full } }
            })
            .collect(),
        Schedule::Branches => {
            let ancestors = ancestors(dependencies);
            let mut edges = Vec::new();
            for (to, needs) in dependencies.iter().enumerate() {
                // What another dependency waits for is waited for already.
                let direct =
                    |from: &&usize| !needs.iter().any(|other| other != *from && has(&ancestors[*other], **from));
                edges.extend(needs.iter().filter(direct).map(|&from| Edge { from, to, link: Link::Full }));
            }
            edges
        }
    }
}

type Bits = Vec<u64>;

fn has(bits: &Bits, i: usize) -> bool {
    bits[i / 64] >> (i % 64) & 1 != 0
}

/// The nodes that have ended when a node starts.
fn ancestors(dependencies: &[Vec<usize>]) -> Vec<Bits> {
    let words = dependencies.len().div_ceil(64);
    let mut all: Vec<Bits> = Vec::with_capacity(dependencies.len());
    for needs in dependencies {
        let mut bits = vec![0; words];
        for &from in needs {
            bits[from / 64] |= 1 << (from % 64);
            bits.iter_mut().zip(&all[from]).for_each(|(own, other)| *own |= other);
        }
        all.push(bits);
    }
    all
}

/// Which items are needed at the same time, where nodes run one after the other.
fn in_turn(items: &[Item]) -> Vec<Vec<usize>> {
    let mut conflicts = vec![Vec::new(); items.len()];
    // In the order of their first uses, which is how they were made.
    let mut live: Vec<usize> = Vec::new();
    let mut order: Vec<usize> = (0..items.len()).collect();
    order.sort_by_key(|&i| items[i].uses[0]);
    for i in order {
        let start = items[i].uses[0];
        live.retain(|&other| items[other].kept || items[other].uses.last().is_some_and(|&last| last >= start));
        for &other in &live {
            conflicts[i].push(other);
            conflicts[other].push(i);
        }
        live.push(i);
    }
    conflicts
}

/// Which items may be needed at the same time, where nodes wait for what they need alone.
fn by_happens_before(items: &[Item], dependencies: &[Vec<usize>]) -> Vec<Vec<usize>> {
    let ancestors = ancestors(dependencies);
    let ends_before = |a: &Item, b: &Item| !a.kept && a.uses.iter().all(|&used| has(&ancestors[b.uses[0]], used));
    let mut conflicts = vec![Vec::new(); items.len()];
    for (i, a) in items.iter().enumerate() {
        for (j, b) in items.iter().enumerate().skip(i + 1) {
            if !ends_before(a, b) && !ends_before(b, a) {
                conflicts[i].push(j);
                conflicts[j].push(i);
            }
        }
    }
    conflicts
}

/// Places items, each at the lowest place where none that is needed at the same time lies: in several orders, of which
/// the one that takes least is kept.
fn place(items: &[Item], conflicts: &[Vec<usize>]) -> (Vec<u64>, u64) {
    let life = |i: usize| items[i].uses.last().map_or(0, |last| last - items[i].uses[0]) as u64;
    let keys: [&dyn Fn(usize) -> (u64, u64); 3] = [
        &|i| (u64::MAX - items[i].bytes, items[i].uses[0] as u64),
        &|i| (u64::MAX - items[i].bytes.saturating_mul(life(i) + 1), items[i].uses[0] as u64),
        &|i| (items[i].uses[0] as u64, u64::MAX - items[i].bytes),
    ];
    let mut best = (Vec::new(), u64::MAX);
    for key in keys {
        let mut order: Vec<usize> = (0..items.len()).collect();
        order.sort_by_key(|&i| key(i));
        let placed = place_in(&order, items, conflicts);
        if placed.1 < best.1 || best.0.is_empty() {
            best = placed;
        }
    }
    if items.is_empty() { (Vec::new(), 0) } else { best }
}

fn place_in(order: &[usize], items: &[Item], conflicts: &[Vec<usize>]) -> (Vec<u64>, u64) {
    let mut offsets: Vec<Option<u64>> = vec![None; items.len()];
    let (mut end, mut taken) = (0u64, Vec::new());
    for &i in order {
        taken.clear();
        taken
            .extend(conflicts[i].iter().filter_map(|&other| offsets[other].map(|offset| (offset, items[other].bytes))));
        taken.sort_unstable();
        let mut offset = 0u64;
        for &(other, bytes) in &taken {
            if offset.saturating_add(items[i].bytes) <= other {
                break;
            }
            offset = offset.max(other.saturating_add(bytes));
        }
        offsets[i] = Some(offset);
        end = end.max(offset.saturating_add(items[i].bytes));
    }
    (offsets.into_iter().map(Option::unwrap_or_default).collect(), end)
}

/// The most that is needed at one node of the order.
fn lower_bound(items: &[Item], nodes: usize) -> u64 {
    let mut change = vec![(0u128, 0u128); nodes + 1];
    for item in items {
        change[item.uses[0]].0 += u128::from(item.bytes);
        let last = if item.kept { nodes } else { item.uses.last().map_or(nodes, |last| last + 1) };
        change[last].1 += u128::from(item.bytes);
    }
    let (mut live, mut most) = (0, 0);
    for (begins, ends) in change {
        live = live - ends + begins;
        most = most.max(live);
    }
    u64::try_from(most).unwrap_or(u64::MAX)
}
