"""Loading a published checkpoint into the models of this package: safetensors only, no remote code, no pickle."""

import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.overrides import TorchFunctionMode

from ..ranks import Ranks
from .common import DiffusionLM
from .description import DESCRIPTION_FILES, read_config
from .dream import DreamConfig, DreamModel
from .files import checkpoint_folder
from .illada import ILLaDAConfig, ILLaDAModel
from .joint import lay_projections_together
from .llada import LLaDAConfig, LLaDAModel
from .parallel import check_count, dividing_counts, part_of, shard
from .special_ids import with_special_ids
from .weights import WEIGHT_FILES, checked_weights, fill

# by config.json's model_type
MODELS: dict[str, tuple[Any, Any]] = {
    "Dream": (DreamConfig, DreamModel),
    "llada": (LLaDAConfig, LLaDAModel),
    "illada": (ILLaDAConfig, ILLaDAModel),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
GIB = 2**30


class ModelTooLarge(ValueError, MemoryError):
    """The weights need more memory than the device has: how much, then what would help."""

    def __str__(self) -> str:
        return "; ".join(self.args)


def load_model(
    path: str | os.PathLike,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    tensor_parallel: "dist.ProcessGroup | None" = None,
) -> DiffusionLM:
    """Load Dream or LLaDA from a folder in the hub's format or from a hub id, in evaluation mode, without gradients.

    Tensors go one at a time from the files to the target device and dtype, so that the host never holds much more
    than the model.

    Args:
        path: folder with config.json and model.safetensors (or its shards and index), or a hub id (owner/name).
        device: auto (cuda, else mps, else cpu), cuda, cuda:N, mps or cpu.
        dtype: auto (bfloat16 on cuda, else float32), bfloat16, float16 or float32.
        tensor_parallel: the processes that share the model by heads, each on a device of its own; every one of them
            makes this call, reads its part of the weights, and then makes the same calls of the model and the samplers.

    Raises:
        ValueError: one line that names what is wrong with an argument or with a file, or which numbers of processes
            divide the model's heads.
        ModelTooLarge: a ValueError and MemoryError; the weights do not fit into the device's memory. Its line says
            which other GPU, or how many of them together, would hold them, unless other processes use these.
    """
    target = resolve_device(device)
    wanted = resolve_dtype(dtype, target)
    # what is refused by its description costs no download of weights
    model = empty_model(checkpoint_folder(path, DESCRIPTION_FILES)).to(wanted)
    ranks = Ranks(tensor_parallel)
    check_count(model, ranks.count)
    stored = checked_weights(model, checkpoint_folder(path, WEIGHT_FILES), path)
    _check_room(model, target, ranks.count)
    shard(model, ranks)
    fill(model, stored, target, ranks.index)
    if target.type == "cuda":
        lay_projections_together(model)
        torch.cuda.empty_cache()  # where they lay before
    return model.eval()


def resolve_device(device: str | torch.device) -> torch.device:
    """The torch.device that a device argument means on this machine; ValueError if there is none."""
    if str(device) == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type not in ("cuda", "mps", "cpu"):
        raise ValueError(f"device must be auto, cuda, cuda:N, mps or cpu, got {str(device)!r}")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device mps: PyTorch finds no Apple GPU on this machine; use auto or cpu")
    return _resolve_cuda(found) if found.type == "cuda" else found


def _resolve_cuda(device: torch.device) -> torch.device:
    if not torch.cuda.is_available():
        raise ValueError(f"device {device}: PyTorch finds no CUDA GPU on this machine; use auto or cpu")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(f"device {device}: this machine has {torch.cuda.device_count()} CUDA GPUs, counted from 0")
    return torch.device("cuda", index)


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The torch.dtype that a dtype argument means on `device`; ValueError if it is not one of the supported three."""
    if isinstance(dtype, str) and dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, got {str(dtype)!r}")
    return found


def empty_model(folder: Path) -> DiffusionLM:
    """The model that a folder's config.json describes, its parameters on the meta device: shapes without memory.

    Its config has the special ids that any file of the folder names.

    Raises:
        ValueError: one line that names the file and what in it is missing, wrong or not supported.
    """
    values = read_config(folder)
    config_class, model_class = _classes(folder, values)
    try:
        names = [field.name for field in fields(config_class)]
        config = config_class.from_dict(with_special_ids(values, folder, names))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    with torch.device("meta"), _SkipInit():
        return model_class(config)


def model_family(path: str | os.PathLike) -> str:
    """Whose sampler a checkpoint takes, "dream" or "llada"; the errors are those of `empty_model`."""
    folder = checkpoint_folder(path, DESCRIPTION_FILES)
    return _classes(folder, read_config(folder))[1].family


def _classes(folder: Path, values: dict[str, Any]) -> tuple[Any, Any]:
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODELS:
        raise ValueError(f"{folder}: config.json has model_type {model_type!r}; supported are {', '.join(MODELS)}")
    return MODELS[model_type]


class _SkipInit(TorchFunctionMode):
    """Skips torch.nn.init, which has nothing to fill on the meta device but would import sympy (1.4 s, 150 MB)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))


def _check_room(model: DiffusionLM, target: torch.device, count: int) -> None:
    """Raise ModelTooLarge if the device is too small for what each of `count` processes has of a whole model."""
    needed = weight_bytes(part_of(model, count))
    if target.type == "cpu" and needed > (memory := psutil.virtual_memory().total):
        raise ModelTooLarge(
            f"this machine has {memory / GIB:.1f} GiB of memory, the weights need {needed / GIB:.1f} GiB"
        )
    if target.type == "cuda" and needed > (free := free_bytes(target.index)):
        if count == 1 and _among_several():
            way = "use a smaller dtype, or device cpu"
        else:
            way = other_gpus(model, weight_bytes, count) or "use more GPUs, a smaller dtype, or device cpu"
        raise ModelTooLarge(
            f"device {target} has {free / GIB:.1f} GiB free, the weights need {needed / GIB:.1f} GiB", way
        )


def _among_several() -> bool:
    """Whether other processes run with this one: other GPUs are theirs."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def other_gpus(model: DiffusionLM, needed: Callable[[DiffusionLM], int], count: int) -> str | None:
    """The GPUs of this machine that hold what `count` of them do not, in words; None if it has too few.

    Args:
        model: whole, on the meta device.
        needed: bytes that a process takes which has this part of it.
    """
    free = [free_bytes(index) for index in range(torch.cuda.device_count())]
    if count == 1 and needed(model) <= max(free):
        return f"it fits on cuda:{free.index(max(free))}"
    for more in dividing_counts(model):
        if count < more <= len(free) and needed(part_of(model, more)) <= min(free[:more]):
            return f"{more} GPUs can share it: torchrun --nproc_per_node {more}"
    return None


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters in their dtype; of one on the meta device, what it would take."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def free_bytes(index: int) -> int:
    """Bytes that this process can still have of a GPU's memory."""
    unused = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
    return torch.cuda.mem_get_info(index)[0] + unused
