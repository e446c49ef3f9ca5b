//! `instructions CASE N FOLDER` makes N calls of a gemma_rmsnorm that does nothing, for counting instructions: `cargo xtask
//! bench --check` runs it, beside a C program that does the same. FOLDER holds the `norm.so` with that function and a
//! stand-in for `libcudart.so.13` that counts a GPU.

use std::error::Error;
use std::hint::black_box;
use std::path::PathBuf;

use flashinfer_rs::kernels::norm::{GemmaRmsnorm, NormOptions, gemma_rmsnorm};
use flashinfer_rs::{Arg, FlashInferError, Function, Prepared, Stream, TensorMut, TensorRef};

#[path = "support/calls.rs"]
mod calls;

use calls::DEVICE;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let [case, count, folder] = &args[..] else { return Err("expected: instructions CASE N FOLDER".into()) };
    let (count, folder): (u64, PathBuf) = (count.parse()?, folder.into());
    let runtime = calls::initialize(&folder)?;
    let (mut out, input, weight) = calls::tensors()?;
    let (options, stream) = (NormOptions::default(), calls::stream());
    match case.as_str() {
        "pack-and-call" => {
            let function = calls::function(runtime)?;
            for _ in 0..count {
                pack_and_call(&function, &mut out, &input, &weight, options.eps, options.pdl)?;
            }
        }
        "raw" => {
            let params = calls::params(options.eps);
            for _ in 0..count {
                // SAFETY: the function touches no memory.
                unsafe { flashinfer_rs::gemma_rmsnorm(black_box(&params)) }?;
            }
        }
        "tensors" => {
            for _ in 0..count {
                gemma_rmsnorm(black_box(&mut out), &input, &weight, &options, stream)?;
            }
        }
        "scope" => runtime.on((DEVICE, stream), |stream| {
            for _ in 0..count {
                gemma_rmsnorm(black_box(&mut out), &input, &weight, &options, stream)?;
            }
            Ok::<_, FlashInferError>(())
        })??,
        "prepared" | "prepared-scope" => {
            let prepared = Prepared::<GemmaRmsnorm>::new(&out, &input, &weight, &options)?;
            let mut all = |stream: Stream<'_>| {
                (0..count).try_for_each(|_| black_box(&prepared).launch(black_box(&mut out), &input, &weight, stream))
            };
            match case.as_str() {
                "prepared" => all(stream)?,
                _ => runtime.on((DEVICE, stream), all)??,
            }
        }
        other => return Err(format!("there is no case {other}").into()),
    }
    Ok(())
}

/// One call, everything packed on the stack, as the C program makes it.
#[inline(never)]
fn pack_and_call(
    function: &Function,
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    weight: &TensorRef<'_>,
    eps: f64,
    enable_pdl: bool,
) -> flashinfer_rs::Result<()> {
    let (out, input, weight) = (out.pack(), input.pack(), weight.pack());
    let args = [Arg::tensor(&out), Arg::tensor(&input), Arg::tensor(&weight), Arg::float(eps), Arg::bool(enable_pdl)];
    // SAFETY: the function takes these arguments, and touches no memory.
    unsafe { function.launch(&args) }
}
