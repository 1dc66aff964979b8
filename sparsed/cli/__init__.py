"""The command line of the two scripts."""

from .main import main_dream, main_llada

__all__ = ["main_dream", "main_llada"]
