"""LLaDA's sampler: the generated region is unmasked block after block; row j of the logits predicts token j."""

from collections.abc import Collection

import torch
from torch import Tensor

from ..config import SparseDConfig
from ..models.common import DiffusionLM
from ..selection import SPARSED, Rule
from .common import OnStep
from .loop import generate
from .settings import LLaDASettings


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
    cache: str = "none",
    refresh: int | None = None,
    threshold: float | None = None,
    factor: float | None = None,
    early_stop: bool = False,
    mask_id: int | None = None,
    end_token_ids: Collection[int] | None = None,
    generator: torch.Generator | None = None,
    config: SparseDConfig | None = None,
    backend: str = "auto",
    rule: Rule = SPARSED,
    on_step: OnStep | None = None,
) -> Tensor:
    """Generate by iterative unmasking, token for token LLaDA's published `generate` at temperature 0.

    Args:
        model: a LLaDAModel.
        input_ids: [B, prompt] int64, without mask tokens.
        attention_mask: [B, prompt], 1 = real, 0 = left padding.
        gen_length, steps, block_length: new tokens, denoising steps and tokens per block. block_length must divide
            gen_length, and the number of blocks must divide steps. A step is one forward. At temperature 0, a step that
            would commit nothing runs no forward, unless it selects blocks.
        temperature: 0 takes the likeliest token; above 0, tokens are drawn from softmax(logits / temperature).
        cfg_scale: classifier-free guidance: logits = unconditional + (cfg_scale + 1) * (conditional - unconditional).
        remasking: low_confidence commits the likeliest tokens first, random commits in random order.
        logits_eos_inf: never draw the end-of-text token.
        confidence_eos_eot_inf: commit end-of-text and end-of-turn tokens last.
        cache, refresh, threshold, factor, early_stop: fewer rows and steps, see `Saving`.
        mask_id: the mask token, by default the model's.
        end_token_ids: what ends an answer under early_stop, by default what the model's config names; `chat.stop_ids`
            knows the tokenizer's chat ends, too.
        generator: source of randomness, on the model's device.
        config: SparseD, in both halves of a guided batch; None means full attention.
        backend, rule: as for `sparsify`.
        on_step: called with each `Step` when it is over; its probabilities are without temperature.

    Returns:
        int64 [B, prompt + gen_length].

    Raises:
        ValueError: a number, shape or name outside its range, or a mask token inside the prompt.
        RuntimeError: `config` given inside `sparsify`.
        FloatingPointError: the model's logits were not finite.
        BackendError: the named backend cannot run.
    """
    settings = LLaDASettings(
        gen_length, steps, block_length, temperature, cfg_scale, remasking, logits_eos_inf, confidence_eos_eot_inf,
        cache=cache, refresh=refresh, threshold=threshold, factor=factor, early_stop=early_stop,
    )  # fmt: skip
    return generate(
        model, input_ids, settings, attention_mask=attention_mask, mask_id=mask_id, end_token_ids=end_token_ids,
        generator=generator, config=config, backend=backend, rule=rule, on_step=on_step,
    )  # fmt: skip
