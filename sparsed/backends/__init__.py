"""Attention over the kept key blocks: a backend each for a kernel, all of which agree, and the choice among them."""

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
