"""Oracles of the published samplers at temperature 0, one batch row at a time, dense or with SparseD inside.

A step is written out token by token. Every result carries how far its closest decision was from a tie, so that a test
can tell a wrong token from one that rounding may turn over.
"""

import math
from typing import NamedTuple

import torch

from tests.helpers.reference import dense_rows, expand, forward, n_full, select


class StepRunner:
    """The model as one row's sampler sees it: (token ids [T], step) -> logits [T, V], dense or with SparseD."""

    def __init__(self, family, weights, config, *, prompt_len, steps, valid=None, sparse=None):
        self.model = family, weights, config
        self.prompt_len, self.valid, self.sparse = prompt_len, valid, sparse
        self.n_full = n_full(sparse.skip, steps) if sparse else steps
        self.steps, self.keeps, self.gap = steps, None, math.inf

    def __call__(self, ids, step):
        allowed = self.masks(len(ids)) if step >= self.n_full else None
        logits, rotated = forward(*self.model, ids[None], self.valid, allowed)
        if step == self.n_full - 1 and self.n_full < self.steps:
            chosen = [
                select(
                    q,
                    k,
                    prompt_len=self.prompt_len,
                    block_size=self.sparse.block_size,
                    select=self.sparse.select,
                    valid=self.valid,
                )
                for q, k in rotated
            ]
            self.keeps, self.gap = [c.keep for c in chosen], min(c.gap for c in chosen)
        return logits[0]

    def masks(self, length):
        """What the sparse steps attend to: per layer a token mask [1, H, T, T]."""
        allowed = [expand(keep, self.sparse.block_size, length) for keep in self.keeps]
        return [dense_rows(mask, self.prompt_len) for mask in allowed] if self.sparse.dense_answer else allowed


class Trace(NamedTuple):
    """tokens [T]; counts: tokens committed at each step; gap: how far the closest decision was from a tie."""

    tokens: torch.Tensor
    counts: list
    gap: float


def filtered_probabilities(logits, top_p=None, top_k=None, temperature=1.0):
    """Dream's filters on one row, float64: top_p (the token that crosses the bound stays), then top_k (ties stay)."""
    kept = (logits.double() / temperature).tolist()
    if top_p is not None and top_p < 1:
        probabilities = torch.tensor(kept, dtype=torch.float64).softmax(-1).tolist()
        before = 0.0
        for token in sorted(range(len(kept)), key=lambda t: -probabilities[t]):
            if before > top_p:
                kept[token] = -math.inf
            before += probabilities[token]
    if top_k is not None:
        smallest = sorted(kept, reverse=True)[min(top_k, len(kept)) - 1]
        kept = [value if value >= smallest else -math.inf for value in kept]
    return torch.tensor(kept, dtype=torch.float64).softmax(-1)


def dream_confidence(probabilities, alg):
    best, second = sorted(probabilities.tolist(), reverse=True)[:2]
    if alg == "maskgit_plus":
        return best
    if alg == "topk_margin":
        return best - second
    return sum(p * math.log(p + 1e-10) for p in probabilities.tolist())


def dream_counts(masks, steps, eps=1e-3):
    """Tokens committed at each step, from `masks` of one row. In float32: the products sit just above integers."""
    times, counts = torch.linspace(1, eps, steps + 1), []
    for i in range(steps):
        share = torch.tensor(masks, dtype=torch.float32) * (1 - times[i + 1] / times[i])
        counts.append(int(share) if i < steps - 1 else masks)
        masks -= counts[-1]
    return counts


def closest(ranked_values, count):
    """Distance between the last taken and the first left of a descending list."""
    return ranked_values[count - 1] - ranked_values[count] if 0 < count < len(ranked_values) else math.inf


def runner_up(row):
    best, second = row.topk(2).values.tolist()
    return best - second


def dream_row(predict, prompt, *, gen_length, steps, alg, mask_id, top_p=None, top_k=None, eps=1e-3):
    """Dream's published sampler for one row at temperature 0: logits row j - 1 predicts token j (row 0 for j = 0)."""
    ids = torch.cat([prompt, torch.full((gen_length,), mask_id)])
    times, counts, gap = torch.linspace(1, eps, steps + 1), [], math.inf
    for step in range(steps):
        masked = [j for j in range(len(ids)) if ids[j] == mask_id]
        logits = predict(ids, step)
        share = torch.tensor(len(masked), dtype=torch.float32) * (1 - times[step + 1] / times[step])
        count = int(share) if step < steps - 1 else len(masked)
        confidence = {}
        for j in masked:
            confidence[j] = dream_confidence(filtered_probabilities(logits[max(j - 1, 0)], top_p, top_k), alg)
        ranked = sorted(masked, key=lambda j: (-confidence[j], j))
        gap = min(gap, closest([confidence[j] for j in ranked], count))
        for j in ranked[:count]:
            ids[j] = int(logits[max(j - 1, 0)].argmax())
            gap = min(gap, runner_up(logits[max(j - 1, 0)]))
        counts.append(count)
    return Trace(ids, counts, gap)


