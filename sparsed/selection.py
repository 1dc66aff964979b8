"""Which key blocks each query block keeps: block scores, then isolated top-k (arXiv 2509.24014, section 4).

The prompt and the generated region each have their own budget, because the generated region is small and would
otherwise win or lose as a whole.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import BlockGrid, Pattern, head_chunks, true_places
from .kernels import block_scores, highest_places_triton, usable


def isolated_top_k(scores: Tensor, grid: BlockGrid, select: float) -> Pattern:
    """Keep each part's highest-scoring key blocks for every query block; of equal scores the earlier block wins.

    Args:
        scores: [B, Hq, nQ, nK] block scores.
    """
    return top_k(scores, grid, grid.parts, grid.budgets(select))


def top_k(scores: Tensor, grid: BlockGrid, parts: tuple[slice, ...], budgets: list[tuple[int, ...]]) -> Pattern:
    """Keep the highest-scoring key blocks of each of these parts; else as `isolated_top_k`.

    Args:
        parts: of the key blocks, one or two, next to each other.
        budgets: how many of each part for each batch row; one row stands for all.
    """
    if len(budgets) == 1:
        budgets = budgets * len(scores)
    if grid.key_valid is not None:
        empty = (grid.block_tokens == 0)[:, None, None, :]
        scores = scores.masked_fill(empty, -1.0)
    counts = tuple(map(sum, budgets))
    indices = scores.new_empty(*scores.shape[:3], max(counts), dtype=torch.int32)
    for row, budget, kept in zip(scores, budgets, indices, strict=True):
        highest_places(row, parts, budget, kept)
    return Pattern(indices, counts, grid)


def highest_places(scores: Tensor, parts: tuple[slice, ...], keep: tuple[int, ...], places: Tensor) -> None:
    """Write where each part's highest scores lie, ascending, then the last place again up to the width of `places`.

    Of equal scores the earlier one is higher; what is not a number is the lowest.

    Args:
        scores: [H, nQ, nK] float32.
        parts: of the last dimension, one or two, next to each other.
        keep: how many of each part.
        places: int32 [H, nQ, width], width at least the sum of `keep`.
    """
    if usable(scores):
        highest_places_triton(scores, parts, keep, places)
    else:
        highest_places_torch(scores, parts, keep, places)


def highest_places_torch(scores: Tensor, parts: tuple[slice, ...], keep: tuple[int, ...], places: Tensor) -> None:
    """`highest_places` in plain torch, on any device."""
    count = sum(keep)
    for heads in head_chunks(len(scores), scores[0].numel()):
        chosen = [highest(scores[heads, :, part], most) for part, most in zip(parts, keep, strict=True)]
        places[heads, :, :count] = true_places(torch.cat(chosen, dim=-1), count)
    places[..., count:] = places[..., count - 1 : count]


def highest(scores: Tensor, keep: int) -> Tensor:
    """Which of the last dimension's scores are its `keep` highest, bool; of equals the earlier ones, NaN last."""
    if keep == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    # not by sorting, which takes longer than all else in the selection
    lowest = scores.topk(keep, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, level = scores > lowest, scores == lowest
    room = keep - above.sum(-1, keepdim=True)
    return above | (level & (level.cumsum(-1) <= room))


@dataclass(frozen=True)
class Rule:
    """How a layer's key blocks are selected.

    Args:
        select: (q [B, Hq, T, D], score, grid, select) -> Pattern; score() gives the block scores [B, Hq, nQ, nK].
        needs_scores: False if the choice reads none: it then needs no full attention first, and holds from step 0 on.
    """

    select: Callable[[Tensor, Callable[[], Tensor], BlockGrid, float], Pattern]
    needs_scores: bool = True


SPARSED = Rule(lambda q, score, grid, select: isolated_top_k(score(), grid, select))


def compile_selection(q: Tensor, k: Tensor, grid: BlockGrid, lse: Tensor | None) -> None:
    """Choose from a single block, so that the real choice finds its kernels compiled for these dtypes and sizes."""
    piece = slice(0, grid.block_size)
    valid = None if grid.key_valid is None else grid.key_valid[:, piece]
    lse = None if lse is None else lse[:, :, piece]
    q, k = q[:, :, piece], k[:, :, piece]
    scores = block_scores(q, k, block_size=grid.block_size, key_valid=valid, lse=lse)
    isolated_top_k(scores, BlockGrid(q.shape[2], 0, grid.block_size), select=1)


def select_blocks(
    q: Tensor,
    k: Tensor,
    *,
    prompt_len: int,
    block_size: int,
    select: float,
    key_valid: Tensor | None = None,
    dense_answer: bool = False,
) -> Tensor:
    """The key blocks that SparseD keeps for each query block (arXiv 2509.24014, section 4).

    Args:
        q: [B, Hq, T, D] queries after rotary embedding, float32, bfloat16 or float16.
        k: [B, Hkv, T, D] keys, Hkv dividing Hq: query head h reads key head h // (Hq // Hkv).
        prompt_len: tokens before the generated region, 0 to T.
        block_size: tokens per block; the last block may be shorter.
        select: share of each part's blocks to keep, above 0, at most 1.
        key_valid: bool [B, T], False where a token is padding.
        dense_answer: the queries from token `prompt_len` - 1 on read every key: every block that holds such a query
            has all blocks with a real token, those of its prompt's queries included.

    Returns:
        bool [B, Hq, nQ, nK], nQ = nK = ceil(T / block_size).

    Raises:
        ValueError: shapes that do not fit each other, or a number outside its range.
    """
    _check_selection(q, k, prompt_len, block_size, select, key_valid, dense_answer)
    scores = block_scores(q, k, block_size=block_size, key_valid=key_valid)
    grid = BlockGrid(q.shape[2], prompt_len, block_size, key_valid, dense_answer)
    return isolated_top_k(scores, grid, select).read_mask()


def _check_selection(q, k, prompt_len, block_size, select, key_valid, dense_answer) -> None:
    if (
        q.ndim != 4
        or k.ndim != 4
        or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:])
        or not q.numel()
        or not k.numel()
        or q.shape[1] % k.shape[1]
    ):
        shapes = f"{tuple(q.shape)} and {tuple(k.shape)}"
        raise ValueError(f"q [B, Hq, T, D] and k [B, Hkv, T, D] are empty or do not fit each other: {shapes}")
    if not isinstance(prompt_len, int) or not 0 <= prompt_len <= q.shape[2]:
        raise ValueError(f"prompt_len must be between 0 and the sequence's {q.shape[2]} tokens, got {prompt_len}")
    if not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size must be positive, got {block_size}")
    if not 0 < select <= 1:
        raise ValueError(f"select must be above 0 and at most 1, got {select}")
    if not isinstance(dense_answer, bool):
        raise ValueError(f"dense_answer must be True or False, got {dense_answer!r}")
    if key_valid is not None and (key_valid.dtype != torch.bool or key_valid.shape != (q.shape[0], q.shape[2])):
        raise ValueError(f"key_valid must be bool [B, T] = {[q.shape[0], q.shape[2]]}, got {list(key_valid.shape)}")
    if key_valid is not None and not key_valid.any(-1).all():
        raise ValueError("key_valid must have a real token in every row")
