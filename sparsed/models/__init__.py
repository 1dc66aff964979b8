"""The models, in plain PyTorch, and their loading; nothing of SparseD is in here."""

from .dream import DreamConfig, DreamModel
from .illada import ILLaDAConfig, ILLaDAModel
from .llada import LLaDAConfig, LLaDAModel
from .loading import load_model
from .tokenizer import load_tokenizer

__all__ = [
    "DreamConfig",
    "DreamModel",
    "ILLaDAConfig",
    "ILLaDAModel",
    "LLaDAConfig",
    "LLaDAModel",
    "load_model",
    "load_tokenizer",
]
