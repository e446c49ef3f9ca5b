//! The kernels of a decode step (decode.cu), as functions that are called as those of a kernel library are.
//!
//! The engine calls them by the rows of [`decode`](crate::kernels::decode), whose conditions they take for granted.

use std::ffi::{CStr, c_void};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Loading;
use crate::contract::OWN;
use crate::cuda::{Blocks, Kernel};
use crate::error::Result;
use crate::ffi::abi::SafeCall;
use crate::module::Module;
use crate::reference::{Args, Raised, Strided, function};
use crate::runtime::FlashInferRuntime;
use crate::tensor::DType;

/// The PTX of decode.cu, with the zero byte that the driver looks for at its end.
const PTX: &CStr = match CStr::from_bytes_with_nul(concat!(include_str!("decode.ptx"), "\0").as_bytes()) {
    Ok(text) => text,
    Err(_) => panic!("PTX has no zero bytes"),
};

/// Threads of a block, and of one of a cluster that has a long row.
const THREADS: u32 = 128;
const LONG_THREADS: u32 = 1024;
/// The blocks of a cluster.
const CLUSTER: u32 = 8;
/// The heads that a block has.
const HEADS: u32 = 4;
/// Elements that a thread moves at once.
const EIGHT: u32 = 8;
/// The most blocks along the second dimension.
const MOST_BLOCKS: u32 = 65_535;
/// The largest head of the kernels for usual ones.
const USUAL_HEAD: i64 = 128;

/// The kernels' names, each in the types of [`halves`] or [`floats`].
const NAMES: [&CStr; 39] = [
    c"embedding_bf16",
    c"embedding_f16",
    c"rope_append_bf16",
    c"rope_append_f16",
    c"rope_append_large_bf16",
    c"rope_append_large_f16",
    c"qk_norm_rope_append_bf16",
    c"qk_norm_rope_append_f16",
    c"qk_norm_rope_append_large_bf16",
    c"qk_norm_rope_append_large_f16",
    c"add_bf16",
    c"add_f16",
    c"add_f32",
    c"mul_bf16",
    c"mul_f16",
    c"mul_f32",
    c"sigmoid_gate_bf16",
    c"sigmoid_gate_f16",
    c"sigmoid_gate_f32",
    c"silu_bf16",
    c"silu_f16",
    c"silu_f32",
    c"copy_bf16_bf16",
    c"copy_bf16_f16",
    c"copy_bf16_f32",
    c"copy_f16_bf16",
    c"copy_f16_f16",
    c"copy_f16_f32",
    c"copy_f32_bf16",
    c"copy_f32_f16",
    c"copy_f32_f32",
    c"softmax_rows_bf16",
    c"softmax_rows_f16",
    c"softmax_rows_f32",
    c"argmax_bf16",
    c"argmax_f16",
    c"argmax_f32",
    c"advance",
    c"sample",
];
/// Where a kernel's first type stands among them.
const EMBEDDING: usize = 0;
const ROPE_APPEND: usize = 2;
const QK_NORM_ROPE_APPEND: usize = 6;
const ADD: usize = 10;
const MUL: usize = 13;
const SIGMOID_GATE: usize = 16;
const SILU: usize = 19;
const COPY: usize = 22;
const SOFTMAX_ROWS: usize = 31;
const ARGMAX: usize = 34;
const ADVANCE: usize = 37;
const SAMPLE: usize = 38;

const FUNCTIONS: &[(&str, SafeCall)] = &[
    ("embedding", embedding),
    ("rope_append", rope_append),
    ("qk_norm_rope_append", qk_norm_rope_append),
    ("add", add),
    ("mul", mul),
    ("sigmoid_gate", sigmoid_gate),
    ("silu", silu),
    ("copy", copy),
    ("softmax_rows", softmax_rows),
    ("argmax", argmax),
    ("advance", advance),
    ("sample", sample),
];

/// The functions.
pub(crate) fn module() -> Result<&'static Module> {
    static MODULE: OnceLock<Module> = OnceLock::new();
    let runtime = FlashInferRuntime::global()?;
    Ok(MODULE.get_or_init(|| Module::here(OWN, FUNCTIONS.to_vec(), runtime.api())))
}

