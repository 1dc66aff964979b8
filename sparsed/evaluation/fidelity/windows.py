"""Windows: pieces of documents; the last tokens of a window count as the generated region.

There are three kinds. TEXT is the document as it is. In PLANTED, a copy of the region and of the tokens that lead into
it stands far before. In REPEATED, the region holds passages that the document itself has far before, and nowhere
nearer.
"""

import zlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .documents import Document

TEXT, PLANTED, REPEATED = "text", "planted", "repeated"
LEAD = 16  # tokens before the region with which a planted copy begins
PASSAGE = 8  # tokens that must be the same for a passage to be a repetition


@dataclass(frozen=True)
class Window:
    """Tokens of one document.

    Args:
        document: name of the document.
        tokens: int64 [T].
        order: int64 [N], the places of the generated region in the order in which they are unmasked.
        kind: TEXT, PLANTED or REPEATED.
        counted: bool [T], the places that count; None if all of the region's do.
        far: the least number of tokens from the evidence to the region's tokens; None if it may be anywhere.
    """

    document: str
    tokens: Tensor
    order: Tensor
    kind: str = TEXT
    counted: Tensor | None = None
    far: int | None = None

    @property
    def id(self) -> str:
        return window_id(self.kind, len(self.tokens), self.far, self.document)

    @property
    def region(self) -> tuple[int, int]:
        """Where the region begins, and the place behind it."""
        return int(self.order.min()), int(self.order.max()) + 1

    def in_blocks(self, length: int) -> list["Window"]:
        """The same window once for each block of its region. Only this block is the region; those before it are not
        masked.

        Args:
            length: tokens of a block; divides the region's.
        """
        start, _ = self.region
        blocks = (self.order - start) // length
        return [replace(self, order=self.order[blocks == block]) for block in range(len(self.order) // length)]

    def masked(self, rate: float) -> Tensor:
        """The places [n] that are masked at this share of the region, ascending."""
        return self.order[len(self.order) - round(rate * len(self.order)) :].sort().values

    def measured(self, rate: float) -> Tensor:
        """The places of `masked` that count."""
        places = self.masked(rate)
        return places if self.counted is None else places[self.counted[places]]

    def canvas(self, rate: float, mask_id: int) -> Tensor:
        """The tokens [1, T] for the model: this share of the region is masked, and everything behind the region."""
        tokens = self.tokens.clone()
        tokens[self.masked(rate)] = mask_id
        tokens[self.region[1] :] = mask_id
        return tokens[None]


def window_id(kind: str, length: int, far: int | None, document: str) -> str:
    """A window's name, such as 'planted-4096-1280-book.txt'."""
    return "-".join(str(part) for part in (kind, length, far, document) if part is not None)


def shuffled(length: int, new_tokens: int, seed: int) -> Tensor:
    """The last `new_tokens` of `length` places in a random order."""
    return length - new_tokens + torch.randperm(new_tokens, generator=torch.Generator().manual_seed(seed))


def text_window(document: Document, length: int, new_tokens: int, stop: int | None = None) -> Window:
    """The `length` tokens before `stop`; by default the document's first ones."""
    stop = length if stop is None else stop
    tokens = torch.from_numpy(document.tokens[stop - length : stop])
    return Window(document.name, tokens, shuffled(length, new_tokens, _seed(document.name, length)))


def planted(window: Window, far: int) -> Window | None:
    """The window with a copy of the region and its lead, at least `far` tokens before; None if there is no room."""
    first = int(window.order.min()) - LEAD
    room = first - far + 1
    if room < 1:
        return None
    place = _seed(window.document, far) % room
    tokens = window.tokens.clone()
    copied = tokens[first:].clone()
    tokens[place : place + len(copied)] = copied
    return replace(window, tokens=tokens, kind=PLANTED, far=far)


def repeated(document: Document, length: int, new_tokens: int, far: int) -> Window | None:
    """The window of the document with the most repetitions in its region; None if it has none."""
    marked = repetitions(document.tokens, far, length - new_tokens - PASSAGE)
    before = np.concatenate(([0], marked.cumsum()))
    stops = np.arange(length, len(marked) + 1)
    counts = before[stops] - before[stops - new_tokens]
    if not counts.any():
        return None
    stop = int(stops[counts.argmax()])
    window = text_window(document, length, new_tokens, stop)
    counted = torch.from_numpy(marked[stop - length : stop].copy())
    return replace(window, kind=REPEATED, counted=counted, far=far)


def repetitions(tokens: np.ndarray, far: int, most: int) -> np.ndarray:
    """Which tokens lie in a passage that also stands `far` to `most` tokens before, and nowhere nearer: bool [n].

    Args:
        tokens: int64 [n].
    """
    starts: dict[bytes, list[int]] = {}
    for start in range(len(tokens) - PASSAGE + 1):
        starts.setdefault(tokens[start : start + PASSAGE].tobytes(), []).append(start)
    marked = np.zeros(len(tokens), bool)
    for places in starts.values():
        for before, start, after in zip(places, places[1:], [*places[2:], np.inf], strict=False):
            if far <= start - before <= most and after - start >= far:
                marked[start : start + PASSAGE] = True
    return marked


def _seed(name: str, number: int) -> int:
    """A seed that is the same in every run."""
    return zlib.crc32(f"{name} {number}".encode())
