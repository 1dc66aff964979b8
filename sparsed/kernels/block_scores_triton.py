"""Block scores on the GPU in one kernel: no T x T tensor, no float32 copy of q or k."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import fits, on_device_of

LOG2_E = 1.4426950408889634
# rows and keys of a tile; with float32 inputs, a quarter of it fits the same registers
TILE, TILE_FLOAT32 = 128, 32


@on_device_of
def block_scores_triton(
    q: Tensor, k: Tensor, *, block_size: int, key_valid: Tensor | None = None, lse: Tensor | None = None
) -> Tensor:
    """`block_scores` as a Triton kernel: one pass over the keys with the log-sum-exp given, two without.

    A program takes as many query blocks as fit a tile, a tile of keys as many key blocks; each block has a power of two
    of the tile's rows to itself, its span. A block larger than a tile is taken in pieces.
    """
    batch, heads, length, head_dim = q.shape
    n_blocks = -(-length // block_size)
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    scores = torch.empty(batch, heads, n_blocks, n_blocks, device=q.device, dtype=torch.float32)
    d_tile = max(16, triton.next_power_of_2(head_dim))
    tile, stages = _tile(d_tile * q.element_size(), q.dtype, q.device)
    span = min(tile, triton.next_power_of_2(block_size))
    per_tile = tile // span
    _block_scores_kernel[(triton.cdiv(n_blocks, per_tile), batch * heads)](
        q, k,
        None if lse is None else lse.contiguous(),
        None if key_valid is None else key_valid.contiguous().view(torch.uint8),
        scores,
        *q.stride()[:3], *k.stride()[:3],
        length, n_blocks, heads, heads // k.shape[1], head_dim**-0.5 * LOG2_E,
        GIVEN=lse is not None,
        PADDED=key_valid is not None,
        D=head_dim,
        D_TILE=d_tile,
        BLOCK=block_size,
        SPAN=span,
        BLOCKS=per_tile,
        TILE=tile,
        num_warps=8 if tile == 128 else 4,
        num_stages=stages,
    )  # fmt: skip
    return scores


def _tile(row_bytes: int, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """Rows, and keys, of a tile, and tiles of keys in flight: the fastest on an H100, cut down until they fit."""
    tile, stages = TILE_FLOAT32 if dtype == torch.float32 else TILE, 2
    while not fits((1 + stages) * tile * row_bytes, device) and (tile, stages) != (16, 1):
        tile, stages = (tile, 1) if stages == 2 else (tile // 2, 1)
    return tile, stages


@triton.jit
def _logits(
    q, k_base, k_row, valid_base, columns, ok, scale,
    MASKED: tl.constexpr,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
):  # fmt: skip
    """Base-2 attention logits of one tile, [rows, columns]; MASKED: -inf where the column does not count."""
    d = tl.arange(0, D_TILE)
    pointers = k_base + columns[None, :].to(tl.int64) * k_row + d[:, None]
    if MASKED:
        keys = tl.load(pointers, mask=ok[None, :] & (d[:, None] < D), other=0.0)
        if PADDED:
            ok = ok & (tl.load(valid_base + columns, mask=ok, other=0) != 0)
    elif D == D_TILE:
        keys = tl.load(pointers)
    else:
        keys = tl.load(pointers, mask=d[:, None] < D, other=0.0)
    logits = tl.dot(q, keys, input_precision="ieee") * scale
    if MASKED:
        logits = tl.where(ok[None, :], logits, float("-inf"))
    return logits


@triton.jit
def _log_sum_exp(
    q, k_base, k_row, valid_base, length, scale,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Base-2 log-sum-exp of every row over all keys that count, inf if none does."""
    peak = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    for start in range(0, length, TILE):
        columns = start + tl.arange(0, TILE)
        logits = _logits(q, k_base, k_row, valid_base, columns, columns < length, scale, True, PADDED, D, D_TILE)
        higher = tl.maximum(peak, tl.max(logits, 1))
        # a finite stand-in while no valid key has been seen: -inf minus -inf is not a number
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(peak - anchor) + tl.sum(tl.exp2(logits - anchor[:, None]), 1)
        peak = higher
    return tl.where(total > 0, peak + tl.log2(total), float("inf"))


