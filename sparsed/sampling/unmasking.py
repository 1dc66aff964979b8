"""Which of the masked tokens a denoising step commits: rules that give a turn for every step.

A rule is a generator that looks at the canvas when its next turn is asked for. So the number of turns need not be known
beforehand.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .canvas import Canvas
from .proposals import Proposal


class Bound(Protocol):
    """Which candidates are sure enough to be committed, however many."""

    def reached(self, shape: torch.Size, rows: Tensor, certainty: Tensor) -> Tensor:
        """bool [n].

        Args:
            shape: (B, T) of the canvas.
            rows: [n] int64, the candidates' flat positions b * T + t, ascending.
            certainty: float32 [n], their probabilities.
        """


@dataclass(frozen=True)
class Threshold:
    """Candidates with at least this probability."""

    probability: float

    def reached(self, shape: torch.Size, rows: Tensor, certainty: Tensor) -> Tensor:
        return certainty >= self.probability


@dataclass(frozen=True)
class Factor:
    """The likeliest candidates of a row, as long as (rank + 1) * (1 - probability) is below this."""

    factor: float

    def reached(self, shape: torch.Size, rows: Tensor, certainty: Tensor) -> Tensor:
        order, ranks = _ranked(shape, rows, certainty)
        sure = (ranks + 2) * (1 - _gridded(shape, rows, certainty)) < self.factor  # the n-th has rank n - 1
        without_gap = sure.gather(-1, order).cumprod(-1).bool()  # the first that is not ends them
        return without_gap.gather(-1, ranks).flatten()[rows]


@dataclass(frozen=True)
class Turn:
    """What one step may commit.

    Args:
        end: its candidates are the masked tokens before this position.
        counts: int64 [B], how many candidates of each batch row are committed, the highest ranking first.
        chance: instead of counts: the probability with which each candidate is committed, whatever its rank.
        idle: nothing would be committed, so no logits are needed.
        start: its candidates are those from this position on.
        opens: the number of the block that begins with this step; None inside a block, or if there are none.
        bound: with counts: commits all that are sure enough, and more only up to the counts.
        ends: end tokens; in the rows where its block is then complete or over and holds one, the later blocks get it.
        over: this is the block's last step, whatever is still masked.
        rows: the candidates, as `Canvas.candidates` gives them, if the rule has looked at them: looking waits for the
            device.
    """

    end: int
    counts: Tensor | None = None
    chance: float = 0.0
    idle: bool = False
    start: int = 0
    opens: int | None = None
    bound: Bound | None = None
    ends: Collection[int] = ()
    over: bool = False
    rows: Tensor | None = None

    def choose(self, shape: torch.Size, rows: Tensor, proposal: Proposal, generator: torch.Generator | None) -> Tensor:
        """Which of the candidates are committed, bool [n].

        Args:
            shape: (B, T) of the canvas.
            rows: [n] int64, their flat positions b * T + t, ascending.
        """
        if self.counts is None:
            return torch.rand(len(rows), generator=generator, device=rows.device) < self.chance
        # ranked among the turn's own positions, which may be far fewer
        width = self.end - self.start
        rows = rows - self.start - rows // shape[1] * (shape[1] - width)
        shape = torch.Size((shape[0], width))
        if self.bound is None:
            return most_confident(shape, rows, proposal.ranking, self.counts)
        assert proposal.certainty is not None  # a bound asks for it
        reached = self.bound.reached(shape, rows, proposal.certainty)
        sure = torch.zeros_like(self.counts).index_add_(0, rows // shape[1], reached.long())
        first = proposal.ranking.masked_fill(reached, torch.inf)
        return most_confident(shape, rows, first, torch.maximum(self.counts, sure))


def most_confident(shape: torch.Size, rows: Tensor, confidence: Tensor, counts: Tensor) -> Tensor:
    """Which candidates are among their batch row's `counts` most confident, bool [n]; of equals the earlier wins.

    Args:
        shape: (B, T) of the canvas.
        rows: [n] int64, flat positions b * T + t of the candidates, ascending.
        confidence: [n].
        counts: [B] how many to take; from a row with fewer candidates, all.
    """
    # a ranking of -inf is still above what is no candidate
    _, ranks = _ranked(shape, rows, confidence.clamp_min(torch.finfo(confidence.dtype).min))
    return ranks.flatten()[rows] < counts[rows // shape[1]]


def _gridded(shape: torch.Size, rows: Tensor, values: Tensor) -> Tensor:
    """[B, T]: values [n] at the flat positions `rows` [n], -inf elsewhere."""
    grid = torch.full((shape.numel(),), -torch.inf, dtype=values.dtype, device=values.device)
    grid[rows] = values
    return grid.view(shape)


def _ranked(shape: torch.Size, rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Positions [B, T] from the highest value down, of equals the earlier first, and every position's rank [B, T]."""
    order = _gridded(shape, rows, values).sort(dim=-1, descending=True, stable=True).indices
    ranks = torch.empty_like(order)
    return order, ranks.scatter_(-1, order, torch.arange(shape[1], device=order.device).expand_as(order))


