"""Forwards replayed as CUDA graphs, which take only the GPU's time and none of the host's."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..models.common import DiffusionLM
from ..models.joint import any_global_hook

Forward = Callable[..., Tensor]
# forwards of a kind up to the first that only replays: run as it is, captured, replayed
UNTIL_REPLAYED = 3


@dataclass
class Replayed:
    """Forwards of one kind, over tensors of the same shapes, and their graph once there is one.

    Args:
        inputs: what the graph reads; at first those of a forward that ran as it is.
    """

    inputs: tuple[Tensor, ...]
    graph: torch.cuda.CUDAGraph | None = None
    logits: Tensor = field(default_factory=lambda: torch.empty(0))

    def takes(self, inputs: tuple[Tensor, ...]) -> bool:
        """Whether these have the same shapes."""
        return [x.shape for x in inputs] == [x.shape for x in self.inputs]


class Replays:
    """The graphs of one generation's forwards.

    The first forward of a kind runs as it is, and compiles its kernels. The second is captured, and the later ones
    replay it. With inputs of other shapes, a kind starts again.

    Args:
        model: what the forwards run.
        aside: a context in which forwards do not count.

    Attributes:
        possible: whether forwards can be captured at all.
    """

    def __init__(self, model: DiffusionLM, aside: Callable[[], AbstractContextManager]):
        self.aside, self.ranks = aside, model.ranks
        self.possible = all(model.ranks.gathered(replayable(model)))
        self._kinds: dict[str, Replayed] = {}

    def of(self, kind: str, forward: Forward, inputs: tuple[Tensor, ...]) -> Tensor | None:
        """`forward(*inputs)` from a graph, which the next call may overwrite; None if it must run as it is.

        Args:
            kind: forwards of one kind differ only in their inputs.
            forward: reads nothing that changes, except its inputs.
        """
        if not self.possible:
            return None
        known = self._kinds.get(kind)
        if known is None or not known.takes(inputs):
            self._kinds[kind] = Replayed(inputs)
            return None
        if known.graph is None:
            captured = True
            try:
                self._capture(known, forward)
            except RuntimeError:  # something in the model waits for the device, or there is no memory for a graph
                captured = False
            if not all(self.ranks.gathered(captured)):
                self.possible = False
                return None
        assert known.graph is not None  # captured just now, if not before
        for static, given in zip(known.inputs, inputs, strict=True):
            static.copy_(given)
        known.graph.replay()
        return known.logits

    def forget(self, kind: str) -> None:
        """The next forward of that kind reads something else: start again."""
        self._kinds.pop(kind, None)

    def _capture(self, known: Replayed, forward: Forward) -> None:
        inputs = tuple(x.clone() for x in known.inputs)
        graph = torch.cuda.CUDAGraph()
        pool = next((other.graph.pool() for other in self._kinds.values() if other.graph is not None), None)
        device = inputs[0].device
        # other threads may go on using the GPU meanwhile
        capture = torch.cuda.graph(graph, pool=pool, stream=_capture_stream(device), capture_error_mode="thread_local")
        # back to the stream of before: torch does not leave its own if the capture failed
        here = torch.cuda.stream(torch.cuda.current_stream(device))
        with self.aside(), torch.cuda.device(device), here, capture:
            logits = forward(*inputs)
        known.inputs, known.graph, known.logits = inputs, graph, logits


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures on a GPU: libraries keep memory for every stream.

    `torch.cuda.graph` has one as well, but only one, on the GPU of the first capture: it captures nothing of another.
    """
    return torch.cuda.Stream(device)


def replayable(model: DiffusionLM) -> bool:
    """Whether the model is on a GPU and has no hooks or replaced methods, which a replay would not call."""
    if any_global_hook() or model.device.type != "cuda":
        return False
    for module in model.modules():
        replaced = [name for name, value in module.__dict__.items() if callable(value) and hasattr(type(module), name)]
        if module._forward_hooks or module._forward_pre_hooks:
            return False
        if any(not hasattr(module.__dict__[name], "sparsed_run") for name in replaced):
            return False
    return True
