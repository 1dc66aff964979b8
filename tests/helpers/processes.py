"""Some work in several processes that share a model, as a launcher would start them."""

import multiprocessing
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sparsed.ranks import Ranks


@dataclass(frozen=True)
class Place(Ranks):
    """A place among processes that are not there."""

    index: int = 0
    count: int = 1


def on_ranks(count: int, work: Callable[..., Any], *given: Any) -> list[Any]:
    """`work(ranks, *given)` in so many fresh processes; what each of them returns, by rank.

    Starting them takes seconds: one call should ask for much.
    """
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            spawn.Process(target=_rank, args=(rank, count, Path(folder), work, given)) for rank in range(count)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert not any(process.exitcode for process in processes), "a process failed: its traceback is above"
        return [torch.load(Path(folder, str(rank)), weights_only=False) for rank in range(count)]


def _rank(rank: int, count: int, folder: Path, work: Callable[..., Any], given: tuple) -> None:
    torch.set_num_threads(1)
    how = {"rank": rank, "world_size": count, "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", **how)
    torch.save(work(Ranks(dist.group.WORLD), *given), folder / str(rank))
    dist.destroy_process_group()
