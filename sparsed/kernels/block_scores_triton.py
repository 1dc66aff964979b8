"""Block scores on the GPU in one kernel: no T x T tensor, no float32 copy of q or k."""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634


def block_scores_triton(q: Tensor, k: Tensor, *, block_size: int, key_valid: Tensor | None = None) -> Tensor:
    """`block_scores` as a Triton kernel: one program per query block and head, two sweeps over the keys."""
    batch, heads, length, head_dim = q.shape
    n_blocks = -(-length // block_size)
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    scores = torch.empty(batch, heads, n_blocks, n_blocks, device=q.device, dtype=torch.float32)
    # tiles that fit the 99 KiB of shared memory of a consumer GPU at head size 128, two stages deep
    most_rows, most_keys = (64, 32) if q.dtype == torch.float32 else (128, 64)
    tile = triton.next_power_of_2(block_size)
    valid = None if key_valid is None else key_valid.contiguous().view(torch.uint8)
    _block_scores_kernel[(n_blocks, batch * heads)](
        q, k, valid, scores,
        *q.stride()[:3], *k.stride()[:3],
        length, n_blocks, heads, heads // k.shape[1], head_dim**-0.5 * LOG2_E,
        PADDED=valid is not None,
        D=head_dim,
        D_TILE=max(16, triton.next_power_of_2(head_dim)),
        BLOCK=block_size,
        ROWS=min(tile, most_rows),
        KEYS=min(tile, most_keys),
        SWEEP=most_keys,
        num_warps=8 if min(tile, most_rows) == 128 else 4,
        num_stages=2,
    )  # fmt: skip
    return scores


@triton.jit
def _logits(
    q,
    k_base,
    k_stride,
    valid_base,
    columns,
    column_ok,
    scale,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
):
    """Base-2 attention logits of one tile, [rows, columns], -inf where the column does not count."""
    d = tl.arange(0, D_TILE)
    pointers = k_base + columns[None, :].to(tl.int64) * k_stride + d[:, None]
    keys = tl.load(pointers, mask=column_ok[None, :] & (d[:, None] < D), other=0.0)
    if PADDED:
        column_ok = column_ok & (tl.load(valid_base + columns, mask=column_ok, other=0) != 0)
    logits = tl.dot(q, keys, input_precision="ieee") * scale
    return tl.where(column_ok[None, :], logits, float("-inf"))


@triton.jit
def _block_scores_kernel(
    q_ptr, k_ptr, valid_ptr, out_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row,
    length, n_blocks, heads, group, scale,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SWEEP: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    q_base = q_ptr + b * q_batch + h * q_head
    k_base = k_ptr + b * k_batch + (h // group) * k_head
    valid_base = valid_ptr + b * length if PADDED else valid_ptr
    out_row = out_ptr + ((b * heads + h) * n_blocks + i) * n_blocks
    d = tl.arange(0, D_TILE)

    for first in range(0, BLOCK, ROWS):
        inside = first + tl.arange(0, ROWS)
        rows = i * BLOCK + inside
        row_ok = (inside < BLOCK) & (rows < length)
        pointers = q_base + rows[:, None].to(tl.int64) * q_row + d[None, :]
        q = tl.load(pointers, mask=row_ok[:, None] & (d[None, :] < D), other=0.0)
        if PADDED:
            row_ok = row_ok & (tl.load(valid_base + rows, mask=row_ok, other=0) != 0)

        # first sweep: the log-sum-exp of every row
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for start in range(0, length, SWEEP):
            columns = start + tl.arange(0, SWEEP)
            logits = _logits(q, k_base, k_row, valid_base, columns, columns < length, scale, PADDED, D, D_TILE)
            higher = tl.maximum(peak, tl.max(logits, 1))
            # a finite stand-in while no valid key has been seen: -inf minus -inf is not a number
            anchor = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp2(peak - anchor) + tl.sum(tl.exp2(logits - anchor[:, None]), 1)
            peak = higher
        lse = tl.where(total > 0, peak + tl.log2(total), 0.0)

        # second sweep: probabilities, summed block by block; later tiles of the same rows add to the first one's sum
        for j in range(n_blocks):
            mass = tl.zeros([ROWS], tl.float32)
            for offset in range(0, BLOCK, KEYS):
                within = offset + tl.arange(0, KEYS)
                columns = j * BLOCK + within
                column_ok = (within < BLOCK) & (columns < length)
                logits = _logits(q, k_base, k_row, valid_base, columns, column_ok, scale, PADDED, D, D_TILE)
                mass += tl.sum(tl.exp2(logits - lse[:, None]), 1)
            score = tl.sum(tl.where(row_ok, mass, 0.0), 0)
            if first > 0:
                score += tl.load(out_row + j)
            tl.store(out_row + j, score)
