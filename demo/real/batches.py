"""Training batches of the adaptation: windows of the ids, masked at random; the same on every machine for a seed and
a step."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LOWEST = 0.02  # rate of masking: lower, a handful of tokens would weigh more than all others
SHORTEST_SPAN = 32
FLOOR = 0.02  # of the highest learning rate, at the end


class Batch(NamedTuple):
    """Sequences with masks, and what the model should predict.

    Args:
        ids: int64 [B, T], some of them the mask's.
        rows: int64 [m], the flat logit rows b * T + t - 1 that predict the masked tokens b, t.
        targets: int64 [m], these tokens.
        weights: float32 [m], one over the rate at which each token was masked.
        places: tokens that could have been masked.
    """

    ids: Tensor
    rows: Tensor
    targets: Tensor
    weights: Tensor
    places: int

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(part.to(device) for part in self[:-1]), self.places)


@dataclass(frozen=True)
class Recipe:
    """The settings of a run, in addition to its checkpoint and its ids.

    Args:
        lengths: tokens of a sequence -> the share of the batches that have them.
        batch_tokens: of a step.
        at_once: tokens of a batch; a step has several batches.
        spans: share of the sequences that is masked only within a span.
    """

    steps: int
    lr: float
    warmup: int
    lengths: dict[int, float]
    batch_tokens: int
    at_once: int
    spans: float
    seed: int

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0: warming up, and falling as a cosine to FLOOR of `lr`."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        return self.lr * warm * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * step / self.steps)))

    def batches(self, ids: np.ndarray, step: int, mask_id: int) -> list[Batch]:
        """A step's batches, of one length each; lengths are drawn for every step, so nearly every step has several."""
        generator = torch.Generator().manual_seed((self.seed << 32) + step)
        shares = torch.tensor(list(self.lengths.values()), dtype=torch.float64)
        count = max(1, self.batch_tokens // self.at_once)
        drawn = torch.multinomial(shares, count, replacement=True, generator=generator).tolist()
        return [self.batch(ids, list(self.lengths)[index], mask_id, self.spans, generator) for index in drawn]

    def batch(self, ids: np.ndarray, length: int, mask_id: int, spans: float, generator: torch.Generator) -> Batch:
        """Windows from anywhere in the ids, across the ends of documents."""
        starts = torch.randint(0, len(ids) - length + 1, (max(1, self.at_once // length), 1), generator=generator)
        tokens = torch.from_numpy(ids[starts.numpy() + np.arange(length)].astype(np.int64))
        return masked(tokens, mask_id, spans, generator)


def masked(tokens: Tensor, mask_id: int, spans: float, generator: torch.Generator) -> Batch:
    """Mask tokens int64 [B, T] as training sees them.

    Every sequence has its own rate; the rates are spread evenly over LOWEST to 1. The first token is never masked,
    because no row predicts it.

    Args:
        spans: probability that a sequence is masked only within a span of SHORTEST_SPAN to T / 2 tokens, like an answer
            after its prompt; the others are masked everywhere.
    """
    count, length = tokens.shape

    def drawn(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    even = (torch.randperm(count, generator=generator) + drawn(count)) / count
    rates = (LOWEST + (1 - LOWEST) * even)[:, None]
    widths = SHORTEST_SPAN * max(1, length / 2 / SHORTEST_SPAN) ** drawn(count, 1)
    starts = drawn(count, 1) * (length - widths).clamp(min=0)
    places = torch.arange(length)[None]
    maskable = (places >= starts) & (places < starts + widths) | (drawn(count, 1) >= spans)
    maskable[:, 0] = False
    chosen = maskable & (drawn(count, length) < rates)
    return Batch(
        ids=tokens.masked_fill(chosen, mask_id),
        rows=chosen.flatten().nonzero()[:, 0] - 1,
        targets=tokens[chosen],
        weights=(1 / rates).expand_as(tokens)[chosen],
        places=int(maskable.sum()),
    )
