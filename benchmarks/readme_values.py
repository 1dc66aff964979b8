"""What the tables and figures of README.md and docs/ are: from the committed records, by their marks' names."""

import json
import statistics
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from sparsed import SparseDConfig
from sparsed.evaluation.results import markdown

from .common import seconds
from .phases import derive
from .plot import overview
from .readme_generation import generation_figures, generation_table, generation_table_short
from .readme_parallel import paper_table, parallel_figures, parallel_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
TITLES = {"dream": "Dream", "llada": "LLaDA"}
METHODS = {
    "origin": "full attention",
    "sparsed": "SparseD",
    "no_skip": "SparseD without skipping",
    "no_isolation": "SparseD without isolated selection",
    "window": "sliding window",
    "streaming": "StreamingLLM",
}
PAPER, DENSE = "SparseD, select {}, block_size {}", "SparseD, dense answer rows, select {}, block_size {}"
LATER = ", selected at 0.2"
FIDELITY = {  # the README's line: the record's title
    "the paper's rule, `--select` 0.3": PAPER.format(0.3, 128),
    **{f"the paper's rule, {select}": PAPER.format(select, 128) for select in (0.15, 0.1)},
    **{f"dense answer rows, {select}": DENSE.format(select, 128) for select in (0.5, 0.3, 0.2, 0.15, 0.1, 0.05)},
    "selected after a fifth of the answer: the paper's rule, 0.3": PAPER.format(0.3, 128) + LATER,
    **{f"the same, dense answer rows, {select}": DENSE.format(select, 128) + LATER for select in (0.3, 0.15, 0.1)},
    "blocks of 32: the paper's rule, 0.3": PAPER.format(0.3, 32),
    "blocks of 32: dense answer rows, 0.3": DENSE.format(0.3, 32),
    "sliding window, 0.3": "sliding window, select 0.3, block_size 128",
    "sliding window with dense answer rows, 0.3": "sliding window, dense answer rows, select 0.3, block_size 128",
    "StreamingLLM, 0.3": "StreamingLLM, select 0.3, block_size 128",
    "StreamingLLM with dense answer rows, 0.3": "StreamingLLM, dense answer rows, select 0.3, block_size 128",
}
WINDOW, STREAMING = "sliding window, select {}, block_size {}", "StreamingLLM, select {}, block_size {}"
QUALITY = (  # the README's line, method, share of blocks, dense answer rows
    ("full attention", "origin", None, False),
    ("SparseD, the paper's, select 0.3", "sparsed", 0.3, False),
    ("SparseD, dense answer rows, select 0.3", "sparsed", 0.3, True),
    ("SparseD, dense answer rows, select 0.2", "sparsed", 0.2, True),
    ("sliding window, as dense as select 0.3", "window", 0.3, False),
    ("StreamingLLM, as dense as select 0.3", "streaming", 0.3, False),
)
FAST, PAPERS = "dense answer rows, select 0.15", "the paper's, select 0.3"
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

Record = dict[str, Any]


