"""Pictures of a summary: accuracy of the methods by task, accuracy against density, recall by layer."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from .results import VARIANT, Record, groups, title_of, variant_of


def draw(summary: dict[str, list[Record]], folder: Path) -> None:
    """Write `accuracy.png`, where densities differ `density.png`, and where blocks were selected `recall.png`."""
    rows, averages = summary["rows"], summary["averages"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    _chart(folder / "accuracy.png", rows, partial(_bars, tasks, _titles(rows)), width=3 + 1.3 * len(tasks))
    if len({round(row["density"], 3) for row in averages if row["method"] != "origin"}) > 1:
        _chart(folder / "density.png", averages, _curves)
    if selected := [row for row in rows if row["recall_layers"]]:
        _chart(folder / "recall.png", selected, partial(_layers, _titles(selected)))


def _titles(rows: list[Record]) -> dict[tuple, str]:
    """The title of each variant, in the order of the rows."""
    return {variant_of(row): title_of(row) for row in rows}


def _chart(path: Path, rows: list[Record], fill: Callable[[Any, list[Record]], None], width: float = 6) -> None:
    """A panel for each length, which `fill` draws its rows in."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    lengths = groups(rows, "length")
    figure, panels = pyplot.subplots(len(lengths), 1, figsize=(width, 3.2 * len(lengths)), squeeze=False)
    for (panel,), found in zip(panels, lengths, strict=True):
        fill(panel, found)
        length = found[0]["length"]
        panel.set_title("" if length is None else f"{length:,} tokens", fontsize=9)
    # above the first panel, where it hides nothing
    panels[0][0].legend(fontsize=7, loc="lower left", bbox_to_anchor=(0, 1.1))
    figure.tight_layout()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def _errors(rows: list[Record]) -> list[list[float]]:
    """How far the intervals reach below and above the accuracies."""
    return [[row["accuracy"] - row["low"] for row in rows], [row["high"] - row["accuracy"] for row in rows]]


def _bars(tasks: list[str], titles: dict[tuple, str], panel: Any, rows: list[Record]) -> None:
    """A group for each task, a bar with its interval for each variant."""
    width = 0.8 / len(titles)
    for place, (variant, title) in enumerate(titles.items()):
        cells = [row for row in rows if variant_of(row) == variant]
        at = [tasks.index(row["task"]) + (place - (len(titles) - 1) / 2) * width for row in cells]
        heights = [row["accuracy"] for row in cells]
        panel.bar(at, heights, width, yerr=_errors(cells), color=f"C{place}", label=title)
    panel.set_xticks(range(len(tasks)), tasks, fontsize=8)
    panel.set_ylim(0, 105)
    panel.set_ylabel("accuracy, %")


def _curves(panel: Any, averages: list[Record]) -> None:
    """Average accuracy over density, a line for each method."""
    for rows in groups([{**row, "select": None} for row in averages], *VARIANT):
        rows.sort(key=lambda row: row["density"])
        densities, accuracies = [row["density"] for row in rows], [row["accuracy"] for row in rows]
        style = "x" if rows[0]["method"] == "origin" else "o-"
        panel.errorbar(densities, accuracies, _errors(rows), capsize=2, fmt=style, label=title_of(rows[0]))
    panel.set_xlabel("density")
    panel.set_ylabel("average accuracy, %")


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
