"""Blocks: how a sequence is cut into them, and which of them a layer's query blocks attend to."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import ceil_share

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# elements ranked at once: bounds the memory for their 8-byte ranks to a quarter of a GiB
RANKED = 1 << 25


@dataclass(frozen=True)
class BlockGrid:
    """The blocks of one sequence: prompt, then generated region, cut every `block_size` tokens.

    Args:
        length: tokens in all.
        prompt_len: tokens before the generated region.
        key_valid: bool [B, length], False where a token is padding; None if every token is real.
        dense_answer: as in `SparseDConfig`.
    """

    length: int
    prompt_len: int
    block_size: int
    key_valid: Tensor | None = None
    dense_answer: bool = False

    def to(self, device: torch.device) -> "BlockGrid":
        """The grid with its tensor on `device`: the layers of somebody else's model can lie on several GPUs."""
        if self.key_valid is None or self.key_valid.device == device:
            return self
        return replace(self, key_valid=self.key_valid.to(device))

    @property
    def n_blocks(self) -> int:
        return -(-self.length // self.block_size)

    @property
    def parts(self) -> tuple[slice, ...]:
        """Prompt blocks, generation blocks: the latter lie wholly inside the generated region, or are the last one."""
        border = min(-(-self.prompt_len // self.block_size), self.n_blocks - 1)
        return slice(0, border), slice(border, self.n_blocks)

    @property
    def first_dense(self) -> int:
        """The first query that attends to every key: the token before the generated region (in Dream, whose logits
        predict the next token, it is the answer's first row), or the sequence's end if there is none."""
        return max(0, self.prompt_len - 1) if self.dense_answer else self.length

    @cached_property
    def block_tokens(self) -> Tensor:
        """Real tokens in each block, [B or 1, n_blocks]."""
        return self._tokens_from(0)

    @cached_property
    def dense_tokens(self) -> Tensor:
        """Those of `block_tokens` that, as queries, attend to every key."""
        return self._tokens_from(self.first_dense)

    def _tokens_from(self, first: int) -> Tensor:
        valid = torch.ones(1, self.length, dtype=torch.bool) if self.key_valid is None else self.key_valid.clone()
        valid[:, :first] = False
        block_size = min(self.block_size, self.length)
        return F.pad(valid, (0, -self.length % block_size)).unflatten(-1, (-1, block_size)).sum(-1)

    @cached_property
    def real_blocks(self) -> list[list[int]]:
        """Blocks of (prompt, generation) that hold a real token, for each batch row; waits for the device once."""
        return torch.stack([(self.block_tokens[:, part] > 0).sum(-1) for part in self.parts], dim=-1).tolist()

    def budgets(self, select: float) -> list[tuple[int, ...]]:
        """Key blocks to keep in (prompt, generation) for each batch row (one row stands for all without padding).

        Each part keeps max(1, ceil(select * its blocks that hold a real token)), and none if there is no such block.
        """
        return [tuple(ceil_share(select, n) if n else 0 for n in row) for row in self.real_blocks]

    def keeps_all(self, select: float) -> bool:
        """Whether the budgets hold every block; padding changes nothing about it, as fewer blocks are kept sooner."""
        return all(ceil_share(select, part.stop - part.start) >= part.stop - part.start for part in self.parts)


def head_chunks(heads: int, elements: int) -> list[slice]:
    """Slices of `heads` heads, each small enough that `elements` per head can be ranked at once."""
    size = max(1, RANKED // elements)
    return [slice(start, start + size) for start in range(0, heads, size)]


def true_places(chosen: Tensor, width: int) -> Tensor:
    """Where the last dimension of a bool tensor is True, ascending, then zeros: int32 [..., width].

    Args:
        chosen: at most `width` of each row are True.
    """
    places = torch.arange(chosen.shape[-1], dtype=torch.int32, device=chosen.device).expand_as(chosen)
    # every one of them to its rank, all others to a place behind, cut off
    rank = (chosen.cumsum(-1) - 1).masked_fill_(~chosen, width)
    return places.new_zeros(*chosen.shape[:-1], width + 1).scatter_(-1, rank, places)[..., :width]


@dataclass(frozen=True)
class Pattern:
    """The kept key blocks of one layer; the grid says which queries read every key instead.

    Args:
        indices: int32 [B, Hq, nQ, width], ascending; row b holds counts[b] blocks, then repeats its last one.
        counts: kept key blocks of a query block, by batch row.
        grid: the blocks that the indices count.
    """

    indices: Tensor
    counts: tuple[int, ...]
    grid: BlockGrid

    @property
    def density(self) -> Tensor:
        """Attended over all pairs of real query and real key, mean over batch rows and heads; 0-dim float32."""
        # non_blocking: a layer's selection waits for nothing
        tokens, dense = (
            found.to(self.indices.device, non_blocking=True).expand(self.indices.shape[0], -1).float()
            for found in (self.grid.block_tokens, self.grid.dense_tokens)
        )
        shares = []
        for row, kept, real, whole in zip(self.indices.long(), self.counts, tokens, dense, strict=True):
            attended = (real[row[..., :kept]].sum(-1) * (real - whole)).sum(-1)  # [Hq]
            shares.append((attended.mean() + real.sum() * whole.sum()) / real.sum().square())
        return torch.stack(shares).mean()

    def part(self, rows: int, heads: slice) -> "Pattern":
        """The pattern of the first `rows` batch rows and of some heads."""
        valid = None if self.grid.key_valid is None else self.grid.key_valid[:rows]
        return Pattern(self.indices[:rows, heads], self.counts[:rows], replace(self.grid, key_valid=valid))

    def as_mask(self) -> Tensor:
        """The kept blocks as bool [B, Hq, nQ, nK]."""
        shape = *self.indices.shape[:-1], self.grid.n_blocks
        mask = torch.zeros(shape, dtype=torch.bool, device=self.indices.device)
        return mask.scatter_(-1, self.indices.long(), True)

    def read_mask(self) -> Tensor:
        """The blocks of which some query of a block reads a key, bool [B, Hq, nQ, nK]: the kept ones, and all that hold
        a real token where `dense_answer` has a query read everything."""
        real, dense = (
            (found > 0).to(self.indices.device) for found in (self.grid.block_tokens, self.grid.dense_tokens)
        )
        return self.as_mask() | (dense[:, None, :, None] & real[:, None, None, :])

    def block_mask(self) -> "BlockMask":
        """The pattern as FlexAttention's BlockMask, of queries and keys of the whole sequence.

        Full blocks are listed as such; blocks with padding, or of which only the answer's queries read, are partial.
        Compile with `dynamic=True`: over a fixed length that is a multiple of 128 but not of the block size, the kernel
        of PyTorch 2.11 reads past the end.
        """
        lists = self.flex_lists(slice(None), self.grid.n_blocks)
        return lists.block_mask(self.grid.block_size, (self.grid.length, self.grid.length))

    def flex_lists(self, rows: slice, width: int) -> "FlexLists":
        """What FlexAttention reads, for some of the query blocks.

        Args:
            rows: which of them.
            width: of the lists; no query block reads more blocks. BlockMask's own methods want all of the sequence's.
        """
        grid, device = self.grid, self.indices.device
        kept, batch = self.as_mask()[:, :, rows], len(self.indices)
        valid = torch.ones(1, grid.length, dtype=torch.bool) if grid.key_valid is None else grid.key_valid
        valid = valid.to(device).expand(batch, -1)
        queries = torch.arange(grid.n_blocks * grid.block_size, device=device).unflatten(0, (-1, grid.block_size))[rows]
        dense = queries.flatten() >= grid.first_dense
        real, tokens, dense_tokens = (
            found.to(device)
            for found in (grid.block_tokens, replace(grid, key_valid=None).block_tokens, grid.dense_tokens)
        )
        unpadded = (real == tokens).expand(batch, -1)
        all_dense = (dense_tokens == tokens).expand(batch, -1)[:, rows]
        whole = (kept | all_dense[:, None, :, None]) & unpadded[:, None, None, :]
        part = self.read_mask()[:, :, rows] & ~whole
        part_counts, whole_counts = (blocks.sum(-1, dtype=torch.int32) for blocks in (part, whole))
        part_list, whole_list = (true_places(blocks, width) for blocks in (part, whole))
        return FlexLists(part_counts, whole_counts, part_list, whole_list, kept, dense, valid)


class FlexLists(NamedTuple):
    """A pattern as FlexAttention takes it, tensors only, so that a compiled function can take them for any sizes.

    Args:
        part_counts, whole_counts: int32 [B, Hq, nQ], blocks in the lists of partial and of full blocks.
        part, whole: int32 [B, Hq, nQ, width], ascending; two tensors, for one in both places does not compile.
        kept: bool [B, Hq, nQ, nK].
        dense: bool [n], the queries that read every key.
        valid: bool [B, T], the keys that are no padding.
    """

    part_counts: Tensor
    whole_counts: Tensor
    part: Tensor
    whole: Tensor
    kept: Tensor
    dense: Tensor
    valid: Tensor

    def block_mask(self, block_size: int, lengths: tuple[int, int]) -> "BlockMask":
        """The BlockMask of `lengths` (queries, keys), of which the last blocks may be shorter than `block_size`.

        Its mask_mod says of every pair what the lists say, because FlexAttention has computed full attention over lists
        whose mask_mod is trivial (pytorch#188322).
        """
        from torch.nn.attention.flex_attention import BlockMask  # a second to import

        kept, dense, valid = self.kept, self.dense, self.valid

        def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (kept[b, h, query // block_size, key // block_size] | dense[query]) & valid[b, key]

        return BlockMask.from_kv_blocks(
            self.part_counts, self.part, self.whole_counts, self.whole, BLOCK_SIZE=block_size, mask_mod=mask_mod,
            seq_lengths=lengths, compute_q_blocks=False,
        )  # fmt: skip
