//! gdn_prefill on a Hopper GPU, against the reference. `FLASHINFER_RS_RUN_GPU_TESTS=1 cargo test --features cudarc --test
//! gdn_prefill_gpu` runs them. Run them under a time limit: this kernel hangs on input that it should refuse.
//! They are done within 240 seconds.

#[path = "support/data.rs"]
mod data;
#[path = "support/gpu.rs"]
mod gpu;

use std::ffi::c_void;
use std::process::ExitCode;
use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DeviceRepr};
use data::{Number, Random, assert_close, widened};
use flashinfer_rs::kernels::gdn::{self, GdnOptions, GdnTensors, HEAD_SIZE, WORKSPACE_SIZE};
use flashinfer_rs::{
    DType, Element, FlashInferError, GdnPrefillSm90Params, Stream, Tensor1DDesc, Tensor2DDesc, Tensor3DDesc,
    Tensor4DDesc, TensorMut, TensorRef, gdn_prefill_sm90, gdn_prefill_sm90_cudarc,
    gdn_prefill_sm90_cudarc_with_options,
};
use gpu::Gpu;
use half::{bf16, f16};

const SIZE: usize = HEAD_SIZE as usize;
const WORKSPACE: usize = WORKSPACE_SIZE as usize;

fn main() -> ExitCode {
    gpu::main(&[
        ("bf16_matches_the_reference_over_shapes", |gpu| over_shapes::<bf16>(gpu, 6e-3)),
        ("f16_matches_the_reference_over_shapes", |gpu| over_shapes::<f16>(gpu, 8e-4)),
        ("bf16_matches_the_reference_with_every_option", |gpu| every_option::<bf16>(gpu, 6e-3)),
        ("f16_matches_the_reference_with_every_option", |gpu| every_option::<f16>(gpu, 8e-4)),
        ("the_flat_form_gives_the_same_bits", flat_form),
        ("the_short_form_gives_the_same_bits", short_form),
        ("two_streams_with_a_workspace_each_do_not_disturb_each_other", two_streams),
        ("the_call_is_asynchronous", asynchronous),
        ("a_workspace_that_is_too_small_is_refused", small_workspace),
        ("head_sizes_that_come_out_wrong_are_refused", head_sizes),
    ])
}

struct Case<T> {
    offsets: Vec<i64>,
    heads: [usize; 3],
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    input_state: Option<Vec<f32>>,
    alpha: Option<Vec<f32>>,
    beta: Option<Vec<f32>>,
    scale: f64,
}

#[derive(Clone, Copy, Default)]
struct Options {
    input_state: bool,
    alpha: bool,
    beta: bool,
    scale: f64,
}

const ALL: Options = Options { input_state: true, alpha: true, beta: true, scale: 0.0 };

impl<T: Number> Case<T> {
    fn new(seed: u64, lengths: &[i64], heads: [usize; 3], options: Options) -> Self {
        let mut random = Random(seed);
        let offsets: Vec<i64> = std::iter::once(0)
            .chain(lengths.iter().scan(0, |sum, n| {
                *sum += n;
                Some(*sum)
            }))
            .collect();
        let tokens = *offsets.last().unwrap() as usize;
        let [q_heads, k_heads, v_heads] = heads;
        let per_token = tokens * q_heads.max(v_heads);
        let states = lengths.len() * q_heads.max(v_heads) * SIZE * SIZE;
        Self {
            q: random.unit(tokens * q_heads, SIZE),
            k: random.unit(tokens * k_heads, SIZE),
            v: random.normal(tokens * v_heads * SIZE),
            input_state: options.input_state.then(|| random.normal_f32(0.3, states)),
            alpha: options.alpha.then(|| random.between(0.8, 1.0, per_token)),
            beta: options.beta.then(|| random.between(0.0, 1.0, per_token)),
            scale: options.scale,
            offsets,
            heads,
        }
    }

    fn tokens(&self) -> usize {
        *self.offsets.last().unwrap() as usize
    }

    fn out_heads(&self) -> usize {
        self.heads[0].max(self.heads[2])
    }

    fn output_len(&self) -> usize {
        self.tokens() * self.out_heads() * SIZE
    }

    fn state_len(&self) -> usize {
        (self.offsets.len() - 1) * self.out_heads() * SIZE * SIZE
    }

