"""A number that a device computes, on its way to the host."""

import torch
from torch import Tensor


class Arriving:
    """A tensor's copy on the host. It is asked for at once and waited for later, while the device goes on.

    Args:
        x: of any device.
    """

    def __init__(self, x: Tensor):
        self._copy, self._there = x, None
        if x.is_cuda:
            stream = torch.cuda.current_stream(x.device)
            self._copy = x.to("cpu", non_blocking=True)
            self._there = stream.record_event()

    def value(self) -> Tensor:
        """The tensor, once it is there."""
        if self._there is not None:
            self._there.synchronize()
        return self._copy
