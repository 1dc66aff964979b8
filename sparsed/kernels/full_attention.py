"""Full attention by the fastest exact kernel at hand, and the log-sum-exp that some of them give along with it."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from .accuracy import error_and_bound
from .flash import flash_dense, flash_fault
from .launch import on_device_of

# (query, key) pairs of a head from which on FlashAttention-4 gains more than its host code, slow to start, costs
FLASH_PAIRS = 4096**2


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
    if key_valid is not None and q.shape[1] != k.shape[1]:
        # with a mask and shared key heads together, torch could fall back to its T x T kernel: query heads that share
        # a key head become further queries of it
        together = (k.shape[1], q.shape[1] // k.shape[1])
        out, lse = full_attention(q.unflatten(1, together).flatten(2, 3), k, v, key_valid)
        split = (together[1], q.shape[2])
        return out.unflatten(2, split).flatten(1, 2), lse if lse is None else lse.unflatten(2, split).flatten(1, 2)
    mask = None if key_valid is None else key_valid[:, None, None, :]
    if q.is_cuda and not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))):
        long = q.shape[2] * k.shape[2] >= FLASH_PAIRS
        if mask is None and long and flash_fault(q.device, q.dtype) is None:
            if _flash_agrees(q.device, q.dtype, q.shape[1], k.shape[1], q.shape[3]):
                return flash_dense(q, k, v)
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
    """Whether FlashAttention-4 gives what float64 gives, out and log-sum-exp, on random data of a ragged length.

    It is asked for all queries, and for a few of them, as dense answer rows are.
    """
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, h, 333, head_dim, generator=generator, device=device, dtype=dtype)
        for h in (heads, kv_heads, kv_heads)
    )
    wide_q, wide_k, wide_v = (x.double().repeat_interleave(heads // x.shape[1], dim=1) for x in (q, k, v))
    logits = (wide_q @ wide_k.mT) * head_dim**-0.5
    exact = logits.softmax(-1) @ wide_v
    few = 300
    try:
        found = [flash_dense(q[:, :, first:], k, v) for first in (0, few)]
    except torch.OutOfMemoryError:  # says nothing about the kernel
        raise
    except Exception:  # a kernel that does not compile here: torch's own serves
        return False
    out, lse = (torch.cat(parts, dim=2) for parts in zip(*found, strict=True))
    dense = F.scaled_dot_product_attention(q, k, v, enable_gqa=heads != kv_heads)
    dense, exact, exact_lse = (torch.cat((x, x[:, :, few:]), dim=2) for x in (dense, exact, logits.logsumexp(-1)))
    error, allowed = error_and_bound(out, dense, exact, dtype)
    lse_error = (lse.double() - exact_lse).abs().max().item()
    return error <= allowed and lse_error < 1e-3