    fn expected(&self) -> (Vec<f32>, Vec<f32>) {
        let (tokens, heads, sequences) = (self.tokens() as i64, self.out_heads() as i64, self.offsets.len() as i64 - 1);
        let [q_heads, k_heads, v_heads] = self.heads.map(|heads| heads as i64);
        let states = [sequences, heads, HEAD_SIZE, HEAD_SIZE];
        let (q, k, v) = (widened(&self.q), widened(&self.k), widened(&self.v));
        let (mut output, mut state) = (vec![0f32; self.output_len()], vec![0f32; self.state_len()]);
        let mut tensors = GdnTensors {
            output: TensorMut::from_slice(&mut output, &[tokens, heads, HEAD_SIZE]).unwrap(),
            output_state: TensorMut::from_slice(&mut state, &states).unwrap(),
            q: TensorRef::from_slice(&q, &[tokens, q_heads, HEAD_SIZE]).unwrap(),
            k: TensorRef::from_slice(&k, &[tokens, k_heads, HEAD_SIZE]).unwrap(),
            v: TensorRef::from_slice(&v, &[tokens, v_heads, HEAD_SIZE]).unwrap(),
        };
        let offsets = TensorRef::from_slice(&self.offsets, &[sequences + 1]).unwrap();
        let mut nothing: [u8; 0] = [];
        let mut workspace = TensorMut::from_slice(&mut nothing, &[0]).unwrap();
        let mut options = GdnOptions::default();
        options.input_state = self.input_state.as_ref().map(|s| TensorRef::from_slice(s, &states).unwrap());
        options.alpha = self.alpha.as_ref().map(|a| TensorRef::from_slice(a, &[tokens, heads]).unwrap());
        options.beta = self.beta.as_ref().map(|b| TensorRef::from_slice(b, &[tokens, heads]).unwrap());
        options.scale = (self.scale != 0.0).then_some(self.scale);
        // SAFETY: on the host the contents of cu_seqlens are checked.
        unsafe { gdn::gdn_prefill(&mut tensors, &offsets, &mut workspace, &options, Stream::NULL) }.unwrap();
        (output, state)
    }

    fn upload(&self, stream: &Arc<CudaStream>) -> OnGpu<T> {
        let optional = |values: &Option<Vec<f32>>| values.as_ref().map(|values| stream.clone_htod(values).unwrap());
        OnGpu {
            q: stream.clone_htod(&self.q).unwrap(),
            k: stream.clone_htod(&self.k).unwrap(),
            v: stream.clone_htod(&self.v).unwrap(),
            offsets: stream.clone_htod(&self.offsets).unwrap(),
            input_state: optional(&self.input_state),
            alpha: optional(&self.alpha),
            beta: optional(&self.beta),
            output: stream.clone_htod(&vec![T::POISON; self.output_len()]).unwrap(),
            state: stream.clone_htod(&vec![f32::NAN; self.state_len()]).unwrap(),
            workspace: stream.alloc_zeros(WORKSPACE).unwrap(),
        }
    }

    fn launch(&self, stream: &Arc<CudaStream>, on: &mut OnGpu<T>) -> flashinfer_rs::Result<()> {
        let [q_heads, k_heads, v_heads] = self.heads;
        // SAFETY: the offsets start with 0, increase strictly and end with the number of tokens; the workspace is this
        // case's own.
        unsafe {
            gdn_prefill_sm90_cudarc_with_options(
                stream,
                &mut on.output,
                &mut on.state,
                &on.q,
                &on.k,
                &on.v,
                &on.offsets,
                &mut on.workspace,
                self.tokens(),
                q_heads,
                k_heads,
                v_heads,
                SIZE,
                T::DTYPE,
                on.input_state.as_ref(),
                on.alpha.as_ref(),
                on.beta.as_ref(),
                self.scale,
            )
        }
    }

    /// Outputs and states, from memory that held NaN.
    fn run(&self, gpu: &Gpu) -> (Vec<T>, Vec<f32>) {
        let mut on = self.upload(&gpu.stream);
        self.launch(&gpu.stream, &mut on).unwrap();
        on.download(&gpu.stream)
    }

    fn assert_right(&self, what: &str, (output, state): &(Vec<T>, Vec<f32>), tolerance: f64) {
        let (expected_output, expected_state) = self.expected();
        assert_close(&format!("{what}: output"), &widened(output), &expected_output, tolerance);
        assert_close(&format!("{what}: state"), state, &expected_state, tolerance);
    }
}

struct OnGpu<T> {
    q: CudaSlice<T>,
    k: CudaSlice<T>,
    v: CudaSlice<T>,
    offsets: CudaSlice<i64>,
    input_state: Option<CudaSlice<f32>>,
    alpha: Option<CudaSlice<f32>>,
    beta: Option<CudaSlice<f32>>,
    output: CudaSlice<T>,
    state: CudaSlice<f32>,
    workspace: CudaSlice<u8>,
}

impl<T: Number> OnGpu<T> {
    fn download(&self, stream: &Arc<CudaStream>) -> (Vec<T>, Vec<f32>) {
        (stream.clone_dtoh(&self.output).unwrap(), stream.clone_dtoh(&self.state).unwrap())
    }
}

