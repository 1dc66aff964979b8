"""Writes checkpoints in the hub's format, and holds what the loading tests share."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparsed.models import DreamModel, LLaDAModel, load_model
from tests.helpers.standins import DREAM, LLADA, tiny_dream, tiny_llada

FAMILIES = {"dream": (DREAM, DreamModel, tiny_dream), "llada": (LLADA, LLaDAModel, tiny_llada)}


def published_weights(family: str) -> dict[str, torch.Tensor]:
    """Random bf16 weights of a tiny model."""
    return {name: tensor.bfloat16() for name, tensor in FAMILIES[family][2]().state_dict().items()}


def write_checkpoint(folder: Path, config: dict, weights: dict[str, torch.Tensor], shards: int = 1) -> Path:
    """config.json and model.safetensors, or that many shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name].contiguous() for name in list(weights)[i::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def tiny_checkpoint(folder: Path, family: str, shards: int = 1) -> Path:
    return write_checkpoint(folder, FAMILIES[family][0], published_weights(family), shards)


def refused(path, *named, **options):
    """load_model must fail with one line that holds every one of `named`."""
    with pytest.raises(ValueError) as caught:
        load_model(path, **({"device": "cpu"} | options))
    message = str(caught.value)
    assert "\n" not in message
    for part in named:
        assert part in message, message
