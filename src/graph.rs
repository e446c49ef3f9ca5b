//! Series of calls, captured once into a CUDA graph and replayed with one launch.
//!
//! A graph refers to memory by its address, for as long as it may be replayed. So it owns its buffers, and a capture knows
//! no others: it runs on a stream of its own, and only tensors over the graph's buffers are made for that stream. cudarc's
//! event tracking, whose waits and records cannot be captured, is left out there; [`LaunchGraph::launch`] waits and records
//! for every buffer instead.

use std::fmt;
use std::marker::PhantomData;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::result::{graph as driver_graph, stream as driver_stream};
use cudarc::driver::sys::{self, CUgraph, CUgraphExec, CUgraphInstantiate_flags, CUstream, CUstreamCaptureMode};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, CudaViewMut, DevicePtr, DevicePtrMut, DriverError};

use crate::cudarc_buffers::{check_byte, check_context, check_len, device, driver};
use crate::error::{FlashInferError, Result};
use crate::runtime::FlashInferRuntime;
use crate::stream::{Capture, Stream};
use crate::tensor::{DType, Device, Element, TensorMut, TensorRef};

pub(crate) mod sealed {
    pub trait Sealed {}
}

/// Where a capture happens: what its tensors are made for.
#[doc(hidden)]
#[derive(Debug, Clone, Copy)]
pub struct Site {
    device: Device,
    stream: CUstream,
}

/// What a [`LaunchGraph`] owns: `CudaSlice<T>`, `Arc<CudaSlice<T>>` for what is only read and shared (weights),
/// [`GdnPrefillContext`](crate::kernels::gdn_context::GdnPrefillContext),
/// [`DeviceCuSeqlens`](crate::kernels::gdn_context::DeviceCuSeqlens), and tuples, arrays and vectors of these.
pub trait GraphBuffers: sealed::Sealed + 'static {
    /// What the captured calls are given: [`GraphMut`] for a buffer, [`GraphRef`] for a shared one.
    type Captured<'a>;

    /// What the program is given between launches: cudarc's views.
    type Views<'a>;

    /// That all memory is of this context.
    #[doc(hidden)]
    fn check(&self, context: &Arc<CudaContext>) -> Result<()>;

    #[doc(hidden)]
    fn captured<'a>(&'a mut self, stream: &CudaStream, site: Site) -> Self::Captured<'a>;

    #[doc(hidden)]
    fn views(&mut self) -> Self::Views<'_>;

    /// Runs `launch` behind what used the buffers before, and before what will.
    #[doc(hidden)]
    fn ordered(&mut self, stream: &CudaStream, launch: &mut dyn FnMut());
}

/// A buffer that captured calls read.
#[derive(Debug, Clone, Copy)]
pub struct GraphRef<'a, T> {
    address: u64,
    len: usize,
    site: Site,
    borrow: PhantomData<&'a [T]>,
}

/// A buffer that captured calls read and write.
#[derive(Debug)]
pub struct GraphMut<'a, T> {
    buffer: GraphRef<'a, T>,
    borrow: PhantomData<&'a mut [T]>,
}

impl<'a, T: Element> GraphRef<'a, T> {
    /// The number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first elements as a contiguous, row-major tensor. The buffer may be longer.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) where the shape does not fit.
    pub fn read(&self, shape: &[i64]) -> Result<TensorRef<'a>> {
        self.tensor(shape, None)
    }

    /// As [`read`](Self::read), with strides of its own, in elements.
    ///
    /// # Errors
    /// As there.
    pub fn read_strided(&self, shape: &[i64], strides: &[i64]) -> Result<TensorRef<'a>> {
        self.tensor(shape, Some(strides))
    }

    fn tensor(&self, shape: &[i64], strides: Option<&[i64]>) -> Result<TensorRef<'a>> {
        check_len("graph", "buffer", self.len, shape, strides)?;
        let (pointer, stream) = (self.address as *const _, Some(self.site.stream.cast()));
        // SAFETY: the graph owns the memory, which holds the elements that were counted, and keeps it for as long as it can
        // be launched; its launches are ordered with all other uses.
        Ok(unsafe { TensorRef::from_checked(pointer, self.site.device, T::DTYPE, shape, strides, stream, None) })
    }
}

impl<'a, T: Element> GraphMut<'a, T> {
    /// The number of elements.
    pub fn len(&self) -> usize {
        self.buffer.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// The buffer, only to be read from now on.
    pub fn into_ref(self) -> GraphRef<'a, T> {
        self.buffer
    }

