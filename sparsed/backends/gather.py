"""`gather`: plain torch, on any device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..blocks import Pattern
from .backend import Backend, SparseAttention, from_block_start

# elements of the gathered keys of one chunk, which holds at least one query block of one head: small ones stay in a
# CPU's cache, large ones fill a GPU
CPU_CHUNK, GPU_CHUNK = 1 << 19, 1 << 24


def gather_attention(pattern: Pattern) -> SparseAttention:
    """Gather each query block's kept keys and values into a rectangle, then one batched attention call a chunk."""
    grid = pattern.grid

    def attention(q: Tensor, k: Tensor, v: Tensor, start: int = 0) -> Tensor:
        q, blocks, lead = from_block_start(q, grid, start)
        rows = []
        for b, count in enumerate(pattern.counts):
            valid = None if grid.key_valid is None else grid.key_valid[b]
            kept = pattern.indices[b, :, blocks, :count].long()
            rows.append(_gather_row(q[b], k[b], v[b], kept, valid, grid.block_size))
        return torch.stack(rows)[:, :, lead:]

    return attention


def _gather_row(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, valid: Tensor | None, block_size: int) -> Tensor:
    """One batch row: q [Hq, n, D], k and v [Hkv, T, D], indices [Hq, nQ, kept], valid [T] -> [Hq, n, D]."""
    heads, n_queries, head_dim = q.shape
    length = k.shape[1]
    block_size = min(block_size, length)
    pad = -length % block_size
    queries, keys, values = (
        F.pad(x, (0, 0, 0, -x.shape[1] % block_size)).unflatten(1, (-1, block_size)).flatten(0, 1) for x in (q, k, v)
    )  # [heads * blocks, block, D]
    kept = indices.flatten(0, 1)  # [Hq * nQ, kept]
    kv_head = (torch.arange(heads, device=q.device) * k.shape[0] // heads).repeat_interleave(indices.shape[1])
    source = kept + kv_head[:, None] * ((length + pad) // block_size)  # the kept blocks' rows in keys and values
    if pad and valid is None:
        valid = torch.ones(length, dtype=torch.bool, device=q.device)
    if valid is not None:
        valid = F.pad(valid, (0, pad)).unflatten(-1, (-1, block_size))
    budget = CPU_CHUNK if q.device.type == "cpu" else GPU_CHUNK
    chunk = max(1, budget // (kept.shape[1] * block_size * head_dim))
    parts = []
    for start in range(0, len(kept), chunk):
        part = slice(start, start + chunk)
        shape = (len(kept[part]), 1, -1, head_dim)
        out = F.scaled_dot_product_attention(
            queries[part, None],
            keys.index_select(0, source[part].flatten()).view(shape),
            values.index_select(0, source[part].flatten()).view(shape),
            attn_mask=None if valid is None else valid[kept[part]].flatten(1)[:, None, None],
        )
        parts.append(out)
    return torch.cat(parts).view(heads, -1, head_dim)[:, :n_queries]


GATHER = Backend("gather", gather_attention, fault=lambda problem: None)
