"""Block scores: how much attention probability the queries of one block give to the keys of another."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .availability import block_scores_triton, usable

# float32 elements of one chunk of attention probabilities in plain torch, which holds at least one block of queries:
# small ones stay in a CPU's cache, large ones fill a GPU
CPU_CHUNK, GPU_CHUNK = 1 << 19, 1 << 24


def block_scores(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int,
    key_valid: Tensor | None = None,
    lse: Tensor | None = None,
    compiled: bool = True,
) -> Tensor:
    """Sum softmax(q k^T / sqrt(D)) over the queries of block i and the keys of block j (arXiv 2509.24014, section 4).

    Args:
        q: [B, Hq, T, D], after rotary embedding.
        k: [B, Hkv, T, D]; query head h reads key head h // (Hq // Hkv).
        block_size: tokens per block; the last block may be shorter.
        key_valid: bool [B, T], False where a token is padding: it then adds nothing, as key or as query.
        lse: [B, Hq, T] float32, the log-sum-exp of every query's scaled logits over the valid keys, if it is known.
        compiled: use the Triton kernel on a CUDA device that has Triton; without, plain torch, which needs no compiler.

    Returns:
        [B, Hq, nQ, nK] float32, nQ = nK = ceil(T / block_size).
    """
    # a block longer than the sequence is the sequence; in 16s, because the kernel is compiled for its block size
    block_size = min(block_size, -(-q.shape[2] // 16) * 16)
    # the kernel's tiles hold whole blocks, or parts of them that are not too small
    if compiled and block_size % 16 == 0 and usable(q, k):
        return block_scores_triton(q, k, block_size=block_size, key_valid=key_valid, lse=lse)
    return block_scores_torch(q, k, block_size=block_size, key_valid=key_valid)


def block_scores_torch(q: Tensor, k: Tensor, *, block_size: int, key_valid: Tensor | None = None) -> Tensor:
    """`block_scores` in plain torch, in chunks of bounded size, on any device."""
    batch, heads, length, _ = q.shape
    n_blocks = -(-length // block_size)
    scores = q.new_zeros(batch, heads, n_blocks, n_blocks, dtype=torch.float32)
    budget = CPU_CHUNK if q.device.type == "cpu" else GPU_CHUNK
    rows = max(1, budget // (length * block_size)) * block_size
    for b in range(batch):
        valid = None if key_valid is None else key_valid[b]
        for h in range(heads):
            keys = k[b, h * k.shape[1] // heads].float()
            for start in range(0, length, rows):
                stop = min(start + rows, length)
                probabilities = _probabilities(q[b, h, start:stop].float(), keys, valid)
                if valid is not None:
                    probabilities = probabilities * valid[start:stop, None]
                pooled = _pool(_pool(probabilities, block_size).mT, block_size).mT
                scores[b, h, start // block_size : -(-stop // block_size)] = pooled
    return scores


def _probabilities(q: Tensor, k: Tensor, key_valid: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D)) over the valid keys: q [rows, D], k [T, D] -> [rows, T], zeros if no key is valid."""
    logits = (q @ k.mT) * q.shape[-1] ** -0.5
    if key_valid is None:
        return logits.softmax(-1)
    return logits.masked_fill(~key_valid, -torch.inf).softmax(-1).nan_to_num(0.0)


def _pool(x: Tensor, block_size: int) -> Tensor:
    """Sum the last dimension of x [rows, T] over blocks -> [rows, ceil(T / block_size)]."""
    return F.pad(x, (0, -x.shape[-1] % block_size)).unflatten(-1, (-1, block_size)).sum(-1)
