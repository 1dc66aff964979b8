"""Classifier-free guidance: the batch once with its prompt and once without it, in one forward."""

import torch
from torch import Tensor

from .runner import StepRunner


class Guided:
    """A runner's logits, guided away from those of a second half of the batch, where the whole prompt is masked.

    Args:
        scale: above 0: logits = unconditional + (scale + 1) * (conditional - unconditional).
    """

    def __init__(self, runner: StepRunner, scale: float, prompt_len: int, mask_id: int):
        self.runner, self.scale, self.prompt_len, self.mask_id = runner, scale, prompt_len, mask_id

    def __call__(self, ids: Tensor, rows: Tensor, window: tuple[int, int] | None = None) -> Tensor:
        """float32 logits [n, V] of the flat rows [n] of ids [B, T], as the runner gives them; raises what it raises."""
        logits = self.runner(self._both(ids), torch.cat((rows, rows + ids.numel())), window).float()
        conditional, unconditional = logits.chunk(2)
        return unconditional + (self.scale + 1) * (conditional - unconditional)

    @property
    def phase(self) -> str:
        """As the runner's."""
        return self.runner.phase

    @property
    def ahead(self) -> bool:
        """As the runner's."""
        return self.runner.ahead

    def skip(self) -> bool:
        """As the runner's."""
        return self.runner.skip()

    def check(self) -> None:
        """As the runner's."""
        self.runner.check()

    def _both(self, ids: Tensor) -> Tensor:
        """[2 * B, T]: the ids, then once more with the whole prompt masked."""
        blind = ids.clone()
        blind[:, : self.prompt_len] = self.mask_id
        return torch.cat((ids, blind))
