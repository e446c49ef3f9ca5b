//! The largest elements of rows on a GPU. Results come in any order and ties as they fall, so what is compared is that every index
//! is there once, that its value is its own, and that the values are the largest. `FLASHINFER_RS_RUN_GPU_TESTS=1 cargo test
//! --features cudarc,topk --test topk_gpu` runs them, within 60 seconds. None divides a row among several blocks, which could
//! hang.

#[path = "support/data.rs"]
mod data;
#[path = "support/gpu.rs"]
mod gpu;

use std::collections::HashSet;
use std::process::{Command, ExitCode};
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream, DeviceRepr, result};
use data::Random;
use flashinfer_rs::contract::Limit;
use flashinfer_rs::kernels::topk::{
    TopKRows, TopKState, is_supported, radix_topk, radix_topk_page_table_transform, radix_topk_ragged_transform,
};
use flashinfer_rs::{Device, Element, FlashInferError, LaunchGraph, OnDevice, Placed, Stream, TensorMut, TensorRef};
use gpu::Gpu;
use half::{bf16, f16};

fn main() -> ExitCode {
    gpu::main(&[
        ("the_largest_of_short_rows_are_found", short),
        ("the_largest_of_long_rows_of_16_bits_are_found", long),
        ("the_largest_of_a_few_long_rows_of_f32_are_found", few),
        ("more_rows_than_multiprocessors_are_searched", many_rows),
        (WITH_VARIABLE, with_variable),
        ("equal_elements_are_each_found_once", equal),
        ("infinities_and_nan_break_nothing", special),
        ("rows_may_start_at_any_address_that_their_length_allows", any_address),
        ("page_tables_entries_stand_for_the_largest_scores", page_tables),
        ("offsets_are_added_to_the_largest_scores_indices", ragged),
        ("rows_are_replaced_in_a_graph", replaced),
        ("states_find_the_same_in_rows_of_one_block", states),
        ("a_call_does_not_wait", asynchronous),
        ("the_threads_context_is_what_it_was_on_every_gpu", every_gpu),
        ("threads_search_at_once", threads),
        ("what_breaks_the_contract_is_refused", refused),
        ("nothing_is_launched_for_no_rows", nothing),
        ("the_gpu_is_said_to_be_supported", supported),
    ])
}

/// The type of scores.
trait Score: Element + DeviceRepr + Copy + PartialEq + Default + Into<f64> + Send + Sync + 'static {
    fn of(value: f64) -> Self;
}

impl Score for f32 {
    fn of(value: f64) -> Self {
        value as f32
    }
}

impl Score for f16 {
    fn of(value: f64) -> Self {
        Self::from_f64(value)
    }
}

impl Score for bf16 {
    fn of(value: f64) -> Self {
        Self::from_f64(value)
    }
}

fn scores<T: Score>(seed: u64, count: usize) -> Vec<T> {
    let mut random = Random(seed);
    (0..count).map(|_| T::of(4.0 * random.uniform() - 2.0 + random.uniform().powi(9))).collect()
}

/// The values of the largest `top_k` of some scores, the largest first.
fn largest<T: Score>(scores: &[T], top_k: usize) -> Vec<f64> {
    let mut numbers: Vec<f64> = scores.iter().map(|&score| score.into()).collect();
    numbers.sort_unstable_by(|a, b| b.total_cmp(a));
    numbers.truncate(top_k);
    numbers
}

/// Finds them on the GPU.
fn found<T: Score>(stream: &Arc<CudaStream>, input: &[T], [rows, d]: [usize; 2], top_k: usize) -> (Vec<i32>, Vec<T>) {
    let input = stream.clone_htod(input).unwrap();
    let mut indices = stream.clone_htod(&vec![-7i32; rows * top_k]).unwrap();
    let mut values = stream.clone_htod(&vec![T::default(); rows * top_k]).unwrap();
    let shape = [rows as i64, top_k as i64];
    radix_topk(
        &mut TensorMut::from_cudarc(stream, &mut indices, &shape).unwrap(),
        &mut TensorMut::from_cudarc(stream, &mut values, &shape).unwrap(),
        &TensorRef::from_cudarc(stream, &input, &[rows as i64, d as i64]).unwrap(),
        top_k as i64,
        Stream::cudarc(stream),
    )
    .unwrap();
    (stream.clone_dtoh(&indices).unwrap(), stream.clone_dtoh(&values).unwrap())
}

