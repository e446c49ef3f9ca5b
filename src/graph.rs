//! Series of calls, captured once into a CUDA graph and replayed with one launch.
//!
//! A graph refers to memory by its address, for as long as it may be replayed. So it owns its buffers, and a capture knows
//! no others: it runs on a stream of its own, and only tensors over the graph's buffers are made for that stream. cudarc's
//! event tracking, whose waits and records cannot be captured, is left out there. Instead a graph takes its buffers over
//! before a launch, once the program may have used them, and hands them back before the program may use them again; between
//! launches that follow one another nothing is waited for or recorded.

mod capture;
mod set;

use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use cudarc::driver::sys::CUstream;
use cudarc::driver::{CudaContext, CudaEvent, CudaSlice, CudaStream, CudaViewMut, DevicePtr, DevicePtrMut};

use crate::buffers::{check_byte, check_context, check_len};
use crate::error::{FlashInferError, Result, driver_in};
use crate::owner::{Owner, event_of, record, refuse_capture, wait};
use crate::philox::{Drawing, Drawn, Philox};
use crate::stream::Stream;
use crate::tensor::{DType, Device, Element, Layout, TensorMut, TensorRef};

#[cfg(feature = "compute")]
pub(crate) use capture::{Chained, captured_so_far};
pub(crate) use capture::{Executable, PrivateStream};
pub use set::GraphSet;

/// Where a capture happens: what its tensors are made for.
#[derive(Debug, Clone, Copy)]
pub struct Site {
    device: Device,
    stream: CUstream,
}

impl Site {
    /// That a call is for the stream of the capture: what a graph owns is for its launches alone.
    pub(crate) fn check(self, function: &'static str, stream: Stream<'_>) -> Result<()> {
        if stream.as_raw() == self.stream.cast() {
            return Ok(());
        }
        Err(FlashInferError::InvalidArgument {
            function,
            argument: "stream",
            found: "another stream than the capture's".to_owned(),
            expected: "the stream that the captured calls are given: scratch memory that a graph owns is for its launches alone"
                .to_owned(),
        })
    }
}

/// What was launched on a graph's stream, for others to wait for.
pub struct Launched<'a> {
    stream: &'a CudaStream,
    /// Recorded behind all launches; only when the buffers leave the graph.
    last: Option<&'a CudaEvent>,
}

impl Launched<'_> {
    /// The stream that the graph is launched on.
    pub(crate) fn stream(&self) -> &CudaStream {
        self.stream
    }
}

/// What a [`LaunchGraph`] owns: `CudaSlice<T>`, `Arc<CudaSlice<T>>` for what is only read and shared (weights),
/// [`GdnPrefillContext`](crate::kernels::gdn::GdnPrefillContext),
/// [`SamplingContext`](crate::kernels::sampling::SamplingContext), [`Philox`], which each launch draws from anew,
/// [`GraphPlan`](crate::attention::GraphPlan), [`DeviceCuSeqlens`](crate::DeviceCuSeqlens), [`OnDevice`](crate::OnDevice) and, shared, `Arc<OnDevice<D>>`, tuples, arrays
/// and vectors of these, and structs that [`graph_buffers!`](crate::graph_buffers) declares.
pub trait GraphBuffers: Sized + 'static {
    /// What the graph keeps: buffers, and tuples, arrays and vectors of them.
    #[doc(hidden)]
    type Owned: Leaf;

    /// What the captured calls are given: [`GraphMut`] for a buffer, [`GraphRef`] for a shared one.
    type Captured<'a>;

    /// What the program is given between launches: cudarc's views.
    type Views<'a>;

    #[doc(hidden)]
    fn into_owned(self) -> Self::Owned;

    #[doc(hidden)]
    fn from_owned(owned: Self::Owned) -> Self;

    #[doc(hidden)]
    fn captured<'a>(captured: <Self::Owned as Leaf>::Captured<'a>) -> Self::Captured<'a>;

    #[doc(hidden)]
    fn views<'a>(views: <Self::Owned as Leaf>::Views<'a>) -> Self::Views<'a>;
}

