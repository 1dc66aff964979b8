"""A model that several GPUs share by heads, against one of them in the same call: steps, whole runs, memory.

    torchrun --nproc_per_node 2 -m benchmarks.parallel --family llada --lengths 64k --out FILE.json
    torchrun --nproc_per_node 2 -m benchmarks.parallel --family llada --longest --out FILE.json

Batch 1, bfloat16, random weights of the published shape, blocks of 128, the paper's SparseD. First one GPU has the
whole model and does every length, then all GPUs share it. At each length: full, selecting and sparse steps, and a whole
generation of 256 tokens with a dual cache and SparseD, which also gives the cached steps. All of it runs once before,
on 4,096 tokens (`warm_up`). `cached_step` and `full_step` are what the kernels of such a step take, under PyTorch's
profiler. With --longest, all GPUs do a whole generation at 128k tokens, and one step of each kind without a cache at
512k. `agreement` compares the logits of a short prompt. Rows are printed and saved as they come.
"""

import argparse
import gc
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sparsed.console.parser import Parser
from sparsed.console.workers import as_one
from sparsed.models.common import DiffusionLM
from sparsed.models.joint import lay_projections_together
from sparsed.models.parallel import shard
from sparsed.ranks import Ranks
from sparsed.run import synchronize
from sparsed.sampling import generate
from sparsed.sampling.common import Step

from .breakdown import by_purpose, kernel_seconds
from .common import LENGTHS, build_parser, new_record, parse_arguments, require_gpu, save
from .generation import BLOCK_LENGTH, CACHE, NEW_TOKENS, PAPER, Enough, Run, Way, measured, run, times_of
from .kernels import DTYPE
from .shapes import SHAPES, random_model

WHOLE = Way("dual cache, the paper's SparseD", PAPER, CACHE)
FEW = 2  # runs for each kind of step
SETTLED, PROFILED = 10, 8  # steps before the profile, the refresh included, and cached ones in it
WARM = LENGTHS["4k"]  # enough prompt tokens for the kernels of long prompts
SHORT = 1024  # tokens of the prompt for which logits are compared
LONGEST_CACHED, LONGEST = "128k", "512k"
ONE, ALL = "one", "all"
PROGRAM = "python -m benchmarks.parallel"


@dataclass(frozen=True)
class Bench:
    """One call: the processes, and the record, which the first process fills in and saves."""

    args: argparse.Namespace
    ranks: Ranks
    record: dict[str, Any]

    def note(self, line: str) -> None:
        """Print a line about what the record has now."""
        if self.ranks.index == 0:
            save(self.args.out, self.record)
            print(line, flush=True)

    def row(self, name: str) -> dict[str, Any]:
        """The record's row of a length."""
        rows = self.record["rows"]
        if not any(row["length"] == name for row in rows):
            rows.append({"length": name, "prompt_tokens": tokens_of(name)})
        return next(row for row in rows if row["length"] == name)


def tokens_of(name: str) -> int:
    """Prompt tokens of a length."""
    return LENGTHS.get(name) or 1024 * int(name.removesuffix("k"))


def one_of_each(model: DiffusionLM, tokens: int) -> list[Run]:
    """A full forward; one that selects, and a sparse one."""
    full, sparse = Way("full attention"), Way("SparseD", PAPER)
    return [
        run(model, tokens, way, way.settings(model.family, NEW_TOKENS), few) for way, few in ((full, 1), (sparse, 2))
    ]


def whole_run(model: DiffusionLM, tokens: int) -> Run:
    """A whole generation with a dual cache and SparseD."""
    return run(model, tokens, WHOLE, WHOLE.settings(model.family, NEW_TOKENS))


def measure(model: DiffusionLM, tokens: int) -> dict[str, Any]:
    """Steps of each kind, and a whole generation."""
    steps = [one for _ in range(FEW) for one in one_of_each(model, tokens)]
    whole = whole_run(model, tokens)
    entry = entry_of(model, [*steps, whole]) | {"whole": measured([whole])}
    return entry | {"cached_step": cached_step(model, tokens), "full_step": full_step(model, tokens)}


def cached_step(model: DiffusionLM, tokens: int) -> dict[str, Any]:
    """Seconds of one cached step, and of its kernels by purpose: means of several, in this process."""
    return profiled_step(model, tokens, Way("dual cache", None, CACHE), SETTLED, PROFILED)


def full_step(model: DiffusionLM, tokens: int) -> dict[str, Any]:
    """The same of one full step, the second."""
    return profiled_step(model, tokens, Way("full attention"), 1, 1)


def profiled_step(model: DiffusionLM, tokens: int, way: Way, settled: int, count: int) -> dict[str, Any]:
    """Means of `count` steps of a way, after `settled` ones."""
    prompt = torch.randint(0, model.config.mask_token_id, (1, tokens), device=model.device)
    profiled = profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU])
    began = took = 0.0
    steps = 0

    def tick(step: Step) -> None:
        nonlocal began, took, steps
        steps += step.ran
        if steps == settled:
            synchronize(model.device)
            profiled.start()
            began = time.perf_counter()
        elif steps == settled + count:
            synchronize(model.device)
            took = time.perf_counter() - began
            profiled.stop()
            raise Enough

    with suppress(Enough):
        generate(model, prompt, way.settings(model.family, NEW_TOKENS), on_step=tick)
    kernels = {name: seconds / count for name, seconds in kernel_seconds(profiled).items()}
    return {"seconds": took / count, "purposes": by_purpose(kernels), "kernels": kernels}


