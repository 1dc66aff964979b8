"""How a launcher's processes share the work: each answers its own samples, or all share every sample."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..ranks import ALONE, Ranks

# --parallel: what is shared, the samples, or the model by heads
DATA, TENSOR = "data", "tensor"


@dataclass(frozen=True)
class Team:
    """The processes of one call.

    Args:
        ranks: all of them.
        parallel: DATA or TENSOR.
    """

    ranks: Ranks = ALONE
    parallel: str = DATA

    @property
    def leads(self) -> bool:
        """Whether this process prints and sums up."""
        return self.ranks.index == 0

    @property
    def model(self) -> Ranks:
        """The processes that share this one's model."""
        return self.ranks if self.parallel == TENSOR else ALONE

    @property
    def process(self) -> int | None:
        """The number under which this process writes its samples; None if another process writes them."""
        if self.parallel == TENSOR:
            return 0 if self.leads else None
        return self.ranks.index

    def own(self, work: list[Any]) -> list[Any]:
        """This process's part of the work."""
        return work if self.parallel == TENSOR else work[self.ranks.index :: self.ranks.count]

    def agreed(self, found: Any) -> Any:
        """What the first of the processes that share a model has found: all of them go by it."""
        return self.model.gathered(found)[0]

    def wait(self) -> None:
        """Wait until all processes have called it."""
        self.ranks.gathered(None)

    @contextmanager
    def first(self) -> Iterator[None]:
        """A context that the first process leaves before the others enter it."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()


def leave_group() -> None:
    """End the group of processes, if there is one: its threads sometimes abort a process that exits."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
