"""Some work in several processes that share a model, as a launcher would start them."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sparsed.ranks import Ranks

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Place(Ranks):
    """A place among processes that are not there."""

    index: int = 0
    count: int = 1


def on_ranks(count: int, work: Callable[..., Any], *given: Any, backend: str = "gloo") -> list[Any]:
    """`work(ranks, *given)` in so many fresh processes; what each of them returns, by rank.

    Starting them takes seconds: one call should ask for much.

    Args:
        backend: with NCCL, each process has a GPU of its own as the current one.
    """
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            spawn.Process(target=_rank, args=(rank, count, Path(folder), backend, work, given)) for rank in range(count)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert not any(process.exitcode for process in processes), "a process failed: its traceback is above"
        return [torch.load(Path(folder, str(rank)), weights_only=False) for rank in range(count)]


def _rank(rank: int, count: int, folder: Path, backend: str, work: Callable[..., Any], given: tuple) -> None:
    torch.set_num_threads(1)
    how = {"rank": rank, "world_size": count, "timeout": timedelta(seconds=60)}
    if "nccl" in backend:
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", **how)
    torch.save(work(Ranks(dist.group.WORLD), *given), folder / str(rank))
    dist.destroy_process_group()


def new_store():
    """Where processes find each other, as `torchrun` keeps it for one command."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def results(count, code, *words):
    """(exit code, stdout, stderr) of so many processes that run the code, told of each other as `torchrun` tells them,
    but without its own words."""
    store = new_store()
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "TORCHELASTIC_USE_AGENT_STORE": True}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1}
    command = [sys.executable, "-c", code, *map(str, words)]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    processes = []
    for rank in range(count):
        environment = {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        processes.append(subprocess.Popen(command, env=os.environ | environment, **how))
    said = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]
