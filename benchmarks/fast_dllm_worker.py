"""Times Fast-dLLM's own code at a published shape, with random weights; `benchmarks.fast_dllm` starts it.

    cd DIR && PYTHONPATH=DIR/site:DIR/llada python fast_dllm_worker.py '{"family": "llada", "shape": {...}, ...}'

It runs in its own process, with that code's dependencies: nothing of this project is imported. The models, and the
samplers with the dual cache, run unmodified. A step is timed from the start of one forward to the start of the next. If
the logits of all rows do not fit, the head gets only the generated region's rows, and the answer says so. Prints a JSON
line with versions, then one for each length.
"""

import contextlib
import importlib
import json
import sys
import time
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

# the published config.json of LLaDA-8B, without its sizes
LLADA_CONFIG = {
    "activation_type": "silu",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rope": True,
    "weight_tying": False,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
    "use_cache": False,
}


class Clock:
    """Rows and seconds of every forward of a model, while it is patched."""

    def __init__(self, model: torch.nn.Module):
        self.model, self.marks = model, []

    def __enter__(self) -> "Clock":
        forward = self.model.forward

        def ticking(ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._mark(ids.shape[1])
            return forward(ids, *args, **kwargs)

        self.model.forward = ticking
        return self

    def __exit__(self, *_: object) -> None:
        self._mark(0)
        del self.model.forward

    def _mark(self, rows: int) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        self.marks.append((rows, time.perf_counter()))

    @property
    def forwards(self) -> list[tuple[int, float]]:
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return [(rows, then - now) for (rows, now), (_, then) in pairs]


def build(family: str, shape: dict[str, Any], device: str) -> torch.nn.Module:
    """Its model of a published shape with random bfloat16 weights, made on the device."""
    with torch.device("meta"):
        model = _dream(shape) if family == "dream" else _llada(shape)
    model = model.to(torch.bfloat16).to_empty(device=device).eval().requires_grad_(False)
    if family == "dream":
        model.reset_rope_parameters()
    for weight in model.parameters():
        weight.normal_(std=weight.shape[-1] ** -0.5) if weight.ndim > 1 else weight.fill_(1)
    return model


def _dream(shape: dict[str, Any]) -> torch.nn.Module:
    modeling = importlib.import_module("model.modeling_dream")
    config = importlib.import_module("model.configuration_dream").DreamConfig
    model = modeling.DreamModel(config(max_position_embeddings=131072, **shape))
    blocks = importlib.import_module("model.generation_utils_block").DreamGenerationMixin
    for name in ("diffusion_generate", "_sample"):  # as its own evaluation does
        setattr(model, name, types.MethodType(getattr(blocks, name), model))
    return model


def _llada(shape: dict[str, Any]) -> torch.nn.Module:
    modeling = importlib.import_module("model.modeling_llada")
    config = modeling.LLaDAConfig(embedding_size=shape["vocab_size"], **LLADA_CONFIG, **shape)
    inner = modeling.create_model_config_from_pretrained_config(config)
    inner.init_device = "meta"
    return modeling.LLaDAModelLM(config, model=modeling.LLaDAModel(inner, init_params=False))


def generate(model: torch.nn.Module, job: dict[str, Any], prompt: torch.Tensor, new_tokens: int, steps: int) -> None:
    """One greedy generation by its sampler with the dual cache."""
    mask_id, block_length = job["shape"]["mask_token_id"], job["block_length"]
    if job["family"] == "dream":
        options = {"temperature": 0.0, "alg": "entropy", "mask_token_id": mask_id, "dual_cache": True}
        model.diffusion_generate(prompt, max_new_tokens=new_tokens, steps=steps, block_length=block_length, **options)
        return
    sampler = importlib.import_module("generate").generate_with_dual_cache
    sampler(model, prompt, steps=steps, gen_length=new_tokens, block_length=block_length, mask_id=mask_id)


@contextlib.contextmanager
def restricted_head(model: torch.nn.Module, job: dict[str, Any], length: int) -> Iterator[None]:
    """Inside, the head gets only the last rows of a forward, and the sampler sees no other row's token."""
    rows = job["new_tokens"] + 1
    if job["family"] == "dream":
        head, module, name = model.lm_head, importlib.import_module("model.generation_utils_block"), "sample_tokens"
    else:
        head, module, name = model.model.transformer.ff_out, importlib.import_module("generate"), "get_transfer_index"
    plain = getattr(module, name)

    def sample_tokens(logits: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        found = plain(logits, *args, **kwargs)
        # logits of a whole forward are [1, rows, V]; of a cached one's masked tokens [n, V]
        return tuple(F.pad(x, (length - rows, 0)) for x in found) if logits.ndim == 3 else found

    def get_transfer_index(
        logits: torch.Tensor, temperature: float, remasking: str, masked: torch.Tensor, x: torch.Tensor, *args: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lead = x.shape[1] - logits.shape[1]
        tokens, chosen = plain(logits, temperature, remasking, masked[:, lead:], x[:, lead:], *args)
        return torch.cat((x[:, :lead], tokens), 1), F.pad(chosen, (lead, 0))

    hook = head.register_forward_pre_hook(lambda _, args: (args[0][:, -rows:],))
    setattr(module, name, locals()[name])
    try:
        yield
    finally:
        hook.remove()
        setattr(module, name, plain)


def measure(model: torch.nn.Module, job: dict[str, Any], prompt: torch.Tensor) -> dict[str, Any]:
    """Whole generations at every number of steps: rows and seconds of their forwards, and the peak memory."""
    generate(model, job, prompt, job["block_length"], 2)  # the first use of its kernels
    found = {}
    for steps in job["steps"]:
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with Clock(model) as clock:
            generate(model, job, prompt, job["new_tokens"], steps)
        peak = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else None
        found[str(steps)] = {"forwards": clock.forwards, "peak_memory_bytes": peak}
    return found


def answer(model: torch.nn.Module, job: dict[str, Any], tokens: int) -> dict[str, Any]:
    """`measure` after a prompt of this many tokens, with a restricted head if necessary; or the error."""
    prompt = torch.randint(0, job["shape"]["mask_token_id"], (1, tokens), device=job["device"])
    whole, restricted = contextlib.nullcontext(), restricted_head(model, job, tokens + job["new_tokens"])
    for context, is_restricted in ((whole, False), (restricted, True)):
        try:
            with context:
                return {"steps": measure(model, job, prompt), "restricted_head": is_restricted}
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    return {"error": "out of memory"}


@torch.no_grad()
def main() -> None:
    job = json.loads(sys.argv[1])
    out, sys.stdout = sys.stdout, sys.stderr  # because that code prints
    import transformers

    model = build(job["family"], job["shape"], job["device"])
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"versions": versions}), file=out, flush=True)
    for name, tokens in job["lengths"].items():
        print(json.dumps({"length": name, **answer(model, job, tokens)}), file=out, flush=True)


if __name__ == "__main__":
    main()
