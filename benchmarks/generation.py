"""Whole generations on one GPU: full attention, SparseD, a block cache, and both, in equal steps and in fewer.

    python -m benchmarks.generation --family llada --lengths 4k,16k,32k,64k --out FILE.json

Batch 1, 256 new tokens in blocks of 32, bfloat16, greedy, random weights of the published shape. 256 steps give a block
one forward of all rows and 31 cached ones; 72 steps give it one and 8. Cached generations are run whole, --repeats
times, uncached ones once. Beyond 16k, uncached ones are put together from the medians of a few forwards of each kind,
and the record says so (`measured`). A prefix cache's cached steps compute from 256 rows down to 32. At each length
every way's attention is first checked against float64 on random heads, and every way of the call has run once at the
first length (`warm_up`: its time). With --reference, Fast-dLLM's own code then runs in its own process; `ours_faster`
compares it with our dual cache at the same number of forwards of each kind. The record is written after each way.
"""

import argparse
import gc
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from sparsed import SparseDConfig
from sparsed.backends import DENSE, Problem, choose_backend
from sparsed.console.parser import Parser
from sparsed.console.readers import some_of, whole
from sparsed.evaluation.results import markdown
from sparsed.kernels import full_attention, full_attention_kernel
from sparsed.laps import Laps
from sparsed.models.common import DiffusionLM
from sparsed.sampling import Settings, generate, schedule_of
from sparsed.sampling.common import CACHED, Step, attention_of
from sparsed.sampling.settings import FAMILIES
from sparsed.schedule import FULL, SELECTING, SPARSE, ByStep
from sparsed.selection import SPARSED

from . import fast_dllm
from .common import (
    LENGTHS,
    brief,
    build_parser,
    new_record,
    parse_arguments,
    peak_memory,
    require_gpu,
    reset_peak,
    save,
)
from .dense_answer import checked_dense_answer
from .kernels import DTYPE, Gate, Heads, attention_gate, random_heads
from .latency import WrongKernel, checked_kernel
from .reference import check_reference
from .shapes import SHAPES, attention_shape, random_model

NEW_TOKENS, BLOCK_LENGTH = 256, 32
STEPS = (256, 72)
RUN_WHOLE = 16 * 1024  # prompt tokens up to which uncached generations are
FEW = 3  # least number of forwards of a kind from which an uncached generation is put together


@dataclass(frozen=True)
class Way:
    """A way to generate: SparseD under a config, or full attention without one; its cache; what --ways calls it."""

    name: str
    config: SparseDConfig | None = None
    saving: dict[str, Any] = field(default_factory=dict)
    flag: str = ""

    def settings(self, family: str, steps: int) -> Settings:
        """How the family samples."""
        return FAMILIES[family](NEW_TOKENS, steps, block_length=BLOCK_LENGTH, **self.saving)


PAPER, DENSE_ANSWER = SparseDConfig(), SparseDConfig(select=0.15, dense_answer=True)
CACHE = {"cache": "dual"}
CACHE_ALONE = "dual cache"
WAYS = (
    Way("full attention", flag="origin"),
    Way("SparseD, the paper's", PAPER, flag="sparsed"),
    Way("SparseD, dense answer rows, select 0.15", DENSE_ANSWER, flag="sparsed-dense"),
    Way(CACHE_ALONE, None, CACHE, "dual"),
    Way("dual cache, the paper's SparseD", PAPER, CACHE, "dual-sparsed"),
    Way("dual cache, dense answer rows, select 0.15", DENSE_ANSWER, CACHE, "dual-dense"),
    Way("dual cache, all rows once", None, CACHE | {"refresh": 0}, "once"),
    Way("prefix cache", None, {"cache": "prefix"}, "prefix"),
)


@dataclass(frozen=True)
class Run:
    """One timed generation, or the first forwards of one: the phase, rows and seconds of each.

    `compile_seconds` are those that `sparsify` reports; no forward includes them.
    """

    forwards: list[tuple[str, int, float]]
    compile_seconds: float
    peak_memory_bytes: int
    kernel: dict[str, Any]


class Enough(Exception):
    """The wanted number of forwards has run."""