@cache
def benchmark(name: str) -> Record:
    """A record of benchmarks/results."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


@cache
def evaluation(name: str) -> Record:
    """The summary of an evaluation of a demo model."""
    return json.loads((ROOT / "demo/evaluation" / name / "summary.json").read_text(encoding="utf-8"))


def averages(name: str) -> dict[str, Record]:
    """The averages over tasks by method, of an evaluation with one setting of each."""
    return {row["method"]: row for row in evaluation(name)["averages"]}


def fidelity(new_tokens: int) -> dict[str, Record]:
    """The settings of the record of fidelity by their titles."""
    rows = benchmark("fidelity-smollm2-h200")["rows"]
    return {found["title"]: found for row in rows if row["new_tokens"] == new_tokens for found in row["settings"]}


def speeds(family: str, length: str) -> dict[str, Record]:
    """The settings of the record of dense answer rows by their names."""
    rows = benchmark(f"dense-answer-{family}-h200")["rows"]
    return next(row["runs"] for row in rows if row["length"] == length)


def tables() -> dict[str, str]:
    """Every table in Markdown, by name."""
    return {
        "fidelity": _fidelity(),
        "dense-answer-speed": _dense_answer_speed(),
        "demo-accuracy": _demo_accuracy(),
        "demo-others": _demo_others(),
        "dense-answer-accuracy": _dense_answer_accuracy(),
        "demo-steps": _demo_steps(),
        "latency": overview(_latency()),
        "generation": generation_table(_generation(), TITLES),
        "generation-short": generation_table_short(_generation(), TITLES),
        "quality-short": _quality(),
        "parallel": parallel_table(_parallel(), TITLES),
        "parallel-paper": paper_table(_parallel(), TITLES),
    }


def figures() -> dict[str, str]:
    """Every figure as it is written in a sentence, by name."""
    return {
        **_fidelity_figures(),
        **_speed_figures(),
        **_accuracy_figures(),
        **_dense_accuracy_figures(),
        **_agreement_figures(),
        **_flex_figures(),
        **_cache_figures(),
        **generation_figures(_generation()),
        **parallel_figures(_parallel(), TITLES),
        **_released_figures(),
        **_parity_figures(),
        **{f"show.{family}": f"{100 * benchmark(f'show-{family}-cpu')['cost']:.1f}" for family in TITLES},
    }


def _fidelity() -> str:
    settings = [fidelity(new_tokens) for new_tokens in (128, 256)]
    columns = ["", *(name for n in (128, 256) for name in (f"{n} new tokens: KL", "same token, %"))]
    lines = [
        [label, *(cell for found in settings for cell in _distance(found[title]))] for label, title in FIDELITY.items()
    ]
    return markdown(columns, lines)


def _distance(found: Record) -> list[str]:
    return ["{:.3f} ({:.3f} to {:.3f})".format(*found["kl"]), f"{100 * found['same_token'][0]:.1f}"]


def _quality() -> str:
    """Accuracy of the demo models and distance on the real one, of some ways to attend."""
    lines = []
    for title, method, select, dense in QUALITY:
        cells = []
        for family in TITLES:
            found = answered(family, "dense", 4096, method)
            row = found[128 if select else None, select, 0.2 if method == "sparsed" else None, dense]
            cells.append(f"{row['accuracy']:.1f}")
        name = {"sparsed": DENSE if dense else PAPER, "window": WINDOW, "streaming": STREAMING}.get(method)
        cells += ["-", "-"] if name is None else _distance(fidelity(128)[name.format(select, 128)])
        lines.append([title, *cells])
    return markdown(["", *(f"{title}, %" for title in TITLES.values()), "distance", "same token, %"], lines)


def _fidelity_figures() -> dict[str, str]:
    short, long = ({title: row["kl"][0] for title, row in fidelity(n).items()} for n in (128, 256))
    paper, dense = PAPER.format(0.3, 128), DENSE.format(0.3, 128)
    window = "sliding window, dense answer rows, select 0.3, block_size 128"
    part = "only the {}, select 0.3, block_size 128"
    parts = {"rows": "prompt's rows", "keys": "answer's rows: prompt keys", "own": "answer's rows: answer keys"}
    return {
        "fidelity.nearer": f"{short[paper] / short[dense]:.0f}",
        "fidelity.nearer-256": f"{long[paper] / long[dense]:.0f}",
        "fidelity.nearer-later": f"{short[paper + LATER] / short[dense + LATER]:.0f}",
        "fidelity.windows": f"{short[window] / short[dense]:.0f}",
        "fidelity.paper": f"{short[paper]:.3f}",
        "fidelity.dense": f"{short[dense]:.3f}",
        "fidelity.fast": f"{short[DENSE.format(0.15, 128)]:.3f}",
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
        for family, length in product(TITLES, ("16k", "128k"))
        for kind, name, skip in (("fast", FAST, "0.05"), ("paper", PAPERS, "0.2"))
    }


def _demo_accuracy() -> str:
    lines = []
    tasks = list(dict.fromkeys(row["task"] for row in evaluation("dream-4k")["rows"]))
    for family, title in TITLES.items():
        for method, average in averages(f"{family}-4k").items():
            rows = [row for row in evaluation(f"{family}-4k")["rows"] if row["method"] == method]
            assert [row["task"] for row in rows] == tasks
            cells = [f"{row['accuracy']:.1f}" for row in (*rows, average)]
            lines.append([f"{title}, {METHODS[method]}", f"{average['density']:.2f}", *cells, _difference(average)])
    return markdown(["", "density", *(f"`{task}`" for task in tasks), "average", "to full attention"], lines)


def _demo_others() -> str:
    lines = []
    for folder, what in (("4k-held-out", "seed 1, 4,096 tokens"), ("8k", "8,192 tokens")):
        for family, title in TITLES.items():
            found = averages(f"{family}-{folder}")
            full, sparse, window = (found[method] for method in ("origin", "sparsed", "window"))
            cells = [f"{row['accuracy']:.1f}" for row in (full, sparse, window)]
            cells[1:] = [f"{cells[1]}, {_difference(sparse)}", f"{cells[2]}, {_difference(window)}"]
            lines.append([f"{title}, {what}", *cells])
    return markdown(["average", "full attention", "SparseD", "sliding window"], lines)


def _difference(row: Record, name: str = "difference") -> str:
    if row[name] is None:
        return "-"
    return f"{row[name]:+.1f} ({row[f'{name}_low']:+.1f} to {row[f'{name}_high']:+.1f})"


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
                cells += [f"{plain['difference']:+.1f}", f"{dense['difference']:+.1f}", _difference(dense, "gain")]
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
    """FlexAttention's time over that of our Triton kernel at the same blocks, and what its first use takes."""
    found = {}
    for family in TITLES:
        rows = {(row["length"], row["kernel"]): row for row in benchmark(f"attention-{family}-flex-h200")["rows"]}
        for length in ("4k", "64k"):
            flex, ours = (rows[length, kernel]["seconds"]["median"] for kernel in ("flex", "triton"))
            found[f"flex.{family}.{length}"] = f"{flex / ours:.2f}"
        found[f"flex.{family}.first"] = f"{rows['4k', 'flex']['first_use_seconds']:.1f}"
    return found


