//! `gdn_prefill_sm90.so`: prefill of the gated delta rule, for Hopper GPUs.
//!
//! Upstream, in release 0.6.3, hangs the GPU on a sequence without tokens, reads sequence offsets from device memory
//! unchecked, and needs scratch memory that no two streams may share. [`GdnPrefillContext`] is the safe way to call it:
//! it owns the scratch memory, belongs to one stream, takes offsets that were checked where they were made, and never
//! launches an empty sequence. [`gdn_prefill`] is the kernel itself.

use crate::contract::{
    Alignment, Argument, Attributes, Checked, Contents, Convention, Dimension, Dimensions, Dtype, Extent, From, Kind,
    Operand, Pdl, Relation, Reports, Role, Row, RunsOn, Size, Strides, Tensor, Variant, check,
};
use crate::cuda;
use crate::engine::{Entry, Kernel, State, call, kernels, refused};
use crate::error::{FlashInferError, Result};
use crate::prepared::Prepared;
use crate::runtime::FlashInferRuntime;
use crate::sequences::CuSeqlens;
use crate::stream::Stream;
use crate::tensor::{DType, Device, Layout, TensorMut, TensorRef};

/// The one head size that release 0.6.3 computes right: with 64 and 96 the final state is wrong, 256 is refused.
pub const HEAD_SIZE: i64 = 128;

/// The scratch memory's size in bytes: a TMA descriptor of 128 bytes for as many multiprocessors as any GPU may number
/// them. On a MIG slice the numbers go past the slice's own count.
pub const WORKSPACE_SIZE: i64 = 128 * 1024;

const MOST: i64 = i32::MAX as i64;

// The dimensions.
const TOKENS: usize = 0;
const Q_HEADS: usize = 1;
const K_HEADS: usize = 2;
const V_HEADS: usize = 3;
const SIZE: usize = 4;
const HEADS: usize = 5;
const SEQUENCES: usize = 6;
const BYTES: usize = 7;

// The arguments that decide them.
const Q: usize = 2;
const K: usize = 3;
const V: usize = 4;
const CU_SEQLENS: usize = 5;
const INPUT_STATE: usize = 6;
const ALPHA: usize = 7;
const BETA: usize = 8;
const WORKSPACE: usize = 10;

/// With at least so many tokens.
const fn dimensions(tokens: i64) -> [Dimension; 8] {
    const fn size(name: &'static str, from: From, examples: &'static [i64]) -> Dimension {
        Dimension { name, from, least: 1, most: MOST, examples }
    }
    [
        Dimension { least: tokens, ..size("tokens", From::Shape(Q, 0), &[100, 1, 64, 333]) },
        size("q_heads", From::Shape(Q, 1), &[1, 4]),
        size("k_heads", From::Shape(K, 1), &[1, 2]),
        size("v_heads", From::Shape(V, 1), &[1, 2]),
        Dimension { least: HEAD_SIZE, most: HEAD_SIZE, ..size("head_size", From::Shape(Q, 2), &[HEAD_SIZE]) },
        size("heads", From::Larger(Q_HEADS, V_HEADS), &[]),
        size("sequences", From::OneLess(CU_SEQLENS, 0), &[2, 1]),
        Dimension { least: 0, ..size("bytes", From::Shape(WORKSPACE, 0), &[WORKSPACE_SIZE]) },
    ]
}

const PER_HEAD: &[Size] = &[Size::Of(TOKENS), Size::Of(HEADS), Size::Of(SIZE)];
const STATES: &[Size] = &[Size::Of(SEQUENCES), Size::Of(HEADS), Size::Of(SIZE), Size::Of(SIZE)];
const PER_TOKEN: &[Size] = &[Size::Of(TOKENS), Size::Of(HEADS)];
const UNIFORM: Contents = Contents::Uniform(1.0);

/// A contiguous tensor, of the type and alignment in bytes that it must have.
const fn tensor(
    name: &'static str,
    role: Role,
    (dtype, alignment): (Dtype, usize),
    shape: &'static [Size],
    contents: Contents,
) -> Argument {
    let (strides, alignment) = (Strides::Contiguous, Alignment::Bytes(alignment));
    Argument { name, kind: Kind::Tensor(Tensor { role, optional: false, dtype, shape, strides, alignment, contents }) }
}

