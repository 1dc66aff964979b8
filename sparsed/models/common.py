"""What Dream and LLaDA share: configuration checks, RMSNorm, rotary tables, full attention, the choice of rows."""

import json
import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields
from reprlib import repr as shown
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..kernels import add_rms_norm, full_attention, rms_norm

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
# far above any model: a larger number in a config.json is a mistake, and would overflow
LARGEST = 10**9
# every layer is built, if without memory, before the weights' headers can show that they are not there
MOST_LAYERS = 1000


class Sizes(NamedTuple):
    """What a model's memory depends on beside its weights, under the same names for both families."""

    layers: int
    heads: int
    width: int
    kv_width: int
    mlp_width: int
    vocabulary: int


def config_from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
    """Build the config dataclass `cls` from the dict of a published config.json, ignoring keys the forward never reads.

    A key without a default must be there; whole numbers, numbers and flags are checked by the field's annotation.
    `special_ids` has looked elsewhere for the ids that config.json does not name.

    Raises:
        ValueError: a required key is missing or a value has the wrong kind or range (the line names the key).
    """
    taken = {}
    for field in fields(cls):
        if field.name in values and values[field.name] is not None:
            taken[field.name] = _checked(field.name, values[field.name], field.type)
        elif field.default is MISSING:
            raise ValueError(f"config.json has no '{field.name}', which a {cls.__name__} needs")
    return cls(**taken)


def _checked(name: str, value: Any, kind: Any) -> Any:
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"config.json: '{name}' must be true or false, got {shown(value)}")
    elif kind in (int, int | None):
        lowest = 0 if name.endswith("token_id") else 1
        highest = MOST_LAYERS if name.endswith("layers") else LARGEST
        if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
            wanted = f"a whole number from {lowest} to {highest}"
            raise ValueError(f"config.json: '{name}' must be {wanted}, got {shown(value)}")
    elif kind is float:
        largest = sys.float_info.max  # which a whole number in JSON may exceed
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= largest:
            wanted = f"a positive number of at most {largest:.1e}"
            raise ValueError(f"config.json: '{name}' must be {wanted}, got {shown(value)}")
        return float(value)
    return value


def check_supported(values: dict[str, Any], supported: Mapping[str, Any]) -> None:
    """Raise ValueError if config.json asks for another network than the one that the forward computes.

    Args:
        supported: key -> the value that it must have where it is there.
    """
    for key, wanted in supported.items():
        if values.get(key, wanted) != wanted:
            raise ValueError(f"config.json: '{key}' must be {json.dumps(wanted)}, got {shown(values[key])}")


def with_plain_rope(values: dict[str, Any]) -> dict[str, Any]:
    """config.json's dict with 'rope_theta' at its top; transformers 5 saves it inside 'rope_parameters'.

    Raises:
        ValueError: scaled or partial rotary embeddings, which would be ignored, or two thetas.
    """
    for key in ("rope_scaling", "rope_parameters"):
        rope = {} if values.get(key) is None else values[key]
        if not isinstance(rope, dict):
            raise ValueError(f"config.json: '{key}' must be null or an object, got {shown(rope)}")
        for name, value in rope.items():
            # some copies say linear, by a factor of one
            plain = ("default", "linear") if name in ("type", "rope_type") else (None, 1)
            if name != "rope_theta" and value not in plain:
                advice = (
                    "only plain rotary embeddings are computed; where the weights were made for those, set it to null"
                )
                raise ValueError(f"config.json: '{key}' has '{name}' {shown(value)}; {advice}")
        theta = rope.get("rope_theta")
        if theta is not None and values.get("rope_theta") not in (None, theta):
            raise ValueError(f"config.json: 'rope_theta' is {shown(values['rope_theta'])}, in '{key}' {shown(theta)}")
        if theta is not None:
            values = {**values, "rope_theta": theta}
    return values


def check_heads(name: str, width: int, heads: int, kv_heads: int) -> None:
    """Raise ValueError unless `heads` divide `width` into even head sizes and `kv_heads` divide `heads`."""
    if width % heads or (width // heads) % 2:
        raise ValueError(f"config.json: {heads} attention heads do not divide {name} {width} into heads of even size")
    if heads % kv_heads:
        raise ValueError(f"config.json: {kv_heads} key-value heads do not divide {heads} attention heads")


def check_special_ids(config: Any, *names: str) -> None:
    """Raise ValueError if a special token's id, where there is one, lies outside the vocabulary."""
    for name in names:
        if (getattr(config, name) or 0) >= config.vocab_size:
            raise ValueError(
                f"config.json: '{name}' {getattr(config, name)} is outside the vocabulary of {config.vocab_size} ids"
            )


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight: of x, or of x + update, which is then returned along with it."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, update: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if update is None:
            return rms_norm(x, self.weight, self.eps)
        return add_rms_norm(x, update, self.weight, self.eps)


def rope_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, float32.

    Args:
        positions: [..., T] integer token positions.

    Returns:
        cos, sin: [..., T, head_dim], the two halves of the last dimension equal (half-split rotation).
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    # elementwise, not a matmul: TF32 would damage large angles
    angles = positions[..., None].float() * (1.0 / theta**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def attend(q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor | None = None) -> Tensor:
    """Full bidirectional attention, `kernels.full_attention` without its log-sum-exp."""
    return full_attention(q, k, v, key_valid)[0]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, heads * D] -> [B, heads, T, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, heads, T, D] -> [B, T, heads * D]."""
    return x.transpose(1, 2).flatten(2)


def check_first_row(first_row: int, length: int) -> None:
    """Raise ValueError unless a sequence of `length` tokens has that row."""
    if not 0 <= first_row < length:
        raise ValueError(f"first_row must be one of the sequence's {length} rows, got {first_row}")


def take_rows(hidden: Tensor, rows: Tensor | None, length: int) -> Tensor:
    """The rows whose logits are wanted, of hidden [B, n, width], the last n of `length` tokens.

    Args:
        rows: [m] int64 flat positions b * length + t, none before the last n tokens; None for all.

    Returns:
        [B, n, width], or [m, width].
    """
    if rows is None:
        return hidden
    rows = rows.to(hidden.device)
    first = length - hidden.shape[1]
    return hidden.flatten(0, 1)[rows - (rows // length + 1) * first]


class DiffusionLM(nn.Module):
    """Base of both families: where the weights live and in which dtype."""

    family: str
    config: Any

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype
