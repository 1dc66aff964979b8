"""Why a sampler from elsewhere never had a sparse step."""

from dataclasses import dataclass

from .schedule import ByStep


@dataclass
class Tally:
    """What such a sampler has run inside one `sparsify`, by forwards that ended.

    Args:
        whole, windows, unseen: those that computed all tokens in all layers; only some; whose attention was not seen.
        sparse: of the whole ones, those that were.
        generations: how many the whole ones were taken for.
        kept_all: whether the last one kept every block.
        told: whether a sampler told of its generation: it then says itself what ran.
    """

    whole: int = 0
    windows: int = 0
    unseen: int = 0
    sparse: int = 0
    generations: int = 0
    kept_all: bool = False
    told: bool = False

    def note(self, sparse: bool, step: int, keeps_all: bool) -> None:
        """A forward of all tokens has ended."""
        self.whole += 1
        self.sparse += sparse
        self.generations += step == 0
        self.kept_all = keeps_all

    def why_never_sparse(self, schedule: ByStep, gen_length: int) -> str | None:
        """The reason in a few words, or None if there was a sparse forward."""
        if self.sparse or self.told:
            return None
        if self.kept_all:
            return "every block is kept: the sequence has too few of them, or `select` is too large"
        if not self.whole:
            return self._nothing_whole()
        if self.generations == self.whole > 2:
            return (
                f"each of the {self.whole} forwards began a generation: its length, its batch or a token before the "
                f"last {gen_length} was not that of the forward before"
            )
        others = f"; {self.windows} more computed some of their tokens and were no steps" if self.windows else ""
        return (
            f"a generation had no more whole forwards ({self.whole / self.generations:.3g}) than have full attention "
            f"({schedule.n_full} of `steps` {schedule.steps}){others}"
        )

    def _nothing_whole(self) -> str:
        if self.windows:
            return "every forward computed only some of its tokens, against a cache"
        if self.unseen:
            return "the model's attention was replaced by something that does not call it"
        return "no forward of the model ended inside the context"
