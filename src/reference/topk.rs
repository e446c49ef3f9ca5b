//! The largest elements of rows.

use super::{Args, HostTensor, Raised, SafeCall, function};

pub(super) const FUNCTIONS: &[(&str, SafeCall)] = &[
    ("radix_topk", radix_topk),
    ("radix_topk_page_table_transform", radix_topk_page_table_transform),
    ("radix_topk_ragged_transform", radix_topk_ragged_transform),
];

function!(radix_topk, |args| {
    let [input, indices, values, _states, top_k] = args.exactly()?;
    let (input, indices, values) = (args.tensor(input)?, args.tensor(indices)?, args.tensor(values)?);
    let (rows, d, top_k) = (input.size(0)?, input.size(1)?, count(args, top_k)?);
    indices.expect_shape(&[rows, top_k])?;
    values.expect_shape(&[rows, top_k])?;
    if top_k > d {
        return Err(("ValueError", format!("top_k is {top_k}, expected at most {d}, as many as a row has")));
    }
    for row in 0..rows {
        for (place, i) in largest(&input, row, d, top_k)?.into_iter().enumerate() {
            indices.set(&[row, place], i as f64)?;
            values.copy(&[row, place], &input, &[row, i])?;
        }
    }
    Ok(())
});

function!(radix_topk_page_table_transform, |args| {
    let [input, output, source, row_to_batch, lengths, _states, top_k] = args.exactly()?;
    let (input, output, source) = (args.tensor(input)?, args.tensor(output)?, args.tensor(source)?);
    let row_to_batch = args.optional(row_to_batch)?.filter(|row_to_batch| !row_to_batch.data.is_null());
    let (lengths, top_k) = (args.tensor(lengths)?, count(args, top_k)?);
    for row in 0..input.size(0)? {
        let table = match &row_to_batch {
            Some(row_to_batch) => row_to_batch.index(&[row], source.size(0)?)?,
            None => row,
        };
        let entry = |i: usize| source.number(&[table, i]);
        transform(&input, &lengths, row, &output, top_k, entry)?;
    }
    Ok(())
});

function!(radix_topk_ragged_transform, |args| {
    let [input, output, offsets, lengths, _states, top_k] = args.exactly()?;
    let (input, output, offsets) = (args.tensor(input)?, args.tensor(output)?, args.tensor(offsets)?);
    let (lengths, top_k) = (args.tensor(lengths)?, count(args, top_k)?);
    for row in 0..input.size(0)? {
        // In 32 bits, as upstream's sums.
        let offset = offsets.number(&[row])? as i32;
        transform(&input, &lengths, row, &output, top_k, |i| Ok(offset.wrapping_add(i as i32).into()))?;
    }
    Ok(())
});

fn count(args: &Args<'_>, top_k: usize) -> Result<usize, Raised> {
    let top_k = args.int(top_k)?;
    usize::try_from(top_k).map_err(|_| ("ValueError", format!("top_k is {top_k}, expected no negative number")))
}

/// What a row's largest elements stand for; -1 where there are fewer.
fn transform(
    input: &HostTensor<'_>,
    lengths: &HostTensor<'_>,
    row: usize,
    output: &HostTensor<'_>,
    top_k: usize,
    stands_for: impl Fn(usize) -> Result<f64, Raised>,
) -> Result<(), Raised> {
    output.expect_shape(&[input.size(0)?, top_k])?;
    let length = lengths.index(&[row], input.size(1)? + 1)?;
    // What is all there is comes as it lies, as upstream's.
    let found = if length <= top_k { (0..length).collect() } else { largest(input, row, length, top_k)? };
    for place in 0..top_k {
        let number = found.get(place).map_or(Ok(-1.0), |&i| stands_for(i))?;
        output.set(&[row, place], number)?;
    }
    Ok(())
}

/// The indices of the largest among the first `length` elements of a row, the largest first; of equal ones the first. Numbers are
/// in their total order, as upstream's are by their bits.
fn largest(input: &HostTensor<'_>, row: usize, length: usize, top_k: usize) -> Result<Vec<usize>, Raised> {
    let elements = (0..length).map(|i| input.at(&[row, i])).collect::<Result<Vec<_>, _>>()?;
    let mut order: Vec<usize> = (0..length).collect();
    order.sort_by(|&a, &b| elements[b].total_cmp(&elements[a]));
    order.truncate(top_k);
    Ok(order)
}
