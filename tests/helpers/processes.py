"""Work in several processes, as a launcher would start them."""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sparsed.ranks import Ranks

# what takes seconds to import
IMPORTED = ["sparsed.cli", "sparsed.evaluation.command", "benchmarks.parallel"]


def exit_codes(count: int, target: Callable[..., Any], *given: Any) -> list[int | None]:
    """Those of `count` fresh processes that do `target(rank, *given)`.

    They are forked from one that has imported what they need, but not where there is a GPU, which an import may start.
    """
    starter = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    starter.set_forkserver_preload(IMPORTED)
    processes = [starter.Process(target=target, args=(rank, *given)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()  # one that hangs
        process.join()
    return [process.exitcode for process in processes]


def on_ranks(count: int, work: Callable[..., Any], *given: Any, backend: str = "gloo") -> list[Any]:
    """`work(ranks, *given)` in `count` fresh processes; what each of them returns, by rank.

    Args:
        backend: with NCCL, each process has a GPU of its own as the current one.
    """
    with tempfile.TemporaryDirectory() as folder:
        codes = exit_codes(count, _rank, count, Path(folder), backend, work, given)
        assert not any(codes), "a process failed: its traceback is above"
        return [torch.load(Path(folder, str(rank)), weights_only=False) for rank in range(count)]


def _rank(rank: int, count: int, folder: Path, backend: str, work: Callable[..., Any], given: tuple) -> None:
    torch.set_num_threads(1)
    if "nccl" in backend:
        torch.cuda.set_device(rank)
    how = {"rank": rank, "world_size": count, "timeout": timedelta(seconds=60)}
    dist.init_process_group(backend, init_method=f"file://{folder}/store", **how)
    torch.save(work(Ranks(dist.group.WORLD), *given), folder / str(rank))
    dist.destroy_process_group()


def new_store() -> dist.TCPStore:
    """Where processes find each other, as `torchrun` keeps it for one command."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def outcomes(count: int, code: str, *words: Any) -> list[tuple[int | None, str, str]]:
    """(exit code, stdout, stderr) of `count` processes that run the code, told of each other as `torchrun` tells them,
    but without its own words."""
    store = new_store()
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "TORCHELASTIC_USE_AGENT_STORE": True}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    with tempfile.TemporaryDirectory() as folder:
        codes = exit_codes(count, _script, shared, code, list(map(str, words)), Path(folder))
        texts = [[Path(folder, f"{rank}.{stream}").read_text() for stream in (1, 2)] for rank in range(count)]
    return [(found, *text) for found, text in zip(codes, texts, strict=True)]


def _script(rank: int, shared: dict[str, Any], code: str, words: list[str], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update({name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()})
    for stream in (1, 2):
        os.dup2(os.open(folder / f"{rank}.{stream}", os.O_WRONLY | os.O_CREAT), stream)
    sys.argv = ["-c", *words]
    exec(code, {"__name__": "__main__"})
