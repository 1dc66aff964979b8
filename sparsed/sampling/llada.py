"""LLaDA's sampler: the generated region is unmasked block after block; row j of the logits predicts token j."""

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

REMASKING = ("low_confidence", "random")


@torch.no_grad()
def llada_generate(
    model: DiffusionLM,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    gen_length: int,
    steps: int,
    block_length: int,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
    mask_id: int | None = None,
    generator: torch.Generator | None = None,
    config: SparseDConfig | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Generate by iterative unmasking, token for token LLaDA's published `generate` at temperature 0.

    Args:
        model: a LLaDAModel.
        input_ids: [B, prompt] int64, without mask tokens.
        attention_mask: [B, prompt], 1 = real, 0 = left padding.
        gen_length, steps, block_length: new tokens, denoising steps and tokens a block; block_length must divide
            gen_length, and the number of blocks must divide steps. A step is one forward, but one that would commit
            nothing runs none at temperature 0, unless it selects blocks.
        temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature).
        cfg_scale: classifier-free guidance: logits = unconditional + (cfg_scale + 1) * (conditional - unconditional).
        remasking: low_confidence commits the likeliest tokens first, random any.
        logits_eos_inf: never draw the end-of-text token.
        confidence_eos_eot_inf: commit end-of-text and end-of-turn tokens last.
        mask_id: the mask token, by default the model's.
        generator: source of randomness, on the model's device.
        config: SparseD, in both halves of a guided batch; None means full attention.
        on_step: called with each `Step` when it is over; its probabilities are without temperature.

    Returns:
        int64 [B, prompt + gen_length].

    Raises:
        ValueError: a number, shape or name outside its range, or a mask token inside the prompt.
        RuntimeError: `config` given inside `sparsify`.
        FloatingPointError: the model's logits were not finite.
    """
    check_family(model, "llada")
    check_numbers(gen_length=gen_length, steps=steps, block_length=block_length)
    check_choice("remasking", remasking, REMASKING)
    check_temperature("temperature", temperature)
    check_temperature("cfg_scale", cfg_scale)
    steps_a_block = _steps_a_block(gen_length, steps, block_length)
    mask_id = model.config.mask_token_id if mask_id is None else mask_id
    canvas, mask = make_canvas(input_ids.to(model.device), attention_mask, gen_length, mask_id, model.config.vocab_size)
    eos, eot = model.config.eos_token_id, model.config.eot_token_id
    prompt_len = input_ids.shape[1]
    with attention_of(model, config, steps, gen_length):
        halves = 1 if cfg_scale == 0 else 2
        mask = None if mask is None else mask.repeat(halves, 1)
        denoiser = Denoiser(model, mask, prompt_len, halves * len(canvas) * block_length)
        for step in range(steps):
            block, inner = divmod(step, steps_a_block)
            end = prompt_len + (block + 1) * block_length
            if inner == 0:
                counts = commit_counts((canvas[:, end - block_length : end] == mask_id).sum(-1), steps_a_block)
            ids = canvas if cfg_scale == 0 else with_blind_half(canvas, prompt_len, mask_id)
            # a block has as many masks as tokens at first, and commits at least one a step while it has any
            if temperature == 0 and inner >= block_length and denoiser.skip(ids):
                tell(on_step, Step(step, ran=False))
                continue
            rows = _masked_rows(canvas, mask_id, end)
            logits = guided_logits(denoiser, ids, rows, cfg_scale)
            if logits_eos_inf:
                logits[:, eos] = -torch.inf
            tokens = (
                logits.argmax(-1) if temperature == 0 else draw(tempered(logits, temperature).softmax(-1), generator)
            )
            probability = probability_of(tokens, logits.softmax(-1))
            if remasking == "random":
                ranking = torch.rand(len(tokens), generator=generator, device=tokens.device)
            elif confidence_eos_eot_inf:
                logits[:, eot] = -torch.inf
                if temperature == 0:  # as published: with noise, only the end of the turn is held back
                    logits[:, eos] = -torch.inf
                ranking = probability_of(tokens, logits.softmax(-1))
            else:
                ranking = probability
            chosen = most_confident(canvas.shape, rows, ranking, counts[:, inner])
            commit(canvas, rows, tokens, chosen)
            tell(on_step, Step(step, True, rows, tokens, probability, chosen))
        denoiser.check()
    return canvas


def _steps_a_block(gen_length: int, steps: int, block_length: int) -> int:
    if gen_length % block_length:
        raise ValueError(f"gen_length must be a multiple of block_length {block_length}, got {gen_length}")
    blocks = gen_length // block_length
    if steps % blocks:
        raise ValueError(f"steps must be a multiple of the number of blocks {blocks}, got {steps}")
    return steps // blocks


def commit_counts(masked: Tensor, steps: int) -> Tensor:
    """Spread `masked` [B] positions over the steps as evenly as whole numbers go, more in the first: [B, steps]."""
    index = torch.arange(steps, device=masked.device)
    return masked[:, None] // steps + (index < masked[:, None] % steps)


def _masked_rows(canvas: Tensor, mask_id: int, end: int) -> Tensor:
    """Flat positions of the mask tokens before `end`."""
    masked = canvas == mask_id
    masked[:, end:] = False
    return masked.view(-1).nonzero().squeeze(-1)


def with_blind_half(canvas: Tensor, prompt_len: int, mask_id: int) -> Tensor:
    """The batch for classifier-free guidance [2 * B, T]: the canvas, then once more with the whole prompt masked."""
    blind = canvas.clone()
    blind[:, :prompt_len] = mask_id
    return torch.cat((canvas, blind))


def guided_logits(denoiser: Denoiser, ids: Tensor, rows: Tensor, cfg_scale: float) -> Tensor:
    """float32 logits [n, V] of the flat positions `rows`, guided away from those of the blind half."""
    if cfg_scale == 0:
        return denoiser(ids, rows).float()
    logits = denoiser(ids, torch.cat((rows, rows + ids.numel() // 2))).float()
    conditional, unconditional = logits.chunk(2)
    return unconditional + (cfg_scale + 1) * (conditional - unconditional)
