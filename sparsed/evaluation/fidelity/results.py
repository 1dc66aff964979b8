"""A run summed up: a row for each variant at each length and mask rate, and the table."""

from numbers import Real
from types import NoneType
from typing import Any

from ..folder import Record
from ..methods import METHODS
from ..results import FULL_ATTENTION, NUMBERS, VARIANT, between, groups, markdown, title_of, variant_of
from ..scoring import Interval, bootstrap
from .gate import judge, report, why_not
from .measuring import FULL, key
from .windows import PLANTED, REPEATED, TEXT

# the fields of a line that the summary reads, and their types
KINDS: dict[str, Any] = {
    **dict.fromkeys(("id", "document"), str),
    **dict.fromkeys(("length", "n", "correct", "same"), int),
    **dict.fromkeys(("mask_rate", "nll", "kl", "density"), Real),
    **dict.fromkeys(NUMBERS, (int, float, NoneType)),
    "far": (int, NoneType),
}
COLUMNS = {  # a row's name: the table's, the factor, the format
    "nll": ("NLL", 1, ".3f"),
    "difference": ("to full attention", 1, "+.3f"),
    "accuracy": ("accuracy, %", 100, ".1f"),
    "kl": ("KL to full attention", 1, ".4f"),
    "same": ("same top token, %", 100, ".1f"),
    "gain": ("KL to that without dense answer rows", 1, "+.4f"),
    "sparse": ("NLL to full attention with that cache", 1, "+.3f"),
}


def identified(record: Record) -> tuple | None:
    """The key of a line; None, or an error that `Folder` expects, if the summary cannot read it."""
    readable = (
        all(isinstance(record[name], kinds) for name, kinds in KINDS.items())
        and record["kind"] in (TEXT, PLANTED, REPEATED)
        and record["method"] in METHODS
        and record["dense_answer"] in (None, True)
        and record["n"] > 0
    )
    return key(record) if readable else None


def summarize(records: list[Record]) -> dict[str, list[Record]]:
    """Means over the masked tokens, with 95 % bootstrap intervals over documents.

    Args:
        records: lines of the samples file.

    Returns:
        lengths: length, its gates (see `judge`), and `cannot_tell`: why its rows say nothing about quality, or None.
        rows: one for each length, mask rate and variant: documents, n, nll in nats per token, its difference to full
            attention, accuracy and same (top token) as shares, kl to full attention in nats per token, gain (kl minus
            kl without dense answer rows), sparse (nll minus that of full attention with the same cache), and density.
            gain and sparse are None if the other was not measured. All but the counts and the density are [value, low,
            high].
    """
    lines = {key(record): record for record in records}
    ordered = sorted(records, key=lambda record: (record["length"], -record["mask_rate"]))
    lengths = []
    for group in groups(ordered, "length"):
        gates = judge(group)
        lengths.append({"length": group[0]["length"], "gates": gates, "cannot_tell": why_not(gates)})
    texts = [record for record in ordered if record["kind"] == TEXT]
    return {"lengths": lengths, "rows": [_row(cell, lines) for cell in groups(texts, "length", "mask_rate", *VARIANT)]}


def _row(cell: list[Record], lines: dict[tuple, Record]) -> Record:
    """One row: a variant's lines for one length and mask rate, one line per document."""
    first = cell[0]
    full = _others(cell, lines, FULL_ATTENTION)
    plain = _others(cell, lines, {"dense_answer": None}) if first["dense_answer"] else None
    cached = _others(cell, lines, FULL.names) if first.get("cache") and first["method"] != "origin" else None
    return {
        **{name: first.get(name) for name in ("length", "mask_rate", *VARIANT)},
        "documents": len(cell),
        "n": sum(record["n"] for record in cell),
        "nll": _mean("nll", cell),
        "difference": None if variant_of(first) == variant_of(FULL_ATTENTION) else full and _mean("nll", cell, full),
        "accuracy": _mean("correct", cell),
        "kl": _mean("kl", cell),
        "same": _mean("same", cell),
        "gain": plain and _mean("kl", cell, plain),
        "sparse": cached and _mean("nll", cell, cached),
        "density": sum(record["density"] for record in cell) / len(cell),
    }


def _others(cell: list[Record], lines: dict[tuple, Record], other: Record) -> list[Record] | None:
    """The lines of the same tokens under a variant that differs in the fields `other`; None unless all are there."""
    names = [key({**record, **other}) for record in cell]
    return [lines[name] for name in names] if lines.keys() >= set(names) else None


def _mean(name: str, cell: list[Record], others: list[Record] | None = None) -> Interval:
    """A sum's mean over tokens, minus that of other lines for the same tokens."""
    sums = [record[name] for record in cell]
    if others is not None:
        sums = [value - other[name] for value, other in zip(sums, others, strict=True)]
    return bootstrap(sums, [record["n"] for record in cell])


def table(summary: Record) -> str:
    """Markdown: for each length what the gates say, and, if they let it pass, a table for each mask rate."""
    return "\n".join(_of_length(found, summary) for found in summary["lengths"])


def _of_length(found: Record, summary: Record) -> str:
    length = found["length"]
    counts = [call["documents"][str(length)] for call in summary["calls"] if str(length) in call["documents"]]
    left_out = f" Left out as too short: {counts[-1]['too_short']}." if counts and counts[-1]["too_short"] else ""
    if names := summary["settings"].get("leave_out"):
        left_out += f" Left out by name: {', '.join(names)}."
    parts = [f"### {length:,} tokens, the last {summary['settings']['seq_len']} of them generated"]
    if found["cannot_tell"]:
        parts.append(f"**This cannot tell: {found['cannot_tell']}.** Nothing is claimed.{left_out}")
    parts += map(report, found["gates"])
    if not found["cannot_tell"]:
        parts.append(f"NLL and KL in nats per masked token, 95 % intervals over documents.{left_out}")
        parts += map(_of_rate, groups([row for row in summary["rows"] if row["length"] == length], "mask_rate"))
    return "\n\n".join(parts) + "\n"


def _of_rate(rows: list[Record]) -> str:
    shown = [name for name in COLUMNS if any(row[name] is not None for row in rows)]
    columns, lines = ["method", "density", *(COLUMNS[name][0] for name in shown)], []
    for row in rows:
        figures = (figure(row[name], *COLUMNS[name][1:]) for name in shown)
        lines.append([title_of(row), f"{row['density']:.2f}", *figures])
    tokens, documents = (between([row[name] for row in rows]) for name in ("n", "documents"))
    title = f"#### {rows[0]['mask_rate']:.0%} masked: {tokens} tokens of {documents} documents"
    return f"{title}\n\n{markdown(columns, lines)}"


def figure(interval: Interval | None, factor: float, form: str) -> str:
    """A value with its interval, for a table."""
    if interval is None:
        return "-"
    value, low, high = (f"{factor * part:{form}}" for part in interval)
    return f"{value} ({low} to {high})"
