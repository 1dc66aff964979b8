"""The processes that share one model, and what they tell each other."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """The processes that share a model. Each has some heads of every layer; without a group, one process has all.

    Every process of the group must make every call here, in the same order. The device's backend sends the tensors
    (NCCL, or gloo on a CPU), in the order of the device's queue; `gathered` waits for all processes.

    Args:
        group: of `torch.distributed`.
    """

    group: "dist.ProcessGroup | None" = None

    @property
    def index(self) -> int:
        """This process's place, from 0."""
        return 0 if self.group is None else self.group.rank()

    @property
    def count(self) -> int:
        return 1 if self.group is None else self.group.size()

    def add(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, written into x."""
        if self.count > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def mean(self, x: Tensor) -> Tensor:
        """The mean of every rank's x. If each x is a mean over the rank's heads, this is the mean over all heads."""
        return self.add(x.clone()) / self.count if self.count > 1 else x

    def joined(self, x: Tensor, dim: int) -> Tensor:
        """Every rank's x, one after the other along `dim`: the values of all heads."""
        if self.count == 1:
            return x
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.count)]
        dist.all_gather(parts, x, group=self.group)
        return torch.cat(parts, dim)

    def share(self, x: Tensor) -> None:
        """Overwrite x with rank 0's."""
        if self.count > 1:
            dist.broadcast(x, group=self.group, group_src=0)

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of the ranks; it must be picklable."""
        values = [value]
        if self.count > 1:
            values *= self.count
            dist.all_gather_object(values, value, group=self.group)
        return values


ALONE = Ranks()


@dataclass(frozen=True)
class Place(Ranks):
    """A place among processes that are not there, for what can be said of them beforehand."""

    index: int = 0
    count: int = 1
