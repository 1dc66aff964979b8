"""One attention layer by itself at the published head shapes: full attention, and every sparse kernel over a pattern.

    python -m benchmarks.attention --family llada --lengths 4k,16k,64k --backends flash,triton,flex --out FILE.json

Batch 1, 128 new tokens, bfloat16; the pattern is random, with the scripts' default density. Each kernel is first
checked against float64 on some rows, then timed. For comparison, torch's own cuDNN and FlashAttention-2 kernels are
timed for full attention, and FlexAttention's FLASH kernel over the same blocks. Each kernel's first use is timed, too.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from sparsed import SparseDConfig
from sparsed.backends import BACKENDS, Problem
from sparsed.blocks import BlockGrid, Pattern
from sparsed.kernels import full_attention
from sparsed.selection import isolated_top_k

from .common import NEW_TOKENS, some_of
from .kernels import Heads, attention_gate, entry, kernel_parser, run

TORCH_KERNELS = {
    "torch cuDNN": SDPBackend.CUDNN_ATTENTION,
    "torch FlashAttention-2": SDPBackend.FLASH_ATTENTION,
}
FLASH_BLOCK = 128  # the tile of FlexAttention's FLASH kernel; blocks must consist of such tiles


def measure(heads: Heads, config: SparseDConfig, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The dense kernels, then every backend at every block size; `ratio` is time over full time x density."""
    full = dense_entry("full attention", heads, lambda q, k, v: full_attention(q, k, v)[0])
    rows = [full, *(torch_entry(name, heads, kind) for name, kind in TORCH_KERNELS.items())]
    for size in map(int, args.block_sizes):
        pattern = random_pattern(heads, config.select, size)
        entries = [sparse_entry(backend, heads, pattern) for backend in args.backends]
        if size == FLASH_BLOCK:
            entries.append(flex_flash_entry(heads, pattern))
        for row in entries:
            if "seconds" in row and "seconds" in full:
                row["ratio"] = row["seconds"]["median"] / (full["seconds"]["median"] * row["density"])
        rows += entries
    return rows


def torch_kernel(kind: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """torch's attention by one kernel; it raises where that kernel cannot run."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])

    return attention


def dense_entry(name: str, heads: Heads, attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> dict[str, Any]:
    def work() -> Tensor:
        return attention(heads.q, heads.k, heads.v)

    return entry(name, work, lambda out: attention_gate(out, heads), 2 * heads.matmul_flops) | {"density": 1.0}


def torch_entry(name: str, heads: Heads, kind: SDPBackend) -> dict[str, Any]:
    return compared(dense_entry(name, heads, torch_kernel(kind)))


def compared(row: dict[str, Any]) -> dict[str, Any]:
    """A row for comparison: it is no fault if torch lacks the kernel here."""
    if "error" not in row:
        row["unavailable"] = row.pop("fault")
    return row


def flex_flash_entry(heads: Heads, pattern: Pattern) -> dict[str, Any]:
    """FlexAttention's other kernel, which the package calls directly, through torch.compile."""
    compiled, blocks = torch.compile(flex_attention, fullgraph=True), pattern.block_mask()
    shared = heads.q.shape[1] != heads.k.shape[1]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(q, k, v, block_mask=blocks, enable_gqa=shared, kernel_options={"BACKEND": "FLASH"})

    return compared(pattern_entry("FlexAttention FLASH", heads, pattern, attention))


def sparse_entry(backend: str, heads: Heads, pattern: Pattern) -> dict[str, Any]:
    """The row of one backend over one pattern, or why it cannot run."""
    batch, n_heads, _, head_dim = heads.q.shape
    kv_heads, block_size = heads.k.shape[1], pattern.grid.block_size
    problem = Problem(heads.q.device, heads.q.dtype, batch, n_heads, kv_heads, head_dim, block_size, False)
    reason = BACKENDS[backend].fault(problem)
    if reason is not None:
        fields = {"block_size": block_size, "density": pattern.density.item()}
        return {"kernel": backend, **fields, "unavailable": reason}
    torch._dynamo.reset()  # so that every length's first use of a compiled kernel is one
    return pattern_entry(backend, heads, pattern, BACKENDS[backend].build(pattern))


def pattern_entry(
    name: str, heads: Heads, pattern: Pattern, attention: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> dict[str, Any]:
    """The row of one kernel over a pattern's blocks."""
    fields = {"block_size": pattern.grid.block_size, "density": pattern.density.item()}

    def work() -> Tensor:
        return attention(heads.q, heads.k, heads.v)

    flops = 2 * heads.matmul_flops * fields["density"]
    return entry(name, work, lambda out: attention_gate(out, heads, pattern), flops) | fields


def random_pattern(heads: Heads, select: float, block_size: int) -> Pattern:
    """What the selection keeps of random scores: the budgets and the density of a real pattern."""
    length = heads.q.shape[2]
    grid = BlockGrid(length, length - NEW_TOKENS, block_size)
    scores = torch.rand(1, heads.q.shape[1], grid.n_blocks, grid.n_blocks, device=heads.q.device)
    return isolated_top_k(scores, grid, select)


def main(argv: list[str] | None = None) -> None:
    parser = kernel_parser("attention", __doc__)
    help_text = f"some of {', '.join(BACKENDS)}, separated by commas (default: %(default)s)"
    parser.add_argument(
        "--backends", type=some_of(BACKENDS), default="flash,triton,flex", metavar="NAMES", help=help_text
    )
    run(parser, argv, measure, "time / (full x density)")


if __name__ == "__main__":
    main()
