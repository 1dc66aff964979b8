"""Launching on the tensors' own GPU: Triton and FlashAttention-4 launch on the current one, whatever they are given."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def device_of(x: Tensor) -> AbstractContextManager:
    """Makes the GPU of x the current one; nothing for a tensor elsewhere."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def on_device_of(function: Callable) -> Callable:
    """Run a function on the GPU of its first argument."""

    @functools.wraps(function)
    def guarded(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with device_of(x):
            return function(x, *args, **kwargs)

    return guarded