const fn optional(argument: Argument) -> Argument {
    match argument.kind {
        Kind::Tensor(tensor) => {
            Argument { name: argument.name, kind: Kind::Tensor(Tensor { optional: true, ..tensor }) }
        }
        kind => Argument { name: argument.name, kind },
    }
}

/// Moved by TMA, in units of 16 bytes; a descriptor that fails prints a line and goes on.
const HALF: (Dtype, usize) = (Dtype::As(Q), 16);
/// States move in vectors of up to 16 bytes, decays and rates one by one.
const STATE: (Dtype, usize) = (Dtype::Only(DType::F32), 16);
const NUMBER: (Dtype, usize) = (Dtype::Only(DType::F32), 4);

const GROUPS: Relation = Relation {
    name: "heads",
    only_on_gpu: false,
    holds: |sizes| {
        let (q, k, v) = (sizes[Q_HEADS], sizes[K_HEADS], sizes[V_HEADS]);
        ((q >= v) & (k == v) && q % k == 0) || ((q < v) & (q == k) && v % q == 0)
    },
    found: |sizes| format!("{} query, {} key and {} value", sizes[Q_HEADS], sizes[K_HEADS], sizes[V_HEADS]),
    expected: "key heads = value heads and query heads a multiple of them (GQA), or query heads = key heads and value heads \
               a multiple of them (GVA)",
};

const ENOUGH_WORKSPACE: Relation = Relation {
    name: "workspace",
    only_on_gpu: true,
    holds: |sizes| sizes[BYTES] >= WORKSPACE_SIZE,
    found: |sizes| format!("{} bytes long", sizes[BYTES]),
    expected: "131072 bytes or more",
};

const A_TOKEN_EACH: Relation = Relation {
    name: "sequences",
    only_on_gpu: false,
    holds: |sizes| sizes[SEQUENCES] <= sizes[TOKENS],
    found: |sizes| format!("{} of {} tokens", sizes[SEQUENCES], sizes[TOKENS]),
    expected: "no more than there are tokens: a sequence without tokens hangs the GPU",
};

const ROW: Row = Row {
    kernel: "gdn_prefill",
    function: "gdn_prefill",
    library: "gdn_prefill_sm90.so",
    feature: "gdn-prefill",
    summary: "Prefill of the gated delta rule: `S ← α S`, `S ← S + β (v − S k) kᵀ`, `o = scale · S q`, token by token.",
    source: "`csrc/gdn_prefill_launcher.cu`, `include/flashinfer/flat`",
    runs_on: RunsOn::Exactly(9, 0),
    arguments: &[
        tensor("output", Role::Out, HALF, PER_HEAD, UNIFORM),
        tensor("output_state", Role::Out, STATE, STATES, UNIFORM),
        tensor("q", Role::In, (Dtype::Half, 16), &[Size::Of(TOKENS), Size::Of(Q_HEADS), Size::Of(SIZE)], UNIFORM),
        // Keys of about length 1, as the delta rule wants them.
        tensor("k", Role::In, HALF, &[Size::Of(TOKENS), Size::Of(K_HEADS), Size::Of(SIZE)], Contents::Uniform(0.153)),
        tensor("v", Role::In, HALF, &[Size::Of(TOKENS), Size::Of(V_HEADS), Size::Of(SIZE)], UNIFORM),
        tensor(
            "cu_seqlens",
            Role::In,
            (Dtype::Only(DType::I64), 8),
            &[Size::OneMore(SEQUENCES)],
            Contents::Offsets(SEQUENCES, TOKENS),
        ),
        optional(tensor("input_state", Role::In, STATE, STATES, UNIFORM)),
        optional(tensor("alpha", Role::In, NUMBER, PER_TOKEN, Contents::Between(0.8, 1.0))),
        optional(tensor("beta", Role::In, NUMBER, PER_TOKEN, Contents::Between(0.0, 1.0))),
        Argument { name: "scale", kind: Kind::NotNegative },
        // What TMA asks of its descriptors.
        tensor("workspace", Role::Workspace, (Dtype::Only(DType::U8), 64), &[Size::Of(BYTES)], Contents::Zeros),
    ],
    lead: Q,
    dimensions: &dimensions(1),
    relations: &[GROUPS, ENOUGH_WORKSPACE, A_TOKEN_EACH],
    // Offsets and strides are 32-bit and signed.
    extent: Extent { most: 1 << 31, split: false, stride: i64::MAX },
    pdl: Pdl::None,
    attributes: Attributes::OncePerProcess { flag: "11initialized", variant },
    reports: Reports::LastError,
    uses_current_device: true,
    convention: Convention::Views,
    hazards: &[
        "`cu_seqlens` must start with 0, increase strictly and end with the number of tokens when the kernel runs: nothing \
         checks it, it steers the kernel's addresses, and a sequence without tokens hangs the GPU.",
        "The workspace must not be in use on another stream.",
        "Decays of 0 and below are computed as log2(alpha + 1e-10): 0 decays to 1e-10, and a negative one makes a head NaN.",
        "Upstream reports that this release's kernel was seen to hang when it was replayed from a CUDA graph (flashinfer#3329).",
    ],
    tolerance: [6e-3, 8e-4],
    tests: "`tests/gdn_prefill_gpu.rs`, `tests/gdn_context_gpu.rs`, `tests/properties_gpu.rs`, `tests/reference.rs`",
};

