"""What `--show` draws of a run: a heading, and the answer with a block for every token that is still masked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..chat import REPLACEMENT

if TYPE_CHECKING:  # rich is optional
    from rich.console import Console
    from rich.text import Text

MASK, END = " ▒", " ∎"  # with a space, so that lines can break between many
# the least probability of each colour; of the terminal's own sixteen, which its theme keeps legible
BANDS, BELOW = {"green": 0.9, "yellow": 0.5}, "red"
NEW = "reverse"

DONE = "done"  # in a phase's place, after the last step

# text and its style
Part = tuple[str, str]


@dataclass(frozen=True)
class Token:
    """A committed token: its text, None for an end token, and the probability that the model gave it."""

    piece: str | None
    probability: float


@dataclass(frozen=True)
class View:
    """A moment of a run.

    Args:
        phase: what the step under way computes, DONE after the last.
        step, steps: the step under way or the last, counted from 1, and how many there are at most.
        seconds: that the steps before it took.
        tokens: of every position of the answer, None where it is masked.
        newest: the positions that were committed last.
    """

    title: str
    phase: str
    step: int
    steps: int
    seconds: float
    tokens: list[Token | None]
    newest: set[int]


def drawn(view: View, console: Console) -> Text:
    """The lines to show, no wider and no higher than the console: of a long answer, those around the newest tokens."""
    from rich.text import Text

    lines = Text.assemble(*_answer(view)).wrap(console, console.width)
    marked = [number for number, line in enumerate(lines) if any(NEW in str(span.style) for span in line.spans)]
    first, last = window(marked, len(lines), max(1, console.height - 2))  # the heading and the legend take two
    part = f"lines {first + 1} to {last} of {len(lines)}  " if last - first < len(lines) else ""
    coloured = console.color_system is not None and not console.no_color
    ends = [Text.assemble(*parts) for parts in (_heading(view), _legend(part, coloured))]
    shown = [ends[0], *lines[first:last], ends[1]][: console.height]
    for line in shown:
        line.truncate(console.width, overflow="ellipsis")
    return Text("\n", no_wrap=True).join(shown)


def window(marked: list[int], count: int, most: int) -> tuple[int, int]:
    """First and end of at most `most` lines out of `count`, with the middle one of the marked lines among them."""
    middle = marked[len(marked) // 2] if marked else 0
    first = max(0, min(middle - most // 2, count - most))
    return first, min(count, first + most)


def legible(piece: str) -> str:
    """A token's text without what a terminal would obey or not show; a line break does both."""

    def shown(character: str) -> str:
        if character.isprintable():
            return character
        if character == "\n":
            return "↵\n"
        return " " if character.isspace() else REPLACEMENT

    return "".join(map(shown, piece))


def _answer(view: View) -> list[Part]:
    parts = []
    for position, token in enumerate(view.tokens):
        piece, style = _appearance(token)
        word = piece.lstrip(" ")
        space = piece[: len(piece) - len(word)] if position else ""
        parts += [(space, style), (word, f"{style} {NEW}" if position in view.newest else style)]
    return parts


def _appearance(token: Token | None) -> Part:
    if token is None:
        return MASK, "dim"
    if token.piece is None:
        return END, "dim"
    return legible(token.piece), next((colour for colour, least in BANDS.items() if token.probability >= least), BELOW)


def _heading(view: View) -> list[Part]:
    masked = sum(token is None for token in view.tokens)
    most = "at most " if view.phase == DONE and view.step < view.steps else ""
    # where the terminal is narrow, the end is cut off
    rest = f"step {view.step} of {most}{view.steps}  {view.seconds:.1f} s  {masked} of {len(view.tokens)} masked"
    return [(view.title, "bold"), ("  ", ""), (view.phase, "bold cyan"), (f"  {rest}", "")]


def _legend(part: str, coloured: bool) -> list[Part]:
    parts = [(f"{part}{MASK.strip()} masked  {END.strip()} end", "dim")]
    if coloured:
        bands = [(f" from {least:.0%}", colour) for colour, least in BANDS.items()]
        parts += [("  probability", "dim"), *bands, (" below", BELOW)]
    return parts
