"""Where the kernels written in Triton can run: it comes with PyTorch's CUDA builds and is missing elsewhere."""

import functools
import importlib.util

import torch
from torch import Tensor

if importlib.util.find_spec("triton"):
    from . import elementwise_triton
    from .block_scores_triton import block_scores_triton
    from .block_sparse_triton import block_sparse_attention
    from .few_queries_triton import few_queries_attention
    from .top_k_triton import highest_places_triton
else:
    block_scores_triton = block_sparse_attention = highest_places_triton = None  # type: ignore[assignment]
    elementwise_triton = few_queries_attention = None  # type: ignore[assignment]


@functools.cache
def triton_fault(device: torch.device) -> str | None:
    """Why Triton kernels cannot run there, or None."""
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if elementwise_triton is None:
        return "needs the package triton"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    return None


def usable(*tensors: Tensor) -> bool:
    """Whether a Triton kernel can take tensors of one device, and no gradient is wanted of any."""
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return triton_fault(tensors[0].device) is None and not wanted
