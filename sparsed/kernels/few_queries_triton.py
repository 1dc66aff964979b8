"""Full attention of few queries over many keys: the keys are split among programs, whose parts are put together."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import RESERVE, few_rows_tile, fits, on_device_of

LOG2_E = 1.4426950408889634
# keys of a tile, tiles in flight and warps: with FEW_ROWS, the fastest on an H200
KEYS, STAGES, WARPS = 64, 3, 4
# splits at most, a power of two, and keys of one at least: what many short parts cost is more than what they fill
MOST_SPLITS, SHORTEST = 32, 256


@on_device_of
def few_queries_attention(q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor | None = None) -> Tensor:
    """Bidirectional attention, scale 1/sqrt(D), for so few queries that they would not fill the GPU by themselves.

    Query heads that share a key head are taken together, so that its keys are read once. What is launched depends on
    shapes only: a CUDA graph of it serves whatever the tensors hold.

    Args:
        q: [B, Hq, n, D].
        k, v: [B, Hkv, T, D], Hkv dividing Hq: query head h reads key head h // (Hq // Hkv).
        key_valid: bool [B, T], False where a key is padding; None if every key is real.

    Returns:
        [B, Hq, n, D]; zeros for a query without any valid key.
    """
    batch, heads, n_query, head_dim = q.shape
    kv_heads, length = k.shape[1:3]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    d_tile = max(16, triton.next_power_of_2(head_dim))
    shared = heads // kv_heads
    rows, keys, stages = _tile(shared * n_query, d_tile * q.element_size(), q.device)
    tiles = triton.cdiv(shared * n_query, rows)
    held = (rows + 2 * keys * stages) * d_tile * q.element_size()
    chunk = _chunk(length, batch * kv_heads * tiles, keys, held, q.device)
    splits = triton.cdiv(length, chunk)
    described = _describable(k, keys) and _describable(v, keys)
    parts = q.new_empty(splits, batch, heads, n_query, head_dim, dtype=torch.float32)
    weights = q.new_empty(splits, batch, heads, n_query, dtype=torch.float32)
    _part_kernel[(splits, tiles, batch * kv_heads)](
        q, *((_described(x, keys) for x in (k, v)) if described else (k, v)),
        None if key_valid is None else key_valid.contiguous().view(torch.uint8), parts, weights,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        n_query, length, chunk, kv_heads, head_dim**-0.5 * LOG2_E,
        PADDED=key_valid is not None,
        DESCRIBED=described,
        SHARED=shared,
        D=head_dim,
        D_TILE=d_tile,
        ROWS=rows,
        KEYS=keys,
        num_warps=WARPS,
        num_stages=stages,
    )  # fmt: skip
    out = torch.empty(batch, n_query, heads, head_dim, device=q.device, dtype=q.dtype).transpose(1, 2)
    _join_kernel[(batch * heads * n_query,)](
        parts, weights, out, *out.stride()[:3], heads, n_query, splits,
        D=head_dim,
        D_TILE=d_tile,
        SPLITS=MOST_SPLITS,  # whatever the length, so that none compiles again
        num_warps=2,
    )  # fmt: skip
    return out


def _tile(rows: int, row_bytes: int, device: torch.device) -> tuple[int, int, int]:
    """Query rows and keys of a tile, and tiles in flight, cut down to what fits the device's shared memory."""
    tile, keys, stages = few_rows_tile(rows), KEYS, STAGES
    while not fits((tile + 2 * keys * stages) * row_bytes, device) and (keys, stages) != (16, 1):
        if stages > 1:
            stages -= 1
        else:
            keys //= 2
    return tile, keys, stages


