"""Attention's results beside torch's: `python3 sdpa.py FILE...`.

A file is in safetensors: `q`, `k`, `v` and `o` of `[tokens, heads, size]`, requests one after the other; `lse` of `[rows, heads]`;
`queries` and `keys`, how many each request has; and `facts`, whether a query sees the keys up to its own position alone, and what
products are multiplied by. Each request is computed by scaled_dot_product_attention, on a GPU where torch has one; the logarithms
by logsumexp in 64 bits.
"""

import json
import sys

import torch

TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64}
# A root mean square, relative; of logarithms the largest difference.
TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float16: 3e-3, torch.float32: 1e-5}
LOGARITHMS = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4}


def read(path):
    data = open(path, "rb").read()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            part = bytearray(data[start + begin : start + end])
            tensors[name] = torch.frombuffer(part, dtype=TYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def compare(path):
    tensors = read(path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v, o, lse = (tensors[name].to(device) for name in ("q", "k", "v", "o", "lse"))
    causal, scale = bool(tensors["facts"][0]), float(tensors["facts"][1])
    group = q.shape[1] // k.shape[1]
    difference = size = off = 0.0
    row = key = 0
    for queries, keys in zip(tensors["queries"].tolist(), tensors["keys"].tolist()):
        rows, own = slice(row, row + queries), slice(key, key + keys)
        row, key = row + queries, key + keys
        # Heads ahead of tokens, and each query head with its own keys.
        one = q[rows].transpose(0, 1)
        own_k, own_v = (x[own].transpose(0, 1).repeat_interleave(group, dim=0) for x in (k, v))
        ends = torch.arange(queries, device=device)[:, None] + keys - queries
        seen = torch.arange(keys, device=device)[None] <= ends
        mask = seen if causal else torch.ones_like(seen)
        found = torch.nn.functional.scaled_dot_product_attention(
            one[None], own_k[None], own_v[None], attn_mask=mask[None, None], scale=scale
        )[0]
        expected, ours = found.transpose(0, 1).double(), o[rows].double()
        difference += float((expected - ours).square().sum())
        size += float(expected.square().sum())
        logits = (one.double() @ own_k.double().transpose(1, 2) * scale).masked_fill(~mask, float("-inf"))
        exact = torch.logsumexp(logits, -1).transpose(0, 1) / torch.log(torch.tensor(2.0, dtype=torch.float64))
        off = max(off, float((lse[rows].double() - exact).abs().max()))
    if (row, key) != (q.shape[0], k.shape[0]):
        raise SystemExit(f"{path}: requests of {row} queries and {key} keys, tensors of {q.shape[0]} and {k.shape[0]}")
    error = (difference / size) ** 0.5
    kept = error <= TOLERANCE[q.dtype] and off <= LOGARITHMS[q.dtype]
    print(f"{path}: {'as' if kept else 'NOT as'} torch has it: relative error {error:.1e}, logarithms off by {off:.1e}, on {device}")
    return kept


if __name__ == "__main__":
    files = sys.argv[1:]
    # Not `all` alone, which would end at the first.
    sys.exit(0 if files and all([compare(path) for path in files]) else 1)
