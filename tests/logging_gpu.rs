//! Logs and dumps of calls on a GPU. `FLASHINFER_RS_RUN_GPU_TESTS=1 cargo test --features cudarc --test logging_gpu` runs them.
//! They are done within 60 seconds. Each makes its calls in a process of its own, which the environment asks for a log.

#[path = "support/gpu.rs"]
mod gpu;
#[path = "support/native.rs"]
mod native;

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};
use flashinfer_rs::kernels::norm::{NormOptions, gemma_rmsnorm, rmsnorm};
use flashinfer_rs::log::Dump;
use flashinfer_rs::{LaunchGraph, Stream, TensorMut, TensorRef};
use gpu::Gpu;
use half::bf16;

fn main() -> ExitCode {
    gpu::main(&[
        ("what_device_tensors_hold_is_logged", statistics),
        ("captured_calls_are_logged_when_they_are_captured_without_what_tensors_hold", captured),
        ("a_stream_that_somebody_else_captures_is_left_alone", captured_by_others),
        ("dumps_of_a_gpu_are_made_again_there_and_on_the_host", dumps),
        ("without_a_log_nothing_waits_for_the_stream", asynchronous),
    ])
}

/// Runs `body` in a process of its own with these variables and a log in a file: the log. None in that process.
fn logged(name: &str, variables: &[(&str, &Path)], body: impl FnOnce()) -> Option<String> {
    if native::in_its_process(name) {
        body();
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("log");
    let variables: Vec<_> = [&[("FLASHINFER_RS_LOGDEST", file.as_path())], variables].concat();
    // With the libraries' folder that this process was told, where it was told one.
    let lib = std::env::var_os("FLASHINFER_RS_LIB_DIR").unwrap_or_default();
    let variables = [&variables[..], &[("FLASHINFER_RS_LIB_DIR", Path::new(&lib))]].concat();
    let output = native::again(&std::env::current_exe().unwrap(), name, &variables);
    let text = native::text(&output);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    Some(fs::read_to_string(file).unwrap_or_default())
}

const SHAPE: [i64; 2] = [4, 256];

/// Rows of 2, but for a NaN at the end of the last.
fn input(stream: &Arc<CudaStream>) -> CudaSlice<bf16> {
    let mut values = vec![bf16::from_f32(2.0); 4 * 256];
    values[4 * 256 - 1] = bf16::NAN;
    stream.clone_htod(&values).unwrap()
}

fn statistics(gpu: &Gpu) {
    let name = "what_device_tensors_hold_is_logged";
    let Some(log) = logged(name, &[("FLASHINFER_RS_LOGLEVEL", Path::new("5"))], || {
        let stream = &gpu.stream;
        let (input, weight) = (input(stream), stream.clone_htod(&vec![bf16::ONE; 256]).unwrap());
        let mut out = stream.alloc_zeros::<bf16>(4 * 256).unwrap();
        // The first halves of the rows, which lie apart.
        let strides = [256, 1];
        gemma_rmsnorm(
            &mut TensorMut::from_cudarc_strided(stream, &mut out, &[4, 128], &strides).unwrap(),
            &TensorRef::from_cudarc_strided(stream, &input, &[4, 128], &strides).unwrap(),
            &TensorRef::from_cudarc(stream, &weight, &[128]).unwrap(),
            &NormOptions::default(),
            Stream::cudarc(stream),
        )
        .unwrap();
        rmsnorm(
            &mut TensorMut::from_cudarc(stream, &mut out, &SHAPE).unwrap(),
            &TensorRef::from_cudarc(stream, &input, &SHAPE).unwrap(),
            &TensorRef::from_cudarc(stream, &weight, &SHAPE[1..]).unwrap(),
            &NormOptions::default(),
            Stream::cudarc(stream),
        )
        .unwrap();
    }) else {
        return;
    };
    let (gemma, plain) = log.split_once("API Call: rmsnorm #2").unwrap();
    let twos = "min=2.000000, max=2.000000, mean=2.000000";
    assert!(gemma.contains("stride=(256, 1), dtype=BF16, device=cuda:0"), "{log}");
    assert!(gemma.contains(&format!("  input= {twos}, nan_count=0, inf_count=0")), "{log}");
    assert!(
        gemma.contains("Return: gemma_rmsnorm #1\n  out= min=2.000000, max=2.000000, mean=2.000000, nan_count=0"),
        "{log}"
    );
    assert!(plain.contains(&format!("  input= {twos}, nan_count=1, inf_count=0")), "{log}");
    // The row with the NaN is NaN, the others ones.
    assert!(plain.contains("  out= min=1.000000, max=1.000000, mean=1.000000, nan_count=256, inf_count=0"), "{log}");
}

fn captured(gpu: &Gpu) {
    let name = "captured_calls_are_logged_when_they_are_captured_without_what_tensors_hold";
    let folder = tempfile::tempdir().unwrap();
    let variables = [("FLASHINFER_RS_LOGLEVEL", Path::new("5")), ("FLASHINFER_RS_DUMP_DIR", folder.path())];
    let Some(log) = logged(name, &variables, || {
        let stream = &gpu.stream;
        let weight = Arc::new(stream.clone_htod(&vec![bf16::ONE; 256]).unwrap());
        let buffers = (input(stream), stream.alloc_zeros::<bf16>(4 * 256).unwrap(), weight);
        let mut graph = LaunchGraph::new(stream, buffers).unwrap();
        graph
            .capture(|s, (input, mut out, weight)| {
                let (input, weight) = (input.read(&SHAPE)?, weight.read(&SHAPE[1..])?);
                rmsnorm(&mut out.write(&SHAPE)?, &input, &weight, &NormOptions::default(), s)
            })
            .unwrap();
        assert_eq!(graph.nodes(), 1);
        for _ in 0..3 {
            graph.launch().unwrap();
        }
        let (_, out, _) = graph.into_buffers().unwrap();
        assert_eq!(stream.clone_dtoh(&out).unwrap()[0], bf16::ONE);
    }) else {
        return;
    };
    assert!(log.contains("API Call: rmsnorm #1 (captured into a graph)\n"), "{log}");
    assert_eq!(log.matches("API Call").count(), 1, "{log}");
    assert!(log.contains("  no statistics: a graph is captured\n") && !log.contains("min="), "{log}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// Raw tensors on a stream that cudarc captures: neither the log nor a dump may wait for it.
fn captured_by_others(gpu: &Gpu) {
    use cudarc::driver::DevicePtr;
    use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
    use flashinfer_rs::{DType, Device};

    let name = "a_stream_that_somebody_else_captures_is_left_alone";
    let Some(log) = logged(name, &[("FLASHINFER_RS_LOGLEVEL", Path::new("5"))], || {
        let stream = &gpu.stream;
        let (input, weight) = (input(stream), stream.clone_htod(&vec![bf16::ONE; 256]).unwrap());
        let out = stream.alloc_zeros::<bf16>(4 * 256).unwrap();
        let address = |buffer: &CudaSlice<bf16>| {
            let (address, guard) = buffer.device_ptr(stream);
            std::mem::forget(guard);
            address as *mut std::ffi::c_void
        };
        let [input_at, weight_at, out_at] = [&input, &weight, &out].map(address);
        stream.synchronize().unwrap();
        // SAFETY: the buffers live until the graph has run, and nothing else uses them.
        let call = || unsafe {
            let read = |at, shape: &[i64]| TensorRef::from_raw(at, Device::Cuda(0), DType::BF16, shape, None).unwrap();
            let mut out = TensorMut::from_raw(out_at, Device::Cuda(0), DType::BF16, &SHAPE, None).unwrap();
            let stream = Stream::from_raw(stream.cu_stream().cast());
            let (input, weight) = (read(input_at, &SHAPE), read(weight_at, &SHAPE[1..]));
            rmsnorm(&mut out, &input, &weight, &NormOptions::default(), stream)
        };
        call().unwrap();
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
        let result = call();
        let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("the capture is valid");
        result.unwrap();
        graph.launch().unwrap();
        stream.synchronize().unwrap();
        assert_eq!(stream.clone_dtoh(&out).unwrap()[0], bf16::ONE);
    }) else {
        return;
    };
    let (plain, captured) = log.split_once("API Call: rmsnorm #2 (captured into a graph)\n").expect(&log);
    assert!(plain.contains("  input= min=2.000000"), "{log}");
    assert!(captured.contains("  no statistics: a graph is captured\n") && !captured.contains("min="), "{log}");
}

fn dumps(gpu: &Gpu) {
    let folder = tempfile::tempdir().unwrap();
    let name = "dumps_of_a_gpu_are_made_again_there_and_on_the_host";
    let Some(_) = logged(name, &[("FLASHINFER_RS_DUMP_DIR", folder.path())], || {
        let stream = &gpu.stream;
        let values: Vec<bf16> = (0..4 * 256).map(|i| bf16::from_f32((i % 13) as f32 - 6.0)).collect();
        let (input, weight) = (stream.clone_htod(&values).unwrap(), stream.clone_htod(&values[..256]).unwrap());
        let mut out = stream.alloc_zeros::<bf16>(4 * 256).unwrap();
        rmsnorm(
            &mut TensorMut::from_cudarc(stream, &mut out, &SHAPE).unwrap(),
            &TensorRef::from_cudarc(stream, &input, &SHAPE).unwrap(),
            &TensorRef::from_cudarc(stream, &weight, &SHAPE[1..]).unwrap(),
            &NormOptions::default(),
            Stream::cudarc(stream),
        )
        .unwrap();
    }) else {
        return;
    };
    let found: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    let [path] = &found[..] else { panic!("{found:?}") };
    let dump = Dump::open(path).unwrap();
    assert_eq!((dump.kernel(), dump.device()), ("rmsnorm", "cuda:0"));
    // SAFETY: the call above was sound, and nobody changed its dump.
    let replay = unsafe { dump.replay_on_gpu(0) }.unwrap();
    assert!(replay.matches() && replay.outputs.as_ref().unwrap()[0].changed == 0, "{replay}");
    let replay = dump.replay().unwrap();
    assert!(replay.matches(), "{replay}");
    // One element of the output, which is at the file's end.
    let outputs = path.join("outputs.safetensors");
    let mut bytes = fs::read(&outputs).unwrap();
    let end = bytes.len() - 2;
    bytes[end..].copy_from_slice(&bf16::from_f32(77.0).to_le_bytes());
    fs::write(&outputs, bytes).unwrap();
    // SAFETY: as above, of the inputs.
    let replay = unsafe { Dump::open(path).unwrap().replay_on_gpu(0) }.unwrap();
    assert!(!replay.matches() && replay.outputs.as_ref().unwrap()[0].different == 1, "{replay}");
}

fn asynchronous(gpu: &Gpu) {
    let name = "without_a_log_nothing_waits_for_the_stream";
    let body = || {
        let stream = &gpu.stream;
        let (input, weight) = (input(stream), stream.clone_htod(&vec![bf16::ONE; 256]).unwrap());
        let mut out = stream.alloc_zeros::<bf16>(4 * 256).unwrap();
        let mut call = || {
            rmsnorm(
                &mut TensorMut::from_cudarc(stream, &mut out, &SHAPE).unwrap(),
                &TensorRef::from_cudarc(stream, &input, &SHAPE).unwrap(),
                &TensorRef::from_cudarc(stream, &weight, &SHAPE[1..]).unwrap(),
                &NormOptions::default(),
                Stream::cudarc(stream),
            )
            .unwrap();
        };
        call();
        gpu.assert_asynchronous(stream, call);
    };
    // Arguments are written without a look at the memory, too.
    for level in ["0", "3"] {
        let Some(_) = logged(name, &[("FLASHINFER_RS_LOGLEVEL", Path::new(level))], body) else { return };
    }
}
