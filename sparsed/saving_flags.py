"""The flags for what saves rows and steps (`sampling.saving`), which the scripts and the evaluation share."""

import argparse
import math
from typing import Any

from .console.parser import add_value
from .console.readers import number_in, whole
from .sampling.saving import CACHES, OFF


def add_saving(group: Any, stop: str = "") -> None:
    """Add the flags to a group of a parser; `stop` is what the help says of --early_stop in addition."""
    cache = (
        "compute only some rows inside a block, over the other rows' cached keys: its own (dual), or those from its "
        "start on (prefix)"
    )
    add_value(group, "--cache", cache, "none", choices=CACHES)
    refresh = "with a cache: compute all rows at every N-th block's start; 0: at the first one's only (default: 1)"
    group.add_argument("--refresh", type=whole(0), metavar="N", help=refresh)
    which = group.add_mutually_exclusive_group()
    sure = "commit every token of the block whose probability is at least P, so that fewer steps are needed"
    which.add_argument("--threshold", type=number_in(0, math.inf), metavar="P", help=sure)
    surer = "instead of --threshold: commit the n likeliest as long as (n + 1) (1 - probability of the n-th) < F"
    which.add_argument("--factor", type=number_in(0, math.inf, above=True), metavar="F", help=surer)
    ends = f"end the answer with the block that holds an end token{stop}"
    group.add_argument("--early_stop", action="store_true", help=ends)


def saving_of(flags: argparse.Namespace) -> dict[str, Any]:
    """What the flags say, as a sampler's settings take it."""
    return {name: getattr(flags, name) for name in OFF}
