//! What goes wrong on a GPU, and a long life without leaks. `FLASHINFER_RS_RUN_GPU_TESTS=1 cargo test --features cudarc
//! --test errors_gpu` runs them.
//! They are done within 400 seconds.

#[path = "support/gpu.rs"]
mod gpu;

use std::ffi::c_void;
use std::process::{Command, ExitCode};

use cudarc::driver::result;
use flashinfer_rs::kernels::gdn::{GdnOptions, GdnPrefillContext, GdnTensors, HEAD_SIZE};
use flashinfer_rs::kernels::norm::{NormOptions, Rmsnorm, gemma_rmsnorm, layernorm, rmsnorm};
use flashinfer_rs::{
    Arg, CuSeqlens, DType, Device, FlashInferError, FlashInferRuntime, LaunchGraph, Prepared, Stream, TensorMut,
    TensorRef, gemma_rmsnorm_cudarc,
};
use gpu::Gpu;
use half::bf16;

/// Set in a process that is to break its context.
const BREAK: &str = "FLASHINFER_RS_BREAK_THE_CONTEXT";
/// Whether cudarc tracks events there.
const TRACKED: &str = "FLASHINFER_RS_BREAK_TRACKED";

fn main() -> ExitCode {
    if std::env::var_os(BREAK).is_some() {
        break_the_context(&Gpu::open());
        return ExitCode::SUCCESS;
    }
    gpu::main(&[
        ("a_lost_context_is_a_typed_error_and_stays_one", lost_context),
        ("a_stale_error_from_elsewhere_is_not_blamed_on_our_kernel", stale_error),
        ("two_streams_are_ordered_by_cudarc_s_events", ordered_streams),
        ("a_million_calls_and_a_hundred_thousand_errors_leak_nothing", leaks),
    ])
}

/// Every way to reach the GPU: whichever meets the lost context first says so.
const WAYS: [&str; 5] = ["a call", "layernorm", "a prepared call", "a graph", "a prefill"];

fn lost_context(_: &Gpu) {
    let program = std::env::current_exe().unwrap();
    for first in WAYS {
        // With cudarc's event tracking another way leads to the launch than without.
        for tracked in ["tracked", "untracked"] {
            let output = Command::new(&program).env(BREAK, first).env(TRACKED, tracked).output().unwrap();
            let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            let well = output.status.success() && out.contains("as it should be");
            assert!(well, "{first} first, {tracked}: {out}{err}");
        }
    }
}

fn break_the_context(gpu: &Gpu) {
    let tracked = std::env::var(TRACKED).is_ok_and(|value| value == "tracked");
    if !tracked {
        // SAFETY: all is on one stream here.
        unsafe { gpu.context.disable_event_tracking() };
    }
    let (stream, s) = (&gpu.stream, Stream::cudarc(&gpu.stream));
    let (shape, length, options) = ([64, 4096], [4096], NormOptions::default());
    let matrix = || stream.alloc_zeros::<bf16>(64 * 4096).unwrap();
    let vector = || stream.alloc_zeros::<bf16>(4096).unwrap();
    let numbers = stream.alloc_zeros::<f32>(4096).unwrap();
    let (source, buffer) = (matrix(), vector());
    let mut outs = [matrix(), matrix(), matrix()];
    let [first, second, third] = &mut outs;
    let source = TensorRef::from_cudarc(stream, &source, &shape).unwrap();
    let weight = TensorRef::from_cudarc(stream, &buffer, &length).unwrap();
    let gamma = TensorRef::from_cudarc(stream, &numbers, &length).unwrap();
    let [mut out, mut prepared_out, mut layer_out] =
        [first, second, third].map(|out| TensorMut::from_cudarc(stream, out, &shape).unwrap());
    let prepared = Prepared::<Rmsnorm>::new(&prepared_out, &source, &weight, &options).unwrap();
    let mut graph = LaunchGraph::new(stream, (matrix(), vector(), matrix())).unwrap();
    let capture = graph.capture(|s, (input, weight, mut out)| {
        rmsnorm(&mut out.write(&shape)?, &input.read(&shape)?, &weight.read(&length)?, &options, s)
    });
    capture.unwrap();
    let (heads, states) = ([64, 1, HEAD_SIZE], [1, 1, HEAD_SIZE, HEAD_SIZE]);
    let (per_head, mut output) = (matrix(), matrix());
    let mut state = stream.alloc_zeros::<f32>((HEAD_SIZE * HEAD_SIZE) as usize).unwrap();
    let read = || TensorRef::from_cudarc(stream, &per_head, &heads).unwrap();
    let mut tensors = GdnTensors {
        output: TensorMut::from_cudarc(stream, &mut output, &heads).unwrap(),
        output_state: TensorMut::from_cudarc(stream, &mut state, &states).unwrap(),
        q: read(),
        k: read(),
        v: read(),
    };
    let sequences = CuSeqlens::from_lengths(&[64]).unwrap().to_device(stream).unwrap();
    let mut context = GdnPrefillContext::new(stream).unwrap();
    stream.synchronize().unwrap();

    // SAFETY: none: the address is nobody's. That is what this process is for.
    let nowhere =
        unsafe { TensorRef::from_raw(0x10 as *const c_void, Device::Cuda(0), DType::BF16, &shape, None) }.unwrap();
    rmsnorm(&mut out, &nowhere, &weight, &options, s).unwrap();
    stream.synchronize().unwrap_err();

    let mut reach = |way: &str| match way {
        "a call" => rmsnorm(&mut out, &source, &weight, &options, s),
        "layernorm" => layernorm(&mut layer_out, &source, &gamma, &gamma, 1e-5, s),
        "a prepared call" => prepared.launch(&mut prepared_out, &source, &weight, s),
        "a graph" => graph.launch(),
        "a prefill" => context.prefill(&mut tensors, &sequences, &GdnOptions::default()),
        other => panic!("{other}"),
    };
    let first = std::env::var(BREAK).unwrap();
    // What comes first once more: a context that is lost stays so.
    for way in [&*first, &*first].into_iter().chain(WAYS) {
        let error = reach(way).expect_err(way);
        assert!(error.is_fatal(), "{way}: {error}");
        let FlashInferError::ContextLost { device: 0, code: 700, message } = &error else { panic!("{way}: {error}") };
        assert!(message.contains("illegal memory access"), "{way}: {message}");
    }
    println!("as it should be");
    // What is left cannot be freed in order.
    std::process::exit(0);
}