fn over_shapes<T: Number>(gpu: &Gpu, tolerance: f64) {
    // One token, one tile (64 tokens) exactly, one more and one less, many sequences, uneven ones; equal heads, GQA and
    // GVA, Qwen3-Next's heads.
    let cases: [(&[i64], [usize; 3]); 10] = [
        (&[1], [1, 1, 1]),
        (&[64], [2, 2, 2]),
        (&[65], [4, 2, 2]),
        (&[63], [2, 2, 4]),
        (&[1, 1, 1], [2, 1, 1]),
        (&[5, 128, 60], [1, 1, 4]),
        (&[130, 1, 257], [4, 4, 4]),
        (&[20; 8], [8, 2, 2]),
        (&[96, 33], [16, 16, 32]),
        (&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [2, 2, 2]),
    ];
    for (i, (lengths, heads)) in cases.into_iter().enumerate() {
        let case = Case::<T>::new(i as u64, lengths, heads, ALL);
        case.assert_right(&format!("{lengths:?} {heads:?}"), &case.run(gpu), tolerance);
    }
}

fn every_option<T: Number>(gpu: &Gpu, tolerance: f64) {
    for bits in 0..16u64 {
        let on = |bit: u64| bits >> bit & 1 == 1;
        let scale = if on(3) { 0.25 } else { 0.0 };
        let options = Options { input_state: on(0), alpha: on(1), beta: on(2), scale };
        for heads in [[4, 2, 2], [2, 2, 4]] {
            let case = Case::<T>::new(bits, &[70, 30], heads, options);
            case.assert_right(&format!("options {bits:04b}, heads {heads:?}"), &case.run(gpu), tolerance);
        }
    }
}

fn pointer<T: DeviceRepr>(gpu: &Gpu, buffer: &CudaSlice<T>) -> *const c_void {
    buffer.device_ptr(&gpu.stream).0 as *const c_void
}

fn vector<T: DeviceRepr + Element>(gpu: &Gpu, buffer: &CudaSlice<T>) -> Tensor1DDesc {
    Tensor1DDesc { ptr: pointer(gpu, buffer), len: buffer.len() as i64, stride: 1, dtype: T::DTYPE, device_id: 0 }
}

fn per_head<T: DeviceRepr + Element>(gpu: &Gpu, buffer: &CudaSlice<T>, heads: usize) -> Tensor3DDesc {
    let (dim1, dim2) = (heads as i64, HEAD_SIZE);
    let dim0 = buffer.len() as i64 / (dim1 * dim2);
    let ptr = pointer(gpu, buffer);
    Tensor3DDesc {
        ptr,
        dim0,
        dim1,
        dim2,
        stride0: dim1 * dim2,
        stride1: dim2,
        stride2: 1,
        dtype: T::DTYPE,
        device_id: 0,
    }
}

fn states(gpu: &Gpu, buffer: &CudaSlice<f32>, heads: usize) -> Tensor4DDesc {
    let (dim1, dim2, dim3) = (heads as i64, HEAD_SIZE, HEAD_SIZE);
    Tensor4DDesc {
        ptr: pointer(gpu, buffer),
        dim0: buffer.len() as i64 / (dim1 * dim2 * dim3),
        dim1,
        dim2,
        dim3,
        stride0: dim1 * dim2 * dim3,
        stride1: dim2 * dim3,
        stride2: dim3,
        stride3: 1,
        dtype: DType::F32,
        device_id: 0,
    }
}

fn per_token(gpu: &Gpu, buffer: &CudaSlice<f32>, heads: usize) -> Tensor2DDesc {
    let cols = heads as i64;
    let rows = buffer.len() as i64 / cols;
    let ptr = pointer(gpu, buffer);
    Tensor2DDesc { ptr, rows, cols, stride_row: cols, stride_col: 1, dtype: DType::F32, device_id: 0 }
}

fn flat_params<T: Number>(gpu: &Gpu, case: &Case<T>, on: &OnGpu<T>) -> GdnPrefillSm90Params {
    let [q_heads, k_heads, v_heads] = case.heads;
    let heads = case.out_heads();
    let mut params = GdnPrefillSm90Params::new(
        per_head(gpu, &on.output, heads),
        states(gpu, &on.state, heads),
        per_head(gpu, &on.q, q_heads),
        per_head(gpu, &on.k, k_heads),
        per_head(gpu, &on.v, v_heads),
        vector(gpu, &on.offsets),
        vector(gpu, &on.workspace),
        gpu.stream.cu_stream().cast(),
    )
    .with_scale(case.scale);
    params.input_state = on.input_state.as_ref().map(|buffer| states(gpu, buffer, heads));
    params.alpha = on.alpha.as_ref().map(|buffer| per_token(gpu, buffer, heads));
    params.beta = on.beta.as_ref().map(|buffer| per_token(gpu, buffer, heads));
    params
}

