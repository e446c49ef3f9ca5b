"""Decoders beside Hugging Face's transformers, whose files and shapes they share.

    decoder.py weights NAME FOLDER      config.json and random weights of a shape: normal, norms around 1
    decoder.py reference FOLDER [CASE]  logits of a model in F32 and what its layers leave in the residual stream, and how far its
                                        own BF16 is from them, into FOLDER/reference.safetensors; a CASE is SEQUENCESxCONTEXT, 1x64
                                        for example
    decoder.py prepare NAME FOLDER      both
    decoder.py [--probe] ARM            an arm of `cargo xtask bench --decoder`, as arms.py says

The arms:

    hf-eager              bf16, sdpa, StaticCache, a loop by hand
    hf-eager-dyn          the same with DynamicCache, the library's own choice, which copies all keys and values to add some
    hf-compile-CASE       hf-eager's step with its argmax under torch.compile(mode="reduce-overhead", fullgraph=True)
    hf-flex-CASE          the same with flex_attention, which reads keys and values once for each group of queries
    hf-cudagraph-CASE     hf-eager's step with its argmax, captured by torch.cuda.CUDAGraph as it is
    torch-cudagraph-CASE  byhand.py's step on torch's operations, captured likewise: packed weights, nothing is repeated
    fi-python-CASE        byhand.py's step on FlashInfer's functions of Python, captured likewise

A CASE is ROWSxCONTEXT of Qwen3-0.6B, or llama-ROWSxCONTEXT of Llama-3.2-1B; DECODER_FIRST names another model for all. Each has a
process of its own, so that they compile at the same time. What byhand.py computes is compared with hf-eager's logits before it is
measured. They answer

    step MODEL BATCH CONTEXT STEPS     ns of a step, between events around so many that were queued
    kernels MODEL BATCH CONTEXT STEPS  kernels of a step, of torch's profiler

MODEL is a folder of DECODER_MODELS, or one of the shapes here with random weights.
"""

import os
import statistics
import sys
import time
from pathlib import Path

import arms

SHAPES = {
    "qwen3-0.6b": ("qwen3", dict(
        hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
        intermediate_size=3072, vocab_size=151936, rms_norm_eps=1e-6, tie_word_embeddings=True,
        max_position_embeddings=40960, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )),
    "llama-3.2-1b": ("llama", dict(
        hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
        intermediate_size=8192, vocab_size=128256, rms_norm_eps=1e-5, tie_word_embeddings=True,
        max_position_embeddings=131072, rope_parameters={
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )),
    # For tests: weights large enough that every part of a layer shows.
    "tiny-qwen3": ("qwen3", dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, vocab_size=160, rms_norm_eps=1e-6, tie_word_embeddings=True,
        max_position_embeddings=512, initializer_range=0.15, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )),
    "tiny-llama": ("llama", dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, vocab_size=160, rms_norm_eps=1e-5, tie_word_embeddings=False,
        max_position_embeddings=512, initializer_range=0.15, rope_parameters={
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    )),
}
CASES = ["1x64", "4x64", "1x1024", "4x1024"]
POSITIONS = int(os.environ.get("DECODER_POSITIONS", 32))
SEED = 1
# With norms that are all alike nobody would see that one is another's.
NORM_SPREAD = 0.2
REPETITIONS, WARM = 3, 4
# Room for so many steps, in every case: no question compiles or captures anew.
ROOM = 128
ONE_CASE = {
    "1x1024": ("qwen3-0.6b", 1, 1024), "32x1024": ("qwen3-0.6b", 32, 1024), "1x8192": ("qwen3-0.6b", 1, 8192),
    "llama-1x1024": ("llama-3.2-1b", 1, 1024),
}
HF = ["torch", "transformers"]
# What each arm needs, how it runs, and its only case, where it has one.
WAYS = {"hf-eager": (HF, "eager", None), "hf-eager-dyn": (HF, "dyn", None)} | {
    f"{name}-{case}": (modules, how, case)
    for name, modules, how in [
        ("hf-compile", HF, "compile"), ("hf-flex", HF, "flex"), ("hf-cudagraph", HF, "cudagraph"),
        ("torch-cudagraph", HF, "torch"), ("fi-python", [*HF, "tvm_ffi", "flashinfer"], "flashinfer"),
    ]
    for case in ONE_CASE
}
ARMS = {name: modules for name, (modules, *_) in WAYS.items()}
# How far logits of byhand.py's may be from those of transformers, both in bf16, as a root mean square over rows and steps, and over
# how many steps they are compared: more than a page has tokens.
TOLERANCE, COMPARED = 0.05, 18
# What this process may use once it is ready: where xtask keeps it.
OWN_CORES = os.sched_getaffinity(0)


