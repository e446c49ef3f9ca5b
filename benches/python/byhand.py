"""A decoder's step written by hand over the weights of transformers' model, for the arms of decoder.py that have no compiler: on
torch's own operations, and on FlashInfer's. Weights that read the same input are packed, and a whole step is one CUDA graph, which
takes its token from the step before and moves every position on.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import arms

PAGE_SIZE = 16
# What FlashInfer's documentation recommends, and what its wrapper would take.
FLOAT_BYTES, INT_BYTES = 128 << 20, 8 << 20
# A wrapper of FlashInfer's computes on tensor cores from so many query heads of a key head on, as engines that use it do.
TENSOR_CORES_FROM = 4
WARM = 3
# Of each way that there is of something, the best of so many times so many steps.
TRIES, TRIED = 5, 8
ATTENTION = (
    "dtype_q_bf16_dtype_kv_bf16_dtype_o_bf16_dtype_idx_i32_head_dim_qk_{0}_head_dim_vo_{0}_posenc_0_use_swa_False_"
    "use_logits_cap_False"
)
LIBRARIES = ["norm.so", "rope.so", "page.so", "silu_and_mul.so"]


def captured(step):
    """Something that replays a step; without a GPU the step itself."""
    if not torch.cuda.is_available():
        return step
    # On the stream on which it is captured, so that libraries have their workspaces by then.
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def weight(module):
    """Without its gradient, with which no other library may have it."""
    return module.weight.detach()


class Layer:
    """A layer's weights; those of products that have the same input are one."""

    def __init__(self, layer):
        attention, mlp = layer.self_attn, layer.mlp
        packed = lambda *parts: torch.cat([weight(part) for part in parts]).contiguous()
        self.norm, self.mlp_norm = weight(layer.input_layernorm), weight(layer.post_attention_layernorm)
        self.qkv = packed(attention.q_proj, attention.k_proj, attention.v_proj)
        self.gate_up = packed(mlp.gate_proj, mlp.up_proj)
        self.out, self.down = weight(attention.o_proj), weight(mlp.down_proj)
        # Qwen3 has them, Llama has not.
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self.head_norms = None if None in norms else [weight(norm) for norm in norms]


class Step:
    """What both have. `caches` are keys and values of each layer, [rows, heads, tokens, size], of which the context is full."""

    def __init__(self, model, caches, ids, context, steps):
        config, inner = model.config, model.model
        self.rows, self.context, self.steps_ahead = ids.shape[0], context, steps
        self.hidden, self.eps, self.size = config.hidden_size, config.rms_norm_eps, config.head_dim
        self.q_heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.layers = [Layer(layer) for layer in inner.layers]
        self.embedding, self.norm, self.head = map(weight, (inner.embed_tokens, inner.norm, model.lm_head))
        self.device, self.ids = ids.device, ids.flatten().clone()
        rotary = inner.rotary_emb
        if rotary.inv_freq.dtype != torch.float32:
            raise RuntimeError(f"the model's frequencies are {rotary.inv_freq.dtype}, expected float32")
        positions = torch.arange(context + steps, device=self.device, dtype=torch.float32)
        angles = torch.outer(positions, rotary.inv_freq.to(self.device))
        self.cos, self.sin = (f(angles) * rotary.attention_scaling for f in (torch.cos, torch.sin))
        self.fill(caches)

    def parts(self, qkv):
        """Queries, keys and values of packed ones, as views by heads."""
        widths = [heads * self.size for heads in (self.q_heads, self.kv_heads, self.kv_heads)]
        return [part.view(self.rows, -1, self.size) for part in qkv.split(widths, dim=1)]

    def steps(self, count):
        for _ in range(count):
            self.step()


