"""The released code, for comparison: its process, and its measurements in the form of our record.

DIR is a checkout of the released repository with its dependencies except torch in DIR/site; benchmarks/README.md
has the commands that make one.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparsed import SparseDConfig
from sparsed.console.parser import Parser

from . import reference_worker
from .common import LENGTHS, NEW_TOKENS
from .phases import phases, split
from .shapes import published_config

FAMILIES = ("dream", "llada")
# up to this many prompt tokens: steps of a SparseD generation, and number of such generations; the last one counts
PLANS = ((8192, 20, 2), (16384, 10, 2), (sys.maxsize, 6, 1))
WARM, ORIGIN_STEPS = 1, 3  # full-attention steps: the first is a warm-up
LONE = "the only generation at this length: the compile time that torch counted is taken out of its steps"
NEEDED = ("models/LLaDA/generate.py", "models/Dream/generation_utils.py", "site/transformers")


def check_reference(
    parser: Parser, args: argparse.Namespace, code: str = "the released code", needed: Collection[str] = NEEDED
) -> None:
    """Exit with code 2 unless --reference is a checkout of this code, and it runs the family.

    Args:
        code: its name.
        needed: files that it must have.
    """
    if args.family not in FAMILIES:
        parser.error(f"argument --reference: {code} does not run {args.family}")
    lacking = next((name for name in needed if not (args.reference / name).exists()), None)
    if lacking is not None:
        parser.error(f"argument --reference: {args.reference} has no {lacking}")


def plan(name: str) -> dict[str, Any]:
    """How the released code is run at one length: its selection takes minutes at 64k, so there it runs once."""
    tokens = LENGTHS[name]
    steps, generations = next(rest for limit, *rest in PLANS if tokens <= limit)
    return {
        "length": name,
        "prompt_tokens": tokens,
        "origin_steps": WARM + (ORIGIN_STEPS if generations == 1 else 2 * ORIGIN_STEPS),
        "sparsed_steps": steps,
        "generations": generations,
    }


def measure(
    folder: Path, family: str, lengths: list[str], modes: list[str], config: SparseDConfig
) -> Iterator[dict[str, Any]]:
    """Run the released code in its own process: {"versions": ...}, then a record after each length.

    Raises:
        RuntimeError: the process failed; its own message is on stderr.
    """
    job = {
        "family": family,
        "shape": published_config(family),
        "device": "cuda",
        "new_tokens": NEW_TOKENS,
        "config": asdict(config),
        "modes": modes,
        "plans": [plan(name) for name in lengths],
    }
    yield from map(_converted, answers(reference_worker.__file__, job, folder, folder))


def answers(worker: str, job: dict[str, Any], folder: Path, code: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects that a worker prints in its own process.

    Args:
        worker: its file.
        job: its argument.
        folder: a checkout with the packages that it needs in `site`.
        code: the folder in it from which its modules are imported.

    Raises:
        RuntimeError: the process failed; its own message is on stderr.
    """
    command = [sys.executable, str(Path(worker).resolve()), json.dumps(job)]
    environment = _environment(folder, code)
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
    if process.returncode:
        raise RuntimeError(f"{Path(worker).stem} ended with exit code {process.returncode}")


def _environment(folder: Path, code: Path) -> dict[str, str]:
    """This process's environment with the reference's packages in place of ours."""
    paths = os.pathsep.join(map(str, (folder.resolve() / "site", code.resolve())))
    # safe path: the worker's own folder, ours, stays off the path
    return os.environ | {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}


def _converted(answer: dict[str, Any]) -> dict[str, Any]:
    """A line of the worker, with its runs in our form: phases, and the first use separately."""
    if "runs" not in answer:
        return answer
    runs = {f"released_{mode}": _run(run, mode) for mode, run in answer["runs"].items()}
    return answer | {"runs": runs}


def _run(run: dict[str, Any], mode: str) -> dict[str, Any]:
    generations = run["generations"]
    compiled = [sum(generation["compile_seconds"]) for generation in generations]
    warm = WARM if mode == "origin" else 0
    last = generations[-1]
    net = [s - c for s, c in zip(last["seconds"], last["compile_seconds"], strict=True)]
    return {
        **phases([split(net[warm:], run.get("n_full"))]),
        "steps": len(net) - warm,
        "generations": len(generations),
        "compile_seconds": sum(compiled),
        "first_use_seconds": _first_use(run, warm, sum(compiled)),
        "peak_memory_bytes": run["peak_memory_bytes"],
        "note": None if warm or len(generations) > 1 else LONE,
    }


def _first_use(run: dict[str, Any], warm: int, compiled: float) -> float:
    """Extra seconds of the first step or generation over a later one; of a single generation, the compile time."""
    first, last = run["generations"][0]["seconds"], run["generations"][-1]["seconds"]
    if warm:
        return first[0] - first[-1]
    return sum(first) - sum(last) if len(run["generations"]) > 1 else compiled
