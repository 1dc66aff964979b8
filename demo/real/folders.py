"""Checkpoint folders: their weights in float32, and how they are written."""

import argparse
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sparsed.console.files import replacing, write_json
from sparsed.console.readers import path, shown
from sparsed.models import load_model
from sparsed.models.loading import DTYPES
from sparsed.models.tokenizer import TOKENIZER_FILES


def folder(word: str) -> Path:
    """A reader of existing folders."""
    found = path(word)
    if not found.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {shown(word)}")
    return found


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Name -> float32 tensor; a tensor that two names share appears once. The errors are those of `load_model`."""
    model = load_model(folder, device="cpu", dtype="float32")
    return {name: weight.detach() for name, weight in model.named_parameters()}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it is; `load_model` has checked it."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def write_checkpoint(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write config.json, and model.safetensors in its `torch_dtype`; each is there whole or not at all."""
    dtype = DTYPES.get(str(config.get("torch_dtype")), torch.float32)
    stored = {name: weight.detach().to("cpu", dtype).contiguous() for name, weight in weights.items()}
    write_tensors(folder / "model.safetensors", stored, {"format": "pt"})
    write_json(folder / "config.json", dict(config))


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, whole or not at all."""
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer's files, as they are."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def digest(weights: Mapping[str, Tensor]) -> str:
    """A digest that depends only on the float32 weights, not on the file that holds them."""
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode())
        found.update(weights[name].to(torch.float32).contiguous().numpy().data)
    return found.hexdigest()
