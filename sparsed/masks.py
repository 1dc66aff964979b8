"""What an attention mask says of the keys, in whatever form a model gives it."""

from typing import Any

import torch
from torch import Tensor

# an additive mask at or below this hides a key: libraries use -1e4, -1e9, the dtype's lowest number or -inf
NEVER = -1e4


def only_pads(mask: Any, k: Tensor) -> bool:
    """Whether a mask, in any of the forms of `valid_keys`, cannot tell one query from another."""
    if mask is None or isinstance(mask, str):
        return True
    return mask.dtype == torch.bool and mask.shape == (k.shape[0], k.shape[2])


def valid_keys(mask: Any, k: Tensor) -> Tensor | None:
    """Which keys [B, T] an attention mask lets any query attend to; None if all of them.

    Where a row may attend to nothing, its outputs mean nothing: it is taken to attend to all, so that they are finite.

    Args:
        mask: None or a string such as "full" (no mask); bool or integer (nonzero = attend) or additive float
            (-1e4 and below = never attend), broadcastable to [B, H, T, T] or of shape [B, T].
        k: [B, Hkv, T, D].
    """
    if mask is None or isinstance(mask, str):
        return None
    batch, length = k.shape[0], k.shape[2]
    allowed = mask > NEVER if mask.is_floating_point() else mask.bool()
    if allowed.shape != (batch, length):
        while allowed.ndim < 4:
            allowed = allowed[None]
        allowed = allowed.any(dim=2).any(dim=1).expand(batch, length)
    allowed = allowed | ~allowed.any(-1, keepdim=True)
    return None if allowed.all() else allowed.to(k.device)
