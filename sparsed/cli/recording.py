"""What the record keeps of a run in addition to its times: the selected blocks, and every step's commits."""

import base64
import math

import numpy as np
import torch
from torch import Tensor

from ..blocks import BlockGrid, Pattern
from ..ranks import ALONE, Ranks
from ..report.record import Commit, KeptBlocks, Layer
from ..sampling.common import Step
from ..watching import pooled, recall

# cells of a side of the recorded pattern, at most
MOST_CELLS = 128


class SelectedBlocks:
    """Sees every layer's choice (`watching.watched`), and keeps what the record says about it; waits for no device.

    Args:
        ranks: the processes that share the layers' heads; what all of them chose is kept.
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self._ranks = ranks
        self._grid: BlockGrid | None = None
        self._shares: list[tuple[Tensor, Tensor]] = []
        self._cells: list[Tensor] = []

    def __call__(self, scores: Tensor, pattern: Pattern) -> None:
        self._grid = pattern.grid
        density, held = self._ranks.mean(torch.stack((pattern.density, recall(scores, pattern).mean())))
        self._shares.append((density, held))
        self._cells.append(self._ranks.joined(pooled(pattern, MOST_CELLS), 0))

    def layers(self) -> list[Layer] | None:
        """Density and recall of every layer in turn, mean over heads and batch rows; None if nothing was selected."""
        return [Layer(density.item(), recall.item()) for density, recall in self._shares] or None

    def pattern(self) -> KeptBlocks | None:
        """The first batch row's kept blocks; None if nothing was selected."""
        if self._grid is None:
            return None
        cells = torch.stack(self._cells).cpu()
        layers, heads, rows, columns = cells.shape
        return KeptBlocks(
            block_size=self._grid.block_size,
            prompt_tokens=self._grid.prompt_len,
            tokens=self._grid.length,
            query_blocks=self._grid.n_blocks,
            key_blocks=self._grid.n_blocks,
            rows=rows,
            columns=columns,
            layers=layers,
            heads=heads,
            cells=base64.b64encode(np.packbits(cells.numpy()).tobytes()).decode("ascii"),
        )


def history(steps: list[Step], token_ids: list[int], prompt_tokens: int) -> list[list[Commit]]:
    """The commits (position, token id, confidence) of every step, every position of the generated region once.

    A model may draw the mask token itself. The position then stays open, and its last commit counts. A position that
    was never filled goes to the last step. The confidence has 4 digits, or is None if there is none.

    Args:
        steps: of a run of one row, or of the first row.
        token_ids: the generated region at the end.
        prompt_tokens: tokens before it.
    """
    latest = {position: (len(steps) - 1, token, math.nan) for position, token in enumerate(token_ids)}
    for step in steps:
        for flat, token, probability in step.commits():
            latest[flat - prompt_tokens] = (step.index, token, probability)
    entries: list[list[Commit]] = [[] for _ in steps]
    for position, (index, token, probability) in latest.items():
        entries[index].append((position, token, round(probability, 4) if math.isfinite(probability) else None))
    return entries