/// That what was found in a row are its largest elements, each once, with their values.
#[track_caller]
fn assert_largest<T: Score>(what: &str, row: &[T], indices: &[i32], values: &[T]) {
    let distinct: HashSet<_> = indices.iter().copied().collect();
    assert_eq!(distinct.len(), indices.len(), "{what}: an index was found twice");
    for (&i, &value) in indices.iter().zip(values) {
        assert!((0..row.len() as i32).contains(&i), "{what}: no index {i}");
        assert!(row[i as usize] == value, "{what}: another value than at {i}");
    }
    assert_eq!(largest(values, values.len()), largest(row, values.len()), "{what}: not the largest");
}

#[track_caller]
fn check<T: Score>(stream: &Arc<CudaStream>, input: &[T], shape @ [rows, d]: [usize; 2], top_k: usize) {
    let (indices, values) = found(stream, input, shape, top_k);
    for row in 0..rows {
        let (all, of_row) = (row * d..(row + 1) * d, row * top_k..(row + 1) * top_k);
        let what = format!("row {row} of {shape:?} in {:?}, {top_k} of them", T::DTYPE);
        assert_largest(&what, &input[all], &indices[of_row.clone()], &values[of_row]);
    }
}

fn check_sizes<T: Score>(gpu: &Gpu, sizes: &[([usize; 2], usize)]) {
    for (seed, &(shape, top_k)) in sizes.iter().enumerate() {
        check(&gpu.stream, &scores::<T>(seed as u64, shape[0] * shape[1]), shape, top_k);
    }
}

fn short(gpu: &Gpu) {
    // By both of upstream's kernels: more than 2,048 and all of a row are found by radix.
    let sizes = [
        ([1, 1], 1),
        ([3, 7], 2),
        ([3, 7], 7),
        ([1, 2048], 2048),
        ([5, 2049], 2048),
        ([4, 4097], 1),
        ([4, 4098], 64),
        ([4, 5000], 2500),
        ([2, 16384], 2048),
        ([2, 16383], 50),
        ([1, 16384], 16383),
        ([300, 1000], 10),
    ];
    check_sizes::<f32>(gpu, &sizes);
    check_sizes::<f16>(gpu, &sizes);
    check_sizes::<bf16>(gpu, &sizes);
}

fn long(gpu: &Gpu) {
    let sizes = [([3, 16385], 64), ([2, 32000], 2048), ([2, 50257], 1), ([1, 65536], 3000)];
    check_sizes::<f16>(gpu, &sizes);
    check_sizes::<bf16>(gpu, &sizes);
    // The longest that one block takes: on Hopper 115,184.
    let row = |d: usize| {
        let (input, one) = (gpu.stream.alloc_zeros::<bf16>(d).unwrap(), [1, 1]);
        let mut indices = gpu.stream.alloc_zeros::<i32>(1).unwrap();
        let mut values = gpu.stream.alloc_zeros::<bf16>(1).unwrap();
        radix_topk(
            &mut TensorMut::from_cudarc(&gpu.stream, &mut indices, &one).unwrap(),
            &mut TensorMut::from_cudarc(&gpu.stream, &mut values, &one).unwrap(),
            &TensorRef::from_cudarc(&gpu.stream, &input, &[1, d as i64]).unwrap(),
            1,
            Stream::cudarc(&gpu.stream),
        )
    };
    let longest = (Limit::SharedMemory.of(Device::Cuda(0)) as usize - 2080) / 16 * 8;
    check_sizes::<bf16>(gpu, &[([1, longest], 100)]);
    assert!(row(longest + 8).is_err());
    assert!(row(1 << 20).is_err());
}

/// Of F32 upstream takes the filtered kernel for more rows.
fn few(gpu: &Gpu) {
    check_sizes::<f32>(gpu, &[([1, 32769], 64), ([2, 40000], 2048), ([2, 49151], 1), ([1, 50257], 2049)]);
}

