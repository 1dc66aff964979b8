"""The figures in the pages' sentences about steps, kernels and CPUs, from their records."""

from collections.abc import Callable
from itertools import product
from typing import Any

from .common import LENGTHS
from .readme_generation import UNCACHED_PAPER, rows_of
from .records import benchmarks_of

Record = dict[str, Any]
Read = Callable[[str], Record]  # a record of benchmarks/results by its name
FAMILIES = ("dream", "llada")
# with FlashAttention-4 and without it; the second record has other lengths too
BREAKDOWNS = {"flash": "breakdown-{}-64k-flash-h100", "triton": "breakdown-{}-h100"}
GB = 1e9


def steps_figures(read: Read, latency: list[Record]) -> dict[str, str]:
    """By name; `latency` holds the records with whole runs worked out from their steps."""
    rows = {(record["family"], row["length"]): row for record in latency for row in record["rows"]}
    found = _selecting_figures(rows) | _shares_of_short(read)
    for family in FAMILIES:
        found |= _latency_figures(family, rows[family, "64k"], rows[family, "short_context"])
        found |= _breakdown_figures(read, family)
        found |= _short_prompt_figures(read, family)
        found |= _memory_figures(family, rows[family, "64k"])
        found |= _kernel_figures(read, family)
        found |= _first_use_figures(read, family)
        found |= _cpu_figures(read, family)
    names = [f"{kind}-{family}-h100" for kind, family in product(("attention", "selection"), FAMILIES)]
    most = max(read(name)["matmul_tflops"] for name in names)
    return found | _small_block_figures(read) | _unchanged_figures(read) | {"kernel.matmul.most": f"{most:.0f}"}


def _unchanged_figures(read: Read) -> dict[str, str]:
    """The most, in %, by which a full, a sparse or the selecting step takes longer than before there were caches."""
    longer = []
    for family in FAMILIES:
        before, after = (read(f"unchanged-{family}-{when}-h200")["rows"][0]["runs"] for when in ("before", "after"))
        steps = [_whole_steps(runs) for runs in (before, after)]
        longer += [new / old - 1 for old, new in zip(*steps, strict=True)]
    return {"unchanged.slower": f"{100 * max(longer):.1f}"}


def _whole_steps(runs: Record) -> list[float]:
    """Seconds of a full step in both modes, a sparse one, and one that selects."""
    full, sparse, selection = (runs["sparsed"][phase]["median"] for phase in ("full_step", "sparse_step", "selection"))
    return [runs["origin"]["full_step"]["median"], full, sparse, full + selection]


def of_full(row: Record, phase: str) -> float:
    """The time of a phase of SparseD over that of a full step."""
    return row["runs"]["sparsed"][phase]["median"] / row["runs"]["origin"]["full_step"]["median"]


def _latency_figures(family: str, long: Record, short: Record) -> dict[str, str]:
    """The gain of 1,024 forwards at 64k and its bound; how much slower SparseD is where every block is kept."""
    gains = {who: f"{long['speedup']['1024'][who]:.2f}" for who in ("origin", "released_origin")}
    slower = 1 / short["speedup"]["128"]["origin"] - 1
    return {
        f"latency.{family}.bound": f"{long['bound']:.2f}",
        **{f"latency.{family}.1024.{who}": gain for who, gain in gains.items()},
        f"latency.{family}.short.slower": f"{100 * slower:.1f}",
    }


def _selecting_figures(rows: dict[tuple[str, str], Record]) -> dict[str, str]:
    """Selecting the blocks over a full step: at 64k, at 4k, and the least and the most from 4k on."""
    shares = {place: of_full(row, "selection") for place, row in rows.items() if LENGTHS[place[1]] >= LENGTHS["4k"]}
    found = {f"latency.{family}.{length}.selecting": share for (family, length), share in shares.items()}
    found |= {"latency.selecting.least": min(shares.values()), "latency.selecting.most": max(shares.values())}
    return {name: f"{share:.2f}" for name, share in found.items()}


def _breakdown_figures(read: Read, family: str) -> dict[str, str]:
    """Seconds of the GPU in a step at 64k, and in its attention and its linear layers."""
    found = {}
    for kernel, name in BREAKDOWNS.items():
        steps = next(row["steps"] for row in read(name.format(family))["rows"] if row["length"] == "64k")
        for step in ("full", "sparse"):
            spent, place = steps[step]["purposes"], f"breakdown.{family}.{kernel}.{step}"
            found[place] = f"{sum(spent.values()):.2f}"
            found[f"{place}.attention"] = f"{spent['attention']:.2f}"
            found[f"{place}.linear"] = f"{spent['linear layers']:.2f}"
    return found


