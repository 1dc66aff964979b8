"""What Dream and LLaDA share: configuration checks, RMSNorm, rotary tables, full attention, the choice of rows."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from reprlib import repr as shown
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..kernels import add_rms_norm, full_attention, full_attention_kernel, rms_norm, rotate
from ..ranks import ALONE, Ranks
from .cache import KVCache
from .joint import projections
from .rows import Rows

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
# far above any model: a larger number in a config.json is a mistake, and would overflow
LARGEST = 10**9
# every layer is built, if without memory, before the weights' headers can show that they are not there
MOST_LAYERS = 1000
# tokens, of all batch rows, that a layer's MLP computes at once: enough to fill a GPU
CHUNK = 16384


class Sizes(NamedTuple):
    """What a model's memory depends on apart from its weights, under the same names for both families."""

    layers: int
    heads: int
    width: int
    kv_width: int
    mlp_width: int
    vocabulary: int

    def shared_by(self, count: int) -> "Sizes":
        """Those of the part that each of `count` processes has."""
        heads, kv_width, mlp_width = self.heads // count, self.kv_width // count, self.mlp_width // count
        return self._replace(heads=heads, kv_width=kv_width, mlp_width=mlp_width)


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


class ForwardContext(NamedTuple):
    """What the layers of one forward share.

    Args:
        rows: the tokens that are computed.
        rope: cosines and sines of their positions.
        key_valid: bool [B, T], the keys that are no padding; None if all are.
        cache: where the other tokens' keys and values are; None where all tokens are computed.
        first_row: in the last layer, tokens before it serve as keys only.
    """

    rows: Rows
    rope: tuple[Tensor, Tensor]
    key_valid: Tensor | None
    cache: KVCache | None
    first_row: int

    def through(self, layers: Iterable[nn.Module], x: Tensor) -> Tensor:
        """x [B, n, width], the computed tokens, through all layers; in the last from `first_row` on."""
        *others, last = layers
        for index, layer in enumerate(others):
            x = layer(x, self, index, 0)
        return last(x, self, len(others), self.first_row - self.rows.start)

    def attended(self, module: Any, layer: int, x: Tensor, first: int) -> Tensor:
        """Attention of the computed tokens from the `first` on over all tokens, by the module's projections and seam.

        Args:
            x: [B, n, width], normed.

        Returns:
            [B, n - first, Hq * D].
        """
        projected = projections(x, first, module.q_proj, module.k_proj, module.v_proj)
        q, k, v = map(split_heads, projected, (module.heads, module.kv_heads, module.kv_heads))
        del x, projected  # at long lengths every one of them counts
        q = rotate(q, *(table[..., first:, :] for table in self.rope))
        if self.cache is None:
            k = rotate(k, *self.rope)
        else:
            k, v = self.cache.update(layer, self.rows, k, v, self.rope)
        return merge_heads(module.attend(q, k, v, self.key_valid, self.rows.start + first))