fn same_bits<T: Number>(a: &(Vec<T>, Vec<f32>), b: &(Vec<T>, Vec<f32>)) -> bool {
    let bits = |pair: &(Vec<T>, Vec<f32>)| {
        (
            widened(&pair.0).iter().map(|v| v.to_bits()).collect::<Vec<_>>(),
            pair.1.iter().map(|v| v.to_bits()).collect::<Vec<_>>(),
        )
    };
    bits(a) == bits(b)
}

fn flat_form(gpu: &Gpu) {
    let case = Case::<bf16>::new(1, &[100, 40], [4, 2, 2], ALL);
    let on = case.upload(&gpu.stream);
    // SAFETY: the descriptors are those of live buffers; the offsets are right.
    unsafe { gdn_prefill_sm90(&flat_params(gpu, &case, &on)) }.unwrap();
    assert!(same_bits(&on.download(&gpu.stream), &case.run(gpu)));
}

fn short_form(gpu: &Gpu) {
    let case = Case::<f16>::new(2, &[30, 90], [2, 2, 4], Options::default());
    let mut on = case.upload(&gpu.stream);
    let [q_heads, k_heads, v_heads] = case.heads;
    // SAFETY: the offsets start with 0, increase strictly and end with the number of tokens.
    unsafe {
        gdn_prefill_sm90_cudarc(
            &gpu.stream,
            &mut on.output,
            &mut on.state,
            &on.q,
            &on.k,
            &on.v,
            &on.offsets,
            &mut on.workspace,
            case.tokens(),
            q_heads,
            k_heads,
            v_heads,
            SIZE,
            f16::DTYPE,
        )
    }
    .unwrap();
    assert!(same_bits(&on.download(&gpu.stream), &case.run(gpu)));
}

fn two_streams(gpu: &Gpu) {
    let streams = [gpu.context.new_stream().unwrap(), gpu.context.new_stream().unwrap()];
    let cases: Vec<Case<bf16>> = (0..2).map(|i| Case::new(i, &[200, 150], [4, 4, 4], ALL)).collect();
    let mut buffers: Vec<_> = streams.iter().zip(&cases).map(|(stream, case)| case.upload(stream)).collect();
    for _ in 0..50 {
        for ((stream, case), on) in streams.iter().zip(&cases).zip(&mut buffers) {
            case.launch(stream, on).unwrap();
        }
    }
    for ((stream, case), on) in streams.iter().zip(&cases).zip(&buffers) {
        case.assert_right("a stream", &on.download(stream), 6e-3);
    }
}

fn asynchronous(gpu: &Gpu) {
    let case = Case::<bf16>::new(3, &[64], [2, 2, 2], ALL);
    let mut on = case.upload(&gpu.stream);
    // The first call loads the kernel, which may wait.
    case.launch(&gpu.stream, &mut on).unwrap();
    gpu.assert_asynchronous(&gpu.stream, || case.launch(&gpu.stream, &mut on).unwrap());
}

fn small_workspace(gpu: &Gpu) {
    let case = Case::<bf16>::new(4, &[64], [2, 2, 2], Options::default());
    let mut on = case.upload(&gpu.stream);
    // A descriptor for each multiprocessor that is counted is not enough: on a MIG slice their numbers go past the count.
    for size in [128, 132 * 128, WORKSPACE - 1] {
        on.workspace = gpu.stream.alloc_zeros(size).unwrap();
        let error = case.launch(&gpu.stream, &mut on).unwrap_err();
        let FlashInferError::InvalidArgument { argument: "workspace", found, expected, .. } = &error else {
            panic!("{error}")
        };
        assert_eq!((found.as_str(), expected.as_str()), (&*format!("{size} bytes long"), "131072 bytes or more"));
    }
}

fn head_sizes(gpu: &Gpu) {
    let case = Case::<bf16>::new(5, &[64], [2, 2, 2], Options::default());
    let on = case.upload(&gpu.stream);
    for size in [64, 96, 256] {
        let mut params = flat_params(gpu, &case, &on);
        for tensor in [&mut params.q, &mut params.k, &mut params.v, &mut params.output] {
            tensor.dim2 = size;
        }
        // SAFETY: refused before anything is launched.
        let error = unsafe { gdn_prefill_sm90(&params) }.unwrap_err();
        assert!(matches!(error, FlashInferError::InvalidArgument { argument: "head_size", .. }), "{error}");
    }
}
