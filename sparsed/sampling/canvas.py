"""The tokens of a generation: the prompt, then the region in which masks give way to tokens."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .arriving import Arriving


class PromptError(ValueError):
    """The prompt's tokens cannot be generated from."""


def check_tensor(input_ids: Any) -> None:
    """Raise ValueError for anything but a tensor: lists, arrays, a tokenizer's whole output."""
    if not isinstance(input_ids, Tensor):
        raise ValueError(
            f"input_ids must be an int64 tensor [batch, prompt], got a {type(input_ids).__name__}: pass "
            "encoding['input_ids'] of a tokenizer's output, torch.tensor(ids) of a list"
        )


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
        raise PromptError(
            f"the prompt holds the mask token (id {mask_id}), which the sampler would overwrite: take it out, or fill "
            "it in by a sampler of your own inside `sparsify`"
        )


@dataclass(frozen=True)
class Canvas:
    """Token ids [B, T], written in place; the first `prompt_len` are the prompt's.

    Args:
        valid: bool [B, T], False where a token is left padding; None if nothing is padded.
    """

    ids: Tensor
    valid: Tensor | None
    prompt_len: int
    mask_id: int

    @staticmethod
    def of(
        input_ids: Tensor, attention_mask: Tensor | None, gen_length: int, mask_id: int, vocab_size: int
    ) -> "Canvas":
        """The prompt followed by `gen_length` mask tokens.

        Args:
            input_ids: [B, prompt] int64.
            attention_mask: [B, prompt], 1 = real, 0 = left padding.

        Raises:
            ValueError: shapes or kinds that do not fit, ids outside the vocabulary, a mask id inside the prompt (it
                would be generated over), padding that is not on the left (generation would start after padding), or a
                row without a real token.
        """
        check_prompt(input_ids, mask_id, vocab_size)
        ids, prompt_len = F.pad(input_ids, (0, gen_length), value=mask_id), input_ids.shape[1]
        if attention_mask is None:
            return Canvas(ids, None, prompt_len, mask_id)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have the prompt's shape {list(input_ids.shape)}, got {list(attention_mask.shape)}"
            )
        real = attention_mask.to(input_ids.device).bool()
        if not real[:, -1].all() or (real[:, 1:] < real[:, :-1]).any():
            raise ValueError("attention_mask must be left-padded: 0s, then 1s up to the end of every row")
        valid = None if real.all() else F.pad(real, (0, gen_length), value=True)
        return Canvas(ids, valid, prompt_len, mask_id)

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    def masked(self, start: int, end: int) -> Tensor:
        """How many tokens of each row are still masked between two positions, int64 [B]."""
        return (self.ids[:, start:end] == self.mask_id).sum(-1)

    @property
    def committed(self) -> float:
        """Share of the generated region that is committed, in the batch row that has least; waits for the device."""
        region = self.length - self.prompt_len
        # a quotient of whole numbers, so that a fifth is exactly 0.2
        return (region - int(self.masked(self.prompt_len, self.length).max())) / region

    def candidates(self, start: int, end: int) -> Tensor:
        """Flat positions b * T + t of the masked tokens between two positions, int64 [n], ascending."""
        masked = self.ids == self.mask_id
        if start:  # a launch on a GPU, in every step
            masked[:, :start] = False
        masked[:, end:] = False
        return masked.view(-1).nonzero().squeeze(-1)

    def positions(self, start: int, end: int) -> Tensor:
        """Flat positions b * T + t of all tokens between two positions, int64 [B * (end - start)], ascending."""
        inner = torch.arange(start, end, device=self.ids.device)
        return (torch.arange(0, self.ids.numel(), self.length, device=inner.device)[:, None] + inner).view(-1)

    def places(self, start: int, end: int) -> Callable[[], Tensor]:
        """Where in `positions` the `candidates` are. A CUDA device need not have done what it is given until the answer
        is asked for."""
        masked = (self.ids[:, start:end] == self.mask_id).flatten()
        count, order = Arriving(masked.sum()), masked.sort(descending=True, stable=True).indices
        return lambda: order[: int(count.value())]

    def commit(self, rows: Tensor, tokens: Tensor, chosen: Tensor) -> None:
        """Write the chosen [n] of the tokens [n] to their flat positions `rows` [n]."""
        flat = self.ids.view(-1)
        flat[rows] = torch.where(chosen, tokens, flat[rows])

    def stop(self, start: int, end: int, ends: Collection[int], over: bool) -> Tensor:
        """Fill the masks behind a block with its first end token, in the rows where the block holds one and is complete
        or over; returns their flat positions b * T + t, ascending."""
        block, rest = self.ids[:, start:end], self.ids[:, end:]
        is_end = torch.isin(block, torch.tensor(list(ends), device=block.device))
        stops = is_end.any(-1) & ((self.masked(start, end) == 0) | over)
        fill = (rest == self.mask_id) & stops[:, None]
        rest.copy_(torch.where(fill, block.gather(1, is_end.int().argmax(-1, keepdim=True)), rest))
        rows, places = fill.nonzero(as_tuple=True)
        return rows * self.length + end + places
