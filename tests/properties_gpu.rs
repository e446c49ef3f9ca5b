//! Random shapes, strides, options and element types against the reference, for every kernel. `FLASHINFER_RS_RUN_GPU_TESTS=1
//! cargo test --features cudarc --test properties_gpu` runs them; a failure is shrunk and printed.
//! They are done within 500 seconds.

#[path = "support/data.rs"]
mod data;
#[path = "support/gpu.rs"]
mod gpu;
#[path = "support/rows.rs"]
mod rows;

use std::process::ExitCode;

use data::{Number, Random, relative_error, widened};
use flashinfer_rs::kernels::activation::{ActivationOptions, gelu_and_mul, gelu_tanh_and_mul, silu_and_mul};
use flashinfer_rs::kernels::decode::{self, Among, DecodeOptions, Step};
use flashinfer_rs::kernels::gdn::{GdnOptions, GdnPrefillContext, GdnTensors, HEAD_SIZE, gdn_prefill};
use flashinfer_rs::kernels::norm::{
    NormOptions, fused_add_rmsnorm, fused_add_rmsnorm_quant, gemma_fused_add_rmsnorm, gemma_rmsnorm, layernorm,
    rmsnorm, rmsnorm_quant,
};
use flashinfer_rs::kernels::quantization::{BitOrder, packbits};
use flashinfer_rs::kernels::sampling::{
    ChainTensors, SamplingOptions, chain_speculative_sampling, min_p_sampling_from_probs, sampling_from_logits,
    sampling_from_probs, softmax, top_k_mask_logits, top_k_renorm_probs, top_k_sampling_from_probs,
    top_k_top_p_sampling_from_probs, top_p_renorm_probs, top_p_sampling_from_probs,
};
use flashinfer_rs::kernels::topk::{radix_topk, radix_topk_page_table_transform, radix_topk_ragged_transform};
use flashinfer_rs::{
    CuSeqlens, MinP, Parameter, PerRow, Philox, Placed, Setting, Stream, Temperature, TensorMut, TensorRef, TopK, TopP,
};
use gpu::Gpu;
use half::{bf16, f16};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};

fn main() -> ExitCode {
    gpu::main(&[
        ("norms_of_any_rows_match", |gpu| check(400, &norms(), |case| norm(gpu, case))),
        ("fused_norms_of_any_rows_match", |gpu| check(200, &norms(), |case| fused(gpu, case))),
        ("layernorms_of_any_rows_match", |gpu| check(150, &norms(), |case| layer(gpu, case))),
        ("prefills_of_any_batch_match", |gpu| check(120, &prefills(), |case| prefill(gpu, case))),
        ("calls_that_keep_their_row_match", |gpu| {
            CALLS.iter().for_each(|&(kernel, call)| rows::valid(gpu, rows::row(kernel), 60, call));
        }),
        ("calls_that_break_their_row_in_one_place_are_refused_by_name", |gpu| {
            CALLS.iter().chain(UNORDERED).for_each(|&(kernel, call)| rows::invalid(gpu, rows::row(kernel), 200, call));
        }),
        ("sizes_that_break_a_relation_are_refused_by_name", |_| {
            CALLS.iter().chain(UNORDERED).for_each(|&(kernel, call)| rows::limits(rows::row(kernel), 2000, call));
        }),
    ])
}

