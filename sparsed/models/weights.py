"""The weights of a checkpoint: safetensors files, checked by their headers against the model, then read into it."""

import errno
import functools
import os
import re
from fnmatch import filter as matching
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .files import listing, read_json

WEIGHT_FILES = ["*.safetensors", "model.safetensors.index.json"]
# the weights first: other .bin files are a training's leftovers
PICKLES = ("pytorch_model*.bin", "*.bin", "*.pt", "*.pth", "*.ckpt")
# clones, because safetensors refuses tensors that share memory
CONVERT = (
    "import glob, torch, safetensors.torch as s; s.save_file({{name: tensor.contiguous().clone() "
    "for file in glob.glob('{pattern}') for name, tensor in "
    "torch.load(file, map_location='cpu', weights_only=True).items()}}, 'model.safetensors')"
)
STORED_DTYPES = ("BF16", "F16", "F32", "F64")
# what torch.compile, FSDP and checkpointing put inside of names, and what DataParallel, PEFT and others put before all
INNER_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
OUTER_WRAPPERS = ("module.", "base_model.model.", "model.")
# in names that the model does not have -> what such weights are, and what to do
STRANGERS = {
    r"\.lora_|\.base_layer\.|\.modules_to_save\.": "an adapter; merge it with PEFT (merge_and_unload) and save again",
    r"\.(qweight|qzeros|scales|g_idx|absmax|quant_\w+|SCB|weight_(scale|packed)\w*)\b": (
        "quantised weights; load the checkpoint that they were made from"
    ),
    r"\.experts\.": "a mixture of experts, which is not supported",
    r"vision|mm_projector": "a model that reads images, which is not supported",
}
LLAMA_NAMES = "LLaDA under Llama's names; load the published layout (model.transformer.blocks.N.q_proj.weight)"


class Stored(NamedTuple):
    """Where a tensor of the checkpoint lies, under which name, and what its header says."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def checked_weights(model: nn.Module, folder: Path, path: str | os.PathLike) -> dict[str, Stored]:
    """Where the model's tensors lie in the files of `folder`, by their names in the model, known from headers alone.

    What a wrapper put before the names is taken off where that leaves no doubt.

    Args:
        model: may be on the meta device.
        path: the folder, or the hub id that it is the download of.

    Raises:
        ValueError: one line; the files do not hold exactly the model's tensors, in its shapes and a float dtype.
    """
    stored = _unwrapped(_read_headers(_weight_files(folder, path)), set(model.state_dict()))
    _check_tensors(model, stored, folder)
    return stored


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
                    stored[name] = Stored(file, name, tuple(view.get_shape()), view.get_dtype())
        except (SafetensorError, OSError) as error:
            if getattr(error, "errno", None) == errno.ENOMEM:
                raise
            raise ValueError(
                f"{file} is not a whole safetensors file (cut off, or a Git LFS pointer?): {error}"
            ) from None
    return stored


def _unwrapped(stored: dict[str, Stored], known: set[str]) -> dict[str, Stored]:
    """The tensors by their names without what wrappers added to them."""
    names = {
        name: functools.reduce(lambda bare, wrapper: bare.replace(wrapper, ""), INNER_WRAPPERS, name) for name in stored
    }
    while names and not known & set(names.values()):
        shared = [outer for outer in OUTER_WRAPPERS if all(bare.startswith(outer) for bare in names.values())]
        if not shared:
            break
        names = {name: bare.removeprefix(shared[0]) for name, bare in names.items()}
    found: dict[str, Stored] = {}
    for name, bare in names.items():
        if bare in found:
            raise ValueError(f"{stored[name].file}: tensors '{name}' and '{found[bare].name}' are both '{bare}'")
        found[bare] = stored[name]
    return found


def _tied_names(model: nn.Module) -> list[list[str]]:
    """The names of each parameter; more than one where the head shares the embedding."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def _check_tensors(model: nn.Module, stored: dict[str, Stored], folder: Path) -> None:
    """Raise ValueError unless the files hold exactly the model's tensors, in the model's shapes and a float dtype."""
    groups = _tied_names(model)
    known = {name for names in groups for name in names}
    # some exports store the rotary frequencies, which the model computes
    extra = [name for name in stored if name not in known and not name.endswith("rotary_emb.inv_freq")]
    cause = _cause(extra, known)
    missing = [names[0] for names in groups if not any(name in stored for name in names)]
    if missing:
        raise ValueError(f"{folder}: the weights lack tensor '{missing[0]}'{_more(missing)}{cause}")
    if extra:
        first = stored[extra[0]].name
        raise ValueError(
            f"{folder}: the weights hold tensor '{first}', which config.json has no place for{_more(extra)}{cause}"
        )
    for name in known & stored.keys():
        file, own, shape, dtype = stored[name]
        wanted = tuple(model.get_parameter(name).shape)
        if dtype not in STORED_DTYPES:
            supported = f"supported are {', '.join(STORED_DTYPES)}; quantised weights are not"
            raise ValueError(f"{file}: tensor '{own}' has dtype {dtype}; {supported}")
        if shape != wanted:
            raise ValueError(f"{file}: tensor '{own}' has shape {list(shape)}, config.json asks for {list(wanted)}")


def _cause(extra: list[str], known: set[str]) -> str:
    """What tensors that the model does not have tell of the checkpoint, for the end of a line."""
    for pattern, what in STRANGERS.items():
        if stranger := next((name for name in extra if re.search(pattern, name)), None):
            return f"; '{stranger}' is of {what}"
    llama = "model.layers.0.self_attn.q_proj.weight"
    return f"; '{llama}' is of {LLAMA_NAMES}" if llama in extra else ""


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def fill(model: nn.Module, stored: dict[str, Stored], device: torch.device, part: int = 0) -> None:
    """Read every parameter onto the device.

    Args:
        part: which one of the stored tensors a process has where the model's are smaller.

    Raises:
        ValueError: the files hold two different tensors for one that config.json ties.
    """
    for names in _tied_names(model):
        name, *others = (name for name in names if name in stored)
        _check_equal(stored[name], [stored[other] for other in others])
        tensor = _read_tensor(stored[name], model.get_parameter(name), device, part)
        parameter = nn.Parameter(tensor, requires_grad=False)
        for tied in names:
            owner, _, leaf = tied.rpartition(".")
            setattr(model.get_submodule(owner), leaf, parameter)


def _check_equal(one: Stored, others: list[Stored]) -> None:
    for other in others:
        with safe_open(one.file, framework="pt") as shard, safe_open(other.file, framework="pt") as second:
            if not torch.equal(shard.get_tensor(one.name), second.get_tensor(other.name)):
                raise ValueError(
                    f"{other.file}: '{other.name}' differs from '{one.name}', to which config.json ties it"
                )


def _read_tensor(stored: Stored, like: Tensor, device: torch.device, part: int) -> Tensor:
    places = tuple(
        slice(None) if size == whole else slice(part * size, (part + 1) * size)
        for size, whole in zip(like.shape, stored.shape, strict=True)
    )
    # a mapping of its own for each tensor: pages of a mapped file count as this process's memory until it is closed,
    # and the copy makes the model independent of the file
    with safe_open(stored.file, framework="pt") as shard:
        source = shard.get_slice(stored.name)[places]
        return torch.empty(like.shape, dtype=like.dtype, device=device).copy_(source)
