//! The same prefill on every GPU of the machine, from a thread each; the results are compared bit by bit.
//! `cargo run --example 03_two_gpus --features cudarc`

use cudarc::driver::{CudaContext, DriverError};
use flashinfer_rs::kernels::gdn::{GdnOptions, GdnPrefillContext, GdnTensors};
use flashinfer_rs::{CuSeqlens, FlashInferRuntime, RuntimeConfig, TensorMut, TensorRef};
use half::f16;

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let runtime = FlashInferRuntime::initialize(RuntimeConfig::default())?;
    if !runtime.gpu_available() {
        return Err("this example needs a Hopper GPU, better two".into());
    }
    let count = runtime.device_count()? as usize;
    let results = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..count).map(|gpu| scope.spawn(move || prefill(gpu))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a thread")).collect::<Result<Vec<_>, _>>()
    })?;
    let same = results.iter().all(|result| *result == results[0]);
    println!("{count} GPUs, {}", if same { "the same bits" } else { "DIFFERENT BITS" });
    if same { Ok(()) } else { Err("two GPUs disagree".into()) }
}

fn prefill(gpu: usize) -> Result<Vec<u16>, Failure> {
    let stream = CudaContext::new(gpu)?.new_stream()?;
    let (tokens, shape, states) = (200, [200, 2, 128], [1, 2, 128, 128]);
    let upload = |seed: f32| -> Result<_, DriverError> {
        let values = (0..tokens * 2 * 128).map(|i| f16::from_f32((seed + i as f32 * 0.37).sin() / 8.0));
        stream.clone_htod(&values.collect::<Vec<_>>())
    };
    let (q, k, v) = (upload(1.0)?, upload(2.0)?, upload(3.0)?);
    let mut output = stream.alloc_zeros::<f16>(tokens * 2 * 128)?;
    let mut state = stream.alloc_zeros::<f32>(2 * 128 * 128)?;
    let cu_seqlens = CuSeqlens::from_lengths(&[200])?.to_device(&stream)?;
    GdnPrefillContext::new(&stream)?.prefill(
        &mut GdnTensors {
            output: TensorMut::from_cudarc(&stream, &mut output, &shape)?,
            output_state: TensorMut::from_cudarc(&stream, &mut state, &states)?,
            q: TensorRef::from_cudarc(&stream, &q, &shape)?,
            k: TensorRef::from_cudarc(&stream, &k, &shape)?,
            v: TensorRef::from_cudarc(&stream, &v, &shape)?,
        },
        &cu_seqlens,
        &GdnOptions::default(),
    )?;
    Ok(stream.clone_dtoh(&output)?.iter().map(|value| value.to_bits()).collect())
}
