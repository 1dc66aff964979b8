"""Triton comes with PyTorch's CUDA builds and is missing from others: whether a kernel written in it can run."""

import importlib.util

import torch
from torch import Tensor

if importlib.util.find_spec("triton"):
    from . import elementwise_triton
    from .block_scores_triton import block_scores_triton
    from .block_sparse_triton import block_sparse_attention
else:
    block_scores_triton = block_sparse_attention = elementwise_triton = None


def usable(x: Tensor) -> bool:
    """Whether a Triton kernel can take x and no gradient is wanted of it."""
    return elementwise_triton is not None and x.is_cuda and not (x.requires_grad and torch.is_grad_enabled())
