//! The stand-in for CUDA's driver that `ordering` stands on: what nothing orders is reported, each kind of it, and what
//! something orders is not.

#[path = "support/native.rs"]
mod native;
#[path = "support/ordering.rs"]
mod ordering;

use std::ffi::c_void;

use cudarc::driver::result::{self, ctx, event, graph, stream};
use cudarc::driver::sys::{self, CUcontext, CUdeviceptr, CUevent, CUgraphInstantiate_flags, CUresult, CUstream};
use cudarc::driver::{CudaContext, DriverError};
use flashinfer_rs::kernels::norm::{NormOptions, rmsnorm};
use flashinfer_rs::{DType, Device, Stream, TensorMut, TensorRef};
use ordering::{Driver, with_driver};

const BYTES: usize = 256;

/// The driver, called as it is.
#[derive(Clone, Copy)]
struct Raw {
    a: CUstream,
    b: CUstream,
}

impl Raw {
    fn new() -> Self {
        let create = || stream::create(stream::StreamKind::NonBlocking).unwrap();
        Self { a: create(), b: create() }
    }

    // SAFETY, of all of them: the stand-in looks at addresses and streams, and at nothing behind them.

    fn allocate(self, on: CUstream) -> CUdeviceptr {
        // SAFETY: see above.
        unsafe { result::malloc_async(on, BYTES) }.unwrap()
    }

    fn free(self, memory: CUdeviceptr, on: CUstream) -> Result<(), DriverError> {
        // SAFETY: see above.
        unsafe { result::free_async(memory, on) }
    }

    fn write(self, memory: CUdeviceptr, on: CUstream) {
        // SAFETY: see above.
        unsafe { result::memset_d8_async(memory, 0, BYTES / 2, on) }.unwrap();
    }

    fn read(self, memory: CUdeviceptr, on: CUstream) {
        // SAFETY: see above; what arrives fits.
        unsafe { result::memcpy_dtoh_async(&mut [0u8; BYTES / 2], memory, on) }.unwrap();
    }

    fn event(self) -> CUevent {
        event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).unwrap()
    }

    fn record(self, event: CUevent, on: CUstream) {
        // SAFETY: see above.
        unsafe { event::record(event, on) }.unwrap();
    }

    fn wait(self, on: CUstream, event: CUevent) -> Result<(), DriverError> {
        // SAFETY: see above.
        unsafe { stream::wait_event(on, event, sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT) }
    }

    /// Lets what comes on `to` wait for what is on `from`.
    fn order(self, from: CUstream, to: CUstream) {
        let event = self.event();
        self.record(event, from);
        self.wait(to, event).unwrap();
    }

    fn synchronize(self, on: CUstream) {
        // SAFETY: see above.
        unsafe { stream::synchronize(on) }.unwrap();
    }

    fn begin(self, on: CUstream) {
        // SAFETY: see above.
        unsafe { stream::begin_capture(on, sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL) }.unwrap();
    }

    fn end(self, on: CUstream) -> Result<sys::CUgraph, DriverError> {
        // SAFETY: see above.
        unsafe { stream::end_capture(on) }
    }

    fn instantiate(self, captured: sys::CUgraph) -> sys::CUgraphExec {
        // SAFETY: see above.
        unsafe { graph::instantiate(captured, CUgraphInstantiate_flags(0)) }.unwrap()
    }

    fn launch(self, executable: sys::CUgraphExec, on: CUstream) {
        // SAFETY: see above.
        unsafe { graph::launch(executable, on) }.unwrap();
    }
}

/// What two operations are, the second on stream b.
type Operation = fn(Raw, CUdeviceptr, CUstream);

fn read(raw: Raw, memory: CUdeviceptr, on: CUstream) {
    raw.read(memory, on);
}

fn write(raw: Raw, memory: CUdeviceptr, on: CUstream) {
    raw.write(memory, on);
}

fn free(raw: Raw, memory: CUdeviceptr, on: CUstream) {
    raw.free(memory, on).unwrap();
}

