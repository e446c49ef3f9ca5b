//! Packing bits.

use super::{Args, HostTensor, Raised, SafeCall, function};

pub(super) const FUNCTIONS: &[(&str, SafeCall)] = &[("packbits", packbits), ("segment_packbits", segment_packbits)];

function!(packbits, |args| {
    let [x, bitorder, y] = args.exactly()?;
    let (x, little, y) = (args.tensor(x)?, is_little(args, bitorder)?, args.tensor(y)?);
    let elements = x.size(0)?;
    y.expect_shape(&[elements.div_ceil(8)])?;
    pack(&x, (0, elements), &y, 0, little)
});

function!(segment_packbits, |args| {
    let [x, input_indptr, output_indptr, bitorder, y] = args.exactly()?;
    let (x, little, y) = (args.tensor(x)?, is_little(args, bitorder)?, args.tensor(y)?);
    let (input_indptr, output_indptr) = (args.tensor(input_indptr)?, args.tensor(output_indptr)?);
    output_indptr.expect_shape(&[input_indptr.size(0)?])?;
    for segment in 1..input_indptr.size(0)? {
        let start = |i: usize| input_indptr.index(&[i], x.size(0)? + 1);
        let byte = output_indptr.index(&[segment - 1], y.size(0)? + 1)?;
        pack(&x, (start(segment - 1)?, start(segment)?), &y, byte, little)?;
    }
    Ok(())
});

fn is_little(args: &Args<'_>, bitorder: usize) -> Result<bool, Raised> {
    match args.word(bitorder)?.to_bytes() {
        b"big" => Ok(false),
        b"little" => Ok(true),
        _ => Err(("ValueError", "bitorder must be 'big' or 'little'".to_owned())),
    }
}

/// Packs elements into bytes from this one on.
fn pack(
    x: &HostTensor<'_>,
    (start, end): (usize, usize),
    y: &HostTensor<'_>,
    byte: usize,
    little: bool,
) -> Result<(), Raised> {
    for (i, first) in (start..end).step_by(8).enumerate() {
        let mut bits = 0u8;
        for (place, element) in (first..end.min(first + 8)).enumerate() {
            let bit = u8::from(x.number(&[element])? != 0.0);
            bits |= bit << if little { place } else { 7 - place };
        }
        y.set(&[byte + i], f64::from(bits))?;
    }
    Ok(())
}