/// What a graph can keep. Named nowhere outside of this crate, so that nobody else implements it: a graph relies on it.
pub trait Leaf: 'static {
    type Captured<'a>;
    type Views<'a>;

    /// That all memory is of this context, and that no stream that it was made on captures.
    fn check(&self, context: &Arc<CudaContext>) -> Result<()>;

    fn captured<'a>(&'a mut self, site: Site) -> Self::Captured<'a>;

    fn views(&mut self) -> Self::Views<'_>;

    /// Makes the stream wait for what used the memory elsewhere.
    fn take_over(&mut self, stream: &CudaStream);

    /// Makes what uses the memory elsewhere from now on wait for what was launched. After an error nothing may be known of
    /// some of it.
    fn hand_back(&mut self, launched: &Launched<'_>) -> Result<()>;

    /// Every source of random numbers, always in the same order.
    fn each_source(&mut self, _visit: &mut dyn FnMut(&mut Philox)) {}
}

/// A type that a graph keeps as it is.
macro_rules! graph_leaf {
    ($({$($generics:tt)*})? $leaf:ty) => {
        impl $(<$($generics)*>)? $crate::graph::GraphBuffers for $leaf {
            type Owned = Self;
            type Captured<'a> = <Self as $crate::graph::Leaf>::Captured<'a>;
            type Views<'a> = <Self as $crate::graph::Leaf>::Views<'a>;

            fn into_owned(self) -> Self {
                self
            }

            fn from_owned(owned: Self) -> Self {
                owned
            }

            fn captured<'a>(captured: Self::Captured<'a>) -> Self::Captured<'a> {
                captured
            }

            fn views<'a>(views: Self::Views<'a>) -> Self::Views<'a> {
                views
            }
        }
    };
}
pub(crate) use graph_leaf;

