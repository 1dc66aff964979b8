"""The generations inside a `sparsify`: how far each is, what it keeps, and to which of them a forward belongs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .kept import KeptBlocks
from .recognition import Recognised


@dataclass
class Generation:
    """How far one generation is, and the blocks that it keeps.

    Args:
        shape: [batch, length] of its sequences; None before there is any.
        recognised: by its tokens; None if a sampler has told of it.
        keeps_all: whether no block would be left out.
        step, committed: as in `SparseRun`.
    """

    kept: KeptBlocks
    shape: tuple[int, ...] | None = None
    keeps_all: bool = False
    recognised: Recognised | None = None
    step: int = 0
    committed: float = 0.0

    def goes_on(self, tokens: Tensor) -> bool:
        """Whether these are its next tokens."""
        return self.recognised is not None and self.recognised.goes_on(tokens)


class Generations:
    """The one that is going on; of those from elsewhere also that of the forward before, because guidance alternates.

    Args:
        nothing_kept: makes the blocks of a generation that has selected none yet.
        gen_length, mask_id: as in `SparseRun`.
    """

    def __init__(self, nothing_kept: Callable[[], KeptBlocks], gen_length: int, mask_id: int | None):
        self.nothing_kept, self.gen_length, self.mask_id = nothing_kept, gen_length, mask_id
        self.now = Generation(nothing_kept())
        self.before: Generation | None = None

    def begin(self, shape: tuple[int, ...]) -> None:
        """A new generation over [batch, length] tokens, of which a sampler has told.

        Raises:
            ValueError: it is shorter than what is to be generated.
        """
        self.now, self.before = self._new(shape), None

    def restart(self) -> None:
        """The same generation from its start; from elsewhere, whatever comes is a new one."""
        self.now, self.before = Generation(self.nothing_kept(), self.now.shape, self.now.keeps_all), None

    def follow(self, tokens: Tensor, attention_mask: Any) -> None:
        """Find the generation whose next tokens these are, or begin one; waits for the device.

        Args:
            tokens: [B, T] ids, or [B, T, W] embeddings.
            attention_mask: whatever the model was given under that name.

        Raises:
            ValueError: a new one is shorter than what is to be generated, or has a row with padding behind its answer.
        """
        last = self.now
        known = (one for one in (self.now, self.before) if one is not None and one.goes_on(tokens))
        self.now = next(known, None) or self._recognised(tokens, attention_mask)
        self.before = None if self.now is last else last

    def release(self) -> None:
        """Free the blocks and the tokens, and keep what was measured."""
        self.now.kept.release()
        self.now.recognised = self.before = None

    def _recognised(self, tokens: Tensor, attention_mask: Any) -> Generation:
        new = self._new(tuple(tokens.shape[:2]))
        new.recognised = Recognised(tokens, attention_mask, self.gen_length, self.mask_id)
        return new

    def _new(self, shape: tuple[int, ...]) -> Generation:
        if shape[1] < self.gen_length:
            raise ValueError(f"sparsify: gen_length {self.gen_length} exceeds the forward's {shape[1]} tokens")
        kept = self.nothing_kept()
        return Generation(kept, shape, kept.keeps_all(shape[1]))


UNSEEN = object()


@dataclass
class RunningForward:
    """The forward that is running.

    Args:
        length: tokens of its sequences.
        follow: finds its generation, once an attention call has shown that it computes all tokens; None afterwards, and
            if its sampler has told.
        only_full: whether it can neither select nor be sparse.
        selecting: whether it selects.
        layers, windows: attention calls of all tokens, and of some.
        mask: the latest one that was looked into; UNSEEN before there is one, because None is a mask, too.
    """

    length: int
    follow: Callable[[], None] | None = None
    only_full: bool = False
    selecting: bool = False
    layers: int = 0
    windows: int = 0
    mask: Any = UNSEEN