/// Numbers become what the buffer and the streams are called here: 1 is stream a, 2 is b.
fn named(violations: Vec<String>) -> Vec<String> {
    let name = |text: String| {
        let start = text.find("buffer ").map_or(0, |at| at + 7);
        let digits = text[start..].find(' ').unwrap();
        format!("{}#{}", &text[..start], &text[start + digits..])
    };
    violations.into_iter().map(name).collect()
}

fn found(driver: &Driver, body: impl FnOnce()) -> Vec<String> {
    named(driver.violations_of(body))
}

#[test]
fn each_kind_of_unordered_use_is_reported_and_none_that_is_ordered() {
    with_driver("each_kind_of_unordered_use_is_reported_and_none_that_is_ordered", |driver| {
        let _context = CudaContext::new(0).unwrap();
        let raw = Raw::new();
        let kinds: [(Operation, Operation, &str); 5] = [
            (write, read, "read of buffer # on stream 2 is not ordered behind a write on stream 1"),
            (read, write, "write of buffer # on stream 2 is not ordered behind a read on stream 1"),
            (write, write, "write of buffer # on stream 2 is not ordered behind a write on stream 1"),
            (read, free, "free of buffer # on stream 2 is not ordered behind a read on stream 1"),
            (write, free, "free of buffer # on stream 2 is not ordered behind a write on stream 1"),
        ];
        for (first, second, expected) in kinds {
            let made = || {
                let memory = raw.allocate(raw.a);
                raw.order(raw.a, raw.b);
                memory
            };
            let unordered = found(driver, || {
                let memory = made();
                first(raw, memory, raw.a);
                second(raw, memory, raw.b);
            });
            assert_eq!(unordered, [expected]);
            let orders: [&dyn Fn(); 3] =
                [&|| raw.order(raw.a, raw.b), &|| raw.synchronize(raw.a), &|| ctx::synchronize().unwrap()];
            for order in orders {
                let ordered = found(driver, || {
                    let memory = made();
                    first(raw, memory, raw.a);
                    order();
                    second(raw, memory, raw.b);
                });
                assert_eq!(ordered, [""; 0], "{expected}");
            }
            // An event that was recorded too early orders nothing, nor does the other direction.
            let early = found(driver, || {
                let memory = made();
                let event = raw.event();
                raw.record(event, raw.a);
                first(raw, memory, raw.a);
                raw.wait(raw.b, event).unwrap();
                raw.order(raw.b, raw.a);
                second(raw, memory, raw.b);
            });
            assert_eq!(early, [expected]);
        }
        let reads = found(driver, || {
            let memory = raw.allocate(raw.a);
            raw.order(raw.a, raw.b);
            raw.read(memory, raw.a);
            raw.read(memory, raw.b);
        });
        assert_eq!(reads, [""; 0], "reads may run in any order");
        let apart = found(driver, || {
            let memory = raw.allocate(raw.a);
            raw.order(raw.a, raw.b);
            raw.write(memory, raw.a);
            raw.write(memory + BYTES as u64 / 2, raw.b);
        });
        assert_eq!(apart, [""; 0], "so may writes of different bytes");
        let both = found(driver, || {
            let memory = raw.allocate(raw.a);
            raw.order(raw.a, raw.b);
            raw.read(memory, raw.a);
            raw.read(memory, raw.b);
            raw.free(memory, raw.b).unwrap();
        });
        assert_eq!(both, ["free of buffer # on stream 2 is not ordered behind a read on stream 1"]);
    });
}

