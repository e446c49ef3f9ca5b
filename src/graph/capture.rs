//! One capture: the stream that it happens on, what was captured, and what can be launched.

use std::collections::HashMap;
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
use crate::stream::Stream;

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

/// One of a captured graph's nodes, of which each waits for the one ahead of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Chained {
    /// Whether it is a kernel, and no copy or fill.
    pub(crate) kernel: bool,
    /// Whether it may start before the one ahead of it has ended.
    pub(crate) early: bool,
    /// Whether it allocates memory, which each launch would have anew.
    pub(crate) allocates: bool,
}

/// How many nodes a stream has captured so far.
#[cfg_attr(not(feature = "compute"), allow(dead_code, reason = "compute graphs compare it with their plans"))]
pub(crate) fn captured_so_far(runtime: &FlashInferRuntime, stream: Stream<'_>) -> Result<usize> {
    match runtime.cudart()?.graph_that_is_captured(stream.as_raw())? {
        Some(graph) => count_nodes(graph.cast()),
        None => Ok(0),
    }
}

fn count_nodes(graph: CUgraph) -> Result<usize> {
    let mut count = 0;
    // SAFETY: the graph is live, or being captured, when it may be asked too; without a place for the nodes only their number is
    // answered.
    let code = unsafe { sys::cuGraphGetNodes(graph, ptr::null_mut(), &mut count) };
    code.result().map_err(driver("cuGraphGetNodes"))?;
    Ok(count)
}

impl Graph {
    pub(super) fn handle(&self) -> CUgraph {
        self.handle
    }

    /// The nodes in their order; nothing where one does not wait for the one ahead of it. That one waits for others too is nothing
    /// to the order.
    #[cfg_attr(not(feature = "compute"), allow(dead_code, reason = "compute graphs compare it with their plans"))]
    pub(crate) fn chain(&self, runtime: &FlashInferRuntime) -> Result<Option<Vec<Chained>>> {
        let edges = runtime.cudart()?.graph_edges(self.handle.cast())?;
        let mut count = self.nodes()?;
        let mut nodes: Vec<CUgraphNode> = vec![ptr::null_mut(); count];
        // SAFETY: the graph is live, and there is a place for each node.
        let code = unsafe { sys::cuGraphGetNodes(self.handle, nodes.as_mut_ptr(), &mut count) };
        code.result().map_err(driver("cuGraphGetNodes"))?;
        let places: HashMap<usize, usize> = nodes.iter().enumerate().map(|(i, node)| (node.addr(), i)).collect();
        let (mut follow, mut ahead) = (vec![Vec::new(); nodes.len()], vec![0; nodes.len()]);
        for edge in &edges {
            let (Some(&from), Some(&to)) = (places.get(&edge.from), places.get(&edge.to)) else { return Ok(None) };
            follow[from].push((to, edge.programmatic));
            ahead[to] += 1;
        }
        // One node at a time has nothing ahead of it but those that came before: the one behind waits for it, and for nothing else.
        let mut open: Vec<(usize, bool)> = (0..nodes.len()).filter(|&i| ahead[i] == 0).map(|i| (i, false)).collect();
        let mut chain = Vec::with_capacity(nodes.len());
        while let Some((i, early)) = open.pop() {
            if !open.is_empty() {
                return Ok(None);
            }
            let mut kind = CUgraphNodeType::CU_GRAPH_NODE_TYPE_EMPTY;
            // SAFETY: a node of a live graph; one number is written.
            let code = unsafe { sys::cuGraphNodeGetType(nodes[i], &mut kind) };
            code.result().map_err(driver("cuGraphNodeGetType"))?;
            let is = |wanted| kind == wanted;
            let kernel = is(CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL);
            let allocates = is(CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEM_ALLOC);
            chain.push(Chained { kernel, early, allocates });
            for &(to, programmatic) in &follow[i] {
                ahead[to] -= 1;
                if ahead[to] == 0 {
                    open.push((to, programmatic));
                }
            }
        }
        Ok((chain.len() == nodes.len()).then_some(chain))
    }

    pub(super) fn nodes(&self) -> Result<usize> {
        count_nodes(self.handle)
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
