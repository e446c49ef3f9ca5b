//! One capture: the stream that it happens on, what was captured, and what can be launched.

use std::collections::{HashMap, HashSet};
use std::ptr;
use std::sync::Arc;

use cudarc::driver::result::{graph as driver_graph, stream as driver_stream};
use cudarc::driver::sys::{
    self, CUgraph, CUgraphExec, CUgraphInstantiate_flags, CUgraphNode, CUgraphNodeType, CUstream, CUstreamCaptureMode,
};
use cudarc::driver::{CudaContext, DriverError};

use crate::draws;
use crate::error::{Result, driver};
use crate::owner::CurrentContext;
use crate::runtime::FlashInferRuntime;

/// A stream that nobody else can queue anything on.
pub(crate) struct PrivateStream {
    stream: CUstream,
    context: Arc<CudaContext>,
}

impl PrivateStream {
    /// Without cudarc's knowledge: a stream that it knows would switch its event tracking on.
    pub(crate) fn new(context: &Arc<CudaContext>) -> Result<Self> {
        let stream = driver_stream::create(driver_stream::StreamKind::NonBlocking).map_err(driver("cuStreamCreate"))?;
        Ok(Self { stream, context: Arc::clone(context) })
    }

    pub(crate) fn stream(&self) -> CUstream {
        self.stream
    }

    pub(crate) fn begin(&self) -> Result<Capturing<'_>> {
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is live.
        unsafe { driver_stream::begin_capture(self.stream, mode) }.map_err(driver("cuStreamBeginCapture"))?;
        Ok(Capturing(Some(self)))
    }
}

impl Drop for PrivateStream {
    fn drop(&mut self) {
        let _current = CurrentContext::bind(&self.context);
        // SAFETY: made by `new`, and given up here, once.
        self.context.record_err(unsafe { driver_stream::destroy(self.stream) });
    }
}

/// A capture, ended also when the calls panic.
pub(crate) struct Capturing<'a>(Option<&'a PrivateStream>);

impl Capturing<'_> {
    pub(crate) fn end(mut self) -> Result<Graph, DriverError> {
        self.finish()
    }

    fn finish(&mut self) -> Result<Graph, DriverError> {
        let Some(private) = self.0.take() else { return Ok(Graph { handle: ptr::null_mut() }) };
        let _current = CurrentContext::bind(&private.context);
        // SAFETY: the stream is live.
        unsafe { driver_stream::end_capture(private.stream) }.map(|handle| Graph { handle })
    }
}

impl Drop for Capturing<'_> {
    fn drop(&mut self) {
        // What was captured is dropped; that it could not be is why the calls failed.
        self.finish().ok();
    }
}

/// What was captured.
pub(crate) struct Graph {
    handle: CUgraph,
}

/// One of a captured graph's nodes, of which each waits for the one ahead of it alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Chained {
    /// CUDA's handle, by which it is known while the graph is captured too.
    pub(crate) handle: usize,
    /// Whether it is a kernel, and no copy or fill.
    pub(crate) kernel: bool,
    /// Whether it may start before the one ahead of it has ended.
    pub(crate) early: bool,
}

impl Graph {
    pub(super) fn handle(&self) -> CUgraph {
        self.handle
    }

    /// The nodes in their order; nothing where they are no chain.
    #[cfg_attr(not(feature = "compute"), allow(dead_code, reason = "compute graphs compare it with their plans"))]
    pub(crate) fn chain(&self, runtime: &FlashInferRuntime) -> Result<Option<Vec<Chained>>> {
        let edges = runtime.cudart()?.graph_edges(self.handle.cast())?;
        let count = self.nodes()?;
        let mut nodes: Vec<CUgraphNode> = vec![ptr::null_mut(); count];
        let mut written = count;
        // SAFETY: the graph is live, and there is a place for each node.
        let code = unsafe { sys::cuGraphGetNodes(self.handle, nodes.as_mut_ptr(), &mut written) };
        code.result().map_err(driver("cuGraphGetNodes"))?;
        let mut next: HashMap<usize, (usize, bool)> = HashMap::with_capacity(count);
        let mut first: HashSet<usize> = nodes.iter().map(|node| node.addr()).collect();
        for edge in &edges {
            let twice = next.insert(edge.from, (edge.to, edge.programmatic)).is_some();
            if twice || !first.remove(&edge.to) {
                return Ok(None);
            }
        }
        let mut chain = Vec::with_capacity(count);
        let mut at = match (first.len(), first.into_iter().next()) {
            (1, Some(first)) => Some((first, false)),
            (0, None) if count == 0 => None,
            _ => return Ok(None),
        };
        while let Some((handle, early)) = at {
            let Some(node) = nodes.iter().find(|node| node.addr() == handle).filter(|_| chain.len() < count) else {
                return Ok(None);
            };
            let mut kind = CUgraphNodeType::CU_GRAPH_NODE_TYPE_EMPTY;
            // SAFETY: a node of a live graph; one number is written.
            let code = unsafe { sys::cuGraphNodeGetType(*node, &mut kind) };
            code.result().map_err(driver("cuGraphNodeGetType"))?;
            chain.push(Chained { handle, kernel: kind == CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL, early });
            at = next.get(&handle).copied();
        }
        Ok((chain.len() == count).then_some(chain))
    }

    pub(super) fn nodes(&self) -> Result<usize> {
        let mut count = 0;
        // SAFETY: the graph is live; without a place for the nodes only their number is answered.
        let code = unsafe { sys::cuGraphGetNodes(self.handle, ptr::null_mut(), &mut count) };
        code.result().map_err(driver("cuGraphGetNodes"))?;
        Ok(count)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if !self.handle.is_null() {
            // SAFETY: made by the capture, and given up here, once.
            unsafe { driver_graph::destroy(self.handle) }.ok();
        }
    }
}

/// What can be launched.
pub(crate) struct Executable {
    pub(crate) handle: CUgraphExec,
    pub(super) nodes: usize,
    context: Arc<CudaContext>,
    /// The kernels whose random numbers each launch sets.
    pub(super) draws: Vec<draws::Draw>,
    /// What it was made of, whose nodes name these kernels.
    _graph: Option<Graph>,
}

// SAFETY: CUDA's handles of graphs may be used by any thread, by one at a time: every use is through `&mut` or ownership.
unsafe impl Send for Executable {}

impl Executable {
    /// Gives it what was captured in its place; whether CUDA could.
    pub(super) fn update(&mut self, graph: &Graph, runtime: &FlashInferRuntime) -> Result<bool> {
        let nodes = graph.nodes()?;
        if !self.draws.is_empty() || !runtime.cudart()?.update_graph(self.handle.cast(), graph.handle.cast())? {
            return Ok(false);
        }
        self.nodes = nodes;
        Ok(true)
    }

    pub(crate) fn new(graph: Graph, draws: Vec<draws::Draw>, context: &Arc<CudaContext>) -> Result<Self> {
        let nodes = graph.nodes()?;
        // SAFETY: the graph is live.
        let handle = unsafe { driver_graph::instantiate(graph.handle, CUgraphInstantiate_flags(0)) }
            .map_err(driver("cuGraphInstantiate"))?;
        let graph = if draws.is_empty() { None } else { Some(graph) };
        Ok(Self { handle, nodes, context: Arc::clone(context), draws, _graph: graph })
    }
}

impl Drop for Executable {
    fn drop(&mut self) {
        let _current = CurrentContext::bind(&self.context);
        // SAFETY: made by `new`, and given up here, once; CUDA keeps it until what was launched has run.
        self.context.record_err(unsafe { driver_graph::exec_destroy(self.handle) });
    }
}
