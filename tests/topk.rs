//! The largest elements of rows without a GPU: numbers on the host, what is refused, and, over a CUDA runtime that launches
//! nothing, that what is refused is just what the real launchers would do badly.

#[path = "support/failing.rs"]
mod failing;
#[path = "support/native.rs"]
mod native;

use flashinfer_rs::kernels::topk::{
    TopKRows, TopKRowsFacts, is_supported, radix_topk, radix_topk_page_table_transform, radix_topk_ragged_transform,
};
use flashinfer_rs::{
    DType, Device, Element, FlashInferError, FlashInferRuntime, Placed, Result, RuntimeConfig, Steering, Stream,
    TensorMut, TensorRef,
};
use half::{bf16, f16};

fn initialize() {
    FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
}

/// The largest elements of rows of `d`, and where they are.
fn largest<T: Element + Copy>(input: &[T], d: usize, top_k: usize) -> (Vec<i32>, Vec<T>) {
    initialize();
    let rows = input.len() / d;
    let (mut indices, mut values) = (vec![-7i32; rows * top_k], vec![input[0]; rows * top_k]);
    let shape = [rows as i64, top_k as i64];
    radix_topk(
        &mut TensorMut::from_slice(&mut indices, &shape).unwrap(),
        &mut TensorMut::from_slice(&mut values, &shape).unwrap(),
        &TensorRef::from_slice(input, &[rows as i64, d as i64]).unwrap(),
        top_k as i64,
        Stream::NULL,
    )
    .unwrap();
    (indices, values)
}

#[test]
fn the_largest_elements_of_each_row_are_found_with_their_indices() {
    let input = [0.5f32, 3.0, -1.0, 2.0, 9.0, -2.0, 8.0, 7.0];
    assert_eq!(largest(&input, 4, 2), (vec![1, 3, 0, 2], vec![3.0, 2.0, 9.0, 8.0]));
    assert_eq!(largest(&input, 4, 1), (vec![1, 0], vec![3.0, 9.0]));
    assert_eq!(largest(&input, 8, 8).0, [4, 6, 7, 1, 3, 0, 2, 5]);
}

#[test]
fn values_keep_their_bits_whatever_their_type() {
    let halves = [1.0, -2.0, 0.099_975_586, 65504.0].map(f16::from_f64);
    assert_eq!(largest(&halves, 4, 3), (vec![3, 0, 2], vec![halves[3], halves[0], halves[2]]));
    let halves = [1.0, -2.0, 0.1, 3e38].map(bf16::from_f64);
    assert_eq!(largest(&halves, 4, 3), (vec![3, 0, 2], vec![halves[3], halves[0], halves[2]]));
}

#[test]
fn of_equal_elements_and_special_ones_there_is_an_order() {
    assert_eq!(largest(&[1f32; 5], 5, 3).0, [0, 1, 2]);
    let input = [f32::NEG_INFINITY, 0.0, f32::INFINITY, -0.0, f32::NAN];
    assert_eq!(largest(&input, 5, 5).0, [4, 2, 1, 3, 0]);
}

#[test]
fn rows_of_any_length_are_searched_on_the_host() {
    let mut input = vec![0f32; 200_000];
    (input[7], input[199_999]) = (1.0, 2.0);
    assert_eq!(largest(&input, 200_000, 2), (vec![199_999, 7], vec![2.0, 1.0]));
}

#[test]
fn nothing_is_done_for_no_rows() {
    initialize();
    let (input, mut indices, mut values): ([f32; 0], [i32; 0], [f32; 0]) = ([], [], []);
    let input = TensorRef::from_slice(&input, &[0, 100]).unwrap();
    let mut indices = TensorMut::from_slice(&mut indices, &[0, 3]).unwrap();
    let mut values = TensorMut::from_slice(&mut values, &[0, 3]).unwrap();
    radix_topk(&mut indices, &mut values, &input, 3, Stream::NULL).unwrap();
    let rows = TopKRows::new(&[], 100).unwrap();
    let (none, placed): ([i32; 0], _) = ([], Placed::on_host(&rows).unwrap());
    let table = TensorRef::from_slice(&none, &[0, 100]).unwrap();
    radix_topk_page_table_transform(&mut indices, &input, &table, &placed, 3, Stream::NULL).unwrap();
    let offsets = TensorRef::from_slice(&none, &[0]).unwrap();
    radix_topk_ragged_transform(&mut indices, &input, &offsets, &placed, 3, Stream::NULL).unwrap();
}

