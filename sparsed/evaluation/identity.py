"""Digests that tell a checkpoint, or a file of tasks, from another one of the same name."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

# a parameter's elements that are summed at once, each of 8 bytes then
SUMMED = 1 << 24
WHOLE_NUMBERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of every parameter's name, shape and sum of its bits as whole numbers, the same on every device.

    It takes a pass over the memory, where a digest of the files would take a minute for 16 GB.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        bits = parameter.detach().flatten().view(WHOLE_NUMBERS[parameter.element_size()])
        total = sum(int(part.sum(dtype=torch.int64)) for part in bits.split(SUMMED))
        digest.update(f"{name} {list(parameter.shape)} {total}\n".encode())
    return digest.hexdigest()


def files_digest(files: Iterable[Path]) -> str:
    """SHA-256 of the names and contents of those of the files that exist."""
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            content = file.read_bytes()
            digest.update(f"{file.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()
