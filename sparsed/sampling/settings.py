"""How each family samples: its checked numbers, the turns of its steps, and proposals from logits.

The loop knows a family only by its settings object.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config import check_numbers
from .canvas import Canvas
from .proposals import (
    Proposal,
    confidence,
    draw_order,
    filtered_probabilities,
    pick,
    probability_of,
    tempered,
)
from .saving import BLOCK_LENGTH, MAKE_BLOCKS, OFF, Saving
from .unmasking import (
    SettingError,
    Turn,
    commit_fractions,
    idle_steps,
    steps_per_block,
    time_grid,
)

# the last time of the grid on which Dream commits
EPS = 1e-3
ALGORITHMS = ("maskgit_plus", "entropy", "topk_margin", "origin")
REMASKING = ("low_confidence", "random")
NEEDS_BLOCKS = f"needs blocks, after which to stop: give a {', '.join(MAKE_BLOCKS[:-1])} or {MAKE_BLOCKS[-1]}"


def check_temperature(name: str, value: float) -> None:
    """Raise ValueError unless the temperature is zero or above."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ValueError(f"{name} must be 0 or above, got {value!r}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def needed_id(config: Any, name: str, option: str) -> int:
    """A special token's id in the model's config; ValueError if the checkpoint has none, which the option needs."""
    index = getattr(config, name)
    if index is None:
        raise ValueError(
            f"{option} needs the checkpoint's '{name}', which its files do not name: add it to config.json"
        )
    return int(index)


@dataclass(frozen=True)
class DreamSettings(Saving):
    """The arguments of `dream_generate` that say how it samples.

    Raises:
        ValueError: a number or name outside its range, or blocks that do not fit tokens or steps.
    """

    family: ClassVar[str] = "dream"
    shift: ClassVar[int] = 1  # a token's logits are in the row before it
    always_in_blocks: ClassVar[bool] = False
    cfg_scale: ClassVar[float] = 0.0
    sequences: ClassVar[int] = 1

    gen_length: int
    steps: int
    alg: str = "maskgit_plus"
    alg_temp: float | None = 0.0
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    eps: float = EPS
    block_length: int | None = None

    def __post_init__(self):
        check_numbers(gen_length=self.gen_length, steps=self.steps)
        check_choice("alg", self.alg, ALGORITHMS)
        check_temperature("temperature", self.temperature)
        check_temperature("alg_temp", self.alg_temp or 0.0)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p!r}")
        whole = isinstance(self.top_k, int) and not isinstance(self.top_k, bool)
        if self.top_k is not None and (not whole or self.top_k < 1):
            raise ValueError(f"top_k must be a positive whole number or None, got {self.top_k!r}")
        if not isinstance(self.eps, float) or not 0 < self.eps < 1:
            raise ValueError(f"eps must lie between 0 and 1, got {self.eps!r}")
        self.check_saving()
        if self.block_length is None and (self.cached or self.bound):
            object.__setattr__(self, "block_length", min(BLOCK_LENGTH, self.gen_length))
        if self.block_length is not None:
            check_numbers(block_length=self.block_length)
            steps_per_block(self.gen_length, self.steps, self.block_length)
        elif self.early_stop:
            line = f"early_stop {NEEDS_BLOCKS}, or block_length"
            raise SettingError("early_stop", f"{NEEDS_BLOCKS}, or --block_length", line)
        if self.alg == "origin" and self.bound:
            name = "factor" if self.threshold is None else "threshold"
            raise SettingError(name, "not allowed with the algorithm origin, which looks at no probability")

    def plain(self) -> "DreamSettings":
        """As published: one region, on its time grid."""
        return replace(self, block_length=None, **OFF)

    @property
    def blocks(self) -> int | None:
        """Number of blocks in the generated region; None if it has none."""
        return None if self.block_length is None else self.gen_length // self.block_length

    @property
    def most_rows(self) -> int:
        """Candidates of a batch row in one step, at most."""
        return self.block_length or self.gen_length

    @property
    def idle(self) -> list[bool]:
        """Which steps commit nothing, so that no logits are needed: at temperature 0, where no draw is lost by it."""
        if self.block_length is not None:
            return self.idle_in_blocks(self.steps, self.blocks or 1, self.block_length, self.temperature == 0)
        first = 0
        if self.temperature == 0 and self.alg != "origin":
            first = idle_steps(self.gen_length, commit_fractions(self.steps, self.eps))
        return [step < first for step in range(self.steps)]

    def turns(self, canvas: Canvas, ends: Collection[int]) -> Iterator[Turn]:
        """A turn for every step; `ends` are the tokens that end an answer."""
        if self.block_length is not None:
            return self.block_turns(canvas, self.idle, self.block_length, ends)
        fractions = commit_fractions(self.steps, self.eps)
        return time_grid(canvas, fractions, self.idle, by_chance=self.alg == "origin")

    @staticmethod
    def sources(rows: Tensor, length: int) -> Tensor:
        """The flat rows that predict the flat positions `rows`: one to the left, but position 0 reads its own."""
        return rows - (rows % length != 0).long()

    def propose(self, logits: Tensor, config: Any, generator: torch.Generator | None) -> Proposal:
        """Proposals from the candidates' logits [n, V]; probabilities are those after temperature and filters."""
        probabilities = filtered_probabilities(logits, self.temperature, self.top_p, self.top_k)
        tokens = pick(probabilities, self.temperature == 0, generator)
        probability = probability_of(tokens, probabilities)
        if self.alg == "origin":  # nothing ranks them: committed by chance, in blocks in a random order
            ranking = probability
            if self.block_length is not None:
                ranking = torch.rand(len(tokens), generator=generator, device=tokens.device)
            return Proposal(tokens, probability, ranking, None)
        ranking = confidence(probabilities, probability, self.alg)
        if self.alg_temp:
            ranking = draw_order(ranking / self.alg_temp, generator)
        certainty = probability_of(tokens, logits.float().softmax(-1)) if self.bound else None
        return Proposal(tokens, probability, ranking, certainty)


