"""What a backend is: a way to compute attention over the kept key blocks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..blocks import BlockGrid, Pattern


class SparseAttention(Protocol):
    """Attention over kept blocks: q [B, Hq, n, D], the tokens from `start` on; k, v [B, Hkv, T, D] -> [B, Hq, n, D]."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, start: int = 0) -> Tensor: ...


@dataclass(frozen=True)
class Problem:
    """What decides which kernel can run: device, dtype and shapes, without the length."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    padded: bool


@dataclass(frozen=True)
class Backend:
    """A kernel of the sparse steps.

    Args:
        name: as --backend has it.
        build: makes a layer's attention of its pattern.
        fault: why it cannot run a problem, in a few words, or None if nothing speaks against it.
        auto_from: tokens from which on "auto" takes it; None: only when it is named.
    """

    name: str
    build: Callable[[Pattern], SparseAttention]
    fault: Callable[[Problem], str | None]
    auto_from: int | None = 0


class BackendError(ValueError):
    """The backend that the user named cannot run here."""


def from_block_start(q: Tensor, grid: BlockGrid, start: int) -> tuple[Tensor, slice, int]:
    """q [B, Hq, n, D], the tokens from `start` on, led by zeros from a block's start on; its blocks; how many zeros."""
    first, lead = divmod(start, grid.block_size)
    q = F.pad(q, (0, 0, lead, 0)) if lead else q
    return q, slice(first, first + -(-q.shape[2] // grid.block_size)), lead
