"""The model's forward, once per denoising step; if the host would be slower than the GPU, from a CUDA graph."""

from collections import deque
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.cache import KVCache
from ..models.common import DiffusionLM
from ..models.rows import Rows
from ..run import SparseRun
from ..schedule import FULL, SELECTING, SPARSE
from .arriving import Arriving
from .replay import Forward, Replays

# up to this many tokens, over all batch rows, a GPU waits for the host to launch kernels; beyond, graphs gain nothing
REPLAYED_TOKENS = 2048
NOT_FINITE = "the model's logits are not finite: float32 may hold what another dtype cannot"


class StepRunner:
    """Logits of some rows, step after step, of sequences of one shape.

    Steps of few tokens are replayed, with one graph per phase. The step that selects blocks always runs as it is, and
    so do the few forwards of all rows with a cache.

    Args:
        model: a DiffusionLM.
        run: of the `sparsify` around the model, which knows the sequence; None without one.
        mask: attention mask of the ids, bool [B, T], or None.
        first_row: no logits are wanted of the tokens before it.
        most_rows: how many rows' logits a replayed step can give; a step that wants more is not replayed.
        cache: filled by the forwards of all rows, read by those of a few.
    """

    def __init__(
        self,
        model: DiffusionLM,
        run: SparseRun | None,
        mask: Tensor | None,
        first_row: int,
        most_rows: int,
        cache: KVCache | None = None,
    ):
        self.model, self.run, self.mask, self.first_row, self.most_rows = model, run, mask, first_row, most_rows
        self.cached = {} if cache is None else {"cache": cache}
        # a capture computes nothing, and may fail: it is no step
        self.replays = Replays(model, nullcontext if run is None else run.uncounted)
        self.pattern_version: int | None = None
        self.window: Rows | None = None  # of the latest forward of few rows
        self.totals: deque[Arriving] = deque()  # sums of the latest logits, finite only if all of them are

    def __call__(self, ids: Tensor, rows: Tensor, window: tuple[int, int] | None = None) -> Tensor:
        """Logits [n, V] of the flat rows [n] of ids [B, T]; the next call may overwrite them.

        Args:
            window: the rows [start, stop) of every sequence that are computed, over the cache; None for all.

        Raises:
            FloatingPointError: logits of an earlier call were not finite. It comes with the next call; on a CUDA device
                with the one after it, as the host does not wait for the latest.
        """
        self.check(unseen=int(self.ahead))
        logits = self._whole(ids, rows) if window is None else self._window(ids, rows, *window)
        self.totals.append(Arriving(logits.sum(dtype=torch.float32)))
        return logits

    @property
    def ahead(self) -> bool:
        """Whether the host launches a forward while the device computes the one before."""
        return self.model.device.type == "cuda"

    def skip(self) -> bool:
        """Count a step that needs no logits, and run nothing; not a step that selects blocks: False."""
        if self.phase == SELECTING:
            return False
        if self.run is not None:
            self.run.count()
        return True

    def check(self, unseen: int = 0) -> None:
        """Raise FloatingPointError if logits were not finite; the latest `unseen` ones are left for the next call."""
        while len(self.totals) > unseen:
            if not torch.isfinite(self.totals.popleft().value()):
                raise FloatingPointError(NOT_FINITE)

    @property
    def phase(self) -> str:
        """The phase of the next step's forward of all rows."""
        return FULL if self.run is None else self.run.phase

    def _whole(self, ids: Tensor, rows: Tensor) -> Tensor:
        phase = self.phase

        def forward(ids: Tensor, rows: Tensor) -> Tensor:
            # the step that selects needs the queries of all rows in every layer
            first_row = 0 if phase == SELECTING else self.first_row
            return self.model(ids, self.mask, logit_rows=rows, first_row=first_row, **self.cached)

        self._drop_stale()
        if phase != SELECTING and not self.cached:
            logits = self._replayed(phase, forward, self.first_row, ids, rows)
            if logits is not None:
                if self.run is not None:
                    self.run.count()
                return logits
        return forward(ids, rows)

    def _window(self, ids: Tensor, rows: Tensor, start: int, stop: int) -> Tensor:
        window = self._rows(ids.shape[1], start, stop)

        def forward(ids: Tensor, rows: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
            moved = window._replace(slots=slots, positions=positions)
            return self.model(ids, self.mask, rows=moved, logit_rows=rows, **self.cached)

        ids = ids[:, start:stop]
        moving = window.slots, window.positions
        with nullcontext() if self.run is None else self.run.rows_only():
            logits = self._replayed(f"{stop - start} rows", forward, start, ids, rows, *moving)
            return forward(ids, rows, *moving) if logits is None else logits

    def _rows(self, length: int, start: int, stop: int) -> Rows:
        """The window, which a block's steps share."""
        if self.window is None or (self.window.start, self.window.stop) != (start, stop):
            self.window = self.model.rows(start, stop, length, self.mask)
        return self.window

    def _replayed(
        self, kind: str, forward: Forward, spare: int, ids: Tensor, rows: Tensor, *moving: Tensor
    ) -> Tensor | None:
        """Logits from a graph, if there is one for the step.

        Args:
            spare: a row that the forward computes; its logits fill up where fewer rows are wanted than the graph gives.
        """
        if not self.replays.possible or ids.numel() > REPLAYED_TOKENS or len(rows) > self.most_rows:
            return None
        padded = F.pad(rows, (0, self.most_rows - len(rows)), value=spare)
        logits = self.replays.of(kind, forward, (ids, padded, *moving))
        return None if logits is None else logits[: len(rows)]

    def _drop_stale(self) -> None:
        """Forget a graph that reads blocks of an earlier selection."""
        if self.run is not None and self.run.pattern_version != self.pattern_version:
            self.replays.forget(SPARSE)
            self.pattern_version = self.run.pattern_version
