"""Which samples are answered, in which order and with how many steps."""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from ..console.endings import blame
from ..sampling import settings_for
from ..sampling.unmasking import BlocksError
from .results import key
from .running import Variant, of_one_length
from .tasks import TASKS, Sample, make_sample, read_samples, sample_id

OWN_NEW_TOKENS = 128  # for tasks of the user's own


@dataclass(frozen=True)
class Batch:
    """Samples of one task and length, made when they are needed: their names are known sooner.

    Args:
        ids: the samples' names.
        make: the samples.
        gen_length, steps: new tokens, and denoising steps.
    """

    ids: tuple[str, ...]
    make: Callable[[], tuple[Sample, ...]]
    gen_length: int
    steps: int

    def keys(self, variant: Variant) -> list[tuple]:
        """What the samples' lines of results are known by."""
        return [key({"id": name, **variant.names}) for name in self.ids]


def plan(args: argparse.Namespace, tokenizer: Any) -> list[Batch]:
    """All batches in the order of the results: by task, length, seed, sample."""
    batches = []
    for name, tokens, seed in product(args.tasks, args.lengths, args.seed):
        task = TASKS[name]
        make = partial(make_sample, task, tokenizer, tokens, seed)
        with blame(args, "--lengths"):
            make(0)
        for start in range(0, args.limit, args.batch_size):
            indices = range(start, min(start + args.batch_size, args.limit))
            ids = tuple(sample_id(task, tokens, seed, index) for index in indices)
            batches.append(_batch(args, ids, partial(_made, make, indices), task.gen_length))
    if args.tasks_file is not None:
        with blame(args, "--tasks_file"):
            own = read_samples(args.tasks_file, tokenizer)[: args.limit]
        for samples in of_one_length(own, args.batch_size):
            ids = tuple(sample.id for sample in samples)
            batches.append(_batch(args, ids, partial(tuple, samples), OWN_NEW_TOKENS))
    _check_names(args, batches)
    return batches


def _check_names(args: argparse.Namespace, batches: list[Batch]) -> None:
    """A user's own sample may not have the name of another."""
    seen: set[str] = set()
    for name in (name for batch in batches for name in batch.ids):
        if name in seen:
            args.parser.error(f"argument --tasks_file: the id {name!r} is that of a sample of --tasks")
        seen.add(name)


def _made(make: Callable[[int], Sample], indices: Iterable[int]) -> tuple[Sample, ...]:
    return tuple(map(make, indices))


def _batch(args: argparse.Namespace, ids: tuple[str, ...], make: Callable[[], tuple[Sample, ...]], new: int) -> Batch:
    gen_length = args.seq_len or new
    return Batch(ids, make, gen_length, args.steps or gen_length)


def check_steps(args: argparse.Namespace, family: str, batches: list[Batch]) -> None:
    """LLaDA's blocks divide the new tokens, and the steps are shared out among them evenly."""
    for batch in batches:
        try:
            settings_for(family, gen_length=batch.gen_length, steps=batch.steps, block_length=args.block_length)
        except BlocksError as error:
            args.parser.error(f"argument --{error.argument}: {error.must}")
