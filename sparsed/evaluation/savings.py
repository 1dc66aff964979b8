"""Caches and thresholds of an evaluation: flags that take several values, and all their combinations."""

import math
from collections.abc import Callable
from itertools import product
from typing import Any

from ..console.readers import list_of, number_in, some_of, whole
from ..sampling.saving import CACHES, Saving


def add_caches(group: Any) -> None:
    """Add --cache and --refresh."""
    about = "the scripts' (default: none)"
    group.add_argument("--cache", type=some_of(CACHES), default=["none"], metavar="NAMES", help=about)
    about = "with a cache, the scripts' (default: 1)"
    group.add_argument("--refresh", type=list_of(whole(0)), metavar="VALUES", help=about)


def add_bounds(group: Any) -> None:
    """Add --threshold and --factor; their values are alternatives."""
    sure, surer = number_in(0, math.inf), number_in(0, math.inf, above=True)
    about = "the scripts'; none is the fixed schedule (default: none, or without it if --factor is given)"
    group.add_argument("--threshold", type=list_of(_or_none(sure)), metavar="VALUES", help=about)
    group.add_argument(
        "--factor",
        type=list_of(surer),
        default=[],
        metavar="VALUES",
        help="the scripts' --factor, in addition to --threshold's",
    )


def _or_none(read: Callable[[str], float]) -> Callable[[str], float | None]:
    return lambda word: None if word == "none" else read(word)


def savings_of(given: dict[str, Any]) -> list[Saving]:
    """Every combination of the lists' values, which are taken out of `given`.

    Raises:
        SettingError: a refresh without a cache.
    """
    caches, refreshes = given.pop("cache"), given.pop("refresh")
    if refreshes is not None and caches == ["none"]:
        Saving(refresh=refreshes[0]).check_saving()
    # 1 is what none means
    fills = [
        (cache, None if cache == "none" or number == 1 else number)
        for cache, number in product(caches, refreshes or [1])
    ]
    thresholds, factors = given.pop("threshold", None), given.pop("factor", [])
    bounds = [(value, None) for value in thresholds or ([] if factors else [None])] + [(None, f) for f in factors]
    found = [
        Saving(cache=cache, refresh=refresh, threshold=threshold, factor=factor)
        for (cache, refresh), (threshold, factor) in product(fills, bounds)
    ]
    return list(dict.fromkeys(found))
