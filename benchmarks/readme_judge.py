"""The pages' tables of quality, on the real model and under caches on the demo models, and the figures around them."""

import math
import statistics
from contextlib import suppress
from itertools import product
from typing import Any

from sparsed.evaluation.fidelity.results import figure
from sparsed.evaluation.results import markdown

from .records import ROOT, TITLES, evaluation, has, judged, read

SMALL = ROOT / "benchmarks/results/fidelity-small-cpu.json"
SIZES = (128, 64, 32)
HALF = 0.5  # the share of the masked tokens in the tables of one rate
PAPER, DENSE, SHARED = "SparseD, the paper's", "dense answer rows", "without isolated selection"
Row = dict[str, Any]

WINDOW, STREAMING = {"method": "window", "select": 0.3}, {"method": "streaming", "select": 0.3}
# the table's line: what a row of the judge's table has
JUDGED = {
    **{f"{PAPER}, select {select}": {"method": "sparsed", "select": select} for select in (0.5, 0.3, 0.2, 0.15, 0.1)},
    **{
        f"{DENSE}, {select}": {"method": "sparsed", "select": select, "dense_answer": True}
        for select in (0.5, 0.3, 0.2, 0.15, 0.1, 0.05)
    },
    **{f"{SHARED}, {select}": {"method": "no_isolation", "select": select} for select in (0.3, 0.1)},
    "sliding window, 0.3": WINDOW,
    "StreamingLLM, 0.3": STREAMING,
}
# the same under the second checkpoint, which was trained on long sequences from the first step on
MIXED = {
    **{f"{PAPER}, select {select}": {"method": "sparsed", "select": select} for select in (0.3, 0.15, 0.05)},
    **{
        f"{DENSE}, {select}": {"method": "sparsed", "select": select, "dense_answer": True}
        for select in (0.3, 0.15, 0.05)
    },
    f"{SHARED}, 0.3": {"method": "no_isolation", "select": 0.3},
    **{
        f"{name}{', ' + DENSE if dense else ''}, {select}": {**way, "select": select, "dense_answer": dense}
        for (name, way), dense, select in product(
            (("sliding window", WINDOW), ("StreamingLLM", STREAMING)), (None, True), (0.3, 0.15)
        )
    },
}
# at 8,192 tokens, with a third training
CLEAN = {title: way for title, way in MIXED.items() if way["method"] == "sparsed" or way["select"] == 0.3}
HEADS = ("heads", "heads-clean")
LENGTHS = (4096, 8192)
SKIPS = {"0": 0.0, "0.05": 0.05, "0.2": 0.2}
# the line of the tables under caches: what its row has
FULL, DUAL = {"method": "origin"}, {"method": "origin", "cache": "dual"}
FAST = {"method": "sparsed", "select": 0.15, "dense_answer": True, "cache": "dual"}
NEAR = {"method": "sparsed", "select": 0.3, "dense_answer": True, "cache": "dual"}
PLAIN = {"method": "sparsed", "select": 0.3, "cache": "dual"}
CACHED = {
    "prefix cache": {"method": "origin", "cache": "prefix"},
    "prefix cache, all rows once": {"method": "origin", "cache": "prefix", "refresh": 0},
    "dual cache": DUAL,
    "dual cache, all rows at every 2nd block": DUAL | {"refresh": 2},
    "dual cache, all rows at every 4th block": DUAL | {"refresh": 4},
    "dual cache, all rows once": DUAL | {"refresh": 0},
    f"dual cache, {PAPER}, 0.3": PLAIN,
    f"dual cache, SparseD, {DENSE}, 0.3": NEAR,
    f"dual cache, SparseD, {DENSE}, 0.15": FAST,
}
WRITTEN = {
    "full attention": FULL,
    "full attention, threshold 0.9": FULL | {"threshold": 0.9},
    "full attention, threshold 0.7": FULL | {"threshold": 0.7},
    "full attention, three quarters of the steps": FULL | {"steps": 96},
    "full attention, half of the steps": FULL | {"steps": 64},
    "full attention, a quarter of the steps": FULL | {"steps": 32},
    "full attention, factor 2": FULL | {"factor": 2.0},
    f"{PAPER}, select 0.3": {"method": "sparsed", "select": 0.3},
    f"SparseD, {DENSE}, 0.3": {"method": "sparsed", "select": 0.3, "dense_answer": True},
    "prefix cache": {"method": "origin", "cache": "prefix"},
    "dual cache": DUAL,
    "dual cache, half of the steps": DUAL | {"steps": 64},
    "dual cache, threshold 0.7": DUAL | {"threshold": 0.7},
    "dual cache, factor 2": DUAL | {"factor": 2.0},
    "dual cache, all rows once": DUAL | {"refresh": 0},
    f"dual cache, SparseD, {DENSE}, 0.3": NEAR,
    f"dual cache, SparseD, {DENSE}, 0.15": FAST,
    f"dual cache, SparseD, {DENSE}, 0.15, threshold 0.9": FAST | {"threshold": 0.9},
    f"dual cache, SparseD, {DENSE}, 0.15, threshold 0.7": FAST | {"threshold": 0.7},
}
ANSWERED = {
    f"{PAPER}, 0.3": {"method": "sparsed", "select": 0.3},
    f"SparseD, {DENSE}, 0.3": {"method": "sparsed", "select": 0.3, "dense_answer": True},
    "threshold 0.9": FULL | {"threshold": 0.9},
    "dual cache": DUAL,
    "dual cache, all rows once": DUAL | {"refresh": 0},
    "dual cache, threshold 0.9": DUAL | {"threshold": 0.9},
    f"dual cache, {PAPER}, 0.3": PLAIN,
    f"dual cache, SparseD, {DENSE}, 0.3": NEAR,
    f"dual cache, SparseD, {DENSE}, 0.15": FAST,
    f"dual cache, SparseD, {DENSE}, 0.15, threshold 0.9": FAST | {"threshold": 0.9},
}
ADDED = {f"dual cache, SparseD, {DENSE}, {row['select']}": row for row in (NEAR, FAST)}
ANSWERS = {"caches": "4,096", "caches-ragged": "4,010", "caches-held-out": "second seed"}  # folder -> its samples
MORE = {"caches-held-out": "caches-held-out-more"}  # where other ways were measured on the same samples


