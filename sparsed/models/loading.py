"""Loading a published checkpoint into the models of this package: safetensors only, no remote code, no pickle."""

import errno
import os
from fnmatch import filter as matching
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .common import DiffusionLM
from .dream import DreamConfig, DreamLayer, DreamModel
from .files import checkpoint_folder, listing, read_json
from .llada import LLaDABlock, LLaDAConfig, LLaDAModel

FAMILIES: dict[str, tuple[Any, Any]] = {"Dream": (DreamConfig, DreamModel), "llada": (LLaDAConfig, LLaDAModel)}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MODEL_FILES = ["config.json", "*.safetensors", "model.safetensors.index.json"]
# the weights first: other .bin files are a training's leftovers
PICKLES = ("pytorch_model*.bin", "*.bin", "*.pt", "*.pth", "*.ckpt")
# clones, for safetensors refuses tensors that share memory
CONVERT = (
    "import glob, torch, safetensors.torch as s; s.save_file({{name: tensor.contiguous().clone() "
    "for file in glob.glob('{pattern}') for name, tensor in "
    "torch.load(file, map_location='cpu', weights_only=True).items()}}, 'model.safetensors')"
)
STORED_DTYPES = ("BF16", "F16", "F32", "F64")
GIB = 2**30


class ModelTooLarge(ValueError, MemoryError):
    """The weights need more memory than the device has."""


class Stored(NamedTuple):
    """Where a tensor of the checkpoint lies, and what its header says."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def load_model(
    path: str | os.PathLike, *, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> DiffusionLM:
    """Load Dream or LLaDA from a folder in the hub's format or from a hub id, in evaluation mode, without gradients.

    Tensors go one at a time from the files to the target device and dtype, so that the host never holds much more
    than the model.

    Args:
        path: folder with config.json and model.safetensors (or its shards and index), or a hub id (owner/name).
        device: auto (cuda, else mps, else cpu), cuda, cuda:N, mps or cpu. With auto, a model larger than one GPU's
            free memory is spread over all GPUs.
        dtype: auto (bfloat16 on cuda, else float32), bfloat16, float16 or float32.

    Raises:
        ValueError: one line that names what is wrong with an argument or with a file.
        ModelTooLarge: a ValueError and MemoryError; the weights do not fit into the device's memory.
    """
    target = resolve_device(device)
    wanted = resolve_dtype(dtype, target)
    folder = checkpoint_folder(path, MODEL_FILES)
    model = empty_model(folder).to(wanted)
    stored = _read_headers(_weight_files(folder, path))
    _check_tensors(model, stored, folder)
    placement = _place(model, target, spread=str(device) == "auto")
    _fill(model, stored, placement)
    if len(placement) > 1:
        from accelerate import dispatch_model

        dispatch_model(model, placement)
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
    """The model that config.json describes, its parameters on the meta device: shapes without memory."""
    values = read_json(folder / "config.json")
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"{folder}: config.json has model_type {model_type!r}; supported are {', '.join(FAMILIES)}")
    config_class, model_class = FAMILIES[model_type]
    try:
        config = config_class.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    with torch.device("meta"), _SkipInit():
        return model_class(config)


class _SkipInit(TorchFunctionMode):
    """Skips torch.nn.init, which has nothing to fill on the meta device but would import sympy (1.4 s, 150 MB)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))


