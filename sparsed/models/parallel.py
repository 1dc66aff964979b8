"""Tensor parallelism: every process computes some heads of each attention, and some rows of each MLP.

Weights that produce heads and rows keep some of their outputs. Weights that read them keep some of their inputs, and
their products are summed over the processes: two sums per layer. Every process computes all else.

torch.distributed.tensor.parallel does the same, but takes more of the host's time, which every step needs that is not
replayed as a CUDA graph: a cached step of 32 layers takes 0.82 s with it and 0.27 s with the layers here (0.16 s in one
process, on a busy CPU; `benchmarks/results/dtensor-cpu.json`).
"""

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ranks import Place, Ranks
from .common import DiffusionLM

# names in both families; a module that has one of MAKING may have one of READING
MAKING = ("q_proj", "k_proj", "v_proj", "gate_proj", "ff_proj", "up_proj")
READING = ("o_proj", "attn_out", "down_proj", "ff_out")


class SummedLinear(nn.Module):
    """A linear layer without a bias. This process has some of its inputs; the product is summed over the ranks.

    Args:
        weight: [out, some of the inputs].
    """

    def __init__(self, weight: Tensor, ranks: Ranks):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., out], the whole product; RuntimeError if a gradient is wanted: the sum stops it."""
        product = F.linear(x, self.weight)
        if product.requires_grad:
            raise RuntimeError("a model that processes share computes no gradients: use torch.no_grad()")
        return self.ranks.add(product)


def shard(model: DiffusionLM, ranks: Ranks) -> None:
    """Keep this process's part of a whole model, which may be on the meta device.

    Heads stay whole. Rank r of n has the r-th of n equal parts of the query heads, of the key-value heads that they
    read, and of the MLP's rows. `model.sizes` are those of the part.

    Raises:
        ValueError: the number of processes does not divide the model's heads; the line names the numbers that do.
    """
    if ranks.count == 1:
        return
    check_count(model, ranks.count)
    module: Any  # its attributes are the family's
    for module in list(model.modules()):
        layers = dict(module.named_children())
        making = [layers[name] for name in MAKING if name in layers]
        for layer in making:
            for kind, parameter in list(layer.named_parameters()):
                setattr(layer, kind, nn.Parameter(own_part(parameter, 0, ranks), requires_grad=False))
            layer.out_features //= ranks.count
        for name in layers if making else ():
            if name in READING:
                setattr(module, name, SummedLinear(own_part(layers[name].weight, 1, ranks), ranks))
        if "q_proj" in layers:
            module.heads, module.kv_heads = module.heads // ranks.count, module.kv_heads // ranks.count
    model.ranks = ranks


def check_count(model: DiffusionLM, count: int) -> None:
    """Raise ValueError unless `count` processes divide the heads, and the MLP, of a whole model."""
    counts = dividing_counts(model)
    if count not in counts:
        sizes = model.config.sizes
        raise ValueError(
            f"{count} processes do not divide {sizes.heads} attention heads, {_kv_heads(model)} key-value heads and an "
            f"MLP of {sizes.mlp_width}; these numbers of processes do: {', '.join(map(str, counts))}"
        )


def dividing_counts(model: DiffusionLM) -> list[int]:
    """The numbers of processes that divide the heads, and the MLP, of a whole model, ascending."""
    sizes = model.config.sizes
    common = math.gcd(sizes.heads, _kv_heads(model), sizes.mlp_width)
    return [count for count in range(1, common + 1) if common % count == 0]


def _kv_heads(model: DiffusionLM) -> int:
    heads: int = model.config.sizes.kv_width // model.config.head_dim
    return heads


def part_of(model: DiffusionLM, count: int) -> DiffusionLM:
    """What each of `count` processes would have of a whole model on the meta device: for one, the model itself."""
    if count == 1:
        return model
    part = copy.deepcopy(model)
    shard(part, Place(count=count))
    return part


def own_part(tensor: Tensor, dim: int, ranks: Ranks) -> Tensor:
    """This process's part of a tensor along `dim`, in memory of its own."""
    return tensor.detach().chunk(ranks.count, dim)[ranks.index].clone(memory_format=torch.contiguous_format)


def whole_parameters(model: DiffusionLM) -> Iterator[tuple[str, Tensor]]:
    """Names and values of the whole model's parameters, joined from the ranks' parts."""
    ranks = model.ranks
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if owner.rpartition(".")[2] in MAKING:
            yield name, ranks.joined(parameter.detach(), 0)
        elif isinstance(model.get_submodule(owner), SummedLinear):
            yield name, ranks.joined(parameter.detach(), 1)
        else:
            yield name, parameter.detach()
