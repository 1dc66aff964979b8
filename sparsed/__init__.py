"""SparseD: sparse attention for masked diffusion language models (arXiv 2509.24014)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
HOMES = {
    "SparseDConfig": "config",
    "dream_generate": "sampling",
    "llada_generate": "sampling",
    "load_model": "models",
    "load_tokenizer": "models",
    "select_blocks": "selection",
    "sparsify": "patch",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used, because PyTorch takes seconds to import."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
