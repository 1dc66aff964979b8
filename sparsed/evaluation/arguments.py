"""The flags of `python -m sparsed.evaluation`, and every check that needs no model."""

import argparse
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ..backends import BACKENDS
from ..config import SparseDConfig
from ..console.parser import Parser
from ..console.readers import config_field, device, list_of, non_empty, path, shown, some_of, whole
from ..models.loading import DTYPES
from ..sampling.unmasking import SettingError
from .methods import METHODS, Variant, variants
from .savings import add_bounds, add_caches, savings_of
from .tasks import TASKS
from .team import DATA, TENSOR

SHORTEST, LONGEST = 256, 128 * 1024  # tokens of a prompt
COMPARED = "origin,sparsed,window,streaming"
METHOD_LINES = "\n".join(f"  {name:<14}{method.title}" for name, method in METHODS.items())
DENSE_ANSWER = {"no": (False,), "yes": (True,), "both": (False, True)}
GOES_ON = """\
The same command continues where an interrupted one stopped. Exit codes: 0 done, 2 wrong call or input, 3 out of memory,
130 interrupted (Ctrl-C), 141 what read stdout has ended, 143 terminated.
"""
EXAMPLES = """\
tasks (RULER's, over this package's own texts):
  {tasks}
methods:
{methods}

examples:
  python -m sparsed.evaluation --demo llada --tasks niah_single_2,vt,qa_1 --methods origin,sparsed,window \\
      --lengths 1k --limit 20 --block_size 32 --out runs/small
  python -m sparsed.evaluation --model_path GSAI-ML/LLaDA-1.5 --lengths 4k,8k --limit 100 --out runs/llada
  accelerate launch --num_processes 8 -m sparsed.evaluation --model_path GSAI-ML/LLaDA-1.5 --out runs/llada
  python -m sparsed.evaluation --demo dream --select 0.1,0.2,0.3,0.5 --block_size 32 --out runs/curve

{goes_on}"""


@dataclass(frozen=True)
class Arguments:
    """The values of the flags of the same names.

    Args:
        variants: the methods, each with every combination of SparseD's settings, caches and thresholds.
        parser: for errors that are found later.
    """

    model_path: str | None
    demo: str | None
    device: str
    dtype: str
    tasks: list[str]
    tasks_file: Path | None
    lengths: list[int]
    limit: int
    seed: list[int]
    out: Path
    seq_len: int | None
    steps: int | None
    block_length: int
    batch_size: int
    backend: str
    parallel: str
    quiet: bool
    early_stop: bool
    variants: list[Variant]
    parser: Parser


def parse(argv: list[str] | None) -> Arguments:
    """Read and check the flags.

    Raises:
        SystemExit: code 2 after a wrong call, 0 after --help.
    """
    parser = build_parser()
    given = vars(parser.parse_args(argv))
    if given["tasks"] is None:
        given["tasks"] = [] if given["tasks_file"] else list(TASKS)
    check_folder(parser, given["out"])
    with blame_setting(parser):
        savings = savings_of(given)
    found = variants(given.pop("methods"), configs(given), savings)
    return Arguments(**given, variants=found, parser=parser)


def check_folder(parser: Parser, out: Path) -> None:
    """Exit with code 2 if --out, or a folder above it, is a file: before a model is loaded."""
    out = out.absolute()
    present = next(place for place in (out, *out.parents) if os.path.lexists(place))
    if not present.is_dir():
        parser.error(f"argument --out: {present} is a file; name a folder for the results")


def configs(given: dict[str, Any]) -> list[SparseDConfig]:
    """Every combination of the values of `add_sparsed`'s flags, which are taken out of `given`."""
    dense = DENSE_ANSWER[given.pop("dense_answer", "no")]
    sweep = product(*(given.pop(name) for name in ("block_size", "skip", "select")), dense)
    return [SparseDConfig(skip, select, size, dense) for size, skip, select, dense in sweep]


@contextmanager
def blame_setting(parser: Parser) -> Iterator[None]:
    """Turn a sampler's wrong setting into a line about the flag of that name, and exit code 2."""
    try:
        yield
    except SettingError as error:
        parser.error(f"argument --{error.argument}: {error.must}")


