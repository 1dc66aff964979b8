"""What an evaluation leaves: a line for every sample, and a summary and a table made only of these lines."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from ..console.files import write_json, write_text
from ..sampling.saving import OFF
from .methods import METHODS
from .scoring import mean_of, paired_difference, proportion

SAMPLES, RUN, SUMMARY, TABLE = "samples.jsonl", "run.json", "summary.json", "table.md"
# what tells one way to run from another; None where it means nothing to the method or was not asked for
NUMBERS = ("select", "skip", "block_size")
VARIANT = ("method", *NUMBERS, "dense_answer")
# what settings mean that a folder does not name
DEFAULTS: dict[str, Any] = {**OFF, "refresh": 1}
# the columns of what an answer took, by their names in a row: the samples of a batch share its forwards and its time
WORK = {"forwards": "forwards of a batch", "seconds": "seconds a sample"}
# what the summary reads of a line, and of which kinds it may be
KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("id", "task"), (str,)),
    **dict.fromkeys(("length", "seed"), (int, NoneType)),
    **dict.fromkeys(("score", "density", "seconds"), (int, float)),
    **dict.fromkeys(NUMBERS, (int, float, NoneType)),
}

Record = dict[str, Any]


class OtherRun(ValueError):
    """The folder holds results of other settings."""


@dataclass(frozen=True)
class Folder:
    """The folder of one evaluation, which several processes may write to.

    Each process appends its finished samples to a file of its own. In the end these become one file in the order of the
    plan, so the result does not depend on their number.
    """

    path: Path
    process: int = 0

    def claim(self, settings: Record, call: Record) -> None:
        """Make the folder this run's, or go on with the run that it holds.

        Args:
            settings: what decides the results.
            call: what else is worth knowing of this call: command, date, environment.

        Raises:
            OtherRun: it holds results of other settings, or files that are none of an evaluation's.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / RUN
        if not file.is_file() and any(self.path.iterdir()):
            raise OtherRun(f"{self.path} is not empty and holds no evaluation: choose another folder")
        known: Record = about(file) if file.is_file() else {"settings": settings, "calls": []}
        before = known["settings"]
        meant, meant_before = DEFAULTS | settings, DEFAULTS | before
        changed = [name for name in meant | meant_before if meant.get(name) != meant_before.get(name)]
        if changed and self.finished():
            difference = f"{changed[0]} {_said(meant_before.get(changed[0]))}, now {_said(meant.get(changed[0]))}"
            raise OtherRun(f"{self.path} holds results of another configuration ({difference}): choose another folder")
        if self.process == 0:
            calls = [] if changed else known["calls"]
            write_json(file, {"settings": settings, "calls": [*calls, call]})

    def finished(self) -> dict[tuple, Record]:
        """The samples that are there, by `key`; lines that a crash cut off, or that are not ours, do not count."""
        found = {}
        for file in (self.path / SAMPLES, *self._parts()):
            for line in file.read_bytes().split(b"\n")[:-1] if file.is_file() else ():
                try:
                    record = json.loads(line)
                    if _readable(record):
                        found[key(record)] = record
                except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                    continue
        return found

    def append(self, records: Iterable[Record]) -> None:
        """Add finished samples to this process's own file."""
        with open(self._part(self.process), "ab") as file:
            file.write(_lines(records).encode())

    def mend(self) -> None:
        """End a line that a crash has cut off, so that the next sample starts a new line."""
        file = self._part(self.process)
        if file.is_file() and (text := file.read_bytes()) and not text.endswith(b"\n"):
            with open(file, "ab") as end:
                end.write(b"\n")

    def close(self, records: list[Record]) -> None:
        """Put all samples into one file, in the order given, and remove the processes' own."""
        write_text(self.path / SAMPLES, _lines(records))
        for file in self._parts():
            file.unlink()

    def _part(self, process: int) -> Path:
        return self.path / f"{SAMPLES}.{process}"

    def _parts(self) -> list[Path]:
        """The processes' own files, however many there were."""
        return sorted(file for file in self.path.glob(f"{SAMPLES}.*") if file.suffix[1:].isdigit())


def _said(value: Any) -> str:
    """A setting's value in a message."""
    return "not given" if value is None else repr(value)


