"""Seconds per denoising step by phase, whole runs and memory on one GPU: --origin against SparseD, ours and released.

    python -m benchmarks.latency --family llada --lengths 4k,16k,64k --random_weights --reference DIR --out FILE.json

Batch 1, 128 new tokens, bfloat16, greedy. The two modes generate in turn through the project's samplers, in as many
steps as --budget allows. Both ran before at that length, and the extra time of that first use is reported separately. A
whole run of 128 steps that would take too long is put together from the medians of the phases; one of 1,024 is
extrapolated from them. Before a mode's steps are timed, its attention kernel is checked against float64 on random heads
of that length. With --reference, the released code then runs in its own process: benchmarks/reference.py says what DIR
holds. The record is written after every length; a table comes last.
"""

import argparse
import gc
import statistics
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sparsed import SparseDConfig, load_model, sparsify
from sparsed.backends import BACKENDS, DENSE
from sparsed.console.parser import Parser
from sparsed.console.readers import config_field, number_in, some_of, whole
from sparsed.kernels import full_attention
from sparsed.run import synchronize
from sparsed.sampling import generate, settings_for
from sparsed.sampling.common import OnStep, Step

from . import reference
from .attention import random_pattern
from .common import LENGTHS, NEW_TOKENS, build_parser, clamp, new_record, parse_arguments, require_gpu, save
from .kernels import Gate, attention_gate, random_heads
from .phases import WHOLE, Steps, derive, phases, setup_seconds, split, whole_run
from .plot import draw, table
from .shapes import SHAPES, ModelConfig, model_config, random_model

MODES = ("origin", "sparsed")
FEWEST_FULL, FEWEST_SPARSE, FEWEST_STEPS = 3, 4, 6
MOST_ROUNDS = 3


@dataclass(frozen=True)
class Schedule:
    """Steps of a generation; with sparse ones, the last full step selects."""

    full: int
    sparse: int = 0

    @property
    def steps(self) -> int:
        return self.full + self.sparse


@dataclass(frozen=True)
class Settings:
    """Shared by all generations of a call."""

    config: SparseDConfig
    backend: str
    budget: float
    steps: int | None


@dataclass(frozen=True)
class Generation:
    """One timed generation. Its steps' seconds are without the compile time that `sparsify` reports."""

    seconds: list[float]
    n_full: int | None
    compile_seconds: float
    peak_memory_bytes: int
    kernel: dict[str, Any]

    @property
    def phases(self) -> Steps:
        return split(self.seconds, self.n_full)


def sample(model: torch.nn.Module, prompt: torch.Tensor, steps: int, on_step: OnStep) -> None:
    """One greedy generation by the family's sampler."""
    settings = settings_for(model.family, gen_length=NEW_TOKENS, steps=steps, block_length=NEW_TOKENS)
    generate(model, prompt, settings, on_step=on_step)


def step_seconds(model: torch.nn.Module, prompt: torch.Tensor, steps: int) -> list[float]:
    """Wall time of every step; waits for the device only at step ends. 0.0 for a step that did not run the model."""
    synchronize(model.device)
    seconds, last = [], time.perf_counter()

    def tick(step: Step) -> None:
        nonlocal last
        synchronize(model.device)
        now = time.perf_counter()
        seconds.append(now - last if step.ran else 0.0)
        last = now

    sample(model, prompt, steps, tick)
    return seconds


def generation(model: torch.nn.Module, prompt: torch.Tensor, schedule: Schedule, settings: Settings) -> Generation:
    """Generate once under a schedule: with SparseD if it has sparse steps, otherwise with full attention."""
    gc.collect()  # left by the generation before
    torch.cuda.reset_peak_memory_stats()
    config = replace(settings.config, skip=schedule.full / schedule.steps)
    options = {"steps": schedule.steps, "gen_length": NEW_TOKENS, "backend": settings.backend}
    with sparsify(model, config, **options) if schedule.sparse else nullcontext() as run:
        seconds = step_seconds(model, prompt, schedule.steps)
        if run is None:
            return Generation(seconds, None, 0.0, torch.cuda.max_memory_allocated(), {})
        seconds[schedule.full - 1] -= run.compile_seconds
        kernel = {name: getattr(run, name) for name in ("density", "backend", "backend_reason")}
        return Generation(seconds, schedule.full, run.compile_seconds, torch.cuda.max_memory_allocated(), kernel)


class WrongKernel(RuntimeError):
    """An attention kernel is further from float64 than it may be."""


