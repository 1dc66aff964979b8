"""The flags of `python -m sparsed.evaluation.fidelity`, and every check that needs no model."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...config import SparseDConfig
from ...console.parser import Parser
from ...console.readers import list_of, number_in, path, whole
from ...sampling.saving import BLOCK_LENGTH, Saving
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
    length,
)
from ..methods import Variant, needs_scores, variants
from ..savings import add_caches, savings_of

EXAMPLES = """\
methods:
{methods}

examples:
  python -m sparsed.evaluation.fidelity --model_path FOLDER --texts *.txt --lengths 2k --limit 5 --out runs/small
  python -m sparsed.evaluation.fidelity --model_path GSAI-ML/LLaDA-1.5 --texts books/*.txt --lengths 4k,8k \\
      --select 0.1,0.3 --block_size 32,128 --dense_answer both --out runs/books

{goes_on}"""


@dataclass(frozen=True)
class TextArguments:
    """The values of the flags that all measures have.

    Args:
        variants: every method with all settings that apply to it; full attention without a cache comes first.
        parser: for errors that are found later.
    """

    model_path: str | None
    demo: str | None
    device: str
    dtype: str
    texts: list[Path]
    lengths: list[int]
    leave_out: list[str]
    limit: int
    seq_len: int
    out: Path
    backend: str
    parallel: str
    quiet: bool
    variants: list[Variant]
    parser: Parser


@dataclass(frozen=True)
class Arguments(TextArguments):
    """These, and this measure's own flags.

    Args:
        block_length: None if the region is one block.
        configs: every combination of SparseD's settings.
    """

    mask_rates: list[float]
    block_length: int | None
    configs: list[SparseDConfig]

    def masked(self, rate: float) -> float:
        """The least share of the region that is masked when this share of a block is."""
        return rate * (self.block_length or self.seq_len) / self.seq_len


def parse(argv: list[str] | None) -> Arguments:
    """Read and check the flags.

    Raises:
        SystemExit: code 2 after a wrong call, 0 after --help.
    """
    parser = build_parser()
    given = vars(parser.parse_args(argv))
    check_folder(parser, given["out"])
    settings, methods = configs(given), given.pop("methods")
    with blame_setting(parser):
        saved = savings_of(given)
    args = Arguments(**given, configs=settings, variants=[], parser=parser)
    if any(saving.cached for saving in saved) and args.block_length is None:
        args = replace(args, block_length=min(BLOCK_LENGTH, args.seq_len))
    check_lengths(parser, args.seq_len, args.lengths)
    block, lowest = args.block_length or args.seq_len, min(args.mask_rates)
    with blame_setting(parser):
        blocks = args.seq_len // steps_per_block(args.seq_len, args.seq_len, block)
    if not round(lowest * block):
        parser.error(f"argument --mask_rates: {lowest:g} of {block} tokens is less than a token")
    args = replace(args, variants=compared(parser, methods, settings, saved, blocks))
    for variant in args.variants:
        if not sparse_at(variant, args.masked(lowest)):
            skip = variant.names["skip"]
            parser.error(f"argument --skip: with {skip:g}, attention is full at all of --mask_rates")
    return args


def check_lengths(parser: Parser, seq_len: int, lengths: list[int]) -> None:
    """Exit with code 2 if the new tokens are a whole document, with nothing before them."""
    if seq_len >= min(lengths):
        parser.error(f"argument --seq_len: {seq_len} new tokens leave nothing of {min(lengths)} before them")


def compared(
    parser: Parser, methods: list[str], settings: list[SparseDConfig], saved: list[Saving], blocks: int
) -> list[Variant]:
    """Full attention without a cache, and every other combination, except those that are full attention as well; exit
    with code 2 if a method has no other."""
    found = [*variants(["origin"], settings), *variants(["origin", *methods], settings, saved)]
    kept = list(dict.fromkeys(variant for variant in found if not idle(variant, blocks)))
    for method in methods:
        if all(variant.method != method for variant in kept):
            parser.error(f"argument --refresh: of {method}, none of the forwards that fill a cache would be sparse")
    return kept


def idle(variant: Variant, blocks: int) -> bool:
    """Whether no forward that fills a variant's cache is sparse: the variant is then full attention with that cache."""
    if variant.config is None or not variant.saving.cached or not needs_scores(variant):
        return False
    fills = variant.saving.refreshes(blocks)
    return variant.config.n_full(fills) == fills


def sparse_at(variant: Variant, rate: float) -> bool:
    """Whether a run is past its full steps when this share of the region is masked."""
    return variant.saving.cached or (variant.names["skip"] or 0) + rate <= 1 + 1e-9


def build_parser() -> Parser:
    """The parser, in groups: model, what to measure, SparseD, running."""
    parser = Parser(
        prog="python -m sparsed.evaluation.fidelity",
        description="Measure how close SparseD and other ways to attend stay to full attention on any text: negative "
        "log-likelihood and accuracy of masked tokens, KL divergence to full attention, agreement of the top token, "
        "with bootstrap intervals over documents. No answers are needed. Figures are shown only if full attention "
        "clearly beats a window that reads as many keys on tokens with evidence far back. A method is left out at mask "
        "rates at which its --skip makes attention full. Every result is a line of samples.jsonl in the folder --out; "
        "summary.json, table.md and plots are made of these lines.",
        epilog=EXAMPLES.format(methods=METHOD_LINES, goes_on=GOES_ON),
    )
    add_model(parser)
    group = parser.add_argument_group("what to measure")
    add_texts(group)
    about = "shares of each block's new tokens that are masked (default: 0.75,0.5,0.25)"
    rates = list_of(number_in(0, 1, above=True))
    group.add_argument("--mask_rates", type=rates, default=[0.75, 0.5, 0.25], metavar="VALUES", help=about)
    add_methods(group)
    add_sparsed(parser)
    add_blocks(parser)
    add_running(parser)
    return parser


def add_texts(group: Any) -> None:
    """Add the documents, how many tokens of them are read, and how many of those count as new."""
    group.add_argument(
        "--texts",
        type=path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="UTF-8 texts, one document each; or .bin and .bin.xz, 16-bit token ids of documents that end with id 0",
    )
    about = "tokens read of each document, the new ones included: 1k to 128k, or numbers (default: %(default)s)"
    group.add_argument("--lengths", type=list_of(length), default="4k", metavar="LENGTHS", help=about)
    about = "documents to leave out, for example because the model was trained on them; as the results name them: FILE "
    about += "(texts) or FILE:NUMBER (ids), separated by commas"
    group.add_argument("--leave_out", type=list_of(str), default=[], metavar="NAMES", help=about)
    about = "documents of each length, at most (default: %(default)s)"
    group.add_argument("--limit", type=whole(1), default=50, metavar="N", help=about)
    about = "new tokens: the last ones of each document, which count as the generated region (default: %(default)s)"
    group.add_argument("--seq_len", type=whole(2), default=128, metavar="N", help=about)


def add_blocks(parser: Parser) -> Any:
    """Add the flags for caches, and for the blocks in which they are filled; returns the group."""
    group = parser.add_argument_group("caches (values separated by commas, in all combinations)")
    add_caches(group)
    about = f"new tokens per block, one block after the other (default: with a cache {BLOCK_LENGTH}, otherwise all)"
    group.add_argument("--block_length", type=whole(1), metavar="N", help=about)
    return group
