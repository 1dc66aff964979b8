"""From logits to proposals: each candidate's token, its probability, and its rank."""

from typing import NamedTuple

import torch
from torch import Tensor


class Proposal(NamedTuple):
    """For n candidates.

    Args:
        tokens: int64 [n].
        probability: float32 [n], the model's for that token, whatever ranks it.
        ranking: [n], higher commits first.
        certainty: float32 [n], the token's probability before temperature, filters and noise, if a threshold or factor
            needs it.
    """

    tokens: Tensor
    probability: Tensor
    ranking: Tensor
    certainty: Tensor | None


def pick(probabilities: Tensor, greedy: bool, generator: torch.Generator | None) -> Tensor:
    """One token of each row of probabilities [n, V], the likeliest or a draw -> [n] int64."""
    return probabilities.argmax(-1) if greedy else draw(probabilities, generator)


def draw(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """One token of each row of probabilities [n, V] -> [n] int64.

    The largest probability over exponential noise, as `torch.multinomial` draws. That one is not used, because over a
    number that is not finite it would end the process's use of the GPU.
    """
    noise = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / noise).argmax(-1)


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """float32 logits [n, V] divided by a temperature above 0, the highest moved to 0 so that none overflows."""
    peak = logits.amax(dim=-1, keepdim=True)
    return (logits - peak) / max(temperature, torch.finfo(logits.dtype).tiny)


def probability_of(tokens: Tensor, probabilities: Tensor) -> Tensor:
    """The entries of probabilities [n, V] at tokens [n] -> [n]."""
    return probabilities.gather(-1, tokens[:, None]).squeeze(-1)


def filtered_probabilities(logits: Tensor, temperature: float, top_p: float | None, top_k: int | None) -> Tensor:
    """softmax of logits [n, V] after temperature, nucleus and top-k filters, float32 [n, V].

    A token stays if fewer than top_k tokens are likelier, with at most top_p of the probability. Tokens as likely as
    the last one that stays also stay.
    """
    logits = logits.float()
    if temperature > 0:
        logits = tempered(logits, temperature)
    nucleus = top_p if top_p is not None and top_p < 1 else None
    if nucleus is None and not top_k:
        return logits.softmax(-1)
    # with top_k, the nucleus need not be looked for beyond the top_k likeliest: no sort of the vocabulary
    ordered = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]), dim=-1).values
    if nucleus is not None:
        shares = (ordered - logits.logsumexp(-1, keepdim=True)).exp()
        ordered = ordered.masked_fill(shares.cumsum(-1) - shares > nucleus, torch.inf)
    lowest = ordered.amin(-1, keepdim=True)
    return logits.masked_fill(logits < lowest, torch.finfo(logits.dtype).min).softmax(-1)


def confidence(probabilities: Tensor, drawn: Tensor, alg: str) -> Tensor:
    """What ranks Dream's candidates: probabilities [n, V], those of the drawn tokens [n] -> [n]."""
    if alg == "topk_margin":
        first, second = probabilities.topk(2, dim=-1).values.unbind(-1)
        return first - second
    if alg == "entropy":
        return (probabilities * (probabilities + 1e-10).log()).sum(-1)
    return drawn


def draw_order(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Perturb logits [n] with Gumbel noise: their order is then a draw from softmax(logits) without replacement."""
    noise = torch.rand(logits.shape, generator=generator, device=logits.device)
    return logits - (-noise.clamp_min(torch.finfo(noise.dtype).tiny).log()).log()
