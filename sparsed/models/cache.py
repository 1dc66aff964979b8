"""Keys and values of a sequence, kept from one forward to the next."""

from collections.abc import Sequence

from torch import Tensor

from ..kernels import store_rotated
from .rows import Rows


class KVCache:
    """Keys after rotation and values of all layers, for sequences [batch, length], allocated at once.

    A forward writes its rows' keys and values in place, and attends to all of them; the first one computes all rows. No
    gradient goes through it.

    Args:
        like: a tensor for each layer, whose device and dtype the layer's have.
        batch, kv_heads, length, head_dim: a layer's keys are [batch, kv_heads, length, head_dim], like its values.
    """

    def __init__(self, like: Sequence[Tensor], batch: int, kv_heads: int, length: int, head_dim: int):
        # laid out as the projections give them
        shape = (2, batch, length, kv_heads, head_dim)
        self._layers = [tensor.new_empty(shape).transpose(2, 3) for tensor in like]
        self._filled: set[int] = set()  # layers of which every token was written

    @property
    def shape(self) -> tuple[int, int]:
        """Batch and length of the sequences."""
        return self._layers[0].shape[1], self._layers[0].shape[3]

    @property
    def bytes(self) -> int:
        """What all layers take."""
        return sum(layer.nbytes for layer in self._layers)

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
        keys, values = self._layers[layer]
        store_rotated(k, v, *rope, rows.slots.to(keys.device), keys, values)
        return keys, values
