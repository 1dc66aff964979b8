"""`flash`: FlashAttention-4."""

import torch
from torch import Tensor

from ..blocks import Pattern
from ..kernels import flash_block_sparse, flash_fault
from .backend import Backend, Problem, SparseAttention, from_block_start

# below this many tokens its host code, slow to load and to start, costs more than it gains
FLASH_FROM = 4096


def flash_attention(pattern: Pattern) -> SparseAttention:
    """FlashAttention-4, whose key blocks are 64 or 128 wide: larger ones are cut into 128s."""
    grid = pattern.grid
    piece = min(grid.block_size, 128)
    parts = torch.arange(grid.block_size // piece, dtype=torch.int32, device=pattern.indices.device)
    indices = (pattern.indices[..., None] * len(parts) + parts).flatten(3)
    counts = (indices * piece < grid.length).sum(-1, dtype=torch.int32)  # a ragged last block has fewer pieces

    def attention(q: Tensor, k: Tensor, v: Tensor, start: int = 0) -> Tensor:
        q, blocks, lead = from_block_start(q, grid, start)
        out = flash_block_sparse(q, k, v, counts[:, :, blocks], indices[:, :, blocks], (grid.block_size, piece))
        return out[:, :, lead:]

    return attention


def fault(problem: Problem) -> str | None:
    """Why it cannot run a problem, or None."""
    if problem.block_size != 64 and problem.block_size % 128:
        return f"needs block_size 64, 128 or a multiple of 128, not {problem.block_size}"
    if problem.padded:
        return "needs prompts without padding"
    return flash_fault(problem.device, problem.dtype)


FLASH = Backend("flash", flash_attention, fault, auto_from=FLASH_FROM)
