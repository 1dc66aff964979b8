"""What attention the forwards inside one `sparsify` have.

When blocks are selected, a schedule says; the forward that selects computes full attention itself (arXiv 2509.24014,
section 4).
"""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .backends import DENSE
from .config import SparseDConfig
from .generation import Generations, RunningForward
from .kept import KeptBlocks
from .masks import same_tensor
from .ranks import ALONE, Ranks
from .schedule import FULL, SELECTING, SPARSE, Progress, Schedule
from .selection import Rule
from .tally import Tally


class SparseRun:
    """State of the generations inside one `sparsify`, all of it: nothing stays on the model.

    Args:
        config, gen_length, backend, rule: as in `sparsify`.
        schedule: when attention is over kept blocks.
        mask_id: of the mask token, if the model's config names it.
        ranks: the processes that share the model.

    Attributes:
        compile_seconds: time spent choosing and compiling kernels, part of the time of the step that chooses.
        tally: what a sampler that does not tell has run.
    """

    def __init__(
        self,
        config: SparseDConfig,
        schedule: Schedule,
        gen_length: int,
        backend: str,
        rule: Rule,
        mask_id: int | None = None,
        ranks: Ranks = ALONE,
    ):
        self.schedule = schedule
        self.compile_seconds, self.tally = 0.0, Tally()
        versions = itertools.count()

        def nothing_kept() -> KeptBlocks:
            return KeptBlocks(config, gen_length, rule, backend, self._timed, next(versions), ranks)

        self._generations = Generations(nothing_kept, gen_length, mask_id)
        self._running = threading.Lock()
        self._told = threading.Lock()  # held while a sampler's sequence is open
        self._uncounted = self._rows_only = False
        self._forward: RunningForward | None = None
        self._layers = 0  # that attended to all tokens in one forward, at most

    @property
    def step(self) -> int:
        """Index of the next denoising step (inside a forward: of the current one)."""
        return self._generations.now.step

    @property
    def committed(self) -> float:
        """Share of the generated tokens that are committed, if the sampler tells; no schedule by steps asks."""
        return self._generations.now.committed

    @committed.setter
    def committed(self, share: float) -> None:
        self._generations.now.committed = share

    @property
    def backend(self) -> str | None:
        """The kernel of the sparse steps, DENSE where every block is kept; None until blocks are wanted."""
        return self._generations.now.kept.backend

    @property
    def backend_reason(self) -> str | None:
        """Why that kernel was taken."""
        return self._generations.now.kept.backend_reason

    @property
    def density(self) -> float | None:
        """Attended over all valid (query, key) pairs in the sparse steps, mean over layers and heads."""
        return self._generations.now.kept.density

    @property
    def pattern_version(self) -> int:
        """Changes whenever the selected blocks do."""
        return self._generations.now.kept.version

    @property
    def phase(self) -> str:
        """What the next step (inside a forward: the current one) computes: FULL, SELECTING or SPARSE.

        The first whole forward for which the schedule wants blocks selects; one of another sequence is full, and so are
        a window before blocks are selected and a run that keeps every block.
        """
        now = self._generations.now
        only_full = self._forward is not None and self._forward.only_full
        if only_full or now.keeps_all or not self._wants_pattern:
            return FULL
        return SPARSE if now.kept.complete else SELECTING

    @property
    def _wants_pattern(self) -> bool:
        return self.schedule.wants_pattern(Progress(self.step, self.committed))

    @property
    def told(self) -> bool:
        """Whether a sampler's sequence is open."""
        return self._told.locked()

    def reset(self) -> None:
        """Drop the selected blocks: the next forward is step 0 of a new generation."""
        self._generations.restart()

    def release(self) -> None:
        """Free the selected blocks and keep what was measured."""
        self._generations.release()

    @contextmanager
    def sequence(self, shape: tuple[int, ...]) -> Iterator[None]:
        """A new generation over [batch, length] tokens: as long as the context is open, its forwards are those of that
        shape, however many. Without it, forwards are told apart by their tokens.

        Raises:
            RuntimeError: inside another sequence.
        """
        if not self._told.acquire(blocking=False):
            raise RuntimeError("sparsify: a generation began inside another one of the same model")
        try:
            self.tally.told = True
            self._generations.begin(shape)
            yield
        finally:
            self._told.release()

    @contextmanager
    def forward(self, shape: tuple[int, ...], whole: bool = True) -> Iterator[None]:
        """A forward of the generation that is going on, which is one step; if it fails, the step does not count.

        Args:
            shape: [batch, length] of the sequences; of another shape, it has full attention and is no step.
            whole: whether it computes all of their tokens; else it cannot select, and has full attention instead.
        """
        with self._alone(RunningForward(shape[1])) as forward:
            now = self._generations.now
            aside = shape != now.shape
            forward.only_full = aside or self._rows_only or not (whole or now.kept.complete)
            self._start(forward)
            yield
            now.kept.complete |= forward.selecting
            if not (aside or self._rows_only or self._uncounted):
                self.count()

    @contextmanager
    def unannounced(self, tokens: Tensor, attention_mask: Any = None) -> Iterator[None]:
        """A forward of a sampler from elsewhere: a step of the generation that its tokens show, if all layers compute
        all tokens; else it neither counts nor selects.

        Args:
            tokens: [B, T] ids, or [B, T, W] embeddings.
            attention_mask: whatever the model was given under that name.
        """
        follow = partial(self._generations.follow, tokens, attention_mask)
        with self._alone(RunningForward(tokens.shape[1], follow)) as forward:
            yield
            self._layers = max(self._layers, forward.layers)
            if forward.windows or 0 < forward.layers < self._layers:
                self.tally.windows += 1
            elif forward.follow is not None:
                self.tally.unseen += 1
            else:
                now = self._generations.now
                self.tally.note(self.phase in now.kept.sparse_phases, self.step, now.keeps_all)
                now.kept.complete |= forward.selecting
                self.count()

    @contextmanager
    def _alone(self, forward: RunningForward) -> Iterator[RunningForward]:
        """The only forward that is running."""
        if not self._running.acquire(blocking=False):
            raise RuntimeError("sparsify: a forward began inside another one of the same model, or in another thread")
        try:
            self._forward = forward
            yield forward
        finally:
            self._forward = None
            self._running.release()

    def _start(self, forward: RunningForward) -> None:
        """Of a forward whose generation is known: what an earlier try at this step selected is dropped."""
        forward.selecting = self.phase == SELECTING
        if forward.selecting:
            self._generations.now.kept = self._generations.nothing_kept()

    def count(self) -> None:
        """The step is done, if without a forward of the model: it was replayed, or needed none."""
        now = self._generations.now
        if now.keeps_all and self._wants_pattern:
            now.kept.backend, now.kept.backend_reason = DENSE, "every block is kept"
        now.step += 1

    @contextmanager
    def rows_only(self) -> Iterator[None]:
        """Forwards inside the context are no steps and have full attention: those of a cached sampler's few rows, which
        read all cached keys."""
        self._rows_only = True
        try:
            yield
        finally:
            self._rows_only = False

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Forwards inside the context are no steps."""
        self._uncounted = True
        try:
            yield
        finally:
            self._uncounted = False

    def check_idle(self) -> None:
        """RuntimeError if a forward is running, the rest of whose layers would attend to everything."""
        if self._running.locked():
            raise RuntimeError("sparsify: the context ended while another thread was inside a forward of the model")

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Any, full: Callable[[], Any], start: int
    ) -> Any:
        """One layer's attention in this step: `full()` in the full steps, else over the layer's kept blocks.

        Args:
            layer: index of the attention module.
            q: [B, Hq, n, D] after rotary embedding; of all tokens where blocks are selected.
            k, v: [B, Hkv, T, D].
            mask: the mask that the model gave its attention, in any of the forms of `valid_keys`.
            full: computes the model's own full attention.
            start: place of the first query in the sequence.
        """
        forward = self._followed()
        if k.shape[2] != forward.length:
            raise ValueError("sparsify: `rows` must be an argument of the model that was given to sparsify")
        forward.layers += 1
        phase, kept = self.phase, self._generations.now.kept
        if phase == FULL:
            return full()
        if phase == SPARSE:
            return kept.attention(layer, q.device)(q, k, v, start)
        return kept.select(layer, q, k, v, mask, full)

    def attend_foreign(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Any, full: Callable[[], Any]) -> Any:
        """`attend` of somebody else's model, whose caches and masks may be of any kind.

        Queries fewer than the keys are those of some tokens, wherever they lie, against a cache: they attend to all.

        Raises:
            ValueError: the keys are not those of all tokens, or the mask hides more than padding.
        """
        queries, keys = q.shape[2], k.shape[2]
        if queries != keys:
            self._note_window(queries, keys)
            return full()
        forward = self._followed()
        if keys != forward.length:
            raise ValueError(
                f"sparsify: a layer attends to {keys} tokens where the model was given {forward.length}: give sparsify "
                "the model that gets them all"
            )
        if self.phase != FULL and not same_tensor(mask, forward.mask):
            self._generations.now.kept.admit(mask, k)
            forward.mask = mask
        return self.attend(layer, q, k, v, mask, full, 0)

    def _note_window(self, queries: int, keys: int) -> None:
        _, length = self._generations.now.shape or (1, queries)
        if keys < max(queries, length):
            raise ValueError(
                f"sparsify: {queries} tokens attend to {keys} of the sequence's {length} keys: a cache that drops keys "
                "cannot be followed"
            )
        self._now_running().windows += 1

    def _followed(self) -> RunningForward:
        """The forward that is running, whose generation is known from here on."""
        forward = self._now_running()
        if forward.follow is not None:
            forward.follow()
            forward.follow = None
            self._start(forward)
        return forward

    def _now_running(self) -> RunningForward:
        if self._forward is None:
            raise RuntimeError(
                "sparsify: attention ran outside a forward of the model that was given to sparsify: give it the model "
                "that the sampler calls"
            )
        return self._forward

    def _timed(self, work: Callable[[], Any], device: torch.device) -> None:
        """Run `work` and count its time, the device's included, as compile time."""
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        self.compile_seconds += time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
