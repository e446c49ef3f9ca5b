//! Views of tensors: the elements that they should be, as the reference on the host reads and writes them.

use flashinfer_rs::kernels::norm::{NormOptions, rmsnorm, rmsnorm_in_place};
use flashinfer_rs::{FlashInferError, FlashInferRuntime, Result, RuntimeConfig, Stream, TensorMut, TensorRef};

const COLUMNS: i64 = 8;

/// Each row a multiple of what its number is, so that a norm keeps which row it was: its first element's sign and place.
fn rows(count: i64) -> Vec<f32> {
    (0..count * COLUMNS).map(|i| ((i / COLUMNS + 2) * (i % COLUMNS + 1)) as f32 + (i / COLUMNS * i) as f32).collect()
}

fn normed(row: &[f32]) -> Vec<f32> {
    let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / row.len() as f64;
    row.iter().map(|x| (f64::from(*x) / (mean + 1e-6).sqrt()) as f32).collect()
}

/// The norm of a tensor of so many rows.
fn norm_of(input: &TensorRef<'_>) -> Vec<Vec<f32>> {
    FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
    let count = input.shape().iter().product::<i64>() as usize;
    let (mut values, weight) = (vec![f32::NAN; count], [1f32; COLUMNS as usize]);
    let mut out = TensorMut::from_slice(&mut values, input.shape()).unwrap();
    let weight = TensorRef::from_slice(&weight, &[COLUMNS]).unwrap();
    rmsnorm(&mut out, input, &weight, &NormOptions::default(), Stream::NULL).unwrap();
    values.chunks(COLUMNS as usize).map(<[f32]>::to_vec).collect()
}

fn norm_in_place(tensor: &mut TensorMut<'_>) -> Result<()> {
    FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
    let weight = [1f32; COLUMNS as usize];
    let weight = TensorRef::from_slice(&weight, &[COLUMNS]).unwrap();
    rmsnorm_in_place(tensor, &weight, &NormOptions::default(), Stream::NULL)
}

/// The rows of these numbers, normed.
fn expected(values: &[f32], numbers: &[usize]) -> Vec<Vec<f32>> {
    let rows: Vec<_> = values.chunks(COLUMNS as usize).collect();
    numbers.iter().map(|&number| normed(rows[number])).collect()
}

#[track_caller]
fn assert_refused<T: std::fmt::Debug>(result: Result<T>, name: &str, found: &str) {
    match result.unwrap_err() {
        FlashInferError::InvalidArgument { function: "tensor", argument, found: was, .. } if argument == name => {
            assert!(was.contains(found), "{was}");
        }
        other => panic!("{other}"),
    }
}

#[test]
fn a_narrowed_tensor_is_a_part_of_one_dimension() {
    let values = rows(6);
    let all = TensorRef::from_slice(&values, &[2, 3, COLUMNS]).unwrap();
    assert_eq!(norm_of(&all), expected(&values, &[0, 1, 2, 3, 4, 5]));
    assert_eq!(norm_of(&all.narrow(0, 1, 1).unwrap()), expected(&values, &[3, 4, 5]));
    let part = all.narrow(1, 1, 2).unwrap();
    assert_eq!((part.shape(), part.strides()), (&[2, 2, COLUMNS][..], &[3 * COLUMNS, COLUMNS, 1][..]));
    assert_eq!(norm_of(&part), expected(&values, &[1, 2, 4, 5]));
    assert_eq!(norm_of(&part.narrow(0, 1, 1).unwrap().narrow(1, 1, 1).unwrap()), expected(&values, &[5]));
    assert_eq!(all.narrow(0, 2, 0).unwrap().shape(), [0, 3, COLUMNS]);
    assert_eq!(all.narrow(0, 0, 2).unwrap().shape(), all.shape());
}