def time_grid(canvas: Canvas, fractions: Tensor, idle: list[bool], *, by_chance: bool) -> Iterator[Turn]:
    """Dream's rule: a step commits a fraction of what is still masked, or each masked token with that probability.

    Args:
        fractions: [steps], of `commit_fractions`.
        idle: of each step.
    """
    for fraction, nothing in zip(fractions.tolist(), idle, strict=True):
        if by_chance:
            yield Turn(canvas.length, chance=fraction)
        else:
            counts = (canvas.masked(0, canvas.length).float() * fraction).long()
            yield Turn(canvas.length, counts, idle=nothing)


def commit_fractions(steps: int, eps: float) -> Tensor:
    """Share of the still masked positions that each step commits, float32 [steps], 1 at the last step."""
    times = torch.linspace(1, eps, steps + 1)
    fractions = 1 - times[1:] / times[:-1]
    fractions[-1] = 1
    return fractions


def idle_steps(masks: int, fractions: Tensor) -> int:
    """How many steps at the start commit none of `masks` positions."""
    counts = (torch.tensor(float(masks)) * fractions).long()
    return int((counts.cumsum(0) == 0).sum())


def even_shares(canvas: Canvas, idle: list[bool], block_length: int, ends: Collection[int] = ()) -> Iterator[Turn]:
    """LLaDA's rule: the region is written block after block, a block's tokens in even shares over its steps.

    Args:
        idle: of each step of the generation; every block has the same number of steps.
        ends: as in `Turn`; no turn is left once all rows have stopped.
    """
    each = steps_per_block(canvas.length - canvas.prompt_len, len(idle), block_length)
    for step, nothing in enumerate(idle):
        block, inner = divmod(step, each)
        start = canvas.prompt_len + block * block_length
        end = start + block_length
        if inner == 0:
            counts = commit_counts(canvas.masked(start, end), each)
            if ends and not counts.any():
                return
        over = inner == each - 1 or idle[step + 1]  # steps that commit nothing are a block's last
        yield Turn(end, counts[:, inner], idle=nothing, start=start if ends else 0, ends=ends, over=over)


def while_masked(
    canvas: Canvas, steps: int, block_length: int, bound: Bound | None, ends: Collection[int]
) -> Iterator[Turn]:
    """`even_shares` of blocks that end once nothing in them is masked; only the block's own masks are candidates.

    Args:
        steps: at most; every block has the same number.
        ends: as in `Turn`.
    """
    each = steps_per_block(canvas.length - canvas.prompt_len, steps, block_length)
    for block, start in enumerate(range(canvas.prompt_len, canvas.length, block_length)):
        end = start + block_length
        masked = canvas.masked(start, end)
        counts = commit_counts(masked, each)
        # how many are surely masked before each step: without a bound, the shares are the most that is committed
        left = [0] * each if bound else (masked[:, None] - counts.cumsum(1) + counts).sum(0).tolist()
        for inner in range(each):
            rows = None if left[inner] else canvas.candidates(start, end)
            if rows is not None and not len(rows):
                break
            share = counts[:, inner] if bound is None else counts[:, inner].clamp_min(1)
            opens, over = None if inner else block, inner == each - 1
            yield Turn(end, share, start=start, opens=opens, bound=bound, ends=ends, over=over, rows=rows)


class SettingError(ValueError):
    """A sampler's setting is wrong, or does not go with others.

    Args:
        argument: its name.
        must: what would be right for it, to be read after the name.
        line: the whole message, if it is not just these two.
    """

    def __init__(self, argument: str, must: str, line: str = ""):
        super().__init__(line or f"{argument} {must}")
        self.argument, self.must = argument, must


def steps_per_block(gen_length: int, steps: int, block_length: int) -> int:
    """Steps per block; raises SettingError if the numbers do not divide."""
    if gen_length % block_length:
        line = f"gen_length must be a multiple of block_length {block_length}, got {gen_length}"
        raise SettingError("block_length", f"must divide the {gen_length} new tokens, got {block_length}", line)
    blocks = gen_length // block_length
    if steps % blocks:
        line = f"steps must be a multiple of the number of blocks {blocks}, got {steps}"
        must = f"must be a multiple of the {blocks} blocks of {block_length} in {gen_length} new tokens, got {steps}"
        raise SettingError("steps", must, line)
    return steps // blocks


def commit_counts(masked: Tensor, steps: int) -> Tensor:
    """Spread `masked` [B] positions over the steps as evenly as whole numbers go, more in the first: [B, steps]."""
    index = torch.arange(steps, device=masked.device)
    return masked[:, None] // steps + (index < masked[:, None] % steps)