def _shares_of_short(read: Read) -> dict[str, str]:
    """Linear layers' least and largest share in the GPU's time of a step on `short_context`, in %."""
    rows = [row for family in FAMILIES for row in read(f"breakdown-{family}-h100")["rows"]]
    spent = [step["purposes"] for row in rows if row["length"] == "short_context" for step in row["steps"].values()]
    shares = [100 * each["linear layers"] / sum(each.values()) for each in spent]
    return {"breakdown.short.least": f"{min(shares):.0f}", "breakdown.short.most": f"{max(shares):.0f}"}


def _short_prompt_figures(read: Read, family: str) -> dict[str, str]:
    """Gains of 128 steps on short prompts, and selecting over a full step at 1k."""
    rows = {row["length"]: row for row in read(f"below-4k-{family}-h100")["rows"]}
    found = {f"below.{family}.{length}": f"{row['speedup']['128']['origin']:.2f}" for length, row in rows.items()}
    return found | {f"below.{family}.1k.selecting": f"{of_full(rows['1k'], 'selection'):.2f}"}


def _small_block_figures(read: Read) -> dict[str, str]:
    """LLaDA's sparse step with blocks of 32 over a full one."""
    rows = [row for length in ("4k", "16k") for row in read(f"block32-llada-{length}-h100")["rows"]]
    return {f"small.{row['length']}": f"{of_full(row, 'sparse_step'):.2f}" for row in rows}


def _memory_figures(family: str, long: Record) -> dict[str, str]:
    """The peak of SparseD's defaults at 64k, before the MLP was computed in chunks and after."""
    ways = rows_of(benchmarks_of("generation"))[family, "64k"]
    before, after = (run["peak_memory_bytes"] / GB for run in (long["runs"]["sparsed"], ways[UNCACHED_PAPER]))
    return {f"memory.{family}.before": f"{before:.1f}", f"memory.{family}.after": f"{after:.1f}"}


def _kernel_figures(read: Read, family: str) -> dict[str, str]:
    """At 64k: full attention, a matrix product, sparse attention over its ideal, scores over full attention, top-k."""
    attention, selection = (read(f"{kind}-{family}-h100") for kind in ("attention", "selection"))
    rows = {row["kernel"]: row for found in (selection, attention) for row in found["rows"] if row["length"] == "64k"}
    return {
        f"kernel.{family}.full": f"{rows['full attention']['tflops']:.0f}",
        f"kernel.{family}.matmul": f"{attention['matmul_tflops']:.0f}",
        f"kernel.{family}.sparse": f"{rows['flash']['ratio']:.2f}",
        f"kernel.{family}.scores": f"{rows['block scores']['ratio']:.2f}",
        f"kernel.{family}.top-k": f"{1e3 * rows['top-k']['seconds']['median']:.1f}",
    }


def _first_use_figures(read: Read, family: str) -> dict[str, str]:
    """Seconds of both modes' first use at 4k, and selecting over a full step, in a first and a second process."""
    found = {}
    for which in ("first", "second"):
        (row,) = read(f"{which}-run-{family}-4k-h100")["rows"]
        found[f"{which}.{family}"] = f"{sum(run['first_use_seconds'] for run in row['runs'].values()):.1f}"
        found[f"{which}.{family}.selecting"] = f"{of_full(row, 'selection'):.2f}"
    return found


def _cpu_figures(read: Read, family: str) -> dict[str, str]:
    """The demo on a CPU: gains, selecting over a full step, how far full steps differ; memory and steps at 64k."""
    whole, (long,) = read(f"demo-4k-{family}-cpu"), read(f"cpu-memory-{family}")["lengths"]
    gains, spent = whole["comparison"]["speedup"], whole["comparison"]["seconds"]["sparsed"]
    origin, sparsed = whole["runs"]
    steps, name = long["step_seconds"], f"cpu.{family}"
    drift = max(origin["step_seconds"]) / min(origin["step_seconds"]) - 1
    return {
        f"{name}.whole": f"{gains['whole']:.2f}",
        f"{name}.sparse": f"{gains['sparse_steps']:.2f}",
        f"{name}.full_steps": str(sparsed["full_steps"]),
        f"{name}.selecting": f"{spent['selection'] / (spent['full_steps'] / sparsed['full_steps']):.1f}",
        f"{name}.drift": f"{100 * drift:.0f}",
        f"{name}.density": f"{read(f'demo-steps-{family}-cpu')['density']:.2f}",
        f"{name}.memory": f"{long['bytes_at_most'] / GB:.1f}",
        f"{name}.64k.selecting": f"{steps['selecting'] / steps['full']:.1f}",
        f"{name}.64k.sparse": f"{steps['sparse'] / steps['full']:.2f}",
    }
