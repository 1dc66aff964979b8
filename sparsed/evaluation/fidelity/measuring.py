"""The model's forwards over a window, under full attention and under other ways to attend, and their distance.

Nothing is sampled, so errors do not add up: in each forward a share of one block of the region is masked, and all
blocks behind it; the other tokens are the true ones. Key blocks are selected as in a run, by the package's own SparseD:
once the share `skip` of the region is there, or, with a cache, in the forwards of all rows. A cache is the sampler's
own, and as stale as in a run: filled while its block is masked, and read until the block's end.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.common import DiffusionLM
from ...run import SparseRun
from ...sampling import FAMILIES, Settings
from ...sampling.canvas import Canvas
from ...sampling.common import sequence_of
from ...sampling.loop import reader, schedule_of
from ...sampling.saving import Saving
from ...sampling.unmasking import Turn
from ..folder import Record
from ..methods import METHODS, Variant, needs_scores
from ..results import variant_of
from .windows import Window

FULL = Variant("origin", None)
Asked = dict[Variant, list[float]]  # the mask rates that each variant is measured at


def key(record: Record) -> tuple:
    """The key of a line of results."""
    return (record["id"], record["mask_rate"], *variant_of(record))


def sampler_of(family: str, saving: Saving, new_tokens: int, block_length: int, steps: int | None = None) -> Settings:
    """The family's sampler that writes block after block.

    Args:
        steps: None for one step per new token.

    Raises:
        SettingError: the blocks do not divide the tokens or the steps.
    """
    return FAMILIES[family](new_tokens, steps or new_tokens, block_length=block_length, **saving.given)


class State(NamedTuple):
    """What is masked in a forward.

    Args:
        number: of the block.
        block: the window with this block for its region.
        rate: share of the block that is masked.
        opens: whether it is the block's first forward, which fills a cache.
        committed: share of the whole region that is not masked.
    """

    number: int
    block: Window
    rate: float
    opens: bool
    committed: float


def states_of(window: Window, block_length: int, rates: list[float], cached: bool = False) -> list[State]:
    """The states in the order of a run. A cache is filled while a block is fully masked, measured or not."""
    ordered = sorted({*rates, 1.0} if cached else rates, reverse=True)
    blocks = window.in_blocks(block_length)
    return [
        State(number, block, rate, rate == ordered[0], (number + 1 - rate) / len(blocks))
        for number, block in enumerate(blocks)
        for rate in ordered
    ]


def selects_first(variant: Variant) -> bool:
    """Whether a separate forward selects the variant's blocks."""
    return needs_scores(variant) and not variant.saving.cached


def has_full(variant: Variant, state: State) -> bool:
    """Whether a run computes full attention over all rows in this state."""
    if variant.saving.cached:
        return False
    return variant.config is None or state.committed < variant.config.skip - 1e-9


