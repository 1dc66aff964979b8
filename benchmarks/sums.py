"""Sums over the GPUs that share a model, and two other ways to make them, which the package does not use.

    torchrun --nproc_per_node 2 -m benchmarks.sums --family llada --out FILE.json

bfloat16, random numbers. `few`: sums of some rows of the model's width, as a cached step has them, in CUDA graphs of
32: by NCCL, and by PyTorch's one-shot kernel, with which each GPU reads the others' memory. `many`: the two layers that
end in a sum, for 64k rows: the product by itself; the product, then its sum, as the package does it; and in pieces of
4,096 rows, NCCL summing one while the next is computed. Times are medians in seconds; `error` is the largest difference
from the package's result, relative to its largest number.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric_memory

from sparsed.console.parser import Parser
from sparsed.console.workers import as_one
from sparsed.models.parallel import SummedLinear
from sparsed.ranks import Ranks

from .common import LENGTHS, NEW_TOKENS, build_parser, new_record, parse_arguments, require_gpu, save
from .kernels import DTYPE
from .shapes import SHAPES, model_config

FEW = (1, 8, 32, 33, 64, 128)  # rows
MANY = LENGTHS["64k"] + NEW_TOKENS
MANY_WAYS = ("product", "whole", "pieces")
PIECE = 4096
A_GRAPH, CALLS, WARM_CALLS = 32, 15, 2  # sums in a graph; calls that are timed, and before them
PROGRAM = "python -m benchmarks.sums"


class OneShot:
    """Sums of few numbers through memory that the GPUs share; every process makes one at once."""

    def __init__(self, ranks: Ranks, numbers: int):
        assert ranks.group is not None
        self._memory = symmetric_memory.empty(numbers, dtype=DTYPE, device="cuda")
        symmetric_memory.rendezvous(self._memory, ranks.group)
        self._name = ranks.group.group_name

    def add(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, written into x."""
        flat = x.view(-1)
        shared = self._memory[: x.numel()]
        torch.ops.symm_mem.one_shot_all_reduce_copy_out(shared, flat, "sum", self._name, flat)
        return x


def in_pieces(x: Tensor, layer: SummedLinear) -> Tensor:
    """The layer's product [rows, out], summed piece by piece while the next one is computed."""
    product = x.new_empty(len(x), len(layer.weight))
    sums = []
    for rows, place in zip(x.split(PIECE), product.split(PIECE), strict=True):
        torch.mm(rows, layer.weight.t(), out=place)
        sums.append(dist.all_reduce(place, group=layer.ranks.group, async_op=True))
    for one in sums:
        one.wait()
    return product


def median_seconds(work: Callable[[], Any]) -> float:
    """Of one call, by the GPU's clock."""
    times = []
    for _ in range(WARM_CALLS + CALLS):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        dist.barrier()
        began.record()
        work()
        ended.record()
        torch.cuda.synchronize()
        times.append(began.elapsed_time(ended) / 1e3)
    return statistics.median(times[WARM_CALLS:])


def in_a_graph(add: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Seconds of one of the sums that a CUDA graph replays."""
    add(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(A_GRAPH):
            add(x)
    return median_seconds(graph.replay) / A_GRAPH


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest, relative to the largest number."""
    return ((found.float() - wanted.float()).abs().max() / wanted.float().abs().max()).item()


def few_rows(ranks: Ranks, one_shot: OneShot, width: int, rows: int) -> dict[str, Any]:
    """A sum of few rows, both ways."""
    x = torch.randn(rows, width, device="cuda", dtype=DTYPE)
    error = difference(one_shot.add(x.clone()), ranks.add(x.clone()))
    nothing = torch.zeros_like(x)  # it is added up again and again
    times = {"nccl": in_a_graph(ranks.add, nothing), "one_shot": in_a_graph(one_shot.add, nothing)}
    return {"rows": rows, "error": error} | times


def many_rows(ranks: Ranks, name: str, inputs: int, width: int) -> dict[str, Any]:
    """A layer that ends in a sum, for many rows."""
    x, weight = (torch.randn(n, inputs // ranks.count, device="cuda", dtype=DTYPE) for n in (MANY, width))
    layer = SummedLinear(weight, ranks)
    works = (lambda: F.linear(x, weight), lambda: layer(x), lambda: in_pieces(x, layer))
    error = difference(in_pieces(x, layer), layer(x))
    times = {way: median_seconds(work) for way, work in zip(MANY_WAYS, works, strict=True)}
    return {"layer": name, "rows": MANY, "error": error} | times


def parse(argv: list[str] | None) -> tuple[Parser, argparse.Namespace]:
    """The flags, checked; a wrong call exits with code 2 after one line."""
    parser = build_parser("sums", __doc__, families=SHAPES)
    return parser, parse_arguments(parser, argv)


@torch.no_grad()
def measure(argv: list[str] | None, ranks: Ranks) -> None:
    """One process's whole call."""
    parser, args = parse(argv)
    device = require_gpu(parser)
    if ranks.count == 1:
        parser.error("needs several processes: torchrun --nproc_per_node 2 -m benchmarks.sums ...")
    torch.manual_seed(ranks.index)
    sizes = model_config(args.family).sizes
    one_shot = OneShot(ranks, max(FEW) * sizes.width)
    record = new_record(parser, args, device, DTYPE) | {"processes": ranks.count, "width": sizes.width, "piece": PIECE}
    record["few"] = [few_rows(ranks, one_shot, sizes.width, rows) for rows in FEW]
    layers = {"attention's output": sizes.width, "MLP's output": sizes.mlp_width}
    record["many"] = [many_rows(ranks, name, inputs, sizes.width) for name, inputs in layers.items()]
    if ranks.index == 0:
        save(args.out, record)
        for row in record["few"]:
            print(f"{row['rows']} rows: NCCL {1e6 * row['nccl']:.1f} us, one-shot {1e6 * row['one_shot']:.1f} us")
        for row in record["many"]:
            print(f"{row['layer']}: " + ", ".join(f"{way} {1e3 * row[way]:.2f} ms" for way in MANY_WAYS))


def main(argv: list[str] | None = None) -> int:
    return as_one(lambda ranks: measure(argv, ranks), PROGRAM, advice="start more processes", ending=argv is None)


if __name__ == "__main__":
    raise SystemExit(main())
