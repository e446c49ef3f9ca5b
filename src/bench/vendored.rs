//! Kernels that this crate vendors, as solutions: a dependency `flashinfer-rs:MODULE` names one.

use super::error::unfit;
use super::json::shortened;
use super::kernel::Kernel;
use super::solution::Solution;
use crate::error::{FlashInferError, Result};
use crate::kernels::gdn::{GdnOptions, GdnTensors, WORKSPACE_SIZE, gdn_prefill};
use crate::object::{Any, Arg, Func, Tensor, with_current};
use crate::stream::{SCOPE, Setting, Stream};
use crate::tensor::{DType, Device, TensorRef};

/// A kernel under FlashInfer-Bench's convention: inputs, then outputs.
struct Row {
    module: &'static str,
    function: &'static str,
    /// What a definition's inputs and outputs are, in order.
    arguments: &'static [&'static str],
    call: fn(&[Arg<'_>]) -> Result<()>,
}

const ROWS: &[Row] = &[Row {
    module: "gdn_prefill_sm90",
    function: "gdn_prefill",
    arguments: &["q", "k", "v", "cu_seqlens", "input_state", "alpha", "beta", "scale", "output", "output_state"],
    call: prefill,
}];

impl Kernel {
    /// The kernel of this crate that a solution [names](Solution::vendored_module): `gdn_prefill` of `gdn_prefill_sm90`, which
    /// is called with a definition's `q, k, v, cu_seqlens, input_state, alpha, beta, scale` and gives `output, output_state`, and
    /// keeps [its contract](crate::kernels::gdn::gdn_prefill), on the host too. It takes its scratch memory from the call's
    /// [allocator](crate::FlashInferRuntime::with_allocator).
    ///
    /// # Errors
    /// [`Data`](FlashInferError::Data) for a solution that names none, or one that has no such form here, with those that have;
    /// and what TVM-FFI raises.
    pub fn vendored(solution: &Solution) -> Result<Self> {
        let (module, function) = (solution.vendored_module(), solution.spec.entry_symbol());
        let Some(row) = ROWS.iter().find(|row| Some(row.module) == module && row.function == function) else {
            let found = match module {
                Some(module) => format!("{:?} of {:?}", shortened(function), shortened(module)),
                None => "no dependency `flashinfer-rs:MODULE`".to_owned(),
            };
            let known: Vec<_> = ROWS.iter().map(|row| format!("{} of {}", row.function, row.module)).collect();
            return Err(unfit(
                &format!("the solution {:?}", shortened(&solution.name)),
                "its kernel",
                found,
                format!("one that is called as a solution: {}", known.join(", ")),
                "name one of these, or build the solution",
            ));
        };
        let func = Func::new(move |args| {
            if args.len() == row.arguments.len() {
                return (row.call)(args).map(|()| Any::NONE);
            }
            Err(FlashInferError::InvalidArgument {
                function: row.function,
                argument: "arguments",
                found: args.len().to_string(),
                expected: format!("{}: {}", row.arguments.len(), row.arguments.join(", ")),
            })
        })?;
        Ok(Self::of_solution(func.named(row.function), solution))
    }
}

fn prefill(args: &[Arg<'_>]) -> Result<()> {
    fn tensor<'a>(arg: &Arg<'a>) -> Result<TensorRef<'a>> {
        // SAFETY: what reads it is queued below, on the stream of the call.
        unsafe { arg.as_tensor_unordered() }
    }
    fn optional<'a>(arg: &Arg<'a>) -> Result<Option<TensorRef<'a>>> {
        if arg.is_none() { Ok(None) } else { tensor(arg).map(Some) }
    }
    let (q, k, v, cu_seqlens) = (tensor(&args[0])?, tensor(&args[1])?, tensor(&args[2])?, tensor(&args[3])?);
    let mut options = GdnOptions::default();
    (options.input_state, options.alpha, options.beta) =
        (optional(&args[4])?, optional(&args[5])?, optional(&args[6])?);
    // FlashInfer-Bench's zero is the kernel's default.
    options.scale = args[7].to::<Option<f64>>()?.filter(|scale| *scale != 0.0);
    // SAFETY: whoever makes the call lends outputs that nothing else uses.
    let (output, output_state) = unsafe { (args[8].as_tensor_mut()?, args[9].as_tensor_mut()?) };
    let device = q.device();
    let scratch = scratch(device)?;
    // SAFETY: the tensor was made a moment ago, for this call.
    let mut workspace = unsafe { scratch.as_mut() }?;
    let mut tensors = GdnTensors { output, output_state, q, k, v };
    // SAFETY: that the offsets on a GPU are such is the promise of whoever calls a bound kernel; the scratch memory is
    // released in the order of this stream.
    unsafe { gdn_prefill(&mut tensors, &cu_seqlens, &mut workspace, &options, current_stream(device)) }
}

/// Scratch memory for a call.
fn scratch(device: Device) -> Result<Tensor> {
    // The reference needs none.
    let bytes = if device == Device::Cpu { 0 } else { WORKSPACE_SIZE };
    with_current(|allocator| Tensor::allocated(allocator, device, DType::U8.to_dl(), &[bytes]))
}

/// The stream that the call was queued on.
fn current_stream(device: Device) -> Stream<'static> {
    match (SCOPE.get(), device) {
        // SAFETY: whoever made the call keeps the stream that it set, for as long as the call.
        (Setting { device: current, stream }, Device::Cuda(id)) if i64::from(current) == i64::from(id) => unsafe {
            Stream::from_raw(stream)
        },
        _ => Stream::NULL,
    }
}