/// The kernels, loaded. A handle serves every device and thread.
struct Loaded {
    kernels: [Kernel; NAMES.len()],
    /// Of each kernel, a bit for each device that has it ready.
    ready: [AtomicU64; NAMES.len()],
}

impl Loaded {
    fn get(runtime: &'static FlashInferRuntime) -> Result<&'static Self> {
        static LOADING: Loading<Loaded> = Loading::new();
        LOADING.get(|| {
            let kernels = runtime.cudart()?.load_kernels(PTX, NAMES)?;
            Ok(Self { kernels, ready: [const { AtomicU64::new(0) }; NAMES.len()] })
        })
    }

    /// A kernel that is ready on a device, the current one, so that its launch loads nothing, in a capture perhaps.
    fn kernel(&self, runtime: &'static FlashInferRuntime, which: usize, device: i32) -> Result<Kernel> {
        let (kernel, ready) = (self.kernels[which], &self.ready[which]);
        let bit = u32::try_from(device).ok().and_then(|device| 1u64.checked_shl(device)).unwrap_or(0);
        if ready.load(Ordering::Relaxed) & bit == 0 {
            runtime.cudart()?.prepare(kernel)?;
            ready.fetch_or(bit, Ordering::Relaxed);
        }
        Ok(kernel)
    }
}

/// Makes all kernels ready on a device, so that no launch has to, in a capture perhaps.
#[cfg(feature = "cudarc")]
pub(crate) fn prepare(device: i32) -> Result<()> {
    let runtime = FlashInferRuntime::global()?;
    let loaded = Loaded::get(runtime)?;
    let _current = runtime.cudart()?.set_current(device)?;
    (0..NAMES.len()).try_for_each(|which| loaded.kernel(runtime, which, device).map(drop))
}

/// An error of this crate's as one that is raised.
fn raised(error: &crate::FlashInferError) -> Raised {
    ("RuntimeError", error.to_string())
}

/// Launches a kernel on the current device, which is the tensor's, and the stream that TVM-FFI has for it.
///
/// # Safety
/// `arguments` must point to what the kernel takes, each of its type, and hold for it.
unsafe fn launch(
    which: usize,
    at: &Strided<'_>,
    blocks: Blocks,
    arguments: &mut [*mut c_void],
    pdl: bool,
) -> std::result::Result<(), Raised> {
    let device = at.device.device_id;
    let queued = (|| {
        let runtime = FlashInferRuntime::global()?;
        let kernel = Loaded::get(runtime)?.kernel(runtime, which, device)?;
        let cudart = runtime.cudart()?;
        // SAFETY: the caller's promise; the stream is one of the device, by whoever set it; every kernel here waits first.
        match unsafe { cudart.launch(kernel, blocks, arguments, runtime.api().stream(device), pdl) }? {
            0 => Ok(()),
            code => Err(cudart.error("cudaLaunchKernel", code)),
        }
    })();
    queued.map_err(|error| raised(&error))
}

/// Pointers to variables, as a launch takes them.
macro_rules! pointers {
    ($($variable:ident),+) => { [$((&raw mut $variable).cast::<c_void>()),+] };
}

/// The place of a type among those that a kernel of FlashInfer's usual types has.
fn halves(tensor: &Strided<'_>) -> usize {
    usize::from(tensor.dtype == DType::F16)
}

/// The place of a type among those that other kernels have.
fn floats(tensor: &Strided<'_>) -> usize {
    if tensor.dtype == DType::F32 { 2 } else { halves(tensor) }
}

/// The sizes of a tensor of rows, and the stride between them.
fn rows(tensor: &Strided<'_>) -> (u32, u32, i64) {
    (tensor.shape[0] as u32, tensor.shape[1] as u32, tensor.strides[0])
}

/// Whether each row of each tensor starts at a multiple of 16 bytes.
fn aligned(tensors: &[&Strided<'_>]) -> bool {
    tensors.iter().all(|tensor| {
        let step = tensor.strides[0].wrapping_mul(tensor.dtype.size() as i64);
        tensor.data.addr().is_multiple_of(16) && (tensor.shape[0] == 1 || step % 16 == 0)
    })
}

/// Whether a kernel that does the same for all elements moves eight at a time, and its blocks: a row for each, in parts.
fn parts(tensors: &[&Strided<'_>], rows: u32, columns: u32) -> (u32, Blocks) {
    let wide = aligned(tensors) && columns.is_multiple_of(EIGHT);
    let at_once = if wide { THREADS * EIGHT } else { THREADS };
    let blocks = [rows, columns.div_ceil(at_once).clamp(1, MOST_BLOCKS)];
    (u32::from(wide), Blocks::new(blocks, THREADS))
}

/// A cluster for each row.
fn clusters(rows: u32) -> Blocks {
    Blocks::new([rows * CLUSTER, 1], LONG_THREADS)
}

function!(embedding, |args| {
    let [out, ids, table, scale, pdl] = args.exactly()?;
    let (out, ids, table) = (args.strided(out)?, args.strided(ids)?, args.strided(table)?);
    let (count, mut columns, mut out_stride) = rows(&out);
    let (mut tokens, _, mut table_stride) = rows(&table);
    let (mut wide, blocks) = parts(&[&out, &table], count, columns);
    let (mut to, mut indices, mut from) = (out.data, ids.data, table.data);
    let mut scale = args.float(scale)? as f32;
    let mut arguments = pointers![to, out_stride, indices, from, table_stride, tokens, columns, scale, wide];
    // SAFETY: the types are those of decode.cu; the row that the engine checked says how large the tensors are.
    unsafe { launch(EMBEDDING + halves(&out), &out, blocks, &mut arguments, args.bool(pdl)?) }
});

function!(add, |args| with(args, ADD));
function!(mul, |args| with(args, MUL));
function!(sigmoid_gate, |args| with(args, SIGMOID_GATE));

/// a ← f(a, b).
fn with(args: &Args<'_>, kernel: usize) -> std::result::Result<(), Raised> {
    let [a, b, pdl] = args.exactly()?;
    let (a, b) = (args.strided(a)?, args.strided(b)?);
    let (count, mut columns, mut a_stride) = rows(&a);
    let (_, _, mut b_stride) = rows(&b);
    let (mut wide, blocks) = parts(&[&a, &b], count, columns);
    let (mut to, mut from) = (a.data, b.data);
    let mut arguments = pointers![to, a_stride, from, b_stride, columns, wide];
    // SAFETY: as for `embedding`.
    unsafe { launch(kernel + floats(&a), &a, blocks, &mut arguments, args.bool(pdl)?) }
}

function!(silu, |args| {
    let [a, pdl] = args.exactly()?;
    let a = args.strided(a)?;
    let (count, mut columns, mut stride) = rows(&a);
    let (mut wide, blocks) = parts(&[&a], count, columns);
    let mut to = a.data;
    let mut arguments = pointers![to, stride, columns, wide];
    // SAFETY: as for `embedding`.
    unsafe { launch(SILU + floats(&a), &a, blocks, &mut arguments, args.bool(pdl)?) }
});

function!(copy, |args| {
    let [out, input, pdl] = args.exactly()?;
    let (out, input) = (args.strided(out)?, args.strided(input)?);
    let (count, mut columns, mut out_stride) = rows(&out);
    let (_, _, mut stride) = rows(&input);
    let (mut wide, blocks) = parts(&[&out, &input], count, columns);
    let (mut to, mut from) = (out.data, input.data);
    let mut arguments = pointers![to, out_stride, from, stride, columns, wide];
    let kernel = COPY + 3 * floats(&input) + floats(&out);
    // SAFETY: as for `embedding`.
    unsafe { launch(kernel, &out, blocks, &mut arguments, args.bool(pdl)?) }
});

/// What softmax's powers of two are multiplied by. Of a temperature so small that no F32 is as large, the largest one, with which
/// whatever is less than the row's largest number becomes 0.
fn factor(temperature: f64) -> f32 {
    (std::f64::consts::LOG2_E / temperature).min(f32::MAX.into()) as f32
}

function!(softmax_rows, |args| {
    let [a, temperature, pdl] = args.exactly()?;
    let a = args.strided(a)?;
    let (count, mut columns, mut stride) = rows(&a);
    let mut factor = factor(args.float(temperature)?);
    let (mut to, mut wide) = (a.data, u32::from(aligned(&[&a])));
    let mut arguments = pointers![to, stride, columns, factor, wide];
    // SAFETY: as for `embedding`.
    unsafe { launch(SOFTMAX_ROWS + floats(&a), &a, clusters(count), &mut arguments, args.bool(pdl)?) }
});

function!(argmax, |args| {
    let [token, logits, pdl] = args.exactly()?;
    let (token, logits) = (args.strided(token)?, args.strided(logits)?);
    let (count, mut columns, mut stride) = rows(&logits);
    let (mut to, mut from, mut wide) = (token.data, logits.data, u32::from(aligned(&[&logits])));
    let mut arguments = pointers![to, from, stride, columns, wide];
    // SAFETY: as for `embedding`.
    unsafe { launch(ARGMAX + floats(&logits), &logits, clusters(count), &mut arguments, args.bool(pdl)?) }
});

function!(advance, |args| {
    let [token, ids, positions, lengths, capacity, pdl] = args.exactly()?;
    let [token, ids, positions, lengths] =
        [args.strided(token)?, args.strided(ids)?, args.strided(positions)?, args.strided(lengths)?];
    let (mut rows, mut capacity) = (ids.shape[0] as u32, args.int(capacity)? as i32);
    let (mut from, mut to, mut places, mut counts) = (token.data, ids.data, positions.data, lengths.data);
    let blocks = Blocks::new([rows.div_ceil(THREADS), 1], THREADS);
    let mut arguments = pointers![from, to, places, counts, rows, capacity];
    // SAFETY: as for `embedding`.
    unsafe { launch(ADVANCE, &ids, blocks, &mut arguments, args.bool(pdl)?) }
});

function!(sample, |args| {
    /// What a probability of 1 is as a whole number: `SCALE` in decode.cu.
    const SCALE: f64 = (1u64 << 44) as f64;
    let [token, probs, number, top_k, top_p, pdl] = args.exactly()?;
    let (token, probs, number) = (args.strided(token)?, args.strided(probs)?, args.strided(number)?);
    let (count, mut columns, mut stride) = rows(&probs);
    let (mut top_k, mut top_p) = (args.int(top_k)? as u32, (args.float(top_p)? * SCALE).ceil() as u64);
    let (mut to, mut from, mut numbers) = (token.data, probs.data, number.data);
    let mut arguments = pointers![to, from, stride, numbers, columns, top_k, top_p];
    // SAFETY: as for `embedding`.
    unsafe { launch(SAMPLE, &probs, clusters(count), &mut arguments, args.bool(pdl)?) }
});

/// What `rope_append` and `qk_norm_rope_append` take: `Turned` in decode.cu.
#[repr(C)]
struct Turned {
    q: *mut c_void,
    k: *mut c_void,
    v: *mut c_void,
    q_weight: *mut c_void,
    k_weight: *mut c_void,
    cos_sin: *mut c_void,
    positions: *mut c_void,
    page_table: *mut c_void,
    k_cache: *mut c_void,
    v_cache: *mut c_void,
    /// Of the rows and of the heads of queries, keys and values.
    strides: [i64; 6],
    cos_sin_row: i64,
    table_row: i64,
    q_heads: u32,
    kv_heads: u32,
    size: u32,
    rotary: u32,
    angles: u32,
    pages: u32,
    page_size: u32,
    width: u32,
    eps: f32,
    interleave: u32,
}

/// As decode.cu asserts.
const _: () = assert!(size_of::<Turned>() == 184);

function!(rope_append, |args| {
    let [q, k, v, cos_sin, positions, page_table, k_cache, v_cache, interleave, pdl] = args.exactly()?;
    let tensors = [q, k, v, cos_sin, positions, page_table, k_cache, v_cache];
    turned_append(args, tensors, None, args.bool(interleave)?, args.bool(pdl)?)
});

function!(qk_norm_rope_append, |args| {
    let [q, k, v, q_weight, k_weight, cos_sin, positions, page_table, k_cache, v_cache, eps, interleave, pdl] =
        args.exactly()?;
    let norm = ([args.strided(q_weight)?.data, args.strided(k_weight)?.data], args.float(eps)? as f32);
    let tensors = [q, k, v, cos_sin, positions, page_table, k_cache, v_cache];
    turned_append(args, tensors, Some(norm), args.bool(interleave)?, args.bool(pdl)?)
});

fn turned_append(
    args: &Args<'_>,
    tensors: [usize; 8],
    norm: Option<([*mut c_void; 2], f32)>,
    interleave: bool,
    pdl: bool,
) -> std::result::Result<(), Raised> {
    let [q, k, v, cos_sin, positions, page_table, k_cache, v_cache] = tensors;
    let (q, k, v) = (args.strided(q)?, args.strided(k)?, args.strided(v)?);
    let (cos_sin, page_table, k_cache) = (args.strided(cos_sin)?, args.strided(page_table)?, args.strided(k_cache)?);
    let ([q_weight, k_weight], eps) = norm.unwrap_or(([std::ptr::null_mut(); 2], 0.0));
    let size = |tensor: &Strided<'_>, at: usize| tensor.shape[at] as u32;
    let mut call = Turned {
        q: q.data,
        k: k.data,
        v: v.data,
        q_weight,
        k_weight,
        cos_sin: cos_sin.data,
        positions: args.strided(positions)?.data,
        page_table: page_table.data,
        k_cache: k_cache.data,
        v_cache: args.strided(v_cache)?.data,
        strides: [q.strides[0], q.strides[1], k.strides[0], k.strides[1], v.strides[0], v.strides[1]],
        cos_sin_row: cos_sin.strides[0],
        table_row: page_table.strides[0],
        q_heads: size(&q, 1),
        kv_heads: size(&k, 1),
        size: size(&q, 2),
        rotary: size(&cos_sin, 1),
        angles: size(&cos_sin, 0),
        pages: size(&k_cache, 0),
        page_size: size(&k_cache, 1),
        width: size(&page_table, 1),
        eps,
        interleave: u32::from(interleave),
    };
    let tasks = call.q_heads + 2 * call.kv_heads;
    let blocks = Blocks::new([size(&q, 0), tasks.div_ceil(HEADS)], THREADS);
    let kernel = if norm.is_some() { QK_NORM_ROPE_APPEND } else { ROPE_APPEND };
    let large = if q.shape[2] > USUAL_HEAD { 2 } else { 0 };
    // SAFETY: as for `embedding`; the kernel looks at every position and page itself.
    unsafe { launch(kernel + large + halves(&q), &q, blocks, &mut pointers![call], pdl) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn softmax_s_factor_is_a_number_for_every_temperature_that_is_one() {
        assert_eq!(factor(1.0), std::f32::consts::LOG2_E);
        for temperature in [f64::from(f32::from_bits(1)), f32::MIN_POSITIVE.into(), 1e-3, f32::MAX.into()] {
            assert!(factor(temperature).is_finite() && factor(temperature) > 0.0, "{temperature}");
        }
    }

    #[test]
    fn ptx_has_the_kernels_with_the_threads_that_they_are_launched_with() {
        let (ptx, source) = (PTX.to_str().unwrap(), include_str!("decode.cu"));
        for name in NAMES {
            let name = name.to_str().unwrap();
            let from = ptx.find(&format!(".visible .entry {name}(")).unwrap_or_else(|| panic!("{name}"));
            let head = &ptx[from..from + ptx[from..].find('{').unwrap()];
            let long = ["argmax", "softmax_rows", "sample"].iter().any(|long| name.starts_with(long));
            let threads = if long { LONG_THREADS } else { THREADS };
            assert!(head.contains(&format!(".maxntid {threads}")), "{name}: {head}");
            assert_eq!(head.contains(".explicitcluster"), long, "{name}");
            assert_eq!(head.contains(&format!(".reqnctapercluster {CLUSTER}")), long, "{name}");
        }
        assert_eq!(ptx.matches(".visible .entry ").count(), NAMES.len());
        for (name, value) in
            [("THREADS", THREADS), ("LONG_THREADS", LONG_THREADS), ("BLOCKS", CLUSTER), ("HEADS", HEADS)]
        {
            assert!(source.contains(&format!("constexpr u32 {name} = {value};")), "{name}");
        }
        assert!(source.contains(&format!("constexpr f32 SCALE = {}.0f;", 1u64 << 44)));
    }

    #[test]
    fn every_kernel_stands_where_its_type_is_looked_for() {
        let named = |which: usize| NAMES[which].to_str().unwrap();
        let types = ["bf16", "f16", "f32"];
        for (i, a) in types.iter().enumerate() {
            if i < 2 {
                assert_eq!(named(EMBEDDING + i), format!("embedding_{a}"));
                for (first, name) in [(ROPE_APPEND, "rope_append"), (QK_NORM_ROPE_APPEND, "qk_norm_rope_append")] {
                    assert_eq!(named(first + i), format!("{name}_{a}"));
                    assert_eq!(named(first + 2 + i), format!("{name}_large_{a}"));
                }
            }
            let each = [(ADD, "add"), (MUL, "mul"), (SIGMOID_GATE, "sigmoid_gate"), (SILU, "silu")];
            for (first, name) in each.into_iter().chain([(SOFTMAX_ROWS, "softmax_rows"), (ARGMAX, "argmax")]) {
                assert_eq!(named(first + i), format!("{name}_{a}"));
            }
            for (j, b) in types.iter().enumerate() {
                assert_eq!(named(COPY + 3 * i + j), format!("copy_{a}_{b}"));
            }
        }
        assert_eq!([named(ADVANCE), named(SAMPLE)], ["advance", "sample"]);
    }

    /// The kernel ahead may write still what a cache that is not coherent has read already.
    #[test]
    fn every_kernel_waits_before_it_touches_memory_and_reads_nothing_past_the_coherent_caches() {
        let ptx = PTX.to_str().unwrap();
        assert!(!ptx.contains("ld.global.nc") && !ptx.contains("ld.volatile"));
        for body in ptx.split(".visible .entry ").skip(1) {
            let waits = body.find("griddepcontrol.wait;").expect("a wait");
            let before = &body[..waits];
            for touches in
                ["ld.global", "st.global", "ld.shared", "st.shared", "atom.", "red.", "bar.", "barrier.", "bra"]
            {
                assert!(!before.contains(touches), "{touches} before the wait: {before}");
            }
            assert_eq!(body.matches("griddepcontrol.wait;").count(), 1);
            assert_eq!(body.matches("griddepcontrol.launch_dependents;").count(), 1);
        }
    }

    #[test]
    fn rows_are_moved_by_eights_where_all_of_them_are_aligned() {
        let (shape, at) = ([4i64, 24], |address: usize| std::ptr::without_provenance_mut::<c_void>(address));
        let cpu = crate::ffi::dlpack::DLDevice { device_type: crate::ffi::dlpack::CPU, device_id: 0 };
        let tensor = |address: usize, strides: &'static [i64], dtype| Strided {
            data: at(address),
            device: cpu,
            dtype,
            shape: Box::leak(Box::new(shape)),
            strides,
        };
        let whole = tensor(256, &[24, 1], DType::BF16);
        assert_eq!(parts(&[&whole], 4, 24), (1, Blocks::new([4, 1], THREADS)));
        for odd in
            [tensor(258, &[24, 1], DType::BF16), tensor(256, &[25, 1], DType::BF16), tensor(256, &[26, 1], DType::F32)]
        {
            assert_eq!(parts(&[&whole, &odd], 4, 24).0, 0);
        }
        assert_eq!(parts(&[&tensor(256, &[28, 1], DType::F32)], 4, 24).0, 1);
        assert_eq!(parts(&[&whole], 4, 20).0, 0, "no whole eights");
        assert_eq!(parts(&[&whole], 4, 1 << 20).1.blocks, [4, 1024]);
        assert_eq!(parts(&[&whole], 4, (1 << 30) + 1).1.blocks, [4, MOST_BLOCKS]);
    }
}
