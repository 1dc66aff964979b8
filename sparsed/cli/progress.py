"""How far a run is, on stderr while it runs: a bar that names the phase, or with `--show` the answer itself."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from tqdm import tqdm

from ..chat import Speller
from ..console.endings import unbroken
from ..report.view import DONE, Token, View, drawn
from ..sampling.common import Step

if TYPE_CHECKING:  # rich is optional
    from rich.console import Console
    from rich.live import Live

# called before each forward and after the last step: what is computed, or DONE; the steps that are over, their seconds
Show = Callable[[str, list[Step], float], None]

# seconds between two drawings: at least PAUSE, and REST times what a drawing took, so that watching costs below 1/25
PAUSE, REST = 0.1, 24


@contextlib.contextmanager
def bar(steps: int, label: str, quiet: bool) -> Iterator[Show]:
    """A progress bar; silent if quiet, or where stderr is no terminal."""
    with tqdm(total=steps, unit="step", leave=False, disable=True if quiet else None) as shown:

        def show(phase: str, done: list[Step], seconds: float) -> None:
            shown.update(len(done) - shown.n)
            shown.set_description(label + phase)

        yield show


@contextlib.contextmanager
def screen(console: Console, title: str, steps: int, answer: Answer) -> Iterator[Show]:
    """The answer as it appears; its last state stays on the terminal."""
    from rich.live import Live

    # without its own thread, which would take time from the run
    live = Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
    with unbroken():
        live.start()
        console.show_cursor()  # nothing would bring it back after a signal
    shown = Screen(live, title, steps, answer)
    try:
        yield shown.show
    finally:
        with unbroken():
            live.stop()


def terminal() -> Console | None:
    """The terminal that stderr is; None if it is none, or cannot move the cursor or show the blocks."""
    from rich.console import Console

    console = Console(stderr=True)
    able = console.is_interactive and not console.options.ascii_only
    # rich believes FORCE_COLOR, even of a file
    return console if able and sys.stderr is not None and sys.stderr.isatty() else None


class Answer:
    """What is committed so far.

    Args:
        length: tokens of the answer.
        prompt_tokens: tokens before it.
        mask_id: the mask token, which a model may draw: the position then stays masked.
        stops: the end tokens.
    """

    def __init__(self, length: int, prompt_tokens: int, mask_id: int, stops: set[int], speller: Speller):
        self._length, self._prompt_tokens, self._mask_id = length, prompt_tokens, mask_id
        self._stops, self._speller = stops, speller
        self._committed: dict[int, tuple[int, float]] = {}
        self._told = 0
        self.newest: set[int] = set()

    def follow(self, done: list[Step]) -> None:
        """Take in the finished steps that are new; waits for the device."""
        new = {
            flat - self._prompt_tokens: (token, probability)
            for step in done[self._told :]
            for flat, token, probability in step.commits()
            if token != self._mask_id
        }
        self._told = len(done)
        self._committed |= new
        self.newest = set(new) or self.newest

    def tokens(self) -> list[Token | None]:
        """The text of every position, None where it is masked; committed neighbours are decoded together."""
        tokens: list[Token | None] = [None] * self._length
        for committed, group in groupby(range(self._length), self._committed.__contains__):
            positions = list(group) if committed else []
            pieces = self._speller.pieces([self._committed[position][0] for position in positions])
            for position, piece in zip(positions, pieces, strict=True):
                token, probability = self._committed[position]
                tokens[position] = Token(None if token in self._stops else piece, probability)
        return tokens


class Screen:
    """Draws a run on a terminal: not too often, but always when the phase changes, and at the end."""

    def __init__(self, live: Live, title: str, steps: int, answer: Answer):
        self._live, self._title, self._steps, self._answer = live, title, steps, answer
        self._phase, self._due = "", -math.inf

    def show(self, phase: str, done: list[Step], seconds: float) -> None:
        """Draw, if it is time to."""
        began = time.perf_counter()
        if began < self._due and phase == self._phase:
            return
        self._answer.follow(done)
        step = len(done) if phase == DONE else len(done) + 1
        tokens, newest = self._answer.tokens(), self._answer.newest
        view = View(self._title, phase, step, self._steps, seconds, tokens, newest)
        with unbroken():
            self._live.update(drawn(view, self._live.console), refresh=True)
        ended = time.perf_counter()
        self._phase, self._due = phase, ended + max(PAUSE, REST * (ended - began))
