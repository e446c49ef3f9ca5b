//! Products with a weight.

use super::{Args, Raised, SafeCall, function};

pub(super) const FUNCTIONS: &[(&str, SafeCall)] = &[("matmul", matmul), ("matmul_add", matmul_add)];

function!(matmul, |args| product(args, false));
function!(matmul_add, |args| product(args, true));

fn product(args: &Args<'_>, residual: bool) -> Result<(), Raised> {
    let [x, weight, bias, out, _workspace] = args.exactly()?;
    let (x, weight, bias, out) = (args.tensor(x)?, args.tensor(weight)?, args.optional(bias)?, args.tensor(out)?);
    let (rows, inner, columns) = (x.size(0)?, x.size(1)?, weight.size(0)?);
    weight.expect_shape(&[columns, inner])?;
    out.expect_shape(&[rows, columns])?;
    let mut values = vec![0.0; rows * inner];
    for (i, row) in values.chunks_exact_mut(inner).enumerate() {
        x.read(&[i], row)?;
    }
    let mut w = vec![0.0; inner];
    for column in 0..columns {
        weight.read(&[column], &mut w)?;
        let bias = bias.as_ref().map_or(Ok(0.0), |bias| bias.at(&[column]))?;
        for (i, row) in values.chunks_exact(inner).enumerate() {
            let kept = if residual { out.at(&[i, column])? } else { 0.0 };
            let dot: f64 = row.iter().zip(&w).map(|(x, w)| x * w).sum();
            out.set(&[i, column], dot + bias + kept)?;
        }
    }
    Ok(())
}
