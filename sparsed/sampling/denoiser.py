"""The model's forward, once a denoising step; short sequences replay it as a CUDA graph."""

import torch
from torch import Tensor, nn

from ..patch import SELECTING, SPARSE, Run, run_of

# up to so many tokens, batch rows together, a GPU waits for the host to launch kernels; beyond, a graph gains nothing
REPLAYED_TOKENS = 2048


class Denoiser:
    """Logits of some rows, step after step, of sequences of one shape.

    The first step of each phase (full, sparse) runs as it is, and has its kernels compiled; the second is captured, and
    the later ones replay it. The step that selects blocks always runs as it is.

    Args:
        model: a DiffusionLM, inside `sparsify` or not.
        mask: attention mask of the ids, bool [B, T], or None.
        first_row: no logits are wanted of the tokens before it.
    """

    def __init__(self, model: nn.Module, mask: Tensor | None, first_row: int):
        self.model, self.mask, self.first_row = model, mask, first_row
        self.run: Run | None = run_of(model)
        self.replayable = _replayable(model)
        self.warm: set[str] = set()
        self.graphs: dict[str, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.inputs: tuple[Tensor, Tensor] | None = None  # what the graphs read

    def __call__(self, ids: Tensor, rows: Tensor) -> Tensor:
        """Logits [n, V] of the flat rows [n] of ids [B, T]; the next call may overwrite them."""
        phase = self._begin(ids)
        if phase == SELECTING:
            self.graphs.pop(SPARSE, None)  # it reads blocks that are chosen anew
            return self.model(ids, self.mask, logit_rows=rows)  # in every layer, the queries of all rows choose blocks
        if self.replayable and phase in self.warm and ids.numel() <= REPLAYED_TOKENS and self._load(ids, rows):
            return self._replay(phase)[: len(rows)]
        self.warm.add(phase)
        return self.model(ids, self.mask, logit_rows=rows, first_row=self.first_row)

    def skip(self, ids: Tensor) -> bool:
        """Count a step that needs no logits, and run nothing; not a step that selects blocks: False."""
        if self._begin(ids) == SELECTING:
            return False
        if self.run is not None:
            self.run.end()
        return True

    def _begin(self, ids: Tensor) -> str | None:
        """Announce the step to the run; its phase, None without SparseD."""
        if self.run is None:
            return None
        self.run.begin(tuple(ids.shape))
        return self.run.phase

    def _load(self, ids: Tensor, rows: Tensor) -> bool:
        """Put the step's inputs where the graphs read them; False if there are more rows than those were made for."""
        if self.inputs is None:
            self.inputs = ids.clone(), rows.clone()
        ids_read, rows_read = self.inputs
        if len(rows) > len(rows_read):
            return False
        ids_read.copy_(ids)
        rows_read[: len(rows)].copy_(rows)  # behind them, rows of earlier steps: logits that nobody reads
        return True

    def _replay(self, phase: str | None) -> Tensor:
        """The phase's logits for the loaded inputs, from its graph, which is captured first if there is none yet."""
        if phase in self.graphs:
            graph, logits = self.graphs[phase]
            if self.run is not None:
                self.run.end()
        else:
            graph, logits = self.graphs[phase] = self._capture()  # a forward, which counts the step itself
        graph.replay()
        return logits

    def _capture(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        ids, rows = self.inputs
        graph = torch.cuda.CUDAGraph()
        pool = next((other.pool() for other, _ in self.graphs.values()), None)
        # other threads may go on using the GPU meanwhile
        with torch.cuda.device(ids.device), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            logits = self.model(ids, self.mask, logit_rows=rows, first_row=self.first_row)
        return graph, logits


def _replayable(model: nn.Module) -> bool:
    """Whether the model lies on one GPU and nobody has hooked into it: a replay calls no hook."""
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    devices = {parameter.device for parameter in model.parameters()}
    return not hooked and len(devices) == 1 and next(iter(devices)).type == "cuda"
