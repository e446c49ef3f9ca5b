//! Several captures over one set of buffers: the machinery of [`LaunchGraph`](super::LaunchGraph), which has one.

use std::fmt;
use std::mem;
use std::sync::Arc;

use cudarc::driver::result::{graph as driver_graph, stream as driver_stream};
use cudarc::driver::{CudaEvent, CudaStream};

use super::capture::{Executable, Graph, PrivateStream};
use super::{Captured, Drawings, GraphBuffers, Launched, Leaf, Site};
use crate::buffers::{check_context, device, refuse_per_thread};
use crate::draws;
use crate::error::{FlashInferError, Result, driver, driver_in};
use crate::owner::{CurrentContext, no_error_is_kept, record, refuse_capture};
use crate::runtime::FlashInferRuntime;
use crate::stream::{Capture, Stream};

/// Several series of calls, each a CUDA graph of its own, on one stream and over one set of buffers: a graph for each size of
/// batch, for example, all over the same weights, caches and scratch memory.
///
/// It is a [`LaunchGraph`](crate::LaunchGraph) whose captures have keys: numbers of the caller's choice. What is launched runs in
/// the order of the launches, so that captures may share any of the buffers, scratch memory too.
///
/// ```no_run
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use flashinfer_rs::cudarc::driver::CudaContext;
/// # use flashinfer_rs::kernels::norm::{NormOptions, rmsnorm};
/// # use flashinfer_rs::{FlashInferRuntime, GraphSet, RuntimeConfig};
/// # use half::bf16;
/// # FlashInferRuntime::initialize(RuntimeConfig::default())?;
/// let stream = CudaContext::new(0)?.new_stream()?;
/// let largest = 32;
/// let (out, input) = (stream.alloc_zeros::<bf16>(largest * 4096)?, stream.alloc_zeros::<bf16>(largest * 4096)?);
/// let weight = stream.clone_htod(&vec![bf16::ONE; 4096])?;
///
/// let mut graphs = GraphSet::new(&stream, (out, input, weight))?;
/// for rows in [32, 8, 1] {
///     graphs.capture(rows, |s, (mut out, input, weight)| {
///         let shape = [rows as i64, 4096];
///         let (input, weight) = (input.read(&shape)?, weight.read(&[4096])?);
///         rmsnorm(&mut out.write(&shape)?, &input, &weight, &NormOptions::default(), s)
///     })?;
/// }
/// graphs.launch(8)?;
/// graphs.launch(1)?;
/// # Ok(())
/// # }
/// ```
pub struct GraphSet<B: GraphBuffers> {
    stream: Arc<CudaStream>,
    pdl: bool,
    /// Gone before the buffers, of which they have the addresses.
    executables: Vec<(u64, Executable)>,
    /// Nothing only while the graphs are taken apart.
    buffers: Option<B::Owned>,
    /// Whether the program may have used the buffers since the last launch.
    lent: bool,
    /// Whether there was a launch.
    launched: bool,
    /// Whether there was one since the buffers were handed back.
    unreported: bool,
}

impl<B: GraphBuffers> fmt::Debug for GraphSet<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let keys: Vec<u64> = self.keys().collect();
        f.debug_struct("GraphSet").field("keys", &keys).field("pdl", &self.pdl).finish_non_exhaustive()
    }
}