def _cache_figures() -> dict[str, str]:
    """What a cache gains on the demo's 4k prompt on a CPU, without SparseD and with it."""
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
    records = [benchmark(path.stem) for path in sorted(RESULTS.glob("latency-*.json"))]
    return [
        record | {"rows": [row | derive(row["runs"], SparseDConfig(**record["config"])) for row in record["rows"]]}
        for record in records
    ]


def _released_figures() -> dict[str, str]:
    """How many times faster than the released code's two ways 128 steps with SparseD are at 64k."""
    found = {}
    for record in _latency():
        for row in record["rows"]:
            gains = row["speedup"]["128"]
            if row["length"] == "64k" and "released_sparsed" in gains:
                for name in ("released_origin", "released_sparsed"):
                    found[f"latency.{record['family']}.{name}"] = f"{gains[name]:.2f}"
    return found


def _parity_figures() -> dict[str, str]:
    """In how many generations ours wrote Fast-dLLM's tokens."""
    found = benchmark("fast-dllm-parity-cpu")
    return {f"parity.{name}": str(found[name]) for name in ("generations", "same_tokens", "as_many_forwards")}


def _generation() -> list[Record]:
    return [benchmark(path.stem) for path in sorted(RESULTS.glob("generation-*.json"))]


def _parallel() -> list[Record]:
    return [benchmark(path.stem) for path in sorted(RESULTS.glob("parallel-*.json"))]
