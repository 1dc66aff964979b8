"""Attention of few rows over many keys, as cached steps have it, by every kernel that computes it.

    python -m benchmarks.few_queries --family llada --lengths 4k,64k --out FILE.json

Batch 1, bfloat16, the published head shapes: the rows of a block of 32 tokens, and those of 256 new tokens (a refresh
that keeps the prompt's keys). Each kernel is first checked against float64 on some rows, then timed. The kernel that
the package takes is named in its row.
"""

import argparse
from typing import Any

from torch import Tensor

from sparsed import SparseDConfig
from sparsed.kernels import full_attention, full_attention_kernel
from sparsed.kernels.availability import few_queries_attention
from sparsed.kernels.flash import flash_dense, flash_fault
from sparsed.sampling.settings import FAMILIES

from .attention import TORCH_KERNELS, compared, torch_kernel
from .generation import BLOCK_LENGTH, NEW_TOKENS
from .kernels import DTYPE, Heads, attention_gate, entry, kernel_parser, run


def measure(heads: Heads, _: SparseDConfig, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every kernel for a block's rows, then for those of the new tokens; `ratio` is its time over the package's."""
    shift, found = FAMILIES[args.family].shift, []
    for new in (BLOCK_LENGTH, NEW_TOKENS):
        few = Heads(heads.q[:, :, -new - shift :], heads.k, heads.v)
        rows = [by_kernel(name, few, kernel) for name, kernel in kernels(few).items()]
        own, *others = (row | {"queries": few.q.shape[2]} for row in rows)
        for row in (own, *others):
            if "seconds" in row and "seconds" in own:
                row["ratio"] = row["seconds"]["median"] / own["seconds"]["median"]
        found += [own, *map(compared, others)]
    return found


def kernels(few: Heads) -> dict[str, Any]:
    """The package's choice first, then every kernel by itself."""
    chosen = full_attention_kernel(few.q, few.k, few.v, False)
    found: dict[str, Any] = {f"the package's choice: {chosen}": lambda q, k, v: full_attention(q, k, v)[0]}
    found["split"] = few_queries_attention
    found |= {name: torch_kernel(kind) for name, kind in TORCH_KERNELS.items()}
    if flash_fault(few.q.device, DTYPE) is None:
        found["FlashAttention-4"] = lambda q, k, v: flash_dense(q, k, v)[0]
    return found


def by_kernel(name: str, few: Heads, kernel: Any) -> dict[str, Any]:
    """The row of one kernel, by the bytes of keys and values that it must read: there is no bound by operations."""

    def work() -> Tensor:
        out: Tensor = kernel(few.q, few.k, few.v)
        return out

    row = entry(f"{name}, {few.q.shape[2]} rows", work, lambda out: attention_gate(out, few), None)
    if "seconds" in row:
        row["bytes_per_second"] = 2 * few.k.numel() * few.k.element_size() / row["seconds"]["median"]
    return row


def main(argv: list[str] | None = None) -> None:
    run(kernel_parser("few_queries", __doc__), argv, measure, "time / the package's")


if __name__ == "__main__":
    main()
