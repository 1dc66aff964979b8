"""Attention over the kept key blocks, and the choice of the kernel that computes it.

A backend turns a layer's `Pattern` into a function (q [B, Hq, T, D], k and v [B, Hkv, T, D]) -> [B, Hq, T, D].
`flash` and `triton` are FlexAttention's two kernels (CUDA), `gather` is plain torch on any device; all agree.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .blocks import BlockGrid, Pattern

SparseAttention = Callable[[Tensor, Tensor, Tensor], Tensor]

# compiled variants of FlexAttention (dtypes, block sizes, heads; lengths share one); by default dynamo gives up at 8
RECOMPILES = 64
# tokens of the largest block that the self-check runs with
LARGEST_CHECKED = 512
# elements of the gathered keys of one chunk, which holds at least one query block of one head: small ones stay in a
# CPU's cache, large ones fill a GPU
CPU_CHUNK, GPU_CHUNK = 1 << 19, 1 << 24


def gather_attention(pattern: Pattern) -> SparseAttention:
    """Gather each query block's kept keys and values into a rectangle, then one batched attention call a chunk."""
    grid = pattern.grid

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = []
        for b, count in enumerate(pattern.counts):
            valid = None if grid.key_valid is None else grid.key_valid[b]
            rows.append(_gather_row(q[b], k[b], v[b], pattern.indices[b, :, :, :count].long(), valid, grid.block_size))
        return torch.stack(rows)

    return attention


def _gather_row(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, valid: Tensor | None, block_size: int) -> Tensor:
    """One batch row: q [Hq, T, D], k and v [Hkv, T, D], indices [Hq, nQ, kept], valid [T] -> [Hq, T, D]."""
    heads, length, head_dim = q.shape
    block_size = min(block_size, length)
    pad = -length % block_size
    queries, keys, values = (
        F.pad(x, (0, 0, 0, pad)).unflatten(1, (-1, block_size)).flatten(0, 1) for x in (q, k, v)
    )  # [heads * blocks, block, D]
    n_blocks = indices.shape[1]
    kept = indices.flatten(0, 1)  # [Hq * nQ, kept]
    kv_head = (torch.arange(heads, device=q.device) * k.shape[0] // heads).repeat_interleave(n_blocks)
    source = kept + kv_head[:, None] * n_blocks  # the kept blocks' rows in keys and values
    if pad and valid is None:
        valid = torch.ones(length, dtype=torch.bool, device=q.device)
    valid = None if valid is None else _blocks(valid, block_size)
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
    return torch.cat(parts).view(heads, -1, head_dim)[:, :length]


def _blocks(valid: Tensor, block_size: int) -> Tensor:
    """bool [..., T] -> [..., n_blocks, block_size], False past the end."""
    return F.pad(valid, (0, -valid.shape[-1] % block_size)).unflatten(-1, (-1, block_size))


def triton_attention(pattern: Pattern) -> SparseAttention:
    """FlexAttention's Triton kernel; below 128, its tile is the largest power of two that divides the block."""
    options = {"BACKEND": "TRITON"}
    tile = math.gcd(pattern.grid.block_size, 128)
    if tile < 128:
        options |= {"BLOCK_M": tile, "BLOCK_N": tile}
    return _flex(block_mask(pattern, pattern.grid.block_size), options)


def flash_attention(pattern: Pattern) -> SparseAttention:
    """FlexAttention's FlashAttention-4 kernel, whose blocks are 64 or 128 wide: larger ones are cut into 128s."""
    return _flex(block_mask(pattern, min(pattern.grid.block_size, 128)), {"BACKEND": "FLASH"})


def _flex(mask: BlockMask, options: dict) -> SparseAttention:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=RECOMPILES):
            return _compiled_flex()(
                q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1], kernel_options=options
            )

    return attention


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    # fullgraph: past dynamo's recompile limit FlexAttention would otherwise turn, in silence, into a dense T x T one
    return torch.compile(flex_attention, fullgraph=True)


def block_mask(pattern: Pattern, block_size: int) -> BlockMask:
    """The kept blocks, cut into blocks of `block_size`, as a BlockMask made from their indices alone.

    Blocks without padding are FULL blocks, whose tokens the kernels do not look at; the mask_mod speaks for the others.
    """
    grid, indices = pattern.grid, pattern.indices
    if grid.key_valid is None and grid.block_size == block_size:
        full = indices.new_full(indices.shape[:-1], indices.shape[-1])
        mask_mod = _inside(indices.new_full(indices.shape[:1], grid.length))
        # the partial list is empty, yet the Triton kernel walks the full list with the partial list's strides
        partial, partial_indices, full_indices = torch.zeros_like(full), indices, indices
    else:
        indices, kept = _cut(pattern, block_size)
        valid = grid.key_valid
        if valid is None:
            valid = torch.ones(len(indices), grid.length, dtype=torch.bool, device=indices.device)
        filled = _blocks(valid, block_size).sum(-1)  # [B, nK]
        ends = torch.arange(filled.shape[1], device=filled.device) * block_size
        whole = filled == (grid.length - ends).clamp(max=block_size)
        whole = whole[:, None, None].expand(*indices.shape[:3], -1).gather(-1, indices.long())
        full, full_indices = _compress(indices, kept & whole)
        partial, partial_indices = _compress(indices, kept & ~whole)
        mask_mod = _valid(valid)
    return BlockMask.from_kv_blocks(
        partial,
        partial_indices,
        full,
        full_indices,
        BLOCK_SIZE=block_size,
        mask_mod=mask_mod,
        seq_lengths=(grid.length, grid.length),
        compute_q_blocks=False,
    )