/// How each kernel is called whose calls are made of its row.
const CALLS: &[(&str, rows::Function)] = &[
    ("rmsnorm", |call, s| {
        let (weight, options) = (call.read("weight"), norm_options(call));
        rmsnorm(&mut call.write("out"), &call.read("input"), &weight, &options, s)
    }),
    ("rmsnorm of heads", |call, s| {
        let (weight, options) = (call.read("weight"), norm_options(call));
        rmsnorm(&mut call.write("out"), &call.read("input"), &weight, &options, s)
    }),
    ("gemma_rmsnorm", |call, s| {
        let (weight, options) = (call.read("weight"), norm_options(call));
        gemma_rmsnorm(&mut call.write("out"), &call.read("input"), &weight, &options, s)
    }),
    ("fused_add_rmsnorm", |call, s| {
        let (weight, options) = (call.read("weight"), norm_options(call));
        fused_add_rmsnorm(&mut call.write("input"), &mut call.write("residual"), &weight, &options, s)
    }),
    ("gemma_fused_add_rmsnorm", |call, s| {
        let (weight, options) = (call.read("weight"), norm_options(call));
        gemma_fused_add_rmsnorm(&mut call.write("input"), &mut call.write("residual"), &weight, &options, s)
    }),
    ("rmsnorm_quant", |call, s| {
        let (weight, scale, options) = (call.read("weight"), call.number("scale"), norm_options(call));
        rmsnorm_quant(&mut call.write("out"), &call.read("input"), &weight, scale, &options, s)
    }),
    ("fused_add_rmsnorm_quant", |call, s| {
        let (weight, scale, options) = (call.read("weight"), call.number("scale"), norm_options(call));
        let (mut out, input, mut residual) = (call.write("out"), call.read("input"), call.write("residual"));
        fused_add_rmsnorm_quant(&mut out, &input, &mut residual, &weight, scale, &options, s)
    }),
    ("layernorm", |call, s| {
        let (gamma, beta, eps) = (call.read("gamma"), call.read("beta"), call.number("eps"));
        layernorm(&mut call.write("out"), &call.read("input"), &gamma, &beta, eps, s)
    }),
    ("gdn_prefill", |call, s| {
        let mut options = GdnOptions::default();
        options.input_state = call.optional("input_state");
        options.alpha = call.optional("alpha");
        options.beta = call.optional("beta");
        options.scale = Some(call.number("scale")).filter(|scale| *scale != 0.0);
        let mut tensors = GdnTensors {
            output: call.write("output"),
            output_state: call.write("output_state"),
            q: call.read("q"),
            k: call.read("k"),
            v: call.read("v"),
        };
        let (offsets, mut workspace) = (call.read("cu_seqlens"), call.write("workspace"));
        // SAFETY: the offsets are those that the row says: from 0, increasing, up to the number of tokens; the workspace is
        // this call's own.
        unsafe { gdn_prefill(&mut tensors, &offsets, &mut workspace, &options, s) }
    }),
    ("silu_and_mul", |call, s| {
        let options = activation_options(call);
        silu_and_mul(&mut call.write("out"), &call.read("input"), &options, s)
    }),
    ("gelu_and_mul", |call, s| {
        let options = activation_options(call);
        gelu_and_mul(&mut call.write("out"), &call.read("input"), &options, s)
    }),
    ("gelu_tanh_and_mul", |call, s| {
        let options = activation_options(call);
        gelu_tanh_and_mul(&mut call.write("out"), &call.read("input"), &options, s)
    }),
    ("embedding", |call, s| {
        let (ids, table, scale) = (call.read("ids"), call.read("table"), call.number("scale"));
        decode::embedding(&mut call.write("out"), &ids, &table, scale, &decode_options(call), s)
    }),
    ("add", |call, s| decode::add(&mut call.write("a"), &call.read("b"), &decode_options(call), s)),
    ("mul", |call, s| decode::mul(&mut call.write("a"), &call.read("b"), &decode_options(call), s)),
    ("sigmoid_gate", |call, s| decode::sigmoid_gate(&mut call.write("a"), &call.read("b"), &decode_options(call), s)),
    ("silu", |call, s| decode::silu(&mut call.write("a"), &decode_options(call), s)),
    ("copy", |call, s| decode::copy(&mut call.write("out"), &call.read("input"), &decode_options(call), s)),
    ("softmax_rows", |call, s| {
        decode::softmax_rows(&mut call.write("a"), call.number("temperature"), &decode_options(call), s)
    }),
    ("argmax", |call, s| decode::argmax(&mut call.write("token"), &call.read("logits"), &decode_options(call), s)),
    ("advance", |call, s| {
        let (token, capacity) = (call.read("token"), call.whole("capacity"));
        let (ids, positions, lengths) = (call.write("ids"), call.write("positions"), call.write("lengths"));
        decode::advance(&token, &mut Step { ids, positions, lengths }, capacity, &decode_options(call), s)
    }),
    ("sample", |call, s| {
        let among = Among::new(call.whole("top_k").try_into().unwrap(), call.number("top_p"));
        let (probs, number) = (call.read("probs"), call.read("number"));
        decode::sample(&mut call.write("token"), &probs, &number, among, &decode_options(call), s)
    }),
    ("packbits", |call, s| {
        let order = if call.word("bitorder") == c"big" { BitOrder::Big } else { BitOrder::Little };
        packbits(&mut call.write("y"), &call.read("x"), order, s)
    }),
    ("softmax", softmax_of),
    ("softmax of temperatures", softmax_of),
    ("sampling_from_probs", |call, s| {
        let (mut philox, options) = (philox(call), sampling_options(call));
        // SAFETY: the rows are positive numbers, as the row's contents are, here and below.
        unsafe { sampling_from_probs(&mut call.write("output"), &call.read("probs"), &mut philox, &options, s) }
    }),
    ("sampling_from_logits", |call, s| {
        let (mut philox, options) = (philox(call), sampling_options(call));
        // SAFETY: as above.
        unsafe { sampling_from_logits(&mut call.write("output"), &call.read("logits"), &mut philox, &options, s) }
    }),
    ("top_k_sampling_from_probs", |call, s| {
        let (mut philox, options, top_k) = (philox(call), sampling_options(call), top_k(call));
        let (mut output, probs) = (call.write("output"), call.read("probs"));
        // SAFETY: as above.
        unsafe { top_k_sampling_from_probs(&mut output, &probs, top_k.setting(), &mut philox, &options, s) }
    }),
    ("top_p_sampling_from_probs", |call, s| {
        let (mut philox, options, top_p) = (philox(call), sampling_options(call), top_p(call));
        let (mut output, probs) = (call.write("output"), call.read("probs"));
        // SAFETY: as above.
        unsafe { top_p_sampling_from_probs(&mut output, &probs, top_p.setting(), &mut philox, &options, s) }
    }),
    ("min_p_sampling_from_probs", |call, s| {
        let (mut philox, options, all) = (philox(call), sampling_options(call), call.number("min_p") as f32);
        let min_p = Own::<MinP>::of(call, "min_p_arr", all);
        let (mut output, probs) = (call.write("output"), call.read("probs"));
        // SAFETY: as above.
        unsafe { min_p_sampling_from_probs(&mut output, &probs, min_p.setting(), &mut philox, &options, s) }
    }),
    ("top_k_top_p_sampling_from_probs", |call, s| {
        let (mut philox, options, top_k, top_p) = (philox(call), sampling_options(call), top_k(call), top_p(call));
        let (mut output, probs) = (call.write("output"), call.read("probs"));
        let (top_k, top_p) = (top_k.setting(), top_p.setting());
        // SAFETY: as above.
        unsafe { top_k_top_p_sampling_from_probs(&mut output, &probs, top_k, top_p, &mut philox, &options, s) }
    }),
    ("top_p_renorm_probs", |call, s| {
        let top_p = top_p(call);
        // SAFETY: as above.
        unsafe { top_p_renorm_probs(&mut call.write("renorm_probs"), &call.read("probs"), top_p.setting(), s) }
    }),
    ("top_k_renorm_probs", top_k_renorm),
    ("top_k_mask_logits", top_k_mask),
    ("chain_speculative_sampling", |call, s| {
        let (mut philox, options) = (philox(call), sampling_options(call));
        let mut tensors = ChainTensors {
            draft_probs: call.write("draft_probs"),
            draft_token_ids: call.read("draft_token_ids"),
            target_probs: call.write("target_probs"),
            output_token_ids: call.write("output_token_ids"),
            output_accepted_token_num: call.write("output_accepted_token_num"),
            output_emitted_draft_token_num: call.write("output_emitted_draft_token_num"),
        };
        // SAFETY: as above; the drafts are tokens.
        unsafe { chain_speculative_sampling(&mut tensors, &mut philox, &options, s) }
    }),
];

