"""Markdown tables and a plot of the records that `benchmarks.latency` wrote.

    python -m benchmarks.plot benchmarks/results/latency-*.json --out latency.png

The plot needs matplotlib; without it, one line says so.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

from sparsed.console.parser import Parser
from sparsed.evaluation.results import markdown

from .phases import RUNS, WHOLE

COLUMNS = [
    "model", "prompt", "code", "full step", "selection", "sparse step", *(f"{steps:,} steps" for steps in WHOLE),
    "peak memory", *(f"our SparseD gains, {steps:,} steps" for steps in WHOLE), "gains at most",
]  # fmt: skip
FAILURES = (("error", "ours"), ("reference_error", "released"))


def table(records: list[dict[str, Any]]) -> str:
    """A line for each length and code: seconds per step by phase, whole runs, peak memory, speed-ups."""
    lines = []
    for record in records:
        for row in record["rows"]:
            lines += [_line(record["family"], row, name) for name in RUNS if name in row["runs"]]
            lines += [_failure(record["family"], row, f"{who}: {row[key]}") for key, who in FAILURES if key in row]
    return markdown(COLUMNS, lines)


def overview(records: list[dict[str, Any]]) -> str:
    """A line for each length: our steps, how many times faster a whole run with SparseD is than others, memory."""
    columns = [
        "model", "prompt", "full step", "sparse step", "selecting blocks", f"{WHOLE[0]} steps", "than --origin",
        "than released --origin", "than released SparseD", "peak memory (released)",
    ]  # fmt: skip
    rows = [(record["family"], row) for record in records for row in record["rows"] if "sparsed" in row["runs"]]
    rows.sort(key=lambda item: (item[0], item[1]["prompt_tokens"]))
    return markdown(columns, [_overview_line(family, row) for family, row in rows])


def _overview_line(family: str, row: dict[str, Any]) -> list[str]:
    runs, steps = row["runs"], str(WHOLE[0])
    full = runs.get("origin", runs["sparsed"])["full_step"]
    chosen = runs["sparsed"]["selection"] if runs["sparsed"]["backend"] != "full" else None
    sparse = runs["sparsed"]["sparse_step"] if chosen else None
    memory = [
        f"{runs[name]['peak_memory_bytes'] / 1e9:.0f}" if runs.get(name, {}).get("peak_memory_bytes") else "-"
        for name in ("sparsed", "released_sparsed")
    ]
    return [
        family,
        row["length"],
        *(_seconds(phase and phase["median"]) for phase in (full, sparse, chosen)),
        _seconds(row["whole_seconds"][steps].get("sparsed")),
        *(_times(row["speedup"][steps].get(name)) for name in ("origin", "released_origin", "released_sparsed")),
        f"{memory[0]} GB ({memory[1]})",
    ]


def _failure(family: str, row: dict[str, Any], text: str) -> list[str]:
    return [family, row["length"], text, *["-"] * (len(COLUMNS) - 3)]


def _line(family: str, row: dict[str, Any], name: str) -> list[str]:
    run = row["runs"][name]
    speedups = [row["speedup"].get(str(steps), {}).get(name) for steps in WHOLE]
    limit = row["bound"] if name == "origin" else None
    backend = f" ({run['backend']})" if run.get("backend") else ""
    return [
        family,
        row["length"],
        RUNS[name] + backend,
        *(_seconds(run[phase] and run[phase]["median"]) for phase in ("full_step", "selection", "sparse_step")),
        *(_seconds(row["whole_seconds"][str(steps)].get(name)) for steps in WHOLE),
        "-" if run["peak_memory_bytes"] is None else f"{run['peak_memory_bytes'] / 1e9:.1f} GB",
        *(_times(value) for value in (*speedups, limit)),
    ]


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f} s" if value >= 100 else f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def draw(records: list[dict[str, Any]], path: Path) -> str:
    """Draw whole runs at each length, with a panel for each family; returns a line about the result."""
    if importlib.util.find_spec("matplotlib") is None:
        return 'no plot: matplotlib is not installed (pip install ".[plots]")'
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    families = sorted({record["family"] for record in records})
    figure, panels = pyplot.subplots(len(families), figsize=(9, 3.6 * len(families)), squeeze=False)
    for panel, family in zip(panels[:, 0], families, strict=True):
        _panel(panel, family, [row for record in records if record["family"] == family for row in record["rows"]])
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return f"plot: {path}"


def _panel(panel: Any, family: str, rows: list[dict[str, Any]]) -> None:
    rows = sorted(rows, key=lambda row: row["prompt_tokens"])
    shown = [name for name in RUNS if any(name in row["runs"] for row in rows)]
    slowest = [max(row["whole_seconds"][str(WHOLE[0])].values(), default=1.0) for row in rows]
    for place, name in enumerate(shown):
        seconds = [row["whole_seconds"][str(WHOLE[0])].get(name, 0) for row in rows]
        middle = [index + (place - (len(shown) - 1) / 2) * 0.2 for index in range(len(rows))]
        heights = [each / most for each, most in zip(seconds, slowest, strict=True)]
        bars = panel.bar(middle, heights, width=0.2, label=RUNS[name])
        panel.bar_label(bars, [_seconds(each).removesuffix(" s") if each else "" for each in seconds], fontsize=7)
    panel.set_xticks(range(len(rows)), [row["length"] for row in rows])
    panel.set_xlabel("prompt")
    panel.set_ylabel(f"{WHOLE[0]} steps, slowest = 1 (bars: seconds)")
    panel.set_title(family)
    panel.margins(y=0.3)
    panel.legend(fontsize=8, loc="upper left", ncols=2)


def read(parser: Parser, paths: list[Path]) -> list[dict[str, Any]]:
    """The records in the files; exits with code 2 if one is no record of `benchmarks.latency`."""
    records = []
    for path in paths:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            parser.error(f"{path}: {error}")
        if not isinstance(record, dict) or not all("whole_seconds" in row for row in record.get("rows", [{}])):
            parser.error(f"{path}: no record of benchmarks.latency")
        records.append(record)
    return records


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("records", type=Path, nargs="+", metavar="FILE.json")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    args = parser.parse_args(argv)
    records = read(parser, args.records)
    try:
        print(draw(records, args.out))
    except (OSError, ValueError) as error:
        parser.error(f"argument --out: {error}")
    print(f"{table(records)}\n\n{overview(records)}")


if __name__ == "__main__":
    main()
