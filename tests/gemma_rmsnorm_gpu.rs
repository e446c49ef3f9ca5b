//! gemma_rmsnorm on a GPU, against the reference. `FLASHINFER_RS_RUN_GPU_TESTS=1 cargo test --features cudarc --test
//! gemma_rmsnorm_gpu` runs them.
//! They are done within 120 seconds.

#[path = "support/data.rs"]
mod data;
#[path = "support/gpu.rs"]
mod gpu;

use std::ffi::c_void;
use std::process::ExitCode;

use cudarc::driver::{CudaSlice, DevicePtr};
use data::{Number, Random, assert_close, widened};
use flashinfer_rs::kernels::norm::{self, NormOptions};
use flashinfer_rs::{
    Arg, DType, Device, Element, FlashInferError, FlashInferRuntime, GemmaRmsNormParams, Stream, Tensor1DDesc,
    Tensor2DDesc, TensorMut, TensorRef, gemma_rmsnorm, gemma_rmsnorm_cudarc,
};
use gpu::Gpu;
use half::{bf16, f16};

fn main() -> ExitCode {
    gpu::main(&[
        ("bf16_matches_the_reference_over_shapes", |gpu| over_shapes::<bf16>(gpu, 3e-3)),
        ("f16_matches_the_reference_over_shapes", |gpu| over_shapes::<f16>(gpu, 5e-4)),
        ("raw_bits_as_u16_give_the_same_result", u16_buffers),
        ("rows_apart_are_read_and_written_in_place_and_nothing_between_them", strided_rows),
        ("output_may_be_the_input", in_place),
        ("dependent_launch_gives_the_same_result", dependent_launch),
        ("two_streams_do_not_disturb_each_other", two_streams),
        ("the_call_is_asynchronous", asynchronous),
        ("a_device_that_does_not_exist_is_an_error", no_such_device),
        ("no_rows_launch_nothing", no_rows),
        ("an_element_type_that_no_kernel_has_is_raised_by_the_kernel", wrong_dtype),
    ])
}

/// The expected result in f32.
fn expected<T: Number>(input: &[T], weight: &[T], eps: f64) -> Vec<f32> {
    let columns = weight.len() as i64;
    let shape = [input.len() as i64 / columns, columns];
    let (input, weight) = (widened(input), widened(weight));
    let mut out = vec![0f32; input.len()];
    norm::gemma_rmsnorm(
        &mut TensorMut::from_slice(&mut out, &shape).unwrap(),
        &TensorRef::from_slice(&input, &shape).unwrap(),
        &TensorRef::from_slice(&weight, &shape[1..]).unwrap(),
        &NormOptions::default().with_eps(eps),
        Stream::NULL,
    )
    .unwrap();
    out
}

fn over_shapes<T: Number>(gpu: &Gpu, tolerance: f64) {
    // Every vector width (8, 4, 2, 1), one row and many, one warp and 32, more columns than one round covers.
    let shapes =
        [(1, 8), (1, 4096), (3, 33), (5, 100), (7, 1002), (64, 3072), (99, 5376), (128, 8192), (2, 16384), (2048, 128)];
    for (i, (rows, columns)) in shapes.into_iter().enumerate() {
        let mut random = Random(i as u64);
        let (input, weight) = (random.normal::<T>(rows * columns), random.normal::<T>(columns));
        let out = run(gpu, &input, &weight, rows, columns, 1e-6);
        assert_close(&format!("{rows}x{columns}"), &widened(&out), &expected(&input, &weight, 1e-6), tolerance);
    }
}

/// Through cudarc, into memory that held NaN.
fn run<T: Number>(gpu: &Gpu, input: &[T], weight: &[T], rows: usize, columns: usize, eps: f64) -> Vec<T> {
    let stream = &gpu.stream;
    let (input, weight) = (stream.clone_htod(input).unwrap(), stream.clone_htod(weight).unwrap());
    let mut out = stream.clone_htod(&vec![T::POISON; rows * columns]).unwrap();
    gemma_rmsnorm_cudarc(stream, &input, &weight, &mut out, rows, columns, T::DTYPE, eps).unwrap();
    stream.clone_dtoh(&out).unwrap()
}

fn u16_buffers(gpu: &Gpu) {
    let (rows, columns) = (4, 256);
    let mut random = Random(3);
    let (input, weight) = (random.normal::<bf16>(rows * columns), random.normal::<bf16>(columns));
    let typed = run(gpu, &input, &weight, rows, columns, 1e-6);
    let bits = |values: &[bf16]| values.iter().map(|value| value.to_bits()).collect::<Vec<u16>>();
    let stream = &gpu.stream;
    let (input, weight) = (stream.clone_htod(&bits(&input)).unwrap(), stream.clone_htod(&bits(&weight)).unwrap());
    let mut out = stream.alloc_zeros::<u16>(rows * columns).unwrap();
    let dtype = DType::BF16;
    gemma_rmsnorm_cudarc(stream, &input, &weight, &mut out, rows, columns, dtype, 1e-6).unwrap();
    assert_eq!(stream.clone_dtoh(&out).unwrap(), bits(&typed));
}

