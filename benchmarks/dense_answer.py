"""Cost and gain of dense answer rows on one GPU, against full attention and the paper's SparseD.

    python -m benchmarks.dense_answer --family llada --lengths 16k,64k,128k --select 0.3,0.15,0.1 --skip 0.2,0.05 \\
        --random_weights --out FILE.json

Batch 1, 128 new tokens, bfloat16, greedy, blocks of 128. The settings generate in turn, in a few steps each. Only full
attention has full steps: the others select in their first step, and `selection` is its extra time over the median full
step. Whole runs under each --skip (the paper's setting: its own) are put together from medians. All settings run once
before, at the first of --lengths (`warm_up`: the seconds they compiled). At each length their attention is first
checked against float64 on random heads; the record is written after each setting. Prompts of 1k and less replay CUDA
graphs, which these few steps do not show.
"""

import argparse
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.nn import Module

from sparsed import SparseDConfig
from sparsed.backends import DENSE, Problem, choose_backend, sparse_attention
from sparsed.blocks import BlockGrid
from sparsed.console.parser import Parser
from sparsed.console.readers import config_field, list_of, number_in, whole
from sparsed.evaluation.results import markdown

from .attention import random_pattern
from .common import LENGTHS, NEW_TOKENS, build_parser, new_record, parse_arguments, require_gpu, save, summary
from .kernels import DTYPE, Gate, Heads, attention_gate, random_heads
from .latency import Generation, Schedule, Settings, WrongKernel, checked_kernel, generation, load
from .phases import WHOLE, bound, whole_run
from .shapes import SHAPES, ModelConfig, attention_shape

STEPS, LONG_STEPS, LONG = 3, 2, 64 * 1024  # steps of a kind in a generation, and beyond this many prompt tokens


@dataclass(frozen=True)
class Setting:
    """SparseD under a config, or full attention without one; `skips` are those of its whole runs."""

    name: str
    config: SparseDConfig | None = None
    skips: tuple[float, ...] = ()

    def generate(self, model: Module, tokens: int, steps: int) -> Generation:
        """After `tokens` prompt tokens: in full steps only, or in one that selects and then sparse ones."""
        torch.manual_seed(0)  # the same prompt for every setting, without the mask token: its ids are lower
        prompt = torch.randint(0, model.config.mask_token_id, (1, tokens), device=model.device)
        schedule = Schedule(steps) if self.config is None else Schedule(1, steps)
        return generation(model, prompt, schedule, Settings(self.config or SparseDConfig(), "auto", 0.0, None))


def settings(selects: list[float], skips: list[float]) -> list[Setting]:
    """Full attention, the paper's setting, and dense answer rows with each share of the blocks."""
    paper = SparseDConfig()
    found = [Setting("full attention"), Setting(f"the paper's, select {paper.select}", paper, (paper.skip,))]
    for select in selects:
        config = replace(paper, select=select, dense_answer=True)
        found.append(Setting(f"dense answer rows, select {select}", config, tuple(skips)))
    return found


def check(setting: Setting, model: ModelConfig, length: int, device: torch.device) -> dict[str, Any]:
    """The start of its record at a length: the kernel that a run chooses, checked against float64; or WrongKernel."""
    config, backend, checked = setting.config or SparseDConfig(), DENSE, checked_kernel
    if setting.config and not BlockGrid(length, length - NEW_TOKENS, config.block_size).keeps_all(config.select):
        problem = Problem(device, DTYPE, 1, *attention_shape(model), config.block_size, False)
        backend, _ = choose_backend("auto", problem, length)
        checked = checked_dense_answer if config.dense_answer else checked_kernel
    gate = {"backend": backend, **asdict(checked(backend, model, length, config, device))}
    return {"config": setting.config and asdict(config), "gate": gate}