/// What a call has for a parameter of sampling: one number, and perhaps an array.
struct Own<'a, P: Parameter> {
    all: P::Value,
    rows: Option<Placed<'a, PerRow<P>>>,
}

impl<'a, P: Parameter> Own<'a, P> {
    fn of(call: &mut rows::Call<'a>, array: &str, all: P::Value) -> Self {
        // SAFETY: numbers that are allowed, as the row's contents are.
        let rows = call.optional(array).map(|rows| unsafe { Placed::<PerRow<P>>::from_tensor(rows) });
        Self { all, rows }
    }

    /// The array where there is one; a number that is not allowed in any case, so that it is seen to be refused.
    fn setting(&self) -> Setting<'_, P> {
        match &self.rows {
            Some(rows) if PerRow::<P>::new(&[self.all]).is_ok() => rows.into(),
            _ => Setting::All(self.all),
        }
    }
}

fn top_k<'a>(call: &mut rows::Call<'a>) -> Own<'a, TopK> {
    let all = call.whole("top_k") as i32;
    Own::of(call, "top_k_arr", all)
}

fn top_p<'a>(call: &mut rows::Call<'a>) -> Own<'a, TopP> {
    let all = call.number("top_p") as f32;
    Own::of(call, "top_p_arr", all)
}

fn philox(call: &mut rows::Call<'_>) -> Philox {
    Philox::new(call.whole("philox_seed") as u64).at(call.whole("philox_offset") as u64)
}