def checked_kernel(backend: str, model: ModelConfig, tokens: int, config: SparseDConfig, device: torch.device) -> Gate:
    """Check some rows of a layer's attention by a backend, or DENSE, on random heads, against float64.

    Raises:
        WrongKernel: the error is larger than the gate allows.
    """
    heads = random_heads(model, tokens, device)
    if backend == DENSE:
        gate = attention_gate(full_attention(heads.q, heads.k, heads.v)[0], heads)
    else:
        pattern = random_pattern(heads, config.select, config.block_size)
        gate = attention_gate(BACKENDS[backend].build(pattern)(heads.q, heads.k, heads.v), heads, pattern)
    if not gate.passed:
        raise WrongKernel(f"{backend} attention errs by {gate.error:.1e}, allowed {gate.allowed:.1e}")
    return gate


def plan(warm: dict[str, Generation], settings: Settings) -> tuple[dict[str, Schedule], int]:
    """The schedule of each mode, and how often the modes are run in turn, from the steps of the first generations.

    Each phase gets the budget's seconds, but no more steps than in a whole run of 128. It gets all of these if twice
    the budget is enough: only a whole run shows the cost of capturing graphs.
    """

    def affordable(seconds: float, fewest: int, most: int) -> int:
        return most if most * seconds <= 2 * settings.budget else clamp(settings.budget / seconds, fewest, most)

    steps, n_full = WHOLE[0], settings.config.n_full(WHOLE[0])
    if settings.steps is not None:
        steps, n_full = settings.steps, settings.config.n_full(settings.steps)
        schedules = {"origin": Schedule(steps), "sparsed": Schedule(n_full, steps - n_full)}
        return {mode: schedules[mode] for mode in warm}, 1
    full = min(seconds for run in warm.values() for seconds in run.phases.full + run.phases.selecting)
    schedules = {"origin": Schedule(affordable(full, FEWEST_FULL, steps))}
    seconds = schedules["origin"].full * full
    if "sparsed" in warm:
        sparse = min(warm["sparsed"].phases.sparse)
        schedules["sparsed"] = Schedule(
            affordable(full, FEWEST_FULL, n_full),
            affordable(sparse, FEWEST_SPARSE, steps - n_full),
        )
        seconds += schedules["sparsed"].full * full + schedules["sparsed"].sparse * sparse
    return {mode: schedules[mode] for mode in warm}, clamp(MOST_ROUNDS * settings.budget / seconds, 1, MOST_ROUNDS)


def measure(model: torch.nn.Module, tokens: int, modes: list[str], settings: Settings) -> dict[str, dict[str, Any]]:
    """The record of each mode at one length; the modes run in turn.

    Raises:
        WrongKernel: before anything is timed.
    """
    # ids below the mask token's, which a prompt must not hold
    prompt = torch.randint(0, model.config.mask_token_id, (1, tokens), device=model.device)
    first = {"origin": Schedule(2), "sparsed": Schedule(1, 2)}
    warm = {mode: generation(model, prompt, first[mode], settings) for mode in modes}
    kernels = {mode: run.kernel.get("backend", DENSE) for mode, run in warm.items()}
    length = tokens + NEW_TOKENS
    gates = {
        mode: checked_kernel(kernel, model.config, length, settings.config, model.device)
        for mode, kernel in kernels.items()
    }
    schedules, rounds = plan(warm, settings)
    timed: dict[str, list[Generation]] = {mode: [] for mode in modes}
    for _ in range(rounds):
        for mode in modes:
            timed[mode].append(generation(model, prompt, schedules[mode], settings))
    return {mode: run_record(warm[mode], timed[mode]) | {"gate": asdict(gates[mode])} for mode in modes}


def run_record(warm: Generation, timed: list[Generation]) -> dict[str, Any]:
    """Phases, memory and kernel of one mode's generations, and the extra time of the first one."""
    steps = [run.phases for run in timed]
    found = phases(steps)
    expected = whole_run(found, len(warm.seconds), warm.n_full)
    measured = [sum(run.seconds) for run in timed if len(run.seconds) == WHOLE[0]]
    return {
        **found,
        "steps": len(timed[0].seconds),
        "generations": len(timed),
        "compile_seconds": warm.compile_seconds,
        "first_use_seconds": sum(warm.seconds) + warm.compile_seconds - expected,
        "setup_seconds": setup_seconds(steps),
        "measured_whole_seconds": statistics.median(measured) if measured else None,
        "peak_memory_bytes": max(run.peak_memory_bytes for run in timed),
        **timed[-1].kernel,
    }


