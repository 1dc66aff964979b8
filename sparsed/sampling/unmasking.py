"""Which of the masked tokens a denoising step commits: rules that give a turn for every step.

A rule is a generator, which looks at the canvas when its next turn is asked for: how many turns there will be need not
be known before.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .canvas import Canvas


@dataclass(frozen=True)
class Turn:
    """What one step may commit.

    Args:
        end: its candidates are the masked tokens before this position.
        counts: int64 [B], how many candidates of each batch row are committed, the highest ranking first.
        chance: instead of counts: the probability with which each candidate is committed, whatever its rank.
        idle: nothing would be committed, so no logits are needed.
    """

    end: int
    counts: Tensor | None = None
    chance: float = 0.0
    idle: bool = False

    def choose(self, shape: torch.Size, rows: Tensor, ranking: Tensor, generator: torch.Generator | None) -> Tensor:
        """Which of the candidates are committed, bool [n].

        Args:
            shape: (B, T) of the canvas.
            rows: [n] int64, their flat positions b * T + t, ascending.
            ranking: [n], higher commits first.
        """
        if self.counts is None:
            return torch.rand(len(rows), generator=generator, device=rows.device) < self.chance
        return most_confident(shape, rows, ranking, self.counts)


def most_confident(shape: torch.Size, rows: Tensor, confidence: Tensor, counts: Tensor) -> Tensor:
    """Which candidates are among their batch row's `counts` most confident, bool [n]; of equals the earlier wins.

    Args:
        shape: (B, T) of the canvas.
        rows: [n] int64, flat positions b * T + t of the candidates, ascending.
        confidence: [n].
        counts: [B] how many to take; of a row with fewer candidates, all.
    """
    batch, length = shape
    grid = torch.full((batch * length,), -torch.inf, dtype=confidence.dtype, device=confidence.device)
    grid[rows] = confidence
    order = grid.view(batch, length).sort(dim=-1, descending=True, stable=True).indices
    ranks = torch.empty_like(order).scatter_(-1, order, torch.arange(length, device=order.device).expand_as(order))
    return ranks.flatten()[rows] < counts[rows // length]


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


def even_shares(canvas: Canvas, idle: list[bool], block_length: int) -> Iterator[Turn]:
    """LLaDA's rule: the region is written block after block, a block's tokens in even shares over its steps.

    Args:
        idle: of each step of the generation, of which every block has as many.
    """
    each = steps_a_block(canvas.length - canvas.prompt_len, len(idle), block_length)
    for step, nothing in enumerate(idle):
        block, inner = divmod(step, each)
        end = canvas.prompt_len + (block + 1) * block_length
        if inner == 0:
            counts = commit_counts(canvas.masked(end - block_length, end), each)
        yield Turn(end, counts[:, inner], idle=nothing)


class BlocksError(ValueError):
    """Blocks that do not fill the region, or steps that cannot be shared out among them evenly.

    Args:
        line: the whole message.
        argument: which one a command line should change: "block_length" or "steps".
        must: what would be right for it.
    """

    def __init__(self, line: str, argument: str, must: str):
        super().__init__(line)
        self.argument, self.must = argument, must


def steps_a_block(gen_length: int, steps: int, block_length: int) -> int:
    """Steps of each block; raises BlocksError where they do not divide."""
    if gen_length % block_length:
        line = f"gen_length must be a multiple of block_length {block_length}, got {gen_length}"
        raise BlocksError(line, "block_length", f"must divide the {gen_length} new tokens, got {block_length}")
    blocks = gen_length // block_length
    if steps % blocks:
        line = f"steps must be a multiple of the number of blocks {blocks}, got {steps}"
        must = f"must be a multiple of the {blocks} blocks of {block_length} in {gen_length} new tokens, got {steps}"
        raise BlocksError(line, "steps", must)
    return steps // blocks


def commit_counts(masked: Tensor, steps: int) -> Tensor:
    """Spread `masked` [B] positions over the steps as evenly as whole numbers go, more in the first: [B, steps]."""
    index = torch.arange(steps, device=masked.device)
    return masked[:, None] // steps + (index < masked[:, None] % steps)
