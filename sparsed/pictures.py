"""`python -m sparsed.pictures`: what SparseD rests on, drawn from a run of a demo checkpoint on the CPU.

heads.png shows the block scores of one layer's heads and the blocks that each keeps, steps.png how alike the blocks
are that a head would keep in different denoising steps.
"""

import argparse
import importlib.util
import math
import sys
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import Pattern
from .config import SparseDConfig
from .console.endings import blame, guarded
from .console.files import output_path, replacing
from .console.parser import Parser
from .console.streams import tell
from .models import load_model, load_tokenizer
from .models.common import DiffusionLM
from .patch import sparsify
from .prompts import build_document, demo_path
from .sampling import generate, settings_for
from .sampling.common import Step
from .watching import watched

PROGRAM = "python -m sparsed.pictures"
FILES = ("heads.png", "steps.png")
PROMPT, NEW_TOKENS, STEPS, SEED = 1024, 64, 64, 7
CONFIG = SparseDConfig(block_size=32)
MOST_HEADS = 4
OFF, PROMPT_KEPT, ANSWER_KEPT = "#f2f2f2", "#3b6ea5", "#e07b39"


@dataclass(frozen=True)
class View:
    """A run with full attention that is looked at, by default that of the pictures in docs/results.md.

    Args:
        config: what SparseD would do.
        stride: steps between two that are looked at.
    """

    new_tokens: int = NEW_TOKENS
    steps: int = STEPS
    config: SparseDConfig = CONFIG
    stride: int = 2

    @property
    def selecting(self) -> int:
        """The step that would select."""
        return self.config.n_full(self.steps) - 1

    @property
    def looked_at(self) -> list[int]:
        """Which steps, ascending; the one that would select is among them."""
        return list(range(self.selecting % self.stride, self.steps, self.stride))


@dataclass(frozen=True)
class Seen:
    """What SparseD would see and select in some steps of a run with full attention; on the CPU.

    Args:
        scores: [layers, heads, nQ, nK] block scores, of the step that selects.
        kept: bool [steps, layers, heads, nQ, nK], of every step that was looked at.
        held: [steps, layers, heads], the share of that step's attention that the blocks of the step that selects hold.
        border: the first block of the answer.
    """

    view: View
    scores: Tensor
    kept: Tensor
    held: Tensor
    border: int

    @property
    def selected(self) -> Tensor:
        """What the step that selects keeps."""
        return self.kept[self.now]

    @property
    def later(self) -> slice:
        """The steps that SparseD would run on the selected blocks."""
        return slice(self.now + 1, None)

    @property
    def now(self) -> int:
        """The place of the step that selects among those looked at."""
        return self.view.looked_at.index(self.view.selecting)


def main(argv: list[str] | None = None) -> int:
    """Draw with these words (None: the process's own); returns the exit code."""
    return guarded(lambda: _draw(_parse(argv)), PROGRAM, advice="close other programs", ending=argv is None)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog=PROGRAM,
        description="Draw what SparseD rests on, from a run of a demo checkpoint on the CPU: heads.png, the block "
        "scores of some heads and the blocks that each keeps; steps.png, how alike the blocks are that a head would "
        "keep in different denoising steps. Takes about a minute.",
        epilog=f"example:\n  {PROGRAM} --out assets",
    )
    parser.add_argument("--demo", choices=("dream", "llada"), default="llada", help="(default: %(default)s)")
    parser.add_argument("--out", metavar="DIR", required=True, help="the folder for the two pictures")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("matplotlib") is None:
        parser.error('needs the package matplotlib: pip install ".[plots]"')
    args.files = [output_path(parser, "--out", str(Path(args.out, name))) for name in FILES]
    args.parser = parser
    return args


def _draw(args: argparse.Namespace) -> None:
    path = demo_path(args.demo)
    model, tokenizer = load_model(path, device="cpu"), load_tokenizer(path)
    prompt = build_document(tokenizer, PROMPT, SEED)[1]
    view = View()
    seen = look(model, denoise(model, torch.tensor([prompt.input_ids]), view), view)
    for file, figure in zip(args.files, (heads_figure(seen), steps_figure(seen)), strict=True):
        with blame(args, "--out"):
            save(figure, file)


