"""What both samplers share: checks, the canvas, drawing tokens and committing the most confident ones."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import SparseDConfig
from ..patch import sparsify
from ..run import Run


@dataclass(frozen=True)
class Step:
    """A denoising step that is over, as an observer is told of it; the tensors stay on the model's device.

    Args:
        index: counted from 0.
        ran: whether it ran the model; without, nothing was committed and there are no candidates.
        rows: int64 [n], the candidates' flat positions b * T + t, ascending.
        tokens: int64 [n], the token that each of them would get.
        probability: float32 [n], which the model gave that token, whatever the algorithm ranks by.
        chosen: bool [n], which of the candidates were committed.
    """

    index: int
    ran: bool
    rows: Tensor | None = None
    tokens: Tensor | None = None
    probability: Tensor | None = None
    chosen: Tensor | None = None

    def commits(self) -> list[tuple[int, int, float]]:
        """Flat position, token and probability of what was committed, ascending; waits for the device."""
        if self.chosen is None:
            return []
        columns = (self.rows, self.tokens, self.probability)
        return list(zip(*(column[self.chosen].tolist() for column in columns if column is not None), strict=True))


# called after each step
OnStep = Callable[[Step], None]


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


def tell(on_step: OnStep | None, step: Step) -> None:
    """Call back after a step."""
    if on_step is not None:
        on_step(step)


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


def probability_of(tokens: Tensor, probabilities: Tensor) -> Tensor:
    """The entries of probabilities [n, V] at tokens [n] -> [n]."""
    return probabilities.gather(-1, tokens[:, None]).squeeze(-1)


def most_confident(shape: torch.Size, rows: Tensor, confidence: Tensor, counts: Tensor) -> Tensor:
    """Which candidates are among their batch row's `counts` most confident, bool [n]; of equals the earlier wins.

    Args:
        shape: (B, T) of the canvas.
        rows: [n] int64, flat positions b * T + t of the candidates, ascending.
        confidence: [n].
        counts: [B] how many to take; of a row with fewer candidates, all.
    """
    batch, length = shape
    grid = torch.full((batch * length,), -torch.inf, dtype=confidence.dtype, device=confidence.device)
    grid[rows] = confidence
    order = grid.view(batch, length).sort(dim=-1, descending=True, stable=True).indices
    ranks = torch.empty_like(order).scatter_(-1, order, torch.arange(length, device=order.device).expand_as(order))
    return ranks.flatten()[rows] < counts[rows // length]


def commit(canvas: Tensor, rows: Tensor, tokens: Tensor, chosen: Tensor) -> None:
    """Write the chosen [n] of the tokens [n] to their flat positions `rows` [n] of the canvas [B, T], in place."""
    flat = canvas.view(-1)
    flat[rows] = torch.where(chosen, tokens, flat[rows])