/// Which of upstream's 32 kernels the arguments choose.
fn variant(call: &Variant<'_>) -> u32 {
    let present = |argument: usize| call.present >> argument & 1 != 0;
    let switches = [
        call.dtype == DType::BF16,
        call.dimensions[Q_HEADS] < call.dimensions[V_HEADS],
        present(BETA),
        present(ALPHA),
        present(INPUT_STATE),
    ];
    switches.iter().fold(0, |bits, on| bits << 1 | u32::from(*on))
}

kernels! {
    /// [`gdn_prefill`].
    GdnPrefill = ROW;
}

/// What a batch must be that may have empty sequences, before it is divided into launches of those that are not.
struct Batch;

impl Kernel for Batch {
    const ROW: &'static Row = &Row { dimensions: &dimensions(0), relations: &[GROUPS, ENOUGH_WORKSPACE], ..ROW };

    fn state() -> &'static State {
        GdnPrefill::state()
    }
}

/// Whether the kernel runs on a device: on the host always, on a GPU of compute capability 9.0.
///
/// # Errors
/// [`DeviceOutOfRange`](crate::FlashInferError::DeviceOutOfRange), or why there is no GPU.
pub fn is_supported(device: Device) -> Result<bool> {
    Entry::of::<GdnPrefill>().is_supported(device)
}

/// The tensors of a prefill, with `tokens` of all sequences one after the other and `heads` = max(query heads, value heads).
#[derive(Debug)]
pub struct GdnTensors<'a> {
    /// `[tokens, heads, 128]`, as `q`.
    pub output: TensorMut<'a>,
    /// `[sequences, heads, 128, 128]` F32, value dimension before key dimension: the states after the last tokens. An empty
    /// sequence's is its input state, or zeros.
    pub output_state: TensorMut<'a>,
    /// `[tokens, query heads, 128]` F16 or BF16.
    pub q: TensorRef<'a>,
    /// `[tokens, key heads, 128]`, as `q`.
    pub k: TensorRef<'a>,
    /// `[tokens, value heads, 128]`, as `q`.
    pub v: TensorRef<'a>,
}

/// What is optional in a prefill.
#[derive(Debug, Default, Clone)]
#[non_exhaustive]
pub struct GdnOptions<'a> {
    /// `[sequences, heads, 128, 128]` F32: the states before the first tokens; zeros without.
    pub input_state: Option<TensorRef<'a>>,
    /// `[tokens, heads]` F32: the decay, linear (not its logarithm), above 0; 1 without.
    pub alpha: Option<TensorRef<'a>>,
    /// `[tokens, heads]` F32: how much of the correction is written; 1 without.
    pub beta: Option<TensorRef<'a>>,
    /// Multiplies the output, above 0; 1/√128 without.
    pub scale: Option<f64>,
}

