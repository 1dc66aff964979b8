"""Full attention by the fastest exact kernel at hand, and the log-sum-exp that some of them give along with it."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from .accuracy import error_and_bound
from .availability import few_queries_attention, usable
from .flash import flash_dense, flash_fault
from .launch import FEW_ROWS, few_rows_tile, on_device_of

# (query, key) pairs of a head from which on FlashAttention-4 gains more than its host code, slow to start, costs
FLASH_PAIRS = 4096**2
# the kernels by name: this package's for few queries, FlashAttention-4, torch's own
SPLIT, FLASH, TORCH = "split", "flash", "torch"


def full_attention(q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Bidirectional attention, scale 1/sqrt(D).

    Args:
        q: [B, Hq, T, D].
        k, v: [B, Hkv, Tk, D], Hkv dividing Hq: query head h reads key head h // (Hq // Hkv).
        key_valid: bool [B, Tk], False where a key is padding; None if every key is real.

    Returns:
        [B, Hq, T, D], and the log-sum-exp of every query's scaled logits, [B, Hq, T] float32, or None where the kernel
        that ran does not give it.
    """
    kernel = full_attention_kernel(q, k, v, key_valid is not None)
    if kernel == SPLIT:
        return few_queries_attention(q, k, v, key_valid), None
    if kernel == FLASH:
        return flash_dense(q, k, v)
    if key_valid is not None and q.shape[1] != k.shape[1]:
        # with a mask and shared key heads together, torch could fall back to its T x T kernel: query heads that share
        # a key head become further queries of it
        together = (k.shape[1], q.shape[1] // k.shape[1])
        out, lse = _torch(q.unflatten(1, together).flatten(2, 3), k, v, key_valid)
        split = (together[1], q.shape[2])
        return out.unflatten(2, split).flatten(1, 2), lse if lse is None else lse.unflatten(2, split).flatten(1, 2)
    return _torch(q, k, v, key_valid)


def full_attention_kernel(q: Tensor, k: Tensor, v: Tensor, padded: bool) -> str:
    """Which kernel `full_attention` takes for such tensors, by their shapes: SPLIT, FLASH or TORCH."""
    if not q.is_cuda or _wants_gradient(q, k, v):
        return TORCH
    shapes = q.shape[1], k.shape[1], q.shape[3]
    if _few(q, k) and usable(q):
        tile = few_rows_tile(q.shape[1] // k.shape[1] * q.shape[2])
        if _split_agrees(q.device, q.dtype, *shapes, padded, tile):
            return SPLIT
    long = q.shape[2] * k.shape[2] >= FLASH_PAIRS
    if not padded and long and flash_fault(q.device, q.dtype) is None and _flash_agrees(q.device, q.dtype, *shapes):
        return FLASH
    return TORCH


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _few(q: Tensor, k: Tensor) -> bool:
    """Whether the queries are fewer than the keys, and so few that tiles of them leave a multiprocessor without one."""
    kv_heads = k.shape[1]
    tiles = q.shape[0] * kv_heads * -(-q.shape[1] // kv_heads * q.shape[2] // FEW_ROWS)
    return q.shape[2] < k.shape[2] and tiles < torch.cuda.get_device_properties(q.device).multi_processor_count


def _torch(q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """By torch's own kernels; k and v have as many heads as q if there is padding."""
    mask = None if key_valid is None else key_valid[:, None, None, :]
    if q.is_cuda and not _wants_gradient(q, k, v):
        return _torch_with_lse(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]), None


@on_device_of
def _torch_with_lse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The kernel that `scaled_dot_product_attention` would choose itself, asked for its log-sum-exp.

    Args:
        mask: bool [B, 1, 1, Tk], with which k and v have as many heads as q.
    """
    shared = q.shape[1] != k.shape[1]
    choice = torch._fused_sdp_choice(q, k, v, attn_mask=mask, enable_gqa=shared)
    bias = None if mask is None else _additive(mask, q.dtype)
    if choice == SDPBackend.CUDNN_ATTENTION.value:
        out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, bias, True)[:2]
        return out, lse.squeeze(-1)
    if choice == SDPBackend.FLASH_ATTENTION.value and bias is None and q.shape[-1] % 8 == 0:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
        return out, lse[..., : q.shape[2]]
    if choice == SDPBackend.EFFICIENT_ATTENTION.value and bias is not None:
        bias = bias.expand(-1, q.shape[1], q.shape[2], -1)
        out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[:2]
        return out, lse[..., : q.shape[2]]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=shared), None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where the mask is True and -inf elsewhere, in rows that begin at multiples of 16 elements."""
    bias = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
    return F.pad(bias, (0, -mask.shape[-1] % 16))[..., : mask.shape[-1]]


@functools.cache
def _flash_agrees(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether FlashAttention-4 gives what float64 gives, out and log-sum-exp.

    It is asked for all queries, and for a few of them, as dense answer rows are.
    """
    q, k, v = _sample(device, dtype, heads, kv_heads, head_dim)
    found = _tried(lambda: [flash_dense(q[:, :, first:], k, v) for first in (0, FEW)])
    if found is None:
        return False
    out, lse = (torch.cat(parts, dim=2) for parts in zip(*found, strict=True))
    exact, exact_lse = (torch.cat((x, x[:, :, FEW:]), dim=2) for x in _exact(q, k, v))
    dense = F.scaled_dot_product_attention(q, k, v, enable_gqa=heads != kv_heads)
    error, allowed = error_and_bound(out, torch.cat((dense, dense[:, :, FEW:]), dim=2), exact, dtype)
    lse_error = (lse.double() - exact_lse).abs().max().item()
    return error <= allowed and lse_error < 1e-3


@functools.cache
def _split_agrees(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, padded: bool, tile: int
) -> bool:
    """Whether the kernel for few queries gives what float64 gives, in tiles of that many rows.

    Args:
        padded: whether the first keys are padding.
    """
    q, k, v = _sample(device, dtype, heads, kv_heads, head_dim)
    pads = LENGTH // 2 if padded else 0
    # as many as fill one smaller tile; of the largest there may be several
    queries = LENGTH - FEW if tile == FEW_ROWS else max(1, tile * kv_heads // heads)
    q, valid = q[:, :, -queries:], (torch.arange(LENGTH, device=device) >= pads)[None]
    out = _tried(lambda: few_queries_attention(q, k, v, valid if padded else None))
    if out is None:
        return False
    k, v = k[:, :, pads:], v[:, :, pads:]
    dense = F.scaled_dot_product_attention(q, k, v, enable_gqa=heads != kv_heads)
    error, allowed = error_and_bound(out, dense, _exact(q, k, v)[0], dtype)
    return error <= allowed


# keys of the random data on which kernels are checked, a ragged number, and the query from which on they are a few
LENGTH, FEW = 333, 300


def _sample(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> Iterator[Tensor]:
    """Random q [1, heads, LENGTH, head_dim], k and v [1, kv_heads, LENGTH, head_dim]."""
    generator = torch.Generator(device).manual_seed(0)
    for count in (heads, kv_heads, kv_heads):
        yield torch.randn(1, count, LENGTH, head_dim, generator=generator, device=device, dtype=dtype)


def _exact(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention in float64, and the log-sum-exp of its logits."""
    q, k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (q, k, v))
    logits = (q @ k.mT) * q.shape[-1] ** -0.5
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


def _tried(kernel: Callable[[], Any]) -> Any:
    """What the kernel gives; None if it does not compile or run here, so that torch's own serves."""
    try:
        return kernel()
    except torch.OutOfMemoryError:  # says nothing about the kernel
        raise
    except Exception:
        return None