impl<B: GraphBuffers> GraphSet<B> {
    /// Buffers without calls yet, to be used by launches on `stream`, which may be the null stream too.
    ///
    /// # Errors
    /// [`NotInitialized`](FlashInferError::NotInitialized); [`DeviceOutOfRange`](FlashInferError::DeviceOutOfRange); or
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) for a buffer of another context than the stream's, a context that
    /// is not the GPU's primary one, a buffer that was made on a stream that captures, or the per-thread stream, which is
    /// another in each thread.
    pub fn new(stream: &Arc<CudaStream>, buffers: B) -> Result<Self> {
        refuse_per_thread("graph", stream)?;
        check_context("graph", "stream", stream.context(), stream.context())?;
        FlashInferRuntime::global()?.checked_device(device(stream.context()))?;
        let buffers = buffers.into_owned();
        buffers.check(stream.context())?;
        let (stream, buffers) = (Arc::clone(stream), Some(buffers));
        Ok(Self { stream, pdl: true, executables: Vec::new(), buffers, lent: true, launched: false, unreported: false })
    }

    /// With programmatic dependent launch on or off for every captured kernel whose row says that it waits before it reads; it
    /// is on by default. A call with the option on has it in any case. Such a kernel may start before the one ahead of it has
    /// ended and waits for that one's results by itself, so the results are the same.
    #[must_use]
    pub fn with_pdl(mut self, pdl: bool) -> Self {
        self.pdl = pdl;
        self
    }

    pub(super) fn pdl(&self) -> bool {
        self.pdl
    }

    /// Captures the calls that `calls` makes on the stream it is given, under this key. They are queued when that capture is
    /// [launched](Self::launch), not before; so nothing in `calls` can wait for them.
    ///
    /// Captured again under the same key, that capture is changed: in place where CUDA can, which is where the calls are the same
    /// and only their numbers and sizes are not. After an error all is as before, whatever the key.
    ///
    /// # Errors
    /// What `calls` answers: [`InvalidArgument`](FlashInferError::InvalidArgument) among it for tensors that are not over
    /// these buffers, whose memory could not be kept. And [`Graph`](FlashInferError::Graph) where CUDA cannot capture
    /// what was done: waiting for the GPU or allocating its memory, for example. The program's own streams are as before; a
    /// buffer whose own stream captures is refused.
    pub fn capture(
        &mut self,
        key: u64,
        calls: impl for<'s, 'c> FnOnce(Stream<'s>, B::Captured<'c>) -> Result<()>,
    ) -> Result<Captured> {
        self.capture_looked_at(key, calls, |_| Ok(()))
    }

    /// As [`capture`](Self::capture), with a look at what was captured before anything is changed by it.
    pub(crate) fn capture_looked_at(
        &mut self,
        key: u64,
        calls: impl for<'s, 'c> FnOnce(Stream<'s>, B::Captured<'c>) -> Result<()>,
        look: impl FnOnce(&Graph) -> Result<()>,
    ) -> Result<Captured> {
        let runtime = FlashInferRuntime::global()?;
        let context = self.stream.context();
        let device = device(context);
        let _current = CurrentContext::bind(context)?;
        let private = PrivateStream::new(context)?;
        let site = Site { device, stream: private.stream() };
        let Some(buffers) = &mut self.buffers else { unreachable!("only what is taken apart has none") };
        buffers.check(context)?;
        let mut drawing = Drawings::default();
        buffers.each_source(&mut |philox| drawing.0.push(philox.begin_capture()));
        let buffers = B::captured(buffers.captured(site));
        // SAFETY: the stream lives until the end of this function, and of this device.
        let stream = unsafe { Stream::from_raw(private.stream().cast()) }.capturing(Capture { pdl: self.pdl });
        let capturing = private.begin()?;
        let result = runtime.on((device, stream), |stream| calls(stream, buffers));
        let graph = capturing.end();
        let drawn = drawing.end();
        if let Err(error) = result.and_then(|result| result) {
            // Of a call that was refused because of the capture.
            runtime.cudart()?.forget_stale_error();
            return Err(error);
        }
        let graph = graph.map_err(|error| {
            // The last error is CUDA's way to say the same to whoever asks next.
            runtime.cudart().map(|cudart| cudart.forget_stale_error()).ok();
            FlashInferError::Graph {
                problem: format!("what was done in the capture cannot be part of it: {error}"),
                remedy: "wait, allocate, and use the null stream before or after the capture",
            }
        })?;
        look(&graph)?;
        let draws = draws::find(graph.handle(), drawn)?;
        let before = self.executables.iter().position(|(known, _)| *known == key);
        if let Some(at) = before
            && draws.is_empty()
            && self.executables[at].1.update(&graph, runtime)?
        {
            return Ok(Captured::Updated);
        }
        let executable = Executable::new(graph, draws, context)?;
        match before {
            Some(at) => self.executables[at].1 = executable,
            None => self.executables.push((key, executable)),
        }
        Ok(Captured::Instantiated)
    }

    /// Queues all calls of this key's capture on the stream, asynchronously, with one launch.
    ///
    /// # Errors
    /// [`Graph`](FlashInferError::Graph) where nothing was captured under the key;
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) on a stream that captures, whose graph would not keep the buffers;
    /// [`ContextLost`](FlashInferError::ContextLost); [`Cuda`](FlashInferError::Cuda).
    pub fn launch(&mut self, key: u64) -> Result<()> {
        let Some(at) = self.executables.iter().position(|(known, _)| *known == key) else {
            let problem = match &self.executables[..] {
                [] => "nothing was captured".to_owned(),
                _ => format!("nothing was captured under the key {key}"),
            };
            return Err(FlashInferError::Graph { problem, remedy: "capture it first" });
        };
        let runtime = FlashInferRuntime::global()?;
        let id = runtime.checked_device(device(self.stream.context()))?;
        let _current = CurrentContext::bind(self.stream.context())?;
        refuse_capture("graph", &self.stream)?;
        self.take_over()?;
        let executable = &mut self.executables[at].1;
        if let Some(buffers) = &mut self.buffers
            && !executable.draws.is_empty()
        {
            let (mut source, mut set) = (0, Ok(()));
            buffers.each_source(&mut |philox| {
                for draw in executable.draws.iter_mut().filter(|draw| draw.source == source) {
                    if set.is_ok() {
                        // SAFETY: the executable keeps the graph that it was made of, where the draws were found.
                        set = unsafe { draw.set(executable.handle, philox.seed(), philox.offset()) };
                        philox.advance(draw.count);
                    }
                }
                source += 1;
            });
            set?;
        }
        (self.launched, self.unreported) = (true, true);
        // SAFETY: both are live; the graph's memory is what `buffers` keeps, ordered with its other uses.
        let result = unsafe { driver_graph::launch(executable.handle, self.stream.cu_stream()) };
        result.map_err(|error| {
            let stream = Stream::cudarc(&self.stream);
            runtime.diagnosed(driver("cuGraphLaunch")(error), id, error.0 as i32, stream)
        })
    }

    /// Makes the stream wait for what the program did with the buffers, if it may have used them.
    fn take_over(&mut self) -> Result<()> {
        if self.lent {
            let context = self.stream.context();
            no_error_is_kept(context)?;
            self.buffers.iter_mut().for_each(|buffers| buffers.take_over(&self.stream));
            no_error_is_kept(context)?;
            self.lent = false;
        }
        Ok(())
    }

    /// The buffers for launches of this crate's own on the stream, which are ordered as those of captures are.
    #[cfg_attr(not(feature = "compute"), allow(dead_code, reason = "compute graphs are launched so"))]
    pub(crate) fn launching(&mut self) -> Result<(&mut B::Owned, &Arc<CudaStream>)> {
        let _current = CurrentContext::bind(self.stream.context())?;
        refuse_capture("graph", &self.stream)?;
        self.take_over()?;
        (self.launched, self.unreported) = (true, true);
        let Some(buffers) = &mut self.buffers else { unreachable!("only what is taken apart has none") };
        Ok((buffers, &self.stream))
    }

    /// Views of the buffers, to be filled and read between launches. cudarc orders what is done through them with the
    /// launches, where it tracks events; without, what is done on the graph's own stream is in order.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) while the graph's stream captures something else, so that nothing
    /// can be ordered behind the launches; [`ContextLost`](FlashInferError::ContextLost); [`Cuda`](FlashInferError::Cuda).
    pub fn buffers(&mut self) -> Result<B::Views<'_>> {
        if self.unreported {
            self.hand_back(false)?;
            self.unreported = false;
        } else {
            // What is done through views would be captured, and the next launch ordered behind what never happens.
            refuse_capture("graph", &self.stream)?;
        }
        self.lent = true;
        let Some(buffers) = &mut self.buffers else { unreachable!("only what is taken apart has none") };
        Ok(B::views(buffers.views()))
    }

    /// Orders what uses the buffers elsewhere from now on behind what was launched, and their release too, if they leave the
    /// graph. Where it cannot be ordered, it waits for what was launched.
    fn hand_back(&mut self, leave: bool) -> Result<()> {
        let context = self.stream.context();
        let _current = CurrentContext::bind(context)?;
        refuse_capture("graph", &self.stream)?;
        let mut order = || {
            let last = if leave { Some(last_launch(&self.stream)?) } else { None };
            let launched = Launched { stream: &self.stream, last: last.as_ref() };
            self.buffers.iter_mut().try_for_each(|buffers| buffers.hand_back(&launched))
        };
        order().or_else(|_| {
            // SAFETY: the stream is live.
            let waited = unsafe { driver_stream::synchronize(self.stream.cu_stream()) };
            waited.map_err(driver_in(context, "waiting for a graph's launches"))
        })
    }

    /// Lets go of the buffers: whatever becomes of them comes behind what was launched. Where that cannot be, they are leaked,
    /// since a kernel may still use them.
    fn let_go(&mut self) -> Result<Option<B::Owned>> {
        let ordered = if mem::take(&mut self.launched) { self.hand_back(true) } else { Ok(()) };
        self.executables.clear();
        let buffers = self.buffers.take();
        match ordered {
            // Nothing runs any more in a context that is lost.
            Err(error) if !error.is_fatal() => {
                mem::forget(buffers);
                Err(error)
            }
            _ => Ok(buffers),
        }
    }

    /// The buffers themselves, without the graph. It does not wait: what uses the buffers next is ordered behind what was
    /// launched.
    ///
    /// # Errors
    /// As for [`buffers`](Self::buffers); the buffers are leaked then, since a launch may still use them.
    pub fn into_buffers(mut self) -> Result<B> {
        match self.let_go()? {
            Some(buffers) => Ok(B::from_owned(buffers)),
            None => unreachable!("only what is taken apart has none"),
        }
    }

    /// The stream that it is launched on.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// The keys of what was captured, in the order of their first captures.
    pub fn keys(&self) -> impl Iterator<Item = u64> {
        self.executables.iter().map(|(key, _)| *key)
    }

    /// The number of kernels, copies and fills that a launch of this key's capture queues; 0 where there is none.
    pub fn nodes(&self, key: u64) -> usize {
        self.executables.iter().find(|(known, _)| *known == key).map_or(0, |(_, executable)| executable.nodes)
    }
}

impl<B: GraphBuffers> Drop for GraphSet<B> {
    fn drop(&mut self) {
        // Where nothing could be ordered they are leaked, and there is nobody to tell.
        self.let_go().ok();
    }
}

/// An event behind all that was launched on a stream.
fn last_launch(stream: &CudaStream) -> Result<CudaEvent> {
    let context = stream.context();
    let event = context.new_event(None).map_err(|error| {
        // Perhaps one that cudarc kept for whoever calls it next, which this was not meant to be.
        context.record_err::<()>(Err(error));
        driver_in(context, "cuEventCreate")(error)
    })?;
    record(&event, stream).map_err(driver_in(context, "recording a graph's last launch"))?;
    Ok(event)
}
