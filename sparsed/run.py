"""The kept blocks of one sequence: selected once in every layer, then what its forwards attend to.

When they are selected, a schedule says; the forward that selects computes full attention itself (arXiv 2509.24014,
section 4).
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .backends import DENSE, Problem, SparseAttention, choose_backend, sparse_attention
from .blocks import BlockGrid
from .config import SparseDConfig
from .kernels import block_scores, full_attention
from .masks import only_pads, valid_keys
from .schedule import FULL, SELECTING, SPARSE, Progress, Schedule
from .selection import Rule, compile_selection


class SparseRun:
    """State of the generations inside one `sparsify`, all of it: nothing stays on the model.

    Attributes:
        schedule: when attention is over kept blocks.
        step: index of the next denoising step (inside a forward: of the current one).
        committed: share of the generated tokens that are committed, if the sampler tells; no schedule by steps asks.
        backend, backend_reason: the kernel of the sparse steps and why it was taken, DENSE where every block is kept;
            None until blocks are wanted.
        compile_seconds: time spent choosing and compiling kernels, part of the time of the step that chooses.
        phase: what the next step (inside a forward: the current one) computes: FULL, SELECTING or SPARSE.
        pattern_version: changes whenever the selected blocks do.
    """

    def __init__(self, config: SparseDConfig, schedule: Schedule, gen_length: int, backend: str, rule: Rule):
        self.config, self.schedule, self.gen_length, self.rule = config, schedule, gen_length, rule
        self.compile_seconds = 0.0
        self.pattern_version = 0
        self._wanted = backend
        self._shape: tuple[int, ...] | None = None
        self._keeps_all = False
        self._running = threading.Lock()
        self._told = threading.Lock()  # held while a sampler's sequence is open
        self._uncounted = False
        # of the forward that is running: its sequence's length, and whether it can neither select nor be sparse
        self._length, self._only_full = 0, False
        self.reset()

    @property
    def density(self) -> float | None:
        """Attended over all valid (query, key) pairs in the sparse steps, mean over layers and heads."""
        if self.backend == DENSE:
            return 1.0
        return torch.stack([d.cpu() for d in self._densities]).mean().item() if self._densities else None

    @property
    def phase(self) -> str:
        """The first whole forward for which the schedule wants blocks selects; one of another sequence is full, and so
        are a window before blocks are selected and a run that keeps every block."""
        if self._only_full or self._keeps_all or not self._wants_pattern:
            return FULL
        return SPARSE if self._complete else SELECTING

    @property
    def _wants_pattern(self) -> bool:
        return self.schedule.wants_pattern(Progress(self.step, self.committed))

    def reset(self) -> None:
        """Drop the selected blocks: the next forward is step 0 of a new generation."""
        self.step, self.committed = 0, 0.0
        self.backend: str | None = None
        self.backend_reason: str | None = None
        self._forget()

    def _forget(self) -> None:
        self._complete = False
        self._grid: BlockGrid | None = None
        self._sparse: dict[tuple[int, torch.device], SparseAttention] = {}
        self._devices: set[torch.device] = set()
        self._densities: list[Tensor] = []
        self.pattern_version += 1

    def release(self) -> None:
        """Free the selected blocks and keep what was measured."""
        self._grid, self._sparse = None, {}

    @contextmanager
    def sequence(self, shape: tuple[int, ...]) -> Iterator[None]:
        """A new generation over [batch, length] tokens: as long as the context is open, its forwards are those of that
        shape, however many. Without it, a new one is taken to begin after the schedule's end, and with another shape.

        Raises:
            RuntimeError: inside another sequence.
        """
        if not self._told.acquire(blocking=False):
            raise RuntimeError("sparsify: a generation began inside another one of the same model")
        try:
            self._begin(shape)
            yield
        finally:
            self._told.release()

    def _begin(self, shape: tuple[int, ...]) -> None:
        if shape[1] < self.gen_length:
            raise ValueError(f"sparsify: gen_length {self.gen_length} exceeds the forward's {shape[1]} tokens")
        self.reset()
        self._shape = shape
        grid = BlockGrid(shape[1], shape[1] - self.gen_length, self.config.block_size)
        self._keeps_all = self._wanted == "auto" and grid.keeps_all(self.config.select)

    @contextmanager
    def forward(self, shape: tuple[int, ...], whole: bool = True) -> Iterator[None]:
        """A forward of the model, which is one step; if it fails, the step does not count.

        Args:
            shape: [batch, length] of the sequences.
            whole: whether it computes all of their tokens; else it cannot select, and has full attention instead.
        """
        if not self._running.acquire(blocking=False):
            raise RuntimeError("sparsify: a forward began inside another one of the same model, or in another thread")
        try:
            told, other = self._told.locked(), shape != self._shape
            aside = told and other  # of another sequence
            # a window is never the first of a generation, for its cache was filled by it
            is_over = whole and self.schedule.is_over(Progress(self.step, self.committed))
            if not told and (other or is_over):
                self._begin(shape)
            self._length = shape[1]
            self._only_full = aside or not (whole or self._complete)
            selecting = self.phase == SELECTING
            if selecting:
                self._forget()  # what an earlier try at this step selected before it failed
            yield
            self._complete = self._complete or selecting
            if not aside and not self._uncounted:
                self.count()
        finally:
            self._only_full = False
            self._running.release()

    def count(self) -> None:
        """The step is done, if without a forward of the model: it was replayed, or needed none."""
        if self._keeps_all and self._wants_pattern:
            self.backend, self.backend_reason = DENSE, "every block is kept"
        self.step += 1

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

    def current_phase(self) -> str:
        """The phase of the step whose forward is running; RuntimeError if none is."""
        if not self._running.locked():
            raise RuntimeError("sparsify: attention ran outside a forward of the model that was given to sparsify")
        return self.phase

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Any, full: Callable[[], Any], start: int | None = None
    ) -> Any:
        """One layer's attention in this step: `full()` in the full steps, else over the layer's kept blocks.

        Args:
            layer: index of the attention module.
            q: [B, Hq, n, D] after rotary embedding; of all tokens where blocks are selected.
            k, v: [B, Hkv, T, D].
            mask: the mask that the model gave its attention, in any of the forms of `valid_keys`.
            full: computes the model's own full attention.
            start: place of the first query in the sequence; None: the queries are the last ones.
        """
        phase = self.current_phase()
        if start is not None and k.shape[2] != self._length:
            raise ValueError("sparsify: `rows` must be an argument of the model that was given to sparsify")
        if phase == FULL:
            return full()
        if phase == SPARSE:
            start = k.shape[2] - q.shape[2] if start is None else start
            return self._sparse_attention(layer, q.device)(q, k, v, start)
        return self._select(layer, q, k, v, mask, full)

    def _select(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Any, full: Callable[[], Any]) -> Any:
        """Full attention, and the blocks of the sparse steps; a rule without scores attends to its blocks at once."""
        length = q.shape[2]
        if k.shape[2] != length:
            raise ValueError(f"sparsify needs all tokens in every forward, got {length} queries and {k.shape[2]} keys")
        if self._grid is None:
            config, valid = self.config, valid_keys(mask, k)
            self._grid = BlockGrid(length, length - self.gen_length, config.block_size, valid, config.dense_answer)
        grid = self._grid.to(q.device)
        out = lse = None
        if self.rule.needs_scores:
            # ours is the model's own full attention then, and can give the log-sum-exp along with it
            ours = only_pads(mask, k)
            out, lse = full_attention(q, k, v, grid.key_valid) if ours else (full(), None)
        first = q.device not in self._devices
        if first:
            self._devices.add(q.device)
            self._timed(lambda: self._prepare(q, k, lse, grid), q.device)

        def score() -> Tensor:
            compiled = self.backend != "gather"
            return block_scores(q, k, block_size=grid.block_size, key_valid=grid.key_valid, lse=lse, compiled=compiled)

        pattern = self.rule.select(q, score, grid, self.config.select)
        self._densities.append(pattern.density)
        assert self.backend is not None  # `_prepare` has chosen it
        sparse = self._sparse[layer, q.device] = sparse_attention(self.backend, pattern)
        return out if self.rule.needs_scores else sparse(q, k, v)

    def _sparse_attention(self, layer: int, device: torch.device) -> SparseAttention:
        """What the layer was given when it selected."""
        if (layer, device) not in self._sparse:
            raise RuntimeError(
                f"sparsify: no blocks were selected on {device} for attention {layer}; reset() after moving a model"
            )
        return self._sparse[layer, device]

    def _prepare(self, q: Tensor, k: Tensor, lse: Tensor | None, grid: BlockGrid) -> None:
        """Choose the backend, whose self-check compiles it, and have the selection's kernels compiled."""
        batch, heads, _, head_dim = q.shape
        padded = grid.key_valid is not None
        problem = Problem(q.device, q.dtype, batch, heads, k.shape[1], head_dim, grid.block_size, padded)
        self.backend, self.backend_reason = choose_backend(self._wanted, problem, grid.length)
        if self.backend != "gather" and self.rule.needs_scores:
            compile_selection(q, k, grid, lse)

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
