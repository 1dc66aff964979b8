"""The ranking of `--advise`, with caches: whole runs, put together from one forward of each kind."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import SparseDConfig
from ..laps import Laps
from ..models.loading import GIB, weight_bytes
from ..sampling import Settings
from ..sampling.replay import UNTIL_REPLAYED
from ..sampling.runner import StepRunner
from ..sampling.saving import OFF
from ..sampling.unmasking import SettingError
from ..schedule import Progress
from .losses import loss, lost
from .memory import free_for_all, peak_bytes
from .running import Job

RANKED = "ranked, with --cache dual where it says cache (x: as fast as the slowest):"


@dataclass(frozen=True)
class Forwards:
    """Seconds of one forward of each kind: of all rows, with full attention, selecting and sparse; of the answer's rows
    over the cached prompt; and of a block's rows over cached keys."""

    full: float
    selecting: float
    sparse: float
    answer: float
    cached: float


@dataclass(frozen=True)
class Way:
    """A way to generate, and what it takes.

    Args:
        flags: what its command has in addition to the call's flags.
        fewest, most: seconds. They differ only if a threshold or factor leaves the number of steps open: `fewest` has
            one step per block, `most` all steps.
        whole: forwards of all rows, at most.
        tokens_per_forward: those that `fewest` and `most` assume.
        nats: that were lost per masked token where this was measured (`losses`).
    """

    name: str
    flags: dict[str, Any]
    fewest: float
    most: float
    whole: int
    tokens_per_forward: tuple[float, float]
    nats: float | None


def with_cache(sampler: Settings) -> Settings:
    """The sampler with a cache and nothing else; SettingError where the region cannot be cut into blocks."""
    return replace(sampler, **{**OFF, "cache": "dual"})


def ways(
    job: Job,
    forwards: Forwards,
    whole_runs: tuple[float, float],
    keeps_all: bool,
    dense: Mapping[float, Forwards],
) -> list[Way]:
    """Every way to generate, the fastest first; `whole_runs`, `keeps_all` and `dense` as in `every_way`."""
    args, prompt_tokens = job.args, len(job.input_ids)
    found = every_way(args.sampler, args.config, prompt_tokens, forwards, whole_runs, keeps_all, dense)
    return sorted(found, key=lambda way: (way.most, way.fewest))


