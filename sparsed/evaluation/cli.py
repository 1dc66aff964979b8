"""`python -m sparsed.evaluation`: from the flags to the table."""

import argparse
import importlib.util
import io
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

from tqdm import tqdm

from ..backends import BackendError
from ..chat import ChatTemplateError
from ..console.endings import blame, guarded
from ..console.environment import environment
from ..console.files import write_json, write_text
from ..console.streams import Stdout, tell
from ..models import load_model, load_tokenizer
from ..models.common import DiffusionLM
from ..models.files import checkpoint_folder
from ..models.tokenizer import TOKENIZER_FILES
from ..prompts import demo_path
from ..sampling.common import Step
from . import plots
from .arguments import parse
from .identity import files_digest, weights_digest
from .planning import Batch, check_steps, plan
from .results import RUN, SUMMARY, TABLE, Folder, OtherRun, Record, about, summarize, table
from .running import Sampler, leave_group
from .tasks import Sample

EVERY = 30.0  # seconds between the lines that a log gets
ADVICE = "try a smaller --batch_size, shorter --lengths, --dtype bfloat16, or a device with more memory"


def main(argv: list[str] | None = None) -> int:
    """Evaluate with these words (None: the process's own); returns the exit code."""
    return guarded(lambda: evaluate(parse(argv)), "python -m sparsed.evaluation", advice=ADVICE, ending=argv is None)


@dataclass(frozen=True)
class Team:
    """The processes that `accelerate launch` started, or this one alone."""

    index: int
    count: int
    wait: Callable[[], None]
    device: str | None

    @staticmethod
    def of(device: str) -> "Team":
        """This process's place in it; several have a device each.

        Raises:
            ValueError: one GPU was named for several processes.
        """
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return Team(0, 1, lambda: None, None)
        if device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"must be auto, cuda or cpu with several processes, got {device!r}")
        from accelerate import PartialState  # seconds to import

        # the first to finish waits for the last
        state = PartialState(cpu=device == "cpu", timeout=timedelta(days=30))
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
    with blame(args, "--device"):
        team = Team.of(args.device)
    with blame(args, source):
        model = load_model(path, device=team.device or args.device, dtype=args.dtype)
    check_steps(args, model.family, batches)
    longest = max([*args.lengths, 0])
    if longest > model.config.max_length and team.index == 0 and not args.quiet:
        tell(f"warning: prompts of {longest} tokens; this model was trained on at most {model.config.max_length}")
    folder = Folder(args.out, team.index)
    with blame(args, "--out", (OtherRun, OSError)), team.first():
        folder.claim(_settings(args, path, model), _call(model))
    _run(args, Sampler(model, tokenizer, args.block_length, args.backend), folder, team, batches)
    team.wait()
    if team.index == 0:
        with blame(args, "--out", (OSError,)):
            _report(args, folder, batches)
    leave_group()


def _settings(args: argparse.Namespace, path: str, model: DiffusionLM) -> Record:
    """What decides a sample's result, beyond what its line says."""
    names = ["config.json", *TOKENIZER_FILES]
    folder = checkpoint_folder(path, names)
    return {
        "model": args.demo or path,
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": weights_digest(model),
        "config_and_tokenizer": files_digest(folder / name for name in names),
        **{name: getattr(args, name) for name in ("seq_len", "steps", "block_length", "backend")},
        "tasks_file": files_digest([args.tasks_file]) if args.tasks_file else None,
    }


def _call(model: DiffusionLM) -> Record:
    return {
        "command": shlex.join(["python", "-m", "sparsed.evaluation", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(model.device, model.dtype),
    }


def _run(args: argparse.Namespace, sampler: Sampler, folder: Folder, team: Team, batches: list[Batch]) -> None:
    """Answer this process's share of what the folder lacks; every finished batch is a few lines in it."""
    with blame(args, "--out", (OSError,)):
        finished = folder.finished()
        folder.mend()
    todo = []
    for number, batch in enumerate(batches):
        for variant in args.variants if number % team.count == team.index else ():
            missing = {
                name for name, known in zip(batch.ids, batch.keys(variant), strict=True) if known not in finished
            }
            if missing:
                todo.append((batch, variant, missing))
    if team.index == 0 and not args.quiet:
        if finished:
            tell(f"{args.out}: {len(finished)} samples are there already")
        tell("if this is interrupted, the same command goes on from there")
    total = sum(batch.steps for batch, _, _ in todo)
    made: dict[int, tuple[Sample, ...]] = {}
    with Progress(total, hidden=args.quiet or team.index > 0) as bar:
        for number, (batch, variant, missing) in enumerate(todo):
            if id(batch) not in made:
                with blame(args, "--lengths"):
                    made = {id(batch): batch.make()}
            samples = tuple(sample for sample in made[id(batch)] if sample.id in missing)
            bar.start(f"{samples[0].task} {variant.method} {number + 1}/{len(todo)}")
            with blame(args, "--backend", (BackendError,)), blame(args, "--dtype", (FloatingPointError,)):
                lines = sampler.answer(samples, variant, batch.gen_length, batch.steps, bar.step)
            with blame(args, "--out", (OSError,)):
                folder.append(lines)


class Progress:
    """Denoising steps and the time that is left: a bar in a terminal, elsewhere a line now and then."""

    def __init__(self, steps: int, hidden: bool):
        self.terminal = sys.stderr is not None and sys.stderr.isatty()
        stream = sys.stderr if self.terminal else io.StringIO()
        self.bar = tqdm(total=steps, unit="step", disable=hidden, file=stream, smoothing=0.05, dynamic_ncols=True)
        self.told = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def start(self, what: str) -> None:
        """Name what is measured now."""
        self.bar.set_description(what, refresh=False)

    def step(self, _: Step) -> None:
        """A step is done."""
        self.bar.update()
        if not self.terminal and not self.bar.disable and time.monotonic() - self.told > EVERY:
            self.told = time.monotonic()
            tell(str(self.bar))


def _report(args: argparse.Namespace, folder: Folder, batches: list[Batch]) -> None:
    """Put the results in order, sum them up, print the table."""
    finished = folder.finished()
    samples = (names for batch in batches for names in zip(*map(batch.keys, args.variants), strict=True))
    records = [finished.pop(name) for names in samples for name in names]
    folder.close([*records, *finished.values()])  # an earlier call may have measured more
    summary = summarize([*records, *finished.values()])
    write_json(folder.path / SUMMARY, {**summary, **about(folder.path / RUN)})
    text = table(summary)
    write_text(folder.path / TABLE, text)
    if importlib.util.find_spec("matplotlib") is None:
        tell('no plots: matplotlib is not installed (pip install ".[plots]")')
    else:
        plots.draw(summary, folder.path)
    if not args.quiet:
        tell(f"written to {folder.path}")
    Stdout().say(text)
