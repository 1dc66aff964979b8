"""Attention over the kept key blocks, and the choice of the kernel that computes it.

A backend turns a layer's `Pattern` into a function (q [B, Hq, n, D], k and v [B, Hkv, T, D]) -> [B, Hq, n, D]; the n
queries are the LAST of the T tokens. `flash` is FlashAttention-4, `triton` this package's own kernel, `gather` plain
torch on any device; all agree.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import BlockGrid, Pattern, head_chunks, true_places
from .kernels import (
    block_sparse_attention,
    error_and_bound,
    flash_block_sparse,
    flash_fault,
    full_attention,
    triton_fault,
)

SparseAttention = Callable[[Tensor, Tensor, Tensor], Tensor]

# tokens of the largest block that the self-check runs with
LARGEST_CHECKED = 512
# elements of the gathered keys of one chunk, which holds at least one query block of one head: small ones stay in a
# CPU's cache, large ones fill a GPU
CPU_CHUNK, GPU_CHUNK = 1 << 19, 1 << 24
# tokens from which on "auto" tries `flash`: below, its host code, slow to load and to start, costs more than it gains
FLASH_FROM = 4096
# query rows of a tile of the Triton kernel that several small blocks share
SHARED_TILE = 64


def gather_attention(pattern: Pattern) -> SparseAttention:
    """Gather each query block's kept keys and values into a rectangle, then one batched attention call a chunk."""
    grid = pattern.grid

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, first, lead = _from_block_start(q, grid)
        rows = []
        for b, count in enumerate(pattern.counts):
            valid = None if grid.key_valid is None else grid.key_valid[b]
            kept = pattern.indices[b, :, first:, :count].long()
            rows.append(_gather_row(q[b], k[b], v[b], kept, valid, grid.block_size))
        return torch.stack(rows)[:, :, lead:]

    return attention


def _from_block_start(q: Tensor, grid: BlockGrid) -> tuple[Tensor, int, int]:
    """q [B, Hq, n, D], the last n tokens, led by zeros from its first block's start on; that block; how many zeros."""
    first, lead = divmod(grid.length - q.shape[2], grid.block_size)
    return (F.pad(q, (0, 0, lead, 0)) if lead else q), first, lead


def _gather_row(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, valid: Tensor | None, block_size: int) -> Tensor:
    """One batch row: q [Hq, n, D], k and v [Hkv, T, D], indices [Hq, nQ, kept], valid [T] -> [Hq, n, D]."""
    heads, n_queries, head_dim = q.shape
    length = k.shape[1]
    block_size = min(block_size, length)
    pad = -length % block_size
    queries, keys, values = (
        F.pad(x, (0, 0, 0, pad)).unflatten(1, (-1, block_size)).flatten(0, 1) for x in (q, k, v)
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


def triton_attention(pattern: Pattern) -> SparseAttention:
    """The package's Triton kernel; query blocks below its tile are taken together, on the union of what they keep."""
    grid = pattern.grid
    group = SHARED_TILE // grid.block_size if SHARED_TILE % grid.block_size == 0 else 1
    lists, counts = united_lists(pattern, group)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse_attention(
            q, k, v, lists, counts, block_size=grid.block_size, group=group, key_valid=grid.key_valid
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


def flash_attention(pattern: Pattern) -> SparseAttention:
    """FlashAttention-4, whose key blocks are 64 or 128 wide: larger ones are cut into 128s."""
    grid = pattern.grid
    piece = min(grid.block_size, 128)
    parts = torch.arange(grid.block_size // piece, dtype=torch.int32, device=pattern.indices.device)
    indices = (pattern.indices[..., None] * len(parts) + parts).flatten(3)
    counts = (indices * piece < grid.length).sum(-1, dtype=torch.int32)  # a ragged last block has fewer pieces

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, first, lead = _from_block_start(q, grid)
        out = flash_block_sparse(q, k, v, counts[:, :, first:], indices[:, :, first:], (grid.block_size, piece))
        return out[:, :, lead:]

    return attention


BACKENDS: dict[str, Callable[[Pattern], SparseAttention]] = {
    "flash": flash_attention,
    "triton": triton_attention,
    "gather": gather_attention,
}


def sparse_attention(name: str, pattern: Pattern) -> SparseAttention:
    """What the sparse steps compute: the backend's attention, full attention for the queries that read every key."""
    kept, grid = BACKENDS[name](pattern), pattern.grid
    if not grid.dense_answer:
        return kept

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        answer = q[:, :, -(grid.length - grid.first_dense) :]
        dense = full_attention(answer, k, v, grid.key_valid)[0]
        if answer.shape == q.shape:
            return dense
        out = kept(q, k, v)
        out[:, :, -answer.shape[2] :] = dense  # in place: the kernel's few rows more cost less than a copy of all
        return out

    return attention


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


class BackendError(ValueError):
    """The backend that the user named cannot run here."""


def check_backend(name: str) -> None:
    """Raise BackendError unless there is a backend of that name, or it is "auto"."""
    if name not in ("auto", *BACKENDS):
        raise BackendError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {name!r}")


def choose_backend(name: str, problem: Problem, length: int) -> tuple[str, str]:
    """The backend to use for sequences of `length` tokens, and why in a few words.

    It is the named one, or for "auto" the fastest that is available and right.

    Raises:
        BackendError: the named backend is unknown, cannot run here, or fails its numeric self-check.
    """
    check_backend(name)
    passed_over: list[str] = []
    for candidate in BACKENDS if name == "auto" else (name,):
        fault = unavailable(candidate, problem)
        if fault is None and name == "auto" and candidate == "flash" and length < FLASH_FROM:
            fault = f"gains nothing below {FLASH_FROM} tokens"
        fault = fault or self_check(candidate, problem)
        if fault is None:
            why = "named by the user" if name != "auto" else "fastest available, self-check passed"
            return candidate, "; ".join([why, *passed_over])
        passed_over.append(f"{candidate}: {fault}")
    raise BackendError(f"backend cannot run here: {'; '.join(passed_over)}")


def unavailable(name: str, problem: Problem) -> str | None:
    """Why the backend cannot run this problem, or None if nothing speaks against it."""
    if name == "gather":
        return None
    if name == "triton":
        return triton_fault(problem.device)
    if problem.block_size != 64 and problem.block_size % 128:
        return f"needs block_size 64, 128 or a multiple of 128, not {problem.block_size}"
    if problem.padded:
        return "needs prompts without padding"
    return flash_fault(problem.device, problem.dtype)


@functools.cache
def self_check(name: str, problem: Problem) -> str | None:
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
        backend = BACKENDS[name](pattern)
        tail = pattern.grid.block_size + 5  # queries of the last tokens alone, from inside a block on
        out = torch.cat((backend(q, k, v)[:, :, :-tail], backend(q[:, :, -tail:], k, v)), dim=2)
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