/// By the radix kernel, which would take several rows with one block.
fn many_rows(gpu: &Gpu) {
    check_sizes::<bf16>(gpu, &[([170, 16640], 20), ([401, 3000], 2100)]);
    // Where an odd length has parts begin at addresses of one element.
    check_sizes::<f16>(gpu, &[([301, 3001], 2100)]);
    check_sizes::<f32>(gpu, &[([301, 2600], 2600)]);
}

const VARIABLE: &str = "FLASHINFER_TOPK_ALGO";
const WITH_VARIABLE: &str = "rows_of_f32_that_one_block_takes_are_searched_where_the_environment_asks_for_it";

/// In a process of its own, since the environment is the process's.
fn with_variable(gpu: &Gpu) {
    if std::env::var_os(VARIABLE).is_some_and(|value| value == "multi_cta") {
        check_sizes::<f32>(gpu, &[([5, 20000], 50), ([9, 32768], 2048), ([200, 4000], 7), ([3, 5000], 5000)]);
        let rows = TopKRows::new(&[20000, 0, 51, 50], 20000).unwrap();
        check_page_tables(gpu, &rows, [4, 20000], 50);
        check_ragged::<f32>(gpu, &rows, [4, 20000], 50);
        return;
    }
    let mut child = Command::new(std::env::current_exe().unwrap());
    let output = child.args(["--exact", WITH_VARIABLE]).env(VARIABLE, "multi_cta").output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && text.contains("1 passed"), "in a process of its own:\n{text}");
}

fn equal(gpu: &Gpu) {
    for top_k in [1, 50, 2048, 3000] {
        check(&gpu.stream, &vec![1f32; 3 * 16384], [3, 16384], top_k);
        check(&gpu.stream, &vec![bf16::ONE; 2 * 30000], [2, 30000], top_k);
        // A few that are larger, in between.
        let input: Vec<_> = (0..16384).map(|i| if i % 1000 == 17 { 2f32 } else { 0.0 }).collect();
        check(&gpu.stream, &input, [1, 16384], top_k);
    }
}

fn special(gpu: &Gpu) {
    let mut input = scores::<f32>(21, 4 * 5000);
    (input[10], input[4999]) = (f32::INFINITY, f32::INFINITY);
    input[5000..10_000].fill(f32::NEG_INFINITY);
    check(&gpu.stream, &input, [4, 5000], 100);
    check(&gpu.stream, &input, [4, 5000], 2500);
    // With NaN there is no right set, but the indices are there, each once.
    input[..3000].fill(f32::NAN);
    input[12_000..15_000].fill(-f32::NAN);
    for top_k in [100, 2500] {
        let (indices, _) = found(&gpu.stream, &input, [4, 5000], top_k);
        for row in indices.chunks(top_k) {
            let distinct: HashSet<_> = row.iter().copied().collect();
            assert!(distinct.len() == top_k && distinct.iter().all(|i| (0..5000).contains(i)), "{top_k}");
        }
    }
    let zeros = [0.0f32, -0.0, 0.0, -0.0, 1.0, -1.0];
    check(&gpu.stream, &zeros, [1, 6], 3);
}

fn any_address(gpu: &Gpu) {
    let (stream, top_k) = (&gpu.stream, 9usize);
    // Lengths that are multiples of as many elements as the address is.
    for (d, skip) in [(1001, 1), (1002, 2), (1004, 4), (1008, 8), (1001, 3)] {
        let input = scores::<bf16>(22, 3 * d + skip);
        let input_gpu = stream.clone_htod(&input).unwrap();
        let mut indices = stream.alloc_zeros::<i32>(3 * top_k).unwrap();
        let mut values = stream.alloc_zeros::<bf16>(3 * top_k + 1).unwrap();
        let shape = [3, top_k as i64];
        radix_topk(
            &mut TensorMut::from_cudarc(stream, &mut indices, &shape).unwrap(),
            &mut TensorMut::from_cudarc(stream, &mut values.slice_mut(1..), &shape).unwrap(),
            &TensorRef::from_cudarc(stream, &input_gpu.slice(skip..), &[3, d as i64]).unwrap(),
            top_k as i64,
            Stream::cudarc(stream),
        )
        .unwrap();
        let (indices, values) = (stream.clone_dtoh(&indices).unwrap(), stream.clone_dtoh(&values).unwrap());
        assert!(values[0] == bf16::ZERO, "written before the values");
        for row in 0..3 {
            let (all, of_row) = (skip + row * d..skip + (row + 1) * d, row * top_k..(row + 1) * top_k);
            assert_largest(&format!("{d} at {skip}"), &input[all], &indices[of_row.clone()], &values[1..][of_row]);
        }
    }
}