@torch.no_grad()
def run(model: DiffusionLM, tokens: int, way: Way, settings: Settings, forwards: int | None = None) -> Run:
    """Generate after a prompt of `tokens` tokens; with `forwards`, stop after that many: the first one selects."""
    torch.manual_seed(0)  # the same prompt for every way; its ids are below the mask token's, which it must not hold
    prompt = torch.randint(0, model.config.mask_token_id, (1, tokens), device=model.device)
    gc.collect()
    reset_peak(model.device)
    schedule = schedule_of(settings, way.config, SPARSED) if forwards is None else ByStep(forwards, 1)
    steps: list[tuple[str, int, bool]] = []  # phase, rows, whether it ran
    with attention_of(model, way.config, settings.steps, NEW_TOKENS, schedule=schedule) as sparse:
        laps = Laps(model.device)
        laps.mark()

        def tick(step: Step) -> None:
            laps.deduct(0.0 if sparse is None else sparse.compile_seconds)
            laps.mark()
            steps.append((step.phase, step.computed, step.ran))
            if step.ran and sum(ran for *_, ran in steps) == forwards:
                raise Enough

        with suppress(Enough):
            generate(model, prompt, settings, on_step=tick)
        laps_of = zip(steps, laps.seconds(), strict=True)
        found = [(phase, computed, lap) for (phase, computed, ran), lap in laps_of if ran]
        names = ("density", "backend", "backend_reason") if sparse is not None else ()
        kernel = {name: getattr(sparse, name) for name in names}
        return Run(found, laps.deducted, peak_memory(model.device), kernel)


def check(way: Way, model: DiffusionLM, length: int) -> dict[str, Any]:
    """The kernels that a way uses at a length, each checked against float64, or WrongKernel."""
    config, device = model.config, model.device
    found = {"full": (DENSE, checked_kernel(DENSE, config, length, PAPER, device))}
    if way.config is not None:
        problem = Problem(device, DTYPE, 1, *attention_shape(config), way.config.block_size, False)
        backend, _ = choose_backend("auto", problem, length)
        checked = checked_dense_answer if way.config.dense_answer else checked_kernel
        found["sparse"] = backend, checked(backend, config, length, way.config, device)
    if way.saving:
        found["cached"] = checked_cached(model, length, BLOCK_LENGTH)
        found["answer"] = checked_cached(model, length, NEW_TOKENS)
    return {kind: {"kernel": kernel, **asdict(gate)} for kind, (kernel, gate) in found.items()}


def checked_cached(model: DiffusionLM, length: int, new_rows: int) -> tuple[str, Gate]:
    """The kernel of the last rows over cached keys, checked against float64, or WrongKernel."""
    heads = random_heads(model.config, length, model.device)
    rows = Heads(heads.q[:, :, -new_rows - FAMILIES[model.family].shift :], heads.k, heads.v)
    kernel = full_attention_kernel(rows.q, rows.k, rows.v, False)
    gate = attention_gate(full_attention(rows.q, rows.k, rows.v)[0], rows)
    if not gate.passed:
        raise WrongKernel(f"{kernel}: cached attention errs by {gate.error:.1e}, allowed {gate.allowed:.1e}")
    return kernel, gate


Times = dict[str, dict[str, Any]]  # of each phase, the summary of its forwards' seconds


def times_of(runs: list[Run]) -> Times:
    """By phase, over all runs."""
    samples: dict[str, list[float]] = {}
    for phase, _, seconds in chain.from_iterable(one.forwards for one in runs):
        samples.setdefault(phase, []).append(seconds)
    return {phase: brief(seconds) for phase, seconds in samples.items()}


def told(runs: list[Run]) -> dict[str, Any]:
    """The record's fields about runs, except their seconds."""
    return {
        "compile_seconds": [one.compile_seconds for one in runs],
        "peak_memory_bytes": max(one.peak_memory_bytes for one in runs),
        **runs[-1].kernel,
    }


def measured(runs: list[Run]) -> dict[str, Any]:
    """The record of whole generations in this number of steps."""
    counts = Counter(phase for phase, *_ in runs[0].forwards)
    forwards = {phase: {"count": counts[phase], "seconds": times} for phase, times in times_of(runs).items()}
    samples = [sum(seconds for *_, seconds in one.forwards) for one in runs]
    return {"measured": True, "seconds": statistics.median(samples), "samples": samples, "forwards": forwards}