/// Three rows of four scores.
const SCORES: [f32; 12] = [0.1, 0.4, 0.3, 0.2, 5.0, 6.0, 7.0, 8.0, 0.0, -1.0, 1.0, 2.0];

fn page_table_of(rows: &TopKRows, tables: &[i32], top_k: usize) -> Result<Vec<i32>> {
    initialize();
    let mut output = vec![-7i32; 3 * top_k];
    radix_topk_page_table_transform(
        &mut TensorMut::from_slice(&mut output, &[3, top_k as i64]).unwrap(),
        &TensorRef::from_slice(&SCORES, &[3, 4]).unwrap(),
        &TensorRef::from_slice(tables, &[tables.len() as i64 / 4, 4]).unwrap(),
        &Placed::on_host(rows).unwrap(),
        top_k as i64,
        Stream::NULL,
    )?;
    Ok(output)
}

#[test]
fn entries_of_page_tables_stand_for_the_largest_scores() {
    let rows = TopKRows::new(&[4, 3, 1], 4).unwrap();
    let tables: Vec<i32> = (0..12).map(|i| 10 * i).collect();
    assert_eq!(page_table_of(&rows, &tables, 2).unwrap(), [10, 20, 60, 50, 80, -1]);
    // More than a row has: all of it, and −1.
    assert_eq!(page_table_of(&rows, &tables, 5).unwrap()[10..], [80, -1, -1, -1, -1]);
    // Rows 0 and 2 of the second request, row 1 of the first.
    let rows = rows.with_row_to_batch(&[1, 0, 1], 2).unwrap();
    assert_eq!(page_table_of(&rows, &tables[..8], 2).unwrap(), [50, 60, 20, 10, 40, -1]);
}

#[test]
fn offsets_are_added_to_the_largest_scores_indices() {
    initialize();
    let rows = TopKRows::new(&[4, 0, 2], 4).unwrap();
    let (offsets, mut output) = ([100i32, 200, i32::MAX], [-7i32; 9]);
    radix_topk_ragged_transform(
        &mut TensorMut::from_slice(&mut output, &[3, 3]).unwrap(),
        &TensorRef::from_slice(&SCORES, &[3, 4]).unwrap(),
        &TensorRef::from_slice(&offsets, &[3]).unwrap(),
        &Placed::on_host(&rows).unwrap(),
        3,
        Stream::NULL,
    )
    .unwrap();
    // The sums are of 32 bits, as upstream's.
    assert_eq!(output, [101, 102, 103, -1, -1, -1, i32::MAX, i32::MIN, -1]);
}

#[track_caller]
fn assert_refused<T>(result: Result<T>, name: &str, says: &str) {
    match result.map(|_| ()).unwrap_err() {
        FlashInferError::InvalidArgument { argument, expected, found, .. } => {
            assert!(argument == name && expected.contains(says), "{argument}: {found}, expected {expected}");
        }
        other => panic!("{other}"),
    }
}

#[test]
fn rows_that_cannot_be_are_refused() {
    assert_refused(TopKRows::new(&[3, 5], 4), "lengths", "0 to 4");
    assert_refused(TopKRows::new(&[3, -1], 4), "lengths", "0 to 4");
    assert_refused(TopKRows::new(&[0], -1), "max_len", "0 to 2147483647");
    assert_refused(TopKRows::new(&[0], 1 << 31), "max_len", "0 to 2147483647");
    let rows = || TopKRows::new(&[3, 4], 4).unwrap();
    assert_refused(rows().with_row_to_batch(&[0, 2], 2), "row_to_batch", "0 to 1");
    assert_refused(rows().with_row_to_batch(&[0, -1], 2), "row_to_batch", "0 to 1");
    assert_refused(rows().with_row_to_batch(&[0], 2), "row_to_batch", "2, one for each row");
    assert_refused(rows().with_row_to_batch(&[0, 0], 0), "batch", "1 to 2147483647");
    let rows = rows().with_row_to_batch(&[0, 1], 2).unwrap();
    assert_eq!((rows.lengths(), rows.row_to_batch()), (&[3, 4][..], &[0, 1][..]));
    assert_eq!(rows.facts(), TopKRowsFacts { rows: 2, max_len: 4, batch: Some(2) });
}

