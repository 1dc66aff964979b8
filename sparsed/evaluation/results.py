"""The results of an evaluation: a line for every sample, and a summary and a table made only of these lines."""

from collections.abc import Iterable, Sequence
from types import NoneType

import numpy as np

from ..sampling.saving import CACHES
from .folder import Record
from .methods import METHODS
from .scoring import mean_of, paired_difference, proportion

# the fields that distinguish ways to run; None if the method does not have it, or it was not wanted
NUMBERS = ("select", "skip", "block_size")
SAVED = ("cache", "refresh", "threshold", "factor")
VARIANT = ("method", *NUMBERS, *SAVED, "dense_answer")
FULL_ATTENTION = {**dict.fromkeys(VARIANT), "method": "origin"}
# a row's names and columns of an answer's work: the samples of a batch share its forwards and its time
WORK = {"forwards": "forwards of a batch", "seconds": "seconds per sample"}
DIFFERENCES = {
    "difference": "to full attention",
    "gain": "to the same without dense answer rows",
    "sparse": "to full attention with the same cache and threshold",
}
# the fields of a line that the summary reads, and their types
KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("id", "task"), (str,)),
    **dict.fromkeys(("length", "seed"), (int, NoneType)),
    **dict.fromkeys(("score", "density", "seconds"), (int, float)),
    **dict.fromkeys(NUMBERS, (int, float, NoneType)),
}


def identified(record: Record) -> tuple | None:
    """The key of an answer's line; None, or an error that `Folder` expects, if the summary cannot read it."""
    return key(record) if _readable(record) else None


def _readable(record: Record) -> bool:
    """Whether the summary can read a line's values."""
    return (
        all(isinstance(record[name], kinds) for name, kinds in KINDS.items())
        and all(isinstance(share, (int, float)) for share in record["recall"] or [])
        and 0 <= record["score"] <= 1
        and record["method"] in METHODS
        and record.get("dense_answer") in (None, True)
        and isinstance(record.get("forwards"), (int, NoneType))
        and all(isinstance(count, int) for count in (record.get("phases") or {}).values())
        and record.get("cache") in (None, *CACHES)
        and all(isinstance(record.get(name), (int, float, NoneType)) for name in SAVED[1:])
    )


def key(record: Record) -> tuple:
    """The key of a sample's line."""
    return (record["id"], *variant_of(record))


def variant_of(record: Record) -> tuple:
    """The way to run of a line, or of a row of the summary."""
    return tuple(_fields(record, *VARIANT).values())


def summarize(records: list[Record]) -> dict[str, list[Record]]:
    """Accuracy of each task, length and variant, and over the tasks of a length.

    Args:
        records: lines of the samples file.

    Returns:
        rows: one per cell: task, length, the variant, seeds, n, accuracy in percent with its Wilson interval (low and
            high), its difference to full attention on the same samples, its gain over the same variant without dense
            answer rows, its difference to full attention with the same cache and threshold (sparse; each None if there
            is nothing to compare with), density, recall (mean over layers, None without a pattern), recall_layers,
            seconds per sample, forwards of the sample's batch, and these by phase.
        averages: one per length and variant: the means over tasks of accuracy and difference, with 95 % intervals, and
            of density, seconds and forwards; the methods in the order of `METHODS`, whatever order they were run in.
    """
    records = sorted(records, key=lambda record: (record["length"] is None, record["length"]))
    scores = {key(record): record["score"] for record in records}
    cells = [_cell(group, scores) for group in groups(records, "task", "length", *VARIANT)]
    averages = []
    for group in groups(records, "length", *VARIANT):
        tasks = groups(group, "task")
        averages.append({**_fields(group[0], "length", *VARIANT), "tasks": len(tasks), **_accuracy(tasks, scores)})
    averages.sort(key=lambda row: list(METHODS).index(row["method"]))
    return {"rows": cells, "averages": averages}


def groups(records: list[Record], *names: str) -> list[list[Record]]:
    """Records with the same values of `names`, in the order in which these first occur."""
    found: dict[tuple, list[Record]] = {}
    for record in records:
        found.setdefault(tuple(_fields(record, *names).values()), []).append(record)
    return list(found.values())


def _fields(record: Record, *names: str) -> Record:
    return {name: record.get(name) for name in names}


def _cell(records: list[Record], known: dict[tuple, float]) -> Record:
    recalls = [record["recall"] for record in records if record["recall"] is not None]
    layers = np.mean(recalls, axis=0).tolist() if recalls else None
    return {
        **_fields(records[0], "task", "length", *VARIANT),
        "seeds": sorted({record["seed"] for record in records if record["seed"] is not None}),
        **_accuracy([records], known),
        "recall": None if layers is None else float(np.mean(layers)),
        "recall_layers": layers,
    }