def _chunk(length: int, programs: int, keys: int, held: int, device: torch.device) -> int:
    """Keys of a split, in whole tiles: with the splits, of `programs` programs each, that leave least of the GPU idle.

    Args:
        held: bytes of shared memory of a program, which limits how many run at once.
    """
    slots = 16  # interpreted, as on a small GPU
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)  # whose stub lacks this one
        at_once = max(1, properties.shared_memory_per_multiprocessor // (held + RESERVE))
        slots = properties.multi_processor_count * at_once

    def filled(splits: int) -> float:
        launched = programs * splits
        return launched / (triton.cdiv(launched, slots) * slots)

    most = max(1, min(MOST_SPLITS, length // SHORTEST))
    # the fewest of those that fill as well, but for a hundredth
    best = max(map(filled, range(1, most + 1)))
    splits = next(count for count in range(1, most + 1) if filled(count) >= best - 0.01)
    return triton.cdiv(triton.cdiv(length, splits), keys) * keys


def _describable(x: Tensor, keys: int) -> bool:
    """Whether Hopper's copy engine can fetch tiles of x, by a tenth faster than threads do."""
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (9, 0):
        return False
    aligned = x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])
    width = x.shape[3] * x.element_size()
    return x.element_size() == 2 and aligned and width in (32, 64, 128, 256)


def _described(x: Tensor, keys: int) -> TensorDescriptor:
    """x [B, H, T, D] in tiles of `keys` tokens of a head."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, keys, x.shape[3]])


@triton.jit
def _sweep(
    acc, total, peak, q, k_in, v_in, b, kv_head, k_row, v_row, valid_base, first, last, length, scale,
    MASKED: tl.constexpr,
    PADDED: tl.constexpr,
    DESCRIBED: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys first ... last - 1."""
    d = tl.arange(0, D_TILE)
    n = tl.arange(0, KEYS)
    for begin in range(first, last, KEYS):
        columns = begin + n
        ok = columns < length
        at = columns.to(tl.int64)
        if MASKED and PADDED:
            ok = ok & (tl.load(valid_base + columns, mask=ok, other=0) != 0)
        if DESCRIBED:
            keys = tl.trans(tl.reshape(k_in.load([b, kv_head, begin, 0]), (KEYS, D_TILE)))
        elif MASKED:
            keys = tl.load(k_in + at[None, :] * k_row + d[:, None], mask=ok[None, :] & (d[:, None] < D), other=0.0)
        elif D == D_TILE:
            keys = tl.load(k_in + at[None, :] * k_row + d[:, None])
        else:
            keys = tl.load(k_in + at[None, :] * k_row + d[:, None], mask=d[:, None] < D, other=0.0)
        logits = tl.dot(q, keys, input_precision="ieee") * scale
        if MASKED:
            logits = tl.where(ok[None, :], logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        # a finite stand-in while no key has been seen: -inf minus -inf is not a number
        anchor = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
        probabilities = tl.exp2(logits - anchor[:, None])
        fade = tl.exp2(peak - anchor)
        total = total * fade + tl.sum(probabilities, 1)
        peak = higher
        if DESCRIBED:
            values = tl.reshape(v_in.load([b, kv_head, begin, 0]), (KEYS, D_TILE))
        elif MASKED:
            values = tl.load(v_in + at[:, None] * v_row + d[None, :], mask=ok[:, None] & (d[None, :] < D), other=0.0)
        elif D == D_TILE:
            values = tl.load(v_in + at[:, None] * v_row + d[None, :])
        else:
            values = tl.load(v_in + at[:, None] * v_row + d[None, :], mask=d[None, :] < D, other=0.0)
        acc = tl.dot(probabilities.to(values.dtype), values, acc * fade[:, None], input_precision="ieee")
    return acc, total, peak


@triton.jit(do_not_specialize=["n_query", "length", "chunk"])
def _part_kernel(
    q_ptr, k_in, v_in, valid_ptr, part_ptr, weight_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    n_query, length, chunk, kv_heads, scale,
    PADDED: tl.constexpr,
    DESCRIBED: tl.constexpr,
    SHARED: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Attention over one split of the keys, and the log2 of what the split's keys weigh."""
    split = tl.program_id(0)
    b = (tl.program_id(2) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(2) % kv_heads).to(tl.int64)
    # the rows of a key head: its query heads' queries, one head after the other
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_ok = rows < SHARED * n_query
    head = kv_head * SHARED + rows // n_query
    d = tl.arange(0, D_TILE)
    ok = row_ok[:, None] & (d[None, :] < D)
    q_at = q_ptr + b * q_batch + head * q_head + (rows % n_query).to(tl.int64) * q_row
    q = tl.load(q_at[:, None] + d[None, :], mask=ok, other=0.0)
    if not DESCRIBED:
        k_in += b * k_batch + kv_head * k_head
        v_in += b * v_batch + kv_head * v_head
    valid_base = valid_ptr + b * length if PADDED else valid_ptr

    acc = tl.zeros([ROWS, D_TILE], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    first, last = split * chunk, tl.minimum((split + 1) * chunk, length)
    # only the last tile can reach past the end: masks are for it, and for padding
    whole = first if PADDED else first + (last - first) // KEYS * KEYS
    acc, total, peak = _sweep(
        acc, total, peak, q, k_in, v_in, b.to(tl.int32), kv_head.to(tl.int32), k_row, v_row, valid_base, first, whole,
        length, scale, False, PADDED, DESCRIBED, D, D_TILE, KEYS,
    )  # fmt: skip
    acc, total, peak = _sweep(
        acc, total, peak, q, k_in, v_in, b.to(tl.int32), kv_head.to(tl.int32), k_row, v_row, valid_base, whole, last,
        length, scale, True, PADDED, DESCRIBED, D, D_TILE, KEYS,
    )  # fmt: skip
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    # where a row lies among those of all splits, batch rows and heads
    batches = tl.num_programs(2) // kv_heads
    place = ((split * batches + b) * kv_heads * SHARED + head) * n_query + rows % n_query
    tl.store(part_ptr + place[:, None] * D + d[None, :], acc, mask=ok)
    tl.store(weight_ptr + place, peak + tl.log2(total), mask=row_ok)


@triton.jit(do_not_specialize=["heads", "n_query", "splits"])
def _join_kernel(
    part_ptr, weight_ptr, out_ptr, out_batch, out_head, out_row, heads, n_query, splits,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """One query's parts, each by what its keys weigh."""
    row = tl.program_id(0).to(tl.int64)
    total_rows = tl.num_programs(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, D_TILE)
    there = split < splits
    weight = tl.load(weight_ptr + split * total_rows + row, mask=there, other=float("-inf"))
    highest = tl.max(weight, 0)
    share = tl.exp2(weight - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(share, 0)
    at = (split * total_rows + row)[:, None] * D + d[None, :]
    parts = tl.load(part_ptr + at, mask=there[:, None] & (d[None, :] < D), other=0.0)
    out = tl.sum(parts * share[:, None], 0) / tl.where(total > 0, total, 1.0)
    b, h, n = row // (heads * n_query), row // n_query % heads, row % n_query
    tl.store(out_ptr + b * out_batch + h * out_head + n * out_row + d, out.to(out_ptr.dtype.element_ty), mask=d < D)
