"""Times between points of a device's work, taken without holding it up."""

import time
from typing import Any

import torch

from .run import synchronize


class Laps:
    """The seconds from each mark to the next.

    On a CUDA device a mark is an event in its queue, and the host waits for the mark before it, not for this one. So it
    prepares one lap while the device works on another, and knows a lap's time one lap later. Other devices are waited
    for at every mark.

    Attributes:
        ahead: whether the host works while the device does; what it does then takes no lap longer.
        finished: seconds of the laps that are known to be over.
    """

    def __init__(self, device: torch.device):
        self.device, self.ahead = device, device.type == "cuda"
        self.finished: list[float] = []
        self._marks: list[Any] = []  # events, or times of the host's clock
        self._off: list[float] = []  # seconds not counted, of each lap that has begun

    def mark(self) -> None:
        """End a lap, if one has begun, and begin the next."""
        if self.ahead:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self._finish(len(self._marks))
            self._marks.append(event)
        else:
            synchronize(self.device)
            self._marks.append(time.perf_counter())
            self._finish(len(self._marks))
        self._off.append(0.0)

    def deduct(self, seconds: float) -> None:
        """Take seconds out of the lap that has begun."""
        self._off[-1] += seconds

    @property
    def seconds(self) -> list[float]:
        """Of all laps; waits for the last mark."""
        self._finish(len(self._marks))
        return self.finished

    def _finish(self, count: int) -> None:
        """Wait for the first `count` marks, and note the laps between them."""
        for lap in range(len(self.finished), count - 1):
            begun, over = self._marks[lap : lap + 2]
            if self.ahead:
                over.synchronize()
                seconds = begun.elapsed_time(over) / 1e3
            else:
                seconds = over - begun
            self.finished.append(seconds - self._off[lap])
