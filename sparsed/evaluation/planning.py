"""Which samples are answered, in which order, and with which settings of the sampler."""

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice, product
from typing import Any

from ..console.endings import blame
from ..sampling import Settings, settings_for
from ..sampling.saving import Saving
from .arguments import Arguments, blame_setting
from .methods import Variant
from .results import key
from .tasks import TASKS, Sample, make_sample, read_samples, sample_id

OWN_NEW_TOKENS = 128  # for tasks of the user's own


@dataclass(frozen=True)
class Batch:
    """Samples of one task and length. Their names are known before the samples are made.

    Args:
        ids: the samples' names.
        make, indices: gives a sample by its index, and the samples' indices.
        gen_length: new tokens of each answer.
    """

    ids: tuple[str, ...]
    make: Callable[[int], Sample]
    indices: Sequence[int]
    gen_length: int

    def keys(self, variant: Variant) -> list[tuple]:
        """The keys of the samples' lines of results."""
        return [key({"id": name, **variant.names}) for name in self.ids]

    def missing(self, variant: Variant, finished: Container[tuple]) -> set[str]:
        """The names of the samples that this variant has not answered."""
        return {name for name, known in zip(self.ids, self.keys(variant), strict=True) if known not in finished}

    def samples(self) -> list[Sample]:
        """The samples; every call makes them again."""
        return list(map(self.make, self.indices))


def plan(args: Arguments, tokenizer: Any) -> list[Batch]:
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
            batches.append(Batch(ids, make, indices, args.seq_len or task.gen_length))
    if args.tasks_file is not None:
        known = {name for batch in batches for name in batch.ids}
        with blame(args, "--tasks_file"):
            own = read_samples(args.tasks_file, tokenizer)[: args.limit]
        for samples in of_one_length(own, args.batch_size):
            ids = tuple(sample.id for sample in samples)
            if taken := next(filter(known.__contains__, ids), None):
                args.parser.error(f"argument --tasks_file: the id {taken!r} is that of a sample of --tasks")
            batches.append(Batch(ids, samples.__getitem__, range(len(samples)), args.seq_len or OWN_NEW_TOKENS))
    return batches


def of_one_length(samples: list[Sample], size: int) -> Iterator[list[Sample]]:
    """The samples in their order, at most `size` at once, and only those of one prompt length together."""
    for _, group in groupby(samples, key=lambda sample: len(sample.input_ids)):
        while batch := list(islice(group, size)):
            yield batch


def samplers(args: Arguments, family: str, batches: list[Batch]) -> dict[tuple[int, Saving], Settings]:
    """The settings of the family's sampler, by the number of new tokens and the `Saving`."""
    found = {}
    lengths, savings = (batch.gen_length for batch in batches), (variant.saving for variant in args.variants)
    for gen_length, saving in product(dict.fromkeys(lengths), dict.fromkeys(savings)):
        with blame_setting(args.parser):
            found[gen_length, saving] = settings_for(
                family,
                gen_length=gen_length,
                steps=args.steps or gen_length,
                block_length=args.block_length,
                early_stop=args.early_stop,
                **saving.given,
            )
    return found