def parse(argv: list[str] | None) -> tuple[Parser, argparse.Namespace]:
    """The flags, checked; a wrong call exits with code 2 after one line."""
    parser = build_parser("latency", __doc__, lengths="4k,16k", families=SHAPES)
    parser.add_argument(
        "--modes", type=some_of(MODES), default=",".join(MODES), help="origin, sparsed or both (default: %(default)s)"
    )
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--random_weights", action="store_true", help="the published shape; time depends on no weight")
    weights.add_argument("--model_path", metavar="PATH", help="a checkpoint: hub id or folder")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="also time the released code in this folder")
    parser.add_argument("--backend", choices=("auto", *BACKENDS), default="auto", help="(default: %(default)s)")
    for name, kind in (("skip", float), ("select", float), ("block_size", int)):
        default = getattr(SparseDConfig, name)
        parser.add_argument(
            f"--{name}", type=config_field(name, kind), default=default, help="as the scripts' (default: %(default)s)"
        )
    parser.add_argument(
        "--budget",
        type=number_in(0, 600, above=True),
        default=5.0,
        metavar="SECONDS",
        help="time per phase and length; at long lengths a few steps take more (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=whole(FEWEST_STEPS), metavar="N", help="steps of a timed generation, whatever the budget"
    )
    args = parse_arguments(parser, argv)
    if args.reference is not None:
        if args.model_path is not None:
            parser.error("argument --reference: not allowed with argument --model_path")
        reference.check_reference(parser, args)
    return parser, args


def load(parser: Parser, args: argparse.Namespace, device: torch.device) -> torch.nn.Module:
    """The model in bfloat16: the published shape with random weights, or a checkpoint of that family."""
    if args.random_weights:
        torch.manual_seed(0)
        return random_model(args.family, device)
    try:
        model = load_model(args.model_path, device=str(device), dtype="bfloat16")
    except (OSError, ValueError) as error:
        parser.error(f"argument --model_path: {error}")
    if type(model.config) is not type(model_config(args.family)):
        parser.error(f"argument --model_path: holds no {args.family} model, but another")
    return model


def run_ours(model: torch.nn.Module, args: argparse.Namespace, settings: Settings, record: dict[str, Any]) -> bool:
    """Add a row for each length, and save the record after each; whether all kernels were right."""
    right = True
    for name in args.lengths:
        row = {"length": name, "prompt_tokens": LENGTHS[name], "runs": {}}
        record["rows"].append(row)
        try:
            row["runs"] = measure(model, LENGTHS[name], args.modes, settings)
        except torch.OutOfMemoryError:
            row["error"] = "out of memory"
        except WrongKernel as error:
            row["error"], right = str(error), False
        update(record, args.out, settings.config)
        print(f"{name}: ours done", flush=True)
    return right


def run_reference(args: argparse.Namespace, settings: Settings, record: dict[str, Any]) -> bool:
    """Add the released code's runs to the rows, and save the record after each length; whether it finished."""
    try:
        _add_reference(args, settings, record)
    except RuntimeError as error:
        record["reference"]["error"] = str(error)
        save(args.out, record)
        return False
    return True


def _add_reference(args: argparse.Namespace, settings: Settings, record: dict[str, Any]) -> None:
    rows = {row["length"]: row for row in record["rows"]}
    for answer in reference.measure(args.reference, args.family, args.lengths, args.modes, settings.config):
        if "length" not in answer:
            record["reference"] |= answer
            continue
        row = rows[answer["length"]]
        row["runs"] |= answer.get("runs", {})
        if "error" in answer:
            row["reference_error"] = answer["error"]
        update(record, args.out, settings.config)
        print(f"{row['length']}: released code done", flush=True)


def update(record: dict[str, Any], path: Path, config: SparseDConfig) -> None:
    """Derive whole runs again, and save."""
    for row in record["rows"]:
        row |= derive(row["runs"], config)
    save(path, record)


def main(argv: list[str] | None = None) -> None:
    parser, args = parse(argv)
    device = require_gpu(parser)
    model = load(parser, args, device)
    config = SparseDConfig(args.skip, args.select, args.block_size)
    settings = Settings(config, args.backend, args.budget, args.steps)
    record = new_record(parser, args, device, torch.bfloat16) | {
        "weights": args.model_path or "random",
        "new_tokens": NEW_TOKENS,
        "config": asdict(settings.config),
        "reference": None if args.reference is None else {"folder": str(args.reference)},
        "rows": [],
    }
    right = run_ours(model, args, settings, record)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    failed = args.reference is not None and not run_reference(args, settings, record)
    print(draw([record], args.out.with_suffix(".png")))
    print(table([record]))
    if failed:
        parser.exit(1, f"{parser.prog}: error: {record['reference']['error']}\n")
    if not right:
        parser.exit(1, f"{parser.prog}: error: a kernel is wrong, see the table\n")


if __name__ == "__main__":
    main()