def found(rows: list[Row], wanted: Row) -> Row:
    """The one row that has all of this, and of a variant nothing more."""
    (row,) = (row for row in rows if has(row, wanted))
    return row


def judge_row(wanted: Row, size: int | None, skip: float = 0.2, length: int = 4096, folder: str = "table") -> Row:
    """A row of the judge's table."""
    skips = {"skip": skip if wanted["method"] in ("sparsed", "no_isolation") else None}
    return found(judged(folder)["rows"], {**wanted, **skips, "block_size": size, "length": length, "mask_rate": HALF})


def mixed_row(wanted: Row, size: int | None, length: int = 4096, skip: float = 0.2) -> Row:
    """A row of the second checkpoint's table."""
    return judge_row(wanted, size, skip, length, "table-mixed")


def clean_row(wanted: Row, size: int | None, length: int = 8192, skip: float = 0.2) -> Row:
    """A row of the third training's table."""
    return judge_row(wanted, size, skip, length, "table-clean")


def cached_row(wanted: Row, rate: float = HALF, folder: str = "caches") -> Row:
    """A row of the judge's table of caches."""
    size = {"block_size": 128} if wanted["method"] == "sparsed" else {}
    return found(judged(folder)["rows"], {**wanted, **size, "mask_rate": rate})


def longer_row(wanted: Row, rate: float = HALF, folder: str = "table-256") -> Row:
    """A row of the judge's table of 256 new tokens, in blocks of 128."""
    skip = {"skip": 0.2} if wanted["method"] == "sparsed" else {}
    return found(judged(folder)["rows"], {**wanted, **skip, "block_size": 128, "mask_rate": rate})


def gate_of(length: Row) -> Row:
    """The gate of a length in a summary, half masked, with the farthest evidence."""
    return max((gate for gate in length["gates"] if gate["mask_rate"] == HALF), key=lambda gate: gate["far"])


def nats(interval: list[float] | None, form: str = "+.3f") -> str:
    """A difference in nats with its interval."""
    return figure(interval, 1, form)


