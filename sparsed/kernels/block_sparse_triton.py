"""Attention over listed key blocks in one Triton kernel: any block size, any GPU that runs Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import fits, on_device_of

LOG2_E = 1.4426950408889634


@on_device_of
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Tensor,
    counts: Tensor,
    *,
    start: int,
    block_size: int,
    group: int,
    key_valid: Tensor | None = None,
) -> Tensor:
    """Attention of each list's query blocks over its key blocks.

    Args:
        q: [B, Hq, n, D], the tokens from `start` on.
        k, v: [B, Hkv, T, D], Hkv dividing Hq.
        lists: int32 [B, Hq, nL, width], ascending: the key blocks of each run of `group` query blocks. With group 1 the
            entries are block indices; else index * 2^group + a bit for each of the run's query blocks that keeps it.
        counts: int32 [B, Hq, nL], how many entries of a list count.
        start: place of the first query in the sequence.
        block_size: tokens of a block.
        group: query blocks of a list; above 1, block_size * group is 64.
        key_valid: bool [B, T], False where a key is padding.

    Returns:
        [B, Hq, n, D]; zeros for a query without any valid key.
    """
    batch, heads, n_query, head_dim = q.shape
    length = k.shape[2]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty(batch, n_query, heads, head_dim, device=q.device, dtype=q.dtype).transpose(1, 2)
    d_tile = max(16, triton.next_power_of_2(head_dim))
    rows, keys, stages = _tile(block_size, group, d_tile * q.element_size(), q.device)
    span = block_size * group
    pieces, touched = triton.cdiv(span, rows), triton.cdiv(start + n_query, span) - start // span
    _block_sparse_kernel[(touched * pieces, batch * heads)](
        q, k, v, out, lists, counts,
        None if key_valid is None else key_valid.contiguous().view(torch.uint8),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *lists.stride()[:3], *counts.stride()[:2],
        n_query, length, start, heads, heads // k.shape[1], head_dim**-0.5 * LOG2_E,
        PADDED=key_valid is not None,
        D=head_dim,
        D_TILE=d_tile,
        BLOCK=block_size,
        GROUP=group,
        PIECES=pieces,
        ROWS=rows,
        KEYS=keys,
        num_warps=8 if rows == 128 else 4,
        num_stages=stages,
    )  # fmt: skip
    return out


def _tile(block_size: int, group: int, row_bytes: int, device: torch.device) -> tuple[int, int, int]:
    """Query rows and keys of a tile, and tiles of keys and values in flight: the fastest of those measured on an H100.

    What does not fit the device's shared memory is cut down.
    """
    span = block_size * group
    rows = 128 if span % 128 == 0 else 64 if span % 64 == 0 else min(128, max(16, triton.next_power_of_2(span)))
    keys = 128 if block_size % 128 == 0 else 64
    # a tile gathered from several blocks gains nothing from a third stage
    stages = 3 if block_size % keys == 0 else 2
    while not fits((rows + 2 * keys * stages) * row_bytes, device) and (rows, keys, stages) != (16, 16, 1):
        if stages == 3 or (stages == 2 and keys <= 64):
            stages -= 1
        elif keys > 16:
            keys //= 2
        else:
            rows //= 2
    return rows, keys, stages


@triton.jit
def _sweep(
    acc, total, peak, q, inside, k_base, v_base, k_row, v_row, valid_base, list_base, first, last, kept, length, scale,
    MASKED: tl.constexpr,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key tiles first ... last - 1 of one list, its blocks laid end to end.

    Args:
        inside: [ROWS], the queries' places in the span of blocks that share the list.
    """
    d = tl.arange(0, D_TILE)
    n = tl.arange(0, KEYS)
    for tile in range(first, last):
        if BLOCK % KEYS == 0:  # a tile lies inside one block
            entry = tl.load(list_base + tile * KEYS // BLOCK)
            block = entry >> GROUP if GROUP > 1 else entry
            columns = block * BLOCK + (tile * KEYS) % BLOCK + n
            ok = columns < length
        else:
            position = tile * KEYS + n
            ok = position < kept * BLOCK
            entry = tl.load(list_base + position // BLOCK, mask=ok, other=0)
            block = entry >> GROUP if GROUP > 1 else entry
            columns = block * BLOCK + position % BLOCK
            ok = ok & (columns < length)
        at = columns.to(tl.int64)
        if MASKED:
            if PADDED:
                ok = ok & (tl.load(valid_base + columns, mask=ok, other=0) != 0)
            keys = tl.load(k_base + at[None, :] * k_row + d[:, None], mask=ok[None, :] & (d[:, None] < D), other=0.0)
        elif D == D_TILE:
            keys = tl.load(k_base + at[None, :] * k_row + d[:, None])
        else:
            keys = tl.load(k_base + at[None, :] * k_row + d[:, None], mask=d[:, None] < D, other=0.0)
        logits = tl.dot(q, keys, input_precision="ieee") * scale
        if MASKED:
            logits = tl.where(ok[None, :], logits, float("-inf"))
        if GROUP > 1:
            wanted = (entry[None, :] >> (inside[:, None] // BLOCK)) & 1
            logits = tl.where(wanted != 0, logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        # a finite stand-in while no key has been seen: -inf minus -inf is not a number
        anchor = tl.where(higher == float("-inf"), 0.0, higher) if MASKED or GROUP > 1 else higher
        probabilities = tl.exp2(logits - anchor[:, None])
        fade = tl.exp2(peak - anchor)
        total = total * fade + tl.sum(probabilities, 1)
        peak = higher
        if MASKED:
            values = tl.load(v_base + at[:, None] * v_row + d[None, :], mask=ok[:, None] & (d[None, :] < D), other=0.0)
        elif D == D_TILE:
            values = tl.load(v_base + at[:, None] * v_row + d[None, :])
        else:
            values = tl.load(v_base + at[:, None] * v_row + d[None, :], mask=d[None, :] < D, other=0.0)
        acc = tl.dot(probabilities.to(values.dtype), values, acc * fade[:, None], input_precision="ieee")
    return acc, total, peak


@triton.jit(
    do_not_specialize=["list_batch", "list_head", "list_row",
                       "count_batch", "count_head", "n_query", "length", "start"]
)  # fmt: skip
def _block_sparse_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, list_ptr, count_ptr, valid_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    list_batch, list_head, list_row, count_batch, count_head,
    n_query, length, start, heads, shared, scale,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    i = start // (BLOCK * GROUP) + tl.program_id(0) // PIECES
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    q_base = q_ptr + b * q_batch + h * q_head
    k_base = k_ptr + b * k_batch + (h // shared) * k_head
    v_base = v_ptr + b * v_batch + (h // shared) * v_head
    list_base = list_ptr + b * list_batch + h * list_head + i.to(tl.int64) * list_row
    kept = tl.load(count_ptr + b * count_batch + h * count_head + i)
    valid_base = valid_ptr + b * length if PADDED else valid_ptr

    inside = (tl.program_id(0) % PIECES) * ROWS + tl.arange(0, ROWS)
    rows = i * (BLOCK * GROUP) + inside - start
    row_ok = (inside < BLOCK * GROUP) & (rows >= 0) & (rows < n_query)
    d = tl.arange(0, D_TILE)
    ok = row_ok[:, None] & (d[None, :] < D)
    q = tl.load(q_base + rows[:, None].to(tl.int64) * q_row + d[None, :], mask=ok, other=0.0)

    acc = tl.zeros([ROWS, D_TILE], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    # only the last block can reach past the end, and only the last tile can lack blocks: masks are for those
    whole = 0 if PADDED else tl.maximum(kept - 1, 0) * BLOCK // KEYS
    acc, total, peak = _sweep(
        acc, total, peak, q, inside, k_base, v_base, k_row, v_row, valid_base, list_base, 0, whole, kept, length, scale,
        False, PADDED, D, D_TILE, BLOCK, GROUP, ROWS, KEYS,
    )  # fmt: skip
    acc, total, peak = _sweep(
        acc, total, peak, q, inside, k_base, v_base, k_row, v_row, valid_base, list_base, whole,
        tl.cdiv(kept * BLOCK, KEYS), kept, length, scale,
        True, PADDED, D, D_TILE, BLOCK, GROUP, ROWS, KEYS,
    )  # fmt: skip
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    out = out_ptr + b * out_batch + h * out_head + rows[:, None].to(tl.int64) * out_row + d[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=ok)
