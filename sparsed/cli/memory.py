"""How much memory a run will take, known before the weights are loaded, and how much there is."""

from dataclasses import replace
from functools import partial
from itertools import islice
from math import ceil

import psutil
import torch

from ..blocks import BlockGrid
from ..config import SparseDConfig, ceil_share
from ..console.endings import TooLittleMemory
from ..models.common import CHUNK, DiffusionLM, Sizes
from ..models.loading import GIB, free_bytes, other_gpus, resolve_device, weight_bytes
from ..models.parallel import part_of
from ..prompts import LENGTHS, PRESETS
from ..ranks import Ranks
from ..sampling import Settings
from .arguments import Call

# rows as wide as all queries that a layer holds in its attention, apart from its input, keys and values: the queries,
# and the queries rotated or the attention
QUERY_ROWS = 2
# rows as wide as the model that it holds in its MLP: its input and the attention; and of the tokens that the MLP
# computes at once, their sum and that sum normed
MLP_HELD_ROWS, MLP_CHUNK_ROWS = 2, 2
# rows as wide as the MLP: gate, up and their product; plain torch holds the gate's silu too
MLP_ROWS = {"cuda": 3, "cpu": 4, "mps": 4}
# bytes that the sampler makes of a logit: float32, and its softmax
SAMPLED = 8
# bytes of a block score and of a kept block's index
SCORE = INDEX = 4


def peak_bytes(
    model: DiffusionLM, sampler: Settings, config: SparseDConfig | None, device: torch.device, prompt_tokens: int
) -> int:
    """What a run takes at its peak: weights, one layer's activations, kept blocks, a cache's keys and values, logits.

    Measured peaks are near.

    Args:
        model: in its dtype; may be on the meta device. Of one that processes share, it is what each of them takes.
        config: SparseD's settings, None for full attention.
        device: where the run will be.
        prompt_tokens: with the chat template.
    """
    sizes, length, itemsize = model.sizes, prompt_tokens + sampler.gen_length, model.dtype.itemsize
    batch = sampler.sequences
    logits = batch * sampler.most_rows * sizes.vocabulary
    layer = itemsize * _layer(sizes, model.config.head_dim, batch * length, MLP_ROWS[device.type])
    head = itemsize * batch * length * sizes.width + logits * (itemsize + SAMPLED)
    # a window size's CUDA graph keeps its logits: a block's and the answer's, or with prefix one per block
    graphs = {"none": 0, "dual": 2, "prefix": sampler.blocks or 1}[sampler.cache] if device.type == "cuda" else 0
    kept = 0
    if config is not None:
        grid = BlockGrid(length, prompt_tokens, config.block_size)
        if not grid.keeps_all(config.select):  # indices of all layers, scores of one
            each = sum(ceil_share(config.select, part.stop - part.start) for part in grid.parts)
            kept = sizes.heads * grid.n_blocks * (sizes.layers * each * INDEX + grid.n_blocks * SCORE)
    cached = 2 * sizes.layers * length * sizes.kv_width * itemsize if sampler.cached else 0
    # the first forward of all rows fills the cache layer by layer, and its last layer computes few rows: where there is
    # no second one, the cache lacks that layer when the others are at their peak
    lacks = cached // sizes.layers if sampler.cached and sampler.refreshes(sampler.blocks or 1) == 1 else 0
    at_once = max(layer - batch * lacks, head)
    return weight_bytes(model) + at_once + graphs * logits * itemsize + batch * (kept + cached)


def _layer(sizes: Sizes, head_dim: int, tokens: int, mlp_rows: int) -> int:
    """Numbers that a layer holds of `tokens` tokens of all batch rows at its peak: in its attention or in its MLP."""
    attention = tokens * (sizes.width + QUERY_ROWS * sizes.heads * head_dim + 2 * sizes.kv_width)
    at_once = ceil(tokens / ceil(tokens / CHUNK))
    computed = tokens - at_once  # by the chunks before the last
    inner = at_once * (MLP_CHUNK_ROWS * sizes.width + mlp_rows * sizes.mlp_width)
    joined = (MLP_HELD_ROWS + 2) * tokens * sizes.width if computed else 0  # the chunks, and what they are joined in
    return max(attention, (MLP_HELD_ROWS * tokens + computed) * sizes.width + inner, joined)


def available_bytes(device: torch.device) -> int:
    """Bytes that are free on the device: a GPU's own, else the machine's."""
    return free_bytes(device.index) if device.type == "cuda" else psutil.virtual_memory().available


def free_for_all(ranks: Ranks, device: torch.device) -> int:
    """Bytes that every one of the processes which share a model has free."""
    free = available_bytes(device)
    return min(ranks.gathered(free if device.type == "cuda" else free // ranks.count))


def check_memory(outline: DiffusionLM, ranks: Ranks, args: Call, prompt_tokens: int) -> None:
    """Raise TooLittleMemory, which says what would fit, if the run needs more than is free.

    Args:
        outline: the whole model, on the meta device.
        ranks: the processes that will share it.
    """
    device = resolve_device(args.device)
    free = free_for_all(ranks, device)
    part = part_of(outline, ranks.count)

    def peak(model: DiffusionLM, sampler: Settings = args.sampler, tokens: int = prompt_tokens) -> int:
        return peak_bytes(model, sampler, None if args.origin else args.config, device, tokens)

    needed = peak(part)
    if needed <= free:
        return

    def elsewhere(tokens: int) -> str | None:
        return other_gpus(outline, partial(peak, tokens=tokens), ranks.count) if device.type == "cuda" else None

    ways = [gpus] if (gpus := elsewhere(prompt_tokens)) else []
    # the largest first; the tokens of short_context are too few to count
    presets = [(preset, LENGTHS.get(preset, 0)) for preset in reversed(PRESETS)]
    if fitting := [preset for preset, tokens in presets if peak(part, tokens=tokens) <= free]:
        ways.append(f"--prompt {fitting[0]} is the largest preset that fits")
    elif not ways:
        shorter = (f"{gpus}, with --prompt {preset}" for preset, tokens in presets if (gpus := elsewhere(tokens)))
        ways.extend(islice(shorter, 1))
    if args.sampler.cached and peak(part, replace(args.sampler, cache="none", refresh=None)) <= free:
        ways.append("without --cache it fits")
    way = "; ".join(ways) or "no preset fits: try a shorter --seq_len, --dtype bfloat16, or a device with more memory"
    each = f" in each of {ranks.count} processes" if ranks.count > 1 else ""
    raise TooLittleMemory(
        f"{prompt_tokens} prompt tokens and {args.sampler.gen_length} new ones would take about {needed / GIB:.1f} "
        f"GiB{each}, {weight_bytes(part) / GIB:.1f} GiB of it weights; {device} has {free / GIB:.1f} GiB free; {way}"
    )
