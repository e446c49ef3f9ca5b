//! The gated activations.

use super::{AxisOf, Facts, constant, var};

const AXES: &[AxisOf] = &[var("tokens", "num_tokens"), constant("d", "hidden_size", "h")];

const fn gated(kernel: &'static str, api: &'static str, reference: &'static [&'static str]) -> Facts {
    Facts { kernel, name: kernel, op_type: "activation", api, axes: AXES, constraints: &[], reference }
}

pub(super) const FACTS: &[Facts] = &[
    gated("silu_and_mul", "flashinfer.activation.silu_and_mul", &[SILU]),
    gated("gelu_and_mul", "flashinfer.activation.gelu_and_mul", &[GELU]),
    gated("gelu_tanh_and_mul", "flashinfer.activation.gelu_tanh_and_mul", &[GELU_TANH]),
];

const SILU: &str = r#"def run(input):
    x, gate = input.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(x) * gate).to(input.dtype)
"#;

const GELU: &str = r#"def run(input):
    x, gate = input.float().chunk(2, dim=-1)
    return (torch.nn.functional.gelu(x) * gate).to(input.dtype)
"#;

const GELU_TANH: &str = r#"def run(input):
    x, gate = input.float().chunk(2, dim=-1)
    return (torch.nn.functional.gelu(x, approximate="tanh") * gate).to(input.dtype)
"#;