impl<'a> GdnOptions<'a> {
    /// With states before the first tokens.
    #[must_use]
    pub fn with_input_state(mut self, input_state: TensorRef<'a>) -> Self {
        self.input_state = Some(input_state);
        self
    }

    /// With a decay.
    #[must_use]
    pub fn with_alpha(mut self, alpha: TensorRef<'a>) -> Self {
        self.alpha = Some(alpha);
        self
    }

    /// With a writing rate.
    #[must_use]
    pub fn with_beta(mut self, beta: TensorRef<'a>) -> Self {
        self.beta = Some(beta);
        self
    }

    /// With a scale of the output.
    #[must_use]
    pub fn with_scale(mut self, scale: f64) -> Self {
        self.scale = Some(scale);
        self
    }
}

type Operands<'a, 'o> = [Operand<'a, 'o>; 11];

#[inline(always)]
fn operands<'a, 'o>(
    tensors: &'a GdnTensors<'o>,
    cu_seqlens: &'a TensorRef<'o>,
    workspace: &'a TensorMut<'o>,
    options: &'a GdnOptions<'o>,
) -> Result<Operands<'a, 'o>> {
    let optional = |tensor: &'a Option<TensorRef<'o>>| tensor.as_ref().map_or(Operand::Absent, TensorRef::operand);
    // The kernel takes 0.0 for its default; as a scale it would be a slip.
    let scale = match options.scale {
        None => 0.0,
        Some(0.0) => return Err(no_scale()),
        Some(scale) => scale,
    };
    Ok([
        tensors.output.operand(),
        tensors.output_state.operand(),
        tensors.q.operand(),
        tensors.k.operand(),
        tensors.v.operand(),
        cu_seqlens.operand(),
        optional(&options.input_state),
        optional(&options.alpha),
        optional(&options.beta),
        Operand::Number(scale),
        workspace.operand(),
    ])
}

#[cold]
fn no_scale() -> FlashInferError {
    FlashInferError::InvalidArgument {
        function: "gdn_prefill",
        argument: "scale",
        found: "0".to_owned(),
        expected: "a positive number, or none for the default".to_owned(),
    }
}

/// The kernel itself: prefill of the gated delta rule. For every sequence and head, token by token:
/// `S ← α S`, `S ← S + β (v − S k) kᵀ`, `o = scale · S q`.
///
/// <!-- gdn_prefill -->
///
/// | tensor | shape | dtype | |
/// |---|---|---|---|
/// | `output` | `[tokens, heads, head_size]` | as `q` | written; contiguous; aligned to 16 bytes |
/// | `output_state` | `[sequences, heads, head_size, head_size]` | F32 | written; contiguous; aligned to 16 bytes |
/// | `q` | `[tokens, q_heads, head_size]` | F16 or BF16 | read; contiguous; aligned to 16 bytes |
/// | `k` | `[tokens, k_heads, head_size]` | as `q` | read; contiguous; aligned to 16 bytes |
/// | `v` | `[tokens, v_heads, head_size]` | as `q` | read; contiguous; aligned to 16 bytes |
/// | `cu_seqlens` | `[sequences + 1]` | I64 | read; contiguous; aligned to 8 bytes |
/// | `input_state` | `[sequences, heads, head_size, head_size]` | F32 | read, optional; contiguous; aligned to 16 bytes |
/// | `alpha` | `[tokens, heads]` | F32 | read, optional; contiguous; aligned to 4 bytes |
/// | `beta` | `[tokens, heads]` | F32 | read, optional; contiguous; aligned to 4 bytes |
/// | `workspace` | `[bytes]` | U8 | scratch memory; contiguous; aligned to 64 bytes |
///
/// Heads: either key heads equal value heads and query heads are a multiple of them (GQA), or query heads equal key
/// heads and value heads are a multiple of them (GVA).
///
/// On a GPU the call is asynchronous on `stream` and needs compute capability 9.0; tensors on the host are computed by
/// the [reference](crate::reference), at once. Every GPU of the process may be used, from any thread.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for whatever breaks the contract above and can be seen
/// without reading device memory; [`DeviceOutOfRange`](crate::FlashInferError::DeviceOutOfRange); what loading
/// `gdn_prefill_sm90.so` answers; and [`TvmFfiCall`](crate::FlashInferError::TvmFfiCall) with what the kernel raised, on
/// an unsupported GPU for example.
///
/// # Safety
/// `cu_seqlens`, if it is on a GPU, must start with 0, increase strictly, and end with the number of tokens, when the kernel
/// runs: its contents steer the kernel's addressing, and a sequence without tokens hangs the GPU. The workspace must not
/// be in use by another stream.
pub unsafe fn gdn_prefill(
    tensors: &mut GdnTensors<'_>,
    cu_seqlens: &TensorRef<'_>,
    workspace: &mut TensorMut<'_>,
    options: &GdnOptions<'_>,
    stream: Stream<'_>,
) -> Result<()> {
    let operands = operands(tensors, cu_seqlens, workspace, options)?;
    // SAFETY: the caller's promise.
    unsafe { call::<GdnPrefill, 11>(operands, stream) }
}

