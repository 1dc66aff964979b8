"""From samples to lines of results: the sampler answers, the answers are scored."""

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import sampling
from ..chat import answer_length, decode, stop_ids
from ..models.common import DiffusionLM
from ..run import synchronize
from ..sampling import Settings
from ..sampling.common import OnStep, Step
from ..sampling.saving import Saving
from ..selection import SPARSED
from ..watching import recall, watched
from .folder import Record
from .methods import METHODS, Variant
from .scoring import score
from .tasks import Sample


@dataclass(frozen=True)
class Answerer:
    """Answers all samples of a run.

    Args:
        settings: the sampler's, by the number of new tokens and the `Saving`.
        backend: the kernel of the sparse steps.
    """

    model: DiffusionLM
    tokenizer: Any
    settings: dict[tuple[int, Saving], Settings]
    backend: str

    def answer(self, samples: list[Sample], variant: Variant, gen_length: int, on_step: OnStep) -> list[Record]:
        """A line of results for each sample; the samples have one length, and are one batch.

        Args:
            on_step: called after each step.

        Raises:
            BackendError: the named backend cannot run.
            FloatingPointError: the model's logits were not finite.
        """
        settings = self.settings[gen_length, variant.saving]
        ids = torch.tensor([sample.input_ids for sample in samples], device=self.model.device)
        layers: list[tuple[Tensor, Tensor]] = []  # density, and recall [B], of each layer's pattern
        mean = self.model.ranks.mean
        rule = watched(
            lambda scores, pattern: layers.append((mean(pattern.density), mean(recall(scores, pattern)))),
            METHODS[variant.method].rule or SPARSED,
        )
        phases: Counter[str] = Counter()

        def count(step: Step) -> None:
            phases[step.phase] += step.ran
            on_step(step)

        synchronize(self.model.device)
        start = time.perf_counter()
        stops = stop_ids(self.model.config, self.tokenizer)
        attention: dict[str, Any] = {"config": variant.config, "backend": self.backend, "rule": rule}
        out = sampling.generate(self.model, ids, settings, end_token_ids=stops, on_step=count, **attention)
        generated = out[:, ids.shape[1] :].tolist()
        seconds = (time.perf_counter() - start) / len(samples)
        # without a pattern no step was sparse
        density = torch.stack([found for found, _ in layers]).mean().item() if layers else 1.0
        lines = []
        for row, (sample, tokens) in enumerate(zip(samples, generated, strict=True)):
            text = decode(self.tokenizer, tokens[: answer_length(tokens, stops)]).strip()
            lines.append(
                {
                    "id": sample.id,
                    "task": sample.task,
                    "length": sample.length,
                    "seed": sample.seed,
                    **variant.names,
                    "score": score(text, sample.answers, sample.match),
                    "text": text,
                    "answers": list(sample.answers),
                    "prompt_tokens": len(sample.input_ids),
                    "new_tokens": gen_length,
                    "steps": settings.steps,
                    "forwards": phases.total(),
                    "phases": {phase: n for phase, n in phases.items() if n},
                    "density": density,
                    "recall": [shares[row].item() for _, shares in layers] or None,
                    "seconds": seconds,
                }
            )
        return lines
