"""The documents of a measurement, as token ids: from files of ids and from plain text."""

import lzma
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...chat import encode_text
from ...console.files import LARGEST_FILE, bytes_of, text_of

IDS = (".bin", ".bin.xz")  # how the names of files of ids end
END = 0  # the id after every document in such a file


@dataclass(frozen=True)
class Document:
    """One text.

    Args:
        name: unique within a run.
        tokens: int64 [n].
    """

    name: str
    tokens: np.ndarray


def read_documents(files: Iterable[Path], tokenizer: Any) -> list[Document]:
    """The documents of all files: many from a file of ids, one from any other file, which must be UTF-8 text.

    Raises:
        ValueError: a file cannot be read, or two have the same name, which lines of results use.
    """
    found: dict[str, Document] = {}
    for file in files:
        if file.name.endswith(IDS):
            pieces = {f"{file.name}:{n}": piece for n, piece in enumerate(split_documents(read_ids(file)))}
        else:
            text = text_of(str(file), encoding="utf-8-sig")
            pieces = {file.name: np.array(encode_text(tokenizer, text), np.int64)}
        if pieces.keys() & found:
            raise ValueError(f"two files are called {file.name}: give them names of their own")
        found |= {name: Document(name, piece) for name, piece in pieces.items()}
    return list(found.values())


def check_ids(documents: Iterable[Document], vocabulary: int) -> None:
    """Raise ValueError unless every id is below `vocabulary`."""
    for document in documents:
        if len(document.tokens) and document.tokens.max() >= vocabulary:
            raise ValueError(
                f"{document.name} has the id {document.tokens.max()}, beyond the vocabulary of {vocabulary}"
            )


def read_ids(file: Path) -> np.ndarray:
    """The ids of a file of unsigned 16-bit numbers, .bin or compressed as .bin.xz: int64 [n].

    Raises:
        ValueError: it cannot be read, is broken or far too large, or holds no ids.
    """
    raw = bytes_of(str(file))
    if file.suffix == ".xz":
        unpack = lzma.LZMADecompressor(lzma.FORMAT_XZ)
        try:
            raw = unpack.decompress(raw, LARGEST_FILE)
        except lzma.LZMAError as error:
            raise ValueError(f"{file} is not an .xz file: {error}") from None
        if not unpack.eof:
            raise ValueError(f"{file} is cut off, or unpacks to more than {LARGEST_FILE} bytes")
    if not raw or len(raw) % 2:
        raise ValueError(f"{file} must hold ids of two bytes each, but has {len(raw)} bytes")
    return np.frombuffer(raw, "<u2").astype(np.int64)


def split_documents(ids: np.ndarray) -> list[np.ndarray]:
    """The documents among ids [n], each with the id that ends it; the last one may lack it."""
    pieces = np.split(ids, np.flatnonzero(ids == END) + 1)
    return pieces if len(pieces[-1]) else pieces[:-1]
