"""Attention over the kept key blocks: one backend per kernel, all with the same result, and the choice among them."""

from .backend import Backend, BackendError, Problem, SparseAttention
from .registry import BACKENDS, DENSE, check_backend, choose_backend, sparse_attention

__all__ = [
    "BACKENDS",
    "DENSE",
    "Backend",
    "BackendError",
    "Problem",
    "SparseAttention",
    "check_backend",
    "choose_backend",
    "sparse_attention",
]
