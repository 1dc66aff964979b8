"""Digests that tell a checkpoint, or a file of tasks, from another one of the same name."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

# elements of a parameter that are summed at once, in 8 bytes each
SUMMED = 1 << 24
SHOWN = 16  # hexadecimal digits of a digest
WHOLE_NUMBERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights_digest(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Digest of every parameter's name, shape and bits, the same on every device.

    The bits count as sums of whole numbers, each times its place. That is one pass over the memory; a digest of the
    files would take a minute for 16 GB.
    """
    digest = hashlib.sha256()
    for name, parameter in parameters:
        bits = parameter.detach().flatten().view(WHOLE_NUMBERS[parameter.element_size()])
        # times 1, 2, 3, ...
        sums = [int((part * torch.arange(1, len(part) + 1, device=part.device)).sum()) for part in bits.split(SUMMED)]
        digest.update(f"{name} {list(parameter.shape)} {sums}\n".encode())
    return digest.hexdigest()[:SHOWN]


def files_digest(files: Iterable[Path]) -> str:
    """Digest of the names and contents of those of the files that exist."""
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            content = file.read_bytes()
            digest.update(f"{file.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:SHOWN]
