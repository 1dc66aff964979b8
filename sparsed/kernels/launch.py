"""What the launches of all kernels need: the right GPU, and tiles that fit it."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# query rows of a tile of the kernel for few queries, at most
FEW_ROWS = 64
# shared memory, in bytes, that a Triton kernel may need in addition to its tiles
RESERVE = 2048
# of a GPU of consumer make; an H100 has 227 KiB
CONSUMER_SHARED_MEMORY = 99 * 1024


def few_rows_tile(rows: int) -> int:
    """Query rows of a tile of the kernel for few queries, given their number."""
    return min(FEW_ROWS, max(16, 1 << (rows - 1).bit_length()))


def device_of(x: Tensor) -> AbstractContextManager:
    """Makes the GPU of x the current one; nothing for a tensor elsewhere."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def on_device_of(function: Callable) -> Callable:
    """Run a function on the GPU of its first argument: kernels launch on the current one, whatever they are given."""

    @functools.wraps(function)
    def guarded(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with device_of(x):
            return function(x, *args, **kwargs)

    return guarded


def fits(tile_bytes: int, device: torch.device) -> bool:
    """Whether tiles of that many bytes fit the shared memory of one program on the device."""
    available = CONSUMER_SHARED_MEMORY
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)  # whose stub lacks this one
        available = properties.shared_memory_per_block_optin
    return tile_bytes + RESERVE <= available
