"""The one loop of all samplers: a turn, logits, proposals, commits, until no turn is left."""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import SparseDConfig
from ..models.common import DiffusionLM
from ..ranks import Ranks
from ..run import SparseRun
from ..schedule import ByCommitted, ByStep, Schedule
from ..selection import SPARSED, Rule
from .canvas import Canvas, check_tensor
from .common import ANSWER, CACHED, IDLE, OnStep, Step, sequence_of
from .guidance import Guided
from .runner import StepRunner
from .settings import Settings
from .unmasking import Turn


def check_family(model: nn.Module, family: str) -> None:
    """Raise ValueError if the model is of the other family, or is a `DataParallel`, which does not tell."""
    if not hasattr(model, "config"):
        raise ValueError(f"{family}_generate needs the model inside the {type(model).__name__}: pass its .module")
    found = getattr(model, "family", family)
    if found != family:
        raise ValueError(f"{family}_generate needs a {family} model, got one of {found}")


@torch.no_grad()
def generate(
    model: DiffusionLM,
    input_ids: Tensor,
    settings: Settings,
    *,
    attention_mask: Tensor | None = None,
    mask_id: int | None = None,
    end_token_ids: Collection[int] | None = None,
    generator: torch.Generator | None = None,
    config: SparseDConfig | None = None,
    backend: str = "auto",
    rule: Rule = SPARSED,
    on_step: OnStep | None = None,
    on_phase: Callable[[str], None] | None = None,
) -> Tensor:
    """Generate, for `dream_generate` and `llada_generate`, by their settings; arguments and errors are described there.

    Args:
        on_phase: called with a step's phase before its forward runs.
    """
    check_family(model, settings.family)
    check_tensor(input_ids)
    mask_id = model.config.mask_token_id if mask_id is None else mask_id
    vocabulary = model.config.vocab_size
    canvas = Canvas.of(input_ids.to(model.device), attention_mask, settings.gen_length, mask_id, vocabulary)
    halves = settings.sequences
    shape = halves * len(canvas.ids), canvas.length
    options = {"backend": backend, "rule": rule, "schedule": schedule_of(settings, config, rule)}
    with sequence_of(model, config, settings.steps, settings.gen_length, shape, **options) as run:
        check_schedule(settings, run)
        runner = reader(model, run, canvas, settings, halves)
        ends = end_tokens(model.config) if end_token_ids is None else end_token_ids
        turns = together(model.ranks, canvas, reporting(run, canvas, settings.turns(canvas, ends)))
        denoise(canvas, runner, settings, turns, model.config, generator, on_step, on_phase)
    return canvas.ids


def schedule_of(settings: Settings, config: SparseDConfig | None, rule: Rule) -> Schedule | None:
    """When attention is over kept blocks in a generation with these settings. None without SparseD, or if `config` is
    no config: `sparsify` refuses that."""
    if not isinstance(config, SparseDConfig):
        return None
    return settings.schedule(config, settings.steps, settings.blocks, rule.needs_scores)


def check_schedule(settings: Settings, run: SparseRun | None) -> None:
    """Raise ValueError if a caller's own `sparsify` counts other forwards than these settings have: it might never
    select blocks."""
    if run is None or not isinstance(run.schedule, ByStep):
        return
    if settings.cached and run.schedule.steps != (whole := settings.refreshes(settings.blocks or 1)):
        raise ValueError(
            f"with this cache {whole} forwards compute all rows: give sparsify steps={whole}, or the sampler config="
        )
    if settings.bound is not None and not settings.cached:
        raise ValueError("with a threshold or factor the steps are not known: give the sampler config=, not sparsify")


def end_tokens(config: Any) -> set[int]:
    """The ids that end an answer, as far as the checkpoint's files name them."""
    named = (getattr(config, f"{name}_token_id", None) for name in ("eos", "eot", "pad"))
    return {*config.end_token_ids, *(index for index in named if index is not None)}


def reporting(run: SparseRun | None, canvas: Canvas, turns: Iterable[Turn]) -> Iterator[Turn]:
    """The turns; before each, the run learns how much is committed, if its schedule asks."""
    for turn in turns:
        if run is not None and isinstance(run.schedule, ByCommitted):
            run.committed = canvas.committed
        yield turn


def together(ranks: Ranks, canvas: Canvas, turns: Iterable[Turn]) -> Iterator[Turn]:
    """The turns; after each, every rank takes over rank 0's tokens. So a rounding error cannot make ranks differ, and
    the next turn is the same for all."""
    for turn in turns:
        yield turn
        ranks.share(canvas.ids)


def reader(
    model: DiffusionLM, run: SparseRun | None, canvas: Canvas, settings: Settings, halves: int
) -> StepRunner | Guided:
    """The runner that gives the candidates' logits, in one forward per step; guidance doubles the sequences."""
    valid = None if canvas.valid is None else canvas.valid.repeat(halves, 1)
    most_rows = halves * len(canvas.ids) * settings.most_rows
    cache = model.kv_cache(halves * len(canvas.ids), canvas.length) if settings.cached else None
    runner = StepRunner(model, run, valid, canvas.prompt_len - 1, most_rows, cache)
    if not settings.cfg_scale:
        return runner
    return Guided(runner, settings.cfg_scale, canvas.prompt_len, canvas.mask_id)


def candidates_of(
    canvas: Canvas, runner: StepRunner | Guided, settings: Settings, turn: Turn, window: tuple[int, int] | None
) -> tuple[Tensor, Tensor]:
    """A turn's candidates and their logits.

    On a GPU, a cached step whose number of candidates the rule need not know is launched before the host knows it. The
    forward then gives the whole block's logits, and the device does not wait for the host between two steps.
    """
    if turn.rows is None and window is not None and runner.ahead:
        block, places = canvas.positions(turn.start, turn.end), canvas.places(turn.start, turn.end)
        logits = runner(canvas.ids, settings.sources(block, canvas.length), window)
        found = places()
        return block[found], logits[found]
    rows = canvas.candidates(turn.start, turn.end) if turn.rows is None else turn.rows
    return rows, runner(canvas.ids, settings.sources(rows, canvas.length), window)


def denoise(
    canvas: Canvas,
    runner: StepRunner | Guided,
    settings: Settings,
    turns: Iterable[Turn],
    config: object,
    generator: torch.Generator | None,
    on_step: OnStep | None,
    on_phase: Callable[[str], None] | None,
) -> None:
    """Take the turns in order, and fill in the canvas."""
    for index, turn in enumerate(turns):
        step = Step(index, IDLE)
        if not turn.idle or not runner.skip():
            window = settings.window(turn, canvas, settings.shift)
            phase, computed = runner.phase, canvas.length
            if window is not None:
                phase, computed = CACHED if turn.opens is None else ANSWER, window[1] - window[0]
            if on_phase is not None:
                on_phase(phase)
            rows, logits = candidates_of(canvas, runner, settings, turn, window)
            proposal = settings.propose(logits, config, generator)
            chosen = turn.choose(canvas.ids.shape, rows, proposal, generator)
            canvas.commit(rows, proposal.tokens, chosen)
            step = Step(index, phase, computed, rows, proposal.tokens, proposal.probability, chosen)
            if turn.ends:
                filled = canvas.stop(turn.start, turn.end, turn.ends, turn.over)
                step = replace(step, filled=filled, fill=canvas.ids.view(-1)[filled])
        if on_step is not None:
            on_step(step)
    runner.check()
