"""Settings that save rows and steps: cached keys per block, and steps that commit all tokens the model is sure of.

The names are those of Fast-dLLM and dInfer. Where these two differ, the meaning is given here.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ..config import SparseDConfig
from ..schedule import ByCommitted, ByStep, Schedule
from .canvas import Canvas
from .unmasking import Bound, Factor, SettingError, Threshold, Turn, even_shares, while_masked

Own = TypeVar("Own", bound="Saving")

CACHES = ("none", "prefix", "dual")
OFF: dict[str, Any] = {"cache": "none", "refresh": None, "threshold": None, "factor": None, "early_stop": False}
MAKE_BLOCKS = ("cache", "threshold", "factor")  # make blocks of Dream's region too; an early stop needs blocks
BLOCK_LENGTH = 32  # of Dream, if something makes blocks of its region and no length is given


@dataclass(frozen=True, kw_only=True)
class Saving:
    """The settings, which both families have.

    Args:
        cache: with "prefix" or "dual", a block's first step, its refresh, computes all rows and keeps every layer's
            keys and values. The block's later steps compute the rows from its start on (prefix) or only its own (dual),
            in Dream from one row earlier, and attend to all cached keys.
        refresh: with a cache, the refresh of every N-th block computes all rows (None: of every block; 0: only of the
            first). The others compute the rows from the generated region's start on.
        threshold: a step commits every candidate of its block with at least this probability, and at least the block's
            share of this step, one or more. Above 1, no candidate reaches it.
        factor: instead of threshold: of the candidates, sorted by probability p, the n-th is committed as long as
            (n + 1) * (1 - p) is below this.
        early_stop: after a block with an end token, the row's later blocks get that token. It needs blocks, and does
            not make any.

    Raises:
        SettingError: a value outside its range, or two settings that do not go together.
    """

    cache: str = "none"
    refresh: int | None = None
    threshold: float | None = None
    factor: float | None = None
    early_stop: bool = False

    def check_saving(self) -> None:
        """Raise SettingError unless the values are in range and go together."""
        if self.cache not in CACHES:
            raise SettingError("cache", f"must be one of {', '.join(CACHES)}, got {self.cache!r}")
        if self.refresh is not None:
            if isinstance(self.refresh, bool) or not isinstance(self.refresh, int) or self.refresh < 0:
                raise SettingError("refresh", f"must be a whole number of blocks or 0, got {self.refresh!r}")
            if not self.cached:
                raise SettingError("refresh", "needs a cache to refresh: prefix or dual")
        for name, lowest in (("threshold", "0 or above"), ("factor", "above 0")):
            value = getattr(self, name)
            if value is not None and (not _is_number(value) or value < 0 or (name == "factor" and value == 0)):
                raise SettingError(name, f"must be a number, {lowest}, got {value!r}")
        if self.threshold is not None and self.factor is not None:
            raise SettingError("factor", "not allowed with threshold: both say how many tokens a step commits")
        if not isinstance(self.early_stop, bool):
            raise SettingError("early_stop", f"must be True or False, got {self.early_stop!r}")

    def plain(self: Own) -> Own:
        """The same settings with all of this off."""
        return replace(self, **OFF)

    @property
    def given(self) -> dict[str, Any]:
        """What is on, by name."""
        return {name: getattr(self, name) for name, off in OFF.items() if getattr(self, name) != off}

    @property
    def cached(self) -> bool:
        """Whether steps inside a block compute only some rows."""
        return self.cache != "none"

    @property
    def bound(self) -> Bound | None:
        """The rule for what a step commits in addition to its share."""
        if self.threshold is not None:
            return Threshold(self.threshold)
        return None if self.factor is None else Factor(self.factor)

    def idle_in_blocks(self, steps: int, blocks: int, block_length: int, greedy: bool) -> list[bool]:
        """Which steps of a region in blocks commit nothing.

        At first every token of a block is masked, and each step commits at least one while any is left. A block that
        ends with its last mask has no such step.
        """
        if self.cached or self.bound is not None:
            return [False] * steps
        return [greedy and step % (steps // blocks) >= block_length for step in range(steps)]

    def block_turns(self, canvas: Canvas, idle: list[bool], block_length: int, ends: Collection[int]) -> Iterator[Turn]:
        """A turn for every step of a region in blocks."""
        ends = ends if self.early_stop else ()
        if self.cached or self.bound is not None:
            return while_masked(canvas, len(idle), block_length, self.bound, ends)
        return even_shares(canvas, idle, block_length, ends)

    def refreshes(self, blocks: int) -> int:
        """How many blocks begin with a forward of all rows."""
        return sum(map(self._refreshes_all, range(blocks)))

    def _refreshes_all(self, block: int) -> bool:
        """Whether a block's refresh computes all rows."""
        every = 1 if self.refresh is None else self.refresh
        return block == 0 or (every > 0 and block % every == 0)

    def window(self, turn: Turn, canvas: Canvas, shift: int) -> tuple[int, int] | None:
        """The rows that a step computes, [start, stop); None for all.

        Args:
            shift: how far left of a token the row lies that predicts it.
        """
        if not self.cached:
            return None
        if turn.opens is None:
            return turn.start - shift, turn.end if self.cache == "dual" else canvas.length
        if self._refreshes_all(turn.opens):
            return None
        return canvas.prompt_len - shift, canvas.length

    def schedule(self, config: SparseDConfig, steps: int, blocks: int | None, needs_scores: bool) -> Schedule:
        """When attention is over kept blocks. `skip` counts steps; with a cache, forwards of all rows, because only
        these select; with a threshold or factor, committed tokens, because the number of steps is not known.

        Args:
            steps: at most.
            blocks: of the generated region; None if it has none.
            needs_scores: whether the rule does; a rule without scores needs no full step.
        """
        if self.cached:
            steps = self.refreshes(blocks or 1)
        elif self.bound is not None:
            return ByCommitted(config.skip if needs_scores else 0.0)
        return ByStep.of(config, steps, needs_scores)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