#[test]
fn use_before_the_allocation_and_after_the_free_is_reported() {
    with_driver("use_before_the_allocation_and_after_the_free_is_reported", |driver| {
        let _context = CudaContext::new(0).unwrap();
        let raw = Raw::new();
        let early = found(driver, || raw.read(raw.allocate(raw.a), raw.b));
        assert_eq!(early, ["read of buffer # on stream 2 is not ordered behind the allocation on stream 1"]);
        let late = found(driver, || {
            let memory = raw.allocate(raw.a);
            raw.free(memory, raw.a).unwrap();
            raw.order(raw.a, raw.b);
            raw.write(memory, raw.b);
        });
        assert_eq!(late, ["write of buffer # on stream 2 after its free"]);
        let twice = found(driver, || {
            let memory = raw.allocate(raw.a);
            raw.free(memory, raw.a).unwrap();
            assert!(raw.free(memory, raw.a).is_err());
        });
        assert_eq!(twice, ["free of buffer # on stream 1 after its free"]);
        let outside = driver.violations_of(|| raw.read(raw.allocate(raw.a) + BYTES as u64 * 3 / 4, raw.a));
        assert_eq!(outside, ["read on stream 1 of memory that was never allocated"]);
        // The host frees behind everything of its context, and allocates before anything.
        let by_host = found(driver, || {
            // SAFETY: as for `Raw`.
            let memory = unsafe { result::malloc_sync(BYTES) }.unwrap();
            raw.read(memory, raw.a);
            raw.read(memory, raw.b);
            // SAFETY: as for `Raw`.
            unsafe { result::free_sync(memory) }.unwrap();
        });
        assert_eq!(by_host, [""; 0]);
        let ended = driver.violations_of(|| {
            // SAFETY: as for `Raw`.
            unsafe { stream::destroy(raw.a) }.unwrap();
            // SAFETY: as for `Raw`.
            let error = unsafe { stream::synchronize(raw.a) }.unwrap_err();
            assert_eq!(error.0, CUresult::CUDA_ERROR_INVALID_HANDLE);
        });
        assert_eq!(ended, ["stream 1 is used after its end"]);
    });
}

#[test]
fn what_is_captured_happens_where_the_graph_is_launched() {
    with_driver("what_is_captured_happens_where_the_graph_is_launched", |driver| {
        let _context = CudaContext::new(0).unwrap();
        let raw = Raw::new();
        let capture = |memory| {
            raw.begin(raw.a);
            raw.write(memory, raw.a);
            raw.instantiate(raw.end(raw.a).unwrap())
        };
        let memory = raw.allocate(raw.a);
        raw.synchronize(raw.a);
        let mut executable = None;
        // On stream b nothing is ordered yet: neither to capture nor to launch on a needs it.
        let captured = found(driver, || {
            raw.read(memory, raw.b);
            executable = Some(capture(memory));
        });
        assert_eq!(captured, [""; 0]);
        let executable = executable.unwrap();
        let launched = found(driver, || raw.launch(executable, raw.a));
        assert_eq!(launched, ["write of buffer # on stream 1 is not ordered behind a read on stream 2"]);
        // Launches of one executable follow one another.
        let again = found(driver, || {
            raw.order(raw.b, raw.a);
            raw.launch(executable, raw.a);
            raw.launch(executable, raw.b);
        });
        assert_eq!(again, [""; 0]);
        let freed = found(driver, || raw.free(memory, raw.a).unwrap());
        assert_eq!(freed, ["free of buffer # on stream 1 is not ordered behind a write on stream 2"]);
        let late = found(driver, || raw.launch(executable, raw.b));
        assert_eq!(late, ["write of buffer # on stream 2 after its free"]);
    });
}