def _accuracy(tasks: list[list[Record]], known: dict[tuple, float]) -> Record:
    """Accuracy over some tasks, and its differences to other variants' scores, which are known by their `key`."""
    records = [record for task in tasks for record in task]
    return {
        "n": len(records),
        **_named("accuracy", mean_of([proportion([record["score"] for record in task]) for task in tasks])),
        **_difference("difference", tasks, known, FULL_ATTENTION),
        **_difference("gain", tasks, known, {"dense_answer": None}),
        **_difference("sparse", tasks, known, _full_alike(records[0])),
        **{name: float(np.mean([record[name] for record in records])) for name in ("density", "seconds")},
        "forwards": _forwards(records),
        "phases": _phases(records),
    }


def _full_alike(record: Record) -> Record:
    """Full attention with the line's cache and threshold; the line itself if it has none."""
    saved = _fields(record, *SAVED)
    return FULL_ATTENTION | saved if any(value is not None for value in saved.values()) else {}


def _forwards(records: list[Record]) -> float | None:
    """A batch's forwards, averaged over its answers; None if lines are of earlier versions, which do not say."""
    counts = [record["forwards"] for record in records if record.get("forwards") is not None]
    return float(np.mean(counts)) if len(counts) == len(records) else None


def _phases(records: list[Record]) -> dict[str, float] | None:
    """The same by phase."""
    if any(record.get("phases") is None for record in records):
        return None
    names = dict.fromkeys(name for record in records for name in record["phases"])
    return {name: float(np.mean([record["phases"].get(name, 0) for record in records])) for name in names}


def _difference(name: str, tasks: list[list[Record]], known: dict[tuple, float], other: Record) -> Record:
    """How the scores differ from those of the same samples run another way; None unless all of these are known.

    Args:
        other: the fields of the variant that differ there.
    """
    first = tasks[0][0]
    same = variant_of({**first, **other}) == variant_of(first)
    if same or any(key({**record, **other}) not in known for task in tasks for record in task):
        return _named(name, (None, None, None))
    scores = [[record["score"] for record in task] for task in tasks]
    others = [[known[key({**record, **other})] for record in task] for task in tasks]
    return _named(name, mean_of(list(map(paired_difference, scores, others))))


def _named(name: str, interval: Iterable[float | None]) -> Record:
    """A value and its interval in percent, under their names in a row."""
    percent = [None if value is None else 100 * value for value in interval]
    return dict(zip(_columns(name), percent, strict=True))


def _columns(name: str) -> tuple[str, str, str]:
    prefix = "" if name == "accuracy" else f"{name}_"
    return name, f"{prefix}low", f"{prefix}high"


def table(summary: Record) -> str:
    """Markdown in the form of the paper's Table 1: one table per length, one line per variant, one column per task."""
    lengths = list(dict.fromkeys(row["length"] for row in summary["rows"]))
    above = ["With --early_stop.\n"] if summary.get("settings", {}).get("early_stop") else []
    return "\n".join([*above, *(_length_table(length, summary) for length in lengths)])


def between(counts: list[int]) -> str:
    """The lowest and the highest of counts, or the only one."""
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"


def _length_table(length: int | None, summary: Record) -> str:
    rows, averages = ([row for row in summary[name] if row["length"] == length] for name in ("rows", "averages"))
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    samples = between([row["n"] for row in rows])
    title = "prompts of your own" if length is None else f"{length:,} tokens"
    differences = {
        name: title
        for name, title in DIFFERENCES.items()
        if name == "difference" or any(average.get(name) is not None for average in averages)
    }
    work = WORK if all(average.get("forwards") is not None for average in averages) else {}
    columns = ["method", "density", *tasks, "average", *differences.values(), *work.values()]
    lines = []
    for average in averages:
        cells = {row["task"]: figure(row, "accuracy") for row in rows if variant_of(row) == variant_of(average)}
        line = [title_of(average), f"{average['density']:.2f}", *(cells.get(task, "-") for task in tasks)]
        line += [figure(average, "accuracy"), *(figure(average, name) for name in differences)]
        lines.append([*line, *(_work(average, name) for name in work)])
    text = f"### {title}\n\nAccuracy in %, 95 % intervals, {samples} samples per cell.\n\n"
    return f"{text}{markdown(columns, lines)}\n"


def markdown(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, without a line break at its end."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *lines))


def _work(average: Record, name: str) -> str:
    """An answer's work; forwards also by phase, if not all were full."""
    phases = average.get("phases") or {}
    kinds = ", ".join(f"{count:.3g} {phase}" for phase, count in phases.items())
    return f"{average[name]:.3g}" + (f" ({kinds})" if name == "forwards" and phases.keys() - {"full"} else "")


def title_of(row: Record) -> str:
    """The method's name, with its settings."""
    dense = ["dense answer rows"] if row.get("dense_answer") else []
    cache = [f"{row['cache']} cache"] if row.get("cache") else []
    numbers, saved = (
        [f"{name} {row[name]:g}" for name in names if row.get(name) is not None] for names in (NUMBERS, SAVED[1:])
    )
    return ", ".join([METHODS[row["method"]].title, *dense, *numbers, *cache, *saved])


def figure(row: Record, name: str) -> str:
    """A value with its interval; a difference has its sign."""
    if row[name] is None:
        return "-"
    sign = "" if name == "accuracy" else "+"
    value, low, high = (f"{row[column]:{sign}.1f}" for column in _columns(name))
    return f"{value} ({low} to {high})"