def build_parser() -> Parser:
    """The parser, in groups: model, what to measure, SparseD, generation, running."""
    parser = Parser(
        prog="python -m sparsed.evaluation",
        description="Measure the accuracy of SparseD and of other ways to attend, on the same tasks with long prompts. "
        "Every finished sample is a line of samples.jsonl in the folder --out; summary.json, table.md and plots are "
        "made of these lines.",
        epilog=EXAMPLES.format(tasks=", ".join(TASKS), methods=METHOD_LINES, goes_on=GOES_ON),
    )
    add_model(parser)
    _add_measured(parser.add_argument_group("what to measure"))
    add_sparsed(parser)
    about = "generation, greedy (caches and thresholds: values separated by commas, in all combinations)"
    group = parser.add_argument_group(about)
    group.add_argument("--seq_len", type=whole(1), metavar="N", help="new tokens (default: as RULER has it, by task)")
    group.add_argument("--steps", type=whole(1), metavar="N", help="denoising steps (default: as many as new tokens)")
    blocks = "of LLaDA; of Dream with a cache, threshold or factor (default: %(default)s)"
    group.add_argument("--block_length", type=whole(1), default=32, metavar="N", help=blocks)
    add_caches(group)
    add_bounds(group)
    stop = "end the answer with the block that holds an end token; Dream: only with a cache, threshold or factor"
    group.add_argument("--early_stop", action="store_true", help=stop)
    group = add_running(parser)
    group.add_argument("--batch_size", type=whole(1), default=1, metavar="N", help="samples at once (default: 1)")
    return parser


def add_model(parser: Parser) -> None:
    """Add the flags that name the checkpoint, and how it is loaded."""
    group = parser.add_argument_group("model")
    which = group.add_mutually_exclusive_group(required=True)
    which.add_argument("--model_path", type=non_empty, metavar="PATH", help="hub id, or a folder in the hub's format")
    which.add_argument("--demo", choices=("dream", "llada"), help="a bundled demo checkpoint")
    group.add_argument("--device", type=device, default="auto", help="auto, cuda, cuda:N, cpu or mps (default: auto)")
    group.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="of the weights (default: auto)")


def add_running(parser: Parser) -> Any:
    """Add --backend, --parallel and --quiet; returns the group, for more flags."""
    group = parser.add_argument_group("running")
    group.add_argument("--backend", choices=("auto", *BACKENDS), default="auto", help="(default: %(default)s)")
    about = "what several processes share: data, the samples; tensor, the model by heads (default: %(default)s)"
    group.add_argument("--parallel", choices=(DATA, TENSOR), default=DATA, help=about)
    group.add_argument("--quiet", action="store_true", help="no progress")
    return group


def add_methods(group: Any) -> None:
    """Add the methods and the folder of the results."""
    about = "some methods (default: %(default)s)"
    group.add_argument("--methods", type=some_of(METHODS), default=COMPARED, metavar="NAMES", help=about)
    group.add_argument("--out", type=path, required=True, metavar="DIR", help="folder of the results")


def _add_measured(group: Any) -> None:
    group.add_argument("--tasks", type=some_of(TASKS), metavar="NAMES", help="some tasks (default: all)")
    group.add_argument(
        "--tasks_file",
        type=path,
        metavar="FILE.jsonl",
        help='tasks of your own, one per line: {"prompt": "...", "answers": ["...", ...]}; all answers must be in the '
        'text, or one of them with "match": "part"',
    )
    add_methods(group)
    group.add_argument(
        "--lengths",
        type=list_of(length),
        default="4k",
        metavar="LENGTHS",
        help="tokens of a prompt, chat template included: 1k to 128k, or numbers (default: %(default)s)",
    )
    group.add_argument(
        "--limit", type=whole(1), default=200, metavar="N", help="samples per cell and seed (default: %(default)s)"
    )
    about = "of the samples, separated by commas (default: 0)"
    group.add_argument("--seed", type=list_of(whole(0)), default=[0], metavar="NUMBERS", help=about)


def add_sparsed(parser: Parser) -> None:
    """Add SparseD's settings; each takes several values."""
    add_numbers(parser).add_argument(
        "--dense_answer",
        choices=DENSE_ANSWER,
        nargs="?",
        const="yes",
        default="no",
        help="whether the answer's queries read every key in the sparse steps, under any method (default: %(default)s; "
        "without a value: yes)",
    )


def add_numbers(parser: Parser) -> Any:
    """Add the paper's three numbers; each takes several values. Returns the group, for more flags."""
    about = "SparseD (values separated by commas, in all combinations)"
    group = parser.add_argument_group(about)
    for name, kind in (("skip", float), ("select", float), ("block_size", int)):
        values, default = list_of(config_field(name, kind)), getattr(SparseDConfig, name)
        about = f"the scripts' --{name} (default: {default})"
        group.add_argument(f"--{name}", type=values, default=[default], metavar="VALUES", help=about)
    return group


def length(word: str) -> int:
    """A reader of a prompt's length: 4k is 4,096 tokens."""
    match = re.fullmatch(r"([0-9]{1,7})(k?)", word)
    tokens = int(match[1]) * (1024 if match[2] else 1) if match else 0
    if not SHORTEST <= tokens <= LONGEST:
        raise argparse.ArgumentTypeError(f"must be tokens from {SHORTEST} to 128k, such as 4k, got {shown(word)}")
    return tokens
