"""What attention a whole forward should have, by how far the generation is: full, or over kept blocks."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from .config import SparseDConfig

# what a forward computes: full attention; the same, and selects the blocks; attention over the selected blocks
FULL, SELECTING, SPARSE = "full", "selecting", "sparse"


class Progress(NamedTuple):
    """How far a generation is: forwards that are done, and the share of the generated tokens that are committed."""

    step: int
    committed: float


class Schedule(Protocol):
    """When attention should be over kept blocks."""

    def wants_pattern(self, at: Progress) -> bool:
        """Whether the next forward needs kept blocks: it selects them if none are selected yet."""


@dataclass(frozen=True)
class ByStep:
    """The paper's: of `steps` forwards the first `n_full` have full attention, and the last of these selects.

    Where no forward is left to be sparse, none selects; any beyond `steps` are sparse. With `n_full` 0 the first one
    selects and is sparse itself.
    """

    steps: int
    n_full: int

    @staticmethod
    def of(config: SparseDConfig, steps: int, needs_scores: bool) -> "ByStep":
        """As the config's `skip` says; a rule that looks at no scores needs no full step."""
        return ByStep(steps, config.n_full(steps) if needs_scores else 0)

    def wants_pattern(self, at: Progress) -> bool:
        return self.n_full < self.steps and at.step >= self.n_full - 1


@dataclass(frozen=True)
class ByCommitted:
    """For samplers whose number of steps is not known beforehand: full attention until a share is committed.

    Args:
        skip: share of the generated tokens, 0 to 1.
    """

    skip: float

    def wants_pattern(self, at: Progress) -> bool:
        return at.committed >= self.skip