    /// As [`GraphRef::read`].
    ///
    /// # Errors
    /// As there.
    pub fn read(&self, shape: &[i64]) -> Result<TensorRef<'_>> {
        self.buffer.read(shape)
    }

    /// As [`GraphRef::read_strided`].
    ///
    /// # Errors
    /// As there.
    pub fn read_strided(&self, shape: &[i64], strides: &[i64]) -> Result<TensorRef<'_>> {
        self.buffer.read_strided(shape, strides)
    }

    /// As [`GraphRef::read`], to be written.
    ///
    /// # Errors
    /// As there.
    pub fn write(&mut self, shape: &[i64]) -> Result<TensorMut<'_>> {
        self.tensor(T::DTYPE, shape, None)
    }

    /// As [`GraphRef::read_strided`], to be written.
    ///
    /// # Errors
    /// As there.
    pub fn write_strided(&mut self, shape: &[i64], strides: &[i64]) -> Result<TensorMut<'_>> {
        self.tensor(T::DTYPE, shape, Some(strides))
    }

    /// The elements before `middle` and those from there on.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) for a middle past the end.
    pub fn split_at(self, middle: usize) -> Result<(Self, Self)> {
        let GraphRef { address, len, site, .. } = self.buffer;
        let Some(rest) = len.checked_sub(middle) else {
            return Err(FlashInferError::InvalidArgument {
                function: "graph",
                argument: "middle",
                found: middle.to_string(),
                expected: format!("at most the buffer's length, {len}"),
            });
        };
        let part = |address, len| GraphRef { address, len, site, borrow: PhantomData };
        let whole = |buffer| Self { buffer, borrow: PhantomData };
        Ok((whole(part(address, middle)), whole(part(address + (middle * size_of::<T>()) as u64, rest))))
    }

    fn tensor(&mut self, dtype: DType, shape: &[i64], strides: Option<&[i64]>) -> Result<TensorMut<'_>> {
        let GraphRef { address, len, site, .. } = self.buffer;
        let stream = Some(site.stream.cast());
        check_len("graph", "buffer", len, shape, strides)?;
        // SAFETY: as for `GraphRef`; this part of the buffer is borrowed mutably.
        Ok(unsafe { TensorMut::from_checked(address as *mut _, site.device, dtype, shape, strides, stream, None) })
    }
}

impl GraphMut<'_, u8> {
    /// As [`write`](Self::write), of 8-bit floating-point numbers.
    ///
    /// # Errors
    /// As there, and for a `dtype` that is not of one byte.
    pub fn write_bytes(&mut self, dtype: DType, shape: &[i64]) -> Result<TensorMut<'_>> {
        check_byte(dtype)?;
        self.tensor(dtype, shape, None)
    }
}

impl<T> sealed::Sealed for CudaSlice<T> {}
impl<T: Element> GraphBuffers for CudaSlice<T> {
    type Captured<'a> = GraphMut<'a, T>;
    type Views<'a> = CudaViewMut<'a, T>;

    fn check(&self, context: &Arc<CudaContext>) -> Result<()> {
        check_context("graph", "buffer", self.stream().context(), context)
    }

    fn captured<'a>(&'a mut self, stream: &CudaStream, site: Site) -> GraphMut<'a, T> {
        let len = self.len();
        let (address, _guard) = self.device_ptr_mut(stream);
        GraphMut { buffer: GraphRef { address, len, site, borrow: PhantomData }, borrow: PhantomData }
    }

    fn views(&mut self) -> CudaViewMut<'_, T> {
        self.as_view_mut()
    }

    fn ordered(&mut self, stream: &CudaStream, launch: &mut dyn FnMut()) {
        let (_, _guard) = self.device_ptr_mut(stream);
        launch();
    }
}

impl<T> sealed::Sealed for Arc<CudaSlice<T>> {}
impl<T: Element> GraphBuffers for Arc<CudaSlice<T>> {
    type Captured<'a> = GraphRef<'a, T>;
    type Views<'a> = &'a CudaSlice<T>;

    fn check(&self, context: &Arc<CudaContext>) -> Result<()> {
        check_context("graph", "buffer", self.stream().context(), context)
    }

    fn captured<'a>(&'a mut self, stream: &CudaStream, site: Site) -> GraphRef<'a, T> {
        let (address, _guard) = self.device_ptr(stream);
        GraphRef { address, len: self.len(), site, borrow: PhantomData }
    }

    fn views(&mut self) -> &CudaSlice<T> {
        self
    }

    fn ordered(&mut self, stream: &CudaStream, launch: &mut dyn FnMut()) {
        let (_, _guard) = self.device_ptr(stream);
        launch();
    }
}