@dataclass(frozen=True)
class LLaDASettings(Saving):
    """The arguments of `llada_generate` that say how it samples.

    Raises:
        ValueError: a number or name outside its range, or blocks that do not fit tokens or steps.
    """

    family: ClassVar[str] = "llada"
    shift: ClassVar[int] = 0
    always_in_blocks: ClassVar[bool] = True

    gen_length: int
    steps: int
    block_length: int
    temperature: float = 0.0
    cfg_scale: float = 0.0
    remasking: str = "low_confidence"
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False

    def __post_init__(self):
        check_numbers(gen_length=self.gen_length, steps=self.steps, block_length=self.block_length)
        check_choice("remasking", self.remasking, REMASKING)
        check_temperature("temperature", self.temperature)
        check_temperature("cfg_scale", self.cfg_scale)
        for name in ("logits_eos_inf", "confidence_eos_eot_inf"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        steps_per_block(self.gen_length, self.steps, self.block_length)
        self.check_saving()

    @property
    def sequences(self) -> int:
        """Sequences per batch row in a forward: guidance needs two."""
        return 2 if self.cfg_scale else 1

    @property
    def blocks(self) -> int:
        """Number of blocks in the generated region."""
        return self.gen_length // self.block_length

    @property
    def most_rows(self) -> int:
        """Candidates of a batch row in one step, at most."""
        return self.block_length

    @property
    def idle(self) -> list[bool]:
        """Which steps commit nothing, so that no logits are needed: at temperature 0, where no draw is lost by it."""
        return self.idle_in_blocks(self.steps, self.blocks, self.block_length, self.temperature == 0)

    def turns(self, canvas: Canvas, ends: Collection[int]) -> Iterator[Turn]:
        """A turn for every step; `ends` are the tokens that end an answer."""
        return self.block_turns(canvas, self.idle, self.block_length, ends)

    @staticmethod
    def sources(rows: Tensor, length: int) -> Tensor:
        """The flat rows that predict the flat positions `rows`: the same."""
        return rows

    def propose(self, logits: Tensor, config: Any, generator: torch.Generator | None) -> Proposal:
        """Proposals from the candidates' logits [n, V]; probabilities are without temperature.

        Args:
            config: the model's, for the ids of its end tokens.
        """
        logits, greedy = logits.float(), self.temperature == 0
        if self.logits_eos_inf:
            logits[:, needed_id(config, "eos_token_id", "logits_eos_inf")] = -torch.inf
        tokens = pick(logits if greedy else tempered(logits, self.temperature).softmax(-1), greedy, generator)
        probability = probability_of(tokens, logits.softmax(-1))
        certainty = probability
        if self.confidence_eos_eot_inf and (self.bound or self.remasking != "random"):
            logits[:, needed_id(config, "eot_token_id", "confidence_eos_eot_inf")] = -torch.inf
            if greedy:  # as published: with noise, only the end of the turn is held back
                logits[:, needed_id(config, "eos_token_id", "confidence_eos_eot_inf")] = -torch.inf
            certainty = probability_of(tokens, logits.softmax(-1))
        ranking = certainty
        if self.remasking == "random":
            ranking = torch.rand(len(tokens), generator=generator, device=tokens.device)
        return Proposal(tokens, probability, ranking, certainty)


Settings = DreamSettings | LLaDASettings
FAMILIES: dict[str, type[DreamSettings] | type[LLaDASettings]] = {
    settings.family: settings for settings in (DreamSettings, LLaDASettings)
}


def own_options(family: str) -> tuple[str, ...]:
    """The names of a family's settings that are neither lengths nor the temperature, which both families have."""
    shared = ("gen_length", "steps", "block_length", "temperature")
    return tuple(field.name for field in fields(FAMILIES[family]) if field.name not in shared)


def in_blocks(family: str, options: dict[str, Any]) -> bool:
    """Whether a family writes its region block after block: LLaDA always, Dream with a cache, threshold or factor."""
    made = (options.get(name, OFF[name]) != OFF[name] for name in MAKE_BLOCKS)
    return FAMILIES[family].always_in_blocks or any(made)


def settings_for(family: str, *, gen_length: int, steps: int, block_length: int, **options: Any) -> Settings:
    """The settings of a family's sampler.

    Args:
        family: "dream" or "llada", as `model.family` says it.
        block_length: at most the whole region; ignored if Dream has no blocks.
        options: the family's own.

    Raises:
        ValueError: a number or name outside its range.
        TypeError: an option that the family does not have.
    """
    if in_blocks(family, options):
        options["block_length"] = min(block_length, gen_length)
    elif options.get("early_stop") is True:
        raise SettingError("early_stop", NEEDS_BLOCKS)  # a block length is not enough here
    return FAMILIES[family](gen_length, steps, **options)


def settings_for_answer(family: str, length: int, steps: int | None, block_length: int, /, **options: Any) -> Settings:
    """The settings of a sampler that fills an answer of `length` tokens to the end of its last block.

    Args:
        steps: None for one step per token, up to that end.
        block_length, options: as for `settings_for`.

    Raises:
        ValueError: a number or name outside its range, or an option that the family does not have.
    """
    own = own_options(family)
    for name in options:
        if name not in ("temperature", *own):
            raise ValueError(f"{family}'s sampler has no {name!r}; it has {', '.join(own)}")
    filled = length + -length % min(block_length, length) if in_blocks(family, options) else length
    steps = filled if steps is None else steps
    return settings_for(family, gen_length=filled, steps=steps, block_length=block_length, **options)
