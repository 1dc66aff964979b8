"""Dream's sampler: every masked token is a candidate in every step; row j of the logits predicts token j + 1."""

from collections.abc import Collection

import torch
from torch import Tensor

from ..config import SparseDConfig
from ..models.common import DiffusionLM
from ..selection import SPARSED, Rule
from .common import OnStep
from .loop import generate
from .settings import EPS, DreamSettings


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
    block_length: int | None = None,
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
    """Generate by iterative unmasking, token for token Dream's published `diffusion_generate` at temperature 0.

    Args:
        model: a DreamModel.
        input_ids: [B, prompt] int64, without mask tokens.
        attention_mask: [B, prompt], 1 = real, 0 = left padding.
        gen_length, steps: new tokens, and denoising steps of one forward each. At temperature 0, a step that would
            commit nothing runs no forward, unless it selects blocks.
        alg: what ranks the positions: maskgit_plus (probability of the drawn token), topk_margin (its lead over the
            second), entropy (negative entropy), or origin (no ranking: each position by chance).
        alg_temp: above 0, positions are drawn from softmax(confidence / alg_temp) instead of taken from the top.
        temperature: 0 takes the likeliest token; above 0, tokens are drawn from softmax(logits / temperature).
        top_p, top_k: keep the likeliest tokens up to a total probability of top_p, the top_k likeliest; None keeps all.
        eps: end of the time grid 1 ... eps that sets how many positions a step commits.
        block_length: None writes the whole region on that grid; otherwise the region is written block after block, each
            in even shares over its steps. It must divide gen_length, and the number of blocks must divide steps.
        cache, refresh, threshold, factor, early_stop: fewer rows and steps, see `Saving`; with a cache,
            threshold or factor the region is written in blocks, of 32 tokens unless block_length says otherwise.
        mask_id: the mask token, by default the model's.
        end_token_ids: what ends an answer under early_stop, by default what the model's config names; `chat.stop_ids`
            knows the tokenizer's chat ends, too.
        generator: source of randomness, on the model's device.
        config: SparseD; None means full attention.
        backend, rule: as for `sparsify`.
        on_step: called with each `Step` when it is over; its probabilities are those after temperature and filters.

    Returns:
        int64 [B, prompt + gen_length].

    Raises:
        ValueError: a number, shape or name outside its range, or a mask token inside the prompt.
        RuntimeError: `config` given inside `sparsify`.
        FloatingPointError: the model's logits were not finite.
        BackendError: the named backend cannot run.
    """
    settings = DreamSettings(
        gen_length, steps, alg, alg_temp, temperature, top_p, top_k, eps, block_length,
        cache=cache, refresh=refresh, threshold=threshold, factor=factor, early_stop=early_stop,
    )  # fmt: skip
    return generate(
        model, input_ids, settings, attention_mask=attention_mask, mask_id=mask_id, end_token_ids=end_token_ids,
        generator=generator, config=config, backend=backend, rule=rule, on_step=on_step,
    )  # fmt: skip
