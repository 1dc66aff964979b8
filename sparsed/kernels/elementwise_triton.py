"""The functions of `elementwise` as Triton kernels: each reads and writes its tensors once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on_device_of


@on_device_of
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`elementwise.rms_norm`, one program a row."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _rms_norm_kernel[(x.numel() // x.shape[-1],)](x, weight, out, eps, **_row(x))
    return out


@on_device_of
def add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`elementwise.add_rms_norm`, one program a row."""
    x, update = x.contiguous(), update.contiguous()
    total, out = torch.empty_like(x), torch.empty_like(x)
    _add_rms_norm_kernel[(x.numel() // x.shape[-1],)](x, update, weight, total, out, eps, **_row(x))
    return total, out


def _row(x: Tensor) -> dict[str, int]:
    """One program a row: its width, the power of two that covers it, and warps for it."""
    tile = triton.next_power_of_2(x.shape[-1])
    return {"WIDTH": x.shape[-1], "TILE": tile, "num_warps": 8 if tile >= 2048 else 4}


@on_device_of
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`elementwise.rotate`; the result is laid out in memory as x is."""
    batch, heads, length, head_dim = x.shape
    rows = 16
    # tables are read once for all heads, unless the sequence is too short to fill the GPU that way
    together = heads if length >= 4096 else 1
    out = torch.empty_like(x)
    _rotate_kernel[(triton.cdiv(length, rows), heads // together, batch)](
        x, cos, sin, out, *x.stride()[:3], *out.stride()[:3], cos.stride(0) if len(cos) > 1 else 0, length, together,
        HALF=head_dim // 2,
        HALF_TILE=triton.next_power_of_2(head_dim // 2),
        ROWS=rows,
        num_warps=4,
        enable_fp_fusion=False,  # torch rounds the products before it adds them
    )  # fmt: skip
    return out


@on_device_of
def store_rotated(k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """`elementwise.store_rotated`, keys and values in one launch."""
    batch, heads, rows, head_dim = k.shape
    tile = 16
    _store_rotated_kernel[(triton.cdiv(rows, tile), heads, batch)](
        k, v, cos, sin, slots, keys, values,
        *k.stride()[:3], *v.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
        cos.stride(0) if len(cos) > 1 else 0, rows,
        HALF=head_dim // 2,
        HALF_TILE=triton.next_power_of_2(head_dim // 2),
        ROWS=tile,
        num_warps=4,
        enable_fp_fusion=False,  # as `rotate`
    )  # fmt: skip


@on_device_of
def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """`elementwise.silu_product` in tiles of the flat tensors."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    tile = 4096
    _silu_product_kernel[(triton.cdiv(gate.numel(), tile),)](gate, up, out, gate.numel(), TILE=tile, num_warps=8)
    return out


@triton.jit
def _normed(x, weight_ptr, at, ok, eps, WIDTH: tl.constexpr):
    wide = x.to(tl.float32)
    normed = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + eps)).to(x.dtype)
    return (tl.load(weight_ptr + at, mask=ok, other=0.0) * normed).to(x.dtype)


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, out_ptr, eps, WIDTH: tl.constexpr, TILE: tl.constexpr):
    at = tl.arange(0, TILE)
    ok = at < WIDTH
    start = tl.program_id(0).to(tl.int64) * WIDTH
    x = tl.load(x_ptr + start + at, mask=ok, other=0.0)
    tl.store(out_ptr + start + at, _normed(x, weight_ptr, at, ok, eps, WIDTH), mask=ok)


@triton.jit
def _add_rms_norm_kernel(
    x_ptr, update_ptr, weight_ptr, total_ptr, out_ptr, eps, WIDTH: tl.constexpr, TILE: tl.constexpr
):
    at = tl.arange(0, TILE)
    ok = at < WIDTH
    start = tl.program_id(0).to(tl.int64) * WIDTH
    x = tl.load(x_ptr + start + at, mask=ok, other=0.0)
    update = tl.load(update_ptr + start + at, mask=ok, other=0.0)
    total = (x.to(tl.float32) + update.to(tl.float32)).to(x.dtype)
    tl.store(total_ptr + start + at, total, mask=ok)
    tl.store(out_ptr + start + at, _normed(total, weight_ptr, at, ok, eps, WIDTH), mask=ok)