/// Distinct entries, so that each stands for one place.
fn tables(batch: usize, max_len: usize) -> Vec<i32> {
    (0..(batch * max_len) as i32).map(|i| i * 3 + 1).collect()
}

/// That the entries of a row stand for its largest scores, and -1 for what it has not.
#[track_caller]
fn assert_entries<T: Score>(what: &str, scores: &[T], entries: &[i32], place_of: impl Fn(i32) -> usize) {
    let (there, none): (Vec<i32>, Vec<i32>) = entries.iter().partition(|entry| **entry != -1);
    let expected = scores.len().min(entries.len());
    assert_eq!((there.len(), none.len()), (expected, entries.len() - expected), "{what}");
    // Those of a short row come in its order, and what is missing behind them.
    if scores.len() <= entries.len() {
        let places: Vec<_> = there.iter().map(|&entry| place_of(entry)).collect();
        assert!(places.iter().copied().eq(0..expected), "{what}: {places:?}");
        assert!(entries[expected..].iter().all(|entry| *entry == -1), "{what}");
        return;
    }
    let indices: Vec<i32> = there.iter().map(|&entry| place_of(entry) as i32).collect();
    assert!(indices.iter().all(|&i| (0..scores.len() as i32).contains(&i)), "{what}: an entry of another place");
    let values: Vec<T> = indices.iter().map(|&i| scores[i as usize]).collect();
    assert_largest(what, scores, &indices, &values);
}

fn check_page_tables(gpu: &Gpu, rows: &TopKRows, [count, max_len]: [usize; 2], top_k: usize) {
    let stream = &gpu.stream;
    let batch = rows.row_to_batch().iter().max().map_or(count, |most| *most as usize + 1);
    let (input, tables) = (scores::<f32>(31, count * max_len), tables(batch, max_len));
    let (input_gpu, tables_gpu) = (stream.clone_htod(&input).unwrap(), stream.clone_htod(&tables).unwrap());
    let on_gpu = OnDevice::new(rows.clone(), stream).unwrap();
    let mut output = stream.clone_htod(&vec![-7i32; count * top_k]).unwrap();
    radix_topk_page_table_transform(
        &mut TensorMut::from_cudarc(stream, &mut output, &[count as i64, top_k as i64]).unwrap(),
        &TensorRef::from_cudarc(stream, &input_gpu, &[count as i64, max_len as i64]).unwrap(),
        &TensorRef::from_cudarc(stream, &tables_gpu, &[batch as i64, max_len as i64]).unwrap(),
        &on_gpu.placed(stream).unwrap(),
        top_k as i64,
        Stream::cudarc(stream),
    )
    .unwrap();
    let output = stream.clone_dtoh(&output).unwrap();
    for (row, entries) in output.chunks(top_k).enumerate() {
        let table = rows.row_to_batch().get(row).map_or(row, |&request| request as usize);
        let scores = &input[row * max_len..][..rows.lengths()[row] as usize];
        let what = format!("row {row} of {count} × {max_len}, {top_k} of {}", scores.len());
        assert_entries(&what, scores, entries, |entry| ((entry - 1) / 3) as usize - table * max_len);
    }
}

