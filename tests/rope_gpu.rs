//! Rotary embeddings on a GPU, against the reference and against what is refused. `FLASHINFER_RS_RUN_GPU_TESTS=1 cargo test
//! --features cudarc,rope --test rope_gpu` runs them, within 120 seconds.

#[path = "support/data.rs"]
mod data;
#[path = "support/gpu.rs"]
mod gpu;
#[path = "support/rows.rs"]
mod rows;

use std::process::ExitCode;

use data::{Number, Random, assert_close, widened};
use flashinfer_rs::kernels::page::{KvLayout, PagedKvCache};
use flashinfer_rs::kernels::rope::{
    Llama31RopeOptions, RopeAppendTensors, RopeOptions, RopeQuantizeOptions, RopeQuantizeTensors, apply_llama31_rope,
    apply_llama31_rope_inplace, apply_llama31_rope_pos_ids, apply_llama31_rope_pos_ids_inplace, apply_rope,
    apply_rope_inplace, apply_rope_pos_ids, apply_rope_pos_ids_inplace, apply_rope_with_cos_sin_cache,
    apply_rope_with_cos_sin_cache_inplace, is_supported, rope_quantize, rope_quantize_append_paged_kv_cache,
};
use flashinfer_rs::{
    CosSinCache, DType, Device, LaunchGraph, OnDevice, PageTable, Placed, Positions, RaggedFacts, RaggedPositions,
    Result, RopeScaling, Stream, TensorMut, TensorRef,
};
use gpu::Gpu;
use half::{bf16, f16};

fn main() -> ExitCode {
    gpu::main(&[
        ("angles_that_are_computed_match_in_bf16", |gpu| computed::<bf16>(gpu, 4e-3)),
        ("angles_that_are_computed_match_in_f16", |gpu| computed::<f16>(gpu, 1e-3)),
        ("calls_with_a_table_that_keep_their_row_match", |gpu| {
            BY_TABLE.iter().for_each(|&(kernel, call)| rows::valid(gpu, rows::row(kernel), 80, call));
        }),
        ("calls_that_break_their_row_in_one_place_are_refused_by_name", |gpu| {
            ALL.into_iter().flatten().for_each(|&(kernel, call)| rows::invalid(gpu, rows::row(kernel), 200, call));
        }),
        ("sizes_that_break_a_relation_are_refused_by_name", |_| {
            ALL.into_iter().flatten().for_each(|&(kernel, call)| rows::limits(rows::row(kernel), 4000, call));
        }),
        ("in_place_and_not_are_the_same", in_place),
        ("a_table_is_exact_at_far_positions", far),
        ("the_last_position_of_a_table_is_turned_right", last),
        ("appended_keys_match_those_that_are_not", appended),
        ("a_replayed_graph_turns_by_the_new_positions", replayed),
        ("calls_do_not_wait", asynchronous),
        ("the_gpu_is_said_to_be_supported", supported),
    ])
}

/// How the kernels with a table are called of which every call that keeps the row is right.
const BY_TABLE: [(&str, rows::Function); 3] = [
    ("apply_rope_pos_ids_cos_sin_cache", |call, s| {
        let (q, k, interleave) = (call.read("q"), call.read("k"), call.on("interleave"));
        let (table, positions) = steering(call);
        let outs = (&mut call.write("q_rope"), &mut call.write("k_rope"));
        apply_rope_with_cos_sin_cache(outs, (&q, &k), &table, &positions, interleave, s)
    }),
    ("rope_quantize", quantize),
    ("rope_quantize of shared keys", quantize),
];

