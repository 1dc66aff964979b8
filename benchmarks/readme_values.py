"""The values of the pages' tables and figures, from the committed records, by their marks' names."""

import statistics
from itertools import product

import numpy as np

from sparsed import SparseDConfig
from sparsed.evaluation.results import figure, markdown

from . import readme_judge
from .breakdown import by_purpose
from .common import seconds
from .phases import derive
from .plot import overview
from .readme_generation import (
    DUAL,
    EQUAL,
    FULL,
    SPARSE,
    generation_figures,
    generation_table,
    generation_table_short,
    rows_of,
)
from .readme_judge import answered_row, cached_row, judge_row, nats
from .readme_parallel import kernels_table, paper_table, parallel_figures, parallel_table, sums_figures
from .readme_steps import steps_figures
from .records import ROOT, TITLES, Record, benchmark, benchmarks_of, evaluation, read

METHODS = {
    "origin": "full attention",
    "sparsed": "SparseD",
    "no_skip": "SparseD without skipping",
    "no_isolation": "SparseD without isolated selection",
    "window": "sliding window",
    "streaming": "StreamingLLM",
}
QUALITY = (  # the README's line, method, share of blocks, dense answer rows
    ("SparseD, the paper's, select 0.3", "sparsed", 0.3, None),
    ("SparseD, dense answer rows, select 0.3", "sparsed", 0.3, True),
    ("SparseD, dense answer rows, select 0.2", "sparsed", 0.2, True),
    ("sliding window, as dense as select 0.3", "window", 0.3, None),
)
QUALITY_CACHED = (
    ("dual cache", readme_judge.DUAL),
    ("dual cache, SparseD, dense answer rows, select 0.15", readme_judge.FAST),
)
FAST, DENSE = "dense answer rows, select 0.15", "dense answer rows, select 0.3"
PAPERS = "the paper's, select 0.3"
# folder, length, new tokens, blocks, the shares that are shown
ANSWERED = (
    ("1k", 1024, 64, 128, (0.2, 0.3)),
    ("1k", 1024, 64, 32, (0.2,)),
    ("dense", 4010, 64, 128, (0.2,)),
    ("dense", 4010, 64, 32, (0.2,)),
    ("dense", 4096, 64, 128, (0.05, 0.1, 0.2, 0.3)),
    ("dense", 4096, 64, 64, (0.05, 0.2)),
    ("dense", 4096, 64, 32, (0.05, 0.2)),
    ("dense-128", 4096, 128, 128, (0.2, 0.3)),
)


def averages(name: str) -> dict[str, Record]:
    """The averages over tasks by method, of an evaluation with one setting per method."""
    return {row["method"]: row for row in evaluation(name)["averages"]}


def fidelity(new_tokens: int) -> dict[str, Record]:
    """The fidelity record's settings, by title."""
    rows = benchmark("fidelity-smollm2-h200")["rows"]
    return {found["title"]: found for row in rows if row["new_tokens"] == new_tokens for found in row["settings"]}


def speeds(family: str, length: str) -> dict[str, Record]:
    """The settings in the record of dense answer rows, by name."""
    rows = benchmark(f"dense-answer-{family}-h200")["rows"]
    return next(row["runs"] for row in rows if row["length"] == length)


def tables() -> dict[str, str]:
    """Every table in Markdown, by name."""
    return {
        "dense-answer-speed": _dense_answer_speed(),
        "demo-accuracy": _demo_accuracy(),
        "demo-others": _demo_others(),
        "dense-answer-accuracy": _dense_answer_accuracy(),
        "demo-steps": _demo_steps(),
        "latency": overview(_latency()),
        "generation": generation_table(benchmarks_of("generation"), TITLES),
        "generation-flash": generation_table(benchmarks_of("flash-generation"), TITLES),
        "generation-short": generation_table_short(benchmarks_of("generation"), TITLES),
        "quality-short": _quality(),
        **readme_judge.judge_tables(),
        "few-queries": _few_queries(),
        "parallel": parallel_table(benchmarks_of("parallel"), TITLES),
        "parallel-kernels": kernels_table(benchmarks_of("parallel"), TITLES),
        "parallel-paper": paper_table(benchmarks_of("parallel"), TITLES),
    }


def figures() -> dict[str, str]:
    """Every figure as written in a sentence, by name."""
    return {
        **_fidelity_figures(),
        **_speed_figures(),
        **_accuracy_figures(),
        **_dense_accuracy_figures(),
        **_agreement_figures(),
        **_flex_figures(),
        **_cache_figures(),
        **generation_figures(benchmarks_of("generation")),
        **_bound_figures(),
        **_flash_figures(),
        **sums_figures(benchmarks_of("sums"), benchmarks_of("parallel")),
        **parallel_figures(benchmarks_of("parallel"), TITLES),
        **_released_figures(),
        **_parity_figures(),
        **steps_figures(benchmark, _latency()),
        **_checkpoint_figures(),
        **readme_judge.judge_figures(),
        **{f"show.{family}": f"{100 * benchmark(f'show-{family}-cpu')['cost']:.1f}" for family in TITLES},
    }