def about(file: Path) -> Record:
    """What run.json says: settings, and the calls that made the results.

    Raises:
        OtherRun: it is none of an evaluation's.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {"settings": dict(found["settings"]), "calls": list(found["calls"])}
    except (ValueError, LookupError, TypeError, RecursionError):
        raise OtherRun(f"{file} is none of an evaluation's: choose another folder") from None


def _lines(records: Iterable[Record]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _readable(record: Record) -> bool:
    """Whether the summary can read a line's values."""
    return (
        all(isinstance(record[name], kinds) for name, kinds in KINDS.items())
        and all(isinstance(share, (int, float)) for share in record["recall"] or [])
        and 0 <= record["score"] <= 1
        and record["method"] in METHODS
        and record.get("dense_answer") in (None, True)
        and isinstance(record.get("forwards"), (int, NoneType))
    )


def key(record: Record) -> tuple:
    """What a sample's line is known by."""
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
            high), its difference to full attention on the same samples, and its gain over the same variant without
            dense answer rows (None where there is nothing to compare with), density, recall (mean over layers, None
            without a pattern), recall_layers, seconds per sample, forwards of the batch that it was answered in.
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
        **_difference("difference", tasks, known, dict.fromkeys(VARIANT) | {"method": "origin"}),
        **_difference("gain", tasks, known, {"dense_answer": None}),
        **{name: float(np.mean([record[name] for record in records])) for name in ("density", "seconds")},
        "forwards": _forwards(records),
    }


def _forwards(records: list[Record]) -> float | None:
    """Of a batch, on average over its answers; None among lines of earlier versions, which do not say."""
    counts = [record["forwards"] for record in records if record.get("forwards") is not None]
    return float(np.mean(counts)) if len(counts) == len(records) else None


def _difference(name: str, tasks: list[list[Record]], known: dict[tuple, float], other: Record) -> Record:
    """How the scores differ from those of the same samples run another way; None unless all of these are known.

    Args:
        other: what of the variant is different there.
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
    """Markdown in the form of the paper's Table 1: one table per length, one line per method, one column per task;
    above them what saved rows and steps of every method, as far as the summary's `settings` name it."""
    lengths = list(dict.fromkeys(row["length"] for row in summary["rows"]))
    saved = _saving_line(summary.get("settings", {}), {row["method"] for row in summary["rows"]})
    return "\n".join([*saved, *(_length_table(length, summary) for length in lengths)])


def _saving_line(settings: Record, methods: set[str]) -> list[str]:
    """The flags for caches and thresholds that were on, in a line; nothing if none was."""
    given = {name: settings[name] for name in OFF if name in settings}
    flags = " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in given.items())
    return [f"With {flags}{', full attention as well' if 'origin' in methods else ''}.\n"] if given else []


def _length_table(length: int | None, summary: Record) -> str:
    rows, averages = ([row for row in summary[name] if row["length"] == length] for name in ("rows", "averages"))
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    counts = sorted({row["n"] for row in rows})
    samples = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    title = "prompts of your own" if length is None else f"{length:,} tokens"
    differences = {"difference": "to full attention"}
    if any(average.get("gain") is not None for average in averages):
        differences["gain"] = "to the same without dense answer rows"
    work = WORK if all(average.get("forwards") is not None for average in averages) else {}
    columns = ["method", "density", *tasks, "average", *differences.values(), *work.values()]
    lines = [columns, ["---"] * len(columns)]
    for average in averages:
        cells = {row["task"]: _figure(row, "accuracy") for row in rows if variant_of(row) == variant_of(average)}
        line = [title_of(average), f"{average['density']:.2f}", *(cells.get(task, "-") for task in tasks)]
        line += [_figure(average, "accuracy"), *(_figure(average, name) for name in differences)]
        lines.append([*line, *(f"{average[name]:.3g}" for name in work)])
    text = f"### {title}\n\nAccuracy in %, 95 % intervals, {samples} samples a cell.\n\n"
    return text + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def title_of(row: Record) -> str:
    """The method's name, with its settings."""
    numbers = [f"{name} {row[name]:g}" for name in NUMBERS if row[name] is not None]
    dense = ["dense answer rows"] if row.get("dense_answer") else []
    return ", ".join([METHODS[row["method"]].title, *dense, *numbers])


def _figure(row: Record, name: str) -> str:
    """A value with its interval; a difference has its sign."""
    if row[name] is None:
        return "-"
    sign = "" if name == "accuracy" else "+"
    value, low, high = (f"{row[column]:{sign}.1f}" for column in _columns(name))
    return f"{value} ({low} to {high})"
