"""The processes that share the work, each with a device and a model of its own."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch


@dataclass(frozen=True)
class Team:
    """The processes that `accelerate launch` started, or this one alone.

    Args:
        index, count: this process's place, and how many there are.
        device: this process's own, if there are several.
        wait: returns when all processes have called it.
        first: a context that the first process leaves before the others enter it.
    """

    index: int = 0
    count: int = 1
    device: str | None = None
    wait: Callable[[], None] = lambda: None
    first: Callable[[], AbstractContextManager] = nullcontext

    @staticmethod
    def of(device: str) -> "Team":
        """This process's team.

        Raises:
            ValueError: one GPU was named for several processes.
        """
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return Team()
        if device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"must be auto, cuda or cpu with several processes, got {device!r}")
        from accelerate import PartialState  # takes seconds where much is installed

        # the first to finish waits for the last
        state = PartialState(cpu=device == "cpu", timeout=timedelta(days=30))
        own = str(state.device)
        return Team(state.process_index, state.num_processes, own, state.wait_for_everyone, state.main_process_first)


def leave_group() -> None:
    """End the group of processes, if there is one; its threads would now and then abort a process that exits."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
