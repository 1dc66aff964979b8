"""How much memory a run will take, known before the weights are loaded, and how much there is."""

import argparse
from collections.abc import Callable

import psutil
import torch

from ..blocks import BlockGrid
from ..config import share
from ..console.endings import TooLittleMemory
from ..models.common import DiffusionLM
from ..models.loading import GIB, free_bytes, resolve_device, weight_bytes
from ..prompts import LENGTHS, PRESETS

# rows as wide as the model that a layer holds while its MLP runs, besides keys and values: its input, the same with the
# attention added, normed, what attention gave, and the queries
HELD_ROWS = 5
# rows as wide as the MLP: gate, up and their product; plain torch holds the gate's silu too
MLP_ROWS = {"cuda": 3, "cpu": 4, "mps": 4}
# bytes of a logit with what the sampler makes of it: float32, and its softmax
SAMPLED = 8
# bytes of a block score and of a kept block's index
SCORE = INDEX = 4


def peak_bytes(model: DiffusionLM, args: argparse.Namespace, prompt_tokens: int) -> int:
    """What a run takes at its peak: weights, one layer's activations, kept blocks and logits. Measured peaks are near.

    Args:
        model: in its dtype; may be on the meta device.
        args: the script's, of which the lengths, the device and SparseD's settings count.
        prompt_tokens: with the chat template.
    """
    sizes, length = model.config.sizes, prompt_tokens + args.seq_len
    batch = 2 if getattr(args, "cfg_scale", 0) else 1
    mlp = MLP_ROWS[resolve_device(args.device).type] * sizes.mlp_width
    row = HELD_ROWS * sizes.width + 2 * sizes.kv_width + mlp
    logits = getattr(args, "block_length", args.seq_len) * sizes.vocabulary * (model.dtype.itemsize + SAMPLED)
    kept = 0 if args.config is None else _kept_bytes(sizes.layers, sizes.heads, prompt_tokens, args)
    return weight_bytes(model) + batch * (length * row * model.dtype.itemsize + logits + kept)


def _kept_bytes(layers: int, heads: int, prompt_tokens: int, args: argparse.Namespace) -> int:
    """The indices of all layers' kept blocks, and one layer's block scores."""
    grid = BlockGrid(prompt_tokens + args.seq_len, prompt_tokens, args.config.block_size)
    if grid.keeps_all(args.config.select):
        return 0
    kept = sum(share(args.config.select, part.stop - part.start) for part in grid.parts)
    return heads * grid.n_blocks * (layers * kept * INDEX + grid.n_blocks * SCORE)


def available_bytes(device: torch.device, *, spread: bool) -> int:
    """Bytes that are free on the device: a GPU's own, all GPUs' if a model may be spread, else the machine's."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    return sum(free_bytes(index) for index in (range(torch.cuda.device_count()) if spread else [device.index]))


def check_memory(model: DiffusionLM, args: argparse.Namespace, prompt_tokens: int) -> None:
    """Raise TooLittleMemory, which names the largest preset that fits, if the run needs more than is free."""
    device = resolve_device(args.device)
    free = available_bytes(device, spread=args.device == "auto")
    needed = peak_bytes(model, args, prompt_tokens)
    if needed <= free:
        return
    preset = _largest_preset(lambda tokens: peak_bytes(model, args, tokens) <= free)
    way = f"--prompt {preset} is the largest preset that fits"
    if preset is None:
        way = "no preset fits: try a shorter --seq_len, --dtype bfloat16, or a device with more memory"
    raise TooLittleMemory(
        f"{prompt_tokens} prompt tokens and {args.seq_len} new ones would take about {needed / GIB:.1f} GiB, "
        f"{weight_bytes(model) / GIB:.1f} GiB of it weights; {device} has {free / GIB:.1f} GiB free; {way}"
    )


def _largest_preset(fits: Callable[[int], bool]) -> str | None:
    """The name of the longest preset whose tokens fit; those of short_context are too few to count."""
    return next((name for name in reversed(PRESETS) if fits(LENGTHS.get(name, 0))), None)
