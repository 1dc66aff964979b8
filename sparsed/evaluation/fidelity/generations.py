"""`python -m sparsed.evaluation.fidelity.generations`: whole texts under every setting, and full attention's."""

import sys
from dataclasses import dataclass
from itertools import product

from ...backends import BackendError
from ...console.endings import blame
from ...console.parser import Parser
from ...console.readers import list_of, whole
from ...console.workers import as_one
from ...ranks import Ranks
from ...sampling.saving import BLOCK_LENGTH
from ...sampling.unmasking import steps_per_block
from ..arguments import (
    GOES_ON,
    METHOD_LINES,
    add_methods,
    add_model,
    add_running,
    add_sparsed,
    blame_setting,
    check_folder,
    configs,
)
from ..folder import MEASURE
from ..running import Progress, report
from ..savings import add_bounds, savings_of
from .agreement import draw, identified, summarize, table
from .arguments import TextArguments, add_blocks, add_texts, check_lengths, compared
from .command import ADVICE
from .measuring import FULL
from .preparing import Work, prepare
from .writing import Task, Writer

PROGRAM = "python -m sparsed.evaluation.fidelity.generations"
EXAMPLES = f"""\
methods:
{METHOD_LINES}

example:
  {PROGRAM} --model_path FOLDER --texts *.txt --methods origin --cache none,dual --refresh 1,0 \\
      --threshold none,0.9,0.7 --steps 128,64,32 --out runs/written

{GOES_ON}"""


@dataclass(frozen=True)
class Arguments(TextArguments):
    """These, and this measure's own flags."""

    block_length: int
    steps: list[int]


def main(argv: list[str] | None = None) -> int:
    """Write with these words (None: the process's own); returns the exit code."""
    return as_one(lambda ranks: _write(parse(argv), ranks), PROGRAM, advice=ADVICE, ending=argv is None)


def parse(argv: list[str] | None) -> Arguments:
    """Read and check the flags.

    Raises:
        SystemExit: code 2 after a wrong call, 0 after --help.
    """
    parser = _build_parser()
    given = vars(parser.parse_args(argv))
    check_folder(parser, given["out"])
    check_lengths(parser, given["seq_len"], given["lengths"])
    given["block_length"] = given["block_length"] or min(BLOCK_LENGTH, given["seq_len"])
    given["steps"] = given["steps"] or [given["seq_len"]]
    for steps in given["steps"]:
        with blame_setting(parser):
            steps_per_block(given["seq_len"], steps, given["block_length"])
    blocks = given["seq_len"] // given["block_length"]
    with blame_setting(parser):
        saved = savings_of(given)
    found = compared(parser, given.pop("methods"), configs(given), saved, blocks)
    return Arguments(**given, variants=found, parser=parser)


def _build_parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description="Continue documents under SparseD, caches and thresholds, and compare the texts with full "
        "attention's in one step per token: equal tokens, repetitions, an upper bound on the text's negative "
        "log-likelihood under full attention, forwards by kind, seconds. Fewer --steps without a cache show what few "
        "steps cost by themselves. Every text is a line of samples.jsonl in the folder --out; summary.json, table.md "
        "and plots are made of these lines. The gate of `fidelity` says whether model and text can tell anything.",
        epilog=EXAMPLES,
    )
    add_model(parser)
    group = parser.add_argument_group("what to write")
    add_texts(group)
    add_methods(group)
    add_sparsed(parser)
    group = add_blocks(parser)
    add_bounds(group)
    about = "denoising steps (default: as many as new tokens)"
    group.add_argument("--steps", type=list_of(whole(1)), metavar="VALUES", help=about)
    add_running(parser)
    return parser


def plan(args: Arguments, work: Work) -> list[Task]:
    """Every text; each document's first one is full attention's, with which the others are compared."""
    ways = [(args.seq_len, FULL), *product(args.steps, args.variants)]
    return [
        Task(document, length, steps, variant)
        for length, documents in work.documents.items()
        for document in documents
        for steps, variant in dict.fromkeys(ways)
    ]


def _write(args: Arguments, ranks: Ranks) -> None:
    work = prepare(args, ranks, {MEASURE: "generations", "block_length": args.block_length}, identified)
    tasks = plan(args, work)
    _run(args, work, work.team.own(tasks))
    work.team.wait()
    if work.team.leads:
        report(args, work.folder, [task.key for task in tasks], summarize, table, draw)


def _run(args: Arguments, work: Work, tasks: list[Task]) -> None:
    """Write the texts that the folder lacks; each is a line in it."""
    writer = Writer(work.model, args.seq_len, args.block_length, args.backend)
    todo = [task for task in tasks if task.key not in work.finished]
    with Progress(sum(task.steps for task in todo), hidden=not work.told) as bar:
        for number, task in enumerate(todo, 1):
            bar.set_description(f"{task.length} {task.variant.method} {number}/{len(todo)}", refresh=False)
            end = bar.n + task.steps
            with blame(args, "--backend", (BackendError,)), blame(args, "--dtype", (FloatingPointError,)):
                line = writer.write(task, bar.step)
            bar.reach(end)
            with blame(args, "--out", (OSError,)):
                work.folder.append([line])


if __name__ == "__main__":
    sys.exit(main())