def every_way(
    sampler: Settings,
    config: SparseDConfig,
    prompt_tokens: int,
    forwards: Forwards,
    whole_runs: tuple[float, float],
    keeps_all: bool = False,
    dense: Mapping[float, Forwards] = MappingProxyType({}),
) -> Iterator[Way]:
    """With full attention and with SparseD, with a cache and without, and with all rows computed once.

    Args:
        whole_runs: seconds of all steps without a cache, with full attention and with SparseD.
        keeps_all: whether SparseD keeps every block here, and loses nothing.
        dense: by `select`, the forwards with dense answer rows, which are ranked with a cache too.
    """
    open_ended = sampler.bound is not None
    cached = with_cache(sampler)
    blocks, steps = cached.blocks or 1, sum(not idle for idle in sampler.plain().idle)

    def tokens_per_forward(most: int) -> tuple[float, float]:
        return sampler.gen_length / (blocks if open_ended else most), sampler.gen_length / most

    def nats_of(chosen: SparseDConfig | None, how: Settings, **cache: bool) -> float | None:
        return None if open_ended else loss(None if keeps_all else chosen, how, prompt_tokens, **cache)

    plain = replace(sampler, cache="none", refresh=None)
    for name, chosen, most in (("full attention", None, whole_runs[0]), ("SparseD", config, whole_runs[1])):
        fewest = whole_rows(blocks, plain, chosen, forwards) if open_ended else most
        yield Way(
            name, {"origin": chosen is None}, fewest, most, steps, tokens_per_forward(steps), nats_of(chosen, plain)
        )
    inner = blocks * (min(sampler.steps // blocks, cached.block_length or 1) - 1)
    caches: list[tuple[str, dict[str, Any], SparseDConfig | None, Forwards]] = [
        ("cache", {}, None, forwards),
        ("cache and SparseD", {}, config, forwards),
        ("cache, all rows once", {"refresh": 0}, None, forwards),
    ]
    for select, times in dense.items():
        rule = replace(config, select=select, dense_answer=True)
        own: dict[str, Any] = {"select": select, "dense_answer": True}
        caches.append((f"cache and dense answer rows, select {select:g}", own, rule, times))
    for name, own, chosen, times in caches:
        refresh = own.get("refresh")
        refreshing = replace(cached, refresh=refresh)
        whole = refreshing.refreshes(blocks)
        refreshed = whole_rows(whole, refreshing, chosen, times) + (blocks - whole) * times.answer
        most = refreshed + inner * times.cached
        flags = {"origin": chosen is None, "cache": "dual", "refresh": refresh} | own
        fewest = refreshed if open_ended else most
        nats = nats_of(chosen, refreshing, cached=True, once=refresh == 0)
        yield Way(name, flags, fewest, most, whole, tokens_per_forward(blocks + inner), nats)


def whole_rows(count: int, sampler: Settings, config: SparseDConfig | None, forwards: Forwards) -> float:
    """Seconds of `count` forwards of all rows, if each commits the same number of tokens.

    Args:
        config: None for full attention.
    """
    if config is None:
        return count * forwards.full
    schedule = sampler.schedule(config, count, sampler.blocks, needs_scores=True)
    full = sum(not schedule.wants_pattern(Progress(step, step / count)) for step in range(count))
    if full == count:
        return count * forwards.full
    return full * forwards.full + forwards.selecting + (count - full - 1) * forwards.sparse


def no_cache(job: Job, prompt_tokens: int) -> str | None:
    """Why no cache can be timed here, None if one can."""
    try:
        cached = with_cache(job.args.sampler)
    except SettingError as error:
        return f"a cache needs blocks: --{error.argument} {error.must}"
    device = job.model.device
    needed = peak_bytes(job.model, cached, None, device, prompt_tokens) - weight_bytes(job.model)
    free = free_for_all(job.model.ranks, device)
    return None if needed <= free else f"caching takes {needed / GIB:.1f} GiB, of which {free / GIB:.1f} GiB are free"


def canvas_of(job: Job, prompt_tokens: int) -> Tensor:
    """The prompt repeated or cut to that length, and masks for the answer: ids [1, T], with guidance [2, T]."""
    ids = torch.tensor([list(islice(cycle(job.input_ids), prompt_tokens))], device=job.model.device)
    canvas = F.pad(ids, (0, job.args.sampler.gen_length), value=job.model.config.mask_token_id)
    return canvas.repeat(job.args.sampler.sequences, 1)


@torch.no_grad()
def time_few_rows(job: Job, prompt_tokens: int) -> tuple[float, float]:
    """Seconds of a forward of the answer's rows over the cached prompt, and of a block's rows over cached keys."""
    model, sampler, canvas = job.model, with_cache(job.args.sampler), canvas_of(job, prompt_tokens)
    most_rows = sampler.most_rows * len(canvas)
    runner = StepRunner(model, None, None, prompt_tokens - 1, most_rows, model.kv_cache(*canvas.shape))
    start = prompt_tokens - sampler.shift
    rows = start + torch.arange(sampler.most_rows, device=model.device)
    runner(canvas, rows)  # which fills the cache
    laps = Laps(model.device)
    laps.mark()
    for stop in (canvas.shape[1], prompt_tokens + sampler.most_rows):
        for _ in range(UNTIL_REPLAYED + 1):  # the first one may compile; before the last, one is replayed
            runner(canvas, rows, (start, stop))
            laps.mark()
    runner.check()
    seconds = laps.seconds()
    return seconds[UNTIL_REPLAYED], seconds[-1]


def way_lines(found: list[dict[str, Any]]) -> list[str]:
    """The ranking as it is printed.

    Args:
        found: `Way`s as the record has them, each with its command.
    """
    slowest = max(way["most"] for way in found)
    lines = [RANKED]
    for way in found:
        took = f"{way['most']:.1f} s"
        if way["fewest"] < way["most"]:
            many, few = way["tokens_per_forward"]
            took = f"{way['fewest']:.1f} to {took}, if a forward commits {many:.3g} tokens or {few:.3g}"
        lines.append(f"  {way['name']}: {took}, {slowest / way['most']:.1f}x{lost(way['nats'])}; {way['command']}")
    cached = [way for way in found if way["flags"].get("cache") and way["flags"]["refresh"] is None]
    fastest = min(cached, key=lambda way: way["most"], default=None)
    if fastest and fastest["name"] == "cache":
        whole = fastest["whole"]
        with_so_many = "one forward" if whole == 1 else f"{whole} forwards"
        lines.append(f"  selecting blocks does not pay with {with_so_many} of all rows: add --origin")
    return lines


def as_record(found: list[Way], command: Any) -> list[dict[str, Any]]:
    """The ways for the record, each with the command that `command(**flags)` words."""
    return [{**asdict(way), "command": command(**way.flags)} for way in found]
