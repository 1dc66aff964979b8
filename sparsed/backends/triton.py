"""`triton`: this package's own kernel, on CUDA GPUs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..blocks import Pattern, head_chunks, true_places
from ..kernels import block_sparse_attention, triton_fault
from .backend import Backend, SparseAttention

# query rows of a tile of the kernel that several small blocks share
SHARED_TILE = 64


def triton_attention(pattern: Pattern) -> SparseAttention:
    """The package's Triton kernel; query blocks below its tile are taken together, on the union of what they keep."""
    grid = pattern.grid
    group = SHARED_TILE // grid.block_size if SHARED_TILE % grid.block_size == 0 else 1
    lists, counts = united_lists(pattern, group)

    def attention(q: Tensor, k: Tensor, v: Tensor, start: int = 0) -> Tensor:
        return block_sparse_attention(
            q, k, v, lists, counts, start=start, block_size=grid.block_size, group=group, key_valid=grid.key_valid
        )

    return attention


def united_lists(pattern: Pattern, group: int) -> tuple[Tensor, Tensor]:
    """The key blocks that any of each `group` query blocks in a row keeps, ascending.

    Returns:
        int32 [B, Hq, ceil(nQ / group), width], entries as `block_sparse_attention` takes them; how many of each count.
    """
    if group == 1:
        counts = torch.zeros(pattern.indices.shape[:3], dtype=torch.int32, device=pattern.indices.device)
        for rows, count in zip(counts.chunk(len(pattern.counts)), pattern.counts, strict=True):
            rows.fill_(count)  # a copy of the tuple would wait for the GPU
        return pattern.indices, counts
    batch, heads, n_blocks, kept = pattern.indices.shape
    width = min(pattern.grid.n_blocks, group * kept)
    chunks = head_chunks(heads, batch * n_blocks * pattern.grid.n_blocks)
    parts = [_united(pattern.part(batch, chunk).as_mask(), group, width) for chunk in chunks]
    lists, counts = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return lists, counts


def _united(kept: Tensor, group: int, width: int) -> tuple[Tensor, Tensor]:
    """`united_lists` of the kept blocks, bool [B, H, nQ, nK], with lists of that width."""
    runs = F.pad(kept, (0, 0, 0, -kept.shape[2] % group)).unflatten(2, (-1, group))
    bits = sum(runs[:, :, :, member].int() << member for member in range(group))  # [B, H, nL, nK]
    wanted = bits != 0
    blocks = true_places(wanted, width)
    return (blocks << group) | bits.gather(-1, blocks.long()), wanted.sum(-1, dtype=torch.int32)


TRITON = Backend("triton", triton_attention, fault=lambda problem: triton_fault(problem.device))
