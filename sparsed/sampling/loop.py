"""The one loop of all samplers: a turn, logits, proposals, commits, until no turn is left."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..config import SparseDConfig
from ..models.common import DiffusionLM
from ..run import SparseRun
from ..selection import SPARSED, Rule
from .canvas import Canvas, check_tensor
from .common import OnStep, Step, sequence_of
from .guidance import Guided
from .runner import StepRunner
from .settings import Settings
from .unmasking import Turn


def check_family(model: nn.Module, family: str) -> None:
    """Raise ValueError if the model says that it is of the other family, or is `DataParallel`, which says nothing."""
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
    generator: torch.Generator | None = None,
    config: SparseDConfig | None = None,
    backend: str = "auto",
    rule: Rule = SPARSED,
    on_step: OnStep | None = None,
) -> Tensor:
    """What `dream_generate` and `llada_generate` do, by their settings; arguments and errors are described there."""
    check_family(model, settings.family)
    check_tensor(input_ids)
    mask_id = model.config.mask_token_id if mask_id is None else mask_id
    vocabulary = model.config.vocab_size
    canvas = Canvas.of(input_ids.to(model.device), attention_mask, settings.gen_length, mask_id, vocabulary)
    halves = 2 if settings.cfg_scale else 1
    shape = halves * len(canvas.ids), canvas.length
    attention = sequence_of(model, config, settings.steps, settings.gen_length, shape, backend=backend, rule=rule)
    with attention as run:
        runner = reader(model, run, canvas, settings, halves)
        denoise(canvas, runner, settings, settings.turns(canvas), model.config, generator, on_step)
    return canvas.ids


def reader(
    model: DiffusionLM, run: SparseRun | None, canvas: Canvas, settings: Settings, halves: int
) -> StepRunner | Guided:
    """What gives the candidates' logits, in one forward a step of as many sequences as the canvas has, or twice."""
    valid = None if canvas.valid is None else canvas.valid.repeat(halves, 1)
    most_rows = halves * len(canvas.ids) * settings.most_rows
    runner = StepRunner(model, run, valid, canvas.prompt_len - 1, most_rows)
    if not settings.cfg_scale:
        return runner
    return Guided(runner, settings.cfg_scale, canvas.prompt_len, canvas.mask_id)


def denoise(
    canvas: Canvas,
    runner: StepRunner | Guided,
    settings: Settings,
    turns: Iterable[Turn],
    config: object,
    generator: torch.Generator | None,
    on_step: OnStep | None,
) -> None:
    """Take the turns one after the other, and fill in the canvas."""
    for index, turn in enumerate(turns):
        step = Step(index, ran=False)
        if not turn.idle or not runner.skip():
            rows = canvas.candidates(turn.end)
            logits = runner(canvas.ids, settings.sources(rows, canvas.length))
            tokens, probability, ranking = settings.propose(logits, config, generator)
            chosen = turn.choose(canvas.ids.shape, rows, ranking, generator)
            canvas.commit(rows, tokens, chosen)
            step = Step(index, True, rows, tokens, probability, chosen)
        if on_step is not None:
            on_step(step)
    runner.check()
