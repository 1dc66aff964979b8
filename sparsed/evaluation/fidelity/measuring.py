"""The model's forwards over a window, under full attention and under other ways to attend, and how far these are apart.

Nothing is sampled, so no error adds up: each forward has its share of the region masked, and the true tokens elsewhere.
Blocks are selected as in a run, by the package's own SparseD, when the share `skip` of the region is there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.common import DiffusionLM
from ...sampling import FAMILIES
from ...sampling.common import sequence_of
from ...sampling.runner import StepRunner
from ..folder import Record
from ..methods import METHODS, Variant
from ..results import variant_of
from .windows import Window

FULL = Variant("origin", None)
Asked = dict[Variant, list[float]]  # the mask rates that each variant is measured at


def key(record: Record) -> tuple:
    """What a line of results is known by."""
    return (record["id"], record["mask_rate"], *variant_of(record))


def selects_first(variant: Variant) -> bool:
    """Whether a forward of its own selects the variant's blocks."""
    rule = METHODS[variant.method].rule
    return rule is not None and rule.needs_scores


def forwards(asked: Asked) -> int:
    """How many forwards it takes to measure all of this on a window."""
    return len(_rates(asked)) + sum(
        len(rates) + selects_first(variant) for variant, rates in asked.items() if variant != FULL
    )


def _rates(asked: Asked) -> list[float]:
    return sorted({rate for rates in asked.values() for rate in rates}, reverse=True)


@dataclass(frozen=True)
class Meter:
    """What measures.

    Args:
        backend: the kernel of sparse attention.
    """

    model: DiffusionLM
    backend: str = "auto"

    @torch.no_grad()
    def measure(self, window: Window, asked: Asked, on_forward: Callable[[], None] = lambda: None) -> list[Record]:
        """A line of results for each variant and rate.

        Args:
            on_forward: called after each forward.

        Raises:
            BackendError: the named backend cannot run.
            FloatingPointError: the model's logits were not finite.
        """
        rates = _rates(asked)
        full = {rate: found for rate, found, _ in self._under(FULL, window, rates, on_forward)}
        lines = []
        for variant, own in asked.items():
            measured = self._under(variant, window, own, on_forward)
            if variant == FULL:
                measured = ((rate, full[rate], 1.0) for rate in own)
            for rate, found, density in measured:
                truth = window.tokens[window.measured(rate)].to(found.device)
                lines.append(_line(window, rate, variant, compare(full[rate], found, truth), density))
        return lines

    def _under(
        self, variant: Variant, window: Window, rates: list[float], on_forward: Callable[[], None]
    ) -> Iterator[tuple[float, Tensor, float]]:
        """Rate, log-probabilities float32 [n, V] of the measured places, and density of attention."""
        new_tokens, length, config = len(window.order), len(window.tokens), variant.config
        options = {} if config is None else {"backend": self.backend, "rule": METHODS[variant.method].rule}
        # the first forward selects: at which share of the region, its canvas says
        own = config and replace(config, skip=0.0)
        first_row = int(FAMILIES[self.model.family].sources(torch.tensor(length - new_tokens), length))
        with sequence_of(self.model, own, len(rates) + 1, new_tokens, (1, length), **options) as run:
            runner = StepRunner(self.model, run, None, first_row, new_tokens)
            if config is not None and selects_first(variant):
                self._logits(runner, window, 1 - config.skip)
                on_forward()
            for rate in rates:
                found = self._logits(runner, window, rate).float().log_softmax(-1)
                runner.check()
                on_forward()
                density = None if run is None else run.density
                yield rate, found, 1.0 if density is None else density

    def _logits(self, runner: StepRunner, window: Window, rate: float) -> Tensor:
        """Logits [n, V] of the measured places."""
        canvas = window.canvas(rate, self.model.config.mask_token_id).to(self.model.device)
        rows = FAMILIES[self.model.family].sources(window.measured(rate), canvas.shape[1])
        return runner(canvas, rows.to(canvas.device))


def compare(full: Tensor, found: Tensor, truth: Tensor) -> dict[str, float]:
    """Sums over tokens: their number, negative log-likelihood in nats, how many are right, KL to full attention in
    nats, and how many have the same top token.

    Args:
        full, found: log-probabilities [n, V] of full attention and of what is measured.
        truth: the true tokens [n].
    """
    return {
        "n": len(truth),
        "nll": F.nll_loss(found, truth, reduction="sum").item(),
        "correct": int((found.argmax(-1) == truth).sum()),
        "kl": F.kl_div(found, full, reduction="sum", log_target=True).item(),
        "same": int((found.argmax(-1) == full.argmax(-1)).sum()),
    }


def _line(window: Window, rate: float, variant: Variant, sums: Record, density: float) -> Record:
    return {
        "id": window.id,
        "kind": window.kind,
        "document": window.document,
        "length": len(window.tokens),
        "far": window.far,
        "mask_rate": rate,
        **variant.names,
        **sums,
        "density": density,
    }
