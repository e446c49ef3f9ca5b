"""Attention beside its peers in Python, one process per arm: `python3 attention.py [--probe] ARM`.

    flashinfer    FlashInfer's own wrappers, over the very modules that the other arms load
    torch         torch's scaled_dot_product_attention, over keys and values without pages
    torch-flex    torch's flex_attention under torch.compile, likewise

The requests are those of benches/c/attention.c, which has the same sizes. What an arm computes is compared with torch's
scaled_dot_product_attention before it is measured, where that fits into memory beside it.
"""

import gc
import os
import statistics
import sys
import time

import arms

ARMS = {"flashinfer": ["torch", "tvm_ffi", "flashinfer"], "torch": ["torch"], "torch-flex": ["torch"]}
DEVICE = "cuda"
Q_HEADS, KV_HEADS, HEAD, PAGE_SIZE = 32, 8, 128, 16
TIMINGS = 5
# Host times are of so many batches, or what there is time for.
BATCHES, SECONDS = 20, 0.15
AHEAD_BYTES = 512 << 20
LARGE_BYTES = 9 << 30
# Below this relative error, as a root mean square, and for caches up to this size.
TOLERANCE, CHECKED_BYTES = 0.02, 1 << 30
NAME = (
    "with_kv_cache_dtype_q_bf16_dtype_kv_bf16_dtype_o_bf16_dtype_idx_i32_head_dim_qk_128_head_dim_vo_128_posenc_0_"
    "use_swa_False_use_logits_cap_False"
)
LIBRARIES = {
    "cores": f"batch_decode_{NAME}.so",
    "fa2": f"batch_prefill_{NAME}_f16qk_False.so",
    "fa3": f"batch_prefill_{NAME}_f16qk_False_sm90.so",
}


class Case:
    """The tensors of a case: for each layer keys and values, as [requests, tokens, heads, size] and as pages of the same memory."""

    def __init__(self, kind, requests, length, layers):
        self.kind, self.requests, self.length = kind, requests, length
        self.queries = 1 if kind == "decode" else length
        self.rows = requests * self.queries
        if kind != "ragged" and length % PAGE_SIZE:
            raise ValueError(f"{length} keys are no whole pages of {PAGE_SIZE}")
        self.q = self.noise(self.rows, Q_HEADS)
        self.layers = [tuple(self.noise(requests * length, KV_HEADS) for _ in range(2)) for _ in range(layers)]
        self.bytes = sum(x.nbytes for layer in self.layers for x in layer)

    def noise(self, tokens, heads):
        return torch.empty(tokens, heads, HEAD, dtype=torch.bfloat16, device=DEVICE).uniform_(-1.7, 1.7)

    def pages(self, layer):
        return tuple(x.view(-1, PAGE_SIZE, KV_HEADS, HEAD) for x in layer)

    def dense(self, x):
        """As torch's functions take it: heads before tokens."""
        return x.view(self.requests, -1, x.shape[-2], HEAD).transpose(1, 2)


def sdpa(case, layer):
    k, v = map(case.dense, layer)
    return torch.nn.functional.scaled_dot_product_attention(
        case.dense(case.q), k, v, is_causal=case.kind != "decode", enable_gqa=True
    )


class Torch:
    """Keys and values lie as heads of tokens, which is how it is fastest."""

    def __init__(self, case, backend):
        k_v = [tuple(case.dense(x).contiguous() for x in layer) for layer in case.layers]
        q = case.dense(case.q).contiguous()
        # One copy of what is large.
        case.layers = []
        attention, causal = torch.nn.functional.scaled_dot_product_attention, case.kind != "decode"
        self.runs = [lambda k=k, v=v: attention(q, k, v, is_causal=causal, enable_gqa=True) for k, v in k_v]


class Flex:
    compiled = None

    def __init__(self, case, backend):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if case.kind == "decode":
            raise ValueError("measured for queries as many as keys alone")
        if Flex.compiled is None:
            os.sched_setaffinity(0, range(os.cpu_count()))
            Flex.compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
        length = case.length
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=DEVICE)
        q, flex = case.dense(case.q).contiguous(), Flex.compiled
        k_v = [tuple(case.dense(x).contiguous() for x in layer) for layer in case.layers]
        self.runs = [lambda k=k, v=v: flex(q, k, v, block_mask=mask, enable_gqa=True) for k, v in k_v]
        self.runs[0]()
        torch.cuda.synchronize()
        os.sched_setaffinity(0, OWN_CORES)


class FlashInfer:
    workspace = None

    def __init__(self, case, backend):
        if FlashInfer.workspace is None:
            FlashInfer.workspace = torch.zeros(768 << 20, dtype=torch.uint8, device=DEVICE)
        requests, queries = case.requests, case.queries
        out = torch.empty_like(case.q)
        ints = lambda values: torch.tensor(list(values), dtype=torch.int32, device=DEVICE)
        qo_indptr = ints(range(0, case.rows + 1, queries))
        each = case.length // PAGE_SIZE
        indptr, last = ints(range(0, requests * each + 1, each)), ints([PAGE_SIZE] * requests)
        indices = torch.arange(requests * each, dtype=torch.int32, device=DEVICE)
        types = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
        if case.kind == "ragged":
            wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(self.workspace, "NHD", backend=backend)
            kv_indptr = ints(range(0, requests * case.length + 1, case.length))
            self.plan = lambda: wrapper.plan(qo_indptr, kv_indptr, Q_HEADS, KV_HEADS, HEAD, causal=True, **types)
            self.runs = [lambda k=k, v=v: wrapper.run(case.q, k, v, out=out) for k, v in case.layers]
        elif case.kind == "paged":
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(self.workspace, "NHD", backend=backend)
            self.plan = lambda: wrapper.plan(
                qo_indptr, indptr, indices, last, Q_HEADS, KV_HEADS, HEAD, PAGE_SIZE, causal=True, **types
            )
            self.runs = [lambda cache=case.pages(x): wrapper.run(case.q, cache, out=out) for x in case.layers]
        else:
            how = {"use_tensor_cores": False} if backend == "cores" else {"use_tensor_cores": True, "backend": backend}
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(self.workspace, "NHD", **how)
            self.plan = lambda: wrapper.plan(
                indptr, indices, last, Q_HEADS, KV_HEADS, HEAD, PAGE_SIZE, **types
            )
            self.runs = [lambda cache=case.pages(x): wrapper.run(case.q, cache, out=out) for x in case.layers]
        self.plan()


