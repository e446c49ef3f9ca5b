//! Whoever is lent a prepared prefill cannot launch other offsets with it.
use flashinfer_rs::kernels::gdn::{GdnOptions, GdnPrefill, GdnTensors};
use flashinfer_rs::{Prepared, Stream, TensorMut, TensorRef};

fn launch(
    prepared: &Prepared<GdnPrefill>,
    tensors: &mut GdnTensors<'_>,
    cu_seqlens: &TensorRef<'_>,
    workspace: &mut TensorMut<'_>,
) {
    prepared.launch(tensors, cu_seqlens, workspace, &GdnOptions::default(), Stream::NULL).unwrap();
}

fn main() {}
