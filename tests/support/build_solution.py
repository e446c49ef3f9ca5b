"""Builds a solution by FlashInfer-Bench's own builder, for tests/interop.rs, and says where the library is.

The builder's part of the package is imported alone: the whole wants PyTorch and a GPU, which building for the host does not.
"""

import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

ROOT, DEFINITION, SOLUTION = map(Path, sys.argv[1:])


class Absent(types.ModuleType):
    """A module that is named and not used here."""

    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


def package(name):
    """A package without what its own file imports."""
    module = types.ModuleType(name)
    module.__path__ = [str(ROOT.joinpath(*name.split(".")))]
    sys.modules[name] = module


for name in ["flashinfer_bench", "flashinfer_bench.compile", "flashinfer_bench.compile.builders"]:
    package(name)
# After TVM-FFI, which makes use of PyTorch where it finds it.
import tvm_ffi.cpp

for name in ["torch", "safetensors", "safetensors.torch"]:
    sys.modules[name] = Absent(name)

from flashinfer_bench.compile.builders.tvm_ffi_builder import TVMFFIBuilder
from flashinfer_bench.data import Definition, Solution

definition = Definition.model_validate_json(DEFINITION.read_text())
solution = Solution.model_validate_json(SOLUTION.read_text())
builder = TVMFFIBuilder()
assert builder.can_build(solution)
runnable = builder.build(definition, solution)
print(runnable.metadata.misc["binary"])
