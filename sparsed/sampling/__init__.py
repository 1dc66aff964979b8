"""The samplers of both families: whole-sequence denoising, full attention or SparseD."""

from .dream import dream_generate
from .llada import llada_generate

__all__ = ["dream_generate", "llada_generate"]
