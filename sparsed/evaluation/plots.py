"""Pictures of a summary: accuracy of the methods by task, accuracy against density, recall by layer."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from .folder import Record
from .results import VARIANT, groups, title_of, variant_of
from .scoring import Interval


def draw(summary: dict[str, list[Record]], folder: Path) -> None:
    """Write `accuracy.png`; `density.png` if densities differ; `recall.png` if blocks were selected."""
    rows, averages = summary["rows"], summary["averages"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    chart(folder / "accuracy.png", _by_length(rows), partial(_bars, tasks, _titles(rows)), width=3 + 1.3 * len(tasks))
    if len({round(row["density"], 3) for row in averages if row["method"] != "origin"}) > 1:
        chart(folder / "density.png", _by_length(averages), partial(curves, _accuracy, "average accuracy, %"))
    if selected := [row for row in rows if row["recall_layers"]]:
        chart(folder / "recall.png", _by_length(selected), partial(_layers, _titles(selected)))


def _titles(rows: list[Record]) -> dict[tuple, str]:
    """The title of each variant, in the order of the rows."""
    return {variant_of(row): title_of(row) for row in rows}


def _by_length(rows: list[Record]) -> dict[str, list[Record]]:
    """The rows of each length, under the title of their panel."""
    titled = ((found[0]["length"], found) for found in groups(rows, "length"))
    return {"" if length is None else f"{length:,} tokens": found for length, found in titled}


def chart(
    path: Path, panels: dict[str, list[Record]], fill: Callable[[Any, list[Record]], None], width: float = 6
) -> None:
    """Write a picture with a panel for each title; `fill` draws the rows in it."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(panels), 1, figsize=(width, 3.2 * len(panels)), squeeze=False)
    for (panel,), (title, found) in zip(axes, panels.items(), strict=True):
        fill(panel, found)
        panel.set_title(title, fontsize=9)
    # above the first panel, where it hides nothing
    axes[0][0].legend(fontsize=7, loc="lower left", bbox_to_anchor=(0, 1.1))
    figure.tight_layout()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def _accuracy(row: Record) -> Interval:
    return row["accuracy"], row["low"], row["high"]


def _errors(intervals: list[Interval]) -> list[list[float]]:
    """How far the intervals reach below and above their values."""
    return [[value - low for value, low, _ in intervals], [high - value for value, _, high in intervals]]


def _bars(tasks: list[str], titles: dict[tuple, str], panel: Any, rows: list[Record]) -> None:
    """A group for each task, a bar with its interval for each variant."""
    width = 0.8 / len(titles)
    for place, (variant, title) in enumerate(titles.items()):
        cells = [row for row in rows if variant_of(row) == variant]
        at = [tasks.index(row["task"]) + (place - (len(titles) - 1) / 2) * width for row in cells]
        heights = [row["accuracy"] for row in cells]
        panel.bar(at, heights, width, yerr=_errors(list(map(_accuracy, cells))), color=f"C{place}", label=title)
    panel.set_xticks(range(len(tasks)), tasks, fontsize=8)
    panel.set_ylim(0, 105)
    panel.set_ylabel("accuracy, %")


def curves(
    value: Callable[[Record], Interval],
    label: str,
    panel: Any,
    rows: list[Record],
    over: str = "density",
    varied: Sequence[str] = ("select",),
) -> None:
    """A value of the rows against a number of theirs, one line for each way to run.

    Args:
        value: of a row, with its interval.
        label: of the values.
        over: the number.
        varied: what differs along a line.
    """
    for found in groups([{**row, **dict.fromkeys(varied)} for row in rows], *VARIANT):
        found.sort(key=lambda row: row[over])
        intervals = list(map(value, found))
        numbers, values = [row[over] for row in found], [middle for middle, _, _ in intervals]
        style = "x" if len(found) == 1 else "o-"
        panel.errorbar(numbers, values, _errors(intervals), capsize=2, fmt=style, label=title_of(found[0]))
    panel.set_xlabel(over)
    panel.set_ylabel(label)


def _layers(titles: dict[tuple, str], panel: Any, rows: list[Record]) -> None:
    """The share of attention that the selected blocks hold, layer by layer, the mean over tasks."""
    for place, (variant, title) in enumerate(titles.items()):
        found = [row["recall_layers"] for row in rows if variant_of(row) == variant]
        if found:
            means = list(map(fmean, zip(*found, strict=True)))
            panel.plot(range(len(means)), means, "o-", color=f"C{place}", label=title)
    panel.set_xlabel("layer")
    panel.set_ylabel("attention held")
    panel.set_ylim(0, 1.05)
