"""Classifier-free guidance: the batch once with its prompt and once without it, in one forward."""

import torch
from torch import Tensor

from .denoiser import Denoiser


class Guided:
    """A denoiser's logits, guided away from those of a second half of the batch whose whole prompt is masked.

    Args:
        scale: above 0: logits = unconditional + (scale + 1) * (conditional - unconditional).
    """

    def __init__(self, denoiser: Denoiser, scale: float, prompt_len: int, mask_id: int):
        self.denoiser, self.scale, self.prompt_len, self.mask_id = denoiser, scale, prompt_len, mask_id

    def __call__(self, ids: Tensor, rows: Tensor) -> Tensor:
        """float32 logits [n, V] of the flat rows [n] of ids [B, T]; raises what the denoiser raises."""
        logits = self.denoiser(self._both(ids), torch.cat((rows, rows + ids.numel()))).float()
        conditional, unconditional = logits.chunk(2)
        return unconditional + (self.scale + 1) * (conditional - unconditional)

    def skip(self) -> bool:
        """As the denoiser's."""
        return self.denoiser.skip()

    def check(self) -> None:
        """As the denoiser's."""
        self.denoiser.check()

    def _both(self, ids: Tensor) -> Tensor:
        """[2 * B, T]: the ids, then once more with the whole prompt masked."""
        blind = ids.clone()
        blind[:, : self.prompt_len] = self.mask_id
        return torch.cat((ids, blind))
