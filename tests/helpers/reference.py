"""Oracles that the tests compare with: plain loops in float64.

Written from the paper (arXiv 2509.24014) and from the published checkpoints' and samplers' behaviour, not from this
project's code, which is never imported here. Two parts: SparseD itself (schedule, block scores, isolated selection,
masked attention, density) and the two models' forwards on a state dict. The samplers are in reference_sampling.py.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import torch

# ---------------------------------------------------------------------------------------------------------- SparseD


class Sparse(NamedTuple):
    """The three parameters of the method, and whether the answer's rows read every key, which is not in the paper."""

    skip: float
    select: float
    block_size: int
    dense_answer: bool = False


def exact_share(fraction: float, total: int) -> int:
    """max(1, ceil(fraction * total)) with the decimal number that was typed, so without rounding."""
    return max(1, math.ceil(Fraction(str(fraction)) * total))


def n_full(skip: float, steps: int) -> int:
    return min(steps, exact_share(skip, steps))


def n_blocks(length: int, block_size: int) -> int:
    return -(-length // block_size)


def head_probabilities(q, k, valid):
    """softmax(q k^T / sqrt(head_dim)) of one head over its valid keys; rows of padded queries are zero. [T, T]"""
    scores = q.double() @ k.double().T / math.sqrt(q.shape[-1])
    scores[:, ~valid] = -math.inf
    probabilities = scores.softmax(-1)
    probabilities[~valid] = 0
    return probabilities


def block_scores(q, k, block_size, valid=None):
    """Attention mass of every pair of blocks, per QUERY head: float64 [B, Hq, nQ, nK]."""
    batch, heads, length, _ = q.shape
    valid = torch.ones(batch, length, dtype=torch.bool) if valid is None else valid.bool()
    shared = heads // k.shape[1]
    n = n_blocks(length, block_size)
    scores = torch.zeros(batch, heads, n, n, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            mass = head_probabilities(q[b, h], k[b, h // shared], valid[b])
            for i in range(n):
                for j in range(n):
                    rows = slice(i * block_size, (i + 1) * block_size)
                    columns = slice(j * block_size, (j + 1) * block_size)
                    scores[b, h, i, j] = mass[rows, columns].sum()
    return scores


def pooled(mass, block_size):
    """Sums of a [..., T, T] tensor over all pairs of blocks: [..., n, n], as `block_scores` sums them."""
    spare = -mass.shape[-1] % block_size
    mass = torch.nn.functional.pad(mass, (0, spare, 0, spare))
    return mass.unflatten(-1, (-1, block_size)).sum(-1).unflatten(-2, (-1, block_size)).sum(-2)


def parts(length, prompt_len, block_size):
    """(prompt blocks, generation blocks): a block is the generation's if no key of it belongs to the prompt."""
    n = n_blocks(length, block_size)
    generation = [j for j in range(n) if j * block_size >= prompt_len] or [n - 1]
    return [j for j in range(n) if j not in generation], generation


class Selection(NamedTuple):
    """keep: bool [B, Hq, nQ, nK]; gap: how far the closest decision was from a tie, as a part of a query's mass."""

    keep: torch.Tensor
    gap: float


def select(q, k, *, prompt_len, block_size, select, valid=None):
    """Isolated selection: each part keeps its own best blocks for every query block; of equals the earliest."""
    batch, heads, length, _ = q.shape
    valid = torch.ones(batch, length, dtype=torch.bool) if valid is None else valid.bool()
    scores = block_scores(q, k, block_size, valid)
    keep = torch.zeros(scores.shape, dtype=torch.bool)
    gap = math.inf
    for b in range(batch):
        held = [bool(valid[b, j * block_size : (j + 1) * block_size].any()) for j in range(scores.shape[-1])]
        for part in parts(length, prompt_len, block_size):
            candidates = [j for j in part if held[j]]
            if not candidates:
                continue
            budget = exact_share(select, len(candidates))
            for h in range(heads):
                for i in range(scores.shape[2]):
                    row = scores[b, h, i].tolist()
                    ranked = sorted(candidates, key=lambda j, row=row: (-row[j], j))
                    keep[b, h, i, ranked[:budget]] = True
                    if held[i] and budget < len(candidates):
                        gap = min(gap, (row[ranked[budget - 1]] - row[ranked[budget]]) / sum(row))
    return Selection(keep, gap)


def expand(keep, block_size, length):
    """Block mask [B, H, nQ, nK] -> token mask [B, H, T, T]."""
    block_of = [t // block_size for t in range(length)]
    return keep[:, :, block_of][:, :, :, block_of]


def dense_rows(allowed, prompt_len):
    """A token mask [B, H, T, T] with dense answer rows: all keys from the token before the generated region on."""
    allowed = allowed.clone()
    for row in range(max(prompt_len - 1, 0), allowed.shape[2]):
        allowed[:, :, row, :] = True
    return allowed


def attention(q, k, v, valid=None, allowed=None):
    """Dense float64 attention over the valid keys and, with `allowed` [B, Hq, T, T], only those pairs."""
    batch, heads, length, width = q.shape
    shared = heads // k.shape[1]
    out = torch.zeros(batch, heads, length, width, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            scores = q[b, h].double() @ k[b, h // shared].double().T / math.sqrt(width)
            if valid is not None:
                scores[:, ~valid[b].bool()] = -math.inf
            if allowed is not None:
                scores[~allowed[b, h]] = -math.inf
            out[b, h] = scores.softmax(-1).nan_to_num(0) @ v[b, h // shared].double()
    return out


def density(keeps, block_size, length, valid=None):
    """Attended valid (query, key) pairs over valid pairs, mean over layers and heads, of one batch row.

    Token masks are those of blocks of 1 token.
    """
    pairs = torch.ones(1, length, dtype=torch.bool) if valid is None else valid.bool()
    pairs = pairs[0, :, None] & pairs[0, None, :]
    shares = []
    for keep in keeps:
        for h in range(keep.shape[1]):
            attended = expand(keep, block_size, length)[0, h] & pairs
            shares.append(attended.sum().item() / pairs.sum().item())
    return sum(shares) / len(shares)


# ----------------------------------------------------------------------------------------------------------- models

TENSORS = {
    "dream": {
        "embedding": "model.embed_tokens.weight",
        "layer": "model.layers.{}.",
        "norm_1": "input_layernorm.weight",
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "output": "self_attn.o_proj",
        "norm_2": "post_attention_layernorm.weight",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
        "norm": "model.norm.weight",
        "head": "lm_head.weight",
    },
    "llada": {
        "embedding": "model.transformer.wte.weight",
        "layer": "model.transformer.blocks.{}.",
        "norm_1": "attn_norm.weight",
        "query": "q_proj",
        "key": "k_proj",
        "value": "v_proj",
        "output": "attn_out",
        "norm_2": "ff_norm.weight",
        "gate": "ff_proj",
        "up": "up_proj",
        "down": "ff_out",
        "norm": "model.transformer.ln_f.weight",
        "head": "model.transformer.ff_out.weight",
    },
}
DIMENSIONS = {  # what a config.json calls: layers, query heads, key/value heads
    "dream": ("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    "llada": ("n_layers", "n_heads", "n_kv_heads"),
}


def rms_norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def linear(x, weights, name):
    out = x @ weights[name + ".weight"].T
    return out + weights[name + ".bias"] if name + ".bias" in weights else out


def rotate(x, positions, theta):
    """Rotary embedding in half-split pairs (i, i + D/2). x [B, H, T, D], positions [B, T]."""
    half = x.shape[-1] // 2
    frequencies = torch.tensor([theta ** (-i / half) for i in range(half)], dtype=x.dtype)
    angles = positions[:, None, :, None].to(x.dtype) * frequencies
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def positions_of(family, valid):
    """Dream counts from the first real token and gives pads 1; LLaDA counts from the tensor's start."""
    if family == "dream":
        return torch.where(valid, valid.long().cumsum(-1) - 1, 1)
    return torch.arange(valid.shape[1]).expand_as(valid)


def forward(family, weights, config, ids, valid=None, allowed=None, dtype=torch.float64):
    """Logits [B, T, V] and, per layer, (q, k) after RoPE. `allowed`: per layer None or a token mask [B, Hq, T, T].

    Rows of padded tokens hold nothing of use.
    """
    name = TENSORS[family]
    layers, heads, kv_heads = (config[key] for key in DIMENSIONS[family])
    weights = {key: value.to(dtype) for key, value in weights.items()}
    valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid.bool()
    positions = positions_of(family, valid)
    eps, theta = config["rms_norm_eps"], config["rope_theta"]

    def split(x, count):
        return x.view(*ids.shape, count, -1).transpose(1, 2)

    x, rotated = weights[name["embedding"]][ids], []
    for i in range(layers):
        at = name["layer"].format(i)
        h = rms_norm(x, weights[at + name["norm_1"]], eps)
        q = rotate(split(linear(h, weights, at + name["query"]), heads), positions, theta)
        k = rotate(split(linear(h, weights, at + name["key"]), kv_heads), positions, theta)
        v = split(linear(h, weights, at + name["value"]), kv_heads)
        rotated.append((q, k))
        out = attention(q, k, v, valid, allowed[i] if allowed else None).to(dtype)
        x = x + linear(out.transpose(1, 2).reshape(*ids.shape, -1), weights, at + name["output"])
        h = rms_norm(x, weights[at + name["norm_2"]], eps)
        gate = linear(h, weights, at + name["gate"])
        x = x + linear(gate * torch.sigmoid(gate) * linear(h, weights, at + name["up"]), weights, at + name["down"])
    return rms_norm(x, weights[name["norm"]], eps) @ weights[name["head"]].T, rotated