def llada_row(predict, prompt, *, gen_length, steps, block_length, mask_id, unconditional=None, cfg_scale=0.0,
              no_logits=(), no_confidence=()):  # fmt: skip
    """LLaDA's published sampler for one row at temperature 0, low_confidence.

    `no_logits`: tokens that are never drawn; `no_confidence`: tokens whose confidence is 0 once drawn.
    """
    ids = torch.cat([prompt, torch.full((gen_length,), mask_id)])
    per_block, step, counts, gap = steps * block_length // gen_length, 0, [], math.inf
    for end in range(len(prompt) + block_length, len(ids) + 1, block_length):
        for i in range(per_block):
            masked = [j for j in range(len(ids)) if ids[j] == mask_id]
            logits = predict(ids, step).clone()
            if cfg_scale:
                hidden = torch.cat([torch.full_like(prompt, mask_id), ids[len(prompt) :]])
                without = unconditional(hidden, step)
                logits = without + (cfg_scale + 1) * (logits - without)
            logits[:, list(no_logits)] = -math.inf
            drawn = logits.argmax(-1)
            margins = {j: runner_up(logits[j]) for j in masked}
            logits[:, list(no_confidence)] = -math.inf
            confidence = logits.softmax(-1)[range(len(ids)), drawn].tolist()
            ranked = sorted((j for j in masked if j < end), key=lambda j: (-confidence[j], j))
            count = block_length // per_block + (i < block_length % per_block)
            gap = min(gap, closest([confidence[j] for j in ranked], count))
            for j in ranked[:count]:
                ids[j] = drawn[j]
                gap = min(gap, margins[j])
            counts.append(count)
            step += 1
    return Trace(ids, counts, gap)


class Batch(NamedTuple):
    """tokens [B, L + N]; gap as in Trace, block selection included; keeps[row]: per layer bool [1, Hq, nQ, nK]."""

    tokens: torch.Tensor
    gap: float
    keeps: list


def generate(family, weights, config, prompts, *, valid=None, sparse=None, steps, gen_length, **options):
    """The published sampler row by row, each row with its own padding; `sparse` runs the method inside it."""
    rows, gap, keeps = [], math.inf, []
    sampler = dream_row if family == "dream" else llada_row
    for b, prompt in enumerate(prompts):
        row_valid = None
        if valid is not None:
            row_valid = torch.cat([valid[b].bool(), torch.ones(gen_length, dtype=torch.bool)])[None]
        halves = [
            StepRunner(family, weights, config, prompt_len=len(prompt), steps=steps, valid=row_valid, sparse=sparse)
            for _ in range(2)
        ]
        guidance = {"unconditional": halves[1]} if family == "llada" else {}
        mask_id = config["mask_token_id"]
        trace = sampler(halves[0], prompt, gen_length=gen_length, steps=steps, mask_id=mask_id, **guidance, **options)
        rows.append(trace.tokens)
        gap = min(gap, trace.gap, halves[0].gap, halves[1].gap)
        keeps.append(halves[0].keeps)
    return Batch(torch.stack(rows), gap, keeps)


def decided(family, weights, config, *, prompt_len, padding=(0,), clear=2e-5, unlike=None, **options):
    """Random prompts, one row for each number in `padding`, and their `generate`: the first seed without near-ties.

    With `unlike`, also one whose tokens differ from those under these other options.
    Returns (prompts [B, prompt_len] with the pad id in front, valid [B, prompt_len], Batch).
    """
    valid = torch.tensor([[t >= pad for t in range(prompt_len)] for pad in padding])
    special = min(config[key] for key in config if key.endswith("token_id"))
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        prompts = torch.randint(0, special, valid.shape, generator=generator)
        prompts[~valid] = config["pad_token_id"]
        batch = generate(family, weights, config, prompts, valid=valid, **options)
        if batch.gap < clear:
            continue
        if unlike is None:
            return prompts, valid, batch
        other = generate(family, weights, config, prompts, valid=valid, **options | unlike)
        if not torch.equal(other.tokens, batch.tokens):
            return prompts, valid, batch
    raise AssertionError("no seed without a near-tie: the case cannot tell right from wrong")