@dataclass(frozen=True)
class Meter:
    """Measures windows.

    Args:
        backend: the kernel of sparse attention.
        block_length: tokens per block of the region; None if the region is one block.
    """

    model: DiffusionLM
    backend: str = "auto"
    block_length: int | None = None

    @torch.no_grad()
    def measure(self, window: Window, asked: Asked, on_forward: Callable[[], None] = lambda: None) -> list[Record]:
        """A line of results for each variant and rate, summed over all blocks.

        Args:
            on_forward: called after each forward.

        Raises:
            BackendError: the named backend cannot run.
            FloatingPointError: the model's logits were not finite.
        """
        full: dict[tuple[int, float], Tensor] = {}
        for state, found, _ in self._under(FULL, window, _rates(asked), {}, on_forward):
            full[state.number, state.rate] = found
        lines = []
        for variant, own in asked.items():
            parts: dict[float, list[dict[str, float]]] = {rate: [] for rate in own}
            for state, found, density in self._under(variant, window, own, full, on_forward):
                truth = window.tokens[state.block.measured(state.rate)].to(found.device)
                sums = compare(full[state.number, state.rate], found, truth)
                parts[state.rate].append({**sums, "density": density})
            lines += [_line(window, rate, variant, blocks) for rate, blocks in parts.items()]
        return lines

    def forwards(self, window: Window, asked: Asked) -> int:
        """How many forwards these measurements take."""
        count = len(states_of(window, self._length(window), _rates(asked)))
        for variant, rates in asked.items():
            states = states_of(window, self._length(window), rates, variant.saving.cached)
            count += selects_first(variant) + sum(not has_full(variant, state) for state in states)
        return count

    def _length(self, window: Window) -> int:
        return self.block_length or len(window.order)

    def _under(
        self,
        variant: Variant,
        window: Window,
        rates: list[float],
        full: dict[tuple[int, float], Tensor],
        on_forward: Callable[[], None],
    ) -> Iterator[tuple[State, Tensor, float]]:
        """State, log-probabilities float32 [n, V] of the measured places, and density of attention.

        Args:
            full: the log-probabilities of full attention, by block and rate, as far as they are known.
        """
        states = states_of(window, self._length(window), rates, variant.saving.cached)
        settings = sampler_of(self.model.family, variant.saving, len(window.order), self._length(window))
        masked = self._canvas(window, 1.0)
        with self._sequence(variant, settings, masked.length) as run:
            runner = reader(self.model, run, masked, settings, 1)

            def logits(canvas: Canvas, places: Tensor, rows: tuple[int, int] | None = None) -> Tensor:
                found = runner(canvas.ids, settings.sources(places, canvas.length).to(self.model.device), rows)
                runner.check()
                on_forward()
                return found

            if variant.config is not None and selects_first(variant):
                written = replace(window, order=torch.cat([state.block.order for state in states if state.opens]))
                logits(self._canvas(written, 1 - variant.config.skip), written.order[-1:])
            for state in states:
                at, block = (state.number, state.rate), state.block
                if has_full(variant, state) and at in full:
                    yield state, full[at], 1.0
                    continue
                canvas = self._canvas(block, state.rate)
                turn = Turn(block.region[1], start=block.region[0], opens=state.number if state.opens else None)
                found = logits(canvas, block.measured(state.rate), settings.window(turn, masked, settings.shift))
                if state.rate in rates:
                    density = None if run is None else run.density
                    yield state, found.float().log_softmax(-1), 1.0 if density is None else density

    def _canvas(self, window: Window, rate: float) -> Canvas:
        mask_id = self.model.config.mask_token_id
        return Canvas(window.canvas(rate, mask_id).to(self.model.device), None, window.region[0], mask_id)

    def _sequence(self, variant: Variant, settings: Settings, length: int) -> AbstractContextManager[SparseRun | None]:
        """SparseD around the forwards over a window; without a cache, the first one selects."""
        rule, config = METHODS[variant.method].rule, variant.config
        options: dict[str, Any] = {} if rule is None else {"backend": self.backend, "rule": rule}
        if rule is not None and settings.cached:
            options["schedule"] = schedule_of(settings, config, rule)
        elif config is not None:  # the canvas says at which share of the region
            config = replace(config, skip=0.0)
        return sequence_of(self.model, config, settings.steps, settings.gen_length, (1, length), **options)


def _rates(asked: Asked) -> list[float]:
    return sorted({rate for rates in asked.values() for rate in rates}, reverse=True)


def compare(full: Tensor, found: Tensor, truth: Tensor) -> dict[str, float]:
    """Sums over tokens: their number, negative log-likelihood in nats, how many are right, KL to full attention in
    nats, and how many have the same top token.

    Args:
        full, found: log-probabilities [n, V] of full attention and of the measured way.
        truth: the true tokens [n].
    """
    return {
        "n": len(truth),
        "nll": F.nll_loss(found, truth, reduction="sum").item(),
        "correct": int((found.argmax(-1) == truth).sum()),
        "kl": F.kl_div(found, full, reduction="sum", log_target=True).item(),
        "same": int((found.argmax(-1) == full.argmax(-1)).sum()),
    }


def _line(window: Window, rate: float, variant: Variant, blocks: list[dict[str, float]]) -> Record:
    """The blocks' sums, and their mean density."""
    sums = {name: sum(block[name] for block in blocks) for name in blocks[0]}
    return {
        "id": window.id,
        "kind": window.kind,
        "document": window.document,
        "length": len(window.tokens),
        "far": window.far,
        "mask_rate": rate,
        **variant.names,
        **sums,
        "density": sums["density"] / len(blocks),
    }
