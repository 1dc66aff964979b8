"""The backends by name, and the choice among them."""

from torch import Tensor

from ..blocks import Pattern
from ..kernels import full_attention
from ..ranks import ALONE, Ranks
from .backend import Backend, BackendError, Problem, SparseAttention
from .flash import FLASH
from .flex import FLEX
from .gather import GATHER
from .self_check import self_check
from .triton import TRITON

# what a run and its record name where every block is kept, so that no backend runs: the model's own full attention
DENSE = "full"

# in the order in which "auto" tries those that it may take
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (FLASH, TRITON, FLEX, GATHER)}


def sparse_attention(name: str, pattern: Pattern) -> SparseAttention:
    """What the sparse steps compute: the backend's attention, full attention for the queries that read every key."""
    kept, grid = BACKENDS[name].build(pattern), pattern.grid
    if not grid.dense_answer:
        return kept

    def attention(q: Tensor, k: Tensor, v: Tensor, start: int = 0) -> Tensor:
        first = max(0, grid.first_dense - start)  # of the queries
        if first >= q.shape[2]:
            return kept(q, k, v, start)
        dense = full_attention(q[:, :, first:], k, v, grid.key_valid)[0]
        if first == 0:
            return dense
        out = kept(q, k, v, start)
        out[:, :, first:] = dense  # in place: the kernel's few rows more cost less than a copy of all
        return out

    return attention


def check_backend(name: str) -> None:
    """Raise BackendError unless there is a backend of that name, or it is "auto"."""
    if name not in ("auto", *BACKENDS):
        raise BackendError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {name!r}")


def choose_backend(name: str, problem: Problem, length: int, ranks: Ranks = ALONE) -> tuple[str, str]:
    """The backend to use for sequences of `length` tokens, and why in a few words.

    It is the named one, or for "auto" the fastest that is available and right, on all of the ranks.

    Raises:
        BackendError: the named backend is unknown, cannot run here, or fails its numeric self-check.
    """
    check_backend(name)
    passed_over: list[str] = []
    automatic = [backend for backend in BACKENDS.values() if backend.auto_from is not None]
    for candidate in automatic if name == "auto" else [BACKENDS[name]]:
        fault = candidate.fault(problem)
        if fault is None and name == "auto" and candidate.auto_from and length < candidate.auto_from:
            fault = f"gains nothing below {candidate.auto_from} tokens"
        faults = ranks.gathered(fault or self_check(candidate, problem))
        fault = next((found for found in faults if found is not None), None)
        if fault is None:
            why = "named by the user" if name != "auto" else "fastest available, self-check passed"
            return candidate.name, "; ".join([why, *passed_over])
        passed_over.append(f"{candidate.name}: {fault}")
    raise BackendError(f"backend cannot run here: {'; '.join(passed_over)}")