#[test]
fn rows_of_other_tensors_are_refused() {
    let tables = [0i32; 12];
    let rows = TopKRows::new(&[1, 1, 1], 5).unwrap();
    assert_refused(page_table_of(&rows, &tables, 2), "lengths", "at most 4");
    let rows = TopKRows::new(&[1, 1], 4).unwrap();
    assert_refused(page_table_of(&rows, &tables, 2), "lengths", "shape [3]");
    let rows = TopKRows::new(&[1, 1, 1], 3).unwrap().with_row_to_batch(&[0, 0, 0], 4).unwrap();
    assert_refused(page_table_of(&rows, &tables, 2), "row_to_batch", "at most 3");
    // A table of more requests than there are rows for is fine, and so are rows that might be longer.
    let rows = TopKRows::new(&[1, 1, 1], 3).unwrap().with_row_to_batch(&[0, 1, 0], 2).unwrap();
    page_table_of(&rows, &tables, 2).unwrap();
}

#[test]
fn what_stands_in_a_graphs_place_keeps_its_bounds() {
    let captured = TopKRows::new(&[3, 4], 4).unwrap().with_row_to_batch(&[0, 1], 2).unwrap();
    let less = TopKRows::new(&[1, 0], 2).unwrap().with_row_to_batch(&[0, 0], 1).unwrap();
    let placed = less.in_place_of(&captured).unwrap();
    assert_eq!((placed.lengths(), placed.facts()), (&[1, 0][..], captured.facts()));
    let expected = "as captured, 2 rows of up to 4 scores of 2 requests";
    for more in [
        TopKRows::new(&[1, 0], 2).unwrap(),
        TopKRows::new(&[1], 2).unwrap().with_row_to_batch(&[0], 1).unwrap(),
        TopKRows::new(&[1, 0], 5).unwrap().with_row_to_batch(&[0, 0], 1).unwrap(),
        TopKRows::new(&[1, 0], 2).unwrap().with_row_to_batch(&[0, 0], 3).unwrap(),
    ] {
        assert_refused(more.in_place_of(&captured), "rows", expected);
    }
}

fn on_gpu(address: usize, dtype: DType, shape: &[i64]) -> TensorRef<'static> {
    failing::read(0, address, dtype, shape)
}

fn out_on_gpu(address: usize, dtype: DType, shape: &[i64]) -> TensorMut<'static> {
    failing::write(0, address, dtype, shape)
}

/// What is given to a call that is refused.
struct Given {
    indices: TensorMut<'static>,
    values: TensorMut<'static>,
    input: TensorRef<'static>,
    top_k: i64,
}

