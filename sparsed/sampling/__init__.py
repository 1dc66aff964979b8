"""The samplers of both families: whole-sequence denoising, full attention or SparseD."""

from .dream import dream_generate
from .llada import llada_generate
from .loop import generate, schedule_of
from .settings import FAMILIES, Settings, own_options, settings_for, settings_for_answer

__all__ = [
    "FAMILIES",
    "Settings",
    "dream_generate",
    "generate",
    "llada_generate",
    "own_options",
    "schedule_of",
    "settings_for",
    "settings_for_answer",
]