def entry_of(model: DiffusionLM, runs: list[Run]) -> dict[str, Any]:
    """A record of runs: seconds by phase, and the largest memory of one process."""
    peaks = model.ranks.gathered(max(one.peak_memory_bytes for one in runs))
    return {"forwards": times_of(runs), "peak_memory_bytes": max(peaks), **runs[-1].kernel}


def measured_or_too_large(model: DiffusionLM, tokens: int) -> dict[str, Any]:
    """The same for one GPU, or a note that its memory is too small."""
    try:
        return measure(model, tokens)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}


def said(entry: dict[str, Any]) -> str:
    """An entry in words."""
    if "error" in entry:
        return str(entry["error"])
    steps = {phase: f"{found['median']:.4g} s" for phase, found in entry["forwards"].items()}
    whole = f", whole run {entry['whole']['seconds']:.4g} s" if "whole" in entry else ""
    words = ", ".join(f"{phase} {seconds}" for phase, seconds in steps.items())
    return f"{words}{whole}, {entry['peak_memory_bytes'] / 2**30:.1f} GiB on each"


def add_gains(row: dict[str, Any]) -> None:
    """How many times faster all GPUs together are than one."""
    one, every = row.get(ONE, {}), row.get(ALL, {})
    if "forwards" in one and "forwards" in every:
        gains = {
            phase: found["median"] / every["forwards"][phase]["median"] for phase, found in one["forwards"].items()
        }
        row["speedup"] = gains | {"whole": one["whole"]["seconds"] / every["whole"]["seconds"]}


@torch.no_grad()
def logits_of(model: DiffusionLM) -> Tensor:
    """Logits of a short prompt's last tokens."""
    ids = torch.arange(SHORT, device=model.device)[None] % model.config.mask_token_id
    return model(ids, first_row=SHORT - BLOCK_LENGTH).float()


def agreement(one: Tensor, together: Tensor) -> dict[str, float]:
    """How close the logits of all GPUs together are to those of one."""
    same = (one.argmax(-1) == together.argmax(-1)).float().mean()
    return {"relative_error": ((one - together).norm() / one.norm()).item(), "same_top_token": same.item()}


def against_one(bench: Bench, model: DiffusionLM) -> None:
    """Every length on one GPU, then on all of them."""
    names = bench.args.lengths
    wanted = logits_of(model)
    if bench.ranks.index == 0:
        warm(bench, model, ONE)
        for name in names:
            row = bench.row(name)
            row[ONE] = measured_or_too_large(model, row["prompt_tokens"])
            bench.note(f"{name}, one GPU: {said(row[ONE])}")
    bench.ranks.gathered(None)  # meanwhile the others wait
    share(bench, model)
    bench.record["agreement"] = agreement(wanted, logits_of(model))
    warm(bench, model, ALL)
    for name in names:
        row = bench.row(name)
        row[ALL] = measure(model, row["prompt_tokens"])
        add_gains(row)
        gains = {kind: round(gain, 2) for kind, gain in row.get("speedup", {}).items()}
        bench.note(f"{name}, {bench.ranks.count} GPUs: {said(row[ALL])}; times as fast: {gains}")


def longest(bench: Bench, model: DiffusionLM) -> None:
    """One step of each kind at the largest lengths, on all GPUs."""
    share(bench, model)
    warm(bench, model, ALL)
    row = bench.row(LONGEST_CACHED)
    row[ALL] = entry_of(model, [whole_run(model, row["prompt_tokens"])])
    bench.note(f"{LONGEST_CACHED}, dual cache: {said(row[ALL])}")
    row = bench.row(LONGEST)
    row[ALL] = entry_of(model, one_of_each(model, row["prompt_tokens"]))
    bench.note(f"{LONGEST}, no cache: {said(row[ALL])}")


def share(bench: Bench, model: DiffusionLM) -> None:
    """Leave each process its part of the model."""
    shard(model, bench.ranks)
    lay_projections_together(model)
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def warm(bench: Bench, model: DiffusionLM, who: str) -> None:
    """Run every kind of forward once, and record the time."""
    began = time.perf_counter()
    measure(model, WARM)
    bench.record["warm_up"][who] = time.perf_counter() - began
    bench.note(f"warm-up, {who}: {bench.record['warm_up'][who]:.1f} s")


def parse(argv: list[str] | None) -> tuple[Parser, argparse.Namespace]:
    """The flags, checked; a wrong call exits with code 2 after one line."""
    parser = build_parser("parallel", __doc__, lengths="64k", families=SHAPES)
    parser.add_argument("--longest", action="store_true", help="instead of --lengths: 128k and 512k on all GPUs")
    return parser, parse_arguments(parser, argv)


def compare(argv: list[str] | None, ranks: Ranks) -> None:
    """One process's whole call."""
    parser, args = parse(argv)
    device = require_gpu(parser)
    if ranks.count == 1:
        parser.error("needs several processes: torchrun --nproc_per_node 2 -m benchmarks.parallel ...")
    torch.manual_seed(0)  # the same weights in every process
    model = random_model(args.family, device)
    record = new_record(parser, args, device, DTYPE) | {"weights": "random", "processes": ranks.count, "rows": []}
    record |= {"new_tokens": NEW_TOKENS, "block_length": BLOCK_LENGTH, "warm_up": {}}
    (longest if args.longest else against_one)(Bench(args, ranks, record), model)


def main(argv: list[str] | None = None) -> int:
    advice = "name shorter --lengths, or start more processes"
    return as_one(lambda ranks: compare(argv, ranks), PROGRAM, advice=advice, ending=argv is None)


if __name__ == "__main__":
    raise SystemExit(main())
