"""Fast-dLLM's own code, for comparison: its process, and its measurements in the form of our record.

DIR is a checkout of its public repository with the packages that it needs, except torch, in DIR/site;
benchmarks/README.md has the commands that make one.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsed.sampling.common import CACHED
from sparsed.schedule import FULL

from . import fast_dllm_worker
from .common import LENGTHS, brief
from .reference import answers
from .shapes import published_config

NAME = "Fast-dLLM's code, dual cache"
NEEDED = ("llada/generate.py", "dream/model/generation_utils_block.py", "site/transformers", "site/einops")


def measure(
    folder: Path, family: str, lengths: list[str], new_tokens: int, block_length: int, steps: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    """{"versions": ...}, then after each length: {"length": ...} with "steps" in our form, or "error".

    Raises:
        RuntimeError: the process failed; its own message is on stderr.
    """
    job = {
        "family": family,
        "shape": published_config(family),
        "device": "cuda",
        "new_tokens": new_tokens,
        "block_length": block_length,
        "steps": steps,
        "lengths": {name: LENGTHS[name] for name in lengths},
    }
    for answer in answers(fast_dllm_worker.__file__, job, folder, folder / family):
        if "steps" in answer:
            rows = LENGTHS[answer["length"]] + new_tokens
            answer["steps"] = {steps: converted(run, rows) for steps, run in answer["steps"].items()}
        yield answer


def converted(run: dict[str, Any], rows: int) -> dict[str, Any]:
    """A generation's forwards by phase: those of all rows are full, the others cached."""
    seconds: dict[str, list[float]] = {}
    for computed, each in run["forwards"]:
        seconds.setdefault(FULL if computed == rows else CACHED, []).append(each)
    forwards = {phase: {"count": len(each), "seconds": brief(each)} for phase, each in seconds.items()}
    total = sum(map(sum, seconds.values()))
    return {"measured": True, "seconds": total, "forwards": forwards, "peak_memory_bytes": run["peak_memory_bytes"]}


def ratio(theirs: dict[str, Any], ours: dict[str, Any]) -> float:
    """How many times faster ours is with the same number of forwards of each kind, by their medians."""
    counts = {phase: part["count"] for phase, part in theirs["forwards"].items()}
    seconds = [
        sum(count * run["forwards"][phase]["seconds"]["median"] for phase, count in counts.items())
        for run in (theirs, ours)
    ]
    return seconds[0] / seconds[1]