impl<B> sealed::Sealed for Vec<B> {}
impl<B: GraphBuffers> GraphBuffers for Vec<B> {
    type Captured<'a> = Vec<B::Captured<'a>>;
    type Views<'a> = Vec<B::Views<'a>>;

    fn check(&self, context: &Arc<CudaContext>) -> Result<()> {
        self.iter().try_for_each(|buffer| buffer.check(context))
    }

    fn captured<'a>(&'a mut self, stream: &CudaStream, site: Site) -> Self::Captured<'a> {
        self.iter_mut().map(|buffer| buffer.captured(stream, site)).collect()
    }

    fn views(&mut self) -> Self::Views<'_> {
        self.iter_mut().map(B::views).collect()
    }

    fn ordered(&mut self, stream: &CudaStream, launch: &mut dyn FnMut()) {
        ordered(self, stream, launch);
    }
}

impl<B, const N: usize> sealed::Sealed for [B; N] {}
impl<B: GraphBuffers, const N: usize> GraphBuffers for [B; N] {
    type Captured<'a> = [B::Captured<'a>; N];
    type Views<'a> = [B::Views<'a>; N];

    fn check(&self, context: &Arc<CudaContext>) -> Result<()> {
        self.iter().try_for_each(|buffer| buffer.check(context))
    }

    fn captured<'a>(&'a mut self, stream: &CudaStream, site: Site) -> Self::Captured<'a> {
        self.each_mut().map(|buffer| buffer.captured(stream, site))
    }

    fn views(&mut self) -> Self::Views<'_> {
        self.each_mut().map(B::views)
    }

    fn ordered(&mut self, stream: &CudaStream, launch: &mut dyn FnMut()) {
        ordered(self, stream, launch);
    }
}

/// By recursion, so that the guards need no memory but the stack's.
fn ordered<B: GraphBuffers>(buffers: &mut [B], stream: &CudaStream, launch: &mut dyn FnMut()) {
    match buffers.split_first_mut() {
        Some((first, rest)) => first.ordered(stream, &mut || ordered(rest, stream, launch)),
        None => launch(),
    }
}

macro_rules! tuple {
    ($($name:ident $at:tt),*) => {
        impl<$($name),*> sealed::Sealed for ($($name,)*) {}
        impl<$($name: GraphBuffers),*> GraphBuffers for ($($name,)*) {
            type Captured<'a> = ($($name::Captured<'a>,)*);
            type Views<'a> = ($($name::Views<'a>,)*);

            fn check(&self, context: &Arc<CudaContext>) -> Result<()> {
                $(self.$at.check(context)?;)*
                Ok(())
            }

            fn captured<'a>(&'a mut self, stream: &CudaStream, site: Site) -> Self::Captured<'a> {
                ($(self.$at.captured(stream, site),)*)
            }

            fn views(&mut self) -> Self::Views<'_> {
                ($(self.$at.views(),)*)
            }

            fn ordered(&mut self, stream: &CudaStream, launch: &mut dyn FnMut()) {
                tuple!(@nest self stream launch $($at)*);
            }
        }
    };
    (@nest $tuple:ident $stream:ident $launch:ident $first:tt $($rest:tt)*) => {
        $tuple.$first.ordered($stream, &mut || { tuple!(@nest $tuple $stream $launch $($rest)*); })
    };
    (@nest $tuple:ident $stream:ident $launch:ident) => { $launch() };
}

tuple!(A 0);
tuple!(A 0, B 1);
tuple!(A 0, B 1, C 2);
tuple!(A 0, B 1, C 2, D 3);
tuple!(A 0, B 1, C 2, D 3, E 4);
tuple!(A 0, B 1, C 2, D 3, E 4, F 5);
tuple!(A 0, B 1, C 2, D 3, E 4, F 5, G 6);
tuple!(A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7);
tuple!(A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7, I 8);
tuple!(A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7, I 8, J 9);
tuple!(A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7, I 8, J 9, K 10);
tuple!(A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7, I 8, J 9, K 10, L 11);

/// What capturing did to a graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Captured {
    /// There was none, or CUDA could not change it into the new one: it was made anew.
    Instantiated,
    /// The graph that was there got the new arguments, which is cheaper: the calls are the same.
    Updated,
}

