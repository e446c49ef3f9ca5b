//! GDN prefill of a packed batch, one sequence of which is empty. `cargo run --example 02_gdn --features cudarc`
use cudarc::driver::CudaContext;
use flashinfer_rs::kernels::gdn::{GdnOptions, GdnPrefillContext, GdnTensors};
use flashinfer_rs::{CuSeqlens, FlashInferRuntime, RuntimeConfig, TensorMut, TensorRef};
use half::bf16;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if !FlashInferRuntime::initialize(RuntimeConfig::default())?.gpu_available() {
        return Err("this example needs a Hopper GPU".into());
    }
    let stream = CudaContext::new(0)?.new_stream()?;
    // Three sequences; two query and key heads serve four value heads; the head size is 128.
    let cu_seqlens = CuSeqlens::from_lengths(&[100, 0, 28])?;
    let (tokens, qk, v, states) = (128, [128, 2, 128], [128, 4, 128], [3, 4, 128, 128]);
    let fill = |n: usize| (0..n).map(|i| bf16::from_f32((i as f32 * 0.7).sin() / 8.0)).collect::<Vec<_>>();
    let (q_k, values) = (stream.clone_htod(&fill(tokens * 2 * 128))?, stream.clone_htod(&fill(tokens * 4 * 128))?);
    let decay = stream.clone_htod(&vec![0.99f32; tokens * 4])?;
    let mut output = stream.alloc_zeros::<bf16>(tokens * 4 * 128)?;
    let mut state = stream.alloc_zeros::<f32>(3 * 4 * 128 * 128)?;

    // One context for each stream: it owns the workspace.
    let mut context = GdnPrefillContext::new(&stream)?;
    let mut tensors = GdnTensors {
        output: TensorMut::from_cudarc(&stream, &mut output, &v)?,
        output_state: TensorMut::from_cudarc(&stream, &mut state, &states)?,
        q: TensorRef::from_cudarc(&stream, &q_k, &qk)?,
        k: TensorRef::from_cudarc(&stream, &q_k, &qk)?,
        v: TensorRef::from_cudarc(&stream, &values, &v)?,
    };
    // alpha is linear: a factor, not its logarithm.
    let options = GdnOptions::default().with_alpha(TensorRef::from_cudarc(&stream, &decay, &v[..2])?);
    context.prefill(&mut tensors, &cu_seqlens.to_device(&stream)?, &options)?;
    println!("{:.4?} …", &stream.clone_dtoh(&output)?[..4]);
    Ok(())
}
