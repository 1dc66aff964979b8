"""Whole generations: continue documents, with a line for each text and its work."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ... import sampling
from ...models.common import DiffusionLM
from ...run import synchronize
from ...sampling.common import Step
from ...sampling.likelihood import log_likelihood
from ...selection import SPARSED
from ..folder import Record
from ..methods import METHODS, Variant
from ..results import variant_of
from .documents import Document
from .measuring import sampler_of

DRAWS = 16  # of the likelihood's estimate, the same for all texts of a length


def key(record: Record) -> tuple:
    """The key of a line of results."""
    return (record["id"], record["steps"], *variant_of(record))


class Task(NamedTuple):
    """A document that is continued in one way.

    Args:
        length: how many of its tokens are used, the places of the new ones included.
    """

    document: Document
    length: int
    steps: int
    variant: Variant

    @property
    def names(self) -> Record:
        """The fields that distinguish its line from others."""
        name = f"{self.length}-{self.document.name}"
        return {"id": name, "document": self.document.name, "length": self.length, "steps": self.steps}

    @property
    def key(self) -> tuple:
        return key({**self.names, **self.variant.names})


@dataclass(frozen=True)
class Writer:
    """Writes texts.

    Args:
        new_tokens, block_length: of every generation.
        backend: the kernel of sparse attention.
    """

    model: DiffusionLM
    new_tokens: int
    block_length: int
    backend: str = "auto"

    def write(self, task: Task, on_step: Callable[[], None] = lambda: None) -> Record:
        """A greedy generation's line: its tokens, forwards by kind, seconds, and the text's bound.

        `bound` is an upper bound on the negative log-likelihood in nats, under full attention, by LLaDA's estimate
        from `DRAWS` maskings of the text; None if the model wrote its own mask token.

        Args:
            on_step: called after each step.

        Raises:
            BackendError: the named backend cannot run.
            FloatingPointError: the model's logits were not finite.
        """
        model, variant = self.model, task.variant
        settings = sampler_of(model.family, variant.saving, self.new_tokens, self.block_length, task.steps)
        prompt = task.document.tokens[: task.length - self.new_tokens].tolist()
        forwards: Counter[str] = Counter()

        def count(step: Step) -> None:
            forwards[step.phase] += step.ran
            on_step()

        synchronize(model.device)
        start = time.perf_counter()
        out = sampling.generate(
            model, torch.tensor([prompt]), settings, config=variant.config, backend=self.backend,
            rule=METHODS[variant.method].rule or SPARSED, on_step=count,
        )  # fmt: skip
        tokens = out[0, len(prompt) :].tolist()
        seconds = time.perf_counter() - start
        return {
            **task.names,
            **variant.names,
            "tokens": tokens,
            "forwards": {phase: number for phase, number in forwards.items() if number},
            "seconds": seconds,
            "bound": self._bound(prompt, tokens),
        }

    def _bound(self, prompt: list[int], tokens: list[int]) -> float | None:
        if self.model.config.mask_token_id in tokens:
            return None
        generator = torch.Generator().manual_seed(0)
        return -log_likelihood(self.model, prompt, tokens, samples=DRAWS, generator=generator)
