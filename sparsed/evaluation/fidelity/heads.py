"""`python -m sparsed.evaluation.fidelity.heads`: the paper's observations about heads and steps, on any text.

It measures, by layer and head, the share of the attention that the selected blocks hold, in the step that selects and
in later ones; how alike the blocks of a layer's heads are; and how alike those of different steps.
"""

import importlib.util
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch

from ...blocks import BlockGrid
from ...config import SparseDConfig
from ...console.endings import blame
from ...console.parser import Parser
from ...console.readers import path, whole
from ...console.workers import as_one
from ...pictures import (
    Seen,
    View,
    between_heads,
    common,
    denoise,
    heads_figure,
    look,
    recall_figure,
    save,
    steps_figure,
)
from ...ranks import Ranks
from ..arguments import GOES_ON, add_model, add_numbers, check_folder, configs
from ..folder import MEASURE, Record
from ..methods import METHODS, Variant, variants
from ..results import NUMBERS, VARIANT, groups, markdown, title_of, variant_of
from ..running import Progress, report
from ..scoring import bootstrap
from ..team import DATA
from .arguments import TextArguments, add_texts, check_lengths
from .documents import Document
from .preparing import Work, prepare
from .results import figure

PROGRAM = "python -m sparsed.evaluation.fidelity.heads"
ADVICE = "try shorter --lengths, --dtype bfloat16, or a device with more memory"
SHARES = {  # a line's shares, and the table's columns of their means
    "held": "attention held when selected, %",
    "later": "in later steps, %",
    "heads": "blocks in common: two heads, %",
    "steps_alike": "a head's in later steps, %",
}
KINDS: dict[str, Any] = {
    **dict.fromkeys(("id", "document"), str),
    "length": int,
    **dict.fromkeys(NUMBERS, (int, float, NoneType)),
    **dict.fromkeys(SHARES, list),
}
DRAWN_STEPS = 16  # about how many steps of a run are looked at
TITLES = {"held": "the step that selects", "later": "later steps"}


