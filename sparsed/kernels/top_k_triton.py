"""The highest scores of every row on the GPU, in one kernel instead of some thirty of plain torch."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import on_device_of

# rows of a program, and scores of each that it reads at once
ROWS, CHUNK = 8, 256


@on_device_of
def highest_places_triton(scores: Tensor, parts: tuple[slice, ...], keep: tuple[int, ...], places: Tensor) -> None:
    """`selection.highest_places` as a Triton kernel; other lengths and budgets compile nothing."""
    heads, queries, keys = scores.shape
    assert places.is_contiguous() and parts[-1].stop == keys
    rows, border = heads * queries, parts[0].stop
    first, second = (*keep, 0)[:2]
    _highest_places_kernel[(triton.cdiv(rows, ROWS),)](
        scores.contiguous(), places, rows, keys, border, first, second, places.shape[-1], ROWS=ROWS, CHUNK=CHUNK
    )


@triton.jit
def _ranked(scores_ptr, start, stop, CHUNK: tl.constexpr):
    """A chunk of every row's scores, as unsigned numbers in the same order, and which of it lie before `stop`."""
    columns = start + tl.arange(0, CHUNK)
    inside = (columns < stop)[None, :]
    scores = tl.load(scores_ptr + columns[None, :], mask=inside, other=0.0) + 0.0  # there is one zero then
    scores = tl.where(scores == scores, scores, float("-inf"))
    bits = scores.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True), inside


@triton.jit
def _reach(scores_ptr, start, stop, limit, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """How many scores of every row reach its limit."""
    found = tl.zeros([ROWS], tl.int32)
    for first in range(start, stop, CHUNK):
        ranked, inside = _ranked(scores_ptr, first, stop, CHUNK)
        found += tl.sum(((ranked >= limit[:, None]) & inside).to(tl.int32), 1)
    return found


@triton.jit(do_not_specialize=["rows", "keys", "border", "first", "second", "width"])
def _highest_places_kernel(
    scores_ptr, places_ptr, rows, keys, border, first, second, width, ROWS: tl.constexpr, CHUNK: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = (row < rows)[:, None]
    row = tl.minimum(row, rows - 1).to(tl.int64)[:, None]  # those behind the last row are the last, and write nothing
    scores_ptr += row * keys
    places_ptr += row * width
    written = tl.zeros([ROWS], tl.int32)
    last = tl.zeros([ROWS], tl.int32)
    for part in range(2):
        begin, stop = tl.where(part == 0, 0, border), tl.where(part == 0, border, keys)
        keep = tl.where(part == 0, first, second)
        # the largest number that as many scores reach as are kept, bit after bit
        limit = tl.zeros([ROWS], tl.uint32)
        bit = tl.full([ROWS], 1 << 31, tl.uint32)
        for _ in range(32):
            higher = limit | bit
            limit = tl.where(_reach(scores_ptr, begin, stop, higher, ROWS, CHUNK) >= keep, higher, limit)
            bit = bit >> 1
        room = keep - _reach(scores_ptr, begin, stop, limit + 1, ROWS, CHUNK)  # for those that equal the limit
        for start in range(begin, stop, CHUNK):
            ranked, inside = _ranked(scores_ptr, start, stop, CHUNK)
            level = ((ranked == limit[:, None]) & inside).to(tl.int32)
            above = ((ranked > limit[:, None]) & inside).to(tl.int32)
            chosen = above | (level & (tl.cumsum(level, 1) <= room[:, None]).to(tl.int32))
            place = written[:, None] + tl.cumsum(chosen, 1) - 1
            columns = start + tl.arange(0, CHUNK)[None, :]
            tl.store(places_ptr + place, columns + tl.zeros_like(place), mask=(chosen != 0) & live)
            room -= tl.sum(level, 1)
            written += tl.sum(chosen, 1)
            last = tl.maximum(last, tl.max(tl.where(chosen != 0, columns, 0), 1))
    for start in range(first + second, width, CHUNK):
        rest = start + tl.arange(0, CHUNK)[None, :]
        tl.store(places_ptr + rest, last[:, None] + tl.zeros_like(rest), mask=(rest < width) & live)
