"""Compute kernels, each beside its plain-torch twin."""

from .block_scores import block_scores, block_scores_torch

__all__ = ["block_scores", "block_scores_torch"]
