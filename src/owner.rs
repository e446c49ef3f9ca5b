//! Whose memory a tensor is over, and what a call does so that the owner orders it with its other uses.
//!
//! cudarc records an event for a buffer's last read and last write, and lets other streams wait for them. A call takes
//! cudarc's guards for every tensor over one of its buffers, queues the kernel, and gives the guards back, which records
//! the events: whatever becomes of the tensors afterwards, leaked or kept, the buffer's next use and its release are
//! ordered behind the kernel.

#[cfg(feature = "cudarc")]
pub(crate) use tracked::{Owner, ordered};
#[cfg(not(feature = "cudarc"))]
pub(crate) use untracked::{Owner, ordered};

/// What a call does with a tensor's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
}

#[cfg(not(feature = "cudarc"))]
mod untracked {
    use std::marker::PhantomData;

    use super::Access;
    use crate::error::Result;

    /// Nobody that would have to be told: the memory's owner vouched for it.
    #[derive(Clone)]
    pub(crate) struct Owner<'a>(PhantomData<&'a ()>);

    impl Owner<'_> {
        pub(crate) const NONE: Self = Self(PhantomData);

        #[inline(always)]
        pub(crate) fn orders(&self) -> bool {
            false
        }
    }

    pub(crate) fn ordered<'a, 'o: 'a>(
        _function: &'static str,
        _owners: impl Iterator<Item = (&'a Owner<'o>, Access)>,
        launch: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        launch()
    }
}

#[cfg(feature = "cudarc")]
mod tracked {
    use std::ptr;

    use cudarc::driver::{CudaContext, CudaStream, CudaView, CudaViewMut, SyncOnDrop, result, sys};

    use super::Access;
    use crate::error::{FlashInferError, Result, driver};

    /// The buffer of cudarc's that a tensor is over, and the stream that it was made for; or nobody, where whoever made the
    /// tensor vouched for the memory.
    pub(crate) struct Owner<'a>(Option<(View<'a>, &'a CudaStream)>);

    enum View<'a> {
        Shared(CudaView<'a, u8>),
        Exclusive(CudaViewMut<'a, u8>),
    }

    impl Clone for Owner<'_> {
        #[inline]
        fn clone(&self) -> Self {
            // SAFETY: cudarc's views hold an address, a length and shared references, and have no destructor, so a copy of
            // the bytes is one more view. What may be done through an exclusive one is decided by the tensor that holds it:
            // whoever copies it keeps the two apart, in time or in the elements they cover.
            unsafe { ptr::read(self) }
        }
    }

    impl<'a> Owner<'a> {
        pub(crate) const NONE: Self = Self(None);

        #[inline(always)]
        pub(crate) fn shared(view: CudaView<'a, u8>, stream: &'a CudaStream) -> Self {
            Self(Some((View::Shared(view), stream)))
        }

        #[inline(always)]
        pub(crate) fn exclusive(view: CudaViewMut<'a, u8>, stream: &'a CudaStream) -> Self {
            Self(Some((View::Exclusive(view), stream)))
        }

        /// Whether a call must be ordered with other uses: where cudarc tracks them. On the null stream and the per-thread one
        /// in any case, since these exist in every context, and a call there would go to whichever is current.
        #[inline(always)]
        pub(crate) fn orders(&self) -> bool {
            let Some((_, stream)) = &self.0 else { return false };
            stream.context().is_managing_stream_synchronization() | is_of_any_context(stream.cu_stream())
        }

        fn stream(&self) -> Option<&'a CudaStream> {
            self.0.as_ref().map(|(_, stream)| *stream)
        }

        /// Makes the stream wait for what the access must come behind; the guard, dropped, records the access.
        fn guard(&self, access: Access) -> Option<SyncOnDrop<'a>> {
            let (view, stream) = self.clone().0?;
            let (_, guard) = match (view, access) {
                (View::Exclusive(view), Access::Write) => view.view_ptr_mut(stream),
                (View::Exclusive(view), Access::Read) => view.view_ptr(stream),
                (View::Shared(view), _) => view.view_ptr(stream),
            };
            if access == Access::Read
                && let SyncOnDrop::Record(Some((event, stream))) = &guard
                && stream.context().is_managing_stream_synchronization()
            {
                // There is one event for all reads. What it stood for until now, on another stream, must come before
                // what it will stand for, or the buffer's release would wait for the last of the two only.
                stream.context().record_err(stream.wait(event));
            }
            Some(guard)
        }
    }

    fn is_of_any_context(stream: sys::CUstream) -> bool {
        stream.addr() <= 2
    }

    /// The most tensors that a kernel takes.
    const MOST: usize = 16;

    /// Runs `launch` behind what used the memory before and ahead of what will, in the context that owns the memory.
    #[cold]
    pub(crate) fn ordered<'a, 'o: 'a>(
        function: &'static str,
        owners: impl Iterator<Item = (&'a Owner<'o>, Access)> + Clone,
        launch: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let Some(stream) = owners.clone().find_map(|(owner, _)| owner.stream()) else { return launch() };
        let _context = CurrentContext::bind(stream.context())?;
        refuse_capture(function, stream)?;
        let mut guards = [const { None }; MOST];
        for (guard, (owner, access)) in guards.iter_mut().zip(owners) {
            *guard = owner.guard(access);
        }
        // Where waiting failed, nothing may run: the error says that the order does not hold.
        stream.context().check_err().map_err(driver("ordering a buffer's uses"))?;
        let result = launch();
        drop(guards);
        stream.context().check_err().map_err(driver("recording a buffer's use")).and(result)
    }

    /// That nothing is captured on the stream: a graph would keep the addresses, not the buffers.
    pub(crate) fn refuse_capture(function: &'static str, stream: &CudaStream) -> Result<()> {
        let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: the stream is live, and one number is written through a pointer that is valid for the call.
        let code = unsafe { sys::cuStreamIsCapturing(stream.cu_stream(), &mut status) };
        code.result().map_err(driver("cuStreamIsCapturing"))?;
        if status == sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE {
            return Ok(());
        }
        Err(FlashInferError::InvalidArgument {
            function,
            argument: "stream",
            found: "one that captures, into a graph that would not keep the buffers".to_owned(),
            expected: "one that does not; LaunchGraph captures, and owns its buffers".to_owned(),
        })
    }

    /// Gives a thread the context back that was current.
    pub(crate) struct CurrentContext(Option<sys::CUcontext>);

    impl CurrentContext {
        /// Makes this context current.
        pub(crate) fn bind(context: &CudaContext) -> Result<Self> {
            let before = result::ctx::get_current().map_err(driver("cuCtxGetCurrent"))?.unwrap_or(ptr::null_mut());
            context.bind_to_thread().map_err(driver("binding the context"))?;
            Ok(Self((before != context.cu_ctx()).then_some(before)))
        }
    }

    impl Drop for CurrentContext {
        fn drop(&mut self) {
            if let Some(context) = self.0 {
                // SAFETY: it was current when this was made, or there was none.
                unsafe { result::ctx::set_current(context) }.ok();
            }
        }
    }
}

#[cfg(feature = "cudarc")]
pub(crate) use tracked::{CurrentContext, refuse_capture};
