"""From the times of a few steps to those of a whole run: a step's time depends only on its phase."""

import statistics
from dataclasses import dataclass, field
from typing import Any

from sparsed import SparseDConfig
from sparsed.report.record import forwards_of, prefix
from sparsed.report.summary import ORDER, selection_seconds

from .common import summary
from .reference_worker import released_n_full

WHOLE = (128, 1024)  # steps of the whole runs; the second is extrapolated from the same phases
RUNS = {
    "origin": "ours, --origin",
    "sparsed": "ours, SparseD",
    "released_origin": "released, --origin",
    "released_sparsed": "released, SparseD",
}


@dataclass(frozen=True)
class Steps:
    """Seconds of the steps of one generation, without compilation: full ones, the selecting one's extra time over their
    median, sparse ones, and the selecting one itself."""

    full: list[float]
    selection: float | None
    sparse: list[float]
    selecting: list[float] = field(default_factory=list)


def split(seconds: list[float], n_full: int | None = None) -> Steps:
    """The steps of one generation by phase; without `n_full` all of them are full.

    Steps of 0.0 s are left out: they commit no token, and the sampler did not run the model.
    """
    phases = prefix([s > 0 for s in seconds], n_full or len(seconds), selects=n_full is not None)
    forwards = forwards_of(phases, seconds, rows=[0] * len(phases), history=[])  # the number of rows is never used
    full, selecting, sparse = ([step.seconds for step in forwards if step.phase == phase] for phase in ORDER)
    return Steps(full, selection_seconds(forwards), sparse, selecting)


def phases(generations: list[Steps]) -> dict[str, Any]:
    """The samples of all generations by phase; None for a phase without any."""
    return {
        "full_step": summary([s for steps in generations for s in steps.full]),
        "selection": summary([steps.selection for steps in generations if steps.selection is not None]),
        "sparse_step": summary([s for steps in generations for s in steps.sparse]),
    }


def setup_seconds(generations: list[Steps]) -> float:
    """The extra time of a generation's full and sparse steps over their medians, as the median over generations: short
    prompts capture graphs there."""
    extra = [
        sum(sum(kind) - len(kind) * statistics.median(kind) for kind in (steps.full, steps.sparse) if kind)
        for steps in generations
    ]
    return statistics.median(extra)


def whole_run(run: dict[str, Any], steps: int, n_full: int | None) -> float | None:
    """Seconds of a whole run put together: n_full full steps, the selection and sparse steps at their medians, setup.

    All steps are full without `n_full`; None if a phase of the run was not measured.
    """
    setup = run.get("setup_seconds", 0.0)
    if n_full is None:
        return run["full_step"] and steps * run["full_step"]["median"] + setup
    found = [run[name] and run[name]["median"] for name in ("full_step", "selection", "sparse_step")]
    if None in found:
        return None
    full, selection, sparse = found
    return n_full * full + selection + (steps - n_full) * sparse + setup


def bound(skip: float, full: float, sparse: float) -> float:
    """The limit of the speed-up over full attention for many steps, from seconds of a full and of a sparse step."""
    return 1 / (skip + (1 - skip) * sparse / full)


def derive(runs: dict[str, dict[str, Any]], config: SparseDConfig) -> dict[str, Any]:
    """Whole runs in seconds, and how many times faster ours with SparseD is than each of the others."""
    whole = {steps: _whole_runs(runs, config, steps) for steps in WHOLE}
    speedup = {
        steps: {name: other / times["sparsed"] for name, other in times.items() if name != "sparsed"}
        for steps, times in whole.items()
        if times.get("sparsed")
    }
    answer = {"whole_seconds": whole, "speedup": speedup, "bound": None}
    if {"origin", "sparsed"} <= whole[WHOLE[0]].keys():
        full, sparse = runs["origin"]["full_step"]["median"], runs["sparsed"]["sparse_step"]["median"]
        answer["bound"] = bound(config.skip, full, sparse)
    return _text_keys(answer)


def _whole_runs(runs: dict[str, dict[str, Any]], config: SparseDConfig, steps: int) -> dict[str, float]:
    n_full = {"sparsed": config.n_full(steps), "released_sparsed": released_n_full(steps, config.skip)}
    times = {name: whole_run(run, steps, n_full.get(name)) for name, run in runs.items()}
    measured = {name: runs[name].get("measured_whole_seconds") for name in ("origin", "sparsed") if name in runs}
    # runs of one kind: measured ones lack the steps that commit nothing, those put together have them
    if steps == WHOLE[0] and all(measured.values()):
        times |= measured
    return {name: time for name, time in times.items() if time is not None}


def _text_keys(value: Any) -> Any:
    """Keys as in JSON, so that a record reads back unchanged."""
    return {str(key): _text_keys(item) for key, item in value.items()} if isinstance(value, dict) else value