def in_chunks(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """function(*tensors), computed for at most `CHUNK` tokens at a time; long sequences take less memory so.

    Args:
        function: treats every token by itself.
        tensors: [B, n, width] each, as is the result.
    """
    count = -(-tensors[0].shape[0] * tensors[0].shape[1] // CHUNK)
    if count <= 1:
        return function(*tensors)
    return torch.cat([function(*parts) for parts in zip(*(x.chunk(count, dim=1) for x in tensors), strict=True)], dim=1)


def attend(q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor | None = None) -> Tensor:
    """Full bidirectional attention, `kernels.full_attention` without its log-sum-exp."""
    return full_attention(q, k, v, key_valid)[0]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, heads * D] -> [B, heads, T, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, heads, T, D] -> [B, T, heads * D]."""
    return x.transpose(1, 2).flatten(2)


def take_rows(hidden: Tensor, rows: Tensor | None, slots: Tensor, length: int) -> Tensor:
    """The rows whose logits are wanted, of hidden [B, n, width], the tokens at the last n of `slots`, of `length`.

    Args:
        rows: [m] int64 flat positions b * length + t, none of other tokens; None for all.
        slots: int64, one after the other.

    Returns:
        [B, n, width], or [m, width].
    """
    if rows is None:
        return hidden
    return hidden.flatten(0, 1)[rows - slots[-hidden.shape[1]] - rows // length * (length - hidden.shape[1])]


def _check_mask(mask: Tensor | None, length: int, batch: int | None = None) -> None:
    """Raise ValueError unless the mask is of sequences of `length` tokens, and of `batch` of them if that is given."""
    if mask is not None and (mask.shape[1] != length or batch not in (None, len(mask))):
        wanted = f"{'batch' if batch is None else batch}, {length}"
        raise ValueError(f"attention_mask must be [{wanted}], that of the whole sequences, got {list(mask.shape)}")


class DiffusionLM(nn.Module):
    """Base of both families: where the weights live and in which dtype.

    Attributes:
        config: of the whole model.
        ranks: the processes that share it by heads; this one has its part of every layer.
    """

    family: str
    config: Any
    ranks: Ranks = ALONE

    @property
    def sizes(self) -> Sizes:
        """Those of this process's part."""
        sizes: Sizes = self.config.sizes
        return sizes.shared_by(self.ranks.count)

    def positions(self, length: int, device: torch.device, attention_mask: Tensor | None) -> Tensor:
        """By which the tokens of sequences [B, length] are rotated, int64 [B or 1, length]; the mask is [B, length]."""
        raise NotImplementedError

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions [B or 1, n], as the layers take them: [B or 1, 1, n, D]."""
        raise NotImplementedError

    def rows(self, start: int, stop: int, length: int, attention_mask: Tensor | None) -> Rows:
        """The tokens `start` ... `stop` - 1 of sequences of `length` tokens, for `forward`.

        Args:
            attention_mask: of the whole sequences, [B, length], 1 = real, 0 = left padding; None if all are real.

        Raises:
            ValueError: the window is empty or reaches past the sequence, or the mask is of other sequences.
        """
        _check_mask(attention_mask, length)
        return Rows.of(start, stop, self.positions(length, self.device, attention_mask))

    def attention_kernel(self, batch: int, queries: int, keys: int, padded: bool = False) -> str:
        """Which kernel computes full attention of `queries` tokens over `keys`: one of `kernels.full_attention`'s."""
        sizes, weight = self.sizes, next(self.parameters())
        head_dim = self.config.head_dim
        q, k = (
            weight.new_empty(()).expand(batch, heads, tokens, head_dim)
            for heads, tokens in ((sizes.heads, queries), (sizes.kv_width // head_dim, keys))
        )
        return full_attention_kernel(q, k, k, padded)

    def kv_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for sequences [batch, length]."""
        sizes, head_dim = self.sizes, self.config.head_dim
        return KVCache(sizes.layers, batch, sizes.kv_width // head_dim, length, head_dim, self.dtype)

    def given(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        rows: Rows | None,
        cache: KVCache | None,
        first_row: int | None,
    ) -> ForwardContext:
        """What the layers share, checked; without `rows` all of the sequence is computed.

        Raises:
            ValueError: rows, ids, mask, cache and first_row do not fit each other.
        """
        batch, computed = input_ids.shape
        _check_mask(attention_mask, computed if rows is None else rows.length, batch)
        if rows is None:
            rows = Rows.of(0, computed, self.positions(computed, input_ids.device, attention_mask))
        if rows.stop - rows.start != computed:
            raise ValueError(f"input_ids must be the {rows.stop - rows.start} tokens of rows, got {computed}")
        if not rows.whole and cache is None:
            raise ValueError("rows that are a part of the sequence need a cache, which holds the others' keys")
        first_row = rows.start if first_row is None else first_row
        if not rows.start <= first_row < rows.stop:
            raise ValueError(f"first_row must be one of the rows {rows.start} to {rows.stop - 1}, got {first_row}")
        key_valid = None if attention_mask is None else attention_mask.bool()
        return ForwardContext(rows, self.rope(rows.positions), key_valid, cache, first_row)

    @property
    def device(self) -> torch.device:
        """That of the first weight; where accelerate keeps it off its device between forwards, the hook's."""
        device = next(self.parameters()).device
        if device.type != "meta":
            return device
        hooks = (getattr(module, "_hf_hook", None) for module in self.modules())
        devices = (getattr(hook, "execution_device", None) for hook in hooks)
        return next((torch.device(one) for one in devices if one is not None), device)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype
