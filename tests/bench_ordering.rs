//! Kernels of FlashInfer-Bench's kind over cudarc's buffers: a call is ordered with every other use of them. Over a driver
//! that launches nothing and knows what is ordered.

#[path = "support/native.rs"]
mod native;
#[path = "support/ordering.rs"]
mod ordering;

use std::sync::Arc;

use cudarc::driver::sys::CUstreamCaptureMode;
use cudarc::driver::{CudaContext, CudaSlice, CudaStream};
use flashinfer_rs::bench::{
    Axes, Axis, BenchmarkConfig, BoundKernel, DataType, Definition, HostTensor, Input, Kernel, Named, Reference,
    Runner, TensorSpec, Timing, Workload,
};
use flashinfer_rs::object::{StreamAllocator, Tensor};
use flashinfer_rs::{FlashInferRuntime, Result, Stream, TensorMut, TensorRef};
use ordering::{with_driver, zeros};

fn definition() -> Definition {
    let mut definition = Definition::new("add", "test");
    definition.axes = Named::from([("n", Axis::variable())]);
    let spec = || TensorSpec::tensor(&["n"], DataType::Float32);
    definition.inputs = Named::from([("x", spec()), ("y", spec())]);
    definition.outputs = Named::from([("z", spec())]);
    definition
}

fn kernel() -> Kernel {
    let module = FlashInferRuntime::global().unwrap().module("norm.so").unwrap();
    Kernel::new(module.function("solution").unwrap(), true)
}

struct Buffers([CudaSlice<f32>; 3]);

impl Buffers {
    fn new(stream: &Arc<CudaStream>) -> Self {
        Self(std::array::from_fn(|_| zeros::<f32>(stream, 8)))
    }

    fn call(&mut self, bound: &BoundKernel<'_>, stream: &CudaStream) -> Result<()> {
        let [x, y, z] = &mut self.0;
        let x = TensorRef::from_cudarc(stream, x, &[8])?;
        let y = TensorRef::from_cudarc(stream, y, &[8])?;
        let mut z = TensorMut::from_cudarc(stream, z, &[8])?;
        // SAFETY: the stand-in touches no memory.
        unsafe { bound.call(&[(&x).into(), (&y).into()], &[(&mut z).into()], Stream::cudarc(stream)) }
    }

    fn fill_and_read(&mut self, stream: &Arc<CudaStream>) {
        for buffer in &mut self.0 {
            stream.memset_zeros(buffer).unwrap();
            stream.clone_dtoh(buffer).unwrap();
        }
    }
}

#[test]
fn bound_calls_are_ordered_with_every_other_use() {
    with_driver("bound_calls_are_ordered_with_every_other_use", |driver| {
        let (kernel, definition) = (kernel(), definition());
        let bound = kernel.bind(&definition).unwrap();
        let context = CudaContext::new(0).unwrap();
        let [a, b, c] = std::array::from_fn(|_| context.new_stream().unwrap());
        for (place, stream) in [("the same", &a), ("another", &b), ("the null", &context.default_stream())] {
            driver.ordered(&format!("calls on {place} stream"), || {
                let mut buffers = Buffers::new(&a);
                buffers.fill_and_read(&c);
                buffers.call(&bound, stream).unwrap();
                buffers.fill_and_read(&a);
                buffers.call(&bound, stream).unwrap();
                buffers.call(&bound, &c).unwrap();
                buffers.call(&bound, stream).unwrap();
                buffers.fill_and_read(&b);
            });
        }
        assert!(driver.queued()[0] > 0);
    });
}