def _few_queries() -> str:
    """How long attention of few rows over many keys takes by each kernel."""
    lines = []
    for family, title in TITLES.items():
        rows = benchmark(f"few-queries-{family}-h200")["rows"]
        for place in dict.fromkeys((row["length"], row["queries"]) for row in rows):
            own, split, *others = (row for row in rows if (row["length"], row["queries"]) == place)
            times = [f"{1e6 * row['seconds']['median']:.0f}" for row in (split, *others)]
            lines.append([f"{title}, {place[0]}", str(place[1]), *times, own["kernel"].split(": ")[1].split(",")[0]])
    return markdown(["model, keys", "rows", "split", "cuDNN", "FlashAttention-2", "taken"], lines)


def _quality() -> str:
    """What some ways to attend, and caches, lose on the demo models and on the real one."""
    lines = []
    for title, method, select, dense in QUALITY:
        skip = 0.2 if method == "sparsed" else None
        rows = [answered(family, "dense", 4096, method)[128, select, skip, bool(dense)] for family in TITLES]
        row = judge_row({"method": method, "select": select, "dense_answer": dense}, 128)
        lines.append([title, *_lost(row), *(figure(row, "difference") for row in rows)])
    for place, (title, wanted) in enumerate(QUALITY_CACHED, len(lines) - 1):  # the window comes last
        rows = [answered_row(family, wanted) for family in TITLES]
        lines.insert(place, [title, *_lost(cached_row(wanted)), *(figure(row, "difference") for row in rows)])
    return markdown(["", "nats", "same token, %", *(f"{title}, points" for title in TITLES.values())], lines)


def _lost(row: Record) -> list[str]:
    return [nats(row["difference"]), f"{100 * row['same'][0]:.1f}"]


def _bound_figures() -> dict[str, str]:
    """How many times as fast LLaDA's dual cache at 64k could be if a cached step took only its kernels' time and a
    full one no longer than without a cache; the ms of such a step at which it would be 30 times."""
    ways = rows_of(benchmarks_of("generation"))["llada", "64k"]
    (row,) = benchmark("parallel-llada-64k-h200")["rows"]
    kernels = sum(by_purpose(row["one"]["cached_step"]["kernels"]).values())
    whole = ways[FULL]["steps"][EQUAL]["seconds"]
    counts = {kind: part["count"] for kind, part in ways[DUAL]["steps"][EQUAL]["forwards"].items()}
    full = counts["full"] * whole / int(EQUAL)
    return {
        "generation.bound": f"{whole / (full + counts['cached'] * kernels):.1f}",
        "generation.bound.step": f"{1e3 * (whole / 30 - full) / counts['cached']:.1f}",
    }


def _flash_figures() -> dict[str, str]:
    """By how many % FlashAttention-4 makes LLaDA's full steps and sparse refreshes at 64k faster."""
    plain, flash = (rows_of(benchmarks_of(kind))["llada", "64k"] for kind in ("generation", "flash-generation"))
    found = {}
    for kind, way in (("full", FULL), ("sparse", SPARSE)):
        times = [ways[way]["steps"][EQUAL]["forwards"][kind]["seconds"]["median"] for ways in (plain, flash)]
        found[f"flash.llada.{kind}"] = f"{100 * (times[0] / times[1] - 1):.0f}"
    return found


def _fidelity_figures() -> dict[str, str]:
    """What the paper's rule loses by its parts, one at a time; selected in the first step."""
    short, long = ({title: row["kl"][0] for title, row in fidelity(n).items()} for n in (128, 256))
    part = "only the {}, select 0.3, block_size 128"
    parts = {"rows": "prompt's rows", "keys": "answer's rows: prompt keys", "own": "answer's rows: answer keys"}
    return {
        "fidelity.paper": f"{short['SparseD, select 0.3, block_size 128']:.3f}",
        **{f"fidelity.{name}": f"{short[part.format(what)]:.3f}" for name, what in parts.items()},
        **{f"fidelity.{name}-256": f"{long[part.format(what)]:.3f}" for name, what in parts.items()},
    }