@dataclass(frozen=True)
class Arguments(TextArguments):
    """These, and this measure's own flags."""

    steps: int

    def view(self, variant: Variant) -> View:
        """The run that is looked at."""
        assert variant.config is not None
        return View(self.seq_len, self.steps, variant.config, max(1, self.steps // DRAWN_STEPS))


def main(argv: list[str] | None = None) -> int:
    """Look with these words (None: the process's own); returns the exit code."""
    return as_one(lambda ranks: _look(parse(argv), ranks), PROGRAM, advice=ADVICE, ending=argv is None)


def parse(argv: list[str] | None) -> Arguments:
    """Read and check the flags.

    Raises:
        SystemExit: code 2 after a wrong call, 0 after --help.
    """
    parser = Parser(
        prog=PROGRAM,
        description="Continue documents with full attention, and see what SparseD would select in some of the steps: "
        "by layer and head, the share of the attention that the selected blocks hold; how alike the blocks of a "
        "layer's heads are, and those of a head in different steps. Writes heads.png and steps.png of the first "
        "document, recall.png, samples.jsonl with a line for each document, summary.json and table.md to the folder "
        "--out.",
        epilog=f"example:\n  {PROGRAM} --model_path FOLDER --texts *.txt --limit 5 --out runs/heads\n\n{GOES_ON}",
    )
    add_model(parser)
    group = parser.add_argument_group("what to look at")
    add_texts(group)
    group.add_argument("--steps", type=whole(1), metavar="N", help="denoising steps (default: as many as new tokens)")
    group.add_argument("--out", type=path, required=True, metavar="DIR", help="folder of the results")
    add_numbers(parser)
    parser.add_argument_group("running").add_argument("--quiet", action="store_true", help="no progress")
    given = vars(parser.parse_args(argv))
    check_folder(parser, given["out"])
    check_lengths(parser, given["seq_len"], given["lengths"])
    given["steps"] = given["steps"] or given["seq_len"]
    found = variants(["sparsed"], configs(given))
    args = Arguments(**given, backend="auto", parallel=DATA, variants=found, parser=parser)
    for variant in args.variants:
        view = args.view(variant)
        if view.selecting + view.stride >= view.steps:
            parser.error(f"argument --skip: {view.config.skip:g} leaves no later step of {view.steps} to look at")
        _check_blocks(args, view.config)
    return args


def _check_blocks(args: Arguments, config: SparseDConfig) -> None:
    """Exit with code 2 if every block of the shortest documents would be kept: there is nothing to select."""
    shortest = min(args.lengths)
    if BlockGrid(shortest, shortest - args.seq_len, config.block_size).keeps_all(config.select):
        kept = f"{config.select:g} keeps every block of {shortest} tokens with --block_size {config.block_size}"
        args.parser.error(f"argument --select: {kept}, so there is nothing to look at; use smaller blocks or --select")


def key(record: Record) -> tuple:
    """The key of a line of results."""
    return (record["id"], *variant_of(record))


def identified(record: Record) -> tuple | None:
    """The key of a line; None, or an error that `Folder` expects, if the summary cannot read it."""
    readable = all(isinstance(record[name], kinds) for name, kinds in KINDS.items()) and record["method"] in METHODS
    return key(record) if readable else None


def shares(seen: Seen) -> dict[str, list]:
    """Shares. held, later: of the attention, that the selected blocks hold, [layers][heads]; heads: of the blocks, that
    two heads of a layer have in common, [layers]; steps_alike: of a head's blocks, that it would select again in a
    later step, [layers][heads]."""
    alike = common(seen.kept, seen.selected)  # [steps, layers, heads]
    found = {
        "held": seen.held[seen.now],
        "later": seen.held[seen.later].mean(0),
        "heads": between_heads(seen.selected),
        "steps_alike": alike[seen.later].mean(0),
    }
    return {name: tensor.tolist() for name, tensor in found.items()}


def summarize(records: list[Record]) -> dict[str, list[Record]]:
    """A row for each length and setting: documents; the mean of each of `SHARES` with its 95 % bootstrap interval over
    documents; and `by_head`, the means over documents in the form of `shares`.

    Args:
        records: lines of the samples file.
    """
    rows = []
    for cell in groups(records, "length", *VARIANT):
        arrays = {name: np.array([record[name] for record in cell]) for name in SHARES}
        means = {name: bootstrap([one.mean() for one in found], [1] * len(cell)) for name, found in arrays.items()}
        named = {name: cell[0].get(name) for name in ("length", *VARIANT)}
        by_head = {name: found.mean(0).tolist() for name, found in arrays.items()}
        rows.append({**named, "documents": len(cell), **means, "by_head": by_head})
    return {"rows": rows}


def table(summary: Record) -> str:
    """Markdown, a line for each length and setting."""
    columns, lines = ["tokens", "documents", "setting", *SHARES.values(), "lowest head in later steps, %"], []
    for row in summary["rows"]:
        figures = [figure(row[name], 100, ".1f") for name in SHARES]
        lowest = f"{100 * np.min(row['by_head']['later']):.1f}"
        lines.append([f"{row['length']:,}", str(row["documents"]), title_of(row), *figures, lowest])
    return markdown(columns, lines) + "\n"


def draw(summary: Record, folder: Path) -> None:
    """Write `recall.png`, of the first row."""
    by_head = summary["rows"][0]["by_head"]
    panels = {title: torch.tensor(by_head[name]) for name, title in TITLES.items()}
    save(recall_figure(panels), folder / "recall.png")


def _look(args: Arguments, ranks: Ranks) -> None:
    work = prepare(args, ranks, {MEASURE: "heads", "steps": args.steps}, identified)
    pairs = [(document, length) for length, found in work.documents.items() for document in found]
    _run(args, work, work.team.own(pairs), pairs[0])
    work.team.wait()
    if work.team.leads:
        names = [key(_names(*pair, variant)) for pair, variant in product(pairs, args.variants)]
        report(args, work.folder, names, summarize, table, draw)


def _names(document: Document, length: int, variant: Variant) -> Record:
    name = f"{length}-{document.name}"
    return {"id": name, "document": document.name, "length": length, **variant.names}


def _run(args: Arguments, work: Work, pairs: list[tuple[Document, int]], drawn: tuple[Document, int]) -> None:
    """Look at the documents that the folder lacks: a line for each document and setting. The first one is drawn."""
    plotted = importlib.util.find_spec("matplotlib") is not None
    with Progress(len(pairs), hidden=not work.told, unit="document") as bar:
        for document, length in pairs:
            missing = [one for one in args.variants if key(_names(document, length, one)) not in work.finished]
            ids = torch.from_numpy(document.tokens[None, : length - args.seq_len])
            canvases = denoise(work.model, ids, args.view(missing[0])) if missing else []
            lines = []
            for variant in missing:
                seen = look(work.model, canvases, args.view(variant))
                lines.append({**_names(document, length, variant), **shares(seen)})
                if plotted and (document, length) == drawn and variant == args.variants[0]:
                    with blame(args, "--out"):
                        save(heads_figure(seen), work.folder.path / "heads.png")
                        save(steps_figure(seen), work.folder.path / "steps.png")
            with blame(args, "--out", (OSError,)):
                work.folder.append(lines)
            bar.step()


if __name__ == "__main__":
    sys.exit(main())
