"""The elementwise parts of a transformer layer, in plain torch and, on a GPU with Triton, as one kernel each.

Both round to the model's dtype at the same places, those of the published models.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .availability import elementwise_triton, usable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of x [..., width] in float32, cast back to its dtype BEFORE the weight, as published."""
    if x.dtype == weight.dtype and usable(x, weight):
        return elementwise_triton.rms_norm(x, weight, eps)
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + update [..., width], rounded to their dtype, and its `rms_norm`."""
    if x.dtype == update.dtype == weight.dtype and usable(x, update, weight):
        return elementwise_triton.add_rms_norm(x, update, weight, eps)
    total = x + update
    return total, rms_norm(total, weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads by position, half-split, in the tables' dtype (float32: LLaDA; the model's own: Dream).

    Args:
        x: [B, H, T, D].
        cos, sin: [B or 1, 1, T, D], each row's block [T, D] contiguous, both halves of D equal.

    Returns:
        [B, H, T, D] in the dtype of x.
    """
    if usable(x):
        return elementwise_triton.rotate(x, cos, sin)
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def store_rotated(k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Write `rotate`d k, and v, to their slots in `keys` and `values`.

    Args:
        k, v: [B, H, n, D].
        cos, sin: as `rotate` takes them.
        slots: int64 [n].
        keys, values: [B, H, T, D], in the dtype of k.
    """
    if usable(k, v):
        elementwise_triton.store_rotated(k, v, cos, sin, slots, keys, values)
        return
    keys.index_copy_(2, slots, rotate(k, cos, sin))
    values.index_copy_(2, slots, v)


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape, silu and product each rounded to their dtype."""
    if usable(gate, up):
        return elementwise_triton.silu_product(gate, up)
    return F.silu(gate) * up