fn quantize(call: &mut rows::Call<'_>, s: Stream<'_>) -> Result<()> {
    let (table, positions) = steering(call);
    let mut options = RopeQuantizeOptions::default();
    (options.quant_scale_q, options.quant_scale_kv) = (call.number("quant_scale_q"), call.number("quant_scale_kv"));
    (options.interleave, options.pdl) = (call.on("interleave"), call.on("enable_pdl"));
    let mut tensors = RopeQuantizeTensors {
        q_rope_in: call.read("q_rope_in"),
        k_rope_in: call.read("k_rope_in"),
        q_nope_in: Some(call.read("q_nope_in")),
        k_nope_in: Some(call.read("k_nope_in")),
        q_rope_out: call.write("q_rope_out"),
        k_rope_out: call.write("k_rope_out"),
        q_nope_out: Some(call.write("q_nope_out")),
        k_nope_out: Some(call.write("k_nope_out")),
    };
    rope_quantize(&mut tensors, &table, &positions, &options, s)
}

/// The table of a call, and its positions.
fn steering<'a>(call: &mut rows::Call<'a>) -> (Placed<'a, CosSinCache>, Placed<'a, Positions>) {
    let table = call.read("cos_sin_cache");
    let below = table.shape().first().copied().unwrap_or(0);
    // SAFETY: the tests' memory has 64 elements more than a tensor, and positions are counted up to the table's.
    unsafe {
        (Placed::<CosSinCache>::from_tensor(table), Placed::<Positions>::from_tensor(call.read("pos_ids"), below))
    }
}

/// The others. Their numbers may be such that angles have no meaning, or their indices such that a token has no place.
const OTHERS: [(&str, rows::Function); 4] = [
    ("apply_rope_pos_ids", |call, s| {
        let (q, k, options) = (call.read("q"), call.read("k"), options(call));
        // SAFETY: these positions change numbers alone.
        let positions = unsafe { Placed::<Positions>::from_tensor(call.read("pos_ids"), 1 << 20) };
        apply_rope_pos_ids((&mut call.write("q_rope"), &mut call.write("k_rope")), (&q, &k), &positions, &options, s)
    }),
    ("apply_llama31_rope_pos_ids", |call, s| {
        let (q, k, options) = (call.read("q"), call.read("k"), llama31(call));
        // SAFETY: as above.
        let positions = unsafe { Placed::<Positions>::from_tensor(call.read("pos_ids"), 1 << 20) };
        let outs = (&mut call.write("q_rope"), &mut call.write("k_rope"));
        apply_llama31_rope_pos_ids(outs, (&q, &k), &positions, &options, s)
    }),
    ("apply_rope", |call, s| {
        let (q, k, options, sequences) = (call.read("q"), call.read("k"), options(call), sequences(call));
        let sequences = sequences(&q);
        apply_rope((&mut call.write("q_rope"), &mut call.write("k_rope")), (&q, &k), &sequences, &options, s)
    }),
    ("apply_llama31_rope", |call, s| {
        let (q, k, options, sequences) = (call.read("q"), call.read("k"), llama31(call), sequences(call));
        let sequences = sequences(&q);
        apply_llama31_rope((&mut call.write("q_rope"), &mut call.write("k_rope")), (&q, &k), &sequences, &options, s)
    }),
];

const ALL: [&[(&str, rows::Function)]; 2] = [&BY_TABLE, &OTHERS];

fn options(call: &mut rows::Call<'_>) -> RopeOptions {
    let mut options = RopeOptions::default();
    (options.rotary_dim, options.interleave) = (Some(call.whole("rotary_dim")), call.on("interleave"));
    (options.rope_scale, options.rope_theta) = (call.number("rope_scale"), call.number("rope_theta"));
    options
}

fn llama31(call: &mut rows::Call<'_>) -> Llama31RopeOptions {
    let mut llama31 = Llama31RopeOptions::default();
    llama31.rope = options(call);
    (llama31.low_freq_factor, llama31.high_freq_factor) =
        (call.number("low_freq_factor"), call.number("high_freq_factor"));
    llama31.old_context_length = call.number("old_context_length");
    llama31
}

