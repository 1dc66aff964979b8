"""Watching a rule select: the share of the attention that the kept blocks hold, and a picture of them."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .blocks import BlockGrid, Pattern, head_chunks
from .selection import SPARSED, Rule, highest


def watched(see: Callable[[Tensor, Pattern], None], rule: Rule = SPARSED) -> Rule:
    """The same rule, which shows `see` the block scores [B, Hq, nQ, nK] and its choice, for every layer in turn."""

    def shown(q: Tensor, score: Callable[[], Tensor], grid: BlockGrid, select: float) -> Pattern:
        scores = score()
        pattern = rule.select(q, lambda: scores, grid, select)
        see(scores, pattern)
        return pattern

    return replace(rule, select=shown)


def recall(scores: Tensor, pattern: Pattern) -> Tensor:
    """Share of the attention that goes to keys which are read, mean over heads and real queries: float32 [B].

    Where `dense_answer` has only some of a block's queries read everything, the others are taken to find as much in the
    kept blocks as the block's queries do together.

    Args:
        scores: [B, Hq, nQ, nK] block scores, which add up to 1 for every real query.
    """
    batch, heads = scores.shape[:2]
    # non_blocking, here and below: watching a choice waits for nothing
    tokens, dense = (
        found.to(scores.device, non_blocking=True).float()
        for found in (pattern.grid.block_tokens, pattern.grid.dense_tokens)
    )
    dense_share = (dense / tokens.clamp_min(1))[:, None]  # [B or 1, 1, nQ]: of a block's queries
    held = scores.new_zeros(batch)
    for part in head_chunks(heads, scores[:, 0].numel()):
        kept = (scores[:, part] * pattern.part(batch, part).as_mask()).sum(-1)
        held += kept.lerp(scores[:, part].sum(-1), dense_share).sum((1, 2))
    return held / scores.sum((1, 2, 3))


def pooled(pattern: Pattern, most: int) -> Tensor:
    """The first batch row's kept blocks on a square of at most `most` cells a side, bool [Hq, side, side].

    Cell (r, c) stands for query blocks r * n // side to (r + 1) * n // side - 1 of the n blocks, and key blocks
    likewise. In every row those cells are on that hold the largest share of kept blocks, as many as the density asks
    for, at least one; of equals the earlier ones. With `most` blocks or fewer it is the pattern itself. Rows of cells
    with a query that reads every key are on throughout.
    """
    n_blocks, device = pattern.grid.n_blocks, pattern.indices.device
    side = min(n_blocks, most)
    borders = torch.arange(side + 1, device=device) * n_blocks // side
    block = torch.arange(n_blocks, device=device)
    members = ((borders[:-1, None] <= block) & (block < borders[1:, None])).float()  # [side, nQ]
    sums = [
        members @ pattern.part(1, part).as_mask()[0].float() @ members.T
        for part in head_chunks(pattern.indices.shape[1], n_blocks**2)
    ]
    sizes = members.sum(-1)
    cells = (2 * side * pattern.counts[0] + n_blocks) // (2 * n_blocks)  # rounded
    on = highest(torch.cat(sums) / (sizes[:, None] * sizes), max(1, cells))
    dense = pattern.grid.dense_tokens[0].to(device, non_blocking=True).float()
    return on | (members @ dense > 0)[:, None]
