"""Compute kernels, each with its plain-torch twin."""

from .accuracy import error_and_bound
from .availability import block_sparse_attention, highest_places_triton, triton_fault, usable
from .block_scores import block_scores, block_scores_torch
from .elementwise import add_rms_norm, rms_norm, rotate, silu_product, store_rotated
from .flash import flash_block_sparse, flash_fault
from .full_attention import full_attention, full_attention_kernel

__all__ = [
    "add_rms_norm",
    "block_scores",
    "block_scores_torch",
    "block_sparse_attention",
    "error_and_bound",
    "flash_block_sparse",
    "flash_fault",
    "full_attention",
    "full_attention_kernel",
    "highest_places_triton",
    "rms_norm",
    "rotate",
    "silu_product",
    "store_rotated",
    "triton_fault",
    "usable",
]
