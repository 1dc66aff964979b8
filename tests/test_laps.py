"""Times between points of a device's work: what they are, and what the host waits for."""

import time

import pytest
import torch

from sparsed import laps
from sparsed.laps import Laps


def test_a_cpu_s_laps_are_the_clock_s(monkeypatch):
    times = iter([1.0, 3.0, 3.25, 3.5, 4.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    found = Laps(torch.device("cpu"))
    found.mark()
    assert found.finished == found.seconds() == []
    found.deduct(0.75)
    found.mark()
    assert found.finished == [1.25]
    found.pause()
    found.resume()
    found.deduct(0.75)  # no more than before
    found.mark()
    assert found.finished == found.seconds() == [1.25, 0.25 + 0.5] and found.deducted == 0.75


class Queue:
    """A device's queue: its work takes time, and the host's calls are noted."""

    def __init__(self):
        self.now, self.noted = 0.0, []

    def event(self, enable_timing):
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, queue):
        self.queue = queue

    def record(self, stream):
        self.at = self.queue.now
        self.queue.noted.append(("record", self.at))

    def synchronize(self):
        self.queue.noted.append(("wait", self.at))

    def elapsed_time(self, later):
        return 1e3 * (later.at - self.at)


@pytest.fixture
def queue(monkeypatch):
    queue = Queue()
    monkeypatch.setattr(laps.torch.cuda, "Event", queue.event)
    monkeypatch.setattr(laps.torch.cuda, "current_stream", lambda device: None)
    return queue


def test_a_gpu_works_on_one_lap_while_the_host_prepares_the_next(queue):
    found = Laps(torch.device("cuda"))
    for now in (0.0, 2.0, 2.5, 6.0):
        queue.now = now
        found.mark()
    found.deduct(9.0)  # of a lap that does not end
    assert found.finished == [2.0, 0.5]
    # after the first, each mark waits for the one before it, never for itself
    assert queue.noted == [
        ("record", 0.0),
        ("wait", 0.0),
        ("record", 2.0),
        ("wait", 0.0),
        ("record", 2.5),
        ("wait", 2.0),
        ("record", 6.0),
        ("wait", 2.5),
    ]
    assert found.seconds() == [2.0, 0.5, 3.5] and queue.noted[-1] == ("wait", 6.0)


def test_what_the_host_keeps_a_gpu_from_doing_counts_in_no_lap(queue):
    """Two events with nothing between them are as far apart as the GPU was idle."""
    found = Laps(torch.device("cuda"))
    found.mark()
    for busy, idle in ((3.0, 0.5), (4.0, 0.0), (1.0, 20.0)):
        queue.now += busy
        found.pause()
        queue.now += idle
        found.resume()
        queue.now += 1.0
        found.mark()
    assert found.finished == [4.0, 5.0] and found.seconds() == [4.0, 5.0, 2.0]


@pytest.mark.gpu
def test_a_gpu_s_laps_are_as_long_as_its_work():
    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)
    found = Laps(device)

    def work(times):
        for _ in range(times):
            x @ x

    work(10)
    torch.cuda.synchronize()
    began = time.perf_counter()
    found.mark()
    for times in (200, 400, 200):
        work(times)
        found.mark()
    one, two, three = found.seconds()
    took = time.perf_counter() - began
    assert one + two + three == pytest.approx(took, rel=0.1)
    assert two > max(one, three)  # on a card with other work, no more can be said