fn sampling_options(call: &mut rows::Call<'_>) -> SamplingOptions {
    SamplingOptions::default().with_deterministic(call.on("deterministic"))
}

fn softmax_of(call: &mut rows::Call<'_>, s: Stream<'_>) -> flashinfer_rs::Result<()> {
    let options = SamplingOptions::default().with_pdl(call.on("enable_pdl"));
    let all = call.number("temperature") as f32;
    let temperature = match call.has("temperature_arr") {
        true => Own::<Temperature>::of(call, "temperature_arr", all),
        false => Own { all, rows: None },
    };
    let (mut output, logits, mut workspace) = (call.write("output"), call.read("logits"), call.write("workspace"));
    softmax(&mut output, &logits, temperature.setting(), &mut workspace, &options, s)
}

fn top_k_renorm(call: &mut rows::Call<'_>, s: Stream<'_>) -> flashinfer_rs::Result<()> {
    let top_k = top_k(call);
    top_k_renorm_probs(&mut call.write("renorm_probs"), &call.read("probs"), top_k.setting(), s)
}

fn top_k_mask(call: &mut rows::Call<'_>, s: Stream<'_>) -> flashinfer_rs::Result<()> {
    let top_k = top_k(call);
    top_k_mask_logits(&mut call.write("mask_logits"), &call.read("logits"), top_k.setting(), s)
}
/// Those whose results come in any order, which their own tests look at: here they are only refused.
const UNORDERED: &[(&str, rows::Function)] = &[
    ("radix_topk", |call, s| {
        let (top_k, input) = (call.whole("top_k"), call.read("input"));
        radix_topk(&mut call.write("output_indices"), &mut call.write("output_values"), &input, top_k, s)
    }),
    ("radix_topk_page_table_transform", |call, s| {
        let (top_k, input, tables) = (call.whole("top_k"), call.read("input"), call.read("src_page_table"));
        // SAFETY: no such call is launched.
        let rows = unsafe { Placed::from_lengths(call.read("lengths"), 0) };
        let mut output = call.write("output_page_table");
        radix_topk_page_table_transform(&mut output, &input, &tables, &rows, top_k, s)
    }),
    ("radix_topk_page_table_transform of requests", |call, s| {
        let (top_k, input, tables) = (call.whole("top_k"), call.read("input"), call.read("src_page_table"));
        let (lengths, row_to_batch) = (call.read("lengths"), call.read("maybe_row_to_batch"));
        // SAFETY: no such call is launched.
        let rows = unsafe { Placed::from_lengths_of_requests(lengths, row_to_batch, (0, 0)) };
        let mut output = call.write("output_page_table");
        radix_topk_page_table_transform(&mut output, &input, &tables, &rows, top_k, s)
    }),
    ("radix_topk_ragged_transform", |call, s| {
        let (top_k, input, offsets) = (call.whole("top_k"), call.read("input"), call.read("offsets"));
        // SAFETY: no such call is launched.
        let rows = unsafe { Placed::from_lengths(call.read("lengths"), 0) };
        radix_topk_ragged_transform(&mut call.write("output_indices"), &input, &offsets, &rows, top_k, s)
    }),
];

