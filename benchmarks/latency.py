"""Seconds a denoising step, full and sparse, at the published shapes with random weights, on one GPU.

    python -m benchmarks.latency --family llada --lengths 4k,16k,64k --out benchmarks/results/latency-llada.json

Batch 1, 128 new tokens, the scripts' default skip, select and block size. Each mode first runs once untimed, at every
length; the time that kernels take to compile is therefore not in the figures, but reported apart.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch

from sparsed import SparseDConfig, dream_generate, llada_generate, sparsify
from sparsed.cli.report import environment

from .shapes import random_model

NEW_TOKENS = 128


def generate(model: torch.nn.Module, prompt: torch.Tensor, steps: int, on_step=None) -> None:
    """One generation by the family's sampler."""
    shared = {"gen_length": NEW_TOKENS, "steps": steps, "on_step": on_step}
    if model.family == "dream":
        dream_generate(model, prompt, **shared)
    else:
        llada_generate(model, prompt, block_length=NEW_TOKENS, **shared)


def step_seconds(model: torch.nn.Module, prompt: torch.Tensor, steps: int) -> list[float]:
    """Wall time of every step, the GPU waited for at step ends only."""
    torch.cuda.synchronize()
    ends = [time.perf_counter()]

    def tick(_: int) -> None:
        torch.cuda.synchronize()
        ends.append(time.perf_counter())

    generate(model, prompt, steps, tick)
    return [end - start for start, end in zip(ends, ends[1:], strict=False)]


def measure(model: torch.nn.Module, length: int, steps: int, backend: str) -> dict:
    """Both modes at one length in one go: medians by phase, the selection's extra time, memory, density."""
    config = SparseDConfig()
    prompt = torch.randint(0, 50_000, (1, length), device=model.device)
    generate(model, prompt, 1)
    torch.cuda.reset_peak_memory_stats()
    full = step_seconds(model, prompt, 3)
    origin_memory = torch.cuda.max_memory_allocated()
    with sparsify(model, config, steps=steps, gen_length=NEW_TOKENS, backend=backend) as run:
        generate(model, prompt, steps)
        compiled = run.compile_seconds
        torch.cuda.reset_peak_memory_stats()
        seconds = step_seconds(model, prompt, steps)
    full += seconds[: run.n_full - 1]
    full_step, sparse_step = statistics.median(full), statistics.median(seconds[run.n_full :])
    return {
        "prompt_tokens": length,
        "new_tokens": NEW_TOKENS,
        "full_step_seconds": full_step,
        "sparse_step_seconds": sparse_step,
        "selection_seconds": seconds[run.n_full - 1] - full_step - (run.compile_seconds - compiled),
        "compile_seconds": compiled,
        "samples": {"full": full, "sparse": seconds[run.n_full :]},
        "origin_peak_memory_bytes": origin_memory,
        "sparsed_peak_memory_bytes": torch.cuda.max_memory_allocated(),
        "density": run.density,
        "backend": run.backend,
        "backend_reason": run.backend_reason,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("dream", "llada"), default="llada")
    parser.add_argument("--lengths", default="4k,16k", help="prompt lengths in units of 1,024 tokens")
    parser.add_argument("--steps", type=int, default=10, help="steps of the timed SparseD run")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = random_model(args.family, torch.device("cuda", torch.cuda.current_device()))
    record = {
        "command": "python -m benchmarks.latency " + " ".join(sys.argv[1:]),
        "environment": environment(model.device, model.dtype),
        "family": args.family,
        "weights": "random",
        "rows": [],
    }
    for name in args.lengths.split(","):
        row = measure(model, 1024 * int(name.removesuffix("k")), args.steps, args.backend)
        record["rows"].append(row)
        print(
            f"{args.family} {name}: full {row['full_step_seconds']:.3f} s, sparse {row['sparse_step_seconds']:.3f} s, "
            f"selection {row['selection_seconds']:.2f} s, {row['backend']}, compiled {row['compile_seconds']:.1f} s, "
            f"peak {row['origin_peak_memory_bytes'] / 1e9:.1f} and {row['sparsed_peak_memory_bytes'] / 1e9:.1f} GB",
            flush=True,
        )
        # after every length: an interrupted run keeps what it has
        temporary = args.out.with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(temporary, args.out)


if __name__ == "__main__":
    main()