/// Declares a struct of a [`LaunchGraph`]'s buffers, and those of what captured calls and the program are given in their
/// places, with the same fields.
///
/// ```
/// # use std::sync::Arc;
/// # use flashinfer_rs::cudarc::driver::CudaSlice;
/// # use half::bf16;
/// flashinfer_rs::graph_buffers! {
///     /// A decoder step's buffers.
///     pub struct Step / StepCaptured / StepViews {
///         pub hidden: CudaSlice<bf16>,
///         pub weights: Vec<Arc<CudaSlice<bf16>>>,
///     }
/// }
/// ```
///
/// A graph of `Step` captures with a `StepCaptured`, whose `hidden` is a [`GraphMut`] and whose `weights` are [`GraphRef`]s, and
/// answers [`buffers`](LaunchGraph::buffers) with `StepViews`.
#[macro_export]
macro_rules! graph_buffers {
    (
        $(#[$meta:meta])*
        $vis:vis struct $name:ident / $captured:ident / $views:ident {
            $($(#[$field_meta:meta])* $field_vis:vis $field:ident: $type:ty),+ $(,)?
        }
    ) => {
        $(#[$meta])*
        $vis struct $name {
            $($(#[$field_meta])* $field_vis $field: $type,)+
        }

        #[doc = concat!("[`", stringify!($name), "`] in a capture.")]
        $vis struct $captured<'a> {
            $($(#[$field_meta])* $field_vis $field: <$type as $crate::GraphBuffers>::Captured<'a>,)+
        }

        #[doc = concat!("[`", stringify!($name), "`] between launches.")]
        $vis struct $views<'a> {
            $($(#[$field_meta])* $field_vis $field: <$type as $crate::GraphBuffers>::Views<'a>,)+
        }

        impl $crate::GraphBuffers for $name {
            type Owned = $crate::graph_buffers!(@type $([$type])+);
            type Captured<'a> = $captured<'a>;
            type Views<'a> = $views<'a>;

            fn into_owned(self) -> Self::Owned {
                let Self { $($field),+ } = self;
                $crate::graph_buffers!(@into $($field)+)
            }

            fn from_owned(owned: Self::Owned) -> Self {
                let $crate::graph_buffers!(@pattern $($field)+) = owned;
                Self { $($field: $crate::GraphBuffers::from_owned($field)),+ }
            }

            fn captured<'a>(captured: $crate::GraphCaptured<'a, Self>) -> $captured<'a> {
                let $crate::graph_buffers!(@pattern $($field)+) = captured;
                $captured { $($field: <$type as $crate::GraphBuffers>::captured($field)),+ }
            }

            fn views<'a>(views: $crate::GraphViews<'a, Self>) -> $views<'a> {
                let $crate::graph_buffers!(@pattern $($field)+) = views;
                $views { $($field: <$type as $crate::GraphBuffers>::views($field)),+ }
            }
        }
    };
    // Pairs within pairs, so that a struct may have any number of fields.
    (@type) => { () };
    (@type [$first:ty] $($rest:tt)*) => {
        (<$first as $crate::GraphBuffers>::Owned, $crate::graph_buffers!(@type $($rest)*))
    };
    (@into) => { () };
    (@into $first:ident $($rest:ident)*) => {
        ($crate::GraphBuffers::into_owned($first), $crate::graph_buffers!(@into $($rest)*))
    };
    (@pattern) => { () };
    (@pattern $first:ident $($rest:ident)*) => { ($first, $crate::graph_buffers!(@pattern $($rest)*)) };
}

/// What the captured calls of a graph's buffers are made of.
#[doc(hidden)]
pub type GraphCaptured<'a, B> = <<B as GraphBuffers>::Owned as Leaf>::Captured<'a>;

/// What the views of a graph's buffers are made of.
#[doc(hidden)]
pub type GraphViews<'a, B> = <<B as GraphBuffers>::Owned as Leaf>::Views<'a>;

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

    /// The buffer's address on the GPU, for kernels of one's own that are captured on the same stream. The graph keeps the
    /// buffer for as long as it can be launched; whoever captures a kernel on it sees to it that it is only read.
    pub fn as_ptr(&self) -> *const T {
        self.address as *const T
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
        let (address, stream) = (self.address as *mut c_void, Some(self.site.stream.cast()));
        let layout = Layout::build(address, self.site.device, T::DTYPE, shape, strides, stream);
        // SAFETY: the graph owns the memory, which holds the elements that were counted, and keeps it for as long as it can
        // be launched; its launches are ordered with all other uses.
        Ok(unsafe { TensorRef::from_layout(layout, Owner::NONE) })
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

    /// The buffer's address on the GPU, as [`GraphRef::as_ptr`], to be written.
    pub fn as_mut_ptr(&mut self) -> *mut T {
        self.buffer.address as *mut T
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
        let layout = Layout::build(address as *mut c_void, site.device, dtype, shape, strides, stream);
        // SAFETY: as for `GraphRef`; this part of the buffer is borrowed mutably.
        Ok(unsafe { TensorMut::from_layout(layout, Owner::NONE) })
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

/// That memory is of this context, and that nothing is captured on its own stream, which is made to wait where a graph takes
/// the memory or gives it back.
fn check_buffer(stream: &CudaStream, context: &Arc<CudaContext>) -> Result<()> {
    check_context("graph", "buffer", stream.context(), context)?;
    refuse_capture("graph", stream)
}

/// Lets a buffer's own stream, on which its memory is released, wait for the graph's last launch.
fn wait_for_last(own: &CudaStream, launched: &Launched<'_>) -> Result<()> {
    let Some(event) = launched.last else { return Ok(()) };
    refuse_capture("graph", own)?;
    wait(own, event).map_err(driver_in(own.context(), "ordering a buffer's release"))
}

impl<T: Element> Leaf for CudaSlice<T> {
    type Captured<'a> = GraphMut<'a, T>;
    type Views<'a> = CudaViewMut<'a, T>;

    fn check(&self, context: &Arc<CudaContext>) -> Result<()> {
        check_buffer(self.stream(), context)
    }

    fn captured<'a>(&'a mut self, site: Site) -> GraphMut<'a, T> {
        let (len, own) = (self.len(), Arc::clone(self.stream()));
        let (address, guard) = self.device_ptr(&own);
        event_of(guard);
        GraphMut { buffer: GraphRef { address, len, site, borrow: PhantomData }, borrow: PhantomData }
    }

    fn views(&mut self) -> CudaViewMut<'_, T> {
        self.as_view_mut()
    }

    fn take_over(&mut self, stream: &CudaStream) {
        event_of(self.device_ptr_mut(stream).1);
    }

    fn hand_back(&mut self, launched: &Launched<'_>) -> Result<()> {
        let context = Arc::clone(self.stream().context());
        if context.is_managing_stream_synchronization()
            && let Some(writes) = event_of(self.device_ptr_mut(launched.stream).1)
        {
            record(writes, launched.stream).map_err(driver_in(&context, "recording a graph's use of a buffer"))?;
        }
        // Whatever cudarc tracks by then.
        wait_for_last(self.stream(), launched)
    }
}

graph_leaf!({T: Element} CudaSlice<T>);

/// A buffer that graphs only read and share with others. While one has its share, nobody can write the buffer: what it waited
/// for once stays so, and its reads need to be known only when it gives its share up.
pub(crate) mod shared {
    use super::*;

    pub(crate) fn captured<'a, T: Element>(buffer: &'a CudaSlice<T>, site: Site) -> GraphRef<'a, T> {
        let (address, guard) = buffer.device_ptr(buffer.stream());
        event_of(guard);
        GraphRef { address, len: buffer.len(), site, borrow: PhantomData }
    }

    pub(crate) fn take_over<T: Element>(buffer: &CudaSlice<T>, stream: &CudaStream) {
        event_of(buffer.device_ptr(stream).1);
    }

    pub(crate) fn hand_back<T: Element>(buffer: &CudaSlice<T>, launched: &Launched<'_>) -> Result<()> {
        if launched.last.is_none() {
            return Ok(());
        }
        let own = buffer.stream();
        let context = own.context();
        wait_for_last(own, launched)?;
        if context.is_managing_stream_synchronization()
            && let Some(reads) = event_of(buffer.device_ptr(own).1)
        {
            // The one event that stands for all reads is recorded anew, behind those that it stood for.
            let ordered = wait(own, reads).and_then(|()| record(reads, own));
            ordered.map_err(driver_in(context, "recording a graph's use of a buffer"))?;
        }
        Ok(())
    }
}

impl<T: Element> Leaf for Arc<CudaSlice<T>> {
    type Captured<'a> = GraphRef<'a, T>;
    type Views<'a> = &'a CudaSlice<T>;

    fn check(&self, context: &Arc<CudaContext>) -> Result<()> {
        check_buffer(self.stream(), context)
    }

    fn captured<'a>(&'a mut self, site: Site) -> GraphRef<'a, T> {
        shared::captured(self, site)
    }

    fn views(&mut self) -> &CudaSlice<T> {
        self
    }

    fn take_over(&mut self, stream: &CudaStream) {
        shared::take_over(self, stream);
    }

    fn hand_back(&mut self, launched: &Launched<'_>) -> Result<()> {
        shared::hand_back(self, launched)
    }
}

