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
        _owners: impl Iterator<Item = (&'static str, &'a Owner<'o>)>,
        launch: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        launch()
    }
}

#[cfg(feature = "cudarc")]
mod tracked {
    use std::mem;
    use std::ptr;
    use std::sync::Arc;

    use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError, SyncOnDrop, result, sys};

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
            Self(Some((stream, event_of(guard))))
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
        owners: impl Iterator<Item = (&'static str, &'a Owner<'o>)> + Clone,
        launch: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let Some((stream, _)) = owners.clone().find_map(|(_, owner)| owner.0) else { return launch() };
        let context = stream.context();
        // The null stream and the per-thread one have one handle in every context, so that the stream says nothing.
        let foreign = |owner: &Owner<'_>| owner.0.is_some_and(|(other, _)| !Arc::ptr_eq(other.context(), context));
        if let Some((argument, _)) = owners.clone().find(|(_, owner)| foreign(owner)) {
            return Err(of_another_context(function, argument, context));
        }
        let _context = CurrentContext::bind(context)?;
        refuse_capture(function, stream)?;
        let events =
            owners.filter_map(|(_, owner)| owner.0?.1).filter(|_| context.is_managing_stream_synchronization());
        for event in events.clone() {
            wait(stream, event).map_err(driver_in(context, "ordering a buffer's uses"))?;
        }
        let result = launch();
        let mut recorded = Ok(());
        for event in events {
            recorded = recorded.and(record(event, stream));
        }
        recorded.map_err(driver_in(context, "recording a buffer's use")).and(result)
    }

    /// Lets the stream wait for the event. cudarc's own function would not, where it has kept an error of an earlier call.
    pub(crate) fn wait(stream: &CudaStream, event: &CudaEvent) -> Result<(), DriverError> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both are live, since they are borrowed.
        unsafe { result::stream::wait_event(stream.cu_stream(), event.cu_event(), flags) }
    }

    /// Records the event on the stream, whatever error cudarc has kept.
    pub(crate) fn record(event: &CudaEvent, stream: &CudaStream) -> Result<(), DriverError> {
        // SAFETY: as for `wait`.
        unsafe { result::event::record(event.cu_event(), stream.cu_stream()) }
    }

    /// The event that a guard would record, which stands for a buffer's last read or write; the guard records nothing, since
    /// nothing was used.
    pub(crate) fn event_of<'a>(guard: SyncOnDrop<'a>) -> Option<&'a CudaEvent> {
        let event = match &guard {
            SyncOnDrop::Record(Some((event, _))) => Some(*event),
            // Buffers that were made while tracking was off have none.
            _ => None,
        };
        mem::forget(guard);
        event
    }

    #[cold]
    fn of_another_context(function: &'static str, argument: &'static str, context: &CudaContext) -> FlashInferError {
        FlashInferError::InvalidArgument {
            function,
            argument,
            found: "a tensor of another CudaContext than the other tensors".to_owned(),
            expected: format!(
                "tensors of one, for cuda:{}: clone the Arc instead of calling CudaContext::new again",
                context.ordinal()
            ),
        }
    }

    /// That cudarc keeps no error of an earlier call in the context: it does not wait while it does, and says nothing.
    pub(crate) fn no_error_is_kept(context: &CudaContext) -> Result<()> {
        context.check_err().map_err(driver_in(context, "an earlier call of cudarc's, which kept the error,"))
    }

    /// That nothing is captured on the stream: a graph would keep the addresses, not the buffers.
    pub(crate) fn refuse_capture(function: &'static str, stream: &CudaStream) -> Result<()> {
        // One that exists in every context is that of the current one.
        let _current = match is_of_any_context(stream.cu_stream()) {
            true => Some(CurrentContext::bind(stream.context())?),
            false => None,
        };
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

    /// A context that is current, and gives its place back to the one before. On CUDA's stack of contexts, since the one
    /// before may be destroyed meanwhile, which CUDA knows and this crate does not.
    pub(crate) struct CurrentContext {
        pushed: bool,
    }

    impl CurrentContext {
        /// Makes this context current.
        pub(crate) fn bind(context: &CudaContext) -> Result<Self> {
            let before = result::ctx::get_current().map_err(driver_in(context, "cuCtxGetCurrent"))?;
            if before == Some(context.cu_ctx()) {
                return Ok(Self { pushed: false });
            }
            // SAFETY: the context is live, since it is borrowed.
            let code = unsafe { sys::cuCtxPushCurrent_v2(context.cu_ctx()) };
            code.result().map_err(driver_in(context, "cuCtxPushCurrent"))?;
            Ok(Self { pushed: true })
        }
    }

    impl Drop for CurrentContext {
        fn drop(&mut self) {
            if self.pushed {
                let mut popped = ptr::null_mut();
                // SAFETY: one handle is written through a pointer that is valid for the call.
                unsafe { sys::cuCtxPopCurrent_v2(&mut popped) };
            }
        }
    }
}

#[cfg(feature = "cudarc")]
pub(crate) use tracked::{CurrentContext, event_of, no_error_is_kept, record, refuse_capture, wait};