#[test]
fn what_upstream_would_not_notice_is_refused_by_name() {
    initialize();
    let (word, b, f) = (DType::I32, DType::BF16, DType::F32);
    type Change = fn(&mut Given);
    let rows: &[(Change, &str, &str)] = &[
        (|g| g.top_k = 0, "top_k", "1 to"),
        (|g| g.top_k = -1, "top_k", "1 to"),
        (|g| g.top_k = 1 << 32, "top_k", "1 to"),
        (|g| g.top_k = 4, "output_indices", "[rows, top_k]"),
        (|g| g.indices = out_on_gpu(0x1000, DType::I64, &[2, 3]), "output_indices", "I32"),
        (|g| g.indices = out_on_gpu(0x1000, DType::I32, &[2, 2]), "output_indices", "[rows, top_k]"),
        (|g| g.indices = out_on_gpu(0x1000, DType::I32, &[3, 3]), "output_indices", "[rows, top_k]"),
        (|g| g.indices = out_on_gpu(0x1002, DType::I32, &[2, 3]), "output_indices", "aligned to 4 bytes"),
        (|g| g.values = out_on_gpu(0x2000, DType::F16, &[2, 3]), "output_values", "F32, as input"),
        (|g| g.values = out_on_gpu(0x2000, DType::F32, &[6]), "output_values", "2 dimensions"),
        (|g| g.values = out_on_gpu(0x2002, DType::F32, &[2, 3]), "output_values", "aligned to 4 bytes"),
        (|g| g.input = on_gpu(0x3004, DType::F32, &[2, 16]), "input", "aligned to 16 bytes"),
        (|g| g.input = on_gpu(0x3000, DType::F64, &[2, 16]), "input", "F32 or F16 or BF16"),
        (|g| g.input = on_gpu(0x3000, DType::F32, &[2, 16, 1]), "input", "2 dimensions"),
        (|g| g.input = on_gpu(0x3000, DType::F32, &[2, 0]), "d", "1 to"),
        (|g| g.input = on_gpu(0x3000, DType::F32, &[2, 2]), "top_k", "at most d"),
        (|g| g.input = failing::read(1, 0x3000, DType::F32, &[2, 16]), "output_indices", "memory of cuda:1"),
        // As on Hopper, where there is no GPU to be asked. Filtered, and of several blocks.
        (|g| g.input = on_gpu(0x3000, DType::F32, &[2, 16400]), "d", "forget candidates"),
        (|g| g.input = on_gpu(0x3000, DType::F32, &[2, 60000]), "d", "wait for each other"),
        (|g| g.input = on_gpu(0x3000, DType::F32, &[2, 151936]), "d", "FLASHINFER_TOPK_ALGO"),
    ];
    for &(change, name, says) in rows {
        let mut given = Given {
            indices: out_on_gpu(0x1000, word, &[2, 3]),
            values: out_on_gpu(0x2000, f, &[2, 3]),
            input: on_gpu(0x3000, f, &[2, 16]),
            top_k: 3,
        };
        change(&mut given);
        let Given { mut indices, mut values, input, top_k } = given;
        assert_refused(radix_topk(&mut indices, &mut values, &input, top_k, Stream::NULL), name, says);
    }
    // Rows of an odd length have their elements at any place, and only the address of an element is asked for.
    let (mut indices, mut values) = (out_on_gpu(0x1000, word, &[2, 3]), out_on_gpu(0x2002, b, &[2, 3]));
    let odd = on_gpu(0x3002, b, &[2, 17]);
    let result = radix_topk(&mut indices, &mut values, &odd, 3, Stream::NULL);
    assert!(!matches!(result, Err(FlashInferError::InvalidArgument { .. })), "{result:?}");
    let result = radix_topk(&mut indices, &mut values, &on_gpu(0x3002, b, &[2, 18]), 3, Stream::NULL);
    assert_refused(result, "input", "aligned to 4 bytes");
}

#[test]
fn what_steers_is_where_the_scores_are_and_as_many_as_there_are_rows() {
    initialize();
    let (mut output, s) = (out_on_gpu(0x1000, DType::I32, &[3, 5]), Stream::NULL);
    let input = |columns: i64| on_gpu(0x3000, DType::F32, &[3, columns]);
    let table = |columns: i64| on_gpu(0x5000, DType::I32, &[3, columns]);
    let good = || on_gpu(0x4000, DType::I32, &[3]);
    // SAFETY: no kernel runs: the calls are refused.
    let with = |lengths: TensorRef<'static>, max_len| unsafe { Placed::<TopKRows>::from_lengths(lengths, max_len) };
    for (lengths, says) in [
        (on_gpu(0x4000, DType::I64, &[3]), "I32"),
        (on_gpu(0x4000, DType::I32, &[4]), "shape [3]"),
        (on_gpu(0x4000, DType::I32, &[3, 1]), "1 dimension"),
    ] {
        let rows = with(lengths, 100);
        let result = radix_topk_page_table_transform(&mut output, &input(100), &table(100), &rows, 5, s);
        assert_refused(result, "lengths", says);
        assert_refused(radix_topk_ragged_transform(&mut output, &input(100), &good(), &rows, 5, s), "lengths", says);
    }
    // SAFETY: as above.
    let of_requests =
        unsafe { Placed::<TopKRows>::from_lengths_of_requests(good(), on_gpu(0x4000, DType::I32, &[2]), (100, 3)) };
    let result = radix_topk_page_table_transform(&mut output, &input(100), &table(100), &of_requests, 5, s);
    assert_refused(result, "maybe_row_to_batch", "shape [3]");
    // A table of another length than the scores, and other offsets.
    let rows = with(good(), 100);
    let result = radix_topk_page_table_transform(&mut output, &input(100), &table(99), &rows, 5, s);
    assert_refused(result, "src_page_table", "[rows, max_len]");
    let offsets = on_gpu(0x4000, DType::I64, &[3]);
    assert_refused(radix_topk_ragged_transform(&mut output, &input(100), &offsets, &rows, 5, s), "offsets", "I32");
    // On the host for scores on a GPU.
    let on_host = TopKRows::new(&[1, 2, 3], 100).unwrap();
    let placed = Placed::on_host(&on_host).unwrap();
    let result = radix_topk_page_table_transform(&mut output, &input(100), &table(100), &placed, 5, s);
    assert_refused(result, "lengths", "memory of cuda:0");
    let result = radix_topk_ragged_transform(&mut output, &input(100), &good(), &placed, 5, s);
    assert_refused(result, "lengths", "memory of cuda:0");
    // Long rows, whatever the lengths say.
    let result = radix_topk_page_table_transform(&mut output, &input(20000), &table(20000), &rows, 5, s);
    assert_refused(result, "max_len", "forget candidates");
}