impl Prepared<GdnPrefill> {
    /// Checks the call once. Tensors of the same form, wherever they are, may stand in these tensors' places.
    ///
    /// # Errors
    /// As for [`gdn_prefill`].
    pub fn new(
        tensors: &GdnTensors<'_>,
        cu_seqlens: &TensorRef<'_>,
        workspace: &TensorMut<'_>,
        options: &GdnOptions<'_>,
    ) -> Result<Self> {
        Self::checked(&operands(tensors, cu_seqlens, workspace, options)?)
    }

    /// Launches the kernel on these tensors. The scale is the prepared one.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for a tensor that differs from the one that was prepared
    /// in more than its memory, or is for another stream; and what the launch came to.
    ///
    /// # Safety
    /// As for [`gdn_prefill`].
    pub unsafe fn launch(
        &self,
        tensors: &mut GdnTensors<'_>,
        cu_seqlens: &TensorRef<'_>,
        workspace: &mut TensorMut<'_>,
        options: &GdnOptions<'_>,
        stream: Stream<'_>,
    ) -> Result<()> {
        let all = operands(tensors, cu_seqlens, workspace, options)?;
        let [output, output_state, q, k, v, cu_seqlens, input_state, alpha, beta, _, workspace] = all;
        let tensors = [output, output_state, q, k, v, cu_seqlens, input_state, alpha, beta, workspace];
        // SAFETY: the caller's promise.
        unsafe { self.launch_with::<11>(&tensors, stream) }
    }
}

/// Launches every run of sequences that have tokens, and gives the others their states.
///
/// # Safety
/// `cu_seqlens` must be device memory with the offsets of each run that has tokens, counted from that run's first token,
/// one run after the other, or the host's offsets of the whole. The workspace must be in use by no other stream.
#[cfg(feature = "cudarc")]
#[inline(always)]
unsafe fn launch_runs(operands: &Operands<'_, '_>, sequences: &CuSeqlens, stream: Stream<'_>) -> Result<()> {
    if let [crate::sequences::Run { empty: false, .. }] = sequences.runs() {
        let tokens = operands[Q].layout().map_or(0, |q| q.size(0));
        if tokens == sequences.tokens() {
            // SAFETY: the offsets start with 0, increase strictly, since no sequence is empty, and end with the number of
            // tokens; the rest is the caller's promise.
            return unsafe { call::<GdnPrefill, 11>(*operands, stream) };
        }
    }
    // SAFETY: the caller's promise.
    unsafe { launch_any_runs(operands, sequences, stream) }
}

