"""Block scores on the GPU in one kernel: no T x T tensor, no float32 copy of q or k."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .launch import fits, on_device_of

LOG2_E = 1.4426950408889634
# rows and keys of a tile; with float32 inputs, a quarter of it fits the same registers
TILE, TILE_FLOAT32 = 128, 32
# shared memory, in bytes, that the sums over cells need in addition to the tiles, at most
SCRATCH = 8192


@dataclass(frozen=True)
class Tile:
    """What a program of the kernel holds.

    Args:
        rows: query rows, and keys, of a tile.
        stages: tiles of keys in flight.
        width: head size, padded to a power of two.
        itemsize: bytes of an element.
        held: the queries lie in registers, once they have been multiplied by an identity matrix.
    """

    rows: int
    stages: int
    width: int
    itemsize: int
    held: bool

    @property
    def shared_memory(self) -> int:
        """Bytes of it that a program needs."""
        rows = max(self.rows + self.width, self.stages * self.rows) if self.held else (1 + self.stages) * self.rows
        return rows * self.width * self.itemsize + SCRATCH


class _Padding(NamedTuple):
    """Which tokens are real, uint8 [B, T], and from where on all of them are, int32 [B]."""

    valid: Tensor
    real_from: Tensor

    @staticmethod
    def of(key_valid: Tensor) -> "_Padding":
        after = torch.arange(1, key_valid.shape[1] + 1, dtype=torch.int32, device=key_valid.device)
        return _Padding(key_valid.contiguous().view(torch.uint8), (after * ~key_valid).amax(-1))


@on_device_of
def block_scores_triton(
    q: Tensor, k: Tensor, *, block_size: int, key_valid: Tensor | None = None, lse: Tensor | None = None
) -> Tensor:
    """`block_scores` as a Triton kernel, for block sizes that 16 divides: one pass over the keys with the log-sum-exp
    given, two without.

    A program takes a tile of queries past tiles of keys, which hold whole cells, each of the largest power of two of
    tokens that divides a block. Larger blocks are summed from their cells, for one key head after the other, for cells
    may be many.
    """
    batch, heads, length, head_dim = q.shape
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    padding = None if key_valid is None else _Padding.of(key_valid)
    tile = _tile(head_dim, q.dtype, q.device)
    cell = min(tile.rows, block_size & -block_size)
    if cell == block_size:
        return _cell_scores(q, k, padding, lse, cell, tile)
    n_blocks = triton.cdiv(length, block_size)
    scores = torch.empty(batch, heads, n_blocks, n_blocks, device=q.device, dtype=torch.float32)
    group = heads // k.shape[1]
    for head in range(k.shape[1]):
        own = slice(head * group, (head + 1) * group)
        given = None if lse is None else lse[:, own]
        cells = _cell_scores(q[:, own], k[:, head : head + 1], padding, given, cell, tile)
        scores[:, own] = F.avg_pool2d(cells, block_size // cell, ceil_mode=True, divisor_override=1)
    return scores


def _cell_scores(q: Tensor, k: Tensor, padding: _Padding | None, lse: Tensor | None, cell: int, tile: Tile) -> Tensor:
    """Scores of cells, [B, Hq, nC, nC]."""
    batch, heads, length, head_dim = q.shape
    n_cells = triton.cdiv(length, cell)
    scores = torch.empty(batch, heads, n_cells, n_cells, device=q.device, dtype=torch.float32)
    _block_scores_kernel[(triton.cdiv(length, tile.rows), batch * heads)](
        q, k, None if lse is None else lse.contiguous(), *(padding or (None, None)), scores,
        *q.stride()[:3], *k.stride()[:3],
        length, n_cells, heads, heads // k.shape[1], head_dim**-0.5 * LOG2_E,
        GIVEN=lse is not None,
        PADDED=padding is not None,
        D=head_dim,
        D_TILE=tile.width,
        CELL=cell,
        TILE=tile.rows,
        HELD=tile.held,
        num_warps=8 if tile.rows == 128 else 4,
        num_stages=tile.stages,
        **_limits(tile, q.device),
    )  # fmt: skip
    return scores


def _tile(head_dim: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """The fastest on an H100, cut down until it fits."""
    width = max(16, triton.next_power_of_2(head_dim))
    held = dtype != torch.float32 and width <= TILE
    tile = Tile(TILE_FLOAT32 if dtype == torch.float32 else TILE, 3, width, dtype.itemsize, held)
    while not fits(tile.shared_memory, device) and (tile.rows, tile.stages) != (16, 1):
        if tile.stages > 1:
            tile = replace(tile, stages=tile.stages - 1)
        else:
            tile = replace(tile, rows=tile.rows // 2)
    return tile


def _limits(tile: Tile, device: torch.device) -> dict[str, int]:
    """So few registers a thread that two programs of 8 warps share a multiprocessor, where its memory holds two."""
    if device.type != "cuda" or torch.version.hip is not None:
        return {}
    together = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    return {"maxnreg": 128} if 2 * tile.shared_memory <= together else {}


@triton.jit
def _key_pointers(k_ptr, k_row, start, D_TILE: tl.constexpr, TILE: tl.constexpr):
    """A tile of keys, transposed, [D_TILE, TILE]."""
    rows = start + tl.arange(0, TILE)
    return k_ptr + rows[None, :].to(tl.int64) * k_row + tl.arange(0, D_TILE)[:, None]


@triton.jit
def _logits(
    q, pointers, left, scale,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Base-2 attention logits of a tile of queries and a tile of keys, of which MASKED reads the first `left`."""
    n = tl.arange(0, TILE)
    d = tl.arange(0, D_TILE)
    if MASKED:
        keys = tl.load(pointers, mask=(n < left)[None, :] & (d[:, None] < D), other=0.0)
    elif D == D_TILE:
        keys = tl.load(pointers)
    else:
        keys = tl.load(pointers, mask=d[:, None] < D, other=0.0)
    return tl.dot(q, keys, input_precision="ieee") * scale