#[test]
fn a_part_that_is_not_inside_is_refused() {
    let values = rows(6);
    let all = TensorRef::from_slice(&values, &[2, 3, COLUMNS]).unwrap();
    for (start, count) in [(-1, 1), (0, 3), (2, 1), (1, -1), (3, 0), (i64::MAX, 1), (1, i64::MAX)] {
        assert_refused(all.narrow(0, start, count), "range", &start.to_string());
    }
    assert_refused(all.narrow(3, 0, 1), "dimension", "3");
    for middle in [-1, 4, i64::MIN] {
        assert_refused(all.split_at(1, middle), "range", "0 to");
    }
    assert_refused(all.split_at(3, 0), "dimension", "3");
    let mut values = rows(6);
    let mut all = TensorMut::from_slice(&mut values, &[2, 3, COLUMNS]).unwrap();
    assert_refused(all.narrow(1, 2, 2), "range", "2 to 4");
    assert_refused(all.split_at(1, 4), "range", "0 to 4");
}

#[test]
fn the_halves_of_a_tensor_meet_nowhere_and_leave_nothing_out() {
    let values = rows(6);
    let all = TensorRef::from_slice(&values, &[2, 3, COLUMNS]).unwrap();
    let (first, rest) = all.split_at(1, 1).unwrap();
    assert_eq!((norm_of(&first), norm_of(&rest)), (expected(&values, &[0, 3]), expected(&values, &[1, 2, 4, 5])));
    let (all_of_it, nothing) = all.split_at(0, 2).unwrap();
    assert_eq!((all_of_it.shape(), nothing.shape()), (&[2, 3, COLUMNS][..], &[0, 3, COLUMNS][..]));
    // Written, the rest as the first.
    let mut written = values.clone();
    {
        let mut all = TensorMut::from_slice(&mut written, &[2, 3, COLUMNS]).unwrap();
        let (mut first, mut rest) = all.split_at(1, 1).unwrap();
        norm_in_place(&mut first).unwrap();
        norm_in_place(&mut rest.narrow(1, 1, 1).unwrap()).unwrap();
    }
    let was: Vec<_> = values.chunks(COLUMNS as usize).map(<[f32]>::to_vec).collect();
    let is: Vec<_> = written.chunks(COLUMNS as usize).map(<[f32]>::to_vec).collect();
    for (number, (was, is)) in was.iter().zip(&is).enumerate() {
        let changed = [0, 2, 3, 5].contains(&number);
        assert_eq!(*is, if changed { normed(was) } else { was.clone() }, "row {number}");
    }
}

#[test]
fn a_tensor_whose_elements_share_places_is_not_split_to_be_written() {
    let mut values = rows(6);
    let split = |values: &mut [f32], shape: &[i64], strides: &[i64]| {
        let mut tensor = TensorMut::from_slice_strided(values, shape, strides).unwrap();
        tensor.split_at(0, 1).map(|_| ())
    };
    // A row again and again, and rows that begin within the one before.
    assert_refused(split(&mut values, &[3, COLUMNS], &[0, 1]), "tensor", "strided [0, 1]");
    assert_refused(split(&mut values, &[3, COLUMNS], &[4, 1]), "tensor", "strided [4, 1]");
    assert_refused(split(&mut values, &[2, 2, COLUMNS], &[8, 8, 1]), "tensor", "strided [8, 8, 1]");
    split(&mut values, &[3, COLUMNS], &[16, 1]).unwrap();
    split(&mut values, &[2, 3, COLUMNS], &[8, 16, 1]).unwrap();
    // To be read it may be.
    let repeated = TensorRef::from_slice_strided(&values, &[3, COLUMNS], &[0, 1]).unwrap();
    let (first, rest) = repeated.split_at(0, 1).unwrap();
    assert_eq!((norm_of(&first), norm_of(&rest)), (expected(&values, &[0]), expected(&values, &[0, 0])));
}

