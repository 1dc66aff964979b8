"""Whether a backend is right on this machine: it is run once on random data, against float64."""

import functools
import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..blocks import BlockGrid, Pattern
from ..kernels import error_and_bound
from .backend import Backend, Problem

# tokens of the largest block that it is run with
LARGEST_CHECKED = 512


@functools.cache
def self_check(backend: Backend, problem: Problem) -> str | None:
    """Run the backend once on random data against dense float64 attention under the same mask; None if it agrees.

    The length is ragged and its last block is kept, where kernels have read past the end. The error may be twice that
    of dense attention in the same dtype. Two batch rows and the first and last key heads are compared.
    """
    pattern = _check_pattern(problem)
    generator = torch.Generator(problem.device).manual_seed(0)
    shape = (problem.batch, problem.heads, pattern.grid.length, problem.head_dim)
    kv_shape = (problem.batch, problem.kv_heads, *shape[2:])
    q, k, v = (
        torch.randn(s, generator=generator, device=problem.device, dtype=problem.dtype)
        for s in (shape, kv_shape, kv_shape)
    )
    try:
        attention = backend.build(pattern)
        # all queries, and windows of them that begin and end inside a block
        cuts = (pattern.grid.block_size - 3, pattern.grid.length - pattern.grid.block_size - 5, pattern.grid.length)
        windows = [attention(q[:, :, a:b], k, v, a) for a, b in pairwise(cuts)]
        out = torch.cat((attention(q, k, v)[:, :, : cuts[0]], *windows), dim=2)
    except torch.OutOfMemoryError:
        raise  # says nothing about the kernel
    except Exception as error:  # a compiler can fail in any way; the reason is reported, never hidden
        return f"failed with {type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"
    group = problem.heads // problem.kv_heads
    for kv_head in {0, problem.kv_heads - 1}:
        heads = slice(kv_head * group, (kv_head + 1) * group)
        fault = _compare(
            out[:2, heads], q[:2, heads], k[:2, kv_head, None], v[:2, kv_head, None], pattern.part(2, heads)
        )
        if fault is not None:
            return fault
    return None


def _compare(out: Tensor, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> str | None:
    """What is wrong with `out` as sparse attention of q, k, v; None if it errs no more than dense attention may."""
    wide = torch.float32 if q.device.type == "mps" else torch.float64
    exact = dense_masked_attention(q.to(wide), k.to(wide), v.to(wide), pattern)
    real = slice(None) if pattern.grid.key_valid is None else pattern.grid.key_valid[:, None, :, None].expand_as(exact)
    dense = dense_masked_attention(q, k, v, pattern)
    error, allowed = error_and_bound(out[real], dense[real], exact[real], q.dtype)
    if not error <= allowed:
        return f"is wrong on this machine: error {error:.1e} where {allowed:.1e} is allowed"
    return None


def _check_pattern(problem: Problem) -> Pattern:
    """A random pattern over four and a bit blocks; with padding, row 0 begins with a part of a block of it."""
    block = problem.block_size
    if block > LARGEST_CHECKED:  # dense attention over its blocks would take long; this one has the same kernel tile
        block = LARGEST_CHECKED // 2 + math.gcd(block, 128)
    length = 4 * block + block // 2 + 3
    key_valid = None
    if problem.padded:
        key_valid = torch.ones(problem.batch, length, dtype=torch.bool, device=problem.device)
        key_valid[0, : block // 2 + 1] = False
    grid = BlockGrid(length, 3 * block, block, key_valid)
    # half of the blocks by chance, and the last one
    generator = torch.Generator(problem.device).manual_seed(1)
    shape = (problem.batch, problem.heads, grid.n_blocks, grid.n_blocks - 1)
    order = torch.rand(shape, generator=generator, device=problem.device).argsort(dim=-1).int()
    kept = torch.cat((order[..., :2].sort(dim=-1).values, order.new_full((*shape[:-1], 1), grid.n_blocks - 1)), dim=-1)
    return Pattern(kept, (3,) * problem.batch, grid)


def dense_masked_attention(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
    """What the backends must equal: dense attention under the pattern expanded to tokens (T x T memory)."""
    block, length = pattern.grid.block_size, pattern.grid.length
    mask = pattern.as_mask().repeat_interleave(block, 2).repeat_interleave(block, 3)[:, :, :length, :length]
    if pattern.grid.key_valid is not None:
        mask = mask & pattern.grid.key_valid[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
