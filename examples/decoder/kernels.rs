//! Which of FlashInfer's kernels compute attention on a GPU.

#[cfg(feature = "cudarc")]
use flashinfer_rs::FlashInferError;
#[cfg(feature = "cudarc")]
use flashinfer_rs::compute::{AttentionKernel, AttentionKernels, Buckets, Graph, GraphError};
#[cfg(feature = "cudarc")]
use flashinfer_rs::matmul::Selections;

#[cfg(feature = "cudarc")]
#[cfg(feature = "cudarc")]
use crate::device::Gpu;
#[cfg(feature = "cudarc")]
use crate::fault::Fault;
#[cfg(feature = "cudarc")]
use crate::session::Launch;

/// What the command line says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(not(feature = "cudarc"), allow(dead_code, reason = "there is no GPU then"))]
pub struct Kernels {
    pub decode: Decode,
    pub prefill: Prefill,
}

/// What decodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decode {
    Xqa,
    BatchDecode,
}

/// What computes a prompt's attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prefill {
    /// The fastest that is there: FA3, FA2, else what decodes.
    Auto,
    /// What decodes, for which each of a prompt's tokens is a row of its own.
    Rows,
    Fa2,
    Fa3,
}

/// A graph's GPU for these buckets, of which the largest is that of prompts and the others decode. Of kernels that are not there the
/// next is tried, where nothing was said; which it is in the end, a line says.
#[cfg(feature = "cudarc")]
pub fn gpu(graph: &Graph, buckets: &Buckets, launch: Launch, kernels: Kernels) -> Result<Gpu, Fault> {
    let decode = match kernels.decode {
        Decode::Xqa => AttentionKernel::Xqa,
        Decode::BatchDecode => AttentionKernel::BatchDecode,
    };
    // The same bucket cannot have another kernel for prompts.
    let own = buckets.sizes().len() > 1;
    let wanted = match kernels.prefill {
        Prefill::Auto if own => &[AttentionKernel::Fa3, AttentionKernel::Fa2][..],
        Prefill::Fa3 if own => &[AttentionKernel::Fa3],
        Prefill::Fa2 if own => &[AttentionKernel::Fa2],
        _ => &[],
    };
    if !own && matches!(kernels.prefill, Prefill::Fa2 | Prefill::Fa3) {
        let rows = buckets.largest();
        println!("prompts go by {decode:?}: they have no bucket of their own; say --rows of more than {rows}");
    }
    let mut selections = Selections::new();
    for &kernel in wanted {
        let with = AttentionKernels::new(decode).from_rows(buckets.largest(), kernel);
        match Gpu::with_attention(graph, buckets, launch, with, &mut selections) {
            Err(error) if kernels.prefill == Prefill::Auto && is_missing(&error) => {
                let why = match error {
                    FlashInferError::ArtifactMissing { .. } => "its module was not vendored".to_owned(),
                    other => other.to_string(),
                };
                println!("prompts do not go by {kernel:?}: {why}");
            }
            made => return Ok(made?),
        }
    }
    if !wanted.is_empty() {
        println!("prompts go by {decode:?}, each of their tokens as a row");
    }
    Ok(Gpu::with_attention(graph, buckets, launch, AttentionKernels::new(decode), &mut selections)?)
}

/// Whether another kernel may be there.
#[cfg(feature = "cudarc")]
fn is_missing(error: &FlashInferError) -> bool {
    match error {
        FlashInferError::ArtifactMissing { .. } | FlashInferError::LoadFailed { .. } => true,
        FlashInferError::ComputeGraph(error) => matches!(**error, GraphError::UnsupportedKernel { .. }),
        _ => false,
    }
}
