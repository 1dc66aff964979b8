"""Which tokens of a sequence a forward computes."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """The tokens `start` ... `stop` - 1 of sequences of `length` tokens, in all layers.

    The tensors are what kernels read, so that a CUDA graph of one window with full attention serves every other one of
    its size.

    Args:
        start, stop, length: on the host, for checks and shapes.
        slots: int64 [n], the tokens' places in the sequence and in a cache.
        positions: int64 [B or 1, n], by which they are rotated.
    """

    start: int
    stop: int
    length: int
    slots: Tensor
    positions: Tensor

    @staticmethod
    def of(start: int, stop: int, positions: Tensor) -> "Rows":
        """A window of sequences whose tokens are rotated by `positions`, int64 [B or 1, T].

        Raises:
            ValueError: the window is empty or reaches past the sequence.
        """
        length = positions.shape[1]
        if not 0 <= start < stop <= length:
            raise ValueError(f"rows must be some of the sequence's {length}, got {start} to {stop}")
        return Rows(start, stop, length, torch.arange(start, stop, device=positions.device), positions[:, start:stop])

    @property
    def whole(self) -> bool:
        """Whether they are all of the sequence."""
        return self.stop - self.start == self.length
