"""Which entries of every row are its highest."""

import torch
from torch import Tensor

from ..blocks import head_chunks, true_places
from .compiled import highest_places_triton, usable


def highest_places(scores: Tensor, parts: tuple[slice, ...], keep: tuple[int, ...], places: Tensor) -> None:
    """Write where each part's highest scores lie, ascending, then the last place again up to the width of `places`.

    Of equal scores the earlier one is higher.

    Args:
        scores: [H, nQ, nK] float32, finite.
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
    """Which of the last dimension's scores are its `keep` highest, bool; of equals the earlier ones."""
    if keep == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # not by sorting, which takes longer than all else in the selection
    lowest = scores.topk(keep, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, level = scores > lowest, scores == lowest
    room = keep - above.sum(-1, keepdim=True)
    return above | (level & (level.cumsum(-1) <= room))
