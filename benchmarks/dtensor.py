"""The host's time of a cached step with torch.distributed.tensor.parallel, and with this package's own layers.

    python -m benchmarks.dtensor --out FILE.json

Two processes over gloo on a CPU, with one thread each, share a LLaDA of 32 layers, so small that its arithmetic takes
next to no time. A step computes 32 rows over a filled cache, in float32. Both ways, and the same model in one process,
take turns; the medians of rank 0 count. Both ways must give the logits of one process.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from sparsed.console.parser import Parser
from sparsed.console.readers import whole
from sparsed.models import LLaDAConfig, LLaDAModel
from sparsed.models.joint import lay_projections_together
from sparsed.models.parallel import MAKING, READING, shard
from sparsed.ranks import Ranks

from .common import brief, build_parser, new_record, parse_arguments, save
from .shapes import LLADA_8B

PROCESSES, LAYERS, ROWS, LENGTH, WIDTH = 2, 32, 32, 256, 128
TINY = {"d_model": WIDTH, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 2 * WIDTH, "n_layers": LAYERS}


def tiny_model() -> LLaDAModel:
    """The same weights in every process."""
    torch.manual_seed(0)
    values = LLADA_8B | TINY | dict.fromkeys(("vocab_size", "embedding_size"), 1000)
    values |= dict.fromkeys(("mask_token_id", "pad_token_id", "eos_token_id"), 999)
    return LLaDAModel(LLaDAConfig.from_dict(values)).eval().requires_grad_(False)


def by_dtensor(model: LLaDAModel) -> LLaDAModel:
    """The model sharded by torch's own styles of parallel layers."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    styles = {name: ColwiseParallel() for name in MAKING} | {name: RowwiseParallel() for name in READING}
    for block in model.model.transformer["blocks"]:
        parallelize_module(block, mesh, {name: style for name, style in styles.items() if hasattr(block, name)})
        block.heads, block.kv_heads = block.heads // PROCESSES, block.kv_heads // PROCESSES
    model.ranks = Ranks(dist.group.WORLD)  # the cache holds this process's heads
    return model


def by_own_layers(model: LLaDAModel) -> LLaDAModel:
    """The model sharded by this package."""
    shard(model, Ranks(dist.group.WORLD))
    lay_projections_together(model)
    return model


def alone(model: nn.Module) -> nn.Module:
    """The whole model."""
    lay_projections_together(model)
    return model


@torch.no_grad()
def step_of(model: LLaDAModel) -> Callable[[], Tensor]:
    """A step of rows in the middle of a sequence, over a filled cache."""
    ids = torch.arange(LENGTH)[None] % 997
    cache, rows = model.kv_cache(*ids.shape), model.rows(LENGTH // 2, LENGTH // 2 + ROWS, LENGTH, None)
    model(ids, cache=cache)
    return lambda: model(ids[:, rows.start : rows.stop], rows=rows, cache=cache)


@torch.no_grad()
def measure(rank: int, address: str, repeats: int, answers: Any) -> None:
    """One process's part; rank 0 sends the seconds of every step, by way."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=PROCESSES)
    steps = {make.__name__: step_of(make(tiny_model())) for make in (alone, by_own_layers, by_dtensor)}
    wanted = steps["alone"]()
    for name, step in steps.items():
        torch.testing.assert_close(step(), wanted, msg=f"{name}: other logits than one process's")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            dist.barrier()
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    if rank == 0:
        answers.put(seconds)
    dist.destroy_process_group()


def parse(argv: list[str] | None) -> tuple[Parser, argparse.Namespace]:
    """The flags, checked; a wrong call exits with code 2 after one line."""
    parser = build_parser("dtensor", __doc__)
    parser.add_argument("--repeats", type=whole(1), default=200, help="steps of each way (default: %(default)s)")
    return parser, parse_arguments(parser, argv)


def main(argv: list[str] | None = None) -> None:
    parser, args = parse(argv)
    spawn = torch.multiprocessing.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    answers = spawn.SimpleQueue()
    words = f"tcp://127.0.0.1:{store.port}", args.repeats, answers
    del store
    torch.multiprocessing.spawn(measure, words, nprocs=PROCESSES)
    record = new_record(parser, args, torch.device("cpu"), torch.float32)
    record |= {"processes": PROCESSES, "layers": LAYERS, "rows": ROWS, "width": WIDTH}
    record["step_seconds"] = {name: brief(seconds) for name, seconds in answers.get().items()}
    save(args.out, record)
    for name, found in record["step_seconds"].items():
        print(f"{name}: {1e3 * found['median']:.2f} ms")


if __name__ == "__main__":
    main()