/// As [`launch_runs`], of any runs.
///
/// # Safety
/// As there.
#[cold]
unsafe fn launch_any_runs(operands: &Operands<'_, '_>, sequences: &CuSeqlens, stream: Stream<'_>) -> Result<()> {
    let checked = check(Batch::ROW, operands, stream).map_err(|fault| refused(Batch::ROW, operands, stream, fault))?;
    check_tokens(&checked, sequences)?;
    if checked.device == Device::Cpu {
        // Without tokens there is still something to do: the states are kept.
        let checked = Checked { empty: false, ..checked };
        // SAFETY: the reference reads the offsets and checks them.
        return unsafe { Entry::of::<Batch>().call_checked(operands, &checked, stream) };
    }
    let mut at = 0;
    for run in sequences.runs() {
        let (first, count) = (run.first as i64, run.count as i64);
        let (start, end) = (sequences.offsets()[run.first], sequences.offsets()[run.first + run.count]);
        let part = |i: usize| match operands[i].layout() {
            Some(layout) if i == CU_SEQLENS => Some(layout.window(at, count + 1)),
            Some(layout) if i == 1 || i == INPUT_STATE => Some(layout.narrow(0, first, count)),
            Some(layout) if i == WORKSPACE => Some(*layout),
            Some(layout) => Some(layout.narrow(0, start, end - start)),
            None => None,
        };
        let parts: [Option<Layout>; 11] = std::array::from_fn(part);
        let mut run_operands = *operands;
        for (operand, part) in run_operands.iter_mut().zip(&parts) {
            if let (Operand::Tensor(_, owner), Some(part)) = (*operand, part) {
                *operand = Operand::Tensor(part, owner);
            }
        }
        if run.empty {
            // SAFETY: the caller's promise; the sizes were checked.
            unsafe { keep_states(&run_operands, stream) }?;
        } else {
            at += count + 1;
            // SAFETY: as in `launch_runs`, of this run's offsets.
            unsafe { Entry::of::<GdnPrefill>().call(&run_operands, stream) }?;
        }
    }
    Ok(())
}

fn check_tokens(checked: &Checked, sequences: &CuSeqlens) -> Result<()> {
    let dimensions: &Dimensions = &checked.dimensions;
    if dimensions[TOKENS] == sequences.tokens() {
        return Ok(());
    }
    Err(FlashInferError::InvalidArgument {
        function: "gdn_prefill",
        argument: "tokens",
        found: dimensions[TOKENS].to_string(),
        expected: format!("{}, the end of cu_seqlens", sequences.tokens()),
    })
}

/// The final states of sequences without tokens: their initial ones.
///
/// # Safety
/// The states must be contiguous device memory of the same size.
unsafe fn keep_states(operands: &Operands<'_, '_>, stream: Stream<'_>) -> Result<()> {
    let (Some(to), from) = (operands[1].layout(), operands[INPUT_STATE].layout()) else { return Ok(()) };
    let runtime = FlashInferRuntime::global()?;
    let cudart = runtime.cudart()?;
    let fill = || {
        let _current: cuda::CurrentDevice = cudart.set_current(runtime.checked_device(to.device())?)?;
        let bytes = to.numel() as usize * DType::F32.size();
        // SAFETY: the caller's promise.
        unsafe { cudart.fill(to.data(), from.map(|from| from.data().cast_const()), bytes, stream.as_raw()) }
    };
    crate::engine::ordered_like(Batch::ROW, operands, fill)
}

/// Prefill of the gated delta rule, safely: the scratch memory that the kernel writes, for one stream, so that no two streams
/// ever share one; or for tensors on the host, where the [reference](crate::reference) computes.
///
/// ```
/// # use flashinfer_rs::kernels::gdn::{GdnOptions, GdnPrefillContext, GdnTensors};
/// # use flashinfer_rs::{CuSeqlens, FlashInferRuntime, RuntimeConfig, TensorMut, TensorRef};
/// # FlashInferRuntime::initialize(RuntimeConfig::default())?;
/// // Three tokens of two sequences, one head.
/// let (q, k, v) = ([1f32; 3 * 128], [0.1f32; 3 * 128], [1f32; 3 * 128]);
/// let (mut output, mut states) = ([0f32; 3 * 128], vec![0f32; 2 * 128 * 128]);
/// let mut tensors = GdnTensors {
///     output: TensorMut::from_slice(&mut output, &[3, 1, 128])?,
///     output_state: TensorMut::from_slice(&mut states, &[2, 1, 128, 128])?,
///     q: TensorRef::from_slice(&q, &[3, 1, 128])?,
///     k: TensorRef::from_slice(&k, &[3, 1, 128])?,
///     v: TensorRef::from_slice(&v, &[3, 1, 128])?,
/// };
/// let sequences = CuSeqlens::from_lengths(&[1, 2])?;
/// GdnPrefillContext::on_host().prefill(&mut tensors, &sequences, &GdnOptions::default())?;
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
#[derive(Debug)]
pub struct GdnPrefillContext {
    #[cfg(feature = "cudarc")]
    gpu: Option<gpu::OnStream>,
}

