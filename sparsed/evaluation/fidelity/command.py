"""`python -m sparsed.evaluation.fidelity`: from the flags to the table."""

from collections.abc import Container
from dataclasses import dataclass

from ...backends import BackendError
from ...console.endings import blame
from ...console.workers import as_one
from ...ranks import Ranks
from ..folder import MEASURE, Folder
from ..methods import Variant
from ..running import Progress, report
from . import plots
from .arguments import Arguments, parse, sparse_at
from .documents import Document
from .gate import Gate
from .measuring import FULL, Asked, Meter, key
from .preparing import prepare
from .results import identified, summarize, table
from .windows import Window, planted, repeated, text_window

ADVICE = "try shorter --lengths, --dtype bfloat16, a device with more memory, or torchrun with --parallel tensor"


def main(argv: list[str] | None = None) -> int:
    """Measure with these words (None: the process's own); returns the exit code."""
    program = "python -m sparsed.evaluation.fidelity"
    return as_one(lambda ranks: measure(parse(argv), ranks), program, advice=ADVICE, ending=argv is None)


@dataclass(frozen=True)
class Piece:
    """A window, and the variants and rates that are measured on it."""

    window: Window
    asked: Asked

    @property
    def keys(self) -> list[tuple]:
        """The keys of the lines of results, in their order."""
        return [self._key(variant, rate) for variant, rates in self.asked.items() for rate in rates]

    def missing(self, finished: Container[tuple]) -> Asked:
        """The variants and rates that are not finished."""
        left = {v: [rate for rate in rates if self._key(v, rate) not in finished] for v, rates in self.asked.items()}
        return {variant: rates for variant, rates in left.items() if rates}

    def _key(self, variant: Variant, rate: float) -> tuple:
        return key({"id": self.window.id, "mask_rate": rate, **variant.names})


def measure(args: Arguments, ranks: Ranks) -> None:
    """Everything between the checked flags and the table, by all processes together."""
    work = prepare(args, ranks, {MEASURE: "fidelity", "block_length": args.block_length}, identified)
    pieces = [piece for length, found in work.documents.items() for piece in plan(args, found, length)]
    meter = Meter(work.model, args.backend, args.block_length)
    _run(args, meter, work.folder, work.team.own(pieces), work.finished, work.told)
    work.team.wait()
    if work.team.leads:
        report(args, work.folder, [name for piece in pieces for name in piece.keys], summarize, table, plots.draw)


def plan(args: Arguments, documents: list[Document], length: int) -> list[Piece]:
    """All measurements on documents of at least `length` tokens.

    On the text: every variant and the gate's window, at all rates. On planted and repeated passages: the gate's window
    and full attention, at the middle rate.
    """
    gate = Gate.of(args.configs, length, args.seq_len)
    asked = {
        variant: [rate for rate in args.mask_rates if sparse_at(variant, args.masked(rate))]
        for variant in dict.fromkeys((*args.variants, *([gate.window] if gate else [])))
    }
    middle = sorted(args.mask_rates)[len(args.mask_rates) // 2]
    pieces = []
    for document in documents:
        window = text_window(document, length, args.seq_len)
        pieces.append(Piece(window, asked))
        if gate is not None:
            far = planted(window, gate.far), repeated(document, length, args.seq_len, gate.far)
            blocks = args.block_length or args.seq_len
            judged = [found for found in far if found is not None and _measures(found, blocks, middle)]
            pieces += [Piece(found, {FULL: [middle], gate.window: [middle]}) for found in judged]
    return pieces


def _measures(window: Window, block_length: int, rate: float) -> bool:
    """Whether a token counts at this mask rate."""
    return any(len(block.measured(rate)) for block in window.in_blocks(block_length))


def _run(
    args: Arguments, meter: Meter, folder: Folder, pieces: list[Piece], finished: Container[tuple], told: bool
) -> None:
    """Measure what is not finished; every finished window adds its lines to the folder."""
    todo = [(piece.window, missing) for piece in pieces if (missing := piece.missing(finished))]
    with Progress(sum(meter.forwards(*one) for one in todo), hidden=not told, unit="forward") as bar:
        for number, (window, missing) in enumerate(todo, 1):
            bar.set_description(f"{len(window.tokens)} {window.kind} {number}/{len(todo)}", refresh=False)
            with blame(args, "--backend", (BackendError,)), blame(args, "--dtype", (FloatingPointError,)):
                lines = meter.measure(window, missing, bar.step)
            with blame(args, "--out", (OSError,)):
                folder.append(lines)