def _dense_answer_speed() -> str:
    lines = []
    for family, title in reversed(TITLES.items()):
        for name, run in speeds(family, "64k").items():
            if name == "full attention":
                whole = map(seconds, run["whole_seconds"].values())
                lines.append([f"{title}, {name}", seconds(run["full_step"]["median"]), "-", *whole])
            for skip, found in run.get("skips", {}).items():
                pairs = zip(found["whole_seconds"].values(), found["speedup"].values(), strict=True)
                times = [f"{seconds(took)} ({gain:.2f}x)" for took, gain in pairs]
                lines.append([f"{title}, {name}, skip {skip}", "-", seconds(run["sparse_step"]["median"]), *times])
    return markdown(["64k", "full step", "sparse step", "128 steps", "1,024 steps"], lines)


def _speed_figures() -> dict[str, str]:
    return {
        f"speed.{family}.{length}.{kind}": f"{speeds(family, length)[name]['skips'][skip]['speedup']['1024']:.2f}"
        for family, length in product(TITLES, ("16k", "64k", "128k"))
        for kind, name, skip in (("fast", FAST, "0.05"), ("paper", PAPERS, "0.2"), ("dense", DENSE, "0.2"))
    }


def _demo_accuracy() -> str:
    lines = []
    tasks = list(dict.fromkeys(row["task"] for row in evaluation("dream-4k")["rows"]))
    for family, title in TITLES.items():
        for method, average in averages(f"{family}-4k").items():
            rows = [row for row in evaluation(f"{family}-4k")["rows"] if row["method"] == method]
            assert [row["task"] for row in rows] == tasks
            cells = [f"{row['accuracy']:.1f}" for row in (*rows, average)]
            lines.append(
                [f"{title}, {METHODS[method]}", f"{average['density']:.2f}", *cells, figure(average, "difference")]
            )
    return markdown(["", "density", *(f"`{task}`" for task in tasks), "average", "to full attention"], lines)


def _demo_others() -> str:
    lines = []
    for folder, what in (("4k-held-out", "seed 1, 4,096 tokens"), ("8k", "8,192 tokens")):
        for family, title in TITLES.items():
            found = averages(f"{family}-{folder}")
            full, sparse, window = (found[method] for method in ("origin", "sparsed", "window"))
            cells = [f"{row['accuracy']:.1f}" for row in (full, sparse, window)]
            cells[1:] = [f"{cells[1]}, {figure(sparse, 'difference')}", f"{cells[2]}, {figure(window, 'difference')}"]
            lines.append([f"{title}, {what}", *cells])
    return markdown(["average", "full attention", "SparseD", "sliding window"], lines)


def _accuracy_figures() -> dict[str, str]:
    apart = {seed: _cell(f"dream-4k{seed}", "window", "niah_single_2") for seed in ("", "-held-out")}
    found = {"seeds.first": f"{apart['']['accuracy']:.1f}", "seeds.second": f"{apart['-held-out']['accuracy']:.1f}"}
    for family in TITLES:
        curve = evaluation(f"{family}-4k-curve")
        for row in curve["averages"]:
            if row["method"] == "sparsed":
                found[f"curve.{family}.{row['select']}"] = f"{-row['difference']:.1f}"
        for row in curve["rows"]:
            if (row["method"], row["task"]) == ("sparsed", "vt"):
                found[f"recall.{family}.{row['select']}"] = f"{100 * row['recall']:.0f}"
        small = averages(f"{family}-4k-block32")
        found |= {f"block32.{family}.{method}": f"{row['accuracy']:.1f}" for method, row in small.items()}
        found[f"block32.{family}.lost"] = f"{-small['sparsed']['difference']:.1f}"
        for task in ("niah_multivalue", "niah_multiquery"):
            found[f"block32.{family}.{task}"] = f"{_cell(f'{family}-4k-block32', 'sparsed', task)['accuracy']:.1f}"
    return found


def _cell(name: str, method: str, task: str) -> Record:
    rows = evaluation(name)["rows"]
    return next(row for row in rows if (row["method"], row["task"]) == (method, task))


def answered(family: str, folder: str, length: int, method: str = "sparsed") -> dict[tuple, Record]:
    """The averages of an evaluation with and without dense answer rows, by block size, share, skip and which."""
    return {
        (row["block_size"], row["select"], row["skip"], bool(row["dense_answer"])): row
        for row in evaluation(f"{family}-{folder}")["averages"]
        if (row["length"], row["method"]) == (length, method)
    }


def _dense_answer_accuracy() -> str:
    lines = []
    for folder, length, new_tokens, size, selects in ANSWERED:
        for select in selects:
            cells = []
            for family in TITLES:
                found = answered(family, folder, length)
                plain, dense = (found[size, select, 0.2, which] for which in (False, True))
                cells += [f"{plain['difference']:+.1f}", f"{dense['difference']:+.1f}", figure(dense, "gain")]
            lines.append([f"{length:,} + {new_tokens}", str(size), f"{select:g}", *cells])
    columns = ["tokens", "blocks", "select", *(name for title in TITLES.values() for name in (title, "dense", "gain"))]
    return markdown(columns, lines)