#[test]
fn another_shape_has_the_same_elements_in_the_same_order() {
    let mut values = rows(6);
    let flat = TensorRef::from_slice(&values, &[6 * COLUMNS]).unwrap();
    let all = flat.reshape(&[6, COLUMNS]).unwrap();
    assert_eq!(all.strides(), [COLUMNS, 1]);
    assert_eq!(norm_of(&all), expected(&values, &[0, 1, 2, 3, 4, 5]));
    assert_eq!(norm_of(&all.reshape(&[3, 2, COLUMNS]).unwrap()), expected(&values, &[0, 1, 2, 3, 4, 5]));
    // A part that lies in one piece has other shapes too.
    let part = all.narrow(0, 2, 4).unwrap().reshape(&[2, 2, COLUMNS]).unwrap();
    assert_eq!(norm_of(&part), expected(&values, &[2, 3, 4, 5]));
    for shape in [&[5, COLUMNS][..], &[-6, -COLUMNS], &[0], &[], &[1 << 62, 1 << 62], &[6, 1, 1, 1, 1, 1, COLUMNS]] {
        assert_refused(all.reshape(shape), "shape", &format!("{shape:?}"));
    }
    let apart = all.reshape(&[2, 3, COLUMNS]).unwrap().narrow(1, 0, 2).unwrap();
    assert_refused(apart.reshape(&[4, COLUMNS]), "tensor", "strided [24, 8, 1]");
    let mut tensor = TensorMut::from_slice(&mut values, &[6 * COLUMNS]).unwrap();
    assert_refused(tensor.reshape(&[5, COLUMNS]), "shape", "[5, 8]");
    norm_in_place(&mut tensor.reshape(&[6, COLUMNS]).unwrap()).unwrap();
    assert_eq!(values[..COLUMNS as usize], normed(&rows(6)[..COLUMNS as usize]));
}

#[test]
fn transposed_tensors_are_read_and_written_in_the_other_order() {
    let values = rows(6);
    let tokens_first = TensorRef::from_slice(&values, &[2, 3, COLUMNS]).unwrap();
    let heads_first = tokens_first.transpose(0, 1).unwrap();
    assert_eq!(heads_first.shape(), [3, 2, COLUMNS]);
    assert_eq!(norm_of(&heads_first), expected(&values, &[0, 3, 1, 4, 2, 5]));
    assert_eq!(norm_of(&heads_first.narrow(0, 1, 2).unwrap()), expected(&values, &[1, 4, 2, 5]));
    assert_eq!(norm_of(&heads_first.transpose(1, 0).unwrap()), expected(&values, &[0, 1, 2, 3, 4, 5]));
    assert_refused(heads_first.reshape(&[6, COLUMNS]), "tensor", "strided [8, 24, 1]");
    assert_refused(tokens_first.transpose(0, 3), "dimensions", "0 and 3");
    assert_refused(tokens_first.transpose(usize::MAX, 0), "dimensions", "and 0");
    let mut written = values.clone();
    let mut tensor = TensorMut::from_slice(&mut written, &[2, 3, COLUMNS]).unwrap();
    assert_refused(tensor.transpose(3, 1), "dimensions", "3 and 1");
    {
        let mut heads = tensor.transpose(0, 1).unwrap();
        norm_in_place(&mut heads.narrow(0, 1, 1).unwrap()).unwrap();
    }
    for number in 0..6 {
        let row = &values[number * COLUMNS as usize..][..COLUMNS as usize];
        let is = &written[number * COLUMNS as usize..][..COLUMNS as usize];
        assert_eq!(is, if number % 3 == 1 { normed(row) } else { row.to_vec() }, "row {number}");
    }
    // Columns that lie apart are no rows.
    let columns = TensorRef::from_slice(&values, &[6, COLUMNS]).unwrap().transpose(0, 1).unwrap();
    let (mut out, weight) = (vec![0f32; 48], [1f32; 6]);
    let mut out = TensorMut::from_slice(&mut out, &[COLUMNS, 6]).unwrap();
    let weight = TensorRef::from_slice(&weight, &[6]).unwrap();
    let error = rmsnorm(&mut out, &columns, &weight, &NormOptions::default(), Stream::NULL).unwrap_err();
    assert!(matches!(error, FlashInferError::InvalidArgument { argument: "input", .. }), "{error}");
}
