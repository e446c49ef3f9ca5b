//! Whose memory a tensor is over, and what a call does so that the owner orders it with its other uses.
//!
//! cudarc has two events for a buffer, which stand for its last read and its last write, and lets other streams wait for
//! them. Making a tensor lets its stream wait for the buffer's earlier uses. Each call waits for the tensor's event, launches,
//! and records the event again, which then stands for the earlier uses and for this one: on two streams at once, tensors of
//! one buffer share it. So whatever becomes of the tensors afterwards, leaked or kept, the buffer's next use and its release
//! are ordered behind the kernel.

#[cfg(feature = "cudarc")]
pub(crate) use tracked::{Owner, ordered};
#[cfg(not(feature = "cudarc"))]
pub(crate) use untracked::{Owner, ordered};

#[cfg(not(feature = "cudarc"))]
mod untracked {
    use std::marker::PhantomData;

    use crate::error::Result;

    /// Nobody that would have to be told: the memory's owner vouched for it.
    #[derive(Clone, Copy)]
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
        _owners: impl Iterator<Item = &'a Owner<'o>>,
        launch: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        launch()
    }
}

#[cfg(feature = "cudarc")]
mod tracked {
    use std::mem;
    use std::ptr;

    use cudarc::driver::{CudaContext, CudaEvent, CudaStream, SyncOnDrop, result, sys};

    use crate::error::{FlashInferError, Result, driver_in};

    /// The stream that a tensor over a buffer of cudarc's was made for, and the event for the buffer's last read or, of a
    /// tensor that is written, its last write; or nobody, where whoever made the tensor vouched for the memory.
    #[derive(Clone, Copy)]
    pub(crate) struct Owner<'a>(Option<(&'a CudaStream, Option<&'a CudaEvent>)>);

    impl<'a> Owner<'a> {
        pub(crate) const NONE: Self = Self(None);

        /// By the guard that cudarc gave with the buffer's address, once the stream waits for what the guard is for.
        #[inline(always)]
        pub(crate) fn from_guard(guard: SyncOnDrop<'a>, stream: &'a CudaStream) -> Self {
            let event = match &guard {
                SyncOnDrop::Record(Some((event, _))) => Some(*event),
                // Buffers that were made while tracking was off have none.
                _ => None,
            };
            // Dropped, it would record a use that has not happened.
            mem::forget(guard);
            Self(Some((stream, event)))
        }

        /// Whether a call must be ordered with other uses: where cudarc tracks them. On the null stream and the per-thread one
        /// in any case, since these exist in every context, and a call there would go to whichever is current.
        #[inline(always)]
        pub(crate) fn orders(&self) -> bool {
            let Some((stream, _)) = self.0 else { return false };
            stream.context().is_managing_stream_synchronization() | is_of_any_context(stream.cu_stream())
        }
    }

    fn is_of_any_context(stream: sys::CUstream) -> bool {
        stream.addr() <= 2
    }

    /// Runs `launch` behind what used the memory before and ahead of what will, in the context that owns the memory.
    #[cold]
    pub(crate) fn ordered<'a, 'o: 'a>(
        function: &'static str,
        owners: impl Iterator<Item = &'a Owner<'o>> + Clone,
        launch: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let Some((stream, _)) = owners.clone().find_map(|owner| owner.0) else { return launch() };
        let context = stream.context();
        let _context = CurrentContext::bind(context)?;
        refuse_capture(function, stream)?;
        let events = owners.filter_map(|owner| owner.0?.1).filter(|_| context.is_managing_stream_synchronization());
        for event in events.clone() {
            let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
            // SAFETY: both are live, since the owner borrows them, and of the context that is current.
            let waited = unsafe { result::stream::wait_event(stream.cu_stream(), event.cu_event(), flags) };
            waited.map_err(driver_in(context, "ordering a buffer's uses"))?;
        }
        let result = launch();
        let mut recorded = Ok(());
        for event in events {
            // SAFETY: as above.
            recorded = recorded.and(unsafe { result::event::record(event.cu_event(), stream.cu_stream()) });
        }
        recorded.map_err(driver_in(context, "recording a buffer's use")).and(result)
    }

    /// That nothing is captured on the stream: a graph would keep the addresses, not the buffers.
    pub(crate) fn refuse_capture(function: &'static str, stream: &CudaStream) -> Result<()> {
        let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: the stream is live, and one number is written through a pointer that is valid for the call.
        let code = unsafe { sys::cuStreamIsCapturing(stream.cu_stream(), &mut status) };
        code.result().map_err(driver_in(stream.context(), "cuStreamIsCapturing"))?;
        if status == sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE {
            return Ok(());
        }
        Err(FlashInferError::InvalidArgument {
            function,
            argument: "stream",
            found: "one that captures a graph, which would keep the addresses of buffers and not the buffers"
                .to_owned(),
            expected: "one that does not; LaunchGraph captures calls and owns their buffers".to_owned(),
        })
    }

    /// Gives a thread the context back that was current.
    pub(crate) struct CurrentContext(Option<sys::CUcontext>);

    impl CurrentContext {
        /// Makes this context current.
        pub(crate) fn bind(context: &CudaContext) -> Result<Self> {
            let before = result::ctx::get_current().map_err(driver_in(context, "cuCtxGetCurrent"))?;
            let before = before.unwrap_or(ptr::null_mut());
            if before == context.cu_ctx() {
                return Ok(Self(None));
            }
            context.bind_to_thread().map_err(driver_in(context, "binding the context"))?;
            Ok(Self(Some(before)))
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