def _weight_files(folder: Path, path: str | os.PathLike) -> list[Path]:
    """The safetensors files of `folder`, which is `path` itself or the download of that hub id."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError(f"{path} has neither model.safetensors nor {index.name}{_pickle_advice(path)}")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index} must have a 'weight_map' from tensor names to shard file names")
    return [_shard_file(index, name) for name in sorted(set(shards.values()))]


def _shard_file(index: Path, name: str) -> Path:
    # names come from a downloaded file: they must not lead out of the folder
    if not name.endswith(".safetensors") or "/" in name or "\\" in name or ":" in name:
        raise ValueError(f"{index} names the shard {name!r}; it must be a .safetensors file in the same folder")
    if not (index.parent / name).is_file():
        raise ValueError(f"{index} names the shard {name}, which is not in the folder")
    return index.parent / name


def _pickle_advice(path: str | os.PathLike) -> str:
    names = listing(path)
    pattern = next((pattern for pattern in PICKLES if matching(names, pattern)), None)
    if pattern is None:
        return ""
    return (
        f"; {matching(names, pattern)[0]} is refused because unpickling can execute code, "
        f'convert it there, or in a downloaded copy: python -c "{CONVERT.format(pattern=pattern)}"'
    )


def _read_headers(files: list[Path]) -> dict[str, Stored]:
    stored: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():
                    if name in stored:
                        raise ValueError(f"{file}: tensor '{name}' is also in {stored[name].file.name}")
                    view = shard.get_slice(name)
                    stored[name] = Stored(file, tuple(view.get_shape()), view.get_dtype())
        except (SafetensorError, OSError) as error:
            if getattr(error, "errno", None) == errno.ENOMEM:
                raise
            raise ValueError(
                f"{file} is not a whole safetensors file (cut off, or a Git LFS pointer?): {error}"
            ) from None
    return stored


def _tied_names(model: nn.Module) -> list[list[str]]:
    """The names of each parameter; more than one where the head shares the embedding."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def _check_tensors(model: nn.Module, stored: dict[str, Stored], folder: Path) -> None:
    """Raise ValueError unless the files hold exactly the model's tensors, in the model's shapes and a float dtype."""
    groups = _tied_names(model)
    missing = [names[0] for names in groups if not any(name in stored for name in names)]
    if missing:
        raise ValueError(f"{folder}: the weights lack tensor '{missing[0]}'{_more(missing)}")
    known = {name for names in groups for name in names}
    # some exports store the rotary frequencies, which the model computes
    extra = [name for name in stored if name not in known and not name.endswith("rotary_emb.inv_freq")]
    if extra:
        raise ValueError(
            f"{folder}: the weights hold tensor '{extra[0]}', which config.json has no place for{_more(extra)}"
        )
    for name in known & stored.keys():
        file, shape, dtype = stored[name]
        wanted = tuple(model.get_parameter(name).shape)
        if shape != wanted:
            raise ValueError(f"{file}: tensor '{name}' has shape {list(shape)}, config.json asks for {list(wanted)}")
        if dtype not in STORED_DTYPES:
            raise ValueError(f"{file}: tensor '{name}' has dtype {dtype}; supported are {', '.join(STORED_DTYPES)}")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _fill(model: nn.Module, stored: dict[str, Stored], placement: dict[str, torch.device]) -> None:
    """Put every parameter on the device of the longest module name in `placement` that contains it."""
    for names in _tied_names(model):
        name = next(name for name in names if name in stored)
        module = max((key for key in placement if f"{name}.".startswith(f"{key}." if key else "")), key=len)
        tensor = _read_tensor(stored[name].file, name, placement[module], model.get_parameter(name).dtype)
        parameter = nn.Parameter(tensor, requires_grad=False)
        for tied in names:
            owner, _, leaf = tied.rpartition(".")
            setattr(model.get_submodule(owner), leaf, parameter)


def _read_tensor(file: Path, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    # a mapping of its own for each tensor: pages of a mapped file count as this process's memory until it is closed,
    # and the copy makes the model independent of the file
    with safe_open(file, framework="pt") as shard:
        source = shard.get_tensor(name)
        return torch.empty(source.shape, dtype=dtype, device=device).copy_(source)


def _place(model: nn.Module, target: torch.device, *, spread: bool) -> dict[str, torch.device]:
    """Device of each module: all on `target`, or spread over the GPUs if the model does not fit there."""
    needed = weight_bytes(model)
    if target.type == "cpu" and needed > (memory := psutil.virtual_memory().total):
        raise ModelTooLarge(
            f"this machine has {memory / GIB:.1f} GiB of memory, the weights need {needed / GIB:.1f} GiB"
        )
    if target.type != "cuda":
        return {"": target}
    free = {index: free_bytes(index) for index in range(torch.cuda.device_count())}
    if needed <= free[target.index]:
        return {"": target}
    if not spread or len(free) == 1:
        raise ModelTooLarge(
            f"device {target} has {free[target.index] / GIB:.1f} GiB free, the weights need {needed / GIB:.1f} GiB; "
            "use device auto with more GPUs, a smaller dtype, or device cpu"
        )
    return plan_placement(model, {index: int(0.9 * size) for index, size in free.items()})


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters in their dtype; of one on the meta device, what it would take."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def free_bytes(index: int) -> int:
    """Bytes that this process can still have of a GPU's memory."""
    unused = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
    return torch.cuda.mem_get_info(index)[0] + unused


def plan_placement(model: nn.Module, max_memory: dict[int, int]) -> dict[str, torch.device]:
    """Spread a model over GPUs, whole layers at a time and evenly where it can.

    Args:
        model: may be on the meta device; its parameters' dtype counts.
        max_memory: bytes for weights on each GPU, by index.

    Returns:
        Module name -> device, for `accelerate.dispatch_model`.

    Raises:
        ModelTooLarge: the GPUs together are too small.
    """
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    layers = [DreamLayer.__name__, LLaDABlock.__name__]
    balanced = get_balanced_memory(model, max_memory=dict(max_memory), no_split_module_classes=layers)
    for budget in (balanced, max_memory):
        placement = infer_auto_device_map(model, max_memory=dict(budget), no_split_module_classes=layers)
        if set(placement.values()) <= set(max_memory):
            return {name: torch.device("cuda", index) for name, index in placement.items()}
    raise ModelTooLarge(
        f"the model does not fit into the {sum(max_memory.values()) / GIB:.1f} GiB "
        f"that {len(max_memory)} GPUs have free; use a smaller dtype or device cpu"
    )
