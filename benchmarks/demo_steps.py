"""A full and a sparse step of a demo checkpoint in turn on this machine, so that a drifting speed hits both alike.

    python -m benchmarks.demo_steps --family llada --out benchmarks/results/demo-steps-llada.json

The 4k preset, 32 new tokens, the scripts' default select and block size. Two copies of the model: one runs sparse steps
under `sparsify`, the other full ones.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from sparsed import SparseDConfig, load_model, load_tokenizer, sparsify
from sparsed.cli.report import environment
from sparsed.patch import synchronize
from sparsed.prompts import build_prompt, demo_path

NEW_TOKENS = 32


@torch.no_grad()
def measure(family: str, pairs: int) -> dict:
    """Seconds of `pairs` sparse and full steps, sparse first, after the step that chooses the blocks."""
    folder = str(demo_path(family))
    sparse_model, full_model = load_model(folder), load_model(folder)
    prompt = build_prompt("4k", load_tokenizer(folder))
    ids = torch.tensor([prompt.input_ids], device=full_model.device)
    canvas = F.pad(ids, (0, NEW_TOKENS), value=full_model.config.mask_token_id)
    # as many rows of logits as the first step of a generation reads
    rows = torch.arange(len(prompt.input_ids), canvas.shape[1], device=ids.device)
    samples = {"sparse": [], "full": []}

    def step(model: torch.nn.Module) -> float:
        synchronize(ids.device)
        start = time.perf_counter()
        model(canvas, logit_rows=rows)
        synchronize(ids.device)
        return time.perf_counter() - start

    with sparsify(sparse_model, SparseDConfig(skip=0), steps=pairs + 1, gen_length=NEW_TOKENS) as run:
        step(sparse_model), step(full_model)
        for _ in range(pairs):
            samples["sparse"].append(step(sparse_model))
            samples["full"].append(step(full_model))
    sparse, full = (statistics.median(samples[kind]) for kind in ("sparse", "full"))
    return {
        "environment": environment(full_model.device, full_model.dtype),
        "prompt_tokens": len(prompt.input_ids),
        "full_step_seconds": full,
        "sparse_step_seconds": sparse,
        "speedup": full / sparse,
        "density": run.density,
        "backend": run.backend,
        "samples": samples,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("dream", "llada"), default="llada")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    command = " ".join(["python -m benchmarks.demo_steps", *sys.argv[1:]])
    record = {"command": command, **measure(args.family, args.pairs)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.out.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, args.out)
    shown = ("full_step_seconds", "sparse_step_seconds", "speedup", "density")
    print(args.family, *(f"{name} {record[name]:.3f}" for name in shown))


if __name__ == "__main__":
    main()
