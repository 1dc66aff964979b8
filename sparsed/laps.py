"""Times between points of a device's work, taken without holding it up."""

import time
from typing import Any

import torch

from .run import synchronize


class Laps:
    """The seconds from each mark to the next.

    On a CUDA device a point is an event in its queue, and at a mark the host waits for the mark before, not for this
    one. So it prepares one lap while the device works on another, and knows a lap's time one lap later. Other devices
    are waited for at every point.

    Attributes:
        deducted: seconds that were taken out of laps.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._points: list[Any] = []  # events, or times of the host's clock
        self._laps: list[int | None] = []  # of the stretch from each point to the next: its lap, None if none counts it
        self._marks: list[int] = []  # the points that are marks
        self._seconds: list[float] = []  # of each lap that has begun, without the stretches that are not known yet
        self._known = 0  # stretches that are
        self.deducted = 0.0

    def mark(self) -> None:
        """End a lap, if one has begun, and begin the next."""
        self._add(len(self._marks))
        self._marks.append(len(self._points) - 1)
        self._seconds.append(0.0)
        self._learn(self._marks[-2:][0])

    def pause(self) -> None:
        """What the device does from here on, or the host keeps it from doing, counts in no lap."""
        self._add(None)

    def resume(self) -> None:
        """Count again, in the lap that has begun."""
        self._add(len(self._marks) - 1)

    def deduct(self, total: float) -> None:
        """Take out of the lap that has begun what `total`, a count of seconds, has grown by since the last call."""
        self._seconds[-1] -= total - self.deducted
        self.deducted = total

    @property
    def finished(self) -> list[float]:
        """Of the laps that are known to be over; waits for nothing."""
        return self._seconds[: sum(mark <= self._known for mark in self._marks[1:])]

    def seconds(self) -> list[float]:
        """Of all laps; waits for the last mark."""
        self._learn(self._marks[-1])
        return self.finished

    def _add(self, lap: int | None) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self._points.append(event)
        else:
            synchronize(self.device)
            self._points.append(time.perf_counter())
        self._laps.append(lap)

    def _learn(self, point: int) -> None:
        """Wait for a point, and add the stretches before it to their laps; on devices that were waited for, all."""
        if self.device.type == "cuda":
            self._points[point].synchronize()
        else:
            point = len(self._points) - 1
        while self._known < point:
            begun, over = self._points[self._known : self._known + 2]
            lap = self._laps[self._known]
            if lap is not None:
                seconds = begun.elapsed_time(over) / 1e3 if self.device.type == "cuda" else over - begun
                self._seconds[lap] += seconds
            self._known += 1
