//! CUDA streams: for kernels to be queued on, and set for a series of calls.

use std::cell::Cell;
use std::ffi::c_void;
use std::marker::PhantomData;
use std::ptr;

use crate::tensor::Device;

/// A CUDA stream, for kernels to be queued on.
#[derive(Debug, Clone, Copy)]
pub struct Stream<'a> {
    pub(crate) raw: *mut c_void,
    /// What a graph asks for, while it is captured on this stream.
    capture: Option<Capture>,
    borrow: PhantomData<&'a ()>,
}

/// What a graph that is being captured asks of its calls.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Capture {
    /// Programmatic dependent launch wherever a kernel has it.
    pub(crate) pdl: bool,
}

impl PartialEq for Stream<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.raw == other.raw
    }
}

impl Eq for Stream<'_> {}

impl<'a> Stream<'a> {
    /// The null stream, which orders itself with every other blocking stream of the device.
    pub const NULL: Self = Self::new(ptr::null_mut());

    const fn new(raw: *mut c_void) -> Self {
        Self { raw, capture: None, borrow: PhantomData }
    }

    /// A stream of one's own.
    ///
    /// # Safety
    /// `stream` must be null or a live `cudaStream_t` (`CUstream`) of the device whose kernels it is used for, and stay
    /// so for `'a`.
    pub const unsafe fn from_raw(stream: *mut c_void) -> Self {
        Self::new(stream)
    }

    /// A stream that is only compared with that of tensors.
    pub(crate) const fn compared(stream: *mut c_void) -> Stream<'static> {
        Stream::new(stream)
    }

    /// The handle (`cudaStream_t`, `CUstream`), for kernels of one's own and libraries such as cuBLAS. In a
    /// capture, what is queued on it becomes part of the graph. Whoever uses it must keep it from outliving `'a`, and must not
    /// destroy it.
    #[inline(always)]
    pub const fn as_raw(self) -> *mut c_void {
        self.raw
    }

    #[cfg(feature = "cudarc")]
    pub(crate) fn capturing(self, capture: Capture) -> Self {
        Self { capture: Some(capture), ..self }
    }

    #[inline(always)]
    pub(crate) fn capture(self) -> Option<Capture> {
        self.capture
    }

    /// Whether a graph is captured that wants programmatic dependent launch.
    #[inline(always)]
    pub(crate) fn captures_with_pdl(self) -> bool {
        self.capture.is_some_and(|capture| capture.pdl)
    }
}

/// A stream and the device it is of: a reference to a stream of cudarc's is one.
#[derive(Debug, Clone, Copy)]
pub struct DeviceStream<'a> {
    /// Whose stream it is.
    pub device: Device,
    /// The stream.
    pub stream: Stream<'a>,
}

impl<'a> From<(Device, Stream<'a>)> for DeviceStream<'a> {
    fn from((device, stream): (Device, Stream<'a>)) -> Self {
        Self { device, stream }
    }
}

/// A thread's stream for a device.
#[derive(Clone, Copy, PartialEq)]
pub(crate) struct Setting {
    /// Negative for none.
    pub(crate) device: i32,
    pub(crate) stream: *mut c_void,
}

thread_local! {
    /// The device and the stream that this thread's innermost scope set. Calls on another stream, and inner scopes, put it back
    /// when they end.
    pub(crate) static SCOPE: Cell<Setting> = const { Cell::new(Setting { device: -1, stream: ptr::null_mut() }) };
}

/// A scope, until it is dropped.
pub(crate) struct Scope {
    pub(crate) outer: Setting,
}

impl Drop for Scope {
    fn drop(&mut self) {
        SCOPE.set(self.outer);
    }
}
