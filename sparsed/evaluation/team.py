"""The processes that share the work, each with a device and a model of its own."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch


@dataclass(frozen=True)
class Team:
    """The processes that `accelerate launch` started, or this one alone."""

    index: int
    count: int
    wait: Callable[[], None]
    device: str | None

    @staticmethod
    def of(device: str) -> "Team":
        """This process's place in it; several have a device each.

        Raises:
            ValueError: one GPU was named for several processes.
        """
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return Team(0, 1, lambda: None, None)
        if device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"must be auto, cuda or cpu with several processes, got {device!r}")
        from accelerate import PartialState  # seconds to import

        # the first to finish waits for the last
        state = PartialState(cpu=device == "cpu", timeout=timedelta(days=30))
        return Team(state.process_index, state.num_processes, state.wait_for_everyone, str(state.device))

    @contextmanager
    def first(self) -> Iterator[None]:
        """The first process does the work before the others do it."""
        if self.index:
            self.wait()
        yield
        if not self.index:
            self.wait()


def leave_group() -> None:
    """End the group of processes, if there is one; its threads would now and then abort a process that exits."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
