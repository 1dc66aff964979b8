"""Draw assets/idea.png, the idea of SparseD, from a real run of the LLaDA demo checkpoint.

pip install -e ".[plots]"
python -m assets.idea
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from torch import Tensor, nn

from sparsed import llada_generate, load_model, load_tokenizer, select_blocks
from sparsed.kernels import block_scores
from sparsed.prompts import build_document, demo_path
from sparsed.sampling.common import Step

FILE = Path(__file__).with_name("idea.png")
PROMPT, LENGTH, STEPS, BLOCK, SELECT = 1024, 64, 64, 32, 0.3
EARLY, LATE = 12, 60  # the step that chooses (ceil(0.2 * 64) - 1), and one near the end
OFF, PROMPT_KEPT, GENERATED_KEPT = "#f2f2f2", "#3b6ea5", "#e07b39"


def main() -> None:
    """Run the model once with full attention, take q and k at two steps, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", help="a LLaDA folder (default: the bundled demo checkpoint)")
    path = parser.parse_args().model_path or demo_path("llada")
    model, tokenizer = load_model(path, device="cpu"), load_tokenizer(path)
    prompt = build_document(tokenizer, PROMPT, seed=7)[1]
    taken = take_heads(model, torch.tensor([prompt.input_ids]))
    scores = {step: [block_scores(q, k, block_size=BLOCK)[0] for q, k in layers] for step, layers in taken.items()}
    kept = {
        step: [select_blocks(q, k, prompt_len=PROMPT, block_size=BLOCK, select=SELECT)[0] for q, k in layers]
        for step, layers in taken.items()
    }
    layer, one, other = most_different_heads(kept[EARLY])
    print(f"layer {layer}, heads {one} and {other}")
    draw(scores, kept, layer, (one, other), FILE)


def take_heads(model: nn.Module, input_ids: Tensor) -> dict[int, list[tuple[Tensor, Tensor]]]:
    """Generate with full attention; q and k of all layers but the last, after rotary embedding, at EARLY and LATE."""
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {EARLY: [], LATE: []}
    step = 0

    def watched(attend):
        def attention(q, k, v, key_valid):
            if step in seen and q.shape == k.shape:  # the last layer computes only the queries that are read
                seen[step].append((q.clone(), k.clone()))
            return attend(q, k, v, key_valid)

        return attention

    def next_step(done: Step) -> None:
        nonlocal step
        step = done.index + 1

    for module in model.modules():
        if hasattr(module, "attend"):
            module.attend = watched(module.attend)
    llada_generate(model, input_ids, gen_length=LENGTH, steps=STEPS, block_length=LENGTH, on_step=next_step)
    return seen


def agreement(one: Tensor, other: Tensor) -> float:
    """Share of the blocks that one pattern keeps which the other keeps too."""
    return ((one & other).sum() / one.sum()).item()


def most_different_heads(kept: list[Tensor]) -> tuple[int, int, int]:
    """The layer and the two of its heads whose kept blocks agree least."""
    pairs = [
        (agreement(heads[one], heads[other]), layer, one, other)
        for layer, heads in enumerate(kept)
        for one in range(len(heads))
        for other in range(one)
    ]
    return min(pairs)[1:]


def draw(scores: dict, kept: dict, layer: int, heads: tuple[int, int], file: Path) -> None:
    """Three groups of panels: two heads at one step, one head at two steps, and what that head keeps."""
    one, other = heads
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.9), layout="constrained")
    heat = [(scores[EARLY], other, EARLY), (scores[EARLY], one, EARLY), (scores[LATE], one, LATE)]
    for axis, (maps, head, step) in zip(axes, heat, strict=False):
        shades = maps[layer][head].float().pow(0.3)  # few blocks have most of the attention
        axis.imshow(shades, cmap="Blues", vmin=shades.quantile(0.02), vmax=shades.quantile(0.99))
        axis.set_title(f"head {head}, step {step + 1} of {STEPS}", fontsize=10)
    blocks = kept[EARLY][layer][one].int()
    border = PROMPT // BLOCK
    blocks[:, border:] *= 2
    axes[3].imshow(blocks, cmap=ListedColormap([OFF, PROMPT_KEPT, GENERATED_KEPT]), vmin=0, vmax=2)
    axes[3].axvline(border - 0.5, color="black", linewidth=1)
    axes[3].set_title(f"head {one} keeps, from step {EARLY + 2} on", fontsize=10)
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_xlabel("key blocks", fontsize=9)
    axes[0].set_ylabel("query blocks", fontsize=9)
    steps = sum(agreement(*pair) for pair in zip(kept[EARLY], kept[LATE], strict=True)) / len(kept[EARLY])
    between = agreement(kept[EARLY][layer][one], kept[EARLY][layer][other])
    figure.text(0.25, 1.02, f"heads differ: these two share {between:.0%} of their blocks", ha="center", fontsize=12)
    figure.text(0.62, 1.02, f"steps agree: {steps:.0%}, all heads", ha="center", fontsize=12)
    figure.text(0.88, 1.02, "selection, prompt | answer", ha="center", fontsize=12)
    figure.savefig(file, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