fn check_ragged<T: Score>(gpu: &Gpu, rows: &TopKRows, [count, max_len]: [usize; 2], top_k: usize) {
    let stream = &gpu.stream;
    let (input, offsets): (_, Vec<i32>) =
        (scores::<T>(32, count * max_len), (0..count as i32).map(|row| 1000 * row).collect());
    let (input_gpu, offsets_gpu) = (stream.clone_htod(&input).unwrap(), stream.clone_htod(&offsets).unwrap());
    let on_gpu = OnDevice::new(rows.clone(), stream).unwrap();
    let mut output = stream.clone_htod(&vec![-7i32; count * top_k]).unwrap();
    radix_topk_ragged_transform(
        &mut TensorMut::from_cudarc(stream, &mut output, &[count as i64, top_k as i64]).unwrap(),
        &TensorRef::from_cudarc(stream, &input_gpu, &[count as i64, max_len as i64]).unwrap(),
        &TensorRef::from_cudarc(stream, &offsets_gpu, &[count as i64]).unwrap(),
        &on_gpu.placed(stream).unwrap(),
        top_k as i64,
        Stream::cudarc(stream),
    )
    .unwrap();
    let output = stream.clone_dtoh(&output).unwrap();
    for (row, entries) in output.chunks(top_k).enumerate() {
        let scores = &input[row * max_len..][..rows.lengths()[row] as usize];
        let what = format!("row {row} of {count} × {max_len}, {top_k} of {}", scores.len());
        assert_entries(&what, scores, entries, |entry| (entry - offsets[row]) as usize);
    }
}

/// Around what is asked for, and at both ends.
fn lengths(count: usize, max_len: i64, top_k: i64) -> Vec<i64> {
    let edges = [max_len, 0, 1, top_k - 1, top_k, top_k + 1, max_len - 1, max_len / 2];
    (0..count).map(|row| edges[row % edges.len()].clamp(0, max_len)).collect()
}

/// By both of upstream's kernels, and with more rows than there are multiprocessors.
const TRANSFORMS: [([usize; 2], usize); 6] =
    [([9, 1000], 64), ([8, 16384], 2048), ([9, 5000], 2100), ([20, 50], 64), ([200, 3000], 2500), ([300, 500], 20)];

fn page_tables(gpu: &Gpu) {
    for (shape @ [count, max_len], top_k) in TRANSFORMS {
        let rows = TopKRows::new(&lengths(count, max_len as i64, top_k as i64), max_len as i64).unwrap();
        check_page_tables(gpu, &rows, shape, top_k);
        let requests: Vec<i64> = (0..count as i64).map(|row| (row * 7) % 5).collect();
        check_page_tables(gpu, &rows.with_row_to_batch(&requests, 5).unwrap(), shape, top_k);
    }
}

fn ragged(gpu: &Gpu) {
    for (shape @ [count, max_len], top_k) in TRANSFORMS {
        let rows = TopKRows::new(&lengths(count, max_len as i64, top_k as i64), max_len as i64).unwrap();
        check_ragged::<f32>(gpu, &rows, shape, top_k);
        check_ragged::<f16>(gpu, &rows, shape, top_k);
    }
    // Long rows of 16 bits.
    let rows = TopKRows::new(&[30000, 29999, 17, 20000], 30000).unwrap();
    check_ragged::<bf16>(gpu, &rows, [4, 30000], 100);
}

