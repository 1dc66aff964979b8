"""The pages' tables of whole generations, and the figures in the sentences around them, from their records."""

from typing import Any

from sparsed.evaluation.results import markdown

from .common import LENGTHS

Record = dict[str, Any]
EQUAL, FEWER = "256", "72"
THEIRS = "Fast-dLLM's code, dual cache"
FULL, DUAL, ONCE, PREFIX = "full attention", "dual cache", "dual cache, all rows once", "prefix cache"
SPARSE, PAPER = "dual cache, dense answer rows, select 0.15", "dual cache, the paper's SparseD"
UNCACHED_SPARSE, UNCACHED_PAPER = "SparseD, dense answer rows, select 0.15", "SparseD, the paper's"
COLUMNS = {
    "SparseD": (UNCACHED_SPARSE, EQUAL),
    DUAL: (DUAL, EQUAL),
    "with the paper's SparseD": (PAPER, EQUAL),
    "with SparseD": (SPARSE, EQUAL),
    "all rows once": (ONCE, EQUAL),
    f"{FEWER} steps: {DUAL}": (DUAL, FEWER),
    "with SparseD ": (SPARSE, FEWER),
}
WARM_UP = "1k"  # the length at which calls of long prompts began; in no table
SHORT = ("SparseD", DUAL, "with SparseD", "all rows once")  # of the columns, in the README


def rows_of(records: list[Record]) -> dict[tuple[str, str], Record]:
    """The ways of every family and length that ran, in the table's order. Of two calls of a way the later one counts,
    but for Fast-dLLM's code the one in which it was faster: it is not ours to choose a call in which its host was busy.
    """
    found: dict[tuple[str, str], Record] = {}
    for record in sorted(records, key=lambda record: record["date"]):
        for row in record["rows"]:
            if row["length"] == WARM_UP:
                continue
            ways = found.setdefault((record["family"], row["length"]), {})
            ran = {name: way for name, way in row["ways"].items() if "steps" in way}
            theirs = [way for way in (ways.get(THEIRS), ran.get(THEIRS)) if way]
            ways |= ran
            if theirs:
                ways[THEIRS] = min(theirs, key=lambda way: way["steps"][EQUAL]["seconds"])
    return dict(sorted(found.items(), key=lambda item: (item[0][0], LENGTHS[item[0][1]])))


def generation_table(records: list[Record], titles: dict[str, str]) -> str:
    """Markdown: a line for each family and length; seconds of full attention, and how many times faster the others."""
    lines, rows = [], rows_of(records)
    columns = {title: place for title, place in COLUMNS.items() if any(place[0] in ways for ways in rows.values())}
    for (family, length), ways in rows.items():
        gains = [_gain(ways, name, steps) for name, steps in columns.values()]
        step, memory = "-", "-"
        if DUAL in ways:
            cached = ways[DUAL]["steps"][EQUAL]
            step = f"{1e3 * cached['forwards']['cached']['seconds']['median']:.3g} ms"
            memory = f"{cached['peak_memory_bytes'] / 1e9:.0f} GB"
        lines.append([titles[family], length, _seconds(ways[FULL]["steps"][EQUAL]), *gains, step, memory])
    return markdown(["model", "prompt", FULL, *columns, "cached step", "memory"], lines)


def generation_table_short(records: list[Record], titles: dict[str, str]) -> str:
    """Markdown: the same in equal steps, at three lengths."""
    lines = []
    for (family, length), ways in rows_of(records).items():
        if length in ("4k", "32k", "64k"):
            gains = [_gain(ways, *COLUMNS[name]) for name in SHORT]
            lines.append([titles[family], length, _seconds(ways[FULL]["steps"][EQUAL]), *gains])
    return markdown(["model", "prompt", FULL, *SHORT], lines)


def _seconds(entry: Record) -> str:
    """With an asterisk where a generation was put together from a few of its forwards."""
    return f"{entry['seconds']:.0f}{'' if entry['measured'] else '*'} s"


def _gain(ways: Record, name: str, steps: str) -> str:
    """How many times as fast a way is; - if it was not run, and an asterisk as above."""
    if name not in ways:
        return "-"
    entry = ways[name]["steps"][steps]
    return f"{entry['speedup']:.3g}{'' if entry['measured'] else '*'}x"


def generation_figures(records: list[Record]) -> dict[str, str]:
    """By name: seconds and gains, how much faster than Fast-dLLM's code where it ran, and SparseD's gains at 4k."""
    rows = [row for record in records for row in record["rows"] if row["length"] == "4k"]
    ways = [row["ways"][name] for row in rows for name in (UNCACHED_PAPER, UNCACHED_SPARSE) if name in row["ways"]]
    gains = [way["steps"][EQUAL]["speedup"] for way in ways]
    found = {"generation.4k.sparse.least": f"{min(gains):.2f}", "generation.4k.sparse.most": f"{max(gains):.2f}"}
    kinds = {
        "full": FULL,
        "sparse": UNCACHED_SPARSE,
        "dual": DUAL,
        "both": SPARSE,
        "once": ONCE,
        "prefix": PREFIX,
    }
    for (family, length), ways in rows_of(records).items():
        name = f"generation.{family}.{length}"
        for kind, way in kinds.items():
            if way not in ways:
                continue
            entry = ways[way]["steps"][EQUAL]
            found[f"{name}.{kind}"] = f"{entry['seconds']:.{0 if entry['seconds'] >= 100 else 1}f}"
            found[f"{name}.{kind}.gain"] = f"{entry['speedup']:.{0 if entry['speedup'] >= 10 else 1}f}"
        theirs = ways.get(THEIRS, {}).get("steps")
        if theirs:
            found[f"{name}.fast-dllm"] = f"{theirs[EQUAL]['ours_faster']:.1f}"
            found[f"{name}.fast-dllm.fewer"] = f"{theirs[FEWER]['ours_faster']:.1f}"
            found[f"{name}.fast-dllm.seconds"] = f"{theirs[EQUAL]['seconds']:.1f}"
    return found