/// Zeros are what comes back from this driver's memory.
#[test]
fn whatever_a_runner_does_is_ordered() {
    with_driver("whatever_a_runner_does_is_ordered", |driver| {
        let (kernel, definition) = (kernel(), definition());
        let bound = kernel.bind(&definition).unwrap();
        let context = CudaContext::new(0).unwrap();
        let workload =
            Workload { axes: Axes::from([("n".to_owned(), 8)]), inputs: Named::new(), uuid: "n8".to_owned() };
        let mut zeros = |_: &Named<Input>| Ok(vec![HostTensor::zeros(DataType::Float32, &[8])?]);
        for timing in [Timing::Each, Timing::Span] {
            let (stream, before) = (context.new_stream().unwrap(), driver.queued());
            let mut config = BenchmarkConfig::default();
            (config.warmup_runs, config.iterations, config.num_trials, config.timing) = (2, 3, 2, timing);
            driver.ordered(&format!("a workload, timing {timing:?}"), || {
                let runner = Runner::on_stream(&stream).unwrap().config(config);
                // SAFETY: the stand-in touches no memory.
                let trace = unsafe { runner.run(&bound, &workload, Reference::Closure(&mut zeros)) }.unwrap();
                assert!(trace.passed(), "{trace:?}");
                // SAFETY: as above.
                let trace = unsafe { runner.run(&bound, &workload, Reference::Kernel(&bound)) }.unwrap();
                assert!(trace.passed(), "{trace:?}");
            });
            // A check, warm-ups and timed calls, twice for the trials, and once more with a reference that is a kernel, too.
            assert_eq!(driver.queued()[0] - before[0], 2 * (1 + 2 + 3) * 3);
        }
        assert_eq!(driver.live()[2], 0, "and no buffer is left");
    });
}

#[test]
fn a_runner_is_on_no_stream_that_captures() {
    with_driver("a_runner_is_on_no_stream_that_captures", |driver| {
        let stream = CudaContext::new(0).unwrap().new_stream().unwrap();
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).unwrap();
        driver.refused("a stream that captures", || Runner::on_stream(&stream));
        let other = driver.another_context().new_stream().unwrap();
        driver.refused("a context that is not the primary one", || Runner::on_stream(&other));
    });
}

#[test]
fn outputs_that_are_made_are_released_in_the_stream_s_order() {
    with_driver("outputs_that_are_made_are_released_in_the_stream_s_order", |driver| {
        let (kernel, definition) = (kernel(), definition());
        let bound = kernel.bind(&definition).unwrap();
        let stream = CudaContext::new(0).unwrap().new_stream().unwrap();
        driver.ordered("outputs of a stream's allocator", || {
            let (x, y) = (zeros::<f32>(&stream, 8), zeros::<f32>(&stream, 8));
            let (x, y) = (Tensor::from_cudarc(x, &[8]).unwrap(), Tensor::from_cudarc(y, &[8]).unwrap());
            let (inputs, allocator) = ([(&x).into(), (&y).into()], StreamAllocator::new(&stream));
            // SAFETY: the stand-in touches no memory.
            let call = || unsafe { bound.call_returning(&inputs, &allocator, Stream::cudarc(&stream)) };
            let outputs = call().unwrap();
            assert_eq!((outputs.len(), outputs[0].shape()), (1, &[8][..]));
            drop(outputs);
            drop(call().unwrap());
        });
    });
}

#[test]
fn a_tensor_for_another_stream_is_refused() {
    with_driver("a_tensor_for_another_stream_is_refused", |driver| {
        let (kernel, definition) = (kernel(), definition());
        let bound = kernel.bind(&definition).unwrap();
        let context = CudaContext::new(0).unwrap();
        let [a, b] = std::array::from_fn(|_| context.new_stream().unwrap());
        let (x, mut z) = (zeros::<f32>(&a, 8), zeros::<f32>(&a, 8));
        let before = driver.queued();
        let (here, there) =
            (TensorRef::from_cudarc(&a, &x, &[8]).unwrap(), TensorRef::from_cudarc(&b, &x, &[8]).unwrap());
        let mut z = TensorMut::from_cudarc(&a, &mut z, &[8]).unwrap();
        let (inputs, stream) = ([(&here).into(), (&there).into()], Stream::cudarc(&a));
        // SAFETY: the stand-in touches no memory.
        let error = unsafe { bound.call(&inputs, &[(&mut z).into()], stream) }.unwrap_err().to_string();
        assert!(error.contains("input \"y\"") && error.contains("a tensor for the call's stream"), "{error}");
        assert_eq!(driver.queued(), before);
    });
}
