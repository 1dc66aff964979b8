"""The samplers of both families: whole-sequence denoising, full attention or SparseD."""

from .dream import dream_generate
from .llada import llada_generate
from .loop import generate
from .settings import Settings, settings_for

__all__ = ["Settings", "dream_generate", "generate", "llada_generate", "settings_for"]
