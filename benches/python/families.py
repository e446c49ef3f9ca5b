"""Every family beside its peers in Python, one process per arm: `python3 families.py [--probe] ARM`.

    flashinfer       FlashInfer's own functions, over the very libraries that the other arms load
    torch            torch's own expression of the same
    torch-compile    that under torch.compile: one graph without breaks, or the case fails

The requests are those of benches/c/families.c, which has the same sizes; `sum` is torch's sum of rows that are read once.
Before an arm's case is measured, what it computes is compared with what torch's expression does.
"""

import contextlib
import functools
import os
import statistics
import sys
from itertools import repeat

import arms

ARMS = {"flashinfer": ["torch", "tvm_ffi", "flashinfer"], "torch": ["torch"], "torch-compile": ["torch"]}
DEVICE = "cuda"
TIMINGS = 5
TIMED_NS = 10e6
Q_HEADS, KV_HEADS, HEAD, POSITIONS, PAGE_SIZE, REQUESTS = 32, 8, 128, 8192, 16, 32
TOP_K, TOP_P = 50, 0.9


# The cases. Each is made of its numbers, and has the tensors of a call (`make`), torch's expression of them (`torch`),
# FlashInfer's call with them, as something that takes no more arguments (`flashinfer`), and what tells whether a call was right
# (`found`), from what it answered and its tensors.


class Case:
    # Where FlashInfer's kernel is; None where there is none.
    library = None
    # How far what is computed may be off, relatively, as a root mean square.
    tolerance = 0.02

    def found(self, answer, *tensors):
        return [answer]


class SiluAndMul(Case):
    library = "silu_and_mul.so"

    def __init__(self, rows, d):
        self.rows, self.d = rows, d

    def make(self):
        x = torch.randn(self.rows, 2 * self.d, dtype=torch.bfloat16, device=DEVICE)
        return torch.empty_like(x[:, : self.d], memory_format=torch.contiguous_format), x

    def torch(self, out, x):
        return torch.nn.functional.silu(x[:, : self.d]) * x[:, self.d :]

    def flashinfer(self, out, x):
        return functools.partial(flashinfer.silu_and_mul, x, out=out, enable_pdl=False)


