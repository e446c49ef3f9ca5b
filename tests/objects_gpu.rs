//! Tensor objects on a GPU: FlashInfer's own kernels take them, and allocators serve what asks for memory there.

#[path = "support/gpu.rs"]
mod gpu;
#[path = "support/native.rs"]
mod native;

use std::process::ExitCode;
use std::sync::Arc;

use flashinfer_rs::object::{StreamAllocator, Tensor};
use flashinfer_rs::{Arg, Device, FlashInferRuntime, Module};
use gpu::Gpu;
use half::bf16;

fn main() -> ExitCode {
    gpu::main(&[
        ("a_kernel_takes_tensor_objects_over_cudarc_s_buffers", kernels),
        ("what_a_function_allocates_is_there_on_its_stream", allocators),
    ])
}

fn kernels(gpu: &Gpu) {
    let (stream, runtime) = (&gpu.stream, FlashInferRuntime::global().unwrap());
    let ones = vec![bf16::ONE; 4 * 64];
    let input = Tensor::from_cudarc(stream.clone_htod(&ones).unwrap(), &[4, 64]).unwrap();
    let weight = Tensor::from_cudarc(stream.clone_htod(&vec![bf16::from_f32(0.5); 64]).unwrap(), &[64]).unwrap();
    let buffer = Arc::new(stream.alloc_zeros::<bf16>(4 * 64).unwrap());
    let out = Tensor::from_cudarc(Arc::clone(&buffer), &[4, 64]).unwrap();
    let function = runtime.module("norm.so").unwrap().function("gemma_rmsnorm").unwrap();
    let norm = function.typed::<(&Tensor, &Tensor, &Tensor, f64, bool), ()>();
    // SAFETY: the shapes and types are the kernel's, and all is done on one stream.
    runtime.on(stream, |_| unsafe { norm.call((&out, &input, &weight, 1e-6, false)) }).unwrap().unwrap();
    drop((input, weight, out));
    let values = stream.clone_dtoh(&*buffer).unwrap();
    assert!(values.iter().all(|value| (value.to_f32() - 1.5).abs() < 0.01), "{values:?}");
}

fn allocators(gpu: &Gpu) {
    let (stream, runtime) = (&gpu.stream, FlashInferRuntime::global().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let path = native::compile("objects.c", "objects.so", &[], folder.path());
    // SAFETY: the test's own module, whose functions check what they take.
    let function = unsafe { Module::open(path) }.unwrap().function("allocate").unwrap();
    let allocator = StreamAllocator::new(stream);
    for len in [0, 1, 1 << 20] {
        let args = [Arg::int(2), Arg::int(1), Arg::int(len)];
        // SAFETY: as above.
        let made = runtime.on(stream, |_| runtime.with_allocator(&allocator, || unsafe { function.call_any(&args) }));
        let tensor: Tensor = made.unwrap().unwrap().unwrap().to().unwrap();
        assert_eq!((tensor.device(), tensor.shape()), (Some(Device::Cuda(0)), &[len][..]));
    }
    stream.synchronize().unwrap();
}
