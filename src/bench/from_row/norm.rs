//! The norms.

use super::{AxisOf, Facts, constant, var};

const AXES: &[AxisOf] = &[var("rows", "batch_size"), constant("columns", "hidden_size", "h")];

const fn norm(kernel: &'static str, api: &'static str, reference: &'static [&'static str]) -> Facts {
    Facts { kernel, name: kernel, op_type: "rmsnorm", api, axes: AXES, constraints: &[], reference }
}

pub(super) const FACTS: &[Facts] = &[
    norm("rmsnorm", "flashinfer.norm.rmsnorm", &[RMSNORM]),
    Facts {
        name: "rmsnorm_per_head",
        axes: &[var("tokens", "num_tokens"), constant("heads", "num_heads", "h"), constant("columns", "head_dim", "d")],
        constraints: &["num_tokens * num_heads <= 2147483647"],
        ..norm("rmsnorm of heads", "flashinfer.norm.rmsnorm", &[RMSNORM])
    },
    norm("gemma_rmsnorm", "flashinfer.norm.gemma_rmsnorm", &[GEMMA_RMSNORM]),
    norm("fused_add_rmsnorm", "flashinfer.norm.fused_add_rmsnorm", &[FUSED_ADD_RMSNORM]),
    norm("gemma_fused_add_rmsnorm", "flashinfer.norm.gemma_fused_add_rmsnorm", &[GEMMA_FUSED_ADD_RMSNORM]),
    norm("rmsnorm_quant", "flashinfer.norm.rmsnorm_quant", &[RMSNORM_QUANT]),
    norm("fused_add_rmsnorm_quant", "flashinfer.norm.fused_add_rmsnorm_quant", &[FUSED_ADD_RMSNORM_QUANT]),
    Facts { op_type: "layernorm", ..norm("layernorm", "flashinfer.norm.layernorm", &[LAYERNORM]) },
];

const RMSNORM: &str = r#"def run(input, weight, eps):
    x = input.float()
    x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return (x * weight.float()).to(input.dtype)
"#;

const GEMMA_RMSNORM: &str = r#"def run(input, weight, eps):
    x = input.float()
    x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return (x * (1 + weight.float())).to(input.dtype)
"#;

const FUSED_ADD_RMSNORM: &str = r#"def run(input, residual, weight, eps):
    total = input.float() + residual.float()
    x = total * torch.rsqrt(total.square().mean(dim=-1, keepdim=True) + eps)
    return (x * weight.float()).to(input.dtype), total.to(residual.dtype)
"#;

const GEMMA_FUSED_ADD_RMSNORM: &str = r#"def run(input, residual, weight, eps):
    total = input.float() + residual.float()
    x = total * torch.rsqrt(total.square().mean(dim=-1, keepdim=True) + eps)
    return (x * (1 + weight.float())).to(input.dtype), total.to(residual.dtype)
"#;

const RMSNORM_QUANT: &str = r#"def run(input, weight, scale, eps):
    x = input.float()
    x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return (x * weight.float() / scale).clamp(-448, 448).to(DTYPE_out)
"#;

const FUSED_ADD_RMSNORM_QUANT: &str = r#"def run(input, residual, weight, scale, eps):
    total = input.float() + residual.float()
    x = total * torch.rsqrt(total.square().mean(dim=-1, keepdim=True) + eps)
    out = (x * weight.float() / scale).clamp(-448, 448).to(DTYPE_out)
    return out, total.to(residual.dtype)
"#;

const LAYERNORM: &str = r#"def run(input, gamma, beta, eps):
    x = input.float()
    x = x - x.mean(dim=-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return (x * gamma + beta).to(input.dtype)
"#;
