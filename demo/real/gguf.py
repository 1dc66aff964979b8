"""Reading GGUF, llama.cpp's file format: metadata and tensors of a file that is mapped, not loaded.

Such a file is little-endian. It begins with its version and two counts. The metadata follow, each a name, a type and a
value; then every tensor's name, sizes (a row's first), type and place; and from the next multiple of the alignment on
the tensors. A quantised tensor is a sequence of blocks of 32 values.
"""

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

VERSIONS = (2, 3)
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # by type
STRING, ARRAY = 8, 9
ALIGNMENT = 32  # if the metadata do not say


class Kind(NamedTuple):
    """How values are stored: `values` per block of that dtype. `decode` makes float32 [n, values] of n blocks."""

    name: str
    block: np.dtype
    values: int
    decode: Callable[[np.ndarray], np.ndarray]


def _as_float32(blocks: np.ndarray) -> np.ndarray:
    return blocks.astype(np.float32)


def _scaled(blocks: np.ndarray) -> np.ndarray:
    return _as_float32(blocks["scale"])[:, None] * _as_float32(blocks["values"])


def _scaled_above_lowest(blocks: np.ndarray) -> np.ndarray:
    """The first half of a block's values is in the low halves of its bytes."""
    pairs = blocks["pairs"]
    values = _as_float32(np.concatenate((pairs & 15, pairs >> 4), axis=1))
    return _as_float32(blocks["scale"])[:, None] * values + _as_float32(blocks["lowest"])[:, None]


KINDS = {
    0: Kind("F32", np.dtype("<f4"), 1, _as_float32),
    1: Kind("F16", np.dtype("<f2"), 1, _as_float32),
    3: Kind("Q4_1", np.dtype([("scale", "<f2"), ("lowest", "<f2"), ("pairs", "u1", 16)]), 32, _scaled_above_lowest),
    8: Kind("Q8_0", np.dtype([("scale", "<f2"), ("values", "i1", 32)]), 32, _scaled),
}


class Place(NamedTuple):
    """Where a tensor of `shape` (rows first) is, in bytes from the file's start."""

    kind: Kind
    shape: tuple[int, ...]
    start: int

    @property
    def blocks(self) -> int:
        return math.prod(self.shape) // self.kind.values


@dataclass(frozen=True)
class Gguf:
    """A file's metadata, numbers, strings and lists of them by name, and where its tensors are."""

    metadata: dict[str, Any]
    places: dict[str, Place]
    content: mmap.mmap

    def tensor(self, name: str) -> np.ndarray:
        """A copy in float32; ValueError if there is none of this name."""
        if name not in self.places:
            raise ValueError(f"the GGUF file has no tensor '{name}'")
        kind, shape, start = self.places[name]
        blocks = np.frombuffer(self.content, kind.block, self.places[name].blocks, start)
        return kind.decode(blocks).reshape(shape)


class _Cursor:
    """Reads one thing after the other."""

    def __init__(self, content: mmap.mmap):
        self.content, self.at = content, 0

    def bytes(self, count: int) -> bytes:
        if count > len(self.content) - self.at:
            raise ValueError("the GGUF file is cut off")
        self.at += count
        return self.content[self.at - count : self.at]

    def numbers(self, code: str, count: int = 1) -> list[Any]:
        raw = self.bytes(count * struct.calcsize(f"<{code}"))
        return [number for (number,) in struct.iter_unpack(f"<{code}", raw)]

    def string(self) -> str:
        return self.bytes(self.numbers("Q")[0]).decode("utf-8")

    def value(self, name: str) -> Any:
        (kind,) = self.numbers("I")
        if kind != ARRAY:
            return self._values(kind, 1, name)[0]
        inner, count = *self.numbers("I"), *self.numbers("Q")
        return self._values(inner, count, name)

    def _values(self, kind: int, count: int, name: str) -> list[Any]:
        if kind == STRING:
            return [self.string() for _ in range(count)]
        if kind not in NUMBERS:
            raise ValueError(f"the GGUF file's '{name}' has values of type {kind}, which is not known")
        return self.numbers(NUMBERS[kind], count)

    def tensor(self) -> tuple[str, Place]:
        """A tensor's name, and its place relative to the first tensor, as the file says."""
        name = self.string()
        sizes = self.numbers("Q", *self.numbers("I"))
        number, start = *self.numbers("I"), *self.numbers("Q")
        if number not in KINDS:
            known = ", ".join(f"{kind.name} ({index})" for index, kind in KINDS.items())
            raise ValueError(f"the GGUF file's tensor '{name}' has type {number}; known are {known}")
        if not sizes or sizes[0] % KINDS[number].values:
            raise ValueError(f"the GGUF file's tensor '{name}' of sizes {sizes} does not consist of whole blocks")
        return name, Place(KINDS[number], tuple(reversed(sizes)), start)


def read_gguf(path: Path) -> Gguf:
    """Map a file and read its description.

    Raises:
        OSError: it cannot be read.
        ValueError: it is cut off, no GGUF, or of a version or type of tensor that is not known here.
    """
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = _Cursor(content)
    if cursor.bytes(4) != b"GGUF":
        raise ValueError(f"{path} is not a GGUF file")
    (version,) = cursor.numbers("I")
    if version not in VERSIONS:
        raise ValueError(f"{path} is GGUF of version {version}; known are {', '.join(map(str, VERSIONS))}")
    tensors, count = cursor.numbers("Q", 2)
    metadata = {}
    for _ in range(count):
        name = cursor.string()
        metadata[name] = cursor.value(name)
    places = dict(cursor.tensor() for _ in range(tensors))
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError("the GGUF file's 'general.alignment' is not a positive whole number")
    first = -(-cursor.at // alignment) * alignment
    return Gguf(metadata, {name: _placed(name, place, first, content) for name, place in places.items()}, content)


def _placed(name: str, place: Place, first: int, content: mmap.mmap) -> Place:
    placed = place._replace(start=first + place.start)
    if placed.start + placed.blocks * placed.kind.block.itemsize > len(content):
        raise ValueError(f"the GGUF file is cut off: tensor '{name}' ends behind it")
    return placed
