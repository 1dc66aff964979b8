"""Pictures of a summary: accuracy of the methods by task, accuracy against density, recall by layer."""

from pathlib import Path
from typing import Any

from .results import Record, title_of, variant_of


def draw(summary: dict[str, list[Record]], folder: Path) -> None:
    """Write `accuracy.png`, where densities differ `density.png`, and where blocks were chosen `recall.png`."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    _draw_accuracy(pyplot, summary, folder / "accuracy.png")
    if len({round(row["density"], 3) for row in summary["averages"] if row["method"] != "origin"}) > 1:
        _draw_density(pyplot, summary, folder / "density.png")
    if any(row["recall_layers"] for row in summary["rows"]):
        _draw_recall(pyplot, summary, folder / "recall.png")


def _lengths(rows: list[Record]) -> list[int | None]:
    return list(dict.fromkeys(row["length"] for row in rows))


def _panels(pyplot: Any, count: int, width: float) -> tuple[Any, list[Any]]:
    figure, panels = pyplot.subplots(count, 1, figsize=(width, 3.2 * count), squeeze=False)
    return figure, [row[0] for row in panels]


def _legend(panel: Any) -> None:
    """Above the first panel, where it hides nothing."""
    panel.legend(fontsize=7, loc="lower left", bbox_to_anchor=(0, 1.1))


def _save(pyplot: Any, figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def _draw_accuracy(pyplot: Any, summary: dict[str, list[Record]], path: Path) -> None:
    """Bars with intervals: a panel for each length, a group for each task, a bar for each variant."""
    rows = summary["rows"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    shown = list(dict.fromkeys(map(variant_of, rows)))
    figure, panels = _panels(pyplot, len(_lengths(rows)), 3 + 1.3 * len(tasks))
    for panel, length in zip(panels, _lengths(rows), strict=True):
        width = 0.8 / len(shown)
        for place, variant in enumerate(shown):
            cells = [row for row in rows if row["length"] == length and variant_of(row) == variant]
            at = [tasks.index(row["task"]) + (place - (len(shown) - 1) / 2) * width for row in cells]
            errors = [
                [row["accuracy"] - row["low"] for row in cells],
                [row["high"] - row["accuracy"] for row in cells],
            ]
            named = next(row for row in rows if variant_of(row) == variant)
            heights = [row["accuracy"] for row in cells]
            panel.bar(at, heights, width, yerr=errors, color=f"C{place}", label=title_of(named))
        panel.set_xticks(range(len(tasks)), tasks, fontsize=8)
        panel.set_ylim(0, 105)
        panel.set_ylabel("accuracy, %")
        panel.set_title("" if length is None else f"{length:,} tokens", fontsize=9)
    _legend(panels[0])
    _save(pyplot, figure, path)


def _draw_density(pyplot: Any, summary: dict[str, list[Record]], path: Path) -> None:
    """Average accuracy over density: a panel for each length, a line for each method."""
    averages = summary["averages"]
    figure, panels = _panels(pyplot, len(_lengths(averages)), 6)
    for panel, length in zip(panels, _lengths(averages), strict=True):
        curves: dict[tuple, list[Record]] = {}
        for row in averages:
            if row["length"] == length:
                curves.setdefault(variant_of({**row, "select": None}), []).append(row)
        for rows in curves.values():
            rows.sort(key=lambda row: row["density"])
            errors = [[row["accuracy"] - row["low"] for row in rows], [row["high"] - row["accuracy"] for row in rows]]
            panel.errorbar(
                [row["density"] for row in rows], [row["accuracy"] for row in rows], errors, capsize=2,
                fmt="x" if rows[0]["method"] == "origin" else "o-",
                label=title_of({**rows[0], "select": None}),
            )  # fmt: skip
        panel.set_xlabel("density")
        panel.set_ylabel("average accuracy, %")
        panel.set_title("" if length is None else f"{length:,} tokens", fontsize=9)
    _legend(panels[0])
    _save(pyplot, figure, path)


def _draw_recall(pyplot: Any, summary: dict[str, list[Record]], path: Path) -> None:
    """The share of attention that the chosen blocks hold, layer by layer, the mean over tasks."""
    rows = [row for row in summary["rows"] if row["recall_layers"]]
    figure, panels = _panels(pyplot, len(_lengths(rows)), 6)
    for panel, length in zip(panels, _lengths(rows), strict=True):
        variants = dict.fromkeys(map(variant_of, rows))
        for place, variant in enumerate(variants):
            found = [row for row in rows if row["length"] == length and variant_of(row) == variant]
            if found:
                layers = [
                    sum(layer) / len(found) for layer in zip(*(row["recall_layers"] for row in found), strict=True)
                ]
                panel.plot(range(len(layers)), layers, "o-", color=f"C{place}", label=title_of(found[0]))
        panel.set_xlabel("layer")
        panel.set_ylabel("attention held")
        panel.set_ylim(0, 1.05)
        panel.set_title("" if length is None else f"{length:,} tokens", fontsize=9)
    _legend(panels[0])
    _save(pyplot, figure, path)
