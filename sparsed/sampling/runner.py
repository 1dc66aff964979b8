"""The model's forward, once a denoising step; short sequences replay it as a CUDA graph."""

from contextlib import nullcontext

import torch
from torch import Tensor

from ..models.cache import KVCache
from ..models.common import DiffusionLM
from ..run import SparseRun
from ..schedule import FULL, SELECTING, SPARSE

# up to so many tokens, batch rows together, a GPU waits for the host to launch kernels; beyond, a graph gains nothing
REPLAYED_TOKENS = 2048


class StepRunner:
    """Logits of some rows, step after step, of sequences of one shape.

    The first step of each phase (full, sparse) runs as it is, and has its kernels compiled; the second is captured, and
    the later ones replay it. The step that selects blocks always runs as it is.

    Args:
        model: a DiffusionLM.
        run: of the `sparsify` that the model is inside of, told the sequence; None outside.
        mask: attention mask of the ids, bool [B, T], or None.
        first_row: no logits are wanted of the tokens before it.
        most_rows: of so many rows at most a step wants logits; a step that wants more runs as it is.
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
        # of a cached run few forwards compute all rows
        self.replayable = cache is None and _replayable(model)
        self.warm: set[str] = set()
        self.graphs: dict[str, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.pattern_version: int | None = None
        self.inputs: tuple[Tensor, ...] = ()  # what the graphs read
        self.total: Tensor | None = None  # of the latest logits

    def __call__(self, ids: Tensor, rows: Tensor, window: tuple[int, int] | None = None) -> Tensor:
        """Logits [n, V] of the flat rows [n] of ids [B, T]; the next call may overwrite them.

        Args:
            window: the rows [start, stop) of every sequence that are computed, over the cache; None for all.

        Raises:
            FloatingPointError: the logits of the call before were not finite.
        """
        self.check()
        logits = self._whole(ids, rows) if window is None else self._window(ids, rows, *window)
        self.total = logits.sum(dtype=torch.float32)
        return logits

    def _whole(self, ids: Tensor, rows: Tensor) -> Tensor:
        phase = self.phase
        self._drop_stale()
        if self._replays(phase, ids, rows):
            return self._replay(phase, ids, rows)
        self.warm.add(phase)
        # the step that selects needs the queries of all rows in every layer
        first_row = 0 if phase == SELECTING else self.first_row
        return self.model(ids, self.mask, logit_rows=rows, first_row=first_row, **self.cached)

    def _window(self, ids: Tensor, rows: Tensor, start: int, stop: int) -> Tensor:
        computed = self.model.rows(start, stop, ids.shape[1], self.mask)
        with nullcontext() if self.run is None else self.run.rows_only():
            return self.model(ids[:, start:stop], self.mask, rows=computed, logit_rows=rows, **self.cached)

    def skip(self) -> bool:
        """Count a step that needs no logits, and run nothing; not a step that selects blocks: False."""
        if self.phase == SELECTING:
            return False
        if self.run is not None:
            self.run.count()
        return True

    def check(self) -> None:
        """Raise FloatingPointError if the latest logits were not finite.

        Asked at the next step, when the sampler has waited for the device anyway.
        """
        if self.total is not None and not torch.isfinite(self.total):
            raise FloatingPointError("the model's logits are not finite: float32 may hold what another dtype cannot")

    @property
    def phase(self) -> str:
        """What the next step's forward of all rows computes."""
        return FULL if self.run is None else self.run.phase

    def _drop_stale(self) -> None:
        """Forget a graph that reads blocks which have been selected anew since."""
        if self.run is not None and self.run.pattern_version != self.pattern_version:
            self.graphs.pop(SPARSE, None)
            self.pattern_version = self.run.pattern_version

    def _replays(self, phase: str, ids: Tensor, rows: Tensor) -> bool:
        """Whether there is a graph for the step; the second of its phase captures one."""
        fits = ids.numel() <= REPLAYED_TOKENS and len(rows) <= self.most_rows
        if phase == SELECTING or phase not in self.warm or not self.replayable or not fits:
            return False
        if phase not in self.graphs:
            try:
                self.graphs[phase] = self._capture(ids)
            except RuntimeError:  # something in the model waits for the device, or there is no memory for a graph
                self.replayable = False
        return self.replayable

    def _capture(self, ids: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        if not self.inputs:
            self.inputs = ids.clone(), torch.full((self.most_rows,), self.first_row, device=ids.device)
        graph = torch.cuda.CUDAGraph()
        pool = next((other.pool() for other, _ in self.graphs.values()), None)
        # nothing is computed yet, and nothing may have been captured
        no_step = nullcontext() if self.run is None else self.run.uncounted()
        # other threads may go on using the GPU meanwhile
        capture = torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")
        with no_step, torch.cuda.device(ids.device), capture:
            logits = self.model(self.inputs[0], self.mask, logit_rows=self.inputs[1], first_row=self.first_row)
        return graph, logits

    def _replay(self, phase: str, ids: Tensor, rows: Tensor) -> Tensor:
        graph, logits = self.graphs[phase]
        self.inputs[0].copy_(ids)
        self.inputs[1][: len(rows)].copy_(rows)  # behind them, rows of earlier steps: logits that nobody reads
        graph.replay()
        if self.run is not None:
            self.run.count()
        return logits[: len(rows)]


def _replayable(model: DiffusionLM) -> bool:
    """Whether the model lies on one GPU, and nobody has hooked into it or replaced its methods: a replay calls none."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        return False
    for module in model.modules():
        replaced = [name for name, value in module.__dict__.items() if callable(value) and hasattr(type(module), name)]
        if module._forward_hooks or module._forward_pre_hooks:
            return False
        if any(not hasattr(module.__dict__[name], "sparsed_run") for name in replaced):
            return False
    return True