def save(figure: Any, file: Path) -> None:
    """Write a figure as PNG, whole or not at all, and say so."""
    with replacing(file) as temporary:
        figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight")
    tell(f"written to {file}")


@torch.no_grad()
def look(model: DiffusionLM, canvases: list[Tensor], view: View) -> Seen:
    """See what some of the steps that read these ids, as `denoise` gives them, would select."""
    kept, held = [], []
    scores, selected, border = selection_of(model, canvases[view.selecting], view)
    for step in view.looked_at:
        found, own, _ = selection_of(model, canvases[step], view)
        kept.append(own.cpu())
        held.append(share_held(found, selected).cpu())
    return Seen(view, scores.cpu(), torch.stack(kept), torch.stack(held), border)


def denoise(model: DiffusionLM, input_ids: Tensor, view: View) -> list[Tensor]:
    """The ids [1, prompt + new tokens] that each step of a greedy generation with full attention reads."""
    canvas = F.pad(input_ids.to(model.device), (0, view.new_tokens), value=model.config.mask_token_id)
    read = []

    def note(step: Step) -> None:
        read.append(canvas.clone())
        for position, token, _ in step.commits():
            canvas[0, position] = token

    settings = settings_for(model.family, gen_length=view.new_tokens, steps=view.steps, block_length=view.new_tokens)
    generate(model, input_ids, settings, on_step=note)
    return read


def selection_of(model: DiffusionLM, ids: Tensor, view: View) -> tuple[Tensor, Tensor, int]:
    """What the step that reads `ids` [1, T] would select: block scores and kept blocks, [layers, heads, nQ, nK], and
    the first block of the answer."""
    seen: list[tuple[Tensor, Pattern]] = []
    config = replace(view.config, skip=0)  # the first step selects
    rule = watched(lambda scores, pattern: seen.append((scores, pattern)))
    with sparsify(model, config, steps=2, gen_length=view.new_tokens, rule=rule) as run, run.sequence(ids.shape):
        model(ids)
    scores = torch.stack([scores[0] for scores, _ in seen])
    return scores, torch.stack([pattern.as_mask()[0] for _, pattern in seen]), seen[0][1].grid.parts[1].start


def share_held(scores: Tensor, kept: Tensor) -> Tensor:
    """Share of the attention that is within the kept blocks: [..., nQ, nK] twice -> [...]."""
    return (scores * kept).sum((-2, -1)) / scores.sum((-2, -1))


def common(one: Tensor, other: Tensor) -> Tensor:
    """Share of the blocks that `one` keeps which `other` keeps too: bool [..., nQ, nK] twice -> float32 [...]."""
    return (one & other).sum((-2, -1)) / one.sum((-2, -1))


def between_heads(kept: Tensor) -> Tensor:
    """`common` of two heads of a layer, mean over all pairs: [..., heads, nQ, nK] -> [...]."""
    pairs = combinations(range(kept.shape[-3]), 2)
    return torch.stack([common(kept[..., a, :, :], kept[..., b, :, :]) for a, b in pairs]).mean(0)


def heads_figure(seen: Seen) -> Any:
    """The layer whose heads agree least: block scores above, kept blocks below, a head a column."""
    layer = int(between_heads(seen.selected).argmin())
    heads = min(MOST_HEADS, seen.scores.shape[1])
    figure = _figure(3.1 * heads, 6.6)
    panels = figure.subplots(2, heads, squeeze=False)
    for head in range(heads):
        shades = seen.scores[layer, head].pow(0.3)  # few blocks have most of the attention
        panels[0, head].imshow(shades, cmap="Blues", vmin=shades.quantile(0.02), vmax=shades.quantile(0.99))
        panels[0, head].set_title(f"head {head}: attention", fontsize=10)
        _show_kept(panels[1, head], seen.selected[layer, head], seen.border)
        panels[1, head].set_title(f"head {head}: kept blocks", fontsize=10)
    for panel in panels.flat:
        panel.set(xticks=[], yticks=[])
    for panel in panels[1]:
        panel.set_xlabel("key blocks", fontsize=9)
    for panel in panels[:, 0]:
        panel.set_ylabel("query blocks", fontsize=9)
    shared = between_heads(seen.selected)[layer]
    figure.suptitle(
        f"Heads differ: layer {layer}, step {seen.view.selecting + 1} of {seen.view.steps}; "
        f"two heads share {shared:.0%} of their blocks, on average",
        fontsize=12,
    )
    return figure


