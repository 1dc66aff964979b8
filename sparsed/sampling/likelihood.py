"""Monte Carlo estimate of a target's likelihood after a prompt, with full attention or SparseD.

The estimate is LLaDA's (arXiv 2502.09992, appendix B.5, and `eval_llada.py` of its repository): hide l of the target's
L tokens, l uniform on 1 ... L, and take the hidden tokens' cross-entropy times L / l. The mean over many draws bounds
the negative log-likelihood from above. Dream's harness estimates the same expectation with tokens hidden independently
of each other, which varies more.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import SparseDConfig, check_numbers
from ..models.common import DiffusionLM
from ..run import SparseRun
from ..schedule import SPARSE
from .canvas import check_prompt
from .common import sequence_of
from .runner import StepRunner
from .settings import FAMILIES

Ids = Sequence[int]


def draw_masks(samples: int, length: int, generator: torch.Generator) -> Tensor:
    """Which of `length` tokens each of `samples` draws hides: bool [samples, length], draws that hide most first.

    The numbers of hidden tokens are uniform on 1 ... length and stratified: evenly spaced from a random start.

    Args:
        generator: source of randomness, on the CPU, so that every device sees the same draws.
    """
    start = torch.randint(length, (), generator=generator).item()
    offsets = (torch.arange(samples, dtype=torch.float64) * length / samples).round().long()
    hidden = ((start + offsets) % length + 1).sort(descending=True).values
    ranks = torch.rand(samples, length, generator=generator).argsort(-1)
    return ranks < hidden[:, None]


@torch.no_grad()
def log_likelihood(
    model: DiffusionLM,
    prompt: Ids,
    target: Ids,
    *,
    samples: int,
    generator: torch.Generator,
    config: SparseDConfig | None = None,
    backend: str = "auto",
) -> float:
    """Monte Carlo estimate of log p(target | prompt), in nats.

    The draws are SparseD's steps, in the order of a generation: those that hide most come first, with full attention,
    and select the blocks. A repeated draw with the same attention is computed once. So a target of one token takes one
    forward with full attention, and its estimate is exact.

    Args:
        model: a DreamModel or LLaDAModel.
        prompt, target: ids, at least one each.
        samples: number of draws.
        generator: source of randomness, on the CPU.
        config: SparseD; None means full attention.
        backend: kernel of the sparse steps.

    Raises:
        ValueError: no prompt, no target, an id outside the vocabulary, or a mask token among them.
        FloatingPointError: the model's logits were not finite.
    """
    check_numbers(samples=samples)
    ids = _sequence(model, prompt, target)
    masks = draw_masks(samples, len(target), generator)
    losses: dict[tuple, float] = {}
    total = 0.0
    with sequence_of(model, config, samples, len(target), ids.shape, backend=backend) as run:
        runner = _runner(model, run, prompt, target)
        for mask in masks:
            draw = (run is not None and run.phase == SPARSE, *mask.tolist())
            if draw not in losses or not runner.skip():
                hidden = len(prompt) + mask.nonzero().squeeze(-1).to(ids.device)
                loss = F.cross_entropy(_logits(runner, ids, hidden), ids[0, hidden], reduction="sum").item()
                losses[draw] = loss * len(target) / len(hidden)
            total += losses[draw]
        runner.check()
    return -total / samples


@torch.no_grad()
def is_greedy(
    model: DiffusionLM, prompt: Ids, target: Ids, *, config: SparseDConfig | None = None, backend: str = "auto"
) -> bool:
    """Whether the model writes exactly the target if every step commits its most confident token.

    Ends at the first token that differs; arguments and errors are those of `log_likelihood`.
    """
    ids = _sequence(model, prompt, target)
    hidden = len(prompt) + torch.arange(len(target), device=ids.device)
    with sequence_of(model, config, len(target), len(target), ids.shape, backend=backend) as run:
        runner = _runner(model, run, prompt, target)
        while len(hidden):
            confidence, tokens = _logits(runner, ids, hidden).softmax(-1).max(-1)
            best = confidence.argmax()
            if tokens[best] != ids[0, hidden[best]]:
                break
            hidden = torch.cat((hidden[:best], hidden[best + 1 :]))
        runner.check()
    return not len(hidden)


def _sequence(model: DiffusionLM, prompt: Ids, target: Ids) -> Tensor:
    """Prompt and target on the model's device, int64 [1, n]."""
    if not prompt or not target:
        raise ValueError("a likelihood needs at least one token of prompt and one of target")
    ids = torch.tensor([[*prompt, *target]], device=model.device)
    check_prompt(ids, model.config.mask_token_id, model.config.vocab_size)
    return ids


def _runner(model: DiffusionLM, run: SparseRun | None, prompt: Ids, target: Ids) -> StepRunner:
    first_row = FAMILIES[model.family].sources(torch.tensor(len(prompt)), len(prompt) + len(target))
    return StepRunner(model, run, None, int(first_row), len(target))


def _logits(runner: StepRunner, ids: Tensor, hidden: Tensor) -> Tensor:
    """float32 logits [n, V] of the places [n] of ids [1, T]; their tokens are hidden from the model."""
    model, masked = runner.model, ids.clone()
    masked[0, hidden] = model.config.mask_token_id
    return runner(masked, FAMILIES[model.family].sources(hidden, ids.shape[1])).float()
