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

    Raises:
        ValueError: the mask weighs keys, or hides from one query or head what it shows to another.
    """
    if mask is None or isinstance(mask, str):
        return None
    batch, length = k.shape[0], k.shape[2]
    allowed = mask > NEVER if mask.is_floating_point() else mask.bool()
    if mask.is_floating_point() and (allowed & (mask != 0)).any():
        raise ValueError("sparsify: the attention mask weighs keys (ALiBi?); only one that hides padding is computed")
    if allowed.shape != (batch, length):
        while allowed.ndim < 4:
            allowed = allowed[None]
        shown = allowed.any(dim=2).any(dim=1)  # [B or 1, T or 1]
        _check_alike(allowed, shown)
        allowed = shown.expand(batch, length)
    allowed = allowed | ~allowed.any(-1, keepdim=True)
    return None if allowed.all() else allowed.to(k.device)


def _check_alike(allowed: Tensor, shown: Tensor) -> None:
    """Raise ValueError unless every query of `allowed` [B, H, T, T] that sees a key sees all that are shown to any."""
    # each query sees a part of what is shown, so it sees all of it if it sees as many: no further T x T tensor
    seen, all_of_them = allowed.sum(-1), shown.sum(-1)[:, None, None]
    if ((seen != 0) & (seen != all_of_them)).any():
        raise ValueError(
            "sparsify: the attention mask differs from query to query (block-causal, packed, causal or sliding); only "
            "one that hides padding is computed"
        )


def check_left_padded(valid: Tensor) -> None:
    """Raise ValueError if a row of valid [B, T], nonzero = real, ends with padding: its answer is not the last then."""
    if ((valid[:, -1] == 0) & (valid != 0).any(-1)).any():
        raise ValueError(
            "sparsify: a row is padded on the right, so that its answer does not end where the sequence does: pad on "
            "the left, or generate for prompts of one length at a time"
        )


def same_tensor(one: Any, other: Any) -> bool:
    """Whether two masks are one, or the same view of one."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return one is other
    return one is other or (
        (one.data_ptr(), one.dtype, one.shape, one.stride())
        == (other.data_ptr(), other.dtype, other.shape, other.stride())
    )