def _show_kept(panel: Any, kept: Tensor, border: int) -> None:
    from matplotlib.colors import ListedColormap

    blocks = kept.int()
    blocks[:, border:] *= 2
    panel.imshow(blocks, cmap=ListedColormap([OFF, PROMPT_KEPT, ANSWER_KEPT]), vmin=0, vmax=2)
    panel.axvline(border - 0.5, color="black", linewidth=1)


def steps_figure(seen: Seen) -> Any:
    """One head's blocks at all pairs of steps; every head's blocks against those that the step that selects keeps."""
    alike = common(seen.kept, seen.selected)  # [steps, layers, heads]
    layer, head = _typical_head(alike)
    figure = _figure(11.5, 4.6)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
    own = seen.kept[:, layer, head]
    view, steps = seen.view, seen.view.looked_at
    ends = (steps[0] + 1 - view.stride / 2, steps[-1] + 1 + view.stride / 2)
    pairs = common(own[:, None], own[None])
    # from 0 on, the picture would be one colour: nearly all are far above
    lowest = math.floor(10 * pairs.min().item()) / 10
    picture = left.imshow(pairs, cmap="viridis", vmin=min(lowest, 0.9), vmax=1, extent=(*ends, *ends[::-1]))
    left.set(xlabel="step", ylabel="step", title=f"layer {layer}, head {head}: any two steps")
    figure.colorbar(picture, ax=left, label="blocks in common", shrink=0.8)
    numbers = [step + 1 for step in steps]
    right.plot(numbers, alike.flatten(1), color=PROMPT_KEPT, alpha=0.2, linewidth=0.8)
    mean = alike.mean((1, 2))
    right.plot(numbers, mean, color=PROMPT_KEPT, linewidth=2.5, label="the same head; thick: mean of all heads")
    heads = between_heads(seen.kept).mean(-1)
    right.plot(numbers, heads, color=ANSWER_KEPT, linewidth=2.5, label="two heads of a layer at the same step, mean")
    density = seen.selected.float().mean().item()
    right.axhline(density, color="gray", linestyle=":", label="blocks taken at random")
    right.axvline(view.selecting + 1, color="black", linewidth=1)
    right.annotate(f"step {view.selecting + 1} selects", (view.selecting + 2, 0.02), fontsize=9)
    right.set(xlabel="step", ylabel="blocks in common", ylim=(0, 1.02), title="against the step that selects")
    right.legend(loc="lower right", bbox_to_anchor=(1, 0.05), fontsize=8)
    figure.suptitle(f"Steps agree: {alike[seen.later].mean():.0%} of the blocks, over all later steps", fontsize=12)
    return figure


def recall_figure(panels: dict[str, Tensor]) -> Any:
    """The share of the attention that the kept blocks hold, by layer and head: a panel for each title, of [layers,
    heads]."""
    figure = _figure(4.2 * len(panels), 5.2)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, (title, held) in zip(axes, panels.items(), strict=True):
        picture = panel.imshow(held, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        panel.set(xlabel="head", ylabel="layer", title=f"{title}: {held.mean():.0%}, lowest {held.min():.0%}")
    figure.colorbar(picture, ax=axes, label="share of the attention that the kept blocks hold", shrink=0.8)
    return figure


def _typical_head(alike: Tensor) -> tuple[int, int]:
    """Layer and head whose mean similarity over the steps is the median one; alike [steps, layers, heads]."""
    means = alike.mean(0)
    return divmod(int(means.flatten().argsort()[means.numel() // 2]), means.shape[1])


def _figure(width: float, height: float) -> Any:
    """An empty figure of that size in inches, of no window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


if __name__ == "__main__":
    sys.exit(main())
