"""SparseD: sparse attention for masked diffusion language models (arXiv 2509.24014)."""

from .config import SparseDConfig
from .models import load_model, load_tokenizer
from .patch import sparsify
from .sampling import dream_generate, llada_generate
from .selection import select_blocks

__all__ = [
    "SparseDConfig",
    "dream_generate",
    "llada_generate",
    "load_model",
    "load_tokenizer",
    "select_blocks",
    "sparsify",
]
