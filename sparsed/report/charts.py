"""Where the marks of the page's charts stand, in percent of the plot, so that a chart is as wide as its place."""

import math
from typing import Any

from .record import Layer, Phase, RunRecord
from .summary import FEW_ROWS, LABELS, attention

# the name of each phase, and what its steps compute
PHASES = {
    "full_steps": ("full steps", "full attention"),
    "selection": ("selection", "full attention and selection"),
    "sparse_steps": ("sparse steps", "sparse attention"),
    "answer_steps": ("answer steps", "the answer's rows, over the cached prompt"),
    "cached_steps": ("cached steps", "a block's rows, over cached keys"),
}
KINDS = {Phase.FULL: "full_steps", Phase.SELECTING: "selection", Phase.SPARSE: "sparse_steps", **FEW_ROWS}
SHORTEST = 1e-6  # seconds that a scale spans at least


def duration(seconds: float) -> str:
    """A time as it is shown, with about three digits."""
    if seconds < 1:
        return f"{1000 * seconds:.1f} ms" if seconds < 0.01 else f"{1000 * seconds:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 100 else f"{seconds:,.0f} s"


def ticks(highest: float) -> list[float]:
    """At most five round numbers from 0 on, evenly spaced; the last is at least `highest`, which is positive."""
    power = 10 ** math.floor(math.log10(highest / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor * 4 >= highest * (1 - 1e-9))
    return [step * index for index in range(math.ceil(highest / step * (1 - 1e-9)) + 1)]


def step_chart(runs: list[RunRecord]) -> dict[str, Any]:
    """One row of bars a run, a bar a step, all to one scale.

    Returns:
        `ticks` (y, label), `rows`: the label and the bars (x, y, width, height, phase, title) of each run,
        `steps`: of the longest run, and `legend`: the phases among the bars, with what they compute.
    """
    steps = max(len(run.forwards) for run in runs)
    marks = ticks(max(SHORTEST, *(forward.seconds for run in runs for forward in run.forwards)))
    bars = [_step_bars(run, steps, marks[-1]) for run in runs]
    rows = [{"label": LABELS[run.mode], "bars": own} for run, own in zip(runs, bars, strict=True)]
    drawn = {bar["phase"] for own in bars for bar in own}
    legend = [(phase, text) for phase, (_, text) in PHASES.items() if phase in drawn]
    return {"ticks": _tick_marks(marks, duration), "rows": rows, "steps": steps, "legend": legend}


def _step_bars(run: RunRecord, steps: int, highest: float) -> list[dict[str, Any]]:
    bars = []
    for index, (forward, kind) in enumerate(zip(run.forwards, attention(run.forwards), strict=True)):
        what = duration(forward.seconds) if forward.seconds else "ran no model"
        bars.append(_bar(index, steps, forward.seconds / highest, KINDS[kind], f"step {index + 1}: {what}"))
    return bars


def layer_chart(layers: list[Layer]) -> dict[str, Any]:
    """For each layer the share of pairs that it reads, and of the attention that these hold, as two bars."""
    marks = [0, 0.25, 0.5, 0.75, 1]
    bars = []
    for index, layer in enumerate(layers):
        what = f"layer {index}: reads {layer.density:.1%} of the pairs, which hold {layer.recall:.1%}"
        bars.append(_bar(index, len(layers), layer.recall, "recall", what))
        bars.append(_bar(index, len(layers), layer.density, "density", what))
    return {"ticks": _tick_marks(marks, "{:.0%}".format), "rows": [{"label": "", "bars": bars}]}


def _bar(index: int, count: int, share: float, phase: str, title: str) -> dict[str, Any]:
    return {
        "x": _percent((index + 0.1) / count),
        "width": _percent(0.8 / count),
        "y": _percent(1 - share),
        "height": _percent(share),
        "phase": phase,
        "title": title,
    }


def _tick_marks(marks: list[float], label: Any) -> list[tuple[str, str]]:
    return [(_percent(1 - mark / marks[-1]), label(mark) if mark else "0") for mark in marks]


def _percent(share: float) -> str:
    return f"{100 * share:.3f}%"


def time_bars(runs: list[RunRecord], seconds: dict[str, dict[str, float | None]]) -> list[dict[str, Any]]:
    """One bar a run, as long as its time, in parts for the phases that it has."""
    longest = max(SHORTEST, *(run.seconds for run in runs))
    bars = []
    for run in runs:
        parts, left = [], 0.0
        for phase in filter(seconds[run.mode].__contains__, PHASES):
            name, share = PHASES[phase][0], max(0.0, seconds[run.mode][phase] or 0.0) / longest
            # of full attention's steps, those that SparseD makes sparse are full too
            kind = "full_steps" if run.mode == "origin" and phase not in FEW_ROWS.values() else phase
            title = f"{name}: {duration(share * longest)}"
            parts.append({"x": _percent(left), "width": _percent(share), "phase": kind, "title": title})
            left += share
        bars.append({"label": LABELS[run.mode], "total": duration(run.seconds), "parts": parts})
    return bars
