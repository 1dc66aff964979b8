"""The methods that an evaluation compares: each is a schedule, and a rule for the key blocks of its sparse steps.

The baselines and ablations are those of the paper's tables (arXiv 2509.24014), at SparseD's density: a query block
keeps the same number of key blocks under each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..blocks import BlockGrid, Pattern
from ..config import SparseDConfig
from ..sampling.saving import Saving
from ..selection import SPARSED, Rule, top_k


def joint_top_k(q: Tensor, score: Callable[[], Tensor], grid: BlockGrid, select: float) -> Pattern:
    """The highest scores of all blocks, without isolated selection: a part can take the other's room."""
    return top_k(score(), grid, (slice(0, grid.n_blocks),), [(sum(row),) for row in grid.budgets(select)])


def window(q: Tensor, score: Callable[[], Tensor], grid: BlockGrid, select: float, sinks: int = 0) -> Pattern:
    """A window of key blocks centred on the query's own, plus the sequence's first `sinks` blocks.

    Padding blocks are not counted. At the ends the window is shifted inward, so that every query block keeps the same
    number.
    """
    tokens = grid.block_tokens.expand(q.shape[0], -1)
    counts = tuple(sum(row) for row in grid.budgets(select))
    counts = counts * (q.shape[0] // len(counts))
    rows = []
    for real, count in zip(tokens, counts, strict=True):
        first = int((real > 0).int().argmax())  # padding lies on the left
        fixed = min(sinks, count - 1)
        wide = count - fixed
        start = torch.arange(grid.n_blocks) - wide // 2
        start = start.clamp(first + fixed, grid.n_blocks - wide)
        kept = start[:, None] + torch.arange(wide)
        sink = (first + torch.arange(fixed)).expand(grid.n_blocks, fixed)
        rows.append(torch.cat((sink, kept, kept[:, -1:].expand(-1, max(counts) - count)), dim=1))
    indices = torch.stack(rows).to(q.device, torch.int32)[:, None].expand(-1, q.shape[1], -1, -1)
    return Pattern(indices.contiguous(), counts, grid)


def streaming(q: Tensor, score: Callable[[], Tensor], grid: BlockGrid, select: float) -> Pattern:
    """StreamingLLM (arXiv 2309.17453) without its causal mask: the block of the attention sink, and a window."""
    return window(q, score, grid, select, sinks=1)


@dataclass(frozen=True)
class Method:
    """A way to run a model.

    Args:
        title: its name in tables.
        rule: selects the blocks; None for full attention throughout.
        skips: whether the first `skip` of the steps use full attention; otherwise the pattern is selected at step 0.
    """

    title: str
    rule: Rule | None
    skips: bool = True

    def config(self, config: SparseDConfig) -> SparseDConfig | None:
        """The settings that it runs with: `skip` is 0 if it never skips; None for full attention."""
        if self.rule is None:
            return None
        return config if self.skips else replace(config, skip=0.0)


METHODS = {
    "origin": Method("full attention", None),
    "sparsed": Method("SparseD", SPARSED),
    "no_skip": Method("SparseD without skipping", SPARSED, skips=False),
    "no_isolation": Method("SparseD without isolated selection", Rule(joint_top_k)),
    "window": Method("sliding window", Rule(window, needs_scores=False), skips=False),
    "streaming": Method("StreamingLLM", Rule(streaming, needs_scores=False), skips=False),
}


@dataclass(frozen=True)
class Variant:
    """A method with its settings.

    Args:
        config: SparseD's, None for full attention.
        saving: cache and threshold, if these differ between the variants of a run.
    """

    method: str
    config: SparseDConfig | None
    saving: Saving = Saving()

    @property
    def names(self) -> dict[str, Any]:
        """Its fields in lines of results: None for a setting that the method does not have, or that was not wanted; no
        field for a saving that is off."""
        config, skips = self.config, METHODS[self.method].skips
        return {
            "method": self.method,
            "select": config and config.select,
            "skip": config.skip if config and skips else None,
            "block_size": config and config.block_size,
            "dense_answer": (config and config.dense_answer) or None,
            **self.saving.given,
        }


def needs_scores(variant: Variant) -> bool:
    """Whether a forward with full attention selects the variant's blocks."""
    rule = METHODS[variant.method].rule
    return rule is not None and rule.needs_scores


def variants(
    methods: list[str], configs: list[SparseDConfig], savings: Sequence[Saving] = (Saving(),)
) -> list[Variant]:
    """Every method with all settings that apply to it, each once, in the order of the methods."""
    settings = product(methods, configs, savings)
    return list(dict.fromkeys(Variant(name, METHODS[name].config(config), saving) for name, config, saving in settings))