#[test]
fn what_cannot_be_captured_ends_the_capture() {
    with_driver("what_cannot_be_captured_ends_the_capture", |_| {
        let _context = CudaContext::new(0).unwrap();
        let raw = Raw::new();
        let outside = raw.event();
        raw.record(outside, raw.b);
        let code = |result: Result<(), DriverError>| result.unwrap_err().0;
        let forbidden: [(&dyn Fn() -> CUresult, CUresult); 4] = [
            (&|| code(raw.wait(raw.a, outside)), CUresult::CUDA_ERROR_STREAM_CAPTURE_ISOLATION),
            // SAFETY: as for `Raw`.
            (&|| code(unsafe { stream::synchronize(raw.a) }), CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED),
            // SAFETY: as for `Raw`.
            (&|| code(unsafe { result::free_sync(0) }), CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED),
            (&|| code(ctx::synchronize()), CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED),
        ];
        for (call, expected) in forbidden {
            raw.begin(raw.a);
            assert_eq!(call(), expected);
            assert_eq!(raw.end(raw.a).unwrap_err().0, CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
            // SAFETY: as for `Raw`.
            let status = unsafe { stream::is_capturing(raw.a) }.unwrap();
            assert_eq!(status, sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE);
        }
        // What is recorded in a capture is no point in time, neither in it nor afterwards.
        let inside = raw.event();
        raw.begin(raw.a);
        raw.record(inside, raw.a);
        // SAFETY: as for `Raw`.
        assert_eq!(code(unsafe { event::synchronize(inside) }), CUresult::CUDA_ERROR_CAPTURED_EVENT);
        raw.end(raw.a).unwrap_err();
        assert_eq!(code(raw.wait(raw.b, inside)), CUresult::CUDA_ERROR_CAPTURED_EVENT);
        // Another stream that waits for it is captured too, and must be waited for.
        raw.begin(raw.a);
        raw.order(raw.a, raw.b);
        assert_eq!(raw.end(raw.a).unwrap_err().0, CUresult::CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
        raw.begin(raw.a);
        raw.order(raw.a, raw.b);
        raw.order(raw.b, raw.a);
        raw.end(raw.a).unwrap();
    });
}

#[test]
fn the_null_stream_orders_itself_with_blocking_streams_alone() {
    with_driver("the_null_stream_orders_itself_with_blocking_streams_alone", |driver| {
        let _context = CudaContext::new(0).unwrap();
        let raw = Raw::new();
        let (null, blocking) = (stream::null(), stream::create(stream::StreamKind::Default).unwrap());
        let passed = |from: CUstream, to: CUstream| {
            found(driver, || {
                let memory = raw.allocate(from);
                raw.write(memory, to);
                ctx::synchronize().unwrap();
            })
        };
        assert_eq!(passed(null, blocking), [""; 0]);
        assert_eq!(passed(blocking, null), [""; 0]);
        assert_eq!(passed(null, raw.a).len(), 1);
        assert_eq!(passed(raw.a, null).len(), 1);
    });
}

#[test]
fn page_locked_memory_that_is_used_while_a_copy_of_it_may_be_on_its_way_is_reported() {
    let name = "page_locked_memory_that_is_used_while_a_copy_of_it_may_be_on_its_way_is_reported";
    with_driver(name, |driver| {
        let _context = CudaContext::new(0).unwrap();
        let raw = Raw::new();
        let memory = raw.allocate(raw.a);
        let pinned = || {
            // SAFETY: as for `Raw`; the memory is as large as is asked for, and written before it is read.
            unsafe {
                let pinned = result::malloc_host(BYTES, 0).unwrap().cast::<u8>();
                pinned.write_bytes(0, BYTES);
                std::slice::from_raw_parts_mut(pinned, BYTES)
            }
        };
        // SAFETY: as for `Raw`.
        let up = |from: &[u8]| unsafe { result::memcpy_htod_async(memory, from, raw.a) }.unwrap();
        // SAFETY: as for `Raw`.
        let down = |to: &mut [u8]| unsafe { result::memcpy_dtoh_async(to, memory, raw.a) }.unwrap();
        // SAFETY: as for `Raw`; it is not used again.
        let free = |pinned: &mut [u8]| unsafe { result::free_host(pinned.as_mut_ptr().cast()) }.unwrap();
        let written = |wait: &dyn Fn()| {
            driver.violations_of(|| {
                let pinned = pinned();
                up(pinned);
                wait();
                pinned[1] = 7;
                up(pinned);
                raw.synchronize(raw.a);
                free(pinned);
            })
        };
        let event = raw.event();
        let too_early = "page-locked memory is written while a copy of it on stream 1 may be on its way";
        assert_eq!(written(&|| {}), [too_early]);
        // An event that was never recorded is reached at once.
        // SAFETY: as for `Raw`.
        assert_eq!(written(&|| unsafe { event::synchronize(event) }.unwrap()), [too_early]);
        assert_eq!(written(&|| raw.synchronize(raw.a)), [""; 0]);
        let reached = || {
            raw.record(event, raw.a);
            // SAFETY: as for `Raw`.
            unsafe { event::synchronize(event) }.unwrap();
        };
        assert_eq!(written(&reached), [""; 0]);
        let freed = |is_read: bool, wait: bool| {
            driver.violations_of(|| {
                let pinned = pinned();
                if is_read {
                    up(pinned)
                } else {
                    down(pinned)
                }
                if wait {
                    raw.synchronize(raw.a);
                }
                free(pinned);
            })
        };
        for is_read in [true, false] {
            let too_early = "page-locked memory is freed while a copy of it on stream 1 may be on its way";
            assert_eq!(freed(is_read, false), [too_early]);
            assert_eq!(freed(is_read, true), [""; 0]);
        }
    });
}

#[test]
fn memory_of_another_context_is_reported() {
    with_driver("memory_of_another_context_is_reported", |driver| {
        let first = CudaContext::new(0).unwrap();
        let same = CudaContext::new(0).unwrap();
        assert_eq!(first.cu_ctx(), same.cu_ctx(), "a device has one primary context");
        assert_eq!(driver.retains(0), 2);
        drop(same);
        assert_eq!((driver.retains(0), driver.retains(1)), (1, 0));
        let raw = Raw::new();
        let memory = raw.allocate(raw.a);
        raw.synchronize(raw.a);
        let other = driver.another_context();
        assert_ne!(first.cu_ctx(), other.cu_ctx());
        assert_eq!(driver.current(), 2, "a context that is made is current");
        let theirs = stream::create(stream::StreamKind::NonBlocking).unwrap();
        let used = found(driver, || raw.write(memory, theirs));
        assert_eq!(
            used,
            ["write of buffer # on stream 3 of context 2: memory of context 1 used in context 2"],
            "and so is its stream"
        );
        // An event is of its context too.
        // SAFETY: as for `Raw`.
        let error = unsafe { event::record(raw.event(), raw.a) }.unwrap_err();
        assert_eq!(error.0, CUresult::CUDA_ERROR_INVALID_HANDLE);
        let elsewhere = std::thread::scope(|threads| {
            let look = || ctx::get_current().unwrap().map(|context: CUcontext| context.addr());
            threads.spawn(look).join().unwrap()
        });
        assert_eq!(elsewhere, None, "a thread starts without a context");
    });
}

#[test]
fn kernels_are_reported_as_they_are_launched() {
    with_driver("kernels_are_reported_as_they_are_launched", |driver| {
        let _context = CudaContext::new(0).unwrap();
        let raw = Raw::new();
        let memory: Vec<_> = (0..3).map(|_| raw.allocate(raw.a)).collect();
        let call = |on: CUstream| {
            let (out, input, weight) = (memory[0] as *mut c_void, memory[1] as *const _, memory[2] as *const _);
            let (device, dtype) = (Device::Cuda(0), DType::BF16);
            // SAFETY: the stand-ins look at addresses alone.
            let (mut out, input, weight, stream) = unsafe {
                (
                    TensorMut::from_raw(out, device, dtype, &[2, 64], None).unwrap(),
                    TensorRef::from_raw(input, device, dtype, &[2, 64], None).unwrap(),
                    TensorRef::from_raw(weight, device, dtype, &[64], None).unwrap(),
                    Stream::from_raw(on.cast()),
                )
            };
            rmsnorm(&mut out, &input, &weight, &NormOptions::default(), stream).unwrap();
        };
        assert_eq!(found(driver, || call(raw.a)), [""; 0]);
        let unordered = found(driver, || call(raw.b));
        // The write on stream a took the place of the allocation of what it wrote: whoever is behind it is behind both.
        let expected = [
            "write of buffer # on stream 2 is not ordered behind a write on stream 1",
            "read of buffer # on stream 2 is not ordered behind the allocation on stream 1",
            "read of buffer # on stream 2 is not ordered behind the allocation on stream 1",
        ];
        assert_eq!(unordered, expected);
        assert_eq!(driver.queued(), [2, 0]);
    });
}
