"""The memory that long prompts take on the CPU: a demo checkpoint's first full, selecting and sparse step.

    python -m benchmarks.cpu_memory --family llada --lengths 64k --out benchmarks/results/cpu-memory-llada.json

32 new tokens, the scripts' default select and block size. Each length runs in its own process. Its largest resident
memory, with Python and PyTorch, is what the system has counted (`ru_maxrss`).
"""

import argparse
import multiprocessing
import resource
import sys
import time
from itertools import pairwise

import torch

from sparsed import SparseDConfig, load_model, load_tokenizer
from sparsed.prompts import build_prompt, demo_path
from sparsed.sampling import generate, settings_for

from .common import build_parser, new_record, parse_arguments, save

NEW_TOKENS, STEPS = 32, 3
CONFIG = SparseDConfig(skip=2 / 3)
UNIT = 1 if sys.platform == "darwin" else 1024  # unit of ru_maxrss, in bytes


def measure(family: str, length: str) -> dict:
    """Bytes before the first step, the most bytes, and the seconds of each of the three steps."""
    folder = str(demo_path(family))
    model, tokenizer = load_model(folder, device="cpu"), load_tokenizer(folder)
    ids = torch.tensor([build_prompt(length, tokenizer).input_ids])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT
    ends = [time.perf_counter()]
    settings = settings_for(family, gen_length=NEW_TOKENS, steps=STEPS, block_length=NEW_TOKENS)
    generate(model, ids, settings, config=CONFIG, on_step=lambda *_: ends.append(time.perf_counter()))
    names = ("full", "selecting", "sparse")
    return {
        "prompt_tokens": ids.shape[1],
        "bytes_before": before,
        "bytes_at_most": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT,
        "step_seconds": dict(zip(names, (end - start for start, end in pairwise(ends)), strict=True)),
    }


def measure_apart(family: str, length: str) -> dict:
    """`measure` in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (family, length))


def run(args: argparse.Namespace) -> list[dict]:
    found = []
    for length in args.lengths:
        found.append(measure_apart(args.family, length))
        gigabytes = found[-1]["bytes_at_most"] / 1e9
        seconds = ", ".join(f"{name} {value:.1f} s" for name, value in found[-1]["step_seconds"].items())
        print(f"{args.family} {length}: {gigabytes:.2f} GB; {seconds}", flush=True)
    return found


def main() -> None:
    parser = build_parser("cpu_memory", __doc__, lengths="64k")
    args = parse_arguments(parser, None)
    found = run(args)
    save(args.out, new_record(parser, args, torch.device("cpu"), torch.float32) | {"lengths": found})


if __name__ == "__main__":
    main()
