"""A step as observers see it, and SparseD around a sampler's forwards."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..config import SparseDConfig
from ..patch import run_of, sparsify
from ..run import SparseRun

# phases of steps whose forward does not compute all rows: over cached keys, a block's rows, or the generated region's;
# and of a step that runs none
CACHED, ANSWER, IDLE = "cached", "answer", "idle"


@dataclass(frozen=True)
class Step:
    """A finished denoising step, for observers; the tensors stay on the model's device.

    Args:
        index: counted from 0.
        phase: what its forward computed; IDLE: it ran none, nothing was committed and there are no candidates.
        computed: how many rows of every sequence, in all layers but the last.
        rows: int64 [n], the candidates' flat positions b * T + t, ascending.
        tokens: int64 [n], the token that each of them would get.
        probability: float32 [n], the model's for that token, whatever the algorithm ranks by.
        chosen: bool [n], which of the candidates were committed.
        filled: int64 [m], the flat positions that got an end token because their rows have stopped; `fill` its ids.
    """

    index: int
    phase: str
    computed: int = 0
    rows: Tensor | None = None
    tokens: Tensor | None = None
    probability: Tensor | None = None
    chosen: Tensor | None = None
    filled: Tensor | None = None
    fill: Tensor | None = None

    @property
    def ran(self) -> bool:
        """Whether it ran the model."""
        return self.phase != IDLE

    def commits(self) -> list[tuple[int, int, float]]:
        """Flat position, token and probability: first of what was committed, then of what was filled (probability NaN);
        waits for the device."""
        if self.chosen is None:
            return []
        columns = (self.rows, self.tokens, self.probability)
        found = list(zip(*(column[self.chosen].tolist() for column in columns if column is not None), strict=True))
        if self.filled is not None and self.fill is not None:
            found += [(*pair, math.nan) for pair in zip(self.filled.tolist(), self.fill.tolist(), strict=True)]
        return found


# called after each step
OnStep = Callable[[Step], None]


def attention_of(
    model: nn.Module, config: SparseDConfig | None, steps: int, gen_length: int, **options: Any
) -> AbstractContextManager[SparseRun | None]:
    """SparseD around `steps` steps, with `sparsify`'s options; without a config, the `sparsify` around the model."""
    if config is None:
        return nullcontext(run_of(model))
    return sparsify(model, config, steps=steps, gen_length=gen_length, **options)


@contextmanager
def sequence_of(
    model: nn.Module, config: SparseDConfig | None, steps: int, gen_length: int, shape: tuple[int, ...], **options: Any
) -> Iterator[SparseRun | None]:
    """`attention_of`; its run, if there is one, learns that the forwards are of sequences [batch, length]."""
    with attention_of(model, config, steps, gen_length, **options) as run:
        with nullcontext() if run is None else run.sequence(shape):
            yield run