fn matrix<T: Number>(gpu: &Gpu, buffer: &CudaSlice<T>, rows: usize, columns: usize, stride: usize) -> Tensor2DDesc {
    let (pointer, _) = buffer.device_ptr(&gpu.stream);
    Tensor2DDesc {
        ptr: pointer as *const c_void,
        rows: rows as i64,
        cols: columns as i64,
        stride_row: stride as i64,
        stride_col: 1,
        dtype: T::DTYPE,
        device_id: 0,
    }
}

fn vector<T: Number>(gpu: &Gpu, buffer: &CudaSlice<T>) -> Tensor1DDesc {
    let (pointer, _) = buffer.device_ptr(&gpu.stream);
    let ptr = pointer as *const c_void;
    Tensor1DDesc { ptr, len: buffer.len() as i64, stride: 1, dtype: T::DTYPE, device_id: 0 }
}

fn params<T: Number>(gpu: &Gpu, input: Tensor2DDesc, weight: &CudaSlice<T>, out: Tensor2DDesc) -> GemmaRmsNormParams {
    GemmaRmsNormParams::new(input, vector(gpu, weight), out, 1e-6, gpu.stream.cu_stream().cast())
}

fn strided_rows(gpu: &Gpu) {
    let (rows, columns, input_stride, out_stride) = (37, 512, 800, 520);
    let mut random = Random(4);
    let (input, weight) = (random.normal::<bf16>(rows * input_stride), random.normal::<bf16>(columns));
    let stream = &gpu.stream;
    let (input_gpu, weight_gpu) = (stream.clone_htod(&input).unwrap(), stream.clone_htod(&weight).unwrap());
    let out_gpu = stream.clone_htod(&vec![bf16::POISON; rows * out_stride]).unwrap();
    let params = params(
        gpu,
        matrix(gpu, &input_gpu, rows, columns, input_stride),
        &weight_gpu,
        matrix(gpu, &out_gpu, rows, columns, out_stride),
    );
    // SAFETY: the descriptors are those of live buffers, used by nothing else.
    unsafe { gemma_rmsnorm(&params) }.unwrap();
    let out = stream.clone_dtoh(&out_gpu).unwrap();
    let packed: Vec<bf16> = input.chunks(input_stride).flat_map(|row| &row[..columns]).copied().collect();
    let found: Vec<bf16> = out.chunks(out_stride).flat_map(|row| &row[..columns]).copied().collect();
    assert_close("rows", &widened(&found), &expected(&packed, &weight, 1e-6), 3e-3);
    let untouched =
        out.chunks(out_stride).flat_map(|row| &row[columns..]).all(|v| v.to_bits() == bf16::POISON.to_bits());
    assert!(untouched, "the kernel wrote between the rows");
}

fn in_place(gpu: &Gpu) {
    let (rows, columns) = (50, 2048);
    let mut random = Random(5);
    let (input, weight) = (random.normal::<f16>(rows * columns), random.normal::<f16>(columns));
    let stream = &gpu.stream;
    let (buffer, weight_gpu) = (stream.clone_htod(&input).unwrap(), stream.clone_htod(&weight).unwrap());
    let both = matrix(gpu, &buffer, rows, columns, columns);
    // SAFETY: the descriptors are those of live buffers; the output is the input itself.
    unsafe { gemma_rmsnorm(&params(gpu, both, &weight_gpu, both)) }.unwrap();
    let out = stream.clone_dtoh(&buffer).unwrap();
    assert_close("in place", &widened(&out), &expected(&input, &weight, 1e-6), 5e-4);
}

fn dependent_launch(gpu: &Gpu) {
    let (rows, columns) = (16, 4096);
    let mut random = Random(6);
    let (input, weight) = (random.normal::<bf16>(rows * columns), random.normal::<bf16>(columns));
    let stream = &gpu.stream;
    let (first, weight_gpu) = (stream.clone_htod(&input).unwrap(), stream.clone_htod(&weight).unwrap());
    let second = stream.alloc_zeros::<bf16>(rows * columns).unwrap();
    let plain = run(gpu, &run(gpu, &input, &weight, rows, columns, 1e-6), &weight, rows, columns, 1e-6);
    let (a, b) = (matrix(gpu, &first, rows, columns, columns), matrix(gpu, &second, rows, columns, columns));
    for (from, to) in [(a, b), (b, a)] {
        // SAFETY: the descriptors are those of live buffers; the second launch waits for the first one's result.
        unsafe { gemma_rmsnorm(&params(gpu, from, &weight_gpu, to).with_enable_pdl(true)) }.unwrap();
    }
    let chained = stream.clone_dtoh(&first).unwrap();
    assert!(chained.iter().zip(&plain).all(|(a, b)| a.to_bits() == b.to_bits()), "PDL changed the result");
}