PEERS = {"flashinfer": FlashInfer, "torch": Torch, "torch-flex": Flex}
# Where xtask keeps this process.
OWN_CORES = os.sched_getaffinity(0)


def host_ns(call, count):
    """The median time of a call, of batches of so many from an idle GPU."""
    stream, times, started = torch.cuda.current_stream(), [], time.perf_counter()
    call(0)
    while len(times) < BATCHES and (len(times) < 3 or time.perf_counter() - started < SECONDS):
        stream.synchronize()
        gc.disable()
        begin = time.perf_counter_ns()
        for i in range(count):
            call(i)
        times.append((time.perf_counter_ns() - begin) / count)
        gc.enable()
    stream.synchronize()
    return statistics.median(times)


class Arm:
    def __init__(self, name):
        self.name, self.key, self.peer, self.ahead = name, None, None, None
        torch.cuda.set_stream(torch.cuda.Stream())
        if name == "flashinfer":
            self.folder = arms.libraries()
            self.cache = arms.prebuilt(self.folder, [x for x in LIBRARIES.values() if (self.folder / x).is_file()])

    def forget(self):
        self.key = self.peer = None
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def set_up(self, kind, backend, requests, length, layers):
        key = (kind, backend, requests, length, layers)
        if self.key == key:
            return
        self.forget()
        case = Case(kind, requests, length, layers)
        check = self.name != "torch" and case.bytes // layers <= CHECKED_BYTES
        expected = sdpa(case, case.layers[0]).transpose(1, 2).float() if check else None
        peer = PEERS[self.name](case, backend)
        if check:
            found = peer.runs[0]()
            found = found.transpose(1, 2) if self.name == "torch-flex" else found.view(expected.shape)
            off = float((found.float() - expected).norm() / expected.norm())
            if not off <= TOLERANCE:
                raise RuntimeError(f"the result is off by {off:.1e} from torch's scaled_dot_product_attention")
        if self.name == "flashinfer":
            arms.came_from(self.folder / LIBRARIES[backend])
        self.bytes, self.peer, self.key = case.bytes, peer, key

    def queued_ns(self, count):
        """GPU time of a run, of so many that were queued before the first started."""
        runs = self.peer.runs
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self.ahead is None:
            self.ahead = [torch.zeros(AHEAD_BYTES, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
        begin = time.perf_counter_ns()
        for i in range(count):
            runs[i % len(runs)]()
        # Copies take some 0.3 ms, and twice as many as queueing takes.
        copies = 1 + int((time.perf_counter_ns() - begin) / 150e3)
        times = []
        for _ in range(TIMINGS + 1):
            torch.cuda.synchronize()
            for _ in range(min(copies, 60)):
                self.ahead[1].copy_(self.ahead[0])
            start.record()
            for i in range(count):
                runs[i % len(runs)]()
            end.record()
            end.synchronize()
            times.append(1e6 * start.elapsed_time(end) / count)
        return statistics.median(times[1:])

    def step_ns(self, count):
        stream, runs, times = torch.cuda.current_stream(), self.peer.runs, []
        for i in range(count):
            stream.synchronize()
            begin = time.perf_counter_ns()
            runs[i % len(runs)]()
            stream.synchronize()
            times.append(time.perf_counter_ns() - begin)
        return statistics.median(times)

    def answer(self, request):
        what, kind, backend, *numbers = request
        if what not in ("plan", "run", "gpu", "step") or kind == "copy" or len(numbers) != 4:
            return "-"
        *sizes, count = [int(number) for number in numbers]
        self.set_up(kind, backend, *sizes)
        try:
            if what == "plan":
                if not hasattr(self.peer, "plan"):
                    return "-"
                plan = self.peer.plan
                return f"{host_ns(lambda i: plan(), 1):.1f}"
            if what == "run":
                runs = self.peer.runs
                # Without a look-up within what is timed.
                return f"{host_ns(lambda i, runs=runs, n=len(runs): runs[i % n](), count):.1f}"
            return f"{self.queued_ns(count) if what == 'gpu' else self.step_ns(count):.1f}"
        finally:
            if self.bytes > LARGE_BYTES:
                self.forget()


def start(name):
    globals().update((module, sys.modules[module]) for module in ARMS[name])
    arm = Arm(name)
    os.sched_setaffinity(0, OWN_CORES)
    return arm


if __name__ == "__main__":
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    # Until it is ready.
    os.sched_setaffinity(0, range(os.cpu_count()))
    sys.exit(arms.serve(ARMS, start, lambda arm, request: arm.answer(request)))
