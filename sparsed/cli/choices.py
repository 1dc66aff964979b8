"""What the layers of a run chose, for the record: density and recall of each, and the pattern as bits."""

import base64
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..blocks import BlockGrid, Pattern
from ..watching import pooled, recall

# cells of a side of the recorded pattern, at most
MOST_CELLS = 128


class Choices:
    """Shown every layer's choice (`watching.watched`), notes what the record says of it; waits for no device."""

    def __init__(self):
        self._grid: BlockGrid | None = None
        self._shares: list[tuple[Tensor, Tensor]] = []
        self._cells: list[Tensor] = []

    def __call__(self, scores: Tensor, pattern: Pattern) -> None:
        self._grid = pattern.grid
        self._shares.append((pattern.density, recall(scores, pattern).mean()))
        self._cells.append(pooled(pattern, MOST_CELLS))

    def layers(self) -> list[dict[str, float]] | None:
        """Density and recall of every layer in turn, mean over heads and batch rows; None if nothing was chosen."""
        return [{"density": density.item(), "recall": recall.item()} for density, recall in self._shares] or None

    def pattern(self) -> dict[str, Any] | None:
        """The first batch row's kept blocks; None if nothing was chosen.

        `cells` are bits [layers, heads, rows, columns] in C order, the most significant of a byte first, in base64.
        """
        if self._grid is None:
            return None
        cells = torch.stack([layer.cpu() for layer in self._cells])
        layers, heads, rows, columns = cells.shape
        return {
            "block_size": self._grid.block_size,
            "prompt_tokens": self._grid.prompt_len,
            "tokens": self._grid.length,
            "query_blocks": self._grid.n_blocks,
            "key_blocks": self._grid.n_blocks,
            "rows": rows,
            "columns": columns,
            "layers": layers,
            "heads": heads,
            "cells": base64.b64encode(np.packbits(cells.numpy()).tobytes()).decode("ascii"),
        }
