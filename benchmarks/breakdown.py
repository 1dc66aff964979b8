"""Where the GPU's time goes in a full step, in the one that selects the blocks, and in a sparse step.

    python -m benchmarks.breakdown --family llada --lengths 4k,64k --out FILE.json

Random weights at the published shape, batch 1, 128 new tokens, bfloat16, greedy, default SparseD. After a first
generation that compiles, four steps run under PyTorch's profiler: full, selecting, sparse, sparse; the last one counts.
Kernels are distinguished by their names; the record holds every kernel's own seconds. The profiler slows the host
down, so do not quote a step's wall time from here.
"""

import argparse
import re
import time
from dataclasses import replace
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from sparsed import SparseDConfig, sparsify
from sparsed.evaluation.results import markdown
from sparsed.run import synchronize
from sparsed.sampling.common import Step

from .common import LENGTHS, NEW_TOKENS, build_parser, new_record, parse_arguments, require_gpu, save
from .latency import sample
from .shapes import SHAPES, random_model

FULL, SPARSE = 2, 2  # steps; the second full one selects
COUNTED = {"full": 0, "choosing": 1, "sparse": 3}  # the step that represents its kind
# a kernel's purpose, by the first pattern in its name; attention's patterns come first: its names hold CUTLASS too
PURPOSES = {
    "attention": r"flash|fmha|attention|_block_sparse|_part_kernel|_join_kernel",
    "sums over GPUs": r"nccl",
    "block scores": r"_block_scores",
    "linear layers": r"gemm|nvjet|cutlass|xmma|splitk",
    "norm, rotary, MLP product": r"_rms_norm|_rotate|_silu_product",
    "sorting": r"sort|topk",
}
OTHER = "other"
MARK = "nccl:"  # PyTorch marks a call of NCCL beside its kernel


def purpose(kernel: str) -> str:
    """The purpose of a kernel of this name, one of `PURPOSES` or `OTHER`."""
    return next((name for name, pattern in PURPOSES.items() if re.search(pattern, kernel, re.IGNORECASE)), OTHER)


def by_purpose(kernels: dict[str, float]) -> dict[str, float]:
    """The seconds of kernels, by name, summed by purpose."""
    sums = dict.fromkeys([*PURPOSES, OTHER], 0.0)
    for name, seconds in kernels.items():
        if not name.startswith(MARK):
            sums[purpose(name)] += seconds
    return sums


def kernel_seconds(profiled: profile) -> dict[str, float]:
    """The GPU's seconds by kernel, the longest first, with copies and fills of memory, and marks of NCCL's calls."""
    events = [event for event in profiled.key_averages() if event.device_type == DeviceType.CUDA]
    found = {event.key: event.self_device_time_total / 1e6 for event in events}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def profiled_steps(model: torch.nn.Module, prompt: torch.Tensor) -> list[dict[str, Any]]:
    """Wall seconds and kernels of each step of a short generation."""
    steps: list[dict[str, Any]] = []

    def begin() -> profile:
        synchronize(model.device)
        running = profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU])
        running.start()
        return running

    def tick(_: Step) -> None:
        nonlocal running, last
        synchronize(model.device)
        seconds = time.perf_counter() - last
        running.stop()
        steps.append({"wall_seconds": seconds, "kernels": kernel_seconds(running)})
        running, last = begin(), time.perf_counter()

    config = replace(SparseDConfig(), skip=FULL / (FULL + SPARSE))
    with sparsify(model, config, steps=FULL + SPARSE, gen_length=NEW_TOKENS):
        running, last = begin(), time.perf_counter()
        sample(model, prompt, FULL + SPARSE, tick)
        running.stop()
    return steps


def measure(model: torch.nn.Module, tokens: int) -> dict[str, dict[str, Any]]:
    """The steps of each kind at one length."""
    prompt = torch.randint(0, model.config.mask_token_id, (1, tokens), device=model.device)
    profiled_steps(model, prompt)  # compiles
    steps = profiled_steps(model, prompt)
    return {kind: {**steps[index], "purposes": by_purpose(steps[index]["kernels"])} for kind, index in COUNTED.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds of the GPU by purpose, a line for each length and kind of step."""
    lines = []
    for row in rows:
        for kind, step in row["steps"].items():
            times = [f"{1e3 * seconds:.2f}" for seconds in step["purposes"].values()]
            lines.append([row["length"], kind, *times, f"{1e3 * sum(step['purposes'].values()):.1f}"])
    return markdown(["prompt", "step", *PURPOSES, OTHER, "together, ms"], lines)


def parse(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The flags, checked; a wrong call exits with code 2 after one line."""
    parser = build_parser("breakdown", __doc__, lengths="4k,64k", families=SHAPES)
    return parser, parse_arguments(parser, argv)


def main(argv: list[str] | None = None) -> None:
    parser, args = parse(argv)
    device = require_gpu(parser)
    torch.manual_seed(0)
    model = random_model(args.family, device)
    record = new_record(parser, args, device, torch.bfloat16) | {"weights": "random", "new_tokens": NEW_TOKENS}
    record["rows"] = []
    for name in args.lengths:
        record["rows"].append({"length": name, "prompt_tokens": LENGTHS[name], "steps": measure(model, LENGTHS[name])})
        save(args.out, record)
        print(f"{name}: done", flush=True)
    print(table(record["rows"]))


if __name__ == "__main__":
    main()