def judge_table() -> str:
    """Markdown: nats lost by each way to attend, at three sizes of blocks; the share of tokens that stay the same."""
    lines = []
    for title, wanted in JUDGED.items():
        rows = [judge_row(wanted, size) for size in SIZES]
        lines.append([title, *(nats(row["difference"]) for row in rows), f"{100 * rows[0]['same'][0]:.1f}"])
    return markdown(["", *(f"blocks of {size}" for size in SIZES), "same token, %"], lines)


def mixed_table() -> str:
    """Markdown: nats lost by each way to attend under the second checkpoint, at two lengths and two sizes of blocks."""
    places = list(product(LENGTHS, (128, 32)))
    lines = []
    for title, wanted in MIXED.items():
        rows = [mixed_row(wanted, size, length) for length, size in places]
        lines.append([title, *(nats(row["difference"]) for row in rows)])
    return markdown(["", *(f"{length:,} tokens, blocks of {size}" for length, size in places)], lines)


def clean_table() -> str:
    """Markdown: nats lost by each way to attend under the third training, at 8,192 tokens and three sizes of blocks."""
    lines = []
    for title, wanted in CLEAN.items():
        rows = [clean_row(wanted, size) for size in SIZES]
        lines.append([title, *(nats(row["difference"]) for row in rows)])
    return markdown(["8,192 tokens", *(f"blocks of {size}" for size in SIZES)], lines)


def trainings_table() -> str:
    """Markdown: the checkpoints made from the base: their training, likelihood, and the gate at 8,192 tokens."""
    record, lines = judged("trainings"), []
    for run in [{"name": "first", **record["first"]}, *record["runs"]]:
        trained = f"{run['seconds'] / 60:.1f}", f"{run['tokens'] / 1e6:.0f}"
        lines.append([run["name"], run["from"], *trained, *_judged_cells(run["judged"])])
    said = ("planted passage", "its copy", "repeated passage")
    columns = ["", "from", "minutes", "million tokens", *(f"nats, {length:,} tokens" for length in LENGTHS)]
    return markdown([*columns, *(f"gate: {name}" for name in said)], lines)


def _judged_cells(found: Row) -> list[str]:
    likely = [found[str(length)]["nll"] if str(length) in found else None for length in LENGTHS]
    gate = [found["gate_8192"][name] for name in ("planted", "copy", "repeated")]
    return [*("-" if value is None else f"{value[0]:.2f}" for value in likely), *(nats(value, ".2f") for value in gate)]


def small_table() -> str:
    """Markdown: what the evaluation's first command found on a CPU."""
    titles = {"origin": "full attention", "sparsed": PAPER, "window": "sliding window", "streaming": "StreamingLLM"}
    rows = read(SMALL)["rows"]
    lines = [
        [titles[row["method"]], nats(row["nll"], ".3f"), nats(row["difference"]), f"{100 * row['same'][0]:.1f}"]
        for row in rows
    ]
    return markdown(["", "nats per token", "to full attention", "same token, %"], lines)


def caches_table() -> str:
    """Markdown: nats lost under caches at three mask rates, and against full attention with the same cache."""
    rates = (0.75, HALF, 0.25)
    lines = []
    for title, wanted in CACHED.items():
        rows = [cached_row(wanted, rate) for rate in rates]
        against = nats(rows[1]["sparse"]) if wanted["method"] == "sparsed" else "-"
        lines.append([title, *(nats(row["difference"]) for row in rows), against])
    return markdown(["", *(f"{rate:.0%} masked" for rate in rates), f"{HALF:.0%}: to the cache's own"], lines)


def written_row(wanted: Row) -> Row:
    """A row of the judge's whole generations."""
    return found(judged("written")["rows"], {"steps": 128, **wanted})


def written_table() -> str:
    """Markdown: whole generations: forwards, tokens like full attention's, repetitions, likelihood."""
    lines = []
    for title, wanted in WRITTEN.items():
        row = written_row(wanted)
        few = sum(row["forwards"].values()) - row["whole"]
        forwards = f"{row['whole']:.0f} + {few:.0f}"
        likely = nats(row["difference"], "+.2f")
        same, repeated = (f"{100 * row[name][0]:.0f}" for name in ("same", "repeated"))
        lines.append([title, forwards, same, repeated, likely])
    return markdown(["", "forwards: all rows + few", "same tokens, %", "repeated, %", "nats, to full attention"], lines)