fn decode_options(call: &mut rows::Call<'_>) -> DecodeOptions {
    DecodeOptions::default().with_pdl(call.on("enable_pdl"))
}

fn activation_options(call: &mut rows::Call<'_>) -> ActivationOptions {
    ActivationOptions::default().with_pdl(call.on("enable_pdl"))
}

fn norm_options(call: &mut rows::Call<'_>) -> NormOptions {
    NormOptions::default().with_eps(call.number("eps")).with_pdl(call.on("enable_pdl"))
}

fn check<S: Strategy>(cases: u32, strategy: &S, test: impl Fn(&S::Value) -> Result<(), TestCaseError>) {
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let mut runner =
        TestRunner::new_with_rng(config, proptest::test_runner::TestRng::deterministic_rng(Default::default()));
    runner.run(strategy, |case| test(&case)).unwrap_or_else(|failure| panic!("{failure}"));
}

#[derive(Debug, Clone)]
struct Rows {
    half: bool,
    gemma: bool,
    /// `None` for two dimensions.
    heads: Option<usize>,
    rows: usize,
    columns: usize,
    /// Vectors between the rows of the input and of the output.
    gaps: [usize; 2],
    eps: f64,
    pdl: bool,
    seed: u64,
}

fn norms() -> impl Strategy<Value = Rows> {
    let columns = prop_oneof![1usize..300, (1usize..80).prop_map(|n| n * 8), (1usize..20).prop_map(|n| n * 512)];
    let heads = prop_oneof![2 => Just(None), 1 => (1usize..9).prop_map(Some)];
    let eps = prop_oneof![Just(1e-6), Just(1e-5), Just(0.5)];
    let gaps = [0usize..4, 0..4];
    (any::<bool>(), any::<bool>(), heads, 1usize..40, columns, gaps, eps, any::<bool>(), any::<u64>()).prop_map(
        |(half, gemma, heads, rows, columns, gaps, eps, pdl, seed)| Rows {
            half,
            gemma,
            heads,
            rows,
            columns,
            gaps,
            eps,
            pdl,
            seed,
        },
    )
}

impl Rows {
    fn options(&self) -> NormOptions {
        NormOptions::default().with_eps(self.eps).with_pdl(self.pdl)
    }

    fn tolerance(&self) -> f64 {
        if self.half { 5e-4 } else { 3e-3 }
    }

    /// The shape, the strides with a gap after every row, and how many elements that reaches.
    fn layout(&self, gap: usize) -> (Vec<i64>, Vec<i64>, usize) {
        let vector = [8, 4, 2].into_iter().find(|&n| self.columns.is_multiple_of(n)).unwrap_or(1);
        let (row, columns) = (self.columns + gap * vector, self.columns as i64);
        match self.heads.filter(|_| !self.gemma) {
            Some(heads) => {
                let shape = vec![self.rows as i64, heads as i64, columns];
                (shape, vec![(row * heads) as i64, row as i64, 1], self.rows * heads * row)
            }
            None => (vec![self.rows as i64, columns], vec![row as i64, 1], self.rows * row),
        }
    }
}

fn close(what: &str, found: &[f32], expected: &[f32], tolerance: f64) -> Result<(), TestCaseError> {
    let error = relative_error(found, expected);
    // Nothing but zeros is expected of nothing but zeros.
    let zeros = expected.iter().all(|x| *x == 0.0) && found.iter().all(|x| *x == 0.0);
    prop_assert!(zeros || error <= tolerance, "{what}: relative error {error:.2e}");
    Ok(())
}

fn norm(gpu: &Gpu, case: &Rows) -> Result<(), TestCaseError> {
    if case.half { norm_of::<f16>(gpu, case) } else { norm_of::<bf16>(gpu, case) }
}