def put_together(times: Times, way: Way, steps: int) -> dict[str, Any]:
    """The same of an uncached generation that was not run: its forwards, each as long as the median of its phase."""
    counts = {FULL: steps}
    if way.config is not None:
        n_full = way.config.n_full(steps)
        counts = {FULL: n_full - 1, SELECTING: 1, SPARSE: steps - n_full}
    forwards = {phase: {"count": count, "seconds": times[phase]} for phase, count in counts.items() if count}
    seconds = sum(part["count"] * part["seconds"]["median"] for part in forwards.values())
    return {"measured": False, "seconds": seconds, "forwards": forwards}


def cached(model: DiffusionLM, tokens: int, way: Way, repeats: int) -> dict[str, Any]:
    """The record of a way with a cache: whole generations, at every number of steps."""
    entry: dict[str, Any] = {"steps": {}}
    for steps in STEPS:
        runs = [run(model, tokens, way, way.settings(model.family, steps)) for _ in range(repeats)]
        entry["steps"][str(steps)] = measured(runs) | told(runs)
    return entry


def uncached(model: DiffusionLM, tokens: int, way: Way, full: Times) -> dict[str, Any]:
    """The record of a way without one.

    Args:
        full: the times of full attention: its full forwards are SparseD's too; empty for full attention itself.
    """
    most = max(STEPS)
    settings = way.settings(model.family, most)
    if tokens <= RUN_WHOLE:
        runs = [run(model, tokens, way, settings)]
    elif way.config is None:
        runs = [run(model, tokens, way, settings, FEW)]
    else:  # each selects once
        runs = [run(model, tokens, way, settings, 2) for _ in range(FEW)]
    times = full | times_of(runs)
    entry: dict[str, Any] = {"steps": {str(steps): put_together(times, way, steps) for steps in STEPS}, **told(runs)}
    if tokens <= RUN_WHOLE:
        entry["steps"][str(most)] = measured(runs)
    return entry


def chosen(flags: list[str]) -> list[Way]:
    """The ways that --ways names, in the usual order, after full attention, with which all are compared."""
    return [way for way in WAYS if way.flag in flags or way is WAYS[0]]


def measure(model: DiffusionLM, row: dict[str, Any], ways: list[Way], repeats: int) -> Iterator[str]:
    """Fill in the row of one length; yields a line after each way.

    Raises:
        WrongKernel: before anything of that way is timed.
    """
    tokens, full = row["prompt_tokens"], {}
    for way in ways:
        entry = {"config": way.config and asdict(way.config), "saving": way.saving}
        row["ways"][way.name] = entry
        try:
            entry["gates"] = check(way, model, tokens + NEW_TOKENS)
            if not full and way != WAYS[0]:
                entry["error"] = "full attention ran out of memory"
            elif way.saving:
                entry |= cached(model, tokens, way, repeats)
            else:
                entry |= uncached(model, tokens, way, full)
        except torch.OutOfMemoryError:
            entry["error"] = "out of memory"
        if way == WAYS[0] and "steps" in entry:
            full = {FULL: entry["steps"][str(max(STEPS))]["forwards"][FULL]["seconds"]}
        add_gains(row)
        said = {steps: round(found["seconds"], 3) for steps, found in entry.get("steps", {}).items()}
        yield f"{row['length']}, {way.name}: {entry.get('error') or said}"


def add_gains(row: dict[str, Any]) -> None:
    """How many times faster every generation of a row is than full attention in the most steps."""
    origin = row["ways"][WAYS[0].name].get("steps")
    for way in row["ways"].values() if origin else ():
        for entry in way.get("steps", {}).values():
            entry["speedup"] = origin[str(max(STEPS))]["seconds"] / entry["seconds"]


