"""Times the released SparseD code at the published shape, with random weights; `benchmarks.reference` starts it.

    cd DIR && PYTHONPATH=DIR/site:DIR python reference_worker.py '{"family": "llada", "shape": {...}, ...}'

It runs in its own process, with the released code's dependencies: nothing of this project is imported. The released
samplers run unmodified, with few steps. A step is timed from the start of one forward to the start of the next. Prints
a JSON line with versions, then one for each length.
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

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
}


def released_n_full(steps: int, skip: float) -> int:
    """How many steps the released code runs with full attention; the last of them selects."""
    return min(steps, int(steps * skip) + 2)


class Clock:
    """Seconds of every step of a generation, and the seconds that torch spent compiling in them."""

    def __init__(self, model: torch.nn.Module):
        self.model, self.marks = model, []

    def tick(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        compiled = torch._dynamo.utils.calculate_time_spent().get("total_wall_time", 0.0)
        self.marks.append((time.perf_counter(), compiled))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Every forward of the model inside begins a step."""
        forward = self.model.forward

        def ticking(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            return forward(*args, **kwargs)

        self.model.forward = ticking
        try:
            yield
            self.tick()
        finally:
            del self.model.forward

    def record(self) -> dict[str, list[float]]:
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        names = ("seconds", "compile_seconds")
        return {name: [end[i] - start[i] for start, end in pairs] for i, name in enumerate(names)}


def build(family: str, shape: dict[str, Any], device: str) -> torch.nn.Module:
    """The released model of a published shape with random bfloat16 weights, made on the device."""
    with torch.device("meta"):
        model = _dream(shape) if family == "dream" else _llada(shape)
    model = model.to(torch.bfloat16).to_empty(device=device).eval().requires_grad_(False)
    if family == "dream":
        model.reset_rope_parameters()
    for weight in model.parameters():
        weight.normal_(std=weight.shape[-1] ** -0.5) if weight.ndim > 1 else weight.fill_(1)
    return model


def _dream(shape: dict[str, Any]) -> torch.nn.Module:
    from models.Dream.modeling_dream import DreamConfig, DreamModel

    # as published: the cache is filled in every forward and thrown away
    return DreamModel(DreamConfig(max_position_embeddings=131072, use_cache=True, **shape))


def _llada(shape: dict[str, Any]) -> torch.nn.Module:
    from models.LLaDA.modeling_llada import (
        LLaDAConfig,
        LLaDAModel,
        LLaDAModelLM,
        create_model_config_from_pretrained_config,
    )

    config = LLaDAConfig(embedding_size=shape["vocab_size"], **LLADA_CONFIG, **shape)
    inner = create_model_config_from_pretrained_config(config)
    inner.init_device = "meta"
    return LLaDAModelLM(config, model=LLaDAModel(inner, init_params=False))


def generate(model: torch.nn.Module, job: dict[str, Any], prompt: torch.Tensor, steps: int, sparse: bool) -> None:
    """One generation by the released sampler, greedy."""
    param = job["config"] | {"new_generation": job["new_tokens"], "whole_steps": steps} if sparse else None
    if job["family"] == "dream":
        options = {"temperature": 0.0, "top_p": None, "top_k": None, "alg": "maskgit_plus", "alg_temp": 0.0}
        mask = torch.ones_like(prompt)
        length = {"max_new_tokens": job["new_tokens"], "steps": steps}
        model.diffusion_generate(prompt, attention_mask=mask, SparseD_param=param, **length, **options)
        return
    from models import generate as released_generate

    length = {"gen_length": job["new_tokens"], "block_length": job["new_tokens"], "steps": steps}
    mask_id = job["shape"]["mask_token_id"]
    released_generate(model, prompt, temperature=0.0, mask_id=mask_id, SparseD_param=param, **length)


def measure(model: torch.nn.Module, job: dict[str, Any], prompt: torch.Tensor, plan: dict[str, int]) -> dict[str, Any]:
    """The modes at one length: the steps of every generation, and the peak memory."""
    runs = {}
    for mode in job["modes"]:
        _forget_masks(model)
        sparse, steps = mode == "sparsed", plan[f"{mode}_steps"]
        clocks = [Clock(model) for _ in range(plan["generations"] if sparse else 1)]
        for clock in clocks:
            with clock.running():
                generate(model, job, prompt, steps, sparse)
        n_full = released_n_full(steps, job["config"]["skip"]) if sparse else None
        records = [clock.record() for clock in clocks]
        peak = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else None
        runs[mode] = {"generations": records, "n_full": n_full, "peak_memory_bytes": peak}
    return runs


def _forget_masks(model: torch.nn.Module) -> None:
    """Free the block masks of the generation before, and restart the memory count."""
    for module in model.modules():
        if hasattr(module, "block_mask"):
            module.block_mask = module.fine_mask = None
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@torch.no_grad()
def main() -> None:
    job = json.loads(sys.argv[1])
    out, sys.stdout = sys.stdout, sys.stderr  # the released code prints
    import transformers

    model = build(job["family"], job["shape"], job["device"])
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"versions": versions}), file=out, flush=True)
    for plan in job["plans"]:
        prompt = torch.randint(0, job["shape"]["mask_token_id"], (1, plan["prompt_tokens"]), device=job["device"])
        try:
            answer = {"runs": measure(model, job, prompt, plan)}
        except torch.OutOfMemoryError:
            answer = {"error": "out of memory"}
        print(json.dumps({"length": plan["length"], **answer}), file=out, flush=True)


if __name__ == "__main__":
    main()