def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def shape(name):
    family, fields = SHAPES[name]
    return transformers.AutoConfig.for_model(family, **fields)


def empty(config):
    """A model without memory."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def random_weights(config):
    """By name; the head is the embedding where they are tied."""
    generator = torch.Generator(device=device()).manual_seed(SEED)
    weights = {}
    for name, weight in empty(config).state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        mean, spread = (1.0, NORM_SPREAD) if name.endswith("norm.weight") else (0.0, config.initializer_range)
        values = torch.empty(weight.shape, device=device()).normal_(mean, spread, generator=generator)
        weights[name] = values.to(torch.bfloat16)
    return weights


def write_weights(name, folder):
    from safetensors.torch import save_file

    config = shape(name)
    config.save_pretrained(folder)
    weights = {name: weight.cpu() for name, weight in random_weights(config).items()}
    save_file(weights, Path(folder, "model.safetensors"), metadata={"format": "pt"})


def load(folder, dtype, attention="sdpa"):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    return model.to(device()).eval()


def forced(model, tokens, context):
    """The logits behind each token after the context, which a prefill has put into the cache; and what each layer left in the
    residual stream, as [rows, positions, layers, hidden]."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=tokens.shape[1])
    model(input_ids=tokens[:, :context], past_key_values=cache, use_cache=True, logits_to_keep=1)
    left = []

    def leaves(layer, given, result):
        stream = result[0] if isinstance(result, tuple) else result
        left.append(stream[:, -1].float())

    hooks = [layer.register_forward_hook(leaves) for layer in model.model.layers]
    logits, residuals = [], []
    for at in range(context, tokens.shape[1]):
        found = model(input_ids=tokens[:, at : at + 1], past_key_values=cache, use_cache=True).logits[:, -1]
        logits.append(found.float())
        residuals.append(torch.stack(left, dim=1))
        left.clear()
    for hook in hooks:
        hook.remove()
    return torch.stack(logits, dim=1), torch.stack(residuals, dim=1)


def relative(own, expected):
    return (own - expected).norm(dim=-1) / expected.norm(dim=-1)


def write_reference(folder, cases):
    from safetensors.torch import save_file

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    generator = torch.Generator().manual_seed(SEED)
    found, tokens = {}, {}
    with torch.no_grad():
        model = load(folder, torch.float32)
        for case in cases:
            rows, context = map(int, case.split("x"))
            tokens[case] = torch.randint(model.config.vocab_size, (rows, context + POSITIONS), generator=generator)
            found[f"{case}.tokens"] = tokens[case].to(torch.int32)
            logits, residuals = forced(model, tokens[case].to(device()), context)
            found[f"{case}.logits"], found[f"{case}.residuals"] = logits.cpu(), residuals.cpu()
        del model
        model = load(folder, torch.bfloat16)
        for case in cases:
            logits, residuals = forced(model, tokens[case].to(device()), int(case.split("x")[1]))
            error = relative(logits, found[f"{case}.logits"].to(device()))
            found[f"{case}.error.hf-eager"] = error.cpu().contiguous()
            by_layer = relative(residuals, found[f"{case}.residuals"].to(device()))
            found[f"{case}.residual_error.hf-eager"] = by_layer.cpu().contiguous()
            print(f"{case}: transformers' bf16 is off by {error.square().mean().sqrt():.2e}", file=sys.stderr)
    save_file(found, Path(folder, "reference.safetensors"))


class Decoder:
    """A model of transformers with a full cache of random keys and values, and its next step."""

    def __init__(self, how, name, rows, context, steps):
        folder = Path(os.environ.get("DECODER_MODELS", "/nowhere"), name)
        attention = "flex_attention" if how == "flex" else "sdpa"
        if how == "flex":
            # Else it warns while it makes a mask, of something that changes nothing here, and a warning ends a full graph.
            transformers.masking_utils._is_torch_greater_or_equal_than_2_6 = False
        if folder.is_dir():
            self.model = load(folder, torch.bfloat16, attention)
        else:
            config = shape(name)
            config._attn_implementation = attention
            with torch.device(device()):
                self.model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        self.context, self.dynamic = context, how == "dyn"
        config = self.model.config
        one = torch.zeros(rows, config.num_key_value_heads, 1, config.head_dim, dtype=torch.bfloat16, device=device())
        if self.dynamic:
            self.cache = transformers.DynamicCache(config=config)
            noise = lambda: one.new_empty(rows, config.num_key_value_heads, context, config.head_dim).normal_()
            for layer in range(config.num_hidden_layers):
                self.cache.update(noise(), noise(), layer)
        else:
            self.cache = transformers.StaticCache(config=config, max_cache_len=context + steps)
            for layer in self.cache.layers:
                layer.lazy_initialization(one, one)
                layer.keys.normal_()
                layer.values.normal_()
        self.ids = torch.randint(config.vocab_size, (rows, 1), device=device())
        self.rewind()
        model, cache = self.model, self.cache

        def greedy(ids):
            return model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)

        by_compiler = how in ("compile", "flex")
        self.greedy = torch.compile(greedy, mode="reduce-overhead", fullgraph=True) if by_compiler else greedy
        self.step = byhand.captured(self.whole_step) if how == "cudagraph" else self.whole_step
        # What is compiled is recorded at the second and third call.
        for _ in range(WARM):
            self.step()
        if device() == "cuda":
            torch.cuda.synchronize()

    def rewind(self):
        if self.dynamic:
            if added := self.cache.get_seq_length() - self.context:
                self.cache.crop(-added)
            return
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.context)

    def whole_step(self):
        torch.compiler.cudagraph_mark_step_begin()
        self.ids.copy_(self.greedy(self.ids))

    def steps(self, count):
        for _ in range(count):
            self.step()

    def logits(self, ids):
        return self.model(input_ids=ids, past_key_values=self.cache, use_cache=True).logits[:, -1]


