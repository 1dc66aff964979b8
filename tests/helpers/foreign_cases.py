"""Samplers as other people write them, and a brute-force twin of SparseD that stands in for PyTorch's attention."""

import torch
import torch.nn.functional as F

from tests.helpers import reference
from tests.helpers.standins import MASK, HubDream

SPARSE_STEPS = {"block_size": 16, "select": 0.4}


def masked_behind(prompt, gen_length):
    return F.pad(prompt, (0, gen_length), value=MASK)


def placed(model, logits):
    """Logits of which row j speaks of token j, in both families, and never of the mask."""
    if isinstance(model, HubDream):
        logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
    logits[..., MASK] = -torch.inf
    return logits


def commit(ids, logits, threshold=None, allowed=None):
    """Write each row's likeliest masked token, or all that reach a threshold."""
    probability, tokens = logits.softmax(-1).max(-1)
    masked = ids == MASK if allowed is None else (ids == MASK) & allowed
    probability = probability.masked_fill(~masked, -1)
    chosen = masked & (probability >= (2 if threshold is None else threshold))
    chosen |= masked & (probability == probability.max(-1, keepdim=True).values)
    ids[chosen] = tokens[chosen]


@torch.no_grad()
def threshold_sampler(model, prompt, gen_length, threshold=0.8):
    """As many forwards as the text needs; returns the tokens and how many."""
    ids, forwards = masked_behind(prompt, gen_length), 0
    while (ids == MASK).any():
        commit(ids, placed(model, model(ids).logits), threshold)
        forwards += 1
    return ids, forwards


@torch.no_grad()
def cached_sampler(model, prompt, cache, threshold=None, gen_length=24, block_length=8):
    """Block after block; with a cache, a forward of all tokens, then of the suffix (prefix) or the block (dual) alone.

    Returns the tokens, and how many forwards were of all of them.
    """
    ids, whole = masked_behind(prompt, gen_length), 0
    for start in range(prompt.shape[1], ids.shape[1], block_length):
        block = torch.zeros_like(ids, dtype=torch.bool)
        block[:, start : start + block_length] = True
        window, past, replace = slice(0, None), None, None
        while (ids[block] == MASK).any():
            out = model(ids[:, window], past=past, replace=replace)
            commit(ids[:, window], placed(model, out.logits), threshold, block[:, window])
            whole += past is None
            if past is None and cache == "prefix":
                window, past = slice(start, None), [tuple(x[:, :, :start] for x in layer) for layer in out.past]
            elif past is None and cache == "dual":
                window, past, replace = slice(start, start + block_length), out.past, block[0]
    return ids, whole


class Twin:
    """`F.scaled_dot_product_attention` of a model with SparseD inside, by loops in float64.

    A forward is a run of `layers` calls with as many queries as keys; the last of `n_full` selects, the later ones read
    what it selected. Other calls are left alone.
    """

    def __init__(self, layers, n_full, prompt_len):
        self.layers, self.n_full, self.prompt_len = layers, n_full, prompt_len
        self.calls, self.keeps, self.real = 0, {}, F.scaled_dot_product_attention

    def __call__(self, q, k, v, attn_mask=None, **named):
        if q.shape[2] != k.shape[2]:
            return self.real(q, k, v, attn_mask=attn_mask, **named)
        (step, layer), self.calls = divmod(self.calls, self.layers), self.calls + 1
        if step == self.n_full - 1:
            self.keeps[layer] = reference.select(q, k, prompt_len=self.prompt_len, **SPARSE_STEPS).keep
        allowed = None
        if step >= self.n_full:
            allowed = reference.expand(self.keeps[layer], SPARSE_STEPS["block_size"], q.shape[2])
        return reference.attention(q, k, v, None, allowed).to(q.dtype)
