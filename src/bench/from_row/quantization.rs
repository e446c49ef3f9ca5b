//! Packing bits.

use super::{Facts, var};

const PACKBITS: Facts = Facts {
    kernel: "packbits",
    name: "packbits",
    op_type: "quantization",
    api: "flashinfer.quantization.packbits",
    axes: &[var("elements", "num_elements")],
    constraints: &[],
    reference: &[PACK, WHOLE],
};

pub(super) const FACTS: &[Facts] = &[
    PACKBITS,
    Facts {
        kernel: "segment_packbits",
        name: "segment_packbits",
        api: "flashinfer.quantization.segment_packbits",
        axes: &[var("elements", "num_elements"), var("segments", "num_segments"), var("bytes", "num_bytes")],
        constraints: &["num_segments_plus_1 > 1"],
        reference: &[PACK, SEGMENTS],
        ..PACKBITS
    },
];

const PACK: &str = r#"def pack(x):
    weights = [1 << place for place in range(8)]
    if WORD_bitorder == "big":
        weights.reverse()
    bits = torch.nn.functional.pad(x.bool().int(), (0, -x.shape[0] % 8)).view(-1, 8)
    return (bits * torch.tensor(weights, device=x.device)).sum(dim=1).to(torch.uint8).view(torch.int8)
"#;

const WHOLE: &str = r#"def run(x):
    return pack(x)
"#;

const SEGMENTS: &str = r#"def run(x, input_indptr, output_indptr):
    y = torch.zeros(int(output_indptr[-1]), dtype=torch.int8, device=x.device)
    for i in range(input_indptr.shape[0] - 1):
        packed = pack(x[int(input_indptr[i]) : int(input_indptr[i + 1])])
        y[int(output_indptr[i]) : int(output_indptr[i]) + packed.shape[0]] = packed
    return y
"#;