def checked_dense_answer(
    backend: str, model: ModelConfig, length: int, config: SparseDConfig, device: torch.device
) -> Gate:
    """`checked_kernel` with dense answer rows: the prompt's rows over their blocks, the answer's over every key."""
    heads = random_heads(model, length, device)
    kept = random_pattern(heads, config.select, config.block_size)
    pattern = replace(kept, grid=replace(kept.grid, dense_answer=True))
    attention, first = sparse_attention(backend, pattern), pattern.grid.first_dense
    out = attention(heads.q, heads.k, heads.v)
    border = length - NEW_TOKENS
    answer, last = (Heads(heads.q[:, :, start:], heads.k, heads.v) for start in (first, border))
    gates = {
        "the prompt's rows": attention_gate(out[:, :, :first], heads, pattern),
        "the answer's rows": attention_gate(out[:, :, first:], answer),
        "the last layer's rows": attention_gate(attention(last.q, last.k, last.v, border), last),
    }
    for rows, gate in gates.items():
        if not gate.passed:
            raise WrongKernel(f"{backend}, dense answer: {rows} err by {gate.error:.1e}, allowed {gate.allowed:.1e}")
    return max(gates.values(), key=lambda gate: gate.error / gate.allowed)


def run_record(setting: Setting, runs: list[Generation], full: dict[str, Any] | None) -> dict[str, Any]:
    """Samples, kernel and memory of a setting's generations; its whole runs where full steps are known."""
    found = {
        "compile_seconds": [run.compile_seconds for run in runs],
        "peak_memory_bytes": max(run.peak_memory_bytes for run in runs),
        **runs[-1].kernel,
    }
    if setting.config is None:
        whole_seconds = {str(steps): whole_run({"full_step": full}, steps, None) for steps in WHOLE}
        return found | {"full_step": full, "whole_seconds": whole_seconds}
    selecting = [seconds for run in runs for seconds in run.phases.selecting]
    found |= {
        "selecting_step": summary(selecting),
        "selection": full and summary([seconds - full["median"] for seconds in selecting]),
        "sparse_step": summary([seconds for run in runs for seconds in run.phases.sparse]),
    }
    return found | {"skips": {str(skip): whole_runs(found, full, skip) for skip in setting.skips if full}}


def whole_runs(run: dict[str, Any], full: dict[str, Any], skip: float) -> dict[str, Any]:
    """Seconds of whole runs under a skip, and how many times faster they are than the same number of full steps."""
    n_full, sparse = SparseDConfig(skip).n_full, run["sparse_step"]["median"]
    seconds = {str(steps): whole_run(run | {"full_step": full}, steps, n_full(steps)) for steps in WHOLE}
    speedup = {steps: int(steps) * full["median"] / each for steps, each in seconds.items()}
    return {"whole_seconds": seconds, "speedup": speedup, "bound": bound(skip, full["median"], sparse)}


def warm(model: Module, tokens: int, wanted: list[Setting]) -> dict[str, float]:
    """Run every setting once, with a step of each kind; the seconds spent compiling, by name."""
    seconds = {}
    for setting in wanted:
        with suppress(torch.OutOfMemoryError):  # it comes again later, and is reported there
            seconds[setting.name] = setting.generate(model, tokens, 1).compile_seconds
    return seconds