#[test]
fn lengths_and_requests_past_the_tensors_raise_on_the_host() {
    initialize();
    let tables = TensorRef::from_slice(&[0i32; 12], &[3, 4]).unwrap();
    for (lengths, requests) in
        [([1, 2, 5], [0, 0, 0]), ([1, -1, 4], [0, 0, 0]), ([1, 2, 4], [0, 3, 0]), ([1, 2, 4], [0, -1, 0])]
    {
        let (lengths, requests): ([i32; 3], [i32; 3]) = (lengths, requests);
        let (lengths, requests) =
            (TensorRef::from_slice(&lengths, &[3]).unwrap(), TensorRef::from_slice(&requests, &[3]).unwrap());
        // SAFETY: on the host the contents are checked.
        let rows = unsafe { Placed::from_lengths_of_requests(lengths, requests, (4, 3)) };
        let (mut output, scores) = ([0i32; 6], TensorRef::from_slice(&SCORES, &[3, 4]).unwrap());
        let mut output = TensorMut::from_slice(&mut output, &[3, 2]).unwrap();
        let error = radix_topk_page_table_transform(&mut output, &scores, &tables, &rows, 2, Stream::NULL).unwrap_err();
        assert!(matches!(error, FlashInferError::TvmFfiCall { .. }), "{error}");
    }
}

#[test]
fn the_host_is_supported() {
    initialize();
    assert!(is_supported(Device::Cpu).unwrap());
}

#[cfg(feature = "topk")]
mod real {
    use super::*;
    use failing::Cuda;
    use flashinfer_rs::contract::MAX_DIMENSIONS;
    use flashinfer_rs::{Arg, Function, kernels};

    const LIBRARIES: [&str; 1] = ["topk.so"];
    const VARIABLE: &str = "FLASHINFER_TOPK_ALGO";

    /// GPUs by the shared memory of a block and of a multiprocessor, and their multiprocessors: Turing, Ada, Ampere and Hopper.
    const GPUS: [[i32; 3]; 4] =
        [[65536, 65536, 40], [101376, 102400, 142], [166912, 167936, 108], [232448, 233472, 132]];