fn norm_of<T: Number>(gpu: &Gpu, case: &Rows) -> Result<(), TestCaseError> {
    let (stream, mut random) = (&gpu.stream, Random(case.seed));
    let (shape, strides, reach) = case.layout(case.gaps[0]);
    let (_, out_strides, out_reach) = case.layout(case.gaps[1]);
    let columns = [case.columns as i64];
    let (input, weight) = (random.normal::<T>(reach), random.normal::<T>(case.columns));
    let (input_gpu, weight_gpu) = (stream.clone_htod(&input).unwrap(), stream.clone_htod(&weight).unwrap());
    let mut out = stream.clone_htod(&vec![T::POISON; out_reach]).unwrap();
    let function = if case.gemma { gemma_rmsnorm } else { rmsnorm };
    function(
        &mut TensorMut::from_cudarc_strided(stream, &mut out, &shape, &out_strides).unwrap(),
        &TensorRef::from_cudarc_strided(stream, &input_gpu, &shape, &strides).unwrap(),
        &TensorRef::from_cudarc(stream, &weight_gpu, &columns).unwrap(),
        &case.options(),
        Stream::cudarc(stream),
    )
    .unwrap();
    let out = widened(&stream.clone_dtoh(&out).unwrap());
    let (input, weight) = (widened(&input), widened(&weight));
    // NaN stays where nothing may be written.
    let mut expected = vec![f32::NAN; out_reach];
    function(
        &mut TensorMut::from_slice_strided(&mut expected, &shape, &out_strides).unwrap(),
        &TensorRef::from_slice_strided(&input, &shape, &strides).unwrap(),
        &TensorRef::from_slice(&weight, &columns).unwrap(),
        &case.options(),
        Stream::NULL,
    )
    .unwrap();
    prop_assert!(
        out.iter().zip(&expected).all(|(a, b)| a.is_nan() == b.is_nan()),
        "written where it must not be, or not"
    );
    let written =
        |values: &[f32]| values.iter().zip(&expected).filter(|(_, b)| !b.is_nan()).map(|(a, _)| *a).collect::<Vec<_>>();
    close("norm", &written(&out), &written(&expected), case.tolerance())
}

fn fused(gpu: &Gpu, case: &Rows) -> Result<(), TestCaseError> {
    if case.half { fused_of::<f16>(gpu, case) } else { fused_of::<bf16>(gpu, case) }
}

fn fused_of<T: Number>(gpu: &Gpu, case: &Rows) -> Result<(), TestCaseError> {
    let case = Rows { heads: None, ..case.clone() };
    let (stream, mut random) = (&gpu.stream, Random(case.seed));
    let (shape, strides, reach) = case.layout(case.gaps[0]);
    let (_, other_strides, other_reach) = case.layout(case.gaps[1]);
    let columns = [case.columns as i64];
    let (input, residual) = (random.normal::<T>(reach), random.normal::<T>(other_reach));
    let weight = random.normal::<T>(case.columns);
    let upload = |values: &[T]| stream.clone_htod(values).unwrap();
    let (mut a, mut b, w) = (upload(&input), upload(&residual), upload(&weight));
    let function = if case.gemma { gemma_fused_add_rmsnorm } else { fused_add_rmsnorm };
    function(
        &mut TensorMut::from_cudarc_strided(stream, &mut a, &shape, &strides).unwrap(),
        &mut TensorMut::from_cudarc_strided(stream, &mut b, &shape, &other_strides).unwrap(),
        &TensorRef::from_cudarc(stream, &w, &columns).unwrap(),
        &case.options(),
        Stream::cudarc(stream),
    )
    .unwrap();
    let (mut input, mut residual, weight) = (widened(&input), widened(&residual), widened(&weight));
    function(
        &mut TensorMut::from_slice_strided(&mut input, &shape, &strides).unwrap(),
        &mut TensorMut::from_slice_strided(&mut residual, &shape, &other_strides).unwrap(),
        &TensorRef::from_slice(&weight, &columns).unwrap(),
        &case.options(),
        Stream::NULL,
    )
    .unwrap();
    close("input", &widened(&stream.clone_dtoh(&a).unwrap()), &input, case.tolerance())?;
    close("residual", &widened(&stream.clone_dtoh(&b).unwrap()), &residual, case.tolerance())
}