def by_hand(how, name, rows, context, steps):
    """A step of byhand.py's, which was compared with transformers' own."""
    peer = Decoder("eager", name, rows, context, steps)
    peer.rewind()
    # Before the peer adds to them.
    caches = [(layer.keys, layer.values) for layer in peer.cache.layers]
    own = byhand.KINDS[how](peer.model, caches, peer.ids, context, steps)
    own.rewind()
    errors, tokens = [], torch.randint(peer.model.config.vocab_size, (min(COMPARED, steps), rows, 1), device=device())
    for ids in tokens:
        expected = peer.logits(ids).float()
        own.ids.copy_(ids.flatten())
        own.step()
        errors.append(relative(own.logits.float(), expected))
    error = torch.stack(errors).square().mean().sqrt().item()
    if not error <= TOLERANCE:
        raise RuntimeError(f"logits are off by {error:.2e} from those of transformers, expected at most {TOLERANCE}")
    print(f"{how}: logits are off by {error:.2e} from those of transformers", file=sys.stderr)
    own.rewind()
    return own


def gpu_ns(decoder, count):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    values = []
    for _ in range(REPETITIONS):
        decoder.rewind()
        torch.cuda.synchronize()
        start.record()
        decoder.steps(count)
        end.record()
        end.synchronize()
        values.append(1e6 * start.elapsed_time(end) / count)
    return statistics.median(values)


def kernels(decoder):
    from torch.profiler import ProfilerActivity, profile

    decoder.rewind()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        decoder.step()
        torch.cuda.synchronize()
    of_gpu = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in of_gpu)


class Arm:
    def __init__(self, name):
        _, self.how, case = WAYS[name]
        self.only, self.key, self.decoder = None, None, None
        torch.cuda.set_stream(torch.cuda.Stream())
        if case:
            model, rows, context = ONE_CASE[case]
            self.only = (os.environ.get("DECODER_FIRST", model), rows, context)
            self.set_up(*self.only)

    def set_up(self, *key):
        if self.key != key:
            self.key = self.decoder = None
            torch.cuda.empty_cache()
            make = by_hand if self.how in byhand.KINDS else Decoder
            self.decoder, self.key = make(self.how, *key, ROOM), key
            # What was only compared with.
            torch.cuda.empty_cache()

    def answer(self, request):
        with torch.no_grad():
            return self.asked(request)

    def asked(self, request):
        what, model, *numbers = request
        if what not in ("step", "kernels"):
            return "-"
        rows, context, steps = map(int, numbers)
        if self.only not in (None, (model, rows, context)):
            return "-"
        self.set_up(model, rows, context)
        return f"{gpu_ns(self.decoder, steps):.1f}" if what == "step" else str(kernels(self.decoder))


def start(name):
    # The modules are this file's only once they are known to be there.
    globals().update((module, sys.modules[module]) for module in HF)
    global byhand
    import byhand

    with torch.no_grad():
        arm = Arm(name)
    os.sched_setaffinity(0, OWN_CORES)
    return arm


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["weights" | "prepare" as what, name, folder] if name in SHAPES:
            import torch
            import transformers

            write_weights(name, folder)
            if what == "prepare":
                write_reference(folder, CASES)
        case ["reference", folder, *cases]:
            import torch
            import transformers

            write_reference(folder, cases or CASES)
        case ["weights" | "prepare", *_]:
            sys.exit(f"usage: decoder.py weights|prepare {'|'.join(SHAPES)} FOLDER")
        case _:
            os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
            # Until it is ready.
            os.sched_setaffinity(0, range(os.cpu_count()))
            sys.exit(arms.serve(ARMS, start, lambda arm, request: arm.answer(request)))
