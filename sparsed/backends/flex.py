"""`flex`: PyTorch's FlexAttention over the pattern's BlockMask, as in the paper; used only where it is named."""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.fx.experimental import _config as symbolic_shapes

from ..blocks import FlexLists, Pattern
from ..kernels import triton_fault
from .backend import Backend, Problem, SparseAttention, from_block_start

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import FlexKernelOptions

# compilations of one process: two for each kind of problem, where torch gives up after 8
COMPILED = 128


def flex_attention(pattern: Pattern) -> SparseAttention:
    """FlexAttention's Triton kernel over the kept blocks."""
    grid = pattern.grid
    # the queries that read every key are not the backend's, so no block is partial but for padding
    kept = replace(pattern, grid=replace(grid, dense_answer=False))
    width = pattern.indices.shape[-1]

    @functools.lru_cache(maxsize=2)  # a layer's forwards have all queries, or those of one window
    def lists_of(first: int, stop: int) -> FlexLists:
        return kept.flex_lists(slice(first, stop), width)

    options = kernel_options(grid.block_size)

    def attention(q: Tensor, k: Tensor, v: Tensor, start: int = 0) -> Tensor:
        q, blocks, lead = from_block_start(q, grid, start)
        with _tracing():
            out = _compiled()(q, k, v, lists_of(blocks.start, blocks.stop), grid.block_size, options)
        return out[:, :, lead:]

    return attention


def kernel_options(block_size: int) -> "FlexKernelOptions":
    """The kernel is named, because the one that is chosen otherwise dropped the blocks; its tiles divide a block."""
    tile = math.gcd(block_size, 128)
    # the tiles that FlexAttention takes by itself divide 128
    return {"BACKEND": "TRITON"} if tile == 128 else {"BACKEND": "TRITON", "BLOCK_M": tile, "BLOCK_N": tile}


@contextmanager
def _tracing() -> Iterator[None]:
    """How `_compiled` is to be called: sizes that happen to be equal are not taken to be equal for all lengths (each
    would be another compilation), and numbers are constants. No gradient goes through the sparse steps of any backend;
    traced for one, it would be another compilation, too."""
    numbers = torch._dynamo.config.patch(recompile_limit=COMPILED, specialize_int=True)
    sizes = symbolic_shapes.patch(use_duck_shape=False)  # type: ignore[attr-defined]  # a config module gets it later
    with torch.no_grad(), numbers, sizes:
        yield


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """FlexAttention over a pattern's lists, compiled when it is first used.

    The tensors' sizes are dynamic, so that what the self-check compiles serves every length. The block size and the
    tiles must not be: torch's cache of compiled graphs does not distinguish dynamic block sizes, and the kernel of
    another one is wrong. Hence `specialize_int` in `_tracing`, and a mask made inside, whose lengths are sizes of
    tensors.
    """
    from torch.nn.attention.flex_attention import flex_attention  # a second to import

    def attention(q: Tensor, k: Tensor, v: Tensor, lists: FlexLists, size: int, options: "FlexKernelOptions") -> Tensor:
        block_mask = lists.block_mask(size, (q.shape[2], k.shape[2]))
        shared = q.shape[1] != k.shape[1]
        return flex_attention(q, k, v, block_mask=block_mask, enable_gqa=shared, kernel_options=options)

    # uncompiled, it would hold all scores at once: `fullgraph` has it fail instead
    compiled: Callable[..., Tensor] = torch.compile(attention, fullgraph=True, dynamic=True)
    return compiled


def fault(problem: Problem) -> str | None:
    """Why it cannot run a problem, or None."""
    if problem.head_dim < 16:
        return f"needs heads of at least 16 numbers, not {problem.head_dim}"
    return triton_fault(problem.device)


FLEX = Backend("flex", flex_attention, fault, auto_from=None)