def _inside(length: Tensor) -> Callable[..., Tensor]:
    """mask_mod: the key lies before `length` [B]. Always true, but not constant: a constant one makes the FLASH kernel
    drop the block mask, and a Python number would be compiled in."""
    return lambda b, h, q_index, kv_index: kv_index < length[b]


def _valid(valid: Tensor) -> Callable[..., Tensor]:
    """mask_mod: the key is a real token of `valid` [B, T]."""
    return lambda b, h, q_index, kv_index: valid[b, kv_index]


def _cut(pattern: Pattern, block_size: int) -> tuple[Tensor, Tensor]:
    """Cut the kept blocks into blocks of `block_size`: indices int32 [B, Hq, nQ', width'], and which of them exist."""
    parts = pattern.grid.block_size // block_size
    n_blocks = -(-pattern.grid.length // block_size)
    counts = torch.tensor(pattern.counts, device=pattern.indices.device)
    kept = torch.arange(pattern.indices.shape[-1], device=counts.device) < counts[:, None, None, None]
    fine = pattern.indices[..., None] * parts + torch.arange(parts, device=counts.device, dtype=torch.int32)
    kept = (kept[..., None] & (fine < n_blocks)).flatten(3).repeat_interleave(parts, 2)[:, :, :n_blocks]
    fine = fine.clamp(max=n_blocks - 1).flatten(3).repeat_interleave(parts, 2)[:, :, :n_blocks]
    return fine, kept


def _compress(indices: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many indices are chosen (int32) and the indices with the chosen ones first, in their order."""
    order = chosen.logical_not().to(torch.uint8).sort(dim=-1, stable=True).indices
    return chosen.sum(-1, dtype=torch.int32), indices.gather(-1, order)


BACKENDS: dict[str, Callable[[Pattern], SparseAttention]] = {
    "flash": flash_attention,
    "triton": triton_attention,
    "gather": gather_attention,
}


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


def choose_backend(name: str, problem: Problem) -> tuple[str, str]:
    """The backend to use, and why in a few words: the named one, or for "auto" the fastest that is available and right.

    Raises:
        BackendError: the named backend is unknown, cannot run here, or fails its numeric self-check.
    """
    check_backend(name)
    passed_over = []
    for candidate in BACKENDS if name == "auto" else (name,):
        fault = unavailable(candidate, problem) or self_check(candidate, problem)
        if fault is None:
            why = "named by the user" if name != "auto" else "fastest available, self-check passed"
            return candidate, "; ".join([why, *passed_over])
        passed_over.append(f"{candidate}: {fault}")
    raise BackendError(f"backend cannot run here: {'; '.join(passed_over)}")


def unavailable(name: str, problem: Problem) -> str | None:
    """Why the backend cannot run this problem, or None if nothing speaks against it."""
    if name == "gather":
        return None
    if problem.device.type != "cuda":
        return f"needs a CUDA device, not {problem.device.type}"
    if name == "triton":
        return None if importlib.util.find_spec("triton") else "needs the package triton"
    if torch.cuda.get_device_capability(problem.device) < (9, 0):
        return "needs a GPU of compute capability 9.0 or newer"
    try:
        found = importlib.util.find_spec("flash_attn.cute")  # imports flash_attn, which can be broken in any way
    except Exception as error:
        return f"needs the package flash-attn-4 (flash_attn does not import: {type(error).__name__})"
    if found is None:
        return "needs the package flash-attn-4"
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, not {str(problem.dtype).removeprefix('torch.')}"
    if problem.block_size != 64 and problem.block_size % 128:
        return f"needs block_size 64, 128 or a multiple of 128, not {problem.block_size}"
    return None


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
        out = BACKENDS[name](pattern)(q, k, v)
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
    error = (out.to(wide) - exact)[real].abs().max().item()
    dense = (dense_masked_attention(q, k, v, pattern).to(wide) - exact)[real].abs().max().item()
    allowed = 2 * dense + torch.finfo(q.dtype).eps * exact[real].abs().max().item()
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
