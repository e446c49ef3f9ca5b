"""The same kernels called from Python, one process per arm: `python3 arms.py ARM`, or `python3 arms.py --probe ARM`.

It says `ready`, or `error TEXT` and ends, then answers each line of standard input with one line: a number, `-` where
this arm has no such case, or `error TEXT`.

    host gemma ROWS COLS    ns of host time per launch
    host gdn TOKENS         likewise
    series N ROWS COLS      µs from the first of N gemma_rmsnorm launches until the last is done

The kernels come from the folder FLASHINFER_RS_LIB_DIR. ARMS_PDL=1 turns programmatic dependent launch on; it is off as
in this crate, whereas FlashInfer's own default is on where the device has it.
"""

import gc
import importlib
import os
import statistics
import sys
import tempfile
import time
from itertools import repeat
from pathlib import Path

ARMS = {
    "flashinfer-out": ["torch", "tvm_ffi", "flashinfer"],
    "flashinfer": ["torch", "tvm_ffi", "flashinfer"],
    "tvm-ffi": ["torch", "tvm_ffi"],
    "torch": ["torch"],
}
LIBRARIES = ["norm.so", "gdn_prefill_sm90.so"]
EPS = 1e-6
PDL = os.environ.get("ARMS_PDL") == "1"
BATCHES = 15
FIRST = 5  # of them before, which warm up
Q_HEADS, K_HEADS, V_HEADS, SIZE = 16, 16, 32, 128


def missing(modules):
    """What an arm of these modules lacks, or None."""
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:
            return f"import {module}: {one_line(error)}"
        # Without it tvm_ffi compiles an adapter when it is imported, or goes a slow way without saying so.
        if "tvm_ffi" in modules and not hasattr(sys.modules["torch"].Tensor, "__dlpack_c_exchange_api__"):
            return "a torch that has DLPack's C exchange API, such as 2.11"
    if not sys.modules["torch"].cuda.is_available():
        return "a CUDA GPU that torch can use"
    return None


def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


# The arms. `gemma` and `gdn` take what a launch needs and give the loop that is timed, with the call written out in it:
# a wrapper around each launch would cost a part of what is measured. A loop returns the last launch's output.


class Torch:
    """Not Gemma's kernel: it takes 1 + weight."""

    def gemma(self, out, x, weight):
        rms_norm, shape, scale = torch.nn.functional.rms_norm, weight.shape, 1 + weight

        def loop(launches):
            for _ in repeat(None, launches):
                result = rms_norm(x, shape, scale, EPS)
            return result

        return loop


class TvmFfi:
    """As fast as this binding gets: its own tensors, converted beforehand, and its stream set once."""

    def __init__(self, folder):
        self.folder = folder
        tvm_ffi.use_torch_stream().__enter__()

    def gemma(self, out, x, weight):
        norm = tvm_ffi.load_module(str(self.folder / "norm.so")).gemma_rmsnorm
        came_from(self.folder / "norm.so")
        result = out
        out, x, weight = map(tvm_ffi.from_dlpack, (out, x, weight))

        def loop(launches):
            for _ in repeat(None, launches):
                norm(out, x, weight, EPS, PDL)
            return result

        return loop

    def gdn(self, out, state, q, k, v, offsets, alpha, beta):
        gdn = tvm_ffi.load_module(str(self.folder / "gdn_prefill_sm90.so")).gdn_prefill
        came_from(self.folder / "gdn_prefill_sm90.so")
        result = out
        multiprocessors = torch.cuda.get_device_properties(out.device).multi_processor_count
        workspace = torch.empty(128 * multiprocessors, dtype=torch.uint8, device="cuda")
        tensors = (out, state, q, k, v, offsets, alpha, beta, workspace)
        out, state, q, k, v, offsets, alpha, beta, workspace = map(tvm_ffi.from_dlpack, tensors)

        def loop(launches):
            for _ in repeat(None, launches):
                # No input state; a scale of 0 is 1/√128.
                gdn(out, state, q, k, v, offsets, None, alpha, beta, 0.0, workspace)
            return result

        return loop


class FlashInfer:
    """With outputs allocated by each call."""

    def __init__(self, folder):
        self.folder = folder
        self.cache = prebuilt(folder, LIBRARIES)
        flashinfer.norm.get_norm_module()
        came_from(self.folder / "norm.so")

    def gemma(self, out, x, weight):
        norm = flashinfer.norm.gemma_rmsnorm

        def loop(launches):
            for _ in repeat(None, launches):
                result = norm(x, weight, EPS, enable_pdl=PDL)
            return result

        return loop


class FlashInferOut(FlashInfer):
    """With outputs allocated beforehand."""

    def gemma(self, out, x, weight):
        norm = flashinfer.norm.gemma_rmsnorm

        def loop(launches):
            for _ in repeat(None, launches):
                norm(x, weight, EPS, out=out, enable_pdl=PDL)
            return out

        return loop

    def gdn(self, out, state, q, k, v, offsets, alpha, beta):
        gdn = flashinfer.chunk_gated_delta_rule
        flashinfer.gdn_prefill.get_gdn_prefill_module()
        came_from(self.folder / "gdn_prefill_sm90.so")

        def loop(launches):
            for _ in repeat(None, launches):
                gdn(q, k, v, alpha, beta, cu_seqlens=offsets, output=out, output_state=state)
            return out

        return loop


