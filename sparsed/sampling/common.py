"""What both samplers share: checks, the canvas, drawing tokens and committing the most confident ones."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import SparseDConfig
from ..patch import Run, sparsify

# called after each step with its index and whether it ran the model
OnStep = Callable[[int, bool], None]


class PromptError(ValueError):
    """The prompt's tokens cannot be generated from."""


def check_family(model: nn.Module, family: str) -> None:
    """Raise ValueError if the model says that it is of the other family."""
    found = getattr(model, "family", family)
    if found != family:
        raise ValueError(f"{family}_generate needs a {family} model, got one of {found}")


def check_temperature(name: str, value: float) -> None:
    """Raise ValueError unless the temperature is zero or above."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ValueError(f"{name} must be 0 or above, got {value!r}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_prompt(input_ids: Tensor, mask_id: int, vocab_size: int) -> None:
    """Raise ValueError unless a sampler can continue input_ids [B, prompt]; PromptError for the ids themselves."""
    if input_ids.ndim != 2 or input_ids.dtype != torch.int64:
        raise ValueError(f"input_ids must be int64 [batch, prompt], got {input_ids.dtype} {list(input_ids.shape)}")
    if not input_ids.shape[0] or not input_ids.shape[1]:
        raise ValueError(f"input_ids must hold at least one row and one token, got {list(input_ids.shape)}")
    if not isinstance(mask_id, int) or not 0 <= mask_id < vocab_size:
        raise ValueError(f"mask_id must be one of the vocabulary's {vocab_size} ids, got {mask_id}")
    if input_ids.min() < 0 or input_ids.max() >= vocab_size:
        raise PromptError(f"input_ids must lie in the vocabulary's {vocab_size} ids, 0 to {vocab_size - 1}")
    if (input_ids == mask_id).any():
        raise PromptError(f"the prompt holds the mask token (id {mask_id}), which the sampler would overwrite")


def make_canvas(
    input_ids: Tensor, attention_mask: Tensor | None, gen_length: int, mask_id: int, vocab_size: int
) -> tuple[Tensor, Tensor | None]:
    """The prompt followed by `gen_length` mask tokens, and the attention mask over all of it.

    Args:
        input_ids: [B, prompt] int64.
        attention_mask: [B, prompt], 1 = real, 0 = left padding.

    Returns:
        ids [B, prompt + gen_length], and bool mask of the same shape, or None if nothing is padded.

    Raises:
        ValueError: shapes or kinds that do not fit, ids outside the vocabulary, a mask id inside the prompt (it would
            be generated over), padding that is not on the left (generation would start after padding), or a row without
            a real token.
    """
    check_prompt(input_ids, mask_id, vocab_size)
    canvas = F.pad(input_ids, (0, gen_length), value=mask_id)
    if attention_mask is None:
        return canvas, None
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the prompt's shape {list(input_ids.shape)}, got {list(attention_mask.shape)}"
        )
    real = attention_mask.to(input_ids.device).bool()
    if not real[:, -1].all() or (real[:, 1:] < real[:, :-1]).any():
        raise ValueError("attention_mask must be left-padded: 0s, then 1s up to the end of every row")
    return canvas, None if real.all() else F.pad(real, (0, gen_length), value=True)


def attention_of(
    model: nn.Module, config: SparseDConfig | None, steps: int, gen_length: int, **options: Any
) -> AbstractContextManager[Run | None]:
    """SparseD around `steps` forwards, with `sparsify`'s options; full attention without a config."""
    if config is None:
        return nullcontext()
    return sparsify(model, config, steps=steps, gen_length=gen_length, **options)


def tell(on_step: OnStep | None, step: int, ran: bool) -> None:
    """Call back after a step."""
    if on_step is not None:
        on_step(step, ran)


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """float32 logits [n, V] divided by a temperature above 0, the highest moved to 0 so that none overflows."""
    peak = logits.amax(dim=-1, keepdim=True)
    return (logits - peak) / max(temperature, torch.finfo(logits.dtype).tiny)


def draw(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """One token of each row of probabilities [n, V] -> [n] int64.

    The largest probability over exponential noise, as `torch.multinomial` draws; but over a number that is not finite,
    that one would end the process's use of the GPU.
    """
    noise = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / noise).argmax(-1)


def commit(canvas: Tensor, rows: Tensor, tokens: Tensor, confidence: Tensor, counts: Tensor) -> None:
    """Write each batch row's `counts` most confident tokens into the canvas, in place; of equals the earlier wins.

    Args:
        canvas: [B, T] int64.
        rows: [n] int64, flat positions b * T + t of the candidates, ascending.
        tokens, confidence: [n], a candidate's token and confidence.
        counts: [B] how many to commit; a row with fewer candidates commits them all.
    """
    batch, length = canvas.shape
    grid = torch.full((batch * length,), -torch.inf, dtype=confidence.dtype, device=canvas.device)
    grid[rows] = confidence
    order = grid.view(batch, length).sort(dim=-1, descending=True, stable=True).indices
    ranks = torch.empty_like(order).scatter_(-1, order, torch.arange(length, device=order.device).expand_as(order))
    chosen = ranks.flatten()[rows] < counts[rows // length]
    flat = canvas.view(-1)
    flat[rows] = torch.where(chosen, tokens, flat[rows])
