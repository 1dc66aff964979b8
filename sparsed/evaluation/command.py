"""`python -m sparsed.evaluation`: from the flags to the table."""

import importlib.util
import io
import shlex
import sys
import time
from datetime import datetime, timezone

from tqdm import tqdm

from ..backends import BackendError
from ..chat import ChatTemplateError
from ..console.endings import blame, guarded
from ..console.environment import environment
from ..console.files import write_json, write_text
from ..console.streams import Stdout, tell
from ..models import load_model, load_tokenizer
from ..models.common import DiffusionLM
from ..models.description import DESCRIPTION_FILES
from ..models.files import checkpoint_folder
from ..models.identity import files_digest, weights_digest
from ..models.loading import model_family
from ..prompts import demo_path
from ..sampling.common import Step
from . import plots
from .answering import Answerer
from .arguments import Arguments, parse
from .planning import Batch, plan, samplers
from .results import DEFAULTS, RUN, SUMMARY, TABLE, Folder, OtherRun, Record, about, summarize, table
from .tasks import Sample
from .team import Team, leave_group

EVERY = 30.0  # seconds between the lines that a log gets
ADVICE = "try a smaller --batch_size, shorter --lengths, --dtype bfloat16, or a device with more memory"


def main(argv: list[str] | None = None) -> int:
    """Evaluate with these words (None: the process's own); returns the exit code."""
    return guarded(lambda: evaluate(parse(argv)), "python -m sparsed.evaluation", advice=ADVICE, ending=argv is None)


def evaluate(args: Arguments) -> None:
    """Everything between the checked flags and the table."""
    source = "--demo" if args.demo else "--model_path"
    with blame(args, source):
        path = str(demo_path(args.demo)) if args.demo else str(args.model_path)
        family = model_family(path)  # what is not supported is said before its tokenizer is missed
        tokenizer = load_tokenizer(path)
    with blame(args, source, (ChatTemplateError,)):
        batches = plan(args, tokenizer)
    settings = samplers(args, family, batches)
    with blame(args, "--device"):
        team = Team.of(args.device)
    with blame(args, source):
        model = load_model(path, device=team.device or args.device, dtype=args.dtype)
    longest = max([*args.lengths, 0])
    told = team.index == 0 and not args.quiet
    if told and longest > model.config.max_length:
        tell(f"warning: prompts of {longest} tokens; this model was trained on at most {model.config.max_length}")
    folder = Folder(args.out, team.index)
    with blame(args, "--out", (OtherRun, OSError)), team.first():
        folder.claim(_settings(args, path, model), _call(model))
    _run(args, Answerer(model, tokenizer, settings, args.backend), folder, batches[team.index :: team.count], told)
    team.wait()
    if team.index == 0:
        with blame(args, "--out", (OSError,)):
            _report(args, folder, batches)
    leave_group()


def _settings(args: Arguments, path: str, model: DiffusionLM) -> Record:
    """What decides a sample's result, beyond what its line says."""
    folder = checkpoint_folder(path, DESCRIPTION_FILES)
    return {
        "model": args.demo or path,
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": weights_digest(model),
        "config_and_tokenizer": files_digest(folder / name for name in DESCRIPTION_FILES),
        "seq_len": args.seq_len,
        "steps": args.steps,
        "block_length": args.block_length,
        # what is not on is absent, as in earlier folders
        **{name: value for name, value in args.saving.items() if value not in (None, DEFAULTS[name])},
        "backend": args.backend,
        "tasks_file": files_digest([args.tasks_file]) if args.tasks_file else None,
    }


def _call(model: DiffusionLM) -> Record:
    return {
        "command": shlex.join(["python", "-m", "sparsed.evaluation", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(model.device, model.dtype),
    }


def _run(args: Arguments, answerer: Answerer, folder: Folder, batches: list[Batch], told: bool) -> None:
    """Answer what the folder lacks of these batches; every finished batch is a few lines in it."""
    with blame(args, "--out", (OSError,)):
        finished = folder.finished()
        folder.mend()
    todo = [(batch, variant) for batch in batches for variant in args.variants if batch.missing(variant, finished)]
    if told:
        if finished:
            tell(f"{args.out}: {len(finished)} samples are there already")
        tell("if this is interrupted, the same command goes on from there")
    made, samples = None, list[Sample]()
    steps = sum(answerer.settings[batch.gen_length].steps for batch, _ in todo)
    with Progress(steps, hidden=not told) as bar:
        for number, (batch, variant) in enumerate(todo, 1):
            if batch is not made:
                with blame(args, "--lengths"):
                    made, samples = batch, batch.samples()
            bar.set_description(f"{samples[0].task} {variant.method} {number}/{len(todo)}", refresh=False)
            missing = batch.missing(variant, finished)
            asked = [sample for sample in samples if sample.id in missing]
            end = bar.n + answerer.settings[batch.gen_length].steps
            with blame(args, "--backend", (BackendError,)), blame(args, "--dtype", (FloatingPointError,)):
                lines = answerer.answer(asked, variant, batch.gen_length, bar.step)
            bar.reach(end)
            with blame(args, "--out", (OSError,)):
                folder.append(lines)


class Progress(tqdm):
    """Denoising steps and the time that is left: a bar in a terminal, elsewhere an occasional line."""

    def __init__(self, steps: int, hidden: bool):
        self.terminal = sys.stderr is not None and sys.stderr.isatty()
        stream = sys.stderr if self.terminal else io.StringIO()
        # smoothing 0, the mean speed of all steps: those that a batch does not need are done at once
        super().__init__(total=steps, unit="step", disable=hidden, file=stream, smoothing=0, dynamic_ncols=True)
        self.told = time.monotonic()

    def step(self, _: Step) -> None:
        """A step is done."""
        self.update()
        if not self.terminal and not self.disable and time.monotonic() - self.told > EVERY:
            self.told = time.monotonic()
            tell(str(self))

    def reach(self, steps: int) -> None:
        """So many steps are done, or were not needed."""
        self.update(steps - self.n)


def _report(args: Arguments, folder: Folder, batches: list[Batch]) -> None:
    """Put the results in order, sum them up, print the table."""
    finished = folder.finished()
    samples = (names for batch in batches for names in zip(*map(batch.keys, args.variants), strict=True))
    # an earlier call may have measured more: that comes last
    records = [*(finished.pop(name) for names in samples for name in names), *finished.values()]
    folder.close(records)
    summary = {**summarize(records), **about(folder.path / RUN)}
    write_json(folder.path / SUMMARY, summary)
    text = table(summary)
    write_text(folder.path / TABLE, text)
    if importlib.util.find_spec("matplotlib") is None:
        tell('no plots: matplotlib is not installed (pip install ".[plots]")')
    else:
        plots.draw(summary, folder.path)
    if not args.quiet:
        tell(f"written to {folder.path}")
    Stdout().say(text)
