"""`python -m sparsed.evaluation`: from the flags to the table."""

import argparse
import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone

import torch
from tqdm import tqdm

from ..attention import BackendError
from ..cli.ending import blame, guarded
from ..cli.report import environment
from ..cli.streams import Stdout, tell
from ..models import load_model, load_tokenizer
from ..prompts import ChatTemplateError, demo_path
from . import plots
from .arguments import parse
from .planning import Batch, check_steps, plan
from .results import RUN, SUMMARY, TABLE, Folder, OtherRun, Record, summarize, table, write
from .running import Sampler
from .tasks import Sample

ADVICE = "try a smaller --batch_size, shorter --lengths, --dtype bfloat16, or a device with more memory"


def main(argv: list[str] | None = None) -> int:
    """Evaluate with these words (None: the process's own); returns the exit code."""
    going_on = "; the same command goes on from here"
    return guarded(lambda: evaluate(parse(argv)), advice=ADVICE, ending=argv is None, interrupted=going_on)


@dataclass(frozen=True)
class Team:
    """The processes that `accelerate launch` started, or this one alone."""

    index: int
    count: int
    wait: Callable[[], None]
    device: str | None

    @staticmethod
    def of(device: str) -> "Team":
        """This process's place in it; the processes' own devices replace a device that is left open."""
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return Team(0, 1, lambda: None, None)
        from accelerate import PartialState  # seconds to import

        state = PartialState(cpu=device == "cpu")
        return Team(state.process_index, state.num_processes, state.wait_for_everyone, str(state.device))

    @contextmanager
    def first(self) -> Iterator[None]:
        """The first process does the work before the others do it."""
        if self.index:
            self.wait()
        yield
        if not self.index:
            self.wait()


def evaluate(args: argparse.Namespace) -> None:
    """Everything between the checked flags and the table."""
    source = "--demo" if args.demo else "--model_path"
    with blame(args, source):
        path = str(demo_path(args.demo)) if args.demo else args.model_path
        tokenizer = load_tokenizer(path)
    with blame(args, source, (ChatTemplateError,)):
        batches = plan(args, tokenizer)
    team = Team.of(args.device)
    with blame(args, source):
        model = load_model(path, device=team.device or args.device, dtype=args.dtype)
    check_steps(args, model.family, batches)
    folder = Folder(args.out, team.index)
    with blame(args, "--out", (OtherRun, OSError)), team.first():
        folder.claim(_settings(args, path, model), _about(model))
    _run(args, Sampler(model, tokenizer, args.block_length, args.backend), folder, team, batches)
    team.wait()
    if team.index == 0:
        with blame(args, "--out", (OSError,)):
            _report(args, folder, batches)


def _settings(args: argparse.Namespace, path: str, model: torch.nn.Module) -> Record:
    """What decides a sample's result, beyond what its line says."""
    chosen = {name: getattr(args, name) for name in ("seed", "seq_len", "steps", "block_length", "backend")}
    own = None if args.tasks_file is None else str(args.tasks_file)
    return {"model": args.demo or path, **chosen, "dtype": str(model.dtype).removeprefix("torch."), "tasks_file": own}


def _about(model: torch.nn.Module) -> Record:
    return {
        "command": shlex.join(["python", "-m", "sparsed.evaluation", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(model.device, model.dtype),
    }


def _run(args: argparse.Namespace, sampler: Sampler, folder: Folder, team: Team, batches: list[Batch]) -> None:
    """Answer this process's share of what the folder lacks; every finished batch is a few lines in it."""
    finished = folder.finished()
    todo = []
    for number, batch in enumerate(batches):
        for variant in args.variants if number % team.count == team.index else ():
            missing = {
                name for name, known in zip(batch.ids, batch.keys(variant), strict=True) if known not in finished
            }
            if missing:
                todo.append((batch, variant, missing))
    if finished and team.index == 0 and not args.quiet:
        tell(f"{args.out}: {len(finished)} samples are there already")
    folder.mend()
    total = sum(batch.steps for batch, _, _ in todo)
    made: dict[int, tuple[Sample, ...]] = {}
    with _progress(args, team, total) as bar:
        for number, (batch, variant, missing) in enumerate(todo):
            if id(batch) not in made:
                made = {id(batch): batch.make()}
            samples = tuple(sample for sample in made[id(batch)] if sample.id in missing)
            bar.set_description(f"{samples[0].task} {variant.method} {number + 1}/{len(todo)}", refresh=False)
            with blame(args, "--backend", (BackendError,)), blame(args, "--dtype", (FloatingPointError,)):
                lines = sampler.answer(samples, variant, batch.gen_length, batch.steps, lambda *_: bar.update())
            with blame(args, "--out", (OSError,)):
                folder.append(lines)


def _progress(args: argparse.Namespace, team: Team, steps: int) -> tqdm:
    """Denoising steps, with the time that is left; a line now and then where stderr is no terminal."""
    every = 0.1 if sys.stderr is not None and sys.stderr.isatty() else 30.0
    hidden = args.quiet or team.index > 0 or sys.stderr is None
    return tqdm(total=steps, unit="step", disable=hidden, mininterval=every, smoothing=0.05, dynamic_ncols=True)


def _report(args: argparse.Namespace, folder: Folder, batches: list[Batch]) -> None:
    """Put the results in order, sum them up, print the table."""
    finished = folder.finished()
    samples = (names for batch in batches for names in zip(*map(batch.keys, args.variants), strict=True))
    records = [finished.pop(name) for names in samples for name in names]
    folder.close([*records, *finished.values()])  # an earlier call may have measured more
    summary = summarize([*records, *finished.values()])
    about = json.loads((folder.path / RUN).read_text(encoding="utf-8"))
    write(folder.path / SUMMARY, json.dumps({**summary, **about}, indent=2) + "\n")
    text = table(summary)
    write(folder.path / TABLE, text)
    Stdout().say(text)
    if importlib.util.find_spec("matplotlib") is None:
        tell('no plots: matplotlib is not installed (pip install ".[plots]")')
    else:
        plots.draw(summary, folder.path)
    if not args.quiet:
        tell(f"written to {folder.path}")