graph_leaf!({T: Element} Arc<CudaSlice<T>>);

/// What is drawn in a capture, from each of the graph's sources in their order, until that ends, also by a panic.
#[derive(Default)]
struct Drawings(Vec<Arc<Drawing>>);

impl Drawings {
    fn end(&self) -> Vec<Vec<Drawn>> {
        self.0.iter().map(|drawing| drawing.end()).collect()
    }
}

impl Drop for Drawings {
    fn drop(&mut self) {
        self.end();
    }
}

/// What the graph's sampling calls draw from, in each launch anew.
impl Leaf for Philox {
    type Captured<'a> = &'a mut Philox;
    type Views<'a> = &'a mut Philox;

    fn check(&self, _context: &Arc<CudaContext>) -> Result<()> {
        Ok(())
    }

    fn captured(&mut self, _site: Site) -> &mut Philox {
        self
    }

    fn views(&mut self) -> &mut Philox {
        self
    }

    fn take_over(&mut self, _stream: &CudaStream) {}

    fn hand_back(&mut self, _launched: &Launched<'_>) -> Result<()> {
        Ok(())
    }

    fn each_source(&mut self, visit: &mut dyn FnMut(&mut Philox)) {
        visit(self);
    }
}

graph_leaf!(Philox);

/// Buffers of buffers: each is asked in turn.
macro_rules! each {
    () => {
        fn check(&self, context: &Arc<CudaContext>) -> Result<()> {
            self.iter().try_for_each(|buffer| buffer.check(context))
        }

        fn take_over(&mut self, stream: &CudaStream) {
            self.iter_mut().for_each(|buffer| buffer.take_over(stream));
        }

        fn hand_back(&mut self, launched: &Launched<'_>) -> Result<()> {
            self.iter_mut().try_for_each(|buffer| buffer.hand_back(launched))
        }

        fn each_source(&mut self, visit: &mut dyn FnMut(&mut Philox)) {
            self.iter_mut().for_each(|buffer| buffer.each_source(visit));
        }
    };
}

impl<B: Leaf> Leaf for Vec<B> {
    type Captured<'a> = Vec<B::Captured<'a>>;
    type Views<'a> = Vec<B::Views<'a>>;

    each!();