fn replaced(gpu: &Gpu) {
    let (stream, top_k) = (&gpu.stream, 10);
    let rows = TopKRows::new(&[500, 500, 500], 500).unwrap();
    let input = scores::<f32>(33, 3 * 500);
    let buffers = (
        stream.clone_htod(&input).unwrap(),
        stream.clone_htod(&[0i32, 1000, 2000]).unwrap(),
        OnDevice::new(rows, stream).unwrap(),
        stream.alloc_zeros::<i32>(3 * top_k).unwrap(),
        (stream.alloc_zeros::<i32>(3 * top_k).unwrap(), stream.alloc_zeros::<f32>(3 * top_k).unwrap()),
    );
    let mut graph = LaunchGraph::new(stream, buffers).unwrap();
    let calls = graph.capture(|s, (input, offsets, rows, mut output, (mut indices, mut values))| {
        let (input, offsets, shape) = (input.read(&[3, 500])?, offsets.read(&[3])?, [3, top_k as i64]);
        radix_topk_ragged_transform(&mut output.write(&shape)?, &input, &offsets, &rows.placed()?, top_k as i64, s)?;
        radix_topk(&mut indices.write(&shape)?, &mut values.write(&shape)?, &input, top_k as i64, s)
    });
    calls.unwrap();
    for lengths in [[500, 500, 500], [7, 500, 0], [10, 11, 499]] {
        let rows = TopKRows::new(&lengths, 500).unwrap();
        graph.buffers().unwrap().2.replace(&rows, stream).unwrap();
        graph.launch().unwrap();
        let (_, _, _, output, (indices, values)) = graph.buffers().unwrap();
        let output = stream.clone_dtoh(&output).unwrap();
        let (indices, values) = (stream.clone_dtoh(&indices).unwrap(), stream.clone_dtoh(&values).unwrap());
        for row in 0..3 {
            let (all, of_row) = (&input[row * 500..][..500], row * top_k..(row + 1) * top_k);
            let what = format!("row {row} of {lengths:?}");
            let place = |entry: i32| (entry - 1000 * row as i32) as usize;
            assert_entries(&what, &all[..lengths[row] as usize], &output[of_row.clone()], place);
            assert_largest(&what, all, &indices[of_row.clone()], &values[of_row]);
        }
    }
    let longer = TopKRows::new(&[1, 1, 1], 501).unwrap();
    let error = graph.buffers().unwrap().2.replace(&longer, stream).unwrap_err();
    assert!(error.to_string().contains("as captured"), "{error}");
}

/// Never of several blocks: that may hang.
fn states(gpu: &Gpu) {
    let (stream, shape, top_k) = (&gpu.stream, [150usize, 3000usize], 2100usize);
    let input = scores::<f32>(34, shape[0] * shape[1]);
    let input_gpu = stream.clone_htod(&input).unwrap();
    let found = [shape[0] as i64, top_k as i64];
    let mut indices = stream.clone_htod(&vec![-7i32; shape[0] * top_k]).unwrap();
    let mut values = stream.alloc_zeros::<f32>(shape[0] * top_k).unwrap();
    let mut state = TopKState::new(stream).unwrap();
    assert!(Arc::ptr_eq(state.stream(), stream));
    for _ in 0..2 {
        let mut indices = TensorMut::from_cudarc(stream, &mut indices, &found).unwrap();
        let mut values = TensorMut::from_cudarc(stream, &mut values, &found).unwrap();
        let input = TensorRef::from_cudarc(stream, &input_gpu, &[shape[0] as i64, shape[1] as i64]).unwrap();
        // SAFETY: one block takes a row of this length.
        unsafe { state.radix_topk(&mut indices, &mut values, &input, top_k as i64) }.unwrap();
    }
    let same = |indices: Vec<i32>, values: Vec<f32>| {
        for row in 0..shape[0] {
            let of_row = row * top_k..(row + 1) * top_k;
            let all = &input[row * shape[1]..][..shape[1]];
            assert_largest(&format!("row {row}"), all, &indices[of_row.clone()], &values[of_row]);
        }
    };
    same(stream.clone_dtoh(&indices).unwrap(), stream.clone_dtoh(&values).unwrap());

    let mut graph = LaunchGraph::new(stream, (input_gpu, indices, values, state)).unwrap();
    let calls = graph.capture(|s, (input, mut indices, mut values, mut state)| {
        let input = input.read(&[shape[0] as i64, shape[1] as i64])?;
        // SAFETY: as above.
        unsafe { state.radix_topk(&mut indices.write(&found)?, &mut values.write(&found)?, &input, top_k as i64, s) }
    });
    calls.unwrap();
    stream.memset_zeros(&mut graph.buffers().unwrap().1).unwrap();
    graph.launch().unwrap();
    let (_, indices, values, ()) = graph.buffers().unwrap();
    same(stream.clone_dtoh(&indices).unwrap(), stream.clone_dtoh(&values).unwrap());

    // Rows of which candidates would be forgotten are refused here too.
    let mut state = TopKState::new(stream).unwrap();
    let input = stream.alloc_zeros::<f32>(20 * 20000).unwrap();
    let (mut indices, mut values) = (stream.alloc_zeros::<i32>(20).unwrap(), stream.alloc_zeros::<f32>(20).unwrap());
    let mut indices = TensorMut::from_cudarc(stream, &mut indices, &[20, 1]).unwrap();
    let mut values = TensorMut::from_cudarc(stream, &mut values, &[20, 1]).unwrap();
    let input = TensorRef::from_cudarc(stream, &input, &[20, 20000]).unwrap();
    // SAFETY: it is refused.
    let error = unsafe { state.radix_topk(&mut indices, &mut values, &input, 1) }.unwrap_err();
    assert!(error.to_string().contains("forgets candidates"), "{error}");
}