/// A series of calls as a CUDA graph, on one stream, with its buffers.
///
/// ```no_run
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use std::sync::Arc;
/// # use flashinfer_rs::cudarc::driver::CudaContext;
/// # use flashinfer_rs::kernels::norm::{NormOptions, fused_add_rmsnorm, rmsnorm};
/// # use flashinfer_rs::{FlashInferRuntime, LaunchGraph, RuntimeConfig};
/// # use half::bf16;
/// # FlashInferRuntime::initialize(RuntimeConfig::default())?;
/// let stream = CudaContext::new(0)?.new_stream()?;
/// let input = stream.alloc_zeros::<bf16>(4 * 4096)?;
/// let residual = stream.alloc_zeros::<bf16>(4 * 4096)?;
/// let weight = Arc::new(stream.clone_htod(&vec![bf16::ONE; 4096])?);
///
/// let mut graph = LaunchGraph::new(&stream, (input, residual, weight))?;
/// graph.capture(|s, (mut input, mut residual, weight)| {
///     let (mut input, mut residual) = (input.write(&[4, 4096])?, residual.write(&[4, 4096])?);
///     for _ in 0..64 {
///         fused_add_rmsnorm(&mut input, &mut residual, &weight.read(&[4096])?, &NormOptions::default(), s)?;
///     }
///     Ok(())
/// })?;
///
/// for step in 0..10 {
///     let (mut input, ..) = graph.buffers();
///     stream.memcpy_htod(&vec![bf16::from_f32(step as f32); 4 * 4096], &mut input)?;
///     graph.launch()?;
/// }
/// # Ok(())
/// # }
/// ```
pub struct LaunchGraph<B: GraphBuffers> {
    stream: Arc<CudaStream>,
    pdl: bool,
    /// Before the buffers, so that it is gone before them.
    executable: Option<Executable>,
    buffers: B,
}

impl<B: GraphBuffers> fmt::Debug for LaunchGraph<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LaunchGraph").field("nodes", &self.nodes()).field("pdl", &self.pdl).finish_non_exhaustive()
    }
}

impl<B: GraphBuffers> LaunchGraph<B> {
    /// A graph without calls yet, to be launched on `stream`, which may be any, the null stream too.
    ///
    /// # Errors
    /// [`NotInitialized`](FlashInferError::NotInitialized); [`DeviceOutOfRange`](FlashInferError::DeviceOutOfRange); or
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) for a buffer of another context than the stream's.
    pub fn new(stream: &Arc<CudaStream>, buffers: B) -> Result<Self> {
        FlashInferRuntime::global()?.checked_device(device(stream.context()))?;
        buffers.check(stream.context())?;
        Ok(Self { stream: Arc::clone(stream), pdl: true, executable: None, buffers })
    }

    /// With programmatic dependent launch on or off for every captured kernel that has it; it is on by default. A call with
    /// the option on has it in any case, and a [prepared](crate::Prepared) one keeps its own. Such a kernel may start before the one ahead of it has ended and waits for that one's results by itself, so the results
    /// are the same.
    #[must_use]
    pub fn with_pdl(mut self, pdl: bool) -> Self {
        self.pdl = pdl;
        self
    }

    /// Captures the calls that `calls` makes on the stream it is given. They are queued when the graph is
    /// [launched](Self::launch), not before; so nothing in `calls` can wait for them.
    ///
    /// Captured again, the graph is changed: in place where CUDA can, which is where the calls are the same and only their
    /// numbers and sizes are not. After an error it is as before.
    ///
    /// # Errors
    /// What `calls` answers: [`InvalidArgument`](FlashInferError::InvalidArgument) among it for tensors that are not over
    /// the graph's buffers, whose memory it could not keep. And [`Graph`](FlashInferError::Graph) where CUDA cannot capture
    /// what was done: waiting for the GPU or allocating its memory, for example. The program's own streams are as before.
    pub fn capture(
        &mut self,
        calls: impl for<'s, 'c> FnOnce(Stream<'s>, B::Captured<'c>) -> Result<()>,
    ) -> Result<Captured> {
        let runtime = FlashInferRuntime::global()?;
        let context = self.stream.context();
        let device = device(context);
        context.bind_to_thread().map_err(driver("binding the context"))?;
        let private = PrivateStream::new(context)?;
        let site = Site { device, stream: private.stream };
        let buffers = self.buffers.captured(&self.stream, site);
        // SAFETY: the stream lives until the end of this function, and of this device.
        let stream = unsafe { Stream::from_raw(private.stream.cast()) }.capturing(Capture { pdl: self.pdl });
        let capturing = private.begin()?;
        let result = runtime.on((device, stream), |stream| calls(stream, buffers));
        let graph = capturing.end();
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
        if let Some(executable) = &mut self.executable
            && runtime.cudart()?.update_graph(executable.handle.cast(), graph.handle.cast())?
        {
            executable.nodes = graph.nodes()?;
            return Ok(Captured::Updated);
        }
        self.executable = Some(Executable::new(&graph, context)?);
        Ok(Captured::Instantiated)
    }

    /// Queues all captured calls on the graph's stream, asynchronously, with one launch.
    ///
    /// # Errors
    /// [`Graph`](FlashInferError::Graph) where nothing was captured; [`ContextLost`](FlashInferError::ContextLost);
    /// [`Cuda`](FlashInferError::Cuda).
    pub fn launch(&mut self) -> Result<()> {
        let Some(executable) = &self.executable else {
            let (problem, remedy) = ("nothing was captured".to_owned(), "call LaunchGraph::capture first");
            return Err(FlashInferError::Graph { problem, remedy });
        };
        let context = self.stream.context();
        FlashInferRuntime::global()?.checked_device(device(context))?;
        context.bind_to_thread().map_err(driver("binding the context"))?;
        let mut result = Ok(());
        let mut launch = || {
            // SAFETY: both are live; the graph's memory is what `buffers` keeps, ordered with its other uses.
            result = unsafe { driver_graph::launch(executable.handle, self.stream.cu_stream()) };
        };
        self.buffers.ordered(&self.stream, &mut launch);
        result.map_err(driver("cuGraphLaunch"))
    }

    /// Views of the buffers, to be filled and read between launches. cudarc orders what is done through them with the
    /// launches, where it tracks events; without, what is done on the graph's own stream is in order.
    pub fn buffers(&mut self) -> B::Views<'_> {
        self.buffers.views()
    }

    /// The buffers themselves; the graph is gone, once what was launched has run.
    pub fn into_buffers(self) -> B {
        self.buffers
    }

    /// The stream that it is launched on.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// The number of kernels, copies and fills that a launch queues.
    pub fn nodes(&self) -> usize {
        self.executable.as_ref().map_or(0, |executable| executable.nodes)
    }
}