    fn captured<'a>(&'a mut self, site: Site) -> Self::Captured<'a> {
        self.iter_mut().map(|buffer| buffer.captured(site)).collect()
    }

    fn views(&mut self) -> Self::Views<'_> {
        self.iter_mut().map(B::views).collect()
    }
}

impl<B: GraphBuffers> GraphBuffers for Vec<B> {
    type Owned = Vec<B::Owned>;
    type Captured<'a> = Vec<B::Captured<'a>>;
    type Views<'a> = Vec<B::Views<'a>>;

    fn into_owned(self) -> Self::Owned {
        self.into_iter().map(B::into_owned).collect()
    }

    fn from_owned(owned: Self::Owned) -> Self {
        owned.into_iter().map(B::from_owned).collect()
    }

    fn captured<'a>(captured: GraphCaptured<'a, Self>) -> Self::Captured<'a> {
        captured.into_iter().map(B::captured).collect()
    }

    fn views<'a>(views: GraphViews<'a, Self>) -> Self::Views<'a> {
        views.into_iter().map(B::views).collect()
    }
}

impl<B: Leaf, const N: usize> Leaf for [B; N] {
    type Captured<'a> = [B::Captured<'a>; N];
    type Views<'a> = [B::Views<'a>; N];

    each!();

    fn captured<'a>(&'a mut self, site: Site) -> Self::Captured<'a> {
        self.each_mut().map(|buffer| buffer.captured(site))
    }

    fn views(&mut self) -> Self::Views<'_> {
        self.each_mut().map(B::views)
    }
}

impl<B: GraphBuffers, const N: usize> GraphBuffers for [B; N] {
    type Owned = [B::Owned; N];
    type Captured<'a> = [B::Captured<'a>; N];
    type Views<'a> = [B::Views<'a>; N];

    fn into_owned(self) -> Self::Owned {
        self.map(B::into_owned)
    }

    fn from_owned(owned: Self::Owned) -> Self {
        owned.map(B::from_owned)
    }

    fn captured<'a>(captured: GraphCaptured<'a, Self>) -> Self::Captured<'a> {
        captured.map(B::captured)
    }

    fn views<'a>(views: GraphViews<'a, Self>) -> Self::Views<'a> {
        views.map(B::views)
    }
}

macro_rules! tuple {
    ($($name:ident $at:tt),*) => {
        impl<$($name: Leaf),*> Leaf for ($($name,)*) {
            type Captured<'a> = ($($name::Captured<'a>,)*);
            type Views<'a> = ($($name::Views<'a>,)*);

            fn check(&self, _context: &Arc<CudaContext>) -> Result<()> {
                $(self.$at.check(_context)?;)*
                Ok(())
            }

            #[allow(clippy::unused_unit, reason = "there is a tuple of nothing")]
            fn captured<'a>(&'a mut self, _site: Site) -> Self::Captured<'a> {
                ($(self.$at.captured(_site),)*)
            }

            #[allow(clippy::unused_unit, reason = "there is a tuple of nothing")]
            fn views(&mut self) -> Self::Views<'_> {
                ($(self.$at.views(),)*)
            }

            fn take_over(&mut self, _stream: &CudaStream) {
                $(self.$at.take_over(_stream);)*
            }

            fn hand_back(&mut self, _launched: &Launched<'_>) -> Result<()> {
                $(self.$at.hand_back(_launched)?;)*
                Ok(())
            }

            fn each_source(&mut self, _visit: &mut dyn FnMut(&mut Philox)) {
                $(self.$at.each_source(_visit);)*
            }
        }

        impl<$($name: GraphBuffers),*> GraphBuffers for ($($name,)*) {
            type Owned = ($($name::Owned,)*);
            type Captured<'a> = ($($name::Captured<'a>,)*);
            type Views<'a> = ($($name::Views<'a>,)*);

            #[allow(clippy::unused_unit, reason = "there is a tuple of nothing")]
            fn into_owned(self) -> Self::Owned {
                ($(self.$at.into_owned(),)*)
            }

            #[allow(clippy::unused_unit, reason = "there is a tuple of nothing")]
            fn from_owned(_owned: Self::Owned) -> Self {
                ($($name::from_owned(_owned.$at),)*)
            }

            #[allow(clippy::unused_unit, reason = "there is a tuple of nothing")]
            fn captured<'a>(_captured: GraphCaptured<'a, Self>) -> Self::Captured<'a> {
                ($($name::captured(_captured.$at),)*)
            }

            #[allow(clippy::unused_unit, reason = "there is a tuple of nothing")]
            fn views<'a>(_views: GraphViews<'a, Self>) -> Self::Views<'a> {
                ($($name::views(_views.$at),)*)
            }
        }
    };
}