def prebuilt(folder, libraries):
    """Makes flashinfer find its kernels among these libraries, for as long as what this answers is kept."""
    # It looks for prebuilt ones here, laid out like this, and without JIT it fails where it finds none.
    cache = tempfile.TemporaryDirectory()
    for library in libraries:
        link = Path(cache.name, Path(library).stem, library)
        link.parent.mkdir()
        link.symlink_to(folder / library)
    sys.modules["flashinfer"].jit.env.FLASHINFER_AOT_DIR = Path(cache.name)
    return cache


def libraries():
    """The folder with the kernels."""
    folder = os.environ.get("FLASHINFER_RS_LIB_DIR")
    if not folder:
        raise RuntimeError("FLASHINFER_RS_LIB_DIR is not set")
    return Path(folder).resolve(strict=True)


def came_from(path):
    """Fails unless the library of this name in the process is this very file, and no other."""
    with open("/proc/self/maps") as maps:
        files = {line.rstrip("\n").split(maxsplit=5)[5] for line in maps if line.endswith(f"/{path.name}\n")}
    if files != {str(path)}:
        raise RuntimeError(f"{path.name} should come from {path}, and the process has {sorted(files) or 'none'}")


def start(arm):
    """This arm on a stream of its own, warmed up and checked."""
    torch.cuda.set_stream(torch.cuda.Stream())
    if arm == "torch":
        calls = Torch()
    else:
        folder = libraries()
        if absent := [name for name in LIBRARIES if not (folder / name).is_file()]:
            raise RuntimeError(f"{folder} has no {' and no '.join(absent)}")
        calls = {"flashinfer-out": FlashInferOut, "flashinfer": FlashInfer, "tvm-ffi": TvmFfi}[arm](folder)

    out, x, weight = gemma_tensors(64, 4096)
    result = calls.gemma(out, x, weight)(20).double()
    x, weight = x.double(), weight.double()
    expected = x * torch.rsqrt((x * x).mean(1, keepdim=True) + EPS) * (1 + weight)
    error = float((result - expected).norm() / expected.norm())
    if not error < 0.01:
        raise RuntimeError(f"gemma_rmsnorm's result is off by {error:.1e}")
    return calls


def gemma_tensors(rows, columns):
    x = torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(columns, dtype=torch.bfloat16, device="cuda")
    return torch.zeros_like(x), x, weight


def gdn_tensors(tokens):
    q, k, v = (
        torch.randn(tokens, heads, SIZE, dtype=torch.bfloat16, device="cuda") for heads in (Q_HEADS, K_HEADS, V_HEADS)
    )
    # Keys of length 1 and a decay below 1 keep the state finite.
    k = torch.nn.functional.normalize(k, dim=-1)
    alpha, beta = (torch.randn(tokens, V_HEADS, device="cuda").sigmoid() for _ in range(2))
    state = torch.zeros(1, V_HEADS, SIZE, SIZE, device="cuda")
    offsets = torch.tensor([0, tokens], dtype=torch.int64, device="cuda")
    return torch.zeros_like(v), state, q, k, v, offsets, alpha, beta


def nanoseconds(loop, launches, until_done):
    """The median time of this many launches, of the host alone or until the GPU is done too."""
    stream = torch.cuda.current_stream()
    times = []
    for _ in range(FIRST + BATCHES):
        stream.synchronize()
        gc.disable()
        begin = time.perf_counter_ns()
        loop(launches)
        if until_done:
            stream.synchronize()
        times.append(time.perf_counter_ns() - begin)
        gc.enable()
        stream.synchronize()
    return statistics.median(times[FIRST:])


def answer(calls, request):
    match request:
        case ["host", "gemma", rows, columns]:
            loop = calls.gemma(*gemma_tensors(int(rows), int(columns)))
            return f"{nanoseconds(loop, 200, False) / 200:.1f}"
        case ["host", "gdn", tokens] if hasattr(calls, "gdn"):
            loop = calls.gdn(*gdn_tensors(int(tokens)))
            return f"{nanoseconds(loop, 50, False) / 50:.1f}"
        case ["series", launches, rows, columns]:
            loop = calls.gemma(*gemma_tensors(int(rows), int(columns)))
            return f"{nanoseconds(loop, int(launches), True) / 1e3:.1f}"
    return "-"


def serve(arms, start, answer):
    """`FILE [--probe] ARM`, of arms and the modules that each needs: starts what is asked, or says what it lacks."""
    # Only answers go to standard output, whatever the libraries print.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(line):
        print(line, file=answers, flush=True)

    probe, arm = sys.argv[1:-1] == ["--probe"], sys.argv[-1]
    if arm not in arms or len(sys.argv) != (3 if probe else 2):
        sys.exit(f"usage: {Path(sys.argv[0]).name} [--probe] {'|'.join(arms)}")
    # Read when flashinfer is imported: nothing is compiled, and its log and generated sources go where they vanish.
    scratch = tempfile.TemporaryDirectory()
    os.environ.update(FLASHINFER_DISABLE_JIT="1", FLASHINFER_LOGLEVEL="0", FLASHINFER_WORKSPACE_BASE=scratch.name)
    if probe:
        if lacking := missing(arms[arm]):
            say(f"{arm}: missing: {lacking}")
        return int(lacking is not None)

    try:
        if lacking := missing(arms[arm]):
            raise RuntimeError(f"missing: {lacking}")
        globals().update((module, sys.modules[module]) for module in arms[arm])
        calls = start(arm)
    except Exception as error:
        say(f"error {one_line(error)}")
        return 1
    say("ready")
    for line in sys.stdin:
        try:
            say(answer(calls, line.split()))
        except Exception as error:
            say(f"error {one_line(error)}")
    return 0


if __name__ == "__main__":
    sys.exit(serve(ARMS, start, answer))
