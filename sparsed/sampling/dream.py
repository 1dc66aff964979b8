"""Dream's sampler: every masked position competes in every step; row j - 1 of the logits predicts token j."""

import torch
from torch import Tensor

from ..config import SparseDConfig, check_numbers
from ..models.common import DiffusionLM
from .common import (
    OnStep,
    Step,
    attention_of,
    check_choice,
    check_family,
    check_temperature,
    commit,
    draw,
    make_canvas,
    most_confident,
    probability_of,
    tell,
    tempered,
)
from .denoiser import Denoiser

# the last time of the grid on which Dream commits
EPS = 1e-3
ALGORITHMS = ("maskgit_plus", "entropy", "topk_margin", "origin")


@torch.no_grad()
def dream_generate(
    model: DiffusionLM,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    gen_length: int,
    steps: int,
    alg: str = "maskgit_plus",
    alg_temp: float | None = 0.0,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    eps: float = EPS,
    mask_id: int | None = None,
    generator: torch.Generator | None = None,
    config: SparseDConfig | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Generate by iterative unmasking, token for token Dream's published `diffusion_generate` at temperature 0.

    Args:
        model: a DreamModel.
        input_ids: [B, prompt] int64, without mask tokens.
        attention_mask: [B, prompt], 1 = real, 0 = left padding.
        gen_length, steps: new tokens, and denoising steps: one forward each, but a step that would commit nothing runs
            none at temperature 0, unless it selects blocks.
        alg: what ranks the positions: maskgit_plus (probability of the drawn token), topk_margin (its lead over the
            second), entropy (negative entropy), or origin (no ranking: each position by chance).
        alg_temp: above 0, positions are drawn from softmax(confidence / alg_temp) instead of taken from the top.
        temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature).
        top_p, top_k: keep the likeliest tokens up to a total probability of top_p, the top_k likeliest; None keeps all.
        eps: end of the time grid 1 ... eps that sets how many positions a step commits.
        mask_id: the mask token, by default the model's.
        generator: source of randomness, on the model's device.
        config: SparseD; None means full attention.
        on_step: called with each `Step` when it is over; its probabilities are those after temperature and filters.

    Returns:
        int64 [B, prompt + gen_length].

    Raises:
        ValueError: a number, shape or name outside its range, or a mask token inside the prompt.
        RuntimeError: `config` given inside `sparsify`.
        FloatingPointError: the model's logits were not finite.
    """
    check_family(model, "dream")
    check_numbers(gen_length=gen_length, steps=steps)
    check_choice("alg", alg, ALGORITHMS)
    check_temperature("temperature", temperature)
    alg_temp = alg_temp or 0.0
    check_temperature("alg_temp", alg_temp)
    _check_filters(top_p, top_k, eps)
    mask_id = model.config.mask_token_id if mask_id is None else mask_id
    canvas, mask = make_canvas(input_ids.to(model.device), attention_mask, gen_length, mask_id, model.config.vocab_size)
    fractions = commit_fractions(steps, eps)
    idle = idle_steps(gen_length, fractions) if temperature == 0 and alg != "origin" else 0
    with attention_of(model, config, steps, gen_length):
        denoiser = Denoiser(model, mask, input_ids.shape[1] - 1, len(canvas) * gen_length)
        for step in range(steps):
            if step < idle and denoiser.skip(canvas):
                tell(on_step, Step(step, ran=False))
                continue
            rows = (canvas == mask_id).view(-1).nonzero().squeeze(-1)
            logits = denoiser(canvas, shifted(rows, canvas.shape[1]))
            probabilities = filtered_probabilities(logits, temperature, top_p, top_k)
            tokens = probabilities.argmax(-1) if temperature == 0 else draw(probabilities, generator)
            probability = probability_of(tokens, probabilities)
            if alg == "origin":
                chosen = torch.rand(len(rows), generator=generator, device=rows.device) < fractions[step].item()
            else:
                masked = (canvas == mask_id).sum(-1)
                counts = (masked.float() * fractions[step].item()).long()
                ranking = confidence(probabilities, probability, alg)
                if alg_temp > 0:
                    ranking = draw_order(ranking / alg_temp, generator)
                chosen = most_confident(canvas.shape, rows, ranking, counts)
            commit(canvas, rows, tokens, chosen)
            tell(on_step, Step(step, True, rows, tokens, probability, chosen))
        denoiser.check()
    return canvas


def commit_fractions(steps: int, eps: float) -> Tensor:
    """Share of the still masked positions that each step commits, float32 [steps], 1 at the last step."""
    times = torch.linspace(1, eps, steps + 1)
    fractions = 1 - times[1:] / times[:-1]
    fractions[-1] = 1
    return fractions


def idle_steps(masks: int, fractions: Tensor) -> int:
    """How many steps at the start commit none of `masks` positions."""
    counts = (torch.tensor(float(masks)) * fractions).long()
    return int((counts.cumsum(0) == 0).sum())


def shifted(rows: Tensor, length: int) -> Tensor:
    """The flat rows whose logits predict the flat positions `rows`: one to the left, but position 0 reads its own."""
    return rows - (rows % length != 0).long()


def filtered_probabilities(logits: Tensor, temperature: float, top_p: float | None, top_k: int | None) -> Tensor:
    """softmax of logits [n, V] after temperature, nucleus and top-k filters, float32 [n, V].

    A token stays if the likelier ones leave it room: fewer than top_k, with at most top_p of the probability. Tokens as
    likely as the last one that stays do, too.
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
    """What ranks the candidates: probabilities [n, V], those of the drawn tokens [n] -> [n], higher commits first."""
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


def _check_filters(top_p: float | None, top_k: int | None, eps: float) -> None:
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p!r}")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k must be a positive whole number or None, got {top_k!r}")
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise ValueError(f"eps must lie between 0 and 1, got {eps!r}")
