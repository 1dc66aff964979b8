"""The blocks that a generation keeps: selected once in every layer, read by its sparse forwards.

The forward that selects computes full attention itself (arXiv 2509.24014, section 4).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .backends import DENSE, Problem, SparseAttention, choose_backend, sparse_attention
from .blocks import BlockGrid
from .config import SparseDConfig
from .kernels import block_scores, full_attention
from .masks import check_left_padded, only_pads, valid_keys
from .ranks import Ranks
from .schedule import SELECTING, SPARSE
from .selection import Rule, compile_selection

Timed = Callable[[Callable[[], Any], torch.device], None]


class KeptBlocks:
    """What the layers have selected in one generation, and attention over it.

    Args:
        config, gen_length, rule: as in `sparsify`.
        wanted: the backend that was asked for.
        timed: runs work on a device that counts as compile time.
        version: unlike that of any other one.
        ranks: the processes that have the heads of the same layers.

    Attributes:
        complete: whether a forward has selected in all of its layers.
        backend, backend_reason: the kernel and why it was taken, DENSE where every block is kept; None before.
    """

    def __init__(
        self,
        config: SparseDConfig,
        gen_length: int,
        rule: Rule,
        wanted: str,
        timed: Timed,
        version: int,
        ranks: Ranks,
    ):
        self.config, self.gen_length, self.rule = config, gen_length, rule
        self.wanted, self.timed, self.version, self.ranks = wanted, timed, version, ranks
        self.complete = False
        self.backend: str | None = None
        self.backend_reason: str | None = None
        self._grid: BlockGrid | None = None
        self._sparse: dict[tuple[int, torch.device], SparseAttention] = {}
        self._devices: set[torch.device] = set()
        self._densities: list[Tensor] = []

    @property
    def density(self) -> float | None:
        """Attended over all valid (query, key) pairs, mean over layers and heads; None before blocks are selected."""
        if self.backend == DENSE:
            return 1.0
        return torch.stack([d.cpu() for d in self._densities]).mean().item() if self._densities else None

    @property
    def sparse_phases(self) -> tuple[str, ...]:
        """In which the blocks are read: a rule without scores reads those that it selects at once."""
        return (SPARSE,) if self.rule.needs_scores else (SELECTING, SPARSE)

    def keeps_all(self, length: int) -> bool:
        """Whether no block of `length` tokens is left out, and no backend was named to compute them all the same."""
        grid = BlockGrid(length, length - self.gen_length, self.config.block_size)
        return self.wanted == "auto" and grid.keeps_all(self.config.select)

    def release(self) -> None:
        """Free the blocks and keep what was measured."""
        self._grid, self._sparse = None, {}

    def select(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Any, full: Callable[[], Any]) -> Any:
        """Full attention, and the blocks of the sparse steps; a rule without scores attends to its blocks at once.

        Arguments are those of `SparseRun.attend`, of all tokens.
        """
        length = q.shape[2]
        if k.shape[2] != length:
            raise ValueError(f"sparsify needs all tokens in every forward, got {length} queries and {k.shape[2]} keys")
        grid = self._grid_of(mask, k)
        out = lse = None
        if self.rule.needs_scores:
            # ours is the model's own full attention then, and can give the log-sum-exp along with it
            ours = only_pads(mask, k)
            out, lse = full_attention(q, k, v, grid.key_valid) if ours else (full(), None)
        first = q.device not in self._devices
        if first:
            self._devices.add(q.device)
            self.timed(lambda: self._prepare(q, k, lse, grid), q.device)

        def score() -> Tensor:
            compiled = self.backend != "gather"
            return block_scores(q, k, block_size=grid.block_size, key_valid=grid.key_valid, lse=lse, compiled=compiled)

        pattern = self.rule.select(q, score, grid, self.config.select)
        self._densities.append(self.ranks.mean(pattern.density))
        assert self.backend is not None  # `_prepare` has chosen it
        sparse = self._sparse[layer, q.device] = sparse_attention(self.backend, pattern)
        return out if self.rule.needs_scores else sparse(q, k, v)

    def attention(self, layer: int, device: torch.device) -> SparseAttention:
        """What the layer was given when it selected."""
        if (layer, device) not in self._sparse:
            raise RuntimeError(
                f"sparsify: no blocks were selected on {device} for attention {layer}; reset() after moving a model"
            )
        return self._sparse[layer, device]

    def admit(self, mask: Any, k: Tensor) -> None:
        """Look into a mask that is not known to be padding's, and the same for all layers and steps; waits for the
        device.

        Raises:
            ValueError: it is not.
        """
        valid, known = valid_keys(mask, k), self._grid_of(mask, k).key_valid
        same = valid is known if valid is None or known is None else torch.equal(valid, known)
        if not same:
            raise ValueError("sparsify: the attention mask is not the one with which the blocks were selected")

    def _grid_of(self, mask: Any, k: Tensor) -> BlockGrid:
        """The blocks of the sequence, by the first layer's mask, on the device of k."""
        if self._grid is None:
            valid, length, config = valid_keys(mask, k), k.shape[2], self.config
            if valid is not None:
                check_left_padded(valid)
            self._grid = BlockGrid(length, length - self.gen_length, config.block_size, valid, config.dense_answer)
        return self._grid.to(k.device)

    def _prepare(self, q: Tensor, k: Tensor, lse: Tensor | None, grid: BlockGrid) -> None:
        """Choose the backend, whose self-check compiles it, and have the selection's kernels compiled."""
        batch, heads, _, head_dim = q.shape
        padded = grid.key_valid is not None
        problem = Problem(q.device, q.dtype, batch, heads, k.shape[1], head_dim, grid.block_size, padded)
        self.backend, self.backend_reason = choose_backend(self.wanted, problem, grid.length, self.ranks)
        if self.backend != "gather" and self.rule.needs_scores:
            compile_selection(q, k, grid, lse)