def warm(model: DiffusionLM, tokens: int, ways: list[Way]) -> dict[str, float]:
    """Run every way's kinds of forwards once; returns the seconds of this first use, by name."""
    seconds = {}
    for way in ways:
        began = time.perf_counter()
        with suppress(torch.OutOfMemoryError):  # it comes again later, and is reported there
            run(model, tokens, way, way.settings(model.family, min(STEPS)), None if way.saving else 2)
        seconds[way.name] = time.perf_counter() - began
    return seconds


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a line for each length and way; whole generations, one cached step, memory."""
    columns = ["model", "prompt", "way", *(f"{steps} steps" for steps in STEPS), "cached step", "peak memory"]
    rows = [(record["family"], row, name) for record in records for row in record["rows"] for name in row["ways"]]
    return markdown(columns, [_line(family, row, name) for family, row, name in rows])


def _line(family: str, row: dict[str, Any], name: str) -> list[str]:
    way = row["ways"][name]
    if "steps" not in way:
        return [family, row["length"], f"{name}: {way.get('error', 'a kernel is wrong')}", *["-"] * (len(STEPS) + 2)]
    entries = [way["steps"][str(steps)] for steps in STEPS]
    step = entries[0]["forwards"].get(CACHED)
    memory = (way if "peak_memory_bytes" in way else entries[0])["peak_memory_bytes"]
    return [
        family,
        row["length"],
        name,
        *(
            f"{'' if e['measured'] else '(put together) '}{e['seconds']:.3g} s"
            + (f", {e['speedup']:.3g}x" if "speedup" in e else "")
            for e in entries
        ),
        "-" if step is None else f"{1e3 * step['seconds']['median']:.2f} ms",
        f"{memory / 2**30:.1f} GiB",
    ]


def parse(argv: list[str] | None) -> tuple[Parser, argparse.Namespace]:
    """The flags, checked; a wrong call exits with code 2 after one line."""
    parser = build_parser("generation", __doc__, lengths="4k,16k", families=SHAPES)
    flags = [way.flag for way in WAYS]
    which = f"some of {', '.join(flags)}, separated by commas; origin always runs (default: all)"
    parser.add_argument("--ways", type=some_of(flags), default=",".join(flags), metavar="NAMES", help=which)
    text = "cached generations of each way (default: %(default)s)"
    parser.add_argument("--repeats", type=whole(1), default=3, help=text)
    parser.add_argument("--reference", type=Path, metavar="DIR", help="also time Fast-dLLM's own code, in this folder")
    args = parse_arguments(parser, argv)
    if args.reference is not None:
        check_reference(parser, args, "Fast-dLLM's code", fast_dllm.NEEDED)
    return parser, args


def add_reference(record: dict[str, Any], args: argparse.Namespace) -> None:
    """Add Fast-dLLM's generations to the rows, and save after each length; an error is recorded."""
    rows = {row["length"]: row for row in record["rows"]}
    record["reference"] = {"folder": str(args.reference)}
    try:
        lengths = list(rows)
        for answer in fast_dllm.measure(args.reference, args.family, lengths, NEW_TOKENS, BLOCK_LENGTH, STEPS):
            if "length" not in answer:
                record["reference"] |= answer
                continue
            row = rows[answer.pop("length")]
            row["ways"][fast_dllm.NAME] = answer
            ours = row["ways"].get(CACHE_ALONE, {}).get("steps", {})
            for steps, entry in answer.get("steps", {}).items():
                entry["ours_faster"] = fast_dllm.ratio(entry, ours[steps]) if ours else None
            add_gains(row)
            save(args.out, record)
            print(f"{row['length']}, {fast_dllm.NAME}: done", flush=True)
    except RuntimeError as error:
        record["reference"]["error"] = str(error)
        save(args.out, record)


def main(argv: list[str] | None = None) -> None:
    parser, args = parse(argv)
    device, right, ways = require_gpu(parser), True, chosen(args.ways)
    torch.manual_seed(0)
    model = random_model(args.family, device)
    record = new_record(parser, args, device, DTYPE) | {"weights": "random", "new_tokens": NEW_TOKENS, "rows": []}
    record |= {"block_length": BLOCK_LENGTH, "warm_up": warm(model, LENGTHS[args.lengths[0]], ways)}
    for name in args.lengths:
        row = {"length": name, "prompt_tokens": LENGTHS[name], "ways": {}}
        record["rows"].append(row)
        try:
            for line in measure(model, row, ways, args.repeats):
                print(line, flush=True)
                save(args.out, record)
        except WrongKernel as error:
            row["error"], right = str(error), False
            save(args.out, record)
    if args.reference is not None:
        del model
        gc.collect()
        torch.cuda.empty_cache()
        add_reference(record, args)
    print(table([record]))
    if "error" in record.get("reference", {}):
        parser.exit(1, f"{parser.prog}: error: {record['reference']['error']}\n")
    if not right:
        parser.exit(1, f"{parser.prog}: error: a kernel is wrong, see the record\n")


if __name__ == "__main__":
    main()