fn two_streams(gpu: &Gpu) {
    let (rows, columns) = (512, 4096);
    let streams = [gpu.context.new_stream().unwrap(), gpu.context.new_stream().unwrap()];
    let mut random = Random(7);
    let weight = random.normal::<bf16>(columns);
    let inputs: Vec<Vec<bf16>> = streams.iter().map(|_| random.normal(rows * columns)).collect();
    let mut buffers: Vec<_> = streams
        .iter()
        .zip(&inputs)
        .map(|(stream, input)| {
            let out = stream.alloc_zeros::<bf16>(rows * columns).unwrap();
            (stream.clone_htod(input).unwrap(), stream.clone_htod(&weight).unwrap(), out)
        })
        .collect();
    for _ in 0..100 {
        for (stream, (input, weight, out)) in streams.iter().zip(&mut buffers) {
            gemma_rmsnorm_cudarc(stream, &*input, &*weight, out, rows, columns, bf16::DTYPE, 1e-6).unwrap();
        }
    }
    for ((stream, (_, _, out)), input) in streams.iter().zip(&buffers).zip(&inputs) {
        assert_close("a stream", &widened(&stream.clone_dtoh(out).unwrap()), &expected(input, &weight, 1e-6), 3e-3);
    }
}

fn asynchronous(gpu: &Gpu) {
    let (rows, columns) = (4, 1024);
    let stream = &gpu.stream;
    let (input, weight) = (stream.alloc_zeros::<bf16>(rows * columns).unwrap(), stream.alloc_zeros(columns).unwrap());
    let mut out = stream.alloc_zeros::<bf16>(rows * columns).unwrap();
    let mut call =
        || gemma_rmsnorm_cudarc(stream, &input, &weight, &mut out, rows, columns, bf16::DTYPE, 1e-6).unwrap();
    // The first call loads the kernel, which may wait.
    call();
    gpu.assert_asynchronous(stream, call);
}

fn no_such_device(gpu: &Gpu) {
    let buffer = gpu.stream.alloc_zeros::<bf16>(64).unwrap();
    for device_id in [-1, 1000, i32::MIN, i32::MAX] {
        let matrix = Tensor2DDesc { device_id, ..matrix(gpu, &buffer, 1, 64, 64) };
        let weight = Tensor1DDesc { device_id, ..vector(gpu, &buffer) };
        let params = GemmaRmsNormParams::new(matrix, weight, matrix, 1e-6, std::ptr::null_mut());
        // SAFETY: nothing is launched for a device that does not exist.
        let error = unsafe { gemma_rmsnorm(&params) }.unwrap_err();
        let FlashInferError::DeviceOutOfRange { device, count } = error else { panic!("{error}") };
        assert_eq!(device, i64::from(device_id));
        assert!(count > 0);
    }
}

fn no_rows(gpu: &Gpu) {
    let stream = &gpu.stream;
    let input = stream.alloc_zeros::<bf16>(64).unwrap();
    let mut out = stream.clone_htod(&[bf16::POISON; 64]).unwrap();
    gemma_rmsnorm_cudarc(stream, &input, &input, &mut out, 0, 64, bf16::DTYPE, 1e-6).unwrap();
    let out = stream.clone_dtoh(&out).unwrap();
    assert!(out.iter().all(|value| value.to_bits() == bf16::POISON.to_bits()));
}

fn wrong_dtype(gpu: &Gpu) {
    let buffer = gpu.stream.alloc_zeros::<f32>(64).unwrap();
    let (pointer, _) = buffer.device_ptr(&gpu.stream);
    let tensor = |shape: &[i64]| {
        // SAFETY: the buffer lives until the end of this test, and the call fails before it reads it.
        unsafe { TensorRef::from_raw(pointer as *const c_void, Device::Cuda(0), DType::F32, shape, None) }.unwrap()
    };
    let (matrix, weight) = (tensor(&[1, 64]), tensor(&[64]));
    let (matrix, weight) = (matrix.pack(), weight.pack());
    let args = [Arg::tensor(&matrix), Arg::tensor(&matrix), Arg::tensor(&weight), Arg::float(1e-6), Arg::bool(false)];
    // Around our own checks, which would find it first.
    let function = FlashInferRuntime::global().unwrap().module("norm.so").unwrap().function("gemma_rmsnorm").unwrap();
    // SAFETY: norm.so refuses f32 before it launches anything.
    let error = unsafe { function.call(&args) }.unwrap_err();
    let FlashInferError::TvmFfiCall { message, .. } = &error else { panic!("{error}") };
    assert!(message.contains("failed to dispatch data type"), "{message}");
}
