"""Steps that all commands of the evaluation share: the checkpoint, the folder, progress, the report."""

import importlib.util
import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from ..console.endings import Parsed, blame
from ..console.environment import call_of, now
from ..console.files import write_json, write_text
from ..console.streams import Stdout, tell
from ..console.workers import own_device
from ..models import load_model
from ..models.common import DiffusionLM
from ..models.description import DESCRIPTION_FILES
from ..models.files import checkpoint_folder
from ..models.identity import files_digest, weights_digest
from ..models.parallel import whole_parameters
from ..prompts import demo_path
from ..ranks import Ranks
from .folder import RUN, SUMMARY, TABLE, Folder, OtherRun, Record, about
from .team import Team

EVERY = 30.0  # seconds between the lines that a log gets


class Call(Parsed, Protocol):
    """The flags that every command of the evaluation has."""

    @property
    def model_path(self) -> str | None: ...
    @property
    def demo(self) -> str | None: ...
    @property
    def device(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def parallel(self) -> str: ...
    @property
    def out(self) -> Path: ...
    @property
    def quiet(self) -> bool: ...


def source(args: Call) -> tuple[str, str]:
    """The flag that names the checkpoint, and where it is."""
    return ("--demo", str(demo_path(args.demo))) if args.demo else ("--model_path", str(args.model_path))


def team_and_model(args: Call, ranks: Ranks) -> tuple[Team, DiffusionLM]:
    """How the processes share the work, and this process's model or part; wrong flags end with exit code 2."""
    option, path = source(args)
    team = Team(ranks, args.parallel)
    with blame(args, "--device"):
        device = own_device(args.device, ranks)
    with blame(args, option):
        return team, load_model(path, device=device, dtype=args.dtype, tensor_parallel=team.model.group)


def warn_of_length(model: DiffusionLM, what: str, longest: int) -> None:
    """Warn if the longest has more tokens than the model was trained on."""
    if longest > model.config.max_length:
        tell(f"warning: {what} of {longest} tokens; this model was trained on at most {model.config.max_length}")


def claimed(
    args: Call,
    team: Team,
    model: DiffusionLM,
    settings: Record,
    identify: Callable[[Record], tuple | None],
    more: Record | None = None,
) -> Folder:
    """The folder --out, made this run's.

    Args:
        settings: what decides the results, in addition to the checkpoint and the lines' own fields.
        identify: as in `Folder`.
        more: more about this call, for the record.
    """
    _, path = source(args)
    folder = Folder(args.out, identify, team.process)
    files = checkpoint_folder(path, DESCRIPTION_FILES)
    checkpoint = {
        "model": args.demo or path,
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": weights_digest(whole_parameters(model)),
        "config_and_tokenizer": files_digest(files / name for name in DESCRIPTION_FILES),
    }
    call = call_of(args.parser.prog, model.device, model.dtype) | (more or {})
    with blame(args, "--out", (OtherRun, OSError)), team.first():
        folder.claim(checkpoint | settings, call)
    return folder


def resumed(args: Call, team: Team, folder: Folder, told: bool) -> dict[tuple, Record]:
    """The lines that the folder has; it is then ready for more."""
    with blame(args, "--out", (OSError,)):
        finished: dict[tuple, Record] = team.agreed(folder.finished())
        folder.mend()
    if told:
        if finished:
            tell(f"{args.out}: {len(finished)} samples are there already")
        tell("if this is interrupted, the same command continues from there")
    return finished


class Progress(tqdm):
    """Steps and the time that is left: a bar in a terminal, elsewhere an occasional line."""

    def __init__(self, steps: int, hidden: bool, unit: str = "step"):
        self.terminal = sys.stderr is not None and sys.stderr.isatty()
        stream = sys.stderr if self.terminal else io.StringIO()
        # smoothing 0: the mean speed of all steps, because steps that a batch does not need are done at once
        super().__init__(total=steps, unit=unit, disable=hidden, file=stream, smoothing=0, dynamic_ncols=True)
        self.told = time.monotonic()

    def step(self, _: Any = None) -> None:
        """A step is done."""
        self.update()
        if not self.terminal and not self.disable and time.monotonic() - self.told > EVERY:
            self.told = time.monotonic()
            tell(str(self))

    def reach(self, steps: int) -> None:
        """This many steps are done, or were not needed."""
        self.update(steps - self.n)


def report(
    args: Call,
    folder: Folder,
    order: list[tuple],
    summarize: Callable[[list[Record]], Record],
    table: Callable[[Record], str],
    draw: Callable[[Record, Path], None],
) -> None:
    """Put the lines in order, sum them up, print the table.

    Args:
        order: the lines' keys, in order; other lines, of earlier calls, come last.
    """
    with blame(args, "--out", (OSError,)):
        finished = folder.finished()
        records = [*(finished.pop(name) for name in order), *finished.values()]
        folder.close(records)
        summary = {**summarize(records), **about(folder.path / RUN), "finished": now()}
        write_json(folder.path / SUMMARY, summary)
        text = table(summary)
        write_text(folder.path / TABLE, text)
        if importlib.util.find_spec("matplotlib") is None:
            tell('no plots: matplotlib is not installed (pip install ".[plots]")')
        else:
            draw(summary, folder.path)
        if not args.quiet:
            tell(f"written to {folder.path}")
    Stdout().say(text)
