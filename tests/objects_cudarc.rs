//! Tensor objects over cudarc's buffers, and allocators on a GPU, over a driver that launches nothing and knows what is
//! ordered.

#[path = "support/native.rs"]
mod native;
#[path = "support/ordering.rs"]
mod ordering;

use std::sync::Arc;

use cudarc::driver::sys::CUstreamCaptureMode;
use cudarc::driver::{CudaContext, CudaStream};
use flashinfer_rs::kernels::norm::{NormOptions, rmsnorm};
use flashinfer_rs::object::{ArenaAllocator, HostAllocator, StreamAllocator, Tensor, TensorAllocator};
use flashinfer_rs::{
    Arg, DType, Device, FlashInferError, FlashInferRuntime, Module, Result, Stream, TensorMut, TensorRef,
};
use half::bf16;
use ordering::{Driver, with_driver, zeros};

/// How many buffers there are.
fn buffers(driver: &Driver) -> i32 {
    driver.live()[2]
}

/// The fixture's function that allocates a vector of f32 and does nothing with it, on a stream.
fn allocate(stream: &CudaStream, device_type: i64, len: i64, allocator: &dyn TensorAllocator) -> Result<Tensor> {
    let folder = tempfile::tempdir().unwrap();
    let path = native::compile("objects.c", "objects.so", &[], folder.path());
    // SAFETY: the test's own module, whose functions check what they take.
    let function = unsafe { Module::open(path) }?.function("allocate")?;
    let runtime = FlashInferRuntime::global()?;
    let args = [Arg::int(device_type), Arg::int(1), Arg::int(len)];
    // SAFETY: as above.
    runtime.on(stream, |_| runtime.with_allocator(allocator, || unsafe { function.call_any(&args) }))???.to()
}

const CUDA: i64 = 2;

#[test]
fn a_tensor_keeps_a_buffer_of_cudarc_s() {
    with_driver("a_tensor_keeps_a_buffer_of_cudarc_s", |driver| {
        let stream = CudaContext::new(0).unwrap().new_stream().unwrap();
        let before = buffers(driver);
        driver.ordered("a tensor over a buffer", || {
            let tensor = Tensor::from_cudarc(zeros::<f32>(&stream, 8), &[2, 3]).unwrap();
            assert_eq!(
                (tensor.shape(), tensor.strides(), tensor.device()),
                (&[2, 3][..], &[3, 1][..], Some(Device::Cuda(0)))
            );
            assert_eq!((tensor.dtype(), tensor.dlpack_dtype()), (Some(DType::F32), (2, 32, 1)));
            assert!(tensor.as_slice::<f32>().is_err());
            let managed = tensor.to_dlpack().unwrap();
            drop(tensor);
            assert_eq!(buffers(driver), before + 1);
            drop(managed);
            assert_eq!(buffers(driver), before);
        });
        driver.ordered("a buffer that is kept beside it", || {
            let buffer = Arc::new(zeros::<f32>(&stream, 8));
            let tensor = Tensor::from_cudarc(Arc::clone(&buffer), &[8]).unwrap();
            std::thread::spawn(move || drop(tensor)).join().unwrap();
            assert_eq!((stream.clone_dtoh(&*buffer).unwrap().len(), buffers(driver)), (8, before + 1));
        });
        driver.refused("a buffer that is too short", || Tensor::from_cudarc(zeros::<f32>(&stream, 5), &[2, 3]));
        let other = driver.another_context().new_stream().unwrap();
        driver
            .refused("a context that is not the primary one", || Tensor::from_cudarc(zeros::<f32>(&other, 6), &[2, 3]));
        assert_eq!(buffers(driver), before);
    });
}