/// A stream that nobody else can queue anything on.
struct PrivateStream {
    stream: CUstream,
    context: Arc<CudaContext>,
}

impl PrivateStream {
    /// Without cudarc's knowledge: a stream that it knows would switch its event tracking on.
    fn new(context: &Arc<CudaContext>) -> Result<Self> {
        let stream = driver_stream::create(driver_stream::StreamKind::NonBlocking).map_err(driver("cuStreamCreate"))?;
        Ok(Self { stream, context: Arc::clone(context) })
    }

    fn begin(&self) -> Result<Capturing<'_>> {
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is live.
        unsafe { driver_stream::begin_capture(self.stream, mode) }.map_err(driver("cuStreamBeginCapture"))?;
        Ok(Capturing(Some(self)))
    }
}

impl Drop for PrivateStream {
    fn drop(&mut self) {
        self.context.record_err(self.context.bind_to_thread());
        // SAFETY: made by `new`, and given up here, once.
        self.context.record_err(unsafe { driver_stream::destroy(self.stream) });
    }
}

/// A capture, ended also when the calls panic.
struct Capturing<'a>(Option<&'a PrivateStream>);

impl Capturing<'_> {
    fn end(mut self) -> Result<Graph, DriverError> {
        self.finish()
    }

    fn finish(&mut self) -> Result<Graph, DriverError> {
        let Some(private) = self.0.take() else { return Ok(Graph { handle: ptr::null_mut() }) };
        private.context.bind_to_thread()?;
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
struct Graph {
    handle: CUgraph,
}

impl Graph {
    fn nodes(&self) -> Result<usize> {
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
struct Executable {
    handle: CUgraphExec,
    nodes: usize,
    context: Arc<CudaContext>,
}

// SAFETY: CUDA's handles of graphs may be used by any thread, by one at a time: every use is through `&mut` or ownership.
unsafe impl Send for Executable {}

impl Executable {
    fn new(graph: &Graph, context: &Arc<CudaContext>) -> Result<Self> {
        let nodes = graph.nodes()?;
        // SAFETY: the graph is live.
        let handle = unsafe { driver_graph::instantiate(graph.handle, CUgraphInstantiate_flags(0)) }
            .map_err(driver("cuGraphInstantiate"))?;
        Ok(Self { handle, nodes, context: Arc::clone(context) })
    }
}

impl Drop for Executable {
    fn drop(&mut self) {
        self.context.record_err(self.context.bind_to_thread());
        // SAFETY: made by `new`, and given up here, once; CUDA keeps it until what was launched has run.
        self.context.record_err(unsafe { driver_graph::exec_destroy(self.handle) });
    }
}