def answered_row(family: str, wanted: Row, folder: str = "caches") -> Row:
    """The average over tasks of a demo model under caches; ValueError if it was not measured."""
    with suppress(ValueError):
        return found(evaluation(f"{family}-{folder}")["averages"], wanted)
    if folder not in MORE:
        raise ValueError(f"{family}-{folder} does not have {wanted}")
    return found(evaluation(f"{family}-{MORE[folder]}")["averages"], wanted)


def answered_table() -> str:
    """Markdown: points of accuracy against full attention, and what SparseD adds to a cache; forwards of a batch, and
    the time of a sample on a GPU that does nothing else."""
    places = list(product(TITLES, ANSWERS))
    lines = []
    for title, wanted in ANSWERED.items():
        row = answered_row("dream", wanted)
        few = row["phases"].get("answer", 0) + row["phases"].get("cached", 0)
        forwards = f"{row['forwards'] - few:.3g} + {few:.3g}"
        times = (_milliseconds(family, wanted) for family in TITLES)
        lines.append([title, *(_points_of(*place, wanted) for place in places), forwards, *times])
    for title, wanted in ADDED.items():
        added = (_points_of(*place, wanted, "sparse") for place in places)
        lines.append([f"{title}: to the cache's own", *added, "", "", ""])
    names = [f"{TITLES[family]}, {ANSWERS[folder]}" for family, folder in places]
    times = (f"ms a sample, {title}" for title in TITLES.values())
    return markdown(["", *names, "forwards: all rows + few", *times], lines)


def seconds_of(family: str, wanted: Row) -> float:
    """Of a sample on a GPU that does nothing else: the middle one of the tasks, of which the first starts kernels.

    ValueError if it was not timed."""
    rows = [row for row in evaluation(f"{family}-timed")["rows"] if has(row, wanted)]
    if not rows:
        raise ValueError(f"{family}-timed does not have {wanted}")
    return statistics.median(row["seconds"] for row in rows)


def _milliseconds(family: str, wanted: Row) -> str:
    """The same as a table's cell has it; a dash where that was not timed."""
    try:
        return f"{1e3 * seconds_of(family, wanted):.1f}"
    except ValueError:
        return "-"


def most_lost() -> float:
    """The most points that a demo model loses under a cache, with any setting, rounded up to a tenth."""
    rows = [row for place in product(TITLES, ANSWERS) for row in evaluation("-".join(place))["averages"]]
    return math.ceil(10 * max(-row["difference"] for row in rows if row["cache"])) / 10


def answered_cells() -> list[Row]:
    """Every row that the table of demo models shows."""
    cells = []
    for (family, folder), wanted in product(product(TITLES, ANSWERS), ANSWERED.values()):
        with suppress(ValueError):  # not measured
            cells.append(answered_row(family, wanted, folder))
    return cells


def factor_costs() -> float:
    """The most points that a factor of 1 costs a demo model under full attention, with a cache or without."""
    prefix = CACHED["prefix cache"]
    places = product(TITLES, ("caches", "caches-ragged"), (FULL, DUAL, prefix))
    rows = (
        (answered_row(family, way, folder) for way in (how, how | {"factor": 1.0})) for family, folder, how in places
    )
    return max(fixed["accuracy"] - factor["accuracy"] for fixed, factor in rows)


def _points_of(family: str, folder: str, wanted: Row, name: str = "difference") -> str:
    """Points of one cell; a dash where that was not measured."""
    try:
        return f"{answered_row(family, wanted, folder)[name]:+.1f}"
    except ValueError:
        return "-"


def values_lost(family: str, folder: str) -> list[float]:
    """Points that the fast setting loses in the task whose answer has several values, where it loses most; with all
    rows at every block, and at every second one where that was measured."""
    rows = [row for row in evaluation(f"{family}-{folder}")["rows"] if row["task"] == "niah_multivalue"]
    return [row["difference"] for row in rows if has(row, FAST) or has(row, FAST | {"refresh": 2})]