fn layer(gpu: &Gpu, case: &Rows) -> Result<(), TestCaseError> {
    let (stream, mut random) = (&gpu.stream, Random(case.seed));
    let (shape, count) = ([case.rows as i64, case.columns as i64], case.rows * case.columns);
    let input = random.normal::<bf16>(count);
    let (gamma, beta) = (random.normal_f32(1.0, case.columns), random.normal_f32(1.0, case.columns));
    let input_gpu = stream.clone_htod(&input).unwrap();
    let (gamma_gpu, beta_gpu) = (stream.clone_htod(&gamma).unwrap(), stream.clone_htod(&beta).unwrap());
    let mut out = stream.clone_htod(&vec![bf16::POISON; count]).unwrap();
    layernorm(
        &mut TensorMut::from_cudarc(stream, &mut out, &shape).unwrap(),
        &TensorRef::from_cudarc(stream, &input_gpu, &shape).unwrap(),
        &TensorRef::from_cudarc(stream, &gamma_gpu, &shape[1..]).unwrap(),
        &TensorRef::from_cudarc(stream, &beta_gpu, &shape[1..]).unwrap(),
        case.eps,
        Stream::cudarc(stream),
    )
    .unwrap();
    let (input, mut expected) = (widened(&input), vec![0f32; count]);
    layernorm(
        &mut TensorMut::from_slice(&mut expected, &shape).unwrap(),
        &TensorRef::from_slice(&input, &shape).unwrap(),
        &TensorRef::from_slice(&gamma, &shape[1..]).unwrap(),
        &TensorRef::from_slice(&beta, &shape[1..]).unwrap(),
        case.eps,
        Stream::NULL,
    )
    .unwrap();
    close("layernorm", &widened(&stream.clone_dtoh(&out).unwrap()), &expected, 3e-3)
}

#[derive(Debug, Clone)]
struct Batch {
    half: bool,
    lengths: Vec<i64>,
    heads: [usize; 3],
    input_state: bool,
    alpha: bool,
    beta: bool,
    scale: Option<f64>,
    seed: u64,
}

fn prefills() -> impl Strategy<Value = Batch> {
    let length = prop_oneof![1 => Just(0i64), 2 => 1i64..10, 2 => 60i64..70, 1 => 120i64..140];
    let lengths = proptest::collection::vec(length, 1..6);
    let heads = prop_oneof![
        (1usize..4).prop_map(|n| [n, n, n]),
        (1usize..3, 2usize..4).prop_map(|(n, m)| [n * m, n, n]),
        (1usize..3, 2usize..4).prop_map(|(n, m)| [n, n, n * m]),
    ];
    let scale = prop_oneof![Just(None), Just(Some(0.3))];
    let flag = any::<bool>;
    (flag(), lengths, heads, flag(), flag(), flag(), scale, any::<u64>()).prop_map(
        |(half, lengths, heads, input_state, alpha, beta, scale, seed)| Batch {
            half,
            lengths,
            heads,
            input_state,
            alpha,
            beta,
            scale,
            seed,
        },
    )
}

fn prefill(gpu: &Gpu, case: &Batch) -> Result<(), TestCaseError> {
    if case.half { prefill_of::<f16>(gpu, case, 8e-4) } else { prefill_of::<bf16>(gpu, case, 6e-3) }
}

