"""Keys and values of a sequence, kept from one forward to the next."""

import math

import torch
from torch import Tensor

from ..kernels import store_rotated
from .rows import Rows


class KVCache:
    """Keys after rotation and values of all layers, for sequences [batch, length].

    A forward writes its rows' keys and values in place, and attends to all of them. The first one computes all rows,
    and a layer's memory is made of its keys: where they are and in which dtype, its weights need not say. No gradient
    goes through it.

    Args:
        layers, batch, kv_heads, length, head_dim: a layer's keys are [batch, kv_heads, length, head_dim], like its
            values.
        dtype: that keys are expected in, for `bytes`.

    Attributes:
        shape: batch and length of the sequences.
        bytes: what all layers will take.
    """

    def __init__(self, layers: int, batch: int, kv_heads: int, length: int, head_dim: int, dtype: torch.dtype):
        self.shape = batch, length
        # laid out as the projections give them
        self._size = 2, batch, length, kv_heads, head_dim
        self.bytes = layers * math.prod(self._size) * dtype.itemsize
        self._layers: list[Tensor | None] = [None] * layers
        self._filled: set[int] = set()  # layers of which every token was written

    def update(
        self, layer: int, rows: Rows, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Write the rows' keys, by `rope` rotated, and values; returns those of the whole sequence, [B, Hkv, T, D].

        Args:
            k, v: [B, Hkv, n, D].
            rope: cosines and sines as `kernels.rotate` takes them.

        Raises:
            ValueError: the cache is of sequences of another shape, or the layer's other tokens were never written.
        """
        if self.shape != (k.shape[0], rows.length):
            raise ValueError(f"the cache is of sequences {list(self.shape)}, not of {[k.shape[0], rows.length]}")
        if rows.whole:
            if layer == 0:  # should this forward fail, the deeper layers hold another one's
                self._filled.clear()
            self._filled.add(layer)
        elif layer not in self._filled:
            raise ValueError("the cache is not filled: a forward must compute all tokens of the sequence first")
        keys, values = self._memory(layer, k)
        store_rotated(k, v, *rope, rows.slots, keys, values)
        return keys, values

    def _memory(self, layer: int, like: Tensor) -> Tensor:
        """A layer's keys and values, [2, B, Hkv, T, D]."""
        held = self._layers[layer]
        if held is None or held.dtype != like.dtype or held.device != like.device:
            held = self._layers[layer] = like.new_empty(self._size).transpose(2, 3)
        return held
