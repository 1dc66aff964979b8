"""Whole generations summed up: a row for each setting, the table, and the pictures."""

from functools import partial
from numbers import Real
from operator import itemgetter
from pathlib import Path
from statistics import fmean, median
from types import NoneType
from typing import Any

from ...sampling.common import ANSWER, CACHED
from ..folder import Record
from ..methods import METHODS
from ..plots import chart, curves
from ..results import FULL_ATTENTION, NUMBERS, VARIANT, groups, markdown, title_of, variant_of
from ..scoring import bootstrap
from .results import figure
from .writing import key

GRAM = 4  # tokens of a run that counts as repeated
FEW_ROWS = (ANSWER, CACHED)  # forwards that do not compute all rows
# the fields of a line that the summary reads, and their types
KINDS: dict[str, Any] = {
    **dict.fromkeys(("id", "document"), str),
    **dict.fromkeys(("length", "steps"), int),
    **dict.fromkeys(NUMBERS, (int, float, NoneType)),
    "seconds": Real,
    "bound": (Real, NoneType),
    "tokens": list,
    "forwards": dict,
}
COLUMNS = {  # a row's name: the table's, the factor, the format
    "same": ("same tokens as full attention, %", 100, ".1f"),
    "prefix": ("tokens before the first difference", 1, ".1f"),
    "repeated": (f"repeated {GRAM}-grams, %", 100, ".1f"),
    "bound": ("bound on the text's NLL", 1, ".3f"),
    "difference": ("to full attention's text", 1, "+.3f"),
}
DRAWN = {"same": "same tokens as full attention", "bound": "bound on the text's NLL, nats per token"}


def identified(record: Record) -> tuple | None:
    """The key of a line; None, or an error that `Folder` expects, if the summary cannot read it."""
    readable = (
        all(isinstance(record[name], kinds) for name, kinds in KINDS.items())
        and all(isinstance(token, int) for token in record["tokens"])
        and all(isinstance(number, int) for number in record["forwards"].values())
        and record["method"] in METHODS
        and record["dense_answer"] in (None, True)
        and record["tokens"]
    )
    return key(record) if readable else None


def common_prefix(one: list[int], other: list[int]) -> int:
    """Tokens before the first that differs."""
    return next((n for n, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), len(one))


def repeated_share(tokens: list[int]) -> float:
    """Share of the runs of `GRAM` tokens that occurred before: 1 minus distinct-4."""
    grams = list(zip(*(tokens[start:] for start in range(GRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def summarize(records: list[Record]) -> dict[str, list[Record]]:
    """Means over documents with 95 % bootstrap intervals.

    Each text is compared with that of full attention without a cache or threshold, in one step per token.

    Args:
        records: lines of the samples file.

    Returns:
        rows: one for each length, number of steps and variant: documents; same (share of the tokens, place by place),
            prefix (tokens), repeated (share of runs of four), bound (nats per token) and its difference to full
            attention's texts, all of them [value, low, high]; bounded: how many documents have a bound for both texts
            (if none, bound and difference are None); forwards, by kind; whole: those of all rows; seconds, the median.
    """
    lines = {key(record): record for record in records}
    ordered = sorted(records, key=lambda record: (record["length"], -record["steps"]))
    return {"rows": [_row(cell, lines) for cell in groups(ordered, "length", *VARIANT, "steps")]}


def _row(cell: list[Record], lines: dict[tuple, Record]) -> Record:
    first, sizes = cell[0], [len(record["tokens"]) for record in cell]
    full = [lines[key({**one, **FULL_ATTENTION, "steps": len(one["tokens"])})] for one in cell]
    pairs = [(one["tokens"], other["tokens"]) for one, other in zip(cell, full, strict=True)]
    kinds = dict.fromkeys(kind for record in cell for kind in record["forwards"])
    forwards = {kind: fmean(record["forwards"].get(kind, 0) for record in cell) for kind in kinds}
    bounds = [(one["bound"], other["bound"]) for one, other in zip(cell, full, strict=True)]
    known = [(size, *pair) for size, pair in zip(sizes, bounds, strict=True) if None not in pair]
    counted, bound, expected = zip(*known, strict=True) if known else ((), (), ())
    differences = [one - other for one, other in zip(bound, expected, strict=True)]
    is_full = variant_of(first) == variant_of(FULL_ATTENTION) and first["steps"] == sizes[0]
    return {
        **{name: first.get(name) for name in ("length", "steps", *VARIANT)},
        "documents": len(cell),
        "same": bootstrap([sum(a == b for a, b in zip(*pair, strict=True)) for pair in pairs], sizes),
        "prefix": bootstrap([common_prefix(*pair) for pair in pairs], [1] * len(cell)),
        "repeated": bootstrap([repeated_share(record["tokens"]) for record in cell], [1] * len(cell)),
        "bounded": len(known),
        "bound": bootstrap(bound, counted) if known else None,
        "difference": bootstrap(differences, counted) if known and not is_full else None,
        "forwards": forwards,
        "whole": sum(number for kind, number in forwards.items() if kind not in FEW_ROWS),
        "seconds": median(record["seconds"] for record in cell),
    }


def table(summary: Record) -> str:
    """Markdown, a table for each length."""
    return "\n".join(_of_length(rows, summary) for rows in groups(summary["rows"], "length"))


def _of_length(rows: list[Record], summary: Record) -> str:
    settings = summary["settings"]
    heads = [head for head, _, _ in COLUMNS.values()]
    columns, lines = ["method", "steps", "forwards of all rows", "of few rows", "seconds", *heads], []
    for row in rows:
        few = sum(row["forwards"].get(kind, 0) for kind in FEW_ROWS)
        took = [f"{row['whole']:.1f}", f"{few:.1f}", f"{row['seconds']:.3g}"]
        figures = (figure(row[name], factor, form) for name, (_, factor, form) in COLUMNS.items())
        lines.append([title_of(row), str(row["steps"]), *took, *figures])
    title = f"### {rows[0]['length']:,} tokens, the last {settings['seq_len']} of them written"
    about = (
        f"In blocks of {settings['block_length']}, greedily; means over documents with 95 % intervals, for seconds the "
        "median. The bound is on the negative log-likelihood of the text under full attention, in nats per token. Read "
        "it together with the repetitions: repeated text is likely."
    )
    return f"{title}\n\n{about}\n\n{markdown(columns, lines)}\n"


def draw(summary: Record, folder: Path) -> None:
    """Write `same.png` and `bound.png`, against seconds, with a panel for each length."""
    for name, label in DRAWN.items():
        rows = [row for row in summary["rows"] if row[name] is not None]
        panels = {f"{found[0]['length']:,} tokens": found for found in groups(rows, "length")}
        fill = partial(curves, itemgetter(name), label, over="seconds", varied=("threshold", "factor"))
        (folder / f"{name}.png").unlink(missing_ok=True)
        if panels:
            chart(folder / f"{name}.png", panels, fill)