fn prefill_of<T: Number>(gpu: &Gpu, case: &Batch, tolerance: f64) -> Result<(), TestCaseError> {
    let (stream, mut random) = (&gpu.stream, Random(case.seed));
    let (tokens, size) = (case.lengths.iter().sum::<i64>() as usize, HEAD_SIZE as usize);
    let heads = case.heads[0].max(case.heads[2]);
    let shape = |heads: usize| [tokens as i64, heads as i64, HEAD_SIZE];
    let (q_shape, k_shape, v_shape, out_shape) =
        (shape(case.heads[0]), shape(case.heads[1]), shape(case.heads[2]), shape(heads));
    let states = [case.lengths.len() as i64, heads as i64, HEAD_SIZE, HEAD_SIZE];
    let state_count = states.iter().product::<i64>() as usize;
    let q = random.unit::<T>(tokens * case.heads[0], size);
    let k = random.unit::<T>(tokens * case.heads[1], size);
    let v = random.normal::<T>(tokens * case.heads[2] * size);
    let alpha = case.alpha.then(|| random.between(0.8, 1.0, tokens * heads));
    let beta = case.beta.then(|| random.between(0.0, 1.0, tokens * heads));
    let input_state = case.input_state.then(|| random.normal_f32(0.3, state_count));
    let cu_seqlens = CuSeqlens::from_lengths(&case.lengths).unwrap();

    // cudarc has no empty buffers.
    let upload = |values: &[T]| stream.clone_htod(&[values, &[T::default()]].concat()).unwrap();
    let numbers = |values: &Option<Vec<f32>>| {
        values.as_ref().map(|values| stream.clone_htod(&[values.as_slice(), &[0.0]].concat()).unwrap())
    };
    let (q_gpu, k_gpu, v_gpu) = (upload(&q), upload(&k), upload(&v));
    let (alpha_gpu, beta_gpu, input_gpu) = (numbers(&alpha), numbers(&beta), numbers(&input_state));
    let mut output = upload(&vec![T::POISON; tokens * heads * size]);
    let mut state = stream.clone_htod(&vec![f32::NAN; state_count]).unwrap();
    let mut context = GdnPrefillContext::new(stream).unwrap();
    let mut tensors = GdnTensors {
        output: TensorMut::from_cudarc(stream, &mut output, &out_shape).unwrap(),
        output_state: TensorMut::from_cudarc(stream, &mut state, &states).unwrap(),
        q: TensorRef::from_cudarc(stream, &q_gpu, &q_shape).unwrap(),
        k: TensorRef::from_cudarc(stream, &k_gpu, &k_shape).unwrap(),
        v: TensorRef::from_cudarc(stream, &v_gpu, &v_shape).unwrap(),
    };
    let mut options = GdnOptions::default();
    options.input_state = input_gpu.as_ref().map(|b| TensorRef::from_cudarc(stream, b, &states).unwrap());
    options.alpha = alpha_gpu.as_ref().map(|b| TensorRef::from_cudarc(stream, b, &out_shape[..2]).unwrap());
    options.beta = beta_gpu.as_ref().map(|b| TensorRef::from_cudarc(stream, b, &out_shape[..2]).unwrap());
    options.scale = case.scale;
    context.prefill(&mut tensors, &cu_seqlens.to_device(stream).unwrap(), &options).unwrap();
    let mut output = widened(&stream.clone_dtoh(&output).unwrap());
    output.pop();
    let state = stream.clone_dtoh(&state).unwrap();

    let (q, k, v) = (widened(&q), widened(&k), widened(&v));
    let (mut expected, mut expected_state) = (vec![0f32; output.len()], vec![0f32; state_count]);
    let mut tensors = GdnTensors {
        output: TensorMut::from_slice(&mut expected, &out_shape).unwrap(),
        output_state: TensorMut::from_slice(&mut expected_state, &states).unwrap(),
        q: TensorRef::from_slice(&q, &q_shape).unwrap(),
        k: TensorRef::from_slice(&k, &k_shape).unwrap(),
        v: TensorRef::from_slice(&v, &v_shape).unwrap(),
    };
    let mut options = GdnOptions::default();
    options.input_state = input_state.as_ref().map(|s| TensorRef::from_slice(s, &states).unwrap());
    options.alpha = alpha.as_ref().map(|a| TensorRef::from_slice(a, &out_shape[..2]).unwrap());
    options.beta = beta.as_ref().map(|b| TensorRef::from_slice(b, &out_shape[..2]).unwrap());
    options.scale = case.scale;
    GdnPrefillContext::on_host().prefill(&mut tensors, &cu_seqlens, &options).unwrap();
    if tokens > 0 {
        close("output", &output, &expected, tolerance)?;
    }
    close("state", &state, &expected_state, tolerance)
}
