"""Selection of the blocks at the published head shapes: the block scores of one layer, and the top-k on them.

    python -m benchmarks.selection --family llada --lengths 4k,16k,64k --out FILE.json

Batch 1, 128 new tokens, bfloat16, random q, k, v. The scores start from the log-sum-exp that full attention gives along
with its output, as in a run. Scores are first checked against float64 on some query blocks, and the kept blocks
against the scores. Then everything is timed, and full attention too.
"""

import argparse
from typing import Any

import torch
from torch import Tensor

from sparsed import SparseDConfig
from sparsed.blocks import BlockGrid, Pattern
from sparsed.config import ceil_share
from sparsed.kernels import block_scores, full_attention
from sparsed.selection import isolated_top_k

from .common import NEW_TOKENS
from .kernels import DTYPE, Gate, Heads, attention_gate, entry, kernel_parser, run


def measure(heads: Heads, config: SparseDConfig, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Full attention, then scores, top-k and both at every block size; `ratio` is time over full attention's."""
    q, k, v = heads.q, heads.k, heads.v
    flops = 2 * heads.matmul_flops

    full = entry("full attention", lambda: full_attention(q, k, v), lambda out: attention_gate(out[0], heads), flops)
    rows = [full]
    lse = full_attention(q, k, v)[1]
    for size in map(int, args.block_sizes):
        rows += [row | {"block_size": size} for row in selection_entries(heads, lse, config.select, size)]
    if "seconds" in full:
        for row in rows:
            if "seconds" in row:
                row["ratio"] = row["seconds"]["median"] / full["seconds"]["median"]
    return rows


def selection_entries(heads: Heads, lse: Tensor | None, select: float, block_size: int) -> list[dict[str, Any]]:
    """Scores, top-k, and one after the other as a run does it."""
    length = heads.q.shape[2]
    grid = BlockGrid(length, length - NEW_TOKENS, block_size)

    def score() -> Tensor:
        return block_scores(heads.q, heads.k, block_size=block_size, lse=lse)

    first = entry("block scores", score, lambda out: score_gate(out, heads, block_size), heads.matmul_flops)
    if "fault" in first:
        return [first]
    scores = score()
    slack = 1e-5 * scores.max().item()  # a second pass may add in another order

    def top_k() -> Pattern:
        return isolated_top_k(scores, grid, select)

    def both() -> Pattern:
        return isolated_top_k(score(), grid, select)

    return [
        first,
        entry("top-k", top_k, lambda out: top_k_gate(out, scores, select), None),
        entry("both", both, lambda out: top_k_gate(out, scores, select, slack), heads.matmul_flops),
    ]


def score_gate(scores: Tensor, heads: Heads, block_size: int) -> Gate:
    """The first, a middle and the last query block of two heads against float64."""
    n_blocks = scores.shape[2]
    gates = []
    for head in heads.probed:
        q, k, _ = heads.pair(head)
        for block in {0, n_blocks // 2, n_blocks - 1}:
            rows = q[block * block_size : (block + 1) * block_size]
            dense, exact = (plain_scores(rows.to(t), k.to(t), block_size) for t in (DTYPE, torch.float64))
            gates.append(Gate.of(scores[0, head, block], dense, exact))
    return max(gates, key=lambda gate: gate.error / gate.allowed)


def plain_scores(q: Tensor, k: Tensor, block_size: int) -> Tensor:
    """The attention that query rows [n, D] give to each block of keys [T, D], in their dtype, summed in float64."""
    probabilities = ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1).double().sum(0)
    return torch.stack([part.sum() for part in probabilities.split(block_size)])


def top_k_gate(pattern: Pattern, scores: Tensor, select: float, slack: float = 0.0) -> Gate:
    """How far a block that was left out scores above one of its part that was kept; infinitely where a budget is
    missed."""
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, pattern.indices.long(), True)
    worst = 0.0
    for part in pattern.grid.parts:
        chosen, score = kept[..., part], scores[..., part]
        if (chosen.sum(-1) != ceil_share(select, chosen.shape[-1])).any():
            return Gate(float("inf"), slack)
        lowest = score.masked_fill(~chosen, torch.inf).amin(-1)
        highest = score.masked_fill(chosen, -torch.inf).amax(-1)
        worst = max(worst, (highest - lowest).max().item())
    return Gate(worst, slack)


def main(argv: list[str] | None = None) -> None:
    run(kernel_parser("selection", __doc__), argv, measure, "time / full attention")


if __name__ == "__main__":
    main()
