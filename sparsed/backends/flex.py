"""`flex`: PyTorch's FlexAttention over the pattern's BlockMask, as in the paper; used only where it is named."""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..blocks import Pattern
from ..kernels import triton_fault
from .backend import Backend, Problem, SparseAttention, from_block_start


def flex_attention(pattern: Pattern) -> SparseAttention:
    """FlexAttention's Triton kernel over the kept blocks."""
    grid = pattern.grid
    # the queries that read every key are not the backend's, so no block is partial but for padding
    kept = replace(pattern, grid=replace(grid, dense_answer=False))
    # one layer's forwards have all queries, or those from one block on
    block_mask = functools.lru_cache(maxsize=2)(kept.block_mask)
    options = kernel_options(grid.block_size)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, first, lead = from_block_start(q, grid)
        shared = q.shape[1] != k.shape[1]
        out = _compiled()(q, k, v, block_mask=block_mask(first), enable_gqa=shared, kernel_options=options)
        return out[:, :, lead:]

    return attention


def kernel_options(block_size: int) -> dict[str, Any]:
    """The kernel is named, for the choice of another one by itself has dropped the blocks; its tiles divide a block."""
    tile = math.gcd(block_size, 128)
    # the tiles that FlexAttention takes by itself divide 128
    return {"BACKEND": "TRITON"} | ({} if tile == 128 else {"BLOCK_M": tile, "BLOCK_N": tile})


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """FlexAttention, imported and compiled when it is first used.

    Sizes are dynamic, so that what the self-check compiles serves every length. Uncompiled it would hold all scores at
    once: `fullgraph` has it fail instead.
    """
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True, dynamic=True)


def fault(problem: Problem) -> str | None:
    """Why it cannot run a problem, or None."""
    if problem.head_dim < 16:
        return f"needs heads of at least 16 numbers, not {problem.head_dim}"
    return triton_fault(problem.device)


FLEX = Backend("flex", flex_attention, fault, auto_from=None)