def judge_tables() -> dict[str, str]:
    """Every table here, by name."""
    return {
        "judge": judge_table(),
        "judge-mixed": mixed_table(),
        "judge-clean": clean_table(),
        "trainings": trainings_table(),
        "fidelity-small": small_table(),
        "caches-judge": caches_table(),
        "caches-written": written_table(),
        "caches-demo": answered_table(),
    }


def judge_figures() -> dict[str, str]:
    """Every figure here, by name."""
    paper, dense = ({"method": "sparsed", "select": 0.3, "dense_answer": which} for which in (None, True))
    rules = {"paper": paper, "dense": dense}
    few = {"method": "sparsed", "select": 0.15}
    fast = few | {"dense_answer": True}
    cached = {"dual": DUAL, "once": DUAL | {"refresh": 0}, "prefix": CACHED["prefix cache"], "fast": FAST, "near": NEAR}
    gate, longer = (gate_of(length) for length in judged("table")["lengths"])
    mixed = {length["length"]: gate_of(length) for length in judged("table-mixed")["lengths"]}
    heads, others = (found(judged(n)["rows"], {"method": "sparsed", "block_size": 128}) for n in HEADS)
    gates = [gate for length in judged("table-clean")["lengths"] for gate in length["gates"]]
    values = {
        **{f"judge.paper.{name}": judge_row(paper, 128, skip=skip)["difference"] for name, skip in SKIPS.items()},
        **{f"judge.dense.{name}": judge_row(dense, 128, skip=skip)["difference"] for name, skip in SKIPS.items()},
        "judge.full": judge_row(FULL | {"skip": None}, None)["nll"],
        "judge.isolated": judge_row(paper | {"select": 0.2}, 32)["difference"],
        "judge.shared": judge_row(paper | {"method": "no_isolation", "select": 0.2}, 32)["difference"],
        **{f"judge.paper.{size}": judge_row(paper, size)["difference"] for size in (64, 32)},
        **{f"judge.dense.{size}": judge_row(dense, size)["difference"] for size in (64, 32)},
        "judge.window": judge_row(WINDOW, 128)["difference"],
        "judge.streaming": judge_row(STREAMING, 128)["difference"],
        "judge.streaming.dense": judge_row(STREAMING | {"dense_answer": True}, 128)["difference"],
        "judge.paper.short": judge_row(paper | {"select": 0.5}, 32)["difference"],
        "judge.dense.2": judge_row(dense | {"select": 0.2}, 128)["difference"],
        "judge.dense.1": judge_row(dense | {"select": 0.1}, 128)["difference"],
        "judge.paper.1": judge_row(paper | {"select": 0.1}, 128)["difference"],
        **{f"judge.gate.{name}": gate[name]["advantage"] for name in ("planted", "copy", "repeated")},
        "judge.gate.8k": longer["copy"]["advantage"],
        **{
            f"mixed.gate.{length}.{name}": gate[name]["advantage"]
            for length, gate in mixed.items()
            for name in ("planted", "copy", "repeated")
        },
        **{f"mixed.full.{length}": mixed_row(FULL | {"skip": None}, None, length)["nll"] for length in LENGTHS},
        **{
            f"mixed.{name}.{length}.{size}": mixed_row(row, size, length)["difference"]
            for (name, row), length, size in product(rules.items(), LENGTHS, (128, 32))
        },
        **{
            f"mixed.{name}.skip.{shown}": mixed_row(row, 128, skip=skip)["difference"]
            for (name, row), (shown, skip) in product(rules.items(), SKIPS.items())
        },
        **{
            f"mixed.{name}.8192.skip.{shown}": mixed_row(row, 128, 8192, skip)["difference"]
            for (name, row), (shown, skip) in product(rules.items(), SKIPS.items())
        },
        "mixed.isolated.8192": mixed_row(paper | {"select": 0.2}, 32, 8192)["difference"],
        "mixed.shared.8192": mixed_row(paper | {"method": "no_isolation", "select": 0.2}, 32, 8192)["difference"],
        "mixed.isolated": mixed_row(paper | {"select": 0.2}, 32)["difference"],
        "mixed.shared": mixed_row(paper | {"method": "no_isolation", "select": 0.2}, 32)["difference"],
        **{f"mixed.fast.{length}": mixed_row(fast, 128, length)["difference"] for length in LENGTHS},
        "mixed.fast.skip.0.05": mixed_row(fast, 128, skip=0.05)["difference"],
        **{f"mixed.fast.{length}.32": mixed_row(fast, 32, length)["difference"] for length in LENGTHS},
        **{f"mixed.few.{length}": mixed_row(few, 128, length)["difference"] for length in LENGTHS},
        **{
            f"continued.{name}": judge_row(row, 128, length=8192, folder="table-mixed-continued")["difference"]
            for name, row in (*rules.items(), ("few", few), ("fast", fast))
        },
        "mixed.streaming.8192": mixed_row(STREAMING, 128, 8192)["difference"],
        "mixed.streaming.dense.8192": mixed_row(STREAMING | {"dense_answer": True}, 128, 8192)["difference"],
        "mixed.window.dense": mixed_row(WINDOW | {"dense_answer": True}, 128)["difference"],
        "mixed.window": mixed_row(WINDOW, 128)["difference"],
        "mixed.streaming": mixed_row(STREAMING, 128)["difference"],
        "mixed.streaming.dense": mixed_row(STREAMING | {"dense_answer": True}, 128)["difference"],
        **{
            f"clean.{name}.{length}.{size}": clean_row(row, size, length)["difference"]
            for (name, row), length, size in product((*rules.items(), ("few", few), ("fast", fast)), LENGTHS, (128, 32))
        },
        **{
            f"clean.{name}.skip.{shown}": clean_row(row, 128, skip=skip)["difference"]
            for (name, row), (shown, skip) in product(rules.items(), SKIPS.items())
        },
        **{
            f"clean.{name}": clean_row({"method": method, "select": 0.2}, 32)["difference"]
            for name, method in (("isolated", "sparsed"), ("shared", "no_isolation"))
        },
        **{f"clean.full.{length}": clean_row(FULL | {"skip": None}, None, length)["nll"] for length in LENGTHS},
        "clean.gate.copy": gate_of(judged("table-clean")["lengths"][1])["copy"]["advantage"],
        "clean.window.4096": clean_row(WINDOW, 128, 4096)["difference"],
        "clean.window.few": clean_row(WINDOW | {"select": 0.05}, 128)["difference"],
        "clean.streaming": clean_row(STREAMING, 128)["difference"],
        **{f"caches.{name}": cached_row(row)["difference"] for name, row in cached.items()},
        "caches.plain": cached_row(PLAIN)["difference"],
        **{
            f"caches.{name}.all": cached_row(row, 1.0)["difference"]
            for name, row in (("plain", PLAIN), ("near", NEAR), ("fast", FAST))
        },
        **{f"caches.{name}.added": cached_row(cached[name])["sparse"] for name in ("fast", "near")},
        **{
            f"caches.mixed.{name}": cached_row(cached[name], folder="caches-mixed")["difference"]
            for name in ("dual", "once", "fast", "near")
        },
        **{
            f"caches.mixed.{name}.added": cached_row(cached[name], folder="caches-mixed")["sparse"]
            for name in ("fast", "near")
        },
        **{
            f"{name}.256.{rule}": longer_row(row, folder=folder)["difference"]
            for (name, folder), (rule, row) in product(
                (("judge", "table-256"), ("mixed", "table-256-mixed")),
                (*rules.items(), ("few", few), ("fast", fast)),
            )
        },
        "judge.few": judge_row(few, 128)["difference"],
        "judge.fast": judge_row(fast, 128)["difference"],
        "judge.fast.32": judge_row(fast, 32)["difference"],
        **{f"judge.fast.{name}": judge_row(fast, 128, skip=skip)["difference"] for name, skip in SKIPS.items()},
        **{
            f"judge.{rule}.rate.{rate}": found(
                judged("table")["rows"],
                {**row, "skip": 0.2, "block_size": 128, "length": 4096, "mask_rate": rate},
            )["difference"]
            for rule, row in rules.items()
            for rate in (0.75, 0.25)
        },
        **{
            f"mixed.{name}.8192.64": mixed_row(row, 64, 8192)["difference"]
            for name, row in (*rules.items(), ("few", few), ("fast", fast))
        },
        "written.most": written_row(FULL | {"steps": 96})["difference"],
        "written.half.dual": written_row(DUAL | {"steps": 64})["difference"],
        "written.quarter.dual": written_row(DUAL | {"steps": 32})["difference"],
        "written.factor": written_row(FULL | {"factor": 2.0})["difference"],
        "written.half": written_row(FULL | {"steps": 64})["difference"],
        "written.quarter": written_row(FULL | {"steps": 32})["difference"],
    }
    nearer = judge_row(paper, 128)["kl"][0] / judge_row(dense, 128)["kl"][0]
    low, high = values["written.half"][1:]
    more = cached_row(cached["once"])["difference"][0] - cached_row(DUAL)["difference"][0]
    cells, uncached = answered_cells(), answered_row("dream", ANSWERED[f"{PAPER}, 0.3"], "caches-ragged")
    blocks = answered_row("dream", FULL | {"threshold": 1.01})
    widths = [abs(row["difference"] - row[f"difference_{end}"]) for row in cells for end in ("low", "high")]
    on_values = [lost for place in product(TITLES, ANSWERS) for lost in values_lost(*place)]
    percents = {
        f"heads.{name}{ending}": row[name]
        for (row, ending), name in product(((heads, ""), (others, ".clean")), ("held", "later", "heads", "steps_alike"))
    }
    least = min(gate[name]["advantage"][1] for gate in gates for name in ("planted", "copy", "repeated"))
    gains = {
        f"{folder}.gain.{name}": row_of(row, 128, 8192)["gain"]
        for (folder, row_of), (name, row) in product(
            (("mixed", mixed_row), ("clean", clean_row)), (("dense", dense), ("fast", fast))
        )
    }
    return {
        **{name: f"{value[0]:.3f}" for name, value in values.items()},
        **{name: f"{value[0]:.3f}" for name, value in gains.items()},
        **{
            f"{name}.{end}": f"{value[at]:.3f}"
            for name, value in gains.items()
            for at, end in ((1, "low"), (2, "high"))
        },
        "clean.gate.least": f"{least:.3f}",
        "clean.gain.dense.nearer": f"{-gains['clean.gain.dense'][0]:.3f}",
        "clean.gain.dense.nearer.low": f"{-gains['clean.gain.dense'][2]:.3f}",
        "clean.gain.dense.nearer.high": f"{-gains['clean.gain.dense'][1]:.3f}",
        "clean.streaming.gains": f"{-values['clean.streaming'][0]:.3f}",
        "answers.values.least": f"{-max(on_values):.1f}",
        "answers.values.most": f"{-min(on_values):.1f}",
        "judge.nearer": f"{nearer:.1f}",
        "written.factor.low": f"{values['written.factor'][1]:.2f}",
        "written.factor.high": f"{values['written.factor'][2]:.2f}",
        "written.half.low": f"{low:.2f}",
        "written.half.high": f"{high:.2f}",
        "caches.once.more": f"{more:.3f}",
        "answers.factor": f"{factor_costs():.1f}",
        **{f"timed.{family}.full": f"{1e3 * seconds_of(family, FULL):.0f}" for family in TITLES},
        "answers.blocks": f"{blocks['difference']:.1f}",
        "answers.paper": f"{-uncached['difference']:.1f}",
        "answers.paper.low": f"{-uncached['difference_high']:.2f}",
        "answers.paper.high": f"{-uncached['difference_low']:.1f}",
        "answers.narrowest": f"{min(widths):.1f}",
        "answers.widest": f"{max(widths):.1f}",
        "caches.answered.most": f"{most_lost():.1f}",
        **{
            f"mixed.kl.{name}.{length}.{size}": f"{mixed_row(row, size, length)['kl'][0]:.3f}"
            for (name, row), length, size in product(rules.items(), LENGTHS, (128, 32))
        },
        "judge.kl.paper": f"{judge_row(paper, 128)['kl'][0]:.3f}",
        "judge.kl.dense.2": f"{judge_row(dense | {'select': 0.2}, 128)['kl'][0]:.3f}",
        **{name: f"{100 * value[0]:.0f}" for name, value in percents.items()},
    }
