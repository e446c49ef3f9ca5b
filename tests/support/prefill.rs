//! A prefill's arguments in one place, so that a test can change one of them.
#![allow(dead_code, reason = "each test uses its own part")]

use flashinfer_rs::kernels::gdn::{GdnOptions, GdnPrefill, GdnTensors, gdn_prefill};
use flashinfer_rs::{Prepared, Result, Stream, TensorMut, TensorRef};

/// In upstream's order.
pub struct Prefill<'a> {
    pub output: TensorMut<'a>,
    pub output_state: TensorMut<'a>,
    pub q: TensorRef<'a>,
    pub k: TensorRef<'a>,
    pub v: TensorRef<'a>,
    pub cu_seqlens: TensorRef<'a>,
    pub input_state: Option<TensorRef<'a>>,
    pub alpha: Option<TensorRef<'a>>,
    pub beta: Option<TensorRef<'a>>,
    /// 0.0 for the default.
    pub scale: f64,
    pub workspace: TensorMut<'a>,
}

impl<'a> Prefill<'a> {
    fn parts(self) -> (GdnTensors<'a>, TensorRef<'a>, TensorMut<'a>, GdnOptions<'a>) {
        let Self { output, output_state, q, k, v, cu_seqlens, input_state, alpha, beta, scale, workspace } = self;
        let mut options = GdnOptions::default();
        (options.input_state, options.alpha, options.beta) = (input_state, alpha, beta);
        options.scale = (scale != 0.0).then_some(scale);
        (GdnTensors { output, output_state, q, k, v }, cu_seqlens, workspace, options)
    }

    /// # Safety
    /// As for [`gdn_prefill`].
    pub unsafe fn call(self, stream: Stream<'_>) -> Result<()> {
        let (mut tensors, cu_seqlens, mut workspace, options) = self.parts();
        // SAFETY: the caller's promise.
        unsafe { gdn_prefill(&mut tensors, &cu_seqlens, &mut workspace, &options, stream) }
    }

    pub fn prepare(self) -> Result<Prepared<GdnPrefill>> {
        let (tensors, cu_seqlens, workspace, options) = self.parts();
        Prepared::<GdnPrefill>::new(&tensors, &cu_seqlens, &workspace, &options)
    }

    /// Launches what was prepared on these tensors.
    ///
    /// # Safety
    /// As for [`gdn_prefill`].
    pub unsafe fn launch(self, prepared: &Prepared<GdnPrefill>, stream: Stream<'_>) -> Result<()> {
        let (mut tensors, cu_seqlens, mut workspace, options) = self.parts();
        // SAFETY: the caller's promise.
        unsafe { prepared.launch(&mut tensors, &cu_seqlens, &mut workspace, &options, stream) }
    }
}
