"""Whether a forward goes on with a generation, by its tokens: a sampler from elsewhere does not say."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .masks import check_left_padded


class Recognised:
    """One generation, by the tokens of its first forward.

    Generated are the last `gen_length` tokens, and those before them that are masked; all others stay. Where most of
    what lies before them is masked, it is a prompt that guidance hides, and stays too.

    Args:
        tokens: [B, T] ids, or [B, T, W] embeddings, which are distinguished by their sums.
        attention_mask: whatever the model was given under that name.
        gen_length: at most T.
        mask_id: of the mask token; None if it is not known.

    Raises:
        ValueError: a row is padded on the right, behind its answer.
    """

    def __init__(self, tokens: Tensor, attention_mask: Any, gen_length: int, mask_id: int | None):
        if isinstance(attention_mask, Tensor) and attention_mask.shape == tokens.shape[:2]:
            check_left_padded(attention_mask)
        self.start = _told_apart(tokens).clone()  # samplers write in place
        # no token is NaN
        self.mask = math.nan if mask_id is None or tokens.ndim == 3 else mask_id
        masked = self.start[:, :-gen_length] == self.mask
        hidden = 2 * masked.sum(-1, keepdim=True) > masked.shape[1]
        self.stays = F.pad(~masked | hidden, (0, gen_length), value=False)
        self.begins = True  # whether the latest forward had nothing generated yet

    def goes_on(self, tokens: Tensor) -> bool:
        """Whether these are the generation's next tokens; waits for the device.

        They are not if a token that stays has changed, or if all is masked, or as it was in the first forward, and was
        not in the forward before.
        """
        tokens = _told_apart(tokens)
        if tokens.shape != self.start.shape or tokens.device != self.start.device:
            return False
        same = tokens == self.start
        conditions = same | ~self.stays, (tokens == self.mask) | self.stays, same
        stayed, all_masked, as_at_first = torch.stack([condition.all() for condition in conditions]).tolist()
        begins = all_masked or as_at_first
        if not stayed or (begins and not self.begins):
            return False
        self.begins = begins
        return True


def _told_apart(tokens: Tensor) -> Tensor:
    """A number [B, T] for each token, the same for the same ones."""
    return tokens if tokens.ndim == 2 else tokens.double().sum(-1)