    fn rows(device: u32, rows: i64, batch: Option<i64>) -> Placed<'static, TopKRows> {
        let lengths = failing::read(device, 0x5000_0000, DType::I32, &[rows]);
        let Some(batch) = batch else {
            // SAFETY: no kernel runs.
            return unsafe { Placed::from_lengths(lengths, 1) };
        };
        let row_to_batch = failing::read(device, 0x6000_0000, DType::I32, &[rows]);
        // SAFETY: no kernel runs.
        unsafe { Placed::from_lengths_of_requests(lengths, row_to_batch, (1, batch)) }
    }

    #[test]
    fn every_search_tells_of_a_launch_that_fails() {
        native::isolated("real::every_search_tells_of_a_launch_that_fails", || {
            let cuda = Cuda::stand_in(&LIBRARIES);
            let (mut indices, mut values) =
                (out_on_gpu(0x1000, DType::I32, &[4, 3]), out_on_gpu(0x2000, DType::F32, &[4, 3]));
            let (input, offsets) = (on_gpu(0x3000, DType::F32, &[4, 100]), on_gpu(0x7000, DType::I32, &[4]));
            let (tables, s) = (on_gpu(0x8000, DType::I32, &[4, 100]), Stream::NULL);
            let (each, of_two) = (rows(0, 4, None), rows(0, 4, Some(2)));
            cuda.tells("radix_topk", &mut || radix_topk(&mut indices, &mut values, &input, 3, s));
            let name = "radix_topk_page_table_transform";
            let mut call = || radix_topk_page_table_transform(&mut indices, &input, &tables, &each, 3, s);
            cuda.tells(name, &mut call);
            let mut call = || radix_topk_page_table_transform(&mut indices, &input, &tables, &of_two, 3, s);
            cuda.tells("radix_topk_page_table_transform of requests", &mut call);
            let mut call = || radix_topk_ragged_transform(&mut indices, &input, &offsets, &each, 3, s);
            cuda.tells("radix_topk_ragged_transform", &mut call);
            // The fourth needs cudarc's memory, and is the first one's launcher.
            let of_library = kernels::rows().into_iter().filter(|row| row.library == "topk.so").count();
            assert_eq!((cuda.told(), of_library), (4, 5));
        });
    }

    #[test]
    fn the_threads_device_is_what_it_was_and_the_tensors_is_current_meanwhile() {
        native::isolated("real::the_threads_device_is_what_it_was_and_the_tensors_is_current_meanwhile", || {
            let cuda = Cuda::stand_in(&LIBRARIES);
            cuda.set("devices", 3);
            cuda.set("launch_fails_with", 0);
            for current in [0, 2] {
                for device in [1, 2, 0] {
                    let mut indices = failing::write(device, 0x1000, DType::I32, &[4, 3]);
                    let mut values = failing::write(device, 0x2000, DType::F32, &[4, 3]);
                    let input = failing::read(device, 0x3000, DType::F32, &[4, 100]);
                    let tables = failing::read(device, 0x8000, DType::I32, &[4, 100]);
                    let offsets = failing::read(device, 0x7000, DType::I32, &[4]);
                    let (rows, s) = (rows(device, 4, None), Stream::NULL);
                    let after = |result: Result<()>| {
                        result.unwrap();
                        assert_eq!((cuda.get("last_device"), cuda.get("current_device")), (device as i32, current));
                    };
                    cuda.set("current_device", current);
                    after(radix_topk(&mut indices, &mut values, &input, 3, s));
                    after(radix_topk_page_table_transform(&mut indices, &input, &tables, &rows, 3, s));
                    after(radix_topk_ragged_transform(&mut indices, &input, &offsets, &rows, 3, s));
                }
            }
        });
    }

    /// For a test that is alone in its process.
    fn set_variable(value: Option<&str>) {
        // SAFETY: no other thread reads the environment meanwhile.
        unsafe {
            match value {
                Some(value) => std::env::set_var(VARIABLE, value),
                None => std::env::remove_var(VARIABLE),
            }
        }
    }

    /// What one launch of upstream's comes to, for sizes that it is given whatever comes of it.
    #[derive(Debug, PartialEq, Eq)]
    enum Upstream {
        Filtered,
        /// Blocks for each row, and rows at once.
        Radix(i64, i64),
    }

    /// The launch that was, of rows of so many elements of this size.
    fn last(cuda: &Cuda, rows: i64, d: i64, element: i64, multiprocessors: i64) -> Upstream {
        let (blocks, shared) = (i64::from(cuda.get("last_grid")), i64::from(cuda.get("last_shared")));
        if shared == 128 << 10 && blocks == rows && shared != 2080 + d * element {
            return Upstream::Filtered;
        }
        // One block has a whole row in its memory; several divide it, and as many rows at once as there is room for.
        if shared == 2080 + d * element {
            return Upstream::Radix(1, blocks);
        }
        let a_row = (2..).find(|a_row| (multiprocessors / a_row).min(rows).max(1) * a_row == blocks).unwrap();
        Upstream::Radix(a_row, blocks / a_row)
    }

    fn ask_upstream(
        function: &Function,
        input: &TensorRef<'_>,
        indices: &mut TensorMut<'_>,
        values: &mut TensorMut<'_>,
        k: i64,
    ) {
        let (input, indices, values) = (input.pack(), indices.pack(), values.pack());
        let args = [Arg::tensor(&input), Arg::tensor(&indices), Arg::tensor(&values), Arg::NONE, Arg::int(k)];
        // SAFETY: no kernel runs.
        unsafe { function.call(&args) }.unwrap();
    }

    /// Sizes around every limit, and between.
    fn sizes(shared: i64, element: i64) -> Vec<i64> {
        let one_block = (shared - 2080) / element;
        let edges = [16384, 32768, one_block, 2 * one_block, 49152, 65536];
        let near = edges.iter().flat_map(|edge| [-17, -16, -8, -4, -1, 0, 1, 4, 8, 16, 17].map(|step| edge + step));
        near.chain([1, 2, 7, 100, 2048, 2049, 5000, 20000, 40000, 50000, 128_256, 151_936, 262_144, 3_000_000])
            .collect()
    }

    #[test]
    fn what_upstream_would_do_badly_is_refused_and_nothing_else() {
        native::isolated("real::what_upstream_would_do_badly_is_refused_and_nothing_else", || {
            let cuda = Cuda::stand_in(&LIBRARIES);
            cuda.set("devices", GPUS.len() as i32);
            cuda.set("launch_fails_with", 0);
            let function = FlashInferRuntime::global().unwrap().module("topk.so").unwrap();
            let function = function.function("radix_topk").unwrap();
            // The unsafe form refuses less.
            let of_blocks =
                kernels::rows().into_iter().find(|row| row.kernel == "radix_topk of several blocks").unwrap();
            let (mut refused, mut done) = ([0; 2], [0; 2]);
            for (device, [block, multiprocessor, multiprocessors]) in GPUS.into_iter().enumerate() {
                cuda.set("shared_per_block", block);
                cuda.set("shared_per_multiprocessor", multiprocessor);
                cuda.set("multiprocessors", multiprocessors);
                for value in [None, Some("filtered"), Some("multi_cta"), Some("something else")] {
                    set_variable(value);
                    for dtype in [DType::F32, DType::F16, DType::BF16] {
                        for d in sizes(i64::from(block), dtype.size() as i64) {
                            for rows in [1, 2, 3, 4, 5, 17] {
                                for k in [1, 2048, 2049, d].into_iter().filter(|k| *k <= d) {
                                    let at = device as u32;
                                    let mut indices = failing::write(at, 0x1000_0000, DType::I32, &[rows, k]);
                                    let mut values = failing::write(at, 0x2000_0000, dtype, &[rows, k]);
                                    let input = failing::read(at, 0x3000_0000, dtype, &[rows, d]);
                                    ask_upstream(&function, &input, &mut indices, &mut values, k);
                                    let (element, all) = (dtype.size() as i64, i64::from(multiprocessors));
                                    let upstream = last(&cuda, rows, d, element, all);
                                    let (bad, kind) = match upstream {
                                        Upstream::Filtered => (d > 16384, 0),
                                        Upstream::Radix(blocks, _) => (blocks > 1, 1),
                                    };
                                    let lasting = match upstream {
                                        Upstream::Filtered => bad,
                                        Upstream::Radix(blocks, _) => blocks > all,
                                    };
                                    let mut sizes = [1; MAX_DIMENSIONS];
                                    sizes[..7].copy_from_slice(&[rows, d, k, element, block.into(), all, 1 << 20]);
                                    let holds = of_blocks.relations.iter().all(|relation| (relation.holds)(&sizes));
                                    let result = radix_topk(&mut indices, &mut values, &input, k, Stream::NULL);
                                    let what = format!("{rows} × {d} of {dtype}, {k} of them, {value:?} on {block}");
                                    assert_eq!(holds, !lasting, "{what}, in states");
                                    match result {
                                        Ok(()) if !bad => {
                                            assert_eq!(last(&cuda, rows, d, element, all), upstream, "{what}");
                                            done[kind] += 1;
                                        }
                                        Err(FlashInferError::InvalidArgument { argument: "d", .. }) if bad => {
                                            refused[kind] += 1;
                                        }
                                        result => panic!("{what}: {result:?}, upstream would {upstream:?}"),
                                    }
                                }
                            }
                        }
                    }
                }
            }
            println!("filtered and radix: refused {refused:?}, done {done:?}");
            assert!(refused.iter().chain(&done).all(|count| *count > 1000), "{refused:?}, {done:?}");
        });
    }

    /// A block that takes a second row loads it while others still read the first.
    #[test]
    fn no_block_is_given_a_second_row() {
        native::isolated("real::no_block_is_given_a_second_row", || {
            let cuda = Cuda::stand_in(&LIBRARIES);
            cuda.set("launch_fails_with", 0);
            let launches = |rows: i64, d: i64, k: i64| {
                let before = cuda.get("launches");
                let mut indices = out_on_gpu(0x1000_0000, DType::I32, &[rows, k]);
                let mut values = out_on_gpu(0x2000_0002, DType::BF16, &[rows, k]);
                let input = on_gpu(0x3000_0000, DType::BF16, &[rows, d]);
                radix_topk(&mut indices, &mut values, &input, k, Stream::NULL).unwrap();
                (cuda.get("launches") - before, cuda.get("last_grid"))
            };
            // The radix kernel, on 132 multiprocessors: the last launch has what is left.
            assert_eq!(launches(132, 20000, 50), (1, 132));
            assert_eq!(launches(133, 20000, 50), (2, 1));
            assert_eq!(launches(1000, 4096, 3000), (8, 76));
            // An odd length, where parts start at odd addresses.
            assert_eq!(launches(265, 20001, 3), (3, 1));
            // The filtered one has a block for each row.
            assert_eq!(launches(1000, 4096, 50), (1, 1000));
            set_variable(Some("multi_cta"));
            assert_eq!(launches(1000, 4096, 50), (8, 76));

            let before = cuda.get("launches");
            let (rows, s) = (rows(0, 133, Some(2)), Stream::NULL);
            let mut output = out_on_gpu(0x1000_0000, DType::I32, &[133, 5]);
            let input = on_gpu(0x3000_0000, DType::F32, &[133, 1000]);
            let (tables, offsets) =
                (on_gpu(0x4000_0000, DType::I32, &[2, 1000]), on_gpu(0x4000_0000, DType::I32, &[133]));
            radix_topk_page_table_transform(&mut output, &input, &tables, &rows, 5, s).unwrap();
            radix_topk_ragged_transform(&mut output, &input, &offsets, &rows, 5, s).unwrap();
            assert_eq!(cuda.get("launches") - before, 4);
        });
    }

    #[test]
    fn rows_may_have_fewer_scores_than_are_asked_for() {
        native::isolated("real::rows_may_have_fewer_scores_than_are_asked_for", || {
            let cuda = Cuda::stand_in(&LIBRARIES);
            cuda.set("launch_fails_with", 0);
            let (rows, s) = (rows(0, 7, None), Stream::NULL);
            for (max_len, k) in [(100, 100), (100, 3000), (1, 2048)] {
                let mut output = out_on_gpu(0x1000_0000, DType::I32, &[7, k]);
                let input = on_gpu(0x3000_0000, DType::F32, &[7, max_len]);
                let (tables, offsets) =
                    (on_gpu(0x4000_0000, DType::I32, &[7, max_len]), on_gpu(0x5000_0000, DType::I32, &[7]));
                let one_block_each = (7, 2080 + 4 * max_len as i32);
                radix_topk_page_table_transform(&mut output, &input, &tables, &rows, k, s).unwrap();
                assert_eq!((cuda.get("last_grid"), cuda.get("last_shared")), one_block_each);
                radix_topk_ragged_transform(&mut output, &input, &offsets, &rows, k, s).unwrap();
                assert_eq!((cuda.get("last_grid"), cuda.get("last_shared")), one_block_each);
            }
        });
    }

    /// Elements are counted in 32 bits.
    #[test]
    fn more_than_2_32_elements_are_several_launches() {
        native::isolated("real::more_than_2_32_elements_are_several_launches", || {
            let cuda = Cuda::stand_in(&LIBRARIES);
            cuda.set("launch_fails_with", 0);
            let before = cuda.get("launches");
            let rows = (1i64 << 18) + 1;
            let mut indices = out_on_gpu(0x1000_0000, DType::I32, &[rows, 3]);
            let mut values = out_on_gpu(0x2000_0000, DType::F32, &[rows, 3]);
            let input = on_gpu(0x3000_0000, DType::F32, &[rows, 16384]);
            radix_topk(&mut indices, &mut values, &input, 3, Stream::NULL).unwrap();
            assert_eq!((cuda.get("launches") - before, cuda.get("last_grid")), (2, 1));
        });
    }
}
