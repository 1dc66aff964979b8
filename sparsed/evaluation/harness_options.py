"""The options of the harness' --model_args, checked."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from ..backends import check_backend
from ..config import SparseDConfig, check_numbers
from ..sampling.saving import OFF, Saving

# the harness passes these on to every model; a checkpoint's code never runs, whatever they say
IGNORED = ("max_batch_size", "trust_remote_code")


@dataclass(frozen=True)
class Options:
    """The options of --model_args.

    Args:
        pretrained: folder or hub id of a Dream or LLaDA checkpoint.
        origin: full attention in every step.
        skip, select, block_size, dense_answer: SparseD's settings.
        backend: kernel of the sparse steps.
        steps: denoising steps of an answer, if its task does not say; None: one per token.
        max_gen_toks: tokens of an answer, if its task does not say.
        block_length: of LLaDA, and of Dream with a cache, threshold or factor; at most the answer's length. Tokens of
            the last block beyond the answer's length are cut off.
        cache, refresh, threshold, factor, early_stop: as for the samplers, for answers; a task's own settings win.
        mc_num: draws per log-likelihood.
        check_greedy: whether to find out if the model would write exactly the target. Few metrics need it, and it takes
            one forward per token. Without it the answer is always no.
        add_bos_token: put the tokenizer's bos_token before every context that does not have it.
        device, dtype: as for `load_model`.
        seed: of the draws, which are the same for every log-likelihood, and of sampling above temperature 0.
        batch_size: 1.

    Raises:
        ValueError: one of them is out of range.
    """

    pretrained: str
    origin: bool = False
    skip: float = 0.2
    select: float = 0.3
    block_size: int = 128
    dense_answer: bool = False
    backend: str = "auto"
    steps: int | None = None
    max_gen_toks: int = 256
    block_length: int = 32
    cache: str = "none"
    refresh: int | None = None
    threshold: float | None = None
    factor: float | None = None
    early_stop: bool = False
    mc_num: int = 128
    check_greedy: bool = True
    add_bos_token: bool = False
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    batch_size: int = 1

    def __post_init__(self):
        SparseDConfig(self.skip, self.select, self.block_size, self.dense_answer)
        check_backend(self.backend)
        check_numbers(max_gen_toks=self.max_gen_toks, block_length=self.block_length, mc_num=self.mc_num)
        check_numbers(steps=1 if self.steps is None else self.steps)
        Saving(**self.saving).check_saving()
        for name in ("origin", "check_greedy", "add_bos_token"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be a whole number from 0, got {self.seed!r}")
        if self.batch_size != 1:
            raise ValueError(f"batch_size must be 1, got {self.batch_size!r}: requests run one at a time")

    @classmethod
    def parse(cls, given: dict[str, Any], read: Callable[[str], Any]) -> "Options":
        """Options from a dict; `read` turns numbers and flags that are strings into values.

        Raises:
            ValueError: an unknown option, or one that is missing or out of range; the line names it.
        """
        kinds = {field.name: field.type for field in fields(cls)}
        given = {name: value for name, value in given.items() if name not in IGNORED}
        unknown = next((name for name in given if name not in kinds), None)
        if unknown is not None:
            raise ValueError(f"unknown option {unknown!r}; there are {', '.join(kinds)}")
        if "pretrained" not in given:
            raise ValueError("pretrained is missing: the folder or hub id of a checkpoint")
        values: dict[str, Any] = {
            name: str(value) if kinds[name] is str else read(value) if isinstance(value, str) else value
            for name, value in given.items()
        }
        return cls(**values)

    @property
    def config(self) -> SparseDConfig | None:
        """SparseD's settings; None for full attention."""
        return None if self.origin else SparseDConfig(self.skip, self.select, self.block_size, self.dense_answer)

    @property
    def saving(self) -> dict[str, Any]:
        """The cache, threshold and early stop of an answer."""
        return {name: getattr(self, name) for name in OFF}

    @property
    def attention(self) -> dict[str, Any]:
        """The attention, as arguments of the sampler and of the likelihoods."""
        return {"config": self.config, "backend": self.backend}