def measure(model: Module, row: dict[str, Any], wanted: list[Setting], repeats: int, keep: Callable) -> None:
    """Fill in the row of one length: `repeats` generations of every setting, in turn. `keep` saves it after each.

    Raises:
        WrongKernel: before anything is timed.
    """
    tokens = row["prompt_tokens"]
    row["runs"] = runs = {one.name: check(one, model.config, tokens + NEW_TOKENS, model.device) for one in wanted}
    timed: dict[Setting, list[Generation]] = {one: [] for one in wanted}
    for one in wanted * repeats:
        if "error" in runs[one.name]:
            continue
        try:
            timed[one].append(one.generate(model, tokens, STEPS if tokens <= LONG else LONG_STEPS))
        except torch.OutOfMemoryError:
            runs[one.name]["error"] = "out of memory"
        full = summary([seconds for run in timed[wanted[0]] for seconds in run.phases.full])
        for other in filter(timed.get, wanted):
            runs[other.name] |= run_record(other, timed[other], full)
        keep()
        said = runs[one.name].get("error") or " ".join(f"{seconds:.3f}" for seconds in timed[one][-1].seconds)
        print(f"{row['length']}, {one.name}: {said}", flush=True)


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a line for each length and setting; seconds per step, and of whole runs with their gain."""
    skips = list(dict.fromkeys(skip for record in records for skip in record["skips"]))
    columns = ["model", "prompt", "setting", "density", "full step", "sparse step", "selecting"]
    columns += [f"{steps:,} steps, skip {skip}" for skip in skips for steps in WHOLE]
    rows = [(record["family"], row) for record in records for row in record["rows"]]
    return markdown(columns, [line for family, row in rows for line in _lines(family, row, skips)])


def _lines(family: str, row: dict[str, Any], skips: list[str]) -> list[list[str]]:
    lines = []
    for name, run in (row["runs"] or {"every setting": row}).items():
        title = f"{name}: {run['error']}" if "error" in run else name
        cells = [family, row["length"], title, f"{run['density']:.3f}" if "density" in run else "-"]
        cells += [_cell((run.get(phase) or {}).get("median")) for phase in ("full_step", "sparse_step", "selection")]
        for skip in skips:
            found = run.get("skips", {}).get(skip, run)  # full attention's runs are the same under every skip
            seconds, gains = found.get("whole_seconds", {}), found.get("speedup", {})
            cells += [_cell(seconds.get(str(steps)), gains.get(str(steps))) for steps in WHOLE]
        lines.append(cells)
    return lines


def _cell(seconds: float | None, gain: float | None = None) -> str:
    shown = "-" if seconds is None else f"{seconds:.0f} s" if seconds >= 100 else f"{seconds:.3g} s"
    return shown if gain is None else f"{shown} ({gain:.2f}x)"


def parse(argv: list[str] | None) -> tuple[Parser, argparse.Namespace]:
    """The flags, checked; a wrong call exits with code 2 after one line."""
    parser = build_parser("dense_answer", __doc__, lengths="16k,64k", families=SHAPES)
    parser.add_argument("--random_weights", action="store_true", required=True, help="time depends on no weight")
    for name, read, default, text in (
        ("select", list_of(config_field("select", float)), "0.3,0.15,0.1", "shares of the blocks, separated by commas"),
        ("skip", list_of(number_in(0, 0.99)), "0.2,0.05", "shares of full steps in whole runs, separated by commas"),
        ("repeats", whole(1), 1, "generations of each setting at each length"),
    ):
        parser.add_argument(f"--{name}", type=read, default=default, help=f"{text} (default: %(default)s)")
    return parser, parse_arguments(parser, argv)


def main(argv: list[str] | None = None) -> None:
    parser, args = parse(argv)
    device, right = require_gpu(parser), True
    model, wanted = load(parser, args, device), settings(args.select, args.skip)
    record = new_record(parser, args, device, DTYPE) | {"weights": "random", "new_tokens": NEW_TOKENS, "rows": []}
    record["skips"] = list(dict.fromkeys(str(skip) for setting in wanted for skip in setting.skips))
    record["warm_up"] = warm(model, LENGTHS[args.lengths[0]], wanted)
    for name in args.lengths:
        row = {"length": name, "prompt_tokens": LENGTHS[name], "runs": {}}
        record["rows"].append(row)
        try:
            measure(model, row, wanted, args.repeats, lambda: save(args.out, record))
        except torch.OutOfMemoryError:
            row["error"] = "out of memory"
        except WrongKernel as error:
            row["error"], right = str(error), False
        save(args.out, record)
    print(table([record]))
    if not right:
        parser.exit(1, f"{parser.prog}: error: a kernel is wrong, see the table\n")


if __name__ == "__main__":
    main()
