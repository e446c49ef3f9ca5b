//! The norms.

use super::{Args, HostTensor, Raised, SafeCall, function};
use crate::tensor::DType;

pub(super) const FUNCTIONS: &[(&str, SafeCall)] = &[
    ("rmsnorm", rmsnorm),
    ("gemma_rmsnorm", gemma_rmsnorm),
    ("fused_add_rmsnorm", fused_add_rmsnorm),
    ("gemma_fused_add_rmsnorm", gemma_fused_add_rmsnorm),
    ("rmsnorm_quant", rmsnorm_quant),
    ("fused_add_rmsnorm_quant", fused_add_rmsnorm_quant),
    ("layernorm", layernorm),
];

function!(rmsnorm, |args| {
    let [out, input, weight, eps, _pdl] = args.exactly()?;
    let (out, input) = (args.tensor(out)?, args.tensor(input)?);
    norm(&out, &input, &args.tensor(weight)?, 0.0, 1.0, args.float(eps)?)
});

function!(gemma_rmsnorm, |args| {
    let [out, input, weight, eps, _pdl] = args.exactly()?;
    let (out, input) = (args.tensor(out)?, args.tensor(input)?);
    if input.shape.len() != 2 {
        let fault = format!("argument #{} has shape {:?}, expected two dimensions", input.position, input.shape);
        return Err(("ValueError", fault));
    }
    norm(&out, &input, &args.tensor(weight)?, 1.0, 1.0, args.float(eps)?)
});

function!(fused_add_rmsnorm, |args| fused_in_place(args, 0.0));
function!(gemma_fused_add_rmsnorm, |args| fused_in_place(args, 1.0));

function!(rmsnorm_quant, |args| {
    let [out, input, weight, scale, eps, _pdl] = args.exactly()?;
    let (out, input, weight) = (args.tensor(out)?, args.tensor(input)?, args.tensor(weight)?);
    norm(&out, &input, &weight, 0.0, 1.0 / args.float(scale)?, args.float(eps)?)
});

function!(fused_add_rmsnorm_quant, |args| {
    let [out, input, residual, weight, scale, eps, _pdl] = args.exactly()?;
    let (input, residual) = (args.tensor(input)?, args.tensor(residual)?);
    fused(&args.tensor(out)?, &input, &residual, &args.tensor(weight)?, 0.0, 1.0 / args.float(scale)?, args.float(eps)?)
});

function!(layernorm, |args| {
    let [out, input, gamma, beta, eps] = args.exactly()?;
    let (out, input) = (args.tensor(out)?, args.tensor(input)?);
    let (gamma, beta, eps) = (args.tensor(gamma)?, args.tensor(beta)?, args.float(eps)?);
    let (rows, columns) = (input.size(0)?, input.size(1)?);
    for (tensor, shape) in
        [(&out, &[rows, columns][..]), (&input, &[rows, columns]), (&gamma, &[columns]), (&beta, &[columns])]
    {
        tensor.expect_shape(shape)?;
    }
    let (mut weights, mut shifts, mut row) = (vec![0.0; columns], vec![0.0; columns], vec![0.0; columns]);
    gamma.read(&[], &mut weights)?;
    beta.read(&[], &mut shifts)?;
    for i in 0..rows {
        input.read(&[i], &mut row)?;
        let mean = row.iter().sum::<f64>() / columns as f64;
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / columns as f64;
        let factor = 1.0 / (variance + eps).sqrt();
        for ((x, weight), shift) in row.iter_mut().zip(&weights).zip(&shifts) {
            *x = (*x - mean) * factor * weight + shift;
        }
        out.write(&[i], &row)?;
    }
    Ok(())
});

fn fused_in_place(args: &Args<'_>, bias: f64) -> Result<(), Raised> {
    let [input, residual, weight, eps, _pdl] = args.exactly()?;
    let (input, residual) = (args.tensor(input)?, args.tensor(residual)?);
    fused(&input, &input, &residual, &args.tensor(weight)?, bias, 1.0, args.float(eps)?)
}

/// `out ← scale · input / √(mean(input²) + eps) · (bias + weight)` along the last dimension of two or three.
fn norm(
    out: &HostTensor<'_>,
    input: &HostTensor<'_>,
    weight: &HostTensor<'_>,
    bias: f64,
    scale: f64,
    eps: f64,
) -> Result<(), Raised> {
    let shape = (0..input.shape.len()).map(|i| input.size(i)).collect::<Result<Vec<_>, _>>()?;
    let Some((&columns, leading)) = shape.split_last().filter(|(_, leading)| (1..=2).contains(&leading.len())) else {
        return Err((
            "ValueError",
            format!("argument #{} has shape {:?}, expected two or three dimensions", input.position, input.shape),
        ));
    };
    out.expect_shape(&shape)?;
    weight.expect_shape(&[columns])?;
    let mut weights = vec![0.0; columns];
    weight.read(&[], &mut weights)?;
    let mut row = vec![0.0; columns];
    for index in indices(leading) {
        input.read(&index, &mut row)?;
        norm_row(&mut row, &weights, bias, scale, eps);
        clamp(out, &mut row);
        out.write(&index, &row)?;
    }
    Ok(())
}

/// `residual ← input + residual`, and the norm of the sum, before it is rounded, to `out`.
fn fused(
    out: &HostTensor<'_>,
    input: &HostTensor<'_>,
    residual: &HostTensor<'_>,
    weight: &HostTensor<'_>,
    bias: f64,
    scale: f64,
    eps: f64,
) -> Result<(), Raised> {
    let (rows, columns) = (input.size(0)?, input.size(1)?);
    for tensor in [out, input, residual] {
        tensor.expect_shape(&[rows, columns])?;
    }
    weight.expect_shape(&[columns])?;
    let mut weights = vec![0.0; columns];
    weight.read(&[], &mut weights)?;
    let (mut sum, mut addend) = (vec![0.0; columns], vec![0.0; columns]);
    for row in 0..rows {
        input.read(&[row], &mut sum)?;
        residual.read(&[row], &mut addend)?;
        sum.iter_mut().zip(&addend).for_each(|(sum, addend)| *sum += addend);
        residual.write(&[row], &sum)?;
        norm_row(&mut sum, &weights, bias, scale, eps);
        clamp(out, &mut sum);
        out.write(&[row], &sum)?;
    }
    Ok(())
}

/// To what fits F8E4M3, which upstream's norms do for both 8-bit types.
fn clamp(out: &HostTensor<'_>, row: &mut [f64]) {
    if matches!(out.dtype, DType::F8E4M3 | DType::F8E5M2) {
        row.iter_mut().for_each(|x| *x = x.clamp(-448.0, 448.0));
    }
}

fn norm_row(row: &mut [f64], weight: &[f64], bias: f64, scale: f64, eps: f64) {
    let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
    let factor = scale / (mean + eps).sqrt();
    row.iter_mut().zip(weight).for_each(|(x, w)| *x *= factor * (bias + w));
}

/// Every index of one or two leading dimensions.
fn indices(leading: &[usize]) -> impl Iterator<Item = Vec<usize>> + use<> {
    let (first, second) = (leading[0], leading.get(1).copied());
    (0..first).flat_map(move |i| {
        let heads = second.map_or(1, |heads| heads);
        (0..heads).map(move |j| if second.is_some() { vec![i, j] } else { vec![i] })
    })
}