fn prefill(gpu: &Gpu, context: &mut GdnPrefillContext) -> flashinfer_rs::Result<()> {
    let stream = &gpu.stream;
    let (shape, states) = ([64, 1, HEAD_SIZE], [1, 1, HEAD_SIZE, HEAD_SIZE]);
    let count = 64 * HEAD_SIZE as usize;
    let input = stream.alloc_zeros::<bf16>(count).unwrap();
    let mut output = stream.alloc_zeros::<bf16>(count).unwrap();
    let mut state = stream.alloc_zeros::<f32>((HEAD_SIZE * HEAD_SIZE) as usize).unwrap();
    let read = || TensorRef::from_cudarc(stream, &input, &shape);
    let mut tensors = GdnTensors {
        output: TensorMut::from_cudarc(stream, &mut output, &shape)?,
        output_state: TensorMut::from_cudarc(stream, &mut state, &states)?,
        q: read()?,
        k: read()?,
        v: read()?,
    };
    let sequences = CuSeqlens::from_lengths(&[64])?.to_device(stream)?;
    context.prefill(&mut tensors, &sequences, &GdnOptions::default())
}

fn stale_error(gpu: &Gpu) {
    let mut context = GdnPrefillContext::new(&gpu.stream).unwrap();
    prefill(gpu, &mut context).unwrap();
    // SAFETY: the function answers an error for a device that does not exist; the type is that of cuda_runtime_api.h.
    let code = unsafe {
        let cudart = libloading::Library::new("libcudart.so.13").unwrap();
        let set_device: libloading::Symbol<'_, unsafe extern "C" fn(i32) -> i32> =
            cudart.get(b"cudaSetDevice\0").unwrap();
        let code = set_device(12345);
        std::mem::forget(cudart);
        code
    };
    assert_ne!(code, 0, "the runtime now holds an error of this thread");
    prefill(gpu, &mut context).unwrap();
    gpu.stream.synchronize().unwrap();
}

fn ordered_streams(gpu: &Gpu) {
    let (rows, columns) = (2048, 4096);
    let other = gpu.context.new_stream().unwrap();
    let weight = gpu.stream.alloc_zeros::<bf16>(columns).unwrap();
    let ones = vec![bf16::from_f64(1.0); rows * columns];
    for _ in 0..5 {
        let input = gpu.stream.clone_htod(&ones).unwrap();
        let mut between = gpu.stream.alloc_zeros::<bf16>(rows * columns).unwrap();
        let mut out = gpu.stream.alloc_zeros::<bf16>(rows * columns).unwrap();
        let busy = gpu.occupy(&gpu.stream);
        // The second stream reads what the first writes, and only the buffer's events say so.
        gemma_rmsnorm_cudarc(&gpu.stream, &input, &weight, &mut between, rows, columns, DType::BF16, 1e-6).unwrap();
        gemma_rmsnorm_cudarc(&other, &between, &weight, &mut out, rows, columns, DType::BF16, 1e-6).unwrap();
        let found = other.clone_dtoh(&out).unwrap();
        assert!(found.iter().all(|value| value.to_f32() == 1.0), "the second stream read too early");
        drop(busy);
    }
}

/// Resident memory of the process, in bytes.
fn resident() -> i64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<i64>().unwrap() * 4096
}

fn leaks(gpu: &Gpu) {
    let stream = &gpu.stream;
    let (input, mut out) = (stream.alloc_zeros::<bf16>(64).unwrap(), stream.alloc_zeros::<bf16>(64).unwrap());
    let function = FlashInferRuntime::global().unwrap().module("norm.so").unwrap().function("rmsnorm").unwrap();
    let mut round = |calls: usize| {
        for i in 0..calls {
            gemma_rmsnorm(
                &mut TensorMut::from_cudarc(stream, &mut out, &[1, 64]).unwrap(),
                &TensorRef::from_cudarc(stream, &input, &[1, 64]).unwrap(),
                &TensorRef::from_cudarc(stream, &input, &[64]).unwrap(),
                &NormOptions::default(),
                Stream::cudarc(stream),
            )
            .unwrap();
            if i % 10 == 0 {
                // SAFETY: refused for its number of arguments.
                unsafe { function.call(&[Arg::int(1)]) }.unwrap_err();
            }
        }
        stream.synchronize().unwrap();
    };
    round(20_000);
    let (host, device) = (resident(), result::mem_get_info().unwrap().0 as i64);
    round(1_000_000);
    let (host, device) = (resident() - host, device - result::mem_get_info().unwrap().0 as i64);
    // A leak of one byte a call would show.
    assert!(host < 1 << 20 && device < 1 << 20, "host memory grew by {host} bytes, device memory by {device}");
}