/// A tensor forgets its owner where it crosses the boundary, and safe calls take it then for one that somebody vouched for.
#[test]
fn safe_code_is_given_no_tensor_on_a_gpu_that_nobody_orders() {
    with_driver("safe_code_is_given_no_tensor_on_a_gpu_that_nobody_orders", |driver| {
        let context = CudaContext::new(0).unwrap();
        let [a, b] = [(), ()].map(|()| context.new_stream().unwrap());
        let (mut out, input, weight) = (zeros::<bf16>(&b, 128), zeros::<bf16>(&a, 128), zeros::<bf16>(&b, 64));
        let object = Tensor::from_cudarc(zeros::<bf16>(&a, 128), &[2, 64]).unwrap();
        let tensor = TensorRef::from_cudarc(&a, &input, &[2, 64]).unwrap();
        let packed = tensor.pack();
        driver.refused("a tensor that is lent", || Arg::tensor(&packed).as_tensor());
        driver.refused("an object that is lent", || Arg::object(object.as_object()).as_tensor());
        driver.refused("an object", || object.as_ref());
        let error = object.as_ref().unwrap_err().to_string();
        assert!(error.contains("BF16[2, 64]") && error.contains("_unordered"), "{error}");
        // What would come of it.
        let unordered = driver.violations_of(|| {
            // SAFETY: nothing runs.
            let input = unsafe { object.as_ref_unordered() }.unwrap();
            let mut out = TensorMut::from_cudarc(&b, &mut out, &[2, 64]).unwrap();
            let weight = TensorRef::from_cudarc(&b, &weight, &[64]).unwrap();
            rmsnorm(&mut out, &input, &weight, &NormOptions::default(), Stream::cudarc(&b)).unwrap();
            drop(object);
        });
        assert!(!unordered.is_empty());
    });
}

#[test]
fn a_stream_allocates_in_its_order() {
    with_driver("a_stream_allocates_in_its_order", |driver| {
        driver.pools(true);
        let stream = CudaContext::new(0).unwrap().new_stream().unwrap();
        let (before, allocator) = (buffers(driver), StreamAllocator::new(&stream));
        driver.ordered("tensors of a stream", || {
            let tensor = allocate(&stream, CUDA, 1000, &allocator).unwrap();
            assert_eq!(
                (tensor.device(), tensor.shape(), buffers(driver)),
                (Some(Device::Cuda(0)), &[1000][..], before + 1)
            );
            drop(tensor);
            assert_eq!(buffers(driver), before);
            // On the host as well.
            assert_eq!(allocate(&stream, 1, 4, &allocator).unwrap().as_slice::<f32>().unwrap(), [0f32; 4]);
            drop(allocate(&stream, CUDA, 0, &allocator).unwrap());
        });
        let error = allocate(&stream.context().new_stream().unwrap(), CUDA, 4, &allocator).unwrap_err();
        assert!(error.to_string().contains("FlashInferRuntime::on"), "{error}");
        assert_eq!(buffers(driver), before);
        let error = allocate(&stream, CUDA, 4, &HostAllocator).unwrap_err();
        assert!(error.to_string().contains("cuda:0"), "{error}");
        // In a capture the memory would be the graph's.
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).unwrap();
        let error = allocate(&stream, CUDA, 4, &allocator).unwrap_err();
        assert!(matches!(&error, FlashInferError::TvmFfiCall { kind, .. } if kind == "ValueError"), "{error}");
        assert!(error.to_string().contains("captures"), "{error}");
        assert_eq!(buffers(driver), before);
    });
}

#[test]
fn an_arena_gives_each_byte_out_once_also_in_a_capture() {
    with_driver("an_arena_gives_each_byte_out_once_also_in_a_capture", |driver| {
        let stream = CudaContext::new(0).unwrap().new_stream().unwrap();
        let before = buffers(driver);
        let arena = ArenaAllocator::new(zeros::<u8>(&stream, 2048)).unwrap();
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).unwrap();
        let first = allocate(&stream, CUDA, 10, &arena).unwrap();
        let second = allocate(&stream, CUDA, 100, &arena).unwrap();
        let (start, next) = (first.as_ptr() as usize, second.as_ptr() as usize);
        assert!(start % 256 == 0 && next % 256 == 0 && next >= start + 40, "{start:#x} {next:#x}");
        assert_eq!(arena.used(), next - start + 400);
        for (len, says) in [(1000, "that are left"), (-1, "not negative")] {
            let error = allocate(&stream, CUDA, len, &arena).unwrap_err();
            assert!(error.to_string().contains(says), "{error}");
        }
        assert!(allocate(&stream, 1, 1, &arena).unwrap_err().to_string().contains("the arena's"));
        drop((arena, first));
        assert_eq!(buffers(driver), before + 1);
        drop(second);
    });
}
