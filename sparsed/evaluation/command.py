"""`python -m sparsed.evaluation`: from the flags to the table."""

from collections.abc import Container

from ..backends import BackendError
from ..chat import ChatTemplateError
from ..console.endings import blame
from ..console.workers import as_one
from ..models import load_tokenizer
from ..models.identity import files_digest
from ..models.loading import model_family
from ..ranks import Ranks
from . import plots
from .answering import Answerer
from .arguments import Arguments, parse
from .folder import Folder, Record
from .planning import Batch, plan, samplers
from .results import identified, summarize, table
from .running import Progress, claimed, report, resumed, source, team_and_model, warn_of_length
from .tasks import Sample

ADVICE = (
    "try a smaller --batch_size, shorter --lengths, --dtype bfloat16, a device with more memory, or torchrun with "
    "--parallel tensor"
)


def main(argv: list[str] | None = None) -> int:
    """Evaluate with these words (None: the process's own); returns the exit code."""
    program = "python -m sparsed.evaluation"
    return as_one(lambda ranks: evaluate(parse(argv), ranks), program, advice=ADVICE, ending=argv is None)


def evaluate(args: Arguments, ranks: Ranks) -> None:
    """Everything between the checked flags and the table, by all processes together."""
    option, path = source(args)
    with blame(args, option):
        family = model_family(path)  # refuses an unsupported model before its tokenizer is found missing
        tokenizer = load_tokenizer(path)
    with blame(args, option, (ChatTemplateError,)):
        batches = plan(args, tokenizer)
    settings = samplers(args, family, batches)
    team, model = team_and_model(args, ranks)
    told = team.leads and not args.quiet
    if told:
        warn_of_length(model, "prompts", max([*args.lengths, 0]))
    folder = claimed(args, team, model, _settings(args), identified)
    finished = resumed(args, team, folder, told)
    _run(args, Answerer(model, tokenizer, settings, args.backend), folder, team.own(batches), finished, told)
    team.wait()
    if team.leads:
        samples = (names for batch in batches for names in zip(*map(batch.keys, args.variants), strict=True))
        report(args, folder, [name for names in samples for name in names], summarize, table, plots.draw)


def _settings(args: Arguments) -> Record:
    """What decides a sample's result, in addition to the checkpoint and its line's own fields."""
    return {
        "seq_len": args.seq_len,
        "steps": args.steps,
        "block_length": args.block_length,
        # absent if not on, as in earlier folders
        **({"early_stop": True} if args.early_stop else {}),
        "backend": args.backend,
        "tasks_file": files_digest([args.tasks_file]) if args.tasks_file else None,
    }


def _run(
    args: Arguments,
    answerer: Answerer,
    folder: Folder,
    batches: list[Batch],
    finished: Container[tuple],
    told: bool,
) -> None:
    """Answer the unfinished samples of these batches; every finished batch adds its lines to the folder."""
    todo = [(batch, variant) for batch in batches for variant in args.variants if batch.missing(variant, finished)]
    made, samples = None, list[Sample]()
    steps = sum(_steps(args, batch) for batch, _ in todo)
    with Progress(steps, hidden=not told) as bar:
        for number, (batch, variant) in enumerate(todo, 1):
            if batch is not made:
                with blame(args, "--lengths"):
                    made, samples = batch, batch.samples()
            bar.set_description(f"{samples[0].task} {variant.method} {number}/{len(todo)}", refresh=False)
            missing = batch.missing(variant, finished)
            asked = [sample for sample in samples if sample.id in missing]
            end = bar.n + _steps(args, batch)
            with blame(args, "--backend", (BackendError,)), blame(args, "--dtype", (FloatingPointError,)):
                lines = answerer.answer(asked, variant, batch.gen_length, bar.step)
            bar.reach(end)
            with blame(args, "--out", (OSError,)):
                folder.append(lines)


def _steps(args: Arguments, batch: Batch) -> int:
    """The most steps that an answer takes."""
    return args.steps or batch.gen_length