@triton.jit
def _pool(
    q, lse, k_base, k_row, valid_base, out, first_block, more, first, last, length, n_blocks, scale,
    MASKED: tl.constexpr,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Scores of the key tiles first ... last - 1 for one tile of rows; `more`: add to what other pieces stored."""
    n = tl.arange(0, TILE)
    for j in range(first, last):
        mass = tl.zeros([BLOCKS, BLOCKS], tl.float32)
        for piece in tl.static_range(0, BLOCK if BLOCKS == 1 else 1, TILE):
            within = n % SPAN + piece
            columns = (j * BLOCKS + n // SPAN) * BLOCK + within
            ok = (within < BLOCK) & (columns < length)
            logits = _logits(q, k_base, k_row, valid_base, columns, ok, scale, MASKED, PADDED, D, D_TILE)
            probabilities = tl.exp2(logits - lse[:, None])  # rows that do not count have lse inf: zeros
            mass += tl.sum(tl.sum(tl.reshape(probabilities, [BLOCKS, SPAN, BLOCKS, SPAN]), 3), 1)
        row_block = tl.arange(0, BLOCKS)[:, None]
        key_block = j * BLOCKS + tl.arange(0, BLOCKS)[None, :]
        at = out + row_block * n_blocks + key_block
        inside = (first_block + row_block < n_blocks) & (key_block < n_blocks)
        if more:
            mass += tl.load(at, mask=inside, other=0.0)
        tl.store(at, mass, mask=inside)


@triton.jit(do_not_specialize=["length", "n_blocks"])
def _block_scores_kernel(
    q_ptr, k_ptr, lse_ptr, valid_ptr, out_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row,
    length, n_blocks, heads, group, scale,
    GIVEN: tl.constexpr,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    first_block = tl.program_id(0) * BLOCKS
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    q_base = q_ptr + b * q_batch + h * q_head
    k_base = k_ptr + b * k_batch + (h // group) * k_head
    valid_base = valid_ptr + b * length if PADDED else valid_ptr
    out = out_ptr + ((b * heads + h) * n_blocks + first_block) * n_blocks
    m = tl.arange(0, TILE)
    d = tl.arange(0, D_TILE)
    tiles = tl.cdiv(n_blocks, BLOCKS)
    # tiles without padding, ragged end or unused rows need no mask
    whole = 0 if PADDED or BLOCK % SPAN != 0 else length // (BLOCK * BLOCKS)

    for piece in range(0, BLOCK if BLOCKS == 1 else 1, TILE):
        within = m % SPAN + piece
        rows = (first_block + m // SPAN) * BLOCK + within
        row_ok = (within < BLOCK) & (rows < length)
        q = tl.load(
            q_base + rows[:, None].to(tl.int64) * q_row + d[None, :], mask=row_ok[:, None] & (d[None, :] < D), other=0.0
        )
        if GIVEN:
            lse = tl.load(lse_ptr + (b * heads + h) * length + rows, mask=row_ok, other=float("inf"))
            lse = lse * 1.4426950408889634
        else:
            lse = _log_sum_exp(q, k_base, k_row, valid_base, length, scale, PADDED, D, D_TILE, TILE)
        if PADDED:
            row_ok = row_ok & (tl.load(valid_base + rows, mask=row_ok, other=0) != 0)
        lse = tl.where(row_ok, lse, float("inf"))
        _pool(
            q, lse, k_base, k_row, valid_base, out, first_block, piece > 0, 0, whole, length, n_blocks, scale,
            False, PADDED, D, D_TILE, BLOCK, SPAN, BLOCKS, TILE,
        )  # fmt: skip
        _pool(
            q, lse, k_base, k_row, valid_base, out, first_block, piece > 0, whole, tiles, length, n_blocks, scale,
            True, PADDED, D, D_TILE, BLOCK, SPAN, BLOCKS, TILE,
        )  # fmt: skip