impl GdnPrefillContext {
    /// A context for tensors on the host.
    pub const fn on_host() -> Self {
        Self {
            #[cfg(feature = "cudarc")]
            gpu: None,
        }
    }
}

fn prefill_on_host(tensors: &GdnTensors<'_>, sequences: &CuSeqlens, options: &GdnOptions<'_>) -> Result<()> {
    let offsets = TensorRef::from_slice(sequences.offsets(), &[sequences.offsets().len() as i64])?;
    let mut nothing: [u8; 0] = [];
    let workspace = TensorMut::from_slice(&mut nothing, &[0])?;
    let operands = operands(tensors, &offsets, &workspace, options)?;
    // SAFETY: the reference checks the offsets' contents; they are on the host, and so is all else, or it is refused.
    unsafe { launch_any_runs(&operands, sequences, Stream::NULL) }
}

#[cfg(not(feature = "cudarc"))]
impl GdnPrefillContext {
    /// Prefill of the gated delta rule, of tensors on the host.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) for what breaks [the contract](gdn_prefill), a tensor on a GPU
    /// among it.
    pub fn prefill(
        &mut self,
        tensors: &mut GdnTensors<'_>,
        sequences: &CuSeqlens,
        options: &GdnOptions<'_>,
    ) -> Result<()> {
        prefill_on_host(tensors, sequences, options)
    }
}

#[cfg(feature = "cudarc")]
mod gpu {
    use std::sync::Arc;

    use cudarc::driver::{CudaContext, CudaSlice, CudaStream};

    use super::{GdnOptions, GdnPrefillContext, GdnTensors, WORKSPACE_SIZE, launch_runs, operands, prefill_on_host};
    use crate::buffers::{device, refuse_per_thread};
    use crate::error::{FlashInferError, Result, driver};
    use crate::graph::{GraphMut, Leaf, Site};
    use crate::owner::refuse_capture;
    use crate::runtime::FlashInferRuntime;
    use crate::sequences::{CapturedCuSeqlens, Sequences};
    use crate::stream::Stream;
    use crate::tensor::{TensorMut, TensorRef};

    #[derive(Debug)]
    pub(super) struct OnStream {
        stream: Arc<CudaStream>,
        workspace: CudaSlice<u8>,
    }

    impl GdnPrefillContext {
        /// A context for a stream, with scratch memory of its own.
        ///
        /// # Errors
        /// [`DeviceOutOfRange`](FlashInferError::DeviceOutOfRange), [`Cuda`](FlashInferError::Cuda) where there is no
        /// memory, [`InvalidArgument`](FlashInferError::InvalidArgument) for the per-thread stream, which is another in each
        /// thread, and for a stream that captures, or why there is no GPU.
        pub fn new(stream: &Arc<CudaStream>) -> Result<Self> {
            refuse_per_thread("gdn_prefill", stream)?;
            refuse_capture("gdn_prefill", stream)?;
            FlashInferRuntime::global()?.checked_device(device(stream.context()))?;
            let workspace = stream.alloc_zeros(WORKSPACE_SIZE as usize).map_err(driver("allocating the workspace"))?;
            Ok(Self { gpu: Some(OnStream { stream: Arc::clone(stream), workspace }) })
        }

        /// The stream that calls are queued on; none on the host.
        pub fn stream(&self) -> Option<&Arc<CudaStream>> {
            self.gpu.as_ref().map(|gpu| &gpu.stream)
        }