fn asynchronous(gpu: &Gpu) {
    let stream = &gpu.stream;
    let input = stream.alloc_zeros::<f32>(1000).unwrap();
    let (mut indices, mut values) = (stream.alloc_zeros::<i32>(8).unwrap(), stream.alloc_zeros::<f32>(8).unwrap());
    let offsets = stream.alloc_zeros::<i32>(1).unwrap();
    let rows = OnDevice::new(TopKRows::new(&[900], 1000).unwrap(), stream).unwrap();
    let mut call = || {
        let mut indices = TensorMut::from_cudarc(stream, &mut indices, &[1, 8]).unwrap();
        let mut values = TensorMut::from_cudarc(stream, &mut values, &[1, 8]).unwrap();
        let input = TensorRef::from_cudarc(stream, &input, &[1, 1000]).unwrap();
        radix_topk(&mut indices, &mut values, &input, 8, Stream::cudarc(stream)).unwrap();
        let (offsets, rows) = (TensorRef::from_cudarc(stream, &offsets, &[1]).unwrap(), rows.placed(stream).unwrap());
        radix_topk_ragged_transform(&mut indices, &input, &offsets, &rows, 8, Stream::cudarc(stream)).unwrap();
    };
    // The first one loads the library.
    call();
    gpu.assert_asynchronous(stream, call);
}

/// Upstream makes the tensors' GPU the thread's own and leaves it so.
fn every_gpu(_: &Gpu) {
    let count = CudaContext::device_count().unwrap() as usize;
    println!("{count} GPUs");
    let streams: Vec<_> = (0..count).map(|id| CudaContext::new(id).unwrap().new_stream().unwrap()).collect();
    let input = scores::<f32>(35, 2 * 1000);
    for (id, stream) in streams.iter().enumerate() {
        let input_gpu = stream.clone_htod(&input).unwrap();
        let mut indices = stream.alloc_zeros::<i32>(10).unwrap();
        let mut values = stream.alloc_zeros::<f32>(10).unwrap();
        for current in &streams {
            let mut indices = TensorMut::from_cudarc(stream, &mut indices, &[2, 5]).unwrap();
            let mut values = TensorMut::from_cudarc(stream, &mut values, &[2, 5]).unwrap();
            let input = TensorRef::from_cudarc(stream, &input_gpu, &[2, 1000]).unwrap();
            current.context().bind_to_thread().unwrap();
            radix_topk(&mut indices, &mut values, &input, 5, Stream::cudarc(stream)).unwrap();
            let after = result::ctx::get_current().unwrap();
            assert_eq!(after, Some(current.context().cu_ctx()), "after a call on cuda:{id}");
        }
        let (indices, values) = (stream.clone_dtoh(&indices).unwrap(), stream.clone_dtoh(&values).unwrap());
        for row in 0..2 {
            let of_row = row * 5..(row + 1) * 5;
            let all = &input[row * 1000..][..1000];
            assert_largest(&format!("cuda:{id}"), all, &indices[of_row.clone()], &values[of_row]);
        }
    }
}

/// Each call sets its kernel's shared memory before it launches it: of other sizes in other threads.
fn threads(gpu: &Gpu) {
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let context = &gpu.context;
            scope.spawn(move || {
                let stream = context.new_stream().unwrap();
                let d = 3000 + 1500 * thread;
                let input = scores::<bf16>(thread as u64, 2 * d);
                for _ in 0..10 {
                    check(&stream, &input, [2, d], 2500);
                }
            });
        }
    });
}

