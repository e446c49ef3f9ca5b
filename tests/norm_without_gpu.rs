//! The real norm.so where there is no GPU: an empty libcuda.so.1 lets it load, and its checks answer as on a GPU.
#![cfg(all(feature = "norm", feature = "cudart"))]

#[path = "support/native.rs"]
mod native;

use std::ffi::c_void;
use std::sync::OnceLock;

use flashinfer_rs::{Arg, DType, Device, FlashInferError, FlashInferRuntime, Function, RuntimeConfig, TensorRef};

fn gemma_rmsnorm() -> &'static Function {
    static FUNCTION: OnceLock<Function> = OnceLock::new();
    FUNCTION.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        native::load(&native::compile("empty.c", "libcuda.so.1", &["-nostdlib"], folder.path()), false);
        let runtime = FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
        runtime.module("norm.so").unwrap().function("gemma_rmsnorm").unwrap()
    })
}

/// A tensor that claims to be on a GPU. Nothing reads it: each test's call fails before.
fn on_gpu(dtype: DType, shape: &[i64]) -> TensorRef<'static> {
    // SAFETY: no kernel is launched with it.
    unsafe { TensorRef::from_raw(0x1000 as *const c_void, Device::Cuda(0), dtype, shape, None) }.unwrap()
}

/// The kind and the message that the kernel raised.
fn raised(args: &[Arg<'_>]) -> (String, String) {
    // SAFETY: every call here is one that norm.so refuses before it reads memory.
    match unsafe { gemma_rmsnorm().call(args) }.unwrap_err() {
        FlashInferError::TvmFfiCall { function, kind, message, .. } => {
            assert_eq!(function, "gemma_rmsnorm");
            (kind, message)
        }
        other => panic!("{other}"),
    }
}

fn with_tensors(out: &TensorRef<'_>, input: &TensorRef<'_>, weight: &TensorRef<'_>) -> (String, String) {
    let (out, input, weight) = (out.pack(), input.pack(), weight.pack());
    raised(&[Arg::tensor(&out), Arg::tensor(&input), Arg::tensor(&weight), Arg::float(1e-6), Arg::bool(false)])
}

#[test]
fn too_few_arguments_are_answered_with_the_signature() {
    let (kind, message) = raised(&[Arg::int(1)]);
    assert_eq!(kind, "TypeError");
    assert!(
        message.contains("gemma_rmsnorm(0: DLTensor*, 1: DLTensor*, 2: DLTensor*, 3: float, 4: bool) -> void"),
        "{message}"
    );
}

#[test]
fn an_argument_of_another_type_is_named_by_its_position() {
    let (matrix, weight) = (on_gpu(DType::BF16, &[2, 64]), on_gpu(DType::BF16, &[64]));
    let (out, weight) = (matrix.pack(), weight.pack());
    let args = [Arg::tensor(&out), Arg::str(c"input"), Arg::tensor(&weight), Arg::float(1e-6), Arg::bool(false)];
    let (kind, message) = raised(&args);
    assert_eq!(kind, "TypeError");
    assert!(message.contains("argument #1") && message.contains("DLTensor*"), "{message}");
}

#[test]
fn tensors_on_the_host_are_refused() {
    let values = [0f32; 128];
    let host = TensorRef::from_slice(&values, &[2, 64]).unwrap();
    let weight = TensorRef::from_slice(&values[..64], &[64]).unwrap();
    let (_, message) = with_tensors(&host, &host, &weight);
    assert!(message.contains("input must be a CUDA tensor"), "{message}");
}

#[test]
fn another_rank_is_refused() {
    let (matrix, weight) = (on_gpu(DType::BF16, &[2, 64]), on_gpu(DType::BF16, &[64]));
    let (_, message) = with_tensors(&matrix, &weight, &weight);
    assert!(message.contains("input must be a 2D tensor"), "{message}");
    let (_, message) = with_tensors(&matrix, &matrix, &matrix);
    assert!(message.contains("weight must be a 1D tensor"), "{message}");
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let (matrix, weight) = (on_gpu(DType::BF16, &[2, 64]), on_gpu(DType::BF16, &[32]));
    let (_, message) = with_tensors(&matrix, &matrix, &weight);
    assert!(message.contains("64 vs. 32"), "{message}");
}

#[test]
fn what_cuda_itself_says_comes_through() {
    // The tensors are fine as far as the wrapper looks before it asks CUDA for the device; an element type that no
    // kernel has would be found after that, which is why our own checks look first.
    let (matrix, weight) = (on_gpu(DType::F64, &[2, 64]), on_gpu(DType::F64, &[64]));
    let (kind, message) = with_tensors(&matrix, &matrix, &weight);
    assert_eq!(kind, "RuntimeError");
    assert!(message.contains("cudaErrorInsufficientDriver (35)"), "{message}");
}

#[test]
fn where_it_was_raised_comes_along() {
    // SAFETY: refused for its number of arguments.
    let error = unsafe { gemma_rmsnorm().call(&[]) }.unwrap_err();
    let FlashInferError::TvmFfiCall { backtrace, .. } = error else { panic!("{error}") };
    assert!(backtrace.contains("File "), "{backtrace}");
}

#[test]
fn warming_up_loads_every_vendored_library_but_those_of_attention() {
    gemma_rmsnorm();
    let runtime = FlashInferRuntime::global().unwrap();
    runtime.warm_up().unwrap();
    let artifacts = runtime.artifacts();
    assert!(artifacts.iter().any(|artifact| artifact.name == "norm.so"), "{artifacts:?}");
    // Of which there are many, and a model needs a few.
    let attention = |name: &str| ["batch_", "single_", "xqa_"].iter().any(|kind| name.starts_with(kind));
    let loaded = artifacts.iter().all(|artifact| artifact.loaded_from.is_some() != attention(&artifact.name));
    assert!(loaded, "{artifacts:?}");
}
