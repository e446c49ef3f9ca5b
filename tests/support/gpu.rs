//! Running GPU tests: where they are not asked for they are ignored, and where they are asked for they fail without a
//! GPU.
#![allow(dead_code, reason = "each test uses its own part")]

use std::process::ExitCode;
use std::sync::Arc;

use cudarc::driver::sys::{CUevent_flags, CUresult};
use cudarc::driver::{CudaContext, CudaStream};
use flashinfer_rs::{FlashInferRuntime, RuntimeConfig};
use libtest_mimic::{Arguments, Trial};

/// Asks for the GPU tests.
pub const RUN: &str = "FLASHINFER_RS_RUN_GPU_TESTS";

pub type Test = (&'static str, fn(&Gpu));

/// A GPU with a stream of its own.
pub struct Gpu {
    pub context: Arc<CudaContext>,
    pub stream: Arc<CudaStream>,
}

impl Gpu {
    pub fn open() -> Self {
        let runtime = FlashInferRuntime::initialize(RuntimeConfig::default()).expect("the runtime");
        // Before cudarc, which panics without a driver.
        let count = runtime.device_count().expect("a GPU was asked for");
        assert!(count > 0, "{RUN}=1 asks for a GPU, and the driver lists none");
        let context = CudaContext::new(0).expect("a context");
        let stream = context.new_stream().expect("a stream");
        Self { context, stream }
    }

    /// Keeps a stream busy for some tens of milliseconds, and answers the memory that it is busy with.
    pub fn occupy(&self, stream: &Arc<CudaStream>) -> (cudarc::driver::CudaSlice<u8>, cudarc::driver::CudaSlice<u8>) {
        let size = 2 << 30;
        let source = stream.alloc_zeros::<u8>(size).expect("memory");
        let mut target = stream.alloc_zeros::<u8>(size).expect("memory");
        for _ in 0..50 {
            stream.memcpy_dtod(&source, &mut target).expect("a copy");
        }
        (source, target)
    }

    /// Fails unless `stream` still has work to do after `call`: a call that waited for it would find none.
    pub fn assert_asynchronous(&self, stream: &Arc<CudaStream>, call: impl FnOnce()) {
        stream.synchronize().expect("the stream");
        let busy = self.occupy(stream);
        call();
        let end = self.context.new_event(Some(CUevent_flags::CU_EVENT_DISABLE_TIMING)).expect("an event");
        end.record(stream).expect("recording");
        let done = end.is_complete();
        stream.synchronize().expect("the stream");
        drop(busy);
        assert!(!done, "the call waited for the stream");
    }
}

/// Runs the tests one after the other, on one GPU.
pub fn main(tests: &[Test]) -> ExitCode {
    main_where(&[(tests, true)])
}

/// As [`main`], of groups of which some want more than a GPU: those that have it.
pub fn main_where(groups: &[(&[Test], bool)]) -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let asked = std::env::var_os(RUN).is_some_and(|value| value == "1");
    let trial = |&(name, test): &Test, has_all: bool| {
        let body = move || {
            test(&Gpu::open());
            Ok(())
        };
        Trial::test(name, body).with_ignored_flag(!asked || !has_all)
    };
    let trials = groups.iter().flat_map(|(tests, has_all)| tests.iter().map(|test| trial(test, *has_all)));
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

/// CUDA's result as cudarc gives it, for tests that look at errors.
pub fn code(error: &cudarc::driver::DriverError) -> CUresult {
    error.0
}