@triton.jit
def _counted(valid_ptr, rows, length, PADDED: tl.constexpr):
    """Which rows are real tokens."""
    ok = rows < length
    if PADDED:
        ok = ok & (tl.load(valid_ptr + rows, mask=ok, other=0) != 0)
    return ok


@triton.jit
def _log_sum_exp(
    q, k_ptr, k_row, valid_ptr, length, scale,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Base-2 log-sum-exp of every row over all keys that count, inf if none does."""
    peak = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    pointers = _key_pointers(k_ptr, k_row, 0, D_TILE, TILE)
    for start in range(0, length, TILE):
        logits = _logits(q, pointers, length - start, scale, True, D, D_TILE, TILE)
        ok = _counted(valid_ptr, start + tl.arange(0, TILE), length, PADDED)
        logits = tl.where(ok[None, :], logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        # a finite stand-in while no valid key has been seen: -inf minus -inf is not a number
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(peak - anchor) + tl.sum(tl.exp2(logits - anchor[:, None]), 1)
        peak = higher
        pointers += TILE * k_row
    return tl.where(total > 0, peak + tl.log2(total), float("inf"))


@triton.jit
def _pool(
    q, lse, k_ptr, k_row, valid_ptr, out, first_cell, first, last, length, n_cells, scale,
    MASKED: tl.constexpr,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    CELL: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Scores of the key tiles first ... last - 1 for one tile of rows."""
    CELLS: tl.constexpr = TILE // CELL
    row_cell = tl.arange(0, CELLS)[:, None]
    pointers = _key_pointers(k_ptr, k_row, first * TILE, D_TILE, TILE)
    for j in range(first, last):
        logits = _logits(q, pointers, length - j * TILE, scale, MASKED, D, D_TILE, TILE)
        probabilities = tl.exp2(logits - lse[:, None])  # rows that do not count have lse inf: zeros
        if MASKED:
            ok = _counted(valid_ptr, j * TILE + tl.arange(0, TILE), length, PADDED)
            probabilities = tl.where(ok[None, :], probabilities, 0.0)
        mass = tl.sum(tl.sum(tl.reshape(probabilities, [CELLS, CELL, CELLS, CELL]), 3), 1)
        cell = j * CELLS + tl.arange(0, CELLS)[None, :]
        tl.store(out + row_cell * n_cells + cell, mass, mask=(first_cell + row_cell < n_cells) & (cell < n_cells))
        pointers += TILE * k_row


@triton.jit(do_not_specialize=["length", "n_cells"])
def _block_scores_kernel(
    q_ptr, k_ptr, lse_ptr, valid_ptr, real_from_ptr, out_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row,
    length, n_cells, heads, group, scale,
    GIVEN: tl.constexpr,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    CELL: tl.constexpr,
    TILE: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    k_ptr += b * k_batch + (h // group) * k_head
    if PADDED:
        valid_ptr += b * length
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    d = tl.arange(0, D_TILE)
    q = tl.load(
        q_ptr + b * q_batch + h * q_head + rows[:, None].to(tl.int64) * q_row + d[None, :],
        mask=(rows < length)[:, None] & (d[None, :] < D),
        other=0.0,
    )
    if HELD:
        # a product's result lies in registers, where the next product reads it faster than from shared memory
        q = tl.dot(q, (d[:, None] == d[None, :]).to(q.dtype)).to(q.dtype)
    if GIVEN:
        lse = tl.load(lse_ptr + (b * heads + h) * length + rows, mask=rows < length, other=0.0) * 1.4426950408889634
    else:
        lse = _log_sum_exp(q, k_ptr, k_row, valid_ptr, length, scale, PADDED, D, D_TILE, TILE)
    lse = tl.where(_counted(valid_ptr, rows, length, PADDED), lse, float("inf"))
    first_cell = tl.program_id(0) * (TILE // CELL)
    out = out_ptr + ((b * heads + h) * n_cells + first_cell) * n_cells
    # tiles without padding or ragged end need no mask
    lead, tail = 0, length // TILE
    if PADDED:
        lead = tl.minimum(tl.cdiv(tl.load(real_from_ptr + b), TILE), tail)
        _pool(
            q, lse, k_ptr, k_row, valid_ptr, out, first_cell, 0, lead, length, n_cells, scale,
            True, PADDED, D, D_TILE, CELL, TILE,
        )  # fmt: skip
    _pool(
        q, lse, k_ptr, k_row, valid_ptr, out, first_cell, lead, tail, length, n_cells, scale,
        False, PADDED, D, D_TILE, CELL, TILE,
    )  # fmt: skip
    _pool(
        q, lse, k_ptr, k_row, valid_ptr, out, first_cell, tail, tl.cdiv(length, TILE), length, n_cells, scale,
        True, PADDED, D, D_TILE, CELL, TILE,
    )  # fmt: skip