class Torch(Step):
    """Torch's operations. Of two ways to attend it takes the faster: the fused one, whose queries of a key head stand where a
    sequence's would, so that keys are not repeated; or two products with a softmax in between."""

    def fill(self, caches):
        dtype = self.embedding.dtype
        self.position = torch.tensor([self.context], device=self.device)
        self.caches = [tuple(part.clone() for part in cache) for cache in caches]
        # With the sign of what is turned, so that turning is a roll.
        self.cos = torch.cat([self.cos, self.cos], dim=1).to(dtype)
        self.sin = torch.cat([-self.sin, self.sin], dim=1).to(dtype)
        self.tokens = torch.arange(self.context + self.steps_ahead, device=self.device)
        self.seen, self.unseen = (torch.tensor(x, dtype=dtype, device=self.device) for x in (0.0, -torch.inf))
        for layer in self.layers:
            if layer.head_norms:
                counts = (self.q_heads, self.kv_heads)
                layer.head_norms = torch.cat([w.expand(n, -1) for w, n in zip(layer.head_norms, counts)]).contiguous()
        ways = []
        for self.way in ("fused", "products"):
            self.rewind()
            replay = captured(self.compute)
            ways.append((self.milliseconds(replay), self.way, replay, self.logits))
        _, self.way, self.replay, self.logits = min(ways, key=lambda way: way[0])
        shown = ", ".join(f"{way} {ms:.3f} ms" for ms, way, *_ in ways)
        print(f"attention of {self.rows} x {self.context}: {shown}", file=sys.stderr)
        self.rewind()

    def milliseconds(self, replay):
        """A step's time at best: while arms start, others use the GPU too."""
        times = []
        for _ in range(TRIES):
            self.rewind()
            replay()
            if not torch.cuda.is_available():
                return 0.0
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(TRIED):
                replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / TRIED)
        return min(times)

    def rewind(self):
        self.position.fill_(self.context)

    def step(self):
        self.replay()

    def compute(self):
        cos, sin = (table.index_select(0, self.position) for table in (self.cos, self.sin))
        mask = torch.where(self.tokens <= self.position, self.seen, self.unseen)
        x = F.embedding(self.ids, self.embedding)
        for layer, cache in zip(self.layers, self.caches):
            qkv = F.linear(F.rms_norm(x, (self.hidden,), layer.norm, self.eps), layer.qkv)
            x.addmm_(self.attend(layer, cache, qkv, cos, sin, mask), layer.out.t())
            both = F.linear(F.rms_norm(x, (self.hidden,), layer.mlp_norm, self.eps), layer.gate_up)
            gate, up = both.chunk(2, dim=1)
            x.addmm_(F.silu(gate) * up, layer.down.t())
        self.logits = F.linear(F.rms_norm(x, (self.hidden,), self.norm, self.eps), self.head)
        self.ids.copy_(self.logits.argmax(-1))
        self.position.add_(1)

    def attend(self, layer, cache, qkv, cos, sin, mask):
        together = self.q_heads + self.kv_heads
        both = qkv[:, : together * self.size].view(self.rows, together, self.size)
        if layer.head_norms is not None:
            both = F.rms_norm(both, (self.size,), eps=self.eps) * layer.head_norms
        both = torch.addcmul(both * cos, both.roll(self.size // 2, dims=-1), sin)
        q, k, v = both[:, : self.q_heads], both[:, self.q_heads :], self.parts(qkv)[2]
        keys, values = cache
        keys.index_copy_(2, self.position, k.unsqueeze(2))
        values.index_copy_(2, self.position, v.unsqueeze(2))
        q = q.reshape(self.rows, self.kv_heads, -1, self.size)
        if self.way == "fused":
            mask = mask.expand(self.rows, self.kv_heads, q.shape[2], -1)
            found = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        else:
            flat = lambda x: x.reshape(-1, *x.shape[2:])
            mask = mask.expand(self.rows * self.kv_heads, q.shape[2], -1)
            scores = torch.baddbmm(mask, flat(q), flat(keys).transpose(1, 2), alpha=self.size**-0.5)
            found = torch.bmm(scores.softmax(-1, dtype=torch.float32).to(q.dtype), flat(values))
        return found.reshape(self.rows, -1)


class FlashInfer(Step):
    """FlashInfer's functions of Python, over the libraries of FLASHINFER_RS_LIB_DIR, which the arms of Rust load too. Attention is
    its wrapper for decoding in a CUDA graph, whose plan holds as long as a sequence has as many pages: the plans of all numbers of
    pages are made ahead, and copied on the device when a page begins."""

    def fill(self, caches):
        flashinfer = sys.modules["flashinfer"]
        self.operations = flashinfer
        on_cores = self.q_heads // self.kv_heads < TENSOR_CORES_FROM
        name = ATTENTION.format(self.size)
        attention = f"batch_decode_with_kv_cache_{name}.so" if on_cores else f"batch_prefill_with_kv_cache_{name}_f16qk_False.so"
        folder = arms.libraries()
        libraries = [*LIBRARIES, attention]
        if absent := [name for name in libraries if not (folder / name).is_file()]:
            raise RuntimeError(f"{folder} has no {' and no '.join(absent)}")
        self.prebuilt = arms.prebuilt(folder, libraries)
        ints = dict(dtype=torch.int32, device=self.device)
        width = -(-(self.context + self.steps_ahead) // PAGE_SIZE)
        count = 1 + self.rows * width
        # In any order: what a cache looks like after a while. One is nobody's.
        order = torch.randperm(count - 1, generator=torch.Generator().manual_seed(7)) + 1
        table = order.view(self.rows, width).to(torch.int32)
        self.caches = [tuple(self.paged(part, table, count) for part in cache) for cache in caches]
        # cos in the first half, sin in the second.
        self.cos_sin = torch.cat([self.cos, self.sin], dim=1).contiguous()
        # Both grow by one in each step.
        self.counters = torch.zeros(2, self.rows, **ints)
        self.positions, self.last = self.counters[0], self.counters[1]
        self.each = torch.arange(self.rows, **ints)
        self.indptr, self.indices = torch.zeros(self.rows + 1, **ints), torch.zeros(self.rows * width, **ints)
        bytes_of = lambda count: torch.zeros(count, dtype=torch.uint8, device=self.device)
        workspace, self.plan = bytes_of(FLOAT_BYTES), bytes_of(INT_BYTES)
        how = {} if on_cores else {"backend": "fa2"}
        self.wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_cuda_graph=True, use_tensor_cores=not on_cores, paged_kv_indptr_buffer=self.indptr,
            paged_kv_indices_buffer=self.indices, paged_kv_last_page_len_buffer=self.last, **how,
        )
        self.wrapper.reset_workspace_buffer(workspace, self.plan)
        self.plans, steady = {}, None
        for pages in range(-(-(self.context + 1) // PAGE_SIZE), width + 1):
            indptr = torch.arange(self.rows + 1, dtype=torch.int32) * pages
            indices = table[:, :pages].flatten().contiguous()
            self.wrapper.plan(
                indptr, indices, torch.full((self.rows,), PAGE_SIZE, dtype=torch.int32), self.q_heads, self.kv_heads,
                self.size, PAGE_SIZE, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
            )
            found = [int(number) for number in self.wrapper._plan_info]
            if steady not in (None, found):
                raise RuntimeError(f"a plan of {pages} pages is {found}, of fewer it was {steady}: no graph holds both")
            steady = found
            torch.cuda.synchronize()
            self.plans[pages] = [x.clone() for x in (self.plan, self.indptr, self.indices)]
        self.rewind()
        self.replay = captured(self.compute)
        for library in libraries:
            arms.came_from(folder / library)
        self.rewind()

    def paged(self, part, table, count):
        """What a cache holds, as pages [page, token, head, size]."""
        rows, heads, tokens, size = part.shape
        pages = torch.zeros(count, PAGE_SIZE, heads, size, dtype=part.dtype, device=self.device)
        by_token = torch.zeros(rows, table.shape[1] * PAGE_SIZE, heads, size, dtype=part.dtype, device=self.device)
        by_token[:, :tokens] = part.transpose(1, 2)
        pages[table.flatten().long().to(self.device)] = by_token.view(-1, PAGE_SIZE, heads, size)
        return pages

    def rewind(self):
        self.at = self.context
        self.begin_page()

    def begin_page(self):
        """What the next step finds its way by, at the token `at`."""
        for to, plan in zip((self.plan, self.indptr, self.indices), self.plans[self.at // PAGE_SIZE + 1]):
            to.copy_(plan)
        self.positions.fill_(self.at)
        self.last.fill_(self.at % PAGE_SIZE + 1)

    def step(self):
        if self.at % PAGE_SIZE == 0 and self.at != self.context:
            self.begin_page()
        self.replay()
        self.at += 1

    def compute(self):
        fi = self.operations
        residual = F.embedding(self.ids, self.embedding)
        x = fi.rmsnorm(residual, self.layers[0].norm, self.eps)
        following = [layer.norm for layer in self.layers[1:]] + [self.norm]
        for layer, cache, norm in zip(self.layers, self.caches, following):
            x = torch.matmul(self.attend(layer, cache, torch.matmul(x, layer.qkv.t())), layer.out.t())
            fi.fused_add_rmsnorm(x, residual, layer.mlp_norm, self.eps)
            x = torch.matmul(fi.silu_and_mul(torch.matmul(x, layer.gate_up.t())), layer.down.t())
            fi.fused_add_rmsnorm(x, residual, norm, self.eps)
        self.logits = torch.matmul(x, self.head.t())
        self.ids.copy_(self.logits.argmax(-1))
        self.counters.add_(1)

    def attend(self, layer, cache, qkv):
        fi = self.operations
        q, k, v = self.parts(qkv)
        if layer.head_norms is not None:
            for x, norm in zip((q, k), layer.head_norms):
                fi.rmsnorm(x, norm, self.eps, out=x)
        flat = lambda x: x.flatten(1)
        fi.apply_rope_with_cos_sin_cache_inplace(self.positions, flat(q), flat(k), self.size, self.cos_sin)
        fi.append_paged_kv_cache(k, v, self.each, self.positions, cache, self.indices, self.indptr, self.last)
        return self.wrapper.run(q, cache).flatten(1)


KINDS = {"torch": Torch, "flashinfer": FlashInfer}
