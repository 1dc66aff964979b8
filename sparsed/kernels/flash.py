"""FlashAttention-4 (the optional package flash-attn-4), dense and over kept blocks.

It is called directly: FlexAttention's FLASH backend runs the same kernel, but has it compiled through torch.compile
first, which takes longer than all else here together.
"""

import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .launch import on_device_of


def flash_fault(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why FlashAttention-4 cannot run there, or None."""
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if torch.cuda.get_device_capability(device) < (9, 0):
        return "needs a GPU of compute capability 9.0 or newer"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    return _missing()


@functools.cache
def _missing() -> str | None:
    try:
        found = importlib.util.find_spec("flash_attn.cute")  # imports flash_attn, which can be broken in any way
        if found is None:
            return 'needs the package flash-attn-4: pip install ".[flash]"'
        _package()
    except Exception as error:
        return (
            f"needs the package flash-attn-4, but flash_attn does not import ({type(error).__name__}): "
            'pip install ".[flash]"'
        )
    return None


@functools.cache
def _package() -> tuple[Any, Any]:
    """The attention function and its tuple of block lists, imported on first use: that takes seconds."""
    _keep_compiled()
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    return flash_attn_func, BlockSparseTensorsTorch


def _keep_compiled() -> None:
    """Have the package keep its compiled kernels on disk, in a folder of the user's own.

    By default it keeps none. If only asked to, it keeps them where other users could put files of theirs.
    """
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsed" / "flash"
        cache.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or not writable
        return
    if "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED" not in os.environ:
        os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] = "1"
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(cache))


@on_device_of
def flash_dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Full attention: q [B, Hq, T, D] over k, v [B, Hkv, Tk, D] -> out [B, Hq, T, D], lse [B, Hq, T] float32."""
    attention, _ = _package()
    out, lse = attention(*(x.transpose(1, 2) for x in (q, k, v)), return_lse=True)[:2]
    return out.transpose(1, 2), lse


@on_device_of
def flash_block_sparse(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, indices: Tensor, block_shape: tuple[int, int]
) -> Tensor:
    """Attention over the listed key blocks.

    Args:
        q: [B, Hq, T, D]; k, v: [B, Hkv, Tk, D].
        counts: int32 [B, Hq, nQ], listed blocks of each query block.
        indices: int32 [B, Hq, nQ, width], ASCENDING: only the last listed block is cut off at the end of the keys.
        block_shape: tokens of a query block (64 or a multiple of 128) and of a key block (64 or 128).
    """
    attention, lists = _package()
    # all of them full blocks, none partial: no mask is evaluated
    kept = lists(torch.zeros_like(counts), indices, counts, indices, block_size=block_shape)
    out = attention(*(x.transpose(1, 2) for x in (q, k, v)), block_sparse_tensors=kept)[0]
    return out.transpose(1, 2)
