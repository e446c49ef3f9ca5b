//! Gated activations.

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_PI, FRAC_2_SQRT_PI};

use super::{Args, Raised, SafeCall, function};

pub(super) const FUNCTIONS: &[(&str, SafeCall)] =
    &[("silu_and_mul", silu_and_mul), ("gelu_and_mul", gelu_and_mul), ("gelu_tanh_and_mul", gelu_tanh_and_mul)];

function!(silu_and_mul, |args| and_mul(args, |x| x / (1.0 + (-x).exp())));

function!(gelu_and_mul, |args| and_mul(args, |x| x * 0.5 * (1.0 + erf(x * FRAC_1_SQRT_2))));

function!(gelu_tanh_and_mul, |args| {
    and_mul(args, |x| x * 0.5 * (1.0 + (FRAC_2_PI.sqrt() * (x + 0.044715 * x * x * x)).tanh()))
});

fn and_mul(args: &Args<'_>, act: impl Fn(f64) -> f64) -> Result<(), Raised> {
    let [out, input, pdl] = args.exactly()?;
    let (out, input, _) = (args.tensor(out)?, args.tensor(input)?, args.bool(pdl)?);
    let (tokens, d) = (out.size(0)?, out.size(1)?);
    input.expect_shape(&[tokens, 2 * d])?;
    let (mut token, mut gated) = (vec![0.0; 2 * d], vec![0.0; d]);
    for i in 0..tokens {
        input.read(&[i], &mut token)?;
        let (x, gate) = token.split_at(d);
        gated.iter_mut().zip(x).zip(gate).for_each(|((gated, &x), gate)| *gated = act(x) * gate);
        out.write(&[i], &gated)?;
    }
    Ok(())
}

/// The error function: a series of terms of one sign, so that nothing cancels.
fn erf(x: f64) -> f64 {
    // NaN goes through the series.
    if x.abs() > 6.0 {
        return x.signum();
    }
    let (mut term, mut sum, mut n) = (x, x, 0.0);
    while term.abs() > sum.abs() * 1e-17 {
        n += 1.0;
        term *= 2.0 * x * x / (2.0 * n + 1.0);
        sum += term;
    }
    FRAC_2_SQRT_PI * (-x * x).exp() * sum
}
