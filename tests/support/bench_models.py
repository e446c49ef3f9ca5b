"""Upstream's models, for tests/bench_upstream.rs: one request on stdin, one answer on stdout, both JSON.

Only the models are imported: the package itself wants PyTorch and a GPU, which they do not.
"""

import ast
import ctypes
import json
import sys
import tempfile
import types
from pathlib import Path
from unittest.mock import MagicMock

ROOT = Path(sys.argv[1])


class Absent(types.ModuleType):
    """A module that the models name and do not use here."""

    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


def package(name):
    module = types.ModuleType(name)
    module.__path__ = [str(ROOT.joinpath(*name.split(".")))]
    sys.modules[name] = module


sys.path.insert(0, str(ROOT))
from safetensors import TensorSpec, deserialize, serialize

package("flashinfer_bench")
package("flashinfer_bench.apply")
for name in ["torch", "safetensors", "safetensors.torch", "flashinfer_bench.compile"]:
    sys.modules[name] = Absent(name)

from flashinfer_bench.apply.table import ApplyTable
from flashinfer_bench.data import Definition, Solution, Trace, TraceSet, append_jsonl_file, load_jsonl_file, save_json_file

MODELS = {"definition": Definition, "solution": Solution, "trace": Trace}


def again(kind, text):
    """What the model writes of what it read."""
    model = MODELS[kind].model_validate_json(text)
    if kind == "trace":
        return model.model_dump_json()
    return model.model_dump_json(indent=2, exclude_unset=True)


def accepts(kind, text):
    try:
        MODELS[kind].model_validate_json(text)
    except Exception as error:
        return str(error)
    return None


def written(kind, text):
    """The file that upstream writes of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        model = MODELS[kind].model_validate_json(text)
        if kind == "trace":
            append_jsonl_file([model, model], path)
            assert len(load_jsonl_file(Trace, path)) == 2
        else:
            save_json_file(model, path)
        return path.read_text(encoding="utf-8")


def interface(text):
    """What a definition takes, what its reference's `run` takes, and the shapes of its inputs and outputs for axes of 3."""
    definition = Definition.model_validate_json(text)
    functions = [node for node in ast.parse(definition.reference).body if isinstance(node, ast.FunctionDef)]
    run = next(function for function in functions if function.name == "run")
    axes = {name: 3 for name in definition.var_axes}
    return {
        "inputs": list(definition.inputs),
        "run": [argument.arg for argument in run.args.args],
        "shapes": definition.get_input_shapes(axes) + definition.get_output_shapes(axes),
    }


def dataset(root):
    traces = TraceSet.from_path(root)
    return {
        "definitions": sorted(traces.definitions),
        "solutions": sorted(s.name for group in traces.solutions.values() for s in group),
        "workloads": sum(map(len, traces.workloads.values())),
        "traces": sum(map(len, traces.traces.values())),
    }


def best(root, definition, axes, atol, rtol):
    traces = TraceSet.from_path(root)
    trace = traces.get_best_trace(definition, axes, atol, rtol)
    winners, ranked = ApplyTable._sweep_def(traces, definition, atol, rtol)
    return {
        "trace": trace.solution if trace else None,
        "winners": [[dict(key.axes), trace.solution] for key, trace in winners.items()],
        "best": ranked[0][0] if ranked else None,
    }


def tensors(path):
    """What a safetensors file holds, by upstream's library."""
    found = deserialize(Path(path).read_bytes())
    return [[name, data["dtype"], data["shape"], list(data["data"])] for name, data in found]


def store(path, dtype, shape, data):
    memory = ctypes.create_string_buffer(bytes(data), len(data))
    spec = TensorSpec(dtype=dtype, shape=shape, data_ptr=ctypes.addressof(memory), data_len=len(data))
    Path(path).write_bytes(serialize({"t": spec}, {"made": "upstream"}))


REQUESTS = {
    "again": again,
    "accepts": accepts,
    "written": written,
    "hash": lambda text: Solution.model_validate_json(text).hash(),
    "interface": interface,
    "dataset": dataset,
    "best": best,
    "tensors": tensors,
    "store": store,
}

json.dump([REQUESTS[name](*arguments) for name, *arguments in json.load(sys.stdin)], sys.stdout)
