"""From a plan of samples and variants to lines of results, each sample once."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import sampling
from ..chat import answer_length, decode, stop_ids
from ..config import SparseDConfig
from ..models.common import DiffusionLM
from ..run import synchronize
from ..sampling.common import OnStep, attention_of
from ..watching import recall, watched
from .methods import METHODS
from .results import Record
from .scoring import score
from .tasks import Sample


@dataclass(frozen=True)
class Variant:
    """A method with its numbers, None for full attention."""

    method: str
    config: SparseDConfig | None

    @property
    def names(self) -> Record:
        """How lines of results name it: None for a setting that means nothing to the method, or was not asked for."""
        config, skips = self.config, METHODS[self.method].skips
        return {
            "method": self.method,
            "select": config and config.select,
            "skip": config.skip if config and skips else None,
            "block_size": config and config.block_size,
            "dense_answer": (config and config.dense_answer) or None,
        }


def variants(methods: list[str], configs: list[SparseDConfig]) -> list[Variant]:
    """Every method with all the numbers that mean something to it, each once, the methods in their order."""
    made = (Variant(name, METHODS[name].config(config)) for name in methods for config in configs)
    return list(dict.fromkeys(made))


@dataclass(frozen=True)
class Sampler:
    """How all samples of a run are answered: greedily, by the family's sampler.

    Args:
        block_length: LLaDA's tokens of a semi-autoregressive block.
        backend: the kernel of the sparse steps.
    """

    model: DiffusionLM
    tokenizer: Any
    block_length: int
    backend: str

    @torch.no_grad()
    def answer(
        self, samples: tuple[Sample, ...], variant: Variant, gen_length: int, steps: int, on_step: OnStep
    ) -> list[Record]:
        """A line of results for each of the samples, which are of one length and make one batch.

        Args:
            gen_length, steps: new tokens, denoising steps.
            on_step: called after each step.

        Raises:
            BackendError: the named backend cannot run.
            FloatingPointError: the model's logits were not finite.
        """
        device = self.model.device
        ids = torch.tensor([sample.input_ids for sample in samples], device=device)
        rule = METHODS[variant.method].rule
        recalls: list[Tensor] = []  # of every layer in turn, [B]
        options = {"steps": steps, "gen_length": gen_length}
        sparse: dict[str, Any] = {"backend": self.backend}
        if rule is not None:
            sparse["rule"] = watched(lambda scores, pattern: recalls.append(recall(scores, pattern)), rule)
        synchronize(device)
        start = time.perf_counter()
        with attention_of(self.model, variant.config, **options, **sparse) as run:
            generated = self.generate(ids, **options, on_step=on_step)[:, ids.shape[1] :].tolist()
            density = None if run is None else run.density
        seconds = (time.perf_counter() - start) / len(samples)
        stops = stop_ids(self.model.config, self.tokenizer)
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
                    "steps": steps,
                    "density": 1.0 if density is None else density,  # no step was sparse
                    "recall": [layer[row].item() for layer in recalls] or None,
                    "seconds": seconds,
                }
            )
        return lines

    def generate(self, ids: Tensor, gen_length: int, steps: int, on_step: OnStep | None = None) -> Tensor:
        """The family's sampler: ids [B, prompt] -> [B, prompt + gen_length]."""
        lengths = {"gen_length": gen_length, "steps": steps, "block_length": self.block_length}
        settings = sampling.settings_for(self.model.family, **lengths)
        return sampling.generate(self.model, ids, settings, on_step=on_step)


def of_one_length(samples: list[Sample], size: int) -> Iterator[tuple[Sample, ...]]:
    """The samples in their order, at most `size` at once, and only those of one prompt length together."""
    batch: list[Sample] = []
    for sample in samples:
        if batch and (len(batch) == size or len(sample.input_ids) != len(batch[0].input_ids)):
            yield tuple(batch)
            batch = []
        batch.append(sample)
    if batch:
        yield tuple(batch)


def leave_group() -> None:
    """End the group of processes, if there is one: its threads, left alone, now and then abort a process that exits."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