def _dense_accuracy_figures() -> dict[str, str]:
    found = {}
    for family, method in product(TITLES, ("window", "streaming")):
        for (_, select, _, dense), row in answered(family, "dense", 4096, method).items():
            found[f"dense.{family}.{method}.{select}.{'dense' if dense else 'plain'}"] = f"{row['accuracy']:.1f}"
    names = [f"{family}-{folder}" for family, folder in product(TITLES, ("1k", "dense", "dense-128"))]
    rows = [row for name in names for row in evaluation(name)["averages"]]
    accuracies = [row["accuracy"] for row in rows if row["method"] == "origin"]
    for family in TITLES:
        found[f"dense.{family}.1k.lost"] = f"{-answered(family, '1k', 1024)[128, 0.3, 0.2, False]['difference']:.1f}"
    return found | {"dense.full.least": f"{min(accuracies):.1f}", "dense.full.most": f"{max(accuracies):.1f}"}


def _agreement_figures() -> dict[str, str]:
    found = {}
    for family in TITLES:
        samples = benchmark(f"agreement-{family}-h100")["samples"]
        for name in ("common", "early_answer", "late_answer"):
            share = statistics.fmean(np.ravel([sample[name] for sample in samples]))
            found[f"agreement.{family}.{name}"] = f"{100 * share:.1f}"
    return found


def _flex_figures() -> dict[str, str]:
    """FlexAttention's time over that of our Triton kernel at the same blocks, and the time of its first use."""
    found = {}
    for family in TITLES:
        rows = {(row["length"], row["kernel"]): row for row in benchmark(f"attention-{family}-flex-h200")["rows"]}
        for length in ("4k", "64k"):
            flex, ours = (rows[length, kernel]["seconds"]["median"] for kernel in ("flex", "triton"))
            found[f"flex.{family}.{length}"] = f"{flex / ours:.2f}"
        found[f"flex.{family}.first"] = f"{rows['4k', 'flex']['first_use_seconds']:.1f}"
    return found


def _cache_figures() -> dict[str, str]:
    """The gain of a cache on the demo's 4k prompt on a CPU, without SparseD and with it."""
    plain, cached = (run["seconds"] for run in benchmark("cache-demo-llada-cpu")["runs"])
    gain = f"{plain / cached:.0f}"
    return {"cache.demo.full": f"{plain:.0f}", "cache.demo": f"{cached:.1f}", "cache.demo.gain": gain}


def _demo_steps() -> str:
    lines = []
    for family, title in TITLES.items():
        record = benchmark(f"demo-steps-{family}-cpu")
        full, sparse = (f"{record[f'{kind}_step_seconds']:.2f} s" for kind in ("full", "sparse"))
        lines.append([title, full, sparse, f"{record['speedup']:.2f}x"])
    return markdown(["", "full step", "sparse step", "speed-up of a step"], lines)


def _latency() -> list[Record]:
    """The records of latency, with whole runs worked out from their steps."""
    return [
        record | {"rows": [row | derive(row["runs"], SparseDConfig(**record["config"])) for row in record["rows"]]}
        for record in benchmarks_of("latency")
    ]


def _released_figures() -> dict[str, str]:
    """How many times faster 128 steps with SparseD are at 64k than the released code's two modes."""
    found = {}
    for record in _latency():
        for row in record["rows"]:
            gains = row["speedup"]["128"]
            if row["length"] == "64k" and "released_sparsed" in gains:
                for name in ("released_origin", "released_sparsed"):
                    found[f"latency.{record['family']}.{name}"] = f"{gains[name]:.2f}"
    return found


def _parity_figures() -> dict[str, str]:
    """The number of generations in which ours wrote Fast-dLLM's tokens."""
    found = benchmark("fast-dllm-parity-cpu")
    return {f"parity.{name}": str(found[name]) for name in ("generations", "same_tokens", "as_many_forwards")}


def _checkpoint_figures() -> dict[str, str]:
    """The demo checkpoints' word problems that were right, in %, and the steps and seconds of their training."""
    found, took = {}, []
    results = read(ROOT / "demo/results.json")
    for family in TITLES:
        training = read(ROOT / "demo" / family / "training.json")["progress"]
        took.append(training["seconds"])
        found[f"demo.{family}.steps"] = f"{training['step']:,}"
        for mode in ("origin", "sparsed"):
            found[f"demo.{family}.{mode}"] = f"{results[family]['word_problems'][mode]['exact_percent']:.1f}"
    return found | {"demo.seconds": f"{max(took):.0f}"}