tuple!();
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
///     let (mut input, ..) = graph.buffers()?;
///     stream.memcpy_htod(&vec![bf16::from_f32(step as f32); 4 * 4096], &mut input)?;
///     graph.launch()?;
/// }
/// # Ok(())
/// # }
/// ```
///
/// # Limits
/// Upstream reports that the prefill of release 0.6.3, which upstream did not mend (0.6.14 has another kernel in its place),
/// was seen to hang when it was replayed from a CUDA graph (flashinfer#3329: 32 value heads, 49 sequences of which most had 6
/// tokens). It was not seen here; `DIR/stress` of the GPU bundle looks for it under a watchdog.
pub struct LaunchGraph<B: GraphBuffers>(GraphSet<B>);

/// The key of a graph's only capture.
const ONLY: u64 = 0;

impl<B: GraphBuffers> fmt::Debug for LaunchGraph<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LaunchGraph").field("nodes", &self.nodes()).field("pdl", &self.0.pdl()).finish_non_exhaustive()
    }
}

impl<B: GraphBuffers> LaunchGraph<B> {
    /// A graph without calls yet, to be launched on `stream`, which may be the null stream too.
    ///
    /// # Errors
    /// [`NotInitialized`](FlashInferError::NotInitialized); [`DeviceOutOfRange`](FlashInferError::DeviceOutOfRange); or
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) for a buffer of another context than the stream's, a context that
    /// is not the GPU's primary one, a buffer that was made on a stream that captures, or the per-thread stream, which is
    /// another in each thread.
    pub fn new(stream: &Arc<CudaStream>, buffers: B) -> Result<Self> {
        GraphSet::new(stream, buffers).map(Self)
    }

    /// With programmatic dependent launch on or off for every captured kernel whose row says that it waits before it reads; it
    /// is on by default. A call with the option on has it in any case. Such a kernel may start before the one ahead of it has
    /// ended and waits for that one's results by itself, so the results are the same.
    #[must_use]
    pub fn with_pdl(self, pdl: bool) -> Self {
        Self(self.0.with_pdl(pdl))
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
    /// what was done: waiting for the GPU or allocating its memory, for example. The program's own streams are as before; a
    /// buffer whose own stream captures is refused.
    pub fn capture(
        &mut self,
        calls: impl for<'s, 'c> FnOnce(Stream<'s>, B::Captured<'c>) -> Result<()>,
    ) -> Result<Captured> {
        self.0.capture(ONLY, calls)
    }

    /// Queues all captured calls on the graph's stream, asynchronously, with one launch.
    ///
    /// # Errors
    /// [`Graph`](FlashInferError::Graph) where nothing was captured;
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) on a stream that captures, whose graph would not keep the buffers;
    /// [`ContextLost`](FlashInferError::ContextLost); [`Cuda`](FlashInferError::Cuda).
    pub fn launch(&mut self) -> Result<()> {
        self.0.launch(ONLY)
    }

    /// Views of the buffers, to be filled and read between launches. cudarc orders what is done through them with the
    /// launches, where it tracks events; without, what is done on the graph's own stream is in order.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) while the graph's stream captures something else, so that nothing
    /// can be ordered behind the launches; [`ContextLost`](FlashInferError::ContextLost); [`Cuda`](FlashInferError::Cuda).
    pub fn buffers(&mut self) -> Result<B::Views<'_>> {
        self.0.buffers()
    }

    /// The buffers themselves, without the graph. It does not wait: what uses the buffers next is ordered behind what was
    /// launched.
    ///
    /// # Errors
    /// As for [`buffers`](Self::buffers); the buffers are leaked then, since a launch may still use them.
    pub fn into_buffers(self) -> Result<B> {
        self.0.into_buffers()
    }

    /// The stream that it is launched on.
    pub fn stream(&self) -> &Arc<CudaStream> {
        self.0.stream()
    }

    /// The number of kernels, copies and fills that a launch queues.
    pub fn nodes(&self) -> usize {
        self.0.nodes(ONLY)
    }
}