def turned(x, table, positions):
    """Heads, turned in halves, in single precision as the kernel does."""
    cos, sin = table[positions].unsqueeze(1).chunk(2, dim=-1)
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class OfTokens(Case):
    """What the cases of tokens share: where they are, and where they go."""

    def __init__(self, tokens):
        each = tokens // REQUESTS
        if each * REQUESTS != tokens:
            raise ValueError(f"{tokens} tokens are not some for each of {REQUESTS} requests")
        self.tokens, self.pages = tokens, REQUESTS * -(-each // PAGE_SIZE)
        ints = functools.partial(torch.arange, device=DEVICE)
        self.positions = ints(tokens) * 257 % POSITIONS
        frequencies = 5e5 ** -(ints(0, HEAD, 2, dtype=torch.float64) / HEAD)
        angles = ints(POSITIONS, dtype=torch.float64)[:, None] * frequencies
        self.table = torch.cat((angles.cos(), angles.sin()), dim=-1).float()
        # Of torch's: a token's entry in a cache whose pages lie one after the other. FlashInfer finds it by the page table.
        requests, within = ints(tokens) // each, ints(tokens) % each
        self.slots = requests * (self.pages // REQUESTS * PAGE_SIZE) + within
        self.pos_ids, self.batch_indices, self.within = (x.int() for x in (self.positions, requests, within))
        self.kv_indices = ints(self.pages, dtype=torch.int32)
        self.kv_indptr = ints(REQUESTS + 1, dtype=torch.int32) * (self.pages // REQUESTS)
        last = (each - 1) % PAGE_SIZE + 1
        self.kv_last_page_len = torch.full((REQUESTS,), last, dtype=torch.int32, device=DEVICE)

    def heads(self, count):
        return torch.randn(self.tokens, count, HEAD, dtype=torch.bfloat16, device=DEVICE)

    def cache(self, dtype):
        return torch.zeros(self.pages, PAGE_SIZE, KV_HEADS, HEAD, device=DEVICE).to(dtype)


class Rope(OfTokens):
    library = "rope.so"

    def make(self):
        return self.heads(Q_HEADS), self.heads(KV_HEADS)

    def torch(self, q, k):
        q.copy_(turned(q, self.table, self.positions))
        k.copy_(turned(k, self.table, self.positions))

    def flashinfer(self, q, k):
        # Heads lie side by side, as in vLLM.
        rope, flat = flashinfer.apply_rope_with_cos_sin_cache_inplace, (q.flatten(1), k.flatten(1))
        return functools.partial(rope, self.pos_ids, *flat, HEAD, self.table, True)

    def found(self, answer, q, k):
        return [q, k]


class Append(OfTokens):
    library = "page.so"

    def make(self):
        return self.heads(KV_HEADS), self.heads(KV_HEADS), self.cache(torch.bfloat16), self.cache(torch.bfloat16)

    def torch(self, key, value, k_cache, v_cache):
        k_cache.flatten(0, 1).index_copy_(0, self.slots, key)
        v_cache.flatten(0, 1).index_copy_(0, self.slots, value)

    def flashinfer(self, key, value, k_cache, v_cache):
        steering = (self.kv_indices, self.kv_indptr, self.kv_last_page_len)
        arguments = (key, value, self.batch_indices, self.within, (k_cache, v_cache), *steering)
        return functools.partial(flashinfer.append_paged_kv_cache, *arguments)

    def found(self, answer, key, value, k_cache, v_cache):
        return [k_cache, v_cache]


class RopeAppend(OfTokens):
    library = "rope.so"

    def make(self):
        q, k, v = self.heads(Q_HEADS), self.heads(KV_HEADS), self.heads(KV_HEADS)
        eight = torch.float8_e4m3fn
        return q, k, v, torch.empty_like(q, dtype=eight), self.cache(eight), self.cache(eight)

    def torch(self, q, k, v, q_out, k_cache, v_cache):
        # Bytes are moved, since torch has no index_copy_ of 8-bit numbers.
        for cache, heads in ((k_cache, turned(k, self.table, self.positions)), (v_cache, v)):
            appended = heads.to(torch.float8_e4m3fn).view(torch.uint8)
            cache.view(torch.uint8).flatten(0, 1).index_copy_(0, self.slots, appended)
        q_out.copy_(turned(q, self.table, self.positions))

    def flashinfer(self, q, k, v, q_out, k_cache, v_cache):
        arguments = (q, k, None, None, v, self.table, self.pos_ids, (k_cache, v_cache))
        steering = (self.kv_indices, self.kv_indptr, self.batch_indices, self.within)
        append = flashinfer.rope.rope_quantize_fp8_append_paged_kv_cache
        return functools.partial(append, *arguments, *steering, page_size=PAGE_SIZE, q_rope_out=q_out)

    def found(self, answer, q, k, v, q_out, k_cache, v_cache):
        return [q_out, k_cache, v_cache]


class Packbits(Case):
    library, tolerance = "quantization.so", 0

    def __init__(self, elements):
        self.elements = elements
        self.weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=DEVICE)

    def make(self):
        return (torch.rand(self.elements, device=DEVICE) < 0.5,)

    def torch(self, x):
        return (x.view(-1, 8) * self.weights).sum(-1, dtype=torch.uint8)

    def flashinfer(self, x):
        return functools.partial(flashinfer.packbits, x)


class OfRows(Case):
    def __init__(self, rows, length):
        self.rows, self.length = rows, length

    def make(self):
        return (torch.randn(self.rows, self.length, device=DEVICE),)


class Softmax(OfRows):
    library = "sampling.so"

    def torch(self, logits):
        return torch.softmax(logits, -1)

    def flashinfer(self, logits):
        return functools.partial(flashinfer.softmax, logits, enable_pdl=False)


class Sample(OfRows):
    library = "sampling.so"

    def make(self):
        # As steep as in families.c.
        weights = torch.rand(self.rows, self.length, dtype=torch.float64, device=DEVICE) ** 8192 + 1e-9
        return ((weights / weights.sum(-1, keepdim=True)).float(),)

    def torch(self, probs):
        # A sort of the few likeliest, not of all, and what `multinomial` does for one draw, without its checks.
        probs, tokens = probs.topk(TOP_K, dim=-1)
        probs = torch.where(probs.cumsum(-1) - probs < TOP_P, probs, 0)
        drawn = (probs / torch.empty_like(probs).exponential_()).argmax(-1, keepdim=True)
        return tokens.gather(-1, drawn).squeeze(-1)

    def flashinfer(self, probs):
        sample = flashinfer.sampling.top_k_top_p_sampling_from_probs
        return functools.partial(sample, probs, TOP_K, TOP_P, filter_apply_order="joint", seed=42, offset=0)

    def found(self, answer, probs):
        """That every token is one of those that may be drawn."""
        likeliest, _ = probs.topk(TOP_K, dim=-1)
        least = torch.where(likeliest.cumsum(-1) - likeliest < TOP_P, likeliest, 1).amin(-1)
        return [probs.gather(-1, answer.long().unsqueeze(-1)).squeeze(-1) >= least]


class Sum(OfRows):
    def torch(self, rows):
        return rows.sum(-1)


class Topk(OfRows):
    library = "topk.so"

    def __init__(self, rows, length, k):
        super().__init__(rows, length)
        self.k = k

    def torch(self, rows):
        return rows.topk(self.k, sorted=False)

    def flashinfer(self, rows):
        return functools.partial(flashinfer.top_k, rows, self.k)

    def found(self, answer, rows):
        values, indices = answer
        return [values.sort(-1).values, rows.gather(-1, indices).sort(-1).values]


CASES = {
    "silu_and_mul": SiluAndMul,
    "rope": Rope,
    "append": Append,
    "rope_append": RopeAppend,
    "packbits": Packbits,
    "softmax": Softmax,
    "sample": Sample,
    "sum": Sum,
    "topk": Topk,
}


# Where xtask keeps this process.
OWN_CORES = os.sched_getaffinity(0)


@contextlib.contextmanager
def every_core():
    """Importing and compiling is not what is measured: on as many cores as there are."""
    os.sched_setaffinity(0, range(os.cpu_count()))
    try:
        yield
    finally:
        os.sched_setaffinity(0, OWN_CORES)


class Arm:
    def __init__(self, name):
        self.name, self.cases = name, {}
        torch.cuda.set_stream(torch.cuda.Stream())
        if name == "flashinfer":
            self.folder = arms.libraries()
            kernels = {case.library for case in CASES.values() if case.library}
            self.cache = arms.prebuilt(self.folder, [name for name in kernels if (self.folder / name).is_file()])

    def case(self, name, numbers):
        """The case and how it is called, compiled and checked the first time."""
        key = (name, *numbers)
        if key not in self.cases:
            with every_core():
                try:
                    case = CASES[name](*numbers)
                    self.cases[key] = (case, self.checked(case))
                except Exception as error:
                    # For its other times too.
                    self.cases[key] = error
        if isinstance(self.cases[key], Exception):
            raise self.cases[key]
        return self.cases[key]

    def checked(self, case):
        """Answers what makes calls of tensors."""
        expression = case.torch
        if self.name == "torch-compile":
            expression = torch.compile(case.torch, fullgraph=True, dynamic=False)

        def make(*tensors):
            return functools.partial(expression, *tensors)

        if self.name == "flashinfer":
            make = case.flashinfer
        tensors = case.make()
        copies = [tensor.clone() for tensor in tensors]
        found = case.found(make(*tensors)(), *tensors)
        expected = case.found(case.torch(*copies), *copies)
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            one, other = one.double(), other.double()
            error = float((one - other).norm() / other.norm())
            if not error <= case.tolerance:
                raise RuntimeError(f"result {i} is off by {error:.1e} from torch's")
        if self.name == "flashinfer":
            arms.came_from(self.folder / case.library)
        return make


def host_ns(call, batch):
    def loop(launches):
        for _ in repeat(None, launches):
            call()

    return arms.nanoseconds(loop, batch, False) / batch


def gpu_ns(calls, rounds):
    """GPU time per call of a graph that has each so often, replayed."""
    # What is allocated takes turns as the tensors do: a result is freed where its successor is there.
    results = [None] * len(calls)
    graph = torch.cuda.CUDAGraph()
    calls[0]()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for i, call in enumerate(calls):
                results[i] = call()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times, replays = [], 1
    for timing in range(TIMINGS + 1):
        torch.cuda.synchronize()
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        ns = 1e6 * start.elapsed_time(end)
        # The first timing says how many replays the others take.
        if timing > 0:
            times.append(ns / (replays * rounds * len(calls)))
        elif ns > 0:
            replays = 1 + int(TIMED_NS / ns)
    return statistics.median(times)


def answer(arm, request):
    how, name, *numbers = request
    numbers = [int(number) for number in numbers]
    if name not in CASES or (arm.name == "flashinfer" and CASES[name].library is None):
        return "-"
    try:
        if how == "host":
            *numbers, batch = numbers
            case, make = arm.case(name, numbers)
            return f"{host_ns(make(*case.make()), batch):.1f}"
        *numbers, sets, rounds = numbers
        case, make = arm.case(name, numbers)
        return f"{gpu_ns([make(*case.make()) for _ in range(sets)], rounds):.1f}"
    finally:
        # For the other arms.
        torch.cuda.empty_cache()


def start(name):
    globals().update((module, sys.modules[module]) for module in ARMS[name])
    arm = Arm(name)
    os.sched_setaffinity(0, OWN_CORES)
    return arm


if __name__ == "__main__":
    # Of kernels of this size one at a time is fast enough, and leaves no processes behind.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    # Until it is ready.
    os.sched_setaffinity(0, range(os.cpu_count()))
    sys.exit(arms.serve(ARMS, start, answer))