fn refused(gpu: &Gpu) {
    let stream = &gpu.stream;
    let input = stream.alloc_zeros::<f32>(4 * 200_000).unwrap();
    let mut indices = stream.clone_htod(&[-7i32; 64]).unwrap();
    let mut values = stream.clone_htod(&[7f32; 64]).unwrap();
    let mut call = |[rows, d]: [i64; 2], top_k: i64, skip: usize| {
        let shape = [rows, top_k.clamp(1, 16)];
        let result = radix_topk(
            &mut TensorMut::from_cudarc(stream, &mut indices, &shape).unwrap(),
            &mut TensorMut::from_cudarc(stream, &mut values, &shape).unwrap(),
            &TensorRef::from_cudarc(stream, &input.slice(skip..), &[rows, d]).unwrap(),
            top_k,
            Stream::cudarc(stream),
        );
        match result {
            Err(FlashInferError::InvalidArgument { argument, .. }) => argument,
            other => panic!("{rows} × {d}, {top_k} of them: {other:?}"),
        }
    };
    assert_eq!(call([2, 100], 0, 0), "top_k");
    assert_eq!(call([2, 3], 4, 0), "top_k");
    assert_eq!(call([2, 100], 17, 0), "output_indices");
    assert_eq!(call([2, 100], 4, 1), "input");
    assert_eq!(call([4, 20000], 4, 0), "d");
    assert_eq!(call([4, 128_256], 4, 0), "d");
    assert_eq!(call([1, 200_000], 4, 0), "d");
    // Longer rows than the input has, and more requests than there are tables.
    let rows = OnDevice::new(TopKRows::new(&[1, 1], 101).unwrap(), stream).unwrap();
    let of_three = TopKRows::new(&[1, 1], 100).unwrap().with_row_to_batch(&[0, 2], 3).unwrap();
    let of_three = OnDevice::new(of_three, stream).unwrap();
    let tables = stream.alloc_zeros::<i32>(200).unwrap();
    {
        let name = |rows: &Placed<'_, TopKRows>, indices: &mut cudarc::driver::CudaSlice<i32>| {
            let result = radix_topk_page_table_transform(
                &mut TensorMut::from_cudarc(stream, indices, &[2, 4]).unwrap(),
                &TensorRef::from_cudarc(stream, &input, &[2, 100]).unwrap(),
                &TensorRef::from_cudarc(stream, &tables, &[2, 100]).unwrap(),
                rows,
                4,
                Stream::cudarc(stream),
            );
            match result {
                Err(FlashInferError::InvalidArgument { argument, .. }) => argument,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(name(&rows.placed(stream).unwrap(), &mut indices), "lengths");
        assert_eq!(name(&of_three.placed(stream).unwrap(), &mut indices), "row_to_batch");
    }
    assert!(
        stream.clone_dtoh(&indices).unwrap().iter().all(|index| *index == -7),
        "refused, and launched all the same"
    );
    assert!(
        stream.clone_dtoh(&values).unwrap().iter().all(|value| *value == 7.0),
        "refused, and launched all the same"
    );
}

fn nothing(gpu: &Gpu) {
    let stream = &gpu.stream;
    let input = stream.alloc_zeros::<f32>(1).unwrap();
    let (mut indices, mut values) = (stream.clone_htod(&[-7i32]).unwrap(), stream.alloc_zeros::<f32>(1).unwrap());
    radix_topk(
        &mut TensorMut::from_cudarc(stream, &mut indices, &[0, 5]).unwrap(),
        &mut TensorMut::from_cudarc(stream, &mut values, &[0, 5]).unwrap(),
        &TensorRef::from_cudarc(stream, &input, &[0, 100]).unwrap(),
        5,
        Stream::cudarc(stream),
    )
    .unwrap();
    assert_eq!(stream.clone_dtoh(&indices).unwrap(), [-7]);
}

fn supported(_: &Gpu) {
    assert!(is_supported(Device::Cuda(0)).unwrap());
}
