"""The settings of SparseD and the schedule that follows from them (arXiv 2509.24014, section 4)."""

import math
from dataclasses import dataclass


def ceil_share(fraction: float, total: int) -> int:
    """How many of `total` things a `fraction` of them is: at least one, rounded up.

    Products such as 0.07 * 100 = 7.000000000000001 are cleaned of float noise first.
    """
    return max(1, math.ceil(round(fraction * total, 9)))


def check_numbers(**numbers: int) -> None:
    """Raise ValueError unless every number is a positive whole one."""
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive whole number, got {value!r}")


@dataclass(frozen=True)
class SparseDConfig:
    """The paper's three numbers, and one choice of ours.

    Args:
        skip: fraction of the denoising steps that use full attention, 0 to 1.
        select: fraction of the key blocks that each query block keeps afterwards, above 0, at most 1.
        block_size: tokens per block, for queries and keys alike, a positive multiple of 16.
        dense_answer: in the sparse steps, the queries from the token before the generated region on attend to every
            key, and only the prompt's to their kept blocks. Not in the paper, whose rule is False.

    Raises:
        ValueError: a number is outside its range, or `dense_answer` is no bool.
    """

    skip: float = 0.2
    select: float = 0.3
    block_size: int = 128
    dense_answer: bool = False

    def __post_init__(self):
        if not _is_number(self.skip) or not 0 <= self.skip <= 1:
            raise ValueError(f"skip must be between 0 and 1, got {self.skip!r}")
        if not _is_number(self.select) or not 0 < self.select <= 1:
            raise ValueError(f"select must be above 0 and at most 1, got {self.select!r}")
        whole = isinstance(self.block_size, int) and not isinstance(self.block_size, bool)
        # block indices are int32
        if not whole or not 16 <= self.block_size < 2**31 or self.block_size % 16:
            raise ValueError(f"block_size must be a positive multiple of 16, got {self.block_size!r}")
        if not isinstance(self.dense_answer, bool):
            raise ValueError(f"dense_answer must be True or False, got {self.dense_answer!r}")

    def n_full(self, steps: int) -> int:
        """Number of leading steps, of `steps` in all, that use full attention; the last of them selects the blocks."""
        return min(steps, ceil_share(self.skip, steps))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