fn sequences<'a>(call: &mut rows::Call<'a>) -> impl FnOnce(&TensorRef<'_>) -> Placed<'a, RaggedPositions> {
    let (indptr, offsets) = (call.read("indptr"), call.read("offsets"));
    |q| {
        let tokens = q.shape().first().copied().unwrap_or(0);
        let facts = RaggedFacts { tokens, sequences: offsets.shape().first().copied().unwrap_or(0) };
        // SAFETY: the row's offsets go from 0 up to the number of tokens, or the call is refused.
        unsafe { Placed::<RaggedPositions>::from_tensors(indptr, offsets, facts) }
    }
}

/// A batch on both sides: what the GPU is given, and the same in f32.
struct Batch<T> {
    shapes: [[i64; 3]; 2],
    heads: [Vec<T>; 2],
}

impl<T: Number> Batch<T> {
    fn new(seed: u64, tokens: i64, q_heads: i64, kv_heads: i64, head_dim: i64) -> Self {
        let (shapes, mut random) = ([[tokens, q_heads, head_dim], [tokens, kv_heads, head_dim]], Random(seed));
        let heads = shapes.map(|shape| random.normal(shape.iter().product::<i64>() as usize));
        Self { shapes, heads }
    }

    /// A call on the GPU, to other tensors.
    fn on_gpu(&self, gpu: &Gpu, call: impl FnOnce([&mut TensorMut<'_>; 2], [&TensorRef<'_>; 2])) -> [Vec<f32>; 2] {
        let stream = &gpu.stream;
        let [q, k] = [&self.heads[0], &self.heads[1]].map(|heads| stream.clone_htod(heads).unwrap());
        let [mut q_rope, mut k_rope] =
            [&q, &k].map(|heads| stream.clone_htod(&vec![T::POISON; cudarc::driver::DeviceSlice::len(heads)]).unwrap());
        {
            let [q_shape, k_shape] = &self.shapes;
            call(
                [
                    &mut TensorMut::from_cudarc(stream, &mut q_rope, q_shape).unwrap(),
                    &mut TensorMut::from_cudarc(stream, &mut k_rope, k_shape).unwrap(),
                ],
                [
                    &TensorRef::from_cudarc(stream, &q, q_shape).unwrap(),
                    &TensorRef::from_cudarc(stream, &k, k_shape).unwrap(),
                ],
            );
        }
        [q_rope, k_rope].map(|heads| widened(&stream.clone_dtoh(&heads).unwrap()))
    }

    /// A call on the GPU, onto its inputs.
    fn in_place(&self, gpu: &Gpu, call: impl FnOnce(&mut TensorMut<'_>, &mut TensorMut<'_>)) -> [Vec<f32>; 2] {
        let stream = &gpu.stream;
        let [mut q, mut k] = [&self.heads[0], &self.heads[1]].map(|heads| stream.clone_htod(heads).unwrap());
        {
            let (mut q, mut k) = (
                TensorMut::from_cudarc(stream, &mut q, &self.shapes[0]).unwrap(),
                TensorMut::from_cudarc(stream, &mut k, &self.shapes[1]).unwrap(),
            );
            call(&mut q, &mut k);
        }
        [q, k].map(|heads| widened(&stream.clone_dtoh(&heads).unwrap()))
    }

    /// A call on the host, onto its inputs, in f32.
    fn on_host(&self, call: impl FnOnce(&mut TensorMut<'_>, &mut TensorMut<'_>)) -> [Vec<f32>; 2] {
        let [mut q, mut k] = [&self.heads[0], &self.heads[1]].map(|heads| widened(heads));
        {
            let (mut q, mut k) = (
                TensorMut::from_slice(&mut q, &self.shapes[0]).unwrap(),
                TensorMut::from_slice(&mut k, &self.shapes[1]).unwrap(),
            );
            call(&mut q, &mut k);
        }
        [q, k]
    }
}

fn assert_both(what: &str, found: &[Vec<f32>; 2], expected: &[Vec<f32>; 2], tolerance: f64) {
    assert_close(&format!("queries, {what}"), &found[0], &expected[0], tolerance);
    assert_close(&format!("keys, {what}"), &found[1], &expected[1], tolerance);
}

/// Head sizes, turned elements and pairs, with few tokens and with more than one wave of blocks.
fn cases() -> Vec<(i64, i64, i64, bool)> {
    let mut cases = Vec::new();
    for (head_dim, rotary_dim) in [(64, 64), (128, 128), (128, 64), (128, 16), (256, 64), (256, 256), (512, 128)] {
        for interleave in [false, true] {
            cases.push((5, head_dim, rotary_dim, interleave));
        }
    }
    cases.extend([(40_000, 128, 128, false), (40_000, 64, 32, true)]);
    cases
}

fn computed<T: Number>(gpu: &Gpu, tolerance: f64) {
    let s = Stream::cudarc(&gpu.stream);
    for (i, (tokens, head_dim, rotary_dim, interleave)) in cases().into_iter().enumerate() {
        let batch = Batch::<T>::new(i as u64, tokens, 4, 1, head_dim);
        let values: Vec<i64> = (0..tokens).map(|token| token * 7 % 900).collect();
        let positions = Positions::new(&values, 1000).unwrap();
        let half = tokens / 2;
        let ragged = RaggedPositions::new(&[0, half, half, tokens], &[3, 50, 17]).unwrap();
        let on_gpu = (OnDevice::new(positions.clone(), &gpu.stream), OnDevice::new(ragged.clone(), &gpu.stream));
        let (positions_gpu, ragged_gpu) = (on_gpu.0.unwrap(), on_gpu.1.unwrap());
        let (at, at_ragged) = (positions_gpu.placed(&gpu.stream).unwrap(), ragged_gpu.placed(&gpu.stream).unwrap());
        let (host, host_ragged) = (Placed::on_host(&positions).unwrap(), Placed::on_host(&ragged).unwrap());
        let mut options = RopeOptions::default();
        (options.rotary_dim, options.interleave, options.rope_scale) = (Some(rotary_dim), interleave, 2.0);
        let mut llama = Llama31RopeOptions::default();
        (llama.rope.rotary_dim, llama.rope.interleave) = (Some(rotary_dim), interleave);
        let what = format!("{tokens} tokens, {rotary_dim} of {head_dim}, interleave {interleave}");
        // Far positions of many tokens are off by what their angles are.
        let tolerance = if tokens > 1000 { tolerance.max(6e-3) } else { tolerance };
        let found = batch.on_gpu(gpu, |[q_rope, k_rope], [q, k]| {
            apply_rope_pos_ids((q_rope, k_rope), (q, k), &at, &options, s).unwrap();
        });
        let expected = batch.on_host(|q, k| apply_rope_pos_ids_inplace(q, k, &host, &options, Stream::NULL).unwrap());
        assert_both(&what, &found, &expected, tolerance);
        let own = batch.in_place(gpu, |q, k| apply_rope_pos_ids_inplace(q, k, &at, &options, s).unwrap());
        assert!(own == found, "in place, {what}");
        let found = batch.on_gpu(gpu, |[q_rope, k_rope], [q, k]| {
            apply_llama31_rope_pos_ids((q_rope, k_rope), (q, k), &at, &llama, s).unwrap();
        });
        let expected =
            batch.on_host(|q, k| apply_llama31_rope_pos_ids_inplace(q, k, &host, &llama, Stream::NULL).unwrap());
        assert_both(&format!("Llama 3.1, {what}"), &found, &expected, tolerance);
        if tokens > 1000 {
            // Positions of these would be thousands of radians.
            continue;
        }
        let found = batch.on_gpu(gpu, |[q_rope, k_rope], [q, k]| {
            apply_rope((q_rope, k_rope), (q, k), &at_ragged, &options, s).unwrap();
        });
        let expected = batch.on_host(|q, k| apply_rope_inplace(q, k, &host_ragged, &options, Stream::NULL).unwrap());
        assert_both(&format!("ragged, {what}"), &found, &expected, tolerance);
        let own = batch.in_place(gpu, |q, k| apply_llama31_rope_inplace(q, k, &at_ragged, &llama, s).unwrap());
        let expected =
            batch.on_host(|q, k| apply_llama31_rope_inplace(q, k, &host_ragged, &llama, Stream::NULL).unwrap());
        assert_both(&format!("ragged Llama 3.1, {what}"), &own, &expected, tolerance);
    }
}

fn in_place(gpu: &Gpu) {
    let s = Stream::cudarc(&gpu.stream);
    // Also head sizes that the kernel is not compiled for, which go another way.
    let mut all = cases();
    all.extend([(300, 96, 64, false), (300, 192, 128, false), (300, 80, 80, true), (300, 192, 64, true)]);
    for (i, (tokens, head_dim, rotary_dim, interleave)) in all.into_iter().enumerate() {
        let batch = Batch::<bf16>::new(i as u64, tokens, 3, 2, head_dim);
        let values: Vec<i64> = (0..tokens).map(|token| token * 31 % 4096).collect();
        let positions = OnDevice::new(Positions::new(&values, 4096).unwrap(), &gpu.stream).unwrap();
        let table = CosSinCache::new(rotary_dim, 4096, 1e4, RopeScaling::None).unwrap();
        let on_gpu = OnDevice::new(table.clone(), &gpu.stream).unwrap();
        let (at, by) = (positions.placed(&gpu.stream).unwrap(), on_gpu.placed(&gpu.stream).unwrap());
        let found = batch.on_gpu(gpu, |[q_rope, k_rope], [q, k]| {
            apply_rope_with_cos_sin_cache((q_rope, k_rope), (q, k), &by, &at, interleave, s).unwrap();
        });
        let own = batch.in_place(gpu, |q, k| {
            apply_rope_with_cos_sin_cache_inplace(q, k, &by, &at, interleave, s).unwrap();
        });
        let what = format!("{tokens} tokens, {rotary_dim} of {head_dim}, interleave {interleave}");
        assert!(own == found, "{what}");
        let (at, by) = (Placed::on_host(positions.host()).unwrap(), Placed::on_host(&table).unwrap());
        let expected = batch.on_host(|q, k| {
            apply_rope_with_cos_sin_cache_inplace(q, k, &by, &at, interleave, Stream::NULL).unwrap();
        });
        assert_both(&what, &found, &expected, 4e-3);
    }
}

fn far(gpu: &Gpu) {
    let s = Stream::cudarc(&gpu.stream);
    let positions = Positions::new(&[131_071, 130_000, 99_999], 131_072).unwrap();
    let table = CosSinCache::new(128, 131_072, 5e5, RopeScaling::None).unwrap();
    let (positions, table) =
        (OnDevice::new(positions, &gpu.stream).unwrap(), OnDevice::new(table, &gpu.stream).unwrap());
    let batch = Batch::<f16>::new(9, 3, 8, 2, 128);
    let (at, by) = (positions.placed(&gpu.stream).unwrap(), table.placed(&gpu.stream).unwrap());
    let found = batch.on_gpu(gpu, |[q_rope, k_rope], [q, k]| {
        apply_rope_with_cos_sin_cache((q_rope, k_rope), (q, k), &by, &at, false, s).unwrap();
    });
    // Against angles in f64, not the table.
    let (host, mut options) = (Placed::on_host(positions.host()).unwrap(), RopeOptions::default());
    options.rope_theta = 5e5;
    let expected = batch.on_host(|q, k| apply_rope_pos_ids_inplace(q, k, &host, &options, Stream::NULL).unwrap());
    assert_both("far positions", &found, &expected, 6e-4);
}

/// An interleaved kernel reads past the last row. Memory behind it belongs to the table.
fn last(gpu: &Gpu) {
    let s = Stream::cudarc(&gpu.stream);
    for (head_dim, rotary_dim) in [(64, 64), (512, 64), (96, 32)] {
        let positions = Positions::new(&[15], 16).unwrap();
        let table = CosSinCache::new(rotary_dim, 16, 1e4, RopeScaling::None).unwrap();
        let (on_gpu, at) = (
            OnDevice::new(table.clone(), &gpu.stream).unwrap(),
            OnDevice::new(positions.clone(), &gpu.stream).unwrap(),
        );
        let batch = Batch::<bf16>::new(4, 1, 2, 2, head_dim);
        let (by, at) = (on_gpu.placed(&gpu.stream).unwrap(), at.placed(&gpu.stream).unwrap());
        let found = batch.on_gpu(gpu, |[q_rope, k_rope], [q, k]| {
            apply_rope_with_cos_sin_cache((q_rope, k_rope), (q, k), &by, &at, true, s).unwrap();
        });
        let (by, at) = (Placed::on_host(&table).unwrap(), Placed::on_host(&positions).unwrap());
        let expected = batch.on_host(|q, k| {
            apply_rope_with_cos_sin_cache_inplace(q, k, &by, &at, true, Stream::NULL).unwrap();
        });
        assert_both(&format!("{rotary_dim} of {head_dim}"), &found, &expected, 4e-3);
    }
}

/// What the fused kernel writes to a cache is what the other writes to tensors.
fn appended(gpu: &Gpu) {
    let stream = &gpu.stream;
    let s = Stream::cudarc(stream);
    for (layout, rope, nope, interleave) in
        [(KvLayout::Nhd, 64, 64, false), (KvLayout::Hnd, 64, 128, true), (KvLayout::Nhd, 128, 0, false)]
    {
        let (q_heads, kv_heads, page_size, pages) = (5i64, 2i64, 4i64, 9i64);
        let head = rope + nope;
        let mut table = PageTable::new(page_size, pages, 100).unwrap();
        table.push(&[3, 8, 1], 5).unwrap();
        table.push(&[2], 0).unwrap();
        let tokens = table.append(&[6, 3]).unwrap();
        let count = 9i64;
        let angles = CosSinCache::new(rope, 100, 1e4, RopeScaling::None).unwrap();
        let (on_gpu, by) = (OnDevice::new(tokens.clone(), stream).unwrap(), OnDevice::new(angles, stream).unwrap());
        let (placed, by) = (on_gpu.placed(stream).unwrap(), by.placed(stream).unwrap());
        let mut random = Random(77);
        let mut upload = |len: i64| stream.clone_htod(&random.normal::<bf16>(len.max(8) as usize)).unwrap();
        let (q_rope, k_rope) = (upload(count * q_heads * rope), upload(count * kv_heads * rope));
        let (q_nope, k_nope) = (upload(count * q_heads * nope), upload(count * kv_heads * nope));
        let v = upload(count * kv_heads * head);
        let bytes = |len: i64| stream.alloc_zeros::<u8>(len.max(16) as usize).unwrap();
        let mut q_outs = [bytes(count * q_heads * rope), bytes(count * q_heads * nope)];
        let mut k_outs = [bytes(count * kv_heads * rope), bytes(count * kv_heads * nope)];
        let mut q_again = [bytes(count * q_heads * rope), bytes(count * q_heads * nope)];
        let (mut k_cache, mut v_cache) =
            (bytes(pages * page_size * kv_heads * head), bytes(pages * page_size * kv_heads * head));
        let mut options = RopeQuantizeOptions::default();
        (options.quant_scale_q, options.quant_scale_kv, options.interleave) = (0.5, 2.0, interleave);
        let positions = placed.positions();
        let [q_rope_shape, q_nope_shape] = [[count, q_heads, rope], [count, q_heads, nope]];
        let [k_rope_shape, k_nope_shape] = [[count, kv_heads, rope], [count, kv_heads, nope]];
        let e4m3 = DType::F8E4M3;
        {
            let [q_rope_out, q_nope_out] = &mut q_outs;
            let [k_rope_out, k_nope_out] = &mut k_outs;
            let mut tensors = RopeQuantizeTensors {
                q_rope_in: TensorRef::from_cudarc(stream, &q_rope, &q_rope_shape).unwrap(),
                k_rope_in: TensorRef::from_cudarc(stream, &k_rope, &k_rope_shape).unwrap(),
                q_nope_in: (nope > 0).then(|| TensorRef::from_cudarc(stream, &q_nope, &q_nope_shape).unwrap()),
                k_nope_in: (nope > 0).then(|| TensorRef::from_cudarc(stream, &k_nope, &k_nope_shape).unwrap()),
                q_rope_out: TensorMut::from_cudarc_bytes(stream, q_rope_out, e4m3, &q_rope_shape).unwrap(),
                k_rope_out: TensorMut::from_cudarc_bytes(stream, k_rope_out, e4m3, &k_rope_shape).unwrap(),
                q_nope_out: (nope > 0)
                    .then(|| TensorMut::from_cudarc_bytes(stream, q_nope_out, e4m3, &q_nope_shape).unwrap()),
                k_nope_out: (nope > 0)
                    .then(|| TensorMut::from_cudarc_bytes(stream, k_nope_out, e4m3, &k_nope_shape).unwrap()),
            };
            rope_quantize(&mut tensors, &by, &positions, &options, s).unwrap();
            let [q_rope_out, q_nope_out] = &mut q_again;
            let mut tensors = RopeAppendTensors {
                q_rope_in: TensorRef::from_cudarc(stream, &q_rope, &q_rope_shape).unwrap(),
                k_rope_in: TensorRef::from_cudarc(stream, &k_rope, &k_rope_shape).unwrap(),
                q_nope_in: (nope > 0).then(|| TensorRef::from_cudarc(stream, &q_nope, &q_nope_shape).unwrap()),
                k_nope_in: (nope > 0).then(|| TensorRef::from_cudarc(stream, &k_nope, &k_nope_shape).unwrap()),
                q_rope_out: TensorMut::from_cudarc_bytes(stream, q_rope_out, e4m3, &q_rope_shape).unwrap(),
                q_nope_out: (nope > 0)
                    .then(|| TensorMut::from_cudarc_bytes(stream, q_nope_out, e4m3, &q_nope_shape).unwrap()),
            };
            let shape = match layout {
                KvLayout::Nhd => [pages, page_size, kv_heads, head],
                KvLayout::Hnd => [pages, kv_heads, page_size, head],
            };
            let mut cache = PagedKvCache::new(
                TensorMut::from_cudarc_bytes(stream, &mut k_cache, e4m3, &shape).unwrap(),
                TensorMut::from_cudarc_bytes(stream, &mut v_cache, e4m3, &shape).unwrap(),
                layout,
            )
            .unwrap();
            let v = TensorRef::from_cudarc(stream, &v, &[count, kv_heads, head]).unwrap();
            let tensors = &mut tensors;
            rope_quantize_append_paged_kv_cache(&mut cache, tensors, &v, &placed, (&by, &positions), &options, s)
                .unwrap();
        }
        let what = format!("{layout:?}, {rope} and {nope}, interleave {interleave}");
        let down = |buffer: &cudarc::driver::CudaSlice<u8>| stream.clone_dtoh(buffer).unwrap();
        assert!(down(&q_outs[0]) == down(&q_again[0]) && down(&q_outs[1]) == down(&q_again[1]), "queries, {what}");
        let (k_rope, k_nope, k_cache, v_cache) = (down(&k_outs[0]), down(&k_outs[1]), down(&k_cache), down(&v_cache));
        let v = stream.clone_dtoh(&v).unwrap();
        let mut written = vec![false; (pages * page_size) as usize];
        let own_pages = [[3usize, 8, 1].as_slice(), &[2]];
        for token in 0..count as usize {
            let (request, position) = (tokens.batch_indices()[token] as usize, tokens.positions()[token] as usize);
            let (page, entry) = (own_pages[request][position / 4], position % 4);
            written[page * 4 + entry] = true;
            for kv_head in 0..kv_heads as usize {
                let row = match layout {
                    KvLayout::Nhd => (page * 4 + entry) * kv_heads as usize + kv_head,
                    KvLayout::Hnd => (page * kv_heads as usize + kv_head) * 4 + entry,
                };
                let (head, rope, nope) = (head as usize, rope as usize, nope as usize);
                let from = token * kv_heads as usize + kv_head;
                let key = &k_cache[row * head..][..head];
                assert_eq!(key[..rope], k_rope[from * rope..][..rope], "turned, {what}");
                assert_eq!(key[rope..], k_nope[from * nope..][..nope], "not turned, {what}");
                for (i, byte) in v_cache[row * head..][..head].iter().enumerate() {
                    assert_eq!(
                        *byte == 0 || *byte == 0x80,
                        v[from * head + i].to_f32().abs() * 2.0 < 0.000_98,
                        "{what}"
                    );
                }
            }
        }
        // What no token was written to is as it was.
        for (slot, written) in written.iter().enumerate().filter(|(_, written)| !**written) {
            assert!(!written);
            let (page, entry) = (slot / 4, slot % 4);
            let row =
                if layout == KvLayout::Nhd { slot * kv_heads as usize } else { page * kv_heads as usize * 4 + entry };
            assert!(k_cache[row * head as usize..][..head as usize].iter().all(|&b| b == 0), "{slot}, {what}");
        }
    }
}

fn replayed(gpu: &Gpu) {
    let stream = &gpu.stream;
    let batch = Batch::<bf16>::new(5, 3, 4, 1, 128);
    let table = CosSinCache::new(128, 64, 1e4, RopeScaling::None).unwrap();
    let first = Positions::new(&[0, 0, 0], 64).unwrap();
    let buffers = (
        (stream.clone_htod(&batch.heads[0]).unwrap(), stream.clone_htod(&batch.heads[1]).unwrap()),
        (std::sync::Arc::new(OnDevice::new(table.clone(), stream).unwrap()), OnDevice::new(first, stream).unwrap()),
    );
    let mut graph = LaunchGraph::new(stream, buffers).unwrap();
    graph
        .capture(|s, ((mut q, mut k), (table, positions))| {
            let (mut q, mut k) = (q.write(&batch.shapes[0])?, k.write(&batch.shapes[1])?);
            apply_rope_with_cos_sin_cache_inplace(&mut q, &mut k, &table.placed()?, &positions.placed()?, false, s)
        })
        .unwrap();
    // Position 0 turns nothing.
    graph.launch().unwrap();
    let next = Positions::new(&[63, 5, 1], 64).unwrap();
    {
        let (_, (_, mut positions)) = graph.buffers().unwrap();
        positions.replace(&next, stream).unwrap();
        assert!(positions.replace(&Positions::new(&[64, 0, 0], 65).unwrap(), stream).is_err(), "past the table");
        assert!(positions.replace(&Positions::new(&[1], 64).unwrap(), stream).is_err(), "too few");
    }
    graph.launch().unwrap();
    let ((q, k), _) = graph.into_buffers().unwrap();
    let found = [q, k].map(|heads| widened(&stream.clone_dtoh(&heads).unwrap()));
    let (by, at) = (Placed::on_host(&table).unwrap(), Placed::on_host(&next).unwrap());
    let expected = batch.on_host(|q, k| {
        apply_rope_with_cos_sin_cache_inplace(q, k, &by, &at, false, Stream::NULL).unwrap();
    });
    assert_both("replayed", &found, &expected, 4e-3);
}

fn asynchronous(gpu: &Gpu) {
    let stream = &gpu.stream;
    let positions = OnDevice::new(Positions::new(&[3], 8).unwrap(), stream).unwrap();
    let (mut q, mut k) = (stream.alloc_zeros::<bf16>(128).unwrap(), stream.alloc_zeros::<bf16>(128).unwrap());
    let mut turn = || {
        let (mut q, mut k) = (
            TensorMut::from_cudarc(stream, &mut q, &[1, 1, 128]).unwrap(),
            TensorMut::from_cudarc(stream, &mut k, &[1, 1, 128]).unwrap(),
        );
        let (at, options) = (positions.placed(stream).unwrap(), RopeOptions::default());
        apply_rope_pos_ids_inplace(&mut q, &mut k, &at, &options, Stream::cudarc(stream)).unwrap();
    };
    turn();
    gpu.assert_asynchronous(stream, turn);
}

fn supported(_: &Gpu) {
    assert!(is_supported(Device::Cuda(0)).unwrap());
}
