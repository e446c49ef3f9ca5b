//! What runs plans: the host here, and GPUs.

use super::graph::Graph;
use super::plan::Plan;
use crate::error::Result;

/// What runs the nodes of a plan. One plan serves each of them: the [host](super::HostRun), which computes a node when
/// it is asked to, and on a GPU those that launch it, or capture it into a CUDA graph.
pub trait Backend {
    /// The graph.
    fn graph(&self) -> &Graph;

    /// The plan.
    fn plan(&self) -> &Plan;

    /// Begins a step: looks at whether all was given that the graph wants.
    ///
    /// # Errors
    /// [`Missing`](super::GraphError::Missing).
    fn begin(&mut self) -> Result<()>;

    /// Runs or queues the node at this place of the plan's [order](Plan::order), behind those ahead of it there.
    ///
    /// # Errors
    /// What the node came to.
    fn node(&mut self, at: usize) -> Result<()>;

    /// A step: every node in the plan's order.
    ///
    /// # Errors
    /// Those of [`begin`](Self::begin) and [`node`](Self::node); no node behind one that failed is run.
    fn step(&mut self) -> Result<()> {
        self.begin()?;
        (0..self.plan().order().len()).try_for_each(|at| self.node(at))
    }
}
