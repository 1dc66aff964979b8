"""Whether a forward goes on with a generation, by its tokens: a sampler from elsewhere does not say."""

from typing import Any

import torch
from torch import Tensor

from .masks import check_left_padded


class Recognised:
    """One generation, by the tokens of its first forward.

    Generated are the last `gen_length` tokens, and those that are masked before them; all others stay. Where most of
    what lies before them is masked, it is a prompt that guidance hides, and stays too.

    Args:
        tokens: [B, T] ids, or [B, T, W] embeddings, which are told apart by their sums.
        attention_mask: whatever the model was given under that name.
        gen_length: at most T.
        mask_id: of the mask token, where it is known; else it is the last token.

    Raises:
        ValueError: a row is padded on the right, behind its answer.
    """

    def __init__(self, tokens: Tensor, attention_mask: Any, gen_length: int, mask_id: int | None):
        if isinstance(attention_mask, Tensor) and attention_mask.shape == tokens.shape[:2]:
            check_left_padded(attention_mask)
        self.start = _told_apart(tokens).clone()  # samplers write in place
        known = mask_id is not None and tokens.ndim == 2
        self.mask = self.start.new_tensor(mask_id) if known else self.start[0, -1].clone()
        self.gen_length = gen_length
        prompt = self.start[:, :-gen_length]
        masked = prompt == self.mask
        self.stays = ~masked | (2 * masked.sum(-1, keepdim=True) > prompt.shape[1])
        self.begins = True  # whether the latest forward had nothing generated yet

    def goes_on(self, tokens: Tensor) -> bool:
        """Whether these are the generation's next tokens; waits for the device.

        They are not if a token that stays has changed, or if nothing is generated any more where something was.
        """
        tokens = _told_apart(tokens)
        if tokens.shape != self.start.shape or tokens.device != self.start.device:
            return False
        prompt = slice(0, tokens.shape[1] - self.gen_length)
        stayed = ((tokens[:, prompt] == self.start[:, prompt]) | ~self.stays).all()
        all_masked = (tokens[:, prompt.stop :] == self.mask).all()
        found = torch.stack((stayed, all_masked, (tokens == self.start).all())).tolist()
        begins = found[1] or found[2]
        if not found[0] or (begins and not self.begins):
            return False
        self.begins = begins
        return True


def _told_apart(tokens: Tensor) -> Tensor:
    """A number [B, T] for each token, the same for the same ones."""
    return tokens if tokens.ndim == 2 else tokens.double().sum(-1)