        /// [Prefill of the gated delta rule](super::gdn_prefill), asynchronous on this context's stream; on the host at once.
        ///
        /// Sequences without tokens keep their state, or get zeros; the others are computed as if those were not there,
        /// with one launch for each stretch between them.
        ///
        /// # Errors
        /// As for [`gdn_prefill`](super::gdn_prefill), and [`InvalidArgument`](FlashInferError::InvalidArgument) for a
        /// tensor of another stream, or offsets that are not where the context is.
        pub fn prefill<'s>(
            &mut self,
            tensors: &mut GdnTensors<'_>,
            sequences: impl Into<Sequences<'s>>,
            options: &GdnOptions<'_>,
        ) -> Result<()> {
            match (&mut self.gpu, sequences.into()) {
                (None, Sequences::Host(sequences)) => prefill_on_host(tensors, sequences, options),
                (Some(gpu), Sequences::Device(sequences)) => {
                    let offsets = sequences.offsets(&gpu.stream)?;
                    let workspace = TensorMut::from_cudarc(&gpu.stream, &mut gpu.workspace, &[WORKSPACE_SIZE])?;
                    let operands = operands(tensors, &offsets, &workspace, options)?;
                    // SAFETY: the buffer was filled from the host's offsets, run by run, or vouched for as such; the
                    // workspace is this stream's alone.
                    unsafe { launch_runs(&operands, sequences.host(), Stream::cudarc(&gpu.stream)) }
                }
                (gpu, _) => {
                    let (found, expected) = match gpu {
                        Some(_) => ("on the host", "on the GPU: CuSeqlens::to_device copies them"),
                        None => ("on a GPU", "on the host, as the context is"),
                    };
                    Err(FlashInferError::InvalidArgument {
                        function: "gdn_prefill",
                        argument: "cu_seqlens",
                        found: found.to_owned(),
                        expected: expected.to_owned(),
                    })
                }
            }
        }
    }

    /// [`GdnPrefillContext`] in a capture.
    #[derive(Debug)]
    pub struct CapturedPrefill<'a>(Option<GraphMut<'a, u8>>);

    impl Leaf for GdnPrefillContext {
        type Captured<'a> = CapturedPrefill<'a>;
        type Views<'a> = ();

        fn check(&self, context: &Arc<CudaContext>) -> Result<()> {
            self.gpu.as_ref().map_or(Ok(()), |gpu| gpu.workspace.check(context))
        }

        fn captured<'a>(&'a mut self, site: Site) -> CapturedPrefill<'a> {
            CapturedPrefill(self.gpu.as_mut().map(|gpu| gpu.workspace.captured(site)))
        }

        fn views(&mut self) {}

        fn take_over(&mut self, stream: &CudaStream) {
            self.gpu.iter_mut().for_each(|gpu| gpu.workspace.take_over(stream));
        }

        fn hand_back(&mut self, launched: &crate::graph::Launched<'_>) -> Result<()> {
            self.gpu.iter_mut().try_for_each(|gpu| gpu.workspace.hand_back(launched))
        }
    }

    crate::graph::graph_leaf!(GdnPrefillContext);

    impl CapturedPrefill<'_> {
        /// [`GdnPrefillContext::prefill`], captured on the stream of the capture.
        ///
        /// # Errors
        /// As there.
        pub fn prefill(
            &mut self,
            tensors: &mut GdnTensors<'_>,
            sequences: &CapturedCuSeqlens<'_>,
            options: &GdnOptions<'_>,
            stream: Stream<'_>,
        ) -> Result<()> {
            let Some(workspace) = &mut self.0 else { return Err(on_host()) };
            let offsets: TensorRef<'_> = sequences.offsets()?;
            let workspace = workspace.write(&[WORKSPACE_SIZE])?;
            let operands = operands(tensors, &offsets, &workspace, options)?;
            // SAFETY: as for the context's own: the graph owns the offsets and the workspace, and its launches follow one
            // another.
            unsafe { launch_runs(&operands, sequences.host(), stream) }
        }
    }

    fn on_host() -> FlashInferError {
        FlashInferError::InvalidArgument {
            function: "gdn_prefill",
            argument: "context",
            found: "one for the host".to_owned(),
            expected: "one for a stream, GdnPrefillContext::new".to_owned(),
        }
    }
}

#[cfg(feature = "cudarc")]
pub use gpu::CapturedPrefill;