@triton.jit
def _turn(x_at, out_at, cos, sin, ok, HALF: tl.constexpr):
    """Rotate the two halves of some rows' heads."""
    # the tables' dtype is where products and sums round: float32, or the model's own
    first = tl.load(x_at, mask=ok, other=0.0).to(cos.dtype)
    second = tl.load(x_at + HALF, mask=ok, other=0.0).to(cos.dtype)
    turned_first = (first * cos).to(cos.dtype) - (second * sin).to(cos.dtype)
    turned_second = (second * cos).to(cos.dtype) + (first * sin).to(cos.dtype)
    tl.store(out_at, turned_first.to(out_at.dtype.element_ty), mask=ok)
    tl.store(out_at + HALF, turned_second.to(out_at.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["length", "together"])
def _rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, x_batch, x_head, x_row, out_batch, out_head, out_row, table_batch,
    length, together,
    HALF: tl.constexpr,
    HALF_TILE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, HALF_TILE)
    ok = (rows < length)[:, None] & (d < HALF)[None, :]
    table = b * table_batch + rows[:, None].to(tl.int64) * (2 * HALF) + d[None, :]
    cos = tl.load(cos_ptr + table, mask=ok, other=0.0)
    sin = tl.load(sin_ptr + table, mask=ok, other=0.0)
    x_at = x_ptr + b * x_batch + (tl.program_id(1) * together).to(tl.int64) * x_head
    x_at += rows[:, None].to(tl.int64) * x_row + d[None, :]
    out_at = out_ptr + b * out_batch + (tl.program_id(1) * together).to(tl.int64) * out_head
    out_at += rows[:, None].to(tl.int64) * out_row + d[None, :]
    for _ in range(together):
        _turn(x_at, out_at, cos, sin, ok, HALF)
        x_at += x_head
        out_at += out_head


@triton.jit(do_not_specialize=["length"])
def _store_rotated_kernel(
    k_ptr, v_ptr, cos_ptr, sin_ptr, slot_ptr, key_ptr, value_ptr,
    k_batch, k_head, k_row, v_batch, v_head, v_row,
    key_batch, key_head, key_row, value_batch, value_head, value_row,
    table_batch, length,
    HALF: tl.constexpr,
    HALF_TILE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, HALF_TILE)
    ok = (rows < length)[:, None] & (d < HALF)[None, :]
    slots = tl.load(slot_ptr + rows, mask=rows < length, other=0)
    rows = rows.to(tl.int64)
    table = b * table_batch + rows[:, None] * (2 * HALF) + d[None, :]
    cos = tl.load(cos_ptr + table, mask=ok, other=0.0)
    sin = tl.load(sin_ptr + table, mask=ok, other=0.0)
    key_at = key_ptr + b * key_batch + h * key_head + slots[:, None] * key_row + d[None, :]
    _turn(k_ptr + b * k_batch + h * k_head + rows[:, None] * k_row + d[None, :], key_at, cos, sin, ok, HALF)
    v_at = v_ptr + b * v_batch + h * v_head + rows[:, None] * v_row + d[None, :]
    value_at = value_ptr + b * value_batch + h * value_head + slots[:, None] * value_row + d[None, :]
    tl.store(value_at, tl.load(v_at, mask=ok, other=0.0), mask=ok)
    tl.store(value_at + HALF, tl.load(v_at + HALF, mask=ok, other=0.0), mask=ok)


@triton.jit  # specialised on a size divisible by 16: only then the loads are wide
def _silu_product_kernel(gate_ptr, up_ptr, out_ptr, size, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    ok = at < size
    gate = tl.load(gate_ptr + at, mask=ok, other=0.0)
    up = tl.load(up_ptr + at, mask=ok, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    tl.store(out_ptr + at, (silu * up).to(gate.dtype), mask=ok)
